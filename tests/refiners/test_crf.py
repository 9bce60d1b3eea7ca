import pytest
import torch

from pyseg.refiners.crf import CRF
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
    before = (prediction.labels == target).float().mean()
    after = (refined.labels == target).float().mean()
    assert before < 0.9 and after > 0.99
    torch.testing.assert_close(refined.logits.exp().sum(0), torch.ones(40, 60))
    assert prediction.logits is not refined.logits


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
    with pytest.raises(ValueError, match="iterations must be 0 or more"):
        CRF(iterations=-1)
    with pytest.raises(ValueError, match=r"bilateral must be \(sigma_xy, sigma_rgb, weight\)"):
        CRF(bilateral=((80.0, 13.0),))
