"""HRNetV2: what the conformance suite (test_conformance.py) cannot know."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyseg
from pyseg.models import hrnet

COUNTS = {
    "hrnet_w18_small_v1": 1_540_819,
    "hrnet_w18_small_v2": 3_939_579,
    "hrnet_w18": 9_641_119,
    "hrnet_w32": 29_546_515,
    "hrnet_w48": 65_859_379,
}
SMALL = "hrnet_w18_small_v1"


@pytest.mark.parametrize("name, count", COUNTS.items())
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = pyseg.models.get(name)(weights=None)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.classes[0] == "road" and len(model.classes) == 19


def test_branches_are_timms(tmp_path, monkeypatch):
    """At sizes that timm takes, and joined by nearest upsampling as there; from its classifier."""
    import timm

    torch.manual_seed(0)
    peer = timm.create_model("hrnet_w18_small", num_classes=3).eval()
    for layer in peer.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.1)
    torch.save(peer.state_dict(), tmp_path / "classifier.pth")
    network = pyseg.models.get(SMALL)(weights=tmp_path / "classifier.pth").network
    x = torch.randn(1, 3, 64, 96)
    plain = F.interpolate
    monkeypatch.setattr(hrnet, "_resize", lambda x, like: plain(x, like.shape[2:], mode="nearest"))
    with torch.inference_mode():
        stem = peer.act1(peer.bn1(peer.conv1(x)))
        expected = peer.stages(peer.act2(peer.bn2(peer.conv2(stem))))
        found = network.branches(x)
    assert [f.shape[2:] for f in found] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_loads_the_authors_checkpoints(tmp_path):
    """Their keys: the branches without a prefix or below ``model.``, the head as last_layer."""
    torch.manual_seed(0)
    source = pyseg.models.get(SMALL)(weights=None, num_classes=4)
    state = {
        f"model.{k}".replace("model.trunk.", "model.").replace(
            "model.head.", "model.last_layer."
        ): v
        for k, v in source.network.state_dict().items()
    }
    assert "model.last_layer.3.weight" in state and "model.stage4.0.branches.0.0.bn1.bias" in state
    torch.save({"state_dict": {**state, "loss.weight": torch.ones(4)}}, tmp_path / "theirs.pth")
    loaded = pyseg.models.get(SMALL)(weights=tmp_path / "theirs.pth", num_classes=4)
    image = torch.randint(256, (3, 37, 51), dtype=torch.uint8)
    assert torch.equal(loaded.predict([image])[0].logits, source.predict([image])[0].logits)
    assert source.predict([image])[0].logits.shape == (4, 10, 13)
