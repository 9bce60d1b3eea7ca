"""Thresholds on grey values: one for the image, several, or one for every pixel."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from skimage import filters

from .regions import (
    Image,
    Map,
    Mask,
    RegionModel,
    TwoClassModel,
    at_least,
    connected,
    grey,
    merge_small,
    one_of,
    within,
)


class Threshold(TwoClassModel):
    """Global threshold: foreground is f(x, y) > T.

    Args:
        value: T on the scale 0..255.
        dark: foreground is what is at most T.
    """

    def __init__(self, *, value: float = 127.0, dark: bool = False) -> None:
        self.value, self.dark = within("value", value, 0, 255), dark

    def level(self, values: NDArray[np.uint8]) -> float | NDArray[np.float64]:
        """T of grey values [H, W]: one number, or one for each pixel [H, W]."""
        return self.value

    def foreground(self, image: Image) -> Mask:
        values = grey(image)
        if values.min() == values.max() and type(self) is not Threshold:
            return np.zeros(values.shape, bool)  # one colour: nothing stands out from anything
        above = values > self.level(values)
        return ~above if self.dark else above


class Otsu(Threshold):
    """The global threshold that parts the histogram best (Otsu, 1979).

    It maximises the variance between the two classes, w0 w1 (m0 - m1)^2 with their shares w and
    means m. An image of one colour is all background.

    Args:
        dark: foreground is the darker class.
    """

    def __init__(self, *, dark: bool = False) -> None:
        self.dark = dark

    def level(self, values: NDArray[np.uint8]) -> float:
        return float(filters.threshold_otsu(values))


class Triangle(Threshold):
    """The global threshold farthest below the line from the histogram's peak to its far end.

    After Zack, Rogers and Latt (1977): for one large peak with a long tail. An image of one colour
    is all background.

    Args:
        dark: foreground is the darker class.
    """

    def __init__(self, *, dark: bool = False) -> None:
        self.dark = dark

    def level(self, values: NDArray[np.uint8]) -> float:
        return float(filters.threshold_triangle(values))


class LocalThreshold(Threshold):
    """A threshold of its own for every pixel, from its neighbourhood: for uneven light.

    T(x, y) is a mean of the block around the pixel less ``offset`` (``"gaussian"``-weighted,
    ``"mean"`` or ``"median"``), or that of Niblack, m - k s (``"niblack"``), or of Sauvola and
    Pietikainen (2000), m (1 + k (s / 127.5 - 1)) (``"sauvola"``), with the block's mean m and
    standard deviation s. An image of one colour is all background.

    Args:
        method: see above.
        block_size: odd side of the block in pixels, from 3; the Gaussian has a sixth of it as its
            standard deviation.
        offset: of the first three, in grey values.
        k: of the last two.
        dark: foreground is what is at most T, such as ink.
    """

    def __init__(
        self,
        *,
        method: Literal["gaussian", "mean", "median", "niblack", "sauvola"] = "gaussian",
        block_size: int = 35,
        offset: float = 0.0,
        k: float = 0.2,
        dark: bool = False,
    ) -> None:
        self.method = one_of("method", method, ("gaussian", "mean", "median", "niblack", "sauvola"))
        if block_size < 3 or block_size % 2 == 0:
            raise ValueError(f"block_size must be odd and at least 3, got {block_size}")
        self.block_size, self.offset, self.k, self.dark = block_size, offset, k, dark

    def level(self, values: NDArray[np.uint8]) -> NDArray[np.float64]:
        exact = values.astype(np.float64)
        if self.method == "niblack":
            return filters.threshold_niblack(exact, self.block_size, self.k)
        if self.method == "sauvola":
            return filters.threshold_sauvola(exact, self.block_size, self.k, r=127.5)
        return filters.threshold_local(exact, self.block_size, self.method, self.offset)


class Hysteresis(TwoClassModel):
    """Two thresholds: what is above ``high``, and what is above ``low`` and connected with it.

    Args:
        low: on the scale 0..255; None = half of Otsu's threshold of the image.
        high: None = Otsu's threshold.

    Raises:
        ValueError: ``low`` is above ``high``.
    """

    def __init__(self, *, low: float | None = None, high: float | None = None) -> None:
        for name, value in (("low", low), ("high", high)):
            if value is not None:
                within(name, value, 0, 255)
        if low is not None and high is not None and low > high:
            raise ValueError(f"low must be at most high={high}, got {low}")
        self.low, self.high = low, high

    def foreground(self, image: Image) -> Mask:
        values = grey(image)
        otsu = float(filters.threshold_otsu(values)) if values.min() < values.max() else 255.0
        high = otsu if self.high is None else self.high
        low = min(otsu / 2, high) if self.low is None else min(self.low, high)
        return filters.apply_hysteresis_threshold(values, low, high)


class MultiOtsu(RegionModel):
    """Otsu's criterion with several thresholds: regions are what lies between two of them.

    After Liao, Chen and Chung (2001). An image with no more grey values than classes has a class
    for each value.

    Args:
        classes: grey levels that are told apart, 2 to 5: the search takes 256^(classes - 1) steps.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
        whole: a class is one region wherever it lies, not as many as it has connected parts.
    """

    def __init__(self, *, classes: int = 3, min_size: int = 1, whole: bool = False) -> None:
        # `classes` is the model's, by protocol.
        self.levels = int(within("classes", classes, 2, 5))
        self.min_size, self.whole = int(at_least("min_size", min_size, 0)), whole

    def regions(self, image: Image) -> Map:
        values = grey(image)
        present = np.unique(values)
        if len(present) <= self.levels:
            parts = np.searchsorted(present, values)
        else:
            parts = np.digitize(values, filters.threshold_multiotsu(values, self.levels), True)
        return parts if self.whole else merge_small(connected(parts), image, self.min_size)
