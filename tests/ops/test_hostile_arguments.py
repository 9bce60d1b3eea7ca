"""Arguments that nobody means raise, whether the public function or the operator gets them.

What could end the process runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyseg import ops
from pyseg.ops.dense_crf import QUALITY

ROOT = Path(__file__).resolve().parents[2]
INF = float("inf")
MAP = torch.zeros(2, 5, 6, dtype=torch.int64)


def run_python(code, **environment):
    """What a fresh interpreter prints; fails where it dies or raises."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), **os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, (result.returncode, result.stderr[-2000:])
    return result.stdout


@pytest.fixture(params=["cpu", "emulated"])
def operators(request):
    """The operators themselves, without the checks of the public functions."""
    if request.param == "cpu":
        return torch.ops.pyseg
    return request.getfixturevalue("emulated")


# -- roi_align

WILD_BOX = """
import torch
from pyseg import ops
box = torch.tensor([[0.0, -torch.inf, 0, torch.inf, 4]])
for levels in (torch.zeros(2, 64, 100, 100), torch.zeros(2, 64, 100, 100, dtype=torch.float64)):
    for scale in (1e-46, 1e-300, 1e46):
        for run in (
            lambda: ops.roi_align(levels, box.to(levels.dtype), 2, scale),
            lambda: torch.ops.pyseg.roi_align(
                [levels], box.to(levels.dtype), [scale], [2, 2], -1, False, 0, 224.0, 4
            ),
        ):
            try:
                print("value", bool(run().isfinite().all()))
            except ValueError as error:
                print("refused", error)
"""


def test_infinite_boxes_and_scales_that_vanish():
    lines = run_python(WILD_BOX).splitlines()
    assert len(lines) == 12
    # float32: 1e-46 and 1e-300 are 0, 1e46 is infinite there.
    assert all(line.startswith("refused") for line in lines[:6])
    assert all("scale" in line for line in lines[:6])
    assert all(line.startswith("refused") or line == "value True" for line in lines[6:])


@pytest.mark.parametrize("scale", [1e-46, 1e-39, 1e39])
def test_scales_are_those_of_float32(scale):
    with pytest.raises(ValueError, match=r"spatial_scale must be positive, got .*, as float32"):
        ops.roi_align(torch.zeros(1, 1, 4, 4), [torch.zeros(1, 4)], 2, scale)


def test_infinite_boxes_reach_all_of_the_map():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8).contiguous()
    for mode in ("avg", "max"):
        box = [torch.tensor([[-INF, 0.0, INF, 8]])]
        assert ops.roi_align(ramp, box, 2, mode=mode).isfinite().all()


def test_more_samples_than_make_sense():
    input, boxes = torch.rand(1, 2, 6, 6), [torch.tensor([[0.0, 0, 5, 5]])]
    assert ops.roi_align(input, boxes, 2, sampling_ratio=1024).isfinite().all()
    for ratio in (1025, 2**31 - 1):
        with pytest.raises(ValueError, match="sampling_ratio must be at most 1024"):
            ops.roi_align(input, boxes, 2, sampling_ratio=ratio)


def test_canonical_level_is_not_cut_to_32_bits():
    levels = [torch.rand(1, 2, 8, 8), torch.rand(1, 2, 4, 4)]
    boxes = [torch.tensor([[0.0, 0, 5, 5]])]
    with pytest.raises(ValueError, match="canonical_level must be an integer of 32 bits"):
        ops.multi_scale_roi_align(levels, boxes, 2, [1.0, 0.5], canonical_level=2**32 + 4)


