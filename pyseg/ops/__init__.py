"""The kernels as functions of tensors.

Every module is imported here, at once: imported later, a submodule would replace the function of
the same name in this package.
"""

from .boundary_mask import boundary_mask
from .boundary_match import BoundaryMatches, boundary_match
from .confusion_matrix import ConfusionCounts, confusion_counts, confusion_matrix
from .decode_png import decode_png
from .deform_conv2d import DeformConv2d, deform_conv2d
from .dense_crf import dense_crf
from .panoptic_head import panoptic_head, panoptic_logits
from .panoptic_merge import PanopticMaps, panoptic_merge
from .panoptic_quality import PanopticCounts, panoptic_quality
from .roi_align import (
    MultiScaleRoIAlign,
    RoIAlign,
    RoIPool,
    multi_scale_roi_align,
    replace_roi_pooling,
    roi_align,
    roi_pool,
    roi_warp,
)
from .upsample_argmax import upsample_argmax
from .upsample_confusion import upsample_confusion

__all__ = [
    "BoundaryMatches",
    "ConfusionCounts",
    "DeformConv2d",
    "MultiScaleRoIAlign",
    "PanopticCounts",
    "PanopticMaps",
    "RoIAlign",
    "RoIPool",
    "boundary_mask",
    "boundary_match",
    "confusion_counts",
    "confusion_matrix",
    "decode_png",
    "deform_conv2d",
    "dense_crf",
    "multi_scale_roi_align",
    "panoptic_head",
    "panoptic_logits",
    "panoptic_merge",
    "panoptic_quality",
    "replace_roi_pooling",
    "roi_align",
    "roi_pool",
    "roi_warp",
    "upsample_argmax",
    "upsample_confusion",
]
