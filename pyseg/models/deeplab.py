"""DeepLab v1, v2 and v3+; v3 is torchvision's (torchvision.py).

Sources: v1, Chen, Papandreou, Kokkinos, Murphy & Yuille, "Semantic image segmentation with deep
convolutional nets and fully connected CRFs", ICLR 2015, its LargeFOV variant; v2, the same authors,
"DeepLab: Semantic image segmentation with deep convolutional nets, atrous convolution, and fully
connected CRFs", PAMI 2018; v3+, Chen, Zhu, Papandreou, Schroff & Adam, "Encoder-decoder with atrous
separable convolution for semantic image segmentation", ECCV 2018.

The CRFs of v1 and v2 are refiners: ``"deeplab_v1+crf_deeplab_v1"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vgg

from ..errors import require
from ..weights import Remote
from .backbones import Trunk, dilate, published_weights, voc_classes
from .facts import IMAGENET_LICENCE, facts
from .semantic import SemanticModel, semantic_model, with_options

V1_PAPER = (
    "Chen, Papandreou, Kokkinos, Murphy & Yuille, Semantic image segmentation with deep "
    "convolutional nets and fully connected CRFs, ICLR 2015"
)
V2_PAPER = (
    "Chen, Papandreou, Kokkinos, Murphy & Yuille, DeepLab: Semantic image segmentation with deep "
    "convolutional nets, atrous convolution, and fully connected CRFs, PAMI 2018"
)
V3PLUS_PAPER = (
    "Chen, Zhu, Papandreou, Schroff & Adam, Encoder-decoder with atrous separable convolution for "
    "semantic image segmentation, ECCV 2018"
)

V1_RATES = (12,)
V2_RATES = (6, 12, 18, 24)
V2_SCALES = (1.0, 0.75, 0.5)

V3PLUS_CITYSCAPES = (
    "mIoU",
    "Cityscapes val, output stride 8, 80 000 iterations",
    "OpenMMLab's mmsegmentation",
)

V3PLUS_OPTIONS = """
    A small decoder joins the pyramid of dilated convolutions with features at stride 4, so that
    logits have stride 4. Its convolutions of 3x3 are separable, one before and one after joining,
    as in segmentation-models-pytorch, whose checkpoints load; the paper has both after it.

    Args:
        output_stride: of the backbone: 16, or 8, which is finer and three times the work.
        num_classes: None = 21, PASCAL VOC's and the background.
        weights: nothing is published, so that ``"default"`` is an error that says so; a name that
            the error lists = torchvision's classifier as the backbone to start training from, the
            rest random; a path or a URL = such a file (timm's for Xception), a checkpoint of
            segmentation-models-pytorch's ``DeepLabV3Plus`` with the same ResNet, or one of
            `pyseg train`; None = random.

    Raises:
        ValueError: ``num_classes`` below 1, or another ``output_stride``.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """


@facts(paper=V1_PAPER, licence=IMAGENET_LICENCE)
def deeplab_v1(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """DeepLab v1 (Chen et al., 2015), LargeFOV: a dilated VGG-16; logits at stride 8.

    The first fully connected layer is a 3x3 convolution with a dilation of 12. Its paper refines
    the result by a dense CRF: ``"deeplab_v1+crf_deeplab_v1"``.

    Args:
        num_classes: None = 21, PASCAL VOC's and the background.
        weights: nothing is published, so that ``"default"`` is an error that says so;
            ``"IMAGENET1K_V1"`` = torchvision's VGG-16 to start training from, with every fourth
            filter of its fully connected layers and nine of their 49 taps, as in the paper; a path
            or a URL = such a file, or a checkpoint of `pyseg train`; None = random.

    Raises:
        ValueError: ``num_classes`` below 1.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.

    Example:
        >>> pyseg.build("deeplab_v1+crf_deeplab_v1", weights=None)
    """
    network = partial(_vgg16, rates=V1_RATES, scales=(1.0,))
    return _vgg_model("deeplab_v1", network, V1_RATES, num_classes, weights)


@facts(paper=V2_PAPER, licence=IMAGENET_LICENCE)
def deeplab_v2_vgg16(
    *,
    scales: Sequence[float] = (1.0,),
    num_classes: int | None = None,
    weights: str | Path | None = "default",
) -> SemanticModel:
    """DeepLab v2 (Chen et al., 2018) with VGG-16 and ASPP-L; logits at stride 8.

    Args:
        scales: of the image that the network sees, whose logits are joined by their maximum;
            while training, each has a loss of its own, too.
        num_classes: None = 21, PASCAL VOC's and the background.
        weights: as of ``deeplab_v1``; all four branches begin as the same fully connected layers.

    Raises:
        ValueError: ``num_classes`` below 1, or scales that are none.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """
    network = partial(_vgg16, rates=V2_RATES, scales=scales)
    return _vgg_model("deeplab_v2_vgg16", network, V2_RATES, num_classes, weights)


@facts(
    paper=V2_PAPER,
    scores=[(70.4, "mIoU", "Cityscapes test, with a CRF", "Cityscapes' benchmark")],
    licence=IMAGENET_LICENCE,
)
def deeplab_v2_resnet101(
    *,
    scales: Sequence[float] = V2_SCALES,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
) -> SemanticModel:
    """DeepLab v2 (Chen et al., 2018) with ResNet-101, ASPP and fusion of scales; stride 8.

    Its paper refines the result by a dense CRF: ``"deeplab_v2_resnet101+crf_deeplab_v2"``.

    Args:
        scales: of the image that the network sees, whose logits are joined by their maximum;
            while training, each has a loss of its own, too. ``(1.0,)`` takes half the time.
        num_classes: None = 21, PASCAL VOC's and the background.
        weights: nothing is published, so that ``"default"`` is an error that says so;
            ``"IMAGENET1K_V1"`` or ``"IMAGENET1K_V2"`` = torchvision's ResNet-101 to start training
            from; a path or a URL = such a file, or a checkpoint of `pyseg train`; None = random.

    Raises:
        ValueError: ``num_classes`` below 1, or scales that are none.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """

    def network(classes: int) -> DeepLab:
        trunk = Trunk("resnet101", 8)
        scores = [
            nn.Conv2d(trunk.widths[-1], classes, 3, padding=rate, dilation=rate)
            for rate in V2_RATES
        ]
        return DeepLab(trunk, scores, scales)

    return semantic_model(
        "deeplab_v2_resnet101",
        network,
        classes=voc_classes(),
        num_classes=num_classes,
        weights=weights,
        heads=[f"scores.{k}" for k in range(len(V2_RATES))],
        known=published_weights("resnet101"),
        convert=partial(Trunk.convert, backbone="resnet101"),
        trunk="trunk",
    )


@facts(paper=V3PLUS_PAPER, scores=[(80.09, *V3PLUS_CITYSCAPES)], licence=IMAGENET_LICENCE)
@with_options(V3PLUS_OPTIONS)
def deeplabv3plus_resnet50(
    *,
    output_stride: int = 16,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
) -> SemanticModel:
    """DeepLabv3+ (Chen et al., 2018) with ResNet-50."""
    return _v3plus("resnet50", output_stride, num_classes, weights)


@facts(paper=V3PLUS_PAPER, scores=[(80.97, *V3PLUS_CITYSCAPES)], licence=IMAGENET_LICENCE)
@with_options(V3PLUS_OPTIONS)
def deeplabv3plus_resnet101(
    *,
    output_stride: int = 16,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
) -> SemanticModel:
    """DeepLabv3+ (Chen et al., 2018) with ResNet-101."""
    return _v3plus("resnet101", output_stride, num_classes, weights)


@facts(paper=V3PLUS_PAPER, licence=IMAGENET_LICENCE)
@with_options(V3PLUS_OPTIONS)
def deeplabv3plus_mobilenet_v2(
    *,
    output_stride: int = 16,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
) -> SemanticModel:
    """DeepLabv3+ (Chen et al., 2018) with MobileNetV2."""
    return _v3plus("mobilenet_v2", output_stride, num_classes, weights)


@facts(paper=V3PLUS_PAPER, licence=IMAGENET_LICENCE)
@with_options(V3PLUS_OPTIONS)
def deeplabv3plus_mobilenet_v3_large(
    *,
    output_stride: int = 16,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
) -> SemanticModel:
    """DeepLabv3+ (Chen et al., 2018) with MobileNetV3-Large."""
    return _v3plus("mobilenet_v3_large", output_stride, num_classes, weights)


@facts(paper=V3PLUS_PAPER)
@with_options(V3PLUS_OPTIONS)
def deeplabv3plus_xception65(
    *,
    output_stride: int = 16,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
) -> SemanticModel:
    """DeepLabv3+ (Chen et al., 2018) with its modified Aligned Xception, from timm."""
    return _v3plus("xception65", output_stride, num_classes, weights)


class DeepLab(nn.Module):
    """DeepLab v1 and v2: the sum of scores at several dilations, the maximum over scales.

    Args:
        trunk: a `Trunk`, of which all ``scores`` see the last features, or one with features for
            each of them.
        scores: convolutions to logits.
        scales: of the image.

    Raises:
        ValueError: scales that are none.
    """

    def __init__(
        self, trunk: nn.Module, scores: Sequence[nn.Module], scales: Sequence[float]
    ) -> None:
        super().__init__()
        if not scales or not all(0 < scale <= 4 for scale in scales):
            raise ValueError(f"scales must be one or more numbers in (0, 4], got {scales}")
        self.trunk = trunk
        self.scores = nn.ModuleList(scores)
        self.scales = tuple(scales)
        for score in self.scores:
            assert isinstance(score, nn.Conv2d) and score.bias is not None
            nn.init.normal_(score.weight, std=0.01)
            nn.init.zeros_(score.bias)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images [N, 3, H, W] to logits ``out`` and, while training, each scale's.

        Those are ``"aux100"``, ``"aux75"``, … where there are several scales.
        """
        each = {f"aux{100 * scale:g}": self._score(images, scale) for scale in self.scales}
        first, *others = sorted(each.values(), key=lambda logits: -logits.shape[2])
        for logits in others:
            first = torch.maximum(first, F.interpolate(logits, first.shape[2:], mode="bilinear"))
        return {"out": first, **(each if self.training and others else {})}

    def _score(self, images: Tensor, scale: float) -> Tensor:
        if scale != 1:
            # Rounded (halves down) in integers, which files of models can do.
            over, under = Fraction(scale).limit_denominator(1024).as_integer_ratio()
            size = [max(1, (2 * over * n + under - 1) // (2 * under)) for n in images.shape[2:]]
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        features = self.trunk(images)
        if isinstance(self.trunk, Trunk):
            features = features[-1:] * len(self.scores)
        return sum(score(x) for score, x in zip(self.scores, features, strict=True))


class VGG16(nn.Module):
    """VGG-16 with a stride of 8; its fully connected layers once for every dilation.

    Args:
        rates: dilations of the first fully connected layer.
    """

    def __init__(self, rates: Sequence[int]) -> None:
        super().__init__()
        # Keys are torchvision's. All poolings are 3x3, the last two keep the size.
        self.features = vgg.make_layers(vgg.cfgs["D"])
        for index in (4, 9, 16):
            self.features[index] = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        for index in (23, 30):
            self.features[index] = nn.MaxPool2d(3, 1, 1)
        dilate(self.features[24:30], 2)
        # only the first version has one more pooling, an average
        self.pool = nn.AvgPool2d(3, 1, 1) if len(rates) == 1 else nn.Identity()
        self.fc6 = nn.ModuleList(
            nn.Conv2d(512, 1024, 3, padding=rate, dilation=rate) for rate in rates
        )
        self.fc7 = nn.ModuleList(nn.Conv2d(1024, 1024, 1) for _ in rates)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images [N, 3, H, W] to [N, 1024, H / 8, W / 8] for every dilation."""
        x = self.pool(self.features(images))
        outputs = []
        for fc6, fc7 in zip(self.fc6, self.fc7, strict=True):
            y = F.dropout2d(F.relu(fc6(x)), 0.5, self.training)
            outputs.append(F.dropout2d(F.relu(fc7(y)), 0.5, self.training))
        return outputs


class DeepLabV3Plus(nn.Module):
    """Pyramid of dilated convolutions on a backbone, and a decoder with features at stride 4.

    Args:
        classes: channels of the logits.
        trunk: a `Trunk`, or another with ``widths`` whose features begin at stride 4.
        rates: dilations of the pyramid.
        width: channels of all but the features at stride 4, which become 48.
    """

    def __init__(
        self, classes: int, *, trunk: nn.Module, rates: Sequence[int], width: int = 256
    ) -> None:
        super().__init__()
        self.trunk = trunk
        low, *_, top = trunk.widths  # type: ignore[union-attr, misc]
        self.branches = nn.ModuleList(
            [
                _conv(top, width),
                *(_separable(top, width, rate) for rate in rates),
                nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv(top, width)),
            ]
        )
        self.project = nn.Sequential(*_conv(len(self.branches) * width, width), nn.Dropout(0.5))
        self.smooth = _separable(width, width, 1)
        self.reduce = _conv(low, 48)
        self.refine = _separable(width + 48, width, 1)
        self.score = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, C, H / 4, W / 4].

        Raises:
            ValueError: a training step of one image.
        """
        if self.training and len(images) == 1:
            raise ValueError(
                "DeepLabv3+ normalises one pooled value per image and channel, so that it trains "
                "on batches of at least 2 images, got 1"
            )
        low, *_, top = self.trunk(images)
        *branches, pooled = [branch(top) for branch in self.branches]
        together = torch.cat([*branches, pooled.expand_as(branches[0])], 1)
        fine = self.reduce(low)
        context = F.interpolate(
            self.smooth(self.project(together)),
            fine.shape[2:],
            mode="bilinear",
            align_corners=True,
        )
        return self.score(self.refine(torch.cat([context, fine], 1)))


class Xception(nn.Module):
    """timm's Aligned Xception without its classifier.

    Args:
        name: timm's.
        stride: the largest one, 8, 16 or 32.
    """

    def __init__(self, name: str, stride: int) -> None:
        super().__init__()
        if stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {stride}")
        timm: Any = require("timm", extra="zoo")
        self.body = timm.create_model(
            name, pretrained=False, num_classes=0, global_pool="", output_stride=stride
        )
        self.widths = [self.body.feature_info[k]["num_chs"] for k in (1, -1)]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images [N, 3, H, W] to features at stride 4 and at the largest one."""
        last = len(self.body.feature_info) - 1
        return self.body.forward_intermediates(images, indices=(1, last), intermediates_only=True)


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _separable(inputs: int, outputs: int, rate: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, padding=rate, dilation=rate, groups=inputs, bias=False),
            nn.Conv2d(inputs, outputs, 1, bias=False),
        ),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _vgg16(classes: int, *, rates: Sequence[int], scales: Sequence[float]) -> DeepLab:
    return DeepLab(VGG16(rates), [nn.Conv2d(1024, classes, 1) for _ in rates], scales)


def _vgg_model(
    name: str,
    network: Callable[[int], nn.Module],
    rates: Sequence[int],
    num_classes: int | None,
    weights: str | Path | None,
) -> SemanticModel:
    return semantic_model(
        name,
        network,
        classes=voc_classes(),
        num_classes=num_classes,
        weights=weights,
        heads=[f"scores.{k}" for k in range(len(rates))],
        known=published_weights("vgg16"),
        convert=partial(_from_vgg, branches=len(rates)),
        trunk="trunk",
    )


def _from_vgg(state: dict[str, Tensor], *, branches: int) -> dict[str, Tensor]:
    """Keys of torchvision's classifier; of its fully connected layers what the paper keeps."""
    converted = {f"trunk.{k}": v for k, v in state.items() if not k.startswith("classifier.")}
    if not {"classifier.0.weight", "classifier.3.weight"} <= state.keys():
        return converted
    kept = {
        "fc6.{}.weight": state["classifier.0.weight"].view(-1, 512, 7, 7)[::4, :, ::3, ::3],
        "fc6.{}.bias": state["classifier.0.bias"][::4],
        "fc7.{}.weight": state["classifier.3.weight"][::4, ::4, None, None],
        "fc7.{}.bias": state["classifier.3.bias"][::4],
    }
    for key, value in kept.items():
        for branch in range(branches):
            converted[f"trunk.{key.format(branch)}"] = value.clone()
    return converted


# Modules of segmentation-models-pytorch's DeepLabV3Plus, and what they are here.
_SMP = {
    "encoder": "trunk.body",
    "decoder.aspp.0.convs": "branches",
    "decoder.aspp.0.project": "project",
    "decoder.aspp": "smooth",
    "decoder.block1": "reduce",
    "decoder.block2": "refine",
    "segmentation_head.0": "score",
}


def _to_v3plus(state: dict[str, Tensor], *, backbone: str) -> dict[str, Tensor]:
    if not any(key.startswith("decoder.") for key in state):
        if backbone.startswith("xception"):
            return {f"trunk.body.{k}": v for k, v in state.items() if not k.startswith("head.")}
        return Trunk.convert(state, backbone)
    converted = {}
    for key, value in state.items():
        old = next((old for old in _SMP if key.startswith(f"{old}.")), None)
        new = key if old is None else _SMP[old] + key.removeprefix(old)
        if old == "decoder.aspp":  # what follows the pyramid is its modules 1 and 2
            _, index, rest = new.split(".", 2)
            new = f"smooth.{int(index) - 1}.{rest}"
        converted[new] = value
    return converted


def _v3plus(
    backbone: str, stride: int, num_classes: int | None, weights: str | Path | None
) -> SemanticModel:
    if stride not in (8, 16):
        raise ValueError(f"output_stride must be 8 or 16, got {stride}")
    from_timm = backbone.startswith("xception")

    def network(classes: int) -> DeepLabV3Plus:
        trunk = Xception(backbone, stride) if from_timm else Trunk(backbone, stride)
        rates = [rate * 16 // stride for rate in (6, 12, 18)]
        return DeepLabV3Plus(classes, trunk=trunk, rates=rates)

    known: Mapping[str, Remote] = {} if from_timm else published_weights(backbone)
    return semantic_model(
        f"deeplabv3plus_{backbone}",
        network,
        classes=voc_classes(),
        num_classes=num_classes,
        weights=weights,
        heads=("score",),
        known=known,
        convert=partial(_to_v3plus, backbone=backbone),
        trunk="trunk",
    )
