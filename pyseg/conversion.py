"""Annotations from one format to another, with what is lost, measured on what was written."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from .errors import PysegError
from .files import make_folder, remove_abandoned, replacing
from .formats.annotation import (
    BACKGROUND,
    Annotation,
    Given,
    Images,
    Region,
    Source,
    class_names,
)
from .formats.geojson import placement_of
from .formats.table import Format, Writer, detect, find_format
from .progress import notebook_bar

Track = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass
class Loss:
    """What the target says otherwise than the source; masks are compared pixel by pixel."""

    masks: int = 0  # objects, and areas of classes that are no objects
    equal: int = 0
    changed: int = 0
    gone: int = 0
    new: int = 0
    pixels: int = 0  # of all masks of the source
    differing: int = 0  # pixels in which masks differ, those gone or new among them
    reasons: Counter[str] = field(default_factory=Counter)  # of masks that are not equal
    merged: int = 0  # objects that the target does not tell apart
    crowds: int = 0  # marks that it does not hold
    scores: int = 0

    def lines(self) -> list[str]:
        """In words."""
        first = f"{_count(self.masks, 'mask')}: {self.equal} equal"
        for number, what in (
            (self.changed, "changed"),
            (self.gone, "gone"),
            (self.new, "new"),
        ):
            if number:
                first += f", {number} {what}"
        share = self.differing / max(self.pixels, 1)
        first += f"; {self.differing} of {self.pixels} pixels differ"
        if self.differing:
            first += f" ({share:.2%})"
        lines = [first]
        for why, number in self.reasons.most_common():
            lines.append(f"{_count(number, 'mask')} differ{'s' if number == 1 else ''}: {why}")
        if self.merged:
            lines.append(
                f"{_count(self.merged, 'object')} are no longer told from others of a class"
            )
        if self.crowds:
            lines.append(f"{_count(self.crowds, 'crowd')} are no longer marked as such")
        if self.scores:
            lines.append(f"{_count(self.scores, 'score')} are lost")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.__dict__, "reasons": dict(self.reasons)}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Conversion:
    """What `convert` did."""

    source: str  # name of the format
    recognised: str  # by what
    target: str
    output: Path
    images: int
    resumed: int  # of them were there from a run that was stopped
    notes: tuple[str, ...]
    loss: Loss

    def lines(self) -> list[str]:
        """In words."""
        return [*(f"note: {note}" for note in self.notes), *self.loss.lines()]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.__dict__, "output": str(self.output), "loss": self.loss.to_dict()}


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: str,
    source_format: str | None = None,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    copy_images: bool = False,
    overwrite: bool = False,
    track: Track = notebook_bar,
    announce: Callable[[str], None] = lambda text: None,
) -> Conversion:
    """Converts annotations, and reads back what it wrote to say what was lost.

    A run that was stopped goes on where it was: the same call skips images that are done. Nothing
    is seen half-written.

    Args:
        source: file or folder.
        output: file or folder of the target format; a folder is made.
        to: name of the target format, see `pyseg.formats.table.FORMATS`.
        source_format: that of the source; None = recognised by content.
        classes: names in the order of their ids, for a source that has none or to fix the order:
            what `pyseg.formats.annotation.class_names` takes.
        images: folder of the images, for their sizes, file names, and place on the earth.
        copy_images: also copies them to where tools of the target format look for them.
        overwrite: writes over files that are there.
        track: wraps the images, for a progress bar.
        announce: is told what the source was taken for, before the work.

    Raises:
        PysegError: the source cannot be read, or not be written in that format, or something is in
            the way; the message names file, place and remedy.

    Example:
        >>> convert("VOC2012", "coco.json", to="coco", images="VOC2012/JPEGImages")
    """
    path, output = Path(source), Path(output)
    target = find_format(to, writable=True)
    known = None if classes is None else class_names(classes)
    given = Given(known, None if images is None else Images(images))
    if source_format is None:
        origin, path, reason = detect(path)
    else:
        origin, reason = find_format(source_format), "as was said"
        if not path.exists():
            raise PysegError(f"{str(path)!r} does not exist; check the path")
    _check_output(path, output, target)
    if copy_images and (given.images is None or target.images is None):
        raise PysegError(
            "copy_images needs the folder of images"
            if given.images is None
            else f"copy_images has no meaning for {to}, whose tools find images anywhere"
        )
    announce(f"{str(path)!r} is taken for {origin.title} ({reason})")
    opened = origin.open_source(path, given)
    if target.writer is None:  # find_format has seen to it
        raise PysegError(f"{to} is only read")
    writer = target.writer(output, opened)
    task = {
        "source": str(path.resolve()),
        "from": origin.name,
        "to": to,
        "classes": list(opened.classes),
    }
    with _Journal(output, target, task, overwrite) as journal:
        done = dict(journal.entries())
        resumed = sum(name in done for name in opened.names)
        _write(opened, writer, given, journal, done.keys(), track, target)
        done = {}
        sizes = dict(journal.sizes())
        order = {name: k for k, name in enumerate(opened.names)}
        writer.finish(journal.values(order))
        if copy_images:
            _copy(opened, given, output, target)
        journal.finish()
    loss, more = _measure(opened, output, target, given, sizes)
    return Conversion(
        origin.name,
        reason,
        to,
        output,
        len(opened.names),
        resumed,
        (*opened.notes, *more),
        loss,
    )


def _check_output(source: Path, output: Path, target: Format) -> None:
    if target.suffix:
        if output.suffix.lower() != target.suffix:
            raise PysegError(
                f"{target.title} is one file {target.suffix}, got the output {str(output)!r}; name "
                f"it such as {str(output.with_suffix(target.suffix))!r}"
            )
        if output.is_dir():
            raise PysegError(f"output {str(output)!r} is a folder; give a file {target.suffix}")
        if not output.parent.is_dir():
            raise PysegError(
                f"the directory {str(output.parent)!r} does not exist; create it first"
            )
    elif output.exists() and not output.is_dir():
        raise PysegError(f"{target.title} is a folder, but the output {str(output)!r} is a file")
    ours, theirs = output.resolve(), source.resolve()
    if ours == theirs or (source.is_dir() and not target.suffix and theirs in ours.parents):
        raise PysegError(
            f"the output {str(output)!r} is the source or lies in it; give a place outside"
        )
    if ours in theirs.parents and not target.suffix:
        raise PysegError(f"the source {str(source)!r} lies in the output; give a place outside")


def _write(
    opened: Source,
    writer: Writer,
    given: Given,
    journal: _Journal,
    done: Iterable[str],
    track: Track,
    target: Format,
) -> None:
    finished = set(done)
    for name in track([name for name in opened.names if name not in finished]):
        annotation = opened.read(name)
        if annotation.placement is None and given.images and target.name == "geojson":
            image = given.images.find(name)
            placement = None if image is None else placement_of(image)
            annotation = Annotation(
                **{**annotation.__dict__, "placement": placement},
            )
        journal.add(name, annotation.size, writer.write(annotation))


def _copy(opened: Source, given: Given, output: Path, target: Format) -> None:
    assert given.images is not None and target.images is not None
    for name in opened.names:
        image = given.images.find(name)
        if image is None:
            continue
        path = output / target.images / f"{name}{image.suffix}"
        make_folder(path.parent, "output")
        with replacing(path) as temporary:
            shutil.copyfile(image, temporary)


class _Journal:
    """What is done, in a file beside the output: a line for the task, then one for each image.

    A line counts when it is whole; what a killed writer left of one is cut off.
    """

    def __init__(self, output: Path, target: Format, task: dict[str, Any], overwrite: bool) -> None:
        self.output, self.task = output, task
        self.folder = output.parent if target.suffix else output
        self.folders = [] if target.suffix else [output]
        if target.name.endswith("panoptic"):  # PNGs in a folder beside the JSON
            self.folders = [output.with_suffix("")]
        self.made = not self.folder.exists()
        self.path = self.folder / (f".{output.name}.convert" if target.suffix else ".convert")
        self.keep = False
        if self._resumes(overwrite):
            return
        if not overwrite:
            there = next(self._files(), None)
            if there is not None:
                raise PysegError(
                    f"{str(there)!r} is there already: give another output, or overwrite=True"
                )
        make_folder(self.folder, "output")
        self.path.write_text(json.dumps(task) + "\n", encoding="utf-8")

    def _files(self) -> Iterator[Path]:
        """What is there of the output, besides the journal."""
        if self.output.is_file():
            yield self.output
        for folder in self.folders:
            yield from (p for p in folder.rglob("*") if p.is_file() and p != self.path)

    def _resumes(self, overwrite: bool) -> bool:
        if not self.path.is_file():
            return False
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            task = json.loads(whole.partition(b"\n")[0])
        except ValueError:
            task = None
        if task != self.task:
            if overwrite or task is None:
                return False
            raise PysegError(
                f"another conversion into {str(self.output)!r} was stopped, from "
                f"{task.get('source')!r} to {task.get('to')}: repeat that one, give another "
                "output, or overwrite=True"
            )
        if len(whole) < len(data):
            with self.path.open("r+b") as stream:
                stream.truncate(len(whole))
        remove_abandoned(self.folder)
        return True

    def __enter__(self) -> _Journal:
        self._stream = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        if not self.keep and next(self._lines(), None) is None and not any(self._files()):
            self.path.unlink(missing_ok=True)  # nothing was done
            if self.made:
                shutil.rmtree(self.folder)

    def add(self, name: str, size: tuple[int, int], entry: Any) -> None:
        line = json.dumps({"name": name, "size": list(size), "entry": entry})
        self._stream.write(line + "\n")
        self._stream.flush()

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.is_file():
            return
        with self.path.open(encoding="utf-8") as stream:
            next(stream, None)
            for line in stream:
                yield json.loads(line)

    def entries(self) -> Iterator[tuple[str, None]]:
        return ((line["name"], None) for line in self._lines())

    def sizes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        return ((line["name"], (line["size"][0], line["size"][1])) for line in self._lines())

    def values(self, order: dict[str, int]) -> Iterator[Any]:
        """What the writer returned for each image, in the source's order, which is theirs here."""
        return (line["entry"] for line in self._lines() if line["name"] in order)

    def finish(self) -> None:
        self.keep = True
        self._stream.close()
        self.path.unlink()


