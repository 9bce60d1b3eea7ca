"""`pytest --benchmark` runs benchmarks/ instead of the tests, and compares us with our peers.

A benchmark calls a fixture of benchmarks/conftest.py: `compare`, on a GPU `gpu.compare`. Each run
is stored in .benchmarks/; benchmarks/results/ holds the committed baselines, one per processor or
GPU and torch version, which `--save-baseline` writes. What fails the run: a ratio more than 20 %
under the baseline, and a SIMD level that is more than 5 % slower than a lower one.

Tests here and of the plugins get `data_folder`.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
DATA = Path(os.environ.get("PYSEG_TEST_DATA", ROOT.parent / "shared" / "data"))
TOLERATED_LOSS = 0.2
RESULTS = pytest.StashKey[dict]()
PROBLEMS = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def data_folder():
    """``data_folder("camvid/val")``: that part of the test data; without it the test is skipped."""

    def find(name):
        if not (DATA / name).is_dir():
            pytest.skip(f"no test data at {DATA / name}: set PYSEG_TEST_DATA")
        return DATA / name

    return find


def _part(text):
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with K from 1 to N")
    return int(number) - 1, int(parts)


def pytest_addoption(parser):
    group = parser.getgroup("pyseg")
    group.addoption("--benchmark", action="store_true", help="run benchmarks/, not the tests")
    group.addoption(
        "--save-baseline",
        action="store_true",
        help="with --benchmark: make this run the baseline of this processor and torch",
    )
    group.addoption(
        "--rehearse",
        action="store_true",
        help="with --benchmark: GPU benchmarks run once on the CPU, are checked and not timed",
    )
    group.addoption(
        "--part",
        metavar="K/N",
        type=_part,
        help="of N parts of the tests that were chosen the Kth, from 1 on",
    )
    group.addoption(
        "--log-json",
        metavar="FILE",
        help="append a line for every test that begins and ends, with what a benchmark measured; "
        "tests that FILE has already do not run again",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.stash[RESULTS] = {}
    config.stash[PROBLEMS] = []
    if config.option.log_json and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Log(Path(config.option.log_json)))
    if not config.option.benchmark:
        for option in ("save_baseline", "rehearse"):
            if getattr(config.option, option):
                raise pytest.UsageError(f"--{option.replace('_', '-')} needs --benchmark")
        return
    if config.option.save_baseline and "PYSEG_SIMD" in os.environ:
        raise pytest.UsageError("--save-baseline is of every SIMD level: unset PYSEG_SIMD")
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            "--benchmark needs pytest-benchmark: pip install 'pyseg-toolkit[bench]'"
        )
    config.option.benchmark_quiet = True  # our table says it shorter; -v prints the plugin's too
    if config.args_source is not config.ArgsSource.ARGS:
        config.args = [str(ROOT / "benchmarks")]


def _is_benchmark(path):
    inside = path.parent == ROOT / "benchmarks"
    return inside and path.suffix == ".py" and path.name != "conftest.py"


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    if not config.option.benchmark:  # not even where the command line names the file
        items[:] = [item for item in items if not _is_benchmark(item.path)]
    if config.option.part is not None:
        first, step = config.option.part
        config.hook.pytest_deselected(items=[x for k, x in enumerate(items) if k % step != first])
        items[:] = items[first::step]


def pytest_collect_file(file_path, parent):
    # A file named on the command line is collected by pytest itself, whatever its name. The others
    # of benchmarks/ are commands, which import one another as Python runs them.
    named = parent.session.isinitpath(file_path)
    if _is_benchmark(file_path) and not named and "\ndef test_" in file_path.read_text("utf-8"):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def _cpu_model():
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit():
    """Of git, or of PYSEG_COMMIT where the sources came without their history."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git here
        return os.environ.get("PYSEG_COMMIT")
    return found.stdout.strip() or os.environ.get("PYSEG_COMMIT")


def _file_name(processor, torch_version):
    slug = re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-")
    return f"{slug}-torch{torch_version}.json"


