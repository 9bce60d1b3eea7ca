"""The option --benchmark of the root conftest.py and the fixtures of benchmarks/conftest.py, on a
small project of its own."""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from pyseg import _native

pytest.importorskip("pytest_benchmark")
CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
FIXTURES = CONFTEST.parent / "benchmarks" / "conftest.py"
pytestmark = pytest.mark.skipif(not CONFTEST.exists(), reason="outside the source tree")

BENCHMARK = """
import pytest

@pytest.mark.parametrize("threads", [1])
def test_sum(compare, threads):
    def check(ours, peer):
        assert ours == peer, "results differ"
    compare(ours=lambda: sum(range({n})), peer=lambda: sum(range(200_000)) * {factor},
            peer_name="a long sum", threads=threads, goal=2.5, check=check,
            levels=False)
"""

# On a clock that only counts, as naps take longer on a busy machine.
LEVELS = """
import os, time

def test_slow(compare, benchmark, monkeypatch):
    now = [0.0]
    benchmark._timer = lambda: now[0]
    monkeypatch.setattr(time, "perf_counter", benchmark._timer)
    def nap(seconds):
        now[0] += seconds
    def ours():
        level = os.environ.get("PYSEG_SIMD", "best")
        nap({{"generic": {generic}}}.get(level, 0.02))
        return level
    seen = []
    compare(ours=ours, peer=lambda: nap(0.02), peer_name="a nap", threads=1, rounds=4,
            goal={{"generic": 0.5}}, check=lambda level, _: seen.append(level))
    assert seen[0] == "best" and "generic" in seen[1:] and "PYSEG_SIMD" not in os.environ
"""


@pytest.fixture
def project(tmp_path):
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\naddopts = --import-mode=importlib\ntestpaths = tests\n"
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text("def test_one():\n    pass\n")
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(FIXTURES, tmp_path / "benchmarks")
    (tmp_path / "benchmarks" / "toy.py").write_text(BENCHMARK.format(n=200_000, factor=1))

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "-p", "benchmark", *arguments]
        # A worker of pytest-xdist says so in the environment, and then nothing is measured.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # starts sooner
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=environment
        )

    return tmp_path, run


def test_benchmarks_are_no_tests(project):
    _, run = project
    result = run("-v")
    assert result.returncode == 0 and "test_one" in result.stdout and "toy" not in result.stdout
    result = run("benchmarks/toy.py")
    assert result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, result.stdout
    result = run("--benchmark-only", "tests")  # the plugin's own options are not ours
    assert result.returncode == 0 and "1 skipped" in result.stdout, result.stdout
    result = run("--save-baseline")
    assert result.returncode != 0 and "needs --benchmark" in result.stderr


