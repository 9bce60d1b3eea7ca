"""`InstanceAP`: COCO's average precision of masks, boxes and boundaries."""

from __future__ import annotations

import itertools
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ImageError, ScoreError
from ..files import check_json, fits_json
from ..formats import edges_of
from ..formats.polygons import coco_edges
from ..image import check_pixels
from ..ops.boundary_mask import boundary_distance
from ..ops.rle import run_overlaps
from ..types import Instances, Sample, Segmentation
from .average_precision import (
    AREAS,
    MOST,
    THRESHOLDS,
    Curves,
    Matches,
    accumulate,
    match,
    ranked,
    same_class,
)
from .inputs import class_names
from .runs import Runs

KINDS = ("mask", "box", "boundary")
USUAL = ("mask", "box")  # the boundaries take longer than both


class InstanceAP:
    """Average precision and recall of detected objects, as COCO defines them.

    AP is the mean over classes and over the IoU thresholds .50, .55, …, .95 of the area under the
    precision-recall curve, sampled at 101 recalls; detections are matched greedily by score, 100
    per image and class at most; ground truth marked as crowd neither counts nor punishes (Lin et
    al. 2014; pycocotools). IoU is that of masks, of boxes, or for the boundary AP the smaller of
    mask IoU and boundary IoU, with a boundary as wide as 2 % of the image diagonal (Cheng et al.
    2021). Numbers are pycocotools'.

    An object's size, for the scores of small (below 32^2 pixels), medium and large (from 96^2 on)
    objects, is the area of its mask; for boxes a detection's is that of its box.

    The state is one record per image, so that neither order nor distribution changes a bit; equal
    scores are ranked by the images' names.

    Args:
        classes: names of the C classes, or C.
        kinds: which IoUs: any of "mask", "box", "boundary"; the last takes longest.

    Example:
        >>> metric = InstanceAP(("person", "car"))
        >>> metric.update(prediction, sample)      # both with instances
        >>> metric.compute()["mask_ap"]
    """

    averages = (
        "COCO's: precision at 101 recalls and the IoUs .50, .55, …, .95, 100 detections of a class "
        "and image at most, means over the classes that have objects"
    )

    def __init__(self, classes: Sequence[str] | int, *, kinds: Sequence[str] = USUAL) -> None:
        names = class_names(classes, "InstanceAP")
        if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
            raise ValueError(f"kinds must be a list of some of {', '.join(KINDS)}, got {kinds!r}")
        self.classes, self.kinds = names, tuple(kinds)
        self.headline = tuple(f"{kind}_ap" for kind in self.kinds)
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self._records: list[dict[str, Any]] = []

    def update(self, prediction: Segmentation, sample: Sample) -> None:
        """Adds one image: its ``instances`` against the sample's.

        Raises:
            ScoreError: either has no instances, their sizes differ, a class index is out of range
                or a score is not finite.
        """
        truth, found = sample.instances, prediction.instances
        name = f"sample {sample.name!r}"
        if truth is None:
            raise ScoreError(f"{name} has no instances to score against")
        if found is None:
            raise ScoreError(
                f"{name}: the prediction has no instances; use a model that detects "
                "objects, or the metric 'semantic'"
            )
        self._add(found, truth, tuple(prediction.size), sample.name)

    def update_instances(self, prediction: Instances, target: Instances, name: str) -> None:
        """Adds one image, without anything around it; ``name`` tells it from all others.

        Raises:
            ScoreError: as `update`.
        """
        self._add(prediction, target, tuple(target.masks.shape[1:]), name)

    def _add(
        self, found: Instances, truth: Instances, size: tuple[int, ...], sample_name: str
    ) -> None:
        name = f"sample {sample_name!r}"
        self._check(truth, size, f"{name}: the ground truth")
        self._check(found, size, f"{name}: the prediction")
        if not found.scores.isfinite().all():
            raise ScoreError(
                f"{name}: the prediction has scores that are not finite: "
                f"{found.scores[~found.scores.isfinite()][0].item()}"
            )
        records = _records(
            [sample_name],
            [(size[0], size[1])],
            _of_instances(found),
            _of_instances(truth),
            self.kinds,
        )
        self._records += records

    def _check(self, instances: Instances, size: tuple[int, ...], what: str) -> None:
        count = len(instances.labels)
        if tuple(instances.masks.shape) != (count, *size) or instances.boxes.shape != (count, 4):
            raise ScoreError(
                f"{what} has masks {list(instances.masks.shape)} and boxes "
                f"{list(instances.boxes.shape)} for {count} labels; they must be "
                f"[{count}, {size[0]}, {size[1]}] and [{count}, 4]"
            )
        labels = instances.labels.tolist()
        wrong = sorted({label for label in labels if not 0 <= label < len(self.classes)})
        if wrong:
            raise ScoreError(
                f"{what} has objects of class {wrong[0]}; classes are 0 to "
                f"{len(self.classes) - 1}, COCO's category ids need converting to "
                "them"
            )
        if not instances.boxes.isfinite().all():
            raise ScoreError(f"{what} has boxes that are not finite")

    def state(self) -> dict[str, list[dict[str, Any]]]:
        """``images``: one record per image; the records of several processes are joined."""
        return {"images": list(self._records)}

    def load_state(self, state: Mapping[str, list[dict[str, Any]]]) -> None:
        """Replaces the records by those of ``state``."""
        self._records = list(state["images"])

    def compute(self) -> dict[str, Any]:
        """The scores so far, as fractions.

        Returns:
            For each kind (``mask_``, ``box_``, ``boundary_``): ``ap``, ``ap50``, ``ap75``,
            ``ap_small``, ``ap_medium``, ``ap_large``, ``ar1``, ``ar10``, ``ar100`` (average recall
            with so many detections an image), ``ar_small``, ``ar_medium``, ``ar_large``; nan where
            there is no such ground truth. ``per_class``: name -> ``mask_ap``, … and ``objects``;
            ``images``, ``objects`` (of ground truth, without crowds) and ``detections``.

        Raises:
            ScoreError: an image was counted twice.
        """
        records = sorted(self._records, key=lambda record: record["name"])
        for one, other in itertools.pairwise(records):
            if one["name"] == other["name"]:
                raise ScoreError(
                    f"sample {one['name']!r} was scored twice; names must differ, and "
                    "each process must score images of its own"
                )
        return _scores(records, self.classes, self.kinds)


