"""Edges, how gaps between them are closed, and the regions and objects that they enclose."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage import draw, feature, filters, measure, morphology, segmentation

from .regions import (
    Image,
    Map,
    Mask,
    RegionModel,
    TwoClassModel,
    at_least,
    grey,
    merge_small,
    one_of,
    within,
)

Detector = Literal["sobel", "prewitt", "log", "canny"]
DETECTORS = ("sobel", "prewitt", "log", "canny")


def strength(image: Image, operator: str = "sobel", sigma: float = 0.0) -> NDArray[np.float64]:
    """Magnitude of the gradient, [H, W] in 0..1, the largest of the three channels.

    Args:
        image: [H, W, 3] uint8.
        operator: ``"sobel"`` or ``"prewitt"``.
        sigma: of the Gaussian before, in pixels.
    """
    kernel = filters.sobel if operator == "sobel" else filters.prewitt
    planes = [plane / 255.0 for plane in np.moveaxis(image, 2, 0)]
    if (image == image[:, :, :1]).all():
        planes = planes[:1]
    smooth = [ndimage.gaussian_filter(plane, sigma) if sigma else plane for plane in planes]
    return np.max([kernel(plane) for plane in smooth], 0)


def thin(edges: Mask) -> Mask:
    """Edges to lines of one pixel (Zhang and Suen, 1984)."""
    return morphology.skeletonize(edges)


def zero_crossings(image: Image, sigma: float, threshold: float) -> Mask:
    """Where the Laplacian of Gaussian changes its sign (Marr and Hildreth, 1980).

    Args:
        image: [H, W, 3] uint8.
        sigma: in pixels.
        threshold: the least step across the sign change, in shares of the largest step in it.
    """
    response = ndimage.gaussian_laplace(grey(image) / 255.0, sigma)
    steps = np.zeros_like(response)
    for axis in (0, 1):
        before = np.moveaxis(response, axis, 0)
        crossing = before[:-1] * before[1:] < 0
        # The smaller value of the two is nearer to the edge.
        first = np.abs(before[:-1]) <= np.abs(before[1:])
        step = np.abs(before[:-1] - before[1:]) * crossing
        target = np.moveaxis(steps, axis, 0)
        target[:-1] = np.maximum(target[:-1], step * first)
        target[1:] = np.maximum(target[1:], step * ~first)
    return (steps > threshold * steps.max()) & (steps > 0)


def link(edges: Mask, gap: int) -> Mask:
    """Joins ends of thin edges that are near and point at each other by straight lines.

    An end is an edge pixel with one neighbour. Pairs are taken from the nearest on, every end once;
    the line between two ends must be within 60 degrees of the way in which either edge ends.

    Args:
        edges: [H, W], one pixel wide.
        gap: the longest line in pixels; 0 = none.
    """
    if gap == 0 or not edges.any():
        return edges
    around = ndimage.convolve(edges.astype(np.uint8), np.ones((3, 3), np.uint8), mode="constant")
    ends = np.argwhere(edges & (around == 2))
    if len(ends) < 2:
        return edges
    ways = np.array([_way(edges, end) for end in ends])
    pairs = cKDTree(ends).query_pairs(gap, output_type="ndarray")
    across = (ends[pairs[:, 1]] - ends[pairs[:, 0]]).astype(float)
    length = np.linalg.norm(across, axis=1)
    towards = (across * ways[pairs[:, 0]]).sum(1) >= 0.5 * length
    towards &= (-across * ways[pairs[:, 1]]).sum(1) >= 0.5 * length
    pairs, length = pairs[towards], length[towards]
    linked, free = edges.copy(), np.ones(len(ends), bool)
    for a, b in pairs[np.lexsort((pairs[:, 1], pairs[:, 0], length))]:
        if free[a] and free[b]:
            free[a] = free[b] = False
            linked[draw.line(*ends[a], *ends[b])] = True
    return linked


def _way(edges: Mask, end: NDArray[np.int64], steps: int = 5) -> NDArray[np.float64]:
    """Unit vector (dy, dx) in which an edge goes on beyond its end, from its last pixels."""
    path, seen = [tuple(end)], {tuple(end)}
    while len(path) <= steps:
        y, x = path[-1]
        window = edges[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        places = np.argwhere(window) + np.array([max(y - 1, 0), max(x - 1, 0)])
        onward = [place for place in map(tuple, places) if place not in seen]
        if not onward:
            break
        path.append(min(onward))
        seen.update(onward)
    way = np.subtract(path[0], path[-1]).astype(float)
    return way / max(np.linalg.norm(way), 1.0)


def find_edges(
    image: Image, detector: str, *, sigma: float, low: float | None, high: float | None
) -> Mask:
    """The detector's edges, one pixel wide; the options are those of `Canny`."""
    if detector == "log":
        return thin(zero_crossings(image, sigma, 0.1 if high is None else high))
    if detector == "canny":  # scikit-image's takes one channel
        image = np.repeat(grey(image)[:, :, None], 3, 2)
    gradient = strength(image, "prewitt" if detector == "prewitt" else "sobel", sigma)
    if gradient.max() < 1e-6:
        return np.zeros(gradient.shape, bool)
    otsu = float(filters.threshold_otsu(gradient)) if np.ptp(gradient) > 0 else 0.0
    high = otsu if high is None else high
    low = high / 2 if low is None else min(low, high)
    if detector == "canny":
        scale = 4 * np.sqrt(2)  # its magnitudes are not divided
        return feature.canny(
            grey(image) / 255.0,
            sigma,
            low_threshold=scale * low,
            high_threshold=scale * high,
            mode="nearest",
        )
    return thin(filters.apply_hysteresis_threshold(gradient, low, high))


