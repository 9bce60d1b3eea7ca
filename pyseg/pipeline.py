"""`build`: a spec to a `Pipeline` of a model and refiners, and what a pipeline can do."""

from __future__ import annotations

import html
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from . import hub, models, refiners
from . import image as images_module
from .contract import deprecated
from .devices import (
    checked_device,
    computes_in_bfloat16,
    count_flops,
    measure_peak_memory,
    synchronize,
)
from .errors import PluginError, PysegError, SpecError, UnknownName
from .files import read_json, remove_abandoned, replacing, some, write_json, write_text
from .registry import MAX_CLASSES, Registry, accepted_options, made_from, naming_failures
from .spec import Spec, StageSpec, parse, shown
from .types import Model, Refiner, Segmentation

if TYPE_CHECKING:
    from .promptable import Promptable
    from .session import Kind, Session

DEFAULT = "default"
MAX_STAGES = 100
PRECISIONS = ("fp32", "bf16", "auto")
_PROBE = 256  # pixels of a side, of the part of an image by which "auto" chooses
_MEASURING = threading.Lock()  # one of all, as a pipeline is to be pickled
FORMAT = 1  # of a saved pipeline's folder
DESCRIPTION = "pipeline.json"  # in it


@dataclass(frozen=True)
class Stage:
    """A stage as built: its spec, and the model or refiner that was made from it."""

    spec: StageSpec
    component: Any  # what predicts or refines
    named: bool = True  # whether a registry knows the spec's name; else it is that of a class

    @property
    def object(self) -> Any:
        """`component`, by its earlier name: deprecated."""
        deprecated("Stage.object", since="1.0", instead="Stage.component")
        return self.component

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def text(self) -> str:
        """Canonical text of this stage alone; in angle brackets where no name makes it."""
        return str(self.spec) if self.named else f"<{self.spec.name}>"


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

    Calls keep no state and switch no modes, so that one pipeline serves many threads. Made by
    `build` and `load`, or of objects:

    Args:
        stages: a model, an object with ``classes`` and ``predict(images)`` (see
            `pyseg.types.Model`); then refiners, each an object with ``refine(image, prediction)``
            or anything that can be called so.
        num_classes: that the model was asked for, if it was.
        precision: see `build`.

    Raises:
        PluginError: a stage is no such object.
        ValueError: another ``precision``.

    Example:
        >>> Pipeline([model, CRF(iterations=3), lambda image, p: p.with_logits(2 * p.logits)])
    """

    def __init__(
        self, stages: Sequence[Any], *, num_classes: int | None = None, precision: str = "fp32"
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {shown(precision)}"
            )
        self.stages = tuple(_as_stage(index, stage) for index, stage in enumerate(stages))
        if not self.stages:
            raise PysegError("a pipeline needs at least a model, got no stages")
        self._num_classes = num_classes
        self.precision = precision
        self._faster: dict[torch.device, bool] = {}  # whether bfloat16 was, for "auto"

    @property
    def model(self) -> Any:
        """The first stage's model."""
        return self.stages[0].component

    @property
    def refiners(self) -> tuple[Any, ...]:
        """What the later stages refine with."""
        return tuple(stage.component for stage in self.stages[1:])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by index."""
        return tuple(self.model.classes)

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are; the CPU where it has none."""
        parameters = getattr(self.model, "parameters", None)
        first = next(iter(parameters()), None) if parameters else None
        return first.device if first is not None else torch.device("cpu")

    def __str__(self) -> str:
        return "+".join(stage.text for stage in self.stages)

    def __repr__(self) -> str:
        return f"<Pipeline {self} ({len(self.classes)} classes, {self.device})>"

    def _repr_html_(self) -> str:
        """What notebooks show: a table of the stages."""
        rows = "".join(
            f"<tr><td>{'refiner' if index else 'model'}</td>"
            f"<td><code>{html.escape(stage.text)}</code></td>"
            f"<td>{html.escape(type(stage.component).__name__)}</td>"
            f"<td>{count_parameters(stage.component):,}</td></tr>"
            for index, stage in enumerate(self.stages)
        )
        return (
            f"<table><caption>Pipeline: {len(self.classes)} classes, {self.device}</caption>"
            "<tr><th></th><th>stage</th><th>made</th><th>parameters</th></tr>"
            f"{rows}</table>"
        )

    @overload
    def __call__(
        self, images: list | tuple, *, names: Sequence[str] | None = None
    ) -> list[Segmentation]: ...
    @overload
    def __call__(self, images: Any) -> Segmentation: ...
    def __call__(self, images, *, names=None):
        """Segments one image or a list of images.

        Args:
            images: a path, PIL image, array [H, W, 3] RGB or tensor [3, H, W] RGB, or a list of
                such, of any sizes (see `pyseg.image.read_image`).
            names: what errors call the images of a list; None = their paths or sizes.

        Returns:
            One `Segmentation`, or a list of them for a list.

        Raises:
            ImageError: an image cannot be read.
        """
        several = isinstance(images, (list, tuple))
        sources = images if several else [images]
        read = images_module.read_image
        files = sum(isinstance(source, (str, os.PathLike)) for source in sources)
        if min(files, torch.get_num_threads()) > 1:  # decoders use one core each
            with ThreadPoolExecutor(min(files, torch.get_num_threads())) as pool:
                decoded = list(pool.map(read, sources))
        else:
            decoded = [read(source) for source in sources]
        tensors = [image.to(self.device) for image in decoded]
        called = names or [_name_of(s, tensor) for s, tensor in zip(sources, tensors, strict=True)]
        predictions: list[Segmentation] = []
        for index, _ in enumerate(self.stages):
            predictions = self._apply(index, tensors, predictions, called)
        return predictions if several else predictions[0]

    def _apply(
        self,
        index: int,
        images: list[Tensor],
        predictions: list[Segmentation],
        names: Sequence[str],
    ) -> list[Segmentation]:
        stage = self.stages[index]
        component = stage.component
        if not images:
            return []
        if isinstance(component, torch.nn.Module) and component.training:
            raise PysegError(
                f"stage {stage.text!r} is in training mode, in which predictions depend on their "
                "batch and change the model; call its eval() first"
            )
        failed = f"stage {stage.text!r}"
        wanted = {  # features, by later stages; naming a stage's own looks at all of its weights
            name
            for refiner in self.refiners[index:]
            for name in getattr(refiner, "wanted_features", ())
        }
        offers = bool(wanted) and getattr(component, "features_key", None) in wanted
        options = {"features": True} if offers else {}
        if index > 0 and not hasattr(component, "refine_batch"):
            refine = getattr(component, "refine", component)
            results = []
            for image, prediction, name in zip(images, predictions, names, strict=True):
                with naming_failures(failed, f" on image {name}"):
                    results.append(refine(image, prediction, **options))
        else:
            with naming_failures(failed, f" on image{'s'[: len(names) - 1]} {some(names)}"):
                if index > 0:
                    results = list(component.refine_batch(images, predictions))
                else:
                    with self._autocast(images[0]):
                        results = list(component.predict(images, **options))
        if len(results) != len(images):
            raise PluginError(
                f"stage {stage.text!r} returned {len(results)} predictions for {len(images)} images"
            )
        for image, result in zip(images, results, strict=True):
            if not isinstance(result, Segmentation):
                raise PluginError(
                    f"stage {stage.text!r} must return pyseg.Segmentation, got "
                    f"{type(result).__name__}"
                )
            if tuple(result.size) != tuple(image.shape[1:]):
                raise PluginError(
                    f"stage {stage.text!r} returned a Segmentation of size {tuple(result.size)} "
                    f"for an image of size {tuple(image.shape[1:])}"
                )
        results = [
            replace(result, features=None)
            if result.features and not result.features.keys() & wanted
            else result
            for result in results
        ]
        return [
            result if result.image is not None else replace(result, image=image)
            for image, result in zip(images, results, strict=True)
        ]

    def _autocast(self, image: Tensor) -> AbstractContextManager[Any]:
        """In which the model predicts: bfloat16, or what the caller has set."""
        narrow = self.precision == "bf16" or (self.precision == "auto" and self._is_faster(image))
        return torch.autocast(image.device.type, torch.bfloat16) if narrow else nullcontext()

    def _is_faster(self, image: Tensor) -> bool:
        """Whether the model is faster in bfloat16, timed once, on a part of the first image."""
        device = image.device
        if not isinstance(self.model, models.SemanticModel) or not computes_in_bfloat16(device):
            return False
        with _MEASURING:
            if device not in self._faster:
                part = image[:, :_PROBE, :_PROBE]
                seconds = {}
                for narrow in (False, True):
                    with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
                        self.model.predict([part])  # warms up
                        synchronize(device)
                        start = time.perf_counter()
                        self.model.predict([part])
                        synchronize(device)
                    seconds[narrow] = time.perf_counter() - start
                self._faster[device] = seconds[True] < seconds[False]
            return self._faster[device]

    def trace(
        self, image: Any, *, memory: bool = False, flops: bool = False, name: str | None = None
    ) -> list[StageResult]:
        """Runs one image and keeps what every stage returned, with its wall time.

        Args:
            image: as for calling the pipeline.
            memory: measure peak memory too (which costs some milliseconds a stage).
            flops: count floating-point operations too, by ``torch.utils.flop_counter``: 2 for every
                multiply-add of torch's matrix products, convolutions and attention, nothing for
                other operations and for pyseg's kernels. The times then include the counting.
            name: what errors call the image; None = its path or size.

        Returns:
            One `StageResult` per stage. The time includes the stage's label map, computed here,
            so that lazily and eagerly labelled stages compare.
        """
        tensor = images_module.read_image(image).to(self.device)
        names = [_name_of(image, tensor) if name is None else name]
        predictions: list[Segmentation] = []
        results = []
        for index, stage in enumerate(self.stages):
            with measure_peak_memory(self.device, memory) as peak, count_flops(flops) as counted:
                synchronize(self.device)
                start = time.perf_counter()
                predictions = self._apply(index, [tensor], predictions, names)
                _ = predictions[0].labels
                synchronize(self.device)
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

    def session(
        self,
        image: Any,
        start: Any = None,
        *,
        edit: Kind | None = None,
        promptable: Promptable | None = None,
    ) -> Session:
        """Begins to edit an image by hand: clicks and boxes, a brush, undo and redo.

        Args:
            image: as for calling the pipeline.
            start: what is edited, as `pyseg.Session` takes it; None = this pipeline's prediction.
            edit: ``"labels"``, ``"segments"`` or ``"instances"`` of it; None = what is there.
            promptable: what answers clicks and boxes; None = that of the first stage which has
                one, as ``sam`` and ``sam2`` do.

        Example:
            >>> session = pyseg.build("streetnet+sam2").session("street.jpg")
        """
        from .session import Session

        found = (getattr(stage.component, "generator", None) for stage in self.stages)
        tensor = images_module.read_image(image)
        begun = self(tensor) if start is None else start
        return Session(
            tensor,
            None if isinstance(begun, Segmentation) else self.classes,
            start=begun,
            edit=edit,
            promptable=promptable or next((one for one in found if one is not None), None),
            palette=getattr(self.model, "palette", None),
            things=getattr(self.model, "things", None),
        )

    def to(self, target: str | torch.device | torch.dtype) -> Pipeline:
        """Moves every stage to a device, or the model to a dtype, and returns the pipeline.

        Args:
            target: a device for all stages; or a floating-point dtype for the model alone, such as
                ``torch.bfloat16``: refiners compute in float32 whatever the logits are.

        Raises:
            DeviceError: there is no such device.
            PysegError: a dtype that is not floating point, or a model without parameters.
        """
        if isinstance(target, torch.dtype):
            if not target.is_floating_point:
                raise PysegError(f"a model's dtype must be floating point, got {target}")
            if not isinstance(self.model, torch.nn.Module):
                raise PysegError(
                    f"model {self.stages[0].text!r} is no torch.nn.Module and has no dtype"
                )
            self.model.to(target)
            return self
        device = checked_device(target)
        for stage in self.stages:
            if hasattr(stage.component, "to"):
                stage.component.to(device)
        return self

    def save(self, folder: str | Path) -> Path:
        """Writes spec and weights to a folder that `pyseg.load` reads.

        The folder is written beside its final place and renamed, so that it is whole or absent.
        Saved are the state dicts of stages that have one and what their ``config()`` gives, the
        options that rebuild them where their text does not.

        Raises:
            FileExistsError: ``folder`` exists and holds something other than a saved pipeline.
            PysegError: ``folder`` is a file, or a stage was given as an object that no registered
                name makes.
        """
        return self._save(folder)

    def _save(self, folder: str | Path, card: str | None = None) -> Path:
        """`save`, with a model card in the folder where one is given."""
        from .weights import save_state, temperature_metadata

        folder = Path(folder)
        for ancestor in (folder, *folder.parents):
            if ancestor.exists() and not ancestor.is_dir():
                raise PysegError(
                    f"cannot save to {str(folder)!r}: {str(ancestor)!r} is a file; give a folder"
                )
        if folder.exists() and not (folder / DESCRIPTION).is_file() and any(folder.iterdir()):
            raise FileExistsError(f"folder {folder} exists and is no saved pipeline; give another")
        for index, stage in enumerate(self.stages):
            _check_rebuildable(index, stage)
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder.parent)
        with replacing(folder) as draft:
            draft.mkdir()
            entries = []
            for index, stage in enumerate(self.stages):
                config = getattr(stage.component, "config", None)
                entry: dict[str, Any] = {
                    "stage": stage.text,
                    "config": dict(config()) if callable(config) else {},
                    "weights": None,
                }
                state = _state_of(stage.component)
                if state:
                    file = re.sub(r"[^\w.-]", "_", f"{index}_{stage.name}.safetensors")
                    entry["weights"] = file
                    temperature = getattr(stage.component, "temperature", 1.0)
                    metadata = None if temperature == 1 else temperature_metadata(temperature)
                    save_state(draft / file, state, metadata=metadata)
                entries.append(entry)
            description = {
                "format": FORMAT,
                "stages": entries,
                "num_classes": self._num_classes,
                "classes": list(self.classes),
                "palette": getattr(self.model, "palette", None),
            }
            write_json(draft / DESCRIPTION, description)
            if card is not None:
                write_text(draft / hub.CARD, card)
        return folder

    def card(
        self,
        *,
        name: str | None = None,
        repo_id: str | None = None,
        scores: str | Path | Sequence[str | Path] = (),
        licence: str | None = None,
    ) -> str:
        """A model card in Markdown, with what was measured and nothing else.

        Args:
            name: heading; None = that of the repository, or the pipeline's text.
            repo_id: of the Hub, ``"owner/name"``, for the lines that load it.
            scores: the ``report.json`` of `pyseg evaluate --report` of this pipeline, or several.
            licence: of the weights: an identifier of the Hub's, such as ``"cc-by-nc-4.0"``, or a
                text; None = what the model's factory says of the weights that it knows by name.

        Raises:
            PysegError: scores that are no report, or of another pipeline.

        Example:
            >>> print(pyseg.build("streetnet+crf").card(scores="report/report.json"))
        """
        text, first = str(self), self.stages[0].name
        known = models.info(first).to_dict() if first in models.list() else {}
        paths = [scores] if isinstance(scores, (str, Path)) else scores
        return hub.model_card(
            name=name or (text if repo_id is None else repo_id.rpartition("/")[2]),
            load=repo_id or "FOLDER",
            spec=text,
            stages=[
                (stage.text, type(stage.component).__name__, count_parameters(stage.component))
                for stage in self.stages
            ],
            classes=self.classes,
            palette=getattr(self.model, "palette", None),
            facts=known,
            licence=licence or known.get("licence"),
            scores=[hub.read_scores(path, text) for path in paths],
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        scores: str | Path | Sequence[str | Path] = (),
        licence: str | None = None,
        **push_options: Any,
    ) -> Path:
        """`save` with a model card, which `pyseg.from_pretrained` reads.

        Args:
            save_directory: the folder.
            repo_id: of the Hub; None = the folder's name.
            push_to_hub: send it there, too.
            scores: see `card`.
            licence: see `card`.
            push_options: of `push_to_hub`.

        Raises:
            PysegError: as `save` and `card` do.
            HubError: as `push_to_hub` does.
        """
        if push_options and not push_to_hub:
            raise ValueError(f"{', '.join(push_options)}: options of push_to_hub=True")
        folder = Path(save_directory)
        card = self.card(
            name=None if repo_id else folder.name, repo_id=repo_id, scores=scores, licence=licence
        )
        self._save(folder, card)
        if push_to_hub:
            hub.upload(folder, repo_id or folder.name, **push_options)
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        scores: str | Path | Sequence[str | Path] = (),
        licence: str | None = None,
        **options: Any,
    ) -> str:
        """Sends the pipeline, with a model card, to a repository of the Hugging Face Hub.

        Args:
            repo_id: ``"owner/name"``, made if absent.
            scores: see `card`.
            licence: see `card`.
            options: ``commit_message``, ``private``, ``token``, ``branch``, ``create_pr`` and
                ``api`` of `pyseg.hub.upload`.

        Returns:
            The URL of the commit.

        Raises:
            HubError: no access, or no network.
            ImportError: huggingface_hub is not installed (extra ``hub``).
            PysegError: as `save` and `card` do.
        """
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "pipeline"
            self.save_pretrained(target, repo_id=repo_id, scores=scores, licence=licence)
            return hub.upload(target, repo_id, **options)


