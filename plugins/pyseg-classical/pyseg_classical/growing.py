"""Seeded region growing (Adams and Bischof, PAMI 1994) with an adaptive threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from . import _core
from .regions import Image, Map, RegionModel, at_least, grey, merge_small, one_of


def grow(
    image: NDArray[Any],
    seeds: NDArray[Any],
    threshold: float,
    *,
    fill: bool = False,
    diagonal: bool = False,
) -> NDArray[np.int32]:
    """Regions that grow from seeds, all at once, the most similar pixel of all borders first.

    A pixel p beside region i joins it if |I(p) - M_i| < T_i = (1 - sd_i / M_i) T, with the region's
    mean M_i and standard deviation sd_i at that moment; T_i is kept within 0..T. Of several
    channels |I(p) - M_i| is the Euclidean distance, M_i in T_i the length of the mean, and sd_i the
    root of the sum of the channels' variances. Pixels wait in the order of their distance when the
    region came to them, of equals the first.

    Args:
        image: [H, W] or [H, W, C].
        seeds: [H, W] integers, 0 = none; pixels of one number are the seed of one region.
        threshold: T, in the image's unit.
        fill: pixels that no region took join the nearest afterwards, whatever the threshold.
        diagonal: 8 neighbours instead of 4.

    Returns:
        [H, W]: 1, 2, … in the order of the seeds' numbers; 0 = in no region.

    Raises:
        ValueError: shapes that do not fit, no seed, negative ones, NaN, or a threshold below 0.
    """
    values = _checked(image)
    marks = np.asarray(seeds)
    if marks.shape != values.shape[:2] or marks.dtype.kind not in "iu":
        raise ValueError(
            f"seeds must be integers {list(values.shape[:2])}, one for each pixel, got "
            f"{marks.dtype} {list(marks.shape)}"
        )
    numbers, inverse = np.unique(marks, return_inverse=True)
    if numbers[0] < 0 or numbers[-1] == 0:
        raise ValueError("seeds must be 0 or more, and more than 0 at one pixel at least")
    marks = inverse.reshape(marks.shape) + (numbers[0] > 0)
    at_least("threshold", threshold, 0)
    return _core.grow_seeds(values, marks, int(marks.max()), threshold, fill, diagonal)


def _checked(image: NDArray[Any]) -> NDArray[np.float64]:
    values = np.asarray(image, np.float64)
    values = np.ascontiguousarray(values[:, :, None] if values.ndim == 2 else values)
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(f"image must be [H, W] or [H, W, C], got {list(np.shape(image))}")
    if not np.isfinite(values).all():
        raise ValueError("image must be finite, but holds NaN or infinity; fill such pixels in")
    return values


class RegionGrowing(RegionModel):
    """Regions that grow from seeds while pixels are similar; see `grow`.

    Args:
        threshold: T, in grey values, or in 0..255 of the distance of colours.
        seeds: where regions begin: ``"automatic"``: one region after the other, each from the
            smoothest pixel (smallest gradient) that is in none yet, until none is left;
            ``"random"``: at ``count`` pixels; or given as ((row, column), …).
        count: random seeds, at most as many as pixels.
        colour: compare colours, not grey values.
        smoothing: standard deviation of a Gaussian before, in pixels.
        fill: pixels that no region took join the nearest; else they are void.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
        seed: of the draw.

    Raises:
        ValueError: wrong options; in predicting, a seed outside the image.
    """

    def __init__(
        self,
        *,
        threshold: float = 30.0,
        seeds: Literal["automatic", "random"] | Sequence[tuple[int, int]] = "automatic",
        count: int = 100,
        colour: bool = True,
        smoothing: float = 1.0,
        fill: bool = True,
        min_size: int = 50,
        seed: int = 0,
    ) -> None:
        if isinstance(seeds, str):
            one_of("seeds", seeds, ("automatic", "random"))
            self.seeds: Any = seeds
        else:
            self.seeds = tuple(seeds)
            if not self.seeds or any(len(place) != 2 for place in self.seeds):
                raise ValueError(f"seeds must be ((row, column), …), at least one, got {seeds!r}")
        self.threshold, self.count = (
            at_least("threshold", threshold, 0),
            at_least("count", count, 1),
        )
        self.smoothing = at_least("smoothing", smoothing, 0)
        self.min_size, self.seed = int(at_least("min_size", min_size, 0)), at_least("seed", seed, 0)
        self.colour, self.fill = colour, fill

    def regions(self, image: Image) -> Map:
        values = (image if self.colour else grey(image)[:, :, None]).astype(np.float64)
        if self.smoothing:
            values = ndimage.gaussian_filter(values, (self.smoothing, self.smoothing, 0))
        if self.seeds == "automatic":
            size = self.smoothing or 1.0
            slope = ndimage.gaussian_gradient_magnitude(values, (size, size, 0)).sum(2)
            order = slope.ravel().argsort(kind="stable")
            found = _core.grow_in_order(values, order, self.threshold, False)
        else:
            found = grow(values, self._marks(image.shape[:2]), self.threshold, fill=self.fill)
        return merge_small(found.astype(np.int64) - 1, image, self.min_size)

    def _marks(self, shape: Sequence[int]) -> NDArray[np.int64]:
        marks = np.zeros(shape, np.int64)
        if self.seeds == "random":
            draw = np.random.default_rng(self.seed)
            chosen = draw.choice(marks.size, min(self.count, marks.size), replace=False)
            marks.ravel()[chosen] = np.arange(1, len(chosen) + 1)
            return marks
        for number, (row, column) in enumerate(self.seeds, 1):
            if not (0 <= row < shape[0] and 0 <= column < shape[1]):
                raise ValueError(
                    f"seeds must be inside the image of {shape[0]} x {shape[1]}, got "
                    f"({row}, {column}); they are (row, column), counted from 0"
                )
            marks[row, column] = number
        return marks


__all__ = ["RegionGrowing", "grow"]
