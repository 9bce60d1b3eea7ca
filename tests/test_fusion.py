"""Fusion of masks: perfect, useless and adversarial ones, and the rules by hand."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch.nn import functional as F

from pyseg.fusion import VOTE, Fusion, Region, Rules, _moves, fuse
from pyseg.types import Segmentation

CLASSES = 5


def scene(seed, size=(120, 160)):
    """Truth of random ellipses and bars over two kinds of ground, and a coarse map of it."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[: size[0], : size[1]]
    truth = (yy > size[0] * rng.uniform(0.3, 0.7)).astype(np.int64)
    for _ in range(7):
        y, x = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        a, b = rng.uniform(6, 26, 2)
        truth[((yy - y) / a) ** 2 + ((xx - x) / b) ** 2 < 1] = rng.integers(2, CLASSES)
    x = int(rng.uniform(10, size[1] - 10))
    truth[10:90, x : x + 5] = CLASSES - 1
    truth = torch.from_numpy(truth)
    onehot = F.one_hot(truth, CLASSES).permute(2, 0, 1)[None].float()
    pooled = F.interpolate(F.avg_pool2d(onehot, 8), size, mode="bilinear", align_corners=False)[0]
    names = tuple("abcde")
    return truth, Segmentation(size, names, logits=pooled.clamp_min(1e-6).log())


def segments(index):
    """Masks of an index map's values from 1 on."""
    return [index == k for k in range(1, int(index.max()) + 1) if (index == k).any()]


def components(truth, channels=CLASSES):
    masks = []
    for c in range(channels):
        found, count = ndimage.label(truth.numpy() == c, structure=np.ones((3, 3)))
        masks += [torch.from_numpy(found == k) for k in range(1, count + 1)]
    return masks


def shifted(mask, dy, dx):
    height, width = mask.shape
    out = torch.zeros_like(mask)
    out[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = mask[
        max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)
    ]
    return out


def cells(size, side, corner=(0, 0)):
    y, x = (torch.arange(n) + c for n, c in zip(size, corner, strict=True))
    return (y[:, None] // side) * 10_000 + x // side


def numbered(index):
    return torch.unique(index, return_inverse=True)[1] + 1


def adversaries(rng, truth, other):
    """Generators that know nothing, or something else."""
    size = truth.shape
    corner = rng.integers(0, 32, 2)
    noise = torch.from_numpy(rng.random((6, *size)) < 0.5)
    angle = rng.uniform(0, 2 * np.pi)
    exact = components(truth, int(truth.max()) + 1)
    yield "grid", segments(numbered(cells(size, 32, corner)))
    yield "noise", list(noise)
    yield "whole", [torch.ones(size, dtype=torch.bool)]
    yield (
        "checkerboard",
        [
            cells(size, 8)
            .div(10_000, rounding_mode="floor")
            .add(torch.arange(size[1]) // 8)
            .remainder(2)
            == k
            for k in (0, 1)
        ],
    )
    yield "another image", components(other, int(other.max()) + 1)
    yield "inverted", [~mask for mask in exact]
    for pixels in (4, 8, 16):
        dy, dx = round(pixels * np.sin(angle)), round(pixels * np.cos(angle))
        yield f"shifted by {pixels}", [shifted(mask, dy, dx) for mask in exact]


def confusion(labels, truth, channels):
    known = truth < channels
    flat = truth[known].long() * channels + labels[known].long()
    return torch.bincount(flat, minlength=channels**2).reshape(channels, channels)


def miou(matrix):
    hits = matrix.diag().double()
    return float(100 * (hits / (matrix.sum(0) + matrix.sum(1) - hits)).nanmean())


def test_no_adversary_costs_and_perfect_masks_gain():
    """Over twelve random scenes, taken together."""
    total = {}
    for seed in range(12):
        truth, prediction = scene(seed)
        rng = np.random.default_rng(seed)
        cases = dict(adversaries(rng, truth, scene(seed + 100)[0]))
        cases["perfect"] = components(truth)
        for name, masks in {**cases, "none": []}.items():
            labels = fuse(prediction, masks).labels
            total[name] = total.get(name, 0) + confusion(labels, truth, CLASSES)
    score = {name: miou(matrix) for name, matrix in total.items()}
    print(score)
    assert score.pop("perfect") > score["none"] + 3
    for name, value in score.items():
        assert value > score["none"] - 0.2, name


def camvid(root, draw, count=3):
    stems = [(s, x) for s in ("train", "val") for x in (root / f"{s}.txt").read_text().split()]
    for k in np.random.default_rng(draw).permutation(len(stems))[:count]:
        split, stem = stems[k]
        with Image.open(root / split / "labels" / f"{stem}.png") as file:
            yield torch.from_numpy(np.array(file)).long()


@pytest.mark.parametrize("draw", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2))])
def test_no_adversary_costs_on_draws_of_camvid(draw, data_folder):
    truths = list(camvid(data_folder("camvid"), draw))
    total = {}
    for k, truth in enumerate(truths):
        size = tuple(truth.shape)
        onehot = F.one_hot(truth, 12)[..., :11].permute(2, 0, 1)[None].float()
        full = F.interpolate(F.avg_pool2d(onehot, 8), size, mode="bilinear", align_corners=False)[0]
        prediction = Segmentation(size, tuple("abcdefghijk"), logits=full.clamp_min(1e-6).log())
        rng = np.random.default_rng(draw)
        cases = dict(adversaries(rng, truth, truths[k - 1]))
        cases["perfect"], cases["none"] = components(truth, 11), []
        for name, masks in cases.items():
            labels = fuse(prediction, masks).labels
            total[name] = total.get(name, 0) + confusion(labels, truth, 11)
    score = {name: miou(matrix) for name, matrix in total.items()}
    print(score)
    assert score.pop("perfect") > score["none"] + 4
    for name, value in score.items():
        assert value > score["none"] - 0.2, name


