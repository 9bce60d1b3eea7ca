"""Names to objects, over entry points and `register` calls.

Built-ins and third parties go the same way: an entry point in the group ``pyseg.models``,
``pyseg.refiners``, ``pyseg.metrics`` or ``pyseg.datasets`` of an installed distribution, or a
``register`` call at run time. Listing reads metadata only; `get` imports the one object asked for.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import threading
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import PluginError, SpecError, UnknownName
from .spec import StageSpec


@dataclass(frozen=True)
class Info:
    """What is known about a name without importing it."""

    name: str
    target: str  # "module:attribute"
    distribution: str  # the package that provides it, or "register()"
    version: str | None


class Registry:
    """The entries of one entry-point group; each of pyseg's family packages exposes one.

    Args:
        kind: what an entry is called in messages, such as ``"model"``.
        group: the entry-point group.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._registered: dict[str, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def _found(self) -> dict[str, dict[tuple[str, str], importlib.metadata.EntryPoint]]:
        """name -> (distribution, target) -> entry point; more than one inner key is a clash."""
        found: dict[str, dict[tuple[str, str], importlib.metadata.EntryPoint]] = {}
        for point in importlib.metadata.entry_points(group=self.group):
            owner = point.dist.name if point.dist else "an unknown distribution"
            # A source checkout can show one distribution twice, installed and as egg-info.
            found.setdefault(point.name, {}).setdefault((owner, point.value), point)
        return found

    def list(self) -> list[str]:
        """All names, sorted. Imports nothing."""
        return sorted({*self._found(), *self._registered})

    def info(self, name: str) -> Info:
        """Where ``name`` comes from, without importing it.

        Raises:
            UnknownName: nothing has that name.
            PluginError: two distributions claim it.
        """
        if name in self._registered:
            entry = self._registered[name]
            return Info(name, f"{entry.__module__}:{entry.__qualname__}", "register()", None)
        point = self._point(name)
        return Info(
            name,
            point.value,
            point.dist.name if point.dist else "an unknown distribution",
            point.dist.version if point.dist else None,
        )

    def get(self, name: str) -> Callable[..., Any]:
        """The factory registered under ``name``: called with options, it makes the object.

        Raises:
            UnknownName: nothing has that name; the message lists the nearest and all others.
            PluginError: two distributions claim the name, or the plugin fails to import.
        """
        if name in self._registered:
            return self._registered[name]
        point = self._point(name)
        try:
            factory = point.load()
        except Exception as error:  # a plugin may raise anything; only its users are told
            owner = point.dist.name if point.dist else "unknown"
            raise PluginError(
                f"{self.kind} {name!r} of distribution {owner!r} ({point.value}) fails to import: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not callable(factory):
            raise PluginError(
                f"{self.kind} {name!r} ({point.value}) must be a class or function that makes a "
                f"{self.kind}, got {type(factory).__name__}"
            )
        return factory

    def _point(self, name: str) -> importlib.metadata.EntryPoint:
        found = self._found()
        if name not in found:
            names = self.list()
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise UnknownName(
                f"no {self.kind} is called {name!r}.{hint} "
                f"Known {self.kind}s: {', '.join(names) or 'none (is pyseg-toolkit installed?)'}."
            )
        claims = found[name]
        if len(claims) > 1:
            owners = " and ".join(sorted(f"{owner} ({value})" for owner, value in claims))
            raise PluginError(
                f"{self.kind} {name!r} is claimed by {owners}; uninstall one of them, or rename "
                "its entry point"
            )
        return next(iter(claims.values()))

    def register(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator that registers a class or function for this process.

        Packages declare an entry point instead, which needs no import to be found.

        Raises:
            PluginError: the name is taken by something else.

        Example:
            >>> @models.register("mine")
            ... def mine(*, num_classes=None, weights=None): ...
        """

        def add(factory: Callable[..., Any]) -> Callable[..., Any]:
            def origin(entry: Callable[..., Any]) -> tuple[str, str]:
                return entry.__module__, entry.__qualname__

            with self._lock:
                taken = self._registered.get(name)
                reloaded = taken is not None and origin(taken) == origin(factory)
                if name in self._found() or (taken is not None and not reloaded):
                    raise PluginError(
                        f"{self.kind} {name!r} is already registered by "
                        f"{self.info(name).target}; choose another name"
                    )
                self._registered[name] = factory
            return factory

        return add


def accepted_options(factory: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """The keyword options of ``factory``, or None where it takes any (``**options``)."""
    parameters = inspect.signature(factory).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    usable = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {name: p for name, p in parameters.items() if p.kind in usable}


def check_options(stage: StageSpec, factory: Callable[..., Any]) -> None:
    """Holds a stage's options against the signature of its factory.

    Raises:
        SpecError: an option that the factory lacks, or a value that its annotation excludes; the
            message lists the accepted options.
    """
    accepted = accepted_options(factory)
    if accepted is None:
        return
    hints = _type_hints(factory)
    listing = ", ".join(
        name if p.default is p.empty else f"{name}={p.default!r}" for name, p in accepted.items()
    )
    for name, value in stage.options.items():
        if name not in accepted:
            near = difflib.get_close_matches(name, accepted, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SpecError(
                f"stage {stage.name!r} has no option {name!r}{hint} "
                f"Its options: {listing or 'none'}."
            )
        if name in hints and not _fits(value, hints[name]):
            wanted = hints[name]
            text = wanted.__name__ if isinstance(wanted, type) else str(wanted)
            raise SpecError(
                f"stage {stage.name!r}: option {name} must be {text.replace('typing.', '')}, got "
                f"{value!r}. Its options: {listing}."
            )


def _type_hints(factory: Callable[..., Any]) -> dict[str, Any]:
    try:
        function = vars(factory).get("__init__", factory) if isinstance(factory, type) else factory
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        return {}  # annotations that only a type checker resolves


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a literal can be meant for the annotation; unknown annotations fit anything."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (str, bool, dict):
        return isinstance(value, annotation)
    if annotation is type(None):
        return value is None
    if annotation is Path:
        return False  # never a literal of a spec; the union that it stands in offers str too
    if isinstance(origin, type) and issubclass(origin, (tuple, Sequence)):
        return isinstance(value, (tuple, list))
    return True
