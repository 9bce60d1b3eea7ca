"""Every op at each SIMD level of this processor, against itself at the next lower one.

A level that is slower than a lower one is a fault: `PYSEG_SIMD` exists for tests, and users get the
processor's best. `python benchmarks/levels.py` prints one table of milliseconds, one thread.
"""

import itertools
import os
import statistics
import time

import pytest
import torch
from contention import BACKWARD, NAMES, calls_per_round, make_calls

LEVELS = ("v4", "v3", "generic")
AT_LEAST = 0.97  # of the lower level's speed: what repeated runs differ by


def levels():
    """The processor's, the best first."""
    before = os.environ.pop("PYSEG_SIMD", None)
    best = torch.ops.pyseg.simd_level()
    if before is not None:
        os.environ["PYSEG_SIMD"] = before
    return LEVELS[LEVELS.index(best) :]


def at(level, call, times):
    os.environ["PYSEG_SIMD"] = level
    for _ in range(times):
        call()


@pytest.fixture(scope="module")
def calls():
    torch.manual_seed(0)
    return make_calls()


@pytest.mark.parametrize("name", [*NAMES, *BACKWARD])
@pytest.mark.parametrize("level", LEVELS[:-1])
def test_against_the_next_lower_level(compare, calls, level, name, monkeypatch):
    here = levels()
    if level not in here:
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setenv("PYSEG_SIMD", level)
    lower = LEVELS[LEVELS.index(level) + 1]
    torch.set_num_threads(1)
    times = calls_per_round(calls[name])
    compare(
        ours=lambda: at(level, calls[name], times),
        peer=lambda: at(lower, calls[name], times),
        peer_name=f"itself at {lower}",
        threads=1,
        goal=1.0,
        levels=False,
    )


def measure(call, rounds=7):
    """Medians in ms, level by level."""
    times, here = calls_per_round(call), levels()
    seconds = {level: [] for level in here}
    for _ in range(rounds):
        for level in here:
            start = time.perf_counter()
            at(level, call, times)
            seconds[level].append((time.perf_counter() - start) / times)
    return {level: 1e3 * statistics.median(taken) for level, taken in seconds.items()}


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    slow = []
    print(f"{'ms, one thread':24}" + "".join(f"{level:>10}" for level in levels()))
    for name, call in make_calls().items():
        found = measure(call)
        print(f"{name:24}" + "".join(f"{ms:10.2f}" for ms in found.values()), flush=True)
        each = list(found.items())
        slow += [
            f"{name} at {level}"
            for (level, ms), (_, lower) in itertools.pairwise(each)
            if lower / ms < AT_LEAST
        ]
    print(f"\nslower than a lower level: {', '.join(slow) or 'none'}")


if __name__ == "__main__":
    main()
