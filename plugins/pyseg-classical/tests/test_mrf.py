"""Energies of Markov random fields against the minimum over all labellings."""

import itertools

import numpy as np
import pytest
from pyseg_classical.mrf import MRF, Grid, expansion, icm


def problem(size, count, seed, contrast=True):
    chance = np.random.default_rng(seed)
    unary = chance.random((size[0] * size[1], count)) * 4
    return unary, Grid(chance.random((*size, 1)), 1.2, contrast)


def energy(unary, grid, labels, size):
    """By loops over pixels and their right and lower neighbours."""
    cost = {tuple(pair): c for pair, c in zip(grid.pairs.tolist(), grid.cost, strict=True)}
    total = sum(unary[k, label] for k, label in enumerate(labels))
    for y in range(size[0]):
        for x in range(size[1]):
            k = y * size[1] + x
            for other, there in ((k + 1, x + 1 < size[1]), (k + size[1], y + 1 < size[0])):
                if there and labels[k] != labels[other]:
                    total += cost[k, other]
    return total


@pytest.mark.parametrize("seed", range(4))
def test_two_labels_are_minimised(seed):
    size = (3, 4)
    unary, grid = problem(size, 2, seed)
    best = min(energy(unary, grid, x, size) for x in itertools.product(range(2), repeat=12))
    found = expansion(unary, grid, unary.argmin(1))
    assert energy(unary, grid, found, size) == pytest.approx(best)
    assert grid.energy(unary, found) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(3))
def test_three_labels_are_near_the_minimum(seed):
    size = (3, 3)
    unary, grid = problem(size, 3, seed, contrast=seed > 0)
    best = min(grid.energy(unary, np.array(x)) for x in itertools.product(range(3), repeat=9))
    start = unary.argmin(1)
    found = expansion(unary, grid, start)
    modes = icm(unary, grid, start)
    assert best - 1e-9 <= grid.energy(unary, found) <= 2 * best
    assert grid.energy(unary, found) <= grid.energy(unary, modes) + 1e-9
    assert grid.energy(unary, modes) <= grid.energy(unary, start)
    # Modes: no pixel alone can do better; and no expansion of any label from the result can.
    for k, label in itertools.product(range(9), range(3)):
        changed = modes.copy()
        changed[k] = label
        assert grid.energy(unary, changed) >= grid.energy(unary, modes) - 1e-9
    for alpha, taking in itertools.product(range(3), itertools.product((False, True), repeat=9)):
        moved = np.where(taking, alpha, found)
        assert grid.energy(unary, moved) >= grid.energy(unary, found) - 1e-9


def test_pairs_across_edges_cost_less():
    image = np.zeros((2, 4, 1))
    image[:, 2:] = 10
    grid = Grid(image, 2.0, True)
    across = (grid.pairs % 4 == [1, 2]).all(1)
    mean = 100 * 2 / 10  # of 10 pairs 2 differ
    np.testing.assert_allclose(grid.cost[across], 2 * np.exp(-100 / (2 * mean)))
    np.testing.assert_allclose(grid.cost[~across], 2.0)


@pytest.mark.parametrize("method", ["icm", "expansion"])
def test_noise_is_removed(method, disc, colours):
    mask = disc((50, 60), (24, 28), 15)
    values = 90 + 70 * mask + np.random.default_rng(0).normal(0, 22, mask.shape)
    image = colours(values.clip(0, 255))
    found = MRF(k=2, beta=4.0, contrast=False, method=method, whole=True).regions(image)
    plain = MRF(k=2, beta=0.0, method=method, whole=True).regions(image)
    right, alone = (max((x == mask).mean(), (x != mask).mean()) for x in (found, plain))
    assert right > 0.97 > alone


def test_small_and_plain_images(colours):
    for size in ((1, 1), (1, 6), (5, 4)):
        assert (MRF().regions(colours(np.full(size, 9))) == 0).all()
    two = MRF(k=9, min_size=0, beta=0.1).regions(colours([[0, 0, 255], [0, 0, 255]]))
    assert (two == [[0, 0, 1], [0, 0, 1]]).all()
