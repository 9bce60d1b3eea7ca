"""Names that stood here before every family had a file of its own; import them from there."""

from .fcn import FCN
from .maskrcnn import (
    COCO_THINGS,
    Detections,
    InstanceModel,
    maskrcnn_resnet50_fpn_v2,
    maskrcnn_resnet101_fpn,
)
from .maskrcnn import maskrcnn as maskrcnn_resnet50_fpn
from .panoptic_fpn import FPNSemanticHead
from .panoptic_fpn import maskrcnn_fcn as maskrcnn_fcn_resnet50
from .panoptic_fpn import panoptic_fpn as panoptic_fpn_resnet50
from .upsnet import DeformableConv, DeformableSemanticHead, upsnet_resnet101_dcn
from .upsnet import upsnet as upsnet_resnet50

__all__ = [
    "COCO_THINGS",
    "FCN",
    "DeformableConv",
    "DeformableSemanticHead",
    "Detections",
    "FPNSemanticHead",
    "InstanceModel",
    "maskrcnn_fcn_resnet50",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet101_fpn",
    "panoptic_fpn_resnet50",
    "upsnet_resnet50",
    "upsnet_resnet101_dcn",
]
