"""Panoptic models of two branches that a heuristic merges: panoptic FPN, and two networks.

Sources: Kirillov, Girshick, He & Dollár, "Panoptic feature pyramid networks", CVPR 2019; for the
merge Kirillov, He, Girshick, Rother & Dollár, "Panoptic segmentation", CVPR 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import panoptic_merge, upsample_argmax
from ..types import VOID, Sample, Segments
from .facts import COCO_LICENCE, facts
from .fcn import FCN
from .maskrcnn import Detections, InstanceModel, build_detector, load_weights
from .semantic import class_names

COCO_CLASSES, COCO_STUFF = 133, 53


class FPNSemanticHead(nn.Module):
    """The semantic branch of panoptic FPN: every level comes to 1/4 in steps of two, and is summed.

    Args:
        channels: of the feature pyramid.
        width: channels inside the branch.
        classes: channels of the logits.
    """

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for level in range(4):
            layers: list[nn.Module] = []
            for step in range(max(level, 1)):
                layers += [
                    nn.Conv2d(channels if step == 0 else width, width, 3, padding=1, bias=False),
                    nn.GroupNorm(min(32, width // 4), width),
                    nn.ReLU(inplace=True),
                ]
                if level > 0:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
            self.levels.append(nn.Sequential(*layers))
        self.score = nn.Conv2d(width, classes, 1)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """P2 to P5 to logits [N, classes, h, w] at 1/4, and the features they come from."""
        size = features[0].shape[2:]
        total = sum(
            level(feature)[..., : size[0], : size[1]]
            for level, feature in zip(self.levels, features, strict=True)
        )
        assert isinstance(total, Tensor)
        return self.score(total), total


class PanopticFPN(InstanceModel):
    """Mask R-CNN with a semantic branch on its feature pyramid, and the heuristic merge.

    Args:
        detector: torchvision's ``MaskRCNN``; its labels 1 to T are the things.
        classes: names, the stuff classes first.
        num_stuff: how many of them are stuff.
        semantic: maps P2 to P5 to logits of all classes at 1/4, and the features that its last
            layer makes them from.
        palette: one colour per class; None = `pyseg.image.default_palette`.
        semantic_weight: of the semantic loss.
        stuff_area: smallest stuff segment, in pixels of the image.
        score_threshold: lowest score of an instance of the panoptic map.
    """

    def __init__(
        self,
        detector: Any,
        classes: Sequence[str],
        num_stuff: int,
        semantic: nn.Module,
        *,
        palette: Sequence[tuple[int, int, int]] | None = None,
        semantic_weight: float = 1.0,
        stuff_area: int = 4096,
        score_threshold: float = 0.5,
    ) -> None:
        super().__init__(detector, classes, num_stuff, palette=palette)
        self.semantic = semantic
        self.semantic_weight = semantic_weight
        self.stuff_area, self.score_threshold = stuff_area, score_threshold

    def _semantic_branch(self, images: Tensor, features: Any) -> tuple[Tensor, Tensor]:
        """Logits of all classes, and the features that the last layer makes them from."""
        return self.semantic([features[name] for name in ("0", "1", "2", "3")])

    def _semantic_losses(
        self, samples: Sequence[Sample], batch: Any, features: Any, targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        logits, scored = self._semantic_branch(batch.tensors, features)
        labels = self._resized_labels(samples, batch, logits.device)
        return self._branch_losses(logits, scored, labels, features, targets, batch.image_sizes)

    def _branch_losses(
        self,
        logits: Tensor,  # [N, C, h, w]
        scored: Tensor,  # [N, D, h, w]: what the last layer makes them from
        labels: Tensor,  # [N, H, W]
        features: Any,  # the pyramid
        targets: list[dict[str, Tensor]],
        sizes: Sequence[tuple[int, int]],  # of the images before they were padded to H x W
    ) -> dict[str, Tensor]:
        full = F.interpolate(logits, labels.shape[1:], mode="bilinear")
        return {"loss_semantic": self.semantic_weight * cross_entropy(full, labels)}

    def _resized_labels(
        self, samples: Sequence[Sample], batch: Any, device: torch.device
    ) -> Tensor:
        """Labels [N, H, W] at the size of the network's input, void where images were padded."""
        height, width = batch.tensors.shape[2:]
        out = torch.full((len(samples), height, width), VOID, device=device)
        for n, (sample, size) in enumerate(zip(samples, batch.image_sizes, strict=True)):
            assert sample.labels is not None
            labels = sample.labels.to(device, torch.float32)[None, None]
            resized = F.interpolate(labels, tuple(size), mode="nearest-exact")[0, 0]
            out[n, : size[0], : size[1]] = resized.long()
        return out

    def _panoptic(
        self, detections: Detections, batch: Any, features: Any, size: tuple[int, int]
    ) -> tuple[Tensor, Segments]:
        logits, _ = self._semantic_branch(batch.tensors, features)
        # The network's input is padded to a multiple of 32: cells of nothing but padding go.
        resized = batch.image_sizes[0]
        stride = batch.tensors.shape[2] // logits.shape[2]
        rows, columns = (math.ceil(n / stride) for n in resized)
        logits = logits[0, :, :rows, :columns].contiguous()
        # The last cells may still reach over the image's edge. The canvas is what all cells cover,
        # in pixels of the image: logits are upsampled to it and cropped to the image, since
        # upsampling them to the image itself would squeeze them.
        canvas = (
            max(round(stride * rows * size[0] / resized[0]), size[0]),
            max(round(stride * columns * size[1] / resized[1]), size[1]),
        )
        return logits, self._panoptic_segments(detections, logits, canvas, size)

    def _panoptic_segments(
        self,
        detections: Detections,
        logits: Tensor,  # [C, h, w]
        canvas: tuple[int, int],  # what the logits cover, in pixels of the image
        size: tuple[int, int],  # of the image, which begins where the canvas does
    ) -> Segments:
        """Instances and logits to segments that do not overlap: here by the heuristic merge."""
        semantic = upsample_argmax(logits[None], canvas)[0, : size[0], : size[1]]
        return panoptic_merge(
            detections.masks,
            detections.scores,
            detections.labels,
            semantic,
            boxes=detections.boxes,
            stuff_classes=range(self.num_stuff),
            stuff_area=self.stuff_area,
            score_threshold=self.score_threshold,
        ).segments()[0]


