"""`diagnose`: what this installation consists of, and what is wrong with it."""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import importlib.util
import json
import keyword
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .contract import API_VERSION, COMMANDS, GROUPS, statement, tomllib
from .errors import PluginError, require
from .registry import Registry, commands, ops, promptables

DISTRIBUTION = "pyseg-toolkit"
PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "scipy",
    "safetensors",
    "segment-anything",
    "sam2",
    "accelerate",
)
_GROUPS = {**GROUPS, "command": COMMANDS}
_IMPORTERS = {"import_module", "importlib.import_module", "require", "errors.require"}
_NEIGHBOURS = "pyseg.promptable"  # of those that import it: the segmenters behind sam and sam2
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")  # what a spec can call a stage
# Importing sam2 starts Hydra, whose state is one for the whole process and may be the user's.
_NOT_IMPORTED = {"sam2"}


def diagnose() -> dict[str, Any]:
    """Examines the installation; imports torch, the compiled libraries and every entry point.

    Returns:
        JSON-ready: ``pyseg`` (version, API version, folder), ``python``, ``platform``,
        ``packages`` (name -> version or None), ``cuda`` (version torch was built with, available,
        devices), ``native`` (`pyseg._native.status`, or ``{"error": text}``), ``entry_points``
        (kind, name, target, distribution, version, problem), ``plugins`` (see `plugins`) and
        ``problems``, one sentence each.
    """
    import torch

    from . import __version__, _native

    problems: list[str] = []
    try:
        native: dict[str, Any] = _native.status()
    except ImportError as error:
        native = {"error": str(error)}
        problems.append(str(error))
    if torch.cuda.is_available() and native.get("cuda_problem"):
        problems.append(f"there is a CUDA device, but no CUDA kernels: {native['cuda_problem']}")
    every = [*registries().values(), commands]
    entry_points = [entry for registry in every for entry in _entries(registry)]
    # once each: what is wrong with a package is wrong with all that need it
    problems += dict.fromkeys(entry["problem"] for entry in entry_points if entry["problem"])
    stated = plugins()
    problems += [text for each in stated for text in each["problems"] if text not in problems]
    problems += unknown_groups()
    problems += unmet_requirements()
    problems += stale_installs()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "pyseg": {
            "version": __version__,
            "api": API_VERSION,
            "folder": str(Path(__file__).parent),
        },
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": {
            "torch": torch.version.cuda,
            "available": count > 0,
            "devices": [torch.cuda.get_device_name(k) for k in range(count)],
        },
        "native": native,
        "entry_points": entry_points,
        "plugins": stated,
        "problems": problems,
    }


def registries() -> dict[str, Registry]:
    """The registry of every family, by plural name."""
    from . import datasets, metrics, models, refiners

    packages = {"models": models, "refiners": refiners, "metrics": metrics, "datasets": datasets}
    families: dict[str, Registry] = {name: each._registry for name, each in packages.items()}
    return {**families, "promptables": promptables, "ops": ops}


def plugins() -> list[dict[str, Any]]:
    """What every package but pyseg's own that has entry points says of itself; imports none.

    Returns:
        JSON-ready: ``distribution``, ``version``, ``names`` (kind -> those of its entry points),
        ``statement`` (`pyseg.contract.Statement` without these; None where it makes none or a wrong
        one) and ``problems``: a statement that does not hold, or what it needs and is not here.
    """
    found: dict[str, Any] = {}
    names: dict[str, dict[str, list[str]]] = {}
    for kind, group in _GROUPS.items():
        for point in importlib.metadata.entry_points(group=group):
            if point.dist is not None and point.dist.name != DISTRIBUTION:
                found[point.dist.name] = point.dist
                listed = names.setdefault(point.dist.name, {}).setdefault(kind, [])
                if point.name not in listed:
                    listed.append(point.name)
    return [_plugin(found[name], names[name]) for name in sorted(found)]


