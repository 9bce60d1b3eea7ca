import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from typer.testing import CliRunner

from pyseg import cli, conversion
from pyseg.conversion import convert
from pyseg.errors import ImageError, LabelError, PysegError, UnknownName
from pyseg.formats import encode_rle
from pyseg.formats.geojson import placement_of
from pyseg.formats.table import FORMATS, detect

SIZE = (20, 30)


def square(top, left, side=5):
    mask = np.zeros(SIZE, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def holed():
    return square(1, 1, 7) & ~square(3, 3, 3)


def two_parts():
    return square(1, 1) | square(1, 12)


def coco(path, masks, names=("cat", "dog"), images=1, **more):
    """A COCO file whose images all have these masks, of the classes in turn."""
    value = {
        "images": [
            {"id": k, "file_name": f"{k}.jpg", "height": SIZE[0], "width": SIZE[1]}
            for k in range(images)
        ],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(names)],
        "annotations": [
            {
                "image_id": k,
                "category_id": number % len(names) + 1,
                "segmentation": encode_rle(mask),
                "iscrowd": 0,
                **more,
            }
            for k in range(images)
            for number, mask in enumerate(masks)
        ],
    }
    path.write_text(json.dumps(value))
    return path


def pictures(folder, images=1, size=SIZE):
    folder.mkdir(exist_ok=True)
    for k in range(images):
        Image.new("RGB", size[::-1]).save(folder / f"{k}.jpg")
    return folder


def run(*arguments):
    return CliRunner().invoke(cli.app, ["convert", *map(str, arguments)])


def tree(path):
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def output_of(name, folder):
    return folder / f"{name}{FORMATS[name].suffix}"


# --- the command ------------------------------------------------------------------------------


def test_command(tmp_path):
    source = coco(tmp_path / "in.json", [holed(), two_parts()])
    result = run(source, tmp_path / "out", "--to", "yolo")
    assert result.exit_code == 0, result.output
    assert "is taken for COCO's instances (a JSON with images" in result.stderr
    assert "1 image from coco to yolo" in result.stdout
    assert "2 masks: 1 equal, 1 changed; 6 of 90 pixels differ (6.67%)" in result.stdout
    assert "1 mask differs: several parts, which the target bridges" in result.stdout
    result = run(source, tmp_path / "out2", "--to", "yolo", "--json")
    value = json.loads(result.stdout)
    assert value["loss"]["differing"] == 6 and value["source"] == "coco"
    result = run(source, tmp_path / "out", "--to", "yolo")
    assert result.exit_code == 2 and "is there already" in result.stderr
    assert "or --overwrite" in result.stderr
    assert run(source, tmp_path / "out", "--to", "yolo", "--overwrite").exit_code == 0


