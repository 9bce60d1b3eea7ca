import pytest
import torch

import pyseg
from pyseg.errors import PysegError, SpecError
from pyseg.refiners import CRF
from pyseg.types import Segmentation


def scene():
    """An image of two flat halves, and logits whose border is six pixels off and noisy."""
    image = torch.full((3, 40, 60), 40, dtype=torch.uint8)
    image[:, :, 30:] = 200
    target = (torch.arange(60) >= 30).expand(40, 60).to(torch.uint8)
    logits = torch.zeros(2, 40, 60)
    logits[1, :, 36:] = 2.0
    logits[0, :, :36] = 2.0
    logits += torch.randn(2, 40, 60, generator=torch.Generator().manual_seed(0))
    return image, target, Segmentation((40, 60), ("dark", "bright"), logits=logits)


def test_moves_the_border_to_the_edge():
    image, target, prediction = scene()
    refined = CRF().refine(image, prediction)
    strong = CRF(bilateral=((80.0, 13.0, 10.0),)).refine(image, prediction)
    before, after, most = (
        (one.labels == target).float().mean() for one in (prediction, refined, strong)
    )
    assert before < 0.85 and after > 0.9 and most > 0.99
    torch.testing.assert_close(refined.logits.exp().sum(0), torch.ones(40, 60))
    assert prediction.logits is not refined.logits


def poles():
    """Two bright poles, five pixels wide, before a ground of two shades; logits of stride 4."""
    labels = torch.zeros(64, 96, dtype=torch.long)
    labels[:, 40:] = 1
    labels[10:50, 20:25] = labels[10:50, 70:75] = 2
    image = torch.tensor([60, 160, 120], dtype=torch.uint8)[labels].expand(3, -1, -1).contiguous()
    logits = torch.nn.functional.one_hot(labels, 3).permute(2, 0, 1)[None].float()
    logits = 4 * torch.nn.functional.avg_pool2d(logits, 4)[0]
    return image, labels, Segmentation((64, 96), ("left", "right", "pole"), logits=logits)


def changed_by_hand(image, prediction, crf):
    """Labels of `CRF.refine` from those of the same CRF without `protect` and `margin`."""
    bare = CRF(**{**crf.config(), "protect": 0, "margin": 1}).refine(image, prediction)
    before, after = prediction.labels.long(), bare.labels.long().clone()
    best = prediction.probabilities().sort(0, descending=True).values
    after = torch.where(best[0] - best[1] > crf.margin, before, after)
    for label in range(len(prediction.classes)):
        own = before == label
        if (after[own] == label).sum() < crf.protect * own.sum():
            after[own] = label
    return after


def test_classes_that_would_shrink_are_protected():
    image, labels, prediction = poles()
    strong = {"gaussian": ((6.0, 12.0),), "bilateral": ()}
    pole = labels == 2
    before = (prediction.labels == 2)[pole].float().mean()
    bare = CRF(**strong, protect=0).refine(image, prediction)
    kept = CRF(**strong).refine(image, prediction)
    assert before > 0.5
    assert (bare.labels == 2)[pole].float().mean() < 0.1 * before  # what a CRF does to poles
    assert (kept.labels == 2)[pole].float().mean() >= before
    assert torch.equal(kept.labels.long(), changed_by_hand(image, prediction, CRF(**strong)))
    # What stays has the model's logits, what does not those of the CRF.
    own = prediction.probabilities().log()
    stays = (prediction.labels == 2) & (bare.labels != 2)
    torch.testing.assert_close(kept.logits, torch.where(stays, own, bare.logits))


@pytest.mark.parametrize("protect", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("margin", [0.0, 0.2, 0.7, 1.0])
def test_protect_and_margin_against_pixel_by_pixel(protect, margin):
    seed = torch.seed() % 2**31
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (3, 29, 38), dtype=torch.uint8, generator=generator)
    logits = 2 * torch.randn(5, 15, 19, generator=generator)
    prediction = Segmentation((29, 38), tuple("abcde"), logits=logits, temperature=1.3)
    crf = CRF(
        gaussian=((3.0, 4.0),),
        bilateral=((10.0, 30.0, 2.0),),
        protect=protect,
        margin=margin,
    )
    refined = crf.refine(image, prediction)
    expected = changed_by_hand(image, prediction, crf)
    assert (refined.labels.long() != expected).sum() <= 1, seed  # the margin in another order
    if margin == 0 or protect == 1:
        assert torch.equal(refined.labels, prediction.labels), seed
    elif protect == 0:
        assert not torch.equal(refined.labels, prediction.labels), seed


