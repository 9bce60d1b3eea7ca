"""The kernels as functions of tensors.

Every module is imported here, at once: imported later, a submodule would replace the function of
the same name in this package.
"""

from .confusion_matrix import ConfusionCounts, confusion_counts, confusion_matrix
from .deform_conv2d import DeformConv2d, deform_conv2d
from .dense_crf import dense_crf
from .upsample_argmax import upsample_argmax

__all__ = [
    "ConfusionCounts",
    "DeformConv2d",
    "confusion_counts",
    "confusion_matrix",
    "deform_conv2d",
    "dense_crf",
    "upsample_argmax",
]
