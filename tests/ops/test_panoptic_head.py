"""panoptic_head against the same in torch, channel by channel, and a case by hand."""

import pytest
import torch
from torch.nn.functional import interpolate

from pyseg.ops import panoptic_head, panoptic_logits


def integer(generator, low, high):
    return int(torch.randint(low, high, (1,), generator=generator))


def make_scene(generator, size, case):
    classes = integer(generator, 1, 9)
    stuff = integer(generator, 0, classes + 1)
    count = integer(generator, 0, 6) if stuff < classes else 0
    shape = (classes, integer(generator, 1, 20), integer(generator, 1, 40))
    logits = torch.randn(shape, generator=generator) * 2
    boxes = torch.rand(count, 4, generator=generator) * 1.2 - 0.1
    boxes[:, 2:] = boxes[:, :2] + torch.rand(count, 2, generator=generator) * 0.6 - 0.02
    if case == 1:  # every pixel is in every box
        boxes = torch.tensor([-0.1, -0.1, 1.2, 1.2]).repeat(count, 1)
    if case == 2:  # the zeros outside of boxes win
        logits[:stuff] -= 20
    boxes *= torch.tensor([size[1], size[0], size[1], size[0]])
    cells = integer(generator, 1, 29)
    masks = torch.randn(count, cells, cells, generator=generator)
    labels = torch.randint(stuff, classes, (count,), generator=generator) if count else []
    return logits, masks, boxes, torch.as_tensor(labels, dtype=torch.int64), stuff


def assert_wins(channel, scene, size):
    """The channel chosen is the largest, but for rounding."""
    logits, masks, boxes, labels, stuff = (
        part.double() if isinstance(part, torch.Tensor) and part.is_floating_point() else part
        for part in scene
    )
    full = interpolate(logits[None], size, mode="bilinear")[0]
    values = panoptic_logits(full, masks, boxes, labels, num_stuff=stuff)
    lost = values.amax(0) - values.gather(0, channel[None].long())[0]
    assert lost.max() < 1e-4
    assert (values.argmax(0) != channel).sum() <= 1 + 1e-3 * channel.numel()


@pytest.mark.parametrize("case", range(3))
def test_against_torch(generator, case):
    for _ in range(20):
        size = integer(generator, 1, 150), integer(generator, 1, 300)
        scene = make_scene(generator, size, case)
        assert_wins(panoptic_head(*scene[:4], num_stuff=scene[4], size=size), scene, size)


@pytest.mark.parametrize("case", range(3))
def test_small_kernel_against_torch(device, generator, case):
    for _ in range(4):
        size = integer(generator, 1, 30), integer(generator, 1, 150)
        scene = make_scene(generator, size, case)
        tensors = [tensor[None].to(device.name) for tensor in scene[:4]]
        channel = device.ops.panoptic_head(*tensors, scene[4], *size)[0].cpu()
        assert_wins(channel, scene, size)
        if device.name == "cpu":  # a GPU contracts products and sums
            ours = panoptic_head(*scene[:4], num_stuff=scene[4], size=size)
            assert (channel != ours).sum() <= 1


def hand_case():
    """6 x 6, two stuff classes, two thing classes, one instance: worked out from the definition."""
    logits = torch.zeros(4, 6, 6)
    logits[0], logits[1] = 1.0, 0.5
    logits[2, 1:4, 1:4] = 3.0
    logits[3, :, 3:6] = 2.0
    boxes = torch.tensor([[1.0, 1.0, 3.0, 3.0]])
    expected = torch.zeros(6, 6, dtype=torch.int32)
    expected[:, 3:6] = 3  # unknown: stuff 0 and 1, instance 2
    expected[1:4, 1:4] = 2
    return logits, torch.full((1, 28, 28), 2.0), boxes, torch.tensor([2]), expected


def test_by_hand(device):
    *tensors, expected = hand_case()
    assert torch.equal(panoptic_head(*tensors, num_stuff=2, size=(6, 6)), expected)
    batch = [tensor[None].to(device.name) for tensor in tensors]
    assert torch.equal(device.ops.panoptic_head(*batch, 2, 6, 6)[0].cpu(), expected)
    values = panoptic_logits(*tensors, num_stuff=2)
    assert values.shape == (4, 6, 6)
    assert torch.equal(values.argmax(0).int(), expected)


def test_batch_with_absent_instances(device, generator):
    logits = torch.randn(2, 5, 7, 9, generator=generator)
    masks = torch.randn(2, 300, 4, 4, generator=generator)
    boxes = torch.rand(2, 300, 4, generator=generator) * 20
    boxes[..., 2:] += boxes[..., :2]
    labels = torch.randint(2, 5, (2, 300), generator=generator)
    labels[0, 3:] = labels[1, ::2] = -1
    both = panoptic_head(logits, masks, boxes, labels, num_stuff=2, size=(28, 36))
    assert both.max() <= 302
    for n in range(2):
        there = (labels[n] >= 0).nonzero()[:, 0]
        alone = panoptic_head(
            logits[n],
            masks[n, there],
            boxes[n, there],
            labels[n, there],
            num_stuff=2,
            size=(28, 36),
        )
        names = torch.cat([torch.arange(2), there + 2, torch.tensor([302])])
        assert torch.equal(names[alone.long()].int(), both[n])
    tensors = [tensor.to(device.name) for tensor in (logits, masks, boxes, labels)]
    assert torch.equal(device.ops.panoptic_head(*tensors, 2, 28, 36).cpu(), both)


