"""Files of a stranger: whatever value is of another kind, gone or doubled, the error is ours."""

import base64
import copy
import errno
import io
import json
import math
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyseg import formats
from pyseg.conversion import convert
from pyseg.datasets.coco_panoptic import COCOPanoptic
from pyseg.datasets.folder import Folder
from pyseg.errors import ImageError, LabelError, PysegError, ScoreError
from pyseg.files import check_json, read_json
from pyseg.formats.table import FORMATS
from pyseg.image import write_image, write_labels
from pyseg.regions import Segments
from pyseg.scoring import score_files

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
@pytest.mark.parametrize("side", ["labels", "predictions"])
def test_panoptic_quality(panoptic, tmp_path, side):
    value = json.loads(panoptic.read_text())
    other = tmp_path / "other.json"
    other.write_text(panoptic.read_text())
    files = {"labels": other, "predictions": other, side: panoptic}

    def use():
        folder = panoptic.with_suffix("")
        score_files(**files, label_folder=folder, prediction_folder=folder)

    use()
    errors = LabelError, ImageError, ScoreError
    assert 60 < refusals(panoptic, value, 200, errors, use) < 200


def instance_ap(truth, results, kinds=("mask", "box", "boundary")):
    metric = f"instances(kinds={tuple(kinds)})"
    return score_files(results, truth, metrics=[metric]).metrics[metric]


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
    (truth, _), paths = instances
    change(truth)
    paths[0].write_text(json.dumps(truth))
    with pytest.raises(ScoreError, match=words):
        instance_ap(*paths)


def test_results_with_runs_as_a_list(instances):
    """Uncompressed RLE is COCO's as well, and means the same."""
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


# --- conversions ------------------------------------------------------------------------------


def scene(path):
    """A COCO file with a hole, a crowd, parts and polygons, of classes that Cityscapes has too."""
    ring = square(4, 5, 9) & ~square(7, 8, 3)
    shapes = (
        formats.encode_rle(ring),
        [[4.0, 5.0, 10.0, 5.0, 10.0, 11.0, 4.0, 11.0], [20.0, 20.0, 25.0, 20.0, 22.0, 25.0]],
        {"size": [30, 32], "counts": [400, 60, 500]},
    )
    value = {
        "images": [{"id": k, "file_name": f"{k}.png", "height": 30, "width": 32} for k in (1, 2)],
        "categories": [{"id": 3, "name": "person"}, {"id": 8, "name": "car"}],
        "annotations": [
            {
                "image_id": k % 2 + 1,
                "category_id": (3, 8)[k % 2],
                "segmentation": shape,
                "iscrowd": int(k == 2),
                "score": 0.5,
            }
            for k, shape in enumerate(shapes)
        ],
    }
    path.write_text(json.dumps(value))
    return path


def output_of(to, folder):
    return folder / f"{to}{FORMATS[to].suffix}"


@pytest.mark.parametrize(
    ("origin", "file"),
    [
        ("coco", "coco.json"),
        ("coco-panoptic", "coco-panoptic.json"),
        ("cityscapes-panoptic", "cityscapes-panoptic.json"),
        ("labelme", "labelme/1.json"),
        ("geojson", "geojson/1.geojson"),
        ("indexed", "indexed/classes.json"),
        ("coco-results", "results.json"),
    ],
)
def test_json_of_every_format(tmp_path, origin, file):
    """Whatever is strange in it is refused with the file's name, and leaves nothing behind."""
    source = scene(tmp_path / "in.json")
    path = tmp_path / file
    if origin == "coco-results":
        shapes = [formats.encode_rle(square(4, 5)), {"size": [30, 32], "counts": [400, 60, 500]}]
        results = [
            {"image_id": 7, "category_id": k + 1, "score": 0.5, "segmentation": shape}
            for k, shape in enumerate(shapes)
        ]
        path.write_text(json.dumps(results))
    else:
        convert(source, output_of(origin, tmp_path), to=origin)
    value = json.loads(path.read_text())
    before = sorted(tmp_path.rglob("*"))

    def use():
        try:
            # To a file, so that a refusal after the first image keeps only the journal.
            convert(
                output_of(origin, tmp_path) if origin != "coco-results" else path,
                tmp_path / "out.xml",
                to="cvat",
                source_format=origin,
            )
        except PysegError as error:
            assert any(part in str(error) for part in (file.rpartition("/")[2], origin)), error
            raise
        finally:
            for left in (tmp_path / "out.xml", tmp_path / ".out.xml.convert"):
                left.unlink(missing_ok=True)

    use()
    refused = refusals(path, value, 80, PysegError, use)
    assert 10 < refused < 80
    assert sorted(tmp_path.rglob("*")) == before


