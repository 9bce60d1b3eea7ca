import pytest
import torch

import pyseg
from pyseg.errors import WeightsError

NAMES = [
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
]
SMALL = "lraspp_mobilenet_v3_large"


def original(name, **options):
    from torchvision.models import segmentation

    return getattr(segmentation, name)(weights=None, weights_backbone=None, **options)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_are_the_published_ones(name):
    from torchvision.models import segmentation

    with torch.device("meta"):
        model = pyseg.models.get(name)(weights=None)
    count = sum(p.numel() for key, p in model.named_parameters())
    enum = next(v for k, v in vars(segmentation).items() if k.lower() == f"{name}_weights")
    assert count == enum.DEFAULT.meta["num_params"]


@pytest.mark.parametrize("name", [NAMES[0], *NAMES[4:]])
def test_equals_torchvision(name, tmp_path):
    """Same weights, same output: ours is at stride, torchvision's upsampled from there."""
    options = {} if name.startswith("lraspp") else {"aux_loss": True}
    peer = original(name, num_classes=5, **options).eval()
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    ours = (
        pyseg.build(name, num_classes=5, weights=tmp_path / "peer.pth").stages[0].component.eval()
    )
    images = torch.rand(1, 3, 65, 97)
    with torch.inference_mode():
        expected = peer((images - ours.mean) / ours.std)["out"]
        logits = ours(images)["out"]
    upsampled = torch.nn.functional.interpolate(
        logits, images.shape[2:], mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(upsampled, expected)
    assert logits.shape[2] <= (65 + 7) // 8


def test_training_gives_the_auxiliary_head():
    model = pyseg.build("fcn_resnet50", num_classes=3, weights=None).stages[0].component.train()
    outputs = model(torch.rand(2, 3, 33, 33))
    assert set(outputs) == {"out", "aux"} and outputs["aux"].shape[1] == 3
    assert set(model.eval()(torch.rand(1, 3, 33, 33))) == {"out"}


def test_published_weights_offline_name_url_and_target(monkeypatch, tmp_path):
    monkeypatch.setenv("PYSEG_OFFLINE", "1")
    monkeypatch.setenv("PYSEG_CACHE", str(tmp_path))
    for weights in ("default", "DEFAULT", "COCO_WITH_VOC_LABELS_V1"):
        with pytest.raises(WeightsError, match=r"https://download\.pytorch\.org") as caught:
            pyseg.build(SMALL, weights=weights)
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(WeightsError, match="neither a file nor a known name"):
        pyseg.build(SMALL, weights="COCO_V9")


def test_published_weights_get_a_new_head_for_other_classes(monkeypatch, tmp_path):
    """The cache holds what stands for the published file; only its head is replaced."""
    from pyseg import weights

    published = original(SMALL, num_classes=21)
    torch.save(published.state_dict(), tmp_path / "published.pth")
    monkeypatch.setattr(weights, "resolve", lambda name, known: tmp_path / "published.pth")
    assert "aeroplane" in pyseg.build(SMALL).classes
    with pytest.warns(UserWarning, match="the last layer for 19 classes is random"):
        model = pyseg.build(SMALL, num_classes=19).stages[0].component
    state, source = model.state_dict(), published.state_dict()
    same = [k for k in source if torch.equal(state["network.model." + k], source[k])]
    different = set(source) - set(same)
    assert different and all("classifier" in key for key in different)


def test_checkpoints_of_other_class_counts_say_which(tmp_path):
    torch.save(original(SMALL, num_classes=7).state_dict(), tmp_path / "seven.pth")
    with pytest.raises(WeightsError, match="pass num_classes=7"):
        pyseg.build(SMALL, num_classes=9, weights=tmp_path / "seven.pth")


@pytest.mark.parametrize("name, backbone", [(NAMES[0], "resnet50"), (SMALL, "mobilenet_v3_large")])
def test_starts_from_a_backbone_that_classifies_images(name, backbone, tmp_path):
    from torchvision import models

    torch.manual_seed(1)
    source = models.get_model(backbone, weights=None, num_classes=2)
    torch.save(source.state_dict(), tmp_path / "classifier.pth")
    model = pyseg.models.get(name)(num_classes=4, weights=tmp_path / "classifier.pth")
    own = model.network.model.backbone.state_dict()
    trunk = source.features if name == SMALL else source
    expected = {k: v for k, v in trunk.state_dict().items() if not k.startswith("fc.")}
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[key], value) for key, value in expected.items())
