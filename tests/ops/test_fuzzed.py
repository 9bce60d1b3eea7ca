"""Faults that the fuzzer found, each made by hand."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from pyseg import ops

INF = float("inf")


@pytest.mark.parametrize("mode", ["avg", "max", "pixels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_stride_of_a_single_column_means_nothing(dtype, mode):
    """torch calls such a map contiguous; taken for channels_last, it was read beyond its end."""
    plain = torch.randn(2, 3, 20, 1).to(dtype)
    boxes = [torch.tensor([[0.0, 2, 1, 15]]), torch.tensor([[0.0, 0, 1, 19], [0, 5, 1, 9]])]
    odd = plain.as_strided(plain.shape, (60, 20, 1, 1000)).requires_grad_()
    plain.requires_grad_()
    results = [
        ops.roi_pool(level, boxes, (4, 2))
        if mode == "pixels"
        else ops.roi_align(level, boxes, (4, 2), mode=mode)
        for level in (odd, plain)
    ]
    assert torch.equal(*results)
    ours, expected = (
        torch.autograd.grad(result.float().sum(), level)[0]
        for result, level in zip(results, (odd, plain), strict=True)
    )
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("value", [INF, -INF, 3e38])
def test_the_largest_sample_next_to_infinity(value):
    """Interpolation by differences made NaN of infinity, and NaN is the largest."""
    input = torch.zeros(1, 1, 4, 4)
    input[0, 0, 1, 1], input[0, 0, 1, 2], input[0, 0, 3, 3] = value, -3e38 * (value > 0), 1.0
    whole = ops.roi_align(
        input, torch.tensor([[0.0, 0, 0, 3, 3]]), 1, sampling_ratio=4, aligned=True, mode="max"
    )
    assert not whole.isnan().any()
    assert whole.item() == INF or value != INF
    # a sample in the middle of the pixel itself
    exact = ops.roi_align(
        input, torch.tensor([[0.0, 1, 1, 2, 2]]), 1, sampling_ratio=1, aligned=True, mode="max"
    )
    assert exact.item() == pytest.approx(value)


def test_warping_infinite_boxes():
    """Their extent was NaN, and so they were refused for a NaN that they do not have."""
    input = torch.randn(1, 2, 5, 6)
    boxes = torch.tensor([[0.0, -INF, 0, 4, 4], [0, INF, INF, INF, INF], [0, 1, 1, 3, INF]])
    result = ops.roi_warp(input, boxes, 2, sampling_ratio=2)
    assert result.shape == (3, 2, 2, 2) and result.isfinite().all()
    with pytest.raises(ValueError, match="boxes must not be NaN, but box 1 is"):
        ops.roi_warp(input, torch.cat([boxes[:1], boxes[:1] * math.nan]), 2)


LABELS = torch.zeros(1, 4, 4, dtype=torch.uint8)
LOGITS = torch.zeros(1, 3, 4, 4)
IDS, LISTED = torch.ones(4, 4, dtype=torch.int32), torch.tensor([[1, 0, 16, 0]])
BOXES = [torch.zeros(1, 4)]
SCENE = (LOGITS[0] > 1, torch.ones(3), torch.ones(3, dtype=torch.int64), LABELS[0])
HEAD = (LOGITS[0], LOGITS[0], torch.zeros(3, 4), torch.full((3,), 2))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda bad: ops.boundary_mask(LABELS, bad), "distance"),
        (lambda bad: ops.boundary_match(LABELS, LABELS, 3, 1, bad), "ignore_index"),
        (lambda bad: ops.confusion_matrix(LABELS, LABELS, bad), "num_classes"),
        (lambda bad: ops.confusion_counts(LABELS, LABELS, 3, bad), "ignore_index"),
        (lambda bad: ops.upsample_argmax(LOGITS, (bad, 8)), "size"),
        (lambda bad: ops.upsample_argmax(LOGITS, bad), "size"),
        (lambda bad: ops.upsample_confusion(LOGITS, LABELS, None, bad), "ignore_index"),
        (lambda bad: ops.panoptic_head(*HEAD, num_stuff=bad, size=(4, 4)), "num_stuff"),
        (lambda bad: ops.panoptic_head(*HEAD, num_stuff=2, size=(4, bad)), "size"),
        (lambda bad: ops.panoptic_merge(*SCENE, stuff_classes=[0], stuff_area=bad), "stuff_area"),
        (lambda bad: ops.panoptic_merge(*SCENE, stuff_classes=[bad]), "stuff_classes"),
        (lambda bad: ops.panoptic_quality(IDS, IDS, LISTED[:, :2], LISTED, bad), "num_classes"),
        (lambda bad: ops.roi_align(LOGITS, BOXES, bad), "output_size"),
        (lambda bad: ops.roi_align(LOGITS, BOXES, 2, sampling_ratio=bad), "sampling_ratio"),
        (lambda bad: ops.roi_align(LOGITS, BOXES, 2, aligned=bad), "aligned"),
        (lambda bad: ops.dense_crf(LOGITS, LOGITS, iterations=bad), "iterations"),
        (lambda bad: ops.dense_crf(LOGITS, LOGITS, quality=bad), "quality"),
    ],
)
@pytest.mark.parametrize("bad", [None, 1.5, "2", [1, 2, 3], 2**70], ids=repr)
def test_no_integers(call, name, bad):
    """torch's own errors were RuntimeErrors, and some of Python's named nothing."""
    with pytest.raises(ValueError, match=name):
        call(bad)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda bad: ops.boundary_match(LABELS, LABELS, 3, bad), "radius"),
        (
            lambda bad: ops.panoptic_merge(*SCENE, stuff_classes=[], score_threshold=bad),
            "score_threshold",
        ),
        (
            lambda bad: ops.panoptic_merge(*SCENE, stuff_classes=[], overlap_threshold=bad),
            "overlap_threshold",
        ),
        (lambda bad: ops.roi_align(LOGITS, BOXES, 2, bad), "spatial_scale"),
        (
            lambda bad: ops.multi_scale_roi_align([LOGITS], BOXES, 2, [1.0], canonical_size=bad),
            "canonical_size",
        ),
        (lambda bad: ops.dense_crf(LOGITS, LOGITS, gaussian=[(bad, 1.0)]), r"gaussian\[0\]"),
        (lambda bad: ops.dense_crf(LOGITS, LOGITS, gaussian=[(3.0, bad)]), r"gaussian\[0\]"),
        (lambda bad: ops.dense_crf(LOGITS, LOGITS, bilateral=[(3.0, 1.0, bad)]), "bilateral"),
    ],
)
@pytest.mark.parametrize("bad", [None, "2", math.nan, {}, (1.0, 2.0, 3.0)], ids=repr)
def test_no_numbers(call, name, bad):
    with pytest.raises(ValueError, match=name):
        call(bad)


@pytest.mark.parametrize("missing", ["offset", "weight"])
def test_deform_conv2d_without_a_tensor(missing):
    arguments = {
        "input": torch.rand(1, 2, 5, 5),
        "offset": torch.zeros(1, 18, 3, 3),
        "weight": torch.rand(2, 2, 3, 3),
    }
    with pytest.raises(TypeError, match=missing):
        ops.deform_conv2d(**{**arguments, missing: None})


def test_boundaries_that_are_no_tensors():
    with pytest.raises(TypeError, match=r"target_boundary must be a torch\.Tensor"):
        ops.panoptic_quality(
            *(IDS, IDS, LISTED[:, :2], LISTED, 1),
            prediction_boundary=IDS > 0,
            target_boundary=1,
        )


def test_numbers_of_other_types():
    """NumPy's integers and Python's fractions are numbers; one that no float holds is none."""
    input, weight = torch.randn(1, 2, 6, 7), torch.randn(3, 2, 3, 3)
    offset = torch.zeros(1, 18, 6, 7)
    assert torch.equal(
        ops.deform_conv2d(input, offset, weight, padding=np.int64(1)),
        ops.deform_conv2d(input, offset, weight, padding=1),
    )
    boxes = [torch.tensor([[0.0, 0, 8, 8]])]
    assert torch.equal(
        ops.roi_align(input, boxes, 2, Fraction(1, 2)), ops.roi_align(input, boxes, 2, 0.5)
    )
    with pytest.raises(ValueError, match="spatial_scale must be a number"):
        ops.roi_align(input, boxes, 2, 10**400)