def roi_arguments(**changes):
    arguments = {
        "levels": [torch.rand(2, 3, 6, 7)],
        "boxes": torch.tensor([[0.0, 0, 0, 5, 5], [1, 1, 1, 4, 4]]),
        "scales": [1.0],
        "output_size": [2, 2],
        "sampling_ratio": 2,
        "aligned": True,
        "mode": 0,
        "canonical_size": 224.0,
        "canonical_level": 4,
    }
    return tuple({**arguments, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": []}, "levels must be 1 to 8"),
        ({"levels": [torch.rand(1, 2, 3, 3)] * 9}, "levels must be 1 to 8"),
        ({"levels": [torch.rand(3, 6, 7)]}, r"levels must be \[N, C, H, W\]"),
        ({"levels": [torch.rand(2, 3, 0, 7)]}, "with channels and pixels"),
        (
            {"levels": [torch.rand(2, 3, 6, 7), torch.rand(2, 4, 3, 3)], "scales": [1.0, 0.5]},
            "same images, channels and dtype",
        ),
        (
            {"levels": [torch.rand(2, 3, 6, 7), torch.rand(1, 3, 3, 3)], "scales": [1.0, 0.5]},
            "same images, channels and dtype",
        ),
        ({"boxes": torch.zeros(2, 4)}, r"boxes must be \[K, 5\] float32"),
        ({"boxes": torch.zeros(10)}, r"boxes must be \[K, 5\] float32"),
        ({"boxes": torch.zeros(2, 5, dtype=torch.float64)}, r"boxes must be \[K, 5\] float32"),
        ({"scales": []}, "scales must be one per level"),
        ({"scales": [1.0, 0.5]}, "scales must be one per level"),
        ({"scales": [0.0]}, "scales must be positive and finite"),
        ({"scales": [1e-46]}, "scales must be positive and finite"),
        ({"scales": [float("nan")]}, "scales must be positive and finite"),
        ({"output_size": [2]}, "output_size must be two integers"),
        ({"output_size": [2, 0]}, "output_size must be two integers"),
        ({"output_size": [2**16, 2**16]}, r"fewer than 2\^31 bins"),
        ({"sampling_ratio": 2**31}, "sampling_ratio must be at most"),
        ({"mode": 3}, "mode must be 0, 1 or 2"),
        ({"canonical_size": 0.0}, "canonical_size must be positive"),
        ({"canonical_level": 2**32 + 4}, "canonical_level must be an integer of 32 bits"),
    ],
)
def test_roi_align_without_its_wrapper(operators, changes, message):
    arguments = roi_arguments(**changes)
    with pytest.raises(ValueError, match=message):
        operators.roi_align(*arguments)
    with pytest.raises(ValueError, match=message):
        operators._roi_align_backward(torch.zeros(2, 3, 2, 2), *arguments)


@pytest.mark.parametrize(
    "gradient",
    [torch.zeros(2, 3, 2, 1), torch.zeros(1, 3, 2, 2), torch.zeros(2, 3, 2, 2).double()],
)
def test_roi_align_gradient_without_its_wrapper(operators, gradient):
    with pytest.raises(ValueError, match="is not that of the output"):
        operators._roi_align_backward(gradient, *roi_arguments())


# -- label maps


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("boundary_mask", (MAP, -1, True), "distance must be at least 1, got -1"),
        ("boundary_mask", (MAP[0], 1, True), r"labels must be \[N, H, W\], got \[5, 6\]"),
        ("confusion_matrix", (MAP[:1], MAP, 3, -1), r"of one dtype, got \[1, 5, 6\]"),
        ("confusion_matrix", (MAP.byte(), MAP, 3, -1), "of one dtype"),
        ("upsample_confusion", (torch.zeros(3, 3, 4, 4), MAP, -1), r"and target \[N, H, W\]"),
        ("upsample_confusion", (torch.zeros(2, 3, 4, 4), MAP[0], -1), r"and target \[N, H, W\]"),
    ],
)
def test_label_maps_without_their_wrapper(operators, name, arguments, message):
    """Else they would be read past their end."""
    with pytest.raises(ValueError, match=message):
        getattr(operators, name)(*arguments)


# -- dense_crf


def crf_scene(h=9, w=13):
    return torch.randn(1, 3, h, w), torch.randint(0, 256, (1, 3, h, w), dtype=torch.uint8)


@pytest.mark.parametrize("iterations", [-1, 10_001, 2**31, 2**32, 2**32 + 1])
def test_iterations_have_a_bound(iterations):
    with pytest.raises(ValueError, match=f"iterations must be 0 to 10000, got {iterations}"):
        ops.dense_crf(*crf_scene(), iterations=iterations)


def test_iterations_are_an_integer():
    unary, image = crf_scene()
    with pytest.raises(ValueError, match=r"iterations must be an integer, got 1\.5"):
        ops.dense_crf(unary, image, iterations=1.5)
    expected = ops.dense_crf(unary, image, iterations=2)
    assert torch.equal(ops.dense_crf(unary, image, iterations=np.int64(2)), expected)


