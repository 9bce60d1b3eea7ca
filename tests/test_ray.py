"""`predict` and `evaluate` by Ray's workers: one result per image, whatever happens to a worker."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import fsspec
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import pyseg
from pyseg import cli, cluster, evaluation, prediction, report
from pyseg.datasets import Folder
from pyseg.errors import ImageError, PysegError
from pyseg.image import read_image, read_labels, write_image, write_labels
from pyseg.models.streetnet import CLASSES
from pyseg.processes import add_states

pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'pyseg-toolkit[ray]'")
ASSETS = Path(pyseg.__file__).parent / "assets"
SPEC = "streetnet"


@pytest.fixture(scope="module")
def ray():
    """One instance for all tests of the file, begun as `predict` begins its own."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two workers need two CPUs")
    with cluster._cluster("local") as module:
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        yield module


@pytest.fixture
def photos(tmp_path):
    """Seven small pictures in two folders."""
    image = read_image(ASSETS / "street.jpg")
    for k in range(7):
        path = tmp_path / "photos" / ("sub" if k % 2 else "") / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, image[:, 20 * k : 20 * k + 96, 30 * k : 30 * k + 80 + k])
    return tmp_path / "photos"


def contents(folder):
    """Name -> (shard, bytes) of all that is in the shards; no name is there twice."""
    found = {}
    for shard in sorted(folder.glob("shard-*.zip")):
        with zipfile.ZipFile(shard) as archive:
            assert archive.testzip() is None
            for name in archive.namelist():
                assert name not in found, f"{name} is in {found[name][0]} and {shard.name}"
                found[name] = shard.name, archive.read(name)
    return found


def plainly(paths, output, **options):
    """What plain `predict` writes, with the threads of a worker."""
    prediction.predict(pyseg.build(SPEC), paths, output, workers=1, **options)
    return {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and path.name not in ("pyseg.json", ".lock")
    }


