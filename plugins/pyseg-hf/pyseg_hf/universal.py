"""Networks that find masks: Mask2Former, MaskFormer, OneFormer, EoMT, DETR and RF-DETR."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyseg.errors import PysegError
from pyseg.image import default_palette, require_rgb8
from pyseg.models import require_evaluation_mode
from pyseg.types import Instances, Sample, Segment, Segmentation, Segments

from . import files, targets
from .semantic import Network

Task = Literal["semantic", "instance", "panoptic"]
_DETECTORS = ("detr", "rf_detr")  # their outputs and losses are those of detectors with masks
_EOMT = ("eomt", "eomt_dinov3")
_BINARY = ("mask2former", "maskformer", "rf_detr")  # give instances that may overlap


class UniversalHF(nn.Module):
    """A network that finds masks: `predict` takes images, ``forward`` samples and gives losses.

    Args:
        model: of transformers.
        processor: of its images.
        classes: names, in the order of the network's labels.
        task: what `predict` gives: logits, instances or panoptic segments; None = see `hf`.
        threshold: the score from which instances and segments count; None = the library's.
        stuff: names of classes that are not countable.
        tokens: of OneFormer: ids [1, L] of the task.
        tokenizer: of OneFormer, for the texts that its contrastive loss compares with queries.

    Raises:
        ValueError: a task that it cannot do, a threshold out of 0..1, ``stuff`` that is no class.
    """

    tokens: Tensor | None

    def __init__(
        self,
        model: Any,
        processor: Any,
        classes: Sequence[str],
        task: Task | None,
        *,
        threshold: float | None = None,
        stuff: Sequence[str] = (),
        tokens: Tensor | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        self.kind = model.config.model_type
        self.processor, self.classes = processor, tuple(classes)
        self.task = self._checked_task(task)
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be a score, 0 to 1, got {threshold}")
        self.threshold, self.tokenizer = threshold, tokenizer
        self.stuff = frozenset(_index(name, self.classes) for name in _names(stuff))
        self.palette = tuple(tuple(colour) for colour in default_palette(len(self.classes)))
        self.network = Network(model)
        self.register_buffer("tokens", tokens, persistent=False)
        self.eval()

    @property
    def things(self) -> tuple[str, ...]:
        """Names of the classes that are countable."""
        return tuple(name for k, name in enumerate(self.classes) if k not in self.stuff)

    def _checked_task(self, task: Task | None) -> Task:
        if self.kind == "rf_detr":
            if task not in (None, "instance"):
                raise ValueError(
                    f"task={task!r}: an RF-DETR finds instances only; choose task='instance', or a "
                    "Mask2Former, OneFormer, EoMT or DETR"
                )
            return "instance"
        if self.kind not in _EOMT:
            return task or "panoptic"
        # an EoMT sees the squares of an image, for its classes, or all of it padded, for segments
        cuts = bool(self.processor.do_split_image)
        if task is not None and cuts != (task == "semantic"):
            raise ValueError(
                f"task={task!r}: this EoMT is for "
                + ("'semantic'" if cuts else "'panoptic' or 'instance'")
                + " (do_split_image in its preprocessor_config.json); choose that, or an EoMT "
                "that was trained for yours"
            )
        self.processor.do_pad = not cuts
        return task or ("semantic" if cuts else "panoptic")

    @torch.no_grad()  # as in SemanticHF
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
        device = next(self.parameters()).device
        if self.task == "semantic":
            (found,) = self.processor.post_process_semantic_segmentation(
                outputs, target_sizes=[size], return_segmentation_scores=True
            )
            # sums over queries, no probabilities: as such once they add up to one
            scores = found["segmentation_scores"]
            tiny = torch.finfo(scores.dtype).tiny
            return replace(result, logits=scores.clamp_min(tiny).log())
        options = {} if self.threshold is None else {"threshold": self.threshold}
        if self.task == "panoptic":
            if self.kind not in _EOMT:
                options["label_ids_to_fuse"] = set()  # see _segments
            (found,) = self.processor.post_process_panoptic_segmentation(
                outputs, target_sizes=[size], **options
            )
            return replace(result, segments=_segments(found, self.stuff, device))
        if self.kind in _BINARY:
            options["return_binary_maps"] = True
        (found,) = self.processor.post_process_instance_segmentation(
            outputs, target_sizes=[size], **options
        )
        return replace(result, instances=_instances(found, size, device))

    def outputs(self, image: Tensor) -> Any:
        """What the network gives for an image [3, H, W] uint8 RGB, as post-processing takes it."""
        values = self._values([image])
        keys = [key for key in ("pixel_values", "pixel_mask", "patch_offsets") if key in values]
        found = self.network(**{key: values[key] for key in keys}, **self._task_inputs(1))
        wanted = ["class_queries_logits", "masks_queries_logits"]
        if self.kind in _DETECTORS:
            wanted = ["logits", "pred_boxes", "pred_masks"]
        # float: post-processing compares and adds up
        given = {key: found[key].float() for key in wanted}
        return SimpleNamespace(**given, patch_offsets=values.get("patch_offsets"))

    def _values(self, images: Sequence[Tensor]) -> dict[str, Any]:
        values = dict(
            self.processor(
                images=list(images), return_tensors="pt", input_data_format="channels_first"
            )
        )
        first = next(self.parameters())
        values["pixel_values"] = values["pixel_values"].to(first)
        if "pixel_mask" in values:
            values["pixel_mask"] = values["pixel_mask"].to(first.device)
        return values

    def _task_inputs(self, count: int) -> dict[str, Tensor]:
        return {} if self.tokens is None else {"task_inputs": self.tokens.expand(count, -1)}

    def forward(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The network's own loss, of samples with segments, instances or labels.

        Raises:
            ValueError: a sample without any, or one with more masks than the network has queries.
            TypeError: no samples.
        """
        if isinstance(samples, Tensor) or not all(isinstance(s, Sample) for s in samples):
            raise TypeError(
                f"a {self.kind} learns masks, from lists of samples: train it by "
                "pyseg.training.fit with step=pyseg_hf.step; pyseg.train is for semantic networks"
            )
        values = self._values([sample.image for sample in samples])
        pixels = values["pixel_values"]
        found = [targets.masks_of(sample, self.task, self.stuff) for sample in samples]
        config = self.network.model.config
        queries = getattr(config, "decoder_config", config).num_queries
        for sample, (masks, _) in zip(samples, found, strict=True):
            if len(masks) > queries:
                raise ValueError(
                    f"sample {sample.name!r} has {len(masks)} masks, and this {self.kind} finds "
                    f"{queries} at most: choose a checkpoint with more queries, or a crop"
                )
        rows = [
            (masks.to(pixels), labels.to(pixels.device))
            for masks, labels in targets.placed(self.processor, values, samples, found)
        ]
        inputs = {"pixel_values": pixels}
        if "pixel_mask" in values:
            inputs["pixel_mask"] = values["pixel_mask"]
        if self.kind in _DETECTORS:
            height, width = pixels.shape[-2:]
            scale = pixels.new_tensor([width, height, width, height])
            inputs["labels"] = [
                {
                    "class_labels": labels,
                    "boxes": _centred(targets.boxes(masks).to(scale) / scale),
                    "masks": masks,
                }
                for masks, labels in rows
            ]
        else:
            inputs["mask_labels"] = [masks for masks, _ in rows]
            inputs["class_labels"] = [labels for _, labels in rows]
        if self.kind == "oneformer":
            inputs.update(self._task_inputs(len(samples)))
            if config.is_training:
                inputs["text_inputs"] = self._texts([labels for _, labels in rows])
        # RF-DETR's loss has logarithms of 1 - p, which bfloat16 rounds to 0
        plain = self.kind == "rf_detr"
        with torch.autocast(pixels.device.type, enabled=False) if plain else nullcontext():
            return {"loss": self.network(**inputs).loss.squeeze()}

    def _texts(self, found: Sequence[Tensor]) -> Tensor:
        """OneFormer's texts, [N, T, L]: the classes in an image, then as many of its task."""
        if self.tokenizer is None:
            raise PysegError(
                "this OneFormer has no tokenizer, which its contrastive loss needs, as it comes "
                "from a saved pipeline: build it by its id, and pass weights=<file>"
            )
        config = self.network.model.config
        count = config.num_queries - config.text_encoder_n_ctx
        article = "an" if self.task in ("instance", "panoptic") else "a"  # sic, as it was trained
        texts = []
        for labels in found:
            own = [f"a photo with a {self.classes[k]}" for k in labels.sort().values.tolist()]
            rest = f"{article} {self.task} photo"
            texts.append([*own, *[rest] * count][:count])
        length = config.text_encoder_context_length
        rows = [files.task_tokens(self.tokenizer, row, length) for row in texts]
        return torch.stack(rows).to(found[0].device)

    def config(self) -> dict[str, Any]:
        """What makes it again without the files of its id; saved with a pipeline."""
        model: Any = self.network.model
        return {"configuration": files.saved(model.config, self.processor, self.tokens)}


