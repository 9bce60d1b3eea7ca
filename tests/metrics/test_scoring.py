"""`score` of plain arrays: the same as the metrics themselves, intervals, differences, protocol."""

import json
import math

import numpy as np
import pytest
import torch

import pyseg
from pyseg.errors import LabelError, ScoreError, UnknownName
from pyseg.metrics import Boundary, Panoptic, Semantic, bootstrap, differences, score
from pyseg.types import Sample, Segmentation, Segments

COUNT, SIZE = 5, (37, 53)


def maps(images=6, seed=None, wrong=0.2):
    """Blobs and a prediction of them; uint8 with void in both."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, COUNT, (images, 6, 9))
    target = coarse.repeat(7, 1).repeat(6, 2)[:, : SIZE[0], : SIZE[1]].astype(np.uint8)
    prediction = np.roll(target, 2, 2)
    noise = generator.random(target.shape) < wrong
    prediction[noise] = generator.integers(0, COUNT, noise.sum())
    target[:, 0], prediction[:, :, 3] = 255, 255
    return prediction, target


FORMS = {
    "array": lambda values: values,
    "list of arrays": list,
    "generator": iter,
    "tensor": torch.from_numpy,
    "list of tensors": lambda values: [torch.from_numpy(value).long() for value in values],
    "int32": lambda values: values.astype(np.int32),
}


@pytest.mark.parametrize("form", FORMS)
def test_it_is_what_the_metrics_say(form):
    prediction, target = maps()
    texts = ("semantic", "boundary(ratio=0.05)")
    got = score(FORMS[form](prediction), FORMS[form](target), num_classes=COUNT, metrics=texts)
    for text, metric in zip(texts, (Semantic(COUNT), Boundary(COUNT, ratio=0.05)), strict=True):
        metric.update_labels(prediction, target)
        assert json.dumps(got.metrics[text]) == json.dumps(metric.compute())
    assert got.metrics["semantic"]["miou"] > 0.3


def test_one_map_and_a_metric_of_ones_own():
    prediction, target = maps(1)
    got = score(prediction[0], target[0], num_classes=COUNT, metrics=[Semantic(COUNT)])
    want = score(prediction, target, num_classes=COUNT)
    assert json.dumps(got.metrics["Semantic"]) == json.dumps(want.metrics["semantic"])


def test_logits_of_any_resolution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, COUNT, 8, 11, generator=generator)
    target = torch.randint(COUNT, (2, *SIZE), generator=generator)
    got = score(logits, target, num_classes=COUNT, metrics=("semantic", "calibration"))
    full = torch.nn.functional.interpolate(logits, SIZE, mode="bilinear").argmax(1)
    want = score(full, target, num_classes=COUNT)
    assert got.metrics["semantic"] == want.metrics["semantic"]
    assert 0 < got.metrics["calibration"]["ece"] < 1
    assert (
        score(logits.numpy(), target, num_classes=COUNT).metrics["semantic"]
        == (want.metrics["semantic"])
    )


def test_segments_and_samples():
    generator = np.random.default_rng(3)
    ids = generator.integers(0, 4, (2, 5, 6)).repeat(8, 1).repeat(8, 2)
    labels = {1: 0, 2: 1, 3: 1}
    target = [Segments.from_map(one, labels) for one in ids]
    guess = [Segments.from_map(np.roll(one, 1, 1), labels) for one in ids]
    got = score(guess, target, classes=("sky", "car"), metrics=("panoptic", "semantic"), things=[1])
    want = Panoptic(("sky", "car"), things=[1])
    for one, other in zip(guess, target, strict=True):
        want.update_segments(one, other)
    assert got.metrics["panoptic"] == want.compute() and got.metrics["panoptic"]["pq_things"] > 0
    assert got.metrics["semantic"]["miou"] > 0.5
    prediction = Segmentation((40, 48), ("sky", "car"), segments=guess[0])
    sample = Sample("one", torch.zeros(3, 40, 48), target[0].label_map(2), target[0])
    alone = score([prediction], [sample], classes=("sky", "car"), metrics=("panoptic",))
    assert alone.images == ("one",) and alone.metrics["panoptic"]["pq"] > 0


def test_protocol():
    prediction, target = maps(4)
    got = score(prediction, target, classes=list("abcde"), metrics=("semantic", "boundary"))
    assert got.protocol["pyseg"] == pyseg.__version__
    assert got.protocol["classes"] == list("abcde") and got.protocol["ignore_index"] == 255
    assert got.protocol["images"] == 4 and got.protocol["sizes"] == "37 x 53"
    assert "summed over all images" in got.protocol["averages"]["semantic"]
    assert "BF: over an image's classes" in got.protocol["averages"]["boundary"]
    assert got.protocol["intervals"] is None and math.isnan(got.interval("semantic", "miou")[0])
    json.dumps(got.to_dict(), allow_nan=False)
    sizes = score(
        [p[:k] for k, p in enumerate(prediction, 30)],
        [t[:k] for k, t in enumerate(target, 30)],
        num_classes=COUNT,
    ).protocol["sizes"]
    assert sizes == "4 from 30 x 53 to 33 x 53"


def test_void_of_another_value():
    prediction, target = maps()
    want = score(prediction, target, num_classes=COUNT)
    changed = np.where(target == 255, 77, target)
    guess = np.where(prediction == 255, 77, prediction)
    got = score(guess, changed, num_classes=COUNT, ignore_index=77)
    assert got.metrics == want.metrics and got.protocol["ignore_index"] == 77


def test_intervals_are_those_of_brute_force():
    prediction, target = maps(7)
    got = score(
        prediction, target, num_classes=COUNT, metrics=("semantic", "boundary"), resamples=60
    )
    plain = score(prediction, target, num_classes=COUNT, metrics=("semantic", "boundary"))
    assert json.dumps(got.metrics) == json.dumps(plain.metrics)
    counts = bootstrap.draws(7, 60, 0)
    values = {"semantic": [], "boundary": []}
    for row in counts.tolist():
        drawn = [k for k, times in enumerate(row) for _ in range(times)]
        again = score(prediction[drawn], target[drawn], num_classes=COUNT, metrics=[*values])
        values["semantic"].append(again.metrics["semantic"]["per_class"]["class 2"]["iou"])
        values["boundary"].append(again.metrics["boundary"]["bf"])
    for metric, keys in (("semantic", ("per_class", "class 2", "iou")), ("boundary", ("bf",))):
        want = np.quantile(values[metric], [0.025, 0.975])
        assert got.interval(metric, *keys) == pytest.approx(want, abs=1e-12)
    assert got.to_dict()["intervals"]["semantic"]["per_class"]["class 2"]["iou"]
    assert "60 bootstrap resamples of the 7 images" in got.protocol["intervals"]
    head, rows = got.table()
    assert head[2] == "95% interval" and rows[0][0] == "semantic miou" and " to " in rows[0][2]
    head, rows = got.class_table()
    assert len(rows) == COUNT and head[1] == "semantic iou" and " to " in rows[0][2]


def test_one_image_tells_nothing_about_others():
    prediction, target = maps(1, seed=1, wrong=0.3)
    first, second = (
        score(side, target, num_classes=COUNT, resamples=50) for side in (target, prediction)
    )
    assert np.isnan(first.interval("semantic", "miou")).all()
    found = differences(first, second)
    assert found.values["semantic"]["miou",].value > 0
    assert not any(d.beyond_noise for d in found.values["semantic"].values())
    json.dumps(found.to_dict(), allow_nan=False)


def test_differences_that_are_none_and_one_that_is():
    prediction, target = maps(30, seed=1, wrong=0.3)
    better = prediction.copy()
    better[(target == 2) & (prediction != 255)] = 2  # class 2 is always found
    shuffled = np.random.default_rng(5).permutation(30)
    options = dict(num_classes=COUNT, resamples=200)
    first, second = (score(side, target, **options) for side in (better, prediction))
    found = differences(first, second)
    path = "per_class", "class 2", "iou"
    assert found.values["semantic"][path].beyond_noise and found.values["semantic"][path].low > 0
    same = differences(first, first)
    assert not any(d.beyond_noise for d in same.values["semantic"].values())
    rows = found.table()[1]
    assert ["semantic iou class 2", "first is higher"] in [[row[0], row[5]] for row in rows]
    json.dumps(found.to_dict(), allow_nan=False)
    # in pairs: the interval is that of the differences, on the same draws
    want = (first.resamples["semantic"][path] - second.resamples["semantic"][path]).numpy()
    low, high = np.quantile(want, [0.025, 0.975])
    assert (found.values["semantic"][path].low, found.values["semantic"][path].high) == (
        pytest.approx((low, high))
    )
    other = score(better[shuffled], target[shuffled], names=[str(k) for k in range(30)], **options)
    for wrong, message in (
        (other, "different images"),
        (score(better, target, num_classes=COUNT, resamples=100), "different intervals"),
        (score(better, target, classes=list("abcde"), resamples=200), "different classes"),
    ):
        with pytest.raises(ScoreError, match=message):
            differences(first, wrong)
    plain = score(better, target, num_classes=COUNT)
    with pytest.raises(ScoreError, match="resamples=1000"):
        differences(plain, plain)


def test_bad_input():
    prediction, target = maps(3)
    for changes, error, words in (
        ({"num_classes": None}, ScoreError, "num_classes, or classes"),
        ({"classes": ["a"]}, ScoreError, "1 names, num_classes is 5"),
        ({"metrics": "semantic"}, ScoreError, "list such as"),
        ({"metrics": ()}, ScoreError, "list such as"),
        ({"metrics": ("semantic", "semantic")}, ScoreError, "twice"),
        ({"metrics": ("smeantic",)}, UnknownName, "semantic"),
        ({"predictions": prediction[:2]}, ScoreError, "2 predictions and more targets"),
        ({"targets": target[:1]}, ScoreError, "1 targets and more predictions"),
        ({"predictions": prediction[:, :9]}, LabelError, r"image 000000.*\[37, 53\]"),
        ({"predictions": prediction + 9}, LabelError, "image 000000"),
        ({"targets": np.where(target == 1, 33, target)}, LabelError, "33"),
        ({"predictions": prediction[None]}, LabelError, r"\[1, 3, 37, 53\]"),
        ({"predictions": 7}, ScoreError, "a int"),
        ({"predictions": [], "targets": []}, ScoreError, "no images"),
        ({"predictions": torch.zeros(3, 4, 5, 6)}, ScoreError, r"\[5, h, w\]"),
        ({"metrics": ("panoptic",)}, LabelError, "no segments"),
        ({"resamples": -1}, ScoreError, "negative"),
    ):
        options = {"predictions": prediction, "targets": target, "num_classes": COUNT} | changes
        with pytest.raises(error, match=words):
            score(options.pop("predictions"), options.pop("targets"), **options)


def test_sums_beyond_float64_are_exact():
    large = torch.tensor([[[1 << 60, 3], [5, (1 << 53) + 1]]])
    states = [{"matrix": large[0]}, {"matrix": torch.ones(2, 2, dtype=torch.int64)}]
    counts = torch.tensor([[1, 1], [2, 0]])
    got = bootstrap.total_of(states, counts)["matrix"]
    assert torch.equal(got, torch.stack([large[0] + 1, 2 * large[0]]))
