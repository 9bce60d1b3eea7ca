"""The kernels as functions of tensors.

Every module is imported here, at once: imported later, a submodule would replace the function of
the same name in this package.
"""

from .confusion_matrix import ConfusionCounts, confusion_counts, confusion_matrix
from .dense_crf import dense_crf
from .panoptic_head import panoptic_head, panoptic_logits
from .panoptic_merge import PanopticMaps, panoptic_merge
from .upsample_argmax import upsample_argmax

__all__ = [
    "ConfusionCounts",
    "PanopticMaps",
    "confusion_counts",
    "confusion_matrix",
    "dense_crf",
    "panoptic_head",
    "panoptic_logits",
    "panoptic_merge",
    "upsample_argmax",
]
