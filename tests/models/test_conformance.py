"""`pyseg.testing.check_model` over every built-in model."""

import pytest

import pyseg
from pyseg import testing

DETECTOR = {"min_size": 24, "max_size": 32}
INSTANCES = {"num_classes": 3, "backbone": "resnet18", "channels": 32, **DETECTOR}
PANOPTIC = {"num_stuff": 5, "stuff_area": 20, **INSTANCES, "num_classes": 8}
OPTIONS = {
    "bayesian_segnet": {"samples": 2},
    "deeplab_v2_resnet101": {"scales": (1.0, 0.5)},
    "grounded_sam": {"classes": ("car", "pole")},
    "maskrcnn": INSTANCES,
    "maskrcnn_fcn": PANOPTIC,
    "maskrcnn_fcn_resnet50": PANOPTIC,
    "maskrcnn_resnet101_fpn": INSTANCES,
    "maskrcnn_resnet50_fpn": INSTANCES,
    "maskrcnn_resnet50_fpn_v2": {"min_size": 16, "max_size": 24},
    "panoptic_fpn": PANOPTIC,
    "panoptic_fpn_resnet50": PANOPTIC,
    "upsnet": PANOPTIC,
    "upsnet_resnet101_dcn": PANOPTIC,
    "upsnet_resnet50": PANOPTIC,
}
# Those that run a file of `pyseg export`: test_export.py makes such files.
FILES = {"onnx", "pt2"}
# Old names of the same factories are not checked again.
ONCE = {pyseg.models.get(name): name for name in pyseg.models.list() if name not in FILES}
# Networks of others' code that differ from a quick one by depth or by the detector's heads. Of
# those with hundreds of megabytes in fully connected layers, small ones are checked in test_fcn.py.
SLOW = {
    "deeplab_v2_resnet101",
    "deeplab_v2_vgg16",
    "deeplabv3plus_xception65",
    "fcn8s",
    "fcn_alexnet",
    "hrnet_w18_small_v2",
    "maskrcnn_resnet50_fpn_v2",
    "pspnet_resnet50",
    "segformer_b1",
    "unet_resnet50",
}
# These only differ in depth or width from a quick or slow one, built by the same function; or a
# small one is checked elsewhere (test_grounded.py).
LONG = {
    "deeplabv3_resnet101",
    "deeplabv3plus_resnet101",
    "fcn16s",
    "fcn32s",
    "fcn_resnet101",
    "grounded_sam",
    "hrnet_w18",
    "hrnet_w32",
    "hrnet_w48",
    "pspnet_resnet101",
    "segformer_b2",
    "segformer_b3",
    "segformer_b4",
    "segformer_b5",
}


def marks(name):
    return [
        mark
        for names, mark in ((SLOW, pytest.mark.slow), (LONG, pytest.mark.long))
        if name in names
    ]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=marks(name)) for name in sorted(ONCE.values())],
)
def test_conformance(name):
    testing.check_model(name, **OPTIONS.get(name, {}))


def test_bundled_weights_conform_too():
    """Weights of a real model, whose logits differ from place to place."""
    with pytest.warns(UserWarning, match="the last layer for 12 classes is random"):
        testing.check_model(trained)


def trained(*, num_classes: int | None = None):
    """streetnet as it ships."""
    return pyseg.models.get("streetnet")(num_classes=num_classes)
