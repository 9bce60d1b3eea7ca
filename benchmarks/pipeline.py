"""`predict` on a folder, from JPEG files to label maps, against the loop that one would write.

The images are CamVid's (val), at 480 x 360 and scaled to 1024 x 512; the network is the same on
both sides. The loop opens with Pillow, normalises, runs the network in float32, interpolates its
logits, takes argmax and saves a PNG. Ours is `precision="auto"`: bfloat16 where the processor has
instructions for it.

The floor is decoding, network and encoding. In milliseconds of CPU time an image, streetnet at 480
x 360, float32, one thread, Intel Xeon (Sapphire Rapids), torch 2.14: network 83 (76 at best; 36 in
bfloat16), `predict` 100, the loop 144. Beyond the network we spend 2.5 on decoding, 0.7 on labels
(the fused upsample_argmax; interpolate and argmax take the loop 29), 3.2 on writing, and the rest
on memory that a thread's own heap gives back to the system and asks for again. Two threads segment
two images at a time, so that nothing waits for one core; for the network by itself that is 1.04 to
1.07 times as fast as two threads in every convolution.

What gains nothing here: batches (1, 2, 4, 8 images at a time take 76, 73, 78, 95 ms each), and
images in channels_last (FCN-ResNet50 at 240 x 180: 428 instead of 445 ms in float32, 209 instead of
154 in bfloat16; streetnet, SegNet and LR-ASPP within 5 % either way): oneDNN arranges what it reads
in blocks of its own. Packing a label map takes 1.5 ms and 4.2 kB at zlib's level 6, 0.8 ms and 6.3
kB at level 1, 11 ms and 3.4 kB at level 9: it stays at 6.

On a Zen 5, FCN-ResNet50 in float32 loses with an image for each thread: torch gives 1x1
convolutions of one image to MKL where there is one thread, and to oneDNN otherwise, and MKL is half
as fast there. 1119 ms an image with one thread, 838 if their dilation is (2, 2), which changes no
result of theirs and which torch leaves to oneDNN (DeepLabV3+ on MobileNetV2 82 and 57, streetnet 40
and 42); 477 with two threads. Not done here, as it would write into other people's networks. Memory
given back and asked for again is 9 % (413 instead of 451 ms with M_MMAP_THRESHOLD at 32 MB and
M_TRIM_THRESHOLD out of the way), a choice that belongs to the program, not to a library.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

import pyseg

DATA = Path(os.environ.get("PYSEG_TEST_DATA", "../shared/data")) / "camvid" / "val" / "images"
IMAGES = {"streetnet": 24, "fcn_resnet50": 4}


def make_folder(count, size, folder):
    if not DATA.is_dir():
        pytest.skip(f"PYSEG_TEST_DATA has no {DATA}")
    found = sorted(DATA.iterdir())
    chosen = found[:: len(found) // count][:count]
    if size == (480, 360):
        return chosen
    folder.mkdir()
    for file in chosen:
        Image.open(file).resize(size).save(folder / f"{file.stem}.jpg", quality=92)
    return sorted(folder.iterdir())


def plain_loop(model, files, folder, palette):
    for file in files:
        pixels = np.array(Image.open(file).convert("RGB"))
        image = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - model.mean) / model.std
        with torch.inference_mode():
            logits = model.network(image[None])["out"]
            scores = interpolate(logits, pixels.shape[:2], mode="bilinear", align_corners=False)
            labels = scores.argmax(1)[0].to(torch.uint8)
        picture = Image.fromarray(labels.numpy())
        picture.putpalette(palette)
        picture.save(folder / f"{file.stem}.png")


@pytest.mark.parametrize("precision", ["fp32", "auto"])
@pytest.mark.parametrize("size", [(480, 360), (1024, 512)], ids=["480x360", "1024x512"])
@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("threads", [1, 2])
def test_folder(compare, tmp_path, threads, name, size, precision):
    if name != "streetnet" and threads == 1:
        pytest.skip("minutes of the same convolutions as with two threads")
    files = make_folder(IMAGES[name], size, tmp_path / "images")
    torch.manual_seed(0)
    weights = (
        {"weights": "default"} if name == "streetnet" else {"weights": None, "num_classes": 11}
    )
    pipeline = pyseg.build(name, **weights, precision=precision)
    model = pipeline.model
    palette = [value for colour in model.palette for value in colour]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.mkdir()

    def check(*_):
        worst = 1e-4 if precision == "fp32" else 1e-2  # what rounding to bfloat16 may change
        for file in files:
            a, b = (np.array(Image.open(d / f"{file.stem}.png")) for d in (ours, theirs))
            differ = (a != b).mean()
            assert differ <= worst, f"{differ:.2%} of the labels of {file.name} differ"

    compare(
        ours=lambda: pyseg.predict(pipeline, files, ours, overwrite=True),
        peer=lambda: plain_loop(model, files, theirs, palette),
        peer_name="a plain loop in float32",
        threads=threads,
        goal=2,
        rounds=7 if name == "streetnet" else 3,
        levels=False,
        check=check,
    )
