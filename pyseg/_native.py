"""Finds and loads the compiled libraries: `_C` (schemas, CPU) and `_C_cu<major>` (CUDA)."""

from __future__ import annotations

import operator
import platform
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parent
PROBE = "pyseg::simd_level"  # an operator that every build of the library defines

_lock = threading.Lock()
_loaded: dict[str, Path] = {}  # "cpu", "cuda" -> file
_cuda_problem: str | None = None


def _library(stem: str) -> Path | None:
    found = sorted([*FOLDER.glob(f"{stem}.*so"), *FOLDER.glob(f"{stem}.*pyd")])
    return found[0] if found else None


def _torch_cuda_major() -> str | None:
    return torch.version.cuda.split(".")[0] if torch.version.cuda else None


def load() -> None:
    """Loads the libraries once; every module of `pyseg.ops` calls this first.

    Raises:
        ImportError: the CPU library is absent or damaged, does not fit this torch, or another copy
            of pyseg is already loaded in this process.
    """
    with _lock:
        if "cpu" in _loaded:
            return
        library = _library("_C")
        if torch._C._dispatch_has_kernel(PROBE):
            # Registering one operator twice ends the process, so this is found out beforehand.
            others = [p for p in torch.ops.loaded_libraries if "_C" in Path(p).name]
            raise ImportError(
                "another copy of pyseg's operators is already loaded in this process, from "
                f"{', '.join(others) or 'an unknown place'}; this one is {FOLDER}. Remove one of "
                "them from sys.path, or run them in separate processes."
            )
        _load(library, "_C")
        assert library is not None
        _loaded["cpu"] = library
        _load_cuda()


def _load(library: Path | None, stem: str) -> None:
    version = ".".join(torch.__version__.split(".")[:2])
    try:
        if library is None:
            raise OSError(f"no file {stem}.*so in {FOLDER}")
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"pyseg's compiled library cannot be loaded: {error}\n"
            "Likely causes:\n"
            "  1. pyseg was not built: python runs in a source checkout. "
            "Run `make demo`, or `pip install --no-build-isolation -e .`.\n"
            f"  2. torch is too old: pyseg needs torch >= 2.10, this is {version}. "
            "Upgrade torch.\n"
            f"  3. the library was built for another platform than {platform.machine()} "
            f"{platform.system()}. Reinstall pyseg-toolkit here.\n"
            "  4. the file is damaged, or a system library that it needs (libstdc++) is older than "
            "the one it was built with. Reinstall with `pip install --force-reinstall --no-deps "
            "pyseg-toolkit`."
        ) from error


def _load_cuda() -> None:
    global _cuda_problem
    major = _torch_cuda_major()
    built = sorted(p.name.split(".")[0] for p in FOLDER.glob("_C_cu*.*so"))
    if major is None:
        _cuda_problem = f"torch {torch.__version__} is a build without CUDA"
        return
    library = _library(f"_C_cu{major}")
    if library is None:
        _cuda_problem = (
            f"pyseg was built with {', '.join(built)} but torch uses CUDA {torch.version.cuda}: "
            f"reinstall pyseg where nvcc is release {major}"
            if built
            else f"pyseg was built without CUDA: reinstall it where nvcc release {major} is found"
        )
        return
    _load(library, f"_C_cu{major}")
    _loaded["cuda"] = library


def require(op: str, *tensors: torch.Tensor) -> None:
    """Raises where a CUDA tensor meets an installation without CUDA kernels."""
    if "cuda" not in _loaded and any(tensor.is_cuda for tensor in tensors):
        raise ImportError(
            f"{op} has no CUDA kernel in this installation: {_cuda_problem}. "
            "Or move its inputs to the CPU. `pyseg doctor` shows what is installed."
        )


def autocast(device_type: str) -> bool:
    """Whether autocast is on for a device that the ops have kernels for.

    Elsewhere, as on "meta", torch may raise; and torch 2.11 does not compile a function that asks
    `torch.amp.is_autocast_available`.
    """
    import torch

    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


def check_tensors(**named: Any) -> None:
    """Raises where an argument of an op, or an element of one that is a list, is no tensor.

    Raises:
        TypeError: with the argument's name, what came and the remedy.
    """
    for name, value in named.items():
        several = isinstance(value, (list, tuple))
        for i, part in enumerate(value if several else [value]):
            if not isinstance(part, torch.Tensor):
                one, kind = f"{name}[{i}]" if several else name, type(part)
                remedy = (
                    f"torch.from_numpy({one})"
                    if kind.__module__ == "numpy" and kind.__name__ == "ndarray"
                    else f"torch.as_tensor({one})"
                )
                raise TypeError(
                    f"{one} must be a torch.Tensor, got {kind.__module__}.{kind.__qualname__}; "
                    f"pass tensors: {remedy}"
                )


def integer(name: str, value: Any) -> int:
    """An argument as an int, whether it is Python's or NumPy's; a size that is traced stays one.

    Raises:
        ValueError: it is no integer of 64 bits; torch's own error would be a RuntimeError.
    """
    if not isinstance(value, (int, torch.SymInt)):
        try:
            value = operator.index(value)
        except TypeError:
            raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be an integer of 64 bits, got {value}")
    return value


def number(name: str, value: Any) -> float:
    """An argument as a float, which may be infinite or NaN; text is none."""
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} must be a number, got {value!r}")


def flag(name: str, value: Any) -> bool:
    """An argument that is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def image_size(name: str, value: Iterable[Any]) -> tuple[int, int]:
    """An argument that is (height, width)."""
    try:
        sides = tuple(value)
    except TypeError:
        sides = ()
    if len(sides) == 2:
        height, width = (integer(name, side) for side in sides)
        if 1 <= height < 2**31 and 1 <= width < 2**31:
            return height, width
    raise ValueError(f"{name} must be (height, width), both at least 1, got {value}")


def simd_level() -> str:
    """The instruction set that the CPU kernels use here."""
    load()
    return str(torch.ops.pyseg.simd_level())


def status() -> dict[str, Any]:
    """What is loaded from where, and every op's devices; loads the libraries.

    Returns:
        ``{"cpu": path, "cuda": path | None, "cuda_problem": str | None, "simd": str,
        "ops": {name: {"cpu": bool, "cuda": bool, "cuda_usable": bool}}}``
    """
    load()
    names = sorted(
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pyseg::") and not name.startswith("pyseg::_") and name != PROBE
    )
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = {}
    for name in names:
        cuda = has(f"pyseg::{name}", "CUDA")
        ops[name] = {
            "cpu": has(f"pyseg::{name}", "CPU"),
            "cuda": cuda,
            "cuda_usable": cuda and torch.cuda.is_available(),
        }
    return {
        "cpu": str(_loaded["cpu"]),
        "cuda": str(_loaded["cuda"]) if "cuda" in _loaded else None,
        "cuda_problem": _cuda_problem,
        "simd": simd_level(),
        "ops": ops,
    }
