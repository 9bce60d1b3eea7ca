"""decode_png against Pillow and zlib, on files made byte by byte."""

import io
import itertools
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pyseg.ops import decode_png
from pyseg.ops.decode_png import FORMS, reference

HEAD = b"\x89PNG\r\n\x1a\n"


def chunk(kind, content=b""):
    checksum = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + checksum


def png(stream, height, width, colours=0, depth=8, parts=1, before=b"", after=b"", interlaced=0):
    """A file of a zlib stream, in several chunks."""
    sides = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    cuts = np.linspace(0, len(stream), parts + 1).astype(int)
    data = [chunk(b"IDAT", stream[a:b]) for a, b in itertools.pairwise(cuts)]
    header = chunk(b"IHDR", sides + bytes([depth, colours, 0, 0, interlaced]))
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if colours == 3 else b""
    return HEAD + header + palette + before + b"".join(data) + after + chunk(b"IEND")


def decoded(file, form="values", **options):
    return decode_png(torch.from_numpy(np.frombuffer(bytearray(file), np.uint8)), form, **options)


def filtered(rng, height, width, size, kind):
    """Rows with any filter before each; of flat regions, residuals of noise, or long zeros."""
    rows = rng.integers(0, 256, (height, 1 + width * size)).astype(np.uint8)
    if kind != "noise":
        rows[:, 1:] *= rng.random((height, width * size)) < (0.02 if kind == "sparse" else 0.3)
    rows[:, 0] = rng.integers(0, 5, height) if kind != "paeth" else 4
    return rows.tobytes()


def compressed(rng, data):
    how = int(rng.integers(0, 5))
    level, strategy = int(rng.integers(0, 10)), (0, 1, 2, 3, 4)[how]
    made = zlib.compressobj(level, zlib.DEFLATED, int(rng.integers(9, 16)), 9, strategy)
    cut = int(rng.integers(0, len(data) + 1))
    flush = (zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH)[cut % 2]
    return made.compress(data[:cut]) + made.flush(flush) + made.compress(data[cut:]) + made.flush()


def expected(file, form):
    pixels = np.array(Image.open(io.BytesIO(file)))
    if form == "segment_ids":
        pixels = (pixels.astype(np.int32) * [1, 256, 65536]).sum(-1, dtype=np.int32)
    return pixels


@pytest.mark.parametrize("kind", ["noise", "some", "sparse", "paeth"])
@pytest.mark.parametrize("form", FORMS)
def test_every_filter_and_every_way_to_compress(form, kind):
    rng = np.random.default_rng()
    for _ in range(60):
        height, width = (int(side) for side in rng.integers(1, (40, 300)))
        colours = 2 if form != "values" else int(rng.choice([0, 3]))
        data = filtered(rng, height, width, 3 if colours == 2 else 1, kind)
        stream = compressed(rng, data)
        file = png(stream, height, width, colours, parts=int(rng.integers(1, 5)))
        found = decoded(file, form)
        assert found.dtype == (torch.int32 if form == "segment_ids" else torch.uint8)
        assert np.array_equal(found.numpy(), expected(file, form))


@pytest.mark.parametrize("size", [(1, 200_001), (3, 70_000), (300_000, 1), (1500, 1100)])
def test_more_than_is_inflated_at_a_time(size):
    rng = np.random.default_rng()
    for form, colours in (("values", 0), ("colours", 2)):
        data = filtered(rng, *size, 3 if colours else 1, "some")
        file = png(compressed(rng, data), *size, colours)
        found = decoded(file, form).numpy()
        assert np.array_equal(found, expected(file, form))


def test_smooth_maps_as_pillow_writes_them():
    rng = np.random.default_rng()
    for _ in range(20):
        small = rng.integers(0, 256, (9, 11, 3)).astype(np.uint8)
        picture = Image.fromarray(small).resize(
            (int(rng.integers(1, 400)), int(rng.integers(1, 200))), Image.Resampling.NEAREST
        )
        for form, made in (
            ("colours", picture),
            ("segment_ids", picture),
            ("values", picture.convert("P")),
        ):
            stream = io.BytesIO()
            made.rotate(7).save(stream, "PNG")
            file = stream.getvalue()
            assert np.array_equal(decoded(file, form).numpy(), expected(file, form))


