"""`score_files`: PNGs in folders or COCO's JSON, of any tool, against ground truth."""

from __future__ import annotations

import math
import os
import re
import reprlib
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .classes import (
    ADE20K_CLASSES,
    CAMVID_CLASSES,
    CITYSCAPES_CLASSES,
    CITYSCAPES_THINGS,
    CITYSCAPES_TRAIN_IDS,
    VOC_CLASSES,
)
from .datasets.folder import read_classes
from .datasets.pairs import segments_of
from .datasets.table import ClassTable
from .errors import LabelError, ScoreError
from .files import LABEL_SUFFIXES, read_json, some
from .formats import annotations_of, categories_of, read_segments
from .image import read_labels
from .metrics import _registry
from .metrics.instances import USUAL, CocoFiles, InstanceAP
from .metrics.scoring import RESAMPLES, Differences, Scores, States, Tally, differences, no_image
from .progress import notebook_bar
from .types import VOID, Instances, Metric, Sample, Segmentation, Segments

PathLike = str | os.PathLike[str]
VALUES = ("indices", "ids")


@dataclass(frozen=True)
class ClassList:
    """Classes by a name, and what values their data set's own label files have."""

    classes: tuple[str, ...]
    ids: Mapping[int, int] | None = None  # value -> class index or 255; None = the indices
    void: tuple[int, ...] = ()  # class ids of void besides 255
    things: tuple[str, ...] = ()
    labels: str = "indices"  # what label files hold where their names do not tell


CLASS_LISTS = {
    "cityscapes": ClassList(
        CITYSCAPES_CLASSES, dict(enumerate(CITYSCAPES_TRAIN_IDS)), things=CITYSCAPES_THINGS
    ),
    "voc": ClassList(VOC_CLASSES, things=VOC_CLASSES[1:]),
    "ade20k": ClassList(ADE20K_CLASSES, {0: VOID, **{k + 1: k for k in range(150)}}, labels="ids"),
    "camvid": ClassList(CAMVID_CLASSES, void=(11,)),
}


