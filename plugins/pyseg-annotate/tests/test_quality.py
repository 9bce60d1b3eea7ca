"""Features by hand, predictions held against the truth, splits without leaks."""

import dataclasses

import numpy as np
import pytest
from pyseg_annotate.annotators import SimulatedWorkers, Submission
from pyseg_annotate.quality import (
    GROUPS,
    NAMES,
    QualityPredictor,
    ablate,
    features,
    jaccard,
    judge,
    split,
)

from pyseg.errors import LabelError, PysegError, SpecError


def of(task, mask, **more):
    return dict(zip(NAMES, features(task, Submission(mask, "w", **more)), strict=True))


def test_geometry_by_hand(make_tasks):
    task = make_tasks(1)[0]
    mask = np.zeros(task.size, bool)
    mask[4:8, 3:11] = True  # 4 x 8
    mask[5, 5] = False
    found = of(task, mask, clicks=4, seconds=10.0)
    assert found["radius"] == pytest.approx(np.log(np.sqrt(31 / np.pi)))
    assert found["solidity"] == found["extent"] == pytest.approx(31 / 32)
    assert found["holes"] == pytest.approx(1 / 31)
    assert found["parts"] == 0 and found["largest"] == 1
    assert found["compactness"] == pytest.approx(4 * np.pi * 31 / (np.pi / 4 * 28) ** 2)
    assert found["hit"] == float(mask[task.point[1], task.point[0]])
    assert found["clicks"] == np.log(5) and found["pace"] == pytest.approx(np.log(2.5))
    square = np.zeros(task.size, bool)
    square[4:8, 4:8] = True
    assert of(task, square)["eccentricity"] == pytest.approx(0, abs=1e-6)
    assert 0.8 < of(task, mask)["eccentricity"] < 1
    two = square.copy()
    two[12:14, 12:14] = True
    assert of(task, two)["parts"] == np.log(2) and of(task, two)["largest"] == 16 / 20


def test_unknown_behaviour_and_empty_masks_are_not_numbers(make_tasks, predictor):
    task = make_tasks(1)[0]
    nothing = Submission(np.zeros(task.size, bool), "w")
    assert np.isnan(features(task, nothing)).all() and predictor.predict(task, nothing) == 0
    found = of(task, task.truth)
    assert all(np.isnan(found[name]) for name in GROUPS["behaviour"])
    assert not any(np.isnan(found[name]) for name in NAMES if name not in GROUPS["behaviour"])
    assert 0 <= predictor.predict(task, Submission(task.truth, "w")) <= 1
    for mask in (np.ones(task.size, bool), np.eye(*task.size, dtype=bool)):
        assert 0 <= predictor.predict(task, Submission(mask, "w")) <= 1
    with pytest.raises(LabelError, match="the size of its window"):
        features(task, Submission(np.ones((3, 3), bool), "w"))


def test_the_truth_is_not_looked_at(make_tasks, tmp_path):
    from pyseg_annotate.tasks import read_tasks, write_tasks

    task = make_tasks(1)[0]
    file = write_tasks(tmp_path / "objects.json", [task])
    text = file.read_text()
    file.write_text(text.replace('"truth"', '"other"'))
    (blind,) = read_tasks(file)
    assert blind.truth is None
    submission = SimulatedWorkers(5).annotate(task, [])
    np.testing.assert_array_equal(features(task, submission), features(blind, submission))


@pytest.mark.parametrize("regressor", ["ridge", "boosting"])
def test_quality_of_unseen_objects_and_workers(examples, regressor):
    train, test = split(examples, 0.4, 1)
    assert not {*examples.objects[train]} & {*examples.objects[test]}
    assert not {*examples.workers[train]} & {*examples.workers[test]}
    known, rest = examples.some(train), examples.some(test)
    found = QualityPredictor(known, regressor).predict_features(rest.features)
    assert found.min() >= 0 and found.max() <= 1
    result = judge(found, rest.jaccard, 0.8)
    mean = np.abs(known.jaccard.mean() - rest.jaccard).mean()
    assert result["r"] > 0.5 and result["mae"] < 0.75 * mean and result["calibration"] < 0.12
    assert result["accepted_jaccard"] > rest.jaccard.mean()


