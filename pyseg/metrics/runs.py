"""Masks as runs, and how much any two of them have in common: areas, boxes, overlaps, boundaries.

Nothing here depends on how many pixels an image has but on how many runs its masks have. All is in
integers, so that the order of the work does not change a bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..ops import boundary_mask


@dataclass(frozen=True)
class Runs:
    """Masks of images whose lines have a length of their own: rows, or columns as in COCO's RLE.

    A mask's pixels are counted along its lines; inside is from each even edge to the next one. No
    two edges of a mask are at the same place.
    """

    edges: np.ndarray  # [E] int64, rising within a mask
    counts: np.ndarray  # [K] int64: how many edges each mask has, always even
    lengths: np.ndarray  # [K] int64: of the lines of its image

    @property
    def ends(self) -> np.ndarray:
        return self.counts.cumsum()

    def of(self, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The edges of some masks one after the other, and which of them each belongs to."""
        counts = self.counts[which]
        owner = np.repeat(np.arange(len(which)), counts)
        first = (self.ends - self.counts)[which] - (counts.cumsum() - counts)
        return np.arange(len(owner)) + first[owner], owner

    def areas(self) -> np.ndarray:
        """Pixels of each mask, [K] int64."""
        sums = np.concatenate([[0], (self.edges[1::2] - self.edges[::2]).cumsum()])
        ends = self.ends // 2
        return sums[ends] - sums[ends - self.counts // 2]

    def boxes(self) -> np.ndarray:
        """First and last line and first and last place in a line, [K, 4] int64; 0, -1 of none."""
        owner = np.repeat(np.arange(len(self.counts)), self.counts // 2)
        length = self.lengths[owner]
        start, stop = self.edges[::2], self.edges[1::2] - 1
        first, last = start // length, stop // length
        wraps = first != last
        low = np.where(wraps, 0, start - first * length)
        high = np.where(wraps, length - 1, stop - last * length)
        result = np.tile(np.array([0, -1, 0, -1]), (len(self.counts), 1))
        some = np.flatnonzero(self.counts)
        if len(some):
            begins = ((self.ends - self.counts) // 2)[some]
            for column, (values, of) in enumerate(
                ((first, np.minimum), (last, np.maximum), (low, np.minimum), (high, np.maximum))
            ):
                result[some, column] = of.reduceat(values, begins)
        return result

    def part(self, begin: int, end: int) -> Runs:
        """Some masks one after the other."""
        ends = np.concatenate([[0], self.ends])
        return Runs(
            self.edges[ends[begin] : ends[end]], self.counts[begin:end], self.lengths[begin:end]
        )

    @classmethod
    def of_masks(cls, masks: np.ndarray) -> Runs:
        """Of [K, H, W] bool, by rows."""
        count, pixels = len(masks), masks[0].size if len(masks) else 0
        apart = np.zeros((count, pixels + 1), bool)  # no run reaches into the next mask
        apart[:, :-1] = masks.reshape(count, pixels)
        flat = apart.ravel()
        edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
        if count and flat[0]:
            edges = np.concatenate([[0], edges])
        owner = edges // (pixels + 1)
        counts = np.bincount(owner, minlength=count)
        return cls(edges - owner * (pixels + 1), counts, np.full(count, masks.shape[2], np.int64))

    def boundaries(self, distances: np.ndarray) -> Runs:
        """Pixels of each mask that are at most so far from its outside; see `boundary_mask`."""
        boxes = self.boxes()
        parts = [
            self._boundary(number, box, distance)
            for number, (box, distance) in enumerate(
                zip(boxes.tolist(), distances.tolist(), strict=True)
            )
        ]
        counts = np.array([len(part) for part in parts], np.int64)
        edges = np.concatenate([np.zeros(0, np.int64), *parts])
        return Runs(edges, counts, self.lengths)

    def _boundary(self, number: int, box: list[int], distance: int) -> np.ndarray:
        first, last, low, high = box
        if last < first:
            return np.zeros(0, np.int64)
        length, end = int(self.lengths[number]), int(self.ends[number])
        edges = self.edges[end - int(self.counts[number]) : end] - first * length
        turns = np.zeros((last - first + 1) * length + 1, np.int8)
        turns[edges] = 1
        inside = (turns[:-1].cumsum(dtype=np.int8) & 1).view(bool).reshape(-1, length)
        mask = np.ascontiguousarray(inside[:, low : high + 1])
        near = boundary_mask(torch.from_numpy(mask).view(torch.uint8)[None], distance)[0].numpy()
        # What the box cuts off is outside, as is what lies beyond the image.
        apart = np.zeros((mask.shape[0], mask.shape[1] + 2), bool)
        apart[:, 1:-1] = near & mask
        line, place = np.nonzero(apart[:, 1:] != apart[:, :-1])
        return (line + first) * length + place + low


__all__ = ["Runs"]
