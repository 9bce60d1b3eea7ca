"""The map of the house, held: imports point down only, no circle, no family imports another."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up. A module may import those of lower floors, and its own package.
FLOORS = (
    {"pyseg", "errors"},
    {"_native", "classes", "contract", "devices", "files", "progress", "regions", "spec", "tiles"},
    {"efficientnet", "hub", "image", "registry", "weights"},
    {"formats", "page", "rasters", "visual"},
    {"ops"},
    {"compat", "types"},
    {"fusion", "processes", "promptable"},
    {"grounding", "session", "video"},
    {"datasets", "metrics", "models", "refiners"},
    {"label_check", "pipeline"},
    {"conversion", "cost", "data_check", "doctor", "evaluation", "large", "prediction", "scoring"},
    {"agreement", "training"},
    {"comparison", "export", "instance_training", "report", "testing", "tuning"},
    {"cluster", "conformance", "demo", "new_plugin", "studio"},
    {"cli"},
    {"__main__"},
)
FLOOR = {name: height for height, floor in enumerate(FLOORS) for name in floor}
FAMILIES = {"datasets", "metrics", "models", "refiners"}


def module_files(root):
    """Every module of ``root``/pyseg and its file."""
    paths = {path.relative_to(root).with_suffix(""): path for path in root.glob("pyseg/**/*.py")}
    return {".".join(key.parts).removesuffix(".__init__"): path for key, path in paths.items()}


def imports(name, path, modules):
    """The modules of pyseg that a file imports, at its top or within functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in [n for n in ast.walk(tree) if isinstance(n, ast.If)]:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level or None]
            if node.level and path.name == "__init__.py":
                above = name.split(".")[: len(name.split(".")) + 1 - node.level]
            source = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                if (target := whole if whole in modules else source) in modules:
                    yield target


def complaints(root):
    """What is wrong with the imports below ``root``/pyseg, in words."""
    modules = module_files(root)
    part = {name: f"{name}.".split(".")[1] or "pyseg" for name in modules}
    found = [
        f"{name}: give it a floor in {Path(__file__).name}"
        for name in modules
        if part[name] not in FLOOR
    ]
    if found:
        return found
    graph = {name: set(imports(name, path, modules)) - {name} for name, path in modules.items()}
    for name, targets in graph.items():
        for target in sorted(targets):
            ours, theirs = part[name], part[target]
            if ours in FAMILIES and theirs in FAMILIES and ours != theirs:
                found.append(f"{name} imports {target}: no family imports another")
            elif ours != theirs and FLOOR[ours] <= FLOOR[theirs]:
                found.append(f"{name} imports {target}: imports point down only")
    # A package's own names come from its modules, and these may import each other.
    inner = {a: {b for b in bs if not a.startswith(f"{b}.")} for a, bs in graph.items()}
    try:
        graphlib.TopologicalSorter(inner).prepare()
    except graphlib.CycleError as error:
        found.append(f"circle: {' -> '.join(error.args[1])}")
    return found


def test_imports_point_down():
    assert complaints(ROOT) == []


def test_wrong_imports_are_noticed(tmp_path):
    def house(**files):
        for name, text in files.items():
            path = tmp_path / "pyseg" / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return complaints(tmp_path)

    assert house(errors="", types="from . import errors", ops__a="from ..errors import x") == []
    assert house(errors="def f():\n    from .types import Sample") == [
        "pyseg.errors imports pyseg.types: imports point down only",
        "circle: pyseg.errors -> pyseg.types -> pyseg.errors",
    ]
    assert house(errors="if TYPE_CHECKING:\n    from .types import Sample") == []
    assert house(ops__a="import pyseg.types") == [
        "pyseg.ops.a imports pyseg.types: imports point down only"
    ]
    assert house(ops__a="from . import b", ops__b="from .a import c")[0].startswith("circle: ")
    assert house(ops__a="", models__m="from ..metrics.n import x", metrics__n="") == [
        "pyseg.models.m imports pyseg.metrics.n: no family imports another"
    ]
    assert house(models__m="", shed="") == ["pyseg.shed: give it a floor in test_imports.py"]
