"""`predict` and `evaluate` by many workers, on one machine or many, through Ray Data.

The unit of work is a shard, some images whose results become one file. Its name follows from the
images, it is written whole or not at all, and its presence says that it is done: a worker that is
killed, and the next one that does the same again, leave one result of every image. Ray carries
names of images and counts, never pixels: workers read and write by themselves.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import math
import os
import pickle
import shutil
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import __version__, prediction
from .classes import check_classes
from .errors import ImageError, PysegError, require
from .evaluation import MEMORY_IMAGES, Evaluation, Scoring, chosen, largest
from .files import IMAGE_SUFFIXES, make_folder, remove_abandoned, replacing, some
from .image import read_image
from .pipeline import DEFAULT, DESCRIPTION, Pipeline, build, load
from .prediction import MANIFEST, Predictions, Source
from .processes import add_states
from .progress import notebook_bar

if TYPE_CHECKING:
    from .report import WorstImages
    from .types import Dataset

ATTEMPTS = 3  # at a shard whose workers die; then it is reported, and the others go on
_CPUS = 4  # of a worker, by default: as many as plain `predict` has images in work
_PART = 16  # samples at most whose states a worker returns together
_PACKAGES = {  # fsspec's schemes -> what brings them
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
}


@dataclass
class ShardedPredictions:
    """The summary of a `predict` run."""

    output_dir: str
    written: list[str] = field(default_factory=list)  # label maps of this run, by name in a shard
    skipped: list[str] = field(default_factory=list)  # label maps that were there already
    failed: dict[str, str] = field(default_factory=dict)  # path as given -> reason
    ignored: list[Path] = field(default_factory=list)  # in the folders, of no image suffix
    shards: list[str] = field(default_factory=list)  # that this run wrote

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**dataclasses.asdict(self), "ignored": [str(path) for path in self.ignored]}


@dataclass(frozen=True)
class _Recipe:
    """What makes the pipeline in every worker."""

    spec: str
    weights: str | None
    num_classes: int | None
    device: str
    precision: str
    threads: int = 1  # of torch, in a worker
    version: str = __version__

    def make(self) -> Pipeline:
        if self.version != __version__:
            raise PysegError(
                f"a worker has pyseg {__version__} and the driver {self.version}: install the "
                "same everywhere"
            )
        if (Path(self.spec) / DESCRIPTION).is_file():
            if self.weights != DEFAULT or self.num_classes is not None:
                raise PysegError(
                    f"weights and num_classes do not go with a saved pipeline, and {self.spec} is "
                    "one"
                )
            return load(self.spec, device=self.device, precision=self.precision)
        return build(
            self.spec,
            weights=self.weights,
            num_classes=self.num_classes,
            device=self.device,
            precision=self.precision,
        )


def predict(
    spec: str,
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    weights: str | None = DEFAULT,
    num_classes: int | None = None,
    device: str | None = None,
    precision: str = "fp32",
    overlay: bool = False,
    overwrite: bool = False,
    keep_suffix: bool = False,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    batch_size: int | None = None,
    shard_size: int = 64,
    address: str | None = None,
    track: Callable[[Sequence[Any]], Iterable[Any]] = notebook_bar,
) -> ShardedPredictions:
    """Segments images by many workers and writes the results as ZIP files of some images each.

    ``shard-….zip`` holds what `pyseg.predict` would write for its images, under the same names:
    ``unzip -q '*.zip' -d labels`` makes its folder.
    A run that was interrupted is continued by the same call: what is in a shard is not done again,
    and images that were added since get shards of their own. An image that cannot be read is
    reported, and so are the images of a shard over which a worker died three times; both are tried
    again by the next run.

    The cluster is the one that ``ray.init`` has joined, that ``address`` or ``RAY_ADDRESS`` names
    or that ``ray start`` began on this machine; without one, workers are processes of this machine
    that end with the call. Every machine needs this version of pyseg, and the same paths where
    these are local.

    Args:
        spec: of a pipeline, or the folder of a saved one; each worker builds it once.
        paths: as for `pyseg.predict`, and URLs that fsspec reads: of images, of folders such as
            ``"s3://bucket/photos"``, and glob patterns.
        output_dir: folder or URL of one. Of several runs at a time into a local folder all but the
            first are refused; in an object store that is up to you.
        weights, num_classes, precision: as for `pyseg.build`, if ``spec`` is no folder.
        device: None = ``"cuda"`` for workers with a GPU, else the CPU.
        overlay, overwrite, keep_suffix: as for `pyseg.predict`; ``overwrite`` begins by deleting
            the shards that are there.
        workers: None = one per GPU, or per four CPUs where none is used.
        gpus_per_worker: None = 1 where the cluster has GPUs and ``device`` is not the CPU, else 0;
            0.5 lets two workers share one.
        batch_size: as for `pyseg.predict`.
        shard_size: images of a shard; what is lost if a worker dies.
        address: of a running cluster: ``"auto"``, ``"ray://host:10001"``; ``"local"`` for none.
        track: wraps the sequence of shards, for a progress bar.

    Raises:
        PysegError: as from `pyseg.predict`; besides, the workers do not fit into the cluster, or a
            stage failed in one.
        ImportError: Ray, or what a URL's scheme needs, is not installed; the message names it.
        ValueError: an option out of range.

    Example:
        >>> predict("streetnet", ["s3://bucket/photos"], "s3://bucket/labels", workers=8)
    """
    _check(
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        batch_size=batch_size,
        shard_size=shard_size,
    )
    require("ray.data", extra="ray")
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    for place in (output_dir, *given):
        if os.fspath(place).startswith("memory://"):
            raise PysegError(f"{place!r} is in the memory of one process, which workers do not see")
    store = Store(output_dir)
    found = Predictions(store.local or Path("output"))
    jobs = [
        (source, target.relative_to(found.output_dir).as_posix())
        for source, target in prediction.find_jobs(given, found, keep_suffix, _find)
    ]
    summary = ShardedPredictions(store.url, failed=found.failed, ignored=found.ignored)
    recipe = _Recipe(_anywhere(spec), weights, num_classes, "cpu", precision)
    # Built here once, too: a mistake shows before any worker starts.
    description = {**prediction.describe(recipe.make()), "shards": True, "overlay": overlay}
    with store.only_run():
        done = store.begin(description, overwrite)
        summary.skipped = [name for _, name in jobs if name in done]
        shards = _cut([job for job in jobs if job[1] not in done], shard_size)
        if not shards:
            return summary
        options = {
            "output": store.url,
            "description": description,
            "overlay": overlay,
            "batch_size": batch_size,
        }
        with _cluster(address) as ray:
            crew = _crew(ray, workers, gpus_per_worker, device)
            recipe = dataclasses.replace(recipe, device=crew.device, threads=crew.cpus)
            missing = {shard["name"]: shard for shard in shards}
            mapped = _map(ray, crew, _Segmenter, (recipe, options), shards)
            with contextlib.closing(mapped) as rows:
                for _ in track(shards):
                    if (row := next(rows, None)) is None:
                        break
                    del missing[row["name"]]
                    summary.written += row["written"]
                    summary.failed |= row["failed"]
                    summary.shards += [row["name"]] if row["written"] else []
                    for text in row["warnings"]:
                        warnings.warn(text, stacklevel=2)
                next(rows, None)  # lets Ray end its execution
    there = set(summary.written)
    summary.written = [name for _, name in jobs if name in there]
    for shard in missing.values():
        for source, _ in shard["jobs"]:
            summary.failed[source] = (
                f"image {source!r}: its worker died {ATTEMPTS} times over the "
                f"{len(shard['jobs'])} images of a shard, for want of memory perhaps; a smaller "
                "shard_size tells which it is"
            )
    return summary


def evaluate(
    spec: str,
    dataset: Dataset,
    metrics: Sequence[str] = ("semantic",),
    *,
    weights: str | None = DEFAULT,
    num_classes: int | None = None,
    device: str | None = None,
    precision: str = "fp32",
    limit: int | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    address: str | None = None,
    worst: WorstImages | None = None,
    track: Callable[[Sequence[Any]], Iterable[Any]] = notebook_bar,
) -> Evaluation:
    """Scores every stage of a pipeline on a data set by many workers, as `pyseg.evaluate` does.

    Each worker scores some images in a row and returns the metrics' states, which are added in the
    order of the data set: the scores are those of one process to the last bit. What a *model*
    returns depends on torch's threads in its last bits, which are here a worker's CPUs. Times are
    means over all images, the peak memory is the largest of any worker.

    Args:
        spec, weights, num_classes, device, precision: as for `predict`.
        dataset: is pickled; its files must be there on every machine.
        metrics: as for `pyseg.evaluate`.
        limit: score this many images, spread evenly over the dataset; None = all.
        workers, gpus_per_worker, address: as for `predict`.
        worst: what is to keep the worst images, for `pyseg.report.write_page`.
        track: wraps the sequence of parts, for a progress bar.

    Raises:
        PysegError: as from `pyseg.evaluate`; a worker died three times over the same images, so
            that no image is left out silently; the workers do not fit into the cluster.
        ImportError: Ray is not installed.
        ValueError: an option out of range.
    """
    _check(workers=workers, gpus_per_worker=gpus_per_worker)
    require("ray.data", extra="ray")
    recipe = _Recipe(_anywhere(spec), weights, num_classes, "cpu", precision)
    pipeline = recipe.make()
    check_classes(pipeline.classes, dataset.classes)
    indices = chosen(len(dataset), limit)
    total = Scoring(pipeline, dataset, metrics)
    with _cluster(address) as ray:
        crew = _crew(ray, workers, gpus_per_worker, device)
        recipe = dataclasses.replace(recipe, device=crew.device, threads=crew.cpus)
        # Some parts per worker, so that all end at about the same time.
        size = min(_PART, -(-len(indices) // (4 * crew.workers)))
        parts: list[dict[str, Any]] = [
            {"name": start, "indices": indices[start : start + size]}
            for start in range(0, len(indices), size)
        ]
        options = {"dataset": ray.put(dataset), "metrics": metrics, "worst": worst}
        found = {}
        with contextlib.closing(_map(ray, crew, _Scorer, (recipe, options), parts)) as rows:
            for _ in track(parts):
                if (row := next(rows, None)) is None:
                    break
                found[row["name"]] = row
            next(rows, None)
    if lost := [part["indices"] for part in parts if part["name"] not in found]:
        raise PysegError(
            f"a worker died {ATTEMPTS} times over the samples {some(lost[0])} of the data set, "
            "for want of memory perhaps"
        )
    ordered = [found[part["name"]] for part in parts]
    for k, stage_scorers in enumerate(total.scorers):
        for name, scorer in stage_scorers.items():
            scorer.load_state(add_states(name, [row["states"][k][name] for row in ordered]))
        total.milliseconds[k] = math.fsum(row["milliseconds"][k] for row in ordered)
        total.peaks[k] = largest(row["peaks"][k] for row in ordered)
    if worst is not None:
        for row in ordered:
            worst.merge(row["worst"])
    return total.result(len(indices), True, crew.device, crew.cpus)


def _check(**options: float | None) -> None:
    for name, value in options.items():
        least = 0 if name == "gpus_per_worker" else 1
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _anywhere(spec: str) -> str:
    """A spec as workers understand it, which run in folders of their own."""
    return os.path.abspath(spec) if (Path(spec) / DESCRIPTION).is_file() else spec


def _cut(jobs: Sequence[tuple[Source, str]], size: int) -> list[dict[str, Any]]:
    """Shards of so many images, named after the results that they will hold."""
    shards = []
    for start in range(0, len(jobs), size):
        part = jobs[start : start + size]
        digest = hashlib.sha256("\n".join(name for _, name in part).encode()).hexdigest()[:16]
        named = [(_absolute(source), name) for source, name in part]
        shards.append({"name": f"shard-{digest}.zip", "jobs": named})
    return shards


def _absolute(source: Source) -> str:
    """A path as workers find it, which run in folders of their own."""
    return str(source) if "://" in str(source) else os.path.abspath(source)


# --- what is stored where ---------------------------------------------------------------------


def _open_store(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it."""
    fsspec = require("fsspec", extra="ray")
    scheme = url.partition("://")[0]
    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        remedy = f"pip install {package}" if package else str(error)
        raise PysegError(
            f"{url!r}: reading {scheme}:// needs a package that is not installed: {remedy}"
        ) from error
    except ValueError as error:
        raise PysegError(f"{url!r}: fsspec does not know it ({error}); check the URL") from error


