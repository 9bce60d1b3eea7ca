"""Parts of a model with a learning rate of their own or none, and the optimizers over them."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from ..errors import PysegError

Optimizer = Literal["adamw", "adam", "sgd"]

REST = "rest"  # the part that `rates` calls what no other of its entries names
TRUNKS = ("backbone", "encoder", "trunk", "body")  # usual names of what a classifier was


def parameter_groups(
    model: nn.Module, weight_decay: float, rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters for an optimizer: weight decay for those of more than one dimension.

    Args:
        model: whose parameters.
        weight_decay: for the larger ones.
        rates: factor of the learning rate of each part, see `rates_of`. The groups have it under
            ``"rate"``, the highest first.
    """
    by_rate: dict[float, list[nn.Parameter]] = {}
    factors = rates_of(model, rates or {})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_rate.setdefault(factors[name], []).append(parameter)
    groups: list[dict[str, Any]] = []
    for rate in sorted(by_rate, reverse=True):
        parameters = by_rate[rate]
        own = {"rate": rate} if rates else {}
        groups += [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, **own},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, **own},
        ]
    return groups


def make_optimizer(
    kind: Optimizer,
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.9,
    second: float = 0.999,
    rates: Mapping[str, float] | None = None,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """An optimizer of a model's trainable parameters.

    Args:
        kind: ``"adamw"``, ``"adam"`` (weight decay as part of the gradient) or ``"sgd"``.
        model: whose parameters.
        learning_rate: of parts whose rate is 1.
        weight_decay: for parameters of more than one dimension.
        momentum: of SGD; the first decay rate of the others.
        second: the second decay rate of AdamW; Adam keeps its usual 0.999.
        rates: see `rates_of`.
        fused: AdamW in one kernel, with results a little other than without.
    """
    groups = parameter_groups(model, weight_decay, rates)
    for group in groups:
        group["lr"] = learning_rate * group.pop("rate", 1.0)
    if kind == "sgd":
        return torch.optim.SGD(groups, learning_rate, momentum=momentum)
    if kind == "adam":
        return torch.optim.Adam(groups, learning_rate, betas=(momentum, 0.999))
    options: dict[str, Any] = {"fused": True} if fused else {}
    return torch.optim.AdamW(groups, learning_rate, betas=(momentum, second), **options)


def check_optimizer(kind: str, momentum: float, rates: Mapping[str, float] | str | None) -> None:
    """Refuses settings of `make_optimizer` that are out of range."""
    if kind not in ("adamw", "adam", "sgd"):
        raise ValueError(f"optimizer must be 'adamw', 'adam' or 'sgd', got {kind!r}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in 0..1, below 1, got {momentum}")
    for part, rate in read_rates(rates).items():
        if not 0 <= rate < float("inf"):
            raise ValueError(f"rates: {part} must be 0 (frozen) or more, got {rate}")


def read_rates(rates: Mapping[str, float] | str | None) -> dict[str, float]:
    """Rates of parts, from a mapping or from ``"backbone=0.1,head=2"``.

    Raises:
        ValueError: another form.
    """
    if rates is None:
        return {}
    try:
        if isinstance(rates, str):
            pairs = [part.split("=") for part in rates.split(",")]
            read = {name.strip(): float(rate) for name, rate in pairs}
            if len(read) < len(pairs):
                raise ValueError
            return read
        return {str(name): float(rate) for name, rate in rates.items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f"rates must be parts of the model and factors, each once, such as 'backbone=0.1', got "
            f"{rates!r}"
        ) from None


def rates_of(model: nn.Module, rates: Mapping[str, float]) -> dict[str, float]:
    """The factor of each parameter's learning rate, by its name.

    Args:
        model: a model of pyseg, or any module.
        rates: by part: ``"backbone"``, ``"head"`` (the layers whose shapes depend on the classes),
            the path of any module, such as ``"model.backbone.layer1"`` (``network.`` before it may
            be left out), and ``"rest"``. The longest path that fits counts; what none names has 1.

    Raises:
        PysegError: a part that the model does not have.
    """
    prefixes: dict[str, float] = {}
    for part, rate in rates.items():
        for path in _paths(model, part):
            prefixes[path] = rate
    rest = rates.get(REST, 1.0)
    factors = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        fitting = [path for path in prefixes if name.startswith(f"{path}.") or name == path]
        factors[name] = prefixes[max(fitting, key=len)] if fitting else rest
    return factors


def _paths(model: nn.Module, part: str) -> list[str]:
    """The modules that the name of a part stands for."""
    if part == REST:
        return []
    modules = dict(model.named_modules())
    if part == "head" and (heads := getattr(model, "heads", ())):
        return [path for path in (f"network.{head}" for head in heads) if path in modules]
    if part == "backbone":
        if (trunk := getattr(model, "trunk", None)) is not None:
            return [f"network.{trunk}"]
        found = [path for path in modules if path.rpartition(".")[2] in TRUNKS]
        if outermost := [p for p in found if not any(p.startswith(f"{q}.") for q in found)]:
            return outermost
    for path in (part, f"network.{part}"):
        if path in modules and path:
            return [path]
    own = [path.removeprefix("network.") for path in modules if path and path != "network"]
    nearest = difflib.get_close_matches(part, own, n=3, cutoff=0.4)
    top = [path for path in own if path.count(".") == 0]
    raise PysegError(
        f"rates: the model has no part {part!r}; give 'backbone', 'head' or 'rest' where it has "
        f"them, or a module such as {', '.join(nearest or top[:5])}"
    )


@contextlib.contextmanager
def frozen(model: nn.Module, rates: Mapping[str, float]) -> Iterator[None]:
    """Within it parameters whose rate is 0 want no gradient, so that `fit` leaves them alone."""
    factors = rates_of(model, rates)
    chosen = [
        parameter
        for name, parameter in model.named_parameters()
        if factors[name] == 0 and parameter.requires_grad
    ]
    if len(chosen) == sum(parameter.requires_grad for parameter in model.parameters()):
        raise PysegError("rates freeze the whole model; give a part of it a rate above 0")
    for parameter in chosen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(True)


def training_mode(model: nn.Module) -> None:
    """Training mode for all but what is frozen: modules none of whose parameters wants a gradient.

    These stay as they predict: normalisation keeps its statistics, dropout is off.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
