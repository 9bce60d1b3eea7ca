"""`train_promptable`: what it asks, what it counts as right, and that it goes on where it was."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from toys import Shapes
from typer.testing import CliRunner

from pyseg import cli, datasets
from pyseg.errors import PysegError, WeightsError
from pyseg.promptable import Prompts
from pyseg.promptable.nano import NanoNetwork, load_nano
from pyseg.regions import Instances, Segment, Segments
from pyseg.training import nano_from, train_promptable
from pyseg.training import promptable as module
from pyseg.training.promptable import (
    held_out_masks,
    iou_of,
    next_click,
    region_map,
    score_promptable,
)
from pyseg.types import Sample
from pyseg.weights import load_state, save_state


def small(**options):
    """Options of a run that takes seconds."""
    return {
        "batch_size": 1,
        "masks": 2,
        "crop_size": 64,
        "steps": 2,
        "precision": "fp32",
        "progress": False,
        **options,
    }


def run(network, output, **options):
    return train_promptable(network, Shapes(3), output_dir=output, **small(**options))


def make(seed=0):
    torch.manual_seed(seed)
    return NanoNetwork()


def discs(count=4, side=64):
    """Masks [M, s, s] of discs, of which one is a single pixel."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.rand(count, 2) * (side - 30) + 15
    radii = torch.rand(count) * 9 + 5
    masks = [
        (rows - y) ** 2 + (columns - x) ** 2 < r * r
        for (y, x), r in zip(places, radii, strict=True)
    ]
    one = torch.zeros(side, side, dtype=torch.bool)
    one[side // 2, side - 3] = True
    return torch.stack([*masks, one])


def test_training_resumes_to_the_bit(tmp_path):
    whole = make()
    log = run(whole, tmp_path / "whole", epochs=2)
    assert [entry["epoch"] for entry in log] == [1, 2]
    assert {"loss", "mask", "quality", "iou"} <= set(log[0])
    half = make()

    class Stop(Exception):
        pass

    # As a kill after the first epoch: a run of two epochs that has done one.
    original = module._Views.begin

    def begin(self, epoch):
        if epoch == 1:
            raise Stop
        original(self, epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Views, "begin", begin)
        with pytest.raises(Stop):
            run(half, tmp_path / "half", epochs=2)
    resumed = make(seed=1)
    run(resumed, tmp_path / "half", epochs=2, resume=True)
    for (key, value), other in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), key
    with pytest.raises(PysegError, match=r"other settings: .*masks"):
        run(make(), tmp_path / "half", epochs=3, resume=True, masks=3)


def test_training_lowers_the_loss_and_leaves_weights_for_the_segmenter(tmp_path):
    network = make()
    log = run(
        network,
        tmp_path,
        epochs=3,
        steps=12,
        batch_size=2,
        learning_rate=2e-3,
        photometric=0.0,
        validation=Shapes(2, seed=5),
        validate_every=3,
        limit=4,
    )
    assert log[-1]["loss"] < 0.92 * log[0]["loss"]
    assert {"box", "1 click", "3 clicks", "5 clicks"} <= set(log[-1])
    assert not network.training and all(p.requires_grad for p in network.parameters())
    segmenter = load_nano(tmp_path / "model.safetensors")
    image = Shapes(1)[0].image
    prompts = Prompts(torch.tensor([[[5.0, 5]]]), torch.tensor([[1]]))
    expected = network.embed(torch.zeros(1, 3, 64, 64)).coarse
    assert torch.equal(segmenter.network.embed(torch.zeros(1, 3, 64, 64)).coarse, expected)
    assert segmenter.predict(segmenter.embed(image), prompts)[0].isfinite().all()


def test_every_parameter_learns():
    network = make().train()
    keys = torch.arange(2)
    truths = discs(3)
    rounds = module._Rounds(truths, torch.zeros(4, 2), keys)
    network(torch.randint(0, 256, (2, 3, 64, 64)), torch.zeros(2, 2), rounds)
    rounds.losses()["loss"].backward()
    lacking = [name for name, p in network.named_parameters() if p.grad is None]
    assert lacking == []