def actors():
    """Process ids of workers that are at work."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_text()
        except OSError:
            continue
        if text.startswith("ray::MapWorker(MapBatches(_Segmenter))"):
            found.append(int(process.name))
    return found


# --- predict ----------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds workers in /proc")
def test_a_killed_worker_costs_nothing(ray, data_folder, tmp_path, one_thread):
    """kill -9 of a worker in the middle of the CamVid images: each result is there, once."""
    images = sorted((data_folder("camvid/val") / "images").glob("*.jpg"))[:12]
    (tmp_path / "in").mkdir()
    for image in images:
        shutil.copy(image, tmp_path / "in")
    killed = []

    def track(shards):
        assert len(shards) == 6
        for done, shard in enumerate(shards):
            yield shard
            if done == 0:  # the first answer has come, and the next shards are at work
                killed.extend(actors()[:1])
                os.kill(killed[0], signal.SIGKILL)

    summary = cluster.predict(
        SPEC, tmp_path / "in", tmp_path / "out", workers=2, shard_size=2, track=track
    )
    assert killed and summary.failed == {}
    names = [f"{image.stem}.png" for image in images]
    assert summary.written == names and len(summary.shards) == len(set(summary.shards)) == 6
    found = contents(tmp_path / "out")
    assert {name: data for name, (_, data) in found.items()} == plainly(
        tmp_path / "in", tmp_path / "plain"
    )
    assert sorted(found) == names
    assert not list((tmp_path / "out").glob("*.part")) and not list(
        (tmp_path / "out").glob(".*.p*")
    )


def test_a_run_that_was_stopped_goes_on(ray, photos, tmp_path, one_thread):
    """Also with an image that is damaged and one that came later."""
    (photos / "x.png").write_bytes((photos / "0.png").read_bytes()[:60])
    out = tmp_path / "out"
    options = {"workers": 2, "shard_size": 2, "overlay": True}

    def stopped(shards):
        yield from shards[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cluster.predict(SPEC, photos, out, track=stopped, **options)
    before = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.zip")}
    assert before
    whole = {name.removeprefix("overlays/") for name in contents(out)}
    shutil.copy(photos / "0.png", photos / "later.png")
    summary = cluster.predict(SPEC, str(photos), f"file://{out}", **options)
    assert set(summary.skipped) == whole and set(summary.failed) == {str(photos / "x.png")}
    assert "truncated" in summary.failed[str(photos / "x.png")]
    assert len(summary.written) == 8 - len(whole)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    (photos / "x.png").unlink()
    found = contents(out)
    plain = plainly(photos, tmp_path / "plain", overlay=True)
    assert {name: data for name, (_, data) in found.items()} == plain
    assert {"sub/1.png", "overlays/sub/1.png", "later.png"} <= set(found)
    again = cluster.predict(SPEC, photos, out, **options)
    assert len(again.skipped) == 8 and not again.shards
    with pytest.raises(PysegError, match="other options"):
        cluster.predict(SPEC, photos, out)
    with pytest.raises(PysegError, match="another pipeline"):
        prediction.predict(pyseg.build(SPEC), photos, out)
    with pytest.raises(PysegError, match="no shards"):
        cluster.predict(SPEC, photos, tmp_path / "plain")


def test_urls_in_and_out(ray, photos, tmp_path, one_thread):
    """Folders, patterns and lists; what is read by URL gives the same as what is read by path."""
    (photos / "notes.txt").write_text("no image")
    (tmp_path / "list.txt").write_text(f"file://{photos}/sub/1.png\nfile://{photos}/gone.png\n")
    sources = [f"file://{photos}", f"file://{photos}/sub/?.png", f"@{tmp_path / 'list.txt'}"]
    summary = cluster.predict(SPEC, sources, f"file://{tmp_path / 'out'}", workers=1)
    place = str(photos).lstrip("/")
    assert list(summary.failed) == [f"file://{photos}/gone.png"]
    assert "does not exist" in summary.failed[f"file://{photos}/gone.png"]
    assert summary.ignored == [Path("notes.txt")]
    found = {name: data for name, (_, data) in contents(tmp_path / "out").items()}
    (photos / "notes.txt").unlink()
    plain = plainly(photos, tmp_path / "plain")
    assert found.pop(f"{place}/sub/1.png") == plain["sub/1.png"]
    assert {k: found.pop(k) for k in ("1.png", "3.png", "5.png")} == {
        f"{k}.png": plain[f"sub/{k}.png"] for k in (1, 3, 5)
    }
    assert found == plain


def test_an_error_in_a_worker_is_one_line(ray, photos, tmp_path):
    with pytest.raises(PysegError, match=r"cuda"):
        cluster.predict(SPEC, photos, tmp_path / "out", workers=1, device="cuda:7", shard_size=9)
    with pytest.raises(PysegError, match=r"workers=999 with gpus_per_worker=0 do not fit"):
        cluster.predict(SPEC, photos, tmp_path / "out", workers=999)
    with pytest.raises(PysegError, match=r"gpus_per_worker=64 do not fit"):
        cluster.predict(SPEC, photos, tmp_path / "out", gpus_per_worker=64)
    assert contents(tmp_path / "out") == {}


class Dies(cluster._Worker):
    """Answers with its job, unless that ends it."""

    def work(self, pipeline, job):
        if job["name"] == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        return job


@pytest.mark.slow  # three starts of a worker
def test_a_job_that_kills_its_workers_is_given_up(ray):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    crew = cluster._Crew(1, 1, 0.0, "cpu")
    recipe = cluster._Recipe(SPEC, None, None, "cpu", "fp32")
    jobs = [{"name": name} for name in ("a", "deadly", "b")]
    answers = list(cluster._map(ray, crew, Dies, (recipe, {}), jobs))
    assert sorted(answer["name"] for answer in answers) == ["a", "b"]


def test_the_command_joins_a_cluster(ray, photos, tmp_path, one_thread):
    """As another program does: the address from the environment, images shared out, exit code 1."""
    (photos / "x.png").write_text("<html>")
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = ["predict", str(photos), "-s", SPEC, "-o", str(tmp_path / "out"), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "pyseg", *command, "--engine", "ray", "--workers", "2"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    assert len(result["written"]) == 7 and "HTML" in result["failed"][str(photos / "x.png")]
    (photos / "x.png").unlink()
    found = {name: data for name, (_, data) in contents(tmp_path / "out").items()}
    assert found == plainly(photos, tmp_path / "plain")
    assert ray.is_initialized()


# --- evaluate ---------------------------------------------------------------------------------


def test_scores_are_those_of_one_process(ray, tmp_path, one_thread):
    image, labels = read_image(ASSETS / "street.jpg"), read_labels(ASSETS / "street_labels.png")
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir(parents=True)
    for k in range(7):
        part = slice(30 * k, 30 * k + 90 + 7 * k), slice(40 * k, 40 * k + 120)
        write_image(tmp_path / "images" / f"{k}.png", image[:, part[0], part[1]])
        write_labels(tmp_path / "labels" / f"{k}.png", labels[part])
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    data, spec = Folder(tmp_path), "streetnet+crf(iterations=2)"
    names = ("semantic", "calibration", "boundary")
    observed = [report.WorstImages(data, 3) for _ in range(2)]
    one = evaluation.evaluate(pyseg.build(spec), data, names, observe=observed[0].add)
    two = cluster.evaluate(spec, data, names, workers=2, worst=observed[1])

    def numbers(result):
        rows = result.to_list()
        return [
            {k: row[k] for k in ("stage", "spec", "images", "metrics", "delta")} for row in rows
        ]

    assert repr(numbers(one)) == repr(numbers(two)) and two.images == 7
    assert all(
        torch.equal(a.confusion, b.confusion) for a, b in zip(one.stages, two.stages, strict=True)
    )
    assert (one.classes, one.palette, one.headline) == (two.classes, two.palette, two.headline)
    assert all(row.milliseconds > 0 for row in two.stages)
    assert observed[0].gather() == observed[1].gather() and len(observed[1].gather()) == 3
    with pytest.raises(PysegError, match="limit must be at least 1"):
        cluster.evaluate(spec, data, limit=0)
    (tmp_path / "images" / "5.png").write_bytes(b"")
    with pytest.raises(PysegError, match=r"5\.png.*is empty"):
        cluster.evaluate(spec, data, workers=2)


def test_states_are_added_in_order():
    parts = [{"n": torch.tensor([k]), "records": [k, -k]} for k in (1, 2, 3)]
    total = add_states("m", parts)
    assert total["n"].item() == 6 and total["records"] == [1, -1, 2, -2, 3, -3]
    assert parts[0]["n"].item() == 1
    with pytest.raises(PysegError, match="metric 'm' has a float as state 'x'"):
        add_states("m", [{"x": 1.0}])


# --- without Ray's processes ------------------------------------------------------------------


def test_what_cannot_be_done_is_refused_before_the_work(photos, tmp_path, monkeypatch):
    def no_work(*arguments):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster, "_cluster", no_work)
    out = tmp_path / "out"
    with pytest.raises(PysegError, match="paths is empty"):
        cluster.predict(SPEC, [], out)
    Image.new("RGB", (8, 8)).save(photos / "0.bmp")
    with pytest.raises(PysegError, match=r"0\.bmp and .*0\.png would both be written"):
        cluster.predict(SPEC, photos, out)
    two = [f"file://{photos}/sub/1.png", f"file://{photos}/../photos/sub/1.png"]
    with pytest.raises(PysegError, match="would both be written"):
        cluster.predict(SPEC, two, out)
    assert not out.exists()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(PysegError, match=r"s3:// needs a package .*: pip install s3fs"):
        cluster.predict(SPEC, "s3://bucket/photos", out)
    with pytest.raises(PysegError, match=r"s3:// needs a package .*: pip install s3fs"):
        cluster.predict(SPEC, photos / "0.png", "s3://bucket/labels")
    fsspec.register_implementation("odd", "no_such_module.System", errtxt="Get it at a shop")
    with pytest.raises(PysegError, match=r"odd:// needs a package .*: Get it at a shop"):
        cluster.predict(SPEC, "odd://photos", out)
    with pytest.raises(PysegError, match="fsspec does not know it"):
        cluster.predict(SPEC, "never://photos", out)
    with pytest.raises(PysegError, match="memory of one process"):
        cluster.predict(SPEC, "memory://photos", out)
    with pytest.raises(PysegError, match="nosuchmodel"):
        cluster.predict("nosuchmodel", photos / "0.png", out)
    for option in ("workers", "batch_size", "shard_size"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
            cluster.predict(SPEC, photos, out, **{option: 0})
    # A path that leads nowhere fails alone, as it does without Ray.
    gone = [f"file://{tmp_path}/gone", f"file://{photos}/*.gif"]
    summary = cluster.predict(SPEC, gone, out)
    assert "does not exist" in summary.failed[gone[0]]
    assert "matches no file" in summary.failed[gone[1]] and not summary.shards
    with prediction.only_run(out), pytest.raises(PysegError, match="written by another run"):
        cluster.predict(SPEC, photos / "0.png", out)


def test_the_command_line_refuses(photos, tmp_path):
    command = ["predict", str(photos), "-s", SPEC, "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, [*command, "--shard-size", "3", "--address", "auto"])
    assert result.exit_code == 2
    assert re.search("--shard-size, --address need --engine ray", result.stderr), result.stderr
    missing = CliRunner().invoke(cli.app, [*command, "--engine", "ray", "--workers", "0"])
    assert missing.exit_code == 2
    assert missing.stderr == "error: workers must be at least 1, got 0\n"


def test_without_ray(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ImportError, match=r"pip install 'pyseg-toolkit\[ray\]'"):
        cluster.predict(SPEC, photos, tmp_path / "out")


def test_shards_in_an_object_store(tmp_path):
    """fsspec's own in-memory store, which has neither renaming nor folders."""
    place = f"memory://bucket-{time.time_ns()}/labels"
    store, description = cluster.Store(place), {"spec": "a", "shards": True}
    assert store.begin(description, False) == set()
    results = tmp_path / "results"
    for name in ("a.png", "sub/b.png", "overlays/a.png"):
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(name)
    (results / "pyseg.json").write_text("{}")
    packed = []
    for k in range(2):  # at another time the same bytes
        cluster._pack(results, tmp_path / f"{k}.zip")
        packed.append((tmp_path / f"{k}.zip").read_bytes())
        os.utime(results / "a.png", (1e9, 1e9))
    assert packed[0] == packed[1]
    store.put(tmp_path / "0.zip", "shard-1.zip")
    store.put(tmp_path / "1.zip", "shard-1.zip")
    assert store.begin(description, False) == {"a.png", "sub/b.png", "overlays/a.png"}
    with pytest.raises(PysegError, match="another pipeline or other options, 'a'"):
        cluster.Store(place).begin({"spec": "b", "shards": True}, False)
    store.put(tmp_path / "1.zip", "shard-2.zip")
    with pytest.raises(PysegError, match=r"a\.png is in shard-1\.zip and in shard-2\.zip"):
        store.begin(description, False)
    store.remove("shard-2.zip")
    (tmp_path / "cut.zip").write_bytes(packed[0][:-9])
    store.put(tmp_path / "cut.zip", "shard-3.zip")
    with pytest.raises(PysegError, match=r"shard-3\.zip is damaged"):
        store.begin(description, False)
    assert store.begin({"spec": "b", "shards": True}, True) == set() and store.shards() == []

    system = fsspec.filesystem("memory")
    picture = (ASSETS / "street.jpg").read_bytes()
    for name in ("x/a.jpg", "x/y/b.jpg", "x/.hidden.jpg", "x/notes.txt"):
        system.pipe_file(f"{place.partition('://')[2]}/{name}", picture)
    summary = prediction.Predictions(tmp_path)
    found = cluster._find(f"{place}/x", summary)
    assert [str(where) for _, where in found] == ["a.jpg", "y/b.jpg"]
    assert summary.ignored == [Path("notes.txt")]
    assert [str(w) for _, w in cluster._find(f"{place}/*/y/*.jpg", summary)] == ["x/y/b.jpg"]
    read = cluster._Reader(tmp_path).read
    assert torch.equal(read(found[0][0]), read_image(ASSETS / "street.jpg"))
    system.pipe_file(f"{place.partition('://')[2]}/x/a.jpg", picture[:50])
    with pytest.raises(ImageError) as caught:
        read(found[0][0])
    assert found[0][0] in str(caught.value) and str(tmp_path) not in str(caught.value)
    assert not list(tmp_path.glob("*-*.jpg"))


