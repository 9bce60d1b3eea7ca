"""What all formats are read to and written from: the regions of one image, and class names."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import classes as class_lists
from ..errors import ImageError, LabelError
from ..files import IMAGE_SUFFIXES, check_json, read_json, some
from ..image import check_pixels
from ..regions import Instances, Segment, Segments

BACKGROUND = ("background", "_background_", "__background__")
"""Names of the class of everything else: no polygon is made of it, and in VOC it is 0."""


@dataclass(frozen=True, eq=False)
class Region:
    """One object, or the area of one class, as a mask cut out to its box."""

    label: int  # class index
    mask: np.ndarray  # [h, w] bool
    left: int = 0  # of the mask's first column, in pixels of the image
    top: int = 0
    thing: bool = True  # an object by itself; else all of a class that is not counted
    crowd: bool = False  # several objects that were not told apart
    score: float = 1.0
    polygons: tuple[np.ndarray, ...] = ()  # [N, 2] each, as drawn by hand: see `Annotation.rule`

    @classmethod
    def cut(cls, label: int, mask: np.ndarray, **more: Any) -> Region:
        """From a mask of the whole image, [H, W] bool; one without a pixel becomes [0, 0]."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not rows.size:
            return cls(label, np.zeros((0, 0), bool), **more)
        top, left = int(rows[0]), int(columns[0])
        part = mask[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1]
        return cls(label, np.array(part, bool), left, top, **more)

    def full(self, size: tuple[int, int]) -> np.ndarray:
        """The mask of the whole image, [H, W] bool."""
        mask = np.zeros(size, bool)
        height, width = self.mask.shape
        mask[self.top : self.top + height, self.left : self.left + width] = self.mask
        return mask

    @property
    def area(self) -> int:
        return int(np.count_nonzero(self.mask))

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom, the latter two exclusive."""
        height, width = self.mask.shape
        return self.left, self.top, self.left + width, self.top + height


@dataclass(frozen=True)
class Placement:
    """Where the pixels of an image lie on the earth or in a plan."""

    transform: tuple[
        float, float, float, float, float, float
    ]  # x = a c + b r + c, y = d c + e r + f
    crs: str | None = None  # such as "EPSG:32633"


@dataclass(frozen=True, eq=False)
class Annotation:
    """All regions of one image. Regions may overlap; a later one is in front of an earlier one."""

    name: str  # of the image without suffix, with "/" where it lies in a folder
    size: tuple[int, int]  # (H, W)
    regions: tuple[Region, ...]
    file_name: str | None = None  # of the image, where the source tells
    placement: Placement | None = None
    rule: str = ""  # by which `Region.polygons` were filled: "coco", "area", "pillow" or "opencv"

    def id_map(self) -> np.ndarray:
        """Number of the front region of each pixel, counted from 1, [H, W] int32; 0 = none."""
        ids = np.zeros(self.size, np.int32)
        for number, region in enumerate(self.regions, 1):
            left, top, right, bottom = region.box
            ids[top:bottom, left:right][region.mask] = number
        return ids

    def label_map(self, void: int) -> np.ndarray:
        """Class of each pixel, [H, W] int32; ``void`` where there is no region."""
        table = np.array([void, *(region.label for region in self.regions)], np.int32)
        labels: np.ndarray = table[self.id_map()]
        return labels

    def segments(self) -> Segments:
        """As a panoptic result, in which the front region alone has a pixel."""
        ids = self.id_map()
        counts = np.bincount(ids.ravel(), minlength=len(self.regions) + 1).tolist()
        items = [
            Segment(number, region.label, region.score, counts[number], region.crowd)
            for number, region in enumerate(self.regions, 1)
            if counts[number]
        ]
        return Segments(torch.from_numpy(ids), tuple(items))

    def instances(self) -> Instances:
        """The things, with their overlaps."""
        things = [region for region in self.regions if region.thing]
        masks = np.zeros((len(things), *self.size), bool)
        for mask, region in zip(masks, things, strict=True):
            left, top, right, bottom = region.box
            mask[top:bottom, left:right] = region.mask
        return Instances(
            torch.tensor([region.box for region in things], dtype=torch.float32).reshape(-1, 4),
            torch.from_numpy(masks),
            torch.tensor([region.score for region in things], dtype=torch.float32),
            torch.tensor([region.label for region in things], dtype=torch.int64),
            torch.tensor([region.crowd for region in things], dtype=torch.bool),
        )

    @classmethod
    def of_segments(
        cls, name: str, segments: Segments, things: Collection[int], **more: Any
    ) -> Annotation:
        """From a panoptic result; ``things`` are the classes whose segments are objects."""
        ids = segments.map.detach().cpu().numpy()
        regions = []
        for item, (mask, left, top) in zip(
            segments.items, cut_out(ids, [item.id for item in segments.items]), strict=True
        ):
            thing = item.label in things
            regions.append(Region(item.label, mask, left, top, thing, item.crowd, item.score))
        return cls(name, (ids.shape[0], ids.shape[1]), tuple(regions), **more)

    @classmethod
    def of_instances(cls, name: str, instances: Instances, **more: Any) -> Annotation:
        """From instances; the most certain is in front."""
        masks = instances.masks.detach().cpu().numpy()
        crowd = instances.crowd
        regions = tuple(
            Region.cut(
                int(instances.labels[k]),
                masks[k],
                score=float(instances.scores[k]),
                crowd=bool(crowd[k]) if crowd is not None else False,
            )
            for k in instances.scores.argsort(stable=True).tolist()
        )
        return cls(name, (masks.shape[1], masks.shape[2]), regions, **more)

    @classmethod
    def of_labels(
        cls, name: str, labels: np.ndarray | Tensor, num_classes: int, **more: Any
    ) -> Annotation:
        """From a label map, [H, W]: one area for each class; other values are void."""
        table = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels).astype(np.int64)
        table = np.where((table >= 0) & (table < num_classes), table + 1, 0)
        found = [int(value) for value in np.unique(table) if value]
        regions = [
            Region(value - 1, mask, left, top, thing=False)
            for value, (mask, left, top) in zip(found, cut_out(table, found), strict=True)
        ]
        return cls(name, (table.shape[0], table.shape[1]), tuple(regions), **more)


def cut_out(ids: np.ndarray, wanted: Sequence[int]) -> Iterator[tuple[np.ndarray, int, int]]:
    """Mask, left and top of each of ``wanted`` in a map; in time for large maps of many ids."""
    from scipy import ndimage

    values, dense = np.unique(ids, return_inverse=True)
    dense = dense.reshape(ids.shape)
    boxes = ndimage.find_objects(dense + 1)
    place = {int(value): index for index, value in enumerate(values)}
    for value in wanted:
        index = place.get(value)
        if index is None:
            yield np.zeros((0, 0), bool), 0, 0
        else:
            rows, columns = boxes[index]
            yield dense[rows, columns] == index, int(columns.start), int(rows.start)


# --- where it comes from ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Source:
    """A set of annotations on disk, opened: its classes and images are known, no mask is made."""

    classes: tuple[str, ...]
    names: tuple[str, ...]
    read: Callable[[str], Annotation] = field(repr=False)
    things: frozenset[int] = frozenset()  # classes whose regions are objects
    notes: tuple[str, ...] = ()  # what a user should know of how it was read
    palette: tuple[tuple[int, int, int], ...] | None = None


class Images:
    """The images that belong to annotations: their sizes, which some formats leave out.

    Args:
        folder: searched with all below it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ImageError(f"images: there is no folder {str(self.folder)!r}; check the path")
        self._by_name: dict[str, list[Path]] = {}
        for path in sorted(self.folder.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
                inside = path.relative_to(self.folder).with_suffix("").as_posix()
                for key in {inside, path.stem}:
                    self._by_name.setdefault(key, []).append(path)

    def find(self, name: str) -> Path | None:
        """The image of a name, with or without suffix, by its place or by its stem alone.

        Raises:
            ImageError: several fit.
        """
        for key in (name, name.rpartition("/")[2]):
            found = self._by_name.get(key) or self._by_name.get(
                str(PurePosixPath(key).with_suffix(""))
            )
            if found:
                if len(found) > 1:
                    raise ImageError(
                        f"several images are called {key!r}: {some(found)}; rename one, or give "
                        "the folder that holds one of them"
                    )
                return found[0]
        return None


def image_size(path: Path) -> tuple[int, int]:
    """Height and width as shown, from the file's header alone.

    Raises:
        ImageError: it is no image, or larger than `pyseg.image.MAX_PIXELS`.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ImageError(
            f"image {str(path)!r} cannot be read ({reason}); fetch or export it again"
        ) from error
    check_pixels(height, width, f"image {str(path)!r}")
    return (width, height) if turned else (height, width)


@dataclass(frozen=True)
class Given:
    """What a user says about a source."""

    classes: tuple[str, ...] | None = None
    images: Images | None = None
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # (H, W) by name

    def size_of(self, name: str, where: str, declared: tuple[int, int] | None) -> tuple[int, int]:
        """Height and width of an image, from its annotation, the image, or both if they agree.

        Raises:
            ImageError: they disagree, neither is known, or it is too large or empty.
        """
        path = self.images.find(name) if self.images else None
        if path is None:
            declared = declared or self.sizes.get(name)
            if declared is None:
                raise ImageError(
                    f"{where} does not say how large image {name!r} is, and "
                    + (
                        "it is not in the folder of images"
                        if self.images
                        else "no images are known"
                    )
                    + "; give the folder that has it, images=FOLDER"
                )
            return checked_size(declared, where)
        found = image_size(path)
        if declared is not None and declared != found:
            raise ImageError(
                f"{where} is for an image of {declared[1]} x {declared[0]} pixels, but "
                f"{str(path)!r} has {found[1]} x {found[0]}; give the images that were annotated"
            )
        return found

    def image_name(self, name: str, file_name: str | None = None) -> str | None:
        """The file name of an image with its suffix, if it is known."""
        path = self.images.find(name) if self.images else None
        return path.name if path else file_name


def checked_size(size: tuple[int, int], where: str) -> tuple[int, int]:
    """A height and width from a file, refused where no image has them."""
    height, width = size
    if height < 1 or width < 1:
        raise ImageError(f"{where} has an image of {width} x {height} pixels; mend its size")
    check_pixels(height, width, where)
    return size


_DRIVE = re.compile(r"^[A-Za-z]:")


def safe_name(value: str, where: str) -> str:
    """The name of an image in a stranger's file, as a relative path that stays in its folder.

    Raises:
        ImageError: it is absolute, has "..", or is no name at all.
    """
    text = value.replace("\\", "/")
    pieces = text.split("/")
    bad = (
        not text
        or text.startswith("/")
        or _DRIVE.match(text)
        or any(piece in ("", ".", "..") for piece in pieces)
        or any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in text)
        or max(len(piece.encode("utf-8", "replace")) for piece in pieces) > 200
    )
    if bad:
        raise ImageError(
            f"{where}: {value[:80]!r} is no name of a file within a folder; names must be "
            "relative, without '..'"
        )
    return text


def stem_of(name: str) -> str:
    """A name without the suffix of an image; other dots stay."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in IMAGE_SUFFIXES else name


def full_file_name(annotation: Annotation) -> str:
    """The image of an annotation with its folder; without suffix where that is not known."""
    folder, _, own = annotation.name.rpartition("/")
    file = annotation.file_name or own
    return f"{folder}/{file}" if folder else file


def files_below(root: Path, *patterns: str) -> list[Path]:
    """Files of these patterns below a folder, sorted; hidden ones are left out."""
    found = {
        path
        for pattern in patterns
        for path in root.rglob(pattern)
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(root).parts)
    }
    return sorted(found)