class Store:
    """The folder of the shards: a local one, or a prefix in an object store.

    Args:
        place: path or URL of it.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        text = os.fspath(place)
        if text.partition("://")[0] in ("file", "local"):
            text = _open_store(text)[1]
        remote = "://" in text
        self.local = None if remote else Path(text).absolute()
        self.url = text.rstrip("/") if remote else str(self.local)
        self.system: Any = None
        self.root = ""
        if remote:
            self.system, root = _open_store(text)
            self.root = root.rstrip("/")

    @contextlib.contextmanager
    def only_run(self) -> Iterator[None]:
        """Keeps other runs out of a local folder; object stores have no locks."""
        if self.local is None:
            yield
            return
        make_folder(self.local, "output_dir")
        with prediction.only_run(self.local):
            remove_abandoned(self.local)
            yield

    def shards(self) -> list[str]:
        """Names of the shards that are there."""
        if self.local is not None:
            return sorted(path.name for path in self.local.glob("shard-*.zip"))
        self.system.invalidate_cache()
        found = self.system.glob(f"{self.root}/shard-*.zip")
        return sorted(path.rpartition("/")[2] for path in found)

    def names(self, shard: str) -> list[str]:
        """The files in a shard, of which only its directory is read."""
        try:
            with self.open(shard) as stream, zipfile.ZipFile(stream) as archive:
                return archive.namelist()
        except zipfile.BadZipFile as error:
            raise PysegError(
                f"{self.url}/{shard} is damaged ({error}); delete it, and its images are done again"
            ) from error

    def open(self, name: str) -> Any:
        if self.local is not None:
            return (self.local / name).open("rb")
        return self.system.open(f"{self.root}/{name}", "rb")

    def put(self, file: Path, name: str) -> None:
        """Stores a file whole or not at all, in place of one of the same name."""
        if self.local is not None:
            with replacing(self.local / name) as temporary:
                shutil.copyfile(file, temporary)
        else:
            self.system.put_file(str(file), f"{self.root}/{name}")

    def remove(self, name: str) -> None:
        if self.local is not None:
            (self.local / name).unlink()
        else:
            self.system.rm_file(f"{self.root}/{name}")

    def begin(self, description: Mapping[str, Any], overwrite: bool) -> set[str]:
        """Claims the folder for a pipeline; returns the names of the results that are there.

        Raises:
            PysegError: it holds something else, or two results of one image.
        """
        there = self.shards()
        theirs = self._manifest()
        if overwrite:
            for shard in there:
                self.remove(shard)
            there = []
        elif theirs is not None and theirs != description:
            if not theirs.get("shards"):
                raise PysegError(
                    f"output_dir {self.url!r} holds results that are no shards; give another"
                )
            if there:
                raise PysegError(
                    f"output_dir {self.url!r} holds results of another pipeline or other options, "
                    f"{theirs.get('spec')!r}; give another, or overwrite=True to replace them"
                )
        owners: dict[str, str] = {}
        for shard, names in zip(there, _several(self.names, there), strict=True):
            for name in names:
                if owners.setdefault(name, shard) != shard:
                    raise PysegError(
                        f"output_dir {self.url!r}: {name} is in {owners[name]} and in {shard}, as "
                        "after two runs at a time; delete one of them"
                    )
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / MANIFEST
            file.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
            self.put(file, MANIFEST)
        return set(owners)

    def _manifest(self) -> dict[str, Any] | None:
        try:
            with self.open(MANIFEST) as stream:
                found = json.loads(stream.read())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise PysegError(
                f"{self.url}/{MANIFEST} cannot be read as JSON ({error}); it is damaged"
            ) from error
        return found if isinstance(found, dict) else {}


def _several(function: Callable[[str], Any], items: Sequence[str]) -> list[Any]:
    """Requests to an object store wait for their answers, so that many may be under way."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(function, items))


