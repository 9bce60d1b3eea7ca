"""Panoptic against panopticapi's published numbers, a table, and its own definition."""

import json
import math
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pyseg import cli, scoring
from pyseg.errors import ImageError, LabelError, ScoreError
from pyseg.image import read_segment_ids, write_panoptic
from pyseg.metrics.panoptic import GROUPS, Panoptic
from pyseg.types import Metric, Sample, Segment, Segmentation, Segments

NAMES = ("person", "car", "sky", "road")
THINGS = ("person", "car")


def segments(ids, labels, crowds=()):
    """Segments of a map; ``labels`` gives the class of every id."""
    ids = torch.as_tensor(ids, dtype=torch.int32)
    found = [k for k in ids.unique().tolist() if k]
    return Segments(
        ids, tuple(Segment(k, labels[k], 1.0, int((ids == k).sum()), k in crowds) for k in found)
    )


def pair(prediction, target, name="a"):
    size = tuple(target.map.shape)
    return (
        Segmentation(size, NAMES, segments=prediction),
        Sample(name, torch.zeros(3, *size, dtype=torch.uint8), segments=target),
    )


def random_images(count, seed=0):
    generator = np.random.default_rng(seed)
    labels = {k: k % 4 for k in range(12)}
    for index in range(count):
        target = generator.integers(0, 12, (6, 8)).repeat(5, 0).repeat(4, 1)
        prediction = np.where(generator.random(target.shape) < 0.8, target, np.roll(target, 3, 1))
        yield pair(segments(prediction, labels), segments(target, labels, {5, 9}), f"image {index}")


def scored(images, **options):
    metric = Panoptic(NAMES, things=THINGS, **options)
    for image in images:
        metric.update(*image)
    return metric


def score_files(target, prediction, metric="panoptic", **folders):
    """As panopticapi prints it."""
    scores = scoring.score_files(prediction, target, metrics=[metric], **folders).metrics[metric]
    groups = zip(("All", "Things", "Stuff"), GROUPS, ("classes", "things", "stuff"), strict=True)
    return {
        **{
            title: {
                **{key: scores[key + group] for key in ("pq", "sq", "rq")},
                "n": scores[f"{counted}_counted"],
            }
            for title, group, counted in groups
        },
        "per_class_counts": {
            name: {key: entry[key] for key in ("tp", "fp", "fn", "iou_sum")}
            for name, entry in scores["per_class"].items()
            if any(entry[key] for key in ("tp", "fp", "fn"))
        },
    }


def assert_equal(got, want, tolerance=1e-9):
    for group in ("All", "Things", "Stuff"):
        assert got[group] == pytest.approx(want[group], abs=tolerance), group


def test_it_is_a_metric():
    assert isinstance(Panoptic(NAMES), Metric)


@pytest.fixture(scope="module")
def coco(data_folder):
    return data_folder("panoptic/coco_sample")


# --- published numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["identity", "shift_x6_y4", "edited", "merged"])
def test_against_panopticapi_on_coco(coco, name):
    want = json.loads((coco / "expected_pq.json").read_text())["results"][name]
    got = score_files(coco / "panoptic_examples.json", coco / f"predictions/{name}.json")
    assert_equal(got, want)
    assert got["per_class_counts"].keys() == want["per_class_counts"].keys()
    for label, counts in want["per_class_counts"].items():
        counts.pop("category_id")
        assert got["per_class_counts"][label] == pytest.approx(counts, abs=1e-9), label


def coco_images(coco):
    """The sample's images as (ids, annotation), and its categories."""
    truth = json.loads((coco / "panoptic_examples.json").read_text())
    folder = coco / "panoptic_examples"
    return [(read_segment_ids(folder / a["file_name"]), a) for a in truth["annotations"]], truth[
        "categories"
    ]


def coco_segments(ids, infos, index):
    """What a prediction made of a map: areas are its own, and nothing is a crowd."""
    present = set(ids.unique().tolist())
    return Segments(
        ids,
        tuple(
            Segment(i["id"], index[i["category_id"]], 1.0, int((ids == i["id"]).sum()))
            for i in infos
            if i["id"] in present
        ),
    )


