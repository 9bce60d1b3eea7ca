"""Formats of others, read and written: COCO's panoptic format, RLE and results, Cityscapes ids."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .classes import CITYSCAPES_IDS
from .errors import ImageError, LabelError
from .files import check_json, write_json
from .image import check_pixels, open_image, save_image
from .regions import Instances, Segment, Segments

# --- run-length masks -------------------------------------------------------------------------


def encode_rle(mask: Tensor | np.ndarray) -> dict[str, Any]:
    """A binary mask as a COCO run-length dict, equal to what pycocotools writes.

    Args:
        mask: [H, W] bool, or integers where anything but 0 is inside.

    Returns:
        ``{"size": [H, W], "counts": str}``: lengths of alternating runs of 0 and 1 in column-major
        order, from the fourth on as difference to the one two before, in base 32 with 6 bits per
        character (cocoapi, ``maskApi.c``).
    """
    values = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if values.ndim != 2:
        raise ImageError(f"a mask must be [H, W], got shape {list(values.shape)}")
    flat = (values != 0).ravel(order="F")
    borders = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first = [0] if flat.size and flat[0] else []  # the first run is of zeros, if need be of none
    edges = np.concatenate([[0], first, borders, [flat.size]]).astype(np.int64)
    return {
        "size": [int(side) for side in values.shape],
        "counts": _text_of_runs(edges[1:] - edges[:-1]),
    }


def _text_of_runs(runs: np.ndarray) -> str:
    numbers = runs.copy()
    numbers[3:] -= runs[1:-2]
    digits = numbers[:, None] >> np.arange(0, 35, 5)  # [runs, 7], lowest first
    rest = digits >> 5
    digits &= 31
    # The last digit is the first whose highest bit alone says the sign of all that follows.
    done = rest == np.where(digits & 16, -1, 0)
    last = done.argmax(1)
    column = np.arange(7)
    digits |= np.where(column < last[:, None], 32, 0)
    return (digits[column <= last[:, None]] + 48).astype(np.uint8).tobytes().decode("ascii")


def decode_rle(rle: Mapping[str, Any]) -> Tensor:
    """A COCO run-length dict to its mask, [H, W] bool.

    Args:
        rle: ``size`` [H, W] and ``counts``, compressed (str or bytes) or a list of run lengths.

    Raises:
        ImageError: it is no such dict, the runs do not add up to H x W, or that is more than
            `pyseg.image.MAX_PIXELS`.
    """
    height, width, runs = _runs(rle)
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return torch.from_numpy(np.ascontiguousarray(flat.reshape(width, height).T))


def compressed_rle(rle: Mapping[str, Any]) -> dict[str, Any]:
    """The same mask with its runs as text, which is what pycocotools and its kin take for results.

    Raises:
        ImageError: as `decode_rle`.
    """
    height, width, runs = _runs(rle)
    counts = rle["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    return {
        "size": [height, width],
        "counts": counts if isinstance(counts, str) else _text_of_runs(runs),
    }


def _runs(rle: Mapping[str, Any]) -> tuple[int, int, np.ndarray]:
    """Height, width and checked run lengths of a run-length dict; no pixel is made."""
    if not isinstance(rle, Mapping) or "size" not in rle or "counts" not in rle:
        raise ImageError(
            f"an RLE mask must be a dict with 'size' and 'counts', got {reprlib.repr(rle)}"
        )
    size, counts = rle["size"], rle["counts"]
    if (
        not isinstance(size, (list, tuple))
        or len(size) != 2
        or not all(_is_integer(side) and side >= 0 for side in size)
    ):
        raise ImageError(f"the size of an RLE mask must be [H, W], got {reprlib.repr(size)}")
    height, width = (int(side) for side in size)
    pixels = height * width
    check_pixels(height, width, "the RLE mask")
    if isinstance(counts, (str, bytes)):
        try:
            codes = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8)
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can hold
            raise ImageError("the counts of the RLE mask are damaged: they are no ASCII") from error
        runs = _decode_counts(codes.astype(np.int64) - 48, pixels)
    elif isinstance(counts, (list, tuple)) and all(map(_is_integer, counts)):
        # As Python's integers first: those of a damaged file need not fit into 64 bits.
        if any(not 0 <= run <= pixels for run in counts):
            wrong = next(run for run in counts if not 0 <= run <= pixels)
            raise ImageError(
                f"the RLE mask of {height} x {width} pixels has a run of {reprlib.repr(wrong)}; "
                "it is damaged"
            )
        runs = np.array(counts, dtype=np.int64)
    else:
        raise ImageError(
            "the counts of an RLE mask must be a text or a list of integers, got "
            f"{reprlib.repr(counts)}"
        )
    # No sum wraps: no run is above `pixels`, which MAX_PIXELS bounds.
    if (runs < 0).any() or (runs > pixels).any() or int(runs.sum()) != pixels:
        raise ImageError(
            f"the runs of the RLE mask add up to {int(runs.sum())} pixels, its size "
            f"{height} x {width} needs {pixels}; it is damaged"
        )
    return height, width, runs


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _decode_counts(codes: np.ndarray, pixels: int) -> np.ndarray:
    """Characters of a compressed RLE, less 48, to run lengths, not all of which need be sane."""
    last = (codes & 32) == 0
    if not codes.size:
        return codes
    if not last[-1] or codes.min() < 0 or codes.max() > 63:
        raise ImageError(
            "the counts of the RLE mask are damaged: they end within a number or hold "
            "a character outside '0'..'o'"
        )
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    lengths = np.diff(np.append(starts, codes.size))
    if lengths.max() > 12:  # 60 bits
        raise ImageError("the counts of the RLE mask are damaged: a number has 13 digits or more")
    place = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((codes & 31) << place, starts)
    negative = (codes[last] & 16) != 0
    numbers -= np.where(negative, np.int64(1) << (5 * lengths), 0)
    if np.abs(numbers).max() > pixels:  # differences of runs are within it, and then no sum wraps
        raise ImageError(
            f"the counts of the RLE mask are damaged: a run of {pixels} pixels at most has the "
            f"number {numbers[np.abs(numbers).argmax()]}"
        )
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


# --- panoptic maps ----------------------------------------------------------------------------


def read_segment_ids(path: str | os.PathLike[str]) -> Tensor:
    """The segment ids of a panoptic PNG in COCO's format: R + 256 G + 65536 B, 0 = void.

    Args:
        path: an RGB PNG.

    Returns:
        [H, W] int32.

    Raises:
        ImageError: the file cannot be read (see `read_image`), or is not a lossless RGB image.
    """
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
        raise LabelError(
            f"{os.fspath(path)!r} has no categories; give a JSON that has them (--categories)"
        )
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
        ImageError: the PNG cannot be read.
    """
    ids = read_segment_ids(folder / entry["file_name"])
    where = f"image {entry['image_id']!r} of {os.fspath(path)!r}"
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
            "segments_info": _write_segments(file, segments, ids),
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
    info = _write_segments(path, segments, range(max(labels, default=0) + 1))
    write_json(path.with_suffix(".json"), info)
    return path


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


