"""Thresholds against the formulas, computed value by value."""

import numpy as np
import pytest
from pyseg_classical.thresholds import (
    Hysteresis,
    LocalThreshold,
    MultiOtsu,
    Otsu,
    Threshold,
    Triangle,
)

import pyseg
from pyseg.errors import ImageError, SpecError


@pytest.fixture
def picture(colours):
    chance = np.random.default_rng(3)
    values = np.where(chance.random((40, 50)) < 0.3, 170, 60) + chance.normal(0, 12, (40, 50))
    return values.clip(0, 255).astype(np.uint8)


def between(values, limits):
    """Variance between the classes that thresholds make, times the pixels squared."""
    parts = np.digitize(values, limits, right=True)
    return sum(
        (parts == k).sum() * (values[parts == k].mean() - values.mean()) ** 2
        for k in np.unique(parts)
    )


def test_global_threshold(picture, colours):
    assert (Threshold(value=100).foreground(colours(picture)) == (picture > 100)).all()
    assert (Threshold(value=100, dark=True).foreground(colours(picture)) == (picture <= 100)).all()


def test_otsu_maximises_the_variance_between(picture, colours):
    scores = {t: between(picture, [t]) for t in range(picture.min(), picture.max())}
    best = max(scores.values())
    mask = Otsu().foreground(colours(picture))
    chosen = picture[~mask].max()
    assert scores[chosen] == pytest.approx(best)
    assert (Otsu(dark=True).foreground(colours(picture)) == ~mask).all()


def test_multi_otsu_maximises_the_variance_between(colours):
    chance = np.random.default_rng(0)
    values = chance.choice([20, 24, 90, 95, 180, 190], (30, 30), p=[0.2, 0.2, 0.3, 0.1, 0.1, 0.1])
    parts = MultiOtsu(classes=3, whole=True).regions(colours(values))
    best = max(between(values, [a, b]) for a in range(20, 190) for b in range(a + 1, 190))
    limits = [values[parts == k].max() for k in (0, 1)]
    assert between(values, limits) == pytest.approx(best)
    assert len(np.unique(parts)) == 3


def test_multi_otsu_of_fewer_values_than_classes(colours):
    values = np.array([[3, 3, 200], [3, 90, 200]])
    found = MultiOtsu(classes=5, whole=True).regions(colours(values))
    assert (found == [[0, 0, 2], [0, 1, 2]]).all()
    assert (MultiOtsu().regions(colours(np.full((3, 4), 9))) == 0).all()
    with pytest.raises(ValueError, match="classes must be from 2 to 5, got 6"):
        MultiOtsu(classes=6)


def test_triangle_is_farthest_from_the_line(colours):
    counts = np.zeros(256, int)
    counts[20:120] = np.round(1000 * np.exp(-np.arange(100) / 12)) + 1
    values = np.repeat(np.arange(256), counts)
    mask = Triangle().foreground(colours(values[None]))
    peak, end = counts.argmax(), values.max()
    x = np.arange(peak, end + 1)
    # Distance below the line from (peak, its count) to (end, 0), both scaled to 1.
    below = 1 - (x - peak) / (end - peak) - counts[x] / counts[peak]
    assert abs(values[~mask[0]].max() - x[below.argmax()]) <= 1


@pytest.mark.parametrize("method", ["mean", "median", "niblack", "sauvola"])
def test_local_threshold_by_its_formula(method, picture, colours):
    found = LocalThreshold(method=method, block_size=7, offset=4, k=0.3).level(picture)
    padded = np.pad(picture.astype(float), 3, mode="symmetric")
    inner = (slice(3, -3), slice(3, -3))  # borders are the library's own
    for y, x in ((10, 12), (3, 3), (30, 44)):
        block = padded[y : y + 7, x : x + 7]
        mean, deviation = block.mean(), block.std()
        expected = {
            "mean": mean - 4,
            "median": np.median(block) - 4,
            "niblack": mean - 0.3 * deviation,
            "sauvola": mean * (1 + 0.3 * (deviation / 127.5 - 1)),
        }[method]
        assert found[y, x] == pytest.approx(expected)
    assert found[inner].shape == (34, 44)


def test_local_threshold_in_uneven_light(colours):
    light = np.linspace(60, 220, 120)[None].repeat(60, 0)
    ink = np.zeros(light.shape, bool)
    ink[::12, 4:-4] = ink[1::12, 4:-4] = True
    image = colours(light - 40 * ink)
    local = LocalThreshold(block_size=21, offset=15, dark=True).foreground(image)
    assert (local == ink)[3:-3, 3:-3].all()
    assert (Otsu(dark=True).foreground(image) == ink).mean() < 0.8


def test_hysteresis_keeps_what_hangs_together(colours):
    values = np.zeros((5, 12))
    values[1, 1:8] = 100
    values[1, 3] = 200  # strong: keeps its row
    values[3, 1:8] = 100
    values[3, 10] = 200
    found = Hysteresis(low=50, high=150).foreground(colours(values))
    expected = np.zeros((5, 12), bool)
    expected[1, 1:8] = expected[3, 10] = True
    assert (found == expected).all()
    with pytest.raises(ValueError, match="low must be at most high=10, got 20"):
        Hysteresis(low=20, high=10)


@pytest.mark.parametrize("made", [Otsu, Triangle, LocalThreshold, Hysteresis])
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (1, 5)])
def test_one_colour_has_no_foreground(made, size, colours):
    assert not made().foreground(colours(np.full(size, 180))).any()


def test_wide_and_grey_files_are_read_alike(tmp_path):
    """16-bit values are scaled to 8, and a grey file is a colour file of equal channels."""
    from PIL import Image

    values = np.random.default_rng(0).integers(0, 256, (20, 30)).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "grey.png")
    Image.fromarray(np.repeat(values[:, :, None], 3, 2)).save(tmp_path / "colour.png")
    Image.fromarray(values.astype(np.uint16) * 257).save(tmp_path / "wide.png")
    model = pyseg.build("otsu")
    first, *others = (model(tmp_path / f"{n}.png").labels for n in ("grey", "colour", "wide"))
    assert all((first == other).all() for other in others)
    with pytest.raises(ImageError, match="nan"):
        model(np.full((4, 4, 3), np.nan))


def test_refusals_come_when_it_is_built():
    with pytest.raises(SpecError, match="value must be from 0 to 255, got 300"):
        pyseg.build("threshold(value=300)")
    with pytest.raises(SpecError, match="block_size must be odd and at least 3, got 10"):
        pyseg.build("local_threshold(block_size=10)")
    with pytest.raises(SpecError, match="option method must be"):
        pyseg.build("local_threshold(method='otsu')")
