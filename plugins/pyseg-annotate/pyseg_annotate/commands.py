"""``pyseg annotate``: objects, a predictor of quality, the loop, the page, disagreement."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .annotators import Annotators
    from .tasks import Task

app = typer.Typer(
    help="Annotation that stops when it is good enough (ICORD).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
ObjectsArgument = Annotated[Path, typer.Argument(help="What `pyseg annotate objects` wrote.")]
AnnotatorsOption = Annotated[
    str,
    typer.Option(
        help="simulated(workers=20, seed=0), submitted(folder='exports'), prompted(workers=5), or "
        "studio(workers='anna,ben')."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def objects(
    source: Annotated[Path, typer.Argument(help="Annotations in any format pyseg reads.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(
        "objects.json"
    ),
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images. [default: that of SOURCE]")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Names in the order of their ids, or a file, where SOURCE has none."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Classes that are taken, joined by commas. [default: all]")
    ] = None,
    parts: Annotated[
        bool, typer.Option(help="Of label maps: every connected part is an object.")
    ] = False,
    least: Annotated[int, typer.Option(help="Pixels of an object at least.")] = 64,
    truth: Annotated[
        bool, typer.Option("--truth/--no-truth", help="Keep the masks, to train or simulate.")
    ] = True,
    limit: Annotated[int | None, typer.Option(help="Take so many, spread evenly.")] = None,
) -> None:
    """List the objects of annotations: what is to be drawn, each with a window and a point."""
    from pyseg.errors import PysegError

    from .tasks import tasks_in, write_tasks

    chosen = None if only is None else [name.strip() for name in only.split(",")]
    found = tasks_in(
        source, images, classes=classes, only=chosen, parts=parts, least=least, truth=truth
    )
    if limit is not None:
        if limit < 1:
            raise PysegError(f"limit must be 1 or more, got {limit}")
        step = max(1, len(found) // limit)
        found = found[::step][:limit]
    write_tasks(output, found)
    typer.echo(f"{len(found)} objects of {len({t.image for t in found})} images: {output}")


@app.command()
def train(
    objects: ObjectsArgument = Path("objects.json"),
    annotators: AnnotatorsOption = "simulated",
    each: Annotated[int, typer.Option(help="Annotations of each object.")] = 5,
    regressor: Annotated[str, typer.Option(help="boosting or ridge.")] = "boosting",
    without: Annotated[
        list[str] | None,
        typer.Option(help="Features to leave out: geometry, intensity, boundary or behaviour."),
    ] = None,
    threshold: Annotated[float, typer.Option(help="For which the report says what it accepts.")] = (
        0.83
    ),
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(
        "quality.npz"
    ),
    seed: Annotated[int, typer.Option(help="Of the regressor and the split.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Learn to predict quality from objects whose truth is known.

    What it prints is of objects and workers that were not trained on; what it writes has learnt
    from all.
    """
    from pyseg.errors import PysegError

    from .quality import Examples, QualityPredictor, judge, split
    from .tasks import read_tasks

    tasks = read_tasks(objects)
    people = _annotators(annotators, tasks, output.parent)
    if each < 1:
        raise PysegError(f"each must be 1 or more, got {each}")
    drawn = []
    for task in _track("annotating")(tasks):
        taken: list[str] = []
        for _ in range(each):
            submission = people.annotate(task, taken)
            if submission is None:
                break
            taken.append(submission.worker)
            drawn.append((task, submission))
    examples = Examples.of(drawn)
    options: dict[str, Any] = {"without": without or (), "seed": seed}
    predictor = QualityPredictor(examples, regressor, **options)
    predictor.save(output)
    found: dict[str, Any] = {"annotations": len(examples), "judged": 0}
    reason = ""
    try:
        learnt, rest = (examples.some(part) for part in split(examples, seed=seed))
        tried = QualityPredictor(learnt, regressor, **options)
    except PysegError as error:  # all were enough to learn from; some of them may be too few
        reason = str(error)
    else:
        found |= judge(tried.predict_features(rest.features), rest.jaccard, threshold)
        found |= {"judged": len(rest), "jaccard": float(rest.jaccard.mean())}
    if as_json:
        return _print_json({**found, "not_judged": reason or None})
    typer.echo(f"{len(examples)} annotations of {len(tasks)} objects")
    if reason:
        typer.echo(f"not judged on objects and workers that were not trained on: {reason}")
    else:
        typer.echo(f"{len(rest)} of objects and workers that {len(learnt)} others do not have:")
        for name in [key for key in found if key not in ("annotations", "judged")]:
            typer.echo(f"  {name} {found[name]:.4g}")
    typer.echo(f"wrote {output}")


