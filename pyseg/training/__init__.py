"""Training: `train` a semantic model, or from coarse to fine, `train_staged`; `train_instances`,
`train_crf`, or `fit` a step of your own.

One file each, on the loop of ``loop.py``; ``augment.py`` has the random views of samples.
"""

from .augment import random_crop, random_light, random_view
from .crf import Training, train_crf
from .instances import train_instances
from .loop import fit, parameter_groups, usual_precision
from .semantic import train
from .staged import train_staged

__all__ = [
    "Training",
    "fit",
    "parameter_groups",
    "random_crop",
    "random_light",
    "random_view",
    "train",
    "train_crf",
    "train_instances",
    "train_staged",
    "usual_precision",
]