def test_a_models_temperature_is_in_the_unaries():
    image, _, prediction = scene()
    logits = prediction.logits
    hot = Segmentation((40, 60), prediction.classes, logits=3 * logits, temperature=3.0)
    expected = CRF().refine(image, prediction)
    refined = CRF().refine(image, hot)
    torch.testing.assert_close(refined.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert refined.temperature == 1  # those are the CRF's marginals


def test_one_class():
    image = torch.randint(256, (3, 8, 9), dtype=torch.uint8)
    prediction = Segmentation((8, 9), ("all",), logits=torch.randn(1, 4, 5))
    assert not CRF(margin=0.5).refine(image, prediction).labels.any()


def test_batches_equal_single_images():
    image, _, prediction = scene()
    other = Segmentation((40, 60), ("dark", "bright"), logits=torch.randn(2, 5, 8))
    odd = Segmentation((9, 11), ("dark", "bright"), logits=torch.randn(2, 3, 3))
    small = torch.randint(0, 256, (3, 9, 11), dtype=torch.uint8)
    crf = CRF(iterations=3)
    batch = crf.refine_batch([image, small, image], [prediction, odd, other])
    for one, (i, p) in zip(batch, [(image, prediction), (small, odd), (image, other)], strict=True):
        torch.testing.assert_close(one.logits, crf.refine(i, p).logits)


def test_confident_logits_do_not_become_infinite():
    image, _, prediction = scene()
    refined = CRF().refine(image, prediction.with_logits(prediction.logits * 1e4))
    assert refined.logits.isfinite().all()


def test_no_iterations_change_nothing():
    image, _, prediction = scene()
    assert CRF(iterations=0).refine(image, prediction) is prediction


def test_errors():
    image, _, prediction = scene()
    with pytest.raises(ValueError, match="needs logits"):
        CRF().refine(image, prediction.with_labels(prediction.labels))
    with pytest.raises(ValueError, match="iterations must be a whole number from 0 to 1000"):
        CRF(iterations=-1)
    with pytest.raises(ValueError, match="protect must be from 0 to 1, got -1"):
        CRF(protect=-1.0)
    with pytest.raises(ValueError, match=r"margin must be from 0 to 1, got 1\.5"):
        CRF(margin=1.5)
    with pytest.raises(ValueError, match=r"bilateral must be \(sigma_xy, sigma_rgb, weight\)"):
        CRF(bilateral=((80.0, 13.0),))
    with pytest.raises(ValueError, match="set trainable=True"):
        CRF(weights="crf.safetensors")
    with pytest.raises(ValueError, match="trainable needs num_classes"):
        CRF(trainable=True)
    with pytest.raises(ValueError, match="trainable needs positive weights"):
        CRF(trainable=True, num_classes=2, gaussian=((2.0, 0.0),))
    with pytest.raises(ValueError, match=r"compatibility must be \[2, 2\]"):
        CRF(trainable=True, num_classes=3).refine(image, prediction)


def test_training_starts_where_the_plain_crf_is():
    image, _, prediction = scene()
    plain, trainable = CRF(protect=0), CRF(protect=0, trainable=True, num_classes=2)
    assert not list(plain.parameters()) and len(list(trainable.parameters())) == 2
    expected = plain.refine(image, prediction).logits
    refined = trainable.refine(image, prediction).logits
    assert not refined.requires_grad
    torch.testing.assert_close(refined, expected, atol=1e-4, rtol=1e-4)
    small = prediction.logits[None, :, ::2, ::2]
    batch = trainable(image[None], small)
    expected = plain.refine(image, prediction.with_logits(small[0])).logits
    torch.testing.assert_close(batch[0], expected, atol=1e-4, rtol=1e-4)


def test_trains():
    image, labels, prediction = poles()
    crf = CRF(trainable=True, num_classes=3, iterations=2, gaussian=((6.0, 12.0),), bilateral=())
    logits = prediction.logits[None].requires_grad_()
    optimizer = torch.optim.Adam(crf.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.nll_loss(crf(image[None], logits), labels[None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.7 * losses[0]
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0
    assert crf.log_weights.exp() < 12.0  # which wiped out the poles
    # ... and a step against the gradient of the logits lowers the loss, too
    with torch.no_grad():
        moved = logits - 0.1 * logits.grad / logits.grad.norm()
        before, after = (
            torch.nn.functional.nll_loss(crf(image[None], x), labels[None]) for x in (logits, moved)
        )
    assert after < before


def test_trained_parameters_are_saved_and_used(tmp_path):
    image, _, prediction = scene()
    crf = CRF(trainable=True, num_classes=2, protect=0)
    with torch.no_grad():
        crf.log_weights.add_(torch.tensor([0.5, -0.3]))
        crf.compatibility.copy_(torch.tensor([[0.0, 2.0], [0.5, 0.1]]))
    torch.save(crf.state_dict(), tmp_path / "crf.pt")
    again = CRF(trainable=True, protect=0, weights=tmp_path / "crf.pt")
    expected = crf.refine(image, prediction).logits
    assert torch.equal(again.refine(image, prediction).logits, expected)
    assert not torch.equal(CRF(protect=0).refine(image, prediction).logits, expected)
    with pytest.raises(PysegError, match="of another shape"):
        CRF(trainable=True, num_classes=3, weights=tmp_path / "crf.pt")


def test_trained_pipeline_is_saved_and_loaded(tmp_path):
    image = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    pipeline = pyseg.build("streetnet+crf(trainable=True, iterations=2)", weights=None)
    crf = pipeline.refiners[0]
    assert crf.compatibility.shape == (11, 11)
    with torch.no_grad():
        crf.compatibility.add_(torch.rand(11, 11))
    pipeline.save(tmp_path / "saved")
    loaded = pyseg.load(tmp_path / "saved")
    assert torch.equal(loaded.refiners[0].compatibility, crf.compatibility)
    assert torch.equal(loaded(image).logits, pipeline(image).logits)
    path = tmp_path / "crf.pt"
    torch.save(crf.state_dict(), path)
    built = pyseg.build(f"streetnet+crf(trainable=True, weights={str(path)!r})")
    assert torch.equal(built.refiners[0].compatibility, crf.compatibility)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("iterations=2147483648", "iterations must be a whole number from 0 to 1000"),
        ("iterations=4294967297", "iterations must be"),
        ("iterations=-1", "iterations must be"),
        ("gaussian=((-3, 3),)", r"gaussian: standard deviations must be positive.*got \(-3, 3\)"),
        ("gaussian=((0, 3),)", "standard deviations must be positive"),
        ("bilateral=((40, 0.0, 3),)", "bilateral: standard deviations"),
        ("gaussian=((3, 1e16),)", r"the weight must be at most 1e\+15 in magnitude"),
        ("gaussian=((3, -1e16),)", "the weight must be"),
        ("gaussian=((3, True),)", r"must be \(sigma_xy, weight\)"),
        ("gaussian=((3, 'x'),)", r"must be \(sigma_xy, weight\)"),
        ("gaussian=(3, 3)", r"gaussian must be a sequence of kernels \(sigma_xy, weight\)"),
        ("bilateral=((1, 2),)", r"must be \(sigma_xy, sigma_rgb, weight\)"),
        (f"gaussian={((3, 3),) * 600}", "600 and 1 kernels, more than can be applied"),
        ("gaussian=((1e-300, 3),)", "standard deviations must be positive and at least 0.001"),
        ("trainable=True, num_classes=-1", "num_classes must be at least 1, got -1"),
        ("protect=2.0", "protect must be from 0 to 1"),
        ("iterations=True", "iterations must be int"),
    ],
)
def test_values_are_checked_when_it_is_built_not_at_the_first_image(options, message):
    with pytest.raises(SpecError, match=message):
        pyseg.build(f"streetnet+crf({options})", weights=None)


def test_not_a_number_is_refused_too():
    nan = float("nan")
    for options in (
        {"gaussian": ((nan, 1.0),)},
        {"gaussian": ((1.0, nan),)},
        {"protect": nan},
        {"margin": nan},
        {"iterations": 2.5},
    ):
        with pytest.raises(ValueError, match="must be"):
            CRF(**options)


def test_config_rebuilds_it():
    crf = CRF(iterations=3, gaussian=((3.0, 1.5),), bilateral=(), protect=0.9, margin=0.4)
    assert repr(CRF(**crf.config())) == repr(crf)
    crf = CRF(trainable=True, num_classes=4)
    assert CRF(**crf.config()).state_dict().keys() == crf.state_dict().keys()


@pytest.mark.parametrize("name", ["crf_deeplab_v1", "crf_deeplab_v2", "crf_pydensecrf"])
def test_presets_of_papers(name, tmp_path):
    """Ten mean-field steps of the plain CRF with the stated kernels, which saving keeps."""
    kernels = {
        "crf_deeplab_v1": {"gaussian": ((3, 3),), "bilateral": ((121, 5, 4),)},
        "crf_deeplab_v2": {"gaussian": ((1, 3),), "bilateral": ((67, 3, 4),)},
        "crf_pydensecrf": {"gaussian": ((3, 3),), "bilateral": ((80, 13, 10),)},
    }[name]
    image = torch.randint(256, (3, 24, 31), dtype=torch.uint8)
    pipeline = pyseg.build(f"streetnet+{name}", weights=None)
    plain = CRF(iterations=10, protect=0, **kernels)
    expected = plain.refine(image, pipeline.model.predict([image])[0])
    assert torch.equal(pipeline(image).logits, expected.logits)
    pipeline.save(tmp_path / "saved")
    assert torch.equal(pyseg.load(tmp_path / "saved")(image).logits, expected.logits)
    changed = pyseg.build(f"streetnet+{name}(iterations=3, bilateral=())", weights=None)
    assert changed.refiners[0].config()["iterations"] == 3
    assert changed.refiners[0].gaussian == plain.gaussian
