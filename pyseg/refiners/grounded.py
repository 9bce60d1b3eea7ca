"""Grounded SAM as a refiner: what a detector finds by name and SAM outlines sharpens a class map.

See `pyseg.grounding` for the method and `pyseg.fusion` for what a mask may change: as of all masks,
those that contradict what the network is sure about are dropped. Boxes suit things; of stuff, such
as road and sky, a detector knows little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..fusion import Fusion, Rules, require_image_of
from ..grounding import DEFAULT_DETECTOR, ConceptMasks, Grounder, load_grounder, read_prompts
from ..promptable import Fingerprint, Promptable
from ..types import Segmentation
from .sam import is_stuff


class GroundedSam(nn.Module):
    """Refines class maps with the masks of objects found by name.

    Args:
        grounder: the detector and the segmenter, by position, in place of those that the options
            name.
        prompts: class -> what to look for, such as ``{"pole": "a street light pole . traffic
            pole"}``; other classes are left alone. None = the names of all classes that are no
            stuff (see `pyseg.refiners.sam.STUFF`).
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
        agreement: this and the following options are those of `SamRefiner`.
        batch: boxes segmented at a time.
        configuration: what a saved pipeline holds in place of the files of ``id``.

    Raises:
        SpecError: prompts without phrase, or a phrase of two classes.
        WeightsError: weights are absent, unreachable, or of another network.
        ImportError: transformers, or the segmenter's package, is not installed.

    Example:
        >>> pyseg.build("streetnet+grounded_sam(prompts={'Pole': 'a street light pole'})")
    """

    def __init__(
        self,
        grounder: Grounder | ConceptMasks | None = None,
        /,
        *,
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
        agreement: float = 0.9,
        outline: float = 0.3,
        displacement: float = 1.0,
        strength: float = 8.0,
        boundary: int = 8,
        margin: float = 0.5,
        batch: int = 16,
        configuration: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.rules = Rules(
            agreement=agreement,
            outline=outline,
            displacement=displacement,
            strength=strength,
            boundary=boundary,
            margin=margin,
        )
        self.prompts = None if prompts is None else read_prompts(prompts, None)
        if grounder is None:
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
        self.grounder, self.size = grounder, size
        self._fingerprint = Fingerprint()
        self.eval()

    @property
    def generator(self) -> Promptable:
        """What answers the prompts of a session."""
        return self.grounder.generator

    def config(self) -> dict[str, Any]:
        """What a saved pipeline holds beside the spec and the weights."""
        return {**self.grounder.config(), "size": self.size}

    @property
    def features_key(self) -> str:
        """What the embedding is called in `Segmentation.features`: segmenter and weights."""
        return self._fingerprint(self.generator)

    @property
    def wanted_features(self) -> tuple[str, ...]:
        """What it takes of them: see `pyseg.types`."""
        return (self.features_key,)

    @torch.no_grad()
    def refine(
        self, image: Tensor, prediction: Segmentation, *, features: bool = False
    ) -> Segmentation:
        """Refines one prediction.

        Args:
            image: [3, H, W] uint8 RGB.
            prediction: of this image, with logits.
            features: keep the embedding in the result's ``features``, for a later stage.

        Returns:
            A prediction with logits [C, H, W] at full resolution; ``prediction`` itself where no
            mask was accepted.

        Raises:
            ValueError: the image is not uint8 RGB or of another size than the prediction, the
                prediction has no logits, or ``prompts`` name a class that it does not have.
        """
        require_image_of(image, prediction)
        if prediction.logits is None:
            raise ValueError(
                "grounded_sam needs logits and this prediction has none; put the stage before the "
                "one that dropped them"
            )
        phrases, owners = self._phrases(prediction.classes)
        embedding = prediction.features and prediction.features.get(self.features_key)

        def embed() -> Any:
            nonlocal embedding
            if embedding is None:
                embedding = self.generator.embed(image)
            return embedding

        fusion: Fusion | None = None
        for found in self.grounder.masks(image, phrases, embed):
            fusion = fusion or Fusion(prediction, self.rules)
            classes = [owners[k] for k in found.index.tolist()]
            fusion.add(found.logits, found.scores * found.quality, classes)
        refined = prediction if fusion is None else fusion.result()
        if features and embedding is not None:
            kept = {**(refined.features or {}), self.features_key: embedding}
            refined = replace(refined, features=kept)
        return refined

    def _phrases(self, classes: tuple[str, ...]) -> tuple[list[str], list[int]]:
        """All phrases, and the class of each."""
        prompts = self.prompts
        if prompts is None:
            prompts = read_prompts(None, [name for name in classes if not is_stuff(name)])
        known = {name.lower(): k for k, name in enumerate(classes)}
        if absent := [name for name in prompts if name.lower() not in known]:
            raise ValueError(f"prompts name {absent}, but the model's classes are {list(classes)}")
        pairs = [(text, known[name.lower()]) for name in prompts for text in prompts[name]]
        return [text for text, _ in pairs], [k for _, k in pairs]


grounded_sam = GroundedSam  # what specs call it

__all__ = ["GroundedSam", "grounded_sam"]