def write_uncertainty(path: str | os.PathLike[str], values: Tensor) -> Path:
    """Writes a model's uncertainty as a PNG of 16-bit grey, 65535 being 1.

    Args:
        path: target, ``.png``; its directory must exist.
        values: [H, W] in 0..1.

    Raises:
        ImageError: the path is no ``.png``.
        ValueError: values of another shape or outside 0..1.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ImageError(f"uncertainty is written as PNG, got {str(path)!r}")
    plane = values.detach().cpu().double()
    if plane.ndim != 2 or plane.numel() == 0 or not bool(((plane >= 0) & (plane <= 1)).all()):
        raise ValueError(
            f"uncertainty must be [H, W] in 0..1 to be written, got {list(plane.shape)}"
            + (f" from {float(plane.min())} to {float(plane.max())}" if plane.numel() else "")
        )
    grey = (plane * 65535).round().numpy().astype(np.uint16)
    return save_image(path, Image.fromarray(grey), format="PNG")


def read_uncertainty(path: str | os.PathLike[str]) -> Tensor:
    """Reads what `write_uncertainty` wrote: [H, W] float32 in 0..1, to 1 part in 131070.

    Raises:
        ImageError: the file is no PNG of 16-bit grey.
    """
    with open_image(path, "uncertainty") as picture:
        if picture.mode not in ("I;16", "I"):
            raise ImageError(
                f"uncertainty {str(path)!r} must be a PNG of 16-bit grey, it has mode "
                f"{picture.mode}"
            )
        grey = np.asarray(picture).astype(np.float32)
    return torch.from_numpy(grey / 65535)


def write_cityscapes_ids(
    path: str | os.PathLike[str],
    segments: Segments,
    *,
    things: Collection[int],
    label_ids: Sequence[int] | None = None,
) -> Path:
    """Writes a panoptic map as Cityscapes' ``instanceIds``: a PNG of 16-bit grey.

    A pixel of a stuff class or of a crowd has its label id, one of the n-th segment of a thing
    class the label id times 1000 plus n, counted from 0; void is 0, Cityscapes' "unlabeled".

    Args:
        path: target, ``.png``; its directory must exist.
        segments: at most 1000 of a thing class.
        things: the class indices that are countable objects.
        label_ids: Cityscapes' label id of every class index; None = those of its 19 train ids.

    Returns:
        ``path``.

    Raises:
        ImageError: a class without a label id, a label id out of 1..64, or too many segments.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ImageError(f"Cityscapes ids are written as PNG, got {str(path)!r}")
    ids = CITYSCAPES_IDS if label_ids is None else tuple(label_ids)
    if not all(0 < number <= 64 for number in ids):
        raise ImageError(f"label_ids must be 1 to 64, which 16 bits leave room for, got {ids}")
    map = segments.map.detach().cpu().numpy()
    table = np.zeros(map.shape, np.uint16)
    counted: dict[int, int] = {}
    for item in segments.items:
        if not 0 <= item.label < len(ids):
            raise ImageError(
                f"segment {item.id} has class {item.label}, but there are label_ids "
                f"for {len(ids)} classes"
            )
        value = ids[item.label]
        if item.label in things and not item.crowd:
            number = counted.get(item.label, 0)
            counted[item.label] = number + 1
            if number >= 1000:
                raise ImageError(
                    f"class {item.label} has more than 1000 segments, too many for Cityscapes ids"
                )
            value = 1000 * value + number
        table[map == item.id] = value
    return save_image(path, Image.fromarray(table), format="PNG")


def _write_segments(path: Path, segments: Segments, ids: Sequence[int]) -> list[dict[str, Any]]:
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


__all__ = [
    "decode_rle",
    "encode_rle",
    "read_segment_ids",
    "write_cityscapes_ids",
    "write_instances",
    "write_panoptic",
    "write_segments",
]
