"""The measures of BSDS500 (Arbelaez et al., PAMI 2011), against several people.

A method is scored at several levels, from fine to coarse: an option's values, or the thresholds of
a hierarchy. ODS takes the one level that is best over all images, OIS the best of each image.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.morphology import thin

from pyseg.datasets.bsds500 import BSDS500
from pyseg.errors import LabelError, ScoreError
from pyseg.types import VOID, Sample, Segmentation, Segments

from . import _core
from .regions import Map


def boundaries(regions: Map) -> NDArray[np.bool_]:
    """Boundary pixels of a map [H, W] as the benchmark draws them, thinned.

    A pixel is one where it, its right, lower or lower right neighbour differ along an edge of the
    pixel grid; the last row and column look along themselves only.
    """
    across, down = regions[:, :-1] != regions[:, 1:], regions[:-1] != regions[1:]
    found = np.zeros(regions.shape, bool)
    found[:, :-1] |= across
    found[:-1, :-1] |= across[1:]
    found[:-1] |= down
    found[:-1, :-1] |= down[:, 1:]
    return thin(found)


def match(
    ours: NDArray[np.bool_], theirs: NDArray[np.bool_], tolerance: float = 0.0075
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The largest set of pairs of boundary pixels, one of either map, no pixel in two.

    Args:
        ours: [H, W].
        theirs: [H, W].
        tolerance: largest distance of a pair, as a share of the diagonal.

    Returns:
        The pixels of either that have a partner, [H, W] both.
    """
    return _core.match(ours, theirs, tolerance * float(np.hypot(*ours.shape)))


def boundary_counts(
    ours: NDArray[np.bool_], humans: Sequence[NDArray[np.bool_]], tolerance: float = 0.0075
) -> tuple[int, int, int, int]:
    """What precision and recall of boundaries [H, W] against several people's are made of.

    Returns:
        Boundary pixels of people that are found, all of them; ours that some person has, all of
        ours.
    """
    right = np.zeros(ours.shape, bool)
    found = drawn = 0
    for theirs in humans:
        one, other = match(ours, theirs, tolerance)
        right |= one
        found += int(other.sum())
        drawn += int(theirs.sum())
    return found, drawn, int(right.sum()), int(ours.sum())


@dataclass(frozen=True)
class RegionScores:
    """Of one map against several people's."""

    best: NDArray[np.float64]  # IoU of the best region of ours, for every region of every person
    area: NDArray[np.int64]  # pixels of those
    rand: float  # probabilistic Rand index
    variation: float  # of information, in bits


def region_scores(regions: Map, humans: Sequence[Map]) -> RegionScores:
    """Covering of people's regions by ours, Rand index and variation of information.

    Args:
        regions: [H, W] numbers.
        humans: maps of the same size.
    """
    ours = _from_zero(regions)
    best, area, rand, variation = [], [], [], []
    for human in humans:
        theirs = _from_zero(human)
        table = np.bincount(
            theirs * (ours.max() + 1) + ours, minlength=(theirs.max() + 1) * (ours.max() + 1)
        ).reshape(-1, ours.max() + 1)
        table = table[table.any(1)][:, table.any(0)]
        rows, columns, total = table.sum(1), table.sum(0), table.sum()
        best.append((table / (rows[:, None] + columns[None] - table)).max(1))
        area.append(rows)
        apart = (rows**2).sum() / 2 + (columns**2).sum() / 2 - (table.astype(np.int64) ** 2).sum()
        rand.append(1 - apart / max(total * (total - 1) / 2, 1))
        # H(ours | theirs) + H(theirs | ours)
        variation.append(2 * _entropy(table) - _entropy(rows) - _entropy(columns))
    return RegionScores(
        np.concatenate(best), np.concatenate(area), float(np.mean(rand)), float(np.mean(variation))
    )


def _from_zero(regions: Map) -> NDArray[np.int64]:
    """Numbers [H W] from 0 on, few enough for a table of them."""
    flat = regions.ravel().astype(np.int64)
    if flat.min() >= 0 and flat.max() < 1000:
        return flat
    return np.unique(flat, return_inverse=True)[1].ravel()