@pytest.mark.parametrize("iterations", [2**31, 2**32, 2**32 + 1])
def test_iterations_are_not_cut_to_32_bits(operators, iterations):
    unary, image = crf_scene()
    kernel = (image.float(), torch.ones(1), None, [2], [-1, -2], [3.0, 3.0])
    options = (iterations, 1, True, *QUALITY["default"])
    with pytest.raises(ValueError, match="iterations must be an integer of 32 bits"):
        operators.dense_crf(unary, *kernel, *options)
    with pytest.raises(ValueError, match="iterations must be an integer of 32 bits"):
        operators._dense_crf_backward(unary, unary, *kernel, *options)


def test_no_iterations_build_no_lattice(operators):
    """Such a sigma could not be built: its lattice has too many cells."""
    unary, image = crf_scene()
    kernel = (image.float(), torch.ones(1), None, [3], [-1, -2, 0], [1e-9, 1e-9, 1e-9])
    q = operators.dense_crf(unary, *kernel, 0, 1, True, *QUALITY["default"])
    torch.testing.assert_close(q, torch.softmax(-unary, 1))
    gradient = torch.randn(unary.shape)
    grads = operators._dense_crf_backward(gradient, unary, *kernel, 0, 1, True, *QUALITY["default"])
    leaf = unary.clone().requires_grad_()
    torch.softmax(-leaf, 1).backward(gradient)
    torch.testing.assert_close(grads[0], leaf.grad)
    assert grads[1].tolist() == [0.0]


@pytest.mark.parametrize("classes", [1, 3, 4, 5, 17])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (70, 1), (129, 2), (130, 17)])
def test_narrow_images_in_double(classes, height, width):
    """Energies of few pixels in a row are shorter than the vectors that read them."""
    unary = torch.randn(1, classes, height, width, dtype=torch.float64)
    image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    q = ops.dense_crf(unary, image, iterations=3)
    single = ops.dense_crf(unary.float(), image, iterations=3)
    assert (q - single).abs().mean() < 1e-5
    torch.testing.assert_close(q.sum(1), torch.ones(1, height, width, dtype=torch.float64))


def test_kept_lattices_check_what_they_get():
    features, weights = torch.rand(1, 2, 6, 7), torch.ones(1)
    build = torch.ops.pyseg._dense_crf_lattice
    number = build(features, weights, [2], [0, 1], [1.0, 1.0], 1, 1, 0.25)
    for q in (torch.zeros(1, 3, 7, 6), torch.zeros(3, 6, 7), torch.zeros(1, 3, 6, 7).double()):
        with pytest.raises(ValueError, match=r"q must be \[1, C, 6, 7\] float32"):
            torch.ops.pyseg._dense_crf_messages(q, number)
    torch.ops.pyseg._dense_crf_release(number)
    with pytest.raises(ValueError, match="there is no lattice"):
        torch.ops.pyseg._dense_crf_messages(torch.zeros(1, 3, 6, 7), number)
    with pytest.raises(ValueError, match=r"features must be \[1, F, H, W\] float32"):
        build(features.double(), weights.double(), [2], [0, 1], [1.0, 1.0], 1, 1, 0.25)


# -- panoptic_quality


def quality_arguments(**changes):
    ids = torch.tensor([[1, 1, 2], [0, 2, 2]], dtype=torch.int32)
    arguments = {
        "prediction": ids,
        "target": ids.clone(),
        "prediction_segments": torch.tensor([[1, 0], [2, 1]]),
        "target_segments": torch.tensor([[1, 0, 2, 0], [2, 1, 3, 0]]),
        "num_classes": 2,
        "prediction_boundary": None,
        "target_boundary": None,
    }
    return tuple({**arguments, **changes}.values())


