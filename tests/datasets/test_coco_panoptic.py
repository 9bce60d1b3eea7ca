"""COCO's panoptic format, read: scenes that were written, and the samples of panopticapi."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyseg
from pyseg.datasets.coco_panoptic import COCOPanoptic
from pyseg.datasets.synthetic import CLASSES, STUFF, THINGS, StreetScenes
from pyseg.errors import ImageError, LabelError, LayoutError
from pyseg.image import write_image, write_panoptic
from pyseg.types import VOID, Dataset

ROOT = Path(__file__).parents[2]
SCENES = StreetScenes(length=3, size=(48, 70), seed=4)
IDS = (30, 31, 32, 33, 34, 5, 4, 3)  # of the classes; things come first, as in COCO


@pytest.fixture
def folder(tmp_path):
    for name in ("val2017", "annotations"):
        (tmp_path / name).mkdir()
    samples = [SCENES[k] for k in range(len(SCENES))]
    for sample in samples:
        write_image(tmp_path / "val2017" / f"{sample.name}.png", sample.image)
    write_panoptic(
        tmp_path / "annotations/panoptic_val2017.json",
        ((sample.name, sample.segments) for sample in samples),
        CLASSES,
        things=range(len(STUFF), len(CLASSES)),
        category_ids=IDS,
    )
    return tmp_path


def test_what_was_written_is_read(folder):
    dataset = COCOPanoptic(folder, "val2017")
    assert isinstance(dataset, Dataset) and pyseg.datasets.get("coco_panoptic") is COCOPanoptic
    assert dataset.classes == CLASSES and dataset.things == THINGS
    assert dataset.category_ids == IDS and len(dataset) == 3
    for k, sample in enumerate(dataset):
        scene = SCENES[k]
        assert sample.name == scene.name
        assert torch.equal(sample.image, scene.image)
        assert torch.equal(sample.labels, scene.labels) and sample.labels.dtype == torch.uint8
        assert torch.equal(sample.segments.map, scene.segments.map)
        assert sample.segments.items == scene.segments.items
        for name in ("boxes", "masks", "labels", "scores", "crowd"):
            ours, theirs = (getattr(s.instances, name) for s in (sample, scene))
            assert torch.equal(ours, theirs), name


def test_some_classes(folder):
    dataset = COCOPanoptic(folder, "val2017", classes=("car", "sky"))
    assert dataset.classes == ("sky", "car") and dataset.things == ("car",)
    for k, sample in enumerate(dataset):
        scene = SCENES[k].labels
        assert torch.equal(sample.labels == 0, scene == 0)
        assert torch.equal(sample.labels == 1, scene == CLASSES.index("car"))
        assert torch.equal(sample.labels == VOID, sample.segments.map == 0)
        assert {item.label for item in sample.segments.items} <= {0, 1}
        assert len(sample.instances.labels) == sum(i.label == 1 for i in sample.segments.items)


def test_bad_data_sets(folder):
    with pytest.raises(ValueError, match="has no category lorry"):
        COCOPanoptic(folder, "val2017", classes=("lorry", "sky"))
    with pytest.raises(ValueError, match="give root, or both annotations and images"):
        COCOPanoptic(images=folder)
    with pytest.raises(LayoutError, match=r"there is no annotations/panoptic_train2017.json"):
        COCOPanoptic(folder)
    path = folder / "annotations/panoptic_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segments_info"][0]["id"] = 77
    path.write_text(json.dumps(content))
    with pytest.raises(LabelError, match="the map and its list differ in the ids 1, 77"):
        COCOPanoptic(folder, "val2017")[0]
    write_image(folder / "val2017" / f"{SCENES[1].name}.png", torch.zeros(3, 9, 9).byte())
    with pytest.raises(ImageError, match="they must be equal"):
        COCOPanoptic(folder, "val2017")[1]
    (folder / "val2017" / f"{SCENES[2].name}.png").unlink()
    with pytest.raises(LayoutError, match=f"1 of 3 images are absent .*: {SCENES[2].name}"):
        COCOPanoptic(folder, "val2017")


def test_panopticapi_samples(data_folder):
    sample = data_folder("panoptic/coco_sample")
    path = sample / "panoptic_examples.json"
    dataset = COCOPanoptic(annotations=path, images=sample / "images")
    assert len(dataset.classes) == 133 and len(dataset.things) == 80
    assert dataset.classes[53] == dataset.things[0] == "person" and dataset.category_ids[53] == 1
    entries = json.loads(path.read_text())["annotations"]
    for sample, entry in zip(dataset, entries, strict=True):
        listed = [s for s in entry["segments_info"] if s["category_id"] < 92]
        assert sample.instances.crowd.tolist() == [bool(s["iscrowd"]) for s in listed]
        x, y, w, h = torch.tensor([s["bbox"] for s in listed]).float().unbind(1)
        assert torch.equal(sample.instances.boxes, torch.stack([x, y, x + w, y + h], 1))
        assert sample.instances.masks.sum((1, 2)).tolist() == [s["area"] for s in listed]


def test_street_panoptic(tmp_path, data_folder):
    """The data set of the training proof: four photographs, two of them with crowds."""
    script = ROOT / "benchmarks/street_panoptic.py"
    data = data_folder("panoptic/coco_sample").parents[1]
    command = [sys.executable, str(script), str(data), str(tmp_path / "street"), "--width", "256"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    dataset = COCOPanoptic(tmp_path / "street", "train")
    assert len(dataset) == 4 and len(dataset.classes) == 12
    assert sum(int(sample.instances.crowd.sum()) for sample in dataset) > 0
    assert all(sample.image.shape[2] == 256 for sample in dataset)
    assert min(i.area for sample in dataset for i in sample.segments.items) >= 50
