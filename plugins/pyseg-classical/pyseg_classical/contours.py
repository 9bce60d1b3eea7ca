"""Contours that move to the edges of an object: snakes, level sets and deformable templates."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize
from skimage import draw, feature, segmentation

from .regions import Image, Mask, TwoClassModel, at_least, grey, one_of, within


def _ellipse(
    shape: tuple[int, int], centre: tuple[float, float], radius: float, points: int
) -> NDArray[np.float64]:
    """Points (y, x) in pixels of an ellipse that is given in shares of the image, [points, 2]."""
    turn = np.linspace(0, 2 * np.pi, points, endpoint=False)
    around = np.stack([np.sin(turn), np.cos(turn)], 1)
    size = np.array(shape) - 1
    return (np.array(centre) + radius * around) * size


def _filled(shape: tuple[int, int], contour: NDArray[np.float64]) -> Mask:
    return draw.polygon2mask(shape, contour)


class _FromEllipse(TwoClassModel):
    """Start of a contour: an ellipse in the image's proportions."""

    def _start(self, centre: tuple[float, float], radius: float, sigma: float) -> None:
        if len(centre) != 2:
            raise ValueError(f"centre must be (y, x), got {centre!r}")
        self.centre = (within("centre", centre[0], 0, 1), within("centre", centre[1], 0, 1))
        self.radius, self.sigma = within("radius", radius, 0.01, 1), at_least("sigma", sigma, 0)

    def _smooth(self, image: Image) -> NDArray[np.float64]:
        return ndimage.gaussian_filter(grey(image) / 255.0, self.sigma)

    def _inside(self, image: Image) -> Mask:
        shape = image.shape[:2]
        return _filled(shape, _ellipse(shape, self.centre, self.radius, 200))


class Snake(_FromEllipse):
    """Active contour (Kass, Witkin and Terzopoulos, 1988), foreground is what it encloses.

    It minimises the sum over the contour of alpha |v'|^2 + beta |v''|^2 - edge |grad I| - line I by
    implicit steps.

    Args:
        centre: (y, x) of the first contour, in shares of the height and width.
        radius: of it, in the same shares.
        alpha: resistance to stretching; larger ones contract.
        beta: resistance to bending.
        edge: weight of the edges.
        line: weight of bright lines; negative = of dark ones.
        gamma: inverse of the time step.
        sigma: of the Gaussian before, in pixels: edges are felt about so far.
        points: of the contour.
        iterations: at most.

    Raises:
        ValueError: in predicting, an image of less than 4 x 4 pixels.
    """

    def __init__(
        self,
        *,
        centre: tuple[float, float] = (0.5, 0.5),
        radius: float = 0.4,
        alpha: float = 0.015,
        beta: float = 10.0,
        edge: float = 1.0,
        line: float = 0.0,
        gamma: float = 0.001,
        sigma: float = 3.0,
        points: int = 200,
        iterations: int = 2500,
    ) -> None:
        self._start(centre, radius, sigma)
        self.alpha, self.beta = at_least("alpha", alpha, 0), at_least("beta", beta, 0)
        self.edge, self.line, self.gamma = edge, line, at_least("gamma", gamma, 1e-6)
        self.points = int(at_least("points", points, 8))
        self.iterations = int(at_least("iterations", iterations, 1))

    def contour(self, image: Image) -> NDArray[np.float64]:
        """Points (y, x) in pixels at rest, [points, 2]."""
        shape = image.shape[:2]
        _require_sides("snake", shape, 4)
        return segmentation.active_contour(
            self._smooth(image),
            _ellipse(shape, self.centre, self.radius, self.points),
            alpha=self.alpha,
            beta=self.beta,
            w_line=self.line,
            w_edge=self.edge,
            gamma=self.gamma,
            max_num_iter=self.iterations,
        )

    def foreground(self, image: Image) -> Mask:
        return _filled(image.shape[:2], self.contour(image))


