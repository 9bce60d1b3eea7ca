"""Editing one image by hand: clicks and boxes that a promptable segmenter answers, and a brush.

A session holds the image's embedding, what is being asked, and the map as edited so far. Prompts
gather until `Session.accept` makes their mask a part of the map; every step can be undone. What a
step keeps is the window that it changed, packed, so that memory does not grow with the image.
"""

from __future__ import annotations

import difflib
import math
import os
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import LabelError, PysegError
from .formats import Region
from .image import read_image, read_labels
from .promptable import PROMPT_LOGIT, Promptable, Prompts
from .regions import Instances, Segment, Segments, void_label
from .types import Segmentation

Kind = Literal["labels", "segments", "instances"]
KINDS: tuple[Kind, ...] = ("labels", "segments", "instances")
_COUNTED = 1 << 22  # ids up to here are counted in a table, which is some 20 times as fast

_REMEDY = (
    "build the pipeline with one, such as pyseg.build('streetnet+sam2').session(image), or give "
    "promptable=, such as that of pyseg.promptable.load_sam2(); brush needs none"
)


class Answer(NamedTuple):
    """A mask that a prompt has got."""

    mask: Tensor  # [H, W] bool
    score: float  # the IoU that the segmenter predicts for it; 1 of a region that was selected


class Asked(NamedTuple):
    """What a session's prompt asks, to be shown or kept."""

    points: tuple[tuple[float, float], ...]  # x, y
    positive: tuple[bool, ...]  # whether the object has the point
    box: tuple[float, float, float, float] | None  # xyxy
    label: str | None  # class that the mask is to get; "void" for none
    selected: tuple[int, int] | None  # x, y of a pixel of the region that was taken up


@dataclass(frozen=True)
class _Prompt:
    """What is being asked, and the answer; immutable, as the history holds it."""

    points: tuple[tuple[float, float], ...] = ()
    signs: tuple[int, ...] = ()  # 1 on the object, 0 off it
    box: tuple[float, float, float, float] | None = None
    label: int | None = None  # that the mask is to get
    selected: Region | None = None  # where it began
    target: int | None = None  # the segment or instance that it is of
    logits: Tensor | None = None  # [h, w] the answer, at the segmenter's size
    score: float = 1.0

    @property
    def empty(self) -> bool:
        return not self.points and self.box is None and self.selected is None

    @property
    def nbytes(self) -> int:
        return 0 if self.logits is None else self.logits.nbytes


@dataclass(frozen=True)
class _Patch:
    """What turns a map into another and back: the bits that differ, in the window where some do."""

    window: tuple[slice, slice]
    shape: tuple[int, int]
    packed: bytes

    @classmethod
    def between(cls, old: np.ndarray, new: np.ndarray, top: int, left: int) -> _Patch | None:
        """Of two versions of a window of a map, with its corner in it; None if they are equal."""
        bits = old ^ new
        rows, columns = np.flatnonzero(bits.any(1)), np.flatnonzero(bits.any(0))
        if not rows.size:
            return None
        y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        bits = np.ascontiguousarray(bits[y0:y1, x0:x1])
        window = slice(int(top + y0), int(top + y1)), slice(int(left + x0), int(left + x1))
        return cls(window, (bits.shape[0], bits.shape[1]), zlib.compress(bits.tobytes(), 1))

    def apply(self, to: np.ndarray) -> None:
        bits = np.frombuffer(zlib.decompress(self.packed), to.dtype).reshape(self.shape)
        to[self.window] ^= bits


@dataclass(frozen=True)
class _Change:
    """Of a canvas: pixels of its map, and entries of its table before and after; None = absent."""

    patch: _Patch | None = None
    entries: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        regions = [e for pair in self.entries.values() for e in pair if isinstance(e, Region)]
        packed = 0 if self.patch is None else len(self.patch.packed)
        return packed + sum(region.mask.nbytes for region in regions)


@dataclass(frozen=True)
class _Step:
    before: _Prompt
    after: _Prompt
    change: _Change | None

    @property
    def nbytes(self) -> int:
        return self.after.nbytes + (0 if self.change is None else self.change.nbytes)


