"""`train_instances`: fits Mask R-CNN, panoptic FPN or UPSNet to a dataset with instances."""

from __future__ import annotations

import math
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .errors import PysegError
from .training import (
    CHECKPOINT,
    _average,
    _Cached,
    _generator,
    _Order,
    _parameter_groups,
    _resume,
    _save,
    _schedule,
    _Swapped,
    random_light,
)
from .types import Dataset, Sample

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .models.panoptic import InstanceModel


def train_instances(
    model: InstanceModel,
    dataset: Dataset,
    *,
    output_dir: str | Path,
    epochs: int,
    validation: Dataset | None = None,
    batch_size: int = 2,
    photometric: float = 0.5,
    flip: float = 0.5,
    learning_rate: float = 5e-4,
    weight_decay: float = 1e-4,
    warmup: float = 0.05,
    clip: float = 10.0,
    ema: float = 0.997,
    precision: Literal["bf16", "fp32"] = "fp32",
    cache: bool = True,
    save_every: int = 1,
    validate_every: int = 10,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Trains ``model`` in place and leaves it holding the averaged (EMA) weights.

    AdamW under a cosine schedule on the sum of the model's losses; images are flipped and lit at
    random, and resized by the model itself. The same seed, software and device give the same
    weights; a run that was killed and is resumed gives those of one that was not. Files in
    ``output_dir`` are those of `pyseg.training.train`.

    Args:
        model: an `InstanceModel`; moved to accelerate's device.
        dataset: samples with instances, and with labels if the model has a semantic branch; its
            classes must be as many as the model's, stuff first.
        output_dir: made if absent.
        epochs: passes over ``dataset`` in all, also when resuming.
        validation: scored by panoptic quality with the EMA weights, every ``validate_every`` epochs
            and at the end; a model without a semantic branch has none and is not scored.
        batch_size: images per step and process.
        photometric: strength of the random light, colour, blur and noise; 0 = none.
        flip: share of the images that are mirrored.
        learning_rate: at the end of the warm-up.
        weight_decay: for weights of more than one dimension.
        warmup: share of all steps over which the learning rate rises.
        clip: largest norm of the gradient.
        ema: decay of the running average of the weights, per step.
        precision: "bf16" = autocast.
        cache: keep the decoded images in memory.
        save_every: epochs between checkpoints; the last epoch always writes one.
        validate_every: epochs between validations.
        resume: go on from ``output_dir``'s checkpoint; it must exist and have the same settings.
        seed: of order, light, flips and the detector's sampling.
        progress: show a progress bar (on the main process of an interactive terminal).

    Returns:
        The log: per epoch a dict with ``epoch``, ``loss``, each of the model's losses,
        ``learning_rate``, ``seconds`` and, where validated, ``pq``, ``sq``, ``rq``, ``pq_things``
        and ``pq_stuff``.

    Raises:
        ValueError: a setting out of range, or classes that do not match.
        PysegError: nothing to resume, or a checkpoint of other settings; or a loss that is not
            finite.

    Example:
        >>> model = pyseg.models.get("upsnet_resnet50")(num_classes=8, num_stuff=5)
        >>> log = train_instances(model, StreetScenes(length=200), output_dir="runs/ups", epochs=20)
    """
    from accelerate import Accelerator
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    settings = {key: value for key, value in locals().items() if key in _RESUMABLE}
    _check(settings, model, dataset)
    settings["samples"] = len(dataset)
    output = Path(output_dir)
    checkpoint = output / CHECKPOINT
    if resume and not checkpoint.exists():
        raise PysegError(f"resume=True, but there is no {checkpoint}; start with resume=False")
    if not resume and checkpoint.exists():
        raise PysegError(f"output_dir {output} holds the checkpoint of an earlier run; pass "
                         "resume=True to go on with it, or another output_dir")  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(cpu=several and not torch.accelerator.is_available())
    device = accelerator.device
    source: Dataset = _Cached(dataset) if cache else dataset
    model.to(device).train()
    model.classes, model.palette = tuple(dataset.classes), tuple(dataset.palette)
    optimizer = torch.optim.AdamW(_parameter_groups(model, weight_decay), learning_rate)
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    order = _Order(len(source), seed)
    network, optimizer = accelerator.prepare(model, optimizer)
    share = batch_size * accelerator.num_processes
    steps = max(len(source) // share, 1)
    total = steps * epochs
    log: list[dict[str, Any]] = []
    first = 0
    if resume:
        first, log = _resume(checkpoint, settings, model, optimizer, average, device)

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn(),
        disable=not (progress and accelerator.is_main_process),
    )  # fmt: skip
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    with bar:
        task = bar.add_task("training", total=total, completed=first * steps, loss=math.nan)
        for epoch in range(first, epochs):
            start = time.perf_counter()
            order.epoch = epoch
            indices = list(order)
            # The sampling of proposals must not depend on how the run came to this epoch.
            torch.manual_seed(hash((seed, epoch, accelerator.process_index)) % 2**31)
            sums: dict[str, Tensor] = {}
            for index in range(steps):
                step = epoch * steps + index
                rate = learning_rate * _schedule(step, total, warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                begin = index * share + accelerator.process_index * batch_size
                # The last images of a small set come again, so that every process has some.
                chosen = [indices[k % len(indices)] for k in range(begin, begin + batch_size)]
                batch = [
                    _augmented(source[k], photometric, flip, _generator(seed, epoch, k + 1))
                    for k in chosen
                ]
                with autocast:
                    losses = network(batch)
                loss = torch.stack([value.float() for value in losses.values()]).sum()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(network.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                _average(average, model.state_dict(), min(ema, (1 + step) / (10 + step)))
                for name, value in {"loss": loss, **losses}.items():
                    sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach()
                bar.update(task, advance=1, loss=float(loss.detach()))
            means = {
                name: accelerator.reduce(value / steps, "mean").item()
                for name, value in sums.items()
            }
            if not math.isfinite(means["loss"]):
                raise PysegError(
                    f"the loss became {means['loss']} in epoch {epoch + 1}; lower learning_rate "
                    f"({learning_rate}) or use precision='fp32'"
                )
            entry: dict[str, Any] = {
                "epoch": epoch + 1,
                **{name: round(value, 5) for name, value in means.items()},
                "learning_rate": rate,
                "seconds": round(time.perf_counter() - start, 2),
            }
            last = epoch + 1 == epochs
            if (
                validation is not None
                and model.semantic is not None
                and (last or (epoch + 1) % validate_every == 0)
            ):
                with _Swapped(model, average):
                    entry.update(_validate(model, validation, accelerator))
            log.append(entry)
            if accelerator.is_main_process and (last or (epoch + 1) % save_every == 0):
                _save(output, settings, epoch + 1, log, model, optimizer, average)
    accelerator.wait_for_everyone()
    model.load_state_dict(average)
    model.eval()
    return log


_RESUMABLE = (
    "epochs", "batch_size", "photometric", "flip", "learning_rate", "weight_decay", "warmup",
    "clip", "ema", "precision", "seed",
)  # fmt: skip


def _check(settings: dict[str, Any], model: InstanceModel, dataset: Dataset) -> None:
    for name in ("epochs", "batch_size", "learning_rate", "clip"):
        if settings[name] <= 0:
            raise ValueError(f"{name} must be positive, got {settings[name]}")
    for name in ("flip", "warmup"):
        if not 0 <= settings[name] <= 1:
            raise ValueError(f"{name} is a share and must be in 0..1, got {settings[name]}")
    if not 0 <= settings["ema"] < 1:
        raise ValueError(f"ema must be in 0..1, below 1, got {settings['ema']}")
    if settings["precision"] not in ("bf16", "fp32"):
        raise ValueError(f"precision must be 'bf16' or 'fp32', got {settings['precision']!r}")
    if len(dataset) == 0:
        raise ValueError("dataset is empty")
    if len(model.classes) != len(dataset.classes):
        raise ValueError(f"model has {len(model.classes)} classes, dataset "
                         f"{len(dataset.classes)}; build the model with "
                         f"num_classes={len(dataset.classes)}")  # fmt: skip


def _augmented(
    sample: Sample, photometric: float, flip: float, generator: torch.Generator
) -> Sample:
    image, labels, instances = sample.image, sample.labels, sample.instances
    if photometric:
        image = random_light(image, photometric, generator)
    if instances is not None and torch.rand((), generator=generator) < flip:
        width = image.shape[2]
        boxes = instances.boxes.clone()
        boxes[:, 0], boxes[:, 2] = width - instances.boxes[:, 2], width - instances.boxes[:, 0]
        image = image.flip(2)
        labels = None if labels is None else labels.flip(1)
        instances = replace(instances, boxes=boxes, masks=instances.masks.flip(2))
    return replace(sample, image=image, labels=labels, segments=None, instances=instances)


def _validate(model: InstanceModel, dataset: Dataset, accelerator: Accelerator) -> dict[str, float]:
    """Panoptic quality; processes share the images."""
    from .metrics.panoptic import Panoptic

    metric = Panoptic(model.classes, things=model.things)
    for index in range(accelerator.process_index, len(dataset), accelerator.num_processes):
        sample = dataset[index]
        metric.update(model.predict([sample.image])[0], sample)
    state = {key: value.to(accelerator.device) for key, value in metric.state().items()}
    metric.load_state({key: accelerator.reduce(value, "sum") for key, value in state.items()})
    scores = metric.compute()
    return {key: round(scores[key], 5) for key in ("pq", "sq", "rq", "pq_things", "pq_stuff")}