SHAPES = [
    ({"prediction": torch.zeros(2, 2, dtype=torch.int32)}, r"must both be \[H, W\] int32"),
    ({"prediction": torch.zeros(2, 3, dtype=torch.int64)}, r"must both be \[H, W\] int32"),
    ({"target": torch.zeros(2, 3, dtype=torch.uint8)}, r"must both be \[H, W\] int32"),
    ({"prediction_segments": torch.zeros(2, 4).long()}, r"prediction_segments must be \[P, 2\]"),
    ({"prediction_segments": torch.zeros(2, 2)}, r"prediction_segments must be \[P, 2\]"),
    ({"target_segments": torch.zeros(2, 2).long()}, r"target_segments must be \[T, 4\]"),
    ({"target_segments": torch.zeros(4).long()}, r"target_segments must be \[T, 4\]"),
    ({"num_classes": -1}, "num_classes must not be negative"),
    ({"target_boundary": torch.zeros(2, 3, dtype=torch.bool)}, "give both"),
    (
        {
            "prediction_boundary": torch.zeros(2, 2, dtype=torch.bool),
            "target_boundary": torch.zeros(2, 3, dtype=torch.bool),
        },
        "boundaries must be bool",
    ),
]


@pytest.mark.parametrize(("changes", "message"), SHAPES)
def test_panoptic_quality_without_its_wrapper(operators, changes, message):
    with pytest.raises(ValueError, match=message):
        operators.panoptic_quality(*quality_arguments(**changes))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[2, 1, 3, 0], [1, 0, 2, 0]], "ids of segments must rise"),
        ([[70000, 0, 2, 0], [2, 1, 3, 0]], "ids of segments must rise"),
        ([[0, 0, 2, 0], [2, 1, 3, 0]], "ids of segments must rise"),
        ([[1, 0, 2, 0], [2**31, 1, 3, 0]], "ids of segments must rise"),
        ([[1, 0, 2, 0], [2, 2, 3, 0]], "segment 2 has class 2"),
        ([[1, -1, 2, 0], [2, 1, 3, 0]], "segment 1 has class -1"),
        ([[1, 0, 2**62, 0], [2, 1, 3, 0]], "segment 1 has an area"),
    ],
)
def test_segments_without_the_wrapper(rows, message):
    arguments = quality_arguments(target_segments=torch.tensor(rows))
    with pytest.raises(ValueError, match=message):
        torch.ops.pyseg.panoptic_quality(*arguments)


def test_classes_out_of_range_stay_inside_on_the_device(emulated):
    """The device does not wait to report them; they must not be written beyond the counts."""
    rows = torch.tensor([[1, 10**9, 2, 0], [2, -5, 3, 0]])
    counts, _ = emulated.panoptic_quality(*quality_arguments(target_segments=rows))
    assert counts.shape == (2, 4) and int(counts[:, :3].sum()) <= 4


# -- boundary_match


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(1, 4, 5).byte()}, r"must both be \[N, H, W\] of one dtype"),
        ({0: torch.zeros(1, 4, 4).long()}, r"must both be \[N, H, W\] of one dtype"),
        (
            {0: torch.zeros(4, 4).byte(), 1: torch.zeros(4, 4).byte()},
            r"must both be \[N, H, W\] of one dtype",
        ),
        ({2: 0}, "num_classes must be 1 to 4096"),
        ({2: 2**32 + 5}, "num_classes must be 1 to 4096"),
        ({3: -1}, "squared_radius must be"),
        ({3: 2**62}, "squared_radius must be"),
    ],
)
def test_boundary_match_without_its_wrapper(operators, change, message):
    arguments = [torch.zeros(1, 4, 4).byte(), torch.zeros(1, 4, 4).byte(), 3, 4, 255]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        operators.boundary_match(*arguments)


# -- deform_conv2d


@pytest.mark.parametrize(
    "pairs",
    [
        ([2**32 + 1, 1], [0, 0], [1, 1]),
        ([1, 1], [2**32, 0], [1, 1]),
        ([1, 1], [0, 0], [1, 2**32 + 1]),
        ([1, 1], [0, 0], [2**31 - 1, 1]),
        ([0, 1], [0, 0], [1, 1]),
        ([1, 1], [0, -1], [1, 1]),
    ],
)
def test_deform_conv2d_without_its_wrapper(operators, pairs):
    arguments = (torch.rand(1, 2, 6, 6), torch.zeros(1, 18, 4, 4), torch.rand(2, 2, 3, 3))
    with pytest.raises(ValueError, match=r"(stride|padding).*(dilation|size)"):
        operators.deform_conv2d(*arguments, None, None, *pairs)


# -- threads

