"""Images that are read, and label maps that are written, a region at a time.

A TIFF or BigTIFF is read by its tiles or strips through tifffile, one with a georeference through
rasterio; other images, which can only be decoded whole, are, within the limit of `pyseg.image`.
Label maps become TIFF, GeoTIFF, zarr or PNG.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import image as images
from .errors import ImageError, require
from .files import IMAGE_SUFFIXES
from .image import Palette, colours_of, default_palette, read_image, write_labels

TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")
OUTPUT_SUFFIXES = (".tif", ".tiff", ".zarr", ".png")
BLOCK = 512  # pixels of a side of the tiles of TIFFs that are written; zarr's chunks have twice
MAX_SEGMENT = 256 << 20  # bytes of a strip or tile of a file, decoded
_GDAL_CACHE = 64 << 20  # bytes; GDAL's own default is a twentieth of the machine's memory
_RETILE = "gdal_translate -co TILED=YES -co COMPRESS=DEFLATE IN.tif OUT.tif rewrites it in tiles"

Rows = tuple[int, int]  # [from, to)


class Raster:
    """An open image: its size, and its pixels by region. A context that closes it."""

    size: tuple[int, int]  # (H, W)
    georeference: dict[str, Any] | None = None  # rasterio's profile of where it lies

    def read(self, rows: Rows, columns: Rows) -> tuple[Tensor, Tensor | None]:
        """A region: [3, h, w] uint8 RGB, and where it has pixels, [h, w] bool; None = all over."""
        raise NotImplementedError

    def memory(self, tile: int) -> int:
        """Bytes that reading tiles of ``tile`` pixels a side, row by row, keeps."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes the file."""

    def __enter__(self) -> Raster:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_raster(
    path: str | os.PathLike[str], tile: int, bands: Sequence[int] | None = None
) -> Raster:
    """Opens an image for reading by region.

    Reads its header, and of the rest only what cannot be read in parts.

    Args:
        path: a TIFF or BigTIFF of any size; or another image of at most
            `pyseg.image.MAX_PIXELS`.
        tile: what will be read at a time, pixels of a side: sets what is kept of decoded parts.
        bands: of a TIFF, which are red, green and blue, or the one that is grey, counted from 1.
            None = the file must be grey, RGB or RGBA.

    Raises:
        ImageError: it does not exist, is truncated, of another kind, of several pictures, of pixels
            that are neither 8 nor 16 bits, or in parts that are too large to decode.
        ImportError: tifffile or rasterio is needed and absent.
    """
    file, name = Path(path), f"image {os.fspath(path)!r}"
    if file.is_dir():
        raise ImageError(f"{name} is a directory; give one image")
    if file.suffix.lower() in TIFF_SUFFIXES and file.is_file():
        return _open_tiff(file, name, tile, bands)
    if file.is_file() and file.suffix.lower() not in IMAGE_SUFFIXES:
        raise ImageError(
            f"{name} is no kind of file that is read by regions: give {', '.join(TIFF_SUFFIXES)}, "
            f"or an image that fits the memory ({', '.join(IMAGE_SUFFIXES)}); gdal_translate "
            "converts other rasters to TIFF"
        )
    if bands is not None:
        raise ImageError(f"bands={tuple(bands)} are chosen in TIFF files only, and {name} is none")
    return _Whole(file, name)


class _Whole(Raster):
    """An image that Pillow decodes, which it does whole."""

    def __init__(self, file: Path, name: str) -> None:
        try:
            self.pixels = read_image(file)
        except ImageError as error:
            if "pyseg.image.MAX_PIXELS" not in str(error):
                raise
            raise ImageError(
                f"{name} has more than {images.MAX_PIXELS} pixels, and a {file.suffix} can only be "
                "decoded whole; convert it to a tiled TIFF, which is read by regions: "
                "gdal_translate -co TILED=YES -co COMPRESS=DEFLATE -co BIGTIFF=IF_SAFER IN OUT.tif"
            ) from error
        self.size = (self.pixels.shape[1], self.pixels.shape[2])

    def read(self, rows: Rows, columns: Rows) -> tuple[Tensor, Tensor | None]:
        return self.pixels[:, slice(*rows), slice(*columns)].contiguous(), None

    def memory(self, tile: int) -> int:
        return self.pixels.numel()


