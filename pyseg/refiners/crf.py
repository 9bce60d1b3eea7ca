"""Fully connected CRF as a refiner: snaps label boundaries to edges of the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Segmentation


class CRF:
    """Dense CRF by mean-field inference (Krähenbühl and Koltun, 2011) on the model's probabilities.

    The logits are upsampled to the image's size, their negative log-probabilities are the unary
    energies, and the result's logits are the logarithm of the marginals.

    Args:
        iterations: mean-field steps; 0 leaves the prediction as it is.
        gaussian: kernels over position, each (sigma_xy in pixels, weight).
        bilateral: kernels over position and colour, each (sigma_xy in pixels, sigma_rgb in grey
            levels, weight).

    Example:
        >>> pyseg.build("streetnet+crf(iterations=5, bilateral=((60, 10, 4),))")
    """

    def __init__(
        self,
        *,
        iterations: int = 10,
        gaussian: Sequence[tuple[float, float]] = ((3.0, 3.0),),
        bilateral: Sequence[tuple[float, float, float]] = ((80.0, 13.0, 10.0),),
    ) -> None:
        if iterations < 0:
            raise ValueError(f"iterations must be 0 or more, got {iterations}")
        self.iterations = iterations
        self.gaussian = _kernels("gaussian", gaussian, "(sigma_xy, weight)")
        self.bilateral = _kernels("bilateral", bilateral, "(sigma_xy, sigma_rgb, weight)")

    def __repr__(self) -> str:
        return (
            f"CRF(iterations={self.iterations}, gaussian={self.gaussian}, "
            f"bilateral={self.bilateral})"
        )

    def refine(self, image: Tensor, prediction: Segmentation) -> Segmentation:
        """Refines one prediction.

        Args:
            image: [3, H, W] uint8 RGB.
            prediction: has logits, at any resolution.

        Returns:
            A `Segmentation` with logits [C, H, W], float32.

        Raises:
            ValueError: the prediction holds no logits.
        """
        return self.refine_batch([image], [prediction])[0]

    def refine_batch(
        self, images: Sequence[Tensor], predictions: Sequence[Segmentation]
    ) -> list[Segmentation]:
        """`refine` for several images; those of one size and class count share a kernel launch."""
        from ..ops import dense_crf

        groups: dict[tuple, list[int]] = {}
        for index, prediction in enumerate(predictions):
            if prediction.logits is None:
                raise ValueError(
                    "crf needs logits, but the stage before it gave labels only; put crf earlier"
                )
            groups.setdefault((prediction.size, len(prediction.classes)), []).append(index)
        refined = list(predictions)
        if self.iterations == 0:
            return refined
        for members in groups.values():
            probabilities = torch.stack([predictions[i].probabilities() for i in members])
            # log of the smallest normal number instead of -inf where a softmax underflowed
            unary = probabilities.clamp_min_(torch.finfo(torch.float32).tiny).log_().neg_()
            batch = torch.stack([images[i].to(unary.device) for i in members])
            marginals = dense_crf(
                unary,
                batch,
                gaussian=self.gaussian,
                bilateral=self.bilateral,
                iterations=self.iterations,
            )
            logits = marginals.clamp_min_(torch.finfo(torch.float32).tiny).log_()
            for position, i in enumerate(members):
                refined[i] = predictions[i].with_logits(logits[position])
        return refined


def _kernels(name: str, kernels: Sequence[Sequence[float]], form: str) -> tuple:
    length = form.count(",") + 1
    checked = tuple(tuple(kernel) for kernel in kernels)
    for kernel in checked:
        if len(kernel) != length or not all(isinstance(x, (int, float)) for x in kernel):
            raise ValueError(f"each kernel of {name} must be {form}, got {kernel!r}")
    return checked