class _Canvas:
    """What is edited: a map, a table of what its values stand for, or both."""

    map: np.ndarray  # [H, W]; instances, which may overlap, have none
    table: dict[int, Any]
    void = 0  # in the map

    def apply(self, change: _Change, forward: bool) -> None:
        if change.patch is not None:
            change.patch.apply(self.map)
        for key, pair in change.entries.items():
            if (value := pair[forward]) is None:
                self.table.pop(key, None)
            else:
                self.table[key] = value

    def _repainted(self, area: Region, value: int, left_out: Region | None) -> _Patch | None:
        """``area`` gets ``value``, and what it does not have of ``left_out`` that of near pixels.

        So that no pixel is without a value: a map stays exhaustive.
        """
        boxes = [region.box for region in (area, left_out) if region is not None and region.area]
        if not boxes:
            return None
        height, width = self.map.shape
        # One pixel more: the frame is neither of the region nor of the mask.
        left, top = (max(0, min(box[k] for box in boxes) - 1) for k in (0, 1))
        right = min(width, max(box[2] for box in boxes) + 1)
        bottom = min(height, max(box[3] for box in boxes) + 1)
        old = self.map[top:bottom, left:right]
        inside = _within(area, (top, left), old.shape)
        new = old.copy()
        if left_out is not None:
            given_up = _within(left_out, (top, left), old.shape) & ~inside
            taken = inside | given_up
            if given_up.any() and not taken.all():
                from scipy import ndimage

                y, x = ndimage.distance_transform_edt(
                    taken, return_distances=False, return_indices=True
                )
                new[given_up] = old[y[given_up], x[given_up]]
            elif given_up.any():  # the image holds nothing else
                new[given_up] = self.void
        new[inside] = value
        return _Patch.between(old, new, top, left)

    def at(self, x: int, y: int) -> tuple[Region, int | None] | None:
        """The region at a pixel and its key in the table; None where there is none."""
        raise NotImplementedError

    def paint(
        self, area: Region, label: int, target: int | None, selected: Region | None, whole: bool
    ) -> _Change:
        """Makes ``area`` a region of class ``label``.

        Args:
            target: the key of an existing region that it becomes part of.
            selected: that region, or the part of a label map which the area is a version of.
            whole: the area is all of the target, rather than more of it.
        """
        raise NotImplementedError

    def erase(self, area: Region, target: int | None) -> _Change:
        """Takes ``area`` from one region, or from all."""
        raise NotImplementedError

    def fill(self, result: Segmentation) -> Segmentation:
        """``result`` with what is on the canvas."""
        raise NotImplementedError


class _LabelCanvas(_Canvas):
    def __init__(self, start: Segmentation) -> None:
        self.void, self.dtype = void_label(len(start.classes))
        self.map = start.labels.cpu().to(self.dtype).numpy().copy()
        self.table = {}

    def at(self, x: int, y: int) -> tuple[Region, None] | None:
        label = int(self.map[y, x])
        if label == self.void:
            return None
        from scipy import ndimage

        parts, _ = ndimage.label(self.map == label, structure=np.ones((3, 3), int))
        return Region.cut(label, parts == parts[y, x]), None

    def paint(
        self, area: Region, label: int, target: int | None, selected: Region | None, whole: bool
    ) -> _Change:
        return _Change(self._repainted(area, label, selected if whole else None))

    def erase(self, area: Region, target: int | None) -> _Change:
        return _Change(self._repainted(area, self.void, None))

    def fill(self, result: Segmentation) -> Segmentation:
        return result.with_labels(torch.from_numpy(self.map.copy()))


