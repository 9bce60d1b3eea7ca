"""confusion_matrix against a brute-force count in NumPy."""

import os

import numpy as np
import pytest
import torch

from pyseg.ops import confusion_counts, confusion_matrix
from pyseg.ops.confusion_matrix import INTEGERS, reference


@pytest.fixture
def rng():
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")  # shown where the test fails
    return np.random.default_rng(seed)


def brute_force(prediction, target, classes, ignore):
    """Matrix, missed and invalid, one pixel at a time in plain integers."""
    images = len(target)
    matrix = np.zeros((images, classes, classes), np.int64)
    missed = np.zeros((images, classes), np.int64)
    invalid = np.zeros((images, 2), np.int64)
    for n in range(images):
        pixels = zip(prediction[n].ravel().tolist(), target[n].ravel().tolist(), strict=True)
        for p, t in pixels:
            if t == ignore:
                continue
            if not 0 <= t < classes:
                invalid[n, 1] += 1
            elif p == ignore:
                missed[n, t] += 1
            elif not 0 <= p < classes:
                invalid[n, 0] += 1
            else:
                matrix[n, t, p] += 1
    return matrix, missed, invalid


def random_labels(rng, shape, classes, ignore, dtype):
    """Labels with runs, single pixels and void, as maps have them."""
    info = torch.iinfo(dtype)
    values = np.arange(min(classes, info.max + 1))
    if info.min <= ignore <= info.max:
        values = np.append(values, ignore)
    flat = rng.choice(values, int(np.prod(shape)))
    flat = np.repeat(flat, rng.integers(1, 90, flat.size))[: flat.size]
    noisy = rng.random(flat.size) < 0.1
    flat[noisy] = rng.choice(values, noisy.sum())
    return torch.from_numpy(flat.reshape(shape)).to(dtype)


def assert_same(counts, expected):
    for name, got, want in zip(("matrix", "missed", "invalid"), counts, expected, strict=True):
        np.testing.assert_array_equal(got.cpu().numpy(), want, err_msg=name)


CASES = [  # shape, classes, ignore_index
    ((1, 1, 1), 1, 255),
    ((2, 37, 53), 19, 255),
    ((3, 1, 31), 2, -1),
    ((1, 129, 33), 19, 7),  # ignore_index is one of the classes
    ((2, 40, 41), 62, 0),  # (62 + 2)^2: the largest table with several copies
    ((2, 40, 41), 63, 0),
    ((1, 64, 65), 100, -100),
    ((1, 30, 2049), 5, 255),
]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("shape, classes, ignore", CASES)
@pytest.mark.parametrize("level", ["v4", "v3", "generic"])
def test_against_brute_force(rng, shape, classes, ignore, dtype, level, monkeypatch):
    monkeypatch.setenv("PYSEG_SIMD", level)
    prediction = random_labels(rng, shape, classes, ignore, dtype)
    target = random_labels(rng, shape, classes, ignore, dtype)
    counts = confusion_counts(prediction, target, classes, ignore)
    assert_same(counts, brute_force(prediction.numpy(), target.numpy(), classes, ignore))
    assert torch.equal(confusion_matrix(prediction, target, classes, ignore), counts.matrix)


@pytest.mark.parametrize("classes", [253, 254, 255, 256, 257, 1000])
def test_many_classes(rng, classes):  # 254 is the last whose codes have 16 bits
    for dtype in (torch.int16, torch.int32, torch.int64):
        prediction = random_labels(rng, (2, 61, 67), classes, -1, dtype)
        target = random_labels(rng, (2, 61, 67), classes, -1, dtype)
        assert_same(
            confusion_counts(prediction, target, classes, -1),
            brute_force(prediction.numpy(), target.numpy(), classes, -1),
        )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64], ids=str)
