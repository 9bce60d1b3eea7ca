"""HRNetV2: branches of four resolutions side by side that keep exchanging what they have.

Source: Wang et al., "Deep high-resolution representation learning for visual recognition", PAMI
2020. The branches are timm's; they are joined as in the authors' segmentation networks, by bilinear
instead of nearest upsampling, which also takes images of any size.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..classes import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE
from ..errors import require
from .facts import facts
from .semantic import SemanticModel, semantic_model, with_options

PAPER = (
    "Wang et al., Deep high-resolution representation learning for visual recognition, PAMI 2020"
)
CITYSCAPES = ("mIoU", "Cityscapes val", "the authors' HRNet-Semantic-Segmentation")

OPTIONS = """
    Needs timm: ``pip install 'pyseg-toolkit[zoo]'``.

    Args:
        num_classes: None = Cityscapes' 19.
        weights: nothing is published, so that ``"default"`` is an error that says so; a path or a
            URL = a checkpoint of the authors' HRNet-Semantic-Segmentation, timm's classifier as the
            branches to start training from, or a checkpoint of `pyseg train`; None = random.

    Raises:
        ValueError: ``num_classes`` below 1.
        ImportError: timm is not installed.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """


@facts(paper=PAPER, scores=[(70.3, *CITYSCAPES)])
@with_options(OPTIONS)
def hrnet_w18_small_v1(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """HRNetV2-W18-Small-v1 (Wang et al., 2020), 1.5 M parameters; logits at stride 4."""
    return _build("hrnet_w18_small_v1", "hrnet_w18_small", num_classes, weights)


@facts(paper=PAPER, scores=[(76.2, *CITYSCAPES)])
@with_options(OPTIONS)
def hrnet_w18_small_v2(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """HRNetV2-W18-Small-v2 (Wang et al., 2020), 3.9 M parameters; logits at stride 4."""
    return _build("hrnet_w18_small_v2", "hrnet_w18_small_v2", num_classes, weights)


@facts(paper=PAPER)
@with_options(OPTIONS)
def hrnet_w18(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """HRNetV2-W18 (Wang et al., 2020), 9.6 M parameters; logits at stride 4."""
    return _build("hrnet_w18", "hrnet_w18", num_classes, weights)


@facts(paper=PAPER)
@with_options(OPTIONS)
def hrnet_w32(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """HRNetV2-W32 (Wang et al., 2020), 29.5 M parameters; logits at stride 4."""
    return _build("hrnet_w32", "hrnet_w32", num_classes, weights)


@facts(paper=PAPER, scores=[(81.1, *CITYSCAPES)])
@with_options(OPTIONS)
def hrnet_w48(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """HRNetV2-W48 (Wang et al., 2020), 65.9 M parameters; logits at stride 4."""
    return _build("hrnet_w48", "hrnet_w48", num_classes, weights)


class HRNet(nn.Module):
    """timm's four branches, brought to one size, and two 1x1 convolutions on all of them.

    Args:
        classes: channels of the logits.
        name: timm's of the network.
    """

    def __init__(self, classes: int, *, name: str) -> None:
        super().__init__()
        timm: Any = require("timm", extra="zoo")
        self.trunk = timm.create_model(
            name, pretrained=False, features_only=True, feature_location=""
        )
        for layer in self.trunk.modules():
            # doubled by number, timm's would not fit the odd sizes that strides leave
            if isinstance(layer, nn.Sequential) and isinstance(layer[-1], nn.Upsample):
                layer[-1] = nn.Identity()
        width = sum(self.trunk.feature_info.channels()[1:])
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, classes, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, C, H / 4, W / 4]."""
        first, *others = self.branches(images)
        return self.head(torch.cat([first, *(_resize(x, first) for x in others)], 1))

    def branches(self, images: Tensor) -> list[Tensor]:
        """Normalised images [N, 3, H, W] to features at strides 4, 8, 16 and 32."""
        trunk = self.trunk
        x = trunk.act1(trunk.bn1(trunk.conv1(images)))
        x = trunk.act2(trunk.bn2(trunk.conv2(x)))
        features = [trunk.layer1(x)]
        for transition, stage in (
            (trunk.transition1, trunk.stage2),
            (trunk.transition2, trunk.stage3),
            (trunk.transition3, trunk.stage4),
        ):
            last = len(features) - 1
            # a branch goes on as it is, and a new one begins with the last one's
            features = [layer(features[min(i, last)]) for i, layer in enumerate(transition)]
            for module in stage:
                features = _exchange(module, features)
        return features


def _exchange(module: Any, features: list[Tensor]) -> list[Tensor]:
    """One of timm's ``HighResolutionModule``s: each branch, and then all to all of them."""
    features = [branch(x) for branch, x in zip(module.branches, features, strict=True)]
    outputs = []
    for target, layers in zip(features, module.fuse_layers, strict=True):
        parts = [_resize(layer(x), target) for layer, x in zip(layers, features, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        outputs.append(module.fuse_act(total))
    return outputs


def _resize(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


# Parts of classifiers that have no place here.
_UNUSED = ("incre_modules.", "downsamp_modules.", "final_layer.", "classifier.", "loss.")


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the authors' segmentation networks and of classifiers, the authors' or timm's."""
    converted = {}
    for key, value in state.items():
        key = key.removeprefix("model.")
        if key.startswith("last_layer."):
            converted[key.replace("last_layer.", "head.", 1)] = value
        elif not key.startswith(_UNUSED):
            converted[f"trunk.{key}"] = value
    return converted


def _build(
    name: str, timm_name: str, num_classes: int | None, weights: str | Path | None
) -> SemanticModel:
    return semantic_model(
        name,
        partial(HRNet, name=timm_name),
        classes=CITYSCAPES_CLASSES,
        palette=CITYSCAPES_PALETTE,
        num_classes=num_classes,
        weights=weights,
        heads=("head.3",),
        convert=_convert,
        trunk="trunk",
    )