# --- TIFF -------------------------------------------------------------------------------------


def _open_tiff(file: Path, name: str, tile: int, bands: Sequence[int] | None) -> Raster:
    tifffile: Any = require("tifffile", extra="large")
    try:
        opened = tifffile.TiffFile(file)
    except OSError as error:
        raise ImageError(f"{name} cannot be read ({error}); check the path") from error
    except Exception as error:  # tifffile raises what it likes on damaged headers
        raise ImageError(
            f"{name} is no TIFF, or truncated or damaged ({error}); fetch or export it again"
        ) from error
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(opened.close)
            page = _page_of(opened, name)
            _require_whole(page, file, name)
            if page.is_geotiff:
                return _Geo(file, name, bands)
            raster = _Tiff(opened, page, name, tile, bands)
            stack.pop_all()
            return raster
    except (ImageError, ImportError, OSError):
        raise
    except Exception as error:
        raise ImageError(
            f"{name} is damaged, or a TIFF of an unknown kind ({type(error).__name__}: {error}); "
            f"{_RETILE}"
        ) from error


def _page_of(opened: Any, name: str) -> Any:
    """The picture of a file, at its full size; the reduced copies that many hold are left out."""
    slides = (
        opened.is_svs or opened.is_ndpi or opened.is_scn or opened.is_qpi
    )  # with label pictures
    series = [opened.series[0]] if slides else list(opened.series)
    pages = [page for one in series for page in one.levels[0].pages if page is not None]
    whole = [page for page in pages if not (page.is_reduced or page.is_mask)]
    if len(whole) != 1:
        raise ImageError(f"{name} holds {len(whole)} pictures; extract the one to segment")
    return whole[0].aspage()


def _require_whole(page: Any, file: Path, name: str) -> None:
    """Refuses a file that ends before its pixels do, before any work is done."""
    there = file.stat().st_size
    ends = [a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=False)]
    if ends and max(ends) > there:
        raise ImageError(
            f"{name} is truncated: its pixels reach to byte {max(ends)}, and the file ends at "
            f"{there}; fetch or export it again"
        )


