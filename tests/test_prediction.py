import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import pyseg
from pyseg import cli, models, prediction, refiners
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
    found = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in found if name != ".lock")


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
    assert {"0.png", "1.png", "pyseg.json"} <= set(tree(out))
    (out / "2.png").unlink(missing_ok=True)  # the workers may have been ahead
    pipeline.model.calls = 2
    summary = predict(pipeline, tmp_path / "in", out)
    assert [p.name for p in summary.skipped] == ["0.png", "1.png"]
    assert [p.name for p in summary.written] == ["2.png"]
    assert pipeline.model.calls == 3
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
    with pytest.raises(PysegError, match="cannot be read as JSON"):
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


def test_collisions_are_refused_together_before_anything_is_written(pipeline, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.png", "a.bmp", "b.png", "b.tif", "c.bmp", "c.png/x.png", "overlays/d.png"):
        picture(folder / name)
    picture(folder / "d.png")
    with pytest.raises(PysegError) as caught:
        predict(pipeline, folder, out)
    text = str(caught.value)
    for sources in ("a.bmp and .*a.png", "b.png and .*b.tif"):
        assert re.search(rf"{sources} would both be written", text), text
    assert re.search(r"c\.png, the label map of .*c\.bmp, is a folder of other results", text)
    assert re.search(r"label map of .*overlays/d\.png and belong to .*in/d\.png", text)
    assert "keep_suffix=True" in text and not out.exists()
    (folder / "overlays" / "d.png").unlink()
    kept = predict(pipeline, folder, out, keep_suffix=True)
    names = {"a.bmp.png", "a.png.png", "b.png.png", "b.tif.png", "c.bmp.png", "c.png/x.png.png"}
    assert set(tree(out)) == names | {"d.png.png", "pyseg.json"} and len(kept.written) == 7
    twice = predict(pipeline, [folder / "a.png"] * 2, tmp_path / "other")
    assert len(twice.written) == 1
    (tmp_path / "third" / "a.png").mkdir(parents=True)
    with pytest.raises(PysegError, match=r"a\.png, the label map of .* is a folder"):
        predict(pipeline, folder / "a.png", tmp_path / "third")


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


def test_a_run_that_wrote_nothing_claims_nothing(pipeline, tmp_path):
    out, other = tmp_path / "out", pyseg.build("bycolour+swap")
    assert predict(pipeline, tmp_path / "gone.png", out).failed
    assert tree(out) == []
    picture(tmp_path / "a.png")
    (out / "pyseg.json").write_text(json.dumps({"spec": "streetnet"}))  # as of a killed run
    assert len(predict(other, tmp_path / "a.png", out).written) == 1
    assert json.loads((out / "pyseg.json").read_text())["spec"] == "bycolour+swap"


def test_files_that_are_no_images_are_named(pipeline, tmp_path):
    picture(tmp_path / "in" / "a.png")
    for name in ("b.heic", "sub/notes.txt", ".hidden"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    summary = predict(pipeline, tmp_path / "in", tmp_path / "out")
    assert [p.name for p in summary.ignored] == ["b.heic", "notes.txt"] and not summary.failed
    assert summary.to_dict()["ignored"] == [str(path) for path in summary.ignored]


def test_the_command_line_offers_it(tmp_path):
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "a.bmp")
    (tmp_path / "in" / "b.heic").write_text("x")
    command = ["predict", str(tmp_path / "in"), "-s", "bycolour", "-o", str(tmp_path / "out")]
    refused = CliRunner().invoke(cli.app, command)
    assert refused.exit_code == 2 and "a.bmp" in refused.stderr
    options = ["--keep-suffix", "--workers", "2", "--batch-size", "2"]
    result = CliRunner().invoke(cli.app, command + options)
    assert result.exit_code == 0, result.output
    assert tree(tmp_path / "out") == ["a.bmp.png", "a.png.png", "pyseg.json"]
    assert "ignored" in result.stderr and "b.heic" in result.stderr


def test_a_glob_keeps_the_folders_that_it_leaves_open(pipeline, tmp_path, monkeypatch):
    for name in ("a/x.png", "a/b/x.png", "a/c/d/x.png"):
        picture(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    absolute = predict(pipeline, str(tmp_path / "a" / "**" / "*.png"), "one")
    assert [str(p.relative_to("one")) for p in absolute.written] == [
        "b/x.png",
        "c/d/x.png",
        "x.png",
    ]
    assert len(predict(pipeline, "a/**/*.png", "two").written) == 3
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    predict(pipeline, "?/[bc]/x.png", "three")
    assert tree(tmp_path / "three") == ["a/b/x.png", "pyseg.json"]
    predict(pipeline, "a/*/../x.png", "four")  # never out of the output directory
    assert tree(tmp_path / "four") == ["pyseg.json", "x.png"]


def test_a_full_disk_names_the_file(pipeline, tmp_path, monkeypatch):
    picture(tmp_path / "a.png")

    def full(self, *arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r"No space left on device: .*out/a\.png'"):
        predict(pipeline, tmp_path / "a.png", tmp_path / "out")
    assert tree(tmp_path / "out") == ["pyseg.json"]


def test_what_a_killed_run_left_is_removed(pipeline, tmp_path):
    picture(tmp_path / "in" / "sub" / "a.png")
    old = tmp_path / "out" / "sub" / ".a.png.0123456789ab.part"
    young = tmp_path / "out" / ".a.png.ba9876543210.part"
    for path in (old, young):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    os.utime(old, (1, 1))
    predict(pipeline, tmp_path / "in", tmp_path / "out")
    assert not old.exists() and young.exists()  # which another process may be writing


def test_two_runs_into_one_folder(pipeline, tmp_path):
    """The second of them is refused, also by another process, and one after it goes on."""
    for k in range(2):
        picture(tmp_path / "in" / f"{k}.png", k)
    out = tmp_path / "out"

    def meanwhile(jobs):
        for job in jobs:
            with pytest.raises(PysegError, match=r"out' is being written by another run"):
                predict(pyseg.build("bycolour+swap"), tmp_path / "in", out)
            code = (
                "import pathlib, pyseg.prediction as p\n"
                f"with p.only_run(pathlib.Path({str(out)!r})): pass"
            )
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            assert done.returncode == 1 and "is being written by another run" in done.stderr
            yield job

    assert len(predict(pipeline, tmp_path / "in", out, track=meanwhile).written) == 2
    assert tree(out) == ["0.png", "1.png", "pyseg.json"]
    assert len(predict(pipeline, tmp_path / "in", out).skipped) == 2


def test_the_lock_of_a_killed_run_is_free(pipeline, tmp_path):
    picture(tmp_path / "a.png")
    out = tmp_path / "out"
    out.mkdir()
    code = (
        "import os, pathlib, pyseg.prediction as p\n"
        f"with p.only_run(pathlib.Path({str(out)!r})): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert (out / ".lock").exists()
    assert len(predict(pipeline, tmp_path / "a.png", out).written) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_no_space_on_the_way(tmp_path, monkeypatch, workers):
    """One error that names the file; what is there is whole, and the next run does the rest."""
    for k in range(4):
        picture(tmp_path / "in" / f"{k}.png", k)
    out, real, saved = tmp_path / "out", Image.Image.save, []

    def full(self, path, **options):
        saved.append(path)
        if len(saved) > 4:  # the first image's files and a half
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, path, **options)

    finds = pyseg.build("finds")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(OSError, match=r"No space left on device: .*\.png'"):
            predict(finds, tmp_path / "in", out, overlay=True, workers=workers)
    names = tree(out)
    assert not any(name.endswith(".part") for name in names)
    for name in names:
        if name.endswith(".png"):
            Image.open(out / name).load()
    done = [name for name in names if "/" not in name and name.endswith(".png")]
    assert len(done) < 4
    for name in done:  # the label map comes last: where it is, all is
        assert {f"overlays/{name}", f"segments/{name}"} <= set(names)
    again = predict(finds, tmp_path / "in", out, overlay=True)
    assert sorted(path.name for path in again.skipped) == done
    assert len(again.written) == 4 - len(done)
    assert len([name for name in tree(out) if name.endswith(".png")]) == 12


def test_no_space_on_the_command_line(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")

    def full(self, path, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    command = ["predict", str(tmp_path / "a.png"), "-s", "bycolour", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 2 and "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1


def test_lists_of_images(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.png", "b/x.png"):
        picture(tmp_path / name)
    (tmp_path / "list.txt").write_text(
        f"a/x.png\n\n ./b/../b/x.png \n{tmp_path}/a/x.png\ngone.png\ns3://bucket/c/y.png\n"
    )
    summary = predict(pipeline, "@list.txt", "out")
    whole = f"{str(tmp_path).lstrip('/')}/a/x.png"
    assert tree(tmp_path / "out") == sorted(["a/x.png", "b/x.png", whole, "pyseg.json"])
    assert set(summary.failed) == {"gone.png", "s3://bucket/c/y.png"}
    assert "download it first" in summary.failed["s3://bucket/c/y.png"]
    assert len(predict(pipeline, ["@list.txt", "a/x.png"], "out").skipped) == 3
    (tmp_path / "empty.txt").write_text("\n")
    assert "lists no image" in predict(pipeline, "@empty.txt", "other").failed["@empty.txt"]
    with pytest.raises(PysegError, match=r"list of images 'none\.txt' cannot be read"):
        predict(pipeline, "@none.txt", "other")
    with pytest.raises(PysegError, match="paths is empty"):
        predict(pipeline, [], "other")


# --- several at a time ------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 1), (1, 3), (3, 1), (2, 4), (20, 1)])
def test_workers_and_batches_change_nothing(pipeline, tmp_path, workers, batch_size):
    threads = torch.get_num_threads()
    folder, out = tmp_path / "in", tmp_path / "out"
    sizes = [(6, 8), (6, 8), (6, 13), (5, 3), (6, 8), (1, 1), (6, 8), (6, 8)]  # 13: no memory
    labels = [picture(folder / f"{k}.png", k, size) for k, size in enumerate(sizes)]
    (folder / "4.png").write_bytes(b"")
    tracked = []

    def track(jobs):
        for source, target in jobs:
            yield source, target
            tracked.append(source.stem)

    summary = predict(
        pipeline, folder, out, overlay=True, workers=workers, batch_size=batch_size, track=track
    )
    assert tracked == [str(k) for k in range(8)]
    assert [path.stem for path in summary.written] == ["0", "1", "3", "5", "6", "7"]
    assert "too large" in summary.failed[str(folder / "2.png")]
    assert "is empty" in summary.failed[str(folder / "4.png")]
    for path in summary.written:
        assert np.array_equal(read_labels(path).numpy(), labels[int(path.stem)])
    assert len(tree(out)) == 2 * 6 + 1 and torch.get_num_threads() == threads
    again = predict(pipeline, folder, out, workers=workers, batch_size=batch_size)
    assert [path.stem for path in again.skipped] == ["0", "1", "3", "5", "6", "7"]
    assert not again.written and again.failed.keys() == summary.failed.keys()


def test_two_images_at_a_time(pipeline, tmp_path, monkeypatch):
    for k in range(4):
        picture(tmp_path / "in" / f"{k}.png", k)
    both, real = threading.Barrier(2, timeout=30), ByColour.predict
    monkeypatch.setattr(ByColour, "predict", lambda *a: (both.wait(), real(*a))[1])
    assert len(predict(pipeline, tmp_path / "in", tmp_path / "out", workers=2).written) == 4
    # Too large to share the memory, they come in one by one, with all of torch's threads.
    monkeypatch.setattr(prediction, "_SHARED_PIXELS", 50)
    inside = []

    def alone(*arguments):
        inside.append(1)
        assert len(inside) == 1 and torch.get_num_threads() == 2
        time.sleep(0.01)
        inside.clear()
        return real(*arguments)

    monkeypatch.setattr(ByColour, "predict", alone)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert len(predict(pipeline, tmp_path / "in", tmp_path / "large").written) == 4
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_ends_what_runs_and_leaves_whole_files(
    pipeline, tmp_path, monkeypatch, workers
):
    for k in range(6):
        picture(tmp_path / "in" / f"{k}.png", k, (6, 8) if k < 3 else (5, 8))
    real, endless = ByColour.predict, threading.Event()

    def slow(self, images):
        if images[0].shape[1] == 5:
            endless.set()
            while True:
                time.sleep(0.001)
        return real(self, images)

    def interrupted(jobs):
        yield from jobs[:3]
        assert endless.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(ByColour, "predict", slow)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        predict(pipeline, tmp_path / "in", out, workers=workers, track=interrupted)
    assert tree(out) == ["0.png", "1.png", "2.png", "pyseg.json"]
    assert not any(thread.name == "pyseg-predict" for thread in threading.enumerate())


def test_an_error_comes_after_the_results_before_it(pipeline, tmp_path, monkeypatch):
    for k in range(5):
        picture(tmp_path / "in" / f"{k}.png", k, (5, 8) if k == 1 else (6, 8))
    real, failing = ByColour.predict, threading.Event()

    def one_fails(self, images):
        if images[0].shape[1] == 5:
            failing.set()
            raise ZeroDivisionError
        assert failing.wait(30)  # the first image is later than the error of the second
        return real(self, images)

    monkeypatch.setattr(ByColour, "predict", one_fails)
    with pytest.raises(PysegError, match=r"failed on image '.*1\.png': ZeroDivisionError"):
        predict(pipeline, tmp_path / "in", tmp_path / "out", workers=2)
    assert "0.png" in tree(tmp_path / "out") and "4.png" not in tree(tmp_path / "out")


def test_threads_have_their_callers_modes(pipeline, tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    modes, real = [], ByColour.predict

    def spy(self, images):
        modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return real(self, images)

    monkeypatch.setattr(ByColour, "predict", spy)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        predict(pipeline, tmp_path / "a.png", tmp_path / "one")
    predict(pipeline, tmp_path / "a.png", tmp_path / "two")
    assert modes == [(False, True), (True, False)]


def test_too_little_memory_is_announced(pipeline, tmp_path, monkeypatch):
    picture(tmp_path / "a.png", size=(60, 80))
    monkeypatch.setattr(prediction, "_LARGE_PIXELS", 1000)
    monkeypatch.setattr(prediction, "_bytes_per_pixel", lambda *a: 1e6)
    monkeypatch.setattr(prediction, "_free_memory", lambda device: 2e9)
    with pytest.warns(
        UserWarning, match=r"a\.png' of 80 x 60 pixels needs about 4\.8 GB .* 2\.0 GB"
    ):
        assert predict(pipeline, tmp_path / "a.png", tmp_path / "out").written
    monkeypatch.setattr(prediction, "_free_memory", lambda device: 6e9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(pipeline, tmp_path / "a.png", tmp_path / "more")


def test_the_need_of_memory_is_measured_on_a_reduced_image(monkeypatch):
    pipeline = pyseg.build("streetnet", weights=None)
    monkeypatch.setattr(prediction, "_PROBE_PIXELS", 1 << 18)
    measured = prediction._bytes_per_pixel(pipeline, torch.zeros(3, 3000, 4000, dtype=torch.uint8))
    assert 50 < measured < 1000  # float activations at stride 2 and less; 12 megapixels never were
    free = prediction._free_memory(torch.device("cpu"))
    assert free is None or free > 1 << 20


@pytest.mark.parametrize("option", ["workers", "batch_size"])
def test_options_out_of_range(pipeline, tmp_path, option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        predict(pipeline, tmp_path, tmp_path / "out", **{option: 0})
