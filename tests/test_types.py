import pickle

import pytest
import torch

from pyseg.types import Instances, Segment, Segmentation, Segments


def make(**changes):
    fields = {"size": (6, 8), "classes": ("a", "b", "c"), "logits": torch.randn(3, 3, 4)}
    return Segmentation(**(fields | changes))


def test_labels_come_from_the_logits_at_full_size():
    segmentation = make()
    full = torch.nn.functional.interpolate(
        segmentation.logits[None], (6, 8), mode="bilinear", align_corners=False
    )
    assert torch.equal(segmentation.labels, full.argmax(1)[0].to(torch.uint8))
    assert segmentation.labels is segmentation.labels  # once
    torch.testing.assert_close(segmentation.probabilities(), full[0].softmax(0))


def test_changed_copies_drop_what_is_no_longer_true():
    first = make()
    before = first.labels
    second = first.with_logits(-first.logits)
    assert not torch.equal(second.labels, before) and torch.equal(first.labels, before)
    third = second.with_labels(before)
    assert third.logits is None and third.labels is before
    with pytest.raises(ValueError, match="labels without logits"):
        third.probabilities()


def test_labels_of_a_panoptic_map():
    ids = torch.tensor([[0, 7, 7], [300, 300, 0]], dtype=torch.int32)
    segments = Segments(ids, (Segment(300, 1, 1.0, 2), Segment(7, 2, 0.9, 2)))
    result = Segmentation((2, 3), ("a", "b", "c"), segments=segments)
    assert result.labels.tolist() == [[255, 2, 2], [1, 1, 255]]
    assert make().with_segments(Segments(torch.zeros(6, 8, dtype=torch.int32), ())).logits is None


def test_labels_of_more_than_255_classes():
    names = tuple(f"class {k}" for k in range(300))
    ids = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
    items = tuple(Segment(k, label, 1.0, 1) for k, label in ((1, 255), (2, 299), (3, 44)))
    labels = Segmentation((1, 4), names, segments=Segments(ids, items)).labels
    assert labels.dtype == torch.int16 and labels.tolist() == [[-1, 255, 299, 44]]
    logits = torch.zeros(300, 1, 2)
    logits[255, 0, 0], logits[299, 0, 1] = 1, 1
    labels = Segmentation((1, 2), names, logits=logits).labels
    assert labels.dtype == torch.int16 and labels.tolist() == [[255, 299]]


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"logits must be \[3, h, w\]"):
        make(logits=torch.zeros(4, 2, 2))
    with pytest.raises(ValueError, match=r"labels must be \[6, 8\]"):
        make().with_labels(torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="neither logits, labels, segments nor"):
        _ = make(logits=None).labels


def test_pickling_keeps_everything():
    first = make()
    copy = pickle.loads(pickle.dumps(first))
    assert torch.equal(copy.logits, first.logits) and copy.classes == first.classes


def test_labels_of_instances_alone():
    masks = torch.zeros(3, 2, 3, dtype=torch.bool)
    masks[0, 0], masks[1, :, 0], masks[2, :, 2] = True, True, True
    instances = Instances(
        torch.zeros(3, 4), masks, torch.tensor([0.9, 0.6, 0.4]), torch.tensor([2, 1, 0])
    )
    result = Segmentation((2, 3), ("a", "b", "c"), instances=instances)
    assert result.labels.tolist() == [[2, 2, 2], [1, 255, 255]]
    assert result.with_labels(result.labels).instances is instances