# --- the engine -------------------------------------------------------------------------------


@dataclass
class _Objects:
    """Detections or objects of several images."""

    image: np.ndarray  # [K] which, rising
    label: np.ndarray  # [K] class index
    masks: Runs  # empty ones where there are none
    boxes: np.ndarray  # [K, 4] x, y, width, height
    areas: Mapping[str, np.ndarray]  # kind -> [K], which say what is small
    score: np.ndarray  # [K] of detections, zeros of objects
    crowd: np.ndarray  # [K] bool of objects

    def part(self, begin: int, end: int) -> _Objects:
        """Those of some images, which count from 0 then."""
        low, high = np.searchsorted(self.image, (begin, end)).tolist()
        chosen = slice(low, high)
        return _Objects(
            self.image[chosen] - begin,
            self.label[chosen],
            self.masks.part(low, high),
            self.boxes[chosen],
            {kind: areas[chosen] for kind, areas in self.areas.items()},
            self.score[chosen],
            self.crowd[chosen],
        )


def _of_instances(instances: Instances) -> _Objects:
    """Of one image."""
    masks = Runs.of_masks(instances.masks.detach().cpu().numpy().astype(bool, copy=False))
    boxes = instances.boxes.detach().cpu().double().numpy()
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    area = masks.areas().astype(np.float64)
    crowd = np.zeros(len(boxes), bool)
    if instances.crowd is not None:
        crowd = instances.crowd.cpu().bool().numpy()
    return _Objects(
        np.zeros(len(boxes), np.int64),
        instances.labels.detach().cpu().numpy().astype(np.int64),
        masks,
        boxes,
        {"mask": area, "boundary": area, "box": boxes[:, 2] * boxes[:, 3]},
        instances.scores.detach().cpu().double().numpy(),
        crowd,
    )


