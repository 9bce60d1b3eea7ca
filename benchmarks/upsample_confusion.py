"""upsample_confusion from 128 x 256 logits of 19 classes against 1024 x 2048 labels."""

import pytest
import torch
from torch.nn.functional import interpolate

from pyseg.ops import upsample_confusion
from pyseg.ops.upsample_confusion import reference

SIZE, CLASSES = (1024, 2048), 19


def make_case(kind):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, CLASSES, SIZE[0] // 8, SIZE[1] // 8, generator=generator)
    if kind == "random":  # the worst case: every pixel needs every class, no two pixels are alike
        return noise, torch.randint(0, CLASSES, (1, *SIZE), generator=generator)
    coarse = torch.randn(1, CLASSES, 12, 24, generator=generator)
    logits = 5 * interpolate(coarse, noise.shape[2:], mode="bicubic") + 0.1 * noise
    return logits, interpolate(coarse, SIZE, mode="bicubic").argmax(1)


def check(ours, peer):
    difference = (ours.matrix - peer).abs().sum() / 2
    assert difference <= 1e-4 * peer.sum(), f"{difference} pixels differ"


@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_float32(compare, kind, dtype, threads):
    logits, target = make_case(kind)
    target = target.to(dtype)
    compare(
        ours=lambda: upsample_confusion(logits, target),
        peer=lambda: reference(logits, target),
        peer_name="interpolate + argmax + bincount",
        threads=threads,
        goal={1: 80, 2: 140}[threads],
        check=check,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_cuda(compare, kind, dtype):
    logits, target = (tensor.to("cuda") for tensor in make_case(kind))
    logits, target = logits.to(dtype), target.to(torch.uint8)
    compare(
        ours=lambda: upsample_confusion(logits, target),
        peer=lambda: reference(logits.float(), target),
        peer_name="interpolate + argmax + bincount in float32",
        threads=1,
        check=check,
        device="cuda",
    )
