"""Models that `pyseg export` wrote, run by onnxruntime or by torch without their Python.

A file holds a network with its normalisation: images [N, 3, H, W] uint8 RGB to logits [N, C, h, w]
at the network's own stride; and a description of it, JSON under the name ``pyseg``.
"""

from __future__ import annotations

import io
import json
import tempfile
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DeviceError, ImageError, PysegError, WeightsError, require
from ..files import check_json
from .semantic import SemanticModel

DESCRIPTION = "pyseg"  # key of an ONNX file's metadata
FILE = "extra/pyseg.json"  # in a .pt2 archive, below its root folder
FORMAT = 1
SHAPE = {
    "format": int,
    "kind": str,
    "model": str,
    "classes": [str],
    "palette": [[int]],
    "temperature": float,
    "outputs": [str],
    "batch": [(int, type(None))],
    "height": [(int, type(None))],
    "width": [(int, type(None))],
}
_LARGEST_TEXT = 16 << 20  # bytes of a description that are read
_PLACEHOLDER = ("class 0",)


def onnx(*, path: str | Path | None = None, length: int | None = None) -> ExportedModel:
    """A model that `pyseg export --format onnx` wrote, run by onnxruntime on the CPU.

    Refiners, metrics and ``tta`` take it like any other. It offers no feature maps, and resized
    images, as of ``tta='scales'``, are rounded to 8 bits, which is what the file takes.

    Args:
        path: the file.
        length: its bytes, where a saved pipeline brings the file itself; not for specs.

    Raises:
        ImportError: onnxruntime is not installed (extra ``onnx``).
        WeightsError: there is no such file, or `pyseg export` has not written it.

    Example:
        >>> pyseg.build("onnx(path='streetnet.onnx')+crf")("street.jpg")
    """
    require("onnxruntime", extra="onnx")
    return _model("onnx", path, length)


def pt2(*, path: str | Path | None = None, length: int | None = None) -> ExportedModel:
    """A model that `pyseg export` wrote as torch-export or aoti, run by torch on the CPU.

    As `onnx` otherwise. **An aoti file is a compiled program, which may do anything: load only
    those of people whom you trust.** It runs on processors that have the instructions of the one it
    was compiled on, with the torch that compiled it.

    Args:
        path: the file.
        length: its bytes, where a saved pipeline brings the file itself; not for specs.

    Raises:
        WeightsError: there is no such file, or `pyseg export` has not written it.

    Example:
        >>> pyseg.build("pt2(path='streetnet.pt2')+crf")("street.jpg")
    """
    return _model("pt2", path, length)


def _model(runner: str, path: str | Path | None, length: int | None) -> ExportedModel:
    if (path is None) == (length is None):
        raise ValueError(f"path must be a file of `pyseg export`, got {path!r}")
    if path is None:
        assert length is not None
        return ExportedModel(runner, torch.zeros(length, dtype=torch.uint8))
    path = Path(path).expanduser()
    if not path.is_file():
        raise WeightsError(f"path={str(path)!r}: there is no such file; `pyseg export` writes one")
    return loaded(runner, path.read_bytes(), str(path))


def loaded(runner: str, content: bytes, source: str) -> ExportedModel:
    """The model that a file's bytes hold; ``source`` is what errors call it.

    Raises:
        WeightsError: it is none of ours, or damaged.
    """
    # An empty tensor has no memory to be made of.
    model = ExportedModel(runner, torch.frombuffer(bytearray(content or b" "), dtype=torch.uint8))
    model.read(source)
    return model


