"""pydensecrf.densecrf: the CRF, its constants and kinds of unary energies."""

from __future__ import annotations

from enum import IntEnum
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ...ops import dense_crf
from ...ops.dense_crf import Lattices

__all__ = [
    "CONST_KERNEL",
    "DIAG_KERNEL",
    "FULL_KERNEL",
    "NORMALIZE_AFTER",
    "NORMALIZE_BEFORE",
    "NORMALIZE_SYMMETRIC",
    "NO_NORMALIZATION",
    "ConstUnary",
    "DenseCRF",
    "DenseCRF2D",
    "KernelType",
    "LogisticUnary",
    "NormalizationType",
    "Unary",
]

QUALITY = "compatible"
# What an infinite energy becomes: still finite when messages are added, and its label gets 0.
FORBIDDEN = float(np.finfo(np.float32).max) / 4


class KernelType(IntEnum):
    """What of a kernel could be learnt. Inference is the same for all."""

    CONST_KERNEL = 0
    DIAG_KERNEL = 1
    FULL_KERNEL = 2


class NormalizationType(IntEnum):
    """Where a kernel is divided by its row sums."""

    NO_NORMALIZATION = 0
    NORMALIZE_BEFORE = 1
    NORMALIZE_AFTER = 2
    NORMALIZE_SYMMETRIC = 3


CONST_KERNEL, DIAG_KERNEL, FULL_KERNEL = KernelType
NO_NORMALIZATION, NORMALIZE_BEFORE, NORMALIZE_AFTER, NORMALIZE_SYMMETRIC = NormalizationType
_NORMALIZATION = ("none", "before", "after", "symmetric")


class Unary:
    """Energies [n_labels, n]; base of `ConstUnary` and `LogisticUnary`."""

    def __init__(self, energies: NDArray[np.float32]) -> None:
        self.energies = energies


class ConstUnary(Unary):
    """Energies that are given.

    Args:
        u: [n_labels, n].
    """

    def __init__(self, u: ArrayLike) -> None:
        super().__init__(_matrix("u", u))


class LogisticUnary(Unary):
    """Energies L f of logistic regression.

    Args:
        L: [n_labels, n_features].
        f: [n_features, n].
    """

    def __init__(self, L: ArrayLike, f: ArrayLike) -> None:
        weights, features = _matrix("L", L), _matrix("f", f)
        if weights.shape[1] != features.shape[0]:
            raise ValueError(
                f"L is {weights.shape} and f is {features.shape}: L's columns must "
                "be as many as f's rows"
            )
        super().__init__(weights @ features)


class _Term(NamedTuple):
    """A pairwise term."""

    features: Tensor  # [1, F, height, width] float32, of standard deviation 1
    weight: float
    penalties: Tensor  # [n_labels, n_labels] float64, times weight; -1 on the diagonal for Potts
    normalization: str

    def combines_with(self, other: _Term) -> bool:
        same = torch.equal(self.penalties, other.penalties)
        return same and self.normalization == other.normalization


