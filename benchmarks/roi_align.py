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
            goal={"v4": (10, 18)[threads - 1], "v3": (12, 18)[threads - 1] if bins == 7 else None},
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("bins", [7, 14])
def test_cuda_pyramid(gpu, bins, layout, dtype):
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    features, boxes = make_pyramid(dtype, gpu.device, order)
    ours = MultiScaleRoIAlign(list(features), bins, 2)
    peer = torchvision.ops.MultiScaleRoIAlign(list(features), bins, 2)
    half = dtype == torch.float16 and gpu.device == "cuda"  # which torchvision has on CUDA only
    peer_dtype = torch.float16 if half else torch.float32
    peer_features, _ = make_pyramid(peer_dtype, gpu.device, order)
    with torch.no_grad():
        gpu.compare(
            ours=lambda features, boxes: ours(features, [boxes], [IMAGE]),
            peer=lambda features, boxes: peer(features, [boxes], [IMAGE]),
            peer_name="torchvision",
            inputs=(features, boxes.to(dtype)),
            peer_inputs=(peer_features, boxes.to(dtype).to(peer_dtype)),
            goal_ms={7: 0.2, 14: 0.4}[bins] if layout == "channels_last" else None,
            check=check_within(1e-4 if dtype == torch.float32 else 0.2),  # theirs: half positions
        )


@pytest.mark.gpu
@pytest.mark.parametrize("bins", [7, 14])
def test_cuda_backward(gpu, bins):
    """The two operators by themselves: autograd would run the gradient where the output came from,
    outside a graph."""
    input, boxes = make_level(device=gpu.device)
    grad = torch.ones(BOXES, CHANNELS, bins, bins, device=gpu.device)
    leaf = input.clone().requires_grad_()
    roi_align(leaf, boxes, bins, 1 / 8, 2).backward(grad)
    options = ([1 / 8], [bins, bins], 2, False, 0, 224.0, 4)

    def ours(grad, input, boxes):
        return torch.ops.pyseg._roi_align_backward(grad, [input], boxes, *options)[0]

    def peer(grad, input, boxes):
        return torch.ops.torchvision._roi_align_backward(
            grad, boxes, 1 / 8, bins, bins, *input.shape, 2, False
        )

    assert torch.equal(ours(grad, input, boxes), leaf.grad)  # the options are autograd's
    gpu.compare(
        ours=ours,
        peer=peer,
        peer_name="torchvision, which is not deterministic",
        inputs=(grad, input, boxes),
        goal_ms={7: 0.08, 14: 0.22}[bins],
        check=check_within(1e-3),
    )