def _records(
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    found: _Objects,
    truth: _Objects,
    kinds: Sequence[str],
) -> list[dict[str, Any]]:
    """What is kept of images: their matches."""
    chosen, place = ranked(found.image, found.label, found.score)
    image, label = found.image[chosen], found.label[chosen]
    groups = image * (1 + int(label.max(initial=0))) + label
    pairs = same_class((image, label), (truth.image, truth.label))
    ours = chosen[pairs[0]], pairs[1]
    matches = {}
    for kind in kinds:
        if kind == "box":
            overlaps = _box_overlaps(found.boxes, truth.boxes, ours, truth.crowd)
        else:
            overlaps = _mask_overlaps(found.masks, truth.masks, ours, truth.crowd)
            if kind == "boundary":
                near = np.flatnonzero(overlaps >= THRESHOLDS[0])  # of others it does not matter
                some = ours[0][near], ours[1][near]
                edges = _boundary_overlaps(found, truth, some, overlaps[near], sizes)
                overlaps[near] = np.minimum(overlaps[near], edges)
        areas = found.areas[kind][chosen]
        matches[kind] = match(groups, areas, (truth.areas["mask"], truth.crowd), pairs, overlaps)
    ends = [np.searchsorted(side, np.arange(len(names) + 1)) for side in (image, truth.image)]
    counted = np.bincount(found.image, minlength=len(names))
    return [
        {
            "name": name,
            "label": label[a:b].astype(np.int32),
            "score": found.score[chosen[a:b]],
            "place": place[a:b].astype(np.int8),
            "truth": truth.label[c:d].astype(np.int32),
            "crowd": truth.crowd[c:d],
            "detections": int(counted[k]),
            **{
                kind: (made.matched[a:b], made.ignored[a:b], made.left_out[c:d])
                for kind, made in matches.items()
            },
        }
        for k, (name, (a, b), (c, d)) in enumerate(
            zip(names, *(itertools.pairwise(side.tolist()) for side in ends), strict=True)
        )
    ]


def _mask_overlaps(
    found: Runs,
    truth: Runs,
    pairs: tuple[np.ndarray, np.ndarray],
    crowd: np.ndarray,
) -> np.ndarray:
    """IoU of the masks of each pair; with a crowd the share of the detection in it."""
    result = np.zeros(len(pairs[0]))
    ours, theirs = found.boxes()[pairs[0]], truth.boxes()[pairs[1]]
    apart = (ours[:, ::2] > theirs[:, 1::2]) | (theirs[:, ::2] > ours[:, 1::2])
    near = np.flatnonzero(~apart.any(1))
    both = run_overlaps(
        (found.edges, found.counts), (truth.edges, truth.counts), (pairs[0][near], pairs[1][near])
    )
    areas = found.areas()[pairs[0][near]], truth.areas()[pairs[1][near]]
    whole = np.where(crowd[pairs[1][near]], areas[0], areas[0] + areas[1] - both)
    result[near] = both / np.maximum(whole, 1)
    return result


def _boundary_overlaps(
    found: _Objects,
    truth: _Objects,
    pairs: tuple[np.ndarray, np.ndarray],
    overlaps: np.ndarray,
    sizes: Sequence[tuple[int, int]],
) -> np.ndarray:
    """IoU of the boundaries of each pair; with a crowd ``overlaps``."""
    distance = np.array([boundary_distance(size, 0.02) for size in sizes])
    parts, places = [], []
    for side, which in ((found, pairs[0]), (truth, pairs[1])):
        used, place = np.unique(which, return_inverse=True)
        at, _ = side.masks.of(used)
        some = Runs(side.masks.edges[at], side.masks.counts[used], side.masks.lengths[used])
        parts.append(some.boundaries(distance[side.image[used]]))
        places.append(place)
    nobody = np.zeros(len(truth.crowd), bool)
    result = _mask_overlaps(parts[0], parts[1], (places[0], places[1]), nobody)
    return np.where(truth.crowd[pairs[1]], overlaps, result)


