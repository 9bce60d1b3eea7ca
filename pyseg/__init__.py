"""pyseg: image segmentation by composing models and refiners on fast kernels.

segmenter = pyseg.build("fcn_resnet50+crf")
segmenter("street.jpg").save("street.png")
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> where it lives. Resolved on first use, so that `import pyseg` loads no model, no
# plugin and no compiled library.
_LAZY = {
    "API_VERSION": ".contract",
    "Pipeline": ".pipeline",
    "build": ".pipeline",
    "compose": ".pipeline",
    "from_pretrained": ".pipeline",
    "load": ".pipeline",
    "compare": ".comparison",
    "evaluate": ".evaluation",
    "export_model": ".export",
    "label": ".prediction",
    "predict": ".prediction",
    "predict_large": ".large",
    "Session": ".session",
    "train": ".training",
    "train_instances": ".training",
    "tune_crf": ".tuning",
    "check_data": ".data_check",
    "check_labels": ".label_check",
    "Instances": ".types",
    "Sample": ".types",
    "Segment": ".types",
    "Segmentation": ".types",
    "Segments": ".types",
    "PysegError": ".errors",
}
# `cost` is the module, which can be called: the function of that name.
_SUBMODULES = {
    "cost",
    "datasets",
    "errors",
    "image",
    "metrics",
    "models",
    "ops",
    "refiners",
    "types",
    "video",
    "visual",
}

# Written out, and `import x as x` below: so type checkers know what is exported.
__all__ = [
    "API_VERSION",
    "Instances",
    "Pipeline",
    "PysegError",
    "Sample",
    "Segment",
    "Segmentation",
    "Segments",
    "Session",
    "__version__",
    "build",
    "check_data",
    "check_labels",
    "compare",
    "compose",
    "cost",
    "datasets",
    "errors",
    "evaluate",
    "export_model",
    "from_pretrained",
    "image",
    "label",
    "load",
    "metrics",
    "models",
    "ops",
    "predict",
    "predict_large",
    "refiners",
    "train",
    "train_instances",
    "tune_crf",
    "types",
    "video",
    "visual",
]

if TYPE_CHECKING:
    from . import datasets as datasets
    from . import errors as errors
    from . import image as image
    from . import metrics as metrics
    from . import models as models
    from . import ops as ops
    from . import refiners as refiners
    from . import types as types
    from . import video as video
    from . import visual as visual
    from .comparison import compare as compare
    from .contract import API_VERSION as API_VERSION
    from .cost import cost as cost
    from .data_check import check_data as check_data
    from .errors import PysegError as PysegError
    from .evaluation import evaluate as evaluate
    from .export import export_model as export_model
    from .label_check import check_labels as check_labels
    from .large import predict_large as predict_large
    from .pipeline import Pipeline as Pipeline
    from .pipeline import build as build
    from .pipeline import compose as compose
    from .pipeline import from_pretrained as from_pretrained
    from .pipeline import load as load
    from .prediction import label as label
    from .prediction import predict as predict
    from .session import Session as Session
    from .training import train as train
    from .training import train_instances as train_instances
    from .tuning import tune_crf as tune_crf
    from .types import Instances as Instances
    from .types import Sample as Sample
    from .types import Segment as Segment
    from .types import Segmentation as Segmentation
    from .types import Segments as Segments


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name], __name__), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
