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
        goal={1: 8, 2: 16}[threads],
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_cuda(compare, kind, dtype):
    prediction, target = label_maps(kind).to("cuda", dtype)
    compare(
        ours=lambda: confusion_matrix(prediction, target, CLASSES),
        peer=lambda: torch_histogram(prediction[0], target[0]),
        peer_name="torch.bincount",
        threads=1,
        check=check,
        device="cuda",
    )
