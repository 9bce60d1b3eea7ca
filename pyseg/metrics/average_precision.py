"""COCO's matching and average precision, of overlaps that are known, for all images at once.

As pycocotools has it (Lin et al. 2014): detections are matched greedily by score, each with the
free object of its class that it overlaps most, if that is at least the threshold; objects that are
crowds or of another size are taken only where no other is left, and then the detection does not
count. Precision is made monotone and sampled at 101 recalls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

AREAS = ("", "_small", "_medium", "_large")  # all, below 32^2, to 96^2, above
_RANGES = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU
_LEAST = np.minimum(THRESHOLDS, 1 - 1e-10)  # what pycocotools compares with
_RECALLS = np.linspace(0, 1, 101)
MOST = (1, 10, 100)  # detections of a class in an image


def ranked(
    image: np.ndarray, label: np.ndarray, score: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The detections that count, by image, class and falling score, and their places among these.

    Equal scores keep their order.
    """
    order = np.lexsort((-score, label, image))
    group = np.flatnonzero(
        np.concatenate([[True], np.diff(image[order]) != 0])[: len(order)]
        | np.concatenate([[True], np.diff(label[order]) != 0])[: len(order)]
    )
    sizes = np.diff(np.append(group, len(order)))
    place = np.arange(len(order)) - np.repeat(group, sizes)
    kept = place < MOST[-1]
    return order[kept], place[kept]


