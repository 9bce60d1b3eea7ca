"""Promptable segmenters by name: of Meta's packages, of transformers, or the bundled one."""

from __future__ import annotations

from pathlib import Path

from ..registry import promptables
from .base import Promptable
from .huggingface import is_transformers, load_transformers
from .nano import load_nano
from .sam import load_segment_anything, load_segment_anything_2

NANO = "nano"


def load_sam(
    weights: str | Path | None = "default",
    size: str | None = None,
    *,
    image_size: int | None = None,
    precision: str = "fp32",
) -> tuple[str, Promptable]:
    """SAM, one of its kind in transformers, or ``nano``, behind the protocol.

    Args:
        weights: ``"vit_b"``, ``"vit_l"`` or ``"vit_h"``, which are downloaded once; a local file
            or URL; ``"default"``, the published weights of ``size``; None, random weights. Or what
            `load_transformers` takes: ``"hf:REPOSITORY"``, or a folder with config.json.
        size: one of these three names; by default what ``weights`` are of, else ``"vit_b"``; or
            ``"nano"``, a small network of pyseg's own, whose weights are included; or the name of a
            plugin's, with options as in a spec: `pyseg list` shows them.
        image_size: side of the square that images are scaled to, a multiple of 16; None = 1024, of
            which the weights are. Not of ``"nano"``.
        precision: ``"bf16"`` embeds images in bfloat16. Not of ``"nano"``.

    Returns:
        The size, or the kind of a model of transformers, and the segmenter.

    Raises:
        WeightsError: the weights are absent, unreachable, gated, damaged or of another
            architecture.
        ImportError: ``segment-anything``, or ``transformers``, is not installed.

    Example:
        >>> size, segmenter = load_sam("hf:syscv-community/sam-hq-vit-base")
    """
    if size == NANO:
        if image_size is not None or precision != "fp32":
            raise ValueError("nano has neither image_size nor precision")
        return NANO, load_nano(weights)
    if size is not None and size.partition("(")[0] in promptables.list():
        if image_size is not None or precision != "fp32":
            raise ValueError(f"image_size and precision are no options of {size}; give it its own")
        return size, promptables.make(size, {} if weights == "default" else {"weights": weights})
    if is_transformers(weights) and weights is not None:
        return _of_transformers(weights, size, image_size, precision)
    return load_segment_anything(weights, size, image_size=image_size, precision=precision)


def load_sam2(
    weights: str | Path | None = "default",
    size: str | None = None,
    *,
    image_size: int | None = None,
    precision: str = "fp32",
) -> tuple[str, Promptable]:
    """SAM 2.1 or 2.0, its image part, or one of transformers, behind the protocol.

    Args:
        weights: ``"tiny"``, ``"small"``, ``"base_plus"`` or ``"large"`` of SAM 2.1, ``"2.0-tiny"``
            and so on of SAM 2.0, which are downloaded once; a local file or URL; ``"default"``, the
            published weights of ``size``; None, random weights. Or what `load_transformers` takes:
            ``"hf:REPOSITORY"``, or a folder with config.json.
        size: one of these names; by default what ``weights`` are of, else ``"tiny"``.
        image_size: side of the square that images are scaled to, a multiple of 32; None = 1024, of
            which the weights are.
        precision: ``"bf16"`` embeds images in bfloat16.

    Returns:
        The size, or the kind of a model of transformers, and the segmenter.

    Raises:
        WeightsError: the weights are absent, unreachable, gated, damaged or of another
            architecture.
        ImportError: ``sam2``, or ``transformers``, is not installed.
    """
    if is_transformers(weights) and weights is not None:
        return _of_transformers(weights, size, image_size, precision)
    return load_segment_anything_2(weights, size, image_size=image_size, precision=precision)


def _of_transformers(
    weights: str | Path, size: str | None, image_size: int | None, precision: str
) -> tuple[str, Promptable]:
    kind, segmenter = load_transformers(weights, image_size=image_size, precision=precision)
    if size not in (None, kind):
        raise ValueError(f"size is what the weights are of, {kind!r}, got {size!r}")
    return kind, segmenter
