"""`adapt`: its steps by their equations, kills, determinism, and labels that nobody may read."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from pyseg_uda import adapt, mixing, training
from pyseg_uda.losses import cross_entropy
from pyseg_uda.steps import Called, Reference, Steps, segmentation_loss
from pyseg_uda.streams import four_streams
from pyseg_uda.teacher import teacher_of
from pyseg_uda.views import Unlabelled, Views, generator_of

import pyseg.training.loop
from pyseg.datasets import CamVid
from pyseg.errors import LabelError, PysegError
from pyseg.models import SemanticModel
from pyseg.types import VOID, Sample

SHORT = {"epochs": 2, "steps": 2, "crop_size": (32, 48), "learning_rate": 1e-3, "progress": False}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def steps_of(model, **options):
    given = {
        "teacher": teacher_of(model),
        "trunk": None,
        "reference": None,
        "threshold": 0.4,
        "trusted": (2, 3),
        "decay": 0.9,
        "colour": 0.2,
        "blur": 0.5,
        "consistency": 0.7,
        "distance": 0.3,
        "auxiliary": 0.4,
        "key": (0, 0),
    }
    return Steps(model, **{**given, **options})


def batch_of(scenes, step=3):
    day, dusk = scenes(2), scenes(2, dusk=True, seed=1)
    return {
        "source": torch.stack([sample.image for sample in day.samples]),
        "labels": torch.stack([sample.labels for sample in day.samples]),
        "target": torch.stack([sample.image for sample in dusk.samples]),
        "valid": torch.ones(2, 48, 64, dtype=torch.bool),
        "step": step,
    }


def test_a_step_of_self_training_is_its_equations(scenes, convolutional):
    model = convolutional().train()
    first = teacher_of(convolutional(1)).network.trunk
    reference = Reference(first, (2, 3))
    steps, batch = steps_of(model, reference=reference), batch_of(scenes)
    torch.manual_seed(7)  # of dropout
    losses = steps(Called(model), batch)
    # The same by hand: the teacher that `steps` has moved, on the target.
    source, target = batch["source"] / 255, batch["target"] / 255
    p = teacher_of(steps.teacher)(target)["out"]
    p = torch.nn.functional.interpolate(p, (48, 64), mode="bilinear").softmax(1)
    share = (p.max(1).values >= 0.4).double().mean()
    assert losses["confidence"].item() == pytest.approx(share.item())
    generator = generator_of(0, 0, 3)
    mask = mixing.class_masks(batch["labels"], generator)
    images = torch.where(mask[:, None], source, target)
    images = mixing.blur(mixing.jitter(images, generator, strength=0.2), generator, chance=0.5)
    labels = torch.where(mask, batch["labels"], p.argmax(1).to(torch.uint8))
    weights = torch.where(mask, 1.0, share.float())
    weights[:, :2] = torch.where(mask[:, :2], 1.0, 0.0)
    weights[:, -3:] = torch.where(mask[:, -3:], 1.0, 0.0)
    torch.manual_seed(7)
    own = segmentation_loss(model(batch["source"]), batch["labels"], None, 0.4)
    mixed = segmentation_loss(model(images), labels, weights, 0.4)
    assert losses["source"].item() == pytest.approx(own.item(), rel=1e-4)
    assert losses["mixed"].item() == pytest.approx(mixed.item(), rel=1e-4)
    seen, fixed = model.network.trunk((source - model.mean) / model.std), None
    fixed = first((source - model.mean) / model.std)
    kept = reference.distance(model, seen, source, batch["labels"])
    assert losses["distance"].item() == pytest.approx(kept.item(), rel=1e-3)
    assert not torch.equal(seen, fixed) and kept > 0
    total = own + mixed + 0.3 * kept
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-3)
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in steps.teacher.parameters())


def test_auxiliary_logits_are_at_their_own_size(scenes):
    labels = batch_of(scenes)["labels"]
    weights = torch.rand(labels.shape)
    logits = {"out": torch.randn(2, 4, 24, 32), "aux8": torch.randn(2, 4, 6, 8)}
    small, light = labels[:, 4::8, 4::8], weights[:, 4::8, 4::8]
    wanted = cross_entropy(logits["out"], labels, weights)
    wanted = wanted + 0.4 * cross_entropy(logits["aux8"], small, light)
    assert segmentation_loss(logits, labels, weights, 0.4).item() == pytest.approx(wanted.item())


def test_a_step_of_attention_is_half_of_four_losses_and_the_divergence(scenes, transformer):
    model = transformer()  # evaluation mode: nothing random
    trunk = model.network.trunk
    steps = steps_of(model, trunk=trunk, reference=Reference(transformer(1).network.trunk, (2,)))
    batch = batch_of(scenes, step=0)  # at step 0 the teacher is the student
    losses = steps(Called(model), batch)
    source, target = batch["source"] / 255, batch["target"] / 255
    mixture = steps.mixture(source, batch["labels"], target, batch["valid"], generator_of(0, 0, 0))
    p = teacher_of(model)(target)["out"]
    p = torch.nn.functional.interpolate(p, (48, 64), mode="bilinear").softmax(1)
    found = mixture.labels[~mixture.mask]
    assert (found == p.argmax(1)[~mixture.mask]).float().mean() > 0.999
    streams, _ = four_streams(
        trunk, (source - model.mean) / model.std, (mixture.images - model.mean) / model.std
    )
    s, m, m_to_s, s_to_m = (model.network.head(stream) for stream in streams)
    w = mixture.weights
    four = (
        cross_entropy(s, batch["labels"]),
        cross_entropy(m, mixture.labels, w),
        cross_entropy(m_to_s, batch["labels"], w),
        cross_entropy(s_to_m, mixture.labels),
    )
    assert losses["source"].item() == pytest.approx(four[0].item(), rel=1e-4)
    assert losses["across"].item() == pytest.approx((four[2] + four[3]).item(), rel=1e-4)
    total = sum(four) / 2 + 0.7 * losses["attention"] + 0.3 * losses["distance"]
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-4)
    assert losses["attention"] > 0 and losses["distance"] > 0
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["source", "self-training", "attention"])
def test_a_killed_run_resumes_to_the_same_weights(
    tmp_path, scenes, convolutional, transformer, monkeypatch, method
):
    make = transformer if method == "attention" else convolutional
    day, dusk = scenes(), scenes(dusk=True, seed=1)

    def run(folder, seed=0, **options):
        model = make(seed)
        given = {**SHORT, "method": method, "output_dir": folder, "validate_every": 2, **options}
        if method != "source":
            given |= {"imagenet": make(3), "things": ("car", "pole")}
        log = adapt(model, day, dusk, align="mean", validation=day, **given)
        return model, log

    whole, log = run(tmp_path / "whole")
    assert sorted(log[0]) == sorted(
        ["epoch", "learning_rate", "loss", "precision", "seconds"]
        + ([] if method == "source" else ["confidence", "distance", "mixed", "source"])
        + (["across", "attention"] if method == "attention" else [])
    )
    assert 0 < log[-1]["miou"] <= 1 and set(log[-1]["iou"]) == set(day.classes)
    assert not whole.training and all(math.isfinite(entry["loss"]) for entry in log)

    class Killed(Exception):
        pass

    real = pyseg.training.loop._save

    def kill(*arguments):
        real(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pyseg.training.loop, "_save", kill)
        with pytest.raises(Killed):
            run(tmp_path / "parts")
    resumed, _ = run(tmp_path / "parts", seed=5, resume=True)  # its own weights do not matter
    assert same(whole.state_dict(), resumed.state_dict())
    made = make(0)
    pyseg.weights.load_into(
        made, pyseg.weights.load_state(tmp_path / "parts" / "model.safetensors"), "parts"
    )
    assert same(whole.state_dict(), made.state_dict())
    with pytest.raises(PysegError, match=r"threshold \(was 0.968, now 0.5\)"):
        run(tmp_path / "parts", resume=True, threshold=0.5)


def test_half_precision_mixes_in_full(tmp_path, scenes, transformer):
    options = {**SHORT, "epochs": 1, "precision": "bf16", "blur": 1.0, "method": "attention"}
    (entry,) = adapt(transformer(), scenes(), scenes(dusk=True), output_dir=tmp_path, **options)
    assert entry["precision"] == "bf16" and entry["attention"] > 0


def test_another_seed_gives_other_views_and_the_same_seed_the_same(scenes):
    options = {"crop_size": (32, 48), "scale": (0.8, 1.2), "flip": 0.5, "category_limit": 0.75}
    options |= {"rare_crop": 0.01, "alignment": None, "beta": 0.01, "length": 6}
    day = scenes()
    dusk = Unlabelled(scenes(dusk=True))

    def views(key):
        made = Views(day, dusk, None, key=key, **options)
        return [made[k] for k in range(6)]

    one, again, other = views((0, 1, 0)), views((0, 1, 0)), views((1, 1, 0))
    assert all(same(a, b) for a, b in zip(one, again, strict=True))
    assert not any(same(a, b) for a, b in zip(one, other, strict=True))
    for view in one:
        assert view["source"].shape == view["target"].shape == (3, 32, 48)
        assert view["labels"].dtype == torch.uint8 and view["valid"].dtype == torch.bool


def test_views_show_what_they_were_drawn_for(scenes):
    day = scenes(6)
    counts = training.class_counts(day, 4)
    rare = mixing.RareClasses(counts, 0.01, 0.001)
    assert rare.probabilities.argmax() == 3  # the pole
    options = {"crop_size": (32, 32), "scale": (1, 1), "flip": 0.5, "category_limit": 1.0}
    made = [
        Views(
            day, None, draws, key=(0, 0, 0), rare_crop=0.01, alignment=None, beta=0.01,
            length=30, **options,
        )
        for draws in (rare, None)
    ]  # fmt: skip
    with_pole = [sum(bool((v[k]["labels"] == 3).any()) for k in range(30)) for v in made]
    assert with_pole[0] >= 15 > with_pole[1] + 5  # a window in eight shows it, of ten tries


def test_it_learns_dusk_from_day(tmp_path, scenes, convolutional):
    """Colours alone tell the classes, and dusk has other colours."""
    day, dusk = scenes(8), scenes(8, dusk=True, seed=1)
    scores = {}
    for method in ("source", "self-training"):
        model = convolutional()
        options = {**SHORT, "epochs": 1, "steps": 120, "batch_size": 4, "decay": 0.9}
        options |= {"learning_rate": 2e-3, "rates": None, "rare": None, "threshold": 0.8}
        options |= {"method": method, "output_dir": tmp_path / method}
        log = adapt(model, day, dusk, validation=dusk, **options)
        scores[method] = log[-1]["miou"]
    assert scores["self-training"] > scores["source"] + 0.05


class Unreadable(Sample):
    """A sample whose labels end the test."""

    def __getattribute__(self, name):
        if name in ("labels", "segments", "instances"):
            raise AssertionError("the target's labels were read")
        return super().__getattribute__(name)


def test_labels_of_samples_of_the_target_are_never_read(tmp_path, scenes, convolutional):
    dusk = scenes(dusk=True)
    dusk.samples = [Unreadable(s.name, s.image, s.labels) for s in dusk.samples]
    with pytest.raises(AssertionError):
        dusk[0].labels  # noqa: B018
    log = adapt(
        convolutional(), scenes(), dusk, output_dir=tmp_path, align="fourier", cache=False, **SHORT
    )
    assert len(log) == 2


def camvid(folder, names):
    generator = np.random.default_rng(0)
    for part in ("train", "trainannot"):
        (folder / part).mkdir(parents=True)
    for name in names:
        image = generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "train" / f"{name}.png")
        labels = np.repeat(generator.integers(0, 12, (6, 8), dtype=np.uint8), 8, 0).repeat(8, 1)
        Image.fromarray(labels).save(folder / "trainannot" / f"{name}.png")


def test_label_files_of_the_target_are_never_opened(tmp_path, convolutional):
    camvid(tmp_path / "c", ["0001TP_1", "0001TP_2", "0006R0_f1", "0016E5_2"])
    for path in (tmp_path / "c" / "trainannot").glob("0001TP_*"):
        path.write_bytes(b"no image")
    dusk = CamVid(tmp_path / "c", drives="dusk")
    with pytest.raises(PysegError):
        dusk[0]
    day = CamVid(tmp_path / "c", drives="day")
    torch.manual_seed(0)
    model = SemanticModel(type(convolutional().network)(11), day.classes)
    log = adapt(model, day, dusk, output_dir=tmp_path / "run", rates=None, **SHORT)
    assert len(log) == 2


def test_a_folder_of_images_below_others(tmp_path, scenes):
    for k, sample in enumerate(scenes(3).samples):
        (tmp_path / f"{k % 2}").mkdir(exist_ok=True)
        picture = Image.fromarray(sample.image.permute(1, 2, 0).numpy())
        picture.save(tmp_path / f"{k % 2}" / f"{k}.png")
    (tmp_path / "notes.txt").write_text("no image")
    found = Unlabelled(tmp_path)
    assert len(found) == 3 and found.classes is None
    assert torch.equal(found[1], scenes(3)[2].image)  # sorted by path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, r"method must be one of source, self-training, attention, got 'mag"),
        ({"align": "colour"}, r"align must be one of mean, covariance, fourier, or None"),
        ({"batch_size": 0}, r"batch_size must be positive, got 0"),
        ({"threshold": 1.5}, r"threshold is a share and must be in 0..1, got 1.5"),
        ({"decay": -1}, r"decay is a share"),
        ({"consistency": -1}, r"consistency must be 0 or more, and finite, got -1"),
        ({"rare": 0}, r"rare is a temperature and must be positive, or None, got 0"),
        ({"crop_size": (16, 48)}, r"crop_size must be \(height, width\) of at least 32"),
        ({"scale": (2, 1)}, r"scale must be \(smallest, largest\)"),
        ({"trusted": (20, 12)}, r"trusted must be rows at top and bottom that leave some of 32"),
        ({"rare_image": 1.0}, r"no image has more than a share of 1.0 of any class"),
        ({"epochs": 0}, r"epochs must be positive"),
    ],
)
def test_settings_out_of_range(tmp_path, scenes, convolutional, options, message):
    with pytest.raises(ValueError, match=message):
        adapt(
            convolutional(),
            scenes(),
            scenes(dusk=True),
            output_dir=tmp_path / "run",
            **{**SHORT, **options},
        )
    assert not (tmp_path / "run").exists()


def test_domains_that_do_not_fit(tmp_path, scenes, convolutional, transformer):
    day, model = scenes(), convolutional()

    def run(source=day, target=day, model=model, **options):
        return adapt(model, source, target, output_dir=tmp_path / "run", **{**SHORT, **options})

    (tmp_path / "empty").mkdir()
    for target, message in (
        (tmp_path / "empty", r"target has no images: the folder .*empty is empty"),
        (tmp_path / "none", r"target: there is no folder .*none"),
        (scenes(0), r"target has no images: the data set is empty"),
        (None, r"target is missing: only method='source' without align goes without"),
    ):
        with pytest.raises(ValueError, match=message):
            run(target=target)
    other = scenes()
    other.classes = ("cell", "nucleus")
    with pytest.raises(ValueError, match=r"no class in common: road, sky, car.* against cell, nuc"):
        run(target=other)
    with pytest.raises(ValueError, match=r"validation has the classes cell, nucleus, source road"):
        run(validation=other)
    with pytest.raises(ValueError, match=r"model has 4 classes, source 2; build the model with n"):
        run(source=other, target=other)
    with pytest.raises(ValueError, match=r"source is empty"):
        run(source=scenes(0))
    with pytest.raises(PysegError, match=r"needs a mix transformer"):
        run(method="attention")
    with pytest.raises(PysegError, match=r"imagenet must be a model of the same network.* SegForm"):
        run(imagenet=transformer())
    with pytest.raises(ValueError, match=r"things: source has no class 'tram'"):
        run(imagenet=model, things=("tram",))
    far = scenes()
    far.classes = ("a", "b", "c", "road")
    with pytest.raises(ValueError, match=r"none of source's classes is countable by its name"):
        run(source=far, imagenet=model)
    bad = scenes()
    bad.samples[1].labels[0, 5] = 9
    with pytest.raises(LabelError, match=r"scene1 has labels \[9\] beyond the 4 classes"):
        run(source=bad)
    for sample in bad.samples:
        sample.labels.fill_(VOID)
    with pytest.raises(LabelError, match=r"no pixel of any class"):
        run(source=bad)
    bad.samples[0] = Sample("bare", bad[0].image)
    with pytest.raises(LabelError, match=r"sample bare has no labels"):
        run(source=bad)
    assert not (tmp_path / "run").exists()
