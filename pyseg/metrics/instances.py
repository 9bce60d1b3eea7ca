"""`InstanceAP`: COCO's average precision of masks, boxes and boundaries, by faster-coco-eval."""

from __future__ import annotations

import copy
import itertools
import math
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import ImageError, ScoreError
from ..files import check_json, read_json
from ..formats import compressed_rle, encode_rle
from ..image import check_pixels
from ..types import Instances, Sample, Segmentation
from .inputs import class_names

KINDS = ("mask", "box", "boundary")
_COCO_NAME = {"mask": "segm", "box": "bbox", "boundary": "boundary"}
_AREAS = ("", "_small", "_medium", "_large")  # all, below 32^2, to 96^2, above


class InstanceAP:
    """Average precision and recall of detected objects, as COCO defines them.

    AP is the mean over classes and over the IoU thresholds .50, .55, …, .95 of the area under the
    precision-recall curve, sampled at 101 recalls; detections are matched greedily by score, 100
    per image and class at most; ground truth marked as crowd neither counts nor punishes (Lin et
    al. 2014; pycocotools). IoU is that of masks, of boxes, or for the boundary AP the smaller of
    mask IoU and boundary IoU, with a boundary as wide as 2 % of the image diagonal (Cheng et al.
    2021). Numbers are faster-coco-eval's, which equal pycocotools'.

    An object's size, for the scores of small (below 32^2 pixels), medium and large (from 96^2 on)
    objects, is the area of its mask; for boxes a detection's is that of its box.

    The state is one record per image, so that neither order nor distribution changes a bit; equal
    scores are ranked by the images' names.

    Args:
        classes: names of the C classes, or C.
        kinds: which IoUs: any of "mask", "box", "boundary".

    Raises:
        ImportError: faster-coco-eval is not installed.

    Example:
        >>> metric = InstanceAP(("person", "car"))
        >>> metric.update(prediction, sample)      # both with instances
        >>> metric.compute()["mask_ap"]
    """

    def __init__(self, classes: Sequence[str] | int, *, kinds: Sequence[str] = KINDS) -> None:
        names = class_names(classes, "InstanceAP")
        if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
            raise ValueError(f"kinds must be a list of some of {', '.join(KINDS)}, got {kinds!r}")
        _faster_coco_eval()  # better now than after an hour of images
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
        crowd = [False] * len(truth.labels) if truth.crowd is None else truth.crowd.tolist()
        self._records.append(
            {
                "name": sample_name,
                "size": size,
                "truth": [
                    {**entry, "area": int(mask.sum()), "iscrowd": int(many)}
                    for entry, mask, many in zip(_entries(truth), truth.masks, crowd, strict=True)
                ],
                "detections": [
                    {**entry, "score": score}
                    for entry, score in zip(_entries(found), found.scores.tolist(), strict=True)
                ],
            }
        )

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
        truth = {
            "images": [
                {"id": k, "height": record["size"][0], "width": record["size"][1]}
                for k, record in enumerate(records, 1)
            ],
            "categories": [{"id": k, "name": name} for k, name in enumerate(self.classes)],
            "annotations": [
                {**entry, "image_id": k, "id": 0}
                for k, record in enumerate(records, 1)
                for entry in record["truth"]
            ],
        }
        found = [
            {**entry, "image_id": k}
            for k, record in enumerate(records, 1)
            for entry in record["detections"]
        ]
        # Given a box as well, COCO takes its area for that of the mask.
        masks = [{k: v for k, v in entry.items() if k != "bbox"} for entry in found]
        return _scores(truth, {kind: found if kind == "box" else masks for kind in self.kinds})


