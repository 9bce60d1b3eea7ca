"""Contours find shapes of which the place is known."""

import numpy as np
import pytest
from pyseg_classical.contours import (
    ChanVese,
    DeformableTemplate,
    GeodesicContour,
    MorphologicalChanVese,
    Snake,
)

import pyseg
from pyseg.errors import SpecError


@pytest.fixture
def scene(disc, colours):
    mask = disc((90, 100), (48, 46), 22)
    chance = np.random.default_rng(0)
    values = 60 + 120 * mask + chance.normal(0, 4, mask.shape)
    return colours(values.clip(0, 255)), mask


@pytest.mark.parametrize(
    "model",
    [
        Snake(radius=0.42),
        GeodesicContour(iterations=60, edge=300),
        ChanVese(),
        MorphologicalChanVese(),
        DeformableTemplate(starts=1),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_disc_is_found(model, scene, iou):
    image, mask = scene
    assert iou(model.foreground(image), mask) > 0.9


def test_geodesic_contour_expands(scene, iou):
    image, mask = scene
    model = GeodesicContour(radius=0.08, balloon=1, iterations=60, edge=300)
    assert iou(model.foreground(image), mask) > 0.85


@pytest.mark.parametrize("made", [ChanVese, MorphologicalChanVese])
def test_level_sets_say_which_side_is_meant(made, scene):
    image, mask = scene
    light, dark = made().foreground(image), made(dark=True).foreground(image)
    assert (light == ~dark).all() and light[mask].mean() > 0.95
    assert not made().foreground(np.full((9, 9, 3), 70, np.uint8)).any()


@pytest.fixture
def peer(monkeypatch):
    """scikit-image's morphological snakes, from the state that they have after import."""
    from skimage.segmentation import morphsnakes

    first = morphsnakes._fcycle(
        [
            lambda u: morphsnakes.sup_inf(morphsnakes.inf_sup(u)),
            lambda u: morphsnakes.inf_sup(morphsnakes.sup_inf(u)),
        ]
    )
    monkeypatch.setattr(morphsnakes, "_curvop", first)
    return morphsnakes


@pytest.mark.parametrize("smoothing", [0, 1, 3])
def test_morphological_contours_equal_the_libraries(smoothing, scene, peer):
    image, _ = scene
    values = (image[:, :, 0]) / 255.0
    level = peer.morphological_chan_vese(values, 15, "checkerboard", smoothing).astype(bool)
    found = MorphologicalChanVese(iterations=15, smoothing=smoothing).foreground(image)
    assert (found == level).all() or (found == ~level).all()


def test_geodesic_contour_equals_the_libraries(scene, peer):
    image, _ = scene
    model = GeodesicContour(iterations=25, edge=300)
    g = peer.inverse_gaussian_gradient(image[:, :, 0] / 255.0, 300, 2.0)
    start = model._inside(image).astype(np.int8)
    level = peer.morphological_geodesic_active_contour(g, 25, start, balloon=-1)
    assert (model.foreground(image) == level.astype(bool)).all()


def test_chan_vese_lowers_the_energy(scene):
    """Piecewise constant: no pixel far from the contour fits the other side's mean better."""
    image, _ = scene
    values = image[:, :, 0].astype(float)
    found = ChanVese(mu=0.05).foreground(image)
    inside, outside = values[found].mean(), values[~found].mean()
    better = np.abs(values - inside) < np.abs(values - outside)
    assert (better == found).mean() > 0.99


def test_template_fits_a_turned_rectangle(colours, iou):
    rows, columns = np.mgrid[:80, :100]
    angle = 0.4
    along = (columns - 55) * np.cos(angle) + (rows - 38) * np.sin(angle)
    across = -(columns - 55) * np.sin(angle) + (rows - 38) * np.cos(angle)
    mask = (abs(along) <= 26) & (abs(across) <= 16)
    model = DeformableTemplate(shape="rectangle", modes=1, starts=3)
    assert iou(model.foreground(colours(50 + 150 * mask)), mask) > 0.85
    assert not model.foreground(colours(np.full((30, 30), 9))).any()
    assert not model.foreground(colours(np.zeros((1, 1)))).any()


def test_refusals_of_contours(colours):
    with pytest.raises(ValueError, match="snake takes images from 4 x 4 pixels on, got 1 x 9"):
        Snake().foreground(colours(np.zeros((1, 9))))
    with pytest.raises(SpecError, match="centre must be from 0 to 1, got 40"):
        pyseg.build("snake(centre=(40, 0.5))")
    with pytest.raises(SpecError, match=r"max_size must be above min_size=0.3, got 0.2"):
        pyseg.build("deformable_template(min_size=0.3, max_size=0.2)")
    with pytest.raises(SpecError, match="balloon must be"):
        pyseg.build("geodesic_contour(balloon=3)")
