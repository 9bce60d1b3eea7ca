"""What the emulation finds out about our kernels, beyond their results (see tests/ops).

A kernel whose blocks or threads depended on their order would give other bits for another seed.
Races within a block or between blocks, accesses out of range, undefined behaviour and results that
depend on fused products are found by variants (see `emulation.VARIANTS`), each in a process of its
own, because its run-time must come first. A dry run finds launches that a device would refuse.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch

import pyseg.ops  # noqa: F401  (defines the operators)

HERE = Path(__file__).resolve().parent

# A few small calls of every op: each should reach all of its kernels and their edges.
CASES = {
    "boundary_match": """
g = torch.Generator().manual_seed(0)
for classes, shape, dtype in [(4, (2, 9, 150), torch.uint8), (4000, (1, 20, 21), torch.int32)]:
    labels = torch.randint(0, 4, (2, *shape), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.02] = 4001  # some out of range, or void
    for radius in (0, 5):
        yield ops.boundary_match(*labels.to(dtype), classes, radius, 4001 % 256)
""",
    "boundary_mask": """
g = torch.Generator().manual_seed(0)
for shape, dtype, distance in [((2, 9, 1100), torch.uint8, 3), ((1, 40, 33), torch.int64, 12)]:
    labels = (torch.rand(shape, generator=g) < 0.01).to(dtype)
    for border in (True, False):
        yield ops.boundary_mask(labels, distance, border)
""",
    "confusion_matrix": """
g = torch.Generator().manual_seed(0)
for classes, shape, dtype in [(5, (2, 21, 830), torch.uint8), (110, (1, 9, 440), torch.int64)]:
    labels = torch.randint(-3, classes + 2, (2, *shape), generator=g)  # some out of range
    labels[:, :, :8] = 1  # flat
    yield ops.confusion_matrix(*labels.to(dtype), classes, 255)
yield ops.confusion_matrix(*labels[:, :, :1, :1].contiguous(), 1, -1)
""",
    "panoptic_head": """
g = torch.Generator().manual_seed(0)
for size, instances in [((6, 140), 3), ((9, 20), 258)]:
    boxes = torch.rand(2, instances, 4, generator=g) * 20 - 3
    boxes[..., 2:] += boxes[..., :2]
    labels = torch.randint(1, 4, (2, instances), generator=g)
    yield ops.panoptic_head(torch.randn(2, 4, 3, 5, generator=g),
                            torch.randn(2, instances, 3, 3, generator=g), boxes, labels, 2, *size)
""",
    "panoptic_merge": """
g = torch.Generator().manual_seed(0)
masks = torch.rand(2, 6, 5, 5, generator=g)
boxes = torch.rand(2, 6, 4, generator=g) * 30 - 5
boxes[..., 2:] += boxes[..., :2]
scores, labels = torch.rand(2, 6, generator=g) + 0.3, torch.randint(0, 9, (2, 6), generator=g)
semantic = torch.randint(0, 4, (2, 13, 41), generator=g)
parameters = [2, 0], 0.5, 0.6, 40, 0.5
yield ops.panoptic_merge(masks, boxes, scores, labels, semantic, *parameters)
masks = torch.rand(2, 6, 13, 41, generator=g) < torch.rand(2, 6, 1, 1, generator=g)
yield ops.panoptic_merge(masks, None, scores, labels, semantic.byte(), *parameters)
""",
    "panoptic_quality": """
g = torch.Generator().manual_seed(0)
for count, shape in [(4, (9, 700)), (150, (40, 300))]:
    maps = torch.randint(0, count + 1, (2, *shape), generator=g, dtype=torch.int32)
    maps[0] = maps[1].where(torch.rand(shape, generator=g) < 0.8, maps[0])
    ids = torch.arange(1, count + 1)
    truth = torch.stack([ids, ids % 3, torch.bincount(maps[1].flatten(), minlength=count + 1)[1:],
                         (ids % 5 == 0).long()], 1)
    yield ops.panoptic_quality(*maps, truth[:, :2].contiguous(), truth, 3, None, None)
    yield ops.panoptic_quality(*maps, truth[1:, :2].contiguous(), truth[:-1].contiguous(), 3,
                               *(maps % 3 > 0))
