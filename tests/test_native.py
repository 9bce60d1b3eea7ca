"""The compiled libraries: how they load, and how they fail. Each case has its own process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyseg import _native

FOLDER = Path(_native.__file__).parent


def run(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)


def test_status_lists_every_public_op_with_its_devices():
    status = _native.status()
    assert Path(status["cpu"]).is_file() and status["simd"]
    assert {"confusion_matrix", "upsample_argmax", "dense_crf", "deform_conv2d"} <= set(
        status["ops"]
    )
    assert all(op["cpu"] for op in status["ops"].values())
    assert (status["cuda"] is None) != (status["cuda_problem"] is None)


def test_a_second_copy_is_an_error_not_a_crash(tmp_path):
    library = _native._library("_C")
    copy = tmp_path / library.name
    copy.write_bytes(library.read_bytes())
    result = run(
        f"import torch; torch.ops.load_library({str(copy)!r})\n"
        "try:\n    import pyseg.ops\nexcept ImportError as error:\n    print(error)"
    )
    assert result.returncode == 0, result.stderr
    assert str(copy) in result.stdout and str(FOLDER) in result.stdout


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_a_missing_or_damaged_library_gives_numbered_causes(tmp_path, content):
    if content is not None:
        (tmp_path / "_C.abi3.so").write_bytes(content)
    result = run(
        "from pathlib import Path; import pyseg._native as n\n"
        f"n.FOLDER = Path({str(tmp_path)!r})\n"
        "try:\n    n.load()\nexcept ImportError as error:\n    print(error)"
    )
    assert result.returncode == 0, result.stderr
    assert all(f"\n  {i}. " in result.stdout for i in (1, 2, 3, 4))
    assert "Reinstall" in result.stdout


def test_cuda_tensors_without_cuda_kernels_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(_native, "_loaded", {"cpu": FOLDER})
    monkeypatch.setattr(_native, "_cuda_problem", "torch is a build without CUDA")
    fake = type("CudaTensor", (), {"is_cuda": True})
    with pytest.raises(ImportError, match=r"roi_align has no CUDA kernel.*build without CUDA"):
        _native.require("roi_align", fake())
    _native.require("roi_align", torch.zeros(1))


def test_importing_pyseg_is_light():
    """No compiled library, model family, plugin or torchvision."""
    result = run(
        "import json, sys\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "import pyseg\n"
        "new = sorted(set(sys.modules) - before)\n"
        "loaded = [p for p in torch.ops.loaded_libraries if 'pyseg' in p]\n"
        "print(json.dumps([new, loaded]))"
    )
    new, loaded = json.loads(result.stdout)
    assert new == ["pyseg"] and loaded == []


@pytest.mark.parametrize(
    "first",
    [
        "import pyseg.ops.confusion_matrix",
        "import pyseg; pyseg.ops",
        "import importlib; importlib.import_module('pyseg.ops.upsample_argmax')",
        "import pyseg.types, pyseg.pipeline",
    ],
)
def test_ops_are_functions_whatever_was_imported_before(first):
    result = run(
        f"{first}\n"
        "from pyseg.ops import confusion_matrix, dense_crf, upsample_argmax\n"
        "import pyseg, types\n"
        "for f in (confusion_matrix, dense_crf, upsample_argmax, pyseg.ops.confusion_matrix):\n"
        "    assert isinstance(f, types.FunctionType), f"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("order", [("build", "models"), ("models", "build")])
def test_public_names_hold_in_every_order(order):
    a, b = order
    result = run(
        f"import pyseg; pyseg.{a}; pyseg.{b}\n"
        "import pyseg.evaluation, pyseg.prediction, pyseg.training\n"
        "assert callable(pyseg.build) and callable(pyseg.evaluate) and callable(pyseg.predict)\n"
        "assert callable(pyseg.train) and callable(pyseg.load)\n"
        "assert pyseg.models.list() and list([1]) == [1]"
    )
    assert result.returncode == 0, result.stderr
