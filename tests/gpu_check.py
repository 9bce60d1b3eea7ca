"""Everything that a machine with a GPU can say about pyseg, in parts of a few minutes each.

    python tests/gpu_check.py [--out FOLDER] [--seconds N] [--wheel FILE] [--rehearse] [PART…]

    smoke       the wheel loads there, and segments an image as the CPU does
    tests       pytest -m gpu: a process per file, and another where one loses the device
    sanitizers  compute-sanitizer: memcheck, racecheck, synccheck, initcheck on small cases
    benchmarks  times, with peers
    profile     Nsight Compute on every kernel of ours, where it is installed

It checks the CUDA wheel in dist/, which `make release` makes on any machine with nvcc, and compiles
nothing: needs this folder, Python >= 3.11, torch >= 2.10 of the wheel's CUDA release, torchvision,
scipy, pillow, safetensors, pytest and pytest-benchmark, and uses pytest-timeout, Triton,
torchmetrics, compute-sanitizer and ncu where they are. No network, no data, no git (PYSEG_COMMIT
is the commit).

Every result is in the folder as soon as it is known: machine.json, steps.jsonl, tests.jsonl,
sanitizers.jsonl, benchmarks.jsonl, the baseline to keep in benchmarks/results/, logs.tar.gz.
With --seconds the call ends by then, and names what it has not done. --rehearse runs all of it on
the CPU, without kernels: it finds mistakes of the scripts, and says nothing of a GPU.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
import source_digest  # noqa: E402

WORK = ROOT / "build" / "gpu-check-work"
SITE = WORK / "site"  # where the wheel is installed
LOGS = WORK / "logs"
LIMITS = {"smoke": 120, "tests": 480, "sanitizers": 480, "benchmarks": 480, "profile": 480}

MACHINE = """
import datetime, importlib.util, json, os, platform, re, sys
from pathlib import Path
import torch
import pyseg.ops
from pyseg import _native

def read(path, pattern):
    try:
        found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None

status = _native.status()
machine = {
    "pyseg": str(Path(pyseg.__file__).parent),
    "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
    "cpu": read("/proc/cpuinfo", r"^model name\\s*: (.+)$"), "cores": os.cpu_count(),
    "driver": read("/proc/driver/nvidia/version", r"Kernel Module\\D*([\\d.]+)"),
    "simd": status["simd"], "cuda_problem": status["cuda_problem"],
    "date": datetime.date.today().isoformat(),
    "modules": {name: importlib.util.find_spec(name) is not None
                for name in ("pytest_timeout", "triton", "torchmetrics", "cv2")},
}
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    machine.update(device=gpu.name, capability=f"{gpu.major}.{gpu.minor}",
                   multiprocessors=gpu.multi_processor_count, memory=gpu.total_memory,
                   l2=gpu.L2_cache_size)
json.dump(machine, sys.stdout)
"""

SMOKE = """
import json, sys
from pathlib import Path
import torch
import pyseg
from pyseg.image import read_image

device = sys.argv[1]
image = read_image(Path(pyseg.__file__).parent / "assets" / "street.jpg")
agreement = {}
host = pyseg.build("streetnet+crf")
there = pyseg.build("streetnet+crf", device=device)
for stage, expected, got in zip(("streetnet", "crf"), host.run_stages(image),
                                there.run_stages(image), strict=True):
    same = (expected.labels == got.labels.cpu()).double().mean().item()
    agreement[stage] = round(same, 6)
    assert expected.labels.unique().numel() > 5, "nothing was segmented"
print(json.dumps({"device": device, "pixels_as_on_the_cpu": agreement}))
assert min(agreement.values()) > 0.999, agreement
"""

# A fault to find: a memcheck that is silent about it, or skips all kernels, proves nothing.
PLANTED = """
import torch, triton
import triton.language as tl

@triton.jit
def planted_cu_write(pointer, size: tl.constexpr):
    tl.store(pointer + tl.arange(0, size), 1.0)

