import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pyseg.types import Instances, Segment, Segmentation, Segments
from pyseg.visual import error_map, overlay, reliability_diagram, side_by_side

PALETTE = ((200, 0, 0), (0, 200, 0), (0, 0, 200))
CLASSES = ("building", "tree", "sky")
HEIGHT, WIDTH = 120, 160


@pytest.fixture
def labels():
    labels = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    labels[:40] = 2
    labels[100:] = 255
    return labels


@pytest.fixture
def prediction(labels):
    image = torch.full((3, HEIGHT, WIDTH), 100, dtype=torch.uint8)
    blank = Segmentation((HEIGHT, WIDTH), CLASSES, image=image, palette=PALETTE)
    return blank.with_labels(labels)


def pixels(picture):
    return np.asarray(picture).astype(int)


def swatches(picture, below):
    """Colours of the legend's squares: those that fill many pixels, paper and ink aside."""
    strip = pixels(picture)[below:].reshape(-1, 3)
    colours, counts = np.unique(strip, axis=0, return_counts=True)
    return {tuple(c.tolist()) for c, n in zip(colours, counts, strict=True) if n > 60} - {
        (255, 255, 255),
        (160, 160, 160),
        (32, 32, 32),
    }


def test_overlay_paints_classes_and_leaves_void(prediction):
    picture = overlay(prediction)
    assert picture.mode == "RGB" and picture.width == WIDTH and picture.height > HEIGHT
    got = pixels(picture)
    assert got[50, 80].tolist() == [150, 50, 50]
    assert got[10, 80].tolist() == [50, 50, 150]
    assert got[110, 80].tolist() == [100, 100, 100]
    assert pixels(overlay(prediction, 1.0))[50, 80].tolist() == [200, 0, 0]
    assert pixels(overlay(prediction, 0.0))[50, 80].tolist() == [100, 100, 100]
    assert np.array_equal(pixels(prediction.overlay(0.3)), pixels(overlay(prediction, 0.3)))


