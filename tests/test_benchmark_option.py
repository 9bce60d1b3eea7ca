"""The option --benchmark of the root conftest.py, on a small project of its own."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
pytestmark = pytest.mark.skipif(not CONFTEST.exists(), reason="outside the source tree")

BENCHMARK = """
import pytest

@pytest.mark.parametrize("threads", [1])
def test_sum(compare, threads):
    def check(ours, peer):
        assert ours == peer, "results differ"
    compare(ours=lambda: sum(range({n})), peer=lambda: sum(range(200_000)) * {factor},
            peer_name="a long sum", threads=threads, goal=2.5, check=check)
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
