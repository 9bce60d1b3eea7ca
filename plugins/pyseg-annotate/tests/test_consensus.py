"""Majority and STAPLE against brute force, ITK, and what must be so."""

import itertools

import numpy as np
import pytest
from pyseg_annotate.consensus import (
    bounding_region,
    local_staple,
    majority,
    staple,
    staple_labels,
)

from pyseg.errors import LabelError


@pytest.fixture(scope="module")
def drawn():
    """A disc, and seven who draw it: five fairly, one too large, one at random."""
    rng = np.random.default_rng(4)
    y, x = np.mgrid[:40, :52]
    truth = (y - 19) ** 2 + (x - 24) ** 2 < 11**2
    masks = [truth ^ (rng.random(truth.shape) < 0.04) for _ in range(5)]
    masks.append((y - 19) ** 2 + (x - 24) ** 2 < 15**2)
    masks.append(rng.random(truth.shape) < 0.4)
    return truth, np.stack(masks)


def brute_force(masks, steps):
    """Pixel by pixel, as the paper writes it."""
    d = masks.reshape(len(masks), -1).astype(float)
    p, q, pi = [0.99999] * len(d), [0.99999] * len(d), d.mean()
    for _ in range(steps):
        w = []
        for i in range(d.shape[1]):
            a, b = pi, 1 - pi
            for k in range(len(d)):
                a *= p[k] if d[k, i] else 1 - p[k]
                b *= 1 - q[k] if d[k, i] else q[k]
            w.append(a / (a + b))
        w = np.array(w)
        p = [float((w * each).sum() / w.sum()) for each in d]
        q = [float(((1 - w) * (1 - each)).sum() / (1 - w).sum()) for each in d]
    return w.reshape(masks.shape[1:]), p, q


def test_staple_is_that_of_the_paper(drawn):
    _, masks = drawn
    part = masks[:4, 8:28, 14:34]
    w, p, q = brute_force(part, 12)
    found = staple(part, iterations=12, tolerance=0)
    np.testing.assert_allclose(found.probability, w, atol=1e-9)
    np.testing.assert_allclose(found.sensitivity, p, atol=1e-9)
    np.testing.assert_allclose(found.specificity, q, atol=1e-9)


def test_staple_is_that_of_itk(drawn):
    sitk = pytest.importorskip("SimpleITK")
    _, masks = drawn
    filter_ = sitk.STAPLEImageFilter()
    filter_.SetForegroundValue(1)
    filter_.SetMaximumIterations(500)
    probability = sitk.GetArrayFromImage(
        filter_.Execute([sitk.GetImageFromArray(m.astype(np.uint8)) for m in masks])
    )
    found = staple(masks, iterations=500, tolerance=1e-12)
    np.testing.assert_allclose(found.probability, probability, atol=1e-5)
    np.testing.assert_allclose(found.sensitivity, filter_.GetSensitivity(), atol=1e-5)
    np.testing.assert_allclose(found.specificity, filter_.GetSpecificity(), atol=1e-5)


def test_staple_of_labels_is_that_of_itk_where_it_is_sure():
    sitk = pytest.importorskip("SimpleITK")
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), 12)[:, None] * np.ones((1, 30), int)
    maps = np.stack(
        [
            np.where(rng.random(truth.shape) < e, rng.integers(0, 4, truth.shape), truth)
            for e in (0.05, 0.1, 0.2, 0.3, 0.5)
        ]
    )
    labels = sitk.GetArrayFromImage(
        sitk.MultiLabelSTAPLE([sitk.GetImageFromArray(m.astype(np.uint8)) for m in maps], 9)
    )
    found = staple_labels(maps, 4)
    sure = labels != 9  # ITK's value of ties
    assert sure.mean() > 0.99 and (found.labels == labels)[sure].mean() > 0.995
    assert (found.labels == truth).mean() > 0.97
    right = found.confusion.diagonal(0, 1, 2).mean(1)
    np.testing.assert_allclose(right, [1 - 0.75 * e for e in (0.05, 0.1, 0.2, 0.3, 0.5)], atol=0.06)


