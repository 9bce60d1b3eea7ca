"""`export_model`: a semantic model as a file of ONNX or torch, held against the original.

What is written is run, by `pyseg.models.exported`, on images of the user's before it gets its name:
a file that computes something else is refused, with a report of what differs.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import re
import statistics
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import models, page
from .errors import ExportError, PysegError, require
from .files import finite, make_folder, replacing, some, write_json
from .image import read_image
from .models.exported import DESCRIPTION, FILE, FORMAT, ExportedModel, loaded
from .models.semantic import _Method
from .ops import confusion_matrix
from .pipeline import Pipeline
from .prediction import Predictions, find_images
from .progress import notebook_bar
from .types import Segmentation

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".aoti.pt2"}  # and their suffixes
TIE = 1e-4  # of the largest logit: classes that are closer than this are equal but for rounding
MAX_DELTA = 1e-3  # of the largest logit: what float arithmetic in another order may change
MAX_FLIPS_INT8 = 0.02  # share of pixels, by default
CALIBRATION_IMAGES = 32  # that int8 takes, at most, spread evenly
_FOLDED = 1 << 30  # elements of constants that are computed when a file is written
_SAMPLE = (96, 128)  # height and width that dynamic sizes are traced at
_CROPS = ((1, 1), (3, 2), (8, 5))  # what other sizes of the first image lack, at the far edges


@dataclass(frozen=True)
class Export:
    """A file that was written, and what was measured of it."""

    file: Path
    report_file: Path
    report: dict[str, Any]  # JSON-ready

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table that is printed, as text."""
        return ["what", "value"], rows_of(self.report)


