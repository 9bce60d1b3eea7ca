"""What is published about models: `pyseg.models.info` and `pyseg list --verbose`."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
import torchvision
from typer.testing import CliRunner

import pyseg
from pyseg import cli, models
from pyseg.errors import PluginError, UnknownName
from pyseg.models.facts import ModelInfo, Published, facts

FAMILIES = (
    *("bayesian_segnet", "fcn16s", "fcn32s", "fcn8s", "fcn_alexnet", "fcn_resnet18"),
    *("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101"),
    *("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "linknet", "segnet"),
    *("segnet_basic", "unet", "unet_resnet", "unet_resnet50", "unet_vgg16"),
    *("deeplab_v1", "deeplab_v2_vgg16", "deeplabv3plus_resnet50", "hrnet_w48", "segformer_b0"),
    *("hrnet_w18_small_v1", "pspnet_resnet50"),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_known_of_semantic_models(name):
    info = models.info(name)
    assert isinstance(info, ModelInfo) and info.name == name
    assert re.search(r"\S, .+ (19|20)\d\d$", info.paper), info.paper
    assert info.parameters > 1e6 and info.gflops > 1
    for score in info.scores:
        assert isinstance(score, Published) and 0 < score.value < 100
        assert score.metric and score.dataset and score.source
    known = {k for k in ("vgg16", "resnet", "alexnet") if k in name}
    assert info.licence or not known
    json.dumps(info.to_dict())


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if hasattr(torchvision.models.segmentation, name)]
)
def test_torchvisions_scores_are_torchvisions(name):
    metrics = torchvision.models.get_model_weights(name).DEFAULT.meta["_metrics"]
    (score,) = models.info(name).scores
    assert score.value == metrics["COCO-val2017-VOC-labels"]["miou"]


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"])
def test_torchvisions_detectors(name):
    metrics = torchvision.models.get_model_weights(name).DEFAULT.meta["_metrics"]["COCO-val2017"]
    box, mask = models.info(name).scores
    assert (box.value, mask.value) == (metrics["box_map"], metrics["mask_map"])
    assert models.info(name).gflops is None  # it depends on the image


def test_gflops_are_those_of_cost():
    size = (64, 96)
    found = models.info("segnet_basic", size=size)
    result = pyseg.cost(
        pyseg.build("segnet_basic", weights=None),
        torch.zeros(3, *size, dtype=torch.uint8),
        rounds=1,
    )
    assert found.size == size
    assert found.gflops == pytest.approx(result.stages[0].flops / 1e9, rel=1e-9)
    assert found.parameters == result.stages[0].parameters
    assert models.info("segnet_basic", size=(128, 96)).gflops == pytest.approx(2 * found.gflops)


def test_asking_imports_nothing_before_it_must():
    code = (
        "import sys, pyseg\n"
        "info = pyseg.models.info('segnet')\n"
        "assert info.target == 'pyseg.models.segnet:segnet' and 'torch' not in sys.modules\n"
        "assert info.parameters == 29449355 and 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def registered():
    """Names of a test's own, until its end."""
    names = []

    def add(name, factory):
        models.register(name)(factory)
        names.append(name)

    yield add
    for name in names:
        del models._registry._registered[name]


def test_of_a_plugin(registered):
    @facts(paper="Me, Networks, 2026", scores=[(61.2, "mIoU", "CamVid test", "me")], licence="MIT")
    def said(*, num_classes: int | None = None):
        return models.wrap(torch.nn.Conv2d(3, num_classes or 2, 1), classes=num_classes or 2)

    def silent(*, needed: int):
        raise AssertionError

    registered("said", said)
    registered("silent", silent)
    info = models.info("said")
    assert (info.paper, info.licence) == ("Me, Networks, 2026", "MIT")
    assert info.scores == (Published(61.2, "mIoU", "CamVid test", "me"),)
    assert info.parameters == 8 and info.gflops == pytest.approx(2 * 6 * 512**2 / 1e9)
    other = models.info("silent")
    assert (other.paper, other.scores, other.licence) == (None, (), None)
    assert other.parameters is None and other.gflops is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.name = "x"


def test_bad_questions():
    with pytest.raises(UnknownName, match="no model is called 'segnett'"):
        models.info("segnett")
    with pytest.raises(ValueError, match="size must be"):
        models.info("segnet", size=(0, 4))


def test_list_verbose(monkeypatch):
    result = CliRunner().invoke(cli.app, ["list", "--verbose", "segnet*", "crf"])
    assert result.exit_code == 0, result.output
    text = result.output
    assert "segnet: 29,449,355 parameters, 323.1 GFLOPs at 512x512" in text
    assert "paper: Badrinarayanan" in text and "crf" in text
    assert "published, not measured here: mIoU 60.1 on CamVid test" in text
    rows = json.loads(CliRunner().invoke(cli.app, ["list", "-v", "--json", "segnet", "crf"]).stdout)
    by_name = {row["name"]: row for row in rows}
    assert by_name["segnet"]["parameters"] == 29_449_355 and by_name["segnet"]["kind"] == "model"
    assert by_name["segnet"]["published_scores"][0]["source"] == "the paper"
    assert "parameters" not in by_name["crf"]

    def broken(self):
        raise PluginError("model 'segnet' fails to import")

    monkeypatch.setattr(ModelInfo, "to_dict", broken)
    result = CliRunner().invoke(cli.app, ["list", "-v", "segnet"])
    assert result.exit_code == 0 and "segnet: model 'segnet' fails to import" in result.output
