"""DeepLab v1, v2 and v3+: what the conformance suite (test_conformance.py) cannot know."""

import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

import pyseg
from pyseg.errors import WeightsError
from pyseg.models.deeplab import DeepLab

VGG = 14_714_688  # convolutions of VGG-16
FC = 512 * 1024 * 9 + 1024 + 1024 * 1024 + 1024
RESNET101 = 42_500_160  # without its classifier


@pytest.mark.parametrize(
    "spec, count",
    [
        ("deeplab_v1", VGG + FC + 1025 * 21),
        ("deeplab_v2_vgg16", VGG + 4 * (FC + 1025 * 21)),
        ("deeplab_v2_resnet101", RESNET101 + 4 * (2048 * 9 + 1) * 21),
        # segmentation-models-pytorch's, with the same number of classes
        ("deeplabv3plus_resnet50(num_classes=11)", 26_680_155),
    ],
)
def test_parameter_counts(spec, count):
    with torch.device("meta"):
        model = pyseg.models.create(spec, weights=None)
    assert sum(p.numel() for p in model.parameters()) == count
    if "11" not in spec:
        assert model.classes[:2] == ("__background__", "aeroplane") and len(model.classes) == 21


@pytest.mark.parametrize("size, expected", [(321, 41), (320, 41), (306, 40), (1, 1), (9, 2)])
def test_v1_has_the_papers_sizes(size, expected):
    """41 x 41 for its crops of 321; Caffe rounds up."""
    with torch.device("meta"):
        network = pyseg.models.get("deeplab_v1")(weights=None).network
        assert network(torch.empty(1, 3, size, size))["out"].shape[2] == expected


def test_v1_has_the_layers_of_largefov():
    """Kernel, stride and dilation of each, as the authors' Caffe model has them."""
    convolutions = [(3, 1, 1)] * 2 + [(3, 2, 1)] + [(3, 1, 1)] * 2 + [(3, 2, 1)]
    convolutions += [(3, 1, 1)] * 3 + [(3, 2, 1)] + [(3, 1, 1)] * 3 + [(3, 1, 1)]
    convolutions += [(3, 1, 2)] * 3 + [(3, 1, 1)] * 2 + [(3, 1, 12)]
    network = pyseg.models.get("deeplab_v1")(weights=None).network
    found = []
    for layer in [*network.trunk.features, network.trunk.pool, network.trunk.fc6[0]]:
        if hasattr(layer, "kernel_size"):
            of = [getattr(layer, k, 1) for k in ("kernel_size", "stride", "dilation")]
            found.append(tuple(v[0] if isinstance(v, tuple) else v for v in of))
    assert found == convolutions
    assert isinstance(network.trunk.pool, nn.AvgPool2d)


def test_v1_starts_from_torchvisions_vgg(tmp_path):
    torch.manual_seed(1)
    source = models.vgg16(weights=None, num_classes=2, init_weights=False)
    torch.save(source.state_dict(), tmp_path / "vgg.pth")
    model = pyseg.models.get("deeplab_v1")(weights=tmp_path / "vgg.pth")
    trunk = model.network.trunk
    for key, value in source.features.state_dict().items():
        assert torch.equal(trunk.features.state_dict()[key], value)
    fc6 = source.classifier[0].weight.view(4096, 512, 7, 7)
    assert torch.equal(trunk.fc6[0].weight[5, 7, 1, 2], fc6[20, 7, 3, 6])
    assert torch.equal(trunk.fc7[0].weight[3, 2, 0, 0], source.classifier[3].weight[12, 8])
    assert torch.equal(trunk.fc7[0].bias[9], source.classifier[3].bias[36])


def test_v2_fuses_scales_by_their_maximum():
    torch.manual_seed(0)
    scores = [nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 3, padding=1)]

    class Passing(nn.Module):
        def forward(self, x):
            return [x, 2 * x]

    network = DeepLab(Passing(), scores, (0.5, 1.0)).train()
    images = torch.randn(1, 3, 9, 6)
    outputs = network(images)
    half = F.interpolate(images, (4, 3), mode="bilinear")
    fine, coarse = (scores[0](x) + scores[1](2 * x) for x in (images, half))
    coarse_up = F.interpolate(coarse, (9, 6), mode="bilinear")
    assert torch.equal(outputs["out"], torch.maximum(fine, coarse_up))
    assert torch.equal(outputs["aux100"], fine) and torch.equal(outputs["aux50"], coarse)
    assert set(network.eval()(images)) == {"out"}
    alone = DeepLab(Passing(), scores, (1.0,)).train()
    assert set(alone(images)) == {"out"}
    for scales in ((), (0.0, 1.0), (1.0, 9.0)):
        with pytest.raises(ValueError, match="scales must be one or more numbers"):
            DeepLab(Passing(), scores, scales)


