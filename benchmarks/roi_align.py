"""RoI pooling of 1000 boxes and 256 channels, of an image of 800 x 1344 pixels."""

from collections import OrderedDict

import pytest
import torch
import torchvision

from pyseg.ops import MultiScaleRoIAlign, roi_align, roi_pool

IMAGE, CHANNELS, BOXES, STRIDES = (800, 1344), 256, 1000, (4, 8, 16, 32)


def make_boxes(generator):
    """[K, 4] with sides from 20 to 490 pixels, log-uniform, cut at the image's border."""
    extent = torch.exp(torch.rand(BOXES, 2, generator=generator) * 3.2 + 3)
    centre = torch.rand(BOXES, 2, generator=generator) * torch.tensor([IMAGE[1], IMAGE[0]])
    boxes = torch.cat([centre - extent / 2, centre + extent / 2], 1)
    return torchvision.ops.clip_boxes_to_image(boxes, IMAGE)


def make_pyramid(dtype=torch.float32, device="cpu", layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    features = OrderedDict(
        (str(s), torch.randn(1, CHANNELS, IMAGE[0] // s, IMAGE[1] // s, generator=generator))
        for s in STRIDES
    )
    for name, level in features.items():
        features[name] = level.to(device, dtype).contiguous(memory_format=layout)
    return features, make_boxes(generator).to(device)


def make_level(dtype=torch.float32, device="cpu"):
    """The map of stride 8, and all boxes as [K, 5]."""
    features, boxes = make_pyramid(dtype, device)
    return features["8"], torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)


def check_within(tolerance):
    def check(ours, peer):
        error = (ours.float() - peer.float()).abs().max() / peer.float().abs().max()
        assert error <= tolerance, error

    return check


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("bins", [7, 14])
@pytest.mark.parametrize("threads", [1, 2])
def test_pyramid(compare, bins, layout, threads):
    features, boxes = make_pyramid(
        layout=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    ours = MultiScaleRoIAlign(list(features), bins, 2)
    peer = torchvision.ops.MultiScaleRoIAlign(list(features), bins, 2)
    with torch.no_grad():
        compare(
            ours=lambda: ours(features, [boxes], [IMAGE]),
            peer=lambda: peer(features, [boxes], [IMAGE]),
            peer_name="torchvision",
            threads=threads,
            goal={1: 10, 2: 18}[threads],
            check=check_within(1e-5),
        )


def gradient(function, input, boxes, bins):
    """A function that computes the gradient, and only that."""
    leaf = input.detach().requires_grad_()
    output = function(leaf, boxes, bins, 1 / 8, 2)
    weights = torch.ones_like(output)
    return lambda: torch.autograd.grad(output, leaf, weights, retain_graph=True)[0]


@pytest.mark.parametrize("bins", [7, 14])
@pytest.mark.parametrize("threads", [1, 2])
def test_backward(compare, bins, threads):
    input, boxes = make_level()
    compare(
        ours=gradient(roi_align, input, boxes, bins),
        peer=gradient(torchvision.ops.roi_align, input, boxes, bins),
        peer_name="torchvision",
        threads=threads,
        goal={1: 25, 2: 45}[threads],
        check=check_within(1e-4),
        rounds=5,
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_pool(compare, threads):
    input, boxes = make_level()
    compare(
        ours=lambda: roi_pool(input, boxes, 7, 1 / 8),
        peer=lambda: torchvision.ops.roi_pool(input, boxes, 7, 1 / 8),
        peer_name="torchvision",
        threads=threads,
        goal={1: 10, 2: 18}[threads],
        check=check_within(0),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("bins", [7, 14])
def test_cuda_pyramid(compare, bins, layout, dtype):
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    features, boxes = make_pyramid(dtype, "cuda", order)
    ours = MultiScaleRoIAlign(list(features), bins, 2)
    peer = torchvision.ops.MultiScaleRoIAlign(list(features), bins, 2)
    peers_boxes = boxes.to(dtype)
    with torch.no_grad():
        compare(
            ours=lambda: ours(features, [peers_boxes], [IMAGE]),
            peer=lambda: peer(features, [peers_boxes], [IMAGE]),
            peer_name="torchvision",
            threads=1,
            check=check_within(1e-4 if dtype == torch.float32 else 0.2),  # theirs: half positions
            device="cuda",
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bins", [7, 14])
def test_cuda_backward(compare, bins):
    input, boxes = make_level(device="cuda")
    compare(
        ours=gradient(roi_align, input, boxes, bins),
        peer=gradient(torchvision.ops.roi_align, input, boxes, bins),
        peer_name="torchvision, which is not deterministic",
        threads=1,
        check=check_within(1e-3),
        device="cuda",
    )
