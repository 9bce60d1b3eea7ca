"""pydensecrf.eigen: copies of vectors and matrices of float32, which NumPy reads as arrays."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["MatrixXf", "VectorXf", "matrixXf", "vectorXf"]


class _Array:
    """Numbers that are read by ``np.asarray``; made by `vectorXf` and `matrixXf`."""

    _dimensions: ClassVar[int]

    def __init__(self) -> None:
        self._values: NDArray[np.float32] = np.zeros((0,) * self._dimensions, np.float32)

    def __array__(self, dtype=None, copy: bool | None = None) -> NDArray:
        if copy is False and dtype is not None and np.dtype(dtype) != np.float32:
            raise ValueError(f"float32 numbers become {np.dtype(dtype)} only in a copy")
        return self._values.astype(dtype or np.float32, copy=bool(copy))

    @classmethod
    def _wrap(cls, name: str, values):
        if values is None:
            raise TypeError(f"{name} must be an array, got None")
        # The buffer's own dtype and layout count, as there: nothing is converted.
        array = np.asarray(memoryview(values))
        if array.ndim != cls._dimensions or array.dtype != np.float32:
            raise ValueError(
                f"{name} must be float32 of {cls._dimensions} dimensions, got {array.dtype} "
                f"{array.shape}"
            )
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} must be C-contiguous: np.ascontiguousarray({name})")
        made = cls()
        made._values = array.copy()
        return made


class VectorXf(_Array):
    """A vector; empty unless `vectorXf` makes it."""

    _dimensions = 1


class MatrixXf(_Array):
    """A matrix; empty unless `matrixXf` makes it."""

    _dimensions = 2


def vectorXf(arr: NDArray[np.float32]) -> VectorXf:
    """Copies an array [n].

    Raises:
        ValueError: other than C-contiguous float32 of one dimension.
        TypeError: no array.
    """
    return VectorXf._wrap("arr", arr)


def matrixXf(arr: NDArray[np.float32]) -> MatrixXf:
    """Copies an array [rows, columns].

    Raises:
        ValueError: other than C-contiguous float32 of two dimensions.
        TypeError: no array.
    """
    return MatrixXf._wrap("arr", arr)
