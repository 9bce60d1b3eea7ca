"""ADE20K's scene parsing benchmark, 150 classes (Zhou et al., CVPR 2017)."""

from __future__ import annotations

from pathlib import Path

from ..classes import ADE20K_CLASSES, ADE20K_PALETTE
from ..types import VOID
from .layout import LONG, Published, Root
from .pairs import PairedFiles
from .table import ClassTable


class ADE20K(PairedFiles):
    """ADE20K's 150 classes; 0 in its files, "other", is void, and k is class k - 1.

    Args:
        root: ``ADEChallengeData2016/``, or the folder that holds it.
        split: "train" (or "training"), "val" (or "validation"), or "test" (or "testing"), which
            has no public labels.

    Raises:
        LayoutError: a folder or file is absent; the message shows what is expected and found.
    """

    published = Published(
        title="ADE20K (scene parsing, 150 classes)",
        page="http://sceneparsing.csail.mit.edu/",
        tree="""
images/{training,validation}/*.jpg
annotations/{training,validation}/*.png""",
        licence="images: non-commercial research; annotations: BSD-3",
        counts={"train": 20210, "val": 2000},
    )

    def __init__(self, root: str | Path, split: str = "train") -> None:
        found = Root(root, self.published, ("ADEChallengeData2016",))
        part = LONG.get(split, split)
        images = found.files(found.need(f"images/{part}"), ".jpg")
        labels = None
        if part != "testing":
            labels = found.files(found.need(f"annotations/{part}"), ".png")
        super().__init__(
            *found.pairs(images, labels),
            ADE20K_CLASSES,
            ADE20K_PALETTE,
            table=ClassTable(ADE20K_CLASSES, ids={0: VOID, **{k + 1: k for k in range(150)}}),
        )
