"""`train_instances`: fits Mask R-CNN, panoptic FPN or UPSNet to a dataset with instances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import processes
from ..types import Dataset, Sample
from .augment import copy_paste as pasted
from .augment import generator_of, random_view
from .loop import (
    Precision,
    Schedule,
    check_data,
    check_output,
    check_positive,
    check_run,
    check_share,
    fit,
    score,
)
from .optimizer import Optimizer, check_optimizer, frozen, make_optimizer, rates_of, read_rates
from .semantic import CachedDataset, EpochOrder

if TYPE_CHECKING:
    from ..models import InstanceModel


def train_instances(
    model: InstanceModel,
    dataset: Dataset,
    *,
    output_dir: str | Path,
    epochs: int,
    validation: Dataset | None = None,
    batch_size: int = 2,
    accumulate: int = 1,
    photometric: float = 0.5,
    flip: float = 0.5,
    copy_paste: float = 0.0,
    optimizer: Optimizer = "adamw",
    learning_rate: float = 5e-4,
    rates: Mapping[str, float] | str | None = None,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    schedule: Schedule = "cosine",
    warmup: float = 0.05,
    clip: float = 10.0,
    ema: float = 0.997,
    precision: Precision | None = None,
    cache: bool = True,
    save_every: int = 1,
    validate_every: int = 10,
    patience: int | None = None,
    tensorboard: bool = False,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Trains ``model`` in place and leaves it holding the averaged (EMA) weights.

    By default AdamW under a cosine schedule on the sum of the model's losses; images are flipped
    and lit at random, and resized by the model itself. The same seed, software and device give the
    same weights; a run that was killed and is resumed gives those of one that was not. Files in
    ``output_dir`` are those of `pyseg.training.fit`.

    Args:
        model: an `InstanceModel`; moved to accelerate's device.
        dataset: samples with instances, and with labels if the model has a semantic branch; its
            classes must be as many as the model's, stuff first.
        output_dir: made if absent.
        epochs: passes over ``dataset`` in all, also when resuming, where it may be another number
            than before: see `pyseg.training.fit`.
        validation: scored by panoptic quality with the EMA weights, every ``validate_every`` epochs
            and at the end; a model without a semantic branch has none and is not scored.
        batch_size: images per batch and process.
        accumulate: batches whose gradients are added up for one step of the optimizer.
        photometric: strength of the random light, colour, blur and noise; 0 = none.
        flip: share of the images that are mirrored.
        copy_paste: share of the images onto which half of the instances of another are pasted.
        optimizer: ``"adamw"``, ``"adam"`` or ``"sgd"``.
        learning_rate: at the end of the warm-up.
        rates: factors of the learning rate of parts of the model, 0 = frozen: as `train` has it.
        momentum: of SGD; of the others the first decay rate.
        weight_decay: for weights of more than one dimension.
        schedule: ``"cosine"``, ``"poly"``, ``"linear"`` or ``"one-cycle"``: see
            `pyseg.training.fit`.
        warmup: share of all steps over which the learning rate rises.
        clip: largest norm of the gradient.
        ema: decay of the running average of the weights, per step.
        precision: "bf16" = autocast, "fp32" = none; None = what is usual on the device.
        cache: keep the decoded images in memory.
        save_every: epochs between checkpoints; the last epoch always writes one.
        validate_every: epochs between validations.
        patience: validations without a better panoptic quality after which training stops, with the
            best weights; None = it goes on.
        tensorboard: also write event files below ``output_dir/tensorboard``.
        resume: go on from ``output_dir``'s checkpoint, which must have the same settings; a run
            that was killed before its first one begins again.
        seed: of order, light, flips and the detector's sampling.
        progress: show a progress bar (on the main process, where stderr is a terminal) or now and
            then a line, with the time that is left.

    Returns:
        The log: per epoch a dict with ``epoch``, ``loss``, each of the model's losses,
        ``learning_rate``, ``precision``, ``seconds`` and, where validated, ``pq``, ``sq``, ``rq``,
        ``pq_things`` and ``pq_stuff``.

    Raises:
        ValueError: a setting out of range, or classes that do not match.
        PysegError: nothing to resume, or a checkpoint of other settings; another training writes
            to the folder; a loss that is not finite.
        OSError: a file cannot be written; it names the file.

    Example:
        >>> model = pyseg.models.create("upsnet", num_classes=8, num_stuff=5, weights=None)
        >>> log = train_instances(model, StreetScenes(length=200), output_dir="runs/ups", epochs=20)
    """
    check_run(
        epochs=epochs,
        warmup=warmup,
        clip=clip,
        ema=ema,
        precision=precision,
        schedule=schedule,
        accumulate=accumulate,
        patience=patience,
    )
    check_positive(batch_size=batch_size, learning_rate=learning_rate)
    check_share(flip=flip, copy_paste=copy_paste)
    check_optimizer(optimizer, momentum, rates)
    check_data(model, dataset)
    scored = validation is not None and model.semantic is not None
    if patience is not None and not scored:
        raise ValueError("patience needs validation of a model with a semantic branch")
    check_output(output_dir, resume)
    factors = read_rates(rates)
    rates_of(model, factors)  # refuses parts that are not there
    accelerator = processes.accelerator()
    source: Dataset = CachedDataset(dataset) if cache else dataset
    model.classes, model.palette = tuple(dataset.classes), tuple(dataset.palette)
    model.to(accelerator.device)
    order = EpochOrder(len(source), seed)
    share = batch_size * accelerator.num_processes
    steps = max(len(source) // share, 1)

    def view(epoch: int, index: int) -> Sample:
        generator = generator_of(seed, epoch, index + 1)
        sample = random_view(source[index], photometric, flip, generator)
        if copy_paste and torch.rand((), generator=generator) < copy_paste:
            other = int(torch.randint(len(source), (), generator=generator))
            above = random_view(source[other], photometric, flip, generator)
            sample = pasted(sample, above, generator)
        return sample

    def batches(epoch: int) -> Iterator[list[Sample]]:
        order.epoch = epoch
        indices = list(order)
        for step in range(steps):
            begin = step * share + accelerator.process_index * batch_size
            # The last images of a small set come again, so that every process has some.
            chosen = [indices[k % len(indices)] for k in range(begin, begin + batch_size)]
            yield [view(epoch, k) for k in chosen]

    def step(network: nn.Module, samples: list[Sample]) -> dict[str, Tensor]:
        losses = network(samples)
        return {"loss": torch.stack([value.float() for value in losses.values()]).sum(), **losses}

    def validate(model: InstanceModel) -> dict[str, float]:
        assert validation is not None
        return _validate(model, validation)

    def describe(samples: list[Sample]) -> dict[str, Any]:
        kept: dict[str, Any] = {
            "names": [sample.name for sample in samples],
            "images": [sample.image for sample in samples],
            "labels": [sample.labels for sample in samples],
        }
        for name in ("boxes", "masks", "labels"):
            of = f"instance_{name}"
            kept[of] = [getattr(sample.instances, name, None) for sample in samples]
        return kept

    with frozen(model, factors):
        return fit(
            model,
            batches,
            step=step,
            optimizer=make_optimizer(
                optimizer,
                model,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                momentum=momentum,
                rates=factors,
            ),
            steps=steps,
            epochs=epochs,
            output_dir=output_dir,
            validate=validate if scored else None,
            settings={
                "batch_size": batch_size,
                "photometric": photometric,
                "flip": flip,
                "copy_paste": copy_paste,
                "optimizer": optimizer,
                "learning_rate": learning_rate,
                "rates": factors,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "samples": len(dataset),
            },
            older=_older,
            schedule=schedule,
            warmup=warmup,
            clip=clip,
            accumulate=accumulate,
            ema=ema,
            precision=precision,
            validate_every=validate_every,
            patience=patience,
            watch="pq",
            save_every=save_every,
            describe=describe,
            tensorboard=tensorboard,
            resume=resume,
            seed=seed,
            progress=progress,
        )


def _older(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What older versions' checkpoints do not say."""
    return {"copy_paste": 0.0, "optimizer": "adamw", "rates": {}, "momentum": 0.9}


def _validate(model: InstanceModel, dataset: Dataset) -> dict[str, float]:
    from ..metrics.panoptic import Panoptic

    scores = score("panoptic", Panoptic(model.classes, things=model.things), model, dataset)
    return {key: round(scores[key], 5) for key in ("pq", "sq", "rq", "pq_things", "pq_stuff")}
