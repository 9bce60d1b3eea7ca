"""Prompts from what a network has predicted: components, instances, and where it is unsure.

A component becomes a box, a point on it, a point off it, and itself as a mask prompt. `Style` has
besides ours the prompts of SAMRefiner (Lin et al., ICLR 2025, arXiv:2502.06756), whose points are
the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..promptable import PROMPT_LOGIT, Prompts

_BLUR = 4.0  # pixels, at most, over which a mask prompt is unsure about its outline
_TILE_FROM, _TILE_TO = 8, 4  # length / width of components to tile, and of the tiles
_EVERYWHERE = (-math.inf, math.inf)
# As SAMRefiner is published: logits of mask prompts, how fast they fall away from where the mask is
# deepest, logits where the box was extended; cosine from which a place looks like the mask; share
# of its box that a region fills, and by how much less it may if it is of two components.
_GAUSSIAN_LOGIT, _GAUSSIAN_FALL, _EXTENDED_LOGIT = 30.0, 4.0, 1.0
_ALIKE = 0.5
_OCCUPIED, _LESS_OCCUPIED = 0.5, 0.1
_CONTEXT = 0.1  # share of such pixels beside a box that extends it: ours, it is left to callers


@dataclass(frozen=True)
class Style:
    """How regions become prompts. `SamRefiner` explains the options."""

    box: str = "grown"
    mask_prompt: str = "signed"
    merge: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("box", self.box, ("grown", "elastic")),
            ("mask_prompt", self.mask_prompt, ("signed", "gaussian")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")


@dataclass(frozen=True)
class RegionPrompt:
    """The prompt for one region: a component of a class, a tile of a long thin one, an instance."""

    class_id: int  # -1 for an instance
    box: tuple[float, float, float, float]  # xyxy
    points: tuple[tuple[float, float], tuple[float, float]]  # on the region, off it
    point_labels: tuple[int, int]
    corner: tuple[int, int]  # y, x of `mask` in the image
    mask: np.ndarray  # [h, w] float32 logits
    outside: float = -PROMPT_LOGIT  # logit all around `mask`
    axis: tuple[float, float] = (1.0, 0.0)  # x, y
    strip: tuple[float, float] = _EVERYWHERE  # of a tile, see `strip_mask`

    def strip_mask(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """Pixels p with strip[0] <= axis . p < strip[1], [H, W] bool: only they count for a tile.

        A mask that answers a tile's prompt is of the whole long thin component, as a rule.
        """
        height, width = size
        if self.strip == _EVERYWHERE:
            return torch.ones(height, width, dtype=torch.bool, device=device)
        y = torch.arange(height, device=device)[:, None]
        x = torch.arange(width, device=device)
        along = x * self.axis[0] + y * self.axis[1]
        return (along >= self.strip[0]) & (along < self.strip[1])


def prompt_components(
    labels: np.ndarray,
    class_ids: Sequence[int],
    min_area: int,
    *,
    style: Style = Style(),
    features: np.ndarray | None = None,
    evidence: Mapping[int, np.ndarray] | None = None,
) -> tuple[list[RegionPrompt], np.ndarray]:
    """Prompts for the 8-connected components of some classes, long thin ones in tiles.

    Args:
        labels: [H, W] class of every pixel.
        class_ids: the classes.
        min_area: pixels that a component or tile must have.
        style: how they become prompts.
        features: [C, h, w] of the whole image, at any resolution; elastic boxes need them.
        evidence: class id -> [H, W] bool, where else it may be.

    Returns:
        The prompts, and the index of its prompt for every pixel, [H, W] int32, -1 = none.
    """
    owner = np.full(labels.shape, -1, np.int32)
    prompts: list[RegionPrompt] = []
    places = None if style.box == "grown" else _Places(features, labels.shape)
    for class_id in class_ids:
        where = labels == class_id
        if evidence and class_id in evidence:
            where |= evidence[class_id]
        for component, window in _regions(where, min_area, style.merge):
            top, left = window[0].start, window[1].start
            for mask, axis, strip in _split_into_tiles(component, min_area):
                owner[window][mask] = len(prompts)
                prompt = _prompt_region(mask, component, (top, left), labels.shape, style, places)
                # The strip in the frame of the image instead of the component's window.
                shift = axis[0] * left + axis[1] * top
                strip = (strip[0] + shift, strip[1] + shift)
                prompts.append(replace(prompt, class_id=class_id, axis=axis, strip=strip))
    return prompts, owner


def _regions(
    where: np.ndarray, min_area: int, merge: bool
) -> Iterator[tuple[np.ndarray, tuple[slice, slice]]]:
    """The 8-connected components of a mask [H, W] that have ``min_area`` pixels, each a mask in a
    window of the image; with ``merge`` several may be one region."""
    from scipy import ndimage

    numbers, _ = ndimage.label(where, structure=np.ones((3, 3), int))
    windows = ndimage.find_objects(numbers)
    areas = np.bincount(numbers.ravel())[1:]
    if merge and len(areas) > 1:
        region = _merged(windows, areas)
        numbers = np.concatenate([[0], region + 1])[numbers]
        windows = ndimage.find_objects(numbers)
        areas = np.bincount(numbers.ravel())[1:]
    for number, (window, area) in enumerate(zip(windows, areas, strict=True), 1):
        if window is not None and area >= min_area:
            yield numbers[window] == number, window


def _merged(windows: Sequence[tuple[slice, slice]], areas: np.ndarray) -> np.ndarray:
    """Which components of a class are one object: SAMRefiner's split-then-merge.

    Two are where their boxes take more than half of the box around both, and fill that box not much
    worse than each fills its own, or half of it.

    Returns:
        For each component the first one of its region, [K].
    """
    corners = np.array([(y.start, x.start, y.stop, x.stop) for y, x in windows], np.int64)
    filled = areas.astype(np.int64).copy()
    region = np.arange(len(areas))
    alive = np.ones(len(areas), bool)
    for one in range(len(areas)):
        begin = one + 1
        while alive[one] and begin < len(areas):
            others = begin + np.flatnonzero(alive[begin:])
            low = np.minimum(corners[one, :2], corners[others, :2])
            high = np.maximum(corners[one, 2:], corners[others, 2:])
            around = (high - low).prod(1)
            boxes = [(c[..., 2:] - c[..., :2]).prod(-1) for c in (corners[one], corners[others])]
            least = np.minimum(filled[one] / boxes[0], filled[others] / boxes[1]) - _LESS_OCCUPIED
            full = (filled[one] + filled[others]) / around > np.minimum(_OCCUPIED, least)
            joined = np.flatnonzero(full & (boxes[0] + boxes[1] > around / 2))
            if not len(joined):
                break
            first = joined[0]
            other = others[first]
            corners[one] = [*low[first], *high[first]]
            filled[one] += filled[other]
            region[region == other] = one
            alive[other] = False
            begin = other + 1
    return region


def prompt_instance(mask: np.ndarray, box: Sequence[float], style: Style = Style()) -> RegionPrompt:
    """The prompt for an instance: its own ``box`` (xyxy, edges), points, its ``mask`` [H, W]."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    window = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    prompt = _prompt_region(window, window, (top, left), mask.shape, style, None)
    # Boxes of instances name edges, SAM's the first and the last pixel.
    return replace(prompt, box=(box[0], box[1], box[2] - 1, box[3] - 1))


