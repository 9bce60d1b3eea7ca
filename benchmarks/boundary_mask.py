"""Boundary pixels of a 1024 x 2048 map: all classes in one pass against one erosion per class.

The template of an op's benchmarks: the size that people have, the best peer that they could install
instead, both on the same number of threads, a goal, and `check`, by which a wrong result is no
result. `compare` and `gpu` are fixtures of conftest.py beside it.
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate, max_pool2d, pad

from pyseg.ops import boundary_mask
from pyseg.ops.boundary_mask import boundary_distance

SIZE = (1024, 2048)
DISTANCE = boundary_distance(SIZE, 0.02)  # 46


def make_map(kind, labels=19):
    generator = torch.Generator().manual_seed(0)
    if kind == "random":  # the worst case: no two pixels alike
        return torch.randint(0, labels, (1, *SIZE), generator=generator)
    scores = torch.randn(1, labels, 16, 32, generator=generator)
    return interpolate(scores, SIZE, mode="bicubic").argmax(1)


def opencv_boundaries(labels):
    """As in boundary_iou_api: every class less its erosion by 3 x 3, so many times."""
    cv2 = pytest.importorskip("cv2")
    boundary = np.zeros(labels.shape, np.uint8)
    for k in np.unique(labels):
        mask = (labels == k).astype(np.uint8)
        padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=DISTANCE)
        boundary |= mask - inner[1:-1, 1:-1]
    return boundary


def check(ours, peer):
    np.testing.assert_array_equal(ours.cpu().numpy(), np.asarray(peer) > 0)


@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("threads", [1, 2])
def test_classes(compare, kind, threads):
    pytest.importorskip("cv2").setNumThreads(threads)
    labels = make_map(kind).to(torch.uint8)
    array = labels[0].numpy()
    compare(
        ours=lambda: boundary_mask(labels, DISTANCE)[0],
        peer=lambda: opencv_boundaries(array),
        peer_name="OpenCV erosion per class",
        threads=threads,
        goal=20,
        check=check,
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_segments(compare, threads):
    """What boundary PQ needs: the boundaries of 60 segments."""
    pytest.importorskip("cv2").setNumThreads(threads)
    ids = make_map("smooth", 60).int()
    array = ids[0].numpy()
    compare(
        ours=lambda: boundary_mask(ids, DISTANCE)[0],
        peer=lambda: opencv_boundaries(array),
        peer_name="OpenCV erosion per segment",
        threads=threads,
        goal=20,
        check=check,
        rounds=3,
    )


def by_rows_and_columns(labels):
    """`boundary_mask.reference` in float32 and separable, as one would write it for a GPU."""
    values = pad(labels[:, None].float(), [DISTANCE] * 4, value=-torch.inf)
    window = 2 * DISTANCE + 1
    largest = max_pool2d(max_pool2d(values, (window, 1), 1), (1, window), 1)
    smallest = -max_pool2d(max_pool2d(-values, (window, 1), 1), (1, window), 1)
    return (largest != smallest)[:, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_cuda(gpu, kind):
    gpu.compare(
        ours=lambda labels: boundary_mask(labels, DISTANCE),
        peer=gpu.compile(by_rows_and_columns),
        peer_name="torch.compile of max_pool2d by rows and columns",
        inputs=(make_map(kind).to(gpu.device, torch.uint8),),
        check=lambda ours, peer: check(ours, peer.cpu()),
    )
