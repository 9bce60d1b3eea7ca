"""Quadtree split and region merge (Horowitz and Pavlidis, JACM 1976)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from . import _core
from .growing import _checked
from .regions import Image, Map, RegionModel, at_least, grey, merge_small, one_of

SplitTest = Callable[[NDArray[np.float64]], bool]
MergeTest = Callable[[Mapping[str, Any], Mapping[str, Any]], bool]


def split_and_merge(
    image: NDArray[Any],
    *,
    split: Literal["deviation", "range"] | SplitTest = "deviation",
    split_limit: float = 12.0,
    smallest: int = 2,
    merge: Literal["mean", "deviation"] | MergeTest | None = "mean",
    merge_limit: float = 12.0,
) -> NDArray[np.int32]:
    """Splits the image into even blocks, then merges neighbours that are alike.

    The image lies in a square of 2^k pixels, which is split into quarters as long as a block is
    uneven and more than ``smallest`` pixels wide. Then, over the graph of regions that touch, the
    pair whose means are nearest merges, as long as it is alike; means change with every merge.

    Args:
        image: [H, W] or [H, W, C].
        split: when a block is uneven: its standard ``"deviation"`` (of several channels the root of
            the mean variance) or the ``"range"`` of a channel is above ``split_limit``; or a
            function of the block [h, w, C] that says so.
        split_limit: in the image's unit.
        smallest: width of the blocks that are not split.
        merge: when two regions are alike: their ``"mean"``s differ by less than ``merge_limit`` (of
            several channels the root of the mean square), or the ``"deviation"`` of both together
            is below it; or a function of two regions that says so, each a mapping with ``area``,
            ``mean`` [C] and ``deviation``; None: nothing is merged.
        merge_limit: in the image's unit.

    Returns:
        [H, W] numbers of regions.

    Raises:
        ValueError: another shape, NaN, or a name or limit that is none. What a function raises.

    Example:
        >>> dark = lambda a, b: max(a["mean"][0], b["mean"][0]) < 50
        >>> split_and_merge(image, split=lambda block: block.ptp() > 9, merge=dark)
    """
    if isinstance(split, str):
        one_of("split", split, ("deviation", "range"))
    if isinstance(merge, str):
        one_of("merge", merge, ("mean", "deviation"))
    at_least("split_limit", split_limit, 0)
    at_least("merge_limit", merge_limit, 0)
    at_least("smallest", smallest, 1)
    return _core.split_and_merge(_checked(image), split, split_limit, smallest, merge, merge_limit)


class SplitAndMerge(RegionModel):
    """Quadtree split and merge; see `split_and_merge`.

    Args:
        split: ``"deviation"`` or ``"range"``; in Python also a function of a block.
        split_limit: in grey values.
        smallest: width of the blocks that are not split.
        merge: ``"mean"`` or ``"deviation"``; in Python also a function of two regions.
        merge_limit: in grey values; 0 = nothing is merged.
        colour: compare colours, not grey values.
        smoothing: standard deviation of a Gaussian before, in pixels.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
    """

    def __init__(
        self,
        *,
        split: Literal["deviation", "range"] | SplitTest = "deviation",
        split_limit: float = 12.0,
        smallest: int = 2,
        merge: Literal["mean", "deviation"] | MergeTest = "mean",
        merge_limit: float = 12.0,
        colour: bool = True,
        smoothing: float = 1.0,
        min_size: int = 50,
    ) -> None:
        self.options: dict[str, Any] = {
            "split": split if callable(split) else one_of("split", split, ("deviation", "range")),
            "split_limit": at_least("split_limit", split_limit, 0),
            "smallest": int(at_least("smallest", smallest, 1)),
            "merge": merge if callable(merge) else one_of("merge", merge, ("mean", "deviation")),
            "merge_limit": at_least("merge_limit", merge_limit, 0),
        }
        self.colour, self.smoothing = colour, at_least("smoothing", smoothing, 0)
        self.min_size = int(at_least("min_size", min_size, 0))

    def regions(self, image: Image) -> Map:
        values = (image if self.colour else grey(image)[:, :, None]).astype(np.float64)
        if self.smoothing:
            values = ndimage.gaussian_filter(values, (self.smoothing, self.smoothing, 0))
        return merge_small(split_and_merge(values, **self.options), image, self.min_size)


__all__ = ["SplitAndMerge", "split_and_merge"]