def stack_prompts(prompts: Sequence[RegionPrompt], size: tuple[int, int]) -> Prompts:
    """Prompts for regions of one image of ``size`` (H, W) as a promptable segmenter takes them."""
    masks = torch.empty(len(prompts), *size)
    for mask, prompt in zip(masks, prompts, strict=True):
        mask.fill_(prompt.outside)
        (top, left), (height, width) = prompt.corner, prompt.mask.shape
        mask[top : top + height, left : left + width] = torch.from_numpy(prompt.mask)
    return Prompts(
        points=torch.tensor([prompt.points for prompt in prompts]),
        point_labels=torch.tensor([prompt.point_labels for prompt in prompts], dtype=torch.int32),
        boxes=torch.tensor([prompt.box for prompt in prompts]),
        masks=masks,
    )


def point_grid(probabilities: Tensor, n: int, size: Sequence[int] | None = None) -> Tensor:
    """Points all over an image, denser where a network is unsure.

    Args:
        probabilities: [C, h, w], at any resolution.
        n: cells along each side.
        size: (H, W) of the image; None = that of the probabilities.

    Returns:
        [K, 2] (x, y): centres of n x n cells; of their quarters where the entropy is above the
        image's mean.
    """
    height, width = probabilities.shape[1:] if size is None else size
    entropy = -torch.special.xlogy(probabilities, probabilities).sum(0)
    cells = F.adaptive_avg_pool2d(entropy[None], (min(n, height), min(n, width)))[0]
    rows, columns = cells.shape
    pitch = torch.tensor([width / columns, height / rows], device=cells.device)

    def centres(which: Tensor, offset: Sequence[float]) -> Tensor:
        corner = which.nonzero().flip(1)  # x, y
        return (corner + torch.tensor(offset, device=cells.device)) * pitch - 0.5

    dense = cells > cells.mean()
    quarters = [centres(dense, (x, y)) for y in (0.25, 0.75) for x in (0.25, 0.75)]
    return torch.cat([centres(~dense, (0.5, 0.5)), *quarters])


