"""The desk: what is kept on disk, in which order images come, who may work at a time."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

import pyseg
from pyseg.errors import ImageError, LabelError, PysegError
from pyseg.formats.annotation import Given
from pyseg.formats.table import find_format
from pyseg.promptable import Flood, Prompts
from pyseg.studio import Desk
from pyseg.studio.desk import OPEN, Conflict, doubt, plain, runs, stroke
from pyseg.studio.dispatch import Busy, Dispatcher

from .conftest import CLASSES, expand, labels_on_disk, note_on_disk, picture, pipeline


def brush(points, radius=3.0, label="car"):
    return lambda session: session.brush(stroke(points, radius, session.size), label)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (41, 57)])
def test_runs_are_the_map(size):
    values = np.random.default_rng(0).integers(-1, 3, size)
    found = runs(values)
    assert np.array_equal(expand(found, size), values)
    assert all(a != b for a, b in itertools.pairwise(found["values"]))


def test_a_stroke_covers_what_is_near_its_line():
    """Against the distance to many points of the line."""
    size, points, radius = (40, 50), [(-3, 4), (20.5, 11), (20.5, 37.2), (48, 39.9)], 4.3
    dense = np.concatenate([np.linspace(a, b, 4000) for a, b in itertools.pairwise(points)])
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    far = np.array(
        [
            np.hypot(x[row, :, None] - dense[:, 0], y[row, :, None] - dense[:, 1]).min(1)
            for row in range(size[0])
        ]
    )
    found = stroke(points, radius, size)
    sure = np.abs(far - radius) > 0.01
    assert np.array_equal(found[sure], (far <= radius)[sure])
    assert stroke([(7.9, 3.1)], 0.01, size).nonzero() == (3, 7)
    assert not stroke([(-20, -20)], 5, size).any()
    for points, radius in (([], 3), ([(1, 1)], 0), ([(1, float("nan"))], 3), ([(1, 1)], 1e9)):
        with pytest.raises(PysegError, match="a stroke has points and a radius"):
            stroke(points, radius, size)


def test_flood_grows_over_one_colour_and_points_off_it_cut():
    image = torch.zeros(3, 30, 40, dtype=torch.uint8)
    image[:, 5:20, 4:18] = 200
    image[:, 5:20, 25:35] = 200  # the same colour, not connected
    flood = Flood(tolerance=40)
    embedding = flood.embed(image)

    def answer(points, signs, box=None, mask=None):
        prompts = Prompts(
            torch.tensor(points, dtype=torch.float)[None],
            torch.tensor(signs)[None],
            None if box is None else torch.tensor(box)[None],
            None if mask is None else mask[None],
        )
        logits, score = flood.predict(embedding, prompts)
        assert logits.shape == (1, 30, 40) and score.tolist() == [1]
        return flood.upsample(embedding, logits)[0] > 0

    left = answer([(10, 10)], [1])
    assert left[6:19, 5:17].all() and not left[:, 20:].any()
    both = answer([(10, 10), (30, 10)], [1, 1])
    assert both[6:19, 26:34].all() and (left <= both).all()
    assert torch.equal(answer([(30, 10)], [0], mask=both.float() - 0.5), left)
    boxed = answer([(0, 0)], [-1], box=(2.0, 4.0, 12.0, 22.0))
    assert torch.equal(boxed[:, :12], left[:, :12]) and not boxed[:, 12:].any()
    logits, score = flood.predict(embedding, Prompts(torch.zeros(0, 1, 2), torch.zeros(0, 1)))
    assert logits.shape == (0, 30, 40) and len(score) == 0
    with pytest.raises(ValueError, match="tolerance"):
        Flood(float("nan"))


def test_a_document_begins_with_the_prediction_and_is_kept_from_its_first_change(make_desk):
    desk = make_desk()
    document = desk.open(0)
    predicted = pipeline()(picture())
    assert np.array_equal(document.labels(), plain(predicted))
    assert desk.items[0].unsure == pytest.approx(float(doubt(predicted).mean()))
    assert not desk.items[0].saved and not list((desk.output / "labels").iterdir())
    desk.act(0, 0, brush([(5, 5), (30, 30)]))
    kept = labels_on_disk(desk.output, "a")
    assert np.array_equal(kept, document.labels()) and desk.items[0].saved
    assert (kept != predicted.labels.numpy()).any()
    # As a data set: classes.json is there, and the PNG says what it means.
    source = find_format("indexed").open_source(desk.output, Given())
    assert source.classes == CLASSES and source.names == ("a",)
    desk.act(0, 1, lambda session: session.undo())
    assert np.array_equal(labels_on_disk(desk.output, "a"), predicted.labels.numpy())


def test_loaded_maps_and_fresh_ones(make_desk, tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    map_ = np.random.default_rng(1).integers(0, 3, (41, 57)).astype(np.uint8)
    map_[0] = 255
    Image.fromarray(map_).save(given / "a.png")
    desk = make_desk(labels=given, truth=given)
    document = desk.open(0)
    assert np.array_equal(document.labels(), np.where(map_ == 255, -1, map_.astype(int)))
    assert np.array_equal(document.truth, document.labels())
    assert desk.open(1).truth is None
    desk.act(0, None, lambda session: session.put(None))
    assert (labels_on_disk(desk.output, "a") == 255).all()
    with pytest.raises(LabelError, match="hold 7"):
        desk.act(0, None, lambda session: session.put(np.full((41, 57), 7)))
    with pytest.raises(PysegError, match="agree"):
        desk.act(0, None, lambda session: session.put(np.zeros((4, 5), np.uint8)))


def test_another_desk_goes_on_where_one_ended(make_desk):
    desk = make_desk()
    desk.act(0, None, brush([(5, 5)]))
    desk.act(0, None, lambda session: session.click(30, 20, label="sky"))
    mask = desk.open(0).session.pending.mask
    desk.act(0, None, lambda session: session.click(3, 20, positive=False))
    corrected = desk.open(0).session.pending.mask
    assert not torch.equal(mask, torch.zeros_like(mask))
    desk.finish(1, True)
    desk.close()
    again = make_desk()
    document = again.open(0)
    assert np.array_equal(document.labels(), desk.open(0).labels())
    assert document.session.asked == desk.open(0).session.asked
    assert torch.equal(document.session.pending.mask, corrected)
    assert [item.done for item in again.items] == [False, True]
    assert [item.unsure for item in again.items] == [item.unsure for item in desk.items]
    again.act(0, None, lambda session: session.accept())
    assert note_on_disk(again.output, "a")["asked"] is None


def test_a_selection_and_a_box_are_asked_again(make_desk):
    desk = make_desk()
    desk.act(0, None, lambda session: session.box(22, 3, 35, 30, label="sky"))
    desk.act(1, None, lambda session: session.select(3, 3))
    before = [desk.open(k).session for k in (0, 1)]
    desk.close()
    again = make_desk()
    for k in (0, 1):
        session = again.open(k).session
        assert session.asked[2:4] == before[k].asked[2:4]
        assert torch.equal(session.pending.mask, before[k].pending.mask)


def test_a_damaged_note_does_not_stop_an_image(make_desk):
    desk = make_desk()
    desk.act(0, None, lambda session: session.click(30, 20, label="sky"))
    desk.close()
    path = desk.output / ".studio" / "a.json"
    path.write_text('{"asked": {"points": [["x"]], "positive": 3}}')
    assert make_desk().open(0).session.asked is None


SCRIPT = """
import os, signal, sys
sys.path[:0] = {path!r}
from tests_studio import pipeline, stroke
from pyseg.studio import Desk
desk = Desk({photos!r}, {out!r}, spec=pipeline(), clicks="flood", make=pipeline)
desk.act(0, None, lambda s: s.brush(stroke([(5, 5), (40, 30)], 4, s.size), "car"))
desk.act(0, None, lambda s: s.click(30, 20, label="sky"))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_nothing(photos, tmp_path, make_desk):
    here = Path(__file__).parent
    (tmp_path / "tests_studio.py").write_text(
        (here / "conftest.py").read_text() + "\nfrom pyseg.studio.desk import stroke\n"
    )
    script = SCRIPT.format(path=[str(tmp_path)], photos=str(photos), out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    document = make_desk().open(0)
    expected = plain(pipeline()(picture()))
    expected[stroke([(5, 5), (40, 30)], 4, expected.shape)] = 1
    assert np.array_equal(document.labels(), expected)
    assert document.session.asked.points == ((30.0, 20.0),)


def test_a_step_for_an_older_state_is_refused(make_desk):
    desk = make_desk()
    desk.act(0, 0, brush([(5, 5)]))
    before = desk.open(0).labels()
    with pytest.raises(Conflict, match="'a' has changed elsewhere"):
        desk.act(0, 0, brush([(30, 30)], label="sky"))
    assert np.array_equal(desk.open(0).labels(), before)


def test_two_desks_do_not_share_an_output(make_desk):
    make_desk()
    with pytest.raises(PysegError, match="is open in another studio"):
        make_desk()


def test_maps_of_other_classes_are_not_mixed(make_desk):
    desk = make_desk()
    desk.act(0, None, brush([(5, 5)]))
    with pytest.raises(PysegError, match=r"holds maps of the classes road.*another output"):
        desk.configure(spec="streetnet")
    assert str(desk.pipeline) == "<Bright>"
    desk.configure(spec="bright+forgetful")
    assert desk.open(0).session.undoable is False and len(desk.open(0).stages) == 2
    assert labels_on_disk(desk.output, "a")[5, 5] == 1 == desk.open(0).labels()[5, 5]


def test_what_answers_clicks(make_desk):
    desk = make_desk(clicks=None)
    assert desk.clicked == "nano"
    assert desk.open(0).session.promptable is not None
    desk.configure(clicks="flood")
    assert isinstance(desk.open(0).session.promptable, Flood)
    with pytest.raises(ValueError, match="nano, flood, got 'magic'"):
        desk.configure(clicks="magic")


def test_the_survey_finds_how_unsure_images_are(make_desk, photos):
    Image.fromarray(np.full((20, 20, 3), 86, np.uint8)).save(photos / "c.png")  # between two
    (photos / "d.png").write_bytes(b"nothing")
    desk = make_desk(spec="bright+forgetful")
    desk.survey(True)
    desk._survey.join()
    found = {item.name: item.unsure for item in desk.items}
    assert found["c"] > 0.4 > max(found["a"], found["b"]) and found["d"] is None
    assert "d.png" in desk.items[3].error and str(photos) not in desk.items[3].error
    assert note_on_disk(desk.output, "c")["unsure"] == found["c"]
    with pytest.raises(PysegError, match="is not an image"):
        desk.open(3)


def test_only_so_many_images_stay_open(make_desk, photos):
    for k in range(OPEN + 2):
        Image.fromarray(picture(8, 9, k)).save(photos / f"more{k}.png")
    desk = make_desk()
    for k in range(len(desk.items)):
        desk.act(k, None, brush([(3, 3)]))
    assert len(desk._open) == OPEN
    assert desk.open(0).labels()[3, 3] == 1 and not desk.open(0).session.undoable


def test_uploads_stay_in_their_folder(make_desk, tmp_path):
    desk = make_desk()
    content = (tmp_path / "photos" / "b.png").read_bytes()
    names = ["../../evil.png", r"..\..\evil.png", "/etc/evil.png", ".png.png", "ä b/..png", "a.png"]
    names += ["x" * 500 + ".png", "a\0b.png", "CON<>.PNG"]
    for name in names:
        index = desk.add(name, lambda path: path.write_bytes(content))
        assert desk.items[index].path.parent == desk.output / "uploads"
        assert desk.items[index].path.is_file()
        assert desk.open(index).labels().shape == (30, 33)
    assert len({item.name for item in desk.items}) == len(desk.items) == 2 + len(names)
    for name in ("evil", "evil.svg", "evil.png/..", ""):
        with pytest.raises(ImageError, match="has no suffix of an image"):
            desk.add(name, lambda path: path.write_bytes(content))
    with pytest.raises(ImageError, match=r"image 'bad\.png' is not an image"):
        desk.add("bad.png", lambda path: path.write_bytes(b"<html>"[::-1]))
    assert not [p for p in (desk.output / "uploads").iterdir() if "bad" in p.name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "photos"]
    desk.close()
    assert len(make_desk().items) == len(desk.items)


def test_exports_hold_the_map(make_desk):
    desk = make_desk()
    desk.act(0, None, brush([(5, 5), (50, 35)]))
    labels = desk.open(0).labels()
    name, content = desk.export(0, "indexed")
    assert name == "a.png" and content == (desk.output / "labels" / "a.png").read_bytes()
    name, content = desk.export(0, "coco")
    value = json.loads(content)
    assert value["images"][0] == {"id": 1, "file_name": "a.png", "height": 41, "width": 57}
    for entry in value["annotations"]:
        shape = entry["segmentation"]
        parts = coco.frPyObjects(shape, 41, 57) if isinstance(shape, list) else [shape]
        mask = coco.decode(parts).reshape(41, 57, -1).any(-1)
        assert np.array_equal(mask, labels == entry["category_id"] - 1)
    assert len(value["annotations"]) == 3
    name, content = desk.export(0, "labelme")
    assert name == "a.json" and b'"imagePath": "a.png"' in content
    with pytest.raises(pyseg.errors.UnknownName):
        desk.export(0, "psd")
    for to in ("coco", "labelme"):
        for _ in range(2):  # over what is there
            lines = desk.export_all(to)
        assert lines[1].startswith("3 masks: 3 equal")


def test_instances_are_edited_kept_and_written(make_desk):
    desk = make_desk(spec=pipeline("objects"), edit="instances")
    begun = desk.open(0).session.result.instances
    assert begun.labels.tolist() == [1, 2]  # without the unsure one
    assert not desk.items[0].saved
    # The front one, where both are, gets a part more; then a third one, and one less.
    desk.act(0, None, lambda session: session.select(39, 20))
    assert desk.open(0).session.asked.label == "car"
    desk.act(0, None, brush([(50, 5), (54, 5)], label="car"))
    desk.act(0, None, lambda session: session.clear())
    desk.act(0, None, brush([(4, 30), (9, 30)], label="road"))
    desk.act(0, None, lambda session: session.clear())
    desk.act(0, None, lambda session: session.select(50, 30))
    desk.act(0, None, lambda session: session.accept("void"))
    found = desk.open(0).session.result.instances
    assert sorted(found.labels.tolist()) == [0, 1]
    car = found.masks[found.labels.tolist().index(1)]
    wider = begun.masks[0] | torch.from_numpy(stroke([(50, 5), (54, 5)], 3, (41, 57)))
    assert torch.equal(car, wider)
    desk.act(0, None, lambda session: session.undo())
    assert sorted(desk.open(0).session.result.instances.labels.tolist()) == [0, 1, 2]
    desk.act(0, None, lambda session: session.redo())
    labels = desk.open(0).labels()
    assert np.array_equal(np.where(labels < 0, 255, labels), labels_on_disk(desk.output, "a"))

    def as_sets(value):
        masks = {}
        for entry in value["annotations"]:
            shape = entry["segmentation"]
            shapes = coco.frPyObjects(shape, 41, 57) if isinstance(shape, list) else [shape]
            mask = coco.decode(shapes).reshape(41, 57, -1).any(-1)
            masks[entry["category_id"] - 1] = mask
        return masks

    kept = as_sets(json.loads((desk.output / "instances" / "a.json").read_text()))
    _, content = desk.export(0, "coco")
    for masks in (kept, as_sets(json.loads(content))):
        assert set(masks) == {0, 1} and np.array_equal(masks[1], car.numpy())
    _, content = desk.export(0, "labelme")
    assert {shape["label"] for shape in json.loads(content)["shapes"]} == {"car", "road"}
    for _ in range(2):
        assert desk.export_all("coco") == [f"1 images in {desk.output / 'coco.json'}"]
    desk.close()
    again = make_desk(spec=pipeline("objects"), edit="instances")
    result = again.open(0).session.result.instances
    order = result.labels.argsort()
    assert torch.equal(result.masks[order], found.masks[found.labels.argsort()])
    again.close()
    with pytest.raises(PysegError, match=r"holds instances, and edit is 'labels'; give edit="):
        make_desk(spec=pipeline("objects"))


def test_an_output_of_label_maps_takes_no_instances(make_desk):
    desk = make_desk()
    desk.act(0, None, brush([(5, 5)]))
    desk.close()
    with pytest.raises(PysegError, match="holds labels, and edit is 'instances'"):
        make_desk(edit="instances")


def test_nothing_to_export_is_said(make_desk):
    with pytest.raises(PysegError, match="no map was changed"):
        make_desk().export_all("coco")


def test_inputs_that_are_not_there(tmp_path, photos):
    def make(images, **options):
        return Desk(images, tmp_path / "o", spec=pipeline(), **options)

    with pytest.raises(FileNotFoundError, match="does not exist"):
        make(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="labels: there is no folder"):
        make(photos, labels=tmp_path / "absent")
    with pytest.raises(ValueError, match="clicks must be one of"):
        make(photos, clicks="x")
    with pytest.raises(ValueError, match="edit must be one of labels, instances, got 'x'"):
        make(photos, edit="x")
    with pytest.raises(ValueError, match="instances cannot begin with them"):
        make(photos, edit="instances", labels=photos)
    Image.fromarray(picture()).save(photos / "a.jpg")
    with pytest.raises(ValueError, match="same stem"):
        make(photos)
    desk = make(None)
    with pytest.raises(IndexError, match="there is no image 0"):
        desk.open(0)
    desk.close()


def test_a_dispatcher_batches_refuses_and_isolates():
    go, sizes = threading.Event(), []

    def compute(items):
        go.wait(10)
        sizes.append(len(items))
        if "bad" in items:
            raise ValueError("bad")
        return [item.upper() for item in items]

    dispatcher = Dispatcher(compute, batch=4, waiting=5)
    first = dispatcher.submit("a")
    while dispatcher._queue:  # until it is being computed
        pass
    waiting = [dispatcher.submit(text) for text in ("b", "bad", "c", "d", "e")]
    with pytest.raises(Busy, match="5 requests wait"):
        dispatcher.submit("f")
    waiting[4].cancel()
    late = dispatcher.submit("g")
    go.set()
    assert first.result(10) == "A" and late.result(10) == "G"
    assert [waiting[k].result(10) for k in (0, 2, 3)] == ["B", "C", "D"]
    with pytest.raises(ValueError, match="bad"):
        waiting[1].result(10)
    assert sizes == [1, 4, 1, 1, 1, 1, 1]
    dispatcher.close()
    with pytest.raises(Busy):
        dispatcher.submit("h")
