"""Builds `_C` (always) and `_C_cu<major>` (where nvcc and a CUDA build of torch are found).

Both use only torch's stable ABI, so one build serves every torch >= 2.10 and Python >= 3.10.

Environment: PYSEG_CUDA=0 leaves the CUDA library out, PYSEG_CUDA=1 insists on it;
TORCH_CUDA_ARCH_LIST chooses the GPUs; MAX_JOBS limits the parallel compilers.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
STABLE = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
COMMON = ["-O3", "-std=c++20", *STABLE]
HOST = ["-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fopenmp-simd"]
ARCHITECTURES = "7.5;8.0;8.6;9.0+PTX"


def find_cuda_home() -> str | None:
    """The toolkit's folder, also where `nvcc` on PATH is a wrapper elsewhere."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return named
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "/usr/local/cuda" if Path("/usr/local/cuda/bin/nvcc").exists() else None
    plan = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True
    )
    where = re.search(r"^#\$ _HERE_=(.+)$", plan.stderr + plan.stdout, re.MULTILINE)
    return str(Path(where[1].strip()).parent if where else Path(nvcc).resolve().parents[1])


cuda_home = find_cuda_home()
if cuda_home:  # before torch.utils.cpp_extension is imported: it guesses from PATH
    os.environ["CUDA_HOME"] = cuda_home

import torch  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402


def sources(suffix: str) -> list[str]:
    found = (p for p in (ROOT / "csrc").glob(f"*/*.{suffix}") if not p.stem.endswith("_simd"))
    return sorted(str(p.relative_to(ROOT)) for p in found)


def level_units() -> list[str]:
    """A unit to compile for every instruction set and type of each `*_simd.cpp`.

    So compilers work side by side, and none does more than it must. double, which checks gradients,
    exists at the generic level alone, and at -O2: a sixth of the time.
    """
    units = []
    for source in sorted((ROOT / "csrc").glob("*/*_simd.cpp")):
        for level, real in (("v4", "float"), ("generic", "float"), ("generic", "double")):
            lines = [
                f"#define PYSEG_LEVEL {level}",
                f"#define PYSEG_LEVEL_{level.upper()}",
                f"#define PYSEG_REAL {real}",
                f'#include "../../csrc/{source.parent.name}/{source.name}"',
            ]
            if real == "double":
                lines.insert(0, '#pragma GCC optimize("O2")')
            if level != "generic":  # empty where the compiler has no levels
                head = ['#include "../../csrc/common/common.h"', "#ifdef PYSEG_X86_LEVELS"]
                lines = [*head, *lines, "#endif"]
            unit = ROOT / "build" / "units" / f"{source.stem}_{level}_{real}.cpp"
            text = "\n".join(lines) + "\n"
            if not unit.is_file() or unit.read_text() != text:  # else it would compile again
                unit.parent.mkdir(parents=True, exist_ok=True)
                unit.write_text(text)
            units.append(str(unit.relative_to(ROOT)))
    return units


def want_cuda() -> bool:
    asked = os.environ.get("PYSEG_CUDA", "auto")
    if asked == "0":
        return False
    missing = None
    if not cuda_home:
        missing = "no nvcc was found (set CUDA_HOME)"
    elif not torch.version.cuda:
        missing = f"torch {torch.__version__} is a CPU build"
    if missing:
        if asked == "1":
            raise SystemExit(f"PYSEG_CUDA=1, but {missing}")
        print(f"pyseg: building the CPU library only: {missing}")
        return False
    version = subprocess.run(
        [f"{cuda_home}/bin/nvcc", "--version"], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"release (\d+)", version)
    if not found or found[1] != torch.version.cuda.split(".")[0]:
        raise SystemExit(
            f"nvcc in {cuda_home} is release {found[1] if found else '?'}, but torch was built for "
            f"CUDA {torch.version.cuda}: point CUDA_HOME at a toolkit of that major version, or "
            "set PYSEG_CUDA=0 for a CPU-only build"
        )
    return True


extensions = [
    cpp_extension.CppExtension(
        "pyseg._C",
        [*level_units(), *sources("cpp")],
        extra_compile_args={"cxx": [*COMMON, *HOST]},
        extra_link_args=["-Wl,--as-needed"],
        # all of csrc, also headers, .cu and the build backend: what an sdist has to hold
        depends=sorted(
            str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*") if p.suffix != ".pyc"
        ),
        py_limited_api=True,
    )
]
if want_cuda():
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    extensions.append(
        cpp_extension.CUDAExtension(
            f"pyseg._C_cu{torch.version.cuda.split('.')[0]}",
            sources("cu"),
            extra_compile_args={
                "cxx": [*COMMON, *HOST, "-DUSE_CUDA"],
                "nvcc": [*COMMON, "-DUSE_CUDA", "-Xcompiler", "-fvisibility=hidden"],
            },
            extra_link_args=["-Wl,--as-needed"],
            py_limited_api=True,
        )
    )

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
