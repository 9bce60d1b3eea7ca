"""Instance and panoptic models: Mask R-CNN, panoptic FPN and UPSNet on torchvision's detector.

Class indices put the stuff classes first: 0 to num_stuff - 1 are stuff, the others things. Images
are resized as torchvision's detectors do (``min_size``, ``max_size``). Regions are pooled by
`pyseg.ops.roi_align`.

``weights`` of every model here is a path or a URL of its own weights or of what to start from, or a
name of torchvision's for the latter: ``"COCO_V1"``, a Mask R-CNN with ResNet-50, or
``"IMAGENET1K_V1"``, a classifier of the same backbone (``_V2`` where there is one). Of these, all
that fits is taken, the rest is random, and normalisation stays frozen in training.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..image import default_palette, require_rgb8
from ..ops import (
    DeformConv2d,
    panoptic_head,
    panoptic_logits,
    panoptic_merge,
    replace_roi_pooling,
    roi_align,
    upsample_argmax,
)
from ..ops.panoptic_merge import PanopticMaps, paste
from ..types import VOID, Instances, Sample, Segment, Segmentation, Segments
from .semantic import require_evaluation_mode

COCO_THINGS = 80
PRUNE_SCORE, PRUNE_NMS, PRUNE_OVERLAP, PRUNE_MOST = 0.6, 0.5, 0.3, 100  # UPSNet, at test time


class Detections(NamedTuple):
    """Of one image, in pixels of the network's input, by falling score."""

    boxes: Tensor  # [K, 4] xyxy
    scores: Tensor  # [K]
    labels: Tensor  # [K] class indices of the model
    masks: Tensor  # [K, 28, 28] probabilities


class FPNSemanticHead(nn.Module):
    """The semantic branch of panoptic FPN: every level comes to 1/4 in steps of two, and is summed.

    Source: Kirillov, Girshick, He & Dollár, "Panoptic feature pyramid networks", CVPR 2019.
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


class DeformableSemanticHead(nn.Module):
    """The semantic head of UPSNet: deformable convolutions shared by P2 to P5, then one 1x1.

    Source: Xiong et al., "UPSNet: A unified panoptic segmentation network", CVPR 2019.
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


