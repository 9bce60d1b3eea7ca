"""What all built-in models share: names, options that are explained, keys, weights."""

import hashlib
import inspect
import re

import pytest
import torch
from torch import nn

import pyseg
from pyseg import weights as weight_files
from pyseg.errors import WeightsError
from pyseg.models.semantic import semantic_model
from pyseg.weights import Remote

# Entries of the state dict and a digest of their names and shapes: saved pipelines and checkpoints
# of earlier versions load by these.
KEYS = {
    "bayesian_segnet": (177, "5983feb472ac7cb1"),
    "deeplab_v1": (32, "e138611df805a5e0"),
    "deeplab_v2_resnet101": (632, "94149e6a8782fba3"),
    "deeplab_v2_vgg16": (50, "006893b2669e6265"),
    "deeplabv3_mobilenet_v3_large": (360, "b58470837b489ed7"),
    "deeplabv3_resnet101": (676, "00aca750158afdd2"),
    "deeplabv3_resnet50": (370, "4e026fc285f525a4"),
    "deeplabv3plus_mobilenet_v2": (367, "6cbeda7055b48361"),
    "deeplabv3plus_mobilenet_v3_large": (369, "680aaa9b4a002147"),
    "deeplabv3plus_resnet101": (685, "01557631f6efa5a5"),
    "deeplabv3plus_resnet50": (379, "dd7d7c26c20abc04"),
    "deeplabv3plus_xception65": (853, "01f8a9466ef5a2ac"),
    "fcn16s": (34, "87801f391c30fe8f"),
    "fcn32s": (32, "56c5f80411ebb54c"),
    "fcn8s": (36, "a10e3ed3e7c514b0"),
    "fcn_alexnet": (16, "1857b7e5a8360879"),
    "fcn_resnet101": (640, "0c5f94c8e1d21941"),
    "fcn_resnet18": (136, "d6f60a872c140221"),
    "fcn_resnet50": (334, "0cab37f02115c01b"),
    "fpn_efficientnet_lite0": (338, "3d7e0ca4cde3e76d"),
    "hrnet_w18": (1839, "c9abdbbc1e955401"),
    "hrnet_w18_small_v1": (435, "4413f69a22af5dde"),
    "hrnet_w18_small_v2": (873, "e8697ad50e7a10c8"),
    "hrnet_w32": (1839, "9f07a1e6d00b3748"),
    "hrnet_w48": (1839, "4797756381843a85"),
    "linknet": (206, "a9027eebe564dbce"),
    "lraspp_mobilenet_v3_large": (319, "72ffd64f90efaba5"),
    "maskrcnn_fcn_resnet50": (684, "194472cd21acee1f"),
    "maskrcnn_resnet101_fpn": (666, "ce4f379e33ed8c9f"),
    "maskrcnn_resnet50_fpn": (360, "5ddf60f9c6ab7854"),
    "maskrcnn_resnet50_fpn_v2": (432, "d8ba40beef432fde"),
    "panoptic_fpn_resnet50": (383, "6822e0e42408bc06"),
    "pspnet_mobilenet_v2": (346, "a05380f3049c0709"),
    "pspnet_resnet101": (664, "299f6069c2ad772a"),
    "pspnet_resnet50": (358, "22d8e5cee773947f"),
    "segformer_b0": (192, "876840595f93d7d2"),
    "segformer_b1": (192, "fe94e2253806a016"),
    "segformer_b2": (348, "5112f4195a11cd15"),
    "segformer_b3": (588, "3a907469627cc13a"),
    "segformer_b4": (848, "cefb8279162ff4f0"),
    "segformer_b5": (1068, "543160409eebaafc"),
    "segnet": (177, "5983feb472ac7cb1"),
    "segnet_basic": (58, "db37926daa20d44f"),
    "streetnet": (346, "c53f1f1ff06ecf8b"),
    "unet": (46, "54a3f0e41eef5ac8"),
    "unet_resnet": (278, "d014ba2c6b330155"),
    "unet_resnet50": (380, "d6e8e3afd359562e"),
    "unet_vgg16": (88, "2b1ef2d74d5c2a30"),
    "upsnet_resnet101_dcn": (740, "2b760c10d7fdbbf5"),
    "upsnet_resnet50": (370, "50a2aa73fab9e6c0"),
}
SAME = {
    "unet_resnet34": "unet_resnet",
    "maskrcnn": "maskrcnn_resnet50_fpn",
    "maskrcnn_fcn": "maskrcnn_fcn_resnet50",
    "panoptic_fpn": "panoptic_fpn_resnet50",
    "upsnet": "upsnet_resnet50",
}
# Networks of a package that keeps its own keys, and those in files of `pyseg export`.
OF_OTHERS = {"grounded_sam", "onnx", "pt2"}
UNPUBLISHED = [
    "bayesian_segnet",
    "deeplab_v1",
    "deeplab_v2_resnet101",
    "deeplab_v2_vgg16",
    "deeplabv3plus_mobilenet_v2",
    "deeplabv3plus_mobilenet_v3_large",
    "deeplabv3plus_resnet101",
    "deeplabv3plus_resnet50",
    "deeplabv3plus_xception65",
    "fcn8s",
    "fcn_alexnet",
    "fcn_resnet18",
    "hrnet_w18",
    "hrnet_w18_small_v1",
    "hrnet_w18_small_v2",
    "hrnet_w32",
    "hrnet_w48",
    "maskrcnn(backbone='resnet101')",
    "maskrcnn_fcn",
    "maskrcnn_resnet101_fpn",
    "panoptic_fpn_resnet50",
    "pspnet_mobilenet_v2",
    "pspnet_resnet101",
    "pspnet_resnet50",
    "segformer_b0",
    "segformer_b1",
    "segformer_b2",
    "segformer_b3",
    "segformer_b4",
    "segformer_b5",
    "segnet",
    "segnet_basic",
    "linknet",
    "unet",
    "unet_resnet",
    "unet_resnet50",
    "unet_vgg16",
    "upsnet",
    "upsnet_resnet101_dcn",
    "upsnet_resnet50",
]
FACTORIES = sorted({pyseg.models.get(name) for name in {*KEYS, *SAME}}, key=lambda f: f.__name__)


