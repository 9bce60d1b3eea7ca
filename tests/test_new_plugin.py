"""`pyseg new-plugin`: what it writes is whole, clean, and passes its own tests once installed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

import pyseg
from pyseg import new_plugin as module
from pyseg.contract import API_VERSION, GROUPS
from pyseg.new_plugin import new_plugin

ROOT = Path(pyseg.__file__).parents[1]
EMULATION = ROOT / "tests" / "emulation"


def tool(name):
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Kind -> a package of it."""
    folder = tmp_path_factory.mktemp("written")
    return {kind: new_plugin(f"demo-{kind}", kind=kind, folder=folder) for kind in GROUPS}


@pytest.mark.parametrize("kind", GROUPS)
def test_a_package_is_whole(written, kind):
    package = written[kind]
    names = {str(p.relative_to(package)) for p in package.rglob("*") if p.is_file()}
    code = f"src/demo_{kind}"
    assert names >= {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        f"{code}/__init__.py",
        f"{code}/py.typed",
        f"tests/test_demo_{kind}.py",
    }
    for path in package.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert not re.search(r"@[A-Z]+@", text), f"{path} has a word that was not filled in"
            assert "MODULE" not in path.name
    project = (package / "pyproject.toml").read_text()
    assert f'api = "{API_VERSION}"' in project and f'entry-points."{GROUPS[kind]}"' in project
    assert f"check_{kind}(" in (package / f"tests/test_demo_{kind}.py").read_text()


@pytest.mark.skipif(tool("ruff") is None, reason="ruff is not installed")
def test_packages_are_clean(written):
    folder = written["op"].parent
    for command in (
        ["check", "--select", "E,F,W,I,UP,B", "--ignore", "F403"],
        ["format", "--check"],
    ):
        done = subprocess.run(
            [tool("ruff"), *command, "."], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(tool("mypy") is None, reason="mypy is not installed")
def test_packages_are_typed(written, tmp_path):
    """`mypy --strict` of every package's own code."""
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\nfollow_imports = silent\n"
        "disallow_any_generics = False\n"  # of np.ndarray
        "untyped_calls_exclude = torch\n"  # Tensor.unflatten, ops.load_library
        f"mypy_path = {ROOT}:{':'.join(str(p / 'src') for p in written.values())}\n"
        f"python_executable = {sys.executable}\ncache_dir = {tmp_path / 'cache'}\n"
        # torch's register_fake has no types.
        "[mypy-demo_op.*]\ndisallow_untyped_decorators = False\n"
    )
    packages = [f"-pdemo_{kind}" for kind in written]
    done = subprocess.run(
        [tool("mypy"), "--config-file", "mypy.ini", *packages],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "small letters, digits and single hyphens"),
        ("My-Plugin", "got 'My-Plugin'"),
        ("3d", "the first one a letter"),
        ("a--b", "single hyphens"),
        ("../x", "got '../x'"),
        ("x" * 61, "at most 60"),
        ("a b", "got 'a b'"),
        ("class", "is a word of Python's"),
        ("match", "is a word of Python's"),
        ("json", "is that of a module that is there already"),
        ("torch", "is that of a module that is there already"),
        ("pyseg", "is that of a module that is there already"),
        ("crf", "a refiner is called 'crf' already"),
    ],
)
def test_names_that_cannot_be(tmp_path, name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        new_plugin(name, kind="refiner", folder=tmp_path / "absent")
    with pytest.raises(ValueError, match="kind must be one of model, refiner"):
        new_plugin("fine", kind="filter", folder=tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_exists_stays_as_it_is(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.py").write_text("x = 1\n")
    with pytest.raises(pyseg.PysegError, match="exists already"):
        new_plugin("mine", kind="metric", folder=tmp_path)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["work.py"]
    with pytest.raises(pyseg.PysegError, match="does not exist"):
        new_plugin("mine", kind="metric", folder=tmp_path / "absent")


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    shutil.copytree(module.TEMPLATES, tmp_path / "templates")
    (tmp_path / "templates" / "metric" / "tests" / "broken.py.in").write_bytes(b"\xff\xfe\xfd")
    monkeypatch.setattr(module, "TEMPLATES", tmp_path / "templates")
    (tmp_path / "out").mkdir()
    with pytest.raises(UnicodeDecodeError):
        new_plugin("mine", kind="metric", folder=tmp_path / "out")
    assert [*(tmp_path / "out").iterdir()] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", GROUPS)
def test_installed_it_passes_its_own_tests_and_the_suite(written, kind, tmp_path):
    """pip install of what was written, its tests, and `pytest --pyseg-conformance` of its name."""
    if kind == "op":
        pytest.importorskip("pybind11")
    package, site = written[kind], tmp_path / "site"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]),
        "USE_CUDA": "0",  # nvcc takes minutes; test_the_cuda_kernel_of_an_op runs it
    }

    def run(*command):
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    run(
        *("pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--target", str(site), str(package)),
    )
    run("pytest", "-q", str(package))
    if kind != "dataset":  # it needs files
        told = run("pytest", "-q", f"--pyseg-conformance=demo-{kind}")
        assert "1 passed" in told
    listed = run("pyseg", "list", f"demo_{kind}", "--all")
    assert API_VERSION in listed and "Apache-2.0" in listed