def _split_into_tiles(
    component: np.ndarray, min_area: int
) -> list[tuple[np.ndarray, tuple[float, float], tuple[float, float]]]:
    """The component, or slices across its main axis: (mask, axis, interval along the axis)."""
    y, x = component.nonzero()
    spread = np.cov(np.stack([x, y])) if len(x) > 1 else np.eye(2)
    axis = np.linalg.eigh(spread)[1][:, 1]  # of the largest eigenvalue
    along = x * axis[0] + y * axis[1]
    length = along.max() - along.min() + 1
    width = len(x) / length
    count = min(math.ceil(length / (_TILE_TO * width)), len(x) // min_area)
    direction = (float(axis[0]), float(axis[1]))
    if length < _TILE_FROM * width or count < 2:
        return [(component, direction, _EVERYWHERE)]
    edges = np.linspace(along.min(), along.max(), count + 1)
    edges[0], edges[-1] = -math.inf, math.inf
    tiles = []
    for begin, end in itertools.pairwise(edges):
        chosen = (along >= begin) & (along < end)
        if chosen.sum() >= min_area:
            mask = np.zeros_like(component)
            mask[y[chosen], x[chosen]] = True
            tiles.append((mask, direction, (float(begin), float(end))))
    return tiles


class _Places:
    """What an image looks like, by cells.

    Args:
        features: [C, h, w] of the whole image.
        size: (H, W) of the image.
    """

    def __init__(self, features: np.ndarray | None, size: tuple[int, ...]) -> None:
        assert features is not None
        self.features = features / np.linalg.norm(features, axis=0).clip(1e-6)
        self.cells = [
            np.arange(side) * count // side
            for side, count in zip(size, features.shape[1:], strict=True)
        ]

    def alike(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Where the image looks as it does at these pixels on the mean, [h, w] bool."""
        flat = self.features.reshape(len(self.features), -1)
        columns = self.features.shape[2]
        count = np.bincount(self.cells[0][y] * columns + self.cells[1][x], minlength=flat.shape[1])
        mean = flat @ count
        found = mean @ flat > _ALIKE * np.linalg.norm(mean)
        return found.reshape(self.features.shape[1:])

    def share(self, alike: np.ndarray, rows: slice, columns: slice) -> float:
        """Of the pixels in a rectangle those that `alike` names; 0 of none."""
        found = alike[np.ix_(self.cells[0][rows], self.cells[1][columns])]
        return float(found.mean()) if found.size else 0.0


def _elastic_box(
    mask: np.ndarray, corner: tuple[int, int], size: tuple[int, ...], places: _Places
) -> tuple[np.ndarray, np.ndarray]:
    """SAMRefiner's context-aware box: each side moves out by a tenth, at most 10 pixels, where
    the image beyond it looks as in the mask; y, x of the first and the last pixel."""
    y, x = mask.nonzero()
    y, x = y + corner[0], x + corner[1]
    low, high = np.array([y.min(), x.min()]), np.array([y.max(), x.max()])
    first, last = low.copy(), high.copy()
    alike = places.alike(y, x)
    step = np.minimum((high - low) // 10, 10)
    within = [slice(low[k], high[k] + 1) for k in (0, 1)]
    for k in (0, 1):
        before = slice(max(low[k] - step[k], 0), low[k])
        after = slice(high[k] + 1, min(high[k] + step[k] + 1, size[k]))
        for beside, ends, end in ((before, first, before.start), (after, last, after.stop - 1)):
            strip = (beside, within[1]) if k == 0 else (within[0], beside)
            if places.share(alike, *strip) > _CONTEXT:
                ends[k] = end
    return first, last


def _prompt_region(
    mask: np.ndarray,
    component: np.ndarray,
    corner: tuple[int, int],
    size: tuple[int, ...],
    style: Style,
    places: _Places | None,
) -> RegionPrompt:
    """The prompt for ``mask``, all or a tile of ``component``; a window of the image at ``corner``.

    Args:
        mask: [h, w] bool.
        component: [h, w] bool; the point off the region is off all of it.
        corner: y, x of the window in the image.
        size: (H, W) of the image.
        style: of the prompt.
        places: of the image, for an elastic box.
    """
    from scipy import ndimage

    # Look at the region with its surroundings: up to the grown box, and as far as the blur reaches.
    y, x = mask.nonzero()
    low = np.array([y.min(), x.min()]) + corner
    high = np.array([y.max(), x.max()]) + corner
    grow = np.clip(0.1 * (high - low + 1), 1, 20)  # SAM's training jitters boxes by 10 %, 20 px
    last = np.array(size) - 1
    if places is None:
        box_low, box_high = np.maximum(low - grow, 0), np.minimum(high + grow, last)
    else:
        box_low, box_high = _elastic_box(mask, corner, size, places)
    reach = np.maximum(grow, 3 * _BLUR)
    view_low = np.maximum(np.floor(low - reach), 0).astype(int)
    view_high = np.minimum(np.ceil(high + reach), last).astype(int)

    def view(of: np.ndarray) -> np.ndarray:
        out = np.zeros(view_high - view_low + 1, bool)
        rows, columns = of.nonzero()
        rows, columns = rows + corner[0] - view_low[0], columns + corner[1] - view_low[1]
        seen = (rows >= 0) & (rows < out.shape[0]) & (columns >= 0) & (columns < out.shape[1])
        out[rows[seen], columns[seen]] = True
        return out

    region, whole = view(mask), view(component)
    # Padded: the border of the image is an outline too, points keep away from it.
    depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    inner = np.array(np.unravel_index(depth.argmax(), depth.shape)) + view_low
    away = ndimage.distance_transform_edt(~whole)
    in_box = np.zeros_like(whole)
    first = np.ceil(box_low).astype(int) - view_low
    stop = np.floor(box_high).astype(int) - view_low + 1
    in_box[first[0] : stop[0], first[1] : stop[1]] = True
    away = np.where(in_box, away, 0)
    outer = np.array(np.unravel_index(away.argmax(), away.shape)) + view_low

    if style.mask_prompt == "gaussian":
        extended = places is not None and (np.any(box_low < low) or np.any(box_high > high))
        height = _EXTENDED_LOGIT if extended else _GAUSSIAN_LOGIT
        fall = (depth - depth.max()) ** 2 * _GAUSSIAN_FALL / region.sum()
        logits = np.where(region, height * np.exp(-fall), -height)
    else:
        height = PROMPT_LOGIT
        blur = float(np.clip(depth.max() / 2, 1, _BLUR))
        distance = depth - ndimage.distance_transform_edt(~region)  # signed, > 0 inside
        logits = np.sign(distance) * height * (1 - np.exp(-(distance**2) / (2 * blur**2)))
    return RegionPrompt(
        class_id=-1,
        box=(float(box_low[1]), float(box_low[0]), float(box_high[1]), float(box_high[0])),
        points=((float(inner[1]), float(inner[0])), (float(outer[1]), float(outer[0]))),
        point_labels=(1, 0 if away.max() > 0 else -1),
        corner=(int(view_low[0]), int(view_low[1])),
        mask=logits.astype(np.float32),
        outside=-height,
    )
