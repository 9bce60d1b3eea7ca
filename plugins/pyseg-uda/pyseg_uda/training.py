"""`adapt`: trains on labelled images of one domain and unlabelled ones of another."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from pyseg import metrics, processes
from pyseg.errors import PysegError
from pyseg.files import finite, some
from pyseg.models import SemanticModel
from pyseg.training import fit, make_optimizer, sharding
from pyseg.training.loop import score
from pyseg.types import Dataset

from . import mixing, streams
from .alignment import KINDS, Alignment
from .errors import AdaptationError
from .steps import Called, Reference, Steps, trunk_of
from .teacher import teacher_of
from .views import Cached, Unlabelled, Views, class_counts

Method = Literal["source", "self-training", "attention"]
METHODS = ("source", "self-training", "attention")
BACKBONE_SLOWER = {"backbone": 1.0, "rest": 10.0}
# Countable classes of streets: Cityscapes' 6, 7 and 11 to 18, and what CamVid calls the like.
THINGS = (
    *("traffic light", "traffic sign", "person", "rider", "car", "truck", "bus", "train"),
    *("motorcycle", "bicycle", "sign symbol", "pedestrian", "bicyclist"),
)


def adapt(
    model: SemanticModel,
    source: Dataset,
    target: Dataset | str | Path | None,
    *,
    output_dir: str | Path,
    method: Method = "self-training",
    epochs: int = 40,
    steps: int = 1000,
    validation: Dataset | None = None,
    batch_size: int = 2,
    crop_size: tuple[int, int] = (512, 512),
    scale: tuple[float, float] = (1.0, 1.0),
    flip: float = 0.5,
    category_limit: float = 0.75,
    rare: float | None = 0.01,
    rare_image: float = 0.0015,
    rare_crop: float = 0.0057,
    align: Alignment | None = None,
    beta: float = 0.01,
    threshold: float = 0.968,
    trusted: tuple[int, int] = (0, 0),
    decay: float = 0.999,
    colour: float = mixing.STRENGTH,
    blur: float = 0.5,
    consistency: float = 1.0,
    imagenet: SemanticModel | None = None,
    distance: float = 0.005,
    things: Sequence[str] | None = None,
    auxiliary: float = 0.4,
    learning_rate: float = 6e-5,
    rates: Mapping[str, float] | None = BACKBONE_SLOWER,
    weight_decay: float = 0.01,
    schedule: Literal["linear", "poly", "cosine", "one-cycle"] = "linear",
    warmup: float = 0.0375,
    ema: float = 0.0,
    precision: Literal["bf16", "fp32"] | None = None,
    cache: bool = True,
    workers: int = 0,
    save_every: int = 1,
    validate_every: int = 10,
    tensorboard: bool = False,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Trains ``model`` in place: labels of the source, images of the target.

    DAFormer's training (Hoyer et al., 2022): a teacher, the running mean of the student's
    parameters, labels the target; half of the classes of a source image are pasted onto a target
    image; the student learns both from the source and from the mixture, whose pixels of the target
    count by the teacher's confidence. With ``method="attention"`` source and mixture also attend to
    each other in every block, and attention on the mixture is held to that on its two parts (Wang
    et al., 2023). Defaults are DAFormer's. The same seed, software, device and number of threads
    give the same weights; a run that was killed and is resumed gives those of one that was not.

    Args:
        model: any semantic model; ``"attention"`` needs a mix transformer, such as segformer_b0. It
            takes over the source's class names.
        source: samples with labels.
        target: a data set, whose labels are never read, or a folder of images; None only where
            nothing is taken of it.
        output_dir: made if absent; its files are those of `pyseg.training.fit`.
        method: ``"source"`` = cross-entropy on the source alone, with the same views; see above.
        epochs: in all, also when resuming; checkpoints are written between epochs.
        steps: of an epoch.
        validation: scored every ``validate_every`` epochs and at the end.
        batch_size: images of each domain per step and process.
        crop_size: (height, width) of the views, pixels.
        scale: smallest and largest zoom before the crop.
        flip: share of the views that are mirrored.
        category_limit: largest share of a source view that one class may fill, as far as ten tries
            go.
        rare: temperature at which source images are drawn for their rare classes; the smaller, the
            more of the rarest. None = all images are equal.
        rare_image: share of a class's pixels that an image must have more of to be drawn for it.
            The authors': 3000 pixels of 1914x1052.
        rare_crop: share that its view must have more of, as far as ten tries go. The authors': 1500
            pixels of 512x512.
        align: the source's views take the colours of target images: ``"mean"``, ``"covariance"`` or
            ``"fourier"``; see `pyseg_uda.alignment.align`.
        beta: of ``"fourier"``.
        threshold: probability from which the teacher is called certain.
        trusted: rows at top and bottom of the target's views whose pseudo-labels count nothing. The
            authors': 15 and 120 of 512.
        decay: of the teacher, at most.
        colour: strength of the colours' jitter of mixed images.
        blur: share of the mixed images that are blurred.
        consistency: weight of the attention loss.
        imagenet: a model of the same network with ImageNet's weights, from whose features those of
            countable things are kept; None = without that loss.
        distance: its weight.
        things: names of these classes; None = the source's ``things``, or what streets have.
        auxiliary: weight of each auxiliary head's loss.
        learning_rate: at the end of the warm-up, of AdamW.
        rates: factors of it of parts of the model, see `pyseg.training.make_optimizer`; None = 1,
            for models whose backbone has no name that it knows.
        weight_decay: for weights of more than one dimension.
        schedule: of the learning rate, see `pyseg.training.fit`.
        warmup: share of all steps over which it rises.
        ema: decay of the running average of the student that is scored and kept; 0 = the student
            itself, as the authors do. The teacher is another one.
        precision: "bf16" or "fp32"; None = by the device.
        cache: keep decoded images in memory.
        workers: processes that prepare views.
        save_every: epochs between checkpoints.
        validate_every: epochs between validations.
        tensorboard: also write event files.
        resume: go on from the checkpoint in ``output_dir``, which must be of the same settings and
            of a model and ``imagenet`` that began with the same weights.
        seed: of views, mixtures, dropout.
        progress: show how far it is.

    Returns:
        The log, an entry per epoch: ``loss`` and its parts ``source``, ``mixed``, ``attention``,
        ``distance``, the teacher's ``confidence`` q, what validation found.

    Raises:
        AdaptationError: a setting out of range, an empty target, domains without a class in common,
            no class of ``things`` in the source.
        LabelError: the source's labels are no class ids.
        PysegError: a network that ``method`` or ``imagenet`` does not fit; and as from
            `pyseg.training.fit`.

    Example:
        >>> model = pyseg.models.create("segformer_b0", head="daformer", num_classes=11,
        ...                             weights="mit_b0.pth")
        >>> day = CamVid("camvid", drives="day")
        >>> log = adapt(model, day, "dusk/", output_dir="run", method="attention")
    """
    if method not in METHODS:
        raise AdaptationError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if align is not None and align not in KINDS:
        raise AdaptationError(f"align must be one of {', '.join(KINDS)}, or None, got {align!r}")
    _check_ranges(
        {"batch_size": batch_size, "learning_rate": learning_rate},
        {
            "flip": flip,
            "category_limit": category_limit,
            "rare_image": rare_image,
            "rare_crop": rare_crop,
            "threshold": threshold,
            "decay": decay,
            "blur": blur,
            "beta": beta,
        },
        {
            "colour": colour,
            "consistency": consistency,
            "distance": distance,
            "auxiliary": auxiliary,
            "weight_decay": weight_decay,
        },
    )
    if rare is not None and not rare > 0:
        raise AdaptationError(f"rare is a temperature and must be positive, or None, got {rare}")
    if min(crop_size) < 32:
        raise AdaptationError(f"crop_size must be (height, width) of at least 32, got {crop_size}")
    if not 0 < scale[0] <= scale[1]:
        raise AdaptationError(
            f"scale must be (smallest, largest), 0 < smallest <= largest, got {scale}"
        )
    if min(trusted) < 0 or sum(trusted) >= crop_size[0]:
        raise AdaptationError(
            f"trusted must be rows at top and bottom that leave some of {crop_size[0]}, "
            f"got {trusted}"
        )
    unlabelled = _unlabelled(source, target, needed=method != "source" or align is not None)
    _check_classes(model, source, validation)
    classes = len(source.classes)
    trunk = streams.mix_transformer(model) if method == "attention" else None
    reference = None
    if imagenet is not None and method != "source":
        reference = Reference(_trunk(model, imagenet), _thing_ids(source, things))
    accelerator = processes.accelerator()
    if sharding.wanted(accelerator):
        raise PysegError("adapt keeps a teacher of the whole model: start it without FSDP")
    device, rank = accelerator.device, accelerator.process_index
    torch.manual_seed(seed)
    model.classes, model.palette = tuple(source.classes), tuple(source.palette)

    samples: Any = Cached(source) if cache else source
    images: Any = unlabelled if unlabelled is None or not cache else Cached(unlabelled)
    counts = class_counts(samples, classes)
    draws = None if rare is None else mixing.RareClasses(counts, rare, rare_image)
    settings = {
        "method": method,
        "batch_size": batch_size,
        "crop_size": list(crop_size),
        "scale": list(scale),
        "flip": flip,
        "category_limit": category_limit,
        "rare": rare,
        "rare_image": rare_image,
        "rare_crop": rare_crop,
        "align": align,
        "beta": beta,
        "threshold": threshold,
        "trusted": list(trusted),
        "decay": decay,
        "colour": colour,
        "blur": blur,
        "consistency": consistency,
        "distance": distance,
        "things": None if reference is None else list(reference.things),
        "auxiliary": auxiliary,
        "learning_rate": learning_rate,
        "rates": None if rates is None else dict(rates),
        "weight_decay": weight_decay,
        "source": len(source),
        "target": 0 if unlabelled is None else len(unlabelled),
        "imagenet": None if reference is None else _digest(reference.trunk),
    }
    teacher = None if method == "source" else teacher_of(model)
    if reference is not None:
        reference.trunk.to(device)
    step = Steps(
        model,
        teacher,
        trunk,
        reference,
        threshold=threshold,
        trusted=trusted,
        decay=decay,
        colour=colour,
        blur=blur,
        consistency=consistency,
        distance=distance,
        auxiliary=auxiliary,
        key=(seed, rank),
    )

    def batches(epoch: int) -> Iterable[dict[str, Any]]:
        views = Views(
            samples,
            images,
            draws,
            crop_size=crop_size,
            scale=scale,
            flip=flip,
            category_limit=category_limit,
            rare_crop=rare_crop,
            alignment=align,
            beta=beta,
            key=(seed, epoch, rank),
            length=steps * batch_size,
        )
        loader: Any = DataLoader(
            views, batch_size, num_workers=workers, generator=torch.Generator()
        )
        for number, batch in enumerate(loader):
            moved = {name: value.to(device) for name, value in batch.items()}
            yield {**moved, "step": epoch * steps + number}

    def validate(whole: Called) -> dict[str, Any]:
        assert validation is not None
        metric = metrics.create("semantic", classes=validation.classes)
        found = score("semantic", metric, whole.model, validation)
        iou = {name: finite(entry["iou"]) for name, entry in found["per_class"].items()}
        return {"miou": found["miou"], "iou": iou}

    return fit(
        Called(model),
        batches,
        step=step,
        optimizer=make_optimizer(
            "adamw", model, learning_rate=learning_rate, weight_decay=weight_decay, rates=rates
        ),
        steps=steps,
        epochs=epochs,
        output_dir=output_dir,
        companion=teacher,
        validate=None if validation is None else validate,
        settings=settings,
        schedule=schedule,
        warmup=warmup,
        ema=ema,
        precision=precision,
        validate_every=validate_every,
        save_every=save_every,
        tensorboard=tensorboard,
        resume=resume,
        seed=seed,
        progress=progress,
    )


