"""FCN-ResNet18 of the embedded-vision tutorial, with the classes of its five data sets.

The network is torchvision's FCN on a ResNet-18 without dilation, as NVIDIA's jetson-inference runs
it and its pytorch-segmentation trains it: 21 outputs for every data set, whose labels are put
together to so many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.fcn import FCNHead

from ..errors import LabelError
from ..image import default_palette
from ..types import VOID
from .backbones import published_weights, resnet, voc_classes
from .facts import FCN_PAPER, IMAGENET_LICENCE, facts
from .semantic import SemanticModel, semantic_model

Name = Literal["cityscapes", "deepscene", "mhp", "voc", "sun"]
OUTPUTS = 21  # of all of the tutorial's networks


@dataclass(frozen=True)
class Preset:
    """A data set as this network learns it."""

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    sizes: tuple[tuple[int, int], ...]  # (H, W) of images that networks were published for
    sources: tuple[int, ...]  # class of every label of the data set; VOID where none counts

    def remap(self, labels: Tensor) -> Tensor:
        """The data set's own labels [H, W] as classes; `VOID` stays.

        Raises:
            LabelError: labels that are neither the data set's nor `VOID`.
        """
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise LabelError(f"labels must be integers, got {labels.dtype}; convert them")
        table = torch.full((VOID + 1,), -1, dtype=torch.int16, device=labels.device)
        table[: len(self.sources)] = torch.tensor(self.sources, dtype=torch.int16)
        table[VOID] = VOID
        wide = labels.long()
        inside = (wide >= 0) & (wide <= VOID)
        found = table[torch.where(inside, wide, 0)].masked_fill(~inside, -1)
        if bool((found < 0).any()):
            strange = sorted(wide[found < 0].unique().tolist())
            raise LabelError(
                f"labels hold {strange[:5]}, and the data set's own are 0 to "
                f"{len(self.sources) - 1}: give its label ids, not train ids or colours"
            )
        return found.to(torch.uint8)


_CITYSCAPES = (
    *("void", "ego_vehicle", "ground", "road", "sidewalk", "building", "wall", "fence", "pole"),
    *("traffic_light", "traffic_sign", "vegetation", "terrain", "sky", "person", "car", "truck"),
    *("bus", "train", "motorcycle", "bicycle"),
)
_CITYSCAPES_COLOURS = (
    *((0, 0, 0), (111, 74, 0), (81, 0, 81), (128, 64, 128), (244, 35, 232), (70, 70, 70)),
    *((102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30), (220, 220, 0)),
    *((107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (0, 0, 142), (0, 0, 70)),
    *((0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)),
)
_MHP = (
    *("void", "hat/helmet/headwear", "face", "hair", "arm", "hand", "shirt", "jacket/coat"),
    *("dress/robe", "bikini/bra", "torso_skin", "pants", "shorts", "socks/stockings"),
    *("shoe/boot", "leg", "foot", "backpack/purse/bag", "sunglasses/eyewear"),
    *("other_accessory", "other_item"),
)
_SUN = (
    *("other", "wall", "floor", "cabinet/shelves/bookshelf/dresser", "bed/pillow", "chair"),
    *("sofa", "table", "door", "window", "picture/tv/mirror", "blinds/curtain", "clothes"),
    *("ceiling", "books", "fridge", "person", "toilet", "sink", "lamp", "bathtub"),
)

PRESETS: dict[str, Preset] = {
    # Cityscapes' ids 0 to 33: parking, rails, bridges and tunnels are road, riders are persons
    "cityscapes": Preset(
        _CITYSCAPES,
        _CITYSCAPES_COLOURS,
        ((256, 512), (512, 1024), (1024, 2048)),
        (
            *(0, 1, 0, 0, 2, 2, 2, 3, 4, 3, 3, 5, 6, 7, 7, 3, 3, 8, 8, 9, 10, 11, 12, 13, 14, 14),
            *(15, 16, 17, 16, 16, 18, 19, 20),
        ),
    ),
    # Freiburg forest, numbered as here and 5 = void, which in it is trees; its test split validates
    "deepscene": Preset(
        ("trail", "grass", "vegetation", "obstacle", "sky"),
        ((170, 170, 170), (0, 255, 0), (102, 102, 51), (0, 0, 0), (0, 120, 255)),
        ((320, 576), (480, 864)),
        (0, 1, 2, 3, 4, 2),
    ),
    # LV-MHP version 2, labels 0 to 58
    "mhp": Preset(
        _MHP,
        default_palette(21),
        ((320, 512), (360, 640)),
        (
            *(0, 1, 1, 2, 3, 4, 4, 5, 5, 19, 9, 7, 6, 6, 6, 8, 10, 11, 12, 12, 13, 13, 14, 14, 14),
            *(14, 14, 14, 14, 14, 15, 15, 16, 16, 7, 8, 8, 8, 8, 1, 17, 20, 20, 19, 20, 17, 17),
            *(18, 18, 19, 19, 20, 17, 19, 19, 19, 19, 6, 11),
        ),
    ),
    "voc": Preset(
        ("background", *voc_classes()[1:]),
        default_palette(21),
        ((320, 320), (320, 512)),
        tuple(range(21)),
    ),
    # SUN RGB-D's 37 classes after 0 = none
    "sun": Preset(
        _SUN,
        default_palette(21),
        ((400, 512), (512, 640)),
        (
            *(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 10, 7, 11, 7, 3, 11, 3, 4, 10, 2, 12, 13, 14, 15),
            *(10, 0, 12, 20, 0, 1, 16, 7, 17, 18, 19, 20, 0),
        ),
    ),
}
"""What the tutorial's networks know, by the names of its data sets."""