planted_cu_write[(1,)](torch.zeros(4, device="cuda"), 1024)
torch.cuda.synchronize()
"""

# new_empty filled with NaN, as the tests have it, would be initialised memory.
UNFILLED = "import torch.utils.deterministic as d; d.fill_uninitialized_memory = False; "
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Part of every mangled name of ours: local to a file x.cu, or in our namespace.
OUR_KERNELS = ("_cu_", "pyseg")
NCU = ["--clock-control", "none", "--target-processes", "all", "--kernel-name-base", "mangled"]
NCU += ["--kernel-name", f"regex:({'|'.join(OUR_KERNELS)})", "--launch-count", "40"]
NCU += ["--section", "SpeedOfLight", "--section", "Occupancy", "--section", "LaunchStats"]
NCU += ["--csv", "--page", "raw"]


class Check:
    """One call: its folder, its time, and its verdict."""

    def __init__(self, options):
        self.out = Path(options.out).resolve()
        self.rehearse = options.rehearse
        self.python = sys.executable
        self.end = time.monotonic() + (options.seconds or 1e9)
        self.problems = []
        self.lock = threading.Lock()
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")])),
            "PYTHONSAFEPATH": "1",  # else `python -m pytest` finds the sources, which are not built
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 4)),
            "TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor"),
        }
        for folder in (self.out, LOGS):
            folder.mkdir(parents=True, exist_ok=True)

    def note(self, log, /, **entry):
        with self.lock, (self.out / log).open("a") as stream:
            stream.write(json.dumps(entry) + "\n")

    def new_log(self, name):
        (self.out / name).unlink(missing_ok=True)
        return self.out / name

    def fail(self, text):
        with self.lock:
            self.problems.append(text)
        print(f"  FAILED {text}", flush=True)

    def left(self, limit):
        """Seconds, less what stopping and packing take."""
        return min(limit, self.end - time.monotonic() - 8)

    def run(self, name, command, limit, environment=None, quiet=False):
        """Runs it for at most so long, its output in a log. Returns the exit code and the text."""
        log = LOGS / f"{name}.log"
        seconds = self.left(limit)
        if seconds < 5:
            self.note("steps.jsonl", step=name, exit=None, not_run="no time was left")
            self.fail(f"{name}: not run, no time was left")
            return None, ""
        start = time.monotonic()
        with log.open("ab") as stream:
            offset = stream.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**self.environment, **(environment or {})},
                start_new_session=True,
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = "time limit"
                stop(process)
        text = log.read_bytes()[offset:].decode(errors="replace")
        took = round(time.monotonic() - start, 1)
        self.note("steps.jsonl", step=name, exit=code, seconds=took)
        self.pack()
        if not quiet:
            print(f"  {name}: exit {code}, {took:.0f} s", flush=True)
        return code, text

    def pack(self):
        """Logs in one file, again after every step: a few files travel better than a hundred."""
        with self.lock:
            partial = self.out / "logs.tar.gz.partial"
            with tarfile.open(partial, "w:gz", compresslevel=1) as archive:
                archive.add(LOGS, "logs")
            partial.replace(self.out / "logs.tar.gz")

    # -- before everything

    def install(self, wheel):
        if wheel is None:
            wheels = sorted(
                (ROOT / "dist").glob("pyseg_toolkit-*.whl"),
                key=lambda path: ("+cu" in path.name, path.stat().st_mtime),
            )
            if not wheels:
                sys.exit(
                    "gpu-check needs a wheel in dist/: run `make release` where nvcc is (no GPU is "
                    "needed for that), and bring dist/ here"
                )
            wheel = wheels[-1]
        wheel = Path(wheel).resolve()
        print(f"== {wheel.name}", flush=True)
        shutil.rmtree(SITE, ignore_errors=True)
        pip = [self.python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
        code, text = self.run("install", [*pip, "--target", str(SITE), str(wheel)], 120, quiet=True)
        if code != 0:
            sys.exit(f"pip cannot install {wheel}: {text}")
        with zipfile.ZipFile(wheel) as archive:
            libraries = {
                Path(name).name: source_digest.built_from(archive.read(name))
                for name in archive.namelist()
                if name.endswith(".so")
            }
        self.machine = self.look()
        self.machine["wheel"] = {
            "name": wheel.name,
            "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "sources_here": source_digest.digest(),
            "libraries_built_from": libraries,
        }
        (self.out / "machine.json").write_text(json.dumps(self.machine, indent=1) + "\n")
        print(json.dumps(self.machine, indent=1), flush=True)
        stale = [name for name, stamp in libraries.items() if stamp != source_digest.digest()]
        if stale:
            sys.exit(f"{', '.join(stale)} is not built from the sources here: `make release` again")

    def look(self):
        code, text = self.run("machine", [self.python, "-c", MACHINE], 100, quiet=True)
        if code != 0:
            sys.exit(f"the wheel does not load: {text}")
        machine = json.loads(text.splitlines()[-1])
        commit = os.environ.get("PYSEG_COMMIT")
        git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        if not commit and shutil.which("git"):
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        machine.update(commit=commit or None, rehearsal=self.rehearse)
        if Path(machine["pyseg"]) != SITE / "pyseg":
            sys.exit(f"{machine['pyseg']} was imported, not the wheel in {SITE}")
        if machine["cuda_problem"] and not self.rehearse:
            sys.exit(f"no CUDA kernels: {machine['cuda_problem']}")
        if not self.rehearse and "device" not in machine:
            sys.exit("gpu-check needs a CUDA device, and torch sees none; --rehearse does without")
        return machine

    # -- the parts

    def smoke(self):
        device = "cpu" if self.rehearse else "cuda"
        code, text = self.run("smoke", [self.python, "-c", SMOKE, device], 100)
        print(text.strip()[-2000:], flush=True)
        if code != 0:
            self.fail("smoke")
        self.run("doctor", [self.python, "-m", "pyseg", "doctor"], 60)  # for its log alone

    def pytest(self, *arguments, timeout=60, runner=("-m", "pytest")):
        command = [self.python, *runner, "-q", "-p", "no:cacheprovider", *map(str, arguments)]
        if self.machine["modules"]["pytest_timeout"]:  # a hang in a kernel heeds no signal
            command += ["--timeout", str(timeout), "--timeout-method", "thread"]
        return command

    def until_all_ran(self, name, files, command, log, limit):
        """Again as long as a process ends early and the tests behind the culprit are still due."""

        def begun():
            return {test: e for test, e in last_entries(log).items() if test.startswith(files)}

        for _ in range(12):
            before = begun()
            code, text = self.run(name, [*command, "--log-json", str(log), *files], limit)
            new = {test: entry for test, entry in begun().items() if test not in before}
            unfinished = any(entry["outcome"] == "started" for entry in new.values())
            # 1 is also what pytest-timeout ends with
            if code in (0, 5, None) or (code == 1 and not unfinished) or not new:
                break
        blamed = any(e["outcome"] in ("failed", "started") for e in begun().values())
        if code not in (0, 5, None) and not (code == 1 and blamed):
            self.fail(f"{name}: exit {code}: {text.strip()[-400:]}")

    def collected(self, *arguments):
        """Ids of tests by file."""
        command = self.pytest("--collect-only", *arguments)
        code, text = self.run("collect", command, 120, quiet=True)
        files = {}
        for line in text.splitlines():
            if "::" in line and not line.startswith(("ERROR", "FAILED")):
                files.setdefault(line.split("::")[0], []).append(line)
        if code != 0 or not files:
            self.fail(f"collection, exit {code}: {text.strip()[-800:]}")
        return files

    def tests(self):
        log = self.new_log("tests.jsonl")
        if self.rehearse:  # the CPU kernels, and that those of the GPU are skipped, not broken
            select = ["-m", "not slow", "-k", "not emulated", "-p", "no:benchmark"]
        else:
            select = ["-m", "gpu", "-p", "no:benchmark"]
        files = self.collected(*select, "tests/ops")
        with concurrent.futures.ThreadPoolExecutor(2 if self.rehearse else 4) as pool:
            done = [
                pool.submit(
                    self.until_all_ran,
                    f"tests-{Path(file).stem.removeprefix('test_')}",
                    (file,),
                    self.pytest(*select, timeout=120 if self.rehearse else 60),
                    log,
                    300,
                )
                for file in files
            ]
        for future in done:
            future.result()
        self.summarise(log, [test for ids in files.values() for test in ids])

    def summarise(self, log, wanted):
        """Counts outcomes; whatever did not end is a failure."""
        entries = last_entries(log)
        counts = Counter(entry["outcome"] for entry in entries.values())
        missing = [test for test in wanted if test not in entries]
        counts["crashed or timed out"] = counts.pop("started", 0)
        counts["not run"] = len(missing)
        self.note("steps.jsonl", summary=log.name, **{k: v for k, v in counts.items() if v})
        print("  " + ", ".join(f"{n} {what}" for what, n in counts.items() if n), flush=True)
        for test, entry in entries.items():
            if entry["outcome"] in ("failed", "started"):
                text = entry.get("message", "crashed or timed out").splitlines()
                self.fail(f"{test}: {' '.join(text)[:200]}")
        if missing:
            self.fail(f"{len(missing)} were not run: {', '.join(missing[:5])} …")
        if not self.rehearse and not counts["passed"]:
            self.fail(f"{log.name}: nothing passed")

    def sanitizers(self):
        found = tool_path("compute-sanitizer", "/usr/local/cuda*/bin")
        if found is None and not self.rehearse:
            return self.fail("sanitizers: compute-sanitizer is not installed")
        self.new_log("sanitizers.jsonl")
        files = self.collected("-m", "gpu", "-k", "small", "-p", "no:benchmark", "tests/ops")
        chosen = {file: first_middle_last(ids) for file, ids in files.items()}
        if self.rehearse:
            found = None
        elif self.machine["modules"]["triton"]:
            self.planted_fault(found)
        tools = SANITIZERS[:1] if self.rehearse else SANITIZERS
        jobs = [(tool, file, ids) for tool in tools for file, ids in chosen.items()]
        with concurrent.futures.ThreadPoolExecutor(2 if self.rehearse else 6) as pool:
            list(pool.map(functools.partial(self.sanitize, found), *zip(*jobs, strict=True)))
        return None

    def planted_fault(self, sanitizer):
        script = WORK / "planted.py"
        script.write_text(PLANTED)
        command = [*sanitizer_command(sanitizer, "memcheck"), self.python, str(script)]
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        code, text = self.run("planted-fault", command, 100, environment)
        found = code == 9 and "Invalid __global__ write" in text
        self.note("sanitizers.jsonl", tool="memcheck", file="a planted fault", found=found)
        if not found:
            self.fail("memcheck does not find a planted fault: its silence would prove nothing")

    def sanitize(self, sanitizer, tool, file, ids):
        name = f"{tool}-{Path(file).stem.removeprefix('test_')}"
        start = f"{UNFILLED if tool == 'initcheck' else ''}import sys, pytest; "
        runner = ("-c", f"{start}sys.exit(pytest.console_main())")
        command = self.pytest("-p", "no:benchmark", "-rs", *ids, timeout=100, runner=runner)
        if sanitizer:
            command = [*sanitizer_command(sanitizer, tool), *command]
        environment = {}
        if tool in ("memcheck", "initcheck"):  # else it sees segments of 2 MB for allocations
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        code, text = self.run(name, command, 150, environment)
        summary = re.findall(r"(ERROR|RACECHECK) SUMMARY: (\d+)", text)
        passed = re.search(r"(\d+) passed", text)
        entry = {
            "tool": tool,
            "file": file,
            "exit": code,
            "cases": len(ids),
            "passed": int(passed[1]) if passed else 0,
            "errors": sum(int(count) for _, count in summary) if summary else None,
        }
        self.note("sanitizers.jsonl", **entry)
        if self.rehearse:
            if code != 0 or f"{len(ids)} skipped" not in text:
                self.fail(f"{name}: {text.strip()[-400:]}")
        elif code != 0 or entry["errors"] != 0 or entry["passed"] != len(ids):
            lines = [line for line in text.splitlines() if line.startswith("=========")]
            self.fail(f"{name}: {json.dumps(entry)} {' '.join(lines[:4])[:400]}")

    def benchmark_files(self):
        files = sorted((ROOT / "benchmarks").glob("*.py"))
        found = [file for file in files if "def test_cuda" in file.read_text()]
        return [file.relative_to(ROOT).as_posix() for file in found]

    def benchmarks(self):
        """One after the other, alone on the device."""
        log = self.new_log("benchmarks.jsonl")
        files = self.benchmark_files()
        options = ["--benchmark", "-p", "benchmark", "-m", "gpu"]
        wanted = self.collected(*options, *files)
        options += ["--rehearse"] if self.rehearse else []
        command = self.pytest(*options, timeout=240 if self.rehearse else 120)
        workers = 2 if self.rehearse else 1
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            parts = [tuple(files[k::workers]) for k in range(workers)]
            jobs = [
                pool.submit(self.until_all_ran, f"benchmarks-{k}", part, command, log, 1e9)
                for k, part in enumerate(parts)
            ]
        for job in jobs:
            job.result()
        results = [e["benchmark"] | e for e in last_entries(log).values() if "benchmark" in e]
        for entry in sorted(results, key=lambda entry: entry["test"]):
            goal = f", goal {entry['goal_ms']:g}" if entry["goal_ms"] else ""
            print(
                f"  {entry['ours_ms']:9.4f} ms{goal}  {entry['ratio']:6.2f} x {entry['peer']} "
                f"({entry['ours_how']}/{entry['peer_how']}; eager {entry['ours_eager_ms']:.4f})  "
                f"{entry['test'].removeprefix('benchmarks/')}",
                flush=True,
            )
        self.keep_baseline(results)
        self.summarise(log, [test for ids in wanted.values() for test in ids])

    def keep_baseline(self, results):
        """In the form of benchmarks/results/."""
        if not results:
            return
        slug = re.sub(r"[^a-z0-9]+", "-", results[0]["device"].lower()).strip("-")
        release = self.machine["torch"].split("+")[0]
        facts = {
            key: self.machine[key] for key in ("date", "commit", "cpu", "cores", "torch", "python")
        }
        names = {"test", "outcome", "seconds", "benchmark"}
        found = {
            entry["test"].removeprefix("benchmarks/").replace(".py::", "::"): {
                key: value for key, value in entry.items() if key not in names
            }
            for entry in results
        }
        text = json.dumps({**facts, "results": dict(sorted(found.items()))}, indent=1)
        (self.out / f"{slug}-torch{release}.json").write_text(text + "\n")

    def profile(self):
        if self.rehearse:
            return print("  nothing to rehearse", flush=True)
        ncu = tool_path("ncu", "/usr/local/cuda*/bin", "/opt/nvidia/nsight-compute/*")
        if ncu is None:
            return print("  ncu is not installed", flush=True)
        options = ["--benchmark", "-p", "benchmark", "-m", "gpu", "--benchmark-disable"]
        for file in self.benchmark_files():
            command = [ncu, *NCU, *self.pytest(*options, file, timeout=200)]
            name = f"profile-{Path(file).stem}"
            code, text = self.run(name, command, 90)
            if "launch__registers_per_thread" not in text:
                self.fail(f"{name}: no kernel was profiled, exit {code}")
        return None


def stop(process):
    """The process and all that it started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)


