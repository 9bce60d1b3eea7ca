"""upsample_argmax against interpolate and argmax, and against a slow restatement in NumPy."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from pyseg.ops import upsample_argmax
from pyseg.ops.upsample_argmax import FLOATS, reference


def assert_same_labels(labels, logits, size):
    """Equal to torch's labels, but where torch's values of the two classes are as good as equal."""
    assert labels.shape == (logits.shape[0], *size)
    assert labels.dtype == (torch.uint8 if logits.shape[1] <= 255 else torch.int16)
    wide = logits.double().cpu()
    values = interpolate(wide, size, mode="bilinear", align_corners=False)
    labels = labels.cpu().long()
    lost = values.amax(1) - values.gather(1, labels[:, None])[:, 0]
    # float32 also rounds the positions, which matters along a row of many pixels
    eps = 1e-5 if logits.dtype != torch.float64 else 1e-13
    assert lost.max() <= eps * wide.abs().max(), "a class was chosen that is not the best"
    if logits.dtype in (torch.float32, torch.float64):  # few halves are different: ties are common
        near_ties = (labels != values.argmax(1)).sum()
        assert near_ties <= 1 + 1e-4 * labels.numel(), f"{near_ties} of {labels.numel()} differ"


def layouts(logits):
    """The same logits in several layouts."""
    yield logits
    yield logits.to(memory_format=torch.channels_last)
    padded = torch.full((*logits.shape[:3], logits.shape[3] * 2), torch.nan, dtype=logits.dtype)
    padded[..., ::2] = logits
    yield padded[..., ::2]
    yield logits.transpose(2, 3).contiguous().transpose(2, 3)


SIZES = [  # logits, output
    ((2, 19, 16, 32), (128, 256)),  # a whole factor
    ((1, 5, 7, 9), (50, 31)),  # up, odd
    ((1, 5, 33, 47), (20, 17)),  # down
    ((1, 4, 40, 90), (3, 2)),  # far down: columns further apart than a vector
    ((1, 4, 20, 30), (90, 13)),  # up and down
    ((1, 7, 12, 130), (13, 131)),  # almost identity
    ((1, 3, 40, 3), (41, 200)),
    ((3, 7, 1, 1), (5, 6)),
    ((1, 7, 9, 1), (4, 70)),
    ((2, 1, 5, 5), (9, 9)),  # one class
    ((1, 2, 3, 4), (100, 1)),
    ((1, 21, 2, 3), (130, 99)),  # a large factor
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape, size", SIZES)
def test_against_interpolate(generator, shape, size, dtype):
    for smooth in (False, True):
        logits = torch.randn(shape, generator=generator)
        if smooth:  # then whole tiles have one best class
            coarse = torch.randn(*shape[:2], 2, 2, generator=generator)
            logits = interpolate(coarse, shape[2:], mode="bilinear") * 9 + logits * 0.1
        for layout in layouts(logits.to(dtype)):
            labels = upsample_argmax(layout, size)
            assert_same_labels(labels, layout, size)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape, size", SIZES)
def test_small_kernel_against_interpolate(device, generator, shape, size, dtype):
    for layout in list(layouts(torch.randn(shape, generator=generator).to(dtype)))[::2]:
        labels = device.ops.upsample_argmax(layout.to(device.name), *size)
        assert_same_labels(labels, layout, size)


@pytest.mark.parametrize("classes", [255, 256, 1000, 32767])
def test_many_classes(device, generator, classes):
    logits = torch.randn(1, classes, 2, 3, generator=generator)
    for labels in (
        upsample_argmax(logits, (5, 40)),
        device.ops.upsample_argmax(logits.to(device.name), 5, 40),
    ):
        assert_same_labels(labels, logits, (5, 40))


def brute_force(logits, size):
    """Values, one pixel at a time, in float64: corners of weight zero do not count."""
    n, c, h, w = logits.shape
    values = np.zeros((n, c, *size))

    def neighbours(output, outputs, inputs):
        source = max((output + 0.5) * inputs / outputs - 0.5, 0.0)
        low = min(int(source), inputs - 1)
        t = source - low if low + 1 < inputs else 0.0
        return [(low, 1 - t), (min(low + 1, inputs - 1), t)]

    for y in range(size[0]):
        for x in range(size[1]):
            for i, wy in neighbours(y, size[0], h):
                for j, wx in neighbours(x, size[1], w):
                    if wy * wx > 0:
                        values[:, :, y, x] += wy * wx * logits[:, :, i, j]
    return values


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(12, 24), (6, 8), (3, 4), (7, 5), (2, 3)])
def test_infinities_and_nan(device, generator, size, dtype):
    lowest = torch.finfo(torch.float32).min  # a common mask value: differences of it overflow
    for special in (np.nan, np.inf, -np.inf, lowest, -lowest):
        logits = torch.randn(2, 5, 3, 4, generator=generator, dtype=dtype)
        logits[torch.rand(logits.shape, generator=generator) < 0.1] = special
        logits[:, 3] = special if special != -lowest else 0.0
        values = brute_force(logits.double().numpy(), size)
        expected = values.argmax(1)  # NumPy too takes the first, and NaN above all
        for labels in (
            upsample_argmax(logits, size),
            device.ops.upsample_argmax(logits.to(device.name), *size),
        ):
            got = labels.cpu().numpy().astype(np.int64)
            value = np.take_along_axis(values, got[:, None], 1)[:, 0]
            # Two classes with the same huge corners are a tie, but for rounding.
            tie = np.isfinite(value) & (value >= values.max(1) - 1e-6 * np.abs(value))
            assert ((got == expected) | tie).all(), special


def test_nan_as_in_torch(generator):
    logits = torch.randn(1, 6, 4, 5, generator=generator)
    logits[0, 4, 1, 2] = logits[0, 2, 3, 3] = logits[0, 5, 1, 2] = torch.nan
    size = (16, 20)
    expected = reference(logits, size)
    # Exactly on a pixel of the logits torch lets a NaN neighbour of weight zero win; here it loses.
    differ = upsample_argmax(logits, size).long() != expected
    assert not differ[:, 2:14, 2:18].any()
    assert expected[0, 5, 9] == 4  # NaN is among what was compared


def test_the_first_of_equal_classes_wins(device, generator):
    plane = torch.randn(1, 1, 9, 11, generator=generator)
    logits = torch.cat([plane - 1, plane, plane, plane], 1)
    for labels in (
        upsample_argmax(logits, (60, 70)),
        device.ops.upsample_argmax(logits.to(device.name), 60, 70),
    ):
        assert (labels == 1).all()
    assert (upsample_argmax(torch.zeros(1, 300, 3, 3), (9, 9)) == 0).all()


def test_identity_is_argmax(device, generator):
    logits = torch.randn(2, 19, 31, 45, generator=generator)
    assert torch.equal(upsample_argmax(logits, (31, 45)).long(), logits.argmax(1))
    labels = device.ops.upsample_argmax(logits.to(device.name), 31, 45)
    assert torch.equal(labels.cpu().long(), logits.argmax(1))


def test_threads_do_not_change_the_labels(generator):
    logits = torch.randn(2, 19, 30, 60, generator=generator)
    logits[1, 2, 10, 3] = torch.nan
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(upsample_argmax(logits, (240, 480)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_empty_batch(device):
    empty = torch.zeros(0, 3, 4, 5)
    assert upsample_argmax(empty, (8, 9)).shape == (0, 8, 9)
    assert device.ops.upsample_argmax(empty.to(device.name), 8, 9).shape == (0, 8, 9)


@pytest.mark.parametrize(
    "logits, size, message",
    [
        (torch.zeros(3, 4, 5), (8, 8), r"logits must be \[N, C, h, w\].*got \[3, 4, 5\]"),
        (torch.zeros(1, 0, 4, 5), (8, 8), r"logits .*got \[1, 0, 4, 5\]"),
        (torch.zeros(1, 3, 0, 5), (8, 8), r"logits .*got \[1, 3, 0, 5\]"),
        (torch.zeros(1, 3, 4, 5).long(), (8, 8), r"logits .*got torch.int64; use logits.float"),
        (torch.zeros(1, 32768, 1, 1), (8, 8), "at most 32767 classes .*got 32768"),
        (torch.zeros(1, 3, 4, 5), (8,), r"size must be \(height, width\).*got \(8,\)"),
        (torch.zeros(1, 3, 4, 5), (0, 8), r"size .*got \(0, 8\)"),
    ],
)
def test_bad_arguments(logits, size, message):
    with pytest.raises(ValueError, match=message):
        upsample_argmax(logits, size)


def test_opcheck():
    for logits in (torch.randn(2, 5, 4, 6), torch.randn(1, 300, 3, 4).half()):
        torch.library.opcheck(torch.ops.pyseg.upsample_argmax.default, (logits, 9, 14))


def test_compile(compiler, generator):
    logits = torch.randn(2, 5, 6, 7, generator=generator)
    compiled = compiler(
        lambda logits: upsample_argmax(logits, (logits.shape[2] * 4, 30)), dynamic=True
    )
    assert torch.equal(compiled(logits), upsample_argmax(logits, (24, 30)))
    assert torch.equal(compiled(logits[:1, :, 1:]), upsample_argmax(logits[:1, :, 1:], (20, 30)))


def test_export_with_sizes_that_vary():
    class Labels(torch.nn.Module):
        def forward(self, logits, image):
            return upsample_argmax(logits, image.shape[-2:])

    logits, image = torch.randn(1, 5, 4, 6), torch.zeros(1, 3, 17, 23)
    sides = {2: torch.export.Dim("h", min=2, max=999), 3: torch.export.Dim("w", min=2, max=999)}
    for strict in (False, True):
        program = torch.export.export(
            Labels(), (logits, image), dynamic_shapes=({}, sides), strict=strict
        ).module()
        other = torch.zeros(1, 3, 40, 31)
        assert torch.equal(program(logits, other), upsample_argmax(logits, (40, 31)))
