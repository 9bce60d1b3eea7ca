"""`cost`: time, memory, parameters and floating-point operations of every stage of a pipeline."""

from __future__ import annotations

import os
import re
import statistics
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import resize

from .errors import PysegError
from .image import ImageSource, read_image
from .pipeline import Pipeline, count_parameters


@dataclass(frozen=True)
class StageCost:
    """What one stage costs on one image."""

    stage: str  # its name; "total" for the sum
    milliseconds: float  # median over the rounds; of the total, median of the sums
    peak_bytes: int | None  # taken above what was held before; of the total, the largest
    parameters: int
    flops: int  # as torch counts them: 0 where it counts nothing, as in pyseg's kernels


@dataclass(frozen=True)
class Cost:
    """The result of `cost`."""

    spec: str
    size: tuple[int, int]  # (H, W) of the image
    device: str
    threads: int  # of torch, on the CPU
    rounds: int
    stages: tuple[StageCost, ...]  # the last is the total

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rows = [
            {
                "stage": row.stage,
                "milliseconds": round(row.milliseconds, 3),
                "peak_megabytes": None if row.peak_bytes is None else row.peak_bytes / 1e6,
                "parameters": row.parameters,
                "flops": row.flops,
            }
            for row in self.stages
        ]
        return {**vars(self), "size": list(self.size), "stages": rows}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table that is printed, as text."""
        head = ["stage", "ms/image", "images/s", "peak MB", "parameters", "GFLOPs"]
        rows = [
            [
                row.stage,
                f"{row.milliseconds:.1f}",
                f"{1e3 / row.milliseconds:.2f}",
                "?" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
                f"{row.parameters:,}",
                f"{row.flops / 1e9:.2f}" if row.flops else "-",
            ]
            for row in self.stages
        ]
        return head, rows


def cost(pipeline: Pipeline, image: ImageSource, *, rounds: int = 5) -> Cost:
    """What each stage of a pipeline takes for an image.

    Time is the median of some runs after one to warm up, each with the stage's label map; memory
    and operations come from runs of their own (see `pyseg.pipeline.Pipeline.trace` for what is
    counted). Time and memory of refiners depend on the image, so give a typical one.

    Args:
        pipeline: from `pyseg.build`.
        image: anything that `pyseg.image.read_image` takes.
        rounds: runs that are timed.

    Raises:
        PysegError: ``rounds`` is not positive.

    Example:
        >>> cost(pyseg.build("streetnet+crf"), "street.jpg").stages[-1].milliseconds
    """
    if rounds < 1:
        raise PysegError(f"rounds must be at least 1, got {rounds}")
    tensor = read_image(image).to(pipeline.device)
    pipeline.trace(tensor)
    peaks = [result.peak_bytes for result in pipeline.trace(tensor, memory=True)]
    flops = [result.flops or 0 for result in pipeline.trace(tensor, flops=True)]
    times = [[r.milliseconds for r in pipeline.trace(tensor)] for _ in range(rounds)]
    parameters = [count_parameters(stage.component) for stage in pipeline.stages]
    rows = [
        StageCost(stage.name, statistics.median(column), peak, numbers, count)
        for stage, column, peak, numbers, count in zip(
            pipeline.stages, zip(*times, strict=True), peaks, parameters, flops, strict=True
        )
    ]
    measured = [peak for peak in peaks if peak is not None]
    total = StageCost(
        "total",
        statistics.median(map(sum, times)),
        max(measured) if measured else None,
        sum(row.parameters for row in rows),
        sum(flops),
    )
    return Cost(
        str(pipeline),
        (int(tensor.shape[1]), int(tensor.shape[2])),
        str(pipeline.device),
        torch.get_num_threads(),
        rounds,
        (*rows, total),
    )


def read_sized(path: str | os.PathLike[str] | None, size: str | None) -> Tensor:
    """An image, by default the bundled street image, resized to ``size`` such as ``1024x2048``.

    Raises:
        PysegError: ``size`` is not HxW in pixels.
        ImageError: the image cannot be read.
    """
    image = read_image(Path(__file__).parent / "assets" / "street.jpg" if path is None else path)
    if size is None:
        return image
    found = re.fullmatch(r"(\d+)x(\d+)", size)
    if found is None or not all(0 < int(side) <= 65536 for side in found.groups()):
        raise PysegError(
            f"--size must be height x width in pixels, such as 1024x2048, got {size!r}"
        )
    return resize(image, [int(side) for side in found.groups()], antialias=True)


class _Callable(types.ModuleType):
    """So that `pyseg.cost` is the function whether or not this module was imported by name."""

    def __call__(self, pipeline: Pipeline, image: ImageSource, *, rounds: int = 5) -> Cost:
        return cost(pipeline, image, rounds=rounds)


sys.modules[__name__].__class__ = _Callable

__all__ = ["Cost", "StageCost", "cost", "read_sized"]
