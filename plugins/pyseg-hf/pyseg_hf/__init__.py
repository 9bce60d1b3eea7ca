"""transformers' segmentation networks as models of pyseg.

Images go through the processor of the checkpoint, and results are those of its post-processing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from pyseg.errors import PysegError, WeightsError
from pyseg.image import default_palette, require_rgb8
from pyseg.models.semantic import SemanticModel, require_evaluation_mode
from pyseg.types import VOID, Instances, Sample, Segment, Segmentation, Segments

Task = Literal["semantic", "instance", "panoptic"]
THRESHOLD = 0.5  # the score from which instances and segments count, as in transformers
AUTO = {
    "semantic": transformers.AutoModelForSemanticSegmentation,
    "universal": transformers.AutoModelForUniversalSegmentation,
}


def hf(
    *,
    id: str,
    task: Task | None = None,
    threshold: float = THRESHOLD,
    num_classes: int | None = None,
    weights: str | None = "default",
) -> SemanticHF | UniversalHF:
    """A segmentation network of transformers, with its processor.

    Args:
        id: its name on the Hugging Face hub, or a folder that ``save_pretrained`` wrote, with the
            network's ``config.json`` and the processor's ``preprocessor_config.json``.
        task: ``"semantic"``, ``"instance"`` or ``"panoptic"``; None = ``"panoptic"`` of a network
            that can do all three (Mask2Former, MaskFormer), ``"semantic"`` of others.
        threshold: the score from which instances and panoptic segments count.
        num_classes: None = as many as the checkpoint has; for another number the layers whose
            shapes depend on it are random, to be trained.
        weights: ``"default"`` = those of ``id``; None = random.

    Raises:
        ValueError: a task that the network cannot do, a number of classes below 1.
        WeightsError: ``id`` is no folder and cannot be fetched, or other ``weights``.
    """
    if task not in (None, "semantic", "instance", "panoptic"):
        raise ValueError(f"task must be 'semantic', 'instance' or 'panoptic', got {task!r}")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if weights not in (None, "default", "DEFAULT"):
        raise WeightsError(
            f"weights: {weights!r}: hf takes the weights of its id, so pass id=<folder of "
            "save_pretrained>; or weights=None for random ones"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(id)
        processor = transformers.AutoImageProcessor.from_pretrained(id)
    except (OSError, ValueError) as error:
        raise _absent(id, error) from error
    kind = "universal" if type(config) in AUTO["universal"]._model_mapping else "semantic"
    if config.model_type in ("detr", "eomt", "eomt_dinov3", "oneformer", "videomt"):
        raise PysegError(f"hf: networks of type {config.model_type!r} are not supported yet")
    if type(config) not in AUTO[kind]._model_mapping:
        raise ValueError(
            f"id={id!r} is a {config.model_type!r}, which transformers has no segmentation "
            "network of; choose one such as a SegFormer or a Mask2Former"
        )
    task = task or ("panoptic" if kind == "universal" else "semantic")
    if kind == "semantic" and task != "semantic":
        raise ValueError(
            f"task={task!r}: {config.model_type!r} networks are semantic only; choose a "
            "Mask2Former or MaskFormer"
        )
    if num_classes is not None and num_classes != len(config.id2label):
        config.num_labels = num_classes
    if kind == "semantic" and hasattr(config, "use_auxiliary_head"):
        config.use_auxiliary_head = False  # predictions do not need it, and losses are pyseg's
    if weights is None:
        network = AUTO[kind].from_config(config)
    else:
        try:
            network = AUTO[kind].from_pretrained(id, config=config, ignore_mismatched_sizes=True)
        except (OSError, ValueError) as error:
            raise _absent(id, error) from error
    classes = _names(config.id2label, num_classes)
    if kind == "semantic":
        return SemanticHF(network, processor, classes)
    return UniversalHF(network, processor, classes, task, threshold)


def _absent(id: str, error: Exception) -> WeightsError:
    return WeightsError(
        f"id={id!r} is neither a folder of save_pretrained nor a model that the hub gives "
        f"({type(error).__name__}: {str(error).splitlines()[0]}); check its name, connect to the "
        "hub, or pass a folder"
    )


def _names(id2label: Mapping[int, str], num_classes: int | None) -> tuple[str, ...]:
    """Of the classes, each once: data sets such as ADE20K have some twice."""
    if num_classes is not None and num_classes != len(id2label):
        return tuple(f"class {k}" for k in range(num_classes))
    names: list[str] = []
    for key in sorted(id2label):
        name = id2label[key]
        names.append(f"{name} ({key})" if name in names else name)
    return tuple(names)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, C, h, w]."""
        return self.model(pixel_values=images).logits

    def __reduce__(self) -> tuple[Any, ...]:
        # transformers hangs functions on its modules while they run, which do not pickle
        model = self.model
        return _restored, (type(model), model.config, model.state_dict(), self.training)