class _SegmentCanvas(_Canvas):
    def __init__(self, start: Segments, things: Collection[int] | None) -> None:
        self.map = start.map.cpu().to(torch.int32).numpy().copy()
        self.table = {item.id: item for item in start.items}
        self.order = {item.id: k for k, item in enumerate(start.items)}
        self.things = things

    def at(self, x: int, y: int) -> tuple[Region, int] | None:
        item = self.table.get(key := int(self.map[y, x]))
        return None if item is None else (Region.cut(item.label, self.map == key), key)

    def paint(
        self, area: Region, label: int, target: int | None, selected: Region | None, whole: bool
    ) -> _Change:
        if target is None and self.things is not None and label not in self.things:
            # A panoptic map has one segment of each class that is not counted.
            target = next((key for key, item in self.table.items() if item.label == label), None)
            whole = False
        old = None if target is None else self.table[target]
        key = max(self.table, default=0) + 1 if target is None else target
        new = Segment(key, label, 1.0, 0) if old is None else replace(old, label=label)
        if whole:
            new = replace(new, score=1.0, crowd=False)
        patch = self._repainted(area, key, selected if whole else None)
        return _Change(patch, {} if old == new else {key: (old, new)})

    def erase(self, area: Region, target: int | None) -> _Change:
        if target is not None:
            mask = _within(area, (0, 0), self.map.shape) & (self.map == target)
            area = Region.cut(area.label, mask)
        return _Change(self._repainted(area, self.void, None))

    def fill(self, result: Segmentation) -> Segmentation:
        if self.map.size and self.map.max() < _COUNTED:
            counts = np.bincount(self.map.ravel())
            found = counts.nonzero()[0]
            counts = counts[found]
        else:
            found, counts = np.unique(self.map, return_counts=True)
        areas = dict(zip(found.tolist(), counts.tolist(), strict=True))
        keys = sorted(
            (key for key in self.table if key in areas),
            key=lambda key: self.order.get(key, len(self.order) + key),
        )
        items = tuple(replace(self.table[key], area=areas[key]) for key in keys)
        return result.with_segments(Segments(torch.from_numpy(self.map.copy()), items))


class _InstanceCanvas(_Canvas):
    """Regions by number. Boxes of the start are kept with their regions as long as these are."""

    def __init__(self, start: Instances, size: tuple[int, int]) -> None:
        self.size, self.boxes, self.crowds = size, start.boxes.cpu(), start.crowd is not None
        masks = start.masks.cpu().numpy()
        crowd = start.crowd
        self.table = {
            k: Region.cut(
                int(start.labels[k]),
                mask,
                score=float(start.scores[k]),
                crowd=False if crowd is None else bool(crowd[k]),
            )
            for k, mask in enumerate(masks)
        }
        self.untouched = dict(self.table)
        self.next = len(masks)

    def at(self, x: int, y: int) -> tuple[Region, int] | None:
        # The last of the most certain ones is on top, as in `Instances.label_map`.
        for key in sorted(self.table, key=lambda k: (self.table[k].score, k), reverse=True):
            region = self.table[key]
            left, top, right, bottom = region.box
            if left <= x < right and top <= y < bottom and region.mask[y - top, x - left]:
                return region, key
        return None

    def paint(
        self, area: Region, label: int, target: int | None, selected: Region | None, whole: bool
    ) -> _Change:
        key, old = target, None if target is None else self.table[target]
        if key is None:
            key, self.next = self.next, self.next + 1
        mask = area.full(self.size)
        if old is not None and not whole:
            mask |= old.full(self.size)
        return _Change(None, {key: (old, Region.cut(label, mask))})

    def erase(self, area: Region, target: int | None) -> _Change:
        entries: dict[int, tuple[Any, Any]] = {}
        for key in self.table if target is None else [target]:
            old = self.table[key]
            left, top, _, _ = old.box
            rest = old.mask & ~_within(area, (top, left), old.mask.shape)
            if (rest != old.mask).any():
                part = Region.cut(old.label, rest)
                moved = replace(part, left=part.left + left, top=part.top + top)
                new = replace(moved, score=old.score, crowd=old.crowd)
                entries[key] = (old, new if new.area else None)
        return _Change(None, entries)

    def fill(self, result: Segmentation) -> Segmentation:
        keys = sorted(self.table)
        regions = [self.table[key] for key in keys]
        masks = torch.zeros(len(keys), *self.size, dtype=torch.bool)
        boxes = torch.zeros(len(keys), 4)
        for k, (key, region) in enumerate(zip(keys, regions, strict=True)):
            masks[k] = torch.from_numpy(region.full(self.size))
            own = region is self.untouched.get(key)
            boxes[k] = self.boxes[key] if own else torch.tensor(region.box)
        instances = Instances(
            boxes,
            masks,
            torch.tensor([region.score for region in regions]).reshape(-1),
            torch.tensor([region.label for region in regions], dtype=torch.int64),
            torch.tensor([region.crowd for region in regions], dtype=torch.bool)
            if self.crowds
            else None,
        )
        return replace(result, instances=instances)


