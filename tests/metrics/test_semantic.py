import math

import numpy as np
import pytest
import torch

from pyseg.errors import LabelError
from pyseg.metrics.semantic import Semantic
from pyseg.types import Metric, Sample, Segmentation

NAMES = ("road", "sky", "tree", "car", "pole")


def pair(prediction, target, names=NAMES):
    prediction, target = torch.as_tensor(prediction), torch.as_tensor(target)
    return (
        Segmentation(tuple(prediction.shape), names, _labels=prediction.to(torch.uint8)),
        Sample("a", torch.zeros(3, *target.shape, dtype=torch.uint8), target.to(torch.uint8)),
    )


def scored(prediction, target, names=NAMES):
    metric = Semantic(names)
    metric.update(*pair(prediction, target, names))
    return metric.compute()


def random_images(count=3, classes=5, void=True, seed=0):
    generator = np.random.default_rng(seed)
    for _ in range(count):
        target = generator.integers(0, classes, (17, 23))
        prediction = np.where(generator.random((17, 23)) < 0.6, target,
                              generator.integers(0, classes, (17, 23)))  # fmt: skip
        if void:
            target[generator.random((17, 23)) < 0.1] = 255
            prediction[generator.random((17, 23)) < 0.05] = 255
        yield prediction, target


def test_it_is_a_metric():
    assert isinstance(Semantic(NAMES), Metric)


@pytest.mark.parametrize("seed", range(4))
def test_against_sets_of_pixels(seed):
    """Every score from its definition on sets of pixel positions, without a matrix."""
    images = list(random_images(seed=seed))
    metric = Semantic(NAMES)
    for prediction, target in images:
        metric.update(*pair(prediction, target))
    got = metric.compute()

    predictions = np.stack([p for p, _ in images])
    targets = np.stack([t for _, t in images])
    valid = set(zip(*np.nonzero(targets != 255), strict=True))
    iou, precision, recall, f1, share = [], [], [], [], []
    hits = 0
    for k in range(len(NAMES)):
        truth = set(zip(*np.nonzero(targets == k), strict=True))
        said = set(zip(*np.nonzero(predictions == k), strict=True)) & valid
        both = len(truth & said)
        hits += both
        iou.append(both / len(truth | said))
        precision.append(both / len(said))
        recall.append(both / len(truth))
        f1.append(2 * precision[-1] * recall[-1] / (precision[-1] + recall[-1]))
        share.append(len(truth) / len(valid))
        entry = got["per_class"][NAMES[k]]
        want = [iou[-1], precision[-1], recall[-1], f1[-1], len(truth)]
        assert [entry[key] for key in ("iou", "precision", "recall", "f1", "pixels")] == (
            pytest.approx(want)
        )
    void = {place for place in valid if predictions[place] == 255}
    want = {
        "miou": np.mean(iou),
        "pixel_accuracy": hits / len(valid),
        "mean_accuracy": np.mean(recall),
        "precision": np.mean(precision),
        "recall": np.mean(recall),
        "f1": np.mean(f1),
        "fwiou": np.dot(share, iou),
        "void": len(void) / len(valid),
    }
    assert void
    assert {key: got[key] for key in want} == pytest.approx(want)
    assert got["classes_counted"] == 5 and got["classes_absent"] == []


def test_against_torchmetrics():
    classification = pytest.importorskip("torchmetrics.classification")
    options = {"num_classes": 5, "average": "macro", "ignore_index": 255}
    oracles = {
        "miou": classification.MulticlassJaccardIndex(**options),
        "mean_accuracy": classification.MulticlassAccuracy(**options),
        "precision": classification.MulticlassPrecision(**options),
        "recall": classification.MulticlassRecall(**options),
        "f1": classification.MulticlassF1Score(**options),
        "pixel_accuracy": classification.MulticlassAccuracy(**{**options, "average": "micro"}),
    }
    metric = Semantic(NAMES)
    for prediction, target in random_images(seed=9):
        # torchmetrics knows no void prediction, so there is none here.
        prediction = np.where(prediction == 255, 0, prediction)
        metric.update(*pair(prediction, target))
        for oracle in oracles.values():
            oracle.update(torch.from_numpy(prediction), torch.from_numpy(target))
    got = metric.compute()
    for name, oracle in oracles.items():
        assert got[name] == pytest.approx(float(oracle.compute()), abs=1e-6), name


