"""Builds `_C` (always) and `_C_cu<major>` (where nvcc and a CUDA build of torch are found).

Both use only torch's stable ABI, so one build serves every torch >= 2.10 and Python >= 3.10. The
compilers are run by one ninja file, `build/native/build.ninja`: C++ and CUDA side by side, what
changed and nothing else. `docs/native.md` says why, and how long it takes.

Environment: PYSEG_CUDA=0 leaves the CUDA library out, PYSEG_CUDA=1 insists on it;
TORCH_CUDA_ARCH_LIST chooses the GPUs; MAX_JOBS limits the parallel compilers; CXX, CXXFLAGS and
LDFLAGS are the C++ compiler and more of its flags; PYSEG_BUILD_DIR is another folder to work in;
PYSEG_LOCAL_VERSION=cu13 makes version 0.1.0 0.1.0+cu13; _PYTHON_HOST_PLATFORM, which Python itself
knows, is the system to build for, where that is another than this one.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PLATFORM = sysconfig.get_platform()  # that is built for: linux-x86_64, macosx-11.0-arm64, …
BUILD = Path(os.environ.get("PYSEG_BUILD_DIR") or "build/native")  # absolute, or from ROOT
COMMON = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
HOST = ["-fPIC", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fopenmp-simd"]
NVCC = ["-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
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

sys.path.insert(0, str(ROOT / "csrc"))
import source_digest  # noqa: E402
import torch  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402


def sources(suffix: str) -> list[Path]:
    """Those of csrc/<op>/, the largest first: no long one is left for the end."""
    found = (p for p in (ROOT / "csrc").glob(f"*/*.{suffix}") if not p.stem.endswith("_simd"))
    return [p.relative_to(ROOT) for p in sorted(found, key=lambda p: (-p.stat().st_size, p))]


def write(file: Path, text: str) -> None:
    """Only a change, else what depends on it would compile again."""
    if not file.is_file() or file.read_text() != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def level_units() -> list[tuple[Path, list[str], str]]:
    """(unit, flags, what it is) for every SIMD level and type of each `*_simd.cpp`.

    So compilers work side by side, and none does more than it must. Where a source knows
    PYSEG_REAL, double exists too: it checks gradients, at the generic level alone and at -O2.
    """
    units = []
    levels = ("v4", "v3", "generic") if PLATFORM == "linux-x86_64" else ("generic",)
    for source in sorted((ROOT / "csrc").glob("*/*_simd.cpp")):
        typed = "PYSEG_REAL" in source.read_text()
        variants = [(level, "float" if typed else None) for level in levels]
        if typed:
            variants.append(("generic", "double"))
        for level, real in variants:
            name = "_".join(filter(None, (source.stem, level, real)))
            lines = [f"#define PYSEG_LEVEL {level}", f"#define PYSEG_LEVEL_{level.upper()}"]
            if real:
                lines += [f"#define PYSEG_REAL {real}", f"#define PYSEG_REAL_{real.upper()}"]
            lines += [f'#include "{source.relative_to(ROOT)}"']
            if level != "generic":  # of what level.h pushes
                lines += ["#ifdef __clang__", *["#pragma clang attribute pop"] * 2, "#endif"]
            unit = BUILD / "units" / f"{name}.cpp"
            write(ROOT / unit, "\n".join(lines) + "\n")
            flags = ["-iquote", "."] + (["-O2"] if real == "double" else [])
            about = ", ".join(filter(None, (level, real)))
            units.append((unit, flags, f"{source.relative_to(ROOT)} ({about})"))
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


def architectures() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, as "8.0;9.0+PTX"."""
    flags = []
    for item in re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES):
        number, _, ptx = item.partition("+")
        if not re.fullmatch(r"\d+\.\d+[af]?", number) or ptx not in ("", "PTX"):
            raise SystemExit(
                f'TORCH_CUDA_ARCH_LIST: {item!r} is not an architecture; write "8.0;9.0+PTX"'
            )
        number = number.replace(".", "")
        for code in ["sm", "compute"] if ptx else ["sm"]:
            flags.append(f"-gencode=arch=compute_{number},code={code}_{number}")
    return flags


def quoted(parts) -> str:
    """Words of a command in a ninja file."""
    return " ".join(shlex.quote(str(part)) for part in parts).replace("$", "$$")


