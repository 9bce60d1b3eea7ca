"""Files of a stranger: whatever value is of another kind, gone or doubled, the error is ours."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch

from pyseg import formats
from pyseg.datasets.coco_panoptic import COCOPanoptic
from pyseg.datasets.folder import Folder
from pyseg.errors import ImageError, LabelError, PysegError, ScoreError
from pyseg.files import check_json, read_json
from pyseg.image import write_image, write_labels
from pyseg.metrics.instances import instance_ap
from pyseg.metrics.panoptic import score_files
from pyseg.regions import Segments

STRANGE = (
    None,
    True,
    -1,
    0,
    5,
    10**30,
    2**62,
    1.5,
    math.nan,
    math.inf,
    "",
    "x",
    "\0",
    "\ud800",
    [],
    [1],
    [[]],
    {},
    {"a": 1},
    {"size": [30, 32], "counts": [2**62] * 4 + [960]},
)


def places(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def mutations(value, count, seed=0):
    """Copies of a JSON value, each with one place that is strange, gone or twice there."""
    generator = random.Random(seed)
    everywhere = [*places(value)]
    for _ in range(count):
        changed = {"": copy.deepcopy(value)}
        path = ("", *generator.choice(everywhere))
        holder = changed
        for key in path[:-1]:
            holder = holder[key]
        kind = generator.random()
        if kind < 0.7 or len(path) == 1:
            holder[path[-1]] = generator.choice(STRANGE)
        elif kind < 0.9:
            del holder[path[-1]]
        elif isinstance(holder, list):
            holder.insert(0, copy.deepcopy(holder[path[-1]]))
        else:
            holder[generator.choice([*holder])] = copy.deepcopy(holder[path[-1]])
        yield changed[""]


def refusals(path, value, count, errors, use):
    """How many of ``count`` changed files are refused; any other error is raised."""
    refused = 0
    for changed in mutations(value, count):
        path.write_text(json.dumps(changed))
        try:
            use()
        except errors as error:
            assert str(error)
            refused += 1
    return refused


@pytest.fixture
def panoptic(tmp_path):
    """A panoptic data set of two images below ``train2017``, and the JSON's path."""
    map = np.repeat(np.repeat(np.arange(6).reshape(2, 3), 15, 0), 11, 1)[:, :32]
    segments = Segments.from_map(map, {1: 0, 2: 1, 3: 2, 4: 0, 5: 2}, crowds=(4,))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    for name in ("1", "b"):
        write_image(tmp_path / "train2017" / f"{name}.png", torch.zeros(3, 30, 32).byte())
    return formats.write_panoptic(
        tmp_path / "annotations/panoptic_train2017.json",
        [("1", segments), ("b", segments)],
        ("person", "car", "road"),
        things={0, 1},
    )


def test_panoptic_data_set(panoptic):
    def use():
        for sample in (dataset := COCOPanoptic(panoptic.parents[1])):
            assert sample.labels.shape == (30, 32)
        assert len(dataset) in (1, 2)

    use()
    value = json.loads(panoptic.read_text())
    value["categories"] = [{**entry, "color": [1, 2, 3]} for entry in value["categories"]]
    errors = (LabelError, ImageError, FileNotFoundError)  # the last where an image is not there
    assert 100 < refusals(panoptic, value, 300, errors, use) < 300


@pytest.mark.filterwarnings("ignore:.*(are of images|another area)")
@pytest.mark.parametrize("side", ["target", "prediction"])
def test_panoptic_quality(panoptic, tmp_path, side):
    value = json.loads(panoptic.read_text())
    other = tmp_path / "other.json"
    other.write_text(panoptic.read_text())
    files = {"target": other, "prediction": other, side: panoptic}

    def use():
        folder = panoptic.with_suffix("")
        score_files(**files, target_folder=folder, prediction_folder=folder)

    use()
    assert 60 < refusals(panoptic, value, 200, (LabelError, ImageError), use) < 200


def square(x, y, side=6):
    mask = torch.zeros(30, 32, dtype=torch.bool)
    mask[y : y + side, x : x + side] = True
    return mask


@pytest.fixture
def instances(tmp_path):
    """Ground truth with a polygon and both kinds of RLE, and results: values and paths."""
    truth = {
        "images": [{"id": 1, "height": 30, "width": 32}, {"id": 2, "height": 30, "width": 32}],
        "categories": [{"id": 3, "name": "person"}, {"id": 8, "name": "car"}],
        "annotations": [
            {
                "image_id": k // 2 + 1,
                "category_id": (3, 8)[k % 2],
                "area": 36,
                "bbox": [4.0, 5.0, 6.0, 6.0],
                "iscrowd": int(k == 3),
                "segmentation": shape,
            }
            for k, shape in enumerate(
                [
                    [[4.0, 5.0, 10.0, 5.0, 10.0, 11.0, 4.0, 11.0]],
                    formats.encode_rle(square(4, 5)),
                    formats.encode_rle(square(9, 9)),
                    {"size": [30, 32], "counts": [400, 60, 500]},
                ]
            )
        ],
    }
    results = [
        {
            "image_id": k // 2 + 1,
            "category_id": (3, 8)[k % 2],
            "score": 0.9 - k / 10,
            "bbox": [4.0, 5.0, 6.0, 6.0],
            "segmentation": formats.encode_rle(square(4 + k, 5)),
        }
        for k in range(4)
    ]
    paths = tmp_path / "truth.json", tmp_path / "results.json"
    for path, value in zip(paths, (truth, results), strict=True):
        path.write_text(json.dumps(value))
    return (truth, results), paths


