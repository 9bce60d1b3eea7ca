"""Random views of training samples: crops and zooms, another light, mirror images, mixtures."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..datasets.pairs import tight_boxes
from ..types import VOID, Instances, Sample

TRIES = 10  # windows that `random_crop` looks at where one class must not fill them


def random_crop(
    image: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    scale: tuple[float, float],
    class_crops: float,
    generator: torch.Generator,
    *,
    flip: float = 0.5,
    category_limit: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """A random zoomed window, flipped at times; outside the image it is grey and void.

    The window is cut before it is resized, which costs a fraction of resizing the whole image.

    Args:
        image: [3, H, W] uint8.
        labels: [H, W] uint8.
        size: (h, w) of the result.
        scale: smallest and largest zoom; where they differ the aspect ratio varies besides, by up
            to 15 %.
        class_crops: probability that the window contains a pixel of an evenly drawn class.
        generator: source of all randomness.
        flip: probability of the mirror image.
        category_limit: largest share of one class in a window's labelled pixels; another window of
            the same size is drawn where it is exceeded, up to ten in all.

    Returns:
        Image [3, h, w] uint8 and labels [h, w] uint8.
    """
    from torchvision.transforms import v2
    from torchvision.tv_tensors import Image, Mask

    random = torch.rand(9, generator=generator).tolist()
    height, width = labels.shape
    zoom = scale[0] * (scale[1] / scale[0]) ** random[0]
    aspect = 1.15 ** (2 * random[1] - 1) if scale[0] < scale[1] else 1.0
    zooms = zoom / math.sqrt(aspect), zoom * math.sqrt(aspect)
    window = [
        min(n, max(1, round(s / z))) for n, s, z in zip(labels.shape, size, zooms, strict=True)
    ]
    ranges = [height - window[0], width - window[1]]
    top, left = _corner(labels, window, ranges, class_crops, random[2:7])
    for _ in range(TRIES - 1):
        if category_limit >= 1 or not any(ranges):
            break
        inside = labels[top : top + window[0], left : left + window[1]].flatten()
        found = torch.bincount(inside, minlength=VOID + 1)[:VOID]
        if found.max() <= category_limit * found.sum():
            break
        again = torch.rand(5, generator=generator).tolist()
        top, left = _corner(labels, window, ranges, class_crops, again)
    rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
    target = [min(s, max(1, round(w * z))) for s, w, z in zip(size, window, zooms, strict=True)]
    cut, mask = Image(image[:, rows, columns]), Mask(labels[None, rows, columns])
    if target != window:
        cut = v2.functional.resize(cut, target, antialias=True)
        # v2 resizes masks with "nearest", which shifts them by up to half a source pixel.
        mask = Mask(F.interpolate(mask[None].as_subclass(Tensor), target, mode="nearest-exact")[0])
    if random[7] < flip:
        cut, mask = v2.functional.horizontal_flip(cut), v2.functional.horizontal_flip(mask)
    if tuple(target) != tuple(size):
        slack = [s - t for s, t in zip(size, target, strict=True)]
        top, left = round(random[8] * slack[0]), round(random[8] * slack[1])
        padding = [left, top, slack[1] - left, slack[0] - top]
        cut = v2.functional.pad(cut, padding, fill=[124.0, 116.0, 104.0])
        mask = v2.functional.pad(mask, padding, fill=VOID)
    return cut.as_subclass(Tensor).contiguous(), mask.as_subclass(Tensor)[0].contiguous()


def _corner(
    labels: Tensor,
    window: list[int],
    ranges: list[int],
    class_crops: float,
    random: list[float],
) -> tuple[int, int]:
    """Row and column where a window begins: anywhere, or around a pixel of a drawn class."""
    corner = [round(random[0] * ranges[0]), round(random[1] * ranges[1])]
    if random[2] < class_crops and any(ranges):
        present = torch.bincount(labels.flatten(), minlength=VOID + 1)[:VOID].nonzero().flatten()
        if len(present):
            chosen = present[int(random[3] * len(present))]
            pixels = (labels == chosen).flatten().nonzero().flatten()
            pixel = int(pixels[int(random[4] * len(pixels))])
            # Keeps the drawn position inside the window, and the window inside the image.
            corner = [
                min(max(0, p - round(r * (w - 1))), limit)
                for p, r, w, limit in zip(
                    divmod(pixel, labels.shape[1]), random[:2], window, ranges, strict=True
                )
            ]
    return corner[0], corner[1]


def class_mix(
    image: Tensor, labels: Tensor, other: tuple[Tensor, Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Half of the classes of another sample pasted onto one (ClassMix, Olsson et al., 2021).

    Args:
        image: [3, H, W] uint8.
        labels: [H, W] uint8.
        other: image and labels of the same size; half of its classes, rounded up, are drawn.
        generator: source of all randomness.

    Returns:
        Image and labels.
    """
    present = torch.bincount(other[1].flatten(), minlength=VOID + 1)[:VOID].nonzero().flatten()
    order = torch.randperm(len(present), generator=generator)
    pasted = torch.zeros(VOID + 1, dtype=torch.bool)
    pasted[present[order[: (len(present) + 1) // 2]]] = True
    inside = pasted[other[1].long()]
    return torch.where(inside, other[0], image), torch.where(inside, other[1], labels)


def copy_paste(sample: Sample, other: Sample, generator: torch.Generator) -> Sample:
    """Half of another sample's instances, by chance, pasted onto one (Ghiasi et al., 2021).

    They keep their size and come to a random place, all by the same shift. What they cover is taken
    from the instances below, which vanish where nothing is left; regions of many objects (crowds)
    are not pasted. Labels follow.

    Args:
        sample: with instances.
        other: with instances, of any size.
        generator: source of all randomness.

    Returns:
        A new sample without segments.
    """
    below, above = sample.instances, other.instances
    if below is None or above is None:
        raise ValueError(f"copy_paste needs instances in {sample.name!r} and {other.name!r}")
    random = torch.rand(2 + len(above.labels), generator=generator)
    chosen = random[2:] < 0.5
    if above.crowd is not None:
        chosen &= ~above.crowd
    size, extent = sample.image.shape[1:], other.image.shape[1:]
    target, source = [], []
    for full, part, share in zip(size, extent, random[:2].tolist(), strict=True):
        low, high = min(0, full - part), max(0, full - part)
        shift = low + round(share * (high - low))
        begin, end = max(0, shift), min(full, shift + part)
        target.append(slice(begin, end))
        source.append(slice(begin - shift, end - shift))
    masks = above.masks.new_zeros(int(chosen.sum()), *size)
    masks[:, target[0], target[1]] = above.masks[chosen][:, source[0], source[1]]
    seen = masks.flatten(1).any(1)
    masks, added = masks[seen], above.labels[chosen][seen]
    cover = masks.any(0)
    moved = torch.zeros_like(sample.image)
    moved[:, target[0], target[1]] = other.image[:, source[0], source[1]]
    labels = sample.labels
    if labels is not None:
        labels = labels.clone()
        for mask, label in zip(masks, added.tolist(), strict=True):
            labels[mask] = label
    left = below.masks & ~cover
    kept = left.flatten(1).any(1) | ~below.masks.flatten(1).any(1)
    changed = (left != below.masks).flatten(1).any(1) & kept
    boxes = below.boxes.clone()
    boxes[changed] = tight_boxes(left[changed]).to(boxes.dtype)
    crowd = below.crowd
    if crowd is not None:
        crowd = torch.cat([crowd[kept], crowd.new_zeros(len(added))])
    instances = Instances(
        torch.cat([boxes[kept], tight_boxes(masks).to(boxes.dtype)]),
        torch.cat([left[kept], masks]),
        torch.cat([below.scores[kept], below.scores.new_ones(len(added))]),
        torch.cat([below.labels[kept], added]),
        crowd,
    )
    image = torch.where(cover, moved, sample.image)
    return replace(sample, image=image, labels=labels, segments=None, instances=instances)


def random_light(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Another time of day: exposure, gamma, contrast, saturation, hue, white balance, blur, noise.

    One matrix does saturation, hue, white balance and exposure together; v2's ColorJitter, with a
    trip through HSV, takes several times as long as the whole of this function.

    Args:
        image: [3, H, W] uint8.
        strength: 1 = the full range, 0 = none.
        generator: source of all randomness.

    Returns:
        [3, H, W] uint8.
    """
    from torchvision.transforms import v2

    chance = torch.rand(6, generator=generator).tolist()
    around = ((2 * torch.rand(9, generator=generator) - 1) * strength).tolist()
    pixels = image.float() / 255
    if chance[0] < 0.5:
        pixels = pixels.pow(2.0 ** (0.7 * around[0]))
    if chance[1] < 0.8:
        angle = 0.25 * around[1]
        luma = torch.tensor([0.299, 0.587, 0.114]).repeat(3, 1)
        # Rotation about the grey axis (Rodrigues' formula) turns the hue and keeps grey grey.
        third = math.sqrt(1 / 3)
        cross = torch.tensor([[0, -third, third], [third, 0, -third], [-third, third, 0.0]])
        hue = (
            math.cos(angle) * torch.eye(3)
            + math.sin(angle) * cross
            + (1 - math.cos(angle)) / 3 * torch.ones(3, 3)
        )
        saturation = 1 + 0.5 * around[2]
        warmth = 0.15 * around[3]
        gains = torch.tensor([1 + warmth, 1 + 0.05 * around[4], 1 - warmth])
        # Towards the mean brightness of any hour from dusk (0.15) to noon (0.6), mostly part way.
        wanted = 0.15 * 4.0 ** chance[5] / max(pixels.mean().item(), 0.02)
        exposure = min(max(wanted, 0.25), 3.0) ** abs(around[5])
        matrix = exposure * gains[:, None] * hue @ (luma + saturation * (torch.eye(3) - luma))
        pixels = (matrix @ pixels.flatten(1)).view_as(pixels)
    if chance[2] < 0.5:
        mean = pixels.mean()
        pixels = mean + (1 + 0.4 * around[6]) * (pixels - mean)
    pixels = pixels.clamp_(0, 1)
    if chance[3] < 0.2:
        sigma = 0.1 + 1.1 * abs(around[7])
        pixels = v2.functional.gaussian_blur(pixels, [5, 5], [sigma, sigma])
    if chance[4] < 0.3:
        noise = torch.randn(pixels.shape, generator=generator)
        pixels = (pixels + 0.04 * abs(around[8]) * noise).clamp_(0, 1)
    return (pixels * 255).round_().to(torch.uint8)


def generator_of(seed: int, epoch: int, index: int) -> torch.Generator:
    """The source of randomness of one sample in one epoch, the same in every process."""
    # A tuple of integers hashes the same in every process; strings would not.
    return torch.Generator().manual_seed(hash((seed, epoch, index)) % 2**63)


def random_view(
    sample: Sample, photometric: float, flip: float, generator: torch.Generator
) -> Sample:
    """A sample under another light and, by the chance ``flip``, mirrored with its instances.

    Args:
        sample: image [3, H, W] uint8 RGB; labels and instances are mirrored along.
        photometric: strength of `random_light`; 0 = none.
        flip: chance of the mirror image, 0 to 1; samples without instances are not mirrored.
        generator: source of all randomness.

    Returns:
        A new sample without segments.
    """
    image, labels, instances = sample.image, sample.labels, sample.instances
    if photometric:
        image = random_light(image, photometric, generator)
    if instances is not None and torch.rand((), generator=generator) < flip:
        width = image.shape[2]
        boxes = instances.boxes.clone()
        boxes[:, 0], boxes[:, 2] = width - instances.boxes[:, 2], width - instances.boxes[:, 0]
        image = image.flip(2)
        labels = None if labels is None else labels.flip(1)
        instances = replace(instances, boxes=boxes, masks=instances.masks.flip(2))
    return replace(sample, image=image, labels=labels, segments=None, instances=instances)
