"""confusion_matrix of one 1024 x 2048 label map with 19 classes."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from pyseg.ops import confusion_matrix

SIZE, CLASSES = (1024, 2048), 19


def label_maps(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "random":  # the worst case: no two pixels alike
        return torch.randint(0, CLASSES, (2, 1, *SIZE), generator=generator)
    scores = torch.randn(1, CLASSES, 16, 32, generator=generator)
    target = interpolate(scores, SIZE, mode="bicubic").argmax(1)
    scores += 0.3 * torch.randn(scores.shape, generator=generator)
    return torch.stack([interpolate(scores, SIZE, mode="bicubic").argmax(1), target])


def numpy_histogram(prediction, target):
    """`fast_hist`, as FCN and most evaluation scripts since have it."""
    valid = (target >= 0) & (target < CLASSES)
    cells = CLASSES * target[valid].astype(int) + prediction[valid]
    return np.bincount(cells, minlength=CLASSES**2).reshape(CLASSES, CLASSES)


def torch_histogram(prediction, target):
    """The same in torch, as in torchvision's reference scripts for segmentation."""
    valid = (target >= 0) & (target < CLASSES)
    cells = CLASSES * target[valid].to(torch.int64) + prediction[valid]
    return torch.bincount(cells, minlength=CLASSES**2).reshape(CLASSES, CLASSES)


def check(ours, peer):
    assert torch.equal(ours[0].cpu(), torch.as_tensor(peer).cpu())


@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("threads", [1, 2])
def test_uint8(compare, kind, threads):
    prediction, target = label_maps(kind).to(torch.uint8)
    p, t = prediction[0].numpy(), target[0].numpy()
    compare(
        ours=lambda: confusion_matrix(prediction, target, CLASSES),
        peer=lambda: numpy_histogram(p, t),
        peer_name="NumPy fast_hist",
        threads=threads,
        goal={"v4": {1: 8, 2: 16}[threads], "v3": {1: 8, 2: 14}[threads]},
        check=check,
        rounds=15,
    )


@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("threads", [1, 2])
def test_int64(compare, kind, threads):
    prediction, target = label_maps(kind)
    compare(
        ours=lambda: confusion_matrix(prediction, target, CLASSES),
        peer=lambda: torch_histogram(prediction[0], target[0]),
        peer_name="torch.bincount",
        threads=threads,
        goal={1: 14, 2: 17}[threads],
        check=check,
        rounds=15,
    )


def scattered(prediction, target):
    """torch_histogram in a form that does not wait for the device."""
    valid = (target >= 0) & (target < CLASSES)
    cells = CLASSES * target.to(torch.int64) + prediction.to(torch.int64)
    cells = torch.where(valid, cells, CLASSES**2).flatten()
    counts = torch.zeros(CLASSES**2 + 1, dtype=torch.int64, device=cells.device)
    counts.scatter_add_(0, cells, torch.ones_like(cells))
    return counts[:-1].reshape(CLASSES, CLASSES)


def torchmetrics_matrix(prediction, target):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    return functional.multiclass_confusion_matrix(prediction, target, CLASSES, validate_args=False)


@pytest.mark.gpu
@pytest.mark.parametrize("peer", ["compiled", "bincount", "torchmetrics"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_cuda(gpu, kind, dtype, peer):
    prediction, target = label_maps(kind).to(gpu.device, dtype)
    name, function = {
        "compiled": ("torch.compile of scatter_add_", gpu.compile(scattered)),
        "bincount": ("torch.bincount", torch_histogram),
        "torchmetrics": ("torchmetrics", torchmetrics_matrix),
    }[peer]
    gpu.compare(
        ours=lambda p, t: confusion_matrix(p, t, CLASSES),
        peer=function,
        peer_name=name,
        inputs=(prediction, target),
        goal_ms=0.012,
        check=check,
    )