def _restored(kind: Any, config: Any, state: dict[str, Tensor], training: bool) -> _Logits:
    model = kind(config)
    model.load_state_dict(state)
    return _Logits(model).train(training)


class SemanticHF(SemanticModel):
    """A semantic network; training sees images as they are, `predict` as the processor has them.

    Args:
        model: of transformers.
        processor: of its images.
        classes: names, in the order of the logits' channels.
    """

    def __init__(self, model: nn.Module, processor: Any, classes: Sequence[str]) -> None:
        statistics = {}
        for key, value in (("mean", processor.image_mean), ("std", processor.image_std)):
            if value is not None and getattr(processor, "do_normalize", True):
                statistics[key] = value
            else:
                statistics[key] = (0.0,) * 3 if key == "mean" else (1.0,) * 3
        super().__init__(_Logits(model), classes, **statistics)
        self.processor = processor

    @torch.inference_mode()
    def predict(self, images: Sequence[Tensor]) -> list[Segmentation]:
        """Images, each [3, H, W] uint8 RGB, to predictions with logits at the network's stride."""
        require_evaluation_mode(self)
        for index, image in enumerate(images):
            require_rgb8(image, f"images[{index}]")
        return [
            Segmentation(
                (image.shape[1], image.shape[2]),
                self.classes,
                logits=self.network(self._prepare(image))[0],
                image=image,
                palette=self.palette,
            )
            for image in images
        ]

    def _prepare(self, image: Tensor) -> Tensor:
        values = self.processor(
            images=image, return_tensors="pt", input_data_format="channels_first"
        )
        return values["pixel_values"].to(self.mean.device)


