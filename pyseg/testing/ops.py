"""The suite of ops."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..registry import ops
from .checking import Check, called, check_import, kind_of, registered

OF_TORCH = {"aten", "prim", "prims", "profiler", "inductor", "higher_order", "_c10d_functional"}


def check_op(
    op: str | Callable[..., Any],
    /,
    examples: Sequence[Sequence[Any]] | None = None,
    reference: Callable[..., Any] | None = None,
    *,
    tolerance: float | None = None,
    compiles: bool = True,
) -> None:
    """Checks an op: a function of tensors over operators that were registered with torch.

    Of every example: that the result equals the reference's, whatever the strides and the number of
    threads; that inputs stay as they are; `torch.library.opcheck` of each operator that was called
    (schema, fake kernel, autograd, dynamic shapes); `torch.compile(fullgraph=True)`; where there is
    a GPU, the same there. That no tensor at all is refused by a `TypeError` or `ValueError`.

    Args:
        op: a registered name, or the function.
        examples: tuples of arguments, tensors on the CPU among them: usual sizes, odd ones, and
            none (no elements); None = what ``examples()`` of the op's module returns.
        reference: another way to the same, of the same arguments; None = ``reference`` of the op's
            module. Integers and truth values must be equal, floats close.
        tolerance: largest difference of floats from the reference, of an op that approximates it;
            None = what rounding makes of equal formulas.
        compiles: False of an op of which values decide what it does, as of a file, so that
            ``torch.compile(fullgraph=True)`` cannot trace it; its operators are checked all the
            same.

    Raises:
        AssertionError: the first thing that is not as it should be.
        UnknownName: nothing has that name.

    Example:
        >>> check_op(boundary_mask, [(labels, 2)], lambda labels, distance: …)
    """
    with registered(ops, op) as name:
        check = Check(f"op {op if isinstance(op, str) else called(op)}")
        check_import(check, ops, name)
        function = ops.get(name)
        module = sys.modules[function.__module__]
        if examples is None:
            check(hasattr(module, "examples"), f"{module.__name__} has no function examples()")
            with check.doing("examples()"):
                examples = list(module.examples())
        reference = reference or getattr(module, "reference", None)
        check(reference is not None, f"{module.__name__} has no function reference()")
        check(len(examples) > 0, "there is no example")
        assert reference is not None
        for number, arguments in enumerate(examples):
            _check_example(
                check,
                f"example {number}",
                function,
                tuple(arguments),
                reference,
                tolerance,
                compiles,
            )
        first = tuple(examples[0])
        check.raises((TypeError, ValueError), "None", lambda: function(*[None] * len(first)))


def _check_example(
    check: Check,
    what: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    reference: Callable[..., Any],
    tolerance: float | None,
    compiles: bool,
) -> None:
    before = copy.deepcopy(arguments)
    with check.doing(what), _Calls() as calls:
        result = function(*arguments)
    same = all(map(_identical, tree_leaves(before), tree_leaves(arguments)))
    check(same, f"{what}: it changes its arguments")
    with check.doing(f"{what}: the reference"):
        expected = reference(*copy.deepcopy(arguments))
    _compare(check, f"{what}: it and the reference", result, expected, tolerance)
    with check.doing(f"{what}, again"):
        again = function(*arguments)
    check(_all_identical(result, again), f"{what}: it gives another result the second time")
    with check.doing(f"{what} with other strides"):
        strided = function(*tree_map(_strided, arguments))
    _compare(check, f"{what}: other strides and usual ones", strided, result)
    with _threads(4 if torch.get_num_threads() == 1 else 1), check.doing(f"{what}, other threads"):
        threaded = function(*arguments)
    check(_all_identical(result, threaded), f"{what}: the number of threads changes the result")
    check(bool(calls.made), f"{what}: it calls no operator but torch's own")
    for operator, given, named in calls.made:
        with check.doing(f"{what}: opcheck of {operator}"):
            torch.library.opcheck(operator, given, named)
    if compiles:
        with check.doing(f"{what}: torch.compile(fullgraph=True)"):
            torch.compiler.reset()
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
        _compare(check, f"{what}: compiled and not", compiled, result)
    if torch.cuda.is_available():
        there = tree_map(lambda a: a.cuda() if isinstance(a, Tensor) else a, arguments)
        with check.doing(f"{what} on the GPU"):
            found = function(*there)
        places = {x.device.type for x in tree_leaves(found) if isinstance(x, Tensor)}
        check(places <= {"cuda"}, f"{what}: it ignores the device, and gives {places} for cuda")
        _compare(check, f"{what}: GPU and CPU", tree_map(_on_cpu, found), result)


class _Calls(TorchDispatchMode):
    """Which operators but torch's own are called within it, with copies of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace not in OF_TORCH:
            self.made.append((func, copy.deepcopy(args), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


class _threads:
    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *_: Any) -> None:
        torch.set_num_threads(self.before)


def _compare(check: Check, what: str, one: Any, other: Any, tolerance: float | None = None) -> None:
    first, second = _tensors(one), _tensors(other)
    check(len(first) == len(second), f"{what} give {len(first)} and {len(second)} tensors")
    for a, b in zip(first, second, strict=True):
        alike = a.shape == b.shape and a.dtype == b.dtype
        check(alike, f"{what} differ: {kind_of(a)} and {kind_of(b)}")
        if a.is_floating_point() or a.is_complex():
            rtol, atol = (1e-4, 1e-5) if tolerance is None else (0.0, tolerance)
            close = torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
            check(close, f"{what} differ")
        else:
            check(torch.equal(a, b), f"{what} differ")


def _tensors(value: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _identical(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return bool(torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))
    return bool(one == other)


def _all_identical(one: Any, other: Any) -> bool:
    first, second = _tensors(one), _tensors(other)
    return len(first) == len(second) and all(
        a.shape == b.shape and _identical(a, b) for a, b in zip(first, second, strict=True)
    )


def _strided(value: Any) -> Any:
    """The same numbers at other places in memory: every second one."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    wide = value.new_zeros(*value.shape[:-1], 2 * value.shape[-1])
    wide[..., ::2] = value.detach()
    return wide[..., ::2].requires_grad_(value.requires_grad)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
