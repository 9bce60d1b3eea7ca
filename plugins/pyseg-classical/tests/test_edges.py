"""Edges, Hough transforms and watersheds on drawings whose answer is known."""

import numpy as np
import pytest
from pyseg_classical.edges import (
    Canny,
    EdgeFill,
    LaplacianOfGaussian,
    Prewitt,
    Sobel,
    link,
    strength,
    zero_crossings,
)
from pyseg_classical.hough import HoughCircles, HoughLines
from pyseg_classical.watershed import SLIC, QuickShift, Watershed, minima
from scipy import ndimage

import pyseg
from pyseg.errors import SpecError

ALL = [Canny, Sobel, Prewitt, LaplacianOfGaussian]


@pytest.fixture
def square():
    mask = np.zeros((60, 80), bool)
    mask[15:45, 20:60] = True
    return mask


@pytest.mark.parametrize("operator", ["sobel", "prewitt"])
def test_gradient_by_its_masks(operator, colours):
    values = np.random.default_rng(0).integers(0, 256, (12, 15))
    across = np.array([1, 2, 1] if operator == "sobel" else [1, 1, 1])
    kernel = np.outer(across, [-1, 0, 1]) / across.sum()
    exact = values / 255
    x, y = (ndimage.correlate(exact, k, mode="reflect") for k in (kernel, kernel.T))
    expected = np.hypot(x, y) / np.sqrt(2)
    found = strength(colours(values), operator)
    np.testing.assert_allclose(found[1:-1, 1:-1], expected[1:-1, 1:-1], atol=1e-9)


def test_a_step_of_colour_alone_has_a_gradient():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4, 0] = 100
    image[:, 4:, 2] = 100
    assert strength(image).max() > 0.1


def test_zero_crossings_lie_on_the_step(colours):
    values = np.where(np.arange(40) < 17, 50, 200)[None].repeat(30, 0)
    found = zero_crossings(colours(values), 2.0, 0.1)
    columns = np.flatnonzero(found.any(0))
    assert found.any(1).all() and set(columns) <= {16, 17}
    assert not zero_crossings(colours(np.full((9, 9), 7)), 2.0, 0.1).any()


def test_link_joins_ends_that_point_at_each_other():
    edges = np.zeros((20, 40), bool)
    edges[5, 2:15] = edges[5, 20:38] = True  # a gap of 5
    edges[12, 2:15] = True
    edges[14:19, 19] = True  # near, but it runs another way
    expected = edges.copy()
    expected[5] = edges[5] | (np.arange(40) >= 15) & (np.arange(40) < 20)
    assert (link(edges, 7) == expected).all()
    assert (link(edges, 4) == edges).all() and (link(edges, 0) == edges).all()
    assert not link(np.zeros((5, 5), bool), 3).any()


@pytest.mark.parametrize("made", ALL)
def test_edges_part_a_square_from_its_ground(made, square, colours, iou):
    found = made(sigma=1.5).regions(colours(40 + 150 * square))
    assert len(np.unique(found)) == 2
    assert iou(found == found[30, 40], square) > 0.9


@pytest.mark.parametrize("made", ALL)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 9)])
def test_one_colour_is_one_region(made, size, colours):
    assert (made().regions(colours(np.full(size, 80))) == 0).all()


@pytest.mark.parametrize("detector", ["canny", "sobel", "prewitt", "log"])
def test_fill_finds_closed_objects_only(detector, square, colours, iou):
    values = 40 + 150 * square
    values[3:5, 5:75] = 200  # a line that encloses nothing of size
    found = EdgeFill(detector=detector, closing=1, min_size=300).foreground(colours(values))
    assert iou(found, square) > 0.85


def test_refusals_of_edges():
    with pytest.raises(SpecError, match="sigma must be above 0 for canny"):
        pyseg.build("canny(sigma=0)")
    with pytest.raises(SpecError, match="low must be at most high"):
        pyseg.build("sobel(low=0.5, high=0.1)")
    with pytest.raises(SpecError, match="low is no option of detector='log'"):
        pyseg.build("edge_fill(detector='log', low=0.1)")


def test_hough_lines_quarter_an_image(colours):
    rows, columns = np.ogrid[:60, :80]
    values = 40 + 60 * (rows >= 25) + 100 * (columns >= 50)
    model = HoughLines(count=2, sigma=1.0)
    found = model.regions(colours(values))
    lines = model.lines(colours(values))
    # x = 49.5 at angle 0, y = 24.5 at a right angle.
    upright = lines[np.abs(lines[:, 0]).argmin()]
    level = lines[np.abs(lines[:, 0]).argmax()]
    assert abs(upright[0]) < 0.02 and abs(upright[1] - 49.5) <= 1
    assert abs(abs(level[0]) - np.pi / 2) < 0.02 and abs(abs(level[1]) - 24.5) <= 1
    assert len(np.unique(found)) == 4
    truth = 2 * (rows >= 25) + (columns >= 50)
    pairs = len(np.unique(truth * 4 + np.unique(found, return_inverse=True)[1].reshape(60, 80)))
    agree = sum(max((found[truth == k] == v).sum() for v in np.unique(found)) for k in range(4))
    assert pairs <= 9 and agree / truth.size > 0.95
    assert (model.regions(colours(np.zeros((5, 5)))) == 0).all()


