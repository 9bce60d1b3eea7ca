"""How far several people's labels agree, and so what a score against them can mean.

Labels of one person are no truth: another who is as careful gets less than 1 against them. What
people get against each other, and what the map that most of them say gets, is the ceiling that
labels allow; a difference between two systems that is small beside the spread over whose labels are
taken says little.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import LabelError, ScoreError
from .files import finite
from .metrics.semantic import Semantic
from .progress import notebook_bar
from .scoring import PathLike, _check_pairs, _class_list, _files, _Reader
from .types import VOID

PREDICTION, PLURALITY = "prediction", "plurality"
FARTHEST = 512  # pixels: boundary distances from here on count as this


@dataclass(frozen=True)
class Agreement:
    """Scores of annotators against each other, and of predictions against each of them."""

    classes: tuple[str, ...]
    annotators: tuple[str, ...]
    images: int
    miou: Mapping[str, tuple[float, ...]]  # of each, against each annotator; nan against itself
    iou: Mapping[str, float]  # by class: mean over pairs of annotators
    kappa: float  # Fleiss' kappa, over pixels that all have labelled
    class_kappa: Mapping[str, float]  # the same of each class against the rest
    boundary: Mapping[str, float]  # pixels between two annotators' boundaries: mean, median, p95
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def of(self, name: str) -> tuple[float, float, float]:
        """Mean, lowest and highest mIoU of one against the annotators, itself left out."""
        values = [value for value in self.miou[name] if not math.isnan(value)]
        return (math.fsum(values) / len(values), min(values), max(values)) if values else _NONE

    @property
    def human(self) -> tuple[float, float, float]:
        """Mean, lowest and highest mIoU of one annotator against another."""
        values = [v for name in self.annotators for v in self.miou[name] if not math.isnan(v)]
        return (math.fsum(values) / len(values), min(values), max(values)) if values else _NONE

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; nan becomes None."""
        return finite({**vars(self), "human": self.human})

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of who was scored against the annotators, as text."""
        rows = [["annotator against annotator", *map(_number, self.human)]]
        rows += [
            ["what most annotators say" if name == PLURALITY else name]
            + [_number(value) for value in self.of(name)]
            for name in self.miou
        ]
        return ["mIoU against the annotators", "mean", "lowest", "highest"], rows

    def class_table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of classes, as text."""
        rows = [
            [name, _number(self.iou[name]), _number(self.class_kappa[name])]
            for name in self.classes
        ]
        return ["class", "IoU between annotators", "Fleiss' kappa"], rows


_NONE = (math.nan, math.nan, math.nan)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


class AgreementTally:
    """Adds up images, label maps of all annotators at a time.

    Args:
        classes: their names.
        annotators: two or more.
        predicted: whether a prediction comes with each image.

    Raises:
        ScoreError: fewer than two annotators.
    """

    def __init__(
        self, classes: Sequence[str], annotators: Sequence[str], predicted: bool = False
    ) -> None:
        if len(annotators) < 2:
            raise ScoreError(
                f"annotators must be two or more, got {len(annotators)}: one person's labels say "
                "nothing about how far people agree; score against them as PREDICTIONS LABELS"
            )
        if len(set(annotators)) < len(annotators):
            raise ScoreError(f"annotators must differ, got {', '.join(annotators)}")
        self.classes, self.annotators = tuple(classes), tuple(annotators)
        who = [*([PREDICTION] if predicted else []), PLURALITY, *annotators]
        self._metrics = {
            (one, other): Semantic(classes=self.classes)
            for one in who
            for other in annotators
            if one != other
        }
        self.images = 0
        count = len(self.classes)
        self._pixels, self._votes = 0, np.zeros(count, np.int64)  # of Fleiss' kappa
        self._pairs = np.zeros(count, np.int64)
        self._distances = np.zeros(FARTHEST + 1, np.int64)

    def update(self, maps: Sequence[np.ndarray], prediction: np.ndarray | None = None) -> None:
        """Adds one image.

        Args:
            maps: of each annotator, [H, W] integers, 255 = void.
            prediction: [H, W], if there is one.

        Raises:
            LabelError: the maps differ in size, or hold values that are no class.
        """
        stack = np.stack(_checked(maps, prediction))
        count = len(self.classes)
        votes = np.stack([(stack == k).sum(0) for k in range(count)])  # [C, H, W]
        said = votes.sum(0)
        plurality = np.where(said > 0, votes.argmax(0), VOID).astype(np.uint8)
        every = {**dict(zip(self.annotators, stack, strict=True)), PLURALITY: plurality}
        if prediction is not None:
            every[PREDICTION] = np.asarray(prediction)
        for (one, other), metric in self._metrics.items():
            metric.update_labels(every[one], every[other])
        whole = said == len(stack)
        inside = votes[:, whole].astype(np.int64)
        self._pixels += int(whole.sum())
        self._votes += inside.sum(1)
        self._pairs += (inside * (inside - 1)).sum(1)
        self._add_boundaries(stack)
        self.images += 1

    def _add_boundaries(self, stack: np.ndarray) -> None:
        from scipy import ndimage

        edges = [_boundary(labels) for labels in stack]
        far = [ndimage.distance_transform_edt(~edge) if edge.any() else None for edge in edges]
        for a, b in itertools.permutations(range(len(stack)), 2):
            other = far[b]
            if edges[a].any() and other is not None:
                found = np.rint(other[edges[a]]).astype(np.int64).clip(0, FARTHEST)
                self._distances += np.bincount(found, minlength=FARTHEST + 1)

    def compute(self, **protocol: Any) -> Agreement:
        """What has been added up."""
        scores = {key: metric.compute() for key, metric in self._metrics.items()}
        who = dict.fromkeys(one for one, _ in scores)
        miou = {
            one: tuple(
                float(scores[one, other]["miou"]) if one != other else math.nan
                for other in self.annotators
            )
            for one in who
        }
        iou = {}
        for name in self.classes:
            values = [
                float(scores[a, b]["per_class"][name]["iou"])
                for a, b in itertools.permutations(self.annotators, 2)
            ]
            known = [value for value in values if not math.isnan(value)]
            iou[name] = math.fsum(known) / len(known) if known else math.nan
        kappa, class_kappa = self._kappa()
        return Agreement(
            self.classes,
            self.annotators,
            self.images,
            miou,
            iou,
            kappa,
            dict(zip(self.classes, class_kappa, strict=True)),
            self._boundary(),
            protocol,
        )

    def _kappa(self) -> tuple[float, list[float]]:
        """Fleiss (Psychological Bulletin 1971), of all classes and of each against the rest."""
        raters, pixels = len(self.annotators), self._pixels
        if not pixels:
            return math.nan, [math.nan] * len(self.classes)
        pairs = pixels * raters * (raters - 1)
        share = self._votes / (pixels * raters)
        kappa = _kappa(float(self._pairs.sum() / pairs), float((share**2).sum()))
        each = []
        for k, p in enumerate(share):
            rest = pairs - 2 * (raters - 1) * self._votes[k] + self._pairs[k]
            agreed = float((self._pairs[k] + rest) / pairs)
            each.append(_kappa(agreed, float(p**2 + (1 - p) ** 2)))
        return kappa, each

    def _boundary(self) -> dict[str, float]:
        total = int(self._distances.sum())
        if not total:
            return dict.fromkeys(("mean", "median", "p95"), math.nan)
        below = self._distances.cumsum()
        return {
            "mean": float((self._distances * np.arange(FARTHEST + 1)).sum() / total),
            "median": float(np.searchsorted(below, 0.5 * total)),
            "p95": float(np.searchsorted(below, 0.95 * total)),
        }


