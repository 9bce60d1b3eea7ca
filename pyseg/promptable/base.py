"""What the refiners ask of a promptable segmenter, and what goes for each: prompts, chunks of them,
the choice among masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

PROMPT_LOGIT = 10.0
"""Of a mask prompt far from its outline; SAM's own masks reach 10 to 20."""


@dataclass(frozen=True)
class Prompts:
    """K prompts for one image. Coordinates are x, y in pixels of the image, first pixel at 0."""

    points: Tensor  # [K, P, 2] float
    point_labels: Tensor  # [K, P] int: 1 on the object, 0 off it, -1 no point
    boxes: Tensor | None = None  # [K, 4] float, xyxy
    masks: Tensor | None = None  # [K, H, W] float logits at image resolution


class Promptable(Protocol):
    """A segmenter that answers prompts with masks; it keeps no state between calls."""

    def embed(self, image: Tensor) -> Any:
        """Whatever ``predict`` and ``upsample`` need of ``image`` [3, H, W] uint8 RGB."""
        ...

    def predict(self, embedding: Any, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Best mask per prompt: logits [K, h, w] at the segmenter's size, predicted IoU [K]."""
        ...

    def upsample(self, embedding: Any, logits: Tensor) -> Tensor:
        """Logits [K, h, w] of ``predict`` to the image's own frame, [K, H, W]."""
        ...


class Proposals(NamedTuple):
    """Masks that a promptable segmenter stands by, at its own size h x w."""

    # over tuple.index, which nobody calls here
    index: Tensor  # type: ignore[assignment]  # [K] int64: which of the prompts each answers
    logits: Tensor  # [K, h, w] float
    predicted_iou: Tensor  # [K] float, as the segmenter gives it
    stability: Tensor  # [K] float, see `stability`


def propose(
    segmenter: Promptable, embedding: Any, chunks: Iterable[Prompts], *, predicted_iou: float
) -> Iterator[Proposals]:
    """Predicts masks a chunk of prompts at a time and drops those of low quality.

    Masks stay at the segmenter's size, so that only what passes is ever upsampled.

    Args:
        segmenter: what answers the prompts.
        embedding: what its ``embed`` made of the image.
        chunks: the prompts; each chunk is decoded at once, and made when its turn comes.
        predicted_iou: the least IoU that the segmenter predicts for a mask to pass.

    Yields:
        For every chunk of which something passes, what passes; ``index`` counts on over chunks.
    """
    begin = 0
    for prompts in chunks:
        logits, quality = segmenter.predict(embedding, prompts)
        good = (quality >= predicted_iou).nonzero()[:, 0]
        if len(good):
            logits = logits[good]
            yield Proposals(begin + good, logits, quality[good], stability(logits))
        begin += len(prompts.points)


def stability(logits: Tensor) -> Tensor:
    """IoU of each mask [K, h, w] cut at logits +1 and -1, as in SAM's mask generator; [K]."""
    flat = logits.flatten(1)
    return (flat > 1).float().sum(1) / (flat > -1).float().sum(1).clamp(min=1)
