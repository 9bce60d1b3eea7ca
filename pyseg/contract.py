"""The contract with packages that extend pyseg: its version, what they say of themselves, warnings.

``[tool.pyseg]`` of a plugin's pyproject.toml travels in its metadata: ``license-files`` names that
file, as it states licences, so every build back end puts it into the wheel's ``dist-info/licenses``
(PEP 639), and it is read here without importing the plugin. `docs/plugins.md` is the contract's
text: what is stable, and how it changes.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import DeprecatedApi, PluginError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

API_VERSION = "1.0"
"""MAJOR.MINOR of the interface that plugins use: a minor one adds, a major one breaks."""

GROUPS = {
    "model": "pyseg.models",
    "refiner": "pyseg.refiners",
    "metric": "pyseg.metrics",
    "dataset": "pyseg.datasets",
    "promptable": "pyseg.promptables",
    "op": "pyseg.ops",
}
"""Kind of plugin -> the entry-point group in which it is declared."""
COMMANDS = "pyseg.commands"
"""The group of commands, ``pyseg NAME``. Their kind is "command"; no spec names them."""

NEEDS = ("gpu", "network")
_FILE = "licenses/pyproject.toml"  # in dist-info
_KEYS = ("api", "kind", "needs", "tasks", "weights-licence")


@dataclass(frozen=True)
class Statement:
    """What a plugin says of itself in ``[tool.pyseg]``."""

    distribution: str
    version: str
    api: str  # the oldest API_VERSION that it works with
    kind: tuple[str, ...]  # keys of `GROUPS`, or "command"
    tasks: tuple[str, ...]  # such as "semantic", in its own words
    licence: str | None  # of the code, which is that of the distribution
    weights_licence: str | None  # None where it brings and fetches none
    needs: tuple[str, ...]  # of `NEEDS`


def statement(distribution: importlib.metadata.Distribution) -> Statement | None:
    """Reads a distribution's ``[tool.pyseg]``; None where it carries none. Imports nothing of it.

    Raises:
        PluginError: it needs another API than `API_VERSION`, or the table does not hold what it
            should.
    """
    text = distribution.read_text(_FILE)
    if text is None:
        return None
    where = f"[tool.pyseg] of {distribution.name}"
    try:
        table = tomllib.loads(text).get("tool", {}).get("pyseg")
    except tomllib.TOMLDecodeError as error:
        raise PluginError(
            f"pyproject.toml of {distribution.name} does not parse: {error}"
        ) from error
    if table is None:
        return None
    if not isinstance(table, dict):
        raise PluginError(f"{where} must be a table, got {table!r}")
    # At first: a newer contract may have keys that this one does not know.
    api = table.get("api")
    _check_api(distribution, where, api)
    unknown = sorted(set(table) - set(_KEYS))
    if unknown:
        raise PluginError(f"{where} has no key {unknown[0]!r}; its keys: {', '.join(_KEYS)}")
    kind = _words(where, table, "kind", (*GROUPS, "command"))
    if not kind:
        raise PluginError(f"{where} lacks kind, one or a list of {', '.join((*GROUPS, 'command'))}")
    weights = table.get("weights-licence")
    if weights is not None and not isinstance(weights, str):
        raise PluginError(f"{where}: weights-licence must be a text, got {weights!r}")
    metadata: Any = distribution.metadata
    licence = metadata.get("License-Expression") or metadata.get("License")
    return Statement(
        distribution.name,
        distribution.version,
        str(api),
        kind,
        _words(where, table, "tasks"),
        licence,
        weights,
        _words(where, table, "needs", NEEDS),
    )


def check_api(distribution: importlib.metadata.Distribution | None) -> None:
    """Holds what a plugin says of itself against this pyseg, before it is imported.

    Raises:
        PluginError: see `statement`.
    """
    if distribution is not None:
        statement(distribution)


def deprecated(what: str, *, since: str, instead: str) -> None:
    """Warns the caller's caller that a name will go.

    Args:
        what: is used.
        since: the `API_VERSION` that began to warn; the next minor one has the name no more, which
            `tests/test_contract.py` holds.
        instead: what to use.
    """
    warnings.warn(
        f"{what} is deprecated since API {since} and gone in the next; use {instead}",
        DeprecatedApi,
        stacklevel=3,
    )


def _check_api(distribution: importlib.metadata.Distribution, where: str, api: Any) -> None:
    found = re.fullmatch(r"(\d+)\.(\d+)", api) if isinstance(api, str) else None
    if found is None:
        raise PluginError(
            f'{where}: api must be the oldest API_VERSION that it works with, as "{API_VERSION}", '
            f"got {api!r}"
        )
    wanted = int(found[1]), int(found[2])
    major, minor = map(int, API_VERSION.split("."))
    plugin = f"{distribution.name} {distribution.version}"
    if wanted > (major, minor):
        raise PluginError(
            f"{plugin} needs API {api} of pyseg, this pyseg has {API_VERSION}: "
            f"pip install -U pyseg-toolkit, or an older {distribution.name}"
        )
    if wanted[0] < major:
        raise PluginError(
            f"{plugin} was made for API {api} of pyseg, and this pyseg has {API_VERSION}, which "
            f"breaks with it: pip install -U {distribution.name}"
        )


def _words(
    where: str, table: dict[str, Any], key: str, known: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The value of a key, one text or a list of texts."""
    value = table.get(key, [])
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise PluginError(f"{where}: {key} must be a text or a list of texts, got {value!r}")
    for word in words:
        if known is not None and word not in known:
            raise PluginError(f"{where}: {key} must be of {', '.join(known)}, got {word!r}")
    return tuple(words)
