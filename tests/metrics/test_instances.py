import contextlib
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pyseg.cli import app
from pyseg.errors import ScoreError
from pyseg.image import decode_rle, encode_rle
from pyseg.metrics.instances import KINDS, InstanceAP
from pyseg.scoring import score_files
from pyseg.types import Instances, Metric, Sample, Segmentation

NAMES = ("person", "car", "dog")
KEYS = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar1",
    "ar10",
    "ar100",
    "ar_small",
    "ar_medium",
    "ar_large",
)


def blob(generator, size, side):
    """A random ellipse, [H, W] bool, never empty."""
    y, x = np.mgrid[: size[0], : size[1]]
    cy, cx = generator.integers(0, size[0]), generator.integers(0, size[1])
    ry, rx = generator.integers(2, side, 2)
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1


def boxes_of(masks):
    rows = []
    for mask in masks:
        y, x = np.nonzero(mask)
        rows.append([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(y) else [0, 0, 0, 0])
    return torch.tensor(np.array(rows, dtype=np.float32).reshape(-1, 4))


def instances(masks, labels, scores=None, crowd=None, size=(0, 0)):
    stacked = np.stack(masks) if masks else np.zeros((0, *size), bool)
    return Instances(
        boxes_of(masks),
        torch.from_numpy(stacked),
        torch.ones(len(masks)) if scores is None else torch.tensor(scores, dtype=torch.float64),
        torch.tensor(labels, dtype=torch.int64),
        None if crowd is None else torch.tensor(crowd),
    )


def random_images(count=12, seed=0, crowds=True):
    """Objects, and detections that are the same moved, of the wrong class, doubled or missing."""
    generator = np.random.default_rng(seed)
    for index in range(count):
        size = tuple(int(side) for side in generator.integers(150, 320, 2))
        side = int(generator.choice([9, 40, 140]))
        truth = [blob(generator, size, side) for _ in range(generator.integers(0, 7))]
        labels = generator.integers(0, 3, len(truth)).tolist()
        crowd = [bool(crowds and generator.random() < 0.2) for _ in truth]
        found, classes = [], []
        for mask, label in zip(truth, labels, strict=True):
            for _ in range(generator.choice([0, 1, 1, 2])):
                found.append(np.roll(mask, generator.integers(-3, 4, 2), (0, 1)))
                classes.append(label if generator.random() < 0.85 else int(generator.integers(3)))
        found += [blob(generator, size, side) for _ in range(generator.integers(0, 3))]
        classes += generator.integers(0, 3, len(found) - len(classes)).tolist()
        scores = np.round(generator.random(len(found)), 1).tolist()  # with many ties
        yield (
            Segmentation(size, NAMES, instances=instances(found, classes, scores, size=size)),
            Sample(
                f"image {index:02}",
                torch.zeros(3, *size, dtype=torch.uint8),
                instances=instances(truth, labels, crowd=crowd, size=size),
            ),
        )


def instance_ap(truth, results, kinds=KINDS):
    metric = f"instances(kinds={tuple(kinds)})"
    return score_files(results, truth, metrics=[metric]).metrics[metric]


def xywh(box):
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def as_coco(images):
    """Ground truth and results as COCO's files have them, results without boxes."""
    truth = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 10 * k, "name": name} for k, name in enumerate(NAMES)],
    }
    results = []
    for number, (prediction, sample) in enumerate(images, 1):
        height, width = prediction.size
        truth["images"].append({"id": number, "height": height, "width": width})
        gt, dt = sample.instances, prediction.instances
        for k in range(len(gt.labels)):
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 10 * int(gt.labels[k]),
                    "segmentation": encode_rle(gt.masks[k]),
                    "bbox": xywh(gt.boxes[k].tolist()),
                    "area": int(gt.masks[k].sum()),
                    "iscrowd": int(gt.crowd[k]),
                }
            )
        for k in range(len(dt.labels)):
            results.append(
                {
                    "image_id": number,
                    "category_id": 10 * int(dt.labels[k]),
                    "score": float(dt.scores[k]),
                    "segmentation": encode_rle(dt.masks[k]),
                }
            )
    return truth, results


