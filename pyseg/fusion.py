"""Masks from anywhere and the class map of a network become one class map, which is no worse.

Promptable segmenters draw good outlines but know no classes, and on a coarse map they can do harm.
So the network stays in charge of *what* is there. A mask only moves the network's outlines, only
where the network is unsure, and only after passing a gate: near its outline the network must say
more for the mask than a coin would. All other pixels keep the network's logits bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .types import Segmentation

VOTE = -1
"""In place of a class: the mask gets the class that the network finds most probable in it."""

_CONFIDENT = 0.8  # top-1 minus top-2 probability of a pixel that may contradict a mask
_BAND = 4  # pixels on both sides of an outline where it is held against the probabilities
_ONE_SIDE = 1.5  # times ``outline`` that is allowed within a mask alone, or around it
_TOGETHER = 4 / 3  # times ``outline`` for all masks together, parts of objects among them
_ROWS = 1 << 22  # pixels whose probabilities are held at once, all classes of them


class Region(NamedTuple):
    """Part of a class map that a mask answers for: a component, or a tile of one."""

    corner: tuple[int, int]  # y, x of `mask` in the image
    mask: Tensor  # [h, w] bool
    # Only pixels p with strip[0] <= axis . p < strip[1] count: the mask that answers for a tile is
    # of the whole component, as a rule.
    axis: tuple[float, float] = (1.0, 0.0)  # x, y
    strip: tuple[float, float] = (-math.inf, math.inf)


@dataclass(frozen=True)
class Rules:
    """When a mask is believed, and what it then changes. `SamRefiner` explains the options."""

    component_iou: float = 0.5
    area_ratio: float = 2.0
    agreement: float = 0.9
    outline: float = 0.3
    displacement: float = 1.0
    strength: float = 8.0
    boundary: int = 8
    margin: float = 0.5

    def __post_init__(self) -> None:
        if self.area_ratio < 1:
            raise ValueError(f"area_ratio must be at least 1, got {self.area_ratio}")
        if self.boundary < 0 or self.strength < 0:
            raise ValueError(
                "boundary and strength must not be negative, got "
                f"{self.boundary} and {self.strength}"
            )


@dataclass(frozen=True)
class _Accepted:
    """A mask that passed the gate, cut out to where it speaks."""

    class_id: int
    score: float
    area: int
    window: tuple[slice, slice]
    inside: Tensor  # [h, w] bool
    against: Tensor | None  # [h, w] bool: of its region, what it leaves out
    vote: Tensor  # [h, w] float: what its class gains, or loses where ``against``


@dataclass
class Fusion:
    """Takes masks for one prediction, in any order and number; `result` is the refined map.

    Args:
        prediction: with logits.
        rules: when a mask is believed, and what it changes.

    Raises:
        ValueError: the prediction has no logits.
    """

    prediction: Segmentation
    rules: Rules = Rules()
    _accepted: list[_Accepted] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._logits = self.prediction.full_logits()
        self._moves = torch.zeros(2, 2, dtype=torch.float64)  # of all masks with an outline
        self._outlines = self._pixels = 0
        self._error = 0.0

    @property
    def device(self) -> torch.device:
        return self._logits.device

    def add(
        self,
        masks: Tensor,
        scores: Tensor,
        classes: Sequence[int],
        regions: Sequence[Region | None] | None = None,
    ) -> list[bool]:
        """Offers K masks.

        Args:
            masks: [K, H, W] float logits, or bool.
            scores: [K] how good the masks are, 0 to 1.
            classes: K ids, `VOTE` where the network is to say.
            regions: what they answer for; a mask must fit its own, and may take of it what it
                leaves out.

        Returns:
            For each mask whether it was accepted.
        """
        if tuple(masks.shape[1:]) != tuple(self.prediction.size):
            raise ValueError(
                f"masks must be [K, {', '.join(map(str, self.prediction.size))}], the size of the "
                f"image, got {list(masks.shape)}"
            )
        given = [None] * len(masks) if regions is None else regions
        masks = masks.to(self.device)
        inside = masks if masks.dtype == torch.bool else masks > 0
        rows, columns = (_extent(inside.any(dim)) for dim in (2, 1))
        found = []
        for k, (class_id, region, score) in enumerate(
            zip(classes, given, scores.tolist(), strict=True)
        ):
            box = (*rows[k], *columns[k])
            accepted = self._judge(masks[k], inside[k], box, score, int(class_id), region)
            if accepted is not None:
                self._accepted.append(accepted)
            found.append(accepted is not None)
        return found

    @property
    def classes(self) -> set[int]:
        """Of the masks accepted."""
        return {mask.class_id for mask in self._accepted}

    def second_best(self, class_ids: Sequence[int]) -> dict[int, Tensor]:
        """Where each class is the second best and the best one leads by less than ``margin``,
        [H, W] bool."""
        if not class_ids or self._logits.shape[0] < 2:
            return {}
        second = torch.full(self.prediction.size, -1, device=self.device)
        for rows in self._parts():
            best, index = self._logits[:, rows].softmax(0).topk(2, 0)
            unsure = best[0] - best[1] < self.rules.margin
            second[rows] = torch.where(unsure, index[1], -1)
        return {k: second == k for k in class_ids}

    def result(self, least: Mapping[int, float] | None = None) -> Segmentation:
        """The prediction with what the accepted masks change; itself if that is nothing.

        Args:
            least: ids of the classes that masks may get, with the least score of such masks; None =
                all classes, and any score.
        """
        accepted = [
            mask
            for mask in self._accepted
            if least is None or mask.score >= least.get(mask.class_id, math.inf)
        ]
        if not accepted or self.rules.strength == 0:
            return self.prediction
        if self._outlines and not (
            self._error <= _TOGETHER * self.rules.outline * self._pixels
            and self._in_place(self._moves, self._outlines)
        ):
            return self.prediction  # who draws outlines anywhere is right by chance
        size = self.prediction.size
        zone = self._zone()
        owner = torch.full(size, -1, dtype=torch.int16, device=self.device)
        gain = torch.zeros(size, device=self.device)
        loss: dict[int, Tensor] = {}
        # Large first, so that small ones paint over them.
        for mask in sorted(accepted, key=lambda mask: -mask.area):
            own, amount = owner[mask.window], gain[mask.window]
            own[mask.inside] = mask.class_id
            amount[mask.inside] = mask.vote[mask.inside]
            if mask.against is not None:
                if mask.class_id not in loss:
                    loss[mask.class_id] = torch.zeros(size, device=self.device)
                lost = loss[mask.class_id][mask.window]
                lost.copy_(torch.where(mask.against, lost.minimum(mask.vote), lost))
        logits = self._logits.clone()
        changed = False
        for class_id in sorted({mask.class_id for mask in accepted}):
            mine = owner == class_id
            change = torch.where(mine, gain, 0)
            if class_id in loss:
                change = torch.where(mine, change, loss[class_id])
            change = torch.where(zone, change, 0)
            if bool(change.any()):
                changed = True
                plane = logits[class_id]
                plane.copy_(torch.where(change != 0, plane + change, plane))
        return self.prediction.with_logits(logits) if changed else self.prediction

    def _judge(
        self,
        mask: Tensor,
        inside: Tensor,
        box: tuple[int, int, int, int],
        score: float,
        class_id: int,
        region: Region | None,
    ) -> _Accepted | None:
        """The gate: the mask cut out, or None."""
        rules = self.rules
        top, bottom, left, right = box
        if top >= bottom or math.isnan(score):
            return None
        if region is not None:  # an empty mask fits none
            (y, x), (h, w) = region.corner, region.mask.shape
            top, left = min(top, y), min(left, x)
            bottom, right = max(bottom, y + h), max(right, x + w)
        reach = max(rules.boundary, _BAND) + 1
        height, width = self.prediction.size
        top, left = max(top - reach, 0), max(left - reach, 0)
        window = slice(top, min(bottom + reach, height)), slice(left, min(right + reach, width))
        whole = inside[window]
        inside, own, weight = whole, None, score
        counted = torch.ones_like(whole)
        if region is not None:
            counted = _strip(region, window, self.device)
            inside = whole & counted
            own = torch.zeros_like(inside)
            y, x = region.corner[0] - top, region.corner[1] - left
            h, w = region.mask.shape
            own[y : y + h, x : x + w] = region.mask.to(self.device)
            area, region_area, overlap = (int(m.sum()) for m in (inside, own, inside & own))
            if not area or not region_area:
                return None
            iou = overlap / (area + region_area - overlap)
            ratio = area / region_area
            if iou < rules.component_iou or not 1 / rules.area_ratio <= ratio <= rules.area_ratio:
                return None
            weight *= iou
        else:
            area = int(inside.sum())
        probabilities = self._logits[(slice(None), *window)].softmax(0)
        if class_id == VOTE:
            class_id = int(probabilities[:, inside].mean(1).argmax())
        if own is None and not self._agrees(inside, class_id, probabilities):
            return None
        if not self._outline_fits(whole, probabilities[class_id], counted):
            return None
        against = None
        if own is not None:
            # A mask speaks against its class only on its own region and near itself: further off
            # another object of the class may stand.
            against = own & _grow(inside, rules.boundary) & ~inside
        if mask.dtype == torch.bool:
            vote = torch.where(inside, 1.0, -1.0)
        else:
            vote = torch.tanh(mask[window].float() / 2)  # tanh(m / 2) = 2 sigmoid(m) - 1
        return _Accepted(
            class_id, score, area, window, inside, against, rules.strength * weight * vote
        )

    def _agrees(self, inside: Tensor, class_id: int, probabilities: Tensor) -> bool:
        """Whether most of what the network is sure about in a mask is of the mask's class."""
        sure = inside & (_margin(probabilities) >= _CONFIDENT)
        right = sure & (probabilities.argmax(0) == class_id)
        return int(right.sum()) >= self.rules.agreement * int(sure.sum())

    def _outline_fits(self, inside: Tensor, p: Tensor, counted: Tensor) -> bool:
        """Whether the class's probability ``p`` [h, w] changes where the mask ends, as far as
        pixels are ``counted``: where a strip cuts a mask is no outline."""
        within = inside & _grow(~inside, _BAND) & counted
        around = ~inside & _grow(inside, _BAND) & counted
        if not around.any():  # all of the image
            return True
        moves = _moves(inside, p, counted)
        errors = [float((off**2).sum()) for off in (1 - p[within], p[around])]
        counts = [int(within.sum()), int(around.sum())]
        self._outlines += 1
        self._moves += moves
        self._error += sum(errors)
        self._pixels += sum(counts)
        limit = self.rules.outline
        return (
            sum(errors) <= limit * sum(counts)
            and all(e <= _ONE_SIDE * limit * n for e, n in zip(errors, counts, strict=True))
            and self._in_place(moves, 1)
        )

    def _in_place(self, moves: Tensor, masks: int) -> bool:
        """Whether masks lie where the probabilities have them: see `_moves`, here summed over
        ``masks``. Of few masks, which may each be off by chance, less is asked."""
        allowed = self.rules.displacement * (1 + 5 / math.sqrt(masks))
        if math.isinf(allowed):
            return True
        for onward, back in moves.tolist():
            # Newton's step to the least error, -(f(1) - f(-1)) / (2 (f(1) + f(-1) - 2 f(0))).
            if abs(onward - back) > allowed * 2 * max(onward + back, 0):
                return False
        return True

    def _zone(self) -> Tensor:
        """Pixels that may change, [H, W] bool: near a label boundary or with a small margin."""
        labels = self.prediction.labels
        edge = torch.zeros_like(labels, dtype=torch.bool)
        across = labels[:, 1:] != labels[:, :-1]
        down = labels[1:] != labels[:-1]
        edge[:, 1:] |= across
        edge[:, :-1] |= across
        edge[1:] |= down
        edge[:-1] |= down
        zone = _grow(edge, self.rules.boundary)
        for rows in self._parts():
            zone[rows] |= _margin(self._logits[:, rows].softmax(0)) < self.rules.margin
        return zone

    def _parts(self) -> Iterator[slice]:
        """Rows of the image whose probabilities are held at once."""
        channels, height, width = self._logits.shape
        step = max(1, _ROWS // max(1, channels * width))
        for start in range(0, height, step):
            yield slice(start, start + step)


def fuse(
    prediction: Segmentation,
    masks: Tensor | Iterable[Tensor],
    scores: Tensor | Sequence[float] | None = None,
    classes: Tensor | Sequence[int] | None = None,
    *,
    rules: Rules = Rules(),
) -> Segmentation:
    """Refines a prediction with masks, whatever they are from.

    Args:
        prediction: with logits.
        masks: K masks at the size of the image, [H, W] each: bool, or float logits, which count
            for less near 0. A tensor [K, H, W], a list, or an iterator that makes them one by one.
        scores: K numbers from 0 to 1, how good each mask is; None = 1 each.
        classes: K class ids, `VOTE` (-1) where the network is to say; None = it says for all.
        rules: when a mask is believed, and what it changes.

    Returns:
        A prediction with logits [C, H, W] at full resolution; ``prediction`` itself where no mask
        changes anything.

    Raises:
        ValueError: the prediction has no logits, masks of another size, fewer or more scores or
            classes than masks, a class that the prediction does not have.

    Example:
        >>> fuse(prediction, masks, scores=[0.9, 0.8], classes=[VOTE, 3])
    """
    given = None if classes is None else [int(c) for c in classes]
    count = len(prediction.classes)
    if bad := [c for c in given or () if not (c == VOTE or 0 <= c < count)]:
        raise ValueError(f"classes must be {VOTE} or 0 to {count - 1}, got {bad[0]}")
    quality = None if scores is None else [float(score) for score in scores]
    fusion = Fusion(prediction, rules)
    number = 0
    for number, mask in enumerate(_each(masks), 1):
        if any(values is not None and len(values) < number for values in (given, quality)):
            break
        score = 1.0 if quality is None else quality[number - 1]
        class_id = VOTE if given is None else given[number - 1]
        fusion.add(mask[None], torch.tensor([score]), [class_id])
    for name, values in (("scores", quality), ("classes", given)):
        if values is not None and len(values) != number:
            more = "at least " if number > len(values) else ""
            raise ValueError(f"got {len(values)} {name} for {more}{number} masks")
    return fusion.result()


def require_image_of(image: Tensor, prediction: Segmentation) -> None:
    """Refuses an image [3, H, W] that is not uint8 RGB, or that ``prediction`` is not of.

    Raises:
        ValueError: another dtype, shape or size.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"image must be uint8 RGB [3, H, W], got {image.dtype} {list(image.shape)}"
        )
    if tuple(image.shape[1:]) != tuple(prediction.size):
        raise ValueError(
            f"image is {list(image.shape[1:])} but the prediction is of an image "
            f"of {list(prediction.size)}"
        )


def _each(masks: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    for mask in masks:
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"masks must be tensors [H, W], got {shape}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"masks must be bool, or float logits, got {mask.dtype}")
        yield mask


def _extent(used: Tensor) -> list[tuple[int, int]]:
    """First and last + 1 of what is set in each row of [K, N] bool; 0, 0 where nothing is."""
    some = used.any(1)
    numbers = used.to(torch.uint8)
    first = torch.where(some, numbers.argmax(1), 0)
    stop = torch.where(some, used.shape[1] - numbers.flip(1).argmax(1), 0)
    return list(zip(first.tolist(), stop.tolist(), strict=True))


def _strip(region: Region, window: tuple[slice, slice], device: torch.device) -> Tensor:
    """Pixels of the window in the region's strip, [h, w] bool."""
    rows, columns = window
    y = torch.arange(rows.start, rows.stop, device=device)[:, None]
    x = torch.arange(columns.start, columns.stop, device=device)
    along = x * region.axis[0] + y * region.axis[1]
    return (along >= region.strip[0]) & (along < region.strip[1])


def _moves(inside: Tensor, p: Tensor, counted: Tensor) -> Tensor:
    """What moving a mask by a pixel would change.

    Args:
        inside: the mask, [h, w] bool.
        p: probability of its class, [h, w].
        counted: pixels between which there may be an outline, [h, w] bool.

    Returns:
        [2, 2] float64: by how much the sum of (mask - p) ** 2 grows if the mask moves onward and
        if it moves back, along x and along y.
    """
    changes = []
    for dim in (1, 0):
        length = inside.shape[dim] - 1
        before, after = inside.narrow(dim, 0, length), inside.narrow(dim, 1, length)
        # A pixel that joins adds (1 - p)^2 - p^2 = 1 - 2 p, one that leaves takes that away.
        first, second = 1 - 2 * p.narrow(dim, 0, length), 1 - 2 * p.narrow(dim, 1, length)
        pairs = counted.narrow(dim, 0, length) & counted.narrow(dim, 1, length)
        begins, ends = after & ~before & pairs, before & ~after & pairs
        onward = second[ends].sum() - second[begins].sum()
        back = first[begins].sum() - first[ends].sum()
        changes.append(torch.stack([onward, back]))
    return torch.stack(changes).double().cpu()


def _margin(probabilities: Tensor) -> Tensor:
    """Best minus second best probability of every pixel, [H, W]."""
    if probabilities.shape[0] == 1:
        return torch.ones_like(probabilities[0])
    best = probabilities.topk(2, 0).values
    return best[0] - best[1]


def _grow(mask: Tensor, reach: int) -> Tensor:
    """A mask [H, W] and all that lies within ``reach`` pixels of it, along rows and columns."""
    for dim in (0, 1):
        mask = _spread(mask, dim, reach, True) | _spread(mask, dim, reach, False)
    return mask


def _spread(mask: Tensor, dim: int, reach: int, forward: bool) -> Tensor:
    """Where a bool ``mask`` holds, and the next ``reach`` pixels from there on along ``dim``, or
    back. Each step doubles what is covered: some 20 times as fast as pooling on a CPU."""
    length = mask.shape[dim]
    reach = min(reach, length - 1)
    covered = 0
    while covered < reach:
        step = min(covered + 1, reach - covered)
        low, high = (mask.narrow(dim, start, length - step) for start in (0, step))
        both = low | high
        rest = mask.narrow(dim, 0 if forward else length - step, step)
        mask = torch.cat([rest, both] if forward else [both, rest], dim)
        covered += step
    return mask
