import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

import pyseg
from pyseg import metrics, models, refiners
from pyseg.errors import PysegError
from pyseg.evaluation import evaluate
from pyseg.metrics.binary import Binary
from pyseg.metrics.calibration import Calibration
from pyseg.metrics.semantic import Semantic
from pyseg.report import WORST, Recorder
from pyseg.types import Sample, Segmentation

CLASSES = ("dark & <b>", "middle", "light")


class Noisy:
    """Class k where the red channel is k, less surely the brighter the green one."""

    def __init__(self, *, num_classes: int | None = None, weights: str | None = None):
        self.classes = CLASSES

    def predict(self, images):
        def one(image):
            generator = torch.Generator().manual_seed(int(image[2, 0, 0]))
            logits = 4.0 * (torch.arange(3)[:, None, None] == image[0])
            logits += float(image[1, 0, 0]) / 20 * torch.randn(logits.shape, generator=generator)
            return Segmentation(tuple(image.shape[1:]), CLASSES, logits=logits)

        return [one(image) for image in images]


class Sharpen:
    def refine(self, image, prediction):
        return prediction.with_logits(3 * prediction.logits)


class Data:
    classes, palette = CLASSES, ((0, 0, 0), (99, 99, 99), (200, 200, 200))

    def __init__(self, count=9, labelled=True):
        self.count, self.labelled = count, labelled

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        labels = torch.randint(0, 3, (20, 30 + index), generator=generator, dtype=torch.uint8)
        image = torch.stack(
            [labels, torch.full_like(labels, 9 * index), torch.full_like(labels, index)]
        )
        labels[:2] = 255
        return Sample(f"image <{index}>", image, labels if self.labelled else None)


class Count:
    """A metric that needs no label maps."""

    def __init__(self):
        self.images = 0

    def update(self, prediction, sample):
        self.images += 1

    def state(self):
        return {"images": torch.tensor(self.images)}

    def load_state(self, state):
        self.images = int(state["images"])

    def compute(self):
        return {"seen": float(self.images)}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(models._registry._registered, "noisy", Noisy)
    monkeypatch.setitem(refiners._registry._registered, "sharpen", Sharpen)
    for name, metric in (
        ("semantic", Semantic),
        ("calibration", Calibration),
        ("binary", Binary),
        ("count", Count),
    ):
        monkeypatch.setitem(metrics._registry._registered, name, metric)


