"""Registry of refiners: ``create``, ``list``, ``describe``, ``get``, ``info`` and ``register``.

``create("name", option=…)`` makes a refiner. The classes stand here by name, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..registry import Registry

if TYPE_CHECKING:
    from .crf import CRF as CRF
    from .sam import SamRefiner as SamRefiner
    from .segfix import SegFix as SegFix
    from .temperature import Temperature as Temperature

# Public class -> where it lives. Resolved on first use: listing needs no torch.
_CLASSES = {
    "CRF": ".crf",
    "SamRefiner": ".sam",
    "SegFix": ".segfix",
    "Temperature": ".temperature",
}

_registry: Registry[Any] = Registry("refiner", "pyseg.refiners")
register, get, info, describe = (
    _registry.register,
    _registry.get,
    _registry.info,
    _registry.describe,
)
create = _registry.create


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CRF",
    "SamRefiner",
    "SegFix",
    "Temperature",
    "create",
    "describe",
    "get",
    "info",
    "list",
    "register",
]


def __dir__() -> Sequence[str]:
    return sorted({*globals(), *__all__})


# At the end: inside this package the name `list` now means this function.
list = _registry.list
