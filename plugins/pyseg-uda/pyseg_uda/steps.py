"""One step of training, by each method: what the teacher says, the mixture, the losses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyseg.models import SemanticModel
from pyseg.models.segformer import MixTransformer

from . import mixing, streams, teacher
from .losses import (
    Attention,
    attention_consistency,
    cross_entropy,
    feature_distance,
    pseudo_labels,
    thing_mask,
)
from .views import generator_of


class Called(nn.Module):
    """A model that is called through a function: all that a step asks of it is one call.

    So several passes stand between two exchanges of gradients, where there are several processes.
    Its state is the model's, so that its weights fit the model.
    """

    def __init__(self, model: SemanticModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Any, *arguments: Any) -> Any:
        return function(self.model, *arguments)

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        return self.model.state_dict(*arguments, **options)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        return self.model.load_state_dict(*arguments, **options)


@dataclass(frozen=True)
class Mixture:
    """Target images with classes of the source, and what is known of them."""

    images: Tensor  # [N, 3, H, W] float in 0..1
    labels: Tensor  # [N, H, W] uint8
    weights: Tensor  # [N, H, W]: 1 on the source's pixels, the teacher's confidence elsewhere
    mask: Tensor  # [N, H, W] bool, true on the source's pixels
    share: Tensor  # [] the teacher's confidence q
    source: Sequence[Attention] = ()  # the teacher's on the source images
    target: Sequence[Attention] = ()  # and on the target images


@dataclass(frozen=True)
class Reference:
    """ImageNet's features of the source, from which those of things are kept."""

    trunk: nn.Module
    things: tuple[int, ...]

    def distance(
        self, model: SemanticModel, features: Tensor, images: Tensor, labels: Tensor
    ) -> Tensor:
        mask = thing_mask(labels, features.shape[2:], self.things)
        with torch.no_grad():
            fixed = last_stage(self.trunk(normalised(model, images)))
        return feature_distance(features, fixed, mask)


