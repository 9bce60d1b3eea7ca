"""Prompts from components and instances, against brute force."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from pyseg.refiners.sam_prompts import (
    Style,
    _merged,
    point_grid,
    prompt_components,
    prompt_instance,
    stack_prompts,
)


def prompts_of(labels, min_area=64):
    found, owner = prompt_components(labels.numpy(), [1], min_area)
    prompts = stack_prompts(found, tuple(labels.shape)) if found else None
    return found, torch.from_numpy(owner), prompts


@pytest.mark.parametrize("place", ["inside", "corner"])
def test_prompt_geometry(place):
    labels = torch.zeros(120, 150, dtype=torch.long)
    top, left = (40, 50) if place == "inside" else (0, 0)
    labels[top : top + 30, left : left + 40] = 1
    labels[top + 15 : top + 30, left + 20 : left + 40] = 0  # an L
    found, owner, prompts = prompts_of(labels)
    assert len(found) == 1 and torch.equal(owner == 0, labels == 1)
    bottom, right = top + 29, left + 39
    expected = [max(left - 4, 0), max(top - 3, 0), right + 4, bottom + 3]  # 10 % of each side
    assert prompts.boxes[0].tolist() == expected
    assert prompts.point_labels[0].tolist() == [1, 0]
    (x, y), (u, v) = prompts.points[0].long().tolist()
    mask = (labels == 1).numpy()
    # Brute force: distance of all pixels to all pixels of the other kind.
    yx = np.argwhere(np.pad(mask, 1) == 0) - 1
    inner = np.argwhere(mask)
    depth = np.sqrt(((inner[:, None] - yx[None]) ** 2).sum(-1)).min(1)
    assert mask[y, x] and depth[(inner == [y, x]).all(1)][0] == pytest.approx(depth.max())
    box = [int(np.ceil(expected[1])), int(np.ceil(expected[0])), expected[3], expected[2]]
    window = np.zeros_like(mask)
    window[box[0] : box[2] + 1, box[1] : box[3] + 1] = True
    outer = np.argwhere(window & ~mask)
    away = np.sqrt(((outer[:, None] - inner[None]) ** 2).sum(-1)).min(1)
    assert away[(outer == [v, u]).all(1)][0] == pytest.approx(away.max())
    # The mask prompt: right sign everywhere, sure inside and far off, unsure at the outline.
    logits = prompts.masks[0]
    assert torch.equal(logits > 0, labels == 1)
    assert logits[y, x] > 8 and logits[-1, -1] == -10
    assert logits[y, x] > logits[top, left + 10] > 0


def test_a_component_that_fills_the_image_has_no_negative_point():
    found, _, prompts = prompts_of(torch.ones(40, 50, dtype=torch.long))
    assert prompts.point_labels[0].tolist() == [1, -1]
    assert prompts.boxes[0].tolist() == [0, 0, 49, 39]
    assert len(found) == 1


def test_components_are_8_connected_and_large_enough():
    labels = torch.zeros(60, 60, dtype=torch.long)
    labels[:8, :8] = labels[8:16, 8:16] = 1  # touch at a corner
    labels[40:47, 40:49] = 1  # 63 pixels
    found, owner, _ = prompts_of(labels)
    assert len(found) == 1 and int((owner == 0).sum()) == 128
    assert len(prompts_of(labels, min_area=63)[0]) == 2
    assert prompts_of(labels * 0)[0] == []


@pytest.mark.parametrize("angle", [0, 17, 45, 90, 133])
def test_long_thin_components_are_tiled_along_their_axis(angle):
    size, radians = (260, 260), np.deg2rad(angle)
    yy, xx = np.mgrid[: size[0], : size[1]] - 130
    along = xx * np.cos(radians) + yy * np.sin(radians)
    across = -xx * np.sin(radians) + yy * np.cos(radians)
    labels = torch.from_numpy((np.abs(along) < 100) & (np.abs(across) < 3)).long()
    found, owner, _ = prompts_of(labels)
    assert 6 <= len(found) <= 12  # 200 x 6 in tiles of some 4 : 1
    assert torch.equal(owner >= 0, labels == 1)
    areas = torch.bincount(owner[owner >= 0])
    assert areas.min() >= 64
    # A mask of the whole pole is cut to each tile's strip, where it fits perfectly.
    for index, prompt in enumerate(found):
        strip = prompt.strip_mask(size, owner.device)
        assert ((labels == 1) & strip).ne(owner == index).sum() <= 2  # rounding at the cuts
        assert abs(abs(prompt.axis[0]) - abs(np.cos(radians))) < 0.02
    # The negative point is off the whole pole, not only off the tile.
    for prompt in found:
        if prompt.point_labels[1] == 0:
            (_, _), (u, v) = prompt.points
            assert labels[int(v), int(u)] == 0


def test_seeds_are_dense_where_the_network_is_unsure():
    p = torch.zeros(2, 64, 96)
    p[0] = 1
    p[:, :16, :24] = 0.5
    seeds = point_grid(p, 4)
    assert seeds.shape == (4 * 4 + 3, 2)  # one cell in quarters
    unsure = (seeds[:, 0] < 24) & (seeds[:, 1] < 16)
    assert sorted(seeds[unsure].tolist()) == [[5.5, 3.5], [5.5, 11.5], [17.5, 3.5], [17.5, 11.5]]
    assert [35.5, 7.5] in seeds.tolist()  # centre of the next cell
    assert (seeds >= 0).all() and (seeds[:, 0] < 96).all() and (seeds[:, 1] < 64).all()
    assert len(point_grid(torch.full((2, 1, 3), 0.5), 16)) == 3


def test_an_instance_is_prompted_by_its_own_box():
    mask = np.zeros((60, 80), bool)
    mask[10:30, 20:50] = True
    prompt = prompt_instance(mask, [19.5, 9.0, 51.0, 31.5])
    assert prompt.box == (19.5, 9.0, 50.0, 30.5)  # edges to first and last pixels
    (x, y), (u, v) = prompt.points
    assert mask[int(y), int(x)] and not mask[int(v), int(u)]
    stacked = stack_prompts([prompt], mask.shape)
    assert torch.equal(stacked.masks[0] > 0, torch.from_numpy(mask))
    assert prompt.strip == (-math.inf, math.inf)
    assert prompt.strip_mask(mask.shape, torch.device("cpu")).all()


def test_gaussian_mask_prompts_fade_from_the_deepest_pixel():
    labels = torch.zeros(80, 100, dtype=torch.long)
    labels[20:50, 30:70] = 1
    found, _ = prompt_components(labels.numpy(), [1], 64, style=Style(mask_prompt="gaussian"))
    logits = stack_prompts(found, (80, 100)).masks[0]
    inside = labels == 1
    depth = torch.from_numpy(ndimage.distance_transform_edt(np.pad(inside.numpy(), 1))[1:-1, 1:-1])
    expected = 30 * (-((depth - depth.max()) ** 2) * 4 / inside.sum()).exp()
    torch.testing.assert_close(logits[inside].double(), expected[inside], atol=1e-4, rtol=1e-5)
    assert (logits[~inside] == -30).all()


@pytest.mark.parametrize("like", [("left",), ("top", "right"), ()])
def test_an_elastic_box_moves_only_to_what_looks_alike(like):
    """Features of four kinds: the object, what is beside it and alike or not, the ground."""
    labels = torch.zeros(120, 160, dtype=torch.long)
    labels[40:80, 60:110] = 1
    features = np.zeros((3, 60, 80), np.float32)
    features[0] = 1
    features[:, 20:40, 30:55] = np.array([0, 1, 0])[:, None, None]
    beside = {
        "left": (slice(20, 40), slice(20, 30)),
        "top": (slice(10, 20), slice(30, 55)),
        "right": (slice(20, 40), slice(55, 65)),
    }
    for side, where in beside.items():
        features[(slice(None), *where)] = np.array([0, 2, 0.1 if side in like else 5])[
            :, None, None
        ]
    style = Style(box="elastic", mask_prompt="gaussian")
    (prompt,), _ = prompt_components(labels.numpy(), [1], 64, style=style, features=features)
    expected = [60, 40, 109, 79]  # tight, a tenth of 50 and 40 wherever it moves
    expected[0] -= 4 * ("left" in like)
    expected[1] -= 3 * ("top" in like)
    expected[2] += 4 * ("right" in like)
    assert list(prompt.box) == expected
    # A mask whose box was extended is believed less.
    assert prompt.mask.max() == (1 if like else 30) and prompt.outside == -prompt.mask.max()


def test_components_that_fill_a_common_box_are_merged():
    labels = torch.zeros(100, 200, dtype=torch.long)
    labels[10:30, 10:40] = labels[32:52, 10:40] = 1  # a car behind a pole
    labels[10:30, 120:124] = labels[70:90, 190:194] = 1  # far apart
    found, owner = prompt_components(labels.numpy(), [1], 16, style=Style(merge=True))
    assert len(found) == 3
    together = owner[labels.numpy() == 1]
    assert sorted(np.bincount(together)) == [80, 80, 1200]
    assert len(prompt_components(labels.numpy(), [1], 16)[0]) == 4


def merged_by_hand(windows, areas):
    """The same rule, pair by pair."""
    boxes = [[y.start, x.start, y.stop, x.stop] for y, x in windows]
    areas, region = list(areas), list(range(len(areas)))

    def size(box):
        return (box[2] - box[0]) * (box[3] - box[1])

    for i in range(len(boxes)):
        if region[i] != i:
            continue
        for j in range(i + 1, len(boxes)):
            if region[j] != j:
                continue
            union = [*map(min, boxes[i][:2], boxes[j][:2]), *map(max, boxes[i][2:], boxes[j][2:])]
            least = min(areas[i] / size(boxes[i]), areas[j] / size(boxes[j])) - 0.1
            if size(boxes[i]) + size(boxes[j]) > size(union) / 2 and (areas[i] + areas[j]) / size(
                union
            ) > min(0.5, least):
                boxes[i], areas[i] = union, areas[i] + areas[j]
                region = [i if r == j else r for r in region]
    return region


def test_merging_against_pairs_by_hand():
    rng = np.random.default_rng(0)
    for _ in range(30):
        y, x = rng.integers(0, 40, (2, 12))
        h, w = rng.integers(1, 20, (2, 12))
        windows = [(slice(a, a + c), slice(b, b + d)) for a, b, c, d in np.stack([y, x, h, w], 1)]
        areas = np.maximum(1, (h * w * rng.uniform(0.3, 1, 12)).astype(int))
        assert _merged(windows, areas).tolist() == merged_by_hand(windows, areas)


def test_evidence_joins_pieces():
    labels = torch.zeros(80, 60, dtype=torch.long)
    labels[5:25, 20:26] = labels[50:75, 20:26] = 1
    between = np.zeros(labels.shape, bool)
    between[25:50, 21:25] = True
    found, owner = prompt_components(labels.numpy(), [1], 16, evidence={1: between})
    assert ((owner >= 0) == ((labels == 1).numpy() | between)).all()
    assert sum(p.strip == (-math.inf, math.inf) for p in found) in (0, 1)


def test_bad_styles():
    with pytest.raises(ValueError, match="box must be 'grown' or 'elastic', got 'tight'"):
        Style(box="tight")
    with pytest.raises(ValueError, match="mask_prompt must be 'signed' or 'gaussian', got 'x'"):
        Style(mask_prompt="x")
