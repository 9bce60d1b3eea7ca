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
        goal={1: 10, 2: 16}[threads] if quality == "default" else None,
        check=check if quality == "compatible" else None,
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_2048x1024x19(compare, threads):
    unary, image = make_inputs(19, 1024, 2048)
    compare(
        ours=lambda: dense_crf(unary, image, iterations=ITERATIONS),
        peer=pydensecrf(unary, image),
        peer_name="pydensecrf",
        threads=threads,
        goal={1: 8, 2: 13}[threads],
    )
