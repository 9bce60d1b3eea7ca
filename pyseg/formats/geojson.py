"""GeoJSON (RFC 7946), one for each image: polygons with holes and several parts.

Coordinates are pixels, x to the right and y down, pixel (0, 0) from 0 to 1; where the image lies on
the earth (a GeoTIFF, or a world file beside it), they are those of its coordinate system. A pixel
belongs to a polygon that holds its centre, as with GDAL and rasterio.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ImageError, LabelError
from ..files import check_json, make_folder, read_json, write_json
from .annotation import (
    BACKGROUND,
    Annotation,
    Given,
    Placement,
    Region,
    Source,
    by_name,
    files_below,
    index_of,
    lookup,
    safe_name,
)
from .polygons import check_ring, fill_area, parts

_FILE = {
    "type": str,
    "features": [{"geometry": object, "properties?": object}],
    "image?": {"file_name?": str, "height": int, "width": int},
    "transform?": [float],
    "crs?": object,
}
_LABELS = ("label", "class", "name", "category", "classification")


def is_file(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "FeatureCollection"


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else files_below(path, "*.geojson")


def detect(path: Path) -> str | None:
    files = _files(path) if path.is_dir() else []
    return f"{len(files)} files *.geojson" if files else None


def open_source(path: Path, given: Given) -> Source:
    files = _files(path)
    if not files:
        raise ImageError(f"{str(path)!r} holds no .geojson; give the folder that does")
    found = by_name(path if path.is_dir() else path.parent, files)
    labels: dict[str, None] = {}
    left_out = 0
    for file in files:
        for number, feature in enumerate(_read(file)["features"]):
            if _is_area(feature):
                labels[_label(feature, f"{str(file)!r}: features[{number}]")] = None
            else:
                left_out += 1
    notes = (f"{left_out} points and lines were left out: they have no area",) if left_out else ()
    if not labels and given.classes is None:
        raise LabelError(f"{str(path)!r} has no polygon; give the names, classes=NAMES")
    classes, index = index_of(sorted(labels) if labels else (), given, repr(str(path)))

    def read(name: str) -> Annotation:
        file = found[name]
        where = repr(str(file))
        value = _read(file)
        image: dict[str, Any] = value.get("image", {})
        declared = (image["height"], image["width"]) if image else None
        size = given.size_of(name, where, declared)
        placement = _placement(value, given, name, where)
        regions = []
        for number, feature in enumerate(value["features"]):
            if _is_area(feature):
                here = f"{where}: features[{number}]"
                label = lookup(index, _label(feature, here), here)
                regions.append(_region(feature, label, size, placement, here))
        file_name = image.get("file_name")
        if file_name is not None:
            file_name = safe_name(file_name, where).rpartition("/")[2]
        return Annotation(
            name,
            size,
            tuple(regions),
            file_name=given.image_name(name, file_name),
            placement=placement,
        )

    return Source(classes, tuple(found), read, frozenset(range(len(classes))), notes)


def _read(file: Path) -> dict[str, Any]:
    value: dict[str, Any] = read_json(file, LabelError, _FILE)
    if not is_file(value):
        raise LabelError(f"{str(file)!r} is no FeatureCollection; export the features as one")
    return value


def _is_area(feature: dict[str, Any]) -> bool:
    geometry = feature["geometry"]
    return isinstance(geometry, dict) and geometry.get("type") in ("Polygon", "MultiPolygon")


def _label(feature: dict[str, Any], where: str) -> str:
    properties: Any = feature.get("properties")
    for key in _LABELS if isinstance(properties, dict) else ():
        value = properties.get(key)
        if isinstance(value, dict):  # QuPath's
            value = value.get("name")
        if isinstance(value, str) and value:
            return value
    raise LabelError(f"{where} has no class: none of the properties {', '.join(_LABELS)} is a text")


def _placement(value: dict[str, Any], given: Given, name: str, where: str) -> Placement | None:
    crs = _crs_of(value.get("crs"))
    if "transform" in value:
        numbers = value["transform"]
        if len(numbers) != 6:
            raise LabelError(f"{where}: transform must be six numbers, got {len(numbers)}")
        a, b, c, d, e, f = map(float, numbers)
        if a * e == b * d:
            raise LabelError(f"{where}: transform maps the image to a line; mend it")
        return Placement((a, b, c, d, e, f), crs)
    path = given.images.find(name) if given.images else None
    placement = None if path is None else placement_of(path)
    if placement is not None and crs and placement.crs and crs != placement.crs:
        raise LabelError(
            f"{where} is in {crs}, its image in {placement.crs}; bring it there first, such as by "
            f"ogr2ogr -t_srs {placement.crs}"
        )
    return placement


def _crs_of(value: Any) -> str | None:
    name = value.get("properties", {}) if isinstance(value, dict) else {}
    name = name.get("name") if isinstance(name, dict) else None
    if not isinstance(name, str):
        return None
    return f"EPSG:{name.rpartition(':')[2]}" if "EPSG" in name else name


def _region(
    feature: dict[str, Any],
    label: int,
    size: tuple[int, int],
    placement: Placement | None,
    where: str,
) -> Region:
    geometry = feature["geometry"]
    polygons = geometry.get("coordinates")
    if geometry["type"] == "Polygon":
        polygons = [polygons]
    if not isinstance(polygons, list) or not all(isinstance(rings, list) for rings in polygons):
        raise ImageError(f"{where}: coordinates are no lists of rings; mend or remove it")
    mask = np.zeros(size, bool)
    for rings in polygons:
        found = []
        for ring in rings:
            if not isinstance(ring, list) or not all(isinstance(p, list) for p in ring):
                raise ImageError(f"{where}: a ring is no list of points [x, y]; mend or remove it")
            points = [point[:2] for point in ring]  # a third number is a height
            points = points[:-1] if len(points) > 1 and points[0] == points[-1] else points
            if placement is not None:
                points = _to_pixels(points, placement, where)
            found.append(check_ring(points, size, where))
        if found:
            mask |= fill_area(found, *size)
    properties = feature.get("properties") or {}
    more: dict[str, Any] = {}
    check_json(properties, {"score?": object}, where, LabelError)
    score = properties.get("score", 1.0)
    if type(score) in (int, float) and 0 <= score <= 1:
        more["score"] = float(score)
    return Region.cut(
        label,
        mask,
        crowd=properties.get("crowd") is True,
        thing=properties.get("object") is not False,
        **more,
    )


def _to_pixels(points: list[Any], placement: Placement, where: str) -> Any:
    a, b, c, d, e, f = placement.transform
    try:
        x, y = np.array(points, np.float64).reshape(-1, 2).T
    except (TypeError, ValueError, OverflowError) as error:
        raise ImageError(f"{where}: a point is no pair of numbers; mend or remove it") from error
    x, y = x - c, y - f
    with np.errstate(over="ignore", invalid="ignore"):
        return (np.stack([e * x - b * y, a * y - d * x], 1) / (a * e - b * d)).tolist()


def placement_of(path: Path) -> Placement | None:
    """Where an image lies, from a GeoTIFF's tags or the world file beside it; None = nowhere.

    Raises:
        ImageError: a world file that is no six numbers.
    """
    suffix = path.suffix
    for other in (f"{suffix[:2]}{suffix[-1]}w", f"{suffix}w", ".wld"):
        world = path.with_suffix(other)
        if world.is_file():
            try:
                a, d, b, e, x, y = map(float, world.read_text(encoding="ascii").split())
            except ValueError as error:
                raise ImageError(f"{str(world)!r} is no world file of six numbers") from error
            # Its origin is the centre of the first pixel.
            return Placement((a, b, x - (a + b) / 2, d, e, y - (d + e) / 2))
    if suffix.lower() not in (".tif", ".tiff"):
        return None
    with Image.open(path) as image:
        tags: Any = getattr(image, "tag_v2", {})
        matrix, scale = tags.get(34264), tags.get(33550)
        tie, keys = tags.get(33922), tags.get(34735) or ()
    entries = {keys[k]: keys[k + 3] for k in range(4, len(keys) - 3, 4)}
    if matrix and len(matrix) == 16:
        a, b, _, c, d, e, _, f = matrix[:8]
    elif scale and tie and len(scale) >= 2 and len(tie) >= 6:
        a, b, d, e = scale[0], 0.0, 0.0, -scale[1]
        c, f = tie[3] - a * tie[0], tie[4] - e * tie[1]
    else:
        return None
    if entries.get(1025) == 2:  # the values stand for points, the first pixel's centre being (0, 0)
        c, f = c - (a + b) / 2, f - (d + e) / 2
    code = entries.get(3072) or entries.get(2048)
    return Placement((a, b, c, d, e, f), f"EPSG:{code}" if code and code < 32767 else None)


class Writer:
    """``NAME.geojson``."""

    images = None

    def __init__(self, target: Path, source: Source) -> None:
        self.target, self.classes = target, source.classes

    def write(self, annotation: Annotation) -> Any:
        path = self.target / f"{annotation.name}.geojson"
        make_folder(path.parent, "output")
        height, width = annotation.size
        placement = annotation.placement
        value: dict[str, Any] = {"type": "FeatureCollection"}
        if placement is not None:
            value["transform"] = list(placement.transform)
            if placement.crs:
                name = placement.crs.replace("EPSG:", "urn:ogc:def:crs:EPSG::")
                value["crs"] = {"type": "name", "properties": {"name": name}}
        file = annotation.file_name or annotation.name.rpartition("/")[2]
        value["image"] = {"file_name": file, "height": height, "width": width}
        value["features"] = [
            self._feature(region, placement)
            for region in annotation.regions
            if region.area and self.classes[region.label] not in BACKGROUND
        ]
        write_json(path, value)
        return None

    def _feature(self, region: Region, placement: Placement | None) -> dict[str, Any]:
        corner = (region.left, region.top)
        polygons = [
            [_closed(ring + corner, placement) for ring in part] for part in parts(region.mask)
        ]
        properties: dict[str, Any] = {"label": self.classes[region.label]}
        if not region.thing:
            properties["object"] = False
        if region.crowd:
            properties["crowd"] = True
        if region.score != 1:
            properties["score"] = region.score
        return {
            "type": "Feature",
            "properties": properties,
            "geometry": {"type": "Polygon", "coordinates": polygons[0]}
            if len(polygons) == 1
            else {"type": "MultiPolygon", "coordinates": polygons},
        }

    def finish(self, entries: Iterable[Any]) -> None:
        pass


def _closed(ring: np.ndarray, placement: Placement | None) -> list[list[float]]:
    points = np.concatenate([ring, ring[:1]])
    if placement is None:
        return points.tolist()  # type: ignore[no-any-return]
    a, b, c, d, e, f = placement.transform
    x, y = points.T
    points = np.stack([a * x + b * y + c, d * x + e * y + f], 1)
    if a * e < b * d:  # the transform turns it over; outer rings go counterclockwise
        points = points[::-1]
    return points.tolist()  # type: ignore[no-any-return]


__all__ = ["Writer", "detect", "open_source", "placement_of"]
