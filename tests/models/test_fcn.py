"""FCN on VGG-16 and AlexNet: what the conformance suite (test_conformance.py) cannot know."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.nn import functional as F
from torchvision.models import alexnet, vgg16

import pyseg
from pyseg import testing
from pyseg.errors import SpecError, WeightsError
from pyseg.models.fcn import FCNVGG, FCNAlexNet, deconvolve
from pyseg.models.semantic import semantic_model

SMALL = {"widths": (4, 5, 6, 7, 8), "hidden": 9}


# Of the published Caffe models, without their fixed deconvolutions, for 21 classes.
@pytest.mark.parametrize(
    "name, count",
    [
        ("fcn32s", 134_346_581),
        ("fcn16s", 134_357_354),
        ("fcn8s", 134_362_751),
        ("fcn_alexnet", 56_954_261),
    ],
)
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = pyseg.models.get(name)(weights=None)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.classes[:2] == ("__background__", "aeroplane") and len(model.classes) == 21


@pytest.mark.parametrize("stride", [32, 16, 8])
@pytest.mark.parametrize("size", [(1, 1), (375, 500), (360, 480), (33, 47), (224, 31)])
def test_published_logits_are_as_large_as_the_image(stride, size):
    with torch.device("meta"):
        network = FCNVGG(3, stride, **SMALL).eval()
        assert network(torch.zeros(1, 3, *size)).shape[2:] == size
        modern = FCNVGG(3, stride, style="modern", **SMALL).eval()
        wanted = tuple(-(-side // stride) for side in size)
        assert modern(torch.zeros(1, 3, *size)).shape[2:] == wanted


@pytest.mark.parametrize("size", [(1, 1), (375, 500), (33, 47), (500, 500)])
def test_alexnets_logits(size):
    with torch.device("meta"):
        assert FCNAlexNet(3, hidden=8).eval()(torch.zeros(1, 3, *size)).shape[2:] == size
        modern = FCNAlexNet(3, style="modern", hidden=8).eval()
        wanted = tuple(-(-side // 32) for side in size)
        assert modern(torch.zeros(1, 3, *size)).shape[2:] == wanted


@pytest.mark.parametrize("side, pool5, up", [(500, 22, 544), (375, 18, 416), (360, 18, 416)])
def test_maps_are_those_of_the_caffe_model(side, pool5, up):
    with torch.device("meta"):
        network = FCNVGG(2, 32, **SMALL).eval()
        top, levels = network.trunk(torch.zeros(1, 3, side, side))
        assert [level.shape[2] for level in levels[-1:]] == [pool5]
        assert deconvolve(network.score(top), 64, 32).shape[2] == up


@pytest.mark.parametrize("kernel, stride", [(4, 2), (16, 8), (32, 16), (64, 32), (63, 32)])
def test_deconvolution_interpolates_lines(kernel, stride):
    """What it makes of a ramp is a ramp, and each channel stays by itself."""
    ramp = torch.arange(6.0).expand(5, 6) + 1
    made = deconvolve(torch.stack([ramp, -2 * ramp])[None], kernel, stride)[0]
    inner = made[:, kernel : -kernel or None, kernel:-kernel]
    torch.testing.assert_close(inner[1], -2 * inner[0])
    steps = inner[0].diff(dim=1)
    if kernel % 2 == 0:
        torch.testing.assert_close(steps, torch.full_like(steps, 1 / stride), atol=1e-4, rtol=0)
    assert inner[0].diff(dim=0).abs().max() < 1e-4


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_published_network_is_that_of_its_prototxt(stride):
    """Layer by layer with the whole matrices of weights that Caffe's deconvolution has."""
    torch.manual_seed(stride)
    network = FCNVGG(3, stride, at_once=stride == 8, **SMALL).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 3, 41, 90)

    def up(x, kernel, factor):
        f = -(-kernel // 2)
        centre = (2 * f - 1 - f % 2) / (2 * f)  # as Caffe's BilinearFiller has it
        weight = torch.zeros(3, 3, kernel, kernel)
        for i in range(kernel):
            for j in range(kernel):
                value = (1 - abs(i / f - centre)) * (1 - abs(j / f - centre))
                weight[range(3), range(3), i, j] = value
        return F.conv_transpose2d(x, weight, stride=factor)

    pools = []
    y = F.pad(x, (99,) * 4)  # and 1 by the first layer itself
    for layer in network.trunk.features:
        if isinstance(layer, torch.nn.Conv2d):
            y = F.conv2d(y, layer.weight, layer.bias, padding=1)
        elif isinstance(layer, torch.nn.ReLU):
            y = y.relu()
        else:
            padded = F.pad(y, (0, y.shape[3] % 2, 0, y.shape[2] % 2), value=-torch.inf)
            y = F.max_pool2d(padded, 2)
            pools.append(y)
    y = network.score(network.trunk.fc7(network.trunk.fc6(y).relu()).relu())
    if stride <= 16:
        y = up(y, 4, 2)
        skip = network.score_pool4(pools[3] * (0.01 if stride == 8 else 1))
        y = y + skip[:, :, 5 : 5 + y.shape[2], 5 : 5 + y.shape[3]]
    if stride == 8:
        y = up(y, 4, 2)
        skip = network.score_pool3(pools[2] * 1e-4)
        y = y + skip[:, :, 9 : 9 + y.shape[2], 9 : 9 + y.shape[3]]
    y = up(y, 2 * stride, stride)
    offset = {32: 19, 16: 27, 8: 31}[stride]
    torch.testing.assert_close(
        network(x), y[:, :, offset : offset + 41, offset : offset + 90], atol=1e-4, rtol=1e-4
    )


def small(stride, *, num_classes=None, weights=None, style="published"):
    return semantic_model(
        "small",
        lambda count: FCNVGG(count, stride, style=style, **SMALL),
        classes=("a", "b"),
        num_classes=num_classes,
        weights=weights,
        heads=("score", "score_pool4", "score_pool3"),
        may_lack=("score_pool4", "score_pool3"),
    )


def small_fcn8s(*, num_classes: int | None = None):
    return small(8, num_classes=num_classes)


def small_modern_fcn16s(*, num_classes: int | None = None):
    return small(16, num_classes=num_classes, style="modern")


@pytest.mark.parametrize("factory", [small_fcn8s, small_modern_fcn16s])
def test_conformance_of_small_ones(factory):
    testing.check_model(factory)


def test_a_finer_network_starts_as_the_coarser_one(tmp_path):
    torch.manual_seed(0)
    coarse = small(32)
    torch.nn.init.normal_(coarse.network.score.weight)
    torch.save(coarse.state_dict(), tmp_path / "coarse.pth")
    fine = small(8, weights=tmp_path / "coarse.pth")
    x = torch.rand(1, 3, 64, 65)
    with torch.no_grad():
        one, other = coarse(x)["out"], fine(x)["out"]
    assert one.shape == other.shape and one.std() > 0
    correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
    assert correlation > 0.99  # upsampled in three steps rather than in one
    torch.save(fine.state_dict(), tmp_path / "fine.pth")
    with pytest.raises(WeightsError, match="score_pool"):
        small(32, weights=tmp_path / "fine.pth")


@pytest.mark.parametrize("name, make", [("fcn32s", vgg16), ("fcn_alexnet", alexnet)])
def test_starts_from_torchvisions_classifier(tmp_path, name, make):
    with torch.device("meta"):
        shapes = make(weights=None).state_dict()
    state = {key: torch.zeros(value.shape) for key, value in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    first = next(k for k in state if k.startswith("classifier") and k.endswith("weight"))
    state[first].view(-1)[::997] = torch.rand(
        state[first].view(-1)[::997].shape, generator=generator
    )
    torch.save(state, tmp_path / "classifier.pth")
    model = pyseg.models.create(name, weights=str(tmp_path / "classifier.pth"), style="modern")
    weight = model.network.trunk.fc6.weight
    assert torch.equal(weight.flatten(1), state[first])
    assert not model.network.trunk.features[0].weight.any()


def test_what_cannot_be_loaded_says_so(tmp_path):
    with pytest.raises(SpecError, match="style must be"):
        pyseg.build("fcn8s(style='old')", weights=None)
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.pth")
    with pytest.raises(WeightsError, match="another architecture than FCNVGG"):
        small(32, weights=tmp_path / "vgg.pth")


def test_bfloat16_training_keeps_within_its_memory():
    """oneDNN wrote past the gradient of the last convolution's bias: the process died."""
    code = """
        import torch
        from pyseg.models.fcn import _Scores
        scores = _Scores(4096, 2)  # the last layer, behind VGG-16
        for _ in range(20):
            features = torch.rand(8, 4096, 3, 4, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16):
                scores(features).float().sum().backward()
            scores.zero_grad()
            lists = [bytes(20 + k) for k in range(50)]
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MALLOC_CHECK_": "3"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True)
