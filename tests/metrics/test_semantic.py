import math

import numpy as np
import pytest
import torch
from PIL import Image

from pyseg.errors import LabelError, ScoreError
from pyseg.metrics.boundary import Boundary
from pyseg.metrics.calibration import Calibration
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
        prediction = np.where(
            generator.random((17, 23)) < 0.6, target, generator.integers(0, classes, (17, 23))
        )
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


def test_against_scikit_learn():
    oracle = pytest.importorskip("sklearn.metrics")
    images = list(random_images(4, seed=11))
    metric = Semantic(NAMES)
    for prediction, target in images:
        metric.update(*pair(prediction, target))
    got = metric.compute()
    prediction = np.concatenate([p.ravel() for p, _ in images])
    target = np.concatenate([t.ravel() for _, t in images])
    prediction, target = prediction[target != 255], target[target != 255]
    options = {"labels": range(len(NAMES)), "average": None}  # 255 in the prediction is a miss
    want = {
        "iou": oracle.jaccard_score(target, prediction, **options),
        "precision": oracle.precision_score(target, prediction, **options),
        "recall": oracle.recall_score(target, prediction, **options),
        "f1": oracle.f1_score(target, prediction, **options),
    }
    for key, values in want.items():
        assert [got["per_class"][name][key] for name in NAMES] == pytest.approx(values, abs=1e-12)
    assert got["kappa"] == pytest.approx(oracle.cohen_kappa_score(target, prediction), abs=1e-12)
    assert got["pixel_accuracy"] == pytest.approx(oracle.accuracy_score(target, prediction))


def cityscapes_scores(pairs, directory):
    """What cityscapesscripts' own script gives for maps of Cityscapes ids: name -> IoU, mean."""
    script = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    script.args.evalInstLevelScore = False
    matrix = script.generateMatrix(script.args)
    for prediction, target in pairs:
        files = directory / "prediction.png", directory / "target.png"
        for file, labels in zip(files, (prediction, target), strict=True):
            Image.fromarray(labels.astype(np.uint8)).save(file)
        script.evaluatePair(*map(str, files), matrix, {}, {}, script.args)
    scores = {
        script.id2label[k].name: script.getIouScoreForLabel(k, matrix, script.args)
        for k in script.args.evalLabels
    }
    return scores, script.getScoreAverage(scores, script.args)


def test_against_cityscapesscripts(tmp_path):
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    train_id = np.full(256, 255)
    for label in labels:
        if label.id >= 0 and not label.ignoreInEval:
            train_id[label.id] = label.trainId
    names = [
        label.name
        for label in sorted(labels, key=lambda label: label.trainId)
        if not label.ignoreInEval
    ]
    generator = np.random.default_rng(21)
    pairs = []
    for _ in range(3):
        target = generator.integers(0, 34, (31, 57))
        target[target == 31] = 7  # one class of the 19 is in no ground truth
        prediction = np.where(
            generator.random((31, 57)) < 0.7, target, generator.integers(0, 34, (31, 57))
        )
        prediction[prediction == 17] = 0  # and one in no prediction
        pairs.append((prediction, target))
    want, mean = cityscapes_scores(pairs, tmp_path)
    metric = Semantic(names)
    for prediction, target in pairs:
        metric.update(*pair(train_id[prediction], train_id[target], names))
    got = metric.compute()
    assert len(names) == 19
    for name in names:
        assert got["per_class"][name]["iou"] == pytest.approx(want[name], abs=1e-12), name
    assert got["miou"] == pytest.approx(mean, abs=1e-12)


