"""Fully convolutional networks.

Source: Long, Shelhamer & Darrell, "Fully convolutional networks for semantic segmentation",
CVPR 2015, and the Caffe models that its authors published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vgg

from ..weights import Remote
from .backbones import published_weights, resnet, voc_classes
from .facts import FCN_PAPER, IMAGENET_LICENCE, facts
from .semantic import IMAGENET_MEAN, IMAGENET_STD, SemanticModel, semantic_model

Style = Literal["published", "modern"]

COARSER = {"fcn16s": "fcn32s", "fcn8s": "fcn16s"}
"""What a network's training begins with where it goes in stages, as in the paper: its weights."""

# Of the published networks: how far what they compute lies to the right of and below the image.
_CROPS = {32: 19, 16: 27, 8: 31}  # by stride: the logits
_SKIP_CROPS = {4: 5, 3: 9}  # the scores of a pooling
_ALEXNET_CROP = 18
_MEAN_OF_CAFFE = (123.68 / 255, 116.779 / 255, 103.939 / 255)


@facts(
    paper=FCN_PAPER,
    scores=[
        (59.4, "mIoU", "PASCAL VOC 2011 val", "the paper"),
        (63.6, "mIoU", "PASCAL VOC seg11valid, 736 images", "the authors' fcn.berkeleyvision.org"),
    ],
    licence=IMAGENET_LICENCE,
)
def fcn32s(
    *,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
    style: Style = "published",
) -> SemanticModel:
    """FCN-32s (Long et al., 2015): VGG-16 as a convolution, one upsampling by 32.

    Args:
        num_classes: None = 21, PASCAL VOC's and the background.
        weights: nothing is published in a format that is read here, so that ``"default"`` is an
            error that says so; ``"IMAGENET1K_V1"`` = torchvision's VGG-16, fully connected layers
            too, to start training from; a path or a URL = such a file, or a checkpoint of `pyseg
            train`; None = random.
        style: ``"published"`` = the image padded by 100 pixels, pooling that rounds up, fixed
            bilinear deconvolution and crops, logits at stride 1; ``"modern"`` = padding that keeps
            sizes and logits at the network's own stride. Both have the same weights.

    Raises:
        ValueError: ``num_classes`` below 1.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.

    Example:
        >>> model = fcn32s(weights=None)
        >>> model.predict([torch.zeros(3, 45, 61, dtype=torch.uint8)])[0].logits.shape
        torch.Size([21, 45, 61])
    """
    return _on_vgg(32, num_classes, weights, style)


@facts(
    paper=FCN_PAPER,
    scores=[
        (62.4, "mIoU", "PASCAL VOC 2011 val", "the paper"),
        (65.0, "mIoU", "PASCAL VOC seg11valid, 736 images", "the authors' fcn.berkeleyvision.org"),
    ],
    licence=IMAGENET_LICENCE,
)
def fcn16s(
    *,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
    style: Style = "published",
) -> SemanticModel:
    """FCN-16s (Long et al., 2015): FCN-32s and the scores of the fourth pooling.

    Args:
        num_classes: as `fcn32s`.
        weights: as `fcn32s`; a checkpoint of an FCN-32s is a start, too: the new scores are zeros.
        style: as `fcn32s`.

    Raises:
        ValueError: ``num_classes`` below 1.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """
    return _on_vgg(16, num_classes, weights, style)


@facts(
    paper=FCN_PAPER,
    scores=[
        (62.7, "mIoU", "PASCAL VOC 2011 val", "the paper"),
        (65.5, "mIoU", "PASCAL VOC seg11valid, 736 images", "the authors' fcn.berkeleyvision.org"),
    ],
    licence=IMAGENET_LICENCE,
)
def fcn8s(
    *,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
    style: Style = "published",
    at_once: bool = False,
) -> SemanticModel:
    """FCN-8s (Long et al., 2015): FCN-16s and the scores of the third pooling.

    `pyseg train fcn8s --staged` trains FCN-32s, FCN-16s and FCN-8s, each from the one before.

    Args:
        num_classes: as `fcn32s`.
        weights: as `fcn32s`; a checkpoint of an FCN-16s or an FCN-32s is a start, too: the new
            scores are zeros.
        style: as `fcn32s`.
        at_once: the authors' variant for training without stages: poolings count 0.01 (the fourth)
            and 0.0001 (the third) before they are scored.

    Raises:
        ValueError: ``num_classes`` below 1.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """
    return _on_vgg(8, num_classes, weights, style, at_once)