SMALL_INPUTS = """
import os, torch
from pyseg import ops

torch.set_num_threads(4)
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
boxes = [torch.tensor([[0.0, 0, 4, 4], [1, 1, 3, 3], [0, 2, 3, 4]])]
for mode in ("avg", "max"):
    input = torch.rand(1, 8, 5, 5, requires_grad=True)
    ops.roi_align(input, boxes, 2, mode=mode).sum().backward()
image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
unary = torch.rand(1, 5, 16, 16, requires_grad=True)
ops.dense_crf(unary, image, iterations=2).sum().backward()
input, offset = torch.rand(1, 4, 5, 5, requires_grad=True), torch.zeros(1, 18, 3, 3)
ops.deform_conv2d(input, offset, torch.rand(4, 4, 3, 3)).sum().backward()
small = threads() - before
ops.roi_align(torch.rand(1, 256, 64, 64), [torch.rand(200, 4) * 64], 7)
print(small, threads() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_small_inputs_start_no_threads():
    small, large = map(int, run_python(SMALL_INPUTS, OMP_NUM_THREADS="4").split())
    # Backward runs in a thread of autograd's own where there is a device for it: none on the CPU.
    assert small == 0
    assert large >= 3


# -- arrays in the place of tensors

ARRAY = np.zeros((1, 4, 4, 4), np.float32)
LABELS = np.zeros((1, 4, 4), np.uint8)
TENSOR, TENSOR_LABELS = torch.from_numpy(ARRAY), torch.from_numpy(LABELS)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: ops.boundary_mask(LABELS, 1), "labels"),
        (lambda: ops.boundary_match(LABELS, TENSOR_LABELS, 3, 1), "prediction"),
        (lambda: ops.confusion_matrix(TENSOR_LABELS, LABELS, 3), "target"),
        (lambda: ops.confusion_counts(LABELS, LABELS, 3), "prediction"),
        (lambda: ops.deform_conv2d(TENSOR, ARRAY, TENSOR), "offset"),
        (lambda: ops.dense_crf(ARRAY, TENSOR), "unary"),
        (lambda: ops.dense_crf(TENSOR, ARRAY), "image"),
        (lambda: ops.dense_crf(TENSOR, TENSOR, compatibility=np.eye(4)), "compatibility"),
        (
            lambda: ops.dense_crf(TENSOR, TENSOR[:, :3], features=[(ARRAY, 1.0, 1.0)]),
            r"features\[0\]: tensor",
        ),
        (
            lambda: ops.panoptic_head(TENSOR, ARRAY, ARRAY, LABELS, num_stuff=1, size=(4, 4)),
            "masks",
        ),
        (
            lambda: ops.panoptic_merge(LABELS, TENSOR, TENSOR, TENSOR, stuff_classes=[0]),
            "masks",
        ),
        (
            lambda: ops.panoptic_merge(TENSOR_LABELS, TENSOR, TENSOR, LABELS, stuff_classes=[0]),
            "semantic",
        ),
        (lambda: ops.panoptic_quality(LABELS, LABELS, LABELS, LABELS, 3), "prediction"),
        (lambda: ops.roi_align(ARRAY, [torch.zeros(1, 4)], 2), "input"),
        (lambda: ops.roi_align(TENSOR, np.zeros((1, 5)), 2), "boxes"),
        (lambda: ops.roi_align(TENSOR, [np.zeros((1, 4))], 2), r"boxes\[0\]"),
        (
            lambda: ops.multi_scale_roi_align([TENSOR, ARRAY], [torch.zeros(1, 4)], 2, [1.0, 0.5]),
            r"levels\[1\]",
        ),
        (lambda: ops.roi_pool(ARRAY, [torch.zeros(1, 4)], 2), "input"),
        (lambda: ops.upsample_argmax(ARRAY, (8, 8)), "logits"),
    ],
)
def test_arrays_are_refused_by_name(call, name):
    message = rf"^{name} must be a torch\.Tensor, got numpy\.ndarray; .*torch\.from_numpy"
    with pytest.raises(TypeError, match=message):
        call()


def test_other_things_are_refused_by_name():
    with pytest.raises(TypeError, match=r"image must be a torch\.Tensor, got builtins\.NoneType"):
        ops.dense_crf(TENSOR, None)
