"""`evaluate`: scores, time and memory of every stage of a pipeline over a dataset.

Started by ``torchrun`` or ``accelerate launch``, every process scores images of its own, and the
states of the metrics are added, so that the scores are those of one process to the last bit.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import metrics as metrics_registry
from . import page
from .classes import check_classes
from .errors import PluginError, PysegError
from .files import finite
from .pipeline import Pipeline, StageResult
from .processes import gather_objects, merge_states, rank_and_count
from .progress import notebook_bar
from .registry import naming_failures
from .types import Dataset, Metric, Sample

MEMORY_IMAGES = 3  # images whose peak memory is measured, which takes longer than the time


@dataclass(frozen=True)
class StageScores:
    """What a pipeline reaches when it ends after one of its stages."""

    stage: str  # "baseline", then "+crf", "+sam2", …
    spec: str  # the pipeline up to here
    metrics: dict[str, dict[str, Any]]  # metric -> what its compute() returned
    delta: dict[str, dict[str, float]]  # metric -> each of its numbers less the baseline's
    milliseconds: float  # of this stage alone, mean over the images
    peak_bytes: int | None  # of this stage alone, largest of some images; None = not measurable
    # Pixels [C, C], rows = ground truth: of the first metric whose state has such a matrix.
    confusion: Tensor | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; nan becomes None."""
        return {
            "stage": self.stage,
            "spec": self.spec,
            "milliseconds": round(self.milliseconds, 3),
            "peak_megabytes": None if self.peak_bytes is None else round(self.peak_bytes / 1e6, 1),
            "metrics": finite(self.metrics),
            "delta": finite(self.delta),
        }


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`: one row per stage."""

    spec: str
    images: int
    stages: tuple[StageScores, ...]
    headline: dict[str, tuple[str, ...]]  # metric -> its numbers that the table shows
    is_main_process: bool = True  # of several, the one that prints and writes
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    device: str = "cpu"
    threads: int = 1  # torch's, on the CPU

    def to_list(self) -> list[dict[str, Any]]:
        """JSON-ready: one dict per stage, with every number of every metric."""
        return [{**stage.to_dict(), "images": self.images} for stage in self.stages]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table that is printed, as text."""
        shown = [(metric, key) for metric, keys in self.headline.items() for key in keys]
        head = ["stage"]
        for _, key in shown:
            head += [title_of(key), "Δ"]
        head += ["ms/image", "peak MB"]
        rows = []
        for index, stage in enumerate(self.stages):
            row = [stage.stage]
            for metric, key in shown:
                change = stage.delta[metric].get(key, math.nan)
                row += [f"{stage.metrics[metric][key]:.4f}", f"{change:+.4f}" if index else ""]
            peak = "?" if stage.peak_bytes is None else f"{stage.peak_bytes / 1e6:.0f}"
            rows.append([*row, f"{stage.milliseconds:.1f}", peak])
        return head, rows

    def __str__(self) -> str:
        head, rows = self.table()
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if k == 0 else cell.rjust(width)
                for k, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in [head, *rows]
        )

    def _repr_html_(self) -> str:
        """What notebooks show: the table."""
        plural = "" if self.images == 1 else "s"
        caption = html.escape(f"{self.spec}: {self.images} image{plural}")
        return page.table(*self.table()).replace("<table>", f"<table><caption>{caption}</caption>")


_TITLES = {
    "miou": "mIoU",
    "fwiou": "fwIoU",
    "f1": "F1",
    "iou": "IoU",
    "ece": "ECE",
    "mce": "MCE",
    "nll": "NLL",
    "brier": "Brier",
    "roc_auc": "ROC AUC",
    "best_iou": "best IoU",
    "pq": "PQ",
    "sq": "SQ",
    "rq": "RQ",
    "bf": "BF",
    "boundary_iou": "Boundary IoU",
    "trimap_iou": "trimap IoU",
    "trimap_miou": "trimap mIoU",
}


def title_of(key: str) -> str:
    """What tables call a number of a metric."""
    return _TITLES.get(key, key.replace("_", " "))


def evaluate(
    pipeline: Pipeline,
    dataset: Dataset,
    metrics: Sequence[str] = ("semantic",),
    *,
    limit: int | None = None,
    track: Callable[[Sequence[int]], Iterable[int]] = notebook_bar,
    observe: Callable[[Sample, list[StageResult]], None] | None = None,
) -> Evaluation:
    """Runs a pipeline over a dataset and scores the prediction after each of its stages.

    One image at a time, in one pass. Times are those of `Pipeline.trace`, after one image to warm
    up; peak memory is measured for the first few images only.

    Where torch.distributed is initialised, process r of n scores images r, r + n, …, each once, and
    all processes return the same result: additive states give the same scores bit for bit, times
    are means over all images, memory is the largest of any process. What a *model*
    returns depends on torch's threads in its last bits, as convolutions round differently, and
    ``torchrun`` sets ``OMP_NUM_THREADS=1``: set it for one process, too, where scores of
    probabilities, such as calibration, are to be equal to the last digit.

    Args:
        pipeline: its classes must be the dataset's, in the same order.
        dataset: samples with what the metrics need, labels for ``"semantic"``.
        metrics: registered names, with options if need be: ``"semantic(ignore_index=0)"``.
        limit: score this many images, spread evenly over the dataset; None = all.
        track: wraps the sequence of indices, for a progress bar such as ``rich.progress.track``.
        observe: called with every sample and the results of its stages, such as
            `pyseg.report.WorstImages.add`.

    Raises:
        PysegError: the dataset is empty or its classes are not the pipeline's; a sample, a stage or
            a metric fails, so that no image is left out silently. The message says which, and on
            which image.

    Example:
        >>> print(evaluate(pyseg.build("streetnet+crf"), CamVid("camvid", "val")))
    """
    check_classes(pipeline.classes, dataset.classes)
    indices = chosen(len(dataset), limit)
    count = len(indices)
    scoring = Scoring(pipeline, dataset, metrics)
    rank, processes = rank_and_count()
    for done, index in enumerate(track(indices[rank::processes])):
        scoring.add(index, warm_up=done == 0, memory=done < MEMORY_IMAGES, observe=observe)
    if processes > 1:
        for k, stage_scorers in enumerate(scoring.scorers):
            for name, scorer in stage_scorers.items():
                merge_states(name, scorer)
            costs = gather_objects((scoring.milliseconds[k], scoring.peaks[k]))
            scoring.milliseconds[k] = math.fsum(time for time, _ in costs)
            scoring.peaks[k] = largest(peak for _, peak in costs)
    return scoring.result(count, rank == 0, str(pipeline.device), torch.get_num_threads())


def chosen(total: int, limit: int | None) -> list[int]:
    """The indices of the samples that are scored.

    Raises:
        PysegError: there are none, or ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise PysegError(f"limit must be at least 1, got {limit}")
    if total == 0:
        raise PysegError("dataset is empty: there is nothing to evaluate")
    count = total if limit is None else min(limit, total)
    return [k * total // count for k in range(count)]


def largest(peaks: Iterable[int | None]) -> int | None:
    """The largest of what was measured; None = nothing was."""
    return max((peak for peak in peaks if peak is not None), default=None)


class Scoring:
    """Sums over the samples of one `evaluate` call, or of a part of them: they add up.

    Args:
        pipeline, dataset, metrics: as for `evaluate`.
    """

    def __init__(self, pipeline: Pipeline, dataset: Dataset, metrics: Sequence[str]) -> None:
        self.pipeline, self.dataset = pipeline, dataset
        things = getattr(dataset, "things", ())
        names = (metrics,) if isinstance(metrics, str) else metrics
        self.scorers = [
            {name: _make_metric(name, dataset.classes, things) for name in names}
            for _ in pipeline.stages
        ]
        self.milliseconds = [0.0] * len(pipeline.stages)  # in all
        self.peaks: list[int | None] = [None] * len(pipeline.stages)

    def add(
        self,
        index: int,
        *,
        warm_up: bool = False,
        memory: bool = False,
        observe: Callable[[Sample, list[StageResult]], None] | None = None,
    ) -> None:
        """Scores one sample; ``memory``: measures what it takes, too."""
        pipeline = self.pipeline
        sample = _sample(self.dataset, index)
        if warm_up:
            pipeline.trace(sample.image, name=repr(sample.name))
        results = pipeline.trace(sample.image, memory=memory, name=repr(sample.name))
        for k, result in enumerate(results):
            self.milliseconds[k] += result.milliseconds
            self.peaks[k] = largest((self.peaks[k], result.peak_bytes))
            where = f" on image {sample.name!r} after stage {pipeline.stages[k].text!r}"
            for name, scorer in self.scorers[k].items():
                with naming_failures(f"metric {name!r}", where):
                    scorer.update(result.prediction, sample)
        if observe is not None:
            observe(sample, results)

    def result(self, count: int, is_main: bool, device: str, threads: int) -> Evaluation:
        """What `evaluate` returns, of ``count`` samples."""
        pipeline, dataset, scorers = self.pipeline, self.dataset, self.scorers
        rows: list[StageScores] = []
        for k, stage in enumerate(pipeline.stages):
            scores = {name: _compute(name, scorer) for name, scorer in scorers[k].items()}
            baseline = rows[0].metrics if rows else scores
            rows.append(
                StageScores(
                    stage=f"+{stage.name}" if k else "baseline",
                    spec="+".join(s.text for s in pipeline.stages[: k + 1]),
                    metrics=scores,
                    delta={
                        name: {key: values[key] - baseline[name][key] for key in _numbers(values)}
                        for name, values in scores.items()
                    },
                    milliseconds=self.milliseconds[k] / count,
                    peak_bytes=self.peaks[k],
                    confusion=_confusion(scorers[k].values(), len(dataset.classes)),
                )
            )
        headline = {
            name: tuple(getattr(scorer, "headline", _numbers(rows[0].metrics[name])[:1]))
            for name, scorer in scorers[0].items()
        }
        return Evaluation(
            str(pipeline),
            count,
            tuple(rows),
            headline,
            is_main,
            classes=tuple(dataset.classes),
            palette=tuple(dataset.palette),
            device=device,
            threads=threads,
        )


def _sample(dataset: Dataset, index: int) -> Sample:
    with naming_failures("the data set", f" at sample {index}"):
        sample = dataset[index]
    if not isinstance(sample, Sample):
        raise PluginError(
            f"sample {index} of the data set must be a pyseg.Sample, got {type(sample).__name__}"
        )
    if sample.labels is not None and not isinstance(sample.labels, Tensor):
        raise PluginError(
            f"the labels of sample {sample.name!r} must be a tensor [H, W], got "
            f"{type(sample.labels).__name__}; torch.from_numpy makes one of an array"
        )
    return sample


def _compute(name: str, metric: Metric) -> dict[str, Any]:
    with naming_failures(f"metric {name!r}", " in compute()"):
        scores = metric.compute()
    if not isinstance(scores, Mapping):
        raise PluginError(
            f"compute() of metric {name!r} must return a dict of scores, got "
            f"{type(scores).__name__}"
        )
    return dict(scores)


def _confusion(metrics: Iterable[Metric], classes: int) -> Tensor | None:
    for metric in metrics:
        counts = metric.state().get("matrix")
        if isinstance(counts, Tensor) and tuple(counts.shape) == (classes, classes):
            return counts.cpu()
    return None


def _make_metric(text: str, classes: Sequence[str], things: Sequence[int | str]) -> Metric:
    """A metric from its name and options; it is told the classes, or how many there are.

    Panoptic data sets also say which classes are ``things``.
    """
    context = {"classes": tuple(classes), "num_classes": len(classes), "things": tuple(things)}
    return metrics_registry._registry.make(text, context)


def _numbers(values: dict[str, Any]) -> list[str]:
    return [key for key, value in values.items() if isinstance(value, float)]
