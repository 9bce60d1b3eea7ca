"""Fully connected CRF as a refiner: snaps label boundaries to edges of the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .. import weights as weight_files
from ..errors import SpecError
from ..spec import shown
from ..types import Segmentation

MAX_ITERATIONS = 1000  # mean field settles within some ten
MIN_SIGMA = 1e-3  # pixels or grey levels; below it a kernel is the pixel itself
MAX_WEIGHT = 1e15  # of a kernel, in magnitude, as in `pyseg.ops.dense_crf`
MAX_ENTRIES = 512  # of a pixel in all lattices
TINY = torch.finfo(torch.float32).tiny  # has a logarithm, where a softmax underflowed to 0


class CRF(nn.Module):
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
        trainable: makes the weights of the kernels and the compatibility of labels parameters, as
            in Zheng et al., "Conditional random fields as recurrent neural networks" (2015):
            ``log_weights`` [K], gaussian kernels first, so that weights stay positive, and
            ``compatibility`` [C, C], see `pyseg.ops.dense_crf`. They start as the weights given
            and as the Potts model. Standard deviations stay as they are.
        num_classes: C; `pyseg.build` takes it from the model.
        weights: state dict of a trained CRF: a path or URL. None = the start.

    Example:
        >>> pyseg.build("streetnet+crf(iterations=5, bilateral=((60, 10, 4),))")
        >>> crf = CRF(trainable=True, num_classes=11)
        >>> loss = torch.nn.functional.nll_loss(crf(images, logits), labels, ignore_index=255)
    """

    def __init__(
        self,
        *,
        iterations: int = 5,
        gaussian: Sequence[tuple[float, float]] = ((2.0, 1.0),),
        bilateral: Sequence[tuple[float, float, float]] = ((40.0, 10.0, 2.0),),
        protect: float = 2.0,
        trainable: bool = False,
        num_classes: int | None = None,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.eval()  # a pipeline takes stages in evaluation mode; here it makes no difference
        whole = isinstance(iterations, int) and not isinstance(iterations, bool)
        if not whole or not 0 <= iterations <= MAX_ITERATIONS:
            raise ValueError(
                f"iterations must be a whole number from 0 to {MAX_ITERATIONS}, got {iterations}"
            )
        if not 0 <= protect < float("inf"):
            raise ValueError(f"protect must be 0 or more, got {protect}")
        self.iterations = iterations
        self.gaussian = _kernels("gaussian", gaussian, "(sigma_xy, weight)")
        self.bilateral = _kernels("bilateral", bilateral, "(sigma_xy, sigma_rgb, weight)")
        # what the operator counts for each pixel: features of a kernel, and one for the kernel
        entries = 3 * len(self.gaussian) + 6 * len(self.bilateral)
        if entries > MAX_ENTRIES:
            raise ValueError(
                f"gaussian and bilateral hold {len(self.gaussian)} and {len(self.bilateral)} "
                f"kernels, more than can be applied at once: a few of each are enough"
            )
        self.protect = protect
        self.log_weights: Tensor | None = None
        self.compatibility: Tensor | None = None
        if not trainable:
            if weights is not None:
                raise ValueError("weights are those of a trained CRF: set trainable=True, too")
            return
        start = [kernel[-1] for kernel in (*self.gaussian, *self.bilateral)]
        if min(start, default=1) <= 0:
            raise ValueError(f"trainable needs positive weights of kernels, got {start}")
        state = None
        if weights is not None:
            weights = weight_files.resolve(weights)
            state = weight_files.load_state(weights)
            if num_classes is None and "compatibility" in state:
                num_classes = len(state["compatibility"])
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if num_classes is None:
            raise ValueError("trainable needs num_classes, or weights that tell it")
        self.log_weights = nn.Parameter(torch.tensor(start).log())
        self.compatibility = nn.Parameter(1 - torch.eye(num_classes))
        if state is not None:
            assert weights is not None
            weight_files.load_into(self, state, weights)

    def __repr__(self) -> str:
        trained = "" if self.compatibility is None else ", trainable=True"
        return (
            f"CRF(iterations={self.iterations}, gaussian={self.gaussian}, "
            f"bilateral={self.bilateral}, protect={self.protect}{trained})"
        )

    def config(self) -> dict[str, Any]:
        """The options that rebuild it without its weights."""
        options: dict[str, Any] = {
            "iterations": self.iterations,
            "gaussian": self.gaussian,
            "bilateral": self.bilateral,
            "protect": self.protect,
        }
        if self.compatibility is not None:
            options |= {"trainable": True, "num_classes": len(self.compatibility)}
        return options

    def forward(self, images: Tensor, logits: Tensor) -> Tensor:
        """Refined log-probabilities, differentiable in ``logits`` and in the parameters.

        What `refine` returns, but no class is protected: that has no gradient.

        Args:
            images: [N, 3, H, W] RGB, 0 to 255, uint8 or floating point.
            logits: [N, C, h, w], upsampled to H x W here.

        Returns:
            [N, C, H, W], float32; probabilities below 1e-38 count as that.

        Raises:
            ValueError: shapes do not fit, or another number of classes than the parameters have.
        """
        size = images.shape[2:]
        logits = logits.float()
        if logits.shape[2:] != size:
            logits = interpolate(logits, size, mode="bilinear", align_corners=False)
        return self._marginals(images, -logits.log_softmax(1)).clamp_min(TINY).log()

    def _marginals(self, images: Tensor, unary: Tensor) -> Tensor:
        from ..ops import dense_crf

        gaussian, bilateral = self.gaussian, self.bilateral
        if self.log_weights is not None:
            learnt = self.log_weights.exp().unbind()
            gaussian = tuple((k[0], w) for k, w in zip(gaussian, learnt, strict=False))
            learnt = learnt[len(gaussian) :]
            bilateral = tuple((*k[:2], w) for k, w in zip(bilateral, learnt, strict=True))
        return dense_crf(
            unary,
            images,
            gaussian=gaussian,
            bilateral=bilateral,
            iterations=self.iterations,
            compatibility=self.compatibility,
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

    @torch.no_grad()
    def refine_batch(
        self, images: Sequence[Tensor], predictions: Sequence[Segmentation]
    ) -> list[Segmentation]:
        """`refine` for several images; those of one size and class count share a kernel launch."""
        groups: dict[tuple, list[int]] = {}
        for index, prediction in enumerate(predictions):
            if prediction.logits is None:
                raise SpecError(
                    "crf needs logits, but the stage before it gave labels only; put crf earlier"
                )
            groups.setdefault((prediction.size, len(prediction.classes)), []).append(index)
        refined = list(predictions)
        if self.iterations == 0:
            return refined
        for members in groups.values():
            probabilities = torch.stack([predictions[i].probabilities() for i in members])
            unary = probabilities.clamp_min_(TINY).log_().neg_()
            batch = torch.stack([images[i].to(unary.device) for i in members])
            logits = self._marginals(batch, unary).clamp_min_(TINY).log_()
            for position, i in enumerate(members):
                result = logits[position]
                if self.protect:
                    kept = thin(predictions[i], self.protect)
                    result = torch.where(kept.to(result.device), -unary[position], result)
                refined[i] = predictions[i].with_logits(result)
        return refined


def crf_deeplab_v1(
    *,
    iterations: int = 10,
    gaussian: Sequence[tuple[float, float]] = ((3.0, 3.0),),
    bilateral: Sequence[tuple[float, float, float]] = ((121.0, 5.0, 4.0),),
    protect: float = 0.0,
    trainable: bool = False,
    num_classes: int | None = None,
    weights: str | Path | None = None,
) -> CRF:
    """The `CRF` that DeepLab v1 (Chen et al., 2015) ends in, with the weights of LargeFOV's.

    The paper fixes ten iterations and the kernel over position, a standard deviation of 3 pixels
    and a weight of 3, and searches the other three on PASCAL VOC's validation set: those here are
    the ones that public re-implementations take for LargeFOV. Thin classes are not protected.

    Args:
        iterations: mean-field steps; 0 leaves the prediction as it is.
        gaussian: kernels over position, each (sigma_xy in pixels, weight).
        bilateral: kernels over position and colour, each (sigma_xy in pixels, sigma_rgb in grey
            levels, weight).
        protect: as of `CRF`; 0 protects nothing.
        trainable: as of `CRF`.
        num_classes: C; `pyseg.build` takes it from the model.
        weights: state dict of a trained CRF: a path or URL. None = the start.

    Example:
        >>> pyseg.build("deeplab_v1+crf_deeplab_v1", weights=None)
    """
    return CRF(
        iterations=iterations,
        gaussian=gaussian,
        bilateral=bilateral,
        protect=protect,
        trainable=trainable,
        num_classes=num_classes,
        weights=weights,
    )


def crf_deeplab_v2(
    *,
    iterations: int = 10,
    gaussian: Sequence[tuple[float, float]] = ((1.0, 3.0),),
    bilateral: Sequence[tuple[float, float, float]] = ((67.0, 3.0, 4.0),),
    protect: float = 0.0,
    trainable: bool = False,
    num_classes: int | None = None,
    weights: str | Path | None = None,
) -> CRF:
    """The `CRF` that DeepLab v2 (Chen et al., 2018) ends in, with the weights of ResNet-101's.

    They are those of public re-implementations, which take ``gaussian=((2, 2),),
    bilateral=((65, 3, 4),)`` with VGG-16. Thin classes are not protected.

    Args:
        iterations: mean-field steps; 0 leaves the prediction as it is.
        gaussian: kernels over position, each (sigma_xy in pixels, weight).
        bilateral: kernels over position and colour, each (sigma_xy in pixels, sigma_rgb in grey
            levels, weight).
        protect: as of `CRF`; 0 protects nothing.
        trainable: as of `CRF`.
        num_classes: C; `pyseg.build` takes it from the model.
        weights: state dict of a trained CRF: a path or URL. None = the start.
    """
    return CRF(
        iterations=iterations,
        gaussian=gaussian,
        bilateral=bilateral,
        protect=protect,
        trainable=trainable,
        num_classes=num_classes,
        weights=weights,
    )


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
    # a square as wide as the image sees all of it
    radius = round(min(protect * max(height / h, width / w), max(height, width)))
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
    try:
        checked = tuple(tuple(kernel) for kernel in kernels)
    except TypeError:
        raise ValueError(
            f"{name} must be a sequence of kernels {form}, got {shown(kernels)}"
        ) from None
    for kernel in checked:
        if len(kernel) != length or not all(
            isinstance(x, (int, float)) and not isinstance(x, bool) for x in kernel
        ):
            raise ValueError(f"each kernel of {name} must be {form}, got {shown(kernel)}")
        *sigmas, weight = kernel
        if not all(MIN_SIGMA <= sigma < float("inf") for sigma in sigmas):
            raise ValueError(
                f"{name}: standard deviations must be positive and at least {MIN_SIGMA}, got "
                f"{shown(kernel)}"
            )
        if not -MAX_WEIGHT <= weight <= MAX_WEIGHT:
            raise ValueError(
                f"{name}: the weight must be at most {MAX_WEIGHT:g} in magnitude, got "
                f"{shown(kernel)}"
            )
    return checked
