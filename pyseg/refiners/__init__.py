"""Registry of refiners: ``register``, ``get``, ``list`` and ``info`` by name."""

from ..registry import Registry
from .crf import CRF as CRF

_registry = Registry("refiner", "pyseg.refiners")

# At the end: inside this package the name `list` now means this function.
register, get, info, list = _registry.register, _registry.get, _registry.info, _registry.list