def test_two_labels_are_the_binary_case(drawn):
    _, masks = drawn
    region = bounding_region(masks[:6])
    one = staple(masks, region, tolerance=1e-12)
    two = staple_labels(masks.astype(np.uint8), 2, region, tolerance=1e-12)
    np.testing.assert_allclose(two.probability[1], one.probability, atol=1e-6)
    np.testing.assert_allclose(two.confusion[:, 1, 1], one.sensitivity, atol=1e-6)
    np.testing.assert_allclose(two.confusion[:, 0, 0], one.specificity, atol=1e-6)
    assert (two.labels[~region] == 255).all()


def test_a_label_map_with_void_counts_for_what_it_says():
    maps = np.zeros((3, 4, 6), np.uint8)
    maps[:, :, 3:] = 1
    maps[2] = 255
    found = staple_labels(maps, 2)
    assert np.array_equal(found.labels, maps[0])
    assert found.confusion[2, 0, 0] > 0.9  # of whom nothing is known


def test_staple_finds_the_bad_and_beats_majority_of_them(drawn):
    truth, masks = drawn
    found = staple(masks, bounding_region(masks))
    assert found.specificity.argmin() == 6 and found.sensitivity.argmin() == 6
    crowd = np.concatenate([masks[:2], np.repeat(masks[6:], 3, 0)])  # three of one opinion
    assert (majority(crowd) == truth).mean() < (majority(masks) == truth).mean()
    assert (found.mask == truth).mean() > 0.99


def test_background_inflates_specificity(drawn):
    _, masks = drawn
    few = masks[:6]
    far = np.pad(few, ((0, 0), (200, 200), (200, 200)))
    near = staple(far, bounding_region(far)).specificity
    whole = staple(far).specificity
    assert (whole > near).all() and whole.min() > 0.99 > near.min()


def test_local_weights(drawn):
    truth, masks = drawn
    region = bounding_region(masks)
    whole, local = staple(masks, region), local_staple(masks, region, radius=np.inf)
    assert np.array_equal(whole.probability, local.probability)
    # With all evidence from the global estimate it is that.
    bound = local_staple(masks, region, strength=1e12)
    np.testing.assert_allclose(bound.probability, whole.probability, atol=1e-5)
    # Three of four cut one half off each, in a place of their own; there the fourth is trusted.
    y, x = np.mgrid[:40, :52]
    cut = np.stack(
        [
            truth & ~((x > 24) & (y < 19)),
            truth & ~((x > 24) & (y < 19)),
            truth,
            truth,
            truth ^ (np.random.default_rng(1).random(truth.shape) < 0.2),
        ]
    )
    error = [(m != truth).sum() for m in (local_staple(cut).mask, majority(cut))]
    assert error[0] <= error[1]


def test_majority_counts_and_ties_are_out():
    for votes in itertools.product([False, True], repeat=4):
        masks = np.array(votes).reshape(4, 1, 1)
        assert majority(masks)[0, 0] == (sum(votes) > 2)


def test_one_annotator_nothing_and_everything():
    rng = np.random.default_rng(0)
    mask = rng.random((1, 9, 11)) < 0.5
    assert np.array_equal(majority(mask), mask[0])
    assert np.array_equal(staple(mask).mask, mask[0])
    for value in (False, True):
        full = np.full((3, 5, 5), value)
        assert (staple(full).mask == value).all() and (local_staple(full).mask == value).all()
    assert not bounding_region(np.zeros((2, 5, 5), bool)).any()


def test_what_is_refused():
    masks = np.zeros((2, 4, 4), bool)
    for call in (
        lambda: majority(masks.astype(int)),
        lambda: staple(masks[:0]),
        lambda: staple(masks[0]),
        lambda: staple(masks, np.ones((3, 3), bool)),
        lambda: staple_labels(np.full((2, 4, 4), 7), 3),
        lambda: staple_labels(masks.astype(float), 2),
        lambda: staple_labels(masks.astype(int), 1),
        lambda: local_staple(np.array([[[True, False]]]), radius=0),
    ):
        with pytest.raises(LabelError):
            call()
