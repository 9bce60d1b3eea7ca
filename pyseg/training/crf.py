"""`train_crf`: learns weights and label compatibility of the refiner `crf` by gradients."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import nll_loss

from ..classes import check_classes
from ..errors import PysegError
from ..files import finite
from ..metrics.semantic import Semantic
from ..pipeline import Pipeline, Stage
from ..progress import notebook_bar
from ..refiners.crf import CRF
from ..spec import StageSpec
from ..types import VOID, Dataset, Sample, Segmentation


@dataclass(frozen=True)
class Training:
    """The result of `train_crf` and `train_segfix`."""

    pipeline: Pipeline  # with the trained refiner as its last stage
    losses: tuple[float, ...]  # mean over the images, of each epoch
    off: dict[str, Any]  # scores of the metric `semantic` on the images that check, without it
    default: dict[str, Any]  # with the refiner's default
    trained: dict[str, Any]
    refiner: str = "crf"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; nan becomes None."""
        scores = {name: finite(getattr(self, name)) for name in ("off", "default", "trained")}
        return {"losses": list(self.losses), **scores}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table that is printed, as text."""
        classes = list(self.trained["per_class"])
        head = [self.refiner, "mIoU", "pixel accuracy", *classes]
        rows = []
        for name in ("off", "default", "trained"):
            scores = getattr(self, name)
            rows.append(
                [
                    name,
                    f"{scores['miou']:.4f}",
                    f"{scores['pixel_accuracy']:.4f}",
                    *(f"{scores['per_class'][c]['iou']:.3f}" for c in classes),
                ]
            )
        return head, rows


def chosen_images(
    pipeline: Pipeline, dataset: Dataset, check: Dataset, limit: int | None
) -> list[tuple[str, Dataset, list[int]]]:
    """Which images a refiner is trained on and scored on: ``limit`` of each, spread evenly.

    Returns:
        For both data sets the name of the argument, the data set and the indices of its images.

    Raises:
        PysegError: classes that are not the pipeline's, or no images.
    """
    chosen = []
    for name, data in (("dataset", dataset), ("check", check)):
        try:
            check_classes(pipeline.classes, data.classes)
        except PysegError as error:
            raise PysegError(f"{name}: {error}") from None
        count = len(data) if limit is None else min(limit, len(data))
        if count < 1:
            raise PysegError(
                f"{name} has no images to use; its length is {len(data)}, limit {limit}"
            )
        chosen.append((name, data, [k * len(data) // count for k in range(count)]))
    return chosen


def train_crf(
    pipeline: Pipeline,
    dataset: Dataset,
    check: Dataset,
    *,
    limit: int | None = None,
    epochs: int = 4,
    learning_rate: float = 0.03,
    seed: int = 0,
    track: Callable[[Sequence[int]], Iterable[int]] = notebook_bar,
    **options: Any,
) -> Training:
    """Trains kernel weights and label compatibility of `crf` behind a pipeline that stays as it is.

    Minimises the cross-entropy of the refined probabilities through all mean-field iterations, one
    image a step, by Adam, as in Zheng et al., "Conditional random fields as recurrent neural
    networks" (ICCV 2015). The pipeline runs once per image.

    Args:
        pipeline: its last stage must give logits.
        dataset: labelled samples to train on.
        check: labelled samples to score; others than those of ``dataset``.
        limit: use so many images of each, spread evenly; None = all.
        epochs: passes over the images.
        learning_rate: of Adam, for the logarithms of the weights and for the compatibility.
        seed: of the order of images.
        track: wraps the sequence of steps, for a progress bar.
        **options: of the refiner, such as ``iterations`` and ``bilateral``, where training starts.

    Raises:
        PysegError: classes that differ, nothing to train on, or a last stage without logits.
        ValueError: options that the refiner refuses.

    Example:
        >>> training = train_crf(pyseg.build("streetnet"), CamVid(root), CamVid(root, "val"))
        >>> training.pipeline.save("streetnet_crf")
    """
    if not epochs > 0 or not learning_rate > 0:
        raise PysegError(
            f"epochs and learning_rate must be positive, got {epochs} and {learning_rate}"
        )
    groups: list[list[tuple[Sample, Segmentation]]] = []
    for name, data, indices in chosen_images(pipeline, dataset, check, limit):
        samples = [data[index] for index in indices]
        predictions = [pipeline.run_stages(sample.image)[-1] for sample in samples]
        for sample, prediction in zip(samples, predictions, strict=True):
            if prediction.logits is None:
                raise PysegError(f"crf needs logits, but {pipeline} gives labels only")
            if sample.labels is None or bool((sample.labels == VOID).all()):
                raise PysegError(f"{sample.name} of {name} has no labelled pixel")
        groups.append(list(zip(samples, predictions, strict=True)))
    fitted, checked = groups

    def score(refiner: CRF | None) -> dict[str, Any]:
        metric = Semantic(check.classes)
        for sample, prediction in checked:
            if refiner is not None:
                prediction = refiner.refine(sample.image.to(pipeline.device), prediction)
            metric.update(prediction, sample)
        return metric.compute()

    crf = CRF(trainable=True, num_classes=len(pipeline.classes), **options).to(pipeline.device)
    optimizer = torch.optim.Adam(crf.parameters(), lr=learning_rate)
    rng = random.Random(seed)
    losses: list[list[float]] = []
    for step in track(range(epochs * len(fitted))):
        if step % len(fitted) == 0:
            order = rng.sample(range(len(fitted)), len(fitted))
            losses.append([])
        sample, prediction = fitted[order[step % len(fitted)]]
        assert prediction.logits is not None and sample.labels is not None
        images = sample.image[None].to(pipeline.device)
        labels = sample.labels[None].long().to(pipeline.device)
        logits = prediction.logits[None] / prediction.temperature
        loss = nll_loss(crf(images, logits), labels, ignore_index=VOID)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[-1].append(loss.item())
    crf.eval()
    stage = Stage(StageSpec("crf", {**options, "trainable": True}), crf)
    return Training(
        Pipeline([*pipeline.stages, stage], num_classes=len(pipeline.classes)),
        tuple(sum(epoch) / len(epoch) for epoch in losses),
        score(None),
        score(CRF()),
        score(crf),
    )
