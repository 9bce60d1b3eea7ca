"""FCN-32s, FCN-16s and FCN-8s, each from the one before."""

import pytest
import torch

import pyseg
from pyseg import models, training
from pyseg.errors import PysegError
from pyseg.models import fcn
from pyseg.training import staged, train_staged
from pyseg.types import Sample
from pyseg.weights import load_state


class Halves:
    classes, palette = ("left", "right"), ((0, 0, 0), (255, 255, 255))

    def __len__(self):
        return 2

    def __getitem__(self, index):
        labels = torch.zeros(32, 48, dtype=torch.uint8)
        labels[:, 20 + index :] = 1
        return Sample(f"{index}", (labels * 200).expand(3, -1, -1).clone(), labels)


SETTINGS = {
    "crop_size": (32, 32),
    "batch_size": 2,
    "learning_rate": 1e-3,
    "precision": "fp32",
    "progress": False,
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The real factories on a VGG-16 of a few channels."""
    network = fcn.FCNVGG

    def tiny(*given, **options):
        return network(*given, widths=(4, 4, 6, 6, 8), hidden=8, **options)

    monkeypatch.setattr(fcn, "FCNVGG", tiny)


def make(name="fcn8s(style='modern')"):
    torch.manual_seed(0)
    return models.create(name, num_classes=2, weights=None)


def test_each_stage_starts_from_the_one_before(tmp_path, monkeypatch):
    seen = []
    real = staged.train

    def noting(model, dataset, **options):
        seen.append(
            (options["output_dir"].name, {k: v.clone() for k, v in model.state_dict().items()})
        )
        return real(model, dataset, **options)

    monkeypatch.setattr(staged, "train", noting)
    model = make()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    log = train_staged(model, Halves(), output_dir=tmp_path / "run", epochs=2, **SETTINGS)
    assert [name for name, _ in seen] == ["fcn32s", "fcn16s", "run"] and len(log) == 2
    files = [tmp_path / "run" / name / "model.safetensors" for name in ("fcn32s", "fcn16s")]
    for before, (_, state) in zip([start, *map(load_state, files)], seen, strict=True):
        for key, value in state.items():
            if key in before:
                assert torch.equal(value, before[key]), key
            else:
                assert "score_pool" in key and not value.any()
    assert not torch.equal(
        load_state(files[0])["network.score.weight"], start["network.score.weight"]
    )
    last = load_state(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(v, last[k]) for k, v in model.state_dict().items())


def test_a_run_that_was_stopped_goes_on_and_ends_as_one_that_was_not(tmp_path, monkeypatch):
    whole = make()
    train_staged(whole, Halves(), output_dir=tmp_path / "whole", epochs=2, **SETTINGS)
    real, calls = staged.train, []

    def stopping(model, dataset, **options):
        calls.append(options["output_dir"].name)
        if calls == ["fcn32s", "fcn16s"]:
            raise KeyboardInterrupt
        return real(model, dataset, **options)

    monkeypatch.setattr(staged, "train", stopping)
    options = {"output_dir": tmp_path / "part", "epochs": 2, **SETTINGS}
    with pytest.raises(PysegError, match="resume=True, but there is no"):
        train_staged(make(), Halves(), resume=True, **options)
    with pytest.raises(KeyboardInterrupt):
        train_staged(make(), Halves(), **options)
    with pytest.raises(PysegError, match="holds the checkpoint of an earlier run"):
        train_staged(make(), Halves(), **options)
    calls.clear()
    calls.append("as it was")
    again = make()
    train_staged(again, Halves(), resume=True, **options)
    assert calls == ["as it was", "fcn16s", "part"]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_other_models_have_no_stages():
    for model, words in (
        (make("fcn32s"), "got the model fcn32s"),
        (pyseg.models.SemanticModel(torch.nn.Conv2d(3, 2, 1), ("a", "b")), "no name made"),
    ):
        with pytest.raises(PysegError, match=words):
            train_staged(model, Halves(), output_dir="unused", epochs=1)


def test_from_the_command_line(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from pyseg import cli

    monkeypatch.setenv("PYSEG_OFFLINE", "1")
    common = ["train", "fcn16s(style='modern')", "--dataset", "synthetic(length=2,size=(64,64))"]
    common += ["--epochs", "1", "--batch-size", "2", "--crop-size", "64x64", "--staged"]
    result = CliRunner().invoke(cli.app, [*common, "-o", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "fcn32s" / "model.safetensors").is_file()
    loaded = pyseg.load(tmp_path / "run" / "pipeline")
    assert set(dict(loaded.model.network.named_children())) == {"trunk", "score", "score_pool4"}
    other = CliRunner().invoke(
        cli.app, ["train", "streetnet", *common[2:], "-o", str(tmp_path / "s")]
    )
    assert other.exit_code == 2 and "staged training is for" in other.output
    assert training.train_staged is train_staged
