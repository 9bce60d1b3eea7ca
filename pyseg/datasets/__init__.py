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
    from .ade20k import ADE20K as ADE20K
    from .bdd100k import BDD100K as BDD100K
    from .bdd100k import BDD100KPanoptic as BDD100KPanoptic
    from .bsds500 import BSDS500 as BSDS500
    from .camvid import CamVid as CamVid
    from .cityscapes import Cityscapes as Cityscapes
    from .coco_instances import COCOInstances as COCOInstances
    from .coco_panoptic import COCOPanoptic as COCOPanoptic
    from .coco_stuff import COCOStuff as COCOStuff
    from .deepscene import DeepScene as DeepScene
    from .folder import Folder as Folder
    from .kitti import KITTI as KITTI
    from .labelmefacade import LabelMeFacade as LabelMeFacade
    from .mapillary import Mapillary as Mapillary
    from .mhp import MHPv1 as MHPv1
    from .mhp import MHPv2 as MHPv2
    from .nyudv2 import NYUDv2 as NYUDv2
    from .pascal_context import PascalContext as PascalContext
    from .sunrgbd import SUNRGBD as SUNRGBD
    from .synthetic import StreetScenes as StreetScenes
    from .voc import VOC as VOC

# Public class -> where it lives. Resolved on first use: listing needs no torch.
_CLASSES = {
    "ADE20K": ".ade20k",
    "BDD100K": ".bdd100k",
    "BDD100KPanoptic": ".bdd100k",
    "BSDS500": ".bsds500",
    "COCOInstances": ".coco_instances",
    "COCOPanoptic": ".coco_panoptic",
    "COCOStuff": ".coco_stuff",
    "CamVid": ".camvid",
    "Cityscapes": ".cityscapes",
    "DeepScene": ".deepscene",
    "Folder": ".folder",
    "KITTI": ".kitti",
    "LabelMeFacade": ".labelmefacade",
    "MHPv1": ".mhp",
    "MHPv2": ".mhp",
    "Mapillary": ".mapillary",
    "NYUDv2": ".nyudv2",
    "PascalContext": ".pascal_context",
    "SUNRGBD": ".sunrgbd",
    "StreetScenes": ".synthetic",
    "VOC": ".voc",
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
    "ADE20K",
    "BDD100K",
    "BSDS500",
    "KITTI",
    "SUNRGBD",
    "VOC",
    "BDD100KPanoptic",
    "COCOInstances",
    "COCOPanoptic",
    "COCOStuff",
    "CamVid",
    "Cityscapes",
    "DeepScene",
    "Folder",
    "LabelMeFacade",
    "MHPv1",
    "MHPv2",
    "Mapillary",
    "NYUDv2",
    "PascalContext",
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
