"""torchvision's networks as backbones, and where torchvision publishes their weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

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