class FCN(nn.Module):
    """A semantic network of its own: ResNet, scores at 1/8, 1/16 and 1/32, summed as in FCN-8s.

    Source: Long, Shelhamer & Darrell, "Fully convolutional networks for semantic segmentation",
    CVPR 2015.
    """

    def __init__(self, backbone: str, classes: int) -> None:
        super().__init__()
        self.body, widths = _resnet(backbone)
        self.scores = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in widths[1:])

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, classes, H / 8, W / 8]."""
        body = self.body
        x = body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(images)))))
        total: Tensor | None = None
        outputs = []
        for layer in (body.layer2, body.layer3, body.layer4):
            x = layer(x)
            outputs.append(x)
        for score, output in reversed(list(zip(self.scores, outputs, strict=True))):
            logits = score(output)
            if total is not None:
                logits = logits + F.interpolate(total, logits.shape[2:], mode="bilinear")
            total = logits
        assert total is not None
        return total


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class InstanceModel(nn.Module):
    """Mask R-CNN, with or without a semantic branch and a rule that merges both.

    ``forward`` takes samples and gives losses; `predict` takes images.

    Args:
        detector: torchvision's ``MaskRCNN``; its labels 1 to T are the things.
        classes: names, the stuff classes first.
        num_stuff: how many of them are stuff.
        semantic: maps P2 to P5 to logits of all classes at 1/4 and the features before the last
            layer; or an `FCN`, a second network; None = instances only.
        unified: merge by `pyseg.ops.panoptic_head` (UPSNet); False = `pyseg.ops.panoptic_merge`.
        palette: one colour per class; None = `pyseg.image.default_palette`.
        semantic_weight: of the semantic loss; that of the loss on regions of interest is a fifth.
        panoptic_weight: of the panoptic loss (``unified`` only).
        stuff_area: smallest stuff segment, in pixels of the image.
        score_threshold: lowest score of an instance of the panoptic map (not ``unified``).
    """

    def __init__(
        self,
        detector: Any,
        classes: Sequence[str],
        num_stuff: int,
        semantic: nn.Module | None = None,
        *,
        unified: bool = False,
        palette: Sequence[tuple[int, int, int]] | None = None,
        semantic_weight: float = 1.0,
        panoptic_weight: float = 0.5,
        stuff_area: int = 4096,
        score_threshold: float = 0.5,
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
        self.detector, self.semantic, self.unified = detector, semantic, unified
        self.semantic_weight, self.panoptic_weight = semantic_weight, panoptic_weight
        self.stuff_area, self.score_threshold = stuff_area, score_threshold
        self._frozen = False

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

    def _norms(self) -> list[nn.Module]:
        bodies = [self.detector.backbone.body]
        if isinstance(self.semantic, FCN):
            bodies.append(self.semantic.body)
        return [
            part for body in bodies for part in body.modules() if isinstance(part, nn.BatchNorm2d)
        ]

    @property
    def things(self) -> tuple[str, ...]:
        """Names of the classes that are countable."""
        return self.classes[self.num_stuff :]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # ------------------------------------------------------------------------------- training

    def forward(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            samples: with ``instances`` of thing classes, and with ``labels`` if there is a semantic
                branch.

        Returns:
            torchvision's five losses of RPN, boxes and masks, and ``loss_semantic``, ``loss_roi``
            and ``loss_panoptic`` where the model has those heads.

        Raises:
            ValueError: a sample lacks what is needed, or an instance is of a stuff class.
        """
        images = [sample.image.to(self.device).float() / 255 for sample in samples]
        targets = [self._target(sample) for sample in samples]
        batch, targets = self.detector.transform(images, targets)
        features = self.detector.backbone(batch.tensors)
        proposals, losses = self.detector.rpn(batch, features, targets)
        _, own = self.detector.roi_heads(features, proposals, batch.image_sizes, targets)
        losses = {**losses, **own}
        if self.semantic is not None:
            logits, before = self._logits(batch.tensors, features)
            labels = self._resized_labels(samples, batch, logits)
            losses.update(self._semantic_losses(logits, before, labels, targets))
            if self.unified:
                losses["loss_panoptic"] = self.panoptic_weight * self._panoptic_loss(
                    logits, features, labels, targets, batch.image_sizes
                )
        return losses

    def _logits(self, images: Tensor, features: Any) -> tuple[Tensor, Tensor]:
        """Logits of all classes, and the features that the last layer makes them from."""
        if isinstance(self.semantic, FCN):
            logits = self.semantic(images)
            return logits, logits
        assert self.semantic is not None
        return self.semantic([features[name] for name in ("0", "1", "2", "3")])

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

    def _resized_labels(self, samples: Sequence[Sample], batch: Any, logits: Tensor) -> Tensor:
        """Labels [N, H, W] at the size of the network's input, void where images were padded."""
        height, width = batch.tensors.shape[2:]
        out = torch.full((len(samples), height, width), VOID, device=logits.device)
        for n, (sample, size) in enumerate(zip(samples, batch.image_sizes, strict=True)):
            assert sample.labels is not None
            labels = sample.labels.to(logits.device, torch.float32)[None, None]
            resized = F.interpolate(labels, tuple(size), mode="nearest-exact")[0, 0]
            out[n, : size[0], : size[1]] = resized.long()
        return out

    def _semantic_losses(self, logits, before, labels, targets) -> dict[str, Tensor]:
        full = F.interpolate(logits, labels.shape[1:], mode="bilinear")
        losses = {"loss_semantic": self.semantic_weight * _cross_entropy(full, labels)}
        boxes = [target["boxes"] for target in targets]
        if self.unified and any(len(box) for box in boxes):
            # The last layer again, on the features of every object at 28 x 28: small objects count
            # as much as large ones.
            assert self.semantic is not None
            pooled = roi_align(before, boxes, (28, 28), 0.25, aligned=True)
            regions = torch.cat(
                [_nearest_crops(one, box) for one, box in zip(labels, boxes, strict=True)]
            )
            score: Any = self.semantic.score
            losses["loss_roi"] = 0.2 * self.semantic_weight * _cross_entropy(score(pooled), regions)
        return losses

    def _panoptic_loss(self, logits, features, labels, targets, sizes) -> Tensor:
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

    # ------------------------------------------------------------------------------ inference

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
        scale = [size[i] / batch.image_sizes[0][i] for i in range(2)]
        detections = Detections(
            found[0]["boxes"] * found[0]["boxes"].new_tensor([scale[1], scale[0]] * 2),
            found[0]["scores"],
            found[0]["labels"] - 1 + self.num_stuff,
            found[0]["masks"][:, 0],
        )
        logits = segments = None
        if self.semantic is not None:
            logits, _ = self._logits(batch.tensors, features)
            # Without the padding of the network's input, whose size is a multiple of 32.
            step = batch.tensors.shape[2] // logits.shape[2]
            cells = [math.ceil(n / step) for n in batch.image_sizes[0]]
            logits = logits[0, :, : cells[0], : cells[1]].contiguous()
            canvas = [
                max(round(step * n * s), m) for n, s, m in zip(cells, scale, size, strict=True)
            ]
            join = self._unify if self.unified else self._merge
            segments = join(detections, logits, canvas, size)
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

    def _merge(self, found: Detections, logits: Tensor, canvas, size) -> Segments:
        semantic = upsample_argmax(logits[None], canvas)[0, : size[0], : size[1]]
        return panoptic_merge(
            found.masks,
            found.scores,
            found.labels,
            semantic,
            boxes=found.boxes,
            stuff_classes=range(self.num_stuff),
            stuff_area=self.stuff_area,
            score_threshold=self.score_threshold,
        ).segments()[0]

    def _unify(self, found: Detections, logits: Tensor, canvas, size) -> Segments:
        found = self._prune(found, size)
        channels = panoptic_head(
            logits,
            found.masks.logit(eps=1e-4),
            found.boxes,
            found.labels,
            num_stuff=self.num_stuff,
            size=canvas,
        )[: size[0], : size[1]].long()
        semantic = upsample_argmax(logits[None], canvas)[0, : size[0], : size[1]]
        stuff, things, classes = self.num_stuff, len(found.labels), len(self.classes)
        votes = torch.bincount(
            (channels * classes + semantic).flatten(), minlength=(stuff + things + 1) * classes
        ).reshape(-1, classes)[:-1]  # of every channel but unknown, by semantic class
        labels = torch.cat([torch.arange(stuff, device=votes.device), found.labels])
        # An instance most of whose pixels are one stuff class in the semantic map becomes stuff.
        most, winner = votes.max(1)
        turned = (winner < stuff) & (2 * most >= votes.sum(1))
        turned[:stuff] = False
        kinds = torch.where(turned, winner, labels).tolist()
        areas, scores = votes.sum(1).tolist(), [1.0] * stuff + found.scores.tolist()
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

    def _prune(self, found: Detections, size) -> Detections:
        """UPSNet's choice of instances: by score, by boxes whatever their class, by masks."""
        ops = importlib.import_module("torchvision.ops")
        kept = (found.scores > PRUNE_SCORE).nonzero()[:, 0]
        found = Detections(*(part[kept] for part in found))
        kept = ops.nms(found.boxes, found.scores, PRUNE_NMS)[:PRUNE_MOST]
        found = Detections(*(part[kept] for part in found))
        chosen = []
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
            chosen.append(own[merged.table[merged.table[:, 0] > 0, 3]])
        kept = torch.cat(chosen).sort()[0] if chosen else kept[:0]
        return Detections(*(part[kept] for part in found))


