"""COCO's instances: polygons, run-length masks in both forms, and lists of results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ImageError, LabelError
from ..files import check_json, read_json, replacing, some, write_json
from ..regions import Instances
from .annotation import (
    BACKGROUND,
    Annotation,
    Given,
    Region,
    Source,
    checked_size,
    full_file_name,
    index_of,
    safe_name,
    stem_of,
)
from .polygons import check_ring, fill_coco, parts
from .rle import _runs, decode_rle, encode_rle


def write_instances(path: str | os.PathLike[str], instances: Instances) -> Path:
    """Writes instances as a JSON list in the form of COCO's results.

    Each has ``category_id`` (the class index), ``score``, ``bbox`` [x, y, width, height] and
    ``segmentation``, a run-length dict.
    """
    boxes = instances.boxes.double()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    columns = (instances.labels.tolist(), instances.scores.tolist(), boxes.tolist())
    entries = [
        {"category_id": label, "score": score, "bbox": box, "segmentation": encode_rle(mask)}
        for label, score, box, mask in zip(*columns, instances.masks, strict=True)
    ]
    return write_json(path, entries)


# --- as a source and a target of conversions --------------------------------------------------

_FILE = {
    "images": [{"id": (int, str), "file_name": str, "height?": int, "width?": int}],
    "annotations": [
        {
            "image_id": (int, str),
            "category_id": int,
            "segmentation?": (list, dict),
            "iscrowd?": bool,
            "score?": float,
        }
    ],
    "categories": [{"id": int, "name": str}],
}


def open_source(path: Path, given: Given) -> Source:
    """An ``instances_*.json``."""
    value = read_json(path, LabelError)
    where = repr(str(path))
    for key, shape in _FILE.items():  # a file of gigabytes is held once, and checked in parts
        check_json(value, {key: shape}, where, LabelError)
    names, index = _categories(value["categories"], given, where)
    images: dict[Any, str] = {}
    entries: dict[str, dict[str, Any]] = {}
    for entry in value["images"]:
        name = stem_of(safe_name(entry["file_name"], f"{where}: image {entry['id']!r}"))
        if entry["id"] in images or name in entries:
            raise LabelError(f"{where} has image {entry['id']!r}, {name!r}, twice; remove one")
        images[entry["id"]], entries[name] = name, entry
    regions: dict[str, list[tuple[int, dict[str, Any]]]] = {name: [] for name in entries}
    for number, annotation in enumerate(value["annotations"]):
        here = f"{where}: annotations[{number}]"
        if annotation["image_id"] not in images:
            raise LabelError(
                f"{here} is of image {annotation['image_id']!r}, which images does not list; "
                "remove it, or add the image"
            )
        if annotation["category_id"] not in index:
            raise LabelError(
                f"{here} has the category {annotation['category_id']}, which categories does not "
                "list; remove it, or add the category"
            )
        regions[images[annotation["image_id"]]].append((number, annotation))

    def read(name: str) -> Annotation:
        entry = entries[name]
        declared = None
        if "height" in entry and "width" in entry:
            declared = entry["height"], entry["width"]
        size = given.size_of(name, f"{where}: image {entry['id']!r}", declared)
        found = [
            _region(
                annotation, index[annotation["category_id"]], size, f"{where}: annotations[{k}]"
            )
            for k, annotation in regions[name]
        ]
        file = entry["file_name"].replace("\\", "/").rpartition("/")[2]
        file = given.image_name(name, file if file != stem_of(file) else None)
        return Annotation(name, size, tuple(found), file_name=file, rule="coco")

    return Source(names, tuple(entries), read, frozenset(range(len(names))))


def _categories(
    entries: list[dict[str, Any]], given: Given, where: str
) -> tuple[tuple[str, ...], dict[int, int]]:
    entries = sorted(entries, key=lambda entry: entry["id"])
    if len({entry["id"] for entry in entries}) < len(entries):
        raise LabelError(f"{where} has two categories with the same id; remove one")
    names, place = index_of([entry["name"] for entry in entries], given, where)
    return names, {entry["id"]: place[entry["name"]] for entry in entries}


def _region(annotation: dict[str, Any], label: int, size: tuple[int, int], where: str) -> Region:
    shape = annotation.get("segmentation")
    more: dict[str, Any] = {
        "crowd": bool(annotation.get("iscrowd", 0)),
        "score": float(annotation.get("score", 1.0)),
    }
    if not shape:
        raise LabelError(
            f"{where} has no segmentation: a box alone is no mask; use annotations with masks"
        )
    if isinstance(shape, dict):
        try:
            height, width, _ = _runs(shape)
            if (height, width) != size:
                raise ImageError(
                    f"its RLE mask is {width} x {height} pixels, its image {size[1]} x {size[0]}"
                )
            return Region.cut(label, decode_rle(shape).numpy(), **more)
        except ImageError as error:
            raise ImageError(f"{where}: {error}") from error
    if shape and not isinstance(shape[0], list):
        raise ImageError(f"{where}: polygons must be a list of lists x, y, x, y, …")
    mask = np.zeros(size, bool)
    rings = [check_ring(points, size, f"{where}, polygon {k}") for k, points in enumerate(shape)]
    for ring in rings:
        mask |= fill_coco(ring, *size)
    return Region.cut(label, mask, polygons=tuple(rings), **more)


def open_results(path: Path, given: Given) -> Source:
    """A list of results: the name of an image is its id."""
    value = read_json(path, LabelError)
    where = repr(str(path))
    shape = {"image_id": (int, str), "category_id": int, "segmentation": dict, "score": float}
    check_json(value, [shape], where, LabelError)
    categories = sorted({entry["category_id"] for entry in value})
    notes: tuple[str, ...] = ()
    if given.classes is None:
        names = tuple(f"category {number}" for number in categories)
        index = {number: k for k, number in enumerate(categories)}
        notes = ("results have no names of classes; they are called 'category 1' and so on",)
    else:
        names = given.classes
        index = {k + 1: k for k in range(len(names))}
        if strange := [number for number in categories if number not in index]:
            raise LabelError(
                f"{where} has the categories {some(strange)}, the classes given are numbered 1 to "
                f"{len(names)}; give as many names as there are categories"
            )
    images: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number, entry in enumerate(value):
        name = safe_name(str(entry["image_id"]), f"{where}: [{number}]")
        images.setdefault(name, []).append((number, entry))

    def read(name: str) -> Annotation:
        regions = []
        size = None
        for number, entry in images[name]:
            here = f"{where}: [{number}]"
            try:
                height, width, _ = _runs(entry["segmentation"])
            except ImageError as error:
                raise ImageError(f"{here}: {error}") from error
            if size is None:
                size = given.size_of(name, here, checked_size((height, width), here))
            regions.append(_region(entry, index[entry["category_id"]], size, here))
        regions.sort(key=lambda region: region.score)  # the most certain in front
        assert size is not None
        return Annotation(name, size, tuple(regions), file_name=given.image_name(name))

    return Source(names, tuple(images), read, frozenset(range(len(names))), notes)


class Writer:
    """An ``instances_*.json``.

    Masks without holes are polygons between pixels, one for each part, which pycocotools fills to
    the same mask; others are compressed RLE, and crowds RLE as lists of runs, as in COCO's files.

    Args:
        target: the file.
        source: for its classes.
        rle: every mask as compressed RLE.
    """

    images = None

    def __init__(self, target: Path, source: Source, rle: bool = False) -> None:
        self.target, self.classes, self.rle = target, source.classes, rle

    def write(self, annotation: Annotation) -> Any:
        return {
            "file_name": full_file_name(annotation),
            "size": list(annotation.size),
            "regions": [
                {
                    "category_id": region.label + 1,
                    "iscrowd": int(region.crowd),
                    "area": region.area,
                    "bbox": [region.left, region.top, *region.mask.shape[::-1]],
                    "segmentation": self._shape(region, annotation),
                }
                | ({"score": region.score} if region.score != 1 else {})
                for region in annotation.regions
                if region.area and self.classes[region.label] not in BACKGROUND
            ],
        }

    def _shape(self, region: Region, annotation: Annotation) -> Any:
        if not self.rle and not region.crowd:
            if region.polygons and annotation.rule == "coco":
                return [ring.ravel().tolist() for ring in region.polygons]
            found = parts(region.mask)
            if all(len(rings) == 1 for rings in found):
                corner = np.array([region.left, region.top])
                return [(rings[0] + corner).ravel().tolist() for rings in found]
        rle = encode_rle(region.full(annotation.size))
        if region.crowd and not self.rle:
            rle["counts"] = _runs(rle)[2].tolist()
        return rle

    def finish(self, entries: Iterable[Any]) -> None:
        images: list[dict[str, Any]] = []
        with replacing(self.target) as temporary, temporary.open("w", encoding="utf-8") as stream:
            stream.write('{"annotations": [')
            count = 0
            for number, entry in enumerate(entries, 1):
                height, width = entry["size"]
                images.append(
                    {
                        "id": number,
                        "file_name": entry["file_name"],
                        "height": height,
                        "width": width,
                    }
                )
                for region in entry["regions"]:
                    count += 1
                    line = {"id": count, "image_id": number, **region}
                    stream.write(("" if count == 1 else ",") + "\n" + json.dumps(line))
            categories = [
                {"id": k, "name": name}
                for k, name in enumerate(self.classes, 1)
                if name not in BACKGROUND
            ]
            stream.write(f'\n],\n"images": {json.dumps(images)},\n')
            stream.write(f'"categories": {json.dumps(categories)}}}\n')


__all__ = ["Writer", "open_results", "open_source", "write_instances"]
