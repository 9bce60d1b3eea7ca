"""Optimizers, parts, accumulation, early stop, losses that are not finite, logs."""

import csv
import json
import math

import pytest
import torch
from torch import nn
from toys import SHORT, Shapes, plain, same, tiny

from pyseg import models
from pyseg.errors import PysegError
from pyseg.training import fit, logs, make_optimizer, parameter_groups, train
from pyseg.training.optimizer import frozen, rates_of, read_rates, training_mode
from pyseg.weights import load_state


@pytest.fixture(autouse=True)
def threads(one_thread):
    """The networks are too small for more."""


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def changed(before, model):
    return {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}


def fcn():
    torch.manual_seed(0)
    return models.create("fcn_resnet18", num_classes=3, weights=None)


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_optimizers_are_torchs(kind):
    ours, theirs = plain(), plain()
    optimizer = make_optimizer(kind, ours, learning_rate=0.01, weight_decay=0.1, momentum=0.8)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    other = {
        "adamw": lambda: torch.optim.AdamW(groups, 0.01, betas=(0.8, 0.999)),
        "adam": lambda: torch.optim.Adam(groups, 0.01, betas=(0.8, 0.999)),
        "sgd": lambda: torch.optim.SGD(groups, 0.01, momentum=0.8),
    }[kind]()
    for step in range(3):
        images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        for model, each in ((ours, optimizer), (theirs, other)):
            each.zero_grad()
            model(images)["out"].square().mean().backward()
            each.step()
    assert same(ours.state_dict(), theirs.state_dict())


def test_rates_of_parts():
    model = fcn()
    factors = rates_of(model, read_rates("backbone=0.1, backbone.layer1=0, head=2, rest=0.5"))
    trunk = f"network.{model.trunk}."
    heads = tuple(f"network.{head}." for head in model.heads)
    assert set(factors.values()) == {0.1, 0.0, 2.0, 0.5}
    for name, factor in factors.items():
        if name.startswith(heads):
            assert factor == 2
        elif name.startswith(trunk + "layer1."):
            assert factor == 0
        else:
            assert factor == (0.1 if name.startswith(trunk) else 0.5)
    optimizer = make_optimizer(
        "sgd", model, learning_rate=0.2, weight_decay=0.1, rates={"backbone": 0.1}
    )
    by_rate = {}
    for group in optimizer.param_groups:
        rate = round(group["lr"], 9)
        by_rate[rate] = by_rate.get(rate, 0) + len(group["params"])
    of_trunk = sum(name.startswith(trunk) for name, _ in model.named_parameters())
    assert by_rate == {0.2: len(factors) - of_trunk, 0.02: of_trunk}
    assert optimizer.param_groups[0]["lr"] == 0.2  # what the log shows
    assert len(parameter_groups(model, 0.1)) == 2


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ("backbone", "parts of the model and factors"),
        ("backbone=a", "parts of the model and factors"),
        ("head=1,head=2", "each once"),
        ({"backbone": -1}, "backbone must be 0 .frozen. or more"),
        ([1], "parts of the model and factors"),
        ("bodi=0.1", "no part 'bodi'; .* such as body"),
        ("rest=0", "freeze the whole model"),
    ],
)
def test_rates_that_do_not_fit(tmp_path, rates, message):
    with pytest.raises((ValueError, PysegError), match=message):
        train(tiny(), Shapes(), output_dir=tmp_path / "run", **{**SHORT, "rates": rates})


def test_every_known_model_has_its_parts():
    for name in ("fcn_resnet18", "segformer_b0", "unet_resnet34", "streetnet"):
        model = models.create(name, num_classes=3, weights=None)
        parts = {"head": 0.0} if model.trunk is None else {"head": 0.0, "backbone": 0.0}
        for part in parts:
            chosen = [k for k, v in rates_of(model, {part: 0.0}).items() if v == 0]
            assert 0 < len(chosen) < len(list(model.parameters())), (name, part)


