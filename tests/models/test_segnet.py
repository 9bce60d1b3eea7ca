"""SegNet: what the conformance suite (test_conformance.py) cannot know."""

import pytest
import torch
from torchvision.models import vgg16_bn

import pyseg
from pyseg.errors import WeightsError
from pyseg.models.segnet import pool, unpool


@pytest.mark.parametrize(
    "name, count",
    [("segnet", 29_449_355), ("bayesian_segnet", 29_449_355), ("segnet_basic", 1_416_587)],
)
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = pyseg.models.get(name)(weights=None)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.classes[0] == "Sky" and len(model.classes) == len(model.palette) == 11


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (45, 60), (7, 8)])
def test_unpooling_puts_maxima_back(size):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size)
    pooled, indices, remembered = pool(x)
    back = unpool(-pooled, indices, remembered)
    expected = torch.zeros_like(x)
    for plane, target in zip(x.flatten(0, 1), expected.flatten(0, 1), strict=True):
        for top in range(0, size[0], 2):
            for left in range(0, size[1], 2):
                cell = plane[top : top + 2, left : left + 2]
                row, column = divmod(int(cell.argmax()), cell.shape[1])
                target[top + row, left + column] = -cell.max()
    assert torch.equal(back, expected)


def test_maps_of_360_x_480_are_the_papers():
    """The authors' Caffe model states 45 x 60 and 23 x 30 for the decoder of CamVid's images."""
    x, sizes = torch.zeros(1, 1, 360, 480), []
    for _ in range(5):
        x, _, size = pool(x)
        sizes.append(tuple(size))
    assert sizes == [(360, 480), (180, 240), (90, 120), (45, 60), (23, 30)]


def test_starts_from_torchvisions_vgg(tmp_path, monkeypatch):
    torch.manual_seed(1)
    classifier = vgg16_bn(num_classes=2, init_weights=False)
    classifier.classifier = torch.nn.Linear(1, 1)  # whatever it is, SegNet has no place for it
    torch.save(classifier.state_dict(), tmp_path / "vgg.pth")
    model = pyseg.models.get("segnet")(weights=tmp_path / "vgg.pth")
    own = dict(model.network.encoder.state_dict())
    assert own.keys() == classifier.features.state_dict().keys()
    assert all(torch.equal(v, own[k]) for k, v in classifier.features.state_dict().items())
    monkeypatch.setenv("PYSEG_OFFLINE", "1")
    monkeypatch.setenv("PYSEG_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"https://download\.pytorch\.org/models/vgg16_bn"):
        pyseg.build("segnet", weights="IMAGENET1K_V1")


def test_basic_normalises_images_of_0_to_255():
    seen = []
    model = pyseg.models.get("segnet_basic")(weights=None)
    model.network.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4) * 5
    model.predict([image])
    torch.testing.assert_close(seen[0][0], image.float())
