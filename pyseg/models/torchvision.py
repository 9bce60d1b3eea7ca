"""torchvision's segmentation networks, at their own stride and with their published weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .backbones import published_weights
from .facts import COCO_LICENCE, FCN_PAPER, facts
from .semantic import SemanticModel, semantic_model, with_options

_DEEPLABV3 = (
    "Chen, Papandreou, Schroff & Adam, Rethinking atrous convolution for semantic image "
    "segmentation, 2017"
)

OPTIONS = """
    Args:
        num_classes: None = 21, PASCAL VOC's and the background. Another number keeps torchvision's
            weights but for the last layer of each head, which is then random, with a warning.
        weights: ``"default"`` = torchvision's ``"COCO_WITH_VOC_LABELS_V1"``; ``"IMAGENET1K_V1"``
            or ``"IMAGENET1K_V2"`` = torchvision's backbone that was trained to classify images, the
            rest random; a path or a URL = a checkpoint of torchvision's network or of its
            classifier, or of `pyseg train`; None = random.

    Returns:
        `SemanticModel`; a training step also gives the logits of the auxiliary head, ``"aux"``,
        but for LR-ASPP, which has none.

    Raises:
        ValueError: ``num_classes`` below 1.
        WeightsError: ``weights`` cannot be found or belong to another network or number of classes.
    """


@facts(
    paper=FCN_PAPER,
    scores=[(60.5, "mIoU", "COCO val2017, VOC's classes", "torchvision")],
    licence=COCO_LICENCE,
)
@with_options(OPTIONS)
def fcn_resnet50(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """FCN (Long et al., 2015) with a dilated ResNet-50; logits at stride 8."""
    return _build("fcn_resnet50", num_classes, weights)


@facts(
    paper=FCN_PAPER,
    scores=[(63.7, "mIoU", "COCO val2017, VOC's classes", "torchvision")],
    licence=COCO_LICENCE,
)
@with_options(OPTIONS)
def fcn_resnet101(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """FCN (Long et al., 2015) with a dilated ResNet-101; logits at stride 8."""
    return _build("fcn_resnet101", num_classes, weights)


@facts(
    paper=_DEEPLABV3,
    scores=[(66.4, "mIoU", "COCO val2017, VOC's classes", "torchvision")],
    licence=COCO_LICENCE,
)
@with_options(OPTIONS)
def deeplabv3_resnet50(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """DeepLabv3 (Chen et al., 2017) with ResNet-50; logits at stride 8."""
    return _build("deeplabv3_resnet50", num_classes, weights)


@facts(
    paper=_DEEPLABV3,
    scores=[(67.4, "mIoU", "COCO val2017, VOC's classes", "torchvision")],
    licence=COCO_LICENCE,
)
@with_options(OPTIONS)
def deeplabv3_resnet101(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """DeepLabv3 (Chen et al., 2017) with ResNet-101; logits at stride 8."""
    return _build("deeplabv3_resnet101", num_classes, weights)


@facts(
    paper=_DEEPLABV3,
    scores=[(60.3, "mIoU", "COCO val2017, VOC's classes", "torchvision")],
    licence=COCO_LICENCE,
)
@with_options(OPTIONS)
def deeplabv3_mobilenet_v3_large(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """DeepLabv3 (Chen et al., 2017) with MobileNetV3-Large; logits at stride 16."""
    return _build("deeplabv3_mobilenet_v3_large", num_classes, weights)


@facts(
    paper="Howard et al., Searching for MobileNetV3, ICCV 2019",
    scores=[(57.9, "mIoU", "COCO val2017, VOC's classes", "torchvision")],
    licence=COCO_LICENCE,
)
@with_options(OPTIONS)
def lraspp_mobilenet_v3_large(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """Lite R-ASPP (Howard et al., 2019) with MobileNetV3-Large; logits at stride 8."""
    return _build("lraspp_mobilenet_v3_large", num_classes, weights)


class TorchvisionNetwork(nn.Module):
    """Backbone and heads of a torchvision network, without its upsampling to full size."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Normalised images [N, 3, H, W] to logits ``out`` and, while training, ``aux``."""
        model: Any = self.model  # a type checker sees no modules in attributes of modules
        features: Mapping[str, Tensor] = model.backbone(x)
        if "high" in features:  # LR-ASPP's head takes both of its levels
            return {"out": model.classifier(features)}
        outputs = {"out": model.classifier(features["out"])}
        if self.training and getattr(model, "aux_classifier", None) is not None:
            outputs["aux"] = model.aux_classifier(features["aux"])
        return outputs


def _build(name: str, num_classes: int | None, weights: str | Path | None) -> SemanticModel:
    models = importlib.import_module("torchvision.models")
    best = models.get_model_weights(name).DEFAULT
    lite = name.startswith("lraspp")
    backbone = name.partition("_")[2]

    def network(count: int) -> nn.Module:
        auxiliary = {} if lite else {"aux_loss": True}
        return TorchvisionNetwork(
            models.get_model(
                name, weights=None, weights_backbone=None, num_classes=count, **auxiliary
            )
        )

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        if any(key.startswith("backbone.") for key in state):
            return {f"model.{key}": value for key, value in state.items()}
        # A classifier of images: ResNets end in fc, MobileNets have features and then a classifier.
        kept = {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}
        return {f"model.backbone.{k.removeprefix('features.')}": v for k, v in kept.items()}

    heads = ("low_classifier", "high_classifier") if lite else ("4",)
    return semantic_model(
        name,
        network,
        classes=best.meta["categories"],
        num_classes=num_classes,
        weights=weights,
        heads=[f"model.classifier.{head}" for head in heads] + ["model.aux_classifier.4"],
        known=published_weights(name, backbone),
        default=best.name,
        convert=convert,
        trunk="model.backbone",
        may_lack=("model.aux_classifier",),
    )
