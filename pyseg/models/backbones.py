"""torchvision's networks as backbones, and where torchvision publishes their weights."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..weights import Remote


def resnet(backbone: str) -> tuple[Any, list[int]]:
    """One of torchvision's ResNets with random weights and without its classifier.

    Args:
        backbone: ``"resnet18"`` to ``"resnet152"``.

    Returns:
        The network, and the channels of its stages ``layer1`` to ``layer4``.

    Raises:
        ValueError: torchvision has no such ResNet.
    """
    module = importlib.import_module("torchvision.models.resnet")
    if not (backbone.startswith("resnet") and hasattr(module, backbone)):
        raise ValueError(
            f"backbone must be one of torchvision's resnets, such as 'resnet50', got {backbone!r}"
        )
    body = getattr(module, backbone)(weights=None)
    body.fc = nn.Identity()
    return body, [body.inplanes >> k for k in (3, 2, 1, 0)]


def published_weights(*networks: str) -> dict[str, Remote]:
    """Where torchvision publishes weights of its ``networks``, by the names that it gives them.

    Args:
        networks: names of torchvision's, such as ``"vgg16_bn"`` or ``"fcn_resnet50"``.

    Returns:
        ``{"IMAGENET1K_V1": …}``, and the same under the enum's full name, such as
        ``"VGG16_BN_Weights.IMAGENET1K_V1"``.
    """
    models = importlib.import_module("torchvision.models")
    found: dict[str, Remote] = {}
    for network in networks:
        for member in models.get_model_weights(network):
            # torchvision's file names end in the first digits of their sha256
            remote = Remote(member.url, Path(member.url).stem.rpartition("-")[2])
            found[member.name] = found[str(member)] = remote
    return found


# Where torchvision's MobileNets change to strides 4, 8, 16 and 32, and where those end. Of
# MobileNetV2 the last convolution, which widens for the classifier, is left out, as is usual.
_MOBILENETS = {
    "mobilenet_v2": (2, 4, 7, 14, 18),
    "mobilenet_v3_large": (2, 4, 7, 13, 17),
}


class Trunk(nn.Module):
    """A torchvision classifier of images without its classifier: features at four strides.

    Args:
        backbone: ``"resnet18"`` to ``"resnet152"``, ``"mobilenet_v2"`` or ``"mobilenet_v3_large"``.
        stride: the largest one, 8, 16 or 32; the stages that would exceed it are dilated.

    Raises:
        ValueError: torchvision has no such network, or another ``stride``.
    """

    def __init__(self, backbone: str, stride: int = 32) -> None:
        super().__init__()
        if stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {stride}")
        self.body: Any
        self._ends: tuple[int, ...] = ()  # of the stages, where they are one sequence
        if backbone in _MOBILENETS:
            made = importlib.import_module("torchvision.models").get_model(backbone, weights=None)
            self._ends = _MOBILENETS[backbone]
            self.body = made.features[: self._ends[-1]]
        else:
            self.body, _ = resnet(backbone)
        for level in (2, 3):
            if (reached := 4 << level) > stride:
                dilate(self._stages()[level], reached // stride)
        # the last normalisation of a stage has as many channels as the stage
        self.widths = [
            [part for part in stage.modules() if isinstance(part, nn.BatchNorm2d)][-1].num_features
            for stage in self._stages()
        ]

    def _stages(self) -> list[nn.Module]:
        body = self.body
        if not self._ends:
            return [body.layer1, body.layer2, body.layer3, body.layer4]
        return [body[a:b] for a, b in itertools.pairwise(self._ends)]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images [N, 3, H, W] to features at strides 4, 8, 16 and 32, or ``stride``."""
        body = self.body
        if self._ends:
            x = body[: self._ends[0]](images)
        else:
            x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        outputs = []
        for stage in self._stages():
            x = stage(x)
            outputs.append(x)
        return outputs

    @staticmethod
    def convert(state: dict[str, Tensor], backbone: str) -> dict[str, Tensor]:
        """Keys of torchvision's classifier to those of a network whose ``trunk`` is a `Trunk`."""
        ends = _MOBILENETS.get(backbone)
        unused = ("fc.", "classifier.", f"features.{ends[-1]}." if ends else "fc.")
        return {
            f"trunk.body.{key.removeprefix('features.')}": value
            for key, value in state.items()
            if not key.startswith(unused)
        }


def dilate(stage: nn.Module, rate: int) -> None:
    """Takes the strides out of ``stage``'s convolutions and spreads their kernels by ``rate``."""
    for layer in stage.modules():
        if isinstance(layer, nn.Conv2d):
            layer.stride = (1, 1)
            layer.dilation = tuple(rate if size > 1 else 1 for size in layer.kernel_size)
            layer.padding = tuple(rate * (size // 2) for size in layer.kernel_size)
