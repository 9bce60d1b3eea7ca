"""Who annotates: simulated workers, masks that were drawn before, files of other tools, a network.

`Annotators` is the protocol. Whoever cannot answer yet returns None: `engine.collect` then leaves
the object waiting, and asks again in its next run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pyseg.errors import PysegError, SpecError
from pyseg.files import some
from pyseg.formats import Annotation, Region

from .tasks import Task


@dataclass(frozen=True, eq=False)
class Submission:
    """One mask of one object by one worker."""

    mask: np.ndarray  # [h, w] bool, of the task's window
    worker: str
    clicks: int | None = None  # or corners of polygons; None = not known
    seconds: float | None = None


class Annotators(Protocol):
    """Those who can be asked for masks."""

    @property
    def workers(self) -> Sequence[str]:
        """Who there is: as many rounds can be held, since nobody draws an object twice."""
        ...

    def annotate(self, task: Task, taken: Sequence[str]) -> Submission | None:
        """Another mask of an object, by somebody who is not among ``taken``; None = not yet."""
        ...


# --- simulated workers ----------------------------------------------------------------------------

DRIFT, BIAS = 6.0, 3.0  # pixels, of an object of RADIUS, for a worker without skill
HAND = 0.5  # pixels, by which the steadiest hand trembles
RADIUS = 20.0
SPAM = (0.03, 0.1)  # share of spam of a perfect worker, and what no skill adds


class SimulatedWorkers:
    """Workers with a skill s ~ Beta(5, 2), who know the truth and draw it as well as they can.

    The boundary of the truth moves by smooth Gaussian noise of 6 (1 - s) pixels and a bias of
    N(0, 3 (1 - s)) pixels, half of it the worker's own, for an object of 20 pixels' radius and in
    proportion for others, by more where the object hardly differs from what is around it; and by
    half a pixel for the best hand. With
    probability .03 + .1 (1 - s) the mask is spam: elsewhere, a rectangle, or a blob. Good workers
    click more often and take more time, so that **behaviour tells skill by construction**: a gain
    of behaviour features with these workers says nothing about people.

    What a worker draws of an object depends on the seed, worker and object alone.

    Args:
        workers: how many.
        seed: of everything.
        first: number of the first worker: pools of one seed with other numbers share nobody.

    Raises:
        SpecError: fewer than one worker.
    """

    def __init__(self, workers: int = 20, seed: int = 0, first: int = 0) -> None:
        if workers < 1:
            raise SpecError(f"workers must be 1 or more, got {workers}")
        self.seed = seed
        self.workers = tuple(f"worker {first + k}" for k in range(workers))

    def skill(self, worker: str) -> float:
        """Of a worker, 0 to 1."""
        return float(self._draw(worker).beta(5, 2))

    def annotate(self, task: Task, taken: Sequence[str]) -> Submission | None:
        if task.truth is None:
            raise PysegError(
                f"object {task.id!r} has no truth, which simulated workers need; make the file of "
                "objects with --truth"
            )
        free = [worker for worker in self.workers if worker not in taken]
        if not free:
            return None
        order = self._draw(task.id).permutation(len(self.workers))
        worker = next(w for k in order if (w := self.workers[k]) in free)
        return self.draw(task, worker)

    def draw(self, task: Task, worker: str) -> Submission:
        """What this worker draws of an object with a truth."""
        from scipy import ndimage

        truth = task.truth
        assert truth is not None
        rng = self._draw(task.id, worker)
        s = self.skill(worker)
        own = float(self._draw(worker, "bias").normal())
        radius = np.sqrt(max(truth.sum(), 1) / np.pi)
        scale = float(np.clip(radius / RADIUS, 0.2, 2)) * _difficulty(task.crop(), truth)
        spam = rng.random() < SPAM[0] + SPAM[1] * (1 - s)
        if spam:
            mask = _spam(rng, truth, radius)
        else:
            noise = ndimage.gaussian_filter(rng.normal(size=truth.shape), max(1.5, radius / 3))
            noise *= (HAND + DRIFT * (1 - s) * scale) / max(noise.std(), 1e-9)
            bias = (own + rng.normal()) / np.sqrt(2) * BIAS * (1 - s) * scale
            mask = signed_distance(truth) + noise + bias > 0
        edge = _perimeter(mask)
        spacing = (3 + 12 * (1 - s)) * max(0.5, min(2.0, radius / RADIUS))
        clicks = 3 + int(rng.integers(3)) if spam else 3 + int(rng.poisson(edge / spacing))
        pace = rng.lognormal(np.log(0.9), 0.25) * (0.4 if spam else 0.7 + 0.6 * s)
        seconds = float(rng.lognormal(np.log(4), 0.4) + clicks * pace)
        return Submission(mask, worker, clicks, round(seconds, 2))

    def _draw(self, *key: str) -> np.random.Generator:
        digest = hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=16).digest()
        return np.random.default_rng(np.frombuffer(digest, np.uint32))


def signed_distance(mask: np.ndarray) -> np.ndarray:
    """Pixels from the boundary between pixels, [h, w]: above 0 inside."""
    from scipy import ndimage

    if not mask.any() or mask.all():
        return np.full(mask.shape, 0.5 if mask.any() else -0.5) * max(mask.shape)
    inside = ndimage.distance_transform_edt(mask)
    outside = ndimage.distance_transform_edt(~mask)
    result: np.ndarray = np.where(mask, inside - 0.5, 0.5 - outside)
    return result


def _difficulty(image: np.ndarray, mask: np.ndarray) -> float:
    """0.6 of an object that stands out, 1.5 of one that cannot be told from what is around it."""
    from scipy import ndimage

    around = ndimage.binary_dilation(mask, iterations=4) & ~mask
    if not around.any() or not mask.any():
        return 1.0
    inner, outer = image[mask].astype(float), image[around].astype(float)
    spread = inner.std(0).mean() + outer.std(0).mean() + 1
    contrast = np.abs(inner.mean(0) - outer.mean(0)).mean() / spread
    return float(0.6 + 0.9 * np.exp(-2 * contrast))


def _spam(rng: np.random.Generator, truth: np.ndarray, radius: float) -> np.ndarray:
    """The object elsewhere, a rectangle, or a blob."""
    height, width = truth.shape
    kind = rng.integers(3)
    if kind == 0:
        angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.6) * radius
        moved = np.zeros_like(truth)
        dy, dx = round(far * np.sin(angle)), round(far * np.cos(angle))
        rows, columns = truth.nonzero()
        rows, columns = rows + dy, columns + dx
        keep = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        moved[rows[keep], columns[keep]] = True
        return moved
    y, x = np.mgrid[:height, :width]
    cy, cx = rng.uniform(0.25, 0.75) * height, rng.uniform(0.25, 0.75) * width
    ry, rx = rng.uniform(0.15, 0.5) * height, rng.uniform(0.15, 0.5) * width
    if kind == 1:
        return (np.abs(y - cy) < ry) & (np.abs(x - cx) < rx)
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1


def _perimeter(mask: np.ndarray) -> float:
    """Edges between inside and outside, by Cauchy-Crofton in two directions: pi/4 of all."""
    padded = np.pad(mask, 1)
    edges = (padded[1:] ^ padded[:-1]).sum() + (padded[:, 1:] ^ padded[:, :-1]).sum()
    return float(edges * np.pi / 4)


# --- masks that are there -------------------------------------------------------------------------


class Recorded:
    """Submissions that are known already, given out in their order.

    Args:
        submissions: of each object's id.
    """

    def __init__(self, submissions: Mapping[str, Sequence[Submission]]) -> None:
        self._of = submissions
        self.workers = tuple(
            dict.fromkeys(s.worker for given in submissions.values() for s in given)
        )

    def annotate(self, task: Task, taken: Sequence[str]) -> Submission | None:
        given = self._of.get(task.id, ())
        return next((s for s in given if s.worker not in taken), None)


class SubmittedMasks:
    """Masks from other tools: each worker's are a file or folder in any format that pyseg reads.

    ``FOLDER/anna.json`` (COCO), ``FOLDER/ben/`` (labelme), ``FOLDER/carl.xml`` (CVAT) are three
    workers. An object's mask is the region of its image that has the task's point, the smallest if
    several do; a region that misses the point counts if nothing has it and the region's box
    overlaps the window's middle half. Corners of polygons count as clicks. What a tool exports
    later is found by the next run.

    Args:
        folder: of the workers.

    Raises:
        PysegError: no such folder, or it is empty.
        LabelError, ImageError: an export is damaged or of no known format.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise PysegError(f"submissions: there is no folder {str(folder)!r}; check the path")
        exports = [p for p in sorted(self.folder.iterdir()) if not p.name.startswith(".")]
        if not exports:
            raise PysegError(
                f"submissions: {str(folder)!r} is empty; put every worker's export there, a file "
                "or folder named after him"
            )
        self._exports: dict[str, Path] = {}
        for path in exports:
            if path.stem in self._exports:
                raise PysegError(
                    f"submissions: {path.name} and {self._exports[path.stem].name} are both of "
                    f"worker {path.stem!r}; rename one"
                )
            self._exports[path.stem] = path
        self.workers = tuple(self._exports)
        self._opened: dict[str, Any] = {}
        self._read: dict[tuple[str, str], Annotation] = {}

    def annotate(self, task: Task, taken: Sequence[str]) -> Submission | None:
        for worker in self.workers:
            if worker not in taken and (region := self._region(task, worker)) is not None:
                corners = sum(len(polygon) for polygon in region.polygons)
                return Submission(_window(region, task), worker, corners or None)
        return None

    def _region(self, task: Task, worker: str) -> Region | None:
        annotation = self._annotation(task, worker)
        if annotation is None:
            return None
        left, top, right, bottom = task.box
        x, y = left + task.point[0], top + task.point[1]
        hit, near = [], []
        for region in annotation.regions:
            x0, y0, x1, y1 = region.box
            if region.crowd or not region.area:
                continue
            if x0 <= x < x1 and y0 <= y < y1 and region.mask[y - y0, x - x0]:
                hit.append(region)
            elif (
                abs((x0 + x1) / 2 - (left + right) / 2) < (right - left) / 4
                and abs((y0 + y1) / 2 - (top + bottom) / 2) < (bottom - top) / 4
            ):
                near.append(region)
        found = hit or near
        return min(found, key=lambda region: region.area) if found else None

    def _annotation(self, task: Task, worker: str) -> Annotation | None:
        from pyseg.formats.annotation import Given, Images
        from pyseg.formats.table import detect

        if worker not in self._opened:
            form, path, _ = detect(self._exports[worker])
            given = Given(images=Images(task.image.parent))
            source = form.open_source(path, given)
            self._opened[worker] = source, {Path(name).name: name for name in source.names}
        source, names = self._opened[worker]
        name = names.get(task.image.stem)
        if name is None:
            return None
        if (worker, name) not in self._read:
            self._read[worker, name] = source.read(name)
        return self._read[worker, name]


