"""Images of one domain in the colours of the other, without training.

``mean``: Reinhard, Ashikhmin, Gooch & Shirley, "Color transfer between images", 2001, in RGB;
``covariance``: Pitié & Kokaram, "The linear Monge-Kantorovitch linear colour mapping for
example-based colour transfer", 2007; ``fourier``: Yang & Soatto, "FDA: Fourier domain adaptation
for semantic segmentation", CVPR 2020.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .errors import AdaptationError

Alignment = Literal["mean", "covariance", "fourier"]
KINDS = ("mean", "covariance", "fourier")
_SMALL = 1e-8  # variance, of colours in 0..1: what a plain image is taken to have at least


def align(image: Tensor, like: Tensor, kind: Alignment, *, beta: float = 0.01) -> Tensor:
    """An image with the colours of another.

    Args:
        image: [3, H, W] uint8 RGB.
        like: [3, h, w] uint8 RGB.
        kind: ``"mean"`` = its mean and standard deviation of each channel; ``"covariance"`` = also
            its covariances, by the linear map that moves colours least; ``"fourier"`` = its
            amplitudes of the lowest frequencies.
        beta: with ``"fourier"``: half the side of the exchanged square of frequencies, as a share
            of the image's smaller side.

    Returns:
        [3, H, W] uint8.

    Raises:
        AdaptationError: another ``kind``.
    """
    pixels, other = image.double() / 255, like.double() / 255
    if kind == "mean":
        moved = align_mean(pixels, other)
    elif kind == "covariance":
        moved = align_covariance(pixels, other)
    elif kind == "fourier":
        moved = align_fourier(pixels, other, beta)
    else:
        raise AdaptationError(f"align must be one of {', '.join(KINDS)}, or None, got {kind!r}")
    return (moved * 255).round().clamp(0, 255).to(torch.uint8)


def align_mean(image: Tensor, like: Tensor) -> Tensor:
    """Mean and standard deviation of each channel [3, H, W]."""
    (mean, covariance), (wanted, spread) = _moments(image), _moments(like)
    scale = (spread.diagonal() / covariance.diagonal()).sqrt()
    return (image - mean[:, None, None]) * scale[:, None, None] + wanted[:, None, None]


def align_covariance(image: Tensor, like: Tensor) -> Tensor:
    """Mean and covariance of the channels [3, H, W]: x -> T (x - mean) + mean', T symmetric.

    T = S^-1/2 (S^1/2 S' S^1/2)^1/2 S^-1/2.
    """
    (mean, covariance), (wanted, spread) = _moments(image), _moments(like)
    root, inverse = _power(covariance, 0.5), _power(covariance, -0.5)
    map = inverse @ _power(root @ spread @ root, 0.5) @ inverse
    centred = image.flatten(1) - mean[:, None]
    return (map @ centred + wanted[:, None]).view_as(image)


def align_fourier(image: Tensor, like: Tensor, beta: float) -> Tensor:
    """The other's amplitude within a square of low frequencies, the image's own phase.

    ``like`` is resized to the image's size where the two differ.
    """
    height, width = image.shape[1:]
    if like.shape != image.shape:
        like = torch.nn.functional.interpolate(
            like[None], (height, width), mode="bilinear", antialias=True, align_corners=False
        )[0]
    reach = int(min(height, width) * beta)
    own, other = torch.fft.fft2(image), torch.fft.fft2(like)
    rows = torch.fft.fftfreq(height, 1 / height).abs() <= reach
    columns = torch.fft.fftfreq(width, 1 / width).abs() <= reach
    amplitude = torch.where(rows[:, None] & columns, other.abs(), own.abs())
    return torch.fft.ifft2(torch.polar(amplitude, own.angle())).real


def _moments(image: Tensor) -> tuple[Tensor, Tensor]:
    pixels = image.flatten(1)
    mean = pixels.mean(1)
    centred = pixels - mean[:, None]
    covariance = centred @ centred.T / pixels.shape[1]
    return mean, covariance + _SMALL * torch.eye(len(mean), dtype=image.dtype)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0.01 * _SMALL) ** exponent @ vectors.T
