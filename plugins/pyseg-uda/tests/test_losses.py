"""Every loss against its equation, written out in NumPy pixel by pixel."""

import math

import numpy as np
import pytest
import torch
from pyseg_uda.losses import (
    Attention,
    attention_consistency,
    cross_entropy,
    feature_distance,
    mixed_attention,
    pseudo_labels,
    thing_mask,
)
from torch.nn import functional as F

from pyseg.types import VOID


def softmax(values):
    shifted = np.exp(values - values.max(0))
    return shifted / shifted.sum(0)


def test_pseudo_labels_count_by_the_share_of_certain_pixels():
    torch.manual_seed(0)
    logits = 4 * torch.randn(2, 3, 5, 7)
    valid = torch.rand(2, 5, 7) < 0.8
    labels, weights, share = pseudo_labels(logits, valid, threshold=0.9, trusted=(1, 2))
    certain = total = 0
    for n in range(2):
        for y in range(5):
            for x in range(7):
                p = softmax(logits[n, :, y, x].double().numpy())
                if valid[n, y, x]:
                    total += 1
                    certain += p.max() >= 0.9
                    assert labels[n, y, x] == p.argmax()
                else:
                    assert labels[n, y, x] == VOID
    assert share.item() == pytest.approx(certain / total) and 0 < certain < total
    rows = torch.tensor([False, True, True, False, False]).view(1, 5, 1)
    assert torch.equal(weights, torch.where(valid & rows, share, 0.0))


def test_pseudo_labels_are_at_the_size_of_the_images():
    logits = torch.randn(1, 3, 4, 6)
    valid = torch.ones(1, 15, 23, dtype=torch.bool)
    labels, weights, _ = pseudo_labels(logits, valid)
    large = F.interpolate(logits, (15, 23), mode="bilinear", align_corners=False)
    assert torch.equal(labels, large.argmax(1).to(torch.uint8)) and weights.shape == (1, 15, 23)


def test_pseudo_labels_of_no_image_weigh_nothing():
    labels, weights, share = pseudo_labels(
        torch.randn(1, 3, 4, 6), torch.zeros(1, 4, 6, dtype=torch.bool)
    )
    assert (labels == VOID).all() and not weights.any() and share == 0


def test_cross_entropy_is_a_weighted_mean_over_labelled_pixels():
    torch.manual_seed(0)
    logits, weights = torch.randn(2, 3, 4, 5), torch.rand(2, 4, 5)
    labels = torch.randint(0, 3, (2, 4, 5)).to(torch.uint8)
    labels[0, 0] = labels[1, :, 2] = VOID
    total = count = 0
    for place in np.ndindex(2, 4, 5):
        if labels[place] != VOID:
            n, y, x = place
            p = softmax(logits[n, :, y, x].double().numpy())
            total -= weights[place].item() * math.log(p[labels[place]])
            count += 1
    assert cross_entropy(logits, labels, weights).item() == pytest.approx(total / count, rel=1e-5)
    plain = F.cross_entropy(logits, labels.long(), ignore_index=VOID)
    assert cross_entropy(logits, labels).item() == pytest.approx(plain.item(), rel=1e-5)
    void = torch.full_like(labels, VOID)
    logits.requires_grad_()
    empty = cross_entropy(logits, void)
    empty.backward()
    assert empty == 0 and not logits.grad.any()