class Page(HTMLParser):
    """Checks that tags close, and collects them."""

    VOID = ("meta", "img", "rect", "polyline", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def pictures(self):
        return [attributes["src"] for tag, attributes in self.tags if tag == "img"]


def reported(folder, names=("semantic",), data=None, spec="noisy+sharpen"):
    data = data or Data()
    pipeline = pyseg.build(spec)
    recorder = Recorder(folder, data.classes, data.palette, len(pipeline.stages))
    result = evaluate(pipeline, data, names, observe=recorder.add)
    files = recorder.write(result, "test data")
    assert sorted(folder.iterdir()) == sorted(files)  # no temporary file is left
    text = (folder / "index.html").read_text(encoding="utf-8")
    return result, json.loads((folder / "report.json").read_text()), text


def test_one_page_that_needs_nothing_else(tmp_path):
    result, numbers, text = reported(tmp_path / "a" / "b", ("semantic", "calibration", "binary"))
    page = Page(text)
    assert not re.search(r"https?://|<script|<link|url\(", text)
    assert any(a.get("name") == "viewport" for tag, a in page.tags if tag == "meta")
    assert "image &lt;8&gt;" in text and "dark &amp; &lt;b&gt;" in text and "<b>dark" not in text
    for stage in result.stages:
        assert f"{stage.metrics['semantic']['miou']:.4f}" in text
    for name in ("IoU by class", "Confusion matrix", "Reliability", "ROC", "Worst images"):
        assert name in text
    pictures = page.pictures()
    assert len(pictures) == 4 * WORST + 2  # and the reliability diagrams of two stages
    for source in pictures:
        head, data = source.split(",")
        assert re.fullmatch("data:image/(png|jpeg);base64", head)
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    assert numbers["stages"] == result.to_list() and numbers["title"] == "test data"


def test_worst_images_and_confusion_against_a_plain_computation(tmp_path):
    _, numbers, _ = reported(tmp_path)
    data, pipeline = Data(), pyseg.build("noisy+sharpen")
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    scores = []
    for index in range(len(data)):
        sample = data[index]
        labels = pipeline(sample.image).labels.long()
        target = sample.labels.long()
        values = []
        for t in range(3):
            for p in range(3):
                confusion[t, p] += int(((target == t) & (labels == p)).sum())
            both = int(((target == t) & (labels == t)).sum())
            values.append(both / int((((target == t) | (labels == t)) & (target != 255)).sum()))
        scores.append((sum(values) / 3, sample.name))
    assert numbers["confusion"] == confusion.tolist()
    want = sorted(scores)[:WORST]
    assert [entry["name"] for entry in numbers["worst_images"]] == [name for _, name in want]
    assert [entry["miou"] for entry in numbers["worst_images"]] == pytest.approx(
        [score for score, _ in want]
    )
    assert want[0][0] < 0.9 < max(scores)[0]


def test_one_stage_and_few_images(tmp_path):
    result, numbers, text = reported(tmp_path, data=Data(2), spec="noisy")
    assert len(result.stages) == 1 and len(numbers["worst_images"]) == 2
    assert len(Page(text).pictures()) == 8 and "2 images" in text


def test_many_classes_and_wide_images(tmp_path):
    class Wide(Data):
        classes = tuple(f"class {k}" for k in range(150))
        palette = tuple((k, k, k) for k in range(150))

        def __getitem__(self, index):
            labels = torch.arange(150, dtype=torch.uint8).repeat(4, 8)
            return Sample("wide", labels.expand(3, -1, -1), labels)

    class Same(Noisy):
        def __init__(self, *, num_classes: int | None = None, weights: str | None = None):
            self.classes = Wide.classes

        def predict(self, images):
            return [
                Segmentation(tuple(i.shape[1:]), self.classes).with_labels(i[0]) for i in images
            ]

    models._registry._registered["noisy"] = Same
    _, numbers, text = reported(tmp_path, data=Wide(1), spec="noisy")
    page = Page(text)
    assert numbers["confusion"][149][149] == 32
    first = page.pictures()[0].split(",")[1]
    assert Image.open(io.BytesIO(base64.b64decode(first))).width == 960


def test_without_label_maps_there_are_tables_only(tmp_path):
    _, numbers, text = reported(tmp_path, ["count"], Data(3, labelled=False))
    assert numbers["confusion"] is None and numbers["worst_images"] == []
    assert "Confusion" not in text and "seen" in text and not Page(text).pictures()
    assert numbers["stages"][0]["metrics"]["count"]["seen"] == 3


def test_bad_folder_and_rewriting(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PysegError, match="--report"):
            Recorder(folder, CLASSES, Data.palette, 1)
    recorder = Recorder(tmp_path / "out", CLASSES, Data.palette, 1)
    result = evaluate(pyseg.build("noisy"), Data(2), observe=recorder.add)
    recorder.write(result)
    before = (tmp_path / "out" / "index.html").read_text()
    recorder.write(result)
    assert (tmp_path / "out" / "index.html").read_text() == before


def test_nan_is_null(tmp_path):
    _, numbers, text = reported(tmp_path, ["semantic", "calibration"], Data(1))
    values = [v for v in numbers["stages"][0]["metrics"]["calibration"]["reliability"]["accuracy"]]
    assert None in values and not any(v is not None and math.isnan(v) for v in values)
    assert ">nan<" not in text