def changed_text(text, count, seed=0):
    """A text with pieces gone, doubled, or of another kind."""
    generator = random.Random(seed)
    words = ("-1", "nan", "1e309", "99999999999999999999", "x", "", '"', "<", "&amp;", "0 0", "\0")
    for _ in range(count):
        start = generator.randrange(len(text))
        end = min(len(text), start + generator.choice((1, 2, 8, 40)))
        kind = generator.random()
        if kind < 0.3:
            yield text[:start]  # a download that was cut off
        elif kind < 0.5:
            yield text[:start] + text[end:]
        elif kind < 0.7:
            yield text[:start] + text[start:end] * 2 + text[end:]
        else:
            yield text[:start] + generator.choice(words) + text[end:]


@pytest.mark.parametrize(
    ("origin", "file"),
    [
        ("yolo", "yolo/labels/1.txt"),
        ("yolo", "yolo/data.yaml"),
        ("cvat", "cvat.xml"),
        ("voc", "voc/Annotations/1.xml"),
        ("coco", "coco.json"),
        ("labelme", "labelme/1.json"),
    ],
)
def test_texts_that_were_damaged(tmp_path, origin, file):
    images = tmp_path / "images"
    images.mkdir()
    for k in (1, 2):
        write_image(images / f"{k}.png", torch.zeros(3, 30, 32).byte())
    source = scene(tmp_path / "in.json")
    convert(source, output_of(origin, tmp_path), to=origin)
    path = tmp_path / file
    whole = path.read_text()
    refused = 0
    for text in changed_text(whole, 60):
        path.write_text(text)
        out = tmp_path / "out.json"
        try:
            convert(
                output_of(origin, tmp_path), out, to="coco", source_format=origin, images=images
            )
        except PysegError as error:
            assert path.name in str(error) or origin in str(error) or "image" in str(error)
            refused += 1
        finally:
            out.unlink(missing_ok=True)
            (tmp_path / ".out.json.convert").unlink(missing_ok=True)
    assert 5 < refused < 60


