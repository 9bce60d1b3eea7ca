"""`train`: fits any `SemanticModel` to any dataset, on one process or several (accelerate)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from .. import processes
from ..errors import LabelError
from ..types import VOID, Dataset, Sample, Segmentation
from . import losses
from .augment import class_mix, generator_of, random_crop, random_light
from .label_spaces import Aliases, LabelSpace, Together, loss_by_space, merged, union
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
from .losses import Loss
from .optimizer import Optimizer, check_optimizer, frozen, make_optimizer, rates_of, read_rates

if TYPE_CHECKING:
    from ..models import SemanticModel


def train(
    model: SemanticModel,
    dataset: Dataset | Sequence[Dataset],
    *,
    output_dir: str | Path,
    epochs: int,
    steps: int | None = None,
    validation: Dataset | None = None,
    aliases: Aliases | None = None,
    background: str | Sequence[str] = (),
    repeats: Sequence[int] | None = None,
    batch_size: int = 12,
    accumulate: int = 1,
    crop_size: tuple[int, int] = (240, 320),
    scale: tuple[float, float] = (0.6, 1.6),
    full_size: float = 0.15,
    class_crops: float = 0.5,
    category_limit: float = 1.0,
    flip: float = 0.5,
    photometric: float = 1.0,
    class_mix: float = 0.0,
    loss: str = "ce+jaccard",
    class_weights: float | str = 0.35,
    auxiliary: float = 0.4,
    optimizer: Optimizer = "adamw",
    learning_rate: float = 2.5e-3,
    rates: Mapping[str, float] | str | None = None,
    momentum: float = 0.9,
    weight_decay: float = 0.02,
    schedule: Schedule = "cosine",
    warmup: float = 0.03,
    clip: float | None = None,
    ema: float = 0.997,
    precision: Precision | None = None,
    cache: bool = True,
    workers: int = 0,
    save_every: int = 1,
    validate_every: int = 10,
    patience: int | None = None,
    tensorboard: bool = False,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Trains ``model`` in place and leaves it holding the averaged (EMA) weights.

    By default AdamW under a cosine schedule; the loss is cross-entropy with class weights p^-0.35
    plus soft Jaccard (Rahman & Wang, 2016), on logits upsampled to the labels, and a cross-entropy
    for every auxiliary head. The same seed, software, device and numbers of threads and processes
    give the same weights; a run that was killed and is resumed gives those of one that was not.

    Files in ``output_dir`` are those of `pyseg.training.fit`: ``checkpoint.pt``,
    ``model.safetensors`` (the EMA weights, loadable as ``weights=``), ``log.json``, ``log.csv``.

    Args:
        model: any `SemanticModel`; moved to accelerate's device.
        dataset: samples with labels; its classes must be as many as the model's, which takes over
            their names and colours. Or several data sets: the model's classes are then all of
            theirs, by name (`pyseg.training.union`), and a class that one does not know is unknown
            in its images, not absent (`pyseg.training.label_spaces`).
        output_dir: made if absent.
        epochs: passes over ``dataset`` in all, also when resuming, where it may be another number
            than before: see `pyseg.training.fit`.
        steps: what an epoch has instead, where it is to be no pass over ``dataset``; passes go on
            from one epoch to the next, so that all samples are seen equally often.
        validation: scored with the EMA weights every ``validate_every`` epochs and at the end; with
            several data sets, in its own classes.
        aliases: with several data sets: the model's classes that one of theirs stands for, such as
            ``{"pavement": "sidewalk", "vehicle": ["car", "truck"]}``.
        background: with several data sets: names of the classes, at most one in each set, in which
            alone classes that the set does not know may hide.
        repeats: with several data sets: how often each comes in a pass, such as ``[6, 1]`` for a
            small set beside a large one; None = once each.
        batch_size: images per batch and process.
        accumulate: batches whose gradients are added up for one step of the optimizer.
        crop_size: (height, width) of the training crops, in pixels.
        scale: smallest and largest zoom of the random resize before the crop.
        full_size: share of the epochs, at the end, that see whole images (the data's largest size)
            under half the zoom range.
        class_crops: share of crops placed on a pixel of a class drawn evenly from those in the
            image, so that rare classes are seen more often; the others are placed anywhere.
        category_limit: largest share of a crop that one class may fill, as far as ten tries go.
        flip: share of the crops that are mirrored.
        photometric: strength of the random light, colour, blur and noise; 0 = none.
        class_mix: share of the crops onto which half of the classes of another image are pasted.
        loss: what is minimised: ``"ce"``, ``"ohem"``, ``"focal"``, ``"dice"``, ``"jaccard"``,
            ``"lovasz"``, ``"boundary"`` with factors and options, such as
            ``"ohem(threshold=0.6)+0.5*lovasz"``: see `pyseg.training.losses`.
        class_weights: of losses that are means over pixels: 0 = all pixels equal, 1 = all classes
            equal, ``"median"`` = median-frequency balancing.
        auxiliary: weight of each auxiliary head's loss.
        optimizer: ``"adamw"``, ``"adam"`` or ``"sgd"``.
        learning_rate: at the end of the warm-up.
        rates: factors of the learning rate of parts of the model, as a mapping or
            ``"backbone=0.1"``; 0 freezes a part, its normalisation's statistics too. Parts are
            ``backbone``, ``head`` (what depends on the classes), ``rest`` and paths of modules:
            ``"rest=0,head=1"`` trains the head only, see `pyseg.training.optimizer`.
        momentum: of SGD; of the others the first decay rate.
        weight_decay: for weights of more than one dimension.
        schedule: ``"cosine"``, ``"poly"``, ``"linear"`` or ``"one-cycle"``: see
            `pyseg.training.fit`.
        warmup: share of all steps over which the learning rate rises.
        clip: largest norm of the gradient; None = any.
        ema: decay of the running average of the weights, per step; 0 = the last weights.
        precision: "bf16" = autocast, "fp32" = none; None = what is usual on the device.
        cache: keep the decoded images in memory; without it every epoch reads the files.
        workers: processes that prepare batches; 0 = the training process does.
        save_every: epochs between checkpoints; the last epoch always writes one.
        validate_every: epochs between validations.
        patience: validations without a better mIoU after which training stops, with the best
            weights; None = it goes on.
        tensorboard: also write event files below ``output_dir/tensorboard``.
        resume: go on from ``output_dir``'s checkpoint, which must have the same settings; a run
            that was killed before its first one begins again.
        seed: of crops, light, order and dropout.
        progress: show a progress bar (on the main process, where stderr is a terminal) or now and
            then a line, with the time that is left.

    Returns:
        The log: per epoch a dict with ``epoch``, ``loss``, ``learning_rate``, ``precision``,
        ``seconds`` and, where validated, ``miou`` and ``iou`` per class (None where it does not
        occur).

    Raises:
        ValueError: a setting out of range, or classes that do not match.
        LabelError: a sample without labels, or with labels that are no class ids.
        PysegError: nothing to resume, or a checkpoint of other settings; a part that the model does
            not have; another training writes to the folder; a loss that is not finite, whose batch
            is then in ``nonfinite_batch.pt``.
        OSError: a file cannot be written; it names the file.

    Example:
        >>> model = pyseg.models.get("streetnet")(weights=None)
        >>> log = train(model, CamVid("camvid", "train"), output_dir="runs/street", epochs=100)
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
    check_positive(
        batch_size=batch_size, learning_rate=learning_rate, steps=1 if steps is None else steps
    )
    check_share(
        full_size=full_size,
        class_crops=class_crops,
        flip=flip,
        class_mix=class_mix,
        category_limit=category_limit,
    )
    check_optimizer(optimizer, momentum, rates)
    if patience is not None and validation is None:
        raise ValueError("patience needs validation: a score to look at")
    terms = Loss.parse(loss)
    class_weights = _kind_of_weights(class_weights)
    hiding = (background,) if isinstance(background, str) else tuple(background)
    sets, spaces = _label_spaces(model, dataset, aliases, hiding)
    if repeats is not None and (
        len(repeats) != len(sets) or not all(type(n) is int and n > 0 for n in repeats)
    ):
        raise ValueError(
            f"repeats must be a positive integer for each of {len(sets)} data sets, got {repeats}"
        )
    low, high = scale
    if not 0 < low <= high:
        raise ValueError(
            f"scale must be (smallest, largest) with 0 < smallest <= largest, got {scale}"
        )
    if min(crop_size) < 1:
        raise ValueError(f"crop_size must be (height, width) in pixels, got {crop_size}")
    check_output(output_dir, resume)
    factors = read_rates(rates)
    rates_of(model, factors)  # refuses parts that are not there, before labels are read
    accelerator = processes.accelerator()
    device = accelerator.device
    torch.manual_seed(seed)
    sources = [CachedDataset(each) if cache else each for each in sets]
    shown = progress and accelerator.is_main_process
    # Data sets of the same classes, such as two splits of one, are in one label space.
    kinds = list(dict.fromkeys(tuple(each.classes) for each in sets))
    of = [kinds.index(tuple(each.classes)) for each in sets]
    spaces = [spaces[of.index(kind)] for kind in range(len(kinds))]
    found, largest = [(torch.zeros(0), torch.zeros(0))] * len(kinds), (0, 0)
    for kind, source in zip(of, sources, strict=True):
        counts, among, size = _class_pixels_and_largest_size(source, len(source.classes), shown)
        before = found[kind] if len(found[kind][0]) else (0, 0)
        found[kind] = counts + before[0], among + before[1]
        largest = max(largest[0], size[0]), max(largest[1], size[1])
    weights = [losses.class_weights(*each, class_weights).to(device) for each in found]
    own_space = None
    if len(sets) > 1 and validation is not None:
        own_space = LabelSpace.of(validation.classes, model.classes, aliases, hiding)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    together = Together(sources, of, repeats)
    crops = _Crops(
        together,
        crop_size,
        scale,
        class_crops=class_crops,
        category_limit=category_limit,
        flip=flip,
        photometric=photometric,
        class_mix=class_mix,
        seed=seed,
    )
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

    def batches(epoch: int) -> Iterable[Any]:
        order.epoch = epoch
        crops.begin(epoch, largest if epoch >= full_from else None)
        return loader

    def step(network: nn.Module, batch: Any) -> dict[str, Tensor]:
        images, labels, of, _ = batch
        return {"loss": _loss(network(images), labels, of, terms, spaces, weights, auxiliary)}

    def weigh(batch: Any) -> Tensor:
        return (batch[1] != VOID).sum()

    def describe(batch: Any) -> dict[str, Any]:
        images, labels, _, names = batch
        return {"names": list(names), "images": images.cpu(), "labels": labels.cpu()}

    def validate(model: SemanticModel) -> dict[str, Any]:
        assert validation is not None
        return _validate(model, validation, own_space)

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
                second=0.99,
                rates=factors,
                fused=True,
            ),
            steps=len(loader),
            epochs=epochs,
            output_dir=output_dir,
            validate=None if validation is None else validate,
            settings={
                "repeats": None if repeats is None else list(repeats),
                "batch_size": batch_size,
                "crop_size": crop_size,
                "scale": scale,
                "full_size": full_size,
                "class_crops": class_crops,
                "category_limit": category_limit,
                "flip": flip,
                "photometric": photometric,
                "class_mix": class_mix,
                "loss": str(terms),
                "class_weights": class_weights,
                "auxiliary": auxiliary,
                "optimizer": optimizer,
                "learning_rate": learning_rate,
                "rates": factors,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "samples": len(together),
                "spaces": None if len(spaces) == 1 else [space.members for space in spaces],
            },
            older=_older,
            schedule=schedule,
            warmup=warmup,
            clip=clip,
            accumulate=accumulate,
            weigh=weigh,
            ema=ema,
            precision=precision,
            validate_every=validate_every,
            patience=patience,
            watch="miou",
            save_every=save_every,
            describe=describe,
            tensorboard=tensorboard,
            resume=resume,
            seed=seed,
            progress=progress,
        )


def _older(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What older versions' checkpoints say in other words, or not at all."""
    factor = settings.get("jaccard", 1.0)
    return {
        "repeats": None,
        "category_limit": 1.0,
        "flip": 0.5,
        "class_mix": 0.0,
        "loss": str(Loss.parse(f"ce+{factor}*jaccard" if factor else "ce")),
        "class_weights": settings.get("class_power"),
        "optimizer": "adamw",
        "rates": {},
        "momentum": 0.9,
    }


