"""Installations that are incomplete, broken or declare nonsense, as `pyseg doctor` sees them."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyseg import doctor
from pyseg.doctor import diagnose, unknown_groups, unmet_requirements

ROOT = Path(doctor.__file__).parents[1]
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def fresh():
    doctor._package_problem.cache_clear()
    yield
    doctor._package_problem.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``install(name, entries, {"module.py": code}, [requirement])``: what pip would leave."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(name, entries, code=None, requires=()):
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
        lines += [f"Requires-Dist: {text}" for text in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "entry_points.txt").write_text(entries)
        for file, text in (code or {}).items():
            (tmp_path / file).write_text(text)

    return add


def problem_of(report, name):
    return next(e["problem"] for e in report["entry_points"] if e["name"] == name)


def test_requirements_of_pyseg_and_of_plugins(install, monkeypatch):
    install(
        "wants-much",
        "[pyseg.models]\nm = wants_much:m\n",
        requires=[
            "pyseg-toolkit>=9",
            "no-such-package>1",
            "torch>=1.0",
            "not-this; python_version < '3'",
            "not-that; extra == 'web'",
        ],
    )
    about = [p for p in unmet_requirements() if p.startswith("wants-much")]
    assert len(about) == 2
    assert "requires pyseg-toolkit>=9, but pyseg-toolkit 0." in about[0]
    assert "requires no-such-package>1, which is not installed: pip install" in about[1]
    found = doctor._version
    gone = "segment-anything"
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == gone else found(name))
    assert any("pyseg-toolkit requires segment-anything" in p for p in diagnose()["problems"])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import absent_one\n", "fails to import: ModuleNotFoundError"),
        ("def m():\n    import absent_one.part\n", "package 'absent_one' is not installed"),
        ("def m():\n    importlib.import_module('absent_one')\n", "'absent_one' is not installed"),
        (
            "def m():\n    from broken_one import nms\n",
            "(RuntimeError: operator",
        ),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
        ("def m():\n    import exits_one\n", "cannot be imported (SystemExit: 3)"),
        ("def m():\n    import json, torch\n    from pyseg import ops\n", None),
        ("def m():\n    try:\n        import absent_one\n    except ImportError: pass\n", None),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import absent_one\n", None),
        ("def m(): require('roi_align', 3)\nrequire = print\n", "'roi_align' is not installed"),
    ],
)
def test_what_a_factory_imports_when_it_is_called(install, code, message):
    name = f"plugin_module_{next(NUMBERS)}"  # Python keeps what it has imported
    code = f"import importlib\ndef m(): ...\n{code}"
    files = {
        f"{name}.py": code,
        "broken_one.py": "raise RuntimeError('operator torchvision::nms does not exist')",
        "exits_one.py": "raise SystemExit(3)",
    }
    install("some-plugin", f"[pyseg.models]\nsome_model = {name}:m\n", files)
    report = diagnose()
    found = problem_of(report, "some_model")
    if message is None:
        assert found is None
    else:
        assert message in found and found in report["problems"]
    assert problem_of(report, "streetnet") is None


def test_models_that_need_a_broken_torchvision_are_not_fine(monkeypatch):
    broken = {"torchvision": "torchvision is broken"}
    monkeypatch.setattr(doctor, "_package_problem", broken.get)
    report = diagnose()
    for name in ("fcn_resnet50", "deeplabv3_resnet50", "maskrcnn_resnet50_fpn"):
        assert problem_of(report, name) == "torchvision is broken", name
    assert problem_of(report, "crf") is None and problem_of(report, "semantic") is None
    assert report["problems"].count("torchvision is broken") == 1


def test_the_segmenters_behind_sam_are_seen():
    assert "segment_anything" in doctor._imports("pyseg.refiners.sam", set())


def test_groups_and_names_that_nobody_reads(install):
    entries = (
        "[pyseg.model]\nmine = a:b\n[pyseg_plugins]\nx = a:b\n[pysegment.models]\ny = a:b\n"
        "[pyseg.refiners]\nbad name = json:loads\nclass = json:loads\n"
    )
    install("typo-plugin", entries)
    (problem,) = unknown_groups()
    assert "typo-plugin" in problem and "'pyseg.model'" in problem
    assert "did it mean 'pyseg.models'?" in problem
    report = diagnose()
    assert problem in report["problems"]
    for name in ("bad name", "class"):
        assert "cannot be named in a spec" in problem_of(report, name)


def test_a_plugin_that_exits_does_not_end_doctor(install, tmp_path):
    install("leaver", "[pyseg.models]\nleaver = leaver_module:m\n")
    (tmp_path / "leaver_module.py").write_text("import sys\nsys.exit(0)\n")
    result = subprocess.run(
        [sys.executable, "-c", "from pyseg.cli import main; main()", "doctor"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )
    assert result.returncode == 1 and "SystemExit: 0" in result.stdout, result.stderr
