"""Mask R-CNN on torchvision's detector, and what panoptic models share with it.

Class indices put the stuff classes first: 0 to num_stuff - 1 are stuff, the others things. Images
are resized as torchvision's detectors do (``min_size``, ``max_size``). Regions are pooled by
`pyseg.ops.roi_align`.

``weights`` of every model of instances is a path or a URL of its own weights or of what to start
from, or a name of torchvision's for the latter: ``"COCO_V1"``, a Mask R-CNN with ResNet-50, or
``"IMAGENET1K_V1"``, a classifier of the same backbone (``_V2`` where there is one). Of these, all
that fits is taken, the rest is random, and normalisation stays frozen in training.

Source: He, Gkioxari, Dollár & Girshick, "Mask R-CNN", ICCV 2017.
"""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..image import default_palette, require_rgb8
from ..ops import replace_roi_pooling
from ..ops.panoptic_merge import paste
from ..types import Instances, Sample, Segmentation, Segments
from ..weights import load_into
from .backbones import published_weights, resnet
from .facts import COCO_LICENCE, IMAGENET_LICENCE, facts
from .semantic import class_names, read_weights, require_evaluation_mode

_PAPER = "He, Gkioxari, Dollár & Girshick, Mask R-CNN, ICCV 2017"

COCO_THINGS = 80
COCO_V1 = "bf2d0c1e"
"""Begin of the sha256 of torchvision's ``MaskRCNN_ResNet50_FPN_Weights.COCO_V1``."""


class Detections(NamedTuple):
    """Of one image, in its pixels, by falling score."""

    boxes: Tensor  # [K, 4] xyxy
    scores: Tensor  # [K]
    labels: Tensor  # [K] class indices of the model
    masks: Tensor  # [K, 28, 28] probabilities