def by_name(root: Path, files: Sequence[Path], ending: str = "") -> dict[str, Path]:
    """Files by the name of their image: the path below ``root`` without suffix and ``ending``.

    Raises:
        ImageError: two have one name.
    """
    found: dict[str, Path] = {}
    for path in files:
        name = path.relative_to(root).with_suffix("").as_posix().removesuffix(ending)
        if name in found:
            raise ImageError(
                f"{str(found[name])!r} and {str(path)!r} are both for image {name!r}; remove one"
            )
        found[name] = path
    return found


# --- classes ---------------------------------------------------------------------------------


def class_names(given: str | os.PathLike[str] | Sequence[str]) -> tuple[str, ...]:
    """Names of classes in the order of their ids.

    Args:
        given: names; a file of them, ``.txt`` with one a line, ``.json`` with a list of names or of
            objects with a name (perhaps under ``"classes"`` or ``"categories"``), or YOLO's
            ``data.yaml``; the name of a known list, such as ``"cityscapes"``; or names with commas.

    Raises:
        LabelError: it is none of these, or a name is there twice.
    """
    where = "classes"
    if isinstance(given, (str, os.PathLike)):
        text = os.fspath(given)
        path = Path(text)
        known = getattr(class_lists, f"{text.upper()}_CLASSES", None)
        where = f"the classes of {text!r}"
        if known is not None:
            names = tuple(known)
        elif path.is_file():
            names = _names_in(path)
        elif "," in text:
            names = tuple(piece.strip() for piece in text.split(","))
            where = "classes"
        else:
            lists = [
                n.removesuffix("_CLASSES").lower() for n in dir(class_lists) if "_CLASSES" in n
            ]
            raise LabelError(
                f"classes: {text!r} is no file, no list of names with commas, and none of the "
                f"known lists ({', '.join(lists)})"
            )
    else:
        names = tuple(given)
    return checked_classes(names, where)


