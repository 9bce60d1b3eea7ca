"""`pyseg.testing`: what is right passes, and every fault is found and named."""

import contextlib
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from pyseg import testing
from pyseg.datasets.synthetic import StreetScenes
from pyseg.models.semantic import SemanticModel
from pyseg.types import Sample

# ----------------------------------------------------------------------------------------- models


class Network(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, x):
        return self.head(self.body(x))


class Model(SemanticModel):
    """A good one, for faults to be put in by subclasses."""

    def __init__(self, num_classes=3, network=None):
        names = [f"class {i}" for i in range(num_classes)]
        super().__init__(network or Network(num_classes), names)


def factory_of(make):
    def factory(*, num_classes: int | None = None, weights: str | None = None):
        if weights is not None:
            raise testing.PysegError(f"there are no weights {weights}")
        if num_classes == 0:
            raise ValueError("num_classes must be at least 1")
        return make(num_classes or 3)

    return factory


def test_a_good_model_passes():
    testing.check_model(factory_of(Model))
    testing.check_model(factory_of(Model), num_classes=300)  # labels are int16 from 256 on


class Twice(Model):
    def __init__(self, count):
        super().__init__(count)
        self.classes = ("road",) * count


class ShortPalette(Model):
    def __init__(self, count):
        super().__init__(count)
        self.palette = self.palette[:-1]


class Training(Model):
    """Dropout that no call of eval() reaches."""

    def train(self, mode=True):
        super().train(mode)
        return self if mode else self._keep()

    def _keep(self):
        self.network.body.train()
        return self


class MutatesImages(Model):
    def predict(self, images):
        results = super().predict(images)
        for image in images:
            image.clamp_(10)
        return results


class MutatesState(Model):
    def predict(self, images):
        with torch.no_grad():
            self.network.body[1].running_mean.add_(1e-3)
        return super().predict(images)


class LosesOne(Model):
    def predict(self, images):
        return super().predict(images[:3])


class Sorts(Model):
    """Returns predictions in order of size."""

    def predict(self, images):
        return super().predict(sorted(images, key=lambda image: image.numel()))


class BatchNorm(Model):
    """Normalises by whatever lies in the batch."""

    def forward(self, images):
        images = images / 255
        mean = images.mean((0, 2, 3), keepdim=True)
        return {"out": self.network(images - mean * len(images))}


class Chance(Model):
    def predict(self, images):
        return [one.with_logits(one.logits + torch.rand(1)) for one in super().predict(images)]


class NotFinite(Model):
    def forward(self, images):
        out = super().forward(images)["out"]
        return {"out": out / (out > out.amax()).float().sum() * 0}


class MultipleOf32(Model):
    def forward(self, images):
        if images.shape[2] % 32:
            raise RuntimeError("shape mismatch")
        return super().forward(images)


class TakesAnything(Model):
    def predict(self, images):
        good = [image for image in images if image.dtype == torch.uint8]
        return super().predict(good)


class IgnoresCount(Model):
    def __init__(self, count):
        super().__init__(3)


class OldHead(Model):
    """num_classes gives names but no new head."""

    def __init__(self, count):
        super().__init__(count, Network(3))


class Shared(Model):
    """Keeps what it works on in itself: threads get one another's images."""

    def predict(self, images):
        import time

        results = []
        for image in images:
            self.image = image
            time.sleep(0.002)
            results += super().predict([self.image])
        return results


class Unpicklable(Model):
    def __init__(self, count):
        super().__init__(count)
        self.function = lambda x: x


class OutsideState(Model):
    """A part that state_dict does not have."""

    def __init__(self, count):
        super().__init__(count)
        self.shift = torch.randn(count, 1, 1)

    def forward(self, images):
        return {"out": super().forward(images)["out"] + self.shift}


class HostBuffer(Model):
    """A constant that does not move along."""

    def __init__(self, count):
        super().__init__(count)
        self.scale = torch.full((2, 1, 1), 2.0)

    def forward(self, images):
        return {"out": super().forward(images)["out"] * self.scale[:1]}


