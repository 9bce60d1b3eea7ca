"""`build`: a spec to a `Pipeline` of a model and refiners, and what a pipeline can do."""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from . import image as images_module
from . import models, refiners
from .errors import DeviceError, PluginError, PysegError, SpecError, UnknownName
from .files import remove_abandoned, replacing, write_json
from .registry import Registry, accepted_options, check_options
from .spec import Spec, StageSpec, parse
from .types import Model, Refiner, Segmentation

DEFAULT = "default"
FORMAT = 1  # of a saved pipeline's folder


@dataclass(frozen=True)
class Stage:
    """A stage as built: its spec and its object."""

    spec: StageSpec
    object: Any

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def text(self) -> str:
        """Canonical text of this stage alone."""
        return str(self.spec)


@dataclass(frozen=True)
class StageResult:
    """What one stage made of an image, and what it cost."""

    name: str
    prediction: Segmentation
    milliseconds: float
    peak_bytes: int | None  # above what was held before the stage; None where not measured
    flops: int | None = None  # as torch counts them; None where not counted


class Pipeline:
    """A model and any number of refiners, applied left to right.

    Calls keep no state, so that one pipeline serves many threads. Made by `build` and `load`.
    """

    def __init__(self, stages: Sequence[Stage], *, num_classes: int | None = None) -> None:
        self.stages = tuple(stages)
        self._num_classes = num_classes

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by index."""
        return self.stages[0].object.classes

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are; the CPU where it has none."""
        parameters = getattr(self.stages[0].object, "parameters", None)
        first = next(iter(parameters()), None) if parameters else None
        return first.device if first is not None else torch.device("cpu")

    def __str__(self) -> str:
        return "+".join(stage.text for stage in self.stages)

    def __repr__(self) -> str:
        return f"<Pipeline {self} ({len(self.classes)} classes, {self.device})>"

    @overload
    def __call__(self, images: list | tuple) -> list[Segmentation]: ...
    @overload
    def __call__(self, images: Any) -> Segmentation: ...
    def __call__(self, images):
        """Segments one image or a list of images.

        Args:
            images: a path, PIL image, array [H, W, 3] RGB or tensor [3, H, W] RGB, or a list of
                such, of any sizes (see `pyseg.image.read_image`).

        Returns:
            One `Segmentation`, or a list of them for a list.

        Raises:
            ImageError: an image cannot be read.
        """
        several = isinstance(images, (list, tuple))
        sources = images if several else [images]
        tensors = [images_module.read_image(source).to(self.device) for source in sources]
        predictions: list[Segmentation] = []
        for index, _ in enumerate(self.stages):
            predictions = self._apply(index, tensors, predictions)
        return predictions if several else predictions[0]

    def _apply(
        self, index: int, images: list[Tensor], predictions: list[Segmentation]
    ) -> list[Segmentation]:
        stage = self.stages[index]
        if not images:
            return []
        if index == 0:
            results = list(stage.object.predict(images))
        elif hasattr(stage.object, "refine_batch"):
            results = list(stage.object.refine_batch(images, predictions))
        else:
            results = [stage.object.refine(i, p) for i, p in zip(images, predictions, strict=True)]
        if len(results) != len(images):
            raise PluginError(
                f"stage {stage.name!r} returned {len(results)} predictions for {len(images)} images"
            )
        for image, result in zip(images, results, strict=True):
            if not isinstance(result, Segmentation):
                raise PluginError(
                    f"stage {stage.name!r} must return pyseg.Segmentation, got "
                    f"{type(result).__name__}"
                )
            if tuple(result.size) != tuple(image.shape[1:]):
                raise PluginError(
                    f"stage {stage.name!r} returned a Segmentation of size {tuple(result.size)} "
                    f"for an image of size {tuple(image.shape[1:])}"
                )
        return [
            result if result.image is not None else replace(result, image=image)
            for image, result in zip(images, results, strict=True)
        ]

    def trace(self, image: Any, *, memory: bool = False, flops: bool = False) -> list[StageResult]:
        """Runs one image and keeps what every stage returned, with its wall time.

        Args:
            image: as for calling the pipeline.
            memory: measure peak memory too (which costs some milliseconds a stage).
            flops: count floating-point operations too, by ``torch.utils.flop_counter``: 2 for every
                multiply-add of torch's matrix products, convolutions and attention, nothing for
                other operations and for pyseg's kernels. The times then include the counting.

        Returns:
            One `StageResult` per stage. The time includes the stage's label map, computed here,
            so that lazily and eagerly labelled stages compare.
        """
        tensor = images_module.read_image(image).to(self.device)
        predictions: list[Segmentation] = []
        results = []
        for index, stage in enumerate(self.stages):
            with _peak_memory(self.device, memory) as peak, _flop_counter(flops) as counted:
                _synchronize(self.device)
                start = time.perf_counter()
                predictions = self._apply(index, [tensor], predictions)
                _ = predictions[0].labels
                _synchronize(self.device)
                elapsed = time.perf_counter() - start
            results.append(
                StageResult(stage.name, predictions[0], elapsed * 1e3, peak(), counted())
            )
        return results

    def profile(self, image: Any) -> list[StageResult]:
        """Wall time and peak memory of every stage on an image, after one run to warm up.

        Peak memory is what the stage took above what was held before it: on the CPU from the
        kernel's high-water mark of the process, on CUDA from torch's allocator.
        """
        self.trace(image)
        return self.trace(image, memory=True)

    def run_stages(self, image: Any) -> list[Segmentation]:
        """The prediction after each stage."""
        return [result.prediction for result in self.trace(image)]

    def to(self, device: str | torch.device) -> Pipeline:
        """Moves every stage and returns the pipeline.

        Raises:
            DeviceError: there is no such device.
        """
        target = _checked_device(device)
        for stage in self.stages:
            if hasattr(stage.object, "to"):
                stage.object.to(target)
        return self

    def save(self, folder: str | Path) -> Path:
        """Writes spec and weights to a folder that `pyseg.load` reads.

        The folder is written beside its final place and renamed, so that it is whole or absent.

        Raises:
            FileExistsError: ``folder`` exists and holds something other than a saved pipeline.
        """
        from .weights import save_state

        folder = Path(folder)
        if folder.exists() and not (folder / "pipeline.json").is_file() and any(folder.iterdir()):
            raise FileExistsError(f"folder {folder} exists and is no saved pipeline; give another")
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder.parent)
        with replacing(folder) as draft:
            draft.mkdir()
            entries = []
            for index, stage in enumerate(self.stages):
                # `size` chooses an architecture where `weights` would otherwise tell it
                size = getattr(stage.object, "size", None)
                entry: dict[str, Any] = {"stage": stage.text, "size": size, "weights": None}
                if isinstance(stage.object, torch.nn.Module) and stage.object.state_dict():
                    entry["weights"] = f"{index}_{stage.name}.safetensors"
                    save_state(draft / entry["weights"], stage.object.state_dict())
                entries.append(entry)
            description = {
                "format": FORMAT,
                "stages": entries,
                "num_classes": self._num_classes,
                "classes": list(self.classes),
                "palette": getattr(self.stages[0].object, "palette", None),
            }
            write_json(draft / "pipeline.json", description)
        return folder


