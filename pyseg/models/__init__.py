"""Registry of models: ``create``, ``list``, ``describe``, ``get``, ``info`` and ``register``.

``create("name", option=…)`` makes a model. The classes stand here by name, too:
`SemanticModel` makes a model of any network, in one line by `wrap`; `semantic_model` is what a
plugin's factory of a semantic network ends in, `class_names` and `voc_classes` name its classes,
and `require_evaluation_mode` is for models that predict in another way.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..registry import Registry

if TYPE_CHECKING:
    from .backbones import convolutionalize as convolutionalize
    from .backbones import voc_classes as voc_classes
    from .facts import ModelInfo as ModelInfo
    from .maskrcnn import InstanceModel as InstanceModel
    from .semantic import SemanticModel as SemanticModel
    from .semantic import class_names as class_names
    from .semantic import require_evaluation_mode as require_evaluation_mode
    from .semantic import semantic_model as semantic_model
    from .semantic import wrap as wrap

# Public class or function -> where it lives. Resolved on first use: listing needs no torch.
_CLASSES = {
    "InstanceModel": ".maskrcnn",
    "ModelInfo": ".facts",
    "SemanticModel": ".semantic",
    "class_names": ".semantic",
    "convolutionalize": ".backbones",
    "require_evaluation_mode": ".semantic",
    "semantic_model": ".semantic",
    "voc_classes": ".backbones",
    "wrap": ".semantic",
}

_registry: Registry[Any] = Registry("model", "pyseg.models")
register, get, describe = (
    _registry.register,
    _registry.get,
    _registry.describe,
)
create = _registry.create


def info(name: str, *, size: tuple[int, int] = (512, 512)) -> ModelInfo:
    """What is known about a model: its paper, parameters, GFLOPs, published scores and licence.

    Imports nothing of it before these are asked for; where it comes from is known without.

    Args:
        name: a registered name.
        size: (height, width) of the image that GFLOPs are counted for.

    Raises:
        UnknownName: nothing has that name.
        PluginError: two distributions claim it, or, when it is asked, it fails to import.
        ValueError: a ``size`` below 1.

    Example:
        >>> pyseg.models.info("segnet").parameters
        29449355
    """
    from .facts import ModelInfo

    if min(size) < 1:
        raise ValueError(f"size must be (height, width) in pixels, got {size}")
    return ModelInfo(**vars(_registry.info(name)), size=size)


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "InstanceModel",
    "ModelInfo",
    "SemanticModel",
    "class_names",
    "convolutionalize",
    "create",
    "describe",
    "get",
    "info",
    "list",
    "register",
    "require_evaluation_mode",
    "semantic_model",
    "voc_classes",
    "wrap",
]


def __dir__() -> Sequence[str]:
    return sorted({*globals(), *__all__})


# At the end: inside this package the name `list` now means this function.
list = _registry.list
