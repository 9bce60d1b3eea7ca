"""What a training tells while it runs: a bar, or lines with the time left; a table; events."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import require
from ..files import write_text
from ..progress import NotebookBar, in_notebook

LINES_EVERY = 30.0  # seconds between lines where there is no terminal
UNSHOWN = ("epoch", "learning_rate", "precision", "seconds")


class Display:
    """Progress: a bar on a terminal or in a notebook, else a line on stderr now and then.

    Args:
        what: text before the bar.
        epochs: in all.
        steps: of an epoch.
        first: epochs that are done already.
        wanted: False = nothing is shown.
    """

    def __init__(self, what: str, epochs: int, steps: int, first: int, wanted: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.epochs, self.first = epochs, first
        self.loss = math.nan
        self.notebook = None
        if wanted and in_notebook():
            self.notebook = NotebookBar(what, epochs * steps, first * steps)
        self.lines = wanted and not console.is_terminal and self.notebook is None
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (wanted and console.is_terminal),
        )
        self.task = self.bar.add_task(
            what, total=epochs * steps, completed=first * steps, loss=math.nan
        )
        self.start = self.told = time.monotonic()

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, loss: float) -> None:
        """The mean loss of the epoch so far."""
        self.loss = loss
        self.bar.update(self.task, loss=loss)

    def advance(self) -> None:
        """One step more."""
        self.bar.update(self.task, advance=1)
        if self.notebook is not None:
            self.notebook.advance(f"loss {self.loss:.3f}")

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """An epoch is done: its entry of the log."""
        now = time.monotonic()
        if not self.lines or now - self.told < LINES_EVERY:
            return
        self.told = now
        done = entry["epoch"]
        left = (now - self.start) / (done - self.first) * (self.epochs - done)
        numbers = [
            f"{name} {value:.5g}"
            for name, value in entry.items()
            if isinstance(value, (int, float)) and name not in UNSHOWN
        ]
        words = [f"epoch {done}/{self.epochs}", *numbers, f"{duration(left)} left"]
        print(", ".join(words), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time in words, such as ``2 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of the log with ``iou/road`` in the place of a dict ``iou``."""
    found: dict[str, Any] = {}
    for name, value in entry.items():
        if isinstance(value, Mapping):
            found.update((f"{name}/{key}", item) for key, item in flat(value).items())
        else:
            found[name] = value
    return found


def write_csv(path: Path, log: Sequence[Mapping[str, Any]]) -> None:
    """The log as a table, whole or not at all; a row per epoch, empty where there is no value."""
    rows = [flat(entry) for entry in log]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


class Events:
    """TensorBoard's files of a run."""

    def __init__(self, writer: Any) -> None:
        self.add_scalar = writer.add_scalar  # (name, value, step)
        self._flush = writer.flush

    def add_epoch(self, entry: Mapping[str, Any], step: int) -> None:
        """The numbers of an entry of the log, at the step where its epoch ends."""
        for name, value in flat(entry).items():
            if isinstance(value, (int, float)) and name != "epoch":
                self.add_scalar(f"epoch/{name}", value, step)
        self._flush()


@contextlib.contextmanager
def tensorboard_writer(output: Path, step: int) -> Iterator[Events]:
    """Event files below ``output``; what an earlier run wrote of ``step`` and later is void.

    Raises:
        ImportError: tensorboard is not installed; the message names the remedy.
    """
    require("tensorboard", extra="tensorboard")
    writer = require("torch.utils.tensorboard").SummaryWriter(
        str(output / "tensorboard"), purge_step=step
    )
    try:
        yield Events(writer)
    finally:
        writer.close()