def instance_ap(
    truth: str | os.PathLike[str],
    predictions: str | os.PathLike[str],
    kinds: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Average precision of COCO files: annotations (instances_*.json) and results.

    Areas are those that pycocotools takes: of ground truth the file's ``area``; of a detection that
    of its ``bbox`` where the results have one, else of its mask.

    Args:
        truth: JSON with ``images``, ``annotations`` (polygons or RLE) and ``categories``.
        predictions: JSON list of ``image_id``, ``category_id``, ``score`` and ``segmentation``
            (RLE) or ``bbox`` (x, y, width, height) or both.
        kinds: any of "mask", "box", "boundary"; None = those that both files allow.

    Returns:
        As `InstanceAP.compute`.

    Raises:
        ScoreError: a file cannot be read or is not of that form, or a prediction names an image or
            category that the ground truth lacks; the message gives its index.
        ImportError: faster-coco-eval is not installed.
    """
    _faster_coco_eval()
    annotations = _truth_of(read_json(truth, ScoreError), str(truth))
    results = _results_of(read_json(predictions, ScoreError), annotations, str(predictions))
    held = _held(results)
    if "segmentation" in held:
        held.add("bbox")  # a box follows from a mask
    held &= _held(annotations["annotations"])
    possible = [kind for kind in KINDS if ("bbox" if kind == "box" else "segmentation") in held]
    if kinds is None:
        kinds = possible
    if isinstance(kinds, str) or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds must be a list of some of {', '.join(KINDS)}, got {kinds!r}")
    if missing := [kind for kind in kinds if kind not in possible]:
        raise ScoreError(
            f"{missing[0]} AP needs a "
            f"{'bbox' if missing[0] == 'box' else 'segmentation'} in every entry of "
            f"{truth} and {predictions}; they allow "
            f"{', '.join(possible) or 'none'}"
        )
    if not kinds:
        raise ScoreError(
            f"{truth} and {predictions} share neither bbox nor segmentation in every entry"
        )
    return _scores(annotations, dict.fromkeys(kinds, results))


def _entries(instances: Instances) -> Iterator[dict[str, Any]]:
    for label, mask, box in zip(
        instances.labels.tolist(), instances.masks, instances.boxes.tolist(), strict=True
    ):
        left, top, right, bottom = box
        yield {
            "category_id": label,
            "segmentation": encode_rle(mask),
            "bbox": [left, top, right - left, bottom - top],
        }


def _faster_coco_eval() -> Any:
    try:
        import faster_coco_eval
    except ImportError as error:
        raise ImportError(
            "instance AP needs faster-coco-eval; run pip install 'pyseg-toolkit[coco]'"
        ) from error
    return faster_coco_eval


def _scores(truth: dict[str, Any], found: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """COCO's scores; ``found`` has the detections for each kind."""
    names = {entry["id"]: entry["name"] for entry in truth["categories"]}
    objects = dict.fromkeys(names, 0)
    for entry in truth["annotations"]:
        objects[entry["category_id"]] += not entry.get("iscrowd", 0)
    scores: dict[str, Any] = {}
    per_class: dict[str, dict[str, float]] = {names[k]: {} for k in sorted(names)}
    for kind, detections in found.items():
        table, by_class = _evaluate(truth, detections, _COCO_NAME[kind])
        scores.update({f"{kind}_{key}": value for key, value in table.items()})
        for k, value in zip(sorted(names), by_class, strict=True):
            per_class[names[k]][f"{kind}_ap"] = value
    return {
        **scores,
        "per_class": {
            names[k]: {**per_class[names[k]], "objects": objects[k]} for k in sorted(names)
        },
        "images": len(truth["images"]),
        "objects": sum(objects.values()),
        "detections": len(next(iter(found.values()))),
    }


def _evaluate(
    truth: dict[str, Any], detections: Sequence[dict[str, Any]], kind: str
) -> tuple[dict[str, float], list[float]]:
    """The 12 numbers of COCO's table, and the AP of every category in the order of ids."""
    package = _faster_coco_eval()
    truth = copy.deepcopy(truth)  # the evaluation writes into its annotations
    for number, entry in enumerate(truth["annotations"], 1):
        entry["id"] = number  # COCO takes a match with id 0 for none
    images = package.COCO(truth)
    evaluation = package.COCOeval_faster(
        images, images.loadRes(copy.deepcopy(list(detections))), kind
    )
    evaluation.evaluate()
    evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    # precision [threshold, recall, class, area, detections], recall [threshold, class, area, …]
    table = {f"ap{area}": _mean(precision[:, :, :, k, 2]) for k, area in enumerate(_AREAS)}
    table |= {"ap50": _mean(precision[0, :, :, 0, 2]), "ap75": _mean(precision[5, :, :, 0, 2])}
    table |= {f"ar{n}": _mean(recall[:, :, 0, k]) for k, n in enumerate((1, 10, 100))}
    table |= {f"ar{area}": _mean(recall[:, :, k, 2]) for k, area in enumerate(_AREAS) if k}
    return table, [_mean(precision[:, :, k, 0, 2]) for k in range(precision.shape[2])]


def _mean(values: Any) -> float:
    """Mean without the -1 of classes that have no ground truth."""
    present = values[values > -1]
    return float(present.mean()) if present.size else math.nan


# --- COCO's files -----------------------------------------------------------------------------
#
# The evaluation is C++ that believes what it is given: it gets entries of our own making, with
# checked values and nothing else of the file.

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
    for index, entry in enumerate(content["annotations"]):
        where = f"{file}: annotation {index}"
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
    for index, entry in enumerate(content):
        where = f"{file}: detection {index}"
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
        try:
            shape["segmentation"] = compressed_rle(mask)
        except ImageError as error:
            raise ScoreError(f"{where}: {error}") from error
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
    return [{k: v for k, v in entry.items() if k not in absent} for entry in entries]


__all__ = ["InstanceAP", "instance_ap"]