def build(
    spec: str | Spec | torch.nn.Module | Model,
    *refiners: str | Spec | Refiner | Callable[..., Segmentation],
    num_classes: int | None = None,
    weights: str | Path | None = DEFAULT,
    device: str | torch.device | None = None,
    classes: Sequence[str] | None = None,
    palette: Sequence[tuple[int, int, int]] | None = None,
    precision: str = "fp32",
    **options: Any,
) -> Pipeline:
    """Builds a pipeline: of the stages that a spec describes, of your own network, or of both.

    All stages are put into evaluation mode, a network that is given too.

    Args:
        spec: a model, then any refiners, such as ``"streetnet+crf(iterations=5)"``. Options of a
            stage stand in parentheses and win over the arguments below. Or a model as an object
            (see `pyseg.types.Model`), or any network that `pyseg.models.SemanticModel` can wrap:
            it maps normalised RGB [N, 3, H, W] to logits [N, C, h, w].
        refiners: more stages: text as above, objects with ``refine(image, prediction)``, or
            functions and modules that are called so.
        num_classes: passed to the model; None = as many as its weights have. Of a network: the
            number of its classes, where ``classes`` does not name them.
        weights: passed to the model: a name it knows, a path or a URL. None = random weights in
            every stage that a name makes, which needs no network.
        device: where all stages run; None = the CPU, or where the model is that is given.
        classes: names of the classes of a network, in the order of its logits' channels.
        palette: one RGB colour per class of a network.
        precision: of the model's arithmetic; refiners compute in float32. ``"fp32"``; ``"bf16"``,
            by autocast; ``"auto"``: bf16 for a `SemanticModel` on a processor or GPU with
            instructions for it (AMX, AVX512-BF16) where it is the faster on a part of the first
            image. It rounds logits to 8 bits: about one pixel in a thousand gets another label.
        options: further options of the model that a spec names.

    Raises:
        SpecError: the spec does not parse, a stage has no such option, or its stages do not fit.
        UnknownName: no model or refiner has that name.
        PluginError: a plugin is broken or makes the wrong kind of object.
        WeightsError: weights are absent, unreachable or do not fit.
        DeviceError: there is no such device.
        ValueError: another ``precision``.

    Example:
        >>> segmenter = pyseg.build("streetnet+crf")
        >>> segmenter("street.jpg").overlay().save("overlay.png")
        >>> segmenter = pyseg.build(network, "crf", classes=("road", "sky"))
    """
    _check_no_folder(spec)
    target = None if device is None else checked_device(device)
    given: list[Any] = []
    for part in (spec, *refiners):
        given += parse(part).stages if isinstance(part, (str, Spec)) else [part]
    if len(given) > MAX_STAGES:
        raise SpecError(f"a pipeline may have {MAX_STAGES} stages, got {len(given)}")
    first, *later = given
    if isinstance(first, StageSpec):
        if classes is not None or palette is not None:
            raise SpecError(
                f"classes and palette name those of a network; model {first.name!r} has its own: "
                "give num_classes"
            )
        for option in options:
            if option in first.options:
                raise SpecError(f"stage {first}: option {option!r} is given twice")
        first = StageSpec(first.name, {**first.options, **options})
        stages = [Stage(first, _named_model(first, num_classes, weights))]
    else:
        unfit = [*options, *(["weights"] if weights not in (DEFAULT, None) else [])]
        if unfit:
            raise SpecError(
                f"{', '.join(unfit)}: options of a model that a spec names, but "
                f"{_kind_of(first)} is made already"
            )
        stages = [_as_stage(0, _given_model(first, classes, num_classes, palette))]
    context: dict[str, Any] = {"num_classes": len(stages[0].component.classes)}
    if weights is None:
        context["weights"] = None
    for part in later:
        if isinstance(part, StageSpec):
            stages.append(Stage(part, _made(len(stages), part, context)))
        else:
            if isinstance(part, torch.nn.Module):
                part.eval()
            stages.append(_as_stage(len(stages), part))
    pipeline = Pipeline(stages, num_classes=num_classes, precision=precision)
    return pipeline if target is None else pipeline.to(target)


