"""Names to objects, over entry points and `register` calls.

Built-ins and third parties go the same way: an entry point in a group of
`pyseg.contract.GROUPS`, such as ``pyseg.models``, of an installed distribution, or a ``register``
call at run time. Listing reads metadata only; `Registry.get` imports the one object
asked for, and `Registry.make` is the one place where a name with options becomes an object.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import importlib.metadata
import inspect
import os
import re
import sys
import threading
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from .contract import COMMANDS, GROUPS, check_api
from .errors import PluginError, PluginFailure, PysegError, SpecError, UnknownName
from .spec import StageSpec, parse, shown

T = TypeVar("T")

_MOST_SHOWN = 30  # names in a message: the nearest ones
MAX_CLASSES = 32767  # label maps of 256 classes and more are int16

# What the house calls on an object of each kind; more is optional, see `pyseg.types`.
MEMBERS = {
    "model": ("classes", "predict"),
    "refiner": ("refine",),
    "metric": ("update", "state", "load_state", "compute"),
    "dataset": ("classes", "palette", "__len__", "__getitem__"),
    "promptable": ("embed", "predict", "upsample"),
}
# What of the context of `Registry.make` a factory with ``**options`` is told: what factories of its
# kind take by convention, and pass on.
FORWARDED = {
    "model": ("num_classes", "weights"),
    "refiner": ("weights",),
    "metric": ("classes",),
    "dataset": ("root", "split"),
    "promptable": ("weights",),
}
_visible: frozenset[str] | None = None  # distributions that are found; None = all
_ORIGIN = "_pyseg_stage"  # attribute of an object that was made from a name: its StageSpec


@dataclass(frozen=True)
class Info:
    """What is known about a name without importing it."""

    name: str
    target: str  # "module:attribute"
    distribution: str  # the package that provides it, or "register()"
    version: str | None


@dataclass(frozen=True)
class Option:
    """One keyword option of a factory."""

    name: str
    type: str | None  # its annotation, as text; None where it has none
    default: str | None  # as text; None where the option must be given


@dataclass(frozen=True)
class Description(Info):
    """What is known about a name once it is imported."""

    kind: str
    signature: str  # "streetnet(*, num_classes: int | None = None, …)"
    options: tuple[Option, ...]
    any_option: bool  # the factory takes options beside these
    documentation: str  # its docstring, "" where it has none

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class Registry(Generic[T]):
    """The entries of one entry-point group; each of pyseg's family packages exposes one.

    A name may be written ``distribution:name``, which tells apart what two distributions provide.

    Args:
        kind: what an entry is called in messages: one of `MEMBERS`.
        group: the entry-point group.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._registered: dict[str, Callable[..., T]] = {}
        self._lock = threading.Lock()
        self._known: tuple[Any, Any] | None = None

    def _found(self) -> dict[str, dict[tuple[str, str], importlib.metadata.EntryPoint]]:
        """name -> (distribution, target) -> entry point; more than one inner key is a clash."""
        # Metadata of all distributions are read, which takes 50 ms: only where any may be new.
        paths = [(path, _changed(path)) for path in sys.path]
        state = importlib.metadata.entry_points, _visible, paths
        if self._known is None or self._known[0] != state:
            found: dict[str, dict[tuple[str, str], importlib.metadata.EntryPoint]] = {}
            for point in importlib.metadata.entry_points(group=self.group):
                if _visible is not None and _normal(_owner(point)) not in _visible:
                    continue
                # A source checkout can show one distribution twice, installed and as egg-info.
                found.setdefault(point.name, {}).setdefault((_owner(point), point.value), point)
            self._known = state, found
        return self._known[1]

    def list(self, pattern: str | None = None) -> list[str]:
        """The names, sorted. Imports nothing.

        Args:
            pattern: keeps the names that match, ``*`` and ``?`` stand for any characters:
                ``"*resnet*"``. None = all.
        """
        names = sorted({*self._found(), *self._registered})
        return names if pattern is None else fnmatch.filter(names, pattern)

    def entries(self, pattern: str | None = None) -> Sequence[Info]:
        """`Info` of every name; of one that several distributions claim, one per claim.

        The names of such claims say which is meant, as in ``"their-package:streetnet"``.
        """
        found = self._found()
        entries: Any = []
        for name in self.list(pattern):
            if name in self._registered:
                entries.append(self.info(name))
                continue
            for point in found[name].values():
                shown_name = f"{_owner(point)}:{name}" if len(found[name]) > 1 else name
                entries.append(_info(shown_name, point))
        return tuple(entries)

    def info(self, name: str) -> Info:
        """Where ``name`` comes from, without importing it.

        Raises:
            UnknownName: nothing has that name.
            PluginError: two distributions claim it.
        """
        if name in self._registered:
            entry = self._registered[name]
            return Info(name, ":".join(_place(entry)), "register()", None)
        return _info(name, self._point(name))

    def describe(self, name: str) -> Description:
        """`info`, and what importing it tells: signature, options and documentation.

        Raises:
            UnknownName: nothing has that name.
            PluginError: two distributions claim the name, or the plugin fails to import.
        """
        factory = self.get(name)
        hints = _annotations(factory)
        options = tuple(
            Option(
                option,
                hints.get(option),
                None if parameter.default is parameter.empty else repr(parameter.default),
            )
            for option, parameter in _options(factory).items()
        )
        return Description(
            **vars(self.info(name)),
            kind=self.kind,
            signature=f"{name}{_signature(factory)}",
            options=options,
            any_option=accepted_options(factory) is None,
            documentation=inspect.getdoc(factory) or "",
        )

    def get(self, name: str) -> Callable[..., T]:
        """The factory registered under ``name``: called with options, it makes the object.

        Raises:
            UnknownName: nothing has that name; the message lists the nearest and all others.
            PluginError: two distributions claim the name, the plugin needs another API version, or
                it fails to import.
        """
        if name in self._registered:
            return self._registered[name]
        point = self._point(name)
        check_api(point.dist)
        try:
            factory = point.load()
        except (Exception, SystemExit) as error:  # a plugin may raise anything, or call exit()
            raise PluginError(
                f"{self.kind} {name!r} of distribution {_owner(point)!r} ({point.value}) fails to "
                f"import: {type(error).__name__}: {error}"
            ) from error
        if not callable(factory):
            raise PluginError(
                f"{self.kind} {name!r} ({point.value}) must be a class or function that makes a "
                f"{self.kind}, got {type(factory).__name__}"
            )
        return factory

    def create(self, name: str, /, **options: Any) -> T:
        """The object of that name, made with these options.

        Models and refiners come in evaluation mode.

        Args:
            name: a registered name, which may have options in parentheses, as in a spec.
            options: what the factory takes; see `describe`.

        Raises:
            UnknownName: nothing has that name.
            SpecError: an option that the factory lacks or a value that it refuses.
            PluginError: the plugin is broken or makes an object of another kind.
        """
        stage = self.parse(name)
        for option in options:
            if option in stage.options:
                raise SpecError(f"{self.kind} {stage}: option {option!r} is given twice")
        return self.make(StageSpec(stage.name, {**stage.options, **options}))

    def make(self, stage: str | StageSpec, context: Mapping[str, Any] | None = None) -> T:
        """The object that a name with options stands for, such as ``"crf(iterations=5)"``.

        Args:
            stage: its text, or that text parsed.
            context: values that are passed where the factory accepts them and the text does not
                give them.

        Raises:
            UnknownName: nothing has that name.
            SpecError: the text does not parse, an option that the factory lacks, or a value that
                it refuses.
            PluginError: the plugin is broken or makes an object of another kind.
            PysegError: what the factory itself raises, such as `WeightsError`.
        """
        stage = self.parse(stage)
        factory = self.get(stage.name)
        check_options(stage, factory)
        wanted: set[str] = set(_options(factory))
        if accepted_options(factory) is None:
            wanted.update(FORWARDED.get(self.kind, ()))
        given = {name: value for name, value in (context or {}).items() if name in wanted}
        options = given | dict(stage.options)
        count = options.get("num_classes")
        if isinstance(count, int) and count > MAX_CLASSES:
            raise SpecError(
                f"{self.kind} {shown(stage.name)}: num_classes must be at most {MAX_CLASSES}, what "
                f"label maps can hold, got {shown(count)}"
            )
        with naming_failures(f"{self.kind} {shown(stage.name)}"):
            try:
                later = {
                    name: options.pop(name)
                    for name in _later_options(factory)
                    if name in options and name not in _own_signature(factory).parameters
                }
                made: Any = factory(**options)
                if later:
                    made.predict_with(**later)
            except PysegError:
                raise
            except (TypeError, ValueError, OSError) as error:
                raise SpecError(f"{self.kind} {_brief(stage)}: {error}") from error
        self.check_kind(made, f"{self.kind} {shown(stage.name)}")
        if self.kind in ("model", "refiner", "promptable"):
            _evaluating(made)
            with contextlib.suppress(AttributeError, TypeError):  # an object may refuse attributes
                setattr(made, _ORIGIN, _without_paths(stage))
        return made

    def name_of(self, factory: Callable[..., Any]) -> str | None:
        """The name under which a class or function is registered, if it is. Imports nothing."""
        target = ":".join(_place(factory))
        return next((entry.name for entry in self.entries() if entry.target == target), None)

    def parse(self, stage: str | StageSpec) -> StageSpec:
        """The one name with options that a text holds.

        Raises:
            SpecError: it does not parse, or holds several.
        """
        if isinstance(stage, StageSpec):
            return stage
        stages = parse(stage).stages
        if len(stages) != 1:
            raise SpecError(
                f"{self.kind} {shown(stage)} must be one name; give several {self.kind}s one by one"
            )
        return stages[0]

    def check_kind(self, made: Any, what: str) -> None:
        """Holds an object against `MEMBERS`.

        Raises:
            PluginError: it lacks one of them; the message begins with ``what``.
        """
        members = MEMBERS.get(self.kind, ())
        lacking = [name for name in members if not hasattr(made, name)]
        if isinstance(made, type) or lacking:
            raise PluginError(
                f"{what} gave a class, {made.__name__}, where an object of it is needed"
                if isinstance(made, type)
                else f"{what} made a {type(made).__name__} that lacks {', '.join(lacking)}; a "
                f"{self.kind} must follow pyseg.types.{self.kind.capitalize()}"
            )

    def _point(self, name: str) -> importlib.metadata.EntryPoint:
        found = self._found()
        owner, _, bare = name.rpartition(":")
        if bare not in found:
            names = self.list()
            near = difflib.get_close_matches(bare[:100], names, n=3, cutoff=0.6)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            nearest = difflib.get_close_matches(bare[:100], names, n=_MOST_SHOWN, cutoff=0.0)
            known = ", ".join(sorted(nearest)) or "none (is pyseg-toolkit installed?)"
            if len(names) > len(nearest):
                known += f" and {len(names) - len(nearest)} more (`pyseg list`)"
            raise UnknownName(
                f"no {self.kind} is called {shown(name)}.{hint} Known {self.kind}s: {known}."
            )
        claims = [
            point for point in found[bare].values() if not owner or _same(owner, _owner(point))
        ]
        owners = sorted({_owner(point) for point in found[bare].values()})
        if not claims:
            raise UnknownName(
                f"{self.kind} {bare!r} is provided by {' and '.join(owners)}, not by {shown(owner)}"
            )
        if len(claims) > 1:
            targets = " and ".join(sorted(f"{_owner(point)} ({point.value})" for point in claims))
            remedy = (
                f"write {' or '.join(repr(f'{owner}:{bare}') for owner in owners)}, "
                if len(owners) > 1
                else ""
            )
            raise PluginError(
                f"{self.kind} {name!r} is claimed by {targets}; {remedy}uninstall one of them, or "
                "rename its entry point"
            )
        return claims[0]

    def register(self, name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Decorator that registers a class or function for this process.

        Packages declare an entry point instead, which needs no import to be found.

        Raises:
            PluginError: the name is taken by something else.

        Example:
            >>> @models.register("mine")
            ... def mine(*, num_classes=None, weights=None): ...
        """

        def add(factory: Callable[..., T]) -> Callable[..., T]:
            with self._lock:
                taken = self._registered.get(name)
                reloaded = taken is not None and _place(taken) == _place(factory)
                if name in self._found() or (taken is not None and not reloaded):
                    target = self.entries(name)[0].target
                    raise PluginError(
                        f"{self.kind} {name!r} is already registered by {target}; choose another "
                        "name"
                    )
                self._registered[name] = factory
            return factory

        return add


# Of what has no family package that can be listed without torch.
promptables: Registry[Any] = Registry("promptable", GROUPS["promptable"])
commands: Registry[Any] = Registry("command", COMMANDS)  # of plugins; typer apps, see `cli`
ops: Registry[Any] = Registry("op", GROUPS["op"])  # its factories are the ops: never called here


@contextlib.contextmanager
def only_from(*distributions: str) -> Iterator[None]:
    """Within it, in all threads, no other distributions are found, as if they were not installed.

    What was registered at run time stays.
    """
    global _visible
    before = _visible
    _visible = frozenset(map(_normal, distributions))
    try:
        yield
    finally:
        _visible = before


def made_from(made: Any) -> StageSpec | None:
    """The name and options that an object was made from by a registry; None for others."""
    origin = getattr(made, _ORIGIN, None)
    return origin if isinstance(origin, StageSpec) else None


@contextlib.contextmanager
def naming_failures(what: str, where: str = "") -> Iterator[None]:
    """Within it an exception of a plugin becomes a `PluginFailure` that says who failed, and where.

    Errors of pyseg, of imports and of memory, which have remedies of their own, stay as they are.

    Args:
        what: failed, such as ``"stage 'crf'"``.
        where: on what, such as ``" on image 'a.png'"``.
    """
    try:
        yield
    except (PysegError, ImportError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        if _is_out_of_memory(error):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise PluginFailure(
            f"{what} failed{where}: {type(error).__name__}: {error} "
            f"({Path(frame.filename).name}, line {frame.lineno})"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's allocators raise RuntimeErrors, on the CPU a plain one.
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    )


def _evaluating(made: Any) -> None:
    from torch import nn  # the object is there, so torch has been imported, unless it needs none

    if isinstance(made, nn.Module):
        made.eval()


def _changed(path: str) -> int | None:
    """When files were added to a folder, or removed, last; None where there is none."""
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return None


def _owner(point: importlib.metadata.EntryPoint) -> str:
    return point.dist.name if point.dist else "an unknown distribution"


def _same(one: str, other: str) -> bool:
    """Whether two names of distributions are the same one, as package indexes compare them."""
    return _normal(one) == _normal(other)


def _normal(distribution: str) -> str:
    return re.sub("[-_.]+", "-", distribution).lower()


def _info(name: str, point: importlib.metadata.EntryPoint) -> Info:
    return Info(name, point.value, _owner(point), point.dist.version if point.dist else None)


def _place(factory: Callable[..., Any]) -> tuple[str, str]:
    module = getattr(factory, "__module__", None) or type(factory).__module__
    return module, getattr(factory, "__qualname__", type(factory).__qualname__)


def _without_paths(stage: StageSpec) -> StageSpec:
    """With paths as text, which a spec can hold."""
    options = {k: str(v) if isinstance(v, Path) else v for k, v in stage.options.items()}
    return StageSpec(stage.name, options)


def _brief(stage: StageSpec) -> str:
    text = str(stage)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _signature(factory: Callable[..., Any]) -> inspect.Signature:
    """Of a factory, and behind its own options those of what it makes, see `_later_options`."""
    own, later = _own_signature(factory), _later_options(factory)
    if not later:
        return own
    parameters = [*own.parameters.values()]
    places = [k for k, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD]
    place = places[0] if places else len(parameters)
    parameters[place:place] = [p for name, p in later.items() if name not in own.parameters]
    return own.replace(parameters=parameters)


def _own_signature(factory: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(factory)
    except ValueError:  # some that are written in C tell nothing
        return inspect.Signature(
            [inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)],
        )


def _later_options(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Options of ``predict_with``, where a factory's annotation says that what it makes has it."""
    setter = getattr(_own_type_hints(factory).get("return"), "predict_with", None)
    if setter is None:
        return {}
    parameters = inspect.signature(setter).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def _options(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    usable = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = _signature(factory).parameters
    return {name: p for name, p in parameters.items() if p.kind in usable}


def accepted_options(factory: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """The keyword options of ``factory``, or None where it takes any (``**options``)."""
    if any(p.kind is p.VAR_KEYWORD for p in _signature(factory).parameters.values()):
        return None
    return _options(factory)


def check_options(stage: StageSpec, factory: Callable[..., Any]) -> None:
    """Holds a stage's options against the signature of its factory.

    Raises:
        SpecError: an option that the factory lacks, or a value that its annotation excludes; the
            message lists the accepted options.
    """
    named = _options(factory)
    anything = accepted_options(factory) is None
    hints = _type_hints(factory)
    listing = ", ".join(
        name if p.default is p.empty else f"{name}={p.default!r}" for name, p in named.items()
    )
    for name, value in stage.options.items():
        if name not in named:
            if anything:
                continue
            near = difflib.get_close_matches(name[:100], named, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise SpecError(
                f"stage {shown(stage.name)} has no option {shown(name)}{hint} "
                f"Its options: {listing or 'none'}."
            )
        if name in hints and not _fits(value, hints[name]):
            raise SpecError(
                f"stage {shown(stage.name)}: option {name} must be {_text(hints[name])}, got "
                f"{shown(value)}. Its options: {listing}."
            )


def _text(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    named = isinstance(annotation, type) and not typing.get_args(annotation)
    text = annotation.__name__ if named else str(annotation)
    return re.sub(r"\b(typing|collections\.abc|pathlib)\.", "", text)


def _annotations(factory: Callable[..., Any]) -> dict[str, str]:
    """Annotations as text: resolved where they can be, else as they are written."""
    hints = _type_hints(factory)
    return {
        name: _text(hints.get(name, parameter.annotation))
        for name, parameter in _options(factory).items()
        if parameter.annotation is not parameter.empty
    }


def _type_hints(factory: Callable[..., Any]) -> dict[str, Any]:
    hints = _own_type_hints(factory)
    if _later_options(factory):
        hints = {**typing.get_type_hints(hints["return"].predict_with), **hints}
    return hints


def _own_type_hints(factory: Callable[..., Any]) -> dict[str, Any]:
    function: Any = factory
    if isinstance(factory, type):
        function = inspect.getattr_static(factory, "__init__")  # its own or an inherited one
    elif isinstance(factory, functools.partial):
        return _own_type_hints(factory.func)
    elif not inspect.isroutine(factory):
        function = type(factory).__call__
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        return {}  # annotations that only a type checker resolves


_LITERALS = (bool, int, float, complex, str, bytes, tuple, list, dict, set, Path)


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value can be meant for the annotation; unknown annotations fit anything.

    Values that no spec can hold, such as tensors, are left to the factory.
    """
    if value is not None and not isinstance(value, _LITERALS):
        return True
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(annotation))
    if origin is typing.Literal:
        # type too: 1 == True
        options = typing.get_args(annotation)
        return any(value == option and type(value) is type(option) for option in options)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (str, bool, dict, Path):
        return isinstance(value, annotation)
    if annotation is type(None):
        return value is None
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if isinstance(origin, type) and issubclass(origin, (tuple, Iterable)):
        return isinstance(value, (tuple, list, set))
    return True


__all__ = [
    "MAX_CLASSES",
    "Description",
    "Info",
    "Option",
    "Registry",
    "accepted_options",
    "check_options",
    "commands",
    "made_from",
    "naming_failures",
    "only_from",
    "ops",
    "promptables",
]
