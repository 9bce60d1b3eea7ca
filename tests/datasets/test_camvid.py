import numpy as np
import pytest
import torch
from PIL import Image

import pyseg
from pyseg.datasets.camvid import CamVid
from pyseg.errors import ImageError, LabelError, LayoutError
from pyseg.types import Dataset


def write(root, images, labels, stems, *, suffix=".png", ids=(0, 3, 11)):
    """Writes 4 x 6 frames whose labels are ``ids``, two columns each."""
    for folder in (images, labels):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, stem in enumerate(stems):
        pixels = np.full((4, 6, 3), 10 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(root / images / f"{stem}{suffix}")
        values = np.repeat(np.array(ids, dtype=np.uint8), 2)[None].repeat(4, 0)
        Image.fromarray(values).save(root / labels / f"{stem}.png")


@pytest.mark.parametrize(
    ("images", "labels", "suffix"),
    [("val/images", "val/labels", ".jpg"), ("val", "valannot", ".png")],
)
def test_both_layouts(tmp_path, images, labels, suffix):
    write(tmp_path, images, labels, ["b", "a"], suffix=suffix)
    dataset = CamVid(tmp_path, "val")
    assert isinstance(dataset, Dataset)
    assert [dataset[i].name for i in range(len(dataset))] == ["a", "b"]
    sample = dataset[0]
    assert sample.image.shape == (3, 4, 6) and sample.image.dtype == torch.uint8
    assert sample.labels.dtype == torch.uint8
    assert sample.labels[0].tolist() == [0, 0, 3, 3, 255, 255]


def test_the_list_decides_frames_and_order(tmp_path):
    write(tmp_path, "train", "trainannot", ["a", "b", "c"])
    # As in the SegNet tutorial: two paths a line, of another root.
    (tmp_path / "train.txt").write_text(
        "/SegNet/CamVid/train/c.png /SegNet/CamVid/trainannot/c.png\n"
        "/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png\n\n"
    )
    assert CamVid(tmp_path, "train").names == ("c", "a")
    (tmp_path / "train.txt").write_text("b\nmissing\n")
    with pytest.raises(LayoutError, match=r"1 of 2 images are absent in .*: missing"):
        CamVid(tmp_path, "train")


def test_frames_by_pattern(tmp_path):
    stems = ["0001TP_006690", "0001TP_006720", "0006R0_f00930", "0016E5_00390"]
    block = ["0001TP_007710", "0006R0_f03930"]
    write(tmp_path / "camvid", "train/images", "train/labels", [*stems, *block])
    for only, without, expected in (
        ("0001TP_006*", (), stems[:2]),
        (["0006R0_f00*", "0016E5_*"], (), stems[2:]),
        ((), "0001TP_00672?, 0016E5_*, hold-outs", [stems[0], stems[2]]),
        ("0001TP_*", ["*6690", "dusk-block"], [stems[1]]),
        ("hold-outs", (), block),
        ("day-block", "dusk-block", block[1:]),
    ):
        found = CamVid(tmp_path, "train", only=only, without=without)  # the folder above, too
        assert found.names == tuple(expected)
    with pytest.raises(ValueError, match=r"no frame of 'train' is left by only='x\*'"):
        CamVid(tmp_path, "train", only="x*")


def test_drives(tmp_path):
    stems = ["0001TP_006690", "0001TP_007710", "0006R0_f00930", "0016E5_00390"]
    write(tmp_path, "train", "trainannot", stems)
    for drives, options, expected in (
        ("day", {}, stems[2:]),
        ("dusk", {}, stems[:2]),
        (["0016E5"], {}, stems[3:]),
        ("0016E5, dusk", {"without": "dusk-block"}, [stems[0], stems[3]]),
        ("", {}, stems),
    ):
        assert CamVid(tmp_path, drives=drives, **options).names == tuple(expected)
    with pytest.raises(ValueError, match=r"no frame of 'night'; it has those of 0001TP, 0006R0, 0"):
        CamVid(tmp_path, drives="day,night")
    with pytest.raises(ValueError, match=r"only='0016\*' and without=\(\) of the drives 0001TP"):
        CamVid(tmp_path, drives="dusk", only="0016*")


def test_missing_folders_and_files(tmp_path):
    with pytest.raises(LayoutError, match=r"no folder .*nowhere"):
        CamVid(tmp_path / "nowhere")
    with pytest.raises(LayoutError, match=r"there is no test/images or test\."):
        CamVid(tmp_path, "test")
    write(tmp_path, "train", "trainannot", ["a", "b"])
    (tmp_path / "trainannot" / "b.png").unlink()
    with pytest.raises(LayoutError, match=r"1 of 2 label files are absent in .*trainannot: b"):
        CamVid(tmp_path, "train")
    (tmp_path / "train.txt").write_text("a\n")
    assert len(CamVid(tmp_path, "train")) == 1
    with pytest.raises(IndexError):
        CamVid(tmp_path, "train")[1]


@pytest.mark.parametrize(
    ("ids", "shown", "cause"),
    [((0, 12, 26), "12, 26", "Cityscapes ids"), ((0, 1, 200), "200", "colour-coded")],
)
def test_label_values_out_of_range(tmp_path, ids, shown, cause):
    write(tmp_path, "train", "trainannot", ["a"], ids=ids)
    dataset = CamVid(tmp_path)
    with pytest.raises(LabelError, match=f"a.png: label values {shown} are no .*{cause}"):
        dataset[0]


def test_sizes_must_agree(tmp_path):
    write(tmp_path, "train", "trainannot", ["a"])
    Image.new("RGB", (7, 4)).save(tmp_path / "train" / "a.png")
    with pytest.raises(ImageError, match=r"a.png is 7 x 4 pixels, its labels .* are 6 x 4"):
        CamVid(tmp_path)[0]


def test_registered():
    assert pyseg.datasets.get("camvid") is CamVid


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_data_has_the_published_pixel_counts(split, data_folder):
    import json

    root = data_folder("camvid")
    stated = json.loads((root / "classes.json").read_text())
    dataset = CamVid(root, split)
    assert len(dataset) == stated["stats"][split]["images"]
    named = [entry for entry in stated["classes"] if entry["id"] != stated["ignore_index"]]
    assert dataset.classes == tuple(entry["name"] for entry in named)
    assert dataset.palette == tuple(tuple(entry["color"]) for entry in named)
    if split == "val":  # a quarter of the files, half a second
        counts = torch.zeros(256, dtype=torch.int64)
        for index in range(len(dataset)):
            counts += torch.bincount(dataset[index].labels.flatten(), minlength=256)
        assert [*counts[:11].tolist(), counts[255].item()] == stated["stats"][split]["pixels"]
        assert counts[11:255].sum() == 0
