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


def without_waiting(logits, masks, boxes, labels):
    """`plain` in a form that torch.compile takes whole: a mask is enlarged by two products."""
    full = interpolate(logits[None], SIZE, mode="bilinear")[0]
    left, top, right, bottom = boxes.trunc().unbind(1)

    def weights(first, last, size):
        position = torch.arange(size, device=boxes.device) - first[:, None]
        extent = (last - first + 1)[:, None]
        source = ((position + 0.5) * (masks.shape[-1] / extent) - 0.5).clamp(0, masks.shape[-1] - 1)
        cells = torch.arange(masks.shape[-1], device=boxes.device)
        hats = (1 - (source[..., None] - cells).abs()).clamp(min=0)
        return (position >= 0) & (position < extent), hats

    in_rows, rows = weights(top, bottom, SIZE[0])
    in_columns, columns = weights(left, right, SIZE[1])
    inside = in_rows[:, :, None] & in_columns[:, None]
    things = torch.where(inside, full[labels], 0)
    channels = torch.where(inside, things + rows @ masks @ columns.mT, 0)
    unknown = full[STUFF:].amax(0) - things.amax(0)
    return torch.cat([full[:STUFF], channels, unknown[None]]).argmax(0)


@pytest.mark.gpu
@pytest.mark.parametrize("peer", ["the same in torch", "torch.compile of the same"])
def test_cuda(gpu, peer):
    gpu.compare(
        ours=lambda *scene: panoptic_head(*scene, num_stuff=STUFF, size=SIZE),
        peer=plain if peer == "the same in torch" else gpu.compile(without_waiting),
        peer_name=peer,
        inputs=[tensor.to(gpu.device) for tensor in make_scene()],
        goal_ms=0.06,
        check=check,
    )