class Log:
    """Writes what is known at once, so that neither a crash nor a time limit takes it away."""

    def __init__(self, path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.known = {json.loads(line)["test"] for line in lines}
        self.reports = []

    def write(self, **entry):
        with self.path.open("a") as file:  # one write, so that processes may share the file
            file.write(json.dumps(entry) + "\n")

    def pytest_sessionstart(self, session):
        self.session = session

    def pytest_collection_modifyitems(self, config, items):
        again = [item for item in items if item.nodeid in self.known]
        if again:
            config.hook.pytest_deselected(items=again)
            items[:] = [item for item in items if item.nodeid not in self.known]

    def pytest_runtest_logstart(self, nodeid):
        self.reports = []
        self.write(test=nodeid, outcome="started")

    def pytest_runtest_logreport(self, report):
        self.reports.append(report)
        if report.when != "teardown":
            return
        outcomes = [r.outcome for r in self.reports]
        outcome = next((o for o in ("failed", "skipped") if o in outcomes), "passed")
        entry = {
            "test": report.nodeid,
            "outcome": outcome,
            "seconds": round(sum(r.duration for r in self.reports), 3),
            **dict(report.user_properties),
        }
        culprit = next((r for r in self.reports if r.outcome == outcome != "passed"), None)
        if culprit is not None:
            crash = getattr(culprit.longrepr, "reprcrash", None)
            text = crash.message if crash else str(culprit.longrepr)
            entry["message"] = text[:1000]
        if outcome == "failed" and _device_is_lost():
            entry["device_lost"] = True
            self.session.shouldstop = "the device is lost to this process: run again for the rest"
        self.write(**entry)


def _device_is_lost():
    """After an illegal access or a trap every further CUDA call of the process fails."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _untimed(config):
    return config.option.rehearse or getattr(config.option, "benchmark_disable", False)


def pytest_runtest_teardown(item):
    """Takes what the fixtures of benchmarks/conftest.py noted."""
    for key, value in item.user_properties:
        if key.startswith("benchmark"):
            name = f"{item.path.stem}::{item.name}{key.removeprefix('benchmark')}"
            item.config.stash[RESULTS][name] = value
        elif key == "slower":
            item.config.stash[PROBLEMS].append(value)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info):
    machine_info.pop("node", None)  # stored runs hold no host name


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if not config.option.benchmark or config.option.collectonly:
        return
    results, problems = config.stash[RESULTS], config.stash[PROBLEMS]
    config.benchmark_files = []
    for device in sorted({entry["device"] for entry in results.values()}):
        these = {name: entry for name, entry in results.items() if entry["device"] == device}
        config.benchmark_files.append(_store(config, device, these))
    if not results and not _untimed(config):
        problems.append("no benchmark ran: nothing was compared")
    if problems and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _store(config, device, results):
    """Writes the results of one device, as its baseline or beside it; returns the file."""
    import torch

    from pyseg import _native

    # The best level, too: the name that a virtual machine has may stand for several generations.
    processor = f"{_cpu_model()} {_native.simd_level()}" if device == "cpu" else device
    name = _file_name(processor, torch.__version__.split("+")[0])
    baseline_path = ROOT / "benchmarks" / "results" / name
    stored = json.loads(baseline_path.read_text()) if baseline_path.exists() else {}
    baseline = stored.get("results", {})
    now = datetime.datetime.now(datetime.timezone.utc)
    run = {
        "date": f"{now:%Y-%m-%d}",
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "results": dict(sorted(results.items())),
    }
    if config.option.save_baseline:
        run["results"] = dict(sorted({**baseline, **results}.items()))
        path = baseline_path
    else:
        config.stash[PROBLEMS] += _losses(results, baseline)
        path = ROOT / ".benchmarks" / f"{now:%Y%m%dT%H%M%S}-{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1) + "\n")
    return path.relative_to(ROOT)


def _losses(results, baseline):
    for name, entry in results.items():
        before = baseline.get(name)
        same = before and all(before[key] == entry[key] for key in ("threads", "device", "peer"))
        if same and entry["ratio"] < (1 - TOLERATED_LOSS) * before["ratio"]:
            yield (
                f"{name}: {entry['ratio']:.1f} x {entry['peer']}, more than "
                f"{TOLERATED_LOSS:.0%} under the baseline of {before['ratio']:.1f} x; repeat it on "
                "an idle machine, and look for what made it slower"
            )


def pytest_terminal_summary(terminalreporter, config):
    results, problems = config.stash[RESULTS], config.stash[PROBLEMS]
    if results:
        terminalreporter.section("ratios")
        width = max(len(name) for name in results)
        header = f"{'':{width}}  {'ours ms':>9}  {'peer ms':>9}  {'ratio':>7}  {'goal':>8}  peer"
        terminalreporter.write_line(header)
        for name, entry in sorted(results.items()):
            goal, goal_ms = entry["goal"], entry.get("goal_ms")
            missed = (goal is not None and entry["ratio"] < goal) or (
                goal_ms is not None and entry["ours_ms"] > goal_ms
            )
            wanted = "" if goal is None else f"{goal:g}x"
            wanted = wanted if goal_ms is None else f"{goal_ms:g} ms"
            terminalreporter.write_line(
                f"{name:{width}}  {entry['ours_ms']:9.3f}  {entry['peer_ms']:9.3f}  "
                f"{entry['ratio']:6.1f}x  {wanted:>8}  {entry['peer']}",
                yellow=missed,
            )
        for path in config.benchmark_files:
            terminalreporter.write_line(f"stored in {path}")
    if config.option.rehearse:
        terminalreporter.write_line(
            "rehearsal on the CPU: no kernel ran on a GPU, nothing was timed"
        )
    for problem in problems:
        terminalreporter.write_line(problem, red=True)
