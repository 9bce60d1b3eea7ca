"""Results as other libraries hold them: supervision's `Detections`, napari's label layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import ImageError, require
from ..regions import Instances, Segments, void_label


def to_supervision(instances: Instances, classes: Sequence[str] | None = None) -> Any:
    """Instances as ``supervision.Detections``.

    Args:
        instances: boxes, masks, scores and labels become ``xyxy``, ``mask``, ``confidence`` and
            ``class_id``.
        classes: class names, for ``data["class_name"]``, which supervision's annotators show.

    Raises:
        ImportError: supervision is not installed.
    """
    supervision = require("supervision", remedy="pip install supervision")
    labels = instances.labels.detach().cpu().numpy().astype(int)
    data: dict[str, Any] = {}
    if classes is not None:
        data["class_name"] = np.array([classes[k] for k in labels], dtype=str)
    if instances.crowd is not None:
        data["crowd"] = instances.crowd.detach().cpu().numpy().astype(bool)
    return supervision.Detections(
        xyxy=instances.boxes.detach().cpu().numpy().astype(np.float32).reshape(-1, 4),
        mask=instances.masks.detach().cpu().numpy().astype(bool),
        confidence=instances.scores.detach().cpu().numpy().astype(np.float32),
        class_id=labels,
        data=data,
    )


def from_supervision(detections: Any, size: tuple[int, int] | None = None) -> Instances:
    """``supervision.Detections``, or what has its fields, as instances.

    Args:
        detections: with masks; without ``confidence`` scores are 1.
        size: (H, W) of the image, where detections may be empty and have no mask to tell it.

    Raises:
        ImageError: there are no masks, or no classes.
    """
    boxes = np.asarray(detections.xyxy, np.float32).reshape(-1, 4)
    count = len(boxes)
    mask = detections.mask
    if mask is None and count == 0 and size is not None:
        mask = np.zeros((0, *size), bool)
    if mask is None:
        raise ImageError(
            "the detections have no masks: boxes alone are no segmentation; take a model that "
            "gives masks" + ("" if count else ", or give size for an empty result")
        )
    if detections.class_id is None and count:
        raise ImageError("the detections have no class_id; set it before")
    masks = np.asarray(mask, bool)
    if masks.ndim != 3 or len(masks) != count:
        raise ImageError(f"the masks must be [{count}, H, W], got {list(masks.shape)}")
    scores = np.ones(count) if detections.confidence is None else detections.confidence
    labels = [] if detections.class_id is None else detections.class_id
    crowd = (detections.data or {}).get("crowd")
    return Instances(
        torch.from_numpy(boxes.copy()),
        torch.from_numpy(masks.copy()),
        torch.as_tensor(np.asarray(scores, np.float32).copy()),
        torch.as_tensor(np.asarray(labels, np.int64).copy()),
        None if crowd is None else torch.as_tensor(np.asarray(crowd, bool).copy()),
    )


def to_napari_labels(
    segments: Segments,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]] | None = None,
) -> list[tuple[np.ndarray, dict[str, Any], str]]:
    """A panoptic result as napari's layer data: a layer of classes and one of segments.

    Args:
        segments: of one image.
        classes: class names.
        palette: one RGB colour per class; None = napari's own colours.

    Returns:
        Two (data, attributes, "labels"), as napari's plugins return them, and
        ``viewer.add_layer(napari.layers.Layer.create(*layer))`` takes them. In the layer "classes"
        0 is void and class k is k + 1; in "segments" values are ids. ``features`` names both.
    """
    labels = segments.label_map(len(classes)).cpu().numpy().astype(np.int32)
    void, _ = void_label(len(classes))
    plane = np.where(labels == void, 0, labels + 1).astype(np.int32)
    first: dict[str, Any] = {
        "name": "classes",
        "features": {"index": [*range(len(classes) + 1)], "class": ["void", *classes]},
    }
    if palette is not None:
        colours = {k: [*(v / 255 for v in colour), 1.0] for k, colour in enumerate(palette, 1)}
        first["colormap"] = {None: [0.0, 0.0, 0.0, 0.0], 0: [0.0, 0.0, 0.0, 0.0], **colours}
    items = segments.items
    second: dict[str, Any] = {
        "name": "segments",
        "features": {
            "index": [0, *(item.id for item in items)],
            "class": ["void", *(classes[item.label] for item in items)],
            "score": [0.0, *(item.score for item in items)],
            "crowd": [False, *(item.crowd for item in items)],
        },
    }
    ids = segments.map.detach().cpu().numpy().astype(np.int32)
    return [(plane, first, "labels"), (ids, second, "labels")]


def from_napari_labels(layer: Any, classes: Sequence[str] | None = None) -> Segments:
    """A label layer as a panoptic result, for example after it was corrected by hand.

    Args:
        layer: napari's layer, or layer data as `to_napari_labels` gives it, whose ``features`` tell
            the class of each value ("index" and "class").
        classes: class names.  None = values are class index + 1, as in the layer "classes".

    Raises:
        ImageError: no such layer, or a value without a class.
    """
    if isinstance(layer, (tuple, list)):
        data, attributes = layer[0], layer[1] if len(layer) > 1 else {}
        features: Any = attributes.get("features", {})
    else:
        data, features = layer.data, getattr(layer, "features", {})
    table = np.asarray(data)
    if table.ndim != 2 or table.dtype.kind not in "ui":
        raise ImageError(
            f"a label layer must be [H, W] integers, got {table.dtype} of shape {list(table.shape)}"
        )
    ids = table.astype(np.int64)
    found = [int(value) for value in np.unique(ids) if value]
    if found and (found[0] < 0 or found[-1] >= 1 << 31):
        raise ImageError(f"a label layer must hold 0 to 2^31 - 1, got {found[0]} to {found[-1]}")
    if classes is None:
        labels: Mapping[int, int] = {value: value - 1 for value in found}
        return Segments.from_map(ids, labels)
    index = {name: k for k, name in enumerate(classes)}
    try:
        pairs = list(zip(list(features["index"]), list(features["class"]), strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise ImageError("the layer has no features 'index' and 'class' of one length") from error
    labels = {int(value): index[name] for value, name in pairs if name in index}
    if unknown := [value for value in found if value not in labels]:
        raise ImageError(
            f"the layer holds {unknown[:8]}, whose class its features do not tell; add rows"
        )
    return Segments.from_map(ids, labels)


__all__ = ["from_napari_labels", "from_supervision", "to_napari_labels", "to_supervision"]
