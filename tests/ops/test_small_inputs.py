"""Inputs of a few hundred numbers start no threads: waking them takes longer than the work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The calls are those that benchmarks/contention.py times.
CODE = """
import importlib.util, os, sys
import torch

spec = importlib.util.spec_from_file_location("contention", "benchmarks/contention.py")
contention = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contention)
threads = lambda: len(os.listdir("/proc/self/task"))
calls = contention.make_small_calls()
torch.set_num_threads(4)
before = threads()
for name, call in calls.items():
    call()
    if threads() != before:
        print(name, "started", threads() - before)
        before = threads()
contention.ops.boundary_mask(torch.zeros(4, 512, 512, dtype=torch.uint8), 3)
print("at last", threads() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="outside the source tree")
def test_no_op_starts_threads():
    result = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), **os.environ, "OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "at last 3\n", result.stdout + result.stderr[-2000:]
