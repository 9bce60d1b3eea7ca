"""CVAT's XML "for images": polygons, masks and boxes of all images in one file.

Polygons run between pixels and are filled by pycocotools' rule, which CVAT's own exports use. An
object of one part without holes is written as a polygon, any other as a mask: lengths of runs of
background and object in turn, row by row within the mask's box.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from ..errors import ImageError, LabelError
from ..files import replacing
from .annotation import (
    BACKGROUND,
    Annotation,
    Given,
    Region,
    Source,
    checked_size,
    full_file_name,
    index_of,
    lookup,
    safe_name,
    stem_of,
)
from .polygons import check_ring, fill_area, fill_coco, parts
from .xml_files import attribute, integer, number, read_xml

_AREAS = ("polygon", "mask", "box")
_OTHERS = ("polyline", "points", "ellipse", "cuboid", "skeleton", "tag")


def open_source(path: Path, given: Given) -> Source:
    root = read_xml(path)
    where = repr(str(path))
    if root.tag != "annotations":
        raise LabelError(f"{where} begins with <{root.tag}>, CVAT's with <annotations>; replace it")
    if root.find("track") is not None:
        raise LabelError(f"{where} is CVAT's format for video; export it as 'CVAT for images'")
    images: dict[str, ElementTree.Element] = {}
    used: dict[str, None] = {}
    for label in root.iterfind("./meta//labels/label/name"):
        if label.text:
            used[label.text] = None
    left_out: dict[str, int] = {}
    boxes = 0
    for image in root.iterfind("image"):
        name = stem_of(safe_name(attribute(image, "name", where), where))
        if name in images:
            raise LabelError(f"{where} has image {name!r} twice; remove one")
        images[name] = image
        for shape in image:
            if shape.tag in _AREAS:
                used[attribute(shape, "label", f"{where}: image {name!r}")] = None
                boxes += shape.tag == "box"
            else:
                left_out[shape.tag] = left_out.get(shape.tag, 0) + 1
    classes, index = index_of([*used], given, where)
    notes = [f"{count} <{tag}> were left out" for tag, count in left_out.items()]
    if boxes:
        notes.append(f"{boxes} boxes were taken for rectangular masks")

    def read(name: str) -> Annotation:
        image = images[name]
        here = f"{where}: image {name!r}"
        declared = (
            integer(attribute(image, "height", here), "height", here),
            integer(attribute(image, "width", here), "width", here),
        )
        size = given.size_of(name, here, checked_size(declared, here))
        shapes = [shape for shape in image if shape.tag in _AREAS]
        shapes.sort(key=lambda shape: integer(shape.get("z_order", "0"), "z_order", here))
        regions: list[Region] = []
        groups: dict[tuple[int, int], int] = {}
        for place, shape in enumerate(shapes):
            there = f"{here}, <{shape.tag}> {place}"
            label = lookup(index, attribute(shape, "label", there), there)
            region = _region(shape, label, size, there)
            group = integer(shape.get("group_id") or "0", "group_id", there)
            if group and (label, group) in groups:
                other = regions[groups[label, group]]
                regions[groups[label, group]] = Region.cut(
                    label, other.full(size) | region.full(size)
                )
                continue
            if group:
                groups[label, group] = len(regions)
            regions.append(region)
        file = attribute(image, "name", here).replace("\\", "/").rpartition("/")[2]
        file_name = given.image_name(name, file if stem_of(file) != file else None)
        return Annotation(name, size, tuple(regions), file_name=file_name, rule="coco")

    return Source(classes, tuple(images), read, frozenset(range(len(classes))), tuple(notes))


def _region(shape: ElementTree.Element, label: int, size: tuple[int, int], where: str) -> Region:
    if shape.tag == "mask":
        return _mask(shape, label, size, where)
    if shape.tag == "box":
        left, top, right, bottom = (
            number(attribute(shape, key, where), key, where) for key in ("xtl", "ytl", "xbr", "ybr")
        )
        corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
        return Region.cut(label, fill_area([check_ring(corners, size, where)], *size))
    points = [
        [number(value, "a coordinate", where) for value in pair.split(",")]
        for pair in attribute(shape, "points", where).split(";")
    ]
    ring = check_ring(points, size, where)
    return Region.cut(label, fill_coco(ring, *size), polygons=(ring,))


def _mask(shape: ElementTree.Element, label: int, size: tuple[int, int], where: str) -> Region:
    left, top, width, height = (
        integer(attribute(shape, key, where), key, where)
        for key in ("left", "top", "width", "height")
    )
    if (
        left < 0
        or top < 0
        or width < 1
        or height < 1
        or left + width > size[1]
        or top + height > size[0]
    ):
        raise ImageError(
            f"{where}: its box of {width} x {height} pixels at ({left}, {top}) reaches beyond the "
            f"image of {size[1]} x {size[0]}; are these coordinates of another image?"
        )
    runs = [integer(text, "a run", where) for text in attribute(shape, "rle", where).split(",")]
    if min(runs) < 0 or sum(runs) != width * height:
        raise ImageError(
            f"{where}: the runs of its mask add up to {sum(runs)} pixels, its box has "
            f"{width * height}; it is damaged"
        )
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    region = Region.cut(label, flat.reshape(height, width))
    return Region(label, region.mask, region.left + left, region.top + top)


class Writer:
    """One XML."""

    images = None

    def __init__(self, target: Path, source: Source) -> None:
        self.target, self.classes = target, source.classes

    def write(self, annotation: Annotation) -> Any:
        height, width = annotation.size
        lines = []
        for order, region in enumerate(annotation.regions):
            name = self.classes[region.label]
            if not region.area or name in BACKGROUND:
                continue
            common = f'label={quoteattr(name)} source="file" occluded="0"'
            common_end = f'z_order="{order}"'
            rings = _polygon(region, annotation)
            if rings is not None:
                points = ";".join(f"{x:.12g},{y:.12g}" for x, y in rings)
                lines.append(f'    <polygon {common} points="{points}" {common_end}/>')
            else:
                flat = region.mask.ravel()
                edges = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
                runs = np.diff([0, *edges, flat.size]).tolist()
                box = (
                    f'left="{region.left}" top="{region.top}" width="{region.mask.shape[1]}" '
                    f'height="{region.mask.shape[0]}"'
                )
                text = ", ".join(map(str, runs))
                lines.append(f'    <mask {common} rle="{text}" {box} {common_end}/>')
        return {
            "head": f"name={quoteattr(full_file_name(annotation))} "
            f'width="{width}" height="{height}"',
            "shapes": lines,
        }

    def finish(self, entries: Iterable[Any]) -> None:
        labels = "".join(
            f"        <label><name>{escape(name)}</name></label>\n"
            for name in self.classes
            if name not in BACKGROUND
        )
        with replacing(self.target) as temporary, temporary.open("w", encoding="utf-8") as stream:
            stream.write(
                '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n'
                f"  <meta>\n    <task>\n      <labels>\n{labels}      </labels>\n    </task>\n"
                "  </meta>\n"
            )
            for number_, entry in enumerate(entries):
                stream.write(f'  <image id="{number_}" {entry["head"]}>\n')
                stream.write("".join(f"{line}\n" for line in entry["shapes"]))
                stream.write("  </image>\n")
            stream.write("</annotations>\n")


def _polygon(region: Region, annotation: Annotation) -> np.ndarray | None:
    if len(region.polygons) == 1 and annotation.rule == "coco":
        return region.polygons[0]
    found = parts(region.mask)
    if len(found) != 1 or len(found[0]) != 1:
        return None
    return np.asarray(found[0][0] + (region.left, region.top))


__all__ = ["Writer", "open_source"]