def _kind_of_weights(given: float | str) -> float | str:
    """The setting ``class_weights``, which a command line gives as text."""
    try:
        power = given if given == "median" else float(given)
    except (TypeError, ValueError):
        power = math.nan
    if isinstance(power, float) and not math.isfinite(power):
        raise ValueError(f"class_weights must be a number or 'median', got {given!r}")
    return power


def _label_spaces(
    model: SemanticModel,
    dataset: Dataset | Sequence[Dataset],
    aliases: Aliases | None,
    background: Sequence[str],
) -> tuple[tuple[Dataset, ...], list[LabelSpace]]:
    """The data sets and their classes among the model's, which gets their names and colours."""
    sets = tuple(dataset) if isinstance(dataset, (list, tuple)) else (dataset,)
    if len(sets) == 1:
        check_data(model, sets[0])
        if aliases or background:
            raise ValueError("aliases and background are for several data sets, and there is one")
        model.classes, model.palette = tuple(sets[0].classes), tuple(sets[0].palette)
        return sets, [LabelSpace.of(model.classes, model.classes)]
    if not sets or any(len(each) == 0 for each in sets):
        raise ValueError("dataset is empty, or one of several is")
    sets = tuple(merged(each, aliases) for each in sets)
    found = union(sets, aliases)
    if not set(found["classes"]) <= set(model.classes):
        if len(found["classes"]) != len(model.classes):
            raise ValueError(
                f"model has {len(model.classes)} classes, the data sets together "
                f"{len(found['classes'])}; build the model with num_classes="
                f"{len(found['classes'])}"
            )
        model.classes, model.palette = found["classes"], found["palette"]
    if strange := [n for n in background if not any(n in each.classes for each in sets)]:
        raise ValueError(f"background names {strange[0]!r}, which is a class of none of the sets")
    return sets, [LabelSpace.of(each.classes, model.classes, aliases, background) for each in sets]


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


