"""Data and a network that train in milliseconds, and processes that train with them.

Processes come from a server that has imported torch and forks: clean of what the tests' own process
has done, and started in milliseconds.
"""

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pyseg.models.semantic import SemanticModel
from pyseg.training import train
from pyseg.types import Sample
from pyseg.weights import load_state

CLASSES = ("ground", "disc", "frame")
PALETTE = ((90, 60, 30), (250, 200, 20), (20, 40, 200))


class Shapes:
    """Discs on a ground within a frame: colours tell the classes, as far as the noise allows."""

    classes, palette = CLASSES, PALETTE

    def __init__(self, count=2, size=(24, 32), seed=0):
        generator = np.random.default_rng(seed)
        rows, columns = np.mgrid[: size[0], : size[1]]
        self.samples = []
        for index in range(count):
            labels = np.zeros(size, dtype=np.uint8)
            y, x = generator.integers(8, size[0] - 8), generator.integers(8, size[1] - 8)
            labels[(rows - y) ** 2 + (columns - x) ** 2 < 36] = 1
            labels[:2] = labels[-2:] = 2
            image = np.array(PALETTE)[labels] + generator.integers(-20, 20, (*size, 3))
            labels[:, -1] = 255
            self.samples.append(
                Sample(
                    f"shape{index}",
                    torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1),
                    torch.from_numpy(labels),
                )
            )

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Tiny(nn.Module):
    """Stride 2, dropout and an auxiliary head: all that resuming could get wrong."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, 1, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Dropout2d(0.1),
        )
        self.head = nn.Conv2d(16, classes, 1)
        self.auxiliary = nn.Conv2d(16, classes, 1)

    def forward(self, x):
        x = self.body(x)
        outputs = {"out": self.head(x)}
        return {**outputs, "aux": self.auxiliary(x[:, :, ::2, ::2])} if self.training else outputs


def tiny(classes=CLASSES, seed=0):
    torch.manual_seed(seed)
    return SemanticModel(Tiny(len(classes)), classes)


SHORT = {
    "epochs": 4,
    "batch_size": 2,
    "crop_size": (16, 16),
    "precision": "fp32",
    "progress": False,
    "ema": 0.9,
}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def plain(seed=0):
    """Without normalisation and dropout, which make an image's loss depend on its batch."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Tanh(), nn.Conv2d(8, 8, 3, 1, 1), nn.Tanh())
    return SemanticModel(nn.Sequential(body, nn.Conv2d(8, 3, 1)), CLASSES)


def without_auxiliary():
    """DistributedDataParallel wants every parameter to have a share in the loss."""
    model = tiny()
    del model.network.auxiliary
    model.network.auxiliary = lambda x: x
    return model


def die():
    """kill -9, by the process itself."""
    os.kill(os.getpid(), signal.SIGKILL)


class Dying(Shapes):
    """Kills its process at a read of a sample; slow, so that kills from outside find it at work."""

    def __init__(self, *args, reads=None, seconds=0.0, **options):
        super().__init__(*args, **options)
        self.left, self.seconds = reads, seconds

    def __getitem__(self, index):
        time.sleep(self.seconds)
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                die()
        return super().__getitem__(index)


def die_at_write(name, number, when):
    """The process dies at the n-th write of a file: ``before`` it has its name, or ``after``."""
    replace, seen = Path.replace, []

    def deadly(self, target):
        seen.append(target.name)
        ours = target.name == name and seen.count(name) == number
        if ours and when == "half":
            self.write_bytes(self.read_bytes()[: self.stat().st_size // 2])
        if ours and when != "after":
            die()
        done = replace(self, target)
        if ours:
            die()
        return done

    Path.replace = deadly


def work(folder, options, death=None, rank=None, fsdp=False):
    """A training in a process of its own; one of two where ``rank`` is given as (rank, port).

    ``death`` is how it dies: {"reads": 7} or {"write": ("checkpoint.pt", 2, "half")}.
    """
    torch.set_num_threads(1)
    # A loader's workers are then children of this process, as in a program of its own, and notice
    # when it is killed; children of the server never would.
    multiprocessing.set_start_method("fork", force=True)
    if rank is not None:
        own = {"RANK": rank[0], "LOCAL_RANK": rank[0], "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": rank[1]}
        if fsdp:
            own |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
            own |= {"ACCELERATE_USE_CPU": "true"}
        os.environ.update({name: str(value) for name, value in own.items()})
    death = dict(death or {})
    if "write" in death:
        die_at_write(*death.pop("write"))
    options = dict(options)
    count, seed = options.pop("count", 4), options.pop("model_seed", 0)
    model = plain(seed) if options.pop("plain", False) else tiny(seed=seed)
    validation = Shapes(3, seed=9) if options.pop("validated", False) else None
    train(model, Dying(count, **death), validation=validation, output_dir=folder, **options)
    state = {key: value.tolist() for key, value in model.state_dict().items()}
    torch.save(state, Path(folder) / f"end-{rank[0] if rank else 0}.pt")
    if rank is not None:
        torch.distributed.destroy_process_group()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)  # without interpreter shutdown, in which Gloo's threads now and then abort


_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torch", "accelerate", "pyseg.training", "toys"])


def start(folder, options, **more):
    process = _server.Process(target=work, args=(folder, options), kwargs=more)
    process.start()
    return process


def start_two(folder, options, **more):
    """Two processes of one training; ``death`` is the second's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    death = more.pop("death", None)
    return [
        start(folder, options, rank=(rank, port), death=death if rank else None, **more)
        for rank in range(2)
    ]


def kill(*processes):
    """kill -9. Joining would wait for workers, too, which live on for some seconds."""
    for process in processes:
        process.kill()
    while any(map(_is_alive, processes)):
        time.sleep(0.001)


def _is_alive(process):
    try:
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # gone before or while it is read
        return False
    return state != "Z"


def ended(*processes, seconds=120):
    """Waits for processes; their exit codes."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    kill(*processes)
    return codes


def weights_of(folder):
    return load_state(Path(folder) / "model.safetensors")
