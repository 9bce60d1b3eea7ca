"""`pyseg data check`: counts, labels, the contact sheet, exit codes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pyseg.cli import app
from pyseg.data_check import TILES, check_data
from pyseg.datasets.camvid import CamVid
from pyseg.errors import LayoutError, PysegError, UnknownName
from pyseg.formats import encode_rle
from pyseg.types import Sample
from pyseg.visual import contact_sheet


def camvid(root, frames, split="val", value=3):
    """Frames of road with a column of sky and one of void."""
    for folder in (split, f"{split}annot"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    labels = np.full((6, 9), value, np.uint8)
    labels[:, 0], labels[:, 1] = 0, 11
    for k in range(frames):
        Image.new("RGB", (9, 6), (40, k, 90)).save(root / split / f"{k:03}.png")
        Image.fromarray(labels).save(root / f"{split}annot" / f"{k:03}.png")
    return root


def run(*arguments):
    return CliRunner().invoke(app, ["data", "check", *map(str, arguments)])


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """A CamVid of which two frames were published."""
    counts = {"train": 4, "val": 2}
    monkeypatch.setattr(
        CamVid,
        "published",
        CamVid.published.__class__(**{**vars(CamVid.published), "counts": counts}),
    )
    return camvid(tmp_path / "data", 2)


def test_a_whole_split(whole, tmp_path):
    result = run("camvid", "--root", whole, "--split", "val", "-o", tmp_path / "sheets")
    assert result.exit_code == 0, result.output
    assert "camvid val: 2 images of 2 published" in result.output
    with Image.open(tmp_path / "sheets/camvid-val.png") as sheet:
        # Two samples beside their labels, 320 wide each, and a legend.
        assert sheet.width == 4 * 320 + 3 * 5 and sheet.height > 213
        colours = {
            sheet.getpixel((x, y)) for x in range(0, sheet.width, 9) for y in range(0, 230, 9)
        }
    assert (40, 0, 90) in colours and (40, 1, 90) in colours
    (report,) = check_data("camvid", whole, "val")
    assert report.ok and report.sheet is None and report.checked == 2
    found = [(c.value, c.name, c.pixels, c.files) for c in report.values]
    assert found == [(0, "Sky", 12, 2), (3, "Road", 84, 2), (255, "void", 12, 2)]
    assert [problem.kind for problem in report.problems] == ["absent-class"]
    assert "9 of 11 classes never occur: Building, Pole" in report.problems[0].message


def test_every_published_split_and_json(whole, tmp_path):
    result = run("camvid", "--root", whole, "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    train, val = json.loads(result.stdout)
    assert train["ok"] and train["images"] == 0 and train["published"] == 4
    assert train["warnings"][0]["message"] == "CamVid: there is no train/images or train."
    assert val["split"] == "val" and val["ok"] and val["errors"] == []
    camvid(whole, 3, "train")
    result = run("camvid", "--root", whole, "-o", tmp_path)
    assert result.exit_code == 1
    assert "error [count]: 3 images are there, 4 were published" in result.output
    (whole / "trainannot/001.png").unlink()  # half of it
    result = run("camvid", "--root", whole, "-o", tmp_path)
    assert result.exit_code == 1 and "1 of 3 label files are absent" in result.output


def test_files_that_cannot_be_read_are_all_told(whole):
    camvid(whole, 5, value=26)
    (whole / "val/004.png").write_bytes(b"\x89PNG no more")
    (report,) = check_data("camvid", whole, "val")
    assert not report.ok and report.checked == 0
    kinds = {problem.kind: problem for problem in report.problems}
    assert set(kinds) == {"count", "unreadable"}
    assert len(kinds["unreadable"].files) == 5
    assert "values 26 are no class ids" in kinds["unreadable"].message
    assert run("camvid", "--root", whole, "--split", "val", "-o", whole).exit_code == 1
    assert not (whole / "camvid-val.png").exists()


def test_void_throughout_is_a_warning(whole):
    camvid(whole, 2, value=11)
    for path in (whole / "valannot").iterdir():
        Image.fromarray(np.full((6, 9), 11, np.uint8)).save(path)
    (report,) = check_data("camvid", whole, "val")
    assert report.ok and [p.kind for p in report.problems] == ["void-only", "absent-class"]


def test_a_limit_is_spread_evenly(whole, tmp_path):
    camvid(whole, 40)
    seen = []

    def track(items):
        for item in items:
            seen.append(item)
            yield item

    (report,) = check_data("camvid", whole, "val", limit=4, track=track, output=tmp_path)
    assert seen == [0, 10, 20, 30] and report.checked == 4
    assert [p.kind for p in report.problems] == ["count"]  # 40 of 2; few say nothing of classes
    with pytest.raises(PysegError, match="limit must be at least 1, got 0"):
        check_data("camvid", whole, "val", limit=0)
    assert TILES < 40


@pytest.mark.parametrize("arguments", [[], ["--split", "val"]])
def test_a_wrong_root_is_exit_code_1_with_the_tree(tmp_path, arguments):
    result = run("cityscapes", "--root", tmp_path, "-o", tmp_path, *arguments)
    assert result.exit_code == 1
    assert "Expected below root:" in result.stderr and "Found in" in result.stderr
    assert "cityscapes-dataset.com" in result.stderr
    with pytest.raises(LayoutError):
        check_data("cityscapes", tmp_path)


def test_data_sets_without_publication_and_wrong_names(tmp_path):
    (report,) = check_data("synthetic(length=3, size=(48, 64))", split="val", output=tmp_path)
    assert report.ok and report.images == 3 and report.published is None
    assert report.sheet == tmp_path / "synthetic-val.png" and report.sheet.is_file()
    with pytest.raises(UnknownName):
        check_data("cityskapes", tmp_path)
    result = run("cityskapes", "--root", tmp_path)
    assert result.exit_code == 2 and "Did you mean 'cityscapes'" in result.stderr
    result = run("cityscapes(classes=20)", "--root", tmp_path)
    assert result.exit_code == 2 and "classes must be 19 or 34" in result.stderr


def test_instances_alone(tmp_path):
    mask = torch.zeros(8, 10, dtype=torch.bool)
    mask[2:5, 3:7] = True
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (10, 8)).save(tmp_path / "val2017/1.jpg")
    entry = {"image_id": 1, "category_id": 4, "segmentation": encode_rle(mask)}
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 8, "width": 10}],
        "annotations": [entry, entry],
        "categories": [{"id": 4, "name": "car"}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(content))
    (report,) = check_data("coco_instances", tmp_path, "val2017", output=tmp_path)
    assert [(c.name, c.pixels, c.files) for c in report.values] == [("car", 24, 1)]
    assert [p.kind for p in report.problems] == ["count"] and report.sheet.is_file()


def test_a_contact_sheet_wants_tiles_of_one_width():
    sample = Sample("a", torch.zeros(3, 4, 6, dtype=torch.uint8))
    other = Sample("b", torch.zeros(3, 4, 7, dtype=torch.uint8))
    for tiles in ([], [("a", sample), ("b", other)]):
        with pytest.raises(ValueError, match="at least one tile, and all of one width"):
            contact_sheet(tiles, ("a",), ((1, 2, 3),))
    assert contact_sheet([("a", sample)], ("a",), ((1, 2, 3),)).width == 16