class Build(build_ext):
    """All libraries by one run of ninja."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".abi3.so"  # whatever this Python's suffix is

    def get_source_files(self):
        return [
            str(p.relative_to(ROOT))
            for p in sorted((ROOT / "csrc").rglob("*.*"))
            if p.suffix != ".pyc"
        ]  # for an sdist: headers, too

    def run(self):
        super().run()
        if len(self.extensions) > 1:
            return
        folder = ROOT if self.inplace else Path(self.build_lib)
        for library in folder.glob("pyseg/_C_cu*.so"):  # of other sources does not fit the new one
            if source_digest.built_from(library.read_bytes()) != source_digest.digest():
                print(f"pyseg: {library.name} is of other sources, and is removed")
                library.unlink()

    def build_extensions(self):
        (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
        libraries = self.write_ninja_file()
        ninja = shutil.which(
            "ninja",
            path=os.pathsep.join(
                [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]
            ),
        )
        if ninja is None:
            raise SystemExit("pyseg needs ninja to build: python -m pip install ninja")
        command = [ninja, "-f", str(BUILD / "build.ninja")]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        environment = {"NINJA_STATUS": "[%f/%t, %e s] ", **os.environ}
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            raise SystemExit("pyseg: the native libraries did not compile; see the error above")
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(ROOT / libraries[extension.name]), str(target))

    def write_ninja_file(self) -> dict[str, Path]:
        """`build.ninja`, and the library that it makes for each extension."""
        cxx = os.environ.get("CXX", "c++")
        more = shlex.split(os.environ.get("CXXFLAGS", ""))
        linker = shlex.split(os.environ.get("LDFLAGS", ""))
        include = [f"-isystem{folder}" for folder in cpp_extension.include_paths("cpu")]
        # Messages of torch's headers hold their path: the library is not to say where it was built.
        torch_headers = cpp_extension.include_paths("cpu")[0]
        unnamed = f"-fmacro-prefix-map={torch_headers}=torch"
        libraries = [f"-L{folder}" for folder in cpp_extension.library_paths("cpu")]
        link = ["-shared", "-Wl,--as-needed", *linker, *libraries, "-lc10", "-ltorch_cpu"]
        if PLATFORM.startswith("macosx"):  # torch is loaded before, under names of its own
            link = ["-shared", "-undefined", "dynamic_lookup", *linker]
        lines = [
            "ninja_required_version = 1.5",
            f"builddir = {BUILD}",
            "rule cxx",
            f"  command = {quoted([cxx, *COMMON, *HOST, unnamed, *include])} $flags {quoted(more)}"
            " -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $what",
            "rule link",
            f"  command = {quoted([cxx])} $in -o $out {quoted(link)} $libraries",
            "  description = link $out",
        ]
        if len(self.extensions) > 1:
            include = [f"-isystem={folder}" for folder in cpp_extension.include_paths("cpu")]
            nvcc = [f"{cuda_home}/bin/nvcc", *COMMON, *NVCC, *architectures(), *include]
            nvcc.append(f"-Xcompiler={unnamed}")
            lines += [
                "rule nvcc",
                f"  command = {quoted(nvcc)} -MD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = $what",
            ]

        def compile(rule, source, flags, what):
            built = BUILD / "objects" / f"{source.parent.name}-{source.name}.o"
            lines.append(f"build {built}: {rule} {source}")
            lines.append(f"  flags = {quoted(flags)}")
            lines.append(f"  what = {what}")
            return str(built)

        sources_text = BUILD / "units" / "source_digest.cpp"
        write(ROOT / sources_text, source_digest.unit())
        digest = compile("cxx", sources_text, [], "the digest of the sources")
        objects = {"pyseg._C": [compile("cxx", *unit) for unit in level_units()]}
        for extension in self.extensions:
            rule, suffix = ("cxx", "cpp") if extension.name == "pyseg._C" else ("nvcc", "cu")
            parts = [compile(rule, p, [], str(p)) for p in sources(suffix)]
            objects[extension.name] = [*objects.get(extension.name, []), *parts, digest]
        built = {}
        for name, parts in objects.items():
            built[name] = BUILD / f"{name.split('.')[-1]}.abi3.so"
            lines.append(f"build {built[name]}: link {' '.join(parts)}")
            if name != "pyseg._C":
                folders = [f"-L{folder}" for folder in cpp_extension.library_paths("cuda")]
                lines.append(f"  libraries = {quoted([*folders, '-lcudart', '-ltorch_cuda'])}")
        write(ROOT / BUILD / "build.ninja", "\n".join(lines) + "\n")
        return built


extensions = [Extension("pyseg._C", [], py_limited_api=True)]
if want_cuda():
    cuda_major = torch.version.cuda.split(".")[0]
    extensions.append(Extension(f"pyseg._C_cu{cuda_major}", [], py_limited_api=True))

label = os.environ.get("PYSEG_LOCAL_VERSION")
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    options={
        "bdist_wheel": {"py_limited_api": "cp310"},
        "egg_info": {"tag_build": f"+{label}"} if label else {},
    },
)