def test_every_benchmark_is_found():
    """Also beside commands, which import one another and are not imported here."""
    command = [sys.executable, "-m", "pytest", "--benchmark", "--collect-only", "-q"]
    result = subprocess.run(command, cwd=CONFTEST.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for op in ("dense_crf", "roi_align", "pipeline"):
        assert f"benchmarks/{op}.py::test_" in result.stdout


def test_parts_make_the_whole(project):
    root, run = project
    names = [f"test_{letter}" for letter in "abcdefg"]
    code = "".join(f"def {name}():\n    pass\n" for name in names)
    (root / "tests" / "test_one.py").write_text(code)
    parts = [re.findall(r"::(test_\w)\b", run("-v", "--part", f"{k}/3").stdout) for k in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == names and [
        len(part) for part in parts
    ] == [3, 2, 2]
    result = run("--part", "4/3")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR and "'4/3' is not K/N" in result.stderr


def test_ratios_and_baseline(project):
    root, run = project
    result = run("--benchmark")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "toy::test_sum[1]" in result.stdout and "a long sum" in result.stdout
    (stored,) = (root / ".benchmarks").glob("*.json")
    text = stored.read_text()
    entry = json.loads(text)["results"]["toy::test_sum[1]"]
    assert entry["goal"] == 2.5 and entry["threads"] == 1 and 0.1 < entry["ratio"] < 10
    assert platform.node() not in text or len(platform.node()) < 3

    result = run("--benchmark", "--save-baseline", "benchmarks/toy.py")
    assert result.returncode == 0, result.stdout + result.stderr
    (baseline,) = (root / "benchmarks" / "results").glob("*-torch*.json")
    content = json.loads(baseline.read_text())
    assert content["results"]["toy::test_sum[1]"]["peer"] == "a long sum"
    content["results"]["toy::test_sum[1]"]["ratio"] = 1000.0
    baseline.write_text(json.dumps(content))
    result = run("--benchmark")
    assert result.returncode == 1, result.stdout
    assert "more than 20% under the baseline of 1000.0 x" in result.stdout

    content["results"]["toy::test_sum[1]"]["threads"] = 64  # another setting is no baseline
    baseline.write_text(json.dumps(content))
    assert run("--benchmark").returncode == 0


def test_what_fails(project):
    root, run = project
    toy = root / "benchmarks" / "toy.py"
    toy.write_text(BENCHMARK.format(n=200_000, factor=2))
    result = run("--benchmark")
    assert result.returncode == 1 and "results differ" in result.stdout
    toy.write_text("import pytest\ndef test_cuda(compare):\n    pytest.skip('no device')\n")
    result = run("--benchmark")
    assert result.returncode == 1 and "no benchmark ran" in result.stdout
    toy.unlink()
    assert run("--benchmark").returncode != 0


def test_levels(project):
    """All levels in one run; one that is slower than a lower one fails it."""
    if _native.simd_level() == "generic":
        pytest.skip("this processor has one SIMD level")
    root, run = project
    toy = root / "benchmarks" / "toy.py"
    toy.write_text(LEVELS.format(generic=0.04))
    result = run("--benchmark", "--save-baseline")
    assert result.returncode == 0, result.stdout
    (stored,) = (root / "benchmarks" / "results").glob("*.json")
    found = json.loads(stored.read_text())["results"]
    best, lowest = found["toy::test_slow"], found["toy::test_slow at generic"]
    assert lowest["simd"] == "generic" != best["simd"]
    assert lowest["ratio"] < 0.8 * best["ratio"]
    assert lowest["goal"] == 0.5 and best["goal"] is None
    toy.write_text(LEVELS.format(generic=0.001))
    result = run("--benchmark")
    assert result.returncode == 1 and "ms at generic" not in result.stdout
    assert re.search(r"test_slow: [\d.]+ ms at v\d, [\d.]+ at generic", result.stdout)


# -- what is measured on a GPU, on a clock that only counts


def loaded(file):
    spec = importlib.util.spec_from_file_location("loaded", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def timing():
    return loaded(FIXTURES)


class CountingClock:
    """A device on which a call takes ``device_us``, and its launch ``host_us`` of the host."""

    name, how, captures, cache_bytes = "a counting device", "events", True, 1000

    def __init__(self, host_us=40.0, device_us=10.0, waits=False, breaks=False):
        self.host_us, self.device_us = host_us, device_us
        self.waiting, self.breaks = waits, breaks
        self.host = self.device = 0.0
        self.capturing = None
        self.lengths = []  # of the graphs

    def function(self, tensor):
        if self.capturing is not None:
            self.capturing.append(tensor)
            return self.result
        self.host += self.host_us
        self.device = max(self.device, self.host) + self.device_us
        self.result = tensor.clone()
        return self.result

    def holds(self, result):
        return result is not None

    def wall_ms(self, run):
        start = self.host = self.device
        run()
        self.host = self.device
        return (self.device - start) / 1e3

    device_ms = wall_ms

    def waits(self, run):
        run()
        return self.waiting

    def capture(self, run):
        if self.breaks:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        self.capturing = []
        run()
        captured, self.capturing = self.capturing, None
        self.lengths.append(len(captured))

        def replay():
            self.device = max(self.device, self.host) + self.device_us * len(captured)
            self.result.copy_(captured[-1])

        return replay

    def poison(self, result):
        result.fill_(-1)


def test_gpu_time_is_the_device_s(timing):
    """The old way, calls back to back, measured the 50 us of host and device together."""
    clock = CountingClock()
    copies = timing.rotation((torch.arange(25),), clock.cache_bytes)
    assert len(copies) == 10  # of 200 bytes: twice the cache
    assert len({copy[0].data_ptr() for copy in copies}) == 10
    timed = timing.Timed(clock.function, copies, clock)
    assert timed.how == "graph"
    assert timed.round() == pytest.approx(0.010, rel=1e-3)
    assert timed.eager_ms == pytest.approx(0.050, rel=0.3)
    assert clock.lengths[0] % 10 == 0  # a graph uses every copy equally often
    assert 40 < timed.round() * timed.calls < 60  # ms a round
    assert torch.equal(timed.result, torch.arange(25))  # which the graph wrote over the poison


@pytest.mark.parametrize(
    ("options", "capture", "how"),
    [
        ({"waits": True}, True, "events"),
        ({}, False, "events"),
        ({"breaks": True}, True, "events; no capture: operation not permitted"),
    ],
)
def test_gpu_time_without_a_graph(timing, options, capture, how):
    clock = CountingClock(**options)
    timed = timing.Timed(clock.function, [(torch.arange(25),)], clock, capture)
    assert timed.how == how and not clock.lengths
    assert timed.round() == pytest.approx(0.050, rel=0.3)


def test_a_slow_function_is_not_repeated(timing):
    clock = CountingClock(device_us=200_000)
    timed = timing.Timed(clock.function, [(torch.arange(25),)], clock)
    assert timed.calls == 1 and timed.round() == pytest.approx(200, rel=1e-3)


def test_a_function_without_a_result_on_the_device_is_refused(timing):
    with pytest.raises(TypeError, match="no result"):
        timing.Timed(lambda tensor: None, [(torch.arange(25),)], CountingClock())


def test_inputs_are_copied_whole(timing):
    pair = namedtuple("Pair", "a b")(torch.zeros(2), torch.ones(3))
    level = torch.zeros(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    inputs = ([level], {"x": torch.zeros(5)}, pair, 7)
    copies = timing.rotation(inputs, 10**5)
    assert len(copies) == 64  # small inputs stay in the cache: no use in thousands of copies
    other = copies[1]
    assert other[0][0].is_contiguous(memory_format=torch.channels_last)
    assert other[2].b.tolist() == [1, 1, 1] and type(other[2]) is type(pair) and other[3] == 7
    assert other[1]["x"].data_ptr() != inputs[1]["x"].data_ptr()
    assert len(timing.rotation(inputs, 10)) == 1 and timing.rotation((), 1000) == [()]


GPU_BENCHMARK = """
import pytest, torch
@pytest.mark.gpu
def test_cuda(gpu):
    def check(ours, peer):
        assert torch.equal(ours, peer), "results differ"
    gpu.compare(ours=lambda x: x + {term}, peer=gpu.compile(lambda x: 1 + x), peer_name="torch",
                inputs=(torch.arange(5, device=gpu.device),), check=check)
"""


def test_rehearsal(project):
    root, run = project
    toy = root / "benchmarks" / "toy.py"
    toy.write_text(GPU_BENCHMARK.format(term=1))
    with (root / "pytest.ini").open("a") as file:
        file.write("markers =\n  gpu: x\n")
    log = root / "log.jsonl"
    result = run("--benchmark", "--rehearse", "--log-json", str(log))
    assert result.returncode == 0 and "no kernel ran on a GPU" in result.stdout, result.stdout
    assert not [*(root / ".benchmarks").glob("*.json")]  # nothing was measured
    ends = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["outcome"] for entry in ends] == ["started", "passed"]
    assert ends[1]["ran_once_on"] == "cpu" and "benchmark" not in ends[1]
    toy.write_text(GPU_BENCHMARK.format(term=2))
    result = run("--benchmark", "--rehearse")
    assert result.returncode == 1 and "results differ" in result.stdout
    assert "needs --benchmark" in run("--rehearse").stderr


# -- the log, in which nothing is lost


def entries(log):
    last = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        last[entry["test"].split("::")[1]] = entry
    return last


def test_log_of_tests_and_a_crash(project):
    root, run = project
    (root / "tests" / "test_one.py").write_text(
        "import os, pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2\n"
        "def test_skips(): pytest.skip('no device')\n"
        "def test_crashes(): os._exit(3)\n"
        "def test_after(): pass\n"
    )
    log = root / "log.jsonl"
    assert run("--log-json", str(log)).returncode == 3
    found = {name: entry["outcome"] for name, entry in entries(log).items()}
    assert found == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_skips": "skipped",
        "test_crashes": "started",
    }
    assert "assert 1 == 2" in entries(log)["test_fails"]["message"]
    assert "no device" in entries(log)["test_skips"]["message"]
    result = run("--log-json", str(log))  # goes on behind the one that crashed
    assert result.returncode == 0 and "1 passed, 4 deselected" in result.stdout, result.stdout
    assert entries(log)["test_after"]["outcome"] == "passed"
    assert run("--log-json", str(log)).returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_log_of_a_lost_device(project):
    """A failure that loses the device ends the process, so that others are not blamed for it."""
    root, run = project
    (root / "tests" / "test_one.py").write_text(
        "import torch\n"
        "def lost(): raise RuntimeError('CUDA error: an illegal memory access')\n"
        "def test_first():\n"
        "    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, lost\n"
        "    torch.cuda.synchronize()\n"
        "def test_second(): pass\n"
    )
    log = root / "log.jsonl"
    run("--log-json", str(log))
    assert entries(log)["test_first"]["device_lost"] and "test_second" not in entries(log)
    assert run("--log-json", str(log)).returncode == 0
    assert entries(log)["test_second"]["outcome"] == "passed"


def test_commit_without_git(monkeypatch):
    options = loaded(CONFTEST)

    def no_git(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(options.subprocess, "run", no_git)
    monkeypatch.setenv("PYSEG_COMMIT", "abc123")
    assert options._commit() == "abc123"
    monkeypatch.delenv("PYSEG_COMMIT")
    assert options._commit() is None
