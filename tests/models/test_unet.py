"""U-Net and LinkNet: what the conformance suite (test_conformance.py) cannot know."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18, resnet34, vgg16

import pyseg
from pyseg import testing
from pyseg.errors import SpecError, WeightsError
from pyseg.models.linknet import LinkNet
from pyseg.models.semantic import semantic_model
from pyseg.models.unet import UNet, mirrored


def count(network):
    return sum(p.numel() for p in network.parameters())


def test_parameter_counts():
    with torch.device("meta"):
        assert count(UNet(2, inputs=1)) == 31_030_658  # the paper's: grey images, two classes
        assert count(UNet(2, inputs=1, padded=False)) == 31_030_658
        # smp's Unet on ResNet-34 has 24,436,369 for one class
        assert (
            count(pyseg.models.create("unet_resnet34", num_classes=1, weights=None)) == 24_436_369
        )
        assert round(count(pyseg.models.create("linknet", weights=None)) / 1e6, 1) == 11.5


def test_unpadded_sizes_are_the_papers():
    with torch.device("meta"):
        network = UNet(2, inputs=1, padded=False).eval()
        assert network._whole(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)
        assert network._whole(torch.zeros(1, 1, 188, 204)).shape == (1, 2, 4, 20)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (388, 388), (33, 47), (512, 500), (360, 480)])
@pytest.mark.parametrize("padded", [True, False])
def test_logits_are_as_large_as_the_image(size, padded):
    with torch.device("meta"):
        network = UNet(3, padded=padded, width=2).eval()
        assert network(torch.zeros(1, 3, *size)).shape == (1, 3, *size)
        assert network.train()(torch.zeros(2, 3, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize("size", [(1, 1), (1, 63), (33, 47), (360, 480), (513, 65)])
@pytest.mark.parametrize("name", ["unet_vgg16", "unet_resnet34", "linknet"])
def test_any_size(name, size):
    with torch.device("meta"):
        network = pyseg.models.create(name, weights=None).network
        assert network(torch.zeros(1, 3, *size)).shape == (1, 11, *size)


@torch.no_grad()
@pytest.mark.parametrize("size", [(100, 61), (37, 36), (36, 90)])
def test_tiles_give_what_the_whole_gives(size):
    torch.manual_seed(0)
    network = UNet(3, padded=False, tile=36, width=4).eval()
    x = torch.randn(2, 3, *size)
    whole = UNet(3, padded=False, tile=36 + 16 * 5, width=4).eval()
    whole.load_state_dict(network.state_dict())
    wanted = whole(x)
    calls, real = [], network._whole
    network._whole = lambda part: calls.append(part.shape[2:]) or real(part)
    torch.testing.assert_close(network(x), wanted, atol=1e-5, rtol=1e-4)
    assert len(calls) == -(-size[0] // 32) * -(-size[1] // 32) and set(calls) == {(220, 220)}


@torch.no_grad()
def test_what_is_far_away_changes_nothing_and_what_is_near_does():
    """A pixel of unpadded convolutions depends on 92 pixels around it, and no further."""
    torch.manual_seed(0)
    network = UNet(2, padded=False, width=4).eval()
    x = torch.randn(1, 3, 200, 40)
    before = network(x)
    x[:, :, 0] += 5
    changed = (network(x) - before).abs().amax((0, 1, 3)) > 0
    assert changed[0] and changed[20] and not changed[107:].any()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 200)])
def test_mirroring_goes_on_as_often_as_needed(size):
    image = torch.arange(float(size[0] * size[1])).view(1, 1, *size)
    made = mirrored(image, size)
    assert made.shape[2:] == (size[0] + 184, size[1] + 184)
    assert torch.equal(made[:, :, 92:-92, 92:-92], image)
    if min(size) > 1:  # NumPy's reflection has no limit either
        import numpy as np

        wanted = np.pad(image[0, 0].numpy(), 92, mode="reflect")
        assert torch.equal(made[0, 0], torch.from_numpy(wanted))


@torch.no_grad()
def test_padded_network_layer_by_layer():
    torch.manual_seed(0)
    network = UNet(3, width=4).eval()
    x = torch.randn(1, 3, 48, 80)
    state = network.state_dict()

    def double(x, name):
        for k in (0, 2):
            weight, bias = state[f"{name}.{k}.weight"], state[f"{name}.{k}.bias"]
            x = F.conv2d(x, weight, bias, padding=1).relu()
        return x

    levels = [double(x, "down.0")]
    for k in range(1, 5):
        levels.append(double(F.max_pool2d(levels[-1], 2), f"down.{k}"))
    y = levels.pop()
    for k in range(4):
        y = F.conv_transpose2d(y, state[f"up.{k}.weight"], state[f"up.{k}.bias"], stride=2)
        y = double(torch.cat([levels.pop(), y], 1), f"merge.{k}")
    wanted = F.conv2d(y, state["classifier.weight"], state["classifier.bias"])
    torch.testing.assert_close(network(x), wanted)


def small_unet(padding="valid", num_classes=None):
    return semantic_model(
        "small",
        lambda count: UNet(count, padded=padding == "same", tile=20, width=2),
        classes=("a", "b"),
        num_classes=num_classes,
        weights=None,
        heads=("classifier",),
    )


def unpadded(*, num_classes: int | None = None):
    return small_unet(num_classes=num_classes)


def test_conformance_of_an_unpadded_one():
    testing.check_model(unpadded)


def unequal(network):
    """Statistics that are not those of a new network."""
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize(
    "name, make", [("unet_vgg16", vgg16), ("unet_resnet34", resnet34), ("linknet", resnet18)]
)
@torch.no_grad()
def test_starts_from_torchvisions_classifier(tmp_path, name, make):
    extra = {"init_weights": False} if make is vgg16 else {}
    classifier = make(weights=None, num_classes=2, **extra)
    if make is vgg16:
        classifier.classifier = nn.Linear(1, 1)
    unequal(classifier)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    network = pyseg.models.create(name, weights=str(tmp_path / "classifier.pth")).network
    x = torch.randn(1, 3, 64, 64)
    if name == "linknet":
        body = network.encoder
        found = body.layer4(
            body.layer3(body.layer2(body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(x)))))))
        )
    else:
        found = network.encoder(x)[-1]
    if make is vgg16:
        wanted = classifier.features(x)
    else:
        classifier.avgpool = classifier.fc = nn.Identity()
        wanted = classifier(x).view(found.shape)
    torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_a_checkpoint_of_smp_gives_its_outputs(tmp_path):
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    network = unequal(smp.Unet("resnet34", encoder_weights=None, classes=4))
    torch.save(network.state_dict(), tmp_path / "smp.pth")
    path = str(tmp_path / "smp.pth")
    model = pyseg.models.create("unet_resnet34", num_classes=4, weights=path)
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(model.network(x), network(x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_links_are_added():
    """Without its encoder's maps LinkNet's decoder gives something else at every level."""
    torch.manual_seed(0)
    network = LinkNet(2).eval()
    x = torch.randn(1, 3, 64, 64)
    wanted = network(x)
    for level in range(3):
        last = network.decoder[level + 1].expand[1]
        kept = last.weight.clone()
        last.weight.zero_()  # what comes from below is gone; the encoder's map goes on
        assert network(x).std() > 0 and not torch.allclose(network(x), wanted)
        last.weight.copy_(kept)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("unet(padding='full')", "padding must be"),
        ("unet(tile=101, padding='valid')", "tile must be 16 k"),
        ("unet(tile=4)", "tile must be 16 k"),
        ("unet_resnet(backbone='resnet20')", "backbone"),
    ],
)
def test_bad_options(spec, words):
    with pytest.raises(SpecError, match=words):
        pyseg.build(spec, weights=None)


def test_weights_of_another_network(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(WeightsError, match="another architecture"):
        pyseg.models.create("unet_resnet34", weights=str(tmp_path / "resnet18.pth"))
