import json

import numpy as np
import pytest
import torch
from PIL import Image

import pyseg
from pyseg.datasets.folder import Folder
from pyseg.errors import ImageError, LabelError
from pyseg.image import default_palette
from pyseg.types import Dataset


def write(root, stems=("a", "b"), values=(0, 1, 255)):
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True, exist_ok=True)
    ids = np.repeat(np.array(values, dtype=np.uint8), 2)[None].repeat(3, 0)
    for stem in stems:
        Image.new("RGB", ids.shape[::-1], (1, 2, 3)).save(root / "images" / f"{stem}.jpg")
        Image.fromarray(ids).save(root / "labels" / f"{stem}.png")
    return root


def test_pairs_by_stem(tmp_path):
    dataset = Folder(write(tmp_path), classes=("ground", "cell"))
    assert isinstance(dataset, Dataset)
    assert len(dataset) == 2 and dataset.names == ("a", "b")
    sample = dataset[1]
    assert sample.name == "b"
    assert sample.image.shape == (3, 3, 6)
    assert sample.labels[0].tolist() == [0, 0, 1, 1, 255, 255]
    assert dataset.palette == default_palette(2)
    assert pyseg.datasets.get("folder") is Folder


def test_indexed_png_labels(tmp_path):
    write(tmp_path)
    label = Image.fromarray(np.array([[0, 1, 255, 1, 0, 0]] * 3, dtype=np.uint8), mode="P")
    label.putpalette([9, 9, 9, 200, 10, 10] + [0] * 762)  # a short one would cut the ids
    label.save(tmp_path / "labels" / "a.png")
    labels = Folder(tmp_path, classes=("ground", "cell"))[0].labels
    assert labels[0].tolist() == [0, 1, 255, 1, 0, 0]


def test_split_and_folders_elsewhere(tmp_path):
    write(tmp_path / "data" / "train", ("a",))
    (tmp_path / "data" / "classes.txt").write_text("ground\n\ncell\n")
    dataset = Folder(tmp_path / "data", "train")
    assert len(dataset) == 1 and dataset.classes == ("ground", "cell")
    part = tmp_path / "data" / "train"
    elsewhere = Folder(images=part / "images", labels=part / "labels", classes=("ground", "cell"))
    assert torch.equal(elsewhere[0].labels, dataset[0].labels)
    with pytest.raises(ValueError, match=r"give root, or both images and labels"):
        Folder(images=part / "images")


def test_class_files(tmp_path):
    root = write(tmp_path / "data")
    listed = tmp_path / "classes.txt"
    listed.write_text("ground\ncell\n")
    assert Folder(root, classes=listed).classes == ("ground", "cell")
    (root / "classes.json").write_text(json.dumps(["ground", "cell", "wall"]))
    assert Folder(root).classes == ("ground", "cell", "wall")
    entries = [
        {"id": 1, "name": "cell", "color": [9, 8, 7]},
        {"id": 0, "name": "ground", "color": [1, 2, 3]},
        {"id": 2, "name": "unlabelled", "color": [0, 0, 0]},
    ]
    content = {"classes": entries, "ignore_index": 2}
    (root / "classes.json").write_text(json.dumps(content))
    write(root, values=(0, 1, 2))
    dataset = Folder(root)
    assert dataset.classes == ("ground", "cell")
    assert dataset.palette == ((1, 2, 3), (9, 8, 7))
    assert dataset[0].labels[0].tolist() == [0, 0, 1, 1, 255, 255]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ('{"names": []}', "lacks 'classes'"),
        ('[{"name": "a", "id": 4}]', "ids must be 0, 1, 2, … without gaps"),
        ('["a", "a"]', "repeats a"),
        ("[]", "has 0 names"),
    ],
)
def test_class_files_that_are_not(tmp_path, content, message):
    root = write(tmp_path)
    (root / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Folder(root)


def test_no_class_list(tmp_path):
    with pytest.raises(ValueError, match=r"put classes.txt or classes.json into root"):
        Folder(write(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no file .*names.txt"):
        Folder(tmp_path, classes=tmp_path / "names.txt")


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root: there is no folder"):
        Folder(tmp_path / "nowhere", classes=("a",))
    with pytest.raises(FileNotFoundError, match=r"images: there is no folder .*images"):
        Folder(tmp_path, classes=("a",))
    root = write(tmp_path, ("a", "b", "c"))
    (root / "labels" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no label file \(matched by stem\) for b$"):
        Folder(root, classes=("a", "b"))
    (root / "images" / "b.jpg").unlink()
    (root / "images" / "c.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image \(matched by stem\) for the labels c$"):
        Folder(root, classes=("a", "b"))
    for path in (root / "images").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"images: .* holds no .png, .jpg"):
        Folder(root, classes=("a", "b"))


def test_ambiguous_stems(tmp_path):
    root = write(tmp_path)
    Image.new("RGB", (6, 3)).save(root / "images" / "a.png")
    with pytest.raises(ValueError, match=r"have the same stem"):
        Folder(root, classes=("a", "b"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1, 2), "values 2 are no class ids: there are 2 classes, 0 to 1.*start at 1"),
        ((0, 7, 33), "values 7, 33 .*Cityscapes ids"),
        ((0, 76, 150), "values 76, 150 .*colour-coded"),
    ],
)
def test_label_values_out_of_range(tmp_path, values, message):
    dataset = Folder(write(tmp_path, values=values), classes=("a", "b"))
    with pytest.raises(LabelError, match=message):
        dataset[0]


def test_photographs_are_no_labels(tmp_path):
    root = write(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (3, 60), dtype=np.uint8)
    Image.fromarray(noise).save(root / "labels" / "a.png")
    Image.new("RGB", (60, 3)).save(root / "images" / "a.jpg")
    dataset = Folder(root, classes=("a", "b"))
    with pytest.raises(LabelError, match=r"photograph"):
        dataset[0]


def test_sixteen_bit_labels_are_checked_whole(tmp_path):
    """256 + 1 is not 1."""
    root = write(tmp_path)
    Image.fromarray(np.full((3, 6), 257, dtype=np.uint16)).save(root / "labels" / "a.png")
    dataset = Folder(root, classes=("a", "b"))
    with pytest.raises(LabelError, match=r"values 257"):
        dataset[0]


def test_sizes_must_agree(tmp_path):
    root = write(tmp_path)
    Image.new("RGB", (5, 3)).save(root / "images" / "a.jpg")
    with pytest.raises(ImageError, match=r"a.jpg is 5 x 3 pixels, its labels .* are 6 x 3"):
        Folder(root, classes=("a", "b"))[0]