def test_every_name_is_tested():
    assert set(pyseg.models.list()) == {*KEYS, *SAME, *OF_OTHERS}
    for new, old in SAME.items():
        assert pyseg.models.get(new) is pyseg.models.get(old)


@pytest.mark.parametrize("name", KEYS)
def test_keys_stay_as_they_are(name):
    factory = pyseg.models.get(name)
    panoptic = "num_stuff" in inspect.signature(factory).parameters
    with torch.device("meta"):
        model = factory(weights=None, **({"num_classes": 8, "num_stuff": 5} if panoptic else {}))
    state = model.state_dict()
    text = "\n".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
    assert (len(state), hashlib.sha256(text.encode()).hexdigest()[:16]) == KEYS[name]


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
def test_help_explains_every_option(factory):
    text = inspect.getdoc(factory)
    arguments = text[text.index("Args:") :]
    for option in inspect.signature(factory).parameters:
        assert re.search(rf"^ +{option}: \S", arguments, re.MULTILINE), option
    assert inspect.signature(factory).return_annotation is not inspect.Parameter.empty


@pytest.mark.parametrize("spec", UNPUBLISHED)
def test_without_published_weights_the_default_is_refused(spec):
    name = re.escape(spec.split("(")[0].split("_resnet")[0])
    message = rf"{name}.* has no published weights.*weights=None"
    with torch.device("meta"), pytest.raises(WeightsError, match=message):
        pyseg.build(spec)


def test_the_refusal_names_what_to_start_from():
    with pytest.raises(WeightsError, match=r"'IMAGENET1K_V1' or .*'COCO_V1' to start training"):
        pyseg.build("upsnet_resnet50")
    with pytest.raises(WeightsError, match="weights='IMAGENET1K_V1' to start training"):
        pyseg.build("segnet")


# ------------------------------------------------------------------------------ semantic_model


