"""Registry of refiners: ``register``, ``get``, ``list`` and ``info`` by name."""

from ..registry import Registry

_registry = Registry("refiner", "pyseg.refiners")


def __getattr__(name: str):
    if name == "CRF":  # not imported above: that would import torch, which listing does not need
        from .crf import CRF

        return CRF
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# At the end: inside this package the name `list` now means this function.
register, get, info, list = _registry.register, _registry.get, _registry.info, _registry.list
