"""BSDS500: natural images segmented by several people (Arbelaez et al., PAMI 2011)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..errors import LabelError
from ..image import read_labels
from ..types import Segments
from .layout import Published, Root
from .pairs import PairedFiles, map_of, read_mat, segments_of
from .table import ClassTable


class BSDS500(PairedFiles):
    """BSDS500: regions without classes, all of the one class "region", as one person drew them.

    Args:
        root: ``BSR/`` or ``BSDS500/`` or its ``data/``; or ``{train,val}/NAME.jpg`` with
            ``NAME_human0.png`` and so on, grey values being the numbers of regions.
        split: "train", "val" or "test".
        human: whose segmentation, counted from 0; of images that fewer people segmented, the last.

    Raises:
        LayoutError: a folder or file is absent; the message shows what is expected and found.
        ValueError: ``human`` is negative.
    """

    published = Published(
        title="BSDS500",
        page="https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/resources.html",
        tree="""
images/{train,val,test}/*.jpg
groundTruth/{train,val,test}/*.mat""",
        gives="regions",
        licence="non-commercial research",
        counts={"train": 200, "val": 100, "test": 200},
    )

    def __init__(self, root: str | Path, split: str = "train", *, human: int = 0) -> None:
        if human < 0:
            raise ValueError(f"human must be 0 or more, got {human}")
        self.human = human
        inside = ("BSR/BSDS500/data", "BSDS500/data", "data")
        found = Root(root, self.published, inside)
        plain = found.find(split)
        folder = plain or found.need(f"images/{split}")
        images = found.files(folder, ".jpg")
        if plain is None:
            labels = found.files(found.need(f"groundTruth/{split}"), ".mat")
        else:
            labels = found.files(folder, "_human0.png")
        super().__init__(
            *found.pairs(images, labels),
            ("region",),
            ((200, 200, 200),),
            table=ClassTable(("region",)),
            things=("region",),
        )

    def truth(self, index: int) -> Segments:
        path = self.labels[index]
        if path.suffix == ".mat":
            drawn = np.atleast_1d(read_mat(path, "groundTruth"))
            chosen = drawn[min(self.human, len(drawn) - 1)]
            regions = getattr(chosen, "Segmentation", None)
            if regions is None:
                raise LabelError(f"{path} holds no Segmentation; it is of another data set")
            codes = map_of(regions, path)
        else:
            last = self.human
            while not (chosen := self._drawn(path, last)).is_file():
                last -= 1
            codes = read_labels(chosen).int()
        return segments_of(codes, torch.zeros_like(codes, dtype=torch.uint8))

    @staticmethod
    def _drawn(path: Path, human: int) -> Path:
        return path.with_name(path.name.replace("_human0.", f"_human{human}."))
