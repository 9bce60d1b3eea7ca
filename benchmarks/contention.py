"""Every op on two threads beside a process that keeps one of the two cores busy.

The peer is the op itself with the neighbour stopped: a ratio of 0.4 is 2.5 times slower, which is
the goal. Where work is shared out in equal parts, two threads with one and a half cores to run on
take twice as long; where they take what is left, 1.33 times.

`python benchmarks/contention.py` prints one table: each op alone on one thread and on two, and
beside the neighbour; and inputs so small that no threads should start, on one thread and on two.
"""

import os
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch

from pyseg import ops

THREADS = 2
AT_MOST = 2.5  # times slower
LEAST = 0.02  # seconds that are timed at once


def random(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))


def labels(*shape, classes=19):
    """Patches with some noise, uint8."""
    generator = torch.Generator().manual_seed(sum(shape))
    patches = torch.randint(0, classes, (*shape[:-2], shape[-2] // 32, shape[-1] // 32))
    result = patches.repeat_interleave(32, -2).repeat_interleave(32, -1)
    noise = torch.rand(result.shape, generator=generator) < 0.01
    result[noise] = torch.randint(0, classes, (int(noise.sum()),), generator=generator)
    return result.to(torch.uint8)


def boxes_in(height, width, count):
    """[count, 4] xyxy."""
    corner = random(count, 2) * torch.tensor([width, height]) * 0.8
    return torch.cat([corner, corner + 8 + random(count, 2, 1)[..., 0] * 0.2 * height], 1)


def backward(result, *leaves):
    direction = torch.ones_like(result)
    return lambda: torch.autograd.grad(result, leaves, direction, retain_graph=True)


def make_calls():
    """name -> function without arguments, for inputs of the sizes that images have."""
    calls = {}
    one, other = labels(2, 1024, 2048), labels(2, 1024, 2048).flip(1)
    calls["boundary_mask"] = lambda: ops.boundary_mask(one, 5)
    calls["boundary_match"] = lambda: ops.boundary_match(one[:1], other[:1], 19, 10)
    calls["confusion_matrix"] = lambda: ops.confusion_matrix(one, other, 19)
    ids, areas = other[0].int().unique(return_counts=True)
    listed = torch.stack([ids.long() + 1, ids.long() % 5], 1)
    target = torch.cat([listed, areas[:, None], areas[:, None] * 0], 1)
    maps = one[0].flip(0).int() + 1, other[0].int() + 1
    found = maps[0].unique()
    kinds = torch.stack([found.long(), found.long() % 5], 1)
    calls["panoptic_quality"] = lambda: ops.panoptic_quality(*maps, kinds, target, 5)

    logits = random(1, 19, 128, 256) * 8
    calls["upsample_argmax"] = lambda: ops.upsample_argmax(logits, (1024, 2048))
    truth = one[:1]
    calls["upsample_confusion"] = lambda: ops.upsample_confusion(logits, truth)
    boxes, kind = boxes_in(1024, 2048, 50), torch.arange(50) % 8 + 11
    masks, scores = random(50, 28, 28), random(50)
    calls["panoptic_head"] = lambda: ops.panoptic_head(
        logits[0], masks, boxes, kind, num_stuff=11, size=(1024, 2048)
    )
    calls["panoptic_merge"] = lambda: ops.panoptic_merge(
        masks, scores, kind, truth[0], stuff_classes=range(11), boxes=boxes
    )

    level = random(1, 256, 100, 168).requires_grad_()
    regions = [boxes_in(800, 1344, 500)]
    pooled = ops.roi_align(level, regions, 7, 1 / 8, 2)
    calls["roi_align"] = lambda: ops.roi_align(level.detach(), regions, 7, 1 / 8, 2)
    calls["roi_align backward"] = backward(pooled, level)
    calls["roi_pool"] = lambda: ops.roi_pool(level.detach(), regions, 7, 1 / 8)
    pyramid = [random(1, 256, 200 >> i, 336 >> i) for i in range(4)]
    calls["multi_scale_roi_align"] = lambda: ops.multi_scale_roi_align(
        pyramid, regions, 7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 2
    )

    input, offset = random(1, 256, 64, 128).requires_grad_(), random(1, 18, 64, 128) * 4 - 2
    offset.requires_grad_()
    weight = (random(256, 256, 3, 3) / 48).requires_grad_()
    result = ops.deform_conv2d(input, offset, weight, padding=1)
    plain = [tensor.detach() for tensor in (input, offset, weight)]
    calls["deform_conv2d"] = lambda: ops.deform_conv2d(*plain, padding=1)
    calls["deform_conv2d backward"] = backward(result, input, offset, weight)

    unary = (random(1, 11, 180, 240) * 4).requires_grad_()
    photo = torch.nn.functional.interpolate(random(1, 3, 12, 16) * 255, (180, 240), mode="bicubic")
    photo = photo.clamp(0, 255).to(torch.uint8)
    calls["dense_crf"] = lambda: ops.dense_crf(unary.detach(), photo)
    calls["dense_crf backward"] = backward(ops.dense_crf(unary, photo), unary)
    return calls


def make_small_calls():
    """The same for inputs of a few hundred numbers."""
    tiny = torch.randint(0, 3, (1, 6, 7), dtype=torch.uint8)
    segments = torch.tensor([[1, 0, 42, 0]])
    whole = torch.ones(6, 7, dtype=torch.int32)
    logits, masks = random(1, 3, 4, 5), random(2, 4, 4)
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 1, 3, 3], [0, 2, 3, 4]])
    input, offset = random(1, 4, 5, 5), torch.zeros(1, 18, 3, 3)
    weight = random(4, 4, 3, 3)
    unary, photo = random(1, 5, 16, 16), torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    scene = masks, torch.ones(2), torch.ones(2, dtype=torch.int64), tiny[0]
    return {
        "boundary_mask": lambda: ops.boundary_mask(tiny, 2),
        "boundary_match": lambda: ops.boundary_match(tiny, tiny, 3, 2),
        "confusion_matrix": lambda: ops.confusion_matrix(tiny, tiny, 3),
        "panoptic_quality": lambda: ops.panoptic_quality(
            whole, whole, segments[:, :2], segments, 1
        ),
        "upsample_argmax": lambda: ops.upsample_argmax(logits, (8, 10)),
        "upsample_confusion": lambda: ops.upsample_confusion(logits, tiny),
        "panoptic_head": lambda: ops.panoptic_head(
            logits[0], masks, boxes[:2], torch.tensor([2, 2]), num_stuff=2, size=(8, 10)
        ),
        "panoptic_merge": lambda: ops.panoptic_merge(*scene, stuff_classes=[0], boxes=boxes[:2]),
        "roi_align": lambda: ops.roi_align(input, [boxes], 2),
        "roi_pool": lambda: ops.roi_pool(input, [boxes], 2),
        "multi_scale_roi_align": lambda: ops.multi_scale_roi_align(
            [input, input[..., ::2, ::2]], [boxes], 2, [1.0, 0.5]
        ),
        "deform_conv2d": lambda: ops.deform_conv2d(input, offset, weight),
        "dense_crf": lambda: ops.dense_crf(unary, photo),
    }


