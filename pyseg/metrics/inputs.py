"""What metrics have in common: checked ground truth, logits at its size, states.

Wrong values raise at once on the CPU. Elsewhere they are counted, so that nothing waits for the
device, and `raise_invalid` reports them when the scores are computed.
"""

from __future__ import annotations

from collections.abc import Mapping

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


def target_of(prediction: Segmentation, sample: Sample, device: torch.device) -> Tensor:
    """The sample's labels [H, W] on ``device``.

    Raises:
        LabelError: there are none, they are not integers, or not of the prediction's size.
    """
    target = sample.labels
    if target is None:
        raise LabelError(f"sample {sample.name!r} has no labels to score against")
    if target.is_floating_point():
        raise LabelError(
            f"sample {sample.name!r} has labels of {target.dtype}; class ids are "
            "integers, convert them"
        )
    if tuple(target.shape) != tuple(prediction.size):
        raise LabelError(
            f"sample {sample.name!r} has labels of size {list(target.shape)}, its "
            f"prediction is {list(prediction.size)}"
        )
    return target.to(device)


def class_targets(
    prediction: Segmentation, sample: Sample, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ground truth of an image, and its logits upsampled.

    Returns:
        targets [H, W] int64, -1 where there is none; logits [C, H, W] float32 (bilinear, as
        `Segmentation.probabilities`); [3] int64 counts for `raise_invalid`: no predictions, targets
        out of range (which count as none), images with NaN logits.

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
    if prediction.logits.shape[0] != num_classes:
        raise ScoreError(
            f"sample {sample.name!r}: the prediction has {prediction.logits.shape[0]} "
            f"classes, the metric {num_classes}"
        )
    undefined = nan_images(prediction, sample.name)
    target = target_of(prediction, sample, prediction.logits.device).long()
    valid = target != ignore_index
    wrong = valid & ((target < 0) | (target >= num_classes))
    if target.device.type == "cpu" and wrong.any():
        raise LabelError(
            f"sample {sample.name!r}: label values {target[wrong].unique().tolist()} "
            f"are no class ids: 0 to {num_classes - 1}, and {ignore_index} is "
            "void; `pyseg check-labels` finds the cause"
        )
    logits = prediction.logits.float()[None]
    if logits.shape[2:] != target.shape:
        logits = torch.nn.functional.interpolate(
            logits, target.shape, mode="bilinear", align_corners=False
        )
    counts = torch.stack([undefined.new_zeros(()), wrong.sum(), undefined])
    return target.masked_fill(~valid | wrong, -1), logits[0], counts


def nan_images(prediction: Segmentation, name: str) -> Tensor:
    """1 where the logits hold NaN, else 0; [] int64 on their device.

    Raises:
        ScoreError: they do, on the CPU.
    """
    if prediction.logits is None:
        return torch.zeros((), dtype=torch.int64, device=prediction.labels.device)
    found = prediction.logits.isnan().any()
    if found.device.type == "cpu" and found:
        raise ScoreError(f"sample {name!r}: {_NAN}")
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