def test_first_prompts_are_of_the_mask():
    torch.manual_seed(torch.seed() % 2**31)
    truths = discs(200)
    origins = 100 * torch.rand(len(truths), 2)
    rounds = module._Rounds(truths, origins, torch.randint(2**31, (3,)))
    places, labels, masks = rounds(None, None)
    assert masks is None and places.shape == (201, 3, 2)
    local = places - origins[:, None]
    kinds = set()
    for truth, place, label in zip(truths, local, labels.tolist(), strict=True):
        kinds.add(tuple(label))
        x, y = (int(v) for v in place[0])
        assert truth[y, x] and label[0] in (1, 4)
        rows, columns = truth.nonzero().T
        low = torch.tensor([columns.min(), rows.min()]) + 0.5
        high = torch.tensor([columns.max(), rows.max()]) + 0.5
        noise = 2 * (0.1 * (high - low + 1)).clamp(max=20) + 1e-3
        assert label[1:] in ([2, 3], [4, 4])
        assert bool(((place[1] - low).abs() <= noise).all() and (place[1] <= place[2]).all())
        assert bool(((place[2] - high).abs() <= noise).all())
    assert kinds == {(1, 4, 4), (4, 2, 3), (1, 2, 3)}
    alone = torch.tensor([label == [1, 4, 4] for label in labels.tolist()])
    assert torch.equal(alone, rounds.ambiguous) and 0.3 < alone.float().mean() < 0.6


def begun(truths):
    """Rounds of masks, their first prompts asked for."""
    rounds = module._Rounds(truths, torch.zeros(len(truths), 2), torch.randint(2**31, (3,)))
    rounds(None, None)
    return rounds


