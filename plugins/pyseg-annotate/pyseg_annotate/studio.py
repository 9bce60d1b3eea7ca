"""People at pyseg's studio as annotators: the objects that wait, as crops to be drawn.

Everybody has a folder of his own below one that all share, ``FOLDER/NAME``, as `pyseg studio` keeps
it: ``labels/N.png`` and ``.studio/N.json``, which says whether the crop is done. N is the object's
number in the list of objects. A crop begins with a dot on the object that is meant.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyseg.errors import PysegError, SpecError
from pyseg.files import make_folder, read_json, replacing
from pyseg.image import read_labels, write_image, write_labels

from .annotators import Submission
from .tasks import Task

CLASSES = ("background", "object")
DOT = 2  # pixels, radius of the mark on the object


class StudioWorkers:
    """What people have drawn on the page, of those crops that they have marked as done.

    Args:
        tasks: the objects.
        folder: that holds everybody's.
        workers: names, joined by commas; they are the folders' names.

    Raises:
        SpecError: no name, or one that is no name of a folder.
    """

    def __init__(self, tasks: Sequence[Task], folder: str | os.PathLike[str], workers: str) -> None:
        self.folder = Path(folder)
        names = [name.strip() for name in workers.split(",")]
        for name in names:
            if not name or name != Path(name).name or name.startswith("."):
                raise SpecError(f"workers must be names joined by commas, got {workers!r}")
        self.workers = tuple(dict.fromkeys(names))
        self._number = {task.id: number_of(k) for k, task in enumerate(tasks)}

    def annotate(self, task: Task, taken: Sequence[str]) -> Submission | None:
        for worker in self.workers:
            if worker not in taken and (mask := self.drawn(task, worker)) is not None:
                return Submission(mask, worker)
        return None

    def drawn(self, task: Task, worker: str) -> np.ndarray | None:
        """The mask of a crop that is done, [h, w] bool; None of others.

        Raises:
            PysegError: the map is of another size than the task's window.
        """
        name = self._number[task.id]
        note = self.folder / worker / ".studio" / f"{name}.json"
        path = self.folder / worker / "labels" / f"{name}.png"
        if not (note.is_file() and path.is_file()):
            return None
        if not read_json(note, PysegError, {"done?": bool}).get("done"):
            return None
        mask: np.ndarray = (read_labels(path) == 1).numpy()
        if mask.shape != task.size:
            raise PysegError(
                f"{str(path)!r} is {list(mask.shape)}, the window of {task.id!r} "
                f"{list(task.size)}: it was drawn for another list of objects; give that, or "
                "another folder"
            )
        return mask


def number_of(index: int) -> str:
    """Name of a task's files."""
    return f"{index:06d}"


def prepare(
    tasks: Sequence[Task], waiting: Sequence[str], folder: str | os.PathLike[str], worker: str
) -> tuple[Path, Path, int]:
    """Writes the crops that one person is to draw now.

    Args:
        tasks: the objects.
        waiting: ids of those that somebody must draw.
        folder: that holds everybody's.
        worker: who.

    Returns:
        The folders of crops and of maps to begin with, and how many there are.

    Raises:
        PysegError: nothing is left for this person.
    """
    people = StudioWorkers(tasks, folder, worker)
    chosen = [
        (number_of(k), task)
        for k, task in enumerate(tasks)
        if task.id in set(waiting) and people.drawn(task, worker) is None
    ]
    if not chosen:
        raise PysegError(
            f"nothing waits for {worker!r}: `pyseg annotate run` says what does, and takes up "
            "what was drawn"
        )
    home = make_folder(Path(folder) / worker, "folder")
    with replacing(home / "todo") as part:
        for name in ("images", "begun"):
            (part / name).mkdir(parents=True)
        for number, task in chosen:
            write_image(part / "images" / f"{number}.png", task.crop().copy())
            y, x = np.ogrid[: task.size[0], : task.size[1]]
            dot = (x - task.point[0]) ** 2 + (y - task.point[1]) ** 2 <= DOT**2
            write_labels(part / "begun" / f"{number}.png", dot.astype(np.uint8))
    return home / "todo" / "images", home / "todo" / "begun", len(chosen)


def blank() -> Any:
    """A pipeline that says background everywhere: nothing suggests a mask to anybody."""
    import torch

    import pyseg

    class Blank(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = images.new_zeros(images.shape[0], 2, *images.shape[2:])
            logits[:, 0] = 1
            return logits

    return pyseg.build(Blank(), classes=CLASSES, palette=((0, 0, 0), (230, 60, 60)))
