"""How good a mask is, without knowing the truth: features, regressors, calibration, splits.

The paper names the kinds of features (geometry and intensity of the region, behaviour of the
worker), not each of them; which ones, the regressors and their settings are a design of ours.
"""

from __future__ import annotations

import functools
import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pyseg.errors import LabelError, PysegError, SpecError
from pyseg.files import replacing, some

from .annotators import Submission
from .tasks import Task

GROUPS: dict[str, tuple[str, ...]] = {
    "geometry": (
        "radius",  # square root of the area, log pixels
        "share",  # of the window
        "compactness",  # 4 pi area / perimeter^2
        "solidity",  # area / that of the convex hull
        "eccentricity",
        "extent",  # area / that of its box
        "parts",  # log of the number of connected parts
        "largest",  # share of the largest part
        "holes",  # area of holes / area
        "border",  # share of the window's border that it touches
        "offset",  # of its centroid from the task's point, in radii
        "hit",  # whether it has the task's point
    ),
    "intensity": (
        "mean",  # grey, 0 to 1
        "spread",  # standard deviation within
        "ring_spread",  # and in a ring around
        "contrast",  # difference of mean colours, within and around
        "separation",  # the same in standard deviations
        "overlap",  # Bhattacharyya coefficient of grey histograms, within and around
        "core",  # difference of mean colours, rim within and core
    ),
    "boundary": (
        "edge",  # mean gradient along the boundary / mean gradient of the window
        "strong",  # share of boundary pixels among the window's strongest fifth
        "aligned",  # mean |cosine| between the image's gradient and the boundary's normal
        "inner_edge",  # gradient one step inside / on the boundary
        "outer_edge",  # and one step outside
        "roughness",  # 1 - Jaccard index with the mask smoothed
    ),
    "behaviour": (
        "clicks",  # log
        "density",  # clicks / perimeter
        "seconds",  # log
        "pace",  # seconds / click, log
    ),
}
NAMES = tuple(name for group in GROUPS.values() for name in group)
LEAST = 30  # annotations to be trained on