class Session:
    """The editing of one image. `Pipeline.session` makes one that begins with its prediction.

    Points and boxes gather into one prompt; its mask becomes part of the map by `accept`. A class
    that is named stays in force until another is. Coordinates are x, y in pixels of the image, the
    first pixel at 0. A session is for one thread at a time.

    Args:
        image: anything that `pyseg.image.read_image` takes.
        classes: their names; None = those of ``start``.
        start: what is edited: a `Segmentation`, a label map (tensor, array or PNG, [H, W]; a bool
            mask is class 1 on class 0), `Segments` or `Instances`; None = a map that is void.
        edit: ``"labels"``, ``"segments"`` or ``"instances"`` of it; None = segments or else
            instances where ``start`` has them, otherwise labels.
        promptable: what answers clicks and boxes (see `pyseg.promptable`); without it there is the
            brush alone.
        palette: one RGB colour per class.
        things: of segments: names of the classes that are counted; of any other there is one
            segment, to which all is added. None = each mask becomes a segment of its own.
        history: bytes that may be kept for `undo`; the oldest steps are forgotten, the last never.

    Raises:
        PysegError: there are no classes, or ``start`` is of another size or has no such part.
        ImageError: the image cannot be read.
        LabelError: ``start`` holds values that are no class.

    Example:
        >>> session = pyseg.build("streetnet+sam2").session("street.jpg")
        >>> session.click(310, 140, label="Car").score
        0.93
        >>> session.click(355, 150, positive=False)
        >>> session.accept()
        >>> session.result.save("street.png")
    """

    def __init__(
        self,
        image: Any,
        classes: Sequence[str] | None = None,
        *,
        start: Any = None,
        edit: Kind | None = None,
        promptable: Promptable | None = None,
        palette: Sequence[tuple[int, int, int]] | None = None,
        things: Collection[str] | None = None,
        history: int = 64 << 20,
    ) -> None:
        if edit not in (None, *KINDS):
            raise ValueError(f"edit must be one of {', '.join(KINDS)}, got {edit!r}")
        if history < 0:
            raise ValueError(f"history must not be negative, got {history}")
        self.image = read_image(image)
        self.size = (self.image.shape[1], self.image.shape[2])
        self.promptable = promptable
        self.history = history
        begun = self._begin(start, classes, edit)
        self.classes = begun.classes
        self._palette = tuple(palette) if palette is not None else begun.palette
        self.edit: Kind = edit or _kind_of(begun)
        self._canvas = self._new_canvas(begun, things)
        self._prompt = _Prompt()
        self._done: list[_Step] = []
        self._undone: list[_Step] = []
        self.version = 0  # counts changes of the map, so that who keeps it knows when
        self._embedding: Any = None

    def _begin(self, start: Any, classes: Sequence[str] | None, edit: Kind | None) -> Segmentation:
        """The start as a `Segmentation`."""
        if isinstance(start, Segmentation):
            if classes is not None and tuple(classes) != start.classes:
                raise PysegError(
                    f"start has the classes {list(start.classes)}, got classes={list(classes)}: "
                    "leave classes out"
                )
            found = start
        elif not classes or isinstance(classes, str):
            raise PysegError(f"classes must be the names of the classes, got {classes!r}")
        else:
            empty = Segmentation(self.size, tuple(classes))
            if isinstance(start, Segments):
                _check_size(start.map.shape, self.size)
                found = empty.with_segments(start)
            elif isinstance(start, Instances):
                _check_size(start.masks.shape[1:], self.size)
                found = replace(empty, instances=start)
            elif start is None and edit == "segments":
                found = empty.with_segments(Segments(torch.zeros(self.size, dtype=torch.int32), ()))
            elif start is None and edit == "instances":
                found = replace(empty, instances=_no_instances(self.size))
            else:
                labels = self._read_labels(start, len(classes))
                _check_size(labels.shape, self.size)
                found = empty.with_labels(labels)
        _check_size(found.size, self.size)
        self._check_labels(found)
        return found

    def _read_labels(self, start: Any, count: int) -> Any:
        void, dtype = void_label(count)
        if start is None:
            return torch.full(self.size, void, dtype=dtype)
        if isinstance(start, (str, os.PathLike)):
            labels: Any = read_labels(Path(start)).int()
            if void < 0:  # as `Segmentation.save` writes it
                labels = labels.masked_fill(labels == 65535, void)
            return labels.to(dtype) if int(labels.max()) <= torch.iinfo(dtype).max else labels
        if str(getattr(start, "dtype", "")).endswith("bool"):
            return torch.as_tensor(start).to(dtype)
        return start

    def _check_labels(self, found: Segmentation) -> None:
        items = () if found.segments is None else found.segments.items
        labels = [item.label for item in items]
        if found.instances is not None:
            labels += found.instances.labels.tolist()
        if bad := [label for label in labels if not 0 <= label < len(found.classes)]:
            raise LabelError(
                f"start has a region of class {bad[0]}, and there are {len(found.classes)} classes"
            )

    def _new_canvas(self, begun: Segmentation, things: Collection[str] | None) -> _Canvas:
        if self.edit == "labels":
            return _LabelCanvas(begun)
        found = begun.segments if self.edit == "segments" else begun.instances
        if found is None:
            raise PysegError(
                f"start has no {self.edit}, only {_kind_of(begun)}; leave edit out, or give start "
                f"a pyseg.{self.edit.capitalize()}"
            )
        if isinstance(found, Instances):
            return _InstanceCanvas(found, self.size)
        counted = None if things is None else {self._label_of(name) for name in things}
        return _SegmentCanvas(found, counted)

    # --- what is asked ----------------------------------------------------------------------

    def embed(self) -> None:
        """Computes the image's embedding, which the first prompt does otherwise."""
        if self._embedding is None:
            with torch.no_grad():
                self._embedding = self._segmenter().embed(self.image)

    def click(
        self, x: float, y: float, positive: bool = True, label: str | int | None = None
    ) -> Answer:
        """Adds a point to the prompt: on the object, or off it.

        Args:
            x: from the left,
            y: from the top.
            positive: whether the object has it.
            label: class that the mask is to get, by name or index; None = as before.

        Raises:
            PysegError: a point outside the image, or nothing that answers prompts.
            LabelError: an unknown class.
        """
        return self._ask(self._with_point(x, y, positive, label))

    def preview(
        self, x: float, y: float, positive: bool = True, label: str | int | None = None
    ) -> Answer:
        """What `click` would answer. Changes nothing."""
        return self._answer(self._predicted(self._with_point(x, y, positive, label)))

    def box(
        self, x0: float, y0: float, x1: float, y1: float, label: str | int | None = None
    ) -> Answer:
        """Gives the prompt a box in place of the one that it has; parts beyond the image are cut.

        Raises:
            PysegError: a box without area or wholly outside the image, or nothing that answers
                prompts.
            LabelError: an unknown class.
        """
        values = [float(value) for value in (x0, y0, x1, y1)]
        (height, width), given = self.size, tuple(values)
        if not all(map(math.isfinite, values)) or not (x0 < x1 and y0 < y1):
            raise PysegError(f"a box is x0, y0, x1, y1 with x0 < x1 and y0 < y1, got {given}")
        if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
            raise PysegError(f"the box {given} is outside the image of {width} x {height} pixels")
        low, high = (max(x0, 0.0), max(y0, 0.0)), (min(x1, float(width)), min(y1, float(height)))
        cut = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
        # Without the answer to another box, which would pull towards that one.
        return self._ask(replace(self._prompt, box=cut, label=self._label(label), logits=None))

    def select(self, x: float, y: float) -> Answer:
        """Takes up the region at a pixel, for clicks to correct and `accept` to replace.

        The region is a segment, the most certain instance, or of a label map the connected part of
        one class.

        Raises:
            PysegError: there is none, or the point is outside the image.
        """
        point = self._point(x, y)
        found = self._canvas.at(int(point[0]), int(point[1]))
        if found is None:
            raise PysegError(f"there is no region at {point}: click and accept make one")
        region, target = found
        prompt = _Prompt(label=region.label, selected=region, target=target)
        self._record(prompt)
        return self._answer(prompt)

    def clear(self) -> None:
        """Gives up what is being asked."""
        if not self._prompt.empty:
            self._record(_Prompt(label=self._prompt.label))

    # --- what is changed --------------------------------------------------------------------

    def accept(self, label: str | int | None = None) -> None:
        """Makes the mask of the prompt a part of the map, and begins another prompt.

        A mask replaces what was selected; of a map, pixels that it gives up go to what is nearest.

        Args:
            label: its class, by name or index, or ``"void"``; None = that of the last click, box or
                selection.

        Raises:
            PysegError: there is no prompt, its mask is empty, or its class was never named.
            LabelError: an unknown class.
        """
        prompt, given = self._prompt, self._label(label)
        if prompt.empty:
            raise PysegError("there is nothing to accept: click, box or select comes first")
        mask = self._answer(prompt).mask.numpy()
        if not mask.any():
            raise PysegError("the mask is empty: add points, or clear() to begin again")
        if given is None:
            raise PysegError(f"label must name the class, one of {', '.join(self.classes)}")
        area = Region.cut(given, mask)
        if given == self._void:
            change = self._canvas.erase(area, prompt.target)
        else:
            change = self._canvas.paint(area, given, prompt.target, prompt.selected, whole=True)
        self._apply(change, True)
        self._record(_Prompt(label=prompt.label if given == self._void else given), change)

    def brush(self, mask: Tensor | np.ndarray, label: str | int | None = None) -> None:
        """Paints pixels at once, without a segmenter. Points and boxes that were set are given up.

        Of segments and instances the pixels become part of the selected one, or a new one. The
        class ``"void"`` takes them from the selected one, or from all; one that has no pixel left
        is gone.

        Args:
            mask: [H, W] bool.
            label: class by name or index, or ``"void"``; None = as before.

        Raises:
            PysegError: the mask is not bool or of another size, or no class was ever named.
            LabelError: an unknown class.
        """
        array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
        if array.dtype != np.bool_ or array.shape != self.size:
            raise PysegError(
                f"mask must be bool [{self.size[0]}, {self.size[1]}], the size of the image, got "
                f"{array.dtype} {list(array.shape)}; compare, such as mask > 0"
            )
        given = self._label(label)
        if given is None:
            raise PysegError(f"label must name the class, one of {', '.join(self.classes)}")
        area, target = Region.cut(given, array), self._prompt.target
        if not area.area:
            return
        if given == self._void:
            change = self._canvas.erase(area, target)
        else:
            change = self._canvas.paint(area, given, target, None, whole=False)
        if change.patch is None and not change.entries:
            return
        self._apply(change, True)
        prompt = _Prompt(label=self._prompt.label if given == self._void else given)
        if target is not None and (found := self._region(target)) is not None:
            prompt = replace(prompt, selected=found, target=target)
        self._record(prompt, change)

    def fill(self, x: float, y: float, label: str | int | None = None) -> None:
        """Brushes the connected part of one class, or of void, that holds a pixel.

        Parts are connected by edges, so that a diagonal line bounds them.

        Args:
            x: from the left,
            y: from the top.
            label: class by name or index, or ``"void"``; None = as before.

        Raises:
            PysegError: the point is outside the image, or no class was ever named.
            LabelError: an unknown class.
        """
        from scipy import ndimage

        column, row = map(int, self._point(x, y))
        labels = self.result.labels.numpy()
        parts, _ = ndimage.label(labels == labels[row, column])
        self.brush(parts == parts[row, column], label)

    def put(self, labels: Any) -> None:
        """Puts another label map in place of the present one, as one step.

        Args:
            labels: tensor, array or PNG of the image's size; a bool mask is class 1 on class 0.

        Raises:
            PysegError: another size, or the session edits segments or instances.
            LabelError: values that are no class.
        """
        if self.edit != "labels":
            raise PysegError(
                f"put takes label maps, and this session edits {self.edit}: begin another "
                "with start="
            )
        plain = Segmentation(self.size, self.classes)
        found = self._read_labels(labels, len(self.classes))
        _check_size(found.shape, self.size)
        new = plain.with_labels(found).labels.cpu().numpy().astype(self._canvas.map.dtype)
        patch = _Patch.between(self._canvas.map, new, 0, 0)
        if patch is not None:
            change = _Change(patch)
            self._apply(change, True)
            self._record(_Prompt(label=self._prompt.label), change)

    def _region(self, target: int) -> Region | None:
        """A segment or instance as it is now."""
        if isinstance(self._canvas, _InstanceCanvas):
            return self._canvas.table.get(target)
        found = Region.cut(self._canvas.table[target].label, self._canvas.map == target)
        return found if found.area else None

    @property
    def result(self) -> Segmentation:
        """The map as it is now: a copy, with the image."""
        plain = Segmentation(self.size, self.classes, image=self.image, palette=self._palette)
        return self._canvas.fill(plain)

    @property
    def pending(self) -> Answer | None:
        """The mask of the prompt, which `accept` would take; None without a prompt."""
        return None if self._prompt.empty else self._answer(self._prompt)

    @property
    def asked(self) -> Asked | None:
        """What the prompt asks; None without one."""
        prompt = self._prompt
        if prompt.empty:
            return None
        selected = None
        if prompt.selected is not None:
            rows, columns = prompt.selected.mask.nonzero()
            left, top = prompt.selected.left, prompt.selected.top
            selected = (left + int(columns[0]), top + int(rows[0]))
        name = None
        if prompt.label is not None:
            name = "void" if prompt.label == self._void else self.classes[prompt.label]
        signs = tuple(sign == 1 for sign in prompt.signs)
        return Asked(prompt.points, signs, prompt.box, name, selected)

    @property
    def undoable(self) -> bool:
        """Whether there is a step to undo."""
        return bool(self._done)

    @property
    def redoable(self) -> bool:
        """Whether there is a step to do again."""
        return bool(self._undone)

    def undo(self) -> bool:
        """Takes back the last step: a click, a box, a selection, an acceptance, a brush.

        Returns:
            Whether there was one.
        """
        if not self._done:
            return False
        step = self._done.pop()
        if step.change is not None:
            self._apply(step.change, False)
        self._prompt = step.before
        self._undone.append(step)
        return True

    def redo(self) -> bool:
        """Does again what was undone last, if nothing was done since; returns whether there was."""
        if not self._undone:
            return False
        step = self._undone.pop()
        if step.change is not None:
            self._apply(step.change, True)
        self._prompt = step.after
        self._done.append(step)
        return True

    def _apply(self, change: _Change, forward: bool) -> None:
        self._canvas.apply(change, forward)
        self.version += 1

    def _record(self, prompt: _Prompt, change: _Change | None = None) -> None:
        """A step that has changed the canvas, if it changes that, and now the prompt."""
        self._undone.clear()
        self._done.append(_Step(self._prompt, prompt, change))
        self._prompt = prompt
        excess = sum(step.nbytes for step in self._done) - self.history
        while excess > 0 and len(self._done) > 1:
            excess -= self._done.pop(0).nbytes

    # --- the segmenter ----------------------------------------------------------------------

    def _segmenter(self) -> Promptable:
        if self.promptable is None:
            raise PysegError(f"this session has no promptable segmenter to answer: {_REMEDY}")
        return self.promptable

    def _ask(self, prompt: _Prompt) -> Answer:
        prompt = self._predicted(prompt)
        self._record(prompt)
        return self._answer(prompt)

    @torch.no_grad()
    def _predicted(self, prompt: _Prompt) -> _Prompt:
        """The prompt with the segmenter's answer; the answer so far is a part of what is asked."""
        self.embed()
        points = torch.tensor(prompt.points or [(0.0, 0.0)])[None]
        signs = torch.tensor(prompt.signs or [-1], dtype=torch.int32)[None]
        boxes = None if prompt.box is None else torch.tensor([prompt.box])
        masks = None
        if prompt.logits is not None:
            masks = self._upsampled(prompt.logits)[None]
        elif prompt.selected is not None:
            inside = torch.from_numpy(prompt.selected.full(self.size))
            masks = torch.where(inside, PROMPT_LOGIT, -PROMPT_LOGIT)[None]
        logits, score = self._segmenter().predict(
            self._embedding, Prompts(points, signs, boxes, masks)
        )
        return replace(prompt, logits=logits[0].cpu(), score=float(score[0]))

    def _answer(self, prompt: _Prompt) -> Answer:
        if prompt.logits is not None:
            return Answer(self._upsampled(prompt.logits) > 0, prompt.score)
        assert prompt.selected is not None
        return Answer(torch.from_numpy(prompt.selected.full(self.size)), 1.0)

    @torch.no_grad()
    def _upsampled(self, logits: Tensor) -> Tensor:
        device = getattr(self.promptable, "device", "cpu")
        return self._segmenter().upsample(self._embedding, logits.to(device)[None])[0].cpu()

    # --- arguments --------------------------------------------------------------------------

    @property
    def _void(self) -> int:
        return void_label(len(self.classes))[0]

    def _point(self, x: float, y: float) -> tuple[float, float]:
        height, width = self.size
        if not (0 <= x < width and 0 <= y < height):
            raise PysegError(
                f"the point x={x}, y={y} is outside the image of {width} x {height} pixels"
            )
        return float(x), float(y)

    def _with_point(self, x: float, y: float, positive: bool, label: str | int | None) -> _Prompt:
        prompt, point = self._prompt, self._point(x, y)
        return replace(
            prompt,
            points=(*prompt.points, point),
            signs=(*prompt.signs, int(bool(positive))),
            label=self._label(label),
        )

    def _label(self, label: str | int | None) -> int | None:
        return self._prompt.label if label is None else self._label_of(label)

    def _label_of(self, label: str | int) -> int:
        if isinstance(label, str):
            if label in self.classes:
                return self.classes.index(label)
            folded = [name.casefold() for name in self.classes]
            if label.casefold() in folded:
                return folded.index(label.casefold())
            if label.casefold() == "void":
                return self._void
            near = difflib.get_close_matches(label.casefold(), folded, 1)
            hint = f"; did you mean {self.classes[folded.index(near[0])]!r}?" if near else ""
            raise LabelError(
                f"label {label!r} is no class{hint} (classes: {', '.join(self.classes)}; "
                "'void' for none)"
            )
        if label == self._void or 0 <= label < len(self.classes):
            return int(label)
        raise LabelError(
            f"label {label} is no class: there are {len(self.classes)}, 0 to "
            f"{len(self.classes) - 1}, and {self._void} is void"
        )


