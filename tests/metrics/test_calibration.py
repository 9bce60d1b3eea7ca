import math

import numpy as np
import pytest
import torch

from pyseg.errors import LabelError, ScoreError
from pyseg.metrics.calibration import Calibration
from pyseg.types import Metric, Sample, Segmentation

NAMES = ("road", "sky", "tree", "car")


def pair(logits, target, name="a", classes=NAMES):
    logits, target = torch.as_tensor(logits, dtype=torch.float32), torch.as_tensor(target)
    size = tuple(target.shape)
    return (
        Segmentation(size, classes, logits=logits),
        Sample(name, torch.zeros(3, *size, dtype=torch.uint8), target.to(torch.uint8)),
    )


def random_images(count=3, seed=0, size=(17, 29)):
    generator = np.random.default_rng(seed)
    for index in range(count):
        target = generator.integers(0, 4, size)
        logits = generator.normal(0, 1.5, (4, *size))
        logits += 2.0 * (np.arange(4)[:, None, None] == target)
        target[generator.random(size) < 0.1] = 255
        yield pair(logits, target, f"image {index}")


def flat(images):
    """Logits [P, C] and targets [P] of all pixels with ground truth."""
    rows, targets = [], []
    for prediction, sample in images:
        valid = sample.labels != 255
        rows.append(prediction.logits[:, valid].T)
        targets.append(sample.labels[valid].long())
    return torch.cat(rows), torch.cat(targets)


def computed(images, **options):
    metric = Calibration(NAMES, **options)
    for image in images:
        metric.update(*image)
    return metric.compute()


def test_it_is_a_metric():
    assert isinstance(Calibration(NAMES), Metric)


@pytest.mark.parametrize("bins", [15, 10, 1])
def test_against_the_definition_in_numpy(bins):
    images = list(random_images(seed=1))
    got = computed(images, bins=bins)
    logits, target = flat(images)
    p = logits.double().softmax(1).numpy()
    y = target.numpy()
    confidence, right = p.max(1), p.argmax(1) == y
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    ece, mce = 0.0, 0.0
    for k in range(bins):
        inside = index == k
        assert got["reliability"]["pixels"][k] == inside.sum()
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            ece += inside.mean() * gap
            mce = max(mce, gap)
            assert got["reliability"]["accuracy"][k] == pytest.approx(right[inside].mean())
            assert got["reliability"]["confidence"][k] == pytest.approx(
                confidence[inside].mean(), abs=1e-6
            )
        else:
            assert math.isnan(got["reliability"]["accuracy"][k])
    want = {
        "ece": ece,
        "mce": mce,
        "brier": ((p - np.eye(4)[y]) ** 2).sum(1).mean(),
        "nll": -np.log(p[np.arange(len(y)), y]).mean(),
        "pixel_accuracy": right.mean(),
        "confidence": confidence.mean(),
    }
    assert {key: got[key] for key in want} == pytest.approx(want, abs=2e-7)
    assert got["pixels"] == len(y)


def test_against_torchmetrics_and_scikit_learn():
    classification = pytest.importorskip("torchmetrics.classification")
    sklearn = pytest.importorskip("sklearn.metrics")
    images = list(random_images(seed=2))
    got = computed(images)
    logits, target = flat(images)
    for key, norm in (("ece", "l1"), ("mce", "max")):
        peer = classification.MulticlassCalibrationError(4, n_bins=15, norm=norm)
        assert got[key] == pytest.approx(float(peer(logits.softmax(1), target)), abs=1e-5)
    p = logits.double().softmax(1).numpy()
    assert got["nll"] == pytest.approx(sklearn.log_loss(target, p, labels=range(4)), abs=1e-6)
    assert got["nll"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits.double(), target)), abs=1e-6
    )
    try:
        brier = sklearn.brier_score_loss(target, p, labels=range(4), scale_by_half=False)
    except TypeError:
        pytest.skip("this scikit-learn has no Brier score of several classes")
    assert got["brier"] == pytest.approx(brier, abs=1e-6)


