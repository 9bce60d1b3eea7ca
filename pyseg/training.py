"""`train`: fits any `SemanticModel` to any dataset, on one process or several (accelerate)."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from .errors import LabelError, PysegError
from .files import replacing, write_json
from .types import VOID, Dataset, Metric, Sample
from .weights import load_into, save_state

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .models.panoptic import InstanceModel
    from .models.semantic import SemanticModel

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "model.safetensors"
LOG = "log.json"


def train(
    model: SemanticModel,
    dataset: Dataset,
    *,
    output_dir: str | Path,
    epochs: int,
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
    precision: Literal["bf16", "fp32"] = "bf16",
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

    Files in ``output_dir``, each replaced in one step, so that a kill leaves the previous one:
    ``checkpoint.pt`` (all that resuming needs), ``model.safetensors`` (the EMA weights, loadable as
    ``weights=``) and ``log.json`` (one entry per epoch).

    Args:
        model: any `SemanticModel`; moved to accelerate's device.
        dataset: samples with labels; its classes must be as many as the model's, which
            takes over their names and colours.
        output_dir: made if absent.
        epochs: passes over ``dataset`` in all, also when resuming.
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
        precision: "bf16" = autocast (memory and, where the CPU or GPU has it, speed).
        cache: keep the decoded images in memory; without it every epoch reads the files.
        workers: processes that prepare batches; 0 = the training process does.
        save_every: epochs between checkpoints; the last epoch always writes one.
        validate_every: epochs between validations.
        resume: go on from ``output_dir``'s checkpoint; it must exist and have the same settings.
        seed: of crops, light, order and dropout.
        progress: show a progress bar (on the main process of an interactive terminal).

    Returns:
        The log: per epoch a dict with ``epoch``, ``loss``, ``learning_rate``, ``seconds`` and,
        where validated, ``miou`` and ``iou`` per class (None where it does not occur).

    Raises:
        ValueError: a setting out of range, or classes that do not match.
        LabelError: a sample without labels, or with labels that are no class ids.
        PysegError: nothing to resume, or a checkpoint of other settings; or a loss that is not
            finite.

    Example:
        >>> model = pyseg.models.get("streetnet")(weights=None)
        >>> log = train(model, CamVid("camvid", "train"), output_dir="runs/street", epochs=100)
    """
    settings = {key: value for key, value in locals().items() if key in _RESUMABLE}
    _check(settings, model, dataset, shares=("full_size", "class_crops", "warmup"))
    low, high = scale
    if not 0 < low <= high:
        raise ValueError(
            f"scale must be (smallest, largest) with 0 < smallest <= largest, got {scale}"
        )
    if min(crop_size) < 1:
        raise ValueError(f"crop_size must be (height, width) in pixels, got {crop_size}")
    output = _output_folder(output_dir, resume)
    accelerator = _accelerator()
    device = accelerator.device
    torch.manual_seed(seed)
    source: Dataset = _Cached(dataset) if cache else dataset
    frequencies, largest = _survey(source, len(model.classes), show=progress)
    class_weights = _class_weights(frequencies, class_power).to(device)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, weight_decay), learning_rate, betas=(0.9, 0.99), fused=True
    )

    crops = _Crops(source, crop_size, scale, class_crops, photometric, seed)
    order = _Order(len(crops), seed)
    loader = DataLoader(
        crops,
        batch_size,
        sampler=order,
        drop_last=len(crops) >= batch_size,
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

    def losses(outputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        return {"loss": _loss(outputs, labels, class_weights, jaccard, auxiliary)}

    return _fit(
        model,
        dataset,
        optimizer,
        accelerator,
        output,
        settings,
        len(loader),
        batches,
        losses,
        validation,
        _validate,
        validate_every=validate_every,
        save_every=save_every,
        resume=resume,
        progress=progress,
    )


_RESUMABLE = (
    "epochs",
    "batch_size",
    "crop_size",
    "scale",
    "full_size",
    "class_crops",
    "photometric",
    "learning_rate",
    "weight_decay",
    "warmup",
    "class_power",
    "jaccard",
    "auxiliary",
    "ema",
    "precision",
    "seed",
)


# ------------------------------------------------------------- what `train_instances` needs too


def _check(
    settings: dict[str, Any],
    model: SemanticModel | InstanceModel,
    dataset: Dataset,
    *,
    positive: Sequence[str] = ("epochs", "batch_size", "learning_rate"),
    shares: Sequence[str],
) -> None:
    for name in positive:
        if settings[name] <= 0:
            raise ValueError(f"{name} must be positive, got {settings[name]}")
    for name in shares:
        if not 0 <= settings[name] <= 1:
            raise ValueError(f"{name} is a share and must be in 0..1, got {settings[name]}")
    if not 0 <= settings["ema"] < 1:
        raise ValueError(f"ema must be in 0..1, below 1, got {settings['ema']}")
    if settings["precision"] not in ("bf16", "fp32"):
        raise ValueError(f"precision must be 'bf16' or 'fp32', got {settings['precision']!r}")
    if len(dataset) == 0:
        raise ValueError("dataset is empty")
    if len(model.classes) != len(dataset.classes):
        raise ValueError(
            f"model has {len(model.classes)} classes, dataset "
            f"{len(dataset.classes)}; build the model with "
            f"num_classes={len(dataset.classes)}"
        )


def _output_folder(output_dir: str | Path, resume: bool) -> Path:
    output = Path(output_dir)
    checkpoint = output / CHECKPOINT
    if resume and not checkpoint.exists():
        raise PysegError(f"resume=True, but there is no {checkpoint}; start with resume=False")
    if not resume and checkpoint.exists():
        raise PysegError(
            f"output_dir {output} holds the checkpoint of an earlier run; pass "
            "resume=True to go on with it, or another output_dir"
        )
    output.mkdir(parents=True, exist_ok=True)
    return output


def _accelerator() -> Accelerator:
    from accelerate import Accelerator

    # Under plain torchrun without a GPU accelerate would start each process as the only one.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Accelerator(cpu=several and not torch.accelerator.is_available())


def _fit(
    model: SemanticModel | InstanceModel,  # on the accelerator's device
    dataset: Dataset,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    output: Path,
    settings: dict[str, Any],
    steps: int,  # of an epoch
    batches: Callable[[int], Iterable[tuple[Any, Any]]],  # of an epoch: inputs, and targets
    losses: Callable[[Any, Any], dict[str, Tensor]],  # of outputs and targets: "loss" and its terms
    validation: Dataset | None,
    validate: Callable[[Any, Dataset, Accelerator], dict[str, Any]],
    *,
    clip: float | None = None,
    validate_every: int,
    save_every: int,
    resume: bool,
    progress: bool,
) -> list[dict[str, Any]]:
    """The epochs of a run, from the first or from the checkpoint's; returns the log."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    settings = {**settings, "samples": len(dataset)}
    epochs, learning_rate = settings["epochs"], settings["learning_rate"]
    device, total = accelerator.device, steps * epochs
    model.classes, model.palette = tuple(dataset.classes), tuple(dataset.palette)
    model.train()
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    network, optimizer = accelerator.prepare(model, optimizer)
    log: list[dict[str, Any]] = []
    first = 0
    if resume:
        first, log = _resume(output / CHECKPOINT, settings, model, optimizer, average, device)

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        disable=not (progress and accelerator.is_main_process),
    )
    autocast = torch.autocast(device.type, torch.bfloat16, settings["precision"] == "bf16")
    with bar:
        task = bar.add_task("training", total=total, completed=first * steps, loss=math.nan)
        for epoch in range(first, epochs):
            start = time.perf_counter()
            # Random layers must not depend on how the run came to this epoch.
            torch.manual_seed(hash((settings["seed"], epoch, accelerator.process_index)) % 2**31)
            sums: dict[str, Tensor] = {}
            for index, (inputs, targets) in enumerate(batches(epoch)):
                step = epoch * steps + index
                rate = learning_rate * _schedule(step, total, settings["warmup"])
                for group in optimizer.param_groups:
                    group["lr"] = rate
                with autocast:
                    outputs = network(inputs)
                terms = losses(outputs, targets)
                accelerator.backward(terms["loss"])
                if clip is not None:
                    accelerator.clip_grad_norm_(network.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                decay = min(settings["ema"], (1 + step) / (10 + step))
                _average(average, model.state_dict(), decay)
                for name, value in terms.items():
                    sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach()
                if index % 8 == 0:  # reading the loss waits for the device
                    mean_loss = sums["loss"].item() / (index + 1)
                bar.update(task, advance=1, loss=mean_loss)
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
            if validation is not None and (last or (epoch + 1) % validate_every == 0):
                with _Swapped(model, average):
                    entry.update(validate(model, validation, accelerator))
            log.append(entry)
            if accelerator.is_main_process and (last or (epoch + 1) % save_every == 0):
                _save(output, settings, epoch + 1, log, model, optimizer, average)
    accelerator.wait_for_everyone()
    model.load_state_dict(average)
    model.eval()
    return log


def _score(
    metric: Metric,
    model: SemanticModel | InstanceModel,
    dataset: Dataset,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What `metric` says of `model`; processes share the images."""
    for index in range(accelerator.process_index, len(dataset), accelerator.num_processes):
        sample = dataset[index]
        metric.update(model.predict([sample.image])[0], sample)
    # A process without images still holds its zeros on the CPU.
    state = {key: value.to(accelerator.device) for key, value in metric.state().items()}
    metric.load_state({key: accelerator.reduce(value, "sum") for key, value in state.items()})
    return metric.compute()


# ---------------------------------------------------------------------------------------- data


class _Cached:
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


class _Order(Sampler[int]):
    """A permutation that depends on seed and epoch only, so that a resumed epoch has the same."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = _generator(self.seed, self.epoch, 0)
        yield from torch.randperm(self.count, generator=generator).tolist()


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
        generator = _generator(self.seed, epoch, index + 1)
        sample = self.dataset[index]
        assert sample.labels is not None  # _survey has seen every sample
        size, (low, high) = self.crop_size, self.scale
        if full_size[0]:
            size, low, high = (full_size[0], full_size[1]), math.sqrt(low), math.sqrt(high)
        image, labels = random_crop(
            sample.image, sample.labels, size, (low, high), self.class_crops, generator
        )
        if self.photometric:
            image = random_light(image, self.photometric, generator)
        return image, labels


def random_crop(
    image: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    scale: tuple[float, float],
    class_crops: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A random zoomed window, flipped half of the time; outside the image it is grey and void.

    The window is cut before it is resized, which costs a fraction of resizing the whole image.

    Args:
        image: [3, H, W] uint8.
        labels: [H, W] uint8.
        size: (h, w) of the result.
        scale: smallest and largest zoom; the aspect ratio varies by up to 15 % besides.
        class_crops: probability that the window contains a pixel of an evenly drawn class.
        generator: source of all randomness.

    Returns:
        Image [3, h, w] uint8 and labels [h, w] uint8.
    """
    from torchvision.transforms import v2
    from torchvision.tv_tensors import Image, Mask

    random = torch.rand(9, generator=generator).tolist()
    height, width = labels.shape
    zoom = scale[0] * (scale[1] / scale[0]) ** random[0]
    aspect = 1.15 ** (2 * random[1] - 1)
    zooms = zoom / math.sqrt(aspect), zoom * math.sqrt(aspect)
    window = [
        min(n, max(1, round(s / z))) for n, s, z in zip(labels.shape, size, zooms, strict=True)
    ]
    ranges = [height - window[0], width - window[1]]
    corner = [round(random[2] * ranges[0]), round(random[3] * ranges[1])]
    if random[4] < class_crops and any(ranges):
        present = torch.bincount(labels.flatten(), minlength=VOID + 1)[:VOID].nonzero().flatten()
        if len(present):
            chosen = present[int(random[5] * len(present))]
            pixels = (labels == chosen).flatten().nonzero().flatten()
            pixel = int(pixels[int(random[6] * len(pixels))])
            # Keeps the drawn position inside the window, and the window inside the image.
            corner = [
                min(max(0, p - round(r * (w - 1))), limit)
                for p, r, w, limit in zip(
                    divmod(pixel, width), random[2:4], window, ranges, strict=True
                )
            ]
    top, left = corner
    rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
    target = [min(s, max(1, round(w * z))) for s, w, z in zip(size, window, zooms, strict=True)]
    cut, mask = Image(image[:, rows, columns]), Mask(labels[None, rows, columns])
    if target != window:
        cut = v2.functional.resize(cut, target, antialias=True)
        # v2 resizes masks with "nearest", which shifts them by up to half a source pixel.
        mask = Mask(F.interpolate(mask[None].as_subclass(Tensor), target, mode="nearest-exact")[0])
    if random[7] < 0.5:
        cut, mask = v2.functional.horizontal_flip(cut), v2.functional.horizontal_flip(mask)
    if tuple(target) != tuple(size):
        slack = [s - t for s, t in zip(size, target, strict=True)]
        top, left = round(random[8] * slack[0]), round(random[8] * slack[1])
        padding = [left, top, slack[1] - left, slack[0] - top]
        cut = v2.functional.pad(cut, padding, fill=[124.0, 116.0, 104.0])
        mask = v2.functional.pad(mask, padding, fill=VOID)
    return cut.as_subclass(Tensor).contiguous(), mask.as_subclass(Tensor)[0].contiguous()


def random_light(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Another time of day: exposure, gamma, contrast, saturation, hue, white balance, blur, noise.

    One matrix does saturation, hue, white balance and exposure together; v2's ColorJitter, with a
    trip through HSV, takes several times as long as the whole of this function.

    Args:
        image: [3, H, W] uint8.
        strength: 1 = the full range, 0 = none.
        generator: source of all randomness.

    Returns:
        [3, H, W] uint8.
    """
    from torchvision.transforms import v2

    chance = torch.rand(6, generator=generator).tolist()
    around = ((2 * torch.rand(9, generator=generator) - 1) * strength).tolist()
    pixels = image.float() / 255
    if chance[0] < 0.5:
        pixels = pixels.pow(2.0 ** (0.7 * around[0]))
    if chance[1] < 0.8:
        angle = 0.25 * around[1]
        luma = torch.tensor([0.299, 0.587, 0.114]).repeat(3, 1)
        # Rotation about the grey axis (Rodrigues' formula) turns the hue and keeps grey grey.
        third = math.sqrt(1 / 3)
        cross = torch.tensor([[0, -third, third], [third, 0, -third], [-third, third, 0.0]])
        hue = (
            math.cos(angle) * torch.eye(3)
            + math.sin(angle) * cross
            + (1 - math.cos(angle)) / 3 * torch.ones(3, 3)
        )
        saturation = 1 + 0.5 * around[2]
        warmth = 0.15 * around[3]
        gains = torch.tensor([1 + warmth, 1 + 0.05 * around[4], 1 - warmth])
        # Towards the mean brightness of any hour from dusk (0.15) to noon (0.6), mostly part way.
        wanted = 0.15 * 4.0 ** chance[5] / max(pixels.mean().item(), 0.02)
        exposure = min(max(wanted, 0.25), 3.0) ** abs(around[5])
        matrix = exposure * gains[:, None] * hue @ (luma + saturation * (torch.eye(3) - luma))
        pixels = (matrix @ pixels.flatten(1)).view_as(pixels)
    if chance[2] < 0.5:
        mean = pixels.mean()
        pixels = mean + (1 + 0.4 * around[6]) * (pixels - mean)
    pixels = pixels.clamp_(0, 1)
    if chance[3] < 0.2:
        sigma = 0.1 + 1.1 * abs(around[7])
        pixels = v2.functional.gaussian_blur(pixels, [5, 5], [sigma, sigma])
    if chance[4] < 0.3:
        noise = torch.randn(pixels.shape, generator=generator)
        pixels = (pixels + 0.04 * abs(around[8]) * noise).clamp_(0, 1)
    return (pixels * 255).round_().to(torch.uint8)


def _generator(seed: int, epoch: int, index: int) -> torch.Generator:
    # A tuple of integers hashes the same in every process; strings would not.
    return torch.Generator().manual_seed(hash((seed, epoch, index)) % 2**63)


def _survey(dataset: Dataset, classes: int, *, show: bool) -> tuple[Tensor, tuple[int, int]]:
    """Pixels per class [C] and the largest height and width, from one pass over the labels."""
    from rich.progress import track

    if classes > VOID:
        raise LabelError(f"training takes at most {VOID} classes, got {classes}: {VOID} means void")
    counts = torch.zeros(VOID + 1, dtype=torch.int64)
    height = width = 0
    for index in track(range(len(dataset)), "reading labels", disable=not show, transient=True):
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


# ---------------------------------------------------------------------------------------- loss


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


# ----------------------------------------------------------------------------- optimisation state


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _schedule(step: int, total: int, warmup: float) -> float:
    """Share of the learning rate: linear rise, then half a cosine down to 1 % of it."""
    rising = max(1, round(total * warmup))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def _average(average: dict[str, Tensor], state: dict[str, Tensor], decay: float) -> None:
    floating = [key for key, value in average.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[k] for k in floating], [state[k] for k in floating], 1 - decay)
    for key, value in average.items():
        if not value.is_floating_point():
            value.copy_(state[key])


class _Swapped:
    """Within it the model holds other weights and is in evaluation mode."""

    def __init__(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.model, self.state = model, state

    def __enter__(self) -> None:
        self.own = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.state)
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.load_state_dict(self.own)
        self.model.train()


def _validate(model: SemanticModel, dataset: Dataset, accelerator: Accelerator) -> dict[str, Any]:
    """mIoU and the IoU of each class (None where it does not occur)."""
    from .metrics.semantic import Semantic

    scores = _score(Semantic(model.classes), model, dataset, accelerator)
    return {
        "miou": round(scores["miou"], 5),
        "iou": {
            name: None if math.isnan(entry["iou"]) else round(entry["iou"], 5)
            for name, entry in scores["per_class"].items()
        },
    }


def _save(
    output: Path,
    settings: dict[str, Any],
    epoch: int,
    log: Sequence[dict[str, Any]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
) -> None:
    save_state(output / WEIGHTS, average)
    write_json(output / LOG, log)
    state = {
        "settings": json.dumps(settings),
        "epoch": epoch,
        "log": json.dumps(log),
        "model": model.state_dict(),
        "average": average,
        "optimizer": optimizer.state_dict(),
    }
    # Last, so that a checkpoint never speaks of an epoch whose weights were not written.
    with replacing(output / CHECKPOINT) as temporary:
        torch.save(state, temporary)


def _resume(
    path: Path,
    settings: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    device: torch.device,
) -> tuple[int, list[dict[str, Any]]]:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        before = json.loads(state["settings"])
    except Exception as error:
        raise PysegError(
            f"{path} is not a readable training checkpoint ({error}); remove it and start again"
        ) from error
    now = json.loads(json.dumps(settings))
    changed = [
        f"{k} (was {before.get(k)!r}, now {now[k]!r})" for k in now if before.get(k) != now[k]
    ]
    if changed:
        raise PysegError(f"cannot resume {path} with other settings: {', '.join(changed)}")
    load_into(model, state["model"], path)
    optimizer.load_state_dict(state["optimizer"])
    for key, value in state["average"].items():
        average[key].copy_(value)
    return state["epoch"], json.loads(state["log"])
