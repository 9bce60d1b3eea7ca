"""`CityscapesAP`: average precision of objects as Cityscapes' own evaluation has it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import LabelError, ScoreError
from ..types import Instances, Sample, Segmentation, Segments
from .inputs import class_names

OVERLAPS = np.arange(0.5, 1.0, 0.05)
SMALLEST = 100  # pixels; smaller objects do not count


class CityscapesAP:
    """Average precision of masks by the rules of Cityscapes' ``evalInstanceLevelSemanticLabeling``.

    They are not COCO's: an object is matched where its IoU is *above* the threshold, of several
    detections of one object the best counts and the others are false; a detection without a match
    is excused where more than the threshold's share of it lies in void, in groups (regions of
    several objects) of its class or in objects of it below 100 pixels; precision is not made
    monotone, and the area under it is taken over all scores (Cordts et al., CVPR 2016).

    Averages are over the classes that have objects, and over the IoU thresholds .50, .55, …, .95.

    Args:
        classes: names of the C classes, or C.
        things: which of them are countable, by name or index; None = all.

    Example:
        >>> metric = CityscapesAP(CITYSCAPES_CLASSES, things=CITYSCAPES_THINGS)
        >>> metric.update(prediction, sample)     # instances, against segments and labels
        >>> metric.compute()["ap"]
    """

    headline = ("ap", "ap50")
    averages = (
        "Cityscapes': over the IoUs .50, .55, …, .95 and the classes that have objects of 100 "
        "pixels or more"
    )

    def __init__(
        self, classes: Sequence[str] | int, *, things: Sequence[str | int] | None = None
    ) -> None:
        self.classes = class_names(classes, "CityscapesAP")
        chosen = things or range(len(self.classes))
        self.things = tuple(
            self.classes.index(thing) if isinstance(thing, str) else int(thing) for thing in chosen
        )
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self._records: list[dict[str, Any]] = []

    def update(self, prediction: Segmentation, sample: Sample) -> None:
        """Adds one image.

        Args:
            prediction: its ``instances``.
            sample: its ``segments``, of which crowds are groups; what has no segment is void.

        Raises:
            LabelError, ScoreError: either has none, or their sizes differ.
        """
        name = f"sample {sample.name!r}"
        if sample.segments is None:
            raise LabelError(f"{name} has no segments, of which objects are a part")
        if prediction.instances is None:
            raise ScoreError(f"{name}: the prediction has no instances")
        self.update_instances(prediction.instances, sample.segments, sample.name)

    def update_instances(self, prediction: Instances, target: Segments, name: str) -> None:
        """Adds one image, without anything around it; ``name`` tells it from all others."""
        ids = target.map.detach().cpu().numpy()
        masks = prediction.masks.detach().cpu().numpy().astype(bool, copy=False)
        if masks.shape[1:] != ids.shape:
            raise ScoreError(
                f"sample {name!r}: masks are {list(masks.shape[1:])}, segments {list(ids.shape)}"
            )
        if not prediction.scores.isfinite().all():
            raise ScoreError(f"sample {name!r}: the prediction has scores that are not finite")
        objects = [item for item in target.items if item.label in self.things]
        found: list[list[Any]] = []
        labels, scores = prediction.labels.tolist(), prediction.scores.double().tolist()
        for mask, label, score in zip(masks, labels, scores, strict=True):
            pixels = int(np.count_nonzero(mask))
            if label not in self.things or not pixels:
                continue
            inside, counts = np.unique(ids[mask], return_counts=True)
            both = dict(zip(inside.tolist(), counts.tolist(), strict=True))
            shared = [both.get(item.id, 0) if item.label == label else 0 for item in objects]
            found.append([label, score, pixels, both.get(0, 0), shared])
        self._records.append(
            {
                "name": name,
                "objects": [[item.label, item.area, item.crowd] for item in objects],
                "detections": found,
            }
        )

    def state(self) -> dict[str, list[dict[str, Any]]]:
        """``images``: one record per image; the records of several processes are joined."""
        return {"images": list(self._records)}

    def load_state(self, state: Mapping[str, list[dict[str, Any]]]) -> None:
        """Replaces the records by those of ``state``."""
        self._records = list(state["images"])

    def compute(self) -> dict[str, Any]:
        """The scores so far, as fractions.

        Returns:
            ``ap``, ``ap50``; ``per_class`` name -> ``ap``, ``ap50``, ``objects`` of the countable
            classes. A class without objects has nan; one with objects and without detections 0.

        Raises:
            ScoreError: an image was counted twice.
        """
        records = sorted(self._records, key=lambda record: record["name"])
        for one, other in itertools.pairwise(records):
            if one["name"] == other["name"]:
                raise ScoreError(f"sample {one['name']!r} was scored twice; names must differ")
        table = np.array([self._class(label, records) for label in self.things])  # [C, T]
        counted = ~np.isnan(table[:, 0])
        objects = [
            sum(
                record.get("times", 1)
                for record in records
                for label, _, group in record["objects"]
                if label == k and not group
            )
            for k in self.things
        ]
        return {
            "ap": float(table[counted].mean()) if counted.any() else math.nan,
            "ap50": float(table[counted, 0].mean()) if counted.any() else math.nan,
            "per_class": {
                self.classes[k]: {
                    "ap": float(row.mean()),
                    "ap50": float(row[0]),
                    "objects": count,
                }
                for k, row, count in zip(self.things, table, objects, strict=True)
            },
        }

    def _class(self, label: int, records: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """AP of a class at every threshold, [T]."""
        entries: list[list[tuple[float, bool, int]]] = [[] for _ in OVERLAPS]  # score, right, times
        missed = np.zeros(len(OVERLAPS), np.int64)
        any_object = any_detection = False
        for record in records:
            times = record.get("times", 1)
            mine = [k for k, entry in enumerate(record["objects"]) if entry[0] == label]
            areas = [record["objects"][k][1] for k in mine]
            groups = [record["objects"][k][2] for k in mine]
            counts = [
                area >= SMALLEST and not group for area, group in zip(areas, groups, strict=True)
            ]
            found = [entry for entry in record["detections"] if entry[0] == label]
            any_object |= any(counts)
            any_detection |= bool(found)
            overlap = np.array(
                [
                    [
                        entry[4][k] / (area + entry[2] - entry[4][k])
                        for k, area in zip(mine, areas, strict=True)
                    ]
                    for entry in found
                ]
            ).reshape(len(found), len(mine))
            excused = [
                (
                    entry[3]
                    + sum(
                        entry[4][k] * (int(group) + int(area < SMALLEST))
                        for k, area, group in zip(mine, areas, groups, strict=True)
                    )
                )
                / entry[2]
                for entry in found
            ]
            for t, threshold in enumerate(OVERLAPS):
                above = overlap > threshold
                for column, count in enumerate(counts):
                    if not count:
                        continue
                    scores = sorted(found[k][1] for k in np.flatnonzero(above[:, column]))
                    missed[t] += 0 if scores else times
                    entries[t] += [(score, False, times) for score in scores[:-1]]
                    entries[t] += [(score, True, times) for score in scores[-1:]]
                for entry, row, share in zip(found, above, excused, strict=True):
                    if not row.any() and share <= threshold:
                        entries[t].append((entry[1], False, times))
        if not any_object:
            return np.full(len(OVERLAPS), math.nan)
        if not any_detection:
            return np.zeros(len(OVERLAPS))
        return np.array(
            [_area(rows, missed) for rows, missed in zip(entries, missed.tolist(), strict=True)]
        )


def _area(entries: Sequence[tuple[float, bool, int]], missed: int) -> float:
    """Under the curve of precision and recall, one point for every score that occurs."""
    if not entries:
        return 0.0
    rows = sorted(entries, key=lambda row: row[0])
    score = np.array([row[0] for row in rows])
    weight = np.array([row[2] for row in rows], np.float64)
    right = np.array([row[1] for row in rows]) * weight
    first = np.flatnonzero(np.concatenate([[True], score[1:] != score[:-1]]))
    below = np.concatenate([[0.0], right.cumsum()])[first]
    before = np.concatenate([[0.0], weight.cumsum()])[first]
    tp = right.sum() - below
    precision = np.append(tp / (weight.sum() - before), 1.0)
    recall = np.append(tp / (tp + below + missed) if right.sum() + missed else tp, 0.0)
    # Each point stands for the half of the way to each of its neighbours.
    around = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ (0.5 * (around[:-2] - around[2:])))


__all__ = ["CityscapesAP"]
