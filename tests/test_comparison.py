"""`compare`: its table and its intervals against others, kills, failures, mistakes, the page."""

import html
import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from typer.testing import CliRunner

import pyseg
from pyseg import cli, datasets, metrics, models, refiners
from pyseg.comparison import compare, run
from pyseg.comparison.result import SCORES
from pyseg.errors import PysegError, SpecError, UnknownName, WeightsError
from pyseg.metrics import bootstrap
from pyseg.models.semantic import SemanticModel
from pyseg.types import Sample
from pyseg.weights import load_state, save_state

CLASSES = ("ground", "disc", "frame & <b>")
PALETTE = ((90, 60, 30), (250, 200, 20), (20, 40, 200))


class Shapes:
    """Discs on a ground within a frame, noisy enough that some pixels are wrong."""

    classes, palette = CLASSES, PALETTE

    def __init__(self, split="train", *, count: int = 6, size: tuple = (24, 32)):
        generator = np.random.default_rng(len(split))
        rows, columns = np.mgrid[: size[0], : size[1]]
        self.samples = []
        for index in range(count):
            labels = np.zeros(size, dtype=np.uint8)
            y, x = generator.integers(8, size[0] - 8), generator.integers(8, size[1] - 8)
            labels[(rows - y) ** 2 + (columns - x) ** 2 < 36] = 1
            labels[:2] = labels[-2:] = 2
            image = np.array(PALETTE)[labels] + generator.integers(-90, 90, (*size, 3))
            labels[:, -1] = 255
            image = torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)
            self.samples.append(Sample(f"{split} {index}", image, torch.from_numpy(labels)))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Tiny(nn.Sequential):
    def __init__(self, classes, width):
        super().__init__(
            nn.Conv2d(3, width, 3, 2, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, classes, 1),
        )


class Breaks(nn.Module):
    """Trains no second step."""

    def __init__(self, classes):
        super().__init__()
        self.layer, self.calls = nn.Conv2d(3, classes, 1), 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("Expected more than 1 value per channel\nand so on")
        return self.layer(x)


def tiny(
    *,
    num_classes: int | None = None,
    weights: str | None = "default",
    width: int = 8,
    kernels: tuple[int, ...] = (1, 2),
):
    model = SemanticModel(Tiny(num_classes, width), [f"class {k}" for k in range(num_classes)])
    if weights is not None:
        model.network.load_state_dict(load_state(weights))
    return model


def breaks(*, num_classes: int | None = None, weights: str | None = None):
    return SemanticModel(Breaks(num_classes), [f"class {k}" for k in range(num_classes)])


class LabelsOnly:
    def refine(self, image, prediction):
        return prediction.with_labels(prediction.labels)


class Fails:
    def refine(self, image, prediction):
        raise ZeroDivisionError("no refinement today")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(models._registry._registered, "tiny", tiny)
    monkeypatch.setitem(models._registry._registered, "breaks", breaks)
    monkeypatch.setitem(refiners._registry._registered, "labels_only", LabelsOnly)
    monkeypatch.setitem(refiners._registry._registered, "fails", Fails)
    monkeypatch.setitem(datasets._registry._registered, "shapes", Shapes)


@pytest.fixture(autouse=True)
def few(one_thread):
    """The networks are too small for more."""


def compared(folder, names=("tiny",), **options):
    options = {"steps": 30, "batch_size": 2, "precision": "fp32", "resamples": 50, **options}
    return compare(names, Shapes(), Shapes("val", count=9), report=folder, **options)


# --- the numbers --------------------------------------------------------------------------------


