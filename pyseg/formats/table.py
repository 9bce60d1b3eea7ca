"""The formats that `pyseg convert` knows, what each can hold, and which one a path is of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import ImageError, LabelError, PysegError, UnknownName
from ..files import read_json, some
from . import cityscapes, coco, cvat, geojson, indexed, labelme, panoptic, voc, yolo
from .annotation import Annotation, Given, Source, files_below
from .xml_files import read_xml


class Writer(Protocol):
    """Writes one format. What `write` returns for each image, `finish` is given for all."""

    def write(self, annotation: Annotation) -> Any:
        """Writes the files of one image, whole or not at all; the result must be fit for JSON."""
        ...

    def finish(self, entries: Iterable[Any]) -> None:
        """Writes what belongs to all images."""
        ...


@dataclass(frozen=True)
class Format:
    """A format by name."""

    name: str
    title: str
    open_source: Callable[[Path, Given], Source] = field(repr=False)
    writer: Callable[[Path, Source], Writer] | None = field(repr=False)
    suffix: str  # of the one file that it is; "" = a folder
    holds: frozenset[str]  # of "objects", "overlaps", "crowds", "scores"
    images: str | None = None  # the folder of the images within it, where tools want them there

    def __post_init__(self) -> None:
        assert self.holds <= {"objects", "overlaps", "crowds", "scores"}


def _cityscapes(name: str, title: str, *holds: str) -> Format:
    return Format(
        name,
        title,
        functools.partial(cityscapes.open_source, kind=name),
        functools.partial(cityscapes.Writer, kind=name),
        "",
        frozenset(holds),
    )


_ALL = (
    Format(
        "indexed",
        "indexed PNGs",
        indexed.open_source,
        indexed.Writer,
        "",
        frozenset(),
        images="images",
    ),
    _cityscapes("cityscapes-labelids", "Cityscapes' label ids"),
    _cityscapes("cityscapes-trainids", "Cityscapes' train ids"),
    _cityscapes("cityscapes-instanceids", "Cityscapes' instance ids", "objects", "crowds"),
    Format(
        "cityscapes-panoptic",
        "Cityscapes' panoptic format",
        panoptic.open_source,
        cityscapes.PanopticWriter,
        ".json",
        frozenset({"objects", "crowds", "scores"}),
    ),
    Format(
        "coco-panoptic",
        "COCO's panoptic format",
        panoptic.open_source,
        panoptic.Writer,
        ".json",
        frozenset({"objects", "crowds", "scores"}),
    ),
    Format(
        "coco",
        "COCO's instances",
        coco.open_source,
        coco.Writer,
        ".json",
        frozenset({"objects", "overlaps", "crowds", "scores"}),
    ),
    Format(
        "coco-rle",
        "COCO's instances, all as RLE",
        coco.open_source,
        functools.partial(coco.Writer, rle=True),
        ".json",
        frozenset({"objects", "overlaps", "crowds", "scores"}),
    ),
    Format(
        "coco-results",
        "COCO's results",
        coco.open_results,
        None,
        ".json",
        frozenset({"objects", "overlaps", "scores"}),
    ),
    Format(
        "yolo",
        "YOLO's segmentation labels",
        yolo.open_source,
        yolo.Writer,
        "",
        frozenset({"objects", "overlaps"}),
        images="images",
    ),
    Format(
        "labelme",
        "labelme's JSON",
        labelme.open_source,
        labelme.Writer,
        "",
        frozenset({"objects", "overlaps"}),
        images="",
    ),
    Format(
        "voc",
        "Pascal VOC",
        voc.open_source,
        voc.Writer,
        "",
        frozenset({"objects"}),
        images="JPEGImages",
    ),
    Format(
        "cvat",
        "CVAT's XML for images",
        cvat.open_source,
        cvat.Writer,
        ".xml",
        frozenset({"objects", "overlaps"}),
    ),
    Format(
        "geojson",
        "GeoJSON",
        geojson.open_source,
        geojson.Writer,
        "",
        frozenset({"objects", "overlaps", "crowds", "scores"}),
    ),
)
FORMATS: dict[str, Format] = {entry.name: entry for entry in _ALL}


def find_format(name: str, *, writable: bool = False) -> Format:
    """A format by name.

    Raises:
        UnknownName: there is none, or it is only read.
    """
    known = [entry.name for entry in _ALL if entry.writer is not None or not writable]
    if name not in known:
        only = "; it is only read" if name in FORMATS else ""
        raise UnknownName(f"no format is called {name!r}{only}; there are {', '.join(known)}")
    return FORMATS[name]


def detect(path: Path) -> tuple[Format, Path, str]:
    """The format of a file or folder: by its content, not by its name alone.

    Returns:
        The format, the file or folder to open (in a folder with one JSON or XML, that), and what
        was recognised.

    Raises:
        PysegError: nothing is there, or it is of no known format.
    """
    if not path.exists():
        raise PysegError(f"{str(path)!r} does not exist; check the path")
    if path.is_file():
        name, known = _of_file(path)
        return FORMATS[name], path, known
    for name in ("voc", "yolo", *cityscapes.KINDS, "geojson", "labelme"):
        reason = _of_folder(name, path)
        if reason:
            return FORMATS[name], path, reason
    files = [file for file in files_below(path, "*.json", "*.xml") if file.name != "classes.json"]
    described = []
    for file in files[:50]:  # where there are more, they are not each a set of its own
        try:
            name, known = _of_file(file)
        except (LabelError, ImageError):
            continue
        described.append((FORMATS[name], file, f"{file.name}, {known}"))
    if len(described) > 1:
        found = some([str(file.relative_to(path)) for _, file, _ in described])
        raise PysegError(
            f"{str(path)!r} has several sets of annotations: {found}; give one of them"
        )
    if described:
        return described[0]
    if reason := indexed.detect(path):
        return FORMATS["indexed"], path, reason
    raise PysegError(
        f"{str(path)!r} holds nothing of a known format; name it, source_format=NAME, of "
        f"{', '.join(FORMATS)}"
    )


def _of_folder(name: str, path: Path) -> str | None:
    if name in cityscapes.KINDS:
        return cityscapes.detect(path, name)
    module: Any = {"voc": voc, "yolo": yolo, "geojson": geojson, "labelme": labelme}[name]
    found: str | None = module.detect(path)
    return found


def _of_file(path: Path) -> tuple[str, str]:
    suffix = path.suffix.lower()
    if suffix == ".png":
        return "indexed", "a PNG"
    if suffix in (".yaml", ".yml"):
        return "yolo", "a description of data in YAML"
    if suffix == ".xml":
        root = read_xml(path)
        if root.tag == "annotations":
            return "cvat", "an XML with <annotations>"
        raise LabelError(
            f"{str(path)!r} is an XML with <{root.tag}>"
            + (
                "; of VOC give the folder that has SegmentationClass"
                if root.tag == "annotation"
                else ""
            )
        )
    if suffix not in (".json", ".geojson"):
        raise LabelError(
            f"{str(path)!r} has a suffix of no known format; name it, source_format=NAME"
        )
    value = read_json(path, LabelError)
    if labelme.is_file(value):
        return "labelme", "a JSON with shapes"
    if geojson.is_file(value):
        return "geojson", "a FeatureCollection"
    entries = value.get("annotations") if isinstance(value, dict) else value
    first = entries[0] if isinstance(entries, list) and entries else None
    if isinstance(value, dict) and isinstance(first, dict) and "segments_info" in first:
        file = first.get("file_name")
        if isinstance(file, str) and file.endswith(cityscapes.PanopticWriter.ending):
            return "cityscapes-panoptic", "a JSON with segments_info of Cityscapes' files"
        return "coco-panoptic", "a JSON with segments_info"
    if isinstance(value, dict) and {"images", "annotations", "categories"} <= value.keys():
        return "coco", "a JSON with images, annotations and categories"
    if isinstance(value, list) and isinstance(first, dict) and "segmentation" in first:
        return "coco-results", "a list with segmentations"
    raise LabelError(f"{str(path)!r} is a JSON of no known format; name it, source_format=NAME")


__all__ = ["FORMATS", "Format", "Writer", "detect", "find_format"]