def boundary(mask, ratio=0.02):
    """Inner boundary by the distance transform: pixels within d (chessboard) of the outside."""
    ndimage = pytest.importorskip("scipy.ndimage")
    width = max(1, round(ratio * math.hypot(*mask.shape)))
    inside = ndimage.distance_transform_cdt(np.pad(mask, 1), "chessboard")[1:-1, 1:-1]
    return mask & (inside <= width)


def pycocotools_scores(truth, results, kind):
    """The 12 numbers of pycocotools, and AP by category; "boundary" by brute force."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")

    class Evaluation(cocoeval.COCOeval):
        def computeIoU(self, image, category):
            overlaps = super().computeIoU(image, category)
            if kind != "boundary" or len(overlaps) == 0:
                return overlaps
            truths, found = self._gts[image, category], self._dts[image, category]
            order = np.argsort([-entry["score"] for entry in found], kind="mergesort")
            for row, index in enumerate(order[: len(overlaps)]):
                one = boundary(decode_rle(found[index]["segmentation"]).numpy())
                for column, entry in enumerate(truths):
                    if not entry["iscrowd"]:
                        other = boundary(decode_rle(entry["segmentation"]).numpy())
                        union = (one | other).sum()
                        share = (one & other).sum() / union if union else 0.0
                        overlaps[row, column] = min(overlaps[row, column], share)
            return overlaps

    with contextlib.redirect_stdout(io.StringIO()):
        images = coco.COCO()
        images.dataset = json.loads(json.dumps(truth))
        images.createIndex()
        found = images.loadRes(json.loads(json.dumps(results)))
        evaluation = Evaluation(images, found, "bbox" if kind == "box" else "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    by_category = [
        precision[:, :, k][precision[:, :, k] > -1].mean()
        if (precision[:, :, k] > -1).any()
        else -1
        for k in range(precision.shape[2])
    ]
    return evaluation.stats, by_category


def agree(got, want):
    got = [-1 if math.isnan(value) else value for value in got]
    assert got == pytest.approx(list(want), abs=1e-6)


def computed(images):
    metric = InstanceAP(NAMES, kinds=KINDS)
    for image in images:
        metric.update(*image)
    return metric.compute()


def test_it_is_a_metric():
    assert isinstance(InstanceAP(NAMES), Metric)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["mask", "box", "boundary"])
def test_random_objects_against_pycocotools(kind, seed, tmp_path):
    images = list(random_images(seed=seed))
    truth, results = as_coco(images)
    if kind == "box":
        for entry in results:
            y, x = np.nonzero(decode_rle(entry["segmentation"]).numpy())
            box = [x.min(), y.min(), x.max() + 1, y.max() + 1] if len(y) else [0, 0, 0, 0]
            entry["bbox"] = [int(value) for value in xywh(box)]
    want, by_category = pycocotools_scores(truth, results, kind)
    assert 0.05 < want[0] < 0.95
    memory = computed(images)
    for name, content in (("truth", truth), ("results", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = instance_ap(tmp_path / "truth.json", tmp_path / "results.json")
    for got in (memory, files):
        agree([got[f"{kind}_{key}"] for key in KEYS], want)
        agree([got["per_class"][name][f"{kind}_ap"] for name in NAMES], by_category)
    assert files["images"] == memory["images"] == 12
    assert files["detections"] == memory["detections"] == len(results)
    assert memory["objects"] == sum(not entry["iscrowd"] for entry in truth["annotations"])


def random_set(generator):
    """A small ground truth and results: ties, crowds, images and classes with nothing."""
    size = tuple(int(side) for side in generator.integers(8, 40, 2))
    truth = {
        "images": [
            {"id": 7 * k + 3, "height": size[0], "width": size[1]}
            for k in range(generator.integers(1, 5))
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(NAMES)],
        "annotations": [],
    }
    results = []
    boxes = generator.random() < 0.5
    for number in range(1, generator.integers(2, 15)):
        mask = blob(generator, size, int(generator.choice([3, 8, 30])))
        common = {
            "image_id": int(generator.choice(truth["images"])["id"]),
            "category_id": int(generator.integers(0, 3)),
        }
        if generator.random() < 0.8:
            area = int(mask.sum()) * int(generator.choice([1, 1, 60]))
            more = {"id": number, "area": area, "iscrowd": int(generator.random() < 0.2)}
            shape = {"segmentation": encode_rle(mask), "bbox": box_around(mask)}
            truth["annotations"].append({**common, **more, **shape})
        for _ in range(generator.choice([0, 1, 1, 2, 12])):
            moved = np.roll(mask, generator.integers(-1, 2, 2), (0, 1))
            entry = {**common, "score": float(generator.integers(0, 4)) / 4}
            entry["segmentation"] = encode_rle(moved)
            results.append(entry | ({"bbox": box_around(moved)} if boxes else {}))
    return truth, results


def box_around(mask):
    y, x = np.nonzero(mask)
    if not len(y):
        return [0, 0, 0, 0]
    return [int(v) for v in (x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min())]


def as_runs(entry):
    """The same with its mask as a list of runs."""
    flat = decode_rle(entry["segmentation"]).numpy().T.ravel()
    turns = np.flatnonzero(np.diff(flat, prepend=False))
    runs = np.diff(np.concatenate([[0], turns, [flat.size]])).tolist()
    return {**entry, "segmentation": {**entry["segmentation"], "counts": runs}}


def test_200_random_sets_against_pycocotools(tmp_path):
    generator = np.random.default_rng()
    files = tmp_path / "results.json", tmp_path / "truth.json"
    metric = "instances(kinds=('mask', 'box'))"
    compared = 0
    for _ in range(200):
        truth, results = random_set(generator)
        mixed = [as_runs(e) if generator.random() < 0.3 else e for e in results]
        for file, content in zip(files, (mixed, truth), strict=True):
            file.write_text(json.dumps(content))
        got = score_files(*files, metrics=[metric]).metrics[metric]
        assert got["detections"] == len(results)
        for kind in ("mask", "box"):
            if not results:  # which pycocotools cannot load
                assert got[f"{kind}_ap"] == 0 or math.isnan(got[f"{kind}_ap"])
                continue
            want, by_category = pycocotools_scores(truth, results, kind)
            found = [got[f"{kind}_{key}"] for key in KEYS]
            found += [got["per_class"][name][f"{kind}_ap"] for name in NAMES]
            found = [-1 if math.isnan(value) else value for value in found]
            assert found == pytest.approx([*want, *by_category], abs=1e-12)
            compared += 0 < want[0] < 1
    assert compared > 200


def test_voc3_against_the_stored_numbers_of_pycocotools(data_folder):
    folder = data_folder("instance/voc3")
    got = instance_ap(folder / "annotations_coco.json", folder / "predictions.json")
    want = json.loads((folder / "expected_ap.json").read_text())["results"]
    theirs = (
        "AP",
        "AP50",
        "AP75",
        "APs",
        "APm",
        "APl",
        "AR1",
        "AR10",
        "AR100",
        "ARs",
        "ARm",
        "ARl",
    )
    for kind, name in (("mask", "segm"), ("box", "bbox")):
        agree([got[f"{kind}_{key}"] for key in KEYS], [want[name][key] for key in theirs])
        for category, value in want[name]["AP_per_category"].items():
            assert got["per_class"][category][f"{kind}_ap"] == pytest.approx(value, abs=1e-6)
    assert 0 < got["boundary_ap"] < got["mask_ap"]


def test_perfect_predictions_score_one():
    images = []
    for prediction, sample in random_images(6, seed=4, crowds=False):
        images.append((Segmentation(prediction.size, NAMES, instances=sample.instances), sample))
    got = computed(images)
    for kind in ("mask", "box", "boundary"):
        assert got[f"{kind}_ap"] == pytest.approx(1) and got[f"{kind}_ar100"] == pytest.approx(1)


def test_order_and_splitting_change_no_bit():
    images = list(random_images(seed=6))
    want = json.dumps(computed(images))
    generator = np.random.default_rng(0)
    for _ in range(3):
        parts = [InstanceAP(NAMES, kinds=KINDS) for _ in range(4)]
        for index in generator.permutation(len(images)):
            parts[generator.integers(4)].update(*images[index])
        merged = InstanceAP(NAMES, kinds=KINDS)
        states = [parts[k].state() for k in generator.permutation(4)]
        merged.load_state({"images": [record for state in states for record in state["images"]]})
        assert json.dumps(merged.compute()) == want


def test_a_crowd_neither_counts_nor_punishes():
    mask = np.zeros((20, 20), bool)
    mask[:, :10] = True
    other = ~mask
    size = (20, 20)
    for crowd in (False, True):
        prediction = Segmentation(
            size, NAMES, instances=instances([mask, other], [0, 0], [0.5, 0.9])
        )
        sample = Sample(
            "a",
            torch.zeros(3, 20, 20),
            instances=instances([mask, other], [0, 0], crowd=[False, crowd]),
        )
        assert computed([(prediction, sample)])["mask_ap"] == pytest.approx(1)
    alone = Segmentation(size, NAMES, instances=instances([mask], [0], [0.5]))
    assert computed([(alone, sample)])["mask_ap"] == pytest.approx(1)


def test_nothing_found_and_nothing_to_find():
    mask = np.ones((8, 9), bool)
    some, none = instances([mask], [1]), instances([], [], size=(8, 9))
    image = torch.zeros(3, 8, 9, dtype=torch.uint8)
    missed = computed(
        [(Segmentation((8, 9), NAMES, instances=none), Sample("a", image, instances=some))]
    )
    assert missed["mask_ap"] == missed["box_ap"] == missed["boundary_ap"] == 0
    assert math.isnan(missed["per_class"]["dog"]["mask_ap"]) and missed["detections"] == 0
    for found in (some, none):
        got = computed(
            [(Segmentation((8, 9), NAMES, instances=found), Sample("a", image, instances=none))]
        )
        assert math.isnan(got["mask_ap"]) and got["objects"] == 0
    assert math.isnan(InstanceAP(NAMES).compute()["box_ap"])


def test_kinds():
    metric = InstanceAP(NAMES, kinds=("box",))
    metric.update(*next(random_images(1, seed=1)))
    assert metric.headline == ("box_ap",) and not any("mask" in key for key in metric.compute())
    for kinds in ("mask", (), ("masks",)):
        with pytest.raises(ValueError, match="kinds"):
            InstanceAP(NAMES, kinds=kinds)


def test_bad_input():
    prediction, sample = next(random_images(1, seed=2))
    metric = InstanceAP(NAMES)
    with pytest.raises(ScoreError, match=r"'image 00'.*no instances to score"):
        metric.update(prediction, Sample(sample.name, sample.image))
    with pytest.raises(ScoreError, match="prediction has no instances"):
        metric.update(Segmentation(prediction.size, NAMES), sample)
    mask = np.ones((8, 9), bool)
    image = torch.zeros(3, 8, 9, dtype=torch.uint8)
    good = Sample("b", image, instances=instances([mask], [0]))

    def predicted(**options):
        return Segmentation((8, 9), NAMES, instances=instances(**options))

    with pytest.raises(ScoreError, match="class 3"):
        metric.update(predicted(masks=[mask], labels=[3]), good)
    with pytest.raises(ScoreError, match="not finite: nan"):
        metric.update(predicted(masks=[mask], labels=[0], scores=[math.nan]), good)
    with pytest.raises(ScoreError, match=r"'b'.*masks \[1, 9, 8\]"):
        metric.update(predicted(masks=[mask.T], labels=[0]), good)
    assert metric.state() == {"images": []}
    for _ in range(2):
        metric.update(predicted(masks=[mask], labels=[0]), good)
    with pytest.raises(ScoreError, match="'b' was scored twice"):
        metric.compute()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, r: r[1].update(image_id=99), r"results.json: detection 1 .*image_id 99"),
        (lambda t, r: r[0].update(category_id=2), r"detection 0 .*category_id 2"),
        (
            lambda t, r: r[0].update(score=math.nan),
            r"detection 0: score must be a finite number, got nan",
        ),
        (lambda t, r: r[2].pop("score"), r"detection 2 lacks 'score'"),
        (lambda t, r: r[0]["segmentation"].update(size=[3, 4]), r"mask of size \[3, 4\]"),
        (lambda t, r: r[0].update(bbox=[1, 2, 3]), r"bbox"),
        (lambda t, r: r.__setitem__(0, 7), r"detection 0 must be an object, got 7"),
        (lambda t, r: t["annotations"][1].update(image_id=99), r"truth.json: annotation 1 .*99"),
        (lambda t, r: t["annotations"][1].pop("area"), r"annotation 1 lacks 'area'"),
        (lambda t, r: t.pop("categories"), r"truth.json: lacks 'categories'"),
        (lambda t, r: t["images"].clear(), r"no images"),
        (lambda t, r: [e.pop("segmentation") for e in r], "neither bbox nor segmentation"),
    ],
)
def test_bad_files(change, message, tmp_path):
    truth, results = as_coco(random_images(4, seed=3))
    change(truth, results)
    for name, content in (("truth", truth), ("results", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(ScoreError, match=message):
        instance_ap(tmp_path / "truth.json", tmp_path / "results.json")


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(ScoreError, match="cannot be read as JSON"):
        instance_ap(tmp_path / "a.json", tmp_path / "b.json")
    with pytest.raises(ScoreError, match="does not exist"):
        instance_ap(tmp_path / "c.json", tmp_path / "b.json")
    with pytest.raises(ScoreError, match="results go second"):
        instance_ap(tmp_path / "b.json", tmp_path / "b.json")


def test_command(tmp_path):
    truth, results = as_coco(random_images(4, seed=3))
    for name, content in (("truth", truth), ("results", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    def run(*arguments):
        return CliRunner().invoke(app, ["score", *arguments, str(tmp_path / "truth.json")])

    file = str(tmp_path / "results.json")
    want = instance_ap(tmp_path / "truth.json", file, ("mask", "box"))
    found = json.loads(run("--json", file).output)
    assert found["metrics"]["instances"]["mask_ap"] == want["mask_ap"]
    assert "boundary_ap" not in found["metrics"]["instances"]
    shown = run(file)
    for kind in ("mask", "box"):
        assert re.search(rf"instances {kind}_ap +{want[f'{kind}_ap']:.4f}", shown.output)
    wrong = run(str(tmp_path / "none.json"))
    assert wrong.exit_code == 2 and "does not exist" in wrong.output


def test_box_results_alone(tmp_path):
    truth, results = as_coco(random_images(6, seed=5))
    for entry in results:
        entry["bbox"] = [1.0, 2.0, 30.5, 40.0]
        del entry["segmentation"]
    for name, content in (("truth", truth), ("results", results), ("none", [])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(ScoreError, match="mask AP needs a segmentation"):
        instance_ap(tmp_path / "truth.json", tmp_path / "results.json")
    (got,) = score_files(tmp_path / "results.json", tmp_path / "truth.json").metrics.values()
    assert "box_ap" in got and "mask_ap" not in got
    with pytest.raises(ScoreError, match="mask AP needs"):
        instance_ap(tmp_path / "truth.json", tmp_path / "results.json", kinds=["mask"])
    assert instance_ap(tmp_path / "truth.json", tmp_path / "none.json")["mask_ap"] == 0