def test_by_hand():
    # target     prediction
    # 0 0 1 1    0 1 1 void
    # 1 v 2 2    1 2 2 0
    got = scored([[0, 1, 1, 255], [1, 2, 2, 0]], [[0, 0, 1, 1], [1, 255, 2, 2]])
    classes = got["per_class"]
    assert classes["road"]["iou"] == pytest.approx(1 / 3)
    assert classes["sky"]["iou"] == pytest.approx(2 / 4)  # the void pixel is a miss
    assert classes["sky"]["precision"] == pytest.approx(2 / 3)  # and nobody's false positive
    assert classes["tree"]["iou"] == pytest.approx(1 / 2)
    assert got["pixel_accuracy"] == pytest.approx(4 / 7)
    assert got["void"] == pytest.approx(1 / 7)
    assert got["miou"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert got["classes_counted"] == 3 and got["classes_absent"] == ["car", "pole"]
    assert math.isnan(classes["car"]["iou"]) and math.isnan(classes["pole"]["recall"])


def test_predicting_void_everywhere_is_no_way_to_score():
    got = scored(np.full((4, 4), 255), np.zeros((4, 4)))
    assert got["miou"] == got["pixel_accuracy"] == got["precision"] == got["f1"] == 0
    assert got["void"] == 1


def test_classes_that_occur_on_one_side_only():
    got = scored([[0, 0, 2]], [[0, 1, 0]])["per_class"]
    assert got["sky"]["precision"] == got["sky"]["recall"] == got["sky"]["f1"] == 0
    assert got["tree"]["iou"] == got["tree"]["precision"] == 0
    assert math.isnan(got["tree"]["recall"])
    assert math.isnan(got["car"]["precision"])


def test_nothing_to_score_is_nan():
    got = scored(np.zeros((2, 2)), np.full((2, 2), 255))
    for name in ("miou", "pixel_accuracy", "f1", "fwiou", "mean_accuracy", "void"):
        assert math.isnan(got[name]), name
    assert got["classes_counted"] == 0 and got["classes_absent"] == list(NAMES)
    assert math.isnan(Semantic(num_classes=2).compute()["miou"])


def test_states_add_up():
    parts = [Semantic(NAMES) for _ in range(3)]
    whole = Semantic(NAMES)
    for part, image in zip(parts, random_images(3, seed=5), strict=True):
        part.update(*pair(*image))
        whole.update(*pair(*image))
    merged = Semantic(NAMES)
    merged.load_state({key: sum(part.state()[key] for part in parts) for key in whole.state()})
    assert merged.compute() == whole.compute()
    assert all(value.dtype == torch.int64 for value in merged.state().values())
    merged.update(*pair(*next(random_images(1, seed=6))))
    assert merged.compute() != whole.compute()
    with pytest.raises(ValueError, match="5 classes"):
        merged.load_state(Semantic(num_classes=4).state())
    merged.reset()
    assert merged.state()["matrix"].sum() == 0


def test_bad_input():
    metric = Semantic(NAMES)
    prediction, sample = pair(np.zeros((3, 4)), np.zeros((3, 4)))
    with pytest.raises(LabelError, match="no labels"):
        metric.update(prediction, Sample("x", sample.image))
    with pytest.raises(LabelError, match=r"'a'.*\[4, 3\]"):
        metric.update(prediction, pair(np.zeros((4, 3)), np.zeros((4, 3)))[1])
    with pytest.raises(LabelError, match=r"'a'.*34"):
        metric.update(prediction, pair(np.zeros((3, 4)), np.full((3, 4), 34))[1])
    assert metric.state()["matrix"].sum() == 0
    for options in ({}, {"classes": ()}, {"num_classes": 0}, {"classes": "road"},
                    {"classes": NAMES, "num_classes": 4}):  # fmt: skip
        with pytest.raises(ValueError, match="classes"):
            Semantic(**options)


def test_labels_that_the_device_counted_as_invalid_are_reported():
    metric = Semantic(NAMES)
    state = metric.state()
    metric.load_state({**state, "invalid": torch.tensor([0, 7])})
    with pytest.raises(LabelError, match="7 target pixels"):
        metric.compute()
