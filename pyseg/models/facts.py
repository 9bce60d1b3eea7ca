"""What is published about a model: `facts` says it beside the factory, `ModelInfo` tells it.

Numbers of others stand here and nowhere else: what pyseg measures is never mixed with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import PysegError
from ..registry import Info

Factory = TypeVar("Factory", bound=Callable[..., Any])

IMAGENET_LICENCE = "torchvision's, BSD-3-Clause; terms of the training data may apply (ImageNet)"
COCO_LICENCE = "torchvision's, BSD-3-Clause; terms of the training data may apply (COCO, ImageNet)"
FCN_PAPER = (
    "Long, Shelhamer & Darrell, Fully convolutional networks for semantic segmentation, CVPR 2015"
)

_ATTRIBUTE = "_pyseg_facts"  # of a factory


@dataclass(frozen=True)
class Published:
    """A score that others published, as they state it."""

    value: float
    metric: str  # such as "mIoU", in percent
    dataset: str  # with its split
    source: str  # who says so


@dataclass(frozen=True)
class Facts:
    """What a factory says about the model that it makes."""

    paper: str | None
    scores: tuple[Published, ...]
    licence: str | None


def facts(
    *,
    paper: str | None = None,
    scores: Sequence[tuple[float, str, str, str]] = (),
    licence: str | None = None,
) -> Callable[[Factory], Factory]:
    """Decorator of a model's factory that says what is published about the model.

    Args:
        paper: authors, title, venue and year.
        scores: published scores: value, metric, data set with its split, source.
        licence: of the weights that the factory knows by name; None = it knows none.

    Example:
        >>> @facts(
        ...     paper="Me, Networks, 2026", scores=[(61.2, "mIoU", "CamVid test", "the paper")]
        ... )
        ... def mine(*, num_classes=None, weights=None): ...
    """
    said = Facts(paper, tuple(Published(*score) for score in scores), licence)

    def add(factory: Factory) -> Factory:
        setattr(factory, _ATTRIBUTE, said)
        return factory

    return add


@dataclass(frozen=True)
class ModelInfo(Info):
    """What is known about a model by its name; what needs an import is found when it is asked for.

    ``parameters`` and ``gflops`` are counted on a model of default options without weights, which
    takes no memory; they are None where a model cannot be made or run so. GFLOPs are 2 for every
    multiply-add, as `pyseg.cost` counts them, for one image of ``size``.
    """

    size: tuple[int, int]  # (H, W) of the image that gflops are for

    @functools.cached_property
    def _facts(self) -> Facts:
        return getattr(self._factory, _ATTRIBUTE, Facts(None, (), None))

    @functools.cached_property
    def _factory(self) -> Callable[..., Any]:
        from . import get

        return get(self.name)

    @property
    def paper(self) -> str | None:
        """Where the model was published; None where its factory does not say."""
        return self._facts.paper

    @property
    def scores(self) -> tuple[Published, ...]:
        """Published scores: of others' weights and training, none of them measured by pyseg."""
        return self._facts.scores

    @property
    def licence(self) -> str | None:
        """Of the weights that have a name; None where there are none, or nothing is said."""
        return self._facts.licence

    @functools.cached_property
    def _model(self) -> Any:
        import torch

        from ..registry import accepted_options

        accepted = accepted_options(self._factory)
        options = {"weights": None} if accepted is None or "weights" in accepted else {}
        try:
            with torch.device("meta"):
                return self._factory(**options)
        except (PysegError, TypeError, ValueError, NotImplementedError, RuntimeError):
            return None  # it needs options, or values that a model without memory lacks

    @functools.cached_property
    def parameters(self) -> int | None:
        """Numbers that the model learns."""
        from torch import nn

        if not isinstance(self._model, nn.Module):
            return None
        return sum(parameter.numel() for parameter in self._model.parameters())

    @functools.cached_property
    def gflops(self) -> float | None:
        """Of semantic models; what detectors compute depends on what they see."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        from .semantic import SemanticModel

        if not isinstance(self._model, SemanticModel):
            return None
        images = torch.zeros(1, 3, *self.size, device="meta")
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                self._model.network(images)
        except (NotImplementedError, RuntimeError):  # it looks at values
            return None
        return counter.get_total_flops() / 1e9

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with everything that is counted."""
        return {
            "name": self.name,
            "target": self.target,
            "distribution": self.distribution,
            "version": self.version,
            "paper": self.paper,
            "parameters": self.parameters,
            "gflops": self.gflops,
            "size": list(self.size),
            "published_scores": [dict(vars(score)) for score in self.scores],
            "licence": self.licence,
        }
