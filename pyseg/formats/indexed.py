"""Indexed PNGs: one class id for each pixel, 255 = void, as the data set `folder` reads them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError, LabelError
from ..files import check_json, make_folder, read_json, some, write_json
from ..image import check_pixels, default_palette, read_labels, write_labels
from ..regions import VOID
from .annotation import (
    Annotation,
    Given,
    Source,
    by_name,
    checked_classes,
    class_names,
    files_below,
    image_size,
)

LARGEST = 65535  # value of a 16-bit PNG, and void where 255 is a class


def void_of(num_classes: int) -> int:
    return VOID if num_classes <= VOID else LARGEST


def detect(path: Path) -> str | None:
    if path.is_file():
        return "a PNG" if path.suffix.lower() == ".png" else None
    files = files_below(path / "labels" if (path / "labels").is_dir() else path, "*.png")
    return f"{len(files)} PNGs" if files else None


def open_source(path: Path, given: Given) -> Source:
    """Label maps in a folder, or in ``labels`` within it."""
    root = path
    if path.is_dir() and (path / "labels").is_dir():
        root = path / "labels"
    files = files_below(root, "*.png") if path.is_dir() else [path]
    if not files:
        raise ImageError(f"{str(path)!r} holds no PNG; give the folder of the label maps")
    found = by_name(root if path.is_dir() else path.parent, files)
    notes: tuple[str, ...] = ()
    palette = None
    names = given.classes
    ignored: int | None = None
    if names is None:
        listed = _listed(path if path.is_dir() else path.parent)
        if listed is not None:
            names, palette, ignored = listed
        else:
            count = 1 + max(_largest(file) for file in files)
            names = tuple(f"class {k}" for k in range(count))
            notes = (f"no list of classes was found; the {count} are called 'class 0' and so on",)
    classes = names

    def read(name: str) -> Annotation:
        file = found[name]
        where = f"label map {str(file)!r}"
        given.size_of(name, where, image_size(file))
        labels = read_labels(file).numpy().astype(np.int64)
        void = void_of(len(classes))
        if ignored is not None:
            labels[labels == ignored] = void
        wrong = np.unique(labels[(labels >= len(classes)) & (labels != void)])
        if wrong.size:
            raise LabelError(
                f"{where} holds {some(wrong.tolist())}, but there are {len(classes)} classes, 0 to "
                f"{len(classes) - 1}, and {void} is void; give the list that it was made with by "
                "classes=NAMES"
            )
        return Annotation.of_labels(name, labels, len(classes), file_name=given.image_name(name))

    return Source(classes, tuple(found), read, notes=notes, palette=palette)


def _largest(file: Path) -> int:
    labels = read_labels(file)
    classes = labels[(labels != VOID) & (labels != LARGEST)]
    return int(classes.max()) if classes.numel() else 0


_Listed = tuple[tuple[str, ...], tuple[tuple[int, int, int], ...] | None, int | None]


def _listed(folder: Path) -> _Listed | None:
    """The class list beside label maps, with its colours and the id that is void."""
    for place in (folder, folder.parent):
        if (path := place / "classes.json").is_file():
            value = read_json(path, LabelError)
            entries: Any = value.get("classes") if isinstance(value, dict) else value
            shape = {"name": str, "id?": int, "color?": [int]}
            where = f"the classes of {str(path)!r}"
            check_json(entries, [(str, dict)], where, LabelError)
            items = [item if isinstance(item, dict) else {"name": item} for item in entries]
            check_json(items, [shape], where, LabelError)
            ignored = value.get("ignore_index") if isinstance(value, dict) else None
            items = [{"id": k, **item} for k, item in enumerate(items)]
            items = sorted((e for e in items if e["id"] != ignored), key=lambda e: e["id"])
            if [item["id"] for item in items] != list(range(len(items))):
                raise LabelError(f"{where}: ids must be 0, 1, 2, … without gaps")
            names = checked_classes([item["name"] for item in items], where)
            colours = [tuple(item.get("color", ())) for item in items]
            good = all(len(c) == 3 and 0 <= min(c) <= max(c) <= 255 for c in colours)
            palette = tuple((c[0], c[1], c[2]) for c in colours) if good else None
            return names, palette, ignored if type(ignored) is int else None
        if (path := place / "classes.txt").is_file():
            return class_names(path), None, None
    return None


class Writer:
    """``labels/NAME.png`` and ``classes.json``: what the data set `folder` takes."""

    images = "images"

    def __init__(self, target: Path, source: Source) -> None:
        self.target, self.classes = target, source.classes
        self.palette = source.palette or default_palette(len(self.classes))

    def write(self, annotation: Annotation) -> Any:
        path = self.target / "labels" / f"{annotation.name}.png"
        make_folder(path.parent, "output")
        check_pixels(*annotation.size, f"image {annotation.name!r}")
        labels = annotation.label_map(void_of(len(self.classes)))
        dtype = np.uint8 if len(self.classes) <= VOID else np.uint16
        write_labels(path, labels.astype(dtype), self.palette)
        return None

    def finish(self, entries: Iterable[Any]) -> None:
        entries_of = [
            {"id": k, "name": name, "color": list(colour)}
            for k, (name, colour) in enumerate(zip(self.classes, self.palette, strict=True))
        ]
        void = void_of(len(self.classes))
        write_json(self.target / "classes.json", {"classes": entries_of, "ignore_index": void})


__all__ = ["Writer", "detect", "open_source"]
