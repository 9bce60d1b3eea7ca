"""PSPNet: pooled context of the whole image, of its halves, thirds and sixths.

Source: Zhao, Shi, Qi, Wang & Jia, "Pyramid scene parsing network", CVPR 2017. The layers are those
of the authors' PyTorch code, on torchvision's ResNets, which begin with one 7x7 convolution where
theirs have three 3x3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..classes import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE
from .backbones import Trunk, published_weights
from .facts import IMAGENET_LICENCE, facts
from .semantic import SemanticModel, semantic_model, with_options

PAPER = "Zhao, Shi, Qi, Wang & Jia, Pyramid scene parsing network, CVPR 2017"

CITYSCAPES = ("mIoU", "Cityscapes val, 80 000 iterations", "OpenMMLab's mmsegmentation")

OPTIONS = """
    Args:
        num_classes: None = Cityscapes' 19.
        weights: nothing is published, so that ``"default"`` is an error that says so;
            ``"IMAGENET1K_V1"`` or ``"IMAGENET1K_V2"`` = torchvision's classifier as the backbone to
            start training from, the rest random; a path or a URL = such a file, or a checkpoint of
            `pyseg train`; None = random.

    Returns:
        `SemanticModel`; a training step, of two images at least, also gives the logits of the
        auxiliary head, ``"aux"``, whose loss has the weight 0.4 in `pyseg.train` and in the paper.

    Raises:
        ValueError: ``num_classes`` below 1.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """


@facts(paper=PAPER, scores=[(78.55, *CITYSCAPES)], licence=IMAGENET_LICENCE)
@with_options(OPTIONS)
def pspnet_resnet50(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """PSPNet (Zhao et al., 2017) with a dilated ResNet-50; logits at stride 8."""
    return _build("resnet50", num_classes, weights)


@facts(paper=PAPER, scores=[(79.76, *CITYSCAPES)], licence=IMAGENET_LICENCE)
@with_options(OPTIONS)
def pspnet_resnet101(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """PSPNet (Zhao et al., 2017) with a dilated ResNet-101; logits at stride 8."""
    return _build("resnet101", num_classes, weights)


@facts(paper=PAPER, licence=IMAGENET_LICENCE)
@with_options(OPTIONS)
def pspnet_mobilenet_v2(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """PSPNet (Zhao et al., 2017) with a dilated MobileNetV2; logits at stride 8."""
    return _build("mobilenet_v2", num_classes, weights)


class PSPNet(nn.Module):
    """A backbone of stride 8, its pyramid of pooled features, and a head on both.

    Args:
        classes: channels of the logits.
        backbone: one that `Trunk` takes.
        bins: cells per side of each pooled map.
    """

    def __init__(self, classes: int, *, backbone: str, bins: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.trunk = Trunk(backbone, 8)
        *_, middle, top = self.trunk.widths
        # together the pooled maps have as many channels as what they are pooled from
        self.pyramid = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), *_conv(top, top // len(bins), 1))
            for size in bins
        )
        width = top + top // len(bins) * len(bins)
        self.head = nn.Sequential(
            *_conv(width, 512, 3), nn.Dropout2d(0.1), nn.Conv2d(512, classes, 1)
        )
        self.auxiliary = nn.Sequential(
            *_conv(middle, 256, 3), nn.Dropout2d(0.1), nn.Conv2d(256, classes, 1)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images [N, 3, H, W] to logits ``out`` and, while training, ``aux``.

        Raises:
            ValueError: a training step of one image.
        """
        if self.training and len(images) == 1:
            raise ValueError(
                "PSPNet normalises one pooled value per image and channel, so that it trains on "
                "batches of at least 2 images, got 1"
            )
        *_, middle, top = self.trunk(images)
        pooled = [
            F.interpolate(level(top), top.shape[2:], mode="bilinear", align_corners=True)
            for level in self.pyramid
        ]
        outputs = {"out": self.head(torch.cat([top, *pooled], 1))}
        if self.training:
            outputs["aux"] = self.auxiliary(middle)
        return outputs


def _conv(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def _build(backbone: str, num_classes: int | None, weights: str | Path | None) -> SemanticModel:
    return semantic_model(
        f"pspnet_{backbone}",
        partial(PSPNet, backbone=backbone),
        classes=CITYSCAPES_CLASSES,
        palette=CITYSCAPES_PALETTE,
        num_classes=num_classes,
        weights=weights,
        heads=("head.4", "auxiliary.4"),
        known=published_weights(backbone),
        convert=partial(Trunk.convert, backbone=backbone),
        trunk="trunk",
        may_lack=("auxiliary",),
    )
