"""What masks share that are held as the edges of their runs, NumPy arrays on the CPU.

`pyseg.formats.edges_of` makes such of COCO's texts, by the same kernel's other half.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import _native

_native.load()

Masks = tuple[np.ndarray, np.ndarray]
"""The edges of one mask after the other, [E] int64, rising within each: inside is from each even
one to the next; and how many each mask has, [K] int64."""


def run_overlaps(first: Masks, second: Masks, pairs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Pixels that pairs of masks have in common.

    Args:
        first, second: masks.
        pairs: indices of the first and of the second, [P] int64 each.

    Returns:
        [P] int64.

    Raises:
        ValueError: counts that do not add up to the edges, or indices of no mask.
    """
    sides = []
    for edges, counts in (first, second):
        sides += [_vector(edges), _vector(counts.cumsum())]
    sums: Tensor = torch.ops.pyseg._run_overlaps(*sides, *map(_vector, pairs))
    return sums.numpy()


@torch.library.register_fake("pyseg::_run_overlaps")
def _(first_edges, first_ends, second_edges, second_ends, one, other):
    return one.new_empty(one.shape)


def _vector(values: np.ndarray) -> Tensor:
    values = np.ascontiguousarray(values, np.int64)
    return torch.from_numpy(values if values.flags.writeable else values.copy())
