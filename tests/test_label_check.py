import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pyseg.cli import app
from pyseg.errors import PysegError
from pyseg.label_check import check_labels


@pytest.fixture
def tree(tmp_path):
    """Writes ``labels/`` (arrays or PIL images) and, with ``images``, images of these sizes."""

    def make(labels, images=None, classes=None):
        (tmp_path / "labels").mkdir()
        for name, content in labels.items():
            if isinstance(content, (list, np.ndarray)):
                content = Image.fromarray(
                    np.asarray(content, dtype=getattr(content, "dtype", "u1"))
                )
            path = tmp_path / "labels" / (name if "." in name else f"{name}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            content.save(path)
        if images is not None:
            (tmp_path / "images").mkdir()
            for name, size in images.items():
                Image.new("RGB", size).save(tmp_path / "images" / f"{name}.jpg")
        if classes is not None:
            (tmp_path / "classes.txt").write_text("\n".join(classes))
        return tmp_path

    return make


def kinds(report):
    return [problem.kind for problem in report.problems]


def only(report, kind):
    assert kinds(report) == [kind], report.problems
    return report.problems[0]


GOOD = [[0, 1, 2, 255], [2, 2, 1, 0]]


def test_nothing_wrong(tree):
    folder = tree({"a": GOOD, "sub/b": [[0, 0], [1, 1]]}, classes=("road", "sky", "tree"))
    report = check_labels(folder)
    assert report.ok and not report.problems and report.files == 2
    rows = [(c.value, c.name, c.pixels, c.files) for c in report.values]
    assert rows == [(0, "road", 4, 2), (1, "sky", 4, 2), (2, "tree", 3, 1), (255, "void", 1, 1)]
    assert check_labels(folder / "labels", num_classes=3).ok
    assert check_labels(folder / "labels").ok
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_masks_of_0_and_255(tree):
    folder = tree({"a": [[0, 255], [0, 0]], "b": [[0, 0], [0, 0]]})
    for options in ({}, {"num_classes": 2}):
        problem = only(check_labels(folder, **options), "mask-255")
        assert problem.files == ("a.png",) and "ignore" in problem.message
    assert "no class" in only(check_labels(folder, ignore_index=7), "mask-255").message


def test_values_out_of_range(tree):
    folder = tree({"a": GOOD, "b": [[0, 11, 26], [7, 7, 33]]})
    report = check_labels(folder, num_classes=19)
    problem = next(p for p in report.problems if p.error)
    assert problem.kind == "out-of-range" and problem.files == ("b.png",)
    assert "26, 33" in problem.message and "Cityscapes" in problem.message
    assert "2 pixels" in problem.message and not report.ok


@pytest.mark.parametrize(
    ("values", "hint"), [([0, 1, 2, 3], "reduce_zero_label"), ([1, 2, 3], "0 never occurs")]
)
def test_off_by_one(tree, values, hint):
    report = check_labels(tree({"a": [values]}), num_classes=3)
    assert not report.ok
    assert report.problems[0].kind == "off-by-one" and hint in report.problems[0].message


def test_off_by_one_without_a_class_list(tree):
    assert not check_labels(tree({"a": [[1, 2, 3, 255]]})).ok


def test_class_never_present_is_a_warning(tree):
    folder = tree({"a": [[0, 2]]}, classes=("road", "sky", "tree", "car"))
    report = check_labels(folder)
    assert "sky, car" in only(report, "absent-class").message and report.ok


def test_void_only_map_is_a_warning(tree):
    report = check_labels(tree({"a": [[255, 255]], "b": [[0, 1]]}), num_classes=2)
    assert only(report, "void-only").files == ("a.png",) and report.ok


def test_colours_instead_of_ids(tree):
    palette = np.array([[128, 64, 128], [70, 70, 70], [0, 0, 142]], np.uint8)
    generator = np.random.default_rng(0)
    folder = tree(
        {
            "coloured": palette[generator.integers(0, 3, (8, 9))],
            "other": palette[generator.integers(0, 2, (8, 9))],
            "grey": np.repeat(generator.integers(0, 3, (8, 9, 1), np.uint8), 3, 2),
            "photograph": generator.integers(0, 256, (40, 41, 3), np.uint8),
        }
    )
    report = check_labels(folder, num_classes=3)
    found = {problem.files: problem.message for problem in report.problems}
    assert kinds(report) == ["colours"] * 3
    assert "a palette turned into RGB" in found["coloured.png", "other.png"]
    assert "keep one" in found["grey.png",]
    assert "photograph" in found["photograph.png",]


def test_photographs_as_labels(tree):
    grey = np.random.default_rng(1).integers(0, 256, (60, 60), np.uint8)
    problem = only(check_labels(tree({"a": grey})), "sparse-values")
    assert "photograph" in problem.message and not problem.error


def test_colour_map_turned_grey(tree):
    grey = np.array([0, 38, 75, 113, 14, 52], np.uint8)  # Pascal VOC's palette by luma
    folder = tree({"a": grey[np.random.default_rng(0).integers(0, 6, (9, 9))]})
    report = check_labels(folder, num_classes=21)
    assert (
        report.problems[0].kind == "out-of-range" and "colour-coded" in report.problems[0].message
    )
    assert only(check_labels(folder), "sparse-values")


def test_palettes_of_each_file_its_own(tree):
    pictures = {}
    for name, colours in (("a", [0, 0, 0, 200, 0, 0]), ("b", [0, 0, 0, 0, 200, 0])):
        pictures[name] = Image.fromarray(np.array([[0, 1]], np.uint8))
        pictures[name].putpalette(colours)
    problem = only(check_labels(tree(pictures), num_classes=2), "palette")
    assert "index 1 is the colour (200, 0, 0) in a.png and (0, 200, 0) in b.png" in problem.message


def test_missing_pairs_and_sizes(tree):
    folder = tree({"a": GOOD, "b": GOOD, "x": GOOD}, {"a": (4, 2), "b": (8, 4), "c": (4, 2)})
    report = check_labels(folder, num_classes=3)
    found = {problem.kind: problem for problem in report.problems}
    assert set(found) == {"missing-labels", "missing-image", "size"} and not report.ok
    assert found["missing-labels"].files == ("c",) and found["missing-image"].files == ("x",)
    assert found["size"].files == ("b.png",) and "4 x 2" in found["size"].message
    assert "8 x 4" in found["size"].message


def test_no_name_matches(tree):
    folder = tree({"a_gt": GOOD}, {"a_img": (4, 2)})
    assert "'a_gt' and 'a_img'" in only(check_labels(folder, num_classes=3), "missing-pair").message


def test_exif_orientation_counts(tree):
    folder = tree({"turned": np.zeros((6, 2), np.uint8), "not": np.zeros((2, 6), np.uint8)})
    (folder / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("turned", "not"):
        Image.new("RGB", (6, 2)).save(folder / "images" / f"{name}.jpg", exif=exif)
    problem = only(check_labels(folder, num_classes=1), "size")
    assert problem.files == ("not.png",) and "EXIF" in problem.message


def test_floats_and_16_bits(tree):
    ids = np.array([[0, 1, 2], [2, 1, 0]])
    folder = tree(
        {
            "float.tif": ids.astype(np.float32),
            "fine": ids.astype(np.uint16),
            "scaled": (ids * 257).astype(np.uint16),
            "instances": np.array([[26001, 0, 7]], np.uint16),
        }
    )
    report = check_labels(folder, num_classes=3)
    found = {problem.kind: problem for problem in report.problems}
    assert found["floats"].files == ("float.tif",)
    assert found["scaled"].files == ("scaled.png",)
    assert found["out-of-range"].files == ("instances.png",)
    assert "instance" in found["out-of-range"].message
    assert set(found) == {"floats", "scaled", "out-of-range"}


def test_damaged_lossy_and_doubled_files(tree):
    folder = tree({"a": GOOD, "b.jpg": GOOD, "a.bmp": GOOD})
    (folder / "labels" / "c.png").write_bytes(b"no image")
    report = check_labels(folder, num_classes=3)
    messages = {problem.files: (problem.kind, problem.message) for problem in report.problems}
    assert messages["b.jpg",][0] == "lossy" and "JPEG" in messages["b.jpg",][1]
    assert messages["c.png",][0] == "unreadable" and "not an image" in messages["c.png",][1]
    assert messages["a.bmp", "a.png"][0] == "same-name"


def test_void_ids_of_a_class_file(tree):
    folder = tree({"a": [[0, 1, 2]]})
    entries = [{"id": k, "name": name} for k, name in enumerate(("a", "b", "void"))]
    (folder / "classes.json").write_text(json.dumps({"classes": entries, "ignore_index": 2}))
    report = check_labels(folder)
    assert report.ok and [c.name for c in report.values] == ["a", "b", "void"]


def test_class_list_one_folder_up(tree):
    """As CamVid has it: classes.json beside train/, whose label maps are checked."""
    folder = tree({"train/a": GOOD})
    (folder / "labels/classes.json").write_text(json.dumps(["ground", "cell", "wall"]))
    report = check_labels(folder / "labels/train")
    assert report.ok and [c.name for c in report.values] == ["ground", "cell", "wall", "void"]


def test_bad_input(tree, tmp_path):
    with pytest.raises(PysegError, match="no folder"):
        check_labels(tmp_path / "none")
    with pytest.raises(PysegError, match="no label map"):
        check_labels(tmp_path)
    folder = tree({"a": GOOD})
    with pytest.raises(PysegError, match="num_classes"):
        check_labels(folder, num_classes=0)
    with pytest.raises(PysegError, match="2 classes"):
        check_labels(folder, num_classes=3, classes=("a", "b"))
    with pytest.raises(PysegError, match="255 is one of the 300 classes"):
        check_labels(folder, num_classes=300)
    assert check_labels(folder, num_classes=300, ignore_index=65535).ok
    with pytest.raises(PysegError, match="images"):
        check_labels(folder, images=tmp_path / "none")
    with pytest.raises(PysegError, match="no file"):
        check_labels(folder, classes=tmp_path / "none.txt")


def test_command(tree):
    folder = tree({"a": [[0, 1, 2, 3]]})

    def run(*arguments):
        return CliRunner().invoke(app, ["check-labels", str(folder), *arguments])

    good = run("--num-classes", "4")
    assert good.exit_code == 0 and "1 label map: no errors" in good.output
    bad = run("--num-classes", "3")
    assert bad.exit_code == 1 and "error [off-by-one]" in bad.output
    as_json = run("--num-classes", "3", "--json")
    report = json.loads(as_json.output)
    assert as_json.exit_code == 1 and report["errors"][0]["kind"] == "off-by-one"
    assert report["values"][3] == {"value": 3, "name": "", "pixels": 1, "files": 1}
    assert run("--images", str(folder / "none")).exit_code == 2


def test_real_labels(data_folder):
    clip, formats = data_folder("camvid/val"), data_folder("formats")
    camvid = check_labels(clip, num_classes=11, ignore_index=11)
    assert camvid.ok and camvid.files == 101
    raw = check_labels(clip, num_classes=11)
    assert [problem.kind for problem in raw.problems if problem.error] == ["off-by-one"]
    ade = formats / "ade20k_challenge150"
    ade_report = check_labels(ade / "annotations", images=ade / "images", num_classes=150)
    assert all(p.kind in ("off-by-one", "absent-class") for p in ade_report.problems)
    voc = check_labels(formats / "voc_palette_png" / "SegmentationClass", num_classes=21)
    assert voc.ok
