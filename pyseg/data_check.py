"""`check_data`: whether a data set on disk is whole and as it was published, with a picture."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import datasets
from .errors import LayoutError, PysegError
from .files import make_folder, some
from .image import save_image
from .label_check import ClassCount, Problem
from .progress import notebook_bar
from .regions import VOID
from .spec import StageSpec
from .types import Dataset, Sample, Segments
from .visual import contact_sheet

TILES, WIDTH = 12, 320  # pictures on a sheet, and the width of each in pixels


@dataclass(frozen=True)
class DataReport:
    """The result of `check_data` for one split."""

    name: str
    split: str | None
    images: int
    published: int | None  # as many should be there; None = nobody says
    checked: int  # samples that were read
    values: tuple[ClassCount, ...]
    problems: tuple[Problem, ...]  # errors first
    sheet: Path | None = None  # the picture

    @property
    def ok(self) -> bool:
        """Whether there are no errors; warnings are allowed."""
        return not any(problem.error for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.name,
            "split": self.split,
            "ok": self.ok,
            "images": self.images,
            "published": self.published,
            "checked": self.checked,
            "errors": [problem.to_dict() for problem in self.problems if problem.error],
            "warnings": [problem.to_dict() for problem in self.problems if not problem.error],
            "values": [vars(count) for count in self.values],
            "sheet": None if self.sheet is None else str(self.sheet),
        }


def check_data(
    name: str,
    root: str | os.PathLike[str] | None = None,
    split: str | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    track: Callable[[Sequence[int]], Iterable[int]] = notebook_bar,
) -> tuple[DataReport, ...]:
    """Reads a data set and holds it against what is published of it.

    Errors: files that are absent or cannot be read, labels that are no class of it, another number
    of images than published. Warnings: a split that is not there, a class that never occurs in a
    whole split, images that are void throughout.

    Args:
        name: of a registered data set, with options if need be: ``"cityscapes(regions=True)"``.
        root: its folder.
        split: which; None = every published one.
        output: folder for a contact sheet of each split, ``NAME-SPLIT.png``: a dozen images beside
            their labels. None = no picture.
        limit: read so many images of a split, spread evenly; None = all.
        track: wraps the indices, for a progress bar.

    Raises:
        LayoutError: nothing of it is there; the message shows what is expected and found.
        UnknownName: no data set has that name.
        PysegError: an option is wrong.

    Example:
        >>> [report.ok for report in check_data("camvid", "CamVid")]
    """
    if limit is not None and limit < 1:
        raise PysegError(f"limit must be at least 1, got {limit}")
    registry = datasets._registry
    stage = registry.parse(name)
    published = getattr(registry.get(stage.name), "published", None)
    given = stage.options.get("split", split)
    splits = [given] if given is not None or published is None else [*published.counts]
    folder = None if output is None else make_folder(output, "output")
    reports: list[DataReport] = []
    missing: list[LayoutError] = []
    for part in splits:
        expected = None if published is None else published.count(part)
        options = {"root": root, "split": part}
        known = {key: str(value) for key, value in options.items() if value is not None}
        try:
            dataset = registry.make(StageSpec(stage.name, {**known, **stage.options}))
        except LayoutError as error:
            missing.append(error)
            if len(missing) == len(splits):
                raise missing[0] from None
            text = str(error) if not error.absent else str(error).partition("\n")[0]
            problem = Problem("absent", text, error=not error.absent)
            reports.append(DataReport(stage.name, part, 0, expected, 0, (), (problem,)))
            continue
        sheet = None if folder is None else folder / f"{stage.name}-{part or 'all'}.png"
        reports.append(_check(stage.name, part, dataset, expected, sheet, limit, track))
    return tuple(reports)


def _check(
    name: str,
    split: str | None,
    dataset: Dataset,
    expected: int | None,
    sheet: Path | None,
    limit: int | None,
    track: Callable[[Sequence[int]], Iterable[int]],
) -> DataReport:
    """Reads one split."""
    count = len(dataset)
    indices = _spread(count, limit)
    shown = {indices[k] for k in _spread(len(indices), TILES)}
    pixels: Counter[int] = Counter()
    holders: Counter[int] = Counter()
    failed: list[str] = []
    empty: list[str] = []
    tiles = []
    for index in track(indices):
        try:
            sample = dataset[index]
        except (PysegError, OSError) as error:
            failed.append(str(error))
            continue
        seen = _pixels(sample)
        pixels.update(seen)
        holders.update(seen.keys())
        if sample.labels is not None and set(seen) <= {VOID}:
            empty.append(sample.name)
        if index in shown:
            tiles.append((sample.name, _small(sample)))
    problems = []
    if expected is not None and count != expected:
        problems.append(
            Problem("count", f"{count} images are there, {expected} were published; fetch the rest")
        )
    if failed:
        problems.append(
            Problem(
                "unreadable", f"{len(failed)} samples fail: {some(failed, '; ')}", tuple(failed)
            )
        )
    if empty:
        problems.append(
            Problem(
                "void-only",
                f"{len(empty)} images are void throughout: {some(empty)}; labels of a test split "
                "are often kept back like this",
                tuple(empty),
                error=False,
            )
        )
    names = tuple(dataset.classes)
    absent = [text for k, text in enumerate(names) if k not in pixels]
    if absent and pixels and len(indices) == count:
        problems.append(
            Problem(
                "absent-class",
                f"{len(absent)} of {len(names)} classes never occur: {some(absent)}",
                error=False,
            )
        )
    values = tuple(
        ClassCount(value, names[value] if value < len(names) else "void", number, holders[value])
        for value, number in sorted(pixels.items())
    )
    path = None
    if sheet is not None and tiles:
        path = save_image(sheet, contact_sheet(tiles, names, dataset.palette), format="PNG")
    return DataReport(
        name, split, count, expected, len(indices) - len(failed), values, tuple(problems), path
    )


def _spread(count: int, limit: int | None) -> list[int]:
    if limit is None or limit >= count:
        return list(range(count))
    return [k * count // limit for k in range(limit)]


def _pixels(sample: Sample) -> Counter[int]:
    """Pixels of every class, 255 being void; of instances alone, those of each mask."""
    if sample.labels is not None:
        counts = torch.bincount(sample.labels.flatten().long()).tolist()
        return Counter({value: number for value, number in enumerate(counts) if number})
    found: Counter[int] = Counter()
    if sample.instances is not None:
        areas = sample.instances.masks.sum((1, 2)).tolist()
        for label, area in zip(sample.instances.labels.tolist(), areas, strict=True):
            found[label] += area
    return found


def _small(sample: Sample) -> Sample:
    """A sample as wide as a tile, its labels and segments by the nearest pixel."""
    height, width = sample.image.shape[1:]
    size = (WIDTH, max(1, round(height * WIDTH / width)))
    picture = Image.fromarray(sample.image.permute(1, 2, 0).numpy())
    image = torch.from_numpy(np.array(picture.resize(size, Image.Resampling.BOX)))
    rows = torch.arange(size[1]) * height // size[1]
    columns = torch.arange(WIDTH) * width // WIDTH
    labels, segments = sample.labels, sample.segments
    if labels is None and sample.instances is not None:
        labels = sample.instances.label_map(VOID)
    if labels is not None:
        labels = labels[rows[:, None], columns]
    if segments is not None:
        ids = segments.map[rows[:, None], columns]
        left = set(np.unique(ids.numpy()).tolist())
        segments = Segments(ids, tuple(item for item in segments.items if item.id in left))
    return Sample(sample.name, image.permute(2, 0, 1), labels, segments)


__all__ = ["DataReport", "check_data"]
