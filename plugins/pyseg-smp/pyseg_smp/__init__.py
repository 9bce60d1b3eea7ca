"""segmentation-models-pytorch's architectures as models of pyseg."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.encoders import encoders, get_preprocessing_params
from torch import Tensor, nn
from torch.nn import functional as F

from pyseg.errors import WeightsError
from pyseg.models import SemanticModel, semantic_model, voc_classes

MULTIPLE = 32  # of pixels per side: the largest stride of an encoder
MULTIPLES = {"pan": 128}  # it halves features of stride 16 three times

OPTIONS = """
    Args:
        encoder: its name in the library, such as ``"resnet34"``; ``"tu-…"`` = any of timm's.
        num_classes: None = 21, PASCAL VOC's and the background.
        weights: None = random; a name of the encoder's pretrained weights, such as ``"imagenet"``,
            from the Hugging Face hub, the decoder random; a path or a URL = a checkpoint of the
            library's network or of `pyseg train`. Nothing is published for ``"default"``, which is
            an error that says so.
        options: of the library's class, such as ``decoder_channels``.

    Raises:
        ValueError: an encoder or an option that the library does not know.
        WeightsError: ``weights`` that cannot be found or are another network's.
    """


class Network(nn.Module):
    """One of the library's networks for images of any size.

    Args:
        model: of the library.
        mean: of each channel in 0..1, as its encoder was trained.
        std: what each channel is divided by.
        multiple: of pixels per side that it needs.
    """

    def __init__(
        self, model: nn.Module, mean: list[float], std: list[float], multiple: int = MULTIPLE
    ) -> None:
        super().__init__()
        self.model = model
        self.multiple = multiple
        # Part of the weights: another encoder, or another training of it, has others.
        self.normalise = nn.Module()
        self.normalise.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.normalise.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in 0..1 to logits [N, C, H, W]."""
        height, width = images.shape[2:]
        x = (images - self.normalise.mean) / self.normalise.std
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        return self.model(x)[:, :, :height, :width]


def _build(
    architecture: str,
    encoder: str,
    num_classes: int | None,
    weights: str | Path | None,
    options: dict[str, Any],
) -> SemanticModel:
    name = f"smp_{architecture}"
    for taken in ("classes", "encoder_name", "encoder_weights", "in_channels", "aux_params"):
        if taken in options:
            raise ValueError(
                f"{taken} is not an option of {name}: num_classes, encoder and weights say which "
                "network it is, images have three channels, and pyseg has no classifier of images"
            )
    accepted = inspect.signature(smp.MODEL_ARCHITECTURES_MAPPING[architecture].__init__).parameters
    unknown = sorted(set(options) - set(accepted))
    # timm's encoders take options of their own; the library ignores what others do not know
    if unknown and not encoder.startswith("tu-"):
        known = [key for key in accepted if key.startswith(("decoder_", "encoder_", "psp_"))]
        raise ValueError(f"{name} has no option {unknown[0]!r}; it has {', '.join(known)}")
    published = encoders[encoder]["pretrained_settings"] if encoder in encoders else {}
    pretrained = weights if weights in published else None
    if encoder.startswith("tu-") and weights == "imagenet":
        pretrained = "imagenet"
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    if pretrained is not None:
        try:
            settings = get_preprocessing_params(encoder, pretrained)
        except Exception as error:  # whatever a hub without network raises
            raise WeightsError(
                f"weights: {pretrained!r} of encoder {encoder!r} cannot be fetched "
                f"({type(error).__name__}: {str(error).splitlines()[0]}); connect to the hub, pass "
                "weights=<path> of a checkpoint, or weights=None for random ones"
            ) from error
        if settings["input_space"] != "RGB" or settings["input_range"][1] != 1:
            raise WeightsError(
                f"weights: {pretrained!r} of encoder {encoder!r} are for images in "
                f"{settings['input_space']}, 0..{settings['input_range'][1]:g}, and pyseg has RGB "
                "in 0..1; choose other weights or another encoder"
            )
        mean, std = settings["mean"], settings["std"]
        weights = None

    if architecture == "dpt":
        # Without it timm's vision transformers take images of one size; None is timm's default.
        options = {"dynamic_img_size": True, **options}

    def network(count: int) -> Network:
        try:
            made = smp.create_model(
                architecture,
                encoder_name=encoder,
                encoder_weights=pretrained,
                classes=count,
                **options,
            )
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{name}(encoder={encoder!r}): segmentation-models-pytorch refuses: {error}"
            ) from error
        if architecture == "dpt" and MULTIPLE % (patch := made.encoder.output_stride):
            raise ValueError(
                f"{name}(encoder={encoder!r}): its patches are of {patch} pixels, and its DPT "
                "takes 8, 16 or 32: choose one such as 'tu-vit_small_patch16_224'"
            )
        return Network(made, mean, std, MULTIPLES.get(architecture, MULTIPLE))

    return semantic_model(
        name,
        network,
        classes=voc_classes(),
        num_classes=num_classes,
        weights=weights,
        heads=("model.segmentation_head.0", "model.segmentation_head.head.4"),  # .head is DPT's
        convert=lambda state: {f"model.{key}": value for key, value in state.items()},
        may_lack=("normalise",),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def _factory(architecture: str, what: str, default: str) -> Callable[..., SemanticModel]:
    def factory(
        *,
        encoder: str = default,
        num_classes: int | None = None,
        weights: str | Path | None = "default",
        **options: Any,
    ) -> SemanticModel:
        return _build(architecture, encoder, num_classes, weights, options)

    factory.__name__ = factory.__qualname__ = architecture
    factory.__module__ = __name__
    factory.__doc__ = f"segmentation-models-pytorch's {what}; logits of full size.\n{OPTIONS}"
    return factory


unet = _factory("unet", "U-Net (Ronneberger et al., 2015)", "resnet34")
unetplusplus = _factory("unetplusplus", "U-Net++ (Zhou et al., 2018)", "resnet34")
manet = _factory("manet", "MA-Net (Fan et al., 2020)", "resnet34")
linknet = _factory("linknet", "LinkNet (Chaurasia & Culurciello, 2017)", "resnet34")
fpn = _factory("fpn", "FPN (Kirillov et al., 2017)", "resnet34")
pspnet = _factory("pspnet", "PSPNet (Zhao et al., 2017), of depth 3 and undilated", "resnet34")
pan = _factory("pan", "PAN (Li et al., 2018)", "resnet34")
deeplabv3 = _factory("deeplabv3", "DeepLabv3 (Chen et al., 2017)", "resnet34")
deeplabv3plus = _factory("deeplabv3plus", "DeepLabv3+ (Chen et al., 2018)", "resnet34")
upernet = _factory("upernet", "UPerNet (Xiao et al., 2018)", "resnet34")
segformer = _factory("segformer", "SegFormer (Xie et al., 2021)", "mit_b0")
dpt = _factory("dpt", "DPT (Ranftl et al., 2021)", "tu-vit_base_patch16_224.augreg_in21k")