# --------------------------------------------------------------------------------------- factories


def maskrcnn_resnet50_fpn(
    *,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
    min_size: int = 800,
    max_size: int = 1333,
) -> InstanceModel:
    """Mask R-CNN (He et al., 2017) with ResNet-50 and FPN; instances only.

    Args:
        num_classes: number of thing classes; None = the 90 ids of COCO.
        weights: ``"default"``, which is torchvision's ``"COCO_V1"``, see the module; None = random.
        min_size: images are resized so that their shorter side has this many pixels,
        max_size: unless the longer one would then have more than this.
    """
    return _maskrcnn("maskrcnn_resnet50_fpn", num_classes, weights, min_size, max_size)


def maskrcnn_resnet50_fpn_v2(
    *,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
    min_size: int = 800,
    max_size: int = 1333,
) -> InstanceModel:
    """Mask R-CNN with the improved recipe of Li et al. (2021); options as the one above."""
    return _maskrcnn("maskrcnn_resnet50_fpn_v2", num_classes, weights, min_size, max_size)


def maskrcnn_resnet101_fpn(
    *,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    min_size: int = 800,
    max_size: int = 1333,
) -> InstanceModel:
    """Mask R-CNN with ResNet-101 and FPN; there are no published weights of torchvision's."""
    things = COCO_THINGS if num_classes is None else num_classes
    model = InstanceModel(
        _detector("resnet101", things, min_size, max_size), _names(things), num_stuff=0
    )
    return _loaded(model, weights, "resnet101")


