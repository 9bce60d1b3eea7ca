import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import pyseg
from pyseg import cli, models, refiners
from pyseg.cost import cost, read_sized
from pyseg.errors import PysegError
from pyseg.models.semantic import SemanticModel
from pyseg.types import Segmentation


class Tiny(nn.Module):
    """One 3 x 3 convolution from 3 to 5 channels, and the argmax of what it gives."""

    def __init__(self, *, num_classes: int | None = None, weights: str | None = "default"):
        super().__init__()
        self.classes = tuple("abcde")
        self.layer = nn.Conv2d(3, 5, 3, padding=1)

    def predict(self, images):
        with torch.inference_mode():
            return [
                Segmentation(
                    tuple(i.shape[1:]), self.classes, logits=self.layer(i.float()[None])[0]
                )
                for i in images
            ]


class Held:
    """A refiner that holds a module without being one, and counts its calls."""

    def __init__(self):
        self.table, self.calls = nn.Linear(5, 5, bias=False), 0

    def refine(self, image, prediction):
        self.calls += 1
        with torch.inference_mode():
            return prediction.with_logits(
                self.table(prediction.logits.flatten(1).T).T.reshape(prediction.logits.shape)
            )


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(models._registry._registered, "tiny", Tiny)
    monkeypatch.setitem(refiners._registry._registered, "held", Held)


def test_counts_by_hand():
    pipeline = pyseg.build("tiny+held")
    result = cost(pipeline, torch.zeros(3, 20, 30, dtype=torch.uint8), rounds=3)
    network, refiner, total = result.stages
    assert (network.stage, refiner.stage, total.stage) == ("tiny", "held", "total")
    assert network.parameters == 3 * 3 * 3 * 5 + 5 and refiner.parameters == 25
    assert network.flops == 2 * 20 * 30 * 27 * 5 and refiner.flops == 2 * 20 * 30 * 25
    assert total.parameters == 165 and total.flops == network.flops + refiner.flops
    assert network.milliseconds > 0 and refiner.milliseconds > 0
    assert total.milliseconds >= max(network.milliseconds, refiner.milliseconds)
    assert result.size == (20, 30) and result.rounds == 3 and result.device == "cpu"
    # one run each to warm up, for memory and for operations, and the timed ones
    assert pipeline.refiners[0].calls == 3 + 3


def test_a_real_network_against_its_layers(monkeypatch):
    """streetnet's convolutions one by one, from the sizes that they see."""
    pipeline = pyseg.build("streetnet", weights=None, num_classes=7)
    model = pipeline.model
    assert isinstance(model, SemanticModel)
    want = []
    conv2d = nn.functional.conv2d

    def counted(x, weight, *args):
        output = conv2d(x, weight, *args)
        want.append(2 * output.numel() * weight[0].numel())
        return output

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "conv2d", counted)
        pipeline(torch.zeros(3, 64, 96, dtype=torch.uint8))
    got = cost(pipeline, torch.zeros(3, 64, 96, dtype=torch.uint8), rounds=1).stages[0]
    assert len(want) > 50 and got.flops == sum(want)
    assert got.parameters == sum(p.numel() for p in model.parameters())


def test_sizes():
    assert read_sized(None, None).shape == (3, 360, 480)
    assert read_sized(None, "64x96").shape == (3, 64, 96)
    for size in ("64", "0x5", "64x", "axb", "-1x4", "99999x1"):
        with pytest.raises(PysegError, match="height x width"):
            read_sized(None, size)
    with pytest.raises(PysegError, match="rounds"):
        cost(pyseg.build("tiny"), read_sized(None, "8x8"), rounds=0)


def test_command():
    def run(*arguments):
        return CliRunner().invoke(
            cli.app, ["cost", "--spec", "tiny+held", "--rounds", "2", *arguments]
        )

    shown = run("--size", "20x30")
    assert shown.exit_code == 0, shown.output
    assert "20x30 pixels" in shown.output and "GFLOPs" in shown.output and "total" in shown.output
    printed = json.loads(run("--json").output)
    assert printed["size"] == [360, 480] and [row["stage"] for row in printed["stages"]] == [
        "tiny",
        "held",
        "total",
    ]
    assert printed["stages"][0]["parameters"] == 140
    assert run("--size", "big").exit_code == 2