class _Crops(TorchDataset[tuple[Tensor, Tensor, int, str]]):
    """Randomly zoomed, flipped, cropped, lit and mixed samples.

    Images [3, h, w] uint8, labels [h, w], the number of the data set and the sample's name.
    """

    def __init__(
        self,
        dataset: Together,
        crop_size: tuple[int, int],
        scale: tuple[float, float],
        *,
        class_crops: float,
        category_limit: float,
        flip: float,
        photometric: float,
        class_mix: float,
        seed: int,
    ) -> None:
        self.dataset, self.seed = dataset, seed
        self.crop_size, self.scale = crop_size, scale
        self.class_crops, self.photometric = class_crops, photometric
        self.options = {"flip": flip, "category_limit": category_limit}
        self.class_mix = class_mix
        # Shared memory: persistent workers see a new epoch without being started again.
        self._state = torch.zeros(3, dtype=torch.int64).share_memory_()

    def begin(self, epoch: int, full_size: tuple[int, int] | None) -> None:
        self._state.copy_(torch.tensor([epoch, *(full_size or (0, 0))]))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int, str]:
        epoch, *full_size = self._state.tolist()
        generator = generator_of(self.seed, epoch, index + 1)
        place = index % len(self.dataset)  # beyond it: see `EpochOrder`
        sample, space = self.dataset[place], self.dataset.space(place)
        image, labels = self._view(sample, full_size, generator)
        if self.class_mix and torch.rand((), generator=generator) < self.class_mix:
            fellows = self.dataset.fellows(place)
            other = int(torch.randint(fellows.start, fellows.stop, (), generator=generator))
            view = self._view(self.dataset[other], full_size, generator)
            image, labels = class_mix(image, labels, view, generator)
        return image, labels, space, sample.name

    def _view(
        self, sample: Sample, full_size: Sequence[int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        assert sample.labels is not None  # _class_pixels_and_largest_size has seen every sample
        size, (low, high) = self.crop_size, self.scale
        if full_size[0]:
            size, low, high = (full_size[0], full_size[1]), math.sqrt(low), math.sqrt(high)
        image, labels = random_crop(
            sample.image,
            sample.labels,
            size,
            (low, high),
            self.class_crops,
            generator,
            **self.options,
        )
        if self.photometric:
            image = random_light(image, self.photometric, generator)
        return image, labels


def _class_pixels_and_largest_size(
    dataset: Dataset, classes: int, show: bool
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """From one pass over the labels: of each class its pixels and all labelled ones of the images
    that show it, both [C], and the largest height and width."""
    from rich.console import Console
    from rich.progress import track

    if classes > VOID:
        raise LabelError(f"training takes at most {VOID} classes, got {classes}: {VOID} means void")
    counts = torch.zeros(VOID + 1, dtype=torch.int64)
    among = torch.zeros(VOID + 1, dtype=torch.int64)
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
        among[found > 0] += found[:VOID].sum()
        height = max(height, sample.labels.shape[0])
        width = max(width, sample.labels.shape[1])
    if not counts[:classes].any():
        raise LabelError("dataset has no pixel of any class, all are void")
    return counts[:classes], among[:classes], (height, width)


def _loss(
    outputs: Mapping[str, Tensor],
    labels: Tensor,
    of: Tensor,
    terms: Loss,
    spaces: Sequence[LabelSpace],
    weights: Sequence[Tensor],
    auxiliary: float,
) -> Tensor:
    """Main loss on logits at the labels' size, auxiliary ones on labels at the logits' size."""
    logits = outputs["out"].float()
    if logits.shape[2:] != labels.shape[1:]:
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    total = loss_by_space(terms, logits, labels, of, spaces, weights, VOID)
    for name, extra in outputs.items():
        if name.startswith("aux"):
            small = F.interpolate(labels[:, None], extra.shape[2:], mode="nearest-exact")[:, 0]
            value = loss_by_space(_CE, extra.float(), small, of, spaces, weights, VOID)
            total = total + auxiliary * value
    return total


_CE = Loss.parse("ce")


class _InSpace:
    """A model that predicts the classes of a data set."""

    def __init__(self, model: SemanticModel, dataset: Dataset, space: LabelSpace) -> None:
        self.model, self.space = model, space
        self.classes, self.palette = tuple(dataset.classes), tuple(dataset.palette)

    def predict(self, images: Sequence[Tensor]) -> list[Segmentation]:
        return [
            replace(
                one,
                classes=self.classes,
                palette=self.palette,
                logits=None if one.logits is None else self.space.logits(one.logits[None])[0],
                _labels=None,
            )
            for one in self.model.predict(images)
        ]


def _validate(model: SemanticModel, dataset: Dataset, space: LabelSpace | None) -> dict[str, Any]:
    """mIoU and the IoU of each class (None where it does not occur)."""
    from ..metrics.semantic import Semantic

    scored: Any = model if space is None else _InSpace(model, dataset, space)
    scores = score("semantic", Semantic(scored.classes), scored, dataset)
    return {
        "miou": round(scores["miou"], 5),
        "iou": {
            name: None if math.isnan(entry["iou"]) else round(entry["iou"], 5)
            for name, entry in scores["per_class"].items()
        },
    }
