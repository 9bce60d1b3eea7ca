"""What a case draws its arguments with, and how it calls an op."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .memory import GuardedMemory, laid_out

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
EDGES = (15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513)
SPECIALS = (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, -0.0, 1e-45, 65504.0)

OPS: dict[str, tuple[float, Callable[[Draw], None]]] = {}


def op(weight: float):
    """Registers a function that makes and checks one case; ``weight`` is how often it is drawn."""

    def register(function):
        OPS[function.__name__] = weight, function
        return function

    return register


class Wrong(AssertionError):
    """An op did what it should not."""


class Draw:
    """The random choices of one case: the same for the same seed, op and number."""

    def __init__(
        self, name: str, seed: int, case: int, memory: GuardedMemory, note=lambda text: None
    ) -> None:
        self.rng = np.random.default_rng([seed, case, zlib.crc32(name.encode())])
        self.memory, self._note = memory, note
        self.threads = 2 if self.chance(0.35) else 1
        self.notes = ""  # the call in progress, for the report

    # -- numbers

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def choice(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def integer(self, low: int, high: int) -> int:
        """Both ends included."""
        return int(self.rng.integers(low, high + 1))

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def side(self, most: int = 1000, least: int = 1) -> int:
        """A length: mostly small, often next to the width of a vector or tile."""
        kind = self.rng.random()
        if kind < 0.6:
            value = self.integer(1, 9)
        elif kind < 0.8:
            value = self.integer(1, 40)
        elif kind < 0.96:
            value = self.choice(EDGES)
        else:
            value = self.integer(1, 1000)
        return max(least, min(value, most))

    def shape(self, *sides: int, budget: int) -> list[int]:
        """The sides, of which the largest are halved until their product fits."""
        result = list(sides)
        while np.prod(result, dtype=np.float64) > budget:
            largest = int(np.argmax(result))
            result[largest] = max(1, result[largest] // 2)
        return result

    # -- tensors

    def tensor(
        self,
        values: Tensor | np.ndarray,
        dtype: torch.dtype | None = None,
        broadcast: bool = True,
    ) -> Tensor:
        """The values in any layout and memory; with ``broadcast`` some may be others' instead."""
        if isinstance(values, np.ndarray):
            values = torch.from_numpy(np.ascontiguousarray(values))
        values = values if dtype is None else values.to(dtype)
        return laid_out(values, self.rng, self.memory, broadcast)

    def normal(self, shape: Sequence[int], scale: float = 1.0) -> Tensor:
        return torch.from_numpy(self.rng.standard_normal(shape) * scale)

    def numbers(self, shape: Sequence[int], specials: bool = True) -> Tensor:
        """float64 numbers of one of several kinds: normal, few values, huge, constant, special."""
        kind = self.rng.random()
        if kind < 0.55:
            return self.normal(shape, self.choice((0.01, 1.0, 1.0, 30.0)))
        if kind < 0.7:  # equal values are frequent
            return torch.from_numpy(self.rng.integers(-2, 3, shape).astype(np.float64))
        if kind < 0.75:
            return torch.full(tuple(shape), self.choice((0.0, 1.0, -3.5)), dtype=torch.float64)
        if kind < 0.8 or not specials:
            return self.normal(shape, self.choice((1e-30, 1e-3, 1e3)))
        values = self.rng.standard_normal(shape)
        rare = self.rng.random(shape) < self.choice((0.02, 0.1, 0.5))
        options = SPECIALS if self.chance(0.5) else (self.choice(SPECIALS),)
        return torch.from_numpy(np.where(rare, self.rng.choice(options, shape), values))

    def labels(self, shape: Sequence[int], most: int) -> np.ndarray:
        """Labels 0 to most - 1, in noise, stripes or patches."""
        kind = self.rng.random()
        if kind < 0.4 or 0 in shape:
            return self.rng.integers(0, most, shape)
        if kind < 0.5:
            return np.full(shape, self.integer(0, most - 1))
        cell = self.integer(1, 12)
        coarse = self.rng.integers(
            0, most, (*shape[:-2], -(-shape[-2] // cell), -(-shape[-1] // cell))
        )
        fine = coarse.repeat(cell, -2).repeat(cell, -1)[..., : shape[-2], : shape[-1]]
        if kind < 0.8:
            noise = self.rng.random(shape) < self.choice((0.002, 0.05))
            fine = np.where(noise, self.rng.integers(0, most, shape), fine)
        return fine

    # -- calls

    def doing(self, what: str) -> None:
        """Notes what is being called, also where it is found after the process died."""
        self.notes = what
        self._note(what)

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """What the op returns, after making sure that its inputs are as before.

        Now and then it is called once more with another number of threads, for the same bits.
        """
        inputs = tensors_of((args, kwargs))
        self.doing(f"{function.__name__}{describe((args, kwargs))} threads={self.threads}")
        before = [bits(tensor.detach()).clone() for tensor in inputs]
        torch.set_num_threads(self.threads)
        result = function(*args, **kwargs)
        for tensor, then in zip(inputs, before, strict=True):
            if not torch.equal(bits(tensor.detach()), then):
                raise Wrong(f"{function.__name__} changed an input of {list(tensor.shape)}")
        if self.chance(0.2):
            torch.set_num_threads(3 - self.threads)
            self.same(function(*args, **kwargs), result, "with another number of threads")
            torch.set_num_threads(self.threads)
        return result

    def same(self, ours: Any, other: Any, what: str) -> None:
        """Equal bit for bit."""
        for one, two in zip(tensors_of(ours), tensors_of(other), strict=True):
            if one.shape != two.shape or one.dtype != two.dtype:
                raise Wrong(f"{what}: {one.dtype} {list(one.shape)}, {two.dtype} {list(two.shape)}")
            if not torch.equal(bits(one.detach()), bits(two.detach())):
                raise Wrong(f"{what}: other bits")

    def refuses(
        self, function: Callable[..., Any], name: str, *, parts: tuple[str, ...] = (), **kwargs: Any
    ) -> None:
        """The call must raise a ValueError or TypeError that names the argument or a part of it."""
        self.doing(f"{function.__name__}{describe(((), kwargs))}, wrong: {name}")
        torch.set_num_threads(self.threads)
        try:
            function(**kwargs)
        except (ValueError, TypeError) as error:
            if not any(part in str(error) for part in (name, *parts)):
                raise Wrong(f"the {type(error).__name__} does not name {name}: {error}") from None
        except Exception as error:
            raise Wrong(f"{type(error).__name__} where {name} is wrong: {error}") from None
        else:
            raise Wrong(f"a wrong {name} is accepted")


def bits(tensor: Tensor) -> Tensor:
    """As integers, for which NaN equals NaN and -0 is not 0."""
    if not tensor.dtype.is_floating_point:
        return tensor
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.view(size)


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in tensors_of(part)]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_of(part)]
    return []


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"{name}{list(value.shape)}/{list(value.stride())}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={describe(part)}" for key, part in value.items())
    if isinstance(value, tuple) and [type(part) for part in value] == [tuple, dict]:  # a call's
        parts = [*map(describe, value[0]), describe(value[1])]
        return f"({', '.join(part for part in parts if part)})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(describe, value))}]"
    if isinstance(value, np.ndarray):
        return f"numpy.{value.dtype}{list(value.shape)}"
    return repr(value)


