"""What pyproject.toml promises: dependencies, extras, and a build that says what it lacks."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# It is only asked for by who has it; and pytest imports the module that imports it.
UNDECLARED = {"pytest", "supervision"}


def names(requirements):
    return {canonicalize_name(Requirement(text).name) for text in requirements}


PLAIN = names(PROJECT["dependencies"])
EXTRAS = {key: names(values) for key, values in PROJECT["optional-dependencies"].items()}
FOR_USERS = {
    *("train", "zoo", "imagenet", "hf", "nyud", "large", "geo", "zarr", "ray", "tensorboard"),
    *("onnx", "hub", "studio"),
}
# A module that is an extra's from its head on: the command that imports it asks for the extra.
OF_EXTRA = {Path("pyseg/studio/app.py"): "studio"}


def imports(tree, within=False):
    """(top-level module, whether it is imported when the file is) of all absolute imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], not within) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0], not within
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "require":
            if isinstance(node.args[0], ast.Constant):  # else it stands in a list of packages
                yield node.args[0].value.split(".")[0], not within
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from imports(node, within=True)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, within=within or inside)


def third_party_imports():
    distributions = importlib.metadata.packages_distributions()
    for path in sorted((ROOT / "pyseg").rglob("*.py")):
        for module, at_once in imports(ast.parse(path.read_text())):
            if module not in sys.stdlib_module_names and module not in {"pyseg", *UNDECLARED}:
                found = {canonicalize_name(name) for name in distributions.get(module, [module])}
                yield path.relative_to(ROOT), module, at_once, found


def test_every_import_is_declared():
    declared = PLAIN.union(*(EXTRAS[key] for key in FOR_USERS))
    found = list(third_party_imports())
    assert {"torch", "PIL", "accelerate"} <= {module for _, module, _, _ in found}
    for path, module, _, distributions in found:
        assert distributions & declared, f"{path} imports {module}, which no dependency provides"


def test_every_dependency_is_imported():
    imported = set().union(*(distributions for *_, distributions in third_party_imports()))
    for name in PLAIN.union(*(EXTRAS[key] for key in FOR_USERS)):
        assert name in imported, f"nothing in pyseg/ imports {name}"


def test_extras_are_imported_only_where_they_are_used():
    """At the head of a file they would be as good as required."""
    for path, module, at_once, distributions in third_party_imports():
        if at_once:
            allowed = PLAIN | EXTRAS.get(OF_EXTRA.get(path, ""), set())
            assert distributions & allowed, f"{path} imports {module} of an extra at its head"


def test_the_tests_extra_has_the_others():
    (own,) = (
        requirement
        for requirement in map(Requirement, PROJECT["optional-dependencies"]["test"])
        if requirement.name == PROJECT["name"]
    )
    assert own.extras == FOR_USERS


@pytest.mark.parametrize("version", ["65.5.0", "76.1.0.post2", "77.0.3"])
def test_an_old_setuptools_is_named(tmp_path, version):
    """Else the build fails on project.license, which says nothing of setuptools."""
    package = tmp_path / "setuptools"
    package.mkdir()
    (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
    hooks = re.findall(r"build_meta\.(\w+)", (ROOT / "csrc/build_backend.py").read_text())
    (package / "build_meta.py").write_text(
        "\n".join(f"def {hook}(*arguments): pass" for hook in hooks)
    )
    result = subprocess.run(
        [sys.executable, "-c", "import build_backend; print('built')"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT / 'csrc'}", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    if version.startswith("77"):
        assert result.stdout == "built\n", result.stderr
    else:
        assert result.returncode == 1
        assert f"setuptools 77 or newer to build, got {version}" in result.stderr
        assert 'pip install -U "setuptools>=77"' in result.stderr
        assert "Traceback" not in result.stderr
