import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import pyseg
from pyseg import _native, cli, datasets, metrics, models, refiners, testing, training
from pyseg.datasets.synthetic import StreetScenes
from pyseg.doctor import _entries, diagnose, stale_installs
from pyseg.image import read_image, read_labels, write_image, write_labels, write_panoptic
from pyseg.metrics.semantic import Semantic
from pyseg.models.semantic import SemanticModel
from pyseg.models.streetnet import CLASSES, PALETTE
from pyseg.registry import commands
from pyseg.types import Sample, Segmentation

ASSETS = Path(pyseg.__file__).parent / "assets"


class Threshold:
    """Class 1 where the red channel is above 127."""

    def __init__(self, *, num_classes: int | None = None, weights: str | None = "default"):
        self.classes = ("dark", "light")[:num_classes]
        self.weights = weights

    def predict(self, images):
        return [
            Segmentation(tuple(i.shape[1:]), self.classes).with_labels((i[0] > 127).to(torch.uint8))
            for i in images
        ]


class Invert:
    def refine(self, image, prediction):
        return prediction.with_labels(1 - prediction.labels)


class Halves:
    classes, palette = ("dark", "light"), ((0, 0, 0), (255, 255, 255))

    def __init__(self, root, split="train"):
        if not Path(root).is_dir():
            raise FileNotFoundError(f"there is no folder {root}")
        self.split = split

    def __len__(self):
        return 4

    def __getitem__(self, index):
        image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        image[:, :, 4:] = 255
        labels = (image[0] > 0).to(torch.uint8)
        labels[0] = 0  # 4 of 64 pixels that the model gets wrong
        return Sample(f"{self.split}{index}", image, labels)


def tiny(*, num_classes: int | None = None, weights: str | None = "default"):
    network = torch.nn.Conv2d(3, num_classes or 2, 1)
    return SemanticModel(network, [f"class {k}" for k in range(num_classes or 2)])


class NearlyTrue:
    """The street image's ground truth with its left half gone."""

    classes = CLASSES

    def __init__(self, *, weights: str | None = "default"):
        pass

    def predict(self, images):
        labels = read_labels(ASSETS / "street_labels.png")
        labels[:, :240] = 255
        return [Segmentation((360, 480), CLASSES).with_labels(labels) for _ in images]


class Complete:
    def refine(self, image, prediction):
        return prediction.with_labels(read_labels(ASSETS / "street_labels.png"))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for package, entries in (
        (models, {"threshold": Threshold, "tiny": tiny, "nearly": NearlyTrue}),
        (refiners, {"invert": Invert, "complete": Complete}),
        (datasets, {"halves": Halves}),
        (metrics, {"semantic": Semantic}),
    ):
        for name, factory in entries.items():
            monkeypatch.setitem(package._registry._registered, name, factory)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def error_line(result, code=2):
    """The one line on stderr that an error of ours is."""
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def picture(path, value=200):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), value, dtype=np.uint8)).save(path)
    return path


def distribution(folder, name, entry_points, **files):
    """Installs a distribution's metadata in a folder of sys.path."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    for file, text in files.items():
        (info / file).write_text(text)


# --- start-up ---------------------------------------------------------------------------------


def test_help_and_list_import_no_torch():
    program = """