class ExportedModel(SemanticModel):
    """A file of `pyseg export` as a model, on the CPU.

    It is an ``nn.Module`` whose only state is the file, so that it is pickled and saved with it.

    Args:
        runner: ``"onnx"`` or ``"pt2"``.
        content: the file's bytes, uint8.
    """

    description: dict[str, Any]
    network: _File

    def __init__(self, runner: str, content: Tensor) -> None:
        super().__init__(_File(runner, content), _PLACEHOLDER)
        self.description = {}

    def read(self, source: str) -> None:
        """Takes classes, colours and sizes from the file.

        Raises:
            WeightsError: it is none of ours, or damaged; ``source`` is what the message calls it.
        """
        self.description = found = _described(self.network.runner, self.network.content(), source)
        self.classes = tuple(found["classes"])
        self.palette = tuple((r, g, b) for r, g, b in found["palette"])
        self.temperature = float(found["temperature"])
        self.network.start(source, found)
        if found["batch"][1] is not None:
            self.max_batch_pixels = 1  # one image at a time

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """As `torch.nn.Module.load_state_dict`; the file is another one from then on."""
        result = super().load_state_dict(state_dict, *args, **options)
        self.read("the file in a saved pipeline")
        return result

    def config(self) -> dict[str, Any]:
        """What makes room for the file, which `Pipeline.save` writes among the weights."""
        return {"path": None, "length": len(self.network.file)}

    def train(self, mode: bool = True) -> ExportedModel:
        """Refuses training mode: an exported file does not learn."""
        if mode:
            raise PysegError(
                "an exported file cannot be trained: train the model that it was exported from"
            )
        super().train(mode)
        return self

    def to(self, *args: Any, **options: Any) -> ExportedModel:
        """As `torch.nn.Module.to`, on the CPU alone.

        Raises:
            DeviceError: another device.
        """
        device = torch._C._nn._parse_to(*args, **options)[0]
        if device is not None and device.type != "cpu":
            raise DeviceError(
                f"an exported file runs on the CPU, got device {str(device)!r}: leave the device "
                "out, or use the model that it was exported from"
            )
        return self

    def forward(self, images: Tensor, *, features: bool = False) -> dict[str, Any]:
        """Logits ``"out"`` [N, C, h, w] of images [N, 3, H, W] uint8, or floats in 0..1.

        Raises:
            ImageError: a size that the file is not for.
            ValueError: another shape.
            TypeError: another dtype.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [N, 3, H, W] RGB, got {list(images.shape)}")
        if images.is_floating_point():
            images = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
        elif images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, or floating point in 0..1, got {images.dtype}")
        for side, length in zip(("height", "width"), images.shape[2:], strict=True):
            least, most = self.description[side]
            if length < least or (most is not None and length > most):
                wanted = f"{least}" if least == most else f"at least {least}"
                raise ImageError(
                    f"an image has {side} {length}, and the exported file takes {wanted}: resize "
                    "it, or export the model for other sizes"
                )
        values = self.network(images.contiguous())
        return dict(zip(self.description["outputs"], values, strict=True))


class _File(nn.Module):
    """Bytes that compute; what runs them is made by `start`, and again after pickling."""

    file: Tensor

    def __init__(self, runner: str, content: Tensor) -> None:
        super().__init__()
        self.runner = runner
        self.register_buffer("file", content)
        self._run: Callable[[Tensor], list[Tensor]] | None = None
        self._started: tuple[str, Mapping[str, Any]] = ("", {})
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()

    def content(self) -> bytes:
        return self.file.numpy().tobytes()

    def start(self, source: str, description: Mapping[str, Any]) -> None:
        """Makes what runs the file.

        Raises:
            WeightsError: it is damaged.
        """
        self._started = source, description
        starts = {"onnx": _onnx_runner, "torch-export": _program_runner, "aoti": _aoti_runner}
        try:
            self._run = starts[description["kind"]](self.content())
        except ImportError:
            raise
        except Exception as error:  # each runtime has errors of its own
            raise WeightsError(
                f"{source} does not load ({type(error).__name__}: {str(error)[:300]}): it is "
                "damaged, or of another version of what runs it; export it again"
            ) from error

    def forward(self, images: Tensor) -> list[Tensor]:
        if self._run is None:
            with self._lock:
                if self._run is None:
                    self.start(*self._started)
        assert self._run is not None
        return self._run(images)


def _onnx_session(content: bytes) -> Any:
    runtime: Any = require("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _onnx_runner(content: bytes) -> Callable[[Tensor], list[Tensor]]:
    session = _onnx_session(content)
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(value) for value in session.run(None, {name: images.numpy()})]

    return run


def _program_runner(content: bytes) -> Callable[[Tensor], list[Tensor]]:
    program = torch.export.load(io.BytesIO(content))
    # Guards also forbid sizes that only another layout in memory tells apart; what the file is for
    # stands in its description, and its parity was measured on such sizes.
    module = program.module(check_guards=False)
    return lambda images: list(module(images))


def _aoti_runner(content: bytes) -> Callable[[Tensor], list[Tensor]]:
    with tempfile.TemporaryDirectory() as folder:  # unpacked when it is loaded
        path = Path(folder) / "model.pt2"
        path.write_bytes(content)
        module = torch._inductor.aoti_load_package(str(path))
    return lambda images: list(module(images))


def _described(runner: str, content: bytes, source: str) -> dict[str, Any]:
    """The description in a file, checked before anything else of it is run."""

    def refuse(reason: str) -> WeightsError:
        return WeightsError(f"{source} is no file of `pyseg export`: {reason}")

    text = _onnx_text(content, refuse) if runner == "onnx" else _archive_text(content, refuse)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse(f"its description is no JSON ({error})") from None
    check_json(found, SHAPE, "description", refuse)
    if found["format"] != FORMAT:
        raise refuse(f"its format is {found['format']}, this pyseg reads {FORMAT}; upgrade pyseg")
    kinds = ("onnx",) if runner == "onnx" else ("torch-export", "aoti")
    colours = [value for colour in found["palette"] for value in colour]
    whole = (
        found["kind"] in kinds
        and found["classes"]
        and found["outputs"][:1] == ["out"]
        and len(found["palette"]) == len(found["classes"])
        and all(len(colour) == 3 for colour in found["palette"])
        and all(0 <= value <= 255 for value in colours)
        and all(len(found[side]) == 2 and found[side][0] for side in ("batch", "height", "width"))
        and found["temperature"] > 0
    )
    if not whole:
        raise refuse("its description contradicts itself")
    return found


def _onnx_text(content: bytes, refuse: Callable[[str], Exception]) -> str:
    try:
        metadata = _onnx_session(content).get_modelmeta().custom_metadata_map
    except ImportError:
        raise
    except Exception as error:  # onnxruntime's own, of several bases
        raise refuse(f"onnxruntime cannot read it ({str(error)[:300]})") from error
    if DESCRIPTION not in metadata:
        raise refuse(f"its metadata lack {DESCRIPTION!r}")
    return metadata[DESCRIPTION]


def _archive_text(content: bytes, refuse: Callable[[str], Exception]) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            named = [entry for entry in archive.infolist() if entry.filename.endswith(f"/{FILE}")]
            if len(named) != 1 or named[0].file_size > _LARGEST_TEXT:
                raise refuse(f"it has no {FILE}")
            return archive.read(named[0]).decode()
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError, EOFError) as error:
        raise refuse(f"it is damaged, or no archive ({error})") from error
