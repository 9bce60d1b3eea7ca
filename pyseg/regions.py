"""Regions of one image as plain records: panoptic segments, instances, and what void means."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

VOID = 255
"""Label of pixels without a class: ``ignore_index`` everywhere in pyseg.

With more than 255 classes it is a class, and void is -1.
"""
CERTAIN = 0.5
"""Score from which an instance counts where a label map is made of instances alone."""


def void_label(num_classes: int) -> tuple[int, torch.dtype]:
    """The label of void beside so many classes, and the dtype of label maps that hold it."""
    return (VOID, torch.uint8) if num_classes <= VOID else (-1, torch.int16)


def outline(tensor: Tensor | None) -> str:
    """A tensor in a few words, for ``repr``: shape, dtype, and the device if not the CPU."""
    if tensor is None:
        return "None"
    where = "" if tensor.device.type == "cpu" else f" on {tensor.device}"
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}{where}"


@dataclass(frozen=True)
class Segment:
    """One segment of a panoptic map."""

    id: int  # its value in Segments.map, > 0
    label: int  # class index
    score: float
    area: int  # pixels
    crowd: bool = False  # in ground truth: a region of several objects that were not told apart


@dataclass(frozen=True, eq=False)
class Segments:
    """A panoptic result: every pixel belongs to at most one segment."""

    map: Tensor  # [H, W] int32, 0 = void
    items: tuple[Segment, ...]

    def __repr__(self) -> str:
        return f"Segments(map {outline(self.map)}, {len(self.items)} items)"

    @classmethod
    def from_map(
        cls,
        map: Tensor | np.ndarray,
        labels: Mapping[int, int],
        *,
        crowds: Collection[int] = (),
    ) -> Segments:
        """Segments of an id map alone; areas are counted.

        Args:
            map: [H, W] integers, 0 = void.
            labels: class index of every id in the map.
            crowds: ids of regions of several objects that were not told apart.

        Raises:
            ValueError: the map is not [H, W] integers, or an id has no label.

        Example:
            >>> segments = Segments.from_map(ids, {1: 13, 2: 13, 7: 0})   # two cars on a road
        """
        table = torch.as_tensor(map)
        if table.ndim != 2 or table.is_floating_point() or table.is_complex():
            raise ValueError(f"map must be [H, W] integers, got {outline(table)}")
        found, counts = table.unique(return_counts=True)
        areas = dict(zip(found.tolist(), counts.tolist(), strict=True))
        areas.pop(0, None)
        wrong = [key for key in areas if key < 0 or key not in labels]
        if wrong:
            raise ValueError(
                f"map holds the ids {wrong[:8]}, which labels does not name; ids count from 1, "
                "0 = void"
            )
        return cls(
            table.to(torch.int32),
            tuple(
                Segment(key, int(labels[key]), 1.0, n, key in crowds) for key, n in areas.items()
            ),
        )

    def label_map(self, num_classes: int) -> Tensor:
        """Class of every pixel, [H, W]: uint8, 255 = void; from 256 classes on int16, -1 = void."""
        void, dtype = void_label(num_classes)
        ids = torch.tensor([0] + [item.id for item in self.items])
        labels = torch.tensor([void] + [item.label for item in self.items])
        order = ids.argsort()
        position = torch.searchsorted(ids[order].to(self.map.device), self.map.long())
        return labels[order].to(self.map.device)[position].to(dtype)


@dataclass(frozen=True, eq=False)
class Instances:
    """Detected objects of one image; they may overlap."""

    boxes: Tensor  # [K, 4] float, xyxy in pixels of the input image
    masks: Tensor  # [K, H, W] bool
    scores: Tensor  # [K] float
    labels: Tensor  # [K] int64, class indices
    crowd: Tensor | None = None  # [K] bool: regions of many objects (COCO's iscrowd); ground truth

    def __repr__(self) -> str:
        return f"Instances({len(self.labels)} objects, masks {outline(self.masks)})"

    def label_map(self, num_classes: int, certain: float = CERTAIN) -> Tensor:
        """Class of every pixel, [H, W], as `Segments.label_map`; the most certain object on top.

        Args:
            num_classes: decides what void is.
            certain: objects of a lower score are left out.
        """
        void, dtype = void_label(num_classes)
        labels = self.masks.new_full(self.masks.shape[1:], void, dtype=dtype)
        for k in self.scores.argsort(stable=True).tolist():
            if self.scores[k] >= certain:
                labels[self.masks[k]] = int(self.labels[k])
        return labels


__all__ = ["CERTAIN", "VOID", "Instances", "Segment", "Segments"]
