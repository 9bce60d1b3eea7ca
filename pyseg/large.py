"""`predict_large`: a pipeline over an image of any size, by overlapping tiles, in bounded memory.

Tiles go through the pipeline as images of their own, row by row. Of each, the outermost pixels (the
halo) may be thrown away; where two or four tiles meet, their logits are blended in straight ramps;
all else takes the labels of its one tile, by the fused kernel. So full-resolution logits exist in
the ramps only: what has to be kept is one ramp along a row of tiles, not a row of tiles.

Every tile that is finished is a file, in a folder beside the output, until its row of tiles is: a
run that was killed goes on behind its last finished tile, and ends in the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import PluginError, PysegError
from .files import make_folder, read_json, replacing, take_lock, write_json
from .ops import upsample_argmax
from .pipeline import Pipeline
from .progress import notebook_bar
from .rasters import LabelMap, Raster, check_output, open_raster, write_label_map
from .regions import void_label
from .tiles import Span, check_tiles, spans
from .types import Segmentation

_BATCH = 4  # tiles, by default and on accelerators; on a CPU batches gain nothing
_ALLOWANCE = 64 << 20  # bytes that no arithmetic tells: of packages that are loaded on the way
_WORK = ".unfinished"  # ends the name of the folder of an unfinished run, beside its output
_ABOUT = ".json"  # ends the name of the file that says what made an output

Place = tuple[int, int]  # row and column of a tile


@dataclass(frozen=True)
class LargePrediction:
    """The summary of a `predict_large` run."""

    output: Path
    size: tuple[int, int]  # (H, W) of the image
    tiles: int
    computed: int  # tiles of this run
    reused: int  # tiles of earlier runs
    seconds: float  # of this run
    model_bytes: int | None  # peak of the first tiles in the pipeline, above what was held before
    planned_bytes: int  # of all else, as announced
    peak_bytes: int | None  # of this run, model and all else, above what was held before it

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "output": str(self.output), "size": list(self.size)}


def predict_large(
    pipeline: Pipeline,
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tile: int = 1024,
    overlap: int = 128,
    halo: int = 0,
    bands: Sequence[int] | None = None,
    batch_size: int | None = None,
    overwrite: bool = False,
    track: Callable[[Sequence[Place]], Iterable[Place]] = notebook_bar,
    observe: Callable[[str], object] = lambda text: None,
) -> LargePrediction:
    """Segments an image of any size by overlapping tiles, in memory that its width bounds.

    A run that was stopped, even by ``kill -9``, is continued by the same call, which computes no
    finished tile again and ends in the same bytes. Until then nothing is at ``output``; beside it
    lies ``OUTPUT.unfinished``, a folder with what is done and with ``state.json``, which says what
    it belongs to. In the end ``OUTPUT.json`` says what made the output, so that the same call finds
    that nothing is left to do.

    Args:
        pipeline: from `pyseg.build` or `pyseg.load`; refiners see one tile at a time.
        path: a TIFF or BigTIFF (extra ``large``; extra ``geo`` where it has a georeference, which
            the output then has too), read by its tiles or strips and never whole; or another image
            of at most `pyseg.image.MAX_PIXELS`. 8 or 16 bits; grey, RGB or RGBA unless ``bands``
            says what to take.
        output: ``.tif`` (indexed colours, tiled, BigTIFF where needed; GeoTIFF where the image is),
            ``.zarr`` (extra ``zarr``) or ``.png`` (up to the same limit). Values are classes, 255 =
            void; from 256 classes on of 16 bits, 65535 = void. Pixels that a GeoTIFF's mask or
            nodata value excludes are void.
        tile: pixels of a side, a multiple of 32. Larger ones show the network more and cost memory.
        overlap: pixels that neighbours share at least, a multiple of 32.
        halo: pixels at the sides of a tile that are thrown away, at most half of the overlap; tiles
            are blended in the rest of it. Where the network sees no further than this, the result
            is that of the whole image. The longer the blended part, the less of a seam: 0, unless
            the network or a refiner goes wrong at borders.
        bands: of a TIFF, those that are red, green and blue, or the grey one, counted from 1.
        batch_size: tiles per call of the pipeline. None = 1 on a CPU, else 4.
        overwrite: replace an output of another call, or begin an unfinished one anew.
        track: wraps the sequence of (row, column) of the tiles that are left to do, for a progress
            bar such as ``rich.progress.track``.
        observe: called with lines of text: the tiles, the memory and the space on disk that they
            will take, before the work begins.

    Raises:
        ValueError: ``tile``, ``overlap``, ``halo`` or ``batch_size`` out of range.
        ImageError: the image cannot be read in parts, or not be written as ``output`` says.
        ImportError: the package that reads or writes such files is absent.
        PysegError: ``output`` or its unfinished run belong to another call, another process is
            writing it, or there is no space left; then the same call goes on when there is.

    Example:
        >>> predict_large(pyseg.build("streetnet"), "city.tif", "labels.tif", overlap=256)
    """
    check_tiles(tile, overlap, halo)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    target = Path(output)
    begun = time.perf_counter()
    with open_raster(path, tile, bands) as raster:
        check_output(target, raster.size, raster.georeference is not None)
        identity = _identity(pipeline, Path(path), raster, tile, overlap, halo, bands)
        make_folder(target.parent, "output")
        with _Folder(target) as folder, _no_space(target):
            if not folder.claim(identity, overwrite):
                return folder.summary()
            run = _Run(pipeline, raster, folder, tile, overlap, halo)
            run.segment(batch_size, track, observe)
            run.write(target)
            summary = LargePrediction(
                target,
                raster.size,
                run.count,
                run.computed,
                run.count - run.computed,
                time.perf_counter() - begun,
                run.model_bytes,
                run.planned_bytes(),
                run.memory.peak(),
            )
            folder.finish(identity | {"summary": summary.to_dict()})
    return summary


class _Run:
    """The tiles of one image, from pixels to files, and from files to the label map."""

    def __init__(
        self,
        pipeline: Pipeline,
        raster: Raster,
        folder: _Folder,
        tile: int,
        overlap: int,
        halo: int,
    ) -> None:
        self.pipeline, self.raster, self.folder = pipeline, raster, folder
        self.tile, self.overlap, self.halo = tile, overlap, halo
        self.classes = pipeline.classes
        void, _ = void_label(len(self.classes))
        self.dtype = np.dtype(np.uint8 if void == 255 else np.uint16)
        self.void = 255 if void == 255 else 65535
        self.rows, self.columns = (spans(length, tile, overlap, halo) for length in raster.size)
        self.count = len(self.rows) * len(self.columns)
        self.computed = 0
        self.model_bytes: int | None = None
        self.memory = _Memory()
        self.batch_size = 1 if pipeline.device.type == "cpu" else _BATCH
        self.png = folder.target.suffix.lower() == ".png"
        if folder.blended is not None:
            self._decide(folder.blended)

    def _decide(self, blended: bool) -> None:
        """Whether there are logits to blend; labels alone are cut in the middle of the overlap."""
        self.blended = blended
        if not blended:
            self.rows, self.columns = (
                spans(length, self.tile, self.overlap, self.overlap // 2)
                for length in self.raster.size
            )

    def segment(
        self,
        batch_size: int | None,
        track: Callable[[Sequence[Place]], Iterable[Place]],
        observe: Callable[[str], object],
    ) -> None:
        """All rows of tiles that are not done yet, to strips of labels in the folder."""
        self.batch_size = batch_size or self.batch_size
        first = self.folder.rows_done()
        self.folder.clean(first)
        places = [(i, j) for i in range(first, len(self.rows)) for j in range(len(self.columns))]
        missing = [place for place in places if not self.folder.piece(place).is_file()]
        self.computed = len(missing)
        self._announce(observe)
        self._require_space()
        left = set(missing)
        tiles = self._computed(missing, track, observe)
        try:
            # The first tile says whether there are ramps, which is asked for before its row begins.
            computed = itertools.chain([next(tiles)] if missing else [], tiles)
            for i in range(first, len(self.rows)):
                self._row(
                    i,
                    (
                        next(computed)
                        if (i, j) in left
                        else self.folder.load(self.folder.piece((i, j)))
                        for j in range(len(self.columns))
                    ),
                )
        finally:
            tiles.close()

    def _announce(self, observe: Callable[[str], object]) -> None:
        height, width = self.raster.size
        observe(
            f"{height} x {width} pixels: {len(self.rows)} x {len(self.columns)} = {self.count} "
            f"tiles of {self.tile} that share {self.overlap}, halo {self.halo}; "
            f"{self.count - self.computed} are done"
        )
        parts = self._parts()
        listing = " + ".join(f"{what} {_mb(size)}" for what, size in parts.items() if size)
        observe(f"memory beside the model: {listing} = {_mb(self.planned_bytes())}")
        kept, result = self._space()
        observe(
            f"disk: {_mb(kept)} for the rows of tiles in work, and {_mb(result)} at most for each "
            "of the finished labels and the output, before compression"
        )

    def _ramps(self) -> tuple[int, int]:
        """Length of the ramps of rows and of columns."""
        lengths = [max(span.fall[1] - span.fall[0] for span in axis) for axis in self._axes()]
        return lengths[0], lengths[1]

    def _axes(self) -> tuple[Sequence[Span], Sequence[Span]]:
        return self.rows, self.columns

    def _parts(self) -> dict[str, int]:
        """What is held beside the model, in bytes."""
        height, width = self.raster.size
        high, wide = min(self.tile, height), min(self.tile, width)
        (down, across), classes, item = self._ramps(), len(self.classes), self.dtype.itemsize
        rims = 4 * classes * 2 * (down * wide + across * high)
        return {
            f"2 ramps of {classes} x {down} x {width} logits of 4 bytes": 8
            * classes
            * down
            * width,
            f"labels of a row of tiles, 2 x {high} x {width} of {item}": 2 * high * width * item,
            f"rims of {self.batch_size + 1} tiles": (self.batch_size + 1)
            * (rims + high * wide * item),
            f"pixels of {2 * self.batch_size} tiles": 2 * self.batch_size * 3 * high * wide,
            "decoded parts of the file": self.raster.memory(self.tile),
            "allowance for packages": _ALLOWANCE,
            "the PNG": 2 * height * width * item if self.png else 0,
        }

    def planned_bytes(self) -> int:
        """Of all that is held beside the model; with what it leaves idle, once that is known."""
        return sum(self._parts().values()) + (self.model_bytes or 0) // 2

    def _space(self) -> tuple[int, int]:
        """Bytes on disk: of unfinished rows of tiles, and of the labels before compression."""
        height, width = self.raster.size
        parts = [*self._parts().values()]
        tile_bytes = parts[2] // (self.batch_size + 1)
        return len(self.columns) * tile_bytes + parts[0], height * width * self.dtype.itemsize

    def _require_space(self) -> None:
        free, needed = shutil.disk_usage(self.folder.path).free, self._space()[0]
        if free < needed:
            raise PysegError(
                f"output {str(self.folder.target)!r}: the tiles in work take {_mb(needed)} of "
                f"disk, and {_mb(free)} are free; free some, or give another disk"
            )

    # --- a tile -------------------------------------------------------------------------------

    def _computed(
        self,
        missing: Sequence[Place],
        track: Callable[[Sequence[Place]], Iterable[Place]],
        observe: Callable[[str], object],
    ) -> Generator[dict[str, np.ndarray], None, None]:
        """The pieces of tiles that are not done, each when it is a file."""
        places = iter(track(missing))
        step = self.batch_size
        batches = [missing[k : k + step] for k in range(0, len(missing), step)]
        with ThreadPoolExecutor(1) as reader:  # decodes the next tiles while these are segmented
            ahead = reader.submit(self._read, batches[0]) if batches else None
            for index, batch in enumerate(batches):
                assert ahead is not None
                images = ahead.result()
                if index + 1 < len(batches):
                    ahead = reader.submit(self._read, batches[index + 1])
                pieces = self._pieces(batch, images)
                del images
                if index == 0:
                    self._measured(observe)
                for place, piece in zip(batch, pieces, strict=True):
                    self.folder.save(self.folder.piece(place), piece)
                    next(places, None)
                    yield piece
        for _ in places:  # ends a progress bar
            pass

    def _measured(self, observe: Callable[[str], object]) -> None:
        self.model_bytes = self.memory.peak()
        if self.model_bytes is None:
            return
        total = self.model_bytes + self.planned_bytes()
        observe(
            f"the model took {_mb(self.model_bytes)} on its first call, and may leave half as much "
            f"idle in the heap: at most {_mb(total)} in all"
        )

    def _read(self, batch: Sequence[Place]) -> list[tuple[Tensor, Tensor | None]]:
        return [
            self.raster.read(
                (self.rows[i].start, self.rows[i].stop),
                (self.columns[j].start, self.columns[j].stop),
            )
            for i, j in batch
        ]

    @torch.no_grad()
    def _pieces(
        self, batch: Sequence[Place], images: Sequence[tuple[Tensor, Tensor | None]]
    ) -> list[dict[str, np.ndarray]]:
        filled = [k for k, (_, valid) in enumerate(images) if valid is None or bool(valid.any())]
        names = [f"tile {batch[k][0]},{batch[k][1]}" for k in filled]
        found: dict[int, Segmentation] = {}
        if filled:
            results = self.pipeline([images[k][0] for k in filled], names=names)
            found = dict(zip(filled, results, strict=True))
            blended = results[0].logits is not None
            if self.folder.blended is None:
                self._decide(blended)
                self.folder.decide(blended)
            if any((result.logits is not None) != self.blended for result in results):
                raise PluginError(
                    f"{self.pipeline} gives logits for some tiles and none for others, so that "
                    "they cannot be joined; leave out the stage that does"
                )
        return [
            self._piece(self.rows[i], self.columns[j], found.get(k), images[k][1])
            for k, (i, j) in enumerate(batch)
        ]

    def _piece(
        self, ys: Span, xs: Span, found: Segmentation | None, valid: Tensor | None
    ) -> dict[str, np.ndarray]:
        """What a tile gives to the result: the labels of its middle, and its part of the ramps."""

        def part(rows: tuple[int, int], columns: tuple[int, int]) -> tuple[slice, slice]:
            return (
                slice(rows[0] - ys.start, rows[1] - ys.start),
                slice(columns[0] - xs.start, columns[1] - xs.start),
            )

        inner = (ys.rise[1], ys.fall[0]), (xs.rise[1], xs.fall[0])
        own = (xs.rise[0], xs.fall[1])
        rims = {
            "top": (ys.rise, own),
            "bottom": (ys.fall, own),
            "left": (inner[0], xs.rise),
            "right": (inner[0], xs.fall),
        }
        piece: dict[str, np.ndarray] = {}
        if valid is not None:
            piece["valid"] = valid[part((ys.rise[0], ys.fall[0]), own)].numpy()
        if found is None:
            high, wide = (b - a for a, b in inner)
            piece["labels"] = np.full((high, wide), self.void, self.dtype)
            for side, (rows, columns) in rims.items():
                shape = (len(self.classes), rows[1] - rows[0], columns[1] - columns[0])
                piece[side] = np.zeros(shape, np.float32)
            return piece
        piece["labels"] = found.labels[part(*inner)].cpu().numpy().astype(self.dtype)
        weights = ys.weights()[:, None] * xs.weights()
        for side, (rows, columns) in rims.items():
            place = part(rows, columns)
            if 0 in (rows[1] - rows[0], columns[1] - columns[0]):
                shape = (len(self.classes), rows[1] - rows[0], columns[1] - columns[0])
                piece[side] = np.zeros(shape, np.float32)
                continue
            assert found.logits is not None  # without them there are no ramps
            zone = _zone(found.logits, found.size, *place)
            piece[side] = (zone * weights[place].to(zone.device)).cpu().numpy()
        return piece

    # --- a row of tiles -----------------------------------------------------------------------

    def _row(self, i: int, pieces: Iterable[dict[str, np.ndarray]]) -> None:
        """Joins a row of tiles to the strip of labels that is final with it."""
        ys, width = self.rows[i], self.raster.size[1]
        start, ramp = ys.rise[0], ys.rise[1] - ys.rise[0]
        strip = np.full((ys.fall[0] - start, width), self.void, self.dtype)
        void = np.zeros(strip.shape, np.bool_)
        above = self.folder.load(self.folder.carry(i))["ramp"] if ramp else None
        below = np.zeros((len(self.classes), ys.fall[1] - ys.fall[0], width), np.float32)
        beside: np.ndarray | None = None
        for xs, piece in zip(self.columns, pieces, strict=True):
            own, inner = slice(xs.rise[0], xs.fall[1]), slice(xs.rise[1], xs.fall[0])
            strip[ramp:, inner] = piece["labels"]
            if above is not None:
                above[:, :, own] += piece["top"]
            below[:, :, own] += piece["bottom"]
            if beside is not None:
                strip[ramp:, slice(*xs.rise)] = self._labels(beside + piece["left"])
            beside = piece["right"]
            if "valid" in piece:
                void[:, own] |= ~piece["valid"]
        if above is not None:
            strip[:ramp] = self._labels(above)
        strip[void] = self.void
        if i + 1 < len(self.rows):
            self.folder.save(self.folder.carry(i + 1), {"ramp": below}, lasting=True)
        # The strip comes last: it says that its row is done.
        self.folder.save(self.folder.strip(i), {"labels": strip}, lasting=True, compressed=True)
        self.folder.clean(i + 1)

    def _labels(self, logits: np.ndarray) -> np.ndarray:
        """Of blended logits [C, h, w], by the kernel that labels are from elsewhere."""
        if 0 in logits.shape:
            return np.zeros(logits.shape[1:], self.dtype)
        size = (logits.shape[1], logits.shape[2])
        found = upsample_argmax(torch.from_numpy(logits)[None], size)[0]
        return found.numpy().astype(self.dtype)

    # --- the result ---------------------------------------------------------------------------

    def write(self, target: Path) -> None:
        """The output from the strips, under a temporary name until it is whole."""
        palette = getattr(self.pipeline.model, "palette", None) or ()
        labels = LabelMap(
            self.raster.size,
            self.void,
            self.classes,
            palette,
            self._blocks,
            self.raster.georeference,
        )
        made = self.folder.path / f"output{target.suffix.lower()}"
        _remove(made)
        write_label_map(made, labels)
        with replacing(target) as temporary:
            made.rename(temporary)

    def _blocks(self, rows: int) -> Iterator[np.ndarray]:
        """The label map by so many rows a time."""
        held = np.zeros((0, self.raster.size[1]), self.dtype)
        for i in range(len(self.rows)):
            strip = self.folder.load(self.folder.strip(i))["labels"]
            held = np.concatenate([held, strip])
            while len(held) >= rows:
                yield held[:rows]
                held = held[rows:]
        if len(held):
            yield held


def _zone(logits: Tensor, size: tuple[int, int], rows: slice, columns: slice) -> Tensor:
    """A part of what `Segmentation.full_logits` gives, [C, rows, columns] float32."""
    result = logits
    for axis, (length, part) in enumerate(zip(size, (rows, columns), strict=True), start=1):
        count = logits.shape[axis]
        place = torch.arange(part.start, part.stop, dtype=torch.float64) + 0.5
        place = (place * (count / length) - 0.5).clamp(0, count - 1)
        low = place.long()
        share = (place - low).float().to(logits.device)
        share = share.view([-1 if k == axis else 1 for k in range(3)])
        low = low.to(logits.device)
        near = result.index_select(axis, low).float()
        far = result.index_select(axis, (low + 1).clamp(max=count - 1)).float()
        result = near * (1 - share) + far * share
    return result


# --- the folder of an unfinished run ------------------------------------------------------------


class _Folder:
    """What a run has done so far, and whose it is. A context that holds the folder's lock.

    A row of tiles i is done when ``strip-i`` is there, which holds its labels; ``ramp-i`` are the
    blended logits that it takes over from the row above; ``tile-i-j`` are tiles of the row in work.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + _WORK)
        self.about = target.with_name(target.name + _ABOUT)
        self.state = self.path / "state.json"
        self.identity: dict[str, Any] = {}
        self.blended: bool | None = None

    def __enter__(self) -> _Folder:
        make_folder(self.path, "output")
        release = take_lock(self.path / "lock")
        if release is None:
            raise PysegError(
                f"output {str(self.target)!r} is being written by another run, which holds "
                f"{str(self.path / 'lock')!r}; wait for it, or give another output"
            )
        self.release = release
        return self

    def __exit__(self, *error: object) -> None:
        # A refused run leaves nothing behind.
        if self.path.is_dir() and {path.name for path in self.path.iterdir()} <= {"lock"}:
            _remove(self.path)
        self.release()

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.name != "lock":
                _remove(path)

    def claim(self, identity: dict[str, Any], overwrite: bool) -> bool:
        """Takes the folder for a run, a new one or one that goes on; False = all is done already.

        Raises:
            PysegError: the output, or what is done of it, is of another run.
        """
        self.identity = identity
        if self.target.exists() and not overwrite:
            self._require_same(self.about, "is there already")
            if self.about.is_file():
                self._clear()
                return False
        if self.state.is_file():
            if not overwrite:
                self._require_same(self.state, "has an unfinished run")
            theirs = read_json(self.state)
            if self._differences(theirs):
                self._clear()
            else:
                self.blended = theirs.get("blended")
        write_json(self.state, identity | {"blended": self.blended})
        return True

    def _require_same(self, file: Path, what: str) -> None:
        name = f"output {str(self.target)!r} {what}"
        remedy = "give another output, or overwrite=True to replace it"
        if not file.is_file():
            if self.state.is_file():  # killed between the output and what says whose it is
                return
            raise PysegError(f"{name}, and is no result of predict_large; {remedy}")
        if different := self._differences(read_json(file)):
            raise PysegError(f"{name} by another call ({'; '.join(different)}); {remedy}")

    def _differences(self, theirs: Any) -> list[str]:
        if not isinstance(theirs, dict):
            return ["it is damaged"]
        return [
            f"{key} {json.dumps(theirs.get(key))} there, {json.dumps(value)} here"
            for key, value in self.identity.items()
            if theirs.get(key) != json.loads(json.dumps(value))
        ]

    def decide(self, blended: bool) -> None:
        """Remembers whether tiles are blended."""
        self.blended = blended
        write_json(self.state, self.identity | {"blended": blended})

    def piece(self, place: Place) -> Path:
        return self.path / f"tile-{place[0]:05}-{place[1]:05}.npz"

    def carry(self, row: int) -> Path:
        return self.path / f"ramp-{row:05}.npz"

    def strip(self, row: int) -> Path:
        return self.path / f"strip-{row:05}.npz"

    def rows_done(self) -> int:
        """How many rows of tiles are."""
        count = 0
        while self.strip(count).is_file():
            count += 1
        return count

    def clean(self, row: int) -> None:
        """Removes what rows before ``row`` needed."""
        for path in self.path.glob("*.npz"):
            kind, _, number = path.stem.partition("-")
            if kind in ("tile", "ramp") and int(number[:5]) < row:
                path.unlink()

    def save(
        self,
        path: Path,
        arrays: dict[str, np.ndarray],
        *,
        lasting: bool = False,
        compressed: bool = False,
    ) -> None:
        """Writes arrays, whole or not at all; ``lasting`` ones outlive a loss of power, too."""
        temporary = path.with_suffix(".part")
        with temporary.open("wb") as stream:
            write: Any = np.savez_compressed if compressed else np.savez
            write(stream, **arrays)
            if lasting:
                stream.flush()
                os.fsync(stream.fileno())
        temporary.replace(path)

    def load(self, path: Path) -> dict[str, np.ndarray]:
        """What `save` wrote.

        Raises:
            PysegError: it is absent or damaged.
        """
        try:
            with np.load(path) as stored:
                return dict(stored)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            remedy = (
                "delete it, and its tile is computed again"
                if path.name.startswith("tile-")
                else f"delete the folder {str(self.path)!r} to begin anew"
            )
            raise PysegError(
                f"{str(path)!r}, of an unfinished run, is damaged ({error}); {remedy}"
            ) from error

    def finish(self, about: dict[str, Any]) -> None:
        """Says what made the output, and removes what only an unfinished run needs."""
        write_json(self.about, about)
        _remove(self.path)

    def summary(self) -> LargePrediction:
        """Of an earlier run that left nothing to do."""
        found = read_json(self.about, PysegError, {"summary": {"tiles": int, "size": list}})[
            "summary"
        ]
        tiles = found["tiles"]
        height, width = found["size"]
        return LargePrediction(self.target, (height, width), tiles, 0, tiles, 0.0, None, 0, None)