def _find(text: str, summary: Predictions) -> list[tuple[Source, Path]]:
    """As `prediction.find_images`, for URLs too."""
    if "://" not in text or text.startswith("@"):
        return prediction.find_images(text, summary)
    system, root = _open_store(text)
    root = root.rstrip("/")
    wild = any(sign in root for sign in "*?[")
    try:
        if wild:
            fixed = root[: min(root.index(sign) for sign in "*?[" if sign in root)]
            paths, base = system.glob(root), fixed.rpartition("/")[0]
            problem = "matches no file"
        elif system.isdir(root):
            paths, base = system.find(root), root
            problem = f"holds no image file ({', '.join(IMAGE_SUFFIXES)})"
        elif system.exists(root):
            return [(text, Path(root.rpartition("/")[2]))]
        else:
            paths, base, problem = [], root, "does not exist"
    except Exception as error:  # of any kind: every package has its own
        raise PysegError(
            f"{text!r} cannot be listed ({type(error).__name__}: {error}); check the URL and your "
            "credentials"
        ) from error
    found: list[tuple[Source, Path]] = []
    for path in sorted(paths):
        relative = Path(path[len(base) :].lstrip("/"))
        if any(part.startswith(".") for part in relative.parts):
            continue
        if wild or relative.suffix.lower() in IMAGE_SUFFIXES:
            found.append((system.unstrip_protocol(path), relative))
        else:
            summary.ignored.append(relative)
    if not found:
        summary.failed[text] = f"{text!r} {problem}; check the path"
    return found


