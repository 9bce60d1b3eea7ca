"""What has been annotated, as a file of lines that only grows.

The first line says what the collection is of; each other one is a mask with its predicted quality,
written to the disk before the next is asked for. What follows from these, such as which objects are
accepted, is not written: so nothing can contradict it. A line without its end is what a killed
process was writing: it is taken for not there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pyseg.errors import PysegError
from pyseg.files import check_json, take_lock
from pyseg.formats import decode_rle, encode_rle

from .annotators import Submission
from .tasks import Task, fingerprint

VERSION = 1
_BEGIN = {
    "ledger": int,
    "objects": int,
    "fingerprint": str,
    "threshold": float,
    "rounds": int,
    "quality": str,
}
_RECORD = {
    "object": str,
    "round": int,
    "worker": str,
    "quality": float,
    "mask": {"size": [int], "counts": str},
    "clicks?": object,
    "seconds?": object,
}


class LedgerError(PysegError, ValueError):
    """A ledger is damaged, contradicts itself, or is of another collection."""


@dataclass(frozen=True, eq=False)
class Record:
    """One annotation of one object."""

    object: str  # id of the task
    round: int  # from 1 on
    submission: Submission
    quality: float  # predicted Jaccard, 0 to 1


@dataclass(frozen=True)
class Terms:
    """What a collection is: with other terms its ledger is not continued."""

    fingerprint: str  # of the tasks
    objects: int
    threshold: float
    rounds: int
    quality: str  # fingerprint of the predictor

    @classmethod
    def of(cls, tasks: Sequence[Task], threshold: float, rounds: int, quality: str) -> Terms:
        return cls(fingerprint(tasks), len(tasks), threshold, rounds, quality)


class Ledger:
    """The records of a collection, on disk.

    Args:
        path: the file; made if absent.
        tasks: what is annotated.
        terms: see `Terms`.

    Raises:
        LedgerError: the file is of another collection, damaged, or contradicts itself; the message
            names the line. It is left as it is.
        PysegError: another process has it open, or its folder is absent.
    """

    def __init__(self, path: str | os.PathLike[str], tasks: Sequence[Task], terms: Terms) -> None:
        self.path = Path(path)
        self.terms = terms
        self._tasks = {task.id: task for task in tasks}
        self.of: dict[str, list[Record]] = {task.id: [] for task in tasks}
        if not self.path.parent.is_dir():
            raise PysegError(f"ledger: there is no folder {str(self.path.parent)!r}; make it first")
        release = take_lock(self.path.with_name(f".{self.path.name}.lock"))
        if release is None:
            raise PysegError(
                f"ledger {str(path)!r} is open in another process; wait for it or stop it"
            )
        self._release: Callable[[], None] | None = release
        try:
            whole = self._load() if self.path.exists() else 0
            self._file = open(self.path, "ab")  # noqa: SIM115  (closed by close)
            if self._file.tell() != whole:
                self._file.truncate(whole)  # a line that a killed process did not finish
            if whole == 0:
                self._write({"ledger": VERSION, **vars(terms)})
        except BaseException:
            release()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets others have it."""
        if self._release is not None:
            self._file.close()
            self._release()
            self._release = None

    def accepted(self, id: str) -> bool:
        """Whether an object has a mask that is good enough."""
        return any(record.quality >= self.terms.threshold for record in self.of[id])

    def append(self, record: Record) -> None:
        """Writes a record; it is on disk when this returns.

        Raises:
            LedgerError: it contradicts what is there.
        """
        self._check(record, "the new record")
        submission = record.submission
        self._write(
            {
                "object": record.object,
                "round": record.round,
                "worker": submission.worker,
                "quality": record.quality,
                "clicks": submission.clicks,
                "seconds": submission.seconds,
                "mask": encode_rle(submission.mask),
            }
        )
        self.of[record.object].append(record)

    def _write(self, value: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(value, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _load(self) -> int:
        """Reads all; returns the bytes of whole lines."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, value in _lines(content[:whole], self.path):
            where = f"{str(self.path)!r}, line {number}"
            if number == 1:
                self._check_terms(value, where)
                continue
            record = _record(value, where)
            self._check(record, where)
            self.of[record.object].append(record)
        return whole

    def _check_terms(self, value: Any, where: str) -> None:
        terms = read_terms(value, where)
        for name, what, remedy in (
            ("objects", "objects", "give the same objects"),
            ("fingerprint", "the objects", "give the same objects"),
            ("threshold", "threshold", f"give threshold {terms.threshold}"),
            ("rounds", "rounds", f"give rounds {terms.rounds}"),
            ("quality", "the quality predictor", "give the same predictor"),
        ):
            old, new = getattr(terms, name), getattr(self.terms, name)
            if old != new:
                raise LedgerError(
                    f"{where}: it was begun with another value for {what}, {old}, got {new}; "
                    f"{remedy}, or another output to begin anew"
                )

    def _check(self, record: Record, where: str) -> None:
        task = self._tasks.get(record.object)
        if task is None:
            raise LedgerError(f"{where}: there is no object {record.object!r}")
        before = self.of[record.object]
        mask = record.submission.mask
        wrong = None
        if record.round != len(before) + 1:
            wrong = f"is of round {record.round}, where {len(before) + 1} comes next"
        elif record.round > self.terms.rounds:
            wrong = f"is of round {record.round}, of {self.terms.rounds}"
        elif self.accepted(record.object):
            wrong = "was accepted before, and nobody is asked again then"
        elif record.submission.worker in {r.submission.worker for r in before}:
            wrong = f"was drawn by {record.submission.worker!r} before"
        elif mask.shape != task.size:
            wrong = f"has a mask of {list(mask.shape)}, its window is {list(task.size)}"
        elif not (math.isfinite(record.quality) and 0 <= record.quality <= 1):
            wrong = f"has the quality {record.quality}, which is not in 0..1"
        if wrong is not None:
            raise LedgerError(
                f"{where}: the ledger contradicts itself, object {record.object!r} {wrong}; "
                "nothing was changed: remove what does not belong there, or begin anew in another "
                "output"
            )


def read_terms(value: Any, where: str) -> Terms:
    """The first line of a ledger."""
    check_json(value, _BEGIN, where, LedgerError)
    if value["ledger"] != VERSION:
        raise LedgerError(f"{where}: a ledger of version {value['ledger']}, this reads {VERSION}")
    return Terms(**{key: value[key] for key in _BEGIN if key != "ledger"})


def read_ledger(path: str | os.PathLike[str]) -> tuple[Terms, list[Record]]:
    """A ledger as it stands, also while it is written; without the tasks, less is checked.

    Raises:
        LedgerError: there is none, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise LedgerError(f"there is no ledger {str(path)!r}; `pyseg annotate run` writes it")
    content = path.read_bytes()
    lines = list(_lines(content[: content.rfind(b"\n") + 1], path))
    if not lines:
        raise LedgerError(f"{str(path)!r} is empty")
    terms = read_terms(lines[0][1], f"{str(path)!r}, line 1")
    return terms, [_record(value, f"{str(path)!r}, line {number}") for number, value in lines[1:]]


def _lines(content: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(content.splitlines(), 1):
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise LedgerError(
                f"{str(path)!r}, line {number} is no JSON ({error}); the file was changed by "
                "something else, restore it from a copy, or begin anew in another output"
            ) from error


def _record(value: Any, where: str) -> Record:
    check_json(value, _RECORD, where, LedgerError)
    clicks, seconds = value.get("clicks"), value.get("seconds")
    check_json(clicks, (int, type(None)) if clicks is not None else object, where, LedgerError)
    check_json(seconds, float if seconds is not None else object, where, LedgerError)
    mask: np.ndarray = decode_rle(value["mask"]).numpy()
    submission = Submission(mask, value["worker"], clicks, seconds)
    return Record(value["object"], value["round"], submission, float(value["quality"]))
