"""LinkNet: a ResNet-18 and a light decoder to which the encoder's maps are added.

Source: Chaurasia & Culurciello, "LinkNet: Exploiting encoder representations for efficient semantic
segmentation", VCIP 2017.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..classes import CAMVID_CLASSES, CAMVID_PALETTE
from .backbones import published_weights, resnet
from .facts import IMAGENET_LICENCE, facts
from .semantic import SemanticModel, semantic_model


@facts(
    paper=(
        "Chaurasia & Culurciello, LinkNet: Exploiting encoder representations for efficient"
        " semantic segmentation, VCIP 2017"
    ),
    licence=IMAGENET_LICENCE,
)
def linknet(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """LinkNet (Chaurasia & Culurciello, 2017) on ResNet-18, 11.5 M parameters; logits at stride 1.

    Args:
        num_classes: None = CamVid's 11.
        weights: nothing is published in a format that is read here, so that ``"default"`` is an
            error that says so; ``"IMAGENET1K_V1"`` = torchvision's ResNet-18 as the encoder to
            start training from, the decoder random; a path or a URL = such a file, or a checkpoint
            of `pyseg train`; None = random.

    Raises:
        ValueError: ``num_classes`` below 1.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.

    Example:
        >>> model = linknet(weights=None)
        >>> model.predict([torch.zeros(3, 45, 61, dtype=torch.uint8)])[0].logits.shape
        torch.Size([11, 45, 61])
    """
    return semantic_model(
        "linknet",
        LinkNet,
        classes=CAMVID_CLASSES,
        palette=CAMVID_PALETTE,
        num_classes=num_classes,
        weights=weights,
        heads=("classifier",),
        known=published_weights("resnet18"),
        convert=lambda state: {
            f"encoder.{k}": v for k, v in state.items() if not k.startswith("fc.")
        },
        trunk="encoder",
    )


class LinkNet(nn.Module):
    """ResNet-18, four decoders whose results are added to the encoder's, and a final part.

    Args:
        num_classes: channels of the logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.encoder, widths = resnet("resnet18")
        outputs = [64, *widths[:-1]]
        self.decoder = nn.ModuleList(
            _Decoder(inputs, after, stride=2 if level else 1)
            for level, (inputs, after) in enumerate(zip(widths, outputs, strict=True))
        )
        self.up = _Up(64, 32, stride=2)
        self.final = _conv(32, 32, 3)
        self.classifier = nn.ConvTranspose2d(32, num_classes, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, C, H, W]."""
        size, body = x.shape[2:], self.encoder
        half = body.relu(body.bn1(body.conv1(x)))
        x = body.maxpool(half)
        levels = [x]
        for layer in (body.layer1, body.layer2, body.layer3, body.layer4):
            x = layer(x)
            levels.append(x)
        for decode, skip in zip(self.decoder[:0:-1], levels[-2:0:-1], strict=True):
            x = skip + decode(x, skip.shape[2:])
        x = self.decoder[0](x, levels[0].shape[2:])
        x = self.final(self.up(x, half.shape[2:]))
        return self.classifier(x)[:, :, : size[0], : size[1]]


class _Up(nn.Module):
    """The paper's full convolution: transposed, 3x3, to a size that is given."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(inputs, outputs, 3, stride, 1, stride - 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        # Even and odd sizes have the same half: computed is the even one, and cut off what is too
        # much. torch's `output_size` gives the same, and no ONNX file where sizes are free.
        return self.norm(self.conv(x)[..., : size[0], : size[1]]).relu()


class _Decoder(nn.Module):
    """1x1 to a quarter of the channels, full convolution, 1x1 to those wanted."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        narrow = inputs // 4
        self.reduce = _conv(inputs, narrow, 1)
        self.up = _Up(narrow, narrow, stride=stride)
        self.expand = _conv(narrow, outputs, 1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.expand(self.up(self.reduce(x), size))


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