def test_overlay_of_plain_data(prediction, labels, tmp_path):
    want = pixels(prediction.overlay())
    for image in (prediction.image, prediction.image.permute(1, 2, 0).numpy()):
        for values in (labels, labels.numpy(), labels.short().numpy()):
            got = overlay(image, labels=values, classes=CLASSES, palette=PALETTE)
            assert np.array_equal(pixels(got), want)
    Image.fromarray(prediction.image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    got = overlay(tmp_path / "a.png", labels=labels, classes=CLASSES, palette=PALETTE)
    assert np.array_equal(pixels(got), want)
    unnamed = overlay(prediction.image, labels=labels)  # 0 and 2 of VOC's colours, 255 void
    assert pixels(unnamed)[10, 80].tolist() == [50, 114, 50]
    assert pixels(unnamed)[110, 80].tolist() == [100, 100, 100]
    table = torch.zeros(HEIGHT, WIDTH, dtype=torch.int32)
    table[:, :50] = 7
    segments = Segments.from_map(table, {7: 1})
    got = pixels(overlay(prediction.image, 1.0, segments=segments, palette=PALETTE))
    assert got[60, 20].tolist() == [0, 200, 0] and got[60, 130].tolist() == [100, 100, 100]
    with pytest.raises(
        ValueError, match=r"labels must be \[120, 160\] as the image, got \[9, 160\]"
    ):
        overlay(prediction.image, labels=labels[:9])
    with pytest.raises(ValueError, match=r"segments.map must be \[120, 160\]"):
        small = Segments.from_map(table[:9], {7: 1})
        overlay(prediction.image, labels=labels, segments=small)
    assert overlay(prediction.image).size == (WIDTH, HEIGHT)


def test_legend_names_the_classes_present_and_no_others(prediction, labels):
    assert swatches(overlay(prediction), HEIGHT) == {(200, 0, 0), (0, 0, 200)}
    only_tree = prediction.with_labels(torch.ones_like(labels))
    assert swatches(overlay(only_tree), HEIGHT) == {(0, 200, 0)}
    void = prediction.with_labels(torch.full_like(labels, 255))
    assert overlay(void).size == (WIDTH, HEIGHT)


def test_void_of_more_than_255_classes(prediction, labels):
    names = tuple(f"class {k}" for k in range(300))
    palette = tuple((k % 7, k % 5, k % 3) for k in range(300))
    wide = labels.short()
    wide[labels == 255] = -1
    wide[:20] = 255
    many = replace(prediction, classes=names, palette=palette, _labels=wide)
    got = pixels(overlay(many, 1.0))
    assert got[110, 80].tolist() == [100, 100, 100] and got[10, 80].tolist() == [255 % 7, 0, 0]


def test_legend_of_long_names_fits(prediction, labels):
    names = tuple(f"a rather long name of class {k}" for k in range(30))
    many = replace(
        prediction,
        classes=names,
        palette=None,
        _labels=(torch.arange(HEIGHT * WIDTH) % 30).reshape(HEIGHT, WIDTH).to(torch.uint8),
    )
    picture = overlay(many)
    assert picture.width >= WIDTH and picture.height > HEIGHT + 30 * 11
    margin = pixels(picture)[HEIGHT:, -2:]
    assert (margin == 255).all(), "text runs off the canvas"


def test_opacity_and_image_are_checked(prediction):
    with pytest.raises(ValueError, match="opacity"):
        overlay(prediction, 1.5)
    with pytest.raises(ValueError, match="needs the image"):
        overlay(replace(prediction, image=None))


def test_segments_get_borders_and_shades(prediction):
    table = torch.zeros(HEIGHT, WIDTH, dtype=torch.int32)
    table[:, :50], table[:, 50:100] = 7, 9
    items = (Segment(7, 0, 1.0, 50 * HEIGHT), Segment(9, 0, 1.0, 50 * HEIGHT))
    picture = pixels(overlay(prediction.with_segments(Segments(table, items)), 1.0))
    first, second = picture[60, 20], picture[60, 80]
    assert first.tolist() == [200, 0, 0] and second.tolist() != first.tolist()
    assert second[0] > second[1] and second[0] > second[2]  # still reddish
    assert picture[60, 130].tolist() == [100, 100, 100]  # void
    assert picture[60, 49].tolist() == picture[60, 99].tolist() == [255, 255, 255]
    assert picture[60, 75].tolist() != [255, 255, 255]


def test_instances_are_drawn_over_the_image_alone():
    image = torch.full((3, HEIGHT, WIDTH), 100, dtype=torch.uint8)
    masks = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    masks[0, 40:90, 20:70] = True
    masks[1, 40:90, 60:120] = True
    instances = Instances(
        torch.tensor([[20.0, 40.0, 70.0, 90.0], [60.0, 40.0, 120.0, 90.0]]),
        masks,
        torch.tensor([0.9, 0.6]),
        torch.tensor([1, 2]),
    )
    result = Segmentation(
        (HEIGHT, WIDTH), CLASSES, image=image, palette=PALETTE, instances=instances
    )
    picture = overlay(result)
    got = pixels(picture)
    assert got[80, 30, 1] > got[80, 30, 0] + 20  # green
    assert got[80, 100, 2] > got[80, 100, 0] + 20  # blue
    assert got[80, 67, 1] > got[80, 67, 0] + 20  # the more certain one is on top
    assert got[10, 10].tolist() == [100, 100, 100]
    assert swatches(picture, HEIGHT) == {(0, 200, 0), (0, 0, 200)}
    none = Instances(torch.zeros(0, 4), masks[:0], torch.zeros(0), torch.zeros(0).long())
    nothing = replace(result, instances=none)
    assert np.array_equal(pixels(overlay(nothing)), np.full((HEIGHT, WIDTH, 3), 100))


def test_side_by_side():
    tall = torch.full((3, 40, 30), 10, dtype=torch.uint8)
    wide = Image.new("RGB", (60, 20), (200, 0, 0))
    picture = side_by_side([tall, wide], ["first", "second"])
    plain = side_by_side([tall, wide])
    assert plain.height == 80 and plain.width >= 120  # 30 x 40 is scaled to the width 60
    assert picture.height > plain.height
    got = pixels(plain)
    assert got[40, 30].tolist() == [10, 10, 10] and got[10, -30].tolist() == [200, 0, 0]
    assert got[60, -30].tolist() == [255, 255, 255]
    with pytest.raises(ValueError, match="one per image"):
        side_by_side([tall, wide], ["first"])
    with pytest.raises(ValueError, match="at least one"):
        side_by_side([])


def test_error_map(labels):
    target = labels.clone()
    guess = labels.clone()
    guess[0:10] = 1  # 10 of 100 valid rows
    guess[50:55] = 255  # 5
    guess[110:] = 1  # no ground truth there
    picture = error_map(guess, target)
    got = pixels(picture)
    assert picture.width >= WIDTH
    offset = (picture.width - WIDTH) // 2
    colours = {
        name: tuple(got[row, offset + 80])
        for name, row in (("wrong", 5), ("correct", 30), ("missed", 52), ("ignored", 115))
    }
    assert len(set(colours.values())) == 4
    assert tuple(got[105, offset + 80]) == colours["ignored"]
    area = got[:HEIGHT, offset : offset + WIDTH].reshape(-1, 3)
    count = {name: int((area == np.array(c)).all(1).sum()) for name, c in colours.items()}
    assert count == {
        "wrong": 10 * WIDTH,
        "correct": 85 * WIDTH,
        "missed": 5 * WIDTH,
        "ignored": 20 * WIDTH,
    }
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    assert pixels(error_map(guess, target, image))[30, offset + 80].tolist() == [140] * 3
    with pytest.raises(ValueError, match="must both be"):
        error_map(guess[:5], target)
    with pytest.raises(ValueError, match="image must be"):
        error_map(guess, target, image[:, :5])


def test_reliability_diagram():
    """Bars reach where accuracy says, the gap to where confidence says; empty bins stay empty."""
    bins = {
        "lower": [0.0, 0.25, 0.5, 0.75],
        "confidence": [math.nan, 0.3, 0.6, 0.9],
        "accuracy": [math.nan, 0.4, 0.6, 0.5],
        "pixels": [0, 100, 100, 200],
    }
    pixels = np.asarray(reliability_diagram(bins, 400)).astype(int)
    ink = (pixels == (32, 32, 32)).all(2)
    top, bottom = np.flatnonzero(ink.mean(1) > 0.5)[:2]
    columns = np.flatnonzero(ink[top:bottom].mean(0) > 0.9)
    left, side = columns[0], columns[-1] - columns[0]
    assert abs(side - (bottom - top)) <= 1

    def height(k, colour):
        x = left + round((k + 0.8) * side / 4)  # beside the diagonal
        return (pixels[top:bottom, x] == colour).all(1).sum() / side

    for k, (blue, red) in enumerate([(0, 0), (0.3, 0.1), (0.6, 0), (0.5, 0.4)]):
        assert height(k, (66, 113, 174)) == pytest.approx(blue, abs=0.03), k
        assert height(k, (226, 118, 118)) == pytest.approx(red, abs=0.03), k
    empty = {**bins, "pixels": [0, 0, 0, 0], "accuracy": [math.nan] * 4}
    assert not (np.asarray(reliability_diagram(empty)) == (66, 113, 174)).all(2).any()
    with pytest.raises(ValueError, match="size"):
        reliability_diagram(bins, 50)
