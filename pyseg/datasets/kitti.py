"""KITTI's semantic benchmark: streets with Cityscapes' labels (Alhaija et al., 2018)."""

from __future__ import annotations

from pathlib import Path

import torch

from ..classes import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_PALETTE,
    CITYSCAPES_THINGS,
    CITYSCAPES_TRAIN_IDS,
)
from ..image import read_labels
from ..types import Segments
from .layout import LONG, Published, Root
from .pairs import PairedFiles, segments_of
from .table import ClassTable


class KITTI(PairedFiles):
    """KITTI's 200 labelled street scenes with Cityscapes' 19 classes; all other labels are void.

    Args:
        root: holds ``training/`` and ``testing/``, or ``data_semantics/`` with these.
        split: "train" (or "training"), or "test" (or "testing"), which has no public labels.
        regions: also read ``instance/``: samples then have segments and instances.

    Raises:
        LayoutError: a folder or file is absent; the message shows what is expected and found.
    """

    published = Published(
        title="KITTI semantic segmentation",
        page="https://www.cvlibs.net/datasets/kitti/eval_semseg.php?benchmark=semantics2015",
        tree="""
training/image_2/*.png
training/semantic/*.png
training/instance/*.png (for regions)
testing/image_2/*.png""",
        gives="semantic, panoptic, instances",
        licence="CC BY-NC-SA 3.0",
        counts={"train": 200, "test": 200},
    )

    def __init__(self, root: str | Path, split: str = "train", *, regions: bool = False) -> None:
        self.regions = regions
        found = Root(root, self.published, ("data_semantics", "kitti_segmentation"))
        part = LONG.get(split, split)
        images = found.files(found.need(f"{part}/image_2"), ".png")
        labels = None
        if part != "testing":
            kind = "instance" if regions else "semantic"
            labels = found.files(found.need(f"{part}/{kind}"), ".png")
        super().__init__(
            *found.pairs(images, labels),
            CITYSCAPES_CLASSES,
            CITYSCAPES_PALETTE,
            table=ClassTable(CITYSCAPES_CLASSES, ids=dict(enumerate(CITYSCAPES_TRAIN_IDS))),
            things=CITYSCAPES_THINGS,
        )

    def truth(self, index: int) -> torch.Tensor | Segments:
        if not self.regions:
            return super().truth(index)
        codes = read_labels(self.labels[index])  # label id * 256 + number, 0 = not told apart
        labels = self.table.of_ids(codes // 256, self.labels[index])
        return segments_of(
            codes, labels, (codes % 256 == 0) & torch.isin(labels, self.thing_labels)
        )
