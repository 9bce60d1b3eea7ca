"""`predict`: a pipeline over files, folders and globs, with results as files.

Worker threads take the images in their order; each decodes one, segments it and writes its results,
so that all three overlap and no image waits in memory. On the CPU that is faster than one image
after the other with torch's threads in every operator, which leaves decoding, packing and all
small operators to one core (``benchmarks/pipeline.py``).
"""

from __future__ import annotations

import ctypes
import glob
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ImageError, PysegError
from .files import (
    IMAGE_SUFFIXES,
    make_folder,
    read_json,
    remove_abandoned,
    take_lock,
    write_json,
)
from .formats import write_confidence, write_instances, write_segments, write_uncertainty
from .image import default_palette, read_image, write_image, write_labels
from .pipeline import Pipeline, compose
from .progress import notebook_bar
from .regions import CERTAIN, void_label
from .types import VOID, Segmentation

Source = str | Path  # of an image: a path, or the URL of one

MANIFEST = "pyseg.json"
OVERLAYS, SEGMENTS, INSTANCES, UNCERTAINTY = "overlays", "segments", "instances", "uncertainty"
CONFIDENCE = "confidence"

_WORKERS = 4  # at most, by default: each may have an image in the memory
_BATCH = 8  # images, by default and on accelerators; on a CPU batches gain nothing (measured)
_SHARED_PIXELS = 4 << 20  # that are segmented at a time; one larger image is, with all threads
_LARGE_PIXELS = 8 << 20  # from here on it is asked whether the memory suffices
_PROBE_PIXELS = 1 << 20  # of the reduced image whose need is measured


@dataclass
class Predictions:
    """The summary of a `predict` run."""

    output_dir: Path
    written: list[Path] = field(default_factory=list)  # label maps of this run
    skipped: list[Path] = field(default_factory=list)  # label maps that were there already
    failed: dict[str, str] = field(default_factory=dict)  # path as given -> reason
    ignored: list[Path] = field(default_factory=list)  # in the folders, of no image suffix

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "output_dir": str(self.output_dir),
            "written": [str(path) for path in self.written],
            "skipped": [str(path) for path in self.skipped],
            "failed": self.failed,
            "ignored": [str(path) for path in self.ignored],
        }


def predict(
    pipeline: Pipeline,
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    overlay: bool = False,
    overwrite: bool = False,
    keep_suffix: bool = False,
    workers: int | None = None,
    batch_size: int | None = None,
    track: Callable[[Sequence[tuple[Source, Path]]], Iterable[tuple[Source, Path]]] = notebook_bar,
) -> Predictions:
    """Segments image files and writes one indexed PNG each.

    An image that cannot be read, or is too large for the memory, is reported in the summary, and
    the others go on. A run that was interrupted is continued by the same call: finished results are
    skipped, and none is ever half-written. ``pyseg.json``, written with the first result, names the
    pipeline and its classes, so that results of two pipelines do not mix unnoticed.

    Images of more than 8 megapixels for which the memory will probably not suffice are announced by
    a ``UserWarning`` with an estimate, before the attempt.

    Args:
        pipeline: from `pyseg.build` or `pyseg.load`.
        paths: image files, folders (searched recursively for the usual image suffixes; other files
            are named in the summary), glob patterns (``**`` crosses folders) and ``@list.txt``, a
            text file with the path of an image on every line.
        output_dir: made if absent. ``a/b/c.jpg`` found in folder ``a`` becomes ``b/c.png`` here, a
            file given by itself ``c.png``, one of a list ``a/b/c.png``. A glob keeps the folders
            that it leaves open: ``a/**/*.jpg`` gives ``b/c.png``, too.
            Where the pipeline finds them, ``segments/b/c.png`` and ``.json`` have the panoptic
            segments (`pyseg.image.write_segments`), ``instances/b/c.json`` the instances
            (`write_instances`) and ``uncertainty/b/c.png`` the model's uncertainty
            (`write_uncertainty`).
        overlay: also write ``overlays/b/c.png``, the image with the labels painted over it.
        overwrite: compute results again that exist.
        keep_suffix: ``c.jpg`` becomes ``c.jpg.png``, for folders in which ``c.jpg`` and ``c.png``
            are different images.
        workers: threads, each with an image or a batch of its own, that share torch's threads; the
            pipeline's stages are then called from several threads at once. None = at most 4; 1 for
            a stage that keeps state in its calls.
        batch_size: images that a worker gives to the pipeline at a time. None = 1 on a CPU, where
            more are no faster, else 8.
        track: wraps the sequence of (image, label map) paths, for a progress bar such as
            ``rich.progress.track``.

    Raises:
        PysegError: ``paths`` is empty, another run is writing to ``output_dir``, several images
            would have the same result, a result would replace its own image, or ``output_dir``
            holds the results of another pipeline or files that are not ours.
        ValueError: ``workers`` or ``batch_size`` below 1.

    Example:
        >>> summary = predict(pyseg.build("streetnet+crf"), ["photos"], "labels", overlay=True)
        >>> summary.failed
        {}
    """
    return _predict(
        pipeline,
        paths,
        Path(output_dir),
        describe(pipeline),
        overlay=overlay,
        overwrite=overwrite,
        keep_suffix=keep_suffix,
        workers=workers,
        batch_size=batch_size,
        track=track,
    )


