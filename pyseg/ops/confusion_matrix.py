"""Confusion matrix of label maps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native

_native.load()

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class ConfusionCounts(NamedTuple):
    """Everything that `confusion_counts` counts, per image."""

    matrix: Tensor  # [N, C, C] int64, rows = target, columns = prediction
    missed: Tensor  # [N, C] int64: target class where the prediction is ignore_index
    invalid: Tensor  # [N, 2] int64: predictions, targets out of range (always 0 on the CPU)


def confusion_counts(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255
) -> ConfusionCounts:
    """Counts pairs of target and predicted class per image, and what falls outside the matrix.

    Pixels whose target is ``ignore_index`` are skipped, whatever the prediction there. A prediction
    of ``ignore_index`` on a valid target goes to ``missed``: a metric scores it as a miss.

    Args:
        prediction: [N, H, W] labels, uint8 to int64.
        target: [N, H, W] labels of the same dtype and device.
        num_classes: C, from 1 to 4096.
        ignore_index: label of pixels without ground truth.

    Returns:
        `ConfusionCounts`. Labels out of range raise on the CPU. On CUDA they are counted in
        ``invalid`` instead, so that nothing waits for the device: read it with the result.

    Raises:
        ValueError: shapes, dtypes or devices differ; labels out of range (CPU), with their values,
            the first place and the likely cause.
    """
    _native.check_tensors(prediction=prediction, target=target)
    for name, labels in (("prediction", prediction), ("target", target)):
        if labels.dtype not in INTEGERS:
            raise ValueError(
                f"{name} must hold integer labels, got {labels.dtype}; use logits.argmax(1) or "
                f"{name}.long()"
            )
    if target.ndim != 3 or prediction.shape != target.shape:
        raise ValueError(
            "prediction and target must both be [N, H, W], got "
            f"{list(prediction.shape)} and {list(target.shape)}"
        )
    if prediction.device != target.device:
        raise ValueError(
            f"prediction is on {prediction.device}, target on {target.device}: move one of them"
        )
    num_classes = _native.integer("num_classes", num_classes)
    ignore_index = _native.integer("ignore_index", ignore_index)
    if not 1 <= num_classes <= 4096:
        raise ValueError(f"num_classes must be 1 to 4096, got {num_classes}")
    _native.require("confusion_matrix", target)
    if prediction.dtype != target.dtype:
        common = torch.promote_types(prediction.dtype, target.dtype)
        prediction, target = prediction.to(common), target.to(common)
    counts = torch.ops.pyseg.confusion_matrix(prediction, target, num_classes, ignore_index)
    return ConfusionCounts(*counts)


def confusion_matrix(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255
) -> Tensor:
    """Confusion matrix of each image of a batch.

    The matrix of `confusion_counts`, which see for arguments and errors; on CUDA, labels out of
    range are left out of it.

    Returns:
        [N, C, C] int64: entry (n, t, p) counts the pixels of image n with target t, prediction p.

    Example:
        >>> target = torch.tensor([[[0, 1], [1, 255]]], dtype=torch.uint8)
        >>> confusion_matrix(torch.ones_like(target), target, num_classes=2)[0].tolist()
        [[0, 1], [0, 2]]
    """
    return confusion_counts(prediction, target, num_classes, ignore_index).matrix


@torch.library.register_fake("pyseg::confusion_matrix")
def _(prediction, target, num_classes, ignore_index):
    n = target.shape[0]
    return tuple(
        target.new_empty(shape, dtype=torch.int64)
        for shape in ((n, num_classes, num_classes), (n, num_classes), (n, 2))
    )


def reference(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255):
    """The matrix by ``torch.bincount``; labels must be in range."""
    prediction, target = prediction.long(), target.long()
    matrices = []
    for p, t in zip(prediction, target, strict=True):
        valid = (t != ignore_index) & (p != ignore_index)
        cells = torch.bincount(t[valid] * num_classes + p[valid], minlength=num_classes**2)
        matrices.append(cells.view(num_classes, num_classes))
    return torch.stack(matrices) if matrices else target.new_zeros((0, num_classes, num_classes))
