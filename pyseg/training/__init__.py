"""Training: `train` a semantic model, or from coarse to fine, `train_staged`; `train_instances`,
the refiners by `train_crf` and `train_segfix`, `nano` by `train_promptable`, or `fit` a step of
your own.

One file each, on the loop of ``loop.py``. ``losses.py`` has what is minimised, ``optimizer.py`` the
parts of a model with learning rates of their own, ``augment.py`` the random views of samples,
``label_spaces.py`` data sets that each know some of the classes, ``recipes.py`` options in files.
"""

from .augment import class_mix, copy_paste, random_crop, random_light, random_view
from .crf import Training, train_crf
from .instances import train_instances
from .label_spaces import LabelSpace, union
from .loop import fit, usual_precision
from .losses import Loss
from .optimizer import make_optimizer, parameter_groups
from .promptable import nano_from, train_promptable
from .segfix import train_segfix
from .semantic import train
from .staged import train_staged

__all__ = [
    "LabelSpace",
    "Loss",
    "Training",
    "class_mix",
    "copy_paste",
    "fit",
    "make_optimizer",
    "nano_from",
    "parameter_groups",
    "random_crop",
    "random_light",
    "random_view",
    "train",
    "train_crf",
    "train_instances",
    "train_promptable",
    "train_segfix",
    "train_staged",
    "union",
    "usual_precision",
]
