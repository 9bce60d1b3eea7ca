"""The teacher: a copy of the student whose parameters are the running mean of the student's."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def teacher_of(student: Module) -> Module:
    """A copy that wants no gradient, without dropout and stochastic depth.

    Only parameters are averaged. What normalisation over batches measures is not: the teacher
    normalises each batch by itself, that is by the target's statistics.
    """
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return teacher


def decay(step: int, largest: float = 0.999) -> float:
    """min(1 - 1 / (step + 1), largest): at first the teacher is the student, then its mean."""
    return min(1 - 1 / (step + 1), largest)


@torch.no_grad()
def move(teacher: nn.Module, student: nn.Module, step: int, largest: float = 0.999) -> None:
    """Teacher = decay * teacher + (1 - decay) * student, for the parameters.

    Args:
        teacher: of `teacher_of`; changed in place.
        student: of the same parameters.
        step: steps of the optimizer that the student has behind it.
        largest: the largest decay.
    """
    own: list[Tensor] = list(teacher.parameters())
    torch._foreach_lerp_(own, list(student.parameters()), 1 - decay(step, largest))
