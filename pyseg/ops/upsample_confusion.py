"""Bilinear resizing of logits fused with argmax and a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .confusion_matrix import INTEGERS, ConfusionCounts
from .confusion_matrix import reference as confusion_reference
from .upsample_argmax import FLOATS
from .upsample_argmax import reference as argmax_reference

_native.load()


def upsample_confusion(
    logits: Tensor, target: Tensor, size: Sequence[int] | None = None, ignore_index: int = 255
) -> ConfusionCounts:
    """Scores logits at the size of their ground truth; neither they nor labels exist at that size.

    Equal, bit for bit, to `confusion_counts` of the labels that `upsample_argmax` gives.

    Args:
        logits: [N, C, h, w], float16, bfloat16, float32 or float64, of any strides. C is 1 to 4096.
        target: [N, H, W] labels, uint8 to int64, on the same device.
        size: (H, W), that of the target, which is also the default.
        ignore_index: label of pixels without ground truth.

    Returns:
        `ConfusionCounts`, with its rules: targets out of range raise on the CPU, and are counted in
        ``invalid`` on CUDA.

    Raises:
        ValueError: shapes or dtypes are not as above; devices differ; target labels out of range
            (CPU), with their values, the first place and the likely cause.

    Example:
        >>> logits = torch.tensor([[[[0.0, 3.0]], [[1.0, 0.0]]]])  # [1, 2, 1, 2]
        >>> target = torch.tensor([[[1, 0, 0, 255]]])
        >>> upsample_confusion(logits, target).matrix[0].tolist()
        [[2, 0], [0, 1]]
    """
    _native.check_tensors(logits=logits, target=target)
    if logits.ndim != 4 or 0 in logits.shape[1:]:
        raise ValueError(
            f"logits must be [N, C, h, w] with classes and pixels, got {list(logits.shape)}"
        )
    if logits.dtype not in FLOATS:
        raise ValueError(f"logits must be floating point, got {logits.dtype}; use logits.float()")
    if logits.shape[1] > 4096:
        raise ValueError(f"logits must have at most 4096 classes, got {logits.shape[1]}")
    if target.dtype not in INTEGERS:
        raise ValueError(f"target must hold integer labels, got {target.dtype}; use target.long()")
    if target.ndim != 3 or target.shape[0] != logits.shape[0]:
        raise ValueError(f"target must be [{logits.shape[0]}, H, W], got {list(target.shape)}")
    if size is not None and 0 not in target.shape[1:]:
        size = _native.image_size("size", size)
    if size is not None and tuple(size) != tuple(target.shape[1:]):
        raise ValueError(f"size {tuple(size)} is not that of the target, {tuple(target.shape[1:])}")
    ignore_index = _native.integer("ignore_index", ignore_index)
    if logits.device != target.device:
        raise ValueError(
            f"logits are on {logits.device}, target on {target.device}: move one of them"
        )
    _native.require("upsample_confusion", logits)
    return ConfusionCounts(*torch.ops.pyseg.upsample_confusion(logits, target, ignore_index))


@torch.library.register_fake("pyseg::upsample_confusion")
def _(logits, target, ignore_index):
    n, classes = logits.shape[:2]
    return tuple(
        logits.new_empty(shape, dtype=torch.int64)
        for shape in ((n, classes, classes), (n, classes), (n, 2))
    )


def reference(logits: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """The matrix by ``interpolate``, ``argmax`` and ``bincount``; labels must be in range."""
    labels = argmax_reference(logits, target.shape[1:])
    return confusion_reference(labels, target, logits.shape[1], ignore_index)
