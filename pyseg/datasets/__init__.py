"""Registry of data sets: ``create``, ``list``, ``describe``, ``get``, ``info`` and ``register``.

``create("name", option=…)`` makes a data set. The classes stand here by name, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..registry import Registry

if TYPE_CHECKING:
    from ..types import Dataset
    from .camvid import CamVid as CamVid
    from .coco_panoptic import COCOPanoptic as COCOPanoptic
    from .folder import Folder as Folder
    from .synthetic import StreetScenes as StreetScenes

# Public class -> where it lives. Resolved on first use: listing needs no torch.
_CLASSES = {
    "COCOPanoptic": ".coco_panoptic",
    "CamVid": ".camvid",
    "Folder": ".folder",
    "StreetScenes": ".synthetic",
}

_registry: Registry[Dataset] = Registry("dataset", "pyseg.datasets")
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
    "COCOPanoptic",
    "CamVid",
    "Folder",
    "StreetScenes",
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
