"""What metrics have in common: classes, checked ground truth, logits at its size, states.

Wrong values raise at once on the CPU. Elsewhere they are counted, so that nothing waits for the
device, and `raise_invalid` reports them when the scores are computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LabelError, ScoreError
from ..types import VOID, Sample, Segmentation

_NAN = (
    "the logits hold NaN, so that no class is the largest; look for a network that diverged, "
    "half-precision overflow, or a division by zero in a refiner"
)


def check_ignore_index(ignore_index: int, num_classes: int) -> None:
    """Raises ValueError where pixels of class 255 would be taken for void."""
    if ignore_index == VOID < num_classes:
        raise ValueError(
            f"{VOID} is one of the {num_classes} classes and cannot mean void as well; label void "
            "-1, as Segmentation does, and give ignore_index=-1"
        )


def class_names(classes: Sequence[str] | int | None, what: str) -> tuple[str, ...]:
    """The names of a metric's classes, which may be given by their number alone.

    Raises:
        ValueError: neither names nor a number, or none.
    """
    if isinstance(classes, int) and not isinstance(classes, bool):
        classes = [f"class {index}" for index in range(classes)]
    if not classes or isinstance(classes, (str, bool)):
        raise ValueError(
            f"{what} needs classes, a sequence of names or how many there are, got {classes!r}"
        )
    return tuple(classes)


def label_map(values: Any, what: str) -> Tensor:
    """Class ids as a tensor of a dtype that torch computes with.

    Args:
        values: tensor or NumPy array of integers or truth values.
        what: what errors call it.

    Raises:
        LabelError: something else.
    """
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "uib":
            raise LabelError(f"{what} has labels of {values.dtype}; class ids are integers")
        wide = values.dtype.kind == "u" and values.dtype.itemsize > 1
        if wide or not values.flags.writeable or not values.dtype.isnative or _turned(values):
            # torch shares no memory with such; a copy takes longer than counting.
            dtype = np.int64 if wide else values.dtype.newbyteorder("=")
            values = np.array(values, dtype=dtype, order="C")
        values = torch.from_numpy(values)
    if not isinstance(values, Tensor):
        raise LabelError(
            f"{what} has labels that are a {type(values).__name__}; give a tensor or a NumPy array"
        )
    if values.is_floating_point() or values.is_complex():
        raise LabelError(
            f"{what} has labels of {values.dtype}; class ids are integers, convert them"
        )
    if values.dtype == torch.bool:
        return values.to(torch.uint8)
    return values.long() if values.dtype in _UNSIGNED else values


def _turned(values: np.ndarray) -> bool:
    return any(stride < 0 for stride in values.strides)


_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def label_maps(prediction: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Label maps that are held against each other, both [N, H, W] on the prediction's device.

    Raises:
        LabelError: they are not integers, not [H, W] or [N, H, W], or of different shapes.
    """
    labels, truth = label_map(prediction, "the prediction"), label_map(target, "the target")
    if labels.shape != truth.shape or labels.ndim not in (2, 3):
        raise LabelError(
            "prediction and target must both be [H, W] or [N, H, W], got "
            f"{list(labels.shape)} and {list(truth.shape)}"
        )
    if labels.ndim == 2:
        labels, truth = labels[None], truth[None]
    return labels, truth.to(labels.device)


def score_maps(scores: Any, target: Any, planes: bool) -> tuple[Tensor, Tensor]:
    """Scores and the label maps that they are held against, on the scores' device.

    Args:
        scores: tensor or NumPy array of floating-point numbers, [H, W] or [N, H, W]; with
            ``planes`` [C, h, w] or [N, C, h, w].
        target: [H, W] or [N, H, W] integers.
        planes: whether there is one score per class.

    Returns:
        float32 [N, H, W] or [N, C, h, w], and [N, H, W].

    Raises:
        LabelError, ScoreError: other shapes or dtypes.
    """
    truth = label_map(target, "the target")
    values = torch.from_numpy(np.array(scores)) if isinstance(scores, np.ndarray) else scores
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise ScoreError(
            "scores must be a tensor or NumPy array of floating-point numbers, got "
            f"{getattr(scores, 'dtype', type(scores).__name__)}"
        )
    if truth.ndim == 2:
        truth, values = truth[None], values[None]
    ndim, same = (4, 1) if planes else (3, 3)
    if truth.ndim != 3 or values.ndim != ndim or values.shape[:same] != truth.shape[:same]:
        form = "[C, h, w] or [N, C, h, w]" if planes else "[H, W] or [N, H, W]"
        raise ScoreError(
            f"scores must be {form} for a target [H, W] or [N, H, W], got "
            f"{list(getattr(scores, 'shape', ()))} and {list(target.shape)}"
        )
    return values.float(), truth.to(values.device)


def check_probabilities(values: Tensor, planes: bool) -> None:
    """Raises ScoreError on the CPU where values are no probabilities, NaN aside."""
    if values.device.type != "cpu" or not values.numel():
        return
    low, high = (float(value) for value in values.nan_to_num(0.0).aminmax())
    if low < 0 or high > 1:
        raise ScoreError(
            f"probabilities must be 0 to 1, got {low:g} to {high:g}; logits have update_logits"
        )
    if planes:
        total = values.sum(1).nan_to_num(1.0)
        off = float((total - 1).abs().max())
        if off > 1e-2:  # half precision is that coarse
            raise ScoreError(
                f"the probabilities of a pixel must add up to 1, they are off by up to {off:g}"
            )