def _window(region: Region, task: Task) -> np.ndarray:
    """A region's mask within a task's window; what sticks out is cut off."""
    left, top, right, bottom = task.box
    mask = np.zeros(task.size, bool)
    x0, y0 = max(region.box[0], left), max(region.box[1], top)
    x1, y1 = min(region.box[2], right), min(region.box[3], bottom)
    if x0 < x1 and y0 < y1:
        rows = slice(y0 - region.top, y1 - region.top)
        columns = slice(x0 - region.left, x1 - region.left)
        mask[y0 - top : y1 - top, x0 - left : x1 - left] = region.mask[rows, columns]
    return mask


# --- a network ------------------------------------------------------------------------------------


class PromptedWorkers:
    """A promptable network in the hands of simulated clickers, each with another way to click.

    The first click is near the task's point. Where the truth is known, further clicks correct what
    is wrong: each goes to the middle of the largest wrong part. Worker k clicks at most k + 1
    times, and misses the place by a Gaussian of `jitter` times the object's radius.

    Args:
        segmenter: as ``sam`` takes it: "nano", or the size of another of Segment Anything.
        workers: how many.
        jitter: see above.
        seed: of the jitter.

    Raises:
        SpecError: fewer than one worker.
        WeightsError: the network's weights cannot be had.
    """

    def __init__(
        self, segmenter: str = "nano", workers: int = 5, jitter: float = 0.15, seed: int = 0
    ) -> None:
        if workers < 1:
            raise SpecError(f"workers must be 1 or more, got {workers}")
        from pyseg.promptable import load_sam

        self.workers = tuple(f"{segmenter} {k + 1}" for k in range(workers))
        _, self._segmenter = load_sam(size=segmenter)
        self.jitter, self.seed = jitter, seed

    def annotate(self, task: Task, taken: Sequence[str]) -> Submission | None:
        from pyseg.session import Session

        worker = next((worker for worker in self.workers if worker not in taken), None)
        if worker is None:
            return None
        digest = hashlib.blake2b(repr((self.seed, task.id, worker)).encode(), digest_size=16)
        rng = np.random.default_rng(np.frombuffer(digest.digest(), np.uint32))
        session = Session(task.crop().copy(), ("background", "object"), promptable=self._segmenter)
        clicks = self.workers.index(worker) + 1 if task.truth is not None else 1
        radius = np.sqrt((task.truth if task.truth is not None else np.ones(task.size)).sum())
        x, y, positive = float(task.point[0]), float(task.point[1]), True
        mask = np.zeros(task.size, bool)
        done = 0
        for done in range(1, clicks + 1):
            dx, dy = rng.normal(size=2) * self.jitter * radius / 4 if done == 1 else (0, 0)
            x = float(np.clip(x + dx, 0, task.size[1] - 1))
            y = float(np.clip(y + dy, 0, task.size[0] - 1))
            mask = session.click(x, y, positive, label="object").mask.numpy()
            if task.truth is None:
                break
            wrong = [(task.truth & ~mask, True), (mask & ~task.truth, False)]
            part, positive = max(
                ((_largest(each), sign) for each, sign in wrong), key=lambda pair: pair[0].sum()
            )
            if not part.any():
                break
            from .tasks import inner_point

            x, y = inner_point(part)
        return Submission(mask, worker, done)


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected part."""
    from scipy import ndimage

    parts, count = ndimage.label(mask)
    if count == 0:
        return mask
    result: np.ndarray = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    return result


# --- by name --------------------------------------------------------------------------------------

KINDS: dict[str, Callable[..., Annotators]] = {
    "simulated": SimulatedWorkers,
    "submitted": SubmittedMasks,
    "prompted": PromptedWorkers,
}


def annotators_of(text: str) -> Annotators:
    """Annotators by name and options, as in a spec: ``"simulated(workers=20, seed=1)"``.

    Raises:
        SpecError: no such name or option, or a value that is refused.
        PysegError: what the annotators themselves raise.
    """
    from pyseg.registry import check_options
    from pyseg.spec import parse

    stages = parse(text).stages
    if len(stages) != 1 or stages[0].name not in KINDS:
        raise SpecError(f"annotators must be one of {some(KINDS)}, with options, got {text!r}")
    (stage,) = stages
    factory = KINDS[stage.name]
    check_options(stage, factory)
    try:
        return factory(**stage.options)
    except TypeError as error:  # one that must be given is not
        raise SpecError(f"annotators {text!r}: {error}") from error
