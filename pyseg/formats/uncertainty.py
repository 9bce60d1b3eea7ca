"""Maps of a model's uncertainty as PNGs of 16-bit grey, and of its confidence in 8 bits."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ImageError
from ..image import open_image, save_image


def write_uncertainty(path: str | os.PathLike[str], values: Tensor) -> Path:
    """Writes a model's uncertainty as a PNG of 16-bit grey, 65535 being 1.

    Args:
        path: target, ``.png``; its directory must exist.
        values: [H, W] in 0..1.

    Raises:
        ImageError: the path is no ``.png``.
        ValueError: values of another shape or outside 0..1.
    """
    return _write(Path(path), values, "uncertainty", np.uint16)


def write_confidence(path: str | os.PathLike[str], values: Tensor) -> Path:
    """Writes how sure a prediction is of its labels as a PNG of 8-bit grey, 255 being 1.

    Args:
        path: target, ``.png``; its directory must exist.
        values: [H, W] in 0..1.

    Raises:
        ImageError: the path is no ``.png``.
        ValueError: values of another shape or outside 0..1.
    """
    return _write(Path(path), values, "confidence", np.uint8)


def _write(path: Path, values: Tensor, what: str, dtype: type[np.integer]) -> Path:
    if path.suffix.lower() != ".png":
        raise ImageError(f"{what} is written as PNG, got {str(path)!r}")
    plane = values.detach().cpu().double()
    if plane.ndim != 2 or plane.numel() == 0 or not bool(((plane >= 0) & (plane <= 1)).all()):
        raise ValueError(
            f"{what} must be [H, W] in 0..1 to be written, got {list(plane.shape)}"
            + (f" from {float(plane.min())} to {float(plane.max())}" if plane.numel() else "")
        )
    grey = (plane * np.iinfo(dtype).max).round().numpy().astype(dtype)
    return save_image(path, Image.fromarray(grey), format="PNG")


def read_uncertainty(path: str | os.PathLike[str]) -> Tensor:
    """Reads what `write_uncertainty` wrote: [H, W] float32 in 0..1, to 1 part in 131070.

    Raises:
        ImageError: the file is no PNG of 16-bit grey.
    """
    with open_image(path, "uncertainty") as picture:
        if picture.mode not in ("I;16", "I"):
            raise ImageError(
                f"uncertainty {str(path)!r} must be a PNG of 16-bit grey, it has mode "
                f"{picture.mode}"
            )
        grey = np.asarray(picture).astype(np.float32)
    return torch.from_numpy(grey / 65535)