def _box_overlaps(
    found: np.ndarray, truth: np.ndarray, pairs: tuple[np.ndarray, np.ndarray], crowd: np.ndarray
) -> np.ndarray:
    """IoU of the boxes of each pair; with a crowd the share of the detection in it."""
    ours, theirs = found[pairs[0]], truth[pairs[1]]
    low = np.maximum(ours[:, :2], theirs[:, :2])
    high = np.minimum(ours[:, :2] + ours[:, 2:], theirs[:, :2] + theirs[:, 2:])
    sides = np.maximum(high - low, 0)
    both = sides[:, 0] * sides[:, 1]
    areas = ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]
    whole = np.where(crowd[pairs[1]], areas[0], areas[0] + areas[1] - both)
    return np.where(both > 0, both / np.where(both > 0, whole, 1), 0.0)


def _scores(
    records: Sequence[Mapping[str, Any]], classes: Sequence[str], kinds: Sequence[str]
) -> dict[str, Any]:
    """COCO's scores of records in the order in which equal scores are ranked."""

    def column(key: str, *dtype: Any) -> np.ndarray:
        none = np.zeros(0, *dtype)
        return np.concatenate([none, *(record[key] for record in records)])

    label, score, place = column("label", np.int32), column("score"), column("place", np.int8)
    truth, crowd = column("truth", np.int32), column("crowd", bool)
    weights = [record.get("times", 1) for record in records]
    times = [
        np.repeat(np.array(weights, np.int64), [len(record[key]) for record in records])
        for key in ("label", "truth")
    ]
    objects = np.bincount(truth[~crowd], times[1][~crowd], minlength=len(classes))
    per_class: list[dict[str, Any]] = [{} for _ in classes]
    scores: dict[str, Any] = {}
    for kind in kinds:
        parts = [record[kind] for record in records]
        shape = len(AREAS), 10
        nothing = np.zeros((0, *shape), bool), np.zeros((0, *shape), bool), np.zeros((0, 4), bool)
        matches = Matches(*(np.concatenate(p) for p in zip(nothing, *parts, strict=True)))
        curves = accumulate(label, score, place, truth, matches, (times[0], times[1]), len(classes))
        scores |= {f"{kind}_{key}": value for key, value in _table(curves).items()}
        for entry, precision in zip(per_class, curves.precision[:, 0], strict=True):
            entry[f"{kind}_ap"] = float(precision.mean())
    for entry, count in zip(per_class, objects.tolist(), strict=True):
        entry["objects"] = int(count)
    return {
        **scores,
        "per_class": dict(zip(classes, per_class, strict=True)),
        "images": sum(weights),
        "objects": int(objects.sum()),
        "detections": sum(
            record["detections"] * weight for record, weight in zip(records, weights, strict=True)
        ),
    }


def _table(curves: Curves) -> dict[str, float]:
    """COCO's 12 numbers."""
    precision, recall = curves.precision, curves.recall  # [C, A, T, R], [C, A, M, T]
    table = {f"ap{area}": _mean(precision[:, a]) for a, area in enumerate(AREAS)}
    table |= {"ap50": _mean(precision[:, 0, 0]), "ap75": _mean(precision[:, 0, 5])}
    table |= {f"ar{most}": _mean(recall[:, 0, m]) for m, most in enumerate(MOST)}
    table |= {f"ar{area}": _mean(recall[:, a, -1]) for a, area in enumerate(AREAS) if area}
    return table