class GeodesicContour(_FromEllipse):
    """Geodesic active contour (Caselles, Kimmel and Sapiro, 1997) by morphological operations.

    After Marquez-Neila, Baumela and Alvarez (2014): the contour moves with the balloon force where
    g is above a threshold, towards the minima of g = 1 / sqrt(1 + edge |grad(G * I)|), and is
    smoothed.

    Args:
        centre: (y, x) of the first contour, in shares of the height and width.
        radius: of it, in the same shares.
        balloon: -1 contracts it, 1 expands it, 0 does neither.
        edge: how soon edges stop it.
        threshold: of g; None = the value under which 40 % of the image is.
        smoothing: steps of smoothing after each iteration.
        sigma: of the Gaussian before, in pixels.
        iterations: of the evolution: about as many pixels it can go.
    """

    def __init__(
        self,
        *,
        centre: tuple[float, float] = (0.5, 0.5),
        radius: float = 0.45,
        balloon: Literal[-1, 0, 1] = -1,
        edge: float = 1000.0,
        threshold: float | None = None,
        smoothing: int = 1,
        sigma: float = 2.0,
        iterations: int = 200,
    ) -> None:
        self._start(centre, radius, sigma)
        if balloon not in (-1, 0, 1):
            raise ValueError(f"balloon must be -1, 0 or 1, got {balloon}")
        if threshold is not None:
            within("threshold", threshold, 0, 1)
        self.balloon, self.edge, self.threshold = balloon, at_least("edge", edge, 0), threshold
        self.smoothing = int(at_least("smoothing", smoothing, 0))
        self.iterations = int(at_least("iterations", iterations, 1))

    def foreground(self, image: Image) -> Mask:
        _require_sides("geodesic_contour", image.shape[:2], 2)
        g = segmentation.inverse_gaussian_gradient(grey(image) / 255.0, self.edge, self.sigma)
        threshold = np.percentile(g, 40) if self.threshold is None else self.threshold
        fast, slope = g > threshold, np.gradient(g)
        side, turns = self._inside(image), 0
        for _ in range(self.iterations):
            if self.balloon:
                move = ndimage.binary_dilation if self.balloon > 0 else ndimage.binary_erosion
                side = np.where(fast, move(side, np.ones((3, 3))), side)
            pull = sum(a * b for a, b in zip(slope, np.gradient(side.astype(float)), strict=True))
            side = np.where(pull == 0, side, pull > 0)
            side, turns = _smoothed(side, self.smoothing, turns)
        return side


class ChanVese(TwoClassModel):
    """Active contour without edges (Chan and Vese, 2001), by its level-set equation.

    It minimises mu length + the sum of (I - c1)^2 inside and of (I - c2)^2 outside, with the means
    c1 and c2 of both sides; foreground is the brighter one. An image of one colour is all
    background.

    Args:
        mu: weight of the contour's length.
        dark: foreground is the darker side.
        tolerance: it ends where the level set changes less.
        iterations: at most.
        step: of time.
    """

    def __init__(
        self,
        *,
        mu: float = 0.25,
        dark: bool = False,
        tolerance: float = 1e-3,
        iterations: int = 200,
        step: float = 0.5,
    ) -> None:
        self.mu, self.dark = at_least("mu", mu, 0), dark
        self.tolerance = at_least("tolerance", tolerance, 0)
        self.iterations = int(at_least("iterations", iterations, 1))
        self.step = at_least("step", step, 1e-6)

    def foreground(self, image: Image) -> Mask:
        values = grey(image) / 255.0
        if np.ptp(values) == 0:
            return np.zeros(values.shape, bool)
        side = segmentation.chan_vese(
            values,
            mu=self.mu,
            tol=self.tolerance,
            max_num_iter=self.iterations,
            dt=self.step,
        )
        return _brighter(values, side, self.dark)