def checked_classes(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Names that are there once each and can be written anywhere."""
    seen = set()
    for name in names:
        if not isinstance(name, str) or not name.strip() or "\n" in name or "\0" in name:
            raise LabelError(f"{where}: {name!r} is no name of a class; give a text of one line")
        if name in seen:
            raise LabelError(f"{where}: {name!r} is there twice; names must differ")
        seen.add(name)
    if not seen:
        raise LabelError(f"{where}: there is no class; give their names, classes=NAMES")
    if len(seen) > 65534:
        raise LabelError(f"{where}: {len(seen)} classes are more than any format holds")
    return tuple(names)


def _names_in(path: Path) -> tuple[str, ...]:
    where = f"the classes of {str(path)!r}"
    if path.suffix.lower() in (".yaml", ".yml"):
        return names_of_yaml(path)
    if path.suffix.lower() == ".json":
        value = read_json(path, LabelError)
        for key in ("classes", "categories"):
            if isinstance(value, dict) and key in value:
                value = value[key]
        check_json(value, [(str, dict)], where, LabelError)
        entries = [item if isinstance(item, dict) else {"name": item} for item in value]
        check_json(entries, [{"name": str}], where, LabelError)
        return tuple(entry["name"] for entry in entries)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LabelError(
            f"{where} cannot be read as text ({error}); give a .txt or .json"
        ) from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def names_of_yaml(path: Path) -> tuple[str, ...]:
    """The names in YOLO's ``data.yaml``: a list, or a mapping from 0, 1, 2, ….

    Raises:
        LabelError: it cannot be read, or its names are not such.
    """
    import yaml

    where = f"the description {str(path)!r}"
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, RecursionError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise LabelError(
            f"{where} cannot be read as YAML ({reason}); mend or replace it"
        ) from error
    names = value.get("names") if isinstance(value, dict) else None
    if isinstance(names, dict):
        if sorted(names, key=repr) != sorted(range(len(names)), key=repr):
            raise LabelError(f"{where}: names must be numbered 0, 1, 2, …, got {some(names)}")
        names = [names[k] for k in range(len(names))]
    if not isinstance(names, list) or not names:
        raise LabelError(f"{where} has no names; add 'names: [person, car]'")
    for name in names:
        # A list in it may hold itself many times over: it is not written out.
        if not isinstance(name, (str, int, float, bool, datetime.date)):
            raise LabelError(f"{where}: a name must be a text, got a {type(name).__name__}")
    # What YAML takes for a number, a date or a truth value was meant as a name.
    return checked_classes([str(name) for name in names], where)


def index_of(
    found: Sequence[str], given: Given, where: str
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The class list in force, and the index of each name that a source uses.

    Args:
        found: names in the source, in its order.
        given: the user's list goes first, and must have them all.
        where: begins the message.

    Raises:
        LabelError: a name that the user's list has not.
    """
    names = given.classes or checked_classes(found, where)
    index = {name: k for k, name in enumerate(names)}
    if unknown := [name for name in found if name not in index]:
        raise LabelError(
            f"{where} has the class {some(map(repr, unknown))}, not among the {len(names)} given; "
            "give them all, classes=NAMES, or none"
        )
    return names, index


def lookup(index: Mapping[str, int], name: str, where: str) -> int:
    """The index of a class that may be unknown."""
    if name not in index:
        raise LabelError(f"{where}: the class {name!r} is unknown; give it too, classes=NAMES")
    return index[name]
