"""Fifty programs that ask `pyseg studio` at a time: errors, waiting times, memory.

`python benchmarks/studio.py` starts the server as its user does, on the image that comes with
pyseg, and prints one line for the programs, one for the server's memory after each round of them,
the first of which warms up, and one for clicks on the page. A program sends its next
request when it has its answer; one that is told that too many wait (503) asks again, and that
counts as a part of its time.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

import pyseg

IMAGE = Path(pyseg.__file__).parent / "assets" / "street.jpg"


def memory(process):
    """Resident bytes of the server."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


def ask(address, headers, requests, times, failed, refused):
    content = IMAGE.read_bytes()
    with httpx.Client(base_url=address, headers=headers, timeout=120) as client:
        for _ in range(requests):
            begun = time.perf_counter()
            while (answer := client.post("/segment", content=content)).status_code == 503:
                refused.append(1)
                time.sleep(float(answer.headers["retry-after"]))
            if answer.status_code != 200 or answer.content[:4] != b"\x89PNG":
                failed.append(answer.text)
            times.append(time.perf_counter() - begun)


def load(address, headers, clients, requests):
    """Times of all requests, what failed, and how often 503 was said."""
    times, failed, refused = [], [], []
    threads = [
        threading.Thread(target=ask, args=(address, headers, requests, times, failed, refused))
        for _ in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times, failed, len(refused)


def clicks(address, headers, count):
    """Seconds from a click to its mask, with the embedding made."""
    times = []
    with httpx.Client(base_url=address, headers=headers, timeout=120) as client:
        client.get("/api/items/0")
        step = {"do": "click", "x": 200, "y": 200, "label": "Car"}
        client.post("/api/items/0/step", json=step)
        for k in range(count):
            begun = time.perf_counter()
            client.post("/api/items/0/preview", json={**step, "x": 30 + 8 * (k % 50)})
            times.append(time.perf_counter() - begun)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=2, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=4, help="after the one that warms up")
    parser.add_argument("--spec", default="streetnet")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, "-m", "pyseg", "studio", str(IMAGE), "--spec", options.spec]
        call += ["-o", folder, "--port", "0", "--no-browser"]
        process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
        try:
            address, _, token = process.stdout.readline().strip().partition("/#token=")
            headers = {"Authorization": f"Bearer {token}"}
            answered = clicks(address, headers, 50)
            times, failed, refused, held, seconds = [], [], 0, [], 0.0
            for k in range(options.rounds + 1):
                begun = time.perf_counter()
                found = load(address, headers, options.clients, options.requests)
                held.append(memory(process))
                if k:  # the first takes what memory it needs
                    seconds += time.perf_counter() - begun
                    times += found[0]
                    refused += found[2]
                failed += found[1]
        finally:
            process.kill()
            process.wait()
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    share = statistics.quantiles(times, n=20)
    print(
        f"{options.spec}, {threads} threads, {options.clients} clients: {len(times)} requests, "
        f"{len(failed)} errors, {refused} asked to wait; median {statistics.median(times):.2f} s, "
        f"p95 {share[-1]:.2f} s, {len(times) / seconds:.1f} a second"
    )
    print(
        f"memory in MB after each {options.clients * options.requests} requests: "
        f"{' '.join(f'{size / 1e6:.0f}' for size in held)}"
    )
    print(
        f"a click on 480 x 360: median {1e3 * statistics.median(answered):.0f} ms, "
        f"p95 {1e3 * statistics.quantiles(answered, n=20)[-1]:.0f} ms"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
