"""The fixtures of benchmarks: `compare` on the CPU, `gpu.compare` on a GPU.

What they measure they note in the test's properties, where the root conftest.py finds it.
"""

import contextlib
import itertools
import math
import statistics
import time

import pytest

LEVELS = ("v4", "v3", "generic")  # of PYSEG_SIMD
LEVEL_LOSS = 0.05


def _simd_level():
    from pyseg import _native

    return _native.simd_level()


@contextlib.contextmanager
def _at(level):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSEG_SIMD", level)
        yield


@pytest.fixture
def compare(request, benchmark):
    """``compare(ours=f, peer=g, peer_name="…", threads=1, …)`` times both, interleaved.

    Args of the returned function:
        ours, peer: functions without arguments that do the same work on the same inputs.
        peer_name: what ``peer`` is, for the table.
        threads: torch's number of threads for both.
        goal: the ratio (the peer's median / ours) that we want here, or one for each SIMD level, as
            ``{"v4": 10, "v3": 6.5}``; printed, not enforced.
        check: called with both results before timing; it asserts that they agree.
        rounds: repetitions, each of which runs the peer and then us, level by level; every round
            begins with another level, as what comes first after the peer finds cold caches.
        levels: whether ours runs at every SIMD level of the processor, up to PYSEG_SIMD. False
            where no kernel of ours is what takes the time, or where the peer is ours, too.
    """
    import torch

    def run(*, ours, peer, peer_name, threads, goal=None, check=None, rounds=7, levels=True):
        here = LEVELS[LEVELS.index(_simd_level()) :] if levels else (None,)
        seconds = {level: [] for level in (*here, "peer")}
        left = []  # the lower levels that come after ours at the best one, in a round

        def time_one(what, function):
            start = time.perf_counter()
            function()
            seconds[what].append(time.perf_counter() - start)

        def time_levels(lower):
            for level in lower:
                with _at(level):
                    time_one(level, ours)

        def begin_round():
            time_levels(left)
            time_one("peer", peer)
            first = len(seconds["peer"]) % len(here)
            order = here[first:] + here[:first]
            best = order.index(here[0])
            time_levels(order[:best])
            left[:] = order[best + 1 :]

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            result, expected = ours(), peer()  # warms up, too
            if check is not None:
                check(result, expected)
            for level in here[1:]:
                with _at(level):
                    result = ours()
                if check is not None:
                    check(result, expected)
            # pytest-benchmark keeps times of its own; what is compared is taken in the same way at
            # every level.
            benchmark.pedantic(lambda: time_one(here[0], ours), setup=begin_round, rounds=rounds)
            time_levels(left)
        finally:
            torch.set_num_threads(before)
        if benchmark.stats is None:  # --benchmark-disable
            return
        found = {level: 1e3 * statistics.median(seconds[level]) for level in here}
        peer_ms = 1e3 * statistics.median(seconds["peer"])
        for level, ours_ms in found.items():
            entry = {
                "ours_ms": round(ours_ms, 5),
                "peer": peer_name,
                "peer_ms": round(peer_ms, 5),
                "ratio": round(peer_ms / ours_ms, 3),
                "goal": goal.get(level) if isinstance(goal, dict) else goal,
                "threads": threads,
                "device": "cpu",
                "simd": level,
            }
            if level == here[0]:
                benchmark.extra_info.update(
                    entry,
                    torch=torch.__version__,
                    peer_rounds_ms=[1e3 * s for s in seconds["peer"]],
                )
            suffix = "" if level == here[0] else f" at {level}"
            request.node.user_properties.append((f"benchmark{suffix}", entry))
        for (level, ours_ms), (lower, lower_ms) in itertools.pairwise(found.items()):
            if lower_ms < (1 - LEVEL_LOSS) * ours_ms:
                slower = f"{ours_ms:.3f} ms at {level}, {lower_ms:.3f} at {lower}"
                request.node.user_properties.append(("slower", f"{request.node.name}: {slower}"))

    return run