def label(
    pipeline: Pipeline,
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    min_confidence: float = 0.9,
    confidence: bool = False,
    overwrite: bool = False,
    keep_suffix: bool = False,
    workers: int | None = None,
    batch_size: int | None = None,
    track: Callable[[Sequence[tuple[Source, Path]]], Iterable[tuple[Source, Path]]] = notebook_bar,
) -> Predictions:
    """Labels images for a training: one indexed PNG each, void where the pipeline is unsure.

    As `predict`, and continued by the same call in the same way. ``classes.json`` beside the labels
    has the classes: the data set ``folder`` takes both, as ``labels`` and ``classes``.

    Confidence is the probability of the most probable class; without logits 1 minus the model's
    uncertainty, as of ``grounded_sam``, or the score of the segment or instance that has the pixel.

    Args:
        pipeline: from `pyseg.build` or `pyseg.load`.
        paths: as `predict` takes them.
        output_dir: made if absent; results lie as `predict` has them.
        min_confidence: pixels below become void.
        confidence: also write ``confidence/b/c.png``, 8-bit grey, 255 being 1.
        overwrite: compute results again that exist.
        keep_suffix: ``c.jpg`` becomes ``c.jpg.png``.
        workers: as of `predict`.
        batch_size: as of `predict`.
        track: as of `predict`.

    Raises:
        PysegError: as of `predict`; or the pipeline gives labels without any confidence.
        ValueError: ``min_confidence`` outside 0..1, ``workers`` or ``batch_size`` below 1.

    Example:
        >>> pipeline = pyseg.build("grounded_sam(classes=('car', 'person', 'tree'))")
        >>> label(pipeline, "photos", "labels", min_confidence=0.35)
        >>> data = pyseg.datasets.create(
        ...     "folder", images="photos", labels="labels", classes="labels/classes.json"
        ... )
    """
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence must be 0 to 1, got {min_confidence}")
    summary = _predict(
        compose(pipeline, _Certain(min_confidence)),
        paths,
        Path(output_dir),
        {**describe(pipeline), "min_confidence": min_confidence},
        confidence=confidence,
        overwrite=overwrite,
        keep_suffix=keep_suffix,
        workers=workers,
        batch_size=batch_size,
        track=track,
    )
    if summary.written or summary.skipped:
        palette = getattr(pipeline.model, "palette", None) or default_palette(len(pipeline.classes))
        entries = [
            {"id": k, "name": name, "color": list(colour)}
            for k, (name, colour) in enumerate(zip(pipeline.classes, palette, strict=True))
        ]
        void = VOID if len(entries) <= VOID else 65535  # as `Segmentation.save` writes it
        classes = {"classes": entries, "ignore_index": void}
        write_json(summary.output_dir / "classes.json", classes)
    return summary