# --- what was lost ----------------------------------------------------------------------------


def _measure(
    opened: Source,
    output: Path,
    target: Format,
    given: Given,
    sizes: dict[str, tuple[int, int]],
) -> tuple[Loss, list[str]]:
    """Reads both again, image by image."""
    loss = Loss()
    if not opened.names:
        return loss, ["the source has no images"]
    try:
        back = target.open_source(output, Given(None, given.images, sizes))
    except PysegError as error:
        if any(opened.read(name).regions for name in opened.names):
            raise
        return loss, [f"the source has no masks, so that nothing can be read back ({error})"]
    notes = []
    if target.suffix:  # images are in the order in which they were written
        pairs = dict(zip(opened.names, back.names, strict=True))
    else:
        pairs = {name: name for name in opened.names}
        if others := len(set(back.names).difference(opened.names)):
            notes.append(f"{_count(others, 'annotation')} of other images are in the output")
    names = set(back.classes)
    for name in opened.names:
        before = opened.read(name)
        after = back.read(pairs[name])
        _compare(before, after, opened.classes, back.classes, names, target, loss)
    return loss, notes


def _compare(
    before: Annotation,
    after: Annotation,
    classes: tuple[str, ...],
    back_classes: tuple[str, ...],
    names: set[str],
    target: Format,
    loss: Loss,
) -> None:
    regions: list[tuple[str, Region]] = []
    for region in before.regions:
        name = classes[region.label]
        if name in BACKGROUND and (name not in names or "overlaps" in target.holds):
            continue  # what nothing else covers: no polygon is made of it
        regions.append((name, region))
    told = "objects" in target.holds
    objects = [(name, region) for name, region in regions if region.thing and told]
    areas = _areas([(n, r) for n, r in regions if not (r.thing and told)], before.size)
    loss.merged += sum(region.thing for _, region in regions) if not told else 0
    left: dict[str, list[Region]] = {}
    for region in after.regions:
        left.setdefault(back_classes[region.label], []).append(region)
    hidden = None if "overlaps" in target.holds else before.id_map()
    numbers = {id(region): k for k, region in enumerate(before.regions, 1)}
    for name, region in _matched_first(objects, left):
        found = _taken(left.get(name, []), region)
        loss.scores += region.score != (1.0 if found is None else found.score)
        loss.crowds += region.crowd and found is not None and not found.crowd
        covered = hidden is not None and _is_covered(hidden, numbers[id(region)], region)
        _count_mask(loss, name, region, found, names, covered)
    for name, region in areas.items():
        rest = _areas([(name, other) for other in left.pop(name, [])], before.size)
        covered = hidden is not None and len(areas) + len(objects) > 1
        _count_mask(loss, name, region, rest.get(name), names, covered)
    if not told:
        loss.scores += sum(region.score != 1 for _, region in regions)
        loss.crowds += sum(region.crowd for _, region in regions)
    for name, others in left.items():
        for region in others:
            if region.area and name not in BACKGROUND:
                loss.new += 1
                loss.differing += region.area
                loss.reasons["the target has it besides"] += 1


def _areas(regions: list[tuple[str, Region]], size: tuple[int, int]) -> dict[str, Region]:
    """The union of the regions of each class."""
    masks: dict[str, np.ndarray] = {}
    for name, region in regions:
        mask = masks.setdefault(name, np.zeros(size, bool))
        left, top, right, bottom = region.box
        mask[top:bottom, left:right] |= region.mask
    return {name: Region.cut(0, mask, thing=False) for name, mask in masks.items()}


def _matched_first(
    objects: list[tuple[str, Region]], left: dict[str, list[Region]]
) -> list[tuple[str, Region]]:
    """Objects that are found unchanged first, so that no other takes their match."""
    keys = {(name, *_key(region)) for name, regions in left.items() for region in regions}
    return sorted(objects, key=lambda pair: (pair[0], *_key(pair[1])) not in keys)


def _key(region: Region) -> tuple[Any, ...]:
    return (*region.box, region.mask.tobytes())


def _taken(candidates: list[Region], region: Region) -> Region | None:
    """The candidate that has most in common with a region, taken out of the list."""
    best, most = None, 0.0
    for k, other in enumerate(candidates):
        common = _common(region, other)
        if not common and region.area:
            continue
        union = region.area + other.area - common
        flags = (region.score == other.score) + (region.crowd == other.crowd)
        value = common / max(union, 1) + 1e-9 * flags
        if value > most:
            best, most = k, value
    return None if best is None else candidates.pop(best)


def _common(one: Region, other: Region) -> int:
    left, top = max(one.left, other.left), max(one.top, other.top)
    right, bottom = min(one.box[2], other.box[2]), min(one.box[3], other.box[3])
    if left >= right or top >= bottom:
        return 0
    first = one.mask[top - one.top : bottom - one.top, left - one.left : right - one.left]
    second = other.mask[
        top - other.top : bottom - other.top, left - other.left : right - other.left
    ]
    return int(np.count_nonzero(first & second))


def _is_covered(ids: np.ndarray, number: int, region: Region) -> bool:
    left, top, right, bottom = region.box
    return bool((ids[top:bottom, left:right][region.mask] != number).any())


def _count_mask(
    loss: Loss,
    name: str,
    region: Region,
    found: Region | None,
    names: set[str],
    covered: bool,
) -> None:
    loss.masks += 1
    loss.pixels += region.area
    common = 0 if found is None else _common(region, found)
    difference = region.area + (0 if found is None else found.area) - 2 * common
    if difference == 0 and (found is not None or not region.area):
        if found is None:
            loss.gone += 1
            loss.reasons["it is empty"] += 1
        else:
            loss.equal += 1
        return
    loss.differing += difference
    if found is None:
        loss.gone += 1
    else:
        loss.changed += 1
    loss.reasons[_reason(name, region, found, names, covered)] += 1


def _reason(name: str, region: Region, found: Region | None, names: set[str], covered: bool) -> str:
    if name not in names:
        return "the target has no such class"
    if covered:
        return "others lie over it, and a pixel has one value there"
    parts = ndimage.label(region.mask, structure=np.ones((3, 3)))[1]
    if parts > 1:
        return "several parts, which the target bridges"
    if ndimage.binary_fill_holes(region.mask).sum() > region.area:
        return "holes"
    return "the outline"


__all__ = ["Conversion", "Loss", "convert"]