NO_TENSORS = (None, 3, "text", [1.0, 2.0], np.zeros((2, 3, 4), np.float32))


def no_integer(draw: Draw) -> Any:
    """What stands where an integer belongs."""
    return draw.choice(
        (None, "2", 1.5, float("nan"), float("inf"), [1, 2, 3], 2**63, 2**70, -(2**70))
    )


def no_number(draw: Draw) -> Any:
    return draw.choice((None, "2", [1.0, 2.0, 3.0], float("nan"), {}))


def close(
    ours: Tensor,
    expected: Tensor,
    tolerance: Tensor | float,
    what: str,
    where: Tensor | None = None,
) -> None:
    """|ours - expected| <= tolerance, and NaN and infinities in the same places."""
    if ours.shape != expected.shape:
        raise Wrong(f"{what}: shape {list(ours.shape)}, expected {list(expected.shape)}")
    ours, expected = ours.detach().double(), expected.detach().double()
    good = (ours == expected) | (ours.isnan() & expected.isnan())
    good |= (ours - expected).abs() <= tolerance
    if where is not None:
        good |= ~where
    if not good.all():
        at = tuple((~good).nonzero()[0].tolist())
        raise Wrong(
            f"{what}: {int((~good).sum())} of {good.numel()} differ, first at {list(at)}: "
            f"{ours[at].item():.9g}, expected {expected[at].item():.9g}"
        )
