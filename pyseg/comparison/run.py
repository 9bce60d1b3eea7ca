"""`compare`: trains models by one recipe and scores each with each refiner."""

from __future__ import annotations

import copy
import hashlib
import math
import re
import shutil
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, resize

from .. import metrics, page, pipeline, processes, refiners
from ..cost import cost
from ..errors import PysegError, SpecError
from ..evaluation import evaluate
from ..files import make_folder, read_json, remove_abandoned, write_json
from ..metrics import bootstrap
from ..models import SemanticModel
from ..pipeline import Pipeline, StageResult
from ..spec import Spec, parse
from ..training import train, usual_precision
from ..training.loop import CHECKPOINT, LOG, WEIGHTS, Precision, check_run
from ..training.semantic import CachedDataset
from ..types import Dataset, Metric, Sample
from ..visual import overlay
from .page import write_comparison
from .result import BOUNDARY, CALIBRATION, NONE, SCORES, SEMANTIC, Comparison, Row, Training

PICTURES = 3  # images that the page shows, spread evenly
ROUNDS = 20  # checkpoints of a training, but no more than one a minute: they may be of gigabytes
_PLAN = {"rounds": int, "steps_of_a_round": int}  # of a training: so many times so many steps
PROBE = 3  # steps that are timed, after as many to warm up


