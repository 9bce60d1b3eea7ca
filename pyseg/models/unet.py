"""U-Net: an encoder and a decoder that sees what each level of the encoder saw.

Source: Ronneberger, Fischer & Brox, "U-Net: Convolutional networks for biomedical image
segmentation", MICCAI 2015. On VGG-16 the encoder is that of Iglovikov & Shvets, "TernausNet: U-Net
with VGG11 encoder pre-trained on ImageNet", 2018.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vgg

from ..classes import CAMVID_CLASSES, CAMVID_PALETTE
from .backbones import published_weights, resnet
from .facts import IMAGENET_LICENCE, facts
from .semantic import SemanticModel, semantic_model

_PAPER = (
    "Ronneberger, Fischer & Brox, U-Net: Convolutional networks for biomedical image "
    "segmentation, MICCAI 2015"
)

_MARGIN = 92  # pixels on each side that unpadded convolutions take off an image


@facts(
    paper=_PAPER,
)
def unet(
    *,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
    padding: Literal["same", "valid"] = "same",
    tile: int = 388,
) -> SemanticModel:
    """U-Net (Ronneberger et al., 2015), 31 M parameters, without normalisation; logits at stride 1.

    Args:
        num_classes: None = 2, the paper's background and cell.
        weights: nothing is published, so that ``"default"`` is an error that says so; a path or a
            URL = a checkpoint of `pyseg train`; None = random.
        padding: ``"same"`` = convolutions keep sizes; ``"valid"`` = none pads, as in the paper: the
            image is extended by 92 pixels on each side by mirroring, and more to what the poolings
            divide. Both have the same weights.
        tile: of ``"valid"``: side of the parts that larger images are predicted in, one after the
            other (the paper's overlap-tile strategy), in pixels: 16 k + 4, at least 20. Parts see
            what surrounds them, so that the result is that of the whole image. The paper's 388 are
            computed from 572.

    Raises:
        ValueError: ``num_classes`` below 1, another ``padding``, or no such ``tile``.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.

    Example:
        >>> model = unet(weights=None, padding="valid")
        >>> model.predict([torch.zeros(3, 45, 61, dtype=torch.uint8)])[0].logits.shape
        torch.Size([2, 45, 61])
    """
    if padding not in ("same", "valid"):
        raise ValueError(f"padding must be 'same' or 'valid', got {padding!r}")
    if tile < 20 or tile % 16 != 4:
        raise ValueError(f"tile must be 16 k + 4 and at least 20, such as 388, got {tile}")
    return semantic_model(
        "unet",
        lambda count: UNet(count, padded=padding == "same", tile=tile),
        classes=("background", "cell"),
        num_classes=num_classes,
        weights=weights,
        heads=("classifier",),
    )


@facts(
    paper="Iglovikov & Shvets, TernausNet: U-Net with VGG11 encoder pre-trained on ImageNet, 2018",
    licence=IMAGENET_LICENCE,
)
def unet_vgg16(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """U-Net with VGG-16 as its encoder (after TernausNet, 2018); logits at stride 1.

    Args:
        num_classes: None = CamVid's 11.
        weights: nothing is published, so that ``"default"`` is an error that says so;
            ``"IMAGENET1K_V1"`` = torchvision's VGG-16 as the encoder to start training from, the
            decoder random; a path or a URL = such a file, or a checkpoint of `pyseg train`; None =
            random.

    Raises:
        ValueError: ``num_classes`` below 1.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """
    return semantic_model(
        "unet_vgg16",
        lambda count: EncoderUNet(VGGEncoder(), count),
        classes=CAMVID_CLASSES,
        palette=CAMVID_PALETTE,
        num_classes=num_classes,
        weights=weights,
        heads=("classifier",),
        known=published_weights("vgg16"),
        convert=_from_classifier,
        trunk="encoder",
    )


@facts(
    paper=_PAPER,
    licence=IMAGENET_LICENCE,
)
def unet_resnet(
    *,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet34",
) -> SemanticModel:
    """U-Net with a ResNet as its encoder; logits at stride 1.

    Args:
        num_classes: None = CamVid's 11.
        weights: nothing is published, so that ``"default"`` is an error that says so;
            ``"IMAGENET1K_V1"`` (and V2, from ResNet-50 on) = torchvision's ResNet as the encoder to
            start training from, the decoder random; a path or a URL = such a file, a checkpoint of
            segmentation-models-pytorch's ``Unet`` on the same ResNet, or of `pyseg train`; None =
            random.
        backbone: torchvision's ResNet.

    Raises:
        ValueError: ``num_classes`` below 1, or no such ``backbone``.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """
    return _unet_resnet(f"unet_{backbone}", backbone, num_classes, weights)


@facts(
    paper=_PAPER,
    licence=IMAGENET_LICENCE,
)
def unet_resnet50(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """U-Net with ResNet-50 as its encoder; logits at stride 1.

    Args:
        num_classes: as `unet_resnet`.
        weights: as `unet_resnet`.

    Raises:
        ValueError: ``num_classes`` below 1.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """
    return _unet_resnet("unet_resnet50", "resnet50", num_classes, weights)


def _unet_resnet(
    name: str, backbone: str, num_classes: int | None, weights: str | Path | None
) -> SemanticModel:
    encoder = ResNetEncoder(backbone)  # refuses what torchvision does not have
    return semantic_model(
        name,
        lambda count: EncoderUNet(encoder, count),
        classes=CAMVID_CLASSES,
        palette=CAMVID_PALETTE,
        num_classes=num_classes,
        weights=weights,
        heads=("classifier",),
        known=published_weights(backbone),
        convert=_from_classifier,
        trunk="encoder",
    )


class UNet(nn.Module):
    """Five levels of two 3x3 convolutions each, down and up again.

    Args:
        num_classes: channels of the logits.
        inputs: channels of the images.
        padded: whether convolutions keep sizes; else images are mirrored beyond their borders.
        tile: side of the parts in which unpadded networks predict large images: 16 k + 4.
        width: channels of the first level; every next one has twice as many.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        inputs: int = 3,
        padded: bool = True,
        tile: int = 388,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.padded, self.tile = padded, tile
        widths = [width << level for level in range(5)]
        pad = int(padded)
        self.down = nn.ModuleList(
            _Double(before, after, pad)
            for before, after in zip([inputs, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(2 * after, after, 2, 2) for after in widths[-2::-1]
        )
        self.merge = nn.ModuleList(_Double(2 * after, after, pad) for after in widths[-2::-1])
        self.classifier = nn.Conv2d(width, num_classes, 1)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                # The paper's: normal, of variance 2 / the numbers that come into a neuron.
                outwards = isinstance(layer, nn.ConvTranspose2d)
                nn.init.kaiming_normal_(
                    layer.weight, mode="fan_out" if outwards else "fan_in", nonlinearity="relu"
                )
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [N, inputs, H, W] to logits [N, C, H, W]."""
        if self.padded:
            return self._whole(x)
        height, width = x.shape[2:]
        if self.training or max(height, width) <= self.tile:
            x = mirrored(x, [_reach(side) for side in (height, width)])
            return self._whole(x)[:, :, :height, :width]
        return self._tiled(x)

    def _whole(self, x: Tensor) -> Tensor:
        levels = []
        for level, block in enumerate(self.down):
            if level:
                x = F.max_pool2d(x, 2, ceil_mode=self.padded)
            x = block(x)
            if level >= 3:  # "drop-out layers at the end of the contracting path"
                x = F.dropout(x, training=self.training)
            levels.append(x)
        for up, merge, skip in zip(self.up, self.merge, levels[-2::-1], strict=True):
            x = up(x)
            if self.padded:  # of odd sizes, which were rounded up
                x = x[:, :, : skip.shape[2], : skip.shape[3]]
            x = merge(torch.cat([_middle(skip, x), x], 1))
        return self.classifier(x)

    def _tiled(self, x: Tensor) -> Tensor:
        """Overlap-tile: the logits of each part from the part and what surrounds it."""
        height, width = x.shape[2:]
        # Poolings meet the same pixels as in the whole where parts begin at multiples of 16.
        step = self.tile - self.tile % 16
        tops, lefts = range(0, height, step), range(0, width, step)
        x = mirrored(x, [starts[-1] + self.tile for starts in (tops, lefts)])
        side = self.tile + 2 * _MARGIN
        rows = []
        for top in tops:
            row = []
            for left in lefts:
                logits = self._whole(x[:, :, top : top + side, left : left + side])
                row.append(logits[:, :, : min(step, height - top), : min(step, width - left)])
            rows.append(torch.cat(row, 3))
        return torch.cat(rows, 2)


class EncoderUNet(nn.Module):
    """U-Net's decoder, with batch normalisation, on an encoder's levels.

    Args:
        encoder: images to a list of maps, each at half the size of the one before, rounded up; the
            first may have the size of the image or half of it. Its ``widths`` are their channels.
        num_classes: channels of the logits.
        widths: channels of the decoder, from coarse to fine; the finest are those that the
            logits come from, at the size of the image.
    """

    def __init__(
        self,
        encoder: VGGEncoder | ResNetEncoder,
        num_classes: int,
        *,
        widths: Sequence[int] = (256, 128, 64, 32, 16),
    ) -> None:
        super().__init__()
        self.encoder = encoder
        skips = [*encoder.widths[-2::-1], 0][: len(widths)]  # none where there is no finer level
        before = [encoder.widths[-1], *widths[:-1]]
        self.decoder = nn.ModuleList(
            _Double(inputs + skip, outputs, 1, norm=True)
            for inputs, skip, outputs in zip(before, skips, widths, strict=True)
        )
        self.classifier = nn.Conv2d(widths[-1], num_classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, C, H, W]."""
        size = x.shape[2:]
        *skips, x = self.encoder(x)
        for block in self.decoder:
            skip = skips.pop() if skips else None
            x = F.interpolate(x, size if skip is None else skip.shape[2:], mode="nearest")
            x = block(x if skip is None else torch.cat([x, skip], 1))
        return self.classifier(x)


class VGGEncoder(nn.Module):
    """VGG-16's convolutions: their maps at strides 1 to 16, and at 32, pooled."""

    widths = (64, 128, 256, 512, 512, 512)

    def __init__(self) -> None:
        super().__init__()
        self.features = vgg.make_layers(vgg.cfgs["D"])  # keys are torchvision's
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                levels.append(x)
                x = F.max_pool2d(x, 2, ceil_mode=True)
            else:
                x = layer(x)
        return [*levels, x]


class ResNetEncoder(nn.Module):
    """A ResNet's maps at strides 2 to 32."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.body, widths = resnet(backbone)
        self.widths = (64, *widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        body = self.body
        levels = [body.relu(body.bn1(body.conv1(x)))]
        x = body.maxpool(levels[0])
        for layer in (body.layer1, body.layer2, body.layer3, body.layer4):
            x = layer(x)
            levels.append(x)
        return levels


def mirrored(x: Tensor, reach: Sequence[int]) -> Tensor:
    """Images [N, C, H, W] with mirror images of themselves around, as often as is needed.

    Args:
        x: the images; border pixels are not repeated.
        reach: height and width of what is to be computed from the upper left corner on: the result
            has 92 pixels more on all four sides.
    """
    for dim, length in zip((2, 3), reach, strict=True):
        last = x.shape[dim] - 1
        index = torch.arange(-_MARGIN, length + _MARGIN, device=x.device)
        if last:
            index = index.remainder(2 * last)
            index = torch.minimum(index, 2 * last - index)
        x = x.index_select(dim, index if last else torch.zeros_like(index))
    return x


def _reach(side: int) -> int:
    """The smallest 16 k + 4 of at least ``side``: what unpadded networks can give."""
    return max(4, -(-(side - 4) // 16) * 16 + 4)


def _middle(x: Tensor, like: Tensor) -> Tensor:
    top, left = ((x.shape[d] - like.shape[d]) // 2 for d in (2, 3))
    return x[:, :, top : top + like.shape[2], left : left + like.shape[3]]


class _Double(nn.Sequential):
    """Two 3x3 convolutions with ReLU."""

    def __init__(self, inputs: int, outputs: int, padding: int, *, norm: bool = False) -> None:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers.append(nn.Conv2d(channels, outputs, 3, padding=padding, bias=not norm))
            if norm:
                layers.append(nn.BatchNorm2d(outputs))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


def _from_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of torchvision's classifiers, without their last layers, and of smp's Unet."""
    if any(key.startswith("segmentation_head.") for key in state):
        for theirs, ours in (
            (r"^encoder\.", "encoder.body."),
            (r"^decoder\.blocks\.(\d+)\.conv1\.", r"decoder.\1."),
            (r"^decoder\.blocks\.(\d+)\.conv2\.0\.", r"decoder.\1.3."),
            (r"^decoder\.blocks\.(\d+)\.conv2\.1\.", r"decoder.\1.4."),
            (r"^segmentation_head\.0\.", "classifier."),
        ):
            state = {re.sub(theirs, ours, key): value for key, value in state.items()}
        return state
    if any(key.startswith("features.") for key in state):
        kept = {k: v for k, v in state.items() if not k.startswith("classifier.")}
        return {f"encoder.{key}": value for key, value in kept.items()}
    return {f"encoder.body.{k}": v for k, v in state.items() if not k.startswith("fc.")}