class DenseCRF:
    """A fully connected CRF over points with any features.

    Arrays need not be float32 or contiguous. Results are NumPy arrays.

    Args:
        nvar: number of points.
        nlabels: number of labels, at most 255.

    Example:
        >>> crf = DenseCRF(48 * 64, 3)
        >>> crf.setUnaryEnergy(-np.log(np.random.dirichlet([1, 1, 1], 48 * 64).T))
        >>> crf.addPairwiseEnergy(create_pairwise_gaussian((3, 3), (48, 64)), compat=3)
        >>> np.argmax(crf.inference(5), axis=0).shape
        (3072,)
    """

    def __init__(self, nvar: int, nlabels: int) -> None:
        nvar, nlabels = int(nvar), int(nlabels)
        if nvar < 1 or not 1 <= nlabels <= 255:
            raise ValueError(
                f"nvar must be at least 1 and nlabels 1 to 255, got {nvar} and {nlabels}"
            )
        self._nvar, self._nlabels = nvar, nlabels
        # The operator works in tiles of 128 x 64 points; a long line would be cut into small ones.
        width = max(w for w in range(1, 129) if nvar % w == 0)
        self._size = (nvar // width, width) if width > 1 else (1, nvar)
        self._unary: Tensor | None = None  # [nlabels, nvar] float32
        self._terms: list[_Term] = []
        self._lattices: list[Lattices] | None = None  # of _groups(), once a step needs them
        self._last: tuple[NDArray[np.float32], Tensor] | None = None  # of _pairwise: Q, result

    def setUnary(self, u: Unary) -> None:
        """Sets the unary energies from a `ConstUnary` or a `LogisticUnary`.

        An energy of ``np.inf`` forbids a label at a point.

        Raises:
            ValueError: energies of another shape, NaN or -inf among them, or a point at which all
                labels are forbidden (pydensecrf's marginals are NaN there).
        """
        expected = (self._nlabels, self._nvar)
        if u.energies.shape != expected:
            raise ValueError(f"unary energies must be {expected}, got {u.energies.shape}")
        energies = torch.from_numpy(u.energies.copy())
        # Most energies are finite, and then so is their sum, but for an overflow.
        if not bool(energies.sum().isfinite()):
            for what, bad in (
                ("hold NaN", energies.isnan()),
                ("hold -inf", energies == -torch.inf),
                ("forbid all labels", (energies == torch.inf).all(0, keepdim=True)),
            ):
                if bool(bad.any()):
                    point = int(bad.any(0).nonzero()[0])
                    raise ValueError(f"unary energies {what} at point {point}")
            energies.clamp_(max=FORBIDDEN)
        self._unary = energies

    def setUnaryEnergy(self, u: ArrayLike, f: ArrayLike | None = None) -> None:
        """Sets the unary energies.

        Args:
            u: [nlabels, nvar] -log(probability); or, with ``f``, [nlabels, n_features].
            f: [n_features, nvar]: the energies are then u f.
        """
        self.setUnary(ConstUnary(u) if f is None else LogisticUnary(u, f))

    def addPairwiseEnergy(
        self,
        features: ArrayLike,
        compat: float | ArrayLike,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds a Gaussian kernel exp(-|f_i - f_j|^2 / 2) between all points.

        Args:
            features: [F, nvar], F from 1 to 8, divided by their standard deviations.
            compat: a number: the Potts model of this weight; [nlabels]: what two neighbours of the
                same label cost, so a reward is negative; [nlabels, nlabels]: what any two cost,
                of which the symmetric part counts.
            kernel: without effect on inference.
            normalization: one of the ``NORMALIZE_`` constants, or ``NO_NORMALIZATION``.

        Raises:
            ValueError: shapes that do not fit.
        """
        matrix = _matrix("features", features)
        if matrix.shape[1] != self._nvar:
            raise ValueError(f"features must be (F, {self._nvar}), got {matrix.shape}")
        self._add(torch.from_numpy(matrix.copy()), compat, kernel, normalization)

    def inference(self, niter: int) -> NDArray[np.float32]:
        """Marginals [nlabels, nvar] after ``niter`` mean-field steps."""
        q, tmp1, tmp2 = self.startInference()
        groups = self._groups()
        if self._unary is not None and len(groups) == 1:
            return self._run(groups[0], self._unary, niter).numpy()
        for _ in range(niter):
            self.stepInference(q, tmp1, tmp2)
        return q

    def startInference(self) -> tuple[NDArray[np.float32], NDArray, NDArray]:
        """Marginals [nlabels, nvar] before the first step, and two arrays without use."""
        if self._unary is None:
            q = torch.zeros(self._nlabels, self._nvar)
        else:
            q = torch.softmax(-self._unary, 0)
        return q.numpy(), np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)

    def stepInference(self, Q: NDArray[np.float32], tmp1: NDArray, tmp2: NDArray) -> None:
        """One mean-field step, in place on ``Q``; ``tmp1`` and ``tmp2`` are left alone."""
        energy = self._pairwise(Q)
        if self._unary is not None:
            energy += self._unary
        Q[...] = torch.softmax(energy.neg_(), 0).numpy()

    def klDivergence(self, Q: ArrayLike) -> float:
        """Kullback-Leibler divergence of marginals ``Q`` [nlabels, nvar], less a constant.

        As in pydensecrf the pairwise part is not halved, so it may rise between two steps.
        """
        q = torch.from_numpy(_matrix("Q", Q)).double()
        energy = self._pairwise(Q).double() + q.clamp_min(1e-20).log()
        if self._unary is not None:
            energy += self._unary
        return float((q * energy).sum())

    def _add(self, features: Tensor, compat, kernel: int, normalization: int) -> None:
        self._last = self._lattices = None
        KernelType(kernel)
        how = _NORMALIZATION[NormalizationType(normalization)]
        weight, penalties = _penalties(compat, self._nlabels)
        self._terms.append(_Term(features.reshape(1, -1, *self._size), weight, penalties, how))

    def _groups(self) -> list[list[_Term]]:
        """The terms, those together that one call of the operator can do."""
        groups: list[list[_Term]] = []
        for term in self._terms:
            for group in groups:
                if term.combines_with(group[0]):
                    group.append(term)
                    break
            else:
                groups.append([term])
        return groups or [[]]

    def _run(self, group, unary: Tensor, iterations: int) -> Tensor:
        energies = unary.reshape(1, -1, *self._size)
        penalties = group[0].penalties if group else None
        potts = penalties is None or _is_potts(penalties)
        q = dense_crf(
            energies,
            energies[:, :1],  # no image: positions and colours are features already
            gaussian=(),
            bilateral=(),
            features=[(term.features, 1.0, term.weight) for term in group],
            iterations=iterations,
            quality=QUALITY,
            normalization=group[0].normalization if group else "none",
            compatibility=None if potts else penalties,
        )
        return q.reshape(unary.shape)

    def _pairwise(self, Q: ArrayLike) -> Tensor:
        """Sum over terms of penalties K Q, [nlabels, nvar] float32, from lattices that are kept."""
        given = _matrix("Q", Q)
        if given.shape != (self._nlabels, self._nvar):
            raise ValueError(f"Q must be {(self._nlabels, self._nvar)}, got {given.shape}")
        if self._last is not None and np.array_equal(self._last[0], given):
            return self._last[1].clone()
        groups = [group for group in self._groups() if group]
        if self._lattices is None:
            self._lattices = [
                Lattices([(term.features, term.weight) for term in group], group[0].normalization)
                for group in groups
            ]
        result = torch.zeros(self._nlabels, self._nvar)
        for group, lattices in zip(groups, self._lattices, strict=True):
            q = torch.from_numpy(given).reshape(1, -1, *self._size)
            messages = lattices.messages(q).reshape(result.shape)
            if _is_potts(group[0].penalties):
                result -= messages
            else:
                result += (group[0].penalties @ messages.double()).float()
        self._last = given.copy(), result.clone()  # a step follows a divergence of the same Q
        return result


class DenseCRF2D(DenseCRF):
    """A fully connected CRF over the pixels of an image, in row-major order.

    Args:
        w: width.
        h: height.
        nlabels: number of labels, at most 255.
    """

    def __init__(self, w: int, h: int, nlabels: int) -> None:
        super().__init__(int(w) * int(h), nlabels)
        self._size = (int(h), int(w))

    def addPairwiseGaussian(
        self,
        sxy: float | tuple[float, float],
        compat: float | ArrayLike,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds a kernel over position.

        Args:
            sxy: standard deviation in pixels, or (of x, of y).
            compat: as for `addPairwiseEnergy`, and so are the others.
        """
        self._add(self._positions(sxy), compat, kernel, normalization)

    def addPairwiseBilateral(
        self,
        sxy: float | tuple[float, float],
        srgb: float | tuple[float, float, float],
        rgbim: ArrayLike,
        compat: float | ArrayLike,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds a kernel over position and colour.

        Args:
            sxy: standard deviation in pixels, or (of x, of y).
            srgb: standard deviation in grey levels, or one per channel.
            rgbim: [h, w, 3].
            compat: as for `addPairwiseEnergy`, and so are the others.

        Raises:
            ValueError: an image of another shape.
        """
        image = np.asarray(rgbim)
        if image.shape != (*self._size, 3):
            raise ValueError(
                f"rgbim must be {(*self._size, 3)}, got {image.shape}; for other "
                "channels use create_pairwise_bilateral and "
                "addPairwiseEnergy"
            )
        deviations = _deviations("srgb", srgb, 3)
        colours = torch.from_numpy(np.moveaxis(image, 2, 0).astype(np.float32))
        colours /= torch.tensor(deviations)[:, None, None]
        features = torch.cat([self._positions(sxy), colours])
        self._add(features, compat, kernel, normalization)

    def _positions(self, sxy: float | tuple[float, float]) -> Tensor:
        """[2, h, w]: x, y, each over its standard deviation."""
        sx, sy = _deviations("sxy", sxy, 2)
        h, w = self._size
        x = (torch.arange(w) / sx).expand(h, w)
        y = (torch.arange(h) / sy)[:, None].expand(h, w)
        return torch.stack([x, y]).float()


def _matrix(name: str, values: ArrayLike) -> NDArray[np.float32]:
    matrix = np.ascontiguousarray(values, dtype=np.float32)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions, got {matrix.shape}")
    return matrix


def _deviations(name: str, given, count: int) -> list[float]:
    values = [float(x) for x in ([given] * count if isinstance(given, Real) else given)]
    if len(values) != count or not all(0 < value < float("inf") for value in values):
        raise ValueError(f"{name} must be positive, one number or {count}, got {given}")
    return values


def _is_potts(penalties: Tensor) -> bool:
    return torch.equal(penalties, -torch.eye(len(penalties), dtype=penalties.dtype))


def _penalties(compat, nlabels: int) -> tuple[float, Tensor]:
    """Weight and penalties of a term."""
    if isinstance(compat, Real):
        return float(compat), -torch.eye(nlabels, dtype=torch.float64)
    values = torch.from_numpy(np.array(compat, dtype=np.float64))
    if values.shape == (nlabels,):
        return 1.0, torch.diag(values)
    if values.shape == (nlabels, nlabels):
        return 1.0, (values + values.T) / 2
    raise ValueError(
        f"compat must be a number, ({nlabels},) or ({nlabels}, {nlabels}), got "
        f"{tuple(values.shape)}"
    )
