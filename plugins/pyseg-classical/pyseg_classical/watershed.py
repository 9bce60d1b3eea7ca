"""Watersheds, and the superpixels that scikit-image has: SLIC and quick shift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import morphology, segmentation

from .edges import strength
from .regions import (
    Image,
    Map,
    RegionModel,
    at_least,
    check_pixels,
    joined,
    merge_small,
    one_of,
    within,
)
from .thresholds import Otsu

QUICKSHIFT_PIXELS = 4_000_000  # some minutes: every pixel looks at its window of 6 kernel sizes


def minima(relief: NDArray[np.float64], h: float) -> NDArray[np.int32]:
    """The minima deeper than ``h``, numbered from 1; 0 elsewhere; [H, W].

    The others are filled first (Soille, 1999: the regional minima of the reconstruction by
    erosion of relief + h above the relief). A relief of less height is one minimum.
    """
    if np.ptp(relief) <= h:
        return np.ones(relief.shape, np.int32)
    filled = morphology.reconstruction(relief + h, relief, method="erosion")
    return ndimage.label(morphology.local_minima(filled), np.ones((3, 3)))[0]


class Watershed(RegionModel):
    """Basins of the gradient, flooded from markers (Beucher and Lantuejoul, 1979; Meyer, 1991).

    Markers are the minima of at least a depth of ``h``, so that noise gives none; or points on a
    grid; or given seeds; or the middles of dark or bright shapes, to part those that touch.

    Args:
        markers: ``"minima"`` of the gradient deeper than ``h``; ``"grid"``, ``count`` points;
            ``"seeds"``, those given; ``"distance"``: the maxima higher than ``h`` pixels in the
            distance to the background by Otsu's threshold, and this distance is flooded.
        h: depth of minima, of the gradient in 1/255; of ``"distance"`` in pixels.
        count: markers of ``"grid"``.
        seeds: (y, x) in pixels; a region for each.
        sigma: of the Gaussian before the gradient, in pixels; 0 = none.
        compactness: of Neubert and Protzel (2014): above 0 regions are rounder.
        dark: of ``"distance"``: the shapes are the darker class.
        min_size: regions of fewer pixels join the neighbour nearest in colour.

    Raises:
        ValueError: ``seeds`` without ``markers="seeds"`` or the reverse; in predicting, a seed
            outside the image, or two on one pixel.
    """

    def __init__(
        self,
        *,
        markers: Literal["minima", "grid", "seeds", "distance"] = "minima",
        h: float = 6.0,
        count: int = 200,
        seeds: Sequence[tuple[int, int]] = (),
        sigma: float = 1.0,
        compactness: float = 0.0,
        dark: bool = False,
        min_size: int = 1,
    ) -> None:
        self.markers = one_of("markers", markers, ("minima", "grid", "seeds", "distance"))
        if bool(seeds) != (markers == "seeds"):
            raise ValueError(
                "markers='seeds' needs seeds=((y, x), …), and no others take them; got "
                f"markers={markers!r}, seeds={tuple(seeds)!r}"
            )
        self.seeds = tuple((int(y), int(x)) for y, x in seeds)
        self.h, self.count = at_least("h", h, 0), int(at_least("count", count, 1))
        self.sigma = at_least("sigma", sigma, 0)
        self.compactness, self.dark = at_least("compactness", compactness, 0), dark
        self.min_size = int(at_least("min_size", min_size, 0))

    def regions(self, image: Image) -> Map:
        if self.markers == "distance":
            return self._shapes(image)
        relief = strength(image, "sobel", self.sigma)
        if self.markers == "minima":
            markers = minima(np.round(relief * 255, 3), self.h)
        elif self.markers == "grid":
            markers = min(self.count, relief.size)
        else:
            markers = self._given(relief.shape)
        parts = segmentation.watershed(relief, markers, compactness=self.compactness)
        return merge_small(parts - 1, image, self.min_size)

    def _given(self, shape: tuple[int, ...]) -> Map:
        markers = np.zeros(shape, np.int32)
        for number, (y, x) in enumerate(self.seeds, 1):
            if not (0 <= y < shape[0] and 0 <= x < shape[1]):
                raise ValueError(
                    f"seeds: ({y}, {x}) is outside the image of {shape[0]} x {shape[1]} pixels; "
                    "seeds are (y, x) from (0, 0)"
                )
            if markers[y, x]:
                raise ValueError(f"seeds: ({y}, {x}) is given twice")
            markers[y, x] = number
        return markers

    def _shapes(self, image: Image) -> Map:
        inside = Otsu(dark=self.dark).foreground(image)
        if not inside.any():
            return np.full(inside.shape, -1)
        depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
        markers = minima(-depth, self.h) * inside
        parts = segmentation.watershed(-depth, markers, mask=inside, compactness=self.compactness)
        return merge_small(parts.astype(np.int64) - 1, image, self.min_size)


class SLIC(RegionModel):
    """Superpixels by k-means in colour and position with a local search (Achanta et al., 2012).

    Args:
        count: about how many.
        compactness: weight of the position against the colour in CIELAB.
        sigma: of the Gaussian before, in pixels; 0 = none.
        iterations: of k-means.
    """

    def __init__(
        self,
        *,
        count: int = 400,
        compactness: float = 10.0,
        sigma: float = 0.0,
        iterations: int = 10,
    ) -> None:
        self.count = int(at_least("count", count, 1))
        self.compactness = at_least("compactness", compactness, 1e-3)
        self.sigma = at_least("sigma", sigma, 0)
        self.iterations = int(at_least("iterations", iterations, 1))

    def regions(self, image: Image) -> Map:
        if min(image.shape[:2]) < 2:  # scikit-image's takes no lines of pixels
            return self._line(image)
        return segmentation.slic(
            image,
            min(self.count, image.shape[0] * image.shape[1]),
            self.compactness,
            self.iterations,
            self.sigma,
            start_label=0,
        )

    def _line(self, image: Image) -> Map:
        """Of one row or column: equal parts, as SLIC starts from."""
        pixels = image.shape[0] * image.shape[1]
        return (np.arange(pixels) * min(self.count, pixels) // pixels).reshape(image.shape[:2])


class QuickShift(RegionModel):
    """Superpixels by quick shift, a fast mode seeking (Vedaldi and Soatto, 2008).

    Every pixel is linked to the nearest of higher density in colour and position; links longer than
    ``max_distance`` are cut.

    Args:
        ratio: weight of the colour against the position, 0..1.
        kernel_size: standard deviation of the density's Gaussian, in pixels.
        max_distance: above it links are cut: larger ones give fewer regions.
        sigma: of the Gaussian before, in pixels; 0 = none.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
        seed: of the noise that breaks ties.

    Raises:
        ValueError: in predicting, an image of more than 4 million pixels.
    """

    def __init__(
        self,
        *,
        ratio: float = 0.5,
        kernel_size: float = 3.0,
        max_distance: float = 10.0,
        sigma: float = 0.0,
        min_size: int = 1,
        seed: int = 0,
    ) -> None:
        self.ratio = within("ratio", ratio, 0, 1)
        self.kernel_size = at_least("kernel_size", kernel_size, 0.2)
        self.max_distance = at_least("max_distance", max_distance, 0)
        self.sigma, self.seed = at_least("sigma", sigma, 0), seed
        self.min_size = int(at_least("min_size", min_size, 0))

    def regions(self, image: Image) -> Map:
        return self.cut(image, *self.tree(image))

    def tree(self, image: Image) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The pixel that every pixel is linked to, [H W], and the length of the link, [H W]."""
        check_pixels("quickshift", image, QUICKSHIFT_PIXELS, "shrink it, or use slic")
        _, parents, lengths = segmentation.quickshift(
            image,
            self.ratio,
            self.kernel_size,
            np.inf,
            return_tree=True,
            sigma=self.sigma,
            rng=self.seed,
        )
        return np.asarray(parents, np.int64).ravel(), np.asarray(lengths).ravel()

    def cut(self, image: Image, parents: NDArray[np.int64], lengths: NDArray[np.float64]) -> Map:
        """Regions [H, W] of the tree without links longer than ``max_distance``."""
        numbers = np.arange(len(parents))
        kept = lengths <= self.max_distance
        links = np.stack([numbers[kept], parents[kept]], 1)
        return merge_small(joined(numbers, links).reshape(image.shape[:2]), image, self.min_size)
