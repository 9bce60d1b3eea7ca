"""Pooling of regions of interest: RoIAlign, RoIWarp, RoIPool, and RoIAlign over a pyramid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import _native

_native.load()

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MODES = {"avg": 0, "max": 1}  # as csrc/roi_align/roi_align.h has them
PIXELS = 2
MAX_SAMPLING_RATIO = 1024  # more samples only take time

Boxes: TypeAlias = "Tensor | Sequence[Tensor]"


def roi_align(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    mode: str = "avg",
) -> Tensor:
    """RoIAlign: pools boxes of a feature map into bins, by bilinear samples, rounding nothing.

    He et al., "Mask R-CNN" (2017). Arguments and results are those of ``torchvision.ops.roi_align``
    with ``mode`` added. Sums are float32 (float64 for float64), and so are positions; the result
    has the dtype of ``input``, under autocast too. A sample more than a pixel outside the map
    counts as 0 in an average and is left out of a maximum; a bin without samples is 0. A pixel of
    weight zero is left out, even if it is infinite. Coordinates are cut at 2^30 pixels.

    Differentiable once, in ``input``; the gradient has the same bits whatever the number of threads
    and the order in which the device works. Works in ``torch.compile`` and ``torch.export``, but
    not in ``torch.jit.script`` and ``torch.fx.symbolic_trace``, and takes no quantized input.

    Args:
        input: [N, C, H, W], float16, bfloat16, float32 or float64, of any strides (best: contiguous
            or channels_last).
        boxes: [K, 5] rows of (index of the image, x1, y1, x2, y2), or one [L, 4] per image; in
            pixels of the image, in the dtype of ``input`` or float32 where that is a half.
        output_size: bins, one integer or (vertical, horizontal).
        spatial_scale: of the map relative to the image, for example 1 / 16.
        sampling_ratio: samples along each side of a bin, at most 1024 (more only take time); not
            positive: one per pixel of the bin's extent, rounded up.
        aligned: whether the centre of pixel 0 lies at 0.5 of the box's coordinates, as it should.
            Without it, as in the first implementations, all is half a pixel to the lower right, and
            boxes are at least one pixel large.
        mode: "avg" or "max" of the samples.

    Returns:
        [K, C, *output_size].

    Raises:
        ValueError: a tensor has the wrong rank, size, dtype or device; a box is NaN or has the
            index of no image (on CUDA, where finding out would mean to wait, its result is NaN and
            its gradient is left out); output_size, spatial_scale, sampling_ratio or mode are out of
            range.
        TypeError: input or boxes are no tensors.
        RuntimeError: in a second derivative.

    Example:
        >>> ramp = torch.arange(12.0).expand(1, 1, 12, 12)  # a pixel's value is its column
        >>> roi_align(ramp, [torch.tensor([[4.0, 4, 8, 8]])], 2, aligned=True)[0, 0, 0]
        tensor([4.5000, 6.5000])
    """
    how = _mode(mode)
    scales = [spatial_scale]
    return _pool("input", [input], boxes, output_size, scales, sampling_ratio, aligned, how)


def roi_warp(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    mode: str = "avg",
) -> Tensor:
    """RoIWarp: bilinear samples as in `roi_align`, in a box rounded to whole pixels of the map.

    Dai et al., "Instance-aware Semantic Segmentation via Multi-task Network Cascades" (2016), as
    the Mask R-CNN paper compares it: the box is rounded as in `roi_pool`, from the pixel
    round(x1 * spatial_scale) to round(x2 * spatial_scale) inclusive. Arguments, result and errors
    are those of `roi_align`; with ``aligned`` the samples lie within those pixels, without it half
    a pixel to the lower right of them.
    """
    if isinstance(input, Tensor) and input.ndim == 4:
        regions = _regions(input, boxes)
        (spatial_scale,) = _check_scales([spatial_scale])
        # cut as the op cuts them: the extent of an infinite box would be NaN
        edges = (regions[:, 1:] * spatial_scale).clamp(-(2.0**30), 2.0**30)
        # as C's round() does, halves away from zero
        edges = edges.trunc() + edges.sign() * (edges.frac().abs() >= 0.5)
        size = (edges[:, 2:] - edges[:, :2] + 1).clamp(min=1)
        boxes = torch.cat([regions[:, :1], edges[:, :2], edges[:, :2] + size], 1)
        spatial_scale = 1.0
    return roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned, mode=mode)


def roi_pool(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """RoIPool: the largest pixel of each bin, boxes and bins rounded to whole pixels.

    Girshick, "Fast R-CNN" (2015). Arguments and results are those of ``torchvision.ops.roi_pool``,
    and of `roi_align` as to dtypes, errors and gradients, which go to the first of equal pixels.
    Empty bins are 0. NaN is the largest value, as in ``torch.nn.MaxPool2d`` (torchvision leaves it
    out).
    """
    return _pool("input", [input], boxes, output_size, [spatial_scale], 0, False, PIXELS)


def multi_scale_roi_align(
    levels: Sequence[Tensor],
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    mode: str = "avg",
    canonical_size: float = 224,
    canonical_level: int = 4,
) -> Tensor:
    """`roi_align` of every box on the level of a feature pyramid that suits its size, in one pass.

    A box belongs to level floor(canonical_level + log2(sqrt(area) / canonical_size) + 1e-6) (Lin et
    al., "Feature Pyramid Networks", 2017), level k being the map of scale 2^-k. Where that is not
    among ``levels``, it is pooled from the coarsest of the finer ones, or from the first.

    Args:
        levels: [N, C, H_l, W_l] each, from fine to coarse, at most 8, all of one dtype and device.
        spatial_scales: of each level.
        canonical_size, canonical_level: the size of a box in pixels and its level.
        boxes, output_size, sampling_ratio, aligned, mode: as in `roi_align`.

    Returns, raises:
        As `roi_align`; ValueError too where levels do not match each other or ``spatial_scales``.
    """
    return _pool(
        "levels",
        _listed("levels", levels),
        boxes,
        output_size,
        _listed("spatial_scales", spatial_scales),
        sampling_ratio,
        aligned,
        _mode(mode),
        canonical_size,
        canonical_level,
    )


def _mode(mode: str) -> int:
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f'mode must be "avg" or "max", got {mode!r}')
    return MODES[mode]


def _pool(
    name: str,
    levels: list[Tensor],
    boxes: Boxes,
    output_size: int | Sequence[int],
    scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    mode: int,
    canonical_size: float = 224,
    canonical_level: int = 4,
) -> Tensor:
    _native.check_tensors(**{name: levels[0] if name == "input" else levels})
    if not 1 <= len(levels) <= 8:
        raise ValueError(f"levels must be 1 to 8 feature maps, got {len(levels)}")
    first = levels[0]
    for level in levels:
        if level.ndim != 4 or 0 in level.shape[1:]:
            raise ValueError(
                f"{name} must be [N, C, H, W] with channels and pixels, got {list(level.shape)}"
            )
        if level.dtype not in FLOATS:
            raise ValueError(f"{name} must be floating point, got {level.dtype}; use .float()")
        if level.dtype != first.dtype or level.device != first.device:
            raise ValueError(
                "levels must have one dtype and device, got "
                f"{first.dtype} on {first.device} and {level.dtype} on {level.device}"
            )
        if level.shape[:2] != first.shape[:2]:
            raise ValueError(
                "levels must have the same images and channels, got "
                f"{list(first.shape)} and {list(level.shape)}"
            )
    if len(scales) != len(levels):
        raise ValueError(f"spatial_scales must be {len(levels)}, one per level, got {len(scales)}")
    scales = _check_scales(scales)
    given = output_size if isinstance(output_size, Sequence) else [output_size] * 2
    size = [_native.integer("output_size", bins) for bins in given]
    if len(size) != 2 or min(size) < 1 or size[0] * size[1] >= 2**31:
        raise ValueError(
            f"output_size must be one or two integers of at least 1, got {output_size}"
        )
    aligned = _native.flag("aligned", aligned)
    sampling_ratio = _native.integer("sampling_ratio", sampling_ratio)
    if sampling_ratio > MAX_SAMPLING_RATIO:
        raise ValueError(
            f"sampling_ratio must be at most {MAX_SAMPLING_RATIO}, got {sampling_ratio}; "
            "-1 takes one sample per pixel"
        )
    canonical_size = _native.number("canonical_size", canonical_size)
    canonical_level = _native.integer("canonical_level", canonical_level)
    if not canonical_size > 0:
        raise ValueError(f"canonical_size must be positive, got {canonical_size}")
    if not -(2**31) <= canonical_level < 2**31:
        raise ValueError(f"canonical_level must be an integer of 32 bits, got {canonical_level}")
    regions = _regions(first, boxes)
    _native.require("roi_align", first)
    return torch.ops.pyseg.roi_align(
        levels,
        regions,
        scales,
        size,
        sampling_ratio,
        aligned,
        mode,
        canonical_size,
        canonical_level,
    )


def _listed(name: str, value: Any) -> list:
    try:
        return list(value)
    except TypeError:
        raise TypeError(f"{name} must be a list, got {value!r}") from None


def _check_scales(scales: Sequence[float]) -> list[float]:
    # Positions are float32 but for float64: a scale that is 0 or infinite there is no scale.
    what = "spatial_scale" if len(scales) == 1 else "spatial_scales"
    scales = [_native.number(what, scale) for scale in scales]
    smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if not all(smallest <= scale <= largest for scale in scales) or any(
        finer <= coarser for finer, coarser in itertools.pairwise(scales)
    ):
        order = "" if len(scales) == 1 else " and fall from level to level"
        got = scales[0] if len(scales) == 1 else list(scales)
        raise ValueError(f"{what} must be positive{order}, got {got}, as float32")
    return scales


def _regions(input: Tensor, boxes: Boxes) -> Tensor:
    """Boxes as [K, 5], in float32, or float64 for float64."""
    if not isinstance(boxes, (list, tuple)):
        _native.check_tensors(boxes=boxes)
    parts = [boxes] if isinstance(boxes, Tensor) else list(boxes)
    if not isinstance(boxes, Tensor):
        _native.check_tensors(boxes=parts)
    columns = 5 if isinstance(boxes, Tensor) else 4
    if not isinstance(boxes, Tensor) and len(parts) != input.shape[0]:
        raise ValueError(
            f"boxes must be one tensor per image: input has {input.shape[0]} images, boxes "
            f"{len(parts)}"
        )
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    autocast = _native.autocast(input.device.type)
    for part in parts:
        if part.ndim != 2 or part.shape[1] != columns:
            expected = "[K, 5], or a list of [L, 4]" if columns == 5 else "a list of [L, 4]"
            raise ValueError(f"boxes must be {expected}, got {list(part.shape)}")
        if part.device != input.device:
            raise ValueError(f"boxes are on {part.device}, but input on {input.device}: move one")
        mixed = part.dtype not in (input.dtype, wide)
        if part.dtype not in FLOATS or (mixed and not (autocast and wide == torch.float32)):
            raise ValueError(
                f"boxes are {part.dtype}, but input {input.dtype}; use boxes.to(input.dtype)"
            )
    if isinstance(boxes, Tensor):
        return boxes.to(wide)
    if not parts:
        return input.new_empty((0, 5), dtype=wide)
    index = [torch.full_like(part[:, :1], i, dtype=wide) for i, part in enumerate(parts)]
    return torch.cat([torch.cat(index), torch.cat(parts).to(wide)], 1)


@torch.library.register_fake("pyseg::roi_align")
def _(levels, boxes, scales, output_size, *options):
    return levels[0].new_empty((boxes.shape[0], levels[0].shape[1], *output_size))


@torch.library.register_fake("pyseg::_roi_align_backward")
def _(grad, levels, *options):
    return [level.new_empty(level.shape) for level in levels]


def _setup_context(ctx, inputs, output):
    levels, boxes, *ctx.options = inputs
    ctx.save_for_backward(boxes, *levels)


def _backward(ctx, grad):
    boxes, *levels = ctx.saved_tensors
    grads = torch.ops.pyseg._roi_align_backward(grad, levels, boxes, *ctx.options)
    return grads, None, *[None for _ in ctx.options]


def _twice(ctx, *grads):
    raise RuntimeError("RoI pooling is differentiable once; its gradient has no gradient")


torch.library.register_autograd("pyseg::roi_align", _backward, setup_context=_setup_context)
torch.library.register_autograd("pyseg::_roi_align_backward", _twice)


class RoIAlign(nn.Module):
    """A layer of `roi_align`, with the arguments of ``torchvision.ops.RoIAlign``, and ``mode``."""

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = False,
        *,
        mode: str = "avg",
    ):
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale
        self.sampling_ratio, self.aligned, self.mode = sampling_ratio, aligned, mode

    def forward(self, input: Tensor, boxes: Boxes) -> Tensor:
        """Returns [K, C, *output_size]."""
        return roi_align(
            input,
            boxes,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
            mode=self.mode,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}, mode={self.mode!r}"
        )


class RoIPool(nn.Module):
    """A layer of `roi_pool`, with the arguments of ``torchvision.ops.RoIPool``."""

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float):
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale

    def forward(self, input: Tensor, boxes: Boxes) -> Tensor:
        """Returns [K, C, *output_size]."""
        return roi_pool(input, boxes, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"


class MultiScaleRoIAlign(nn.Module):
    """A layer of `multi_scale_roi_align` that replaces ``torchvision.ops.MultiScaleRoIAlign``.

    Args:
        featmap_names: which of the feature maps to use.
        output_size, sampling_ratio, aligned, mode: as in `roi_align`.
        canonical_scale, canonical_level: the size of a box in pixels and its level.
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: float = 224,
        canonical_level: int = 4,
        aligned: bool = False,
        mode: str = "avg",
    ):
        super().__init__()
        self.featmap_names = list(featmap_names)
        # A pair, as torchvision's heads read it.
        pair = output_size if isinstance(output_size, Sequence) else (output_size,) * 2
        self.output_size = tuple(pair)
        self.sampling_ratio, self.aligned, self.mode = sampling_ratio, aligned, mode
        self.canonical_scale, self.canonical_level = canonical_scale, canonical_level

    def forward(
        self,
        x: Mapping[str, Tensor],
        boxes: Sequence[Tensor],
        image_shapes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Returns [K, C, *output_size], the boxes of all images together.

        Args:
            x: [N, C, H, W] by name, from fine to coarse.
            boxes: [L, 4] per image, x1, y1, x2, y2 in its pixels.
            image_shapes: (height, width) of every image before it was padded to a batch; the
                largest height tells the scale of the maps, a power of two.
        """
        levels = [level for name, level in x.items() if name in self.featmap_names]
        if not image_shapes:
            raise ValueError("image_shapes must not be empty")
        if not levels:
            raise ValueError(f"x has none of {self.featmap_names}, but {list(x)}")
        height = max(shape[0] for shape in image_shapes)
        scales = [2.0 ** round(math.log2(level.shape[2] / height)) for level in levels]
        return multi_scale_roi_align(
            levels,
            boxes,
            self.output_size,
            scales,
            self.sampling_ratio,
            self.aligned,
            mode=self.mode,
            canonical_size=self.canonical_scale,
            canonical_level=self.canonical_level,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"featmap_names={self.featmap_names}, output_size={self.output_size}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}, mode={self.mode!r}"
        )


def replace_roi_pooling(model: nn.Module) -> nn.Module:
    """Puts this package's layers in the place of torchvision's in a detector, and returns it.

    All modules that are ``torchvision.ops.MultiScaleRoIAlign``, ``RoIAlign`` or ``RoIPool`` are
    replaced in place; results stay the same but for rounding. (torchvision's mask loss calls
    ``torchvision.ops.roi_align`` as a function on one channel, which stays.) The detector can then
    be exported by ``torch.export``, but not scripted by ``torch.jit.script`` nor traced by
    ``torch.fx``, and its pooling takes no quantized input: keep torchvision's layers for these.

    Raises:
        ValueError: the model has none.

    Example:
        >>> from torchvision.models.detection import maskrcnn_resnet50_fpn
        >>> model = replace_roi_pooling(maskrcnn_resnet50_fpn(weights=None, weights_backbone=None))
        >>> model.roi_heads.mask_roi_pool.__module__
        'pyseg.ops.roi_align'
    """
    found = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            ours = _counterpart(child)
            if ours is not None:
                setattr(parent, name, ours.train(child.training))
                found += 1
    if not found:
        raise ValueError(
            "model has no MultiScaleRoIAlign, RoIAlign or RoIPool of torchvision.ops to replace"
        )
    return model


def _counterpart(module: nn.Module) -> nn.Module | None:
    from torchvision import ops

    m: Any = module
    if type(module) is ops.MultiScaleRoIAlign:
        return MultiScaleRoIAlign(
            m.featmap_names,
            m.output_size,
            m.sampling_ratio,
            canonical_scale=m.canonical_scale,
            canonical_level=m.canonical_level,
        )
    if type(module) is ops.RoIAlign:
        return RoIAlign(m.output_size, m.spatial_scale, m.sampling_ratio, m.aligned)
    if type(module) is ops.RoIPool:
        return RoIPool(m.output_size, m.spatial_scale)
    return None


def reference(
    input: Tensor,
    boxes: Tensor,
    output_size: Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    aligned: bool = False,
    mode: str = "avg",
) -> Tensor:
    """`roi_align` by ``grid_sample``, for boxes inside the image and sampling_ratio > 0."""
    height, width = input.shape[2:]
    positions = []
    for axis, bins in ((2, output_size[0]), (1, output_size[1])):
        edges = boxes[:, [axis, axis + 2]] * spatial_scale - (0.5 if aligned else 0.0)
        extent = edges[:, 1] - edges[:, 0]
        if not aligned:
            extent = extent.clamp(min=1)
        steps = torch.arange(bins * sampling_ratio).to(edges) + 0.5
        positions.append(edges[:, :1] + extent[:, None] * steps / (bins * sampling_ratio))
    rows = (2 * positions[0].clamp(0, height - 1) + 1) / height - 1
    columns = (2 * positions[1].clamp(0, width - 1) + 1) / width - 1
    shape = (len(boxes), rows.shape[1], columns.shape[1])
    grid = torch.stack([columns[:, None].expand(shape), rows[:, :, None].expand(shape)], 3)
    samples = nn.functional.grid_sample(input[boxes[:, 0].long()], grid, align_corners=False)
    pool = nn.functional.avg_pool2d if mode == "avg" else nn.functional.max_pool2d
    return pool(samples, sampling_ratio)
