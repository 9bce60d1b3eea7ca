"""Segments and instances of data sets that tell objects apart, against maps made by hand."""

import numpy as np
import pytest
import torch

import pyseg
from pyseg.datasets import KITTI, VOC, BDD100KPanoptic, Cityscapes, Mapillary
from pyseg.errors import LabelError, LayoutError
from pyseg.metrics import create as create_metric
from pyseg.testing import check_dataset

BLANK = np.zeros((6, 8, 3), np.uint8)


def blocks(*columns):
    """A map of 6 rows with the given values, two columns each."""
    return np.repeat(np.array(columns), 2)[None].repeat(6, 0)


def described(dataset, sample):
    """(class, area, crowd) of every segment, sorted."""
    return sorted((dataset.classes[i.label], i.area, i.crowd) for i in sample.segments.items)


def check_agreement(dataset, sample):
    """Segments, labels and instances of a sample tell the same."""
    things = [i for i in sample.segments.items if dataset.classes[i.label] in dataset.things]
    assert torch.equal(sample.segments.label_map(len(dataset.classes)), sample.labels)
    assert len(sample.instances.labels) == len(things)
    for k, item in enumerate(things):
        assert torch.equal(sample.instances.masks[k], sample.segments.map == item.id)
        assert sample.instances.labels[k] == item.label
        assert bool(sample.instances.crowd[k]) == item.crowd
    check_dataset(dataset)
    scores = create_metric("panoptic", classes=dataset.classes, things=dataset.things)
    scores.update_segments(sample.segments, sample.segments, sample.name)
    assert scores.compute()["pq"] == pytest.approx(1)


def test_cityscapes(tree):
    # Road, a car group, two cars, an unlabelled region, a rider, a trailer (never scored).
    codes = blocks(7, 26, 26000, 26001, 0, 25003, 30000).astype(np.uint16)
    stem = "ulm/ulm_000000_000019"
    root = tree(
        {
            f"leftImg8bit/val/{stem}_leftImg8bit.png": np.zeros((*codes.shape, 3), np.uint8),
            f"gtFine/val/{stem}_gtFine_instanceIds.png": codes,
        }
    )
    dataset = Cityscapes(root, "val", regions=True)
    sample = dataset[0]
    assert described(dataset, sample) == [
        ("car", 12, False),
        ("car", 12, False),
        ("car", 12, True),
        ("rider", 12, False),
        ("road", 12, False),
    ]
    assert sample.labels[0].tolist() == [0, 0, 13, 13, 13, 13, 13, 13, 255, 255, 12, 12, 255, 255]
    assert sample.instances.boxes.tolist() == [
        [2, 0, 4, 6],
        [10, 0, 12, 6],
        [4, 0, 6, 6],
        [6, 0, 8, 6],
    ]
    check_agreement(dataset, sample)
    every = Cityscapes(root, "val", regions=True, classes=34)
    assert ("trailer", 12, False) in described(every, every[0])
    with pytest.raises(LayoutError, match=r"holds no \*_gtFine_labelIds.png"):
        Cityscapes(root, "val")


def test_cityscapes_coarse_and_train_ids(tree):
    ids = blocks(7, 26, 1, 33).astype(np.uint8)
    train_ids = blocks(0, 13, 255, 18).astype(np.uint8)
    stem = "ulm/ulm_000000_000019"
    extra = "bonn/bonn_000000_000019"
    root = tree(
        {
            f"leftImg8bit/train/{stem}_leftImg8bit.png": BLANK,
            f"leftImg8bit/train_extra/{extra}_leftImg8bit.png": BLANK,
            f"gtFine/train/{stem}_gtFine_labelTrainIds.png": train_ids,
            f"gtCoarse/train_extra/{extra}_gtCoarse_labelIds.png": ids,
        }
    )
    for dataset in (Cityscapes(root), Cityscapes(root, "train_extra", annotations="coarse")):
        assert dataset[0].labels[0].tolist() == [0, 0, 13, 13, 255, 255, 18, 18]
    everything = Cityscapes(root, "train_extra", annotations="coarse", classes=34)
    assert everything[0].labels[0].tolist() == [7, 7, 26, 26, 1, 1, 33, 33]
    assert everything.classes[7] == "road" and everything.classes[33] == "bicycle"
    with pytest.raises(LayoutError):
        Cityscapes(root, classes=34)  # train ids do not tell
    with pytest.raises(ValueError, match="classes must be 19 or 34"):
        Cityscapes(root, classes=20)
    with pytest.raises(ValueError, match="annotations must be 'fine' or 'coarse'"):
        Cityscapes(root, annotations="rough")