def test_a_frozen_trunk_keeps_its_statistics_and_is_released(tmp_path):
    model = fcn()
    trunk = f"network.{model.trunk}."
    before = weights(model)
    options = {**SHORT, "crop_size": (32, 32), "epochs": 2, "rates": {"backbone": 0}}
    train(model, Shapes(2, size=(40, 40)), output_dir=tmp_path / "a", **options)
    moved = changed(before, model)
    assert moved and not [key for key in moved if key.startswith(trunk)]
    assert "network.classifier.1.running_mean" in moved  # of the part that is trained
    assert all(parameter.requires_grad for parameter in model.parameters())
    # Partly: only the first stage and what is before it.
    before = weights(model)
    partly = {**options, "rates": "backbone.conv1=0,backbone.bn1=0,backbone.layer1=0"}
    train(model, Shapes(2, size=(40, 40)), output_dir=tmp_path / "b", **partly)
    moved = changed(before, model)
    still = [f"{trunk}{part}." for part in ("conv1", "bn1", "layer1")]
    assert not [key for key in moved if key.startswith(tuple(still))]
    assert f"{trunk}layer2.0.bn1.running_mean" in moved


def test_only_the_head(tmp_path):
    model = fcn()
    before = weights(model)
    options = {**SHORT, "crop_size": (32, 32), "epochs": 2, "rates": "rest=0,head=1"}
    train(model, Shapes(2, size=(40, 40)), output_dir=tmp_path, **options)
    heads = tuple(f"network.{head}." for head in model.heads)
    moved = changed(before, model)
    assert moved == {key for key in before if key.startswith(heads)}


def test_frozen_dropout_and_normalisation_without_parameters_stay_off():
    model = nn.Module()
    model.a = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False), nn.Dropout())
    model.b = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout())
    with frozen(model, {"a": 0.0}):
        training_mode(model)
    assert not any(module.training for module in model.a.modules())
    assert model.training and all(module.training for module in model.b.modules())


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path):
    """Every crop has another number of void pixels; the last step of an epoch has one batch."""
    options = {
        **SHORT,
        "loss": "ce",
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "full_size": 0,
        "scale": (0.3, 1.0),
        "auxiliary": 0,
    }
    results = []
    for batch, accumulate in ((4, 1), (1, 4), (2, 2)):
        model = plain()
        settings = {**options, "batch_size": batch, "accumulate": accumulate}
        log = train(model, Shapes(8), output_dir=tmp_path / str(batch), **settings)
        results.append((model.state_dict(), [entry["loss"] for entry in log]))
    assert not same(plain().state_dict(), results[0][0])
    for state, losses in results[1:]:
        assert losses == pytest.approx(results[0][1], abs=2e-5)
        for key, value in state.items():
            torch.testing.assert_close(value, results[0][0][key], rtol=1e-4, atol=1e-6)
    model = plain()  # five batches in steps of two: three steps
    settings = {**options, "batch_size": 1, "accumulate": 2}
    log = train(model, Shapes(5), output_dir=tmp_path / "odd", **settings)
    state = torch.load(tmp_path / "odd" / "checkpoint.pt")
    assert math.isfinite(log[-1]["loss"]) and len(log) == 4 and state["epoch"] == 4


def scored(scores):
    """A validation with given scores."""
    left = list(scores)
    return lambda model: {"score": left.pop(0)}


def fit_scored(folder, scores, model, **options):
    def step(network, batch):
        return {"loss": network(batch)["out"].square().mean()}

    def batches(epoch):
        generator = torch.Generator().manual_seed(epoch)
        return [torch.rand(1, 3, 8, 8, generator=generator) for _ in range(2)]

    settings = {"epochs": 8, "steps": 2, "ema": 0.5, "precision": "fp32", "validate_every": 1}
    return fit(
        model,
        batches,
        step=step,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        output_dir=folder,
        validate=scored(scores),
        watch="score",
        **{**settings, **options},
    )


