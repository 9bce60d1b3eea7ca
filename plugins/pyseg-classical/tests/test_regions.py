"""The two forms of a method, and the pieces that regions are made of."""

import numpy as np
import pytest
import torch
from pyseg_classical.regions import (
    RegionModel,
    TwoClassModel,
    adjacent,
    connected,
    grey,
    joined,
    means,
    merge_small,
    renumbered,
)
from pyseg_classical.snap import Snap

import pyseg
from pyseg import testing
from pyseg.errors import SpecError, UnknownName


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(-1, 4, (13, 17))


class Quarters(RegionModel):
    def regions(self, image):
        height, width = image.shape[:2]
        rows, columns = np.ogrid[:height, :width]
        return np.where(rows < 2, -5, 7 + 10 * (rows >= height // 2) + (columns >= width // 2))


class Bright(TwoClassModel):
    def foreground(self, image):
        return grey(image) > 127


def test_regions_become_segments_in_the_order_of_rows():
    image = torch.zeros(3, 8, 6, dtype=torch.uint8)
    result = Quarters().predict([image])[0]
    expected = torch.zeros(8, 6, dtype=torch.int32)
    expected[2:4, :3], expected[2:4, 3:], expected[4:, :3], expected[4:, 3:] = 1, 2, 3, 4
    assert torch.equal(result.segments.map, expected)
    assert [item.area for item in result.segments.items] == [6, 6, 12, 12]
    assert (result.labels == torch.where(expected == 0, 255, 0)).all()
    assert result.image is image and result.classes == ("region",)


def test_two_classes_are_labels():
    image = torch.zeros(3, 4, 5, dtype=torch.uint8)
    image[:, 1] = 200
    result = Bright().predict([image])[0]
    assert result.classes == ("background", "foreground")
    assert torch.equal(result.labels, (image[0] > 127).to(torch.uint8))


@pytest.mark.parametrize("made", [Quarters, Bright])
def test_forms_conform(made):
    testing.check_model(made)


def test_a_grey_picture_keeps_its_values():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (grey(np.repeat(values[:, :, None], 3, 2)) == values).all()
    red = np.zeros((1, 1, 3), np.uint8)
    red[..., 0] = 255
    assert grey(red).item() == 76  # 0.299 * 255


def test_renumbered_keeps_regions(noise):
    numbers = renumbered(noise)
    assert ((numbers < 0) == (noise < 0)).all()
    seen = [value for value in dict.fromkeys(noise.ravel().tolist()) if value >= 0]
    for k, value in enumerate(seen):
        assert ((numbers == k) == (noise == value)).all()


def test_connected_parts_by_flooding(noise):
    parts = connected(noise)
    visited = np.full(noise.shape, -1)
    count = 0
    for start in np.argwhere(noise >= 0):
        stack = [tuple(start)]
        if visited[stack[0]] >= 0:
            continue
        while stack:
            y, x = stack.pop()
            visited[y, x] = count
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= v < noise.shape[0] and 0 <= u < noise.shape[1]
                if inside and visited[v, u] < 0 and noise[v, u] == noise[y, x]:
                    stack.append((v, u))
        count += 1
    assert (renumbered(parts) == visited).all()


def test_adjacent_counts_borders(noise):
    expected = {}
    for y in range(noise.shape[0]):
        for x in range(noise.shape[1]):
            for v, u in ((y + 1, x), (y, x + 1)):
                if v < noise.shape[0] and u < noise.shape[1]:
                    low, high = sorted((int(noise[y, x]), int(noise[v, u])))
                    if 0 <= low < high:
                        expected[low, high] = expected.get((low, high), 0) + 1
    pairs, lengths = adjacent(noise)
    assert dict(zip(map(tuple, pairs.tolist()), lengths.tolist(), strict=True)) == expected
    assert len(adjacent(np.zeros((1, 1), int))[0]) == 0


def test_means_and_joined(noise):
    values = np.random.default_rng(1).random((*noise.shape, 2))
    found, area = means(noise, values)
    for k in range(4):
        np.testing.assert_allclose(found[k], values[noise == k].mean(0))
        assert area[k] == (noise == k).sum()
    parts = joined(noise, np.array([[0, 2]]))
    assert len(np.unique(parts[noise >= 0])) == 3 and (parts[noise < 0] == -1).all()
    assert len({*parts[noise == 0], *parts[noise == 2]}) == 1


def test_small_regions_join_the_nearest_in_colour():
    regions = np.array([[0, 0, 0, 1, 2, 2, 2], [0, 0, 0, 1, 2, 2, 2]])
    image = np.array([10.0, 190.0, 200.0])[regions][:, :, None]
    assert (merge_small(regions, image, 3) == [[0, 0, 0, 1, 1, 1, 1]] * 2).all()
    assert (merge_small(regions, image, 2) == regions).all()
    assert (merge_small(regions, image, 99) == 0).all()
    alone = np.full((2, 2), -1)
    assert (merge_small(alone, np.zeros((2, 2, 1)), 9) == -1).all()


# ---------------------------------------------------------------------------------------- snap


def prediction(classes=3, size=(24, 30), seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = tuple(f"class {k}" for k in range(classes))
    image = (torch.rand(3, *size, generator=generator) * 255).to(torch.uint8)
    image[:, :, size[1] // 2 :] //= 4
    logits = torch.randn(classes, size[0] // 2, size[1] // 2, generator=generator)
    return image, pyseg.Segmentation(size, names, logits=logits, image=image)


def test_snap_conforms():
    testing.check_refiner("snap", method="slic(count=20)")


def test_snap_averages_probabilities():
    image, given = prediction()
    result = Snap(method="watershed(markers='grid', count=12)").refine(image, given)
    segments = (
        pyseg.models.create("watershed(markers='grid', count=12)").predict([image])[0].segments
    )
    before, after = given.probabilities(), result.probabilities()
    assert len(segments.items) > 4
    for item in segments.items:
        inside = segments.map == item.id
        expected = before[:, inside].mean(1)
        torch.testing.assert_close(after[:, inside], expected[:, None].expand(-1, item.area))


def test_snap_takes_the_majority_of_labels_and_keeps_void():
    image, given = prediction()
    labels = given.labels.clone()
    labels[:3] = 255
    result = Snap(method="watershed(markers='grid', count=12)").refine(
        image, given.with_labels(labels)
    )
    segments = (
        pyseg.models.create("watershed(markers='grid', count=12)").predict([image])[0].segments
    )
    for item in segments.items:
        inside = (segments.map == item.id) & (labels != 255)
        if inside.any():
            votes = torch.bincount(labels[inside].long(), minlength=3)
            assert (result.labels[inside] == votes.argmax()).all()
    assert (result.labels[labels == 255] == 255).all()


def test_snap_leaves_what_is_in_no_region():
    image, given = prediction()
    result = Snap(method="hough_circles").refine(image, given)  # no circle here
    torch.testing.assert_close(result.probabilities(), given.probabilities())
    labels = given.with_labels(given.labels)
    assert torch.equal(Snap(method="hough_circles").refine(image, labels).labels, given.labels)


def test_snap_in_a_spec_and_its_refusals(tmp_path):
    spec = "kmeans(k=2)+snap(method='watershed(h=3)')"
    assert str(pyseg.build(spec)) == spec
    pyseg.build(spec).save(tmp_path / "saved")
    assert pyseg.load(tmp_path / "saved").stages[1].component.method == "watershed(h=3)"
    with pytest.raises(UnknownName, match="no model is called 'watersheds'"):
        pyseg.refiners.create("snap", method="watersheds")
    with pytest.raises(SpecError, match=r"watershed.*no option 'height'"):
        pyseg.refiners.create("snap", method="watershed(height=3)")
    image, given = prediction()
    with pytest.raises(SpecError, match="'otsu' gives no regions"):
        Snap(method="otsu").refine(image, given)
