"""The desk: a queue of images, a session for each that is open, and all of it kept on disk.

Nothing here knows of HTTP. The map of an image is written after every step that changes it, what
is being asked beside it, so that a killed process loses neither.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..conversion import convert
from ..errors import ImageError, LabelError, PysegError
from ..files import (
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    files_by_stem,
    fits_json,
    make_folder,
    read_json,
    remove_abandoned,
    replacing,
    some,
    take_lock,
    write_json,
)
from ..formats.annotation import Annotation, Given, Source
from ..formats.indexed import void_of
from ..formats.table import find_format
from ..image import default_palette, read_image, read_labels
from ..pipeline import Pipeline, StageResult, build
from ..promptable import Flood, Promptable, load_sam
from ..regions import CERTAIN, Instances
from ..session import Session
from ..types import Segmentation

OPEN = 8  # images whose undo history is held; of others the map alone
UPLOADS = 1000  # images that a desk takes over HTTP
CLICKS = ("nano", "flood")
EDITS = ("labels", "instances")
VOID = -1  # in what the page gets, whatever the number of classes
_PLACE = {"indexed": "labels/{}.png", "labelme": "{}.json"}  # of a map in a format's folder
_KEPT = ".studio"  # folder of what is kept beside the maps
_NOTE = {"done?": bool, "unsure?": object, "spec?": object, "asked?": object}
_ASKED = {
    "points": [[float]],
    "positive": [bool],
    "box": object,
    "label": object,
    "selected": object,
}


@dataclass
class Item:
    """An image of the queue."""

    name: str
    path: Path
    done: bool = False  # looked through, as its annotator says
    saved: bool = False  # whether a map of it is on disk
    unsure: float | None = None  # mean doubt of the pipeline in use, 0 to 1
    error: str | None = None  # why it cannot be opened


@dataclass
class Document:
    """An image that is open."""

    item: Item
    image: Tensor  # [3, H, W] uint8 RGB
    session: Session
    stages: list[StageResult]
    truth: np.ndarray | None  # [H, W] int, -1 = void
    revision: int = 0  # counts changes: two pages of one image notice each other
    lock: threading.Lock = field(default_factory=threading.Lock)

    def labels(self) -> np.ndarray:
        """The map as edited, [H, W] int, -1 = void; of instances the front one's class."""
        return plain(self.session.result)

    def annotation(self) -> Annotation:
        """What is edited, for files: areas of classes, or instances."""
        result, name = self.session.result, self.item.path.name
        if self.session.edit == "labels":
            labels, count = plain(result), len(result.classes)
            return Annotation.of_labels(self.item.name, labels, count, file_name=name)
        assert result.instances is not None
        return Annotation.of_instances(self.item.name, result.instances, file_name=name)


class Conflict(PysegError):
    """A step that was meant for an older state of the image than is there."""


