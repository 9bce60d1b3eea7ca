"""ICORD, the loop (Sameki, Gentil, Mays, Guo, Betke: CVPR Workshops 2016).

1. Every object is annotated once.
2. Masks, and how they were drawn, are kept.
3. Features of each are computed: geometry, intensity, boundary, behaviour of the worker.
4. A regressor predicts each mask's quality, its Jaccard index with the unknown truth.
5. What is predicted at the threshold or above is accepted.
6. The other objects go to somebody else, up to a number of rounds.
7. Of those that are never accepted, the mask of the best predicted quality is taken.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pyseg.errors import PysegError
from pyseg.files import make_folder, some, write_json

from .annotators import Annotators, Submission
from .ledger import Ledger, Record, Terms
from .tasks import Task, check_ids

THRESHOLD, ROUNDS = 0.83, 5
LEDGER = "ledger.jsonl"


class Quality(Protocol):
    """Predicts how good a mask is; `pyseg_annotate.quality.QualityPredictor` is one."""

    fingerprint: str  # tells predictors apart

    def predict(self, task: Task, submission: Submission) -> float:
        """Jaccard index with the unknown truth, 0 to 1."""
        ...


@dataclass(frozen=True, eq=False)
class Collection:
    """What a run of the loop has come to."""

    chosen: dict[str, Record]  # by object: the best that it has, by predicted quality
    accepted: frozenset[str]
    waiting: tuple[str, ...]  # objects that somebody must draw before the loop goes on
    round: int  # that it is in, or ended in
    annotations: int
    spent: dict[str, int] = field(repr=False)  # annotations of each object

    @property
    def done(self) -> bool:
        """Whether nothing is left to ask for."""
        return not self.waiting


def collect(
    tasks: Sequence[Task],
    annotators: Annotators,
    quality: Quality,
    output: str | os.PathLike[str],
    *,
    threshold: float = THRESHOLD,
    rounds: int = ROUNDS,
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Collection:
    """Runs the loop, or goes on with it: ``output`` has the ledger, and a kill loses nothing.

    Where annotators cannot answer yet, objects wait: the loop stays in that round until all have,
    in this call or a later one.

    Args:
        tasks: the objects.
        annotators: who draws them.
        quality: predicts how good a mask is.
        output: folder of ``ledger.jsonl`` and ``results.json``, made if absent.
        threshold: τ, the predicted quality from which a mask is accepted, above 0 and up to 1.
        rounds: N, the annotations of an object at most.
        track: wraps the sequence of a round's objects, for a progress bar.

    Returns:
        Masks and counts; `write_results` wrote them to ``output``, too.

    Raises:
        PysegError: no object, a threshold or number of rounds out of range, fewer annotators than
            rounds.
        LedgerError: the ledger in ``output`` contradicts this collection or itself.

    Example:
        >>> found = collect(tasks, SimulatedWorkers(20), predictor, "out", threshold=0.83)
        >>> found.annotations / len(tasks)
    """
    check_run(tasks, annotators, threshold, rounds)
    folder = make_folder(output, "output")
    terms = Terms.of(tasks, threshold, rounds, quality.fingerprint)
    with Ledger(folder / LEDGER, tasks, terms) as ledger:
        waiting: list[str] = []
        number = 1
        for number in range(1, rounds + 1):
            flagged = [
                task
                for task in tasks
                if len(ledger.of[task.id]) == number - 1 and not ledger.accepted(task.id)
            ]
            for task in track(flagged):
                taken = [record.submission.worker for record in ledger.of[task.id]]
                submission = annotators.annotate(task, taken)
                if submission is None:
                    waiting.append(task.id)
                    continue
                predicted = float(quality.predict(task, submission))
                ledger.append(Record(task.id, number, submission, predicted))
            if waiting or not _flagged(ledger, number):
                break
        found = _collection(ledger, waiting, number)
    write_results(found, tasks, folder, terms)
    return found


def check_run(tasks: Sequence[Task], annotators: Annotators, threshold: float, rounds: int) -> None:
    """Raises PysegError where a run cannot be."""
    if not tasks:
        raise PysegError("tasks: there is no object to annotate")
    check_ids(tasks)
    if not (math.isfinite(threshold) and 0 < threshold <= 1):
        raise PysegError(
            f"threshold must be a Jaccard index above 0 and up to 1, such as {THRESHOLD}, got "
            f"{threshold}"
        )
    if rounds < 1:
        raise PysegError(f"rounds must be 1 or more, got {rounds}")
    if len(annotators.workers) < rounds:
        raise PysegError(
            f"rounds {rounds} need as many annotators, since nobody draws an object twice, and "
            f"there are {len(annotators.workers)} ({some(annotators.workers) or 'none'}); get "
            f"more, or give rounds {max(1, len(annotators.workers))}"
        )


def _flagged(ledger: Ledger, number: int) -> bool:
    """Whether this round left objects to the next, or had when it was held."""
    return any(
        len(records) >= number and not ledger.accepted(id) for id, records in ledger.of.items()
    )


def best(records: Sequence[Record]) -> Record:
    """That of the highest predicted quality; the earliest of equals."""
    return max(records, key=lambda record: (record.quality, -record.round))


def _collection(ledger: Ledger, waiting: Sequence[str], number: int) -> Collection:
    spent = {id: len(records) for id, records in ledger.of.items()}
    return Collection(
        {id: best(records) for id, records in ledger.of.items() if records},
        frozenset(id for id in ledger.of if ledger.accepted(id)),
        tuple(waiting),
        number,
        sum(spent.values()),
        spent,
    )


def write_results(
    found: Collection, tasks: Sequence[Task], folder: Path, terms: Terms
) -> tuple[Path, Path]:
    """Writes ``results.json``, numbers of every object, and ``masks.json``, COCO's instances."""
    from pyseg.formats import Region
    from pyseg.formats.annotation import Annotation, Source, image_size
    from pyseg.formats.table import find_format

    entries = []
    for task in tasks:
        record = found.chosen.get(task.id)
        if record is None:
            continue
        entries.append(
            {
                "object": task.id,
                "label": task.label,
                "accepted": task.id in found.accepted,
                "annotations": found.spent[task.id],
                "round": record.round,
                "worker": record.submission.worker,
                "quality": round(record.quality, 6),
            }
        )
    summary = {
        "threshold": terms.threshold,
        "rounds": terms.rounds,
        "objects": len(tasks),
        "accepted": len(found.accepted),
        "annotations": found.annotations,
        "waiting": list(found.waiting),
        "results": entries,
    }
    classes = tuple(dict.fromkeys(task.label for task in tasks))
    by_image: dict[Path, list[Task]] = {}
    for task in tasks:
        if task.id in found.chosen:
            by_image.setdefault(task.image, []).append(task)
    names = _names(list(by_image))
    source = Source(classes, tuple(names.values()), lambda name: annotations[name])
    annotations: dict[str, Annotation] = {}
    for image, parts in by_image.items():
        size = image_size(image)
        regions = []
        for task in parts:
            record = found.chosen[task.id]
            region = Region.cut(
                classes.index(task.label), record.submission.mask, score=record.quality
            )
            if region.area:
                left, top = region.left + task.box[0], region.top + task.box[1]
                regions.append(Region(region.label, region.mask, left, top, score=region.score))
        name = names[image]
        annotations[name] = Annotation(name, size, tuple(regions), image.name)
    form = find_format("coco")
    assert form.writer is not None
    masks = folder / "masks.json"
    writer = form.writer(masks, source)
    writer.finish([writer.write(annotations[name]) for name in source.names])
    return write_json(folder / "results.json", summary), masks


def _names(images: Sequence[Path]) -> dict[Path, str]:
    """Stems, or where two are equal with their folder."""
    stems = [image.stem for image in images]
    return {
        image: image.stem if stems.count(image.stem) == 1 else f"{image.parent.name}/{image.stem}"
        for image in images
    }
