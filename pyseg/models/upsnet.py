"""UPSNet: one network for stuff and things, joined by a panoptic head without parameters.

Source: Xiong, Liao, Zhao, Hu, Bai, Yumer & Urtasun, "UPSNet: A unified panoptic segmentation
network", CVPR 2019.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import (
    DeformConv2d,
    panoptic_head,
    panoptic_logits,
    panoptic_merge,
    roi_align,
    upsample_argmax,
)
from ..ops.panoptic_merge import PanopticMaps
from ..types import VOID, Segment, Segments
from .facts import COCO_LICENCE, IMAGENET_LICENCE, facts
from .maskrcnn import Detections, build_detector, load_weights
from .panoptic_fpn import PanopticFPN, cross_entropy, panoptic_classes

PRUNE_SCORE, PRUNE_NMS, PRUNE_OVERLAP, PRUNE_MOST = 0.6, 0.5, 0.3, 100  # at test time


class DeformableSemanticHead(nn.Module):
    """The semantic head: deformable convolutions shared by P2 to P5, then one 1x1.

    Args:
        channels: of the feature pyramid.
        width: channels of the last deformable layers.
        classes: channels of the logits.
        depth: deformable layers.
    """

    def __init__(self, channels: int, width: int, classes: int, depth: int = 2) -> None:
        super().__init__()
        self.offsets, self.layers = nn.ModuleList(), nn.ModuleList()
        for i in range(depth):
            inputs = channels if i <= max(depth - 2, 0) else width
            outputs = width if i >= depth - 2 else channels
            self.offsets.append(_zeroed(nn.Conv2d(inputs, 18, 3, padding=1)))
            self.layers.append(DeformConv2d(inputs, outputs, 3, padding=1))
        self.score = nn.Conv2d(4 * width, classes, 1)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """P2 to P5 to logits [N, classes, h, w] at 1/4, and the features they come from."""
        size = features[0].shape[2:]
        outputs = []
        for feature in features:
            for offset, layer in zip(self.offsets, self.layers, strict=True):
                feature = F.relu(layer(feature, offset(feature)))
            if feature.shape[2:] != size:
                feature = F.interpolate(feature, size, mode="bilinear")
            outputs.append(feature)
        together = torch.cat(outputs, 1)
        return self.score(together), together


class DeformableConv(nn.Module):
    """``plain``, a 3x3 convolution, made deformable; its offsets begin at 0."""

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        shape: dict[str, Any] = {
            "stride": plain.stride,
            "padding": plain.padding,
            "dilation": plain.dilation,
        }
        self.offset = _zeroed(nn.Conv2d(plain.in_channels, 18, 3, **shape))
        self.conv = DeformConv2d(
            plain.in_channels, plain.out_channels, 3, groups=plain.groups, bias=False, **shape
        )
        self.conv.weight = nn.Parameter(plain.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.offset(x))


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class UPSNet(PanopticFPN):
    """Mask R-CNN and a semantic head, joined by `pyseg.ops.panoptic_head`, also in training.

    Args:
        detector, classes, num_stuff, semantic, palette: as those of `PanopticFPN`; ``semantic`` has
            a last layer called ``score``.
        semantic_weight: of the semantic loss; that of the loss on regions of interest is a fifth.
        panoptic_weight: of the panoptic loss.
        stuff_area: smallest stuff segment, in pixels of the image.
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
        panoptic_weight: float = 0.5,
        stuff_area: int = 2048,
    ) -> None:
        super().__init__(
            detector,
            classes,
            num_stuff,
            semantic,
            palette=palette,
            semantic_weight=semantic_weight,
            stuff_area=stuff_area,
        )
        self.panoptic_weight = panoptic_weight

    def _branch_losses(
        self,
        logits: Tensor,
        scored: Tensor,
        labels: Tensor,
        features: Any,
        targets: list[dict[str, Tensor]],
        sizes: Sequence[tuple[int, int]],
    ) -> dict[str, Tensor]:
        losses = super()._branch_losses(logits, scored, labels, features, targets, sizes)
        boxes = [target["boxes"] for target in targets]
        if any(len(box) for box in boxes):
            # The last layer again, on the features of every object at 28 x 28: small objects count
            # as much as large ones.
            pooled = roi_align(scored, boxes, (28, 28), 0.25, aligned=True)
            regions = torch.cat(
                [_nearest_crops(one, box) for one, box in zip(labels, boxes, strict=True)]
            )
            loss = cross_entropy(self.semantic.score(pooled), regions)
            losses["loss_roi"] = 0.2 * self.semantic_weight * loss
        panoptic = self._panoptic_loss(logits, features, labels, targets, sizes)
        return {**losses, "loss_panoptic": self.panoptic_weight * panoptic}

    def _panoptic_loss(
        self,
        logits: Tensor,
        features: Any,
        labels: Tensor,
        targets: list[dict[str, Tensor]],
        sizes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Cross-entropy over stuff, ground truth instances and unknown, at 1/4."""
        heads = self.detector.roi_heads
        boxes = [target["boxes"] for target in targets]
        pooled = heads.mask_roi_pool(features, boxes, sizes)
        masks = heads.mask_predictor(heads.mask_head(pooled)).split([len(box) for box in boxes])
        losses = []
        for n, target in enumerate(targets):
            count = len(boxes[n])
            own = masks[n][torch.arange(count), target["labels"]]
            # Three in ten things are hidden from the head, so that it learns what unknown is.
            kept = torch.randperm(count, device=logits.device)[: max(int(0.7 * count), 1)].sort()[0]
            classes = target["labels"][kept] - 1 + self.num_stuff
            channels = panoptic_logits(
                logits[n].float(),
                own[kept].float(),
                boxes[n][kept] / 4,
                classes,
                num_stuff=self.num_stuff,
            )
            # Labels fill the padded input, H x W, whose sides 4 divides; masks only the image,
            # whose sides may be anything. A cell of either is to stand for the same pixel, the one
            # at 4 i + 2: so masks are shrunk by the exact factor 1/4, not to a size, which would
            # stretch them. Things in what is left over, less than a cell at the far edges, stay
            # unknown.
            truth = F.interpolate(
                labels[n][None, None].float(), logits.shape[2:], mode="nearest-exact"
            )[0, 0].long()
            truth[(truth >= self.num_stuff) & (truth != VOID)] = self.num_stuff + len(kept)
            quarter = F.interpolate(
                target["masks"][:, None].float(), scale_factor=0.25, mode="nearest-exact"
            )[:, 0, : truth.shape[0], : truth.shape[1]]
            for i, k in enumerate(kept.tolist()):
                region = truth[: quarter.shape[1], : quarter.shape[2]]
                region[quarter[k] > 0] = self.num_stuff + i
            loss = F.cross_entropy(channels[None], truth[None], ignore_index=VOID, reduction="none")
            losses.append(loss.mean())  # void pixels count in the denominator, as in the original
        return torch.stack(losses).mean()

    def _panoptic_segments(
        self,
        detections: Detections,
        logits: Tensor,
        canvas: tuple[int, int],
        size: tuple[int, int],
    ) -> Segments:
        """By the panoptic head, and by what the semantic map says of the head's segments."""
        kept = self._select_instances(detections, size)
        channels = panoptic_head(
            logits,
            kept.masks.logit(eps=1e-4),
            kept.boxes,
            kept.labels,
            num_stuff=self.num_stuff,
            size=canvas,
        )[: size[0], : size[1]].long()
        semantic = upsample_argmax(logits[None], canvas)[0, : size[0], : size[1]]
        stuff, things, classes = self.num_stuff, len(kept.labels), len(self.classes)
        votes = torch.bincount(
            (channels * classes + semantic).flatten(), minlength=(stuff + things + 1) * classes
        ).reshape(-1, classes)[:-1]  # of every channel but unknown, by semantic class
        labels = torch.cat([torch.arange(stuff, device=votes.device), kept.labels])
        # An instance most of whose pixels are one stuff class in the semantic map becomes stuff.
        most, winner = votes.max(1)
        turned = (winner < stuff) & (2 * most >= votes.sum(1))
        turned[:stuff] = False
        kinds = torch.where(turned, winner, labels).tolist()
        areas, scores = votes.sum(1).tolist(), [1.0] * stuff + kept.scores.tolist()
        total = [0] * stuff
        for label, area in zip(kinds, areas, strict=True):
            if label < stuff:
                total[label] += area
        items = [
            Segment(0, label, score, area)
            for label, score, area in zip(kinds[stuff:], scores[stuff:], areas[stuff:], strict=True)
            if label >= stuff and area > 0
        ]
        items += [
            Segment(0, label, 1.0, area)
            for label, area in enumerate(total)
            if area and area >= self.stuff_area
        ]
        items = [replace(item, id=number + 1) for number, item in enumerate(items)]
        stuff_ids = {item.label: item.id for item in items if item.label < stuff}
        thing_ids = iter(item.id for item in items if item.label >= stuff)
        ids = [
            stuff_ids.get(label, 0) if label < stuff else next(thing_ids) if area else 0
            for label, area in zip(kinds, areas, strict=True)
        ]
        table = torch.tensor([*ids, 0], dtype=torch.int32, device=channels.device)
        return Segments(table[channels], tuple(items))

    def _select_instances(self, found: Detections, size: tuple[int, int]) -> Detections:
        """UPSNet's choice of instances: by score, by boxes whatever their class, by masks."""
        ops = importlib.import_module("torchvision.ops")
        sure = (found.scores > PRUNE_SCORE).nonzero()[:, 0]
        found = Detections(*(part[sure] for part in found))
        apart = ops.nms(found.boxes, found.scores, PRUNE_NMS)[:PRUNE_MOST]
        found = Detections(*(part[apart] for part in found))
        visible = []
        for label in found.labels.unique().tolist():
            own = (found.labels == label).nonzero()[:, 0]
            merged: PanopticMaps = panoptic_merge(
                found.masks[own],
                found.scores[own],
                found.labels[own],
                torch.zeros(size, dtype=torch.uint8, device=own.device),
                boxes=found.boxes[own],
                stuff_classes=(),
                score_threshold=0.0,
                overlap_threshold=PRUNE_OVERLAP,
            )
            visible.append(own[merged.table[merged.table[:, 0] > 0, 3]])
        if not visible:
            return found
        return Detections(*(part[torch.cat(visible).sort()[0]] for part in found))


@facts(
    paper="Xiong et al., UPSNet: A unified panoptic segmentation network, CVPR 2019",
    scores=[(59.3, "PQ", "Cityscapes val", "the paper")],
    licence=COCO_LICENCE,
)
def upsnet(
    *,
    num_classes: int | None = None,
    num_stuff: int | None = None,
    weights: str | Path | None = "default",
    backbone: str = "resnet50",
    deformable_backbone: bool = False,
    channels: int = 256,
    depth: int = 2,
    min_size: int = 800,
    max_size: int = 1333,
    stuff_area: int = 2048,
) -> UPSNet:
    """UPSNet (Xiong et al., 2019): one network, merged by a panoptic head without parameters.

    Args:
        num_classes: stuff and thing classes together; None = the 133 of COCO panoptic.
        num_stuff: how many of them, the first ones, are stuff; None = 53, as in COCO.
        weights: nothing is published, so that ``"default"`` is an error that says so; ``"COCO_V1"``
            (with ResNet-50) or ``"IMAGENET1K_V1"`` = torchvision's Mask R-CNN or classifier to
            start training from; a path or a URL = either of them, or a checkpoint of `pyseg train`;
            None = random.
        backbone: ``"resnet18"`` to ``"resnet152"``.
        deformable_backbone: makes the backbone's 3x3 convolutions from res3 on deformable.
        channels: of the feature pyramid and the heads on it, a multiple of 8.
        depth: deformable layers of the semantic head: 2 for Cityscapes, 3 for COCO.
        min_size: images are resized so that their shorter side has this many pixels,
        max_size: unless the longer one would then have more than this.
        stuff_area: smallest stuff segment in pixels: 2048 for Cityscapes, 4096 for COCO.

    Raises:
        ValueError: an option out of range.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """
    names, stuff = panoptic_classes(num_classes, num_stuff)
    detector = build_detector(backbone, len(names) - stuff, min_size, max_size, channels)
    if deformable_backbone:
        for layer in ("layer2", "layer3", "layer4"):
            for block in getattr(detector.backbone.body, layer):
                block.conv2 = DeformableConv(block.conv2)
    model = UPSNet(
        detector,
        names,
        stuff,
        DeformableSemanticHead(channels, channels // 2, len(names), depth),
        stuff_area=stuff_area,
    )
    load_weights(model, "upsnet", weights, backbone)
    return model


@facts(
    paper="Xiong et al., UPSNet: A unified panoptic segmentation network, CVPR 2019",
    scores=[(46.6, "PQ", "COCO test-dev", "the paper")],
    licence=IMAGENET_LICENCE,
)
def upsnet_resnet101_dcn(
    *,
    num_classes: int | None = None,
    num_stuff: int | None = None,
    weights: str | Path | None = "default",
    backbone: str = "resnet101",
    deformable_backbone: bool = True,
    channels: int = 256,
    depth: int = 3,
    min_size: int = 800,
    max_size: int = 1333,
    stuff_area: int = 4096,
) -> UPSNet:
    """`upsnet` as its authors trained it on COCO with ResNet-101 and a deformable backbone.

    Args:
        num_classes: stuff and thing classes together; None = the 133 of COCO panoptic.
        num_stuff: how many of them, the first ones, are stuff; None = 53, as in COCO.
        weights: nothing is published, so that ``"default"`` is an error that says so;
            ``"IMAGENET1K_V1"`` = torchvision's classifier to start training from; a path or a URL =
            such a file, or a checkpoint of `pyseg train`; None = random.
        backbone: ``"resnet18"`` to ``"resnet152"``.
        deformable_backbone: makes the backbone's 3x3 convolutions from res3 on deformable.
        channels: of the feature pyramid and the heads on it, a multiple of 8.
        depth: deformable layers of the semantic head: 2 for Cityscapes, 3 for COCO.
        min_size: images are resized so that their shorter side has this many pixels,
        max_size: unless the longer one would then have more than this.
        stuff_area: smallest stuff segment in pixels: 2048 for Cityscapes, 4096 for COCO.

    Raises:
        ValueError: an option out of range.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """
    return upsnet(**locals())


def _nearest_crops(labels: Tensor, boxes: Tensor) -> Tensor:
    """Labels [H, W] at the centres of 28 x 28 cells of every box: [K, 28, 28]."""
    steps = (torch.arange(28, device=labels.device) + 0.5) / 28
    x = boxes[:, 0, None] + (boxes[:, 2] - boxes[:, 0])[:, None] * steps
    y = boxes[:, 1, None] + (boxes[:, 3] - boxes[:, 1])[:, None] * steps
    rows = y.long().clamp(0, labels.shape[0] - 1)
    columns = x.long().clamp(0, labels.shape[1] - 1)
    return labels[rows[:, :, None], columns[:, None]]
