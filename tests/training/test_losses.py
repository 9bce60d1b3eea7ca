"""Each loss against another reading of its formula, by loops or by another library."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from torch import nn
from torch.nn import functional as F

from pyseg.errors import SpecError
from pyseg.training import losses, semantic
from pyseg.training.label_spaces import LabelSpace
from pyseg.training.losses import TERMS, Loss, class_weights

VOID = 255
OPTIONS = {"ohem": "ohem(threshold=0.5,share=0.1)", "boundary": "boundary(radius=5)"}


def draw(seed, classes=4, size=(2, 9, 13), absent=(), void=0.2, scale=2.0):
    """Logits and labels, some void, some classes without a pixel."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size[0], classes, *size[1:], generator=generator) * scale
    labels = torch.randint(0, classes, size, generator=generator)
    for label in absent:
        labels[labels == label] = (label + 1) % classes
    labels[torch.rand(size, generator=generator) < void] = VOID
    return logits, labels


def by_pixel(logits, labels):
    """Probabilities [P, C] and labels [P] of the pixels that count, in double precision."""
    p = logits.double().softmax(1).permute(0, 2, 3, 1).reshape(-1, logits.shape[1]).numpy()
    flat = labels.flatten().numpy()
    return p[flat != VOID], flat[flat != VOID]


def ce_by_hand(p, y, weights):
    return sum(-weights[c] * math.log(row[c]) for row, c in zip(p, y, strict=True)) / len(y)


def focal_by_hand(p, y, weights, gamma=2.0):
    terms = (
        -weights[c] * (1 - row[c]) ** gamma * math.log(row[c]) for row, c in zip(p, y, strict=True)
    )
    return sum(terms) / len(y)


def ohem_by_hand(p, y, weights, threshold=0.5, share=0.1):
    own = np.array([row[c] for row, c in zip(p, y, strict=True)])
    last = np.sort(own)[math.ceil(share * len(own)) - 1]
    kept = [k for k in range(len(own)) if own[k] < threshold or own[k] <= last]
    return sum(-weights[y[k]] * math.log(own[k]) for k in kept) / len(kept)


def dice_by_hand(p, y, weights):
    values = []
    for c in np.unique(y):
        truth = (y == c).astype(float)
        values.append(1 - 2 * (p[:, c] * truth).sum() / (p[:, c].sum() + truth.sum()))
    return np.mean(values)


def jaccard_by_hand(p, y, weights):
    values = []
    for c in np.unique(y):
        truth = (y == c).astype(float)
        both = (p[:, c] * truth).sum()
        values.append(1 - both / (p[:, c] + truth - p[:, c] * truth).sum())
    return np.mean(values)


def lovasz_by_hand(p, y, weights):
    """Equations 8 and 11 as they stand: the set function at every prefix of the sorted errors."""
    values = []
    for c in np.unique(y):
        truth = y == c
        errors = np.where(truth, 1 - p[:, c], p[:, c])
        order = np.argsort(-errors, kind="stable")

        def jaccard_loss(wrong, truth=truth):
            """1 - IoU where the pixels ``wrong`` are misclassified."""
            mispredicted = np.zeros(len(truth), dtype=bool)
            mispredicted[wrong] = True
            predicted = truth ^ mispredicted
            union = (predicted | truth).sum()
            return 1 - (predicted & truth).sum() / union if union else 0.0

        before, total = 0.0, 0.0
        for k in range(len(order)):
            now = jaccard_loss(order[: k + 1])
            total += errors[order[k]] * (now - before)
            before = now
        values.append(total)
    return np.mean(values)


HAND = {
    "ce": ce_by_hand,
    "focal": focal_by_hand,
    "ohem": ohem_by_hand,
    "dice": dice_by_hand,
    "jaccard": jaccard_by_hand,
    "lovasz": lovasz_by_hand,
}


@pytest.mark.parametrize("absent", [(), (2,), (0, 3)])
@pytest.mark.parametrize("name", HAND)
def test_losses_are_their_formulas(name, absent):
    for seed in range(3):
        logits, labels = draw(seed, absent=absent)
        weights = torch.rand(4, generator=torch.Generator().manual_seed(seed)) + 0.5
        ours = Loss.parse(OPTIONS.get(name, name))(logits, labels, weights)
        expected = HAND[name](*by_pixel(logits, labels), weights.tolist())
        assert ours.dtype == torch.float32 and ours.item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("absent", [(), (1,)])
