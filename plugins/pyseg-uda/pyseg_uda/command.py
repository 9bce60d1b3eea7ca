"""``pyseg adapt``: its help imports no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyseg.errors import PysegError

if TYPE_CHECKING:
    from pyseg.types import Dataset

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
STOPPED = 130  # exit code of Ctrl-C, as pyseg's own commands have it


@app.command("adapt")
def command(
    spec: Annotated[str, typer.Option("--spec", "-s", help="Model, such as segformer_b0.")],
    source: Annotated[
        str,
        typer.Option(
            help="Labelled data set, with options if need be; camvid:day is a data set and its "
            "drives."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoints, weights and log.")
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="images:FOLDER, or a data set as of --source, of which no label is read; needed "
            "but for --method source."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="source: the source alone; self-training: DAFormer's; attention: with attention "
            "consistency. [default: attention where the model allows it, else self-training]"
        ),
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(help="Give the source the target's colours: mean, covariance or fourier."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="In all; with --resume it may be another. [default: 40]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of an epoch. [default: 1000]")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the data sets.")] = None,
    split: Annotated[str, typer.Option(help="Of source and target.")] = "train",
    validation: Annotated[
        str | None, typer.Option(help="Labelled data set, as of --source, to score now and then.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="To start from: a name that the model knows, a path, or none.")
    ] = "none",
    imagenet: Annotated[
        str | None,
        typer.Option(
            help="Weights of ImageNet, whose features of things are kept: a name, a path, or "
            "start = those of --weights. [default: without]"
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images of each domain per step. [default: 2]")
    ] = None,
    crop_size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Of the views, pixels. [default: 512x512]")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(metavar="LOW-HIGH", help="Zoom before the crop. [default: 1-1]")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the backbone, by AdamW. [default: 6e-5]")
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            metavar="PART=RATE,…",
            help="Its factors for parts of the model, or none. [default: backbone=1,rest=10]",
        ),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Probability of a certain teacher. [default: 0.968]")
    ] = None,
    decay: Annotated[float | None, typer.Option(help="Of the teacher. [default: 0.999]")] = None,
    rare: Annotated[
        str | None,
        typer.Option(help="Temperature of drawing rare classes, or none. [default: 0.01]"),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that prepare views.")] = None,
    validate_every: Annotated[
        int | None, typer.Option(help="Epochs between validations. [default: 10]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in --output.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a model on one domain's labels and another's images; the result is a pipeline.

    pyseg adapt --spec segformer_b0 --source camvid:day --target images:dusk/ --root CamVid -o run/
    """
    import torch

    import pyseg
    from pyseg import processes
    from pyseg.training.optimizer import read_rates

    from . import streams
    from .training import adapt

    day = dataset(source, root, split)
    torch.manual_seed(seed)  # for weights that start out random
    made: dict[str, Any] = {"num_classes": len(day.classes)}
    pipeline = pyseg.build(spec, weights=_weights(weights), **made)
    if len(pipeline.stages) != 1 or not isinstance(pipeline.model, pyseg.models.SemanticModel):
        raise PysegError(f"--spec: adapt takes one semantic model, got {spec!r}")
    model = pipeline.model
    reference = None
    if imagenet is not None:
        reference = model if imagenet == "start" else None
        reference = reference or pyseg.build(spec, weights=_weights(imagenet), **made).model
    if method is None:
        try:
            streams.mix_transformer(model)
            method = "attention"
        except PysegError:
            method = "self-training"
    options = {
        "align": align,
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "threshold": threshold,
        "decay": decay,
        "workers": workers,
        "validate_every": validate_every,
        "crop_size": _pair(crop_size, r"(\d+)x(\d+)", "--crop-size", "512x512", int),
        "scale": _pair(scale, r"(\d*\.?\d+)-(\d*\.?\d+)", "--scale", "0.5-1.5", float),
    }
    options = {name: value for name, value in options.items() if value is not None}
    if rates is not None:
        options["rates"] = None if rates == "none" else read_rates(rates)
    if rare is not None:
        options["rare"] = None if rare == "none" else _number(rare, "--rare")
    try:
        log = adapt(
            model,
            day,
            None if target is None else _target(target, root, split),
            output_dir=output,
            method=method,  # type: ignore[arg-type]
            validation=None if validation is None else dataset(validation, root, split),
            imagenet=reference,
            resume=resume,
            seed=seed,
            **options,
        )
    except KeyboardInterrupt:
        typer.echo(f"\nstopped: the same command with --resume goes on in {output}", err=True)
        raise typer.Exit(STOPPED) from None
    rank, _ = processes.rank_and_count()
    processes.leave()
    if rank:
        return
    folder = pipeline.to("cpu").save(output / "pipeline")
    if as_json:
        typer.echo(json.dumps(log, indent=1, allow_nan=False))
        return
    last = log[-1]
    scores = "".join(
        f", {key} {last[key]:.4f}" for key in ("loss", "confidence", "miou") if key in last
    )
    typer.echo(f"{method}: {last['epoch']} epochs{scores}; use it with --spec {folder}")


def dataset(text: str, root: Path | None, split: str) -> Dataset:
    """A registered data set from ``camvid:day``, ``camvid(drives='day')`` or ``synthetic``.

    Raises:
        PysegError: it has no drives.
    """
    from pyseg import datasets
    from pyseg.registry import accepted_options

    context: dict[str, Any] = {"split": split, **({} if root is None else {"root": root})}
    name, _, drives = text.partition(":")
    if drives and name in datasets.list():  # else it may be DISTRIBUTION:NAME
        known = accepted_options(datasets.get(name))
        if known is not None and "drives" not in known:
            raise PysegError(f"{name} has no drives, so that {text} means nothing")
        text, context = name, {**context, "drives": drives}
    return datasets._registry.make(text, context)


def _target(text: str, root: Path | None, split: str) -> Any:
    """A folder, or a data set whose labels nobody reads."""
    kind, _, folder = text.partition(":")
    return Path(folder) if kind == "images" else dataset(text, root, split)


def _weights(text: str) -> str | None:
    return None if text == "none" else text


def _pair(text: str | None, pattern: str, option: str, example: str, kind: Any) -> Any:
    if text is None:
        return None
    found = re.fullmatch(pattern, text)
    if found is None:
        raise PysegError(f"{option} must be of the form {example}, got {text!r}")
    return kind(found[1]), kind(found[2])


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PysegError(f"{option} must be a number or none, got {text!r}") from None