@pytest.mark.parametrize("classes", [200, 255, 256, 300])
def test_more_classes_than_the_dtype_holds(rng, classes, dtype):
    prediction = random_labels(rng, (1, 50, 51), classes, 255, dtype)
    target = random_labels(rng, (1, 50, 51), classes, 255, dtype)
    assert_same(
        confusion_counts(prediction, target, classes, 255),
        brute_force(prediction.numpy(), target.numpy(), classes, 255),
    )


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_small_kernel_against_brute_force(device, rng, dtype):
    """The CUDA kernel, which counts labels out of range where the CPU raises."""
    info = torch.iinfo(dtype)
    for shape, classes, ignore in [
        ((2, 37, 53), 19, 255),
        ((1, 65, 64), 110, -1),
        ((1, 3, 1), 1, 0),
    ]:
        labels = rng.integers(max(info.min, -3), min(info.max, classes + 5), (2, *shape))
        labels[:, :, : shape[1] // 2] = labels[:, :, :1, :1] % classes  # a flat part
        prediction, target = torch.from_numpy(labels).to(dtype)
        counts = device.ops.confusion_matrix(
            prediction.to(device.name), target.to(device.name), classes, ignore
        )
        assert_same(counts, brute_force(prediction.numpy(), target.numpy(), classes, ignore))


def test_kernel_of_empty_input(device):
    empty = torch.zeros(2, 0, 4, dtype=torch.int32, device=device.name)
    for counts, size in zip(
        device.ops.confusion_matrix(empty, empty, 3, 255), (18, 6, 4), strict=True
    ):
        assert counts.numel() == size and not counts.any()


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty(shape):
    empty = torch.zeros(shape, dtype=torch.uint8)
    counts = confusion_counts(empty, empty, 3)
    assert [list(c.shape) for c in counts] == [[shape[0], 3, 3], [shape[0], 3], [shape[0], 2]]
    assert not any(c.any() for c in counts)


def test_non_contiguous_and_mixed_dtypes(rng):
    labels = torch.from_numpy(rng.integers(0, 6, (2, 3, 40, 62)))
    prediction = labels[0].to(torch.uint8).transpose(1, 2)[:, ::2]
    target = labels[1].permute(0, 2, 1)[:, ::2]
    assert not prediction.is_contiguous() and not target.is_contiguous()
    assert_same(
        confusion_counts(prediction, target, 6),
        brute_force(prediction.numpy(), target.numpy(), 6, 255),
    )
    shared = labels[0, :1].expand(4, -1, -1)  # stride 0
    assert torch.equal(
        confusion_matrix(shared, shared, 6)[3], confusion_matrix(shared, shared, 6)[0]
    )


def test_threads_do_not_change_the_counts(rng):
    labels = torch.from_numpy(rng.integers(0, 20, (2, 3, 300, 331)).astype(np.uint8))
    labels[labels == 19] = 255
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(confusion_counts(labels[0], labels[1], 19))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    kept = torch.where(labels[0] == 255, 0, labels[0])  # the reference has no `missed`
    assert torch.equal(confusion_matrix(kept, labels[1], 19), reference(kept, labels[1], 19))


def labels_with(value, dtype=torch.int64):
    labels = torch.zeros(2, 4, 6, dtype=dtype)
    labels[1, 2, 3] = value
    return labels


@pytest.mark.parametrize(
    "value, classes, ignore, cause",
    [
        (255, 19, -1, "pass ignore_index=255"),
        (255, 2, -1, "divide them by 255"),
        (2, 2, 255, "1-based"),
        (33, 19, 255, "labelTrainIds"),
        (-7, 5, 255, "negative labels are only allowed as ignore_index"),
        (77, 5, 255, "colour image read as labels"),
    ],
)
def test_labels_out_of_range(value, classes, ignore, cause):
    bad, good = labels_with(value), torch.zeros(2, 4, 6, dtype=torch.int64)
    where = rf"{value} \(1 pixels, the first at image 1, row 2, column 3\); likely cause: .*{cause}"
    with pytest.raises(ValueError, match=rf"target holds labels outside \[0, {classes}\).*{where}"):
        confusion_matrix(good, bad, classes, ignore)
    with pytest.raises(ValueError, match=rf"prediction holds labels .*{where}"):
        confusion_matrix(bad, good, classes, ignore)


def test_bad_prediction_under_void_is_no_error():
    counts = confusion_counts(labels_with(77), labels_with(255), 5)
    assert counts.matrix.sum() == 2 * 4 * 6 - 1 and not counts.missed.any()


def test_message_lists_few_values():
    target = torch.arange(100, 148, dtype=torch.uint8).view(1, 6, 8)
    with pytest.raises(ValueError, match=r": 100, 101, 102, 103, 104, \.\.\. \(48 pixels"):
        confusion_matrix(torch.zeros_like(target), target, 5)


LABELS = torch.zeros(1, 2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    "prediction, target, classes, message",
    [
        (LABELS.float(), LABELS, 2, r"prediction .*got torch.float32.*argmax"),
        (LABELS, LABELS.bool(), 2, r"target .*got torch.bool"),
        (LABELS[0], LABELS[0], 2, r"\[N, H, W\], got \[2, 2\]"),
        (LABELS, LABELS[:, 1:], 2, r"\[1, 2, 2\] and \[1, 1, 2\]"),
        (LABELS, LABELS, 0, "num_classes must be 1 to 4096, got 0"),
        (LABELS, LABELS, 4097, "num_classes must be 1 to 4096, got 4097"),
        (LABELS, LABELS.to("meta"), 2, "move one of them"),
    ],
)
def test_bad_arguments(prediction, target, classes, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(prediction, target, classes)


def test_4096_classes():
    labels = torch.tensor([[[0, 4095], [17, 255]]])
    counts = confusion_counts(labels, labels, 4096)
    assert counts.matrix.sum() == 3 and counts.matrix[0, 4095, 4095] == 1


def test_opcheck(rng):
    labels = torch.from_numpy(rng.integers(0, 4, (2, 2, 9, 11)))
    torch.library.opcheck(torch.ops.pyseg.confusion_matrix.default, (labels[0], labels[1], 4, 255))


def test_compile(compiler, rng):
    labels = torch.from_numpy(rng.integers(0, 4, (2, 2, 9, 11)))
    compiled = compiler(confusion_matrix)
    expected = confusion_matrix(labels[0], labels[1], 4)
    assert torch.equal(compiled(labels[0], labels[1], 4), expected)
