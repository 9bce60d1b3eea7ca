"""What datasets have in common: `PairedFiles` of an image and a label PNG, and helpers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ImageError, LabelError
from ..image import read_image, read_labels
from ..types import VOID, Instances, Sample, Segments

LARGEST = 65535  # value of a 16-bit label file


class PairedFiles:
    """Samples read from pairs of files, checked as they are read.

    Args:
        images: one file per sample.
        labels: the label file of each, whose pixel values are class ids.
        classes: class names; the number of a name is its id.
        palette: one RGB colour per class.
        void: ids besides 255 that mean "no class", from 0 to 65535.

    Raises:
        ValueError: an id of ``void`` is no value that a label file can hold.

    Attributes:
        names: the images' stems.
    """

    def __init__(
        self,
        images: Sequence[Path],
        labels: Sequence[Path],
        classes: Sequence[str],
        palette: Sequence[tuple[int, int, int]],
        *,
        void: Iterable[int] = (),
    ) -> None:
        self.images, self.labels = tuple(images), tuple(labels)
        self.classes, self.palette = tuple(classes), tuple(palette)
        self.names = tuple(path.stem for path in self.images)
        ids = {VOID, *void}
        if wrong := [number for number in ids if not 0 <= number <= LARGEST]:
            raise ValueError(
                f"void ids must be 0 to {LARGEST}, the values of label files, got {wrong[0]}"
            )
        # One entry per value, and one more for all that is larger.
        table = torch.full((max(ids) + 2,), -1, dtype=torch.int16)
        table[: len(self.classes)] = torch.arange(len(self.classes), dtype=torch.int16)
        table[sorted(ids)] = VOID
        self._table = table

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``: image [3, H, W] uint8 RGB and labels [H, W] uint8, 255 = void.

        Raises:
            IndexError: ``index`` is out of range.
            ImageError: a file cannot be read, or the two differ in size.
            LabelError: the labels hold values that are no class ids.
        """
        image_path, label_path = self.images[index], self.labels[index]
        image, labels = read_image(image_path), read_labels(label_path)
        if image.shape[1:] != labels.shape:
            raise ImageError(
                f"{image_path} is {image.shape[2]} x {image.shape[1]} pixels, its "
                f"labels {label_path} are {labels.shape[1]} x {labels.shape[0]}; "
                "they must be equal"
            )
        return Sample(self.names[index], image, self._class_ids(labels, label_path))

    def _class_ids(self, labels: Tensor, path: Path) -> Tensor:
        ids = self._table[labels.long().clamp(max=len(self._table) - 1)]
        if (ids < 0).any():
            wrong = labels[ids < 0].unique().tolist()
            shown = ", ".join(map(str, wrong[:8])) + (", …" if len(wrong) > 8 else "")
            raise LabelError(
                f"{path}: label values {shown} are no class ids: there are "
                f"{len(self.classes)} classes, 0 to {len(self.classes) - 1}, and "
                f"{VOID} is void. {self._likely_cause(wrong)}"
            )
        return ids.to(torch.uint8)

    def _likely_cause(self, wrong: list[int]) -> str:
        count = len(self.classes)
        if wrong == [count]:
            return (
                f"The value {count} suggests ids that start at 1, or a class missing from "
                "the class list"
            )
        if len(wrong) > 32:
            return "So many values suggest a photograph or a colour map turned grey, not class ids"
        if max(wrong) <= 33 and count <= 20:
            return (
                "These look like ids of a longer class list, such as Cityscapes ids (0 to 33) "
                "instead of train ids (0 to 18)"
            )
        return (
            "Are these the grey values of a colour-coded map? Label files must hold class ids, "
            "or a palette whose indices are class ids"
        )


def instances_of(segments: Segments, first_thing: int) -> Instances:
    """The segments of classes from ``first_thing`` on, with tight boxes."""
    items = [item for item in segments.items if item.label >= first_thing]
    map = segments.map
    masks = map[None] == torch.tensor([item.id for item in items]).view(-1, 1, 1).to(map)
    boxes = torch.zeros(len(items), 4)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box[:] = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])[:, 0]
    return Instances(
        boxes,
        masks,
        torch.ones(len(items)),
        torch.tensor([item.label for item in items], dtype=torch.int64),
        torch.tensor([item.crowd for item in items], dtype=torch.bool),
    )
