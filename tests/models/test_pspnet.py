"""PSPNet: what the conformance suite (test_conformance.py) cannot know."""

import pytest
import torch
from torch.nn import functional as F
from torchvision import models

import pyseg
from pyseg.models.backbones import Trunk

RESNET50, RESNET101 = 23_508_032, 42_500_160  # without their classifiers
# four pooled levels; the head and the auxiliary one for Cityscapes' 19 classes; normalisation
PYRAMID = 4 * (2048 * 512 + 2 * 512)
HEADS = 4096 * 512 * 9 + 2 * 512 + 513 * 19 + 1024 * 256 * 9 + 2 * 256 + 257 * 19
COUNTS = {
    "pspnet_resnet50": RESNET50 + PYRAMID + HEADS,
    "pspnet_resnet101": RESNET101 + PYRAMID + HEADS,
}


@pytest.mark.parametrize("name, count", COUNTS.items())
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = pyseg.models.get(name)(weights=None)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.classes[0] == "road" and len(model.classes) == len(model.palette) == 19


def test_mobilenet_pools_a_quarter_of_its_channels_each():
    with torch.device("meta"):
        network = pyseg.models.get("pspnet_mobilenet_v2")(weights=None).network
    assert network.trunk.widths == [24, 32, 96, 320]
    assert [level[1].out_channels for level in network.pyramid] == [80] * 4
    assert network.head[0].in_channels == 640 and network.auxiliary[0].in_channels == 96


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large"])
def test_trunk_is_torchvisions_classifier(backbone):
    """Undilated, its features are what torchvision's network has on the way."""
    torch.manual_seed(0)
    source = models.get_model(backbone, weights=None).eval()
    trunk = Trunk(backbone).eval()
    state = Trunk.convert(source.state_dict(), backbone)
    trunk.load_state_dict({k.removeprefix("trunk."): v for k, v in state.items()})
    images = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        features = trunk(images)
        if backbone.startswith("resnet"):
            x = source.maxpool(source.relu(source.bn1(source.conv1(images))))
            expected = []
            for layer in (source.layer1, source.layer2, source.layer3, source.layer4):
                expected.append(x := layer(x))
        else:
            ends = {"mobilenet_v2": (3, 6, 13, 17), "mobilenet_v3_large": (3, 6, 12, 16)}[backbone]
            x, steps = images, []
            for layer in source.features:
                steps.append(x := layer(x))
            expected = [steps[k] for k in ends]
    assert [f.shape[1] for f in features] == trunk.widths
    assert [f.shape[2] for f in features] == [17, 9, 5, 3]
    assert all(map(torch.equal, features, expected))


@pytest.mark.parametrize("backbone", ["resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("stride", [8, 16])
def test_dilation_keeps_weights_and_size(backbone, stride):
    with torch.device("meta"):
        plain, dilated = Trunk(backbone), Trunk(backbone, stride)
        sizes = [f.shape[2] for f in dilated(torch.empty(1, 3, 64, 64))]
    assert sizes == [16, 8, max(4, 64 // stride), 64 // stride]
    shapes = [{k: v.shape for k, v in t.state_dict().items()} for t in (plain, dilated)]
    assert shapes[0] == shapes[1]


def test_dilated_trunk_is_torchvisions():
    """But for the first block of a stage, which torchvision spreads by half as much."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    peer = resnet50(weights=None, replace_stride_with_dilation=[False, True, True]).eval()
    for layer, rate in ((peer.layer3, 2), (peer.layer4, 4)):
        layer[0].conv2.dilation = layer[0].conv2.padding = (rate, rate)
    trunk = Trunk("resnet50", 8).eval()
    state = Trunk.convert(peer.state_dict(), "resnet50")
    trunk.load_state_dict({k.removeprefix("trunk."): v for k, v in state.items()})
    peer.avgpool, peer.fc = torch.nn.Identity(), torch.nn.Identity()
    images = torch.randn(1, 3, 33, 41)
    with torch.inference_mode():
        assert torch.equal(trunk(images)[-1].flatten(1), peer(images))


def test_pyramid_sees_means_of_cells():
    """With a trunk that passes images on, against means written out by hand."""
    torch.manual_seed(0)
    network = pyseg.models.get("pspnet_mobilenet_v2")(weights=None, num_classes=2).network
    seen = []
    network.trunk.forward = lambda images: [images, images]
    network.head = torch.nn.Sequential(torch.nn.Identity())
    network.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(1, 320, 12, 6)
    with torch.inference_mode():
        network(x)
        expected = [x]
        for size, level in zip((1, 2, 3, 6), network.pyramid, strict=True):
            cells = x.reshape(1, 320, size, 12 // size, size, 6 // size).mean((3, 5))
            y = level[1:](cells)
            expected.append(F.interpolate(y, (12, 6), mode="bilinear", align_corners=True))
    torch.testing.assert_close(seen[0], torch.cat(expected, 1))


def test_trains_on_two_images_at_least_with_an_auxiliary_head():
    model = pyseg.models.get("pspnet_mobilenet_v2")(weights=None, num_classes=3).train()
    outputs = model(torch.rand(2, 3, 33, 40))
    assert {key: tuple(v.shape) for key, v in outputs.items()} == {
        "out": (2, 3, 5, 5),
        "aux": (2, 3, 5, 5),
    }
    with pytest.raises(ValueError, match="batches of at least 2 images, got 1"):
        model(torch.rand(1, 3, 33, 40))


def test_starts_from_torchvisions_classifier(tmp_path):
    torch.manual_seed(1)
    source = models.mobilenet_v2(num_classes=2)
    torch.save(source.state_dict(), tmp_path / "classifier.pth")
    model = pyseg.models.get("pspnet_mobilenet_v2")(weights=tmp_path / "classifier.pth")
    own = model.network.trunk.body.state_dict()
    assert all(torch.equal(v, source.features.state_dict()[k]) for k, v in own.items())
    # a checkpoint of training, with its head
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    again = pyseg.models.get("pspnet_mobilenet_v2")(weights=tmp_path / "whole.pth")
    assert torch.equal(again.network.head[0].weight, model.network.head[0].weight)
    with pytest.raises(pyseg.errors.WeightsError, match=r"for 19 classes, .* num_classes=19"):
        pyseg.models.get("pspnet_mobilenet_v2")(weights=tmp_path / "whole.pth", num_classes=4)
