"""kill -9 at any moment, full disks, and two processes: a resumed run ends as one that was not."""

import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import time

import pytest
import torch
import toys
from toys import SHORT, Shapes, same, tiny

from pyseg.files import take_lock
from pyseg.training import train
from pyseg.weights import load_state

OPTIONS = {**SHORT, "validated": True, "validate_every": 1, "cache": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights and log of a run that nobody stopped, by its options."""
    made = {}

    def run(start=toys.start, **options):
        key = (start.__name__, *sorted(map(str, options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            processes = start(folder, {**OPTIONS, **options})
            processes = processes if isinstance(processes, list) else [processes]
            assert set(toys.ended(*processes)) == {0}
            made[key] = toys.weights_of(folder), log_of(folder)
        return made[key]

    return run


def log_of(folder):
    """Without what no two runs share."""
    return [{**entry, "seconds": 0} for entry in json.loads((folder / "log.json").read_text())]


def check_end(folder, expected):
    weights, log = expected
    assert same(weights, toys.weights_of(folder)) and log_of(folder) == log


DEATHS = [
    {"reads": 4 + 1},  # in the first epoch, before any checkpoint
    {"reads": 4 + 4 + 3 + 4 + 1},
    {"write": ("model.safetensors", 2, "half")},
    {"write": ("model.safetensors", 2, "after")},
    {"write": ("log.json", 2, "before")},
    {"write": ("log.csv", 3, "after")},
    {"write": ("checkpoint.pt", 1, "half")},
    {"write": ("checkpoint.pt", 2, "before")},
    {"write": ("checkpoint.pt", 3, "after")},
    {"write": ("checkpoint.pt", 4, "after")},  # the last: only the end is missing
]


@pytest.mark.parametrize(
    "death",
    DEATHS,
    ids=lambda death: (
        "-".join(map(str, *death.values())) if "write" in death else f"read-{death['reads']}"
    ),
)
def test_killed_at_a_certain_point(tmp_path, whole, death):
    process = toys.start(tmp_path, OPTIONS, death=death)
    assert toys.ended(process) == [-9]
    again = toys.start(tmp_path, {**OPTIONS, "resume": True, "model_seed": 0})
    assert toys.ended(again) == [0]
    check_end(tmp_path, whole())


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_again_and_again_at_random_moments(tmp_path, whole, workers):
    """From outside; workers that outlive their training for seconds do not hold its folder."""
    moments = random.Random(time.time_ns())
    options, kills = {**OPTIONS, "workers": workers, "epochs": 6}, []
    while len(kills) < (3 if workers else 5):
        resume = (tmp_path / ".lock").exists()
        process = toys.start(tmp_path, {**options, "resume": resume}, death={"seconds": 0.01})
        process.join(moments.uniform(0.2, 1.2))
        kills.append(process.exitcode)
        toys.kill(process)
        if kills[-1] is not None:  # it was at its end
            assert kills[-1] == 0
            break
    resume = (tmp_path / ".lock").exists()
    process = toys.start(tmp_path, {**options, "resume": resume})
    assert toys.ended(process) == [0]
    check_end(tmp_path, whole(epochs=6))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_two_processes_killed_and_resumed(tmp_path, whole, workers):
    """The second dies in its third epoch, and the first with it, as a launcher has it."""
    options = {**OPTIONS, "batch_size": 1, "count": 6, "workers": workers}
    death = {"reads": 6 + 3 + 3 + 1} if not workers else {"seconds": 0.02}
    pair = toys.start_two(tmp_path, options, death=death)
    if workers:  # reads are of the workers, so that the kill comes from outside
        end = time.monotonic() + 60
        while not (tmp_path / "checkpoint.pt").exists() and time.monotonic() < end:
            time.sleep(0.01)
    else:
        pair[1].join(60)
    toys.kill(*pair)
    assert 1 <= len(json.loads((tmp_path / "log.json").read_text())) < 4
    again = toys.start_two(tmp_path, {**options, "resume": True, "model_seed": 3})
    assert toys.ended(*again) == [0, 0]
    check_end(tmp_path, whole(toys.start_two, batch_size=1, count=6))
    ends = [torch.load(tmp_path / f"end-{rank}.pt") for rank in range(2)]
    assert ends[0] == ends[1]  # statistics of normalisation, too, which differ while it trains


def test_two_processes_end_as_one_with_batches_of_both(tmp_path, whole):
    """Void pixels are shared out unevenly; the gradient is that of the mean over all pixels."""
    options = {"plain": True, "count": 6, "loss": "ce", "optimizer": "sgd", "learning_rate": 0.1}
    one, _ = whole(batch_size=2, **options)
    two, _ = whole(toys.start_two, batch_size=1, **options)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)


def test_shares_of_a_model_train_as_copies_of_it(tmp_path, whole):
    """FSDP 2 on two processes without a GPU, killed, and resumed with copies; and back."""
    options = {"plain": True, "count": 6, "batch_size": 1, "clip": 1.0}
    copies, log = whole(toys.start_two, **options)
    started = {**OPTIONS, **options}
    pair = toys.start_two(tmp_path, {**started, "epochs": 2}, fsdp=True)
    assert toys.ended(*pair) == [0, 0]
    again = toys.start_two(tmp_path, {**started, "epochs": 3, "resume": True})
    assert toys.ended(*again) == [0, 0]
    last = toys.start_two(tmp_path, {**started, "resume": True}, fsdp=True)
    assert toys.ended(*last) == [0, 0]
    ends = [torch.load(tmp_path / f"end-{rank}.pt") for rank in range(2)]
    assert ends[0] == ends[1]
    straight = toys.start_two(tmp_path / "straight", started, fsdp=True)
    assert toys.ended(*straight) == [0, 0]
    for key, value in toys.weights_of(tmp_path / "straight").items():
        assert value.shape == copies[key].shape
        torch.testing.assert_close(value, copies[key], rtol=1e-4, atol=1e-6)
    shared = log_of(tmp_path / "straight")
    assert [entry["loss"] for entry in shared] == pytest.approx(
        [entry["loss"] for entry in log], abs=2e-4
    )
    assert [entry["miou"] for entry in shared] == pytest.approx(
        [entry["miou"] for entry in log], abs=0.02
    )


@contextlib.contextmanager
def largest_file(size):
    """Within it writing fails beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Fills(Shapes):
    """Calls a function at the first read of an epoch, uncached and after the pass over labels."""

    def __init__(self, count, epoch, full):
        super().__init__(count)
        self.left, self.full = count * epoch + 1, full

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            self.full()
        return super().__getitem__(index)


def continued(folder):
    """What is there after a full disk is whole, and a resumed run ends as if it had not been."""
    options = {**SHORT, "cache": False, "batch_size": 2}
    state = torch.load(folder / "checkpoint.pt")
    assert state["epoch"] == 2 and len(json.loads(state["log"])) == 2
    assert not [file.name for file in folder.iterdir() if ".part" in file.name]
    load_state(folder / "model.safetensors")
    model, other = tiny(seed=4), tiny()
    train(model, Shapes(4), output_dir=folder, resume=True, **options)
    train(other, Shapes(4), output_dir=folder.parent / "other", **options)
    assert same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    ("size", "victim"), [(9_000, "model.safetensors"), (30_000, "checkpoint.pt")]
)
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tmp_path, size, victim):
    options = {**SHORT, "cache": False, "batch_size": 2}
    run = tmp_path / "run"
    with contextlib.ExitStack() as stack:
        data = Fills(4, 3, lambda: stack.enter_context(largest_file(size)))
        with pytest.raises(OSError, match=victim) as raised:
            train(tiny(), data, output_dir=run, **options)
    assert raised.value.filename == str(run / victim)
    continued(run)


