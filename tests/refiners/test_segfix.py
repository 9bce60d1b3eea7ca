import hashlib
import json
import math
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.ndimage import distance_transform_edt

import pyseg
from pyseg.errors import PysegError, SpecError
from pyseg.metrics import Boundary
from pyseg.refiners.segfix import (
    BUNDLED,
    DIRECTIONS,
    BoundaryHead,
    SegFix,
    boundary_targets,
    inward,
)
from pyseg.testing import check_refiner
from pyseg.training import train_segfix
from pyseg.types import Instances, Sample, Segmentation, Segments

VOID = 255
SIZES = [(1, 1), (1, 9), (7, 1), (2, 3), (13, 17), (24, 31)]


def blocks(generator, size, classes=3, void=0.0):
    """A map of rectangles, as regions are, with some void."""
    coarse = torch.randint(
        0, classes, (1, 1, -(-size[0] // 5), -(-size[1] // 5)), generator=generator
    )
    labels = torch.nn.functional.interpolate(coarse.float(), size, mode="nearest")[0, 0]
    labels[torch.rand(size, generator=generator) < void] = VOID
    return labels.to(torch.uint8)


def directions(generator, size, none=True):
    """Random ones, with pixels that have none."""
    found = torch.randint(-none, 8, size, generator=generator)
    return found.to(torch.uint8)  # -1 becomes 255


@pytest.fixture
def generator():
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def targets_by_hand(labels, width):
    """Boundary and direction of one map [H, W], pixel by pixel, distances by trying all pixels."""
    height, columns = labels.shape
    points = [(y, x) for y in range(height) for x in range(columns)]

    def depth(y, x):
        """Distance to the border of the pixel's class, as far as the network's targets look."""
        found = [
            math.hypot(v - y, u - x)
            for v, u in points
            if labels[v, u] not in (VOID, labels[y, x]) and labels[y, x] != VOID
        ]
        nearest = min(found, default=math.inf)
        return nearest if nearest <= width + 2 else math.inf

    depths = {point: depth(*point) for point in points}
    boundary = np.zeros((height, columns), np.uint8)
    direction = np.full((height, columns), VOID, np.uint8)
    for y, x in points:
        own = labels[y, x]
        near = depths[y, x] <= width
        void = any(
            labels[v, u] == VOID
            for v in range(max(0, y - width), min(height, y + width + 1))
            for u in range(max(0, x - width), min(columns, x + width + 1))
        )
        boundary[y, x] = VOID if own == VOID or (void and not near) else near
        if own == VOID or not near:
            continue
        here = min(depths[y, x], width + 2) - 0.5
        gradient = np.zeros(2)
        for dy, dx in DIRECTIONS:
            v, u = y + dy, x + dx
            seen = here
            if 0 <= v < height and 0 <= u < columns and labels[v, u] != VOID:
                seen = min(depths[v, u], width + 2) - 0.5
                seen = seen if labels[v, u] == own else -seen
            gradient += (1 if dy and dx else 2) * seen * np.array([dy, dx])
        if np.abs(gradient).sum() > 1e-3:
            angle = math.degrees(math.atan2(*gradient)) % 360
            direction[y, x] = min(range(8), key=lambda k: abs((angle - 45 * k + 180) % 360 - 180))
    return boundary, direction, depths


@pytest.mark.parametrize("width", [1, 3, 5])
def test_targets_are_those_of_brute_force(generator, width):
    for size in SIZES:
        labels = blocks(generator, size, void=0.1 if width == 3 else 0.0)
        boundary, direction = boundary_targets(labels[None], width)
        expected, way, _ = targets_by_hand(labels.numpy(), width)
        assert np.array_equal(boundary[0].numpy(), expected)
        differ = direction[0].numpy() != way
        # halfway between two directions rounding decides
        assert not ((direction[0].numpy() == VOID) != (way == VOID)).any()
        gap = (direction[0].numpy().astype(int) - way.astype(int)) % 8
        assert np.isin(gap[differ], (1, 7)).all() and differ.mean() < 0.1


def test_targets_are_those_of_scipys_distances(generator):
    labels = blocks(generator, (47, 61), classes=4)
    boundary, direction = boundary_targets(labels[None], 4)
    depth = sum(distance_transform_edt((labels == k).numpy()) for k in range(4))
    several = len(labels.unique()) > 1
    assert np.array_equal(boundary[0].numpy() == 1, (depth <= 4) & several)
    # Inward is where the depth grows, but for what is thin.
    y, x = np.nonzero((direction[0].numpy() != VOID) & (depth <= 2))
    dy, dx = np.array(DIRECTIONS)[direction[0].numpy()[y, x]].T
    v, u = (y + dy).clip(0, 46), (x + dx).clip(0, 60)
    assert (depth[v, u] >= depth[y, x]).mean() > 0.9


def test_targets_of_a_batch_are_those_of_its_images(generator):
    labels = torch.stack([blocks(generator, (19, 23), void=0.05) for _ in range(3)])
    together = boundary_targets(labels, 3)
    for n in range(3):
        alone = boundary_targets(labels[n : n + 1], 3)
        assert all(torch.equal(a[n], b[0]) for a, b in zip(together, alone, strict=True))
    turned = boundary_targets(labels.flip(2), 3)[0]
    assert torch.equal(turned.flip(2), together[0])
    for dtype in (torch.int16, torch.int64):
        again = boundary_targets(labels.to(dtype), 3)
        assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))