@pytest.mark.parametrize("size", [(3, 4), (5, 3)])
def test_cells_of_things(size):
    """Cells whose pixels are three quarters things, void being none; sides need not divide."""
    torch.manual_seed(0)
    coarse = torch.randint(0, 4, (2, 3, 4))
    labels = coarse.repeat_interleave(4, 1).repeat_interleave(5, 2)
    noise = torch.rand(labels.shape)
    labels[noise < 0.2] = 1
    labels[noise > 0.9] = VOID
    mask = thing_mask(labels.to(torch.uint8), size, (1, 3))
    height, width = labels.shape[1:]
    for n, y, x in np.ndindex(2, *size):
        rows = slice(y * height // size[0], -(-(y + 1) * height // size[0]))
        columns = slice(x * width // size[1], -(-(x + 1) * width // size[1]))
        cell = labels[n, rows, columns]
        shares = [(cell == c).double().mean().item() for c in (1, 3)]
        assert mask[n, y, x] == (max(shares) >= 0.75)
    assert mask.any() and not mask.all()


def test_feature_distance_is_the_mean_norm_over_the_mask():
    torch.manual_seed(0)
    features = torch.randn(2, 6, 3, 4, requires_grad=True)
    fixed, mask = torch.randn(2, 6, 3, 4), torch.rand(2, 3, 4) < 0.5
    norms = [
        np.linalg.norm((features[n, :, y, x] - fixed[n, :, y, x]).detach().double().numpy())
        for n, y, x in np.ndindex(2, 3, 4)
        if mask[n, y, x]
    ]
    found = feature_distance(features, fixed, mask)
    assert found.item() == pytest.approx(np.mean(norms), rel=1e-5)
    found.backward()
    unit = (features - fixed) / (features - fixed).norm(dim=1, keepdim=True) / mask.sum()
    assert torch.allclose(features.grad, torch.where(mask[:, None], unit, 0.0), atol=1e-6)


@pytest.mark.parametrize("same", [False, True])
def test_feature_distance_of_nothing_and_of_equals_is_0_with_gradients_of_0(same):
    features = torch.randn(1, 6, 3, 4, requires_grad=True)
    fixed = features.detach().clone() if same else torch.randn(1, 6, 3, 4)
    found = feature_distance(features, fixed, torch.full((1, 3, 4), same))
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-3) and not features.grad.any()


def attention(seed, shape=(2, 2, 12, 6), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape, generator=generator, dtype=torch.float64).softmax(3)
    return Attention(weights.to(dtype), (3, 4), (2, 3))


def test_mixed_attention_takes_rows():
    source, target = attention(0).weights, attention(1).weights
    ones = torch.ones(2, 12, dtype=torch.bool)
    assert torch.equal(mixed_attention(ones, source, target), source)
    assert torch.equal(mixed_attention(~ones, source, target), target)
    ones[:, 5] = False
    found = mixed_attention(ones, source, target)
    assert torch.equal(found[:, :, 5], target[:, :, 5])
    assert torch.equal(found[:, :, 6], source[:, :, 6])


def test_attention_consistency_is_the_weighted_divergence():
    source, target, mixed = ([attention(k), attention(k + 3)] for k in range(3))
    mask = torch.rand(2, 12, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    blocks = []
    for own, other, found in zip(source, target, mixed, strict=True):
        total = 0.0
        for n, h, i, j in np.ndindex(2, 2, 12, 6):
            # nearest: the pixel at floor(index * side / cells)
            query = mask[n, i // 4 * 12 // 3, i % 4 * 16 // 4]
            key = mask[n, j // 3 * 12 // 2, j % 3 * 16 // 3]
            if query == key:
                wanted = (own if query else other).weights[n, h, i, j].item()
                total += wanted * math.log(wanted / found.weights[n, h, i, j].item())
        blocks.append(total / (2 * 2 * 12 * 6))
    loss = attention_consistency(source, target, mixed, mask)
    assert loss.item() == pytest.approx(np.mean(blocks), rel=1e-4)


def test_attention_consistency_of_equals_is_0_and_never_infinite():
    source = [attention(0)]
    mask = torch.ones(2, 12, 16, dtype=torch.bool)
    assert attention_consistency(source, [attention(1)], source, mask) == 0
    assert attention_consistency([attention(1)], source, source, ~mask) == 0
    weights = torch.zeros(2, 2, 12, 6)
    weights[..., 0] = 1
    hard = [Attention(weights.flip(3).requires_grad_(), (3, 4), (2, 3))]
    loss = attention_consistency([Attention(weights, (3, 4), (2, 3))], source, hard, mask)
    loss.backward()
    assert loss.isfinite() and loss > 1 and hard[0].weights.grad.isfinite().all()


def test_attention_consistency_has_the_gradients_of_its_values():
    mask = torch.rand(1, 12, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    shape = (1, 2, 12, 6)
    own, other = attention(0, shape, torch.float64), attention(1, shape, torch.float64)
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def loss(logits):
        mixed = Attention(logits.softmax(3), (3, 4), (2, 3))
        return attention_consistency([own], [other], [mixed], mask)

    # values are float32 within: steps and tolerances as wide as that takes
    assert torch.autograd.gradcheck(loss, logits, eps=1e-2, atol=1e-4, rtol=5e-2)
