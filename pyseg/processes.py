"""Several processes, as torchrun and accelerate launch start them: who is who, sums over all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as distributed
from torch import Tensor

from .errors import PluginError, require

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .types import Metric


def rank_and_count() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) outside torch.distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every process, in the order of ranks; one process gives itself."""
    _, processes = rank_and_count()
    if processes == 1:
        return [value]
    gathered: list[Any] = [None] * processes
    distributed.all_gather_object(gathered, value)
    return gathered


def broadcast(state: Mapping[str, Tensor]) -> None:
    """Gives the tensors of every process the values of the first's; shares of a tensor are kept."""
    if rank_and_count()[1] > 1:
        for value in state.values():
            if not hasattr(value, "full_tensor"):
                distributed.broadcast(value, 0)


def merge_states(name: str, metric: Metric) -> None:
    """Gives ``metric`` in every process the sum of the states of all.

    Args:
        name: of the metric, for the message.
        metric: its state holds tensors, which are added, and lists, which are joined.

    Raises:
        PluginError: the state holds something else.
    """
    _, processes = rank_and_count()
    if processes == 1:
        return
    # NCCL reduces on the GPU only.
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    state = metric.state()
    total: dict[str, Any] = {}
    for key in sorted(state):
        value = state[key]
        if isinstance(value, Tensor):
            total[key] = value.detach().to(device, copy=True).contiguous()
            distributed.all_reduce(total[key])
        elif isinstance(value, list):
            total[key] = [record for part in gather_objects(value) for record in part]
        else:
            raise _no_sum(name, key, value)
    metric.load_state(total)


def add_states(name: str, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of a metric's states, as of parts of a data set in their order.

    Raises:
        PluginError: as from `merge_states`.
    """
    total: dict[str, Any] = {}
    for key, value in states[0].items():
        if isinstance(value, Tensor):
            total[key] = value.clone()
            for state in states[1:]:
                total[key] += state[key]
        elif isinstance(value, list):
            total[key] = [record for state in states for record in state[key]]
        else:
            raise _no_sum(name, key, value)
    return total


def _no_sum(name: str, key: str, value: Any) -> PluginError:
    return PluginError(
        f"metric {name!r} has a {type(value).__name__} as state {key!r}; states are tensors and "
        "lists, whose sum over processes is the state of the whole"
    )


def accelerator() -> Accelerator:
    """accelerate's view of the processes and devices, for training.

    Raises:
        ImportError: accelerate is not installed; the message names the remedy.
    """
    # Under plain torchrun without a GPU accelerate would start each process as the only one.
    on_cpu = _started_several() and not torch.accelerator.is_available()
    return require("accelerate", extra="train").Accelerator(cpu=on_cpu)


@contextlib.contextmanager
def joined(device: str | None) -> Iterator[str | None]:
    """Within it the processes that torchrun or accelerate launch started are one group.

    Args:
        device: that the user asked for; ``"cuda"`` stands for one GPU per process.

    Yields:
        The device of this process.
    """
    if not _started_several():
        yield device
        return
    state = require("accelerate", extra="train").PartialState(
        cpu=not (device or "cpu").startswith("cuda")
    )
    try:
        yield str(state.device) if device == "cuda" else device
    finally:
        leave()


def leave() -> None:
    """Ends the group; without it a peer that ends first would abort this process."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _started_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