@pytest.mark.parametrize("regressor", ["ridge", "boosting"])
def test_what_no_example_has_is_no_obstacle(examples, regressor):
    """People of whom neither clicks nor time are known; and all that is left is unknown."""
    behaviour = [NAMES.index(name) for name in GROUPS["behaviour"]]
    rows = examples.features.copy()
    rows[:, behaviour] = np.nan
    unknown = dataclasses.replace(examples, features=rows)
    found = QualityPredictor(unknown, regressor).predict_features(rows)
    without = QualityPredictor(unknown, regressor, without=("behaviour",)).predict_features(rows)
    assert np.corrcoef(found, without)[0, 1] > 0.95 and np.ptp(found) > 0.1
    nothing = QualityPredictor(unknown, regressor, without=set(GROUPS) - {"behaviour"})
    assert np.ptp(nothing.predict_features(rows)) == 0


def test_ablation_leaves_out_what_it_says(examples):
    found = ablate(examples, regressors=["ridge"], share=0.4, seed=1)
    assert [*found] == ["ridge", *(f"ridge without {group}" for group in GROUPS)]
    train, test = split(examples, 0.4, 1)
    rest = examples.some(test)
    again = QualityPredictor(examples.some(train), "ridge", without=["geometry"], seed=1)
    result = judge(again.predict_features(rest.features), rest.jaccard, 0.83)
    assert found["ridge without geometry"] == result != found["ridge"]
    predictor = QualityPredictor(examples, "ridge", without=["behaviour"])
    changed = examples.features.copy()
    changed[:, [NAMES.index(name) for name in GROUPS["behaviour"]]] = 99
    np.testing.assert_array_equal(
        predictor.predict_features(changed), predictor.predict_features(examples.features)
    )


def test_judge_by_hand():
    predicted, known = np.array([0.9, 0.8, 0.2, 0.6]), np.array([0.8, 0.9, 0.4, 0.6])
    found = judge(predicted, known, 0.8)
    assert found["mae"] == pytest.approx(0.1) and found["accepted"] == 0.5
    assert found["accepted_jaccard"] == pytest.approx(0.85) and found["false_accepts"] == 0
    assert np.isnan(judge(predicted, known, 0.95)["accepted_jaccard"])
    assert np.isnan(judge(predicted * 0, known, 0.5)["r"])


def test_saved_and_loaded(examples, predictor, tmp_path):
    again = QualityPredictor.load(predictor.save(tmp_path / "quality.npz"))
    assert again.fingerprint == predictor.fingerprint
    np.testing.assert_array_equal(
        again.predict_features(examples.features), predictor.predict_features(examples.features)
    )
    other = QualityPredictor(examples, "ridge", without=["boundary"])
    assert other.fingerprint != predictor.fingerprint
    with pytest.raises(PysegError, match="does not exist"):
        QualityPredictor.load(tmp_path / "none.npz")
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(PysegError, match="cannot be read"):
        QualityPredictor.load(tmp_path / "damaged.npz")


def test_jaccard():
    a, b = np.array([[True, True, False]]), np.array([[False, True, True]])
    assert jaccard(a, b) == pytest.approx(1 / 3)
    assert jaccard(a & b & False, b & False) == 1


def test_what_is_refused(examples, make_tasks, tmp_path):
    with pytest.raises(SpecError, match="regressor must be one of"):
        QualityPredictor(examples, "forest")
    with pytest.raises(SpecError, match="without must be of"):
        QualityPredictor(examples, without=["colour"])
    with pytest.raises(SpecError, match="leaves no feature"):
        QualityPredictor(examples, without=[*GROUPS])
    with pytest.raises(PysegError, match="30 annotations at least, got 5"):
        QualityPredictor(examples.some(np.arange(5)))
    one = examples.some(examples.workers == examples.workers[0])
    with pytest.raises(PysegError, match="two workers at least, got 1"):
        split(one)
