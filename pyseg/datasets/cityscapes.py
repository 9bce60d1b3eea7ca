"""Cityscapes: streets of 50 cities, finely or coarsely labelled (Cordts et al., CVPR 2016)."""

from __future__ import annotations

from pathlib import Path

import torch

from ..classes import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_LABEL_PALETTE,
    CITYSCAPES_LABELS,
    CITYSCAPES_PALETTE,
    CITYSCAPES_THINGS,
    CITYSCAPES_TRAIN_IDS,
)
from ..image import read_labels
from ..types import Segments
from .layout import Published, Root
from .pairs import PairedFiles, segments_of
from .table import ClassTable


class Cityscapes(PairedFiles):
    """Cityscapes with its 19 scored classes in the order of their train ids, or all 34 labels.

    Args:
        root: holds ``leftImg8bit/`` and ``gtFine/`` or ``gtCoarse/``.
        split: "train", "val" or "test" (whose public labels are void); "train_extra" has coarse
            ones.
        annotations: "fine" or "coarse".
        classes: 19 or 34; of 19, all other labels are void.
        regions: also read ``instanceIds``: samples then have segments, as panoptic scores want
            them, and instances. Regions that hold several objects are crowds.

    Raises:
        LayoutError: a folder or file is absent; the message shows what is expected and found.
        ValueError: an option has no such value.
    """

    published = Published(
        title="Cityscapes",
        page="https://www.cityscapes-dataset.com/downloads/",
        tree="""
leftImg8bit/{train,val,test,train_extra}/CITY/*_leftImg8bit.png
gtFine/{train,val,test}/CITY/*_gtFine_labelIds.png, or *_labelTrainIds.png
gtFine/{train,val,test}/CITY/*_gtFine_instanceIds.png (for regions)
gtCoarse/{train,train_extra,val}/CITY/*_gtCoarse_labelIds.png (for annotations='coarse')""",
        gives="semantic, panoptic, instances",
        licence="non-commercial, by registration",
        counts={"train": 2975, "val": 500, "test": 1525, "train_extra": 19998},
    )

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        annotations: str = "fine",
        classes: int = 19,
        regions: bool = False,
    ) -> None:
        if annotations not in ("fine", "coarse"):
            raise ValueError(f"annotations must be 'fine' or 'coarse', got {annotations!r}")
        if classes not in (19, 34):
            raise ValueError(f"classes must be 19 or 34, got {classes}")
        self.regions = regions
        kind = f"gt{annotations.title()}"
        found = Root(root, self.published)
        images = found.files(
            found.need(f"leftImg8bit/{split}"), "_leftImg8bit.png", "_leftImg8bit.jpg", deep=True
        )
        folder = found.need(f"{kind}/{split}")
        ending = "instanceIds" if regions else "labelIds"
        converted = not regions and not any(folder.rglob("*_labelIds.png"))
        if converted and classes == 19 and any(folder.rglob("*_labelTrainIds.png")):
            ending = "labelTrainIds"
        labels = found.files(folder, f"_{kind}_{ending}.png", deep=True)
        ids = dict(enumerate(CITYSCAPES_TRAIN_IDS if classes == 19 else range(34)))
        names = CITYSCAPES_CLASSES if classes == 19 else CITYSCAPES_LABELS
        super().__init__(
            *found.pairs(images, labels),
            names,
            CITYSCAPES_PALETTE if classes == 19 else CITYSCAPES_LABEL_PALETTE,
            table=ClassTable(names, ids=None if ending == "labelTrainIds" else ids),
            things=(*CITYSCAPES_THINGS, "caravan", "trailer"),
        )

    def truth(self, index: int) -> torch.Tensor | Segments:
        if not self.regions:
            return super().truth(index)
        path = self.labels[index]
        codes = read_labels(path)  # an object: label id * 1000 + number; all else: label id
        ids = torch.where(codes < 1000, codes, codes // 1000)
        labels = self.table.of_ids(ids, path)
        return segments_of(codes, labels, (codes < 1000) & torch.isin(labels, self.thing_labels))
