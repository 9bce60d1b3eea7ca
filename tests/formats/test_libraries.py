"""supervision's `Detections`, also without supervision, and napari's layer data."""

import sys
import types
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from pyseg.errors import ImageError
from pyseg.formats import (
    from_napari_labels,
    from_supervision,
    to_napari_labels,
    to_supervision,
)
from pyseg.regions import Instances, Segments

CLASSES = ("road", "car", "tree")


@dataclass
class Detections:
    """The fields of supervision's."""

    xyxy: np.ndarray
    mask: np.ndarray | None = None
    confidence: np.ndarray | None = None
    class_id: np.ndarray | None = None
    tracker_id: np.ndarray | None = None
    data: dict = field(default_factory=dict)


@pytest.fixture(params=["real", "fields"])
def supervision(request, monkeypatch):
    if request.param == "real":
        return pytest.importorskip("supervision")
    module = types.ModuleType("supervision")
    module.Detections = Detections
    monkeypatch.setitem(sys.modules, "supervision", module)
    return module


def instances(count, crowd=None):
    return Instances(
        torch.rand(count, 4),
        torch.rand(count, 7, 9) > 0.5,
        torch.rand(count),
        torch.randint(0, 3, (count,)),
        crowd,
    )


@pytest.mark.parametrize("crowd", [None, torch.tensor([True, False, False, True])])
def test_detections(supervision, crowd):
    want = instances(4, crowd)
    detections = to_supervision(want, CLASSES)
    assert isinstance(detections, supervision.Detections)
    assert detections.xyxy.dtype == np.float32 and detections.mask.dtype == bool
    assert detections.data["class_name"].tolist() == [CLASSES[k] for k in want.labels]
    got = from_supervision(detections)
    for name in ("boxes", "masks", "scores", "labels"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    assert (got.crowd is None) == (crowd is None)
    assert crowd is None or torch.equal(got.crowd, crowd)


def test_no_detections(supervision):
    got = from_supervision(to_supervision(instances(0)))
    assert got.masks.shape == (0, 7, 9) and got.boxes.shape == (0, 4)
    empty = Detections(np.zeros((0, 4), np.float32))
    assert from_supervision(empty, size=(7, 9)).masks.shape == (0, 7, 9)
    with pytest.raises(ImageError, match="or give size for an empty result"):
        from_supervision(empty)


def test_detections_without_masks_or_classes():
    boxes = np.zeros((2, 4), np.float32)
    with pytest.raises(ImageError, match="boxes alone are no segmentation"):
        from_supervision(Detections(boxes, class_id=np.array([0, 1])))
    masks = np.zeros((2, 7, 9), bool)
    with pytest.raises(ImageError, match="no class_id"):
        from_supervision(Detections(boxes, masks))
    with pytest.raises(ImageError, match=r"must be \[2, H, W\], got \[3, 7, 9\]"):
        from_supervision(Detections(boxes, np.zeros((3, 7, 9), bool), class_id=np.array([0, 1])))
    assert from_supervision(Detections(boxes, masks, class_id=[0, 1])).scores.tolist() == [1, 1]


def test_supervision_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        to_supervision(instances(1))


def test_label_layers():
    ids = np.array([[0, 5, 5], [70_000, 70_000, 2]])
    segments = Segments.from_map(ids, {5: 0, 70_000: 1, 2: 1}, crowds=(2,))
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    classes, objects = to_napari_labels(segments, CLASSES, colours)
    assert classes[2] == objects[2] == "labels"
    assert classes[0].tolist() == [[0, 1, 1], [2, 2, 2]] and classes[0].dtype == np.int32
    assert objects[0].tolist() == ids.tolist()
    assert classes[1]["features"]["class"] == ["void", *CLASSES]
    assert classes[1]["colormap"][2] == [0, 1, 0, 1]
    rows = objects[1]["features"]
    found = dict(zip(rows["index"], rows["class"], strict=True))
    assert found == {0: "void", 5: "road", 70_000: "car", 2: "car"}
    for layer, names in (
        (objects, CLASSES),
        (types.SimpleNamespace(data=ids, features=rows), CLASSES),
    ):
        back = from_napari_labels(layer, names)
        assert torch.equal(back.map, segments.map)
        labels = {item.id: item.label for item in back.items}
        assert labels == {item.id: item.label for item in segments.items}
    back = from_napari_labels(classes)
    assert torch.equal(back.label_map(3), segments.label_map(3))
    objects[0][0, 0] = 9  # painted by hand, with a label that is new
    with pytest.raises(ImageError, match=r"holds \[9\], whose class"):
        from_napari_labels(objects, CLASSES)
    with pytest.raises(ImageError, match="must be"):
        from_napari_labels((np.zeros((3, 4)), {}), CLASSES)
    with pytest.raises(ImageError, match="no features"):
        from_napari_labels((ids, {}), CLASSES)
    with pytest.raises(ImageError, match="0 to 2"):
        from_napari_labels((-ids, {}))
