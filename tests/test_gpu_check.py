"""tests/gpu_check.py: what it does where tests crash, hang, or lose the device, or time runs out.

Its parts are rehearsed by `make gpu-check-rehearsal`.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "csrc/source_digest.py").exists(), reason="outside the source tree"
)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The module, at work in a folder of its own that has our conftest.py."""
    monkeypatch.syspath_prepend(ROOT / "csrc")
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tests" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    for name in ("ROOT", "WORK", "SITE", "LOGS"):
        monkeypatch.setattr(module, name, tmp_path / {"ROOT": "."}.get(name, name))
    return module


@pytest.fixture
def check(script, tmp_path):
    def make(seconds=None):
        options = SimpleNamespace(out=tmp_path / "out", rehearse=False, seconds=seconds)
        made = script.Check(options)
        made.machine = {"modules": {"pytest_timeout": False}}
        made.environment.pop("PYTHONPATH")
        return made

    return make


def steps(check):
    return [json.loads(line) for line in (check.out / "steps.jsonl").read_text().splitlines()]


def test_a_command_is_stopped_with_all_that_it_started(check, tmp_path):
    made = check()
    child = f"echo $$ >{tmp_path}/child; sleep 300"
    start = time.monotonic()
    code, text = made.run("slow", ["bash", "-c", f"echo begun; bash -c '{child}'; true"], 5)
    assert code == "time limit" and text == "begun\n" and time.monotonic() - start < 60
    pid = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{pid}/stat")

    def is_over():
        try:
            return state.read_text().split()[2] == "Z"
        except OSError:
            return True

    while not is_over():  # killed, but the kernel may not have come to it yet
        assert time.monotonic() - start < 60
        time.sleep(0.05)
    assert steps(made)[0]["exit"] == "time limit"
    assert (made.out / "logs.tar.gz").stat().st_size > 50


def test_without_time_a_step_is_named_and_not_run(check):
    made = check(seconds=10)
    assert made.run("late", ["touch", "/nowhere/at/all"], 100) == (None, "")
    assert steps(made) == [{"step": "late", "exit": None, "not_run": "no time was left"}]
    assert made.problems == ["late: not run, no time was left"]


def test_tests_behind_a_crash_and_a_lost_device_still_run(check, script, tmp_path):
    (tmp_path / "test_ops.py").write_text(
        "import os, pytest, torch\n"
        "def lost(): raise RuntimeError('CUDA error: an illegal memory access')\n"
        "def test_a(): pass\n"
        "def test_crash(): os._exit(1)\n"  # as pytest-timeout ends
        "def test_b(): pass\n"
        "def test_loses(monkeypatch):\n"
        "    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, lost\n"
        "    torch.cuda.synchronize()\n"
        "def test_c(): pass\n"
        "def test_fails(): assert False, 'a wrong number'\n"
    )
    made = check()
    log = made.out / "tests.jsonl"
    command = made.pytest("-p", "no:benchmark")
    made.until_all_ran("toy", ("test_ops.py",), command, log, 100)
    assert len(steps(made)) == 3  # processes
    made.summarise(log, ["test_ops.py::test_c", "test_ops.py::test_forgotten"])
    outcome = {k.split("::")[1]: e["outcome"] for k, e in script.last_entries(log).items()}
    assert {k for k, v in outcome.items() if v == "passed"} == {"test_a", "test_b", "test_c"}
    assert outcome["test_loses"] == outcome["test_fails"] == "failed"
    problems = "\n".join(made.problems)
    for part in ("test_crash: crashed", "illegal memory", "a wrong number", "1 were not run"):
        assert part in problems, problems
    assert "test_forgotten" in problems and len(made.problems) == 4


def test_an_older_library_is_refused(check, script, tmp_path, monkeypatch):
    wheel = tmp_path / "pyseg_toolkit-0.1.0-cp310-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pyseg/_C.abi3.so", b"no note")
    made = check()
    monkeypatch.setattr(made, "run", lambda *arguments, **options: (0, ""))
    monkeypatch.setattr(made, "look", dict)
    monkeypatch.setattr(script.source_digest, "digest", lambda: "12" * 20)
    with pytest.raises(SystemExit, match="not built from the sources here"):
        made.install(wheel)
    assert json.loads((made.out / "machine.json").read_text())["wheel"]["sources_here"] == "12" * 20
    with zipfile.ZipFile(wheel, "w") as archive:
        mark = b"\0pyseg sources " + b"12" * 20
        archive.writestr("pyseg/_C.abi3.so", b"ELF" + mark + b"\0more")
    made.install(wheel)


def test_a_library_holds_the_digest(script, tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no c++")
    digest = script.source_digest.digest()
    assert len(digest) == 40 and digest == script.source_digest.digest()
    (tmp_path / "a.cpp").write_text(script.source_digest.unit())
    command = [compiler, "-O3", "-shared", "-fPIC", "a.cpp", "-o", "a.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert script.source_digest.built_from((tmp_path / "a.so").read_bytes()) == digest


def test_the_digest_is_of_every_source(script, tmp_path, monkeypatch):
    (tmp_path / "csrc" / "op").mkdir(parents=True)
    source, setup = tmp_path / "csrc/op/op.cu", tmp_path / "setup.py"
    source.write_text("a")
    setup.write_text("b")
    monkeypatch.setattr(script.source_digest, "ROOT", tmp_path)
    found = {script.source_digest.digest()}
    source.write_text("c")
    found.add(script.source_digest.digest())
    setup.write_text("d")
    found.add(script.source_digest.digest())
    source.rename(tmp_path / "csrc/op/other.cu")
    found.add(script.source_digest.digest())
    assert len(found) == 4
    (tmp_path / "csrc/op/other.pyc").write_text("not a source")
    assert script.source_digest.digest() in found


def test_three_cases_of_every_function(script):
    ids = [f"f.py::test_small[{k}]" for k in range(10)] + ["f.py::test_one[x]", "f.py::test_two"]
    assert script.first_middle_last(ids) == [
        *(f"f.py::test_small[{k}]" for k in (0, 5, 9)),
        "f.py::test_one[x]",
        "f.py::test_two",
    ]


def test_without_a_wheel_or_a_device_it_says_what_to_do(tmp_path):
    for file in ("tests/gpu_check.py", "csrc/source_digest.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    command = [sys.executable, str(tmp_path / "tests" / "gpu_check.py")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and "make release" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_a_baseline_of_what_was_measured(check):
    made = check()
    made.machine |= {"torch": "2.11.0+cu130", "date": "2026-01-31", "commit": "abc"}
    made.machine |= {"cpu": "a processor", "cores": 16, "python": "3.12.3"}
    entry = {"device": "NVIDIA H200", "ours_ms": 0.01, "ratio": 3.0}
    logged = {"test": "benchmarks/op.py::test_cuda[a]", "outcome": "passed", "seconds": 1.0}
    made.keep_baseline([entry | logged | {"benchmark": entry}])
    content = json.loads((made.out / "nvidia-h200-torch2.11.0.json").read_text())
    assert content["results"] == {"op::test_cuda[a]": entry} and content["commit"] == "abc"
