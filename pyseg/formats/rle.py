"""Run-length masks of COCO, compressed or as lists of runs."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _native, image
from ..errors import ImageError
from ..image import check_pixels


def encode_rle(mask: Tensor | np.ndarray) -> dict[str, Any]:
    """A binary mask as a COCO run-length dict, equal to what pycocotools writes.

    Args:
        mask: [H, W] bool, or integers where anything but 0 is inside.

    Returns:
        ``{"size": [H, W], "counts": str}``: lengths of alternating runs of 0 and 1 in column-major
        order, from the fourth on as difference to the one two before, in base 32 with 6 bits per
        character (cocoapi, ``maskApi.c``).
    """
    values = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if values.ndim != 2:
        raise ImageError(f"a mask must be [H, W], got shape {list(values.shape)}")
    flat = (values != 0).ravel(order="F")
    borders = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first = [0] if flat.size and flat[0] else []  # the first run is of zeros, if need be of none
    edges = np.concatenate([[0], first, borders, [flat.size]]).astype(np.int64)
    return {
        "size": [int(side) for side in values.shape],
        "counts": _text_of_runs(edges[1:] - edges[:-1]),
    }


def _text_of_runs(runs: np.ndarray) -> str:
    numbers = runs.copy()
    numbers[3:] -= runs[1:-2]
    digits = numbers[:, None] >> np.arange(0, 35, 5)  # [runs, 7], lowest first
    rest = digits >> 5
    digits &= 31
    # The last digit is the first whose highest bit alone says the sign of all that follows.
    done = rest == np.where(digits & 16, -1, 0)
    last = done.argmax(1)
    column = np.arange(7)
    digits |= np.where(column < last[:, None], 32, 0)
    codes: bytes = (digits[column <= last[:, None]] + 48).astype(np.uint8).tobytes()
    return codes.decode("ascii")


def decode_rle(rle: Mapping[str, Any]) -> Tensor:
    """A COCO run-length dict to its mask, [H, W] bool.

    Args:
        rle: ``size`` [H, W] and ``counts``, compressed (str or bytes) or a list of run lengths.

    Raises:
        ImageError: it is no such dict, the runs do not add up to H x W, or that is more than
            `pyseg.image.MAX_PIXELS`.
    """
    height, width, runs = _runs(rle)
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return torch.from_numpy(np.ascontiguousarray(flat.reshape(width, height).T))


def compressed_rle(rle: Mapping[str, Any]) -> dict[str, Any]:
    """The same mask with its runs as text, which is what pycocotools and its kin take for results.

    Raises:
        ImageError: as `decode_rle`.
    """
    height, width, runs = _runs(rle)
    counts = rle["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    return {
        "size": [height, width],
        "counts": counts if isinstance(counts, str) else _text_of_runs(runs),
    }


def _runs(rle: Mapping[str, Any]) -> tuple[int, int, np.ndarray]:
    """Height, width and checked run lengths of a run-length dict; no pixel is made."""
    if not isinstance(rle, Mapping) or "size" not in rle or "counts" not in rle:
        raise ImageError(
            f"an RLE mask must be a dict with 'size' and 'counts', got {reprlib.repr(rle)}"
        )
    size, counts = rle["size"], rle["counts"]
    if (
        not isinstance(size, (list, tuple))
        or len(size) != 2
        or not all(_is_integer(side) and side >= 0 for side in size)
    ):
        raise ImageError(f"the size of an RLE mask must be [H, W], got {reprlib.repr(size)}")
    height, width = (int(side) for side in size)
    pixels = height * width
    check_pixels(height, width, "the RLE mask")
    if isinstance(counts, (str, bytes)):
        try:
            codes = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8)
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can hold
            raise ImageError("the counts of the RLE mask are damaged: they are no ASCII") from error
        runs = _decode_counts(codes.astype(np.int64) - 48, pixels)
    elif isinstance(counts, (list, tuple)) and all(map(_is_integer, counts)):
        # As Python's integers first: those of a damaged file need not fit into 64 bits.
        if any(not 0 <= run <= pixels for run in counts):
            wrong = next(run for run in counts if not 0 <= run <= pixels)
            raise ImageError(
                f"the RLE mask of {height} x {width} pixels has a run of {reprlib.repr(wrong)}; "
                "it is damaged"
            )
        runs = np.array(counts, dtype=np.int64)
    else:
        raise ImageError(
            "the counts of an RLE mask must be a text or a list of integers, got "
            f"{reprlib.repr(counts)}"
        )
    # No sum wraps: no run is above `pixels`, which MAX_PIXELS bounds.
    if (runs < 0).any() or (runs > pixels).any() or int(runs.sum()) != pixels:
        raise ImageError(
            f"the runs of the RLE mask add up to {int(runs.sum())} pixels, its size "
            f"{height} x {width} needs {pixels}; it is damaged"
        )
    return height, width, runs


def edges_of(rles: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Where the runs of many masks begin and end, all at once; no pixel is made.

    Args:
        rles: as `decode_rle` takes them.

    Returns:
        the edges of one mask after the other, int64, each in column-major order: inside is from
        each even one to the next, and none is there twice; and how many each mask has.

    Raises:
        ImageError: as `decode_rle`, for the first mask that is damaged; its ``index`` says which.
    """
    found = _edges_of_texts(rles)
    if found is not None:
        return found
    runs = []  # one by one, which also says what is damaged, and how
    for index, rle in enumerate(rles):
        try:
            runs.append(_runs(rle)[2])
        except ImageError as error:
            error.index = index  # type: ignore[attr-defined]
            raise
    none = np.zeros(0, np.int64)
    return _edges(np.concatenate([none, *runs]), np.array([len(part) for part in runs], np.int64))


