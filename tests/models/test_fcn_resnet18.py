"""FCN-ResNet18: what the conformance suite (test_conformance.py) cannot know."""

import argparse

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead

import pyseg
from pyseg.errors import LabelError, SpecError, WeightsError
from pyseg.models.fcn_resnet18 import PRESETS


def tutorial(auxiliary, outputs=21):
    """The network as pytorch-segmentation makes it of torchvision's parts."""
    torch.manual_seed(0)
    layers = {"layer4": "out", **({"layer3": "aux"} if auxiliary else {})}
    backbone = IntermediateLayerGetter(resnet18(weights=None), return_layers=layers)
    network = FCN(backbone, FCNHead(512, outputs), FCNHead(256, outputs) if auxiliary else None)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return network.eval()


def test_parameter_counts():
    with torch.device("meta"):
        network = pyseg.models.create("fcn_resnet18", weights=None).network
    auxiliary = sum(p.numel() for p in network.aux_classifier.parameters())
    assert auxiliary == 148_949
    assert sum(p.numel() for p in network.parameters()) - auxiliary == 11_769_301


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("size", [(33, 47), (64, 32)])
def test_a_checkpoint_of_the_tutorial_gives_its_outputs(tmp_path, auxiliary, size):
    network = tutorial(auxiliary)
    checkpoint = {
        "model": network.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(arch="fcn_resnet18", data="voc"),
        "arch": "fcn_resnet18",
        "num_classes": 21,
        "accuracy": 85.9,
    }
    torch.save(checkpoint, tmp_path / "model_best.pth")
    model = pyseg.models.create("fcn_resnet18", weights=str(tmp_path / "model_best.pth"))
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    with torch.no_grad():
        wanted = network(((image / 255 - mean) / std)[None])["out"][0]
    found = model.predict([image])[0].full_logits()
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_deepscene_has_5_of_the_21_outputs(tmp_path):
    network = tutorial(False)
    torch.save(network.state_dict(), tmp_path / "deepscene.pth")
    path = str(tmp_path / "deepscene.pth")
    model = pyseg.models.create("fcn_resnet18", preset="deepscene", weights=path)
    last = model.network.classifier[4]
    assert torch.equal(last.weight, network.classifier[4].weight[:5])
    assert torch.equal(last.bias, network.classifier[4].bias[:5])
    with pytest.raises(WeightsError, match="is for 21 classes, fcn_resnet18 has 6"):
        pyseg.models.create("fcn_resnet18", preset="deepscene", num_classes=6, weights=path)
    with pytest.raises(WeightsError, match="is for 21 classes, fcn_resnet18 has 5"):
        pyseg.models.create("fcn_resnet18", num_classes=5, weights=path)


def test_starts_from_torchvisions_classifier(tmp_path):
    classifier = resnet18(weights=None)
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pth")
    model = pyseg.models.create("fcn_resnet18", weights=str(tmp_path / "resnet18.pth"))
    assert torch.equal(model.network.backbone.conv1.weight, classifier.conv1.weight)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    model = pyseg.build(f"fcn_resnet18(preset='{preset}')", weights=None).model
    known = PRESETS[preset]
    assert model.classes == known.classes and model.palette == known.palette
    assert len(set(known.classes)) == len(known.classes) == (5 if preset == "deepscene" else 21)
    assert model.network.size == known.sizes[0]
    assert sorted(set(known.sources)) == list(range(len(known.classes)))  # none goes without
    result = model.predict([torch.zeros(3, 90, 40, dtype=torch.uint8)])[0]
    assert result.logits.shape[1:] == tuple(-(-side // 32) for side in known.sizes[0])
    assert result.labels.shape == (90, 40)


# By the names that the data sets give their labels.
@pytest.mark.parametrize(
    "preset, label, name",
    [
        ("cityscapes", 0, "void"),
        ("cityscapes", 7, "road"),
        ("cityscapes", 9, "road"),  # parking
        ("cityscapes", 25, "person"),  # rider
        ("cityscapes", 29, "truck"),  # caravan
        ("cityscapes", 33, "bicycle"),
        ("deepscene", 5, "vegetation"),  # void, which is trees
        ("mhp", 4, "hair"),
        ("mhp", 34, "jacket/coat"),  # coat
        ("mhp", 52, "backpack/purse/bag"),  # wallet
        ("mhp", 58, "pants"),  # other lower-body clothes
        ("voc", 20, "tvmonitor"),
        ("sun", 10, "cabinet/shelves/bookshelf/dresser"),  # bookshelf
        ("sun", 25, "picture/tv/mirror"),  # television
        ("sun", 36, "bathtub"),
        ("sun", 37, "other"),  # bag
    ],
)
def test_labels_are_remapped(preset, label, name):
    known = PRESETS[preset]
    found = known.remap(torch.tensor([[label, 255]], dtype=torch.uint8))
    assert known.classes[found[0, 0]] == name and found[0, 1] == 255


def test_remapping_is_that_of_every_label():
    for known in PRESETS.values():
        labels = torch.randint(len(known.sources), (7, 9))
        found = known.remap(labels)
        assert found.dtype == torch.uint8
        assert found.tolist() == [[known.sources[v] for v in row] for row in labels.tolist()]
        for wrong in (torch.tensor([[len(known.sources)]]), torch.tensor([[-1]])):
            with pytest.raises(LabelError, match="give its label ids"):
                known.remap(wrong)
        with pytest.raises(LabelError, match="must be integers"):
            known.remap(labels.float())


@pytest.mark.parametrize(
    "options, words",
    [
        ("preset='kitti'", "preset"),
        ("size=(3,)", r"size must be \(height, width\)"),
        ("size=(0, 5)", r"size must be \(height, width\)"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(SpecError, match=words):
        pyseg.build(f"fcn_resnet18({options})", weights=None)