class InstanceModel(nn.Module):
    """Mask R-CNN; its subclasses add a semantic branch and a rule that merges both.

    ``forward`` takes samples and gives losses; `predict` takes images.

    Args:
        detector: torchvision's ``MaskRCNN``; its labels 1 to T are the things.
        classes: names, the stuff classes first.
        num_stuff: how many of them are stuff.
        palette: one colour per class; None = `pyseg.image.default_palette`.

    Raises:
        ValueError: no class is left for things.
    """

    def __init__(
        self,
        detector: Any,
        classes: Sequence[str],
        num_stuff: int = 0,
        *,
        palette: Sequence[tuple[int, int, int]] | None = None,
    ) -> None:
        super().__init__()
        self.classes = tuple(classes)
        if not 0 <= num_stuff < len(self.classes):
            raise ValueError(
                f"num_stuff must leave at least one thing among "
                f"{len(self.classes)} classes, got {num_stuff}"
            )
        self.num_stuff = num_stuff
        colours = default_palette(len(self.classes)) if palette is None else palette
        self.palette = tuple((int(r), int(g), int(b)) for r, g, b in colours)
        self.detector = detector
        self.semantic: Any = None  # a module in subclasses
        self._frozen = False
        self.eval()

    def freeze_normalisation(self) -> InstanceModel:
        """Keeps statistics and scales of the backbone's batch normalisation while training.

        As is usual with pretrained backbones: statistics of a few images are worse.
        """
        self._frozen = True
        for parameter in (p for norm in self._norms() for p in norm.parameters()):
            parameter.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> InstanceModel:
        super().train(mode)
        if self._frozen:
            for norm in self._norms():
                norm.eval()
        return self

    def _backbones(self) -> list[nn.Module]:
        return [self.detector.backbone.body]

    def _norms(self) -> list[nn.Module]:
        return [
            part
            for body in self._backbones()
            for part in body.modules()
            if isinstance(part, nn.BatchNorm2d)
        ]

    @property
    def things(self) -> tuple[str, ...]:
        """Names of the classes that are countable."""
        return self.classes[self.num_stuff :]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            samples: with ``instances`` of thing classes, and with ``labels`` if there is a semantic
                branch.

        Returns:
            torchvision's five losses of RPN, boxes and masks, and those of the semantic branch.

        Raises:
            ValueError: a sample lacks what is needed, or an instance is of a stuff class.
        """
        images = [sample.image.to(self.device).float() / 255 for sample in samples]
        targets = [self._target(sample) for sample in samples]
        batch, targets = self.detector.transform(images, targets)
        features = self.detector.backbone(batch.tensors)
        proposals, losses = self.detector.rpn(batch, features, targets)
        _, of_heads = self.detector.roi_heads(features, proposals, batch.image_sizes, targets)
        return {**losses, **of_heads, **self._semantic_losses(samples, batch, features, targets)}

    def _semantic_losses(
        self, samples: Sequence[Sample], batch: Any, features: Any, targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        return {}

    def _target(self, sample: Sample) -> dict[str, Tensor]:
        if sample.instances is None:
            raise ValueError(f"sample {sample.name!r} has no instances to learn from")
        if self.semantic is not None and sample.labels is None:
            raise ValueError(f"sample {sample.name!r} has no labels for the semantic branch")
        instances = sample.instances
        labels = instances.labels
        if len(labels) and not self.num_stuff <= int(labels.min()) <= int(labels.max()) < len(
            self.classes
        ):
            raise ValueError(
                f"sample {sample.name!r} has instances of classes "
                f"{sorted(set(labels.tolist()))}; things are {self.num_stuff} to "
                f"{len(self.classes) - 1}"
            )
        boxes = instances.boxes.float()
        solid = ((boxes[:, 2:] - boxes[:, :2]) > 1).all(1)  # torchvision refuses empty boxes
        if instances.crowd is not None:  # a region of many objects is no example of one
            solid &= ~instances.crowd
        return {
            "boxes": boxes[solid].to(self.device),
            "labels": (labels[solid] - self.num_stuff + 1).to(self.device),
            "masks": instances.masks[solid].to(self.device, torch.uint8),
        }

    @torch.inference_mode()
    def predict(self, images: Sequence[Tensor]) -> list[Segmentation]:
        """Instances, and where there is a semantic branch also logits and panoptic segments.

        Args:
            images: each [3, H, W] uint8 RGB, of any sizes.

        Returns:
            One `Segmentation` per image with ``instances`` and, with a semantic branch, ``logits``
            at a quarter of the network's input and ``segments``.

        Raises:
            ValueError: an image of another shape.
            TypeError: an image of another dtype.
            PysegError: the model is in training mode.
        """
        require_evaluation_mode(self)
        for index, image in enumerate(images):
            require_rgb8(image, f"images[{index}]")
        return [self._predict_one(image) for image in images]

    def _predict_one(self, image: Tensor) -> Segmentation:
        size = (image.shape[1], image.shape[2])
        batch, _ = self.detector.transform([image.to(self.device).float() / 255])
        features = self.detector.backbone(batch.tensors)
        proposals, _ = self.detector.rpn(batch, features)
        found, _ = self.detector.roi_heads(features, proposals, batch.image_sizes)
        height, width = (size[i] / batch.image_sizes[0][i] for i in range(2))
        detections = Detections(
            found[0]["boxes"] * found[0]["boxes"].new_tensor([width, height, width, height]),
            found[0]["scores"],
            found[0]["labels"] - 1 + self.num_stuff,
            found[0]["masks"][:, 0],
        )
        logits, segments = self._panoptic(detections, batch, features, size)
        return Segmentation(
            size,
            self.classes,
            logits=logits,
            segments=segments,
            instances=Instances(
                detections.boxes,
                paste(detections.masks, detections.boxes, size),
                detections.scores,
                detections.labels,
            ),
            image=image,
            palette=self.palette,
        )

    def _panoptic(
        self, detections: Detections, batch: Any, features: Any, size: tuple[int, int]
    ) -> tuple[Tensor | None, Segments | None]:
        """Logits [C, h, w] of the semantic branch, and what they and the detections become."""
        return None, None


# --------------------------------------------------------------------------------------- factories


@facts(
    paper=_PAPER,
    scores=[
        (37.9, "box AP", "COCO val2017", "torchvision"),
        (34.6, "mask AP", "COCO val2017", "torchvision"),
    ],
    licence=COCO_LICENCE,
)
def maskrcnn(
    *,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
    backbone: str = "resnet50",
    channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
) -> InstanceModel:
    """Mask R-CNN (He et al., 2017) with a ResNet and a feature pyramid; instances only.

    Args:
        num_classes: number of thing classes; None = the 90 ids of COCO. Another number keeps all
            but the last layers of torchvision's weights, which are then random, with a warning.
        weights: ``"default"`` = torchvision's ``"COCO_V1"``, for ResNet-50 only;
            ``"IMAGENET1K_V1"`` = a backbone trained to classify images, the rest random; a path or
            a URL = a checkpoint of torchvision's or of `pyseg train`; None = random.
        backbone: ``"resnet18"`` to ``"resnet152"``.
        channels: of the feature pyramid and the heads on it, a multiple of 8.
        min_size: images are resized so that their shorter side has this many pixels,
        max_size: unless the longer one would then have more than this.

    Raises:
        ValueError: an option out of range.
        WeightsError: ``weights`` cannot be found or belong to another network, or ``"default"``
            where nothing is published.
    """
    names = class_names(num_classes, _coco_names())
    model = InstanceModel(build_detector(backbone, len(names), min_size, max_size, channels), names)
    default = "COCO_V1" if (backbone, channels) == ("resnet50", 256) else None
    name = f"maskrcnn(backbone={backbone!r}, channels={channels})"
    return load_weights(model, name, weights, backbone, default=default)


@facts(
    paper="Li, Xie, Chen, Dollár, He & Girshick, Benchmarking detection transfer learning, 2021",
    scores=[
        (47.4, "box AP", "COCO val2017", "torchvision"),
        (41.8, "mask AP", "COCO val2017", "torchvision"),
    ],
    licence=COCO_LICENCE,
)
def maskrcnn_resnet50_fpn_v2(
    *,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
    min_size: int = 800,
    max_size: int = 1333,
) -> InstanceModel:
    """Mask R-CNN with ResNet-50 and the improved recipe of Li et al. (2021); instances only.

    Args:
        num_classes: number of thing classes; None = the 90 ids of COCO. Another number keeps all
            but the last layers of torchvision's weights, which are then random, with a warning.
        weights: ``"default"`` = torchvision's ``"COCO_V1"`` of this version; ``"IMAGENET1K_V1"`` =
            a backbone trained to classify images, the rest random; a path or a URL = a checkpoint
            of torchvision's or of `pyseg train`; None = random.
        min_size: images are resized so that their shorter side has this many pixels,
        max_size: unless the longer one would then have more than this.

    Raises:
        ValueError: ``num_classes`` below 1.
        WeightsError: ``weights`` cannot be found or belong to another network.
    """
    name = "maskrcnn_resnet50_fpn_v2"
    names = class_names(num_classes, _coco_names())
    detector = importlib.import_module("torchvision.models").get_model(
        name,
        weights=None,
        weights_backbone=None,
        num_classes=len(names) + 1,
        min_size=min_size,
        max_size=max_size,
    )
    model = InstanceModel(replace_roi_pooling(detector), names)
    return load_weights(model, name, weights, "resnet50", default="COCO_V1", detector=name)


@facts(paper=_PAPER, licence=IMAGENET_LICENCE)
def maskrcnn_resnet101_fpn(
    *,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
    backbone: str = "resnet101",
    channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
) -> InstanceModel:
    """`maskrcnn` with ResNet-101; instances only.

    Args:
        num_classes: number of thing classes; None = 80.
        weights: nothing is published for this backbone, so that ``"default"`` is an error that says
            so; ``"IMAGENET1K_V1"`` = a backbone trained to classify images, the rest random; a path
            or a URL = a checkpoint of `pyseg train`; None = random.
        backbone: ``"resnet18"`` to ``"resnet152"``.
        channels: of the feature pyramid and the heads on it, a multiple of 8.
        min_size: images are resized so that their shorter side has this many pixels,
        max_size: unless the longer one would then have more than this.

    Raises:
        ValueError: an option out of range.
        WeightsError: ``weights`` cannot be found or belong to another network, or ``"default"``
            where nothing is published.
    """
    return maskrcnn(
        num_classes=COCO_THINGS if num_classes is None else num_classes,
        weights=weights,
        backbone=backbone,
        channels=channels,
        min_size=min_size,
        max_size=max_size,
    )


def _coco_names() -> tuple[str, ...]:
    """Names of COCO's ids from 1 on; those that COCO does not use are all N/A to torchvision."""
    models = importlib.import_module("torchvision.models")
    categories = models.get_model_weights("maskrcnn_resnet50_fpn").DEFAULT.meta["categories"][1:]
    return tuple(
        name if name != "N/A" else f"unused {number}" for number, name in enumerate(categories, 1)
    )