def score_files(
    predictions: PathLike,
    labels: PathLike,
    *,
    classes: Sequence[str] | PathLike | int | None = None,
    metrics: Sequence[str] | None = None,
    ignore_index: int = VOID,
    prediction_values: str | None = None,
    label_values: str | None = None,
    prediction_folder: PathLike | None = None,
    label_folder: PathLike | None = None,
    resamples: int = 0,
    seed: int = 0,
    track: Callable[[Sequence[Any]], Iterable[Any]] = notebook_bar,
) -> Scores:
    """Scores files that any tool has written.

    **Two folders** of label maps, PNGs whose values are class ids, with subfolders or without:
    paired by their stems, where Cityscapes' endings (``_gtFine_labelIds``, ``_leftImg8bit``, …) do
    not count. **Two JSON files** in COCO's panoptic format, with their PNGs in folders; or
    ``instances_*.json`` as labels and a list of results as predictions.

    An image without a prediction is an error; a prediction without labels is left out, with a
    warning. As many threads read files as torch has; the scores do not depend on them.

    Args:
        predictions: folder or JSON.
        labels: the ground truth, of the same kind.
        classes: of folders: ``"cityscapes"`` (its 19), ``"voc"``, ``"ade20k"``, ``"camvid"``; or
            names, how many there are, or a file of names; None = ``classes.json`` or
            ``classes.txt`` in the folder of the labels or beside it. JSON files name their own.
        metrics: names of metrics, with options if need be; None = ``semantic`` of folders,
            ``panoptic`` or ``instances`` of JSON files.
        ignore_index: value of pixels without ground truth, and of void predictions.
        prediction_values: ``"indices"`` of the classes, from 0 on (Cityscapes' train ids), or
            ``"ids"`` as in the data set's own label files (Cityscapes' label ids, ADE20K's numbers
            from 1 on); None = as the files' names say (``*_labelIds.png``), else indices.
        label_values: the same of the labels; None = as the files' names say, else as is usual.
        prediction_folder: PNGs of a panoptic JSON; None = the folder of the JSON's name, beside it.
        label_folder: the same of the labels.
        resamples: of the bootstrap over images, for intervals; 0 = none. 1000 is usual.
        seed: of the bootstrap.
        track: wraps the sequence of images, for a progress bar.

    Raises:
        LabelError, ImageError, ScoreError: a folder or file is missing or damaged, images have no
            prediction, sizes differ, labels are no class ids: each with its likely cause.
        UnknownName: no such metric.

    Example:
        >>> score_files("out", "gtFine/val", classes="cityscapes").metrics["semantic"]["miou"]
    """
    for name, value in (("prediction_values", prediction_values), ("label_values", label_values)):
        if value is not None and value not in VALUES:
            raise ScoreError(f"{name} must be {' or '.join(VALUES)}, got {value!r}")
    sides = [Path(predictions), Path(labels)]
    for side, what in zip(sides, ("predictions", "labels"), strict=True):
        if not side.exists():
            raise ScoreError(f"{what}: {str(side)!r} does not exist; check the path")
        if not side.is_dir() and side.suffix.lower() != ".json":
            raise ScoreError(f"{what}: {str(side)!r} is neither a folder nor a .json file")
    if sides[0].is_dir() != sides[1].is_dir():
        raise ScoreError(
            f"{str(sides[0])!r} and {str(sides[1])!r} must both be folders of label maps, or both "
            "JSON files of COCO"
        )
    if sides[0].is_dir():
        values = prediction_values, label_values
        kinds = {_registry.parse(name).name for name in metrics or ()}
        if "cityscapes_ap" in kinds:
            if kinds != {"cityscapes_ap"} or classes != "cityscapes":
                raise ScoreError("cityscapes_ap is scored alone, with classes 'cityscapes'")
            job = _cityscapes_objects(sides[0], sides[1])
        else:
            segments = "panoptic" in kinds
            job = _folders(sides[0], sides[1], classes, ignore_index, values, segments)
    else:
        truth = read_json(labels, ScoreError)
        if not _is_panoptic(truth):
            return _instances(sides[0], sides[1], truth, metrics, resamples, seed, track)
        folders = [None if f is None else Path(f) for f in (prediction_folder, label_folder)]
        job = _panoptic(sides[0], sides[1], truth, folders)
    tally = Tally(
        job.metrics if metrics is None else metrics,
        job.classes,
        things=job.things,
        resamples=resamples,
        seed=seed,
    )
    job.run(tally, track)
    return tally.scores(predictions=str(predictions), labels=str(labels), **job.protocol)


def compare_files(
    first: PathLike,
    second: PathLike,
    labels: PathLike,
    *,
    resamples: int = RESAMPLES,
    track: Callable[[Sequence[Any]], Iterable[Any]] = notebook_bar,
    **options: Any,
) -> Differences:
    """Scores two systems on the same labels, and tells which differences are more than noise.

    Args:
        first, second: predictions of the two.
        labels: the ground truth.
        resamples: of the bootstrap over images, the same for both: differences are in pairs.
        track: wraps the sequence of images.
        options: as `score_files` takes them.

    Example:
        >>> found = compare_files("ours", "theirs", "gtFine/val", classes="cityscapes")
        >>> found.values["semantic"]["per_class", "train", "iou"].beyond_noise
    """
    one, other = (
        score_files(side, labels, resamples=resamples, track=track, **options)
        for side in (first, second)
    )
    return differences(one, other)


@dataclass(frozen=True)
class _Job:
    """Images to be scored, and how one is read."""

    classes: tuple[str, ...]
    metrics: tuple[str, ...]  # where none are asked for
    names: Sequence[Any]
    read: Callable[[Any, Sequence[Metric]], tuple[Segmentation, Sample]]
    things: tuple[int | str, ...] = ()
    protocol: dict[str, Any] = field(default_factory=dict)
    explain: Callable[[Any], None] = lambda name: None  # raises a better error

    def run(self, tally: Tally, track: Callable[[Sequence[Any]], Iterable[Any]]) -> None:
        metrics = [*tally.metrics.values()]

        def score(name: Any) -> tuple[str, tuple[int, int], States]:
            prediction, sample = self.read(name, metrics)
            try:
                states = tally.states(sample.name, lambda metric: metric.update(prediction, sample))
            except LabelError:
                self.explain(name)
                raise
            return sample.name, prediction.size, states

        for found in _in_threads(score, self.names, track):
            tally.keep(*found)


