"""Pixels of a label map that are near another label: the smallest op, and the template of others.

An op's module holds, in this order: the public function with its checks, the fake kernel (shapes
for torch.compile and torch.export), autograd where there is a gradient, and the same thing in a few
lines of torch, which tests and benchmarks use and the public function never does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .confusion_matrix import INTEGERS

_native.load()  # defines torch.ops.pyseg.*, without which register_fake below would fail


def boundary_mask(labels: Tensor, distance: int, border: bool = True) -> Tensor:
    """Marks the pixels that are at most ``distance`` from a pixel of another label.

    Distances are chessboard distances: within 1 are all eight neighbours. So the mask and a class
    together are what eroding that class by a 3 x 3 square ``distance`` times removes, for all
    classes in one pass: the boundary of Cheng et al., Boundary IoU, 2021.

    Args:
        labels: [N, H, W] labels or segment ids, uint8 to int64.
        distance: pixels, at least 1.
        border: whether the outside of the image counts as another label.

    Returns:
        [N, H, W] bool.

    Raises:
        ValueError: labels are not [N, H, W] integers, or distance is below 1.

    Example:
        >>> labels = torch.tensor([[[0, 0, 0, 0, 1, 1]]])
        >>> boundary_mask(labels, 1, border=False)[0, 0].tolist()
        [False, False, False, True, True, False]
    """
    _native.check_tensors(labels=labels)
    if labels.dtype not in INTEGERS or labels.ndim != 3:
        raise ValueError(
            f"labels must be [N, H, W] integers, got {labels.dtype} {list(labels.shape)}"
        )
    distance, border = _native.integer("distance", distance), _native.flag("border", border)
    if distance < 1:
        raise ValueError(f"distance must be at least 1 pixel, got {distance}")
    _native.require("boundary_mask", labels)  # a CUDA tensor without CUDA kernels: says what to do
    return torch.ops.pyseg.boundary_mask(labels, distance, border)


def boundary_distance(size: Sequence[int], ratio: float) -> int:
    """Width of the boundary in pixels as a share of the image's diagonal, at least 1.

    Args:
        size: (H, W) of the image.
        ratio: 0.02 in Cheng et al., 2021.
    """
    return max(1, round(ratio * math.hypot(size[0], size[1])))


# Only shapes, dtypes and devices: it sees tensors without data, whose sizes may be symbols.
@torch.library.register_fake("pyseg::boundary_mask")
def _(labels, distance, border):
    return labels.new_empty(labels.shape, dtype=torch.bool)


def reference(labels: Tensor, distance: int, border: bool = True) -> Tensor:
    """The same by the largest and the smallest label of every window."""
    values = labels[:, None].double()
    if border:
        values = torch.nn.functional.pad(values, [distance] * 4, value=-math.inf)
    window = 2 * distance + 1
    padding = 0 if border else distance
    largest = torch.nn.functional.max_pool2d(values, window, 1, padding)
    smallest = -torch.nn.functional.max_pool2d(-values, window, 1, padding)
    return (largest != smallest)[:, 0]