@app.command()
def run(
    objects: ObjectsArgument = Path("objects.json"),
    quality: Annotated[Path, typer.Option(help="What `pyseg annotate train` wrote.")] = Path(
        "quality.npz"
    ),
    annotators: AnnotatorsOption = "simulated",
    threshold: Annotated[float, typer.Option(help="Predicted Jaccard that is enough.")] = 0.83,
    rounds: Annotated[int, typer.Option(help="Annotations of an object at most.")] = 5,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the ledger.")] = Path(
        "annotated"
    ),
    as_json: JsonOption = False,
) -> None:
    """Ask for masks until each is predicted to be good enough; goes on where it was stopped.

    OUTPUT has ledger.jsonl, which only grows, results.json and masks.json (COCO).
    """
    from .engine import check_run, collect
    from .quality import QualityPredictor, jaccard
    from .tasks import read_tasks

    tasks = read_tasks(objects)
    people = _annotators(annotators, tasks, output)
    check_run(tasks, people, threshold, rounds)  # before the predictor learns
    predictor = QualityPredictor.load(quality)
    found = collect(
        tasks,
        people,
        predictor,
        output,
        threshold=threshold,
        rounds=rounds,
        track=_track("annotating"),
    )
    known = [
        jaccard(task.truth, found.chosen[task.id].submission.mask)
        for task in tasks
        if task.truth is not None and task.id in found.chosen
    ]
    summary: dict[str, Any] = {
        "objects": len(tasks),
        "accepted": len(found.accepted),
        "annotations": found.annotations,
        "per_object": found.annotations / len(tasks),
        "round": found.round,
        "waiting": len(found.waiting),
        "jaccard": sum(known) / len(known) if known else None,
    }
    if as_json:
        return _print_json(summary)
    typer.echo(
        f"{summary['accepted']} of {len(tasks)} objects accepted, {found.annotations} annotations, "
        f"{summary['per_object']:.2f} an object"
        + ("" if summary["jaccard"] is None else f"; mean Jaccard {summary['jaccard']:.4f}")
    )
    if found.waiting:
        typer.echo(
            f"round {found.round}: {len(found.waiting)} objects wait for annotators; run this "
            "again when they have drawn them"
        )
    typer.echo(f"wrote {output / 'results.json'} and {output / 'masks.json'}")


@app.command()
def status(
    output: Annotated[Path, typer.Argument(help="Folder of a run.")] = Path("annotated"),
    as_json: JsonOption = False,
) -> None:
    """What a ledger has, also while it is written: annotations by round and worker."""
    from collections import Counter, defaultdict

    from .engine import LEDGER
    from .ledger import read_ledger

    terms, records = read_ledger(output / LEDGER)
    rounds = Counter(record.round for record in records)
    accepted = {record.object for record in records if record.quality >= terms.threshold}
    people = defaultdict(list)
    for record in records:
        people[record.submission.worker].append(record.quality)
    summary = {
        "objects": terms.objects,
        "threshold": terms.threshold,
        "accepted": len(accepted),
        "annotations": len(records),
        "rounds": {str(k): rounds[k] for k in sorted(rounds)},
        "workers": {
            who: {"annotations": len(values), "quality": sum(values) / len(values)}
            for who, values in sorted(people.items())
        },
    }
    if as_json:
        return _print_json(summary)
    typer.echo(
        f"{len(accepted)} of {terms.objects} objects accepted at {terms.threshold}, "
        f"{len(records)} annotations; by round: "
        + ", ".join(f"{k}: {count}" for k, count in sorted(rounds.items()))
    )
    for who, values in sorted(people.items()):
        mean = sum(values) / len(values)
        typer.echo(f"  {who}: {len(values)}, mean predicted quality {mean:.3f}")