@facts(
    paper=FCN_PAPER,
    scores=[
        (39.8, "mIoU", "PASCAL VOC 2011 val", "the paper"),
        (48.0, "mIoU", "PASCAL VOC seg11valid, 736 images", "the authors' fcn.berkeleyvision.org"),
    ],
    licence=IMAGENET_LICENCE,
)
def fcn_alexnet(
    *,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
    style: Style = "published",
) -> SemanticModel:
    """FCN-AlexNet (Long et al., 2015): AlexNet as a convolution, one upsampling by 32.

    Args:
        num_classes: None = 21, PASCAL VOC's and the background.
        weights: nothing is published in a format that is read here, so that ``"default"`` is an
            error that says so; ``"IMAGENET1K_V1"`` = torchvision's AlexNet to start training from,
            in the modern style only; a path or a URL = such a file, or a checkpoint of `pyseg
            train`; None = random.
        style: ``"published"`` = Caffe's AlexNet with grouped convolutions and response
            normalisation, padding of 100, fixed bilinear deconvolution, logits at stride 1;
            ``"modern"`` = torchvision's AlexNet, which has neither groups nor normalisation, with
            padding that keeps sizes and logits at stride 32. Their weights differ.

    Raises:
        ValueError: ``num_classes`` below 1.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """
    _check_style(style)
    published = style == "published"
    return semantic_model(
        "fcn_alexnet",
        lambda count: FCNAlexNet(count, style=style),
        classes=voc_classes(),
        num_classes=num_classes,
        weights=weights,
        heads=("score",),
        known={} if published else published_weights("alexnet"),
        convert=None if published else lambda state: _from_classifier(state, ("1", "4"), 6),
        trunk="trunk",
        # Response normalisation of images in 0..255: elsewhere its constants do nothing.
        mean=_MEAN_OF_CAFFE if published else IMAGENET_MEAN,
        std=(1 / 255, 1 / 255, 1 / 255) if published else IMAGENET_STD,
    )


def _on_vgg(
    stride: int,
    num_classes: int | None,
    weights: str | Path | None,
    style: Style,
    at_once: bool = False,
) -> SemanticModel:
    _check_style(style)
    known: dict[str, Remote] = {  # those of the convolutions alone have NaN in all other layers
        name: remote
        for name, remote in published_weights("vgg16").items()
        if not name.endswith("FEATURES")
    }
    skips = [f"score_pool{level}" for level in (4, 3)]
    return semantic_model(
        f"fcn{stride}s",
        lambda count: FCNVGG(count, stride, style=style, at_once=at_once),
        classes=voc_classes(),
        num_classes=num_classes,
        weights=weights,
        heads=("score", *skips),
        known=known,
        convert=lambda state: _from_classifier(state, ("0", "3"), 7),
        trunk="trunk",
        may_lack=skips,
    )


def _check_style(style: str) -> None:
    if style not in ("published", "modern"):
        raise ValueError(f"style must be 'published' or 'modern', got {style!r}")


