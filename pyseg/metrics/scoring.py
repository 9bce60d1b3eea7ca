"""`score`: any metrics of what anybody predicted, with the protocol and with what is noise."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..errors import LabelError, ScoreError
from ..files import finite
from ..registry import naming_failures
from ..types import VOID, Instances, Metric, Sample, Segmentation, Segments
from . import _registry, bootstrap
from .bootstrap import LEVEL, Difference, Path
from .inputs import class_names, label_map

RESAMPLES = 1000  # of a comparison
States = dict[str, dict[str, Any]]  # metric -> its state


@dataclass(frozen=True)
class Scores:
    """The result of `score`."""

    metrics: dict[str, dict[str, Any]]  # metric -> what its compute() returned
    protocol: dict[str, Any]  # what the numbers are of: classes, void, sizes, version, averages
    headline: dict[str, tuple[str, ...]]  # metric -> its numbers that the table shows
    images: tuple[str, ...] = field(repr=False)  # names of what was scored
    resamples: dict[str, dict[Path, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def interval(self, metric: str, *keys: str) -> tuple[float, float]:
        """The interval of a number of ``metrics[metric]``, by its keys; nan without resamples.

        Example:
            >>> scores.interval("semantic", "miou"), scores.interval(
            ...     "semantic", "per_class", "road", "iou")
        """
        values = self.resamples.get(metric, {}).get(keys)
        return (math.nan, math.nan) if values is None else bootstrap.interval(values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; nan becomes None. Intervals stand beside what they are of."""
        result: dict[str, Any] = {"protocol": self.protocol, "metrics": self.metrics}
        if self.resamples:
            result["intervals"] = {
                metric: _nested({path: bootstrap.interval(v) for path, v in drawn.items()})
                for metric, drawn in self.resamples.items()
            }
        return finite(result)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the scores that metrics show first, as text."""
        head = ["score", "value", *([f"{LEVEL:.0%} interval"] if self.resamples else [])]
        rows = []
        for metric, keys in self.headline.items():
            for key in keys:
                row = [f"{metric} {key}", _number(self.metrics[metric][key])]
                rows.append(row + ([_range(self.interval(metric, key))] if self.resamples else []))
        return head, rows

    def class_table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the first score that each metric has by class, as text."""
        shown = [(metric, _class_score(values)) for metric, values in self.metrics.items()]
        shown = [(metric, key) for metric, key in shown if key]
        head = ["class"]
        for metric, key in shown:
            head += [f"{metric} {key}", *([f"{LEVEL:.0%} interval"] if self.resamples else [])]
        rows = []
        for name in self.protocol["classes"]:
            row = [name]
            for metric, key in shown:
                entry = self.metrics[metric]["per_class"].get(name, {})
                row.append(_number(entry.get(key, math.nan)))
                if self.resamples:
                    row.append(_range(self.interval(metric, "per_class", name, key)))
            rows.append(row)
        return head, rows if shown else []

    def __str__(self) -> str:
        return "\n".join(f"{row[0]}  {'  '.join(row[1:])}" for row in self.table()[1])