def _within(region: Region, corner: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """A region's mask in a window of the image at ``corner`` (y, x), [h, w] bool."""
    found = np.zeros(shape, bool)
    (top, left), (height, width) = corner, shape
    x0, y0, x1, y1 = region.box
    y = slice(max(y0, top), min(y1, top + height))
    x = slice(max(x0, left), min(x1, left + width))
    if y.start < y.stop and x.start < x.stop:
        part = region.mask[y.start - y0 : y.stop - y0, x.start - x0 : x.stop - x0]
        found[y.start - top : y.stop - top, x.start - left : x.stop - left] = part
    return found


def _kind_of(start: Segmentation) -> Kind:
    if start.segments is not None:
        return "segments"
    mapped = start.logits is not None or start._labels is not None
    return "labels" if start.instances is None or mapped else "instances"


def _no_instances(size: tuple[int, int]) -> Instances:
    return Instances(
        torch.zeros(0, 4),
        torch.zeros(0, *size, dtype=torch.bool),
        torch.zeros(0),
        torch.zeros(0, dtype=torch.int64),
    )


def _check_size(found: Sequence[int], size: tuple[int, int]) -> None:
    if tuple(found) != tuple(size):
        raise PysegError(f"start is {list(found)}, but the image is {list(size)}: they must agree")


__all__ = ["Answer", "Asked", "Kind", "Session"]