def test_photographs():
    rng = np.random.default_rng()
    waves = np.add.outer(np.arange(90) * 0.9, np.arange(130) * 0.4)[..., None] + [0, 30, 60]
    noise = rng.normal(0, 3, waves.shape)
    array = (127 + 100 * np.sin(waves / 20) + noise).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    assert np.array_equal(decoded(stream.getvalue(), "colours").numpy(), array)


def bits(*fields):
    """Bytes of (value, bits) pairs, the first in the lowest bits; codes are given reversed."""
    word = size = 0
    for value, count in fields:
        word |= value << size
        size += count
    return word.to_bytes((size + 7) // 8, "little")


FIXED_END = (0, 7)


def fixed(symbol):
    """A literal or length of the fixed codes."""
    code, size = (0x30 + symbol, 8) if symbol < 144 else (symbol - 256, 7)
    return int(f"{code:0{size}b}"[::-1], 2), size


def wrapped(deflated, data):
    return b"\x78\x9c" + deflated + zlib.adler32(data).to_bytes(4, "big")


def test_streams_that_no_compressor_makes():
    """Each is whole or not, by zlib's own word; none reads or writes what it should not."""
    data = bytes([0, 5, 5, 5, 5])
    good = bits((1, 1), (1, 2), fixed(0), fixed(5), fixed(257), (0, 5), FIXED_END)
    streams = {
        "a copy from one byte before": wrapped(good, data),
        "no end": wrapped(good[:-1], data),
        "a copy from before the start": wrapped(
            bits((1, 1), (1, 2), fixed(0), fixed(5), fixed(257), (0b01000, 5), FIXED_END), data
        ),
        "a distance that no code has": wrapped(
            bits((1, 1), (1, 2), fixed(0), fixed(5), fixed(257), (0b01111, 5), FIXED_END), data
        ),
        "a kind of block that none has": wrapped(bits((1, 1), (3, 2)), data),
        "stored": wrapped(bits((1, 1), (0, 2), (0, 5), (5, 16), (5 ^ 0xFFFF, 16)) + data, data),
        "stored, of another length": wrapped(
            bits((1, 1), (0, 2), (0, 5), (5, 16), (5, 16)) + data, data
        ),
        "stored, cut off": wrapped(
            bits((1, 1), (0, 2), (0, 5), (60000, 16), (60000 ^ 0xFFFF, 16)) + data, data
        ),
        "nothing": b"",
        "another checksum": wrapped(good, data + b"0"),
        "no checksum": wrapped(good, data)[:-4],
        "a dictionary": b"\x78\xbb" + wrapped(good, data)[2:],
        "another method": b"\x77\x9d" + wrapped(good, data)[2:],
        "more codes than there can be": wrapped(
            bits((1, 1), (2, 2), (31, 5), (0, 5), (0, 4)), data
        ),
        "orders that are no set": wrapped(
            bits((1, 1), (2, 2), (0, 5), (0, 5), (15, 4), *[(1, 3)] * 19), data
        ),
        "too few bytes": zlib.compress(data[:-1]),
        "too many bytes": zlib.compress(data + b"\0"),
        "an unknown filter": zlib.compress(b"\5" + data[1:]),
    }
    for name, stream in streams.items():
        found = decoded(png(stream, 1, 4))
        try:
            whole = zlib.decompress(stream) == data
        except zlib.error:
            whole = False
        assert (found is not None) == whole, name
        assert found is None or found.tolist() == [[5, 5, 5, 5]], name
    assert decoded(png(wrapped(good, data) + b"more", 1, 4)) is None


def test_damaged_streams_are_left_alone():
    """Bits of the deflated data changed, its checksum and the chunks' right: zlib says the same."""
    rng = np.random.default_rng()
    whole = 0
    for _ in range(1500):
        height, width = (int(side) for side in rng.integers(1, (20, 60)))
        data = filtered(rng, height, width, 1, "some")
        stream = bytearray(compressed(rng, data))
        for place in rng.integers(2, len(stream) - 4, 1 + int(rng.integers(0, 2))):
            stream[place] ^= 1 << int(rng.integers(0, 8))
        if rng.random() < 0.2:
            del stream[int(rng.integers(2, len(stream))) :]
        try:
            inflated = zlib.decompressobj(-15).decompress(bytes(stream[2:-4]))
            stream[-4:] = zlib.adler32(inflated).to_bytes(4, "big")
            inflated = zlib.decompress(bytes(stream))
        except zlib.error:
            inflated = b""
        found = decoded(png(bytes(stream), height, width))
        if found is not None:
            assert len(inflated) == len(data)
            same = decoded(png(zlib.compress(inflated), height, width))
            assert torch.equal(found, same)
            whole += 1
    assert whole > 20


def test_what_is_not_plain_is_left_alone():
    zeros = zlib.compress(bytes(13 * 3))
    plain = {"height": 3, "width": 12, "stream": zeros}
    assert decoded(png(**plain)).tolist() == [[0] * 12] * 3
    for changed in (
        {"interlaced": 1},
        {"depth": 16},
        {"depth": 4},
        {"colours": 4},
        {"colours": 2},
        {"before": chunk(b"acTL", bytes(8))},
        {"before": chunk(b"CRIT")},
        {"height": 0},
        {"width": 2**31 - 1},
        {"height": 2**31 - 1, "width": 2**31 - 1},
        {"stream": b""},
    ):
        assert decoded(png(**{**plain, **changed})) is None, changed
    file = png(**plain)
    assert decoded(file, max_pixels=36) is not None and decoded(file, max_pixels=35) is None
    for end in range(len(file)):
        assert decoded(file[:end]) is None
    split = png(zeros[:5], 3, 12, after=chunk(b"tIME", bytes(7)) + chunk(b"IDAT", zeros[5:]))
    assert decoded(split) is None  # what Pillow makes of it is for Pillow to say
    colours = {"height": 1, "width": 1, "colours": 2, "stream": zlib.compress(bytes(4))}
    assert decoded(png(**colours, before=chunk(b"gAMA", bytes(4))), "colours") is not None
    for kind in (b"tRNS", b"eXIf", b"iTXt"):  # which may change pixels, or turn the picture
        assert decoded(png(**colours, before=chunk(kind, bytes(6))), "colours") is None
        assert decoded(png(**colours, before=chunk(kind, bytes(6))), "segment_ids") is not None


def test_arguments_that_are_refused():
    data = torch.zeros(8, dtype=torch.uint8)
    for wrong in (data[None], data.int()):
        with pytest.raises(ValueError, match="data must be"):
            decode_png(wrong)
    with pytest.raises(TypeError, match="data must be a"):
        decode_png(b"abc")
    with pytest.raises(ValueError, match="form must be one of"):
        decode_png(data, "rgb")
    with pytest.raises(ValueError, match="max_pixels"):
        decode_png(data, max_pixels=-1)
    assert decode_png(data) is None and decode_png(data[:0]) is None


def test_strided_data():
    file = np.frombuffer(png(zlib.compress(bytes(5)), 1, 4), np.uint8)
    twice = torch.from_numpy(np.stack([file, file[::-1]], 1).copy())
    assert decode_png(twice[:, 0]).tolist() == [[0, 0, 0, 0]]
    assert torch.equal(reference(twice[:, 0].contiguous()), decode_png(twice[:, 0]))


@pytest.mark.parametrize("form", range(3))
def test_opcheck(form):
    data = torch.from_numpy(
        np.frombuffer(bytearray(png(zlib.compress(bytes(5)), 1, 4 if form == 0 else 1)), np.uint8)
    )
    torch.library.opcheck(
        torch.ops.pyseg.decode_png.default,
        (data, form, 100),
        test_utils=("test_schema", "test_faketensor"),
    )