class Small(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.ConvTranspose2d(4, classes, 2, 2)
        self.extra = nn.Conv2d(4, classes, 1)

    def forward(self, x):
        x = self.trunk(x)
        return {"out": self.head(x), **({"aux": self.extra(x)} if self.training else {})}


def convert(state):
    return {key.replace("features.", "trunk."): v for key, v in state.items() if key != "fc.weight"}


def build(tmp_path, state=None, weights=None, num_classes=None, **options):
    """A `Small` from weights.pth in the folder, which has ``state``, or that of another `Small`."""
    if state is not None:
        torch.save(state, tmp_path / "weights.pth")
    torch.manual_seed(0)
    return semantic_model(
        "small",
        Small,
        classes=("a", "b"),
        palette=((1, 2, 3), (4, 5, 6)),
        num_classes=num_classes,
        weights=tmp_path / "weights.pth" if weights is None else weights,
        heads=("head", "extra"),
        known={"V1": Remote((tmp_path / "weights.pth").as_uri())},
        default="V1",
        convert=convert,
        trunk="trunk",
        may_lack=("extra",),
        **options,
    )


def test_weights_by_name_path_and_url(tmp_path):
    source = Small(2)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    path = tmp_path / "weights.pth"
    for weights in ("default", "DEFAULT", "V1", path, str(path), path.as_uri()):
        model = build(tmp_path, weights=weights)
        assert torch.equal(model.network.head.weight, source.head.weight)
        assert model.classes == ("a", "b") and model.palette == ((1, 2, 3), (4, 5, 6))
        assert not model.training and not model.network.trunk.training
    again = build(tmp_path, model.state_dict())  # as pyseg saves it: with the prefix "network."
    assert torch.equal(again.network.trunk[0].weight, source.trunk[0].weight)
    with pytest.raises(WeightsError, match="neither a file nor a known name; did you mean 'V1'"):
        build(tmp_path, weights="V11")


def test_another_number_of_classes(tmp_path):
    source = Small(2)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    with pytest.warns(UserWarning, match=r"small: .*for 2 classes, so the last layer for 5 clas"):
        model = build(tmp_path, weights="default", num_classes=5)
    assert model.classes == tuple(f"class {i}" for i in range(5)) and len(model.palette) == 5
    assert torch.equal(model.network.trunk[0].weight, source.trunk[0].weight)
    assert model.network.head.weight.shape[1] == 5  # of a transposed convolution it is dimension 1
    with pytest.raises(WeightsError, match="is for 2 classes, small has 5; pass num_classes=2"):
        build(tmp_path, num_classes=5)
    with pytest.raises(WeightsError, match="is for 7 classes, small has 2; pass num_classes=7"):
        build(tmp_path, Small(7).state_dict())
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        build(tmp_path, num_classes=0)


def test_starts_from_a_trunk_alone(tmp_path):
    source = Small(2)
    trunk = {f"features.{key}": value for key, value in source.trunk.state_dict().items()}
    model = build(tmp_path, {**trunk, "fc.weight": torch.zeros(9, 4)}, num_classes=3)
    assert torch.equal(model.network.trunk[0].weight, source.trunk[0].weight)
    del trunk["features.0.bias"]
    with pytest.raises(WeightsError, match=r"another architecture than Small.*trunk\.0\.bias"):
        build(tmp_path, trunk)
    with pytest.raises(WeightsError, match="another architecture"):
        build(tmp_path, {"fc.weight": torch.zeros(9, 4)})


def test_what_a_checkpoint_may_lack(tmp_path):
    whole = Small(2).state_dict()
    optional = [key for key in whole if key.startswith("extra.") or key.endswith("tracked")]
    assert len(optional) == 3
    model = build(tmp_path, {key: whole[key] for key in whole if key not in optional})
    assert torch.equal(model.network.head.weight, whole["head.weight"])
    for key in set(whole) - set(optional):
        with pytest.raises(WeightsError, match=f"1 missing .{re.escape(key)}"):
            build(tmp_path, {k: v for k, v in whole.items() if k != key})
    with pytest.raises(WeightsError, match=r"1 unexpected .surplus"):
        build(tmp_path, {**whole, "surplus": torch.zeros(1)})


def test_weights_none_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "resolve", None)
    model = semantic_model(
        "small",
        Small,
        classes=("a", "b"),
        num_classes=None,
        weights=None,
        heads=("head",),
        std=(2, 2, 2),
    )
    assert model.std.flatten().tolist() == [2, 2, 2]
