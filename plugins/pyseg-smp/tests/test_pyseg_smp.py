"""pyseg-smp: outputs are the library's, and every architecture trains through pyseg."""

import pytest
import segmentation_models_pytorch as smp
import torch

import pyseg
from pyseg import testing
from pyseg.errors import SpecError, WeightsError

NAMES = sorted(name for name in pyseg.models.list("smp_*"))
SMALL = {
    "smp_segformer": {"encoder": "mit_b0"},
    "smp_dpt": {
        "encoder": "tu-vit_tiny_patch16_224",
        "decoder_intermediate_channels": (16, 32, 64, 64),
        "decoder_fusion_channels": 32,
    },
}


def make(name, **options):
    torch.manual_seed(0)
    return pyseg.models.create(name, **{"encoder": "resnet18", **SMALL.get(name, {}), **options})


def test_every_architecture_has_a_name():
    assert sorted(f"smp_{name}" for name in smp.MODEL_ARCHITECTURES_MAPPING) == NAMES


@pytest.mark.parametrize("name", ["smp_unet", "smp_fpn"])
def test_conformance(name):
    testing.check_model(name, encoder="resnet18")


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_library(name, tmp_path):
    architecture = name.removeprefix("smp_")
    torch.manual_seed(1)
    options = {"encoder": "resnet18", **SMALL.get(name, {})}
    if name == "smp_dpt":
        options["dynamic_img_size"] = True
    encoder = options.pop("encoder")
    peer = smp.create_model(architecture, encoder, encoder_weights=None, classes=4, **options)
    peer.eval()
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    model = make(name, num_classes=4, weights=tmp_path / "peer.pth")
    size = (128, 128) if name == "smp_pan" else (64, 96)
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        expected = peer(((image / 255 - mean) / std)[None])[0]
    torch.testing.assert_close(model.predict([image])[0].logits, expected)
    odd = image[:, :37, :53]
    assert model.predict([odd])[0].logits.shape == (4, 37, 53)
    outputs = model.train()(torch.stack([odd, odd]))
    outputs["out"].sum().backward()
    head = model.network.model.segmentation_head
    assert next(head.parameters()).grad.isfinite().all()
    with pytest.raises(WeightsError, match="pass num_classes=4"):
        make(name, num_classes=5, weights=tmp_path / "peer.pth")


def test_dpt_takes_images_of_any_size():
    model = make("smp_dpt", weights=None, num_classes=3)
    for size in ((224, 224), (1, 1), (37, 53), (70, 33)):
        image = torch.randint(256, (3, *size), dtype=torch.uint8)
        assert model.predict([image])[0].logits.shape == (3, *size)
    with pytest.raises(SpecError, match=r"patches are of 14 pixels.*DPT takes 8, 16 or 32"):
        make("smp_dpt", weights=None, encoder="tu-vit_small_patch14_dinov2")
    with pytest.raises(SpecError, match=r"smp_dpt\(encoder='resnet18'\).*Only Timm encoders"):
        make("smp_dpt", weights=None, encoder="resnet18")
    with pytest.raises(SpecError, match=r"smp_dpt\(encoder='tu-resnet18'\).*refuses"):
        make("smp_dpt", weights=None, encoder="tu-resnet18")


def test_normalisation_is_part_of_the_weights(tmp_path):
    model = make("smp_unet", weights=None, num_classes=2)
    model.network.normalise.mean.fill_(0.5)
    torch.save(model.state_dict(), tmp_path / "saved.pth")
    again = make("smp_unet", weights=tmp_path / "saved.pth", num_classes=2)
    assert (again.network.normalise.mean == 0.5).all()


def test_spec_options_and_refusals(monkeypatch):
    spec = "smp_unet(encoder='resnet18', decoder_channels=(64, 32, 16, 8, 8))"
    assert len(pyseg.build(spec, weights=None).classes) == 21
    with pytest.raises(WeightsError, match=r"no published weights.*weights=None"):
        pyseg.build("smp_unet(encoder='resnet18')")
    with pytest.raises(SpecError, match="'resnet19'"):
        pyseg.build("smp_unet(encoder='resnet19')", weights=None)
    with pytest.raises(
        SpecError, match=r"smp_fpn has no option 'wrong'; it has .*decoder_merge_policy"
    ):
        pyseg.build("smp_fpn(encoder='resnet18', wrong=3)", weights=None)
    with pytest.raises(SpecError, match="in_channels is not an option"):
        pyseg.build("smp_unet(encoder='resnet18', in_channels=4)", weights=None)

    def unreachable(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("pyseg_smp.get_preprocessing_params", unreachable)
    with pytest.raises(
        WeightsError, match=r"'imagenet' of encoder 'resnet18' cannot.*weights=None"
    ):
        pyseg.build("smp_unet(encoder='resnet18')", weights="imagenet")


def test_published_normalisation_is_taken(monkeypatch):
    settings = {"input_space": "RGB", "input_range": [0, 1], "mean": [0.5] * 3, "std": [0.25] * 3}
    monkeypatch.setattr("pyseg_smp.get_preprocessing_params", lambda *_: settings)
    seen = {}
    plain = smp.create_model

    def create(architecture, **options):
        seen.update(options)
        return plain(architecture, **{**options, "encoder_weights": None})

    monkeypatch.setattr(smp, "create_model", create)
    model = make("smp_unet", weights="imagenet", num_classes=2)
    assert seen["encoder_weights"] == "imagenet"
    assert (model.network.normalise.std == 0.25).all()
    monkeypatch.setitem(settings, "input_space", "BGR")
    with pytest.raises(WeightsError, match="images in BGR"):
        make("smp_unet", weights="imagenet")
