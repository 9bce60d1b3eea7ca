"""Models of which every process holds a share, as accelerate's FSDP 2 has them.

Their tensors are torch's ``DTensor``. Whole ones go into checkpoints, so that a run may go on with
another number of processes, or without shares.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import PysegError

if TYPE_CHECKING:
    from accelerate import Accelerator


def wanted(accelerator: Accelerator) -> bool:
    """Whether a model is to be shared out: ``accelerate launch --use_fsdp --fsdp_version 2``.

    Raises:
        PysegError: by the first version of FSDP, whose parameters are of another shape.
    """
    if _on_cpu(accelerator):
        second = os.environ.get("FSDP_VERSION") == "2"
    elif accelerator.distributed_type.value == "FSDP":
        second = accelerator.is_fsdp2
    else:
        return False
    if not second:
        raise PysegError(
            "training shares a model out by FSDP 2 only; start it by "
            "accelerate launch --use_fsdp --fsdp_version 2"
        )
    return True


def prepared(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, Any]:
    """What accelerate makes of a model and its optimizer."""
    if wanted(accelerator):
        for parameter in model.parameters():  # FSDP refuses other layouts, such as channels_last
            parameter.data = parameter.data.contiguous()
    if not _on_cpu(accelerator):
        return accelerator.prepare(model, optimizer)
    # accelerate shares models out on GPUs only, and would copy this one without a word.
    from torch.distributed.fsdp import fully_shard

    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names[parameter] for parameter in g["params"]] for g in optimizer.param_groups]
    fully_shard(model)
    own = dict(model.named_parameters())
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [own[name] for name in members]
    return model, accelerator.prepare(optimizer)


def _on_cpu(accelerator: Accelerator) -> bool:
    """Whether FSDP was asked for where accelerate has none."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked and accelerator.distributed_type.value == "MULTI_CPU"


def local(value: Tensor) -> Tensor:
    """This process's share of a tensor, or all of one that is not shared out."""
    return value.to_local() if hasattr(value, "to_local") else value


def gathered(state: Mapping[str, Any]) -> dict[str, Any]:
    """Whole tensors; every process must call it, as it must what follows."""
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def gathered_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state dict of an optimizer, of whole tensors."""
    state = optimizer.state_dict()
    return {**state, "state": {key: gathered(value) for key, value in state["state"].items()}}


def shared_out(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, shared out as another of its shape is."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(value, like.device_mesh, like.placements)


@torch.no_grad()
def load(target: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copies whole tensors into those of ``target``, shared out or not."""
    for key, value in target.items():
        value.copy_(shared_out(state[key].to(value.device), value))


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Gives an optimizer the state that `gathered_optimizer` made."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {}
    for index, values in state["state"].items():
        like = parameters[index]
        own[index] = {
            key: shared_out(value.to(like.device), like)
            if isinstance(value, Tensor) and value.shape == like.shape
            else value
            for key, value in values.items()
        }
    optimizer.load_state_dict({**state, "state": own})
