"""Real files of the data sets, put into their layouts by links."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import pyseg
from pyseg.classes import ADE20K_CLASSES
from pyseg.datasets import VOC, BDD100KPanoptic, CamVid, COCOInstances, Mapillary
from pyseg.datasets.camvid import _split
from pyseg.errors import LabelError
from pyseg.testing import check_dataset

create = pyseg.datasets.create


def put(root, files):
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, root / name)
    return root


def test_ade20k(data_folder, tmp_path):
    folder = data_folder("formats/ade20k_challenge150")
    root = put(
        tmp_path / "ADEChallengeData2016",
        {
            f"{kind}/validation/{path.name}": path
            for kind in ("images", "annotations")
            for path in (folder / kind).iterdir()
        },
    )
    dataset = create("ade20k", root=root.parent, split="val")
    assert len(dataset) == 3
    check_dataset(dataset)
    for sample in dataset:
        values = torch.from_numpy(
            np.array(Image.open(root / f"annotations/validation/{sample.name}.png")).astype(int)
        )
        assert torch.equal(sample.labels.long(), torch.where(values == 0, 255, values - 1))
    with open(folder / "objectInfo150.txt") as file:
        names = [
            line["Name"].split(",")[0].strip() for line in csv.DictReader(file, delimiter="\t")
        ]
    assert tuple(names) == ADE20K_CLASSES
    # The raw encoding of the full data set is none of this one.
    raw = folder / "ADE_train_00000970_raw_full_ade20k_encoding.png"
    put(root, {"annotations/validation/ADE_val_00000001.png": raw})
    with pytest.raises(pyseg.PysegError, match="colours instead of one class id"):
        dataset[0]


@pytest.mark.parametrize(("version", "count"), [("v1.2", 66), ("v2.0", 124)])
def test_mapillary(data_folder, tmp_path, version, count):
    folder = data_folder("formats/mapillary_100x100")
    config = json.loads((folder / "mapillary_v1.1_config.json").read_text())
    assert len(config["labels"]) == 66
    while len(config["labels"]) < count:  # that of v2.0 is not among the samples
        number = len(config["labels"])
        config["labels"].append(config["labels"][0] | {"name": f"made-up--{number}"})
    (tmp_path / f"config_{version}.json").write_text(json.dumps(config))
    name = "__CRyFzoDOXn6unQ6a3DnQ"
    root = put(
        tmp_path,
        {
            f"validation/images/{name}.jpg": folder / f"images/{name}.jpg",
            f"validation/{version}/labels/{name}.png": folder / version / f"{name}.png",
        },
    )
    dataset = Mapillary(root, "val", version=version)
    check_dataset(dataset)
    assert len(dataset.classes) == count - 1 and len(dataset.things) >= 37
    found = {dataset.classes[k] for k in dataset[0].labels.unique().tolist()}
    if version == "v1.2":
        assert found == {
            "construction--structure--building",
            "object--support--pole",
            "object--street-light",
        }
    assert len(found) == 3


def test_bdd100k(data_folder, tmp_path):
    folder = data_folder("formats/bdd100k")
    size = Image.open(folder / "panseg_mask_rgba.png").size
    for name in ("a", "b"):
        (tmp_path / "images/10k/val").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(tmp_path / f"images/10k/val/{name}.jpg")
    put(
        tmp_path,
        {
            "labels/sem_seg/masks/val/a.png": folder / "sem_seg_mask_palette.png",
            "labels/sem_seg/masks/val/b.png": folder / "sem_seg_mask_palette.png",
            "labels/pan_seg/bitmasks/val/a.png": folder / "panseg_mask_rgba.png",
            "labels/pan_seg/bitmasks/val/b.png": folder / "ins_seg_bitmask_rgba.png",
        },
    )
    labels = create("bdd100k", root=tmp_path, split="val")[0].labels
    values = np.array(Image.open(folder / "sem_seg_mask_palette.png"))
    assert torch.equal(labels, torch.from_numpy(values))
    dataset = BDD100KPanoptic(tmp_path, "val")
    items = dataset[0].segments.items
    stated = json.loads((folder / "panseg_coco.json").read_text())["segments_info"]
    assert sorted((i.label + 1, i.area) for i in items) == sorted(
        (s["category_id"], s["area"]) for s in stated
    )
    assert len(dataset[1].segments.items) == 22


def test_voc(data_folder, tmp_path):
    folder = data_folder("instance/voc3")
    kinds = ("JPEGImages", "SegmentationClass", "SegmentationObject")
    root = put(
        tmp_path / "VOC2012",
        {f"{kind}/{path.name}": path for kind in kinds for path in (folder / kind).iterdir()},
    )
    stated = json.loads((folder / "annotations_coco.json").read_text())
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    names = [entry["file_name"].removesuffix(".jpg") for entry in stated["images"]]
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(names))
    dataset = VOC(tmp_path, "val", regions=True)
    check_dataset(dataset)
    objects = COCOInstances(
        annotations=folder / "annotations_coco.json", images=root / "JPEGImages"
    )
    check_dataset(objects)
    for k, (sample, polygons) in enumerate(zip(dataset, objects, strict=True)):
        classes = [a["category_id"] for a in stated["annotations"] if a["image_id"] == k]
        assert sorted(sample.instances.labels.tolist()) == sorted(classes)
        assert sorted(polygons.instances.labels.tolist()) == sorted(classes)
        # The polygons are those that the PNGs were painted from, up to the void border.
        for mask, label in zip(sample.instances.masks, sample.instances.labels, strict=True):
            same = polygons.instances.masks[polygons.instances.labels == label]
            overlaps = (same & mask).sum((1, 2)) / (same | mask).sum((1, 2))
            assert overlaps.max() > 0.8


def test_coco_objects_have_the_stated_areas_and_boxes(data_folder):
    folder = data_folder("panoptic/coco_sample")
    path = folder / "panoptic_coco_detection_format.json"
    dataset = COCOInstances(annotations=path, images=folder / "images")
    check_dataset(dataset)
    content = json.loads(path.read_text())
    for entry, sample in zip(content["images"], dataset, strict=True):
        stated = [a for a in content["annotations"] if a["image_id"] == entry["id"]]
        assert sample.instances.masks.sum((1, 2)).tolist() == [a["area"] for a in stated]
        x, y, w, h = torch.tensor([a["bbox"] for a in stated]).float().unbind(1)
        assert torch.equal(sample.instances.boxes, torch.stack([x, y, x + w, y + h], 1))
        assert sample.instances.crowd.tolist() == [bool(a["iscrowd"]) for a in stated]


def test_sunrgbd(data_folder, tmp_path):
    folder = data_folder("formats/sunrgbd37")
    root = put(tmp_path, {"SUNRGBD-test_images/img-000001.jpg": folder / "image.jpg"})
    # The sample counts classes from 0, 255 being void; the data set from 1, 0 being void.
    values = np.array(Image.open(folder / "label.png")).astype(int)
    (root / "sunrgbd_train_test_labels").mkdir()
    published = np.where(values == 255, 0, values + 1).astype(np.uint8)
    Image.fromarray(published).save(root / "sunrgbd_train_test_labels/img-000001.png")
    dataset = create("sunrgbd", root=root, split="test")
    check_dataset(dataset)
    assert torch.equal(dataset[0].labels.long(), torch.from_numpy(values))
    found = {dataset.classes[k] for k in dataset[0].labels.unique().tolist() if k < 255}
    assert {"wall", "floor", "chair", "table", "door", "window"} & found


def test_labelmefacade(data_folder):
    root = data_folder("labelmefacade")
    for split in ("train", "test"):
        dataset = create("labelmefacade", root=root, split=split)
        assert len(dataset) == dataset.published.counts[split]
    check_dataset(dataset)
    sample = dataset[17]
    # The samples are indexed, by the data set's ids, and their palette has its colours.
    values = np.array(Image.open(root / f"labels/{sample.name}.png"))
    assert torch.equal(sample.labels, torch.from_numpy(values))


def test_bsds500(data_folder):
    root = data_folder("bsds500")
    for split in ("train", "val"):
        dataset = create("bsds500", root=root, split=split, human=2)
        assert len(dataset) == dataset.published.counts[split]
    check_dataset(dataset)
    sample = dataset[3]
    values = np.array(Image.open(root / f"val/{sample.name}_human2.png"))
    assert [item.area for item in sample.segments.items] == np.bincount(values.ravel())[1:].tolist()


def test_camvid_frames_are_split_as_segnet_did(data_folder):
    root = data_folder("camvid")
    for split in ("train", "val"):
        frames = (root / f"{split}.txt").read_text().split()
        assert {_split(frame) for frame in frames} == {split}
    assert len(CamVid(root, "val")) == 101


def test_tiny_trees_of_other_tools(data_folder):
    root = data_folder("formats/datumaro_tiny_synthetic")
    camvid = CamVid(root / "camvid_dataset", "train")
    assert camvid[0].labels.unique().tolist() == [3, 10]  # colours of road and bicyclist
    kitti = create("kitti", root=root / "kitti_dataset", regions=True)
    assert [item.label for item in kitti[0].segments.items] == [14, 14]  # two trucks
    coco = root / "coco_dataset/coco_panoptic"
    assert len(create("coco_panoptic", root=coco, split="val")) == 1
    mapillary = root / "mapillary_vistas_dataset"
    for version in ("v1.2", "v2.0"):
        dataset = Mapillary(mapillary, "val", version=version, regions=True)
        assert [len(s.instances.labels) for s in dataset] == [2, 3]
    city = root / "cityscapes_dataset/train_dataset"
    with pytest.raises(LabelError, match="values 19 are no class ids"):
        create("cityscapes", root=city, split="val")[0]
    assert len(create("cityscapes", root=city, split="val", regions=True)[0].segments.items) == 0
    voc = VOC(root / "voc_dataset/voc_dataset1", "train")
    assert voc[0].labels.unique().tolist() == [2]  # (0, 128, 0), a bicycle
