"""What flows through a pipeline (`Segmentation`, `Sample`) and what a stage must offer.

Shapes use N images, C classes, full size H x W and a model's own size h x w. Boxes are xyxy in
pixels of the input image, images are RGB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

VOID = 255
"""Label of pixels without a class: ``ignore_index`` everywhere in pyseg.

With more than 255 classes it is a class, and void is -1.
"""
CERTAIN = 0.5
"""Score from which an instance counts where a label map is made of instances alone."""


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


@dataclass(frozen=True, eq=False)
class Instances:
    """Detected objects of one image; they may overlap."""

    boxes: Tensor  # [K, 4] float, xyxy in pixels of the input image
    masks: Tensor  # [K, H, W] bool
    scores: Tensor  # [K] float
    labels: Tensor  # [K] int64, class indices
    crowd: Tensor | None = None  # [K] bool: regions of many objects (COCO's iscrowd); ground truth


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The prediction for one image. Immutable: refiners return changed copies.

    ``logits`` stay at the model's own resolution and are never upsampled as a side effect;
    ``labels`` are computed from them once, by the fused upsample-and-argmax kernel.

    Example:
        >>> s = Segmentation((4, 4), ("road", "sky"), logits=torch.randn(2, 2, 2))
        >>> s.labels.shape
        torch.Size([4, 4])
    """

    size: tuple[int, int]  # (H, W) of the input image
    classes: tuple[str, ...]
    logits: Tensor | None = None  # [C, h, w] float
    segments: Segments | None = None
    instances: Instances | None = None
    image: Tensor | None = None  # [3, H, W] uint8 RGB: what overlay() paints on
    palette: tuple[tuple[int, int, int], ...] | None = None  # one RGB colour per class
    _labels: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        channels = len(self.classes)
        logits, labels, segments = self.logits, self._labels, self.segments
        if logits is not None and (logits.ndim != 3 or logits.shape[0] != channels):
            raise ValueError(
                f"logits must be [{channels}, h, w], one plane per class, got {list(logits.shape)}"
            )
        if labels is not None and tuple(labels.shape) != tuple(self.size):
            raise ValueError(f"labels must be {list(self.size)}, got {list(labels.shape)}")
        if segments is not None and tuple(segments.map.shape) != tuple(self.size):
            raise ValueError(
                f"segments.map must be {list(self.size)}, got {list(segments.map.shape)}"
            )

    @property
    def labels(self) -> Tensor:
        """Class of every pixel, [H, W]: uint8, 255 = void; from 256 classes on int16, -1 = void.

        From the logits; without them from the segments, or from the instances of at least a score
        of `CERTAIN`, the most certain on top.
        """
        if self._labels is None:
            if self.logits is None and self.segments is None and self.instances is not None:
                return self._labels_of_instances(self.instances)  # not kept: no map of its own
            object.__setattr__(self, "_labels", self._derive_labels())
        assert self._labels is not None
        return self._labels

    def _derive_labels(self) -> Tensor:
        if self.logits is not None:
            from .ops import upsample_argmax

            return upsample_argmax(self.logits[None], self.size)[0]
        if self.segments is not None:
            ids = torch.tensor([0] + [item.id for item in self.segments.items])
            void, dtype = self._void()
            classes = torch.tensor([void] + [item.label for item in self.segments.items])
            order = ids.argsort()
            table = self.segments.map
            position = torch.searchsorted(ids[order].to(table.device), table.long())
            return classes[order].to(table.device)[position].to(dtype)
        raise ValueError(
            "this Segmentation has no semantic map: neither logits, labels, segments "
            "nor instances are set"
        )

    def _void(self) -> tuple[int, torch.dtype]:
        return (VOID, torch.uint8) if len(self.classes) <= VOID else (-1, torch.int16)

    def _labels_of_instances(self, instances: Instances) -> Tensor:
        void, dtype = self._void()
        labels = instances.masks.new_full(self.size, void, dtype=dtype)
        for k in instances.scores.argsort(stable=True).tolist():
            if instances.scores[k] >= CERTAIN:
                labels[instances.masks[k]] = int(instances.labels[k])
        return labels

    def full_logits(self) -> Tensor:
        """Logits at full resolution, [C, H, W] float32: bilinearly upsampled.

        Raises:
            ValueError: there are no logits, as after a stage that outputs labels only.
        """
        if self.logits is None:
            raise ValueError(
                "this Segmentation holds labels without logits; put a stage that "
                "needs probabilities (crf, sam, sam2) before the one that dropped "
                "them"
            )
        logits = self.logits.float()
        if tuple(logits.shape[1:]) == tuple(self.size):
            return logits
        return torch.nn.functional.interpolate(
            logits[None], self.size, mode="bilinear", align_corners=False
        )[0]

    def probabilities(self) -> Tensor:
        """Class probabilities at full resolution, [C, H, W] float32: softmax of `full_logits`.

        Raises:
            ValueError: there are no logits.
        """
        return self.full_logits().softmax(0)

    def with_logits(self, logits: Tensor) -> Segmentation:
        """A copy with new ``logits`` [C, h, w]; labels and segments, which follow, are dropped."""
        return replace(self, logits=logits, segments=None, _labels=None)

    def with_labels(self, labels: Tensor) -> Segmentation:
        """A copy with new ``labels`` [H, W]; logits and segments, now untrue, are dropped."""
        return replace(self, logits=None, segments=None, _labels=labels)

    def with_segments(self, segments: Segments) -> Segmentation:
        """A copy with new ``segments``; labels then follow from them, so logits are dropped."""
        return replace(self, logits=None, segments=segments, _labels=None)

    def overlay(self, opacity: float = 0.5) -> Image:
        """The image with the labels painted over it and a legend of the classes present.

        Raises:
            ValueError: the Segmentation does not carry its image.
        """
        from . import visual

        return visual.overlay(self, opacity=opacity)

    def save(self, path: str | Path) -> Path:
        """Writes the labels as an indexed PNG (mode P, the palette's colours, 255 = void)."""
        from . import image

        return image.write_labels(path, self.labels, self.palette)


@dataclass(frozen=True, eq=False)
class Sample:
    """One image of a dataset with its ground truth."""

    name: str
    image: Tensor  # [3, H, W] uint8 RGB
    labels: Tensor | None = None  # [H, W] uint8, 255 = void
    segments: Segments | None = None
    instances: Instances | None = None


@runtime_checkable
class Model(Protocol):
    """First stage of a pipeline."""

    classes: tuple[str, ...]

    def predict(self, images: Sequence[Tensor]) -> list[Segmentation]:
        """Images, each [3, H, W] uint8 RGB and of any size, to one Segmentation each."""
        ...


@runtime_checkable
class Refiner(Protocol):
    """Any later stage; may also offer ``refine_batch(images, predictions)``."""

    def refine(self, image: Tensor, prediction: Segmentation) -> Segmentation:
        """``image`` [3, H, W] uint8 RGB and its prediction so far to a better prediction."""
        ...


@runtime_checkable
class Metric(Protocol):
    """Accumulates over a dataset; its state is additive, ratios exist only in ``compute``."""

    def update(self, prediction: Segmentation, sample: Sample) -> None: ...

    def state(self) -> Mapping[str, Any]:
        """Tensors, and lists of records, whose sum over processes is the state of the whole.

        Tensors add up, lists are joined; neither the order nor the number of parts may matter, so
        tensors are integers (fractions in fixed point) and `compute` sorts records.
        """
        ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...

    def compute(self) -> dict[str, Any]: ...


@runtime_checkable
class Dataset(Protocol):
    """Images with labels, by index."""

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...
