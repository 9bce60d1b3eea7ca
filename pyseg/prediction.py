"""`predict`: a pipeline over files, folders and globs, with results as files."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import ImageError, PysegError
from .files import IMAGE_SUFFIXES, read_json, write_json
from .image import write_image, write_instances, write_labels, write_segments
from .pipeline import Pipeline
from .types import VOID

MANIFEST = "pyseg.json"
OVERLAYS, SEGMENTS, INSTANCES = "overlays", "segments", "instances"


@dataclass
class Predictions:
    """The summary of a `predict` run."""

    output_dir: Path
    written: list[Path] = field(default_factory=list)  # label maps of this run
    skipped: list[Path] = field(default_factory=list)  # label maps that were there already
    failed: dict[str, str] = field(default_factory=dict)  # path as given -> reason

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "output_dir": str(self.output_dir),
            "written": [str(path) for path in self.written],
            "skipped": [str(path) for path in self.skipped],
            "failed": self.failed,
        }


def predict(
    pipeline: Pipeline,
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    overlay: bool = False,
    overwrite: bool = False,
    track: Callable[[Sequence[tuple[Path, Path]]], Iterable[tuple[Path, Path]]] = iter,
) -> Predictions:
    """Segments image files and writes one indexed PNG each.

    An image that cannot be read, or is too large for the memory, is reported in the summary, and
    the others go on. A run that was interrupted is continued by the same call: finished results are
    skipped, and none is ever half-written. ``pyseg.json`` in the output directory names the
    pipeline and its classes, so that results of two pipelines do not mix unnoticed.

    Args:
        pipeline: from `pyseg.build` or `pyseg.load`.
        paths: image files, folders (searched recursively for the usual image suffixes) and glob
            patterns (``**`` crosses folders).
        output_dir: made if absent. ``a/b/c.jpg`` found in folder ``a`` becomes ``b/c.png`` here, a
            file given by itself or by a glob ``c.png``.
            Where the pipeline finds them, ``segments/b/c.png`` and ``.json`` have the panoptic
            segments (`pyseg.image.write_segments`) and ``instances/b/c.json`` the instances
            (`write_instances`).
        overlay: also write ``overlays/b/c.png``, the image with the labels painted over it.
        overwrite: compute results again that exist.
        track: wraps the sequence of (image, label map) paths, for a progress bar such as
            ``rich.progress.track``.

    Raises:
        PysegError: two images would have the same result, a result would replace its own image, or
            ``output_dir`` holds the results of another pipeline or files that are not ours.

    Example:
        >>> summary = predict(pyseg.build("streetnet+crf"), ["photos"], "labels", overlay=True)
        >>> summary.failed
        {}
    """
    output = Path(output_dir)
    summary = Predictions(output)
    jobs = _jobs([paths] if isinstance(paths, (str, os.PathLike)) else paths, summary)
    _claim(output, pipeline, [target for _, target in jobs], overwrite)
    for source, target in track(jobs):
        painted = output / OVERLAYS / target.relative_to(output)
        if not overwrite and target.exists() and (painted.exists() or not overlay):
            summary.skipped.append(target)
            continue
        try:
            result = pipeline(source)
        except ImageError as error:
            summary.failed[str(source)] = str(error)
            continue
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            summary.failed[str(source)] = f"image {str(source)!r} is too large for the memory"
            continue
        # All before the labels, whose presence says that all is done.
        if overlay:
            write_image(_ready(painted), result.overlay())
        if result.segments is not None:
            own = _ready(output / SEGMENTS / target.relative_to(output))
            write_segments(own, result.segments)
        if result.instances is not None:
            own = _ready(output / INSTANCES / target.relative_to(output).with_suffix(".json"))
            write_instances(own, result.instances)
        target.parent.mkdir(parents=True, exist_ok=True)
        summary.written.append(write_labels(target, result.labels, result.palette))
    return summary


def _ready(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _is_out_of_memory(error: Exception) -> bool:
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "can't allocate memory" in str(error)
    )


def _jobs(paths: Iterable[str | os.PathLike[str]], summary: Predictions) -> list[tuple[Path, Path]]:
    """Pairs of image and label map; paths that lead nowhere become failures of the summary."""
    output = summary.output_dir
    own = output.resolve()
    jobs: dict[Path, Path] = {}  # label map -> image
    for given in paths:
        text = os.fspath(given)
        path = Path(text)
        if path.is_dir():
            found = [(file, file.relative_to(path)) for file in _images_below(path, own)]
            problem = f"holds no image file ({', '.join(IMAGE_SUFFIXES)})"
        elif path.exists() or not glob.has_magic(text):
            found = [(path, Path(path.name))]  # absent ones are reported when they are read
            problem = ""
        else:
            matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
            files = [m for m in matches if m.is_file() and own not in m.resolve().parents]
            found = [(file, Path(file.name)) for file in files]
            problem = "matches no file"
        if not found:
            summary.failed[text] = f"{text!r} {problem}; check the path"
        for file, relative in found:
            target = output / relative.with_suffix(".png")
            if target.resolve() == file.resolve():
                raise PysegError(
                    f"the label map of {file} would replace it; give another output directory"
                )
            other = jobs.setdefault(target, file)
            if other.resolve() != file.resolve():
                raise PysegError(
                    f"{other} and {file} would both be written to {target}; give them "
                    "in separate calls with different output directories"
                )
    return [(source, target) for target, source in jobs.items()]


def _images_below(folder: Path, own: Path) -> list[Path]:
    """Image files in a folder and its subfolders, sorted, without hidden ones and our own."""
    if folder.resolve() == own:
        raise PysegError(
            f"output_dir {str(folder)!r} is the folder of the images, and results "
            "would mix with them; give another directory"
        )
    found = []
    for base, folders, files in os.walk(folder):
        here = Path(base)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (here / name).resolve() != own
        )
        found += [
            here / name
            for name in sorted(files)
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    return found


def _claim(output: Path, pipeline: Pipeline, targets: Iterable[Path], overwrite: bool) -> None:
    """Makes the output directory this pipeline's, unless what it holds is not."""
    manifest = output / MANIFEST
    mine = {"spec": str(pipeline), "classes": list(pipeline.classes), "void": VOID}
    if manifest.is_file() and not overwrite:
        theirs = read_json(manifest)
        if theirs != mine:
            other = theirs.get("spec") if isinstance(theirs, dict) else theirs
            raise PysegError(
                f"output_dir {str(output)!r} holds results of another pipeline, {other!r}; give "
                "another directory, or overwrite=True to replace them"
            )
    elif not overwrite and (taken := next((t for t in targets if t.exists()), None)):
        raise PysegError(
            f"{taken} exists and is no earlier result of pyseg; give another "
            "output directory, or overwrite=True to replace it"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise PysegError(
            f"output_dir {str(output)!r} is a file or lies below one; give a directory"
        ) from error
    write_json(manifest, mine)


__all__ = ["Predictions", "predict"]
