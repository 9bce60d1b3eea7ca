"""What the emulation finds out about our kernels, beyond their results (see tests/ops).

A kernel whose blocks or threads depended on their order would give other bits for another seed; a
race within a block or an access out of range is reported by a sanitizer, in a process of its own,
because its run-time must come first.
"""

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
for classes, shape, dtype in [(5, (2, 5, 430), torch.uint8), (110, (1, 9, 40), torch.int64)]:
    labels = torch.randint(-3, classes + 2, (2, *shape), generator=g)  # some out of range
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
    assert set(OPS) == set(CASES), "add a case to CASES for a new .cu file"


def results(op, operators):
    """Every tensor that the op's cases return."""
    scope = {"ops": operators, "torch": torch}
    body = "".join(f"    {line}\n" for line in CASES[op].splitlines())
    exec(f"def cases():\n{body}", scope)
    outputs = []
    for output in scope["cases"]():
        outputs.extend(output if isinstance(output, tuple | list) else [output])
    return outputs


@pytest.mark.parametrize("seeds", [[0], pytest.param([1, 2, 3], marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_order_of_blocks_and_threads_does_not_matter(op, seeds):
    operators = emulation.operators()
    expected = results(op, operators)
    for seed in seeds:
        with emulation.settings(seed=seed):
            for got, want in zip(results(op, operators), expected, strict=True):
                assert torch.equal(got, want), f"seed {seed}"


SANITIZED = """
import sys
from pathlib import PosixPath
sys.path.insert(0, {here!r})
import torch
import pyseg.ops, emulation
torch.set_num_threads(1)
emulation.load([{source!r}], sanitizer={which!r})
import test_emulation
test_emulation.results({op!r}, torch.ops.pyseg_emulated)
print("finished")
"""


def run_sanitized(which, source, op):
    script = SANITIZED.format(here=str(HERE), source=source, which=which, op=op)
    # ThreadSanitizer cannot place its shadow memory under the address randomisation of new kernels.
    prefix = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*prefix, sys.executable, "-c", script],
        text=True,
        capture_output=True,
        env=emulation.sanitizer_environment(which),
    )


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("which", ["address", "thread"])
def test_sanitizers_accept_our_kernels(which, op):
    result = run_sanitized(which, emulation.ROOT / "csrc" / op / f"{op}.cu", op)
    assert result.returncode == 0 and "finished" in result.stdout, result.stderr[-4000:]
    assert "Sanitizer" not in result.stderr, result.stderr[-4000:]


# A copy of a kernel with a mistake in it shows that the checks above can fail.
MISTAKES = {
    "thread": (
        "confusion_matrix",
        "atomicAdd(table + row * width + column, length);",
        "table[row * width + column] += length;",
        "data race",
    ),
    "address": ("upsample_argmax", "if (y + r < end)", "", "buffer-overflow"),
}


@pytest.mark.slow
@pytest.mark.parametrize("which", MISTAKES)
def test_sanitizers_find_a_mistake(which, tmp_path):
    op, right, wrong, message = MISTAKES[which]
    folder = emulation.ROOT / "csrc" / op
    source = (folder / f"{op}.cu").read_text()
    assert right in source
    source = re.sub(r'#include "(.+)"', rf'#include "{folder}/\1"', source.replace(right, wrong))
    mistaken = tmp_path / f"mistaken_{op}.cu"
    mistaken.write_text(source)
    result = run_sanitized(which, mistaken, op)
    assert message in result.stderr and f"{op}.cu" in result.stderr, result.stderr[-4000:]