@pytest.mark.parametrize(
    ("origin", "file"),
    [
        ("indexed", "indexed/labels/1.png"),
        ("voc", "voc/SegmentationClass/1.png"),
        ("voc", "voc/SegmentationObject/1.png"),
        ("coco-panoptic", "coco-panoptic/1.png"),
        ("cityscapes-instanceids", "cityscapes-instanceids/1_gtFine_instanceIds.png"),
        ("cityscapes-labelids", "cityscapes-labelids/1_gtFine_labelIds.png"),
        ("cityscapes-trainids", "cityscapes-trainids/1_gtFine_labelTrainIds.png"),
    ],
)
def test_pngs_that_were_damaged(tmp_path, origin, file):
    """Cut off, of another size, of photographs, with ids that are none."""
    source = scene(tmp_path / "in.json")
    convert(source, output_of(origin, tmp_path), to=origin)
    path = tmp_path / file
    whole = path.read_bytes()
    for change in ("cut", "empty", "size", "photo", "ids", "gone", "html"):
        if change in ("cut", "empty"):
            path.write_bytes(whole[: len(whole) // 2 if change == "cut" else 0])
        elif change == "html":
            path.write_text("<html>not found</html>")
        elif change == "gone":
            path.unlink()
        else:
            value = {"size": np.zeros((3, 4), np.uint8), "ids": np.full((30, 32), 214, np.uint8)}
            if change == "photo" or origin == "coco-panoptic":
                generator = np.random.default_rng(0)
                value[change] = generator.integers(0, 256, (30, 32, 3), dtype=np.uint8)
            Image.fromarray(value[change]).save(path)
        try:
            convert(output_of(origin, tmp_path), tmp_path / "out", to="yolo", source_format=origin)
        except PysegError as error:
            assert path.name in str(error) or "1" in str(error)
        else:  # what a PNG of its own may be: another size, an image less, another number
            assert change in ("gone", "size", "ids", "photo")
            assert change != "photo" or origin == "coco-panoptic"
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


LADDER = ("../../evil", "/etc/evil", "a/../../evil", "C:\\evil", "..", "a\0b", "", "x" * 300)


@pytest.mark.parametrize("name", LADDER)
def test_names_that_leave_the_folder(tmp_path, name):
    inner = tmp_path / "inner"
    inner.mkdir()
    source = scene(inner / "in.json")
    changes = {
        "coco": lambda v: v["images"][0].update(file_name=f"{name}.png" if name else ""),
        "coco-panoptic": lambda v: v["annotations"][0].update(file_name=name),
    }
    for origin, change in changes.items():
        path = source if origin == "coco" else output_of(origin, inner)
        if path != source:
            convert(source, path, to=origin)
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))
        if name == ".." and origin == "coco":
            continue  # "...png" is a name
        with pytest.raises(PysegError, match="is no name of a file within a folder"):
            convert(path, inner / "out", to="yolo", source_format=origin)
        with pytest.raises(PysegError, match="is no name of a file within a folder"):
            convert(path, inner / "out", to="indexed", source_format=origin)
        scene(source)
    assert [p.name for p in tmp_path.iterdir()] == ["inner"]
    xml = "<annotations><image id='0' name='../../evil.png' width='3' height='4'/></annotations>"
    (inner / "a.xml").write_text(xml)
    with pytest.raises(ImageError, match=r"'../../evil.png' is no name"):
        convert(inner / "a.xml", inner / "out", to="yolo")


def test_xml_that_grows(tmp_path):
    lines = "".join(f'<!ENTITY a{k} "{f"&a{k - 1};" * 10}">' for k in range(1, 10))
    text = f'<!DOCTYPE a [<!ENTITY a0 "boom">{lines}]><annotations>&a9;</annotations>'
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(LabelError, match="has a document type"):
        convert(tmp_path / "a.xml", tmp_path / "out", to="yolo")


def test_names_that_yaml_repeats(tmp_path):
    """Anchors that would be gigabytes if written out, and tags that would run code."""
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/1.txt").write_text("")
    lines = ["a0: &a0 [x, x]"] + [f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]" for k in range(1, 40)]
    for text in (
        "\n".join([*lines, "names: *a39"]),
        "names: !!python/object/apply:os.system ['touch evil']",
        "names: [a, a]",
        "names: {0: a, 2: b}",
        "names: {0: a, x: b}",
        "names: []",
        "names: 5",
        "names: [[a]]",
        "- names",
        "[" * 3000,
    ):
        (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(LabelError, match=r"data.yaml"):
            convert(tmp_path, tmp_path.parent / "out", to="labelme")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 0.1 0.1 0.2 0.2", "is a box"),
        ("0 0.1 0.1 0.2", "three points, it has 1"),
        ("0", "three points, it has 0"),
        ("2 0.1 0.1 0.2 0.2 0.3 0.1", "class 2 is none of 0 to 1"),
        ("-1 0.1 0.1 0.2 0.2 0.3 0.1", "class -1 is none"),
        ("0.5 0.1 0.1 0.2 0.2 0.3 0.1", "class 0.5 is none"),
        ("nan 0.1 0.1 0.2 0.2 0.3 0.1", "class nan is none"),
        ("0 0.1 nan 0.2 0.2 0.3 0.1", "not finite"),
        ("0 10 10 20 20 30 10", "coordinate 30 is not in 0 to 1; divide"),
        ("person 0.1 0.1 0.2 0.2 0.3 0.1", "could not convert"),
        ("0 0.1 0.1 0.2 0.2 0.3 0,1", "could not convert"),
    ],
)
def test_lines_of_yolo(tmp_path, line, words):
    (tmp_path / "in/labels").mkdir(parents=True)
    (tmp_path / "in/data.yaml").write_text("names: [a, b]")
    (tmp_path / "in/labels/1.txt").write_text(f"1 0.1 0.1 0.2 0.2 0.3 0.1\n\n{line}\n")
    (tmp_path / "images").mkdir()
    write_image(tmp_path / "images/1.png", torch.zeros(3, 30, 32).byte())
    with pytest.raises(LabelError, match=rf"1.txt', line 3.*{words}"):
        convert(tmp_path / "in", tmp_path / "out.json", to="coco", images=tmp_path / "images")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("origin", ["coco", "labelme", "cvat", "geojson", "coco-results"])
