"""Simulated workers are what their description says."""

import numpy as np
import pytest
from pyseg_annotate.annotators import SimulatedWorkers, annotators_of, signed_distance
from pyseg_annotate.quality import jaccard
from pyseg_annotate.tasks import Task

from pyseg.errors import PysegError, SpecError


def test_what_is_drawn_depends_on_seed_worker_and_object_alone(make_tasks):
    tasks = make_tasks(3)
    one, other = SimulatedWorkers(6, seed=2), SimulatedWorkers(6, seed=2)
    forth = [one.annotate(task, []) for task in tasks]
    back = [other.annotate(task, []) for task in reversed(tasks)][::-1]
    for a, b in zip(forth, back, strict=True):
        assert np.array_equal(a.mask, b.mask) and (a.worker, a.seconds) == (b.worker, b.seconds)
    assert SimulatedWorkers(6, seed=3).annotate(tasks[0], []).seconds != forth[0].seconds
    assert not {*one.workers} & {*SimulatedWorkers(6, seed=2, first=6).workers}


def test_nobody_draws_an_object_twice(make_tasks):
    workers, task, taken = SimulatedWorkers(4), make_tasks(1)[0], []
    while (submission := workers.annotate(task, taken)) is not None:
        assert submission.worker not in taken
        taken.append(submission.worker)
    assert sorted(taken) == sorted(workers.workers)


def test_skill_shows_in_masks_and_behaviour(make_tasks):
    workers = SimulatedWorkers(60, seed=1)
    skills = np.array([workers.skill(worker) for worker in workers.workers])
    assert abs(skills.mean() - 5 / 7) < 0.07 and abs(skills.std() - 0.16) < 0.05  # Beta(5, 2)
    drawn = [
        [
            (jaccard(task.truth, s.mask), s.clicks, s.seconds)
            for w in workers.workers
            if (s := workers.draw(task, w))
        ]
        for task in make_tasks(12)
    ]
    means = np.array(drawn).mean(0)  # [workers, 3]
    for k in range(3):
        assert np.corrcoef(skills, means[:, k])[0, 1] > 0.5
    assert 0.02 < (np.array(drawn)[..., 0] < 0.5).mean() < 0.15  # spam


def test_signed_distance():
    mask = np.zeros((1, 6), bool)
    mask[0, 2:5] = True
    assert signed_distance(mask)[0].tolist() == [-1.5, -0.5, 0.5, 1.5, 0.5, -0.5]
    assert (signed_distance(~mask & mask) < 0).all() and (signed_distance(mask | ~mask) > 0).all()


def test_annotators_by_name(make_tasks):
    assert len(annotators_of("simulated(workers=7, seed=1)").workers) == 7
    for text, message in (
        ("simulated(number=3)", "has no option 'number'"),
        ("simulated(workers='many')", "must be int"),
        ("simulated(workers=0)", "workers must be 1 or more"),
        ("robots", "annotators must be one of"),
        ("submitted", "missing 1 required"),
    ):
        with pytest.raises(SpecError, match=message):
            annotators_of(text)
    task = make_tasks(1)[0]
    blind = Task(task.id, task.image, task.box, task.point, task.label)
    with pytest.raises(PysegError, match="has no truth"):
        SimulatedWorkers(3).annotate(blind, [])
