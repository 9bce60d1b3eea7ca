"""Foreground by minimum cuts: GrabCut; and the random walker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from skimage import segmentation
from skimage.color import rgb2lab

from .kmeans import kmeans
from .maxflow import grid_max_flow
from .regions import (
    Image,
    Map,
    Mask,
    RegionModel,
    TwoClassModel,
    at_least,
    connected,
    merge_small,
    within,
)
from .trees import smoothed

BACKGROUND, FOREGROUND, UNKNOWN = 0, 1, 2
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))  # the links of grid_max_flow, (down, right)


class _Mixture:
    """Gaussians with full covariances; each element belongs to one of them."""

    def __init__(self, values: NDArray[np.float64], owner: NDArray[Any], count: int) -> None:
        parts = []
        for number in range(count):
            own = values[owner == number]
            if len(own):
                parts.append((own.mean(0), np.cov(own.T, bias=True) + 0.01 * np.eye(3), len(own)))
        self.means = np.stack([mean for mean, _, _ in parts])
        self.inverses = np.stack([np.linalg.inv(covariance) for _, covariance, _ in parts])
        shares = np.array([number for *_, number in parts]) / len(values)
        spread = np.array([np.linalg.slogdet(covariance)[1] for _, covariance, _ in parts])
        self.constants = 0.5 * spread - np.log(shares)

    def costs(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """-log of share times density, up to a constant, [N, K]."""
        found = []
        for mean, inverse, constant in zip(self.means, self.inverses, self.constants, strict=True):
            gap = values - mean
            found.append(constant + 0.5 * np.einsum("nd,nd->n", gap @ inverse, gap))
        return np.stack(found, 1)


def grab_cut(
    image: Image,
    marks: NDArray[Any],
    *,
    iterations: int = 5,
    components: int = 5,
    gamma: float = 50.0,
    seed: int = 0,
) -> Mask:
    """Foreground from rough marks (Rother, Kolmogorov and Blake, SIGGRAPH 2004).

    In turns, Gaussians are fitted to the colours of foreground and background, and the minimum cut
    of the image's graph with 8 neighbours is taken.

    Args:
        image: [H, W, 3] uint8 RGB.
        marks: [H, W]: 0 = background for certain, 1 = foreground for certain, 2 = unknown, which
            begins as foreground.
        iterations: at most; it ends where nothing changes.
        components: Gaussians of either.
        gamma: cost of an edge between equal colours.
        seed: of the first k-means.

    Returns:
        The foreground, [H, W].

    Raises:
        ValueError: marks of other values or another size; or nothing marked as background, or
            nothing left for the foreground.
    """
    given = np.asarray(marks)
    if given.shape != image.shape[:2] or not np.isin(given, (0, 1, 2)).all():
        raise ValueError(
            f"marks must be {list(image.shape[:2])} of 0 = background, 1 = foreground and 2 = "
            f"unknown, got {list(given.shape)} with {np.unique(given)[:10].tolist()}"
        )
    if not (given == BACKGROUND).any():
        raise ValueError(
            "marks have no background (0): GrabCut learns its colours there; leave a margin around "
            "the object"
        )
    if not (given != BACKGROUND).any():
        raise ValueError("marks are background (0) everywhere: mark the object, or where it may be")
    at_least("iterations", iterations, 1)
    at_least("components", components, 1)
    at_least("gamma", gamma, 0)
    values = image.reshape(-1, 3).astype(np.float64)
    weights = _links(image.astype(np.float64), gamma)
    certain = 16 * gamma + 1  # more than all links of one pixel
    found = given != BACKGROUND
    owners: list[NDArray[Any]] = []
    for side in (~found.ravel(), found.ravel()):
        own = values[side]
        owners.append(kmeans(own, min(components, len(own)), seed=seed).labels)
    for _ in range(iterations):
        masks = (~found.ravel(), found.ravel())
        mixtures = [
            _Mixture(values[mask], owner, components)
            for mask, owner in zip(masks, owners, strict=True)
        ]
        behind, front = (mixture.costs(values) for mixture in mixtures)
        # What the foreground costs is cut from the sink's side, and the other way round.
        background, foreground = behind.min(1), front.min(1)
        least = np.minimum(background, foreground)
        source = (background - least).reshape(given.shape)
        sink = (foreground - least).reshape(given.shape)
        source[given == BACKGROUND], sink[given == BACKGROUND] = 0, certain
        source[given == FOREGROUND], sink[given == FOREGROUND] = certain, 0
        _, kept = grid_max_flow(source, sink, weights)
        if (kept == found).all() or not kept.any() or kept.all():
            return kept
        found = kept
        owners = [behind[~found.ravel()].argmin(1), front[found.ravel()].argmin(1)]
    return found


def _links(values: NDArray[np.float64], gamma: float) -> NDArray[np.float64]:
    """gamma / distance * exp(-beta |dI|^2) of the 4 links of `grid_max_flow`, [4, H, W]."""
    height, width = values.shape[:2]
    gaps = []
    for down, right in _SHIFTS:
        here = values[: height - down, max(0, -right) : width - max(0, right)]
        there = values[down:, max(0, right) : width - max(0, -right)]
        gaps.append(np.square(here - there).sum(2))
    pairs = sum(gap.size for gap in gaps)
    mean = sum(gap.sum() for gap in gaps) / max(pairs, 1)
    beta = 1 / (2 * mean) if mean > 0 else 0.0
    weights = np.zeros((4, height, width))
    for plane, (down, right), gap in zip(weights, _SHIFTS, gaps, strict=True):
        place = plane[: height - down, max(0, -right) : width - max(0, right)]
        place[:] = gamma / np.hypot(down, right) * np.exp(-beta * gap)
    return weights


class GrabCut(TwoClassModel):
    """The object in a box, by minimum cuts; see `grab_cut`.

    Args:
        box: (x0, y0, x1, y1) in pixels, x1 and y1 outside; outside of it is background. None = all
            but a ``margin``.
        margin: of the image's height and width that is background without a box, from 0 to 0.45;
            one pixel at least.
        iterations: at most.
        components: Gaussians of either side.
        gamma: cost of an edge between equal colours.
        seed: of the first k-means.

    Raises:
        ValueError: wrong options; in predicting, a box that leaves no background or no object.
    """

    def __init__(
        self,
        *,
        box: Sequence[int] | None = None,
        margin: float = 0.08,
        iterations: int = 5,
        components: int = 5,
        gamma: float = 50.0,
        seed: int = 0,
    ) -> None:
        if box is not None and len(box) != 4:
            raise ValueError(f"box must be (x0, y0, x1, y1), got {box!r}")
        self.box = None if box is None else tuple(int(edge) for edge in box)
        self.margin = within("margin", margin, 0, 0.45)
        self.options: dict[str, Any] = {
            "iterations": int(at_least("iterations", iterations, 1)),
            "components": int(at_least("components", components, 1)),
            "gamma": at_least("gamma", gamma, 0),
            "seed": int(at_least("seed", seed, 0)),
        }

    def foreground(self, image: Image) -> Mask:
        height, width = image.shape[:2]
        marks = np.zeros((height, width), np.uint8)
        if self.box is None:
            down, right = (max(1, round(self.margin * side)) for side in (height, width))
            if min(height - 2 * down, width - 2 * right) < 1:
                return np.zeros((height, width), bool)  # nothing is inside the margin
            marks[down : height - down, right : width - right] = UNKNOWN
        else:
            x0, y0, x1, y1 = self.box
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                raise ValueError(
                    f"box must be (x0, y0, x1, y1) inside the image of {height} x {width} with "
                    f"x0 < x1 and y0 < y1, got {self.box}"
                )
            marks[y0:y1, x0:x1] = UNKNOWN
        if not (image != image[:1, :1]).any():
            return np.zeros((height, width), bool)  # of one colour: there is no object to find
        return grab_cut(image, marks, **self.options)


class RandomWalker(RegionModel):
    """Every pixel to the seed that a random walk from it reaches first (Grady, PAMI 2006).

    Steps across differences of colour are unlikely, exp(-beta d^2). By scikit-image.

    Args:
        seeds: ((row, column, label from 1), …); () = found by k-means: of each of k colours the
            pixels nearest to its centre.
        k: colours, where seeds are found.
        core: share of a colour's pixels that are seeds.
        beta: see above.
        mode: of the solver: ``"cg_j"`` (conjugate gradients, little memory), ``"cg"``, or ``"bf"``
            (a factorisation, for small images).
        min_size: regions of fewer pixels join the neighbour nearest in colour.
        seed: of k-means.

    Raises:
        ValueError: wrong options; in predicting, a seed outside the image, or seeds of one label
            only.
    """

    def __init__(
        self,
        *,
        seeds: Sequence[tuple[int, int, int]] = (),
        k: int = 6,
        core: float = 0.3,
        beta: float = 300.0,
        mode: Literal["cg_j", "cg", "bf"] = "cg_j",
        min_size: int = 50,
        seed: int = 0,
    ) -> None:
        self.seeds = tuple(seeds)
        labels = {mark[2] for mark in self.seeds if len(mark) == 3}
        if self.seeds and (any(len(mark) != 3 for mark in self.seeds) or min(labels) < 1):
            raise ValueError(f"seeds must be ((row, column, label from 1), …), got {seeds!r}")
        if len(labels) == 1:
            raise ValueError(
                f"seeds must have two labels at least, for a walk to end at one or another, got "
                f"only {labels.pop()}"
            )
        self.k, self.core = int(at_least("k", k, 1)), within("core", core, 0.01, 1)
        self.beta, self.mode = at_least("beta", beta, 0), mode
        self.min_size = int(at_least("min_size", min_size, 0))
        self.seed = int(at_least("seed", seed, 0))

    def regions(self, image: Image) -> Map:
        marks = self._given(image.shape[:2]) if self.seeds else self._found(image)
        if len(np.unique(marks[marks > 0])) < 2 or (marks > 0).all():
            found = np.maximum(marks.astype(np.int64) - 1, 0)
        else:
            values = rgb2lab(image) / 100
            found = segmentation.random_walker(
                values, marks, beta=self.beta, mode=self.mode, tol=1e-3, channel_axis=2
            ).astype(np.int64)
        return merge_small(connected(found), image, self.min_size)

    def _given(self, shape: Sequence[int]) -> NDArray[np.int32]:
        marks = np.zeros(shape, np.int32)
        for row, column, label in self.seeds:
            if not (0 <= row < shape[0] and 0 <= column < shape[1]):
                raise ValueError(
                    f"seeds must be inside the image of {shape[0]} x {shape[1]}, got "
                    f"({row}, {column}); they are (row, column, label), counted from 0"
                )
            marks[row, column] = label
        return marks

    def _found(self, image: Image) -> NDArray[np.int32]:
        colours = rgb2lab(smoothed(image, 1.0) / 255).reshape(-1, 3)
        k = min(self.k, len(np.unique(image.reshape(-1, 3), axis=0)))
        found = kmeans(colours, k, seed=self.seed)
        distance = np.linalg.norm(colours - found.centres[found.labels], axis=1)
        marks = np.zeros(len(colours), np.int32)
        for number in range(k):
            own = np.flatnonzero(found.labels == number)
            if len(own):
                nearest = distance[own].argsort(kind="stable")[: max(1, int(self.core * len(own)))]
                marks[own[nearest]] = number + 1
        return marks.reshape(image.shape[:2])


__all__ = ["GrabCut", "RandomWalker", "grab_cut"]
