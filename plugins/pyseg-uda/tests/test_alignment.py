"""Colours of another image: moments, and frequencies by NumPy's shifted transform."""

import numpy as np
import pytest
import torch
from pyseg_uda.alignment import align, align_covariance, align_fourier, align_mean


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    image = 0.5 + 0.05 * torch.einsum(
        "ij,jhw->ihw", mix, torch.randn(3, 40, 50, generator=generator, dtype=torch.float64)
    )
    like = 0.3 + 0.1 * torch.rand(3, 30, 40, generator=generator, dtype=torch.float64).cumsum(0)
    return image, like


def moments(image):
    pixels = image.flatten(1).numpy()
    return pixels.mean(1), np.cov(pixels, bias=True)


def test_means_and_covariances_are_those_of_the_other(pair):
    mean, covariance = moments(pair[1])
    moved = moments(align_mean(*pair))
    assert moved[0] == pytest.approx(mean)
    assert np.diag(moved[1]) == pytest.approx(np.diag(covariance), rel=1e-3)
    moved = moments(align_covariance(*pair))
    assert moved[0] == pytest.approx(mean)
    assert moved[1] == pytest.approx(covariance, rel=1e-2, abs=1e-5)


def test_the_map_of_colours_is_symmetric_and_nothing_moves_to_itself(pair):
    image, like = pair
    moved = align_covariance(image, like)
    centred = image.flatten(1) - image.flatten(1).mean(1, keepdim=True)
    result = moved.flatten(1) - moved.flatten(1).mean(1, keepdim=True)
    map = np.linalg.lstsq(centred.T.numpy(), result.T.numpy(), rcond=None)[0]
    assert map == pytest.approx(map.T, abs=1e-6) and (np.linalg.eigvalsh(map) > 0).all()
    for function in (align_mean, align_covariance):
        assert torch.allclose(function(image, image), image)
    assert torch.allclose(align_fourier(image, image, 0.1), image)


@pytest.mark.parametrize(("height", "width"), [(40, 50), (41, 33)])
@pytest.mark.parametrize("beta", [0.0, 0.05, 0.2])
def test_low_frequencies_have_the_amplitudes_of_the_other(height, width, beta):
    generator = torch.Generator().manual_seed(0)
    image, like = torch.rand(2, 3, height, width, generator=generator, dtype=torch.float64)
    own, other = (np.fft.fftshift(np.fft.fft2(x.numpy()), (1, 2)) for x in (image, like))
    amplitude, reach = np.abs(own), int(min(height, width) * beta)
    y, x = height // 2, width // 2
    square = np.s_[:, y - reach : y + reach + 1, x - reach : x + reach + 1]
    amplitude[square] = np.abs(other)[square]
    wanted = np.fft.ifft2(np.fft.ifftshift(amplitude * np.exp(1j * np.angle(own)), (1, 2))).real
    assert align_fourier(image, like, beta).numpy() == pytest.approx(wanted, abs=1e-9)


def test_images_are_uint8_of_any_size_and_plain_ones_are_finite():
    generator = torch.Generator().manual_seed(0)
    like = torch.randint(80, 150, (3, 20, 31), generator=generator, dtype=torch.uint8)
    image = torch.randint(0, 256, (3, 33, 27), generator=generator, dtype=torch.uint8)
    for kind in ("mean", "covariance", "fourier"):
        for one in (image, torch.full((3, 33, 27), 7, dtype=torch.uint8)):
            found = align(one, like, kind)
            assert found.dtype == torch.uint8 and found.shape == one.shape
            assert abs(found.float().mean() - like.float().mean()) < 3
    with pytest.raises(ValueError, match=r"align must be one of mean, covariance, fourier"):
        align(image, like, "colour")