def coco_scores(coco, change):
    """Scores of the ground truth itself after ``change(ids, infos, categories) -> ids, infos``."""
    images, categories = coco_images(coco)
    index = {entry["id"]: k for k, entry in enumerate(categories)}
    metric = Panoptic(
        [c["name"] for c in categories],
        things=[k for k, c in enumerate(categories) if c["isthing"]],
    )
    for ids, entry in images:
        target = Segments(
            ids,
            tuple(
                Segment(i["id"], index[i["category_id"]], 1.0, i["area"], bool(i["iscrowd"]))
                for i in entry["segments_info"]
            ),
        )
        changed, infos = change(ids, entry["segments_info"], {c["id"]: c for c in categories})
        metric.update_segments(coco_segments(changed, infos, index), target, entry["file_name"])
    return metric.compute()


# Rolled by so many columns: PQ, SQ, RQ, PQ of things, PQ of stuff, in percent, by panopticapi.
ROLLED = {
    2: (85.1593, 85.5378, 99.5192, 78.4775, 91.8412),
    4: (67.2283, 69.9237, 83.4790, 48.4673, 85.9893),
    8: (52.6495, 61.2358, 72.2028, 27.7444, 77.5545),
    16: (30.6213, 33.8803, 43.7500, 6.5180, 54.7247),
}
KEYS = ("pq", "sq", "rq", "pq_things", "pq_stuff")


@pytest.mark.parametrize("shift", ROLLED)
def test_rolled_ground_truth(coco, shift):
    got = coco_scores(coco, lambda ids, infos, _: (torch.roll(ids, shift, 1), infos))
    assert [100 * got[key] for key in KEYS] == pytest.approx(ROLLED[shift], abs=5e-5)


def test_things_of_a_class_merged(coco):
    def merge(ids, infos, categories):
        first, ids = {}, ids.clone()
        for info in infos:
            if categories[info["category_id"]]["isthing"]:
                ids[ids == info["id"]] = first.setdefault(info["category_id"], info["id"])
        return ids, infos

    got = coco_scores(coco, merge)
    assert [100 * got[key] for key in KEYS] == pytest.approx(
        (68.9594, 72.1891, 70.8333, 37.9188, 100), abs=5e-5
    )


def test_ignored_pixels_never_matter(coco):
    """Crowds predicted as void, and void predicted as sky, both leave 100 %."""

    def crowd_to_void(ids, infos, _):
        ids = ids.clone()
        for info in infos:
            if info["iscrowd"]:
                ids[ids == info["id"]] = 0
        return ids, infos

    def void_to_sky(ids, infos, _):
        (sky,) = [info["id"] for info in infos if info["category_id"] == 187]
        return torch.where(ids == 0, sky, ids), infos

    for change in (crowd_to_void, void_to_sky):
        got = coco_scores(coco, change)
        assert got["pq"] == got["sq"] == got["rq"] == 1.0
        assert (got["classes_counted"], got["things_counted"], got["stuff_counted"]) == (8, 4, 4)


def read_bdd(path):
    """BDD100K: R = class, (B << 8) + A = instance; a segment is a pair of both."""
    rgba = np.asarray(Image.open(path)).astype(np.int64)
    pairs = rgba[..., 0] << 16 | rgba[..., 2] << 8 | rgba[..., 3]
    pairs[rgba[..., 0] == 0] = 0
    return torch.from_numpy(pairs.astype(np.int32))