class _Certain:
    """The last stage of `label`: unsure pixels become void, and only labels are left."""

    def __init__(self, least: float) -> None:
        self.least = least

    def refine(self, image: Tensor, prediction: Segmentation) -> Segmentation:
        sure = _confidence_of(prediction)
        void, dtype = void_label(len(prediction.classes))
        # Not "below": what is no number is unsure.
        labels = prediction.labels.to(dtype).masked_fill(~(sure >= self.least), void)
        return Segmentation(
            prediction.size,
            prediction.classes,
            image=prediction.image,
            palette=prediction.palette,
            uncertainty=1 - sure.nan_to_num(0).clamp(0, 1),
            _labels=labels,
        )


def _confidence_of(prediction: Segmentation) -> Tensor:
    """How sure a prediction is of the label of every pixel, [H, W] float in 0..1."""
    if prediction.logits is not None:
        return prediction.confidence()
    if prediction.uncertainty is not None:
        return 1 - prediction.full_uncertainty()
    found = prediction.segments
    if found is not None:
        ids = torch.tensor([0] + [item.id for item in found.items])
        scores = torch.tensor([0.0] + [item.score for item in found.items])
        order = ids.argsort()
        place = torch.searchsorted(ids[order].to(found.map.device), found.map.long())
        return scores[order].to(found.map.device)[place]
    instances = prediction.instances
    if instances is not None and prediction._labels is None:
        sure = torch.zeros(prediction.size, device=instances.masks.device)
        for k in instances.scores.argsort(stable=True).tolist():  # as `Instances.label_map`
            if instances.scores[k] >= CERTAIN:
                sure[instances.masks[k]] = instances.scores[k].float()
        return sure
    raise PysegError(
        "the pipeline gives labels without any confidence: end it with a stage that keeps logits"
    )


