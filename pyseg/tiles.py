"""Overlapping tiles along an axis: where they lie, and how much each counts at every place.

Images larger than memory (`pyseg.large`) and sliding windows (`pyseg.models.semantic`) are both cut
by `spans`, an axis at a time: the weight of a pixel is the product of its weights along both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 32
"""Tiles begin at multiples of this. The strides of networks divide it, so that what they sample,
and the grids of their logits, are the same in every tile and in the whole image."""


@dataclass(frozen=True)
class Span:
    """A tile along one axis.

    It alone counts between its two ramps. In a ramp, which it shares with one neighbour, its weight
    rises or falls in a straight line, and both weights add up to 1. Outside of its ramps, in the
    halo, it does not count. At an end of the axis a ramp is empty.
    """

    start: int
    stop: int
    rise: tuple[int, int]  # [from, to): the ramp shared with the tile before
    fall: tuple[int, int]  # [from, to): the ramp shared with the tile behind

    def weights(self) -> Tensor:
        """Of its pixels, [stop - start] float32; multiples of 1/2^k where the ramp is 2^(k-1)."""
        place = torch.arange(self.start, self.stop, dtype=torch.float32) + 0.5
        result = torch.ones_like(place)
        for (a, b), sign in ((self.rise, 1), (self.fall, -1)):
            edge = a if sign > 0 else b
            if b > a:
                result *= (sign * (place - edge) / (b - a)).clamp(0, 1)
            else:
                result *= (sign * (place - edge) > 0).float()
        return result


def spans(length: int, tile: int, overlap: int, halo: int = 0) -> Sequence[Span]:
    """The tiles that cover an axis: as few as will do, evenly spread, the last a little shorter.

    Args:
        length: of the axis, pixels.
        tile: length of a tile, a multiple of `ALIGNMENT`; a shorter axis is one tile.
        overlap: that neighbours share at least, a multiple of `ALIGNMENT` below ``tile``.
        halo: pixels at the ends of a tile, but not of the axis, that do not count; the rest of the
            overlap is the ramp. At ``overlap // 2`` there is none: a cut in the middle.

    Returns:
        In order. Their weights add up to 1 everywhere.
    """
    if length <= tile:
        return [Span(0, length, (0, 0), (length, length))]
    step = tile - overlap
    last = -(-(length - tile) // ALIGNMENT) * ALIGNMENT
    count = -(-last // step) + 1
    starts = [i * last // (count - 1) // ALIGNMENT * ALIGNMENT for i in range(count)]
    # Tiles may share more than asked for; the ramp stays as long, in the middle.
    cuts = [(b + a + tile) // 2 for a, b in itertools.pairwise(starts)]
    apart = min((b - a for a, b in itertools.pairwise(cuts)), default=tile)
    half = min(overlap - 2 * halo, apart) // 2
    ramps = [(0, 0), *((cut - half, cut + half) for cut in cuts), (length, length)]
    return [
        Span(start, min(start + tile, length), ramps[i], ramps[i + 1])
        for i, start in enumerate(starts)
    ]


def check_tiles(tile: int, overlap: int, halo: int = 0, names: Sequence[str] = ()) -> None:
    """Refuses tiles that cannot cover an image.

    Args:
        tile: see `spans`.
        overlap: see `spans`.
        halo: see `spans`.
        names: of the first two, for messages; () = ``tile`` and ``overlap``.

    Raises:
        ValueError: one of them is out of range, or no multiple of `ALIGNMENT`.
    """
    first, second = names or ("tile", "overlap")
    for name, value, least in ((first, tile, ALIGNMENT), (second, overlap, 0)):
        if value < least or value % ALIGNMENT:
            near = max(least, round(value / ALIGNMENT) * ALIGNMENT)
            raise ValueError(
                f"{name} must be a multiple of {ALIGNMENT}, which the strides of networks divide, "
                f"and at least {least}, got {value}; {near} is near"
            )
    if overlap >= tile:
        raise ValueError(
            f"{second} must be smaller than {first}, got {second}={overlap} and {first}={tile}; "
            f"an eighth of the tile is usual, {second}={max(tile // 8 // 32 * 32, 32)}"
        )
    if not 0 <= halo <= overlap // 2:
        raise ValueError(
            f"halo must be 0 to half of the overlap, {overlap // 2}, as both of two neighbours "
            f"lose it, got {halo}; "
            + ("give 0" if halo < 0 else f"give {second}={-(-2 * halo // 32) * 32}, or less halo")
            + (f", and a {first} larger than that" if 2 * halo >= tile else "")
        )
