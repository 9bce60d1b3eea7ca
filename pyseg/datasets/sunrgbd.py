"""SUN RGB-D: indoor scenes with 37 classes (Song et al., CVPR 2015)."""

from __future__ import annotations

import re
from pathlib import Path

from ..classes import class_names
from ..image import default_palette
from ..types import VOID
from .layout import Published, Root
from .pairs import PairedFiles
from .table import ClassTable

CLASSES = class_names(
    """
wall; floor; cabinet; bed; chair; sofa; table; door; window; bookshelf; picture; counter; blinds;
desk; shelves; curtain; dresser; pillow; mirror; floor mat; clothes; ceiling; books; fridge; tv;
paper; towel; shower curtain; box; whiteboard; person; night stand; toilet; sink; lamp; bathtub;
bag;
"""
)
TEST = 5050  # images; their labels come first


class SUNRGBD(PairedFiles):
    """SUN RGB-D's 37 classes as PNGs: 0 in its files is void, and k is class k - 1.

    Label files 1 to 5050 are those of the test images, 5051 to 10335 those of the training images,
    which are numbered from 1, or, where somebody renamed them, as their labels.

    Args:
        root: holds the images and the labels.
        split: "train" or "test".

    Raises:
        LayoutError: a folder or file is absent; the message shows what is expected and found.
    """

    published = Published(
        title="SUN RGB-D (37 classes)",
        page="https://github.com/ankurhanda/sunrgbd-meta-data (the data set: "
        "http://rgbd.cs.princeton.edu/)",
        tree="""
SUNRGBD-{train,test}_images/img-NNNNNN.jpg
sunrgbd_train_test_labels/img-NNNNNN.png""",
        licence="not stated",
        counts={"train": 5285, "test": 5050},
    )

    def __init__(self, root: str | Path, split: str = "train") -> None:
        found = Root(root, self.published)
        images = found.files(found.need(f"SUNRGBD-{split}_images"), ".jpg")
        labels = found.files(
            found.need("sunrgbd_train_test_labels", "sunrgbd_test_train_labels"), ".png"
        )
        numbered = {_number(name): path for name, path in images.items()}
        shift = TEST if split == "train" and min(numbered) <= TEST else 0
        part = {
            number - shift: path
            for name, path in labels.items()
            if ((number := _number(name)) <= TEST) == (split == "test")
        }
        palette = default_palette(len(CLASSES) + 1)[1:]
        super().__init__(
            *found.pairs(
                {f"img-{n:06}": path for n, path in numbered.items()},
                {f"img-{n:06}": path for n, path in part.items()},
            ),
            CLASSES,
            palette,
            table=ClassTable(CLASSES, ids={0: VOID, **{k + 1: k for k in range(len(CLASSES))}}),
        )


def _number(name: str) -> int:
    digits = re.findall(r"\d+", name)
    return int(digits[-1]) if digits else 0
