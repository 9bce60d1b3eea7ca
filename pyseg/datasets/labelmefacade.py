"""LabelMeFacade: street views with the classes of facades (Froehlich et al., ICPR 2010)."""

from __future__ import annotations

from pathlib import Path

from ..classes import class_table
from ..types import VOID
from .layout import Published, Root
from .pairs import PairedFiles
from .table import ClassTable

CLASSES, PALETTE = class_table(
    """
building 800000; car 800080; door 808000; pavement 808080; road 804000; sky 008080;
vegetation 008000; window 000080;
"""
)


class LabelMeFacade(PairedFiles):
    """LabelMeFacade's 945 street views with 8 classes; "various", black, is void.

    Args:
        root: holds ``images/``, ``labels/`` and the lists of the splits.
        split: "train" or "test".

    Raises:
        LayoutError: a folder or file is absent; the message shows what is expected and found.
    """

    published = Published(
        title="LabelMeFacade",
        page="https://github.com/cvjena/labelmefacade",
        tree="""
images/*.jpg
labels/*.png
{train,test}.txt""",
        licence="non-commercial research",
        counts={"train": 100, "test": 845},
    )

    def __init__(self, root: str | Path, split: str = "train") -> None:
        found = Root(root, self.published, ("labelmefacade",))
        names = found.listed(found.need(f"{split}.txt"))
        images = found.files(found.need("images"), ".jpg")
        labels = found.files(found.need("labels"), ".png")
        colours = {colour: k for k, colour in enumerate(PALETTE)}
        super().__init__(
            *found.pairs(images, labels, names),
            CLASSES,
            PALETTE,
            table=ClassTable(CLASSES, colours={**colours, (0, 0, 0): VOID}, by_colour=True),
        )
