"""Fixtures of the op tests. A test that asks for ``device`` runs on the GPU and emulated."""

import functools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pyseg.ops  # noqa: F401  (defines the operators)
from pyseg import _native

EMULATION = Path(__file__).resolve().parents[1] / "emulation"


@pytest.fixture(scope="session")
def emulated():
    """The operators of the .cu files compiled for the CPU; small inputs only."""
    if not EMULATION.is_dir():
        pytest.skip("outside the source tree: no csrc/ to compile for the CPU")
    sys.path.insert(0, str(EMULATION))
    import emulation

    return emulation.operators()


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "emulated"])
def device(request):
    """``device.ops`` holds the operators, ``device.name`` is where their tensors live."""
    if request.param == "emulated":
        return SimpleNamespace(ops=request.getfixturevalue("emulated"), name="cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    problem = _native.status()["cuda_problem"]
    if problem:
        pytest.skip(problem)
    return SimpleNamespace(ops=torch.ops.pyseg, name="cuda")


@pytest.fixture(autouse=True)
def poisoned_tensors():
    """new_empty() then holds NaN or the largest integer instead of a lucky zero."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def generator():
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")  # shown where the test fails
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def compiler(request):
    """``compiler(f)`` is ``torch.compile`` of all of f: traced only, or turned into code too."""
    torch.compiler.reset()
    return functools.partial(torch.compile, fullgraph=True, backend=request.param)
