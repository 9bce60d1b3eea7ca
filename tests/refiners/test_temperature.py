import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import pyseg
from pyseg.errors import SpecError, WeightsError
from pyseg.metrics import Calibration
from pyseg.refiners import Temperature
from pyseg.testing import check_refiner
from pyseg.types import Sample, Segmentation
from pyseg.weights import load_temperature, save_state, store_temperature


def prediction(seed, size=(13, 17), scale=4.0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    low = [math.ceil(side / 2) for side in size]
    logits = torch.randn(classes, *low, generator=generator) * scale
    return Segmentation(size, tuple("abcdefgh"[:classes]), logits=logits)


@pytest.mark.parametrize("value", [0.3, 1.7, 20.0])
@pytest.mark.parametrize("size", [(13, 17), (1, 1), (2, 9)])
@pytest.mark.parametrize("before", [1.0, 2.5])
def test_divides_probabilities_and_keeps_labels(value, size, before):
    """Whatever temperature the model's predictions have, it takes its place."""
    given = replace(prediction(3, size), temperature=before)
    result = Temperature(value=value).refine(torch.zeros(3, *size, dtype=torch.uint8), given)
    assert torch.equal(result.labels, given.labels) and result.logits is given.logits
    expected = (given.full_logits() / value).softmax(0)
    torch.testing.assert_close(result.probabilities(), expected)
    torch.testing.assert_close(result.confidence(), expected.amax(0))


def test_what_changes_nothing_is_the_same_object():
    given = prediction(1)
    assert Temperature().refine(None, given) is given
    warm = replace(given, temperature=1.4)
    assert Temperature(value=1.4).refine(None, warm) is warm
    assert Temperature().refine(None, warm).temperature == 1


def test_new_logits_have_no_temperature():
    warm = replace(prediction(1), temperature=1.4)
    assert warm.with_logits(warm.logits * 2).temperature == 1
    for wrong in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be above 0 and finite"):
            replace(warm, temperature=wrong)


def test_confidence():
    given = prediction(5)
    confidence = given.confidence()
    assert confidence.shape == (13, 17) and confidence.dtype == torch.float32
    torch.testing.assert_close(confidence, given.probabilities().amax(0))
    assert (confidence >= 1 / 4 - 1e-6).all() and (confidence <= 1).all()
    huge = given.with_logits(given.logits * 1e6)
    torch.testing.assert_close(huge.confidence(), huge.probabilities().amax(0))
    with pytest.raises(ValueError, match="holds labels without logits"):
        given.with_labels(given.labels).confidence()


def test_lowers_the_calibration_error_of_sure_logits():
    """Labels are drawn from the probabilities of logits: five times these are too sure."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    logits = torch.randn(3, 60, 80, generator=generator)
    drawn = torch.multinomial(logits.softmax(0).flatten(1).T, 1, generator=generator)
    sample = Sample(
        "drawn", torch.zeros(3, 60, 80, dtype=torch.uint8), drawn.view(60, 80).to(torch.uint8)
    )
    sure = Segmentation((60, 80), ("a", "b", "c"), logits=5 * logits)
    scores = []
    for value in (1.0, 5.0):
        metric = Calibration(("a", "b", "c"))
        metric.update(Temperature(value=value).refine(sample.image, sure), sample)
        scores.append(metric.compute())
    assert scores[0]["ece"] > 0.15 and scores[1]["ece"] < 0.04
    assert scores[0]["pixel_accuracy"] == scores[1]["pixel_accuracy"]


def test_is_a_refiner_and_saved_with_the_pipeline(tmp_path):
    check_refiner("temperature", value=1.3)
    pipeline = pyseg.build("streetnet+temperature(value=1.3)", weights=None)
    loaded = pyseg.load(pipeline.save(tmp_path / "saved"))
    assert str(loaded) == "streetnet+temperature(value=1.3)"
    assert loaded.refiners[0].value == 1.3 and repr(loaded.refiners[0]) == "Temperature(value=1.3)"
    image = torch.randint(256, (3, 32, 40), dtype=torch.uint8)
    assert torch.equal(loaded(image).probabilities(), pipeline(image).probabilities())


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_refuses(value):
    with pytest.raises(ValueError, match="value must be above 0 and finite"):
        Temperature(value=value)
    given = prediction(0)
    with pytest.raises(SpecError, match="temperature needs logits"):
        Temperature(value=2.0).refine(None, given.with_labels(given.labels))


def test_weights_tell_it(tmp_path):
    """Stored with the weights it is in every prediction, changes no label, and is saved on."""
    image = torch.randint(256, (3, 40, 56), dtype=torch.uint8)
    file = tmp_path / "net.safetensors"
    plain = pyseg.build("segnet_basic", weights=None)
    save_state(file, plain.model.state_dict(), metadata={"author": "me"})
    spec = f"segnet_basic(weights={str(file)!r})"
    before = pyseg.build(spec)(image)
    assert before.temperature == 1 and load_temperature(file) == 1
    store_temperature(file, 1.7)
    assert load_temperature(file) == 1.7
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"author": "me", "temperature": "1.7"}
    pipeline = pyseg.build(spec)
    after = pipeline(image)
    assert after.temperature == 1.7 == pipeline.model.temperature
    assert torch.equal(after.labels, before.labels) and torch.equal(after.logits, before.logits)
    expected = (before.full_logits() / 1.7).softmax(0).amax(0)
    torch.testing.assert_close(after.confidence(), expected)
    loaded = pyseg.load(pipeline.save(tmp_path / "saved"))
    assert loaded(image).temperature == 1.7
    # The mean of several variants is less sure than each: it is not that of the weights.
    assert pipeline.model.predict([image], tta="flip")[0].temperature == 1
    assert pipeline.model.predict([image], crop_size=32)[0].temperature == 1.7
    pipeline.model.train()
    pipeline.model.eval()
    assert pipeline(image).temperature == 1
    # Other classes: another head, of which nothing is known.
    assert pyseg.build("segnet_basic", weights=None).model.temperature == 1


def test_the_metric_divides_by_it():
    given = prediction(7)
    labels = torch.randint(4, (13, 17), dtype=torch.uint8)
    sample = Sample("one", torch.zeros(3, 13, 17, dtype=torch.uint8), labels)
    warm, divided = Calibration(given.classes), Calibration(given.classes)
    warm.update(replace(given, temperature=2.5), sample)
    divided.update(given.with_logits(given.logits / 2.5), sample)
    plain = Calibration(given.classes)
    plain.update(given, sample)
    for name in ("ece", "mce", "nll", "brier", "confidence"):
        assert warm.compute()[name] == pytest.approx(divided.compute()[name], abs=1e-6)
    assert warm.compute()["confidence"] < plain.compute()["confidence"]
    assert warm.compute()["pixel_accuracy"] == plain.compute()["pixel_accuracy"]


def test_files_that_tell_none(tmp_path):
    state = {"w": torch.ones(2)}
    torch.save(state, tmp_path / "net.pth")
    assert load_temperature(tmp_path / "net.pth") == 1
    with pytest.raises(WeightsError, match=r"net\.pth is no safetensors file"):
        store_temperature(tmp_path / "net.pth", 1.2)
    with pytest.raises(WeightsError, match="there is no file"):
        load_temperature(tmp_path / "absent")
    for wrong in ("hot", "0", "-1", "nan", "inf"):
        save_state(tmp_path / "w.safetensors", state, metadata={"temperature": wrong})
        with pytest.raises(WeightsError, match="tells a temperature of"):
            load_temperature(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="value must be above 0"):
        store_temperature(tmp_path / "w.safetensors", 0.0)
