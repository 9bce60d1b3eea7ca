"""`python -m tests.fuzz`: random calls of every op, checked against something independent.

    python -m tests.fuzz --cases 100000            two processes, every SIMD level of the processor
    python -m tests.fuzz --seed 7 --op roi_align   one op
    python -m tests.fuzz --seed 7 --op roi_align --case 1234 --level v3   what a failure prints

Cases run in processes made by fork, a few hundred in each, so that a crash ends only one of them
and is put down to its case; one that takes longer than a minute is stopped and counts as a failure.
An interrupted run prints where to go on.
"""

import argparse
import mmap
import os
import select
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

import torch

from . import crf, files, labels, logits, regions  # noqa: F401  (they register their ops)
from .draw import OPS, Draw
from .memory import GuardedMemory

CHUNK = 250  # cases that a process makes
PATIENCE = 60.0  # the processor's seconds for a case, so that a busy machine fails none
WAITING = 10  # times as long by the clock, for one that hangs without doing anything
LEVELS = ("v4", "v3", "generic")


def levels() -> list[str]:
    """The processor's, the best first."""
    best = next((k for k in LEVELS if k in str(torch.ops.pyseg.simd_level())), "generic")
    return list(LEVELS[LEVELS.index(best) :])


def name_of(seed: int, case: int, only: str | None) -> str:
    """The op of a case."""
    if only:
        return only
    import numpy as np

    weights = np.array([weight for weight, _ in OPS.values()])
    at = np.random.default_rng([seed, case]).choice(len(OPS), p=weights / weights.sum())
    return list(OPS)[int(at)]


def run_case(name: str, seed: int, case: int, memory: GuardedMemory, note=None) -> str | None:
    """What went wrong, with the arguments; None where nothing did."""
    draw = Draw(name, seed, case, memory, note or (lambda text: None))
    memory.release()
    try:
        OPS[name][1](draw)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(last.filename)}:{last.lineno}"
        what = "" if type(error).__name__ == "Wrong" else f"{type(error).__name__}: "
        return f"{what}{error} ({where})\n    {draw.notes[:2000]}"
    return None