class Idle(Model):
    def __init__(self, count):
        super().__init__(count)
        self.unused = nn.Linear(2, 2)


class Extra(Model):
    def forward(self, images):
        out = super().forward(images)
        return {**out, "features": out["out"]}


FAULTY = {
    Twice: "classes has names more than once: road",
    ShortPalette: "palette has 2 colours for 3 classes",
    Training: "parts of it are in training mode",
    MutatesImages: "predict changes its images",
    MutatesState: r"predict changes the state of the model: network\.body\.1\.running_mean",
    LosesOne: "predict returns 3 for 4 images",
    Sorts: r"predict gives size \(\d+, \d+\) for \(\d+, \d+\)",
    BatchNorm: "predictions depend on which images are in the list",
    Chance: "predict gives another result the second time",
    NotFinite: "logits that are not finite",
    MultipleOf32: "predict of images of 33 x 47.* raises RuntimeError: shape mismatch",
    TakesAnything: r"an image \[3, 8, 9\] float32 is accepted; it must raise ValueError or Type",
    IgnoresCount: "with num_classes=4 it has 3 classes",
    OldHead: r"predict with num_classes=4 raises ValueError: logits must be \[4",
    Shared: "4 threads at once get other results than one",
    Unpicklable: "pickling it raises",
    OutsideState: "saved and loaded, it gives another result",
    HostBuffer: "predict on (meta|cuda) raises RuntimeError",
    Idle: "does not reach 2 parameters: unused.weight, unused.bias",
    Extra: "output 'features' is neither 'out' nor begins with 'aux'",
}


@pytest.mark.parametrize("faulty", FAULTY, ids=lambda faulty: faulty.__name__)
def test_every_fault_of_a_model_is_found(faulty):
    with pytest.raises(AssertionError, match=FAULTY[faulty]) as caught:
        testing.check_model(factory_of(faulty))
    assert str(caught.value).startswith("model ")


def test_faults_of_factories_are_found():
    def fetches(*, weights: str | None = None):
        with contextlib.suppress(OSError):  # even where it makes do without
            socket.create_connection(("example.invalid", 80))
        return Model()

    with pytest.raises(AssertionError, match=r"weights=None takes the network: example\.invalid"):
        testing.check_model(fetches)

    def takes_any_weights(*, weights: str | None = None):
        return Model()

    with pytest.raises(AssertionError, match=r"weights\.pth is accepted; it must raise PysegErr"):
        testing.check_model(takes_any_weights)

    def takes_no_class(*, num_classes: int = 3):
        return Model(num_classes or 3)

    with pytest.raises(AssertionError, match="num_classes=0 is accepted"):
        testing.check_model(takes_no_class)
    socket.getaddrinfo("127.0.0.1", 80)  # works again


def test_modules_that_fetch_on_import_are_found(tmp_path):
    """An installed plugin, in a process of its own."""
    (tmp_path / "greedy.py").write_text(
        textwrap.dedent(
            """
            import socket
            try:
                socket.create_connection(("example.invalid", 80))
            except OSError:
                pass
            def model(*, weights=None): ...
            """
        )
    )
    folder = tmp_path / "greedy-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: greedy\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[pyseg.models]\ngreedy = greedy:model\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from pyseg import testing\n"
        "testing.check_model('greedy')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "importing greedy takes the network: network example.invalid" in done.stderr


# --------------------------------------------------------------------------------------- refiners


class Refiner:
    """A good one: logits are doubled."""

    def refine(self, image, prediction):
        if prediction.logits is None:
            raise ValueError("it needs logits")
        return prediction.with_logits(2 * prediction.logits)


class ChangesLogits(Refiner):
    def refine(self, image, prediction):
        prediction.logits.mul_(2)
        return prediction


class ChangesSize(Refiner):
    def refine(self, image, prediction):
        return type(prediction)((2, 2), prediction.classes, logits=prediction.logits)


class Remembers(Refiner):
    def __init__(self):
        self.calls = 0

    def refine(self, image, prediction):
        self.calls += 1
        return prediction.with_logits(prediction.logits + self.calls)