import sys
from typer.testing import CliRunner
from pyseg.cli import app
commands = [command.name or command.callback.__name__ for command in app.registered_commands]
assert len(commands) >= 12
several = [["--help"], ["--version"], *([name, "-h"] for name in commands), ["list", "--json"]]
for arguments in several:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (arguments, result.output)
loaded = {"torch", "torchvision", "numpy", "sam2"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_python_m_pyseg():
    done = subprocess.run(
        [sys.executable, "-m", "pyseg", "predict"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "Usage: pyseg predict" in done.stderr


# --- list, doctor -----------------------------------------------------------------------------


def test_list():
    rows = json.loads(run("list", "--json").stdout)
    found = {(row["kind"], row["name"]): row for row in rows}
    assert found["model", "threshold"]["distribution"] == "register()"
    assert ("refiner", "invert") in found and ("dataset", "halves") in found
    text = run("list").stdout
    assert "threshold" in text and "register()" in text
    rows = json.loads(run("list", "*resnet*", "crf", "--json").stdout)
    names = {row["name"] for row in rows}
    assert {"crf", "fcn_resnet50"} < names and "streetnet" not in names
    assert "nothing is called streetnt" in error_line(run("list", "streetnt"))


def test_describe():
    text = run("describe", "crf").stdout
    assert text.startswith("refiner crf, pyseg-toolkit") and "mean-field" in text
    (line,) = [line.split() for line in text.splitlines() if line.startswith(" iterations ")]
    assert line == ["iterations", "int", "5"]
    (entry,) = json.loads(run("describe", "threshold", "--json").stdout)
    assert [option["name"] for option in entry["options"]] == ["num_classes", "weights"]
    assert "did you mean streetnet" in error_line(run("describe", "streetnt"))


def test_version():
    assert run("--version").stdout == f"pyseg {pyseg.__version__}\n"


def test_broken_plugins_break_nobody_else(tmp_path, monkeypatch):
    entries = "[pyseg.models]\nbroken_net = no_such_module:net\n"
    distribution(tmp_path, "some-plugin", entries)
    distribution(tmp_path, "first-plugin", "[pyseg.refiners]\ntwice = a:b\n")
    distribution(tmp_path, "second-plugin", "[pyseg.refiners]\ntwice = c:d\n")
    monkeypatch.syspath_prepend(tmp_path)
    listed = run("list").stdout
    assert "broken_net" in listed and "threshold" in listed
    assert "first-plugin:twice" in listed and "second-plugin:twice" in listed
    result = run("doctor", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    entry = next(e for e in report["entry_points"] if e["name"] == "broken_net")
    assert entry["distribution"] == "some-plugin" and "no_such_module" in entry["problem"]
    assert any("first-plugin" in p and "second-plugin" in p for p in report["problems"])
    text = run("doctor").stdout
    assert "broken" in text and "problem: model 'broken_net'" in text
    photo = picture(tmp_path / "a.png")
    assert run("predict", photo, "--spec", "threshold", "-o", tmp_path / "out").exit_code == 0
    refused = run("predict", photo, "--spec", "broken_net", "-o", tmp_path / "out")
    assert "no_such_module" in error_line(refused)


PLUGIN_COMMAND = """
import typer
from pyseg.errors import PysegError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

@app.callback()
def every():
    "Counts what there is."

@app.command()
def sheep(number: int = 3):
    "Counts sheep."
    if number < 0:
        raise PysegError(f"number must be 0 or more, got {number}")
    typer.echo(f"{number} sheep")
"""


def test_plugins_add_commands_and_break_no_others(tmp_path, monkeypatch):
    """`pytest --pyseg-conformance` runs `check_command` for them, see docs/plugins.md."""
    (tmp_path / "counting.py").write_text(PLUGIN_COMMAND)
    (tmp_path / "counting_wrong.py").write_text("app = print\n")
    entries = "[pyseg.commands]\ncount-all = counting:app\nlist = counting:app\n"
    distribution(tmp_path, "counting", entries)
    distribution(tmp_path, "absent", "[pyseg.commands]\ngone = no_such_module:app\n")
    distribution(tmp_path, "wrong", "[pyseg.commands]\nwrong = counting_wrong:app\n")
    monkeypatch.syspath_prepend(tmp_path)
    shown = run("--help").stdout
    assert "Counts what there is." in shown and shown.count("(cannot be loaded)") == 2
    assert run("count-all", "sheep", "--number", 4).stdout == "4 sheep\n"
    assert "number must be 0 or more" in error_line(run("count-all", "sheep", "--number", -1))
    assert "no_such_module" in error_line(run("gone", "--any", "thing"))
    assert "must be a typer.Typer, got builtin" in error_line(run("wrong"))
    assert run("no-such-command").exit_code == 2
    assert "streetnet" in run("list").stdout  # pyseg's own go first
    report = {entry["name"]: entry for entry in _entries(commands)}
    assert report["count-all"]["problem"] is None
    assert "no_such_module" in report["gone"]["problem"]
    testing.check_command("count-all")
    with pytest.raises(AssertionError, match="pyseg has a command 'list' itself"):
        testing.check_command("list")
    with pytest.raises(AssertionError, match="no_such_module"):
        testing.check_command("gone")


def test_doctor_reports_libraries_and_ops():
    report = diagnose()
    assert report["packages"]["torch"] == torch.__version__.split("+")[0] or (
        report["packages"]["torch"] == torch.__version__
    )
    native = report["native"]
    assert Path(native["cpu"]).is_file() and native["simd"]
    assert native["ops"]["confusion_matrix"]["cpu"] is True
    assert native["ops"]["confusion_matrix"]["cuda_usable"] in (True, False)
    assert report["cuda"]["available"] == torch.cuda.is_available()
    text = run("doctor").stdout
    assert "confusion_matrix" in text and native["cpu"] in text


def test_doctor_survives_a_missing_library(monkeypatch):
    def missing():
        raise ImportError("pyseg's compiled library cannot be loaded: gone")

    monkeypatch.setattr(_native, "status", missing)
    result = run("doctor")
    assert result.exit_code == 1 and "problem: pyseg's compiled library" in result.stdout


def test_stale_installs_are_found(tmp_path, monkeypatch):
    checkout, site = tmp_path / "my plugin", tmp_path / "site"
    checkout.mkdir()
    (checkout / "pyproject.toml").write_text(
        '[project]\nname = "my-plugin"\nversion = "1.0"\n'
        '[project.entry-points."pyseg.models"]\nold = "m:old"\nadded = "m:added"\n'
        '[project.entry-points."pyseg.refiners"]\nmoved = "m:there"\n'
        '[project.entry-points."console"]\nother = "m:other"\n'
    )
    origin = {"url": checkout.as_uri(), "dir_info": {"editable": True}}
    entries = "[pyseg.models]\nold = m:old\n[pyseg.refiners]\nmoved = m:here\n"
    distribution(site, "my-plugin", entries, **{"direct_url.json": json.dumps(origin)})
    monkeypatch.syspath_prepend(site)
    (problem,) = [p for p in stale_installs() if "my-plugin" in p]
    assert "pyseg.models: added, pyseg.refiners: moved" in problem
    assert "old" not in problem and "other" not in problem and str(checkout) in problem
    (checkout / "pyproject.toml").write_text("[project\n")
    assert any("does not parse" in p for p in stale_installs())


# --- predict ----------------------------------------------------------------------------------


def test_predict(tmp_path):
    photo = picture(tmp_path / "in" / "a.png")
    out = tmp_path / "out"
    result = run(
        "predict", tmp_path / "in", "--spec", "threshold+invert", "--output", out, "--overlay"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("1 written") and result.stderr == ""
    assert (read_labels(out / "a.png") == 0).all() and (out / "overlays" / "a.png").is_file()
    again = json.loads(
        run("predict", photo, "--spec", "threshold+invert", "-o", out, "--json").stdout
    )
    assert again["skipped"] == [str(out / "a.png")] and again["written"] == []


def test_predict_with_bad_files_goes_on_and_exits_with_1(tmp_path):
    photo, bad = picture(tmp_path / "a.png"), tmp_path / "b.png"
    bad.write_text("<html>")
    result = run("predict", bad, photo, tmp_path / "c.png", "-s", "threshold", "-o", tmp_path / "o")
    assert result.exit_code == 1
    assert "1 written" in result.stdout and "2 failed" in result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and "b.png" in lines[0] and "HTML" in lines[0] and "c.png" in lines[1]
    as_json = run("predict", bad, "-s", "threshold", "-o", tmp_path / "o", "--json")
    assert as_json.exit_code == 1 and str(bad) in json.loads(as_json.stdout)["failed"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--spec", "treshold"], "'threshold'"),
        (["--spec", "threshold+invert(x=1)"], "invert"),
        (["--spec", "threshold +"], "parse"),
        (["--spec", "threshold", "--device", "cuda:99"], "cuda:99"),
        (["--spec", "no/such/folder"], "no/such/folder"),
    ],
)
def test_misuse_is_one_line_and_exits_with_2(tmp_path, options, words):
    out = tmp_path / "out"
    line = error_line(run("predict", picture(tmp_path / "a.png"), *options, "-o", out))
    assert words in line
    assert not out.exists()


def test_bugs_keep_their_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(Threshold, "predict", lambda self, images: 1 / 0)
    result = run("predict", picture(tmp_path / "a.png"), "-s", "threshold", "-o", tmp_path / "o")
    assert "Traceback" in result.stderr and "1 / 0" in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: stage 'threshold' failed on image") and "a.png" in last
    assert "ZeroDivisionError: division by zero (test_cli.py, line" in last
    monkeypatch.setattr(Threshold, "predict", lambda self, images: __import__("no_such_module"))
    result = run("predict", picture(tmp_path / "a.png"), "-s", "threshold", "-o", tmp_path / "o")
    assert isinstance(result.exception, ModuleNotFoundError)


def test_an_output_folder_without_permission_is_one_line(tmp_path, monkeypatch):
    def denied(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    result = run("predict", ASSETS / "street.jpg", "-s", "threshold", "-o", tmp_path / "o")
    assert "Permission denied" in error_line(result) and str(tmp_path / "o") in result.stderr


def test_errors_are_red_unless_colours_are_not_wanted(tmp_path, monkeypatch):
    def shown(*arguments):
        return CliRunner().invoke(cli.app, [str(a) for a in arguments], color=True).stderr

    bad = tmp_path / "b.png"
    bad.write_text("<html>")
    for arguments in (["predict", bad, "-s", "treshold"], ["predict", bad, "-s", "threshold"]):
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert shown(*arguments, "-o", tmp_path / "o").startswith("\x1b[31m")
        monkeypatch.setenv("NO_COLOR", "1")
        assert "\x1b" not in shown(*arguments, "-o", tmp_path / "o")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("holds results; give overwrite=True to replace them", "give --overwrite to replace them"),
        (
            "pass weights=<path>, or weights=None for random",
            "pass --weights <path>, or --weights none for",
        ),
        ("build it with num_classes=11", "build it with --num-classes 11"),
        ("weights='x' is a directory", "--weights 'x' is a directory"),
        ("start with overwrite=False", "start without --overwrite"),
        ("num_classes must be 3, in my_num_classes", "--num-classes must be 3, in my_num_classes"),
        ("output_dir 'o' is a file", "--output 'o' is a file"),
        ("no option 'x'. Its options: weights=None.", "no option 'x'. Its options: weights=None."),
        ("the weights are lost", "the weights are lost"),
    ],
)
def test_errors_speak_of_options(monkeypatch, message, words):
    def fails(*arguments, **options):
        raise pyseg.PysegError(message)

    monkeypatch.setattr(cli, "_pipeline", fails)
    assert words in error_line(run("predict", "a.png", "-s", "threshold", "-o", "out"))


def test_values_that_we_refuse_are_one_line_and_other_value_errors_bugs(tmp_path, monkeypatch):
    common = ["train", "tiny", "--dataset", "halves", "--root", tmp_path, "-o", tmp_path / "r"]
    line = error_line(run(*common, "--epochs", 1, "--warmup", 2))
    assert "warmup is a share and must be in 0..1, got 2.0" in line
    line = error_line(run(*common, "--epochs", 1, "--scale", "2-1"))  # raised over several lines
    assert "smallest <= largest" in line
    monkeypatch.setattr(cli, "_pipeline", lambda *arguments: int("a bug"))
    result = run(*common, "--epochs", 1)
    assert isinstance(result.exception, ValueError)


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    common = ["train", "tiny", "--dataset", "halves", "--root", tmp_path, "-o", tmp_path / "r"]
    line = error_line(run(*common, "--epochs", 1))
    assert "accelerate" in line and "pip install" in line


def test_ctrl_c_in_predict_says_how_far_it_came(tmp_path, monkeypatch):
    photos = [picture(tmp_path / "in" / f"{name}.png") for name in "abc"]
    predict = Threshold.predict

    def interrupted(self, images):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return predict(self, images)

    done = []
    monkeypatch.setattr(Threshold, "predict", interrupted)
    common = "predict", *photos, "-s", "threshold", "-o", tmp_path / "out"
    result = run(*common)
    assert result.exit_code == 130
    assert "stopped: 1 of 3 images are done; the same command goes on with the others" in (
        result.stderr
    )
    again = run(*common, "--overwrite")
    assert "0 of 3 images are done; without --overwrite, the same command goes on" in again.stderr
    monkeypatch.setattr(Threshold, "predict", predict)
    assert run(*common).stdout.startswith("2 written")


def test_weights_none_means_random(tmp_path):
    built = cli._pipeline("threshold", "none", None, None)
    assert built.stages[0].component.weights is None
    assert cli._pipeline("threshold", "a.pt", None, None).stages[0].component.weights == "a.pt"
    assert cli._pipeline("threshold", None, None, None).stages[0].component.weights == "default"


# --- evaluate ---------------------------------------------------------------------------------


def test_evaluate(tmp_path):
    command = [
        "evaluate",
        "--dataset",
        "halves",
        "--root",
        tmp_path,
        "--split",
        "val",
        "--spec",
        "threshold+invert",
    ]
    rows = json.loads(run(*command, "--json").stdout)
    assert [row["stage"] for row in rows] == ["baseline", "+invert"]
    assert rows[0]["metrics"]["semantic"]["pixel_accuracy"] == pytest.approx(60 / 64)
    assert rows[1]["metrics"]["semantic"]["pixel_accuracy"] == pytest.approx(4 / 64)
    assert rows[0]["images"] == 4 and rows[0]["milliseconds"] > 0
    limited = json.loads(run(*command, "--json", "--limit", 2).stdout)
    assert limited[0]["images"] == 2
    text = run(*command).stdout
    assert "mIoU" in text and "0.9375" in text and "-0.8750" in text
    assert "threshold+invert: 4 images" in text


def test_evaluate_misuse(tmp_path):
    common = ["evaluate", "--spec", "threshold", "--root", tmp_path]
    assert "halves" in error_line(run(*common, "--dataset", "halfs"))
    gone = ["evaluate", "--spec", "threshold", "--dataset", "halves", "--root", tmp_path / "gone"]
    assert "there is no folder" in error_line(run(*gone))
    assert "colour" in error_line(run(*common, "--dataset", "halves(colour=1)"))
    assert "semantc" in error_line(run(*common, "--dataset", "halves", "--metric", "semantc"))
    assert "classes" in error_line(run(*common, "--dataset", "halves", "--num-classes", 1))
    assert run("evaluate", "--spec", "threshold").exit_code == 2


# --- train ------------------------------------------------------------------------------------


def test_train_offers_every_option_of_the_functions():
    ours = set(inspect.signature(cli.train).parameters)
    not_options = {"output_dir", "validation", "progress"}
    for function in (training.train, training.train_instances):
        assert set(inspect.signature(function).parameters) - not_options <= ours


def test_help_shows_the_defaults_of_the_functions():
    shown = " ".join(run("train", "--help").stdout.split())
    one = inspect.signature(training.train).parameters
    other = inspect.signature(training.train_instances).parameters
    for name in ("batch_size", "learning_rate", "weight_decay", "photometric", "warmup"):
        text = f"[default: {one[name].default}; {other[name].default} with instances]"
        option = shown[shown.index(f"--{name.replace('_', '-')} ") :]
        assert option[option.index("[") :].startswith(text), name
    height, width = one["crop_size"].default
    assert f"crops, pixels. [default: {height}x{width}]" in shown
    assert (
        "--copy-paste <float> Share of images that get instances of another. [default: "
        f"{other['copy_paste'].default} with" in shown
    )
    for command, text in (
        ("evaluate", "may be repeated. [default: semantic]"),
        ("cost", "the median counts. [default: 5]"),
        ("tune", "Parameters to try. [default: 40]"),
        ("train-refiner", "Passes over the images. [default: 4; 20 of segfix]"),
    ):
        assert text in " ".join(run(command, "-h").stdout.split())


def noted(function, result):
    """Stands in for a training function: keeps what it is called with."""

    def fake(model, dataset, **options):
        fake.seen = {**options, "model": model, "dataset": dataset}
        if isinstance(model, SemanticModel):
            model.network.weight.data.fill_(0.25)
        return [result]

    fake.__signature__ = inspect.signature(function)
    return fake


def test_train_passes_on_what_is_given_and_leaves_a_pipeline(tmp_path, monkeypatch):
    fake = noted(training.train, {"epoch": 3, "loss": 0.5, "miou": 0.75})
    monkeypatch.setattr(training, "train", fake)
    out = tmp_path / "run"
    common = ["train", "tiny", "--dataset", "halves", "--root", tmp_path, "-o", out]
    common += ["--epochs", 3]
    assert run(*common).exit_code == 0
    expected = {"output_dir": out, "epochs": 3, "validation": None}
    assert expected == {k: v for k, v in fake.seen.items() if k not in ("model", "dataset")}
    options = "--crop-size 4x6 --scale 0.5-2 --validation-split val --seed 5 --precision fp32"
    result = run(*common, *options.split(), "--resume", "--no-cache")
    assert result.exit_code == 0, result.output
    assert "3 epochs, loss 0.5000, miou 0.7500" in result.stdout
    seen = fake.seen
    assert seen["crop_size"] == (4, 6) and seen["scale"] == (0.5, 2.0) and seen["seed"] == 5
    assert seen["precision"] == "fp32" and seen["resume"] is True and seen["cache"] is False
    assert seen["dataset"].split == "train" and seen["validation"].split == "val"
    assert seen["model"].classes == ("dark", "light")
    loaded = cli._pipeline(str(out / "pipeline"), None, None, None)
    assert loaded.classes == ("dark", "light")
    assert (loaded.model.network.weight == 0.25).all()
    line = error_line(
        run("predict", "a.png", "--spec", out / "pipeline", "--weights", "x", "-o", tmp_path / "o")
    )
    assert "saved pipeline" in line
    for options, words in (
        (("--crop-size", "64,96"), "--crop-size must be height x width, such as 240x320, got"),
        (("--scale", "2"), "--scale must be smallest-largest, such as 0.6-1.6, got '2'"),
        (("--copy-paste", "0.5"), "--copy-paste has no meaning for tiny: leave it out"),
    ):
        assert words in error_line(run(*common, *options))


def test_train_instances_from_the_command_line(tmp_path, monkeypatch):
    fake = noted(training.train_instances, {"epoch": 2, "loss": 0.5, "pq": 0.25})
    monkeypatch.setattr(training, "train_instances", fake)
    model = "upsnet_resnet50(num_stuff=5,backbone='resnet18',channels=8)"
    common = ["train", model, "--dataset", "synthetic(length=3,size=(64,96))"]
    common += ["-o", tmp_path / "r", "--epochs", 2]
    result = run(*common, "--validation-split", "val", "--batch-size", 1)
    assert result.exit_code == 0, result.output
    assert "2 epochs, loss 0.5000, pq 0.2500" in result.stdout
    seen = fake.seen
    given = seen.keys() - {"model", "dataset", "output_dir", "epochs", "validation"}
    assert given == {"batch_size"} and seen["batch_size"] == 1
    assert seen["model"].things == ("car", "person", "bicycle")
    one, other = seen["dataset"][0].image, seen["validation"][0].image
    assert len(seen["validation"]) == 3 and not torch.equal(one, other)
    line = error_line(run(*common, "--crop-size", "4x6"))
    assert "--crop-size has no meaning for upsnet_resnet50" in line


def test_train_settings_out_of_range_are_one_line(tmp_path):
    common = ["train", "tiny", "--dataset", "halves", "--root", tmp_path, "-o", tmp_path / "r"]
    assert "epochs" in error_line(run(*common, "--epochs", 0))
    line = error_line(run(*common, "--epochs", 1, "--precision", "fp8"))
    assert "fp8" in line
    assert "one model" in error_line(run("train", "tiny+invert", *common[2:], "--epochs", 1))


def test_ctrl_c_in_train_says_what_is_there_and_resume_goes_on(tmp_path, monkeypatch):
    """And a run that goes on may be of another length."""
    save, saved = training.loop._save, []

    def interrupted(*arguments):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(save(*arguments))

    common = ["train", "tiny", "--dataset", "halves", "--root", tmp_path, "-o", tmp_path / "run"]
    common += ["--crop-size", "8x8", "--batch-size", 2]
    with monkeypatch.context() as patch:
        patch.setattr(training.loop, "_save", interrupted)
        result = run(*common, "--epochs", 9)
        assert result.exit_code == 130 and result.stderr.count("\n") == 2
        text = f"stopped: {tmp_path / 'run'} holds 2 of 9 epochs; the same command with --resume"
        assert text in result.stderr
        early = run(*common[:-5], tmp_path / "other", *common[-4:], "--epochs", 9)
        assert "stopped: before the first checkpoint; nothing was saved" in early.stderr
    line = error_line(run(*common, "--epochs", 3))
    assert "pass --resume to go on with it, or another --output" in line
    result = run(*common, "--epochs", 3, "--resume")
    assert result.exit_code == 0 and "3 epochs, loss" in result.stdout
    line = error_line(run(*common[:-5], tmp_path / "none", *common[-4:], "--epochs", 3, "--resume"))
    assert "--resume, but there is no" in line and line.endswith("start without --resume\n")


def test_training_on_files_ends_in_a_pipeline_that_is_scored(tmp_path):
    """Data in COCO's format and a panoptic model."""
    scenes = StreetScenes(length=2, size=(64, 64), objects=(2, 4))
    data = tmp_path / "data"
    for name in ("train", "annotations"):
        (data / name).mkdir(parents=True)
    samples = [scenes[k] for k in range(2)]
    for sample in samples:
        write_image(data / "train" / f"{sample.name}.png", sample.image)
    write_panoptic(
        data / "annotations" / "panoptic_train.json",
        [(s.name, s.segments) for s in samples],
        scenes.classes,
        things=range(5, 8),
    )
    model = (
        "upsnet_resnet50(num_stuff=5, backbone='resnet18', channels=8, min_size=64, "
        "max_size=64, stuff_area=1)"
    )
    common = "--dataset", "coco_panoptic", "--root", data, "--split", "train"
    trained = run("train", model, *common, "--epochs", 1, "--flip", 0, "-o", tmp_path / "run")
    assert trained.exit_code == 0, trained.output
    spec = "--spec", tmp_path / "run" / "pipeline"
    (row,) = json.loads(run("evaluate", *spec, *common, "--metric", "panoptic", "--json").stdout)
    assert 0 <= row["metrics"]["panoptic"]["pq"] <= 1 and row["images"] == 2


# --- demo, bench ------------------------------------------------------------------------------


def test_the_street_image_and_its_labels():
    image, labels = read_image(ASSETS / "street.jpg"), read_labels(ASSETS / "street_labels.png")
    assert image.shape == (3, 360, 480) and labels.shape == (360, 480)
    assert labels.unique().tolist() == [*range(11), 255]
    colours = Image.open(ASSETS / "street_labels.png").getpalette()[: 3 * 11]
    assert colours == list(sum(PALETTE, ()))
    assert "CC BY-NC 4.0" in (ASSETS / "LICENSE-CamVid.md").read_text()


def test_demo(tmp_path):
    out = tmp_path / "demo"
    result = run("demo", "--spec", "nearly+complete", "--output", out)
    assert result.exit_code == 0, result.output
    names = [
        "baseline.png",
        "comparison.png",
        "complete.png",
        "errors.png",
        "overlay.png",
        "scores.json",
        "table.txt",
    ]
    assert sorted(file.name for file in out.iterdir()) == names
    assert all(str(out / name) in result.stdout for name in names)
    assert (out / "table.txt").read_text().splitlines()[2].startswith("+complete  1.0000")
    truth = read_labels(ASSETS / "street_labels.png")
    assert torch.equal(read_labels(out / "complete.png"), truth)
    assert (read_labels(out / "baseline.png")[:, :240] == 255).all()
    rows = json.loads((out / "scores.json").read_text())
    valid = truth != 255
    want = float(valid[:, 240:].sum() / valid.sum())
    assert rows[0]["metrics"]["semantic"]["pixel_accuracy"] == pytest.approx(want)
    assert rows[1]["metrics"]["semantic"]["miou"] == 1
    assert f"{want:.4f}" in result.stdout and "1.0000" in result.stdout
    as_json = json.loads(run("demo", "-s", "nearly+complete", "-o", out, "--json").stdout)
    assert as_json["stages"][0]["stage"] == "baseline" and len(as_json["files"]) == 7


def test_demo_misuse(tmp_path):
    assert "classes" in error_line(run("demo", "--spec", "threshold", "-o", tmp_path / "d"))
    file = write_labels(tmp_path / "a.png", torch.zeros(2, 2, dtype=torch.uint8))
    assert "is a file" in error_line(run("demo", "--spec", "nearly", "-o", file))


def test_bench(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    (root / "benchmarks").mkdir(parents=True)
    (root / "conftest.py").write_text("")
    monkeypatch.setattr(cli, "__file__", str(root / "pyseg" / "cli.py"))
    calls = []

    def fake(command, cwd, check):
        calls.append((command, cwd))
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.setattr(cli.subprocess, "run", fake)
    assert run("bench", "-k", "crf").exit_code == 5
    ((command, folder),) = calls
    assert command[1:] == ["-m", "pytest", "--benchmark", "-k", "crf"] and folder == root
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site" / "pyseg" / "cli.py"))
    assert "clone the repository" in error_line(run("bench"))