def test_early_stop_ends_with_the_best_weights(tmp_path):
    stopped = plain()
    scores = [0.1, 0.4, float("nan"), 0.4, 0.3, 0.9]
    log = fit_scored(tmp_path / "a", scores, stopped, patience=3)
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4, 5]  # the best is the second
    # The weights are those of the second epoch of a run that has the same schedule.
    ends = {}

    def keep(model):
        ends[len(ends) + 1] = weights(model)
        return {"score": 0}

    other = plain()
    fit_scored(tmp_path / "b", [0] * 8, other, patience=None)
    third = plain()
    settings = {"epochs": 8, "steps": 2, "ema": 0.5, "precision": "fp32", "validate_every": 1}
    fit(
        third,
        lambda epoch: [
            torch.rand(1, 3, 8, 8, generator=g)
            for g in [torch.Generator().manual_seed(epoch)]
            for _ in range(2)
        ],
        step=lambda network, batch: {"loss": network(batch)["out"].square().mean()},
        optimizer=torch.optim.SGD(third.parameters(), 0.1),
        output_dir=tmp_path / "c",
        validate=keep,
        **settings,
    )
    assert same(stopped.state_dict(), ends[2]) and not same(ends[2], ends[5])
    assert same(other.state_dict(), ends[8])
    for name in ("best.safetensors", "model.safetensors"):
        assert same(load_state(tmp_path / "a" / name), ends[2])
    # A run that is over stays so.
    again = plain(seed=3)
    log_again = fit_scored(tmp_path / "a", [], again, patience=3, resume=True)
    assert log_again == log or all(math.isnan(a["score"]) for a in (log_again[2], log[2]))
    assert same(again.state_dict(), ends[2])


def test_patience_needs_a_score(tmp_path):
    with pytest.raises(ValueError, match="patience needs validation"):
        train(tiny(), Shapes(), output_dir=tmp_path / "run", **{**SHORT, "patience": 2})
    with pytest.raises(ValueError, match="patience must be positive"):
        fit_scored(tmp_path / "b", [], plain(), patience=0)
    assert not (tmp_path / "run").exists()


def test_early_stop_of_train_resumes(tmp_path):
    options = {**SHORT, "epochs": 12, "validate_every": 1, "patience": 2, "learning_rate": 1e-9}
    model = tiny()
    log = train(model, Shapes(3), validation=Shapes(3), output_dir=tmp_path, **options)
    assert len(log) < 12 and max(e["miou"] for e in log) == log[-3]["miou"]
    other = tiny(seed=2)
    train(other, Shapes(3), validation=Shapes(3), output_dir=tmp_path, resume=True, **options)
    assert same(model.state_dict(), other.state_dict())


def test_the_batch_of_a_loss_that_is_not_finite_is_kept(tmp_path):
    data = Shapes(6)
    white = data.samples[4].image
    white.fill_(255)
    model = plain()

    def poison(module, given):
        images = given[0].clone()
        bad = (given[0] == 255).flatten(1).all(1)
        images = images.float() / 255
        images[bad] = math.nan
        return (images,)

    model.register_forward_pre_hook(poison)
    options = {**SHORT, "photometric": 0, "full_size": 0, "scale": (1, 1), "class_crops": 0}
    with pytest.raises(PysegError, match=r"finite in epoch 1, at batch \d of 3, .*shape4"):
        train(model, data, output_dir=tmp_path, **{**options, "batch_size": 2})
    kept = torch.load(tmp_path / "nonfinite_batch.pt", weights_only=True)
    assert "shape4" in kept["names"] and len(kept["names"]) == 2
    assert kept["images"].shape == (2, 3, 16, 16) and kept["labels"].shape == (2, 16, 16)
    assert (kept["images"][kept["names"].index("shape4")] == 255).all()
    assert kept["losses"]["loss"].isnan() and kept["epoch"] == 0
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_bad_batch_leaves_the_last_checkpoint(tmp_path):
    model = plain()
    calls = []

    def step(network, batch):
        calls.append(batch)
        factor = math.inf if len(calls) == 25 else 1.0
        return {"loss": network(batch)["out"].square().mean() * factor}

    def run():
        fit(
            model,
            lambda epoch: [torch.rand(1, 3, 8, 8)] * 10,
            step=step,
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            steps=10,
            epochs=5,
            output_dir=tmp_path,
            precision="fp32",
        )

    with pytest.raises(PysegError, match=r"epoch 3, at batch 5 of 10, which is kept in"):
        run()
    state = torch.load(tmp_path / "checkpoint.pt")
    assert state["epoch"] == 2 and all(v.isfinite().all() for v in state["model"].values())
    assert torch.load(tmp_path / "nonfinite_batch.pt")["batch"].shape == (1, 3, 8, 8)


def test_the_log_is_also_a_table(tmp_path):
    log = train(
        tiny(),
        Shapes(3),
        validation=Shapes(2),
        output_dir=tmp_path,
        **{**SHORT, "validate_every": 2},
    )
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(log) == 4
    for row, entry in zip(rows, log, strict=True):
        assert int(row["epoch"]) == entry["epoch"] and float(row["loss"]) == entry["loss"]
        wanted = "" if "miou" not in entry else str(entry["iou"]["disc"])
        assert row["iou/disc"] == wanted and row["precision"] == "fp32"


