"""Bilinear resizing of logits fused with argmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native

_native.load()

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def upsample_argmax(logits: Tensor, size: Sequence[int]) -> Tensor:
    """The best class of every pixel after bilinear resizing; the resized logits never exist.

    Samples as ``torch.nn.functional.interpolate(logits, size, mode="bilinear",
    align_corners=False)`` does, in float32 (float64 for float64), and takes the first of the
    classes with the largest value; a class that is NaN wins, as in ``torch.argmax``. Half-precision
    logits are not rounded again after the interpolation, and a corner of weight zero is left out,
    even if it is infinite, where torch would make it NaN.

    Args:
        logits: [N, C, h, w], float16, bfloat16, float32 or float64, of any strides. C is at most
            32767.
        size: (H, W) of the labels in pixels, larger or smaller than h and w.

    Returns:
        [N, H, W] labels: uint8 for C <= 255, else int16.

    Raises:
        ValueError: logits are not [N, C, h, w] floating point with at least one class and pixel,
            or have too many classes; size is not two positive integers.

    Example:
        >>> logits = torch.tensor([[[[0.0, 3.0]], [[1.0, 0.0]]]])  # [1, 2, 1, 2]
        >>> upsample_argmax(logits, (1, 4))[0].tolist()
        [[1, 0, 0, 0]]
    """
    _native.check_tensors(logits=logits)
    if logits.ndim != 4 or 0 in logits.shape[1:]:
        raise ValueError(
            f"logits must be [N, C, h, w] with classes and pixels, got {list(logits.shape)}"
        )
    if logits.dtype not in FLOATS:
        raise ValueError(f"logits must be floating point, got {logits.dtype}; use logits.float()")
    if logits.shape[1] > 32767:
        raise ValueError(
            f"logits must have at most 32767 classes (labels are int16), got {logits.shape[1]}"
        )
    height, width = _native.image_size("size", size)
    _native.require("upsample_argmax", logits)
    return torch.ops.pyseg.upsample_argmax(logits, height, width)


@torch.library.register_fake("pyseg::upsample_argmax")
def _(logits, height, width):
    dtype = torch.uint8 if logits.shape[1] <= 255 else torch.int16
    return logits.new_empty((logits.shape[0], height, width), dtype=dtype)


def reference(logits: Tensor, size: Sequence[int]) -> Tensor:
    """The same by ``interpolate`` and ``argmax``, as int64."""
    resized = torch.nn.functional.interpolate(
        logits, tuple(size), mode="bilinear", align_corners=False
    )
    return resized.argmax(1)
