"""The fuzzer finds nothing, and finds what is planted.

Every run is a process of its own: the fuzzer forks, which needs one without threads.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), **os.environ},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    "arguments",
    [["--seed", "13", "--cases", "2000"], ["--cases", "2000"]],
    ids=["the same cases every time", "fresh cases"],
)
def test_nothing_is_found(arguments):
    code = f"import sys; from tests.fuzz.__main__ import main; sys.exit(main({arguments!r}))"
    result = python(code)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


# Faults as they are made: each is an op of pyseg.ops wrapped, and what the report must say.
PLANTED = """
import contextlib, ctypes, io, re, sys, time
import torch
from pyseg import ops
from tests.fuzz import __main__ as fuzz


def off_by_one(op, labels, distance, border=True):
    return op(labels, distance + (1 if 1 < distance < 2**60 else 0), border)

def strides_ignored(op, logits, size):
    flat = (logits if logits._base is None else logits._base).reshape(-1)
    if isinstance(logits, torch.Tensor) and 0 < logits.numel() <= len(flat):
        logits = flat[: logits.numel()].reshape(logits.shape)
    return op(logits, size)

def nan_is_lowest(op, logits, size):
    if logits.is_floating_point():
        logits = torch.where(logits.isnan(), -torch.inf, logits)
    return op(logits, size)

def labels_clipped(op, prediction, target, num_classes, ignore_index=255):
    return op(prediction.clamp(0, num_classes - 1), target, num_classes, ignore_index)

def half_a_pixel(op, input, boxes, output_size, *, aligned=False, **options):
    return op(input, boxes, output_size, aligned=not aligned, **options)

def gradient_of_99_percent(op, **arguments):
    result = op(**arguments)
    return result - 0.01 * (result - result.detach())

def ties_in_other_order(op, masks, scores, labels, semantic, *, boxes=None, **options):
    merged = op(masks, scores - 1e-3 * torch.arange(scores.shape[-1]).flip(-1), labels, semantic,
                boxes=boxes, **options)
    return merged._replace(scores=scores)

def one_more_iteration(op, unary, image, *, iterations, **options):
    return op(unary, image, iterations=iterations + 1, **options)

def reads_past_the_end(op, labels, distance, border=True):
    if isinstance(labels, torch.Tensor) and labels.is_contiguous():
        ctypes.string_at(labels.data_ptr() + labels.nbytes, 8)
    return op(labels, distance, border)

def writes_its_input(op, prediction, target, *arguments):
    result = op(prediction, target, *arguments)
    target += 1
    return result

def loops(op, labels, distance, border=True):
    while distance == 3:
        pass
    return op(labels, distance, border)

def waits(op, labels, distance, border=True):
    if distance == 3:
        time.sleep(100)
    return op(labels, distance, border)

def depends_on_threads(op, labels, distance, border=True):
    mask = op(labels, distance, border)
    return mask if torch.get_num_threads() == 1 or not len(mask) else ~mask

def accepts_anything(op, **arguments):
    try:
        return op(**arguments)
    except ValueError:
        return None

def names_nothing(op, *arguments, **named):
    try:
        return op(*arguments, **named)
    except ValueError as error:
        raise ValueError("an argument is wrong") from error


def check(fault, name, group, message):
    op = getattr(ops, name)

    def planted(*arguments, **named):
        try:
            return fault(op, *arguments, **named)
        except (AttributeError, TypeError):  # arguments that the op is to refuse
            return op(*arguments, **named)

    planted.__name__ = name
    setattr(ops, name, planted)
    def run(arguments):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            return fuzz.main(arguments), output.getvalue()
    status, text = run(["--seed", "5", "--op", group, "--cases", "600", "--stop", "--jobs", "1"])
    line = re.search(r"python -m tests.fuzz (--seed 5 --op \\w+ --case \\d+ --level \\w+)", text)
    if status != 1 or not line or not re.search(message, text):
        print(f"{fault.__name__} is not found: {text}")
    elif run(line[1].split())[0] != 1:
        print(f"{fault.__name__} is not found again by {line[1]}")
    setattr(ops, name, op)
    if run(line[1].split())[0] != 0:
        print(f"without {fault.__name__} there is another fault: {line[1]}")


fuzz.PATIENCE, fuzz.WAITING = 2.0, 4
check(off_by_one, "boundary_mask", "boundary_mask", "pixels are wrong")
check(strides_ignored, "upsample_argmax", "upsample_argmax", "labels, first at")
check(nan_is_lowest, "upsample_argmax", "upsample_argmax", "labels, first at")
check(labels_clipped, "confusion_matrix", "confusion_matrix", "is accepted|is wrong")
check(half_a_pixel, "roi_align", "roi_align", "roi_align: .* differ")
check(gradient_of_99_percent, "deform_conv2d", "deform_conv2d", "the gradient of")
check(ties_in_other_order, "panoptic_merge", "panoptic_merge", "the table is|map are wrong")
check(one_more_iteration, "dense_crf", "dense_crf", "differ|float64 gives others")
check(reads_past_the_end, "boundary_mask", "boundary_mask", "died of SIG")
check(writes_its_input, "boundary_match", "boundary_match", "changed an input")
check(loops, "boundary_mask", "boundary_mask", "no end within 2 s")
check(waits, "boundary_mask", "boundary_mask", "no end within 2 s")
check(depends_on_threads, "boundary_mask", "boundary_mask", "number of threads|wrong")
check(accepts_anything, "panoptic_quality", "panoptic_quality", "a wrong \\\\w+ is accepted")
check(names_nothing, "panoptic_head", "panoptic_head", "does not name")
print("done")
"""


def test_planted_faults_are_found():
    result = python(PLANTED)
    assert result.stdout == "done\n", result.stdout[-4000:] + result.stderr[-2000:]