def test_one_class_and_void_alone_have_no_boundary():
    one = torch.full((1, 9, 11), 4, dtype=torch.uint8)
    boundary, direction = boundary_targets(one)
    assert not boundary.any() and (direction == VOID).all()
    boundary, direction = boundary_targets(torch.full_like(one, VOID))
    assert (boundary == VOID).all() and (direction == VOID).all()


def inward_by_hand(boundary, direction, steps):
    height, width = boundary.shape
    found = {}
    for start in range(height * width):
        y, x = divmod(start, width)
        if not boundary[y, x]:
            continue
        for _ in range(steps):
            if boundary[y, x] and direction[y, x] < 8:
                dy, dx = DIRECTIONS[direction[y, x]]
                y, x = min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)
        if not boundary[y, x]:
            found[start] = y * width + x
    return found


@pytest.mark.parametrize("steps", [0, 1, 3, 9])
def test_paths_are_those_of_brute_force(generator, steps):
    for size in SIZES:
        boundary = torch.rand(size, generator=generator) < 0.7
        direction = directions(generator, size)
        moved, source = inward(boundary, direction, steps)
        found = dict(zip(moved.tolist(), source.tolist(), strict=True))
        assert found == inward_by_hand(boundary.numpy(), direction.numpy(), steps)


class Known(SegFix):
    """Says of boundaries what it is told; sure of all directions, or as told."""

    def __init__(self, boundary, way, sure=None, **options):
        super().__init__(weights=None, **options)
        sure = torch.ones(boundary.shape) if sure is None else sure
        self.known = boundary, way, lambda: sure

    def predict(self, image, prediction):
        return self.known