def same_class(
    detections: Sequence[np.ndarray], objects: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Every detection with every object of its image and class: their indices.

    Args:
        detections: image and label of each.
        objects: the same of the ground truth.
    """
    span = 1 + max(
        (int(side[1].max()) for side in (detections, objects) if len(side[1])), default=0
    )
    ours, theirs = (side[0].astype(np.int64) * span + side[1] for side in (detections, objects))
    order = theirs.argsort(kind="stable")
    low, high = (np.searchsorted(theirs[order], ours, side) for side in ("left", "right"))
    counts = high - low
    first = np.repeat(np.arange(len(ours)), counts)
    within = np.arange(len(first)) - np.repeat(counts.cumsum() - counts, counts)
    return first, order[low[first] + within]


@dataclass(frozen=True)
class Matches:
    """What became of detections and objects, at A areas and T thresholds."""

    matched: np.ndarray  # [D, A, T] bool
    ignored: np.ndarray  # [D, A, T] bool: of detections that do not count
    left_out: np.ndarray  # [G, A] bool: objects that do not count


def match(
    groups: np.ndarray,
    areas: np.ndarray,
    objects: tuple[np.ndarray, np.ndarray],
    pairs: tuple[np.ndarray, np.ndarray],
    overlaps: np.ndarray,
) -> Matches:
    """Matches detections with objects.

    Args:
        groups: [D] which detections are of the same image and class; in each they come one after
            the other, by falling score.
        areas: [D] of detections.
        objects: their areas [G], and whether they are crowds [G].
        pairs: detection and object, [P] each, of the same group.
        overlaps: [P] their IoU.
    """
    object_areas, crowd = objects
    low, high = _RANGES.T
    outside = (areas[:, None] < low) | (areas[:, None] > high)
    left_out = (object_areas[:, None] < low) | (object_areas[:, None] > high) | crowd[:, None]
    shape = len(_RANGES), len(THRESHOLDS)
    matched = np.zeros((len(areas), *shape), bool)
    ignored = np.zeros((len(areas), *shape), bool)
    taken = np.zeros((len(crowd), *shape), bool)

    near = np.flatnonzero(overlaps >= _LEAST[0])  # no other can match
    which, other, overlap = pairs[0][near], pairs[1][near], overlaps[near]
    order = np.lexsort((other, overlap, which))  # of equal overlaps pycocotools takes the last
    which, other, overlap = which[order], other[order], overlap[order]
    starts = np.flatnonzero(np.diff(which, prepend=-1))
    hopeful, sizes = which[starts], np.diff(np.append(starts, len(which)))
    merit = np.arange(len(which)) - np.repeat(starts, sizes)
    # One detection of every group at a time, the best first: groups do not disturb each other.
    first = np.flatnonzero(np.diff(groups[hopeful], prepend=-1))
    turn = np.arange(len(hopeful)) - np.repeat(first, np.diff(np.append(first, len(hopeful))))
    above = int(sizes.max(initial=0))  # what an object that counts has more than one that does not
    for number in range(int(turn.max(initial=-1)) + 1):
        now = np.flatnonzero(turn == number)
        places = np.repeat(starts[now], sizes[now])
        begins = np.cumsum(sizes[now]) - sizes[now]
        places += np.arange(len(places)) - np.repeat(begins, sizes[now])
        found = other[places]
        free = ~taken[found] | crowd[found][:, None, None]
        free &= overlap[places][:, None, None] >= _LEAST
        worth = merit[places][:, None] + np.where(left_out[found], 0, above)
        value = np.where(free, worth[:, :, None], -1)
        best = np.maximum.reduceat(value, begins, axis=0)
        matched[hopeful[now]] = best >= 0
        ignored[hopeful[now]] = (best >= 0) & (best < above)
        taken[found] |= free & (value == np.repeat(best, sizes[now], axis=0))
    ignored |= ~matched & outside[:, :, None]
    return Matches(matched, ignored, left_out)


@dataclass(frozen=True)
class Curves:
    """Of classes that have objects; nan of the others."""

    precision: np.ndarray  # [C, A, T, 101]
    recall: np.ndarray  # [C, A, len(MOST), T]


def accumulate(
    label: np.ndarray,
    score: np.ndarray,
    place: np.ndarray,
    object_label: np.ndarray,
    matches: Matches,
    times: tuple[np.ndarray, np.ndarray],
    num_classes: int,
) -> Curves:
    """Precision at every recall, and recall, of each class.

    Args:
        label, score, place: [D] of detections, by images: of equal scores the first counts first.
        object_label: [G].
        matches: of them.
        times: how often each detection and each object counts.
        num_classes: C.
    """
    shape = matches.matched.shape[1:]
    precision = np.full((num_classes, *shape, len(_RECALLS)), np.nan)
    recall = np.full((num_classes, shape[0], len(MOST), shape[1]), np.nan)
    counted = ~matches.left_out * times[1][:, None]
    order = np.lexsort((-score, label))
    ends = np.searchsorted(label[order], np.arange(num_classes + 1))
    for k in np.unique(object_label).tolist():
        objects = counted[object_label == k].sum(0)  # [A]
        some = objects > 0
        chosen = order[ends[k] : ends[k + 1]]
        weight = times[0][chosen][:, None, None]
        counts = ~matches.ignored[chosen] * weight
        right = counts * matches.matched[chosen]
        for m, most in enumerate(MOST):
            total = right[place[chosen] < most].sum(0)
            recall[k, some, m] = total[some] / objects[some, None]
        tp = right.cumsum(0)
        level = tp / (counts.cumsum(0) + np.spacing(1))
        level = np.maximum.accumulate(level[::-1], 0)[::-1]
        # Where each recall is reached first, of all areas and thresholds in one search, in which
        # each has its own range of integers.
        need = _needed(objects[some])  # [A, R]
        apart = 1 + int(max(need.max(initial=0), tp.max(initial=0)))
        columns = np.arange(len(need) * shape[1]).reshape(len(need), shape[1], 1)  # [A, T, 1]
        found = (tp[:, some].transpose(1, 2, 0) + columns * apart).ravel()
        at = np.searchsorted(found, need[:, None] + columns * apart) - columns * len(chosen)
        values = np.zeros((*columns.shape[:2], len(chosen) + 1))  # 0 where it is never reached
        values[:, :, :-1] = level[:, some].transpose(1, 2, 0)
        precision[k, some] = np.take_along_axis(values, at, 2)
    return Curves(precision, recall)


def _needed(objects: np.ndarray) -> np.ndarray:
    """How many true positives it takes to reach each recall, [A, R] int64; the quotients decide."""
    total = objects[:, None]
    need = np.ceil(_RECALLS * total).astype(np.int64)
    need -= (need > 0) & ((need - 1) / total >= _RECALLS)
    need += need / total < _RECALLS
    return need


__all__ = ["AREAS", "MOST", "THRESHOLDS", "Curves", "Matches", "accumulate", "match", "ranked"]