@pytest.fixture
def gpu(request):
    """For benchmarks of CUDA kernels: see `Gpu`. Skips where there is no device."""
    import torch

    torch.compiler.reset()  # a peer compiled for another test is not to count as recompiled
    if request.config.option.rehearse:
        return Gpu(request, None)
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return Gpu(request, Cuda())


class Gpu:
    """Times functions of tensors by what the device does, without the host that launches it.

    Attributes:
        device: where the inputs belong: "cuda"; "cpu" under --rehearse.
    """

    def __init__(self, request, clock):
        self.request, self.clock = request, clock
        self.device = "cuda" if clock else "cpu"

    def compile(self, function):
        """The peer that torch makes of a plain formulation."""
        import torch

        backend = "inductor" if self.clock else "eager"
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    def compare(
        self,
        *,
        ours,
        peer,
        peer_name,
        inputs=(),
        peer_inputs=None,
        peer_runs="captured",
        goal=None,
        goal_ms=None,
        check=None,
        rounds=7,
    ):
        """Times both, interleaved; once each and untimed under --rehearse and --benchmark-disable.

        Args:
            ours, peer: functions of ``inputs`` that do the same work; they return tensors.
            peer_name: what ``peer`` is, for the table.
            inputs: arguments of both: tensors, also within lists, tuples and dicts. They are copied
                until they exceed the cache, and every call gets the next copy.
            peer_inputs: the peer's, where they differ.
            peer_runs: "captured" in a graph where it can be, "eager" by itself, or on the "host".
            goal: the ratio (the peer's median / ours) that we want here; printed, not enforced.
            goal_ms: the time that we want on an H200; likewise.
            check: called with both results, eager and replayed ones; it asserts that they agree.
            rounds: repetitions, each of which runs the peer and then us.
        """
        import torch

        peer_inputs = inputs if peer_inputs is None else peer_inputs
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            result, expected = ours(*inputs), peer(*peer_inputs)
            if check is not None:
                check(result, expected)
            disabled = getattr(self.request.config.option, "benchmark_disable", False)
            if self.clock is None or disabled:
                self.request.node.user_properties.append(("ran_once_on", self.device))
                return
            copies = rotation(inputs, self.clock.cache_bytes)
            mine = Timed(ours, copies, self.clock)
            if peer_runs == "host":
                other = Timed(peer, [peer_inputs], Host())
            else:
                peer_copies = rotation(peer_inputs, self.clock.cache_bytes)
                other = Timed(peer, peer_copies, self.clock, capture=peer_runs == "captured")
            if check is not None:
                check(mine.result, other.result)
            times = [(other.round(), mine.round()) for _ in range(rounds)]
        finally:
            torch.set_num_threads(before)
        peer_ms, ours_ms = map(statistics.median, zip(*times, strict=True))
        entry = {
            "ours_ms": round(ours_ms, 5),
            "peer": peer_name,
            "peer_ms": round(peer_ms, 5),
            "ratio": round(peer_ms / ours_ms, 3),
            "goal": goal,
            "threads": 1,
            "device": self.clock.name,
            "goal_ms": goal_ms,
            "ours_eager_ms": round(mine.eager_ms, 5),
            "peer_eager_ms": round(other.eager_ms, 5),
            "ours_how": mine.how,
            "peer_how": other.how,
            "input_copies": len(copies),
            "ours_rounds_ms": [round(ours, 5) for _, ours in times],
            "peer_rounds_ms": [round(peer, 5) for peer, _ in times],
        }
        self.request.node.user_properties.append(("benchmark", entry))


