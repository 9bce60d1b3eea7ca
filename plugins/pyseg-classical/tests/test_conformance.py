"""Every model of this package, by pyseg's own suite and on images with nothing in them."""

import importlib.metadata

import pytest
import torch

import pyseg
from pyseg import testing

NAMES = sorted(
    point.name
    for point in importlib.metadata.entry_points(group="pyseg.models")
    if point.value.startswith("pyseg_classical.")
)
# By default some make as many superpixels as the suite's images have pixels, which takes minutes.
FEW = {"superpixels": 150}
QUICK = {
    "average_cut": FEW,
    "deformable_template": {"starts": 1, "modes": 1},
    "gaussian_mixture": {"k": 2},
    "mean_shift_features": FEW,
    "mrf": {"k": 2},
    "normalized_cut": FEW,
    "optics": FEW,
}


@pytest.mark.parametrize("name", NAMES)
def test_conforms(name, one_thread):
    testing.check_model(name, **QUICK.get(name, {}))


@pytest.mark.parametrize("name", NAMES)
def test_images_with_nothing_in_them(name, one_thread):
    """One colour and one pixel: one region or none, no foreground, or an error of ours."""
    model = pyseg.models.create(name, **QUICK.get(name, {}))
    for size in ((1, 1), (9, 13), (40, 30)):
        image = torch.full((3, *size), 120, dtype=torch.uint8)
        try:
            result = model.predict([image])[0]
        except ValueError as error:
            assert size == (1, 1) and "pixels" in str(error)
            continue
        if result.segments is not None:
            assert len(result.segments.items) <= 1 or name in PARTING
        elif name not in SHAPED:
            assert not result.labels.any()


# These part by position, too.
PARTING = (
    *("slic", "quickshift", "dbscan", "mean_shift_features", "optics", "spectral"),
    "normalized_cut",
)
SHAPED = ("snake", "geodesic_contour")  # what is left of the ellipse that they begin with


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