def _predict(
    pipeline: Pipeline,
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: Path,
    description: dict[str, Any],
    *,
    overlay: bool = False,
    confidence: bool | None = None,
    overwrite: bool,
    keep_suffix: bool,
    workers: int | None,
    batch_size: int | None,
    track: Callable[[Sequence[tuple[Source, Path]]], Iterable[tuple[Source, Path]]],
) -> Predictions:
    """`predict` and `label`; ``confidence`` as `Run` takes it."""
    for name, value in (("workers", workers), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    summary = Predictions(output)
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    jobs = find_jobs(given, summary, keep_suffix)
    make_folder(output, "output_dir")
    with only_run(output):
        _refuse_strangers(output, description, (target for _, target in jobs), overwrite)
        folders = {path.parent for _, target in jobs for path in _results(output, target)}
        for folder in {output, *folders}:
            if folder.is_dir():
                remove_abandoned(folder)
        with Run(
            pipeline,
            jobs,
            output,
            description,
            overlay,
            overwrite,
            workers,
            batch_size,
            confidence=confidence,
        ) as run:
            for index, (source, target) in enumerate(track(jobs)):
                outcome = run.wait(index)
                if outcome is WRITTEN:
                    summary.written.append(target)
                elif outcome is SKIPPED:
                    summary.skipped.append(target)
                else:
                    summary.failed[str(source)] = outcome
    return summary


@contextmanager
def only_run(output: Path) -> Iterator[None]:
    """Keeps other runs out of a folder; the system takes the lock from a process that is killed.

    Raises:
        PysegError: another run holds it.
    """
    release = take_lock(output / ".lock")
    if release is None:
        raise PysegError(
            f"output_dir {str(output)!r} is being written by another run; wait for its end, or "
            "give another directory"
        )
    try:
        yield
    finally:
        release()


WRITTEN, SKIPPED = "written", "skipped"  # outcomes of an image; any other is why it failed


class Run:
    """The worker threads of one `predict` call. Leaving the context ends them.

    Args:
        read: gives the image of a source; raises `ImageError` where there is none.
        confidence: whether to write 1 minus the uncertainty, in 8 bits; None = the uncertainty.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        jobs: Sequence[tuple[Source, Path]],
        output: Path,
        description: dict[str, Any],
        overlay: bool,
        overwrite: bool,
        workers: int | None,
        batch_size: int | None,
        read: Callable[[Source], Tensor] = read_image,
        confidence: bool | None = None,
    ) -> None:
        self.pipeline, self.jobs, self.output = pipeline, jobs, output
        self.description, self.overlay, self.overwrite = description, overlay, overwrite
        self.read, self.confidence = read, confidence
        device = pipeline.device.type
        self.batch_size = batch_size or (1 if device == "cpu" else _BATCH)
        self.all_threads = torch.get_num_threads()
        possible = self.all_threads if device == "cpu" else os.cpu_count() or 1
        count = min(_WORKERS, possible) if workers is None else workers
        count = max(1, min(count, -(-len(jobs) // self.batch_size)))
        self.threads = max(1, self.all_threads // count)  # of one worker
        # An accelerator works for one worker at a time, while others decode and write.
        self.room = _Room(_SHARED_PIXELS, _SHARED_PIXELS // count if device == "cpu" else 0)
        self.lock = threading.Condition()
        self.next = 0  # job that no worker has taken yet
        self.outcomes: dict[int, str | BaseException] = {}
        self.stopped = False
        self.claimed = False
        self.bytes_per_pixel: float | None = None
        self.workers = [_Worker(self) for _ in range(count)]
        # What threads do not inherit from their caller:
        self.gradients = torch.is_grad_enabled()
        self.autocast: dict[str, Any] = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }

    def __enter__(self) -> Run:
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.stopped = True
            self.room.close()
            for worker in self.workers:
                worker.interrupt()
            for worker in self.workers:
                worker.join()
        finally:
            torch.set_num_threads(self.all_threads)  # the workers have changed it for all

    def wait(self, index: int) -> str:
        """What became of a job; raises what a worker raised over it."""
        with self.lock:
            self.lock.wait_for(lambda: index in self.outcomes)
            outcome = self.outcomes.pop(index)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def take(self) -> list[int]:
        """The next jobs, as many as a batch holds; those that are done already are reported."""
        taken: list[int] = []
        with self.lock:
            while not self.stopped and self.next < len(self.jobs) and len(taken) < self.batch_size:
                if self._is_done(self.jobs[self.next][1]):
                    self.outcomes[self.next] = SKIPPED
                else:
                    taken.append(self.next)
                self.next += 1
            self.lock.notify_all()
        return taken

    def _is_done(self, target: Path) -> bool:
        _, painted, *_, sure = _results(self.output, target)
        wanted = [target, *[painted] * self.overlay, *[sure] * bool(self.confidence)]
        return not self.overwrite and all(path.exists() for path in wanted)

    def report(self, index: int, outcome: str) -> None:
        with self.lock:
            self.outcomes[index] = outcome
            self.lock.notify_all()

    def give_up(self, taken: Sequence[int], error: BaseException) -> None:
        """Lets the caller raise ``error`` when it comes to the first of these jobs without result.

        Earlier jobs are in the hands of other workers, who finish them; later ones are not begun.
        """
        with self.lock:
            self.next = len(self.jobs)
            for index in taken:
                self.outcomes.setdefault(index, error)
            self.lock.notify_all()

    def work(self, worker: _Worker, taken: Sequence[int]) -> None:
        """From files to files. What is too large for the memory, or no image, is reported."""
        images: dict[int, Tensor] = {}
        for index in taken:
            source = self.jobs[index][0]
            try:
                images[index] = self.read(source)
            except ImageError as error:
                self.report(index, str(error))
            except (MemoryError, RuntimeError) as error:
                self.report(index, _too_large(source, error))
        if not images:
            return
        with self.room.of(sum(_pixels(image) for image in images.values())) as alone:
            torch.set_num_threads(self.all_threads if alone else self.threads)
            for index, image in images.items():
                if _pixels(image) > _LARGE_PIXELS:
                    self._warn_if_too_large(self.jobs[index][0], image)
            found = self._segment(worker, images)
        for index, result in found.items():
            if not self.stopped:
                self._write(index, result)

    def _segment(self, worker: _Worker, images: dict[int, Tensor]) -> dict[int, Segmentation]:
        try:
            with (
                worker.interruptible(),
                torch.set_grad_enabled(self.gradients),
                torch.autocast(**self.autocast),
            ):
                names = [repr(str(self.jobs[index][0])) for index in images]
                results = self.pipeline([*images.values()], names=names)
                for result in results:
                    _ = result.labels  # computed here, where other workers leave room for it
            return dict(zip(images, results, strict=True))
        except (MemoryError, RuntimeError) as error:
            index = next(iter(images))
            reason = _too_large(self.jobs[index][0], error)
        if len(images) == 1:
            self.report(index, reason)
            return {}
        found: dict[int, Segmentation] = {}
        for index, image in images.items():
            found |= self._segment(worker, {index: image})
        return found

    def _warn_if_too_large(self, source: Source, image: Tensor) -> None:
        if self.bytes_per_pixel is None:
            self.bytes_per_pixel = _bytes_per_pixel(self.pipeline, image)
        need, free = self.bytes_per_pixel * _pixels(image), _free_memory(self.pipeline.device)
        if free is not None and need > free:
            height, width = image.shape[1:]
            warnings.warn(
                f"image {str(source)!r} of {width} x {height} pixels needs about "
                f"{need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free: it may fail, or "
                "the system may end the program; reduce the image, or cut it into parts",
                stacklevel=2,
            )

    def _write(self, index: int, result: Segmentation) -> None:
        labels, painted, segments, _, instances, doubt, sure = _results(
            self.output, self.jobs[index][1]
        )
        with self.lock:
            if not self.claimed:
                write_json(self.output / MANIFEST, self.description)
                self.claimed = True
        # All before the labels, whose presence says that all is done.
        if self.overlay:
            write_image(_ready(painted), result.overlay())
        if result.segments is not None:
            write_segments(_ready(segments), result.segments)
        if result.instances is not None:
            write_instances(_ready(instances), result.instances)
        if result.uncertainty is not None and self.confidence is None:
            write_uncertainty(_ready(doubt), result.full_uncertainty())
        if result.uncertainty is not None and self.confidence:
            write_confidence(_ready(sure), 1 - result.full_uncertainty())
        write_labels(_ready(labels), result.labels, result.palette)
        self.report(index, WRITTEN)


class _Worker(threading.Thread):
    """Takes jobs until there are none."""

    def __init__(self, whole: Run) -> None:
        super().__init__(name="pyseg-predict")
        self.whole = whole
        self.lock = threading.Lock()
        self.computing = False

    def run(self) -> None:
        while taken := self.whole.take():
            try:
                self.whole.work(self, taken)
            except BaseException as error:  # the caller raises it
                self.whole.give_up(taken, error)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        with self.lock:
            if self.whole.stopped:
                raise KeyboardInterrupt
            self.computing = True
        try:
            yield
        finally:
            with self.lock:
                self.computing = False

    def interrupt(self) -> None:
        """Ends a computation after its present operator, as Ctrl-C does in the main thread.

        Nothing else is disturbed: a file that is being written is finished.
        """
        with self.lock:
            if self.computing:
                raised = ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident or 0), raised)


class _Room:
    """Lets images in until they have ``total`` pixels together; a large one comes in alone."""

    def __init__(self, total: int, small: int) -> None:
        self.total, self.small = total, small
        self.free, self.closed = total, False
        self.lock = threading.Condition()
        self.door = threading.Lock()  # who waits there is not overtaken

    @contextmanager
    def of(self, pixels: int) -> Iterator[bool]:
        """Waits for room; yields whether nobody else is inside."""
        alone = pixels > self.small
        share = self.total if alone else pixels
        with self.door, self.lock:
            self.lock.wait_for(lambda: self.closed or self.free >= share)
            self.free -= share
        try:
            yield alone
        finally:
            with self.lock:
                self.free += share
                self.lock.notify_all()

    def close(self) -> None:
        """Nobody waits any longer."""
        with self.lock:
            self.closed = True
            self.lock.notify_all()


def _pixels(image: Tensor) -> int:
    return image.shape[1] * image.shape[2]


def _results(output: Path, target: Path) -> tuple[Path, Path, Path, Path, Path, Path, Path]:
    """All files of an image: labels, overlay, panoptic map and list, instances, uncertainty,
    confidence."""
    relative = target.relative_to(output)
    segments = output / SEGMENTS / relative
    return (
        target,
        output / OVERLAYS / relative,
        segments,
        segments.with_suffix(".json"),
        (output / INSTANCES / relative).with_suffix(".json"),
        output / UNCERTAINTY / relative,
        output / CONFIDENCE / relative,
    )


def _ready(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _too_large(source: Source, error: Exception) -> str:
    """Why an image failed, if it was for want of memory; raises ``error`` if not."""
    # torch's CPU allocator raises a plain RuntimeError.
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and (
        "can't allocate memory" not in str(error)
    ):
        raise error
    return f"image {str(source)!r} is too large for the memory"


def _bytes_per_pixel(pipeline: Pipeline, image: Tensor) -> float:
    """What a pipeline needs at its peak, measured on a reduced image; 0 where it cannot be.

    Rather too much (streetnet: a fifth), as what does not grow with the image is
    counted as if it did.
    """
    factor = min(1.0, (_PROBE_PIXELS / _pixels(image)) ** 0.5)
    size = [max(1, round(side * factor)) for side in image.shape[1:]]
    probe = torch.nn.functional.interpolate(image[None], size)[0]
    try:
        peaks = [result.peak_bytes for result in pipeline.profile(probe)]
    except OSError:  # the kernel does not let its counters be reset
        return 0.0
    return max((peak or 0) / _pixels(probe) for peak in peaks)


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:  # a container's limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return free


# --- which images, and where their results go -------------------------------------------------


def find_jobs(
    paths: Iterable[str | os.PathLike[str]],
    summary: Predictions,
    keep_suffix: bool,
    find: Callable[[str, Predictions], list[tuple[Source, Path]]] | None = None,
) -> list[tuple[Source, Path]]:
    """Pairs of image and label map; paths that lead nowhere become failures of the summary.

    Args:
        paths: as `predict` takes them.
        summary: says where results go, and is told of failures.
        keep_suffix: as `predict` takes it.
        find: the images of one path, each with its place below the output directory.
    """
    output = summary.output_dir
    jobs: dict[tuple[Source, Path], Source] = {}  # image as the system knows it, map -> image
    replaced = []
    if not (paths := list(paths)):
        raise PysegError("paths is empty: there is nothing to segment")
    for given in paths:
        for file, relative in (find or find_images)(os.fspath(given), summary):
            name = f"{relative.name}.png" if keep_suffix else f"{relative.stem}.png"
            target = output / relative.parent / name
            known = file.resolve() if isinstance(file, Path) else file
            if target.resolve() == known:
                replaced.append(str(file))
            jobs.setdefault((known, target), file)
    if replaced:
        raise PysegError(
            f"the label map of {', '.join(replaced)} would replace it; give another output "
            "directory, or keep_suffix=True"
        )
    pairs = [(source, target) for (_, target), source in jobs.items()]
    _refuse_collisions(output, pairs, keep_suffix)
    return pairs


def find_images(text: str, summary: Predictions) -> list[tuple[Source, Path]]:
    """The images of one path as given, each with its place below the output directory."""
    path, own = Path(text), summary.output_dir.resolve()
    found: list[tuple[Source, Path]] = []
    if text.startswith("@"):
        found = _listed(text[1:])
        problem = "lists no image"
    elif path.is_dir():
        found = [(file, file.relative_to(path)) for file in _images_below(path, own, summary)]
        problem = f"holds no image file ({', '.join(IMAGE_SUFFIXES)})"
    elif path.exists() or not glob.has_magic(text):
        return [(path, Path(path.name))]  # absent ones are reported when they are read
    else:
        fixed = Path()
        for part in path.parts[:-1]:
            if glob.has_magic(part):
                break
            fixed /= part
        for match in map(Path, sorted(glob.glob(text, recursive=True))):
            if match.is_file() and own not in match.resolve().parents:
                relative = match.relative_to(fixed)
                found.append((match, Path(match.name) if ".." in relative.parts else relative))
        problem = "matches no file"
    if not found:
        summary.failed[text] = f"{text!r} {problem}; check the path"
    return found


def _listed(text: str) -> list[tuple[Source, Path]]:
    """The images that a text file names, one a line, each placed by the whole of its path."""
    try:
        lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PysegError(
            f"the list of images {text!r} cannot be read ({error}); give @ and a text file with a "
            "path on every line"
        ) from error
    found: list[tuple[Source, Path]] = []
    for line in filter(None, map(str.strip, lines)):
        _, separator, rest = line.rpartition("://")
        parts = [part for part in Path(os.path.normpath(rest)).parts if part not in ("/", "..")]
        found.append((line if separator else Path(line), Path(*parts)))
    return found


def _images_below(folder: Path, own: Path, summary: Predictions) -> list[Path]:
    """Image files in a folder and its subfolders, sorted, without hidden ones and our own."""
    if folder.resolve() == own:
        raise PysegError(
            f"output_dir {str(folder)!r} is the folder of the images, and results "
            "would mix with them; give another directory"
        )
    found: list[Path] = []
    for base, folders, files in os.walk(folder):
        here = Path(base)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (here / name).resolve() != own
        )
        for name in sorted(files):
            if not name.startswith("."):
                known = Path(name).suffix.lower() in IMAGE_SUFFIXES
                (found if known else summary.ignored).append(here / name)
    return found


def _refuse_collisions(
    output: Path, pairs: Sequence[tuple[Source, Path]], keep_suffix: bool
) -> None:
    """All that keeps results from being files of their own, in one error."""
    owners: dict[Path, list[Source]] = {}
    for source, target in pairs:
        owners.setdefault(target, []).append(source)
    companions = {path: source for source, target in pairs for path in _results(output, target)[1:]}
    folders = {parent: target for target in owners for parent in target.parents}
    problems = []
    for target, sources in owners.items():
        names = " and ".join(map(str, sources))
        if len(sources) > 1:
            problems.append(f"{names} would both be written to {target}")
        if target in companions:
            problems.append(
                f"{target} would be the label map of {names} and belong to {companions[target]}"
            )
        if target in folders or target.is_dir():
            problems.append(f"{target}, the label map of {names}, is a folder of other results")
    if problems:
        remedy = "" if keep_suffix else ", or keep the suffixes (a.jpg.png) by keep_suffix=True"
        raise PysegError(
            f"{'; '.join(problems)}: give them in separate calls with different output "
            f"directories{remedy}"
        )


def describe(pipeline: Pipeline) -> dict[str, Any]:
    """The content of `MANIFEST`."""
    return {"spec": str(pipeline), "classes": list(pipeline.classes), "void": VOID}


def _refuse_strangers(
    output: Path, description: dict[str, Any], targets: Iterable[Path], overwrite: bool
) -> None:
    """An error if the output directory holds what is not this pipeline's."""
    if overwrite:
        return
    manifest = output / MANIFEST
    if manifest.is_file():
        theirs = read_json(manifest)
        # A manifest without results, of a run that came to nothing, claims nothing.
        if theirs != description and any(
            not path.name.startswith(".") and path.name != MANIFEST for path in output.iterdir()
        ):
            other = theirs.get("spec") if isinstance(theirs, dict) else theirs
            raise PysegError(
                f"output_dir {str(output)!r} holds results of another pipeline, {other!r}; give "
                "another directory, or overwrite=True to replace them"
            )
    elif taken := next((target for target in targets if target.exists()), None):
        raise PysegError(
            f"{taken} exists and is no earlier result of pyseg; give another "
            "output directory, or overwrite=True to replace it"
        )


__all__ = ["Predictions", "label", "predict"]
