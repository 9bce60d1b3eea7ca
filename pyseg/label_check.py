"""`check_labels`: what is wrong with a folder of label maps, before anyone trains on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .datasets.folder import read_classes
from .errors import ImageError, PysegError
from .files import IMAGE_SUFFIXES, LABEL_SUFFIXES, some
from .image import open_image
from .progress import notebook_bar
from .types import VOID


@dataclass(frozen=True)
class Problem:
    """One kind of mistake, over all files that have it."""

    kind: str  # such as "out-of-range"
    message: str  # what is wrong, and what to do about it
    files: tuple[str, ...] = ()
    error: bool = True  # False = worth knowing, and training can start

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "message": self.message, "files": list(self.files)}


@dataclass(frozen=True)
class ClassCount:
    """How often a label value occurs."""

    value: int
    name: str  # of the class, "void", or "" where it has none
    pixels: int
    files: int


@dataclass(frozen=True)
class LabelReport:
    """The result of `check_labels`."""

    files: int
    values: tuple[ClassCount, ...]
    problems: tuple[Problem, ...]  # errors first

    @property
    def ok(self) -> bool:
        """Whether there are no errors; warnings are allowed."""
        return not any(problem.error for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "ok": self.ok,
            "files": self.files,
            "errors": [problem.to_dict() for problem in self.problems if problem.error],
            "warnings": [problem.to_dict() for problem in self.problems if not problem.error],
            "values": [vars(count) for count in self.values],
        }


@dataclass
class _Findings:
    """What was seen while reading."""

    failed: list[tuple[str, str]] = field(default_factory=list)  # file, reason
    lossy: list[str] = field(default_factory=list)
    colours: dict[str, list[str]] = field(default_factory=dict)  # what kind of colours -> files
    floats: list[str] = field(default_factory=list)
    scaled: list[str] = field(default_factory=list)  # 16-bit files whose ids were multiplied
    sizes: list[tuple[str, str]] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)  # only 0 and 255, both
    empty: list[str] = field(default_factory=list)  # nothing but void
    pixels: Counter[int] = field(default_factory=Counter)
    holders: dict[int, list[str]] = field(default_factory=dict)  # value -> files
    palettes: dict[int, dict[tuple[int, ...], str]] = field(default_factory=dict)


def check_labels(
    folder: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    ignore_index: int = VOID,
    track: Callable[[Sequence[Path]], Iterable[Path]] = notebook_bar,
) -> LabelReport:
    """Reads every label map below a folder and reports what would go wrong in training.

    Errors: files that cannot be read or are lossy, colours or floating point instead of class ids,
    16-bit files whose ids were scaled, values that are no class, ids that start at 1, masks of 0
    and 255, palettes that give one index different colours, images without labels and the reverse,
    sizes that differ. Warnings: a class that never occurs, maps that are void throughout.

    Args:
        folder: label maps, in subfolders too; or a folder that holds ``labels/`` and perhaps
            ``images/``, which then counts as given.
        images: their images, with the same names below this folder but for the suffix; None = do
            not check pairs and sizes.
        classes: names of the classes, or a file of them (see `pyseg.datasets.folder.Folder`); by
            default ``classes.json`` or ``classes.txt`` in ``folder`` or in the one above it.
        num_classes: C, where the names do not matter. Without either, values are not held against
            a range.
        ignore_index: label of pixels without ground truth.
        track: wraps the list of files, for a progress bar.

    Raises:
        PysegError: there is no such folder, it holds no label map, or the classes make no sense.

    Example:
        >>> report = check_labels("data/train", num_classes=19)
        >>> report.ok, [problem.kind for problem in report.problems]
    """
    base = Path(folder)
    if not base.is_dir():
        raise PysegError(f"there is no folder {str(base)!r} to check")
    names, more_void = _class_names(base, classes, num_classes, ignore_index)
    labels_dir = base / "labels" if (base / "labels").is_dir() else base
    if images is None and labels_dir != base and (base / "images").is_dir():
        images = base / "images"
    if images is not None and not Path(images).is_dir():
        raise PysegError(f"images: there is no folder {str(images)!r}")
    files, doubled = _files(labels_dir, (*LABEL_SUFFIXES, ".jpg", ".jpeg"))
    if not files:
        raise PysegError(
            f"{str(labels_dir)!r} holds no label map ({', '.join(LABEL_SUFFIXES)}), "
            "in subfolders neither"
        )
    problems = [
        Problem(
            "same-name",
            f"{first} and {second} differ in their suffix only, and labels are "
            "matched to images by name; remove one",
            (first, second),
        )
        for first, second in doubled
    ]
    pictures: dict[str, Path] = {}
    if images is not None:
        pictures, _ = _files(Path(images), IMAGE_SUFFIXES)
        problems += _pairs(files, pictures)
    found = _Findings()
    void = {ignore_index, *more_void}
    for path in track([*files.values()]):
        name = path.relative_to(labels_dir).as_posix()
        _read(found, path, name, pictures.get(_stem(path, labels_dir)), void)
    problems += _file_problems(found)
    problems += _value_problems(found, names, void, ignore_index)
    problems.sort(key=lambda problem: not problem.error)
    values = tuple(
        ClassCount(
            value,
            "void" if value in void else names[value] if names and value < len(names) else "",
            found.pixels[value],
            len(found.holders[value]),
        )
        for value in sorted(found.pixels)
    )
    return LabelReport(len(files), values, tuple(problems))


def _class_names(
    base: Path,
    classes: Sequence[str] | str | os.PathLike[str] | None,
    num_classes: int | None,
    ignore_index: int,
) -> tuple[tuple[str, ...] | None, tuple[int, ...]]:
    """Names, where they are known, and ids besides ignore_index that mean void."""
    names: tuple[str, ...] | None = None
    void: tuple[int, ...] = ()
    # A split's folder has its class list beside it, in the folder of the data set.
    places = (base, base.resolve().parent)
    here = any((f / name).is_file() for f in places for name in ("classes.json", "classes.txt"))
    if classes is not None or (num_classes is None and here):
        given = Path(classes) if isinstance(classes, (str, os.PathLike)) else classes
        try:
            names, _, void = read_classes(given, *places)
        except (OSError, ValueError) as error:
            raise PysegError(str(error)) from error
    if num_classes is not None:
        if num_classes < 1 or (names is not None and len(names) != num_classes):
            counted = "" if names is None else f", and {len(names)} classes were named"
            raise PysegError(f"num_classes must be at least 1, got {num_classes}{counted}")
        names = names or tuple(f"class {index}" for index in range(num_classes))
    if names is not None and ignore_index == VOID < len(names):
        raise PysegError(
            f"{VOID} is one of the {len(names)} classes and cannot mean void as well; "
            "give another ignore_index, such as 65535"
        )
    return names, void


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _files(folder: Path, suffixes: Sequence[str]) -> tuple[dict[str, Path], list[tuple[str, str]]]:
    """Files below ``folder`` by relative name without suffix, and pairs that share one."""
    files: dict[str, Path] = {}
    doubled = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in suffixes or not path.is_file():
            continue
        stem = _stem(path, folder)
        if stem in files:
            doubled.append((files[stem].name, path.name))
        files.setdefault(stem, path)
    return files, doubled


def _pairs(labels: dict[str, Path], images: dict[str, Path]) -> list[Problem]:
    without_labels = sorted(images.keys() - labels.keys())
    without_image = sorted(labels.keys() - images.keys())
    if labels and images and len(without_image) == len(labels):
        return [
            Problem(
                "missing-pair",
                f"no label map has the name of an image: {without_image[0]!r} and "
                f"{without_labels[0]!r}, for example; they must be equal but for the suffix",
                tuple(without_image),
            )
        ]
    problems = []
    if without_labels:
        problems.append(
            Problem(
                "missing-labels",
                f"{_count(without_labels, 'image')} without a "
                f"label map: {some(without_labels)}; label them, or take them "
                "out",
                tuple(without_labels),
            )
        )
    if without_image:
        problems.append(
            Problem(
                "missing-image",
                f"{_count(without_image, 'label map')} without "
                f"an image: {some(without_image)}; add the images, or take "
                "them out",
                tuple(without_image),
            )
        )
    return problems


def _read(found: _Findings, path: Path, name: str, picture: Path | None, void: set[int]) -> None:
    """Looks at one label map."""
    try:
        image = open_image(path, "label map")
    except ImageError as error:
        found.failed.append((name, str(error)))
        return
    if picture is not None and (different := _different_size(image, picture)):
        found.sizes.append((name, different))
    if image.format in ("JPEG", "MPO"):
        found.lossy.append(name)
        return
    if image.mode == "F":
        found.floats.append(name)
        return
    array = np.array(image)
    if array.ndim == 3:
        found.colours.setdefault(_colour_kind(array), []).append(name)
        return
    if image.mode == "L":
        array = array // image.info.get("grey_step", 1)
    if array.dtype.kind == "u":
        histogram = np.bincount(array.ravel())
        values = np.flatnonzero(histogram)
        counts = histogram[values]
    else:
        values, counts = np.unique(array, return_counts=True)
    # Written through a viewer's scale, 1 becomes 256 or 257; then no id is left of them.
    nonzero = values[(values != 0) & (values != 65535)]
    if (
        array.dtype.itemsize > 1
        and len(nonzero)
        and nonzero.min() >= 256
        and ((nonzero % 257 == 0).all() or (nonzero % 256 == 0).all())
    ):
        found.scaled.append(name)
        return
    seen = {int(value): int(count) for value, count in zip(values, counts, strict=True)}
    if set(seen) == {0, 255}:
        found.masks.append(name)
    if set(seen) <= void:
        found.empty.append(name)
    for value, count in seen.items():
        found.pixels[value] += count
        found.holders.setdefault(value, []).append(name)
    if image.mode == "P" and (palette := image.getpalette("RGB")):
        for value in seen:
            colour = tuple(palette[3 * value : 3 * value + 3])
            if value not in void and colour:
                found.palettes.setdefault(value, {}).setdefault(colour, name)


def _different_size(labels: Image.Image, picture: Path) -> str | None:
    """What differs, where a label map has not the size of its image as it is shown."""
    try:
        with Image.open(picture) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5  # Orientation: by a quarter turn
    except Exception as error:  # Pillow's decoders raise many kinds
        return f"its image {picture.name} cannot be read ({str(error) or type(error).__name__})"
    shown = (height, width) if turned else (width, height)
    if labels.size == shown:
        return None
    text = (
        f"{labels.size[0]} x {labels.size[1]} pixels, its image {picture.name} "
        f"{shown[0]} x {shown[1]}"
    )
    if turned and labels.size == (width, height):
        text += ", which its EXIF orientation turns: the labels were drawn on the unturned image"
    return text


def _colour_kind(array: np.ndarray) -> str:
    rgb = array[..., :3]
    if array.shape[2] < 3 or ((rgb == rgb[..., :1]).all()):
        return "grey in several channels: keep one of them"
    flat = rgb.reshape(-1, 3).astype(np.int64)
    count = len(np.unique(flat @ np.array([1, 256, 65536])))
    if count <= 256:
        return (
            "few different ones: a palette turned into RGB, whose colours have to be mapped to "
            "class ids, or segment ids in RGB"
        )
    return "more than 256 different ones: a photograph, a blended overlay or a smoothed palette"


def _file_problems(found: _Findings) -> list[Problem]:
    problems: list[Problem] = []
    if found.failed:
        reasons = [reason for _, reason in found.failed]
        problems.append(
            Problem("unreadable", some(reasons, "; "), tuple(name for name, _ in found.failed))
        )
    if found.lossy:
        problems.append(
            Problem(
                "lossy",
                f"{_count(found.lossy, 'JPEG file')}, whose compression "
                f"changes class ids: {some(found.lossy)}; use the PNGs that they "
                "were made from",
                tuple(found.lossy),
            )
        )
    for kind, files in found.colours.items():
        problems.append(
            Problem(
                "colours",
                f"{_count(files, 'label map')} with colours instead of "
                f"one class id per pixel ({kind}): {some(files)}; save ids as "
                "a grey or palette PNG",
                tuple(files),
            )
        )
    if found.floats:
        problems.append(
            Problem(
                "floats",
                f"{_count(found.floats, 'label map')} in floating "
                f"point: {some(found.floats)}; convert to uint8, class ids "
                "are integers",
                tuple(found.floats),
            )
        )
    if found.scaled:
        problems.append(
            Problem(
                "scaled",
                f"{_count(found.scaled, '16-bit label map')} whose "
                f"values are all multiples of 256 or 257: {some(found.scaled)}; "
                "ids were stretched to 16 bits, divide them again",
                tuple(found.scaled),
            )
        )
    if found.sizes:
        names = tuple(name for name, _ in found.sizes)
        texts = [f"{name} is {text}" for name, text in found.sizes]
        problems.append(
            Problem(
                "size",
                f"{_count(names, 'label map')} not of the size of the image: {some(texts, '; ')}",
                names,
            )
        )
    clashes = {value: of for value, of in found.palettes.items() if len(of) > 1}
    if clashes:
        value, of = next(iter(sorted(clashes.items())))
        (first, a), (second, b) = list(of.items())[:2]
        problems.append(
            Problem(
                "palette",
                f"index {value} is the colour {first} in {a} and "
                f"{second} in {b}: {_count(clashes, 'index', 'indices')} with "
                "several colours, so these palettes were made per file and "
                "their indices are no class ids; map colours to ids",
                (a, b),
            )
        )
    if found.empty:
        problems.append(
            Problem(
                "void-only",
                f"{_count(found.empty, 'label map')} without any "
                f"class: {some(found.empty)}; such images teach nothing",
                tuple(found.empty),
                error=False,
            )
        )
    return problems


def _value_problems(
    found: _Findings, names: tuple[str, ...] | None, void: set[int], ignore_index: int
) -> list[Problem]:
    problems = []
    seen = set(found.pixels)
    classes = seen - void
    if found.masks and seen <= {0, 255}:
        effect = (
            "255 is ignore_index, so that the objects would be ignored and all that counts is "
            "background"
            if ignore_index == 255
            else "255 is no class"
        )
        problems.append(
            Problem(
                "mask-255",
                "all values are 0 and 255: these are masks for "
                f"viewing, and {effect}; write 1 instead of 255",
                tuple(found.masks),
            )
        )
        return problems
    count = None if names is None else len(names)
    wrong = sorted(v for v in classes if v < 0 or (count is not None and v >= count))
    if wrong:
        files = tuple(dict.fromkeys(name for value in wrong for name in found.holders[value]))
        pixels = sum(found.pixels[value] for value in wrong)
        known = "" if count is None else f": there are {count} classes, 0 to {count - 1}"
        problems.append(
            Problem(
                "off-by-one" if wrong == [count] else "out-of-range",
                f"values {some(wrong)} are no class ids ({_count(files, 'label map')}, "
                f"{pixels} pixels){known}; {some(sorted(void))} is void. "
                f"{_likely_cause(wrong, seen, count)}",
                files,
            )
        )
    if names is not None:
        absent = [name for k, name in enumerate(names) if k not in seen and k not in void]
        if absent and classes:
            problems.append(
                Problem(
                    "absent-class",
                    f"{_count(absent, 'class', 'classes')} of "
                    f"{count} never present: {some(absent)}; no network can "
                    "learn them here, and they have no score",
                    error=False,
                )
            )
    elif classes and min(classes) > 0:
        problems.append(
            Problem(
                "off-by-one",
                f"value 0 never occurs, the smallest is "
                f"{min(classes)}: ids seem to start at 1; subtract 1, or give the "
                "class list if class 0 is only absent",
                error=min(classes) == 1,
            )
        )
    elif len(classes) > 200 or (len(classes) > 1 and max(classes) > max(40, 4 * len(classes))):
        # Where no class list says what is right: values that class ids seldom have.
        problems.append(
            Problem(
                "sparse-values",
                f"{len(classes)} values spread over "
                f"{min(classes)} to {max(classes)}: {some(sorted(classes))}. "
                f"{_likely_cause(sorted(classes), seen, None)}; give the class "
                "list to check the range",
                error=max(classes) > 255,
            )
        )
    return problems


def _likely_cause(wrong: Sequence[int], seen: set[int], count: int | None) -> str:
    if count is not None and list(wrong) == [count]:
        if 0 in seen:
            return (
                f"If 0 means void, ids count from 1: subtract 1, 0 becoming 255 "
                f"(reduce_zero_label). If {count} means void, give --ignore-index {count}. "
                "Otherwise the list lacks a class"
            )
        return "0 never occurs: ids count from 1, subtract 1; or the list lacks a class"
    if min(wrong) < 0:
        return "Negative ids mean void in some formats: write 255 instead"
    if max(wrong) > 255:
        return (
            "Values above 255 are rarely classes: they look like instance or panoptic ids "
            "(Cityscapes instanceIds are class * 1000 + number)"
        )
    if count is not None and max(wrong) <= 33 and count <= 20:
        return (
            "They look like ids of a longer class list, such as Cityscapes ids (0 to 33) "
            "instead of train ids (0 to 18)"
        )
    if set(wrong) == {255}:
        return "255 is the usual ignore_index: give --ignore-index 255, or correct the masks"
    if len(wrong) > (32 if count is not None else 200):
        return "So many values suggest a photograph or a colour map turned grey"
    return (
        "They look like the grey values of a colour-coded map: read its colours instead, and "
        "map each to its class id"
    )


def _count(items: Any, one: str, many: str | None = None) -> str:
    return f"1 {one}" if len(items) == 1 else f"{len(items)} {many or one + 's'}"


__all__ = ["ClassCount", "LabelReport", "Problem", "check_labels"]
