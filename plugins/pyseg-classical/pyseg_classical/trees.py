"""Regions from trees of pixels: Felzenszwalb and Huttenlocher's, and the minimum spanning tree's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from . import _core
from .regions import Image, Map, RegionModel, at_least


def smoothed(image: Image, sigma: float) -> NDArray[np.float64]:
    """The image [H, W, C] after a Gaussian of that standard deviation, cut off at 4 of them."""
    values = image.astype(np.float64)
    if sigma:
        values = ndimage.gaussian_filter(values, (sigma, sigma, 0), mode="nearest")
    return np.ascontiguousarray(values)


class Felzenszwalb(RegionModel):
    """Regions between which there is more difference than inside them (IJCV 2004).

    Pixels are a graph of 8 neighbours; from the smallest difference of colours on, two regions
    merge where it is at most the largest inside either plus ``scale`` / its size. Our own form, as
    in the paper on values of 0..255; scikit-image scales differences otherwise and starts from
    components that it merges in another order of equal edges.

    Args:
        scale: k in the paper; larger gives larger regions.
        sigma: standard deviation of a Gaussian before, in pixels.
        min_size: smaller regions join along their smallest edge.
    """

    def __init__(self, *, scale: float = 300.0, sigma: float = 0.8, min_size: int = 50) -> None:
        self.scale, self.sigma = at_least("scale", scale, 0), at_least("sigma", sigma, 0)
        self.min_size = int(at_least("min_size", min_size, 0))

    def regions(self, image: Image) -> Map:
        return _core.felzenszwalb(smoothed(image, self.sigma), self.scale, self.min_size)


class SpanningTree(RegionModel):
    """The minimum spanning tree of the pixels without its largest edges (Zahn, 1971).

    Cutting the largest edges as they come splits off single pixels, so only those count that have
    at least ``min_size`` pixels on both sides when the tree grows from its smallest edge.

    Args:
        k: regions at most, larger by one than the number of edges that are cut.
        least: edges of a smaller difference, in 0..255 of the distance of colours, are not cut.
        sigma: standard deviation of a Gaussian before, in pixels.
        min_size: see above.
    """

    def __init__(
        self, *, k: int = 20, least: float = 1.0, sigma: float = 1.0, min_size: int = 100
    ) -> None:
        self.k, self.least = int(at_least("k", k, 1)), at_least("least", least, 0)
        self.sigma, self.min_size = (
            at_least("sigma", sigma, 0),
            int(at_least("min_size", min_size, 1)),
        )

    def regions(self, image: Image) -> Map:
        return _core.spanning_tree(smoothed(image, self.sigma), self.k, self.least, self.min_size)


__all__ = ["Felzenszwalb", "SpanningTree", "smoothed"]
