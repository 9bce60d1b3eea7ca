"""Images larger than memory: equal to the whole, without seams, resumable; what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pyseg
from pyseg import large, rasters
from pyseg.errors import ImageError, PysegError
from pyseg.image import read_image, read_labels, write_image
from pyseg.models import SemanticModel
from pyseg.rasters import open_raster
from pyseg.tiles import ALIGNMENT, Span, check_tiles, spans

tifffile = pytest.importorskip("tifffile")


class Exact(nn.Module):
    """A network whose sums are exact in float32, so that equal means equal; stride 4.

    It sees 1 + 2 x 1 + 4 x 2 = 11 pixels to each side, and its logits are spread over 6 more.
    """

    REACH = 24

    def __init__(self, classes):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        widths = (3, 4, 4, classes)
        self.layers = nn.ModuleList()
        for inputs, outputs, kernel, stride in zip(
            widths[:-1], widths[1:], (3, 3, 5), (2, 2, 1), strict=True
        ):
            layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
            weight = torch.randint(-1, 2, layer.weight.shape, generator=generator)
            layer.weight = nn.Parameter(weight.float(), requires_grad=False)
            self.layers.append(layer)

    def forward(self, x):
        x = (x * 255).round()
        for layer in self.layers:
            x = layer(x)
        return x


def exact_pipeline(classes=5):
    model = SemanticModel(
        Exact(classes), [f"class {i}" for i in range(classes)], mean=(0.0,) * 3, std=(1.0,) * 3
    )
    return pyseg.Pipeline([model])


def noise(height, width, seed=0, coarse=8):
    """An image with structures of some pixels."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (height // coarse + 2, width // coarse + 2, 3), np.uint8)
    picture = Image.fromarray(small).resize((width + coarse, height + coarse), Image.BICUBIC)
    return np.ascontiguousarray(np.asarray(picture)[:height, :width])


def write_tiff(path, pixels, **options):
    options = {"photometric": "rgb", "tile": (128, 128), "compression": "zlib", **options}
    tifffile.imwrite(path, pixels, **options)
    return path


# --- where tiles lie --------------------------------------------------------------------------


def test_tiles_cover_an_axis_and_their_weights_add_up_to_one():
    for seed in range(500):
        check_spans(np.random.default_rng(seed))


