"""Pictures with known answers, and how masks are compared."""

import os
from pathlib import Path

import numpy as np
import pytest

DATA = Path(
    os.environ.get("PYSEG_TEST_DATA", Path(__file__).resolve().parents[4] / "shared" / "data")
)


@pytest.fixture(scope="session")
def data_folder():
    """``data_folder("classical/skimage")``: that part of the test data; skips without it."""

    def find(name):
        if not (DATA / name).is_dir():
            pytest.skip(f"no test data at {DATA / name}: set PYSEG_TEST_DATA")
        return DATA / name

    return find


@pytest.fixture
def colours():
    """``colours(values)``: grey [H, W] as an image [H, W, 3]."""
    return lambda values: np.repeat(np.asarray(values, np.uint8)[:, :, None], 3, 2)


@pytest.fixture
def disc():
    """``disc(shape, centre, radius)``: a mask."""

    def make(shape, centre, radius):
        rows, columns = np.ogrid[: shape[0], : shape[1]]
        return (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2

    return make


@pytest.fixture
def iou():
    return lambda one, other: (one & other).sum() / (one | other).sum()
