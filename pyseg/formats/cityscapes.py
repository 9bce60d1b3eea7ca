"""Cityscapes: label ids, train ids, instance ids, and its panoptic format."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..classes import CITYSCAPES_CLASSES, CITYSCAPES_IDS, CITYSCAPES_PALETTE
from ..errors import ImageError, LabelError
from ..files import make_folder, some
from ..image import read_labels, save_image
from ..regions import VOID, Segments
from . import panoptic
from .annotation import (
    Annotation,
    Given,
    Region,
    Source,
    by_name,
    cut_out,
    files_below,
    image_size,
)


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


# --- folders of Cityscapes' PNGs ---------------------------------------------------------------

_OTHERS = {
    1: "ego vehicle",
    2: "rectification border",
    3: "out of roi",
    4: "static",
    5: "dynamic",
    6: "ground",
    9: "parking",
    10: "rail track",
    14: "guard rail",
    15: "bridge",
    16: "tunnel",
    18: "polegroup",
    29: "caravan",
    30: "trailer",
}
NAMES = _OTHERS | dict(zip(CITYSCAPES_IDS, CITYSCAPES_CLASSES, strict=True))
"""Name of every label id but 0, "unlabeled", which is void."""
FIRST_THING = 24  # label ids from here on are counted objects

KINDS = {
    "cityscapes-instanceids": "instanceIds",
    "cityscapes-labelids": "labelIds",
    "cityscapes-trainids": "labelTrainIds",
}


def _files(path: Path, kind: str) -> list[Path]:
    return files_below(path, f"*_{KINDS[kind]}.png") if path.is_dir() else []


def detect(path: Path, kind: str) -> str | None:
    files = _files(path, kind)
    return f"{len(files)} files *_{KINDS[kind]}.png" if files else None


def open_source(path: Path, given: Given, kind: str) -> Source:
    files = _files(path, kind)
    if not files:
        raise ImageError(f"{str(path)!r} holds no *_{KINDS[kind]}.png; give the folder that does")
    ending = files[0].stem.partition("_gtFine")[1] + f"_{KINDS[kind]}"
    found = {
        name.removesuffix("_gtFine").removesuffix("_gtCoarse"): file
        for name, file in by_name(path, files, f"_{KINDS[kind]}").items()
    }
    if len(found) < len(files):
        raise ImageError(
            f"{str(path)!r} has both fine and coarse labels; give one folder of {ending}"
        )
    train = kind == "cityscapes-trainids"
    known = dict(enumerate(CITYSCAPES_CLASSES)) if train else NAMES
    classes = given.classes or tuple(known[number] for number in sorted(known))
    place = {name: k for k, name in enumerate(classes)}
    index = {number: place[name] for number, name in known.items() if name in place}
    if strange := [name for name in classes if name not in known.values()]:
        raise LabelError(
            f"classes: {some(strange)} is none of Cityscapes' {len(known)}; leave it out"
        )
    # Ids that Cityscapes itself does not score may be void; others must be in a list that is given.
    ignored = {0, VOID} if not train else {VOID}
    ignored |= {
        k for k, name in known.items() if name not in place and name not in CITYSCAPES_CLASSES
    }
    things = frozenset(
        k for k, name in enumerate(classes) if not train and _id_of(name) >= FIRST_THING
    )

    def read(name: str) -> Annotation:
        file = found[name]
        where = f"label map {str(file)!r}"
        size = given.size_of(name, where, image_size(file))
        values = read_labels(file).numpy().astype(np.int64)
        regions = []
        ids = [int(value) for value in np.unique(values)]
        for value, (mask, left, top) in zip(ids, cut_out(values, ids), strict=True):
            number = value // 1000 if value >= 1000 and kind == "cityscapes-instanceids" else value
            if number in ignored:
                continue
            if number not in index:
                raise LabelError(
                    f"{where} holds {value}, "
                    + (
                        f"{known[number]!r}, which is not among the classes given; add it"
                        if number in known
                        else "no id of Cityscapes' "
                        + ("19 train ids, 0 to 18" if train else "labels, 0 to 33")
                        + "; is it of another data set?"
                    )
                )
            label = index[number]
            thing = value >= 1000 and kind == "cityscapes-instanceids"
            crowd = label in things and not thing and kind == "cityscapes-instanceids"
            regions.append(Region(label, mask, left, top, thing or crowd, crowd))
        return Annotation(name, size, tuple(regions), file_name=given.image_name(name))

    palette = CITYSCAPES_PALETTE if classes == CITYSCAPES_CLASSES else None
    if kind != "cityscapes-instanceids":
        things = frozenset()
    return Source(classes, tuple(found), read, things, palette=palette)


def _id_of(name: str) -> int:
    return next((number for number, known in NAMES.items() if known == name), 0)


def label_ids_of(classes: Sequence[str]) -> list[int]:
    """Cityscapes' label id of each class, by name; void is 0.

    Raises:
        LabelError: a class that Cityscapes has not.
    """
    known = {name: number for number, name in NAMES.items()} | {"unlabeled": 0}
    if strange := [name for name in classes if name not in known]:
        raise LabelError(
            f"Cityscapes has no class {some(map(repr, strange))}; rename it in the source, or "
            "choose another format"
        )
    return [known[name] for name in classes]


class Writer:
    """``NAME_gtFine_labelIds.png`` and its kin."""

    images = "images"

    def __init__(self, target: Path, source: Source, kind: str) -> None:
        self.target, self.kind = target, kind
        self.ids = label_ids_of(source.classes)
        self.train = [
            CITYSCAPES_IDS.index(number) if number in CITYSCAPES_IDS else VOID
            for number in self.ids
        ]

    def write(self, annotation: Annotation) -> Any:
        path = self.target / f"{annotation.name}_gtFine_{KINDS[self.kind]}.png"
        make_folder(path.parent, "output")
        fronts = annotation.id_map()
        if self.kind == "cityscapes-instanceids":
            values = self._instance_ids(annotation)
        elif self.kind == "cityscapes-labelids":
            values = [0, *(self.ids[region.label] for region in annotation.regions)]
        else:
            values = [VOID, *(self.train[region.label] for region in annotation.regions)]
        dtype = np.uint16 if self.kind == "cityscapes-instanceids" else np.uint8
        save_image(path, Image.fromarray(np.array(values, dtype)[fronts]), format="PNG")
        return None

    def _instance_ids(self, annotation: Annotation) -> list[int]:
        return [0, *instance_ids(annotation, self.ids)]

    def finish(self, entries: Iterable[Any]) -> None:
        pass


def instance_ids(annotation: Annotation, ids: Sequence[int]) -> list[int]:
    """The value of each region in an ``instanceIds`` map.

    Raises:
        ImageError: a class has more than 1000 objects.
    """
    values = []
    counted: dict[int, int] = {}
    for region in annotation.regions:
        number = ids[region.label]
        if number >= FIRST_THING and region.thing and not region.crowd:
            position = counted.get(number, 0)
            counted[number] = position + 1
            if position >= 1000:
                raise ImageError(
                    f"image {annotation.name!r} has more than 1000 {NAMES[number]!r}, too many for "
                    "Cityscapes ids; choose another format"
                )
            number = 1000 * number + position
        values.append(number)
    return values


class PanopticWriter(panoptic.Writer):
    """Cityscapes' panoptic format: COCO's, with label ids as categories and instance ids as ids."""

    ending = "_gtFine_panoptic.png"

    def __init__(self, target: Path, source: Source) -> None:
        super().__init__(target, source)
        self.category_ids = label_ids_of(source.classes)
        self.things = frozenset(k for k, n in enumerate(self.category_ids) if n >= FIRST_THING)

    def numbers(self, annotation: Annotation) -> list[int]:
        return instance_ids(annotation, self.category_ids)


__all__ = ["NAMES", "Writer", "detect", "label_ids_of", "open_source", "write_cityscapes_ids"]