def build(
    spec: str | Spec,
    *,
    num_classes: int | None = None,
    weights: str | Path | None = DEFAULT,
    device: str | torch.device | None = None,
) -> Pipeline:
    """Builds the pipeline that a spec describes.

    Args:
        spec: a model, then any refiners, such as ``"streetnet+crf(iterations=5)"``. Options of a
            stage stand in parentheses and win over the arguments below.
        num_classes: passed to the model; None = as many as its weights have.
        weights: passed to the model: a name it knows, a path or a URL. None = random weights in
            every stage, which needs no network.
        device: where all stages run; None = the CPU.

    Raises:
        SpecError: the spec does not parse, a stage has no such option, or its stages do not fit.
        UnknownName: no model or refiner has that name.
        PluginError: a plugin is broken or makes the wrong kind of object.
        WeightsError: weights are absent, unreachable or do not fit.
        DeviceError: there is no such device.

    Example:
        >>> segmenter = pyseg.build("streetnet+crf")
        >>> segmenter("street.jpg").overlay().save("overlay.png")
    """
    parsed = parse(spec)
    target = None if device is None else _checked_device(device)
    stages: list[Stage] = []
    for index, stage in enumerate(parsed.stages):
        factory = _factory(index, stage)
        options = dict(stage.options)
        accepted = accepted_options(factory)
        check_options(stage, factory)
        passed: dict[str, Any] = {}
        if index == 0 and num_classes is not None:
            passed["num_classes"] = num_classes
        if index > 0 and "num_classes" in (accepted or {}):
            passed["num_classes"] = len(stages[0].object.classes)
        if weights is None or (index == 0 and weights != DEFAULT):
            passed["weights"] = weights
        for name, value in passed.items():
            if accepted is None or name in accepted:
                options.setdefault(name, value)
            elif index == 0 and value is not None:
                raise SpecError(f"model {stage.name!r} takes no {name}, got {name}={value!r}")
        stages.append(Stage(stage, _make(index, stage, factory, options)))
    pipeline = Pipeline(stages, num_classes=num_classes)
    return pipeline if target is None else pipeline.to(target)