def target_of(prediction: Segmentation, sample: Sample, device: torch.device) -> Tensor:
    """The sample's labels [H, W] on ``device``.

    Raises:
        LabelError: there are none, they are not integers, or not of the prediction's size.
    """
    if sample.labels is None:
        raise LabelError(f"sample {sample.name!r} has no labels to score against")
    target = label_map(sample.labels, f"sample {sample.name!r}")
    if tuple(target.shape) != tuple(prediction.size):
        raise LabelError(
            f"sample {sample.name!r} has labels of size {list(target.shape)}, its "
            f"prediction is {list(prediction.size)}"
        )
    return target.to(device)


def class_targets(
    prediction: Segmentation, sample: Sample, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ground truth of an image, and its logits upsampled: see `checked_logits`.

    Raises:
        LabelError: labels that are no class ids, or are absent.
        ScoreError: there are no logits, or they hold NaN.
    """
    if prediction.logits is None:
        raise ScoreError(
            f"sample {sample.name!r}: the prediction holds labels without logits, and "
            "this metric needs probabilities; score the stage before, or use "
            "'semantic'"
        )
    target = target_of(prediction, sample, prediction.logits.device)
    return checked_logits(
        prediction.logits, target, num_classes, ignore_index, f"sample {sample.name!r}"
    )


def checked_logits(
    logits: Tensor, target: Tensor, num_classes: int, ignore_index: int, what: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels and logits of one image, ready to be compared.

    Args:
        logits: [C, h, w].
        target: [H, W] class ids on the same device.
        num_classes: C.
        ignore_index: label of pixels without ground truth.
        what: begins messages.

    Returns:
        targets [H, W] int64, -1 where there is none; logits [C, H, W] float32 (bilinear, as
        `Segmentation.full_logits`); [3] int64 counts for `raise_invalid`: no predictions, targets
        out of range (which count as none), images with NaN logits.

    Raises:
        LabelError: on the CPU, labels that are no class ids.
        ScoreError: another number of classes; on the CPU, NaN.
    """
    if logits.shape[0] != num_classes:
        raise ScoreError(
            f"{what}: the prediction has {logits.shape[0]} classes, the metric {num_classes}"
        )
    undefined = nan_count(logits, what)
    truth, wrong = checked_targets(target, num_classes, ignore_index, what)
    logits = logits.float()
    if logits.shape[1:] != target.shape:
        logits = torch.nn.functional.interpolate(
            logits[None], target.shape, mode="bilinear", align_corners=False
        )[0]
    return truth, logits, torch.stack([torch.zeros_like(wrong), wrong, undefined])


def checked_targets(
    target: Tensor, num_classes: int, ignore_index: int, what: str
) -> tuple[Tensor, Tensor]:
    """Class ids as int64, -1 where there is none, and the number of those out of range, [] int64.

    Raises:
        LabelError: on the CPU, values that are no class ids.
    """
    target = target.long()
    valid = target != ignore_index
    wrong = valid & ((target < 0) | (target >= num_classes))
    if target.device.type == "cpu" and wrong.any():
        raise LabelError(
            f"{what}: label values {target[wrong].unique().tolist()} "
            f"are no class ids: 0 to {num_classes - 1}, and {ignore_index} is "
            "void; `pyseg check-labels` finds the cause"
        )
    return target.masked_fill(~valid | wrong, -1), wrong.sum()


def nan_images(prediction: Segmentation, name: str) -> Tensor:
    """1 where the logits hold NaN, else 0; [] int64 on their device.

    Raises:
        ScoreError: they do, on the CPU.
    """
    if prediction.logits is None:
        return torch.zeros((), dtype=torch.int64, device=prediction.labels.device)
    return nan_count(prediction.logits, f"sample {name!r}")


def nan_count(values: Tensor, what: str) -> Tensor:
    """1 where ``values`` hold NaN, else 0: [] int64; on the CPU they are a ScoreError."""
    found = values.isnan().any()
    if found.device.type == "cpu" and found:
        raise ScoreError(f"{what}: {_NAN}")
    return found.long()


def copied(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[Tensor]:
    """Copies of a metric's ``state``, in the order of its ``own``.

    Raises:
        ValueError: the state of a metric with other options, such as another number of classes.
    """
    for name, tensor in own.items():
        if name not in state or state[name].shape != tensor.shape:
            found = list(state[name].shape) if name in state else "nothing"
            raise ValueError(
                f"state {name!r} must be {list(tensor.shape)} for this metric's "
                f"classes and options, got {found}"
            )
    return [state[name].clone() for name in own]


def raise_invalid(invalid: Tensor, num_classes: int, ignore_index: int) -> None:
    """Reports what was counted: predictions and targets out of range, images with NaN logits."""
    wrong_predictions, wrong_targets, undefined = invalid.tolist()
    if undefined:
        raise ScoreError(f"{undefined} predictions: {_NAN}")
    if wrong_predictions or wrong_targets:
        raise LabelError(
            f"{wrong_predictions} predicted and {wrong_targets} target pixels have labels that "
            f"are neither 0 to {num_classes - 1} nor {ignore_index} (void); run the metric on "
            "the CPU to see which"
        )
