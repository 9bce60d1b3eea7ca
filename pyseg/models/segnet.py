"""SegNet: an encoder whose pooling remembers where its maxima were, and a decoder that uses it.

Source: Badrinarayanan, Kendall & Cipolla, "SegNet: A deep convolutional encoder-decoder
architecture for image segmentation", PAMI 2017. SegNet-Basic has the layers of their Caffe model.
Bayesian SegNet: Kendall, Badrinarayanan & Cipolla, "Bayesian SegNet: Model uncertainty in deep
convolutional encoder-decoder architectures for scene understanding", BMVC 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vgg

from ..classes import CAMVID_CLASSES, CAMVID_PALETTE
from .backbones import published_weights
from .facts import IMAGENET_LICENCE, facts
from .semantic import SemanticModel, semantic_model

_PAPER = (
    "Badrinarayanan, Kendall & Cipolla, SegNet: A deep convolutional encoder-decoder "
    "architecture for image segmentation, PAMI 2017"
)


@facts(
    paper=_PAPER,
    scores=[
        (60.1, "mIoU", "CamVid test, 140 000 iterations", "the paper"),
        (50.0, "mIoU", "CamVid test, 40 000 iterations", "the paper"),
    ],
    licence=IMAGENET_LICENCE,
)
def segnet(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """SegNet (Badrinarayanan et al., 2017) on VGG-16 with batch normalisation; logits at stride 1.

    Args:
        num_classes: None = CamVid's 11.
        weights: nothing is published, so that ``"default"`` is an error that says so;
            ``"IMAGENET1K_V1"`` = torchvision's VGG-16 (``vgg16_bn``) as the encoder to start
            training from, the decoder random; a path or a URL = such a file, or a checkpoint of
            `pyseg train`; None = random.

    Raises:
        ValueError: ``num_classes`` below 1.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.

    Example:
        >>> model = segnet(weights=None)
        >>> model.predict([torch.zeros(3, 45, 61, dtype=torch.uint8)])[0].logits.shape
        torch.Size([11, 45, 61])
    """
    return semantic_model(
        "segnet",
        SegNet,
        classes=CAMVID_CLASSES,
        palette=CAMVID_PALETTE,
        num_classes=num_classes,
        weights=weights,
        heads=("decoder.4.2",),
        known=published_weights("vgg16_bn"),
        convert=_from_vgg,
        trunk="encoder",
    )


@facts(
    paper=_PAPER,
)
def segnet_basic(
    *, num_classes: int | None = None, weights: str | Path | None = "default"
) -> SemanticModel:
    """SegNet-Basic: four 7x7 convolutions of 64 channels down, four up; logits at stride 1.

    Args:
        num_classes: None = CamVid's 11.
        weights: nothing is published, so that ``"default"`` is an error that says so; a path or a
            URL = a checkpoint of `pyseg train`; None = random.

    Raises:
        ValueError: ``num_classes`` below 1.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """
    return semantic_model(
        "segnet_basic",
        SegNetBasic,
        classes=CAMVID_CLASSES,
        palette=CAMVID_PALETTE,
        num_classes=num_classes,
        weights=weights,
        heads=("classifier",),
        # Its response normalisation is of images in 0..255: elsewhere its constants do nothing.
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255, 1 / 255, 1 / 255),
    )


@facts(
    paper=(
        "Kendall, Badrinarayanan & Cipolla, Bayesian SegNet: Model uncertainty in deep "
        "convolutional encoder-decoder architectures for scene understanding, BMVC 2017"
    ),
    scores=[(63.1, "mIoU", "CamVid test", "the paper")],
    licence=IMAGENET_LICENCE,
)
def bayesian_segnet(
    *,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
    samples: int = 10,
) -> SemanticModel:
    """Bayesian SegNet (Kendall et al., 2017): SegNet with dropout, whose predictions are sampled.

    Dropout stays on in predictions: the logits are those of the mean probability over ``samples``
    passes, and the result's ``uncertainty`` is the probabilities' variance over these, averaged
    over the classes. The masks are drawn from fixed seeds, so that equal images have equal results.
    ``torch.compile`` works but for ``fullgraph=True``: random generators are no part of a graph.

    Args:
        num_classes: None = CamVid's 11.
        weights: as `segnet`; a checkpoint of a `segnet` fits, too, though one that was trained
            without dropout is of little use.
        samples: passes, at least 2; the paper finds that more than 6 beat a network without
            dropout, and uses 50. What comes before the first dropout is computed once.

    Raises:
        ValueError: ``num_classes`` below 1, or ``samples`` below 2.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.

    Example:
        >>> result = bayesian_segnet(weights=None).predict([image])[0]
        >>> result.uncertainty_map().save("uncertainty.png")
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    return semantic_model(
        "bayesian_segnet",
        lambda count: BayesianSegNet(count, samples=samples),
        classes=CAMVID_CLASSES,
        palette=CAMVID_PALETTE,
        num_classes=num_classes,
        weights=weights,
        heads=("decoder.4.2",),
        known=published_weights("vgg16_bn"),
        convert=_from_vgg,
        trunk="encoder",
    )