# ---------------------------------------------------------------------------- the op's CUDA kernel

DRIVER = """
import sys, torch
sys.path.insert(0, sys.argv[3])
torch.use_deterministic_algorithms(True)  # new_empty() is filled: nothing is left to luck
torch.ops.load_library(sys.argv[1])
library = torch.library.Library("demo_op_emulated", "DEF")
library.define("demo_op(Tensor labels, int radius) -> Tensor")
torch.ops.load_library(sys.argv[2])
source = open(sys.argv[3] + "/demo_op/__init__.py").read()
names = {"__name__": "templates"}
head = "import torch\\nfrom torch import Tensor\\nVOID = 255\\n"  # and nothing that loads _C
exec(head + source[source.index("def examples"):], names)
for labels, radius in names["examples"]():
    host = torch.ops.demo_op.demo_op(labels, radius)
    device = torch.ops.demo_op_emulated.demo_op(labels, radius)
    expected = names["reference"](labels, radius)
    assert torch.equal(host, expected), "CPU"
    assert torch.equal(device, expected), "CUDA, emulated"
print("equal", len(names["examples"]()))
"""


def compile_with(compiler, source, output, *flags):
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    done = subprocess.run(
        [
            *(compiler, "-std=c++20", "-O1", "-shared", "-fPIC", target, *flags, *includes),
            *("-x", "c++", str(source), "-o", str(output), *libraries, "-ltorch_cpu", "-lc10"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(not EMULATION.is_dir(), reason="outside the source tree")
def test_the_cpu_and_the_emulated_cuda_kernel_of_an_op_equal_its_reference(written, tmp_path):
    csrc = written["op"] / "csrc"
    compile_with("g++", csrc / "demo_op.cpp", tmp_path / "cpu.so", "-Wall", "-Werror")
    folders = (f"-I{EMULATION / 'shim'}", f"-I{EMULATION}")
    flags = ("-DEMULATED", "-Wall", "-Wno-unknown-pragmas", *folders)
    compile_with("g++", csrc / "demo_op_cuda.cu", tmp_path / "cuda.so", *flags)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, "cpu.so", "cuda.so", str(written["op"] / "src")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "equal 4\n", done.stderr


@pytest.mark.slow
def test_the_cuda_kernel_of_an_op_compiles(written, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    source = written["op"] / "csrc" / "demo_op_cuda.cu"
    includes = [f"-isystem={path}" for path in cpp_extension.include_paths()]
    command = [nvcc, "-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ["-arch=sm_80", "-Xcompiler", "-fPIC", *includes, "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "op.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
