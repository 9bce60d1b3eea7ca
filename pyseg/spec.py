"""Pipeline specs as text: ``"streetnet+crf(iterations=5)+sam2(mode='prompt')"``.

A spec is stages joined by ``+``: the name of a model, then names of refiners, each with options in
parentheses. Option values are Python literals. This module knows the grammar only; which names and
options exist is up to the registries.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import SpecError


@dataclass(frozen=True)
class StageSpec:
    """One stage: its registered name and the options given for it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


@dataclass(frozen=True)
class Spec:
    """A parsed spec; ``str(spec)`` is its canonical text, which parses to an equal spec."""

    stages: tuple[StageSpec, ...]

    def __str__(self) -> str:
        return "+".join(map(str, self.stages))


def parse(text: str | Spec) -> Spec:
    """Parses a spec.

    Args:
        text: the spec; a `Spec` is returned as it is.

    Raises:
        SpecError: it does not follow the grammar, with the place and the remedy.

    Example:
        >>> str(parse("a + b(x = 1.0, y='p+q')"))
        "a+b(x=1.0, y='p+q')"
    """
    if isinstance(text, Spec):
        return text
    if not isinstance(text, str):
        raise SpecError(f"spec must be a string such as 'streetnet+crf', got {type(text).__name__}")
    if not text.strip():
        raise SpecError("spec is empty; give at least a model, such as 'streetnet'")
    try:
        # The grammar is a subset of Python's, so Python's parser finds quotes and parentheses.
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        where = getattr(error, "offset", None)
        raise SpecError(
            f"spec {text!r} does not parse{f' at character {where}' if where else ''}: write "
            "name+name(option=value), with quotes around text values"
        ) from None
    nodes: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        nodes.append(tree.right)
        tree = tree.left
    nodes.append(tree)
    return Spec(tuple(_stage(node, text) for node in reversed(nodes)))


def _stage(node: ast.expr, text: str) -> StageSpec:
    if not isinstance(node, ast.Call):
        return StageSpec(_name(node, text))
    name = _name(node.func, text)
    if node.args:
        raise SpecError(
            f"stage {name!r}: options need names, got {ast.unparse(node.args[0])!r}; write "
            f"{name}(option={ast.unparse(node.args[0])})"
        )
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise SpecError(f"stage {name!r}: '**' is not allowed in a spec")
        if keyword.arg in options:
            raise SpecError(f"stage {name!r}: option {keyword.arg!r} is given twice")
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            value = ast.unparse(keyword.value)
            remedies = {"true": "True", "false": "False", "none": "None", "null": "None"}
            remedy = remedies.get(value.lower(), repr(value))
            raise SpecError(
                f"stage {name!r}: {keyword.arg}={value} is not a literal; write "
                f"{keyword.arg}={remedy}"
            ) from None
    return StageSpec(name, options)


def _name(node: ast.expr, text: str) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise SpecError(
            f"spec {text!r}: {ast.unparse(node)!r} is not a stage; stages are names such as crf or "
            "crf(iterations=5), joined by '+'"
        )
    return ".".join([node.id, *reversed(parts)])
