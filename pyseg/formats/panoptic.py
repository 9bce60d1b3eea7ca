"""COCO's panoptic format: RGB PNGs of segment ids, and the JSON that lists the segments."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ImageError, LabelError
from ..files import check_json, make_folder, read_json, some, write_json
from ..image import SEGMENT_IDS, open_image, plain_png, save_image
from ..regions import Segment, Segments
from .annotation import (
    Annotation,
    Given,
    Source,
    cut_out,
    full_file_name,
    index_of,
    safe_name,
    stem_of,
)


def read_segment_ids(path: str | os.PathLike[str]) -> Tensor:
    """The segment ids of a panoptic PNG in COCO's format: R + 256 G + 65536 B, 0 = void.

    Args:
        path: an RGB PNG.

    Returns:
        [H, W] int32.

    Raises:
        ImageError: the file cannot be read (see `read_image`), or is not a lossless RGB image.
    """
    ids = plain_png(path, SEGMENT_IDS)
    if ids is not None:
        return ids
    image = open_image(path, "panoptic map")
    name = f"panoptic map {os.fspath(path)!r}"
    if image.format in ("JPEG", "MPO"):
        raise ImageError(
            f"{name} is a JPEG, whose compression changes ids; use the PNG that it was made from"
        )
    if image.mode != "RGB":
        raise ImageError(
            f"{name} has mode {image.mode}; COCO's panoptic format is RGB, with "
            "id = R + 256 G + 65536 B"
        )
    # Pillow pads to four bytes a pixel much faster than NumPy adds up three.
    padded = np.frombuffer(image.tobytes("raw", "RGBX"), dtype="<u4").reshape(image.size[::-1])
    return torch.from_numpy((padded & 0xFFFFFF).view(np.int32))


def categories_of(value: Any, path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The entries of a list of categories, or of a JSON that has one; ``path`` is for messages."""
    entries = value.get("categories") if isinstance(value, dict) else value
    if not isinstance(entries, list) or not entries:
        raise LabelError(f"{os.fspath(path)!r} has no categories; give a JSON that has them")
    where = f"the categories of {os.fspath(path)!r}"
    check_json(entries, [{"id": int, "name": str, "isthing": bool}], where, LabelError)
    for key in ("id", "name"):
        if len({entry[key] for entry in entries}) < len(entries):
            raise LabelError(f"{os.fspath(path)!r} has two categories with the same {key}")
    return entries


_ANNOTATION = {
    "image_id": (int, str),
    "file_name": str,
    "segments_info": [{"id": int, "category_id": int, "area?": object, "iscrowd?": bool}],
}


def annotations_of(value: Any, path: str | os.PathLike[str]) -> dict[Any, dict[str, Any]]:
    """The entries of a JSON by image."""
    entries = value.get("annotations") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        raise LabelError(
            f"{os.fspath(path)!r} has no list of annotations: it is not in COCO's panoptic format"
        )
    check_json(entries, [_ANNOTATION], f"the annotations of {os.fspath(path)!r}", LabelError)
    result = {}
    for entry in entries:
        if entry["image_id"] in result:
            raise LabelError(f"{os.fspath(path)!r} has image {entry['image_id']!r} twice")
        result[entry["image_id"]] = entry
    return result


def read_segments(
    entry: Mapping[str, Any],
    folder: Path,
    index: Mapping[int, int],
    path: str | os.PathLike[str],
) -> Segments:
    """One annotation with its PNG; areas that are not listed are counted.

    Raises:
        LabelError: a segment of an unknown category, or with an area that is no number of pixels.
        ImageError: the PNG cannot be read, or lies outside the folder.
    """
    where = f"image {entry['image_id']!r} of {os.fspath(path)!r}"
    ids = read_segment_ids(folder / safe_name(entry["file_name"], where))
    items = []
    areas: dict[int, int] = {}
    if any(segment.get("area") is None for segment in entry["segments_info"]):
        found, counts = np.unique(ids.numpy(), return_counts=True)
        areas = dict(zip(found.tolist(), counts.tolist(), strict=True))
    for segment in entry["segments_info"]:
        if segment["category_id"] not in index:
            raise LabelError(
                f"{where} has segment {segment['id']} of the unknown category "
                f"{segment['category_id']}"
            )
        area = segment.get("area")
        if area is None:
            area = areas.get(segment["id"], 0)
        # Some tools write 300.0; 299.9 is no number of pixels, whatever rounding makes of it.
        if type(area) not in (int, float) or not 0 <= area < 1 << 53 or area != int(area):
            raise LabelError(
                f"{where} has segment {segment['id']} with the area {reprlib.repr(area)}; it must "
                "be a whole number of pixels"
            )
        items.append(
            Segment(
                id=segment["id"],
                label=index[segment["category_id"]],
                score=1.0,
                area=int(area),
                crowd=bool(segment.get("iscrowd", 0)),
            )
        )
    return Segments(ids, tuple(items))


