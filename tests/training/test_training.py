import contextlib
import functools
import json
import math
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toys import CLASSES, PALETTE, SHORT, Shapes, same, tiny

import pyseg
import pyseg.tuning
from pyseg import instance_training, training
from pyseg.errors import LabelError, PysegError, WeightsError
from pyseg.models.semantic import SemanticModel
from pyseg.training import fit, loop, parameter_groups, random_crop, random_light, semantic, train
from pyseg.types import Sample
from pyseg.weights import load_into, load_state


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are too small for more; waiting threads would only slow them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_overfits_two_images(tmp_path, precision):
    data = Shapes()
    model = tiny()
    log = train(
        model,
        data,
        validation=data,
        output_dir=tmp_path,
        epochs=120,
        batch_size=2,
        crop_size=(24, 32),
        scale=(0.9, 1.1),
        photometric=0,
        learning_rate=0.02,
        ema=0.9,
        precision=precision,
        validate_every=60,
        save_every=60,
        progress=False,
    )
    assert log[-1]["miou"] > 0.9
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert [entry["epoch"] for entry in log if "miou" in entry] == [60, 120]
    assert json.loads((tmp_path / "log.json").read_text()) == log
    # The model holds what the file holds, is ready for use, and knows the data's classes.
    assert not model.training
    other = tiny(seed=1)
    load_into(other, load_state(tmp_path / "model.safetensors"), "model.safetensors")
    assert same(model.state_dict(), other.state_dict())
    assert model.palette == PALETTE
    for sample in data:
        labels = model.predict([sample.image])[0].labels
        valid = sample.labels != 255
        assert (labels == sample.labels)[valid].float().mean() > 0.95


@functools.cache
def whole_run(count=3):
    """Weights and log after `SHORT` on so many samples."""
    model = tiny()
    with tempfile.TemporaryDirectory() as folder:
        log = train(model, Shapes(count), output_dir=folder, **SHORT)
    return {key: value.clone() for key, value in model.state_dict().items()}, log


def test_same_seed_same_weights(tmp_path):
    runs = []
    for number, options in enumerate(({}, {"seed": 1}, {"workers": 1}, {"cache": False})):
        model = tiny().eval()  # `train` sees to the mode itself
        train(model, Shapes(3), output_dir=tmp_path / str(number), **{**SHORT, **options})
        assert not model.training
        runs.append(model.state_dict())
    first, (again, other_seed, worker, uncached) = whole_run()[0], runs
    assert same(first, again)
    assert not same(first, other_seed)
    assert same(first, worker)
    assert same(first, uncached)


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    whole, log = whole_run()

    class Dies(Shapes):
        """Raises in the third epoch; uncached, each epoch reads all samples."""

        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads > 3 * 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    options = {**SHORT, "cache": False, "output_dir": tmp_path / "parts"}
    victim = tiny()
    with pytest.raises(KeyboardInterrupt):
        train(victim, Dies(3), **options)
    assert not victim.training
    done = json.loads((tmp_path / "parts" / "log.json").read_text())
    assert 0 < len(done) < 4
    resumed = tiny(seed=5)  # its own weights do not matter
    log_parts = train(resumed, Shapes(3), resume=True, **options)
    assert same(whole, resumed.state_dict())
    for a, b in zip(log, log_parts, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


@pytest.mark.parametrize("count, length", [(5, 2), (5, 5), (5, 7), (3, 11), (1, 4), (4, 1)])
def test_epochs_of_another_length_see_all_samples_equally_often(count, length):
    order = semantic.EpochOrder(count, seed=3, length=length)
    seen = []
    for order.epoch in range(count * 2):
        epoch = list(order)
        assert len(epoch) == len(order) == length
        assert len(set(epoch)) == length  # each with crops of its own
        seen += [number % count for number in epoch]
    for begin in range(0, len(seen), count):
        assert sorted(seen[begin : begin + count]) == list(range(count))
    if length == count:
        same_as = semantic.EpochOrder(count, seed=3)
        same_as.epoch = order.epoch
        assert list(same_as) == list(order)


def test_epochs_of_a_number_of_steps_resume(tmp_path):
    options = {**SHORT, "steps": 5}  # of 2 of the 3 samples
    whole = tiny()
    log = train(whole, Shapes(3), output_dir=tmp_path / "whole", **options)

    class Dies(Shapes):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads > 3 + 25:  # the pass over the labels, two and a half epochs
                raise KeyboardInterrupt
            return super().__getitem__(index)

    parts = {**options, "cache": False, "output_dir": tmp_path / "parts"}
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), Dies(3), **parts)
    assert len(json.loads((tmp_path / "parts" / "log.json").read_text())) == 2
    resumed = tiny(seed=5)
    again = train(resumed, Shapes(3), resume=True, **parts)
    assert same(whole.state_dict(), resumed.state_dict())
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in log]
    with pytest.raises(PysegError, match=r"steps \(was 5, now 4\)"):
        train(tiny(), Shapes(3), resume=True, **{**parts, "steps": 4})
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        train(tiny(), Shapes(3), output_dir=tmp_path / "none", **{**SHORT, "steps": 0})