def _mean(values: np.ndarray) -> float:
    """Mean without the classes that have no objects."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else math.nan


# --- COCO's files -----------------------------------------------------------------------------


class CocoFiles:
    """Annotations (instances_*.json) and results, checked, and records of their images.

    Areas are those that pycocotools takes: of ground truth the file's ``area``; of a detection that
    of its ``bbox`` where the results have one, else of its mask.

    Args:
        truth: JSON content with ``images``, ``annotations`` (polygons or RLE) and ``categories``.
        predictions: a list of ``image_id``, ``category_id``, ``score`` and ``segmentation`` (RLE)
            or ``bbox`` (x, y, width, height) or both.
        files: where they are from, for messages.

    Raises:
        ScoreError: a file is not of that form, or a prediction names an image or category that the
            ground truth lacks; the message gives its index.
    """

    def __init__(
        self, truth: Any, predictions: Any, files: tuple[str | os.PathLike[str], ...]
    ) -> None:
        self.files = [str(file) for file in files]
        content = _truth_of(truth, self.files[0])
        results = _results_of(predictions, content, self.files[1])
        images = sorted(content["images"], key=lambda entry: entry["id"])
        categories = sorted(content["categories"], key=lambda entry: entry["id"])
        self.classes = tuple(entry["name"] for entry in categories)
        self.sizes = [(entry["height"], entry["width"]) for entry in images]
        width = max(len(str(entry["id"])) for entry in images)
        self.names = [f"{entry['id']:0{width}d}" for entry in images]  # in the order of ids
        places = (
            {entry["id"]: k for k, entry in enumerate(images)},
            {entry["id"]: k for k, entry in enumerate(categories)},
        )
        held = _held(results)
        if "segmentation" in held:
            held.add("bbox")  # a box follows from a mask
        held &= _held(content["annotations"])
        self.possible = tuple(
            kind for kind in KINDS if ("bbox" if kind == "box" else "segmentation") in held
        )
        if not self.possible:
            raise ScoreError(
                f"{' and '.join(self.files)} share neither bbox nor segmentation in every entry"
            )
        self._entries, self._places = (content["annotations"], results), places

    def prepare(self, kinds: Sequence[str]) -> None:
        """What `records` needs for these kinds of IoU; masks that none asks for are not looked at.

        Raises:
            ScoreError: a kind that the files do not allow, or a mask that is damaged.
        """
        if missing := [kind for kind in kinds if kind not in self.possible]:
            raise ScoreError(
                f"{missing[0]} AP needs a "
                f"{'bbox' if missing[0] == 'box' else 'segmentation'} in every entry of "
                f"{self.files[0]} and {self.files[1]}; they allow {', '.join(self.possible)}"
            )
        masks = set(kinds) != {"box"}
        words = "annotation", "detection"
        self._truth, self._found = (
            self._objects(entries, self._places, f"{file}: {word}", masks)
            for entries, file, word in zip(self._entries, self.files, words, strict=True)
        )

    def _objects(
        self,
        entries: Sequence[dict[str, Any]],
        places: tuple[dict[int, int], dict[int, int]],
        what: str,
        masked: bool,
    ) -> _Objects:
        """The entries, by image and in their order; of their masks what is asked for."""
        image = np.array([places[0][entry["image_id"]] for entry in entries], np.int64)
        order = image.argsort(kind="stable")
        entries, image = [entries[k] for k in order.tolist()], image[order]
        label = np.array([places[1][entry["category_id"]] for entry in entries], np.int64)
        count = len(entries)
        masks = Runs(*(np.zeros(n, np.int64) for n in (0, count, count)))
        boxes = np.zeros((count, 4))
        boxed = all("bbox" in entry for entry in entries)
        if "mask" in self.possible and (masked or not boxed):
            sizes = [self.sizes[k] for k in image.tolist()]
            shapes = [entry["segmentation"] for entry in entries]
            masks = _masks(shapes, sizes, order, what)
            left, right, top, bottom = masks.boxes().T
            boxes = np.stack([left, top, right + 1 - left, bottom + 1 - top], 1).astype(np.float64)
        areas = masks.areas().astype(np.float64)
        if boxed:
            boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
            areas = boxes[:, 2] * boxes[:, 3]
        if all("area" in entry for entry in entries):
            areas = np.array([entry["area"] for entry in entries], np.float64)
        return _Objects(
            image,
            label,
            masks,
            boxes,
            dict.fromkeys(KINDS, areas),
            np.array([entry.get("score", 0.0) for entry in entries], np.float64),
            np.array([entry.get("iscrowd", 0) for entry in entries], bool),
        )

    def records(self, kinds: Sequence[str], begin: int, end: int) -> list[dict[str, Any]]:
        """Records of some images, see `InstanceAP.state`; after `prepare` for these kinds."""
        found, truth = self._found.part(begin, end), self._truth.part(begin, end)
        return _records(self.names[begin:end], self.sizes[begin:end], found, truth, kinds)


def _masks(
    shapes: Sequence[Any],
    sizes: Sequence[tuple[int, int]],
    numbers: np.ndarray,
    what: str,
) -> Runs:
    """Polygons and run-length masks as runs by columns."""
    encoded = [k for k, shape in enumerate(shapes) if isinstance(shape, dict)]
    try:
        edges, counts = edges_of([shapes[k] for k in encoded])
    except ImageError as error:
        where = numbers[encoded[error.index]]  # type: ignore[attr-defined]
        raise ScoreError(f"{what} {where}: {error}") from error
    if len(encoded) < len(shapes):
        parts = dict(zip(encoded, np.split(edges, counts.cumsum()[:-1]), strict=False))
        for k, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
            if k not in parts:
                rings = [np.array(ring, np.float64).reshape(-1, 2) for ring in shape]
                parts[k] = coco_edges(rings, *size)
        edges = np.concatenate([parts[k] for k in range(len(shapes))])
        counts = np.array([len(parts[k]) for k in range(len(shapes))], np.int64)
    return Runs(edges, counts, np.array([height for height, _ in sizes], np.int64))


_TRUTH = {
    "images": [{"id": int, "height": int, "width": int}],
    "categories": [{"id": int, "name": str}],
    "annotations": list,
}
_ANNOTATION = {
    "image_id": int,
    "category_id": int,
    "area": float,
    "iscrowd?": bool,
    "segmentation?": (dict, list),
    "bbox?": [float],
}
_DETECTION = {
    "image_id": int,
    "category_id": int,
    "score": float,
    "segmentation?": (dict, list),
    "bbox?": [float],
}


def _truth_of(content: Any, file: str) -> dict[str, Any]:
    """The checked ground truth of a file: images, categories and annotations."""
    if not isinstance(content, dict):
        raise ScoreError(
            f"{file}: ground truth is an object with images, annotations and categories, "
            f"got a {type(content).__name__}; results go second"
        )
    check_json(content, _TRUTH, f"{file}:", ScoreError)
    truth: dict[str, Any] = {
        key: [{name: entry[name] for name in names} for entry in content[key]]
        for key, names in (("images", ("id", "height", "width")), ("categories", ("id", "name")))
    }
    for key in ("images", "categories"):
        if not truth[key]:
            raise ScoreError(f"{file}: there are no images or no categories: nothing to score")
        if len({entry["id"] for entry in truth[key]}) != len(truth[key]):
            raise ScoreError(f"{file}: two of its {key} have the same id")
    if len({entry["name"] for entry in truth["categories"]}) != len(truth["categories"]):
        raise ScoreError(f"{file}: two categories have the same name")
    for entry in truth["images"]:
        height, width = entry["height"], entry["width"]
        if height < 1 or width < 1:
            raise ScoreError(f"{file}: image {entry['id']} has the size {height} x {width}")
        try:
            check_pixels(height, width, f"image {entry['id']}")
        except ImageError as error:
            raise ScoreError(f"{file}: {error}") from error
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in truth["images"]}
    categories = {entry["id"] for entry in truth["categories"]}
    truth["annotations"] = []
    sure = fits_json(content["annotations"], [_ANNOTATION])
    for index, entry in enumerate(content["annotations"]):
        where = f"{file}: annotation {index}"
        if not sure:
            check_json(entry, _ANNOTATION, where, ScoreError)
        if entry["image_id"] not in sizes:
            raise ScoreError(f"{where} has image_id {entry['image_id']}, which is not in images")
        if entry["category_id"] not in categories:
            raise ScoreError(
                f"{where} has category_id {entry['category_id']}, which is not in categories"
            )
        if entry["area"] < 0:
            raise ScoreError(f"{where} has the area {entry['area']}")
        truth["annotations"].append(
            {
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "area": entry["area"],
                "iscrowd": int(entry.get("iscrowd", 0)),
                **_shape(entry, sizes[entry["image_id"]], where, polygons=True),
            }
        )
    return {**truth, "annotations": _alike(truth["annotations"])}


def _results_of(content: Any, truth: dict[str, Any], file: str) -> list[dict[str, Any]]:
    """The checked detections of a file."""
    if not isinstance(content, list):
        raise ScoreError(
            f"{file}: results are a list of detections, got a "
            f"{type(content).__name__}; ground truth goes first"
        )
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in truth["images"]}
    categories = {entry["id"] for entry in truth["categories"]}
    results = []
    sure = fits_json(content, [_DETECTION])
    for index, entry in enumerate(content):
        where = f"{file}: detection {index}"
        if not sure:
            check_json(entry, _DETECTION, where, ScoreError)
        if entry["image_id"] not in sizes:
            raise ScoreError(
                f"{where} has image_id {entry['image_id']}, which the ground truth "
                "lacks; were these images scored on another split?"
            )
        if entry["category_id"] not in categories:
            raise ScoreError(
                f"{where} has category_id {entry['category_id']}, which the ground "
                "truth lacks; class indices must be converted to category ids"
            )
        results.append(
            {
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "score": float(entry["score"]),
                **_shape(entry, sizes[entry["image_id"]], where, polygons=False),
            }
        )
    return _alike(results)


def _shape(
    entry: Mapping[str, Any], size: tuple[int, int], where: str, *, polygons: bool
) -> dict[str, Any]:
    """``segmentation`` and ``bbox`` of an entry, as far as it has them, checked."""
    shape: dict[str, Any] = {}
    height, width = size
    mask = entry.get("segmentation")
    if isinstance(mask, dict):
        if mask.get("size") != list(size):
            found = reprlib.repr(mask.get("size"))
            raise ScoreError(f"{where} has a mask of size {found}, its image is {list(size)}")
        shape["segmentation"] = mask  # looked at when all are, see `_masks`
    elif mask is not None and not polygons:
        raise ScoreError(
            f"{where} has polygons for a segmentation; that of results must be an RLE, see "
            "pyseg.formats.encode_rle"
        )
    elif mask is not None:
        check_json(mask, [[float]], f"{where}: segmentation", ScoreError)
        for polygon in mask:
            if len(polygon) < 6 or len(polygon) % 2:
                raise ScoreError(
                    f"{where} has a polygon of {len(polygon)} numbers; it must be "
                    "[x0, y0, x1, y1, …] of three points at least"
                )
            # Every edge is walked pixel by pixel: a point far outside would take for ever.
            for values, side in ((polygon[::2], width), (polygon[1::2], height)):
                if min(values) < -side or max(values) > 2 * side:
                    raise ScoreError(
                        f"{where} has a polygon from {min(values):g} to {max(values):g}, far "
                        f"outside its image of {height} x {width} pixels"
                    )
        if not mask:
            raise ScoreError(f"{where} has a segmentation without a polygon")
        shape["segmentation"] = mask
    if "bbox" in entry:
        box = [float(value) for value in entry["bbox"]]
        if len(box) != 4 or box[2] < 0 or box[3] < 0:
            raise ScoreError(f"{where} has bbox {entry['bbox']}; it must be x, y, width, height")
        shape["bbox"] = box
    return shape


def _held(entries: Sequence[Mapping[str, Any]]) -> set[str]:
    """Which of segmentation and bbox every entry has."""
    return {key for key in ("segmentation", "bbox") if all(key in entry for entry in entries)}


def _alike(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries without a segmentation or bbox that not all of them have."""
    absent = {"segmentation", "bbox"} - _held(entries)
    if not absent:
        return entries
    return [{k: v for k, v in entry.items() if k not in absent} for entry in entries]


__all__ = ["KINDS", "CocoFiles", "InstanceAP"]
