import json
import math

import pytest
import torch

import pyseg
from pyseg import metrics, models, refiners
from pyseg.errors import LabelError, PluginError, PysegError, SpecError, UnknownName
from pyseg.evaluation import evaluate
from pyseg.metrics.semantic import Semantic
from pyseg.types import Sample, Segmentation

CLASSES = ("dark", "middle", "light")


class ByBrightness:
    """Class k where the image's red channel is k; the first column is always wrong."""

    def __init__(self, *, num_classes: int | None = None, weights: str | None = None):
        self.classes = CLASSES[:num_classes]

    def predict(self, images):
        def one(image):
            labels = image[0].clone()
            labels[:, 0] = (labels[:, 0] + 1) % 3
            return Segmentation(tuple(labels.shape), CLASSES).with_labels(labels)

        return [one(image) for image in images]


class Mend:
    """Corrects the first column."""

    def refine(self, image, prediction):
        return prediction.with_labels(image[0].clone())


class MeanLabel:
    def __init__(self, *, num_classes: int, factor: float = 1.0):
        assert num_classes == 3
        self.factor, self.values = factor, []

    def update(self, prediction, sample):
        self.values.append(float(prediction.labels.float().mean()))

    def state(self):
        return {"sum": torch.tensor(self.values).sum()}

    def load_state(self, state):
        raise NotImplementedError

    def compute(self):
        return {"mean": self.factor * sum(self.values) / len(self.values), "what": "text"}


class Data:
    classes = ("Dark", "middle", "light")
    palette = ((0, 0, 0), (99, 99, 99), (200, 200, 200))

    def __init__(self, count=5):
        generator = torch.Generator().manual_seed(0)
        self.maps = [
            torch.randint(0, 3, (6, 4 + k), generator=generator, dtype=torch.uint8)
            for k in range(count)
        ]
        self.seen = []

    def __len__(self):
        return len(self.maps)

    def __getitem__(self, index):
        self.seen.append(index)
        labels = self.maps[index].clone()
        labels[0] = 255
        return Sample(f"s{index}", self.maps[index].expand(3, -1, -1), labels)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(models._registry._registered, "bybrightness", ByBrightness)
    monkeypatch.setitem(refiners._registry._registered, "mend", Mend)
    monkeypatch.setitem(metrics._registry._registered, "meanlabel", MeanLabel)
    monkeypatch.setitem(metrics._registry._registered, "semantic", Semantic)
    monkeypatch.setitem(metrics._registry._registered, "wrong", lambda: object())


@pytest.fixture
def pipeline():
    return pyseg.build("bybrightness+mend")


def test_a_row_per_stage(pipeline):
    data = Data()
    result = evaluate(pipeline, data, ["semantic", "meanlabel(factor=2.0)"])
    assert result.images == 5 and data.seen == list(range(5))
    baseline, mended = result.stages
    assert (baseline.stage, mended.stage) == ("baseline", "+mend")
    assert (baseline.spec, mended.spec) == ("bybrightness", "bybrightness+mend")
    # One column of each map is wrong, the first row is void.
    valid = sum(5 * m.shape[1] for m in data.maps)
    accuracy = 1 - 5 * len(data.maps) / valid
    assert baseline.metrics["semantic"]["pixel_accuracy"] == pytest.approx(accuracy)
    assert mended.metrics["semantic"]["pixel_accuracy"] == 1
    assert mended.metrics["semantic"]["miou"] == 1
    assert mended.delta["semantic"]["pixel_accuracy"] == pytest.approx(1 - accuracy)
    assert mended.delta["semantic"]["miou"] == pytest.approx(
        1 - baseline.metrics["semantic"]["miou"]
    )
    assert set(baseline.delta["semantic"].values()) == {0.0}
    want = 2 * sum(float(m.float().mean()) for m in data.maps) / 5
    assert mended.metrics["meanlabel(factor=2.0)"]["mean"] == pytest.approx(want)
    assert all(stage.milliseconds > 0 for stage in result.stages)


def test_memory_is_measured_for_few_images_and_warm_up_is_not_scored(pipeline, monkeypatch):
    calls = []
    trace = type(pipeline).trace

    def spy(self, image, *, memory=False, name=None):
        calls.append(memory)
        return trace(self, image, memory=memory, name=name)

    monkeypatch.setattr(type(pipeline), "trace", spy)
    result = evaluate(pipeline, Data())
    assert calls == [False, True, True, True, False, False]
    pixels = sum(
        entry["pixels"] for entry in result.stages[0].metrics["semantic"]["per_class"].values()
    )
    assert pixels == sum(5 * m.shape[1] for m in Data().maps)


def test_json_and_table(pipeline):
    result = evaluate(pipeline, Data(), ["semantic", "meanlabel"])
    rows = json.loads(json.dumps(result.to_list(), allow_nan=False))
    assert [row["stage"] for row in rows] == ["baseline", "+mend"]
    assert rows[1]["images"] == 5 and rows[1]["metrics"]["semantic"]["miou"] == 1
    assert {"milliseconds", "peak_megabytes", "delta", "spec"} <= set(rows[0])
    text = str(result).splitlines()
    assert text[0].split() == [
        "stage",
        "mIoU",
        "Δ",
        "pixel",
        "accuracy",
        "Δ",
        "mean",
        "Δ",
        "ms/image",
        "peak",
        "MB",
    ]
    assert text[2].split()[:2] == ["+mend", "1.0000"]
    assert text[2].split()[2] == f"{1 - result.stages[0].metrics['semantic']['miou']:+.4f}"


