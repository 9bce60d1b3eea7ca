import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pyseg
from pyseg import models, refiners
from pyseg.errors import DeviceError, PluginError, PysegError, SpecError, UnknownName
from pyseg.models.semantic import SemanticModel
from pyseg.types import Segmentation


def tiny(*, num_classes: int | None = None, weights: str | None = "default", bias: float = 0.0):
    """A 1x1 convolution at half size."""
    network = torch.nn.Sequential(
        torch.nn.AvgPool2d(2, ceil_mode=True), torch.nn.Conv2d(3, num_classes or 4, 1)
    )
    if weights == "ones":
        torch.nn.init.ones_(network[1].weight)
    network[1].bias.data += bias
    return SemanticModel(network, [f"class {i}" for i in range(num_classes or 4)])


class Shift:
    """Adds to one class's logits."""

    def __init__(self, *, by: float = 1.0, label: int = 0):
        self.by, self.label = by, label

    def refine(self, image, prediction):
        logits = prediction.logits.clone()
        logits[self.label] += self.by
        return prediction.with_logits(logits)


def not_a_refiner():
    return object()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(models._registry._registered, "tiny", tiny)
    monkeypatch.setitem(refiners._registry._registered, "shift", Shift)
    monkeypatch.setitem(refiners._registry._registered, "wrong", not_a_refiner)


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 7, 9), dtype=torch.uint8)


def test_stages_apply_from_left_to_right(image):
    pipeline = pyseg.build("tiny + shift(by=2) + shift(by=1e6, label=3)", num_classes=5)
    assert str(pipeline) == "tiny+shift(by=2)+shift(by=1000000.0, label=3)"
    assert len(pipeline.classes) == 5
    result = pipeline(image)
    assert result.labels.shape == (7, 9) and result.labels.dtype == torch.uint8
    assert (result.labels == 3).all()
    base, shifted, last = pipeline.run_stages(image)
    torch.testing.assert_close(shifted.logits[0], base.logits[0] + 2)
    assert torch.equal(last.logits, result.logits)


def test_a_list_gives_a_list_of_any_sizes(image):
    pipeline = pyseg.build("tiny")
    other = torch.zeros(3, 4, 5, dtype=torch.uint8)
    results = pipeline([image, other, image])
    assert [r.size for r in results] == [(7, 9), (4, 5), (7, 9)]
    assert torch.equal(results[0].logits, results[2].logits)
    assert pipeline([]) == []


def test_num_classes_and_weights_go_to_the_model_and_options_win():
    assert len(pyseg.build("tiny(num_classes=3)", num_classes=5).classes) == 3
    ones = pyseg.build("tiny+shift", weights="ones").model.network[1]
    assert (ones.weight == 1).all()


@pytest.mark.parametrize(
    "spec, error, message",
    [
        ("shift+tiny", SpecError, "'shift' is a refiner"),
        ("tiny+tiny", SpecError, "'tiny' is a model"),
        ("tniy", UnknownName, "Did you mean 'tiny'"),
        ("tiny+shift(buy=2)", SpecError, "did you mean 'by'.*by=1.0, label=0"),
        ("tiny+shift(by='much')", SpecError, "by must be float, got 'much'"),
        ("tiny+shift(label=True)", SpecError, "label must be int"),
        ("tiny(num_classes='x')", SpecError, "num_classes must be int | None"),
        ("tiny+wrong", PluginError, "lacks refine"),
    ],
)
def test_build_errors(spec, error, message):
    with pytest.raises(error, match=message):
        pyseg.build(spec)


def test_absent_devices_are_named():
    with pytest.raises(DeviceError, match="no torch device"):
        pyseg.build("tiny", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match=r"cuda.*pyseg doctor"):
            pyseg.build("tiny", device="cuda")


def test_a_stage_must_return_what_it_promised(image, monkeypatch):
    pipeline = pyseg.build("tiny+shift")
    monkeypatch.setattr(Shift, "refine", lambda *_: torch.zeros(7, 9))
    with pytest.raises(PluginError, match=r"must return pyseg\.Segmentation"):
        pipeline(image)
    smaller = Segmentation((3, 3), ("a",), logits=torch.zeros(1, 3, 3))
    monkeypatch.setattr(Shift, "refine", lambda *_: smaller)
    with pytest.raises(PluginError, match=r"size \(3, 3\)"):
        pipeline(image)


def test_profile_sees_time_and_memory(image):
    class Hungry(Shift):
        def refine(self, image, prediction):
            torch.ones(50 << 20, dtype=torch.uint8)
            return prediction

    refiners._registry._registered["shift"] = Hungry
    model, hungry = pyseg.build("tiny+shift").profile(image)
    assert (model.name, hungry.name) == ("tiny", "shift")
    assert model.milliseconds > 0 and model.peak_bytes >= 0
    assert 45 << 20 < hungry.peak_bytes < 100 << 20


def test_save_and_load(tmp_path, image):
    pipeline = pyseg.build("tiny(bias=2.0)+shift(by=3.0)", num_classes=6)
    pipeline.model.classes = tuple("abcdef")
    folder = pipeline.save(tmp_path / "saved")
    loaded = pyseg.load(folder)
    assert str(loaded) == str(pipeline) and loaded.classes == tuple("abcdef")
    assert torch.equal(loaded(image).logits, pipeline(image).logits)
    pipeline.model.network[1].bias.data += 1
    pipeline.save(folder)  # replaces
    assert torch.equal(pyseg.load(folder)(image).logits, pipeline(image).logits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]


def test_save_does_not_overwrite_other_things(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(FileExistsError, match="no saved pipeline"):
        pyseg.build("tiny").save(tmp_path)


def test_load_refuses_what_is_no_pipeline(tmp_path):
    with pytest.raises(PysegError, match=r"no pipeline\.json"):
        pyseg.load(tmp_path)
    (tmp_path / "pipeline.json").write_text("{")
    with pytest.raises(PysegError, match="damaged"):
        pyseg.load(tmp_path)
    (tmp_path / "pipeline.json").write_text(json.dumps({"format": 99, "stages": []}))
    with pytest.raises(PysegError, match="format 99"):
        pyseg.load(tmp_path)


def test_pickling_and_threads(image):
    pipeline = pyseg.build("tiny+shift(by=4)")
    copy = pickle.loads(pickle.dumps(pipeline))
    expected = pipeline(image).labels
    assert torch.equal(copy(image).labels, expected)
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(pipeline, [image] * 32):
            assert torch.equal(result.labels, expected)


def test_to_returns_the_pipeline(image):
    pipeline = pyseg.build("tiny", device="cpu")
    assert pipeline.to("cpu") is pipeline and pipeline.device.type == "cpu"
