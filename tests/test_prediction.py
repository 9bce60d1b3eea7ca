import json

import numpy as np
import pytest
import torch
from PIL import Image

import pyseg
from pyseg import models, refiners
from pyseg.errors import PysegError
from pyseg.image import decode_rle, read_image, read_labels, read_segment_ids
from pyseg.prediction import predict
from pyseg.types import Instances, Segment, Segmentation, Segments

PALETTE = ((10, 20, 30), (200, 30, 30), (30, 200, 30))


class ByColour:
    """Labels every pixel with the class whose palette colour is nearest."""

    classes = ("dark", "red", "green")

    def __init__(self, *, weights: str | None = None):
        self.calls = 0

    def predict(self, images):
        self.calls += len(images)
        if any(image.shape[2] == 13 for image in images):
            raise MemoryError
        colours = torch.tensor(PALETTE).float()

        def one(image):
            distance = (image.float()[None] - colours[:, :, None, None]).pow(2).sum(1)
            blank = Segmentation(tuple(image.shape[1:]), self.classes, palette=PALETTE)
            return blank.with_labels(distance.argmin(0).to(torch.uint8))

        return [one(image) for image in images]


class Swap:
    def refine(self, image, prediction):
        return prediction.with_labels(2 - prediction.labels)


class Finds:
    """One instance, of the left half, and a panoptic map of it or none."""

    classes = ("dark", "red", "green")

    def __init__(self, *, segments: bool = True):
        self.segments = segments

    def predict(self, images):
        mask = torch.zeros(images[0].shape[1:], dtype=torch.bool)
        mask[:, : mask.shape[1] // 2] = True
        found = Instances(
            torch.tensor([[0.0, 0, mask.shape[1] // 2, mask.shape[0]]]),
            mask[None],
            torch.ones(1),
            torch.tensor([2]),
        )
        item = Segment(1, 2, 1.0, int(mask.sum()))
        segments = Segments(mask.int(), (item,)) if self.segments else None
        return [Segmentation(tuple(mask.shape), self.classes, segments=segments, instances=found)]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(models._registry._registered, "bycolour", ByColour)
    monkeypatch.setitem(models._registry._registered, "finds", Finds)
    monkeypatch.setitem(refiners._registry._registered, "swap", Swap)


@pytest.fixture
def pipeline():
    return pyseg.build("bycolour")


def picture(path, seed=0, size=(6, 8)):
    """Saves a picture of palette colours and returns its labels."""
    labels = np.random.default_rng(seed).integers(0, 3, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(PALETTE, dtype=np.uint8)[labels]).save(path)
    return labels


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_files_folders_and_globs(pipeline, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    labels = {
        "a": picture(photos / "a.png", 1),
        "sub/b": picture(photos / "sub" / "b.bmp", 2),
        "c": picture(tmp_path / "more" / "c.tif", 3),
        "d": picture(tmp_path / "odd [1]" / "d.png", 4),
    }
    picture(photos / ".hidden.png")
    (photos / "notes.txt").write_text("no image")
    sources = [photos, str(tmp_path / "more" / "*.tif"), tmp_path / "odd [1]" / "d.png"]
    summary = predict(pipeline, sources, out, overlay=True)
    assert summary.failed == {} and len(summary.written) == 4
    assert tree(out) == sorted(
        ["pyseg.json"] + [f"{n}.png" for n in labels] + [f"overlays/{n}.png" for n in labels]
    )
    for name, want in labels.items():
        assert np.array_equal(read_labels(out / f"{name}.png").numpy(), want)
        assert Image.open(out / f"{name}.png").getpalette()[:9] == list(sum(PALETTE, ()))
        assert read_image(out / "overlays" / f"{name}.png").shape[2] >= 8
    manifest = json.loads((out / "pyseg.json").read_text())
    assert manifest["spec"] == "bycolour" and manifest["classes"] == ["dark", "red", "green"]


def test_bad_files_are_reported_and_the_others_go_on(pipeline, tmp_path):
    folder = tmp_path / "photos"
    picture(folder / "a.png")
    whole = (folder / "a.png").read_bytes()
    picture(folder / "z.png", 1)
    picture(folder / "large.png", size=(6, 13))
    (folder / "cut.png").write_bytes(whole[:45])
    (folder / "page.jpg").write_text("<!doctype html>")
    (tmp_path / "empty").mkdir()
    absent, nothing, empty = (str(tmp_path / n) for n in ("gone.png", "*.jpeg", "empty"))
    summary = predict(pipeline, [folder, absent, nothing, empty], tmp_path / "out")
    assert [path.name for path in summary.written] == ["a.png", "z.png"]
    assert tree(tmp_path / "out") == ["a.png", "pyseg.json", "z.png"]
    reasons = {key.rsplit("/", 1)[-1]: reason for key, reason in summary.failed.items()}
    assert set(reasons) == {"cut.png", "page.jpg", "gone.png", "*.jpeg", "empty", "large.png"}
    assert "truncated" in reasons["cut.png"] and "HTML" in reasons["page.jpg"]
    assert "does not exist" in reasons["gone.png"] and "matches no file" in reasons["*.jpeg"]
    assert "holds no image" in reasons["empty"] and "too large" in reasons["large.png"]
    assert json.loads(json.dumps(summary.to_dict()))["failed"] == summary.failed


def test_other_errors_are_not_taken_for_bad_files(pipeline, tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    monkeypatch.setattr(ByColour, "predict", lambda self, images: 1 / 0)
    with pytest.raises(PysegError, match=r"'bycolour' failed on image '.*a\.png': ZeroDivision"):
        predict(pipeline, tmp_path / "a.png", tmp_path / "out")


def test_a_second_run_does_only_what_is_missing(pipeline, tmp_path):
    for k in range(3):
        picture(tmp_path / "in" / f"{k}.png", k)
    out = tmp_path / "out"

    def interrupted(jobs):
        yield from jobs[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(pipeline, tmp_path / "in", out, track=interrupted)
    assert tree(out) == ["0.png", "1.png", "pyseg.json"]
    summary = predict(pipeline, tmp_path / "in", out)
    assert [p.name for p in summary.skipped] == ["0.png", "1.png"]
    assert [p.name for p in summary.written] == ["2.png"]
    assert pipeline.stages[0].object.calls == 3
    assert len(predict(pipeline, tmp_path / "in", out, overlay=True).written) == 3
    assert len(predict(pipeline, tmp_path / "in", out, overlay=True).skipped) == 3
    assert len(predict(pipeline, tmp_path / "in", out, overwrite=True).written) == 3


def test_results_of_two_pipelines_do_not_mix(pipeline, tmp_path):
    labels = picture(tmp_path / "a.png")
    out = tmp_path / "out"
    predict(pipeline, tmp_path / "a.png", out)
    other = pyseg.build("bycolour+swap")
    with pytest.raises(PysegError, match="another pipeline, 'bycolour'"):
        predict(other, tmp_path / "a.png", out)
    assert np.array_equal(read_labels(out / "a.png").numpy(), labels)
    predict(other, tmp_path / "a.png", out, overwrite=True)
    assert np.array_equal(read_labels(out / "a.png").numpy(), 2 - labels)
    (out / "pyseg.json").write_text("{")
    with pytest.raises(PysegError, match="damaged"):
        predict(other, tmp_path / "a.png", out)


def test_nothing_of_the_users_is_replaced(pipeline, tmp_path):
    photos = tmp_path / "photos"
    picture(photos / "a.png")
    before = (photos / "a.png").read_bytes()
    with pytest.raises(PysegError, match="another"):
        predict(pipeline, photos, photos)
    with pytest.raises(PysegError, match="would replace it"):
        predict(pipeline, photos / "a.png", photos, overwrite=True)
    assert tree(photos) == ["a.png"] and (photos / "a.png").read_bytes() == before
    picture(tmp_path / "out" / "a.png", 5)
    with pytest.raises(PysegError, match="no earlier result"):
        predict(pipeline, photos, tmp_path / "out")
    assert tree(tmp_path / "out") == ["a.png"]


def test_same_stems_are_refused_before_anything_is_written(pipeline, tmp_path):
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "a.bmp")
    with pytest.raises(PysegError, match=r"a\.bmp and .*a\.png would both"):
        predict(pipeline, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    twice = predict(pipeline, [tmp_path / "in" / "a.png"] * 2, tmp_path / "out")
    assert len(twice.written) == 1


def test_an_output_folder_among_the_images_is_left_out(pipeline, tmp_path):
    picture(tmp_path / "a.png")
    out = tmp_path / "out"
    predict(pipeline, tmp_path, out, overlay=True)
    again = predict(pipeline, [tmp_path, str(tmp_path / "**" / "*.png")], out, overlay=True)
    assert [path.name for path in again.skipped] == ["a.png"] and not again.written
    assert tree(out) == ["a.png", "overlays/a.png", "pyseg.json"]


def test_output_that_cannot_be_made(pipeline, tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(PysegError, match="is a file"):
        predict(pipeline, tmp_path / "a.png", tmp_path / "a.png" / "out")


def test_instances_and_segments_are_written(tmp_path):
    picture(tmp_path / "photos" / "sub" / "a.png")
    out = tmp_path / "out"
    assert len(predict(pyseg.build("finds"), tmp_path / "photos", out, overlay=True).written) == 1
    expected = torch.zeros(6, 8, dtype=torch.int32)
    expected[:, :4] = 1
    assert torch.equal(read_segment_ids(out / "segments/sub/a.png"), expected)
    (segment,) = json.loads((out / "segments/sub/a.json").read_text())
    assert (segment["category_id"], segment["area"]) == (2, 24)
    (instance,) = json.loads((out / "instances/sub/a.json").read_text())
    assert torch.equal(decode_rle(instance["segmentation"]), expected > 0)
    assert read_labels(out / "sub/a.png")[0].tolist() == [2] * 4 + [255] * 4
    alone = pyseg.build("finds(segments=False)")
    predict(alone, tmp_path / "photos", tmp_path / "other")
    assert read_labels(tmp_path / "other/sub/a.png")[0].tolist() == [2] * 4 + [255] * 4
    assert not (tmp_path / "other/segments").exists()
    assert [result.name for result in alone.profile(tmp_path / "photos/sub/a.png")] == ["finds"]