def test_rows_are_what_training_and_evaluating_by_hand_give(tmp_path):
    names = ["tiny(width=4)", "tiny(width=16, kernels=(3, 4))"]
    chains = ["none", "crf(iterations=2)", "labels_only+labels_only"]
    result = compared(tmp_path / "out", names, refiners=chains, size=(36, 48), learning_rate=1e-2)
    assert result.failures == {}
    assert [(row.model, row.refiner) for row in result.rows] == [
        (name, chain) for name in names for chain in chains
    ]
    train_on, score_on = (
        run._Prepared(data, (36, 48)) for data in (Shapes(), Shapes("val", count=9))
    )
    assert score_on[0].image.shape == (3, 36, 48) and score_on[0].labels.unique().tolist() == [
        0,
        1,
        2,
        255,
    ]
    for index, name in enumerate(names):
        torch.manual_seed(0)
        model = pyseg.build(name, num_classes=3, weights=None).model
        log = pyseg.train(
            model,
            train_on,
            output_dir=tmp_path / str(index),
            epochs=30,
            steps=1,
            batch_size=2,
            crop_size=(36, 48),
            full_size=0,
            learning_rate=1e-2,
            precision="fp32",
        )
        assert len(log) == result.rows[3 * index].training.steps == 30
        assert log[-1]["loss"] == result.rows[3 * index].training.loss
        for k, chain in enumerate(chains):
            row = result.rows[3 * index + k]
            pipeline = pyseg.build(model, *([] if chain == "none" else [chain]))
            texts = ["semantic", "boundary"] + (["calibration"] if k < 2 else [])
            last = pyseg.evaluate(pipeline, score_on, texts).stages[-1].metrics
            want = {
                "accuracy": last["semantic"]["pixel_accuracy"],
                "precision": last["semantic"]["precision"],
                "recall": last["semantic"]["recall"],
                "F1": last["semantic"]["f1"],
                "Jaccard": last["semantic"]["fwiou"],
                "mIoU": last["semantic"]["miou"],
                "boundary IoU": last["boundary"]["boundary_iou"],
                "ECE": last["calibration"]["ece"] if k < 2 else math.nan,
            }
            assert {**row.scores, "ECE": 0} == {**want, "ECE": 0}
            assert row.scores["ECE"] == pytest.approx(want["ECE"], nan_ok=True)
            assert 0.2 < row.scores["mIoU"] < 1  # something to tell apart
            cost = pyseg.cost(pipeline, score_on[0].image, rounds=1).stages[-1]
            assert (row.parameters, row.flops) == (cost.parameters, cost.flops)
            assert row.milliseconds > 0 and row.training.seconds > 0
            assert list(row.iou) == list(CLASSES)
            for score, (low, high) in row.intervals.items():
                assert low <= row.scores[score] <= high or (score == "ECE" and k == 2)
    assert result.rows[0].parameters < result.rows[3].parameters
    assert result.table()[1][2][0] == "3" and "-" in result.table()[1][2]  # no ECE of labels alone


def test_the_sum_of_the_images_is_the_whole(tmp_path):
    compared(tmp_path)
    (path,) = (tmp_path / "runs").glob("*/none-*.json")
    stored = json.loads(path.read_text())
    assert stored["images"] == [f"val {k}" for k in range(9)]
    for text, states in stored["states"].items():
        metric = metrics.create(text, classes=CLASSES)
        tensors = [{key: torch.tensor(v) for key, v in state.items()} for state in states]
        once = torch.ones(1, len(tensors), dtype=torch.int64)
        metric.load_state({k: v[0] for k, v in bootstrap.total_of(tensors, once).items()})
        computed = metric.compute()
        for _, of, key in SCORES:
            if of == text:
                assert computed[key] == stored["stages"][-1]["metrics"][text][key]


def confusions(images=20, classes=4, seed=None):
    generator = np.random.default_rng(seed)
    matrices = generator.integers(0, 50, (images, classes, classes))
    diagonal = generator.integers(0, 400, (images, classes))
    matrices[:, range(classes), range(classes)] += diagonal
    return matrices


def miou_of(total):
    """Of a confusion matrix [..., C, C], in NumPy."""
    tp = np.diagonal(total, axis1=-2, axis2=-1)
    return (tp / (total.sum(-1) + total.sum(-2) - tp)).mean(-1)


def states_of(matrices):
    count = matrices.shape[-1]
    zero = {
        "missed": torch.zeros(count, dtype=torch.int64),
        "invalid": torch.zeros(3, dtype=torch.int64),
    }
    return [{"matrix": torch.from_numpy(matrix), **zero} for matrix in matrices]


def test_resamples_are_those_of_brute_force():
    matrices = confusions(7)
    counts = bootstrap.draws(7, 40, seed=3)
    assert (counts.sum(1) == 7).all() and counts.min() == 0 and len(counts.unique(dim=0)) > 30
    got = bootstrap.resampled(
        metrics.create("semantic", classes=4), states_of(matrices), counts, ["miou"]
    )
    for row, value in zip(counts.tolist(), got["miou"].tolist(), strict=True):
        chosen = [matrices[k] for k, times in enumerate(row) for _ in range(times)]
        assert value == pytest.approx(miou_of(np.sum(chosen, 0)), abs=1e-12)
    values = np.sort(got["miou"].numpy())
    assert bootstrap.interval(got["miou"]) == pytest.approx(np.percentile(values, [2.5, 97.5]))
    undefined = torch.tensor([0.1, math.nan], dtype=torch.float64)
    assert all(map(math.isnan, bootstrap.interval(undefined)))
    assert not bootstrap.difference(0.1, undefined, undefined).beyond_noise


