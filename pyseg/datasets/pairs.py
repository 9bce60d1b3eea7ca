"""What data sets have in common: `PairedFiles` of an image and its labels, and helpers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ImageError, LabelError
from ..image import read_image
from ..types import VOID, Instances, Sample, Segment, Segments
from .table import LARGEST, ClassTable


class PairedFiles:
    """Samples read from pairs of files, checked as they are read.

    Args:
        images: one file per sample.
        labels: the label file of each, whose pixel values are class ids; none for a split whose
            labels are not published.
        classes: class names.
        palette: one RGB colour per class.
        void: ids besides 255 that mean "no class", from 0 to 65535.
        table: what the values or colours of label files mean; None = values are class indices.
        things: names of the countable classes.

    Raises:
        ValueError: an id of ``void`` is no value that a label file can hold.

    Attributes:
        names: the images' stems.
        thing_labels: class indices of ``things``.
    """

    def __init__(
        self,
        images: Sequence[Path],
        labels: Sequence[Path],
        classes: Sequence[str],
        palette: Sequence[tuple[int, int, int]],
        *,
        void: Iterable[int] = (),
        table: ClassTable | None = None,
        things: Collection[str] = (),
    ) -> None:
        self.images, self.labels = tuple(images), tuple(labels)
        self.classes, self.palette = tuple(classes), tuple(palette)
        self.names = tuple(path.stem for path in self.images)
        self.table = table or ClassTable(self.classes, void=void)
        self.things = tuple(name for name in self.classes if name in things)
        self.thing_labels = torch.tensor([self.classes.index(name) for name in self.things])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``: image [3, H, W] uint8 RGB and labels [H, W] uint8, 255 = void.

        Raises:
            IndexError: ``index`` is out of range.
            ImageError: a file cannot be read, or the two differ in size.
            LabelError: the labels hold values that are no class ids.
        """
        image = read_image(self.images[index])
        if not self.labels:
            return Sample(self.names[index], image)
        truth = self.truth(index)
        labels = truth.label_map(len(self.classes)) if isinstance(truth, Segments) else truth
        if image.shape[1:] != labels.shape:
            raise ImageError(
                f"{self.images[index]} is {image.shape[2]} x {image.shape[1]} pixels, its "
                f"labels {self.labels[index]} are {labels.shape[1]} x {labels.shape[0]}; "
                "they must be equal"
            )
        if not isinstance(truth, Segments):
            return Sample(self.names[index], image, labels)
        instances = instances_of(truth, self.thing_labels.tolist())
        return Sample(self.names[index], image, labels, truth, instances)

    def truth(self, index: int) -> Tensor | Segments:
        """Class indices of sample ``index``, [H, W] uint8, or its segments, which tell them."""
        return self.table.read(self.labels[index])


def instances_of(segments: Segments, things: Collection[int]) -> Instances:
    """The segments of the countable classes, with tight boxes."""
    items = [item for item in segments.items if item.label in things]
    map = segments.map
    masks = map[None] == torch.tensor([item.id for item in items]).view(-1, 1, 1).to(map)
    return Instances(
        tight_boxes(masks),
        masks,
        torch.ones(len(items)),
        torch.tensor([item.label for item in items], dtype=torch.int64),
        torch.tensor([item.crowd for item in items], dtype=torch.bool),
    )


def tight_boxes(masks: Tensor) -> Tensor:
    """The boxes of masks [K, H, W], [K, 4] xyxy; zeros for an empty one."""
    boxes = torch.zeros(len(masks), 4)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        if len(rows):
            box[:] = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])[:, 0]
    return boxes


def segments_of(codes: Tensor, labels: Tensor, crowds: Tensor | None = None) -> Segments:
    """Segments of a map in which every region has a code of its own.

    Args:
        codes: [H, W] integers from 0 to some millions, one value per region.
        labels: [H, W] class indices, the same within a region; 255 = void, which is no segment.
        crowds: [H, W], true within regions of several objects that were not told apart.

    Returns:
        segments numbered from 1 in the order of their codes.
    """
    valid = labels.numpy() != VOID
    used = codes.numpy()[valid]
    counts = np.bincount(used, minlength=1)
    found = np.flatnonzero(counts)
    numbers = np.zeros(len(counts), dtype=np.int32)
    numbers[found] = np.arange(1, len(found) + 1)
    map = np.zeros(valid.shape, dtype=np.int32)
    map[valid] = np.take(numbers, used)
    # Of each region one pixel, whichever is written last, tells its class.
    label, crowd = np.zeros(len(counts), dtype=np.int64), np.zeros(len(counts), dtype=bool)
    label[used] = labels.numpy()[valid]
    if crowds is not None:
        crowd[used] = crowds.numpy()[valid]
    rows = zip(*(column[found].tolist() for column in (label, counts, crowd)), strict=True)
    items = (Segment(k, label, 1.0, area, crowd) for k, (label, area, crowd) in enumerate(rows, 1))
    return Segments(torch.from_numpy(map), tuple(items))


def read_mat(path: Path, *keys: str) -> Any:
    """What a MATLAB file holds under ``keys``, one below the other.

    Raises:
        LabelError: it cannot be read, or holds no such thing.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise LabelError(f"{path} does not exist; check the path")
    try:
        value: Any = loadmat(path, squeeze_me=True, struct_as_record=False)
    except Exception as error:  # SciPy's reader raises many kinds
        raise LabelError(f"{path} cannot be read as a MATLAB file ({error})") from error
    for key in keys:
        found = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        if found is None:
            raise LabelError(f"{path} holds no {'.'.join(keys)}; it is of another data set")
        value = found
    return value


def map_of(value: Any, path: Path) -> Tensor:
    """A label map that came from a MATLAB file, [H, W] int32.

    Raises:
        LabelError: it is no map of integers.
    """
    array = np.asarray(value)
    if array.ndim != 2 or array.dtype.kind not in "ui" or array.size == 0:
        raise LabelError(f"{path} holds {array.dtype} of shape {list(array.shape)}, no label map")
    if array.min() < 0 or array.max() > LARGEST:
        raise LabelError(f"{path} has values from {array.min()} to {array.max()}, no class ids")
    return torch.from_numpy(array.astype(np.int32))