class _Tiff(Raster):
    """Decodes the strips or tiles that a region needs, and keeps the last ones of them."""

    def __init__(
        self, opened: Any, page: Any, name: str, tile: int, bands: Sequence[int] | None
    ) -> None:
        self.opened, self.page, self.name = opened, page, name
        self.size = (page.imagelength, page.imagewidth)
        self.samples = page.samplesperpixel
        self.separate = page.planarconfig == 2 and self.samples > 1
        self.lock = threading.Lock()
        height, width = self.size
        if page.imagedepth != 1 or not height or not width:
            raise ImageError(f"{name} is a volume or empty; give one picture of two dimensions")
        if page.is_tiled:
            self.rows, self.columns = page.tilelength, page.tilewidth
        else:
            self.rows, self.columns = min(page.rowsperstrip, height), width
        self.down, self.across = -(-height // self.rows), -(-width // self.columns)
        expected = self.down * self.across * (self.samples if self.separate else 1)
        if min(len(page.dataoffsets), len(page.databytecounts)) < expected:
            raise ImageError(
                f"{name} is damaged: it lists {len(page.dataoffsets)} parts of {expected}; fetch "
                "or export it again"
            )
        self.colours = self._colours()
        self.bands = _bands_of(
            name, self.samples, bands, any(kind in (1, 2) for kind in page.extrasamples)
        )
        _require_depth(name, page.dtype, page.bitspersample)
        itemsize = page.dtype.itemsize
        self.bytes_per_pixel = itemsize * (1 if self.separate else self.samples)
        # Rows of strips that are not compressed are where arithmetic says, so that no strip,
        # however long, is read whole.
        self.plain = (
            not page.is_tiled
            and page.compression == 1
            and page.predictor == 1
            and page.fillorder == 1
            and page.bitspersample in (8, 16)
        )
        part = self.rows * self.columns * self.bytes_per_pixel
        if part > MAX_SEGMENT and not self.plain:
            raise ImageError(
                f"{name} is compressed in {'tiles' if page.is_tiled else 'strips'} of {self.rows} "
                f"x {self.columns} pixels, {part >> 20} MiB each, of which no part can be read "
                f"alone; {_RETILE}"
            )
        self.limit = self.memory(tile)
        self.kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self.held = 0
        self.tables = page.jpegtables
        if not self.plain:  # a codec that is missing shows now
            self._part(0)

    def _colours(self) -> np.ndarray | None:
        """[N, 3] uint8 of a palette; refuses colours that are not known to be RGB."""
        photometric = int(self.page.photometric)
        if photometric == 3:
            palette = self.page.colormap
            return (palette.T >> 8 if palette.max() > 255 else palette.T).astype(np.uint8)
        jpeg = int(self.page.compression) in (6, 7, 34892, 33007)
        if photometric not in (0, 1, 2) and not (photometric == 6 and jpeg):
            raise ImageError(
                f"{self.name} has photometric interpretation {self.page.photometric!r}; convert it "
                "to RGB"
            )
        return None

    def memory(self, tile: int) -> int:
        if self.plain:
            return 0
        high = tile + 2 * self.rows
        wide = min(tile + 2 * self.columns, self.across * self.columns)
        return min(high, self.down * self.rows) * wide * self.bytes_per_pixel * self._planes()

    def _planes(self) -> int:
        return len(self.bands) if self.separate else 1

    def close(self) -> None:
        self.opened.close()
        self.kept.clear()

    def read(self, rows: Rows, columns: Rows) -> tuple[Tensor, Tensor | None]:
        with self.lock:  # the file has one position
            pixels = self._region(rows, columns)
        if int(self.page.photometric) == 0:
            white = 1 if pixels.dtype == np.bool_ else np.iinfo(pixels.dtype).max
            pixels = ~pixels if pixels.dtype == np.bool_ else white - pixels
        if self.colours is not None:
            pixels = self.colours[pixels[:, :, 0]]
        elif pixels.dtype == np.bool_:
            pixels = pixels.astype(np.uint8) * 255
        return read_image(pixels), None

    def _region(self, rows: Rows, columns: Rows) -> np.ndarray:
        """[h, w, bands], as stored."""
        height, width = rows[1] - rows[0], columns[1] - columns[0]
        result = np.zeros((height, width, len(self.bands)), self.page.dtype)
        whole = slice(None) if self.bands == tuple(range(self.samples)) else list(self.bands)
        for r in range(rows[0] // self.rows, -(-rows[1] // self.rows)):
            top = max(rows[0], r * self.rows)
            bottom = min(rows[1], (r + 1) * self.rows)
            for c in range(columns[0] // self.columns, -(-columns[1] // self.columns)):
                left = max(columns[0], c * self.columns)
                right = min(columns[1], (c + 1) * self.columns)
                target = result[
                    top - rows[0] : bottom - rows[0], left - columns[0] : right - columns[0]
                ]
                inner = (
                    slice(top - r * self.rows, bottom - r * self.rows),
                    slice(left - c * self.columns, right - c * self.columns),
                )
                index = r * self.across + c
                if self.separate:
                    for place, band in enumerate(self.bands):
                        plane = index + band * self.down * self.across
                        target[:, :, place] = self._cut(plane, *inner)[:, :, 0]
                else:
                    target[:] = self._cut(index, *inner)[:, :, whole]
        return result

    def _cut(self, index: int, rows: slice, columns: slice) -> np.ndarray:
        """A part of a strip or tile, [h, w, samples of it]."""
        if not self.plain:
            return self._part(index)[rows, columns]
        samples = self.bytes_per_pixel // self.page.dtype.itemsize
        stride = self.size[1] * self.bytes_per_pixel
        begin = self.page.dataoffsets[index] + columns.start * self.bytes_per_pixel
        length = (columns.stop - columns.start) * self.bytes_per_pixel
        handle = self.opened.filehandle
        lines = []
        for row in range(rows.start, rows.stop):
            handle.seek(begin + row * stride)
            line = handle.read(length)
            if len(line) != length:
                raise self._damaged("it ends before its pixels do")
            lines.append(line)
        dtype = self.page.dtype.newbyteorder(self.opened.byteorder)
        found = np.frombuffer(b"".join(lines), dtype)
        return found.reshape(len(lines), columns.stop - columns.start, samples)

    def _part(self, index: int) -> np.ndarray:
        """A decoded strip or tile, [h, w, samples of it]; the last ones stay in the memory."""
        if index in self.kept:
            self.kept.move_to_end(index)
            return self.kept[index]
        handle = self.opened.filehandle
        count = self.page.databytecounts[index]
        handle.seek(self.page.dataoffsets[index])
        data = handle.read(count) if count else None
        try:
            decoded, _, shape = self.page.decode(data, index, jpegtables=self.tables)
        except ImportError:
            raise
        except Exception as error:
            if "imagecodecs" in str(error):
                require("imagecodecs", extra="large")
            raise self._damaged(f"part {index}: {type(error).__name__}: {error}") from error
        if decoded is None:  # left out by its writer
            decoded = np.full(shape, self.page.nodata, self.page.dtype)
        part = np.asarray(decoded)[0]
        self.held += part.nbytes
        self.kept[index] = part
        while self.held > self.limit and len(self.kept) > 1:
            self.held -= self.kept.popitem(last=False)[1].nbytes
        return part

    def _damaged(self, reason: str) -> ImageError:
        return ImageError(f"{self.name} is damaged ({reason}); fetch or export it again")


def _bands_of(name: str, count: int, bands: Sequence[int] | None, alpha: bool) -> tuple[int, ...]:
    """The bands to read, from 0: one, three, or four with transparency."""
    if bands is not None:
        if len(bands) not in (1, 3) or not all(1 <= band <= count for band in bands):
            raise ImageError(
                f"bands must be one or three of 1 to {count}, those of {name}, got {tuple(bands)}"
            )
        return tuple(band - 1 for band in bands)
    if count in (1, 3) or (count == 4 and alpha):
        return tuple(range(count))
    raise ImageError(
        f"{name} has {count} bands, so it is not known which are red, green and blue; give "
        f"bands=(1, 2, 3), or those that are"
    )


def _require_depth(name: str, dtype: Any, bits: Any) -> None:
    if dtype is None or np.dtype(dtype) not in map(np.dtype, ("u1", "u2", "?")):
        raise ImageError(
            f"{name} has pixels of {dtype or bits}, whose black and white are not known; convert "
            "it to 8 bits: gdal_translate -ot Byte -scale LOW HIGH 0 255 IN.tif OUT.tif"
        )


# --- GeoTIFF ----------------------------------------------------------------------------------


class _Geo(Raster):
    """A TIFF with a georeference. Pixels without data, by its mask, have no labels."""

    def __init__(self, file: Path, name: str, bands: Sequence[int] | None) -> None:
        self.rasterio: Any = require("rasterio", extra="geo")
        self.name = name
        with self._gdal():
            self.dataset = self.rasterio.open(file)
        dataset = self.dataset
        self.size = (dataset.height, dataset.width)
        enums = self.rasterio.enums
        alpha = enums.ColorInterp.alpha in dataset.colorinterp
        found = _bands_of(name, dataset.count, bands, alpha)
        self.bands = [band + 1 for band in found[:3]]  # transparency is in the mask
        for band in self.bands:
            dtype = np.dtype(dataset.dtypes[band - 1])
            _require_depth(name, dtype, None)
        self.masked = any(enums.MaskFlags.all_valid not in f for f in dataset.mask_flag_enums)
        self.colours = None
        if len(self.bands) == 1 and enums.ColorInterp.palette in dataset.colorinterp:
            entries = dataset.colormap(self.bands[0])
            self.colours = np.zeros((max(entries) + 1, 3), np.uint8)
            for value, colour in entries.items():
                self.colours[value] = colour[:3]
        block = dataset.block_shapes[0]
        if block[0] * block[1] * dataset.count * 2 > MAX_SEGMENT:
            raise ImageError(
                f"{name} is stored in parts of {block[0]} x {block[1]} pixels, of which none can "
                f"be read in part; {_RETILE}"
            )
        points, system = dataset.gcps
        self.georeference = {
            "crs": dataset.crs,
            "transform": dataset.transform,
            "gcps": points,
            "gcps_crs": system,
            "rpcs": dataset.rpcs,
        }

    def _gdal(self) -> Any:
        return self.rasterio.Env(GDAL_CACHEMAX=_GDAL_CACHE)

    def read(self, rows: Rows, columns: Rows) -> tuple[Tensor, Tensor | None]:
        window = self.rasterio.windows.Window.from_slices(rows, columns)
        try:
            with self._gdal():
                pixels = self.dataset.read(self.bands, window=window)
                mask = self.dataset.dataset_mask(window=window) if self.masked else None
        except self.rasterio.errors.RasterioError as error:
            raise ImageError(
                f"{self.name} is truncated or damaged ({error.__cause__ or error}); fetch or "
                "export it again"
            ) from error
        pixels = np.ascontiguousarray(pixels.transpose(1, 2, 0))
        if self.colours is not None:
            pixels = self.colours[pixels[:, :, 0]]
        valid = None if mask is None or mask.all() else torch.from_numpy(mask > 0)
        return read_image(pixels), valid

    def memory(self, tile: int) -> int:
        return _GDAL_CACHE

    def close(self) -> None:
        self.dataset.close()


# --- label maps out ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelMap:
    """A label map that is to be written, in blocks of rows."""

    size: tuple[int, int]
    void: int  # the label of pixels without a class: 255, or 65535 in 16 bits
    classes: tuple[str, ...]
    palette: Palette
    blocks: Callable[[int], Iterator[np.ndarray]]  # so many rows a time, the last block fewer
    georeference: dict[str, Any] | None = None

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.void == 255 else np.uint16)

    def colours(self) -> np.ndarray:
        """[256, 3] uint8."""
        colours = np.array(default_palette(256), np.uint8)
        given = colours_of(self.palette)[:256]
        colours[: len(given)] = given
        return colours


def check_output(path: Path, size: tuple[int, int], georeference: bool) -> None:
    """Refuses a name of which it does not follow how to write, or what cannot be written so.

    Raises:
        ImageError: another suffix, or a PNG that is too large or would lose the georeference.
        ImportError: the package that writes it is absent.
    """
    suffix = path.suffix.lower()
    if suffix not in OUTPUT_SUFFIXES:
        raise ImageError(
            f"output must end in {', '.join(OUTPUT_SUFFIXES)}, which says how it is written, got "
            f"{str(path)!r}"
        )
    if suffix == ".zarr":
        require("zarr", extra="zarr")
    elif suffix != ".png":
        require("tifffile", extra="large")
    elif size[0] * size[1] > images.MAX_PIXELS or georeference:
        reason = (
            "it has a georeference, which PNG cannot hold"
            if georeference
            else f"a PNG of {size[0]} x {size[1]} pixels would be written from the memory"
        )
        raise ImageError(f"output {str(path)!r}: {reason}; give .tif or .zarr")


def write_label_map(path: Path, labels: LabelMap) -> None:
    """Writes a label map in the format of its suffix, see `check_output`.

    TIFFs are tiled, compressed by deflate, and BigTIFF where 4 GB could be too few; their colours
    are the palette's. A zarr array has classes, palette, void and georeference in its attributes.
    """
    suffix = path.suffix.lower()
    if suffix == ".zarr":
        _write_zarr(path, labels)
    elif suffix == ".png":
        write_labels(path, np.concatenate([*labels.blocks(BLOCK)]), labels.palette)
    elif labels.georeference is None:
        _write_tiff(path, labels)
    else:
        _write_geotiff(path, labels)


def _write_tiff(path: Path, labels: LabelMap) -> None:
    tifffile: Any = require("tifffile", extra="large")
    height, width = labels.size

    def tiles() -> Iterator[np.ndarray]:
        for block in labels.blocks(BLOCK):
            high = len(block)
            padded = np.zeros((BLOCK, -(-width // BLOCK) * BLOCK), labels.dtype)
            padded[:high, :width] = block
            for left in range(0, width, BLOCK):
                yield padded[:, left : left + BLOCK]

    colours: dict[str, Any] = {"photometric": "minisblack"}
    if labels.dtype == np.uint8:
        colours = {"photometric": "palette", "colormap": labels.colours().T.astype(np.uint16) * 257}
    big = height * width * labels.dtype.itemsize > 2**32 - 2**25  # were nothing compressed
    with tifffile.TiffWriter(path, bigtiff=big) as writer:
        writer.write(
            tiles(),
            shape=(height, width),
            dtype=labels.dtype,
            tile=(BLOCK, BLOCK),
            compression="zlib",
            description=json.dumps({"classes": labels.classes, "void": labels.void}),
            metadata=None,
            software="pyseg",
            **colours,
        )


def _write_geotiff(path: Path, labels: LabelMap) -> None:
    rasterio: Any = require("rasterio", extra="geo")
    height, width = labels.size
    place = dict(labels.georeference or {})
    points, system, rpcs = place.pop("gcps"), place.pop("gcps_crs"), place.pop("rpcs")
    if points:  # instead of a transform
        place = {"gcps": points, "crs": system}
    with (
        rasterio.Env(GDAL_CACHEMAX=_GDAL_CACHE),
        rasterio.open(
            path,
            "w",
            driver="GTiff",
            height=height,
            width=width,
            count=1,
            dtype=labels.dtype,
            nodata=labels.void,
            tiled=True,
            blockxsize=BLOCK,
            blockysize=BLOCK,
            compress="deflate",
            bigtiff="if_safer",
            **place,
        ) as dataset,
    ):
        if rpcs is not None:
            dataset.rpcs = rpcs
        top = 0
        for block in labels.blocks(BLOCK):
            rows = (top, top + len(block))
            window = rasterio.windows.Window.from_slices(rows, (0, width))
            dataset.write(block, 1, window=window)
            top = rows[1]
        dataset.update_tags(classes=json.dumps(labels.classes), software="pyseg")
        if labels.dtype == np.uint8:
            dataset.write_colormap(
                1, {i: (*rgb, 255) for i, rgb in enumerate(labels.colours().tolist())}
            )


def _write_zarr(path: Path, labels: LabelMap) -> None:
    zarr: Any = require("zarr", extra="zarr")
    height, width = labels.size
    side = 2 * BLOCK
    attributes: dict[str, Any] = {
        "classes": list(labels.classes),
        "palette": colours_of(labels.palette).tolist(),
        "void": labels.void,
    }
    place = labels.georeference
    if place is not None and place["crs"] is not None:
        attributes["crs"] = place["crs"].to_wkt()
        attributes["transform"] = list(place["transform"])[:6]
    array = zarr.create_array(
        store=str(path),
        shape=(height, width),
        chunks=(min(side, height), min(side, width)),
        dtype=labels.dtype,
        fill_value=labels.void,
        attributes=attributes,
    )
    top = 0
    for block in labels.blocks(side):
        array[top : top + len(block)] = block
        top += len(block)
