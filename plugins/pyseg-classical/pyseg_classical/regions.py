"""START HERE: the two forms that every method has, and what regions are made of.

A method is a class whose options are keyword arguments of its ``__init__``, which checks them. It
is either a `RegionModel` and gives the parts that an image falls into, or a `TwoClassModel` and
tells foreground from background. Arrays that a method gets are [H, W, 3] uint8 RGB; a grey picture
has three equal channels, and `pyseg.image.read_image` has scaled 16-bit ones to 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from skimage.measure import label
from torch import Tensor

from pyseg.image import require_rgb8
from pyseg.types import Segmentation, Segments

Image = NDArray[np.uint8]  # [H, W, 3] RGB
Map = NDArray[np.integer[Any]]  # [H, W] number of each pixel's region; negative = in none
Mask = NDArray[np.bool_]  # [H, W]

REGION = ("region",)
TWO = ("background", "foreground")


class RegionModel:
    """A model that divides an image into regions without classes: each is a segment of "region"."""

    classes = REGION
    palette = ((200, 200, 200),)

    def regions(self, image: Image) -> Map:
        """The number of every pixel's region, [H, W]; negative where there is none.

        Args:
            image: [H, W, 3] uint8 RGB.
        """
        raise NotImplementedError

    def predict(self, images: Sequence[Tensor]) -> list[Segmentation]:
        """Images, each [3, H, W] uint8 RGB, to segments of the one class "region".

        Segments are counted from 1 in the order of rows; pixels in no region are void.

        Raises:
            ValueError: an image of another shape, or that the method cannot do.
            TypeError: one of another dtype.
        """
        found = []
        for image, pixels in _arrays(images):
            numbers = torch.from_numpy(renumbered(self.regions(pixels)).astype(np.int32) + 1)
            count = int(numbers.max())
            segments = Segments.from_map(numbers, dict.fromkeys(range(1, count + 1), 0))
            found.append(
                Segmentation(
                    _size(image),
                    self.classes,
                    segments=segments,
                    image=image,
                    palette=self.palette,
                )
            )
        return found


class TwoClassModel:
    """A model that tells the foreground of an image from its background."""

    classes = TWO
    palette = ((0, 0, 0), (230, 120, 40))

    def foreground(self, image: Image) -> Mask:
        """Where the foreground is, [H, W] bool.

        Args:
            image: [H, W, 3] uint8 RGB.
        """
        raise NotImplementedError

    def predict(self, images: Sequence[Tensor]) -> list[Segmentation]:
        """Images, each [3, H, W] uint8 RGB, to labels 0 = background, 1 = foreground.

        Raises:
            ValueError: an image of another shape, or that the method cannot do.
            TypeError: one of another dtype.
        """
        return [
            Segmentation(_size(image), self.classes, image=image, palette=self.palette).with_labels(
                self.foreground(pixels).astype(np.uint8)
            )
            for image, pixels in _arrays(images)
        ]


def _arrays(images: Sequence[Tensor]) -> list[tuple[Tensor, Image]]:
    for index, image in enumerate(images):
        require_rgb8(image, f"image {index}")
    return [(image, np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())) for image in images]


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[1], image.shape[2]


# ------------------------------------------------------------------------------ pieces of methods


def grey(image: Image) -> NDArray[np.uint8]:
    """Luma of Rec. 601, [H, W] in whole steps of 0..255; of a grey picture its own values."""
    weights = np.array([299, 587, 114])
    return ((image @ weights + 500) // 1000).astype(np.uint8)


def renumbered(regions: Map) -> NDArray[np.int64]:
    """The same regions, numbered from 0 in the order of rows; -1 where they are negative."""
    flat = regions.ravel()
    values, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
    order = np.where(values < 0, flat.size, first).argsort(kind="stable")
    numbers = np.empty(len(values), np.int64)
    numbers[order] = np.arange(len(values))
    numbers[values < 0] = -1
    return numbers[inverse].reshape(regions.shape)


def connected(regions: Map) -> NDArray[np.int64]:
    """Every connected part (4 neighbours) of a region as one of its own; negative stays -1."""
    return label(np.maximum(regions, -1), background=-1, connectivity=1).astype(np.int64) - 1


def adjacent(regions: Map) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which regions touch, and along how many pixels.

    Args:
        regions: [H, W] numbers from 0; negative = none.

    Returns:
        Pairs [E, 2], the smaller number first, sorted; and the number of pairs of 4-neighbours of
        which one is in either, [E].
    """
    one = np.concatenate([regions[:, :-1].ravel(), regions[:-1].ravel()]).astype(np.int64)
    other = np.concatenate([regions[:, 1:].ravel(), regions[1:].ravel()]).astype(np.int64)
    border = (one != other) & (one >= 0) & (other >= 0)
    low, high = np.minimum(one, other)[border], np.maximum(one, other)[border]
    count = int(regions.max()) + 1 if regions.size else 0
    keys, lengths = np.unique(low * count + high, return_counts=True)
    return np.stack([keys // max(count, 1), keys % max(count, 1)], 1), lengths


def means(regions: Map, values: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Mean of ``values`` [H, W, D] in every region 0..R-1, [R, D]; and its pixels, [R]."""
    inside = regions.ravel() >= 0
    numbers = regions.ravel()[inside]
    count = int(regions.max()) + 1
    area = np.bincount(numbers, minlength=count)
    flat = values.reshape(regions.size, -1)[inside]
    sums = [np.bincount(numbers, column, minlength=count) for column in flat.T]
    return np.stack(sums, 1) / np.maximum(area, 1)[:, None], area


def merge_small(regions: Map, image: NDArray[Any], min_size: int) -> NDArray[np.int64]:
    """Joins every region of less than ``min_size`` pixels to the neighbour nearest in colour.

    In rounds: all small ones choose at once, so a group of small ones may become one region. What
    has no neighbour stays.

    Args:
        regions: [H, W] numbers; negative = none.
        image: [H, W, D], what is compared.
        min_size: 0 and 1 leave all as they are.
    """
    regions = renumbered(regions)
    while True:
        colour, area = means(regions, image) if regions.max() >= 0 else (None, np.zeros(0))
        small = area < min_size
        pairs, _ = adjacent(regions)
        if colour is None or not small.any() or not len(pairs):
            return regions
        both = np.concatenate([pairs, pairs[:, ::-1]])
        both = both[small[both[:, 0]]]
        if not len(both):
            return regions
        distance = np.square(colour[both[:, 0]] - colour[both[:, 1]]).sum(1)
        both = both[np.lexsort((both[:, 1], distance, both[:, 0]))]
        chosen = both[np.unique(both[:, 0], return_index=True)[1]]
        regions = renumbered(joined(regions, chosen))


def joined(regions: Map, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Regions that are connected by ``pairs`` [E, 2] of their numbers become one."""
    count = int(regions.max()) + 1
    links = sparse.coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (count, count))
    _, owner = sparse.csgraph.connected_components(links, directed=False)
    return np.where(regions < 0, -1, owner[np.maximum(regions, 0)]).astype(np.int64)


# ------------------------------------------------------------------------------- options' values


def at_least(name: str, value: Any, least: float) -> Any:
    """The value of option ``name``; a ValueError below ``least`` and for what is not finite."""
    if not (np.isfinite(value) and value >= least):
        raise ValueError(f"{name} must be {least:g} or more, got {value}")
    return value


def within(name: str, value: Any, low: float, high: float) -> Any:
    """The value of option ``name``; a ValueError outside ``low`` to ``high``."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, got {value}")
    return value


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    """The value of option ``name``; a ValueError where it is none of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}"
        )
    return value


def check_pixels(name: str, image: NDArray[Any], most: int, remedy: str) -> None:
    """A ValueError for an image of more pixels than method ``name`` has memory or time for."""
    pixels = image.shape[0] * image.shape[1]
    if pixels > most:
        raise ValueError(
            f"{name} takes at most {most} pixels, got {image.shape[0]} x {image.shape[1]} = "
            f"{pixels}; {remedy}"
        )