@pytest.mark.parametrize("victim", ["model.safetensors", "log.json", "checkpoint.pt"])
def test_a_kill_while_writing_leaves_the_previous_files(tmp_path, monkeypatch, victim):
    replace = Path.replace
    left = tmp_path / f".{victim}.0123456789ab.part"
    writes = 0

    def dies_half_way(self, target):
        nonlocal writes
        writes += target.name == victim
        if target.name == victim and writes == 3:
            left.write_bytes(self.read_bytes()[: self.stat().st_size // 2])
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies_half_way)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), Shapes(3), output_dir=tmp_path, **SHORT)
    load_into(tiny(), load_state(tmp_path / "model.safetensors"), "model.safetensors")
    assert len(json.loads((tmp_path / "log.json").read_text())) >= 2
    yesterday = time.time() - 25 * 3600
    os.utime(left, (yesterday, yesterday))
    resumed = tiny(seed=5)
    train(resumed, Shapes(3), output_dir=tmp_path, resume=True, **SHORT)
    assert same(whole_run()[0], resumed.state_dict())
    assert not left.exists()  # the next run clears up


def test_a_folder_that_is_a_file_is_one_error(tmp_path):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(PysegError, match=r"output_dir .*run' is a file"):
        train(tiny(), Shapes(3), output_dir=tmp_path / "run", **SHORT)


