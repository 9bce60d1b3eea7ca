"""labelme's JSON, one for each image.

Its polygons are filled by Pillow, border included, as labelme itself does. Written so that this
gives the same mask: an object without holes is a polygon through its outermost pixels, one for each
part, with one ``group_id``; any other is a shape of type "mask", which holds every mask (labelme
from 5.3 on).
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..errors import ImageError, LabelError
from ..files import IMAGE_SUFFIXES, make_folder, read_json, write_json
from .annotation import (
    BACKGROUND,
    Annotation,
    Given,
    Region,
    Source,
    by_name,
    files_below,
    image_size,
    index_of,
    lookup,
    safe_name,
)
from .polygons import Ring, bits_of, border_parts, check_ring, fill_pillow, straightened

IGNORED = "__ignore__"  # labelme's name for what is void
_FILE = {
    "shapes": [
        {
            "label": str,
            "points": [[float]],
            "shape_type?": object,
            "group_id?": object,
            "mask?": object,
        }
    ],
    "imagePath?": object,
    "imageHeight?": object,
    "imageWidth?": object,
}
_AREAS = ("polygon", "rectangle", "circle", "mask")


def is_file(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("shapes"), list)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = []
    for file in files_below(path, "*.json"):
        # Read only the beginning of what may be large: classes.json and the like lie there too.
        with file.open("rb") as stream:
            head = stream.read(1 << 16)
        if b'"shapes"' in head or b'"imageData"' in head:
            found.append(file)
    return found


def detect(path: Path) -> str | None:
    files = _files(path) if path.is_dir() else []
    return f"{len(files)} JSONs with shapes" if files else None


def open_source(path: Path, given: Given) -> Source:
    files = _files(path)
    if not files:
        raise ImageError(f"{str(path)!r} holds no JSON of labelme; give the folder that does")
    found = by_name(path if path.is_dir() else path.parent, files)
    labels: dict[str, None] = {}
    skipped = 0
    for file in files:
        for shape in _read(file)["shapes"]:
            if _is_area(shape):
                labels[shape["label"]] = None
            else:
                skipped += shape["label"] != IGNORED
    notes: tuple[str, ...] = ()
    if skipped:
        notes = (f"{skipped} points and lines were left out: they have no area",)
    if not labels and given.classes is None:
        raise LabelError(f"{str(path)!r} has no shape with an area; give the names, classes=NAMES")
    classes, index = index_of(sorted(labels) if labels else (), given, repr(str(path)))

    def read(name: str) -> Annotation:
        file = found[name]
        where = repr(str(file))
        value = _read(file)
        height, width = value.get("imageHeight"), value.get("imageWidth")
        declared = (height, width) if type(height) is int and type(width) is int else None
        beside = _beside(file, value)
        if declared is None and beside is not None and given.images is None:
            declared = image_size(beside)
        size = given.size_of(name, where, declared)
        regions: list[Region] = []
        groups: dict[tuple[str, Any], int] = {}
        for number, shape in enumerate(value["shapes"]):
            if not _is_area(shape):
                continue
            here = f"{where}: shapes[{number}]"
            region = _region(shape, lookup(index, shape["label"], here), size, here)
            group = shape.get("group_id")
            key = shape["label"], group
            if type(group) is int and key in groups:
                regions[groups[key]] = _joined(regions[groups[key]], region, size)
                continue
            if type(group) is int:
                groups[key] = len(regions)
            regions.append(region)
        return Annotation(
            name,
            size,
            tuple(regions),
            file_name=given.image_name(name, beside.name if beside else _image_name(value)),
            rule="pillow",
        )

    return Source(classes, tuple(found), read, frozenset(range(len(classes))), notes)


def _read(file: Path) -> dict[str, Any]:
    value: dict[str, Any] = read_json(file, LabelError, _FILE)
    return value


def _is_area(shape: dict[str, Any]) -> bool:
    return shape.get("shape_type", "polygon") in _AREAS and shape["label"] != IGNORED


def _image_name(value: dict[str, Any]) -> str | None:
    """The name alone: where it lies is another machine's matter."""
    path = value.get("imagePath")
    name = path.replace("\\", "/").rpartition("/")[2] if isinstance(path, str) else ""
    return name if Path(name).suffix.lower() in IMAGE_SUFFIXES else None


def _beside(file: Path, value: dict[str, Any]) -> Path | None:
    name = _image_name(value)
    if name is None:
        return None
    path = file.with_name(safe_name(name, repr(str(file))))
    return path if path.is_file() and path != file else None


def _joined(one: Region, other: Region, size: tuple[int, int]) -> Region:
    mask = one.full(size) | other.full(size)
    polygons = one.polygons + other.polygons if one.polygons and other.polygons else ()
    return Region.cut(one.label, mask, polygons=polygons)