def _edges(runs: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges of masks from their run lengths; see `edges_of`."""
    owner = np.repeat(np.arange(len(counts)), counts)
    ends = counts.cumsum()
    sums = np.concatenate([[0], runs.cumsum()])
    places = sums[1:] - sums[(ends - counts)[owner]] if len(runs) else runs
    local = np.arange(len(runs)) - (ends - counts)[owner]
    # The end of a last run of zeros is no edge.
    kept = (local + 1 < counts[owner]) | (counts[owner] % 2 == 0)
    places, owner = places[kept], owner[kept]
    # Runs of no pixels begin and end where they do not: of so many edges at a place, one or none.
    first = np.flatnonzero((np.diff(places, prepend=-1) != 0) | (np.diff(owner, prepend=-1) != 0))
    odd = first[np.diff(np.append(first, len(places))) % 2 == 1]
    return places[odd], np.bincount(owner[odd], minlength=len(counts))


def _edges_of_texts(
    rles: Sequence[Mapping[str, Any]],
) -> tuple[np.ndarray, np.ndarray] | None:
    """As `edges_of`, of masks with text counts; None = some are not, or one is damaged."""
    if not all(issubclass(kind, Mapping) for kind in set(map(type, rles))):
        return None
    counted: list[Any] = [rle.get("counts") for rle in rles]
    if not set(map(type, counted)) <= {str, bytes}:
        return None
    try:
        texts = [text if type(text) is bytes else text.encode("ascii") for text in counted]
        sizes = [tuple(rle["size"]) for rle in rles]
        if not all(len(size) == 2 and all(map(_is_side, size)) for size in set(sizes)):
            return None
        pixels = [height * width for height, width in sizes]
    except (KeyError, TypeError, ValueError):
        return None
    if max(pixels, default=0) > image.MAX_PIXELS:
        return None
    _native.load()
    edges, counts = torch.ops.pyseg._rle_edges(
        torch.from_numpy(np.frombuffer(bytearray(b"".join(texts)), np.uint8)),
        torch.tensor(list(itertools.accumulate(map(len, texts))), dtype=torch.int64),
        torch.tensor(pixels, dtype=torch.int64),
    )
    return None if (counts < 0).any() else (edges.numpy(), counts.numpy())


def _is_side(value: Any) -> bool:
    return _is_integer(value) and bool(value >= 0)


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _decode_counts(codes: np.ndarray, pixels: int) -> np.ndarray:
    """Characters of a compressed RLE, less 48, to run lengths, not all of which need be sane."""
    last = (codes & 32) == 0
    if not codes.size:
        return codes
    if not last[-1] or codes.min() < 0 or codes.max() > 63:
        raise ImageError(
            "the counts of the RLE mask are damaged: they end within a number or hold "
            "a character outside '0'..'o'"
        )
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    lengths = np.diff(np.append(starts, codes.size))
    if lengths.max() > 12:  # 60 bits
        raise ImageError("the counts of the RLE mask are damaged: a number has 13 digits or more")
    place = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((codes & 31) << place, starts)
    negative = (codes[last] & 16) != 0
    numbers -= np.where(negative, np.int64(1) << (5 * lengths), 0)
    if np.abs(numbers).max() > pixels:  # differences of runs are within it, and then no sum wraps
        raise ImageError(
            f"the counts of the RLE mask are damaged: a run of {pixels} pixels at most has the "
            f"number {numbers[np.abs(numbers).argmax()]}"
        )
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers
