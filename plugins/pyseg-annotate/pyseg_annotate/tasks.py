"""What is to be annotated: one object each, told by a pixel of it, in a window of an image."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyseg.errors import LabelError, PysegError
from pyseg.files import read_json, some, write_json
from pyseg.formats import decode_rle, encode_rle
from pyseg.image import read_image

MARGIN = (0.35, 0.65)  # of an object's extent, that its window has on each side
LEAST = 4  # pixels of margin, at least
_SHAPE = {
    "id": str,
    "image": str,
    "box": [int],
    "point": [int],
    "label": str,
    "truth?": dict,
}


@dataclass(frozen=True, eq=False)
class Task:
    """One object of an image.

    Masks of a task are of its window, `box`. That is larger than the object, by margins that differ
    from side to side, so that neither its size nor its middle give the object away.
    """

    id: str
    image: Path
    box: tuple[int, int, int, int]  # left, top, right, bottom (exclusive) of the window
    point: tuple[int, int]  # x, y in the window: a pixel of the object
    label: str  # its class
    truth: np.ndarray | None = None  # [h, w] bool: known where workers are simulated or judged

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the window."""
        left, top, right, bottom = self.box
        return bottom - top, right - left

    def crop(self) -> np.ndarray:
        """The image within the window, [h, w, 3] uint8 RGB.

        Raises:
            ImageError: the image cannot be read.
            PysegError: the window is not within it.
        """
        image = _pixels(self.image)
        left, top, right, bottom = self.box
        if right > image.shape[1] or bottom > image.shape[0]:
            raise PysegError(
                f"object {self.id!r}: its box {list(self.box)} is not within {str(self.image)!r}, "
                f"{image.shape[1]} x {image.shape[0]}; give the images that the objects are of"
            )
        return image[top:bottom, left:right]


@functools.lru_cache(maxsize=8)  # tasks come image by image
def _pixels(path: Path) -> np.ndarray:
    return np.ascontiguousarray(read_image(path).permute(1, 2, 0).numpy())


def task_of(id: str, image: Path, mask: np.ndarray, label: str, *, truth: bool = True) -> Task:
    """The task of an object whose mask is known.

    Args:
        id: names it; margins are drawn from it.
        image: the file.
        mask: [H, W] bool, of the whole image.
        label: its class.
        truth: whether the task keeps the mask.

    Raises:
        LabelError: the mask is empty.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        raise LabelError(f"object {id!r}: its mask is empty; leave it out")
    digest = hashlib.blake2b(id.encode(), digest_size=8).digest()
    drawn = np.frombuffer(digest, np.uint16) / 65535 * (MARGIN[1] - MARGIN[0]) + MARGIN[0]
    height, width = rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]
    margins = np.maximum(np.rint(drawn * (width, height, width, height)), LEAST).astype(int)
    left, top = max(0, columns[0] - margins[0]), max(0, rows[0] - margins[1])
    right = min(mask.shape[1], columns[-1] + 1 + margins[2])
    bottom = min(mask.shape[0], rows[-1] + 1 + margins[3])
    part = np.array(mask[top:bottom, left:right], bool)
    box = (int(left), int(top), int(right), int(bottom))
    return Task(id, Path(image), box, inner_point(part), label, part if truth else None)


def inner_point(mask: np.ndarray) -> tuple[int, int]:
    """x, y of the pixel of a mask that is farthest from its boundary."""
    from scipy import ndimage

    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), mask.shape)
    return int(x), int(y)


def tasks_in(
    source: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    parts: bool = False,
    least: int = 64,
    truth: bool = True,
) -> list[Task]:
    """The objects of annotations in any format that `pyseg convert` reads.

    Args:
        source: file or folder.
        images: folder of the images; None = those beside or in the source.
        classes: names in the order of their ids, a file of them or the name of a known list, where
            the source has none, as `pyseg convert` takes them.
        only: classes that are taken; None = all.
        parts: of label maps: every connected part of a class is an object.
        least: pixels of an object; smaller ones are left out.
        truth: whether tasks keep the masks. Without, they are what people are to draw anew.

    Raises:
        LabelError, ImageError: the source is damaged or of no known format, lacks a class that is
            named, or no object is left.
    """
    from scipy import ndimage

    from pyseg.formats.annotation import Given, Images, class_names
    from pyseg.formats.table import detect

    path = Path(source)
    form, opened_path, _ = detect(path)
    folder = Path(images) if images is not None else path if path.is_dir() else path.parent
    known = Images(folder)
    names = None if classes is None else class_names(classes)
    opened = form.open_source(opened_path, Given(names, known))
    if unknown := set(only or ()) - set(opened.classes):
        raise LabelError(
            f"only: {str(source)!r} has no {some(unknown)}; it has {some(opened.classes)}"
        )
    tasks: list[Task] = []
    for name in opened.names:
        annotation = opened.read(name)
        file = known.find(name)
        if file is None:
            raise LabelError(
                f"images: {str(folder)!r} has no image {name!r} that {str(source)!r} annotates; "
                "give the folder that has it"
            )
        number = 0
        for region in annotation.regions:
            label = opened.classes[region.label]
            if (only is not None and label not in only) or region.crowd:
                continue
            if not (region.thing or parts):
                continue
            whole = region.full(annotation.size)
            split, count = ndimage.label(whole) if parts else (whole.astype(int), 1)
            for part in range(1, count + 1):
                mask = split == part
                if np.count_nonzero(mask) >= least:
                    number += 1
                    tasks.append(task_of(f"{name}#{number}", file, mask, label, truth=truth))
    if not tasks:
        raise LabelError(
            f"{str(source)!r} has no object of {least} pixels"
            + (f" of the classes {some(only)}" if only else "")
            + ("" if parts else "; of label maps, which hold areas of classes, parts makes them")
        )
    return tasks


def write_tasks(path: str | os.PathLike[str], tasks: Iterable[Task]) -> Path:
    """Writes tasks as JSON; images are named relative to it."""
    path = Path(path)
    base = path.resolve().parent
    entries = [
        {
            "id": task.id,
            "image": Path(os.path.relpath(task.image.resolve(), base)).as_posix(),
            "box": list(task.box),
            "point": list(task.point),
            "label": task.label,
            **({} if task.truth is None else {"truth": encode_rle(task.truth)}),
        }
        for task in tasks
    ]
    return write_json(path, {"objects": entries})


def read_tasks(path: str | os.PathLike[str]) -> list[Task]:
    """Reads what `write_tasks` wrote.

    Raises:
        LabelError: it is no such file, has no object, or an id twice; the message says where.
    """
    where = repr(os.fspath(path))
    value = read_json(path, LabelError, {"objects": [_SHAPE]})
    tasks = [_task(entry, Path(path).parent, where) for entry in value["objects"]]
    if not tasks:
        raise LabelError(f"{where} has no object; `pyseg annotate objects` makes such a file")
    check_ids(tasks, where)
    return tasks


def check_ids(tasks: Sequence[Task], where: str = "tasks") -> None:
    """Raises LabelError where two tasks have one id."""
    seen: set[str] = set()
    for task in tasks:
        if task.id in seen:
            raise LabelError(f"{where}: the id {task.id!r} is there twice; ids must differ")
        seen.add(task.id)


def _task(entry: dict[str, Any], folder: Path, where: str) -> Task:
    id, box, point = entry["id"], entry["box"], entry["point"]
    if len(box) != 4 or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
        raise LabelError(f"{where}: the box of {id!r} must be left, top, right, bottom, got {box}")
    size = box[3] - box[1], box[2] - box[0]
    if len(point) != 2 or not (0 <= point[0] < size[1] and 0 <= point[1] < size[0]):
        raise LabelError(f"{where}: the point of {id!r} must be x, y within its box, got {point}")
    truth = None
    if "truth" in entry:
        truth = decode_rle(entry["truth"]).numpy()
        if truth.shape != size:
            raise LabelError(
                f"{where}: the truth of {id!r} is {list(truth.shape)}, its box {list(size)}; "
                "they must be equal"
            )
    left, top, right, bottom = box
    window = (left, top, right, bottom)
    return Task(id, folder / entry["image"], window, (point[0], point[1]), entry["label"], truth)


def fingerprint(tasks: Sequence[Task]) -> str:
    """Tells lists of tasks apart: of ids, images' names, windows and points."""
    digest = hashlib.blake2b(digest_size=16)
    for task in tasks:
        digest.update(repr((task.id, task.image.name, task.box, task.point, task.label)).encode())
    return digest.hexdigest()
