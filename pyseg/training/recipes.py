"""Recipes: the options of a training in a YAML file, by the names that they have everywhere.

A recipe is a flat list of options, each as `pyseg train` has it; a file includes no other. Some
come with pyseg, in ``pyseg/recipes``, and go by their name alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import PysegError

FOLDER = Path(__file__).resolve().parents[1] / "recipes"

_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "a mapping",
}


def names() -> tuple[str, ...]:
    """The recipes that come with pyseg."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def read_recipe(recipe: str | Path, kinds: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """The options of a recipe.

    Args:
        recipe: the path of a ``.yaml`` file, or the name of one that comes with pyseg.
        kinds: the options that there are, with the types that each may have in a file. A number may
            be written as text, such as ``1e-4``, which YAML takes for text.

    Returns:
        Options by name, with underscores.

    Raises:
        PysegError: there is no such recipe, it is no YAML, or no flat list of options; an option
            that is unknown, given twice, without a value or of another type.

    Example:
        >>> read_recipe("fcn_resnet50_cityscapes", {"epochs": (int,), …})["epochs"]
        2
    """
    path = _found(recipe)
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise PysegError(f"recipe {str(path)!r} cannot be read as YAML: {reason}") from None
    if not isinstance(content, dict) or not isinstance(node, yaml.MappingNode):
        raise PysegError(f"recipe {str(path)!r} must be options, a line 'name: value' each")
    lines = [str(key.value).replace("-", "_") for key, _ in node.value]
    if twice := [name for name in lines if lines.count(name) > 1]:
        raise PysegError(f"recipe {str(path)!r} gives {twice[0]} twice")  # YAML takes the last one
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.0)
            raise PysegError(
                f"recipe {str(path)!r}: there is no option {key!r}; the nearest is {near[0]}"
            )
        found[name] = _converted(value, kinds[name], f"recipe {str(path)!r}: {name}")
    return found


def _found(recipe: str | Path) -> Path:
    text = str(recipe)
    path = Path(recipe)
    if path.suffix.lower() in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise PysegError(f"recipe {text!r} does not exist; check the path")
        return path
    if text in names():
        return FOLDER / f"{text}.yaml"
    near = difflib.get_close_matches(text, names(), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise PysegError(
        f"there is no recipe {text!r}; {hint}give a .yaml file, or one of {', '.join(names())}"
    )


def _converted(value: Any, kinds: tuple[type, ...], where: str) -> Any:
    """A value as one of ``kinds``."""
    if type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    for kind in (int, float):
        if kind in kinds and isinstance(value, str):
            try:
                return kind(value)
            except ValueError:
                pass
    if str in kinds and type(value) in (int, float):
        return str(value)
    wanted = " or ".join(_WORDS[kind] for kind in kinds)
    got = "nothing" if value is None else repr(value)
    raise PysegError(f"{where} must be {wanted}, got {got}")
