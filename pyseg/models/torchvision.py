"""torchvision's segmentation networks, at their own stride and with their published weights.

``weights`` of every model here: ``"default"`` or a torchvision name such as
``"COCO_WITH_VOC_LABELS_V1"`` (21 classes; another ``num_classes`` keeps all but the last layer of
each head, which is then random), a path or a URL of a checkpoint, None = random.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import WeightsError
from .semantic import SemanticModel

VOC_CLASSES = 21


def fcn_resnet50(*, num_classes: int | None = None, weights: str | Path | None = "default"):
    """FCN (Long et al., 2015) with a dilated ResNet-50; logits at stride 8."""
    return _build("fcn_resnet50", "FCN_ResNet50_Weights", num_classes, weights)


def fcn_resnet101(*, num_classes: int | None = None, weights: str | Path | None = "default"):
    """FCN (Long et al., 2015) with a dilated ResNet-101; logits at stride 8."""
    return _build("fcn_resnet101", "FCN_ResNet101_Weights", num_classes, weights)


def deeplabv3_resnet50(*, num_classes: int | None = None, weights: str | Path | None = "default"):
    """DeepLabv3 (Chen et al., 2017) with ResNet-50; logits at stride 8."""
    return _build("deeplabv3_resnet50", "DeepLabV3_ResNet50_Weights", num_classes, weights)


def deeplabv3_resnet101(*, num_classes: int | None = None, weights: str | Path | None = "default"):
    """DeepLabv3 (Chen et al., 2017) with ResNet-101; logits at stride 8."""
    return _build("deeplabv3_resnet101", "DeepLabV3_ResNet101_Weights", num_classes, weights)


def deeplabv3_mobilenet_v3_large(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
):
    """DeepLabv3 (Chen et al., 2017) with MobileNetV3-Large; logits at stride 16."""
    return _build(
        "deeplabv3_mobilenet_v3_large", "DeepLabV3_MobileNet_V3_Large_Weights", num_classes, weights
    )


def lraspp_mobilenet_v3_large(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
):
    """Lite R-ASPP (Howard et al., 2019) with MobileNetV3-Large; logits at stride 8."""
    return _build(
        "lraspp_mobilenet_v3_large", "LRASPP_MobileNet_V3_Large_Weights", num_classes, weights
    )


class _AtStride(nn.Module):
    """Calls backbone and heads of a torchvision network without its upsampling to full size."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        model: Any = self.model  # a type checker sees no modules in attributes of modules
        features: Mapping[str, Tensor] = model.backbone(x)
        if "high" in features:  # LR-ASPP's head takes both of its levels
            return {"out": model.classifier(features)}
        outputs = {"out": model.classifier(features["out"])}
        if self.training and getattr(model, "aux_classifier", None) is not None:
            outputs["aux"] = model.aux_classifier(features["aux"])
        return outputs


def _build(
    name: str, enum_name: str, num_classes: int | None, weights: str | Path | None
) -> SemanticModel:
    from .. import weights as files

    segmentation = importlib.import_module("torchvision.models.segmentation")
    enum = getattr(segmentation, enum_name)
    count = VOC_CLASSES if num_classes is None else num_classes
    if count < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    with_aux = {} if name.startswith("lraspp") else {"aux_loss": True}
    network = getattr(segmentation, name)(
        weights=None, weights_backbone=None, num_classes=count, **with_aux
    )
    network.eval()
    classes = tuple(f"class {i}" for i in range(count))
    if count == VOC_CLASSES:
        classes = tuple(enum.DEFAULT.meta["categories"])
    model = SemanticModel(_AtStride(network), classes)
    if weights is None:
        return model
    known = {member.name: files.Remote(member.url, _digest(member.url)) for member in enum}
    known |= {str(member): remote for member, remote in zip(enum, [*known.values()], strict=True)}
    default = known[enum.DEFAULT.name]
    known["DEFAULT"] = known["default"] = default
    path = files.resolve(weights, known=known)
    published = isinstance(weights, str) and weights in known
    _load(model, files.load_state(path), path, name, count, published)
    return model


def _digest(url: str) -> str:
    """torchvision's file names end in the first digits of their sha256."""
    return Path(url).stem.rpartition("-")[2]


def _load(
    model: SemanticModel,
    state: dict[str, Tensor],
    path: Path,
    name: str,
    count: int,
    published: bool,
) -> None:
    from .. import weights as files

    own = model.state_dict()
    prefix = "network.model."  # torchvision's own checkpoints lack it, ours have it
    if not any(key.startswith(prefix) for key in state):
        state = {prefix + key: value for key, value in state.items()}
    for key in [k for k in own if k.startswith(prefix + "aux_classifier.") and k not in state]:
        state[key] = own[key]  # used in training only, and often left out of checkpoints
    heads = [
        key
        for key, value in own.items()
        if key.startswith((prefix + "classifier.", prefix + "aux_classifier."))
        and value.shape[:1] == (count,)
        and key in state
        and state[key].shape[1:] == value.shape[1:]
        and state[key].shape[0] != count
    ]
    if heads and not published:
        found = state[heads[0]].shape[0]
        raise WeightsError(
            f"weights {path} are for {found} classes, {name} was asked for {count}; pass "
            f"num_classes={found}"
        )
    if heads:
        warnings.warn(
            f"{name}: the published weights have {VOC_CLASSES} classes, so the last layer for "
            f"{count} classes is random: train it, or give weights that were",
            stacklevel=4,
        )
        state = state | {key: own[key] for key in heads}
    files.load_into(model, state, path)