def _plugin(distribution: Any, names: dict[str, list[str]]) -> dict[str, Any]:
    entry: dict[str, Any] = {"distribution": distribution.name, "version": distribution.version}
    entry |= {"names": names, "statement": None, "problems": []}
    try:
        said = statement(distribution)
    except PluginError as error:
        return entry | {"problems": [str(error)]}
    if said is None:
        return entry
    problems = [
        f"{said.distribution} says that it is a {kind}, but has no entry point in {_GROUPS[kind]}"
        for kind in said.kind
        if kind not in names
    ]
    problems += [
        f"{said.distribution} has entry points in {_GROUPS[kind]}, and its [tool.pyseg] does not "
        f"name the kind {kind}"
        for kind in names
        if kind not in said.kind
    ]
    if "gpu" in said.needs and not _has_gpu():
        problems.append(f"{said.distribution} needs a GPU, and torch finds none")
    if "network" in said.needs and os.environ.get("PYSEG_OFFLINE", "0") not in ("", "0"):
        problems.append(f"{said.distribution} needs the network, which PYSEG_OFFLINE forbids")
    table = {k: v for k, v in asdict(said).items() if k not in ("distribution", "version")}
    return entry | {"statement": table, "problems": problems}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _entries(registry: Registry) -> Iterator[dict[str, Any]]:
    for name in registry.list():
        entry: dict[str, Any] = dict.fromkeys(("target", "distribution", "version", "problem"))
        entry = {"kind": registry.kind, "name": name, **entry}
        try:
            info = registry.info(name)
            entry.update(target=info.target, distribution=info.distribution, version=info.version)
            factory = registry.get(name)
            if registry is not commands and not _nameable(name):
                raise PluginError(
                    f"{registry.kind} {name!r} of distribution {info.distribution!r} cannot be "
                    "named in a spec: names are letters, digits and underscores"
                )
            entry["problem"] = _unusable(factory)
        except PluginError as error:
            entry["problem"] = str(error)
        yield entry


