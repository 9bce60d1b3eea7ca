"""Confidence intervals by bootstrap over images: of scores, and of differences between two.

The images are drawn with replacement, as many as there are (Efron, 1979); what is drawn are the
images' states of a metric, which add up, so that a resample is scored as the metric scores a whole
data set. Pixels are never drawn by themselves: those of one image are not independent. Intervals
are those of the percentile method. They tell what other images of the same kind would change, not
what another training would; and where images resemble each other, as neighbouring frames of a video
do, they are too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..types import Metric

LEVEL = 0.95  # of the intervals


@dataclass(frozen=True)
class Difference:
    """Of two scores on the same images."""

    value: float  # first less second
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def draws(images: int, resamples: int, seed: int) -> Tensor:
    """How often each image is in each resample, [resamples, images] int64.

    Two scores are compared pairwise by the same draws for both.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(images, (resamples, images), generator=generator)
    counts = torch.zeros(resamples, images, dtype=torch.int64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn))


def total_of(states: Sequence[Mapping[str, Tensor]], counts: Tensor) -> dict[str, Tensor]:
    """Sums of the images' states, each so often as ``counts`` [R, images] says: [R, …].

    Args:
        states: one per image, of integer tensors.
        counts: of `draws`.
    """
    stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    return {
        key: _products(counts, value.flatten(1)).view(len(counts), *value.shape[1:])
        for key, value in stacked.items()
    }


def _products(counts: Tensor, values: Tensor) -> Tensor:
    """``counts @ values`` of integers, [R, images] and [images, K]."""
    largest = int(values.abs().max()) * values.shape[0] if values.numel() else 0
    if largest >= 1 << 53:  # more than float64 counts to
        return counts @ values
    return (counts.double() @ values.double()).long()  # which is a hundred times as fast


Path = tuple[str, ...]
Key = TypeVar("Key", str, Path)


def resampled(
    metric: Metric,
    states: Sequence[Mapping[str, Any]],
    counts: Tensor,
    scores: Sequence[Key],
) -> dict[Key, Tensor]:
    """What a metric gives for each resample.

    Args:
        metric: its state is overwritten.
        states: what `Metric.state` returned of each image alone: integer tensors, or lists of
            records, which come back with ``"times"``, how often the image was drawn.
        counts: of `draws`.
        scores: which numbers of `Metric.compute` to keep, by their keys: ``"miou"``, or
            ``("per_class", "road", "iou")``.

    Returns:
        score -> [R] float64; nan where there is one image only, which resampling cannot vary.
    """
    if len(states) < 2:
        return {
            score: torch.full((len(counts),), torch.nan, dtype=torch.float64) for score in scores
        }
    lists = [key for key, value in states[0].items() if isinstance(value, list)]
    totals = total_of([{k: v for k, v in s.items() if k not in lists} for s in states], counts)
    found: dict[Key, list[float]] = {score: [] for score in scores}
    for index, row in enumerate(counts.tolist()):
        state: dict[str, Any] = {key: value[index] for key, value in totals.items()}
        for key in lists:
            state[key] = [
                {**record, "times": times}
                for times, image in zip(row, states, strict=True)
                if times
                for record in image[key]
            ]
        metric.load_state(state)
        computed = metric.compute()
        for score in scores:
            found[score].append(value_at(computed, score))
    return {score: torch.tensor(values, dtype=torch.float64) for score, values in found.items()}


def value_at(computed: Mapping[str, Any], score: str | Path) -> float:
    """A number of `Metric.compute` by its keys."""
    value: Any = computed
    for key in (score,) if isinstance(score, str) else score:
        value = value[key]
    return float(value)


def interval(values: Tensor) -> tuple[float, float]:
    """The middle `LEVEL` of a score's resamples [R]; nan where a resample has no score."""
    if bool(values.isnan().any()):
        return float("nan"), float("nan")
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return low, high


def difference(value: float, first: Tensor, second: Tensor) -> Difference:
    """A difference of two scores with its interval.

    Args:
        value: of the whole data set.
        first: resamples of the one, [R].
        second: those of the other, by the same draws.
    """
    return Difference(value, *interval(first - second))


__all__ = [
    "LEVEL",
    "Difference",
    "difference",
    "draws",
    "interval",
    "resampled",
    "total_of",
    "value_at",
]
