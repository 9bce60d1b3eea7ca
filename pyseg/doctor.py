"""`diagnose`: what this installation consists of, and what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .errors import PluginError
from .registry import Registry

DISTRIBUTION = "pyseg-toolkit"
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "segment-anything", "sam2", "accelerate")


def diagnose() -> dict[str, Any]:
    """Examines the installation; imports torch, the compiled libraries and every entry point.

    Returns:
        JSON-ready: ``pyseg`` (version, folder), ``python``, ``platform``, ``packages`` (name ->
        version or None), ``cuda`` (version torch was built with, available, devices), ``native``
        (`pyseg._native.status`, or ``{"error": text}``), ``entry_points`` (kind, name, target,
        distribution, version, problem) and ``problems``, one sentence each.
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
    entry_points = [entry for registry in registries().values() for entry in _entries(registry)]
    problems += [entry["problem"] for entry in entry_points if entry["problem"]]
    problems += stale_installs()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "pyseg": {"version": __version__, "folder": str(Path(__file__).parent)},
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
        "problems": problems,
    }


def registries() -> dict[str, Registry]:
    """The registry of every family, by plural name."""
    from . import datasets, metrics, models, refiners

    packages = {"models": models, "refiners": refiners, "metrics": metrics, "datasets": datasets}
    return {name: package._registry for name, package in packages.items()}


def _entries(registry: Registry) -> Iterator[dict[str, Any]]:
    for name in registry.list():
        entry: dict[str, Any] = dict.fromkeys(("target", "distribution", "version", "problem"))
        entry = {"kind": registry.kind, "name": name, **entry}
        try:
            info = registry.info(name)
            entry.update(target=info.target, distribution=info.distribution, version=info.version)
            registry.get(name)
        except PluginError as error:
            entry["problem"] = str(error)
        yield entry


def stale_installs() -> list[str]:
    """Entry points that a source checkout declares and its installation does not know.

    An editable install takes code from the checkout at once, its entry points only when it is
    installed again.
    """
    problems = []
    for folder in _checkouts():
        try:
            project = _read_toml(folder / "pyproject.toml").get("project", {})
        except ImportError:
            return [
                f"{folder} cannot be checked for new entry points: Python 3.10 needs the "
                "package tomli for it"
            ]
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


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