def test_label_ids_where_train_ids_are_expected_say_so(tree):
    stem = "ulm/ulm_000000_000019"
    root = tree(
        {
            f"leftImg8bit/train/{stem}_leftImg8bit.png": BLANK,
            f"gtFine/train/{stem}_gtFine_labelTrainIds.png": blocks(7, 26, 1, 33).astype(np.uint8),
        }
    )
    with pytest.raises(LabelError, match=r"values 26, 33 are no class ids.*Cityscapes ids"):
        Cityscapes(root)[0]
    (root / f"gtFine/train/{stem}_gtFine_labelTrainIds.png").unlink()
    root = tree(
        {f"gtFine/train/{stem}_gtFine_labelIds.png": blocks(7, 26001, 1, 3).astype(np.uint16)}
    )
    with pytest.raises(
        LabelError, match=r"26001 .*19 classes, of 34 ids from 0 to 33.*instance or panoptic ids"
    ):
        Cityscapes(root)[0]


def test_kitti(tree):
    # Sky, cars 1 and 2, cars that were not told apart, ego vehicle.
    codes = blocks(23 * 256, 26 * 256 + 1, 26 * 256 + 2, 26 * 256, 256).astype(np.uint16)
    root = tree(
        {
            "training/image_2/000000_10.png": np.zeros((*codes.shape, 3), np.uint8),
            "training/instance/000000_10.png": codes,
            "testing/image_2/000000_10.png": BLANK,
        }
    )
    dataset = KITTI(root, regions=True)
    assert described(dataset, dataset[0]) == [
        ("car", 12, False),
        ("car", 12, False),
        ("car", 12, True),
        ("sky", 12, False),
    ]
    check_agreement(dataset, dataset[0])
    test = KITTI(root, "test")
    assert test[0].labels is None and test[0].image.shape == (3, 6, 8)


def test_mapillary(tree):
    labels = '{"name": "%s", "color": [1, 2, 3], "instances": %s, "evaluate": %s}'
    config = [("bird", "true", "true"), ("curb", "false", "true"), ("void", "false", "false")]
    text = ", ".join(labels % entry for entry in config)
    # Bird 0, whose code is 0, bird 1, the curb, void.
    codes = blocks(0, 1, 256, 512).astype(np.uint16)
    root = tree(
        {
            "config_v1.2.json": f'{{"labels": [{text}]}}',
            "validation/images/a.jpg": BLANK,
            "validation/v1.2/instances/a.png": codes,
        }
    )
    dataset = Mapillary(root, "val", regions=True)
    assert dataset.classes == ("bird", "curb") and dataset.things == ("bird",)
    assert described(dataset, dataset[0]) == [
        ("bird", 12, False),
        ("bird", 12, False),
        ("curb", 12, False),
    ]
    check_agreement(dataset, dataset[0])
    with pytest.raises(ValueError, match=r"version must be 'v1.2' or 'v2.0', got 'v1.1'"):
        Mapillary(root, "val", version="v1.1")
    for wrong in ("{}", '{"labels": [{"name": "a"}]}', "{", f'{{"labels": [{text}, {text}]}}'):
        tree({"config_v1.2.json": wrong})
        with pytest.raises(LabelError, match=r"config_v1.2.json"):
            Mapillary(root, "val")


