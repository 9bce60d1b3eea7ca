"""What every CUDA kernel takes of a multiprocessor, read from the compiled library.

    python tests/cuda_resources.py [library or object file] [--architecture sm_90]

Prints a table: registers, static and dynamic shared memory, local memory of a thread (arrays that
did not become registers, and spills), blocks and warps that fit a multiprocessor of an H100 or
H200. Ends with an error where a kernel's static and dynamic shared memory exceed 48 KB, or 64 KB
where it asks for more, where a kernel takes more local memory than is noted here, or where a kernel
of dynamic shared memory is not noted. Needs ``cuobjdump`` (PATH, CUDA_HOME, or the one in triton)
and ``c++filt``.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_LIMIT = 48 << 10  # of a block's shared memory, unless a kernel asks for more
MOST_SHARED = 64 << 10  # of a block, static and dynamic, on compute capability 7.5
RESERVED = 1 << 10  # of shared memory, by the system, in every block

# The most dynamic shared memory, in bytes, that kernels are launched with, and whether they ask
# for more than the default limit (cudaFuncAttributeMaxDynamicSharedMemorySize).
DYNAMIC = {
    "locate_kernel": (63 << 10, True),  # of dense_crf; that of deform_conv2d has none
    "pass_kernel": (64 << 10, True),
    "back_kernel": (64 << 10, True),
    "combine_kernel": (4 << 10, False),
    "confusion_matrix_kernel": (48 << 10, False),
    "upsample_confusion_kernel": (48 << 10, False),
    "count_pairs_kernel": (48 << 10, False),
    "match_kernel": (48 << 10, False),
    "find_uniform_kernel": (16 << 10, False),
    "decide": (40 << 10, False),
    "count_stuff": (10 << 10, False),
    "write": (10 << 10, False),
}
BLOCKS = {"locate_kernel": 128}  # threads; others have 256, a few 128
# Bytes of a thread's local memory that are accepted, by kernel: arrays with a running index, whose
# addresses are taken, and spills outside of the hot loops.
LOCAL = {
    "average_kernel": 48,
    "back_kernel": 32,
    "check_kernel": 16,
    "decide": 24,
    "gather_kernel": 80,
    "locate_kernel": 8,
    "normalize_kernel": 152,
    "pass_kernel": 8,
    "prepare_kernel": 128,
    "products_kernel": 8,
    "upsample_argmax_kernel": 8,
    "upsample_confusion_kernel": 32,
}


def cuobjdump() -> str:
    triton = find_spec("triton")
    places = [
        shutil.which("cuobjdump"),
        *(
            Path(os.environ[name]) / "bin" / "cuobjdump"
            for name in ("CUDA_HOME", "CUDA_PATH")
            if name in os.environ
        ),
        "/usr/local/cuda/bin/cuobjdump",
        Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        if triton and triton.origin
        else None,
    ]
    for place in places:
        if place and Path(place).is_file():
            return str(place)
    sys.exit("no cuobjdump: it comes with the CUDA toolkit and with triton")


def kernels(library: Path, architecture: str) -> dict[str, dict[str, int]]:
    """REG, STACK and SHARED of each kernel of ours, by its readable name."""
    command = [cuobjdump(), "--dump-resource-usage", "--gpu-architecture", architecture]
    text = subprocess.run(
        [*command, str(library)], capture_output=True, text=True, check=True
    ).stdout
    if not shutil.which("c++filt"):
        sys.exit("no c++filt: it comes with binutils")
    pairs = re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text)
    names = subprocess.run(
        ["c++filt"], input="\n".join(name for name, _ in pairs), capture_output=True, text=True
    ).stdout.splitlines()
    found = {}
    for name, (_, usage) in zip(names, pairs, strict=True):
        if "cub::" in name:
            continue
        name = re.sub(r"\(anonymous namespace\)::|_INTERNAL_\w+?::|^void ", "", name)
        name = re.sub(r"\(.*\)$", "", name).replace("c10::", "")
        found[name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    return found


def fitting_blocks(registers: int, shared: int, threads: int) -> int:
    """How many blocks a multiprocessor of compute capability 9.0 holds."""
    warps = threads // 32
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4 // warps
    by_shared = (228 << 10) // (shared + RESERVED) if shared else 32
    return min(by_registers, by_shared, 2048 // threads, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    built = sorted((ROOT / "pyseg").glob("_C_cu*.so"))
    parser.add_argument("files", nargs="*", type=Path, default=built[:1])
    parser.add_argument("--architecture", default="sm_90")
    arguments = parser.parse_args()
    if not arguments.files:
        sys.exit("no pyseg/_C_cu*.so: build it first, or name an object file")
    problems = []
    print("| kernel | registers | static | dynamic | local | blocks | warps |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for file in arguments.files:
        found = kernels(file, arguments.architecture)
        if not found:
            problems.append(f"{file} has no kernels for {arguments.architecture}")
        for name, usage in sorted(found.items()):
            base = name.split("<")[0]
            static = max(0, usage["SHARED"] - (RESERVED if usage["SHARED"] >= RESERVED else 0))
            uses_dynamic = base in DYNAMIC and usage["SHARED"] >= RESERVED
            dynamic, asks = DYNAMIC[base] if uses_dynamic else (0, False)
            threads = BLOCKS.get(base, 256) if uses_dynamic or base != "locate_kernel" else 256
            blocks = fitting_blocks(usage["REG"], static + dynamic, threads)
            local = usage["STACK"] + usage["LOCAL"]
            print(
                f"| {name} | {usage['REG']} | {static} | {dynamic or ''} | {local or ''} "
                f"| {blocks} | {blocks * threads // 32} |"
            )
            limit = MOST_SHARED if asks else DEFAULT_LIMIT
            if static + dynamic > limit:
                problems.append(
                    f"{name}: {static} bytes of static and up to {dynamic} of dynamic shared "
                    f"memory, of {limit >> 10} KB that it may have"
                )
            if local > LOCAL.get(base, 0):
                problems.append(
                    f"{name}: {local} bytes of local memory in a thread, {LOCAL.get(base, 0)} noted"
                )
    sources = [p for p in (ROOT / "csrc").glob("*/*") if p.suffix in (".cu", ".cuh")]
    for source in sources:
        text = source.read_text()
        for body in re.split(r"__global__", text)[1:]:
            kernel = re.search(r"(\w+)\(", re.sub(r"__launch_bounds__\([^)]*\)", "", body))
            if "PYSEG_DYNAMIC_SHARED(" in body and kernel and kernel[1] not in DYNAMIC:
                problems.append(f"{source.name}: {kernel[1]} has dynamic shared memory; note it")
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