def test_real_maps_against_peers(data_folder):
    """CamVid's labels, and the same moved by some pixels, against scikit-learn and torchmetrics."""
    sklearn = pytest.importorskip("sklearn.metrics")
    classification = pytest.importorskip("torchmetrics.classification")
    folder = data_folder("camvid/val/labels")
    metric = Semantic(num_classes=11, ignore_index=11)
    peer = classification.MulticlassJaccardIndex(11, average="none", ignore_index=11)
    kappa = classification.MulticlassCohenKappa(11, ignore_index=11)
    flat = []
    for file in sorted(folder.iterdir())[:40:10]:
        target = np.array(Image.open(file)).astype(np.int64)
        prediction = np.roll(target, (3, 5), (0, 1))
        prediction[prediction == 11] = 1
        metric.update(*pair(prediction, target, metric.classes))
        peer.update(torch.from_numpy(prediction), torch.from_numpy(target))
        kappa.update(torch.from_numpy(prediction), torch.from_numpy(target))
        flat.append((prediction[target != 11], target[target != 11]))
    got = metric.compute()
    assert 0.3 < got["miou"] < 0.95
    iou = [entry["iou"] for entry in got["per_class"].values()]
    prediction, target = (np.concatenate(part) for part in zip(*flat, strict=True))
    want = sklearn.jaccard_score(target, prediction, labels=range(11), average=None)
    present = ~np.isnan(iou)
    assert present.sum() >= 9
    assert np.array(iou)[present] == pytest.approx(want[present], abs=1e-12)
    assert np.array(iou)[present] == pytest.approx(peer.compute().numpy()[present], abs=1e-6)
    assert got["kappa"] == pytest.approx(sklearn.cohen_kappa_score(target, prediction), abs=1e-12)
    assert got["kappa"] == pytest.approx(float(kappa.compute()), abs=1e-5)


def test_reduce_zero_label():
    prediction = [[0, 1, 2, 2], [1, 0, 0, 4]]
    raw = [[1, 2, 3, 1], [0, 0, 255, 5]]
    metric = Semantic(NAMES, reduce_zero_label=True)
    metric.update(*pair(prediction, raw))
    want = scored(prediction, [[0, 1, 2, 0], [255, 255, 255, 4]])
    assert str(metric.compute()) == str(want)  # as text, since nan is not equal to nan
    for dtype in (torch.int16, torch.int64):
        other = Semantic(NAMES, reduce_zero_label=True)
        segmentation, sample = pair(prediction, raw)
        other.update(segmentation, Sample("a", sample.image, torch.tensor(raw, dtype=dtype)))
        assert str(other.compute()) == str(want)
    with pytest.raises(LabelError, match="5"):  # a 6 is class 5, which five classes do not have
        metric.update(*pair(prediction, [[6] * 4] * 2))


def test_subset_restricts_means_only():
    images = list(random_images(2, seed=3))
    whole, part = Semantic(NAMES), Semantic(NAMES, subset=("sky", 3))
    for image in images:
        whole.update(*pair(*image))
        part.update(*pair(*image))
    want, got = whole.compute(), part.compute()
    assert got["per_class"] == want["per_class"]
    for key, column in (("miou", "iou"), ("mean_accuracy", "recall"), ("f1", "f1")):
        chosen = [want["per_class"][name][column] for name in ("sky", "car")]
        assert got[key] == pytest.approx(sum(chosen) / 2)
    for key in ("pixel_accuracy", "fwiou", "kappa", "void"):
        assert got[key] == want[key]
    assert got["classes_counted"] == 2
    part = Semantic(NAMES, subset=["road", "pole"])
    part.update(*pair([[0, 1]], [[0, 1]]))
    assert part.compute()["classes_absent"] == ["pole"] and part.compute()["miou"] == 1
    for subset in ("sky", [], ["lake"], [5], [-1], [True], 3):
        with pytest.raises(ValueError, match="subset"):
            Semantic(NAMES, subset=subset)


def test_a_perfect_prediction_scores_one():
    _, target = next(random_images(1, seed=8))
    got = scored(np.where(target == 255, 3, target), target)
    for key in (
        "miou",
        "pixel_accuracy",
        "mean_accuracy",
        "precision",
        "recall",
        "f1",
        "fwiou",
        "kappa",
    ):
        assert got[key] == 1, key
    assert math.isnan(scored([[1, 1]], [[1, 1]])["kappa"])  # one class: chance is right too


def test_ignored_pixels_never_matter():
    prediction, target = next(random_images(1, seed=13))
    want = scored(prediction, target)
    other = np.where(
        target == 255, np.random.default_rng(1).integers(0, 5, target.shape), prediction
    )
    assert (other != prediction).any()
    assert scored(other, target) == want