def _entropy(counts: NDArray[np.int64]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


class _Records:
    """One record for each image; those of several processes are joined."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self._records: list[dict[str, Any]] = []

    def update(self, prediction: Segmentation, sample: Sample) -> None:
        """Counts one image, of one level.

        Args:
            prediction: its segments are scored, or its labels where it has none.
            sample: with ``humans``, as `BSDS500Humans` gives them; or with segments, or labels, of
                one person.

        Raises:
            LabelError: the sample has none of these, or sizes differ.
        """
        humans = getattr(sample, "humans", ())
        labels = sample.labels
        if not humans and labels is not None and bool((labels == VOID).all()):
            return  # nobody drew anything
        people = [_numbers(one) for one in humans or (_drawn_by_one(sample),)]
        self.update_levels(sample.name, [_map_of(prediction)], people)

    def update_levels(self, name: str, levels: Sequence[Map], humans: Sequence[Map]) -> None:
        """Counts one image.

        Args:
            name: of the image; each comes once.
            levels: maps [H, W], from fine to coarse, as many for every image.
            humans: maps of several people.

        Raises:
            LabelError: sizes differ, or there is no level or no person.
        """
        sizes = {np.shape(one) for one in itertools.chain(levels, humans)}
        if not levels or not humans or len(sizes) != 1 or len(next(iter(sizes))) != 2:
            raise LabelError(
                f"{name!r} needs maps [H, W] of one size, one level and one person at least, got "
                f"{len(levels)} levels and {len(humans)} people of sizes {sorted(sizes)}"
            )
        maps = [np.asarray(one) for one in levels]
        self._records.append({"name": name, **self._scored(maps, [np.asarray(h) for h in humans])})

    def _scored(self, levels: list[Map], humans: list[Map]) -> dict[str, Any]:
        raise NotImplementedError

    def state(self) -> dict[str, list[dict[str, Any]]]:
        """``images``: one record for each image; the records of several processes are joined."""
        return {"images": list(self._records)}

    def load_state(self, state: Mapping[str, list[dict[str, Any]]]) -> None:
        """Replaces the records by those of ``state``."""
        self._records = list(state["images"])

    def _sorted(self) -> list[dict[str, Any]]:
        records = sorted(self._records, key=lambda record: record["name"])
        for one, other in itertools.pairwise(records):
            if one["name"] == other["name"]:
                raise ScoreError(f"image {one['name']!r} was counted twice")
            if len(one["levels"]) != len(other["levels"]):
                raise ScoreError(
                    f"all images need as many levels: {one['name']!r} has {len(one['levels'])}, "
                    f"{other['name']!r} {len(other['levels'])}"
                )
        return records


def _drawn_by_one(sample: Sample) -> Any:
    if sample.segments is not None:
        return sample.segments
    if sample.labels is None:
        raise LabelError(
            f"sample {sample.name!r} has neither humans, segments nor labels to compare with"
        )
    return sample.labels


def _map_of(prediction: Segmentation) -> Map:
    return _numbers(prediction.labels if prediction.segments is None else prediction.segments)


def _numbers(found: Any) -> Map:
    return (found.map if isinstance(found, Segments) else found).cpu().numpy().astype(np.int64)


class BSDSBoundary(_Records):
    """Precision, recall and F of boundaries against several people, at the best level.

    Boundary pixels are paired one to one within ``tolerance``. Recall is of all people's pixels;
    one of ours is right where any person has it. The pairs are as many as can be, near ones first;
    the published program looks for a cheapest assignment with some chance in it and finds a few
    less (README, "Measured on BSDS500").

    Args:
        tolerance: of the diagonal, above 0 and up to 0.1.

    Raises:
        ValueError: another tolerance.
    """

    headline = ("ods_f", "ois_f")
    averages = "pixels are summed over all images; OIS: at each image's own best level"

    def __init__(self, *, tolerance: float = 0.0075) -> None:
        if not 0 < tolerance <= 0.1:
            raise ValueError(f"tolerance must be above 0 and at most 0.1, got {tolerance}")
        self.tolerance = tolerance
        super().__init__()

    def _scored(self, levels: list[Map], humans: list[Map]) -> dict[str, Any]:
        drawn = [boundaries(human) for human in humans]
        counts = [boundary_counts(boundaries(level), drawn, self.tolerance) for level in levels]
        return {"levels": counts}

    def compute(self) -> dict[str, Any]:
        """The scores so far.

        Returns:
            ``ods_f`` with ``ods_precision``, ``ods_recall`` and ``ods_level`` (fractions between
            two levels are interpolated, as the benchmark does), ``ois_f``, ``ap`` (area below the
            curve of precision over recall, sampled at 101 recalls; 0 of one level), ``curve``: a
            list of (recall, precision); ``images``. Without images all are nan.

        Raises:
            ScoreError: an image came twice, or with another number of levels.
        """
        records = self._sorted()
        if not records:
            nan = float("nan")
            names = ("ods_f", "ods_precision", "ods_recall", "ods_level", "ois_f", "ap")
            return {**dict.fromkeys(names, nan), "curve": [], "images": 0}
        counts = np.array([record["levels"] for record in records], float)
        counts = counts.reshape(len(records), -1, 4)
        recall, precision = _rates(counts.sum(0))
        level, best_recall, best_precision, best = _best_f(recall, precision)
        own = _f(*_rates(counts)).argmax(1)
        ois = _f(*_rates(counts[np.arange(len(counts)), own].sum(0)))
        return {
            "ods_f": best,
            "ods_precision": best_precision,
            "ods_recall": best_recall,
            "ods_level": level,
            "ois_f": float(ois),
            "ap": _area(recall, precision),
            "curve": [[float(r), float(p)] for r, p in zip(recall, precision, strict=True)],
            "images": len(records),
        }


def _rates(counts: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Recall and precision of counts [..., 4]; 0 where there is nothing."""
    found, drawn, right, ours = np.moveaxis(counts, -1, 0)
    return found / np.maximum(drawn, 1), right / np.maximum(ours, 1)


def _f(recall: Any, precision: Any) -> NDArray[Any]:
    total = recall + precision
    return 2 * recall * precision / np.where(total > 0, total, 1)


def _best_f(recall: NDArray[Any], precision: NDArray[Any]) -> tuple[float, float, float, float]:
    """Level, recall, precision and F at the best point of the curve through all levels."""
    places = np.arange(len(recall), dtype=float)
    fine = np.unique(np.r_[places, np.linspace(0, len(recall) - 1, 100 * len(recall))])
    r, p = np.interp(fine, places, recall), np.interp(fine, places, precision)
    f = _f(r, p)
    best = int(f.argmax())
    return float(fine[best]), float(r[best]), float(p[best]), float(f[best])


def _area(recall: NDArray[Any], precision: NDArray[Any]) -> float:
    r, first = np.unique(recall, return_index=True)
    if len(r) < 2:
        return 0.0
    return float(np.interp(np.linspace(0, 1, 101), r, precision[first], 0, 0).sum() * 0.01)


class BSDSRegions(_Records):
    """Covering, probabilistic Rand index and variation of information against several people.

    Covering is the mean IoU of people's regions with the best of ours, weighted by their pixels.
    The Rand index is the share of pairs of pixels on which both agree, averaged over people.
    Variation of information is in bits, 0 is best.
    """

    headline = ("covering_ods", "pri_ods", "vi_ods")
    averages = "covering: regions are summed over all images; PRI and VI: means over images"

    def _scored(self, levels: list[Map], humans: list[Map]) -> dict[str, Any]:
        scores = [region_scores(level, humans) for level in levels]
        area = scores[0].area
        best = np.max([score.best for score in scores], 0)
        return {
            "levels": [
                [float((score.best * area).sum()), score.rand, score.variation] for score in scores
            ],
            "best": float((best * area).sum()),
            "area": int(area.sum()),
        }

    def compute(self) -> dict[str, Any]:
        """The scores so far.

        Returns:
            ``covering_ods``, ``covering_ois`` and ``covering_best`` (each region of a person at its
            own best level), ``pri_ods``, ``pri_ois``, ``vi_ods``, ``vi_ois``, and ``images``.
            Without images all are nan.

        Raises:
            ScoreError: an image came twice, or with another number of levels.
        """
        records = self._sorted()
        names = ("covering", "pri", "vi")
        if not records:
            keys = [f"{name}_{kind}" for name in names for kind in ("ods", "ois")]
            return {**dict.fromkeys([*keys, "covering_best"], float("nan")), "images": 0}
        scores = np.array([record["levels"] for record in records])
        area = np.array([record["area"] for record in records], float)
        covering, rand, variation = np.moveaxis(scores, 2, 0)
        return {
            "covering_ods": float(covering.sum(0).max() / area.sum()),
            "covering_ois": float(covering.max(1).sum() / area.sum()),
            "covering_best": sum(record["best"] for record in records) / float(area.sum()),
            "pri_ods": float(rand.mean(0).max()),
            "pri_ois": float(rand.max(1).mean()),
            "vi_ods": float(variation.mean(0).min()),
            "vi_ois": float(variation.min(1).mean()),
            "images": len(records),
        }


@dataclass(frozen=True, repr=False)
class HumanSample(Sample):
    """A sample with what all people drew."""

    humans: tuple[Segments, ...] = ()


class BSDS500Humans(BSDS500):
    """BSDS500 with the segmentations of all people; the first one's are the sample's segments.

    Args:
        root: as `pyseg.datasets.BSDS500` has it.
        split: "train", "val" or "test".

    Raises:
        LayoutError: a folder or file is absent.
    """

    def __init__(self, root: str | Path, split: str = "train") -> None:
        super().__init__(root, split)

    def __getitem__(self, index: int) -> HumanSample:
        sample = super().__getitem__(index)
        return HumanSample(**vars(sample), humans=self.humans(index))

    def humans(self, index: int) -> tuple[Segments, ...]:
        """What every person drew of an image."""
        # Of one person each; a copy, so that several threads may read.
        reader = copy.copy(self)
        found = []
        for reader.human in range(self.people(index)):
            found.append(reader.truth(index))
        return tuple(found)

    def people(self, index: int) -> int:
        """How many drew an image."""
        path = self.labels[index]
        if path.suffix == ".mat":
            from pyseg.datasets.pairs import read_mat

            return len(np.atleast_1d(read_mat(path, "groundTruth")))
        return len(list(path.parent.glob(path.name.replace("_human0.", "_human*."))))


__all__ = [
    "BSDS500Humans",
    "BSDSBoundary",
    "BSDSRegions",
    "HumanSample",
    "RegionScores",
    "boundaries",
    "boundary_counts",
    "match",
    "region_scores",
]