def test_hough_circles(colours, disc, iou):
    wanted = [((30, 30), 14), ((45, 80), 20), ((75, 25), 11)]
    masks = [disc((100, 110), *circle) for circle in wanted]
    model = HoughCircles(min_radius=8, max_radius=25, votes=0.5, sigma=1.0)
    image = colours(30 + 170 * np.any(masks, 0))
    circles = model.circles(image)
    assert len(circles) == 3
    for (centre, radius), mask in zip(wanted, masks, strict=True):
        near = circles[np.abs(circles[:, :2] - centre).sum(1).argmin()]
        assert np.abs(near[:3] - (*centre, radius)).max() <= 1.5
        found = model.regions(image)
        assert iou(found == found[centre], mask) > 0.85
    assert (model.regions(colours(np.zeros((9, 9)))) == -1).all()


def test_hough_refuses_what_would_not_fit(colours):
    with pytest.raises(ValueError, match=r"hough_circles.*GiB, more than 2; narrow"):
        HoughCircles(min_radius=1, max_radius=9999).circles(colours(np.zeros((300, 300))))
    with pytest.raises(SpecError, match="max_radius must be 10 or more, got 5"):
        pyseg.build("hough_circles(max_radius=5)")


def test_watershed_floods_from_deep_minima(colours):
    x = np.arange(90)
    values = np.where((x // 30) % 2, 180, 60)[None].repeat(40, 0)
    values = values + np.random.default_rng(0).normal(0, 2, values.shape)
    found = Watershed(h=20, sigma=2).regions(colours(values.clip(0, 255)))
    assert len(np.unique(found)) == 3
    assert all(len(np.unique(found[:, k : k + 20])) == 1 for k in (5, 35, 65))
    assert len(np.unique(Watershed(h=0.0, sigma=0).regions(colours(values)))) > 50


def test_minima_of_a_depth():
    relief = np.array([[5.0, 1, 3, 0, 9, 2, 2.5, 2, 9, 8]])
    assert (minima(relief, 0) > 0).tolist() == [[0, 1, 0, 1, 0, 1, 0, 1, 0, 1]]
    # Of two that are as deep as each other, with a low pass between, one is made.
    assert minima(relief, 1).tolist() == [[0, 1, 0, 2, 0, 3, 3, 3, 0, 0]]
    assert (minima(relief, 2.5) > 0).tolist() == [[0, 0, 0, 1, 0, 1, 1, 1, 0, 0]]
    assert (minima(relief, 9) == 1).all()


def test_watershed_from_seeds(colours, square):
    image = colours(40 + 150 * square)
    found = Watershed(markers="seeds", seeds=((30, 40), (2, 2))).regions(image)
    border = ndimage.binary_dilation(square) & ~ndimage.binary_erosion(square)
    assert ((found == found[30, 40]) == square)[~border].all()
    with pytest.raises(ValueError, match=r"seeds: \(60, 2\) is outside the image of 60 x 80"):
        Watershed(markers="seeds", seeds=((60, 2),)).regions(image)
    with pytest.raises(ValueError, match=r"seeds: \(3, 2\) is given twice"):
        Watershed(markers="seeds", seeds=((3, 2), (3, 2))).regions(image)
    with pytest.raises(SpecError, match="markers='seeds' needs seeds="):
        pyseg.build("watershed(markers='seeds')")


def test_watershed_parts_discs_that_touch(colours, disc):
    one, other = disc((60, 90), (30, 32), 20), disc((60, 90), (30, 62), 18)
    found = Watershed(markers="distance", h=2).regions(colours(200 * (one | other)))
    assert sorted(np.unique(found)) == [-1, 0, 1]
    assert found[30, 25] != found[30, 70] and (found[~(one | other)] == -1).all()


def test_superpixels_are_about_as_many(colours):
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    image = ndimage.zoom(image[:6, :8], (10, 10, 1), order=1)
    assert 30 < len(np.unique(SLIC(count=50).regions(image))) < 70
    assert (SLIC(count=3).regions(image[:1, :6]) == [[0, 0, 1, 1, 2, 2]]).all()
    grid = Watershed(markers="grid", count=20, compactness=0.01).regions(image)
    assert 15 < len(np.unique(grid)) < 30
    few, many = (len(np.unique(QuickShift(max_distance=d).regions(image))) for d in (20, 3))
    assert few < many


def test_quickshift_says_what_it_can_do(colours):
    image = np.broadcast_to(np.zeros(3, np.uint8), (2001, 2001, 3))
    with pytest.raises(ValueError, match=r"at most 4000000 pixels, got 2001 x 2001.*slic"):
        QuickShift().regions(image)