def test_v2_sums_dilations_of_the_last_features():
    torch.manual_seed(0)
    network = pyseg.models.get("deeplab_v2_resnet101")(weights=None, num_classes=2, scales=[1])
    network = network.network
    images = torch.randn(1, 3, 41, 30)
    with torch.inference_mode():
        top = network.trunk(images)[-1]
        assert top.shape[2:] == (6, 4)
        expected = 0
        for score, rate in zip(network.scores, (6, 12, 18, 24), strict=True):
            expected = expected + F.conv2d(top, score.weight, score.bias, 1, rate, rate)
        torch.testing.assert_close(network(images)["out"], expected)


@pytest.mark.parametrize("stride", [8, 16])
def test_v3plus_equals_segmentation_models_pytorch(stride, tmp_path):
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    rates = [rate * 16 // stride for rate in (6, 12, 18)]
    peer = smp.DeepLabV3Plus(
        "resnet18",
        encoder_weights=None,
        classes=5,
        encoder_output_stride=stride,
        decoder_atrous_rates=rates,
    ).eval()
    check_v3plus(peer, "resnet18", stride, tmp_path)


def check_v3plus(peer, backbone, stride, tmp_path):
    from pyseg.models.deeplab import _v3plus

    for layer in peer.modules():  # statistics that matter
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    torch.save(peer.state_dict(), tmp_path / "smp.pth")
    model = _v3plus(backbone, stride, 5, tmp_path / "smp.pth")
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        logits = model.network(images)
        upsampled = F.interpolate(logits, (64, 96), mode="bilinear", align_corners=True)
        torch.testing.assert_close(upsampled, peer(images))
    with pytest.raises(WeightsError, match=r"is for 5 classes, .* pass num_classes=5"):
        _v3plus(backbone, stride, 7, tmp_path / "smp.pth")


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("backbone", ["mobilenet_v2", "mobilenet_v3_large", "xception65"])
def test_v3plus_strides(backbone, stride):
    if backbone == "xception65":
        pytest.importorskip("timm")
    with torch.device("meta"):
        factory = pyseg.models.get(f"deeplabv3plus_{backbone}")
        network = factory(weights=None, output_stride=stride).network
        low, *_, top = network.trunk(torch.empty(1, 3, 64, 96))
        assert network(torch.empty(1, 3, 65, 97)).shape == (1, 21, 17, 25)
    assert low.shape[1:] == (network.trunk.widths[0], 16, 24)
    assert top.shape[1:] == (network.trunk.widths[-1], 64 // stride, 96 // stride)
    assert network.branches[1][0][0].dilation[0] == 6 * 16 // stride


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="no timm")
def test_xception_loads_timms_classifier(tmp_path):
    import timm

    torch.manual_seed(1)
    source = timm.create_model("xception65", num_classes=3)
    torch.save(source.state_dict(), tmp_path / "xception.pth")
    model = pyseg.models.get("deeplabv3plus_xception65")(weights=tmp_path / "xception.pth")
    own = model.network.trunk.body.state_dict()
    assert own and all(torch.equal(v, source.state_dict()[k]) for k, v in own.items())


def test_without_timm_the_remedy_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm.*pip install 'pyseg-toolkit\[zoo\]'"):
        pyseg.models.get("deeplabv3plus_xception65")(weights=None)


def test_v3plus_refuses():
    factory = pyseg.models.get("deeplabv3plus_mobilenet_v2")
    with pytest.raises(ValueError, match="output_stride must be 8 or 16, got 32"):
        factory(weights=None, output_stride=32)
    with pytest.raises(ValueError, match="batches of at least 2 images, got 1"):
        factory(weights=None, num_classes=2).train()(torch.rand(1, 3, 33, 40))