def _in_threads(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    track: Callable[[Sequence[Any]], Iterable[Any]],
) -> Iterable[Any]:
    """``map``, by as many threads as torch has, in order and few ahead.

    Decoding a PNG is nearly all of it, and lets other threads run.
    """
    workers = torch.get_num_threads()
    if workers == 1:
        yield from map(function, track(items))
        return
    coming: deque[Future[Any]] = deque()
    started = 0
    with ThreadPoolExecutor(workers) as pool:
        try:
            for _ in track(items):
                for later in items[started : started + 2 * workers - len(coming)]:
                    coming.append(pool.submit(function, later))
                    started += 1
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()


# --- folders of label maps ------------------------------------------------------------------------

_CITYSCAPES = re.compile(r"(.+?_\d{6}_\d{6})(?:_.*)?")


def _folders(
    predictions: Path,
    labels: Path,
    classes: Sequence[str] | PathLike | int | None,
    ignore_index: int,
    values: tuple[str | None, str | None],
    segments: bool,
) -> _Job:
    chosen = _class_list(classes, labels)
    kinds: tuple[str, ...] = ()
    if chosen is CLASS_LISTS["cityscapes"]:
        kinds = ("instanceIds",) if segments else ("labelIds", "labelTrainIds")
    elif segments:
        raise ScoreError(
            "panoptic scores of folders are of Cityscapes' instanceIds, with classes 'cityscapes'; "
            "of other data sets they take two JSON files in COCO's panoptic format"
        )
    sides = []
    for folder, what, given in zip(
        (predictions, labels), ("predictions", "labels"), values, strict=True
    ):
        files, kind = _files(folder, what, kinds)
        if given is None and kind:
            given = "indices" if kind == "labelTrainIds" else "ids"
        given = given or (chosen.labels if what == "labels" else "indices")
        sides.append((files, _Reader(chosen, given, ignore_index, segments)))
    (found, ours), (wanted, theirs) = sides
    _check_pairs(found, wanted, predictions, labels)

    def read(name: str, metrics: Sequence[Metric]) -> tuple[Segmentation, Sample]:
        (guess, parts), (truth, regions) = ours.read(found[name]), theirs.read(wanted[name])
        if guess.shape != truth.shape:
            raise LabelError(
                f"{found[name]} is {guess.shape[1]} x {guess.shape[0]} pixels, its labels "
                f"{wanted[name]} are {truth.shape[1]} x {truth.shape[0]}; they must be equal: "
                "scale predictions to the size of the labels, by the nearest pixel"
            )
        size = int(truth.shape[0]), int(truth.shape[1])
        prediction = Segmentation(size, chosen.classes, segments=parts, _labels=guess)
        return prediction, Sample(name, no_image(truth), truth, regions)

    def explain(name: str) -> None:
        theirs.explain(wanted[name], "label")
        ours.explain(found[name], "prediction")

    return _Job(
        chosen.classes,
        ("semantic",),
        [*wanted],
        read,
        chosen.things,
        {
            "prediction_values": ours.values,
            "label_values": theirs.values,
            "void_values": theirs.void,
        },
        explain,
    )


def _class_list(classes: Sequence[str] | PathLike | int | None, labels: Path) -> ClassList:
    if isinstance(classes, str) and classes in CLASS_LISTS:
        return CLASS_LISTS[classes]
    if isinstance(classes, str) and classes.isdecimal():
        classes = int(classes)
    if isinstance(classes, int):
        if not 0 < classes <= VOID:
            raise ScoreError(f"classes of label maps must be 1 to {VOID}, got {classes}")
        return ClassList(tuple(f"class {k}" for k in range(classes)))
    try:
        given = classes if not isinstance(classes, os.PathLike) else Path(classes)
        names, _, void = read_classes(given, labels, labels.parent)
    except (OSError, ValueError) as error:
        raise ScoreError(
            f"{error}; known by name are {', '.join(CLASS_LISTS)}, and a number will do where "
            "names do not matter"
        ) from error
    return ClassList(names, void=void)