def picture(size):
    return torch.zeros(3, *size, dtype=torch.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_labels_are_copied(generator, size):
    names = ("a", "b", "c")
    labels = torch.randint(0, 4, size, generator=generator).to(torch.uint8)
    labels[labels == 3] = VOID
    boundary = torch.rand(size, generator=generator) < 0.6
    direction = directions(generator, size)
    given = Segmentation(size, names, image=picture(size)).with_labels(labels)
    refiner = Known(boundary, direction, steps=4, protect=0)
    result = refiner.refine(picture(size), given)
    expected = labels.flatten().clone()
    for pixel, source in inward_by_hand(boundary.numpy(), direction.numpy(), 4).items():
        if VOID not in (labels.flatten()[pixel], labels.flatten()[source]):
            expected[pixel] = labels.flatten()[source]
    assert torch.equal(result.labels, expected.reshape(size))
    assert torch.equal(result.labels == VOID, labels == VOID)
    assert result.logits is None


def drawn(generator, size, classes=3):
    """A prediction of all kinds, a boundary and directions."""
    names = tuple("abcdefgh"[:classes])
    low = [math.ceil(side / 2) for side in size]
    logits = torch.randn(classes, *low, generator=generator) * 3
    given = Segmentation(size, names, logits=logits, image=picture(size))
    boundary = torch.rand(size, generator=generator) < 0.6
    return given, boundary, directions(generator, size)


@pytest.mark.parametrize("size", SIZES)
def test_logits_follow_the_labels(generator, size):
    given, boundary, direction = drawn(generator, size)
    before = given.logits.clone()
    result = Known(boundary, direction, steps=3, margin=2, protect=0).refine(picture(size), given)
    bare = given.with_labels(given.labels)
    expected = Known(boundary, direction, steps=3, protect=0).refine(picture(size), bare)
    assert torch.equal(result.labels, expected.labels)
    assert torch.equal(given.logits, before)
    full, same = given.full_logits().flatten(1), result.labels == given.labels
    found = result.full_logits()
    assert torch.equal(found.argmax(0)[~same].to(torch.uint8), result.labels[~same])
    assert torch.equal(found[:, same], given.full_logits()[:, same])
    moved, source = inward(boundary, direction, 3)
    for pixel, place in zip(moved.tolist(), source.tolist(), strict=True):
        if not same.flatten()[pixel]:
            assert torch.equal(found.flatten(1)[:, pixel], full[:, place])
    full_size = given.with_logits(given.full_logits())  # must not be written into
    kept = full_size.logits.clone()
    again = Known(boundary, direction, steps=3, margin=2, protect=0).refine(
        picture(size), full_size
    )
    assert torch.equal(full_size.logits, kept)
    assert torch.equal(again.labels, result.labels)


def test_only_unsure_pixels_move(generator):
    given, boundary, direction = drawn(generator, (24, 31))
    best = given.probabilities().topk(2, 0).values
    last = None
    for margin in (0.0, 0.3, 0.7, 1.5):
        refiner = Known(boundary, direction, margin=margin, protect=0)
        moved = refiner.refine(picture((24, 31)), given).labels != given.labels
        assert not moved[best[0] - best[1] >= margin].any()
        assert last is None or not (last & ~moved).any()
        last = moved
    assert last.any()


def test_labels_alone_move_by_sure_directions(generator):
    given, boundary, direction = drawn(generator, (24, 31))
    bare = given.with_labels(given.labels)
    sure = torch.rand(24, 31, generator=generator)
    found = {}
    for least in (0.0, 0.6):
        refiner = Known(boundary, direction, sure, margin=2, protect=0, direction=least)
        found[least] = refiner.refine(picture((24, 31)), bare).labels
        # With logits the margin decides.
        found["logits"] = refiner.refine(picture((24, 31)), given).labels
        assert torch.equal(found["logits"], found[0.0])
    only = torch.where(sure >= 0.6, direction, VOID)
    expected = Known(boundary, only, margin=2, protect=0).refine(picture((24, 31)), bare)
    assert torch.equal(found[0.6], expected.labels)
    assert not torch.equal(found[0.6], found[0.0])


def test_thin_labels_stay(generator):
    size = (40, 60)
    labels = torch.zeros(size, dtype=torch.uint8)
    labels[:, 10:14] = 1  # four pixels wide: no square of five
    labels[:, 30:35] = 2  # five
    labels[:, 57:] = 3  # three at the border, where it goes on as far as anyone knows
    given = Segmentation(size, tuple("abcd"), image=picture(size)).with_labels(labels)
    boundary = labels > 0
    direction = torch.zeros(size, dtype=torch.uint8)
    direction[:, 50:] = 4
    for protect, stays in ((2, {1: True, 2: False, 3: False}), (3, {1: True, 2: True})):
        moved = Known(boundary, direction, steps=9, protect=protect).refine(picture(size), given)
        for label, kept in stays.items():
            assert (moved.labels[labels == label] == label).all() == kept
    bare = Known(boundary, direction, steps=9, protect=0).refine(picture(size), given)
    assert not bare.labels.any()


@pytest.mark.parametrize("classes", [3, 300])
def test_void_is_neither_moved_nor_spread(generator, classes):
    size = (21, 26)
    void = 255 if classes == 3 else -1
    labels = torch.randint(0, 3, size, generator=generator)
    labels[torch.rand(size, generator=generator) < 0.3] = void
    labels = labels.to(torch.uint8 if classes == 3 else torch.int16)
    given = Segmentation(size, tuple(map(str, range(classes)))).with_labels(labels)
    boundary = torch.rand(size, generator=generator) < 0.6
    direction = directions(generator, size, none=False)
    result = Known(boundary, direction, protect=0).refine(picture(size), given)
    assert torch.equal(result.labels == void, labels == void)
    assert not torch.equal(result.labels, labels) and result.labels.dtype == labels.dtype


def test_masks_and_segments_move(generator):
    size = (23, 29)
    masks = torch.stack([blocks(generator, size, 2).bool() for _ in range(3)])
    masks[2] = False
    masks[2, 4, 4] = True  # would vanish: it stays
    found = Instances(torch.zeros(3, 4), masks, torch.rand(3), torch.tensor([0, 1, 0]))
    ids = blocks(generator, size, 4).int()
    segments = Segments.from_map(ids, {1: 0, 2: 1, 3: 1})
    given = Segmentation(size, ("a", "b"), segments=segments, instances=found)
    boundary = torch.rand(size, generator=generator) < 0.6
    boundary[4, 4] = True
    boundary[4, 5:] = False
    direction = directions(generator, size, none=False)
    direction[4, 4] = 0
    result = Known(boundary, direction, steps=3, protect=0).refine(picture(size), given)
    steps = inward_by_hand(boundary.numpy(), direction.numpy(), 3)
    where, whence = (torch.tensor(list(side)) for side in (steps.keys(), steps.values()))
    for k in range(2):
        expected = masks[k].flatten().clone()
        expected[where] = masks[k].flatten()[whence]
        if expected.any():
            assert torch.equal(result.instances.masks[k].flatten(), expected)
    assert torch.equal(result.instances.masks[2], masks[2])
    assert torch.equal(result.instances.boxes, found.boxes) and torch.equal(
        given.instances.masks, masks
    )
    expected = ids.flatten().clone()
    legal = (expected[where] != 0) & (expected[whence] != 0)
    expected[where[legal]] = ids.flatten()[whence[legal]]
    assert torch.equal(result.segments.map.flatten(), expected)
    counted = {item.id: item.area for item in result.segments.items}
    assert counted == {k: int((expected == k).sum()) for k in (1, 2, 3) if (expected == k).any()}
    assert torch.equal(result.labels, result.segments.label_map(2))


def nowhere(refiner):
    """Its networks say everywhere that there is no boundary."""
    for head in filter(None, (refiner.network.head, refiner.head)):
        torch.nn.init.zeros_(head.out.weight)
        torch.nn.init.constant_(head.out.bias, -20.0)
    return refiner


@pytest.mark.parametrize("size", SIZES)
def test_without_boundaries_nothing_changes(generator, size):
    given, _, _ = drawn(generator, size)
    assert nowhere(SegFix(weights=None)).refine(picture(size), given) is given
    assert SegFix(weights=None, steps=0).refine(picture(size), given) is given
    one = Segmentation(size, ("a", "b")).with_labels(torch.ones(size, dtype=torch.uint8))
    boundary = torch.ones(size, dtype=torch.bool)
    boundary[-1, -1] = False
    direction = directions(generator, size, none=False)
    assert Known(boundary, direction, protect=0).refine(picture(size), one) is one


@pytest.mark.parametrize("grow", [-2, 2])
def test_true_boundaries_repair_a_map(generator, grow):
    """With the ground truth's own offsets an eroded or dilated map becomes right again."""
    size = (90, 120)
    labels = torch.zeros(size, dtype=torch.uint8)
    rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    # One shape in each of six cells, so that all, and the ground between them, are wider than two
    # boundaries of 4: a sliver that another shape leaves has no inside to copy from.
    for top, left in ((y, x) for y in (0, 45) for x in (0, 40, 80)):
        y, x = (
            int(corner + torch.randint(6, side - 24, (), generator=generator))
            for corner, side in ((top, 45), (left, 40))
        )
        if torch.rand((), generator=generator) < 0.5:
            labels[(rows - y - 9) ** 2 + (columns - x - 9) ** 2 <= 81] = 1
        else:
            labels[y : y + 18, x : x + 18] = 2
    window = 2 * abs(grow) + 1
    plane = labels.float()[None, None]
    sign = 1 if grow > 0 else -1
    wrong = sign * torch.nn.functional.max_pool2d(sign * plane, window, 1, abs(grow))
    wrong = wrong[0, 0].to(torch.uint8)
    boundary, direction = boundary_targets(labels[None], 4)
    names = ("ground", "disc", "box")
    given = Segmentation(size, names).with_labels(wrong)
    refiner = Known(boundary[0] == 1, direction[0], steps=8, protect=0)
    result = refiner.refine(picture(size), given)
    assert not torch.equal(wrong, labels)
    assert torch.equal(result.labels, labels)
    metric = Boundary(names, measures=("boundary_iou",))
    metric.update(result, Sample("scene", picture(size), labels))
    assert metric.compute()["boundary_iou"] == 1


class Shapes:
    """Bright discs and boxes on a dark ground."""

    classes, palette = ("ground", "disc", "box"), ((0, 0, 0), (9, 9, 9), (5, 5, 5))

    def __init__(self, count=6, size=(64, 80), seed=0):
        generator = torch.Generator().manual_seed(seed)
        rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
        self.samples = []
        for index in range(count):
            labels = torch.zeros(size, dtype=torch.uint8)
            draw = torch.rand(4, generator=generator)
            y, x = 16 + 32 * draw[0], 16 + 48 * draw[1]
            labels[int(10 + 30 * draw[2]) :, int(10 + 40 * draw[3]) :] = 2
            labels[(rows - y) ** 2 + (columns - x) ** 2 < 144] = 1
            image = torch.tensor([40, 200, 120])[labels.long()] + torch.randint(
                -15, 15, (3, *size), generator=generator
            )
            self.samples.append(Sample(f"shape{index}", image.to(torch.uint8), labels))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Blurred:
    """A model whose boundaries are three pixels off: classes after the first are grown."""

    classes, palette = Shapes.classes, Shapes.palette

    def predict(self, images):
        results = []
        for image in images:
            grey = image[0].float()
            labels = torch.where(grey > 160, 1, torch.where(grey > 80, 2, 0))
            planes = torch.nn.functional.one_hot(labels, 3).permute(2, 0, 1).float()
            planes[1:] = torch.nn.functional.max_pool2d(planes[1:], 7, 1, 3)
            logits = 4 * torch.nn.functional.avg_pool2d(planes, 5, 1, 2)
            results.append(
                Segmentation(tuple(image.shape[1:]), self.classes, logits=logits, image=image)
            )
        return results


def training(tmp_path, pipeline=None, **options):
    options = {"epochs": 15, "batch_size": 3, "crop_size": (64, 80), "progress": False} | options
    pipeline = pyseg.build(Blurred()) if pipeline is None else pipeline
    return train_segfix(
        pipeline, Shapes(), Shapes(3, seed=1), output_dir=tmp_path / "run", **options
    )


def test_training_learns_shapes(tmp_path):
    result = training(tmp_path, epochs=25, width=5, margin=2, protect=0, steps=8)
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.trained["miou"] > result.off["miou"] + 0.02
    assert result.table()[0][0] == "segfix" and len(result.table()[1]) == 3
    refiner = result.pipeline.refiners[0]
    assert refiner.head is not None or refiner.wanted_features == ()
    assert not refiner.training
    assert [p.name for p in (tmp_path / "run").iterdir() if p.suffix == ".pt"] == ["checkpoint.pt"]
    # The bundled network stays as it was elsewhere: training began from random weights.
    assert not torch.equal(refiner.network.stem[0].weight, SegFix().network.stem[0].weight)


def test_training_goes_on_where_it_was(tmp_path):
    whole = training(tmp_path / "whole", epochs=4)
    training(tmp_path / "parts", epochs=2)
    with pytest.raises(PysegError, match="holds the checkpoint of an earlier run"):
        training(tmp_path / "parts", epochs=4)
    # Its schedule is that of a run of another length: what is done again is all of it, though.
    parts = training(tmp_path / "parts", epochs=4, resume=True)
    assert len(parts.losses) == 4 and len(whole.losses) == 4
    with pytest.raises(PysegError, match="other settings: width"):
        training(tmp_path / "parts", epochs=4, width=2, resume=True)


def test_training_refuses(tmp_path):
    with pytest.raises(ValueError, match="epochs must be positive"):
        training(tmp_path, epochs=0)
    with pytest.raises(PysegError, match="dataset has no images to use"):
        training(tmp_path, limit=0)
    with pytest.raises(ValueError, match="steps must be a whole number"):
        training(tmp_path, steps=-1)
    other = Shapes(2)
    other.classes = ("ground", "disc", "cube")
    with pytest.raises(PysegError, match="check: the pipeline's classes are not the dataset's"):
        train_segfix(pyseg.build(Blurred()), Shapes(2), other, output_dir=tmp_path / "run")


def network_with_features(classes=3):
    model = pyseg.models.create("streetnet", weights=None, num_classes=classes)
    model.classes = Shapes.classes[:classes]
    return model


def test_a_head_is_trained_on_the_features_of_its_model(tmp_path):
    model = network_with_features()
    pipeline = pyseg.build(model)
    result = training(tmp_path, pipeline, epochs=3)
    refiner = result.pipeline.refiners[0]
    assert refiner.wanted_features == (model.features_key,)
    for key, value in SegFix().network.state_dict().items():  # the own network stays as bundled
        assert torch.equal(value, refiner.network.state_dict()[key])
    calls = []
    refiner.network.forward = lambda images: calls.append(images)  # never looked at
    image = Shapes(1, seed=3)[0].image
    result.pipeline(image)
    assert not calls
    del refiner.network.forward
    state = refiner.state_dict()
    loaded = SegFix(weights=None, channels=refiner.head.channels)
    loaded.load_state_dict(state)
    assert loaded.wanted_features == refiner.wanted_features
    assert loaded.config() == refiner.config()


def with_head(model, **options):
    """A refiner with a head that shares what the model computes."""
    refiner = SegFix(weights=None, **options)
    probe = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    channels = [found.shape[1] for found in model(probe, features=True)["features"]]
    refiner.set_head(BoundaryHead(channels), model.features_key)
    return refiner.eval()


@pytest.mark.parametrize("size", [(33, 47), (1, 1), (64, 96)])
def test_features_are_computed_once_and_dropped(size):
    model = network_with_features()
    refiner = with_head(model)
    calls = []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    seen = []
    look = lambda image, prediction: (seen.append(prediction.features), prediction)[1]  # noqa: E731
    pipeline = pyseg.build(model, look, refiner, look)
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    result = pipeline(image)
    assert len(calls) == 1 and result.features is None
    assert list(seen[0]) == [model.features_key] and seen[1] is None
    plain = pyseg.build(model)(image)
    assert plain.features is None
    # What the head sees is what the network gives when asked alone.
    with torch.no_grad():
        alone = model(image[None], features=True)
    for ours, theirs in zip(seen[0][model.features_key], alone["features"], strict=True):
        assert torch.equal(ours, theirs[0])
    assert torch.equal(plain.logits, alone["out"][0])
    # Images of several sizes in one call.
    images = [image, torch.randint(256, (3, 40, 31), dtype=torch.uint8), image]
    for together, one in zip(pipeline(images), images, strict=True):
        assert torch.equal(together.labels, pipeline(one).labels)


def test_features_of_other_weights_are_not_taken():
    model = network_with_features()
    refiner = with_head(model)
    pipeline = pyseg.build(model, refiner)
    image = torch.randint(256, (3, 48, 64), dtype=torch.uint8)
    used = []
    refiner.head.register_forward_hook(lambda *_: used.append("head"))
    refiner.network.register_forward_hook(lambda *_: used.append("network"))
    pipeline(image)
    assert used == ["head"]
    key = model.features_key
    with torch.no_grad():
        model.network.trunk.stages[3][0].layers[0][0].weight.view(-1)[0] += 1
    assert model.features_key != key
    pipeline(image)
    assert used == ["head", "network"]
    with torch.no_grad():
        model.network.trunk.stages[3][0].layers[0][0].weight.view(-1)[0] -= 1
    pipeline(image)
    assert used[2:] in (["head"], ["network"])  # rounding may have changed the weight
    # Variants and windows have no features of the one image.
    used.clear()
    model.predict_with(tta="flip")
    pipeline(image)
    assert used == ["network"]
    model.predict_with()
    refiner.shared = False
    assert refiner.wanted_features == ()


def test_a_new_head_for_other_classes_changes_no_features():
    model = network_with_features()
    key = model.features_key
    with torch.no_grad():
        model.network.head[1].weight.add_(1)
    assert model.features_key == key
    assert pickle.loads(pickle.dumps(model)).features_key == key
    assert model.to(torch.bfloat16).features_key != key
    assert pyseg.models.create("unet", weights=None, num_classes=2).features_key is None


def test_is_a_refiner():
    check_refiner("segfix")
    check_refiner("segfix", protect=0, margin=2, boundary=0.05)


def test_bundled_weights():
    assert BUNDLED.stat().st_size <= 2_000_000
    pipeline = pyseg.build("streetnet+segfix")
    refiner = pipeline.refiners[0]
    stored = load_file(BUNDLED)
    assert {v.dtype for v in stored.values()} == {torch.float16, torch.int64, torch.uint8}
    for key, value in refiner.state_dict().items():
        assert torch.equal(value, stored[key].to(value.dtype))
    # Those of streetnet as bundled: else its head would be dead weight.
    assert refiner.wanted_features == (pipeline.model.features_key,)


def test_a_saved_pipeline_is_the_same(tmp_path):
    pipeline = pyseg.build("streetnet+segfix(boundary=0.4)")
    loaded = pyseg.load(pipeline.save(tmp_path / "saved"))
    image = torch.randint(256, (3, 60, 80), dtype=torch.uint8)
    assert torch.equal(loaded(image).labels, pipeline(image).labels)
    assert repr(loaded.refiners[0]) == repr(pipeline.refiners[0])


@pytest.mark.parametrize(
    "options",
    ["boundary=1.5", "direction=-1", "steps=-1", "steps=2.5", "margin=-1", "protect=0.5"],
)
def test_refuses_options(options):
    with pytest.raises(SpecError, match=options.partition("=")[0]):
        pyseg.build(f"streetnet+segfix({options})", weights=None)


def test_refuses_an_image_of_another_size():
    given = Segmentation((4, 5), ("a",)).with_labels(torch.zeros(4, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match="image is"):
        SegFix(weights=None).refine(picture((5, 4)), given)


def test_the_card_has_the_numbers_that_were_measured():
    card = BUNDLED.with_suffix(".md").read_text(encoding="utf-8")
    assert hashlib.sha256(BUNDLED.read_bytes()).hexdigest() in card
    rows = json.loads(BUNDLED.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    found = {(row["fold"], row["model"], row["refiner"]): row for row in rows}

    def cell(difference):
        value, low, high = (f"{number:+.2f}" for number in difference)
        return f"{value} [{low}, {high}]"

    thin = ("Pole", "SignSymbol", "Fence", "Pedestrian", "Bicyclist")
    for (fold, model, refiner), row in found.items():
        if refiner == "none":
            continue
        plain = found[fold, model, "none"]
        cells = [
            *(fold, model, refiner),
            *(f"{plain['miou']:.4f}", cell(row["delta_miou"])),
            *(f"{plain['boundary_iou']:.4f}", cell(row["delta_boundary_iou"])),
        ]
        assert f"| {' | '.join(cells)} |" in card
        if fold != "other cities":
            changes = [f"{row['delta_per_class'][name][0]:+.2f}" for name in thin]
            assert f"| {' | '.join([fold, model, refiner, *changes])} |" in card
        if refiner.startswith("segfix") and "crf" not in refiner:
            assert row["delta_miou"][0] > -0.2  # what a default may lose at most
    names = {"dusk", "day", "validation", "other cities"}
    assert {row["fold"] for row in rows} == names and len(found) == len(rows)
