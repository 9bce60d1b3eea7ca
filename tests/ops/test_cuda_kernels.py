"""CUDA kernels against the CPU's: cases that reach every branch and many blocks of each.

The tests of an op compare with independent oracles, on few small cases where the kernel is
emulated; here the CPU, which those tests hold to the oracles, is what is compared with.
"""

import sys
from pathlib import Path

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


@pytest.mark.parametrize(
    "low, size",
    [((9, 50), (36, 200)), ((5, 7), (61, 300)), ((40, 31), (17, 140)), ((1, 1), (9, 3))],
)
def test_panoptic_head(device, generator, low, size):
    for instances in (0, 40, 290):  # more than a block looks at together
        logits = torch.randn(2, 9, *low, generator=generator)
        masks = torch.randn(2, instances, 6, 6, generator=generator) * 2
        boxes, _, labels = merge_scene(generator, 2, instances, *size)
        labels = labels % 5 + 4
        labels[:, ::5] = -1
        arguments = (logits, masks, boxes, labels, 4, *size)
        want = torch.ops.pyseg.panoptic_head(*arguments)
        tensors = [tensor.to(device.name) for tensor in arguments[:4]]
        got = device.ops.panoptic_head(*tensors, 4, *size).cpu()
        assert (got != want).sum() <= 1 + 1e-3 * want.numel()  # a GPU rounds otherwise
        by_channels = tensors[0].to(memory_format=torch.channels_last)
        again = device.ops.panoptic_head(by_channels, *tensors[1:], 4, *size).cpu()
        assert torch.equal(again, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(50, 300), (27, 130), (9, 40)])
def test_upsample(device, generator, dtype, size):
    """Maps with flat parts, which take another way than those without, and wild logits."""
    coarse = torch.randn(2, 7, 3, 6, generator=generator)
    logits = torch.nn.functional.interpolate(coarse, (9, 40), mode="bilinear") * 5
    logits[1, 2, 3:5, 4:6] = torch.nan
    logits[1, 3, 6, 20:] = torch.inf
    logits = logits.to(dtype).to(device.name)
    labels = device.ops.upsample_argmax(logits, *size).cpu()
    want = torch.ops.pyseg.upsample_argmax(logits.cpu(), *size)
    assert (labels != want).float().mean() <= 1e-3
    if size == (9, 40):  # the logits' own pixels
        assert torch.equal(labels, logits.cpu().float().argmax(1).to(labels.dtype))
    target = flat_labels(generator, (2, *size), 7, torch.int16)
    got = device.ops.upsample_confusion(logits, target.to(device.name), 255)
    for ours, theirs in zip(got, counted(labels, target, 7, 255), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def segment_lists(maps, generator):
    """Lists that describe the maps: classes at random, a crowd here and there."""
    ids = [m.unique() for m in maps]
    prediction, target = (i[i > 0].long() for i in ids)
    classes = [torch.randint(0, 3, i.shape, generator=generator) for i in (prediction, target)]
    area = torch.bincount(maps[1].flatten())[target]
    crowd = torch.randint(0, 9, target.shape, generator=generator).clamp(max=2) % 3
    return torch.stack([prediction, classes[0]], 1), torch.stack(
        [target, classes[1], area, crowd], 1
    )


@pytest.mark.parametrize("segments", [0, 9, 150, 3000])
def test_panoptic_quality(device, generator, segments):
    """Few segments, more than travel with one launch, and more than a block has room for."""
    shape = (61, 401)
    target = flat_labels(generator, shape, max(segments, 1), torch.int32).clamp(0, segments)
    if segments > 9:
        small = torch.randint(0, segments + 1, (21, 101), generator=generator, dtype=torch.int32)
        target = small.repeat_interleave(3, 0).repeat_interleave(4, 1)[:61, :401].contiguous()
    keep = torch.rand(shape, generator=generator) < 0.97
    prediction = torch.where(keep, target, target.flip(1)) * 5  # other ids
    lists = segment_lists((prediction, target), generator)
    edges = [torch.rand(shape, generator=generator) < 0.3 for _ in range(2)]
    for boundaries in ((None, None), edges):
        want = torch.ops.pyseg.panoptic_quality(prediction, target, *lists, 3, *boundaries)
        for offsets in ((0, 0), (1, 2)):
            maps = [
                placed(m, n).to(device.name)
                for m, n in zip((prediction, target), offsets, strict=True)
            ]
            moved = [mask if mask is None else mask.to(device.name) for mask in boundaries]
            got = device.ops.panoptic_quality(*maps, *lists, 3, *moved)
            for ours, theirs in zip(got, want, strict=True):
                assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_boundary_mask(device, generator, dtype):
    for shape in ((2, 50, 1100), (1, 90, 37), (1, 7, 6)):
        labels = flat_labels(generator, shape, 4, dtype)
        for offset in (0, 1):
            moved = placed(labels, offset).to(device.name)
            for distance, border in ((1, True), (2, False), (9, True), (40, False)):
                got = device.ops.boundary_mask(moved, distance, border).cpu()
                assert torch.equal(got, torch.ops.pyseg.boundary_mask(labels, distance, border))


def test_boundary_match(device, generator):
    for shape, classes in (((2, 41, 130), 5), ((1, 20, 300), 3900)):
        maps = [flat_labels(generator, shape, 5, torch.int32).clamp(0, 4) for _ in range(2)]
        for squared_radius in (0, 1, 8, 50, 300, 9999):
            assert_same(device, "boundary_match", *maps, classes, squared_radius, 4)


class Calls:
    """Operators that only note what they would be called with."""

    def __init__(self):
        self.made = []

    def __getattr__(self, name):
        return lambda *arguments: self.made.append((name, arguments))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "op",
    [
        *("boundary_mask", "boundary_match", "confusion_matrix", "panoptic_head", "panoptic_merge"),
        *("panoptic_quality", "upsample_argmax", "upsample_confusion"),
    ],
)
def test_nothing_waits_and_a_graph_repeats_it(op):
    """The cases of tests/emulation: no call synchronises, and what is captured gives the same."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder = Path(__file__).resolve().parents[1] / "emulation"
    if not folder.is_dir():
        pytest.skip("outside the source tree: no cases")
    sys.path.insert(0, str(folder))
    from test_emulation import results

    calls = Calls()
    results(op, calls)
    assert calls.made
    for name, arguments in calls.made:
        # lists of segments stay on the CPU
        there = [
            argument.cuda()
            if isinstance(argument, torch.Tensor)
            and not (op == "panoptic_quality" and argument.dtype == torch.int64)
            else argument
            for argument in arguments
        ]
        operator = getattr(torch.ops.pyseg, name)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = operator(*there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            repeated = operator(*there)
        graph.replay()
        torch.cuda.synchronize()
        if isinstance(expected, torch.Tensor):
            expected, repeated = [expected], [repeated]
        for got, want in zip(repeated, expected, strict=True):
            assert torch.equal(got, want)