@pytest.mark.parametrize(
    "folder, key",
    [("gt", "gt_vs_pred"), ("gt_extra", "gt_extra_vs_pred (c.png has no prediction)")],
)
def test_against_bdd100k(data_folder, folder, key):
    """Equal to panopticapi; BDD100K's own tools do not take void out of unions: 2e-4 % less."""
    data = data_folder("panoptic/bdd100k")
    expected = json.loads((data / "expected_pq.json").read_text())
    metric = Panoptic(expected["categories"], things=range(31, 41))
    for path in sorted((data / folder).glob("*.png")):
        target, guess = read_bdd(path), data / "pred" / path.name
        # its tools count what is there in an image without prediction as missed
        ids = read_bdd(guess) if guess.exists() else torch.zeros_like(target)
        labels = {k: k >> 16 for k in [*target.unique().tolist(), *ids.unique().tolist()]}
        metric.update_segments(segments(ids, labels), segments(target, labels), path.name)
    got, want = metric.compute(), expected[key]
    for group, suffix in (("", ""), ("_things", "/THING"), ("_stuff", "/STUFF")):
        for score in ("pq", "sq", "rq"):
            assert 100 * got[score + group] == pytest.approx(want[score.upper() + suffix], abs=5e-4)
    counted = [got[f"{g}_counted"] for g in ("classes", "things", "stuff")]
    assert counted == [want[f"N{suffix}"] for suffix in ("", "/THING", "/STUFF")]
    if folder == "gt":
        exact = expected["panopticapi_after_conversion (fractions)"]
        for group, title in (("", "All"), ("_things", "Things"), ("_stuff", "Stuff")):
            for score in ("pq", "sq", "rq"):
                assert got[score + group] == pytest.approx(exact[title][score], abs=1e-9)