class MaskRCNNAndFCN(PanopticFPN):
    """Two networks and the heuristic merge: its ``semantic`` is an `FCN` on the images themselves.

    They share no parameter. Arguments are those of `PanopticFPN`.
    """

    def _semantic_branch(self, images: Tensor, features: Any) -> tuple[Tensor, Tensor]:
        logits = self.semantic(images)
        return logits, logits  # no loss here asks for the features

    def _backbones(self) -> list[nn.Module]:
        return [*super()._backbones(), self.semantic.body]


@facts(
    paper="Kirillov, Girshick, He & Dollár, Panoptic feature pyramid networks, CVPR 2019",
    scores=[(41.5, "PQ", "COCO val2017", "detectron2's model zoo, 37 epochs")],
    licence=COCO_LICENCE,
)
def panoptic_fpn(
    *,
    num_classes: int | None = None,
    num_stuff: int | None = None,
    weights: str | Path | None = "default",
    backbone: str = "resnet50",
    channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
    stuff_area: int = 4096,
) -> PanopticFPN:
    """Panoptic FPN (Kirillov et al., 2019): Mask R-CNN, a semantic branch, the heuristic merge.

    Args:
        num_classes: stuff and thing classes together; None = the 133 of COCO panoptic.
        num_stuff: how many of them, the first ones, are stuff; None = 53, as in COCO.
        weights: nothing is published, so that ``"default"`` is an error that says so; ``"COCO_V1"``
            (with ResNet-50) or ``"IMAGENET1K_V1"`` = torchvision's Mask R-CNN or classifier to
            start training from; a path or a URL = either of them, or a checkpoint of `pyseg train`;
            None = random.
        backbone: ``"resnet18"`` to ``"resnet152"``.
        channels: of the feature pyramid and the heads on it, a multiple of 8.
        min_size: images are resized so that their shorter side has this many pixels,
        max_size: unless the longer one would then have more than this.
        stuff_area: smallest stuff segment in pixels.

    Raises:
        ValueError: an option out of range.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """
    names, stuff = panoptic_classes(num_classes, num_stuff)
    model = PanopticFPN(
        build_detector(backbone, len(names) - stuff, min_size, max_size, channels),
        names,
        stuff,
        FPNSemanticHead(channels, channels // 2, len(names)),
        stuff_area=stuff_area,
    )
    load_weights(model, "panoptic_fpn", weights, backbone)
    return model


@facts(
    paper="Kirillov, He, Girshick, Rother & Dollár, Panoptic segmentation, CVPR 2019",
    licence=COCO_LICENCE,
)
def maskrcnn_fcn(
    *,
    num_classes: int | None = None,
    num_stuff: int | None = None,
    weights: str | Path | None = "default",
    backbone: str = "resnet50",
    channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
    stuff_area: int = 4096,
) -> MaskRCNNAndFCN:
    """Two networks, Mask R-CNN and an FCN, and the heuristic merge: what panoptic FPN unifies.

    They share no parameter, only the images: trained together, each learns what it would alone
    (but for the limit on the gradient's norm, which is common).

    Args:
        num_classes: stuff and thing classes together; None = the 133 of COCO panoptic.
        num_stuff: how many of them, the first ones, are stuff; None = 53, as in COCO.
        weights: nothing is published, so that ``"default"`` is an error that says so; ``"COCO_V1"``
            (with ResNet-50) or ``"IMAGENET1K_V1"`` = torchvision's Mask R-CNN or classifier to
            start training from; a path or a URL = either of them, or a checkpoint of `pyseg train`;
            None = random.
        backbone: of both networks, ``"resnet18"`` to ``"resnet152"``.
        channels: of the feature pyramid and the heads on it, a multiple of 8.
        min_size: images are resized so that their shorter side has this many pixels,
        max_size: unless the longer one would then have more than this.
        stuff_area: smallest stuff segment in pixels.

    Raises:
        ValueError: an option out of range.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """
    names, stuff = panoptic_classes(num_classes, num_stuff)
    model = MaskRCNNAndFCN(
        build_detector(backbone, len(names) - stuff, min_size, max_size, channels),
        names,
        stuff,
        FCN(backbone, len(names)),
        stuff_area=stuff_area,
    )
    load_weights(model, "maskrcnn_fcn", weights, backbone)
    return model


def panoptic_classes(num_classes: int | None, num_stuff: int | None) -> tuple[tuple[str, ...], int]:
    """Names of all classes, stuff first, and how many of them are stuff; without numbers COCO's.

    Raises:
        ValueError: one number without the other, or nothing left for stuff or for things.
    """
    if (num_classes is None) != (num_stuff is None):
        raise ValueError(
            "give num_classes (stuff and things together) and num_stuff, or neither; "
            f"got {num_classes} and {num_stuff}"
        )
    names = class_names(COCO_CLASSES if num_classes is None else num_classes, ())
    stuff = COCO_STUFF if num_stuff is None else num_stuff
    if not 0 < stuff < len(names):
        raise ValueError(f"num_stuff must be 1 to num_classes - 1, got {stuff} of {len(names)}")
    return names, stuff


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the pixels that have a label; 0 where none has."""
    count = (labels != VOID).sum().clamp(min=1)
    return F.cross_entropy(logits.float(), labels, ignore_index=VOID, reduction="sum") / count
