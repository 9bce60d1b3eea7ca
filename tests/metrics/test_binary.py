import math

import numpy as np
import pytest
import torch

from pyseg.errors import LabelError, ScoreError
from pyseg.metrics.binary import Binary
from pyseg.types import Metric, Sample, Segmentation

NAMES = ("background", "cell")


def pair(logits, target, name="a", classes=NAMES):
    logits, target = torch.as_tensor(logits, dtype=torch.float32), torch.as_tensor(target)
    size = tuple(target.shape)
    return (
        Segmentation(size, classes, logits=logits),
        Sample(name, torch.zeros(3, *size, dtype=torch.uint8), target.to(torch.uint8)),
    )


def from_scores(scores, target, name="a"):
    """Logits whose softmax gives these scores to the second class."""
    scores = torch.as_tensor(scores, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    logits = torch.stack([torch.zeros_like(scores), (scores / (1 - scores)).log()])
    return pair(logits, target, name)


def random_images(count=3, seed=0, scale=2.0, size=(19, 27)):
    generator = np.random.default_rng(seed)
    for index in range(count):
        target = (generator.random(size) < 0.3).astype(np.int64)
        logits = generator.normal(0, scale, (2, *size))
        logits[1] += 1.5 * target
        target[generator.random(size) < 0.1] = 255
        yield pair(logits, target, f"image {index}")


def scores_of(image):
    prediction, sample = image
    valid = sample.labels != 255
    return prediction.probabilities()[1][valid].numpy(), sample.labels[valid].numpy()


def odds_of(image):
    prediction, sample = image
    valid = sample.labels != 255
    return (prediction.logits[1] - prediction.logits[0])[valid].numpy()


def computed(images, **options):
    metric = Binary(NAMES, **options)
    for image in images:
        metric.update(*image)
    return metric.compute()


def test_it_is_a_metric():
    assert isinstance(Binary(NAMES), Metric)


@pytest.mark.parametrize("threshold", [0.5, 0.3, 0.9])
def test_at_a_threshold_against_scikit_learn(threshold):
    oracle = pytest.importorskip("sklearn.metrics")
    images = list(random_images(seed=3))
    got = computed(images, threshold=threshold)
    scores, truth = (np.concatenate(part) for part in zip(*map(scores_of, images), strict=True))
    said = scores >= np.float32(threshold)
    want = {
        "iou": oracle.jaccard_score(truth, said),
        "f1": oracle.f1_score(truth, said),
        "precision": oracle.precision_score(truth, said),
        "recall": oracle.recall_score(truth, said),
        "specificity": oracle.recall_score(truth, said, pos_label=0),
        "pixel_accuracy": oracle.accuracy_score(truth, said),
    }
    assert {key: got[key] for key in want} == pytest.approx(want, abs=1e-12)
    assert got["pixels"] == len(truth) and got["positives"] == truth.sum()


@pytest.mark.parametrize(("bins", "scale"), [(8192, 2.0), (64, 2.0), (8192, 20.0)])
def test_areas_against_scikit_learn(bins, scale):
    """Exactly those of the log-odds rounded down to bins, and near those of the log-odds."""
    oracle = pytest.importorskip("sklearn.metrics")
    images = list(random_images(seed=5, scale=scale))
    got = computed(images, bins=bins)
    odds = np.concatenate([odds_of(image) for image in images])
    truth = np.concatenate([scores_of(image)[1] for image in images])
    binned = np.clip(np.floor(odds.astype(np.float64) * bins / 64), -bins // 2, bins // 2 - 1)
    assert got["roc_auc"] == pytest.approx(oracle.roc_auc_score(truth, binned), abs=1e-12)
    assert got["average_precision"] == pytest.approx(
        oracle.average_precision_score(truth, binned), abs=1e-12
    )
    exact = oracle.roc_auc_score(truth, odds)
    same = sum(
        (binned[truth == 1] == k).sum() * (binned[truth == 0] == k).sum() for k in np.unique(binned)
    )
    bound = same / (truth == 1).sum() / (truth == 0).sum() / 2  # as the docstring says
    assert abs(got["roc_auc"] - exact) <= bound
    assert bound < {64: 0.1, 8192: 0.02}[bins]


def test_curves_against_torchmetrics():
    classification = pytest.importorskip("torchmetrics.classification")
    images = list(random_images(seed=7))
    metric = Binary(NAMES, bins=64)
    for image in images:
        metric.update(*image)
    scores, truth = (np.concatenate(part) for part in zip(*map(scores_of, images), strict=True))
    edges = torch.arange(-32, 33, dtype=torch.float64).sigmoid().tolist()
    edges[0], edges[-1] = 0.0, 1.0
    scores, truth = torch.from_numpy(scores), torch.from_numpy(truth.astype(np.int64))
    roc = classification.BinaryROC(thresholds=edges)
    pr = classification.BinaryPrecisionRecallCurve(thresholds=edges)
    rate, recall, _ = roc(scores, truth)
    precision, _, _ = pr(scores, truth)
    curves = metric.curves()
    assert curves.recall.flip(0).numpy() == pytest.approx(recall.numpy(), abs=1e-6)
    assert curves.false_positive_rate.flip(0).numpy() == pytest.approx(rate.numpy(), abs=1e-6)
    some = ~curves.precision.isnan()
    assert some.sum() > 30
    assert curves.precision[some].numpy() == pytest.approx(precision[:65][some].numpy(), abs=1e-6)
    shown = metric.compute()["curves"]
    assert shown["thresholds"] == edges and shown["recall"] == curves.recall.tolist()


def test_best_threshold_by_brute_force():
    images = list(random_images(seed=9))
    got = computed(images, bins=64)
    tried = {}
    for k in range(-12, 13):
        threshold = 1 / (1 + math.exp(-k))
        iou = computed(images, threshold=threshold)["iou"]
        tried[threshold] = -1 if math.isnan(iou) else iou
    best = max(tried, key=tried.get)
    assert got["best_threshold"] == pytest.approx(best)
    assert got["best_iou"] == pytest.approx(tried[best])
    assert 0.01 < best < 0.99


def test_bin_edges_belong_to_the_bin_above_and_ends_are_closed():
    odds = [-40.0, -31.5, -1.0, -0.5, -1e-6, 0.0, 0.5, 31.0, 32.0, math.inf]
    logits = torch.stack([torch.zeros(1, len(odds)), torch.tensor([odds])])
    metric = Binary(NAMES, bins=128)
    metric.update(*pair(logits, [[1] * len(odds)]))
    counts = metric.state()["histogram"][1]
    found = {int(k): int(counts[k]) for k in counts.nonzero()}
    assert found == {0: 1, 1: 1, 62: 1, 63: 2, 64: 1, 65: 1, 126: 1, 127: 2}


def test_other_classes_are_the_background():
    names = ("road", "car", "sky")
    logits = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    target = torch.randint(0, 3, (5, 6), generator=torch.Generator().manual_seed(1))
    results = []
    for positive in ("car", 1):
        metric = Binary(names, positive=positive, threshold=0.4)
        metric.update(*pair(logits, target, classes=names))
        results.append(metric.compute())
    said, truth = logits.softmax(0)[1] >= 0.4, target == 1
    assert str(results[0]) == str(results[1])
    assert results[0]["iou"] == int((said & truth).sum()) / int((said | truth).sum())


def test_logits_at_their_own_stride():
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2))
    target = torch.randint(0, 2, (16, 20), generator=torch.Generator().manual_seed(3))
    large = torch.nn.functional.interpolate(logits[None], (16, 20), mode="bilinear")[0]
    small = computed([pair(logits, target)])
    assert str(small) == str(computed([pair(large, target)]))


