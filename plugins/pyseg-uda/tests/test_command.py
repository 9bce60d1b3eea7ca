"""``pyseg adapt``: on CamVid by day and at dusk, as small as it gets."""

import json

import pytest
from pyseg_uda.command import app, dataset
from typer.testing import CliRunner

import pyseg
from pyseg import testing
from pyseg.errors import PysegError

SMALL = ["--epochs", "1", "--steps", "2", "--batch-size", "1", "--crop-size", "64x96"]


def test_conforms():
    testing.check_command("adapt")


def test_day_to_dusk(tmp_path, data_folder):
    root, output = data_folder("camvid"), tmp_path / "run"
    dusk = tmp_path / "dusk"
    dusk.mkdir()
    for path in sorted((root / "train").rglob("0001TP_00[67]*"))[:4]:
        if path.suffix == ".jpg":
            (dusk / path.name).write_bytes(path.read_bytes())
    arguments = ["--spec", "segformer_b0", "--source", "camvid(only='0006R0_f0[01]*')"]
    arguments += ["--root", str(root), "--target", f"images:{dusk}", "-o", str(output), *SMALL]
    done = CliRunner().invoke(app, [*arguments, "--scale", "0.4-0.5"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "attention: 1 epochs, loss" in done.output
    (entry,) = json.loads((output / "log.json").read_text())
    assert entry["attention"] > 0 and entry["mixed"] >= 0
    made = pyseg.load(output / "pipeline")
    assert made.model.classes[:2] == ("Sky", "Building")
    result = made(next(dusk.iterdir()))
    assert result.labels.max() < 11
    with pytest.raises(PysegError, match=r"holds the checkpoint of an earlier run"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_networks_without_attention_train_themselves(tmp_path, data_folder):
    arguments = ["--spec", "streetnet", "--source", "camvid(only='0006R0_f00*')", "--root"]
    arguments += [
        str(data_folder("camvid")),
        "--target",
        "camvid:dusk",
        "-o",
        str(tmp_path),
        *SMALL,
    ]
    done = CliRunner().invoke(app, [*arguments, "--json", "--rates", "none", "--rare", "0.05"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    (entry,) = json.loads(done.stdout)
    assert "attention" not in entry and entry["mixed"] >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--crop-size", "64"], "--crop-size must be of the form 512x512, got '64'"),
        (["--scale", "2"], "--scale must be of the form 0.5-1.5, got '2'"),
        (["--rare", "much"], "--rare must be a number or none, got 'much'"),
        (["--spec", "streetnet+crf"], "adapt takes one semantic model, got 'streetnet\\+crf'"),
        (["--source", "synthetic:day"], "synthetic has no drives, so that synthetic:day means"),
        (["--method", "attention"], "needs a mix transformer"),
        (["--target", "images:nowhere"], "there is no folder nowhere"),
    ],
)
def test_options_that_mean_nothing(tmp_path, options, message):
    arguments = ["--spec", "streetnet", "--source", "synthetic(length=2, size=(64, 96))"]
    arguments += ["--target", "synthetic(length=2, size=(64, 96))", "-o", str(tmp_path / "run")]
    with pytest.raises(PysegError, match=message):
        CliRunner().invoke(app, [*arguments, *options], catch_exceptions=False)
    assert not (tmp_path / "run").exists()


def test_drives_of_a_data_set(data_folder):
    root = data_folder("camvid")
    names = {name.partition("_")[0] for name in dataset("camvid:day", root, "train").names}
    assert names == {"0006R0", "0016E5"}
    assert len(dataset("camvid:dusk", root, "train").names) == 62
    assert len(dataset("pyseg-toolkit:camvid", root, "val").names) == 101