def _files(folder: Path, what: str, kinds: Sequence[str]) -> tuple[dict[str, Path], str]:
    """Label maps below a folder by what they are paired by, and which of ``kinds`` they are."""
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in LABEL_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    kind = next((k for k in kinds if any(p.stem.endswith(f"_{k}") for p in paths)), "")
    paths = [path for path in paths if path.stem.endswith(kind)]
    if not paths:
        raise ScoreError(
            f"{what}: {str(folder)!r} holds no label map ({', '.join(LABEL_SUFFIXES)}), in "
            "subfolders neither; is it the right folder?"
        )
    found: dict[str, Path] = {}
    for path in paths:
        stem = path.stem
        if kinds and (match := _CITYSCAPES.fullmatch(stem)):
            stem = match[1]
        if stem in found:
            raise ScoreError(
                f"{what}: {found[stem]} and {path} are both of image {stem!r}; files are paired "
                "by their stems, remove one of them"
            )
        found[stem] = path
    return found, kind


def _check_pairs(found: Mapping[str, Any], wanted: Mapping[str, Any], *folders: Path) -> None:
    missing = [name for name in wanted if name not in found]
    if len(missing) == len(wanted):
        raise ScoreError(
            f"no file in {str(folders[0])!r} has the name of one in {str(folders[1])!r}: "
            f"{next(iter(found))!r} and {next(iter(wanted))!r}, for example; they must be equal "
            "but for the suffix. Are these the right folders?"
        )
    if missing:
        raise ScoreError(
            f"{str(folders[0])!r} has no prediction for {len(missing)} of {len(wanted)} images: "
            f"{some(missing)}"
        )
    if extra := [name for name in found if name not in wanted]:
        warnings.warn(
            f"{len(extra)} predictions are of images that {str(folders[1])!r} does not have; they "
            f"are not scored: {some(extra)}",
            stacklevel=4,
        )


