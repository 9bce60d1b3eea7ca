"""Grounded SAM as a model without training: classes are what they are called.

See `pyseg.grounding` for the method. The result has one instance for each object found, and a label
map in which small objects lie over large ones and what no mask covers is void.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..classes import (
    CAMVID_CLASSES,
    CAMVID_PALETTE,
    CITYSCAPES_CLASSES,
    CITYSCAPES_PALETTE,
    VOC_CLASSES,
)
from ..errors import SpecError
from ..grounding import DEFAULT_DETECTOR, ConceptMasks, Grounder, load_grounder, read_prompts
from ..image import default_palette, require_rgb8
from ..promptable import Promptable
from ..regions import Instances, void_label
from ..types import Segmentation
from .facts import facts
from .semantic import require_evaluation_mode

LISTS = {
    "camvid": (CAMVID_CLASSES, CAMVID_PALETTE),
    "cityscapes": (CITYSCAPES_CLASSES, CITYSCAPES_PALETTE),
    "voc": (VOC_CLASSES, default_palette(len(VOC_CLASSES))),
}
"""Class lists that ``grounded_sam`` knows by name."""


class GroundedModel(nn.Module):
    """A model of a detector and a promptable segmenter.

    Args:
        grounder: the two.
        prompts: class -> phrases, as `pyseg.grounding.read_prompts` gives them.
        size: of the segmenter, by the name that a saved pipeline is to hold.
    """

    def __init__(
        self,
        grounder: Grounder | ConceptMasks,
        prompts: Mapping[str, Sequence[str]],
        size: str | None = None,
    ) -> None:
        super().__init__()
        if not any(prompts.values()):
            raise SpecError(f"no class of {list(prompts)} has a phrase to look for")
        self.grounder, self.size = grounder, size
        self.classes = tuple(prompts)
        self.palette = tuple(default_palette(len(self.classes) + 1)[1:])  # black is for void
        pairs = [(text, k) for k, texts in enumerate(prompts.values()) for text in texts]
        self.phrases = tuple(text for text, _ in pairs)
        self.owners = torch.tensor([k for _, k in pairs])
        self.eval()

    @property
    def generator(self) -> Promptable:
        """What answers the prompts of a session."""
        return self.grounder.generator

    def config(self) -> dict[str, Any]:
        """What a saved pipeline holds beside the spec and the weights."""
        return {**self.grounder.config(), "size": self.size}

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor]) -> list[Segmentation]:
        """Images, each [3, H, W] uint8 RGB, to instances, labels and uncertainty.

        The uncertainty of a pixel is 1 minus the detector's score of the object that has it times
        the probability of its mask there; 1 of void.
        """
        require_evaluation_mode(self)
        for index, image in enumerate(images):
            require_rgb8(image, f"images[{index}]")
        return [self._predict(image) for image in images]

    def _predict(self, image: Tensor) -> Segmentation:
        size = (image.shape[1], image.shape[2])
        masks, certain, scores, index = [], [], [], []
        for found in self.grounder.masks(image, self.phrases):
            logits = found.logits.to(image.device)
            some = (logits > 0).flatten(1).any(1)
            for plane in logits[some]:
                masks.append(plane > 0)
                # Of the probabilities only what lies inside is kept.
                certain.append(plane[masks[-1]].float().sigmoid())
            kept = some.cpu()
            scores += found.scores[kept].tolist()
            index += self.owners[found.index[kept]].tolist()
        void, dtype = void_label(len(self.classes))
        labels = torch.full(size, void, dtype=dtype, device=image.device)
        confidence = torch.zeros(size, device=image.device)
        areas = [int(mask.sum()) for mask in masks]
        for k in sorted(range(len(masks)), key=lambda k: (-areas[k], scores[k])):
            labels[masks[k]] = index[k]
            confidence[masks[k]] = scores[k] * certain[k]
        instances = _instances(masks, scores, index, size, image.device)
        return Segmentation(
            size,
            self.classes,
            instances=instances,
            image=image,
            palette=self.palette,
            uncertainty=1 - confidence,
            _labels=labels,
        )


def _instances(
    masks: list[Tensor],
    scores: list[float],
    index: list[int],
    size: tuple[int, int],
    device: torch.device,
) -> Instances:
    from torchvision.ops import masks_to_boxes

    if masks:
        stacked = torch.stack(masks)
        boxes = masks_to_boxes(stacked)
        boxes[:, 2:] += 1  # edges, not pixels
    else:
        stacked = torch.zeros(0, *size, dtype=torch.bool, device=device)
        boxes = torch.zeros(0, 4, device=device)
    return Instances(
        boxes,
        stacked,
        torch.tensor(scores, dtype=torch.float32, device=device),
        torch.tensor(index, dtype=torch.int64, device=device),
    )


@facts(
    paper="Ren et al., 2024, Grounded SAM, arXiv:2401.14159",
    licence="Apache-2.0 (Grounding DINO, SAM, SAM 2)",
)
def grounded_sam(
    *,
    classes: Sequence[str] | str | None = None,
    prompts: Mapping[str, str | Sequence[str]] | None = None,
    id: str = DEFAULT_DETECTOR,
    sam: str = "sam2",
    size: str | None = None,
    weights: str | None = "default",
    sam_weights: str | Path | None = "default",
    box_threshold: float = 0.25,
    text_threshold: float = 0.25,
    nms: float = 0.8,
    predicted_iou: float = 0.7,
    batch: int = 16,
    configuration: Mapping[str, Any] | None = None,
) -> GroundedModel:
    """Grounded SAM: finds what is named, without training.

    Args:
        classes: what to look for, such as ``('car', 'person', 'tree')``; they are the classes of
            the result. ``"camvid"``, ``"cityscapes"`` or ``"voc"``: those of that data set.
        prompts: class -> other phrases than its name, such as ``{"pole": "a street light pole .
            traffic pole"}``. Without ``classes`` they name them.
        id: the detector: a Grounding DINO or MM-Grounding-DINO on the Hugging Face hub, ``@`` and a
            commit where one is to be pinned, or a folder of ``save_pretrained``.
        sam: the segmenter: ``"sam"`` or ``"sam2"``; or ``"sam3"``, which finds by itself: ``id`` is
            then its name or folder, and ``box_threshold`` its least score.
        size: of the segmenter; None = its smallest.
        weights: ``"default"``; None = random ones in both networks, without any file.
        sam_weights: of the segmenter: ``"default"``, a name, a path or a URL.
        box_threshold: the least probability of a box's best token.
        text_threshold: the least mean probability of the tokens of its phrase.
        nms: IoU from which the less certain of two boxes is dropped, whatever their classes.
        predicted_iou: the least IoU that the segmenter predicts for its own mask.
        batch: boxes segmented at a time.
        configuration: what a saved pipeline holds in place of the files of ``id``.

    Raises:
        SpecError: neither classes nor prompts, one that is empty, or a phrase of two classes.
        WeightsError: weights are absent, unreachable, or of another network.
        ImportError: transformers, or the segmenter's package, is not installed.
    """
    known = LISTS.get(classes) if isinstance(classes, str) else None
    if known is not None:
        classes = known[0]
    names = [classes] if isinstance(classes, str) else classes and list(classes)
    if not names and not prompts:
        raise SpecError(
            "grounded_sam looks for what is named: give classes, such as "
            "grounded_sam(classes=('car', 'person')), or prompts"
        )
    if bad := [name for name in names or () if not isinstance(name, str) or not name.strip()]:
        raise SpecError(f"classes must be names, got {bad[0]!r}")
    if len({*(names or ())}) != len(names or ()):
        raise SpecError(f"classes must be different, got {names}")
    found = read_prompts(prompts, names or None)
    grounder, size = load_grounder(
        id=id,
        sam=sam,
        size=size,
        weights=weights,
        sam_weights=sam_weights,
        box_threshold=box_threshold,
        text_threshold=text_threshold,
        nms=nms,
        predicted_iou=predicted_iou,
        batch=batch,
        configuration=configuration,
    )
    model = GroundedModel(grounder, found, size)
    if known is not None:
        model.palette = known[1]
    return model


__all__ = ["GroundedModel", "grounded_sam"]
