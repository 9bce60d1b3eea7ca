"""One mask of several: majority, and STAPLE (Warfield, Zou, Wells, IEEE TMI 2004) in three forms.

All take masks or label maps of one object or image, [K, H, W] of K annotators.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyseg.errors import LabelError

ITERATIONS = 200  # of EM, at most
TOLERANCE = 1e-8  # change of the parameters at which it has converged
_START = 0.99999  # sensitivity and specificity to begin with, as in the paper's experiments
_EPSILON = 1e-12


@dataclass(frozen=True, eq=False)
class Staple:
    """What STAPLE has found."""

    probability: np.ndarray  # [H, W] that a pixel is of the object; 0 outside the region
    sensitivity: np.ndarray  # [K] p: of the object's pixels the share that an annotator has drawn
    specificity: np.ndarray  # [K] q: of the others the share that he has left out
    iterations: int

    @property
    def mask(self) -> np.ndarray:
        """[H, W] bool: more likely of the object than not."""
        found: np.ndarray = self.probability > 0.5
        return found


def majority(masks: np.ndarray) -> np.ndarray:
    """Pixels that more than half of the annotators have, [H, W] bool; ties are out.

    Raises:
        LabelError: ``masks`` is not [K, H, W] bool with K of 1 or more.
    """
    masks = _masks(masks)
    result: np.ndarray = 2 * masks.sum(0) > len(masks)
    return result


def bounding_region(masks: np.ndarray, margin: float = 0.1) -> np.ndarray:
    """The box of all masks together and a margin around it, [H, W] bool.

    STAPLE's specificity is a share of the background: far background, on which all agree, makes it
    1 for everybody, and bad annotators look good.

    Args:
        masks: [K, H, W] bool.
        margin: of the box's longer side, at least one pixel.
    """
    union = _masks(masks).any(0)
    region = np.zeros(union.shape, bool)
    rows, columns = np.flatnonzero(union.any(1)), np.flatnonzero(union.any(0))
    if rows.size:
        more = max(1, round(margin * max(rows[-1] - rows[0], columns[-1] - columns[0])))
        region[
            max(0, rows[0] - more) : rows[-1] + 1 + more,
            max(0, columns[0] - more) : columns[-1] + 1 + more,
        ] = True
    return region


def staple(
    masks: np.ndarray,
    region: np.ndarray | None = None,
    *,
    prior: float | None = None,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
) -> Staple:
    """Binary STAPLE: annotators' sensitivity and specificity, and the mask, by EM.

    With d_k what annotator k says of a pixel and prior π, an E step is
    W = π Π p^d (1-p)^(1-d) / (π Π p^d (1-p)^(1-d) + (1-π) Π (1-q)^d q^(1-d)), an M step
    p = ΣWd/ΣW, q = Σ(1-W)(1-d)/Σ(1-W). Pixels with equal votes are computed once.

    Args:
        masks: [K, H, W] bool.
        region: [H, W] bool, the pixels that count; None = all. See `bounding_region`.
        prior: π; None = the mean share of the object in the masks.
        iterations: at most.
        tolerance: largest change of p and q at which it ends.

    Raises:
        LabelError: masks or region of a wrong shape or kind.

    Example:
        >>> result = staple(masks, bounding_region(masks))
        >>> result.mask, result.sensitivity
    """
    masks = _masks(masks)
    inside = _region(region, masks)
    votes, place, n = _patterns(masks[:, inside])
    d = votes.astype(np.float64)  # [patterns, K]
    pi = (n @ d).mean() / max(n.sum(), 1) if prior is None else prior
    p = np.full(len(masks), _START)
    q = np.full(len(masks), _START)
    w = np.full(len(d), float(pi))
    steps = 0
    # Nobody may have drawn anything, or all may have drawn everything.
    while steps < iterations and 0 < pi < 1:
        steps += 1
        yes = d @ _log(p) + (1 - d) @ _log(1 - p)
        no = d @ _log(1 - q) + (1 - d) @ _log(q)
        w = _posterior(yes, no, pi)
        new_p = (n * w) @ d / max((n * w).sum(), _EPSILON)
        new_q = (n * (1 - w)) @ (1 - d) / max((n * (1 - w)).sum(), _EPSILON)
        change = max(np.abs(new_p - p).max(), np.abs(new_q - q).max())
        p, q = new_p, new_q
        if change < tolerance:
            break
    probability = np.zeros(masks.shape[1:])
    probability[inside] = w[place]
    return Staple(probability, p, q, steps)


def local_staple(
    masks: np.ndarray,
    region: np.ndarray | None = None,
    *,
    radius: float = 8.0,
    strength: float = 10.0,
    iterations: int = 10,
) -> Staple:
    """STAPLE whose annotators are better in one place than in another.

    Sensitivity and specificity are estimated around every pixel, with a Gaussian window, and drawn
    towards those of `staple` as by so many pixels of evidence: a MAP estimate in the manner of
    Commowick, Akhondi-Asl, Warfield (IEEE TMI 2012). One who has cut off an arm of the object loses
    weight at that arm alone.

    Args:
        masks: [K, H, W] bool.
        region: as of `staple`.
        radius: standard deviation of the window, in pixels; infinite gives `staple`.
        strength: pixels that the global estimate counts.
        iterations: of EM.

    Returns:
        Of sensitivity and specificity the means over the region.

    Raises:
        LabelError: as `staple`.
    """
    from scipy import ndimage

    masks = _masks(masks)
    whole = staple(masks, region)
    inside = _region(region, masks)
    pi = masks[:, inside].mean() if inside.any() else 0.0
    if not 0 < pi < 1 or not np.isfinite(radius):
        return whole
    if radius <= 0 or strength <= 0:
        raise LabelError(f"radius and strength must be above 0, got {radius} and {strength}")
    weight = 2 * np.pi * radius**2  # of a window, in pixels

    def around(values: np.ndarray) -> np.ndarray:
        return weight * ndimage.gaussian_filter(values, radius, mode="constant")

    d = masks.astype(np.float64)
    w = whole.probability
    start_p, start_q = whole.sensitivity[:, None, None], whole.specificity[:, None, None]
    p, q = np.broadcast_to(start_p, d.shape), np.broadcast_to(start_q, d.shape)
    steps = 0
    while steps < iterations:
        steps += 1
        object_, rest = around(w * inside), around((1 - w) * inside)
        p = np.stack([around(w * inside * mask) for mask in d]) + strength * start_p
        p = p / (object_ + strength)
        q = np.stack([around((1 - w) * inside * (1 - mask)) for mask in d]) + strength * start_q
        q = q / (rest + strength)
        yes = (d * _log(p) + (1 - d) * _log(1 - p)).sum(0)
        no = (d * _log(1 - q) + (1 - d) * _log(q)).sum(0)
        new = np.where(inside, _posterior(yes, no, pi), 0.0)
        change = np.abs(new - w).max()
        w = new
        if change < 1e-6:
            break
    return Staple(w, p[:, inside].mean(1), q[:, inside].mean(1), steps)


@dataclass(frozen=True, eq=False)
class MultiStaple:
    """What STAPLE has found of label maps."""

    probability: np.ndarray  # [C, H, W]; 0 outside the region
    confusion: np.ndarray  # [K, C, C]: of pixels of class i the share that annotator k calls j
    iterations: int

    @property
    def labels(self) -> np.ndarray:
        """[H, W] uint8: the likeliest class, 255 outside the region."""
        found = self.probability.argmax(0).astype(np.uint8)
        found[self.probability.sum(0) == 0] = 255
        return found


def staple_labels(
    maps: np.ndarray,
    num_classes: int,
    region: np.ndarray | None = None,
    *,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
) -> MultiStaple:
    """STAPLE of label maps: a confusion matrix for each annotator (section II-D of the paper).

    Pixels where an annotator says nothing (255) count for the others.

    Args:
        maps: [K, H, W] integers, class indices and 255.
        num_classes: C.
        region: as of `staple`.
        iterations: at most.
        tolerance: largest change of the matrices at which it ends.

    Raises:
        LabelError: maps of a wrong shape, or values that are no class.
    """
    maps = np.asarray(maps)
    if maps.ndim != 3 or not len(maps) or maps.dtype.kind not in "iu":
        raise LabelError(f"maps must be [K, H, W] integers, got {maps.dtype} {list(maps.shape)}")
    if not 2 <= num_classes <= 255:
        raise LabelError(f"num_classes must be 2 to 255, got {num_classes}")
    maps = maps.astype(np.int64)
    silent = maps == 255
    if bad := np.setdiff1d(maps[~silent], np.arange(num_classes)).tolist():
        raise LabelError(f"maps hold the values {bad[:8]}, which are no class of {num_classes}")
    inside = _region(region, maps)
    votes, place, n = _patterns(maps[:, inside])
    # [patterns, K, C], a row of zeros where nothing is said
    said = (votes[..., None] == np.arange(num_classes)).astype(np.float64)
    prior = np.einsum("m,mkc->c", n, said)
    prior /= max(prior.sum(), _EPSILON)
    off = (1 - _START) / (num_classes - 1)
    theta = np.full((len(maps), num_classes, num_classes), off)
    theta[:, range(num_classes), range(num_classes)] = _START
    w = np.zeros((len(votes), num_classes))
    steps = 0
    while steps < iterations:
        steps += 1
        logits = np.einsum("mkj,kij->mi", said, _log(theta)) + _log(prior)
        logits -= logits.max(1, keepdims=True)
        w = np.exp(logits)
        w /= w.sum(1, keepdims=True)
        new = np.einsum("m,mi,mkj->kij", n, w, said)
        total = new.sum(2, keepdims=True)
        new = np.where(total > _EPSILON, new / np.maximum(total, _EPSILON), theta)
        change = np.abs(new - theta).max(initial=0.0)
        theta = new
        if change < tolerance:
            break
    probability = np.zeros((num_classes, *maps.shape[1:]))
    probability[:, inside] = w[place].T
    return MultiStaple(probability, theta, steps)


def _patterns(votes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of votes [K, N] those that differ [M, K], which each pixel has [N], how many have it [M]."""
    place = np.zeros(votes.shape[1], np.int64)
    for vote in votes.astype(np.int64):
        # Renumbered at every step, so that the codes of many annotators do not overflow.
        _, place = np.unique(place * 256 + vote, return_inverse=True)
    _, first, n = np.unique(place, return_index=True, return_counts=True)
    return votes[:, first].T, place, n.astype(np.float64)


def _posterior(yes: np.ndarray, no: np.ndarray, pi: float) -> np.ndarray:
    """Of log likelihoods."""
    return 1 / (1 + np.exp(np.clip(no + np.log1p(-pi) - yes - np.log(pi), -700, 700)))


def _log(values: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(values, 1e-300))


def _masks(masks: np.ndarray) -> np.ndarray:
    masks = np.asarray(masks)
    if masks.ndim != 3 or not len(masks) or masks.dtype != np.bool_:
        raise LabelError(
            f"masks must be [K, H, W] bool, of one annotator at least, got {masks.dtype} "
            f"{list(masks.shape)}; stack them, and compare: labels == 3"
        )
    return masks


def _region(region: np.ndarray | None, masks: np.ndarray) -> np.ndarray:
    if region is None:
        return np.ones(masks.shape[1:], bool)
    region = np.asarray(region)
    if region.dtype != np.bool_ or region.shape != masks.shape[1:]:
        raise LabelError(
            f"region must be bool {list(masks.shape[1:])} as the masks, got {region.dtype} "
            f"{list(region.shape)}"
        )
    return region
