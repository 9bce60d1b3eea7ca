import base64
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import pyseg
from pyseg import cli, datasets, metrics, models, refiners
from pyseg.errors import PysegError
from pyseg.evaluation import evaluate
from pyseg.metrics.binary import Binary
from pyseg.metrics.calibration import Calibration
from pyseg.metrics.semantic import Semantic
from pyseg.report import WORST, Recorder, WorstImages, write_page
from pyseg.types import Sample, Segment, Segmentation, Segments

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


def reported(folder, names=("semantic",), data=None, spec="noisy+sharpen"):
    data = data or Data()
    pipeline = pyseg.build(spec)
    worst = WorstImages(data)
    result = evaluate(pipeline, data, names, observe=worst.add)
    files = write_page(folder, result, worst, title="test data")
    assert sorted(folder.iterdir()) == sorted(files)  # no temporary file is left
    text = (folder / "index.html").read_text(encoding="utf-8")
    return result, json.loads((folder / "report.json").read_text()), text


def test_one_page_that_needs_nothing_else(tmp_path, html_page):
    result, numbers, text = reported(tmp_path / "a" / "b", ("semantic", "calibration", "binary"))
    page = html_page(text)
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


def test_one_stage_and_few_images(tmp_path, html_page):
    result, numbers, text = reported(tmp_path, data=Data(2), spec="noisy")
    assert len(result.stages) == 1 and len(numbers["worst_images"]) == 2
    assert len(html_page(text).pictures()) == 8 and "2 images" in text


def test_many_classes_and_wide_images(tmp_path, html_page):
    class Wide(Data):
        classes = tuple(f"class {k}" for k in range(61))
        palette = tuple((k, k, k) for k in range(61))

        def __getitem__(self, index):
            labels = torch.arange(61, dtype=torch.uint8).repeat(4, 20)
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
    page = html_page(text)
    assert numbers["confusion"][60][60] == 80
    first = page.pictures()[0].split(",")[1]
    assert Image.open(io.BytesIO(base64.b64decode(first))).width == 960


def test_without_label_maps_there_are_tables_only(tmp_path, html_page):
    _, numbers, text = reported(tmp_path, ["count"], Data(3, labelled=False))
    assert numbers["confusion"] is None and numbers["worst_images"] == []
    assert "Confusion" not in text and "seen" in text and not html_page(text).pictures()
    assert numbers["stages"][0]["metrics"]["count"]["seen"] == 3


def test_bad_folder_and_rewriting(tmp_path):
    result = evaluate(pyseg.build("noisy"), Data(2))
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PysegError, match="is a file or lies below one"):
            write_page(folder, result)
    write_page(tmp_path / "out", result)
    before = (tmp_path / "out" / "report.json").read_bytes()
    (tmp_path / "out" / "report.json").write_text("old")
    write_page(tmp_path / "out", result)
    after = (tmp_path / "out" / "report.json").read_bytes()
    assert json.loads(after)["stages"] == json.loads(before)["stages"]
    with pytest.raises(PysegError, match="at least one evaluation"):
        write_page(tmp_path / "out", [])


def test_the_older_recorder_writes_the_same_page(tmp_path):
    with pytest.raises(PysegError, match="folder"):
        (tmp_path / "file").write_text("x")
        Recorder(tmp_path / "file", CLASSES, Data.palette, 1)
    recorder = Recorder(tmp_path / "one", CLASSES, Data.palette, 2)
    pipeline = pyseg.build("noisy+sharpen")
    recorder.write(evaluate(pipeline, Data(), observe=recorder.add), "test data")
    one = json.loads((tmp_path / "one" / "report.json").read_text())
    _, two, _ = reported(tmp_path / "two")
    for key in ("title", "spec", "confusion", "worst_images"):
        assert one[key] == two[key]


def test_every_stage_is_scored_once(tmp_path, monkeypatch):
    """The worst images are scored alone, and nothing else is scored beyond the evaluation."""
    updates, real = [], Semantic.update
    monkeypatch.setattr(Semantic, "update", lambda self, *a: (updates.append(1), real(self, *a)))
    result, numbers, _ = reported(tmp_path, data=Data(4))
    assert len(updates) == 4 * 2 + 4
    assert numbers["confusion"] == result.stages[-1].confusion.tolist()
    without, numbers, text = reported(tmp_path / "count", ["count"], Data(4))
    assert without.stages[-1].confusion is None and numbers["confusion"] is None
    assert "Confusion matrix" not in text and len(numbers["worst_images"]) == 4


