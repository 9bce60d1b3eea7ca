"""The boundary metric of one 1024 x 2048 map with 19 classes, and its matching of contours."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from pyseg.metrics.boundary import MEASURES, Boundary
from pyseg.ops import boundary_match
from pyseg.ops.boundary_match import reference
from pyseg.types import Sample, Segmentation

SIZE, CLASSES = (1024, 2048), 19
RADIUS = 0.0075 * np.hypot(*SIZE)  # 17 pixels
DISTANCE = 46


def make_maps():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, CLASSES, 16, 32, generator=generator)
    target = interpolate(scores, SIZE, mode="bicubic").argmax(1)
    scores += 0.3 * torch.randn(scores.shape, generator=generator)
    prediction = interpolate(scores, SIZE, mode="bicubic").argmax(1)
    return prediction.to(torch.uint8), target.to(torch.uint8)


@pytest.mark.parametrize("threads", [1, 2])
def test_f_score(compare, threads):
    prediction, target = make_maps()
    compare(
        ours=lambda: boundary_match(prediction, target, CLASSES, RADIUS).counts,
        peer=lambda: reference(prediction, target, CLASSES, RADIUS),
        peer_name="SciPy distance transform per class",
        threads=threads,
        check=lambda ours, peer: torch.testing.assert_close(ours, peer, rtol=0, atol=0),
        rounds=2,
    )


def opencv_boundary_iou(prediction, target):
    cv2 = pytest.importorskip("cv2")
    square = np.ones((3, 3), np.uint8)

    def boundary(mask):
        padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        return mask - cv2.erode(padded, square, iterations=DISTANCE)[1:-1, 1:-1]

    scores = []
    for k in range(CLASSES):
        p, t = (boundary((labels == k).astype(np.uint8)) for labels in (prediction, target))
        scores.append((p & t).sum() / (p | t).sum())
    return np.mean(scores)


def compare_metric(compare, threads, measures, **options):
    pytest.importorskip("cv2").setNumThreads(threads)
    prediction, target = make_maps()
    names = [f"class {k}" for k in range(CLASSES)]
    segmentation = Segmentation(SIZE, tuple(names), _labels=prediction[0])
    sample = Sample("a", torch.zeros(3, 1, 1, dtype=torch.uint8), target[0])
    arrays = prediction[0].numpy(), target[0].numpy()

    def ours():
        metric = Boundary(names, measures=measures)
        metric.update(segmentation, sample)
        return metric.compute()["boundary_iou"]

    def check(ours, peer):
        assert abs(ours - peer) < 1e-12

    compare(
        ours=ours,
        peer=lambda: opencv_boundary_iou(*arrays),
        threads=threads,
        check=check,
        rounds=5,
        **options,
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_boundary_iou(compare, threads):
    compare_metric(
        compare, threads, ["boundary_iou"], peer_name="OpenCV erosion per class", goal=20
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_whole_metric(compare, threads):
    """Boundary IoU, BF score and trimap IoU together, against Boundary IoU alone."""
    compare_metric(compare, threads, MEASURES, peer_name="Boundary IoU by OpenCV erosion, alone")


@pytest.mark.gpu
def test_cuda(gpu):
    prediction, target = make_maps()
    gpu.compare(
        ours=lambda p, t: boundary_match(p, t, CLASSES, RADIUS).counts,
        peer=lambda p, t: boundary_match(p, t, CLASSES, RADIUS).counts,
        peer_name="our CPU kernel",
        peer_runs="host",
        inputs=(prediction.to(gpu.device), target.to(gpu.device)),
        peer_inputs=(prediction, target),
        check=lambda ours, peer: torch.testing.assert_close(ours.cpu(), peer, rtol=0, atol=0),
    )