@pytest.mark.parametrize("side", [0, 1], ids=["truth", "results"])
def test_instance_ap(instances, side):
    pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval (the extra [coco])")
    values, paths = instances

    def use():
        instance_ap(*paths, kinds=["mask", "box"])

    use()
    assert 80 < refusals(paths[side], values[side], 200, ScoreError, use) < 200


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["images"][0].update(height=60000, width=60000), "MAX_PIXELS"),
        (lambda t: t["images"][0].update(height=0), "0 x 32"),
        (lambda t: t["annotations"][0].update(segmentation=[[1, 2, math.nan, 4, 5, 6]]), "finite"),
        (lambda t: t["annotations"][0].update(segmentation=[[-1e9, 2, 3, 4, 5, 6]]), "far outside"),
        (lambda t: t["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5, 99]]), "far outside"),
        (lambda t: t["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "three points"),
        (lambda t: t["annotations"][0].update(segmentation=[]), "without a polygon"),
    ],
)
def test_ground_truth_that_would_fill_the_memory(instances, change, words):
    pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval (the extra [coco])")
    (truth, _), paths = instances
    change(truth)
    paths[0].write_text(json.dumps(truth))
    with pytest.raises(ScoreError, match=words):
        instance_ap(*paths)


def test_results_with_runs_as_a_list(instances):
    """Uncompressed RLE is COCO's as well, and means the same."""
    pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval (the extra [coco])")
    (_, results), paths = instances
    want = instance_ap(*paths)
    for entry, k in zip(results, range(4), strict=True):
        flat = square(4 + k, 5).T.flatten().int()
        edges = (flat[1:] != flat[:-1]).nonzero().flatten() + 1
        runs = torch.diff(edges, prepend=torch.tensor([0]), append=torch.tensor([960]))
        entry["segmentation"]["counts"] = runs.tolist()
    paths[1].write_text(json.dumps(results))
    assert json.dumps(instance_ap(*paths)) == json.dumps(want)  # nan and all
    results[0]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    paths[1].write_text(json.dumps(results))
    with pytest.raises(ScoreError, match="detection 0 has polygons"):
        instance_ap(*paths)


def test_class_list(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    write_image(tmp_path / "images/a.png", torch.zeros(3, 4, 6).byte())
    write_labels(tmp_path / "labels/a.png", torch.zeros(4, 6).byte())
    value = {
        "classes": [
            {"id": 0, "name": "ground", "color": [1, 2, 3]},
            {"id": 1, "name": "cell", "color": [4, 5, 6]},
        ],
        "ignore_index": 2,
    }
    path = tmp_path / "classes.json"
    refused = refusals(path, value, 200, ValueError, lambda: Folder(tmp_path)[0])
    assert 80 < refused < 200


def test_16_bit_void(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    write_image(tmp_path / "images/a.png", torch.zeros(3, 1, 4).byte())
    write_labels(tmp_path / "labels/a.png", np.array([[0, 1, 65535, 255]], np.uint16))
    entries = [{"id": 0, "name": "ground"}, {"id": 1, "name": "cell"}]
    for more in ([], [{"id": 65535, "name": "unlabelled"}]):
        value = {"classes": entries + more, "ignore_index": 65535}
        (tmp_path / "classes.json").write_text(json.dumps(value))
        assert Folder(tmp_path)[0].labels.tolist() == [[0, 1, 255, 255]]
    write_labels(tmp_path / "labels/a.png", np.array([[0, 1, 65535, 251]], np.uint16))
    with pytest.raises(LabelError, match="label values 251"):
        Folder(tmp_path)[0]
    value = {"classes": [*entries, {"id": -5, "name": "unlabelled"}], "ignore_index": -5}
    (tmp_path / "classes.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"void ids must be 0 to 65535.*got -5"):
        Folder(tmp_path)


def test_deep_nesting(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(PysegError, match="cannot be read as JSON"):
        read_json(path)


def test_the_place_is_named(tmp_path):
    wanted = {"classes": [{"name": str, "id?": int}], "scale?": (float, str)}
    good = {"classes": [{"name": "a"}, {"name": "b", "id": 4}], "scale": 1, "more": None}
    check_json(good, wanted, "it")
    for change, message in (
        (lambda v: v["classes"][1].update(id=1.5), r"it: classes\[1\].id must be an integer .*1.5"),
        (lambda v: v["classes"][1].update(id=True), r"classes\[1\].id .*got True"),
        (lambda v: v["classes"][1].update(id=2**63), r"classes\[1\].id .*64 bits"),
        (lambda v: v["classes"][0].pop("name"), r"it: classes\[0\] lacks 'name'"),
        (lambda v: v.update(scale=math.inf), "scale must be a finite number or a text, got inf"),
        (lambda v: v.update(classes={}), "classes must be a list, got {}"),
    ):
        value = copy.deepcopy(good)
        change(value)
        with pytest.raises(LabelError, match=message):
            check_json(value, wanted, "it", LabelError)
    with pytest.raises(PysegError, match=r"^it must be an object, got \[\]$"):
        check_json([], wanted, "it")