@contextlib.contextmanager
def largest_file(size):
    """Within it writing fails beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "victim"), [(9_000, "model.safetensors"), (30_000, "checkpoint.pt")]
)
def test_a_full_disk_is_one_error_that_names_the_file(tmp_path, size, victim):
    with pytest.raises(OSError, match=victim) as raised, largest_file(size):
        train(tiny(), Shapes(), output_dir=tmp_path, **SHORT)
    assert raised.value.filename == str(tmp_path / victim)
    assert not [file.name for file in tmp_path.iterdir() if ".part" in file.name]
    assert not (tmp_path / victim).exists()


def test_one_training_at_a_time_writes_to_a_folder(tmp_path):
    class Waits(Shapes):
        """Stops in its first batch, after the pass over the labels."""

        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads > len(self):
                training_now.set()
                time.sleep(600)
            return super().__getitem__(index)

    fork = multiprocessing.get_context("fork")
    training_now = fork.Event()
    options = {**SHORT, "output_dir": tmp_path, "cache": False}
    other = fork.Process(target=train, args=(tiny(), Waits()), kwargs=options, daemon=True)
    other.start()
    try:
        assert training_now.wait(120)
        with pytest.raises(PysegError, match=r"is being written by another training"):
            train(tiny(), Shapes(), **options)
    finally:
        other.kill()
        other.join()
    train(tiny(), Shapes(), **options)  # the lock of one that was killed is free


def test_a_run_may_be_lengthened_and_shortened(tmp_path):
    def rates(log):
        return [entry["learning_rate"] for entry in log]

    model = tiny()
    log = train(model, Shapes(3), output_dir=tmp_path, **{**SHORT, "epochs": 2})
    longer = train(model, Shapes(3), output_dir=tmp_path, resume=True, **SHORT)
    assert longer[:2] == log and rates(longer)[2:] == rates(whole_run()[1])[2:]
    with pytest.raises(PysegError, match="has 4 epochs behind it; give at least as many"):
        train(model, Shapes(3), output_dir=tmp_path, resume=True, **{**SHORT, "epochs": 3})
    again = tiny(seed=5)  # of a run that is over nothing is left to do
    assert train(again, Shapes(3), output_dir=tmp_path, resume=True, **SHORT) == longer
    assert same(again.state_dict(), model.state_dict()) and not again.training


def test_precision_is_by_hardware_unless_it_is_given(tmp_path, monkeypatch):
    def precisions(output, **options):
        settings = {**SHORT, "epochs": 1, "precision": None, **options}
        return [e["precision"] for e in train(tiny(), Shapes(), output_dir=output, **settings)]

    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert training.usual_precision(torch.device("cpu")) == "fp32"
    assert precisions(tmp_path / "a") == ["fp32"]
    assert precisions(tmp_path / "b", precision="bf16") == ["bf16"]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert training.usual_precision(torch.device("cpu")) == "fp32"  # faster, without AMX
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert training.usual_precision(torch.device("cpu")) == "bf16"
    # A run that goes on keeps what it has.
    assert precisions(tmp_path / "a", resume=True, epochs=2) == ["fp32", "fp32"]
    with pytest.raises(PysegError, match=r"precision \(was 'fp32', now 'bf16'\)"):
        precisions(tmp_path / "a", resume=True, precision="bf16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert training.usual_precision(torch.device("cuda")) == "fp32"


def test_what_cannot_be_resumed_is_refused(tmp_path):
    with pytest.raises(PysegError, match=r"there is no .*checkpoint.pt; start with resume=False"):
        train(tiny(), Shapes(), output_dir=tmp_path, resume=True, **SHORT)
    train(tiny(), Shapes(), output_dir=tmp_path, **{**SHORT, "epochs": 1})
    with pytest.raises(PysegError, match=r"earlier run; pass resume=True"):
        train(tiny(), Shapes(), output_dir=tmp_path, **SHORT)
    with pytest.raises(PysegError, match=r"batch_size \(was 2, now 1\)"):
        options = {**SHORT, "epochs": 1, "batch_size": 1}
        train(tiny(), Shapes(), output_dir=tmp_path, resume=True, **options)
    with pytest.raises(PysegError, match=r"samples \(was 2, now 3\)"):
        train(tiny(), Shapes(3), output_dir=tmp_path, resume=True, **{**SHORT, "epochs": 1})
    other = SemanticModel(nn.Conv2d(3, 3, 1), CLASSES)
    with pytest.raises(WeightsError, match=r"another architecture"):
        train(other, Shapes(), output_dir=tmp_path, resume=True, **{**SHORT, "epochs": 1})


def test_a_companion_resumes_with_the_model(tmp_path):
    """A module that the step moves by itself, and whose state the loss depends on."""

    def run(folder, resume=False, **options):
        torch.manual_seed(0)
        model, companion = nn.Linear(3, 1), nn.Linear(3, 1).requires_grad_(False)
        generator = torch.Generator()

        def batches(epoch):
            generator.manual_seed(epoch)
            return [torch.randn(4, 3, generator=generator) for _ in range(3)]

        def step(network, batch):
            companion.weight.lerp_(model.weight.detach(), 0.3)
            return {"loss": (network(batch) - 2 * companion(batch) + 1).square().mean()}

        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        options = {"companion": companion, "resume": resume, "output_dir": folder, **options}
        options |= {"steps": 3, "epochs": 2, "schedule": "linear", "progress": False}
        loop.fit(model, batches, step=step, optimizer=optimizer, **options)
        return {**model.state_dict(), "companion": companion.weight}

    whole = run(tmp_path / "whole")
    state = torch.load(tmp_path / "whole" / "checkpoint.pt")
    assert torch.equal(state["companion"]["weight"], whole["companion"])
    with pytest.raises(PysegError, match=r"it has a companion, and this run is otherwise"):
        run(tmp_path / "whole", resume=True, companion=None)

    class Stopped(Exception):
        pass

    real = loop._save

    def stop(*arguments):
        real(*arguments)
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_save", stop)
        with pytest.raises(Stopped):
            run(tmp_path / "killed")
    assert same(whole, run(tmp_path / "killed", resume=True))


def change(**entries):
    return lambda state: {**state, **entries}


def without(*keys):
    return lambda state: {key: value for key, value in state.items() if key not in keys}


def change_part(part, edit):
    return lambda state: {**state, part: edit(state[part])}


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: [1, 2],
        lambda state: {},
        without("optimizer"),
        without("epoch"),
        change(settings="[]"),
        change(settings="no JSON"),
        change(settings="[" * 100_000),
        change(log="{}"),
        change(log="[1]"),
        change(epoch=-1),
        change(epoch=99),
        change(epoch="1"),
        change(model=[]),
        change(average=None),
        change_part("average", without("network.head.bias")),
        change_part("average", change(**{"network.head.bias": torch.zeros(7)})),
        change(optimizer={}),
        change_part("optimizer", change(param_groups=[])),
        change_part("optimizer", change(state=3)),
        lambda state: Path("needs more than tensors"),
    ],
)
def test_a_checkpoint_of_a_wrong_form_is_refused(checkpoint, tmp_path, edit):
    torch.save(edit(torch.load(checkpoint)), tmp_path / "checkpoint.pt")
    with pytest.raises(PysegError, match=r"not a readable training checkpoint") as raised:
        train(tiny(), Shapes(), output_dir=tmp_path, resume=True, **{**SHORT, "epochs": 1})
    assert "weights_only" not in str(raised.value)  # torch's advice, which is to run its code


def test_a_truncated_checkpoint_is_refused(checkpoint, tmp_path):
    for content in (b"", b"half a file", checkpoint.read_bytes()[:5000]):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(PysegError, match=r"not a readable training checkpoint"):
            train(tiny(), Shapes(), output_dir=tmp_path, resume=True, **SHORT)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    train(tiny(), Shapes(), output_dir=folder, **{**SHORT, "epochs": 1})
    return folder / "checkpoint.pt"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"ema": 1.0}, "ema must be in 0..1, below 1"),
        ({"scale": (2, 1)}, "smallest <= largest"),
        ({"class_crops": 1.5}, "class_crops is a share"),
        ({"crop_size": (0, 4)}, "crop_size must be"),
        ({"precision": "fp8"}, "'bf16' or 'fp32', got 'fp8'"),
    ],
)
def test_settings_out_of_range(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(), Shapes(), output_dir=tmp_path / "run", **{**SHORT, **options})
    assert not (tmp_path / "run").exists()


def test_data_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"model has 2 classes, dataset 3; .*num_classes=3"):
        train(tiny(("a", "b")), Shapes(), output_dir=tmp_path, **SHORT)
    data = Shapes()
    data.samples[1].labels[3, 3] = 7
    with pytest.raises(LabelError, match=r"shape1 has labels \[7\]"):
        train(tiny(), data, output_dir=tmp_path, **SHORT)
    data.samples[1] = Sample("bare", data.samples[1].image)
    with pytest.raises(LabelError, match=r"bare has no labels"):
        train(tiny(), data, output_dir=tmp_path, **SHORT)
    many = tuple(f"class {k}" for k in range(256))
    data = Shapes()
    data.classes = many
    with pytest.raises(LabelError, match=r"at most 255 classes, got 256"):
        train(tiny(many), data, output_dir=tmp_path, **SHORT)
    data = Shapes()
    for sample in data.samples:
        sample.labels.fill_(255)
    with pytest.raises(LabelError, match=r"all are void"):
        train(tiny(), data, output_dir=tmp_path, **SHORT)


def test_a_diverging_loss_stops_and_keeps_the_checkpoint(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.network.head.weight.fill_(math.nan)
    with pytest.raises(PysegError, match=r"no longer finite in epoch 1, at batch 1 of 1, .*lower"):
        train(model, Shapes(), output_dir=tmp_path, **SHORT)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_images_of_different_sizes_and_a_single_sample(tmp_path):
    mixed = Shapes()
    mixed.samples += Shapes(1, size=(31, 19)).samples
    train(tiny(), mixed, output_dir=tmp_path / "mixed", **{**SHORT, "full_size": 1.0})
    model = tiny()
    before = model.network.head.weight.clone()
    log = train(model, Shapes(1), output_dir=tmp_path / "one", **SHORT)
    assert math.isfinite(log[-1]["loss"]) and not torch.equal(model.network.head.weight, before)


def three_passes(network, batch):
    """As a method of adaptation has it: labelled, unlabelled and mixed images in one step."""
    images, labels = batch
    loss = nn.functional.cross_entropy(network(images)["out"], labels)
    flat = network(images.flip(3))["out"].softmax(1).var()
    mixed = network(images // 2 + images.flip(0) // 2)["out"].square().mean()
    return {"loss": loss - 0.01 * flat + 0.01 * mixed, "flat": flat, "mixed": mixed}


def batches(epoch, count=3):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(count):
        images = torch.randint(0, 256, (2, 3, 12, 16), generator=generator, dtype=torch.uint8)
        yield images, (images[:, 0, ::2, ::2] > 127).long()


def fit_tiny(output, model=None, step=three_passes, **options):
    model = model or tiny()
    head, body = list(model.network.head.parameters()), list(model.network.body.parameters())
    optimizer = torch.optim.SGD([{"params": body, "lr": 0.01}, {"params": head, "lr": 0.1}])
    settings = {"steps": 3, "epochs": 3, "precision": "fp32", **options}
    log = fit(model, batches, step=step, optimizer=optimizer, output_dir=output, **settings)
    return model, log, [group["lr"] for group in optimizer.param_groups]


def test_fit_trains_by_any_step(tmp_path):
    modes = []

    def validate(model):
        modes.append(model.training)
        return {"level": model.network.head.bias.mean().item()}

    model, log, rates = fit_tiny(tmp_path / "a", validate=validate, validate_every=2, clip=1.0)
    assert modes == [False, False] and [("level" in entry) for entry in log] == [False, True, True]
    assert log[0].keys() == {
        *("epoch", "loss", "flat", "mixed", "learning_rate", "precision", "seconds")
    }
    assert log[-1]["loss"] < log[0]["loss"] and not model.training
    assert rates[1] == pytest.approx(10 * rates[0]) and rates[0] == log[-1]["learning_rate"]


def test_fit_goes_on_from_its_checkpoint(tmp_path):
    whole, log, _ = fit_tiny(tmp_path / "whole")
    calls = []

    def interrupted(network, batch):
        calls.append(batch)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return three_passes(network, batch)

    with pytest.raises(KeyboardInterrupt):
        fit_tiny(tmp_path / "parts", step=interrupted)
    with pytest.raises(PysegError, match=r"weight \(was None, now 2\)"):
        fit_tiny(tmp_path / "parts", resume=True, settings={"weight": 2})
    with pytest.raises(PysegError, match=r"steps \(was 3, now 4\)"):
        fit_tiny(tmp_path / "parts", resume=True, steps=4)
    resumed, log_parts, _ = fit_tiny(tmp_path / "parts", tiny(seed=5), resume=True)
    assert same(whole.state_dict(), resumed.state_dict())
    assert [entry["loss"] for entry in log] == [entry["loss"] for entry in log_parts]


def test_fit_says_what_is_wrong_with_a_step_or_batches(tmp_path):
    with pytest.raises(ValueError, match=r"with 'loss' among them, got \['cost'\]"):
        fit_tiny(tmp_path / "a", step=lambda network, batch: {"cost": network(batch[0])["out"]})
    with pytest.raises(ValueError, match=r"batches\(0\) gave 3 batches where steps=5"):
        fit_tiny(tmp_path / "b", steps=5)
    with pytest.raises(ValueError, match=r"batches\(0\) gave more batches where steps=2"):
        fit_tiny(tmp_path / "c", steps=2)
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        fit_tiny(tmp_path / "d", steps=0)
    assert not (tmp_path / "d").exists()


class Names:
    """A metric whose state is a list, as that of `instances`, and a sum."""

    def __init__(self):
        self.names, self.count = [], torch.zeros((), dtype=torch.int64)

    def update(self, prediction, sample):
        self.names.append(sample.name)
        self.count += 1

    def state(self):
        return {"names": list(self.names), "count": self.count}

    def load_state(self, state):
        self.names, self.count = list(state["names"]), state["count"]

    def compute(self):
        return {"names": sorted(self.names), "count": int(self.count)}


def test_metrics_may_hold_lists():
    expected = {"names": ["shape0", "shape1"], "count": 2}
    assert loop.score("names", Names(), tiny().eval(), Shapes()) == expected


TWO = """
import importlib.util
import os
import sys

