"""Options of `pyseg train` in files."""

import inspect
import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import pyseg
from pyseg import cli, models, training
from pyseg.classes import CAMVID_CLASSES
from pyseg.datasets.labelmefacade import PALETTE
from pyseg.errors import PysegError
from pyseg.training import recipes

KINDS = cli._RECIPE


LABELMEFACADE = (*PALETTE, (0, 0, 0))


def run(*arguments):
    return CliRunner().invoke(cli.app, ["train", *map(str, arguments)])


def written(folder, text):
    path = folder / "own.yaml"
    path.write_text(text)
    return path


def test_a_recipe_has_the_options_of_the_command_line():
    ours = set(inspect.signature(cli.train).parameters) - {"config", "as_json"}
    assert set(KINDS) == ours


def test_what_comes_with_pyseg_is_what_train_takes():
    assert recipes.names() == (
        "fcn_resnet50_cityscapes",
        "fcn_resnet50_cityscapes_full",
        "streetnet",
        "streetnet_all",
        "streetnet_finish",
    )
    accepted = set(inspect.signature(training.train).parameters)
    for name in recipes.names():
        found = recipes.read_recipe(name, KINDS)
        rest = set(found) - accepted - {"model", "weights", "split", "validation_split"}
        assert not rest and found["model"] in ("streetnet", "fcn_resnet50")
        training.Loss.parse(found["loss"])
    report = recipes.read_recipe("fcn_resnet50_cityscapes", KINDS)
    assert report["batch_size"] == 2 and report["epochs"] == 2 and report["optimizer"] == "adam"
    assert cli._size(report["crop_size"], "") == (512, 1024)
    assert cli._range(report["scale"], "") == (0.5, 0.5)
    model = models.create("fcn_resnet50", num_classes=19, weights=None)
    factors = training.optimizer.rates_of(model, report["rates"])
    trained = {name for name, factor in factors.items() if factor}
    heads = ("classifier.4", "aux_classifier.4")
    assert trained == {
        f"network.model.{head}.{kind}" for head in heads for kind in ("weight", "bias")
    }
    full = recipes.read_recipe("fcn_resnet50_cityscapes_full", KINDS)
    factors = training.optimizer.rates_of(model, full["rates"])
    assert set(factors.values()) == {0.1, 1.0}


def test_the_recipe_of_streetnet_trains(tmp_path):
    """All its parts, and its first on two data sets, in the folders that one root holds."""
    root, generator = tmp_path / "data", np.random.default_rng(0)
    camvid, facades = root / "camvid", root / "labelmefacade"
    for folder, stems, names in (
        (camvid / "train", "abc", range(12)),
        (camvid / "val", "de", range(12)),
        (facades, "fghi", LABELMEFACADE),
    ):
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True)
        for stem in stems:
            picture = generator.integers(0, 256, (48, 64, 3), np.uint8)
            Image.fromarray(picture).save(folder / "images" / f"{stem}.jpg")
            ids = generator.integers(0, len(names), (48, 64))
            Image.fromarray(np.array(names, np.uint8)[ids]).save(folder / "labels" / f"{stem}.png")
    (facades / "train.txt").write_text("f\n")
    (facades / "test.txt").write_text("g\nh\ni\n")
    short = ("--epochs", 1, "--steps", 2, "--batch-size", 3, "--crop-size", "32x48")
    output = tmp_path / "run"
    result = run(
        *("--config", "streetnet", "--root", root, "--output", output, "--weights", "none"), *short
    )
    assert result.exit_code == 0, result.output
    model = pyseg.load(output / "pipeline").model
    assert model.classes == CAMVID_CLASSES
    for part in ("streetnet_all", "streetnet_finish"):
        weights = ("--weights", output / "model.safetensors")
        output = tmp_path / part
        again = run("--config", part, "--root", root, "--output", output, *weights, *short)
        assert again.exit_code == 0, again.output
    other = run(
        *("--config", "streetnet", "--root", root, "--output", tmp_path / "c", "--weights", "none"),
        *("--dataset", "camvid(without='a,b*')", "--dataset", "labelmefacade(split='train')"),
        *("--aliases", "building=Building,window=Building,door=Building,road=Road,sky=Sky"),
        *("--repeats", "8,1", *short),
    )
    assert other.exit_code == 0, other.output
    assert set(CAMVID_CLASSES) < set(pyseg.load(tmp_path / "c" / "pipeline").model.classes)
    kept = json.loads(torch.load(tmp_path / "c" / "checkpoint.pt")["settings"])
    assert kept["repeats"] == [8, 1]
    for repeats, message in (
        ("6,1", "repeats must be a positive integer for each of 1 data sets"),
        ("6;1", "--repeats must be integers such as 6,1"),
    ):
        wrong = run(
            *("--config", "streetnet", "--root", root, "-o", tmp_path / "d", "--weights", "none"),
            *("--repeats", repeats),
        )
        assert wrong.exit_code == 2 and message in wrong.output