@dataclass(frozen=True)
class Differences:
    """Of two systems on the same images: the result of `differences`."""

    first: Scores
    second: Scores
    values: dict[str, dict[Path, Difference]]  # metric -> keys of a number -> first less second

    @property
    def method(self) -> str:
        """What "more than noise" means, in words."""
        return (
            f"{self.first.protocol['intervals']}; a difference is more than noise where its "
            "interval, of both systems on the same resamples, leaves out 0. Each by itself: of 20 "
            "differences that are none, one will seem to be"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; nan becomes None."""
        return finite(
            {
                "method": self.method,
                "first": self.first.to_dict(),
                "second": self.second.to_dict(),
                "differences": {
                    metric: _nested(
                        {
                            path: {
                                "value": found.value,
                                "interval": [found.low, found.high],
                                "beyond_noise": found.beyond_noise,
                            }
                            for path, found in values.items()
                        }
                    )
                    for metric, values in self.values.items()
                },
            }
        )

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows, as text: what metrics show first, then their first score by class."""
        head = [
            "score",
            "first",
            "second",
            "difference",
            f"{LEVEL:.0%} interval",
            "more than noise",
        ]
        rows = []
        for metric, keys in self.first.headline.items():
            values = self.first.metrics[metric]
            paths: list[Path] = [(key,) for key in keys]
            if key := _class_score(values):
                paths += [("per_class", name, key) for name in values["per_class"]]
            for path in paths:
                found = self.values[metric][path]
                sides = [
                    bootstrap.value_at(s.metrics[metric], path) for s in (self.first, self.second)
                ]
                if all(map(math.isnan, sides)):
                    continue  # a class that does not occur
                name = f"{metric} {path[0]}" if len(path) == 1 else f"{metric} {path[2]} {path[1]}"
                verdict = "" if not found.beyond_noise else "first" if found.low > 0 else "second"
                rows.append(
                    [
                        name,
                        *map(_number, sides),
                        "-" if math.isnan(found.value) else f"{found.value:+.4f}",
                        _range((found.low, found.high), sign="+"),
                        verdict and f"{verdict} is higher",
                    ]
                )
        return head, rows


class Tally:
    """What several metrics have of images, one by one; `score` over whatever sequence.

    Args:
        metrics: registered names, with options if need be, or metrics.
        classes: names of the C classes, or C.
        ignore_index: label of pixels without ground truth.
        things: which classes are countable.
        resamples: of the bootstrap; 0 = no intervals. Each image's state is kept for them.
        seed: of the bootstrap.
    """

    def __init__(
        self,
        metrics: Sequence[str | Metric],
        classes: Sequence[str] | int,
        *,
        ignore_index: int = VOID,
        things: Collection[int | str] = (),
        resamples: int = 0,
        seed: int = 0,
    ) -> None:
        if resamples < 0:
            raise ScoreError(f"resamples must not be negative, got {resamples}")
        if isinstance(metrics, str) or not metrics:
            raise ScoreError(f"metrics must be a list such as ['semantic'], got {metrics!r}")
        self.classes = class_names(classes, "score")
        context = {
            "classes": self.classes,
            "num_classes": len(self.classes),
            "things": tuple(things),
            "ignore_index": ignore_index,
        }
        self.metrics = {
            name if isinstance(name, str) else type(name).__name__: (
                _registry.make(name, context) if isinstance(name, str) else copy.deepcopy(name)
            )
            for name in metrics
        }
        if len(self.metrics) < len(metrics):
            raise ScoreError(f"metrics holds one twice: {list(map(str, metrics))}")
        self.ignore_index, self.resamples, self.seed = ignore_index, resamples, seed
        self._totals: dict[str, dict[str, Any]] = {name: {} for name in self.metrics}
        self._states: list[States] = []
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._names: list[str] = []

    def add(self, prediction: Segmentation, sample: Sample) -> None:
        """Counts one image.

        Raises:
            PysegError: what the metrics raise.
        """
        states = self.states(sample.name, lambda metric: metric.update(prediction, sample))
        self.keep(sample.name, prediction.size, states)

    def states(self, name: str, update: Callable[[Metric], None]) -> States:
        """What one image leaves in each metric, by ``update``; several threads may ask at once."""
        found = {}
        for key, metric in self.metrics.items():
            with naming_failures(f"metric {key!r}", f" on image {name!r}"):
                alone = _fresh(metric)
                update(alone)
                found[key] = dict(alone.state())
        return found

    def keep(self, name: str, size: tuple[int, int], states: States) -> None:
        """Adds what `states` gave for one image."""
        for key, state in states.items():
            total = self._totals[key]
            for part, value in state.items():
                if part not in total:
                    total[part] = list(value) if isinstance(value, list) else value
                elif isinstance(value, list):
                    total[part] += value
                else:
                    total[part] = total[part] + value
        if self.resamples:
            self._states.append(
                {
                    key: {k: v.cpu() if isinstance(v, Tensor) else v for k, v in state.items()}
                    for key, state in states.items()
                }
            )
        self._names.append(name)
        self._sizes[size] += 1

    def __len__(self) -> int:
        return len(self._names)

    def scores(self, **protocol: Any) -> Scores:
        """The scores so far; ``protocol`` goes into theirs.

        Raises:
            ScoreError: nothing was scored.
        """
        if not self._names:
            raise ScoreError("there are no images: nothing to score")
        count = len(self._names)
        counts = bootstrap.draws(count, self.resamples, self.seed)
        computed, drawn = {}, {}
        for key, metric in self.metrics.items():
            with naming_failures(f"metric {key!r}", " in compute()"):
                whole = copy.deepcopy(metric)
                whole.load_state(self._totals[key])
                computed[key] = dict(whole.compute())
                if self.resamples:
                    states = [states[key] for states in self._states]
                    paths = [*_paths(computed[key])]
                    drawn[key] = bootstrap.resampled(whole, states, counts, paths)
        described = {
            "pyseg": __version__,
            **protocol,
            "classes": list(self.classes),
            "ignore_index": self.ignore_index,
            "images": count,
            "sizes": _sizes(self._sizes),
            "averages": {
                name: getattr(metric, "averages", "as the metric defines them")
                for name, metric in self.metrics.items()
            },
            "intervals": f"{LEVEL:.0%} intervals of {self.resamples} bootstrap resamples of the "
            f"{count} images (percentiles, seed {self.seed})"
            if self.resamples
            else None,
        }
        headline = {
            name: tuple(getattr(metric, "headline", next(iter(_paths(computed[name])), ())))
            for name, metric in self.metrics.items()
        }
        return Scores(computed, described, headline, tuple(self._names), drawn)


def score(
    predictions: Any,
    targets: Any,
    *,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    metrics: Sequence[str | Metric] = ("semantic",),
    ignore_index: int = VOID,
    things: Collection[int | str] = (),
    names: Sequence[str] | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> Scores:
    """Scores of plain arrays or tensors on any device, or of pyseg's own types.

    Predictions and targets are images in the same order: an array of several, [N, H, W], one map
    [H, W], or anything to iterate over, which is held one image at a time. An image is a label map
    [H, W] of integers; as a prediction also logits [C, h, w] of any resolution; for panoptic scores
    `Segments` and for those of objects `Instances`; or a `Segmentation` and a `Sample`.

    Args:
        predictions: what was predicted; moved nowhere, targets go to its device.
        targets: ground truth.
        num_classes: C; or name them:
        classes: the classes' names.
        metrics: registered names, with options if need be: ``"boundary(ratio=0.01)"``; or metrics.
        ignore_index: label of pixels without ground truth.
        things: classes that are countable, for panoptic scores.
        names: of the images, for messages; equal scores of objects are ranked by them.
        resamples: of the bootstrap over images, for intervals; 0 = none. 1000 is usual.
        seed: of the bootstrap.

    Raises:
        LabelError: labels that are no class ids, with their likely cause; sizes that differ.
        ScoreError: there are more predictions than targets or the reverse, or none.
        UnknownName: no such metric.

    Example:
        >>> found = score(predictions, targets, num_classes=19, metrics=("semantic", "boundary"))
        >>> found.metrics["semantic"]["miou"], found.protocol
    """
    if classes is None and num_classes is None:
        raise ScoreError("score needs num_classes, or classes, their names")
    if classes is not None and num_classes is not None and len(classes) != num_classes:
        raise ScoreError(f"classes has {len(classes)} names, num_classes is {num_classes}")
    chosen: Sequence[str] | int = num_classes if classes is None else classes  # type: ignore[assignment]
    tally = Tally(
        metrics, chosen, ignore_index=ignore_index, things=things, resamples=resamples, seed=seed
    )
    maps = any(not hasattr(metric, "update_segments") for metric in tally.metrics.values())
    for index, (prediction, target) in enumerate(_pairs(predictions, targets)):
        name = f"image {index:06d}" if names is None else names[index]
        sample = _sample(target, name, len(tally.classes), maps)
        tally.add(_segmentation(prediction, tally.classes, sample), sample)
    return tally.scores()


def differences(first: Scores, second: Scores) -> Differences:
    """What two systems differ in on the same images, and which differences are more than noise.

    Args:
        first: scores with resamples.
        second: scores of the same images by the same metrics, with as many resamples of that seed.

    Raises:
        ScoreError: they are not comparable.

    Example:
        >>> a, b = (score(p, targets, num_classes=19, resamples=1000) for p in (ours, theirs))
        >>> differences(a, b).values["semantic"]["miou",].beyond_noise
    """
    for what, ours, theirs in (
        ("images", first.images, second.images),
        *((key, first.protocol[key], second.protocol[key]) for key in ("classes", "intervals")),
        ("metrics", [*first.metrics], [*second.metrics]),
    ):
        if ours != theirs:
            raise ScoreError(f"the two were scored with different {what}, which no one can compare")
    if not first.resamples:
        raise ScoreError("to tell a difference from noise takes resamples, such as resamples=1000")
    return Differences(
        first,
        second,
        {
            metric: {
                path: bootstrap.difference(
                    bootstrap.value_at(first.metrics[metric], path)
                    - bootstrap.value_at(second.metrics[metric], path),
                    values,
                    second.resamples[metric][path],
                )
                for path, values in drawn.items()
            }
            for metric, drawn in first.resamples.items()
        },
    )


# --- what there is of an image ------------------------------------------------------------------


def _pairs(predictions: Any, targets: Any) -> Iterator[tuple[Any, Any]]:
    ours, theirs = iter(_images(predictions, "predictions")), iter(_images(targets, "targets"))
    for index in itertools.count():
        pair = next(ours, None), next(theirs, None)
        if pair[0] is None and pair[1] is None:
            return
        if pair[0] is None or pair[1] is None:
            more, less = ("targets", "predictions")[:: 1 if pair[0] is None else -1]
            raise ScoreError(f"there are {index} {less} and more {more}; give one for each image")
        yield pair


def _images(values: Any, what: str) -> Iterable[Any]:
    """One by one."""
    if isinstance(values, (Segments, Instances, Segmentation, Sample)):
        return [values]
    if isinstance(values, (np.ndarray, Tensor)):
        floating = _is_floating(values)
        one = 3 if floating else 2
        if values.ndim not in (one, one + 1):
            form = "[C, h, w] or [N, C, h, w] for logits" if floating else "[H, W] or [N, H, W]"
            raise LabelError(f"{what} must be {form}, got {list(values.shape)}")
        return [values] if values.ndim == one else values
    if not isinstance(values, Iterable):
        raise ScoreError(f"{what} must be arrays or a sequence, got a {type(values).__name__}")
    return values


def _is_floating(values: Any) -> bool:
    if isinstance(values, np.ndarray):
        return values.dtype.kind == "f"
    return isinstance(values, Tensor) and values.is_floating_point()


def _segmentation(value: Any, classes: tuple[str, ...], sample: Sample) -> Segmentation:
    if isinstance(value, Segmentation):
        return value
    if isinstance(value, Segments):
        return Segmentation(_size(value.map), classes, segments=value)
    if isinstance(value, Instances):
        return Segmentation(_size(value.masks), classes, instances=value)
    what = f"{sample.name}: the prediction"
    if _is_floating(value):
        logits = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
        if logits.ndim != 3 or logits.shape[0] != len(classes):
            raise ScoreError(
                f"{what} has logits of shape {list(logits.shape)}; they must be "
                f"[{len(classes)}, h, w], one plane per class"
            )
        return Segmentation(_size(sample.image), classes, logits=logits)
    labels = label_map(value, what)
    if labels.ndim != 2:
        raise LabelError(f"{what} must be [H, W], got {list(labels.shape)}")
    return Segmentation(_size(labels), classes, _labels=labels)


def _sample(value: Any, name: str, count: int, maps: bool) -> Sample:
    """``maps``: whether a metric wants class ids."""
    if isinstance(value, Sample):
        return value
    if isinstance(value, Segments):
        labels = value.label_map(count) if maps else None
        return Sample(name, no_image(value.map), labels, value)
    if isinstance(value, Instances):
        return Sample(name, no_image(value.masks), instances=value)
    labels = label_map(value, f"{name}: the target")
    return Sample(name, no_image(labels), labels)


def no_image(planes: Tensor) -> Tensor:
    """Of the size of ``planes``, in three bytes: no metric looks at the image."""
    return torch.zeros(3, 1, 1, dtype=torch.uint8).expand(3, *_size(planes))


def _size(planes: Tensor) -> tuple[int, int]:
    return int(planes.shape[-2]), int(planes.shape[-1])


# --- numbers ------------------------------------------------------------------------------------


def _fresh(metric: Metric) -> Metric:
    """One that has seen nothing, of one that has seen nothing."""
    if not type(metric).__module__.startswith("pyseg.metrics."):
        return copy.deepcopy(metric)
    # Ours make new tensors in reset(), which takes a tenth of the time.
    fresh: Any = copy.copy(metric)
    fresh.reset()
    return fresh


def _paths(computed: Mapping[str, Any]) -> Iterable[Path]:
    """The keys of every number, and of every number of every class."""
    for key, value in computed.items():
        if isinstance(value, float):
            yield (key,)
    for name, entry in (computed.get("per_class") or {}).items():
        for key, value in entry.items():
            if isinstance(value, float):
                yield "per_class", name, key


def _class_score(computed: Mapping[str, Any]) -> str:
    """The first score that a metric has of each class."""
    entries = [*(computed.get("per_class") or {}).values()]
    return next(iter(entries[0]), "") if entries else ""


def _nested(values: Mapping[Path, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for path, value in values.items():
        place = result
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return result


def _sizes(found: Counter[tuple[int, int]]) -> str:
    if len(found) > 3:
        (small, *_), (*_, large) = sorted(found), sorted(found)
        return f"{len(found)} from {small[0]} x {small[1]} to {large[0]} x {large[1]}"
    return ", ".join(
        f"{height} x {width}" + (f" ({count})" if len(found) > 1 else "")
        for (height, width), count in sorted(found.items())
    )


def _number(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4f}"
    return str(value)


def _range(found: tuple[float, float], sign: str = "") -> str:
    return "-" if math.isnan(found[0]) else f"{found[0]:{sign}.4f} to {found[1]:{sign}.4f}"


__all__ = ["RESAMPLES", "Differences", "Scores", "Tally", "differences", "no_image", "score"]