def last_entries(log):
    lines = log.read_text().splitlines() if log.exists() else []
    return {entry["test"]: entry for entry in map(json.loads, lines)}


def tool_path(name, *folders):
    found = [shutil.which(name)]
    for folder in folders:
        found += [str(path) for path in sorted(Path("/").glob(f"{folder.lstrip('/')}/{name}"))]
    return next((path for path in found if path), None)


def sanitizer_command(path, tool):
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    for part in OUR_KERNELS:
        options += ["--kernel-name", f"kns={part}"]
    return [path, *options]


def first_middle_last(ids):
    """Of every test function three cases."""
    functions = {}
    for test in ids:
        functions.setdefault(test.split("[")[0], []).append(test)
    chosen = []
    for cases in functions.values():
        chosen += [cases[k] for k in sorted({0, len(cases) // 2, len(cases) - 1})]
    return chosen


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", choices=[[], *LIMITS])
    parser.add_argument("--out", default=str(ROOT / "build" / "gpu-check"))
    parser.add_argument("--seconds", type=float, help="the call ends by then")
    parser.add_argument("--wheel", help="default: of dist/, that with CUDA")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    check = Check(options)
    check.install(options.wheel)
    last = check.end
    for part in options.parts or LIMITS:
        print(f"== {part}", flush=True)
        check.end = min(last, time.monotonic() + LIMITS[part] * (10 if check.rehearse else 1))
        try:
            getattr(check, part)()
        except Exception as error:  # the other parts are still worth their time
            traceback.print_exc()
            check.fail(f"{part}: {error!r}")
    for problem in check.problems:
        print(f"FAILED {problem}")
    if check.rehearse:
        print("REHEARSAL on the CPU: no kernel ran on a GPU")
    print("gpu-check:", f"{len(check.problems)} problems" if check.problems else "all well")
    sys.exit(1 if check.problems else 0)


if __name__ == "__main__":
    main()
