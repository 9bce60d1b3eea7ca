"""BSDS500's measures against the published program's numbers, plain forms and people's own maps."""

import numpy as np
import pytest
import torch
from pyseg_classical.bsds import (
    BSDS500Humans,
    BSDSBoundary,
    BSDSRegions,
    boundaries,
    match,
    region_scores,
)

import pyseg
from pyseg import testing
from pyseg.errors import LabelError, ScoreError
from pyseg.types import Segmentation, Segments


def test_boundaries_are_those_of_the_published_files(data_folder):
    for path in sorted(data_folder("classical/bsds500").glob("*.npz"))[:3]:
        found = np.load(path)
        for regions, drawn in zip(found["segmentations"], found["boundaries"], strict=True):
            assert (boundaries(regions) == (drawn > 0)).all()


# What correspondPixels of the published program (BSDS500/bench, outlier cost 100) pairs of the maps
# below. Of (0, 0.0075) it misses one pair, as its graph of candidates is thinned at random.
@pytest.mark.parametrize(
    ("seed", "tolerance", "published", "largest"),
    [
        (0, 0.0075, 42, 43),
        (0, 0.02, 491, 491),
        (1, 0.0075, 42, 42),
        (1, 0.02, 596, 596),
        (2, 0.0075, 57, 57),
        (2, 0.02, 539, 539),
    ],
)
def test_pairs_are_those_of_the_published_program(seed, tolerance, published, largest):
    draw = np.random.default_rng(seed)
    ours = np.kron(draw.integers(0, 3, (6, 8)), np.ones((12, 12), int))
    theirs = np.roll(ours, draw.integers(-2, 3, 2), (0, 1))
    theirs[20:50, 30:60] = 9
    one, other = match(boundaries(ours), boundaries(theirs), tolerance)
    assert one.sum() == other.sum() == largest and 0 <= largest - published <= 1


def test_region_scores_equal_plain_forms():
    draw = np.random.default_rng(0)
    ours, humans = draw.integers(0, 4, (7, 9)), draw.integers(0, 3, (3, 7, 9))
    found = region_scores(ours, humans)
    a = ours.ravel()
    rand, variation, best = [], [], []
    for human in humans:
        b = human.ravel()
        upper = np.triu_indices(len(a), 1)
        same = (a[:, None] == a)[upper] == (b[:, None] == b)[upper]
        rand.append(same.mean())
        joint = np.array([[np.mean((a == i) & (b == j)) for j in range(3)] for i in range(4)])
        given = joint * np.log2(joint**2 / (joint.sum(1)[:, None] * joint.sum(0)))
        variation.append(-given.sum())
        for j in np.unique(b):
            best.append(
                max(((a == i) & (b == j)).sum() / ((a == i) | (b == j)).sum() for i in range(4))
            )
    assert found.rand == pytest.approx(np.mean(rand))
    assert found.variation == pytest.approx(np.mean(variation))
    np.testing.assert_allclose(found.best, best)


def test_scores_over_levels_and_images():
    left = np.zeros((20, 30), int)
    left[:, 15:] = 1
    top = np.zeros((20, 30), int)
    top[10:] = 1
    both = 2 * left + top
    boundary, regions = BSDSBoundary(), BSDSRegions()
    for metric in (boundary, regions):
        metric.update_levels("b", [both, left], [left])
        metric.update_levels("a", [both, top], [both])
    scores = regions.compute()
    assert scores["covering_best"] == scores["covering_ois"] == 1
    assert scores["covering_ods"] == 0.75  # the first level halves both regions of one image
    assert (scores["vi_ois"], scores["vi_ods"], scores["pri_ois"]) == (0, 0.5, 1)
    found = boundary.compute()
    assert found["ois_f"] == 1 and 0.75 < found["ods_f"] < 1 and 0 < found["ods_level"] < 1
    assert found["images"] == 2 and len(found["curve"]) == 2


@pytest.mark.parametrize("name", ["bsds_boundary", "bsds_regions"])
def test_metrics_conform(name):
    testing.check_metric(name)


def test_refusals():
    metric = BSDSBoundary()
    with pytest.raises(LabelError, match="maps \\[H, W\\] of one size"):
        metric.update_levels("a", [np.zeros((2, 3))], [np.zeros((3, 2))])
    with pytest.raises(LabelError, match="one person at least"):
        metric.update_levels("a", [np.zeros((2, 3))], [])
    for _ in range(2):
        metric.update_levels("a", [np.zeros((4, 5), int)], [np.zeros((4, 5), int)])
    with pytest.raises(ScoreError, match="'a' was counted twice"):
        metric.compute()
    with pytest.raises(ValueError, match=r"at most 0\.1"):
        BSDSBoundary(tolerance=1)


def test_all_people_are_read(data_folder):
    data = BSDS500Humans(data_folder("bsds500"), "val")
    sample = data[0]
    assert len(data) == 100 and len(sample.humans) == data.people(0) >= 4
    assert torch.equal(sample.humans[0].map, sample.segments.map)
    own = Segmentation(tuple(sample.image.shape[1:]), ("region",), segments=sample.segments)
    for name in ("bsds_boundary", "bsds_regions"):
        metric = pyseg.metrics.create(name)
        metric.update(own, sample)
        scores = metric.compute()
        assert scores.get("ods_precision", 1) == 1 and scores.get("covering_ods", 0.9) > 0.3
    assert isinstance(sample.humans[-1], Segments)