# --- in a worker ------------------------------------------------------------------------------


class _Worker:
    """Does one job after the other; the pipeline is built with the first of them.

    What goes wrong is an answer: Ray would take it for a loss of the worker and try again.
    """

    def __init__(self, recipe: _Recipe, options: Mapping[str, Any]) -> None:
        self.recipe, self.options = recipe, options
        self.pipeline: Pipeline | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        try:
            if self.pipeline is None:
                torch.set_num_threads(self.recipe.threads)
                self.pipeline = self.recipe.make()
            answer = self.work(self.pipeline, pickle.loads(batch["job"][0]))
        except Exception as error:
            kind = "" if isinstance(error, (PysegError, OSError)) else f"{type(error).__name__}: "
            answer = {"error": f"{kind}{error}"}
        answers = np.empty(1, dtype=object)
        answers[0] = pickle.dumps({"pid": os.getpid(), **answer})
        return {"answer": answers}

    def work(self, pipeline: Pipeline, job: Any) -> dict[str, Any]:
        raise NotImplementedError


class _Segmenter(_Worker):
    """Of images to a shard."""

    def work(self, pipeline: Pipeline, job: Any) -> dict[str, Any]:
        written: list[str] = []
        failed: dict[str, str] = {}
        with tempfile.TemporaryDirectory(prefix="pyseg-") as folder:
            results = Path(folder) / "results"
            results.mkdir()
            jobs = [(source, results / name) for source, name in job["jobs"]]
            run = prediction.Run(
                pipeline,
                jobs,
                results,
                self.options["description"],
                self.options["overlay"],
                True,
                None,
                self.options["batch_size"],
                _Reader(Path(folder)).read,
            )
            with warnings.catch_warnings(record=True) as caught, run:
                warnings.simplefilter("always", UserWarning)
                for index, (source, name) in enumerate(job["jobs"]):
                    outcome = run.wait(index)
                    if outcome is prediction.WRITTEN:
                        written.append(name)
                    else:
                        failed[source] = outcome
            if written:
                shard = Path(folder) / "shard.zip"
                _pack(results, shard)
                Store(self.options["output"]).put(shard, job["name"])
        texts = [str(each.message) for each in caught if each.category is UserWarning]
        return {"name": job["name"], "written": written, "failed": failed, "warnings": texts}