def test_bdd100k_panoptic(tree):
    planes = np.zeros((6, 10, 4), np.uint8)
    # Road; car 300; car 301, a crowd; a person to be ignored; an occluded and truncated bus.
    rows = [(7, 0, 0, 7), (35, 0, 1, 44), (35, 2, 1, 45), (31, 1, 0, 9), (34, 12, 0, 10)]
    for k, value in enumerate(rows):
        planes[:, 2 * k : 2 * k + 2] = value
    root = tree(
        {
            "images/10k/val/a.jpg": np.zeros((6, 10, 3), np.uint8),
            "labels/pan_seg/bitmasks/val/a.png": planes,
            "images/10k/test/b.jpg": BLANK,
        }
    )
    dataset = BDD100KPanoptic(root, "val")
    assert described(dataset, dataset[0]) == [
        ("bus", 12, False),
        ("car", 12, False),
        ("car", 12, True),
        ("person", 12, True),
        ("road", 12, False),
    ]
    check_agreement(dataset, dataset[0])
    assert BDD100KPanoptic(root, "test")[0].labels is None


def voc_tree(tree):
    """Images 1 and 2 of VOC, 3 of VOC's val, 4 of SBD alone; SBD labels 2, 3 and 4."""
    files = {f"VOC2012/JPEGImages/{k}.jpg": BLANK for k in "1234"}
    for k, value in zip("123", (1, 2, 3), strict=True):
        files[f"VOC2012/SegmentationClass/{k}.png"] = blocks(0, value, 255, value).astype(np.uint8)
        files[f"VOC2012/SegmentationObject/{k}.png"] = blocks(0, 1, 255, 2).astype(np.uint8)
    for k, value in zip("234", (12, 13, 14), strict=True):
        classes = blocks(0, value, 20, value).astype(np.uint8)
        objects = blocks(0, 1, 2, 3).astype(np.uint8)
        files[f"benchmark_RELEASE/dataset/cls/{k}.mat"] = {"GTcls": {"Segmentation": classes}}
        files[f"benchmark_RELEASE/dataset/inst/{k}.mat"] = {"GTinst": {"Segmentation": objects}}
    lists = {"train": "1\n2\n", "val": "3\n"}
    files |= {f"VOC2012/ImageSets/Segmentation/{k}.txt": v for k, v in lists.items()}
    files |= {
        "benchmark_RELEASE/dataset/train.txt": "2\n3\n",
        "benchmark_RELEASE/dataset/val.txt": "4\n",
    }
    return tree(files)


@pytest.mark.parametrize("inside", ["", "VOC2012"])
def test_voc_with_sbd(tree, inside):
    root = voc_tree(tree)
    dataset = VOC(root / inside, "trainaug")
    # Without VOC's val; VOC's own labels where it has some.
    assert dataset.names == ("1", "2", "4")
    assert [s.labels[0, ::2].tolist() for s in dataset] == [
        [0, 1, 255, 1],
        [0, 2, 255, 2],
        [0, 14, 20, 14],
    ]
    regions = VOC(root / inside, "trainaug", regions=True)
    assert described(regions, regions[1]) == [
        ("background", 12, False),
        ("bicycle", 12, False),
        ("bicycle", 12, False),
    ]
    assert [i.area for i in regions[2].segments.items] == [12] * 4
    for sample in regions:
        check_agreement(regions, sample)
    elsewhere = VOC(root, "trainaug", sbd=root / "benchmark_RELEASE/dataset")
    assert elsewhere.names == dataset.names
    with pytest.raises(LayoutError, match=r"there is no SBD at .*nowhere"):
        VOC(root, "trainaug", sbd=root / "nowhere")