def _kappa(agreed: float, chance: float) -> float:
    return (agreed - chance) / (1 - chance) if chance < 1 else math.nan


def _boundary(labels: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour has another label."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    edge[:-1] |= labels[1:] != labels[:-1]
    return edge


def _checked(maps: Sequence[np.ndarray], prediction: np.ndarray | None) -> list[np.ndarray]:
    arrays = [np.asarray(labels) for labels in maps]
    shapes = {array.shape for array in arrays}
    if prediction is not None:
        shapes.add(np.asarray(prediction).shape)
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise LabelError(
            "label maps of one image must be of one size [H, W], got "
            + ", ".join(str(list(shape)) for shape in sorted(shapes))
        )
    return arrays


def score_annotators(
    annotators: Sequence[PathLike],
    predictions: PathLike | None = None,
    *,
    classes: Sequence[str] | PathLike | int | None = None,
    ignore_index: int = VOID,
    track: Callable[[Sequence[Any]], Iterable[Any]] = notebook_bar,
) -> Agreement:
    """Several people's label maps held against each other, and predictions against each.

    Args:
        annotators: a folder of label maps each, of the same images, as `pyseg.scoring.score_files`
            takes them.
        predictions: a folder of label maps; None = people alone.
        classes: as of `pyseg.scoring.score_files`; None = the list in or by the first folder.
        ignore_index: value of pixels without a label.
        track: wraps the sequence of images.

    Raises:
        ScoreError, LabelError: fewer than two annotators, a folder is absent or lacks an image,
            sizes differ, values are no class ids.

    Example:
        >>> found = score_annotators(["anna", "ben", "carl"], "predictions", classes=2)
        >>> found.of("prediction"), found.human
    """
    folders = [Path(folder) for folder in annotators]
    if len(folders) < 2:
        AgreementTally((), [folder.name for folder in folders])
    sides = [*folders, *([] if predictions is None else [Path(predictions)])]
    for side in sides:
        if not side.is_dir():
            raise ScoreError(
                f"{str(side)!r} is no folder; annotators are compared by their label maps"
            )
    chosen = _class_list(classes, folders[0])
    reader = _Reader(chosen, chosen.labels, ignore_index, False)
    guesses = _Reader(chosen, "indices", ignore_index, False)
    files = [_files(side, "annotators", ())[0] for side in sides]
    for found, side in zip(files[1:], sides[1:], strict=True):
        _check_pairs(found, files[0], side, sides[0])
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    tally = AgreementTally(chosen.classes, names, predictions is not None)
    for name in track([*files[0]]):
        maps = [reader.read(found[name])[0].numpy() for found in files[: len(folders)]]
        guess = None if predictions is None else guesses.read(files[-1][name])[0].numpy()
        try:
            tally.update(maps, guess)
        except LabelError as error:
            for found in files[: len(folders)]:
                reader.explain(found[name], "label")
            if predictions is not None:
                guesses.explain(files[-1][name], "prediction")
            raise LabelError(f"image {name!r}: {error}") from error
    return tally.compute(void_values=reader.void)


__all__ = ["Agreement", "AgreementTally", "score_annotators"]
