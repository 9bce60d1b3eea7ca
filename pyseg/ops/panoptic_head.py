"""The parameter-free panoptic head of UPSNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native

_native.load()


def panoptic_head(
    logits: Tensor,
    masks: Tensor,
    boxes: Tensor,
    labels: Tensor,
    *,
    num_stuff: int,
    size: Sequence[int],
) -> Tensor:
    """Stuff class, instance or "unknown" for every pixel, from low-resolution logits.

    With X the logits, resized to ``size`` bilinearly (align_corners=False), the channels are

    * X_c for every stuff class c,
    * for every instance i, X of its class plus its mask's logits inside its box, and 0 elsewhere,
    * unknown: the largest X of a thing class less the largest, over the instances, of X of their
      class inside their box and 0 elsewhere (0 where there is no instance),

    and the largest channel wins, the first of equal ones. A box has the pixels trunc(x0) to
    trunc(x1), both included, and its mask is resized to them bilinearly. An instance's channel is 0
    outside of its box, not minus infinity: that is the definition, so where all stuff logits are
    negative an instance can win there.

    Args:
        logits: [C, h, w] or [N, C, h, w] floating point, the ``num_stuff`` stuff classes first;
            computed in float32. A NaN never wins; between pixels of which one is infinite or above
            1.7e38 the logits are NaN.
        masks: [K, M, M] or [N, K, M, M] floating point, logits of the instances' own class.
        boxes: [K, 4] or [N, K, 4] xyxy in pixels of the result. A box with a NaN, or whose right or
            bottom edge comes first, has no pixel.
        labels: [K] or [N, K] integers, class of each instance, ``num_stuff`` to C - 1; -1 for none,
            which fills up images with fewer instances than others.
        num_stuff: number of stuff classes.
        size: (H, W) of the result in pixels.

    Returns:
        [H, W] or [N, H, W] int32: 0 to num_stuff - 1 = stuff class, num_stuff + i = instance i,
        num_stuff + K = unknown.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; a label is no thing class (not checked on
            CUDA, where such an instance counts as none).

    Source:
        Xiong, Liao, Zhao, Hu, Bai, Yumer & Urtasun, "UPSNet: A unified panoptic segmentation
        network", CVPR 2019, section 3.1.

    Example:
        >>> logits = torch.tensor([1.0, 3.0])[:, None, None].expand(2, 4, 4)  # stuff, thing
        >>> box, mask = torch.tensor([[0.0, 0.0, 1.0, 3.0]]), torch.full((1, 28, 28), 2.0)
        >>> panoptic_head(logits, mask, box, torch.tensor([1]), num_stuff=1, size=(4, 4))[0]
        tensor([1, 1, 2, 2], dtype=torch.int32)
    """
    _native.check_tensors(logits=logits, masks=masks, boxes=boxes, labels=labels)
    if logits.ndim not in (3, 4) or 0 in logits.shape[-3:]:
        raise ValueError(
            f"logits must be [C, h, w] or [N, C, h, w] with classes and pixels, got "
            f"{list(logits.shape)}"
        )
    num_stuff = _native.integer("num_stuff", num_stuff)
    _check(logits, masks, boxes, labels, num_stuff)
    height, width = _native.image_size("size", size)
    _native.require("panoptic_head", logits)
    batched = logits.ndim == 4
    tensors = (logits.float(), masks.float(), boxes.float(), labels.long())
    channels = torch.ops.pyseg.panoptic_head(
        *(tensor if batched else tensor[None] for tensor in tensors), num_stuff, height, width
    )
    return channels if batched else channels[0]


def _check(logits: Tensor, masks: Tensor, boxes: Tensor, labels: Tensor, num_stuff: int) -> None:
    classes, lead = logits.shape[-3], logits.shape[:-3]
    if masks.ndim != logits.ndim or masks.shape[:-3] != lead or masks.shape[-1] != masks.shape[-2]:
        raise ValueError(
            f"masks must be {[*lead, 'K', 'M', 'M']} with logits "
            f"{list(logits.shape)}, got {list(masks.shape)}"
        )
    for name, tensor, shape in (
        ("boxes", boxes, (*masks.shape[:-2], 4)),
        ("labels", labels, masks.shape[:-2]),
    ):
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} with masks {list(masks.shape)}, got "
                f"{list(tensor.shape)}"
            )
    for name, tensor in (("masks", masks), ("boxes", boxes), ("labels", labels)):
        if tensor.device != logits.device:
            raise ValueError(f"logits are on {logits.device}, {name} on {tensor.device}: move one")
    for name, tensor in (("logits", logits), ("masks", masks), ("boxes", boxes)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if not 0 <= num_stuff <= classes:
        raise ValueError(
            f"num_stuff must be 0 to {classes}, the classes of logits, got {num_stuff}"
        )


@torch.library.register_fake("pyseg::panoptic_head")
def _(logits, masks, boxes, labels, num_stuff, height, width):
    return logits.new_empty((logits.shape[0], height, width), dtype=torch.int32)


def panoptic_logits(
    logits: Tensor, masks: Tensor, boxes: Tensor, labels: Tensor, *, num_stuff: int
) -> Tensor:
    """The channels among which `panoptic_head` chooses, for training: differentiable.

    Args:
        logits: [C, H, W] at the size of the result, usually a quarter of the image's, to which the
            boxes are scaled too.
        masks: [K, M, M].
        boxes: [K, 4] xyxy in pixels of the logits.
        labels: [K] thing classes.
        num_stuff: number of stuff classes.

    Returns:
        [num_stuff + K + 1, H, W], the last one unknown. Gradients flow to logits and masks.

    Raises:
        ValueError: as `panoptic_head`.
    """
    if logits.ndim != 3:
        raise ValueError(f"logits must be [C, H, W], got {list(logits.shape)}")
    _check(logits, masks, boxes, labels, num_stuff)
    height, width = logits.shape[1:]
    # The boxes decide about sizes, so they are needed on the host.
    edges = boxes.detach().double().nan_to_num(nan=torch.inf).tolist()
    inside, channels = [], []
    for mask, label, edge in zip(masks, labels.tolist(), edges, strict=True):
        if not num_stuff <= label < len(logits):
            raise ValueError(f"labels must be {num_stuff} to {len(logits) - 1}, got {label}")
        x_mask = torch.zeros_like(logits[0])
        channel = torch.zeros_like(logits[0])
        if all(abs(value) < 2**24 for value in edge):
            left, top, right, bottom = map(int, edge)
            rows = slice(max(top, 0), min(bottom + 1, height))
            columns = slice(max(left, 0), min(right + 1, width))
            if rows.start < rows.stop and columns.start < columns.stop:
                resized = torch.nn.functional.interpolate(
                    mask[None, None], (bottom - top + 1, right - left + 1), mode="bilinear"
                )[
                    0,
                    0,
                    rows.start - top : rows.stop - top,
                    columns.start - left : columns.stop - left,
                ]
                x_mask[rows, columns] = logits[label, rows, columns]
                channel[rows, columns] = logits[label, rows, columns] + resized
        inside.append(x_mask)
        channels.append(channel)
    unknown = (
        logits[num_stuff:].amax(0)
        if num_stuff < len(logits)
        else logits.new_full((height, width), -torch.inf)
    )
    if inside:
        unknown = unknown - torch.stack(inside).amax(0)
    return torch.stack([*logits[:num_stuff], *channels, unknown])
