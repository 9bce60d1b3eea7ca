"""START HERE: what flows through a pipeline, and what a stage, a metric and a data set must offer.

`Segmentation` is the prediction for one image, `Sample` one image with its ground truth; `Model`,
`Refiner`, `Metric` and `Dataset` are protocols: anything with these members will do, without a base
class. Shapes use N images, C classes, full size H x W and a model's own size h x w. Boxes are xyxy
in pixels of the input image, images are RGB.

Beyond the protocols the house reads these attributes where an object has them:

| of | attribute | meaning |
|---|---|---|
| model | ``palette`` | one RGB colour per class; saved with the pipeline, given to predictions |
| model | ``things`` | names of the countable classes: training scores panoptic quality with them |
| model | ``parameters()`` | an ``nn.Module``'s: where they are, is the pipeline's device |
| model | ``predict_with(*, …)`` | its options belong to a spec where a factory says ``-> Class`` |
| refiner | ``refine_batch(images, predictions)`` | used in place of ``refine``, for speed |
| model | ``temperature`` | what its predictions get as theirs; saved with the pipeline |
| stage | ``features_key`` | name of what it offers in ``Segmentation.features``, or None |
| refiner | ``wanted_features`` | names of what it takes of them; else no stage keeps them |
| stage | ``generator`` | a promptable segmenter: `Pipeline.session` asks it |
| stage | ``to(device)`` | moves it: `Pipeline.to` calls it |
| stage | ``training`` | an ``nn.Module``'s: refused where it is true |
| stage | ``state_dict()``, ``load_state_dict()`` | weights that a saved pipeline holds |
| stage | ``config()`` | options that make it again without its weights; saved in pipeline.json |
| metric | ``headline`` | names of the scores that tables show first |
| metric | ``averages`` | what is averaged over what, in words: `pyseg.metrics.score` tells it |
| dataset | ``things`` | names of the countable classes; given to metrics that take ``things`` |
| dataset | ``category_ids`` | COCO's category of every class, for panoptic results |
| dataset | ``published`` | images, layout and page, which `pyseg.check_data` holds it against |

And these options of a factory get a value where it takes them and the text gives none:

| of | option | value |
|---|---|---|
| model | ``num_classes``, ``weights`` | those of `pyseg.build` |
| refiner | ``weights`` | None where `pyseg.load` fills them in |
| metric | ``classes``, ``num_classes``, ``things`` | those of the data set |
| dataset | ``root``, ``split`` | those of the command line |
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .errors import LabelError
from .regions import CERTAIN, VOID, Instances, Segment, Segments, outline, void_label

if TYPE_CHECKING:
    from PIL.Image import Image

_SHOWN = 1600  # pixels of a side of what a notebook shows, at most


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
    uncertainty: Tensor | None = None  # [h, w] float, 0 = certain: of the model, refiners keep it
    temperature: float = 1.0  # above 0: probabilities are the softmax of the logits over it
    # What a stage computed of the image for later ones that want it, by the name of the network and
    # its weights: feature maps [c, h, w], the finest first, or the embedding of a promptable
    # segmenter. A pipeline drops it after the last.
    features: Mapping[str, Any] | None = field(default=None, repr=False)
    _labels: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        channels = len(self.classes)
        logits, labels, segments = self.logits, self._labels, self.segments
        if logits is not None and (logits.ndim != 3 or logits.shape[0] != channels):
            raise ValueError(
                f"logits must be [{channels}, h, w], one plane per class, got {list(logits.shape)}"
            )
        if labels is not None and tuple(labels.shape) != tuple(self.size):
            raise LabelError(
                f"labels must be {list(self.size)}, the size of the image, got {list(labels.shape)}"
            )
        if segments is not None and tuple(segments.map.shape) != tuple(self.size):
            raise ValueError(
                f"segments.map must be {list(self.size)}, got {list(segments.map.shape)}"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, got {self.temperature}")
        if self.uncertainty is not None and self.uncertainty.ndim != 2:
            raise ValueError(
                f"uncertainty must be [h, w], one value per place, got "
                f"{list(self.uncertainty.shape)}"
            )

    @property
    def labels(self) -> Tensor:
        """Class of every pixel, [H, W]: uint8, 255 = void; from 256 classes on int16, -1 = void.

        From the logits; without them from the segments, or from the instances of at least a score
        of `CERTAIN`, the most certain on top.
        """
        if self._labels is None:
            if self.logits is None and self.segments is None and self.instances is not None:
                return self.instances.label_map(len(self.classes))  # not kept: no map of its own
            object.__setattr__(self, "_labels", self._derive_labels())
        assert self._labels is not None
        return self._labels

    def _derive_labels(self) -> Tensor:
        if self.logits is not None:
            from .ops import upsample_argmax  # loads the compiled library

            return upsample_argmax(self.logits[None], self.size)[0]
        if self.segments is not None:
            return self.segments.label_map(len(self.classes))
        raise ValueError(
            "this Segmentation has no semantic map: neither logits, labels, segments "
            "nor instances are set"
        )

    def full_logits(self) -> Tensor:
        """The logits at full resolution, [C, H, W] float32: bilinear, ``align_corners=False``.

        Not kept: that is C numbers for every pixel. Logits that are so large already are returned
        themselves, so do not write into the result.

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
        """Class probabilities at full resolution, [C, H, W] float32.

        The softmax of `full_logits` over ``temperature``, which the model's weights may tell.

        Raises:
            ValueError: there are no logits, as after a stage that outputs labels only.
        """
        return self._scaled_logits().softmax(0)

    def _scaled_logits(self) -> Tensor:
        logits = self.full_logits()
        return logits if self.temperature == 1 else logits / self.temperature

    def confidence(self) -> Tensor:
        """Probability of every pixel's most probable class, [H, W] float32, at full resolution.

        It is as true as the probabilities are: ``pyseg evaluate --metric calibration`` tells how
        much they say too much, and `pyseg tune temperature` mends it.

        Raises:
            ValueError: there are no logits, as after a stage that outputs labels only.
        """
        logits = self._scaled_logits()
        # The largest of a softmax, without the others.
        return (logits.amax(0) - logits.logsumexp(0)).exp()

    def full_uncertainty(self) -> Tensor:
        """The model's uncertainty at full resolution, [H, W] float32: bilinear, not kept.

        Raises:
            ValueError: the model gave none.
        """
        if self.uncertainty is None:
            raise ValueError(
                "this Segmentation holds no uncertainty; a model such as bayesian_segnet gives one"
            )
        return torch.nn.functional.interpolate(
            self.uncertainty.float()[None, None], self.size, mode="bilinear", align_corners=False
        )[0, 0]

    def uncertainty_map(self, limit: float | None = None) -> Image:
        """A picture of the model's uncertainty, from black over red and yellow to white.

        Args:
            limit: the uncertainty that is white; None = the largest in the picture.

        Raises:
            ValueError: the model gave none, or ``limit`` is not positive.
        """
        from . import visual

        return visual.heat_map(self.full_uncertainty(), limit)

    def with_logits(self, logits: Tensor) -> Segmentation:
        """A copy with new ``logits`` [C, h, w]; labels and segments, which follow, are dropped.

        So is the temperature, which was that of the former logits.
        """
        return replace(self, logits=logits, segments=None, temperature=1.0, _labels=None)

    def with_labels(self, labels: Tensor | np.ndarray) -> Segmentation:
        """A copy with new ``labels`` [H, W]; logits and segments, now untrue, are dropped.

        Args:
            labels: class indices, void as `labels` has it; a NumPy array is copied into its dtype.

        Raises:
            LabelError: not integers of the size of the image, or values that are no class. Values
                are looked at on the CPU; elsewhere that would wait for the device, and metrics
                count them.
        """
        void, dtype = void_label(len(self.classes))
        copied = isinstance(labels, np.ndarray)
        if isinstance(labels, np.ndarray) and labels.dtype.kind in "ui":
            # Unsigned 16 bits and more are not comparable in torch.
            labels = torch.from_numpy(labels.astype(np.int64))
        if not isinstance(labels, Tensor):
            raise LabelError(
                "labels must be a tensor or a NumPy array of integers, got "
                f"{getattr(labels, 'dtype', type(labels).__name__)}"
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise LabelError(f"labels must be integers, got {labels.dtype}; convert them")
        if labels.device.type == "cpu" and labels.numel():
            low, high = (int(value) for value in labels.masked_fill(labels == void, 0).aminmax())
            if low < 0 or high >= len(self.classes):
                raise LabelError(
                    f"labels hold {low if low < 0 else high}, which is no class: there are "
                    f"{len(self.classes)}, 0 to {len(self.classes) - 1}, and {void} is void"
                )
        if copied:
            labels = labels.to(dtype)
        return replace(self, logits=None, segments=None, _labels=labels)

    def with_segments(self, segments: Segments) -> Segmentation:
        """A copy with new ``segments``; labels then follow from them, so logits are dropped."""
        return replace(self, logits=None, segments=segments, _labels=None)

    def overlay(self, opacity: float = 0.5) -> Image:
        """The image with the result painted over it and a legend: see `pyseg.visual.overlay`.

        Raises:
            ValueError: the Segmentation does not carry its image.
        """
        from . import visual  # Pillow's fonts, which few need

        if self.image is None:
            raise ValueError(
                "overlay needs the image, and this Segmentation does not carry it; pass "
                "dataclasses.replace(segmentation, image=image)"
            )
        maps = (self.logits, self.segments, self._labels)
        return visual.overlay(
            self.image,
            opacity,
            labels=self.labels if any(value is not None for value in maps) else None,
            segments=self.segments,
            instances=self.instances,
            classes=self.classes,
            palette=self.palette,
        )

    def save(self, path: str | Path) -> Path:
        """Writes the labels as an indexed PNG (mode P, the palette's colours, 255 = void).

        From 256 classes on it is 16-bit grey, and void is 65535.

        Raises:
            ImageError: the path is no ``.png``.
            PysegError: its directory does not exist.
        """
        from . import image

        labels = self.labels
        if len(self.classes) > VOID:  # 255 is a class, and files hold no -1
            labels = labels.int().masked_fill(labels < 0, 65535)
        return image.write_labels(path, labels, self.palette)

    def __repr__(self) -> str:
        held = [
            f"{name} {outline(value) if isinstance(value, Tensor) else value}"
            for name, value in (
                ("logits", self.logits),
                ("labels", self._labels),
                ("segments", self.segments),
                ("instances", self.instances),
                ("image", self.image),
                ("uncertainty", self.uncertainty),
            )
            if value is not None
        ]
        start = f"{self.size[0]} x {self.size[1]}, {len(self.classes)} classes"
        return f"Segmentation({', '.join([start, *held])})"

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows: the overlay, or the labels in colour, at most 1600 pixels wide
        and high; None where that fails."""
        try:
            from . import visual

            if self.image is not None:
                picture = self.overlay()
            else:
                black = torch.zeros(3, *self.size, dtype=torch.uint8)
                picture = visual.overlay(
                    black, 1.0, labels=self.labels, classes=self.classes, palette=self.palette
                )
            picture.thumbnail((_SHOWN, _SHOWN))
            stream = io.BytesIO()
            picture.save(stream, format="PNG")
            return stream.getvalue()
        except Exception:  # a notebook then shows the repr, which says what is there
            return None


@dataclass(frozen=True, eq=False)
class Sample:
    """One image of a dataset with its ground truth."""

    name: str
    image: Tensor  # [3, H, W] uint8 RGB
    labels: Tensor | None = None  # [H, W] uint8, 255 = void
    segments: Segments | None = None
    instances: Instances | None = None

    def __repr__(self) -> str:
        held = [
            f"{name} {value if name in ('segments', 'instances') else outline(value)}"
            for name, value in list(vars(self).items())[1:]
            if value is not None
        ]
        return f"Sample({', '.join([repr(self.name), *held])})"


@runtime_checkable
class Model(Protocol):
    """First stage of a pipeline. In use it is in evaluation mode; only training changes that."""

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
    """Images with labels, by index.

    PyTorch's ``DataLoader`` takes one with ``collate_fn=list``: a batch is then a list of samples,
    whose images may differ in size; its default wants to stack fields and refuses samples.
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


__all__ = [
    "CERTAIN",
    "VOID",
    "Dataset",
    "Instances",
    "Metric",
    "Model",
    "Refiner",
    "Sample",
    "Segment",
    "Segmentation",
    "Segments",
]
