"""`tune_crf` searches parameters of the refiner `crf` for a pipeline, `tune_temperature` the one of
`temperature`, `tune_sam` the classes that `sam` is to refine, on a validation split."""

from __future__ import annotations

import inspect
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import refiners
from .classes import check_classes
from .errors import PysegError
from .files import finite, read_json, write_json
from .metrics.calibration import Calibration
from .metrics.semantic import Semantic
from .pipeline import Pipeline
from .progress import notebook_bar
from .training.crf import Training as Training  # both also known by this module's name
from .training.crf import train_crf as train_crf
from .types import VOID, Dataset, Sample, Segmentation

OFF: dict[str, Any] = {"iterations": 0}
USUAL: dict[str, Any] = {  # of pydensecrf's example, which most code in the field copied
    "iterations": 10,
    "gaussian": ((3.0, 3.0),),
    "bilateral": ((80.0, 13.0, 10.0),),
    "protect": 0.0,
    "margin": 1.0,
}
ITERATIONS = (1, 2, 3, 5, 10)
PROTECT = (0.0, 0.5, 0.7, 0.8, 0.9)
MARGIN = (0.2, 0.3, 0.5, 0.8, 1.0)
# Ranges of the numbers of (gaussian, bilateral), drawn on a logarithmic scale. Small standard
# deviations of the bilateral kernel make large lattices, which are slow.
RANGES = ((1, 5), (0.5, 8), (15, 100), (5, 25), (0.5, 12))


@dataclass(frozen=True)
class Trial:
    """Parameters and what they score."""

    name: str  # "off", "default", "usual", "trial 1", …
    parameters: dict[str, Any]  # of the refiner
    fit: dict[str, Any]  # scores of the metric `semantic` on the images fitted; nan may be None
    check: dict[str, Any] | None = None  # on the others; only of those trials that are reported