def _region(shape: dict[str, Any], label: int, size: tuple[int, int], where: str) -> Region:
    height, width = size
    points = shape["points"]
    kind = shape.get("shape_type", "polygon")
    if kind == "polygon":
        ring = check_ring(points, size, where)
        return Region.cut(label, fill_pillow(ring, height, width), polygons=(ring,))
    if len(points) != 2:
        raise ImageError(
            f"{where}: a {kind} has two points, this one {len(points)}; mend or remove it"
        )
    check_ring([*points, points[0]], size, where)
    (x0, y0), (x1, y1) = points
    if kind == "mask":
        return _mask(shape, label, size, where)
    picture = Image.new("1", (width, height))
    draw = ImageDraw.Draw(picture)
    if kind == "rectangle":
        box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        draw.rectangle(box, outline=1, fill=1)
    else:
        radius = float(np.hypot(x1 - x0, y1 - y0))
        draw.ellipse((x0 - radius, y0 - radius, x0 + radius, y0 + radius), outline=1, fill=1)
    return Region.cut(label, bits_of(picture))


def _mask(shape: dict[str, Any], label: int, size: tuple[int, int], where: str) -> Region:
    (x0, y0), (x1, y1) = [[round(v) for v in point] for point in shape["points"]]
    text = shape.get("mask")
    if not isinstance(text, str):
        raise ImageError(f"{where} is a mask without its picture in 'mask'; export it again")
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as file:
            if file.size != (x1 - x0 + 1, y1 - y0 + 1):
                raise ImageError(
                    f"{where}: its mask is {file.size[0]} x {file.size[1]} pixels, its two points "
                    f"enclose {x1 - x0 + 1} x {y1 - y0 + 1}; export it again"
                )
            picture = np.array(file.convert("L")) > 0
    except ImageError:
        raise
    except (binascii.Error, Exception) as error:  # Pillow's decoders raise many kinds
        raise ImageError(
            f"{where}: its mask is no PNG in base 64 ({error}); export it again"
        ) from error
    if x0 < 0 or y0 < 0 or x1 >= size[1] or y1 >= size[0]:
        raise ImageError(
            f"{where}: its mask reaches beyond the image of {size[1]} x {size[0]} pixels; are "
            "these coordinates of another image?"
        )
    mask = np.zeros(size, bool)
    mask[y0 : y1 + 1, x0 : x1 + 1] = picture
    return Region.cut(label, mask)


class Writer:
    """``NAME.json``; images belong beside them."""

    images = ""

    def __init__(self, target: Path, source: Source) -> None:
        self.target, self.classes = target, source.classes

    def write(self, annotation: Annotation) -> Any:
        path = self.target / f"{annotation.name}.json"
        make_folder(path.parent, "output")
        shapes: list[dict[str, Any]] = []
        for number, region in enumerate(annotation.regions, 1):
            if not region.area or self.classes[region.label] in BACKGROUND:
                continue
            rings = _polygons(region, annotation)
            if rings is None:
                shapes.append(self._shape(region.label, "mask", *_as_mask(region)))
            else:
                group = number if len(rings) > 1 else None
                for ring in rings:
                    shapes.append(self._shape(region.label, "polygon", ring.tolist(), None, group))
        height, width = annotation.size
        value: dict[str, Any] = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": annotation.file_name or annotation.name.rpartition("/")[2],
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        write_json(path, value)
        return None

    def _shape(
        self,
        label: int,
        kind: str,
        points: list[Any],
        mask: str | None,
        group: int | None = None,
    ) -> dict[str, Any]:
        return {
            "label": self.classes[label],
            "points": points,
            "group_id": group,
            "description": "",
            "shape_type": kind,
            "flags": {},
            "mask": mask,
        }

    def finish(self, entries: Iterable[Any]) -> None:
        pass


def _polygons(region: Region, annotation: Annotation) -> list[Ring] | None:
    """Polygons that labelme fills to the mask, if there are such."""
    if region.polygons and annotation.rule == "pillow":
        return list(region.polygons)
    found = border_parts(region.mask)
    if any(len(rings) > 1 for rings in found):
        return None
    rings = [straightened(part[0]) for part in found]
    rings = [np.concatenate([ring, ring[-1:].repeat(max(0, 3 - len(ring)), 0)]) for ring in rings]
    mask = np.zeros_like(region.mask)
    for ring in rings:
        mask |= fill_pillow(ring, *mask.shape)
    # Pillow's filling is not specified: what it draws is looked at.
    if not np.array_equal(mask, region.mask):
        return None
    corner = np.array([region.left, region.top])
    return [ring + corner for ring in rings]


def _as_mask(region: Region) -> tuple[list[list[int]], str]:
    stream = io.BytesIO()
    Image.fromarray(region.mask).save(stream, format="PNG")
    left, top, right, bottom = region.box
    corners = [[left, top], [right - 1, bottom - 1]]
    return corners, base64.b64encode(stream.getvalue()).decode("ascii")


__all__ = ["Writer", "detect", "open_source"]