class OtherBatch(Refiner):
    def refine_batch(self, images, predictions):
        return [one.with_logits(-one.logits) for one in predictions]


class FillsVoid(Refiner):
    def refine(self, image, prediction):
        if prediction.logits is None:
            return prediction.with_labels(prediction.labels.where(prediction.labels != 255, 0))
        return super().refine(image, prediction)


class OnTheHost(Refiner):
    """Its result is on the CPU, wherever the prediction is."""

    def refine(self, image, prediction):
        if prediction.logits is None:
            raise ValueError("it needs logits")
        return prediction.with_logits(torch.ones(prediction.logits.shape))


class MixesDevices(Refiner):
    def refine(self, image, prediction):
        if prediction.logits is None:
            raise ValueError("it needs logits")
        return prediction.with_logits(prediction.logits * torch.ones(1, 5, 1)[:, :1])


class ChangesBoxes(Refiner):
    def refine(self, image, prediction):
        prediction.instances.boxes.add_(1)
        return super().refine(image, prediction)


class Random(Refiner):
    def refine(self, image, prediction):
        return prediction.with_logits(prediction.logits + torch.rand(1))


class Unwritable(Refiner):
    """Its default is an object that no spec can name."""

    def __init__(self, *, activation=torch.nn.ReLU()):  # noqa: B008
        pass


class RoundsOption(Refiner):
    def __init__(self, *, sigma: float = 1.0):
        self.sigma = round(sigma)

    def config(self):
        return {"sigma": self.sigma}


class ForgetsAnOption(Refiner):
    def __init__(self, *, radius: int = 2):
        self.radius = 2

    def config(self):
        return {"radius": self.radius}


class UnpicklableRefiner(Refiner):
    def __init__(self):
        self.function = lambda x: x


class NeedsLogits(Refiner):
    def refine(self, image, prediction):
        return prediction.with_logits(2 * prediction.logits)


