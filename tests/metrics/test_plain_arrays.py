"""Metrics of arrays and tensors alone, held against the same in a Segmentation and a Sample."""

import json

import numpy as np
import pytest
import torch

from pyseg.errors import LabelError, ScoreError
from pyseg.metrics.binary import Binary
from pyseg.metrics.boundary import Boundary
from pyseg.metrics.calibration import Calibration
from pyseg.metrics.instances import InstanceAP
from pyseg.metrics.panoptic import Panoptic
from pyseg.metrics.semantic import Semantic
from pyseg.types import Instances, Sample, Segmentation, Segments

SIZE, COUNT = (13, 17), 4
NAMES = tuple(f"class {k}" for k in range(COUNT))
IMAGE = torch.zeros(3, *SIZE, dtype=torch.uint8)


@pytest.fixture
def batch():
    """Label maps of three images with void in both, [3, H, W] uint8."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(2, 3, COUNT, 4, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse.flatten(0, 1), SIZE, mode="bicubic")
    prediction, target = smooth.argmax(1).to(torch.uint8).view(2, 3, *SIZE)
    target[:, 0], prediction[:, :, 0] = 255, 255
    return prediction, target


def scored(metric, predictions, targets):
    """What `update` makes of the same."""
    for k, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        metric.update(prediction, Sample(f"image {k}", IMAGE, target))
    return same(metric)


def same(metric):
    return json.dumps(metric.compute())  # nan and all


def blank():
    return Segmentation(SIZE, NAMES)


KINDS = {
    "torch": lambda labels: labels,
    "torch int64": lambda labels: labels.long(),
    "torch uint16": lambda labels: labels.to(torch.uint16),
    "numpy": lambda labels: labels.numpy(),
    "numpy int64": lambda labels: labels.numpy().astype(np.int64),
    "numpy uint32": lambda labels: labels.numpy().astype(np.uint32),
    "numpy turned": lambda labels: np.ascontiguousarray(labels.numpy()[:, ::-1])[:, ::-1],
    "read-only": lambda labels: np.frombuffer(labels.numpy().tobytes(), "u1").reshape(labels.shape),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [Semantic, Boundary, Binary])
def test_label_maps(make, kind, batch):
    prediction, target = batch
    want = make(COUNT)
    if make is Binary:  # of logits that are sure
        sure = torch.full((3, COUNT, *SIZE), -60.0)
        hot = torch.nn.functional.one_hot(
            prediction.long().masked_fill(prediction == 255, 0), COUNT
        )
        sure[hot.permute(0, 3, 1, 2).bool()] = 60.0
        wanted = scored(want, [blank().with_logits(one) for one in sure], target)
    else:
        wanted = scored(want, [blank().with_labels(one) for one in prediction], target)
    whole, parts = make(COUNT), make(COUNT)
    convert = KINDS[kind]
    whole.update_labels(convert(prediction), convert(target))
    for ours, theirs in zip(convert(prediction), convert(target), strict=True):
        parts.update_labels(ours, theirs)
    assert same(whole) == same(parts) == wanted


def test_one_line_without_names():
    metric = Semantic(19)
    metric.update_labels(np.array([[0, 1], [18, 255]]), np.array([[0, 2], [18, 255]]))
    assert metric.compute()["pixel_accuracy"] == pytest.approx(2 / 3)
    assert metric.classes[18] == "class 18" and Semantic(num_classes=19).classes == metric.classes


def test_label_maps_of_classes_that_count_from_1(batch):
    prediction, target = batch
    want, got = Semantic(COUNT), Semantic(COUNT, reduce_zero_label=True)
    want.update_labels(prediction, target)
    shifted = torch.where(target == 255, 0, target + 1)
    got.update_labels(prediction, shifted)
    assert same(got) == same(want)


def test_masks_are_labels_of_two_classes():
    truth = np.array([[True, False], [True, True]])
    metric = Semantic(2)
    metric.update_labels(np.ones((2, 2), bool), truth)
    assert metric.compute()["pixel_accuracy"] == 0.75


@pytest.mark.parametrize("make", [Semantic, Boundary, Binary])
def test_label_maps_that_are_none(make):
    metric = make(COUNT)
    good = np.zeros((2, 3), np.uint8)
    for prediction, target, words in (
        (good.astype(float), good, "float64"),
        (good, torch.zeros(2, 3), "float32"),
        (good, good[:1], r"\[2, 3\] and \[1, 3\]"),
        (good[0], good[0], r"\[3\] and \[3\]"),
        (good.tolist(), good, "list"),
        (good + 4, good, "4"),
        (good, good + 77, "77"),
    ):
        with pytest.raises(LabelError, match=words):
            metric.update_labels(prediction, target)


@pytest.mark.parametrize("make", [Calibration, Binary])
@pytest.mark.parametrize("convert", [lambda t: t, lambda t: t.numpy()], ids=["torch", "numpy"])
def test_logits(make, convert, batch):
    logits = 2 * torch.randn(3, COUNT, 5, 6, generator=torch.Generator().manual_seed(1))
    wanted = scored(make(COUNT), [blank().with_logits(one) for one in logits], batch[1])
    whole, parts = make(COUNT), make(COUNT)
    whole.update_logits(convert(logits), convert(batch[1]))
    for one, target in zip(logits, batch[1], strict=True):
        parts.update_logits(convert(one), convert(target))
    assert same(whole) == same(parts) == wanted


def test_probabilities(batch):
    logits = 2 * torch.randn(3, COUNT, *SIZE, generator=torch.Generator().manual_seed(1))
    probabilities = logits.double().softmax(1)
    by_logits, got = Calibration(COUNT), Calibration(COUNT)
    by_logits.update_logits(logits, batch[1])
    got.update_probabilities(probabilities.numpy(), batch[1].numpy())
    want, have = by_logits.compute(), got.compute()
    for key in ("ece", "mce", "brier", "nll", "pixel_accuracy", "confidence"):
        assert have[key] == pytest.approx(want[key], abs=1e-6), key
    sure = Calibration(2)
    sure.update_probabilities(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]), np.array([[0, 0]]))
    assert sure.compute()["brier"] == 1 and sure.compute()["nll"] == float("inf")


def test_probabilities_of_one_class():
    probabilities = torch.rand(2, *SIZE, dtype=torch.float64)
    target = (torch.rand(2, *SIZE) < probabilities).long()
    target[0, 0] = 255
    got = Binary(threshold=0.3)
    got.update_probabilities(probabilities, target)
    p, t = (values[target != 255].numpy() for values in (probabilities.float(), target))
    hits = ((p >= np.float32(0.3)) & (t == 1)).sum()
    assert got.compute()["recall"] == pytest.approx(hits / (t == 1).sum())
    order = p[:, None][t == 1] > p[None, :][:, t == 0]
    assert got.compute()["roc_auc"] == pytest.approx(order.mean(), abs=2e-3)  # of bins
    # At the threshold itself a pixel is positive, whatever the log-odds round to.
    for threshold in np.linspace(0.01, 0.99, 99, dtype=np.float32):
        metric = Binary(threshold=float(threshold))
        metric.update_probabilities(np.array([[threshold]]), np.array([[1]]))
        assert metric.compute()["recall"] == 1


def test_scores_that_are_none():
    truth = np.zeros((2, 3), np.uint8)
    for metric in (Calibration(2), Binary(2)):
        for scores, words in (
            (np.zeros((2, 2, 3), int), "int64"),
            (np.zeros((2, 3)), r"\[2, 3\]"),
            (np.full((2, 2, 3), np.nan), "NaN"),
            (np.zeros((3, 2, 3)), "3 classes"),
        ):
            with pytest.raises(ScoreError, match=words):
                metric.update_logits(scores, truth)
        with pytest.raises(LabelError, match="7"):
            metric.update_logits(np.zeros((2, 2, 3)), truth + 7)
    for scores, words in (
        (np.full((2, 2, 3), 0.7), "add up to 1"),
        (np.full((2, 2, 3), 1.5), "update_logits"),
        (np.full((2, 1, 3), 0.5), r"size \[2, 3\]"),
    ):
        with pytest.raises(ScoreError, match=words):
            Calibration(2).update_probabilities(scores, truth)
    for scores, words in (
        (np.full((2, 3), -0.1), "0 to 1"),
        (np.full((2, 3), np.nan), "NaN"),
        (np.zeros((2, 2, 3)), r"\[H, W\]"),
    ):
        with pytest.raises(ScoreError, match=words):
            Binary(2).update_probabilities(scores, truth)


def test_segments_of_a_map():
    ids = np.array([[0, 7, 7, 9], [3, 7, 9, 9]], np.int64)
    segments = Segments.from_map(ids, {7: 2, 9: 2, 3: 0, 50: 1}, crowds=[9])
    assert segments.map.dtype == torch.int32 and segments.map.tolist() == ids.tolist()
    listed = [(s.id, s.label, s.area, s.crowd) for s in segments.items]
    assert listed == [(3, 0, 1, False), (7, 2, 3, False), (9, 2, 3, True)]
    assert segments.label_map(3).tolist() == [[255, 2, 2, 2], [0, 2, 2, 2]]
    metric = Panoptic(3)
    metric.update_segments(Segments.from_map(ids, {7: 2, 9: 2, 3: 0}), segments)
    assert metric.compute()["pq"] == 1
    for map, words in ((ids[0], "integers"), (ids / 2, "integers"), (ids + 1, r"ids \[1, 4")):
        with pytest.raises(ValueError, match=words):
            Segments.from_map(map, {7: 2, 9: 2, 3: 0})


def test_instances_alone():
    masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    masks[0, 2:8, 3:9], masks[1, 5:12, 8:16] = True, True
    boxes = torch.tensor([[3.0, 2, 9, 8], [8, 5, 16, 12]])
    found = Instances(boxes, masks, torch.tensor([0.9, 0.8]), torch.tensor([1, 3]))
    want, got = InstanceAP(NAMES, kinds=["mask"]), InstanceAP(COUNT, kinds=["mask"])
    want.update(Segmentation(SIZE, NAMES, instances=found), Sample("a", IMAGE, instances=found))
    got.update_instances(found, found, "a")
    assert same(got) == same(want) and got.compute()["mask_ap"] == pytest.approx(1)
    with pytest.raises(ScoreError, match=r"sample 'b': the prediction has masks \[2, 13, 16\]"):
        got.update_instances(
            Instances(boxes, masks[..., 1:], found.scores, found.labels), found, "b"
        )


@pytest.mark.parametrize("make", [Semantic, Boundary, Binary, Calibration, Panoptic])
def test_classes_that_are_none(make):
    for classes in (0, (), "road", True, None):
        with pytest.raises(ValueError, match="classes"):
            make(classes)


def test_samples_of_arrays():
    """A plugin's data set may hold its labels as arrays."""
    labels = np.array([[0, 1], [1, 255]])
    metric = Semantic(2)
    prediction = Segmentation((2, 2), ("a", "b")).with_labels(labels)
    metric.update(prediction, Sample("a", torch.zeros(3, 2, 2).byte(), labels))
    assert metric.compute()["miou"] == 1