def test_values_of_a_recipe(tmp_path):
    text = "learning-rate: 1e-4\nepochs: 3\nclip: 1\nclass_weights: 0.5\ncrop_size: [8, 16]\n"
    text += "cache: false\nrates: {backbone: 0.1}\ndataset: [a, b]\nweights: none\n"
    assert recipes.read_recipe(written(tmp_path, text), KINDS) == {
        "learning_rate": 1e-4,
        "epochs": 3,
        "clip": 1.0,
        "class_weights": "0.5",
        "crop_size": [8, 16],
        "cache": False,
        "rates": {"backbone": 0.1},
        "dataset": ["a", "b"],
        "weights": "none",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "no option 'lerning_rate'; the nearest is learning_rate"),
        ("_base_: other.yaml", "there is no option '_base_'"),
        ("epochs: many", "epochs must be an integer, got 'many'"),
        ("epochs: 1.5", "epochs must be an integer, got 1.5"),
        ("epochs: true", "epochs must be an integer, got True"),
        ("epochs:", "epochs must be an integer, got nothing"),
        ("cache: 1", "cache must be true or false, got 1"),
        ("loss: [ce]", "loss must be a text"),
        ("epochs: 1\nepochs: 2", "gives epochs twice"),
        ("batch_size: 1\nbatch-size: 2", "gives batch_size twice"),
        ("- epochs", "must be options, a line 'name: value' each"),
        ("", "must be options"),
        ("epochs: [", "cannot be read as YAML"),
        ("!!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        ("a: &a [*a]", "cannot be read as YAML|no option"),
    ],
)
def test_recipes_that_are_wrong(tmp_path, text, message):
    with pytest.raises(PysegError, match=message):
        recipes.read_recipe(written(tmp_path, text), KINDS)


def test_recipes_that_are_not_there(tmp_path):
    with pytest.raises(PysegError, match=r"'fcn_resnet50_cityscape'; did you mean fcn_resnet50_c"):
        recipes.read_recipe("fcn_resnet50_cityscape", KINDS)
    with pytest.raises(PysegError, match="does not exist"):
        recipes.read_recipe(tmp_path / "none.yaml", KINDS)


def test_from_the_command_line(tmp_path, monkeypatch):
    """What is given there counts more; what is nowhere is asked for."""
    data = '"synthetic(length=2, size=(48, 64))"'
    recipe = written(
        tmp_path,
        f"model: fcn_resnet18\ndataset: {data}\nepochs: 5\nbatch_size: 2\ncrop_size: 32x48\n"
        "rates: {rest: 0, head: 1}\nloss: ce+dice\nprecision: fp32\noptimizer: sgd\n",
    )
    out = tmp_path / "run"
    done = run("--config", recipe, "--epochs", 1, "-o", out, "--json")
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)) == 1
    settings = json.loads(torch.load(out / "checkpoint.pt")["settings"])
    assert settings["loss"] == "ce+dice" and settings["crop_size"] == [32, 48]
    assert settings["rates"] == {"rest": 0.0, "head": 1.0} and settings["optimizer"] == "sgd"
    missing = run("--config", recipe)
    assert missing.exit_code == 2 and "--output is missing: give it, or" in missing.output
    assert "MODEL is missing" in run("-o", out).output
    wrong = run("--config", recipe, "-o", tmp_path / "b", "--loss", "ce+dize")
    assert wrong.exit_code == 2 and "did you mean dice" in wrong.output
    assert not (tmp_path / "b").exists()


def test_several_data_sets_from_the_command_line(tmp_path):
    sets = [f"synthetic(length=2, size=(48, 64), seed={seed})" for seed in (0, 1)]
    options = ["--epochs", 1, "--crop-size", "32x48", "--batch-size", 2, "-o", tmp_path / "run"]
    done = run("fcn_resnet18", "--dataset", sets[0], "--dataset", sets[1], *options)
    assert done.exit_code == 0, done.output
    settings = json.loads(torch.load(tmp_path / "run" / "checkpoint.pt")["settings"])
    assert settings["samples"] == 4 and settings["steps"] == 2
    other = run("upsnet(num_stuff=5)", "--dataset", sets[0], "--dataset", sets[1], *options)
    assert other.exit_code == 2 and "is trained on one data set, got 2" in other.output