def check_spans(draw):
    tile = int(draw.integers(1, 20)) * ALIGNMENT
    overlap = int(draw.integers(0, tile // ALIGNMENT)) * ALIGNMENT
    halo = int(draw.integers(0, overlap // 2 + 1))
    length = int(draw.integers(1, 3000))
    total = torch.zeros(length, dtype=torch.float64)
    found = spans(length, tile, overlap, halo)
    for index, span in enumerate(found):
        weights = span.weights()
        total[span.start : span.stop] += weights
        assert span.start % ALIGNMENT == 0 and span.stop - span.start <= tile
        if index:
            before = found[index - 1]
            assert before.stop - span.start >= overlap and before.fall == span.rise
            assert span.rise[0] >= span.start + halo and before.fall[1] <= before.stop - halo
        # It alone counts between its ramps, and nowhere outside of them.
        inner = weights[span.rise[1] - span.start : span.fall[0] - span.start]
        assert bool((inner == 1).all()) and span.rise[1] <= span.fall[0]
        assert not weights[: span.rise[0] - span.start].any()
        assert not weights[span.fall[1] - span.start :].any()
    assert found[0].start == 0 and found[-1].stop == length
    torch.testing.assert_close(total, torch.ones(length, dtype=torch.float64), atol=1e-6, rtol=0)


def test_as_few_tiles_as_will_do():
    assert len(spans(20000, 1024, 128)) == -(-(20000 - 128) // 896)
    assert spans(1024, 1024, 128) == [Span(0, 1024, (0, 0), (1024, 1024))]
    assert len(spans(1025, 1024, 128)) == 2


@pytest.mark.parametrize(
    ("tile", "overlap", "halo", "message"),
    [
        (1000, 128, 0, "tile must be a multiple of 32.*got 1000; 992 is near"),
        (0, 0, 0, "tile must be.* at least 32, got 0"),
        (256, 100, 0, "overlap must be a multiple of 32.*got 100; 96 is near"),
        (256, -32, 0, "overlap must be.*got -32"),
        (256, 256, 0, "overlap must be smaller than tile, got overlap=256 and tile=256"),
        (256, 512, 0, "overlap must be smaller than tile"),
        (256, 64, 33, "halo must be 0 to half of the overlap, 32.*got 33; give overlap=96"),
        (64, 32, 40, "halo.*got 40.*a tile larger than that"),
        (256, 64, -1, "halo.*got -1; give 0"),
    ],
)
def test_tiles_that_cannot_cover_an_image_are_refused(tile, overlap, halo, message):
    with pytest.raises(ValueError, match=message):
        check_tiles(tile, overlap, halo)


# --- equal to the whole -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(416, 352), (640, 260), (164, 164), (96, 700)])
def test_labels_are_those_of_the_whole_image(tmp_path, size, one_thread):
    """With a halo of what the network sees, everywhere: in ramps, corners and at ends."""
    pixels = noise(*size)
    pipeline = exact_pipeline()
    source = write_tiff(tmp_path / "in.tif", pixels)
    expected = pipeline(pixels).labels.numpy()
    result = pyseg.predict_large(
        pipeline, source, tmp_path / "out.tif", tile=160, overlap=64, halo=Exact.REACH
    )
    found = tifffile.imread(tmp_path / "out.tif")
    assert (
        result.computed
        == result.tiles
        == len(spans(size[0], 160, 64)) * len(spans(size[1], 160, 64))
    )
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) > 3


def test_without_a_halo_labels_differ_only_where_tiles_lack_context(tmp_path, one_thread):
    pixels = noise(416, 416)
    pipeline = exact_pipeline()
    source = write_tiff(tmp_path / "in.tif", pixels)
    pyseg.predict_large(pipeline, source, tmp_path / "out.tif", tile=160, overlap=32, halo=0)
    different = tifffile.imread(tmp_path / "out.tif") != pipeline(pixels).labels.numpy()
    near = np.zeros(416, bool)
    for span in spans(416, 160, 32)[1:]:
        near[span.start : span.start + Exact.REACH] = True
    for span in spans(416, 160, 32)[:-1]:
        near[span.stop - Exact.REACH : span.stop] = True
    assert different.any()  # so the test above means something
    assert not different[~near][:, ~near].any()


def test_one_tile_is_the_plain_prediction(tmp_path, one_thread):
    """Of odd sizes, with a refiner, to the bit, also from files that are decoded whole."""
    pipeline = pyseg.build("streetnet+crf(iterations=2)")
    pixels = noise(91, 133, coarse=16)
    expected = pipeline(pixels).labels.numpy()
    for name in ("in.tif", "in.png", "in.bmp"):
        source = tmp_path / name
        write_tiff(source, pixels) if name == "in.tif" else write_image(source, pixels)
        target = tmp_path / f"{name}.png"
        assert pyseg.predict_large(pipeline, source, target, tile=160, overlap=32).tiles == 1
        np.testing.assert_array_equal(read_labels(target).numpy(), expected)


def test_batches_and_threads_change_nothing(tmp_path, one_thread):
    pipeline = exact_pipeline()
    source = write_tiff(tmp_path / "in.tif", noise(300, 420))
    for batch in (1, 3, 100):
        target = tmp_path / f"{batch}.png"
        pyseg.predict_large(pipeline, source, target, tile=128, overlap=32, batch_size=batch)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "3.png").read_bytes()
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "100.png").read_bytes()


class Thresholds:
    """A model without logits: labels alone, with void, or of more classes than 8 bits hold."""

    def __init__(self, count):
        self.classes = tuple(f"class {i}" for i in range(count))

    def predict(self, images):
        results = []
        for image in images:
            labels = image[0].int() * len(self.classes) // 256
            labels[image[1] > 200] = 255 if len(self.classes) < 256 else -1
            empty = pyseg.Segmentation((image.shape[1], image.shape[2]), self.classes)
            dtype = torch.uint8 if len(self.classes) < 256 else torch.int16
            results.append(empty.with_labels(labels.to(dtype)))
        return results


@pytest.mark.parametrize("count", [7, 300])
def test_labels_without_logits_are_cut(tmp_path, count):
    pixels = noise(200, 333)
    pipeline = pyseg.Pipeline([Thresholds(count)])
    source = write_tiff(tmp_path / "in.tif", pixels)
    pyseg.predict_large(pipeline, source, tmp_path / "out.tif", tile=96, overlap=32)
    expected = pipeline(pixels).labels.numpy()
    if count == 300:
        expected = expected.astype(np.uint16)
        assert 65535 in expected
    found = tifffile.imread(tmp_path / "out.tif")
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def seams(folder, pipeline, scene, overlap, halo):
    """How much more pixels differ from the whole image's near cuts than elsewhere: factors for
    16 pixels to both sides, for the whole overlap, and that by which labels change more often.

    The grid of tiles of 256 is moved over the scene, so that every pixel that counts is as often
    near a cut as any other, and what is pictured there has no influence.
    """
    step, size = 256 - overlap, (448, 832)
    counts = np.zeros((3, 4))
    moves = range(0, step, 32)
    for index, top in enumerate(moves):
        left = 32 * (5 * index % len(moves))
        pixels = np.ascontiguousarray(scene[top : top + size[0], left : left + size[1]])
        source, target = write_tiff(folder / "in.tif", pixels), folder / "out.tif"
        options = {"tile": 256, "overlap": overlap, "halo": halo, "overwrite": True}
        pyseg.predict_large(pipeline, source, target, **options)
        labels = tifffile.imread(target)
        different = labels != pipeline(pixels).labels.numpy()
        changing = np.zeros_like(different)
        changing[1:, 1:] = labels[1:, 1:] != labels[1:, :-1]
        changing[1:, 1:] |= labels[1:, 1:] != labels[:-1, 1:]
        for place, (what, reach) in enumerate(
            ((different, 16), (different, overlap // 2), (changing, 16))
        ):
            near, counted = [], []
            for length, moved in zip(size, (top, left), strict=True):
                cuts = [sum(span.rise) // 2 for span in spans(length, 256, overlap, halo)[1:]]
                at = np.arange(length)
                near.append(np.any([(cut - reach <= at) & (at < cut + reach) for cut in cuts], 0))
                first, last = cuts[0] + reach - 32, cuts[-1] + step - reach
                counted.append(slice(first - moved, last - moved))
            border = (near[0][:, None] | near[1])[tuple(counted)]
            what = what[tuple(counted)]
            counts[place] += [
                what[border].sum(),
                border.sum(),
                what[~border].sum(),
                (~border).sum(),
            ]
    with np.errstate(invalid="ignore"):  # overlaps of half a tile are everywhere
        return counts[:, 0] / counts[:, 1] / (counts[:, 2] / counts[:, 3])


def test_no_seam_is_seen(tmp_path, one_thread):
    """Streetnet pools over all that it sees, so tiles differ from the whole image everywhere: at
    their borders no more than elsewhere. A hard cut shows, so the measure sees seams."""
    street = Path(pyseg.__file__).parent / "assets/street.jpg"
    picture = np.asarray(Image.open(street))
    mirrored = picture[:, ::-1]
    scene = np.concatenate(
        [np.concatenate([picture, mirrored, picture], 1), np.concatenate([mirrored] * 3, 1)]
    )
    pipeline = pyseg.build("streetnet")
    near, _, changes = seams(tmp_path, pipeline, scene, 128, 0)
    assert near <= 1.1 and changes <= 1.1, (near, changes)
    near, _, changes = seams(tmp_path, pipeline, scene, 64, 32)
    assert near > 1.25 and changes > 1.3, (near, changes)


# --- files in ---------------------------------------------------------------------------------

LAYOUTS = {
    "tiles": {},
    "strips": {"tile": None, "rowsperstrip": 13},
    "one strip, plain": {"tile": None, "compression": None, "rowsperstrip": 10**6},
    "strips, plain": {"tile": None, "compression": None, "rowsperstrip": 7},
    "tiles, plain": {"compression": None},
    "big": {"bigtiff": True, "byteorder": ">"},
    "planes": {"planarconfig": "separate", "tile": (64, 128)},
    "planes of strips, plain": {
        "planarconfig": "separate",
        "tile": None,
        "compression": None,
        "rowsperstrip": 9,
    },
    "lzma": {"compression": "lzma"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["rgb", "grey", "rgb16", "palette", "rgba", "negative"])
def test_regions_of_a_tiff_are_those_of_pillow(tmp_path, layout, kind):
    """Random regions against the whole, decoded by another library where it can."""
    options = dict(LAYOUTS[layout])
    pixels = noise(211, 307)
    extra = {}
    if kind == "grey":
        pixels, extra = pixels[:, :, 0], {"photometric": "minisblack"}
    elif kind == "negative":
        pixels, extra = pixels[:, :, 0], {"photometric": "miniswhite"}
    elif kind == "rgb16":
        pixels = pixels.astype(np.uint16) * 257 + 3
    elif kind == "rgba":
        alpha = noise(211, 307, seed=4)[:, :, :1]
        pixels, extra = np.concatenate([pixels, alpha], 2), {"extrasamples": ["unassalpha"]}
    elif kind == "palette":
        colours = np.random.default_rng(0).integers(0, 256, (3, 256)).astype(np.uint16) * 257
        pixels, extra = pixels[:, :, 0], {"photometric": "palette", "colormap": colours}
    if "planes" in layout and pixels.ndim == 2:
        pytest.skip("one plane")
    stored = pixels.transpose(2, 0, 1) if "planes" in layout else pixels
    path = write_tiff(tmp_path / "a.tif", np.ascontiguousarray(stored), **options, **extra)
    if kind == "negative":
        whole = read_image(255 - pixels)
    elif kind == "palette":
        whole = read_image((colours.T[pixels] >> 8).astype(np.uint8))
    elif kind == "rgb16":
        whole = read_image(pixels)
    else:
        whole = read_image(pixels)
        if layout in ("tiles", "strips", "strips, plain") and kind != "rgba":
            assert torch.equal(read_image(path), whole)  # Pillow
    draw = np.random.default_rng(1)
    with open_raster(path, 64) as raster:
        assert raster.size == (211, 307)
        for _ in range(30):
            top, bottom = sorted(draw.choice(212, 2, replace=False).tolist())
            left, right = sorted(draw.choice(308, 2, replace=False).tolist())
            found, valid = raster.read((top, bottom), (left, right))
            assert valid is None
            assert torch.equal(found, whole[:, top:bottom, left:right])


def test_what_is_kept_of_a_file_is_bounded(tmp_path):
    path = write_tiff(tmp_path / "a.tif", noise(2000, 500), tile=None, rowsperstrip=16)
    with open_raster(path, 64) as raster:
        for top in range(0, 1936, 40):
            for left in range(0, 436, 109):
                raster.read((top, top + 64), (left, left + 64))
                assert raster.held == sum(part.nbytes for part in raster.kept.values())
                assert raster.held <= raster.memory(64)
        assert raster.memory(64) == (64 + 32) * 500 * 3


def test_each_strip_is_decoded_once_per_row_of_tiles(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "a.tif", noise(640, 640), tile=None, rowsperstrip=32)
    seen = []
    with open_raster(path, 160) as raster:
        part = raster._part
        monkeypatch.setattr(
            raster,
            "_part",
            lambda index: (index in raster.kept or seen.append(index), part(index))[1],
        )
        for left in range(0, 480, 96):
            raster.read((96, 256), (left, left + 160))
    assert sorted(seen) == [3, 4, 5, 6, 7]


def test_bands_are_chosen_by_number(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 6), np.uint8)
    path = tmp_path / "six.tif"
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig", tile=(32, 32))
    with pytest.raises(ImageError, match=r"has 6 bands.*give bands=\(1, 2, 3\)"):
        open_raster(path, 64)
    with pytest.raises(ImageError, match=r"bands must be one or three of 1 to 6.*7"):
        open_raster(path, 64, (1, 2, 7))
    with open_raster(path, 64, (5, 3, 1)) as raster:
        found, _ = raster.read((0, 64), (10, 50))
        assert torch.equal(found, read_image(np.ascontiguousarray(pixels[:, 10:50, [4, 2, 0]])))


# --- files that are wrong ---------------------------------------------------------------------


def refused(source, target, message, error=(PysegError, ValueError), **options):
    options = {"tile": 64, "overlap": 32, **options}
    with pytest.raises(error, match=message):
        pyseg.predict_large(exact_pipeline(), source, target, **options)
    folder = Path(target).parent
    assert [path.name for path in folder.iterdir() if path.name.startswith(Path(target).name)] == []


@pytest.mark.parametrize("layout", ["tiles", "strips, plain", "one strip, plain", "big"])
def test_a_truncated_tiff_is_refused_before_any_work(tmp_path, layout):
    source = write_tiff(tmp_path / "in.tif", noise(300, 300), **LAYOUTS[layout])
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) * 2 // 3])
    refused(source, tmp_path / "out.tif", "truncated|damaged")


def test_a_damaged_part_is_an_error_with_its_file(tmp_path):
    source = write_tiff(tmp_path / "in.tif", noise(300, 300))
    with tifffile.TiffFile(source) as file:
        place = file.pages[0].dataoffsets[5]
    content = bytearray(source.read_bytes())
    content[place : place + 40] = bytes(40)
    source.write_bytes(content)
    with pytest.raises(ImageError, match=r"in.tif' is damaged \(part 5: "):
        pyseg.predict_large(exact_pipeline(), source, tmp_path / "out.tif", tile=64, overlap=32)
    assert not (tmp_path / "out.tif").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(b"hello"), "is no TIFF, or truncated or damaged"),
        (lambda p: p.write_bytes(b""), "is no TIFF, or truncated or damaged"),
        (lambda p: p.mkdir(), "is a directory; give one image"),
        (lambda p: None, "does not exist"),
        (
            lambda p: tifffile.imwrite(
                p, np.zeros((3, 64, 64), np.uint8), photometric="minisblack"
            ),
            "holds 3 pictures",
        ),
        (
            lambda p: write_tiff(p, np.zeros((64, 64), np.float32), photometric="minisblack"),
            "pixels of float32.*gdal_translate -ot Byte",
        ),
        (
            lambda p: write_tiff(p, np.zeros((64, 64), np.int16), photometric="minisblack"),
            "pixels of int16",
        ),
        (
            lambda p: write_tiff(p, np.zeros((64, 64, 4), np.uint8), photometric="separated"),
            "photometric interpretation",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, make, message):
    make(tmp_path / "in.tif")
    refused(tmp_path / "in.tif", tmp_path / "out.tif", message)


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "a.jp2").write_bytes(b"x")
    refused(tmp_path / "a.jp2", tmp_path / "out.tif", "no kind of file that is read by regions")
    (tmp_path / "a.png").write_bytes(b"x")
    refused(tmp_path / "a.png", tmp_path / "out.tif", "a.png' is not an image")
    write_image(tmp_path / "b.png", noise(40, 40))
    refused(tmp_path / "b.png", tmp_path / "out.tif", "chosen in TIFF files only", bands=(1, 2, 3))


def test_a_compressed_strip_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rasters, "MAX_SEGMENT", 100_000)
    options = {"tile": None, "rowsperstrip": 400}
    source = write_tiff(tmp_path / "in.tif", noise(400, 400), **options)
    refused(source, tmp_path / "out.tif", "compressed in strips of 400 x 400.*TILED=YES")
    plain = write_tiff(tmp_path / "b.tif", noise(400, 400), **options | {"compression": None})
    with open_raster(plain, 64) as raster:
        assert raster.memory(64) == 0  # of any length, read by rows


def test_images_that_pillow_decodes_keep_their_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("pyseg.image.MAX_PIXELS", 10_000)
    write_image(tmp_path / "in.png", noise(120, 120))
    refused(tmp_path / "in.png", tmp_path / "out.tif", "more than 10000 pixels.*TILED=YES")
    source = write_tiff(tmp_path / "in.tif", noise(120, 120))  # read by regions: no limit
    refused(
        source, tmp_path / "out.png", "PNG of 120 x 120 pixels would be written from the memory"
    )
    pyseg.predict_large(exact_pipeline(), source, tmp_path / "out.tif", tile=64, overlap=32)


@pytest.mark.parametrize("name", ["out.jpg", "out", "out.npy"])
def test_outputs_of_unknown_kinds_are_refused(tmp_path, name):
    source = write_tiff(tmp_path / "in.tif", noise(64, 64))
    refused(source, tmp_path / name, r"output must end in \.tif, \.tiff, \.zarr, \.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 100}, "tile must be a multiple of 32"),
        ({"overlap": 64}, "overlap must be smaller than tile"),
        ({"halo": 17}, "halo must be 0 to half"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    source = write_tiff(tmp_path / "in.tif", noise(64, 64))
    refused(source, tmp_path / "out.tif", message, **options)


@pytest.mark.parametrize(
    ("package", "extra", "source", "target"),
    [
        ("tifffile", "large", "in.tif", "out.tif"),
        ("tifffile", "large", "in.png", "out.tif"),
        ("zarr", "zarr", "in.png", "out.zarr"),
        ("rasterio", "geo", "geo.tif", "out.tif"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, extra, source, target):
    if source == "geo.tif":
        geotiff(tmp_path / source, noise(64, 64))
    elif source == "in.tif":
        write_tiff(tmp_path / source, noise(64, 64))
    else:
        write_image(tmp_path / source, noise(64, 64))
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"package '{package}' is not installed: pip install 'pyseg-toolkit\[{extra}\]'"
    refused(tmp_path / source, tmp_path / target, message, ImportError)


def test_a_missing_codec_is_named(tmp_path):
    try:
        import imagecodecs  # noqa: F401
    except ImportError:
        source = tmp_path / "in.tif"
        Image.fromarray(noise(64, 64)).save(source, compression="tiff_lzw")
        refused(source, tmp_path / "out.tif", r"'imagecodecs'.*pyseg-toolkit\[large\]", ImportError)
    else:
        source = tmp_path / "in.tif"
        Image.fromarray(noise(64, 64)).save(source, compression="tiff_lzw")
        with open_raster(source, 64) as raster:
            assert torch.equal(raster.read((0, 64), (0, 64))[0], read_image(source))


# --- files out --------------------------------------------------------------------------------


def geotiff(path, pixels, **options):
    rasterio = pytest.importorskip("rasterio")
    options = {
        "driver": "GTiff",
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "count": pixels.shape[2],
        "dtype": pixels.dtype,
        "crs": "EPSG:32632",
        "transform": rasterio.Affine(0.5, 0.1, 600000.0, 0.05, -0.5, 5200000.0),
        "tiled": True,
        "blockxsize": 64,
        "blockysize": 64,
        "compress": "lzw",
        "photometric": "rgb",
        **options,
    }
    with rasterio.open(path, "w", **options) as dataset:
        dataset.write(pixels.transpose(2, 0, 1))
    return path


def test_colours_and_classes_are_in_the_tiff(tmp_path, one_thread):
    source = write_tiff(tmp_path / "in.tif", noise(200, 300))
    pipeline = pyseg.build("streetnet")
    pyseg.predict_large(pipeline, source, tmp_path / "out.tif", tile=160, overlap=32)
    with Image.open(tmp_path / "out.tif") as picture:  # another reader
        assert picture.mode == "P"
        palette = np.array(picture.getpalette()).reshape(-1, 3)
        np.testing.assert_array_equal(palette[:11], pipeline.model.palette)
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        assert json.loads(file.pages[0].description)["classes"] == list(pipeline.classes)
        assert file.pages[0].is_tiled and not file.is_bigtiff


def test_zarr_has_the_same_labels(tmp_path, monkeypatch):
    zarr = pytest.importorskip("zarr")
    monkeypatch.setattr(rasters, "BLOCK", 64)
    source = write_tiff(tmp_path / "in.tif", noise(300, 410))
    pipeline = exact_pipeline()
    pyseg.predict_large(pipeline, source, tmp_path / "out.zarr", tile=128, overlap=32)
    pyseg.predict_large(pipeline, source, tmp_path / "out.tif", tile=128, overlap=32)
    array = zarr.open_array(tmp_path / "out.zarr", mode="r")
    assert array.chunks == (128, 128) and array.attrs["classes"] == list(pipeline.classes)
    assert array.attrs["void"] == 255 and len(array.attrs["palette"]) == 5
    np.testing.assert_array_equal(array[:], tifffile.imread(tmp_path / "out.tif"))
    pyseg.predict_large(
        pipeline, source, tmp_path / "out.zarr", tile=64, overlap=32, overwrite=True
    )
    assert zarr.open_array(tmp_path / "out.zarr", mode="r").shape == (300, 410)


def test_a_georeference_is_kept(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    pixels = noise(200, 332)
    source = geotiff(tmp_path / "in.tif", pixels)
    pipeline = exact_pipeline()
    pyseg.predict_large(pipeline, source, tmp_path / "out.tif", tile=96, overlap=64, halo=24)
    with rasterio.open(source) as given, rasterio.open(tmp_path / "out.tif") as made:
        assert made.crs == given.crs and made.transform == given.transform
        assert made.nodata == 255 and made.colormap(1)[1][:3] == pipeline.model.palette[1]
        np.testing.assert_array_equal(made.read(1), pipeline(pixels).labels.numpy())
    refused(source, tmp_path / "out.png", "has a georeference, which PNG cannot hold")
    pytest.importorskip("zarr")
    import zarr

    pyseg.predict_large(pipeline, source, tmp_path / "out.zarr", tile=96, overlap=64)
    attributes = zarr.open_array(tmp_path / "out.zarr", mode="r").attrs
    assert rasterio.crs.CRS.from_wkt(attributes["crs"]) == rasterio.crs.CRS.from_epsg(32632)
    assert attributes["transform"] == [0.5, 0.1, 600000.0, 0.05, -0.5, 5200000.0]


def test_ground_control_points_are_kept(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    from rasterio.control import GroundControlPoint

    points = [
        GroundControlPoint(r, c, 10 + c / 7, 50 - r / 9) for r, c in ((0, 0), (0, 99), (63, 0))
    ]
    source = tmp_path / "in.tif"
    with rasterio.open(
        source,
        "w",
        driver="GTiff",
        height=64,
        width=100,
        count=3,
        dtype="uint8",
        gcps=points,
        crs="EPSG:4326",
    ) as dataset:
        dataset.write(noise(64, 100).transpose(2, 0, 1))
    pyseg.predict_large(exact_pipeline(), source, tmp_path / "out.tif", tile=64, overlap=32)
    with rasterio.open(tmp_path / "out.tif") as made:
        found, system = made.gcps
        assert system == rasterio.crs.CRS.from_epsg(4326)
        assert [(p.row, p.col, p.x, p.y) for p in found] == [
            (p.row, p.col, p.x, p.y) for p in points
        ]


@pytest.mark.parametrize("how", ["nodata", "alpha", "mask"])
def test_pixels_without_data_are_void(tmp_path, how):
    """And tiles that have none are not segmented."""
    rasterio = pytest.importorskip("rasterio")
    pixels = noise(300, 300) // 2 + 1
    absent = np.zeros((300, 300), bool)
    absent[:, 150:] = True
    absent[50:60, 50:60] = True
    pixels[absent] = 0
    options = {}
    if how == "nodata":
        options = {"nodata": 0}
    if how == "alpha":
        pixels = np.concatenate([pixels, np.where(absent, 0, 255)[..., None].astype(np.uint8)], 2)
        options = {"alpha": "yes"}
    source = geotiff(tmp_path / "in.tif", pixels, **options)
    if how == "mask":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(source, "r+") as dataset:
            dataset.write_mask(~absent)
    seen = []
    pipeline = exact_pipeline()
    predict = pipeline.model.predict
    pipeline.model.predict = lambda images: (seen.extend(images), predict(images))[1]
    result = pyseg.predict_large(pipeline, source, tmp_path / "out.tif", tile=96, overlap=64)
    found = tifffile.imread(tmp_path / "out.tif")
    np.testing.assert_array_equal(found == 255, absent)
    assert 0 < len(seen) < result.tiles


# --- stopped runs -----------------------------------------------------------------------------

CHILD = """
import os, signal, sys, time
import torch
import pyseg
from pyseg.models import SemanticModel

class Slow(torch.nn.Module):
    def forward(self, x):
        with open(sys.argv[3], "a") as log:
            log.write(f"{float(x.double().sum()):.6f}\\n")
        if sys.argv[4] != "0" and len(open(sys.argv[3]).readlines()) > int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
        return x[:, :, ::2, ::2]

model = SemanticModel(Slow(), ("r", "g", "b"))
summary = pyseg.predict_large(
    pyseg.Pipeline([model]), sys.argv[1], sys.argv[2], tile=96, overlap=32
)
print(summary.computed, summary.reused)
"""


def child(*arguments):
    return subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """An image, its labels, and what the network was asked for on the way."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_tiff(folder / "in.tif", noise(300, 350))
    assert child(source, folder / "out.tif", folder / "log", 0).stdout.split() == ["25", "0"]
    return source, folder / "out.tif", (folder / "log").read_text().split()


@pytest.mark.parametrize("limit", [1, 5, 18])
def test_a_killed_run_goes_on_behind_its_last_tile(tmp_path, uninterrupted, limit):
    """kill -9 in the middle of a tile, also at the end of a row; the same bytes, no tile twice."""
    source, whole, all_calls = uninterrupted
    target, log = tmp_path / "out.tif", tmp_path / "log"
    killed = child(source, target, log, limit)
    assert killed.returncode == -signal.SIGKILL and not target.exists()
    resumed = child(source, target, log, 0)
    assert resumed.stdout.split() == [str(25 - limit), str(limit)], resumed.stderr
    assert target.read_bytes() == whole.read_bytes()
    # The one that was in work is the only one that was begun twice.
    calls = log.read_text().split()
    assert sorted(calls) == sorted([*all_calls, calls[limit]])
    assert not (tmp_path / "out.tif.unfinished").exists()


def test_a_run_killed_at_any_write_goes_on(tmp_path, monkeypatch):
    """Stopped before and after every file that it writes, renames or deletes."""
    pipeline = exact_pipeline()
    source = write_tiff(tmp_path / "in.tif", noise(150, 200))
    options = {"tile": 96, "overlap": 32}
    pyseg.predict_large(pipeline, source, tmp_path / "whole.tif", **options)

    class Killed(BaseException):
        pass

    count = [0]

    def dying(function):
        def call(*arguments, **keywords):
            count[0] -= 1
            if count[0] == 0:
                raise Killed
            result = function(*arguments, **keywords)
            count[0] -= 1
            if count[0] == 0:
                raise Killed
            return result

        return call

    for name in ("replace", "rename", "unlink"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    stops = 0
    for stop in range(1, 200):
        target = tmp_path / f"{stop}.tif"
        count[0] = stop
        try:
            pyseg.predict_large(pipeline, source, target, **options)
        except Killed:
            stops += 1
            count[0] = 0
            pyseg.predict_large(pipeline, source, target, **options)
        else:
            break
        finally:
            count[0] = 0
        assert target.read_bytes() == (tmp_path / "whole.tif").read_bytes(), stop
        assert not target.with_name(target.name + ".unfinished").exists()
    assert stops > 20


def stopped(pipeline, source, target, after, **options):
    """A run that stops behind so many tiles."""

    def track(places):
        for index, place in enumerate(places):
            if index == after:
                raise KeyboardInterrupt
            yield place

    with pytest.raises(KeyboardInterrupt):
        pyseg.predict_large(pipeline, source, target, track=track, **options)


def test_another_run_into_the_same_folder_is_refused(tmp_path):
    pipeline = exact_pipeline()
    source = write_tiff(tmp_path / "in.tif", noise(200, 200))
    target, options = tmp_path / "out.tif", {"tile": 96, "overlap": 32}
    stopped(pipeline, source, target, 3, **options)
    state = json.loads((tmp_path / "out.tif.unfinished/state.json").read_text())
    assert state["tile"] == 96 and state["overlap"] == 32 and len(state["weights"]) == 64
    assert state["spec"] == str(pipeline) and state["input"]["name"] == "in.tif"

    def refuse(message, pipeline=pipeline, source=source, **other):
        with pytest.raises(PysegError, match=message):
            pyseg.predict_large(pipeline, source, target, **options | other)

    refuse("unfinished run by another call .tile 96 there, 64 here", tile=64)
    refuse("overlap 32 there, 64 here", overlap=64)
    refuse("halo 0 there, 3 here", halo=3)
    other = exact_pipeline()
    other.model.network.layers[0].weight[0, 0, 0, 0] += 1
    refuse("weights", pipeline=other)
    refuse("spec", pipeline=pyseg.Pipeline([*pipeline.stages, lambda image, p: p]))
    moved = write_tiff(tmp_path / "other.tif", noise(200, 200))
    refuse("input", source=moved)
    result = pyseg.predict_large(pipeline, source, target, **options)
    assert result.reused >= 3 and result.computed + result.reused == result.tiles
    refuse("is there already by another call .tile", tile=64)
    assert pyseg.predict_large(pipeline, source, target, **options).computed == 0
    again = pyseg.predict_large(pipeline, source, target, **options | {"tile": 64}, overwrite=True)
    assert again.computed == again.tiles
    os.utime(source, (1, 1))  # changed since
    refuse("input", tile=64)


def test_a_file_that_is_no_result_is_not_replaced(tmp_path):
    source = write_tiff(tmp_path / "in.tif", noise(64, 64))
    target = write_tiff(tmp_path / "out.tif", noise(64, 64))
    before = target.read_bytes()
    with pytest.raises(PysegError, match=r"is no result of predict_large.*overwrite=True"):
        pyseg.predict_large(exact_pipeline(), source, target, tile=64, overlap=32)
    assert target.read_bytes() == before


def test_two_runs_at_a_time_are_refused(tmp_path):
    pipeline = exact_pipeline()
    source = write_tiff(tmp_path / "in.tif", noise(200, 200))
    target, options = tmp_path / "out.tif", {"tile": 96, "overlap": 32}
    refusals = []

    def track(places):
        for place in places:
            if not refusals:
                with pytest.raises(PysegError, match="is being written by another run") as caught:
                    pyseg.predict_large(pipeline, source, target, **options)
                refusals.append(caught)
            yield place

    pyseg.predict_large(pipeline, source, target, track=track, **options)
    assert refusals and target.is_file()


def test_a_full_disk_is_one_error_and_the_run_goes_on(tmp_path):
    """A limit on the size of files stands for it: the system refuses the write in the same way."""
    source = write_tiff(tmp_path / "in.tif", noise(300, 350))
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[5]), resource.RLIM_INFINITY))\n"
    )

    def run(limit):
        return subprocess.run(
            [
                sys.executable,
                "-c",
                script + CHILD,
                source,
                tmp_path / "out.tif",
                tmp_path / "log",
                "0",
                str(limit),
            ],
            capture_output=True,
            text=True,
        )

    full = run(40_000)
    assert full.returncode == 1
    assert re.search(r"PysegError: output .*no space left.*the same call goes on", full.stderr)
    assert not (tmp_path / "out.tif").exists()
    assert run(10**9).returncode == 0
    assert tifffile.imread(tmp_path / "out.tif").shape == (300, 350)


def test_a_disk_that_is_too_small_is_refused_at_once(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(large.shutil, "disk_usage", lambda path: usage)
    source = write_tiff(tmp_path / "in.tif", noise(200, 200))
    with pytest.raises(PysegError, match=r"take .* MB of disk, and 0.0 MB are free"):
        pyseg.predict_large(exact_pipeline(), source, tmp_path / "out.tif", tile=64, overlap=32)


def test_a_damaged_file_of_an_unfinished_run_is_named(tmp_path):
    pipeline = exact_pipeline()
    source = write_tiff(tmp_path / "in.tif", noise(200, 200))
    stopped(pipeline, source, tmp_path / "out.tif", 2, tile=96, overlap=32)
    piece = next((tmp_path / "out.tif.unfinished").glob("tile-*.npz"))
    content = bytearray(piece.read_bytes())
    content[len(content) // 2] ^= 255
    piece.write_bytes(content)
    with pytest.raises(PysegError, match=r"tile-.* is damaged .*delete it, and its tile is comp"):
        pyseg.predict_large(pipeline, source, tmp_path / "out.tif", tile=96, overlap=32)
    piece.unlink()
    pyseg.predict_large(pipeline, source, tmp_path / "out.tif", tile=96, overlap=32)
    pyseg.predict_large(pipeline, source, tmp_path / "b.tif", tile=96, overlap=32)
    assert (tmp_path / "out.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()


def test_stages_that_sometimes_give_logits_are_refused(tmp_path):
    source = write_tiff(tmp_path / "in.tif", noise(200, 200))
    calls = []

    def moody(image, prediction):
        calls.append(1)
        return prediction.with_labels(prediction.labels) if len(calls) == 3 else prediction

    pipeline = pyseg.Pipeline([exact_pipeline().model, moody])
    with pytest.raises(PysegError, match="gives logits for some tiles and none for others"):
        pyseg.predict_large(pipeline, source, tmp_path / "out.tif", tile=96, overlap=32)


# --- memory and the command line ----------------------------------------------------------------


def raster(path, height, width, side=512):
    """An uncompressed tiled TIFF of any size, of one picture at many offsets, a tile at a time."""
    street = Path(pyseg.__file__).parent / "assets/street.jpg"
    picture = np.asarray(Image.open(street).resize((1440, 1080)))

    def tiles():
        draw = np.random.default_rng(0)
        for _ in range(-(-height // side) * -(-width // side)):
            top, left = draw.integers(0, 1080 - side), draw.integers(0, 1440 - side)
            yield np.ascontiguousarray(picture[top : top + side, left : left + side])

    tifffile.imwrite(
        path,
        tiles(),
        shape=(height, width, 3),
        dtype=np.uint8,
        tile=(side, side),
        photometric="rgb",
        bigtiff=True,
    )
    return path


MEMORY = """
import json, sys
import torch
import pyseg


class Thirds(torch.nn.Module):  # quick
    def forward(self, x):
        return x[:, :, ::4, ::4]


pipelines = {
    "streetnet": lambda: pyseg.build("streetnet"),
    "thirds": lambda: pyseg.build(Thirds(), classes=("red", "green", "blue")),
}
summary = pyseg.predict_large(
    pipelines[sys.argv[5]](),
    sys.argv[1],
    sys.argv[2],
    tile=int(sys.argv[3]),
    overlap=int(sys.argv[4]),
    halo=32,
    observe=lambda text: print(text, file=sys.stderr, flush=True),
)
print(json.dumps(summary.to_dict()))
"""


def segmented(*arguments):
    """`predict_large` in a process of its own, where the peak is its own."""
    command = [sys.executable, "-c", MEMORY, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_memory_is_as_announced(tmp_path):
    """The peak is within the arithmetic, and far from the size of the image."""
    source = raster(tmp_path / "in.tif", 9_000, 7_000)
    summary, told = segmented(source, tmp_path / "out.tif", 512, 128, "thirds")
    if summary["peak_bytes"] is None:
        pytest.skip("the system does not tell its peak")
    assert summary["peak_bytes"] <= summary["model_bytes"] + summary["planned_bytes"]
    assert summary["peak_bytes"] < source.stat().st_size * 0.7
    lines = told.splitlines()
    assert lines[0].startswith("9000 x 7000 pixels: ") and lines[1].startswith("memory ")
    assert lines[3].startswith("the model took ")


@pytest.mark.long
def test_a_raster_of_400_megapixels_in_less_than_2_gib_above_the_model(tmp_path):
    """Stopped by kill -9 on the way; some 15 minutes."""
    source = raster(tmp_path / "in.tif", 20_000, 20_000)
    assert source.stat().st_size > 1.2e9
    command = [
        sys.executable,
        "-c",
        MEMORY,
        source,
        tmp_path / "out.tif",
        "1024",
        "128",
        "streetnet",
    ]
    unfinished = tmp_path / "out.tif.unfinished"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not (unfinished / "tile-00002-00004.npz").is_file():
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    finished = sum(1 for _ in unfinished.glob("strip-*.npz")) * 23
    finished += sum(1 for _ in unfinished.glob("tile-00002-*.npz"))
    summary, told = segmented(source, tmp_path / "out.tif", 1024, 128, "streetnet")
    print(told, json.dumps(summary, indent=1))
    assert summary["tiles"] == 23 * 23 and summary["reused"] == finished >= 51
    above_the_model = summary["peak_bytes"] - summary["model_bytes"]
    assert above_the_model < 2 << 30
    assert summary["peak_bytes"] <= summary["model_bytes"] + summary["planned_bytes"]
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        assert file.pages[0].shape == (20_000, 20_000)
    again, _ = segmented(source, tmp_path / "out.tif", 1024, 128, "streetnet")
    assert again["computed"] == 0


def run_cli(*arguments):
    from typer.testing import CliRunner

    from pyseg.cli import app

    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def test_the_command_segments_in_tiles(tmp_path, one_thread):
    source = write_tiff(tmp_path / "in.tif", noise(200, 300))
    write_image(tmp_path / "b.png", noise(90, 90))
    common = ["-s", "streetnet", "-o", tmp_path / "out", "--tile", 160, "--overlap", 32]
    done = run_cli(source, tmp_path / "b.png", *common, "--halo", 8, "--format", "png")
    assert done.exit_code == 0, done.output
    assert "200 x 300 pixels: 2 x 3 = 6 tiles of 160 that share 32, halo 8; 0 are" in done.output
    assert "memory beside the model: " in done.output and "at most " in done.output
    assert re.search(r"in\.png: 6 tiles in .* s, 0 were done already", done.output)
    expected = tmp_path / "expected.png"
    pipeline = pyseg.build("streetnet")
    pyseg.predict_large(pipeline, source, expected, tile=160, overlap=32, halo=8)
    assert (tmp_path / "out/in.png").read_bytes() == expected.read_bytes()
    again = run_cli(source, *common, "--halo", 8, "--format", "png", "--json")
    assert '"reused": 6' in again.output and again.exit_code == 0


def test_the_command_refuses_what_does_not_fit(tmp_path):
    source = write_tiff(tmp_path / "in.tif", noise(64, 64))
    common = [source, "-s", "streetnet", "-o", tmp_path / "out"]
    for options, message in (
        (["--overlap", 64], "--overlap goes with --tile, which is not given"),
        (["--tile", 64, "--overlay"], "--overlay has no meaning with --tile"),
        (["--tile", 100], "error: tile must be a multiple of 32"),
        (
            ["--tile", 128, "--overlap", 128],
            "overlap must be smaller than tile, got --overlap 128 and --tile 128",
        ),
        (["--tile", 64, "--overlap", 32, "--format", "jpg"], "--format must be tif, zarr or png"),
        (["--tile", 64, "--overlap", 32, "--bands", "x"], "--bands must be numbers such as 1,2,3"),
    ):
        done = run_cli(*common, *options)
        assert done.exit_code == 2 and message in done.output, done.output
    (tmp_path / "bad.tif").write_bytes(b"x")
    done = run_cli(tmp_path / "bad.tif", *common, "--tile", 64, "--overlap", 32)
    assert done.exit_code == 1 and "failed: image" in done.output
    assert (tmp_path / "out/in.tif").is_file()  # the others go on


def test_help_states_the_defaults_of_the_function():
    import inspect

    told = " ".join(run_cli("--help").output.replace("│", " ").split())
    parameters = inspect.signature(pyseg.predict_large).parameters
    assert f"Of tiles. [default: {parameters['overlap'].default}]" in told
    assert f"do not count. [default: {parameters['halo'].default}]" in told