class Worker:
    """A process that runs the cases [first, last) at one level."""

    # In memory that both share: the case in progress, when it began by the clock and by the
    # processor's time of this process, and its call as text.
    PLACE = struct.Struct("qdd")
    TEXT = 2000

    def __init__(self, options, first: int, last: int, level: str) -> None:
        self.level, self.last = level, last
        self._shared = mmap.mmap(-1, self.PLACE.size + self.TEXT)
        self._note(first)
        self.output, write = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.output)
            os.environ["PYSEG_SIMD"] = level
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            memory = GuardedMemory()
            with os.fdopen(write, "w") as output:
                for case in range(first, last):
                    self._note(case)
                    name = name_of(options.seed, case, options.op)
                    problem = run_case(name, options.seed, case, memory, self._note_call)
                    if problem:
                        output.write(f"{case}\x1f{problem}\x1e")
                        output.flush()
                self._note(last)
            os._exit(0)
        os.close(write)
        self._text = b""

    def _note(self, case: int) -> None:
        self._shared[: self.PLACE.size] = self.PLACE.pack(
            case, time.monotonic(), time.process_time()
        )
        self._note_call("")

    def _note_call(self, text: str) -> None:
        self._shared[self.PLACE.size :] = text.encode()[: self.TEXT].ljust(self.TEXT, b"\0")

    def place(self) -> int:
        return self.PLACE.unpack(self._shared[: self.PLACE.size])[0]

    def hangs(self) -> bool:
        _, since, processor_since = self.PLACE.unpack(self._shared[: self.PLACE.size])
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        processor = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        waited = time.monotonic() - since
        return processor - processor_since > PATIENCE or waited > WAITING * PATIENCE

    def call(self) -> str:
        return self._shared[self.PLACE.size :].rstrip(b"\0").decode(errors="replace")

    def read(self) -> bool:
        """Takes what there is of the output; False at its end."""
        part = os.read(self.output, 1 << 16)
        self._text += part
        return bool(part)

    def failures(self) -> list[tuple[int, str]]:
        *whole, self._text = self._text.split(b"\x1e")
        found = [one.decode(errors="replace").split("\x1f", 1) for one in whole]
        return [(int(case), text) for case, text in found]

    def end(self) -> int:
        """Exit status, negative for a signal."""
        os.close(self.output)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Run:
    """All cases of a call, over several workers."""

    def __init__(self, options) -> None:
        self.options = options
        self.levels = [options.level] if options.level else levels()
        self.done = self.failed = 0
        self.began = time.monotonic()
        end = options.first + options.cases
        self.chunks = [
            (first, min(first + CHUNK, end), self.levels[i % len(self.levels)])
            for i, first in enumerate(range(options.first, end, CHUNK))
        ][::-1]
        self.workers: list[Worker] = []

    def run(self) -> int:
        try:
            while self.chunks or self.workers:
                if self.failed and self.options.stop:
                    self._kill()
                    return 1
                while self.chunks and len(self.workers) < self.options.jobs:
                    self.workers.append(Worker(self.options, *self.chunks.pop()))
                self._wait()
        except KeyboardInterrupt:
            first = min([w.place() for w in self.workers] + [c[0] for c in self.chunks])
            rest = self.options.first + self.options.cases - first
            self._kill()
            seed = self.options.seed
            print(f"\ninterrupted; go on with: --seed {seed} --first {first} --cases {rest}")
            return 2
        return 1 if self.failed else 0

    def _kill(self) -> None:
        for worker in self.workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.end()

    def _wait(self) -> None:
        ready, _, _ = select.select([w.output for w in self.workers], [], [], 1.0)
        for worker in list(self.workers):
            going = worker.read() if worker.output in ready else True
            for case, problem in worker.failures():
                self._report(worker, case, problem)
            if not going:
                self._ended(worker)
            elif worker.hangs():
                os.kill(worker.pid, signal.SIGKILL)
                self._ended(worker, f"no end within {PATIENCE:.0f} s")
        self._progress()

    def _ended(self, worker: Worker, problem: str = "") -> None:
        self.workers.remove(worker)
        status, case = worker.end(), worker.place()
        if case == worker.last and status == 0:
            return
        if not problem:
            problem = (
                f"the process died of {signal.Signals(-status).name}"
                if status < 0
                else f"the process ended with {status}"
            )
        self._report(worker, case, f"{problem}\n    {worker.call()}")
        if case + 1 < worker.last:
            self.chunks.append((case + 1, worker.last, worker.level))

    def _report(self, worker: Worker, case: int, problem: str) -> None:
        self.failed += 1
        name = name_of(self.options.seed, case, self.options.op)
        print(
            f"FAILED {name}: {problem}\n    python -m tests.fuzz --seed {self.options.seed} "
            f"--op {name} --case {case} --level {worker.level}",
            flush=True,
        )

    def _progress(self) -> None:
        waiting = sum(b - a for a, b, _ in self.chunks)
        running = sum(w.last - w.place() for w in self.workers)
        done = self.options.cases - waiting - running
        step = max(1, self.options.cases // 20)
        if done >= self.done + step or self.done < done == self.options.cases:
            self.done = done
            rate = done / max(time.monotonic() - self.began, 1e-9)
            print(
                f"{done:,} of {self.options.cases:,} cases, {rate:.0f} a second, "
                f"{self.failed} failed (seed {self.options.seed}, {', '.join(self.levels)})",
                flush=True,
            )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one, printed")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--op", choices=sorted(OPS))
    parser.add_argument("--case", type=int, help="this one only, in this process' child")
    parser.add_argument("--level", choices=LEVELS, help="default: all of the processor, in turn")
    parser.add_argument("--stop", action="store_true", help="at the first failure")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    options = parser.parse_args(arguments)
    if options.seed is None:
        options.seed = int.from_bytes(os.urandom(4), "little")
        print(f"seed {options.seed}", flush=True)
    if options.case is not None:
        options.first, options.cases = options.case, 1
    return Run(options).run()


if __name__ == "__main__":
    sys.exit(main())
