"""dense_crf against pydensecrf (Krähenbühl's own code, one core, one image, CPU).

pydensecrf is a peer only: `pip install pydensecrf2`. The image is the photograph that comes with
pyseg, enlarged; the class scores are smooth with noise, as a network's are.
"""

from pathlib import Path

import numpy
import pytest
import torch
from torch.nn.functional import interpolate

import pyseg
from pyseg.image import read_image
from pyseg.ops import dense_crf

STREET = Path(pyseg.__file__).parent / "assets" / "street.jpg"
ITERATIONS = 10


def make_inputs(classes, height, width):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, classes, height // 40, width // 40, generator=generator)
    scores = 3 * interpolate(scores, (height, width), mode="bicubic")
    scores += 0.5 * torch.randn(scores.shape, generator=generator)
    photo = read_image(STREET)[None].float()
    image = interpolate(photo, (height, width), mode="bicubic").clamp(0, 255)
    return -scores.log_softmax(1), image.to(torch.uint8)


def pydensecrf(unary, image):
    densecrf = pytest.importorskip(
        "pydensecrf.densecrf", reason="the peer is not installed: pip install pydensecrf2"
    )
    _, classes, height, width = unary.shape
    energy = unary[0].reshape(classes, -1).numpy()
    rgb = image[0].permute(1, 2, 0).contiguous().numpy()

    def run():
        crf = densecrf.DenseCRF2D(width, height, classes)
        crf.setUnaryEnergy(energy)
        crf.addPairwiseGaussian(sxy=3, compat=3)
        crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=rgb, compat=10)
        marginals = numpy.array(crf.inference(ITERATIONS))
        return torch.from_numpy(marginals).reshape(1, classes, height, width)

    return run


def check(ours, peer):
    """Only for "compatible": the other levels differ by the peer's own error, see the tests."""
    assert (ours.argmax(1) == peer.argmax(1)).float().mean() > 0.98


@pytest.mark.parametrize("quality", ["default", "compatible", "high"])
@pytest.mark.parametrize("threads", [1, 2])
def test_480x360x11(compare, threads, quality):
    unary, image = make_inputs(11, 360, 480)
    compare(
        ours=lambda: dense_crf(unary, image, iterations=ITERATIONS, quality=quality),
        peer=pydensecrf(unary, image),
        peer_name="pydensecrf",
        threads=threads,
        goal={"v4": (10, 16)[threads - 1], "v3": (6.5, 11)[threads - 1]}
        if quality == "default"
        else None,
        check=check if quality == "compatible" else None,
    )


@pytest.mark.parametrize("photo", [True, False], ids=["photo", "noise"])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_small_images(compare, size, photo):
    """No two pixels of noise share a vertex: the most that a lattice can have to build."""
    unary, image = make_inputs(5, 360, 480)
    if not photo:
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, image.shape, generator=generator, dtype=torch.uint8)
    unary, image = (t[:, :, :size, :size].contiguous() for t in (unary, image))
    compare(
        ours=lambda: dense_crf(unary, image, iterations=ITERATIONS),
        peer=pydensecrf(unary, image),
        peer_name="pydensecrf",
        threads=1,
        goal=1,
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_2048x1024x19(compare, threads):
    unary, image = make_inputs(19, 1024, 2048)
    compare(
        ours=lambda: dense_crf(unary, image, iterations=ITERATIONS),
        peer=pydensecrf(unary, image),
        peer_name="pydensecrf",
        threads=threads,
        goal={"v4": (8, 13)[threads - 1], "v3": (6, 11)[threads - 1]},
    )


@pytest.mark.parametrize("size", [(11, 360, 480), (19, 1024, 2048)])
@pytest.mark.parametrize("threads", [1, 2])
def test_backward(compare, threads, size):
    """The peer is our own forward pass: the goal is a backward pass of 2.5 times its time."""
    unary, image = make_inputs(*size)
    unary.requires_grad_()
    weight = torch.tensor(10.0, requires_grad=True)
    q = dense_crf(unary, image, bilateral=((80.0, 13.0, weight),), iterations=ITERATIONS)
    direction = torch.randn_like(q)

    def forward():
        with torch.no_grad():
            return dense_crf(unary, image, iterations=ITERATIONS)

    compare(
        ours=lambda: torch.autograd.grad(q, (unary, weight), direction, retain_graph=True),
        peer=forward,
        peer_name="its forward pass",
        threads=threads,
        goal=0.4,
        levels=False,
    )


# There is no other dense CRF on CUDA.
def on_cuda(function):
    sizes = pytest.mark.parametrize("size", [(19, 1024, 2048), (11, 360, 480)], ids=str)
    return pytest.mark.gpu(sizes(function))


def inputs_on(device, size, images):
    """A batch on the device, and a check of its result."""
    unary, image = make_inputs(*size)
    expected = dense_crf(unary, image, iterations=ITERATIONS)

    def check(ours, peer):
        assert (ours.cpu() - expected).abs().mean() < 1e-4
        assert torch.equal(ours, peer)

    return [t.to(device).repeat(images, 1, 1, 1) for t in (unary, image)], check


def ten_iterations(unary, image):
    return dense_crf(unary, image, iterations=ITERATIONS)


@on_cuda
def test_cuda_graph(gpu, size):
    """A graph has room for the busiest image; without one the host waits for the true size."""
    inputs, check = inputs_on(gpu.device, size, 1)
    gpu.compare(
        ours=ten_iterations,
        peer=ten_iterations,
        peer_name="no graph",
        peer_runs="eager",
        inputs=inputs,
        goal_ms=3.0 if size[1] == 1024 else 0.25,
        check=check,
    )


@on_cuda
def test_cuda_batch_of_8(gpu, size):
    inputs, check = inputs_on(gpu.device, size, 8)

    def one_by_one(unary, image):
        return torch.cat([ten_iterations(unary[i : i + 1], image[i : i + 1]) for i in range(8)])

    gpu.compare(
        ours=ten_iterations,
        peer=one_by_one,
        peer_name="one by one",
        inputs=inputs,
        goal=1,
        check=check,
        rounds=3,
    )


@on_cuda
def test_cuda_gradients(gpu, size):
    """Forward and backward; the goal is a backward pass of 2.5 times the forward one."""
    (unary, image), _ = inputs_on(gpu.device, size, 1)
    weight = torch.tensor(10.0, device=gpu.device)

    def gradients(unary, image, weight):
        leaves = [t.detach().requires_grad_() for t in (unary, weight)]
        kernels = ((80.0, 13.0, leaves[1]),)
        q = dense_crf(leaves[0], image, bilateral=kernels, iterations=ITERATIONS)
        return torch.autograd.grad(q, leaves, torch.ones_like(q))

    gpu.compare(
        ours=gradients,
        peer=lambda unary, image, weight: ten_iterations(unary, image),
        peer_name="its forward pass",
        inputs=(unary, image, weight),
        goal=1 / 3.5,
    )