def compose(
    model: Model | Pipeline,
    *refiners: str | Spec | Refiner | Callable[..., Segmentation],
    device: str | torch.device | None = None,
) -> Pipeline:
    """A pipeline of a model that is there already, and refiners.

    Args:
        model: from `pyseg.models.create` or `pyseg.models.wrap`, any object of
            `pyseg.types.Model`, or a pipeline, whose stages come first.
        refiners: names with options, such as ``"crf+sam2"``, objects, or functions, as in `build`.
        device: where all stages run; None = where the model is.

    Raises:
        SpecError: ``model`` is text or a network that does not say what its classes are, or a
            refiner's text does not parse.
        UnknownName: no refiner has that name.
        PluginError: a stage is no such object.
        DeviceError: there is no such device.

    Example:
        >>> model = pyseg.models.wrap(network, classes=("road", "sky"))
        >>> result = pyseg.compose(model, "crf+sam2")("street.jpg")
    """
    if isinstance(model, (str, Spec)):
        raise SpecError(
            f"compose takes a model as an object, got the text {shown(str(model))}; pyseg.build "
            "takes names"
        )
    if isinstance(model, torch.nn.Module) and not hasattr(model, "predict"):
        raise SpecError(
            f"{_kind_of(model)} does not say what its classes are: "
            "pyseg.models.wrap(network, classes=[…]) makes a model of it"
        )
    if not isinstance(model, Pipeline):
        return build(model, *refiners, device=device)
    added = build(model.model, *refiners, device=device).stages[1:]
    made = Pipeline(
        [*model.stages, *added], num_classes=model._num_classes, precision=model.precision
    )
    return made if device is None else made.to(device)


