"""Tensors in memory that begins or ends at a page which nobody may touch, in any layout."""

import ctypes
import mmap

import numpy as np
import torch

PAGE = mmap.PAGESIZE
CAPACITY = 1 << 24  # bytes; larger tensors get ordinary memory
REGIONS = 16  # tensors of a case

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

# NumPy's type of the same size, where it has not the same one.
BITS = {torch.bfloat16: torch.int16}


class GuardedMemory:
    """Regions of memory between two protected pages, used again by every case."""

    def __init__(self) -> None:
        self._regions: list[np.ndarray] = []
        self._used = 0

    def release(self) -> None:
        """All tensors of the case before are gone."""
        self._used = 0

    def take(self, elements: int, dtype: torch.dtype, at_end: bool) -> torch.Tensor | None:
        """A vector next to a protected page; None where it is too large or there are too many."""
        size = elements * dtype.itemsize
        if size > CAPACITY or self._used == REGIONS or elements == 0:
            return None
        if self._used == len(self._regions):
            self._regions.append(_region())
        region = self._regions[self._used]
        self._used += 1
        bytes_ = torch.from_numpy(region[-size:] if at_end else region[:size])
        return bytes_.view(dtype)


def _region() -> np.ndarray:
    size = CAPACITY + 2 * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if start in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    for page in (start, start + size - PAGE):
        if _libc.mprotect(page, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return np.ctypeslib.as_array((ctypes.c_uint8 * CAPACITY).from_address(start + PAGE))


def poison(dtype: torch.dtype):
    """What lies between the elements of a tensor: to read it must change the result."""
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max - 1


def laid_out(
    values: torch.Tensor, rng, memory: GuardedMemory, broadcast: bool = True
) -> torch.Tensor:
    """``values`` in a layout of random order, steps, gaps and offset.

    With ``broadcast`` a dimension may be of stride 0: then all have the first one's values.
    """
    shape, rank = list(values.shape), values.ndim
    if values.numel() == 0 or rank == 0 or rng.random() < 0.25:
        order, steps, gaps, offset = list(range(rank)), [1] * rank, [0] * rank, 0
    else:
        order = list(range(rank))
        chance = rng.random()
        if rank == 4 and chance < 0.25:
            order = [0, 2, 3, 1]
        elif chance < 0.5:
            order = rng.permutation(rank).tolist()
        steps = [int(rng.integers(2, 4)) if rng.random() < 0.12 else 1 for _ in shape]
        gaps = [int(rng.integers(1, 4)) if rng.random() < 0.12 else 0 for _ in shape]
        offset = int(rng.integers(1, 6)) if rng.random() < 0.2 else 0
        if rng.random() < 0.1 and broadcast:
            axis = int(rng.integers(rank))
            values = values.narrow(axis, 0, 1)
    sizes = list(values.shape)
    strides, reach = [0] * rank, 1
    for axis in reversed(order):
        strides[axis] = reach * steps[axis]
        reach *= sizes[axis] * steps[axis] + gaps[axis]
    elements = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1
    if values.numel() == 0:
        elements = 0
    base = None
    if rng.random() < 0.7:
        base = memory.take(elements, values.dtype, at_end=bool(rng.random() < 0.65))
    if base is None:
        base = torch.empty(elements, dtype=values.dtype)
    if elements != values.numel():
        base.fill_(poison(values.dtype))
    view = base.as_strided(sizes, strides, offset)
    view.copy_(values)
    if sizes != shape:
        view = view.expand(shape)
    elif rng.random() < 0.05:  # a stride means nothing where there is one element
        odd = [7 if n == 1 else s for n, s in zip(sizes, strides, strict=True)]
        view = base.as_strided(sizes, odd, offset)
    return view