class MorphologicalChanVese(TwoClassModel):
    """`ChanVese` by morphological operations (Marquez-Neila, Baumela and Alvarez, 2014).

    Args:
        smoothing: steps of smoothing after each iteration.
        dark: foreground is the darker side.
        iterations: of the evolution.
    """

    def __init__(self, *, smoothing: int = 1, dark: bool = False, iterations: int = 60) -> None:
        self.smoothing, self.dark = int(at_least("smoothing", smoothing, 0)), dark
        self.iterations = int(at_least("iterations", iterations, 1))

    def foreground(self, image: Image) -> Mask:
        values = grey(image) / 255.0
        if np.ptp(values) == 0:
            return np.zeros(values.shape, bool)
        _require_sides("morphological_chan_vese", values.shape, 2)
        rows, columns = np.ogrid[: values.shape[0], : values.shape[1]]
        side, turns = (rows // 5 + columns // 5) % 2 == 1, 0  # a chessboard
        for _ in range(self.iterations):
            inside = (values * side).sum() / (side.sum() + 1e-8)
            outside = (values * ~side).sum() / ((~side).sum() + 1e-8)
            border = np.abs(np.gradient(side.astype(float))).sum(0) > 0
            better = (values - inside) ** 2 - (values - outside) ** 2
            side = np.where(border & (better != 0), better < 0, side)
            side, turns = _smoothed(side, self.smoothing, turns)
        return _brighter(values, side, self.dark)


_LINES = (
    np.eye(3),
    np.eye(3)[::-1],
    np.outer([0, 1, 0], [1, 1, 1]),
    np.outer([1, 1, 1], [0, 1, 0]),
)


def _smoothed(side: Mask, steps: int, turns: int) -> tuple[Mask, int]:
    """``steps`` of curvature motion by lines in four directions; how many were made until now.

    Odd and even ones close and open in the other order. Libraries keep this count from one image
    to the next, so that results depend on those before.
    """
    for turn in range(turns, turns + steps):
        for closing in (False, True) if turn % 2 else (True, False):
            if closing:
                side = np.all([ndimage.binary_dilation(side, line) for line in _LINES], 0)
            else:
                side = np.any([ndimage.binary_erosion(side, line) for line in _LINES], 0)
    return side, turns + steps


def _require_sides(name: str, shape: tuple[int, ...], least: int) -> None:
    if min(shape) < least:
        raise ValueError(
            f"{name} takes images from {least} x {least} pixels on, got {shape[0]} x {shape[1]}"
        )


def _brighter(values: NDArray[np.float64], side: Mask, dark: bool) -> Mask:
    """The side with the larger mean, or the other; of one side alone nothing stands out."""
    if side.all() or not side.any():
        return np.zeros(side.shape, bool)
    bright = values[side].mean() > values[~side].mean()
    return side if bright != dark else ~side


class DeformableTemplate(TwoClassModel):
    """A shape that is moved, scaled, turned and bent to fit edges (Jain, Zhong and others, 1996).

    The template's contour is p(t) = c + R(angle) (a x(t), b y(t)) (1 + sum over m = 2…modes of
    u_m cos mt + v_m sin mt). Its energy is minus the mean over the contour of exp(-d / reach)
    |cos b|, with the distance d to the nearest edge and the angle b between the edge's gradient and
    the contour's normal, plus stiffness times the sum of m^2 (u_m^2 + v_m^2). Starts on a grid of
    places and sizes are compared; the best are refined, by Powell's method, with a shrinking reach.

    Args:
        shape: ``"ellipse"`` or ``"rectangle"``.
        min_size: least half axis, in shares of the shorter side.
        max_size: largest one.
        modes: 1 = the shape may not be bent.
        stiffness: resistance to bending.
        sigma: of Canny's Gaussian, in pixels.
        starts: how many are refined.

    Raises:
        ValueError: ``max_size`` is not above ``min_size``.
    """

    def __init__(
        self,
        *,
        shape: Literal["ellipse", "rectangle"] = "ellipse",
        min_size: float = 0.1,
        max_size: float = 0.45,
        modes: int = 3,
        stiffness: float = 0.5,
        sigma: float = 2.0,
        starts: int = 4,
    ) -> None:
        self.shape = one_of("shape", shape, ("ellipse", "rectangle"))
        self.min_size = within("min_size", min_size, 0.01, 1)
        self.max_size = within("max_size", max_size, 0.01, 1)
        if max_size <= min_size:
            raise ValueError(f"max_size must be above min_size={min_size}, got {max_size}")
        self.modes = int(within("modes", modes, 1, 12))
        self.stiffness = at_least("stiffness", stiffness, 0)
        self.sigma, self.starts = at_least("sigma", sigma, 0.1), int(at_least("starts", starts, 1))

    def foreground(self, image: Image) -> Mask:
        contour = self.contour(image)
        shape = image.shape[:2]
        return np.zeros(shape, bool) if contour is None else _filled(shape, contour)

    def contour(self, image: Image) -> NDArray[np.float64] | None:
        """The fitted contour, points (y, x) in pixels, [96, 2]; None in an image without edges."""
        values = grey(image) / 255.0
        height, width = values.shape
        edges = (
            feature.canny(values, self.sigma, mode="nearest") if min(height, width) > 2 else None
        )
        if edges is None or not edges.any():
            return None
        smooth = ndimage.gaussian_filter(values, self.sigma)
        slope = np.stack(np.gradient(smooth))
        slope /= np.maximum(np.linalg.norm(slope, axis=0), 1e-9)
        distance, nearest = ndimage.distance_transform_edt(~edges, return_indices=True)
        field = (distance, slope[:, nearest[0], nearest[1]])
        side = min(height, width)
        starts = [
            np.array([y * height, x * width, np.log(a * side), np.log(b * side), turn])
            for y in np.linspace(0.15, 0.85, 8)
            for x in np.linspace(0.15, 0.85, 8)
            for a, b in self._sizes()
            for turn in ((0.0,) if a == b else (0.0, np.pi / 4))
        ]
        bent = np.zeros(2 * (self.modes - 1))
        starts = [np.concatenate([start, bent]) for start in starts]
        reach = side / 20
        rough = [self._energy(start, field, side, reach) for start in starts]
        best: tuple[float, NDArray[np.float64]] | None = None
        for index in np.argsort(rough, kind="stable")[: self.starts]:
            found = starts[index]
            for closer in (reach, reach / 4, 1.5):
                found = optimize.minimize(
                    self._energy,
                    found,
                    (field, side, closer),
                    method="Powell",
                    options={"maxiter": 4, "xtol": 1e-2, "ftol": 1e-3},
                ).x
            energy = self._energy(found, field, side, 1.5)
            if best is None or energy < best[0]:
                best = energy, found
        assert best is not None
        return self._points(best[1])

    def _sizes(self) -> list[tuple[float, float]]:
        sizes = np.geomspace(self.min_size * 1.05, self.max_size * 0.95, 4)
        return [(a, b) for a in sizes for b in sizes if max(a, b) <= 2 * min(a, b)]

    def _points(self, parameters: NDArray[np.float64], count: int = 96) -> NDArray[np.float64]:
        y, x, a, b, angle = parameters[:5]
        turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
        across, up = np.cos(turn), np.sin(turn)
        if self.shape == "rectangle":
            across, up = (
                v / np.maximum(abs(np.cos(turn)), abs(np.sin(turn))) for v in (across, up)
            )
        bend = np.ones(count)
        for m, (u, v) in enumerate(parameters[5:].reshape(-1, 2), 2):
            bend += u * np.cos(m * turn) + v * np.sin(m * turn)
        across, up = np.exp(a) * across * bend, np.exp(b) * up * bend
        return np.stack(
            [
                y + np.sin(angle) * across + np.cos(angle) * up,
                x + np.cos(angle) * across - np.sin(angle) * up,
            ],
            1,
        )

    def _energy(
        self,
        parameters: NDArray[np.float64],
        field: tuple[NDArray[np.float64], NDArray[np.float64]],
        side: int,
        reach: float,
    ) -> float:
        """Of the contour; a penalty for sizes out of range. The image repeats at its border."""
        distance, slope = field
        points = self._points(parameters)
        tangent = np.roll(points, -1, 0) - np.roll(points, 1, 0)
        length = np.maximum(np.linalg.norm(tangent, axis=1), 1e-9)
        normal = np.stack([-tangent[:, 1], tangent[:, 0]], 1) / length[:, None]
        limits = np.array(distance.shape) - 1
        whole = np.clip(np.rint(points), 0, limits).astype(int)
        outside = np.abs(points - whole).max(1) > 1
        rows, columns = whole.T
        fit = np.exp(-distance[rows, columns] / reach)
        fit *= np.abs((normal * slope[:, rows, columns].T).sum(1)) * ~outside
        # By length, or points would gather where the fit is good.
        mean = float((fit * length).sum() / length.sum())
        modes = np.repeat(np.arange(2, self.modes + 1), 2)
        bending = self.stiffness * float((modes**2 * parameters[5:] ** 2).sum())
        low, high = np.log(self.min_size * side), np.log(self.max_size * side)
        size = parameters[2:4]
        beyond = np.maximum(size - high, 0).sum() + np.maximum(low - size, 0).sum()
        return -mean + bending + float(beyond)
