"""Registry of metrics: ``create``, ``list``, ``describe``, ``get``, ``info`` and ``register``.

``create("name", option=…)`` makes a metric, `score` scores arrays by any of them. The classes stand
here by name, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..registry import Registry

if TYPE_CHECKING:
    from ..types import Metric
    from .binary import Binary as Binary
    from .boundary import Boundary as Boundary
    from .calibration import Calibration as Calibration
    from .cityscapes_ap import CityscapesAP as CityscapesAP
    from .instances import InstanceAP as InstanceAP
    from .panoptic import Panoptic as Panoptic
    from .scoring import Differences as Differences
    from .scoring import Scores as Scores
    from .scoring import differences as differences
    from .scoring import score as score
    from .semantic import Semantic as Semantic

# Public name -> where it lives. Resolved on first use: listing needs no torch.
_CLASSES = {
    "Binary": ".binary",
    "Boundary": ".boundary",
    "Calibration": ".calibration",
    "CityscapesAP": ".cityscapes_ap",
    "Differences": ".scoring",
    "InstanceAP": ".instances",
    "Panoptic": ".panoptic",
    "Scores": ".scoring",
    "Semantic": ".semantic",
    "differences": ".scoring",
    "score": ".scoring",
}

_registry: Registry[Metric] = Registry("metric", "pyseg.metrics")
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
    "Binary",
    "Boundary",
    "Calibration",
    "CityscapesAP",
    "Differences",
    "InstanceAP",
    "Panoptic",
    "Scores",
    "Semantic",
    "create",
    "describe",
    "differences",
    "get",
    "info",
    "list",
    "register",
    "score",
]


def __dir__() -> Sequence[str]:
    return sorted({*globals(), *__all__})


# At the end: inside this package the name `list` now means this function.
list = _registry.list