@pytest.mark.parametrize(
    "images, key",
    [
        (["team"], "team_only (classes 1,2)"),
        (["bird", "cat", "team"], "bird+cat+team (classes 1..6)"),
    ],
)
def test_against_deeplab2(data_folder, images, key):
    data = data_folder("panoptic/deeplab2")
    expected = json.loads((data / "expected_pq.json").read_text())
    metric = Panoptic(expected["class_names"])
    for name in images:
        maps = np.load(data / f"{name}_decoded.npz")
        ids = {
            side: torch.from_numpy(
                np.where(
                    maps[f"{side}_class"] == 0,
                    0,
                    maps[f"{side}_class"].astype(np.int32) * 256 + maps[f"{side}_instance"],
                )
            )
            for side in ("gt", "pred")
        }
        labels = {k: k // 256 for side in ids.values() for k in side.unique().tolist()}
        metric.update_segments(segments(ids["pred"], labels), segments(ids["gt"], labels), name)
    got = metric.compute()
    classes = [c for c in got["per_class"].values() if c["tp"] + c["fp"] + c["fn"]]
    means = [np.mean([c[k] for c in classes]) for k in ("pq", "sq", "rq", "tp", "fn", "fp")]
    assert means == pytest.approx(expected[key], abs=1e-6)


# --- the definition ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_against_sets_of_pixels(seed):
    images = list(random_images(4, seed))
    totals = {name: [0, 0, 0, 0.0] for name in NAMES}
    for prediction, sample in images:
        guess, truth = prediction.segments, sample.segments
        masks = {
            (side, item.id): side.map == item.id for side in (guess, truth) for item in side.items
        }
        void, used, last = truth.map == 0, set(), {}
        for t in truth.items:
            if t.crowd:
                last[t.label] = masks[truth, t.id]
                continue
            found = False
            for p in guess.items:
                a, b = masks[guess, p.id], masks[truth, t.id]
                iou = int((a & b).sum()) / int(((a & ~void) | b).sum())
                if p.label == t.label and iou > 0.5:
                    found = True
                    used.add(p.id)
                    totals[NAMES[t.label]][0] += 1
                    totals[NAMES[t.label]][3] += iou
            totals[NAMES[t.label]][2] += not found
        for p in guess.items:
            mask = masks[guess, p.id]
            excused = mask & (void | last.get(p.label, void))
            if p.id not in used and int(excused.sum()) / int(mask.sum()) <= 0.5:
                totals[NAMES[p.label]][1] += 1
    got = scored(images).compute()
    pq = []
    for name, (tp, fp, fn, iou) in totals.items():
        entry = got["per_class"][name]
        assert [entry[k] for k in ("tp", "fp", "fn")] == [tp, fp, fn]
        assert entry["iou_sum"] == pytest.approx(iou, abs=1e-11)
        pq.append(iou / (tp + fp / 2 + fn / 2))
        assert entry["pq"] == pytest.approx(pq[-1]) == pytest.approx(entry["sq"] * entry["rq"])
    assert got["pq"] == pytest.approx(np.mean(pq))
    assert got["pq_things"] == pytest.approx(np.mean(pq[:2]))
    assert got["pq_stuff"] == pytest.approx(np.mean(pq[2:]))


@pytest.mark.parametrize("options", [{}, {"boundary_ratio": 0.05}], ids=["pq", "boundary"])
def test_order_and_splitting_change_no_bit(options):
    images = list(random_images(7))
    whole = scored(images, **options)
    assert all(value.dtype == torch.int64 for value in whole.state().values())
    generator = np.random.default_rng()
    for _ in range(3):
        shuffled = [images[k] for k in generator.permutation(len(images))]
        cut = sorted(generator.integers(0, 8, 2))
        parts = [
            scored(shuffled[a:b], **options).state()
            for a, b in zip([0, *cut], [*cut, 7], strict=True)
        ]
        merged = Panoptic(NAMES, things=THINGS, **options)
        merged.load_state({key: sum(part[key] for part in parts) for key in whole.state()})
        assert torch.equal(merged.state()["counts"], whole.state()["counts"])
        assert merged.compute() == whole.compute()


def test_boundary_quality_is_no_larger():
    images = list(random_images(3))
    plain, boundary = scored(images).compute(), scored(images, boundary_ratio=0.05).compute()
    assert 0 < boundary["pq"] < plain["pq"]
    perfect = [
        (
            Segmentation(
                s.segments.map.shape, NAMES, segments=Segments(s.segments.map, s.segments.items)
            ),
            s,
        )
        for _, s in images
    ]
    assert scored(perfect, boundary_ratio=0.05, all_crowds=True).compute()["pq"] == 1.0
    # with a boundary as wide as the image every pixel is boundary
    assert scored(images, boundary_ratio=0.99).compute() == plain


def test_both_defects_of_panopticapi_can_be_switched():
    """Two crowds of a class and a prediction in each: one of them is a false positive there."""
    target = segments([[1, 1, 2, 2, 3, 3]], {1: 0, 2: 0, 3: 0}, crowds={1, 2})
    guess = segments([[1, 1, 2, 2, 3, 3]], {1: 0, 2: 0, 3: 0})
    assert scored([pair(guess, target)]).compute()["pq"] == pytest.approx(2 / 3)
    assert scored([pair(guess, target)], all_crowds=True).compute()["pq"] == 1.0

    got = scored([pair(guess, target)]).compute()
    assert math.isnan(got["pq_stuff"]) and got["stuff_counted"] == 0
    with pytest.raises(ZeroDivisionError, match="no class of stuff occurs"):
        scored([pair(guess, target)], allow_empty=False).compute()


def test_no_image_is_nan():
    got = Panoptic(NAMES, things=THINGS).compute()
    assert math.isnan(got["pq"]) and math.isnan(got["per_class"]["sky"]["pq"])
    assert got["classes_counted"] == 0


def test_areas_that_differ_warn():
    good = segments([[1, 1, 2, 2]], {1: 0, 2: 2})
    listed = Segments(good.map, (Segment(1, 0, 1.0, 3), *good.items[1:]))
    with pytest.warns(UserWarning, match="'a': 1 target segments have another area"):
        got = scored([pair(good, listed)]).compute()
    assert got["per_class"]["person"]["iou_sum"] == pytest.approx(2 / 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scored([pair(good, good)])


def test_bad_input():
    metric = Panoptic(NAMES)
    prediction, sample = next(random_images(1))
    with pytest.raises(LabelError, match="sample 'image 0' has no segments"):
        metric.update(prediction, Sample("image 0", sample.image))
    with pytest.raises(LabelError, match="prediction for sample 'image 0' has no segments"):
        metric.update(prediction.with_labels(torch.zeros(30, 32, dtype=torch.uint8)), sample)
    with pytest.raises(LabelError, match=r"'x'.*\[24, 32\] and \[30, 32\]"):
        short = segments(sample.segments.map[:24], {k: 0 for k in range(12)})
        metric.update_segments(short, sample.segments, "x")
    negative = Segments(sample.segments.map - 1, sample.segments.items)
    with pytest.raises(LabelError, match=r"'x'.*target has ids that are not listed: -1"):
        metric.update_segments(prediction.segments, negative, "x")
    unknown = segments([[1]], {1: 4})
    with pytest.raises(LabelError, match="'x': prediction_segments has class 4"):
        metric.update_segments(unknown, segments([[1]], {1: 0}), "x")
    assert not metric.state()["counts"].any()
    for options in (
        {"classes": ()},
        {"classes": "person"},
        {"classes": NAMES, "things": (4,)},
        {"classes": NAMES, "things": ("dog",)},
        {"classes": NAMES, "boundary_ratio": -1},
    ):
        with pytest.raises(ValueError, match=r"classes|boundary_ratio"):
            Panoptic(**options)
    with pytest.raises(ValueError, match="state 'counts' must be"):
        metric.load_state(Panoptic(("a", "b")).state())


def test_problems_that_the_device_counted_are_reported():
    metric = Panoptic(NAMES)
    metric.load_state({**metric.state(), "problems": torch.tensor([3, 0, 0, 0, 0, 0])})
    with pytest.raises(LabelError, match="3 pixels of the prediction whose id is not listed"):
        metric.compute()


# --- files ------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """A ground truth and a prediction of three images, written by pyseg."""
    images = list(random_images(3, seed=4))
    truth = [(s.name, s.segments) for _, s in images]
    guess = [(s.name, p.segments) for p, s in images]
    for name, results in (("truth", truth), ("guess", guess)):
        write_panoptic(
            tmp_path / f"{name}.json", results, NAMES, things={0, 1}, category_ids=[7, 3, 92, 100]
        )
    return tmp_path


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def run(*arguments):
    return CliRunner().invoke(cli.app, ["score", *map(str, arguments)])


def test_files_are_scored_like_maps_in_memory(files):
    got = score_files(files / "truth.json", files / "guess.json")
    want = scored(random_images(3, seed=4)).compute()
    assert got["All"] == {**{k: want[k] for k in ("pq", "sq", "rq")}, "n": want["classes_counted"]}
    assert got["Things"]["pq"] == want["pq_things"] and got["Stuff"]["rq"] == want["rq_stuff"]
    counts = {k: want["per_class"]["sky"][k] for k in ("tp", "fp", "fn", "iou_sum")}
    assert got["per_class_counts"]["sky"] == counts


def test_threads_read_ahead_and_change_nothing(files):
    """Also the first bad image is reported, not the one that was read first; areas may lack."""

    def drop_areas(value):
        for annotation in value["annotations"]:
            for segment in annotation["segments_info"]:
                del segment["area"]

    got = score_files(files / "truth.json", files / "guess.json")
    for name in ("truth.json", "guess.json"):
        edit(files / name, drop_areas)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert score_files(files / "truth.json", files / "guess.json") == got
        for name in sorted(file.name for file in (files / "guess").iterdir())[1:]:
            (files / "guess" / name).write_bytes(b"")
        second = json.loads((files / "truth.json").read_text())["annotations"][1]["file_name"]
        for _ in range(5):
            with pytest.raises(ImageError, match=second):
                score_files(files / "truth.json", files / "guess.json")
    finally:
        torch.set_num_threads(before)


def test_command_line(files):
    result = run(files / "guess.json", files / "truth.json", "--json")
    assert result.exit_code == 0, result.output
    want = scoring.score_files(files / "guess.json", files / "truth.json")
    assert json.loads(result.stdout) == json.loads(json.dumps(want.to_dict()))
    table = run(files / "guess.json", files / "truth.json").stdout
    assert f"{want.metrics['panoptic']['sq']:.4f}" in table and "panoptic pq" in table
    shutil.move(files / "truth", files / "elsewhere")
    places = "--label-folder", files / "elsewhere", "--prediction-folder", files / "guess"
    moved = run(files / "guess.json", files / "truth.json", *places, "--json")
    assert json.loads(moved.stdout)["metrics"] == json.loads(result.stdout)["metrics"]
    boundary = run(
        *(files / "guess.json", files / "truth.json", *places, "--json"),
        *("--metric", "panoptic(boundary_ratio=0.05)"),
    )
    found = json.loads(boundary.stdout)["metrics"]["panoptic(boundary_ratio=0.05)"]
    assert found["pq"] < want.metrics["panoptic"]["pq"]


def test_a_group_without_classes_is_null(files):
    edit(files / "truth.json", lambda v: [c.update(isthing=1) for c in v["categories"]])
    result = run(files / "guess.json", files / "truth.json", "--json")
    scores = json.loads(result.stdout)["metrics"]["panoptic"]
    assert scores["pq_stuff"] is None and scores["stuff_counted"] == 0


def first(value):
    return value["annotations"][0]


@pytest.mark.parametrize(
    "file, change, message",
    [
        (
            "guess",
            lambda v: v["annotations"].pop(1),
            "no prediction for 1 of 3 images: image 1",
        ),
        ("guess", lambda v: first(v)["segments_info"].pop(), "ids that are not listed: 11"),
        ("truth", lambda v: first(v)["segments_info"].pop(), "target has ids .* listed: 11"),
        ("truth", lambda v: first(v)["segments_info"][0].update(id=99), "ids without pixels: 99"),
        ("truth", lambda v: first(v)["segments_info"][0].update(id=-1), "lists the id -1"),
        (
            "truth",
            lambda v: first(v)["segments_info"][0].update(category_id=5),
            "segment 1 of the unknown category 5",
        ),
        (
            "truth",
            lambda v: first(v)["segments_info"][0].pop("category_id"),
            r"annotations .*segments_info\[0\] lacks 'category_id'",
        ),
        ("truth", lambda v: v.pop("categories"), "has no categories; "),
        (
            "truth",
            lambda v: v["categories"][0].pop("isthing"),
            r"categories .*: \[0\] lacks 'isthing'",
        ),
        ("truth", lambda v: v["categories"][0].update(id=3), "two categories with the same id"),
        ("truth", lambda v: v.update(annotations=[]), "no annotations: there is nothing"),
        ("truth", lambda v: v.pop("annotations"), "no list of annotations"),
        ("truth", lambda v: first(v).pop("file_name"), r"annotations .*: \[0\] lacks 'file_name'"),
        ("guess", lambda v: v["annotations"].append(first(v)), "has image 'image 0' twice"),
        ("truth", lambda v: first(v).update(file_name="x.png"), "x.png' does not exist"),
    ],
)
def test_bad_files(files, file, change, message):
    edit(files / f"{file}.json", change)
    with pytest.raises((LabelError, ImageError, ScoreError), match=message):
        score_files(files / "truth.json", files / "guess.json")
    result = run(files / "guess.json", files / "truth.json")
    assert result.exit_code == 2 and result.stderr.startswith("error: ")


def test_missing_and_damaged_files(files):
    with pytest.raises(ScoreError, match=r"nope.json' does not exist"):
        score_files(files / "nope.json", files / "guess.json")
    shutil.move(files / "guess", files / "away")
    with pytest.raises(LabelError, match=r"no folder .*guess' with .*prediction_folder"):
        score_files(files / "truth.json", files / "guess.json")
    Image.fromarray(np.zeros((30, 32), np.uint8)).save(files / "away" / "image 0.png")
    with pytest.raises(ImageError, match=r"image 0.png' has mode L; .* RGB"):
        score_files(files / "truth.json", files / "guess.json", prediction_folder=files / "away")
    Image.fromarray(np.zeros((9, 32, 3), np.uint8)).save(files / "away" / "image 0.png")
    edit(files / "guess.json", lambda v: first(v).update(segments_info=[]))
    with pytest.raises(LabelError, match=r"image 0.png: .* 32 x 9 pixels, .* 32 x 30"):
        score_files(files / "truth.json", files / "guess.json", prediction_folder=files / "away")
    (files / "guess.json").write_text("{")
    with pytest.raises(LabelError, match=r"guess.json' cannot be read as JSON"):
        score_files(files / "truth.json", files / "guess.json")


def test_predictions_without_ground_truth_are_left_out(files):
    edit(files / "truth.json", lambda v: v["annotations"].pop())
    with pytest.warns(UserWarning, match="1 predictions are of images"):
        score_files(files / "truth.json", files / "guess.json")