def test_boundary_loss_is_kervadecs_with_scipys_distances(absent):
    for seed, radius in ((0, 3), (1, 6), (2, 50)):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randint(0, 3, (2, 1, 4, 5), generator=generator).float()
        labels = F.interpolate(coarse, (21, 27), mode="nearest")[:, 0].long()
        for label in absent:
            labels[labels == label] = 0
        labels[:, 9] = VOID
        logits = torch.randn(2, 3, 21, 27, generator=generator)
        p = logits.double().softmax(1).numpy()
        total, count = 0.0, 0
        for n in range(2):
            for c in range(3):
                inside = (labels[n] == c).numpy()
                phi = np.full(inside.shape, float(radius + 1))
                if inside.any():
                    phi = np.maximum(distance_transform_edt(~inside) - 0.5, 0)
                    phi -= np.maximum(distance_transform_edt(inside) - 0.5, 0)
                phi = (phi / radius).clip(-1, 1)
                total += ((p[n, c] - inside) * phi * (labels[n] != VOID).numpy()).sum()
            count += int((labels[n] != VOID).sum())
        ours = Loss.parse(f"boundary(radius={radius})")(logits, labels, torch.ones(3))
        assert ours.item() == pytest.approx(total / count, rel=1e-5)
        certain = F.one_hot(torch.where(labels == VOID, 0, labels), 3).permute(0, 3, 1, 2) * 200.0
        sure = Loss.parse(f"boundary(radius={radius})")(certain, labels, torch.ones(3))
        assert abs(sure.item()) < 1e-6


def test_losses_equal_those_of_segmentation_models_pytorch():
    smp = pytest.importorskip("segmentation_models_pytorch").losses
    for seed in range(4):
        logits, labels = draw(seed, absent=(2,) if seed % 2 else ())
        ones = torch.ones(4)
        theirs = smp.LovaszLoss("multiclass", ignore_index=VOID)(logits, labels)
        torch.testing.assert_close(Loss.parse("lovasz")(logits, labels, ones), theirs)
        # Theirs is a mean over all classes, to which absent ones add nothing.
        share = len(labels[labels != VOID].unique()) / 4
        theirs = smp.DiceLoss("multiclass", ignore_index=VOID)(logits, labels)
        torch.testing.assert_close(Loss.parse("dice")(logits, labels, ones) * share, theirs)
        # Theirs takes void pixels for such as have the probability p, but no label.
        _, whole = draw(seed, void=0)
        theirs = smp.JaccardLoss("multiclass")(logits, whole)
        torch.testing.assert_close(Loss.parse("jaccard")(logits, whole, ones), theirs)


def test_focal_loss_of_two_classes_is_torchvisions():
    from torchvision.ops import sigmoid_focal_loss

    logits, labels = draw(5, classes=2, void=0)
    theirs = sigmoid_focal_loss(logits[:, 1] - logits[:, 0], labels.float(), -1, 1.5, "mean")
    ours = Loss.parse("focal(gamma=1.5)")(logits, labels, torch.ones(2))
    torch.testing.assert_close(ours, theirs)
    plain = F.cross_entropy(logits, labels)
    torch.testing.assert_close(Loss.parse("focal(gamma=0)")(logits, labels, torch.ones(2)), plain)


def test_ohem_at_its_limits():
    logits, labels = draw(6)
    ones = torch.ones(4)
    every = Loss.parse("ohem(threshold=1,share=1)")(logits, labels, ones)
    torch.testing.assert_close(every, F.cross_entropy(logits, labels, ignore_index=VOID))
    hardest = Loss.parse("ohem(threshold=0,share=1e-9)")(logits, labels, ones)
    largest = F.cross_entropy(logits, labels, ignore_index=VOID, reduction="none").max()
    torch.testing.assert_close(hardest, largest)
    assert Loss.parse("ohem(threshold=0,share=0)")(logits, labels, ones) == 0


