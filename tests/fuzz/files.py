"""Cases of what reads files: against zlib, and filters undone one byte after the other."""

import zlib

import numpy as np
import torch

from pyseg import ops
from pyseg.ops.decode_png import FORMS

from .draw import NO_TENSORS, Draw, Wrong, no_integer, op


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    checksum = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + checksum


def unfiltered(rows: np.ndarray, size: int) -> np.ndarray:
    """Rows [H, 1 + W * size] as bytes [H, W * size], after the specification."""
    height, width = rows.shape[0], rows.shape[1] - 1
    result = np.zeros((height + 1, width + size), np.int64)  # nothing is above, nor to the left
    for y in range(height):
        for x in range(width):
            a, b, c = (int(result[k]) for k in ((y + 1, x), (y, x + size), (y, x)))
            nearest = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            guess = (0, a, b, (a + b) // 2, nearest)[rows[y, 0]]
            result[y + 1, x + size] = (int(rows[y, x + 1]) + guess) & 255
    return result[1:, size:].astype(np.uint8)


@op(1.0)
def decode_png(draw: Draw) -> None:
    form = draw.choice(FORMS)
    colours = draw.choice((0, 3)) if form == "values" else 2
    size = 3 if colours == 2 else 1
    height, width = draw.shape(draw.side(), draw.side(), budget=2000)
    rows = draw.rng.integers(0, 256, (height, 1 + width * size)).astype(np.uint8)
    rows[:, 1:] *= draw.rng.random((height, width * size)) < draw.choice((0.01, 0.1, 0.5, 1.0))
    rows[:, 0] = draw.rng.integers(0, 5, height) if draw.chance(0.7) else draw.integer(0, 4)
    made = zlib.compressobj(draw.integer(0, 9), 8, draw.integer(9, 15), 9, draw.integer(0, 4))
    stream = bytearray(made.compress(rows.tobytes()) + made.flush())
    damaged = draw.chance(0.4)
    if damaged:  # with a checksum that is right, where zlib finds nothing else wrong
        for place in draw.rng.integers(2, max(3, len(stream) - 4), draw.integer(1, 3)):
            stream[place] ^= 1 << draw.integer(0, 7)
        if draw.chance(0.2):
            del stream[draw.integer(0, len(stream)) :]
        try:
            found = zlib.decompressobj(-15).decompress(bytes(stream[2:-4]), 1 << 20)
            stream[-4:] = zlib.adler32(found).to_bytes(4, "big")
        except zlib.error:
            pass
    try:
        inflated = zlib.decompress(bytes(stream))
    except zlib.error:
        inflated = b""
    sides = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    cut = draw.integer(0, len(stream))
    file = bytearray(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", sides + bytes([8, colours, 0, 0, 0]))
        + (chunk(b"PLTE", bytes(768)) if colours == 3 else b"")
        + chunk(b"IDAT", bytes(stream[:cut]))
        + chunk(b"IDAT", bytes(stream[cut:]))
        + chunk(b"IEND")
    )
    whole = len(inflated) == rows.size
    if draw.chance(0.1):
        file[draw.integer(0, len(file) - 1)] ^= 1 << draw.integer(0, 7)
        whole = False
    elif draw.chance(0.1):
        del file[draw.integer(0, len(file) - 1) :]
        whole = False
    data = draw.tensor(np.array(list(file), np.uint8), broadcast=False)
    arguments = {"data": data, "form": form}
    if draw.chance(0.1):
        change = draw.choice(
            [
                {"data": draw.choice((*NO_TENSORS, data[None], data.int()))},
                {"form": draw.choice(("", "rgb", 0, None))},
                {"max_pixels": draw.choice((-1, no_integer(draw)))},
            ]
        )
        draw.refuses(ops.decode_png, next(iter(change)), **{**arguments, **change})
        return
    pixels = draw.call(ops.decode_png, **arguments)
    if pixels is None:
        if whole and not damaged:
            raise Wrong("a plain file is left alone")
        return
    if not whole:
        raise Wrong("a damaged file is read")
    rows = np.frombuffer(inflated, np.uint8).reshape(rows.shape)
    if rows[:, 0].max() > 4:
        raise Wrong("a filter that there is not is undone")
    expected = torch.from_numpy(unfiltered(rows, size)).view(height, width, size)
    if form == "segment_ids":
        expected = (expected.int() << torch.tensor([0, 8, 16])).sum(2)
    elif form == "values":
        expected = expected[..., 0]
    if not torch.equal(pixels, expected.to(pixels.dtype)):
        raise Wrong("pixels are wrong")
