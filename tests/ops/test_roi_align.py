"""RoI pooling against torchvision's, against grid_sample, and on a ramp."""

import math
from collections import OrderedDict

import pytest
import torch
import torchvision
from scipy.optimize import linear_sum_assignment
from torchvision.models.detection import maskrcnn_resnet50_fpn

from pyseg.ops import (
    MultiScaleRoIAlign,
    RoIAlign,
    RoIPool,
    multi_scale_roi_align,
    replace_roi_pooling,
    roi_align,
    roi_pool,
    roi_warp,
)
from pyseg.ops.roi_align import FLOATS, reference

MODES = ("avg", "max", "pixels")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def random_boxes(generator, count, images, size, dtype=torch.float32):
    """[count, 5]: small and large ones, some of them inverted, some outside the image."""
    centre = (torch.rand(count, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2) * size
    extent = torch.exp(torch.rand(count, 2, generator=generator, dtype=torch.float64) * 5 - 1)
    extent[torch.rand(count, 2, generator=generator) < 0.1] *= -1
    index = torch.randint(0, images, (count, 1), generator=generator)
    return torch.cat([index, centre - extent / 2, centre + extent / 2], 1).to(dtype)


def assert_close(got, expected, tolerance):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if got.numel():
        scale = max(1.0, expected.double().abs().max().item())
        error = (got.double() - expected.double()).abs().max().item() / scale
        assert error <= tolerance, error


def with_gradient(function, input):
    """The output and the gradient in `input` of one projection of it."""
    leaf = input.detach().requires_grad_()
    output = function(leaf)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output)
    return output.detach(), torch.autograd.grad(output, leaf, weights)[0]


