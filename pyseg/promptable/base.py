"""What the refiners ask of a promptable segmenter, and what goes for each: prompts, chunks of them,
the choice among masks."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

PROMPT_LOGIT = 10.0
"""Of a mask prompt far from its outline; SAM's own masks reach 10 to 20."""


@dataclass(frozen=True)
class Prompts:
    """K prompts for one image. Coordinates are x, y in pixels of the image, first pixel at 0."""

    points: Tensor  # [K, P, 2] float
    point_labels: Tensor  # [K, P] int: 1 on the object, 0 off it, -1 no point
    boxes: Tensor | None = None  # [K, 4] float, xyxy
    masks: Tensor | None = None  # [K, H, W] float logits at image resolution

    def part(self, which: slice) -> Prompts:
        """Some of the K prompts."""
        return Prompts(
            self.points[which],
            self.point_labels[which],
            None if self.boxes is None else self.boxes[which],
            None if self.masks is None else self.masks[which],
        )


class Promptable(Protocol):
    """A segmenter that answers prompts with masks; it keeps no state between calls.

    It may have ``least_iou``, the predicted IoU below which refiners take no mask of it by default,
    and ``features(embedding)``, [C, h, w] of the whole image at whatever size, for elastic boxes.
    """

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

    Where memory does not suffice, chunks are halved from there on, with a warning.

    Yields:
        For every chunk of which something passes, what passes; ``index`` counts on over chunks.
    """
    begin = 0
    most = None  # prompts decoded at a time, where that was found
    waiting = iter(chunks)
    held: list[Prompts] = []  # of a chunk that was too large, the next one last
    while (prompts := held.pop() if held else next(waiting, None)) is not None:
        count = len(prompts.points)
        if most is not None and count > most:
            held += [prompts.part(slice(most, None)), prompts.part(slice(0, most))]
            continue
        try:
            logits, quality = segmenter.predict(embedding, prompts)
        except (MemoryError, RuntimeError) as error:
            if count < 2 or not _out_of_memory(error):
                raise
            most = count // 2
            warnings.warn(
                f"memory does not suffice for {count} prompts at a time: {most} at a time from "
                f"here on; batch={most} begins so",
                stacklevel=2,
            )
            held.append(prompts)
            continue
        good = (quality >= predicted_iou).nonzero()[:, 0]
        if len(good):
            logits = logits[good]
            yield Proposals(begin + good, logits, quality[good], stability(logits))
        begin += count


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: on a CPU torch raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "can't allocate memory" in str(error)
    )


def stability(logits: Tensor) -> Tensor:
    """IoU of each mask [K, h, w] cut at logits +1 and -1, as in SAM's mask generator; [K]."""
    flat = logits.flatten(1)
    return (flat > 1).float().sum(1) / (flat > -1).float().sum(1).clamp(min=1)


class Fingerprint:
    """Names a segmenter by its weights, so that stages know whether theirs are the same."""

    def __init__(self) -> None:
        self._known: tuple[tuple[tuple[int, int], ...], str] | None = None

    def __call__(self, segmenter: Any) -> str:
        """Class, size of input, precision and weights; of what is no module, the object itself."""
        name = type(segmenter).__name__.lower()
        if not isinstance(segmenter, nn.Module):
            return f"{name}-{id(segmenter):x}"
        state = segmenter.state_dict()
        # Hashed anew only where weights were written to or moved.
        now = tuple((value.data_ptr(), value._version) for value in state.values())
        known = self._known
        if known is None or known[0] != now:
            digest = hashlib.sha256()
            for key, value in state.items():
                digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            known = self._known = (now, digest.hexdigest()[:16])
        options = [str(getattr(segmenter, key, "")) for key in ("image_size", "precision")]
        return "-".join([name, *options, known[1]])
