"""COCO's panoptic format, read: a JSON of categories and annotations, and PNGs of segment ids."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import LabelError
from .image import read_segment_ids
from .types import Segment, Segments


def categories_of(value: Any, path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The entries of a list of categories, or of a JSON that has one; ``path`` is for messages."""
    entries = value.get("categories") if isinstance(value, dict) else value
    if not isinstance(entries, list) or not entries:
        raise LabelError(
            f"{os.fspath(path)!r} has no categories; give a JSON that has them (--categories)"
        )
    for key in ("id", "name", "isthing"):
        if not all(isinstance(entry, dict) and key in entry for entry in entries):
            raise LabelError(
                f"{os.fspath(path)!r} has a category without {key!r}; it needs id, name and isthing"
            )
        values = [entry[key] for entry in entries]
        if key != "isthing" and len(set(values)) < len(values):
            raise LabelError(f"{os.fspath(path)!r} has two categories with the same {key}")
    return entries


def annotations_of(value: Any, path: str | os.PathLike[str]) -> dict[Any, dict[str, Any]]:
    """The entries of a JSON by image."""
    entries = value.get("annotations") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        raise LabelError(
            f"{os.fspath(path)!r} has no list of annotations: it is not in COCO's panoptic format"
        )
    result = {}
    for position, entry in enumerate(entries):
        for key in ("image_id", "file_name", "segments_info"):
            if key not in entry:
                raise LabelError(
                    f"annotation {position} of {os.fspath(path)!r} has no {key!r}: it "
                    "is not in COCO's panoptic format"
                )
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
    """One annotation with its PNG; areas that are not listed are counted."""
    ids = read_segment_ids(folder / entry["file_name"])
    items = []
    areas: dict[int, int] = {}
    if any(segment.get("area") is None for segment in entry["segments_info"]):
        found, counts = np.unique(ids.numpy(), return_counts=True)
        areas = dict(zip(found.tolist(), counts.tolist(), strict=True))
    for segment in entry["segments_info"]:
        where = f"image {entry['image_id']!r} of {os.fspath(path)!r}"
        if "id" not in segment or "category_id" not in segment:
            raise LabelError(f"{where} has a segment without 'id' or 'category_id'")
        if segment["category_id"] not in index:
            raise LabelError(
                f"{where} has segment {segment['id']} of the unknown category "
                f"{segment['category_id']}"
            )
        area = segment.get("area")
        if area is None:
            area = areas.get(segment["id"], 0)
        items.append(
            Segment(
                id=segment["id"],
                label=index[segment["category_id"]],
                score=1.0,
                area=area,
                crowd=bool(segment.get("iscrowd", 0)),
            )
        )
    return Segments(ids, tuple(items))