def _identity(
    pipeline: Pipeline,
    path: Path,
    raster: Raster,
    tile: int,
    overlap: int,
    halo: int,
    bands: Sequence[int] | None,
) -> dict[str, Any]:
    """What must be the same for tiles of two runs to belong together."""
    status = path.stat()
    return {
        "spec": str(pipeline),
        "weights": _digest(pipeline),
        "precision": pipeline.precision,
        "classes": list(pipeline.classes),
        "tile": tile,
        "overlap": overlap,
        "halo": halo,
        "bands": None if bands is None else list(bands),
        "input": {
            "name": path.name,
            "bytes": status.st_size,
            "modified": status.st_mtime_ns,
            "size": list(raster.size),
        },
    }


def _digest(pipeline: Pipeline) -> str:
    """sha256 of the weights of all stages."""
    digest = hashlib.sha256()
    for index, stage in enumerate(pipeline.stages):
        state: Any = getattr(stage.component, "state_dict", dict)()
        for key, value in sorted(state.items()):
            if isinstance(value, Tensor):
                value = value.detach().cpu().contiguous()
                digest.update(f"{index} {key} {value.dtype} {list(value.shape)}\n".encode())
                digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Memory:
    """The process's peak above what it holds now, where the system (Linux) tells."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held
            self.before: int | None = self._read("VmRSS")
        except OSError:
            self.before = None

    def peak(self) -> int | None:
        """Bytes; None where the system does not tell."""
        return None if self.before is None else max(0, self._read("VmHWM") - self.before)

    def _read(self, key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


@contextlib.contextmanager
def _no_space(target: Path) -> Iterator[None]:
    """Within it a full disk is one error that says how to go on."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
        )
        if not full and "No space left" not in f"{error} {error.__cause__}":
            raise
        raise PysegError(
            f"output {str(target)!r}: there is no space left to write it ({error}); free some, and "
            "the same call goes on behind the last finished tile"
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


__all__ = ["LargePrediction", "predict_large"]
