"""The contract with plugins: what they state is read without importing them, and holds."""

import ast
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import pyseg
from pyseg import doctor
from pyseg.contract import API_VERSION, GROUPS
from pyseg.errors import DeprecatedApi, PluginError
from pyseg.registry import Registry, only_from

ROOT = Path(pyseg.__file__).parents[1]
MAJOR, MINOR = map(int, API_VERSION.split("."))
EXPLODES = "raise SystemExit('this plugin must not be imported')\n"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``install(name, table, group)``: what pip leaves of a wheel that must not be imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(name, table, group="pyseg.refiners"):
        module = name.replace("-", "_")
        info = tmp_path / f"{module}-1.0.dist-info"
        (info / "licenses").mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nLicense-Expression: MIT\n"
        )
        (info / "entry_points.txt").write_text(f"[{group}]\n{module} = {module}:make\n")
        if table is not None:
            (info / "licenses" / "pyproject.toml").write_text(table)
        (tmp_path / f"{module}.py").write_text(EXPLODES)
        return next(p for p in doctor.plugins() if p["distribution"] == name)

    return add


def table(**others):
    values = {"api": API_VERSION, "kind": "refiner", **others}
    lines = [f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(["[project]", 'name = "x"', "[tool.pyseg]", *lines])


def test_a_statement_is_read_and_nothing_imported(install, tmp_path):
    found = install(
        "their-plugin", table(tasks=["semantic", "panoptic"], weights_licence="CC-BY-NC-4.0")
    )
    assert found["problems"] == [] and found["names"] == {"refiner": ["their_plugin"]}
    assert found["statement"] == {
        "api": API_VERSION,
        "kind": ("refiner",),
        "tasks": ("semantic", "panoptic"),
        "licence": "MIT",
        "weights_licence": "CC-BY-NC-4.0",
        "needs": (),
    }
    listed = subprocess.run(
        [sys.executable, "-m", "pyseg", "list", "their_plugin", "--all", "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )
    assert listed.returncode == 0, listed.stderr
    (row,) = json.loads(listed.stdout)
    assert row["statement"]["weights_licence"] == "CC-BY-NC-4.0" and row["problems"] == []


def test_a_plugin_that_states_nothing_is_no_problem(install):
    assert install("silent", None) | {"statement": None, "problems": []} == install_of("silent")
    assert install("others", "[tool.ruff]\nline-length = 80\n")["statement"] is None


def install_of(name):
    return next(p for p in doctor.plugins() if p["distribution"] == name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (table(api=f"{MAJOR}.{MINOR + 1}"), f"needs API {MAJOR}.{MINOR + 1} of pyseg"),
        (table(api=f"{MAJOR + 1}.0", colour="red"), "pip install -U pyseg-toolkit"),
        (table(api="0.9"), f"was made for API 0.9 of pyseg, and this pyseg has {API_VERSION}"),
        (table(api=1.0), "api must be the oldest API_VERSION that it works with"),
        (table(api="1"), "got '1'"),
        (table(kind="filter"), "kind must be of model, refiner, metric, dataset, promptable, op"),
        (table(kind=[]), "lacks kind"),
        (table(kind=[1]), "kind must be a text or a list of texts"),
        (table(needs=["money"]), "needs must be of gpu, network, got 'money'"),
        (table(weights_licence=["MIT"]), "weights-licence must be a text"),
        (table(colour="red"), "has no key 'colour'; its keys: api, kind, needs"),
        ("[tool]\npyseg = 3\n", "must be a table, got 3"),
        ("[tool.pyseg", "does not parse"),
    ],
)
def test_a_wrong_statement_is_one_error_before_any_import(install, text, message):
    (problem,) = install("wrong-plugin", text)["problems"]
    assert message in problem
    with pytest.raises(PluginError) as caught:
        pyseg.build("streetnet+wrong_plugin")
    assert str(caught.value) == problem


def test_what_a_plugin_states_must_be_so(install, monkeypatch):
    (problem,) = install("says-metric", table(kind=["refiner", "metric"]))["problems"]
    assert (
        problem == "says-metric says that it is a metric, but has no entry point in pyseg.metrics"
    )
    problems = install("says-op", table(kind="op"))["problems"]
    assert "has no entry point in pyseg.ops" in problems[0]
    assert "its [tool.pyseg] does not name the kind refiner" in problems[1]
    monkeypatch.setattr(doctor, "_has_gpu", lambda: False)
    monkeypatch.setenv("PYSEG_OFFLINE", "1")
    problems = install("needs-much", table(needs=["gpu", "network"]))["problems"]
    assert "needs a GPU, and torch finds none" in problems[0]
    assert "needs the network, which PYSEG_OFFLINE forbids" in problems[1]
    monkeypatch.setattr(doctor, "_has_gpu", lambda: True)
    monkeypatch.setenv("PYSEG_OFFLINE", "0")
    assert install_of("needs-much")["problems"] == []


def test_every_kind_has_its_registry_and_suite():
    from pyseg.testing import SUITES

    assert [r.kind for r in doctor.registries().values()] == [*GROUPS] == [*SUITES]
    assert {r.kind: r.group for r in doctor.registries().values()} == GROUPS


def test_others_are_hidden_where_only_one_is_to_be_seen(install):
    install("seen-plugin", None)
    install("hidden-plugin", None)
    registry = Registry("refiner", "pyseg.refiners")
    assert {"crf", "seen_plugin", "hidden_plugin"} <= {*registry.list()}
    with only_from("pyseg-toolkit", "Seen_Plugin"):
        names = {*registry.list()}
        assert {"crf", "seen_plugin"} <= names and "hidden_plugin" not in names
    assert "hidden_plugin" in registry.list()


# ------------------------------------------------------------------------------------ deprecation


def test_deprecated_names_warn_and_say_what_to_use():
    stage = pyseg.build("streetnet(weights=None)").stages[0]
    with pytest.warns(DeprecatedApi, match=r"Stage\.object is deprecated .* use Stage\.component"):
        assert stage.object is stage.component
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stage.component is not None


def test_what_was_deprecated_is_gone_in_the_next_version():
    """A new minor version of the API fails here until the names of the last one are removed."""
    calls = []
    for path in (ROOT / "pyseg").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("deprecated"):
                given = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
                calls.append((path.name, given["since"]))
    assert calls
    assert [c for c in calls if c[1] != API_VERSION] == []
