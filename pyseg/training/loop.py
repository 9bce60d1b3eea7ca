"""`fit`: the epochs of any training, with checkpoints, averaged weights and resuming."""

from __future__ import annotations

import contextlib
import copy
import errno
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .. import processes
from ..devices import computes_in_bfloat16
from ..errors import PysegError
from ..files import make_folder, remove_abandoned, replacing, take_lock, write_json
from ..types import Dataset, Metric
from ..weights import load_into, load_state, save_state
from . import sharding
from .logs import Display, tensorboard_writer, write_csv
from .optimizer import training_mode

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..models import InstanceModel, SemanticModel

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "model.safetensors"
BEST = "best.safetensors"
LOG = "log.json"
TABLE = "log.csv"
BAD_BATCH = "nonfinite_batch.pt"
LOCK = ".lock"

LOOKS = 8  # steps between two looks at the loss, which wait for the device

Precision = Literal["bf16", "fp32"]
Schedule = Literal["cosine", "poly", "linear", "one-cycle"]

# Settings that checkpoints of older versions do not name, with the values that these had.
_OLDER = {"schedule": "cosine", "accumulate": 1, "patience": None}


def fit(
    model: nn.Module,
    batches: Callable[[int], Iterable[Any]],
    *,
    step: Callable[[nn.Module, Any], Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    steps: int,
    epochs: int,
    output_dir: str | Path,
    companion: nn.Module | None = None,
    validate: Callable[[Any], Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    older: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    schedule: Schedule = "cosine",
    warmup: float = 0.05,
    clip: float | None = None,
    accumulate: int = 1,
    weigh: Callable[[Any], Tensor] | None = None,
    ema: float = 0.997,
    precision: Precision | None = None,
    validate_every: int = 10,
    patience: int | None = None,
    watch: str | None = None,
    save_every: int = 1,
    describe: Callable[[Any], Mapping[str, Any]] | None = None,
    tensorboard: bool = False,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Trains ``model`` in place and leaves it in evaluation mode, holding the averaged weights.

    What a step computes is the caller's: `pyseg.training.train` calls the network once, a method
    that adapts to another domain may call it as often as it needs. The learning rates are those of
    the optimizer's groups under a linear warm-up and a schedule. Parts of the model whose
    parameters want no gradient stay as they are, statistics of normalisation too. Under
    ``torchrun`` or ``accelerate launch`` every process runs the same steps on batches of its own,
    with copies of the model or, by accelerate's FSDP 2, with a share of it each.

    Files in ``output_dir``, each replaced in one step, so that a kill leaves the previous one:
    ``checkpoint.pt`` (all that resuming needs), ``model.safetensors`` (the averaged weights,
    loadable as ``weights=``), ``log.json`` (one entry per epoch) and ``log.csv`` (the same as a
    table); ``best.safetensors`` where there is ``patience``. One training at a time writes there,
    which the lock of the file ``.lock`` sees to. All processes read the folder, the first writes.

    Args:
        model: moved to accelerate's device, and into training mode.
        batches: called with the number of an epoch, from 0; gives the ``steps`` batches of this
            process, of any form, on any device. To be resumable they depend on nothing else.
        step: called with the network and a batch under autocast to ``precision``; returns the
            scalar losses of this step by name, of which ``"loss"`` is minimised and all are logged.
        optimizer: of the model's parameters.
        steps: batches of an epoch and process.
        epochs: in all, also when resuming. It may be other than the checkpoint's: from there on
            the schedule is that of a run of this length, so that a longer one raises the learning
            rate again, a shorter one lowers it faster.
        output_dir: made if absent.
        companion: a module that the step changes by itself, such as an averaged teacher: it is
            moved to the device, saved in checkpoints and restored from them, and nothing else.
        validate: called with the model, which then holds the averaged weights and is in evaluation
            mode, every ``validate_every`` epochs and at the end; its numbers go to the log.
        settings: what else must be equal in a run that is resumed, as JSON has it.
        older: gives, from a checkpoint's settings, what one of an older version does not name.
        schedule: of the learning rate after its rise: ``"cosine"`` = half a cosine down to 1 %;
            ``"poly"`` = (1 - t)^0.9, down to 0; ``"linear"`` = 1 - t; ``"one-cycle"`` (Smith &
            Topin, 2019) = from 1/25 up and down to 1/250,000 by half cosines each, usually with a
            ``warmup`` of 0.3.
        warmup: share of all steps over which the learning rate rises.
        clip: largest norm of the gradient; None = any.
        accumulate: batches whose gradients are added up for one step of the optimizer; where an
            epoch is no multiple, its last step has fewer.
        weigh: called with a batch, gives what it counts among those of its step and of the other
            processes, such as its labelled pixels; None = all the same. With it the gradient of a
            mean over pixels is that of one large batch.
        ema: decay of the running average of the weights, per step of the optimizer.
        precision: ``"bf16"`` = autocast; None = the checkpoint's when resuming, else
            `usual_precision` of the device.
        validate_every: epochs between validations.
        patience: validations without a better score after which training stops; it then ends with
            the weights of the best one. None = it goes on to its last epoch, and ends with those.
        watch: which of ``validate``'s numbers ``patience`` looks at, more being better.
        save_every: epochs between checkpoints; the last epoch always writes one.
        describe: called with a batch whose loss is not finite; gives what is kept of it, with the
            samples under ``"names"``. None = the batch itself.
        tensorboard: also write event files below ``output_dir/tensorboard``.
        resume: go on from ``output_dir``'s checkpoint, which must have the same settings; a run
            that was killed before its first one begins again.
        seed: of what is random within the network.
        progress: show a progress bar (on the main process, where stderr is a terminal) or now and
            then a line, with the time that is left.

    Returns:
        The log: per epoch a dict with ``epoch``, the mean of every loss, ``learning_rate`` (of the
        first group), ``precision``, ``seconds`` and what ``validate`` returned.

    Raises:
        ValueError: a setting out of range.
        PysegError: nothing to resume, or a checkpoint that is damaged or of other settings; another
            training writes to the folder, or it is a file; a loss that is not finite, whose batch
            is then in ``nonfinite_batch.pt``.
        OSError: a file cannot be written, such as on a full disk; it names the file.

    Example:
        >>> def step(network, batch):
        ...     images, labels, unlabelled = batch
        ...     supervised = cross_entropy(network(images)["out"], labels)
        ...     certain = network(unlabelled)["out"].softmax(1)
        ...     entropy = -(certain * certain.clamp(min=1e-6).log()).sum(1).mean()
        ...     return {"loss": supervised + 0.1 * entropy, "entropy": entropy}
        >>> log = fit(model, batches, step=step, optimizer=AdamW(model.parameters(), 1e-3),
        ...           steps=500, epochs=20, output_dir="runs/adapted")
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
    check_positive(steps=steps, validate_every=validate_every, save_every=save_every)
    if patience is not None and (validate is None or watch is None):
        raise ValueError("patience needs validation: a score to look at")
    output = Path(output_dir)
    check_output(output, resume)
    make_folder(output, "output_dir")
    accelerator = processes.accelerator()
    device, main = accelerator.device, accelerator.is_main_process
    with _locked(output), contextlib.ExitStack() as cleanup:
        check_output(output, resume)  # again: only now nobody else writes there
        if main:
            remove_abandoned(output)
        resume = resume and (output / CHECKPOINT).exists()
        checkpoint = _Checkpoint.read(output / CHECKPOINT) if resume else None
        if precision is None:
            kept = checkpoint.settings.get("precision") if checkpoint else None
            precision = kept if kept in ("bf16", "fp32") else usual_precision(device)
        settings = {
            "epochs": epochs,
            "steps": steps,
            "schedule": schedule,
            "warmup": warmup,
            "clip": clip,
            "accumulate": accumulate,
            "ema": ema,
            "patience": patience,
            "precision": precision,
            "seed": seed,
            **(settings or {}),
        }
        rates = [group["lr"] for group in optimizer.param_groups]  # before a checkpoint's
        model.to(device)
        if companion is not None:
            companion.to(device)
        training_mode(model)
        sharded = sharding.wanted(accelerator)
        whole = copy.deepcopy(model) if sharded else model  # what is validated and saved
        network, optimizer = sharding.prepared(accelerator, model, optimizer)
        average = {key: value.detach().clone() for key, value in model.state_dict().items()}
        log: list[dict[str, Any]] = []
        if checkpoint is not None:
            known = {**_OLDER, **(older(checkpoint.settings) if older else {})}
            checkpoint.restore(known, settings, whole, model, optimizer, average, companion)
            log = checkpoint.log
        updates = math.ceil(steps / accumulate)
        first, total = len(log), updates * epochs
        autocast = torch.autocast(device.type, torch.bfloat16, precision == "bf16")
        shown = progress and main
        display = cleanup.enter_context(
            Display(f"training in {precision}", epochs, updates, first, shown)
        )
        events = None
        if tensorboard and main:
            events = cleanup.enter_context(tensorboard_writer(output, first * updates))

        def look(recent: list[tuple[int, Any, Mapping[str, Tensor]]], epoch: int) -> None:
            """Stops where a loss of the last steps is not finite, in whichever process."""
            kept = recent[:]
            recent.clear()
            finite = torch.stack([losses["loss"].detach() for _, _, losses in kept]).isfinite()
            bad = next((k for k, fine in enumerate(finite.tolist()) if not fine), None)
            found = processes.gather_objects(None if bad is None else kept[bad][0])
            numbers = [(number, rank) for rank, number in enumerate(found) if number is not None]
            if not numbers:
                return
            number, rank = min(numbers)
            names: list[str] = []
            if rank == accelerator.process_index and bad is not None:
                _, batch, losses = kept[bad]
                names = _keep_batch(output, describe, batch, losses, epoch, number)
            names = processes.gather_objects(names)[rank]
            of = f", of the samples {', '.join(names)}" if names else ""
            raise PysegError(
                f"the loss is no longer finite in epoch {epoch + 1}, at batch {number + 1} of "
                f"{steps}{of}, which is kept in {output / BAD_BATCH}; lower learning_rate "
                f"({rates[0]}) or use precision='fp32'"
            )

        def train_epoch(epoch: int) -> dict[str, float]:
            """Means of the losses, over all processes."""
            # Random layers must not depend on how the run came to this epoch.
            torch.manual_seed(hash((seed, epoch, accelerator.process_index)) % 2**31)
            sums: dict[str, Tensor] = {}
            recent: list[tuple[int, Any, Mapping[str, Tensor]]] = []
            iterator = iter(batches(epoch))
            for begin in range(0, steps, accumulate):
                group = list(itertools.islice(iterator, min(accumulate, steps - begin)))
                if len(group) < min(accumulate, steps - begin):
                    raise ValueError(
                        f"batches({epoch}) gave {begin + len(group)} batches where steps={steps}"
                    )
                update = begin // accumulate
                done = epoch * updates + update
                share = share_of_rate(schedule, done, total, warmup)
                for options, rate in zip(optimizer.param_groups, rates, strict=True):
                    options["lr"] = rate * share
                counts = _counts(group, weigh, accelerator)
                for k, (batch, count) in enumerate(zip(group, counts, strict=True)):
                    more = k + 1 < len(group)
                    with accelerator.no_sync(network) if more else contextlib.nullcontext():
                        with autocast:
                            losses = step(network, batch)
                        if "loss" not in losses:
                            raise ValueError(
                                "step must return losses with 'loss' among them, got "
                                f"{sorted(losses)}"
                            )
                        loss = losses["loss"]
                        accelerator.backward(loss if count is None else loss * count)
                    for name, value in losses.items():
                        value = value.detach() if count is None else value.detach() * count
                        before = sums.get(name, torch.zeros((), device=device))
                        sums[name] = before + value
                    recent.append((begin + k, batch, losses))
                if clip is not None:
                    accelerator.clip_grad_norm_(network.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                _move_average(average, model.state_dict(), min(ema, (1 + done) / (10 + done)))
                if update % LOOKS == 0 or update + 1 == updates:
                    look(recent, epoch)
                    mean = sums["loss"].item() / (update + 1)
                    display.show(mean)
                    if events is not None:
                        events.add_scalar("step/loss", mean, done)
                        events.add_scalar(
                            "step/learning_rate", optimizer.param_groups[0]["lr"], done
                        )
                display.advance()
            if next(iterator, None) is not None:
                raise ValueError(f"batches({epoch}) gave more batches where steps={steps}")
            return {
                name: accelerator.reduce(value / updates, "mean").item()
                for name, value in sums.items()
            }

        try:
            for epoch in range(first, epochs):
                if _is_over(log, patience, watch):
                    break
                start = time.perf_counter()
                means = train_epoch(epoch)
                entry: dict[str, Any] = {
                    "epoch": epoch + 1,
                    **{name: round(value, 5) for name, value in means.items()},
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "precision": precision,
                    "seconds": round(time.perf_counter() - start, 2),
                }
                processes.broadcast(average)  # statistics of normalisation differ
                last = epoch + 1 == epochs
                if validate is not None and (last or (epoch + 1) % validate_every == 0):
                    state = sharding.gathered(average)
                    with _evaluating_with(whole, state):
                        entry.update(validate(whole))
                    training_mode(model)
                log.append(entry)
                if events is not None:
                    events.add_epoch(entry, (epoch + 1) * updates - 1)
                better = patience is not None and watch in entry and _best(log, watch) == epoch
                if better and main:
                    save_state(output / BEST, state)
                over = last or _is_over(log, patience, watch)
                if over or (epoch + 1) % save_every == 0:
                    _save(output, settings, log, model, optimizer, average, companion, main)
                display.epoch(entry)
            accelerator.wait_for_everyone()
            state = sharding.gathered(average)
            if patience is not None:
                state = load_state(output / BEST)
                if main:
                    save_state(output / WEIGHTS, state)
            if sharded:  # the model becomes whole again
                model.__class__, model.__dict__ = whole.__class__, whole.__dict__
            model.load_state_dict(state)
        finally:
            model.eval()
    return log


def usual_precision(device: torch.device) -> Precision:
    """``"bf16"`` on GPUs that compute in bfloat16 and on CPUs with AMX; elsewhere fp32 is faster.

    AVX512-BF16 alone is not enough: on a Xeon that has it and no AMX a step of streetnet, U-Net,
    FCN, DeepLab and SegNet takes 1.4 to 1.6 times as long in bf16, most of it in the gradients.
    """
    if device.type == "cpu":
        return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
    return "bf16" if computes_in_bfloat16(device) else "fp32"


def score(
    name: str, metric: Metric, model: SemanticModel | InstanceModel, dataset: Dataset
) -> dict[str, Any]:
    """What ``metric``, called ``name``, says of a model; processes share the images."""
    rank, count = processes.rank_and_count()
    for index in range(rank, len(dataset), count):
        sample = dataset[index]
        metric.update(model.predict([sample.image])[0], sample)
    processes.merge_states(name, metric)
    return metric.compute()


def check_run(
    *,
    epochs: int,
    warmup: float,
    clip: float | None,
    ema: float,
    precision: str | None,
    schedule: str = "cosine",
    accumulate: int = 1,
    patience: int | None = None,
) -> None:
    """Refuses settings of `fit` that are out of range."""
    check_positive(epochs=epochs, clip=1.0 if clip is None else clip, accumulate=accumulate)
    check_positive(patience=1 if patience is None else patience)
    check_share(warmup=warmup)
    if schedule not in ("cosine", "poly", "linear", "one-cycle"):
        raise ValueError(
            f"schedule must be 'cosine', 'poly', 'linear' or 'one-cycle', got {schedule!r}"
        )
    if not 0 <= ema < 1:
        raise ValueError(f"ema must be in 0..1, below 1, got {ema}")
    if precision not in ("bf16", "fp32", None):
        raise ValueError(f"precision must be 'bf16' or 'fp32', got {precision!r}")


def check_positive(**settings: float) -> None:
    """Refuses numbers that are not positive."""
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def check_share(**settings: float) -> None:
    """Refuses numbers outside of 0..1."""
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a share and must be in 0..1, got {value}")


def check_data(model: SemanticModel | InstanceModel, dataset: Dataset) -> None:
    """Refuses a dataset that is empty or has more or fewer classes than the model."""
    if len(dataset) == 0:
        raise ValueError("dataset is empty")
    if len(model.classes) != len(dataset.classes):
        raise ValueError(
            f"model has {len(model.classes)} classes, dataset "
            f"{len(dataset.classes)}; build the model with "
            f"num_classes={len(dataset.classes)}"
        )


def check_output(output_dir: str | Path, resume: bool) -> None:
    """Refuses a folder with nothing to resume, or with a checkpoint that is not to be resumed."""
    checkpoint = Path(output_dir) / CHECKPOINT
    if resume and not has_begun(output_dir):
        raise PysegError(f"resume=True, but there is no {checkpoint}; start with resume=False")
    if not resume and checkpoint.exists():
        raise PysegError(
            f"output_dir {output_dir} holds the checkpoint of an earlier run; pass "
            "resume=True to go on with it, or another output_dir"
        )


def has_begun(output_dir: str | Path) -> bool:
    """Whether a training wrote here, or was killed before its first checkpoint."""
    return any((Path(output_dir) / name).exists() for name in (CHECKPOINT, LOCK))


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keeps other trainings out of a folder; the main process holds the lock for all of a run."""
    lock, taken = None, False
    if processes.rank_and_count()[0] == 0:
        lock = take_lock(output / LOCK)
        taken = lock is None
    if any(processes.gather_objects(taken)):
        if lock is not None:
            lock()
        raise PysegError(
            f"output_dir {output} is being written by another training; give another output_dir, "
            "or wait for its end and go on with resume=True"
        )
    try:
        yield
    finally:
        if lock is not None:
            lock()


def share_of_rate(schedule: Schedule, step: int, total: int, warmup: float) -> float:
    """What share of the learning rate a step of ``total`` has."""
    if schedule == "one-cycle":
        top = max(total * warmup - 1, 0.0)
        if step <= top:
            return _between(1 / 25, 1.0, step / top if top else 1.0)
        return _between(1.0, 1 / 250_000, (step - top) / max(total - 1 - top, 1e-9))
    if schedule in ("poly", "linear"):
        rising = round(total * warmup)
        if step < rising:
            return (step + 1) / (rising + 1)
        left = 1 - (step - rising) / (total - rising)
        return left if schedule == "linear" else left**0.9
    rising = max(1, round(total * warmup))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def _between(start: float, end: float, done: float) -> float:
    """Half a cosine from one value to another."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * done))


def _counts(
    group: Sequence[Any], weigh: Callable[[Any], Tensor] | None, accelerator: Accelerator
) -> list[Any]:
    """What the loss of each batch of a step is multiplied by; None = nothing to multiply."""
    if weigh is None:
        return [None] if len(group) == 1 else [1 / len(group)] * len(group)
    if len(group) == 1 and accelerator.num_processes == 1:
        return [None]
    counts = torch.stack([weigh(batch).float() for batch in group]).to(accelerator.device)
    total = accelerator.reduce(counts.sum(), "sum").clamp(min=1)
    return list(counts * (accelerator.num_processes / total))


def _best(log: Sequence[Mapping[str, Any]], watch: str | None) -> int | None:
    """The first of the epochs, from 0, with the highest score; None where none has one."""
    scores = [(entry[watch], -k) for k, entry in enumerate(log) if watch and watch in entry]
    known = [pair for pair in scores if pair[0] is not None and not math.isnan(pair[0])]
    return -max(known or scores)[1] if scores else None


def _is_over(log: Sequence[Mapping[str, Any]], patience: int | None, watch: str | None) -> bool:
    """Whether so many validations followed the best one."""
    best = None if patience is None else _best(log, watch)
    if best is None or patience is None:
        return False
    return sum(watch in entry for entry in log[best + 1 :]) >= patience


def _keep_batch(
    output: Path,
    describe: Callable[[Any], Mapping[str, Any]] | None,
    batch: Any,
    losses: Mapping[str, Tensor],
    epoch: int,
    number: int,
) -> list[str]:
    """Writes a batch whose loss is not finite; returns the names of its samples."""
    content = {"batch": batch} if describe is None else dict(describe(batch))
    content["losses"] = {name: value.detach().cpu() for name, value in losses.items()}
    _write_torch(output / BAD_BATCH, {**content, "epoch": epoch, "batch_of_epoch": number})
    return [str(name) for name in content.get("names", ())]


@torch.no_grad()
def _move_average(average: dict[str, Tensor], state: dict[str, Tensor], decay: float) -> None:
    own = {key: sharding.local(value) for key, value in average.items()}
    now = {key: sharding.local(value) for key, value in state.items()}
    floating = [key for key, value in own.items() if value.is_floating_point()]
    torch._foreach_lerp_([own[k] for k in floating], [now[k] for k in floating], 1 - decay)
    for key, value in own.items():
        if not value.is_floating_point():
            value.copy_(now[key])


@contextlib.contextmanager
def _evaluating_with(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it the model holds the weights of ``state`` and is in evaluation mode, as after it."""
    own = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    model.eval()
    try:
        yield
    finally:
        model.load_state_dict(own)


def _save(
    output: Path,
    settings: Mapping[str, Any],
    log: Sequence[dict[str, Any]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    companion: nn.Module | None,
    main: bool,
) -> None:
    """Writes a checkpoint and what comes with it; all processes call it, the main one writes."""
    weights = sharding.gathered(average)
    state = {
        "settings": json.dumps(settings),
        "epoch": len(log),
        "log": json.dumps(log),
        "model": sharding.gathered(model.state_dict()),
        "average": weights,
        "optimizer": sharding.gathered_optimizer(optimizer),
    }
    if companion is not None:
        state["companion"] = companion.state_dict()
    if main:
        save_state(output / WEIGHTS, weights)
        write_json(output / LOG, log)
        write_csv(output / TABLE, log)
        # Last, so that a checkpoint never speaks of an epoch whose weights were not written.
        _write_torch(output / CHECKPOINT, state)


def _write_torch(path: Path, state: Mapping[str, Any]) -> None:
    """`torch.save`, whole or not at all, with the system's error where there is one."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # some file systems say only here that they are full
        except RuntimeError as error:  # torch's, which says nothing of the cause: see what it met
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or OSError(errno.EIO, f"cannot be written ({error})") from error


@dataclass(frozen=True)
class _Checkpoint:
    """What a run that goes on takes from the one before."""

    path: Path
    settings: dict[str, Any]
    log: list[dict[str, Any]]  # one entry per epoch that is done
    model: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Any]
    companion: dict[str, Tensor] | None = None

    @classmethod
    def read(cls, path: Path) -> _Checkpoint:
        """Reads and checks a file, which may be any; no code from it runs.

        Raises:
            PysegError: it is damaged, or something else.
        """
        # Torch's own message advises weights_only=False, which would run code from the file.
        reason = "it is no file of torch.save, or one that needs more than tensors and numbers"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise _unreadable(path, reason) from error
        try:
            settings, log = json.loads(state["settings"]), json.loads(state["log"])
            epoch, model, average = state["epoch"], state["model"], state["average"]
            optimizer = state["optimizer"]
        except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
            raise _unreadable(path, f"{type(error).__name__}: {error}") from error
        if not isinstance(settings, dict):
            raise _unreadable(path, "its settings are no dict")
        if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
            raise _unreadable(path, "its log is no list of epochs")
        if type(epoch) is not int or not 0 < epoch == len(log):
            raise _unreadable(path, f"it is of epoch {epoch!r}, its log has {len(log)}")
        companion = state.get("companion")
        states = {"model": model, "average": average}
        if companion is not None:
            states["companion"] = companion
        for name, weights in states.items():
            if not isinstance(weights, dict) or not all(
                isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
            ):
                raise _unreadable(path, f"its {name} is no dict of tensors")
        if {k: v.shape for k, v in model.items()} != {k: v.shape for k, v in average.items()}:
            raise _unreadable(path, "its average has other entries than its model")
        if not isinstance(optimizer, dict):
            raise _unreadable(path, "its optimizer is no dict")
        return cls(path, settings, log, model, average, optimizer, companion)

    def restore(
        self,
        older: Mapping[str, Any],
        settings: Mapping[str, Any],
        whole: nn.Module,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: dict[str, Tensor],
        companion: nn.Module | None,
    ) -> None:
        """Puts a run's state where it was, if its settings are those of then."""
        now = json.loads(json.dumps(settings))
        # Older ones do not name their steps, and had no choice of some things.
        before = {"steps": now["steps"], **older, **self.settings}
        changed = [
            f"{key} (was {before.get(key)!r}, now {now[key]!r})"
            for key in now
            if key != "epochs" and before.get(key) != now[key]
        ]
        if changed:
            raise PysegError(f"cannot resume {self.path} with other settings: {', '.join(changed)}")
        if len(self.log) > now["epochs"]:
            raise PysegError(
                f"{self.path} has {len(self.log)} epochs behind it; give at least as many epochs, "
                f"not {now['epochs']}"
            )
        load_into(whole, self.model, self.path)
        if (companion is None) != (self.companion is None):
            has = "no companion" if self.companion is None else "a companion"
            raise PysegError(f"cannot resume {self.path}: it has {has}, and this run is otherwise")
        if companion is not None and self.companion is not None:
            load_into(companion, self.companion, self.path)
        if whole is not model:
            sharding.load(model.state_dict(), self.model)
        try:
            sharding.load_optimizer(optimizer, self.optimizer)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = f"its optimizer does not fit: {type(error).__name__}: {error}"
            raise _unreadable(self.path, reason) from error
        sharding.load(average, self.average)


def _unreadable(path: Path, reason: str) -> PysegError:
    return PysegError(
        f"{path} is not a readable training checkpoint ({reason}); remove it and start again"
    )