def test_huge_images_are_refused_before_memory_is_asked_for(tmp_path, origin):
    side = 2_000_000
    source = scene(tmp_path / "in.json")
    path = output_of(origin, tmp_path)
    if origin == "coco-results":
        rle = {"size": [side, side], "counts": [side * side]}
        entry = {"image_id": 1, "category_id": 1, "score": 1.0, "segmentation": rle}
        path.write_text(json.dumps([entry]))
    else:
        convert(source, path, to=origin)
        file = (
            path if path.is_file() else path / f"1{'.geojson' if origin == 'geojson' else '.json'}"
        )
        text = file.read_text().replace('eight": 30', f'eight": {side}')
        text = text.replace('idth": 32', f'idth": {side}').replace(
            'height="30"', f'height="{side}"'
        )
        file.write_text(text.replace('width="32"', f'width="{side}"'))
    with pytest.raises(ImageError, match="MAX_PIXELS"):
        convert(path, tmp_path / "out", to="yolo", source_format=origin)
    assert not (tmp_path / "out").exists()


def test_sizes_of_masks_and_images_that_disagree(tmp_path):
    source = scene(tmp_path / "in.json")
    value = json.loads(source.read_text())
    value["annotations"][0]["segmentation"] = formats.encode_rle(torch.ones(29, 32))
    source.write_text(json.dumps(value))
    with pytest.raises(ImageError, match=r"annotations\[0\]: its RLE mask is 32 x 29 .* 32 x 30"):
        convert(source, tmp_path / "out", to="yolo")
    shape = {"label": "a", "points": [[1, 1], [4, 4]], "shape_type": "mask"}
    stream = io.BytesIO()
    Image.new("1", (5, 4)).save(stream, format="PNG")
    shape["mask"] = base64.b64encode(stream.getvalue()).decode()
    value = {"shapes": [shape], "imageHeight": 30, "imageWidth": 32}
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(ImageError, match=r"shapes\[0\]: its mask is 5 x 4 pixels.* 4 x 4"):
        convert(tmp_path / "a.json", tmp_path / "out", to="yolo")
    xml = (
        "<annotations><image id='0' name='a.png' width='32' height='30'><mask label='a' "
        "rle='3, 9' left='{}' top='2' width='4' height='{}'/></image></annotations>"
    )
    for left, height, words in ((30, 3, "reaches beyond"), (2, 4, "add up to 12 .* has 16")):
        (tmp_path / "a.xml").write_text(xml.format(left, height))
        with pytest.raises(ImageError, match=rf"image 'a', <mask> 0: .*{words}"):
            convert(tmp_path / "a.xml", tmp_path / "out", to="yolo")


def test_objects_of_two_classes(tmp_path):
    convert(scene(tmp_path / "in.json"), tmp_path / "voc", to="voc")
    Image.fromarray(np.ones((30, 32), np.uint8)).save(tmp_path / "voc/SegmentationObject/1.png")
    with pytest.raises(LabelError, match="object 1 has the classes 0, 1 in"):
        convert(tmp_path / "voc", tmp_path / "out", to="yolo")


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    source = scene(tmp_path / "in.json")

    def full(self, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        for to in ("yolo", "voc", "coco"):
            with pytest.raises(OSError, match="No space left"):
                convert(source, output_of(to, tmp_path), to=to)
            assert not output_of(to, tmp_path).is_file()
    for to in ("yolo", "voc", "coco"):
        assert convert(source, output_of(to, tmp_path), to=to).loss.masks == 3
