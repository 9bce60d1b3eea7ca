"""`label`: labels for a training, void where a pipeline is unsure."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import pyseg
from pyseg import cli, models, prediction
from pyseg.errors import PysegError
from pyseg.image import read_labels
from pyseg.prediction import label
from pyseg.types import Instances, Segmentation, Segments

CLASSES = ("left", "right")


class Sides:
    """Two classes whose logits are read off the red channel; sure on both ends."""

    classes = CLASSES

    def __init__(self):
        self.calls = 0

    def predict(self, images):
        self.calls += len(images)
        return [self.one(image.float()) for image in images]

    def one(self, image):
        logit = (image[0] - 127) / 16
        return Segmentation(tuple(image.shape[1:]), CLASSES, logits=torch.stack([-logit, logit]))


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("a.png", "b.png", "more/c.png"):
        pixels = rng.integers(0, 256, (17, 23, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def expected(path, least):
    """Independently, with the sigmoid in double precision."""
    red = np.asarray(Image.open(path)).astype(float)[..., 0]
    right = 1 / (1 + np.exp(-2 * (red - 127) / 16))
    sure = np.maximum(right, 1 - right)
    return np.where(sure >= least, right > 0.5, 255).astype(np.uint8), sure


def test_unsure_pixels_are_void_and_confidence_is_written(photos, tmp_path):
    pipeline, target = pyseg.build(Sides()), tmp_path / "labels"
    summary = label(pipeline, photos, target, min_confidence=0.83, confidence=True)
    assert [path.relative_to(target).as_posix() for path in summary.written] == [
        "a.png",
        "b.png",
        "more/c.png",
    ]
    for path in summary.written:
        name = path.relative_to(target)
        labels, sure = expected(photos / name, 0.83)
        assert (read_labels(path).numpy() == labels).all()
        assert 0 < (labels == 255).mean() < 0.5 and {0, 1} < {*np.unique(labels).tolist()}
        grey = Image.open(target / "confidence" / name)
        assert grey.mode == "L" and np.abs(np.asarray(grey) - 255 * sure).max() < 0.51
    held = {path.name for path in target.iterdir() if not path.name.startswith(".")}
    assert held == {"a.png", "b.png", "more", "confidence", "classes.json", "pyseg.json"}
    manifest = json.loads((target / "pyseg.json").read_text())
    assert manifest["min_confidence"] == 0.83 and manifest["classes"] == [*CLASSES]


def test_the_data_set_folder_takes_them(photos, tmp_path):
    flat = [photos / "a.png", photos / "b.png"]
    label(pyseg.build(Sides()), flat, tmp_path / "labels", min_confidence=0.6)
    (photos / "more/c.png").unlink()
    (photos / "more").rmdir()
    data = pyseg.datasets.create(
        "folder",
        images=photos,
        labels=tmp_path / "labels",
        classes=tmp_path / "labels/classes.json",
    )
    assert data.classes == CLASSES and len(data) == 2
    assert (data[0].labels.numpy() == expected(photos / "a.png", 0.6)[0]).all()


def test_what_is_done_is_skipped(photos, tmp_path):
    target, model = tmp_path / "labels", Sides()
    pipeline = pyseg.build(model)
    label(pipeline, photos / "a.png", target)
    stamp = (target / "a.png").stat().st_mtime_ns
    summary = label(pipeline, photos, target)
    assert [path.name for path in summary.skipped] == ["a.png"] and len(summary.written) == 2
    assert model.calls == 3 and (target / "a.png").stat().st_mtime_ns == stamp
    # The confidence is a result too: without it an image is not done.
    assert len(label(pipeline, photos, target, confidence=True).written) == 3
    assert len(label(pipeline, photos, target, confidence=True).skipped) == 3
    assert len(label(pipeline, photos, target, overwrite=True).written) == 3
    with pytest.raises(PysegError, match="holds results of another pipeline"):
        label(pipeline, photos, target, min_confidence=0.5)


def test_a_stopped_run_leaves_no_half_file(photos, tmp_path, monkeypatch):
    """Labels come last and by a rename: what is there is whole, and the next run does the rest."""
    target, pipeline = tmp_path / "labels", pyseg.build(Sides())
    renamed = os.replace

    def full(source, destination):
        if str(destination).endswith("b.png") and "confidence" not in str(destination):
            raise OSError(28, "No space left on device")
        renamed(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            label(pipeline, photos, target, confidence=True, workers=1)
    assert not (target / "b.png").exists()
    summary = label(pipeline, photos, target, confidence=True)
    assert "b.png" in {path.name for path in summary.written}
    for name in ("a.png", "b.png", "more/c.png"):
        assert (read_labels(target / name).numpy() == expected(photos / name, 0.9)[0]).all()


def test_confidence_of_what_has_no_logits():
    size = (4, 6)
    plain = Segmentation(size, CLASSES)
    ids = torch.zeros(size, dtype=torch.int32)
    ids[:2] = 7
    ids[3] = 3
    segments = Segments.from_map(ids, {7: 1, 3: 0})
    scored = tuple(
        pyseg.Segment(item.id, item.label, 0.95 if item.id == 7 else 0.6, item.area)
        for item in segments.items
    )
    masks = torch.zeros(2, *size, dtype=torch.bool)
    masks[0, :, :4], masks[1, :, 3:] = True, True
    instances = Instances(torch.zeros(2, 4), masks, torch.tensor([0.7, 0.95]), torch.tensor([0, 1]))
    unsure = torch.full(size, 0.5)
    unsure[:, 0] = 0.05
    certain = prediction._Certain(0.9)
    image = torch.zeros(3, *size, dtype=torch.uint8)
    found = certain.refine(image, plain.with_segments(Segments(ids, scored)))
    assert torch.equal(found.labels == 1, ids == 7) and (found.labels[2:] == 255).all()
    assert found.uncertainty[3, 0] == pytest.approx(0.4) and found.segments is None
    found = certain.refine(image, replace(plain, instances=instances))
    assert torch.equal(found.labels == 1, masks[1]) and (found.labels[~masks[1]] == 255).all()
    with_doubt = replace(plain.with_labels(torch.ones(size, dtype=torch.uint8)), uncertainty=unsure)
    found = certain.refine(image, with_doubt)
    assert (found.labels[:, 0] == 1).all() and (found.labels[:, 1:] == 255).all()
    nan = torch.full((2, *size), float("nan"))
    assert (certain.refine(image, replace(plain, logits=nan)).labels == 255).all()
    with pytest.raises(PysegError, match="labels without any confidence"):
        certain.refine(image, plain.with_labels(torch.zeros(size, dtype=torch.uint8)))


def test_what_is_refused(photos, tmp_path):
    for least in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="min_confidence must be 0 to 1"):
            label(pyseg.build(Sides()), photos, tmp_path / "labels", min_confidence=least)
    with pytest.raises(ValueError, match="workers must be at least 1"):
        label(pyseg.build(Sides()), photos, tmp_path / "labels", workers=0)


def test_the_command(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(models._registry._registered, "sides", Sides)
    out = str(tmp_path / "labels")
    command = ["label", "--spec", "sides", str(photos), "--out", out, "--json"]
    command += ["--min-confidence", "0.7", "--confidence"]
    run = CliRunner().invoke(cli.app, command)
    assert run.exit_code == 0, run.output
    assert len(json.loads(run.stdout)["written"]) == 3
    labels = read_labels(tmp_path / "labels/more/c.png").numpy()
    assert (labels == expected(photos / "more/c.png", 0.7)[0]).all()
    again = CliRunner().invoke(cli.app, command)
    assert len(json.loads(again.stdout)["skipped"]) == 3