def closed(edges: Mask, gap: int, closing: int) -> Mask:
    """Edges after `link` and a morphological closing by a disc of this radius."""
    linked = link(edges, gap)
    if closing == 0:
        return linked
    padded = np.pad(linked, closing)  # or the closing would take the border of the image for edges
    disc = morphology.disk(closing)
    return ndimage.binary_closing(padded, disc)[closing:-closing, closing:-closing]


class EdgeRegions(RegionModel):
    """What the `Canny`, `Sobel`, `Prewitt` and `LaplacianOfGaussian` have in common."""

    detector = ""

    def __init__(
        self,
        *,
        sigma: float = 1.5,
        low: float | None = None,
        high: float | None = None,
        gap: int = 8,
        closing: int = 1,
        min_size: int = 50,
    ) -> None:
        self.sigma = at_least("sigma", sigma, 0)
        if self.detector in ("log", "canny") and sigma == 0:
            raise ValueError(f"sigma must be above 0 for {self.detector}, got {sigma}")
        for name, value in (("low", low), ("high", high)):
            if value is not None:
                within(name, value, 0, 1)
        if low is not None and high is not None and low > high:
            raise ValueError(f"low must be at most high={high}, got {low}")
        self.low, self.high = low, high
        self.gap, self.closing = int(at_least("gap", gap, 0)), int(at_least("closing", closing, 0))
        self.min_size = int(at_least("min_size", min_size, 0))

    def edges(self, image: Image) -> Mask:
        """The closed edges that bound the regions, [H, W]."""
        found = find_edges(image, self.detector, sigma=self.sigma, low=self.low, high=self.high)
        return closed(found, self.gap, self.closing)

    def regions(self, image: Image) -> Map:
        edges = self.edges(image)
        parts = measure.label(~edges, connectivity=1)
        if parts.max() == 0:  # edges all over
            return np.zeros(parts.shape, np.int64)
        # An edge's pixels go to the nearer side.
        parts = segmentation.watershed(ndimage.distance_transform_edt(edges), parts)
        return merge_small(parts - 1, image, self.min_size)


class Sobel(EdgeRegions):
    """Regions between edges of Sobel's operator (1968), with hysteresis, linking and closing.

    The gradient (Gx, Gy) = (1 2 1)^T (-1 0 1) / 4 and its transpose has the magnitude
    sqrt((Gx^2 + Gy^2) / 2), the largest of the channels. Edges are what is above ``high``, and
    above ``low`` connected with it, thinned; gaps are linked, then closed; edge pixels go to the
    nearest region.

    Args:
        sigma: of the Gaussian before, in pixels; 0 = none.
        low: magnitude in 0..1; None = half of ``high``.
        high: None = Otsu's threshold of the magnitudes.
        gap: longest gap in pixels between ends of edges that are linked; 0 = none.
        closing: radius in pixels of the morphological closing after it; 0 = none.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
    """

    detector = "sobel"


