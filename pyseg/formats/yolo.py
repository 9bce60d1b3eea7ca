"""YOLO's segmentation labels: a text file for each image, a line with one polygon for each object.

Read as Ultralytics reads them: coordinates times the image's size, truncated to pixels, filled by
OpenCV's ``fillPoly``, border included. Written so that this gives the same mask: polygons run
through the middles of an object's outermost pixels, which truncating cannot miss; holes are bridged
within the object, which changes no pixel; several parts of an object are joined into one polygon by
the shortest lines, which adds the pixels of these; parts of an area that is no object become a line
each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError, LabelError
from ..files import IMAGE_SUFFIXES, make_folder, write_text
from .annotation import (
    BACKGROUND,
    Annotation,
    Given,
    Region,
    Source,
    files_below,
    image_size,
    names_of_yaml,
)
from .polygons import border_parts, bridged, fill_opencv


def description(path: Path) -> Path | None:
    """The ``data.yaml`` of a tree."""
    if path.is_file():
        return path if path.suffix.lower() in (".yaml", ".yml") else None
    found = [path / name for name in ("data.yaml", "data.yml", "dataset.yaml")]
    return next((file for file in found if file.is_file()), None)


def _labels(root: Path) -> dict[str, Path]:
    """Label files by the name of their image; of the folders above them, "labels" is left out."""
    found: dict[str, Path] = {}
    for file in files_below(root, "*.txt"):
        pieces = list(file.relative_to(root).with_suffix("").parts)
        if "labels" not in pieces[:-1]:
            continue
        pieces.remove("labels")
        name = "/".join(pieces)
        if name in found:
            raise ImageError(
                f"{str(found[name])!r} and {str(file)!r} are for one image; remove one"
            )
        found[name] = file
    return found


def detect(path: Path) -> str | None:
    file = description(path)
    if file is not None:
        return f"a {file.name}"
    if path.is_dir() and (found := _labels(path)):
        return f"{len(found)} texts below labels"
    return None


def open_source(path: Path, given: Given) -> Source:
    file = description(path)
    root = path if path.is_dir() else path.parent
    found = _labels(root)
    if not found:
        raise ImageError(
            f"{str(root)!r} has no labels/*.txt; give the folder of data.yaml and labels"
        )
    names = given.classes
    if names is None:
        if file is None:
            raise LabelError(
                f"{str(root)!r} has no data.yaml with the names of classes; add it, or give "
                "them, classes=NAMES"
            )
        names = names_of_yaml(file)
    classes = names

    def read(name: str) -> Annotation:
        text = found[name]
        where = repr(str(text))
        image = _image_of(root, text)
        if given.images is not None or image is None:
            size = given.size_of(name, where, None)
        else:
            size = image_size(image)
        try:
            lines = text.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise LabelError(f"{where} cannot be read as text ({error}); fetch it again") from error
        regions = [
            _region(line.split(), classes, size, f"{where}, line {number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
        file_name = given.image_name(name, image.name if image else None)
        return Annotation(name, size, tuple(regions), file_name=file_name, rule="opencv")

    return Source(classes, tuple(found), read, frozenset(range(len(classes))))


def _image_of(root: Path, label: Path) -> Path | None:
    """The image of a label file, where YOLO looks: "images" in the place of "labels"."""
    pieces = list(label.relative_to(root).parts)
    pieces[pieces.index("labels")] = "images"
    stem = root.joinpath(*pieces).with_suffix("")
    names = (stem.with_name(stem.name + suffix) for suffix in IMAGE_SUFFIXES)
    return next((path for path in names if path.is_file()), None)


def _region(
    words: list[str], classes: tuple[str, ...], size: tuple[int, int], where: str
) -> Region:
    try:
        values = np.array([float(word) for word in words])
    except ValueError as error:
        raise LabelError(f"{where}: {error}; a line is a class and x y x y …") from error
    label, numbers = values[0], values[1:]
    if not label.is_integer() or not 0 <= label < len(classes):
        raise LabelError(
            f"{where}: the class {words[0][:20]} is none of 0 to {len(classes) - 1}; mend it, or "
            "the names in data.yaml"
        )
    if numbers.size in (4, 5):
        raise LabelError(
            f"{where} is a box (class, centre, size): labels for detection have no masks; use "
            "labels for segmentation"
        )
    score = 1.0
    if numbers.size % 2:  # Ultralytics' save_conf
        score, numbers = float(numbers[-1]), numbers[:-1]
    if numbers.size < 6:
        raise LabelError(
            f"{where}: a polygon needs at least three points, it has {numbers.size // 2}"
        )
    if not np.isfinite(values).all():
        raise LabelError(f"{where}: a number is not finite; mend or remove the line")
    if numbers.min() < -0.01 or numbers.max() > 1.01:
        worst = numbers[np.abs(numbers - 0.5).argmax()]
        raise LabelError(
            f"{where}: the coordinate {worst:g} is not in 0 to 1; divide pixels by the image's "
            "width and height"
        )
    height, width = size
    # In 32 bits as there, on which truncation depends where others wrote whole pixels.
    ring = numbers.reshape(-1, 2).astype(np.float32) * np.array([width, height], np.float32)
    ring = np.clip(np.trunc(ring), 0, (width - 1, height - 1)).astype(np.int64)
    left, top = ring.min(0).tolist()
    right, bottom = (ring.max(0) + 1).tolist()
    mask = fill_opencv(ring - (left, top), bottom - top, right - left)
    return Region(int(label), mask, left, top, score=score, polygons=(numbers.reshape(-1, 2),))


class Writer:
    """``data.yaml`` and ``labels/NAME.txt``; images belong in ``images/``."""

    images = "images"

    def __init__(self, target: Path, source: Source) -> None:
        self.target = target
        kept = [k for k, name in enumerate(source.classes) if name not in BACKGROUND]
        self.names = [source.classes[k] for k in kept]
        self.number = {k: number for number, k in enumerate(kept)}

    def write(self, annotation: Annotation) -> Any:
        path = self.target / "labels" / f"{annotation.name}.txt"
        make_folder(path.parent, "output")
        height, width = annotation.size
        lines = []
        for region in annotation.regions:
            if region.label not in self.number or not region.area:
                continue
            if region.polygons and annotation.rule == "opencv":
                rings = list(region.polygons)
            else:
                found = border_parts(region.mask)
                whole = [found] if region.thing else [[part] for part in found]
                corner = (region.left + 0.5, region.top + 0.5)
                rings = [
                    np.round((bridged(parts) + corner) / (width, height), 7) for parts in whole
                ]
            for ring in rings:
                points = list(ring) + [ring[-1]] * max(0, 3 - len(ring))
                numbers = " ".join(f"{float(x)!r} {float(y)!r}" for x, y in points)
                lines.append(f"{self.number[region.label]} {numbers}\n")
        write_text(path, "".join(lines))
        return None

    def finish(self, entries: Iterable[Any]) -> None:
        names = "".join(
            f"  {k}: {json.dumps(name, ensure_ascii=False)}\n" for k, name in enumerate(self.names)
        )
        write_text(
            self.target / "data.yaml",
            f"train: images\nval: images\nnames:\n{names}",
        )


__all__ = ["Writer", "detect", "open_source"]