def test_workers_fit_the_machines():
    class Nodes:
        def __init__(self, *sizes):
            self.sizes = sizes

        def nodes(self):
            return [{"Alive": True, "Resources": {"CPU": c, "GPU": g}} for c, g in self.sizes]

    def crew(machines, *arguments):
        found = cluster._crew(Nodes(*machines), *arguments)
        return found.workers, found.cpus, found.gpus, found.device

    assert crew([(2, 0)], None, None, None) == (1, 2, 0, "cpu")
    assert crew([(2, 0)], 2, None, None) == (2, 1, 0, "cpu")
    assert crew([(64, 0), (64, 0)], None, None, None) == (32, 4, 0, "cpu")
    assert crew([(6, 0), (6, 0), (6, 0)], 6, None, None) == (6, 3, 0, "cpu")
    assert crew([(96, 8)] * 125, None, None, None) == (1000, 4, 1, "cuda")
    assert crew([(8, 1), (64, 0)], None, 0.5, None) == (2, 4, 0.5, "cuda")
    assert crew([(8, 1)], None, None, "cpu") == (2, 4, 0, "cpu")
    with pytest.raises(PysegError, match="do not fit: the cluster has 8 CPUs and 1 GPUs"):
        crew([(8, 1)], 2, 1.0, None)