def test_calibrated_predictions_have_little_error_and_overconfident_ones_much():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 300, 300, generator=generator)
    p = logits.softmax(0).reshape(4, -1).T
    target = torch.multinomial(p, 1, generator=generator).reshape(300, 300)  # drawn from p itself
    honest, bold = computed([pair(logits, target)]), computed([pair(4 * logits, target)])
    assert honest["ece"] < 0.01 < 0.2 < bold["ece"]
    assert honest["nll"] < bold["nll"] and honest["brier"] < bold["brier"]
    assert honest["pixel_accuracy"] == bold["pixel_accuracy"]


def test_a_perfect_and_certain_prediction():
    target = torch.randint(0, 4, (6, 7), generator=torch.Generator().manual_seed(4))
    logits = 200.0 * (torch.arange(4)[:, None, None] == target)
    got = computed([pair(logits, target)])
    assert got["ece"] == got["mce"] == got["brier"] == got["nll"] == 0
    assert got["pixel_accuracy"] == got["confidence"] == 1


def test_improbable_targets():
    logits = torch.tensor([[[0.0]], [[200.0]], [[0.0]], [[0.0]]])  # exp(-200) is 0 in float32
    assert computed([pair(logits, [[0]])])["nll"] == pytest.approx(200)
    logits[0] = -torch.inf
    assert computed([pair(logits, [[0]])])["nll"] == math.inf
    assert computed([pair(logits, [[0]])])["brier"] == pytest.approx(2)
    logits[0] = -1e30
    assert computed([pair(logits, [[0]])])["nll"] == math.inf  # from 65536 nats on


def test_ignored_pixels_never_matter():
    prediction, sample = next(random_images(1, seed=11))
    logits = prediction.logits.clone()
    logits[:, sample.labels == 255] += 3.0
    logits[0, sample.labels == 255] += 30.0
    assert str(computed([pair(logits, sample.labels)])) == str(computed([(prediction, sample)]))


@pytest.mark.parametrize("seed", range(4))
def test_order_and_splitting_change_no_bit(seed):
    generator = np.random.default_rng(seed)
    images = list(random_images(8, seed=seed))
    parts = [Calibration(NAMES) for _ in range(3)]
    for index in generator.permutation(8):
        parts[generator.integers(3)].update(*images[index])
    merged = Calibration(NAMES)
    states = [parts[k].state() for k in generator.permutation(3)]
    merged.load_state({key: sum(state[key] for state in states) for key in states[0]})
    assert str(merged.compute()) == str(computed(images))
    assert all(value.dtype == torch.int64 for value in merged.state().values())


def test_nothing_to_score_is_nan():
    got = computed([pair(torch.zeros(4, 1, 2), [[255, 255]])])
    assert all(math.isnan(got[key]) for key in ("ece", "mce", "brier", "nll", "confidence"))
    assert got["pixels"] == 0


def test_bad_input():
    for options in ({"bins": 0}, {"bins": 2000}):
        with pytest.raises(ValueError, match="bins"):
            Calibration(NAMES, **options)
    with pytest.raises(ValueError, match="classes"):
        Calibration("road")
    metric = Calibration(NAMES)
    prediction, sample = pair(torch.zeros(4, 1, 2), [[0, 1]])
    with pytest.raises(ScoreError, match=r"'a'.*NaN"):
        metric.update(*pair(torch.full((4, 1, 2), torch.nan), [[0, 1]]))
    with pytest.raises(ScoreError, match="without logits"):
        metric.update(prediction.with_labels(sample.labels), sample)
    with pytest.raises(ScoreError, match="3 classes, the metric 4"):
        metric.update(*pair(torch.zeros(3, 1, 2), [[0, 1]], classes=NAMES[:3]))
    with pytest.raises(LabelError, match=r"'a'.*\[4, 9\]"):
        metric.update(*pair(torch.zeros(4, 1, 2), [[4, 9]]))
    with pytest.raises(ValueError, match="pixels"):
        metric.load_state(Calibration(NAMES, bins=3).state())
    full = {**metric.state(), "pixels": torch.full((15,), 2**31)}
    metric.load_state(full)
    with pytest.raises(ScoreError, match="4294967296 pixels"):
        metric.compute()
