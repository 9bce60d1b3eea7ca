"""pydensecrf.utils: unary energies, and features of pairwise terms."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "compute_unary",
    "create_pairwise_bilateral",
    "create_pairwise_gaussian",
    "softmax_to_unary",
    "unary_from_labels",
    "unary_from_softmax",
]


def unary_from_labels(
    labels: ArrayLike, n_labels: int, gt_prob: float, zero_unsure: bool = True
) -> NDArray[np.float32]:
    """Energies of an annotation that is right with probability ``gt_prob``.

    Args:
        labels: integers of any shape, n in total.
        n_labels: number of labels; where ``zero_unsure``, 0 is none of them.
        gt_prob: above 0 and below 1; what remains is shared evenly by the other labels.
        zero_unsure: 0 means "could be any label", and labels count from 1.

    Returns:
        [n_labels, n] float32.

    Raises:
        ValueError: gt_prob or n_labels out of range, or labels that are none of them.
    """
    if not 0 < gt_prob < 1:
        raise ValueError(f"gt_prob must be above 0 and below 1, got {gt_prob}")
    if n_labels < 2:
        raise ValueError(f"n_labels must be at least 2, got {n_labels}")
    flat = np.asarray(labels).ravel()
    if not np.issubdtype(flat.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {flat.dtype}")
    highest = n_labels if zero_unsure else n_labels - 1
    if flat.size and not 0 <= flat.min() <= flat.max() <= highest:
        raise ValueError(
            f"labels must be 0 to {highest} for n_labels={n_labels} and zero_unsure={zero_unsure}, "
            f"got {flat.min()} to {flat.max()}"
        )
    index = flat.astype(np.int64) - bool(zero_unsure)
    energies = np.full((n_labels, flat.size), -np.log((1 - gt_prob) / (n_labels - 1)), np.float32)
    energies[index, np.arange(flat.size)] = -np.log(gt_prob)
    energies[:, index < 0] = np.log(n_labels)
    return energies


def unary_from_softmax(
    sm: ArrayLike, scale: float | None = None, clip: float | None = 1e-5
) -> NDArray[np.float32]:
    """Energies of class probabilities.

    Args:
        sm: [n_labels, ...] probabilities.
        scale: above 0, at most 1: mixes them with the uniform distribution, whose share is
            1 - scale; None = 1.
        clip: smaller probabilities become this one, as the energy of 0 is infinite; None = none do.

    Returns:
        [n_labels, n] float32.

    Raises:
        ValueError: scale out of range.
    """
    probabilities = np.asarray(sm)
    n_labels = len(probabilities)
    if scale is not None:
        if not 0 < scale <= 1:
            raise ValueError(f"scale must be above 0 and at most 1, got {scale}")
        probabilities = scale * probabilities + (1 - scale) / n_labels
    if clip is not None:
        probabilities = np.clip(probabilities, clip, 1)
    energies = -np.log(probabilities).reshape(n_labels, -1)
    return np.ascontiguousarray(energies, dtype=np.float32)


def create_pairwise_gaussian(sdims: Sequence[float], shape: Sequence[int]) -> NDArray[np.float32]:
    """Features of a kernel over position, for `DenseCRF.addPairwiseEnergy`.

    Args:
        sdims: one standard deviation per dimension.
        shape: of the grid, such as (height, width).

    Returns:
        [len(shape), n] float32.

    Raises:
        ValueError: sdims and shape differ in length.
    """
    return _positions(sdims, tuple(shape)).reshape(len(shape), -1)


def create_pairwise_bilateral(
    sdims: Sequence[float], schan: float | Sequence[float], img: ArrayLike, chdim: int = -1
) -> NDArray[np.float32]:
    """Features of a kernel over position and the image's values.

    Args:
        sdims: one standard deviation per dimension of position.
        schan: one standard deviation for all channels, or one for each.
        img: positions in any number of dimensions, and channels at ``chdim``.
        chdim: the dimension of the channels; -1 = there is none.

    Returns:
        [dimensions + channels, n] float32.

    Raises:
        ValueError: numbers of standard deviations that do not fit.
    """
    image = np.asarray(img, dtype=np.float32)
    channels = image[None] if chdim == -1 else np.moveaxis(image, chdim, 0)
    deviations = np.asarray(schan, dtype=np.float32)
    if not isinstance(schan, Real) and deviations.shape != (len(channels),):
        raise ValueError(f"schan must be one number or {len(channels)}, got {schan}")
    scaled = channels / deviations.reshape(-1, *[1] * (channels.ndim - 1))
    positions = _positions(sdims, channels.shape[1:])
    return np.concatenate([positions, scaled]).reshape(len(positions) + len(scaled), -1)


# Names that scripts import although they are private there.


def _create_pairwise_gaussian_2d(sx: float, sy: float, shape: Sequence[int]) -> NDArray[np.float32]:
    return create_pairwise_gaussian((sx, sy), shape)


def _create_pairwise_bilateral_2d(
    sx: float, sy: float, sr: float, sg: float, sb: float, img: ArrayLike
) -> NDArray[np.float32]:
    return create_pairwise_bilateral((sx, sy), (sr, sg, sb), img, chdim=2)


def compute_unary(labels: ArrayLike, M: int, GT_PROB: float = 0.5) -> NDArray[np.float32]:
    """Old name of `unary_from_labels`."""
    warnings.warn("compute_unary is now unary_from_labels", DeprecationWarning, stacklevel=2)
    return unary_from_labels(labels, M, GT_PROB)


def softmax_to_unary(sm: ArrayLike, GT_PROB: float = 1) -> NDArray[np.float32]:
    """Old name of `unary_from_softmax`."""
    warnings.warn("softmax_to_unary is now unary_from_softmax", DeprecationWarning, stacklevel=2)
    return unary_from_softmax(sm, None if GT_PROB == 1 else GT_PROB, clip=None)


def _positions(sdims: Sequence[float], shape: tuple[int, ...]) -> NDArray[np.float32]:
    if len(sdims) != len(shape):
        raise ValueError(f"sdims must be {len(shape)} numbers, as shape is {shape}, got {sdims}")
    deviations = np.asarray(sdims, dtype=np.float32).reshape(-1, *[1] * len(shape))
    return np.indices(shape, dtype=np.float32) / deviations
