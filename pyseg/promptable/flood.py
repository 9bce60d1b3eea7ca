"""`Flood`: region growing behind the protocol of promptable segmenters, without a network.

Grows a region from each point over pixels that are connected to it and of nearly its colour (seeded
region growing in its simplest form; Adams & Bischof, 1994, doi:10.1109/34.295913).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .base import PROMPT_LOGIT, Prompts

TOLERANCE = 24.0  # of 255, in the channel that differs most
_BLUR = 1.0  # pixels: noise would end a region


class Flood:
    """Answers points and boxes by the colours of the image alone.

    The mask is that of the mask prompt, with the regions around the points on the object and
    without those around the points off it; where both reach a pixel, the nearer colour has it. A
    box cuts it off, and without a point its middle is one.

    Args:
        tolerance: difference of colour, of 255, up to which a region goes on.

    Raises:
        ValueError: ``tolerance`` is negative.
    """

    device = torch.device("cpu")

    def __init__(self, tolerance: float = TOLERANCE) -> None:
        if not tolerance >= 0:
            raise ValueError(f"tolerance must be 0 or more, got {tolerance}")
        self.tolerance = tolerance

    def embed(self, image: Tensor) -> np.ndarray:
        """[H, W, 3] float32, smoothed."""
        from scipy import ndimage

        pixels = image.detach().cpu().permute(1, 2, 0).numpy().astype(np.float32)
        smooth: np.ndarray = ndimage.gaussian_filter(pixels, (_BLUR, _BLUR, 0))
        return smooth

    def predict(self, embedding: np.ndarray, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """See `Promptable`; masks are of the size of the image, the predicted IoU is 1."""
        masks = [self._mask(embedding, prompts, k) for k in range(len(prompts.points))]
        height, width = embedding.shape[:2]
        found = torch.from_numpy(np.array(masks, bool).reshape(-1, height, width))
        return torch.where(found, PROMPT_LOGIT, -PROMPT_LOGIT), torch.ones(len(masks))

    def upsample(self, embedding: np.ndarray, logits: Tensor) -> Tensor:
        return logits

    def _mask(self, pixels: np.ndarray, prompts: Prompts, k: int) -> np.ndarray:
        height, width = pixels.shape[:2]
        given = zip(prompts.points[k].tolist(), prompts.point_labels[k].tolist(), strict=True)
        points = [(x, y, sign) for (x, y), sign in given if sign >= 0]
        inside = np.ones((height, width), bool)
        if prompts.boxes is not None:
            x0, y0, x1, y1 = prompts.boxes[k].tolist()
            inside[:] = False
            inside[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
            if not any(sign for *_, sign in points):
                points.append(((x0 + x1) / 2, (y0 + y1) / 2, 1))
        # The difference of colour with which the nearest point of either sign reaches a pixel.
        reach = np.full((2, height, width), np.inf, np.float32)
        for x, y, sign in points:
            column, row = min(max(int(x), 0), width - 1), min(max(int(y), 0), height - 1)
            np.minimum(reach[sign], self._grown(pixels, row, column), out=reach[sign])
        mask = np.zeros((height, width), bool)
        if prompts.masks is not None:
            mask = prompts.masks[k].cpu().numpy() > 0
        off, on = reach
        mask = np.where(np.isfinite(reach).any(0), on <= off, mask)
        return mask & inside

    def _grown(self, pixels: np.ndarray, row: int, column: int) -> np.ndarray:
        """Difference from the colour at a pixel where its region is, elsewhere infinite; [H, W]."""
        from scipy import ndimage

        difference = np.abs(pixels - pixels[row, column]).max(-1)
        parts, _ = ndimage.label(difference <= self.tolerance)
        return np.where(parts == parts[row, column], difference, np.float32(np.inf))


__all__ = ["Flood"]
