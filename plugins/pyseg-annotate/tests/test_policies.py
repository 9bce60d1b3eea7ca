"""Policies by hand, and ICORD against its engine."""

import numpy as np
import pytest
from pyseg_annotate.annotators import Recorded
from pyseg_annotate.consensus import majority
from pyseg_annotate.engine import collect
from pyseg_annotate.policies import CONSENSUS, Offer, budgeted, curve, fixed, icord

from pyseg.errors import PysegError


def offers(table):
    """Masks of one row whose pixel k tells which annotation it is."""
    return {
        f"o{i}": Offer(np.eye(len(row), dtype=bool)[:, None], np.array(row))
        for i, row in enumerate(table)
    }


TABLE = [[0.9, 0.1, 0.1], [0.5, 0.84, 0.99], [0.7, 0.2, 0.6], [0.1, 0.7, 0.83]]


def which(bought):
    return [int(mask.argmax()) if mask.any() else None for mask in bought.masks.values()]


def test_icord_by_hand():
    found = icord(offers(TABLE), 0.83, 3)
    assert [*found.spent.values()] == [1, 2, 3, 3] and found.mean_spent == 9 / 4
    assert which(found) == [0, 1, 0, 2]
    crowd = icord(offers(TABLE), 0.83, 3, majority)
    assert which(crowd) == [0, 1, None, 2] and crowd.spent == found.spent


def test_icord_is_what_the_engine_comes_to(annotated, predictor, tmp_path):
    tasks, given = {}, {}
    for task, submission in annotated:
        tasks[task.id] = task
        given.setdefault(task.id, []).append(submission)
    found = collect(
        [*tasks.values()], Recorded(given), predictor, tmp_path, threshold=0.85, rounds=4
    )
    replayed = icord(
        {
            id: Offer(
                np.stack([s.mask for s in drawn]),
                np.array([predictor.predict(tasks[id], s) for s in drawn]),
            )
            for id, drawn in given.items()
        },
        0.85,
        4,
    )
    assert found.spent == replayed.spent and 1 < replayed.mean_spent < 4
    for id, record in found.chosen.items():
        assert np.array_equal(record.submission.mask, replayed.masks[id])


def test_budget_goes_to_the_doubtful():
    found = budgeted(offers(TABLE), 2.0, 3)  # 4 more: two crowds
    assert [*found.spent.values()] == [1, 3, 1, 3]
    assert which(found) == [0, None, 0, None]
    assert [*budgeted(offers(TABLE), 1.75, 3).spent.values()] == [1, 1, 1, 3]
    assert [*budgeted(offers(TABLE), 3, 3).spent.values()] == [3, 3, 3, 3]
    assert budgeted(offers(TABLE), 1, 3).mean_spent == 1
    with pytest.raises(PysegError, match="mean must be 1 or more"):
        budgeted(offers(TABLE), 0.9, 3)


def test_fixed_numbers_and_curves():
    assert which(fixed(offers(TABLE), 1)) == [0, 0, 0, 0]
    points = curve(lambda t: icord(offers(TABLE), t, 3), [0.0, 0.8, 1.0], lambda b: b.mean_spent)
    assert [point["annotations"] for point in points] == [1, 9 / 4, 3]
    with pytest.raises(PysegError, match="must be 1 to 3"):
        fixed(offers(TABLE), 4)
    with pytest.raises(PysegError, match="no object"):
        icord({}, 0.5, 1)


def test_consensus_of_crowds_beats_its_members(annotated):
    by = {}
    for task, submission in annotated:
        by.setdefault(task.id, (task.truth, []))[1].append(submission.mask)
    for name, consensus in CONSENSUS.items():
        one, all_ = [], []
        for truth, masks in by.values():
            one.append([(truth & m).sum() / (truth | m).sum() for m in masks])
            found = consensus(np.stack(masks[:3]))
            all_.append((truth & found).sum() / (truth | found).sum())
        assert np.mean(all_) > np.mean(one) + 0.02, name
