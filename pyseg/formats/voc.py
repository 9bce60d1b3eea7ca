"""Pascal VOC: indexed PNGs of classes and of objects, and an XML for each image.

``SegmentationClass`` has 0 for the background, then the classes from 1, and 255 for void, as around
objects; ``SegmentationObject`` the number of the object. Boxes in the XML count pixels from 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ..classes import VOC_CLASSES
from ..errors import ImageError, LabelError
from ..files import make_folder, replacing, some, write_text
from ..image import read_labels, write_labels
from ..regions import VOID
from .annotation import (
    BACKGROUND,
    Annotation,
    Given,
    Region,
    Source,
    by_name,
    class_names,
    cut_out,
    files_below,
    image_size,
)
from .xml_files import integer, read_xml, text_of

CLASSES = VOC_CLASSES[1:]
"""The 20 classes of VOC 2007 to 2012, in the order of their ids from 1."""
MOST = 254  # objects of an image, and classes: 0 is the background and 255 void
LISTS = ("class_names.txt", "labels.txt", "labelmap.txt")


def detect(path: Path) -> str | None:
    if path.is_dir() and (path / "SegmentationClass").is_dir():
        return "a folder SegmentationClass"
    return None


def open_source(path: Path, given: Given) -> Source:
    folder = path / "SegmentationClass"
    files = files_below(folder, "*.png") if folder.is_dir() else []
    if not files:
        raise ImageError(
            f"{str(path)!r} has no SegmentationClass/*.png; give the folder that has it"
        )
    found = by_name(folder, files)
    named, notes = _listed(path)
    names = given.classes or named
    # As pyseg's own class lists have the background or not, so may a user's.
    with_background = bool(names) and names[0] in BACKGROUND
    classes = names if with_background else ("background", *names)
    if len(classes) > MOST + 1:
        raise LabelError(f"{str(path)!r}: VOC's 8 bits hold {MOST} classes, got {len(classes) - 1}")

    def read(name: str) -> Annotation:
        file = found[name]
        where = repr(str(file))
        size = given.size_of(name, where, image_size(file))
        labels = read_labels(file).numpy().astype(np.int64)
        wrong = np.unique(labels[(labels >= len(classes)) & (labels != VOID)]).tolist()
        if wrong:
            raise LabelError(
                f"{where} holds {some(wrong)}, but there are the background, 0, and "
                f"{len(classes) - 1} classes; give the list that it was made with, classes=NAMES"
            )
        objects = path / "SegmentationObject" / file.relative_to(folder)
        numbers = np.zeros_like(labels)
        if objects.is_file():
            numbers = read_labels(objects).numpy().astype(np.int64)
            if numbers.shape != labels.shape:
                raise ImageError(
                    f"{str(objects)!r} is {numbers.shape[1]} x {numbers.shape[0]} pixels, {where} "
                    f"{labels.shape[1]} x {labels.shape[0]}; they must be equal"
                )
            numbers[(numbers == VOID) | (labels == VOID)] = 0
        image = _described(path, name, size)
        regions = []
        # What has no object number: the background, and areas of classes without objects.
        area = np.where((numbers == 0) & (labels != VOID), labels + 1, 0)
        wanted = [int(value) for value in np.unique(area) if value]
        for value, (mask, left, top) in zip(wanted, cut_out(area, wanted), strict=True):
            regions.append(Region(value - 1, mask, left, top, thing=False))
        wanted = [int(value) for value in np.unique(numbers) if value]
        for value, (mask, left, top) in zip(wanted, cut_out(numbers, wanted), strict=True):
            inside = labels[top : top + mask.shape[0], left : left + mask.shape[1]][mask]
            kinds = np.unique(inside)
            if len(kinds) > 1 or kinds[0] == 0:
                raise LabelError(
                    f"{str(objects)!r}: object {value} has the classes {some(kinds.tolist())} in "
                    f"{where}; an object has one class, and not the background"
                )
            regions.append(Region(int(kinds[0]), mask, left, top))
        return Annotation(name, size, tuple(regions), file_name=given.image_name(name, image))

    things = frozenset(range(1, len(classes)))
    return Source(classes, tuple(found), read, things, notes)


def _listed(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    for name in LISTS:
        file = path / name
        if file.is_file() and name == "labelmap.txt":  # CVAT's: name:r,g,b:parts:actions
            lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            rows = [line.partition(":")[0].strip() for line in lines if not line.startswith("#")]
            return tuple(row for row in rows if row), ()
        if file.is_file():
            return tuple(name for name in class_names(file) if name != "__ignore__"), ()
    return CLASSES, ("no list of classes was found; they are taken for VOC's own 20",)


def _described(path: Path, name: str, size: tuple[int, int]) -> str | None:
    """The file name of the image, from the XML where there is one, after its size was compared."""
    file = path / "Annotations" / f"{name}.xml"
    if not file.is_file():
        return None
    where = repr(str(file))
    root = read_xml(file)
    if root.tag != "annotation":
        raise LabelError(f"{where} begins with <{root.tag}>, VOC's with <annotation>; replace it")
    element = root.find("size")
    if element is not None:
        declared = tuple(
            integer(text_of(element, tag, where), tag, where) for tag in ("height", "width")
        )
        if declared != size:
            raise ImageError(
                f"{where} is for an image of {declared[1]} x {declared[0]} pixels, its label map "
                f"has {size[1]} x {size[0]}; they must be equal"
            )
    text = root.findtext("filename") or ""
    return text.replace("\\", "/").rpartition("/")[2].strip() or None


class Writer:
    """``SegmentationClass``, ``SegmentationObject``, ``Annotations``, and ``class_names.txt``."""

    images = "JPEGImages"

    def __init__(self, target: Path, source: Source) -> None:
        self.target = target
        names = [name for name in source.classes if name not in BACKGROUND]
        self.names = names
        if len(names) > MOST:
            raise LabelError(
                f"VOC's 8 bits hold {MOST} classes, got {len(names)}; choose another format"
            )
        place = {name: number for number, name in enumerate(names, 1)}
        self.ids = [place.get(name, 0) for name in source.classes]
        # Where the background is a class of its own, what has none is void.
        self.empty = VOID if len(names) < len(source.classes) else 0

    def write(self, annotation: Annotation) -> Any:
        numbers, count = [0], 0
        for region in annotation.regions:
            thing = region.thing and self.ids[region.label] > 0
            count += thing
            numbers.append(count if thing else 0)
        if count > MOST:
            raise ImageError(
                f"image {annotation.name!r} has {count} objects, VOC's 8 bits hold {MOST}; choose "
                "another format"
            )
        fronts = annotation.id_map()
        values = [self.empty, *(self.ids[region.label] for region in annotation.regions)]
        labels = np.array(values, np.uint8)[fronts]
        objects = np.array(numbers, np.uint8)[fronts]
        objects[labels == VOID] = VOID
        for folder, plane in (("SegmentationClass", labels), ("SegmentationObject", objects)):
            path = self.target / folder / f"{annotation.name}.png"
            make_folder(path.parent, "output")
            write_labels(path, plane)
        path = self.target / "Annotations" / f"{annotation.name}.xml"
        make_folder(path.parent, "output")
        self._describe(path, annotation, objects)
        return annotation.name

    def _describe(self, path: Path, annotation: Annotation, objects: np.ndarray) -> None:
        height, width = annotation.size
        root = ElementTree.Element("annotation")
        file = annotation.file_name or annotation.name.rpartition("/")[2]
        ElementTree.SubElement(root, "folder").text = "JPEGImages"
        ElementTree.SubElement(root, "filename").text = file
        element = ElementTree.SubElement(root, "size")
        for tag, value in (("width", width), ("height", height), ("depth", 3)):
            ElementTree.SubElement(element, tag).text = str(value)
        ElementTree.SubElement(root, "segmented").text = "1"
        things = [r for r in annotation.regions if r.thing and self.ids[r.label]]
        wanted = range(1, len(things) + 1)
        for region, (mask, left, top) in zip(things, cut_out(objects, wanted), strict=True):
            if not mask.size:
                continue  # hidden by others
            element = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(element, "name").text = self.names[self.ids[region.label] - 1]
            ElementTree.SubElement(element, "pose").text = "Unspecified"
            ElementTree.SubElement(element, "truncated").text = "0"
            ElementTree.SubElement(element, "difficult").text = "0"
            box = ElementTree.SubElement(element, "bndbox")
            for tag, value in (
                ("xmin", left + 1),
                ("ymin", top + 1),
                ("xmax", left + mask.shape[1]),
                ("ymax", top + mask.shape[0]),
            ):
                ElementTree.SubElement(box, tag).text = str(value)
        ElementTree.indent(root)
        with replacing(path) as temporary:
            ElementTree.ElementTree(root).write(temporary, encoding="utf-8", xml_declaration=True)

    def finish(self, entries: Iterable[Any]) -> None:
        write_text(self.target / "class_names.txt", "\n".join(["background", *self.names]) + "\n")
        path = self.target / "ImageSets" / "Segmentation" / "all.txt"
        make_folder(path.parent, "output")
        write_text(path, "".join(f"{name}\n" for name in entries))


__all__ = ["CLASSES", "Writer", "detect", "open_source"]
