"""transformers' segmentation networks as models of pyseg.

Images go through the processor of the checkpoint, and results are those of its post-processing.
`hf` makes models: `files` reads what a checkpoint consists of, `semantic` has networks of one label
per pixel and the zero-shot CLIPSeg, `universal` those that find masks, `targets` what these learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import files
from .semantic import PromptedHF, SemanticHF
from .universal import Task, UniversalHF, step


def hf(
    *,
    id: str,
    task: Task | None = None,
    threshold: float | None = None,
    stuff: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights: str | Path | None = "default",
    configuration: Mapping[str, Any] | None = None,
) -> SemanticHF | UniversalHF:
    """A segmentation network of transformers, with its processor.

    Args:
        id: its name on the Hugging Face hub, or a folder that ``save_pretrained`` wrote, with the
            network's ``config.json``, the processor's ``preprocessor_config.json`` and, of
            OneFormer and CLIPSeg, the tokenizer's files.
        task: ``"semantic"``, ``"instance"`` or ``"panoptic"``; None = ``"panoptic"`` of a network
            that can do all three (Mask2Former, MaskFormer, OneFormer, DETR), what the checkpoint is
            for of EoMT, ``"instance"`` of RF-DETR, ``"semantic"`` of others.
        threshold: the score from which instances and panoptic segments count; None = that of the
            library: 0.8 of EoMT, 0.5 of others.
        stuff: names of classes that are not countable: an image has one panoptic segment of each.
        classes: of CLIPSeg, which has none of its own: the prompts, such as ``("a road", "sky")``.
        num_classes: None = as many as the checkpoint has; for another number the layers whose
            shapes depend on it are random, to be trained.
        weights: ``"default"`` = those of ``id``; None = random; a path or a URL = those that a
            training wrote.
        configuration: what a saved pipeline holds instead of the files of ``id``.

    Raises:
        ValueError: a task that the network cannot do, a number of classes below 1, ``classes`` of a
            network that has its own or none of CLIPSeg, ``stuff`` that is no class.
        WeightsError: ``id`` is no folder and cannot be fetched, lacks files, or is a checkpoint of
            another task; ``weights`` that are absent or another network's.
        PysegError: a network that takes more than an image, such as a video.
    """
    if task not in (None, "semantic", "instance", "panoptic"):
        raise ValueError(f"task must be 'semantic', 'instance' or 'panoptic', got {task!r}")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    read = files.Files(id, configuration)
    kind = files.kind_of(id, read.config)
    if kind != "universal" and task not in (None, "semantic"):
        raise ValueError(
            f"task={task!r}: {read.config.model_type!r} networks are semantic only; choose a "
            "Mask2Former, OneFormer, EoMT or DETR"
        )
    if kind != "universal" and (stuff or threshold is not None):
        raise ValueError(
            f"threshold and stuff are of segments, and {read.config.model_type!r} networks are "
            "semantic only: leave them out"
        )
    if (classes is None) == (kind == "prompted"):
        raise ValueError(
            f"id={id!r} is zero-shot and has no classes: pass its prompts, such as "
            "classes=('a road', 'the sky')"
            if kind == "prompted"
            else f"id={id!r} has classes of its own: leave classes out, which are the prompts of "
            "zero-shot networks such as CLIPSeg, or pass num_classes to train others"
        )
    if kind == "prompted":
        names = files.prompts(classes, num_classes)
    else:
        names = files.names(read.config, num_classes)
    model = read.network(kind, num_classes, weights)
    made: SemanticHF | UniversalHF
    if kind == "semantic":
        made = SemanticHF(model, read.processor, names)
    elif kind == "prompted":
        made = PromptedHF(model, read.processor, names, read.prompt_tokens(names))
    else:
        told = model.config.model_type == "oneformer"
        tokens = read.task_tokens(task or "panoptic") if told else None
        made = UniversalHF(
            model,
            read.processor,
            names,
            task,
            threshold=threshold,
            stuff=stuff,
            tokens=tokens,
            tokenizer=read.tokenizer_if_read,
        )
    files.load_trained(made, weights)
    return made


__all__ = ["PromptedHF", "SemanticHF", "UniversalHF", "hf", "step"]