def _unlabelled(
    source: Dataset, target: Dataset | str | Path | None, needed: bool
) -> Unlabelled | None:
    """The target's images, where anything is taken of them."""
    if len(source) == 0:
        raise AdaptationError("source is empty")
    if not needed:
        return None
    if target is None:
        raise AdaptationError("target is missing: only method='source' without align goes without")
    found = Unlabelled(target)
    if found.classes is not None and not set(found.classes) & set(source.classes):
        raise AdaptationError(
            f"source and target have no class in common: {some(source.classes)} against "
            f"{some(found.classes)}; adaptation is to another look of the same things"
        )
    return found


def _check_classes(model: SemanticModel, source: Dataset, validation: Dataset | None) -> None:
    if len(model.classes) != len(source.classes):
        raise AdaptationError(
            f"model has {len(model.classes)} classes, source {len(source.classes)}; build the "
            f"model with num_classes={len(source.classes)}"
        )
    if validation is not None and tuple(validation.classes) != tuple(source.classes):
        raise AdaptationError(
            f"validation has the classes {some(validation.classes)}, source "
            f"{some(source.classes)}: they must be the same in the same order"
        )


def _trunk(model: SemanticModel, imagenet: SemanticModel) -> nn.Module:
    """A copy of the reference's trunk."""
    trunk, own = trunk_of(imagenet), trunk_of(model)
    shapes = [
        None if part is None else {key: value.shape for key, value in part.state_dict().items()}
        for part in (trunk, own)
    ]
    if trunk is None or shapes[0] != shapes[1]:
        raise PysegError(
            "imagenet must be a model of the same network, which names its backbone as its trunk; "
            f"got a {type(imagenet.network).__name__} for a {type(model.network).__name__}"
        )
    return copy.deepcopy(trunk).eval().requires_grad_(False)


def _thing_ids(source: Dataset, things: Sequence[str] | None) -> tuple[int, ...]:
    given = things if things is not None else getattr(source, "things", ()) or THINGS
    names = [_plain(name) for name in source.classes]
    if things is not None and (strange := [n for n in things if _plain(n) not in names]):
        raise AdaptationError(f"things: source has no class {strange[0]!r}: {some(source.classes)}")
    ids = tuple(names.index(_plain(name)) for name in given if _plain(name) in names)
    if not ids:
        raise AdaptationError(
            f"things: none of source's classes is countable by its name ({some(source.classes)}); "
            "name those that are, or leave imagenet out"
        )
    return ids


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_ranges(
    positive: Mapping[str, float], shares: Mapping[str, float], weights: Mapping[str, float]
) -> None:
    for name, value in positive.items():
        if not value > 0:
            raise AdaptationError(f"{name} must be positive, got {value}")
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise AdaptationError(f"{name} is a share and must be in 0..1, got {value}")
    for name, value in weights.items():
        if not 0 <= value < float("inf"):
            raise AdaptationError(f"{name} must be 0 or more, and finite, got {value}")
