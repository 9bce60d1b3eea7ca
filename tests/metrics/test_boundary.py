"""Boundary against a table of disks, erosion in SciPy, and exhaustive matching."""

import math

import numpy as np
import pytest
import torch

from pyseg.errors import LabelError
from pyseg.metrics.boundary import Boundary
from pyseg.metrics.semantic import Semantic
from pyseg.types import Metric, Sample, Segmentation

ndimage = pytest.importorskip("scipy.ndimage")
NAMES = ("road", "sky", "tree", "car")


def pair(prediction, target, names=NAMES):
    prediction, target = torch.as_tensor(prediction), torch.as_tensor(target)
    return (
        Segmentation(tuple(prediction.shape), names, _labels=prediction.to(torch.uint8)),
        Sample("a", torch.zeros(3, *target.shape, dtype=torch.uint8), target.to(torch.uint8)),
    )


def scored(images, names=NAMES, **options):
    metric = Boundary(names, **options)
    for image in images:
        metric.update(*pair(*image, names))
    return metric


def random_images(count, seed=0, size=(60, 80), void=True):
    generator = np.random.default_rng(seed)
    for _ in range(count):
        target = generator.integers(0, 4, (4, 5)).repeat(15, 0).repeat(16, 1)[: size[0], : size[1]]
        prediction = np.where(generator.random(size) < 0.98, np.roll(target, 2, 1), 1)
        if void:
            target = target.copy()
            target[20:30, 35:60] = 255
            prediction[50:, :9] = 255
        yield prediction, target


def test_it_is_a_metric():
    assert isinstance(Boundary(NAMES), Metric)


def disk(radius, shift=0):
    y, x = np.mgrid[:240, :240]
    return ((x - 120 - shift) ** 2 + (y - 120) ** 2 <= radius**2).astype(int)


# 240 x 240, d = 7, tolerance 2.5: mask IoU, Boundary IoU, trimap IoU, BF of the disk.
DISKS = {
    (12, "+1"): (0.83, 0.78, 0.83, 1.0),
    (12, "+3"): (0.62, 0.49, 0.62, 0.08),
    (12, "shift 3"): (0.72, 0.68, 0.72, 0.73),
    (12, "hole"): (0.74, 0.77, 0.77, 0.78),
    (100, "+1"): (0.98, 0.81, 0.90, 1.0),
    (100, "+3"): (0.94, 0.50, 0.74, 0.12),
    (100, "shift 3"): (0.96, 0.65, 0.80, 0.71),
    (100, "hole"): (0.75, 0.64, 1.0, 0.80),
}


@pytest.mark.parametrize("radius, change", DISKS)
def test_disks(radius, change):
    prediction = {
        "+1": lambda: disk(radius + 1),
        "+3": lambda: disk(radius + 3),
        "shift 3": lambda: disk(radius, 3),
        "hole": lambda: disk(radius) - disk(radius / 2),
    }[change]()
    names = ("background", "disk")
    image = pair(prediction, disk(radius), names)
    boundary, semantic = Boundary(names), Semantic(names)
    for metric in (boundary, semantic):
        metric.update(*image)
    got = boundary.compute()["per_class"]["disk"]
    scores = (
        semantic.compute()["per_class"]["disk"]["iou"],
        got["boundary_iou"],
        got["trimap_iou"],
        got["bf"],
    )
    assert scores == pytest.approx(DISKS[radius, change], abs=0.0051)


def test_against_erosion_and_distance_transforms():
    """Every score from its definition on masks, one class and image at a time."""
    images = list(random_images(3))
    square, distance, tolerance = np.ones((3, 3)), 2, 0.03 * 100
    overlap, trimap = np.zeros((4, 2)), np.zeros((4, 2))
    per_image, per_class = [], [[] for _ in NAMES]
    for prediction, target in images:
        prediction = np.where(target == 255, 255, prediction)
        scores = []
        padded = np.pad(target, distance, mode="edge")
        near = ndimage.maximum_filter(padded, 2 * distance + 1) != ndimage.minimum_filter(
            padded, 2 * distance + 1
        )
        near = near[distance:-distance, distance:-distance] & (target != 255)
        for k in range(4):
            p, t = prediction == k, target == k
            pb, tb = (m & ~ndimage.binary_erosion(m, square, distance) for m in (p, t))
            overlap[k] += (pb & tb).sum(), (pb | tb).sum()
            trimap[k] += (p & t & near).sum(), ((p | t) & near).sum()
            pe, te = (m & ~ndimage.binary_erosion(m, border_value=1) for m in (p, t))
            if not (pe | te).any():
                continue
            precision = (ndimage.distance_transform_edt(~te)[pe] <= tolerance).mean()
            recall = (ndimage.distance_transform_edt(~pe)[te] <= tolerance).mean()
            scores.append(2 * precision * recall / (precision + recall))
            per_class[k].append(scores[-1])
        per_image.append(np.mean(scores))
    got = scored(images, ratio=0.02, tolerance=0.03).compute()
    for k, name in enumerate(NAMES):
        entry = got["per_class"][name]
        assert entry["boundary_iou"] == pytest.approx(overlap[k, 0] / overlap[k, 1])
        assert entry["trimap_iou"] == pytest.approx(trimap[k, 0] / trimap[k, 1])
        assert entry["bf"] == pytest.approx(np.mean(per_class[k]))
    assert got["boundary_iou"] == pytest.approx(np.mean(overlap[:, 0] / overlap[:, 1]))
    assert got["bf"] == pytest.approx(np.mean(per_image))
    assert got["classes_counted"] == 4