@dataclass(frozen=True)
class Steps:
    """A step for `pyseg.training.fit`; the options are those of `pyseg_uda.adapt`."""

    model: SemanticModel
    teacher: SemanticModel | None  # None: the source alone
    trunk: MixTransformer | None  # of the model, where attention is to be consistent
    reference: Reference | None
    threshold: float
    trusted: tuple[int, int]
    decay: float
    colour: float
    blur: float
    consistency: float
    distance: float
    auxiliary: float
    key: tuple[int, ...]  # seed and process

    def __call__(self, network: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """``batch``: `Views`'s, with the number of the ``"step"``; images [N, 3, H, W] uint8."""
        source = batch["source"].float() / 255
        if self.teacher is None:
            return network(self.from_source, source, batch["labels"])
        teacher.move(self.teacher, self.model, batch["step"], self.decay)
        with torch.no_grad():
            target = batch["target"].float() / 255
            mixture = self.mixture(
                source,
                batch["labels"],
                target,
                batch["valid"],
                generator_of(*self.key, batch["step"]),
            )
        learn = self.from_both if self.trunk is None else self.across
        losses = network(learn, source, batch["labels"], mixture)
        return {**losses, "confidence": mixture.share}

    def mixture(
        self,
        source: Tensor,
        labels: Tensor,
        target: Tensor,
        valid: Tensor,
        generator: torch.Generator,
    ) -> Mixture:
        """What the teacher makes of a batch, mixed with the source."""
        assert self.teacher is not None
        attention: dict[str, list[Attention]] = {}
        if self.trunk is None:
            logits = self.teacher(target)["out"]
        else:
            count = len(source)
            images = normalised(self.teacher, torch.cat([source, target]))
            features, seen = streams.attended(streams.mix_transformer(self.teacher), images)
            logits = head_of(self.teacher)([stage[count:] for stage in features])
            for name, part in (("source", slice(count)), ("target", slice(count, None))):
                attention[name] = [
                    Attention(one.weights[part], one.queries, one.keys) for one in seen
                ]
        found, weights, share = pseudo_labels(
            logits, valid, threshold=self.threshold, trusted=self.trusted
        )
        mask = mixing.class_masks(labels, generator)
        images = torch.where(mask[:, None], source, target)
        if self.colour:
            images = mixing.jitter(images, generator, strength=self.colour)
        return Mixture(
            mixing.blur(images, generator, chance=self.blur),
            torch.where(mask, labels, found),
            torch.where(mask, 1.0, weights),
            mask,
            share,
            **attention,
        )

    def from_source(
        self, model: SemanticModel, images: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Cross-entropy on the source."""
        return {"loss": segmentation_loss(model(images), labels, None, self.auxiliary)}

    def from_both(
        self, model: SemanticModel, images: Tensor, labels: Tensor, mixture: Mixture
    ) -> dict[str, Tensor]:
        """DAFormer's: source, mixture and, where there is a reference, its features."""
        with trunk_output(model, self.reference is not None) as seen:
            outputs = model(images)
        losses = {"source": segmentation_loss(outputs, labels, None, self.auxiliary)}
        losses["mixed"] = segmentation_loss(
            model(mixture.images), mixture.labels, mixture.weights, self.auxiliary
        )
        total = losses["source"] + losses["mixed"]
        if self.reference is not None:
            found = self.reference.distance(model, last_stage(seen[0]), images, labels)
            losses["distance"] = found
            total = total + self.distance * found
        return {"loss": total, **losses}

    def across(
        self, model: SemanticModel, images: Tensor, labels: Tensor, mixture: Mixture
    ) -> dict[str, Tensor]:
        """The same by four streams, with attention held to the teacher's."""
        assert self.trunk is not None
        features, attention = streams.four_streams(
            self.trunk, normalised(model, images), normalised(model, mixture.images)
        )
        truths = (labels, mixture.labels, labels, mixture.labels)
        weights = (None, mixture.weights, mixture.weights, None)
        own, mixed, to_source, to_mixed = (
            cross_entropy(head_of(model)(stream), truth, weight)
            for stream, truth, weight in zip(features, truths, weights, strict=True)
        )
        found = attention_consistency(mixture.source, mixture.target, attention, mixture.mask)
        losses = {"source": own, "mixed": mixed, "across": to_source + to_mixed, "attention": found}
        total = (own + mixed + to_source + to_mixed) / 2 + self.consistency * found
        if self.reference is not None:
            kept = self.reference.distance(model, features[0][-1], images, labels)
            losses["distance"] = kept
            total = total + self.distance * kept
        return {"loss": total, **losses}


def segmentation_loss(
    outputs: Mapping[str, Tensor], labels: Tensor, weights: Tensor | None, auxiliary: float
) -> Tensor:
    """Cross-entropy of logits at the labels' size, and of auxiliary ones at their own."""
    total = cross_entropy(outputs["out"], labels, weights)
    for name, logits in outputs.items():
        if name.startswith("aux"):
            small = _nearest(labels, logits)
            light = None if weights is None else _nearest(weights, logits)
            total = total + auxiliary * cross_entropy(logits, small, light)
    return total


def normalised(model: SemanticModel, images: Tensor) -> Tensor:
    """Images in 0..1 as the network takes them."""
    return (images - model.mean) / model.std


def head_of(model: SemanticModel) -> nn.Module:
    """What makes logits of a mix transformer's features."""
    return model.network.get_submodule("head")


def trunk_of(model: SemanticModel) -> nn.Module | None:
    """The module that a classifier of images may fill; None where the model names none."""
    return None if model.trunk is None else model.network.get_submodule(model.trunk)


def last_stage(output: Any) -> Tensor:
    """The coarsest features of what a trunk returns: a tensor, a sequence or a mapping."""
    if isinstance(output, Mapping):
        return output["out"] if "out" in output else list(output.values())[-1]
    return output if isinstance(output, Tensor) else output[-1]


@contextlib.contextmanager
def trunk_output(model: SemanticModel, wanted: bool) -> Iterator[list[Any]]:
    """What the model's trunk returns within it, call by call."""
    seen: list[Any] = []
    trunk = trunk_of(model) if wanted else None
    if trunk is None:
        yield seen
        return
    handle = trunk.register_forward_hook(lambda module, arguments, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def _nearest(values: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(values[:, None], like.shape[2:], mode="nearest-exact")[:, 0]
