"""Contour pixels that lie near the same class's contour in another map."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native
from .confusion_matrix import INTEGERS

_native.load()


class BoundaryMatches(NamedTuple):
    """What `boundary_match` counts, per image."""

    counts: Tensor  # [N, C, 4] int64: contour pixels of the prediction, of them matched; of the
    # target, of them matched
    invalid: Tensor  # [N, 2] int64: predictions, targets out of range (always 0 on the CPU)


def boundary_match(
    prediction: Tensor, target: Tensor, num_classes: int, radius: float, ignore_index: int = 255
) -> BoundaryMatches:
    """Counts contour pixels of every class with and without a counterpart in the other map.

    A pixel is on the contour of its class if one of its four neighbours has another label; the
    image's border is no contour. It is matched if the contour of the same class in the other map
    has a pixel within ``radius``, as a distance transform finds it: several may be matched by the
    same one (Csurka et al., What is a good evaluation measure for semantic segmentation, 2013).
    Where the target is ``ignore_index`` the prediction counts as void too, so what it says there
    does not matter; void has no contour of its own.

    Args:
        prediction: [N, H, W] labels, uint8 to int64.
        target: [N, H, W] labels on the same device.
        num_classes: C, from 1 to 4096.
        radius: pixels, Euclidean, inclusive; at least 0.
        ignore_index: label of pixels without ground truth.

    Returns:
        `BoundaryMatches`: matched / all is the precision in the first pair, recall in the second.

    Raises:
        ValueError: shapes, dtypes or devices differ; labels out of range (CPU), with their values,
            the first place and the likely cause.
    """
    _native.check_tensors(prediction=prediction, target=target)
    for name, labels in (("prediction", prediction), ("target", target)):
        if labels.dtype not in INTEGERS:
            raise ValueError(
                f"{name} must hold integer labels, got {labels.dtype}; use {name}.long()"
            )
    if target.ndim != 3 or prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must both be [N, H, W], got "
            f"{list(prediction.shape)} and {list(target.shape)}"
        )
    if prediction.device != target.device:
        raise ValueError(
            f"prediction is on {prediction.device}, target on {target.device}: move one of them"
        )
    num_classes = _native.integer("num_classes", num_classes)
    ignore_index = _native.integer("ignore_index", ignore_index)
    radius = _native.number("radius", radius)
    if not 1 <= num_classes <= 4096:
        raise ValueError(f"num_classes must be 1 to 4096, got {num_classes}")
    if not 0 <= radius < 4096:
        raise ValueError(f"radius must be 0 to 4095 pixels, got {radius}")
    _native.require("boundary_match", target)
    common = torch.promote_types(prediction.dtype, target.dtype)
    return BoundaryMatches(
        *torch.ops.pyseg.boundary_match(
            prediction.to(common),
            target.to(common),
            num_classes,
            math.floor(radius * radius),
            ignore_index,
        )
    )


def contours(labels: Tensor) -> Tensor:
    """Whether one of a pixel's four neighbours in the image has another label, [..., H, W] bool."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    across, down = labels[..., 1:] != labels[..., :-1], labels[..., 1:, :] != labels[..., :-1, :]
    mask[..., 1:] |= across
    mask[..., :-1] |= across
    mask[..., 1:, :] |= down
    mask[..., :-1, :] |= down
    return mask


@torch.library.register_fake("pyseg::boundary_match")
def _(prediction, target, num_classes, squared_radius, ignore_index):
    n = target.shape[0]
    return (
        target.new_empty((n, num_classes, 4), dtype=torch.int64),
        target.new_empty((n, 2), dtype=torch.int64),
    )


def reference(
    prediction: Tensor, target: Tensor, num_classes: int, radius: float, ignore_index: int = 255
) -> Tensor:
    """The counts by SciPy's distance transform of every class; labels must be in range."""
    import numpy as np
    from scipy.ndimage import distance_transform_edt

    counts = torch.zeros(target.shape[0], num_classes, 4, dtype=torch.int64)
    prediction = torch.where(target == ignore_index, ignore_index, prediction.to(target.dtype))
    edges = [contours(labels).numpy() for labels in (prediction, target)]
    for n, k in np.ndindex(target.shape[0], num_classes):
        ours, theirs = (
            edge[n] & (labels[n] == k).numpy()
            for edge, labels in zip(edges, (prediction, target), strict=True)
        )
        for first, (mask, other) in enumerate(((ours, theirs), (theirs, ours))):
            matched = 0
            if k != ignore_index and other.any():
                matched = int((distance_transform_edt(~other)[mask] <= radius).sum())
            total = int(mask.sum()) if k != ignore_index else 0
            counts[n, k, 2 * first : 2 * first + 2] = torch.tensor([total, matched])
    return counts
