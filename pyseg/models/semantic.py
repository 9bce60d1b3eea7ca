"""Semantic models: `SemanticModel` around any network, `semantic_model` to build one by options.

A family of networks is a file with its network and, for every name, a function of documented
options that ends in `semantic_model`; `segnet` is the example.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import weights as weight_files
from ..errors import PysegError, WeightsError
from ..image import default_palette, require_rgb8
from ..spec import shown
from ..tiles import check_tiles, spans
from ..types import Segmentation

Factory = TypeVar("Factory", bound=Callable[..., Any])

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SCALES = (0.75, 1.0, 1.25)  # what "scales" stands for
_SMALLEST_SCALE, _LARGEST_SCALE = 0.1, 4.0


class SemanticModel(nn.Module):
    """A network that gives every pixel one of ``classes``; a pipeline's first stage.

    It begins in evaluation mode, the network too: training calls ``train()``.

    Args:
        network: maps normalised RGB, float [N, 3, H, W], to logits [N, C, h, w] or to a mapping
            with those under ``"out"`` and, while training, further logits under names that start
            with ``"aux"``, each at its own stride; in evaluation, ``"uncertainty"`` [N, h, w] goes
            into the predictions.
        classes: the C class names, in the order of the logits' channels.
        palette: one RGB colour per class; None = `pyseg.image.default_palette`.
        mean: subtracted from each channel of an image in 0..1.
        std: what each channel is then divided by.
        max_batch_pixels: `predict` puts no more pixels than this in one batch (at least one image).

    ``temperature`` is what its predictions' probabilities divide the logits by; labels do not
    depend on it. It comes with the weights (`pyseg tune temperature --store`), and training, which
    makes it untrue, sets it to 1. Predictions of several variants (``tta``) have 1, too: their mean
    is less sure than each.

    Raises:
        ValueError: no class, or a palette of another length than ``classes``.

    Example:
        >>> model = SemanticModel(nn.Conv2d(3, 2, 1), ("road", "sky"))
        >>> model(torch.zeros(1, 3, 5, 7, dtype=torch.uint8))["out"].shape
        torch.Size([1, 2, 5, 7])
    """

    mean: Tensor
    std: Tensor
    trunk: str | None = (
        None  # the module that a classifier of images may fill, as training names it
    )
    heads: tuple[str, ...] = ()  # the modules whose shapes depend on the number of classes

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str],
        palette: Sequence[tuple[int, int, int]] | None = None,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        max_batch_pixels: int = 4 << 20,
    ) -> None:
        super().__init__()
        self.classes = tuple(classes)
        if not self.classes:
            raise ValueError("classes must name at least one class, got none")
        colours = default_palette(len(self.classes)) if palette is None else palette
        if len(colours) != len(self.classes):
            raise ValueError(
                f"palette must have one colour per class: {len(self.classes)} "
                f"classes, got {len(colours)} colours"
            )
        self.palette = tuple((int(r), int(g), int(b)) for r, g, b in colours)
        self.network = network
        self.max_batch_pixels = max_batch_pixels
        self.temperature = 1.0
        self._method = _Method()
        self._key: tuple[tuple[tuple[int, int], ...], str] | None = None
        # Constants of the architecture, not learnt: kept out of state_dict.
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> SemanticModel:
        """As `torch.nn.Module.train`; training mode sets ``temperature`` to 1."""
        if mode:
            self.temperature = 1.0
        return super().train(mode)

    @property
    def features_key(self) -> str | None:
        """What its feature maps are called in `Segmentation.features`: network and weights.

        None where the network offers none: one that does has ``offers_features`` and, called with
        ``features=True``, returns them under ``"features"``, a tuple with the finest first.
        """
        if not getattr(self.network, "offers_features", False):
            return None
        # Hashed anew only where weights were written to or moved. A pipeline asks several times for
        # every image, so this does without `state_dict`, which takes three times as long.
        now = tuple(
            (value.data_ptr(), _version(value))
            for module in self.network.modules()
            for value in (*module._parameters.values(), *module._buffers.values())
            if value is not None
        )
        known = self._key
        if known is None or known[0] != now:
            heads = tuple(f"{head}." for head in self.heads)
            trunk = {
                key: value
                for key, value in self.network.state_dict().items()
                if not key.startswith(heads or ("\0",))
            }
            known = self._key = (now, _digest(trunk))
        return f"{type(self.network).__name__.lower()}-{known[1]}"

    def forward(self, images: Tensor, *, features: bool = False) -> dict[str, Any]:
        """Logits of a batch.

        Args:
            images: [N, 3, H, W] RGB, uint8, or floating point in 0..1.
            features: give the network's feature maps, too; see `features_key`.

        Returns:
            ``"out"``: logits [N, C, h, w] at the network's own stride, never upsampled;
            ``"aux…"``: logits of auxiliary heads, if the network gives any; ``"features"``: if
            asked for, a tuple of feature maps [N, c, h, w], the finest first.

        Raises:
            ValueError: another shape.
            TypeError: another dtype.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [N, 3, H, W] RGB, got {list(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        elif not images.is_floating_point():
            raise TypeError(f"images must be uint8, or floating point in 0..1, got {images.dtype}")
        images = (images - self.mean) / self.std
        output = self.network(images, features=True) if features else self.network(images)
        return dict(output) if isinstance(output, Mapping) else {"out": output}

    def predict_with(
        self,
        *,
        tta: str | Sequence[str | float] | None = None,
        crop_size: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
    ) -> SemanticModel:
        """Sets how `predict` works from now on; a spec gives these options beside the model's own.

        Args:
            tta: test-time augmentation: the mean of the probabilities of several variants of the
                image. ``"flip"`` = it and its mirror image; ``"scales"`` = 0.75, 1 and 1.25 of its
                size; numbers = these; joined by commas, or as a sequence: ``"flip,scales"`` are six
                variants, ``"flip,0.5,1,2"`` too. None = the image alone.
            crop_size: sides of sliding windows, (height, width) or one number, multiples of 32:
                larger images are cut into these, which are blended where they overlap. None =
                whole images.
            stride: pixels between windows, at most; multiples of 32. None = two thirds of
                ``crop_size``.

        Returns:
            The model itself.

        Raises:
            ValueError: a value out of range, or ``stride`` without ``crop_size``.
            PysegError: the model's class has another way to predict, which knows no such options.

        Example:
            >>> segmenter = pyseg.build("streetnet(tta='flip,scales')")
        """
        if type(self).predict is not SemanticModel.predict and (tta or crop_size or stride):
            raise PysegError(
                f"{type(self).__name__} predicts in its own way and takes no tta, crop_size and "
                "stride: leave them out"
            )
        self._method = _Method.of(tta, crop_size, stride)
        return self

    @torch.inference_mode()
    def predict(
        self,
        images: Sequence[Tensor],
        *,
        tta: str | Sequence[str | float] | None = None,
        crop_size: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
        features: bool = False,
    ) -> list[Segmentation]:
        """Segments images of any sizes; those of equal size share batches.

        Changes nothing of the model, so that many threads may call it.

        Args:
            images: each [3, H, W] uint8 RGB, on any device.
            tta: see `predict_with`. Where all three are None, what was set there.
            crop_size: see `predict_with`.
            stride: see `predict_with`.
            features: keep the network's feature maps, where it offers them, in the predictions; not
                with ``tta`` or windows, of which there would be several.

        Returns:
            One `Segmentation` per image, in order, with ``logits`` on the model's device; those of
            several variants are the logarithms of their mean probabilities.

        Raises:
            ValueError: an image of another shape, or empty; an option out of range.
            TypeError: an image of another dtype.
            PysegError: the model is in training mode.
        """
        require_evaluation_mode(self)
        method = self._method
        if tta is not None or crop_size is not None or stride is not None:
            method = _Method.of(tta, crop_size, stride)
        key = self.features_key if features and method == _Method() else None
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            require_rgb8(image, f"images[{index}]")
            groups.setdefault((image.shape[1], image.shape[2]), []).append(index)
        results: dict[int, Segmentation] = {}
        for (height, width), members in groups.items():
            step = max(1, self.max_batch_pixels // method.pixels(height, width))
            for start in range(0, len(members), step):
                chosen = members[start : start + step]
                batch = torch.stack([images[i].to(self.mean.device) for i in chosen])
                outputs = method.outputs(self, batch) if key is None else self(batch, features=True)
                uncertainty = outputs.get("uncertainty", [None] * len(chosen))
                maps = zip(*outputs["features"], strict=True) if key else [None] * len(chosen)
                for i, logits, doubt, seen in zip(
                    chosen, outputs["out"], uncertainty, maps, strict=True
                ):
                    results[i] = Segmentation(
                        (height, width),
                        self.classes,
                        logits=logits,
                        image=images[i],
                        palette=self.palette,
                        uncertainty=doubt,
                        temperature=self.temperature if method.single else 1.0,
                        features=None if key is None or seen is None else {key: seen},
                    )
        return [results[i] for i in range(len(images))]


@dataclass(frozen=True)
class _Method:
    """How a model predicts: on which variants of an image, whole or by windows."""

    flips: tuple[bool, ...] = (False,)
    scales: tuple[float, ...] = (1.0,)
    crop: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        tta: str | Sequence[str | float] | None,
        crop_size: int | tuple[int, int] | None,
        stride: int | tuple[int, int] | None,
    ) -> _Method:
        """From `SemanticModel.predict_with`'s options."""
        items: Sequence[Any] = (
            () if tta is None else tta.split(",") if isinstance(tta, str) else tta
        )
        flip = False
        scales: list[float] = []
        for item in items:
            text = item.strip() if isinstance(item, str) else item
            if text == "flip":
                flip = True
            elif text == "scales":
                scales.extend(SCALES)
            else:
                scales.append(_scale(text, tta))
        if stride is not None and crop_size is None:
            raise ValueError(f"stride is that of windows: give crop_size, too, got stride={stride}")
        crop = step = None
        if crop_size is not None:
            crop = _pair("crop_size", crop_size)
            step = _pair("stride", stride) if stride is not None else None
            step = step or (_two_thirds(crop[0]), _two_thirds(crop[1]))
            for size, apart in zip(crop, step, strict=True):
                if apart > size or apart < 1:
                    raise ValueError(
                        f"stride must be 32 to crop_size, got stride={stride} and "
                        f"crop_size={crop_size}"
                    )
                check_tiles(size, size - apart, names=("crop_size", "crop_size - stride"))
        flips = (False, True) if flip else (False,)
        # The plain image first: its logits' stride is that of the result.
        order = sorted(dict.fromkeys(scales), key=lambda scale: abs(math.log(scale)))
        return cls(flips, tuple(order) or (1.0,), crop, step)

    @property
    def single(self) -> bool:
        """Whether there is one variant only, the image itself."""
        return self.scales == (1.0,) and self.flips == (False,)

    def pixels(self, height: int, width: int) -> int:
        """What the network gets at a time, at most, of one image."""
        high, wide = (math.ceil(side * max(self.scales)) for side in (height, width))
        if self.crop is not None:
            high, wide = min(high, self.crop[0]), min(wide, self.crop[1])
        return high * wide

    def outputs(self, model: SemanticModel, images: Tensor) -> dict[str, Tensor]:
        """``"out"`` and, where the network gives it, ``"uncertainty"`` of [N, 3, H, W] uint8."""
        if self.single:
            return self._windows(model, images)
        variants = list(itertools.product(self.scales, self.flips))
        total: dict[str, Tensor] = {}
        for scale, flip in variants:
            found = self._windows(model, _variant(images, scale, flip))
            out = found["out"].float()
            doubt = found.get("uncertainty")
            parts = {"out": out.flip(3) if flip else out}
            if doubt is not None:
                parts["uncertainty"] = (doubt.flip(2) if flip else doubt).float()
            if scale == self.scales[0] and not flip:
                high, wide = (max(1, round(n / scale)) for n in out.shape[2:])
            parts["out"] = _resized(parts["out"], (high, wide)).softmax(1)
            if doubt is not None:
                parts["uncertainty"] = _resized(parts["uncertainty"][:, None], (high, wide))[:, 0]
            for key, value in parts.items():
                total[key] = total[key] + value if key in total else value
        mean = {key: value / len(variants) for key, value in total.items()}
        mean["out"] = mean["out"].clamp(min=torch.finfo(torch.float32).tiny).log()
        return mean

    def _windows(self, model: SemanticModel, images: Tensor) -> dict[str, Tensor]:
        """Of images as they are, by windows where these are smaller."""
        height, width = images.shape[2:]
        if self.crop is None or (height <= self.crop[0] and width <= self.crop[1]):
            return model(images)
        assert self.stride is not None
        rows, columns = (
            spans(length, crop, crop - stride)
            for length, crop, stride in zip((height, width), self.crop, self.stride, strict=True)
        )
        total: dict[str, Tensor] = {}
        for ys, xs in itertools.product(rows, columns):
            size = (ys.stop - ys.start, xs.stop - xs.start)
            found = model(images[:, :, ys.start : ys.stop, xs.start : xs.stop])
            weights = ys.weights()[:, None] * xs.weights()
            for key in ("out", "uncertainty"):
                if key not in found:
                    continue
                value = found[key].float()
                value = value if key == "out" else value[:, None]
                step = _whole_stride(size, (value.shape[2], value.shape[3]))
                if step is None or ys.start % step or xs.start % step:
                    value, step = _resized(value, size), 1
                if key not in total:
                    shape = (*value.shape[:2], -(-height // step), -(-width // step))
                    total[key] = value.new_zeros(shape)
                share = F.avg_pool2d(weights[None, None], step, ceil_mode=True).to(value.device)
                top, left = ys.start // step, xs.start // step
                high, wide = value.shape[2:]
                total[key][:, :, top : top + high, left : left + wide] += value * share
        if "uncertainty" in total:
            total["uncertainty"] = total["uncertainty"][:, 0]
        return total


def _version(tensor: Tensor) -> int:
    """How often it was written to; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _digest(state: Mapping[str, Tensor]) -> str:
    """Some digits that tell weights from others."""
    digest = hashlib.sha256()
    for key, value in state.items():
        digest.update(key.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _variant(images: Tensor, scale: float, flip: bool) -> Tensor:
    """Images [N, 3, H, W] uint8, resized and mirrored; floats in 0..1 where resized."""
    if scale != 1.0:
        size = [max(1, round(side * scale)) for side in images.shape[2:]]
        images = F.interpolate(
            images.float() / 255, size, mode="bilinear", antialias=True, align_corners=False
        ).clamp(0, 1)
    return images.flip(3) if flip else images


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def _whole_stride(size: tuple[int, int], logits: tuple[int, int]) -> int | None:
    """The stride of logits, where it is a whole number and the same both ways."""
    step = -(-size[0] // logits[0])
    fits = all(-(-length // step) == count for length, count in zip(size, logits, strict=True))
    return step if fits else None


def _scale(value: Any, tta: Any) -> float:
    try:
        scale = float(value)
    except (TypeError, ValueError):
        scale = math.nan
    if isinstance(value, bool) or not _SMALLEST_SCALE <= scale <= _LARGEST_SCALE:
        raise ValueError(
            f"tta must be of 'flip', 'scales' and numbers from {_SMALLEST_SCALE} to "
            f"{_LARGEST_SCALE:g}, such as 'flip,scales' or 'flip,0.75,1,1.25', got {shown(tta)}"
        )
    return scale


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        raise ValueError(
            f"{name} must be a number of pixels, or (height, width), got {shown(value)}"
        )
    return pair[0], pair[1]


def _two_thirds(crop: int) -> int:
    return max(32, crop * 2 // 3 // 32 * 32)


def wrap(
    network: nn.Module,
    *,
    classes: Sequence[str] | int,
    palette: Sequence[tuple[int, int, int]] | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> SemanticModel:
    """Any network as a model: the first stage of a pipeline, for predicting, scoring and training.

    Args:
        network: as `SemanticModel` takes it; it is put into evaluation mode.
        classes: names in the order of the logits' channels, or how many there are.
        palette: one RGB colour per class; None = `pyseg.image.default_palette`.
        mean: of the three channels, in 0..1, that the network was trained with.
        std: what each channel was divided by.

    Raises:
        TypeError: ``network`` is no ``torch.nn.Module``.
        ValueError: no class, classes of one name, or a ``palette``, ``mean`` or ``std`` that does
            not fit.

    Example:
        >>> model = wrap(network, classes=("road", "sky"), mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> pyseg.compose(model, "crf+sam2")("street.jpg").save("street.png")
    """
    if not isinstance(network, nn.Module):
        what = network.__name__ if isinstance(network, type) else type(network).__name__
        raise TypeError(
            f"network must be a torch.nn.Module that maps [N, 3, H, W] to logits, got {what}"
        )
    if isinstance(classes, str):
        raise ValueError(f"classes must be a sequence of names or their number, got {classes!r}")
    names = class_names(classes, ()) if isinstance(classes, int) else tuple(classes)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"classes must have different names, got {', '.join(twice)} twice")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name} must be 3 numbers, one per channel, got {list(values)}")
    if not all(value > 0 for value in std):
        raise ValueError(f"std must be above 0, got {list(std)}")
    return SemanticModel(network, names, palette, mean=mean, std=std)


def require_evaluation_mode(model: nn.Module) -> None:
    """Raises PysegError for a model in training mode.

    There predictions depend on their batch and change its statistics; and a switch here and back
    would be seen by other threads that predict with it.
    """
    if model.training:
        raise PysegError(
            f"this {type(model).__name__} is in training mode, in which predictions depend on "
            "their batch and change the model; call its eval() first"
        )


def semantic_model(
    name: str,
    network: Callable[[int], nn.Module],
    *,
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]] | None = None,
    num_classes: int | None,
    weights: str | Path | None,
    heads: Sequence[str],
    known: Mapping[str, weight_files.Remote] | None = None,
    default: str | None = None,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    trunk: str | None = None,
    may_lack: Sequence[str] = (),
    former: Mapping[str, str] | None = None,
    **options: Any,
) -> SemanticModel:
    """A `SemanticModel` with its weights: what every factory of a semantic network ends in.

    Checkpoints are told apart by their keys: those of pyseg begin with ``network.``; all others
    go through ``convert``.

    Args:
        name: of the model, for messages.
        network: makes the network for a number of classes.
        classes: names for as many classes as ``default`` has; other numbers get ``class 0``, ….
        palette: one RGB colour per name in ``classes``; None = `pyseg.image.default_palette`.
        num_classes: None = as many as ``classes``.
        weights: ``"default"``, a name in ``known``, a path or a URL; None = random, which needs no
            network.
        heads: modules of the network, such as ``("classifier.4",)``, whose shapes depend on the
            number of classes: where a known checkpoint has another number they stay random, with a
            warning; where a file or a URL has another number that is an error.
        known: where checkpoints with names are published.
        default: which of them ``"default"`` means; None = none, which ``"default"`` says.
        convert: foreign keys to those of the network; keys that belong to neither are left for the
            message, keys without a meaning here (a classifier of images) are dropped.
        trunk: the module that a checkpoint may have alone, such as the backbone of a classifier of
            images: all others then stay random.
        may_lack: modules that a checkpoint may be without, such as auxiliary heads.
        former: what to say of checkpoints of a former network of this name, by a key of theirs.
        options: of `SemanticModel`, such as ``mean`` and ``std``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: ``num_classes`` below 1.
        WeightsError: ``weights`` cannot be found or read, or belong to another network or to
            another number of classes, or ``"default"`` where nothing is published.
    """
    known = known or {}
    names = class_names(num_classes, classes)
    count = len(names)
    found = None if weights is None else read_weights(name, weights, known, default)
    colours = palette if names == tuple(classes) else None
    model = SemanticModel(network(count), names, colours, **options)
    model.trunk, model.heads = trunk, tuple(heads)
    if found is None:
        return model

    state, path = found
    if all(key.startswith("network.") for key in state):
        state = {key.removeprefix("network."): value for key, value in state.items()}
    elif convert is not None:
        state = convert(state)
    for key, message in (former or {}).items():
        if key in state:
            raise WeightsError(f"weights: {path} {message}")
    own = model.network.state_dict()
    alone = bool(state) and trunk is not None and all(_under(key, [trunk]) for key in state)
    for key, value in own.items():
        random = alone and trunk is not None and not _under(key, [trunk])
        # batch normalisation of old checkpoints lacks its count of batches, which nothing reads
        if random or _under(key, may_lack) or key.endswith("num_batches_tracked"):
            state.setdefault(key, value)
    other = {
        key: stored
        for key, value in own.items()
        if key in state
        and _under(key, heads)
        and (stored := _other_count(state[key], value, count)) is not None
    }
    if other:
        stored = next(iter(other.values()))
        if weights not in {"default", "DEFAULT", *known}:
            raise WeightsError(
                f"weights: {path} is for {stored} classes, {name} has {count}; pass "
                f"num_classes={stored}"
            )
        warnings.warn(
            f"{name}: weights={weights!r} are for {stored} classes, so the last layer for {count} "
            "classes is random: train it, or give weights that were",
            stacklevel=3,
        )
        state.update((key, own[key]) for key in other)
    weight_files.load_into(model.network, state, path)
    if not other and not alone:
        model.temperature = weight_files.load_temperature(path)
    return model


def with_options(text: str) -> Callable[[Factory], Factory]:
    """Decorator that adds ``text``, on options that a family shares, to a factory's docstring."""

    def add(factory: Factory) -> Factory:
        factory.__doc__ = f"{factory.__doc__}\n{text}"
        return factory

    return add


def class_names(num_classes: int | None, published: Sequence[str]) -> tuple[str, ...]:
    """Names of a model's classes: the ``published`` ones, or ``class 0``, … for another number.

    Raises:
        ValueError: ``num_classes`` below 1.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if num_classes is None or num_classes == len(published):
        return tuple(published)
    return tuple(f"class {i}" for i in range(num_classes))


def read_weights(
    name: str,
    weights: str | Path,
    known: Mapping[str, weight_files.Remote],
    default: str | None,
) -> tuple[dict[str, Tensor], Path]:
    """The state dict that ``weights`` stands for, and the file that it is from.

    Args:
        name: of the model, for messages.
        weights: ``"default"`` or ``"DEFAULT"``, a name in ``known``, a path or a URL.
        known: where checkpoints with names are published.
        default: which of them ``"default"`` means; None = none.

    Raises:
        WeightsError: nothing is published and ``"default"`` asked for, or the file is absent,
            unreachable or damaged.
    """
    if default is not None:
        known = {**known, "default": known[default], "DEFAULT": known[default]}
    elif weights in ("default", "DEFAULT"):
        starts = [repr(key) for key in known if "." not in key]
        raise WeightsError(
            f"{name} has no published weights of its own: pass weights=None for random ones, "
            "weights=<path or URL> for those of a checkpoint"
            + (f", or weights={' or '.join(starts)} to start training from" if starts else "")
        )
    path = weight_files.resolve(weights, known=known)
    return weight_files.load_state(path), path


def _under(key: str, modules: Sequence[str]) -> bool:
    return key.startswith(tuple(f"{module}." for module in modules))


def _other_count(stored: Tensor, own: Tensor, count: int) -> int | None:
    """The classes that ``stored`` is for, where it differs from ``own`` in their number alone."""
    if stored.ndim != own.ndim:
        return None
    differing = {pair for pair in zip(stored.shape, own.shape, strict=True) if pair[0] != pair[1]}
    if len(differing) == 1 and (pair := differing.pop())[1] == count:
        return pair[0]
    return None
