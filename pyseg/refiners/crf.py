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

    A CRF wipes out what is thin, such as poles and signs. So the pixels of classes that are mostly
    thin in the prediction keep what the model said; others may still become such a class. And the
    default weights are lower than those of pydensecrf's example (gaussian 3, 3; bilateral 80, 13,
    10; 10 iterations), which lose classes on street scenes. They were chosen on the first half of
    CamVid's validation clip and on frames of its training drives; on the second half, 17 frames,
    streetnet has

    =================  =====  =====  =====  ==========  =====
    IoU                 mean   pole   sign  pedestrian  fence
    =================  =====  =====  =====  ==========  =====
    without            0.642  0.140  0.401       0.457  0.676
    default            0.649  0.140  0.392       0.500  0.680
    as in the example  0.630  0.007  0.122       0.636  0.684
    =================  =====  =====  =====  ==========  =====

    ``pyseg tune crf`` fits them to another model and data set.

    Args:
        iterations: mean-field steps; 0 leaves the prediction as it is.
        gaussian: kernels over position, each (sigma_xy in pixels, weight).
        bilateral: kernels over position and colour, each (sigma_xy in pixels, sigma_rgb in grey
            levels, weight).
        protect: a class is thin in an image if squares of radius ``protect`` times the stride of
            the logits, inside of the class, cover less than half of it. 0 protects nothing.

    Example:
        >>> pyseg.build("streetnet+crf(iterations=5, bilateral=((60, 10, 4),))")
    """

    def __init__(
        self,
        *,
        iterations: int = 5,
        gaussian: Sequence[tuple[float, float]] = ((2.0, 1.0),),
        bilateral: Sequence[tuple[float, float, float]] = ((40.0, 10.0, 2.0),),
        protect: float = 2.0,
    ) -> None:
        if iterations < 0:
            raise ValueError(f"iterations must be 0 or more, got {iterations}")
        if not 0 <= protect < float("inf"):
            raise ValueError(f"protect must be 0 or more, got {protect}")
        self.iterations = iterations
        self.gaussian = _kernels("gaussian", gaussian, "(sigma_xy, weight)")
        self.bilateral = _kernels("bilateral", bilateral, "(sigma_xy, sigma_rgb, weight)")
        self.protect = protect

    def __repr__(self) -> str:
        return (
            f"CRF(iterations={self.iterations}, gaussian={self.gaussian}, "
            f"bilateral={self.bilateral}, protect={self.protect})"
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
                result = logits[position]
                if self.protect:
                    kept = thin(predictions[i], self.protect)
                    result = torch.where(kept.to(result.device), -unary[position], result)
                refined[i] = predictions[i].with_logits(result)
        return refined


def thin(prediction: Segmentation, protect: float) -> Tensor:
    """Pixels of the classes that are mostly thin in a prediction; see `CRF` for ``protect``.

    Args:
        prediction: has logits.
        protect: radius in strides of the logits.

    Returns:
        [H, W] bool.
    """
    assert prediction.logits is not None
    labels = prediction.labels
    height, width = prediction.size
    h, w = prediction.logits.shape[1:]
    radius = round(protect * max(height / h, width / w))
    plane = labels.float()[None, None]
    # A pixel is in a square of its own class where some pixel around it sees one label only.
    alone = _maximum(plane, radius) == -_maximum(-plane, radius)
    covered = _maximum(alone.float(), radius)[0, 0]
    index = labels.flatten().long()
    count = len(prediction.classes)
    pixels = torch.bincount(index, minlength=count)
    inside = torch.bincount(index, covered.flatten(), minlength=count)
    return (2 * inside < pixels)[labels.long()]


def _maximum(plane: Tensor, radius: int) -> Tensor:
    """Of the square around each pixel; [1, 1, H, W]."""
    size = 2 * radius + 1
    rows = torch.nn.functional.max_pool2d(plane, (size, 1), 1, (radius, 0))
    return torch.nn.functional.max_pool2d(rows, (1, size), 1, (0, radius))


def _kernels(name: str, kernels: Sequence[Sequence[float]], form: str) -> tuple:
    length = form.count(",") + 1
    checked = tuple(tuple(kernel) for kernel in kernels)
    for kernel in checked:
        if len(kernel) != length or not all(isinstance(x, (int, float)) for x in kernel):
            raise ValueError(f"each kernel of {name} must be {form}, got {kernel!r}")
    return checked