class Desk:
    """Images, the pipeline that begins their maps, and the folder where these are kept.

    Args:
        images: a file, a folder of images, or None = only what is uploaded.
        output: folder for the maps, made if absent: ``labels/NAME.png`` and ``classes.json``, as
            the data set ``folder`` reads them.
        spec: of the pipeline, or a `Pipeline`.
        labels: folder of label PNGs to begin with in place of predictions, by the images' stems.
        truth: folder of label PNGs to compare with.
        edit: ``"labels"``, or ``"instances"``: objects, which may overlap. They begin with those of
            the prediction whose score is at least 0.5, and none where it has no instances, and are
            kept as COCO's JSON in ``instances/NAME.json``, beside their label map.
        clicks: what answers clicks: ``"nano"``, ``"flood"``; None = the pipeline's own promptable
            segmenter where a stage has one, else ``"nano"``.
        make: makes a pipeline of a spec.

    Raises:
        PysegError: another process has the output open, or it holds maps of other classes or of
            the other kind.
        FileNotFoundError: there is no such image or folder.
        ValueError: two images share a stem, another ``clicks`` or ``edit``, or ``labels`` for
            instances.
    """

    def __init__(
        self,
        images: str | Path | None,
        output: str | Path,
        *,
        spec: str | Pipeline,
        labels: str | Path | None = None,
        truth: str | Path | None = None,
        edit: str = "labels",
        clicks: str | None = None,
        make: Callable[[str], Pipeline] = build,
    ) -> None:
        self._make = make
        self._own: dict[str, Promptable] = {}
        if edit not in EDITS:
            raise ValueError(f"edit must be one of {', '.join(EDITS)}, got {edit!r}")
        if edit == "instances" and labels is not None:
            raise ValueError("labels holds label maps, and instances cannot begin with them")
        self.edit: Any = edit
        self.clicks = self._checked_clicks(clicks)
        self.pipeline = spec if isinstance(spec, Pipeline) else make(spec)
        self._files = [] if images is None else _image_files(Path(images))
        self._begun = _label_files(labels, "labels")
        self._truth = _label_files(truth, "truth")
        self.output = make_folder(output, "output")
        make_folder(self.output / _KEPT, "output")
        make_folder(self.output / "labels", "output")
        release = take_lock(self.output / _KEPT / "lock")
        if release is None:
            raise PysegError(
                f"output {str(self.output)!r} is open in another studio; stop that one, or give "
                "another output"
            )
        self._release: Callable[[], None] | None = release
        try:
            self._check_classes(self.pipeline)
            self._check_edit()
            for folder in (self.output, self.output / "labels", self.output / _KEPT):
                remove_abandoned(folder, 0)  # the lock is ours, so its writer was killed
            uploads = self.output / "uploads"
            found = [*self._files, *(_image_files(uploads) if _holds_files(uploads) else [])]
            _check_stems(found)
            self.items = [self._item(path) for path in found]
        except BaseException:
            release()
            raise
        self._warm: Pipeline | None = None  # which has run already
        self._open: OrderedDict[int, Document] = OrderedDict()
        self._lock = threading.RLock()  # of the list of what is open, and of the settings
        self._survey: threading.Thread | None = None
        self._stop_survey = threading.Event()

    # --- settings -------------------------------------------------------------------------------

    @property
    def classes(self) -> tuple[str, ...]:
        return self.pipeline.classes

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """One colour for each class."""
        own = tuple(getattr(self.pipeline.model, "palette", None) or ())
        return own + default_palette(len(self.classes))[len(own) :]

    @property
    def clicked(self) -> str:
        """Name of what answers clicks."""
        if self.clicks is not None:
            return self.clicks
        for stage in self.pipeline.stages:
            if getattr(stage.component, "generator", None) is not None:
                return stage.text
        return "nano"

    def configure(self, *, spec: str | None = None, clicks: str | None = None) -> None:
        """Another pipeline, or something else to answer clicks. Undo begins anew, maps stay.

        Raises:
            PysegError: no such pipeline, or one of other classes than those of the maps on disk.
            ValueError: options that a stage does not take, or another ``clicks``.
        """
        clicks = self._checked_clicks(clicks)
        pipeline = self.pipeline
        if spec is not None and spec != str(pipeline):
            pipeline = self._make(spec)
            self._check_classes(pipeline)
        self.survey(False)
        with self._lock:
            if pipeline is not self.pipeline:
                for item in self.items:
                    item.unsure = item.error = None
            self.pipeline, self.clicks = pipeline, clicks or self.clicks
            self._open.clear()

    @staticmethod
    def _checked_clicks(clicks: str | None) -> str | None:
        if clicks is not None and clicks not in CLICKS:
            raise ValueError(f"clicks must be one of {', '.join(CLICKS)}, got {clicks!r}")
        return clicks

    def _check_classes(self, pipeline: Pipeline) -> None:
        """That maps on disk are of these classes, whose list is written with the first one."""
        path = self.output / "classes.json"
        if not path.is_file():
            return
        shape = {"classes": [{"name": str}]}
        names = tuple(one["name"] for one in read_json(path, LabelError, shape)["classes"])
        if names != pipeline.classes:
            raise PysegError(
                f"output {str(self.output)!r} holds maps of the classes {some(names)}, and "
                f"{pipeline} has {some(pipeline.classes)}; give another output"
            )

    def _check_edit(self) -> None:
        """That maps on disk are of the kind that is edited: each would leave the other behind."""
        there = "instances" if _holds_files(self.output / "instances") else "labels"
        if _holds_files(self.output / "labels") and there != self.edit:
            raise PysegError(
                f"output {str(self.output)!r} holds {there}, and edit is {self.edit!r}; give "
                f"edit={there!r}, or another output"
            )

    def _promptable(self) -> Promptable:
        if self.clicks is None:
            for stage in self.pipeline.stages:
                own: Promptable | None = getattr(stage.component, "generator", None)
                if own is not None:
                    return own
        name = self.clicks or "nano"
        if name not in self._own:
            self._own[name] = Flood() if name == "flood" else load_sam(size="nano")[1]
        return self._own[name]

    # --- the queue ------------------------------------------------------------------------------

    def _item(self, path: Path) -> Item:
        item = Item(path.stem, path, saved=self._kept(path.stem).is_file())
        note = self._note(item.name)
        item.done = bool(note.get("done", False))
        if note.get("spec") == str(self.pipeline) and isinstance(note.get("unsure"), float):
            item.unsure = note["unsure"]
        return item

    def add(self, name: str, write: Callable[[Path], Any]) -> int:
        """Adds an image that came over HTTP, and keeps it under the output.

        Args:
            name: what its sender calls it: letters, digits, dot, dash and underscore are kept, of
                the last part of a path alone.
            write: writes the file to a path.

        Returns:
            Its place in the queue.

        Raises:
            ImageError: it is no image.
            PysegError: the desk has taken `UPLOADS` already.
        """
        last = re.split(r"[\\/]", name)[-1]
        stem = re.sub(r"[^\w.-]", "_", Path(last).stem, flags=re.ASCII).strip("._-")[:80] or "image"
        suffix = Path(last).suffix.lower()
        if suffix not in IMAGE_SUFFIXES:
            raise ImageError(
                f"{last[-80:]!r} has no suffix of an image; give a file of "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        folder = make_folder(self.output / "uploads", "output")
        with self._lock:
            taken = {item.name for item in self.items}
            if sum(item.path.parent == folder for item in self.items) >= UPLOADS:
                raise PysegError(f"{UPLOADS} images were uploaded; begin another output")
            number, free = 1, stem
            while free in taken:
                number, free = number + 1, f"{stem}_{number}"
            path = folder / f"{free}{suffix}"
            with replacing(path) as temporary:
                write(temporary)
                with _called(temporary, last[-80:]):
                    read_image(temporary)
            self.items.append(self._item(path))
            return len(self.items) - 1

    def item(self, index: int) -> Item:
        """An image of the queue.

        Raises:
            IndexError: there is none of this number.
        """
        if not 0 <= index < len(self.items):
            raise IndexError(f"there is no image {index}: the queue has {len(self.items)}")
        return self.items[index]

    def survey(self, run: bool) -> None:
        """Begins to segment all that is not done, for their doubt, or stops that."""
        with self._lock:
            running = self._survey
        if not run:
            self._stop_survey.set()
            if running is not None:
                running.join()
            return
        if running is None or not running.is_alive():
            self._stop_survey.clear()
            self._survey = threading.Thread(target=self._look_through, daemon=True)
            self._survey.start()

    @property
    def surveying(self) -> bool:
        return self._survey is not None and self._survey.is_alive()

    def _look_through(self) -> None:
        pipeline = self.pipeline
        for item in list(self.items):
            if self._stop_survey.is_set():
                return
            if item.unsure is None and not item.done:
                try:
                    self._set_doubt(item, pipeline.trace(item.path), pipeline)
                except (PysegError, ValueError, OSError) as error:
                    item.error = _said(error, item)

    def _set_doubt(self, item: Item, stages: list[StageResult], pipeline: Pipeline) -> None:
        found = next((d for s in reversed(stages) if (d := doubt(s.prediction)) is not None), None)
        if found is not None:
            item.unsure = float(found.mean())
            self._write_note(item.name, unsure=item.unsure, spec=str(pipeline))

    # --- a document -----------------------------------------------------------------------------

    def open(self, index: int) -> Document:
        """The document of an image: as it was left, else what ``labels`` has, else predicted.

        Raises:
            IndexError: there is no such image.
            PysegError: it, or its map, cannot be read.
        """
        item = self.item(index)
        with self._lock:
            if index in self._open:
                self._open.move_to_end(index)
                return self._open[index]
            try:
                document = self._new_document(item)
            except (PysegError, ValueError, OSError) as error:
                item.error = _said(error, item)
                raise PysegError(item.error) from error
            item.error = None
            self._open[index] = document
            while len(self._open) > OPEN:
                self._open.popitem(last=False)
            return document

    def _new_document(self, item: Item) -> Document:
        image = read_image(item.path)
        if self._warm is not self.pipeline:  # a first run's times would mislead
            self.pipeline.trace(image, name=item.name)
            self._warm = self.pipeline
        stages = self.pipeline.trace(image, memory=True, name=item.name)
        self._set_doubt(item, stages, self.pipeline)
        start: Any
        if self.edit == "instances":
            found = stages[-1].prediction.instances
            start = self._read_instances(item) if item.saved else _certain(found)
        else:
            start = self._map_of(item.name)
            if not item.saved:
                start = self._begun.get(item.name, stages[-1].prediction)
        session = Session(
            image,
            None if isinstance(start, Segmentation) else self.classes,
            start=start,
            edit=self.edit,
            promptable=self._promptable(),
            palette=self.palette,
        )
        truth = None
        if item.name in self._truth:
            truth = _read_truth(self._truth[item.name], self.classes, session.size)
        document = Document(item, image, session, stages, truth)
        self._ask_again(document)
        return document

    def _ask_again(self, document: Document) -> None:
        """What was being asked when the process ended."""
        asked = self._note(document.item.name).get("asked")
        if asked is None:
            return
        session = document.session
        try:
            if asked["selected"] is not None:
                x, y = asked["selected"]
                session.select(x, y)
            if asked["box"] is not None:
                x0, y0, x1, y1 = asked["box"]
                session.box(x0, y0, x1, y1, asked["label"])
            for (x, y), positive in zip(asked["points"], asked["positive"], strict=True):
                session.click(x, y, positive, asked["label"])
        except (PysegError, TypeError, ValueError):  # of other classes, or written by another
            session.clear()

    def act(self, index: int, revision: int | None, step: Callable[[Session], Any]) -> Document:
        """Does a step of a session and keeps what comes of it.

        Args:
            index: of the image.
            revision: of the document that the step was meant for; None = whichever is there.
            step: what is done.

        Raises:
            Conflict: the document has changed since.
            PysegError: the step cannot be done.
        """
        document = self.open(index)
        with document.lock:
            if revision is not None and revision != document.revision:
                raise Conflict(
                    f"{document.item.name!r} has changed elsewhere, such as in another tab; look "
                    "at it again"
                )
            before = document.session.version
            step(document.session)
            document.revision += 1
            # What is asked refers to the map, so that comes first.
            if document.session.version != before:
                self._write_map(document)
            asked = document.session.asked
            self._write_note(document.item.name, asked=None if asked is None else asked._asdict())
        return document

    def embed(self, index: int) -> None:
        """Computes what the first click would wait for."""
        document = self.open(index)
        with document.lock:
            document.session.embed()

    def finish(self, index: int, done: bool) -> None:
        """Marks an image as looked through, with its map as it is, or takes that back."""
        document = self.open(index)
        with document.lock:
            if done:
                self._write_map(document)
            document.item.done = done
            self._write_note(document.item.name, done=done)

    # --- on disk --------------------------------------------------------------------------------

    def _map_of(self, name: str) -> Path:
        return self.output / "labels" / f"{name}.png"

    def _kept(self, name: str) -> Path:
        """What an image begins with the next time."""
        objects = self.output / "instances" / f"{name}.json"
        return objects if self.edit == "instances" else self._map_of(name)

    def _read_instances(self, item: Item) -> Instances:
        path = self._kept(item.name)
        source = find_format("coco").open_source(path, Given(classes=self.classes))
        (name,) = source.names
        return source.read(name).instances()

    def _write_map(self, document: Document) -> None:
        if not (self.output / "classes.json").is_file():
            writer = find_format("indexed", writable=True).writer
            assert writer is not None
            writer(self.output, self._source(())).finish(())
        document.session.result.save(self._map_of(document.item.name))
        if self.edit == "instances":
            make_folder(self.output / "instances", "output")
            self._write("coco", self._kept(document.item.name), [document.annotation()])
        document.item.saved = True

    def _write(self, to: str, path: Path, annotations: Sequence[Annotation]) -> None:
        """A file or folder of a format."""
        target = find_format(to, writable=True)
        assert target.writer is not None
        writer = target.writer(path, self._source([one.name for one in annotations]))
        writer.finish([writer.write(one) for one in annotations])

    def _note(self, name: str) -> dict[str, Any]:
        path = self.output / _KEPT / f"{name}.json"
        if not path.is_file():
            return {}
        note: dict[str, Any] = read_json(path, PysegError, _NOTE)
        if note.get("asked") is not None:
            note["asked"] = _checked_asked(note["asked"])
        return note

    def _write_note(self, name: str, **changes: Any) -> None:
        note = {**self._note(name), **changes}
        write_json(self.output / _KEPT / f"{name}.json", note)

    def _source(self, names: Sequence[str]) -> Source:
        def unread(name: str) -> Annotation:
            raise AssertionError(name)

        return Source(self.classes, tuple(names), unread, palette=self.palette)

    def export(self, index: int, to: str) -> tuple[str, bytes]:
        """The map of one image as a file of ``"indexed"``, ``"coco"`` or ``"labelme"``.

        Returns:
            A name for it, and its bytes.
        """
        document = self.open(index)
        with document.lock:
            annotation = document.annotation()
        item = document.item
        target = find_format(to, writable=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{item.name}{target.suffix}"
            self._write(to, path, [annotation])
            written = path / _PLACE[to].format(item.name) if to in _PLACE else path
            return written.name, written.read_bytes()

    def export_all(self, to: str) -> list[str]:
        """All maps on disk to ``coco.json`` or the folder ``labelme``, beside them.

        Returns:
            What was written and lost, in words.
        """
        target = find_format(to, writable=True)
        if not any(item.saved for item in self.items):
            raise PysegError("no map was changed or marked as done, so that there is none to write")
        path = self.output / f"{to}{target.suffix}"
        if self.edit == "instances":
            saved = [item for item in self.items if item.saved]
            self._write(to, path, [self._kept_annotation(item) for item in saved])
            return [f"{len(saved)} images in {path}"]
        found = convert(
            self.output / "labels",
            path,
            to=to,
            source_format="indexed",
            classes=self.classes,
            overwrite=True,
        )
        return [f"{found.images} images in {path}", *found.lines()]

    def _kept_annotation(self, item: Item) -> Annotation:
        objects, name = self._read_instances(item), item.path.name
        return Annotation.of_instances(item.name, objects, file_name=name)

    def close(self) -> None:
        """Ends the survey and gives the output free; nothing waits to be written."""
        self.survey(False)
        if self._release is not None:
            self._release()
        self._release = None  # its descriptor may be another file's soon


def _certain(found: Instances | None) -> Instances | None:
    """Those that a prediction would show."""
    if found is None:
        return None
    kept = found.scores >= CERTAIN
    crowd = None if found.crowd is None else found.crowd[kept]
    return Instances(
        found.boxes[kept], found.masks[kept], found.scores[kept], found.labels[kept], crowd
    )


def doubt(prediction: Segmentation) -> Tensor | None:
    """How unsure a prediction is of each pixel, [H, W] in 0..1; None where it cannot tell.

    The model's own uncertainty, else what is lacking of the probability of the first class.
    """
    if prediction.uncertainty is not None:
        return prediction.full_uncertainty().clamp(0, 1).cpu()
    if prediction.logits is not None:
        return (1 - prediction.confidence()).clamp(0, 1).cpu()
    return None


def plain(result: Segmentation) -> np.ndarray:
    """Labels with -1 for void, [H, W] int32."""
    labels = result.labels.cpu().numpy().astype(np.int32)
    labels[labels == void_of(len(result.classes))] = VOID
    return labels


def runs(values: np.ndarray) -> dict[str, list[int]]:
    """A map row by row as runs of equal values, which JSON holds well."""
    flat = values.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(np.append(starts, flat.size))
    return {"values": flat[starts].astype(np.int64).tolist(), "lengths": lengths.tolist()}


def stroke(points: Sequence[Sequence[float]], radius: float, size: tuple[int, int]) -> np.ndarray:
    """What a round brush covers that is drawn along a line, [H, W] bool.

    Args:
        points: x, y in pixels, the first pixel from 0 to 1; parts may lie outside the image.
        radius: in pixels; a pixel is covered if its middle is, and those under the points are.
        size: (H, W).

    Raises:
        PysegError: no points, or a radius that is none.
    """
    line = np.asarray(points, np.float64).reshape(-1, 2)
    height, width = size
    if not len(line) or not np.isfinite(line).all() or not 0 < radius <= 4096:
        raise PysegError(
            f"a stroke has points and a radius above 0 and up to 4096, got {len(line)} points and "
            f"{radius}"
        )
    mask = np.zeros(size, bool)
    for begin, end in zip(line, line[1:] if len(line) > 1 else line, strict=False):
        low = np.floor(np.minimum(begin, end) - radius).astype(int)
        high = np.ceil(np.maximum(begin, end) + radius).astype(int) + 1
        left, top = np.maximum(low, 0)
        right, bottom = min(int(high[0]), width), min(int(high[1]), height)
        if left >= right or top >= bottom:
            continue
        y, x = np.ogrid[top:bottom, left:right]
        x, y = x + 0.5 - begin[0], y + 0.5 - begin[1]
        along = end - begin
        share = (x * along[0] + y * along[1]) / max(float(along @ along), 1e-12)
        share = np.clip(share, 0, 1)
        far = (x - share * along[0]) ** 2 + (y - share * along[1]) ** 2
        mask[top:bottom, left:right] |= far <= radius**2
    for x, y in np.floor(line).astype(int):
        if 0 <= x < width and 0 <= y < height:
            mask[y, x] = True
    return mask


def _image_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"images: {str(path)!r} does not exist; check the path")
    return list(files_by_stem(path, IMAGE_SUFFIXES, "images").values())


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir())


