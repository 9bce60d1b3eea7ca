"""What is absent, misplaced or damaged: one error that helps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import pyseg
from pyseg.datasets.layout import Published, Root
from pyseg.datasets.pairs import map_of, read_mat, segments_of
from pyseg.errors import LabelError, LayoutError, PysegError

FACTS = Published("Tiles", "https://example.org/tiles", "images/*.jpg\nlabels/*.png")


def fails(match, call, *arguments):
    with pytest.raises(LayoutError, match=match) as error:
        call(*arguments)
    assert "https://example.org/tiles" in str(error.value)
    return error.value


def test_the_folder_above_and_the_one_below_are_named(tmp_path):
    (tmp_path / "tiles/images").mkdir(parents=True)
    text = str(
        fails("there is no images or pictures", Root(tmp_path, FACTS).need, "images", "pictures")
    )
    assert f"It seems that root should be {tmp_path / 'tiles'}." in text
    text = str(fails("no images", Root(tmp_path / "tiles/images", FACTS).need, "images"))
    assert f"root should be {tmp_path / 'tiles'}." in text
    (tmp_path / "other/images").mkdir(parents=True)  # two: which?
    assert "root should" not in str(fails("no images", Root(tmp_path, FACTS).need, "images"))
    assert Root(tmp_path, FACTS, ("tiles",)).need("images") == tmp_path / "tiles/images"


def test_a_split_that_is_absent_is_not_half_of_one(tmp_path):
    assert fails("no folder", Root, tmp_path / "nowhere", FACTS).absent
    (tmp_path / "images").mkdir()
    root = Root(tmp_path, FACTS)
    assert fails("no labels", root.need, "labels").absent
    folder = root.need("images")
    assert not fails("no labels", root.need, "labels").absent
    assert not fails(r"holds no \*.jpg or \*.png", root.files, folder, ".jpg", ".png").absent


def test_many_entries_are_shortened(tmp_path):
    for k in range(20):
        (tmp_path / f"{k:02}.txt").touch()
    text = str(fails("no images", Root(tmp_path, FACTS).need, "images"))
    assert "11.txt and 8 more." in text and "12.txt" not in text


def test_lists_and_names(tmp_path):
    root = Root(tmp_path, replace(FACTS, counts={"train": 3}))
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00a")
    assert "Splits: train." in str(
        fails("cannot be read as text", root.listed, tmp_path / "list.txt")
    )
    (tmp_path / "list.txt").write_text("\n  \n")
    fails("names no image", root.listed, tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("\ufeffa/b.jpg x\nc\n\n", encoding="utf-8")
    assert root.listed(tmp_path / "list.txt") == ["b", "c"]
    for name in ("a.jpg", "a.jpeg", ".hidden.jpg", "b.txt"):
        (tmp_path / name).touch()
    fails("have one name; remove one", root.files, tmp_path, ".jpg", ".jpeg")
    (tmp_path / "a.jpeg").unlink()
    assert set(root.files(tmp_path, ".jpg")) == {"a"}
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/B.JPG").touch()
    assert set(root.files(tmp_path, ".jpg", deep=True)) == {"a", "deep/B"}


def test_matlab_files_that_are_none(tree):
    root = tree(
        {
            "good.mat": {"LabelMap": np.ones((3, 4), np.uint8)},
            "flat.mat": {"LabelMap": np.ones((1, 4))},
            "minus.mat": {"LabelMap": np.full((3, 4), -1, np.int16)},
            "text.mat": "not MATLAB",
        }
    )
    whole = (root / "good.mat").read_bytes()
    (root / "cut.mat").write_bytes(whole[: len(whole) // 2])
    assert torch.equal(
        map_of(read_mat(root / "good.mat", "LabelMap"), root), torch.ones(3, 4).int()
    )
    for name in ("text.mat", "cut.mat"):
        with pytest.raises(LabelError, match=rf"{name} cannot be read as a MATLAB file"):
            read_mat(root / name, "LabelMap")
    with pytest.raises(LabelError, match=r"nowhere.mat does not exist"):
        read_mat(root / "nowhere.mat", "LabelMap")
    with pytest.raises(LabelError, match=r"holds no GTcls.Segmentation; it is of another data set"):
        read_mat(root / "good.mat", "GTcls", "Segmentation")
    with pytest.raises(LabelError, match=r"no label map"):
        map_of(read_mat(root / "flat.mat", "LabelMap"), root)
    with pytest.raises(LabelError, match=r"from -1 to -1, no class ids"):
        map_of(read_mat(root / "minus.mat", "LabelMap"), root)


def test_segments_against_a_loop(rng):
    for _ in range(20):
        size = rng.integers(1, 20, 2)
        codes = rng.integers(0, int(rng.choice([4, 300, 70000])), size)
        labels_of = rng.choice([0, 1, 5, 255], 70001)
        crowd_of = rng.integers(0, 2, 70001).astype(bool)
        labels, crowds = labels_of[codes].astype(np.uint8), crowd_of[codes]
        found = segments_of(*(torch.from_numpy(a) for a in (codes, labels, crowds)))
        wanted = [int(c) for c in np.unique(codes) if labels_of[c] != 255]
        assert [item.id for item in found.items] == list(range(1, len(wanted) + 1))
        for item, code in zip(found.items, wanted, strict=True):
            assert np.array_equal(found.map.numpy() == item.id, codes == code)
            stated = (item.label, item.area, item.crowd)
            assert stated == (labels_of[code], (codes == code).sum(), crowd_of[code])
        assert np.array_equal(found.map.numpy() == 0, labels == 255)


def test_nyu_depth_without_h5py_names_the_extra(tree, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "h5py", None)
    root = tree(
        {
            "nyu_depth_v2_labeled.mat": "",
            "splits.mat": {"trainNdxs": np.array([[1]])},
            "classMapping40.mat": {"mapClass": np.array([[1]])},
        }
    )
    with pytest.raises(ImportError, match=r"pip install 'pyseg-toolkit\[nyud\]'"):
        pyseg.datasets.create("nyudv2", root=root)


def test_nyu_depth_damaged(tree):
    h5py = pytest.importorskip("h5py", reason="NYU Depth v2 needs h5py")
    root = tree(
        {
            "nyu_depth_v2_labeled.mat": "no HDF5",
            "splits.mat": {"trainNdxs": np.array([[1], [7]]), "testNdxs": np.array([[1]])},
            "classMapping40.mat": {"mapClass": np.array([[1, 41]])},
        }
    )
    create = pyseg.datasets.create
    with pytest.raises(PysegError, match="cannot be read as NYU's HDF5 file"):
        create("nyudv2", root=root)
    (root / "nyu_depth_v2_labeled.mat").unlink()
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = np.zeros((1, 3, 4, 5), np.uint8)
    with pytest.raises(PysegError, match="cannot be read as NYU's HDF5 file"):
        create("nyudv2", root=root)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "a") as file:
        file["labels"] = np.zeros((1, 4, 5), np.uint16)
    with pytest.raises(PysegError, match=r"names image 7, but .* has 1"):
        create("nyudv2", root=root)
    with pytest.raises(PysegError, match=r"mapClass must be 0 to 40, got 1 to 41"):
        create("nyudv2", root=root, split="test")
    with pytest.raises(LayoutError, match="there is no split 'val'"):
        create("nyudv2", root=root, split="val")


def test_coco_instances_that_are_none(tree):
    import json

    entry = {"image_id": 1, "category_id": 4, "segmentation": [[2, 1, 6, 1, 6, 5, 2, 5]]}
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 8, "width": 10}],
        "annotations": [entry],
        "categories": [{"id": 4, "name": "car"}],
    }

    def made(**changed):
        text = json.dumps(content | changed)
        root = tree(
            {"val/1.jpg": np.zeros((8, 10, 3), np.uint8), "annotations/instances_val.json": text}
        )
        return pyseg.datasets.create("coco_instances", root=root, split="val")

    assert made()[0].instances.boxes.tolist() == [[2, 1, 6, 5]]
    for wrong in ([[0, 0, 4, 0]], [], "mask", [[0, 0, 1e9, 0, 4, 4]], [[0, 0, "a", 0, 4, 4]], None):
        dataset = made(annotations=[entry | {"segmentation": wrong}])
        with pytest.raises(LabelError, match=r"image 1 of .* neither a run-length"):
            dataset[0]
    run = {"size": [2, 2], "counts": [1, 3]}
    with pytest.raises(LabelError, match=r"a mask of size \[2, 2\], not \[8, 10\]"):
        made(annotations=[entry | {"segmentation": run}])[0]
    for wrong in ({"image_id": 2}, {"category_id": 5}):
        with pytest.raises(PysegError, match="annotation 0 is of no image or no category"):
            made(annotations=[entry | wrong])
    with pytest.raises(PysegError, match="categories of different names"):
        made(categories=[{"id": 4, "name": "car"}, {"id": 5, "name": "car"}])
    with pytest.raises(PysegError, match=r"instances_val.json.*lacks 'categories'"):
        text = json.dumps({"images": [], "annotations": []})
        root = tree({"annotations/instances_val.json": text})
        pyseg.datasets.create("coco_instances", root=root, split="val")
    dataset = made(images=[{"id": 1, "file_name": "1.jpg", "height": 9, "width": 10}])
    with pytest.raises(pyseg.errors.ImageError, match=r"is \[8, 10\] pixels, .* says \[9, 10\]"):
        dataset[0]


def test_mhp_people_that_differ_in_size(tree):
    root = tree(
        {
            "images/0001.jpg": np.zeros((4, 5, 3), np.uint8),
            "annotations/0001_02_01.png": np.ones((4, 5), np.uint8),
            "annotations/0001_02_02.png": np.ones((5, 5), np.uint8),
            "test_list.txt": "0001.jpg\n",
        }
    )
    dataset = pyseg.datasets.create("mhp_v1", root=root, split="test")
    with pytest.raises(LabelError, match=r"0001_02_02.png and .*0001_02_01.png differ in size"):
        dataset[0]
    with pytest.raises(LayoutError, match="there is no split 'dev'"):
        pyseg.datasets.create("mhp_v1", root=root, split="dev")


def test_mhp_val_is_what_follows_the_first_3000(tree):
    names = [f"{k:04}" for k in range(1, 3003)]
    files = {"train_list.txt": "".join(f"{name}.jpg\n" for name in names)}
    for name in names[2999:]:  # the rest of train is not there, and val does not need it
        files[f"images/{name}.jpg"] = np.zeros((2, 2, 3), np.uint8)
        files[f"annotations/{name}_01_01.png"] = np.zeros((2, 2), np.uint8)
    root = tree(files)
    assert pyseg.datasets.create("mhp_v1", root=root, split="val").names == ("3001", "3002")
    with pytest.raises(LayoutError, match="2999 of 3000 images are absent"):
        pyseg.datasets.create("mhp_v1", root=root, split="train")
