"""What the compilers make: the CPU library by clang, too, and the resources of CUDA kernels.

The other tests load what g++ makes. Each compiler takes what the other refuses, and vector types
are lowered differently by both.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "clang"
# Compiled CUDA sources and compiled Python are other code, and take long.
TESTS = "not emulated and not cuda and not compile and not opcheck"


def test_kernels_take_what_they_are_noted_to_take():
    """Shared memory within the limit, and no spills but those that are known."""
    if not list((ROOT / "pyseg").glob("_C_cu*.so")):
        pytest.skip("the CUDA library is not built here")
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "cuda_resources.py"], capture_output=True, text=True
    )
    if "no cuobjdump" in result.stderr:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr[-2000:]


def find_clang():
    names = ["clang++", *(f"clang++-{release}" for release in range(24, 13, -1))]
    return next(filter(None, map(shutil.which, names)), None)


@pytest.mark.slow
def test_clang():
    """It compiles every unit without a warning, and the ops' tests pass, at every SIMD level."""
    clang = find_clang()
    if clang is None:
        pytest.skip("no clang++ here: apt-get install clang")
    packages = FOLDER / "python"
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(packages)],
        cwd=ROOT,
        env={
            **os.environ,
            "CXX": clang,
            "CXXFLAGS": "-Wall -Werror",
            "PYSEG_CUDA": "0",
            "PYSEG_BUILD_DIR": str(FOLDER / "native"),
        },
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, (build.stdout + build.stderr)[-4000:]
    shutil.copytree(
        ROOT / "pyseg",
        packages / "pyseg",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
        dirs_exist_ok=True,
    )
    environment = {**os.environ, "PYTHONPATH": str(packages), "PYTHONSAFEPATH": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    loaded = subprocess.run(
        [sys.executable, "-c", "from pyseg import _native; print(_native.status()['cpu'])"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(loaded.stdout.strip()).is_relative_to(FOLDER)
    pytest_command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", TESTS]
    tests = subprocess.run(
        [sys.executable, *pytest_command, "tests/ops"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert tests.returncode == 0, tests.stdout[-4000:] + tests.stderr[-1000:]
    assert " passed" in tests.stdout
