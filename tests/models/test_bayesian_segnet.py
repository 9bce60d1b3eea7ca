"""Bayesian SegNet: sampling, and the uncertainty that its results carry to pictures and files."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import pyseg
from pyseg.errors import ImageError, SpecError
from pyseg.image import read_uncertainty, write_uncertainty
from pyseg.metrics.calibration import Calibration
from pyseg.models.segnet import BayesianSegNet, SegNet
from pyseg.types import Sample, Segmentation
from pyseg.visual import heat_map


def network(samples=4, classes=3):
    torch.manual_seed(0)
    made = BayesianSegNet(classes, samples=samples).eval()
    made.decoder[4][-1].weight.data.mul_(3)  # certain enough to differ from place to place
    return made


@torch.no_grad()
def test_sampling_is_mean_and_variance_over_passes():
    made = network()
    x = torch.randn(2, 3, 33, 40)
    passes, real = [], made._sample
    made._sample = lambda *given: passes.append(real(*given)) or passes[-1]
    outputs = made(x)
    assert len(passes) == 4
    p = torch.stack(passes).double().softmax(2)
    torch.testing.assert_close(outputs["out"].softmax(1).double(), p.mean(0), atol=1e-6, rtol=1e-5)
    wanted = p.var(0, correction=0).mean(1)
    torch.testing.assert_close(outputs["uncertainty"].double(), wanted, atol=1e-7, rtol=1e-4)
    assert outputs["uncertainty"].shape == (2, 33, 40) and outputs["uncertainty"].std() > 0


@torch.no_grad()
def test_dropout_is_where_the_published_model_has_it(monkeypatch):
    """After the three deepest poolings and the three deepest blocks of the decoder."""
    made = network(samples=2)
    seen = []

    def drop(x):
        seen.append(tuple(x.shape[1:]))
        return x

    x, maxima = torch.randn(1, 3, 64, 96), []
    from pyseg.models.segnet import _encode

    y = x
    for layer in made.encoder[: made.certain]:
        y = _encode(layer, y, maxima)
    logits = made._sample(y, maxima, drop)
    # encdrop3, encdrop4, encdrop5, decdrop5, decdrop4, decdrop3 of the prototxt
    assert seen == [
        *[(256, 8, 12), (512, 4, 6), (512, 2, 3)],
        *[(512, 4, 6), (256, 8, 12), (128, 16, 24)],
    ]
    plain = SegNet(3).eval()
    plain.load_state_dict(made.state_dict())
    torch.testing.assert_close(logits, plain(x))  # without dropout it is SegNet


@torch.no_grad()
def test_halves_are_dropped_and_the_expectation_stays():
    from pyseg.models.segnet import _FixedDropout

    drop = _FixedDropout(torch.Generator().manual_seed(1))
    x = torch.ones(2, 64, 20, 20)
    first, second = drop(x), drop(x)
    assert set(first.unique().tolist()) == {0.0, 2.0} and first.mean() == pytest.approx(1, abs=0.02)
    assert torch.equal(first[0], first[1]) and not torch.equal(first, second)


def test_more_samples_settle():
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    results = []
    for samples in (2, 20, 30):
        model = pyseg.models.SemanticModel(network(samples), ("a", "b", "c"))
        results.append(model.predict([image])[0].probabilities())
    assert (results[1] - results[2]).abs().mean() < (results[0] - results[2]).abs().mean() / 2


def test_its_calibration_is_that_of_the_mean_probabilities():
    model = pyseg.models.SemanticModel(network(), ("a", "b", "c"))
    images = [torch.randint(256, (3, 40, 40), dtype=torch.uint8) for _ in range(2)]
    metric, samples = Calibration(("a", "b", "c")), []
    for image, result in zip(images, model.predict(images), strict=True):
        sample = Sample("x", image, torch.randint(3, (40, 40), dtype=torch.uint8))
        metric.update(result, sample)
        samples.append((result.probabilities(), sample.labels))
    confidence = torch.cat([p.max(0).values.flatten() for p, _ in samples]).double()
    right = torch.cat([(p.argmax(0) == y).flatten() for p, y in samples]).double()
    bins = (confidence * 15).long().clamp(max=14)
    wanted = sum(abs(float((right - confidence)[bins == k].sum())) for k in range(15)) / len(
        confidence
    )
    assert metric.compute()["ece"] == pytest.approx(wanted, abs=1e-4) and wanted > 0


def result(size=(6, 8)):
    return Segmentation(
        size,
        ("a", "b"),
        logits=torch.randn(2, 3, 4),
        uncertainty=torch.rand(3, 4) / 4,
        image=torch.zeros(3, *size, dtype=torch.uint8),
    )


def test_a_result_carries_its_uncertainty():
    one = result()
    full = one.full_uncertainty()
    wanted = torch.nn.functional.interpolate(one.uncertainty[None, None], (6, 8), mode="bilinear")
    assert torch.equal(full, wanted[0, 0])
    for other in (one.with_logits(2 * one.logits), one.with_labels(one.labels)):
        assert other.uncertainty is one.uncertainty
    assert "uncertainty" in repr(one)
    stream = io.BytesIO()
    torch.save(one, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False).uncertainty, one.uncertainty)
    with pytest.raises(ValueError, match="holds no uncertainty; a model such as bayesian_segnet"):
        replace(one, uncertainty=None).uncertainty_map()
    with pytest.raises(ValueError, match=r"uncertainty must be \[h, w\]"):
        replace(one, uncertainty=torch.zeros(1, 3, 4))


def test_its_picture():
    one = result()
    picture = one.uncertainty_map()
    assert picture.size == (8, 6) and picture.mode == "RGB"
    grey = np.asarray(picture).astype(int).sum(2)
    full = one.full_uncertainty().numpy()
    order = np.argsort(full.ravel())
    assert (np.diff(grey.ravel()[order]) >= -2).all()  # brighter is more, but for rounding
    assert grey.ravel()[order[-1]] == 3 * 255
    half = np.asarray(one.uncertainty_map(limit=2 * float(full.max())))
    assert half.astype(int).sum(2).max() < 3 * 255
    zero = replace(one, uncertainty=torch.zeros(3, 4))
    assert not np.asarray(zero.uncertainty_map()).any()
    odd = np.asarray(heat_map(torch.tensor([[math.nan, 0.0, math.inf, 1.0]]), 1.0))
    assert odd.sum(2).tolist() == [[0, 0, 765, 765]]
    for values, limit, words in ((torch.zeros(2), None, "values must be"), (full, 0, "limit must")):
        with pytest.raises(ValueError, match=words):
            heat_map(values, limit)


def test_predict_writes_it_and_it_reads_back(tmp_path):
    (tmp_path / "in").mkdir()
    image = torch.randint(256, (3, 33, 47), dtype=torch.uint8)
    pyseg.image.write_image(tmp_path / "in" / "a.png", image)
    pipeline = pyseg.build(network(), num_classes=3)
    summary = pyseg.predict(pipeline, tmp_path / "in", tmp_path / "out")
    assert len(summary.written) == 1
    found = read_uncertainty(tmp_path / "out" / "uncertainty" / "a.png")
    wanted = pipeline(image).full_uncertainty()
    torch.testing.assert_close(found, wanted, atol=1 / 131_000, rtol=0)


def test_files_that_cannot_be(tmp_path):
    for values in (torch.full((2, 2), 1.5), torch.tensor([[math.nan]]), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"\[H, W\] in 0..1"):
            write_uncertainty(tmp_path / "a.png", values)
    with pytest.raises(ImageError, match="PNG"):
        write_uncertainty(tmp_path / "a.jpg", torch.zeros(2, 2))
    pyseg.image.write_image(tmp_path / "b.png", torch.zeros(3, 2, 2, dtype=torch.uint8))
    with pytest.raises(ImageError, match="16-bit grey"):
        read_uncertainty(tmp_path / "b.png")
    with pytest.raises(ImageError, match="does not exist"):
        read_uncertainty(tmp_path / "c.png")
    with pytest.raises(SpecError, match="samples must be at least 2, got 1"):
        pyseg.build("bayesian_segnet(samples=1)", weights=None)
