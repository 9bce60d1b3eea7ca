"""What pyproject.toml promises: dependencies, extras, and a build that says what it lacks."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
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
# Only asked for by who has it; and pytest and IPython import what imports them.
UNDECLARED = {"pytest", "supervision", "IPython"}


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
    assert own.extras == FOR_USERS | {"docs"}


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


@pytest.fixture(scope="module")
def sbom():
    """The module tests/sbom.py."""
    spec = importlib.util.spec_from_file_location("sbom", ROOT / "tests" / "sbom.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bill(sbom, tmp_path_factory):
    """That of a release of one file, as written."""
    folder = tmp_path_factory.mktemp("dist")
    (folder / "pyseg_toolkit-0-py3.whl").write_bytes(b"a wheel")
    command = [sys.executable, str(ROOT / "tests" / "sbom.py"), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    (written,) = folder.glob("*.json")
    assert written.name == f"pyseg_toolkit-{PROJECT['version']}.cdx.json"
    return json.loads(written.read_text())


def test_the_sbom_has_what_is_declared_and_nothing_that_is_not_needed(bill):
    packages = {one["name"]: one for one in bill["components"] if "purl" in one}
    packages = {canonicalize_name(name): one for name, one in packages.items()}
    declared = [(text, "required") for text in PROJECT["dependencies"]]
    declared += [(t, None) for k in FOR_USERS for t in PROJECT["optional-dependencies"][k]]
    for requirement, scope in ((Requirement(text), scope) for text, scope in declared):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found = packages[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(found["version"], prereleases=True), found
            assert scope is None or found["scope"] == scope, found
            assert found["version"] == importlib.metadata.version(requirement.name)
    assert not {"pytest", "selenium", "ruff"} & set(packages)
    needs = {one["ref"]: one["dependsOn"] for one in bill["dependencies"]}
    open_, reached = [bill["metadata"]["component"]["bom-ref"]], set()
    while open_:
        if (ref := open_.pop()) not in reached:
            reached.add(ref)
            open_ += needs[ref]
    assert reached - {bill["metadata"]["component"]["bom-ref"]} == {
        one["bom-ref"] for one in packages.values()
    }
    (file,) = bill["metadata"]["component"]["components"]
    assert file["hashes"][0]["content"] == hashlib.sha256(b"a wheel").hexdigest()
    weights = {path.name for path in (ROOT / "pyseg" / "assets").glob("*.safetensors")}
    shipped = {one["name"].rpartition("/")[2] for one in bill["components"] if "purl" not in one}
    assert weights and weights <= shipped


def test_the_sbom_is_valid_cyclonedx(bill):
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    assert validator.validate_str(json.dumps(bill)) is None
    assert validator.validate_str(json.dumps({**bill, "bomFormat": "SPDX"})) is not None


def test_a_package_that_is_absent_is_named_by_the_sbom(sbom):
    with pytest.raises(SystemExit, match=r"no-such-thing is not installed here.*\.\[test\]"):
        sbom.closure(["no-such-thing>=1"])
