"""CUDA kernels against the CPU's: cases that reach every branch and many blocks of each.

The tests of an op compare with independent oracles, on few small cases where the kernel is
emulated; here the CPU, which those tests hold to the oracles, is what is compared with.
"""

import pytest
import torch

import pyseg.ops  # noqa: F401  (defines the operators)


def integer(generator, low, high):
    return int(torch.randint(low, high, (1,), generator=generator))


def assert_same(device, op, *arguments):
    """The device's results are the CPU's, bit for bit."""

    def there(argument):
        return argument.to(device.name) if isinstance(argument, torch.Tensor) else argument

    got = getattr(device.ops, op)(*map(there, arguments))
    want = getattr(torch.ops.pyseg, op)(*arguments)
    if isinstance(got, torch.Tensor):
        got, want = [got], [want]
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.cpu(), theirs), op


def merge_scene(generator, images, instances, height, width):
    """Boxes of all sizes, many of which meet; scores with ties, below the threshold and NaN."""
    boxes = torch.rand(images, instances, 4, generator=generator) * 1.2 - 0.1
    sizes = torch.rand(images, instances, 1, generator=generator) ** 3
    boxes[..., 2:] = (
        boxes[..., :2] + 0.02 + sizes * torch.rand(boxes[..., 2:].shape, generator=generator)
    )
    boxes *= torch.tensor([width, height, width, height])
    scores = (torch.rand(images, instances, generator=generator) * 30).round() / 30
    scores[:, ::17] = torch.nan
    labels = torch.randint(0, 9, (images, instances), generator=generator)
    return boxes, scores, labels


@pytest.mark.parametrize(
    "instances, size, stuff",
    [
        (40, (60, 70), [3, 0, 5000]),  # labels too large to look up
        (40, (37, 64), [3, 0, 7]),  # rows that begin at multiples of 16 bytes
        (90, (40, 48), []),  # half a word at the end of each row
        (700, (23, 95), list(range(40))),  # more than fit a block's list
        (1100, (12, 33), [1]),  # more than fit shared memory
    ],
)
def test_panoptic_merge(device, generator, instances, size, stuff):
    height, width = size
    boxes, scores, labels = merge_scene(generator, 2, instances, height, width)
    semantic = torch.randint(-1, 8, (2, height, width), generator=generator)
    semantic[:, ::3] = 5000
    parameters = [stuff, 0.2, integer(generator, 2, 10) / 10, 20, 0.5]
    cells = torch.rand(2, instances, 5, 5, generator=generator)
    assert_same(device, "panoptic_merge", cells, boxes, scores, labels, semantic, *parameters)
    x, y = torch.arange(width) + 0.5, (torch.arange(height) + 0.5)[:, None]
    left, top, right, bottom = (boxes[..., i, None, None] for i in range(4))
    masks = (x > left) & (x < right) & (y > top) & (y < bottom)
    masks &= torch.rand(masks.shape, generator=generator) < 0.9
    for labels_of in (semantic.short(), semantic.int()):
        assert_same(device, "panoptic_merge", masks, None, scores, labels, labels_of, *parameters)
    if instances == 40:  # from an address that is no multiple of anything
        odd = torch.zeros(masks.numel() + 1, dtype=torch.bool)[1:].reshape(masks.shape)
        odd.copy_(masks)
        assert_same(device, "panoptic_merge", odd, None, scores, labels, semantic, *parameters)


def flat_labels(generator, shape, classes, dtype):
    """Labels of a map: mostly flat, with noise, void and labels out of range."""
    height, width = shape[-2:]
    coarse = torch.randint(
        0, classes, (*shape[:-2], height // 20 + 1, width // 100 + 1), generator=generator
    )
    labels = coarse.repeat_interleave(20, -2).repeat_interleave(100, -1)[..., :height, :width]
    noise = torch.randint(-2, classes + 3, labels.shape, generator=generator)
    return torch.where(torch.rand(labels.shape, generator=generator) < 0.02, noise, labels).to(
        dtype
    )


def placed(tensor, offset):
    """The same at an address that is `offset` elements behind an aligned one."""
    memory = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype)
    return memory[offset:].reshape(tensor.shape).copy_(tensor)


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def counted(prediction, target, classes, ignore):
    """confusion_matrix by torch.bincount; the CPU's raises where labels are out of range."""

    def code(labels):
        inside = (labels >= 0) & (labels < classes)
        other = torch.where(labels == ignore, classes, classes + 1)
        return torch.where(inside & (labels != ignore), labels, other)

    results = []
    for p, t in zip(prediction.long(), target.long(), strict=True):
        cells = (code(t) * (classes + 2) + code(p)).flatten()
        table = torch.bincount(cells, minlength=(classes + 2) ** 2).reshape(classes + 2, -1)
        invalid = torch.stack([table[:classes, -1].sum(), table[-1].sum()])
        results.append((table[:classes, :classes], table[:classes, classes], invalid))
    return [torch.stack(part) for part in zip(*results, strict=True)]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_confusion_matrix(device, generator, dtype):
    for classes, ignore in ((5, 255), (120, -1)):  # 120: too many for a table in shared memory
        for shape in ((2, 41, 601), (1, 1, 37), (3, 90, 64)):
            maps = [flat_labels(generator, shape, classes, dtype) for _ in range(2)]
            want = counted(*maps, classes, ignore)
            for offsets in ((0, 0), (3, 3), (1, 2)):  # misaligned alike, or not
                moved = [placed(m, n).to(device.name) for m, n in zip(maps, offsets, strict=True)]
                got = device.ops.confusion_matrix(*moved, classes, ignore)
                for ours, theirs in zip(got, want, strict=True):
                    assert torch.equal(ours.cpu(), theirs)