def export_model(
    pipeline: Pipeline | models.SemanticModel,
    images: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    *,
    format: str = "onnx",
    size: tuple[int, int] | None = None,
    calibration: str | Path | Sequence[str | Path] | None = None,
    max_flips: float | None = None,
    licence: str | None = None,
    limit: int | None = None,
    track: Callable[[Sequence[Path]], Iterable[Path]] = notebook_bar,
) -> Export:
    """Writes a semantic model as a file, if the file computes what the model computes.

    The file takes images [N, 3, H, W] uint8 RGB, normalises them and gives logits [N, C, h, w] at
    the network's own stride (``logits``). Labels are the argmax after bilinear upsampling to the
    image's size with ``align_corners=False``. Classes, colours, temperature, sizes and licence
    stand in its metadata, as JSON under ``pyseg``. `pyseg.load` runs it.

    Both are run on ``images`` and on three crops of the first one, of odd sizes unless ``size`` is
    given. The file is refused where logits are not finite; where the label of more pixels than
    ``max_flips`` differs beyond ties, pixels whose two labels the model itself tells apart by less
    than 1e-4 of its largest logit; and, but for int8, where logits differ by more than 1e-3 of the
    largest.

    Args:
        pipeline: a semantic model alone, without refiners.
        images: files, folders or glob patterns: what the file will be used on.
        output_dir: for the file, named after the model, and its report, ``<file>.json``.
        format: ``"onnx"``; ``"torch-export"``, which torch runs without the model's Python;
            ``"aoti"``, compiled by torch's inductor and the C++ compiler for this processor.
        size: (height, width) for a file of one size, which some networks need and all runtimes
            like; ``images`` are resized to it. None = any size; the number of images is free, too,
            where the network allows it.
        calibration: images, as above, to quantise by: onnx of int8. At most 32 are used.
        max_flips: share of pixels, from 0 to 1. None = 0, and 0.02 for int8.
        licence: of the weights, for the metadata; None = what the model's factory says of those
            that it knows by name.
        limit: of the images; they are then spread evenly. None = all.
        track: wraps the sequence of images, for a progress bar.

    Raises:
        ExportError: the pipeline has what cannot leave, the network cannot be traced, or the file
            was refused: then ``output_dir`` holds the report alone.
        ImportError: a package of the extra ``onnx`` is absent.
        ImageError: an image cannot be read.
        PysegError: no images.
        ValueError: another ``format``, or a number out of range.

    Example:
        >>> export_model(pyseg.build("streetnet"), "photos", "out").report["flips"]["beyond_ties"]
        0
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if calibration is not None and format != "onnx":
        raise ValueError(f"calibration is for int8, which only onnx has, got format={format!r}")
    if max_flips is None:
        max_flips = 0.0 if calibration is None else MAX_FLIPS_INT8
    if not 0 <= max_flips <= 1:
        raise ValueError(f"max_flips must be a share of pixels, 0 to 1, got {max_flips}")
    if size is not None and min(size) < 1:
        raise ValueError(f"size must be (height, width) in pixels, got {size}")
    if format == "onnx":
        require("onnx", extra="onnx")
        require("onnxruntime", extra="onnx")
        require("onnxscript", extra="onnx")
    name, model = exportable(pipeline)
    files = image_files(images, limit, "images")
    samples = None if calibration is None else image_files(calibration, CALIBRATION_IMAGES)
    folder = make_folder(output_dir, "output_dir")
    target = folder / f"{name}{'.int8' if samples else ''}{FORMATS[format]}"
    program, description = traced(name, model, format, size, licence)
    content = WRITERS[format](program, description)
    if samples is not None:
        content = quantised(content, _sized(samples, size))
    exported = loaded("onnx" if format == "onnx" else "pt2", content, str(target))
    parity = Parity(model, exported, max_flips, None if samples else MAX_DELTA)
    for index, file in enumerate(track(files)):
        image = _read(file, size)
        if index == 0 and size is None:
            for rows, columns in _CROPS:
                high, wide = max(1, image.shape[1] - rows), max(1, image.shape[2] - columns)
                parity.add(f"{file}, {high} x {wide} of it", image[:, :high, :wide], timed=False)
        parity.add(str(file), image, timed=index > 0 or len(files) == 1)  # the first warms up
    about = {
        "model": name,
        "format": format,
        "int8": samples is not None,
        "file": target.name,
        "bytes": len(content),
        **{side: description[side] for side in ("batch", "height", "width")},
    }
    report = about | parity.report() | {"made": page.made([("cpu", torch.get_num_threads())])}
    report_file = write_json(f"{target}.json", finite(report))
    if report["reasons"]:
        target.unlink(missing_ok=True)  # of an earlier run: the report is not of that one
        raise ExportError(
            f"{target.name} is refused: {'; '.join(report['reasons'])}. Nothing was written but "
            f"{report_file}"
        )
    with replacing(target) as draft:
        draft.write_bytes(content)
    return Export(target, report_file, report)


def exportable(pipeline: Pipeline | models.SemanticModel) -> tuple[str, models.SemanticModel]:
    """A pipeline's only stage, and its name for files.

    Raises:
        ExportError: it has refiners, options of prediction, or another kind of model.
    """
    name, model = type(pipeline).__name__.lower(), pipeline
    if isinstance(pipeline, Pipeline):
        first, *later = pipeline.stages
        if later:
            raise ExportError(
                f"{', '.join(stage.text for stage in later)} cannot leave pyseg: a file holds a "
                f"network, and refiners are no part of one. Export {first.text!r} alone and "
                f"refine what the file gives: onnx(path='{first.name}.onnx')+"
                f"{'+'.join(stage.text for stage in later)}"
            )
        name, model = first.name.rpartition(":")[2], first.component
    if isinstance(model, ExportedModel):
        raise ExportError(f"{name} is an exported file already: export the model it was made from")
    if not isinstance(model, models.SemanticModel) or (
        type(model).predict is not models.SemanticModel.predict
    ):
        raise ExportError(
            f"{name} cannot leave pyseg: a {type(model).__name__} finds objects, whose number and "
            "post-processing no file holds; semantic models alone are exported (docs/export.md)"
        )
    if model._method != _Method():
        raise ExportError(
            f"{name} predicts by tta or windows, which are no part of its network: leave tta, "
            "crop_size and stride out, and give them to the exported file's stage"
        )
    models.require_evaluation_mode(model)
    if model.mean.device.type != "cpu":
        raise ExportError(
            f"{name} is on {model.mean.device}, and files are written and checked on the CPU: "
            "move it there by to('cpu')"
        )
    return re.sub(r"[^\w.-]", "_", name).strip(".") or "model", model


def image_files(
    images: str | Path | Sequence[str | Path], limit: int | None, argument: str = "calibration"
) -> list[Path]:
    """The image files of paths, folders and patterns; ``limit`` of them, spread evenly.

    Raises:
        PysegError: there are none, or ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise PysegError(f"limit must be at least 1, got {limit}")
    found = Predictions(Path())
    given = [images] if isinstance(images, (str, Path)) else images
    files = [Path(file) for path in given for file, _ in find_images(str(path), found)]
    if found.failed:
        raise PysegError(f"{argument}: {'; '.join(found.failed.values())}")
    if not files:
        raise PysegError(f"{argument} is empty: the file is to be held against the model on some")
    count = len(files) if limit is None else min(limit, len(files))
    return [files[k * len(files) // count] for k in range(count)]


def _read(file: Path, size: tuple[int, int] | None) -> Tensor:
    image = read_image(file)
    if size is None or tuple(image.shape[1:]) == tuple(size):
        return image
    resized = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def _sized(files: Sequence[Path], size: tuple[int, int] | None) -> Iterator[Tensor]:
    return (_read(file, size) for file in files)


# --- tracing ----------------------------------------------------------------------------------


class _Network(nn.Module):
    """A model with its normalisation, as tensors in and out."""

    def __init__(self, model: models.SemanticModel, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, tuple(outputs)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.model(images)
        return tuple(found[name] for name in self.outputs)


def traced(
    name: str,
    model: models.SemanticModel,
    format: str,
    size: tuple[int, int] | None,
    licence: str | None,
) -> tuple[Any, dict[str, Any]]:
    """The model as torch's ExportedProgram, and its description.

    With as free a shape as the network allows: any number of images of any size, else one at a
    time.

    Raises:
        ExportError: it cannot be traced.
    """
    free = torch.export.Dim.DYNAMIC
    height, width = _SAMPLE if size is None else size
    sides = {2: free, 3: free} if size is None else {}
    with torch.no_grad():
        found = model(torch.zeros(1, 3, height, width, dtype=torch.uint8))
    network = _Network(model, [key for key in ("out", "uncertainty") if key in found])
    for count, shape in ((2, {0: free, **sides}), (1, sides)):
        images = torch.zeros(count, 3, height, width, dtype=torch.uint8)
        try:
            with torch.no_grad(), _quiet():
                program = torch.export.export(network, (images,), dynamic_shapes=(shape,))
            break
        except Exception as error:  # torch raises what it likes, from its own and the model's code
            failure = error
    else:
        raise ExportError(
            f"{name} cannot be traced by torch.export ({type(failure).__name__}: {_brief(failure)})"
            + ("; a file of one size may work: give size=(height, width)" if size is None else "")
        ) from failure
    if any(node.target is math.ceil for node in program.graph.nodes):
        raise ExportError(
            f'{name} rounds sides up as it goes (math.ceil, as timm\'s padding "same" does), which '
            "torch cannot write for images of any size; a file of one size works: give "
            "size=(height, width), on the command line --size HxW"
        )
    (batch, _, high, wide) = _ranges(program)
    return program, {
        "format": FORMAT,
        "kind": format,
        "model": name,
        "classes": list(model.classes),
        "palette": [list(colour) for colour in model.palette],
        "temperature": model.temperature,
        "outputs": list(network.outputs),
        "input": "uint8 RGB [N, 3, H, W]; normalised within",
        "batch": [1, batch[1]],
        "height": high,
        "width": wide,
        "licence": licence or _licence(name),
        "pyseg": page.__version__,
        "torch": torch.__version__,
    }


def _ranges(program: Any) -> list[list[int | None]]:
    """Least and largest length of every dimension of the program's input; None = any."""
    (images,) = (
        node
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    )
    found: list[list[int | None]] = []
    for length in images.meta["val"].shape:
        if isinstance(length, int):
            found.append([length, length])
        else:
            bounds = program.range_constraints[length.node.expr]
            largest = bounds.upper
            found.append([int(bounds.lower), int(largest) if largest.is_Integer else None])
    return found


def _licence(name: str) -> str | None:
    return models.info(name).licence if name in models.list() else None


def _brief(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the chatter of exporters about their own doings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- writing ----------------------------------------------------------------------------------


_POOLINGS = (
    torch.ops.aten.adaptive_avg_pool2d.default,
    torch.ops.aten._adaptive_avg_pool2d.default,
)


def _pooled_by_products(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """``adaptive_avg_pool2d`` [N, C, H, W] to [N, C, *output_size], as two matrix products.

    ONNX has no such operator, and what torch makes of it in its place, for ONNX and in inductor,
    fits only images whose sides are those that it was traced with.
    """
    for dim, count in zip((3, 2), reversed(output_size), strict=True):
        length = x.shape[dim]
        cells = torch.arange(count, device=x.device)[:, None]
        first = torch.div(cells * length, count, rounding_mode="floor")
        end = torch.div((cells + 1) * length + (count - 1), count, rounding_mode="floor")
        places = torch.arange(length, device=x.device)
        inside = ((places >= first) & (places < end)).to(x.dtype)
        mean = inside / (end - first).to(x.dtype)  # [count, length]
        x = x @ mean.t() if dim == 3 else mean @ x
    return x


def _without_poolings(program: Any) -> Any:
    return program.run_decompositions({op: _pooled_by_products for op in _POOLINGS})


def _onnx(program: Any, description: dict[str, Any]) -> bytes:
    names = ["logits", *description["outputs"][1:]]
    try:
        with torch.no_grad(), _quiet():
            program = _without_poolings(program)
            made: Any = torch.onnx.export(program, dynamo=True, verbose=False)
            # Weights times the factors of a normalisation, which torch folds where they are small
            # alone: int8 would take the others for activations, of one range for all channels.
            made.model = require("onnxscript.optimizer", extra="onnx").optimize(
                made.model, input_size_limit=_FOLDED, output_size_limit=_FOLDED
            )
    except Exception as error:  # of torch.onnx's or onnxscript's many kinds
        cause = error.__cause__ or error
        raise ExportError(
            f"{description['model']} cannot be written as ONNX ({type(cause).__name__}: "
            f"{_brief(cause)}); "
            "torch-export may do"
        ) from error
    graph = made.model.graph
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name
    proto = made.model_proto
    proto.producer_name, proto.producer_version = "pyseg", page.__version__
    proto.metadata_props.add(key=DESCRIPTION, value=json.dumps(description))
    graph = proto.graph
    lengths = graph.input[0].type.tensor_type.shape.dim
    sides = zip(lengths, ("batch", "", "height", "width"), strict=True)
    readable = {length.dim_param: side for length, side in sides if length.dim_param}
    if readable:
        symbol = re.compile(rf"\b({'|'.join(map(re.escape, readable))})\b")
        for value in (*graph.input, *graph.output, *graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = symbol.sub(lambda found: readable[found[1]], dim.dim_param)
    return proto.SerializeToString()


def _torch_export(program: Any, description: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    extra = {Path(FILE).name: json.dumps(description)}
    try:
        with _quiet():
            torch.export.save(program, stream, extra_files=extra)
    except Exception as error:  # what its serialization knows no form for
        raise ExportError(
            f"{description['model']} cannot be written by torch.export ({type(error).__name__}: "
            f"{_brief(error)}); a file of one size may work: give size=(height, width)"
        ) from error
    return stream.getvalue()


def _aoti(program: Any, description: dict[str, Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        try:
            with torch.no_grad(), _quiet():
                program = _without_poolings(program)
                torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        except Exception as error:  # inductor's, or that of the compiler that it runs
            raise ExportError(
                f"{description['model']} cannot be compiled by torch's inductor "
                f"({type(error).__name__}: {_brief(error)}); it needs a C++ compiler (g++ or "
                "clang++, or that which $CXX names) and Python's headers"
            ) from error
        with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
            root = archive.namelist()[0].partition("/")[0]
            archive.writestr(f"{root}/{FILE}", json.dumps(description))
        return path.read_bytes()


WRITERS: dict[str, Callable[[Any, dict[str, Any]], bytes]] = {
    "onnx": _onnx,
    "torch-export": _torch_export,
    "aoti": _aoti,
}


def quantised(content: bytes, images: Iterable[Tensor]) -> bytes:
    """An ONNX file of float32 as one whose convolutions and products are of 8 bits.

    By onnxruntime's static quantisation: ranges of activations are those on ``images``; weights are
    scaled by channel and use 7 bits, since processors without VNNI saturate at the products of 8.
    """
    quantization: Any = require("onnxruntime.quantization", extra="onnx")
    onnx: Any = require("onnx", extra="onnx")
    before = onnx.load_from_string(content)
    inputs = iter(images)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            image = next(inputs, None)
            return None if image is None else {before.graph.input[0].name: image[None].numpy()}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(content)
        quantization.quantize_static(
            source,
            target,
            Reader(),
            op_types_to_quantize=["Conv", "ConvTranspose", "Gemm", "MatMul"],
            per_channel=True,
            reduce_range=True,
        )
        after = onnx.load(target)
    del after.metadata_props[:]
    after.metadata_props.extend(before.metadata_props)
    after.producer_name, after.producer_version = before.producer_name, before.producer_version
    return after.SerializeToString()


# --- parity -----------------------------------------------------------------------------------


class Parity:
    """What differs between a model and its file, over images.

    Args:
        model: the original.
        exported: the same from a file.
        max_flips: share of pixels that may get another label beyond ties.
        max_delta: difference of logits, over the largest of an image's, that may be; None = any.
    """

    def __init__(
        self,
        model: models.SemanticModel,
        exported: models.SemanticModel,
        max_flips: float,
        max_delta: float | None,
    ) -> None:
        self.model, self.exported = model, exported
        self.max_flips, self.max_delta = max_flips, max_delta
        count = len(model.classes)
        self.matrix = torch.zeros(count, count, dtype=torch.int64)
        self.images: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.milliseconds: dict[str, list[float]] = {"original": [], "exported": []}

    def add(self, name: str, image: Tensor, *, timed: bool = True) -> None:
        """Counts the differences on an image [3, H, W] uint8."""
        original, before = _timed(self.model, image)
        try:
            exported, after = _timed(self.exported, image)
        except Exception as error:  # each runtime has errors of its own
            self.failures.append(f"it fails on {name}: {_brief(error)}")
            return
        if timed:
            self.milliseconds["original"].append(before)
            self.milliseconds["exported"].append(after)
        found = compared(original, exported)
        self.images.append({"name": name, **found})
        pair = (exported.labels[None], original.labels[None])
        self.matrix += confusion_matrix(*pair, len(original.classes))[0]

    def report(self) -> dict[str, Any]:
        """All that was counted, the limits, and for what reasons they are broken."""
        pixels = int(self.matrix.sum())
        flips, ties = (sum(image[key] for image in self.images) for key in ("flips", "ties"))
        share = (flips - ties) / max(1, pixels)
        delta, relative = (
            max((image[key] for image in self.images), default=0.0)
            for key in ("max_delta", "relative_delta")
        )
        reasons = self.failures[:1]
        broken = [image["name"] for image in self.images if not image["finite"]]
        if broken:
            reasons.append(f"its logits are not finite on {some(broken)}")
        if share > self.max_flips:
            worst = max(self.images, key=lambda image: image["flips"] - image["ties"])
            reasons.append(
                f"{flips - ties:,} of {pixels:,} pixels get another label beyond ties "
                f"({share:.4%}, at most {self.max_flips:.4%}), most of them on {worst['name']}"
            )
        if self.max_delta is not None and relative > self.max_delta:
            reasons.append(
                f"logits differ by {relative:.2e} of the largest, at most {self.max_delta:.0e}"
            )
        return {
            "images": len(self.images),
            "pixels": pixels,
            "miou": _miou(self.matrix),
            "flips": {"all": flips, "ties": ties, "beyond_ties": flips - ties, "share": share},
            "max_delta": delta,
            "relative_delta": relative,
            "milliseconds": {
                key: statistics.median(found) if found else None
                for key, found in self.milliseconds.items()
            },
            "limits": {"flips": self.max_flips, "relative_delta": self.max_delta, "tie": TIE},
            "reasons": reasons,
            "each": self.images,
        }


def compared(original: Segmentation, exported: Segmentation) -> dict[str, Any]:
    """Flips, those of them that are ties, and the largest difference of two predictions' logits."""
    assert original.logits is not None and exported.logits is not None
    if original.logits.shape != exported.logits.shape:
        raise ExportError(
            f"the file gives logits {list(exported.logits.shape)} where the model gives "
            f"{list(original.logits.shape)}: the exporter mistook a size"
        )
    scale = float(original.logits.abs().max())
    delta = float((original.logits - exported.logits).abs().max())
    # In inference mode made, so compared outside of autograd as they are.
    first, second = original.labels.long(), exported.labels.long()
    flipped = first != second
    ties = 0
    if bool(flipped.any()):
        full = original.full_logits()[:, flipped]
        margin = full.gather(0, first[flipped][None]) - full.gather(0, second[flipped][None])
        ties = int((margin <= TIE * scale).sum())
    return {
        "size": list(original.size),
        "flips": int(flipped.sum()),
        "ties": ties,
        "max_delta": delta,
        "relative_delta": delta / scale if scale else float(delta > 0),
        "finite": bool(exported.logits.isfinite().all()),
    }


def _timed(model: models.SemanticModel, image: Tensor) -> tuple[Segmentation, float]:
    start = time.perf_counter()
    (result,) = model.predict([image])
    return result, (time.perf_counter() - start) * 1e3


def _miou(matrix: Tensor) -> float:
    """Mean IoU of the exported labels with the original's as truth, over classes in either."""
    hits = matrix.diagonal().double()
    union = matrix.sum(0) + matrix.sum(1) - hits
    return float((hits / union)[union > 0].mean())  # nan where nothing was compared


def rows_of(report: dict[str, Any]) -> list[list[str]]:
    """A report as rows of a table."""
    flips, cost, limits = report["flips"], report["milliseconds"], report["limits"]
    sizes = " x ".join(_range(report[side]) for side in ("batch", "height", "width"))
    return [
        ["file", f"{report['file']}, {report['bytes'] / 1e6:.1f} MB"],
        ["images x height x width", sizes],
        ["checked on", f"{report['images']} images, {report['pixels']:,} pixels"],
        ["mIoU against the original", f"{report['miou']:.6f}"],
        [
            "pixels of another label",
            f"{flips['beyond_ties']:,} beyond ties (limit {limits['flips']:.2%}), "
            f"{flips['ties']:,} ties",
        ],
        [
            "largest change of a logit",
            f"{report['max_delta']:.2e}, {report['relative_delta']:.2e} of the largest logit",
        ],
        ["ms an image", f"{cost['exported']:.1f}, the original {cost['original']:.1f}"],
    ]


def _range(bounds: Sequence[int | None]) -> str:
    least, most = bounds
    return f"{least}" if least == most else f"{least} or more"