def test_voc_with_augmented_pngs(tree):
    root = voc_tree(tree)
    path = "VOC2012/SegmentationClassAug"
    tree({f"{path}/{k}.png": blocks(0, 5, 5, 5).astype(np.uint8) for k in "1234"})
    dataset = VOC(root, "trainaug")
    assert dataset.names == ("1", "2", "4") and dataset[2].labels[0, 2] == 5
    tree({"VOC2012/ImageSets/Segmentation/trainaug.txt": "4\n1\n"})
    assert VOC(root, "trainaug").names == ("4", "1")


def test_voc_without_a_palette(tree):
    root = voc_tree(tree)
    colours = np.array([(0, 0, 0), (128, 0, 0), (224, 224, 192), (0, 64, 128)], np.uint8)
    tree({"VOC2012/SegmentationClass/1.png": colours[blocks(0, 1, 2, 3)]})
    assert VOC(root)[0].labels[0, ::2].tolist() == [0, 1, 255, 20]


def test_bsds_of_another_person(tree):
    cells = np.empty((1, 2), object)
    drawn = [blocks(1, 1, 1, 2), blocks(1, 2, 3, 4)]
    for k, regions in enumerate(drawn):
        cells[0, k] = {"Segmentation": regions.astype(np.uint16)}
    root = tree(
        {
            "images/val/1.jpg": BLANK,
            "groundTruth/val/1.mat": {"groundTruth": cells},
            "flat/val/1.jpg": BLANK,
            "flat/val/1_human0.png": drawn[0].astype(np.uint8),
            "flat/val/1_human1.png": drawn[1].astype(np.uint16),
        }
    )
    for place in (root, root / "flat"):
        counts = {human: 2 if human == 0 else 4 for human in (0, 1, 9)}
        for human, count in counts.items():
            dataset = pyseg.datasets.create("bsds500", root=place, split="val", human=human)
            assert len(dataset[0].segments.items) == count
            check_agreement(dataset, dataset[0])
    with pytest.raises(pyseg.PysegError, match="human must be 0 or more"):
        pyseg.datasets.create("bsds500", root=root, human=-1)


def test_pascal_context_with_background_and_as_pngs(tree):
    root = tree(
        {
            "JPEGImages/1.jpg": BLANK,
            "SegmentationClassContext/1.png": blocks(0, 1, 59, 2).astype(np.uint8),
            "ImageSets/SegmentationContext/val.txt": "1\n",
        }
    )
    create = pyseg.datasets.create
    assert create("pascal_context", root=root, split="val")[0].labels[0, ::2].tolist() == [
        255,
        0,
        58,
        1,
    ]
    dataset = create("pascal_context", root=root, split="val", classes=60)
    assert dataset[0].labels[0, ::2].tolist() == [0, 1, 59, 2]
    assert dataset.classes[:3] == ("background", "aeroplane", "bag")
    assert list(dataset.classes[1:]) == sorted(dataset.classes[1:])


def test_deepscene_with_trees_and_camvid_with_all_classes(tree):
    root = tree(
        {
            "test/rgb/b1_Clipped.jpg": BLANK,
            "test/GT_color/b1_mask.png": np.array([(0, 60, 0), (0, 0, 0)], np.uint8)[
                blocks(0, 1, 1, 1)
            ],
            "701_StillsRaw_full/Seq05VD_f00030.png": BLANK,
            "LabeledApproved_full/Seq05VD_f00030_L.png": np.array(
                [(64, 128, 64), (64, 192, 0), (0, 0, 0)], np.uint8
            )[blocks(0, 1, 2, 0)],
        }
    )
    create = pyseg.datasets.create
    assert create("deepscene", root=root, split="test")[0].labels[0, ::2].tolist() == [255, 3, 3, 3]
    forest = create("deepscene", root=root, split="test", trees=True)
    assert forest[0].labels[0, ::2].tolist() == [5, 3, 3, 3]
    camvid = create("camvid", root=root, split="test", classes=32)
    assert camvid[0].labels[0, ::2].tolist() == [0, 30, 255, 0] and len(camvid.classes) == 31
    assert create("camvid", root=root, split="test")[0].labels[0, ::2].tolist() == [9, 1, 255, 9]
