"""The command line, ``pyseg``: ``--help`` imports no torch, commands import what they use."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .errors import PluginFailure, PysegError

if TYPE_CHECKING:
    from rich.table import Table

    from .evaluation import Evaluation
    from .pipeline import Pipeline
    from .types import Dataset

BUNDLED = "streetnet+crf"  # what the demo shows
FAILED, MISUSED = 1, 2  # exit codes: some inputs failed; nothing could be done


class _Commands(TyperGroup):
    """Prints the errors that are the user's to mend as one line; others keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PysegError as error:
            cause = error.__cause__
            # A bug of somebody keeps its traceback; a ValueError tells of bad input.
            if isinstance(error, PluginFailure) and not isinstance(cause, ValueError):
                traceback.print_exception(cause)
            message = str(error)
        except ImportError as error:
            if error.name is not None:  # raised by Python's import, not by our loader
                raise
            message = str(error)
        except OSError as error:  # no permission, no space: Python's text names the file
            message = str(error)
        typer.secho(f"error: {message}", err=True, fg="red")
        raise typer.Exit(MISUSED)


app = typer.Typer(
    cls=_Commands,
    help="Image segmentation: models, refiners and metrics composed in one line.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SpecOption = Annotated[
    str,
    typer.Option(
        "--spec",
        "-s",
        help="Pipeline such as 'streetnet+crf(iterations=5)', or the folder of a saved one.",
    ),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 … [default: cpu]")]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        help="The model's weights: a name it knows, a path, a URL, or none for random ones."
    ),
]
ClassesOption = Annotated[
    int | None, typer.Option("--num-classes", help="Number of classes of the model.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DatasetOption = Annotated[
    str,
    typer.Option(
        help="Registered data set, with options if need be: \"folder(classes='names.txt')\"."
    ),
]
RootOption = Annotated[
    Path | None, typer.Option(help="Folder of the data set; synthetic has none.")
]


@app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """Names of all models, refiners, metrics and data sets, built-in and from plugins."""
    from .doctor import registries

    rows = []
    for registry in registries().values():
        for name in registry.list():
            try:
                info = registry.info(name)
                target, owner = info.target, info.distribution
            except PysegError as error:  # two distributions claim it; the others are still listed
                target, owner = "", str(error)
            rows.append(
                {"kind": registry.kind, "name": name, "target": target, "distribution": owner}
            )
    if as_json:
        return _print_json(rows)
    _print_table(["kind", "name", "target", "distribution"], [[*row.values()] for row in rows])


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """What is installed: torch, CUDA, compiled libraries, ops, plugins; exit code 1 on problems."""
    from .doctor import diagnose

    report = diagnose()
    if as_json:
        _print_json(report)
    else:
        _print_report(report)
    if report["problems"]:
        raise typer.Exit(FAILED)


@app.command()
def predict(
    paths: Annotated[list[str], typer.Argument(help="Image files, folders and glob patterns.")],
    spec: SpecOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the label maps.")],
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also write overlays with a legend.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Compute results again that exist.")
    ] = False,
    weights: WeightsOption = None,
    num_classes: ClassesOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Segment images and write one indexed PNG each.

    Finished results are skipped. Bad files are reported, the others go on, and the exit code is 1.
    """
    from . import prediction

    pipeline = _pipeline(spec, weights, num_classes, device)
    summary = prediction.predict(
        pipeline, paths, output, overlay=overlay, overwrite=overwrite, track=_track("predicting")
    )
    if as_json:
        _print_json(summary.to_dict())
    else:
        for reason in summary.failed.values():
            typer.secho(f"failed: {reason}", err=True, fg="red")
        typer.echo(
            f"{len(summary.written)} written to {output}, {len(summary.skipped)} were "
            f"there already, {len(summary.failed)} failed"
        )
    if summary.failed:
        raise typer.Exit(FAILED)


@app.command()
def evaluate(
    spec: SpecOption,
    dataset: DatasetOption,
    root: RootOption = None,
    split: Annotated[str | None, typer.Option(help="Split, such as val.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Registered metric; may be repeated. [default: semantic]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Score so many images, spread evenly.")] = None,
    weights: WeightsOption = None,
    num_classes: ClassesOption = None,
    device: DeviceOption = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for a page (index.html) and its numbers as JSON.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score every stage of a pipeline on a data set, with time and peak memory.

    Under torchrun or accelerate launch the images are shared out; the scores stay the same.
    """
    from . import evaluation

    with _processes(device) as device:
        data = _dataset(dataset, root, split)
        pipeline = _pipeline(spec, weights, num_classes, device)
        recorder = None
        if report is not None:
            from .report import Recorder

            recorder = Recorder(report, data.classes, data.palette, len(pipeline.stages))
        result = evaluation.evaluate(
            pipeline,
            data,
            metric or ["semantic"],
            limit=limit,
            track=_track("evaluating"),
            observe=recorder.add if recorder else None,
        )
        if recorder is not None:
            recorder.write(result, f"{dataset}, {split}" if split else dataset)
    if not result.is_main_process:
        return
    if as_json:
        return _print_json(result.to_list())
    _print_evaluation(result)
    if report is not None:
        typer.echo(f"wrote {report / 'index.html'} and {report / 'report.json'}")


@app.command("cost")
def cost_command(
    spec: SpecOption,
    image: Annotated[
        Path | None, typer.Option(help="A typical image. [default: the bundled street image]")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Resize the image first, such as 1024x2048.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed runs; the median counts.")] = 5,
    weights: WeightsOption = None,
    num_classes: ClassesOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time, peak memory, parameters and FLOPs of every stage on one image."""
    from .cost import cost, read_sized

    picture = read_sized(image, size)
    result = cost(_pipeline(spec, weights, num_classes, device), picture, rounds=rounds)
    if as_json:
        return _print_json(result.to_dict())
    head, rows = result.table()
    _print_table(head, rows, numbers=True)
    height, width = result.size
    threads = f", {result.threads} threads" if result.device == "cpu" else ""
    typer.echo(
        f"{result.spec} on {height}x{width} pixels, {result.device}{threads}, median of "
        f"{result.rounds}; FLOPs as torch counts them, 2 per multiply-add"
    )


@app.command("panoptic-quality")
def panoptic_quality(
    ground_truth: Annotated[Path, typer.Argument(help="JSON in COCO's panoptic format.")],
    predictions: Annotated[Path, typer.Argument(help="JSON in COCO's panoptic format.")],
    gt_dir: Annotated[
        Path | None, typer.Option(help="Its PNGs. [default: the folder of the JSON's name]")
    ] = None,
    pred_dir: Annotated[
        Path | None, typer.Option(help="Its PNGs. [default: the folder of the JSON's name]")
    ] = None,
    categories: Annotated[
        Path | None, typer.Option(help="JSON with the categories. [default: the ground truth's]")
    ] = None,
    boundary_ratio: Annotated[
        float,
        typer.Option(
            help="Boundary PQ: width of the boundary as a share of the diagonal, "
            "usually 0.02; 0 for plain PQ."
        ),
    ] = 0.0,
    all_crowds: Annotated[
        bool,
        typer.Option(
            "--all-crowds",
            help="Every crowd of a class counts, not only the last one, as in panopticapi.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Panoptic quality of predictions in COCO's format, as panopticapi computes it."""
    from .metrics.panoptic import score_files

    try:
        result = score_files(
            ground_truth,
            predictions,
            target_folder=gt_dir,
            prediction_folder=pred_dir,
            categories=categories,
            boundary_ratio=boundary_ratio,
            all_crowds=all_crowds,
            track=_track("scoring"),
        )
    except ValueError as error:  # an option out of range
        raise error if isinstance(error, PysegError) else PysegError(str(error)) from error
    groups = ("All", "Things", "Stuff")
    if as_json:
        for group in groups:  # JSON has no nan
            result[group] = {k: None if v != v else v for k, v in result[group].items()}
        return _print_json(result)
    rows = [
        [
            group,
            *(f"{100 * result[group][key]:.1f}" for key in ("pq", "sq", "rq")),
            str(result[group]["n"]),
        ]
        for group in groups
    ]
    _print_table(["", "PQ", "SQ", "RQ", "classes"], rows, numbers=True)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="Model, such as streetnet or fcn_resnet50.")],
    dataset: DatasetOption,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoints, weights and log.")
    ],
    epochs: Annotated[int, typer.Option(help="Passes over the data.")],
    root: RootOption = None,
    split: Annotated[str, typer.Option(help="Split to train on.")] = "train",
    validation_split: Annotated[
        str | None, typer.Option(help="Split to score now and then.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Weights to start from; none for random ones.")
    ] = "none",
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images per step and process. [default: 12; 2 with instances]"),
    ] = None,
    crop_size: Annotated[
        tuple[int, int], typer.Option(help="Height and width of the crops, pixels.")
    ] = (240, 320),
    scale: Annotated[
        tuple[float, float], typer.Option(help="Smallest and largest zoom before the crop.")
    ] = (0.6, 1.6),
    full_size: Annotated[
        float, typer.Option(help="Share of the epochs, at the end, on whole images.")
    ] = 0.15,
    class_crops: Annotated[
        float, typer.Option(help="Share of crops placed on a class drawn evenly.")
    ] = 0.5,
    photometric: Annotated[
        float, typer.Option(help="Strength of random light, colour, blur and noise.")
    ] = 1.0,
    flip: Annotated[
        float, typer.Option(help="Share of images that are mirrored, with instances.")
    ] = 0.5,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Of AdamW, after the warm-up. [default: 2.5e-3; 5e-4 with instances]"),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Of AdamW. [default: 0.02; 1e-4 with instances]")
    ] = None,
    warmup: Annotated[float, typer.Option(help="Share of the steps spent warming up.")] = 0.03,
    class_power: Annotated[
        float, typer.Option(help="Class weights: 0 = pixels are equal, 1 = classes are.")
    ] = 0.35,
    jaccard: Annotated[float, typer.Option(help="Weight of the soft Jaccard loss.")] = 1.0,
    auxiliary: Annotated[float, typer.Option(help="Weight of each auxiliary head.")] = 0.4,
    ema: Annotated[float, typer.Option(help="Decay of the averaged weights.")] = 0.997,
    precision: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    cache: Annotated[bool, typer.Option(help="Keep decoded images in memory.")] = True,
    workers: Annotated[int, typer.Option(help="Processes that prepare batches.")] = 0,
    save_every: Annotated[int, typer.Option(help="Epochs between checkpoints.")] = 1,
    validate_every: Annotated[int, typer.Option(help="Epochs between validations.")] = 10,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in --output.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model; the result is a pipeline that --spec takes, in OUTPUT/pipeline.

    For models of instances (maskrcnn…, panoptic_fpn…, upsnet…) the options about crops, class
    weights, auxiliary heads and workers have no meaning and must be left alone.
    """
    both: dict[str, Any] = {
        "photometric": photometric,
        "warmup": warmup,
        "ema": ema,
        "precision": precision,
        "cache": cache,
        "save_every": save_every,
        "validate_every": validate_every,
        "seed": seed,
        "resume": resume,
    }
    chosen = {
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
    }
    both |= {key: value for key, value in chosen.items() if value is not None}
    semantic: dict[str, Any] = {
        "crop_size": crop_size,
        "scale": scale,
        "full_size": full_size,
        "class_crops": class_crops,
        "class_power": class_power,
        "jaccard": jaccard,
        "auxiliary": auxiliary,
        "workers": workers,
    }
    import torch
    from accelerate import PartialState

    from . import instance_training, training
    from .models.panoptic import InstanceModel

    data = _dataset(dataset, root, split)
    validation = _dataset(dataset, root, validation_split) if validation_split else None
    torch.manual_seed(seed)  # for weights that start out random
    pipeline = _pipeline(model, weights, len(data.classes), None)
    if len(pipeline.stages) != 1:
        raise PysegError(f"train takes one model, got {model!r}; add refiners when it is trained")
    network = pipeline.model
    network.classes, network.palette = tuple(data.classes), tuple(data.palette)
    fit: Any = training.train
    options = both | semantic
    if isinstance(network, InstanceModel):
        defaults = inspect.signature(training.train).parameters
        changed = [key for key, value in semantic.items() if value != defaults[key].default]
        if changed:
            raise PysegError(f"{', '.join(changed)} have no meaning for {model}: leave them out")
        fit, options = instance_training.train_instances, both | {"flip": flip}
    elif flip != 0.5:
        raise PysegError(f"flip has a meaning for models of instances only, {model} is none")
    try:
        log = fit(
            network,
            data,
            output_dir=output,
            epochs=epochs,
            validation=validation,
            progress=_console().is_terminal,
            **options,
        )
    except ValueError as error:  # a setting out of range
        raise PysegError(str(error)) from error
    state = PartialState()
    state.destroy_process_group()  # a peer that ended first would abort this process
    if not state.is_main_process:
        return None
    folder = pipeline.to("cpu").save(output / "pipeline")
    if as_json:
        return _print_json(log)
    last = log[-1]
    scores = "".join(f", {key} {last[key]:.4f}" for key in ("loss", "miou", "pq") if key in last)
    typer.echo(f"{last['epoch']} epochs{scores}; use it with --spec {folder}")


@app.command("instance-ap")
def instance_ap_command(
    truth: Annotated[Path, typer.Argument(metavar="GT.json", help="COCO instances_*.json.")],
    predictions: Annotated[Path, typer.Argument(metavar="PRED.json", help="COCO results.")],
    as_json: JsonOption = False,
) -> None:
    """Average precision of COCO results: masks, boxes and boundaries, as far as the files go."""
    from .files import finite
    from .metrics.instances import KINDS, instance_ap

    scores = instance_ap(truth, predictions)
    if as_json:
        return _print_json(finite(scores))
    names = [
        "ap",
        "ap50",
        "ap75",
        "ap_small",
        "ap_medium",
        "ap_large",
        "ar1",
        "ar10",
        "ar100",
        "ar_small",
        "ar_medium",
        "ar_large",
    ]
    rows = [
        [kind, *(f"{scores[f'{kind}_{name}']:.4f}" for name in names)]
        for kind in KINDS
        if f"{kind}_ap" in scores
    ]
    _print_table(["", *names], rows, numbers=True)
    typer.echo(
        f"{scores['images']} images, {scores['objects']} objects, {scores['detections']} detections"
    )


@app.command("check-labels")
def check_labels_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Label maps, or a folder with labels/.")
    ],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images. [default: DIR/images, if any]")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Class names, .txt or .json. [default: DIR/classes.*]")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="Number of classes.")] = None,
    ignore_index: Annotated[int, typer.Option(help="Label of void pixels.")] = 255,
    as_json: JsonOption = False,
) -> None:
    """Find what is wrong with label maps before training; exit code 1 if anything is."""
    from .label_check import check_labels

    report = check_labels(
        folder,
        images=images,
        classes=classes,
        num_classes=num_classes,
        ignore_index=ignore_index,
        track=_track("checking"),
    )
    if as_json:
        _print_json(report.to_dict())
    else:
        total = sum(count.pixels for count in report.values)
        _print_table(
            ["value", "class", "pixels", "share", "files"],
            [
                [str(c.value), c.name, str(c.pixels), f"{c.pixels / total:.2%}", str(c.files)]
                for c in report.values
            ],
        )
        for problem in report.problems:
            kind, colour = ("error", "red") if problem.error else ("warning", "yellow")
            typer.secho(f"{kind} [{problem.kind}]: {problem.message}", fg=colour)
        verdict = "no errors" if report.ok else "not fit for training"
        maps = "1 label map" if report.files == 1 else f"{report.files} label maps"
        typer.echo(f"{maps}: {verdict}")
    if not report.ok:
        raise typer.Exit(FAILED)


@app.command()
def tune(
    refiner: Annotated[str, typer.Argument(help="Refiner to tune: crf.")],
    dataset: DatasetOption,
    root: RootOption = None,
    spec: Annotated[
        str,
        typer.Option(
            "--spec",
            "-s",
            help="Pipeline whose result is to be refined, or the folder of a saved one.",
        ),
    ] = "streetnet",
    split: Annotated[str, typer.Option(help="Split to fit and to check on.")] = "val",
    limit: Annotated[int | None, typer.Option(help="Use so many images, spread evenly.")] = None,
    trials: Annotated[int, typer.Option(help="Parameters to try.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the parameters drawn.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON file of all trials; a search goes on from it."),
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a search, train kernel weights and label compatibility on "
            "--split and save the pipeline to this folder."
        ),
    ] = None,
    check_split: Annotated[str, typer.Option(help="Split that --train is checked on.")] = "val",
    epochs: Annotated[int, typer.Option(help="Of --train.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Of --train.")] = 0.03,
    weights: WeightsOption = None,
    num_classes: ClassesOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a refiner's parameters on a validation split, with the refiner left out as a candidate.

    Half of the images is fitted, the other half checks; the result is a --spec to paste.
    """
    from . import tuning

    if refiner != "crf":
        raise PysegError(f"tune knows the refiner crf, got {refiner!r}")
    data = _dataset(dataset, root, split)
    pipeline = _pipeline(spec, weights, num_classes, device)
    if train is not None:
        if check_split == split:
            raise PysegError(
                f"--train and its check need different splits, got {split!r} for both"
                "; use --split train"
            )
        check = _dataset(dataset, root, check_split)
        training = tuning.train_crf(
            pipeline,
            data,
            check,
            limit=limit,
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
            track=_track("training"),
        )
        training.pipeline.save(train)
        if as_json:
            return _print_json(training.to_dict())
        _print_table(*training.table(), numbers=True)
        typer.echo(
            f"loss of each epoch: {', '.join(f'{x:.4f}' for x in training.losses)}; use "
            f"--spec {train}"
        )
        return
    result = tuning.tune_crf(
        pipeline, data, limit=limit, trials=trials, seed=seed, log=output, track=_track("tuning")
    )
    if as_json:
        return _print_json(result.to_dict())
    head, rows = result.table()
    _print_table(head, rows, numbers=True)
    if result.spec == str(pipeline):
        typer.echo(
            f"no crf is best: {result.best.name} changes mIoU by {result.gain:+.4f} on "
            f'images not fitted; use --spec "{result.spec}"'
        )
    else:
        typer.echo(
            f"mIoU {result.gain:+.4f} on images not fitted, {result.trials} trials; use "
            f'--spec "{result.spec}"'
        )


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results.")] = Path(
        "demo"
    ),
    spec: SpecOption = BUNDLED,
    panoptic: Annotated[
        bool,
        typer.Option(
            "--panoptic",
            help="Instead, pictures and panoptic quality of the images of --dataset, by the "
            "trained model in the folder --spec.",
        ),
    ] = False,
    dataset: Annotated[str, typer.Option(help="With --panoptic.")] = "coco_panoptic",
    root: RootOption = None,
    split: Annotated[str | None, typer.Option(help="With --panoptic, such as val2017.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="With --panoptic: so many images, spread evenly.")
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Segment the street image that comes with pyseg, stage by stage, and score it.

    No panoptic weights come with pyseg, so --panoptic needs a model that `pyseg train` made.
    """
    from . import demonstration

    if panoptic:
        if spec == BUNDLED:
            raise PysegError(
                "--panoptic needs --spec, the pipeline of a trained model: `pyseg "
                'train "upsnet_resnet50(num_stuff=…)" --dataset … --output run` '
                "makes it, in run/pipeline"
            )
        data = _dataset(dataset, root, split)
        pipeline = _pipeline(spec, None, None, device)
        result, files = demonstration.run_panoptic(pipeline, data, output, limit)
    elif root is not None or split is not None or limit is not None:
        raise PysegError("--root, --split and --limit go with --panoptic")
    else:
        result, files = demonstration.run(_pipeline(spec, None, None, device), output)
    if as_json:
        return _print_json({"stages": result.to_list(), "files": [str(file) for file in files]})
    _print_evaluation(result)
    for file in files:
        typer.echo(f"wrote {file}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run the benchmarks of a source checkout; further arguments go to pytest (-k crf)."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks").is_dir() or not (root / "conftest.py").is_file():
        raise PysegError(
            "the benchmarks are not part of the installed package; clone the "
            "repository and run `make bench` there"
        )
    command = [sys.executable, "-m", "pytest", "--benchmark", *context.args]
    raise typer.Exit(subprocess.run(command, cwd=root, check=False).returncode)


def main() -> None:
    """The ``pyseg`` command."""
    app(prog_name="pyseg")


# --- shared by the commands -------------------------------------------------------------------


def _pipeline(
    spec: str, weights: str | None, num_classes: int | None, device: str | None
) -> Pipeline:
    from . import pipeline

    if (Path(spec) / "pipeline.json").is_file():
        if weights is not None or num_classes is not None:
            raise PysegError(
                f"--weights and --num-classes do not go with a saved pipeline, and {spec} is one"
            )
        return pipeline.load(spec, device=device)
    chosen = {None: pipeline.DEFAULT, "none": None}.get(weights, weights)
    return pipeline.build(spec, num_classes=num_classes, weights=chosen, device=device)


def _dataset(text: str, root: Path | None, split: str | None) -> Dataset:
    from . import datasets
    from .spec import StageSpec

    stage = datasets._registry.parse(text)
    given = {k: v for k, v in {"root": root, "split": split}.items() if v is not None}
    return datasets._registry.make(StageSpec(stage.name, {**given, **stage.options}))


@contextlib.contextmanager
def _processes(device: str | None) -> Iterator[str | None]:
    """Joins the processes of torchrun or accelerate launch; yields this one's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    from accelerate import PartialState

    state = PartialState(cpu=not (device or "cpu").startswith("cuda"))
    try:
        yield str(state.device) if device == "cuda" else device
    finally:
        state.destroy_process_group()


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _track(what: str) -> Any:
    """A progress bar on stderr, where that is a terminal."""

    def track(items: Sequence[Any]) -> Iterable[Any]:
        from rich import progress

        console = _console()
        shown = console.is_terminal and os.environ.get("RANK", "0") == "0"
        return progress.track(items, what, console=console, disable=not shown)

    return track


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, title in enumerate(head):
        table.add_column(
            Text(title), justify="right" if numbers and index else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets are no markup
    return table


def _print_table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> None:
    from rich.console import Console

    # A pipe has no width; rich's guess of 80 would break lines there.
    Console(width=None if sys.stdout.isatty() else 1000).print(_table(head, rows, numbers))


def _print_evaluation(result: Evaluation) -> None:
    head, rows = result.table()
    _print_table(head, rows, numbers=True)
    plural = "" if result.images == 1 else "s"
    typer.echo(
        f"{result.spec}: {result.images} image{plural}; Δ against the baseline, time and "
        "memory of each stage alone"
    )


def _print_report(report: dict[str, Any]) -> None:
    cuda, native = report["cuda"], report["native"]
    devices = ", ".join(cuda["devices"]) or "no device"
    rows = [
        ["pyseg", f"{report['pyseg']['version']} in {report['pyseg']['folder']}"],
        ["python", f"{report['python']} on {report['platform']}"],
        *([name, version or "not installed"] for name, version in report["packages"].items()),
        ["CUDA of torch", f"{cuda['torch'] or 'none'}, {devices}"],
    ]
    if "error" not in native:
        rows += [
            ["CPU library", native["cpu"]],
            ["CUDA library", native["cuda"] or f"none: {native['cuda_problem']}"],
            ["SIMD level", native["simd"]],
        ]
    _print_table(["what", "found"], rows)
    if "error" not in native:
        _print_table(
            ["op", "cpu", "cuda"],
            [
                [name, _usable(op["cpu"], op["cpu"]), _usable(op["cuda"], op["cuda_usable"])]
                for name, op in native["ops"].items()
            ],
        )
    _print_table(
        ["kind", "name", "from", "state"],
        [
            [
                e["kind"],
                e["name"],
                f"{e['distribution'] or '?'} {e['version'] or ''}".strip(),
                "broken" if e["problem"] else "ok",
            ]
            for e in report["entry_points"]
        ],
    )
    for problem in report["problems"]:
        typer.secho(f"problem: {problem}", fg="red")
    if not report["problems"]:
        typer.echo("no problems found")


def _usable(built: bool, usable: bool) -> str:
    return "yes" if usable else "built, no device" if built else "no"
