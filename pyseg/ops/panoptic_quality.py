"""Panoptic quality of one image, as counts that add up over images."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native

_native.load()

FRACTION_BITS = 40  # csrc/panoptic_quality/panoptic_quality.h
PROBLEMS = (
    "pixels of the prediction whose id is not listed",
    "pixels of the target whose id is not listed",
    "predicted segments that are listed and have no pixels",
    "target segments that are listed and have no pixels",
    "target segments whose area in pixels is not the listed one",
    "pairs whose intersection is larger than the listed area allows",
)
OTHER_AREA = 4  # the one problem that the rules allow


class PanopticCounts(NamedTuple):
    """What `panoptic_quality` counts."""

    counts: Tensor  # [C, 4] int64: true positives, false positives, false negatives, IoU sum * 2^40
    problems: Tensor  # [6] int64: how often each of PROBLEMS occurred


def panoptic_quality(
    prediction: Tensor,
    target: Tensor,
    prediction_segments: Tensor,
    target_segments: Tensor,
    num_classes: int,
    *,
    prediction_boundary: Tensor | None = None,
    target_boundary: Tensor | None = None,
) -> PanopticCounts:
    """Counts matched and unmatched segments of one image by the rules of panoptic quality.

    Kirillov et al., Panoptic Segmentation, 2019, eq. 1, as panopticapi computes it. A predicted and
    a target segment of the same class match where IoU > 0.5; the union leaves out what is predicted
    on void. An unmatched prediction is no false positive if more than half of it lies in void and
    in crowds of its class. With the boundaries given, IoU is the smaller of the segments' IoU and
    of that of their boundary pixels (Cheng et al., Boundary IoU, 2021, sec. 5.3).

    Args:
        prediction: [H, W] int32 segment ids, 0 = void.
        target: [H, W] int32, on the same device.
        prediction_segments: [P, 2] int64 on the CPU, in any order: id, class.
        target_segments: [T, 4] int64 on the CPU, in any order: id, class, area in pixels (which is
            trusted in place of the map, as panopticapi does), and 0, or 1 for a crowd, or 2 for a
            crowd that excuses no false positive.
        num_classes: C.
        prediction_boundary: [H, W] bool, see `boundary_mask`.
        target_boundary: [H, W] bool; both or neither.

    Returns:
        `PanopticCounts`. Maps that their lists of segments do not describe raise on the CPU. On
        CUDA they are counted in ``problems``, so that nothing waits for the device; the lists
        travel with the launch of a kernel, so a CUDA graph repeats those it was captured with.

    Raises:
        ValueError: shapes, dtypes or devices are not as above; ids that are negative, 0 or listed
            twice; classes outside [0, C); an id in a map and not in its list, or the other way
            round (CPU); an area that is impossible (CPU).
    """
    _native.check_tensors(
        prediction=prediction,
        target=target,
        prediction_segments=prediction_segments,
        target_segments=target_segments,
    )
    for name, ids in (("prediction", prediction), ("target", target)):
        if ids.dtype != torch.int32:
            raise ValueError(
                f"{name} must hold int32 segment ids, got {ids.dtype}; use {name}.int()"
            )
    if target.ndim != 2 or prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must both be [H, W], got "
            f"{list(prediction.shape)} and {list(target.shape)}"
        )
    if prediction.device != target.device:
        raise ValueError(
            f"prediction is on {prediction.device}, target on {target.device}: move one of them"
        )
    if (prediction_boundary is None) != (target_boundary is None):
        raise ValueError("give both prediction_boundary and target_boundary, or neither")
    for name, mask in (
        ("prediction_boundary", prediction_boundary),
        ("target_boundary", target_boundary),
    ):
        if mask is not None:
            _native.check_tensors(**{name: mask})
        if mask is not None and (
            mask.dtype != torch.bool or mask.shape != target.shape or mask.device != target.device
        ):
            raise ValueError(
                f"{name} must be bool {list(target.shape)} on {target.device}, got "
                f"{mask.dtype} {list(mask.shape)} on {mask.device}"
            )
    num_classes = _native.integer("num_classes", num_classes)
    if num_classes < 0:
        raise ValueError(f"num_classes must not be negative, got {num_classes}")
    prediction_segments = _by_id("prediction_segments", prediction_segments, 2, num_classes)
    target_segments = _by_id("target_segments", target_segments, 4, num_classes)
    _native.require("panoptic_quality", target)
    result = PanopticCounts(
        *torch.ops.pyseg.panoptic_quality(
            prediction,
            target,
            prediction_segments,
            target_segments,
            num_classes,
            prediction_boundary,
            target_boundary,
        )
    )
    if target.device.type == "cpu":
        problems = result.problems.tolist()
        problems[OTHER_AREA] = 0
        if any(problems):
            details = [
                *_unlisted("prediction", prediction, prediction_segments),
                *_unlisted("target", target, target_segments),
            ]
            texts = details or [
                f"{n} {what}" for n, what in zip(problems, PROBLEMS, strict=True) if n
            ]
            raise ValueError("; ".join(texts))
    return result


def _by_id(name: str, segments: Tensor, columns: int, num_classes: int) -> Tensor:
    """The list of segments, checked, with rising ids."""
    if (
        segments.ndim != 2
        or segments.shape[1] != columns
        or segments.dtype != torch.int64
        or segments.device.type != "cpu"
    ):
        raise ValueError(
            f"{name} must be [K, {columns}] int64 on the CPU, got {segments.dtype} "
            f"{list(segments.shape)} on {segments.device}"
        )
    # Lists: a dozen small tensor operations would take longer than the kernel.
    given = segments.numpy().tolist()
    rows = sorted(given)
    for row in rows:
        if not 0 < row[0] < 2**31:
            raise ValueError(f"{name} lists the id {row[0]}; ids are 1 to 2^31 - 1, 0 is void")
        if not 0 <= row[1] < num_classes:
            raise ValueError(
                f"{name} has class {row[1]}; there are {num_classes} (num_classes), from 0 on"
            )
        if columns == 4 and row[2] < 1:
            raise ValueError(f"{name} gives segment {row[0]} an area below 1 pixel")
    for row, following in itertools.pairwise(rows):
        if row[0] == following[0]:
            raise ValueError(f"{name} lists the id {row[0]} twice")
    return segments if rows == given else torch.tensor(rows, dtype=torch.int64)


def _unlisted(name: str, ids: Tensor, segments: Tensor) -> list[str]:
    """What is wrong between a map and its list, by id."""
    found, listed = set(ids.unique().tolist()) - {0}, set(segments[:, 0].tolist())
    texts = []
    if extra := sorted(found - listed):
        texts.append(f"the map of the {name} has ids that are not listed: {_first(extra)}")
    if missing := sorted(listed - found):
        texts.append(f"the list of the {name}'s segments has ids without pixels: {_first(missing)}")
    return texts


def _first(values: list[int]) -> str:
    return ", ".join(map(str, values[:5])) + (", …" if len(values) > 5 else "")


@torch.library.register_fake("pyseg::panoptic_quality")
def _(prediction, target, prediction_segments, target_segments, num_classes, *boundaries):
    return (
        target.new_empty((num_classes, 4), dtype=torch.int64),
        target.new_empty(len(PROBLEMS), dtype=torch.int64),
    )


def reference(
    prediction: Tensor,
    target: Tensor,
    prediction_segments: Tensor,
    target_segments: Tensor,
    num_classes: int,
) -> Tensor:
    """The counts from a mask per segment, [C, 4] float64 with the sum of IoUs as it is."""
    counts = torch.zeros(num_classes, 4, dtype=torch.float64)
    used = set()
    for t_id, label, area, crowd in target_segments.tolist():
        matched = False
        for p_id, p_label in prediction_segments.tolist():
            p_mask = prediction == p_id
            both = int((p_mask & (target == t_id)).sum())
            union = area + int(p_mask.sum()) - both - int((p_mask & (target == 0)).sum())
            if label == p_label and not crowd and both / union > 0.5:
                counts[label, 0] += 1
                counts[label, 3] += both / union
                matched = True
                used.add(p_id)
        counts[label, 2] += not matched and not crowd
    for p_id, label in prediction_segments.tolist():
        excuse = target == 0
        for t_id, t_label, _, crowd in target_segments.tolist():
            if crowd == 1 and t_label == label:
                excuse |= target == t_id
        excused = excuse[prediction == p_id].double().mean()
        counts[label, 1] += p_id not in used and float(excused) <= 0.5
    return counts
