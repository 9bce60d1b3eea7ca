"""What this machine can do at best, for the floors of docs/ops.md: `python benchmarks/floor.py`.

Writes results/floor-PROCESSOR-LEVEL.json: GB/s of reading (a sum) and of copying (read and written
bytes) in 64 MB, GFLOP/s in float32 of a product of matrices (MKL) or of a convolution (oneDNN),
whichever has more, which on an AMD processor is the second by twice as many; the fastest of 40, as
it is what other work on the machine disturbed least, with one and two threads.
"""

import json
import re
import time
from pathlib import Path

import torch
from torch.nn.functional import conv2d

from pyseg import _native

ROUNDS, BYTES, SIDE = 40, 1 << 26, 1024


def least_seconds(work):
    work()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def machine():
    found = {}
    data, other = torch.ones(2, BYTES // 8, dtype=torch.int64)
    left, right = torch.randn(2, SIDE, SIDE)
    image, weight = torch.randn(1, 256, 64, 128), torch.randn(256, 256, 3, 3)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found[str(threads)] = {
            "read_gb_s": BYTES / least_seconds(data.sum) / 1e9,
            "copy_gb_s": 2 * BYTES / least_seconds(lambda: other.copy_(data)) / 1e9,
            "gflop_s": max(
                2 * SIDE**3 / least_seconds(lambda: left @ right),
                2 * weight.numel() * 62 * 126 / least_seconds(lambda: conv2d(image, weight)),
            )
            / 1e9,
        }
    return found


if __name__ == "__main__":
    model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    path = Path(__file__).parent / "results" / f"floor-{name}-{_native.simd_level()}.json"
    content = {
        "command": "python benchmarks/floor.py",
        "cpu": model,
        "torch": torch.__version__,
        "threads": {
            key: {what: round(value, 1) for what, value in values.items()}
            for key, values in machine().items()
        },
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(path.read_text())
