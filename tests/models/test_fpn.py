"""FPN on EfficientNet-Lite0: what the conformance suite (test_conformance.py) cannot know."""

import pytest
import torch

from pyseg.errors import WeightsError
from pyseg.models.fpn import fpn_efficientnet_lite0
from pyseg.weights import save_state

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def classifier():
    """timm's, with statistics that are not those of a fresh network."""
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def package_names(state):
    """A state dict under names of the kind that the package has, in the same order."""
    heads = {"conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    renamed = {}
    for index, (key, value) in enumerate(state.items()):
        top, _, rest = key.partition(".")
        renamed[f"{heads[top]}.{rest}" if top in heads else f"_blocks.{index}.{rest}"] = value
    return renamed


def test_parameters():
    with torch.device("meta"):
        model = fpn_efficientnet_lite0(weights=None)
    assert sum(p.numel() for p in model.network.trunk.parameters()) == 2_958_848
    # 1 x 1 from 24, 40, 112 and 320 channels, four times 3 x 3, all with normalisation; 11 classes
    pyramid = 64 * (24 + 40 + 112 + 320) + 4 * 9 * 64 * 64 + 8 * 2 * 64 + 64 * 11 + 11
    assert sum(p.numel() for p in model.parameters()) == 2_958_848 + pyramid
    assert model.classes[0] == "Sky" and len(model.palette) == 11


@pytest.mark.parametrize("named", [dict, package_names], ids=["timm", "package"])
def test_a_classifier_is_what_its_trunk_begins_with(classifier, tmp_path, named):
    path = tmp_path / "classifier.pth"
    torch.save(named(classifier.state_dict()), path)
    model = fpn_efficientnet_lite0(num_classes=5, weights=path)
    image = torch.randint(0, 256, (1, 3, 65, 97), dtype=torch.uint8)
    with torch.inference_mode():
        images = (image.float() - 127) / 128
        want = classifier.forward_features(images)
        features = model.network.trunk(images)
        assert [list(f.shape[1:]) for f in features] == [
            [24, 17, 25],
            [40, 9, 13],
            [112, 5, 7],
            [320, 3, 4],
        ]
        got = classifier.bn2(classifier.conv_head(features[-1]))
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
        seen = []
        model.network.trunk.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        logits = model(image)["out"]
    assert torch.allclose(seen[0], images, atol=1e-5)  # (x - 127) / 128, as the weights want it
    assert logits.shape == (1, 5, 17, 25)


def test_other_weights_are_refused(classifier, tmp_path):
    path = tmp_path / "other.safetensors"
    state = package_names(classifier.state_dict())
    state.pop(next(iter(state)))
    save_state(path, state)
    with pytest.raises(WeightsError, match=r"other\.safetensors"):
        fpn_efficientnet_lite0(weights=path)
    with pytest.raises(WeightsError, match="no published weights"):
        fpn_efficientnet_lite0()
