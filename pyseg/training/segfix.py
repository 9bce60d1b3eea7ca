"""`train_segfix`: teaches the refiner `segfix` where boundaries are and which way is inward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from .. import processes
from ..errors import LabelError
from ..metrics.semantic import Semantic
from ..pipeline import Pipeline, Stage
from ..progress import notebook_bar
from ..refiners.segfix import (
    WIDTH,
    BoundaryHead,
    BoundaryNetwork,
    SegFix,
    boundary_targets,
)
from ..spec import StageSpec
from ..types import VOID, Dataset
from .crf import Training, chosen_images
from .label_spaces import Together
from .loop import Precision, check_output, check_positive, check_share, fit
from .optimizer import make_optimizer
from .semantic import CachedDataset, EpochOrder, _Crops


def train_segfix(
    pipeline: Pipeline,
    dataset: Dataset,
    check: Dataset,
    *,
    output_dir: str | Path,
    limit: int | None = None,
    epochs: int = 20,
    learning_rate: float = 4e-3,
    batch_size: int = 8,
    crop_size: tuple[int, int] = (240, 320),
    scale: tuple[float, float] = (0.75, 1.5),
    photometric: float = 0.7,
    width: int = WIDTH,
    shared: bool = True,
    weight_decay: float = 0.01,
    warmup: float = 0.03,
    ema: float = 0.99,
    precision: Precision | None = None,
    workers: int = 0,
    save_every: int = 1,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
    track: Callable[[Sequence[int]], Iterable[int]] = notebook_bar,
    **options: Any,
) -> Training:
    """Trains `segfix` behind a pipeline that stays as it is, on crops of labelled images.

    Minimises the cross-entropy of the boundary and, on it, that of the direction, see
    `pyseg.refiners.segfix.boundary_targets`, by AdamW. The classes do not matter. A model that
    offers its features lends them to a new head; else the refiner's own network is trained, from
    random weights. What is not trained stays as bundled.

    Files in ``output_dir`` are those of `pyseg.training.fit`.

    Args:
        pipeline: its model lends features, its predictions are what is scored.
        dataset: labelled samples to train on.
        check: labelled samples to score; others than those of ``dataset``.
        output_dir: made if absent.
        limit: use so many images of each, spread evenly; None = all.
        epochs: passes over the images in all, also when resuming.
        learning_rate: of AdamW, at the end of the warm-up; it falls by a cosine.
        batch_size: crops per step.
        crop_size: (height, width) of the crops, in pixels.
        scale: smallest and largest zoom of the random resize before the crop.
        photometric: strength of the random light, colour, blur and noise; 0 = none.
        width: of boundaries in pixels, on either side.
        shared: train a head on the model's features where it offers them; else, and with False,
            the refiner's own network.
        weight_decay: for weights of more than one dimension.
        warmup: share of all steps over which the learning rate rises.
        ema: decay of the running average of the weights, per step; 0 = the last weights.
        precision: "bf16" = autocast, "fp32" = none; None = what is usual on the device.
        workers: processes that prepare batches; 0 = the training process does.
        save_every: epochs between checkpoints; the last epoch always writes one.
        resume: go on from ``output_dir``'s checkpoint, which must have the same settings.
        seed: of crops, light and order.
        progress: show a progress bar, or now and then a line.
        track: wraps the sequence of images that check, for a progress bar.
        **options: of the refiner, such as ``boundary`` and ``steps``.

    Raises:
        PysegError: classes that differ, nothing to train on, nothing to resume, a checkpoint of
            other settings, or a loss that is not finite.
        ValueError: a setting out of range, or options that the refiner refuses.
        LabelError: a sample without labels.

    Example:
        >>> training = train_segfix(pyseg.build("streetnet"), CamVid(root), CamVid(root, "val"),
        ...                         output_dir="runs/segfix")
        >>> training.pipeline.save("streetnet_segfix")
    """
    check_positive(epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, width=width)
    check_share(photometric=min(photometric, 1.0), warmup=warmup)
    check_output(output_dir, resume)
    chosen = chosen_images(pipeline, dataset, check, limit)
    sets = [_Some(data, indices) for _, data, indices in chosen]
    torch.manual_seed(seed)
    refiner = SegFix(**options).to(pipeline.device)
    model = pipeline.model
    key = getattr(model, "features_key", None) if shared else None
    trained: nn.Module
    if key is None:
        trained = refiner.network = BoundaryNetwork().to(pipeline.device)
    else:
        probe = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=pipeline.device)
        with torch.no_grad():
            channels = [found.shape[1] for found in model(probe, features=True)["features"]]
        refiner.set_head(BoundaryHead(channels), key)
        assert refiner.head is not None
        trained = refiner.head
    trained.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    together = Together([CachedDataset(sets[0])])
    crops = _Crops(
        together,
        crop_size,
        scale,
        class_crops=0.5,
        category_limit=1.0,
        flip=0.5,
        photometric=photometric,
        class_mix=0.0,
        seed=seed,
    )
    order = EpochOrder(len(crops), seed)
    loader = DataLoader(
        crops,
        batch_size,
        sampler=order,
        drop_last=len(order) >= batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else it draws from the global one
    )
    loader = processes.accelerator().prepare(loader)

    def batches(epoch: int) -> Iterable[Any]:
        order.epoch = epoch
        crops.begin(epoch, None)
        return loader

    def step(network: nn.Module, batch: Any) -> dict[str, Tensor]:
        images, labels, _, _ = batch
        if key is None:
            return boundary_loss(network(images), labels, width)
        with torch.no_grad():
            features = model(images, features=True)["features"]
        return boundary_loss(network(features), labels, width)

    log = fit(
        trained,
        batches,
        step=step,
        optimizer=make_optimizer(
            "adamw", trained, learning_rate=learning_rate, weight_decay=weight_decay, second=0.99
        ),
        steps=len(loader),
        epochs=epochs,
        output_dir=output_dir,
        settings={
            "features": key,
            "batch_size": batch_size,
            "crop_size": list(crop_size),
            "scale": list(scale),
            "photometric": photometric,
            "width": width,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "samples": len(together),
        },
        warmup=warmup,
        ema=ema,
        precision=precision,
        save_every=save_every,
        resume=resume,
        seed=seed,
        progress=progress,
    )
    refiner.eval()
    default = SegFix(**options).to(pipeline.device)
    stages = [Stage(StageSpec("segfix", options), one) for one in (default, refiner)]
    pipelines = {
        "off": Pipeline(pipeline.stages),
        "default": Pipeline([*pipeline.stages, stages[0]]),
        "trained": Pipeline([*pipeline.stages, stages[1]], num_classes=len(pipeline.classes)),
    }
    metrics = {name: Semantic(check.classes) for name in pipelines}
    for index in track(range(len(sets[1]))):
        sample = sets[1][index]
        for name, metric in metrics.items():
            metric.update(pipelines[name](sample.image), sample)
    scores = {name: metric.compute() for name, metric in metrics.items()}
    losses = tuple(entry["loss"] for entry in log)
    return Training(pipelines["trained"], losses, **scores, refiner="segfix")


def boundary_loss(out: Tensor, labels: Tensor, width: int = WIDTH) -> dict[str, Tensor]:
    """What `train_segfix` minimises, for a network's logits [N, 9, h, w] and labels [N, H, W].

    Returns:
        ``"boundary"``: binary cross-entropy, over the pixels of which it is known whether they are
        on one; ``"direction"``: cross-entropy over those that have one, at the stride of the
        logits; ``"loss"``: their sum.
    """
    boundary, direction = boundary_targets(labels, width)
    out = out.float()
    edge = F.interpolate(out[:, :1], labels.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    known = boundary != VOID
    each = F.binary_cross_entropy_with_logits(edge, (boundary == 1).float(), reduction="none")
    where = (each * known).sum() / known.sum().clamp(min=1)
    coarse = F.interpolate(direction[:, None].float(), out.shape[2:], mode="nearest-exact")[:, 0]
    total = F.cross_entropy(out[:, 1:], coarse.long(), ignore_index=VOID, reduction="sum")
    way = total / (coarse != VOID).sum().clamp(min=1)
    return {"loss": where + way, "boundary": where, "direction": way}


class _Some:
    """Some samples of a data set, all of which must have labels."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self.classes, self.palette = dataset.classes, dataset.palette
        self._dataset, self._indices = dataset, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        sample = self._dataset[self._indices[index]]
        if sample.labels is None:
            raise LabelError(f"sample {sample.name} has no labels; training needs them for all")
        return sample
