"""Formats of others, read and written; `table.FORMATS` lists those that `pyseg convert` knows."""

from ..classes import CITYSCAPES_IDS
from .annotation import Annotation, Placement, Region, Source
from .cityscapes import write_cityscapes_ids
from .coco import write_instances
from .libraries import (
    from_napari_labels,
    from_supervision,
    to_napari_labels,
    to_supervision,
)
from .panoptic import (
    annotations_of,
    categories_of,
    read_segment_ids,
    read_segments,
    write_panoptic,
    write_segments,
)
from .rle import compressed_rle, decode_rle, edges_of, encode_rle
from .uncertainty import read_uncertainty, write_confidence, write_uncertainty

__all__ = [
    "CITYSCAPES_IDS",
    "Annotation",
    "Placement",
    "Region",
    "Source",
    "annotations_of",
    "categories_of",
    "compressed_rle",
    "decode_rle",
    "edges_of",
    "encode_rle",
    "from_napari_labels",
    "from_supervision",
    "read_segment_ids",
    "read_segments",
    "read_uncertainty",
    "to_napari_labels",
    "to_supervision",
    "write_cityscapes_ids",
    "write_confidence",
    "write_instances",
    "write_panoptic",
    "write_segments",
    "write_uncertainty",
]
