"""Pictures with known answers, and how masks are compared."""

import numpy as np
import pytest


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
