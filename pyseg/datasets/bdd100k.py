"""BDD100K's 10k images with pixel labels (Yu et al., CVPR 2020): 19 classes, or panoptic ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..classes import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, CITYSCAPES_THINGS, class_table
from ..errors import ImageError
from ..image import open_image
from ..types import VOID, Segments
from .layout import Published, Root
from .pairs import PairedFiles, segments_of
from .table import ClassTable

PANOPTIC_CLASSES, PANOPTIC_PALETTE = class_table(
    """
dynamic 6f4a00; ego vehicle 000000; ground 510051; static 000000; parking faaaa0;
rail track e6968c; road 804080; sidewalk f423e8; bridge 966464; building 464646; fence be9999;
garage b464b4; guard rail b4a5b4; tunnel 96785a; wall 66669c; banner faaa64; billboard dcdcfa;
lane divider ffa500; parking sign dc143c; pole 999999; polegroup 999999; street light dcdc64;
traffic cone ff4600; traffic device dcdcdc; traffic light faaa1e; traffic sign dcdc00;
traffic sign frame faaafa; terrain 98fb98; vegetation 6b8e23; sky 4682b4; person dc143c;
rider ff0000; bicycle 770b20; bus 003c64; car 00008e; caravan 00005a; motorcycle 0000e6;
trailer 00006e; train 005064; truck 000046;
"""
)
NUM_STUFF = 30  # of the panoptic classes, the first ones


class BDD100K(PairedFiles):
    """BDD100K's semantic segmentation, with Cityscapes' 19 classes and train ids.

    Args:
        root: ``bdd100k/``, with ``images/`` and ``labels/``, or the folder that holds it.
        split: "train", "val", or "test", which has no public labels.

    Raises:
        LayoutError: a folder or file is absent; the message shows what is expected and found.
    """

    published = Published(
        title="BDD100K",
        page="http://bdd-data.berkeley.edu/ (10K Images; Semantic, Panoptic Segmentation)",
        tree="""
images/10k/{train,val,test}/*.jpg
labels/sem_seg/masks/{train,val}/*.png
labels/pan_seg/bitmasks/{train,val}/*.png (for bdd100k_panoptic)""",
        licence="BDD100K licence: research, education, non-profit",
        counts={"train": 7000, "val": 1000, "test": 2000},
    )
    _folder = "sem_seg/masks"
    _table = ClassTable(CITYSCAPES_CLASSES)
    _classes: tuple[str, ...] = CITYSCAPES_CLASSES
    _palette: tuple[tuple[int, int, int], ...] = CITYSCAPES_PALETTE
    _things: tuple[str, ...] = CITYSCAPES_THINGS

    def __init__(self, root: str | Path, split: str = "train") -> None:
        found = Root(root, self.published, ("bdd100k",))
        images = found.files(found.need(f"images/10k/{split}"), ".jpg")
        labels = None
        if split != "test":
            labels = found.files(found.need(f"labels/{self._folder}/{split}"), ".png")
        super().__init__(
            *found.pairs(images, labels),
            self._classes,
            self._palette,
            table=self._table,
            things=self._things,
        )


class BDD100KPanoptic(BDD100K):
    """BDD100K's panoptic segmentation: 30 stuff classes, then 10 countable ones.

    Its bitmasks hold the category in red, attributes in green and the number of the object in blue
    and alpha. Objects marked as crowds or to be ignored are crowds.

    Args:
        root: ``bdd100k/``, with ``images/`` and ``labels/``, or the folder that holds it.
        split: "train", "val", or "test", which has no public labels.

    Raises:
        LayoutError: a folder or file is absent; the message shows what is expected and found.
    """

    published = replace(BDD100K.published, gives="semantic, panoptic, instances")
    _folder = "pan_seg/bitmasks"
    _table = ClassTable(
        PANOPTIC_CLASSES, ids={0: VOID, **{k + 1: k for k in range(len(PANOPTIC_CLASSES))}}
    )
    _classes, _palette = PANOPTIC_CLASSES, PANOPTIC_PALETTE
    _things = PANOPTIC_CLASSES[NUM_STUFF:]

    def truth(self, index: int) -> Segments:
        path = self.labels[index]
        with open_image(path, "panoptic bitmask") as picture:
            if picture.mode != "RGBA":
                raise ImageError(
                    f"panoptic bitmask {str(path)!r} has mode {picture.mode}; BDD100K's are RGBA"
                )
            planes = torch.from_numpy(np.array(picture)).long()
        labels = self.table.of_ids(planes[..., 0], path)
        codes = planes[..., 0] << 16 | planes[..., 2] << 8 | planes[..., 3]
        return segments_of(codes, labels, planes[..., 1] & 3 != 0)  # bits: ignored, crowd
