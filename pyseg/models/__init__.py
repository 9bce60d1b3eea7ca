"""Registry of models: ``create``, ``list``, ``describe``, ``get``, ``info`` and ``register``.

``create("name", option=…)`` makes a model. The classes stand here by name, too:
`SemanticModel` makes a model of any network, in one line by `wrap`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..registry import Registry

if TYPE_CHECKING:
    from .backbones import convolutionalize as convolutionalize
    from .maskrcnn import InstanceModel as InstanceModel
    from .semantic import SemanticModel as SemanticModel
    from .semantic import wrap as wrap

# Public class or function -> where it lives. Resolved on first use: listing needs no torch.
_CLASSES = {
    "InstanceModel": ".maskrcnn",
    "SemanticModel": ".semantic",
    "convolutionalize": ".backbones",
    "wrap": ".semantic",
}

_registry: Registry[Any] = Registry("model", "pyseg.models")
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
    "InstanceModel",
    "SemanticModel",
    "convolutionalize",
    "create",
    "describe",
    "get",
    "info",
    "list",
    "register",
    "wrap",
]


def __dir__() -> Sequence[str]:
    return sorted({*globals(), *__all__})


# At the end: inside this package the name `list` now means this function.
list = _registry.list
