"""`Semantic`: IoU, accuracy, precision, recall, F1 and kappa from one confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LabelError
from ..ops import ConfusionCounts, confusion_counts, upsample_confusion
from ..types import VOID, Sample, Segmentation
from .inputs import (
    check_ignore_index,
    class_names,
    copied,
    label_maps,
    nan_images,
    raise_invalid,
    target_of,
)


class Semantic:
    """Semantic segmentation scores over a dataset, from counts of pixels.

    Per class, with tp, fp and fn summed over all images: IoU = tp / (tp + fp + fn) (the Jaccard
    index of Pascal VOC), precision = tp / (tp + fp), recall = tp / (tp + fn), F1 = 2 tp / (2 tp +
    fp + fn) (the Dice coefficient). Pixels without ground truth count nowhere. A pixel with ground
    truth that is predicted void is a false negative of its class and a false positive of none.

    A class that is neither in the ground truth nor predicted has no scores: they are nan, and means
    are taken over the others; ``classes_counted`` and ``classes_absent`` say how many and which. A
    class that is in the ground truth and never predicted has precision 0; a class that is predicted
    and not in the ground truth has IoU, precision and F1 of 0, and no recall.

    Args:
        classes: names of the C classes; or C, where the names do not matter.
        num_classes: C, as the other way to say so.
        ignore_index: label of pixels without ground truth, and of void predictions.
        reduce_zero_label: the ground truth counts its classes from 1 and 0 has no class, as in
            ADE20K's files: 0 becomes ``ignore_index`` and k becomes k - 1. Predictions stay.
        subset: names or indices of the classes that means are taken over; None = all. Scores that
            count pixels (accuracy, fwiou, kappa, void) stay over all pixels, and a pixel of another
            class that is predicted as one of these is a false positive of it.

    Example:
        >>> metric = Semantic(classes=("road", "sky"))
        >>> metric.update(prediction, sample)
        >>> metric.compute()["miou"]
        >>> metric = Semantic(19)
        >>> metric.update_labels(predicted, target)   # arrays or tensors of class ids
    """

    headline = ("miou", "pixel_accuracy")  # what tables show first
    averages = (
        "pixels are summed over all images, means are over the classes that occur in the ground "
        "truth or are predicted"
    )

    def __init__(
        self,
        classes: Sequence[str] | int | None = None,
        *,
        num_classes: int | None = None,
        ignore_index: int = VOID,
        reduce_zero_label: bool = False,
        subset: Sequence[str | int] | None = None,
    ) -> None:
        names = class_names(num_classes if classes is None else classes, "Semantic")
        if num_classes is not None and len(names) != num_classes:
            raise ValueError(
                f"classes has {len(names)} names, num_classes is {num_classes}; "
                "give at least one class, and either of them"
            )
        check_ignore_index(ignore_index, len(names))
        self.classes = names
        self.ignore_index = ignore_index
        self.reduce_zero_label = reduce_zero_label
        self._subset = _indices(subset, self.classes)
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        count = len(self.classes)
        # On the CPU until the first update, then wherever the predictions are.
        self._matrix = torch.zeros(count, count, dtype=torch.int64)
        self._missed = torch.zeros(count, dtype=torch.int64)
        self._invalid = torch.zeros(3, dtype=torch.int64)

    def update(self, prediction: Segmentation, sample: Sample) -> None:
        """Counts one image.

        Args:
            prediction: its ``labels`` [H, W] are scored, or its ``logits`` where those are not
                made yet, with the same result.
            sample: must have ``labels`` [H, W].

        Raises:
            LabelError: the sample has no labels, sizes differ, or labels are no class ids.
            ScoreError: the logits hold NaN. On CUDA this and wrong ids come from `compute`, so that
                nothing waits for the device.
        """
        undefined = nan_images(prediction, sample.name)
        logits, count = prediction.logits, len(self.classes)
        # Labels that nobody has asked for yet need not be made.
        fused = prediction._labels is None and logits is not None and logits.shape[0] == count
        device = logits.device if logits is not None and fused else prediction.labels.device
        target = self._reduced(target_of(prediction, sample, device))
        try:
            if logits is not None and fused:
                counts = upsample_confusion(
                    logits[None], target[None], ignore_index=self.ignore_index
                )
            else:
                counts = confusion_counts(
                    prediction.labels[None], target[None], count, self.ignore_index
                )
        except ValueError as error:
            raise LabelError(f"sample {sample.name!r}: {error}") from error
        self._add(counts, undefined)

    def update_labels(self, prediction: Tensor | np.ndarray, target: Tensor | np.ndarray) -> None:
        """Counts label maps, without anything around them.

        Args:
            prediction: [H, W] or [N, H, W] class ids, ``ignore_index`` = void.
            target: of the same shape.

        Raises:
            LabelError: shapes differ, values are not integers, or labels are no class ids (on CUDA
                the last comes from `compute`).

        Example:
            >>> metric = Semantic(2)
            >>> metric.update_labels(np.array([[0, 1]]), np.array([[0, 0]]))
            >>> metric.compute()["pixel_accuracy"]
            0.5
        """
        labels, truth = label_maps(prediction, target)
        truth = self._reduced(truth)
        try:
            counts = confusion_counts(labels, truth, len(self.classes), self.ignore_index)
        except ValueError as error:
            raise LabelError(str(error)) from error
        self._add(counts, torch.zeros((), dtype=torch.int64, device=labels.device))

    def _add(self, counts: ConfusionCounts, undefined: Tensor) -> None:
        device = counts.matrix.device
        invalid = torch.cat([counts.invalid.sum(0), undefined[None]])
        self._matrix = self._matrix.to(device) + counts.matrix.sum(0)
        self._missed = self._missed.to(device) + counts.missed.sum(0)
        self._invalid = self._invalid.to(device) + invalid

    def _reduced(self, target: Tensor) -> Tensor:
        if not self.reduce_zero_label:
            return target
        wide = target.to(torch.int32)
        kept = (wide != 0) & (wide != self.ignore_index)
        return torch.where(kept, wide - 1, self.ignore_index)

    def state(self) -> dict[str, Tensor]:
        """Counts whose sum over processes is the state of the whole.

        ``matrix`` [C, C] int64 (rows = target), ``missed`` [C] int64 (predicted void, by target)
        and ``invalid`` [3] int64 (predictions and targets out of range, images with NaN logits).
        """
        return {"matrix": self._matrix, "missed": self._missed, "invalid": self._invalid}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the counts by ``state``, as `state` gives them."""
        self._matrix, self._missed, self._invalid = copied(state, self.state())

    def compute(self) -> dict[str, Any]:
        """The scores so far, as fractions.

        Returns:
            ``miou``, ``pixel_accuracy``, ``mean_accuracy`` (recall, averaged over the classes of
            the ground truth), ``precision``, ``recall`` and ``f1`` (averaged over classes; recall
            equals mean_accuracy by definition), ``fwiou`` (IoU weighted by the class's share of
            the ground truth), ``kappa`` (Cohen 1960: agreement beyond what the shares of the
            classes give by chance, void predictions being a class of their own; nan where chance
            alone agrees everywhere), ``void`` (share of the pixels with ground truth predicted
            void);
            ``per_class`` name -> ``iou``, ``precision``, ``recall``, ``f1``, ``pixels`` (of ground
            truth); ``classes_counted``, the number of classes whose IoU is in miou, and
            ``classes_absent``, the names of those that have none. All nan where nothing was scored.

        Raises:
            LabelError: labels out of range were seen on CUDA.
            ScoreError: NaN logits were seen on CUDA.
        """
        raise_invalid(self._invalid, len(self.classes), self.ignore_index)
        matrix, missed = self._matrix.cpu().double(), self._missed.cpu().double()
        tp = matrix.diagonal()
        truth = matrix.sum(1) + missed
        predicted = matrix.sum(0)
        union = truth + predicted - tp
        present = union > 0
        counted = present & self._subset
        nan = torch.full_like(tp, torch.nan)
        iou = torch.where(present, tp / union, nan)
        f1 = torch.where(present, 2 * tp / (truth + predicted), nan)
        precision = torch.where(present, tp / predicted.clamp(min=1), nan)
        recall = torch.where(truth > 0, tp / truth, nan)
        total = truth.sum()
        weighted = torch.where(truth > 0, truth * iou, 0.0).sum() / total
        agreement = tp.sum() / total
        chance = (truth / total * (predicted / total)).sum()
        columns = {"iou": iou, "precision": precision, "recall": recall, "f1": f1}
        return {
            "miou": iou[self._subset].nanmean().item(),
            "pixel_accuracy": agreement.item(),
            "mean_accuracy": recall[self._subset].nanmean().item(),
            "precision": precision[self._subset].nanmean().item(),
            "recall": recall[self._subset].nanmean().item(),
            "f1": f1[self._subset].nanmean().item(),
            "fwiou": weighted.item(),
            "kappa": ((agreement - chance) / (1 - chance)).item(),
            "void": (missed.sum() / total).item(),
            "per_class": {
                name: {
                    **{key: column[index].item() for key, column in columns.items()},
                    "pixels": int(truth[index]),
                }
                for index, name in enumerate(self.classes)
            },
            "classes_counted": int(counted.sum()),
            "classes_absent": [
                self.classes[index]
                for index in (self._subset & ~present).nonzero().flatten().tolist()
            ],
        }


def _indices(subset: Sequence[str | int] | None, classes: tuple[str, ...]) -> Tensor:
    """Which of ``classes`` are in ``subset``, [C] bool."""
    chosen = torch.zeros(len(classes), dtype=torch.bool)
    if subset is None:
        return ~chosen
    if isinstance(subset, (str, int)) or not subset:
        raise ValueError(f"subset must be a list of class names or indices, got {subset!r}")
    for entry in subset:
        index = classes.index(entry) if entry in classes else entry
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(classes):
            raise ValueError(
                f"subset holds {entry!r}, which is no class: the classes are "
                f"0 to {len(classes) - 1}, {', '.join(classes[:20])}"
            )
        chosen[index] = True
    return chosen