def test_the_page_can_be_heard_and_read_in_the_dark(tmp_path, monkeypatch, html_page):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/pyseg", "evaluate", "--spec", "a+b(c='d e')"])
    result, numbers, text = reported(tmp_path, ["semantic", "calibration"])
    tags = html_page(text).tags
    heads = [attributes.get("scope") for tag, attributes in tags if tag == "th"]
    assert {"row", "col"} == set(heads)
    names = [attributes["alt"] for tag, attributes in tags if tag == "img"]
    assert len(set(names)) == len(names) == 4 * WORST + 2
    assert "errors of image <8>" in names and "reliability diagram of baseline" in names
    assert "prefers-color-scheme: dark" in text
    first, last = (
        stage.metrics["semantic"]["per_class"]["light"]["iou"] for stage in result.stages
    )
    for stage, value in (("baseline", first), ("+sharpen", last)):
        assert f'<span class="said">{stage}: </span>{value:.4f}' in text
    pictures = [a for tag, a in tags if tag == "svg"]
    assert pictures and all(a["role"] == "img" and a["aria-label"] for a in pictures)
    made = numbers["made"]
    assert made["command"] == """pyseg evaluate --spec 'a+b(c='"'"'d e'"'"')'"""
    assert made["torch"] == torch.__version__ and made["pyseg"] == pyseg.__version__
    assert re.fullmatch(r"cpu, \d+ threads?", made["device"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", made["date"])
    assert all(f"<dt>{key}</dt>" in text for key in made) and "/somewhere" not in text


def test_a_comparison_of_pipelines(tmp_path, html_page):
    data, results = Data(5), []
    worst = WorstImages(data)
    for spec in ("noisy", "noisy+sharpen", "noisy"):
        observe = worst.add if spec == "noisy+sharpen" else None
        results.append(evaluate(pyseg.build(spec), data, ["semantic", "binary"], observe=observe))
    write_page(tmp_path, results, worst, title="test data")
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    numbers = json.loads((tmp_path / "report.json").read_text())
    page = html_page(text)
    assert "3 pipelines compared" in text and len(page.pictures()) == 4 * 5
    assert [entry["spec"] for entry in numbers["evaluations"]] == [r.spec for r in results]
    for label in ("noisy (1)", "noisy+sharpen", "noisy (2)"):
        assert f'<th scope="row">{label}</th>' in text and f"Confusion matrix of {label}" in text
        assert text.count(f'<span class="said">{label}: </span>') == 3  # classes
    a, b = (result.stages[-1].metrics["binary"]["roc_auc"] for result in results[:2])
    assert f"<td>{b:.4f}</td><td>{b - a:+.4f}</td>" in text or f"<td>{b:.4f}</td>" in text
    two = Data(2)
    two.classes = ("a", "b")
    other = evaluate(pyseg.build("noisy"), Data(1))
    object.__setattr__(other, "classes", ("a", "b"))
    with pytest.raises(PysegError, match=r"noisy has 3, noisy 2"):
        write_page(tmp_path, [results[0], other])


class Panels:
    """Panoptic ground truth: a thing on the left half, stuff on the right."""

    classes, palette, things = ("wall", "box"), ((9, 9, 9), (200, 0, 0)), ("box",)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        image = torch.full((3, 12, 20), index, dtype=torch.uint8)
        return Sample(f"panel {index}", image, segments=halves(10))


def halves(border):
    """The left ``border`` columns are a box, the others wall."""
    ids = torch.full((12, 20), 2, dtype=torch.int32)
    ids[:, :border] = 1
    items = (Segment(1, 1, 1.0, 12 * border), Segment(2, 0, 1.0, 12 * (20 - border)))
    return Segments(ids, items)


class Splits:
    def __init__(self, *, num_classes: int | None = None, weights: str | None = None):
        self.classes = Panels.classes

    def predict(self, images):
        borders = [10 - 2 * int(image[0, 0, 0]) for image in images]
        return [Segmentation((12, 20), self.classes, segments=halves(b)) for b in borders]


def test_panoptic_pictures_with_their_quality(tmp_path, monkeypatch, html_page):
    monkeypatch.setitem(models._registry._registered, "splits", Splits)
    _, numbers, text = reported(tmp_path, ["panoptic"], Panels(), "splits")
    # Borders at 10, 8 and 6 of 10: IoUs of box and wall are 1, 1; 8/10, 10/12; 6/10, 10/14.
    want = {"panel 2": (6 / 10 + 10 / 14) / 2, "panel 1": (8 / 10 + 10 / 12) / 2, "panel 0": 1.0}
    assert {entry["name"]: entry["pq"] for entry in numbers["worst_images"]} == pytest.approx(want)
    assert [entry["name"] for entry in numbers["worst_images"]] == list(want)
    page = html_page(text)
    assert len(page.pictures()) == 9 and "PQ by class" in text
    names = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert names[:3] == [
        "image of panel 2",
        "ground truth of panel 2",
        f"prediction, PQ {100 * want['panel 2']:.1f} of panel 2",
    ]
    truth, predicted = (reds(source) for source in page.pictures()[1:3])
    # Of 12 rows the ten columns of the true box are red and the six of the predicted one; both have
    # the same swatch in the legend.
    assert truth - predicted > 12 * 2


def test_the_command_line_writes_it(tmp_path, monkeypatch):
    monkeypatch.setitem(models._registry._registered, "splits", Splits)
    monkeypatch.setitem(datasets._registry._registered, "panels", Panels)
    command = ["evaluate", "--spec", "splits", "--dataset", "panels", "--metric", "panoptic"]
    result = CliRunner().invoke(cli.app, [*command, "--report", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "prediction, PQ 100.0" in (tmp_path / "out" / "index.html").read_text()
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(Splits, "predict", lambda *a: pytest.fail("the folder is looked at first"))
    result = CliRunner().invoke(cli.app, [*command, "--report", str(tmp_path / "file")])
    assert result.exit_code == 2 and "--report" in result.stderr and "is a file" in result.stderr


def reds(source):
    """Reddish pixels of a picture in the page."""
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))
    return int(((picture[..., 0] > 90) & (picture[..., 1] < 60)).sum())


def test_nan_is_null(tmp_path):
    _, numbers, text = reported(tmp_path, ["semantic", "calibration"], Data(1))
    values = [v for v in numbers["stages"][0]["metrics"]["calibration"]["reliability"]["accuracy"]]
    assert None in values and not any(v is not None and math.isnan(v) for v in values)
    assert ">nan<" not in text
