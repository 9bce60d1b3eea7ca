"""Pipeline specs as text: ``"streetnet+crf(iterations=5)+sam2(mode='prompt')"``.

A spec is stages joined by ``+``: the name of a model, then names of refiners, each with options in
parentheses. Option values are Python literals. Where two distributions provide one name,
``distribution:name`` chooses. This module knows the grammar only; which names and options exist is
up to the registries.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import SpecError

MAX_LENGTH = 10_000  # characters of a spec
_OWNED = re.compile(r"\s*([A-Za-z0-9][\w.-]*):(?=[^\W\d])")  # "distribution:" before a name
_OWNER = "_distribution_{}"  # what stands for it while Python's parser reads the spec


def shown(value: Any, limit: int = 100) -> str:
    """``repr(value)`` for a message, cut to ``limit`` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4300 digits, deep nesting
        return f"a {type(value).__name__} that is too large to print"
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


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
    return _parsed(text, several=False)[0]


def parse_list(text: str) -> tuple[Spec, ...]:
    """Parses specs that commas separate; commas in parentheses and quotes belong to a spec.

    Raises:
        SpecError: one of them does not follow the grammar.

    Example:
        >>> [str(spec) for spec in parse_list("a, b(x=1, y=(2, 3)), c+d")]
        ['a', 'b(x=1, y=(2, 3))', 'c+d']
    """
    return _parsed(text, several=True)


def _parsed(text: str, several: bool) -> tuple[Spec, ...]:
    if not text.strip():
        raise SpecError("spec is empty; give at least a model, such as 'streetnet'")
    if len(text) > MAX_LENGTH:
        raise SpecError(f"spec has {len(text)} characters, at most {MAX_LENGTH} are read")
    source, owners = _without_owners(text.strip())
    try:
        # The grammar is a subset of Python's, so Python's parser finds quotes and parentheses.
        tree = ast.parse(source, mode="eval").body
        listed = several and isinstance(tree, ast.Tuple) and tree.elts
        trees: list[ast.expr] = listed or [tree]
        return tuple(_spec(each, text, owners) for each in trees)
    except SpecError:
        raise
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        where = None if owners else getattr(error, "offset", None)
        raise SpecError(
            f"spec {shown(text)} does not parse{f' at character {where}' if where else ''}: write "
            "name+name(option=value), with quotes around text values"
        ) from None


def _spec(tree: ast.expr, text: str, owners: Sequence[str]) -> Spec:
    nodes: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        nodes.append(tree.right)
        tree = tree.left
    nodes.append(tree)
    return Spec(tuple(_stage(node, text, owners) for node in reversed(nodes)))


def _without_owners(text: str) -> tuple[str, list[str]]:
    """The spec as Python can read it, and the distributions that were named in it, in order."""
    owners: list[str] = []
    parts: list[str] = []
    depth, position, at_start = 0, 0, True
    while position < len(text):
        if at_start and (found := _OWNED.match(text, position)):
            parts.append(_OWNER.format(len(owners)) + ".")
            owners.append(found[1])
            position, at_start = found.end(), False
            continue
        character = text[position]
        end = position + 1
        if character in "'\"":
            while end < len(text) and text[end] != character:
                end += 2 if text[end] == "\\" else 1
            end += 1
        depth += (character in "([{") - (character in ")]}")
        at_start = depth == 0 and (character in "+," or (at_start and character.isspace()))
        parts.append(text[position:end])
        position = end
    return "".join(parts), owners


def _stage(node: ast.expr, text: str, owners: Sequence[str]) -> StageSpec:
    if not isinstance(node, ast.Call):
        return StageSpec(_name(node, text, owners))
    name = _name(node.func, text, owners)
    if node.args:
        value = _source(node.args[0])
        raise SpecError(
            f"stage {shown(name)}: options need names, got {value!r}; write {name}(option={value})"
        )
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise SpecError(f"stage {shown(name)}: '**' is not allowed in a spec")
        if keyword.arg in options:
            raise SpecError(f"stage {shown(name)}: option {shown(keyword.arg)} is given twice")
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError):  # not hashable, in a set or as a key
            value = _source(keyword.value)
            remedies = {"true": "True", "false": "False", "none": "None", "null": "None"}
            remedy = remedies.get(value.lower(), repr(value))
            raise SpecError(
                f"stage {shown(name)}: {keyword.arg}={value} is not a literal; write "
                f"{keyword.arg}={remedy}"
            ) from None
        if not _printable(options[keyword.arg]):
            raise SpecError(
                f"stage {shown(name)}: option {keyword.arg} must hold finite numbers below 2^63, "
                f"got {shown(options[keyword.arg])}"
            )
    return StageSpec(name, options)


def _source(node: ast.expr) -> str:
    """What was written, for messages."""
    text = ast.unparse(node)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _printable(value: Any) -> bool:
    """Whether the canonical text of a literal can be parsed again."""
    if isinstance(value, (tuple, list, set)):
        return all(map(_printable, value))
    if isinstance(value, dict):
        return all(map(_printable, (*value, *value.values())))
    if isinstance(value, (float, complex)):
        return math.isfinite(abs(value))
    return not isinstance(value, int) or abs(value) < 2**63


def _name(node: ast.expr, text: str, owners: Sequence[str]) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise SpecError(
            f"spec {shown(text)}: {_source(node)!r} is not a stage; stages are names such as crf "
            "or crf(iterations=5), joined by '+'"
        )
    parts.append(node.id)
    for index, owner in enumerate(owners):
        if node.id == _OWNER.format(index) and len(parts) > 1:
            return f"{owner}:{'.'.join(reversed(parts[:-1]))}"
    return ".".join(reversed(parts))
