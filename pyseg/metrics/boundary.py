"""`Boundary`: Boundary IoU, boundary F score and IoU in a trimap."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LabelError
from ..ops import boundary_mask, boundary_match, confusion_counts
from ..ops.boundary_mask import boundary_distance
from ..ops.boundary_match import contours
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

MEASURES = ("boundary_iou", "bf", "trimap")
ONE = 2**40  # of fixed-point fractions, so that sums do not depend on their order


class Boundary:
    """How well the boundaries of classes are met, in three ways.

    **Boundary IoU** (Cheng et al., 2021): intersection over union of a class's pixels that are at
    most d from its outside in the prediction with those in the ground truth, d a share of the
    diagonal; pixels are summed over all images, as in mIoU. The image's border is an outside.

    **BF score** (Csurka et al., 2013; as SegNet reports it): per image and class the harmonic mean
    of precision and recall of contour pixels, of which one is right if the other map has a contour
    pixel of the class within the tolerance; averaged over the classes with a contour in either map,
    then over images. It is 0 where precision or recall is.

    **Trimap IoU** (Kohli et al., 2009): mIoU of the pixels within d of a boundary of the ground
    truth, on both its sides; the image's border is no boundary here.

    Void in the ground truth is void in the prediction too, whatever it says there. Otherwise void
    is a label like any other: a class that ends at void has a boundary there, in both maps.

    Args:
        classes: names of the C classes, or C.
        ignore_index: label of pixels without ground truth, and of void predictions.
        ratio: d of Boundary IoU and trimap, as a share of the image's diagonal.
        tolerance: of the BF score, as a share of the diagonal; distances are Euclidean.
        matching: ``"distance"``, where several contour pixels may be matched by the same one (the
            usual distance transform), or ``"one-to-one"``, the largest set of pairs, which SegNet's
            tool (from BSDS) looks for; slower, and never more.
        measures: which of ``"boundary_iou"``, ``"bf"`` and ``"trimap"`` to take; the others are
            nan. The BF score takes half of the time, or with pairs nearly all.

    Example:
        >>> metric = Boundary(("road", "sky"))
        >>> metric.update(prediction, sample)
        >>> metric.compute()["boundary_iou"]
    """

    headline = ("boundary_iou", "bf")  # what tables show first
    averages = (
        "boundary and trimap IoU: pixels are summed over all images, means are over the classes "
        "that have one; BF: over an image's classes, then over images"
    )

    def __init__(
        self,
        classes: Sequence[str] | int,
        *,
        ignore_index: int = VOID,
        ratio: float = 0.02,
        tolerance: float = 0.0075,
        matching: str = "distance",
        measures: Collection[str] = MEASURES,
    ) -> None:
        names = class_names(classes, "Boundary")
        for name, share in (("ratio", ratio), ("tolerance", tolerance)):
            if not 0 < share < 1:
                raise ValueError(
                    f"{name} is a share of the image's diagonal, between 0 and 1, got {share}"
                )
        if matching not in ("distance", "one-to-one"):
            raise ValueError(f"matching must be 'distance' or 'one-to-one', got {matching!r}")
        check_ignore_index(ignore_index, len(names))
        if isinstance(measures, str) or not measures or not set(measures) <= set(MEASURES):
            raise ValueError(f"measures must be some of {', '.join(MEASURES)}, got {measures!r}")
        self.classes = names
        self.measures = frozenset(measures)
        self.ignore_index = ignore_index
        self.ratio, self.tolerance, self.matching = ratio, tolerance, matching
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        count = len(self.classes)
        # On the CPU until the first update, then wherever the predictions are.
        self._areas = torch.zeros(count, 3, dtype=torch.int64)
        self._trimap = torch.zeros(count, 3, dtype=torch.int64)
        self._bf = torch.zeros(count + 1, 2, dtype=torch.int64)
        self._invalid = torch.zeros(3, dtype=torch.int64)

    def update(self, prediction: Segmentation, sample: Sample) -> None:
        """Counts one image.

        Args:
            prediction: its ``labels`` [H, W] are scored.
            sample: must have ``labels`` [H, W].

        Raises:
            LabelError: the sample has no labels, sizes differ, or labels are no class ids.
            ScoreError: the logits hold NaN. On CUDA this and wrong ids come from `compute`.
        """
        undefined = nan_images(prediction, sample.name)
        labels = prediction.labels
        target = target_of(prediction, sample, labels.device)
        self._add(labels, target, undefined, f"sample {sample.name!r}: ")

    def update_labels(self, prediction: Tensor | np.ndarray, target: Tensor | np.ndarray) -> None:
        """Counts label maps, without anything around them.

        Args:
            prediction: [H, W] or [N, H, W] class ids, ``ignore_index`` = void.
            target: of the same shape.

        Raises:
            LabelError: shapes differ, values are not integers, or labels are no class ids (on CUDA
                the last comes from `compute`).
        """
        labels, truth = label_maps(prediction, target)
        undefined = torch.zeros((), dtype=torch.int64, device=labels.device)
        for ours, theirs in zip(labels, truth, strict=True):
            self._add(ours, theirs, undefined, "")

    def _add(self, labels: Tensor, target: Tensor, undefined: Tensor, what: str) -> None:
        """Counts one image, both [H, W]; ``what`` begins messages."""
        common = torch.promote_types(labels.dtype, target.dtype)
        if self.ignore_index < 0:
            common = torch.promote_types(common, torch.int16)
        target = target.to(common)[None]
        known = target != self.ignore_index
        labels = _keep(labels.to(common)[None], known, self.ignore_index)
        radius = self.tolerance * math.hypot(*target.shape[1:])
        count = len(self.classes)
        try:
            if "bf" in self.measures:
                matches, invalid = boundary_match(labels, target, count, radius, self.ignore_index)
            else:  # labels out of range are looked for all the same
                invalid = confusion_counts(labels, target, count, self.ignore_index).invalid
        except ValueError as error:
            raise LabelError(f"{what}{error}") from error
        self._invalid = self._invalid.to(labels.device) + torch.cat([invalid[0], undefined[None]])
        if "bf" in self.measures:
            if self.matching == "one-to-one":
                matches = self._one_to_one(labels[0], target[0], radius)[None].to(target.device)
            self._add_scores(matches[0])
        distance = boundary_distance(target.shape[1:], self.ratio)
        if "boundary_iou" in self.measures:
            # Pixels that are no boundary become one more class.
            inner = count if self.ignore_index != count else count + 1
            wide = common if inner < 127 else torch.promote_types(common, torch.int16)
            ours, theirs = (
                _keep(side.to(wide), boundary_mask(side, distance), inner)
                for side in (labels, target)
            )
            theirs = _keep(theirs, known, self.ignore_index)
            self._areas = self._areas.to(labels.device) + self._overlaps(ours, theirs, inner + 1)
        if "trimap" in self.measures:
            band = boundary_mask(target, distance, border=False)
            near = _keep(target, band, self.ignore_index)
            self._trimap = self._trimap.to(labels.device) + self._overlaps(labels, near, count)

    def _add_scores(self, matches: Tensor) -> None:
        predicted, right, truth, found = matches.double().unbind(1)
        present = predicted + truth > 0
        precision, recall = right / predicted.clamp(min=1), found / truth.clamp(min=1)
        total = precision + recall
        score = torch.where(total > 0, 2 * precision * recall / total, 0.0)
        score = (score * ONE).round().long()
        classes = present.sum()
        # the image's mean, by integer division: the same on every machine
        mean = (score.sum() + classes // 2) // classes.clamp(min=1)
        rows = torch.cat(
            [
                torch.stack([score, present.long()], 1),
                torch.stack([mean, (classes > 0).long()])[None],
            ]
        )
        self._bf = self._bf.to(matches.device) + rows

    def _overlaps(self, labels: Tensor, target: Tensor, num_classes: int) -> Tensor:
        """Pixels in both, in the prediction, in the target, per class, [C, 3]."""
        wide = torch.promote_types(labels.dtype, target.dtype)
        matrix, missed, _ = confusion_counts(
            labels.to(wide), target.to(wide), num_classes, self.ignore_index
        )
        sums = [matrix[0].diagonal(), matrix[0].sum(0), matrix[0].sum(1) + missed[0]]
        return torch.stack(sums, 1)[: len(self.classes)]

    def _one_to_one(self, labels: Tensor, target: Tensor, radius: float) -> Tensor:
        """What boundary_match counts, for the largest set of pairs without a common pixel."""
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import maximum_bipartite_matching
        from scipy.spatial import cKDTree

        counts = torch.zeros(len(self.classes), 4, dtype=torch.int64)
        edges = [(side.cpu(), contours(side).cpu()) for side in (labels, target)]
        for k in range(len(self.classes)):
            if k == self.ignore_index:
                continue
            ours, theirs = (((side == k) & edge).nonzero().numpy() for side, edge in edges)
            matched = 0
            if len(ours) and len(theirs):
                reach = math.sqrt(math.floor(radius * radius)) + 1e-6  # distances are of integers
                near = cKDTree(theirs).query_ball_point(ours, reach)
                columns = np.concatenate([np.asarray(row, dtype=np.int32) for row in near])
                starts = np.cumsum([0, *map(len, near)])
                graph = csr_array(
                    (np.ones(len(columns), np.int8), columns, starts),
                    shape=(len(ours), len(theirs)),
                )
                matched = int((maximum_bipartite_matching(graph, perm_type="column") >= 0).sum())
            counts[k] = torch.tensor([len(ours), matched, len(theirs), matched])
        return counts

    def state(self) -> dict[str, Tensor]:
        """Integers whose sum over processes is the state of the whole.

        ``areas`` and ``trimap`` [C, 3] (pixels in both, in the prediction, in the ground truth),
        ``bf`` [C + 1, 2] (sum of F scores in units of 2^-40 and number of images, per class and, in
        the last row, of the images' means) and ``invalid`` [3] (predictions and targets out of
        range, images with NaN logits), all int64.
        """
        return {
            "areas": self._areas,
            "trimap": self._trimap,
            "bf": self._bf,
            "invalid": self._invalid,
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the counts by ``state``, as `state` gives them."""
        self._areas, self._trimap, self._bf, self._invalid = copied(state, self.state())

    def compute(self) -> dict[str, Any]:
        """The scores so far, as fractions.

        Returns:
            ``boundary_iou`` and ``trimap_miou``, averaged over the classes that have one, ``bf``,
            averaged over images; ``per_class`` name -> ``boundary_iou``, ``bf``, ``trimap_iou``;
            ``classes_counted``, the number of classes with a Boundary IoU. A class that does not
            occur has nan, and so have averages of nothing and what ``measures`` leaves out.

        Raises:
            LabelError: labels out of range were seen on CUDA.
            ScoreError: NaN logits were seen on CUDA.
        """
        raise_invalid(self._invalid, len(self.classes), self.ignore_index)
        iou, trimap = _iou(self._areas), _iou(self._trimap)
        sums, images = self._bf.cpu().double().unbind(1)
        bf = sums / ONE / images  # nan of no images
        return {
            "boundary_iou": iou.nanmean().item(),
            "bf": bf[-1].item(),
            "trimap_miou": trimap.nanmean().item(),
            "per_class": {
                name: {
                    "boundary_iou": iou[index].item(),
                    "bf": bf[index].item(),
                    "trimap_iou": trimap[index].item(),
                }
                for index, name in enumerate(self.classes)
            },
            "classes_counted": int((~iou.isnan()).sum()),
        }


def _keep(labels: Tensor, mask: Tensor, value: int) -> Tensor:
    """``labels.masked_fill(~mask, value)``, which takes torch ten times as long for bytes."""
    other = mask.to(labels.dtype).sub_(1)  # all bits where the mask is not, else none
    return (labels ^ value).bitwise_and_(other).bitwise_xor_(labels)


def _iou(areas: Tensor) -> Tensor:
    both, predicted, truth = areas.cpu().double().unbind(1)
    return both / (predicted + truth - both)  # 0 / 0 = nan
