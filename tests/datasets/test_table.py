"""The one look-up table: values and colours to class indices."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyseg.datasets.table import ClassTable
from pyseg.errors import ImageError, LabelError

HERE = Path("a.png")


def test_values_are_looked_up_one_by_one(rng):
    classes = [f"class {k}" for k in range(40)]
    values = rng.choice(65536, 60, replace=False).tolist()
    ids = {value: int(rng.integers(0, 40)) if k % 4 else 255 for k, value in enumerate(values)}
    ids.setdefault(255, 255)
    drawn = rng.choice([*ids], (37, 53))
    found = ClassTable(classes, ids=ids).of_ids(torch.from_numpy(drawn), HERE)
    assert found.dtype == torch.uint8
    assert found.tolist() == [[ids[value] for value in row] for row in drawn.tolist()]


def test_colours_are_looked_up_one_by_one(rng, tmp_path):
    classes = [f"class {k}" for k in range(30)]
    codes = rng.choice(1 << 24, 40, replace=False)
    palette = [(int(c >> 16), int(c >> 8 & 255), int(c & 255)) for c in codes]
    colours = {colour: k if k < 30 else 255 for k, colour in enumerate(palette)}
    places = rng.integers(0, 40, (29, 31))
    table = ClassTable(classes, colours=colours)
    pixels = np.array(palette, np.uint8)[places]
    wanted = np.where(places < 30, places, 255)
    assert np.array_equal(table.of_colours(pixels, HERE).numpy(), wanted)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    alpha = np.concatenate([pixels, rng.integers(0, 256, (29, 31, 1), dtype=np.uint8)], 2)
    Image.fromarray(alpha).save(tmp_path / "rgba.png")
    indexed = Image.fromarray(places.astype(np.uint8))
    indexed.putpalette([value for colour in palette for value in colour])
    indexed.save(tmp_path / "p.png")
    assert np.array_equal(table.read(tmp_path / "rgb.png").numpy(), wanted)
    assert np.array_equal(table.read(tmp_path / "rgba.png").numpy(), wanted)
    by_colour = ClassTable(classes, colours=colours, by_colour=True)
    assert np.array_equal(by_colour.read(tmp_path / "p.png").numpy(), wanted)
    with pytest.raises(LabelError, match="30, 31"):  # indices are ids, of which there are 30
        table.read(tmp_path / "p.png")
    with pytest.raises(ImageError, match="colours instead of one class id"):
        ClassTable(classes).read(tmp_path / "rgb.png")
    Image.fromarray(pixels).save(tmp_path / "labels.jpg")
    with pytest.raises(ImageError, match="is a JPEG, whose compression changes colours"):
        table.read(tmp_path / "labels.jpg")


PALETTE = {(0, 0, 0): 255, (200, 0, 0): 0, (0, 200, 0): 1, (0, 0, 200): 2}


@pytest.mark.parametrize(
    ("colours", "counts", "parts"),
    [
        (
            [(201, 2, 0), (0, 190, 0)],
            [3, 1],
            [
                "4 pixels (4.0%) have 2 colours that are not in the palette of 4",
                "(201, 2, 0) in 3, nearest (200, 0, 0) red; (0, 190, 0) in 1, nearest",
                "another data set",
            ],
        ),
        (
            [(202, 3, 1)],
            [7],
            ["7 pixels (7.0%) have 1 colour that is not in", "red. All are near", "with losses"],
        ),
        ([(2, 2, 2)], [1], ["(2, 2, 2) in 1, nearest (0, 0, 0) void"]),
        (
            [(40 + k, 200 - k, k) for k in range(80)],
            [1] * 80,
            ["80 pixels (80.0%) have 80 colours", "and 76 more. So many colours suggest"],
        ),
    ],
)
def test_colours_that_are_not_in_the_palette(colours, counts, parts):
    pixels = np.zeros((10, 10, 3), np.uint8)
    drawn = np.repeat(np.array(colours, np.uint8), counts, axis=0)
    pixels.reshape(-1, 3)[: len(drawn)] = drawn
    with pytest.raises(LabelError) as error:
        ClassTable(("red", "green", "blue"), colours=PALETTE).of_colours(pixels, HERE)
    for part in ("a.png: ", *parts):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("classes", "options", "values", "parts"),
    [
        (3, {}, [0, 1, 3], ["values 3 are", "3 classes, 0 to 2, and 255 is void", "start at 1"]),
        (19, {}, [7, 26, 33], ["values 26, 33 are", "Cityscapes ids (0 to 33)"]),
        (150, {}, [0, 160, 170], ["grey values of a colour-coded map"]),
        (19, {}, [26001, 7], ["values 26001 are", "instance or panoptic ids"]),
        (19, {}, range(60), ["photograph", "19, 20, 21, 22, 23, 24, 25, 26, …"]),
        (2, {"ids": {1: 0, 2: 1, 0: 255}}, [0, 3], ["2 classes, of 3 ids from 0 to 2"]),
        (2, {"ids": {}, "colours": {(1, 1, 1): 0}}, [0], ["the 2 classes are told by colours"]),
        (2, {"void": (7, 300)}, [7, 300, 8], ["values 8 are"]),
    ],
)
def test_values_out_of_range_say_the_likely_cause(classes, options, values, parts):
    table = ClassTable([f"class {k}" for k in range(classes)], **options)
    with pytest.raises(LabelError) as error:
        table.of_ids(torch.tensor([[*values]]), HERE)
    for part in ("a.png: label ", *parts):
        assert part in str(error.value)


def test_negative_values_and_an_impossible_void(rng):
    table = ClassTable(("a", "b"))
    with pytest.raises(LabelError, match=r"values -1 are no class ids"):
        table.of_ids(torch.tensor([[0, -1]], dtype=torch.int32), HERE)
    with pytest.raises(ValueError, match="void ids must be 0 to 65535"):
        ClassTable(("a",), void=(70000,))