# -------------------------------------------------------- what factories of panoptic models share


def build_detector(
    backbone: str, things: int, min_size: int, max_size: int, channels: int = 256
) -> Any:
    """torchvision's Mask R-CNN with random weights, pooling by `pyseg.ops.roi_align`.

    Raises:
        ValueError: no thing, an unknown backbone, or ``channels`` that 8 does not divide.
    """
    if things < 1:
        raise ValueError(f"num_classes must leave at least one thing, got {things}")
    if channels < 8 or channels % 8:
        raise ValueError(f"channels must be a multiple of 8, got {channels}")
    faster = importlib.import_module("torchvision.models.detection.faster_rcnn")
    mask = importlib.import_module("torchvision.models.detection.mask_rcnn")
    backbones = importlib.import_module("torchvision.models.detection.backbone_utils")
    pyramid = importlib.import_module("torchvision.ops.feature_pyramid_network")
    body, widths = resnet(backbone)
    levels = {f"layer{k + 1}": str(k) for k in range(4)}
    network = backbones.BackboneWithFPN(
        body, levels, widths, channels, extra_blocks=pyramid.LastLevelMaxPool()
    )
    wide, classes = 4 * channels, things + 1
    return replace_roi_pooling(
        mask.MaskRCNN(
            network,
            min_size=min_size,
            max_size=max_size,
            box_head=faster.TwoMLPHead(49 * channels, wide),
            box_predictor=faster.FastRCNNPredictor(wide, classes),
            mask_head=mask.MaskRCNNHeads(channels, (channels,) * 4, 1),
            mask_predictor=mask.MaskRCNNPredictor(channels, channels, classes),
        )
    )


