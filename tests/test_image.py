import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pyseg import formats, image
from pyseg.errors import ImageError, LabelError, PysegError
from pyseg.files import IMAGE_SUFFIXES
from pyseg.visual import overlay


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def chw(array):
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


def png(width, height, depth, colour, rows, extra=b""):
    """A PNG written from the specification, for depths that Pillow does not write."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = b"".join(b"\0" + row for row in rows)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


# --- read_image -------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_pixels(rgb, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(rgb).save(path)
    want = chw(rgb)
    for source in (path, str(path), Image.fromarray(rgb), rgb, want, rgb[::-1][::-1]):
        got = image.read_image(source)
        assert got.dtype == torch.uint8 and got.is_contiguous()
        assert torch.equal(got, want)


def test_uint8_tensor_is_not_copied():
    tensor = torch.zeros(3, 4, 5, dtype=torch.uint8)
    assert image.read_image(tensor).data_ptr() == tensor.data_ptr()


def test_floats_are_scaled(rgb):
    floats = rgb.astype(np.float64) / 255
    for source in (floats, chw(floats).float(), chw(floats).double()):
        assert torch.equal(image.read_image(source), chw(rgb))


def test_grey_of_every_depth(tmp_path):
    grey = np.array([[0, 128, 255]], dtype=np.uint8)
    want = torch.tensor([[[0, 128, 255]]], dtype=torch.uint8).expand(3, 1, 3)
    wide = grey.astype(np.uint16) * 257
    for source in (grey, grey[..., None], torch.from_numpy(grey), wide, torch.from_numpy(wide)):
        assert torch.equal(image.read_image(source), want)
    for name, array in (("8.png", grey), ("16.png", wide), ("16.tif", wide)):
        Image.fromarray(array).save(tmp_path / name)
        assert torch.equal(image.read_image(tmp_path / name), want)
    big_endian = wide.astype(">u2")
    assert torch.equal(image.read_image(big_endian), want)


def test_16_bit_values_round_to_the_nearest():
    every = torch.arange(65536, dtype=torch.int32).reshape(1, 256, 256)
    got = image.read_image(every.numpy().astype(np.uint16)[0])[0].flatten()
    assert torch.equal(got, (every.flatten().double() / 257).round().to(torch.uint8))


def test_bilevel_and_low_depth_grey(tmp_path):
    (tmp_path / "1.png").write_bytes(png(8, 1, 1, 0, [bytes([0b01000001])]))
    assert image.read_image(tmp_path / "1.png")[0].tolist() == [[0, 255, 0, 0, 0, 0, 0, 255]]
    (tmp_path / "4.png").write_bytes(png(2, 1, 4, 0, [bytes([0x0F])]))
    assert image.read_image(tmp_path / "4.png")[0].tolist() == [[0, 255]]


def test_transparency_is_composited_over_white(tmp_path):
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 128]]], dtype=np.uint8)
    want = [[200, 255, 227], [100, 255, 177], [0, 255, 127]]
    Image.fromarray(rgba).save(tmp_path / "a.png")
    for source in (rgba, chw(rgba), Image.fromarray(rgba), tmp_path / "a.png"):
        assert image.read_image(source)[:, 0].tolist() == want

    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "p.png")
    assert image.read_image(tmp_path / "p.png")[:, 0].tolist() == [[10, 40], [20, 50], [30, 60]]
    palette.save(tmp_path / "t.png", transparency=1)
    got = image.read_image(tmp_path / "t.png")[:, 0].tolist()
    assert got == [[10, 255], [20, 255], [30, 255]]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, suffix):
    # A picture whose four quadrants differ, stored as the camera would for this orientation.
    upright = np.zeros((32, 48, 3), dtype=np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = 250, 170, 90
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    for source in (path, Image.open(path)):
        got = image.read_image(source)
        assert got.shape == (3, 32, 48)
        assert (got.int() - chw(upright).int()).abs().max() <= 4  # JPEG


def test_cmyk_and_other_colour_spaces(tmp_path):
    red = Image.new("RGB", (8, 8), (200, 30, 30))
    for mode, suffix in (("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "jpg"), ("HSV", None)):
        converted = red.convert(mode)
        source = converted
        if suffix:
            source = tmp_path / f"{mode}.{suffix}"
            converted.save(source)
        got = image.read_image(source).float().mean((1, 2))
        assert (got - torch.tensor([200.0, 30.0, 30.0])).abs().max() < 6, mode


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((3, 8, 9), np.uint8), ["[3, 8, 9]", "transpose(1, 2, 0)"]),
        (np.zeros((8, 9, 2), np.uint8), ["[8, 9, 2]", "RGB"]),
        (np.zeros((1, 8, 9, 3), np.uint8), ["list of images"]),
        (np.zeros((0, 9, 3), np.uint8), ["empty"]),
        (np.zeros((8, 9, 3), np.int64), ["int64", "uint8"]),
        (np.zeros((8, 9, 3), bool), ["bool", "255"]),
        (np.zeros((8, 9, 3), complex), ["complex128"]),
        (np.full((8, 9, 3), 200.0), ["200", "0..1", "uint8"]),
        (np.full((8, 9, 3), -1.5), ["-1.5", "normalisation"]),
        (np.full((8, 9, 3), np.nan), ["nan"]),
        (torch.zeros(8, 9, 3, dtype=torch.uint8), ["[8, 9, 3]", "permute(2, 0, 1)"]),
        (torch.zeros(2, 3, 8, 9, dtype=torch.uint8), ["list(batch)"]),
        (torch.zeros(3, 0, 9, dtype=torch.uint8), ["empty"]),
        (Image.new("F", (4, 4)), ["mode F", "0..1"]),
        (Image.new("I", (4, 4)), ["mode I"]),
        (Image.new("RGB", (0, 4)), ["empty"]),
        ([1, 2], ["list", "path"]),
        (None, ["NoneType"]),
    ],
)
def test_arrays_and_images_that_are_refused(source, words):
    with pytest.raises(ImageError) as caught:
        image.read_image(source)
    for word in words:
        assert word in str(caught.value)


def test_files_that_are_refused(rgb, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(rgb.repeat(40, 0).repeat(40, 1)).save(buffer, "JPEG")
    whole = buffer.getvalue()
    large_png = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)).save(
        large_png, "PNG"
    )
    bomb = bytearray(png(1, 1, 8, 0, [b"\0"]))
    bomb[16:24] = struct.pack(">II", 60000, 60000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    frames = [Image.new("L", (4, 4), v) for v in (0, 99)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "two.tif", save_all=True, append_images=frames[1:])
    files = {
        "empty.jpg": (b"", ["0 bytes"]),
        "page.jpg": (b"<!DOCTYPE html><html>not found", ["HTML"]),
        "pointer.png": (b"version https://git-lfs.github.com/spec/v1\n", ["git lfs pull"]),
        "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0", ["HEIC"]),
        "random.png": (b"hello world", ["not an image", "JPEG or PNG"]),
        "cut.jpg": (whole[: len(whole) // 2], ["truncated"]),
        "head.jpg": (whole[:40], []),
        "cut.png": (large_png.getvalue()[:3000], ["truncated"]),
        "bomb.png": (bytes(bomb), ["plausible", "MAX_IMAGE_PIXELS"]),
        "two.gif": (None, ["2 pictures"]),
        "two.tif": (None, ["2 pictures"]),
        "absent.png": (None, ["does not exist"]),
    }
    for name, (content, words) in files.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ImageError) as caught:
            image.read_image(path)
        for word in [repr(str(path)), *words]:
            assert word in str(caught.value), name
    with pytest.raises(ImageError, match="is a directory"):
        image.read_image(tmp_path)
    with pytest.raises(ImageError, match="download it first"):
        image.read_image("https://example.org/a.png")


def test_no_other_program_is_run(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    called = tmp_path / "called"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {called}\necho 10.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    path = tmp_path / "x.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="is not an image in PNG, JPEG"):
        image.read_image(path)
    assert not called.exists()


def test_pipes_are_not_waited_for(tmp_path):
    path = tmp_path / "f.png"
    os.mkfifo(path)
    with pytest.raises(ImageError, match="pipe"):
        image.read_image(path)


def test_names_that_no_file_has():
    for name in ("a" * 5000 + ".png", "a\0b.png"):
        with pytest.raises(ImageError, match="does not exist"):
            image.read_image(name)


def test_limit_of_pixels(tmp_path, monkeypatch, rgb):
    path = image.write_image(tmp_path / "a.png", rgb)  # 5 x 7
    monkeypatch.setattr(image, "MAX_PIXELS", 34)
    with pytest.raises(ImageError, match=r"5 x 7 pixels, more than the 34 of pyseg.image.MAX_PIX"):
        image.read_image(path)
    monkeypatch.setattr(image, "MAX_PIXELS", 35)
    assert torch.equal(image.read_image(path), chw(rgb))


def test_damaged_header_is_told_from_another_format(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"rubbish" * 9)
    with pytest.raises(ImageError, match="is truncated or damaged"):
        image.read_image(path)


def test_every_format_that_is_listed_is_read(tmp_path, rgb):
    for suffix in IMAGE_SUFFIXES:
        assert image.read_image(image.write_image(tmp_path / f"a{suffix}", rgb)).shape == (3, 5, 7)


def test_camera_jpeg_with_a_preview_is_one_image(rgb, tmp_path):
    first = Image.fromarray(rgb.repeat(8, 0).repeat(8, 1))
    first.save(
        tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[first.resize((8, 8))]
    )
    assert Image.open(tmp_path / "a.jpg").n_frames == 2
    assert image.read_image(tmp_path / "a.jpg").shape == (3, 40, 56)


# --- labels -----------------------------------------------------------------------------------


def test_labels_round_trip_as_indexed_png(tmp_path):
    labels = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    path = image.write_labels(tmp_path / "a.png", labels, [(1, 2, 3), (4, 5, 6)])
    assert path == tmp_path / "a.png"
    stored = Image.open(path)
    assert stored.mode == "P"
    assert stored.getpalette()[:9] == [1, 2, 3, 4, 5, 6, 0, 128, 0]  # then VOC's own colours
    assert torch.equal(image.read_labels(path), labels)
    assert image.read_labels(path).dtype == torch.uint8
    for kind in (torch.int64, torch.int32, torch.int8):
        image.write_labels(path, (labels % 20).to(kind))
        assert Image.open(path).mode == "P"
        assert torch.equal(image.read_labels(path), labels % 20)
    assert list(tmp_path.iterdir()) == [path]


def test_many_classes_become_16_bit(tmp_path):
    path = tmp_path / "a.png"
    wide = torch.tensor([[0, 255, 256, 65535]])
    image.write_labels(path, wide)
    assert Image.open(path).mode == "I;16"
    assert image.read_labels(path).tolist() == wide.tolist()
    small = torch.tensor([[0, 1]])
    image.write_labels(path, small, image.default_palette(300))
    assert Image.open(path).mode == "I;16"
    image.write_labels(path, small.to(torch.int16))
    assert Image.open(path).mode == "I;16"
    assert image.read_labels(path).tolist() == [[0, 1]]


def test_low_depth_files_keep_their_ids(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(4, 1, 2, 0, [bytes([0b00011011])]))
    assert image.read_labels(path).tolist() == [[0, 1, 2, 3]]
    path.write_bytes(png(4, 1, 4, 0, [bytes([0x01, 0xAF])]))
    assert image.read_labels(path).tolist() == [[0, 1, 10, 15]]
    path.write_bytes(png(8, 1, 1, 0, [bytes([0b01000001])]))
    assert image.read_labels(path).tolist() == [[0, 1, 0, 0, 0, 0, 0, 1]]
    four_colours = Image.fromarray(np.array([[0, 1, 2, 3]], dtype=np.uint8))
    four_colours.putpalette(bytes(range(12)))
    four_colours.save(path, bits=2)
    assert image.read_labels(path).tolist() == [[0, 1, 2, 3]]


def test_label_files_that_are_refused(rgb, tmp_path):
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    with pytest.raises(ImageError, match=r"mode RGB.*class id"):
        image.read_labels(tmp_path / "rgb.png")
    Image.fromarray(rgb[..., 0]).save(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="JPEG"):
        image.read_labels(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="does not exist"):
        image.read_labels(tmp_path / "absent.png")


def test_labels_that_are_not_written(tmp_path):
    for labels, words in (
        (torch.tensor([[-1, 3]]), "-1 to 3"),
        (torch.tensor([[70000]]), "70000"),
        (torch.rand(3, 3), "float32"),
        (torch.zeros(1, 3, 3, dtype=torch.uint8), "[1, 3, 3]"),
    ):
        with pytest.raises(LabelError) as caught:
            image.write_labels(tmp_path / "a.png", labels)
        assert words in str(caught.value)
    with pytest.raises(ImageError, match=r"\.png"):
        image.write_labels(tmp_path / "a.jpg", torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(PysegError, match="does not exist; create it"):
        image.write_labels(tmp_path / "no" / "a.png", torch.zeros(2, 2, dtype=torch.uint8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "palette", [[(0, 0)], [(0, 0, 256)], [(0, -1, 2)], [(0, 0.5, 2)], [5], "ab"]
)
def test_palettes_that_are_none(tmp_path, palette):
    labels = torch.zeros(2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"palette must hold one colour \[r, g, b\]"):
        image.write_labels(tmp_path / "a.png", labels, palette)
    with pytest.raises(ValueError, match="palette must hold"):
        overlay(torch.zeros(3, 2, 2).byte(), labels=labels, palette=palette)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    old = torch.ones(3, 3, dtype=torch.uint8)
    image.write_labels(path, old)

    def half(self, target, **options):
        Path(target).write_bytes(b"\x89PNG half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="no space"):
        image.write_labels(path, torch.zeros(3, 3, dtype=torch.uint8))
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(image.read_labels(path), old)


def test_default_palette_is_vocs():
    # Colours printed in the VOC 2012 development kit documentation.
    palette = image.default_palette(256)
    assert palette[:8] == (
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (0, 0, 128),
        (128, 0, 128),
        (0, 128, 128),
        (128, 128, 128),
    )
    assert palette[8] == (64, 0, 0) and palette[15] == (192, 128, 128)
    assert palette[20] == (0, 64, 128) and palette[255] == (224, 224, 192)
    assert len(set(image.default_palette(1000))) == 1000


def test_voc_files_hold_that_palette(data_folder):
    files = sorted((data_folder("formats") / "voc_palette_png").rglob("*.png"))
    assert files
    for file in files:
        stored = Image.open(file)
        if stored.mode != "P":
            continue
        used = np.unique(np.array(stored))
        colours = np.array(stored.getpalette(), dtype=int).reshape(-1, 3)
        for index in used:
            assert tuple(colours[index]) == image.default_palette(256)[index], (file.name, index)


def test_write_image(rgb, tmp_path):
    got = image.read_image(image.write_image(tmp_path / "a.png", chw(rgb)))
    assert torch.equal(got, chw(rgb))
    smooth = np.full((16, 16, 3), (90, 120, 200), dtype=np.uint8)
    got = image.read_image(image.write_image(tmp_path / "a.jpg", smooth))
    assert (got.int() - chw(smooth).int()).abs().max() <= 2
    with pytest.raises(ImageError, match="suffix"):
        image.write_image(tmp_path / "a.xyz", rgb)


# --- by GDAL --------------------------------------------------------------------------------------


def encoded(array, mode="L", **options):
    stream = io.BytesIO()
    picture = Image.fromarray(array)
    if mode == "P":
        picture = picture.convert("P")
    picture.save(stream, "PNG", **options)
    return bytearray(stream.getvalue())


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_the_quick_way_reads_what_pillow_reads_or_nothing(mode, tmp_path):
    """Files cut off or with wrong bits are left to Pillow, which says what is wrong."""
    generator = np.random.default_rng()
    array = generator.integers(0, 200, (7, 9)).repeat(6, 0).repeat(5, 1).astype(np.uint8)
    if mode == "RGB":
        array = np.stack([array, array // 3, array // 7], -1)
    whole, path = encoded(array, mode), tmp_path / "a.png"
    form, other = image.VALUES, image.COLOURS
    if mode == "RGB":
        form, other = other, form
    path.write_bytes(whole)
    pixels = image.plain_png(path, form)
    assert (pixels.numpy() == np.array(Image.open(path))).all()
    assert image.plain_png(path, other) is None
    for number in range(300):
        damaged = bytearray(whole)
        if number % 2:
            damaged = damaged[: generator.integers(0, len(whole))]
        else:
            damaged[generator.integers(0, len(whole))] ^= 1 << generator.integers(0, 8)
        path.write_bytes(damaged)
        found = image.plain_png(path, form)
        if found is not None:
            assert torch.equal(found, pixels)


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (np.arange(60, dtype=np.uint16).reshape(6, 10) * 900, {}),
        (np.arange(60, dtype=np.uint8).reshape(6, 10) % 4, {"bits": 2}),
        (np.zeros((6, 10, 4), np.uint8), {}),
        (np.zeros((6, 10), bool), {}),
    ],
)
def test_the_quick_way_leaves_other_pictures_alone(array, options, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(array, "P" if options else "L", **options))
    assert image.plain_png(tmp_path / "a.png", image.VALUES) is None
    animation = [Image.fromarray(np.full((4, 5), k, np.uint8)) for k in (1, 2)]
    animation[0].save(tmp_path / "b.png", save_all=True, append_images=animation[1:])
    assert image.plain_png(tmp_path / "b.png", image.VALUES) is None
    for name in (".", "no.png", "a\0b"):
        assert image.plain_png(tmp_path / name, image.VALUES) is None


def test_the_quick_way_makes_no_difference(tmp_path, monkeypatch):
    """Turned, transparent, with text, profiles and offsets: images are as Pillow reads them."""
    array = np.random.default_rng().integers(0, 200, (40, 50, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngInfo()
    text.add_text("Comment", "none")
    ways = {
        "plain": {},
        "turned": {"exif": exif},
        "text": {"pnginfo": text},
        "dpi": {"dpi": (9, 9)},
    }
    ways["transparent"] = {"transparency": tuple(int(v) for v in array[0, 0])}
    for name, options in ways.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png", **options)
    Image.fromarray(array[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(array).convert("P").save(tmp_path / "palette.png")
    names = [*ways, "grey", "palette"]
    quick = [image.read_image(tmp_path / f"{name}.png") for name in names]
    labels = [image.read_labels(tmp_path / f"{name}.png") for name in names[-2:]]
    ids = image.read_segment_ids(tmp_path / "transparent.png")
    for module in (image, formats.panoptic):
        monkeypatch.setattr(module, "plain_png", lambda *_: None)
    for name, found in zip(names, quick, strict=True):
        assert torch.equal(image.read_image(tmp_path / f"{name}.png"), found), name
    for name, found in zip(names[-2:], labels, strict=True):
        assert torch.equal(image.read_labels(tmp_path / f"{name}.png"), found), name
    assert torch.equal(image.read_segment_ids(tmp_path / "transparent.png"), ids)
