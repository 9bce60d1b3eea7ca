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
    if result.stderr.startswith(("no cuobjdump", "no c++filt")):
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.skipif(not shutil.which("c++filt"), reason="no c++filt")
@pytest.mark.parametrize(
    ("kernel", "usage", "message"),
    [
        ("mark_kernel", "REG:32 STACK:0 SHARED:1024 LOCAL:0", ""),
        ("mark_kernel", "REG:32 STACK:8 SHARED:1024 LOCAL:0", "8 bytes of local memory"),
        ("locate_kernel", "REG:32 STACK:0 SHARED:2048 LOCAL:0", ""),
        ("locate_kernel", "REG:32 STACK:0 SHARED:2049 LOCAL:0", "of 64 KB that it may have"),
        ("combine_kernel", "REG:32 STACK:0 SHARED:47104 LOCAL:0", "of 48 KB that it may have"),
    ],
)
def test_too_much_of_a_multiprocessor_is_found(tmp_path, kernel, usage, message):
    """What cuobjdump would print of such a kernel."""
    (tmp_path / "text").write_text(f" Function {kernel}:\n  {usage} CONSTANT[0]:400\n")
    (tmp_path / "cuobjdump").write_text(f"#!/bin/sh\ncat {tmp_path}/text\n")
    (tmp_path / "cuobjdump").chmod(0o755)
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "cuda_resources.py", tmp_path / "text"],
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert kernel in result.stdout
    assert result.returncode == bool(message) and message in result.stderr, result.stderr


def find_clang():
    names = ["clang++", *(f"clang++-{release}" for release in range(24, 13, -1))]
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def clang():
    """Runs Python with the package that clang compiled, every unit without a warning."""
    compiler = find_clang()
    if compiler is None:
        pytest.skip("no clang++ here: apt-get install clang")
    packages = FOLDER / "python"
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(packages)],
        cwd=ROOT,
        env={
            **os.environ,
            "CXX": compiler,
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
    path = os.pathsep.join([str(packages), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    loaded = run("-c", "from pyseg import _native; print(_native.status()['cpu'])")
    assert Path(loaded.stdout.strip()).is_relative_to(FOLDER), loaded.stderr[-2000:]
    return run


def passes(clang, *selection):
    found = clang("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *selection)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-1000:]
    assert " passed" in found.stdout


@pytest.mark.slow
def test_clang(clang):
    """Every op against its references at every SIMD level, and nothing through the stack."""
    fuzz = clang("-m", "tests.fuzz", "--cases", "3000", "--jobs", "1")
    assert fuzz.returncode == 0, fuzz.stdout[-6000:] + fuzz.stderr[-2000:]
    files = [f"tests/ops/test_{name}.py" for name in ("simd_levels", "dense_crf")]
    passes(clang, *files, "-k", f"(test_simd_levels or hot_loops) and {TESTS}")


@pytest.mark.long  # of the same code that test_clang runs, and as long again as all of those tests
def test_clang_passes_the_tests_of_the_ops(clang):
    passes(clang, "tests/ops", "-k", TESTS)