@dataclass(frozen=True)
class Tuning:
    """The result of `tune_crf`."""

    spec: str  # with the best parameters; without a CRF where they gain nothing on the others
    classes: tuple[str, ...]
    fitted: int  # images
    checked: int
    trials: int
    reported: tuple[Trial, ...]  # off, usual, default, and the best if it is another
    best: Trial  # on the images fitted

    @property
    def gain(self) -> float:
        """mIoU of the best over that of no CRF, on images that were not fitted."""
        assert self.best.check is not None and self.reported[0].check is not None
        return self.best.check["miou"] - self.reported[0].check["miou"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; nan becomes None."""
        return {
            "spec": self.spec,
            "fitted": self.fitted,
            "checked": self.checked,
            "trials": self.trials,
            "best": self.best.name,
            "gain": self.gain,
            "reported": [_entry(trial) for trial in self.reported],
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table that is printed, as text: IoU per class on the others."""
        head = ["crf", f"mIoU, {self.fitted} fitted", f"mIoU, {self.checked} others"]
        rows = []
        for trial in self.reported:
            assert trial.check is not None
            rows.append(
                [
                    trial.name,
                    f"{trial.fit['miou']:.4f}",
                    f"{trial.check['miou']:.4f}",
                    *(f"{trial.check['per_class'][name]['iou']:.3f}" for name in self.classes),
                ]
            )
        return [*head, *self.classes], rows


def tune_crf(
    pipeline: Pipeline,
    dataset: Dataset,
    *,
    limit: int | None = None,
    trials: int = 40,
    seed: int = 0,
    log: Path | None = None,
    track: Callable[[Sequence[int]], Iterable[int]] = notebook_bar,
) -> Tuning:
    """Searches parameters of `crf` behind a pipeline; no CRF at all is one of the candidates.

    The pipeline runs once per image; its logits stay in memory in half precision. The first half of
    the images is fitted, by mIoU, and the second half tells what the fit is worth: in a video,
    neighbouring frames would be the same image twice. After no CRF, the usual and the default
    parameters, half of the trials are drawn at random and half vary the best so far.

    Args:
        pipeline: its last stage must give logits.
        dataset: at least two samples, with labels.
        limit: use so many images, spread evenly over the dataset; None = all.
        trials: candidates to score.
        seed: of the candidates.
        log: JSON file of all scores, rewritten after each trial. Where it is of the same images and
            pipeline, scores that it holds are not computed again.
        track: wraps the sequence of steps, for a progress bar.

    Raises:
        PysegError: too few images or trials, classes that differ, a log of another search, or a
            last stage without logits.

    Example:
        >>> tuning = tune_crf(pyseg.build("streetnet"), CamVid("camvid", "val"), limit=40)
        >>> tuning.spec, tuning.gain
    """
    check_classes(pipeline.classes, dataset.classes)
    if trials < 3:
        raise PysegError(
            f"trials must be at least 3, got {trials}: the first are no CRF, the "
            "usual and the default parameters"
        )
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count < 2:
        raise PysegError(
            f"tuning needs at least 2 images, one to fit and one to check, got {count}"
            "; raise limit or choose another split"
        )
    indices = [k * len(dataset) // count for k in range(count)]
    fitted = (count + 1) // 2
    factory = refiners.get("crf")
    signature = inspect.signature(factory).parameters
    default = {name: signature[name].default for name in USUAL}
    rng = random.Random(seed)
    images: list[tuple[Sample, Segmentation]] = []
    done: list[Trial] = []
    known: dict[str, dict[str, Any]] = {}
    names: list[str] = []

    def score(parameters: dict[str, Any], part: list[tuple[Sample, Segmentation]]):
        metric, refiner = Semantic(dataset.classes), factory(**parameters)
        for sample, prediction in part:
            image = sample.image.to(pipeline.device)
            metric.update(refiner.refine(image, prediction), sample)
        scores = metric.compute()
        if math.isnan(scores["miou"]):
            raise PysegError(f"{part[0][0].name} to {part[-1][0].name} have no labelled pixel")
        return scores

    for step in track(range(count + trials)):
        if step < count:
            sample = dataset[indices[step]]
            prediction = pipeline.run_stages(sample.image)[-1]
            if prediction.logits is None:
                raise PysegError(f"crf needs logits, but {pipeline} gives labels only")
            if sample.labels is None:
                raise PysegError(f"{sample.name} has no labels: nothing to fit")
            # An overlay's image would be kept twice.
            logits = prediction.logits.half()
            prediction = replace(prediction, logits=logits, segments=None, image=None, _labels=None)
            images.append((sample, prediction))
            names.append(sample.name)
            continue
        if step == count and log is not None:
            known = _read(log, str(pipeline), names)
        index = step - count
        if index < 3:
            name, parameters = (("off", OFF), ("usual", USUAL), ("default", default))[index]
        else:
            name = f"trial {index - 2}"
            best = max(done[1:], key=_score)
            varied = 2 * index > trials
            while True:
                parameters = _vary(best.parameters, rng) if varied else _draw(rng)
                if all(parameters != trial.parameters for trial in done):
                    break
        fit = known.get(_key(parameters)) or score(parameters, images[:fitted])
        done.append(Trial(name, parameters, fit))
        if log is not None:
            entries = [_entry(trial) for trial in done]
            write_json(log, {"pipeline": str(pipeline), "images": names, "trials": entries})

    best = max(done, key=_score)  # the first of equals, and so no CRF before any
    reported = {trial.name: trial for trial in [*done[:3], best]}
    for name, trial in reported.items():
        reported[name] = replace(trial, check=score(trial.parameters, images[fitted:]))
    tuning = Tuning(
        str(pipeline),
        tuple(dataset.classes),
        fitted,
        count - fitted,
        len(done),
        tuple(reported.values()),
        reported[best.name],
    )
    if tuning.gain <= 0:
        return tuning
    options = ", ".join(f"{key}={value!r}" for key, value in best.parameters.items())
    return replace(tuning, spec=f"{pipeline}+crf({options})")


def _score(trial: Trial) -> float:
    return trial.fit["miou"]


def _rounded(value: float) -> float:
    """To two digits, so that a spec can be read."""
    return float(f"{value:.2g}")


def _assembled(
    iterations: int, numbers: Sequence[float], protect: float, margin: float
) -> dict[str, Any]:
    a, b, c, d, e = (_rounded(number) for number in numbers)
    return {
        "iterations": iterations,
        "gaussian": ((a, b),),
        "bilateral": ((c, d, e),),
        "protect": protect,
        "margin": margin,
    }


def _draw(rng: random.Random) -> dict[str, Any]:
    numbers = [math.exp(rng.uniform(math.log(a), math.log(b))) for a, b in RANGES]
    return _assembled(rng.choice(ITERATIONS), numbers, rng.choice(PROTECT), rng.choice(MARGIN))


def _vary(parameters: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One or two of the numbers changed by up to a factor of two."""
    numbers = [*parameters["gaussian"][0], *parameters["bilateral"][0]]
    chosen = {"iterations": ITERATIONS, "protect": PROTECT, "margin": MARGIN}
    others = {name: parameters[name] for name in chosen}
    for which in rng.sample(range(len(numbers) + len(chosen)), rng.choice((1, 2))):
        if which >= len(numbers):
            name = list(chosen)[which - len(numbers)]
            others[name] = rng.choice(chosen[name])
        else:
            low, high = RANGES[which]
            numbers[which] = min(max(numbers[which] * 2 ** rng.uniform(-1, 1), low), high)
    return _assembled(numbers=numbers, **others)


def _entry(trial: Trial) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": trial.name,
        "parameters": trial.parameters,
        "fit": finite(trial.fit),
    }
    if trial.check is not None:
        entry["check"] = finite(trial.check)
    return entry


def _read(log: Path, pipeline: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Parameters, as text, to the scores that a log holds."""
    if not log.is_file():
        return {}
    try:
        stored = read_json(log)
        same = stored["pipeline"] == pipeline and stored["images"] == names
        scores = {_key(entry["parameters"]): entry["fit"] for entry in stored["trials"]}
    except (KeyError, TypeError) as error:
        raise PysegError(f"{log} is no log of pyseg tune; name another file") from error
    if not same:
        raise PysegError(f"{log} belongs to other images or another pipeline; name another file")
    return scores


def _key(parameters: dict[str, Any]) -> str:
    return json.dumps(parameters, sort_keys=True)  # lists for tuples, as in the log


@dataclass(frozen=True)
class Calibrated:
    """The result of `tune_temperature`."""

    spec: str  # with the temperature; without one where it gains nothing on the others
    temperature: float
    fitted: int  # images
    checked: int
    scores: dict[str, dict[str, dict[str, Any]]]  # part -> "before", "after" -> of `calibration`

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; nan becomes None."""
        return {
            "spec": self.spec,
            "temperature": self.temperature,
            "fitted": self.fitted,
            "checked": self.checked,
            **{part: finite(scores) for part, scores in self.scores.items()},
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table that is printed, as text."""
        rows = []
        for part, count in (("fit", self.fitted), ("check", self.checked)):
            called = f"{count} {'fitted' if part == 'fit' else 'others'}"
            for when, temperature in (("before", 1.0), ("after", self.temperature)):
                found = self.scores[part][when]
                numbers = (f"{found[name]:.4f}" for name in ("ece", "nll", "brier", "confidence"))
                rows.append([called, f"{temperature:.3f}", *numbers])
        return ["images", "temperature", "ECE", "NLL", "Brier", "mean confidence"], rows


def tune_temperature(
    pipeline: Pipeline,
    dataset: Dataset,
    *,
    limit: int | None = None,
    pixels: int = 20_000,
    seed: int = 0,
    track: Callable[[Sequence[int]], Iterable[int]] = notebook_bar,
) -> Calibrated:
    """Fits the temperature of `temperature` behind a pipeline, by the likelihood of the labels.

    The negative log-likelihood of the labels is convex in the inverse temperature, and bisection
    finds its minimum. As in `tune_crf` the first half of the images is fitted and the second
    half tells what the fit is worth. The images should not be those of training, on which a network
    is right more often than it will be.

    Args:
        pipeline: its last stage must give logits.
        dataset: at least two samples, with labels.
        limit: use so many images, spread evenly over the dataset; None = all.
        pixels: that are drawn of an image to fit; scores are of all of them.
        seed: of these pixels.
        track: wraps the sequence of images, for a progress bar.

    Raises:
        PysegError: too few images, classes that differ, no labelled pixel, or a last stage without
            logits.

    Example:
        >>> found = tune_temperature(pyseg.build("streetnet"), CamVid("camvid", "val"))
        >>> pyseg.build(found.spec)("street.jpg").confidence()
    """
    check_classes(pipeline.classes, dataset.classes)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count < 2:
        raise PysegError(
            f"tuning needs at least 2 images, one to fit and one to check, got {count}"
            "; raise limit or choose another split"
        )
    if pixels < 1:
        raise PysegError(f"pixels must be at least 1, got {pixels}")
    fitted = (count + 1) // 2
    generator = torch.Generator().manual_seed(seed)
    images: list[tuple[Sample, Segmentation]] = []
    logits: list[Tensor] = []
    targets: list[Tensor] = []
    for k in track(range(count)):
        sample = dataset[k * len(dataset) // count]
        prediction = pipeline(sample.image)
        if prediction.logits is None:
            raise PysegError(f"temperature needs logits, but {pipeline} gives labels only")
        if sample.labels is None:
            raise PysegError(f"{sample.name} has no labels: nothing to fit")
        images.append((sample, replace(prediction, image=None)))
        if k < fitted:
            known = (sample.labels != VOID).flatten().nonzero().flatten()
            drawn = known[torch.randperm(len(known), generator=generator)[:pixels]]
            logits.append(
                prediction.full_logits().flatten(1)[:, drawn.to(prediction.logits.device)]
            )
            targets.append(sample.labels.flatten()[drawn].long())
    target = torch.cat(targets)
    if not len(target):
        raise PysegError(
            f"{images[0][0].name} to {images[fitted - 1][0].name} have no labelled pixel"
        )
    temperature = fit_temperature(torch.cat(logits, 1).cpu(), target)
    factory = refiners.get("temperature")
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for part, members in (("fit", images[:fitted]), ("check", images[fitted:])):
        scores[part] = {}
        for when, value in (("before", 1.0), ("after", temperature)):
            metric, refiner = Calibration(dataset.classes), factory(value=value)
            for sample, prediction in members:
                metric.update(refiner.refine(sample.image, prediction), sample)
            scores[part][when] = metric.compute()
    gained = scores["check"]["after"]["nll"] < scores["check"]["before"]["nll"]
    return Calibrated(
        f"{pipeline}+temperature(value={temperature!r})" if gained else str(pipeline),
        temperature,
        fitted,
        count - fitted,
        scores,
    )


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature under which labels are the most probable, to three digits.

    Args:
        logits: [C, P] of pixels.
        target: [P] int64 class indices.

    Returns:
        Between 0.05 and 20, where it ends if everything is right, or no better than chance.
    """
    logits = logits.double()
    logits = logits - logits.amax(0)
    own = logits.gather(0, target[None])[0].mean()
    low, high = math.log(1 / 20), math.log(20)
    # Bisection by the slope in beta = 1 / temperature, the mean of sum_c p_c z_c - z_target.
    for _ in range(30):
        middle = (low + high) / 2
        p = (logits * math.exp(middle)).softmax(0)
        if (p * logits).sum(0).mean() < own:
            low = middle
        else:
            high = middle
    return float(f"{math.exp(-(low + high) / 2):.3g}")


LEAST = (0.0, 0.7, 0.8, 0.85, 0.9, 0.95)
"""Least scores of masks that `tune_sam` tries for every class, beside leaving the class out."""


@dataclass(frozen=True)
class TunedClasses:
    """The result of `tune_sam`."""

    spec: str  # with the classes worth refining; without the refiner where it gains nothing
    classes: dict[str, float]  # name -> the least score of its masks; classes left out are off
    fitted: int  # images
    checked: int
    scores: dict[str, dict[str, dict[str, Any]]]  # part -> "off", "default", … -> of `semantic`

    @property
    def gain(self) -> float:
        """mIoU over that of no refiner, on images that were not fitted."""
        return self.scores["check"]["fitted"]["miou"] - self.scores["check"]["off"]["miou"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; nan becomes None."""
        return {
            "spec": self.spec,
            "classes": self.classes,
            "fitted": self.fitted,
            "checked": self.checked,
            "gain": self.gain,
            **{part: finite(scores) for part, scores in self.scores.items()},
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table that is printed, as text: IoU per class on the others."""
        names = list(self.scores["check"]["off"]["per_class"])
        rows = []
        for kind, check in self.scores["check"].items():
            fit = self.scores["fit"].get(kind)  # of no class together, when it was fitted
            per_class = (f"{check['per_class'][name]['iou']:.3f}" for name in names)
            first = "-" if fit is None else f"{fit['miou']:.4f}"
            rows.append([kind, first, f"{check['miou']:.4f}", *per_class])
        head = ["sam", f"mIoU, {self.fitted} fitted", f"mIoU, {self.checked} others", *names]
        return head, rows


def tune_sam(
    pipeline: Pipeline,
    dataset: Dataset,
    *,
    limit: int | None = None,
    track: Callable[[Sequence[int]], Iterable[int]] = notebook_bar,
) -> TunedClasses:
    """Fits which classes `sam` or `sam2` refines, and from which score of their masks on.

    The segmenter runs once per image. For each class alone, every least score of `LEAST` and "off"
    are tried on the first half of the images; the second half tells what the choice is worth.

    Args:
        pipeline: its last stage is the refiner, with the options that it is to have.
        dataset: at least two samples, with labels.
        limit: use so many images, spread evenly over the dataset; None = all.
        track: wraps the sequence of images, for a progress bar.

    Raises:
        PysegError: the last stage is no such refiner, too few images, classes that differ, or a
            sample without labels.

    Example:
        >>> tune_sam(pyseg.build("streetnet+sam(size='nano')"), CamVid("camvid", "val")).spec
    """
    check_classes(pipeline.classes, dataset.classes)
    refiner = pipeline.stages[-1].component
    if not hasattr(refiner, "collect"):
        raise PysegError(
            f"tune sam fits the last stage of a pipeline, such as 'streetnet+sam', got {pipeline}"
        )
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count < 2:
        raise PysegError(
            f"tuning needs at least 2 images, one to fit and one to check, got {count}"
            "; raise limit or choose another split"
        )
    fitted = (count + 1) // 2
    before = Pipeline(pipeline.stages[:-1], precision=pipeline.precision)
    fit: dict[Any, Semantic] = {"off": Semantic(dataset.classes)}
    check = {name: Semantic(dataset.classes) for name in ("off", "default", "fitted")}
    tried = [(c, least) for c in range(len(dataset.classes)) for least in LEAST]
    fit |= {one: Semantic(dataset.classes) for one in ("default", *tried)}
    chosen: dict[int, float] = {}
    for k in track(range(count)):
        sample = dataset[k * len(dataset) // count]
        if sample.labels is None:
            raise PysegError(f"{sample.name} has no labels: nothing to fit")
        image = sample.image.to(pipeline.device)
        prediction = before(image)
        fusion = refiner.collect(image, prediction)
        part = fit if k < fitted else check
        part["off"].update(prediction, sample)
        part["default"].update(fusion.result(), sample)
        if k >= fitted:
            part["fitted"].update(fusion.result(chosen), sample)
            continue
        found = fusion.classes
        for c, least in tried:  # most classes have no mask in an image
            fit[c, least].update(fusion.result({c: least}) if c in found else prediction, sample)
        if k == fitted - 1:
            base = _miou(fit["off"])
            for c in range(len(dataset.classes)):
                best, least = max((_miou(fit[c, least]), -least) for least in LEAST)
                if best > base:
                    chosen[c] = -least
    scores = {
        "fit": {name: fit[name].compute() for name in ("off", "default")},
        "check": {name: metric.compute() for name, metric in check.items()},
    }
    names = {dataset.classes[c]: least for c, least in chosen.items()}
    stage = pipeline.stages[-1].spec
    tuned = replace(stage, options={**stage.options, "classes": names})
    gained = scores["check"]["fitted"]["miou"] > scores["check"]["off"]["miou"]
    return TunedClasses(
        f"{before}+{tuned}" if gained else str(before), names, fitted, count - fitted, scores
    )


def _miou(metric: Semantic) -> float:
    value = metric.compute()["miou"]
    return -1.0 if math.isnan(value) else value