""",
    "deform_conv2d": """
g = torch.Generator().manual_seed(0)
for groups, offset_groups, channels, outputs, dtype in [(2, 3, 6, 4, torch.float32),
                                                        (1, 1, 35, 130, torch.bfloat16),
                                                        (1, 2, 18, 3, torch.float64)]:
    def randn(*shape):
        return torch.randn(shape, generator=g).to(dtype)
    tensors = [randn(2, channels, 5, 6), 3 * randn(2, 4 * offset_groups, 5, 7),
               randn(outputs, channels // groups, 1, 2)]
    mask = randn(2, 2 * offset_groups, 5, 7) if groups == 2 else None
    yield ops.deform_conv2d(*tensors, randn(outputs), mask, [1, 1], [0, 1], [1, 1])
    grad = randn(2, outputs, 5, 7)
    yield ops._deform_conv2d_backward(grad, *tensors, mask, [1, 1], [0, 1], [1, 1])
""",
    "roi_align": """
g = torch.Generator().manual_seed(0)
for mode, dtype in [(0, torch.float32), (1, torch.float64), (2, torch.bfloat16), (0, torch.half)]:
    levels = [torch.randn(2, 35, 11 - 4 * i, 9 - 2 * i, generator=g).to(dtype) for i in range(2)]
    if mode == 0:
        levels = [level.to(memory_format=torch.channels_last) for level in levels]
    wide = torch.promote_types(dtype, torch.float32)
    boxes = torch.rand(300 if mode == 0 else 5, 5, generator=g, dtype=wide) * 20 - 2
    boxes[:, 0] = torch.arange(len(boxes)) % 2
    boxes[-1, 0] = 2  # no such image
    options = [1.0, 0.5], [2, 17], 0 if mode else 1, True, mode, 8.0, 1
    pooled = ops.roi_align(levels, boxes, *options)
    yield pooled.nan_to_num()
    yield ops._roi_align_backward(torch.ones_like(pooled), levels, boxes, *options)
""",
    "upsample_argmax": """
g = torch.Generator().manual_seed(0)
for shape, size, dtype in [((2, 3, 3, 9), (26, 40), torch.float32),
                           ((1, 300, 2, 4), (3, 130), torch.bfloat16),
                           ((1, 3, 20, 9), (11, 5), torch.float64)]:
    logits = torch.randn(shape, generator=g).to(dtype)
    yield ops.upsample_argmax(logits, *size)
logits[0, 1, 3, 3] = torch.nan
yield ops.upsample_argmax(logits.to(memory_format=torch.channels_last), 40, 9)
""",
    "upsample_confusion": """
g = torch.Generator().manual_seed(0)
for shape, size, dtype in [((2, 3, 3, 9), (26, 140), torch.uint8),
                           ((1, 120, 2, 4), (3, 130), torch.int16),
                           ((1, 3, 20, 9), (11, 5), torch.int64)]:
    logits = torch.randn(shape, generator=g)
    target = torch.randint(0, shape[1] + 2, (shape[0], *size), generator=g).to(dtype)
    yield ops.upsample_confusion(logits, target, 1)
logits[0, 1, 3, 3] = torch.nan
yield ops.upsample_confusion(logits.half(), target, 255)
""",
    "dense_crf": """
g = torch.Generator().manual_seed(0)
features = 255 * torch.rand(2, 3, 17, 20, generator=g)
kernels = ([2, 5], [-1, -2, -1, -2, 0, 1, 2], [3.0, 3.0, 80.0, 80.0, 80.0, 80.0, 80.0])
for classes, compatibility, quality in [(5, None, (2, 0.2, 1)), (3, torch.eye(3), (1, 0.25, 0))]:
    unary = torch.randn(2, classes, 17, 20, generator=g)
    gradient = torch.randn(unary.shape, generator=g)
    for normalization, self_term in [(1, True), (2, True), (3, False)]:
        given = (unary, features, torch.tensor([3.0, 10.0]), compatibility, *kernels, 2,
                 normalization, self_term, *quality)
        yield ops.dense_crf(*given)
        if normalization > 1:
            yield ops._dense_crf_backward(gradient, *given)
""",
}
OPS = [source.stem for source in emulation.kernels()]


def test_every_kernel_has_a_case():
    assert set(OPS) == set(CASES) == set(LARGE), "add a case to both for a new .cu file"


def results(op, operators, table=CASES, names=()):
    """Every tensor that the op's cases of the table return."""
    scope = {"ops": operators, "torch": torch, **dict(names)}
    body = "".join(f"    {line}\n" for line in table[op].splitlines())
    exec(f"def cases():\n{body}", scope)
    outputs = []
    for output in scope["cases"]():
        outputs.extend(output if isinstance(output, tuple | list) else [output])
    return outputs


# More orders are `long`: what depends on one is a race, which "thread" and "blocks" find in any.
@pytest.mark.parametrize("seeds", [[0], pytest.param([1, 2, 3], marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_order_of_blocks_and_threads_does_not_matter(op, seeds):
    operators = emulation.operators()
    expected = results(op, operators)
    for seed in seeds:
        with emulation.settings(seed=seed):
            for got, want in zip(results(op, operators), expected, strict=True):
                assert torch.equal(got, want), f"seed {seed}"


class Recorder:
    """Operators that note what they are called with."""

    def __init__(self, operators):
        self.operators, self.calls = operators, []

    def __getattr__(self, name):
        operator = getattr(self.operators, name).default

        def call(*arguments):
            self.calls.append((operator, arguments))
            return operator(*arguments)

        return call


def to_meta_one_by_one(arguments):
    """The arguments with one tensor moved elsewhere, for each tensor of them and of their lists."""
    for i, argument in enumerate(arguments):
        moved = []
        if isinstance(argument, torch.Tensor):
            moved = [argument.to("meta")]
        elif isinstance(argument, list):
            parts = to_meta_one_by_one(argument)
            moved = [list(part) for part in parts]
        for other in moved:
            yield (*arguments[:i], other, *arguments[i + 1 :])


@pytest.mark.parametrize("op", OPS)
def test_a_tensor_elsewhere_is_refused(op):
    """A kernel that follows a pointer to the host's memory would lose the process its GPU."""
    recorder = Recorder(emulation.operators())
    results(op, recorder)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # as if all tensors were there
    tried = 0
    for operator, arguments in recorder.calls:
        cases = list(to_meta_one_by_one(arguments))
        for case in cases if len(cases) > 1 else []:
            tried += 1
            with pytest.raises(ValueError, match=r"must be on (one device|the CPU)"):
                operator.redispatch(keys, *case)
    assert tried or op in ("boundary_mask", "upsample_argmax")  # of one tensor


@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(op):
    """Kernels of torch that an op calls would otherwise answer in another dtype than it reads."""
    operators = emulation.operators()
    expected = results(op, operators)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got, want in zip(results(op, operators), expected, strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


# Shapes at which an index, a grid or an amount of shared memory may become too large. `empty` takes
# no memory until it is written to, and in a dry run nothing is.
LARGE = {
    "boundary_mask": """
for shape in [(1, 8192, 8192), (70000, 3, 5), (1, 300000, 40), (1, 40, 400000)]:
    for distance in (1, 90):
        yield ops.boundary_mask(empty(shape, torch.uint8), distance, True)
""",
    "boundary_match": """
for shape in [(1, 8192, 8192), (70000, 3, 5), (1, 300000, 40), (1, 40, 300000)]:
    for classes, squared_radius in ((2, 0), (4096, 4095**2)):
        labels = empty(shape, torch.uint8)
        yield ops.boundary_match(labels, labels, classes, squared_radius, 255)
""",
    "confusion_matrix": """
for shape, classes in [((1, 16384, 16384), 19), ((70000, 3, 5), 9), ((2, 300000, 4), 4096)]:
    labels = empty(shape, torch.uint8)
    yield ops.confusion_matrix(labels, labels, classes, 255)
""",
    "panoptic_head": """
for low, size in [((2048, 2048), (8192, 8192)), ((9, 9), (300000, 40)), ((300000, 4), (300000, 8))]:
    yield ops.panoptic_head(empty((1, 150, *low)), empty((1, 1000, 28, 28)), empty((1, 1000, 4)),
                            empty((1, 1000), torch.int64), 90, *size)
yield ops.panoptic_head(empty((70000, 2, 1, 1)), empty((70000, 1, 2, 2)), empty((70000, 1, 4)),
                        empty((70000, 1), torch.int64), 1, 2, 2)
""",
    "panoptic_merge": """
for images, instances, size in [(1, 300, (8192, 8192)), (2, 5000, (300, 400)), (70000, 3, (3, 5)),
                                (1, 2, (300000, 40))]:
    scores, labels = empty((images, instances)), empty((images, instances), torch.int64)
    semantic = empty((images, *size), torch.uint8)
    parameters = [list(range(512)), 0.5, 0.5, 4096, 0.5]
    yield ops.panoptic_merge(empty((images, instances, *size), torch.bool), None, scores, labels,
                             semantic, *parameters)
    yield ops.panoptic_merge(empty((images, instances, 28, 28)), empty((images, instances, 4)),
                             scores, labels, semantic, *parameters)
""",
    "panoptic_quality": """
for shape, segments in [((16384, 16384), 100), ((4, 5), 8000), ((300000, 40), 1)]:
    maps, edges = empty((2, *shape), torch.int32), empty((2, *shape), torch.bool)
    ids = torch.arange(1, segments + 1)
    lists = torch.stack([ids, ids], 1), torch.stack([ids, ids, ids, 0 * ids], 1)
    yield ops.panoptic_quality(*maps, *lists, segments + 1, *edges)
""",
    "upsample_argmax": """
for shape, size in [((1, 256, 1024, 1024), (8192, 8192)), ((70000, 3, 2, 2), (4, 4)),
                    ((1, 3, 300000, 4), (300000, 9)), ((1, 2, 4, 4), (40, 300000))]:
    for dtype in (torch.float32, torch.float16):
        yield ops.upsample_argmax(empty(shape, dtype), *size)
""",
    "upsample_confusion": """
for shape, size in [((1, 256, 1024, 1024), (8192, 8192)), ((70000, 3, 2, 2), (4, 4)),
                    ((1, 3, 300000, 4), (300000, 9)), ((1, 2, 4, 4), (40, 300000))]:
    yield ops.upsample_confusion(empty(shape), empty((shape[0], *size), torch.uint8), 255)
""",
    "deform_conv2d": """
for images, size in [(1, (1024, 2048)), (1, (300000, 8)), (70000, (2, 3))]:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [empty((images, 1, *size), dtype), empty((images, 2, *size), dtype),
                   empty((1, 1, 1, 1), dtype)]
        geometry = [1, 1], [0, 0], [1, 1]
        yield ops.deform_conv2d(*tensors, empty((1,), dtype), None, *geometry)
        grad = empty((images, 1, *size), dtype)
        yield ops._deform_conv2d_backward(grad, *tensors, None, *geometry)
""",
    "roi_align": """
for shape, boxes in [((1, 256, 2048, 2048), 1000), ((2, 8, 16, 16), 70000), ((70000, 8, 2, 2), 5)]:
    for output in ([7, 7], [1, 300]):
        levels, given = [empty(shape)], empty((boxes, 5))
        options = [1.0], output, 2, True, 0, 8.0, 1
        yield ops.roi_align(levels, given, *options)
        grad = empty((boxes, shape[1], *output))
        yield ops._roi_align_backward(grad, levels, given, *options)
""",
    "dense_crf": """
for images, size, classes in [(1, (1024, 2048), 19), (1, (3000, 4000), 2), (70, (60, 80), 256)]:
    unary, features = empty((images, classes, *size)), empty((images, 3, *size))
    kernels = ([2, 5], [-1, -2, -1, -2, 0, 1, 2], [3.0, 3.0, 80.0, 80.0, 80.0, 80.0, 80.0])
    yield ops.dense_crf(unary, features, empty((2,)), None, *kernels, 2, 2, True, 1, 0.2, 1)
""",
}


@pytest.mark.parametrize("op", OPS)
def test_large_shapes_can_be_launched(op):
    def empty(shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype)

    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # which would fill what is empty
    try:
        with emulation.settings(dry_run=1, capturing=1):  # nothing waits for numbers of the device
            assert results(op, emulation.operators(), LARGE, {"empty": empty})
    finally:
        torch.use_deterministic_algorithms(deterministic)


def test_a_launch_that_the_device_refuses_fails_in_a_dry_run(tmp_path):
    """As boundary_mask would be, had it no loop over 65535 rows at a time."""
    right = "std::min<int64_t>(65535, window.height - top)"
    mistaken = mistaken_copy(tmp_path, "boundary_mask", right, "window.height - top")
    result = run_variant("plain", mistaken, "boundary_mask", cases="LARGE", dry_run=1)
    assert "grid too large for the device" in result.stderr, result.stderr[-4000:]


RUN = """
import os, sys
sys.path.insert(0, {here!r})
import torch
import pyseg.ops, emulation
torch.set_num_threads(1)
emulation.load([__import__("pathlib").Path({source!r})], {variant!r})
import test_emulation
test_emulation.results({op!r}, torch.ops.pyseg_emulated, test_emulation.{cases},
                       {{"empty": lambda shape, dtype=None: torch.empty(shape, dtype=dtype)}})
print("finished")
"""


def environment(variant):
    """Of a process that loads the variant, and the command that has to come first."""
    if variant in ("plain", "blocks"):
        return dict(os.environ), []
    # ThreadSanitizer cannot place its shadow memory under the address randomisation of new kernels.
    prefix = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    return emulation.sanitizer_environment(variant), prefix


def run_variant(variant, source, op, cases="CASES", **settings):
    script = RUN.format(here=str(HERE), source=str(source), variant=variant, op=op, cases=cases)
    variables, prefix = environment(variant)
    variables |= {f"CUDA_EMULATION_{key.upper()}": str(value) for key, value in settings.items()}
    command = [*prefix, sys.executable, "-c", script]
    return subprocess.run(command, text=True, capture_output=True, env=variables)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("variant", ["thread", "blocks"])
def test_variants_accept_our_kernels(variant, op):
    """The other one, "address", runs more than these cases: see below."""
    result = run_variant(variant, emulation.ROOT / "csrc" / op / f"{op}.cu", op)
    assert result.returncode == 0 and "finished" in result.stdout, result.stderr[-4000:]
    assert "Sanitizer" not in result.stderr, result.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_contraction_changes_no_result(op):
    """The tests of the op with products and sums fused, as by nvcc, and under the sanitizers."""
    variables, prefix = environment("address")
    variables["PYSEG_EMULATED_VARIANT"] = "address"
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-x"]
    command += ["-p", "no:cacheprovider", "-m", "not gpu and not slow", "-k", "emulated"]
    command += [str(emulation.ROOT / "tests" / "ops" / f"test_{op}.py")]
    result = subprocess.run(command, text=True, capture_output=True, env=variables)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


# A copy of a kernel with a mistake in it shows that the checks above can fail.
MISTAKES = {
    "thread": (
        "confusion_matrix",
        "atomicAdd(table + row * width + column, amount);",
        "table[row * width + column] += amount;",
        ["data race", "confusion_matrix.cu"],
    ),
    "blocks": (
        "confusion_matrix",
        "add_to_image(out, image, classes, cell / width, cell % width, total);",
        "out.missed[image * classes] += total;",
        ["race between blocks", "confusion_matrix.cu"],
    ),
    "address": (
        "upsample_argmax",
        "if (y + r < end)",
        "",
        ["buffer-overflow", "upsample_argmax.cu"],
    ),
}


def mistaken_copy(folder, op, right, wrong):
    source = (emulation.ROOT / "csrc" / op / f"{op}.cu").read_text()
    assert right in source
    home = emulation.ROOT / "csrc" / op
    source = re.sub(r'#include "(.+)"', rf'#include "{home}/\1"', source.replace(right, wrong))
    mistaken = folder / f"mistaken_{op}.cu"
    mistaken.write_text(source)
    return mistaken


@pytest.mark.slow
@pytest.mark.parametrize("variant", MISTAKES)
def test_variants_find_a_mistake(variant, tmp_path):
    op, right, wrong, messages = MISTAKES[variant]
    result = run_variant(variant, mistaken_copy(tmp_path, op, right, wrong), op)
    for message in messages:
        assert message in result.stderr, result.stderr[-4000:]