@pytest.mark.parametrize("chosen", [["boundary_iou"], ["bf"], ["trimap", "bf"]])
def test_measures_that_are_left_out_are_nan_and_the_others_the_same(chosen):
    images = list(random_images(2))
    whole, part = scored(images).compute(), scored(images, measures=chosen).compute()
    totals = {"boundary_iou": "boundary_iou", "bf": "bf", "trimap": "trimap_miou"}
    for measure, key in totals.items():
        assert part[key] == whole[key] if measure in chosen else math.isnan(part[key])
    with pytest.raises(LabelError, match="4"):  # labels out of range are found all the same
        scored([(np.full((8, 9), 4), np.zeros((8, 9)))], measures=chosen)


def test_one_to_one_is_the_largest_matching():
    """Against an assignment that pays for pairs; never more than by distance."""
    optimize = pytest.importorskip("scipy.optimize")
    ((prediction, target),) = random_images(1, seed=3, void=False)
    got = scored([(prediction, target)], matching="one-to-one", tolerance=0.02).compute()
    loose = scored([(prediction, target)], tolerance=0.02).compute()
    for k, name in enumerate(NAMES):
        points = [
            np.argwhere(m & ~ndimage.binary_erosion(m, border_value=1))
            for m in (prediction == k, target == k)
        ]
        squared = ((points[0][:, None] - points[1][None]) ** 2).sum(-1)
        near = squared <= 4  # (0.02 * 100 px)^2
        rows, columns = optimize.linear_sum_assignment(near, maximize=True)
        matched = near[rows, columns].sum()
        want = 2 * matched / (len(points[0]) + len(points[1]))
        assert got["per_class"][name]["bf"] == pytest.approx(want)
        assert want <= loose["per_class"][name]["bf"] + 1e-9
    assert got["bf"] < loose["bf"]


@pytest.mark.parametrize("matching", ["distance", "one-to-one"])
def test_order_and_splitting_change_no_bit(matching):
    images = list(random_images(6))
    whole = scored(images, matching=matching)
    assert all(value.dtype == torch.int64 for value in whole.state().values())
    generator = np.random.default_rng()
    for _ in range(2):
        shuffled = [images[k] for k in generator.permutation(6)]
        cut = sorted(generator.integers(0, 7, 2))
        parts = [
            scored(shuffled[a:b], matching=matching).state()
            for a, b in zip([0, *cut], [*cut, 6], strict=True)
        ]
        merged = Boundary(NAMES)
        merged.load_state({key: sum(part[key] for part in parts) for key in whole.state()})
        for key, value in whole.state().items():
            assert torch.equal(merged.state()[key], value)
        assert merged.compute() == whole.compute()


def test_perfect_is_one_and_ignored_pixels_do_not_matter():
    images = list(random_images(2))
    got = scored([(target, target) for _, target in images]).compute()
    assert got["boundary_iou"] == got["bf"] == got["trimap_miou"] == 1.0
    other = [(np.where(target == 255, 2, prediction), target) for prediction, target in images]
    assert scored(other).compute() == scored(images).compute()


@pytest.mark.parametrize("ignore", [4, -1, 0])
def test_any_ignore_index(ignore):
    images = list(random_images(2))
    metric = Boundary(NAMES, ignore_index=ignore)
    for image in images:
        prediction, target = (torch.as_tensor(labels).to(torch.int16) for labels in image)
        prediction[prediction == 255], target[target == 255] = ignore, ignore
        metric.update(
            Segmentation((60, 80), NAMES, _labels=prediction),
            Sample("a", torch.zeros(3, 60, 80, dtype=torch.uint8), target),
        )
    got = metric.compute()
    if ignore == 0:  # then it is no class
        assert math.isnan(got["per_class"]["road"]["boundary_iou"])
    else:
        assert got == scored(images).compute()


def test_absent_classes_are_nan():
    got = scored([(np.zeros((20, 30)), np.zeros((20, 30)))]).compute()
    assert got["per_class"]["road"]["boundary_iou"] == 1.0
    assert math.isnan(got["per_class"]["sky"]["boundary_iou"])
    assert math.isnan(got["bf"]) and math.isnan(got["trimap_miou"])  # no boundary anywhere
    assert math.isnan(Boundary(NAMES).compute()["boundary_iou"])


def test_bad_input():
    with pytest.raises(ValueError, match="measures must be some of boundary_iou, bf, trimap"):
        Boundary(NAMES, measures=["iou"])
    metric = Boundary(NAMES)
    zeros = np.zeros((3, 4))
    with pytest.raises(LabelError, match=r"'a'.*\[4, 3\]"):
        metric.update(*[pair(zeros, zeros)[0], pair(zeros.T, zeros.T)[1]])
    with pytest.raises(LabelError, match=r"'a'.*target holds.*34"):
        metric.update(*pair(zeros, zeros + 34))
    with pytest.raises(LabelError, match="no labels"):
        metric.update(pair(zeros, zeros)[0], Sample("x", torch.zeros(3, 3, 4)))
    assert all(not value.any() for value in metric.state().values())
    for options in (
        {"classes": ()},
        {"classes": NAMES, "ratio": 0},
        {"classes": NAMES, "tolerance": 2},
        {"classes": NAMES, "matching": "x"},
    ):
        with pytest.raises(ValueError, match=r"classes|ratio|tolerance|matching"):
            Boundary(**options)
    with pytest.raises(ValueError, match="state 'areas' must be"):
        metric.load_state(Boundary(("a", "b")).state())
    metric.load_state({**metric.state(), "invalid": torch.tensor([0, 7, 0])})
    with pytest.raises(LabelError, match="7 target pixels"):
        metric.compute()
