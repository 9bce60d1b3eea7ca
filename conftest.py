"""`pytest --benchmark` runs benchmarks/ instead of the tests, and compares us with our peers.

A benchmark calls the fixture `compare`. Each run is stored in .benchmarks/; benchmarks/results/
holds the committed baselines, one per processor and torch version, which `--save-baseline` writes.
A ratio more than 20 % under the baseline fails the run.
"""

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
TOLERATED_LOSS = 0.2
RESULTS = pytest.StashKey[dict]()
PROBLEMS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("pyseg")
    group.addoption("--benchmark", action="store_true", help="run benchmarks/, not the tests")
    group.addoption(
        "--save-baseline",
        action="store_true",
        help="with --benchmark: make this run the baseline of this processor and torch",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.stash[RESULTS] = {}
    config.stash[PROBLEMS] = []
    if not config.option.benchmark:
        if config.option.save_baseline:
            raise pytest.UsageError("--save-baseline needs --benchmark")
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            "--benchmark needs pytest-benchmark: pip install 'pyseg-toolkit[bench]'"
        )
    config.option.benchmark_quiet = True  # our table says it shorter; -v prints the plugin's too
    if config.args_source is not config.ArgsSource.ARGS:
        config.args = [str(ROOT / "benchmarks")]


def _is_benchmark(path):
    return path.suffix == ".py" and path.parent == ROOT / "benchmarks"


def pytest_collection_modifyitems(config, items):
    if not config.option.benchmark:  # not even where the command line names the file
        items[:] = [item for item in items if not _is_benchmark(item.path)]


def pytest_collect_file(file_path, parent):
    # A file named on the command line is collected by pytest itself, whatever its name.
    if _is_benchmark(file_path) and not parent.session.isinitpath(file_path):
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
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() or None


def _file_name(torch_version):
    slug = re.sub(r"[^a-z0-9]+", "-", _cpu_model().lower()).strip("-")
    return f"{slug}-torch{torch_version}.json"


@pytest.fixture
def compare(request, benchmark):
    """``compare(ours=f, peer=g, peer_name="…", threads=1, …)`` times both, interleaved.

    Args of the returned function:
        ours, peer: functions without arguments that do the same work on the same inputs.
        peer_name: what ``peer`` is, for the table.
        threads: torch's number of threads for both.
        goal: the ratio (the peer's median / ours) that we want here; printed, not enforced.
        check: called with both results before timing; it asserts that they agree.
        rounds: repetitions, each of which runs the peer and then us.
        device: with "cuda" a repetition is 50 calls without a pause, and waits for the device.
    """
    import torch

    def run(*, ours, peer, peer_name, threads, goal=None, check=None, rounds=7, device="cpu"):
        calls = 50 if device == "cuda" else 1
        peer_seconds = []

        def repeat(function):
            for _ in range(calls):
                function()
            if device == "cuda":
                torch.cuda.synchronize()

        def time_the_peer():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            repeat(peer)
            peer_seconds.append(time.perf_counter() - start)

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            result, expected = ours(), peer()  # warms up, too
            if check is not None:
                check(result, expected)
            benchmark.pedantic(lambda: repeat(ours), setup=time_the_peer, rounds=rounds)
        finally:
            torch.set_num_threads(before)
        if benchmark.stats is None:  # --benchmark-disable
            return
        ours_ms = 1e3 * benchmark.stats.stats.median / calls
        peer_ms = 1e3 * statistics.median(peer_seconds) / calls
        entry = {
            "ours_ms": round(ours_ms, 5),
            "peer": peer_name,
            "peer_ms": round(peer_ms, 5),
            "ratio": round(peer_ms / ours_ms, 3),
            "goal": goal,
            "threads": threads,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        }
        benchmark.extra_info.update(
            entry,
            cpu=_cpu_model(),
            torch=torch.__version__,
            peer_rounds_ms=[1e3 * s / calls for s in peer_seconds],
        )
        request.config.stash[RESULTS][f"{request.path.stem}::{request.node.name}"] = entry

    return run


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info):
    machine_info.pop("node", None)  # stored runs hold no host name


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if not config.option.benchmark or config.option.collectonly:
        return
    results, problems = config.stash[RESULTS], config.stash[PROBLEMS]
    if results:
        import torch

        name = _file_name(torch.__version__.split("+")[0])
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
            problems += _losses(results, baseline)
            path = ROOT / ".benchmarks" / f"{now:%Y%m%dT%H%M%S}-{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run, indent=1) + "\n")
        config.stash[PROBLEMS] = problems
        config.benchmark_file = path.relative_to(ROOT)
    elif not getattr(config.option, "benchmark_disable", False):
        problems.append("no benchmark ran: nothing was compared")
    if problems and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


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
        header = f"{'':{width}}  {'ours ms':>9}  {'peer ms':>9}  {'ratio':>7}  {'goal':>5}  peer"
        terminalreporter.write_line(header)
        for name, entry in sorted(results.items()):
            goal = "" if entry["goal"] is None else f"{entry['goal']:g}"
            terminalreporter.write_line(
                f"{name:{width}}  {entry['ours_ms']:9.3f}  {entry['peer_ms']:9.3f}  "
                f"{entry['ratio']:6.1f}x  {goal:>5}  {entry['peer']}",
                yellow=entry["goal"] is not None and entry["ratio"] < entry["goal"],
            )
        terminalreporter.write_line(f"stored in {config.benchmark_file}")
    for problem in problems:
        terminalreporter.write_line(problem, red=True)
