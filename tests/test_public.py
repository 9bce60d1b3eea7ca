"""What `import pyseg` offers: names, in every order of imports, and types for a user's checker."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyseg

SCRIPT = """
from pathlib import Path

import numpy as np
import torch

import pyseg
from pyseg.datasets import CamVid, Folder
from pyseg.metrics import Semantic
from pyseg.models import SemanticModel
from pyseg.refiners import CRF


def segment(folder: Path) -> list[pyseg.Segmentation]:
    segmenter = pyseg.build("streetnet+crf(iterations=5)", num_classes=11, device="cpu")
    one = segmenter("street.jpg")
    one.overlay().save("overlay.png")
    reveal: torch.Tensor = one.labels
    segmenter(np.zeros((4, 4, 3), dtype=np.uint8)).save(folder / "a.png")
    segmenter.save("saved")
    loaded = pyseg.load("saved")
    summary = pyseg.predict(loaded, ["photos"], folder, overlay=True)
    print(summary.written, reveal.shape, loaded.classes, loaded.refiners)
    return loaded(["a.jpg", "b.jpg"])


def score(root: str) -> float:
    dataset = Folder(root, split="val")
    result = pyseg.evaluate(pyseg.build("streetnet"), dataset, metrics=["semantic"])
    metric = pyseg.metrics.create("semantic", classes=dataset.classes)
    sample: pyseg.Sample = dataset[0]
    metric.update(pyseg.build("streetnet")(sample.image), sample)
    print(Semantic(classes=("a", "b")).compute(), metric.compute())
    return float(result.stages[0].metrics["semantic"]["miou"])


def learn() -> None:
    model = pyseg.models.create("streetnet", num_classes=11, weights=None)
    pyseg.train(model, CamVid("camvid"), output_dir="run", epochs=3)
    network = SemanticModel(torch.nn.Conv2d(3, 2, 1), ("a", "b"))
    pipeline = pyseg.build(network, CRF(iterations=3), lambda image, prediction: prediction)
    pipeline = pyseg.build(torch.nn.Conv2d(3, 2, 1), "crf", classes=["road", "sky"])
    print(pyseg.cost(pipeline, "street.jpg").stages, pipeline.model, pyseg.__version__)
    print(pyseg.models.list("*resnet*"), pyseg.refiners.describe("crf").options)
    try:
        pyseg.refiners.create("crf", iterations=3)
    except pyseg.PysegError as error:
        print(error)
"""


def _mypy():
    beside = Path(sys.executable).with_name("mypy")
    return str(beside) if beside.exists() else shutil.which("mypy")


@pytest.mark.skipif(_mypy() is None, reason="mypy is not installed")
def test_a_users_script_is_clean_under_mypy_strict(tmp_path):
    (tmp_path / "user.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\nfollow_imports = silent\n"
        f"mypy_path = {Path(pyseg.__file__).parents[1]}\n"
        f"python_executable = {sys.executable}\n"
        f"cache_dir = {tmp_path / 'cache'}\n"
    )
    command = [_mypy(), "--config-file", "mypy.ini", "user.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_public_name_is_there():
    assert set(pyseg.__all__) == set(dir(pyseg))
    for name in pyseg.__all__:
        assert getattr(pyseg, name) is not None, name
    for verb in (
        "build",
        "load",
        "predict",
        "predict_large",
        "evaluate",
        "compare",
        "train",
        "train_instances",
        "tune_crf",
    ):
        assert callable(getattr(pyseg, verb)), verb
    assert pyseg.types.Segmentation is pyseg.Segmentation


def test_what_is_exported_is_written_down_once_for_checkers():
    """`__all__`, the lazy names and what a type checker sees are the same names."""
    source = Path(pyseg.__file__).read_text()
    seen = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                assert isinstance(line, ast.ImportFrom)
                for alias in line.names:
                    assert alias.asname == alias.name, "`import x as x` exports x"
                    seen.add(alias.name)
    assert seen == set(pyseg.__all__) - {"__version__"}
    assert seen == set(pyseg._LAZY) | pyseg._SUBMODULES


@pytest.mark.parametrize(
    "first",
    ["pass", "import pyseg.cost", "from pyseg.cost import Cost", "from pyseg import cost"],
)
def test_cost_is_function_and_module_in_every_order(first):
    code = (
        f"{first}\n"
        "import pyseg\n"
        "import torch\n"
        "model = torch.nn.Conv2d(3, 2, 1)\n"
        "image = torch.zeros(3, 8, 8, dtype=torch.uint8)\n"
        "found = pyseg.cost(pyseg.build(model, num_classes=2), image, rounds=1)\n"
        "import pyseg.cost\n"
        "assert isinstance(found, pyseg.cost.Cost) and callable(pyseg.cost)\n"
        "assert found.stages[0].parameters == 8\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