def write_panoptic(
    path: str | os.PathLike[str],
    results: Iterable[tuple[str, Segments]],
    classes: Sequence[str],
    *,
    things: Collection[int],
    category_ids: Sequence[int] | None = None,
) -> Path:
    """Writes panoptic results in COCO's format, as panopticapi reads it.

    For ``panoptic_val.json`` the maps go to ``panoptic_val/<name>.png``, RGB with
    id = R + 256 G + 65536 B and 0 = void; the JSON comes last, so that it exists only when every
    map does. ``image_id`` is the name, as a number where it is one, as in COCO's own files.

    Args:
        path: target, ``.json``; its directory must exist.
        results: (name, segments) of every image; consumed one by one.
        classes: name of every class index that the segments use.
        things: the class indices that are countable objects.
        category_ids: COCO category of every class index; by default the index itself.

    Returns:
        ``path``.

    Raises:
        ImageError: a segment id is not in 1..2^24-1, is in the map and not in the list or the
            other way round, or a name occurs twice.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        raise ImageError(f"panoptic results are described in a .json file, got {str(path)!r}")
    ids = list(range(len(classes))) if category_ids is None else list(category_ids)
    if len(ids) != len(classes):
        raise ImageError(
            f"category_ids must name one category per class: {len(classes)}, got {len(ids)}"
        )
    folder = path.with_suffix("")
    annotations: dict[str, dict[str, Any]] = {}
    for name, segments in results:
        if name in annotations:
            raise ImageError(f"two panoptic results are named {name!r}; names must differ")
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        annotations[name] = {
            "image_id": int(name) if name.isdecimal() else name,
            "file_name": f"{name}.png",
            "segments_info": segments_info(file, segments, ids),
        }
    categories = [
        {"id": ids[k], "name": name, "isthing": int(k in things)} for k, name in enumerate(classes)
    ]
    images = [
        {"id": entry["image_id"], "file_name": entry["file_name"]} for entry in annotations.values()
    ]
    value = {"images": images, "annotations": [*annotations.values()], "categories": categories}
    return write_json(path, value)


def write_segments(path: str | os.PathLike[str], segments: Segments) -> Path:
    """Writes one panoptic map as ``path`` and its list as a JSON of the same name beside it.

    The PNG is COCO's, see `write_panoptic`; the list has COCO's fields, with the class index as
    ``category_id``.

    Raises:
        ImageError: as `write_panoptic`.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ImageError(f"panoptic maps are written as PNG, got {str(path)!r}")
    labels = [item.label for item in segments.items]
    info = segments_info(path, segments, range(max(labels, default=0) + 1))
    write_json(path.with_suffix(".json"), info)
    return path