class UniversalHF(nn.Module):
    """Mask2Former or MaskFormer: ``forward`` takes samples and gives losses.

    Args:
        model: of transformers.
        processor: of its images.
        classes: names, in the order of the network's labels.
        task: what `predict` gives: logits, instances or panoptic segments.
        threshold: the score from which instances and segments count.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        classes: Sequence[str],
        task: Task,
        threshold: float = THRESHOLD,
    ) -> None:
        super().__init__()
        self.model, self.processor, self.task = model, processor, task
        self.classes, self.threshold = tuple(classes), threshold
        self.palette = tuple(tuple(colour) for colour in default_palette(len(self.classes)))
        self.eval()

    @torch.inference_mode()
    def predict(self, images: Sequence[Tensor]) -> list[Segmentation]:
        """Images, each [3, H, W] uint8 RGB, to what the processor makes of the network's output."""
        require_evaluation_mode(self)
        for index, image in enumerate(images):
            require_rgb8(image, f"images[{index}]")
        return [self._predict(image) for image in images]

    def _predict(self, image: Tensor) -> Segmentation:
        size = (image.shape[1], image.shape[2])
        outputs = self.outputs(image)
        result = Segmentation(size, self.classes, image=image, palette=self.palette)
        if self.task == "semantic":
            (found,) = self.processor.post_process_semantic_segmentation(
                outputs, target_sizes=[size], return_segmentation_scores=True
            )
            # sums over queries, no probabilities: as such once they add up to one
            scores = found["segmentation_scores"].float()
            tiny = torch.finfo(scores.dtype).tiny
            return replace(result, logits=scores.clamp_min(tiny).log())
        if self.task == "panoptic":
            (found,) = self.processor.post_process_panoptic_segmentation(
                outputs, threshold=self.threshold, label_ids_to_fuse=set(), target_sizes=[size]
            )
            return replace(result, segments=_segments(found))
        (found,) = self.processor.post_process_instance_segmentation(
            outputs, threshold=self.threshold, target_sizes=[size], return_binary_maps=True
        )
        return replace(result, instances=_instances(found, size, image.device))

    def outputs(self, image: Tensor) -> Any:
        """What the network gives for an image [3, H, W] uint8 RGB."""
        values = self.processor(
            images=image, return_tensors="pt", input_data_format="channels_first"
        )
        device = next(self.model.parameters()).device
        return self.model(**{key: value.to(device) for key, value in values.items()})

    def forward(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The network's own loss for samples with segments or, without, labels.

        Raises:
            ValueError: a sample without either.
        """
        maps, names = zip(*map(_ids, samples), strict=True)
        values = self.processor(
            images=[sample.image for sample in samples],
            segmentation_maps=list(maps),
            instance_id_to_semantic_id=list(names),
            ignore_index=_VOID_ID,
            do_reduce_labels=False,
            return_tensors="pt",
            input_data_format="channels_first",
        )
        device = next(self.model.parameters()).device
        tensors = {k: values[k].to(device) for k in ("pixel_values", "pixel_mask")}
        masks, labels = ([v.to(device) for v in values[k]] for k in ("mask_labels", "class_labels"))
        outputs = self.model(**tensors, mask_labels=masks, class_labels=labels)
        return {"loss": outputs.loss.squeeze()}


def step(network: nn.Module, batch: Sequence[Sample]) -> dict[str, Tensor]:
    """The ``step`` of `pyseg.training.fit` for a `UniversalHF`; a batch is a list of samples."""
    return network(batch)


_VOID_ID = 255  # in maps given to processors, whose ids of segments leave it out


def _ids(sample: Sample) -> tuple[Any, dict[int, int]]:
    """A map of segment ids, and the class of each."""
    if sample.segments is not None:
        labels = {item.id: item.label for item in sample.segments.items if not item.crowd}
        source = sample.segments.map
    elif sample.labels is not None:
        found = [v for v in sample.labels.unique().tolist() if v not in (VOID, -1)]
        labels, source = {value + 1: value for value in found}, sample.labels.long() + 1
    else:
        raise ValueError(f"sample {sample.name!r} has neither segments nor labels to train on")
    ids = torch.full(source.shape, _VOID_ID, dtype=torch.int64)
    names = {}
    for index, (value, label) in enumerate(labels.items()):
        own = index + (index >= _VOID_ID)
        ids[source == value] = own
        names[own] = label
    return ids.to(torch.int32).numpy(), names


def _segments(found: Mapping[str, Any]) -> Segments:
    """Of a post-processed result, whose ids count from 0 or 1 and whose void is -1 or 0."""
    source = found["segmentation"].long()
    table = torch.zeros(source.shape, dtype=torch.int32, device=source.device)
    items = []
    for info in found["segments_info"]:
        inside = source == info["id"]
        if area := int(inside.sum()):
            items.append(Segment(len(items) + 1, info["label_id"], float(info["score"]), area))
            table[inside] = len(items)
    return Segments(table, tuple(items))


def _instances(found: Mapping[str, Any], size: tuple[int, int], device: torch.device) -> Instances:
    infos = found["segments_info"]
    masks = torch.zeros(0, *size, dtype=torch.bool, device=device)
    if infos:
        masks = found["segmentation"].bool()
    boxes = masks.new_zeros(len(masks), 4, dtype=torch.float32)
    for k, mask in enumerate(masks):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        boxes[k] = torch.stack(edges)
    scores = torch.tensor([float(info["score"]) for info in infos], device=masks.device)
    labels = torch.tensor([info["label_id"] for info in infos], device=masks.device)
    return Instances(boxes, masks, scores, labels.long())
