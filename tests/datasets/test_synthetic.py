"""Synthetic street scenes: the same for the same seed, and labels that agree with each other."""

import pytest
import torch

from pyseg.datasets.synthetic import CLASSES, STUFF, THINGS, StreetScenes
from pyseg.types import VOID


def test_scenes_depend_on_seed_and_index_only():
    scenes, longer = StreetScenes(length=3, size=(64, 96)), StreetScenes(length=30, size=(64, 96))
    assert [torch.equal(scenes[k].image, longer[k].image) for k in range(3)] == [True] * 3
    assert torch.equal(scenes[-1].labels, longer[2].labels)
    assert not torch.equal(scenes[0].image, scenes[1].image)
    assert not torch.equal(scenes[0].image, StreetScenes(length=3, size=(64, 96), seed=1)[0].image)
    assert scenes[0].name != StreetScenes(length=3, seed=1)[0].name


@pytest.mark.parametrize("size", [(32, 32), (97, 131), (256, 512)])
def test_labels_segments_and_instances_agree(size):
    seen = set()
    for sample in StreetScenes(length=8, size=size, seed=5):
        assert sample.image.shape == (3, *size) and sample.image.dtype == torch.uint8
        assert sample.labels.shape == size
        map, items = sample.segments.map, sample.segments.items
        assert map.dtype == torch.int32
        assert [item.id for item in items] == list(range(1, len(items) + 1))
        assert torch.equal(map == 0, sample.labels == VOID)
        for item in items:
            assert item.area == int((map == item.id).sum()) > 0
            assert sample.labels[map == item.id].unique().tolist() == [item.label]
        stuff = [item.label for item in items if item.label < len(STUFF)]
        assert len(set(stuff)) == len(stuff)
        things = [item for item in items if item.label >= len(STUFF)]
        instances = sample.instances
        assert instances.labels.tolist() == [item.label for item in things]
        for mask, box, item in zip(instances.masks, instances.boxes, things, strict=True):
            assert torch.equal(mask, map == item.id)
            x0, y0, x1, y1 = box.int().tolist()
            inside = torch.zeros_like(mask)
            inside[y0:y1, x0:x1] = True
            assert not (mask & ~inside).any()
            assert mask[y0].any() and mask[y1 - 1].any()
            assert mask[:, x0].any() and mask[:, x1 - 1].any()
        seen |= {item.label for item in items}
    if size[0] > 90:
        assert seen == set(range(len(CLASSES)))
        assert StreetScenes.things == THINGS


def test_no_objects():
    sample = StreetScenes(length=1, size=(40, 60), objects=(0, 0))[0]
    assert sample.instances.masks.shape == (0, 40, 60)
    assert all(item.label < len(STUFF) for item in sample.segments.items)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"size": (16, 64)}, r"size must be .*got \(16, 64\)"),
        ({"objects": (5, 2)}, r"objects must be .*got \(5, 2\)"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        StreetScenes(**arguments)


def test_index_out_of_range():
    with pytest.raises(IndexError, match="index 3 is out of range for 3 scenes"):
        StreetScenes(length=3)[3]
