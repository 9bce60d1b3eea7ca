"""Pixels of plain PNG files."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native

_native.load()

FORMS = ("values", "colours", "segment_ids")


def decode_png(data: Tensor, form: str = "values", max_pixels: int = 100_000_000) -> Tensor | None:
    """Decodes a PNG of 8 bits: label maps, photographs, COCO's panoptic maps.

    Files that are not plain are left to other decoders: 16 bits, less than 8, transparency,
    interlaced ones, animations; for colours also such as say how the picture is to be turned. So
    are those that are cut off or damaged: all checksums are looked at.

    It is done by one thread, without Python's lock: decode several files in threads.

    Args:
        data: [B] uint8, the whole file, on the CPU.
        form: ``"values"``, of grey files and, as indices, of those with a palette; ``"colours"`` of
            RGB; or ``"segment_ids"`` of RGB, R + 256 G + 65536 B.
        max_pixels: files with more are left alone.

    Returns:
        [H, W] uint8, [H, W, 3] uint8 or [H, W] int32; None where the file is left to others.

    Raises:
        ValueError: data is no such tensor, or there is no such form.

    Example:
        >>> labels = decode_png(torch.from_numpy(np.fromfile("labels.png", np.uint8)))
    """
    _native.check_tensors(data=data)
    if data.dtype != torch.uint8 or data.ndim != 1 or data.device.type != "cpu":
        raise ValueError(
            f"data must be [B] uint8 on the CPU, got {list(data.shape)} {data.dtype} on "
            f"{data.device}"
        )
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    max_pixels = _native.integer("max_pixels", max_pixels)
    if max_pixels < 0:
        raise ValueError(f"max_pixels must not be negative, got {max_pixels}")
    pixels: Tensor = torch.ops.pyseg.decode_png(data, FORMS.index(form), max_pixels)
    return pixels if pixels.numel() else None


@torch.library.register_fake("pyseg::decode_png")
def _(data, form, max_pixels):
    # How large a picture is, and whether there is one, only the file says.
    context = torch.library.get_ctx()
    height, width = context.new_dynamic_size(), context.new_dynamic_size()
    dtype = torch.int32 if form == 2 else torch.uint8
    shape = (height, width, 3) if form == 1 else (height, width)
    return data.new_empty(shape, dtype=dtype)


def reference(data: Tensor) -> Tensor:
    """The pixels of a plain file by Pillow."""
    import io

    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(data.numpy().tobytes()), formats=["PNG"]) as picture:
        return torch.from_numpy(np.array(picture))