def test_intervals_are_those_of_scipy():
    first = confusions(30, seed=1)
    second = first + confusions(30, seed=2) // 8  # correlated, as two models on one image are
    counts = bootstrap.draws(30, 4000, seed=0)
    metric = metrics.create("semantic", classes=4)
    ours = [
        bootstrap.resampled(metric, states_of(side), counts, ["miou"])["miou"]
        for side in (first, second)
    ]

    def of(*sides):
        totals = [miou_of(side.sum(-3)) for side in sides]
        return totals[0] if len(totals) == 1 else totals[0] - totals[1]

    def scipys(*sides):
        indices = np.arange(30)

        def statistic(drawn, axis=-1):
            return of(*(side[drawn] for side in sides))

        found = scipy.stats.bootstrap(
            (indices,), statistic, n_resamples=4000, method="percentile", vectorized=True, rng=1
        )
        return found.confidence_interval

    for want, got in (
        (scipys(first), bootstrap.interval(ours[0])),
        (scipys(second), bootstrap.interval(ours[1])),
    ):
        assert got == pytest.approx(tuple(want), abs=0.1 * (want.high - want.low))
    want = scipys(first, second)
    got = bootstrap.difference(float(of(first.sum(0)[None], second.sum(0)[None])), *ours)
    assert (got.low, got.high) == pytest.approx(tuple(want), abs=0.1 * (want.high - want.low))
    # in pairs the interval is narrower than those of the two by themselves would make it
    alone = np.hypot(*(np.ptp(bootstrap.interval(side)) for side in ours))
    assert got.high - got.low < 0.8 * alone


def test_what_is_noise(tmp_path):
    names = ["tiny(width=4)", "tiny(width=4, kernels=(2,))", "tiny(width=5)"]
    result = compared(tmp_path, names, refiners=["none", "labels_only"], learning_rate=2e-2)
    assert len(result.rows) == 6 and len(result.differences) == 15
    # other options that change nothing: the same weights, and so no difference at all
    assert result.rows[0].scores == result.rows[2].scores
    assert result.differences[0, 2].value == 0 and not result.differences[0, 2].beyond_noise
    for (first, second), found in result.differences.items():
        a, b = result.rows[first], result.rows[second]
        assert found.value == a.scores["mIoU"] - b.scores["mIoU"]
        drawn = (a.resamples["mIoU"] - b.resamples["mIoU"]).numpy()
        assert [found.low, found.high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]))
        assert found.beyond_noise == (found.low > 0 or found.high < 0)
        back = result.difference(second, first)
        assert (back.low, back.high) == (-found.high, -found.low)
        signs = {result.sign(first, second), result.sign(second, first)}
        assert signs == ({"+", "-"} if found.beyond_noise else {"."})


# --- goes on, goes wrong ------------------------------------------------------------------------


def without_times(text):
    """A compare.json without what depends on the clock."""
    content = json.loads(text)
    del content["made"]
    for entry in content["trainings"]:
        del entry["seconds"]
    for row in content["rows"]:
        for key in ("milliseconds", "peak_megabytes", "training_seconds"):
            del row[key]
        for stage in row["stages"]:
            del stage["milliseconds"], stage["peak_megabytes"]
    return content


