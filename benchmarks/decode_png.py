"""PNGs of 1024 x 2048 from memory: label maps, COCO's panoptic maps, a photograph, against Pillow.

hotcoco's own decoder cannot be called alone: benchmarks/scoring.py has it within its metrics.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from pyseg.ops import decode_png

SIZE = (1024, 2048)


def segments(count):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, count, 16, 32, generator=generator)
    return interpolate(scores, SIZE, mode="bicubic").argmax(1)[0].numpy()


def photograph():
    """Smooth, with the noise of a sensor: what such files are is their literals."""
    generator = torch.Generator().manual_seed(0)
    smooth = interpolate(torch.rand(1, 3, 32, 64, generator=generator), SIZE, mode="bicubic")[0]
    noise = 2 * torch.randn(3, *SIZE, generator=generator)
    return (255 * smooth + noise).clamp(0, 255).byte().permute(1, 2, 0).numpy()


def picture(kind):
    if kind == "photograph":
        return Image.fromarray(photograph()), "colours"
    labels = segments(60 if kind == "segment_ids" else 19).astype(np.uint8)
    if kind == "segment_ids":
        return Image.fromarray(np.stack([labels, labels * 0, labels * 0], -1)), kind
    image = Image.fromarray(labels)
    if kind == "indexed":
        image.putpalette(bytes(768))
    return image, "values"


@pytest.mark.parametrize("kind", ["indexed", "grey", "segment_ids", "photograph"])
@pytest.mark.parametrize("threads", [1, 2])
def test_pillow(compare, kind, threads):
    image, form = picture(kind)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    file = stream.getvalue()
    data = torch.from_numpy(np.frombuffer(bytearray(file), np.uint8))

    def peer():
        with Image.open(io.BytesIO(file), formats=["PNG"]) as opened:
            if form != "segment_ids":
                return np.array(opened)
            padded = np.frombuffer(opened.tobytes("raw", "RGBX"), "<u4").reshape(SIZE)
            return padded & 0xFFFFFF

    compare(
        ours=lambda: decode_png(data, form).numpy(),
        peer=peer,
        peer_name="Pillow",
        threads=threads,
        goal=1.5 if kind == "photograph" else 3,
        check=np.testing.assert_array_equal,
    )