def test_absent_classes_are_null_in_json(pipeline):
    data = Data(1)
    data.maps = [torch.zeros(4, 4, dtype=torch.uint8)]
    rows = evaluate(pipeline, data).to_list()
    scores = rows[1]["metrics"]["semantic"]
    assert scores["per_class"]["light"]["iou"] is None and scores["miou"] == 1
    assert scores["classes_absent"] == ["middle", "light"]
    assert math.isfinite(rows[1]["delta"]["semantic"]["miou"])


def test_options_of_metrics_in_a_spec(pipeline):
    names = ["semantic(subset=('Dark', 2))", "semantic(reduce_zero_label=True, ignore_index=3)"]
    data = Data(2)
    with pytest.raises(LabelError):  # the void rows are 254 then
        evaluate(pipeline, data, names)
    part, whole = evaluate(pipeline, Data(2), [names[0], "semantic"]).stages[0].metrics.values()
    iou = [whole["per_class"][name]["iou"] for name in ("Dark", "light")]
    assert part["miou"] == pytest.approx(sum(iou) / 2)


def test_observe_sees_every_sample_and_all_stages(pipeline):
    seen = []
    evaluate(pipeline, Data(3), observe=lambda sample, results: seen.append((sample.name, results)))
    assert [name for name, _ in seen] == ["s0", "s1", "s2"]
    assert all([r.name for r in results] == ["bybrightness", "mend"] for _, results in seen)


def test_limit_spreads_over_the_dataset(pipeline):
    data = Data(9)
    assert evaluate(pipeline, data, limit=3).images == 3
    assert data.seen == [0, 3, 6]
    assert evaluate(pipeline, Data(2), limit=50).images == 2


def test_progress_sees_every_image(pipeline):
    seen = []

    def track(indices):
        for index in indices:
            yield index
            seen.append(index)

    evaluate(pipeline, Data(3), track=track)
    assert seen == [0, 1, 2]


def test_bad_input(pipeline):
    data = Data()
    with pytest.raises(PysegError, match="empty"):
        evaluate(pipeline, Data(0))
    with pytest.raises(PysegError, match="limit"):
        evaluate(pipeline, data, limit=0)
    with pytest.raises(UnknownName, match="semantic"):
        evaluate(pipeline, data, ["semantics"])
    with pytest.raises(SpecError, match=r"meanlabel.*factor"):
        evaluate(pipeline, data, ["meanlabel(factr=2)"])
    with pytest.raises(SpecError, match="one name"):
        evaluate(pipeline, data, ["semantic+meanlabel"])
    with pytest.raises(PluginError, match=r"pyseg\.types\.Metric"):
        evaluate(pipeline, data, ["wrong"])
    data.classes = ("dark", "light", "middle")
    with pytest.raises(PysegError, match="class 1 is 'middle', in the dataset 'light', and 1 more"):
        evaluate(pipeline, data)
    data.classes = ("dark", "light")
    with pytest.raises(PysegError, match="3 classes, the dataset 2"):
        evaluate(pipeline, data)


def test_a_bad_sample_stops_it(pipeline):
    class Wrong(Data):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return Sample(sample.name, sample.image, torch.full_like(sample.labels, 7))

    with pytest.raises(LabelError, match=r"'s0'.*7"):
        evaluate(pipeline, Wrong())


def test_a_failing_metric_or_sample_says_where(pipeline, monkeypatch):
    def fails(self, prediction, sample):
        if sample.name == "s1" and int(prediction.labels[0, 0]) == int(sample.image[0, 0, 0]):
            raise KeyError("what")  # after the second stage only, which mends the first column

    monkeypatch.setattr(MeanLabel, "update", fails)
    with pytest.raises(
        PluginError, match=r"'meanlabel' failed on image 's1' after stage 'mend'.*what"
    ):
        evaluate(pipeline, Data(), ["meanlabel"])
    monkeypatch.undo()

    class Broken(Data):
        def __getitem__(self, index):
            return super().__getitem__(index) if index < 2 else 1 / 0

    class Arrays(Data):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return Sample(sample.name, sample.image, sample.labels.numpy())

    class Pairs(Data):
        def __getitem__(self, index):
            return super().__getitem__(index).image, None

    for registry, name, thing in (
        (models, "bybrightness", ByBrightness),
        (refiners, "mend", Mend),
        (metrics, "semantic", Semantic),
    ):
        monkeypatch.setitem(registry._registry._registered, name, thing)
    with pytest.raises(PluginError, match="data set failed at sample 2: ZeroDivisionError"):
        evaluate(pipeline, Broken())
    with pytest.raises(PluginError, match=r"labels of sample 's0' must be a tensor.*ndarray"):
        evaluate(pipeline, Arrays())
    with pytest.raises(PluginError, match=r"sample 0 .* must be a pyseg\.Sample, got tuple"):
        evaluate(pipeline, Pairs())


def test_scores_that_are_no_dict(pipeline, monkeypatch):
    monkeypatch.setattr(MeanLabel, "compute", lambda self: [1.0])
    with pytest.raises(PluginError, match=r"compute\(\) of metric 'meanlabel' .* got list"):
        evaluate(pipeline, Data(), ["meanlabel"])


def test_the_confusion_matrix_and_the_circumstances_are_kept(pipeline):
    data = Data()
    result = evaluate(pipeline, data, ["meanlabel", "semantic"])
    valid = sum(5 * m.shape[1] for m in data.maps)
    assert int(result.stages[0].confusion.sum()) == int(result.stages[1].confusion.sum()) == valid
    assert int(result.stages[1].confusion.diagonal().sum()) == valid
    assert evaluate(pipeline, data, ["meanlabel"]).stages[0].confusion is None
    assert (result.classes, result.palette) == (data.classes, data.palette)
    assert (result.device, result.threads) == ("cpu", torch.get_num_threads())