def test_a_file_system_without_space_leaves_the_last_checkpoint(tmp_path):
    """A real one, of 600 kB, where mounting is allowed."""
    run = tmp_path / "run"
    run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(run)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        options = {**SHORT, "cache": False, "batch_size": 2}

        def full():
            with contextlib.suppress(OSError), (run / "ballast").open("wb") as file:
                while True:
                    file.write(b"x" * 4096)
                    file.flush()

        with pytest.raises(OSError, match="No space left on device") as raised:
            train(tiny(), Fills(4, 3, full), output_dir=run, **options)
        assert raised.value.filename.startswith(str(run))
        (run / "ballast").unlink()
        continued(run)
    finally:
        subprocess.run(["umount", str(run)], check=True)


def test_a_lock_ends_with_its_training_though_its_workers_live_on(tmp_path):
    release = take_lock(tmp_path / ".lock")
    assert take_lock(tmp_path / ".lock") is None
    worker = os.fork()
    if not worker:
        time.sleep(60)
        os._exit(0)
    try:
        release()  # as the end of the process does
        end, again = time.monotonic() + 5, None  # the worker takes a moment to begin
        while again is None and time.monotonic() < end:
            again = take_lock(tmp_path / ".lock")
        assert again is not None
        again()
    finally:
        os.kill(worker, 9)
        os.waitpid(worker, 0)


@pytest.mark.slow
def test_the_command_line_killed_and_resumed(tmp_path):
    command = [sys.executable, "-m", "pyseg", "train", "streetnet", "--epochs", "3"]
    command += ["--dataset", "synthetic(length=4,size=(64,64))", "--crop-size", "64x64"]
    command += ["--batch-size", "2", "--workers", "1", "--precision", "fp32", "-o"]
    assert subprocess.run([*command, str(tmp_path / "a")], capture_output=True).returncode == 0
    process = subprocess.Popen([*command, str(tmp_path / "b")])
    end = time.monotonic() + 120
    while not (tmp_path / "b" / "checkpoint.pt").exists() and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = subprocess.run(
        [*command, str(tmp_path / "b"), "--resume"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert same(toys.weights_of(tmp_path / "a"), toys.weights_of(tmp_path / "b"))