def test_gradients(generator):
    logits = torch.randn(4, 9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    masks = torch.randn(3, 5, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[1.0, 2, 5, 6], [-2, -1, 3, 4], [4, 0, 12, 7]])
    labels = torch.tensor([2, 3, 2])
    assert torch.autograd.gradcheck(
        lambda logits, masks: panoptic_logits(logits, masks, boxes, labels, num_stuff=2),
        (logits, masks),
    )


def test_strange_boxes(device):
    """NaN, infinite, inverted and far boxes have no pixel; a NaN logit does not win."""
    nan = torch.nan
    boxes = torch.tensor(
        [
            [nan, 0, 5, 5],
            [0, 0, torch.inf, 5],
            [5, 5, 2, 2],
            [3e30, 0, 4e30, 5],
            [100, 100, 120, 120],
            [1, 1, 2, 2],
        ]
    )
    masks, labels = torch.full((6, 3, 3), 50.0), torch.ones(6, dtype=torch.int64)
    logits = torch.ones(2, 4, 4)
    logits[0, 0, 0] = nan
    expected = torch.zeros(4, 4, dtype=torch.int32)
    expected[1:3, 1:3] = 6
    expected[0, 0] = 7
    assert torch.equal(
        panoptic_head(logits, masks, boxes, labels, num_stuff=1, size=(4, 4)), expected
    )
    batch = [tensor[None].to(device.name) for tensor in (logits, masks, boxes, labels)]
    assert torch.equal(device.ops.panoptic_head(*batch, 1, 4, 4)[0].cpu(), expected)


def test_threads_layouts_and_dtypes(generator):
    logits, masks, boxes, labels, stuff = make_scene(generator, (90, 200), 0)
    expected = panoptic_head(logits, masks, boxes, labels, num_stuff=stuff, size=(90, 200))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            strided = logits.transpose(1, 2).contiguous().transpose(1, 2)
            again = panoptic_head(strided, masks, boxes, labels, num_stuff=stuff, size=(90, 200))
            assert torch.equal(again, expected)
    finally:
        torch.set_num_threads(threads)
    half = panoptic_head(
        logits.bfloat16(),
        masks.half(),
        boxes.double(),
        labels.int(),
        num_stuff=stuff,
        size=(90, 200),
    )
    exact = panoptic_head(
        logits.bfloat16().float(),
        masks.half().float(),
        boxes,
        labels,
        num_stuff=stuff,
        size=(90, 200),
    )
    assert torch.equal(half, exact)


def test_no_images(device):
    none = [torch.zeros(0, 3, 4, 5), torch.zeros(0, 2, 3, 3), torch.zeros(0, 2, 4)]
    none.append(torch.zeros(0, 2, dtype=torch.int64))
    assert panoptic_head(*none, num_stuff=1, size=(8, 9)).shape == (0, 8, 9)
    tensors = [tensor.to(device.name) for tensor in none]
    assert device.ops.panoptic_head(*tensors, 1, 8, 9).shape == (0, 8, 9)


GOOD = {
    "logits": torch.zeros(3, 4, 5),
    "masks": torch.zeros(2, 7, 7),
    "boxes": torch.zeros(2, 4),
    "labels": torch.ones(2, dtype=torch.int64),
    "num_stuff": 1,
    "size": (8, 10),
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(4, 5)}, r"logits must be \[C, h, w\].*got \[4, 5\]"),
        ({"logits": torch.zeros(3, 0, 5)}, r"logits .*got \[3, 0, 5\]"),
        ({"logits": torch.zeros(3, 4, 5).long()}, "logits must be floating point"),
        ({"masks": torch.zeros(2, 7, 6)}, r"masks must be \['K', 'M', 'M'\]|masks must be"),
        ({"boxes": torch.zeros(2, 5)}, r"boxes must be \[2, 4\].*got \[2, 5\]"),
        ({"labels": torch.ones(3).long()}, r"labels must be \[2\].*got \[3\]"),
        ({"labels": torch.ones(2)}, "labels must be integers, got torch.float32"),
        ({"labels": torch.tensor([1, 0])}, r"labels\[1\] of image 0 is 0: a thing has a class"),
        ({"labels": torch.tensor([3, 1])}, r"labels\[0\] of image 0 is 3"),
        ({"num_stuff": 4}, "num_stuff must be 0 to 3"),
        ({"size": (0, 9)}, r"size must be \(height, width\)"),
        ({"boxes": torch.zeros(2, 4, device="meta")}, "logits are on cpu, boxes on meta"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        panoptic_head(**{**GOOD, **change})


def test_opcheck():
    tensors = [GOOD[name][None] for name in ("logits", "masks", "boxes", "labels")]
    torch.library.opcheck(torch.ops.pyseg.panoptic_head.default, (*tensors, 1, 8, 10))


def test_compile(compiler, generator):
    scene = make_scene(generator, (30, 40), 0)

    def head(*tensors):
        return panoptic_head(*tensors, num_stuff=scene[4], size=(30, 40))

    assert torch.equal(compiler(head)(*scene[:4]), head(*scene[:4]))
