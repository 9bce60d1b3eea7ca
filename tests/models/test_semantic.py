import pytest
import torch
from torch import nn
from torch.nn import functional as F

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


# --- test-time augmentation and sliding windows -------------------------------------------------


class Gradient(nn.Module):
    """Logits that say where they are: what a variant turns has to be turned back."""

    def forward(self, x):
        return F.avg_pool2d(x, 4, ceil_mode=True, count_include_pad=False)


def plain(**options):
    return SemanticModel(Gradient(), ("r", "g", "b"), mean=(0.0,) * 3, std=(0.2,) * 3, **options)


def smooth_image(height, width):
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return (torch.stack([x, y, (x + y) / 2]) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("tta", ["flip", "flip,1", ("flip", 1.0), " flip ", ["flip", 1]])
def test_mirror_images_are_averaged_by_hand(tta):
    model, (image,) = convolution(), images((24, 32))
    logits = model(image[None])["out"]
    mirrored = model(image.flip(2)[None])["out"].flip(3)
    expected = (logits.softmax(1) + mirrored.softmax(1)) / 2
    (found,) = model.predict([image], tta=tta)
    torch.testing.assert_close(found.logits.exp(), expected[0])
    assert not torch.equal(logits, mirrored)


def test_scales_are_averaged_by_hand():
    model, (image,) = plain(), images((48, 64))
    total = 0
    for scale in (0.5, 1.0, 1.5):
        size = (round(48 * scale), round(64 * scale))
        resized = F.interpolate(
            image[None].float() / 255, size, mode="bilinear", antialias=True, align_corners=False
        )
        logits = model(resized.clamp(0, 1))["out"]
        total += F.interpolate(logits, (12, 16), mode="bilinear").softmax(1)
    (found,) = model.predict([image], tta="0.5,1,1.5")
    torch.testing.assert_close(found.logits.exp(), total[0] / 3)


@pytest.mark.parametrize("tta", ["flip", "scales", "flip,scales", "flip,0.5,1,2", "1.25", "0.75,2"])
@pytest.mark.parametrize("size", [(48, 64), (37, 53), (1, 1), (3, 200)])
def test_variants_keep_a_smooth_image_in_place(tta, size):
    """Whatever was turned and resized lies where it was: labels and shape are unchanged."""
    image = smooth_image(*size)
    model = plain()
    (expected,), (found,) = model.predict([image]), model.predict([image], tta=tta)
    assert found.logits.shape[0] == 3 and found.size == size
    if "1.25" not in tta and "0.75,2" not in tta:
        assert found.logits.shape == expected.logits.shape
    if min(size) > 8:
        difference = (found.probabilities() - expected.probabilities()).abs()
        assert difference.mean() < 0.02 and (found.labels == expected.labels).float().mean() > 0.95


def test_variants_of_many_images_in_batches_are_those_of_each():
    several = images((24, 32), (17, 31), (24, 32), (24, 32))
    model, small = convolution(), convolution(max_batch_pixels=24 * 32)
    small.load_state_dict(model.state_dict())
    together = model.predict(several, tta="flip,scales")
    for index, image in enumerate(several):
        (alone,) = small.predict([image], tta="flip,scales")
        torch.testing.assert_close(alone.logits, together[index].logits)


class Seen(nn.Module):
    """Exact sums within 2 pixels; remembers the sizes that it was given."""

    def __init__(self):
        super().__init__()
        self.sizes = []
        generator = torch.Generator().manual_seed(0)
        weight = torch.randint(-2, 3, (4, 3, 5, 5), generator=generator)
        self.weight = nn.Parameter(weight.float(), requires_grad=False)

    def forward(self, x):
        self.sizes.append(tuple(x.shape[2:]))
        return F.conv2d((x * 255).round(), self.weight, stride=2, padding=2)


def test_windows_are_blended_to_what_the_whole_image_gives():
    """Away from the ends of windows, which see no further: there the ramps are near zero."""
    model = SemanticModel(Seen(), "abcd", mean=(0.0,) * 3, std=(1.0,) * 3)
    (image,) = images((150, 211))
    (whole,) = model.predict([image])
    model.network.sizes.clear()
    (found,) = model.predict([image], crop_size=(96, 128), stride=(64, 64))
    assert found.logits.shape == whole.logits.shape == (4, 75, 106)
    assert set(model.network.sizes) == {(96, 128), (86, 128), (96, 115), (86, 115)}
    exact = (found.logits == whole.logits).float().mean()
    assert exact > 0.8
    scale = whole.logits.abs().mean()
    assert (found.logits - whole.logits).abs().mean() < 0.1 * scale


def test_one_window_is_the_whole_image():
    model, (image,) = convolution(), images((64, 96))
    (whole,), (found,) = model.predict([image]), model.predict([image], crop_size=96)
    torch.testing.assert_close(found.logits, whole.logits, rtol=0, atol=0)


def test_windows_of_networks_with_strides_that_are_not_whole():
    class Fixed(nn.Module):
        def forward(self, x):
            return F.interpolate(x, (13, 7), mode="area")

    model = SemanticModel(Fixed(), ("r", "g", "b"))
    (found,) = model.predict([smooth_image(100, 130)], crop_size=64, stride=32)
    assert found.logits.shape == (3, 100, 130) and bool(found.logits.isfinite().all())
    assert bool((found.logits.amax((1, 2)) > found.logits.amin((1, 2))).all())


def test_uncertainty_is_averaged_and_blended():
    class Doubting(nn.Module):
        def forward(self, x):
            return {"out": x, "uncertainty": x.abs().mean(1)}

    model = SemanticModel(Doubting(), ("r", "g", "b"))
    (image,) = images((70, 90))
    (plain_one,) = model.predict([image])
    for options in (
        {"tta": "flip"},
        {"crop_size": 64, "stride": 32},
        {"tta": "flip", "crop_size": 64},
    ):
        (found,) = model.predict([image], **options)
        torch.testing.assert_close(found.uncertainty, plain_one.uncertainty)


def test_a_spec_says_how_to_predict(tmp_path, one_thread):
    import pyseg

    (image,) = images((60, 80))
    plain_one, spec = pyseg.build("streetnet"), "streetnet(tta='flip,scales')"
    pipeline = pyseg.build(spec + "+crf(iterations=1)")
    assert str(pipeline) == spec + "+crf(iterations=1)"
    expected = plain_one.model.predict([image], tta="flip,scales")[0].logits
    assert not torch.equal(expected, plain_one(image).logits)
    assert torch.equal(pipeline.model.predict([image])[0].logits, expected)
    loaded = pyseg.load(pipeline.save(tmp_path / "saved"))
    assert str(loaded) == str(pipeline)
    assert torch.equal(loaded.model.predict([image])[0].logits, expected)
    windows = pyseg.models.create("segnet_basic", weights=None, crop_size=(64, 96), stride=32)
    assert windows._method.crop == (64, 96)
    names = [option.name for option in pyseg.models.describe("streetnet").options]
    assert names == ["num_classes", "weights", "tta", "crop_size", "stride"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tta": "flop"}, "tta must be of 'flip', 'scales' and numbers.*got 'flop'"),
        ({"tta": "flip,nan"}, "tta must be"),
        ({"tta": "0"}, "numbers from 0.1 to 4"),
        ({"tta": (True,)}, "tta must be"),
        ({"tta": ""}, "tta must be"),
        ({"crop_size": 100}, "crop_size must be a multiple of 32.*got 100; 96 is near"),
        ({"crop_size": 0}, r"crop_size must be a number of pixels, or \(height, width\), got 0"),
        ({"crop_size": (64, 64, 64)}, "crop_size must be"),
        ({"crop_size": 64, "stride": 96}, "stride must be 32 to crop_size, got stride=96"),
        ({"crop_size": 64, "stride": 40}, "crop_size - stride must be a multiple of 32"),
        ({"stride": 64}, "give crop_size, too"),
    ],
)
def test_wrong_ways_to_predict_are_refused(options, message):
    model = convolution()
    with pytest.raises(ValueError, match=message):
        model.predict(images((8, 8)), **options)
    with pytest.raises(ValueError, match=message):
        model.predict_with(**options)


def test_specs_with_wrong_ways_to_predict_are_refused():
    import pyseg

    with pytest.raises(PysegError, match="has no option 'ttta'; did you mean 'tta'"):
        pyseg.build("streetnet(ttta='flip')")
    with pytest.raises(PysegError, match=r"streetnet\(tta='flop'\): tta must be of"):
        pyseg.build("streetnet(tta='flop')")
    with pytest.raises(PysegError, match="option tta must be"):
        pyseg.build("streetnet(tta=3)")
    with pytest.raises(PysegError, match="has no option 'tta'"):
        pyseg.build("maskrcnn(tta='flip')", weights=None)


def test_models_that_predict_in_their_own_way_take_no_options():
    class Own(SemanticModel):
        def predict(self, images):
            return []

    model = Own(nn.Conv2d(3, 2, 1), ("a", "b"))
    assert model.predict_with() is model
    with pytest.raises(PysegError, match="Own predicts in its own way and takes no tta"):
        model.predict_with(tta="flip")
