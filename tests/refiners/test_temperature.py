import math

import pytest
import torch

import pyseg
from pyseg.errors import SpecError
from pyseg.metrics import Calibration
from pyseg.refiners import Temperature
from pyseg.testing import check_refiner
from pyseg.types import Sample, Segmentation


def prediction(seed, size=(13, 17), scale=4.0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    low = [math.ceil(side / 2) for side in size]
    logits = torch.randn(classes, *low, generator=generator) * scale
    return Segmentation(size, tuple("abcdefgh"[:classes]), logits=logits)


@pytest.mark.parametrize("value", [0.3, 1.7, 20.0])
@pytest.mark.parametrize("size", [(13, 17), (1, 1), (2, 9)])
def test_divides_logits_and_keeps_labels(value, size):
    given = prediction(3, size)
    result = Temperature(value=value).refine(torch.zeros(3, *size, dtype=torch.uint8), given)
    assert torch.equal(result.labels, given.labels)
    expected = (given.full_logits() / value).softmax(0)
    torch.testing.assert_close(result.probabilities(), expected)
    torch.testing.assert_close(result.confidence(), expected.amax(0))
    tied = given.with_logits(torch.zeros_like(given.logits))
    assert torch.equal(Temperature(value=value).refine(None, tied).labels, tied.labels)


def test_half_precision_and_one():
    given = prediction(1)
    narrow = given.with_logits(given.logits.bfloat16())
    result = Temperature(value=1.5).refine(None, narrow)
    assert result.logits.dtype == torch.float32 and torch.equal(result.labels, narrow.labels)
    assert Temperature().refine(None, given) is given


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
    assert torch.equal(loaded(image).logits, pipeline(image).logits)


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_refuses(value):
    with pytest.raises(ValueError, match="value must be above 0 and finite"):
        Temperature(value=value)
    given = prediction(0)
    with pytest.raises(SpecError, match="temperature needs logits"):
        Temperature(value=2.0).refine(None, given.with_labels(given.labels))
