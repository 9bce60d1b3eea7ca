import pytest
import torch
from torch import nn

from pyseg.errors import PysegError
from pyseg.image import default_palette
from pyseg.models.semantic import SemanticModel
from pyseg.types import Model


def convolution(**options):
    torch.manual_seed(0)
    return SemanticModel(nn.Conv2d(3, 4, 3, stride=2, padding=1), ("a", "b", "c", "d"), **options)


def images(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, *s), dtype=torch.uint8, generator=generator) for s in sizes]


def test_normalises_as_torchvision_does():
    from torchvision.transforms import v2

    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    model = SemanticModel(Spy(), ("r", "g", "b"))
    (image,) = images((5, 7))
    expected = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )(image)
    model(image[None])
    model(image[None] / 255)
    torch.testing.assert_close(seen[0][0], expected)
    torch.testing.assert_close(seen[1][0], expected)


def test_constants_are_not_weights():
    model = convolution(mean=(0.0, 0.0, 0.0))
    assert set(model.state_dict()) == {"network.weight", "network.bias"}
    assert model.mean.shape == (3, 1, 1) and model.double().mean.dtype == torch.float64


def test_passes_on_all_outputs():
    class Heads(nn.Module):
        def forward(self, x):
            return {"out": x[:, :2], "aux": x[:, :2, ::2]}

    outputs = SemanticModel(Heads(), ("a", "b"))(torch.rand(1, 3, 4, 6))
    assert {key: value.shape for key, value in outputs.items()} == {
        "out": (1, 2, 4, 6),
        "aux": (1, 2, 2, 6),
    }


def test_predict_any_sizes_in_order():
    model = convolution()
    assert isinstance(model, Model)
    batch = images((9, 13), (1, 1), (8, 8), (9, 13), (3, 200), (9, 13))
    results = model.predict(batch)
    for image, result in zip(batch, results, strict=True):
        assert result.size == tuple(image.shape[1:])
        assert result.classes == model.classes and result.palette == default_palette(4)
        assert result.image is image
        alone = nn.functional.conv2d(
            (image[None] / 255 - model.mean) / model.std,
            model.network.weight,
            model.network.bias,
            2,
            1,
        )
        torch.testing.assert_close(result.logits, alone[0].detach())
        assert not result.logits.requires_grad
    assert model.predict([]) == []


def test_batches_hold_equal_sizes_and_few_pixels():
    sizes = []

    class Spy(nn.Module):
        def forward(self, x):
            sizes.append(tuple(x.shape))
            return x

    model = SemanticModel(Spy(), ("r", "g", "b"), max_batch_pixels=250)
    model.predict(images((10, 10), (10, 10), (20, 20), (10, 10), (20, 20)))
    assert sizes == [(2, 3, 10, 10), (1, 3, 10, 10), (1, 3, 20, 20), (1, 3, 20, 20)]


def test_predict_evaluates_and_switches_no_mode():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.9))
    model = SemanticModel(network, ("a", "b"))
    assert not model.training and not network[2].training
    before = network[1].running_mean.clone()
    (first,), (second,) = model.predict(images((6, 6))), model.predict(images((6, 6)))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(network[1].running_mean, before)
    model.train()
    with pytest.raises(PysegError, match=r"training mode.*call its eval\(\)"):
        model.predict(images((6, 6)))
    assert model.training and network[2].training
    assert torch.equal(network[1].running_mean, before)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(4, 5, 3, dtype=torch.uint8), ValueError, r"images\[0\] must be \[3, H, W\]"),
        (torch.zeros(3, 0, 5, dtype=torch.uint8), ValueError, "with H, W > 0"),
        (torch.zeros(3, 4, 5), TypeError, "must be uint8, got torch.float32; read it with"),
    ],
)
def test_predict_refuses(image, error, message):
    with pytest.raises(error, match=message):
        convolution().predict([image])


def test_forward_refuses():
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\] RGB, got \[1, 4, 2, 2\]"):
        convolution()(torch.zeros(1, 4, 2, 2))
    with pytest.raises(TypeError, match=r"got torch.int64"):
        convolution()(torch.zeros(1, 3, 2, 2, dtype=torch.int64))


def test_classes_and_palette_must_agree():
    with pytest.raises(ValueError, match=r"2 classes, got 1 colours"):
        SemanticModel(nn.Identity(), ("a", "b"), [(0, 0, 0)])
    with pytest.raises(ValueError, match=r"at least one class"):
        SemanticModel(nn.Identity(), ())