class SegNet(nn.Module):
    """VGG-16 without its classifier, and its mirror image.

    Args:
        num_classes: channels of the logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # convolution, normalisation and ReLU 13 times, and 5 poolings: keys are torchvision's
        self.encoder = vgg.make_layers(vgg.cfgs["D"], batch_norm=True)
        self.decoder = nn.ModuleList()
        for channels, outputs, depth in (
            (512, 512, 3),
            (512, 256, 3),
            (256, 128, 3),
            (128, 64, 2),
            (64, num_classes, 2),
        ):
            layers: list[nn.Module] = [_conv(channels, channels, 3) for _ in range(depth - 1)]
            last = len(self.decoder) == 4  # has no normalisation
            layers.append(
                nn.Conv2d(channels, outputs, 3, padding=1) if last else _conv(channels, outputs, 3)
            )
            self.decoder.append(nn.Sequential(*layers))
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Normalised images [N, 3, H, W] to logits [N, C, H, W]."""
        maxima: list[tuple[Tensor, torch.Size]] = []
        for layer in self.encoder:
            x = _encode(layer, x, maxima)
        for block, (indices, size) in zip(self.decoder, reversed(maxima), strict=True):
            x = block(unpool(x, indices, size))
        return x


class BayesianSegNet(SegNet):
    """SegNet with dropout of one half around its three deepest levels.

    Args:
        num_classes: channels of the logits.
        samples: passes of a prediction.
    """

    def __init__(self, num_classes: int, *, samples: int) -> None:
        super().__init__(num_classes)
        self.samples = samples
        poolings = [i for i, m in enumerate(self.encoder) if isinstance(m, nn.MaxPool2d)]
        self.certain = poolings[2] + 1  # layers of the encoder before the first dropout

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Normalised images [N, 3, H, W] to logits [N, C, H, W].

        In evaluation mode to those, ``out``, and ``uncertainty`` [N, H, W].
        """
        maxima: list[tuple[Tensor, torch.Size]] = []
        for layer in self.encoder[: self.certain]:
            x = _encode(layer, x, maxima)
        if self.training:
            return self._sample(x, maxima, F.dropout)
        mean = spread = torch.zeros((), device=x.device)
        for index in range(self.samples):
            # Its own generator: neither chance nor other threads change a prediction.
            drop = _FixedDropout(torch.Generator().manual_seed(index))
            p = self._sample(x, maxima, drop).softmax(1)
            difference = p - mean
            mean = mean + difference / (index + 1)
            spread = spread + difference * (p - mean)
        smallest = torch.finfo(mean.dtype).tiny
        return {
            "out": mean.clamp(min=smallest).log(),
            "uncertainty": (spread / self.samples).mean(1),
        }

    def _sample(
        self, x: Tensor, maxima: list[tuple[Tensor, torch.Size]], drop: Callable[[Tensor], Tensor]
    ) -> Tensor:
        maxima = [*maxima]
        x = drop(x)
        for layer in self.encoder[self.certain :]:
            x = _encode(layer, x, maxima)
            if isinstance(layer, nn.MaxPool2d):
                x = drop(x)
        for level, (block, (indices, size)) in enumerate(
            zip(self.decoder, reversed(maxima), strict=True)
        ):
            x = block(unpool(x, indices, size))
            if level < 3:
                x = drop(x)
        return x


class _FixedDropout:
    """Dropout of one half by a generator on the CPU, the same for all images of a batch."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, x: Tensor) -> Tensor:
        kept = torch.randint(2, x.shape[1:], generator=self.generator, dtype=torch.uint8)
        return x * (2 * kept).to(x)


class SegNetBasic(nn.Module):
    """Local response normalisation, four encoders, four decoders without ReLU, a 1x1.

    Args:
        num_classes: channels of the logits.
        width: channels of all other layers.
    """

    def __init__(self, num_classes: int, *, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.encoder = nn.ModuleList(_conv(3 if i == 0 else width, width, 7) for i in range(4))
        self.decoder = nn.ModuleList(_conv(width, width, 7, act=False) for _ in range(4))
        self.classifier = nn.Conv2d(width, num_classes, 1)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] in 0..255 to logits [N, C, H, W]."""
        x = self.norm(x)
        maxima = []
        for encode in self.encoder:
            x, indices, size = pool(encode(x))
            maxima.append((indices, size))
        for decode, (indices, size) in zip(self.decoder, reversed(maxima), strict=True):
            x = decode(unpool(x, indices, size))
        return self.classifier(x)


def _encode(layer: nn.Module, x: Tensor, maxima: list[tuple[Tensor, torch.Size]]) -> Tensor:
    """One layer of VGG; where it pools, ``maxima`` gets where the maxima were."""
    if not isinstance(layer, nn.MaxPool2d):
        return layer(x)
    x, indices, size = pool(x)
    maxima.append((indices, size))
    return x


def pool(x: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
    """Largest of every 2 x 2 cell of ``x`` [N, C, H, W], where it was, and H x W.

    Odd sizes are rounded up, as Caffe does it: what is left over at the far edges is a cell too, so
    that 360 x 480 becomes 23 x 30 after four, and one pixel stays one.
    """
    pooled, indices = F.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)
    return pooled, indices, x.shape[2:]


def unpool(x: Tensor, indices: Tensor, size: torch.Size) -> Tensor:
    """The inverse of `pool`: every value where the maximum was, in zeros of [N, C, *size]."""
    # The size must be given: torch would make 46 of 23 where `pool` was given 45.
    return F.max_unpool2d(x, indices, [2, 2], [2, 2], output_size=size)


def _conv(inputs: int, outputs: int, kernel: int, *, act: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if act else []))


def _initialise(network: nn.Module) -> None:
    """He et al.'s initialisation, which both of the authors' networks have."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)


def _from_vgg(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of torchvision's classifier; its fully connected layers have no place here."""
    return {
        key.replace("features.", "encoder.", 1): value
        for key, value in state.items()
        if not key.startswith("classifier.")
    }