CASES = [  # input, boxes, output size, spatial scale, sampling ratio
    ((2, 5, 31, 47), 9, (7, 7), 0.5, 2),
    ((1, 67, 13, 8), 6, (3, 5), 0.25, 0),
    ((3, 130, 5, 200), 12, (1, 9), 1.0, -1),
    ((1, 16, 1, 1), 5, (2, 2), 1.0, 3),
    ((2, 1, 64, 3), 7, (14, 2), 0.7, 1),
    ((1, 64, 40, 50), 3, (28, 28), 1.0, 2),
    ((1, 256, 25, 25), 4, (5, 5), 1 / 16, 0),
    ((2, 3, 9, 9), 0, (7, 7), 1.0, 2),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape, count, size, scale, ratio", CASES)
def test_against_torchvision(generator, shape, count, size, scale, ratio, dtype, layout):
    input = torch.randn(shape, generator=generator, dtype=dtype)
    extent = torch.tensor([shape[3], shape[2]]) / scale
    boxes = random_boxes(generator, count, shape[0], extent, dtype)
    arranged = {
        "contiguous": input,
        "channels_last": input.to(memory_format=torch.channels_last),
        "strided": input.repeat_interleave(2, 3)[..., ::2],
    }[layout]
    upright = boxes.clone()  # torchvision fails or reads beyond memory for inverted boxes otherwise
    upright[:, 1:3], upright[:, 3:] = (
        boxes[:, 1:3].minimum(boxes[:, 3:]),
        boxes[:, 1:3].maximum(boxes[:, 3:]),
    )
    for ours, peer in (
        (
            lambda x: roi_align(x, boxes, size, scale, ratio),
            lambda x: torchvision.ops.roi_align(x, boxes, size, scale, ratio),
        ),
        (
            lambda x: roi_align(x, upright, size, scale, ratio, True),
            lambda x: torchvision.ops.roi_align(x, upright, size, scale, ratio, True),
        ),
        (
            lambda x: roi_pool(x, boxes, size, scale),
            lambda x: torchvision.ops.roi_pool(x, boxes, size, scale),
        ),
    ):
        for got, expected in zip(
            with_gradient(ours, arranged), with_gradient(peer, input), strict=True
        ):
            assert_close(got, expected, TOLERANCE[dtype])


def test_aligned_inverted_boxes(generator):
    input = torch.randn(1, 3, 20, 20, generator=generator)
    boxes = torch.tensor([[0, 15.0, 4, 3, 12], [0, 4, 15, 12, 3]])
    expected = torchvision.ops.roi_align(input, boxes, 3, 1.0, 2, True)
    assert_close(roi_align(input, boxes, 3, 1.0, 2, True), expected, 1e-5)
    # adaptive: a negative number of samples is none (torchvision raises an error of std::vector)
    assert (roi_align(input, boxes, 3, 1.0, 0, True) == 0).all()


# The parameters of torchvision's test_ops.py: 10 x 10 maps of 2 * pool_size^2 channels.
# Differences: what is expected comes from its operator in float64; sampling_ratio=2 is added; boxes
# of a wrong shape raise ValueError, not AssertionError (test_bad_arguments); the autocast grid, on
# CUDA there, is test_autocast_as_in_torchvision. Left out are quantised tensors and TorchScript,
# which these ops do not have, and the names of nodes in an FX graph.
@pytest.mark.parametrize("sampling_ratio", [-1, 2])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("deterministic", [True, False])
def test_torchvisions_grid_of_roi_align(
    generator, aligned, sampling_ratio, contiguous, dtype, deterministic
):
    pool_size = 5
    x = torch.rand(2, 2 * pool_size**2, 10, 10, generator=generator, dtype=dtype)
    if not contiguous:
        x = x.permute(0, 1, 3, 2)
    boxes = torch.tensor([[0, 0, 0, 9, 9], [0, 0, 5, 4, 9], [0, 5, 5, 9, 9], [1, 0, 0, 9, 9]])
    boxes = boxes.to(dtype)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        got = roi_align(x, boxes, pool_size, 1, sampling_ratio, aligned)
    finally:
        torch.use_deterministic_algorithms(before)
    wide = torchvision.ops.roi_align(
        x.double(), boxes.double(), pool_size, 1, sampling_ratio, aligned
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 1e-3
    assert_close(got, wide.to(dtype), tolerance)
    # boxes per image, as a list
    as_list = [boxes[boxes[:, 0] == i, 1:] for i in range(2)]
    assert torch.equal(roi_align(x, as_list, pool_size, 1, sampling_ratio, aligned), got)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_torchvisions_grid_of_roi_pool(generator, contiguous, dtype):
    pool_size = 5
    x = torch.rand(2, 2 * pool_size**2, 10, 10, generator=generator, dtype=dtype)
    if not contiguous:
        x = x.permute(0, 1, 3, 2)
    boxes = torch.tensor([[0, 0, 0, 9, 9], [0, 0, 5, 4, 9], [0, 5, 5, 9, 9], [1, 0, 0, 9, 9]])
    boxes = boxes.to(dtype)
    wide = torchvision.ops.roi_pool(x.double(), boxes.double(), pool_size)
    assert torch.equal(roi_pool(x, boxes, pool_size), wide.to(dtype))


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("function", [roi_align, roi_pool])
def test_torchvisions_grid_of_gradients(generator, function, contiguous):
    pool_size = 2
    for _ in range(10):
        # No two values so close that a difference quotient sees the largest of a bin change.
        x = torch.randperm(8 * 25, generator=generator).double().reshape(1, 2 * pool_size**2, 5, 5)
        x = x / 200
        x = (x if contiguous else x.permute(0, 1, 3, 2)).requires_grad_()
        boxes = torch.tensor([[0, 0, 0, 4, 4], [0, 0, 2, 3, 4], [0, 2, 2, 4, 4]]).double()
        samples = {"sampling_ratio": 1} if function is roi_align else {}
        torch.autograd.gradcheck(
            lambda z, boxes=boxes, samples=samples: function(z, boxes, pool_size, 1.0, **samples),
            x,
            atol=1e-5,
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(generator, dtype, mode):
    input = torch.randn(2, 70, 20, 30, generator=generator).to(dtype)
    boxes = random_boxes(generator, 8, 2, torch.tensor([60.0, 40.0]))
    sizes = ((5, 6), 0.5)
    # Samples that are equal in one precision, and then the first counts, are not in another.
    wide = torch.float32 if mode == "max" else torch.float64

    def run(x, boxes):
        if mode == "pixels":
            return roi_pool(x, boxes, *sizes)
        return roi_align(x, boxes, *sizes, 2, mode=mode)

    for layout in (input, input.to(memory_format=torch.channels_last)):
        got = with_gradient(lambda x: run(x, boxes), layout)
        expected = with_gradient(lambda x: run(x, boxes.to(wide)), input.to(wide))
        assert_close(got[0], expected[0].to(dtype), torch.finfo(dtype).eps)
        # gradients of the projection are rounded too
        assert_close(got[1], expected[1].to(dtype), 8 * torch.finfo(dtype).eps)


def test_ramp():
    ramp = torch.arange(12.0).expand(1, 1, 12, 12)
    boxes = torch.tensor([[0, 4.0, 4, 8, 8]])
    for got, expected in (
        (roi_align(ramp, boxes, 2, aligned=True), [4.5, 6.5]),
        (roi_align(ramp, boxes, 2), [5.0, 7]),
        (roi_pool(ramp, boxes, 2), [6.0, 8]),
        # pixels 4 to 8 are five, of which the halves have their centres at 4 + 1.25 and 4 + 3.75
        (roi_warp(ramp, boxes, 2, aligned=True), [4.75, 7.25]),
        # of two samples a quarter of a bin from its centre, the right one
        (roi_align(ramp, boxes, 2, 1.0, 2, True, mode="max"), [5.0, 7]),
    ):
        assert_close(got[0, 0], torch.tensor([expected, expected]), 1e-6)


def test_only_roi_align_follows_a_box_on_a_linear_field(generator):
    """Centres of boxes moved by fractions of a pixel; rounding is off by up to half a pixel."""
    ramp = (torch.arange(40.0) + 0.5).expand(1, 1, 40, 40)  # where pixel 0 reaches from 0 to 1
    start = torch.rand(500, 1, generator=generator) * 10 + 5
    size = torch.rand(500, 1, generator=generator) * 12 + 8
    centre = (start + size / 2)[:, 0]
    boxes = [torch.cat([start, start, start + size, start + size], 1)]

    def error(pooled):
        return pooled.mean((1, 2, 3)) - centre

    assert error(roi_align(ramp, boxes, 7, aligned=True)).abs().max() < 1e-4
    assert (error(roi_align(ramp, boxes, 7)) - 0.5).abs().max() < 1e-4
    # Both edges are rounded, and the last pixel is inclusive: half a pixel, and up to half more.
    warped = error(roi_warp(ramp, boxes, 7, aligned=True)) - 0.5
    assert 0.3 < warped.abs().max() <= 0.5 + 1e-4 and 0.15 < warped.std() < 0.26
    # The largest of a bin's pixels, too, lies up to a bin to the right.
    pooled = error(roi_pool(ramp, boxes, 7))
    assert pooled.mean() > 0.5 and 0.15 < pooled.std() < 1


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_against_grid_sample(generator, mode, aligned):
    input = torch.randn(2, 21, 30, 40, generator=generator, dtype=torch.float64)
    corners = torch.rand(10, 2, 2, generator=generator, dtype=torch.float64)
    corners = corners.sort(1).values * torch.tensor([36.0, 26.0]) + 2
    index = torch.randint(0, 2, (10, 1), generator=generator)
    boxes = torch.cat([index, corners.flatten(1)], 1)
    options = {"sampling_ratio": 3, "aligned": aligned, "mode": mode}
    got = with_gradient(lambda x: roi_align(x, boxes, (4, 5), 1.0, **options), input)
    expected = with_gradient(lambda x: reference(x, boxes, (4, 5), 1.0, **options), input)
    assert_close(got[0], expected[0], 1e-12)
    assert_close(got[1], expected[1], 1e-12)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_warp_is_roi_align_of_the_rounded_box(generator, mode):
    input = torch.randn(1, 4, 30, 30, generator=generator)
    boxes = torch.tensor([[0, 3.0, 5.0, 22.0, 41.0], [0, 7, 1, 9, 2], [0, -5, -3, 11, 13]])
    for aligned in (True, False):
        got = roi_warp(input, boxes, 7, 0.5, 2, aligned, mode=mode)
        # by hand: round(1.5) = 2, round(2.5) = 3, round(20.5) = 21, round(-2.5) = -3, …
        rounded = torch.tensor([[0, 2.0, 3, 12, 22], [0, 4, 1, 6, 2], [0, -3, -2, 7, 8]])
        assert torch.equal(got, roi_align(input, rounded, 7, 1.0, 2, aligned, mode=mode))
    listed = roi_warp(input, [boxes[:, 1:]], 7, 0.5, 2, mode=mode)
    assert torch.equal(listed, roi_warp(input, boxes, 7, 0.5, 2, mode=mode))


def test_huge_and_infinite_boxes(generator):
    input = torch.randn(1, 4, 20, 30, generator=generator)
    for edge in (300.0, 1e6, 1e30, math.inf):
        boxes = torch.tensor([[0, -edge, -edge, edge, edge], [0, edge, edge, edge, edge]])
        adaptive = roi_align(input, boxes, 2, 1.0, 0)
        assert adaptive.isfinite().all() and (adaptive[1] == 0).all()
        if edge < 1e3:  # torchvision looks at every sample
            expected = torchvision.ops.roi_align(input, boxes, 2, 1.0, 0)
            assert_close(adaptive, expected, 1e-4)
        assert (roi_align(input, boxes, 2, 1.0, 2)[1] == 0).all()
        pooled = roi_pool(input, boxes[:1], 1)
        assert torch.equal(pooled[0, :, 0, 0], input.amax((0, 2, 3)))


def test_nan_and_infinite_features(generator):
    input = torch.randn(1, 2, 12, 12, generator=generator)
    input[0, 0, 5, 5], input[0, 1, 5, 5] = torch.nan, -torch.inf
    boxes = torch.tensor([[0, 4.0, 4, 6, 6], [0, 7, 7, 10, 10]])
    pooled = roi_pool(input, boxes, 1)[:, :, 0, 0]
    assert pooled[0, 0].isnan() and pooled[1].isfinite().all() and pooled[0, 1].isfinite()
    for mode in ("avg", "max"):
        got = roi_align(input, boxes, 1, 1.0, 2, mode=mode)[:, :, 0, 0]
        assert got[0, 0].isnan() and got[1].isfinite().all()
    # a box on whole pixels: the neighbours' weights are 0
    exact = roi_align(input, torch.tensor([[0, 4.0, 4, 5, 5]]), 1, 1.0, 1, True)
    assert torch.equal(exact[0, 1, 0, 0], input[0, 1, 4, 4])


def test_nan_among_many_channels(generator):
    input = torch.randn(1, 130, 16, 16, generator=generator)
    input[0, 3, 4:8, 4] = torch.inf  # of both signs in a bin: their sum is NaN, their maximum not
    input[0, 3, 5, 5] = -torch.inf
    input[0, [5, 70, 129], 5, 6] = torch.nan
    boxes = torch.tensor([[0, 3.0, 3, 12, 12]])
    got = roi_pool(input, boxes, 2)
    expected = torch.nn.functional.max_pool2d(input[:, :, 3:13, 3:13], 5)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert got[0, 3, 0, 0] == torch.inf and got[0, [5, 70, 129], 0, 0].isnan().all()


def test_threads_do_not_change_the_bits(generator):
    input = torch.randn(2, 150, 40, 50, generator=generator)
    boxes = random_boxes(generator, 60, 2, torch.tensor([100.0, 80.0]))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(
                [
                    *with_gradient(lambda x: roi_align(x, boxes, 7, 0.5, 2), input),
                    *with_gradient(lambda x: roi_align(x, boxes, 7, 0.5, 2, mode="max"), input),
                    *with_gradient(lambda x: roi_pool(x, boxes, 7, 0.5), input),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(generator, mode):
    levels = [
        torch.randn(2, 3, size, size + 1, generator=generator, dtype=torch.float64)
        for size in (12, 6)
    ]
    boxes = random_boxes(generator, 6, 2, torch.tensor([24.0, 24.0]), torch.float64)
    for level in levels:
        level.requires_grad_()
    if mode == "pixels":
        torch.autograd.gradcheck(lambda x: roi_pool(x, boxes, 3, 0.5), levels[0], fast_mode=True)
        return
    torch.autograd.gradcheck(
        lambda *x: multi_scale_roi_align(
            x, boxes, 3, [0.5, 0.25], 2, mode=mode, canonical_size=8, canonical_level=2
        ),
        levels,
    )


def test_second_derivatives_raise(generator):
    input = torch.randn(1, 2, 6, 6, generator=generator, requires_grad=True)
    output = roi_align(input, torch.tensor([[0, 1.0, 1, 4, 4]]), 2)
    grad = torch.autograd.grad(output.square().sum(), input, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def pyramid(generator, channels=9, images=2, size=(256, 320), dtype=torch.float32):
    return OrderedDict(
        (str(i), torch.randn(images, channels, size[0] >> k, size[1] >> k, generator=generator))
        for i, k in enumerate((2, 3, 4, 5))
    )


def test_pyramid_against_torchvision(generator):
    features = pyramid(generator)
    boxes = []
    for _ in range(2):
        corner = torch.rand(60, 2, generator=generator) * 200
        extent = torch.exp(torch.rand(60, 2, generator=generator) * 5.5 + 0.5)
        boxes.append(torch.cat([corner, corner + extent], 1))
    boxes[0][:4, 2:] = boxes[0][:4, :2] + torch.tensor([[112.0], [224], [448], [28]])  # edges
    shapes = [(256, 320), (250, 310)]
    for arguments in (((7, 7), 2), (14, 0)):
        theirs = torchvision.ops.MultiScaleRoIAlign(list(features), *arguments)
        ours = MultiScaleRoIAlign(list(features), *arguments)
        assert ours.output_size == theirs.output_size
        assert_close(ours(features, boxes, shapes), theirs(features, boxes, shapes), 1e-5)
    names = ["1", "2"]  # only two of the levels
    theirs = torchvision.ops.MultiScaleRoIAlign(names, 5, 2, canonical_scale=64)
    ours = MultiScaleRoIAlign(names, 5, 2, canonical_scale=64)
    assert_close(ours(features, boxes, shapes), theirs(features, boxes, shapes), 1e-5)
    one = torchvision.ops.MultiScaleRoIAlign(["3"], 5, 2)(features, boxes, shapes)
    assert_close(MultiScaleRoIAlign(["3"], 5, 2)(features, boxes, shapes), one, 1e-5)


def test_boxes_without_a_size_and_levels_with_gaps(generator):
    features = list(pyramid(generator, images=1).values())
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    degenerate = torch.tensor([[0, 9.0, 9, 9, 9], [0, 90.0, 9, 20, 40]])  # areas 0 and negative
    got = multi_scale_roi_align(features, degenerate, 3, scales, 2)
    assert torch.equal(got, roi_align(features[0], degenerate, 3, 1 / 4, 2))
    boxes = torch.tensor([[0, 10.0, 10, 160, 160], [0, 5, 5, 300, 250]])  # levels 3 and 4
    got = multi_scale_roi_align([features[0], features[2]], boxes, 3, [1 / 4, 1 / 16], 2)
    expected = [
        roi_align(features[0], boxes[:1], 3, 1 / 4, 2),
        roi_align(features[2], boxes[1:], 3, 1 / 16, 2),
    ]
    assert torch.equal(got, torch.cat(expected))


def test_empty(generator):
    for boxes in (torch.zeros(0, 5), [torch.zeros(0, 4)] * 2):
        input = torch.randn(2, 3, 8, 8, generator=generator, requires_grad=True)
        output = roi_align(input, boxes, 7)
        assert output.shape == (0, 3, 7, 7)
        output.sum().backward()
        assert (input.grad == 0).all()
    no_images = torch.zeros(0, 3, 8, 8)
    for function in (roi_align, roi_pool, roi_warp):
        assert function(no_images, [], 7).shape == (0, 3, 7, 7)
        assert function(no_images, torch.zeros(0, 5), 7).shape == (0, 3, 7, 7)


def test_autocast_as_in_torchvision(generator):
    input = torch.randn(1, 3, 16, 16, generator=generator)
    boxes = torch.tensor([[0, 1.0, 2, 11, 12]])
    for dtype in (torch.float32, torch.bfloat16):
        for boxes_dtype in (torch.float32, torch.bfloat16):
            arguments = input.to(dtype), boxes.to(boxes_dtype), 4, 1.0, 2
            with torch.autocast("cpu", torch.bfloat16):
                got = roi_align(*arguments)
                expected = torchvision.ops.roi_align(*arguments)
            assert_close(got, expected, 1e-5 if dtype == torch.float32 else 1e-2)


INPUT, BOX = torch.zeros(2, 3, 8, 8), torch.tensor([[0, 1.0, 1, 4, 4]])


@pytest.mark.parametrize(
    "input, boxes, options, message",
    [
        (torch.zeros(3, 8, 8), BOX, {}, r"input must be \[N, C, H, W\].*got \[3, 8, 8\]"),
        (torch.zeros(1, 3, 0, 8), BOX, {}, r"input .*got \[1, 3, 0, 8\]"),
        (INPUT.long(), BOX, {}, "input must be floating point, got torch.int64"),
        (INPUT, BOX[:, 1:], {}, r"boxes must be \[K, 5\], or a list.*got \[1, 4\]"),
        (INPUT, BOX[0], {}, r"boxes must be \[K, 5\].*got \[5\]"),
        (INPUT, [BOX, BOX], {}, r"boxes must be a list of \[L, 4\], got \[1, 5\]"),
        (INPUT, [BOX[:, 1:]], {}, "one tensor per image: input has 2 images, boxes 1"),
        (INPUT, BOX.double(), {}, "boxes are torch.float64, but input torch.float32"),
        (INPUT.double(), BOX, {}, "boxes are torch.float32, but input torch.float64"),
        (INPUT, BOX.long(), {}, "boxes are torch.int64"),
        (INPUT, BOX.to("meta"), {}, "boxes are on meta, but input on cpu"),
        (INPUT, BOX + torch.tensor([2.0, 0, 0, 0, 0]), {}, "index of one of 2 images.*box 0 has 2"),
        (INPUT, BOX - torch.tensor([1.0, 0, 0, 0, 0]), {}, "index of one of 2.*box 0 has -1"),
        (INPUT, BOX + torch.tensor([0.5, 0, 0, 0, 0]), {}, "index of one of 2.*box 0 has 0.5"),
        (INPUT, torch.cat([BOX, BOX * torch.nan]), {}, "boxes must not be NaN, but box 1 is"),
        (INPUT, BOX, {"output_size": 0}, "output_size .*got 0"),
        (INPUT, BOX, {"output_size": (1, 2, 3)}, r"output_size .*got \(1, 2, 3\)"),
        (INPUT, BOX, {"spatial_scale": 0.0}, "spatial_scale must be positive, got 0.0"),
        (INPUT, BOX, {"spatial_scale": math.nan}, "spatial_scale must be positive, got nan"),
    ],
)
def test_bad_arguments(input, boxes, options, message):
    for function in (roi_align, roi_pool, roi_warp):
        with pytest.raises(ValueError, match=message):
            function(input, boxes, **{"output_size": 2, **options})


@pytest.mark.parametrize(
    "levels, scales, options, message",
    [
        ([], [], {}, "1 to 8 feature maps, got 0"),
        ([INPUT, INPUT.half()], [1, 0.5], {}, "levels must have one dtype and device"),
        ([INPUT, INPUT[:, :2]], [1, 0.5], {}, r"same images and channels.*\[2, 2, 8, 8\]"),
        ([INPUT, INPUT], [1], {}, "spatial_scales must be 2, one per level, got 1"),
        ([INPUT, INPUT], [0.5, 1], {}, "must be positive and fall from level to level"),
        ([INPUT], [1], {"mode": "mean"}, 'mode must be "avg" or "max", got \'mean\''),
        ([INPUT], [1], {"canonical_size": 0}, "canonical_size must be positive, got 0"),
    ],
)
def test_bad_levels(levels, scales, options, message):
    with pytest.raises(ValueError, match=message):
        multi_scale_roi_align(levels, BOX, 2, scales, **options)


def operator_arguments(generator, mode):
    levels = [torch.randn(2, 5, size, size, generator=generator) for size in (16, 8)]
    boxes = random_boxes(generator, 5, 2, torch.tensor([32.0, 32.0]))
    return levels, boxes, [0.5, 0.25], [3, 2], 2, True, mode, 16.0, 1


@pytest.mark.parametrize("mode", range(3))
def test_opcheck(generator, mode):
    levels, *rest = operator_arguments(generator, mode)
    for level in levels:
        level.requires_grad_()
    torch.library.opcheck(torch.ops.pyseg.roi_align.default, (levels, *rest))
    grad = torch.randn(5, 5, 3, 2, generator=generator)
    levels = [level.detach() for level in levels]
    torch.library.opcheck(
        torch.ops.pyseg._roi_align_backward.default,
        (grad, levels, *rest),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compile_and_export(compiler, generator):
    class Pooling(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.align, self.pool = RoIAlign(3, 0.5, 2), RoIPool(3, 0.5)
            self.pyramid = MultiScaleRoIAlign(["a", "b"], 3, 2)

        def forward(self, a, b, boxes):
            warped = roi_warp(a, [boxes], 3, 0.5, 2, mode="max")
            levels = self.pyramid({"a": a, "b": b}, [boxes], [(32, 40)])
            return self.align(a, [boxes]) + self.pool(a, [boxes]) + warped + levels

    module = Pooling()
    a = torch.randn(1, 4, 16, 20, generator=generator, requires_grad=True)
    b = torch.randn(1, 4, 8, 10, generator=generator)
    boxes = random_boxes(generator, 6, 1, torch.tensor([40.0, 32.0]))[:, 1:]
    expected = module(a, b, boxes)
    compiled = compiler(module)
    got = compiled(a, b, boxes)
    assert_close(got.detach(), expected.detach(), 1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), a)[0] for out in (got, expected)]
    assert_close(*gradients, 1e-5)
    count = torch.export.Dim("boxes", min=2, max=1000)
    program = torch.export.export(
        module, (a, b, boxes), dynamic_shapes={"a": None, "b": None, "boxes": {0: count}}
    )
    more = random_boxes(generator, 9, 1, torch.tensor([40.0, 32.0]))[:, 1:]
    assert_close(program.module()(a, b, more).detach(), module(a, b, more).detach(), 1e-6)


def test_mask_rcnn_with_our_pooling_gives_the_same_boxes_and_masks(generator):
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        min_size=96,
        max_size=128,
        rpn_post_nms_top_n_test=100,
        box_score_thresh=0.0,
        box_nms_thresh=1.0,  # random weights find little: keep all of it
        rpn_nms_thresh=0.9,
        box_detections_per_img=60,
    ).eval()
    images = [torch.rand(3, 96, 128, generator=generator)]
    with torch.no_grad():
        expected = model(images)[0]
        assert replace_roi_pooling(model) is model
        assert type(model.roi_heads.box_roi_pool) is MultiScaleRoIAlign
        assert type(model.roi_heads.mask_roi_pool) is MultiScaleRoIAlign
        got = model(images)[0]
    assert len(got["boxes"]) == len(expected["boxes"]) > 50
    # Detections come in the order of their scores, and end with the lowest kept: where two scores
    # differ by less than rounding, either may come first, so rows are matched first.
    torch.testing.assert_close(got["scores"], expected["scores"], rtol=1e-4, atol=1e-5)
    clear = expected["scores"] > expected["scores"][-1] + 1e-6
    assert clear.sum() > 50
    ours, theirs = (
        torch.column_stack([found["boxes"], found["labels"] * 1000, found["scores"] * 1000])
        for found in (got, expected)
    )
    rows, matched = linear_sum_assignment(torch.cdist(theirs[clear], ours, p=1).numpy())
    got = {name: value[matched] for name, value in got.items()}
    expected = {name: value[clear][rows] for name, value in expected.items()}
    assert torch.equal(got["labels"], expected["labels"])
    torch.testing.assert_close(got["boxes"], expected["boxes"], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(got["scores"], expected["scores"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["masks"], expected["masks"], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="no MultiScaleRoIAlign"):
        replace_roi_pooling(model)


def test_replaced_layers():
    both = torch.nn.Sequential(
        torchvision.ops.RoIAlign(7, 0.25, 2, aligned=True), torchvision.ops.RoIPool((3, 4), 0.5)
    )
    replace_roi_pooling(both)
    assert repr(both[0]).endswith(
        "(output_size=7, spatial_scale=0.25, sampling_ratio=2, aligned=True, mode='avg')"
    )
    assert repr(both[1]).endswith("RoIPool(output_size=(3, 4), spatial_scale=0.5)")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", range(3))
def test_small_kernels_against_the_cpu(device, generator, mode, dtype):
    """The .cu file on the GPU, or emulated, against the CPU kernels tested above."""
    for layout in (torch.contiguous_format, torch.channels_last):
        for channels, size, ratio in ((5, [3, 4], 2), (36, [2, 2], 0)):
            levels = [
                torch.randn(2, channels, 13 - 4 * i, 17 - 6 * i, generator=generator)
                .to(dtype)
                .to(memory_format=layout)
                for i in range(2)
            ]
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            boxes = random_boxes(generator, 7, 2, torch.tensor([34.0, 26.0]), wide)
            grad = torch.randn(7, channels, *size, generator=generator).to(dtype)
            for aligned in (True, False):
                options = [0.5, 0.25], size, ratio, aligned, mode, 16.0, 2
                there = [level.to(device.name) for level in levels]
                got = device.ops.roi_align(there, boxes.to(device.name), *options)
                expected = torch.ops.pyseg.roi_align(levels, boxes, *options)
                eps = max(torch.finfo(dtype).eps, 1e-6 if wide == torch.float32 else 1e-13)
                assert_close(got.cpu(), expected, 4 * eps)
                arguments = boxes.to(device.name), *options
                gots = device.ops._roi_align_backward(grad.to(device.name), there, *arguments)
                expecteds = torch.ops.pyseg._roi_align_backward(grad, levels, boxes, *options)
                for got, expected in zip(gots, expecteds, strict=True):
                    assert_close(got.cpu(), expected, 8 * eps)


def test_small_kernel_reads_levels_however_they_lie(device, generator):
    """A layout for each level; more samples than are located at once; several blocks of bins."""
    flat = torch.randn(2 * 9 * 11 * 20 + 1, generator=generator)
    levels = [
        torch.randn(2, 20, 30, 40, generator=generator),
        torch.randn(2, 40, 17, 13, generator=generator)[:, ::2],
        torch.randn(2, 20, 7, 9, generator=generator).to(memory_format=torch.channels_last),
        flat[1:].view(2, 9, 11, 20).permute(0, 3, 1, 2),  # of misaligned channels
    ]
    there = [flat.to(device.name)[1:].view(2, 9, 11, 20).permute(0, 3, 1, 2)]
    there = [*(level.to(device.name) for level in levels[:3]), *there]
    boxes = random_boxes(generator, 9, 2, torch.tensor([160.0, 120.0]), torch.float32)
    for count, size, ratio in ((9, [14, 14], 6), (1, [2, 3], 1), (9, [1, 70], 0)):
        options = [0.5, 0.25, 0.125, 0.0625], size, ratio, True, 0, 32.0, 2
        got = device.ops.roi_align(there, boxes[:count].to(device.name), *options)
        expected = torch.ops.pyseg.roi_align(levels, boxes[:count], *options)
        assert_close(got.cpu(), expected, 1e-5)


def test_small_kernel_answers_a_bad_box_with_nan(device, generator):
    level = torch.randn(1, 3, 8, 8, generator=generator).to(device.name)
    good = [0, 1.0, 1, 4, 4]
    boxes = torch.tensor([good, [1, 1, 1, 4, 4], good, [0, torch.nan, 1, 4, 4]]).to(device.name)
    for mode in range(3):
        options = [1.0], [2, 2], 2, False, mode, 224.0, 4
        got = device.ops.roi_align([level], boxes, *options).cpu()
        assert got[[1, 3]].isnan().all() and got[[0, 2]].isfinite().all()
        grad = torch.ones_like(got).to(device.name)
        (all_boxes,) = device.ops._roi_align_backward(grad, [level], boxes, *options)
        (good_boxes,) = device.ops._roi_align_backward(grad[::2], [level], boxes[::2], *options)
        assert torch.equal(all_boxes, good_boxes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_boxes_read_only_pixels_of_the_map(generator, dtype):
    """Sample positions of a box that begins far out are rounded to many pixels beside it."""
    input = torch.randn(1, 1, 39, 16, generator=generator).to(dtype)
    boxes = torch.tensor([[0, 22.3986, -torch.inf, 24.5833, 19.6935]])
    arguments = {"spatial_scale": 0.5, "sampling_ratio": 0, "aligned": True}
    results = []
    for filling in (torch.nan, 0.0, 1e30):
        for size in (600, 624, 9984, 1 << 16):  # what the op is given next is often this
            torch.full((size,), filling)
        results.append(roi_align(input, boxes, (3, 3), **arguments))
        assert results[-1].isfinite().all()
        assert torch.equal(results[-1], results[0])
