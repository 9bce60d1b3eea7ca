"""`evaluate`: scores, time and memory of every stage of a pipeline over a dataset.

Started by ``torchrun`` or ``accelerate launch``, every process scores images of its own, and the
states of the metrics are added, so that the scores are those of one process to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as distributed
from torch import Tensor

from . import metrics as metrics_registry
from .errors import PluginError, PysegError
from .files import finite
from .pipeline import Pipeline, StageResult
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
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
    observe: Callable[[Sample, list[StageResult]], None] | None = None,
) -> Evaluation:
    """Runs a pipeline over a dataset and scores the prediction after each of its stages.

    One image at a time, in one pass. Times are those of `Pipeline.trace`, after one image to warm
    up; peak memory is measured for the first few images only.

    Where torch.distributed is initialised, process r of n scores images r, r + n, …, each once, and
    all processes return the same result: additive states give the same scores bit for bit, times
    are means over all images, memory is the largest of any process.

    Args:
        pipeline: its classes must be the dataset's, in the same order.
        dataset: samples with what the metrics need, labels for ``"semantic"``.
        metrics: registered names, with options if need be: ``"semantic(ignore_index=0)"``.
        limit: score this many images, spread evenly over the dataset; None = all.
        track: wraps the sequence of indices, for a progress bar such as ``rich.progress.track``.
        observe: called with every sample and the results of its stages, such as
            `pyseg.report.Recorder.add`.

    Raises:
        PysegError: the dataset is empty or its classes are not the pipeline's; errors of its
            samples pass through, so that no image is left out silently.

    Example:
        >>> print(evaluate(pyseg.build("streetnet+crf"), CamVid("camvid", "val")))
    """
    _check_classes(pipeline.classes, dataset.classes)
    if limit is not None and limit < 1:
        raise PysegError(f"limit must be at least 1, got {limit}")
    total = len(dataset)
    if total == 0:
        raise PysegError("dataset is empty: there is nothing to evaluate")
    if isinstance(metrics, str):
        metrics = (metrics,)
    count = total if limit is None else min(limit, total)
    indices = [k * total // count for k in range(count)]
    things = getattr(dataset, "things", ())
    scorers = [
        {name: _make_metric(name, dataset.classes, things) for name in metrics}
        for _ in pipeline.stages
    ]
    milliseconds = [0.0] * len(pipeline.stages)
    peaks: list[int | None] = [None] * len(pipeline.stages)
    rank, processes = _place()
    for done, index in enumerate(track(indices[rank::processes])):
        sample = dataset[index]
        if done == 0:
            pipeline.trace(sample.image, name=sample.name)
        results = pipeline.trace(sample.image, memory=done < MEMORY_IMAGES, name=sample.name)
        for k, result in enumerate(results):
            milliseconds[k] += result.milliseconds / count
            if result.peak_bytes is not None:
                peaks[k] = max(peaks[k] or 0, result.peak_bytes)
            for name, scorer in scorers[k].items():
                with naming_failures(f"metric {name!r}", f" on image {sample.name!r}"):
                    scorer.update(result.prediction, sample)
        if observe is not None:
            observe(sample, results)
    if processes > 1:
        for k, stage_scorers in enumerate(scorers):
            for name, scorer in stage_scorers.items():
                merge_states(name, scorer)
            costs = gather_objects((milliseconds[k], peaks[k]))
            milliseconds[k] = math.fsum(time for time, _ in costs)
            measured = [peak for _, peak in costs if peak is not None]
            peaks[k] = max(measured) if measured else None

    rows: list[StageScores] = []
    for k, stage in enumerate(pipeline.stages):
        scores = {name: _computed(name, scorer) for name, scorer in scorers[k].items()}
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
                milliseconds=milliseconds[k],
                peak_bytes=peaks[k],
            )
        )
    headline = {
        name: tuple(getattr(scorer, "headline", _numbers(rows[0].metrics[name])[:1]))
        for name, scorer in scorers[0].items()
    }
    return Evaluation(str(pipeline), count, tuple(rows), headline, rank == 0)


def _make_metric(text: str, classes: Sequence[str], things: Sequence[int | str]) -> Metric:
    """A metric from its name and options; it is told the classes, or how many there are.

    Panoptic data sets also say which classes are ``things``.
    """
    context = {"classes": tuple(classes), "num_classes": len(classes), "things": tuple(things)}
    return metrics_registry._registry.make(text, context)


def _computed(name: str, metric: Metric) -> dict[str, Any]:
    with naming_failures(f"metric {name!r}"):
        scores = metric.compute()
    if not isinstance(scores, Mapping):
        raise PluginError(
            f"metric {name!r} must compute a dict of names and values, got a "
            f"{type(scores).__name__}"
        )
    return dict(scores)


def _check_classes(predicted: Sequence[str], target: Sequence[str]) -> None:
    if len(predicted) != len(target):
        raise PysegError(
            f"the pipeline has {len(predicted)} classes, the dataset {len(target)}: "
            "use a model that was trained for this dataset (its num_classes and "
            "weights)"
        )
    pairs = list(zip(predicted, target, strict=True))
    # A model with a new head does not know what its classes are called.
    different = [
        f"{index} is {ours!r}, in the dataset {theirs!r}"
        for index, (ours, theirs) in enumerate(pairs)
        if ours.lower() != theirs.lower() and ours != f"class {index}"
    ]
    if different:
        raise PysegError(
            f"the pipeline's classes are not the dataset's: class {different[0]}"
            + (f", and {len(different) - 1} more" if len(different) > 1 else "")
            + "; use a model that was trained for this dataset"
        )


def _numbers(values: dict[str, Any]) -> list[str]:
    return [key for key, value in values.items() if isinstance(value, float)]


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every process, in the order of ranks; one process gives itself."""
    _, processes = _place()
    if processes == 1:
        return [value]
    gathered: list[Any] = [None] * processes
    distributed.all_gather_object(gathered, value)
    return gathered


def _place() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def merge_states(name: str, metric: Metric) -> None:
    """Gives ``metric`` in every process the sum of the states of all."""
    _, processes = _place()
    if processes == 1:
        return
    # NCCL reduces on the GPU only.
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    state = metric.state()
    total: dict[str, Any] = {}
    for key in sorted(state):
        value = state[key]
        if isinstance(value, Tensor):
            total[key] = value.detach().to(device, copy=True).contiguous()
            distributed.all_reduce(total[key])
        elif isinstance(value, list):
            total[key] = [record for part in gather_objects(value) for record in part]
        else:
            raise PluginError(
                f"metric {name!r} has a {type(value).__name__} as state {key!r}; "
                "states are tensors and lists, whose sum over processes is the state "
                "of the whole"
            )
    metric.load_state(total)