class _Scorer(_Worker):
    """Of samples to the states of the metrics."""

    def __init__(self, recipe: _Recipe, options: Mapping[str, Any]) -> None:
        super().__init__(recipe, options)
        self.dataset: Dataset | None = None

    def work(self, pipeline: Pipeline, job: Any) -> dict[str, Any]:
        first = self.dataset is None
        if self.dataset is None:
            self.dataset = require("ray", extra="ray").get(self.options["dataset"])
        scoring = Scoring(pipeline, self.dataset, self.options["metrics"])
        worst = copy.deepcopy(self.options["worst"])
        for done, index in enumerate(job["indices"]):
            scoring.add(
                index,
                warm_up=first and done == 0,
                memory=first and done < MEMORY_IMAGES,
                observe=worst.add if worst else None,
            )
        states = [
            {name: scorer.state() for name, scorer in stage.items()} for stage in scoring.scorers
        ]
        return {
            "name": job["name"],
            "states": tree_map_only(Tensor, Tensor.cpu, states),
            "milliseconds": scoring.milliseconds,
            "peaks": scoring.peaks,
            "worst": worst,
        }


class _Reader:
    """Images of files and URLs; what is fetched lies in ``folder`` for as long as it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        self.count = 0

    def read(self, source: Source) -> Tensor:
        url = str(source)
        if "://" not in url:
            return read_image(source)
        with self.lock:
            self.count += 1
            file = self.folder / f"{self.count}-{url.rpartition('/')[2][-100:]}"
        try:
            system, path = _open_store(url)
            system.get_file(path, str(file))
        except FileNotFoundError as error:
            raise ImageError(f"image {url!r} does not exist; check the path") from error
        except Exception as error:  # of any kind: every package has its own
            raise ImageError(
                f"image {url!r} cannot be read ({type(error).__name__}: {error})"
            ) from error
        try:
            return read_image(file)
        except ImageError as error:
            raise ImageError(str(error).replace(str(file), url)) from error
        finally:
            file.unlink(missing_ok=True)


def _pack(folder: Path, shard: Path) -> None:
    """All results below ``folder`` as a ZIP file, the same bytes whenever it is made."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    with zipfile.ZipFile(shard, "w") as archive:  # stored: PNGs are compressed
        for file in files:
            entry = zipfile.ZipInfo(file.relative_to(folder).as_posix())
            entry.external_attr = 0o644 << 16
            with file.open("rb") as source, archive.open(entry, "w") as target:
                while block := source.read(1 << 20):
                    target.write(block)