@pytest.mark.parametrize("name", TERMS)
def test_void_pixels_count_for_nothing(name):
    logits, labels = draw(7, size=(2, 16, 12))
    loss = Loss.parse(OPTIONS.get(name, name))
    weights = torch.tensor([1.0, 0.5, 2.0, 1.5])
    first = logits.clone().requires_grad_()
    value = loss(first, labels, weights)
    value.backward()
    void = (labels == VOID)[:, None].expand_as(first)
    assert not first.grad[void].any() and first.grad[~void].any() and first.grad.isfinite().all()
    other = torch.where(void, torch.randn_like(logits) * 30, logits)
    torch.testing.assert_close(loss(other, labels, weights), value.detach(), rtol=1e-5, atol=1e-6)
    empty = logits.clone().requires_grad_()
    nothing = loss(empty, torch.full_like(labels, VOID), weights)
    nothing.backward()
    assert nothing == 0 and not empty.grad.any()


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_the_loss_of_their_values(name, dtype):
    logits, labels = draw(8, scale=8.0)
    loss = Loss.parse(OPTIONS.get(name, name))
    half = logits.to(dtype).requires_grad_()
    value = loss(half, labels, torch.ones(4))
    value.backward()
    assert value.dtype == torch.float32 and half.grad.dtype == dtype
    assert half.grad.isfinite().all()
    torch.testing.assert_close(value, loss(half.detach().float(), labels, torch.ones(4)))


@pytest.mark.parametrize("name", TERMS)
def test_extreme_logits_have_finite_gradients_and_a_step_downhill_helps(name):
    loss = Loss.parse(OPTIONS.get(name, name))
    for scale in (1.0, 80.0):
        logits, labels = draw(9, scale=scale)
        logits.requires_grad_()
        value = loss(logits, labels, torch.ones(4))
        value.backward()
        assert value.isfinite() and value >= 0 and logits.grad.isfinite().all()
        if scale == 1:
            after = loss(logits.detach() - 0.5 * logits.grad, labels, torch.ones(4))
            assert after < value
    one = loss(torch.randn(1, 4, 1, 1), torch.tensor([[[2]]]), torch.ones(4))
    assert one.isfinite()


@pytest.mark.parametrize("name", TERMS)
def test_gradients_are_those_of_the_values(name):
    logits, labels = draw(10, size=(1, 4, 5), void=0.1)
    labels[0, 0, 0] = 1
    log_p = logits.double().log_softmax(1).requires_grad_()
    options = dict(Loss.parse(OPTIONS.get(name, name)).terms[0][1].options)
    weights = torch.ones(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: TERMS[name](x.log_softmax(1), labels, weights, **options), (log_p,)
    )