class FCNVGG(nn.Module):
    """VGG-16 with its fully connected layers as convolutions, and scores of up to three levels.

    Args:
        num_classes: channels of the logits.
        stride: 32, 16 or 8, that of the finest scores.
        style: see `fcn32s`.
        at_once: see `fcn8s`.
        widths: channels of VGG-16's five blocks.
        hidden: channels of its fully connected layers.
    """

    def __init__(
        self,
        num_classes: int,
        stride: int,
        *,
        style: Style = "published",
        at_once: bool = False,
        widths: tuple[int, int, int, int, int] = (64, 128, 256, 512, 512),
        hidden: int = 4096,
    ) -> None:
        super().__init__()
        self.stride, self.published = stride, style == "published"
        layers: list[str | int] = []
        for width, depth in zip(widths, (2, 2, 3, 3, 3), strict=True):
            layers += [*[width] * depth, "M"]
        features = vgg.make_layers(layers)
        for layer in features:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True  # as in Caffe
        if self.published:
            features[0].padding = (100, 100)
        padding = (0, 0, 0, 0) if self.published else (3, 3, 3, 3)
        self.trunk = _Trunk(features, widths[-1], 7, hidden, padding)
        self.score = _Scores(hidden, num_classes)
        self.scales = (0.01, 1e-4) if at_once else (1.0, 1.0)
        if stride <= 16:
            self.score_pool4 = _Scores(widths[3], num_classes)
        if stride <= 8:
            self.score_pool3 = _Scores(widths[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, C, H, W], modern: [N, C, H/s, W/s]."""
        size = x.shape[2:]
        x, levels = self.trunk(x)
        logits = self.score(x)
        for level, scale in zip((4, 3), self.scales, strict=True):
            if self.stride >= 2 ** (level + 1):
                break
            skip = getattr(self, f"score_pool{level}")(levels[level - 1] * scale)
            if self.published:
                logits = deconvolve(logits, 4, 2)
                logits = logits + _crop(skip, _SKIP_CROPS[level], logits.shape[2:])
            else:
                logits = skip + F.interpolate(logits, skip.shape[2:], mode="bilinear")
        if not self.published:
            return logits
        whole = deconvolve(logits, 2 * self.stride, self.stride)
        return _crop(whole, _CROPS[self.stride], size)


class FCNAlexNet(nn.Module):
    """AlexNet with its fully connected layers as convolutions, and their scores.

    Args:
        num_classes: channels of the logits.
        style: see `fcn_alexnet`.
        hidden: channels of the fully connected layers.
    """

    def __init__(self, num_classes: int, *, style: Style = "published", hidden: int = 4096) -> None:
        super().__init__()
        self.published = style == "published"

        def pool() -> nn.Module:
            if self.published:
                return nn.MaxPool2d(3, 2, ceil_mode=True)
            return nn.MaxPool2d(3, 2, padding=1)

        layers: list[nn.Module] = []
        inputs = 3
        for index, (outputs, kernel, groups) in enumerate(
            ((96, 11, 1), (256, 5, 2), (384, 3, 1), (384, 3, 2), (256, 3, 2))
            if self.published
            else ((64, 11, 1), (192, 5, 1), (384, 3, 1), (256, 3, 1), (256, 3, 1))
        ):
            padding = 100 if self.published and index == 0 else kernel // 2
            stride = 4 if index == 0 else 1
            layers.append(nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups))
            layers.append(nn.ReLU(inplace=True))
            if index in (0, 1, 4):
                layers.append(pool())
            if index in (0, 1) and self.published:
                layers.append(nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75))
            inputs = outputs
        # 6 is even: the larger half of what keeps sizes goes to the right and below
        around = (0, 0, 0, 0) if self.published else (2, 3, 2, 3)
        self.trunk = _Trunk(nn.Sequential(*layers), 256, 6, hidden, around)
        self.score = _Scores(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits [N, C, H, W], modern: [N, C, H/32, W/32]."""
        size = x.shape[2:]
        x, _ = self.trunk(x)
        logits = self.score(x)
        if not self.published:
            return logits
        return _crop(deconvolve(logits, 63, 32), _ALEXNET_CROP, size)


class _Trunk(nn.Module):
    """A classifier of images up to its last layer, as a convolution."""

    def __init__(
        self,
        features: nn.Sequential,
        channels: int,
        kernel: int,
        hidden: int,
        padding: tuple[int, int, int, int],
    ) -> None:
        super().__init__()
        self.features = features
        self.pad = nn.ZeroPad2d(padding)
        self.fc6 = nn.Conv2d(channels, hidden, kernel)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images [N, 3, H, W] to [N, hidden, h, w], and what each pooling gave."""
        levels = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                levels.append(x)
        x = F.dropout(F.relu(self.fc6(self.pad(x))), training=self.training)
        return F.dropout(F.relu(self.fc7(x)), training=self.training), levels


def deconvolve(x: Tensor, kernel: int, stride: int) -> Tensor:
    """The authors' fixed upsampling: bilinear, each channel by itself, nothing learned.

    Args:
        x: [N, C, h, w].
        kernel: pixels of the kernel's sides.
        stride: factor.

    Returns:
        [N, C, (h - 1) * stride + kernel, (w - 1) * stride + kernel].
    """
    half = (kernel + 1) // 2
    centre = half - 1 if kernel % 2 else half - 0.5
    line = 1 - (torch.arange(kernel, dtype=x.dtype, device=x.device) - centre).abs() / half
    weight = (line[:, None] * line).expand(x.shape[1], 1, kernel, kernel)
    return F.conv_transpose2d(x, weight, stride=stride, groups=x.shape[1])


class _Scores(nn.Conv2d):
    """A 1x1 convolution that begins as zeros, as the authors' do.

    Its bias is added by itself: with several threads on AMX, oneDNN as torch 2.14 has it writes
    past the gradient of the bias of a bfloat16 convolution from 4096 channels to few.
    """

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__(inputs, classes, 1)
        nn.init.zeros_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return F.conv2d(x, self.weight) + self.bias[:, None, None]


def _crop(x: Tensor, offset: int, size: torch.Size) -> Tensor:
    return x[:, :, offset : offset + size[0], offset : offset + size[1]]


def _from_classifier(
    state: dict[str, Tensor], layers: tuple[str, str], kernel: int
) -> dict[str, Tensor]:
    """Keys and shapes of torchvision's classifier of images; its last layer has no place here."""
    found = {}
    names = {f"classifier.{layers[0]}": "fc6", f"classifier.{layers[1]}": "fc7"}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if key.startswith("features."):
            found[f"trunk.{key}"] = value
        elif module in names:
            side = kernel if names[module] == "fc6" else 1
            if kind == "weight" and value.ndim == 2 and value.shape[1] % side**2 == 0:
                value = value.unflatten(1, (-1, side, side))
            found[f"trunk.{names[module]}.{kind}"] = value
        elif not key.startswith("classifier."):
            found[key] = value
    return found


class FCN(nn.Module):
    """A ResNet whose scores at 1/8, 1/16 and 1/32 are summed, as FCN-8s sums those of VGG.

    Args:
        backbone: ``"resnet18"`` to ``"resnet152"``.
        classes: channels of the logits.
    """

    def __init__(self, backbone: str, classes: int) -> None:
        super().__init__()
        self.body, widths = resnet(backbone)
        self.scores = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in widths[1:])

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, classes, H / 8, W / 8]."""
        body = self.body
        x = body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(images)))))
        total: Tensor | None = None
        outputs = []
        for layer in (body.layer2, body.layer3, body.layer4):
            x = layer(x)
            outputs.append(x)
        for score, output in reversed(list(zip(self.scores, outputs, strict=True))):
            logits = score(output)
            if total is not None:
                logits = logits + F.interpolate(total, logits.shape[2:], mode="bilinear")
            total = logits
        assert total is not None
        return total