def test_corrections_lie_where_the_answer_is_wrong():
    torch.manual_seed(torch.seed() % 2**31)
    truths = discs(100)
    rounds = begun(truths)
    answer = 5 * torch.randn(len(truths), 3, 16, 16)
    iou = torch.rand(len(truths), 3)
    places, labels, masks = rounds(answer, iou)
    kept = answer[torch.arange(len(truths)), iou.argmax(1)]
    coarse = rounds.replaced
    assert torch.equal(masks[~coarse], kept[~coarse]) and not torch.equal(masks, kept)
    assert places.shape == (101, 5, 2) and bool((labels[coarse, 3:] == 4).all())
    inside = rounds.share >= 0.5
    clicks = 0
    for k in (~coarse).nonzero().flatten().tolist():
        for place, label in zip(places[k, 3:], labels[k, 3:].tolist(), strict=True):
            if label == 4:
                continue
            x, y = (int(v) // 4 for v in place)
            assert bool(inside[k, y, x]) == (label == 1)
            assert bool(kept[k, y, x] > 0) != (label == 1)
            clicks += 1
    assert len(truths) * 0.75 < clicks < len(truths) * 2 * 0.9
    assert rounds(answer, iou)[0].shape == (101, 7, 2)
    assert rounds(answer, iou) is None


def test_a_quarter_of_the_answers_is_replaced_by_coarse_masks():
    """A call draws one stride of three, by which its mean IoU differs: .53, .77 or .86."""
    torch.manual_seed(torch.seed() % 2**31)
    shares, means = [], []
    for _ in range(30):
        truths = discs(100)
        rounds = begun(truths)
        _, _, masks = rounds(torch.randn(len(truths), 3, 16, 16), torch.rand(len(truths), 3))
        coarse = rounds.replaced
        found = iou_of(masks[coarse] > 0, rounds.share[coarse] >= 0.5)
        large = truths[coarse].flatten(1).sum(1) > 100
        assert bool((masks[coarse] > 0).flatten(1).any(1).all())
        shares.append(coarse.float().mean())
        means.append(found[large].mean())
    assert 0.2 < torch.stack(shares).mean() < 0.3
    # Near the mask, though not it.
    assert min(means) > 0.3 and max(means) < 0.95
    assert 0.58 < torch.stack(means).mean() < 0.86


def test_losses_by_hand():
    truths = discs(2)
    rounds = module._Rounds(truths, torch.zeros(3, 2), torch.arange(3))
    rounds(None, None)
    logits, iou = torch.randn(3, 3, 16, 16), torch.rand(3, 3)
    ambiguous = rounds.ambiguous.tolist()
    rounds(logits, iou)
    share = truths.float().reshape(3, 16, 4, 16, 4).mean((2, 4)).double().numpy()
    total, quality = 0.0, 0.0
    for k in range(3):
        each = []
        for m in range(3):
            x = logits[k, m].double().numpy()
            p = 1 / (1 + np.exp(-x))
            cross = -share[k] * np.log(p) - (1 - share[k]) * np.log(1 - p)
            focal = ((p - share[k]) ** 2 * cross).mean()
            dice = 1 - (2 * (p * share[k]).sum() + 1) / (p.sum() + share[k].sum() + 1)
            each.append(10 * focal + dice)
            a, b = x > 0, share[k] >= 0.5
            true = (a & b).sum() / (a | b).sum()
            quality += (float(iou[k, m]) - true) ** 2 / 9
        part = 0.1 if ambiguous[k] else 0.5
        total += ((1 - part) * min(each) + part * np.mean(each)) / 3
    found = rounds.losses()
    assert found["loss"].item() == pytest.approx(total + quality, rel=1e-4)
    assert found["mask"].item() == pytest.approx(total, rel=1e-4)


def test_views_show_what_the_masks_cover():
    """A crop's masks follow its image: colours tell the regions of these images apart."""
    data = Shapes(4, size=(60, 90))
    views = module._Views([module._Regions(data, 512)], 64, (0.1, 0.3), 3, 0.0, seed=3)
    seen = 0
    for index in range(24):
        views.begin(index)
        image, masks, origin, key = views[index % 4]
        assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
        assert masks.shape == (3, 64, 64) and bool(masks.flatten(1).any(1).all())
        assert bool((origin >= 0).all()) and bool((origin <= 448).all())
        again = views[index % 4]
        assert torch.equal(again[0], image) and torch.equal(again[1], masks) and again[3] == key
        for mask in masks:
            colours = image[:, mask].float().T
            if len(colours) > 30:
                seen += 1
                near = torch.cdist(colours, torch.tensor(data.palette).float()).argmin(1)
                assert near.bincount(minlength=3).max() > 0.75 * len(near)
    assert seen > 30


def test_regions_of_labels_segments_and_instances():
    labels = torch.tensor([[0, 0, 1, 0], [255, 0, 1, 0], [1, 255, 255, 0]], dtype=torch.uint8)
    image = torch.zeros(3, 3, 4, dtype=torch.uint8)
    found = region_map(Sample("a", image, labels))
    assert found.unique().tolist() == [0, 1, 2, 3, 4]
    assert bool((found[labels == 255] == 0).all())
    assert found[0, 0] == found[1, 1] != found[0, 3] and found[0, 2] != found[2, 0]
    map = torch.tensor([[1, 1, 2, 1], [1, 1, 2, 1], [3, 3, 0, 3]], dtype=torch.int32)
    items = (Segment(1, 0, 1.0, 6), Segment(2, 1, 1.0, 2), Segment(3, 1, 1.0, 3, True))
    sample = Sample("b", image, labels, segments=Segments(map, items))
    assert region_map(sample, things=[0]).unique().tolist() == [0, 1, 2]
    assert region_map(sample).unique().tolist() == [0, 1, 2, 3]
    assert bool((region_map(sample)[2] == 0).all())
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    masks[0, :2], masks[1, 0] = True, True
    instances = Instances(torch.zeros(2, 4), masks, torch.ones(2), torch.zeros(2).long())
    found = region_map(Sample("c", image, None, instances=instances))
    assert found[0, 0] == 2 and found[1, 0] == 1 and found[2, 0] == 0
    assert not region_map(Sample("d", image)).any()


def test_large_images_are_kept_smaller():
    data = Shapes(1, size=(90, 120))
    (image, map), (whole, full) = (module._Regions(data, n).items[0] for n in (60, 200))
    assert image.shape == (3, 45, 60) and map.shape == (45, 60) and whole.shape == (3, 90, 120)
    assert map.dtype == torch.int16 and set(map.unique().tolist()) <= set(full.unique().tolist())


class Oracle:
    """Answers the mask that a table has for an image, as well as it is told to."""

    def __init__(self, masks):
        self.masks = {id(image): mask for _, image, mask in masks}

    def __call__(self, image):
        truth = self.masks[id(image)]

        def answer(prompts):
            if prompts.boxes is not None:
                x0, y0, x1, y1 = (int(v) for v in prompts.boxes[0])
                box = torch.zeros_like(truth)
                box[y0 : y1 + 1, x0 : x1 + 1] = True
                return box
            mask = torch.zeros_like(truth)
            for (x, y), label in zip(
                prompts.points[0].tolist(), prompts.point_labels[0].tolist(), strict=True
            ):
                assert bool(truth[int(y), int(x)]) == bool(label)
                mask |= truth
            return mask

        return answer


def test_scores_of_an_oracle():
    masks = list(held_out_masks(Shapes(3, size=(40, 50)), limit=3, per_image=1, area=(0.01, 0.5)))
    assert len(masks) == 3
    found = score_promptable(Oracle(masks), masks)
    assert found["1 click"] == found["3 clicks"] == found["5 clicks"] == 1
    expected = []
    for _, _, mask in masks:
        rows, columns = mask.nonzero().T
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        expected.append(float(mask.sum() / box))
    assert found["box"] == pytest.approx(np.mean(expected))


def test_held_out_masks_are_the_same_again_and_of_the_wanted_size():
    data = Shapes(6, size=(40, 50))
    first = list(held_out_masks(data, limit=5, area=(0.02, 0.3)))
    again = list(held_out_masks(data, limit=5, area=(0.02, 0.3)))
    assert 0 < len(first) <= 5
    for one, other in zip(first, again, strict=True):
        assert one[0] == other[0] and torch.equal(one[2], other[2])
        assert 0.02 <= one[2].float().mean() <= 0.3


def test_the_next_click_is_the_middle_of_the_larger_fault():
    truth = torch.zeros(30, 40, dtype=torch.bool)
    truth[5:16, 5:16] = True
    assert next_click(truth, torch.zeros_like(truth)) == (10, 10, 1)
    answer = truth.clone()
    answer[8:11, 8:11] = False  # a small hole
    answer[20:27, 20:27] = True  # and a larger patch too much
    assert next_click(truth, answer) == (23, 23, 0)
    answer[20:27, 20:27] = False
    assert next_click(truth, answer) == (9, 9, 1)
    assert next_click(truth, truth) == (10, 10, 1)
    full = torch.ones(9, 9, dtype=torch.bool)
    assert next_click(full, torch.zeros_like(full)) == (4, 4, 1)


def test_iou_of_masks():
    one, other = torch.rand(4, 6, 7) < 0.5, torch.rand(4, 6, 7) < 0.5
    one[0] = other[0] = False
    expected = [1.0]
    for a, b in zip(one[1:].numpy(), other[1:].numpy(), strict=True):
        expected.append((a & b).sum() / (a | b).sum())
    assert iou_of(one, other).tolist() == pytest.approx(expected)


def test_weights_to_start_from(tmp_path):
    network = make()
    state = network.state_dict()
    whole = save_state(tmp_path / "nano.safetensors", state)
    assert torch.equal(nano_from(whole).points, network.points)
    trunk = {k.removeprefix("trunk."): v for k, v in state.items() if k.startswith("trunk.")}
    # A classifier's file by order: the trunk first, then what is left of the classifier.
    more = {**trunk, "head.weight": torch.zeros(3)}
    classifier = save_state(tmp_path / "classifier.safetensors", more)
    torch.save(more, tmp_path / "classifier.pth")
    found = nano_from(tmp_path / "classifier.pth")
    assert torch.equal(found.trunk.stem[0].weight, network.trunk.stem[0].weight)
    assert not torch.equal(found.points, network.points)
    assert classifier.is_file()
    with pytest.raises(WeightsError, match="another architecture"):
        nano_from(save_state(tmp_path / "bad.safetensors", {"x": torch.zeros(2)}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 100}, "multiple of 32"),
        ({"crop_size": 544}, "at most 512"),
        ({"scale": (2.0, 1.0)}, "smallest, largest"),
        ({"repeats": [1, 2]}, "repeats must be 1 integers"),
        ({"masks": 0}, "masks must be positive"),
        ({"steps": 0}, "steps must be positive"),
        ({"trunk_rate": 1.5}, "trunk_rate is a share"),
    ],
)
def test_settings_that_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(make(), tmp_path, epochs=1, **options)