def test_tensorboard_has_every_epoch_once_though_a_run_was_resumed(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Dies(Shapes):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads > 3 * 3 + 1:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    options = {
        **SHORT,
        "tensorboard": True,
        "cache": False,
        "output_dir": tmp_path,
        "save_every": 2,
    }
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), Dies(3), **options)
    log = train(tiny(), Shapes(3), resume=True, **options)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("epoch/loss")
    assert [event.value for event in losses] == pytest.approx([e["loss"] for e in log], rel=1e-6)
    assert [event.step for event in losses] == [0, 1, 2, 3]
    assert {"step/loss", "step/learning_rate", "epoch/seconds"} <= set(events.Tags()["scalars"])


def test_without_a_terminal_lines_tell_the_time_that_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logs, "LINES_EVERY", 0.0)
    train(tiny(), Shapes(2), output_dir=tmp_path / "a", **{**SHORT, "progress": True})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[0].startswith("epoch 1/4, loss ")
    assert all(line.endswith(" left") for line in lines) and lines[-1].endswith("0 s left")
    train(tiny(), Shapes(2), output_dir=tmp_path / "b", **SHORT)
    assert not capsys.readouterr().err
    texts = [logs.duration(s) for s in (0.4, 59, 61, 3600 * 26 + 125)]
    assert texts == ["0 s", "59 s", "1 min 1 s", "26 h 2 min"]


def test_a_checkpoint_of_an_older_version_goes_on(tmp_path):
    """It names the class weights and the Jaccard loss in other words, and has no newer options."""
    whole = tiny()
    train(whole, Shapes(3), output_dir=tmp_path / "whole", **SHORT)
    parts = tmp_path / "parts"
    train(tiny(), Shapes(3), output_dir=parts, **{**SHORT, "epochs": 2, "full_size": 0.15})
    state = torch.load(parts / "checkpoint.pt")
    settings = json.loads(state["settings"])
    for name in ("loss", "class_weights", "optimizer", "rates", "momentum", "flip", "class_mix"):
        settings.pop(name)
    for name in ("category_limit", "schedule", "accumulate", "patience"):
        settings.pop(name)
    settings |= {"class_power": 0.35, "jaccard": 1.0}
    torch.save({**state, "settings": json.dumps(settings)}, parts / "checkpoint.pt")
    with pytest.raises(PysegError, match=r"loss \(was 'ce\+jaccard', now 'ce'\)"):
        train(tiny(), Shapes(3), output_dir=parts, resume=True, **{**SHORT, "loss": "ce"})
    with pytest.raises(PysegError, match=r"optimizer \(was 'adamw', now 'sgd'\)"):
        train(tiny(), Shapes(3), output_dir=parts, resume=True, **{**SHORT, "optimizer": "sgd"})
    model = tiny(seed=8)
    log = train(model, Shapes(3), output_dir=parts, resume=True, **SHORT)
    assert len(log) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be"),
        ({"schedule": "exponential"}, "schedule must be"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"accumulate": 0}, "accumulate must be positive"),
        ({"class_weights": "mean"}, "class_weights must be a number or 'median'"),
        ({"loss": "ce+dise"}, "did you mean dice"),
        ({"class_mix": 2}, "class_mix is a share"),
        ({"category_limit": -1}, "category_limit is a share"),
    ],
)
def test_settings_out_of_range(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(), Shapes(), output_dir=tmp_path / "run", **{**SHORT, **options})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("schedule", ["poly", "one-cycle"])
@pytest.mark.parametrize("loss", ["ohem+0.5*lovasz", "focal+dice", "ce+0.2*boundary(radius=4)"])
def test_other_losses_and_schedules_learn(tmp_path, schedule, loss):
    options = {**SHORT, "epochs": 40, "crop_size": (24, 32), "scale": (0.9, 1.1), "photometric": 0}
    options |= {"loss": loss, "schedule": schedule, "warmup": 0.2, "optimizer": "sgd"}
    options |= {"learning_rate": 0.2, "clip": 1.0, "class_weights": "median"}
    log = train(tiny(), Shapes(), validation=Shapes(), output_dir=tmp_path, **options)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and log[-1]["miou"] > 0.6
