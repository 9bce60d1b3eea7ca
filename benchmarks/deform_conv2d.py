"""deform_conv2d, version 2, 256 -> 256 channels, 3 x 3, at 1/8 of 512 x 1024 and 1024 x 2048."""

import pytest
import torch
from torchvision.ops import deform_conv2d as torchvision_deform_conv2d

from pyseg.ops import deform_conv2d

SIZES = {"64x128": (64, 128), "128x256": (128, 256)}


def make_inputs(size, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    return [
        tensor.to(device, dtype)
        for tensor in (
            randn(1, 256, *size),
            2 * randn(1, 18, *size),  # pixels
            randn(256, 256, 3, 3) / 48,
            randn(1, 9, *size).sigmoid(),
        )
    ]


def run(function, input, offset, weight, mask):
    return function(input, offset, weight, padding=1, mask=mask)


def gradients(function, tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = run(function, *leaves)
    return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]


def check_within(tolerance):
    def check(ours, peer):
        if isinstance(ours, torch.Tensor):
            ours, peer = [ours], [peer]
        for got, expected in zip(ours, peer, strict=True):
            error = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
            assert error <= tolerance, error

    return check


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threads", [1, 2])
def test_forward(compare, size, threads):
    tensors = make_inputs(SIZES[size])
    compare(
        ours=lambda: run(deform_conv2d, *tensors),
        peer=lambda: run(torchvision_deform_conv2d, *tensors),
        peer_name="torchvision",
        threads=threads,
        goal={1: 4.5, 2: 7}[threads],
        check=check_within(1e-4),
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_forward_against_a_plain_convolution(compare, threads):
    tensors = make_inputs(SIZES["64x128"])
    compare(
        ours=lambda: run(deform_conv2d, *tensors),
        peer=lambda: torch.conv2d(tensors[0], tensors[2], padding=1),
        peer_name="conv2d of the same size",
        threads=threads,
        goal=1 / 1.3,
        rounds=15,
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_forward_bfloat16(compare, threads):
    tensors = make_inputs(SIZES["64x128"], torch.bfloat16)
    wide = [tensor.float() for tensor in tensors]
    compare(
        ours=lambda: run(deform_conv2d, *tensors),
        peer=lambda: run(torchvision_deform_conv2d, *wide),
        peer_name="torchvision in float32, which has no bfloat16",
        threads=threads,
        goal={1: 12, 2: 16}[threads],
        check=check_within(2e-2),
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threads", [1, 2])
def test_forward_and_backward(compare, size, threads):
    tensors = make_inputs(SIZES[size])
    compare(
        ours=lambda: gradients(deform_conv2d, tensors),
        peer=lambda: gradients(torchvision_deform_conv2d, tensors),
        peer_name="torchvision",
        threads=threads,
        goal={
            "v4": {"64x128": (10, 16), "128x256": (12, 20)}[size][threads - 1],
            "v3": {"64x128": (10, 16)}.get(size, (None, None))[threads - 1],
        },
        check=check_within(1e-4),
        rounds=7 if size == "64x128" else 3,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("what", ["forward", "forward_and_backward"])
def test_cuda(gpu, what, size, dtype):
    # torchvision has no bfloat16, and float16 on CUDA only
    half = dtype == torch.float16 and gpu.device == "cuda"
    peer_dtype = torch.float16 if half else torch.float32
    function = gradients if what != "forward" else lambda f, tensors: run(f, *tensors)
    inputs = make_inputs(SIZES[size], dtype, gpu.device)
    goals = {torch.float32: 0.21, torch.bfloat16: 0.08}
    gpu.compare(
        ours=lambda *tensors: function(deform_conv2d, tensors),
        peer=lambda *tensors: function(torchvision_deform_conv2d, tensors),
        peer_name=f"torchvision in {str(peer_dtype).removeprefix('torch.')}",
        inputs=inputs,
        peer_inputs=[tensor.to(peer_dtype) for tensor in inputs],
        goal_ms=goals.get(dtype) if (what, size) == ("forward", "64x128") else None,
        check=check_within(1e-3 if dtype == torch.float32 else 5e-2),
    )