class Prewitt(EdgeRegions):
    """Regions between edges of Prewitt's operator (1970): `Sobel` with (1 1 1)^T (-1 0 1) / 3.

    Args:
        sigma: of the Gaussian before, in pixels; 0 = none.
        low: magnitude in 0..1; None = half of ``high``.
        high: None = Otsu's threshold of the magnitudes.
        gap: longest gap in pixels between ends of edges that are linked; 0 = none.
        closing: radius in pixels of the morphological closing after it; 0 = none.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
    """

    detector = "prewitt"


class LaplacianOfGaussian(EdgeRegions):
    """Regions between zero crossings of the Laplacian of Gaussian (Marr and Hildreth, 1980).

    Args:
        sigma: of the Gaussian, in pixels.
        high: the least step across the sign change, as a share of the largest in the image; None =
            0.1.
        gap: longest gap in pixels between ends of edges that are linked; 0 = none.
        closing: radius in pixels of the morphological closing after it; 0 = none.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
    """

    detector = "log"

    def __init__(
        self,
        *,
        sigma: float = 2.0,
        high: float | None = None,
        gap: int = 8,
        closing: int = 1,
        min_size: int = 50,
    ) -> None:
        super().__init__(sigma=sigma, high=high, gap=gap, closing=closing, min_size=min_size)


class Canny(EdgeRegions):
    """Regions between edges of Canny's detector (1986), with linking and closing.

    On the luma: Gaussian, gradient, suppression of what is no maximum across the edge, hysteresis.

    Args:
        sigma: of the Gaussian, in pixels.
        low: magnitude of Sobel's gradient in 0..1; None = half of ``high``.
        high: None = Otsu's threshold of the magnitudes.
        gap: longest gap in pixels between ends of edges that are linked; 0 = none.
        closing: radius in pixels of the morphological closing after it; 0 = none.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
    """

    detector = "canny"


class EdgeFill(TwoClassModel):
    """Objects: what closed edges enclose, with the edges themselves.

    Edges are found, linked and closed as by `Canny`, holes are filled, and what is thin, edges that
    enclose nothing, is removed by an opening.

    Args:
        detector: ``"canny"``, ``"sobel"``, ``"prewitt"`` or ``"log"``.
        sigma: of the Gaussian, in pixels.
        low: as of `Canny`; not of ``"log"``.
        high: as of `Canny`; of ``"log"`` as of `LaplacianOfGaussian`.
        gap: longest gap in pixels between ends of edges that are linked; 0 = none.
        closing: radius in pixels of the morphological closing after it; 0 = none.
        min_size: objects of fewer pixels are removed.
    """

    def __init__(
        self,
        *,
        detector: Detector = "canny",
        sigma: float = 1.5,
        low: float | None = None,
        high: float | None = None,
        gap: int = 8,
        closing: int = 2,
        min_size: int = 50,
    ) -> None:
        self.detector = one_of("detector", detector, DETECTORS)
        kind = {"canny": Canny, "sobel": Sobel, "prewitt": Prewitt, "log": LaplacianOfGaussian}
        options = {"sigma": sigma, "high": high, "gap": gap, "closing": closing}
        if detector != "log":
            options["low"] = low
        elif low is not None:
            raise ValueError(f"low is no option of detector='log', got {low}")
        self.edges = kind[detector](**options, min_size=min_size)

    def foreground(self, image: Image) -> Mask:
        filled = ndimage.binary_fill_holes(self.edges.edges(image))
        solid = ndimage.binary_opening(filled, morphology.disk(1))
        parts, _ = ndimage.label(solid)
        area = np.bincount(parts.ravel())
        area[0] = 0
        return (area >= max(self.edges.min_size, 1))[parts]