def test_a_killed_comparison_goes_on(tmp_path):
    def command(folder):
        arguments = ["--models", "streetnet,segnet_basic", "--refiners", "none,crf"]
        arguments += ["--dataset", "synthetic(length=3, size=(32, 64))", "--steps", "40"]
        arguments += ["--batch-size", "2", "--size", "32x64", "--resamples", "20"]
        return [sys.executable, "-m", "pyseg", "compare", *arguments, "--report", str(folder)]

    victim = subprocess.Popen(
        command(tmp_path / "parts"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    runs = tmp_path / "parts" / "runs"
    deadline = time.time() + 300
    while True:
        logs = list(runs.glob("segnet_basic-*/training/log.json"))
        if logs and len(json.loads(logs[0].read_text())) >= 3:
            break
        assert victim.poll() is None and time.time() < deadline
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    before = json.loads(logs[0].read_text())
    assert len(before) < 20 and not (tmp_path / "parts" / "compare.json").exists()
    (finished,) = runs.glob("streetnet-*")
    untouched = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert any(path.name.startswith("crf-") for path in untouched)

    again = subprocess.run(command(tmp_path / "parts"), capture_output=True, text=True, check=True)
    assert "segnet_basic" in again.stdout and "boundary IoU" in again.stdout
    log = json.loads(logs[0].read_text())
    # It went on, did not begin again; the log is written shortly before its checkpoint.
    assert len(log) == 20 and log[: len(before) - 1] == before[:-1]
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert not list(runs.rglob("checkpoint.pt")) and not list(runs.rglob("*.part"))

    subprocess.run(command(tmp_path / "whole"), capture_output=True, check=True)
    killed, whole = (
        without_times((tmp_path / name / "compare.json").read_text()) for name in ("parts", "whole")
    )
    assert killed == whole and len(whole["rows"]) == 4


def test_what_is_there_is_not_computed_again(tmp_path, monkeypatch):
    first = compared(tmp_path, refiners=["none"])

    def never(*_, **__):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(run, "train", never)
        patch.setattr(run, "evaluate", never)
        again = compared(tmp_path, refiners=["none"])
        assert again.rows == first.rows and again.failures == {}
    calls = []
    evaluate = run.evaluate
    monkeypatch.setattr(run, "evaluate", lambda *a, **k: calls.append(1) or evaluate(*a, **k))
    more = compared(tmp_path, ["tiny(width=5)", "tiny"], refiners=["labels_only", "none"])
    assert len(more.rows) == 4 and more.rows[3] == first.rows[0] and len(calls) == 3


def test_a_time_becomes_steps_that_stay(tmp_path, monkeypatch):
    lines = []
    times = iter([0.5, 10.0])
    monkeypatch.setattr(run, "_seconds_of_a_step", lambda *_: next(times))
    names = ["tiny", "tiny(width=4)"]
    options = {"steps": None, "budget_minutes": 0.4, "observe": lines.append}
    result = compared(tmp_path, names, **options)
    assert [row.training.steps for row in result.rows] == [48, 2]  # of 24 seconds
    assert lines[0] == "tiny: 48 steps of 0.500 s"
    again = compared(tmp_path, names, **options)  # times has no third
    assert again.rows == result.rows


def test_the_time_of_a_step_is_measured(tmp_path):
    model = tiny(num_classes=3, weights=None)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = {"batch_size": 2, "learning_rate": 1e-3, "precision": "fp32", "crop_size": (16, 16)}
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "checkpoint.pt").write_bytes(b"of a run that was killed")
    seconds = run._seconds_of_a_step(model, Shapes(), tmp_path, settings)
    assert 0 < seconds < 60 and list(tmp_path.iterdir()) == []
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_models_and_refiners_that_fail_are_reported(tmp_path):
    arguments = ["compare", "--models", "breaks,tiny(width=4, kernels=(3, 4))"]
    arguments += ["--refiners", "fails,none", "--dataset", "shapes", "--steps", "3"]
    arguments += ["--batch-size", "2", "--resamples", "9", "--report", str(tmp_path)]
    shown = CliRunner().invoke(cli.app, arguments)
    assert shown.exit_code == 1, shown.output
    why = "RuntimeError: Expected more than 1 value per channel (test_comparison.py, line "
    assert f"failed: breaks: training failed: {why}" in shown.stderr
    failed = "tiny(width=4, kernels=(3, 4))+fails"
    assert f"failed: {failed}: scoring failed: stage 'fails' failed on image" in shown.stderr
    assert "no refinement today" in shown.stderr
    content = json.loads((tmp_path / "compare.json").read_text())
    assert [*content["failures"]] == ["breaks", failed]
    (row,) = content["rows"]
    assert row["refiner"] == "none" and row["scores"]["mIoU"] > 0
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "no refinement today" in page

    alone = CliRunner().invoke(cli.app, [*arguments, "--models", "breaks", "--json"])
    assert alone.exit_code == 1 and json.loads(alone.stdout)["rows"] == []


def test_mistakes_are_told_before_anything_is_trained(tmp_path):
    def refused(kind, message, names=("tiny",), **options):
        with pytest.raises(kind, match=message):
            compared(tmp_path / "out", names, **options)
        assert not (tmp_path / "out" / "runs").exists()

    refused(UnknownName, "no model is called 'tinny'.*Did you mean 'tiny'", ["tiny", "tinny"])
    refused(UnknownName, "no refiner is called 'crg'.*Did you mean 'crf'", refiners=["none", "crg"])
    refused(SpecError, "no option 'widht'; did you mean 'width'", ["tiny(widht=3)"])
    refused(SpecError, "iterations must be int", refiners=["crf(iterations='a')"])
    refused(WeightsError, "absent.pth", ["tiny", "tiny(weights='absent.pth')"])
    refused(SpecError, "trained alone.*as one of the refiners", ["tiny+crf"])
    refused(PysegError, "models holds 'tiny' twice", ["tiny", " tiny()"])
    refused(PysegError, "refiners holds 'crf' twice", refiners=["crf", "crf"])
    refused(PysegError, "models must hold at least one", [])
    refused(PysegError, "must be lists of specs", "tiny")
    refused(PysegError, "give one bound", steps=None)
    refused(PysegError, "give one bound", budget_minutes=1)
    refused(PysegError, "must be positive, got -1", steps=-1)
    refused(PysegError, "must be positive, got 0, ", batch_size=0)
    refused(PysegError, "size must be", size=(0, 5))
    refused(ValueError, "precision must be", precision="fp8")
    refused(PysegError, "at least 2 to score, got 6 and 1", limit=1)
    refused(PysegError, "semantic models, and 'maskrcnn' is a", ["maskrcnn"])
    other = Shapes()
    other.classes = ("a", "b", "c")
    with pytest.raises(PysegError, match="the same classes"):
        compare(["tiny"], Shapes(), other, report=tmp_path / "out", steps=1)

    def command(*arguments):
        shown = CliRunner().invoke(
            cli.app, ["compare", "--report", str(tmp_path / "out"), *arguments]
        )
        assert shown.exit_code == 2 and not (tmp_path / "out" / "runs").exists()
        return shown.stderr

    few = ["--models", "tiny", "--steps", "1"]
    assert "no dataset is called 'camvit'" in command(*few, "--dataset", "camvit")
    assert "there is no folder" in command(*few, "--dataset", "camvid", "--root", "nowhere")
    split = command(*few, "--dataset", "shapes", "--validation-split", "train")
    assert "--validation-split must be different" in split
    assert "no model is called 'tinni'" in command(
        "--models", "tinni", "--steps", "1", "--dataset", "shapes"
    )
    assert "--budget-minutes or steps" in command("--models", "tiny", "--dataset", "shapes")


def test_another_recipe_needs_another_folder(tmp_path):
    compared(tmp_path)
    with pytest.raises(PysegError, match=r"another recipe: steps \(was 30, now 31\), seed \(was"):
        compared(tmp_path, steps=31, seed=5)
    with pytest.raises(PysegError, match="another recipe: images; give another folder"):
        compared(tmp_path, limit=4)
    (tmp_path / "file").write_text("")
    with pytest.raises(PysegError, match=r"report .*file' is a file"):
        compared(tmp_path / "file")


def test_a_model_begins_with_the_weights_that_its_spec_names(tmp_path):
    torch.manual_seed(7)
    start = Tiny(3, 8).state_dict()
    save_state(tmp_path / "start.safetensors", start)
    spec = f"tiny(weights={str(tmp_path / 'start.safetensors')!r}, width=8)"
    result = compared(tmp_path / "out", ["tiny", spec], steps=1, learning_rate=1e-9)
    assert [row.model for row in result.rows] == ["tiny", spec]
    random, given = (
        pyseg.load(tmp_path / "out" / "runs" / run._file_name(name) / "pipeline").model.network
        for name in ("tiny", spec)
    )
    assert torch.allclose(given[0].weight, start["0.weight"], atol=1e-6)
    assert not torch.allclose(random[0].weight, start["0.weight"], atol=1e-2)


# --- the page -----------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(tmp_path, html_page):
    names = ["tiny", "tiny(width=4)"]
    result = compared(tmp_path, names, refiners=["none", "labels_only"], size=(48, 64))
    assert {path.name for path in tmp_path.iterdir()} == {
        "compare.json",
        "index.html",
        "recipe.json",
        "runs",
    }
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    page = html_page(text)
    assert "http" not in text.replace("http-equiv", "") and "<script" not in text
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 3 * (2 + 4)  # images shown, each with its truth and a picture a row
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    plots = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert [plot["aria-label"] for plot in plots] == [
        "mIoU over ms an image",
        "mIoU over parameters, millions",
    ]
    points = [attributes for tag, attributes in page.tags if tag == "circle"]
    assert len(points) == 2 * 4
    for point in points:
        assert 52 <= float(point["cx"]) <= 620 - 36 and 14 <= float(point["cy"]) <= 330 - 44
    assert "frame &amp; &lt;b&gt;" in text and "4 tiny(width=4)+labels_only" in text
    assert (
        html.escape(result.method) in text
        and "50 bootstrap resamples of the 9 images" in result.method
    )
    content = json.loads((tmp_path / "compare.json").read_text())
    assert content["rows"][1]["scores"]["ECE"] is None and len(content["differences"]) == 6
    assert content["recipe"]["size"] == [48, 64] and content["recipe"]["steps"] == 30