def load(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    precision: str = "fp32",
) -> Pipeline:
    """Reads a pipeline that `Pipeline.save` wrote, or a file of `pyseg export`, in evaluation mode.

    Reads files of this folder alone, whatever is written in it, and needs no network.

    Args:
        folder: that `Pipeline.save` wrote; or a file of `pyseg export`, ``.onnx`` or ``.pt2``,
            whose pipeline is that one stage.
        device: where all stages run; None = the CPU.
        precision: see `build`; it is not saved.

    Raises:
        PysegError: the folder is no saved pipeline, damaged, or of a newer pyseg.
        WeightsError: a weight file is absent or damaged.

    Example:
        >>> segmenter = pyseg.load("out/streetnet.onnx")
    """
    from . import weights

    folder = Path(folder)
    if runner := exported_by(folder):
        spec = Spec((StageSpec(runner, {"path": str(folder)}),))
        return build(spec, device=device, precision=precision)
    description = _read_description(folder)
    context = {"num_classes": len(description["classes"]), "weights": None}
    stages: list[Stage] = []
    for index, entry in enumerate(description["stages"]):
        stage: StageSpec = entry["stage"]
        # Never the weights that the text names: what there is to load lies here.
        options = {k: v for k, v in stage.options.items() if k != "weights"} | entry["config"]
        made = _made(index, StageSpec(stage.name, options), context)
        if entry["weights"] is not None:
            if not _has_state(made):
                raise PysegError(
                    f"{folder / DESCRIPTION} names weights of stage {stage.name!r}, which takes "
                    "none: is this folder of another version of its package?"
                )
            path = folder / entry["weights"]
            weights.load_into(made, weights.load_state(path), path)
            if hasattr(made, "temperature"):
                made.temperature = weights.load_temperature(path)
        if index == 0:
            made.classes = description["classes"]
            if description["palette"] is not None:
                made.palette = description["palette"]
        stages.append(Stage(stage, made))
    pipeline = Pipeline(stages, num_classes=description["num_classes"], precision=precision)
    return pipeline if device is None else pipeline.to(checked_device(device))