def step(network: nn.Module, batch: Sequence[Sample]) -> dict[str, Tensor]:
    """The ``step`` of `pyseg.training.fit` for a `UniversalHF`; a batch is a list of samples."""
    return network(batch)


def _names(given: Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _index(name: str, classes: Sequence[str]) -> int:
    if name in classes:
        return classes.index(name)
    near = difflib.get_close_matches(str(name), classes, n=3, cutoff=0.0)
    raise ValueError(f"stuff names {name!r}, which is no class; nearest are {', '.join(near)}")


def _centred(boxes: Tensor) -> Tensor:
    """xyxy to centre, width and height."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return torch.cat([(low + high) / 2, high - low], 1)


def _segments(found: Mapping[str, Any], stuff: frozenset[int], device: torch.device) -> Segments:
    """Of a post-processed result, whose ids count from 0 or 1 and whose void is -1 or 0.

    Segments of one stuff class become one here: the library's processors that fuse them may give
    the next segment an id that is taken.
    """
    source = found["segmentation"].long().to(device)
    table = torch.zeros(source.shape, dtype=torch.int32, device=device)
    items: list[Segment] = []
    fused: dict[int, int] = {}  # class -> place in items
    for info in found["segments_info"]:
        inside = source == info["id"]
        label, area = info["label_id"], int(inside.sum())
        if area and label in fused:
            place = fused[label]
            items[place] = replace(items[place], area=items[place].area + area)
            table[inside] = items[place].id
        elif area:
            if label in stuff:
                fused[label] = len(items)
            items.append(Segment(len(items) + 1, label, float(info["score"]), area))
            table[inside] = len(items)
    return Segments(table, tuple(items))


def _instances(found: Mapping[str, Any], size: tuple[int, int], device: torch.device) -> Instances:
    """Of a post-processed result: a mask for each, or a map of ids, where some may be covered."""
    infos, source = found["segments_info"], found["segmentation"].to(device)
    masks = torch.zeros(0, *size, dtype=torch.bool, device=device)
    if infos and source.ndim == 3:
        masks = source.bool()
    elif infos:
        masks = torch.stack([source == info["id"] for info in infos])
    seen = masks.flatten(1).any(1)
    masks = masks[seen]
    infos = [info for info, keep in zip(infos, seen.tolist(), strict=True) if keep]
    scores = torch.tensor([float(info["score"]) for info in infos], device=device)
    labels = torch.tensor([info["label_id"] for info in infos], device=device)
    return Instances(targets.boxes(masks), masks, scores, labels.long())