def test_refiners():
    testing.check_refiner(Refiner)
    testing.check_refiner("crf", iterations=1)


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (ChangesLogits, "changes the logits"),
        (ChangesSize, r"refine gives size \(2, 2\)"),
        (Remembers, "another result the second time"),
        (OtherBatch, "refine_batch gives other results"),
        (NeedsLogits, "without logits raises TypeError"),
        (FillsVoid, "refine gives classes to pixels that were void"),
        (OnTheHost, "refine ignores the device|refine on cuda"),
        (MixesDevices, "refine on (meta|cuda) raises RuntimeError"),
        (ChangesBoxes, "refine changes the boxes"),
        (Random, "another result the second time"),
        (Unwritable, "option activation has the default ReLU"),
        (RoundsOption, r"made with sigma=0\.875, its config gives sigma=1"),
        (ForgetsAnOption, "made with radius=3, its config gives radius=2"),
        (UnpicklableRefiner, "pickling it raises"),
    ],
)
def test_every_fault_of_a_refiner_is_found(faulty, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_refiner(faulty)


# ---------------------------------------------------------------------------------------- metrics


class Metric:
    """A good one: the share of pixels whose labels are right, of those that have one."""

    def __init__(self, classes=()):
        self.counts = torch.zeros(2, dtype=torch.int64)

    def update(self, prediction, sample):
        known = sample.labels != 255
        right = (prediction.labels == sample.labels) & known
        self.counts += torch.tensor([int(right.sum()), int(known.sum())])

    def state(self):
        return {"counts": self.counts}

    def load_state(self, state):
        self.counts = state["counts"]

    def compute(self):
        return {"accuracy": float(self.counts[0]) / max(int(self.counts[1]), 1)}


class Floats(Metric):
    def state(self):
        return {"counts": self.counts.double()}


class Averages(Metric):
    """A mean of means: depends on how images are shared out."""

    def __init__(self, classes=()):
        self.counts = torch.zeros(1, dtype=torch.int64)

    def update(self, prediction, sample):
        share = (prediction.labels == sample.labels).float().mean()
        self.counts = (self.counts + (share * 1000).long()) // 2

    def compute(self):
        return {"accuracy": float(self.counts)}


class Forgets(Metric):
    def load_state(self, state):
        self.counts = torch.zeros_like(state["counts"])


class DividesByNothing(Metric):
    def compute(self):
        return {"accuracy": int(self.counts[0]) / int(self.counts[1])}


class CountsVoid(Metric):
    """Void pixels are wrong, whatever is predicted."""

    def update(self, prediction, sample):
        right = prediction.labels == sample.labels
        self.counts += torch.tensor([int(right.sum()), right.numel()])


class SeesVoid(Metric):
    """Void is as good as class 0."""

    def update(self, prediction, sample):
        truth = sample.labels.where(sample.labels != 255, 0)
        right = prediction.labels == truth
        self.counts += torch.tensor([int(right.sum()), right.numel()])


class WritesLabels(Metric):
    def update(self, prediction, sample):
        sample.labels[sample.labels == 255] = 0


class Twofold(Metric):
    """Holds what no pickle can."""

    def __init__(self, classes=()):
        super().__init__()
        self.function = lambda x: x


class ForgetsOption(Metric):
    def __init__(self, *, classes=(), digits: int = 3):
        super().__init__()

    def config(self):
        return {"digits": 3}


class Last(Metric):
    def update(self, prediction, sample):
        super().update(prediction, sample)
        self.last = sample.name

    def compute(self):
        return {**super().compute(), "last": getattr(self, "last", "")}


@pytest.mark.parametrize("name", ["semantic", "boundary", "panoptic", "calibration", "binary"])
def test_metrics(name):
    classes = ("off", "on") if name == "binary" else ("one", "two", "three")
    testing.check_metric(name, classes=classes)


def test_a_metric_of_ones_own():
    testing.check_metric(Metric)


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (Floats, "state 'counts' is torch.float64: states are integer tensors"),
        (Averages, "depend on the order|other scores"),
        (Forgets, "other scores"),
        (DividesByNothing, "compute of no image raises ZeroDivisionError"),
        (Last, "scores depend on the order of the images"),
        (CountsVoid, "an image that is void all over changes scores"),
        (SeesVoid, "scores depend on what is predicted where the truth is void"),
        (WritesLabels, "update changes the truth that it is given"),
        (Twofold, "pickling it raises"),
        (ForgetsOption, "made with digits=4, its config gives digits=3"),
    ],
)
def test_every_fault_of_a_metric_is_found(faulty, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_metric(faulty)


# -------------------------------------------------------------------------------------- data sets


class Data:
    classes = ("a", "b")
    palette = ((0, 0, 0), (1, 1, 1))

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if not 0 <= index < 3:
            raise IndexError(index)
        image = torch.full((3, 4, 5), index, dtype=torch.uint8)
        return Sample(f"sample {index}", image, torch.ones(4, 5, dtype=torch.uint8))


class Endless(Data):
    def __getitem__(self, index):
        return super().__getitem__(index % 3)


class Strange(Data):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample.labels[0, 0] = 7
        return sample


class OneName(Data):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return Sample("same", sample.image, sample.labels)


class RandomData(Data):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return Sample(sample.name, torch.randint_like(sample.image, 255), sample.labels)


class Draws(Data):
    """Of torch's own generator: what is read depends on what was read before."""

    def __getitem__(self, index):
        torch.rand(1)
        return super().__getitem__(index)


class WrongSize(Data):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return Sample(sample.name, sample.image, sample.labels[:3])


class OpenFile(Data):
    def __init__(self):
        self.file = open(__file__)  # noqa: SIM115


def test_datasets():
    testing.check_dataset(Data())
    testing.check_dataset(Data)
    testing.check_dataset("synthetic", length=3, size=(40, 64))
    testing.check_dataset(StreetScenes(length=2, size=(40, 64)))


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (Endless, "index 3 is accepted; it must raise IndexError"),
        (Strange, r"labels of sample 0 have values \[7\]"),
        (OneName, "several samples have one name"),
        (RandomData, "sample 0, read again, is another one"),
        (Draws, "draws from torch's global generator"),
        (WrongSize, r"labels of sample 0 are \[3, 5\] uint8, not \[4, 5\]"),
        (OpenFile, "pickling it raises TypeError"),
    ],
)
def test_every_fault_of_a_dataset_is_found(faulty, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_dataset(faulty())


# ------------------------------------------------------------------------------------ promptables


class Threshold(nn.Module):
    """A good one: what is of the brightness of the prompt's first place, by a learnt factor."""

    def __init__(self, *, factor: float = 8.0, weights: str | None = None):
        super().__init__()
        self.factor = factor
        self.gain = nn.Parameter(torch.ones(1))

    def config(self):
        return {"factor": self.factor}

    def embed(self, image):
        return image.float().mean(0)

    def seeds(self, embedding, prompts):
        if prompts.boxes is not None:
            return prompts.boxes.unflatten(1, (2, 2)).mean(1)
        return prompts.points[:, 0]

    def predict(self, embedding, prompts):
        height, width = embedding.shape
        x, y = self.seeds(embedding, prompts).long().unbind(1)
        values = embedding[y.clamp(0, height - 1), x.clamp(0, width - 1)]
        logits = self.factor - (embedding[None] - values[:, None, None]).abs()
        logits = logits * self.gain
        return logits[:, ::2, ::2], torch.ones(len(values), device=embedding.device)

    def upsample(self, embedding, logits):
        size = tuple(embedding.shape)
        return nn.functional.interpolate(logits[:, None], size, mode="bilinear")[:, 0]


class MutatesPrompts(Threshold):
    def predict(self, embedding, prompts):
        prompts.points.add_(0.5)
        return super().predict(embedding, prompts)


class EmbedsInPlace(Threshold):
    def embed(self, image):
        return image.clamp_(100).float().mean(0)


class KeepsEmbedding(Threshold):
    """State between calls: the last image answers for all."""

    def embed(self, image):
        self.last = super().embed(image)
        return self.last

    def predict(self, embedding, prompts):
        return super().predict(self.last, prompts)


class PromptsTogether(Threshold):
    def predict(self, embedding, prompts):
        logits, quality = super().predict(embedding, prompts)
        return logits - len(logits), quality


class NoPromptFails(Threshold):
    def predict(self, embedding, prompts):
        if not len(prompts.points):
            raise IndexError("no prompt")
        return super().predict(embedding, prompts)


class SmallUpsample(Threshold):
    def upsample(self, embedding, logits):
        return logits


class ChancePrompts(Threshold):
    def predict(self, embedding, prompts):
        logits, quality = super().predict(embedding, prompts)
        return logits + torch.rand(1), quality


class WrongQuality(Threshold):
    def predict(self, embedding, prompts):
        logits, quality = super().predict(embedding, prompts)
        return logits, quality[:, None]


class HostPrompts(Threshold):
    def predict(self, embedding, prompts):
        logits, quality = super().predict(embedding, prompts)
        return logits * torch.ones(1, 3)[:, :1], quality


class UnpicklablePrompts(Threshold):
    def __init__(self):
        super().__init__()
        self.function = lambda x: x


class ForgetsFactor(Threshold):
    def config(self):
        return {"gain": 1.0}


def test_promptables():
    testing.check_promptable(Threshold)
    testing.check_promptable("nano")


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (MutatesPrompts, "predict changes its points"),
        (EmbedsInPlace, "embed changes its image"),
        (KeepsEmbedding, "masks depend on what was embedded meanwhile"),
        (PromptsTogether, "depends on the others beside it"),
        (NoPromptFails, "predict of points, one by one raises IndexError"),
        (SmallUpsample, r"upsampled masks of points are \[3, 17, 24\]"),
        (ChancePrompts, "masks depend on what was embedded meanwhile"),
        (WrongQuality, r"predicted IoU of points are \[3, 1\]"),
        (HostPrompts, "predict on (meta|cuda) raises RuntimeError"),
        (UnpicklablePrompts, "pickling it raises"),
        (ForgetsFactor, "config gives gain, which is none of its options"),
    ],
)
def test_every_fault_of_a_promptable_is_found(faulty, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_promptable(faulty)
