import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from pyseg import training
from pyseg.errors import LabelError, PysegError, WeightsError
from pyseg.models.semantic import SemanticModel
from pyseg.training import random_crop, random_light, train
from pyseg.types import Sample
from pyseg.weights import load_into, load_state

CLASSES = ("ground", "disc", "frame")
PALETTE = ((90, 60, 30), (250, 200, 20), (20, 40, 200))


class Shapes:
    """Discs on a ground within a frame: colours tell the classes, as far as the noise allows."""

    classes, palette = CLASSES, PALETTE

    def __init__(self, count=2, size=(24, 32), seed=0):
        generator = np.random.default_rng(seed)
        rows, columns = np.mgrid[: size[0], : size[1]]
        self.samples = []
        for index in range(count):
            labels = np.zeros(size, dtype=np.uint8)
            y, x = generator.integers(8, size[0] - 8), generator.integers(8, size[1] - 8)
            labels[(rows - y) ** 2 + (columns - x) ** 2 < 36] = 1
            labels[:2] = labels[-2:] = 2
            image = np.array(PALETTE)[labels] + generator.integers(-20, 20, (*size, 3))
            labels[:, -1] = 255
            self.samples.append(
                Sample(
                    f"shape{index}",
                    torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1),
                    torch.from_numpy(labels),
                )
            )

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Tiny(nn.Module):
    """Stride 2, dropout and an auxiliary head: all that resuming could get wrong."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, 1, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Dropout2d(0.1),
        )
        self.head = nn.Conv2d(16, classes, 1)
        self.auxiliary = nn.Conv2d(16, classes, 1)

    def forward(self, x):
        x = self.body(x)
        outputs = {"out": self.head(x)}
        return {**outputs, "aux": self.auxiliary(x[:, :, ::2, ::2])} if self.training else outputs


def tiny(classes=CLASSES, seed=0):
    torch.manual_seed(seed)
    return SemanticModel(Tiny(len(classes)), classes)


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are too small for more; waiting threads would only slow them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SHORT = {
    "epochs": 4,
    "batch_size": 2,
    "crop_size": (16, 16),
    "precision": "fp32",
    "progress": False,
    "ema": 0.9,
}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


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


def test_same_seed_same_weights(tmp_path):
    runs = []
    for number, options in enumerate(({}, {}, {"seed": 1}, {"workers": 1}, {"cache": False})):
        model = tiny()
        train(model, Shapes(3), output_dir=tmp_path / str(number), **{**SHORT, **options})
        runs.append(model.state_dict())
    first, again, other_seed, worker, uncached = runs
    assert same(first, again)
    assert not same(first, other_seed)
    assert same(first, worker)
    assert same(first, uncached)


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    whole = tiny()
    log = train(whole, Shapes(3), output_dir=tmp_path / "whole", **SHORT)

    class Dies(Shapes):
        """Raises in the third epoch; uncached, each epoch reads all samples."""

        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads > 3 * 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    options = {**SHORT, "cache": False, "output_dir": tmp_path / "parts"}
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), Dies(3), **options)
    done = json.loads((tmp_path / "parts" / "log.json").read_text())
    assert 0 < len(done) < 4
    resumed = tiny(seed=5)  # its own weights do not matter
    log_parts = train(resumed, Shapes(3), resume=True, **options)
    assert same(whole.state_dict(), resumed.state_dict())
    for a, b in zip(log, log_parts, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


@pytest.mark.parametrize("victim", ["model.safetensors", "log.json", "checkpoint.pt"])
def test_a_kill_while_writing_leaves_the_previous_files(tmp_path, monkeypatch, victim):
    whole = tiny()
    train(whole, Shapes(), output_dir=tmp_path / "whole", **SHORT)
    replace = training._replace
    writes = 0

    def dies_half_way(path, write):
        nonlocal writes
        writes += path.name == victim
        if path.name == victim and writes == 3:
            write(path.with_name("full"))
            data = path.with_name("full").read_bytes()
            path.with_name(path.name + ".part").write_bytes(data[: len(data) // 2])
            raise KeyboardInterrupt
        replace(path, write)

    output = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(training, "_replace", dies_half_way)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), Shapes(), output_dir=output, **SHORT)
    load_into(tiny(), load_state(output / "model.safetensors"), "model.safetensors")
    assert len(json.loads((output / "log.json").read_text())) >= 2
    resumed = tiny(seed=5)
    train(resumed, Shapes(), output_dir=output, resume=True, **SHORT)
    assert same(whole.state_dict(), resumed.state_dict())


def test_what_cannot_be_resumed_is_refused(tmp_path):
    with pytest.raises(PysegError, match=r"there is no .*checkpoint.pt; start with resume=False"):
        train(tiny(), Shapes(), output_dir=tmp_path, resume=True, **SHORT)
    train(tiny(), Shapes(), output_dir=tmp_path, **{**SHORT, "epochs": 1})
    with pytest.raises(PysegError, match=r"earlier run; pass resume=True"):
        train(tiny(), Shapes(), output_dir=tmp_path, **SHORT)
    with pytest.raises(PysegError, match=r"epochs \(was 1, now 4\)"):
        train(tiny(), Shapes(), output_dir=tmp_path, resume=True, **SHORT)
    with pytest.raises(PysegError, match=r"samples \(was 2, now 3\)"):
        train(tiny(), Shapes(3), output_dir=tmp_path, resume=True, **{**SHORT, "epochs": 1})
    other = SemanticModel(nn.Conv2d(3, 3, 1), CLASSES)
    with pytest.raises(WeightsError, match=r"another architecture"):
        train(other, Shapes(), output_dir=tmp_path, resume=True, **{**SHORT, "epochs": 1})
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(PysegError, match=r"not a readable training checkpoint"):
        train(tiny(), Shapes(), output_dir=tmp_path, resume=True, **SHORT)


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
    with pytest.raises(PysegError, match=r"the loss became nan in epoch 1; lower learning_rate"):
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


TWO = """
import importlib.util
import os