def panoptic_fpn_resnet50(
    *,
    num_classes: int | None = None,
    num_stuff: int | None = None,
    weights: str | Path | None = None,
    backbone: str = "resnet50",
    channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
    stuff_area: int = 4096,
) -> InstanceModel:
    """Panoptic FPN (Kirillov et al., 2019): Mask R-CNN, a semantic branch, the heuristic merge.

    Args:
        num_classes: stuff and thing classes together; None = the 133 of COCO panoptic.
        num_stuff: how many of them, the first ones, are stuff; None = 53, as in COCO.
        weights: see the module; None = random.
        backbone: ``"resnet18"`` to ``"resnet152"``.
        channels: of the feature pyramid and the heads on it.
        min_size: images are resized so that their shorter side has this many pixels,
        max_size: unless the longer one would then have more than this.
        stuff_area: smallest stuff segment in pixels.
    """
    classes, stuff = _panoptic_classes(num_classes, num_stuff)
    model = InstanceModel(
        _detector(backbone, classes - stuff, min_size, max_size, channels),
        _names(classes),
        stuff,
        FPNSemanticHead(channels, channels // 2, classes),
        stuff_area=stuff_area,
    )
    return _loaded(model, weights, backbone)


def maskrcnn_fcn_resnet50(
    *,
    num_classes: int | None = None,
    num_stuff: int | None = None,
    weights: str | Path | None = None,
    backbone: str = "resnet50",
    channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
    stuff_area: int = 4096,
) -> InstanceModel:
    """Two networks, Mask R-CNN and an FCN, and the heuristic merge: what panoptic FPN unifies.

    They share no parameter, only the images: trained together, each learns what it would alone
    (but for the limit on the gradient's norm, which is common). Options as `panoptic_fpn_resnet50`.
    """
    classes, stuff = _panoptic_classes(num_classes, num_stuff)
    model = InstanceModel(
        _detector(backbone, classes - stuff, min_size, max_size, channels),
        _names(classes),
        stuff,
        FCN(backbone, classes),
        stuff_area=stuff_area,
    )
    return _loaded(model, weights, backbone)


def upsnet_resnet50(
    *,
    num_classes: int | None = None,
    num_stuff: int | None = None,
    weights: str | Path | None = None,
    backbone: str = "resnet50",
    channels: int = 256,
    depth: int = 2,
    min_size: int = 800,
    max_size: int = 1333,
    stuff_area: int = 2048,
) -> InstanceModel:
    """UPSNet (Xiong et al., 2019): one network, merged by a panoptic head without parameters.

    Args:
        num_classes: stuff and thing classes together; None = the 133 of COCO panoptic.
        num_stuff: how many of them, the first ones, are stuff; None = 53, as in COCO.
        weights: see the module; None = random.
        backbone: ``"resnet18"`` to ``"resnet152"``.
        channels: of the feature pyramid and the heads on it.
        depth: deformable layers of the semantic head: 2 for Cityscapes, 3 for COCO.
        min_size: images are resized so that their shorter side has this many pixels,
        max_size: unless the longer one would then have more than this.
        stuff_area: smallest stuff segment in pixels: 2048 for Cityscapes, 4096 for COCO.
    """
    return _upsnet(
        backbone,
        channels,
        num_classes,
        num_stuff,
        weights,
        depth,
        min_size,
        max_size,
        stuff_area,
        False,
    )


def upsnet_resnet101_dcn(
    *,
    num_classes: int | None = None,
    num_stuff: int | None = None,
    weights: str | Path | None = None,
    depth: int = 3,
    min_size: int = 800,
    max_size: int = 1333,
    stuff_area: int = 4096,
) -> InstanceModel:
    """UPSNet with ResNet-101 whose 3x3 convolutions from res3 on are deformable; else as above."""
    return _upsnet(
        "resnet101",
        256,
        num_classes,
        num_stuff,
        weights,
        depth,
        min_size,
        max_size,
        stuff_area,
        True,
    )


class DeformableConv(nn.Module):
    """A 3x3 convolution with offsets of its own, which begin at 0."""

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


def _upsnet(
    backbone, channels, num_classes, num_stuff, weights, depth, min_size, max_size, stuff_area, dcn
) -> InstanceModel:
    classes, stuff = _panoptic_classes(num_classes, num_stuff)
    detector = _detector(backbone, classes - stuff, min_size, max_size, channels)
    if dcn:
        for name in ("layer2", "layer3", "layer4"):
            for block in getattr(detector.backbone.body, name):
                block.conv2 = DeformableConv(block.conv2)
    model = InstanceModel(
        detector,
        _names(classes),
        stuff,
        DeformableSemanticHead(channels, channels // 2, classes, depth),
        unified=True,
        stuff_area=stuff_area,
    )
    return _loaded(model, weights, backbone)


def _panoptic_classes(num_classes: int | None, num_stuff: int | None) -> tuple[int, int]:
    if (num_classes is None) != (num_stuff is None):
        raise ValueError(
            "give num_classes (stuff and things together) and num_stuff, or neither; "
            f"got {num_classes} and {num_stuff}"
        )
    classes, stuff = (133, 53) if num_classes is None else (num_classes, num_stuff)
    assert stuff is not None
    if not 0 < stuff < classes:
        raise ValueError(f"num_stuff must be 1 to num_classes - 1, got {stuff} of {classes}")
    return classes, stuff


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(count))


def _detector(backbone: str, things: int, min_size: int, max_size: int, channels: int = 256) -> Any:
    """torchvision's Mask R-CNN with random weights."""
    if things < 1:
        raise ValueError(f"num_classes must leave at least one thing, got {things}")
    faster = importlib.import_module("torchvision.models.detection.faster_rcnn")
    mask = importlib.import_module("torchvision.models.detection.mask_rcnn")
    utils = importlib.import_module("torchvision.models.detection.backbone_utils")
    pyramid = importlib.import_module("torchvision.ops.feature_pyramid_network")
    if channels < 8 or channels % 8:
        raise ValueError(f"channels must be a multiple of 8, got {channels}")
    body, widths = _resnet(backbone)
    levels = {f"layer{k + 1}": str(k) for k in range(4)}
    network = utils.BackboneWithFPN(
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


def _resnet(backbone: str) -> tuple[Any, list[int]]:
    """torchvision's network with random weights, and the channels of its four stages."""
    resnet = importlib.import_module("torchvision.models.resnet")
    if not (backbone.startswith("resnet") and hasattr(resnet, backbone)):
        raise ValueError(
            f"backbone must be one of torchvision's resnets, such as 'resnet50', got {backbone!r}"
        )
    body = getattr(resnet, backbone)(weights=None)
    body.fc = nn.Identity()  # the classifier of images
    return body, [body.inplanes >> k for k in (3, 2, 1, 0)]


def _loaded(
    model: InstanceModel,
    weights: str | Path | None,
    backbone: str,
    detector: str = "maskrcnn_resnet50_fpn",
) -> InstanceModel:
    """Loads weights of the model, or torchvision's of a Mask R-CNN or of a classifier."""
    from .. import weights as files

    if weights is None:
        return model.eval()
    models = importlib.import_module("torchvision.models")
    enums = [models.get_model_weights(backbone)]
    if backbone == "resnet50":
        enums.append(models.get_model_weights(detector))
    known = {
        member.name: files.Remote(member.url, Path(member.url).stem.rpartition("-")[2])
        for enum in enums
        for member in enum
    }
    path = files.resolve(weights, known=known)
    state = files.load_state(path)
    if not any(key.startswith("detector.") for key in state):
        state = _fitted(model, state)
        model.freeze_normalisation()
    files.load_into(model, state, path)
    return model.eval()


def _fitted(model: InstanceModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of the model from torchvision's of a Mask R-CNN or of a classifier.

    What these cannot have stays as it is in the model: semantic branch and offsets, of a Mask R-CNN
    for other classes the last layers, of a classifier all but the backbone. Anything else that does
    not fit is left to be found by `pyseg.weights.load_into`.
    """
    classifier = not any(key.startswith("backbone.") for key in state)
    if not classifier and not any(key.endswith("num_batches_tracked") for key in state):
        # Mask R-CNN's first version was trained with frozen normalisation without an epsilon.
        state = {
            key: value - 1e-5 if key.endswith("running_var") else value
            for key, value in state.items()
        }
    bodies = ("detector.backbone.body.", "semantic.body.") if classifier else ("detector.",)
    fitted, used = {}, {"fc.weight", "fc.bias"} if classifier else set()
    for key, own in model.state_dict().items():
        name = next((key.removeprefix(body) for body in bodies if key.startswith(body)), None)
        name = None if name is None else name.replace(".conv2.conv.", ".conv2.")  # deformable
        last = "box_predictor." in key or "mask_predictor.mask_fcn_logits." in key
        if name in state and not (last and state[name].shape != own.shape):
            fitted[key] = state[name]
        elif name is None or last or key.endswith("num_batches_tracked") or ".offset." in key:
            fitted[key] = own
        used.add(name or "")
    return fitted | {name: value for name, value in state.items() if name not in used}


def _maskrcnn(
    name: str, num_classes: int | None, weights: str | Path | None, min_size: int, max_size: int
) -> InstanceModel:
    models = importlib.import_module("torchvision.models")
    enum = models.get_model_weights(name)
    categories = enum.DEFAULT.meta["categories"][1:]  # without the background
    count = len(categories) if num_classes is None else num_classes
    if count < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    detector = replace_roi_pooling(
        models.get_model(
            name,
            weights=None,
            weights_backbone=None,
            num_classes=count + 1,
            min_size=min_size,
            max_size=max_size,
        )
    )
    names = tuple(categories) if count == len(categories) else _names(count)
    model = InstanceModel(detector, _unique(names), num_stuff=0)
    if weights in ("default", "DEFAULT"):
        weights = enum.DEFAULT.name
    return _loaded(model, weights, "resnet50", name)


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """COCO's ids have gaps, which torchvision all calls N/A."""
    return tuple(name if name != "N/A" else f"unused {i + 1}" for i, name in enumerate(names))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the pixels that have a label; 0 where none has."""
    count = (labels != VOID).sum().clamp(min=1)
    return F.cross_entropy(logits.float(), labels, ignore_index=VOID, reduction="sum") / count


def _nearest_crops(labels: Tensor, boxes: Tensor) -> Tensor:
    """Labels [H, W] at the centres of 28 x 28 cells of every box: [K, 28, 28]."""
    steps = (torch.arange(28, device=labels.device) + 0.5) / 28
    x = boxes[:, 0, None] + (boxes[:, 2] - boxes[:, 0])[:, None] * steps
    y = boxes[:, 1, None] + (boxes[:, 3] - boxes[:, 1])[:, None] * steps
    rows = y.long().clamp(0, labels.shape[0] - 1)
    columns = x.long().clamp(0, labels.shape[1] - 1)
    return labels[rows[:, :, None], columns[:, None]]