def test_lovasz_of_many_pixels_keeps_its_precision():
    """The gradient's weights are differences of numbers near 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 1000, 1500, generator=generator)
    labels = (torch.rand(1, 1000, 1500, generator=generator) < 0.9).long()
    log_p = logits.log_softmax(1)
    single = losses.lovasz(log_p, labels, torch.ones(2))
    double = losses.lovasz(log_p.double(), labels, torch.ones(2).double())
    assert single.item() == pytest.approx(double.item(), rel=1e-5)


def test_soft_jaccard_of_certain_predictions_is_one_minus_miou():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 4, (2, 9, 11), generator=generator)
    target = torch.randint(0, 4, (2, 9, 11), generator=generator)
    target[target == 2] = 0  # class 2 is predicted, but not there
    target[0, :3] = VOID
    log_p = nn.functional.one_hot(prediction, 4).permute(0, 3, 1, 2).float().log()
    ious = []
    for label in (0, 1, 3):
        a = ((prediction == label) & (target != VOID)).numpy()
        b = (target == label).numpy()
        ious.append((a & b).sum() / (a | b).sum())
    loss = losses.jaccard(log_p, target, torch.ones(4))
    assert loss.item() == pytest.approx(1 - np.mean(ious), abs=1e-6)


def test_sums_of_losses():
    logits, labels = draw(11)
    weights = torch.tensor([1.0, 2.0, 3.0, 0.5])
    loss = Loss.parse(" ce + 0.5*lovasz + 2*focal(gamma=1) ")
    assert str(loss) == "ce+0.5*lovasz+2.0*focal(gamma=1)" and Loss.parse(str(loss)) == loss
    parts = [
        Loss.parse(text)(logits, labels, weights) for text in ("ce", "lovasz", "focal(gamma=1)")
    ]
    expected = parts[0] + 0.5 * parts[1] + 2 * parts[2]
    torch.testing.assert_close(loss(logits, labels, weights), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not parse"),
        ("ce-dice", "does not parse"),
        ("ce+", "does not parse"),
        ("dice*2", "does not parse"),
        ("ce(1)", "does not parse"),
        ("ce+lovas", "there is no loss 'lovas'; did you mean lovasz"),
        ("ce(gamma=1)", "ce has no option 'gamma'; it has none"),
        ("focal(alpha=1)", "its options are gamma"),
        ("focal(gamma='a')", "gamma must be a number"),
        ("focal(gamma=-1)", "gamma must be 0 or more"),
        ("ohem(share=2)", "share must be in 0..1"),
        ("ohem(threshold=2)", "threshold is a probability"),
        ("boundary(radius=0)", "radius must be pixels"),
        ("0*ce", "factors must be positive"),
        ("ce+2*ce", "has ce twice"),
        ("(" * 500 + "ce" + ")" * 500, "does not parse"),
    ],
)
def test_texts_that_are_no_loss(text, message):
    with pytest.raises(SpecError, match=message):
        Loss.parse(text)


def test_loss_of_a_step_equals_torch_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    outputs = {
        "out": torch.randn(2, 3, 6, 8, generator=generator),
        "aux8": torch.randn(2, 3, 3, 4, generator=generator),
    }
    labels = torch.randint(0, 3, (2, 12, 16), generator=generator).to(torch.uint8)
    labels[:, 0] = VOID
    space = [LabelSpace.of("abc", "abc")]
    of = torch.zeros(2, dtype=torch.int64)
    loss = semantic._loss(outputs, labels, of, Loss.parse("ce"), space, [torch.ones(3)], 0.4)
    upsample = nn.Upsample((12, 16), mode="bilinear")
    expected = F.cross_entropy(
        upsample(outputs["out"]), labels.long(), ignore_index=VOID
    ) + 0.4 * F.cross_entropy(outputs["aux8"], labels[:, 2::4, 2::4].long(), ignore_index=VOID)
    torch.testing.assert_close(loss, expected)


def test_class_weights():
    counts = torch.tensor([100, 10000, 0])
    weights = class_weights(counts, counts, 0.5)
    assert weights[0] / weights[1] == pytest.approx(10)
    assert (100 * weights[0] + 10000 * weights[1]) / 10100 == pytest.approx(1)
    assert weights[2] == 1
    assert class_weights(torch.tensor([5, 50]), torch.tensor([55, 55]), 0).tolist() == [1, 1]


def test_median_frequency_balancing_is_eigen_and_fergus():
    """Frequency of a class: its pixels over those of the images where it is present."""
    generator = torch.Generator().manual_seed(3)
    maps = [torch.randint(0, 5, (8, 9), generator=generator) for _ in range(4)]
    maps[0][maps[0] == 1] = 0
    maps[1][maps[1] > 2] = 2
    maps[3][:2] = VOID
    frequencies = {}
    for c in range(5):
        showing = [m for m in maps if (m == c).any()]
        pixels = sum(int((m == c).sum()) for m in showing)
        frequencies[c] = pixels / sum(int((m != VOID).sum()) for m in showing)
    expected = [np.median(list(frequencies.values())) / frequencies[c] for c in range(5)]

    class Maps:
        classes, palette = tuple("abcdef"), ((0, 0, 0),) * 6

        def __len__(self):
            return len(maps)

        def __getitem__(self, index):
            from pyseg.types import Sample

            image = torch.zeros(3, 8, 9, dtype=torch.uint8)
            return Sample(f"{index}", image, maps[index].to(torch.uint8))

    counts, among, size = semantic._class_pixels_and_largest_size(Maps(), 6, show=False)
    weights = class_weights(counts, among, "median")
    assert weights[:5].tolist() == pytest.approx(expected, rel=1e-6)
    assert weights[5] == 1 and size == (8, 9)