def test_a_perfect_prediction_scores_one():
    target = torch.randint(0, 2, (7, 9), generator=torch.Generator().manual_seed(4))
    got = computed([from_scores(target.double(), target)])
    for key in (
        "iou",
        "f1",
        "precision",
        "recall",
        "specificity",
        "roc_auc",
        "average_precision",
        "best_iou",
    ):
        assert got[key] == 1, key


def test_ignored_pixels_never_matter():
    prediction, sample = next(random_images(1, seed=11))
    logits = prediction.logits.clone()
    logits[:, sample.labels == 255] = 9.0 * torch.randn(2, int((sample.labels == 255).sum()))
    assert str(computed([pair(logits, sample.labels)])) == str(computed([(prediction, sample)]))


@pytest.mark.parametrize("seed", range(3))
def test_order_and_splitting_change_no_bit(seed):
    generator = np.random.default_rng(seed)
    images = list(random_images(8, seed=seed))
    parts = [Binary(NAMES) for _ in range(3)]
    for index in generator.permutation(8):
        parts[generator.integers(3)].update(*images[index])
    merged = Binary(NAMES)
    states = [parts[k].state() for k in generator.permutation(3)]
    merged.load_state({key: sum(state[key] for state in states) for key in states[0]})
    assert str(merged.compute()) == str(computed(images))
    assert all(value.dtype == torch.int64 for value in merged.state().values())


def test_nothing_to_score_is_nan():
    empty = Binary(NAMES).compute()
    assert math.isnan(empty["iou"]) and math.isnan(empty["roc_auc"]) and empty["pixels"] == 0
    only_background = computed([from_scores([[0.2, 0.9]], [[0, 0]])])
    assert math.isnan(only_background["recall"]) and math.isnan(only_background["roc_auc"])
    assert math.isnan(only_background["best_iou"])
    assert only_background["specificity"] == 0.5 and only_background["iou"] == 0


def test_bad_input():
    for options, message in (
        ({"threshold": 1.5}, "threshold"),
        ({"bins": 1000}, "power of two"),
        ({"positive": "sky"}, "positive"),
        ({"positive": 2}, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            Binary(NAMES, **options)
    with pytest.raises(ValueError, match="two classes"):
        Binary(("cell",))
    metric = Binary(NAMES)
    prediction, sample = pair(torch.zeros(2, 2, 2), [[0, 1], [1, 0]])
    with pytest.raises(LabelError, match=r"'a'.*\[7\]"):
        metric.update(*pair(torch.zeros(2, 1, 2), [[0, 7]]))
    with pytest.raises(LabelError, match="no labels"):
        metric.update(prediction, Sample("a", sample.image))
    with pytest.raises(LabelError, match="integers"):
        metric.update(prediction, Sample("a", sample.image, torch.zeros(2, 2)))
    with pytest.raises(LabelError, match=r"\[3, 2\]"):
        metric.update(prediction, Sample("a", sample.image, torch.zeros(3, 2).byte()))
    with pytest.raises(ScoreError, match="without logits"):
        metric.update(prediction.with_labels(sample.labels), sample)
    with pytest.raises(ScoreError, match="NaN"):
        metric.update(*pair(torch.full((2, 1, 2), torch.nan), [[0, 1]]))
    assert metric.state()["counts"].sum() == 0
    with pytest.raises(ValueError, match="histogram"):
        metric.load_state(Binary(NAMES, bins=64).state())
    metric.load_state({**metric.state(), "invalid": torch.tensor([0, 4, 0])})
    with pytest.raises(LabelError, match="4 target pixels"):
        metric.compute()
