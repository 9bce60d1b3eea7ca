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

    A CRF wipes out what is thin or small, such as poles and signs, and people at dusk, whose
    colours are those of what is behind them. So a class that would be left with less than the share
    ``protect`` of its pixels keeps them all. And the default weights are lower than those of
    pydensecrf's example, which `crf_pydensecrf` has. What both gain behind strong and weak
    networks, by day and at dusk, is in ``docs/refiners.md``. Behind a network that hardly tells
    classes apart the default may lose: 0.4 points of mIoU after 37 steps of training.

    ``pyseg tune crf`` fits them to another model and data set.

    Args:
        iterations: mean-field steps; 0 leaves the prediction as it is.
        gaussian: kernels over position, each (sigma_xy in pixels, weight).
        bilateral: kernels over position and colour, each (sigma_xy in pixels, sigma_rgb in grey
            levels, weight).
        protect: a class keeps its pixels in an image where less than this share of them would be
            left; from 0, which protects nothing, to 1.
        margin: only pixels change whose class is ahead of the next by at most this in the
            prediction's probability; 1 = all.
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
        bilateral: Sequence[tuple[float, float, float]] = ((10.0, 10.0, 2.0),),
        protect: float = 0.7,
        margin: float = 1.0,
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
        for name, value in (("protect", protect), ("margin", margin)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value}")
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
        self.protect, self.margin = protect, margin
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
            f"bilateral={self.bilateral}, protect={self.protect}, margin={self.margin}{trained})"
        )

    def config(self) -> dict[str, Any]:
        """The options that rebuild it without its weights."""
        options: dict[str, Any] = {
            "iterations": self.iterations,
            "gaussian": self.gaussian,
            "bilateral": self.bilateral,
            "protect": self.protect,
            "margin": self.margin,
        }
        if self.compatibility is not None:
            options |= {"trainable": True, "num_classes": len(self.compatibility)}
        return options

    def forward(self, images: Tensor, logits: Tensor) -> Tensor:
        """Refined log-probabilities, differentiable in ``logits`` and in the parameters.

        What `refine` returns, but ``protect`` and ``margin`` do nothing: they have no gradient.

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
                self._keep(result, unary[position], predictions[i].labels)
                refined[i] = predictions[i].with_logits(result)
        return refined

    def _keep(self, refined: Tensor, unary: Tensor, labels: Tensor) -> None:
        """Puts the prediction back into ``refined`` [C, H, W] where it has to stay."""
        from ..ops import upsample_argmax

        if not self.protect and self.margin == 1:
            return
        after, count = upsample_argmax(refined[None], labels.shape)[0].flatten(), len(refined)
        before = labels.flatten()
        flat, own = refined.flatten(1), unary.flatten(1)
        changed = (before != after).nonzero().flatten()
        if self.margin < 1:
            best = (-own[:, changed]).exp_().topk(min(2, count), 0).values
            sure = best[0] - best[-1] > self.margin
            flat[:, changed[sure]] = -own[:, changed[sure]]
            changed = changed[~sure]
        lost = torch.bincount(before[changed].long(), minlength=count)
        had = torch.bincount(before.long(), minlength=count)
        protected = had - lost < self.protect * had
        kept = changed[protected[before[changed].long()]]
        flat[:, kept] = -own[:, kept]


def crf_pydensecrf(
    *,
    iterations: int = 10,
    gaussian: Sequence[tuple[float, float]] = ((3.0, 3.0),),
    bilateral: Sequence[tuple[float, float, float]] = ((80.0, 13.0, 10.0),),
    protect: float = 0.0,
    margin: float = 1.0,
    trainable: bool = False,
    num_classes: int | None = None,
    weights: str | Path | None = None,
) -> CRF:
    """The `CRF` of pydensecrf's example, whose numbers most code in the field has copied.

    On street scenes it takes poles, signs and people away: see ``docs/refiners.md``. Nothing is
    protected.

    Args:
        iterations: mean-field steps; 0 leaves the prediction as it is.
        gaussian: kernels over position, each (sigma_xy in pixels, weight).
        bilateral: kernels over position and colour, each (sigma_xy in pixels, sigma_rgb in grey
            levels, weight).
        protect: as of `CRF`; 0 protects nothing.
        margin: as of `CRF`; 1 = all pixels may change.
        trainable: as of `CRF`.
        num_classes: C; `pyseg.build` takes it from the model.
        weights: state dict of a trained CRF: a path or URL. None = the start.

    Example:
        >>> pyseg.build("streetnet+crf_pydensecrf")
    """
    return CRF(
        iterations=iterations,
        gaussian=gaussian,
        bilateral=bilateral,
        protect=protect,
        margin=margin,
        trainable=trainable,
        num_classes=num_classes,
        weights=weights,
    )


def crf_deeplab_v1(
    *,
    iterations: int = 10,
    gaussian: Sequence[tuple[float, float]] = ((3.0, 3.0),),
    bilateral: Sequence[tuple[float, float, float]] = ((121.0, 5.0, 4.0),),
    protect: float = 0.0,
    margin: float = 1.0,
    trainable: bool = False,
    num_classes: int | None = None,
    weights: str | Path | None = None,
) -> CRF:
    """The `CRF` that DeepLab v1 (Chen et al., 2015) ends in, with the weights of LargeFOV's.

    The paper fixes ten iterations and the kernel over position, a standard deviation of 3 pixels
    and a weight of 3, and searches the other three on PASCAL VOC's validation set: those here are
    the ones that public re-implementations take for LargeFOV. Nothing is protected.

    Args:
        iterations: mean-field steps; 0 leaves the prediction as it is.
        gaussian: kernels over position, each (sigma_xy in pixels, weight).
        bilateral: kernels over position and colour, each (sigma_xy in pixels, sigma_rgb in grey
            levels, weight).
        protect: as of `CRF`; 0 protects nothing.
        margin: as of `CRF`; 1 = all pixels may change.
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
        margin=margin,
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
    margin: float = 1.0,
    trainable: bool = False,
    num_classes: int | None = None,
    weights: str | Path | None = None,
) -> CRF:
    """The `CRF` that DeepLab v2 (Chen et al., 2018) ends in, with the weights of ResNet-101's.

    They are those of public re-implementations, which take ``gaussian=((2, 2),),
    bilateral=((65, 3, 4),)`` with VGG-16. Nothing is protected.

    Args:
        iterations: mean-field steps; 0 leaves the prediction as it is.
        gaussian: kernels over position, each (sigma_xy in pixels, weight).
        bilateral: kernels over position and colour, each (sigma_xy in pixels, sigma_rgb in grey
            levels, weight).
        protect: as of `CRF`; 0 protects nothing.
        margin: as of `CRF`; 1 = all pixels may change.
        trainable: as of `CRF`.
        num_classes: C; `pyseg.build` takes it from the model.
        weights: state dict of a trained CRF: a path or URL. None = the start.
    """
    return CRF(
        iterations=iterations,
        gaussian=gaussian,
        bilateral=bilateral,
        protect=protect,
        margin=margin,
        trainable=trainable,
        num_classes=num_classes,
        weights=weights,
    )


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
