"""Third-party packages, really installed (into a temporary folder) and used in a process apart."""

import os
import subprocess
import sys
import textwrap

import pytest

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "{name}"
version = "1.2"
[tool.setuptools]
py-modules = ["{module}"]
{points}
"""

GOOD = """
import torch
from pyseg.models.semantic import SemanticModel

def model(*, num_classes=None, weights=None):
    return SemanticModel(torch.nn.Conv2d(3, num_classes or 2, 1), ["x"] * (num_classes or 2))

class Invert:
    def __init__(self, *, factor: float = -1.0):
        self.factor = factor
    def refine(self, image, prediction):
        return prediction.with_logits(prediction.logits * self.factor)

class Count:
    def __init__(self, classes=(), **_):
        self.images = torch.zeros((), dtype=torch.int64)
    def update(self, prediction, sample):
        self.images += 1
    def state(self):
        return {"images": self.images}
    def load_state(self, state):
        self.images = state["images"]
    def compute(self):
        return {"images": int(self.images)}
"""


def install(tmp_path, name, code, points):
    module = name.replace("-", "_")
    source = tmp_path / f"{name}-source"
    source.mkdir()
    (source / f"{module}.py").write_text(textwrap.dedent(code))
    text = "".join(
        f'[project.entry-points."pyseg.{group}"]\n'
        + "".join(f'{key} = "{module}:{value}"\n' for key, value in entries.items())
        for group, entries in points.items()
    )
    (source / "pyproject.toml").write_text(PYPROJECT.format(name=name, module=module, points=text))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--target",
            str(tmp_path / "site"),
            "--upgrade",
            str(source),
        ],
        check=True,
        capture_output=True,
    )


def run(tmp_path, *command):
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins")
    install(
        folder,
        "good-plugin",
        GOOD,
        {
            "models": {"their_model": "model"},
            "refiners": {"their_refiner": "Invert"},
            "metrics": {"their_metric": "Count"},
        },
    )
    install(
        folder,
        "bad-plugin",
        "raise OSError('libmagic.so is missing')",
        {"models": {"bad_model": "model"}, "refiners": {"bad_refiner": "R"}},
    )
    return folder


def test_a_plugin_is_listed_and_used(site):
    listing = run(site, "-m", "pyseg", "list")
    assert listing.returncode == 0, listing.stderr
    for name in ("their_model", "their_refiner", "their_metric", "good-plugin", "bad_model"):
        assert name in listing.stdout
    code = (
        "import pyseg, torch\n"
        "s = 'their_model+their_refiner(factor=2.0)+crf(iterations=1)'\n"
        "p = pyseg.build(s, num_classes=3)\n"
        "r = p(torch.zeros(3, 8, 9, dtype=torch.uint8))\n"
        "m = pyseg.metrics.get('their_metric')(); m.update(r, None)\n"
        "print(p, r.labels.shape, m.compute())"
    )
    result = run(site, "-c", code)
    assert result.returncode == 0, result.stderr
    assert "their_model+their_refiner(factor=2.0)+crf(iterations=1)" in result.stdout
    assert "torch.Size([8, 9]) {'images': 1}" in result.stdout


def test_a_broken_plugin_breaks_nobody_else(site):
    code = (
        "import pyseg\n"
        "print(pyseg.build('their_model'))\n"
        "try:\n    pyseg.build('bad_model')\n"
        "except pyseg.errors.PluginError as error:\n    print(error)"
    )
    result = run(site, "-c", code)
    assert result.returncode == 0, result.stderr
    assert "their_model" in result.stdout
    assert "'bad-plugin'" in result.stdout and "libmagic.so is missing" in result.stdout
    doctor = run(site, "-m", "pyseg", "doctor")
    assert "bad_model" in doctor.stdout and "libmagic.so is missing" in doctor.stdout