class Neighbour:
    """A process that keeps one core busy whenever it is asked to, on the two cores of this one."""

    def __init__(self):
        self._before = os.sched_getaffinity(0)
        cores = sorted(self._before)[:THREADS]
        if len(cores) < THREADS:
            raise RuntimeError(f"this needs {THREADS} cores, and has {len(cores)}")
        self._confine(cores)
        self._process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        self.stop()

    def _confine(self, cores):
        for thread in os.listdir("/proc/self/task"):  # those of the pool, too
            os.sched_setaffinity(int(thread), cores)

    def stop(self):
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self):
        self._process.send_signal(signal.SIGCONT)

    def end(self):
        self._process.kill()
        self._process.wait()
        self._confine(self._before)


def calls_per_round(call):
    call()
    start = time.perf_counter()
    call()
    return max(1, round(LEAST / max(time.perf_counter() - start, 1e-6)))


@pytest.fixture
def neighbour():
    if len(os.sched_getaffinity(0)) < THREADS:
        pytest.skip(f"needs {THREADS} cores")
    process = Neighbour()
    yield process
    process.end()


@pytest.fixture(scope="module")
def calls():
    torch.manual_seed(0)
    return make_calls()


NAMES = [
    "boundary_mask",
    "boundary_match",
    "confusion_matrix",
    "panoptic_quality",
    "upsample_argmax",
    "upsample_confusion",
    "panoptic_head",
    "panoptic_merge",
    "roi_align",
    "roi_pool",
    "multi_scale_roi_align",
    "deform_conv2d",
    "dense_crf",
]
BACKWARD = [f"{name} backward" for name in ("roi_align", "deform_conv2d", "dense_crf")]


