"""`Panoptic`: panoptic quality."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LabelError
from ..ops import boundary_mask, panoptic_quality
from ..ops.boundary_mask import boundary_distance
from ..ops.panoptic_quality import FRACTION_BITS, OTHER_AREA, PROBLEMS
from ..types import Sample, Segment, Segmentation, Segments
from .inputs import class_names, copied

GROUPS = ("", "_things", "_stuff")


class Panoptic:
    """Panoptic quality over a dataset, from counts of matched and unmatched segments.

    Kirillov et al., Panoptic Segmentation, 2019. Per class, over all images: PQ = sum of the IoUs
    of matched segments / (tp + fp / 2 + fn / 2), SQ = that sum / tp, RQ = tp / (tp + fp / 2 +
    fn / 2). Averages are over the classes that occur, in the ground truth or predicted. What
    matches, and how void and crowds count, is exactly as in panopticapi: see
    `pyseg.ops.panoptic_quality`. Two of its defects are options here.

    Sums of IoUs are kept as integers in units of 2^-40, so that neither the order of the images nor
    how they are spread over processes changes a bit.

    Args:
        classes: names of the C classes, or C.
        things: which of them are countable objects, by index or name; without it there are no
            averages over things and stuff.
        boundary_ratio: boundary PQ (Cheng et al., 2021) where it is above 0: the width of the
            boundary as a share of the image's diagonal, 0.02 in the paper.
        all_crowds: in an image with several crowds of a class every one of them excuses predictions
            of that class; False is what panopticapi does, which remembers the last one only.
        allow_empty: a group (things, stuff) of which no class occurs has nan for an average; False
            raises ZeroDivisionError, as panopticapi does.

    Example:
        >>> metric = Panoptic(("person", "sky"), things=("person",))
        >>> metric.update(prediction, sample)
        >>> metric.compute()["pq"]
    """

    headline = ("pq", "sq", "rq")  # what tables show first
    averages = (
        "matches are summed over all images, means are over the classes that occur in the ground "
        "truth or are predicted"
    )

    def __init__(
        self,
        classes: Sequence[str] | int,
        *,
        things: Collection[int | str] = (),
        boundary_ratio: float = 0.0,
        all_crowds: bool = False,
        allow_empty: bool = True,
    ) -> None:
        self.classes = class_names(classes, "Panoptic")
        if not 0 <= boundary_ratio < 1:
            raise ValueError(
                f"boundary_ratio must be in [0, 1), 0 for plain panoptic quality, got "
                f"{boundary_ratio}"
            )
        self.things = frozenset(self._index(thing) for thing in things)
        self.boundary_ratio = boundary_ratio
        self.all_crowds = all_crowds
        self.allow_empty = allow_empty
        self.reset()

    def _index(self, thing: int | str) -> int:
        if isinstance(thing, str) and thing in self.classes:
            return self.classes.index(thing)
        if isinstance(thing, int) and 0 <= thing < len(self.classes):
            return thing
        raise ValueError(
            f"things must be classes, by name or index below {len(self.classes)}, got {thing!r}"
        )

    def reset(self) -> None:
        """Forgets all images."""
        # On the CPU until the first update, then wherever the predictions are.
        self._counts = torch.zeros(len(self.classes), 4, dtype=torch.int64)
        self._problems = torch.zeros(len(PROBLEMS), dtype=torch.int64)

    def update(self, prediction: Segmentation, sample: Sample) -> None:
        """Counts one image.

        Args:
            prediction: its ``segments`` are scored.
            sample: must have ``segments``; their listed areas are trusted.

        Raises:
            LabelError: either has no segments, sizes differ, or a map and its list do not agree (on
                CUDA the latter comes from `compute`).
        """
        if sample.segments is None:
            raise LabelError(
                f"sample {sample.name!r} has no segments to score against; panoptic "
                "quality needs a data set with panoptic labels"
            )
        if prediction.segments is None:
            raise LabelError(
                f"the prediction for sample {sample.name!r} has no segments; end the "
                "pipeline with a panoptic stage"
            )
        self.update_segments(prediction.segments, sample.segments, sample.name)

    def update_segments(self, prediction: Segments, target: Segments, name: str = "") -> None:
        """Counts one image, as `update` does, without anything around it; ``name`` is for messages.

        Example:
            >>> metric = Panoptic(19, things=range(11, 19))
            >>> truth = Segments.from_map(ids, {1: 13, 2: 13, 7: 0})   # id -> class
            >>> metric.update_segments(Segments.from_map(guess, {1: 13, 2: 0}), truth)
        """
        boundaries = {}
        try:
            if self.boundary_ratio > 0:
                distance = boundary_distance(target.map.shape, self.boundary_ratio)
                maps = {"prediction": prediction.map, "target": target.map}
                boundaries = {
                    f"{side}_boundary": boundary_mask(ids[None], distance)[0]
                    for side, ids in maps.items()
                }
            counts, problems = panoptic_quality(
                prediction.map,
                target.map.to(prediction.map.device),
                _table([[item.id, item.label] for item in prediction.items], 2),
                self._targets(target.items),
                len(self.classes),
                **boundaries,
            )
        except ValueError as error:
            raise LabelError(f"sample {name!r}: {error}") from error
        if problems.device.type == "cpu" and problems[OTHER_AREA]:
            _warn_of_areas(f"sample {name!r}: {int(problems[OTHER_AREA])}")
        self._counts = self._counts.to(counts.device) + counts
        self._problems = self._problems.to(counts.device) + problems

    def _targets(self, items: Sequence[Segment]) -> Tensor:
        last = {item.label: item.id for item in items if item.crowd}
        rows = []
        for item in items:
            forgotten = not self.all_crowds and last.get(item.label) != item.id
            crowd = (2 if forgotten else 1) if item.crowd else 0
            rows.append([item.id, item.label, item.area, crowd])
        return _table(rows, 4)

    def state(self) -> dict[str, Tensor]:
        """Counts whose sum over processes is the state of the whole.

        ``counts`` [C, 4] int64 (true positives, false positives, false negatives, sum of IoUs in
        units of 2^-40) and ``problems`` [6] int64 (see `pyseg.ops.panoptic_quality`).
        """
        return {"counts": self._counts, "problems": self._problems}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the counts by ``state``, as `state` gives them."""
        self._counts, self._problems = copied(state, self.state())

    def compute(self) -> dict[str, Any]:
        """The scores so far, as fractions.

        Returns:
            ``pq``, ``sq``, ``rq`` over all classes, and with ``_things`` and ``_stuff`` over those;
            ``per_class`` name -> ``pq``, ``sq``, ``rq``, ``tp``, ``fp``, ``fn``, ``iou_sum``;
            ``classes_counted``, ``things_counted``, ``stuff_counted``: how many classes occur.
            A class that does not occur has nan, and so has a group without any.

        Raises:
            LabelError: maps and lists that do not agree were seen on CUDA.
            ZeroDivisionError: no thing or no stuff occurs, and ``allow_empty`` is False.
        """
        problems = self._problems.tolist()
        wrong = [
            f"{n} {what}"
            for k, (n, what) in enumerate(zip(problems, PROBLEMS, strict=True))
            if n and k != OTHER_AREA
        ]
        if wrong:
            raise LabelError(f"{'; '.join(wrong)}; run the metric on the CPU to see which")
        if problems[OTHER_AREA] and self._problems.device.type != "cpu":
            _warn_of_areas(str(problems[OTHER_AREA]))
        counts = self._counts.cpu()
        tp, fp, fn = counts[:, :3].double().unbind(1)
        iou_sum = counts[:, 3].double() / 2**FRACTION_BITS
        weight = tp + (fp + fn) / 2
        present = weight > 0
        columns = {"pq": iou_sum / weight, "sq": iou_sum / tp.clamp(min=1), "rq": tp / weight}
        columns["sq"][~present] = math.nan
        is_thing = torch.tensor([index in self.things for index in range(len(self.classes))])
        members = (present, present & is_thing, present & ~is_thing)
        result: dict[str, Any] = {}
        for group, chosen in zip(GROUPS, members, strict=True):
            if not chosen.any() and not self.allow_empty:
                raise ZeroDivisionError(f"no class{group.replace('_', ' of ')} occurs")
            for key, column in columns.items():
                result[key + group] = column[chosen].mean().item()
        result["per_class"] = {
            name: {
                **{key: column[index].item() for key, column in columns.items()},
                **dict(zip(("tp", "fp", "fn"), counts[index, :3].tolist(), strict=True)),
                "iou_sum": iou_sum[index].item(),
            }
            for index, name in enumerate(self.classes)
        }
        for key, chosen in zip(("classes", "things", "stuff"), members, strict=True):
            result[f"{key}_counted"] = int(chosen.sum())
        return result


def _table(rows: list[list[int]], columns: int) -> Tensor:
    # By NumPy, which is seven times as fast on lists of lists.
    return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(-1, columns))


def _warn_of_areas(found: str) -> None:
    warnings.warn(
        f"{found} target segments have another area in pixels than is listed; the listed "
        "one is used, as panopticapi does",
        stacklevel=3,
    )
