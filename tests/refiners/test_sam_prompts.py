"""Prompts from components and instances, against brute force."""

import math

import numpy as np
import pytest
import torch

from pyseg.refiners.sam_prompts import (
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
