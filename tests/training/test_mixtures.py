"""Crops with a limit, mixtures of images, several data sets that know some of the classes each."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from toys import SHORT, Shapes, same

from pyseg.datasets.synthetic import StreetScenes
from pyseg.models.semantic import SemanticModel
from pyseg.training import (
    LabelSpace,
    Loss,
    class_mix,
    copy_paste,
    random_crop,
    semantic,
    train,
    union,
)
from pyseg.training.label_spaces import Together, loss_by_space, merged, read_aliases
from pyseg.types import Instances, Sample

VOID = 255
SCENES = StreetScenes(length=6, size=(64, 96))


@pytest.fixture(autouse=True)
def threads(one_thread):
    """The networks are too small for more."""


def test_no_class_fills_a_crop_beyond_the_limit_where_another_window_is_better():
    labels = torch.zeros(100, 100, dtype=torch.uint8)
    labels[:, 70:] = 1
    labels[:10] = VOID
    image = labels[None].repeat(3, 1, 1)

    def shares(limit):
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(100):
            _, mask = random_crop(
                image, labels, (30, 30), (1, 1), 0, generator, category_limit=limit
            )
            counts = torch.bincount(mask.flatten(), minlength=256)[:2]
            found.append((counts.max() / counts.sum()).item())
        return np.array(found)

    assert (shares(1.0) > 0.75).mean() > 0.5
    assert (shares(0.75) > 0.75).mean() < 0.15  # ten tries
    whole = random_crop(
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, dtype=torch.uint8),
        (8, 8),
        (1, 1),
        0,
        torch.Generator().manual_seed(0),
        category_limit=0.5,
    )
    assert not whole[1].any()  # nothing else is there


def test_a_fixed_zoom_keeps_shapes_and_flips_are_by_chance():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 64, 128), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 5, (64, 128), generator=generator, dtype=torch.uint8)
    for flip, mirrored in ((0.0, 0), (1.0, 20)):
        seen = 0
        for _ in range(20):
            view = random_crop(image, labels, (64, 128), (1, 1), 0, generator, flip=flip)
            seen += torch.equal(view[1], labels.flip(1))
            assert torch.equal(view[1], labels.flip(1) if flip else labels)
        assert seen == mirrored
    small = random_crop(image, labels, (32, 64), (0.5, 0.5), 0, generator, flip=0)[1]
    # Two source pixels are equally near to every one of these; the crop takes the later.
    assert torch.equal(small, labels[1::2, 1::2])


def test_class_mix_pastes_half_of_the_classes():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        below = torch.randint(0, 4, (9, 11), generator=generator, dtype=torch.uint8)
        above = torch.randint(4, 9, (9, 11), generator=generator, dtype=torch.uint8)
        above[:2] = VOID
        images = below.expand(3, -1, -1) * 20, above.expand(3, -1, -1) * 20
        image, labels = class_mix(images[0], below, (images[1], above), generator)
        assert torch.equal(image[0], labels * 20)  # together
        pasted = set(labels[labels > 3].tolist())
        assert len(pasted) == 3 and VOID not in pasted
        inside = torch.isin(above, torch.tensor(sorted(pasted), dtype=torch.uint8))
        assert torch.equal(labels, torch.where(inside, above, below))


def test_copy_paste_keeps_masks_boxes_labels_and_image_together():
    generator = torch.Generator().manual_seed(1)
    gone = 0
    for index in range(5):
        for size in ((64, 96), (40, 130), (100, 50)):
            below = SCENES[index]
            above = StreetScenes(length=6, size=size, seed=3)[index]
            above = replace(above, image=torch.full_like(above.image, 7))
            image = below.image.clone().clamp(min=10)
            below = replace(below, image=image)
            mixed = copy_paste(below, above, generator)
            cover = (mixed.image == 7).all(0)
            found = mixed.instances
            new = [k for k, mask in enumerate(found.masks) if (mask & cover).any()]
            assert torch.equal(mixed.image[:, ~cover], image[:, ~cover])
            assert torch.equal(mixed.labels[~cover], below.labels[~cover])
            if not new:
                assert not cover.any()
                continue
            assert torch.equal(found.masks[new].any(0), cover)
            old = [k for k in range(len(found.labels)) if k not in new]
            assert not (found.masks[old] & cover).any()
            gone += len(old) < len(below.instances.labels)
            for k, (mask, box) in enumerate(zip(found.masks, found.boxes, strict=True)):
                rows, columns = mask.nonzero().T
                around = [int(columns.min()), int(rows.min())]
                around += [int(columns.max()) + 1, int(rows.max()) + 1]
                if k in new or (mask != below.instances.masks[k]).any() if k < len(old) else True:
                    assert around == box.int().tolist()
            assert (mixed.labels[cover] >= 5).all()  # things
            assert mixed.segments is None and len(found.scores) == len(found.labels)
    assert gone  # some instance was covered as a whole


def test_copy_paste_leaves_crowds_and_needs_instances():
    sample, other = SCENES[0], SCENES[1]
    count = len(other.instances.labels)
    crowd = replace(other.instances, crowd=torch.ones(count, dtype=torch.bool))
    mixed = copy_paste(sample, replace(other, instances=crowd), torch.Generator().manual_seed(0))
    assert torch.equal(mixed.image, sample.image)
    with pytest.raises(ValueError, match="needs instances in"):
        copy_paste(sample, replace(other, instances=None), torch.Generator())
    empty = Instances(
        torch.zeros(0, 4),
        torch.zeros(0, 64, 96, dtype=torch.bool),
        torch.zeros(0),
        torch.zeros(0, dtype=torch.int64),
    )
    for a, b in ((empty, other.instances), (other.instances, empty)):
        mixed = copy_paste(
            replace(sample, instances=a), replace(other, instances=b), torch.Generator()
        )
        assert len(mixed.instances.labels) == len(mixed.instances.masks)


def test_mixing_trains_and_depends_on_the_seed_only(tmp_path):
    from toys import tiny

    runs = []
    for number, workers in enumerate((0, 1)):
        model = tiny()
        options = {**SHORT, "class_mix": 0.7, "category_limit": 0.6, "workers": workers}
        train(model, Shapes(3), output_dir=tmp_path / str(number), **options)
        runs.append(model.state_dict())
    plain = tiny()
    train(plain, Shapes(3), output_dir=tmp_path / "plain", **SHORT)
    assert same(*runs) and not same(runs[0], plain.state_dict())


# --- several data sets ------------------------------------------------------------------------


COLOURS = {"road": 40, "car": 110, "truck": 150, "person": 210, "sky": 250}


class Coloured:
    """Vertical stripes, the colour of each tells its class, of which a set knows some."""

    def __init__(self, classes, count=6, seed=0, hidden=None, coarse=None):
        self.classes = tuple(classes)
        self.palette = tuple((k, k, k) for k in range(len(classes)))
        generator = np.random.default_rng(seed)
        coarse = coarse or {}
        every = list(COLOURS)
        self.samples = []
        for index in range(count):
            stripes = [every[k] for k in generator.integers(0, len(every), 6)]
            grey = np.repeat([COLOURS[name] for name in stripes], 4)
            image = np.tile(grey, (16, 1)) + generator.integers(-6, 7, (16, 24))
            labels = []
            for name in stripes:
                name = coarse.get(name, name)
                # What the set does not know is void, or hides in another of its classes.
                name = name if name in self.classes else hidden
                labels += [self.classes.index(name) if name else VOID] * 4
            self.samples.append(
                Sample(
                    f"{seed}-{index}",
                    torch.from_numpy(image.clip(0, 255).astype(np.uint8)).expand(3, -1, -1).clone(),
                    torch.tensor(labels, dtype=torch.uint8).expand(16, -1).clone(),
                )
            )

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def network(count):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 24, 1), nn.ReLU(), nn.Conv2d(24, 24, 1), nn.ReLU())
    return SemanticModel(
        nn.Sequential(layers, nn.Conv2d(24, count, 1)), [f"class {k}" for k in range(count)]
    )


PLAIN = {
    "batch_size": 4,
    "crop_size": (16, 24),
    "scale": (1, 1),
    "photometric": 0,
    "learning_rate": 0.02,
    "precision": "fp32",
    "ema": 0.9,
    "progress": False,
}


def test_an_unknown_class_is_neither_rewarded_nor_punished():
    """No gradient reaches its logits in the images of a set that does not know it."""
    spaces = [LabelSpace.of(("a", "b"), "abcd"), LabelSpace.of(("d", "c", "a"), "abcd")]
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (3, 5, 6), generator=generator)
    labels[:, 0] = VOID
    of = torch.tensor([0, 1, 0])
    weights = [torch.ones(2), torch.ones(3)]
    for text in ("ce", "ohem+0.5*lovasz", "focal+dice", "jaccard+boundary(radius=2)"):
        logits = torch.randn(3, 4, 5, 6, generator=generator, requires_grad=True)
        loss_by_space(Loss.parse(text), logits, labels, of, spaces, weights, VOID).backward()
        per_class = logits.grad.abs().sum((2, 3)) > 0
        assert per_class.tolist() == [
            [True, True, False, False],
            [True, False, True, True],
            [True, True, False, False],
        ]


def test_the_loss_of_each_image_is_that_of_its_own_softmax():
    spaces = [LabelSpace.of(("b", "a"), "abc"), LabelSpace.of("abc", "abc")]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 4, 5, generator=generator)
    labels = torch.randint(0, 2, (2, 4, 5), generator=generator)
    labels[0, :2] = VOID
    weights = [torch.tensor([1.0, 3.0]), torch.tensor([0.5, 1.0, 2.0])]
    ours = loss_by_space(
        Loss.parse("ce"), logits, labels, torch.tensor([0, 1]), spaces, weights, VOID
    )
    total = 0.0
    for n, order in ((0, [1, 0]), (1, [0, 1, 2])):
        for y in range(4):
            for x in range(5):
                label = int(labels[n, y, x])
                if label != VOID:
                    own = logits[n, order, y, x].double()
                    total -= float(weights[n][label]) * float(own.log_softmax(0)[label])
    assert ours.item() == pytest.approx(total / (10 + 20), rel=1e-5)


def test_a_coarse_class_has_the_probability_of_its_members():
    space = LabelSpace.of(("ground", "vehicle"), ("road", "car", "truck", "sky"), ALIASES)
    assert space.members == ((0,), (1, 2)) and not space.covers(4)
    logits = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    p = logits[:, :3].softmax(1)
    expected = torch.stack([p[:, 0], p[:, 1] + p[:, 2]], 1)
    torch.testing.assert_close(space.logits(logits).softmax(1), expected)
    whole = LabelSpace.of("abc", "abc")
    assert whole.covers(3) and whole.logits(logits[:, :3]).shape == (2, 3, 3, 3)


ALIASES = {"ground": "road", "vehicle": ["car", "truck"]}


def test_classes_of_several_sets():
    sets = [Coloured(("ground", "vehicle")), Coloured(("road", "car", "person", "truck"))]
    assert union(sets, ALIASES)["classes"] == ("road", "car", "truck", "person")
    together = Together(sets)
    assert len(together) == 12 and [together.space(k) for k in (0, 5, 6, 11)] == [0, 0, 1, 1]
    assert together[6] is sets[1].samples[0]
    expected = {"a": ("b",), "v": ("c", "d")}
    assert read_aliases("a=b, v = c|d") == read_aliases({"a": "b", "v": ["c", "d"]}) == expected
    for wrong in ("a", "a=b=c", {"a": 3}, {"a": []}, [1]):
        with pytest.raises(ValueError, match="aliases must give"):
            read_aliases(wrong)


def test_classes_that_stand_for_the_same_are_one():
    source = Coloured(("car", "road", "truck", "sky"), 3, seed=5)
    aliases = {"car": "vehicle", "truck": "vehicle"}
    ours = merged(source, aliases)
    assert ours.classes == ("car", "road", "sky")
    assert ours.palette == (
        (0, 0, 0),
        (1, 1, 1),
        (3, 3, 3),
    )
    for k in range(3):
        before, after = source[k].labels, ours[k].labels
        expected = torch.tensor([0, 1, 0, 2, *range(4, 256)], dtype=torch.uint8)[before.long()]
        assert torch.equal(after, expected) and torch.equal(ours[k].image, source[k].image)
    assert LabelSpace.of(ours.classes, ("road", "vehicle", "sky"), aliases).members == (
        (1,),
        (0,),
        (2,),
    )
    assert merged(source, None) is source
    plain = Coloured(("a", "b"), 1)
    assert merged(plain, aliases) is plain


def test_repeats_of_sets():
    sets = [Coloured(("a", "b"), 2), Coloured(("a", "b", "c"), 5), Coloured(("a", "b"), 3)]
    together = Together(sets, [0, 1, 0], [3, 1, 2])
    assert len(together) == 3 * 2 + 5 + 2 * 3
    assert [together.space(k) for k in range(17)] == [0] * 6 + [1] * 5 + [0] * 6
    assert together[5] is sets[0].samples[1] and together[12] is sets[2].samples[1]
    assert list(together.fellows(3)) == [2, 3] and list(together.fellows(8)) == [6, 7, 8, 9, 10]


def test_repeats_draw_a_small_set_more_often(tmp_path, monkeypatch):
    """And two splits of the same classes are one label space, whose loss is one mean."""
    seen = []
    original = semantic._loss

    def spy(outputs, labels, of, terms, spaces, weights, auxiliary):
        seen.extend(of.tolist())
        assert len(spaces) == len(weights) == 2
        return original(outputs, labels, of, terms, spaces, weights, auxiliary)

    monkeypatch.setattr(semantic, "_loss", spy)
    sets = [Coloured(("road", "car"), 2), Coloured(("road", "car", "sky"), 4, seed=1)]
    sets.append(Coloured(("road", "car"), 3, seed=2))
    options = {**PLAIN, "epochs": 1, "batch_size": 1, "output_dir": tmp_path / "a"}
    train(network(3), sets, repeats=[4, 1, 2], **options)
    assert len(seen) == 8 + 4 + 6 and seen.count(0) == 14
    for wrong in ([1, 2], [1, 1, 0], [1, 1, 1.5]):
        with pytest.raises(ValueError, match="repeats must be a positive integer for each of 3"):
            train(network(3), sets, repeats=wrong, **{**options, "output_dir": tmp_path / "b"})


def test_two_sets_train_a_model_of_all_their_classes(tmp_path):
    """In each, what it does not know hides in its "road"; both together tell all apart."""
    first = Coloured(("road", "car", "truck", "sky"), 16, seed=1, hidden="road")
    second = Coloured(("road", "person"), 16, seed=2, hidden="road")
    check = Coloured(("road", "car", "truck", "sky", "person"), 8, seed=3)
    options = {**PLAIN, "loss": "ce", "class_weights": 0.0, "epochs": 40}
    model = network(5)
    both = {**options, "background": "road", "output_dir": tmp_path / "a"}
    log = train(model, [first, second], validation=check, **both)
    assert model.classes == ("road", "car", "truck", "sky", "person")
    assert all(iou > 0.9 for iou in log[-1]["iou"].values())
    ours = log[-1]["iou"]
    # Had unknown classes been absent, persons of the first set were learnt as road.
    absent = Coloured(first.classes, 16, seed=1, hidden="road")
    absent.classes = (*first.classes, "person")
    absent.palette = ((0, 0, 0),) * 5
    other = network(5)
    log = train(other, [absent, second], validation=check, output_dir=tmp_path / "b", **options)
    assert log[-1]["iou"]["person"] < ours["person"] - 0.05, (ours, log[-1]["iou"])


def test_a_background_stands_for_what_its_set_does_not_know():
    space = LabelSpace.of(("sky", "other"), ("other", "car", "sky", "tree"), None, ("other",))
    assert space.members == ((2,), (0, 1, 3))
    # A pixel of another class says that it is none of the unknown ones.
    logits = torch.randn(1, 4, 2, 2, requires_grad=True)
    sky = torch.zeros(1, 2, 2, dtype=torch.int64)
    Loss.parse("ce")(space.logits(logits), sky, torch.ones(2)).backward()
    assert (logits.grad[:, [0, 1, 3]] > 0).all() and (logits.grad[:, 2] < 0).all()


def test_coarse_labels_and_scores_in_a_sets_own_classes(tmp_path):
    coarse = Coloured(
        ("ground", "vehicle"),
        16,
        seed=4,
        coarse={"road": "ground", "car": "vehicle", "truck": "vehicle"},
    )
    fine = Coloured(("road", "car", "truck"), 16, seed=5)
    options = {**PLAIN, "loss": "ce", "epochs": 30, "aliases": ALIASES}
    model = network(3)
    log = train(model, [coarse, fine], validation=coarse, output_dir=tmp_path, **options)
    assert set(log[-1]["iou"]) == {"ground", "vehicle"} and log[-1]["miou"] > 0.95
    again = network(3)
    with pytest.raises(Exception, match="samples"):
        train(again, [coarse, coarse, fine], output_dir=tmp_path, resume=True, **options)


def test_sets_that_do_not_fit(tmp_path):
    sets = [Coloured(("road", "car")), Coloured(("road", "person"))]
    options = {**PLAIN, "epochs": 1, "output_dir": tmp_path / "run"}
    with pytest.raises(ValueError, match=r"model has 2 classes, .* together 3; .*num_classes=3"):
        train(network(2), sets, **options)
    with pytest.raises(ValueError, match="aliases and background are for several data sets"):
        train(network(2), sets[0], **{**options, "aliases": ALIASES})
    with pytest.raises(ValueError, match="background names 'sea', which is a class of none"):
        train(network(3), sets, **{**options, "background": "sea"})
    with pytest.raises(ValueError, match="background names road and car of one data set"):
        train(network(3), sets, **{**options, "background": ["road", "car"]})
    with pytest.raises(ValueError, match="two classes of one data set stand for road"):
        LabelSpace.of(("road", "ground"), ("road", "car"), ALIASES)
    with pytest.raises(ValueError, match=r"'roda' has no counterpart .*aliases.* road"):
        LabelSpace.of(("roda",), ("road", "car"))
    with pytest.raises(ValueError, match="empty"):
        train(network(3), [sets[0], Coloured(("road",), 0)], **options)