def load_weights(
    model: InstanceModel,
    name: str,
    weights: str | Path | None,
    backbone: str,
    *,
    default: str | None = None,
    detector: str = "maskrcnn_resnet50_fpn",
) -> InstanceModel:
    """Gives ``model`` its own weights, or torchvision's of a Mask R-CNN or of a classifier.

    Args:
        model: random.
        name: of the model, for messages.
        weights: as the options of the factories.
        backbone: whose classifier's weights have names here.
        default: the name that ``"default"`` means; None = nothing is published.
        detector: torchvision's Mask R-CNN whose weights have names here, if they are of
            ``backbone``.

    Returns:
        ``model``, in evaluation mode.

    Raises:
        WeightsError: ``weights`` cannot be found or belong to another network.
    """
    if weights is None:
        return model.eval()
    known = published_weights(backbone, *([detector] if backbone == "resnet50" else []))
    state, path = read_weights(name, weights, known, default)
    if not any(key.startswith("detector.") for key in state):
        detects = any(key.startswith("backbone.") for key in state)
        if detects and _without_epsilon(state, path):
            state = {
                key: value - 1e-5 if key.endswith("running_var") else value
                for key, value in state.items()
            }
        last = "roi_heads.box_predictor.cls_score.bias"
        own = len(model.things)
        if detects and model.semantic is None and last in state and len(state[last]) != own + 1:
            warnings.warn(
                f"{name}: {path} is for {len(state[last]) - 1} classes, so the last layers for "
                f"{own} are random: train them, or give weights that were",
                stacklevel=3,
            )
        state = state_from_torchvision(model, state)
        model.freeze_normalisation()
    load_into(model, state, path)
    return model.eval()


def _without_epsilon(state: dict[str, Tensor], path: Path) -> bool:
    """Whether the normalisation of these weights of torchvision's has no epsilon.

    That is so for one published file only. Whatever was trained since with frozen normalisation
    lacks ``num_batches_tracked`` too, but has the usual epsilon of 1e-5 (pytorch/vision#2933).
    """
    if any(key.endswith("num_batches_tracked") for key in state):
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest().startswith(COCO_V1)


def state_from_torchvision(model: InstanceModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of the model from torchvision's of a Mask R-CNN or of a classifier.

    What these cannot have stays as it is in the model: semantic branch and offsets, of a Mask R-CNN
    for other classes the last layers, of a classifier all but the backbone. Anything else that does
    not fit is left to be found by `pyseg.weights.load_into`.
    """
    classifier = not any(key.startswith("backbone.") for key in state)
    bodies = ("detector.backbone.body.", "semantic.body.") if classifier else ("detector.",)
    fitting, used = {}, {"fc.weight", "fc.bias"} if classifier else set()
    for key, own in model.state_dict().items():
        name = next((key.removeprefix(body) for body in bodies if key.startswith(body)), None)
        name = None if name is None else name.replace(".conv2.conv.", ".conv2.")  # deformable
        last = "box_predictor." in key or "mask_predictor.mask_fcn_logits." in key
        if name in state and not (last and state[name].shape != own.shape):
            fitting[key] = state[name]
        elif name is None or last or key.endswith("num_batches_tracked") or ".offset." in key:
            fitting[key] = own
        used.add(name or "")
    return fitting | {name: value for name, value in state.items() if name not in used}
