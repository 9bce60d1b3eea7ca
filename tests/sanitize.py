"""The CPU kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and ThreadSanitizer.

    python tests/sanitize.py            everything, at every SIMD level of the processor
    python tests/sanitize.py --quick    fewer tests and cases: what CI runs on every change
    python tests/sanitize.py asan       one of the two: asan, tsan

The library is built by setup.py with the sanitizer's flags in build/sanitize/, from the same units
as the ordinary one, and loaded by a copy of the package there. Python and torch are not
instrumented; the sanitizer's library is preloaded into them. In both builds work of any size is
shared out among threads. For ThreadSanitizer torch's thread pool gives way to plain threads, see
threads_for_tsan.cpp, and torch itself runs on one thread.

The tests of the ops and the cases of `tests.fuzz` run, without those that compile CUDA sources or
Python, and under AddressSanitizer those of pyseg-classical's compiled half. A report ends the
process, and is printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "plugins" / "pyseg-classical"
FOLDER = ROOT / "build" / "sanitize"
LEVELS = ("v4", "v3", "generic")
FLAGS = {
    # float-cast-overflow is not in "undefined": NaN as an index is what it finds.
    "asan": "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all",
    "tsan": "-fsanitize=thread",
}
RUNTIME = {"asan": "libasan.so", "tsan": "libtsan.so"}
OPTIONS = {
    # Python keeps memory until the end, and torch defines some objects in several libraries.
    "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1:"
    "abort_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    # What torch, libgomp and Python do among themselves is not looked at.
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:report_signal_unsafe=0",
}
# Compiled CUDA sources and compiled Python are other code, and take long. That small inputs start
# no threads does not hold here.
TESTS = "not emulated and not cuda and not compile and not opcheck and not small_inputs"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys"]
QUICK_TESTS = ("test_hostile_arguments.py", "test_upsample_argmax.py", "test_roi_align.py")


def build(kind: str, project: Path = ROOT, package: str = "pyseg") -> Path:
    """The folder that PYTHONPATH begins with."""
    place = FOLDER / kind
    flags = f"-O1 -g1 -fno-omit-frame-pointer {FLAGS[kind]}"
    subprocess.run(
        [
            *(sys.executable, "setup.py", "build_ext"),
            *("--build-lib", str(place / "python"), "--build-temp", str(place / "objects")),
        ],
        cwd=project,
        env={
            **os.environ,
            "PYSEG_CUDA": "0",
            "PYSEG_BUILD_DIR": str(place / "native"),
            "CXXFLAGS": f"{flags} -DPYSEG_WORTH_THREADS=1 {os.environ.get('CXXFLAGS', '')}",
            "LDFLAGS": f"{FLAGS[kind]} {os.environ.get('LDFLAGS', '')}",
        },
        check=True,
    )
    shutil.copytree(
        project / package,
        place / "python" / package,
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
        dirs_exist_ok=True,
    )
    return place / "python"


def library(name: str) -> str:
    """The compiler's own file of that name."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    found = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"{compiler} has no {name}: install the compiler's sanitizers")
    return str(Path(found).resolve())


def environment(kind: str, packages: Path) -> dict[str, str]:
    # libstdc++ too: else the sanitizer finds no exceptions to watch, as Python is written in C.
    preload = [library(RUNTIME[kind]), library("libstdc++.so")]
    if kind == "tsan":
        threads = FOLDER / kind / "threads_for_tsan.so"
        subprocess.run(
            [
                *(os.environ.get("CXX", "c++").split() + FLAGS[kind].split()),
                *("-std=c++20", "-O1", "-g1", "-shared", "-fPIC", "-pthread"),
                *(str(ROOT / "tests" / "threads_for_tsan.cpp"), "-o", str(threads)),
            ],
            check=True,
        )
        preload.insert(1, str(threads))
    return {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": " ".join(preload),
        "PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)]),
        "PYTHONSAFEPATH": "1",  # not the package of the working directory
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONFAULTHANDLER": "0",
        "OMP_NUM_THREADS": "1" if kind == "tsan" else "2",
    }


def levels() -> list[str]:
    code = "import pyseg._native; print(pyseg._native.simd_level())"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return list(LEVELS[LEVELS.index(found.stdout.strip()) :])


def run(what: str, command: list[str], environment: dict[str, str]) -> bool:
    start = time.monotonic()
    print(f"--- {what}", flush=True)
    if what.startswith("tsan"):  # which wants memory where it expects it
        command = ["setarch", "-R", *command]
    result = subprocess.run(command, cwd=ROOT, env=environment)
    seconds = time.monotonic() - start
    print(
        f"--- {what}: {seconds:.0f} s, {'fine' if result.returncode == 0 else 'FAILED'}", flush=True
    )
    return result.returncode == 0


def check(kind: str, quick: bool, chosen: list[str], seed: int | None) -> bool:
    start = time.monotonic()
    packages = build(kind)
    print(f"--- {kind}: built in {time.monotonic() - start:.0f} s", flush=True)
    base = environment(kind, packages)
    seeds = [] if seed is None else ["--seed", str(seed)]
    good = True
    for level in chosen:
        at_level = {**base, "PYSEG_SIMD": level}
        cases = {("asan", True): 400, ("asan", False): 5000, ("tsan", True): 150}.get(
            (kind, quick), 1500
        )
        fuzz = ["-m", "tests.fuzz", "--level", level, "--cases", str(cases), "--jobs", "1", *seeds]
        good &= run(f"{kind}, {level}, fuzz", [sys.executable, *fuzz], at_level)
        if quick and (kind == "tsan" or level != chosen[0]):
            continue
        tests = [f"tests/ops/{name}" for name in QUICK_TESTS] if quick else ["tests/ops"]
        if kind == "tsan":
            tests, which = ["tests/ops"], f"({TESTS}) and threads"
        else:
            which = TESTS
        good &= run(f"{kind}, {level}, tests", [*PYTEST, "-k", which, *tests], at_level)
    if kind == "asan" and not quick:
        build(kind, PLUGIN, "pyseg_classical")
        tests = str(PLUGIN / "tests" / "test_compiled.py")
        good &= run(f"{kind}, {PLUGIN.name}", [*PYTEST, tests], base)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="*", choices=[*FLAGS, []], help="default: both")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--level", choices=LEVELS, action="append", help="default: all here")
    parser.add_argument("--seed", type=int, help="of the fuzzer; default: a fresh one, printed")
    parser.add_argument("--build-only", action="store_true")
    options = parser.parse_args()
    good = True
    for kind in options.kinds or FLAGS:
        if options.build_only:
            build(kind)
        else:
            good &= check(kind, options.quick, options.level or levels(), options.seed)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