def test_errors_speak_of_options(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    result = run(tmp_path / "a.json", tmp_path / "o", "--to", "yolo")
    assert result.exit_code == 2 and "name it, --from NAME" in result.stderr
    coco(tmp_path / "in.json", [holed()])
    run(tmp_path / "in.json", tmp_path / "o", "--to", "yolo")
    result = run(tmp_path / "o", tmp_path / "p.json", "--to", "coco")
    assert result.exit_code == 2 and "--images FOLDER" in result.stderr
    result = run(tmp_path / "in.json", tmp_path / "p", "--to", "yolo", "--classes", "dog,cow")
    assert result.exit_code == 2 and "--classes NAMES" in result.stderr
    result = run(tmp_path / "in.json", tmp_path / "p", "--to", "yolo", "--copy-images")
    assert result.exit_code == 2 and "--copy-images needs" in result.stderr


# --- what is lost -----------------------------------------------------------------------------


def lost(tmp_path, to, masks, **more):
    source = coco(tmp_path / "in.json", masks, **more)
    return convert(source, output_of(to, tmp_path), to=to).loss


def test_nothing_is_lost(tmp_path):
    for to in ("coco", "coco-rle", "labelme", "cvat", "geojson"):
        loss = lost(tmp_path, to, [holed(), two_parts(), square(3, 4)])
        assert (loss.masks, loss.equal, loss.differing) == (3, 3, 0)
        assert loss.pixels == 40 + 50 + 25 and not loss.reasons


def test_parts_are_bridged(tmp_path):
    loss = lost(tmp_path, "yolo", [holed(), two_parts()])
    assert (loss.equal, loss.changed, loss.differing) == (1, 1, 6)
    assert list(loss.reasons) == ["several parts, which the target bridges"]


def test_overlaps_are_lost(tmp_path):
    for to in ("coco-panoptic", "voc"):
        loss = lost(tmp_path, to, [square(0, 0), square(3, 3), square(10, 10)])
        assert (loss.equal, loss.changed, loss.differing) == (2, 1, 4)
        assert list(loss.reasons) == ["others lie over it, and a pixel has one value there"]
        (tmp_path / "in.json").unlink()


def test_what_is_hidden_is_gone(tmp_path):
    loss = lost(tmp_path, "coco-panoptic", [square(3, 3, 2), square(2, 2)], names=["cat"])
    assert (loss.equal, loss.gone, loss.differing) == (1, 1, 4)


def test_objects_crowds_and_scores_are_lost(tmp_path):
    masks = [square(0, 0), square(10, 10), square(0, 20)]
    loss = lost(tmp_path, "indexed", masks, iscrowd=1, score=0.5)
    assert (loss.masks, loss.equal, loss.merged, loss.crowds, loss.scores) == (2, 2, 3, 3, 3)
    loss = lost(tmp_path, "labelme", masks, iscrowd=1, score=0.5)
    assert (loss.masks, loss.equal, loss.merged, loss.crowds, loss.scores) == (3, 3, 0, 3, 3)
    loss = lost(tmp_path, "coco", masks, iscrowd=1, score=0.5)
    assert (loss.equal, loss.merged, loss.crowds, loss.scores) == (3, 0, 0, 0)
    text = "\n".join(lost(tmp_path, "yolo", masks, iscrowd=1, score=0.5).lines())
    assert "3 crowds are no longer marked" in text and "3 scores are lost" in text


def test_empty_masks_and_classes_without_a_place(tmp_path):
    loss = lost(tmp_path, "yolo", [square(0, 0), np.zeros(SIZE, bool)])
    assert (loss.masks, loss.equal, loss.gone, loss.differing) == (2, 1, 1, 0)
    names = ["road", "ego vehicle"]
    loss = lost(tmp_path, "cityscapes-trainids", [square(0, 0), square(10, 10)], names=names)
    assert (loss.equal, loss.gone, loss.differing) == (1, 1, 25)
    assert list(loss.reasons) == ["the target has no such class"]


def test_the_loss_is_measured_on_what_was_written(tmp_path, monkeypatch):
    """A writer that fails to write what it should is found out."""
    source = coco(tmp_path / "in.json", [square(0, 0), square(10, 10)])
    write = conversion.find_format("cvat").writer.write
    monkeypatch.setattr(
        conversion.find_format("cvat").writer,
        "write",
        lambda self, annotation: json.loads(
            json.dumps(write(self, annotation)).replace("10,10;", "11,10;")
        ),
    )
    loss = convert(source, tmp_path / "out.xml", to="cvat").loss
    assert loss.equal == 1 and loss.changed == 1 and loss.differing > 0


def test_images_without_masks(tmp_path):
    source = coco(tmp_path / "in.json", [], images=3)
    for to in ("yolo", "coco", "indexed", "voc", "cvat", "labelme", "geojson", "coco-panoptic"):
        result = convert(source, output_of(to, tmp_path), to=to)
        assert (result.images, result.loss.masks, result.loss.new) == (3, 0, 0)


# --- stopped and gone on with -----------------------------------------------------------------


class Stop(Exception):
    pass


def stopping_after(count):
    def track(items):
        for k, item in enumerate(items):
            if k == count:
                raise Stop
            yield item

    return track


@pytest.mark.parametrize("to", [name for name, form in FORMATS.items() if form.writer])
def test_a_stopped_run_goes_on(tmp_path, to):
    names = ["road", "car"]
    source = coco(tmp_path / "in.json", [holed(), square(9, 9), two_parts()], names, images=5)
    whole, output = (output_of(to, tmp_path / k) for k in "ab")
    for path in (whole, output):
        path.parent.mkdir()
    want = convert(source, whole, to=to)
    with pytest.raises(Stop):
        convert(source, output, to=to, track=stopping_after(3))
    if FORMATS[to].suffix:
        assert not output.exists()
    # A line that a killed writer had begun, and a file that it had not finished.
    (journal,) = [p for p in output.parent.rglob("*") if p.name.endswith(".convert")]
    with journal.open("a") as stream:
        stream.write('{"name": "3", "si')
    done = {p: p.stat().st_mtime_ns for p in output.parent.rglob("*") if p.is_file()}
    asked = []
    result = convert(source, output, to=to, track=lambda items: asked.extend(items) or items)
    assert asked == ["3", "4"] and result.resumed == 3
    assert tree(output) == tree(whole)
    assert result.loss == want.loss
    assert not [p for p in output.parent.rglob(".*")]
    for path, time in done.items():
        if path != journal:
            assert path.stat().st_mtime_ns == time


def test_another_task_in_the_same_place(tmp_path):
    first = coco(tmp_path / "in.json", [holed()], images=3)
    second = coco(tmp_path / "in2.json", [square(1, 1)], images=3)
    with pytest.raises(Stop):
        convert(first, tmp_path / "out", to="yolo", track=stopping_after(2))
    with pytest.raises(
        PysegError, match=r"another conversion into .* was stopped, from '.*in.json'"
    ):
        convert(second, tmp_path / "out", to="yolo")
    assert convert(second, tmp_path / "out", to="yolo", overwrite=True).loss.equal == 3


def test_killed(tmp_path):
    source = coco(tmp_path / "in.json", [holed(), two_parts()], images=6)
    program = f"""
import os, signal
from pyseg.conversion import convert
def track(items):
    for k, item in enumerate(items):
        if k == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item
convert({str(source)!r}, {str(tmp_path / "out.json")!r}, to="coco", track=track)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out.json").exists()
    result = convert(source, tmp_path / "out.json", to="coco")
    assert (result.resumed, result.images, result.loss.equal) == (4, 6, 12)


def test_nothing_is_left_where_nothing_could_be_done(tmp_path):
    source = coco(tmp_path / "in.json", [square(0, 0)])
    value = json.loads(source.read_text())
    value["annotations"][0]["segmentation"]["counts"] = "damaged"
    source.write_text(json.dumps(value))
    before = sorted(tmp_path.rglob("*"))
    for to in ("yolo", "coco", "voc", "cvat"):
        with pytest.raises(ImageError, match=r"annotations\[0\]"):
            convert(source, output_of(to, tmp_path), to=to)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_there_stays(tmp_path):
    source = coco(tmp_path / "in.json", [square(0, 0)])
    (tmp_path / "out.json").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    for to, output in (("coco", "out.json"), ("yolo", "out")):
        with pytest.raises(PysegError, match="is there already"):
            convert(source, tmp_path / output, to=to)
    assert (tmp_path / "out.json").read_text() == (tmp_path / "out/mine.txt").read_text() == "mine"
    convert(source, tmp_path / "out", to="yolo", overwrite=True)
    assert (tmp_path / "out/mine.txt").read_text() == "mine"
    # Annotations of other images that were there are told of.
    convert(coco(tmp_path / "b.json", [square(0, 0)], images=4), tmp_path / "many", to="labelme")
    notes = convert(source, tmp_path / "many", to="labelme", overwrite=True).notes
    assert notes == ("3 annotations of other images are in the output",)


@pytest.mark.parametrize(
    ("to", "output", "words"),
    [
        ("yolo", "in.json", "is a folder, but the output"),
        ("coco", "out", r"one file .json"),
        ("coco", "nowhere/out.json", "does not exist; create it"),
        ("coco", "in.json", "is the source or lies in it"),
        ("ylo", "out", "no format is called 'ylo'"),
        ("coco-results", "out.json", "it is only read"),
    ],
)
def test_outputs_that_cannot_be(tmp_path, to, output, words):
    source = coco(tmp_path / "in.json", [square(0, 0)])
    with pytest.raises(PysegError, match=words):
        convert(source, tmp_path / output, to=to)


def test_folder_within_its_source(tmp_path):
    convert(coco(tmp_path / "in.json", [square(0, 0)]), tmp_path / "voc", to="voc")
    with pytest.raises(PysegError, match="is the source or lies in it"):
        convert(tmp_path / "voc", tmp_path / "voc/yolo", to="yolo")
    with pytest.raises(PysegError, match="lies in the output"):
        convert(tmp_path / "voc", tmp_path, to="yolo")


# --- images, classes, places ------------------------------------------------------------------


def test_images_are_copied_where_tools_look(tmp_path):
    source = coco(tmp_path / "in.json", [holed()], images=2)
    images = pictures(tmp_path / "photos", images=2)
    for to, place in (("yolo", "images"), ("labelme", ""), ("voc", "JPEGImages")):
        output = tmp_path / to
        convert(source, output, to=to, images=images, copy_images=True)
        assert (output / place / "1.jpg").read_bytes() == (images / "1.jpg").read_bytes()
    # Then the output is a source by itself.
    again = convert(tmp_path / "yolo", tmp_path / "again.json", to="coco")
    assert (again.source, again.loss.equal) == ("yolo", 2)
    value = json.loads((tmp_path / "again.json").read_text())
    assert [image["file_name"] for image in value["images"]] == ["0.jpg", "1.jpg"]


def test_sizes_that_disagree(tmp_path):
    source = coco(tmp_path / "in.json", [holed()])
    images = pictures(tmp_path / "photos", size=(20, 31))
    for origin in ("coco", "cvat", "labelme", "indexed", "voc", "coco-panoptic", "geojson"):
        path = output_of(origin, tmp_path)
        if origin == "coco":
            path = source
        else:
            convert(source, path, to=origin)
        with pytest.raises(ImageError, match=r"is for an image of 30 x 20 pixels, but .*31 x 20"):
            convert(path, tmp_path / "out", to="yolo", images=images)
        assert not (tmp_path / "out").exists()


def test_turned_photographs(tmp_path):
    """A camera held upright: the size is that of the picture as it is shown."""
    source = coco(tmp_path / "in.json", [holed()])
    convert(source, tmp_path / "yolo", to="yolo")
    picture = Image.new("RGB", SIZE)  # 20 wide
    exif = picture.getexif()
    exif[0x0112] = 6
    (tmp_path / "photos").mkdir()
    picture.save(tmp_path / "photos/0.jpg", exif=exif)
    result = convert(tmp_path / "yolo", tmp_path / "o.json", to="coco", images=tmp_path / "photos")
    image = json.loads((tmp_path / "o.json").read_text())["images"][0]
    assert (image["height"], image["width"], result.loss.equal) == (*SIZE, 1)


def test_classes_that_are_given(tmp_path):
    source = coco(tmp_path / "in.json", [square(0, 0), square(10, 10)], names=["cat", "dog"])
    (tmp_path / "names.txt").write_text("cow\ndog\ncat\n")
    (tmp_path / "names.json").write_text('{"classes": [{"name": "cow"}, "dog", {"name": "cat"}]}')
    (tmp_path / "names.yaml").write_text("names: {0: cow, 2: cat, 1: dog}\n")
    for number, given in enumerate(
        (
            "cow, dog,cat",
            ["cow", "dog", "cat"],
            *(tmp_path / f"names.{k}" for k in ("txt", "json", "yaml")),
        )
    ):
        convert(source, tmp_path / str(number), to="yolo", classes=given)
        lines = (tmp_path / str(number) / "labels/0.txt").read_text().splitlines()
        assert [line[0] for line in lines] == ["2", "1"]
    with pytest.raises(LabelError, match=r"has the class 'cat', not among the 2 given"):
        convert(source, tmp_path / "x", to="yolo", classes="dog,cow")
    with pytest.raises(LabelError, match=r"no file, .* lists .*camvid, cityscapes"):
        convert(source, tmp_path / "x", to="yolo", classes="nothing")
    with pytest.raises(LabelError, match="'cow' is there twice"):
        convert(source, tmp_path / "x", to="yolo", classes="cow,cow,cat,dog")


def world_file(path):
    path.write_text("0.5\n0.125\n0.25\n-0.5\n1000.375\n1999.8125\n")


def test_georeference(tmp_path):
    source = coco(tmp_path / "in.json", [holed(), two_parts()])
    images = pictures(tmp_path / "photos")
    world_file(images / "0.jgw")
    convert(source, tmp_path / "geo", to="geojson", images=images)
    value = json.loads((tmp_path / "geo/0.geojson").read_text())
    # By hand: the corner of pixel (1, 1), from the centre of the first one.
    ring = value["features"][0]["geometry"]["coordinates"][0]
    x, y = 1000.375 + 0.5 * 0.5 + 0.25 * 0.5, 1999.8125 + 0.125 * 0.5 - 0.5 * 0.5
    assert [x, y] in ring
    area = np.array(ring)
    area = (area[:-1, 0] * area[1:, 1] - area[1:, 0] * area[:-1, 1]).sum() / 2
    assert area == pytest.approx(49 * (0.5 * 0.5 + 0.25 * 0.125))  # counterclockwise
    # Back without the image, and, as of another tool, with it and without our own members.
    assert convert(tmp_path / "geo", tmp_path / "a.json", to="coco").loss.equal == 2
    for key in ("transform", "image"):
        del value[key]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/0.geojson").write_text(json.dumps(value))
    back = convert(tmp_path / "other", tmp_path / "b.json", to="coco", images=images)
    assert back.loss.equal == 2
    a, b = (json.loads((tmp_path / f"{k}.json").read_text())["annotations"] for k in "ab")
    assert [e["segmentation"] for e in a] == [e["segmentation"] for e in b]


def geotiff(path, point=False, matrix=False, code=32633):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    if matrix:
        tags[34264] = (2.0, 0.5, 0.0, 500000.0, 0.25, -2.0, 0.0, 5200000.0, *(0.0,) * 7, 1.0)
    else:
        tags[33550] = (2.0, 2.0, 0.0)
        tags[33922] = (0.0, 0.0, 0.0, 500000.0, 5200000.0, 0.0)
    for tag in (33550, 33922, 34264):
        tags.tagtype[tag] = 12
    tags[34735] = (1, 1, 0, 2, 1025, 0, 1, 2 if point else 1, 3072, 0, 1, code)
    tags.tagtype[34735] = 3
    Image.new("RGB", SIZE[::-1]).save(path, tiffinfo=tags)


def test_geotiff(tmp_path):
    path = tmp_path / "0.tif"
    geotiff(path)
    placement = placement_of(path)
    assert placement.transform == (2, 0, 500000, 0, -2, 5200000) and placement.crs == "EPSG:32633"
    geotiff(path, point=True)
    assert placement_of(path).transform == (2, 0, 499999, 0, -2, 5200001)
    geotiff(path, matrix=True)
    assert placement_of(path).transform == (2, 0.5, 500000, 0.25, -2, 5200000)
    Image.new("RGB", (3, 4)).save(path)
    assert placement_of(path) is None
    (tmp_path / "0.tfw").write_text("1 2 3")
    with pytest.raises(ImageError, match="no world file"):
        placement_of(path)
    (tmp_path / "0.tfw").unlink()
    geotiff(path)
    source = coco(tmp_path / "in.json", [holed(), two_parts()])
    assert convert(source, tmp_path / "geo", to="geojson", images=tmp_path).loss.equal == 2
    value = json.loads((tmp_path / "geo/0.geojson").read_text())
    assert value["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32633"
    assert [500002.0, 5199998.0] in value["features"][0]["geometry"]["coordinates"][0]
    del value["transform"]
    (tmp_path / "other").mkdir()
    other = tmp_path / "other/0.geojson"
    other.write_text(json.dumps(value))
    assert convert(other, tmp_path / "b.json", to="coco", images=tmp_path).loss.equal == 2
    value["crs"]["properties"]["name"] = "urn:ogc:def:crs:EPSG::4326"
    other.write_text(json.dumps(value))
    with pytest.raises(LabelError, match=r"is in EPSG:4326, its image in EPSG:32633"):
        convert(other, tmp_path / "c.json", to="coco", images=tmp_path)


def test_geojson_of_qupath(tmp_path):
    ring = [[1, 1], [6, 1], [6, 6], [1, 6], [1, 1]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "annotation", "classification": {"name": "Tumor"}},
    }
    point = {**feature, "geometry": {"type": "Point", "coordinates": [1, 2]}}
    value = {"type": "FeatureCollection", "features": [feature, point]}
    (tmp_path / "0.geojson").write_text(json.dumps(value))
    with pytest.raises(ImageError, match="how large image '0' is"):
        convert(tmp_path / "0.geojson", tmp_path / "o.json", to="coco")
    images = pictures(tmp_path / "photos")
    result = convert(tmp_path / "0.geojson", tmp_path / "o.json", to="coco", images=images)
    (entry,) = json.loads((tmp_path / "o.json").read_text())["annotations"]
    assert entry["area"] == 25 and result.notes[0].startswith("1 points and lines were left out")


# --- what a path is taken for -----------------------------------------------------------------


@pytest.mark.parametrize("to", [name for name, form in FORMATS.items() if form.writer])
def test_every_output_is_recognised(tmp_path, to):
    source = coco(tmp_path / "in.json", [holed(), square(9, 9)], ["road", "car"])
    path = output_of(to, tmp_path)
    convert(source, path, to=to)
    want = {"coco-rle": "coco"}.get(to, to)
    assert detect(path)[0].name == want
    if not FORMATS[to].suffix:
        return
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / path.name)
    if path.with_suffix("").is_dir():
        path.with_suffix("").rename(folder / path.stem)
    assert detect(folder)[0].name == want and detect(folder)[1] == folder / path.name


def test_unrecognised(tmp_path):
    with pytest.raises(PysegError, match="does not exist"):
        detect(tmp_path / "nothing")
    with pytest.raises(PysegError, match="nothing of a known format"):
        detect(tmp_path)
    coco(tmp_path / "a.json", [square(0, 0)])
    coco(tmp_path / "b.json", [square(0, 0)])
    with pytest.raises(PysegError, match=r"several sets of annotations: a.json, b.json"):
        detect(tmp_path)
    (tmp_path / "c.xml").write_text("<annotation/>")
    with pytest.raises(LabelError, match="give the folder that has SegmentationClass"):
        detect(tmp_path / "c.xml")
    with pytest.raises(UnknownName):
        convert(tmp_path / "a.json", tmp_path / "o", to="yolo", source_format="cocoa")


def test_real_samples(data_folder, tmp_path):
    """What can be held is held on real annotations."""
    sets = {
        "voc": data_folder("instance/voc3"),
        "labelme": data_folder("instance/voc3/labelme_json"),
        "coco-panoptic": data_folder("panoptic/coco_sample") / "panoptic_examples.json",
        "coco": data_folder("panoptic/coco_sample") / "panoptic_coco_detection_format.json",
        "coco-results": data_folder("instance/voc3") / "predictions.json",
    }
    masks = {"voc": 12, "labelme": 12, "coco-panoptic": 50, "coco": 50, "coco-results": 14}
    for origin, source in sets.items():
        for to in {"voc": ("geojson",), "coco-panoptic": ("cvat",)}.get(origin, ("coco",)):
            (tmp_path / origin).mkdir(exist_ok=True)
            result = convert(source, output_of(to, tmp_path / origin), to=to)
            assert result.source == origin
            assert (result.loss.masks, result.loss.differing) == (masks[origin], 0)
    yolo = convert(sets["voc"], tmp_path / "yolo", to="yolo").loss
    assert 0 < yolo.differing < 400 and yolo.equal == 9  # three chairs and sofas in several parts


def test_progress_and_announcement(tmp_path):
    source = coco(tmp_path / "in.json", [square(0, 0)], images=3)
    told = []
    convert(source, tmp_path / "o", to="yolo", announce=told.append)
    assert len(told) == 1 and Path(source).name in told[0]
    assert os.listdir(tmp_path / "o/labels") and conversion.Conversion