def segments_info(path: Path, segments: Segments, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Writes one map and returns its ``segments_info``."""
    table = segments.map.detach().cpu().numpy().astype(np.int64)
    listed = [item.id for item in segments.items]
    found = [int(value) for value in np.unique(table) if value != 0]
    if sorted(listed) != found:
        raise ImageError(
            f"the segments of {path.name} do not fit their map: listed {listed[:8]}, "
            f"in the map {found[:8]}; every segment needs at least one pixel and "
            "every non-zero pixel a segment"
        )
    if found and not 0 < found[0] <= found[-1] < 1 << 24:
        raise ImageError(f"segment ids must be 1 to {(1 << 24) - 1}, got {found[0]} to {found[-1]}")
    info = []
    for item in segments.items:
        inside = table == item.id
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        left, top = int(columns[0]), int(rows[0])
        box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
        info.append(
            {
                "id": item.id,
                "category_id": ids[item.label],
                "area": int(inside.sum()),
                "bbox": box,  # x, y, width, height
                "iscrowd": int(item.crowd),
                "score": item.score,
            }
        )
    rgb = np.stack([table & 255, table >> 8 & 255, table >> 16], axis=-1).astype(np.uint8)
    save_image(path, Image.fromarray(rgb), format="PNG")
    return info


# --- as a source and a target of conversions --------------------------------------------------


def open_source(path: Path, given: Given) -> Source:
    """A panoptic JSON, whose PNGs are in the folder of its name, beside it, or where it is."""
    value = read_json(path, LabelError)
    entries = annotations_of(value, path)
    categories = sorted(categories_of(value, path), key=lambda entry: entry["id"])
    where = f"{str(path)!r}"
    classes, place = index_of([entry["name"] for entry in categories], given, where)
    index = {entry["id"]: place[entry["name"]] for entry in categories}
    things = frozenset(place[entry["name"]] for entry in categories if entry["isthing"])
    folder = path.with_suffix("")
    if not folder.is_dir():
        folder = path.parent
    images = value.get("images") if isinstance(value.get("images"), list) else []
    files = {
        image["id"]: image["file_name"]
        for image in images
        if isinstance(image, dict)
        and isinstance(image.get("id"), (int, str))
        and isinstance(image.get("file_name"), str)
    }
    sizes = {
        image["id"]: (image["height"], image["width"])
        for image in images
        if isinstance(image, dict)
        and isinstance(image.get("id"), (int, str))
        and type(image.get("height")) is int
        and type(image.get("width")) is int
    }
    found: dict[str, dict[str, Any]] = {}
    for number, entry in entries.items():
        name = stem_of(safe_name(entry["file_name"], f"{where}: image {number!r}"))
        name = name.removesuffix("_gtFine_panoptic")
        if name in found:
            raise LabelError(f"{where} has two annotations for image {name!r}; remove one")
        found[name] = entry

    def read(name: str) -> Annotation:
        entry = found[name]
        here = f"image {entry['image_id']!r} of {where}"
        segments = read_segments(entry, folder, index, path)
        scores = [segment.get("score", 1.0) for segment in entry["segments_info"]]
        check_json(scores, [float], f"the scores of {here}", LabelError)
        items = [
            replace(item, score=float(score))
            for item, score in zip(segments.items, scores, strict=True)
        ]
        segments = Segments(segments.map, tuple(items))
        height, width = segments.map.shape
        declared = sizes.get(entry["image_id"], (height, width))
        if declared != (height, width):
            raise ImageError(
                f"{here} is {declared[1]} x {declared[0]} pixels, its PNG {entry['file_name']!r} "
                f"{width} x {height}; they must be equal"
            )
        given.size_of(name, here, (height, width))
        listed = [item.id for item in segments.items]
        present = np.unique(segments.map.numpy()).tolist()
        if sorted(listed) != [value for value in present if value]:
            more = some([value for value in present if value and value not in listed])
            less = some(sorted(set(listed).difference(present)))
            raise LabelError(
                f"{here}: the segments do not fit the PNG: "
                + (f"{more} is not listed" if more else f"{less} is twice there or has no pixel")
                + "; fetch or export both again"
            )
        file = files.get(entry["image_id"])
        file = None if file is None else safe_name(file, here).rpartition("/")[2]
        return Annotation.of_segments(
            name, segments, things, file_name=given.image_name(name, file)
        )

    return Source(classes, tuple(found), read, things)


class Writer:
    """A JSON and, in the folder of its name, one PNG for each image."""

    images = None
    ending = ".png"

    def __init__(self, target: Path, source: Source) -> None:
        self.target, self.classes = target, source.classes
        self.things = source.things
        self.category_ids = list(range(1, len(self.classes) + 1))

    def numbers(self, annotation: Annotation) -> list[int]:
        """The id of each region's segment; equal ones become one segment."""
        merged: dict[int, int] = {}
        return [
            number if region.thing else merged.setdefault(region.label, number)
            for number, region in enumerate(annotation.regions, 1)
        ]

    def write(self, annotation: Annotation) -> Any:
        folder = self.target.with_suffix("")
        path = folder / f"{annotation.name}{self.ending}"
        make_folder(path.parent, "output")
        numbers = self.numbers(annotation)
        ids = np.array([0, *numbers], np.int64)[annotation.id_map()]
        if ids.max(initial=0) >= 1 << 24:
            raise ImageError(f"image {annotation.name!r} has more segments than 24 bits can number")
        info: list[dict[str, Any]] = []
        wanted = sorted(set(numbers))
        regions = {
            number: region for number, region in zip(numbers, annotation.regions, strict=True)
        }
        for number, (mask, left, top) in zip(wanted, cut_out(ids, wanted), strict=True):
            if not mask.size or not number:
                continue  # hidden by others, or void
            region = regions[number]
            info.append(
                {
                    "id": number,
                    "category_id": self.category_ids[region.label],
                    "area": int(mask.sum()),
                    "bbox": [left, top, mask.shape[1], mask.shape[0]],
                    "iscrowd": int(region.crowd),
                }
                | ({"score": region.score} if region.score < 1 else {})
            )
        rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
        save_image(path, Image.fromarray(rgb), format="PNG")
        return {
            "name": annotation.name,
            "file_name": full_file_name(annotation),
            "size": list(annotation.size),
            "segments_info": info,
        }

    def finish(self, entries: Iterable[Any]) -> None:
        images, annotations = [], []
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
            annotations.append(
                {
                    "image_id": number,
                    "file_name": f"{entry['name']}{self.ending}",
                    "segments_info": entry["segments_info"],
                }
            )
        categories = [
            {"id": self.category_ids[k], "name": name, "isthing": int(k in self.things)}
            for k, name in enumerate(self.classes)
        ]
        write_json(
            self.target, {"images": images, "annotations": annotations, "categories": categories}
        )
