"""Hough transforms: lines and circles, found by votes of edges, as the structure of an image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage import transform

from .edges import find_edges
from .regions import Image, Map, RegionModel, at_least, within


def find_lines(
    edges: NDArray[np.bool_], *, count: int, votes: float = 0.3, separation: int = 10
) -> NDArray[np.float64]:
    """The straight lines x cos a + y sin a = r on which most edge pixels lie (Duda and Hart, 1972).

    Args:
        edges: [H, W].
        count: the most lines that are returned.
        votes: least share of the votes of the strongest line.
        separation: least distance between two lines, in pixels of r and in degrees of a.

    Returns:
        [K, 2] angles a in radians, -pi/2 to pi/2, and distances r in pixels; strongest first.
    """
    angles = np.linspace(-np.pi / 2, np.pi / 2, 180, endpoint=False)
    table, angles, distances = transform.hough_line(edges, angles)
    if table.max() == 0:
        return np.zeros((0, 2))
    _, found, where = transform.hough_line_peaks(
        table,
        angles,
        distances,
        min_distance=separation,
        min_angle=separation,
        threshold=votes * table.max(),
        num_peaks=count,
    )
    return np.stack([found, where], 1)


def find_circles(
    edges: NDArray[np.bool_],
    *,
    min_radius: int,
    max_radius: int,
    count: int,
    votes: float = 0.4,
    step: int = 1,
) -> NDArray[np.float64]:
    """The circles on which the largest share of their perimeter is edges.

    Circles whose centre lies in a stronger one are left out.

    Args:
        edges: [H, W].
        min_radius: in pixels, at least 1.
        max_radius: at least ``min_radius``.
        count: the most circles that are returned.
        votes: least share of the perimeter that must be edges, 0..1.
        step: between the radii that are tried.

    Returns:
        [K, 4]: centre y and x, radius, and that share; best first.
    """
    if not edges.any():
        return np.zeros((0, 4))
    radii = np.arange(min_radius, max_radius + 1, step)
    shares = transform.hough_circle(edges, radii)  # [R, H, W], votes over the perimeter
    places = np.argwhere(shares >= votes)
    strength = shares[tuple(places.T)]
    order = np.lexsort((places[:, 2], places[:, 1], places[:, 0], -strength))
    free = np.ones(edges.shape, bool)
    rows, columns = np.ogrid[: edges.shape[0], : edges.shape[1]]
    found: list[tuple[float, float, float, float]] = []
    for index in order:
        k, y, x = places[index]
        if not free[y, x]:
            continue
        found.append((y, x, radii[k], strength[index]))
        if len(found) == count:
            break
        free &= (rows - y) ** 2 + (columns - x) ** 2 > radii[k] ** 2
    return np.array(found, float).reshape(-1, 4)


class HoughLines(RegionModel):
    """The convex parts into which the straight lines of an image divide it.

    Args:
        count: the most lines.
        votes: least share of the votes of the strongest line, 0..1.
        separation: least distance between two lines, in pixels and in degrees.
        sigma: of Canny's Gaussian, in pixels.
    """

    def __init__(
        self, *, count: int = 8, votes: float = 0.3, separation: int = 10, sigma: float = 2.0
    ) -> None:
        self.count = int(within("count", count, 1, 60))
        self.votes = within("votes", votes, 0, 1)
        self.separation = int(at_least("separation", separation, 1))
        self.sigma = at_least("sigma", sigma, 0.1)

    def lines(self, image: Image) -> NDArray[np.float64]:
        """See `find_lines`."""
        edges = find_edges(image, "canny", sigma=self.sigma, low=None, high=None)
        return find_lines(edges, count=self.count, votes=self.votes, separation=self.separation)

    def regions(self, image: Image) -> Map:
        height, width = image.shape[:2]
        rows, columns = np.ogrid[:height, :width]
        side = np.zeros((height, width), np.int64)
        for k, (angle, distance) in enumerate(self.lines(image)):
            beyond = columns * np.cos(angle) + rows * np.sin(angle) > distance
            side |= beyond.astype(np.int64) << k
        return side


class HoughCircles(RegionModel):
    """Discs that an image shows: each is a region, and what is in none is void.

    Where discs overlap the one with more votes is on top.

    Args:
        min_radius: in pixels.
        max_radius: in pixels.
        count: the most circles.
        votes: least share of a circle's perimeter that must be edges, 0..1.
        sigma: of Canny's Gaussian, in pixels.

    Raises:
        ValueError: ``max_radius`` is below ``min_radius``; in predicting, votes for so many radii
            would need more than 2 GiB.
    """

    def __init__(
        self,
        *,
        min_radius: int = 10,
        max_radius: int = 40,
        count: int = 50,
        votes: float = 0.4,
        sigma: float = 2.0,
    ) -> None:
        self.min_radius = int(at_least("min_radius", min_radius, 1))
        self.max_radius = int(at_least("max_radius", max_radius, min_radius))
        self.count = int(at_least("count", count, 1))
        self.votes, self.sigma = within("votes", votes, 0, 1), at_least("sigma", sigma, 0.1)

    def circles(self, image: Image) -> NDArray[np.float64]:
        """See `find_circles`."""
        radii = self.max_radius - self.min_radius + 1
        needed = radii * image.shape[0] * image.shape[1] * 8
        if needed > 2**31:
            raise ValueError(
                f"hough_circles: votes for {radii} radii on {image.shape[0]} x {image.shape[1]} "
                f"pixels take {needed / 2**30:.1f} GiB, more than 2; narrow min_radius to "
                "max_radius, or shrink the image"
            )
        edges = find_edges(image, "canny", sigma=self.sigma, low=None, high=None)
        return find_circles(
            edges,
            min_radius=self.min_radius,
            max_radius=self.max_radius,
            count=self.count,
            votes=self.votes,
        )

    def regions(self, image: Image) -> Map:
        height, width = image.shape[:2]
        rows, columns = np.ogrid[:height, :width]
        found = np.full((height, width), -1, np.int64)
        circles = self.circles(image)
        for k in reversed(range(len(circles))):
            y, x, radius, _ = circles[k]
            found[(rows - y) ** 2 + (columns - x) ** 2 <= radius**2] = k
        return found