# --- Ray --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Crew:
    workers: int
    cpus: int  # of each
    gpus: float  # of each
    device: str


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, joined or begun; what was begun here ends here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told of anything
    ray = require("ray", extra="ray")
    require("ray.data", extra="ray")
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
        except (ConnectionError, ValueError) as error:
            raise PysegError(f"no Ray cluster at address={address!r}: {error}") from error
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _crew(
    ray: Any, workers: int | None, gpus_per_worker: float | None, device: str | None
) -> _Crew:
    """How many workers, and what each gets of the machines that are there.

    Raises:
        PysegError: they do not fit.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(node.get("GPU", 0) for node in nodes)
    if gpus_per_worker is None:
        gpus_per_worker = 1.0 if gpus and device in (None, "cuda") else 0.0
    each = gpus_per_worker

    def places(cpus: int) -> int:
        """Workers of so many CPUs that find room."""
        return sum(
            min(int(n.get("CPU", 0) // cpus), int(n.get("GPU", 0) / each) if each else 1 << 30)
            for n in nodes
        )

    if workers is None:
        workers = places(1) if each else max(1, places(_CPUS))
    if workers < 1 or places(1) < workers:
        cpus = int(sum(node.get("CPU", 0) for node in nodes))
        raise PysegError(
            f"workers={workers} with gpus_per_worker={each:g} do not fit: the cluster has {cpus} "
            f"CPUs and {gpus:g} GPUs, and every worker needs a CPU at least"
        )
    cpus = next(n for n in range(_CPUS, 0, -1) if places(n) >= workers)
    return _Crew(workers, cpus, each, device or ("cuda" if each else "cpu"))


def _map(
    ray: Any, crew: _Crew, kind: type[_Worker], arguments: tuple, jobs: Sequence[Any]
) -> Generator[dict[str, Any], None, None]:
    """The answers of workers as they come; a job whose worker died too often has none.

    Ray holds the jobs, which are names, and gives a worker one at a time; the answers are small.

    Raises:
        PysegError: what a worker says.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = copy.copy(ray.data.DataContext.get_current())
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1
    with ray.data.DataContext.current(context):
        data = ray.data.from_items(
            [{"job": pickle.dumps(job)} for job in jobs], override_num_blocks=len(jobs)
        )
        with warnings.catch_warnings():
            # Until Ray 2.64 removes it, this is the only way to bound the attempts at a job.
            warnings.filterwarnings("ignore", message=".*ray_remote_args")
            data = data.map_batches(
                kind,
                fn_constructor_args=arguments,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(
                    size=min(crew.workers, len(jobs)), max_tasks_in_flight_per_actor=1
                ),
                num_cpus=crew.cpus,
                num_gpus=crew.gpus,
                max_restarts=-1,
                max_task_retries=ATTEMPTS - 1,
            )
        for row in data.iter_rows():
            answer = pickle.loads(row["answer"])
            if "error" in answer:
                raise PysegError(answer["error"])
            yield answer


__all__ = ["ShardedPredictions", "evaluate", "predict"]
