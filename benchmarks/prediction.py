"""`predict` on a folder, from JPEG files to label maps, against the loop that one would write.

The images are CamVid's (val, 360 x 480), the network is streetnet's on both sides. The loop opens
with Pillow, normalises, runs the network, interpolates its logits, takes argmax and saves a PNG.

The floor is the network alone. In milliseconds of CPU time an image, one thread, Intel Xeon
(Sapphire Rapids), torch 2.14: network 83 (76 at best), `predict` 100, the loop 144. Beyond the
network we spend 2.5 on decoding, 0.7 on labels (the fused upsample_argmax; interpolate and argmax
take the loop 29), 3.2 on writing, and the rest on memory that a thread's own heap gives back to the
system and asks for again. Two threads segment two images at a time, so that nothing waits for one
core; for the network by itself that is 1.04 to 1.07 times as fast as two threads in every
convolution. Batches gain nothing: 1, 2, 4, 8 images at a time take 76, 73, 78, 95 ms each. Packing
a label map takes 1.5 ms and 4.2 kB at zlib's level 6, 0.8 ms and 6.3 kB at level 1, 11 ms and
3.4 kB at level 9: it stays at 6.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

import pyseg
from pyseg.models.semantic import IMAGENET_MEAN, IMAGENET_STD

DATA = Path(os.environ.get("PYSEG_TEST_DATA", "../shared/data")) / "camvid" / "val" / "images"
IMAGES = 24


@pytest.fixture
def files():
    if not DATA.is_dir():
        pytest.skip(f"PYSEG_TEST_DATA has no {DATA}")
    found = sorted(DATA.iterdir())
    return found[:: len(found) // IMAGES][:IMAGES]


def plain_loop(network, files, folder, palette):
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    for file in files:
        pixels = np.array(Image.open(file).convert("RGB"))
        image = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
        with torch.inference_mode():
            logits = network(image[None])["out"]
            scores = interpolate(logits, pixels.shape[:2], mode="bilinear", align_corners=False)
            labels = scores.argmax(1)[0].to(torch.uint8)
        picture = Image.fromarray(labels.numpy())
        picture.putpalette(palette)
        picture.save(folder / f"{file.stem}.png")


@pytest.mark.parametrize("threads", [1, 2])
def test_camvid(compare, files, tmp_path, threads):
    pipeline = pyseg.build("streetnet")
    model = pipeline.model
    palette = [value for colour in model.palette for value in colour]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.mkdir()

    def check(*_):
        for file in files:
            a, b = (np.array(Image.open(d / f"{file.stem}.png")) for d in (ours, theirs))
            differ = (a != b).mean()
            assert differ <= 1e-4, f"{differ:.2%} of the labels of {file.name} differ"

    compare(
        ours=lambda: pyseg.predict(pipeline, files, ours, overwrite=True),
        peer=lambda: plain_loop(model.network, files, theirs, palette),
        peer_name="a plain loop",
        threads=threads,
        goal=1.3,
        levels=False,
        check=check,
    )
