"""pyseg: image segmentation by composing models and refiners on fast kernels.

segmenter = pyseg.build("fcn_resnet50+crf")
segmenter("street.jpg").save("street.png")
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> where it lives. Resolved on first use, so that `import pyseg` loads no model, no
# plugin and no compiled library.
_LAZY = {
    "Pipeline": ".pipeline",
    "build": ".pipeline",
    "load": ".pipeline",
    "evaluate": ".evaluation",
    "predict": ".prediction",
    "train": ".training",
    "Instances": ".types",
    "Sample": ".types",
    "Segment": ".types",
    "Segmentation": ".types",
    "Segments": ".types",
    "PysegError": ".errors",
}
_SUBMODULES = {"datasets", "errors", "image", "metrics", "models", "ops", "refiners", "visual"}

__all__ = ["__version__", *sorted(_LAZY), *sorted(_SUBMODULES)]

if TYPE_CHECKING:
    from . import datasets, errors, image, metrics, models, ops, refiners, visual  # noqa: F401
    from .errors import PysegError  # noqa: F401
    from .evaluation import evaluate  # noqa: F401
    from .pipeline import Pipeline, build, load  # noqa: F401
    from .prediction import predict  # noqa: F401
    from .training import train  # noqa: F401
    from .types import Instances, Sample, Segment, Segmentation, Segments  # noqa: F401


def __getattr__(name: str):
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name], __name__), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