def each_tensor(function, value):
    """``value`` with ``function`` of every tensor in it, also within tuples, lists and dicts."""
    import torch

    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(each_tensor(function, part) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(each_tensor(function, part) for part in value)
    if isinstance(value, dict):
        return type(value)((key, each_tensor(function, part)) for key, part in value.items())
    return value


def rotation(inputs, cache_bytes, most=64):
    """``inputs`` and copies of them: together twice the cache, so that no call finds it warm."""
    sizes = []
    each_tensor(lambda tensor: sizes.append(tensor.nbytes), inputs)
    wanted = math.ceil(2 * cache_bytes / max(sum(sizes), 1)) if sizes else 1
    copies = min(max(wanted, 1), most) - 1
    return [inputs] + [each_tensor(lambda tensor: tensor.clone(), inputs) for _ in range(copies)]


class Timed:
    """A function ready to be timed on a clock: by a graph of many calls, where it can be captured.

    Attributes:
        result: what the function returned; after a capture, what replaying wrote.
        eager_ms: a call among calls, with Python, dispatcher and launches.
        how: "graph"; "events", that is of eager calls, where a graph cannot be; or "wall".
    """

    ROUND_MS, GRAPH_MS, MOST_CALLS = 50, 10, 500

    def __init__(self, function, copies, clock, capture=True):
        self.function, self.copies, self.clock = function, copies, clock
        self.calls, self.how = 1, clock.how
        self.result = function(*copies[0])
        if not clock.holds(self.result):
            raise TypeError(f"timed on {clock.name}, but no result is there: {self.result!r}")
        first_ms = clock.wall_ms(self.run)
        self.calls = self._calls_in(self.ROUND_MS, first_ms)
        again = 3 if first_ms < 500 else 0  # the slow ones are timed often enough as it is
        eager = [clock.wall_ms(self.run) / self.calls for _ in range(again)]
        self.eager_ms = statistics.median(eager or [first_ms])
        if capture and clock.captures and not clock.waits(lambda: function(*copies[0])):
            self._capture()

    def _calls_in(self, wanted_ms, call_ms):
        """A number of calls that takes so long, and uses every copy equally often."""
        calls = min(max(wanted_ms / max(call_ms, 1e-6), 1), self.MOST_CALLS)
        return math.ceil(calls / len(self.copies)) * len(self.copies) if calls > 1 else 1

    def run(self):
        for k in range(self.calls):
            self.result = self.function(*self.copies[k % len(self.copies)])

    def _capture(self):
        eager_calls = self.calls
        self.calls = self._calls_in(self.GRAPH_MS, self.eager_ms)
        try:
            replay = self.clock.capture(self.run)
        except RuntimeError as error:
            self.how = f"events; no capture: {str(error).splitlines()[0]}"
            self.calls = eager_calls
            self.run()
            return
        # The graph must do the work itself: what is there now is not to pass for its result.
        self.clock.poison(self.result)
        replay()
        self.how = "graph"
        replays = max(1, round(self.ROUND_MS / max(self.clock.device_ms(replay), 1e-3)))
        self.calls *= replays
        self.run = lambda: [replay() for _ in range(replays)]

    def round(self):
        """Milliseconds of a call in one more repetition."""
        return self.clock.device_ms(self.run) / self.calls


class Host:
    """The clock of what runs on the CPU."""

    name, how, captures = "the CPU", "wall", False

    def holds(self, result):
        return True

    def wall_ms(self, run):
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    device_ms = wall_ms


class Cuda:
    """The clock of the CUDA device."""

    how, captures = "events", True

    def __init__(self):
        import torch

        properties = torch.cuda.get_device_properties(0)
        self.name, self.cache_bytes = properties.name, properties.L2_cache_size

    def holds(self, result):
        found = []
        each_tensor(lambda tensor: found.append(tensor.is_cuda), result)
        return any(found)

    def wall_ms(self, run):
        import torch

        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def device_ms(self, run):
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def waits(self, run):
        """Whether torch waits for the device in it. Found out beforehand: a capture that fails
        half-way may leave the process without a usable allocator."""
        import torch

        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            if "synchroniz" in str(error):
                return True
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def capture(self, run):
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made once per stream is made before
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def poison(self, result):
        each_tensor(lambda t: t.detach().fill_(math.nan if t.is_floating_point() else 113), result)
