"""Classes that a model and a data set share: names, colours, ids. One original of each."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import PysegError

CAMVID_CLASSES = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)
"""CamVid's 11 classes, as SegNet uses them, in the order of their ids; 11 is void."""

CAMVID_PALETTE = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)
"""RGB colour of each of `CAMVID_CLASSES`."""

CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Cityscapes' label ids of its train ids 0 to 18."""

CITYSCAPES_CLASSES = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)
"""Cityscapes' 19 classes in the order of their train ids."""

CITYSCAPES_PALETTE = (
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
)
"""RGB colour of each of `CITYSCAPES_CLASSES`."""

__all__ = [
    "CAMVID_CLASSES",
    "CAMVID_PALETTE",
    "CITYSCAPES_CLASSES",
    "CITYSCAPES_IDS",
    "CITYSCAPES_PALETTE",
]


def check_classes(predicted: Sequence[str], target: Sequence[str]) -> None:
    """Refuses classes of a pipeline that are not those of a dataset, with the reason.

    Case does not matter, and ``"class 3"``, a name that a new head has, stands for any.

    Raises:
        PysegError: there are more or fewer, or one has another name.
    """
    if len(predicted) != len(target):
        raise PysegError(
            f"the pipeline has {len(predicted)} classes, the dataset {len(target)}: "
            "use a model that was trained for this dataset (its num_classes and "
            "weights)"
        )
    pairs = list(zip(predicted, target, strict=True))
    # A model with a new head does not know what its classes are called.
    different = [
        f"{index} is {ours!r}, in the dataset {theirs!r}"
        for index, (ours, theirs) in enumerate(pairs)
        if ours.lower() != theirs.lower() and ours != f"class {index}"
    ]
    if different:
        raise PysegError(
            f"the pipeline's classes are not the dataset's: class {different[0]}"
            + (f", and {len(different) - 1} more" if len(different) > 1 else "")
            + "; use a model that was trained for this dataset"
        )