def _nameable(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and not any(map(keyword.iskeyword, name.split(".")))


def unknown_groups() -> list[str]:
    """Entry-point groups that look like pyseg's and are read by nobody, such as pyseg.model."""
    known = {*_GROUPS.values()}
    problems = []
    for group in sorted(importlib.metadata.entry_points().groups):
        if group in known or not re.match(r"pyseg\b", group):
            continue
        owners = sorted(
            {
                point.dist.name if point.dist else "an unknown distribution"
                for point in importlib.metadata.entry_points(group=group)
            }
        )
        near = difflib.get_close_matches(group, known, n=1)
        hint = f"; did it mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known))}"
        problems.append(
            f"{', '.join(owners)} declares entry points of the group {group!r}, which pyseg does "
            f"not read{hint}"
        )
    return problems


def unmet_requirements() -> list[str]:
    """What pyseg and its plugins require (extras apart) and is absent or of another version."""
    requirement_of = _requirement_parser()
    if requirement_of is None:
        return ["the versions of the requirements cannot be checked: that needs packaging"]
    owners = {DISTRIBUTION: _distribution(DISTRIBUTION)}
    for registry in registries().values():
        for point in importlib.metadata.entry_points(group=registry.group):
            if point.dist is not None:
                owners.setdefault(point.dist.name, point.dist)
    problems = []
    for name, owner in owners.items():
        for text in (owner.requires if owner else None) or ():
            requirement = requirement_of(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            found = _version(requirement.name)
            wanted = f"{requirement.name}{requirement.specifier}"
            if found is None:
                problems.append(
                    f"{name} requires {wanted}, which is not installed: pip install '{wanted}'"
                )
            elif not requirement.specifier.contains(found, prereleases=True):
                problems.append(
                    f"{name} requires {wanted}, but {requirement.name} {found} is installed: "
                    f"pip install '{wanted}', or another version of {name}"
                )
    return problems


def _requirement_parser() -> Callable[[str], Any] | None:
    for place in ("packaging.requirements", "pip._vendor.packaging.requirements"):
        try:
            return importlib.import_module(place).Requirement
        except ImportError:
            continue
    return None


def _unusable(factory: Callable[..., Any]) -> str | None:
    """Why a factory that could be imported cannot work: a package that it imports when called."""
    module = getattr(factory, "__module__", None)
    if module is None:
        return None
    optional = _extras()
    for package in sorted(_imports(module, set())):
        if package.replace("_", "-") not in optional and (reason := _package_problem(package)):
            return reason
    return None


@cache
def _package_problem(package: str) -> str | None:
    try:
        if package in _NOT_IMPORTED and importlib.util.find_spec(package) is not None:
            return None
        require(package)
    except ImportError as error:
        return str(error)
    return None


def _imports(module: str, seen: set[str]) -> set[str]:
    """Packages of others that a module and its neighbours import, at once or when called.

    Neighbours are of the same folder: what lies elsewhere serves many, and needs a package only
    for some of them. Imports that may fail, within ``try``, and those for type checkers do not
    count.
    """
    seen.add(module)
    root = module.partition(".")[0]
    spec = sys.modules[module].__spec__ if module in sys.modules else _found(module)
    origin = getattr(spec, "origin", None)
    if spec is None or origin is None or not origin.endswith(".py"):
        return set()
    packages: set[str] = set()
    for name in _names(origin, os.stat(origin).st_mtime_ns, spec.parent):
        package = name.partition(".")[0]
        if package == root:
            near = name.rpartition(".")[0] == module.rpartition(".")[0]
            near |= f"{name}.".startswith(f"{_NEIGHBOURS}.")
            if near and name not in seen and _found(name) is not None:
                packages |= _imports(name, seen)
        elif package and package not in sys.stdlib_module_names:
            packages.add(package)
    return packages


@cache
def _names(file: str, changed: int, package: str) -> tuple[str, ...]:
    """Modules that the ``file`` of a package imports; many models have neighbours in common."""
    del changed  # it is there for the cache: a file that was edited is read again
    root = package.partition(".")[0]
    names: set[str] = set()
    for node in _certain(ast.parse(Path(file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names.add(base)
            if base.partition(".")[0] == root:  # what is imported may be a module itself
                names.update(f"{base}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, (ast.Name, ast.Attribute))
            and ast.unparse(node.func) in _IMPORTERS
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
            and not node.args[0].value.startswith(".")
        ):
            names.add(node.args[0].value)
    return tuple(sorted(names))


def _found(module: str) -> Any:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):  # no such module, or not below a package
        return None


def _certain(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module without those in ``try`` and in ``if TYPE_CHECKING``."""
    nodes = [tree]
    while nodes:
        for node in ast.iter_child_nodes(nodes.pop()):
            if isinstance(node, ast.Try):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            yield node
            nodes.append(node)


def _extras() -> set[str]:
    """Distributions that only extras of pyseg require."""
    owner = _distribution(DISTRIBUTION)
    texts = (owner.requires if owner else None) or ()
    names = {text: re.split(r"[^\w.-]", text, maxsplit=1)[0].replace("_", "-") for text in texts}
    return {names[t] for t in texts if "extra ==" in t} - {
        names[t] for t in texts if "extra ==" not in t
    }


def stale_installs() -> list[str]:
    """Entry points that a source checkout declares and its installation does not know.

    An editable install takes code from the checkout at once, its entry points only when it is
    installed again.
    """
    problems = []
    for folder in _checkouts():
        try:
            text = (folder / "pyproject.toml").read_text(encoding="utf-8")
            project = tomllib.loads(text).get("project", {})
        except ValueError as error:
            problems.append(f"{folder / 'pyproject.toml'} does not parse: {error}")
            continue
        missing = []
        for group, declared in project.get("entry-points", {}).items():
            if not group.startswith("pyseg."):
                continue
            known = {(p.name, p.value) for p in importlib.metadata.entry_points(group=group)}
            missing += [
                f"{group}: {name}" for name, value in declared.items() if (name, value) not in known
            ]
        if missing:
            problems.append(
                f"{project.get('name', folder.name)} is installed from {folder} as it was before "
                f"its pyproject.toml declared {', '.join(missing)}: install it again with "
                f"`pip install --no-build-isolation -e {folder}`"
            )
    return problems


def _checkouts() -> list[Path]:
    """Folders with the sources of pyseg and of packages that are installed editable."""
    found = {Path(__file__).resolve().parent.parent}
    for distribution in importlib.metadata.distributions():
        text = distribution.read_text("direct_url.json")
        if not text:
            continue
        origin = json.loads(text)
        if origin.get("dir_info", {}).get("editable") and origin["url"].startswith("file:"):
            found.add(Path(unquote(urlsplit(origin["url"]).path)))
    return sorted(folder for folder in found if (folder / "pyproject.toml").is_file())


def _version(name: str) -> str | None:
    found = _distribution(name)
    return None if found is None else found.version


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
