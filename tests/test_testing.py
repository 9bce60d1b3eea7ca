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
    ],
)
def test_every_fault_of_a_refiner_is_found(faulty, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_refiner(faulty)


# ---------------------------------------------------------------------------------------- metrics


class Metric:
    """A good one: the share of pixels whose labels are right."""

    def __init__(self, classes=()):
        self.counts = torch.zeros(2, dtype=torch.int64)

    def update(self, prediction, sample):
        right = prediction.labels == sample.labels
        self.counts += torch.tensor([int(right.sum()), right.numel()])

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


class Random(Data):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return Sample(sample.name, torch.randint_like(sample.image, 255), sample.labels)


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
        (Random, "sample 0, read again, is another one"),
    ],
)
def test_every_fault_of_a_dataset_is_found(faulty, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_dataset(faulty())
