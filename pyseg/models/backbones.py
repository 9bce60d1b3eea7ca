"""torchvision's networks as backbones, and where torchvision publishes their weights."""

from __future__ import annotations

import copy
import importlib
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

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


def voc_classes() -> tuple[str, ...]:
    """PASCAL VOC's 20 classes after the background, as torchvision's weights name them."""
    models = importlib.import_module("torchvision.models")
    return tuple(models.get_model_weights("fcn_resnet50").DEFAULT.meta["categories"])


def convolutionalize(classifier: nn.Module, *, size: int = 224) -> nn.Module:
    """A classifier of whole images as one of every place in them: a fully convolutional network.

    Fully connected layers become convolutions with the same weights (Long et al., 2015, section
    3.1), and pooling to one value slides over the image with the extent that it has at ``size``.
    An image of that size gets one vector of scores, the classifier's own; a larger one a map of
    scores at the classifier's stride, as if the classifier had been moved over it, but for what
    padding changes at borders, and for squeeze-and-excitation, which still sees the whole image.

    Args:
        classifier: one of torchvision's that end in fully connected layers, such as AlexNet, VGG,
            ResNet, DenseNet, EfficientNet, MobileNet or ConvNeXt. It stays as it is.
        size: side of the square images that it is meant for.

    Returns:
        A module in evaluation mode, from normalised RGB [N, 3, H, W] to logits [N, C, h, w].

    Raises:
        ValueError: ``classifier`` is no such network; the message says what stands in the way.

    Example:
        >>> dense = convolutionalize(torchvision.models.vgg16())
        >>> dense(torch.zeros(1, 3, 224, 288)).shape
        torch.Size([1, 1000, 1, 3])
    """
    try:
        graph = fx.symbolic_trace(copy.deepcopy(classifier).eval())
        with torch.no_grad():
            ShapeProp(graph).propagate(torch.zeros(1, 3, size, size))
    except Exception as error:  # whatever its forward does
        raise ValueError(
            f"classifier: {type(classifier).__name__} cannot be traced for images of {size} x "
            f"{size} pixels ({type(error).__name__}: {error}); give one of torchvision's "
            "convolutional classifiers, such as vgg16"
        ) from error
    layers = [node for node in graph.graph.nodes if node.op.startswith("call_") and node.args]
    shapes = {node: _shape_of(node) for node in graph.graph.nodes}
    sources = {node: node.args[0] for node in layers}  # before any of them is replaced
    pooling = None  # the one before the fully connected layers, not those of squeeze-and-excitation
    flat: torch.Size | None = None  # [1, C, h, w] of what was flattened
    connected = 0
    for node in layers:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        source = sources[node]
        before = shapes.get(source) if isinstance(source, fx.Node) else None
        after = shapes[node]
        if isinstance(module, nn.Linear) and before is not None and len(before) == 2:
            if flat is None:
                raise _not_convolutional(classifier, f"layer {node.target} sees no flat features")
            sides = (flat[2], flat[3]) if before[1] == math.prod(flat[1:]) else (1, 1)
            graph.set_submodule(str(node.target), _as_convolution(module, sides))
            flat = torch.Size([1, module.out_features, 1, 1])
            connected += 1
        elif before is not None and after is not None and len(before) == 4 and len(after) == 2:
            # flattening, or a mean over both sides
            pooling = _pooling_before(node, graph, shapes)
            if after[1] == math.prod(before[1:]):
                flat = before
                _replace(graph, node, None)
            elif after[1] == before[1]:
                flat = torch.Size([*before[:2], 1, 1])
                _replace(graph, node, tuple(before[2:]))
            else:
                raise _not_convolutional(classifier, f"{node.target} makes {list(after)} of it")
    if not connected:
        raise _not_convolutional(classifier, "it has no fully connected layer")
    if pooling is not None:
        source = pooling.args[0]
        assert isinstance(source, fx.Node)
        whole, pooled = shapes[source], shapes[pooling]
        assert whole is not None and pooled is not None
        if pooled not in (whole, torch.Size([*whole[:2], 1, 1])):
            raise _not_convolutional(
                classifier, f"it pools {list(whole[2:])} features to {list(pooled[2:])}"
            )
        _replace(graph, pooling, None if pooled == whole else tuple(whole[2:]))
    graph.graph.lint()
    graph.recompile()
    return graph


def _shape_of(node: object) -> torch.Size | None:
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return getattr(meta, "shape", None)


def _pooling_before(
    node: fx.Node, graph: fx.GraphModule, shapes: dict[fx.Node, torch.Size | None]
) -> fx.Node | None:
    """The adaptive pooling whose values reach a flattening place by place, if there is one."""
    last = shapes[node.args[0]] if isinstance(node.args[0], fx.Node) else None
    before = node.args[0]
    while isinstance(before, fx.Node) and before.args:
        size = shapes[before]
        if size is None or last is None or size.numel() != last.numel():
            return None
        module = graph.get_submodule(str(before.target)) if before.op == "call_module" else None
        name = getattr(before.target, "__name__", "")
        if isinstance(module, nn.AdaptiveAvgPool2d) or name == "adaptive_avg_pool2d":
            return before
        before = before.args[0]
    return None


def _replace(graph: fx.GraphModule, node: fx.Node, window: tuple[int, ...] | None) -> None:
    """Puts a sliding mean over ``window`` in the place of a node, or nothing."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if window is not None:
        name = f"pool_{node.name}"
        graph.add_submodule(name, nn.AvgPool2d((window[0], window[1]), stride=1))
        with graph.graph.inserting_after(source):
            source = graph.graph.call_module(name, (source,))
    node.replace_all_uses_with(source)
    graph.graph.erase_node(node)


def _as_convolution(layer: nn.Linear, sides: tuple[int, int]) -> nn.Conv2d:
    made = nn.utils.skip_init(
        nn.Conv2d,
        layer.in_features // (sides[0] * sides[1]),
        layer.out_features,
        sides,
        bias=layer.bias is not None,
    )
    made.weight = nn.Parameter(layer.weight.detach().unflatten(1, (-1, *sides)))
    if layer.bias is not None:
        made.bias = layer.bias
    return made.eval()


def _not_convolutional(classifier: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"classifier: {type(classifier).__name__} cannot become a convolution: {reason}; give a "
        "convolutional network that ends in fully connected layers, such as vgg16"
    )
