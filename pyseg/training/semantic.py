"""`train`: fits any `SemanticModel` to any dataset, on one process or several (accelerate)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from .. import processes
from ..errors import LabelError
from ..types import VOID, Dataset, Sample
from .augment import generator_of, random_crop, random_light
from .loop import (
    Precision,
    check_data,
    check_output,
    check_positive,
    check_run,
    check_share,
    fit,
    parameter_groups,
    score,
)

if TYPE_CHECKING:
    from ..models import SemanticModel


def train(
    model: SemanticModel,
    dataset: Dataset,
    *,
    output_dir: str | Path,
    epochs: int,
    steps: int | None = None,
    validation: Dataset | None = None,
    batch_size: int = 12,
    crop_size: tuple[int, int] = (240, 320),
    scale: tuple[float, float] = (0.6, 1.6),
    full_size: float = 0.15,
    class_crops: float = 0.5,
    photometric: float = 1.0,
    learning_rate: float = 2.5e-3,
    weight_decay: float = 0.02,
    warmup: float = 0.03,
    class_power: float = 0.35,
    jaccard: float = 1.0,
    auxiliary: float = 0.4,
    ema: float = 0.997,
    precision: Precision | None = None,
    cache: bool = True,
    workers: int = 0,
    save_every: int = 1,
    validate_every: int = 10,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Trains ``model`` in place and leaves it holding the averaged (EMA) weights.

    AdamW under a cosine schedule; the loss is cross-entropy with class weights p^-``class_power``
    plus soft Jaccard (Rahman & Wang, 2016), on logits upsampled to the labels, and a cross-entropy
    for every auxiliary head. The same seed, software, device and numbers of threads and processes
    give the same weights; a run that was killed and is resumed gives those of one that was not.

    Files in ``output_dir`` are those of `pyseg.training.fit`: ``checkpoint.pt``,
    ``model.safetensors`` (the EMA weights, loadable as ``weights=``) and ``log.json``.

    Args:
        model: any `SemanticModel`; moved to accelerate's device.
        dataset: samples with labels; its classes must be as many as the model's, which
            takes over their names and colours.
        output_dir: made if absent.
        epochs: passes over ``dataset`` in all, also when resuming, where it may be another number
            than before: see `pyseg.training.fit`.
        steps: what an epoch has instead, where it is to be no pass over ``dataset``; passes go on
            from one epoch to the next, so that all samples are seen equally often.
        validation: scored with the EMA weights every ``validate_every`` epochs and at the end.
        batch_size: images per step and process.
        crop_size: (height, width) of the training crops, in pixels.
        scale: smallest and largest zoom of the random resize before the crop.
        full_size: share of the epochs, at the end, that see whole images (the data's largest size)
            under half the zoom range.
        class_crops: share of crops placed on a pixel of a class drawn evenly from those in the
            image, so that rare classes are seen more often; the others are placed anywhere.
        photometric: strength of the random light, colour, blur and noise; 0 = none.
        learning_rate: at the end of the warm-up.
        weight_decay: for weights of more than one dimension.
        warmup: share of all steps over which the learning rate rises.
        class_power: 0 = all pixels equal, 1 = all classes equal.
        jaccard: weight of the soft Jaccard loss.
        auxiliary: weight of each auxiliary head's loss.
        ema: decay of the running average of the weights, per step.
        precision: "bf16" = autocast, "fp32" = none; None = bf16 where the device computes in it.
        cache: keep the decoded images in memory; without it every epoch reads the files.
        workers: processes that prepare batches; 0 = the training process does.
        save_every: epochs between checkpoints; the last epoch always writes one.
        validate_every: epochs between validations.
        resume: go on from ``output_dir``'s checkpoint; it must exist and have the same settings.
        seed: of crops, light, order and dropout.
        progress: show a progress bar (on the main process, where stderr is a terminal).

    Returns:
        The log: per epoch a dict with ``epoch``, ``loss``, ``learning_rate``, ``precision``,
        ``seconds`` and, where validated, ``miou`` and ``iou`` per class (None where it does not
        occur).

    Raises:
        ValueError: a setting out of range, or classes that do not match.
        LabelError: a sample without labels, or with labels that are no class ids.
        PysegError: nothing to resume, or a checkpoint of other settings; another training writes
            to the folder; a loss that is not finite.
        OSError: a file cannot be written; it names the file.

    Example:
        >>> model = pyseg.models.get("streetnet")(weights=None)
        >>> log = train(model, CamVid("camvid", "train"), output_dir="runs/street", epochs=100)
    """
    check_run(epochs=epochs, warmup=warmup, clip=None, ema=ema, precision=precision)
    check_positive(
        batch_size=batch_size, learning_rate=learning_rate, steps=1 if steps is None else steps
    )
    check_share(full_size=full_size, class_crops=class_crops)
    check_data(model, dataset)
    low, high = scale
    if not 0 < low <= high:
        raise ValueError(
            f"scale must be (smallest, largest) with 0 < smallest <= largest, got {scale}"
        )
    if min(crop_size) < 1:
        raise ValueError(f"crop_size must be (height, width) in pixels, got {crop_size}")
    check_output(output_dir, resume)
    accelerator = processes.accelerator()
    device = accelerator.device
    torch.manual_seed(seed)
    source: Dataset = CachedDataset(dataset) if cache else dataset
    shown = progress and accelerator.is_main_process
    frequencies, largest = _class_pixels_and_largest_size(source, len(model.classes), shown)
    class_weights = _class_weights(frequencies, class_power).to(device)
    model.classes, model.palette = tuple(dataset.classes), tuple(dataset.palette)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        parameter_groups(model, weight_decay), learning_rate, betas=(0.9, 0.99), fused=True
    )

    crops = _Crops(source, crop_size, scale, class_crops, photometric, seed)
    length = None if steps is None else steps * batch_size * accelerator.num_processes
    order = EpochOrder(len(crops), seed, length)
    loader = DataLoader(
        crops,
        batch_size,
        sampler=order,
        drop_last=len(order) >= batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        # Its own generator: else it draws from the global one, more or less often by `workers`.
        generator=torch.Generator(),
    )
    loader = accelerator.prepare(loader)
    full_from = epochs - round(epochs * full_size)

    def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        order.epoch = epoch
        crops.begin(epoch, largest if epoch >= full_from else None)
        return loader

    def step(network: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        return {"loss": _loss(network(images), labels, class_weights, jaccard, auxiliary)}

    def validate(model: SemanticModel) -> dict[str, Any]:
        assert validation is not None
        return _validate(model, validation)

    return fit(
        model,
        batches,
        step=step,
        optimizer=optimizer,
        steps=len(loader),
        epochs=epochs,
        output_dir=output_dir,
        validate=None if validation is None else validate,
        settings={
            "batch_size": batch_size,
            "crop_size": crop_size,
            "scale": scale,
            "full_size": full_size,
            "class_crops": class_crops,
            "photometric": photometric,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "class_power": class_power,
            "jaccard": jaccard,
            "auxiliary": auxiliary,
            "samples": len(dataset),
        },
        warmup=warmup,
        ema=ema,
        precision=precision,
        validate_every=validate_every,
        save_every=save_every,
        resume=resume,
        seed=seed,
        progress=progress,
    )


class CachedDataset:
    """A dataset that decodes each sample once."""

    def __init__(self, dataset: Dataset) -> None:
        self.classes, self.palette = dataset.classes, dataset.palette
        self._dataset = dataset
        self._samples: list[Sample | None] = [None] * len(dataset)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self._samples[index]
        if sample is None:
            sample = self._samples[index] = self._dataset[index]
        return sample


class EpochOrder(Sampler[int]):
    """The samples of an epoch, which depend on seed and epoch only, so that a resumed one has them.

    They are the next ``length`` of an endless row of permutations of ``count`` samples. One that
    comes in the n-th further permutation within an epoch has its index plus n times ``count``.
    """

    def __init__(self, count: int, seed: int, length: int | None = None) -> None:
        self.count, self.seed, self.epoch = count, seed, 0
        self.length = count if length is None else length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        begin, end = self.epoch * self.length, (self.epoch + 1) * self.length
        first = begin // self.count
        for turn in range(first, (end - 1) // self.count + 1):
            generator = generator_of(self.seed, turn, 0)
            order = torch.randperm(self.count, generator=generator) + (turn - first) * self.count
            done = turn * self.count
            yield from order[max(begin - done, 0) : end - done].tolist()


class _Crops(TorchDataset[tuple[Tensor, Tensor]]):
    """Randomly zoomed, flipped, cropped and lit samples: images [3, h, w] uint8, labels [h, w]."""

    def __init__(
        self,
        dataset: Dataset,
        crop_size: tuple[int, int],
        scale: tuple[float, float],
        class_crops: float,
        photometric: float,
        seed: int,
    ) -> None:
        self.dataset, self.seed = dataset, seed
        self.crop_size, self.scale = crop_size, scale
        self.class_crops, self.photometric = class_crops, photometric
        # Shared memory: persistent workers see a new epoch without being started again.
        self._state = torch.zeros(3, dtype=torch.int64).share_memory_()

    def begin(self, epoch: int, full_size: tuple[int, int] | None) -> None:
        self._state.copy_(torch.tensor([epoch, *(full_size or (0, 0))]))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        epoch, *full_size = self._state.tolist()
        generator = generator_of(self.seed, epoch, index + 1)
        sample = self.dataset[index % len(self.dataset)]  # beyond it: see `EpochOrder`
        assert sample.labels is not None  # _class_pixels_and_largest_size has seen every sample
        size, (low, high) = self.crop_size, self.scale
        if full_size[0]:
            size, low, high = (full_size[0], full_size[1]), math.sqrt(low), math.sqrt(high)
        image, labels = random_crop(
            sample.image, sample.labels, size, (low, high), self.class_crops, generator
        )
        if self.photometric:
            image = random_light(image, self.photometric, generator)
        return image, labels


def _class_pixels_and_largest_size(
    dataset: Dataset, classes: int, show: bool
) -> tuple[Tensor, tuple[int, int]]:
    """Pixels per class [C] and the largest height and width, from one pass over the labels."""
    from rich.console import Console
    from rich.progress import track

    if classes > VOID:
        raise LabelError(f"training takes at most {VOID} classes, got {classes}: {VOID} means void")
    counts = torch.zeros(VOID + 1, dtype=torch.int64)
    height = width = 0
    console = Console(stderr=True)
    for index in track(
        range(len(dataset)),
        "reading labels",
        console=console,
        disable=not (show and console.is_terminal),
        transient=True,
    ):
        sample = dataset[index]
        if sample.labels is None:
            raise LabelError(f"sample {sample.name} has no labels; training needs them for all")
        found = torch.bincount(sample.labels.flatten(), minlength=VOID + 1)
        wrong = found[classes:VOID].nonzero().flatten() + classes
        if len(wrong):
            raise LabelError(
                f"sample {sample.name} has labels {wrong.tolist()} beyond the "
                f"{classes} classes and other than {VOID} (void)"
            )
        counts += found
        height = max(height, sample.labels.shape[0])
        width = max(width, sample.labels.shape[1])
    if not counts[:classes].any():
        raise LabelError("dataset has no pixel of any class, all are void")
    return counts[:classes], (height, width)


def _class_weights(counts: Tensor, power: float) -> Tensor:
    """p^-power, scaled so that the expected weight of a pixel is 1; absent classes weigh 1."""
    share = counts.double() / counts.sum()
    weights = torch.where(counts > 0, share.clamp(min=1e-6) ** -power, 0.0)
    weights = weights / (weights * share).sum()
    return torch.where(counts > 0, weights, 1.0).float()


def _loss(
    outputs: dict[str, Tensor],
    labels: Tensor,
    class_weights: Tensor,
    jaccard: float,
    auxiliary: float,
) -> Tensor:
    """Main loss on logits at the labels' size, auxiliary ones on labels at the logits' size."""
    target = labels.long()
    logits = outputs["out"].float()
    if logits.shape[2:] != target.shape[1:]:
        logits = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
    log_p = logits.log_softmax(1)
    total = _nll(log_p, target, class_weights)
    if jaccard:
        total = total + jaccard * _soft_jaccard(log_p.exp(), target)
    for name, extra in outputs.items():
        if name.startswith("aux"):
            extra = extra.float()
            small = F.interpolate(labels[:, None], extra.shape[2:], mode="nearest-exact")[:, 0]
            total = total + auxiliary * _nll(extra.log_softmax(1), small.long(), class_weights)
    return total


def _nll(log_p: Tensor, target: Tensor, class_weights: Tensor) -> Tensor:
    # Divided by the pixels, not by their weights: a batch of rare classes then counts for more.
    loss = F.nll_loss(log_p, target, class_weights, ignore_index=VOID, reduction="sum")
    return loss / (target != VOID).sum().clamp(min=1)


def _soft_jaccard(p: Tensor, target: Tensor) -> Tensor:
    """1 − mean over the batch's classes of Σ p·y / Σ (p + y − p·y), void pixels left out."""
    classes = p.shape[1]
    valid = target != VOID
    p = p * valid[:, None]
    index = torch.where(valid, target, 0)
    hit = p.gather(1, index[:, None])[:, 0]  # probability of the true class, 0 where void
    overlap = hit.new_zeros(classes).scatter_add_(0, index.flatten(), hit.flatten())
    truth = torch.bincount(target[valid], minlength=classes)
    union = p.sum((0, 2, 3)) + truth - overlap
    present = truth > 0
    return 1 - (overlap[present] / union[present]).mean() if present.any() else overlap.sum() * 0


def _validate(model: SemanticModel, dataset: Dataset) -> dict[str, Any]:
    """mIoU and the IoU of each class (None where it does not occur)."""
    from ..metrics.semantic import Semantic

    scores = score("semantic", Semantic(model.classes), model, dataset)
    return {
        "miou": round(scores["miou"], 5),
        "iou": {
            name: None if math.isnan(entry["iou"]) else round(entry["iou"], 5)
            for name, entry in scores["per_class"].items()
        },
    }
