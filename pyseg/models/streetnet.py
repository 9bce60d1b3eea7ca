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
from ..weights import Remote
from .facts import facts
from .semantic import SemanticModel, semantic_model

BUNDLED = Path(__file__).parent.parent / "assets" / "streetnet_camvid.safetensors"


@facts(licence="trained on CamVid, CC BY-NC 4.0: research and demonstration only")
def streetnet(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """A 2.7 M-parameter encoder-decoder for street scenes that runs well on a CPU.

    Args:
        num_classes: None = CamVid's 11. Another number keeps the trunk of the bundled weights and
            gives it new, randomly initialised heads, with a warning.
        weights: ``"default"`` or ``"bundled"`` = those that ship with pyseg, trained on CamVid (for
            research and demonstration only, see ``pyseg/assets/streetnet_camvid.md``); a path or a
            URL = a checkpoint of `pyseg train`; None = random.

    Returns:
        `SemanticModel`; ``"out"`` logits have stride 2, ``"aux8"`` and ``"aux16"`` (training mode
        only) strides 8 and 16.

    Raises:
        WeightsError: ``weights`` cannot be read or belongs to another network.

    Example:
        >>> model = streetnet(weights=None)
        >>> model.predict([torch.zeros(3, 90, 120, dtype=torch.uint8)])[0].logits.shape
        torch.Size([11, 45, 60])
    """
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
    )


class StreetNet(nn.Module):
    """Residual encoder with pooled context and a top-down decoder to stride 2.

    Dense 3x3 convolutions throughout: on CPUs they run far closer to the peak than depthwise
    ones. Encoder blocks after He et al. (2016), context after PSPNet's pooling (Zhao et al., 2017),
    decoder after FPN (Lin et al., 2017), auxiliary heads as in PSPNet.

    Args:
        num_classes: channels of the logits.
        widths: channels at strides 4, 8, 16 and 32.
        depths: residual blocks at these strides.
        width: channels of the decoder at strides 4 to 32.
        detail: channels at stride 2, of the stem and of the end of the decoder.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        widths: Sequence[int] = (48, 96, 128, 192),
        depths: Sequence[int] = (2, 2, 3, 2),
        width: int = 64,
        detail: int = 32,
    ) -> None:
        super().__init__()
        self.stem = _conv(3, detail, stride=2)
        stages = []
        channels = detail
        for out, depth in zip(widths, depths, strict=True):
            blocks = [_Block(channels, out, 2)] + [_Block(out, out, 1) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = out
        self.stages = nn.ModuleList(stages)
        self.context = nn.ModuleList(nn.Conv2d(channels, width, 1) for _ in _POOLS)
        self.lateral = nn.ModuleList(_conv(c, width, kernel=1, act=False) for c in widths)
        self.smooth = nn.ModuleList(_conv(width, width) for _ in widths)
        self.reduce = _conv(width, detail, kernel=1, act=False)
        self.refine = _conv(detail, detail)
        self.head = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(detail, num_classes, 1))
        self.head8 = nn.Conv2d(width, num_classes, 1)
        self.head16 = nn.Conv2d(width, num_classes, 1)

    offers_features = True

    def forward(self, x: Tensor, *, features: bool = False) -> dict[str, Any]:
        """[N, 3, H, W] normalised RGB to logits ``out`` [N, C, ⌈H/2⌉, ⌈W/2⌉].

        ``features``: under this name also the maps that other heads may use, of the decoder at
        strides 2, 4 and 8.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        fine = self.stem(x)
        levels = []
        x = fine
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
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
        top = self.refine(F.relu(fine + _resize(self.reduce(top), fine)))
        if features:
            outputs["features"] = (top, coarse[2], coarse[1])
        return {"out": self.head(top), **outputs}


_POOLS = (1, 3)  # cells per side of the pooled context


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs, stride=stride)
        self.second = _conv(outputs, outputs, act=False)
        norm = self.second[1]
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.zeros_(norm.weight)  # a block starts as the identity
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            # Pooling before the 1x1 keeps every pixel; a strided 1x1 would drop three of four.
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False),
                _conv(inputs, outputs, kernel=1, act=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


def _conv(
    inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, act: bool = True
) -> nn.Sequential:
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if act else []))


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)