def compare(
    models: Sequence[str | Spec],
    dataset: Dataset,
    validation: Dataset,
    *,
    report: str | Path,
    refiners: Sequence[str | Spec] = (NONE,),
    budget_minutes: float | None = None,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    learning_rate: float = 5e-4,
    precision: Precision | None = None,
    limit: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
    observe: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Trains models by one recipe, scores each with each refiner, and writes table and page.

    All models see the same crops in the same order, `pyseg.training.train` has them with the same
    settings, and each begins with random weights but for what its spec says, such as
    ``"fcn_resnet50(weights='resnet50.pth')"``. The bound is of each model: a number of steps, or
    minutes, from which steps are made by timing a few. That number is kept, so that a run that was
    killed goes on to what it would have become.

    In ``report``: ``index.html`` and ``compare.json``; below ``runs/``, for each model, its
    ``pipeline/`` that `pyseg.load` reads, the log of its training and the scores of every image.
    Called again with the same folder, what is there is not computed again, and a training that was
    interrupted goes on from its last checkpoint: there are 20, or one for each of the
    ``budget_minutes``. Models and refiners may be added.

    Args:
        models: specs of semantic models.
        dataset: to train on.
        validation: to score on, of the same classes.
        report: folder of results, made if absent.
        refiners: specs of refiners or of several in a row; ``"none"`` = the model alone.
        budget_minutes: of training, for each model; give this or ``steps``.
        steps: of training, for each model; where more than 20, up to 5 % fewer, so that checkpoints
            are evenly spread.
        size: (height, width) that images and labels are resized to, for training and for scoring;
            None = as they are, trained on crops of `pyseg.training.train`'s size.
        batch_size: images per step.
        learning_rate: at the end of the warm-up, of all models.
        precision: "bf16" = training under autocast, "fp32" = none; None = what is
            usual on the device.
        limit: score so many images, spread evenly; None = all.
        resamples: of the bootstrap.
        seed: of everything random.
        observe: called with a line of text when a model is trained or scored, or has failed.

    Returns:
        Rows in the order of ``models`` and ``refiners``. A model that fails to train, or a pipeline
        that fails on an image, has none: ``failures`` says why, and the others go on.

    Raises:
        PysegError: before anything is trained: an unknown or repeated name, a wrong option, weights
            that are absent, a model that is not semantic, settings out of range, or a folder that
            holds another comparison.

    Example:
        >>> result = compare(["streetnet", "segnet"], CamVid("camvid"), CamVid("camvid", "val"),
        ...                  refiners=["none", "crf"], budget_minutes=20, report="out")
        >>> result.rows[0].scores["mIoU"], result.differences[0, 1].beyond_noise
    """
    if (budget_minutes is None) == (steps is None):
        raise PysegError("give one bound of the training: budget_minutes or steps")
    if not (budget_minutes or steps or 0) > 0:
        raise PysegError(
            f"budget_minutes and steps must be positive, got {budget_minutes or steps}"
        )
    if min(batch_size, resamples) < 1 or not learning_rate > 0:
        raise PysegError(
            "batch_size, resamples and learning_rate must be positive, got "
            f"{batch_size}, {resamples} and {learning_rate}"
        )
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise PysegError(f"size must be (height, width) in pixels, got {size}")
    check_run(epochs=1, warmup=0, clip=None, ema=0, precision=precision)
    if tuple(dataset.classes) != tuple(validation.classes):
        raise PysegError(
            f"dataset and validation must have the same classes, got {len(dataset.classes)} and "
            f"{len(validation.classes)}, or others by name"
        )
    count = len(validation) if limit is None else min(limit, len(validation))
    if count < 2 or len(dataset) == 0:
        raise PysegError(
            f"compare needs images to train on and at least 2 to score, got {len(dataset)} and "
            f"{count}"
        )
    accelerator = processes.accelerator()
    if accelerator.num_processes > 1:
        raise PysegError("compare runs in one process; start it without torchrun")
    names = _checked(models, refiners, len(dataset.classes))
    chains = [str(parse(text)) for text in refiners]
    folder = make_folder(report, "report")
    train_on, score_on = _Prepared(dataset, size), _Prepared(validation, size)
    indices = [k * len(validation) // count for k in range(count)]
    recipe: dict[str, Any] = {
        "budget_minutes": budget_minutes,
        "steps": steps,
        "size": None if size is None else list(size),
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "precision": precision or usual_precision(accelerator.device),
        "seed": seed,
        "classes": list(dataset.classes),
        "training_images": len(dataset),
        "images": [score_on[index].name for index in indices],
    }
    _keep_recipe(folder / "recipe.json", recipe)
    settings = {
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "precision": recipe["precision"],
        "full_size": 0.0,  # so that all steps take the same time
        "cache": False,  # the data sets given are in memory
        "seed": seed,
        **({} if size is None else {"crop_size": size}),
    }
    counts = bootstrap.draws(count, resamples, seed)
    trainings: list[Training] = []
    rows: list[Row] = []
    failures: dict[str, str] = {}
    for model in names:
        run = folder / "runs" / _file_name(model)
        try:
            training = _trained(model, train_on, run, settings, budget_minutes, steps, observe)
        except Exception as error:
            failures[model] = f"training failed: {_reason(error)}"
            observe(f"{model}: {failures[model]}")
            continue
        trainings.append(training)
        for refiner in chains:
            label = model if refiner == NONE else f"{model}+{refiner}"
            try:
                row = _row(training, refiner, score_on, limit, run, accelerator.device, counts)
            except Exception as error:
                failures[label] = f"scoring failed: {_reason(error)}"
                observe(f"{label}: {failures[label]}")
                continue
            rows.append(row)
            observe(f"{label}: mIoU {row.scores['mIoU']:.4f}, {row.milliseconds:.1f} ms an image")
    pairs = [(a, b) for a in range(len(rows)) for b in range(a + 1, len(rows))]
    result = Comparison(
        tuple(rows),
        tuple(trainings),
        failures,
        {
            (a, b): bootstrap.difference(
                rows[a].scores["mIoU"] - rows[b].scores["mIoU"],
                rows[a].resamples["mIoU"],
                rows[b].resamples["mIoU"],
            )
            for a, b in pairs
        },
        tuple(dataset.classes),
        tuple(dataset.palette),
        tuple(recipe["images"]),
        resamples,
        recipe,
        page.made([(str(accelerator.device), torch.get_num_threads())]),
        tuple(_shown(score_on, [indices[k] for k in _pictured(count)])),
    )
    write_comparison(folder, result)
    return result


class _Prepared(CachedDataset):
    """A data set whose samples are resized and stay in memory."""

    def __init__(self, dataset: Dataset, size: tuple[int, int] | None) -> None:
        super().__init__(dataset)
        self.size = size

    def __getitem__(self, index: int) -> Sample:
        fresh = self._samples[index] is None
        sample = super().__getitem__(index)
        if fresh and self.size is not None and tuple(sample.image.shape[1:]) != self.size:
            target = list(self.size)
            image = resize(sample.image, target, InterpolationMode.BILINEAR, antialias=True)
            labels = sample.labels
            if labels is not None:
                labels = resize(labels[None], target, InterpolationMode.NEAREST_EXACT)[0]
            sample = self._samples[index] = Sample(sample.name, image, labels)
        return sample


class _Images:
    """What `evaluate` shows of each image: states of metrics, pictures of a few."""

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        pictured: Sequence[int],
        palette: Sequence[tuple[int, int, int]],
    ) -> None:
        self._metrics, self._pictured, self._palette = metrics, pictured, palette
        self.names: list[str] = []
        self.states: dict[str, list[Mapping[str, Tensor]]] = {name: [] for name in metrics}
        self.pictures: list[bytes] = []

    def add(self, sample: Sample, results: list[StageResult]) -> None:
        prediction = results[-1].prediction
        for name, metric in self._metrics.items():
            alone = copy.deepcopy(metric)
            alone.update(prediction, sample)
            self.states[name].append({k: v.cpu() for k, v in alone.state().items()})
        if len(self.names) in self._pictured:
            self.pictures.append(_painted(sample.image, prediction.labels, self._palette))
        self.names.append(sample.name)


def _checked(
    models: Sequence[str | Spec], refiners_: Sequence[str | Spec], classes: int
) -> list[str]:
    """The models' canonical specs, once all models and refiners could be made."""
    if isinstance(models, (str, Spec)) or isinstance(refiners_, (str, Spec)):
        raise PysegError("models and refiners must be lists of specs, such as ['streetnet']")
    specs, chains = [parse(text) for text in models], [parse(text) for text in refiners_]
    for what, given in (("models", specs), ("refiners", chains)):
        texts = [str(spec) for spec in given]
        if not texts:
            raise PysegError(f"{what} must hold at least one spec, got none")
        if twice := [text for text in texts if texts.count(text) > 1]:
            raise PysegError(f"{what} holds {twice[0]!r} twice; leave one of them out")
    for chain in chains:
        if str(chain) == NONE:
            continue
        for stage in chain.stages:
            refiners._registry.make(stage, {"num_classes": classes})
    for spec in specs:
        if len(spec.stages) > 1:
            raise SpecError(
                f"models are trained alone, got {str(spec)!r}: give what follows "
                f"{spec.stages[0].name!r} as one of the refiners"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when the model is trained
            _fresh(str(spec), classes, seed=0)
    return [str(spec) for spec in specs]


def _fresh(model: str, classes: int, seed: int) -> Pipeline:
    torch.manual_seed(seed)
    made = pipeline.build(model, num_classes=classes, weights=None)
    if not isinstance(made.model, SemanticModel):
        raise PysegError(
            f"compare trains semantic models, and {model!r} is a {type(made.model).__name__}; "
            "leave it out"
        )
    return made


def _keep_recipe(path: Path, recipe: dict[str, Any]) -> None:
    """Writes the recipe, or holds it against the one that is there."""
    if not path.is_file():
        write_json(path, recipe)
        return
    before = read_json(path, wanted=dict)
    changed = [key for key in recipe if before.get(key) != recipe[key]]
    if changed:
        told = ", ".join(
            key
            if isinstance(recipe[key], list) and key != "size"
            else f"{key} (was {before.get(key)!r}, now {recipe[key]!r})"
            for key in changed
        )
        raise PysegError(
            f"report {str(path.parent)!r} holds a comparison of another recipe: {told}; give "
            "another folder, or the settings of then"
        )


def _trained(
    model: str,
    dataset: Dataset,
    run: Path,
    settings: dict[str, Any],
    budget_minutes: float | None,
    steps: int | None,
    observe: Callable[[str], None],
) -> Training:
    """Trains a model, as far as it is not; its pipeline is in ``run`` afterwards."""
    work, done = run / "training", run / "pipeline"
    if not done.is_dir():
        made = _fresh(model, len(dataset.classes), settings["seed"])
        work.mkdir(parents=True, exist_ok=True)
        plan = run / "plan.json"
        if not plan.is_file():
            if steps is None:
                assert budget_minutes is not None
                seconds = _seconds_of_a_step(made.model, dataset, run, settings)
                steps = max(1, int(budget_minutes * 60 / seconds))
                observe(f"{model}: {steps} steps of {seconds:.3f} s")
            rounds = ROUNDS if budget_minutes is None else min(ROUNDS, math.ceil(budget_minutes))
            each = max(1, steps // rounds)
            write_json(plan, {"rounds": steps // each, "steps_of_a_round": each})
        planned = read_json(plan, wanted=_PLAN)
        train(
            made.model,
            dataset,
            output_dir=work,
            epochs=planned["rounds"],
            steps=planned["steps_of_a_round"],
            resume=(work / CHECKPOINT).is_file(),
            **settings,
        )
        made.to("cpu").save(done)
    for file in (CHECKPOINT, WEIGHTS):  # large, and what they are for is in the pipeline
        (work / file).unlink(missing_ok=True)
    remove_abandoned(work, older_than=0)
    log = read_json(work / LOG, wanted=[{"seconds": float, "loss": float, "precision": str}])
    planned = read_json(run / "plan.json", wanted=_PLAN)
    return Training(
        model,
        len(log) * planned["steps_of_a_round"],
        round(math.fsum(entry["seconds"] for entry in log), 2),
        log[-1]["loss"],
        log[-1]["precision"],
    )


def _seconds_of_a_step(
    model: SemanticModel, dataset: Dataset, run: Path, settings: dict[str, Any]
) -> float:
    """Of training; the model itself stays as it is."""
    folder = run / "probe"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed in it
    log = train(
        copy.deepcopy(model),
        dataset,
        output_dir=folder,
        epochs=2,  # the first to warm up
        steps=PROBE,
        save_every=2,
        progress=False,
        **settings,
    )
    shutil.rmtree(folder)
    return max(log[-1]["seconds"], 1e-2) / PROBE


def _row(
    training: Training,
    refiner: str,
    dataset: Dataset,
    limit: int | None,
    run: Path,
    device: torch.device,
    counts: Tensor,
) -> Row:
    """Scores a model with a refiner, or reads what was scored."""
    path = run / f"{_file_name(refiner)}.json"
    if not path.is_file():
        _score(refiner, dataset, limit, run, device, path)
    found = read_json(path, wanted={"states": dict, "stages": list, "pictures": [str]})
    scores, intervals, drawn = {}, {}, {}
    last = found["stages"][-1]["metrics"]
    for text, states in found["states"].items():
        shown = {key: name for name, metric, key in SCORES if metric == text}
        tensors = [{key: torch.tensor(v) for key, v in state.items()} for state in states]
        metric = metrics.create(text, classes=tuple(dataset.classes))
        values = bootstrap.resampled(metric, tensors, counts, list(shown))
        for key, name in shown.items():
            drawn[name] = values[key]
            intervals[name] = bootstrap.interval(values[key])
            scores[name] = math.nan if last[text][key] is None else last[text][key]
    absent = {name for name, _, _ in SCORES} - scores.keys()
    scores |= dict.fromkeys(absent, math.nan)
    intervals |= dict.fromkeys(absent, (math.nan, math.nan))
    return Row(
        training.model,
        refiner,
        training,
        scores,
        intervals,
        {
            name: math.nan if entry["iou"] is None else entry["iou"]
            for name, entry in last[SEMANTIC]["per_class"].items()
        },
        found["milliseconds"],
        found["peak_bytes"],
        found["parameters"],
        found["flops"],
        found["stages"],
        tuple(bytes.fromhex(text) for text in found["pictures"]),
        drawn,
    )


def _score(
    refiner: str,
    dataset: Dataset,
    limit: int | None,
    run: Path,
    device: torch.device,
    path: Path,
) -> None:
    """Writes what a trained model scores with a refiner, with the states of every image."""
    loaded = pipeline.load(run / "pipeline").model
    whole = pipeline.build(loaded, *([] if refiner == NONE else [refiner])).to(device)
    first = dataset[0].image
    texts = [SEMANTIC, BOUNDARY]
    if whole.run_stages(first)[-1].logits is not None:  # else there is nothing to calibrate
        texts.append(CALIBRATION)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    images = _Images(
        {text: metrics.create(text, classes=tuple(dataset.classes)) for text in texts},
        _pictured(count),
        dataset.palette,
    )
    result = evaluate(whole, dataset, texts, limit=limit, observe=images.add)
    total = cost(whole, first, rounds=1).stages[-1]
    peaks = [stage.peak_bytes for stage in result.stages]
    measured = [peak for peak in peaks if peak is not None]
    write_json(
        path,
        {
            "images": images.names,
            "milliseconds": math.fsum(stage.milliseconds for stage in result.stages),
            "peak_bytes": max(measured) if len(measured) == len(peaks) else None,
            "parameters": total.parameters,
            "flops": total.flops,
            "stages": result.to_list(),
            "pictures": [picture.hex() for picture in images.pictures],
            "states": {
                text: [{key: v.tolist() for key, v in state.items()} for state in states]
                for text, states in images.states.items()
            },
        },
    )


def _pictured(count: int) -> list[int]:
    """Which of so many images the page shows."""
    return sorted({(2 * k + 1) * count // (2 * PICTURES) for k in range(PICTURES)})


def _shown(dataset: Dataset, indices: Sequence[int]) -> list[tuple[str, bytes, bytes]]:
    """Names of images, the images, and their ground truth."""
    samples = [dataset[index] for index in indices]
    return [
        (
            sample.name,
            _painted(sample.image, None, dataset.palette),
            _painted(sample.image, sample.labels, dataset.palette),
        )
        for sample in samples
    ]


def _painted(
    image: Tensor, labels: Tensor | None, palette: Sequence[tuple[int, int, int]]
) -> bytes:
    """The image under its labels; the page has one legend for all."""
    height, width = image.shape[1:]
    picture = overlay(image, 0.65, labels=labels, classes=[""] * len(palette), palette=palette)
    left = (picture.width - width) // 2
    return page.jpeg(picture.crop((left, 0, left + width, height)))


def _file_name(spec: str) -> str:
    """A name for a spec that differs wherever specs do."""
    plain = re.sub(r"\W+", "_", spec).strip("_")[:60]
    return f"{plain}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"


def _reason(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, PysegError):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}, line {frame.lineno})"
