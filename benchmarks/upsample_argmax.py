"""upsample_argmax from 128 x 256 logits of 19 classes to 1024 x 2048 labels."""

import pytest
import torch
from torch.nn.functional import interpolate

from pyseg.ops import upsample_argmax
from pyseg.ops.upsample_argmax import reference

SIZE, CLASSES = (1024, 2048), 19


def make_logits(kind):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, CLASSES, SIZE[0] // 8, SIZE[1] // 8, generator=generator)
    if kind == "random":  # the worst case: every pixel needs every class
        return noise
    coarse = torch.randn(1, CLASSES, 12, 24, generator=generator)
    return 5 * interpolate(coarse, noise.shape[2:], mode="bicubic") + 0.1 * noise


def check(ours, peer):
    differ = (ours.long() != peer).float().mean()
    assert differ <= 1e-4, f"{differ:.2%} of the labels differ"


@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("threads", [1, 2])
def test_float32(compare, kind, layout, threads):
    logits = make_logits(kind)
    if layout == "channels_last":
        logits = logits.to(memory_format=torch.channels_last)
    compare(
        ours=lambda: upsample_argmax(logits, SIZE),
        peer=lambda: reference(logits, SIZE),
        peer_name="interpolate + argmax",
        threads=threads,
        goal={
            "v4": {"nchw": (100, 180), "channels_last": (45, 65)}[layout][threads - 1],
            "v3": {"nchw": (100, 160)}.get(layout, (None, None))[threads - 1],
        },
        check=check,
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_bfloat16(compare, threads):
    logits = make_logits("smooth").bfloat16()
    compare(
        ours=lambda: upsample_argmax(logits, SIZE),
        peer=lambda: reference(logits.float(), SIZE),
        peer_name="interpolate + argmax in float32",
        threads=threads,
        check=check,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_cuda(gpu, kind, dtype, compiled):
    logits = make_logits(kind).to(gpu.device, dtype)

    def plain(logits):
        return reference(logits, SIZE)

    gpu.compare(
        ours=lambda logits: upsample_argmax(logits, SIZE),
        peer=gpu.compile(plain) if compiled else plain,
        peer_name=f"{'torch.compile of ' if compiled else ''}interpolate + argmax in float32",
        inputs=(logits,),
        peer_inputs=(logits.float(),),
        goal_ms=0.012,
        check=check,
    )
