"""Random views of training samples: crops and zooms, another light, mirror images."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..types import VOID, Sample


def random_crop(
    image: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    scale: tuple[float, float],
    class_crops: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A random zoomed window, flipped half of the time; outside the image it is grey and void.

    The window is cut before it is resized, which costs a fraction of resizing the whole image.

    Args:
        image: [3, H, W] uint8.
        labels: [H, W] uint8.
        size: (h, w) of the result.
        scale: smallest and largest zoom; the aspect ratio varies by up to 15 % besides.
        class_crops: probability that the window contains a pixel of an evenly drawn class.
        generator: source of all randomness.

    Returns:
        Image [3, h, w] uint8 and labels [h, w] uint8.
    """
    from torchvision.transforms import v2
    from torchvision.tv_tensors import Image, Mask

    random = torch.rand(9, generator=generator).tolist()
    height, width = labels.shape
    zoom = scale[0] * (scale[1] / scale[0]) ** random[0]
    aspect = 1.15 ** (2 * random[1] - 1)
    zooms = zoom / math.sqrt(aspect), zoom * math.sqrt(aspect)
    window = [
        min(n, max(1, round(s / z))) for n, s, z in zip(labels.shape, size, zooms, strict=True)
    ]
    ranges = [height - window[0], width - window[1]]
    corner = [round(random[2] * ranges[0]), round(random[3] * ranges[1])]
    if random[4] < class_crops and any(ranges):
        present = torch.bincount(labels.flatten(), minlength=VOID + 1)[:VOID].nonzero().flatten()
        if len(present):
            chosen = present[int(random[5] * len(present))]
            pixels = (labels == chosen).flatten().nonzero().flatten()
            pixel = int(pixels[int(random[6] * len(pixels))])
            # Keeps the drawn position inside the window, and the window inside the image.
            corner = [
                min(max(0, p - round(r * (w - 1))), limit)
                for p, r, w, limit in zip(
                    divmod(pixel, width), random[2:4], window, ranges, strict=True
                )
            ]
    top, left = corner
    rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
    target = [min(s, max(1, round(w * z))) for s, w, z in zip(size, window, zooms, strict=True)]
    cut, mask = Image(image[:, rows, columns]), Mask(labels[None, rows, columns])
    if target != window:
        cut = v2.functional.resize(cut, target, antialias=True)
        # v2 resizes masks with "nearest", which shifts them by up to half a source pixel.
        mask = Mask(F.interpolate(mask[None].as_subclass(Tensor), target, mode="nearest-exact")[0])
    if random[7] < 0.5:
        cut, mask = v2.functional.horizontal_flip(cut), v2.functional.horizontal_flip(mask)
    if tuple(target) != tuple(size):
        slack = [s - t for s, t in zip(size, target, strict=True)]
        top, left = round(random[8] * slack[0]), round(random[8] * slack[1])
        padding = [left, top, slack[1] - left, slack[0] - top]
        cut = v2.functional.pad(cut, padding, fill=[124.0, 116.0, 104.0])
        mask = v2.functional.pad(mask, padding, fill=VOID)
    return cut.as_subclass(Tensor).contiguous(), mask.as_subclass(Tensor)[0].contiguous()


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