class _Reader:
    """Label files to class indices, 255 = void.

    A value that is no class id stays what it is, or becomes another that is none: the metrics look
    at every value anyway and refuse it, and `explain` then says why.
    """

    def __init__(self, chosen: ClassList, values: str, ignore_index: int, codes: bool) -> None:
        self.two_ways = chosen.ids is not None
        self.values = values if self.two_ways else "indices"  # which are the ids
        ids = chosen.ids if self.values == "ids" else None
        void = {VOID, *chosen.void, ignore_index} - {-1}
        self.table, self.void = ClassTable(chosen.classes, ids=ids, void=void), sorted(void)
        self.codes = codes
        self._plain = ids is None and void == {VOID}
        known = {k: k for k in range(len(chosen.classes))} if ids is None else dict(ids)
        known |= dict.fromkeys(void, VOID)
        wrong = VOID - 1 if len(chosen.classes) < VOID else None  # a value that is no class
        self._bytes = None
        if wrong is not None:
            self._bytes = bytes(known.get(value, wrong) for value in range(256))

    def read(self, path: Path) -> tuple[Tensor, Segments | None]:
        """[H, W] uint8, and with ``codes`` its segments."""
        labels = read_labels(path)
        if self.codes:  # an object: label id * 1000 + number; all else: label id
            ids = torch.where(labels < 1000, labels, labels // 1000)
            indices = self.table.of_ids(ids, path)
            return indices, segments_of(labels, indices, (labels >= 24) & (labels < 1000))
        if labels.dtype != torch.uint8 or self._bytes is None:
            return self.table.of_ids(labels, path), None
        if self._plain:
            return labels, None
        mapped = bytearray(labels.numpy().tobytes().translate(self._bytes))
        return torch.frombuffer(mapped, dtype=torch.uint8).view(labels.shape), None

    def explain(self, path: Path, what: str) -> None:
        """Raises LabelError with the likely cause where a file's values are not as they should."""
        if self.codes:  # which `read` has looked at
            return
        try:
            self.table.of_ids(read_labels(path), path)
        except LabelError as error:
            if not self.two_ways:
                raise
            other = VALUES[self.values == "indices"]
            raise LabelError(
                f"{error}. {what}_values={self.values!r} is what they were taken for; "
                f"{what}_values={other!r} is the other way"
            ) from None


# --- objects in Cityscapes' own format ------------------------------------------------------------


def _cityscapes_objects(predictions: Path, labels: Path) -> _Job:
    """Text files that list masks, label ids and scores, and the instanceIds of the ground truth."""
    wanted, kind = _files(labels, "labels", ("instanceIds",))
    if not kind:
        raise ScoreError(f"labels: {str(labels)!r} holds no *_instanceIds.png")
    found: dict[str, Path] = {}
    for path in sorted(predictions.rglob("*.txt")):
        match = _CITYSCAPES.fullmatch(path.stem)
        name = match[1] if match else path.stem
        if name in found:
            raise ScoreError(f"predictions: {found[name]} and {path} are both of image {name!r}")
        found[name] = path
    if not found:
        raise ScoreError(
            f"predictions: {str(predictions)!r} holds no .txt, which Cityscapes' format has for "
            "every image: a line 'mask.png label_id score' for each object"
        )
    _check_pairs(found, wanted, predictions, labels)
    reader = _Reader(CLASS_LISTS["cityscapes"], "ids", VOID, codes=True)

    def read(name: str, metrics: Sequence[Metric]) -> tuple[Segmentation, Sample]:
        codes = read_labels(wanted[name])
        _, regions = reader.read(wanted[name])
        assert regions is not None
        # The evaluation takes numbered objects of classes that are not scored for no void.
        other = (regions.map == 0) & (codes >= 1000)
        target = Segments(regions.map.masked_fill(other, -1), regions.items)
        size = int(codes.shape[0]), int(codes.shape[1])
        instances = _listed_masks(found[name], predictions, size)
        prediction = Segmentation(size, CITYSCAPES_CLASSES, instances=instances)
        return prediction, Sample(name, no_image(codes), segments=target)

    things = CLASS_LISTS["cityscapes"].things
    return _Job(CITYSCAPES_CLASSES, ("cityscapes_ap",), [*wanted], read, things)


def _listed_masks(path: Path, root: Path, size: tuple[int, int]) -> Instances:
    masks, labels, scores = [], [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split(" ")
        where = f"{path}, line {number}"
        try:
            file, label, score = words[0], int(float(words[1])), float(words[2])
            if len(words) != 3 or not math.isfinite(score):
                raise ValueError
        except (IndexError, ValueError, OverflowError) as error:
            raise ScoreError(
                f"{where}: a line is 'mask.png label_id score', got {reprlib.repr(line)}"
            ) from error
        mask = (path.parent / file).resolve()
        if Path(file).is_absolute() or root.resolve() not in mask.parents:
            raise ScoreError(f"{where}: {file!r} must be a relative path within {str(root)!r}")
        if not 0 <= label < len(CITYSCAPES_TRAIN_IDS):
            raise ScoreError(f"{where}: {label} is no label id of Cityscapes, 0 to 33")
        if CITYSCAPES_TRAIN_IDS[label] == VOID:
            continue  # a class that is not scored
        inside = read_labels(mask) != 0
        if tuple(inside.shape) != size:
            raise ScoreError(
                f"{where}: the mask is {inside.shape[1]} x {inside.shape[0]} pixels, its image "
                f"{size[1]} x {size[0]}"
            )
        masks.append(inside)
        labels.append(CITYSCAPES_TRAIN_IDS[label])
        scores.append(score)
    return Instances(
        torch.zeros(len(masks), 4),
        torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.bool),
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor(labels, dtype=torch.int64),
    )


# --- COCO's panoptic format -----------------------------------------------------------------------


def _is_panoptic(truth: Any) -> bool:
    """Whether any annotation has segments, or any category says whether it is of things."""
    return isinstance(truth, dict) and any(
        isinstance(entries := truth.get(key), list)
        and any(isinstance(entry, dict) and word in entry for entry in entries)
        for key, word in (("annotations", "segments_info"), ("categories", "isthing"))
    )


def _panoptic(predictions: Path, labels: Path, truth: Any, folders: Sequence[Path | None]) -> _Job:
    guesses = read_json(predictions, LabelError)
    known = categories_of(truth, labels)
    index = {entry["id"]: k for k, entry in enumerate(known)}
    places = [
        file.with_suffix("") if folder is None else folder
        for folder, file in zip(folders, (predictions, labels), strict=True)
    ]
    for place, option in zip(places, ("prediction_folder", "label_folder"), strict=True):
        if not place.is_dir():
            raise LabelError(
                f"there is no folder {str(place)!r} with panoptic PNGs; say where they are by "
                f"{option}"
            )
    wanted, found = annotations_of(truth, labels), annotations_of(guesses, predictions)
    if not wanted:
        raise LabelError(f"{str(labels)!r} has no annotations: there is nothing to score")
    _check_pairs(
        {str(key): 0 for key in found}, {str(key): 0 for key in wanted}, predictions, labels
    )

    def read(key: Any, metrics: Sequence[Metric]) -> tuple[Segmentation, Sample]:
        guess = read_segments(found[key], places[0], index, predictions)
        target = read_segments(wanted[key], places[1], index, labels)
        name = str(wanted[key]["file_name"])
        if guess.map.shape != target.map.shape:
            raise LabelError(
                f"{name}: the predicted map is {guess.map.shape[1]} x {guess.map.shape[0]} pixels, "
                f"its ground truth {target.map.shape[1]} x {target.map.shape[0]}"
            )
        size = int(target.map.shape[0]), int(target.map.shape[1])
        maps = any(not hasattr(metric, "update_segments") for metric in metrics)
        marked = target.label_map(len(known)) if maps else None
        sample = Sample(name, no_image(target.map), marked, target)
        return Segmentation(size, classes, segments=guess), sample

    classes = tuple(entry["name"] for entry in known)
    things = tuple(k for k, entry in enumerate(known) if entry["isthing"])
    return _Job(classes, ("panoptic",), [*wanted], read, things)


# --- COCO's instances -----------------------------------------------------------------------------

IMAGES = 64  # whose overlaps are found at a time


def _instances(
    predictions: Path,
    labels: Path,
    truth: Any,
    metrics: Sequence[str] | None,
    resamples: int,
    seed: int,
    track: Callable[[Sequence[Any]], Iterable[Any]],
) -> Scores:
    files = CocoFiles(truth, read_json(predictions, ScoreError), (labels, predictions))
    if metrics is None:
        usual = tuple(kind for kind in files.possible if kind in USUAL)
        metrics = ["instances" if usual == USUAL else f"instances(kinds={usual})"]
    tally = Tally(metrics, files.classes, resamples=resamples, seed=seed)
    ((key, metric),) = tally.metrics.items() if len(metrics) == 1 else (("", None),)
    if not isinstance(metric, InstanceAP):
        raise ScoreError(
            f"files of instances are scored by the metric 'instances' alone, got {list(metrics)}"
        )
    files.prepare(metric.kinds)
    count = len(files.names)

    def records(begin: int) -> list[dict[str, Any]]:
        return files.records(metric.kinds, begin, min(begin + IMAGES, count))

    for found in _in_threads(records, range(0, count, IMAGES), track):
        for record in found:
            k = len(tally)
            tally.keep(files.names[k], files.sizes[k], {key: {"images": [record]}})
    return tally.scores(predictions=str(predictions), labels=str(labels))


__all__ = ["CLASS_LISTS", "ClassList", "compare_files", "score_files"]
