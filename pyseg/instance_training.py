"""`train_instances`: fits Mask R-CNN, panoptic FPN or UPSNet to a dataset with instances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .training import (
    _accelerator,
    _Cached,
    _check,
    _fit,
    _generator,
    _Order,
    _output_folder,
    _parameter_groups,
    _score,
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
    settings = {key: value for key, value in locals().items() if key in _RESUMABLE}
    positive = ("epochs", "batch_size", "learning_rate", "clip")
    _check(settings, model, dataset, positive=positive, shares=("flip", "warmup"))
    output = _output_folder(output_dir, resume)
    accelerator = _accelerator()
    source: Dataset = _Cached(dataset) if cache else dataset
    model.to(accelerator.device)
    optimizer = torch.optim.AdamW(_parameter_groups(model, weight_decay), learning_rate)
    order = _Order(len(source), seed)
    share = batch_size * accelerator.num_processes
    steps = max(len(source) // share, 1)

    def batches(epoch: int) -> Iterator[tuple[list[Sample], None]]:
        order.epoch = epoch
        indices = list(order)
        for step in range(steps):
            begin = step * share + accelerator.process_index * batch_size
            # The last images of a small set come again, so that every process has some.
            chosen = [indices[k % len(indices)] for k in range(begin, begin + batch_size)]
            samples = [
                _augmented(source[k], photometric, flip, _generator(seed, epoch, k + 1))
                for k in chosen
            ]
            yield samples, None

    def losses(outputs: dict[str, Tensor], _: None) -> dict[str, Tensor]:
        return {"loss": torch.stack([value.float() for value in outputs.values()]).sum(), **outputs}

    return _fit(
        model,
        dataset,
        optimizer,
        accelerator,
        output,
        settings,
        steps,
        batches,
        losses,
        validation if model.semantic is not None else None,
        _validate,
        clip=clip,
        validate_every=validate_every,
        save_every=save_every,
        resume=resume,
        progress=progress,
    )


_RESUMABLE = (
    "epochs",
    "batch_size",
    "photometric",
    "flip",
    "learning_rate",
    "weight_decay",
    "warmup",
    "clip",
    "ema",
    "precision",
    "seed",
)


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
    from .metrics.panoptic import Panoptic

    scores = _score(Panoptic(model.classes, things=model.things), model, dataset, accelerator)
    return {key: round(scores[key], 5) for key in ("pq", "sq", "rq", "pq_things", "pq_stuff")}
