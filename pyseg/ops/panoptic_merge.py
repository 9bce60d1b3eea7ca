"""Merging instances and a semantic map into one panoptic map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from ..regions import Segment, Segments

_native.load()

MAX_STUFF = 512
MASK_THRESHOLD = 0.5  # probability from which a pixel belongs to a mask


class PanopticMaps(NamedTuple):
    """Panoptic maps as tensors on the device; nothing waits for the device until they are read."""

    map: Tensor  # [H, W] or [N, H, W] int32, 0 = void
    table: Tensor  # [.., K + stuff, 4] int64: id, label, area, instance or -1; unused rows are 0
    scores: Tensor  # [.., K] float32, of the instances

    def segments(self) -> list[Segments]:
        """One `Segments` per image, with its map on the device and its list read from it."""
        maps, tables, scores = (
            tensor if self.map.ndim == 3 else tensor[None]
            for tensor in (self.map, self.table.cpu(), self.scores.cpu())
        )
        return [
            Segments(
                one,
                tuple(
                    Segment(number, label, scored[instance] if instance >= 0 else 1.0, area)
                    for number, label, area, instance in rows
                    if number > 0
                ),
            )
            for one, rows, scored in zip(maps, tables.tolist(), scores.tolist(), strict=True)
        ]


def panoptic_merge(
    masks: Tensor | Sequence[Mapping[str, Any]],
    scores: Tensor,
    labels: Tensor,
    semantic: Tensor,
    *,
    stuff_classes: Sequence[int],
    boxes: Tensor | None = None,
    score_threshold: float = 0.5,
    overlap_threshold: float = 0.5,
    stuff_area: int = 4096,
) -> PanopticMaps:
    """Heuristic merge of instances and a semantic map, of one image or of a batch.

    Instances are taken by falling score (equal scores: in the order given). One is left out if its
    score is below ``score_threshold``, if its mask is empty, or if more than the share
    ``overlap_threshold`` of it already belongs to others; else it gets its free pixels. Then every
    stuff class, in the order of ``stuff_classes``, gets the free pixels that the semantic map gives
    it, if they are at least ``stuff_area``. All other pixels are void. Ids count from 1 in the
    order of acceptance. An instance that no pixel is left for gets no segment.

    With ``boxes`` the masks are those of a Mask R-CNN head, M x M probabilities of a box. They are
    stretched over the box, bilinearly between the centres of cells and with zeros outside, and a
    pixel belongs to the mask where its centre has 0.5 or more; full-size masks never exist.

    Args:
        masks: [K, H, W] bool, or with ``boxes`` [K, M, M] floating point probabilities; or of one
            image a list of COCO's run-length dicts, see `pyseg.image.decode_rle`.
        scores: [K] floating point. NaN is below every threshold.
        labels: [K] integers, class of each instance.
        semantic: [H, W] uint8, int16, int32 or int64. Classes other than ``stuff_classes`` and void
            (255) become void where no instance is.
        stuff_classes: classes of the semantic map that are stuff, 0 to 65535; at most 512.
        boxes: [K, 4] xyxy in pixels, where the pixel (0, 0) covers 0 to 1; any part may lie outside
            of the image. A box without extent has no mask.
        score_threshold: lowest score that counts.
        overlap_threshold: largest share of an instance that may be covered by others.
        stuff_area: smallest area of a stuff segment in pixels.

    All tensors may have a batch dimension N in front. Images with fewer instances than others fill
    up with scores of -1.

    Returns:
        The id map [H, W] int32 (0 = void) and a table of segments, `PanopticMaps`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or stuff classes are out of range
            or repeat.
        ImageError: a run-length dict is damaged.

    Source:
        Kirillov, He, Girshick, Rother & Dollár, "Panoptic segmentation", CVPR 2019, section 6. The
        stretching of masks follows He et al., "Mask R-CNN", ICCV 2017.

    Example:
        >>> masks = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> masks[0, :2] = True
        >>> merged = panoptic_merge(masks, torch.tensor([0.9]), torch.tensor([2]),
        ...                         torch.zeros(4, 4, dtype=torch.uint8), stuff_classes=[0],
        ...                         stuff_area=1)
        >>> merged.map[:, 0].tolist(), merged.table[0].tolist(), merged.table[1].tolist()
        ([1, 1, 2, 2], [1, 2, 8, 0], [2, 0, 8, -1])
    """
    _native.check_tensors(scores=scores, labels=labels, semantic=semantic)
    if not isinstance(masks, Sequence):
        _native.check_tensors(masks=masks)
    if boxes is not None:
        _native.check_tensors(boxes=boxes)
    if not isinstance(masks, Tensor):
        masks = _decoded(masks, semantic, boxes)
    batched = masks.ndim == 4
    if masks.ndim not in (3, 4):
        raise ValueError(f"masks must be [K, H, W] or [N, K, H, W], got {list(masks.shape)}")
    lead = masks.shape[: masks.ndim - 2]  # (K,) or (N, K)
    for name, tensor, shape in (
        ("scores", scores, lead),
        ("labels", labels, lead),
        ("semantic", semantic, (*lead[:-1], *semantic.shape[-2:])),
        *([("boxes", boxes, (*lead, 4))] if boxes is not None else []),
    ):
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name} must be {list(shape)} with masks {list(masks.shape)}, got "
                f"{list(tensor.shape)}"
            )
        if tensor.device != masks.device:
            raise ValueError(f"masks are on {masks.device}, {name} on {tensor.device}: move one")
    if boxes is None:
        if masks.dtype != torch.bool:
            raise ValueError(f"masks must be bool, got {masks.dtype}; use masks > 0.5")
        if masks.shape[-2:] != semantic.shape[-2:]:
            raise ValueError(
                f"masks {list(masks.shape)} differ in size from semantic "
                f"{list(semantic.shape)}; masks of boxes need boxes="
            )
    elif not masks.is_floating_point() or not masks.shape[-1] == masks.shape[-2] > 0:
        raise ValueError(
            "with boxes, masks must be [.., K, M, M] floating point, got "
            f"{list(masks.shape)} {masks.dtype}"
        )
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, got {scores.dtype}")
    for name, tensor in (("labels", labels), ("semantic", semantic)):
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"{name} must be integers, got {tensor.dtype}")
    if semantic.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"semantic must be uint8, int16, int32 or int64, got {semantic.dtype}")
    try:
        stuff = [_native.integer("stuff_classes", label) for label in stuff_classes]
    except TypeError:
        raise ValueError(f"stuff_classes must be a list of integers, got {stuff_classes}") from None
    if len(set(stuff)) != len(stuff) or any(not 0 <= label < 65536 for label in stuff):
        raise ValueError(f"stuff_classes must be different numbers from 0 to 65535, got {stuff}")
    if len(stuff) > MAX_STUFF:
        raise ValueError(f"at most {MAX_STUFF} stuff_classes are possible, got {len(stuff)}")
    score_threshold = _native.number("score_threshold", score_threshold)
    overlap_threshold = _native.number("overlap_threshold", overlap_threshold)
    for name, threshold in (("score", score_threshold), ("overlap", overlap_threshold)):
        if math.isnan(threshold):
            raise ValueError(f"{name}_threshold must not be NaN")
    stuff_area = _native.integer("stuff_area", stuff_area)
    _native.require("panoptic_merge", masks)

    def batch(tensor: Tensor) -> Tensor:
        return tensor if batched else tensor[None]

    map, table = torch.ops.pyseg.panoptic_merge(
        batch(masks if boxes is None else masks.float()),
        None if boxes is None else batch(boxes.float()),
        batch(scores.float()),
        batch(labels.long()),
        batch(semantic),
        stuff,
        score_threshold,
        overlap_threshold,
        stuff_area,
        MASK_THRESHOLD,
    )
    return PanopticMaps(map if batched else map[0], table if batched else table[0], scores.float())


def _decoded(rles: Sequence[Mapping[str, Any]], semantic: Tensor, boxes: Tensor | None) -> Tensor:
    from ..formats import decode_rle

    if boxes is not None:
        raise ValueError("masks are run-length dicts, which cover the image: leave boxes out")
    size = list(semantic.shape)
    masks = torch.zeros(len(rles), *size, dtype=torch.bool)
    for k, rle in enumerate(rles):
        if not isinstance(rle, Mapping) or "size" not in rle or "counts" not in rle:
            raise ValueError(
                "masks must be a tensor or run-length dicts with 'size' and 'counts', "
                f"masks[{k}] is a {type(rle).__name__}"
            )
        if list(rle["size"]) != size:
            raise ValueError(
                f"masks[{k}] is of size {list(rle['size'])}, semantic of {size}; they must be equal"
            )
        masks[k] = decode_rle(rle)
    return masks.to(semantic.device)


@torch.library.register_fake("pyseg::panoptic_merge")
def _(masks, boxes, scores, labels, semantic, stuff_classes, *thresholds):
    rows = masks.shape[1] + len(stuff_classes)
    return (
        semantic.new_empty(semantic.shape, dtype=torch.int32),
        semantic.new_empty((masks.shape[0], rows, 4), dtype=torch.int64),
    )


def paste(masks: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """The masks [K, M, M] stretched over their boxes [K, 4], as bool [K, H, W], by grid_sample."""
    height, width = size
    boxes = boxes.to(masks)
    x0, y0, x1, y1 = (edge[:, None] for edge in boxes.unbind(1))
    y = (torch.arange(height).to(masks) + 0.5 - y0) / (y1 - y0) * 2 - 1
    x = (torch.arange(width).to(masks) + 0.5 - x0) / (x1 - x0) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1)
    pasted = torch.nn.functional.grid_sample(masks[:, None], grid, align_corners=False)
    return pasted[:, 0] >= MASK_THRESHOLD


def reference(
    masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    semantic: Tensor,
    *,
    stuff_classes: Sequence[int],
    score_threshold: float = 0.5,
    overlap_threshold: float = 0.5,
    stuff_area: int = 4096,
) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """The same for one image, a mask at a time: the map, and (id, label, area) of every segment."""
    map = torch.zeros_like(semantic, dtype=torch.int32)
    segments: list[tuple[int, int, int]] = []
    for k in torch.argsort(scores, descending=True, stable=True).tolist():
        if not scores[k] >= score_threshold:
            continue
        area = int(masks[k].sum())
        free = masks[k] & (map == 0)
        left = int(free.sum())
        if left == 0 or (area - left) / area > overlap_threshold:
            continue
        segments.append((len(segments) + 1, int(labels[k]), left))
        map[free] = len(segments)
    for label in stuff_classes:
        free = (semantic == label) & (map == 0)
        area = int(free.sum())
        if area > 0 and area >= stuff_area:
            segments.append((len(segments) + 1, int(label), area))
            map[free] = len(segments)
    return map, segments
