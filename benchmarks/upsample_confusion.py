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


def without_waiting(logits, target):
    """The reference in a form that torch.compile takes whole."""
    labels = interpolate(logits, target.shape[1:], mode="bilinear").argmax(1)
    cells = torch.where(target < CLASSES, CLASSES * target.long() + labels, CLASSES**2).flatten()
    counts = torch.zeros(CLASSES**2 + 1, dtype=torch.int64, device=cells.device)
    counts.scatter_add_(0, cells, torch.ones_like(cells))
    return counts[:-1].reshape(1, CLASSES, CLASSES)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_cuda(gpu, kind, dtype, compiled):
    logits, target = (tensor.to(gpu.device) for tensor in make_case(kind))
    logits, target = logits.to(dtype), target.to(torch.uint8)
    how = "torch.compile of interpolate + argmax + scatter_add_"
    gpu.compare(
        ours=lambda logits, target: upsample_confusion(logits, target),
        peer=gpu.compile(without_waiting) if compiled else reference,
        peer_name=f"{how if compiled else 'interpolate + argmax + bincount'} in float32",
        inputs=(logits, target),
        peer_inputs=(logits.float(), target),
        goal_ms=0.015,
        check=check,
    )
