"""`new_plugin`: a package that extends pyseg, complete and tested, to be changed."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from pathlib import Path

from .contract import API_VERSION, GROUPS
from .errors import PluginError, PysegError
from .files import replacing

TEMPLATES = Path(__file__).parent / "templates"
_SUFFIX = ".in"  # of templates: they are no Python before their words are filled in
_TASKS = {"promptable": "interactive"}
_COMMANDS = {
    "model": 'pyseg predict photo.jpg --spec "@MODULE@(weights=None)" --output out',
    "refiner": "pyseg predict photo.jpg --spec streetnet+@MODULE@ --output out",
    "metric": "pyseg evaluate --dataset synthetic --spec streetnet --metric @MODULE@",
    "dataset": "pytest --pyseg-conformance \"@MODULE@(root='DATA', split='train')\"",
    "promptable": "pyseg predict photo.jpg --spec \"streetnet+sam(size='@MODULE@')\" --output out",
    "op": "pytest --pyseg-conformance @MODULE@",
}


def new_plugin(name: str, *, kind: str, folder: str | Path = ".") -> Path:
    """Writes a package with one plugin that works, whole or not at all.

    It has pyproject.toml with ``[tool.pyseg]``, types, README, licence and tests, the conformance
    suite of `pyseg.testing` among them: ``pip install ./NAME && pytest NAME`` passes.

    Args:
        name: of the distribution: small letters, digits and hyphens, such as ``"my-refiner"``. Its
            module and what specs call it have underscores instead.
        kind: one of `pyseg.contract.GROUPS`.
        folder: where the package's own folder, ``name``, is made.

    Returns:
        That folder.

    Raises:
        ValueError: ``name`` cannot be one, is a module's that is there already or of a plugin of
            that kind; or another ``kind``.
        PysegError: the package's folder exists, or ``folder`` does not.
    """
    if kind not in GROUPS:
        raise ValueError(f"kind must be one of {', '.join(GROUPS)}, got {kind!r}")
    target = Path(folder) / name
    module = _module(name)
    if target.exists():
        raise PysegError(f"{str(target)!r} exists already; choose another name, or remove it")
    _refuse_taken(name, module, kind)
    words = _words(name, module, kind)
    with replacing(target) as temporary:
        for part in ("common", kind):  # a kind's own files replace common ones
            _write(TEMPLATES / part, temporary, words)
    return target


def _module(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name) or len(name) > 60:
        raise ValueError(
            "name must be at most 60 small letters, digits and single hyphens, the first one a "
            f"letter, such as 'my-refiner', got {name!r}"
        )
    module = name.replace("-", "_")
    if keyword.iskeyword(module) or keyword.issoftkeyword(module):
        raise ValueError(f"name {name!r} is a word of Python's; choose another")
    return module


def _refuse_taken(name: str, module: str, kind: str) -> None:
    from .doctor import registries

    spec = None
    if module not in sys.stdlib_module_names:
        spec = importlib.util.find_spec(module)
    if module in sys.stdlib_module_names or (spec is not None and spec.origin is not None):
        raise ValueError(f"name {name!r} is that of a module that is there already")
    registry = next(r for r in registries().values() if r.kind == kind)
    if module in registry.list():
        raise ValueError(f"a {kind} is called {module!r} already; `pyseg list` shows the names")


def _words(name: str, module: str, kind: str) -> dict[str, str]:
    capital = "".join(part.capitalize() for part in re.split("[-_]", name))
    return {
        "@COMMAND@": _COMMANDS[kind].replace("@MODULE@", module),
        "@NAME@": name,
        "@MODULE@": module,
        "@TARGET@": module if kind in ("model", "op") else capital,
        "@KIND@": kind,
        "@GROUP@": GROUPS[kind],
        "@TASK@": _TASKS.get(kind, "semantic"),
        "@API@": API_VERSION,
    }


def _write(source: Path, target: Path, words: dict[str, str]) -> None:
    found = sorted(source.rglob(f"*{_SUFFIX}"))
    if not found:
        raise PluginError(f"{source} holds no templates; reinstall pyseg-toolkit")
    for path in found:
        relative = str(path.relative_to(source)).removesuffix(_SUFFIX)
        place = target / relative.replace("MODULE", words["@MODULE@"])
        place.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8")
        for word, value in words.items():
            text = text.replace(word, value)
        place.write_text(text, encoding="utf-8")