def load(folder: str | Path, *, device: str | torch.device | None = None) -> Pipeline:
    """Reads a pipeline that `Pipeline.save` wrote; needs no network.

    Raises:
        PysegError: the folder is no saved pipeline, or of a newer pyseg.
        WeightsError: a weight file is absent or damaged.
    """
    from . import weights

    folder = Path(folder)
    try:
        description = json.loads((folder / "pipeline.json").read_text())
        entries = description["stages"]
        texts = [entry["stage"] for entry in entries]
    except FileNotFoundError:
        raise PysegError(f"{folder} is no saved pipeline: it has no pipeline.json") from None
    except (ValueError, KeyError, TypeError, NotADirectoryError) as error:
        raise PysegError(f"{folder}/pipeline.json is damaged: {error}") from error
    if description.get("format") != FORMAT:
        raise PysegError(
            f"{folder} has format {description.get('format')}, this pyseg reads {FORMAT}: "
            "upgrade pyseg-toolkit"
        )
    stages = []
    for index, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        (stage,) = parse(text).stages
        factory = _factory(index, stage)
        options = dict(stage.options)
        accepted = accepted_options(factory) or {}
        if "num_classes" in accepted:
            options.setdefault("num_classes", len(description["classes"]))
        if entry["weights"] and "weights" in accepted:
            options["weights"] = None  # the architecture alone; its weights lie here
            if entry["size"] is not None and "size" in accepted:
                options["size"] = entry["size"]
        made = _make(index, stage, factory, options)
        if entry["weights"]:
            path = folder / entry["weights"]
            weights.load_into(made, weights.load_state(path), path)
        if index == 0:
            made.classes = tuple(description["classes"])
            if description.get("palette"):
                made.palette = tuple(tuple(colour) for colour in description["palette"])
        stages.append(Stage(stage, made))
    pipeline = Pipeline(stages, num_classes=description["num_classes"])
    return pipeline if device is None else pipeline.to(device)


def _factory(index: int, stage: StageSpec) -> Callable[..., Any]:
    wanted, other = (models, refiners) if index == 0 else (refiners, models)
    registry: Registry = wanted._registry
    try:
        return registry.get(stage.name)
    except UnknownName:
        if stage.name not in other._registry.list():
            raise
        place = "first" if index == 0 else "later"
        raise SpecError(
            f"{stage.name!r} is a {other._registry.kind}, but the {place} stage of a spec is a "
            f"{registry.kind}: write model+refiner+refiner, such as 'streetnet+crf'"
        ) from None


def _make(index: int, stage: StageSpec, factory: Callable[..., Any], options: dict) -> Any:
    try:
        made = factory(**options)
    except PysegError:
        raise
    except (TypeError, ValueError) as error:
        raise SpecError(f"stage {stage}: {error}") from error
    kind, protocol, method = (
        ("model", Model, "classes and predict(images)")
        if index == 0
        else ("refiner", Refiner, "refine(image, prediction)")
    )
    if not isinstance(made, protocol):
        raise PluginError(
            f"{kind} {stage.name!r} made a {type(made).__name__} that lacks {method}; a "
            f"{kind} must follow pyseg.types.{kind.capitalize()}"
        )
    return made


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"device={device!r} is no torch device: {error}") from None
    if target.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (target.index or 0) >= count:
            reason = (
                f"this torch ({torch.__version__}) is a build without CUDA"
                if torch.version.cuda is None
                else f"torch sees {count} CUDA devices"
            )
            raise DeviceError(
                f"device={device!r} was asked for, but {reason}; use device='cpu', or see "
                "`pyseg doctor`"
            )
    return target


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _flop_counter(wanted: bool) -> Iterator[Callable[[], int | None]]:
    """Yields a function that, afterwards, gives the floating-point operations counted."""
    if not wanted:
        yield lambda: None
        return
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        yield counter.get_total_flops


@contextmanager
def _peak_memory(device: torch.device, wanted: bool) -> Iterator[Callable[[], int | None]]:
    """Yields a function that, afterwards, gives the bytes taken above what was held before."""
    peak: list[int | None] = [None]
    if not wanted or (device.type == "cpu" and not sys.platform.startswith("linux")):
        yield lambda: None
    elif device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: peak[0]
        peak[0] = torch.cuda.max_memory_allocated(device) - before
    else:
        # glibc keeps what was freed, and a stage that reuses it would seem to need nothing
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        before = _proc_status("VmRSS")
        yield lambda: peak[0]
        peak[0] = max(0, _proc_status("VmHWM") - before)


def _proc_status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