@pytest.mark.parametrize("seed", range(3))
def test_order_and_splitting_change_no_bit(seed):
    generator = np.random.default_rng(seed)
    images = [pair(*image) for image in random_images(9, seed=seed)]
    whole = Semantic(NAMES)
    for image in images:
        whole.update(*image)
    parts = [Semantic(NAMES) for _ in range(4)]
    for index in generator.permutation(len(images)):
        parts[generator.integers(4)].update(*images[index])
    merged = Semantic(NAMES)
    states = [parts[k].state() for k in generator.permutation(4)]
    merged.load_state({key: sum(state[key] for state in states) for key in states[0]})
    assert merged.compute() == whole.compute()


def test_nan_logits_are_an_error():
    logits = torch.zeros(5, 2, 2)
    logits[1, 0, 0] = torch.nan
    sample = Sample("b", torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4).byte())
    metric = Semantic(NAMES)
    with pytest.raises(ScoreError, match=r"'b'.*NaN"):
        metric.update(Segmentation((4, 4), NAMES, logits=logits), sample)
    metric.load_state({**metric.state(), "invalid": torch.tensor([0, 0, 2])})
    with pytest.raises(ScoreError, match=r"2 predictions.*NaN"):
        metric.compute()


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
    with pytest.raises(ValueError, match="state 'matrix' must be"):
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
    with pytest.raises(LabelError, match=r"'a'.*float32.*integers"):
        metric.update(prediction, Sample("a", sample.image, torch.zeros(3, 4)))
    negative = Sample("a", sample.image, torch.full((3, 4), -1, dtype=torch.int16))
    with pytest.raises(LabelError, match=r"'a'.*-1"):
        metric.update(prediction, negative)
    assert metric.state()["matrix"].sum() == 0
    for options in (
        {},
        {"classes": ()},
        {"num_classes": 0},
        {"classes": "road"},
        {"classes": NAMES, "num_classes": 4},
    ):
        with pytest.raises(ValueError, match="classes"):
            Semantic(**options)


def test_more_than_255_classes():
    """255 is then a class, so it cannot be void: every class counts, or it is said."""
    for metric in (Semantic, Boundary, Calibration):
        with pytest.raises(ValueError, match=r"255 is one of the 256 classes.*ignore_index=-1"):
            metric([f"class {k}" for k in range(256)])
        metric([f"class {k}" for k in range(255)])
    rng = np.random.default_rng(0)
    target, prediction = (rng.integers(-1, 300, (200, 300)) for _ in range(2))
    prediction = np.where(rng.random(target.shape) < 0.5, target, prediction)
    metric = Semantic(num_classes=300, ignore_index=-1)
    sample = Sample("a", torch.zeros(3, 200, 300, dtype=torch.uint8), torch.from_numpy(target))
    metric.update(
        Segmentation((200, 300), metric.classes, _labels=torch.from_numpy(prediction).short()),
        sample,
    )
    per_class = metric.compute()["per_class"]
    valid = target >= 0
    for k in (0, 44, 254, 255, 256, 299):
        ours, theirs = (prediction == k) & valid, target == k
        expected = (ours & theirs).sum() / (ours | theirs).sum()
        assert per_class[f"class {k}"]["iou"] == pytest.approx(expected, abs=1e-12)


def test_labels_that_the_device_counted_as_invalid_are_reported():
    metric = Semantic(NAMES)
    state = metric.state()
    metric.load_state({**state, "invalid": torch.tensor([0, 7, 0])})
    with pytest.raises(LabelError, match="7 target pixels"):
        metric.compute()


@pytest.mark.parametrize("options", [{}, {"reduce_zero_label": True}, {"ignore_index": 2}])
def test_logits_are_scored_like_their_labels(options):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 6, 7, generator=generator)
    target = torch.randint(0, 5, (40, 50), generator=generator).to(torch.uint8)
    sample = Sample("a", torch.zeros(3, 40, 50, dtype=torch.uint8), target)
    prediction = Segmentation((40, 50), NAMES, logits=logits)
    metric, expected = Semantic(NAMES, **options), Semantic(NAMES, **options)
    metric.update(prediction, sample)
    assert prediction._labels is None  # it did without
    expected.update(prediction.with_labels(prediction.labels), sample)
    for name, value in expected.state().items():
        assert torch.equal(metric.state()[name], value), name
    assert metric.state()["matrix"].sum() > 0