import torch
from accelerate import PartialState

sys.path.insert(0, os.path.dirname({file!r}))
import toys
spec = importlib.util.spec_from_file_location("this", {file!r})
this = importlib.util.module_from_spec(spec)
spec.loader.exec_module(this)
torch.set_num_threads(1)
state = PartialState(cpu=True)
for name in ("train", "fit"):
    if name == "train":
        model = this.tiny()
        this.train(model, this.Shapes(4), validation=this.Shapes(3), output_dir={output!r},
                   **{{**this.SHORT, "batch_size": 1}})
    else:
        model, log, _ = this.fit_tiny({output!r} + "-fit", model=toys.without_auxiliary())
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    torch.distributed.all_gather(both, weights)
    assert state.num_processes == 2 and torch.equal(*both)
scores = this.loop.score("names", this.Names(), model, this.Shapes(3))
assert scores == {{"names": ["shape0", "shape1", "shape2"], "count": 3}}, scores
# Only the main process takes the lock; the others must hear of it.
from filelock import FileLock
lock = FileLock({output!r} + "-fit/.lock")
if state.is_main_process:
    lock.acquire()
try:
    this.fit_tiny({output!r} + "-fit", model=toys.without_auxiliary(), resume=True)
except this.PysegError as error:
    assert "another training" in str(error)