@pytest.mark.parametrize("name", [*NAMES, *BACKWARD])
def test_beside_a_busy_process(compare, neighbour, calls, name):
    call = calls[name]
    torch.set_num_threads(THREADS)
    times = range(calls_per_round(call))

    def beside():
        neighbour.go_on()
        for _ in times:
            call()

    def alone():
        neighbour.stop()
        for _ in times:
            call()

    compare(
        ours=beside,
        peer=alone,
        peer_name="itself alone",
        threads=THREADS,
        goal=1 / AT_MOST,
        levels=False,
        rounds=9,
    )


@pytest.mark.parametrize("name", NAMES)
def test_small_inputs_beside_a_busy_process(compare, neighbour, name):
    """Two threads allowed, against one."""
    call = make_small_calls()[name]
    torch.set_num_threads(1)
    times = range(calls_per_round(call))
    neighbour.go_on()

    def on(threads):
        torch.set_num_threads(threads)
        for _ in times:
            call()

    compare(
        ours=lambda: on(THREADS),
        peer=lambda: on(1),
        peer_name="itself on one thread",
        threads=THREADS,
        goal=0.8,
        levels=False,
        rounds=9,
    )


def measure(neighbour, call, rounds=5):
    """Medians in ms: one thread, two, two beside the neighbour, one beside the neighbour."""
    ways = [(1, False), (THREADS, False), (THREADS, True), (1, True)]
    torch.set_num_threads(1)
    times = calls_per_round(call)
    seconds = [[] for _ in ways]
    for _ in range(rounds):
        for (threads, busy), taken in zip(ways, seconds, strict=True):
            torch.set_num_threads(threads)
            (neighbour.go_on if busy else neighbour.stop)()
            start = time.perf_counter()
            for _ in range(times):
                call()
            taken.append((time.perf_counter() - start) / times)
    neighbour.stop()
    return [1e3 * statistics.median(taken) for taken in seconds]


def main():
    torch.manual_seed(0)
    neighbour = Neighbour()
    slow = []
    try:
        print(f"{'ms':24}  1 thread  2 threads    beside  times slower")
        for name, call in make_calls().items():
            one, two, beside, _ = measure(neighbour, call)
            mark = f"  above {AT_MOST}" if beside > AT_MOST * two else ""
            slow += [name] if mark else []
            print(f"{name:24}  {one:8.2f}  {two:9.2f}  {beside:8.2f}  {beside / two:12.2f}{mark}")
        print(f"\n{'small inputs, ms':24}  1 thread  2 threads  both beside the neighbour")
        for name, call in make_small_calls().items():
            one, two, beside, one_beside = measure(neighbour, call)
            print(f"{name:24}  {one:8.3f}  {two:9.3f}  {one_beside:8.3f}  {beside:8.3f}")
    finally:
        neighbour.end()
    print(f"\nabove {AT_MOST} times: {', '.join(slow) or 'none'}")


if __name__ == "__main__":
    main()
