"""The result of a comparison: rows, intervals, differences, as tables and as JSON."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .. import page
from ..files import finite
from ..metrics.bootstrap import LEVEL, Difference

NONE = "none"  # the refiner that is none
SEMANTIC, CALIBRATION = "semantic", "calibration"
BOUNDARY = "boundary(measures=('boundary_iou',))"  # the others take half of its time
# What the table shows: its name, the metric and the number of it.
SCORES = (
    ("accuracy", SEMANTIC, "pixel_accuracy"),
    ("precision", SEMANTIC, "precision"),
    ("recall", SEMANTIC, "recall"),
    ("F1", SEMANTIC, "f1"),
    ("Jaccard", SEMANTIC, "fwiou"),
    ("mIoU", SEMANTIC, "miou"),
    ("boundary IoU", BOUNDARY, "boundary_iou"),
    ("ECE", CALIBRATION, "ece"),
)
DEFINITIONS = (
    "accuracy: share of the pixels; precision, recall, F1: means over the classes; Jaccard: IoU "
    "weighted by the classes' shares of the ground truth; mIoU: the Jaccard index averaged over "
    "the classes; ECE: of 15 bins, - without probabilities; ms, MB, parameters and GFLOPs (2 per "
    "multiply-add, as torch counts them) with the refiner's; training: seconds in its steps"
)


@dataclass(frozen=True)
class Training:
    """How a model was trained."""

    model: str  # its spec
    steps: int
    seconds: float  # in steps, over all runs that it took; without checkpoints and validation
    loss: float  # of the last epoch
    precision: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Row:
    """What a model scores with a refiner behind it."""

    model: str
    refiner: str  # "none" where there is none
    training: Training
    scores: dict[str, float]  # by the names of the table; nan = undefined
    intervals: dict[str, tuple[float, float]]
    iou: dict[str, float]  # by class
    milliseconds: float  # of all stages, mean over the images
    peak_bytes: int | None  # of the stage that takes most
    parameters: int
    flops: int
    stages: list[dict[str, Any]]  # as `Evaluation.to_list` gives them
    pictures: tuple[bytes, ...] = field(repr=False)  # JPEG, of the images that the page shows
    resamples: dict[str, Tensor] = field(repr=False, compare=False)  # by the names of the table

    @property
    def label(self) -> str:
        return self.model if self.refiner == NONE else f"{self.model}+{self.refiner}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; nan becomes None."""
        return {
            "model": self.model,
            "refiner": self.refiner,
            "scores": finite(self.scores),
            "intervals": finite(self.intervals),
            "iou": finite(self.iou),
            "milliseconds": round(self.milliseconds, 3),
            "peak_megabytes": None if self.peak_bytes is None else round(self.peak_bytes / 1e6, 1),
            "parameters": self.parameters,
            "flops": self.flops,
            "training_seconds": self.training.seconds,
            "stages": self.stages,
        }


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`."""

    rows: tuple[Row, ...]
    trainings: tuple[Training, ...]
    failures: dict[str, str]  # pipeline -> why it has no row
    differences: dict[tuple[int, int], Difference]  # of mIoU, by the rows' indices, first < second
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    images: tuple[str, ...]  # that were scored
    resamples: int
    recipe: dict[str, Any]
    made: dict[str, str]
    shown: tuple[tuple[str, bytes, bytes], ...] = field(repr=False)  # name, image, ground truth

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table that is printed, as text."""
        head = ["", "model", "refiner"]
        for name, _, _ in SCORES:
            head += [name, f"{LEVEL:.0%}"] if name == "mIoU" else [name]
        head += ["ms/image", "peak MB", "parameters", "GFLOPs", "training s"]
        rows = []
        for number, row in enumerate(self.rows, 1):
            cells = [str(number), row.model, row.refiner]
            for name, _, _ in SCORES:
                cells.append(page.number(row.scores[name]))
                if name == "mIoU":
                    cells.append(interval_text(row.intervals[name]))
            peak = "?" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
            cells += [f"{row.milliseconds:.1f}", peak, f"{row.parameters:,}"]
            cells += [f"{row.flops / 1e9:.2f}", f"{row.training.seconds:.0f}"]
            rows.append(cells)
        return head, rows

    def _repr_html_(self) -> str:
        """What notebooks show: the table."""
        return page.table(*self.table())

    def difference_table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows, as text: whether the row's mIoU is above (+), below (-) or as good (.)."""
        numbers = [str(k + 1) for k in range(len(self.rows))]
        rows = [
            [number, *(self.sign(k, other) for other in range(len(self.rows)))]
            for k, number in enumerate(numbers)
        ]
        return ["", *numbers], rows

    def difference(self, first: int, second: int) -> Difference:
        """Of the mIoU of two rows, by their indices."""
        if first < second:
            return self.differences[first, second]
        found = self.differences[second, first]
        return Difference(-found.value, -found.high, -found.low)

    def sign(self, first: int, second: int) -> str:
        """``"+"``, ``"-"`` or ``"."``; empty for a row and itself."""
        if first == second:
            return ""
        found = self.difference(first, second)
        return "." if not found.beyond_noise else "+" if found.low > 0 else "-"

    @property
    def method(self) -> str:
        """What the intervals are, in words."""
        return (
            f"{LEVEL:.0%} intervals of {self.resamples} bootstrap resamples of the "
            f"{len(self.images)} images (percentiles); two rows differ by more than noise where "
            "the interval of their mIoU's difference, on the same resamples, leaves out 0; each "
            "pair by itself"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; nan becomes None."""
        return {
            "recipe": self.recipe,
            "made": self.made,
            "classes": list(self.classes),
            "images": list(self.images),
            "definitions": DEFINITIONS,
            "method": self.method,
            "trainings": [training.to_dict() for training in self.trainings],
            "rows": [row.to_dict() for row in self.rows],
            "differences": [
                {
                    "first": self.rows[first].label,
                    "second": self.rows[second].label,
                    "miou": finite(found.value),
                    "interval": finite([found.low, found.high]),
                    "beyond_noise": found.beyond_noise,
                }
                for (first, second), found in self.differences.items()
            ],
            "failures": self.failures,
        }


def interval_text(interval: tuple[float, float]) -> str:
    """An interval as tables show it."""
    return "-" if math.isnan(interval[0]) else f"{interval[0]:.3f} to {interval[1]:.3f}"