else:
    raise AssertionError("the lock was overlooked")
state.destroy_process_group()  # a peer that ends first would abort the other
os._exit(0)  # without interpreter shutdown, in which Gloo's threads now and then abort
"""


def test_two_processes(tmp_path):
    script = tmp_path / "two.py"
    output = tmp_path / "run"
    script.write_text(TWO.format(file=__file__, output=str(output)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launch, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((output / "log.json").read_text())
    assert len(log) == 4 and 0 <= log[-1]["miou"] <= 1


def test_public_names_stay_where_they_were():
    assert pyseg.train is training.train is train
    assert instance_training.train_instances is training.train_instances
    assert pyseg.tuning.train_crf is training.train_crf and callable(pyseg.tuning.tune_crf)
    assert parameter_groups is training.optimizer.parameter_groups


@pytest.mark.parametrize("size", [(40, 40), (120, 140)])
def test_crops_move_image_and_labels_together(size):
    """The image shows the label as its brightness, so that any shift between them would show."""
    rows, columns = np.mgrid[:96, :128]
    labels = torch.from_numpy(((rows // 32 + columns // 32) % 3).astype(np.uint8))
    image = (labels * 100)[None].repeat(3, 1, 1)
    generator = torch.Generator().manual_seed(0)
    seen, pixels = set(), 0
    wrong = dict.fromkeys([(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)], 0)
    for _ in range(30):
        cut, mask = random_crop(image, labels, size, (0.6, 1.8), 0.5, generator)
        assert cut.shape == (3, *size) and mask.shape == size
        assert cut.dtype == mask.dtype == torch.uint8 and type(cut) is torch.Tensor
        inside = mask != 255
        assert inside.any()
        seen.add(tuple(cut[0].flatten().tolist()))
        pixels += inside.sum()
        for shift in wrong:
            moved = torch.roll(mask.int(), shift, (0, 1)) * 100
            wrong[shift] += ((cut[0].int() - moved).abs() > 50)[inside].sum()
    assert len(seen) > 25  # crops within one tile are alike
    # Only pixels that a boundary crosses may differ, and any shift makes it much worse.
    still = wrong.pop((0, 0))
    assert still < 0.03 * pixels
    assert 2 * still < min(wrong.values())


def test_class_crops_contain_rare_classes():
    labels = torch.zeros(100, 100, dtype=torch.uint8)
    labels[90, 3] = 1
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)

    def share(probability):
        crops = [
            random_crop(image, labels, (20, 20), (1, 1), probability, generator)[1]
            for _ in range(200)
        ]
        return sum(bool((crop == 1).any()) for crop in crops) / len(crops)

    assert share(1.0) > 0.45  # one of two classes is drawn: half of the crops, and chance
    assert share(0.0) < 0.1


def test_light_changes_brightness_and_keeps_grey_grey_at_strength_zero():
    image = torch.full((3, 16, 16), 120, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    means = [random_light(image, 1.0, generator).float().mean().item() for _ in range(60)]
    assert min(means) < 70 and max(means) > 130
    assert torch.equal(random_light(image, 0.0, generator), image)


def test_schedule_rises_then_falls():
    rates = [loop.share_of_rate("cosine", step, 100, 0.1) for step in range(100)]
    assert rates.index(max(rates)) in (9, 10) and max(rates) == 1
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.02


def of_torch(make, total):
    """What a scheduler of torch gives to a learning rate of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("total", [7, 40, 111])
def test_schedules_are_those_of_torch(total):
    lr = torch.optim.lr_scheduler
    for name, power in (("poly", 0.9), ("linear", 1.0)):
        poly = of_torch(lambda o, power=power: lr.PolynomialLR(o, total, power), total)
        ours = [loop.share_of_rate(name, step, total, 0) for step in range(total)]
        assert ours == pytest.approx(poly, abs=1e-12)
    for rising in (0.3, 0.25):
        cycle = of_torch(
            lambda o, rising=rising: lr.OneCycleLR(
                o, 1.0, total_steps=total, pct_start=rising, cycle_momentum=False
            ),
            total,
        )
        ours = [loop.share_of_rate("one-cycle", step, total, rising) for step in range(total)]
        assert ours == pytest.approx(cycle, abs=1e-12)
    rates = [loop.share_of_rate("poly", step, 100, 0.1) for step in range(100)]
    assert rates[:11] == sorted(rates[:11]) and rates[10] == 1 and rates[-1] > 0