def _check_stems(paths: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in paths:
        if path.stem in seen:
            raise ValueError(f"{seen[path.stem]} and {path} have the same stem; rename one")
        seen[path.stem] = path


def _label_files(folder: str | Path | None, argument: str) -> Mapping[str, Path]:
    return {} if folder is None else files_by_stem(Path(folder), LABEL_SUFFIXES, argument)


def _read_truth(path: Path, classes: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    labels = read_labels(path)
    if tuple(labels.shape) != size:
        raise LabelError(
            f"truth {str(path)!r} is {list(labels.shape)}, its image {list(size)}: they must agree"
        )
    empty = Segmentation(size, tuple(classes))
    if void_of(len(classes)) != 255:
        labels = labels.to(torch.int16)
    return plain(empty.with_labels(labels))


def _checked_asked(value: Any) -> dict[str, Any] | None:
    return value if fits_json(value, _ASKED) else None


@contextlib.contextmanager
def _called(path: Path, name: str) -> Iterator[None]:
    """Errors speak of ``name``, which its user knows, rather than of a path."""
    try:
        yield
    except ImageError as error:
        raise ImageError(str(error).replace(str(path), name)) from error


def _said(error: Exception, item: Item) -> str:
    return str(error).replace(str(item.path), item.path.name) or type(error).__name__


__all__ = [
    "CLICKS",
    "EDITS",
    "Conflict",
    "Desk",
    "Document",
    "Item",
    "doubt",
    "plain",
    "runs",
    "stroke",
]
