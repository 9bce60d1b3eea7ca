"""`Binary`: one class against the rest, at a threshold and over all thresholds (ROC, PR)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..types import VOID, Sample, Segmentation
from .inputs import (
    check_probabilities,
    checked_logits,
    checked_targets,
    class_names,
    class_targets,
    copied,
    label_maps,
    nan_count,
    raise_invalid,
    score_maps,
)

LIMIT = 32  # log-odds that the histogram spans: a probability of 1e-14 and of 1 - 1e-14
SHOWN_THRESHOLDS = 256  # in compute(), which becomes JSON; `curves` has all


class Curves(NamedTuple):
    """Rates at every threshold, from all positive to none; each [bins + 1] float64."""

    thresholds: Tensor  # probabilities; the first is 0, the last 1
    precision: Tensor  # nan where nothing is predicted positive
    recall: Tensor  # = true positive rate
    false_positive_rate: Tensor


class Binary:
    """Scores of a one-class task (cells, roads, lesions) over a dataset, from counts of pixels.

    A pixel's score is the probability of the positive class, at full resolution; it is predicted
    positive where that is at least the threshold. Pixels without ground truth count nowhere.

    The curves come from a histogram of the score's log-odds, log(p / (1 - p)), with equal bins
    [k, k + 1) * 64 / ``bins`` from -32 to 32; what lies beyond falls into the outer bins. So sure
    scores, near 0 and 1, are told apart as well as others. The counts are integers that add over
    images and processes. Scores of one bin count as equal: roc_auc and average_precision are
    exactly those of the log-odds rounded down to bins, and the area is off by at most half the
    share of the pairs of a positive and a negative pixel that lie in one bin.

    Args:
        classes: names of the C >= 2 classes, or C.
        positive: name or index of the positive class; None = the last.
        threshold: of the scores at a threshold, within 0..1.
        bins: of the histogram; a power of two from 64 on, so that float32 meets edges exactly.
        ignore_index: label of pixels without ground truth.

    Example:
        >>> metric = Binary(("background", "cell"), threshold=0.3)
        >>> metric.update(prediction, sample)
        >>> metric.compute()["roc_auc"]
    """

    headline = ("iou", "f1", "roc_auc", "average_precision")
    averages = "pixels are summed over all images"

    def __init__(
        self,
        classes: Sequence[str] | int = ("background", "object"),
        *,
        positive: str | int | None = None,
        threshold: float = 0.5,
        bins: int = 8192,
        ignore_index: int = VOID,
    ) -> None:
        self.classes = class_names(classes, "Binary")
        if len(self.classes) < 2:
            raise ValueError(
                "Binary needs the names of at least two classes, the positive one and "
                f"the background, got {classes!r}"
            )
        if positive is None:
            positive = len(self.classes) - 1
        index = self.classes.index(positive) if positive in self.classes else positive
        if not isinstance(index, int) or not 0 <= index < len(self.classes):
            names = ", ".join(self.classes[:20])
            raise ValueError(
                f"positive={positive!r} is no class: the classes are 0 to "
                f"{len(self.classes) - 1}, {names}"
            )
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be within 0..1, got {threshold}")
        if not 64 <= bins <= 65536 or bins & (bins - 1):
            raise ValueError(f"bins must be a power of two from 64 to 65536, got {bins}")
        self.positive, self.threshold, self.bins = index, threshold, bins
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self._counts = torch.zeros(2, 2, dtype=torch.int64)
        self._histogram = torch.zeros(2, self.bins, dtype=torch.int64)
        self._invalid = torch.zeros(3, dtype=torch.int64)

    def update(self, prediction: Segmentation, sample: Sample) -> None:
        """Counts one image: its ``logits`` against the sample's ``labels`` [H, W].

        Raises:
            LabelError: the sample has no labels, sizes differ, or labels are no class ids.
            ScoreError: there are no logits, or they hold NaN. On CUDA NaN and wrong ids come from
                `compute`, so that nothing waits for the device.
        """
        self._add_logits(*class_targets(prediction, sample, len(self.classes), self.ignore_index))

    def update_logits(self, logits: Tensor | np.ndarray, target: Tensor | np.ndarray) -> None:
        """Counts images given by their logits, without anything around them.

        Args:
            logits: [C, h, w] or [N, C, h, w] floating point, upsampled to the target's size.
            target: [H, W] or [N, H, W] class ids.

        Raises:
            LabelError, ScoreError: as `update`; or shapes that do not fit.
        """
        for one, truth in zip(*score_maps(logits, target, planes=True), strict=True):
            self._add_logits(
                *checked_logits(one, truth, len(self.classes), self.ignore_index, "the target")
            )

    def update_probabilities(
        self, probabilities: Tensor | np.ndarray, target: Tensor | np.ndarray
    ) -> None:
        """Counts images given by the probability of the positive class.

        Args:
            probabilities: [H, W] or [N, H, W] in 0..1.
            target: class ids of the same shape.

        Raises:
            LabelError, ScoreError: labels that are no class ids, or what are no probabilities, as
                far as the CPU can tell.

        Example:
            >>> metric = Binary()
            >>> metric.update_probabilities(np.array([[0.1, 0.8]]), np.array([[0, 1]]))
            >>> metric.compute()["iou"]
            1.0
        """
        values, truth = score_maps(probabilities, target, planes=False)
        check_probabilities(values, planes=False)
        undefined = nan_count(values, "the probabilities")
        truth, wrong = checked_targets(truth, len(self.classes), self.ignore_index, "the target")
        invalid = torch.stack([torch.zeros_like(wrong), wrong, undefined])
        self._add(truth, values.logit(), values >= self.threshold, invalid)

    def update_labels(self, prediction: Tensor | np.ndarray, target: Tensor | np.ndarray) -> None:
        """Counts label maps: what is predicted positive has the probability 1, all else 0.

        Args:
            prediction: [H, W] or [N, H, W] class ids, ``ignore_index`` = void.
            target: of the same shape.

        Raises:
            LabelError: shapes differ, values are not integers, or labels are no class ids (on CUDA
                the last comes from `compute`).
        """
        labels, truth = label_maps(prediction, target)
        count = len(self.classes)
        labels, strange = checked_targets(labels, count, self.ignore_index, "the prediction")
        truth, wrong = checked_targets(truth, count, self.ignore_index, "the target")
        positive = labels == self.positive
        odds = torch.where(positive, math.inf, -math.inf)
        self._add(truth, odds, positive, torch.stack([strange, wrong, torch.zeros_like(wrong)]))

    def _add_logits(self, target: Tensor, logits: Tensor, invalid: Tensor) -> None:
        """Counts an image, as `checked_logits` gives it."""
        rest = [k for k in range(len(self.classes)) if k != self.positive]
        odds = (logits[self.positive] - logits[rest].logsumexp(0)).nan_to_num(0.0)
        self._add(target, odds, odds.sigmoid() >= self.threshold, invalid)

    def _add(self, target: Tensor, odds: Tensor, positive: Tensor, invalid: Tensor) -> None:
        """Counts pixels: ids, -1 where there is none, log-odds, and what is predicted positive."""
        valid = target >= 0
        odds = odds[valid].nan_to_num(
            0.0, math.inf, -math.inf
        )  # NaN, which is reported, has no bin
        truth = (target[valid] == self.positive).long()
        counts = torch.bincount(2 * truth + positive[valid], minlength=4).view(2, 2)
        half = self.bins // 2
        # Clamped as floats: infinite odds are no integers.
        place = (odds * (half // LIMIT)).floor().clamp(-half, half - 1).long() + half
        histogram = torch.bincount(truth * self.bins + place, minlength=2 * self.bins)
        device = target.device
        self._counts = self._counts.to(device) + counts
        self._histogram = self._histogram.to(device) + histogram.view(2, self.bins)
        self._invalid = self._invalid.to(device) + invalid

    def state(self) -> dict[str, Tensor]:
        """Counts whose sum over processes is the state of the whole.

        ``counts`` [2, 2] int64 (rows = target, columns = prediction; 1 = positive), ``histogram``
        [2, bins] int64 (log-odds by target) and ``invalid`` [3] int64.
        """
        return {
            "counts": self._counts,
            "histogram": self._histogram,
            "invalid": self._invalid,
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the counts by ``state``, as `state` gives them."""
        self._counts, self._histogram, self._invalid = copied(state, self.state())

    def curves(self) -> Curves:
        """Precision, recall and false positive rate at each of the ``bins`` + 1 bin edges."""
        negative, positive = self._histogram.cpu()
        zero = torch.zeros(1, dtype=torch.int64)
        # At edge k: everything in bin k and above is predicted positive.
        tp = torch.cat([positive.flip(0).cumsum(0).flip(0), zero]).double()
        fp = torch.cat([negative.flip(0).cumsum(0).flip(0), zero]).double()
        odds = torch.linspace(-LIMIT, LIMIT, self.bins + 1, dtype=torch.float64)
        thresholds = odds.sigmoid()
        thresholds[0], thresholds[-1] = 0, 1
        return Curves(thresholds, tp / (tp + fp), tp / tp[0], fp / fp[0])

    def compute(self) -> dict[str, Any]:
        """The scores so far, as fractions.

        Returns:
            At the threshold: ``iou``, ``f1`` (Dice), ``precision``, ``recall`` (sensitivity),
            ``specificity``, ``pixel_accuracy``. Over all thresholds: ``roc_auc`` (area under the
            ROC curve, ties counting half), ``average_precision`` (sum of precision times step of
            recall, without interpolation), ``best_iou`` and its ``best_threshold``, a bin edge.
            ``pixels`` and ``positives`` (of ground truth), and ``curves``: lists over 257 of the
            edges, or all of them if they are fewer. A score whose denominator is 0 is nan.

        Raises:
            LabelError, ScoreError: wrong labels or NaN logits were seen on CUDA.
        """
        raise_invalid(self._invalid, len(self.classes), self.ignore_index)
        (tn, fp), (fn, tp) = self._counts.tolist()
        curves = self.curves()
        recall = curves.recall
        steps = recall[:-1] - recall[1:]
        precision = curves.precision[:-1].nan_to_num(0.0)  # where nothing is positive, step is 0
        rate = curves.false_positive_rate
        width = rate[:-1] - rate[1:]
        negatives, positives = (self._histogram.cpu().sum(1)).double()
        hits, alarms = recall * positives, rate.nan_to_num(0.0) * negatives
        iou = hits / (positives + alarms)
        best = int(iou.nan_to_num(-1.0).argmax())
        some = positives > 0
        step = max(1, self.bins // SHOWN_THRESHOLDS)
        return {
            "iou": _ratio(tp, tp + fp + fn),
            "f1": _ratio(2 * tp, 2 * tp + fp + fn),
            "precision": _ratio(tp, tp + fp),
            "recall": _ratio(tp, tp + fn),
            "specificity": _ratio(tn, tn + fp),
            "pixel_accuracy": _ratio(tp + tn, tp + tn + fp + fn),
            "roc_auc": (width * (recall[:-1] + recall[1:]) / 2).sum().item(),
            "average_precision": (steps * precision).sum().item(),
            "best_iou": iou[best].item() if some else math.nan,
            "best_threshold": curves.thresholds[best].item() if some else math.nan,
            "pixels": tp + tn + fp + fn,
            "positives": tp + fn,
            "curves": {name: values[::step].tolist() for name, values in curves._asdict().items()},
        }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


__all__ = ["Binary", "Curves"]
