"""upsample_confusion against the two ops that it fuses, and against torch."""

import pytest
import torch
from torch.nn.functional import interpolate

from pyseg.ops import confusion_counts, upsample_argmax, upsample_confusion
from pyseg.ops.confusion_matrix import INTEGERS
from pyseg.ops.upsample_argmax import FLOATS
from pyseg.ops.upsample_confusion import reference

SIZES = [  # logits, target
    ((2, 19, 16, 32), (128, 256)),
    ((1, 5, 7, 9), (50, 31)),
    ((1, 5, 33, 47), (20, 17)),  # down
    ((1, 4, 20, 30), (90, 13)),  # up and down
    ((3, 7, 1, 1), (5, 6)),
    ((2, 1, 5, 5), (9, 9)),  # one class
    ((1, 120, 6, 7), (30, 40)),  # a table that does not fit shared memory
    ((1, 255, 3, 4), (20, 33)),  # codes beyond 8 bits
    ((1, 300, 3, 4), (20, 33)),
]


def make_case(generator, shape, size, labels=torch.uint8, smooth=False, ignore=255):
    logits = torch.randn(shape, generator=generator)
    if smooth:  # then whole tiles have one best class
        coarse = torch.randn(*shape[:2], 2, 2, generator=generator)
        logits = interpolate(coarse, shape[2:], mode="bilinear") * 9 + logits * 0.1
    highest = min(shape[1], torch.iinfo(labels).max + 1)
    target = torch.randint(0, highest, (shape[0], *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = ignore
    return logits, target.to(labels)


def assert_equal(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.cpu(), theirs.cpu())


@pytest.mark.parametrize("shape, size", SIZES)
def test_small_against_the_two_ops(device, generator, shape, size):
    for smooth in (False, True):
        logits, target = make_case(generator, shape, size, torch.int64, smooth, ignore=-1)
        expected = confusion_counts(upsample_argmax(logits, size), target, shape[1], -1)
        assert expected.matrix.sum() == (target >= 0).sum()
        assert_equal(upsample_confusion(logits, target, ignore_index=-1), expected)
        got = device.ops.upsample_confusion(logits.to(device.name), target.to(device.name), -1)
        labels = device.ops.upsample_argmax(logits.to(device.name), *size)
        assert_equal(got, confusion_counts(labels.cpu(), target, shape[1], -1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("labels", INTEGERS, ids=str)
def test_dtypes_and_layouts(device, generator, dtype, labels):
    ignore = 100
    logits, target = make_case(generator, (2, 6, 9, 14), (40, 71), labels, ignore=ignore)
    logits = logits.to(dtype).to(memory_format=torch.channels_last)
    target = target.transpose(1, 2).contiguous().transpose(1, 2)
    expected = confusion_counts(upsample_argmax(logits, (40, 71)).to(labels), target, 6, ignore)
    assert_equal(upsample_confusion(logits, target, (40, 71), ignore), expected)
    got = device.ops.upsample_confusion(logits.to(device.name), target.to(device.name), ignore)
    on_device = device.ops.upsample_argmax(logits.to(device.name), 40, 71).cpu()
    assert_equal(got, confusion_counts(on_device.to(labels), target, 6, ignore))


def test_against_torch(generator):
    logits, target = make_case(generator, (2, 11, 13, 17), (104, 136))
    ours, theirs = upsample_confusion(logits, target).matrix, reference(logits, target)
    assert (ours - theirs).abs().sum() <= 4  # a tie or two, by rounding
    assert torch.equal(ours.sum(2), theirs.sum(2))


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_wild_logits(device, generator, special):
    logits, target = make_case(generator, (1, 5, 6, 8), (33, 50))
    logits[torch.rand(logits.shape, generator=generator) < 0.1] = special
    expected = confusion_counts(upsample_argmax(logits, (33, 50)), target, 5)
    assert_equal(upsample_confusion(logits, target), expected)
    got = device.ops.upsample_confusion(logits.to(device.name), target.to(device.name), 255)
    labels = device.ops.upsample_argmax(logits.to(device.name), 33, 50).cpu()
    assert_equal(got, confusion_counts(labels, target, 5))


def test_ignore_index_that_is_a_class(device, generator):
    """Then predictions of it are misses, as in confusion_counts."""
    logits, target = make_case(generator, (1, 5, 6, 8), (33, 50), ignore=2)
    expected = confusion_counts(upsample_argmax(logits, (33, 50)), target, 5, 2)
    assert expected.missed.sum() > 0 and expected.matrix[0, 2].sum() == 0
    assert_equal(upsample_confusion(logits, target, ignore_index=2), expected)
    got = device.ops.upsample_confusion(logits.to(device.name), target.to(device.name), 2)
    assert_equal(got, expected)


def test_targets_out_of_range(device, generator):
    logits, target = make_case(generator, (2, 19, 4, 6), (32, 48), torch.int32)
    target[1, 5, 7] = 33
    with pytest.raises(
        ValueError,
        match=r"target holds .*33 \(1 pixels, the first at image 1, row "
        "5, column 7.*trainIds|labelTrainIds",
    ):
        upsample_confusion(logits, target)
    matrix, _, invalid = device.ops.upsample_confusion(
        logits.to(device.name), target.to(device.name), 255
    )
    assert invalid.tolist() == [[0, 0], [0, 1]]
    assert matrix.sum() == ((target != 255) & (target != 33)).sum()


def test_threads_do_not_change_a_bit(generator):
    logits, target = make_case(generator, (2, 19, 30, 60), (240, 480))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(upsample_confusion(logits, target).matrix)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_empty(device):
    for n, size in ((0, (8, 9)), (2, (0, 9)), (2, (8, 0))):
        logits, target = torch.zeros(n, 3, 4, 5), torch.zeros(n, *size, dtype=torch.uint8)
        for counts in (
            upsample_confusion(logits, target),
            device.ops.upsample_confusion(logits.to(device.name), target.to(device.name), 255),
        ):
            assert [list(c.shape) for c in counts] == [[n, 3, 3], [n, 3], [n, 2]]
            assert all(c.sum() == 0 for c in counts)


LOGITS, TARGET = torch.zeros(1, 3, 4, 5), torch.zeros(1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    "logits, target, size, message",
    [
        (LOGITS[0], TARGET, None, r"logits must be \[N, C, h, w\].*got \[3, 4, 5\]"),
        (LOGITS.long(), TARGET, None, "logits must be floating point.*use logits.float"),
        (LOGITS.expand(1, 3, 4, 5).repeat(1, 1366, 1, 1), TARGET, None, "at most 4096 .*4098"),
        (LOGITS, TARGET.float(), None, "target must hold integer labels.*use target.long"),
        (LOGITS, TARGET[0], None, r"target must be \[1, H, W\], got \[8, 8\]"),
        (LOGITS, TARGET.repeat(2, 1, 1), None, r"target must be \[1, H, W\], got \[2, 8, 8\]"),
        (LOGITS, TARGET, (8, 9), r"size \(8, 9\) is not that of the target, \(8, 8\)"),
    ],
)
def test_bad_arguments(logits, target, size, message):
    with pytest.raises(ValueError, match=message):
        upsample_confusion(logits, target, size)


def test_opcheck_and_compile(compiler, generator):
    logits, target = make_case(generator, (2, 5, 4, 6), (9, 14))
    torch.library.opcheck(torch.ops.pyseg.upsample_confusion.default, (logits, target, 255))
    compiled = compiler(lambda *arguments: upsample_confusion(*arguments))
    assert_equal(compiled(logits, target), upsample_confusion(logits, target))