def features(task: Task, submission: Submission) -> np.ndarray:
    """Of one annotation, [F] float64 in the order of `NAMES`; nan where something is not known.

    Args:
        task: what was to be drawn; its truth is not looked at.
        submission: the mask, [h, w] of the task's window, and how it was drawn.

    Raises:
        LabelError: the mask is not bool or of another size than the window.
    """
    mask = submission.mask
    if mask.dtype != np.bool_ or mask.shape != task.size:
        raise LabelError(
            f"object {task.id!r}: a mask must be bool {list(task.size)}, the size of its window, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    values = dict.fromkeys(NAMES, np.nan)
    area = int(mask.sum())
    edge = 0.0
    if area:
        edge = _geometry(values, task, mask, area)
        _appearance(values, task, mask)
    if submission.clicks is not None:
        values["clicks"] = np.log1p(submission.clicks)
        values["density"] = submission.clicks / max(edge, 1.0)
    if submission.seconds is not None:
        values["seconds"] = np.log1p(submission.seconds)
        if submission.clicks is not None:
            values["pace"] = np.log(max(submission.seconds, 1e-3) / max(submission.clicks, 1))
    return np.array([values[name] for name in NAMES])


def _geometry(values: dict[str, float], task: Task, mask: np.ndarray, area: int) -> float:
    from scipy import ndimage
    from scipy.spatial import ConvexHull

    from .annotators import _perimeter

    height, width = mask.shape
    rows, columns = mask.nonzero()
    edge = _perimeter(mask)
    radius = np.sqrt(area / np.pi)
    values["radius"] = np.log(radius)
    values["share"] = area / mask.size
    values["compactness"] = 4 * np.pi * area / edge**2
    # Corners of pixels, of which the hull has an area of the same measure.
    first = np.flatnonzero(mask.any(1))
    left, right = mask[first].argmax(1), width - mask[first, ::-1].argmax(1)
    ends = np.concatenate([np.stack([first, left], 1), np.stack([first, right], 1)])
    corners = np.concatenate([ends, ends + np.array([1, 0])])
    values["solidity"] = area / ConvexHull(corners).volume  # in two dimensions, the area
    covariance = np.cov(np.stack([rows, columns])) if area > 1 else np.zeros((2, 2))
    low, high = np.linalg.eigvalsh(covariance + np.eye(2) / 12)  # of a pixel itself
    values["eccentricity"] = np.sqrt(max(0.0, 1 - low / high))
    values["extent"] = area / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    parts, count = ndimage.label(mask)
    values["parts"] = np.log(count)
    values["largest"] = np.bincount(parts.ravel())[1:].max() / area
    values["holes"] = (ndimage.binary_fill_holes(mask).sum() - area) / area
    border = mask[0].sum() + mask[-1].sum() + mask[:, 0].sum() + mask[:, -1].sum()
    values["border"] = border / (2 * (height + width))
    x, y = task.point
    values["offset"] = np.hypot(rows.mean() - y, columns.mean() - x) / radius
    values["hit"] = float(mask[y, x])
    return edge


@functools.lru_cache(maxsize=64)
def _window(task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float, float]:
    """Colours 0..1, grey, gradient down and right, its mean and its strongest fifth's bound."""
    from scipy import ndimage

    colours = task.crop().astype(np.float64) / 255
    grey = colours.mean(2)
    smooth = ndimage.gaussian_filter(grey, 1.0)
    down, right = np.gradient(smooth) if min(grey.shape) > 1 else (grey * 0, grey * 0)
    size = np.hypot(down, right)
    return colours, grey, down, right, float(size.mean()) + 1e-6, float(np.quantile(size, 0.8))


def _appearance(values: dict[str, float], task: Task, mask: np.ndarray) -> None:
    from scipy import ndimage

    from .annotators import signed_distance

    colours, grey, down, right, usual, strong = _window(task)
    distance = signed_distance(mask)
    radius = np.sqrt(mask.sum() / np.pi)
    width = max(2.0, 0.3 * radius)
    ring = (distance < 0) & (distance > -width)
    inner = grey[mask]
    values["mean"], values["spread"] = inner.mean(), inner.std()
    if ring.any():
        outer = grey[ring]
        values["ring_spread"] = outer.std()
        difference = colours[mask].mean(0) - colours[ring].mean(0)
        values["contrast"] = np.abs(difference).mean()
        values["separation"] = values["contrast"] / (inner.std() + outer.std() + 0.02)
        one, other = (np.histogram(v, 16, (0, 1))[0] / len(v) for v in (inner, outer))
        values["overlap"] = np.sqrt(one * other).sum()
    rim = mask & (distance < width)
    core = mask & ~rim
    apart = core.any() and rim.any()
    values["core"] = np.abs(colours[core].mean(0) - colours[rim].mean(0)).mean() if apart else 0.0
    on = np.abs(distance) < 1
    if on.any():
        size = np.hypot(down, right)
        values["edge"] = size[on].mean() / usual
        values["strong"] = (size[on] > strong).mean()
        normal = (
            np.gradient(ndimage.gaussian_filter(distance, 1.0)) if min(mask.shape) > 1 else None
        )
        if normal is not None:
            ny, nx = normal[0][on], normal[1][on]
            dot = np.abs(ny * down[on] + nx * right[on])
            values["aligned"] = (dot / (np.hypot(ny, nx) * size[on] + 1e-6)).mean()
        for name, low, high in (("inner_edge", 1.5, 3.5), ("outer_edge", -3.5, -1.5)):
            near = (distance > low) & (distance < high)
            values[name] = size[near].mean() / (size[on].mean() + 1e-6) if near.any() else 1.0
    smooth = ndimage.gaussian_filter(mask.astype(float), max(1.0, radius / 6)) > 0.5
    values["roughness"] = 1 - jaccard(mask, smooth)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two masks; 1 of two empty ones."""
    union = int((one | other).sum())
    return float((one & other).sum() / union) if union else 1.0


# --- regressors -----------------------------------------------------------------------------------


class Regressor(Protocol):
    """From features [N, F], which may have nan, to Jaccard indices [N]."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> Any: ...

    def predict(self, X: np.ndarray) -> np.ndarray: ...


def _ridge(seed: int) -> Any:
    """Of features, their squares and products; what is not known is the mean, and said to be so.

    Features are bounded, as the squares of strange ones would carry a prediction far off.
    """
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import (
        FunctionTransformer,
        PolynomialFeatures,
        RobustScaler,
        StandardScaler,
    )

    return make_pipeline(
        SimpleImputer(add_indicator=True, keep_empty_features=True),
        RobustScaler(),
        FunctionTransformer(np.clip, kw_args={"a_min": -4, "a_max": 4}),
        PolynomialFeatures(2, include_bias=False),
        StandardScaler(),
        RidgeCV(np.logspace(0, 4, 9)),
    )


class _Boosting:
    """Boosted trees of the features that some example has: of others there is nothing to bin."""

    def __init__(self, seed: int) -> None:
        from sklearn.ensemble import HistGradientBoostingRegressor

        self._trees = HistGradientBoostingRegressor(
            max_iter=250,
            learning_rate=0.05,
            max_leaf_nodes=12,
            min_samples_leaf=15,
            l2_regularization=1.0,
            early_stopping=False,
            random_state=seed,
        )

    def fit(self, X: np.ndarray, y: np.ndarray) -> Any:
        self._known = ~np.isnan(X).all(0)
        return self._trees.fit(self._some(X), y)

    def predict(self, X: np.ndarray) -> Any:
        return self._trees.predict(self._some(X))

    def _some(self, X: np.ndarray) -> np.ndarray:
        return X[:, self._known] if self._known.any() else np.zeros((len(X), 1))


REGRESSORS: dict[str, Callable[[int], Regressor]] = {"ridge": _ridge, "boosting": _Boosting}


# --- the predictor --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Examples:
    """Annotations whose Jaccard index with the truth is known."""

    features: np.ndarray  # [N, F], see `NAMES`
    jaccard: np.ndarray  # [N]
    objects: np.ndarray  # [N] ids
    workers: np.ndarray  # [N] names

    def __len__(self) -> int:
        return len(self.jaccard)

    def some(self, chosen: np.ndarray) -> Examples:
        """Those of a mask or of indices."""
        return Examples(
            self.features[chosen], self.jaccard[chosen], self.objects[chosen], self.workers[chosen]
        )

    @classmethod
    def of(cls, annotated: Sequence[tuple[Task, Submission]]) -> Examples:
        """From tasks with a truth and what was drawn of them.

        Raises:
            LabelError: a task has no truth.
        """
        rows, scores = [], []
        for task, submission in annotated:
            if task.truth is None:
                raise LabelError(
                    f"object {task.id!r} has no truth to be compared with; give objects that have"
                )
            rows.append(features(task, submission))
            scores.append(jaccard(task.truth, submission.mask))
        return cls(
            np.array(rows).reshape(-1, len(NAMES)),
            np.array(scores),
            np.array([task.id for task, _ in annotated]),
            np.array([submission.worker for _, submission in annotated]),
        )


def split(examples: Examples, share: float = 0.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two parts that have neither an object nor a worker in common.

    What pairs an object of one part with a worker of the other is in neither.

    Args:
        examples: annotations.
        share: of objects and of workers that go to the second part.
        seed: of the draw.

    Raises:
        PysegError: a part is empty: there is one worker, or one object.
    """
    rng = np.random.default_rng(seed)
    later = []
    for names, what in ((examples.objects, "object"), (examples.workers, "worker")):
        known = np.unique(names)
        if len(known) < 2:
            raise PysegError(
                f"a split needs two {what}s at least, got {len(known)}; there is nothing to say "
                f"about {what}s that were not trained on"
            )
        count = min(len(known) - 1, max(1, round(share * len(known))))
        later.append(np.isin(names, rng.permutation(known)[:count]))
    train, test = ~later[0] & ~later[1], later[0] & later[1]
    if not train.any() or not test.any():
        raise PysegError("the split leaves a part empty: workers share too few objects")
    return np.flatnonzero(train), np.flatnonzero(test)


class QualityPredictor:
    """A calibrated regressor of masks' quality.

    The regressor learns from all examples. How its outputs map to Jaccard indices is learnt from
    predictions for objects that it had not seen, by isotonic regression over folds of objects.

    Args:
        examples: annotations whose quality is known.
        regressor: a key of `REGRESSORS`.
        without: groups of features that are left out, keys of `GROUPS`.
        seed: of boosting and folds.

    Raises:
        SpecError: no such regressor or group, or no feature is left.
        PysegError: too few examples, or all of one object.

    Example:
        >>> predictor = QualityPredictor(Examples.of(annotated), "boosting")
        >>> predictor.predict(task, submission)
        0.87
    """

    def __init__(
        self,
        examples: Examples,
        regressor: str = "boosting",
        *,
        without: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        if regressor not in REGRESSORS:
            raise SpecError(f"regressor must be one of {some(REGRESSORS)}, got {regressor!r}")
        if unknown := set(without) - set(GROUPS):
            raise SpecError(f"without must be of {some(GROUPS)}, got {some(unknown)}")
        self.regressor, self.without, self.seed = regressor, tuple(sorted(set(without))), seed
        self.columns = np.array(
            [
                k
                for k, name in enumerate(NAMES)
                if not any(name in GROUPS[group] for group in self.without)
            ],
            int,
        )
        if not len(self.columns):
            raise SpecError("without leaves no feature to learn from")
        if len(examples) < LEAST:
            raise PysegError(
                f"quality is learnt from {LEAST} annotations at least, got {len(examples)}; "
                "annotate more objects whose truth is known"
            )
        if not np.isfinite(examples.jaccard).all():
            raise PysegError("examples: a Jaccard index is not finite")
        self.examples = examples
        self._fit()

    def _fit(self) -> None:
        from sklearn.isotonic import IsotonicRegression
        from sklearn.model_selection import GroupKFold

        X, y = self.examples.features[:, self.columns], self.examples.jaccard
        folds = min(5, len(np.unique(self.examples.objects)))
        if folds < 2:
            raise PysegError("quality is learnt from two objects at least, got one")
        unseen = np.zeros(len(y))
        for train, test in GroupKFold(folds).split(X, y, self.examples.objects):
            part = REGRESSORS[self.regressor](self.seed)
            part.fit(X[train], y[train])
            unseen[test] = part.predict(X[test])
        self._calibration = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(
            unseen, y
        )
        self._regressor = REGRESSORS[self.regressor](self.seed)
        self._regressor.fit(X, y)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells predictors apart: of examples and settings."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.regressor, self.without, self.seed, NAMES)).encode())
        digest.update(np.ascontiguousarray(self.examples.features).tobytes())
        digest.update(np.ascontiguousarray(self.examples.jaccard).tobytes())
        return digest.hexdigest()

    def predict(self, task: Task, submission: Submission) -> float:
        """Jaccard index of one mask with the unknown truth, 0 to 1; 0 of an empty one."""
        if not submission.mask.any():
            return 0.0
        return float(self.predict_features(features(task, submission)[None])[0])

    def predict_features(self, rows: np.ndarray) -> np.ndarray:
        """The same of features, [N, F]: [N]."""
        raw = self._regressor.predict(rows[:, self.columns])
        result: np.ndarray = np.clip(self._calibration.predict(raw), 0.0, 1.0)
        return result

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes what it learnt from, ``.npz``: `load` learns it anew, so no code is stored."""
        path = Path(path)
        with replacing(path) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(
                stream,
                names=np.array(NAMES),
                features=self.examples.features,
                jaccard=self.examples.jaccard,
                objects=self.examples.objects.astype(str),
                workers=self.examples.workers.astype(str),
                regressor=np.array(self.regressor),
                without=np.array(self.without, dtype=str),
                seed=np.array(self.seed),
            )
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QualityPredictor:
        """Reads what `save` wrote.

        Raises:
            PysegError: there is no such file, it is damaged, or of other features.
        """
        where = f"quality {os.fspath(path)!r}"
        try:
            with np.load(path, allow_pickle=False) as stored:
                value: Mapping[str, np.ndarray] = {key: stored[key] for key in stored.files}
            if tuple(value["names"].tolist()) != NAMES:
                raise PysegError(
                    f"{where} is of other features; train it anew: pyseg annotate train"
                )
            keys = ("features", "jaccard", "objects", "workers")
            examples = Examples(*(value[key] for key in keys))
            return cls(
                examples,
                str(value["regressor"]),
                without=value["without"].tolist(),
                seed=int(value["seed"]),
            )
        except FileNotFoundError as error:
            raise PysegError(f"{where} does not exist; `pyseg annotate train` makes it") from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, PysegError):
                raise
            raise PysegError(f"{where} cannot be read ({error}); train it anew") from error


# --- how well it predicts -------------------------------------------------------------------------


def judge(predicted: np.ndarray, known: np.ndarray, threshold: float) -> dict[str, float]:
    """Predictions held against known Jaccard indices, both [N].

    Returns:
        ``mae``; ``r`` (Pearson); ``calibration``, the mean distance over ten equally filled bins
        between mean prediction and mean truth; of what is accepted at ``threshold`` the share
        (``accepted``), the mean Jaccard index (``accepted_jaccard``) and the share that is below
        the threshold in truth (``false_accepts``). nan where nothing is.
    """
    bins = np.array_split(np.argsort(predicted, kind="stable"), min(10, len(known)))
    weights = np.array([len(part) for part in bins])
    gaps = np.array([abs(predicted[part].mean() - known[part].mean()) for part in bins])
    accepted = predicted >= threshold
    constant = np.ptp(predicted) == 0 or np.ptp(known) == 0
    return {
        "mae": float(np.abs(predicted - known).mean()),
        "r": float("nan") if constant else float(np.corrcoef(predicted, known)[0, 1]),
        "calibration": float((weights * gaps).sum() / weights.sum()),
        "accepted": float(accepted.mean()),
        "accepted_jaccard": float(known[accepted].mean()) if accepted.any() else float("nan"),
        "false_accepts": (
            float((known[accepted] < threshold).mean()) if accepted.any() else float("nan")
        ),
    }


def ablate(
    examples: Examples,
    *,
    regressors: Sequence[str] = tuple(REGRESSORS),
    share: float = 0.5,
    seed: int = 0,
    threshold: float = 0.83,
) -> dict[str, dict[str, float]]:
    """`judge` on objects and workers that were not trained on: all features, without each group.

    Args:
        examples: annotations whose quality is known.
        regressors: keys of `REGRESSORS`.
        share: see `split`.
        seed: of split and regressors.
        threshold: see `judge`.

    Returns:
        By regressor and what is left out, such as ``"boosting"``, ``"ridge without behaviour"``.
    """
    train, test = split(examples, share, seed)
    found = {}
    for regressor in regressors:
        for without in ((), *((group,) for group in GROUPS)):
            predictor = QualityPredictor(
                examples.some(train), regressor, without=without, seed=seed
            )
            rows = examples.some(test)
            name = " without ".join([regressor, *without])
            found[name] = judge(predictor.predict_features(rows.features), rows.jaccard, threshold)
    return found