@pytest.mark.parametrize("seed", range(4))
def test_useless_masks_leave_the_map_bit_for_bit(seed):
    truth, prediction = scene(seed)
    rng = np.random.default_rng(seed)
    empty = torch.zeros_like(truth, dtype=torch.bool)
    for masks in (
        [empty],
        [torch.ones_like(empty)],
        list(torch.from_numpy(rng.random((5, *truth.shape)) < 0.3)),
        [torch.full(truth.shape, float("nan"))],
    ):
        assert fuse(prediction, masks) is prediction
    masks = components(truth)
    assert fuse(prediction, masks, scores=[float("nan")] * len(masks)) is prediction
    assert fuse(prediction, masks, rules=Rules(strength=0)) is prediction
    assert fuse(prediction, []) is prediction


@pytest.mark.parametrize("seed", range(6))
def test_what_may_change(seed):
    """Random masks through an open gate: exclusive, exhaustive, pure, only where allowed."""
    truth, prediction = scene(seed)
    rng = np.random.default_rng(seed)
    before = prediction.logits.clone()
    smooth = ndimage.gaussian_filter(rng.standard_normal((6, *truth.shape)), (0, 6, 6))
    masks = torch.from_numpy(smooth).float() * 40
    classes = rng.integers(-1, CLASSES, 6)
    gate = Rules(
        agreement=0,
        outline=9,
        displacement=float("inf"),
        boundary=int(rng.integers(0, 9)),
        margin=0.3,
    )
    fused = fuse(prediction, masks, rng.random(6), classes.tolist(), rules=gate)
    again = fuse(prediction, list(masks.flip(0)), None, classes[::-1].tolist(), rules=gate)
    for result in (fused, again):
        assert torch.equal(prediction.logits, before)
        assert result.logits.shape == before.shape and torch.isfinite(result.logits).all()
        assert int(result.labels.max()) < CLASSES
    changed = (fused.logits != before).any(0)
    covered = (masks > 0).any(0)
    assert not changed[~covered].any()
    labels = prediction.labels.long()
    p = before.softmax(0).topk(2, 0).values
    near = torch.zeros_like(covered)
    size = 2 * gate.boundary + 3
    highest = F.max_pool2d(labels[None].float(), size, 1, size // 2)[0]
    lowest = -F.max_pool2d(-labels[None].float(), size, 1, size // 2)[0]
    near = highest != lowest
    assert not changed[~near & (p[0] - p[1] >= gate.margin)].any()


def test_newtons_step_against_brute_force():
    """Of a blurred square, and of random maps: what moving it by a pixel does to the error."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        inside = torch.from_numpy(ndimage.gaussian_filter(rng.standard_normal((20, 24)), 2) > 0)
        inside[:2] = inside[-2:] = False
        inside[:, :2] = inside[:, -2:] = False
        p = torch.from_numpy(rng.random((20, 24)))

        def error(mask, p=p):
            return float(((mask.double() - p) ** 2).sum())

        moved = [[(0, 1), (0, -1)], [(1, 0), (-1, 0)]]
        for row, steps in zip(
            _moves(inside, p, torch.ones_like(inside)).tolist(), moved, strict=True
        ):
            for change, step in zip(row, steps, strict=True):
                expected = error(shifted(inside, *step)) - error(inside)
                assert change == pytest.approx(expected, abs=1e-6)


def test_a_region_bounds_what_a_mask_takes():
    """Where a mask leaves out part of its region, the region's class loses it."""
    truth = torch.zeros(60, 60, dtype=torch.long)
    truth[20:40, 20:40] = 1
    logits = torch.stack([1.0 - truth, truth.float()]) * 3
    logits = F.avg_pool2d(F.pad(logits[None], (2, 2, 2, 2), mode="replicate"), 5, 1)[0]
    logits[1, 20:40, 40:44] = logits[0, 20:40, 40:44] + 0.3  # too fat on one side
    prediction = Segmentation((60, 60), ("a", "b"), logits=logits)
    own = prediction.labels == 1
    fusion = Fusion(prediction, Rules())
    region = Region((0, 0), own)
    mask = torch.where(truth == 1, 9.0, -9.0)[None]
    assert fusion.add(mask, torch.ones(1), [1], [region]) == [True]
    assert torch.equal(fusion.result().labels.long(), truth)
    assert fusion.result({0: 0.0}) is prediction  # the class is off
    assert fusion.result({1: 1.5}) is prediction and fusion.result({1: 0.5}) is not prediction
    assert fusion.classes == {1}
    far = Fusion(prediction, Rules())
    assert far.add(shifted(truth == 1, 18, 18)[None], torch.ones(1), [1], [region]) == [False]


def test_small_masks_paint_over_large_ones_in_any_order():
    truth, prediction = scene(3)
    masks = components(truth)
    results = []
    for order in itertools.islice(itertools.permutations(range(len(masks))), 0, 200, 60):
        results.append(fuse(prediction, [masks[k] for k in order]).logits)
    assert all(torch.equal(one, results[0]) for one in results)
    assert torch.equal(fuse(prediction, torch.stack(masks)).logits, results[0])
    assert torch.equal(fuse(prediction, iter(masks)).logits, results[0])


def test_bad_input():
    truth, prediction = scene(0)
    mask = torch.zeros(truth.shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"masks must be \[K, 120, 160\].*got \[1, 5, 5\]"):
        fuse(prediction, [mask[:5, :5]])
    with pytest.raises(ValueError, match=r"tensors \[H, W\], got \[1, 120, 160\]"):
        fuse(prediction, [mask[None]])
    with pytest.raises(ValueError, match=r"tensors .* got ndarray"):
        fuse(prediction, [mask.numpy()])
    with pytest.raises(ValueError, match="bool, or float logits"):
        fuse(prediction, [mask.byte()])
    with pytest.raises(ValueError, match="got 1 scores for at least 2 masks"):
        fuse(prediction, [mask, mask], scores=[0.5])
    with pytest.raises(ValueError, match="got 3 classes for 2 masks"):
        fuse(prediction, [mask, mask], classes=[VOTE, 1, 2])
    with pytest.raises(ValueError, match="classes must be -1 or 0 to 4, got 5"):
        fuse(prediction, [mask], classes=[5])
    with pytest.raises(ValueError, match="without logits"):
        fuse(prediction.with_labels(prediction.labels), [mask])
    with pytest.raises(ValueError, match="area_ratio"):
        Rules(area_ratio=0.5)


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (2, 3)])
def test_tiny_images(size):
    prediction = Segmentation(size, ("a", "b"), logits=torch.randn(2, *size))
    masks = [torch.rand(size) < 0.5 for _ in range(5)] + [torch.ones(size, dtype=torch.bool)]
    for rules in (Rules(), Rules(agreement=0, outline=9, displacement=float("inf"), margin=2)):
        assert fuse(prediction, masks, rules=rules).labels.shape == size
