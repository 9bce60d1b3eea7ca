"""PASCAL Context: VOC 2010 with a label for every pixel, 59 classes (Mottaghi et al., 2014)."""

from __future__ import annotations

from pathlib import Path

import torch

from ..classes import class_names
from ..image import default_palette
from ..types import VOID
from .layout import Published, Root
from .pairs import PairedFiles, map_of, read_mat
from .table import ClassTable

CLASSES = class_names(
    """
aeroplane; bag; bed; bedclothes; bench; bicycle; bird; boat; book; bottle; building; bus; cabinet;
car; cat; ceiling; chair; cloth; computer; cow; cup; curtain; dog; door; fence; floor; flower;
food; grass; ground; horse; keyboard; light; motorbike; mountain; mouse; person; plate; platform;
pottedplant; road; rock; sheep; shelves; sidewalk; sign; sky; snow; sofa; table; track; train;
tree; truck; tvmonitor; wall; water; window; wood;
"""
)
# The number of each in the list of all 459 labels, which is in the order of the alphabet too.
_NUMBERS = (
    *(2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98),
    *(
        104,
        105,
        113,
        115,
        144,
        158,
        159,
        162,
        187,
        189,
        207,
        220,
        232,
        258,
        259,
        260,
        284,
        295,
        296,
        308,
    ),
    *(
        324,
        326,
        347,
        349,
        354,
        355,
        360,
        366,
        368,
        397,
        415,
        416,
        420,
        424,
        427,
        440,
        445,
        454,
        458,
    ),
)


class PascalContext(PairedFiles):
    """PASCAL Context with its 59 most frequent classes, all else being void or background.

    Labels are the official MATLAB files of 459 labels, or the PNGs that are commonly made of them
    (0 background, 1 to 59 the classes in the order of the alphabet).

    Args:
        root: ``VOC2010/``, or the ``VOCdevkit/`` that holds it, with the labels in it.
        split: "train" or "val", the lists of VOC 2010.
        classes: 59, or 60 with the background first.

    Raises:
        LayoutError: a folder or file is absent; the message shows what is expected and found.
        ValueError: ``classes`` is neither 59 nor 60.
    """

    published = Published(
        title="PASCAL Context",
        page="https://cs.stanford.edu/~roozbeh/pascal-context/",
        tree="""
JPEGImages/*.jpg
trainval/*.mat, or SegmentationClassContext/*.png
ImageSets/Main/{train,val}.txt, or ImageSets/SegmentationContext/{train,val}.txt""",
        licence="Flickr's terms; research",
        counts={"train": 4998, "val": 5105},
    )

    def __init__(self, root: str | Path, split: str = "train", *, classes: int = 59) -> None:
        if classes not in (59, 60):
            raise ValueError(f"classes must be 59 or 60, got {classes}")
        found = Root(root, self.published, ("VOC2010", "VOCdevkit/VOC2010"))
        listing = found.need(
            *(f"ImageSets/{k}/{split}.txt" for k in ("SegmentationContext", "Main"))
        )
        folder = found.need("SegmentationClassContext", "trainval")
        labels = found.files(folder, ".png", ".mat")
        images = found.files(found.need("JPEGImages"), ".jpg")
        first = classes - 59
        names = ("background", *CLASSES) if first else CLASSES
        other = 0 if first else VOID
        numbers = range(1, 60) if folder.name != "trainval" else _NUMBERS
        ids = dict.fromkeys(range(60 if folder.name != "trainval" else 460), other)
        super().__init__(
            *found.pairs(images, labels, found.listed(listing)),
            names,
            default_palette(60)[1 - first :],
            table=ClassTable(names, ids={**ids, **{n: k for k, n in enumerate(numbers, first)}}),
        )

    def truth(self, index: int) -> torch.Tensor:
        path = self.labels[index]
        if path.suffix == ".png":
            return self.table.read(path)
        return self.table.of_ids(map_of(read_mat(path, "LabelMap"), path), path)
