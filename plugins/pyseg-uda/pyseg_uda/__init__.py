"""Domain adaptation of semantic models: trained by day, for dusk.

`adapt` trains; ``losses.py`` has its equations, ``mixing.py`` mixed images and rare classes,
``streams.py`` attention across domains, ``steps.py`` one step of it all, ``alignment.py`` colours
without training.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alignment import align as align
    from .training import adapt as adapt

# Public function -> where it lives. Resolved on first use: the command's help needs no torch.
_FUNCTIONS = {"adapt": ".training", "align": ".alignment"}


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["adapt", "align"]