def test_data_without_regions_is_refused(tmp_path):
    class Void(Shapes):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return Sample(sample.name, sample.image, torch.full_like(sample.labels, 255))

    with pytest.raises(PysegError, match="no image of the data has a region"):
        train_promptable(make(), Void(2), output_dir=tmp_path, epochs=1, **small())


def test_command(tmp_path, monkeypatch):
    class Registered(Shapes):
        def __init__(self, root=None, split="train"):
            super().__init__(3, seed={"train": 0, "val": 1}[split])

    monkeypatch.setitem(datasets._registry._registered, "shapes", Registered)
    out = tmp_path / "run"
    common = ["train-promptable", "nano", "--dataset", "shapes", "-o", str(out)]
    common += [
        "--weights",
        "none",
        "--steps",
        "1",
        "--batch-size",
        "1",
        "--masks",
        "2",
        "--crop-size",
        "64",
    ]
    common += ["--precision", "fp32", "--validation", "shapes(split='val')", "--limit", "1"]
    first = CliRunner().invoke(cli.app, [*common, "--epochs", "1"])
    assert first.exit_code == 0, first.output
    assert "1 epochs" in first.output and "load_nano" in first.output
    more = CliRunner().invoke(cli.app, [*common, "--epochs", "2", "--resume", "--json"])
    assert more.exit_code == 0, more.output
    assert [entry["epoch"] for entry in json.loads(more.stdout)] == [1, 2]
    assert set(load_state(out / "model.safetensors")) == set(NanoNetwork().state_dict())
    other = CliRunner().invoke(cli.app, ["train-promptable", "sam", *common[2:], "--epochs", "1"])
    assert other.exit_code != 0
    assert isinstance(other.exception, PysegError) or "only the promptable" in other.output


def test_the_network_calls_for_prompts_until_there_are_no_more():
    network = make().eval()
    asked = []

    def ask(logits, iou):
        asked.append(None if logits is None else logits.shape)
        if len(asked) == 3:
            return None
        return torch.rand(4, 2, 2) * 64, torch.ones(4, 2), None

    assert isinstance(network, nn.Module)
    network(torch.zeros(2, 3, 64, 64), torch.zeros(2, 2), ask)
    assert asked == [None, (4, 3, 16, 16), (4, 3, 16, 16)]