@app.command()
def studio(
    worker: Annotated[str, typer.Option(help="Who draws: names the folder of what is drawn.")],
    objects: ObjectsArgument = Path("objects.json"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path(
        "annotated"
    ),
    port: Annotated[int, typer.Option(help="0 = any that is free.")] = 8765,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
) -> None:
    """Draw the objects that wait, on pyseg's page; mark each as done.

    Then `pyseg annotate run --annotators "studio(workers='anna,ben')"` takes them up.
    """
    from pyseg.errors import PysegError, require
    from pyseg.files import read_json

    from .studio import blank, prepare
    from .tasks import read_tasks

    require("uvicorn", extra="studio")
    require("fastapi", extra="studio")
    from pyseg.studio import Desk
    from pyseg.studio.app import serve

    tasks = read_tasks(objects)
    results = read_json(output / "results.json", PysegError, {"waiting": [str]})
    folder = output / "studio"
    images, begun, count = prepare(tasks, results["waiting"], folder, worker)
    typer.echo(f"{count} objects wait for {worker}; each has a dot on it. Mark as done what is.")
    desk = Desk(images, folder / worker, spec=blank(), labels=begun, clicks="nano")
    serve(desk, port=port, browser=browser, announce=typer.echo)


@app.command()
def disagreement(
    images: Annotated[Path, typer.Argument(help="Folder of the photographs.")],
    annotators: Annotated[
        list[Path], typer.Option(help="Folder of one person's label maps; several times.")
    ],
    predictions: Annotated[
        Path | None, typer.Option(help="Folder of a model's label maps.")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="As of `pyseg score`.")] = None,
    shown: Annotated[int, typer.Option(help="Images on the page at most.")] = 24,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path(
        "disagreement"
    ),
) -> None:
    """A page of where people, and a model, disagree: images ranked for correction."""
    from .disagreement import write_page

    ranked = write_page(
        images,
        annotators,
        output,
        predictions=predictions,
        classes=classes,
        shown=shown,
        track=_track("comparing"),
    )
    for one in ranked[:5]:
        typer.echo(f"{one.name}: people differ on {one.people:.2%} of pixels")
    typer.echo(f"wrote {output / 'index.html'}")


def _annotators(text: str, tasks: Sequence[Task], output: Path) -> Annotators:
    from pyseg.errors import SpecError
    from pyseg.spec import parse

    from .annotators import annotators_of

    if text.partition("(")[0].strip() != "studio":
        return annotators_of(text)
    from .studio import StudioWorkers

    (stage,) = parse(text).stages
    workers = stage.options.get("workers")
    if set(stage.options) != {"workers"} or not isinstance(workers, str):
        raise SpecError(f"studio takes workers, names joined by commas, got {text!r}")
    return StudioWorkers(tasks, output / "studio", workers)


def _track(what: str) -> Any:
    """A progress bar on stderr, where that is a terminal."""

    def track(items: Sequence[Any]) -> Iterable[Any]:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        return progress.track(items, what, console=console, disable=not console.is_terminal)

    return track


def _print_json(value: Any) -> None:
    from pyseg.files import finite

    plain = {k: float(v) if hasattr(v, "item") else v for k, v in value.items()}
    typer.echo(json.dumps(finite(plain), indent=1, allow_nan=False))
