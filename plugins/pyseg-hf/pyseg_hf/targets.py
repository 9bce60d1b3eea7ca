"""What networks that find masks learn from a sample: masks with classes, placed as its image is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyseg.types import VOID, Sample


def masks_of(sample: Sample, task: str, stuff: Collection[int]) -> tuple[Tensor, Tensor]:
    """Masks [K, H, W] bool of a sample, and their classes [K]; void and crowds are in none.

    Args:
        sample: for ``"semantic"`` with labels or segments; for others with segments, instances or
            labels, of which the first that is there counts. Stuff comes from labels where there are
            instances beside them.
        task: ``"semantic"`` = a mask per class; ``"instance"`` = none of stuff.
        stuff: classes whose segments are one mask.

    Raises:
        ValueError: a sample without any.
    """
    segments, instances, labels = sample.segments, sample.instances, sample.labels
    found: list[tuple[int, Tensor]] = []
    if task == "semantic" and (labels is not None or segments is not None):
        source = labels if labels is not None else segments.label_map(1 << 14)  # type: ignore[union-attr]
        found = [(k, source == k) for k in _classes(source)]
    elif segments is not None:
        for item in segments.items:
            if not item.crowd:
                found.append((item.label, segments.map == item.id))
        found = _fused(found, stuff)
    elif instances is not None:
        crowd = instances.crowd
        found = [
            (int(label), mask)
            for k, (label, mask) in enumerate(zip(instances.labels, instances.masks, strict=True))
            if crowd is None or not crowd[k]
        ]
        if labels is not None:
            found += [(k, labels == k) for k in _classes(labels) if k in stuff]
    elif labels is not None:
        found = [(k, labels == k) for k in _classes(labels)]
    else:
        raise ValueError(
            f"sample {sample.name!r} has neither segments, instances nor labels to train on"
        )
    if task == "instance":
        found = [(label, mask) for label, mask in found if label not in stuff]
    size = sample.image.shape[1:]
    if not found:
        return torch.zeros(0, *size, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    return torch.stack([mask for _, mask in found]), torch.tensor([label for label, _ in found])


def _classes(labels: Tensor) -> list[int]:
    # where VOID itself is a class, label maps are int16, and void is -1
    void = VOID if labels.dtype == torch.uint8 else -1
    return [k for k in labels.unique().tolist() if k not in (void, -1)]


def _fused(found: list[tuple[int, Tensor]], stuff: Collection[int]) -> list[tuple[int, Tensor]]:
    fused: dict[int, Tensor] = {}
    rest = []
    for label, mask in found:
        if label in stuff:
            fused[label] = fused[label] | mask if label in fused else mask
        else:
            rest.append((label, mask))
    return [*rest, *fused.items()]


def placed(
    processor: Any, values: Any, samples: Sequence[Sample], found: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Masks [K, H, W] float and classes [K] for every row of ``values["pixel_values"]``.

    Processors resize images, and pad them at the right and below, with pixels that are in no mask,
    or cut them into squares along the longer side; masks go the same way. (The processors' own way
    with maps of segments fills up masks with the index of void.)

    Args:
        processor: of images.
        values: what it made of the samples' images.
        samples: of the batch.
        found: of `masks_of`, for each sample.
    """
    pixels = values["pixel_values"]
    height, width = pixels.shape[-2:]
    offsets = values.get("patch_offsets")
    cut = offsets is not None and len(offsets) > 0
    rows = offsets if cut else [(k, 0, 0) for k in range(len(samples))]
    for row, (index, start, end) in enumerate([int(v) for v in entry] for entry in rows):
        masks, labels = found[index]
        size = tuple(samples[index].image.shape[1:])
        if "pixel_mask" in values:
            inside = values["pixel_mask"][row].bool()
            resized = (int(inside.any(1).sum()), int(inside.any(0).sum()))
        elif "patch_offsets" in values:  # EoMT
            from transformers.image_transforms import get_size_with_aspect_ratio

            bounds = processor.size["shortest_edge"], processor.size["longest_edge"]
            resized = get_size_with_aspect_ratio(size, *bounds)
        else:
            resized = (height, width)
        if not len(masks):
            yield torch.zeros(0, height, width), labels
            continue
        scaled = F.interpolate(masks[None].float(), resized, mode="nearest-exact")[0]
        if cut:
            scaled = scaled[:, start:end] if size[0] > size[1] else scaled[:, :, start:end]
        seen = scaled.flatten(1).any(1)
        scaled, labels = scaled[seen], labels[seen.to(labels.device)]
        yield F.pad(scaled, (0, width - scaled.shape[2], 0, height - scaled.shape[1])), labels


def boxes(masks: Tensor) -> Tensor:
    """Of masks [K, H, W], each with a pixel: [K, 4] xyxy in pixels, the ends exclusive."""
    found = masks.new_zeros(len(masks), 4, dtype=torch.float32)
    for k, mask in enumerate(masks.bool()):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        found[k] = torch.stack(edges)
    return found
