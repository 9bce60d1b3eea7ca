"""`Calibration`: whether confidences are probabilities: ECE, MCE, Brier score, NLL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ScoreError
from ..ops import upsample_argmax
from ..types import VOID, Sample, Segmentation
from .inputs import (
    check_ignore_index,
    check_probabilities,
    checked_logits,
    class_names,
    class_targets,
    copied,
    raise_invalid,
    score_maps,
)

# Sums of fractions are kept in fixed point, so that the order of images changes no bit. A pixel's
# share is rounded once, by at most half a unit.
PROBABILITY_UNIT = 2.0**-30
NLL_UNIT = 2.0**-24
NLL_LIMIT = 2.0**16  # a pixel's NLL from here on counts as infinite
STRIP = 2**14  # pixels
MAX_PIXELS = 2**32  # then the largest sums (Brier, up to 2 a pixel) end below 2^63


class Calibration:
    """How well predicted probabilities agree with how often they are right, over all pixels.

    Confidence is the largest class probability of a pixel, at full resolution. Pixels fall into
    equal bins of confidence, [k, k + 1) / ``bins`` with the last one closed (edges in float32);
    with n_b pixels, accuracy a_b and mean confidence c_b in bin b, ECE = sum n_b |a_b - c_b| / n
    and MCE = max |a_b - c_b| over the bins that hold pixels (Naeini et al. 2015; Guo et al. 2017).
    The Brier score is the mean of sum_c (p_c - [c = target])^2, from 0 to 2 (Brier 1950); NLL is
    the mean of -log p_target, in nats. Pixels without ground truth count nowhere.

    Args:
        classes: names of the C classes, or C.
        bins: number of bins of confidence.
        ignore_index: label of pixels without ground truth.

    Example:
        >>> metric = Calibration(("road", "sky"))
        >>> metric.update(prediction, sample)
        >>> metric.compute()["ece"]
    """

    headline = ("ece", "brier")
    averages = "over the pixels of all images that have ground truth"

    def __init__(
        self, classes: Sequence[str] | int, *, bins: int = 15, ignore_index: int = VOID
    ) -> None:
        names = class_names(classes, "Calibration")
        if not 1 <= bins <= 1000:
            raise ValueError(f"bins must be 1 to 1000, got {bins}")
        check_ignore_index(ignore_index, len(names))
        self.classes, self.bins, self.ignore_index = names, bins, ignore_index
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self._pixels, self._correct, self._confidence = torch.zeros(3, self.bins).long()
        self._sums = torch.zeros(3, dtype=torch.int64)
        self._invalid = torch.zeros(3, dtype=torch.int64)

    def update(self, prediction: Segmentation, sample: Sample) -> None:
        """Adds one image: its ``logits``, over its temperature, against the sample's ``labels``.

        Raises:
            LabelError: the sample has no labels, sizes differ, or labels are no class ids.
            ScoreError: there are no logits, or they hold NaN. On CUDA NaN and wrong ids come from
                `compute`, so that nothing waits for the device.
        """
        found = class_targets(prediction, sample, len(self.classes), self.ignore_index)
        self._add(*found, temperature=prediction.temperature)

    def update_logits(self, logits: Tensor | np.ndarray, target: Tensor | np.ndarray) -> None:
        """Adds images given by their logits, without anything around them.

        Args:
            logits: [C, h, w] or [N, C, h, w] floating point, upsampled to the target's size.
            target: [H, W] or [N, H, W] class ids.

        Raises:
            LabelError, ScoreError: as `update`; or shapes that do not fit.
        """
        for one, truth in zip(*score_maps(logits, target, planes=True), strict=True):
            self._add(
                *checked_logits(one, truth, len(self.classes), self.ignore_index, "the target")
            )

    def update_probabilities(
        self, probabilities: Tensor | np.ndarray, target: Tensor | np.ndarray
    ) -> None:
        """Adds images given by their class probabilities, such as a softmax or a CRF gives.

        Args:
            probabilities: [C, H, W] or [N, C, H, W] in 0..1, a pixel's adding up to 1.
            target: [H, W] or [N, H, W] class ids.

        Raises:
            LabelError, ScoreError: as `update`; or what are no probabilities of that size.
        """
        values, truth = score_maps(probabilities, target, planes=True)
        if values.shape[2:] != truth.shape[1:]:
            raise ScoreError(
                f"probabilities must have the target's size {list(truth.shape[1:])}, got "
                f"{list(values.shape[2:])}"
            )
        check_probabilities(values, planes=True)
        self.update_logits(values.log(), truth)

    def _add(
        self, target: Tensor, logits: Tensor, invalid: Tensor, *, temperature: float = 1.0
    ) -> None:
        """Adds an image, as `checked_logits` gives it."""
        said = upsample_argmax(logits[None], target.shape)[0]
        device, height = target.device, target.shape[0]
        # On the CPU a few rows at a time, whose intermediate results stay in the cache.
        rows = max(1, STRIP // target.shape[1]) if device.type == "cpu" else height
        for top in range(0, height, rows):
            part = slice(top, top + rows)
            self._add_pixels(logits[:, part] / temperature, target[part], said[part])
        self._invalid = self._invalid.to(device) + invalid

    def _add_pixels(self, logits: Tensor, target: Tensor, said: Tensor) -> None:
        """Adds pixels: logits [C, h, W], target [h, W], -1 where there is none, said [h, W]."""
        device, valid = target.device, target >= 0
        # Softmax with one exponential: e = exp(logit - largest), p = e / sum(e).
        shifted = logits - logits.amax(0)
        of_target = shifted.gather(0, target.clamp(min=0)[None])[0]
        e = shifted.exp_()
        total = e.sum(0)
        p_target = of_target.exp() / total
        brier = e.square_().sum(0) / total.square() - 2 * p_target + 1
        nll = total.log() - of_target
        # NaN, which compute() reports, has no bin.
        confidence, brier = (v.nan_to_num(0.0) for v in (total.reciprocal(), brier))
        edges = torch.linspace(0, 1, self.bins + 1, device=device)[1:-1]
        place = torch.bucketize(confidence, edges, right=True).masked_fill_(~valid, self.bins)

        def by_bin(values: Tensor) -> Tensor:
            sums = torch.zeros(self.bins + 1, dtype=torch.int64, device=device)
            return sums.scatter_add_(0, place.flatten(), values.flatten())[:-1]

        infinite = ~(nll < NLL_LIMIT)
        sums = [
            _fixed(brier, PROBABILITY_UNIT).masked_fill_(~valid, 0).sum(),
            _fixed(nll.masked_fill_(infinite, 0.0), NLL_UNIT).masked_fill_(~valid, 0).sum(),
            (infinite & valid).sum(),
        ]
        self._pixels = self._pixels.to(device) + by_bin(torch.ones_like(target))
        self._correct = self._correct.to(device) + by_bin((said == target).long())
        self._confidence = self._confidence.to(device) + by_bin(
            _fixed(confidence, PROBABILITY_UNIT)
        )
        self._sums = self._sums.to(device) + torch.stack(sums)

    def state(self) -> dict[str, Tensor]:
        """Integers whose sum over processes is the state of the whole.

        ``pixels``, ``correct`` and ``confidence`` (in 2^-30) by bin, each [bins]; ``sums`` [3]: the
        Brier score in 2^-30, the NLL in 2^-24, pixels of infinite NLL; ``invalid`` [3]. All int64.
        """
        return {
            "pixels": self._pixels,
            "correct": self._correct,
            "confidence": self._confidence,
            "sums": self._sums,
            "invalid": self._invalid,
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the sums by ``state``, as `state` gives them."""
        (
            self._pixels,
            self._correct,
            self._confidence,
            self._sums,
            self._invalid,
        ) = copied(state, self.state())

    def compute(self) -> dict[str, Any]:
        """The scores so far.

        Returns:
            ``ece``, ``mce``, ``brier``, ``nll`` (inf where a pixel's target had probability 0),
            ``pixel_accuracy``, ``confidence`` (mean), ``pixels``, and ``reliability``: lists by bin
            of ``lower`` edge, ``confidence`` and ``accuracy`` (nan in empty bins), ``pixels``;
            `pyseg.visual.reliability_diagram` draws it. All nan where nothing was scored.

        Raises:
            LabelError, ScoreError: wrong labels or NaN logits were seen on CUDA; more than 2^32
                pixels were added, which the sums cannot hold.
        """
        raise_invalid(self._invalid, len(self.classes), self.ignore_index)
        count = self._pixels.cpu().double()
        total = int(self._pixels.sum())
        if total > MAX_PIXELS:
            raise ScoreError(
                f"calibration sums hold {MAX_PIXELS} pixels, got {total}; score parts "
                "of the dataset one by one"
            )
        accuracy = self._correct.cpu().double() / count
        confidence = self._confidence.cpu().double() * PROBABILITY_UNIT / count
        gap = (accuracy - confidence).abs()
        brier, nll, infinite = self._sums.tolist()
        none = total == 0
        return {
            "ece": math.nan if none else (gap.nan_to_num(0.0) * count).sum().item() / total,
            "mce": math.nan if none else gap.nan_to_num(0.0).max().item(),
            "brier": math.nan if none else brier * PROBABILITY_UNIT / total,
            "nll": math.nan if none else math.inf if infinite else nll * NLL_UNIT / total,
            "pixel_accuracy": math.nan if none else int(self._correct.sum()) / total,
            "confidence": (
                math.nan if none else int(self._confidence.sum()) * PROBABILITY_UNIT / total
            ),
            "pixels": total,
            "reliability": {
                "lower": [k / self.bins for k in range(self.bins)],
                "confidence": confidence.tolist(),
                "accuracy": accuracy.tolist(),
                "pixels": self._pixels.tolist(),
            },
        }


def _fixed(values: Tensor, unit: float) -> Tensor:
    return (values / unit).round_().long()  # exact: units are powers of two