import torch
from accelerate import PartialState

spec = importlib.util.spec_from_file_location("this", {file!r})
this = importlib.util.module_from_spec(spec)
spec.loader.exec_module(this)
torch.set_num_threads(1)
model = this.tiny()
this.train(model, this.Shapes(4), validation=this.Shapes(3), output_dir={output!r},
           **{{**this.SHORT, "batch_size": 1}})
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
both = [torch.empty_like(weights) for _ in range(2)]
torch.distributed.all_gather(both, weights)
assert PartialState().num_processes == 2 and torch.equal(*both)
PartialState().destroy_process_group()  # a peer that ends first would abort the other
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


def test_soft_jaccard_of_certain_predictions_is_one_minus_miou():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 4, (2, 9, 11), generator=generator)
    target = torch.randint(0, 4, (2, 9, 11), generator=generator)
    target[target == 2] = 0  # class 2 is predicted, but not there
    target[0, :3] = 255
    p = nn.functional.one_hot(prediction, 4).permute(0, 3, 1, 2).float()
    ious = []
    for label in (0, 1, 3):
        a = ((prediction == label) & (target != 255)).numpy()
        b = (target == label).numpy()
        ious.append((a & b).sum() / (a | b).sum())
    loss = training._soft_jaccard(p, target)
    assert loss.item() == pytest.approx(1 - np.mean(ious), abs=1e-6)
    assert training._soft_jaccard(p, torch.full_like(target, 255)).item() == 0


def test_loss_equals_torch_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    outputs = {
        "out": torch.randn(2, 3, 6, 8, generator=generator),
        "aux8": torch.randn(2, 3, 3, 4, generator=generator),
    }
    labels = torch.randint(0, 3, (2, 12, 16), generator=generator).to(torch.uint8)
    labels[:, 0] = 255
    ones = torch.ones(3)
    loss = training._loss(outputs, labels, ones, jaccard=0, auxiliary=0.4)
    upsample = nn.Upsample((12, 16), mode="bilinear")
    expected = nn.functional.cross_entropy(
        upsample(outputs["out"]), labels.long(), ignore_index=255
    ) + 0.4 * nn.functional.cross_entropy(
        outputs["aux8"], labels[:, 2::4, 2::4].long(), ignore_index=255
    )
    torch.testing.assert_close(loss, expected)


def test_class_weights():
    weights = training._class_weights(torch.tensor([100, 10000, 0]), 0.5)
    assert weights[0] / weights[1] == pytest.approx(10)
    assert (100 * weights[0] + 10000 * weights[1]) / 10100 == pytest.approx(1)
    assert weights[2] == 1
    assert training._class_weights(torch.tensor([5, 50]), 0).tolist() == [1, 1]


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
    rates = [training._schedule(step, 100, 0.1) for step in range(100)]
    assert rates.index(max(rates)) in (9, 10) and max(rates) == 1
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.02