@facts(
    paper=FCN_PAPER,
    scores=[
        (83.3, "pixel accuracy", "Cityscapes, 512x256", "jetson-inference's documentation"),
        (96.4, "pixel accuracy", "DeepScene, 576x320", "jetson-inference's documentation"),
        (
            86.5,
            "pixel accuracy",
            "Multi-Human Parsing, 512x320",
            "jetson-inference's documentation",
        ),
        (85.9, "pixel accuracy", "PASCAL VOC, 320x320", "jetson-inference's documentation"),
        (64.3, "pixel accuracy", "SUN RGB-D, 512x400", "jetson-inference's documentation"),
    ],
    licence=IMAGENET_LICENCE,
)
def fcn_resnet18(
    *,
    preset: Name | None = None,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
    size: Sequence[int] | None = None,
) -> SemanticModel:
    """FCN-ResNet18 of NVIDIA's jetson-inference; logits at stride 32.

    Args:
        preset: ``"cityscapes"``, ``"deepscene"``, ``"mhp"``, ``"voc"`` or ``"sun"``: the classes,
            colours and (smallest) size of the tutorial's network for this data set, whose labels
            `pyseg.models.fcn_resnet18.PRESETS` turns into its classes. None = VOC's classes, and
            images of any size.
        num_classes: None = those of ``preset``, else 21.
        weights: nothing is published in a format that is read here, so that ``"default"`` is an
            error that says so; ``"IMAGENET1K_V1"`` = torchvision's ResNet-18 to start training
            from; a path or a URL = such a file, a checkpoint of the tutorial's training
            (pytorch-segmentation), with or without the auxiliary head, or of `pyseg train`; None =
            random. With a preset, a checkpoint may have more outputs than the preset has classes,
            as the tutorial's 21 for DeepScene's 5: the outputs after these are left out.
        size: (height, width) that images are resized to in predictions; None = that of ``preset``,
            else as they are.

    Returns:
        `SemanticModel`; a training step also gives the logits of the auxiliary head, ``"aux"``.

    Raises:
        ValueError: ``num_classes`` below 1, no such preset, or no size.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.

    Example:
        >>> model = fcn_resnet18(preset="deepscene", weights=None)
        >>> model.classes, model.network.size
        (('trail', 'grass', 'vegetation', 'obstacle', 'sky'), (320, 576))
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    chosen = PRESETS[preset or "voc"]
    if size is not None and (
        len(size) != 2 or not all(type(side) is int and side >= 1 for side in size)
    ):
        raise ValueError(f"size must be (height, width) in pixels, such as (320, 512), got {size}")
    given = chosen.sizes[0] if size is None and preset is not None else size
    resized = None if given is None else (given[0], given[1])
    shorter = preset is not None and num_classes in (None, len(chosen.classes))

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {key.removeprefix("module."): value for key, value in state.items()}
        if not any(key.startswith("backbone.") for key in state):  # a classifier of images
            return {f"backbone.{k}": v for k, v in state.items() if not k.startswith("fc.")}
        for key, value in state.items():
            last = key.startswith(("classifier.4.", "aux_classifier.4."))
            if shorter and last and len(value) == OUTPUTS:
                state[key] = value[: len(chosen.classes)]
        return state

    return semantic_model(
        "fcn_resnet18",
        lambda classes: FCNResNet18(classes, size=resized),
        classes=chosen.classes,
        palette=chosen.palette,
        num_classes=num_classes,
        weights=weights,
        heads=("classifier.4", "aux_classifier.4"),
        known=published_weights("resnet18"),
        convert=convert,
        trunk="backbone",
        may_lack=("aux_classifier",),
    )


class FCNResNet18(nn.Module):
    """ResNet-18 at stride 32, torchvision's FCN head on its last stage, another on the third.

    Args:
        num_classes: channels of the logits.
        size: (height, width) to which images are resized, in evaluation mode; None = as they are.
    """

    def __init__(self, num_classes: int, *, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.size = size
        self.backbone, widths = resnet("resnet18")
        self.classifier = FCNHead(widths[3], num_classes)
        self.aux_classifier = FCNHead(widths[2], num_classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Normalised images [N, 3, H, W] to logits ``out`` and, while training, ``aux``."""
        if self.size is not None and not self.training and x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        body = self.backbone
        x = body.maxpool(body.relu(body.bn1(body.conv1(x))))
        third = body.layer3(body.layer2(body.layer1(x)))
        outputs = {"out": self.classifier(body.layer4(third))}
        if self.training:
            outputs["aux"] = self.aux_classifier(third)
        return outputs
