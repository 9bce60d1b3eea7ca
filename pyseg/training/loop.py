"""`fit`: the epochs of any training, with checkpoints, averaged weights and resuming."""

from __future__ import annotations

import contextlib
import errno
import json
import math
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
from ..files import make_folder, remove_abandoned, replacing, write_json
from ..types import Dataset, Metric
from ..weights import load_into, save_state

if TYPE_CHECKING:
    from ..models import InstanceModel, SemanticModel

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "model.safetensors"
LOG = "log.json"

Precision = Literal["bf16", "fp32"]


def fit(
    model: nn.Module,
    batches: Callable[[int], Iterable[Any]],
    *,
    step: Callable[[nn.Module, Any], Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    steps: int,
    epochs: int,
    output_dir: str | Path,
    validate: Callable[[Any], Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    warmup: float = 0.05,
    clip: float | None = None,
    ema: float = 0.997,
    precision: Precision | None = None,
    validate_every: int = 10,
    save_every: int = 1,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Trains ``model`` in place and leaves it in evaluation mode, holding the averaged weights.

    What a step computes is the caller's: `pyseg.training.train` calls the network once, a method
    that adapts to another domain may call it as often as it needs. The learning rates are those of
    the optimizer's groups under a linear warm-up and half a cosine. Under ``torchrun`` or
    ``accelerate launch`` every process runs the same steps on batches of its own.

    Files in ``output_dir``, each replaced in one step, so that a kill leaves the previous one:
    ``checkpoint.pt`` (all that resuming needs), ``model.safetensors`` (the averaged weights,
    loadable as ``weights=``) and ``log.json`` (one entry per epoch). One training at a time writes
    there, which the lock of the file ``.lock`` sees to.

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
        validate: called with the model, which then holds the averaged weights and is in evaluation
            mode, every ``validate_every`` epochs and at the end; its numbers go to the log.
        settings: what else must be equal in a run that is resumed, as JSON has it.
        warmup: share of all steps over which the learning rate rises.
        clip: largest norm of the gradient; None = any.
        ema: decay of the running average of the weights, per step.
        precision: ``"bf16"`` = autocast; None = the checkpoint's when resuming, else
            `usual_precision` of the device.
        validate_every: epochs between validations.
        save_every: epochs between checkpoints; the last epoch always writes one.
        resume: go on from ``output_dir``'s checkpoint; it must exist and have the same settings.
        seed: of what is random within the network.
        progress: show a progress bar (on the main process, where stderr is a terminal).

    Returns:
        The log: per epoch a dict with ``epoch``, the mean of every loss, ``learning_rate`` (of the
        first group), ``precision``, ``seconds`` and what ``validate`` returned.

    Raises:
        ValueError: a setting out of range.
        PysegError: nothing to resume, or a checkpoint that is damaged or of other settings; another
            training writes to the folder, or it is a file; a loss that is not finite.
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
    check_run(epochs=epochs, warmup=warmup, clip=clip, ema=ema, precision=precision)
    check_positive(steps=steps, validate_every=validate_every, save_every=save_every)
    output = Path(output_dir)
    check_output(output, resume)
    make_folder(output, "output_dir")
    accelerator = processes.accelerator()
    device = accelerator.device
    with _locked(output):
        check_output(output, resume)  # again: only now nobody else writes there
        if accelerator.is_main_process:
            remove_abandoned(output)
        checkpoint = _Checkpoint.read(output / CHECKPOINT, device) if resume else None
        if precision is None:
            kept = checkpoint.settings.get("precision") if checkpoint else None
            precision = kept if kept in ("bf16", "fp32") else usual_precision(device)
        settings = {
            "epochs": epochs,
            "steps": steps,
            "warmup": warmup,
            "clip": clip,
            "ema": ema,
            "precision": precision,
            "seed": seed,
            **(settings or {}),
        }
        rates = [group["lr"] for group in optimizer.param_groups]  # before a checkpoint's
        model.to(device)
        model.train()
        average = {key: value.detach().clone() for key, value in model.state_dict().items()}
        network, optimizer = accelerator.prepare(model, optimizer)
        log: list[dict[str, Any]] = []
        if checkpoint is not None:
            checkpoint.restore(settings, model, optimizer, average)
            log = checkpoint.log
        first, total = len(log), steps * epochs
        autocast = torch.autocast(device.type, torch.bfloat16, precision == "bf16")

        def train_epoch(epoch: int, advance: Callable[[float], None]) -> dict[str, float]:
            """Means of the losses, over all processes."""
            # Random layers must not depend on how the run came to this epoch.
            torch.manual_seed(hash((seed, epoch, accelerator.process_index)) % 2**31)
            sums: dict[str, Tensor] = {}
            index, mean_loss = -1, math.nan
            for index, batch in enumerate(batches(epoch)):
                if index == steps:
                    break
                done = epoch * steps + index
                share = _schedule(done, total, warmup)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * share
                with autocast:
                    losses = step(network, batch)
                if "loss" not in losses:
                    got = sorted(losses)
                    raise ValueError(f"step must return losses with 'loss' among them, got {got}")
                accelerator.backward(losses["loss"])
                if clip is not None:
                    accelerator.clip_grad_norm_(network.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                _move_average(average, model.state_dict(), min(ema, (1 + done) / (10 + done)))
                for name, value in losses.items():
                    before = sums.get(name, torch.zeros((), device=device))
                    sums[name] = before + value.detach()
                if index % 8 == 0:  # reading the loss waits for the device
                    mean_loss = sums["loss"].item() / (index + 1)
                advance(mean_loss)
            if index != steps - 1:
                count = "more" if index == steps else index + 1
                raise ValueError(f"batches({epoch}) gave {count} batches where steps={steps}")
            return {
                name: accelerator.reduce(value / steps, "mean").item()
                for name, value in sums.items()
            }

        try:
            shown = progress and accelerator.is_main_process
            with _bar(f"training in {precision}", total, first * steps, shown) as advance:
                for epoch in range(first, epochs):
                    start = time.perf_counter()
                    means = train_epoch(epoch, advance)
                    if not math.isfinite(means["loss"]):
                        raise PysegError(
                            f"the loss became {means['loss']} in epoch {epoch + 1}; lower "
                            f"learning_rate ({rates[0]}) or use precision='fp32'"
                        )
                    entry: dict[str, Any] = {
                        "epoch": epoch + 1,
                        **{name: round(value, 5) for name, value in means.items()},
                        "learning_rate": optimizer.param_groups[0]["lr"],
                        "precision": precision,
                        "seconds": round(time.perf_counter() - start, 2),
                    }
                    last = epoch + 1 == epochs
                    if validate is not None and (last or (epoch + 1) % validate_every == 0):
                        with _evaluating_with(model, average):
                            entry.update(validate(model))
                    log.append(entry)
                    if accelerator.is_main_process and (last or (epoch + 1) % save_every == 0):
                        _save(output, settings, log, model, optimizer, average)
            accelerator.wait_for_everyone()
            model.load_state_dict(average)
        finally:
            model.eval()
    return log


def usual_precision(device: torch.device) -> Precision:
    """``"bf16"`` where the device computes in bfloat16 itself; elsewhere fp32 is faster."""
    return "bf16" if computes_in_bfloat16(device) else "fp32"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters for an optimizer: weight decay for those of more than one dimension."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


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
    *, epochs: int, warmup: float, clip: float | None, ema: float, precision: str | None
) -> None:
    """Refuses settings of `fit` that are out of range."""
    check_positive(epochs=epochs, clip=1.0 if clip is None else clip)
    check_share(warmup=warmup)
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
    """Refuses a folder with no checkpoint to resume, or with one that is not to be resumed."""
    checkpoint = Path(output_dir) / CHECKPOINT
    if resume and not checkpoint.exists():
        raise PysegError(f"resume=True, but there is no {checkpoint}; start with resume=False")
    if not resume and checkpoint.exists():
        raise PysegError(
            f"output_dir {output_dir} holds the checkpoint of an earlier run; pass "
            "resume=True to go on with it, or another output_dir"
        )


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keeps other trainings out of a folder; the main process holds the lock for all of a run."""
    from filelock import FileLock, Timeout

    lock = FileLock(output / ".lock")
    taken = False
    if processes.rank_and_count()[0] == 0:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            taken = True
    if any(processes.gather_objects(taken)):
        raise PysegError(
            f"output_dir {output} is being written by another training; give another output_dir, "
            "or wait for its end and go on with resume=True"
        )
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _bar(what: str, total: int, completed: int, wanted: bool) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr; yields what is called with the loss after each step."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
        disable=not (wanted and console.is_terminal),
    )
    with bar:
        task = bar.add_task(what, total=total, completed=completed, loss=math.nan)
        yield lambda loss: bar.update(task, advance=1, loss=loss)


def _schedule(step: int, total: int, warmup: float) -> float:
    """Share of the learning rate: linear rise, then half a cosine down to 1 % of it."""
    rising = max(1, round(total * warmup))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def _move_average(average: dict[str, Tensor], state: dict[str, Tensor], decay: float) -> None:
    floating = [key for key, value in average.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[k] for k in floating], [state[k] for k in floating], 1 - decay)
    for key, value in average.items():
        if not value.is_floating_point():
            value.copy_(state[key])


@contextlib.contextmanager
def _evaluating_with(model: nn.Module, state: dict[str, Tensor]) -> Iterator[None]:
    """Within it the model holds the weights of ``state`` and is in evaluation mode."""
    own = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    model.eval()
    try:
        yield
    finally:
        model.load_state_dict(own)
        model.train()


def _save(
    output: Path,
    settings: Mapping[str, Any],
    log: Sequence[dict[str, Any]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
) -> None:
    save_state(output / WEIGHTS, average)
    write_json(output / LOG, log)
    state = {
        "settings": json.dumps(settings),
        "epoch": len(log),
        "log": json.dumps(log),
        "model": model.state_dict(),
        "average": average,
        "optimizer": optimizer.state_dict(),
    }
    # Last, so that a checkpoint never speaks of an epoch whose weights were not written.
    with replacing(output / CHECKPOINT) as temporary, temporary.open("wb") as file:
        try:
            torch.save(state, file)
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

    @classmethod
    def read(cls, path: Path, device: torch.device) -> _Checkpoint:
        """Reads and checks a file, which may be any; no code from it runs.

        Raises:
            PysegError: it is damaged, or something else.
        """
        # Torch's own message advises weights_only=False, which would run code from the file.
        reason = "it is no file of torch.save, or one that needs more than tensors and numbers"
        try:
            state = torch.load(path, map_location=device, weights_only=True)
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
        for name, weights in (("model", model), ("average", average)):
            if not isinstance(weights, dict) or not all(
                isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
            ):
                raise _unreadable(path, f"its {name} is no dict of tensors")
        if {k: v.shape for k, v in model.items()} != {k: v.shape for k, v in average.items()}:
            raise _unreadable(path, "its average has other entries than its model")
        if not isinstance(optimizer, dict):
            raise _unreadable(path, "its optimizer is no dict")
        return cls(path, settings, log, model, average, optimizer)

    def restore(
        self,
        settings: Mapping[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: dict[str, Tensor],
    ) -> None:
        """Puts a run's state where it was, if its settings are those of then."""
        now = json.loads(json.dumps(settings))
        before = {"steps": now["steps"], **self.settings}  # steps: older ones do not name them
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
        load_into(model, self.model, self.path)
        try:
            optimizer.load_state_dict(self.optimizer)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = f"its optimizer does not fit: {type(error).__name__}: {error}"
            raise _unreadable(self.path, reason) from error
        for key, value in self.average.items():
            average[key].copy_(value)


def _unreadable(path: Path, reason: str) -> PysegError:
    return PysegError(
        f"{path} is not a readable training checkpoint ({reason}); remove it and start again"
    )
