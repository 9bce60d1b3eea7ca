"""Mixed images: which classes are pasted, other colours, blur; and which source images are drawn.

ClassMix: Olsson, Tranheden, Pinto & Svensson, WACV 2021; across domains: Tranheden et al., DACS,
WACV 2021; rare classes: Hoyer et al., DAFormer, CVPR 2022. All randomness is of generators on the
CPU, so that a device changes nothing of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from pyseg.types import VOID

from .errors import AdaptationError

STRENGTH = 0.2  # of the colours' jitter
SIGMA = (0.15, 1.15)  # pixels, of the blur
_KERNEL = 9  # pixels: four times the largest sigma to each side


def class_masks(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Where each image shows half of its own classes, rounded up, drawn by chance.

    Void is no class, so that it is never pasted.

    Args:
        labels: [N, H, W] uint8, 255 = void.
        generator: source of all randomness.

    Returns:
        [N, H, W] bool.
    """
    chosen = torch.zeros(len(labels), VOID + 1, dtype=torch.bool)
    for image, row in zip(labels, chosen, strict=True):
        present = torch.bincount(image.flatten(), minlength=VOID + 1)[:VOID].cpu().nonzero()[:, 0]
        order = torch.randperm(len(present), generator=generator)
        row[present[order[: (len(present) + 1) // 2]]] = True
    rows = torch.arange(len(labels), device=labels.device).view(-1, 1, 1)
    return chosen.to(labels.device)[rows, labels.long()]


def jitter(
    images: Tensor, generator: torch.Generator, *, strength: float = STRENGTH, chance: float = 0.8
) -> Tensor:
    """Brightness, contrast, saturation and hue, each changed by up to ``strength``.

    Args:
        images: [N, 3, H, W] in 0..1.
        generator: source of all randomness.
        strength: factors are from 1 - strength to 1 + strength; hue turns by up to this share of a
            whole turn.
        chance: share of the images that are changed.

    Returns:
        [N, 3, H, W] in 0..1.
    """
    changed = []
    for image in images:
        draw, *around = torch.rand(5, generator=generator).tolist()
        if draw < chance:
            factors = [strength * (2 * value - 1) for value in around]
            image = V.adjust_brightness(image, 1 + factors[0])
            image = V.adjust_contrast(image, 1 + factors[1])
            image = V.adjust_saturation(image, 1 + factors[2])
            image = V.adjust_hue(image, factors[3])
        changed.append(image)
    return torch.stack(changed)


def blur(images: Tensor, generator: torch.Generator, *, chance: float = 0.5) -> Tensor:
    """Gaussian blur of a sigma of 0.15 to 1.15 pixels on a share of the images [N, 3, H, W]."""
    changed = []
    with torch.autocast(images.device.type, enabled=False):  # it is a convolution
        for image in images:
            draw, where = torch.rand(2, generator=generator).tolist()
            if draw < chance:
                sigma = SIGMA[0] + where * (SIGMA[1] - SIGMA[0])
                image = V.gaussian_blur(image, [_KERNEL, _KERNEL], [sigma, sigma])
            changed.append(image)
    return torch.stack(changed)


class RareClasses:
    """Draws images so that rare classes come often (Hoyer et al., 2022, equations 5 and 6).

    A class is drawn by P(c), the softmax of (1 - f) / T over the classes, f being their shares of
    all labelled pixels; then evenly one of the images that show enough of it.

    Args:
        counts: [images, C] pixels of every class in every image.
        temperature: T; the smaller, the more often the rarest class.
        least: pixels of a class that an image must have more of, as a share of its labelled ones.

    Raises:
        AdaptationError: no class has such an image.
    """

    def __init__(self, counts: Tensor, temperature: float = 0.01, least: float = 0.0015) -> None:
        shares = counts.sum(0).double() / counts.sum().clamp(min=1)
        enough = counts > least * counts.sum(1, keepdim=True)
        self.images = [rows.nonzero()[:, 0] for rows in enough.T]
        usable = torch.tensor([len(rows) > 0 for rows in self.images])
        if not usable.any():
            raise AdaptationError(
                f"source: no image has more than a share of {least} of any class; lower rare_image"
            )
        logits = torch.where(usable, (1 - shares) / temperature, -torch.inf)
        self.probabilities = logits.softmax(0)

    def draw(self, generator: torch.Generator) -> tuple[int, int]:
        """A class, and the number of an image that shows it."""
        chosen = int(torch.multinomial(self.probabilities, 1, generator=generator))
        rows = self.images[chosen]
        return chosen, int(rows[torch.randint(len(rows), (), generator=generator)])
