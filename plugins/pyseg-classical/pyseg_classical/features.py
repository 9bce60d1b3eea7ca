"""What clustering compares: intensity, colour, texture, textons and position of every pixel."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import rgb2lab

from .regions import Image, grey

FEATURES = ("intensity", "colour", "texture", "textons", "position")
TEXTONS = 24
_SAMPLE = 20_000  # pixels that textons are learnt of
_ORIENTATIONS, _SCALES, _SPOTS = 4, (1.0, 2.0), (1.0, 1.5, 2.0, 3.0)


def filter_bank() -> list[NDArray[np.float32]]:
    """24 filters, half of the bank of Leung and Malik (2001) in small.

    First edges, the derivative of a Gaussian that is three times as long as wide, in 4 directions
    at standard deviations 1 and 2; then bars, its second derivative, in the same; then Laplacians
    of Gaussians at 1, 1.5, 2 and 3; then Gaussians at the same. All but the Gaussians have mean 0,
    and the absolute values of each sum to 1.
    """
    bank = []
    for order in (1, 2):
        for sigma in _SCALES:
            for k in range(_ORIENTATIONS):
                bank.append(_oriented(order, sigma, np.pi * k / _ORIENTATIONS))
    for spot in (ndimage.gaussian_laplace, ndimage.gaussian_filter):
        for sigma in _SPOTS:
            radius = int(np.ceil(4 * sigma))
            point = np.zeros((2 * radius + 1,) * 2)
            point[radius, radius] = 1.0
            bank.append(spot(point, sigma))
    for k, kernel in enumerate(bank):
        if k < len(bank) - len(_SPOTS):
            kernel -= kernel.mean()
        kernel /= np.abs(kernel).sum()
    return [kernel.astype(np.float32) for kernel in bank]


def _oriented(order: int, sigma: float, angle: float) -> NDArray[np.float64]:
    """Derivative across of a Gaussian that is 3 sigma long in the direction ``angle``."""
    radius = int(np.ceil(3 * 3 * sigma))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(float)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = -x * np.sin(angle) + y * np.cos(angle)
    derivative = -across if order == 1 else across**2 / sigma**2 - 1
    return derivative * np.exp(-(across**2) / (2 * sigma**2) - along**2 / (18 * sigma**2))


def responses(image: Image) -> NDArray[np.float32]:
    """What `filter_bank` gives on the luma in 0..1, mirrored at its border, [H, W, 24]."""
    values = grey(image).astype(np.float32) / 255
    return np.stack(
        [
            cv2.filter2D(values, -1, kernel, borderType=cv2.BORDER_REFLECT)
            for kernel in filter_bank()
        ],
        2,
    )


def texton_map(image: Image, count: int = TEXTONS, seed: int = 0) -> NDArray[np.int64]:
    """The texton of every pixel: the centre of the image's own responses that is nearest, [H, W].

    After Malik, Belongie, Leung and Shi (2001): k-means of filter responses. Responses F are first
    scaled to F log(1 + |F| / 0.03) / |F|, by Weber's law.

    Args:
        image: [H, W, 3] uint8.
        count: of textons; fewer where the image has fewer different responses.
        seed: of the sample of 20,000 pixels and of k-means.
    """
    found = responses(image).reshape(-1, len(filter_bank()))
    norm = np.linalg.norm(found, axis=1, keepdims=True)
    found = found * np.log1p(norm / 0.03) / np.maximum(norm, 1e-12)
    chance = np.random.default_rng(seed)
    chosen = chance.choice(len(found), min(len(found), _SAMPLE), replace=False)
    sample = np.round(found[chosen].astype(np.float64), 6)
    count = min(count, len(np.unique(sample, axis=0)))
    from sklearn.cluster import KMeans

    fitted = KMeans(count, n_init=1, random_state=seed).fit(sample)
    return fitted.predict(found.astype(np.float64)).reshape(image.shape[:2]).astype(np.int64)


def features(
    image: Image,
    chosen: Sequence[str],
    emphasis: Sequence[float] = (),
    *,
    seed: int = 0,
    window: int = 17,
) -> NDArray[np.float64]:
    """Features of every pixel, [H, W, D].

    Each kind is centred and divided by the root of the summed variances of its columns, so that
    kinds compare; one that is the same everywhere becomes 0.

    - ``"intensity"``: luma, 1 column
    - ``"colour"``: CIELAB, 3
    - ``"texture"``: the mean magnitude of each of 24 filters' responses around the pixel, each
      divided by its mean over the image, 24
    - ``"textons"``: the histogram of textons around the pixel, 24
    - ``"position"``: y and x, 2

    Args:
        image: [H, W, 3] uint8.
        chosen: kinds, from `FEATURES`.
        emphasis: factors of the kinds; () = 1 each.
        seed: of the textons.
        window: side in pixels of what is around a pixel, of the last but one two.
    """
    height, width = image.shape[:2]
    parts = []
    for kind, weight in zip(chosen, emphasis or (1.0,) * len(chosen), strict=True):
        if kind == "intensity":
            part = grey(image)[:, :, None].astype(np.float64)
        elif kind == "colour":
            part = rgb2lab(image)
        elif kind == "texture":
            part = _around(np.abs(responses(image)), window)
            # Relative, or the Gaussians would outweigh all.
            part = part / np.maximum(part.mean((0, 1)), 1e-4)
        elif kind == "textons":
            textons = texton_map(image, seed=seed)
            part = _around(np.eye(TEXTONS, dtype=np.float32)[textons], window)
        else:
            part = np.stack(np.mgrid[:height, :width], 2).astype(np.float64)
        part = part - part.mean((0, 1))
        spread = np.sqrt(np.square(part).mean((0, 1)).sum())
        parts.append(weight * (part / spread if spread > 1e-9 else np.zeros_like(part)))
    return np.concatenate(parts, 2)


def _around(planes: NDArray[np.float32], window: int) -> NDArray[np.float64]:
    """Means over a square around every pixel of [H, W, D]."""
    return np.stack(
        [
            cv2.blur(np.ascontiguousarray(plane), (window, window), borderType=cv2.BORDER_REFLECT)
            for plane in np.moveaxis(planes, 2, 0)
        ],
        2,
    ).astype(np.float64)
