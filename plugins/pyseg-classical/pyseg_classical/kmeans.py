"""k-means by Lloyd's iterations (1982), compiled."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from . import _core


class KMeansResult(NamedTuple):
    """Clusters of N elements with D features."""

    labels: NDArray[np.int32]  # [N] the nearest centre, of equals the first
    centres: NDArray[np.float64]  # [K, D]
    inertia: float  # sum of the squared distances to them
    iterations: int


def kmeans(
    features: NDArray[Any],
    k: int,
    *,
    init: Literal["k-means++", "random"] | NDArray[Any] = "k-means++",
    seed: int = 0,
    iterations: int = 300,
    tolerance: float = 1e-4,
) -> KMeansResult:
    """Divides elements into k clusters around their means.

    It gives what scikit-learn's ``KMeans(algorithm="lloyd", n_init=1)`` gives from the same
    centres, up to rounding, the number of iterations included; bounds on distances (Hamerly, SDM
    2010) spare most of the work. The threads are torch's, and their number changes no bit.

    Args:
        features: [N, D].
        k: clusters, at most N. Where fewer elements differ, the clusters left over are empty.
        init: the first centres: [K, D], or drawn from the elements, ``"random"`` or
            ``"k-means++"``: each next one with a probability that grows with the square of its
            distance from those before (Arthur and Vassilvitskii, 2007).
        seed: of the draw.
        iterations: at most.
        tolerance: it ends where the centres move by less than this share of the features' mean
            variance, squared distances added up; and where no element changes its cluster.

    Raises:
        ValueError: features that are not [N, D] and finite, k that is not from 1 to N, or an
            ``init`` that does not fit.

    Example:
        >>> kmeans(np.array([[0.0], [1.0], [9.0]]), 2).labels
        array([1, 1, 0], dtype=int32)
    """
    values = np.ascontiguousarray(features, np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"features must be [N, D] with N, D > 0, got {list(values.shape)}")
    if not np.isfinite(values).all():
        row = int((~np.isfinite(values).all(1)).argmax())
        raise ValueError(
            f"features must be finite, but element {row} holds NaN or infinity; remove such "
            "elements or fill them in"
        )
    if not 1 <= k <= len(values):
        raise ValueError(f"k must be from 1 to the number of elements, {len(values)}, got {k}")
    if iterations < 1 or not tolerance >= 0:
        raise ValueError(
            f"iterations must be 1 or more and tolerance 0 or more, got {iterations} and "
            f"{tolerance}"
        )
    threads = torch.get_num_threads()
    if isinstance(init, str):
        centres = _drawn(values, k, init, seed, threads)
    else:
        centres = np.ascontiguousarray(init, np.float64)
        if centres.shape != (k, values.shape[1]) or not np.isfinite(centres).all():
            raise ValueError(
                f"init must be finite centres {[k, values.shape[1]]}, got {list(centres.shape)}"
            )
    return KMeansResult(*_core.lloyd(values, centres, iterations, tolerance, threads))


def _drawn(
    values: NDArray[np.float64], k: int, init: str, seed: int, threads: int
) -> NDArray[np.float64]:
    draw = np.random.default_rng(seed)
    if init == "random":
        return values[draw.choice(len(values), k, replace=False)]
    if init != "k-means++":
        raise ValueError(f"init must be 'k-means++', 'random' or centres [K, D], got {init!r}")
    chosen = [int(draw.integers(len(values)))]
    distance = np.full(len(values), np.inf)
    while len(chosen) < k:
        _core.lower_to(values, values[chosen[-1]], distance, threads)
        steps = distance.cumsum()
        if steps[-1] > 0:
            place = int(np.searchsorted(steps, draw.random() * steps[-1], side="right"))
            chosen.append(min(place, len(values) - 1))
        else:  # all elements are centres already
            chosen.append(int(draw.integers(len(values))))
    return values[chosen]


__all__ = ["KMeansResult", "kmeans"]
