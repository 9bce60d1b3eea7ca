"""Markov random fields: labels that fit the pixels and agree with their neighbours."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from skimage.color import rgb2lab

from .clusters import distinct, fitted_mixture, log_densities
from .maxflow import max_flow
from .regions import (
    Image,
    Map,
    RegionModel,
    at_least,
    check_pixels,
    connected,
    merge_small,
    one_of,
)

EXPANSION_PIXELS = 16_000_000  # 100 bytes of graph for each


class Grid:
    """The pairs of 4-neighbours of an image and what it costs each that its labels differ.

    Args:
        image: [H, W, D].
        beta: cost of a pair of equal pixels.
        contrast: pairs cost beta exp(-|x - y|^2 / (2 s)), with the mean s of |x - y|^2; else beta.
    """

    def __init__(self, image: NDArray[np.floating], beta: float, contrast: bool) -> None:
        height, width = image.shape[:2]
        number = np.arange(height * width).reshape(height, width)
        one = np.concatenate([number[:, :-1].ravel(), number[:-1].ravel()])
        other = np.concatenate([number[:, 1:].ravel(), number[1:].ravel()])
        self.pairs = np.stack([one, other], 1)
        self.parity = np.add.outer(np.arange(height), np.arange(width)).ravel() % 2
        flat = image.reshape(height * width, -1)
        step = np.square(flat[one] - flat[other]).sum(1)
        mean = float(step.mean()) if len(step) else 0.0
        self.cost = np.full(len(one), float(beta))
        if contrast and mean > 0:
            self.cost *= np.exp(-step / (2 * mean))

    def energy(self, unary: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
        """Sum of ``unary`` [N, K] at the labels [N], and of the pairs whose labels differ."""
        own = unary[np.arange(len(labels)), labels].sum()
        one, other = self.pairs.T
        return float(own + self.cost[labels[one] != labels[other]].sum())


def icm(
    unary: NDArray[np.float64], grid: Grid, labels: NDArray[np.int64], *, rounds: int = 50
) -> NDArray[np.int64]:
    """Iterated conditional modes (Besag, 1986): each pixel takes the label that costs least.

    Pixels of one colour of a chessboard are no neighbours and change at once, so the energy never
    grows. It ends in a local minimum or after ``rounds``.

    Args:
        unary: cost of every label, [N, K].
        grid: of the N pixels.
        labels: to begin with, [N].
    """
    labels = labels.copy()
    one, other = grid.pairs.T
    count = unary.shape[1]
    for _ in range(rounds):
        before = labels.copy()
        for parity in (0, 1):
            # What the neighbours' labels save: agreeing costs nothing.
            agreed = np.zeros(unary.size)
            for here, there in ((one, other), (other, one)):
                places = here * count + labels[there]
                agreed += np.bincount(places, grid.cost, minlength=unary.size)
            total = unary - agreed.reshape(unary.shape)
            best = total.argmin(1)
            now = total[np.arange(len(labels)), labels]
            better = total.min(1) < now - 1e-12
            change = better & (grid.parity == parity)
            labels[change] = best[change]
        if (labels == before).all():
            break
    return labels


def expansion(
    unary: NDArray[np.float64], grid: Grid, labels: NDArray[np.int64], *, rounds: int = 10
) -> NDArray[np.int64]:
    """Alpha-expansion (Boykov, Veksler and Zabih, 2001): minimum cuts decide who takes label alpha.

    The result costs at most twice the minimum with this Potts energy, and with two labels it is
    the minimum. The cuts are built without auxiliary nodes, as by Kolmogorov and Zabih (2004).

    Args:
        unary: cost of every label, [N, K].
        grid: of the N pixels.
        labels: to begin with, [N].
        rounds: over all labels, at most; it ends where a round gains nothing.
    """
    labels = labels.copy()
    energy = grid.energy(unary, labels)
    for _ in range(rounds):
        before = energy
        for alpha in range(unary.shape[1]):
            proposed = np.where(_expands(unary, grid, labels, alpha), alpha, labels)
            cost = grid.energy(unary, proposed)
            if cost < energy:
                labels, energy = proposed, cost
        if energy >= before - 1e-9 * abs(before):
            break
    return labels


def _expands(
    unary: NDArray[np.float64], grid: Grid, labels: NDArray[np.int64], alpha: int
) -> NDArray[np.bool_]:
    """Which pixels take label ``alpha`` in the best expansion, [N]."""
    everyone = np.arange(len(labels))
    one, other = grid.pairs.T
    differ = grid.cost * (labels[one] != labels[other])  # both keep their labels
    first_keeps = grid.cost * (labels[one] != alpha)
    other_keeps = grid.cost * (labels[other] != alpha)
    # With x = 1 for alpha a pair costs differ + (other_keeps - differ) x_one - other_keeps x_other
    # + (first_keeps + other_keeps - differ) (1 - x_one) x_other, the last factor not negative.
    gain = unary[:, alpha] - unary[everyone, labels]
    gain = gain + np.bincount(one, other_keeps - differ, minlength=len(labels))
    gain = gain - np.bincount(other, other_keeps, minlength=len(labels))
    capacity = np.maximum(first_keeps + other_keeps - differ, 0)
    # The sink's side takes alpha: it pays the arcs from the source, and those from `one` to it.
    _, kept = max_flow(
        np.maximum(gain, 0),
        np.maximum(-gain, 0),
        grid.pairs,
        capacity,
        np.zeros_like(capacity),
    )
    return ~kept


class MRF(RegionModel):
    """Labels of least energy: sum of -log p(pixel | label) + beta times the pairs that disagree.

    The densities of the labels are the Gaussians of a mixture, fitted to the colours in CIELAB;
    pairs are those of 4-neighbours (Geman and Geman, 1984).

    Args:
        k: labels, as many as there are different colours where these are fewer.
        beta: cost of a pair of neighbours with different labels, in nats.
        contrast: across edges of the image it costs less.
        method: ``"expansion"`` by minimum cuts, or ``"icm"``.
        whole: a label is one region wherever it lies, not as many as it has connected parts.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
        seed: of the mixture.

    Raises:
        ValueError: in predicting by expansion, an image of more than 16 million pixels.
    """

    def __init__(
        self,
        *,
        k: int = 5,
        beta: float = 3.0,
        contrast: bool = True,
        method: Literal["expansion", "icm"] = "expansion",
        whole: bool = False,
        min_size: int = 50,
        seed: int = 0,
    ) -> None:
        self.k, self.beta = int(at_least("k", k, 1)), at_least("beta", beta, 0)
        self.contrast, self.whole, self.seed = contrast, whole, int(at_least("seed", seed, 0))
        self.method = one_of("method", method, ("expansion", "icm"))
        self.min_size = int(at_least("min_size", min_size, 0))

    def regions(self, image: Image) -> Map:
        if self.method == "expansion":
            remedy = "shrink it, or choose method='icm'"
            check_pixels("mrf", image, EXPANSION_PIXELS, remedy)
        lab = rgb2lab(image)
        flat = lab.reshape(-1, 3)
        k = min(self.k, distinct(flat, self.k))
        if k == 1:
            return np.zeros(image.shape[:2], np.int64)
        mixture = fitted_mixture(flat, k, seed=self.seed)
        unary = -log_densities(mixture, flat)
        grid = Grid(lab, self.beta, self.contrast)
        solve = expansion if self.method == "expansion" else icm
        labels = solve(unary, grid, unary.argmin(1)).reshape(image.shape[:2])
        return labels if self.whole else merge_small(connected(labels), image, self.min_size)
