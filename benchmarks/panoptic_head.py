"""UPSNet's panoptic head: 19 classes at 256 x 512 and 30 instances to a map of 1024 x 2048."""

import pytest
import torch
from torch.nn.functional import interpolate

from pyseg.ops import panoptic_head, panoptic_logits

SIZE, STUFF, THINGS, INSTANCES = (1024, 2048), 11, 8, 30


def make_scene():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(STUFF + THINGS, SIZE[0] // 4, SIZE[1] // 4, generator=g)
    extent = torch.exp(torch.randn(INSTANCES, 2, generator=g) * 0.6) * torch.tensor([110.0, 160.0])
    centre = torch.rand(INSTANCES, 2, generator=g) * torch.tensor([SIZE[1], SIZE[0]])
    boxes = torch.cat([centre - extent / 2, centre + extent / 2], 1)
    masks = torch.randn(INSTANCES, 28, 28, generator=g) * 2
    labels = torch.randint(STUFF, STUFF + THINGS, (INSTANCES,), generator=g)
    return logits, masks, boxes, labels


def plain(logits, masks, boxes, labels):
    full = interpolate(logits[None], SIZE, mode="bilinear")[0]
    return panoptic_logits(full, masks, boxes, labels, num_stuff=STUFF).argmax(0)


def check(ours, peer):
    differ = (ours.long() != peer).float().mean()
    assert differ <= 1e-4, f"{differ:.2%} of the pixels differ"


@pytest.mark.parametrize("threads", [1, 2])
def test_float32(compare, threads):
    scene = make_scene()
    compare(
        ours=lambda: panoptic_head(*scene, num_stuff=STUFF, size=SIZE),
        peer=lambda: plain(*scene),
        peer_name="the same in torch",
        threads=threads,
        goal={1: 50, 2: 60}[threads],
        check=check,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda(compare):
    scene = [tensor.cuda() for tensor in make_scene()]
    compare(
        ours=lambda: panoptic_head(*scene, num_stuff=STUFF, size=SIZE),
        peer=lambda: plain(*scene),
        peer_name="the same in torch",
        threads=1,
        check=check,
        device="cuda",
    )