def from_pretrained(
    id_or_dir: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    device: str | torch.device | None = None,
    precision: str = "fp32",
) -> Pipeline:
    """Reads a pipeline from a folder or from the Hugging Face Hub.

    Of a repository its ``pipeline.json``, safetensors and card are fetched, and no code.

    Args:
        id_or_dir: a folder that `Pipeline.save` or `Pipeline.save_pretrained` wrote, or a
            repository that `Pipeline.push_to_hub` filled, ``"owner/name"``.
        revision: branch, tag or commit of the repository; None = the main branch.
        token: of the Hub; None = the one that `hf auth login` stored.
        cache_dir: None = the Hub's own.
        force_download: fetch again what is in the cache.
        local_files_only: ask no network; so too where ``PYSEG_OFFLINE`` is set.
        device: as for `load`.
        precision: as for `load`.

    Raises:
        HubError: no such folder or repository, no access, or no network.
        ImportError: a repository, and huggingface_hub is not installed (extra ``hub``).
        PysegError: as for `load`.

    Example:
        >>> pyseg.from_pretrained("owner/street-scenes")("street.jpg").save("street.png")
    """
    if os.path.exists(id_or_dir):
        folder = Path(id_or_dir)
    else:
        folder = hub.download(
            str(id_or_dir),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
    return load(folder, device=device, precision=precision)


def exported_by(path: str | Path) -> str | None:
    """The model that runs a file of `pyseg export`, by its suffix; None for all else."""
    path = Path(path)
    kind = {".onnx": "onnx", ".pt2": "pt2"}.get(path.suffix)
    return kind if kind and path.is_file() else None


def _read_description(folder: Path) -> dict[str, Any]:
    """pipeline.json, checked: stages parsed, classes and palette as tuples."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise PysegError(f"{folder} is no saved pipeline: it has no {DESCRIPTION}")

    def damaged(reason: str) -> PysegError:
        return PysegError(f"{path} is damaged: {reason}")

    found = read_json(path, damaged)

    if not isinstance(found, dict):
        raise damaged(f"it must hold an object, got {shown(found)}")
    if found.get("format") != FORMAT:
        raise PysegError(
            f"{folder} has format {shown(found.get('format'))}, this pyseg reads {FORMAT}: "
            "upgrade pyseg-toolkit"
        )
    entries = found.get("stages")
    if not isinstance(entries, list) or not entries:
        raise damaged(f"stages must be a list of at least one, got {shown(entries)}")
    stages = []
    for index, entry in enumerate(entries):
        place = f"stages[{index}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("stage"), str):
            raise damaged(f"{place} must be an object with the text 'stage', got {shown(entry)}")
        try:
            (stage,) = parse(entry["stage"]).stages
        except (SpecError, ValueError) as error:
            raise damaged(f"{place}: {shown(entry['stage'])} is not one stage ({error})") from None
        file = entry.get("weights")
        if file is not None and not (
            isinstance(file, str)
            and file.strip(". ")
            and Path(file).name == file
            and file.isprintable()
            and len(file) <= 200
        ):
            raise damaged(
                f"{place}: weights must be the name of a file of the folder, got {shown(file)}"
            )
        config = entry.get("config", {})
        if not isinstance(config, dict):
            raise damaged(f"{place}: config must be an object, got {shown(config)}")
        if file is not None and entry.get("size") is not None:
            config = {"size": entry["size"], **config}  # as it was written before `config`
        stages.append({"stage": stage, "config": config, "weights": file})
    classes = found.get("classes")
    if not isinstance(classes, list) or not classes or not _all(str, classes):
        raise damaged(f"classes must be a list of names, got {shown(classes)}")
    palette = found.get("palette")
    if palette is not None:
        colours = palette if isinstance(palette, list) else [None]
        whole = all(
            isinstance(c, list) and len(c) == 3 and _all(int, c) and 0 <= min(c) <= max(c) <= 255
            for c in colours
        )
        if not whole or len(colours) != len(classes):
            raise damaged(
                f"palette must be null or {len(classes)} colours of three numbers from 0 to 255, "
                f"got {shown(palette)}"
            )
        palette = tuple(map(tuple, palette))
    count = found.get("num_classes")
    if count is not None and (not _all(int, [count]) or count < 1):
        raise damaged(f"num_classes must be null or a positive number, got {shown(count)}")
    return {
        "stages": stages,
        "classes": tuple(classes),
        "palette": palette,
        "num_classes": count,
    }


def _all(kind: type, values: Sequence[Any]) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def _made(index: int, stage: StageSpec, context: Mapping[str, Any]) -> Any:
    """The model or refiner that a stage describes; an error says where its name would belong."""
    wanted, other = (models, refiners) if index == 0 else (refiners, models)
    registry: Registry[Any] = wanted._registry
    try:
        return registry.make(stage, context)
    except UnknownName:
        if stage.name.rpartition(":")[2] not in other._registry.list():
            raise
        place = "first" if index == 0 else "later"
        raise SpecError(
            f"{stage.name!r} is a {other._registry.kind}, but the {place} stage of a spec is a "
            f"{registry.kind}: write model+refiner+refiner, such as 'streetnet+crf'"
        ) from None


def _named_model(stage: StageSpec, num_classes: int | None, weights: str | Path | None) -> Any:
    context: dict[str, Any] = {}
    if num_classes is not None:
        context["num_classes"] = num_classes
    if weights != DEFAULT:
        context["weights"] = weights
    model = _made(0, stage, context)
    if any(value is not None for value in context.values()):
        accepted = accepted_options(models.get(stage.name))
        for name, value in context.items():
            if accepted is not None and name not in accepted and value is not None:
                raise SpecError(f"model {stage.name!r} takes no {name}, got {name}={shown(value)}")
    wanted = stage.options.get("num_classes", num_classes)
    if wanted is not None and len(model.classes) != wanted:
        raise PluginError(
            f"model {stage.name!r} was asked for {wanted} classes and has {len(model.classes)}"
        )
    return model


def _given_model(
    model: Any,
    classes: Sequence[str] | None,
    num_classes: int | None,
    palette: Sequence[tuple[int, int, int]] | None,
) -> Any:
    """The object itself where it predicts, else a network in a `SemanticModel`."""
    predicts = hasattr(model, "predict") and hasattr(model, "classes")
    if predicts and not isinstance(model, type):
        if classes is not None or palette is not None or num_classes not in (None, _count(model)):
            raise SpecError(
                f"{_kind_of(model)} has its own classes, {_count(model)} of them: leave out "
                "classes, palette and num_classes"
            )
        if isinstance(model, torch.nn.Module):
            model.eval()
        return model
    if not isinstance(model, torch.nn.Module):
        raise PluginError(
            f"a pipeline begins with a name, a torch.nn.Module or an object with classes and "
            f"predict(images) (see pyseg.types.Model), got {_kind_of(model)}"
        )
    if classes is None and num_classes is None:
        raise SpecError(
            f"{_kind_of(model)} does not say what its classes are: give classes=[…], their names "
            "in the order of its logits' channels, or num_classes="
        )
    if num_classes is not None and not 1 <= num_classes <= MAX_CLASSES:
        raise SpecError(f"num_classes must be 1 to {MAX_CLASSES}, got {num_classes}")
    names = [f"class {i}" for i in range(num_classes or 0)] if classes is None else classes
    if isinstance(names, str) or (num_classes is not None and len(names) != num_classes):
        raise SpecError(f"classes must be {num_classes or ''} names, got {shown(names)}")
    try:
        return models.SemanticModel(model, names, palette).eval()
    except ValueError as error:
        raise SpecError(str(error)) from error


def _count(model: Any) -> int:
    return len(model.classes)


def _check_no_folder(spec: Any) -> None:
    """Raises SpecError for the path of a folder in place of a spec."""
    if not isinstance(spec, str):
        return
    if os.path.isdir(spec) and spec not in models.list():  # a folder may be called like a model
        raise SpecError(
            f"{spec!r} is a saved pipeline: pyseg.load reads it"
            if (Path(spec) / DESCRIPTION).is_file()
            else f"folder {spec!r} is no saved pipeline: it has no {DESCRIPTION}"
        )
    if runner := exported_by(spec):
        raise SpecError(f"{spec!r} is an exported file: pyseg.load reads it, or {runner}(path=…)")
    if spec.startswith(("./", "../", "/", "~")):
        raise SpecError(
            f"there is no folder {shown(spec)}, and a spec begins with the name of a model"
        )


def _kind_of(given: Any) -> str:
    """What a stage that was given as an object is, for messages."""
    return f"the class {given.__name__}" if isinstance(given, type) else f"a {_class_of(given)}"


def _class_of(component: Any) -> str:
    if isinstance(component, models.SemanticModel):
        component = component.network
    return getattr(component, "__name__", type(component).__name__).strip("<>")


def _as_stage(index: int, given: Any) -> Stage:
    """A stage of a pipeline from a `Stage`, or from the object that predicts or refines."""
    if isinstance(given, Stage):
        return given
    registry: Registry[Any] = models._registry if index == 0 else refiners._registry
    if isinstance(given, (str, Spec, StageSpec)):
        raise PluginError(
            f"a Pipeline takes objects, got the text {shown(str(given))}; pyseg.build takes names"
        )
    what = f"stage {index} ({_kind_of(given)})"
    if index == 0 and isinstance(given, torch.nn.Module) and not hasattr(given, "predict"):
        raise PluginError(
            f"{what} is a network without predict: pyseg.build(network, …, classes=[…]) or "
            "pyseg.models.SemanticModel makes a model of it"
        )
    if index == 0 or isinstance(given, type) or not callable(given):
        registry.check_kind(given, what)
    spec = made_from(given)
    if spec is None and callable(getattr(given, "config", None)):
        name = registry.name_of(type(given))
        spec = None if name is None else StageSpec(name, dict(given.config()))
    if spec is None:
        return Stage(StageSpec(_class_of(given)), given, named=False)
    return Stage(spec, given)


def _check_rebuildable(index: int, stage: Stage) -> None:
    """Raises PysegError where `load` could not make the stage again."""
    if not stage.named:
        family = "models" if index == 0 else "refiners"
        raise PysegError(
            f"stage {stage.text!r} was given as an object that no registered name makes, so it "
            f"cannot be saved: register what makes it (pyseg.{family}.register('name')(function)) "
            "and build the pipeline by that name, or pickle the pipeline"
        )
    try:
        same = parse(stage.text).stages == (stage.spec,)
    except SpecError:
        same = False
    if not same:
        raise PysegError(
            f"stage {shown(stage.text)} cannot be saved: its options are no literals, which text "
            "can hold"
        )


def _has_state(component: Any) -> bool:
    return hasattr(component, "state_dict") and hasattr(component, "load_state_dict")


def _state_of(component: Any) -> Mapping[str, Tensor]:
    return component.state_dict() if _has_state(component) else {}


def count_parameters(component: Any) -> int:
    """Numbers that a stage has learned: those of the modules that it is or holds."""
    held = (
        [component]
        if isinstance(component, torch.nn.Module)
        else getattr(component, "__dict__", {}).values()
    )
    found = {
        parameter
        for module in held
        if isinstance(module, torch.nn.Module)
        for parameter in module.parameters()
    }
    return sum(parameter.numel() for parameter in found)


def _name_of(source: Any, image: Tensor) -> str:
    """What an image is called in errors: its file, or its size."""
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    return f"of {image.shape[1]} x {image.shape[2]} pixels"
