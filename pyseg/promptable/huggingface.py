"""Promptable segmenters of the transformers package: SAM, SAM-HQ, SAM 2, SAM 3, EdgeTAM.

SAM 3 (Carion et al., 2025) also finds everything that a phrase names, or that looks like what
boxes show: `ConceptSegmenter`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import WeightsError, require
from .base import PROMPT_LOGIT, Prompts
from .sam import Backend, Embedding, cells_of, resize

PREFIX = "hf:"
"""Before the name of a repository of Hugging Face, where weights are asked for."""

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# By the model_type of a configuration: the class that answers points, boxes and masks, and mean and
# standard deviation of its training. Checkpoints for video hold the part for images.
_FAMILIES = {
    "sam": ("SamModel", _IMAGENET),
    "sam_hq": ("SamHQModel", _IMAGENET),
    "sam2": ("Sam2Model", _IMAGENET),
    "sam2_video": ("Sam2Model", _IMAGENET),
    "edgetam": ("EdgeTamModel", _IMAGENET),
    "edgetam_video": ("EdgeTamModel", _IMAGENET),
    "sam3": ("Sam3TrackerModel", _HALF),
    "sam3_tracker": ("Sam3TrackerModel", _HALF),
    "sam3_video": ("Sam3TrackerModel", _HALF),
}
_PADDED = ("sam", "sam_hq")  # these keep the aspect ratio, the others squash to a square


@dataclass(frozen=True)
class _VisionEmbedding(Embedding):
    """An embedding of which one model makes its own use."""

    more: Any = None


class _Normalised(Backend):
    """What all of them share: images resized as 8 bits, then normalised."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        precision: str,
        side: int,
        statistics: tuple[tuple[float, ...], tuple[float, ...]],
    ) -> None:
        super().__init__(model, precision)
        self.image_size = side
        for name, values in zip(("mean", "std"), statistics, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], False)

    def _pixels(self, image: Tensor, scaled: tuple[int, int]) -> Tensor:
        """[1, 3, *scaled] of ``image`` [3, H, W] uint8."""
        pixels = resize(image.to(self.device).float(), scaled)[:, 0].round().clamp(0, 255) / 255
        return ((pixels - self.mean) / self.std)[None]


class TransformersBackend(_Normalised):
    """``SamModel``, ``SamHQModel``, ``Sam2Model``, ``EdgeTamModel`` or ``Sam3TrackerModel``.

    Args:
        model: one of them.
        precision: ``"bf16"`` embeds images in bfloat16.
    """

    def __init__(self, model: Any, precision: str = "fp32") -> None:
        family = _family(model.config)
        side = _side(model.config.prompt_encoder_config.image_size)
        super().__init__(model, precision, side, _FAMILIES[family][1])
        self.padded = family in _PADDED

    @torch.no_grad()
    def embed(self, image: Tensor) -> Embedding:
        height, width = image.shape[1:]
        side = self.image_size
        scaled = (side, side)
        if self.padded:
            factor = side / max(height, width)
            scaled = max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
        pixels = self._pixels(image, scaled)
        pixels = F.pad(pixels, (0, side - scaled[1], 0, side - scaled[0]))
        with self._narrow():
            found = self.model.get_image_embeddings(pixels)
        more = None
        if isinstance(found, tuple):  # SAM-HQ's decoder also looks at the first of the finer ones
            found, finer = found
            more = [finer[0].float()]
        levels = found if isinstance(found, list) else [found]
        features = tuple(level.float() for level in levels)
        return _VisionEmbedding(features, (height, width), scaled, more)

    @torch.no_grad()
    def predict(self, embedding: Embedding, prompts: Prompts) -> tuple[Tensor, Tensor]:
        if not len(prompts.points):
            return self._no_masks(self._mask_size())
        points, corners = self._scale(prompts, embedding)
        labels = prompts.point_labels.to(self.device)
        boxes = None if corners is None else corners.flatten(1)
        count, features, masks = len(points), embedding.features, None
        if prompts.masks is None:  # prompts of one image
            points, labels = points[None], labels[None]
            boxes = None if boxes is None else boxes[None]
        else:  # as many images, since the models add a mask to its image
            points, labels = points[:, None], labels[:, None]
            boxes = None if boxes is None else boxes[:, None]
            features = tuple(level.expand(count, -1, -1, -1) for level in features)
            masks = self._mask_prompts(prompts.masks.to(self.device), embedding)
        some = prompts.points.shape[1] > 0
        given = {
            "input_points": points if some else None,
            "input_labels": labels if some else None,
            "input_boxes": boxes,
            "input_masks": masks,
            "image_embeddings": features[0] if self.padded else list(features),
            "multimask_output": True,
        }
        if isinstance(embedding, _VisionEmbedding) and embedding.more is not None:
            given["intermediate_embeddings"] = embedding.more
        output = self.model(**given)
        return self._best(output.pred_masks.flatten(0, 1), output.iou_scores.flatten(0, 1))

    def _mask_prompts(self, masks: Tensor, embedding: Embedding) -> Tensor:
        """[K, 1, h, w] of masks [K, H, W], in the frame of the model."""
        if self.padded:
            height, width = embedding.size
            square = max(height, width)
            masks = F.pad(masks, (0, square - width, 0, square - height), value=-PROMPT_LOGIT)
        return resize(masks, self._mask_size())

    def _mask_size(self) -> tuple[int, int]:
        """(h, w) of the model's masks."""
        cells = self.model.prompt_encoder.image_embedding_size[0]
        return 4 * cells, 4 * cells

    @torch.no_grad()
    def upsample(self, embedding: Embedding, logits: Tensor) -> Tensor:
        if not self.padded:
            return resize(logits, embedding.size)[:, 0]
        side, (height, width) = self.image_size, embedding.scaled
        masks = F.interpolate(logits[:, None], (side, side), mode="bilinear", align_corners=False)
        return F.interpolate(
            masks[..., :height, :width], embedding.size, mode="bilinear", align_corners=False
        )[:, 0]


class Found(NamedTuple):
    """What a concept segmenter finds in an image; masks are logits at its own size h x w."""

    logits: Tensor  # [K, h, w] float
    scores: Tensor  # [K] float, 0 to 1
    boxes: Tensor  # [K, 4] float, xyxy in pixels of the image


class ConceptSegmenter(Protocol):
    """A segmenter that finds all that a phrase names, or that looks like exemplars."""

    def embed(self, image: Tensor) -> Any:
        """Whatever ``find`` and ``upsample`` need of ``image`` [3, H, W] uint8 RGB."""
        ...

    def find(
        self,
        embedding: Any,
        phrase: str | None = None,
        exemplars: Tensor | None = None,
        *,
        positive: Tensor | None = None,
        threshold: float = 0.3,
    ) -> Found:
        """Everything of a kind.

        Args:
            embedding: what ``embed`` made of the image.
            phrase: what it is called, in English.
            exemplars: boxes [B, 4] xyxy in pixels of the image, around some of it.
            positive: [B] bool, False where a box shows what it is not; None = all True.
            threshold: the least score.
        """
        ...

    def upsample(self, embedding: Any, logits: Tensor) -> Tensor:
        """Logits [K, h, w] of ``find`` to the image's own frame, [K, H, W]."""
        ...


class Sam3Concepts(_Normalised):
    """``Sam3Model``: SAM 3 asked by phrases and exemplars.

    Args:
        model: a ``Sam3Model``.
        tokenize: a phrase to token ids and attention mask, [1, L] int64 each.
        precision: ``"bf16"`` embeds images in bfloat16.
    """

    def __init__(
        self,
        model: Any,
        tokenize: Callable[[str], tuple[Tensor, Tensor]],
        precision: str = "fp32",
    ) -> None:
        super().__init__(model, precision, _side(model.config.image_size), _HALF)
        self.tokenize = tokenize

    @torch.no_grad()
    def embed(self, image: Tensor) -> Embedding:
        height, width = image.shape[1:]
        side = (self.image_size, self.image_size)
        with self._narrow():
            found = self.model.get_vision_features(self._pixels(image, side))
        for name in ("fpn_hidden_states", "fpn_position_encoding"):
            setattr(found, name, tuple(level.float() for level in getattr(found, name)))
        return _VisionEmbedding((), (height, width), side, found)

    @torch.no_grad()
    def find(
        self,
        embedding: Embedding,
        phrase: str | None = None,
        exemplars: Tensor | None = None,
        *,
        positive: Tensor | None = None,
        threshold: float = 0.3,
    ) -> Found:
        """See `ConceptSegmenter`.

        Raises:
            ValueError: neither a phrase nor exemplars.
        """
        if phrase is None and (exemplars is None or not len(exemplars)):
            raise ValueError("SAM 3 needs a phrase or exemplars to know what to find")
        assert isinstance(embedding, _VisionEmbedding)
        # "visual" is what it was trained to read where boxes alone say what is wanted.
        ids, attention = self.tokenize("visual" if phrase is None else phrase)
        given: dict[str, Tensor] = {}
        size = torch.tensor([*embedding.size[::-1], *embedding.size[::-1]], device=self.device)
        if exemplars is not None and len(exemplars):
            low, high = (exemplars.to(self.device).float() / size).split(2, 1)
            given["input_boxes"] = torch.cat([(low + high) / 2, high - low], 1)[None]
            kinds = torch.ones(len(exemplars)) if positive is None else positive
            given["input_boxes_labels"] = kinds.to(self.device).long()[None]
        output = self.model(
            vision_embeds=embedding.more,
            input_ids=ids.to(self.device),
            attention_mask=attention.to(self.device),
            **given,
        )
        scores = output.pred_logits[0].float().sigmoid()
        if output.presence_logits is not None:  # whether there is any of it at all
            scores = scores * output.presence_logits[0].float().sigmoid()
        kept = scores > threshold
        return Found(
            output.pred_masks[0][kept].float(), scores[kept], output.pred_boxes[0][kept] * size
        )

    @torch.no_grad()
    def upsample(self, embedding: Embedding, logits: Tensor) -> Tensor:
        return resize(logits, embedding.size)[:, 0]


def load_transformers(
    source: str | Path, *, image_size: int | None = None, precision: str = "fp32"
) -> tuple[str, TransformersBackend]:
    """A promptable segmenter of transformers behind the protocol.

    Args:
        source: a folder that ``save_pretrained`` wrote, or the name of a repository of Hugging Face
            with `PREFIX` before it, such as ``"hf:facebook/sam2.1-hiera-tiny"``.
        image_size: side of the square that images are scaled to; None = what the weights are of.
            SAM 3's cannot be changed.
        precision: ``"bf16"`` embeds images in bfloat16.

    Returns:
        The kind of the model, such as ``"sam_hq"``, and the segmenter.

    Raises:
        WeightsError: there are no such weights, they are gated, damaged or of another model, or
            ``PYSEG_OFFLINE`` is set and they are not in the cache.
        ImportError: ``transformers`` is not installed.
    """
    package = require("transformers", extra="hf")
    name = _name(source)
    config = _fetched(package.AutoConfig, name)
    if config.model_type not in _FAMILIES:
        raise WeightsError(
            f"weights: {name} is a {config.model_type!r} model, which takes no points and boxes; "
            f"those that do are {', '.join(_FAMILIES)}"
        )
    family = getattr(package, _FAMILIES[config.model_type][0])
    model = _fetched(family, name, use_safetensors=True)
    if image_size is not None:
        _resize_model(model, image_size)
    return config.model_type, TransformersBackend(model, precision)


def load_sam3(source: str | Path = "hf:facebook/sam3", *, precision: str = "fp32") -> Sam3Concepts:
    """SAM 3 for phrases and exemplars.

    Args:
        source: as for `load_transformers`. The published weights are gated.
        precision: ``"bf16"`` embeds images in bfloat16.

    Raises:
        WeightsError: as `load_transformers`.
        ImportError: ``transformers`` is not installed.
    """
    package = require("transformers", extra="hf")
    name = _name(source)
    model = _fetched(package.Sam3Model, name, use_safetensors=True)
    tokenizer = _fetched(package.AutoTokenizer, name)

    def tokenize(phrase: str) -> tuple[Tensor, Tensor]:
        # Of the length that it was trained with; what is longer would be refused deep inside.
        found = tokenizer(
            phrase, return_tensors="pt", padding="max_length", truncation=True, max_length=32
        )
        return found.input_ids, found.attention_mask

    return Sam3Concepts(model, tokenize, precision)


def is_transformers(source: object) -> bool:
    """Whether weights are of transformers: a name with `PREFIX`, or a folder with config.json."""
    if not isinstance(source, (str, Path)):
        return False
    return str(source).startswith(PREFIX) or (Path(source).expanduser() / "config.json").is_file()


def _name(source: str | Path) -> str:
    return str(source).removeprefix(PREFIX)


def _fetched(kind: Any, name: str, **options: Any) -> Any:
    """``kind.from_pretrained(name)``; its errors in our words."""
    folder = Path(name).expanduser()
    offline = os.environ.get("PYSEG_OFFLINE", "") not in ("", "0")
    try:
        return kind.from_pretrained(
            folder if folder.is_dir() else name,
            local_files_only=offline or folder.is_dir(),
            **options,
        )
    except (OSError, ValueError, RuntimeError) as error:
        text = str(error)
        if folder.is_dir():
            reason = f"{folder} is no folder of weights that transformers reads"
        elif "gated" in text or "401" in text or "403" in text:
            reason = (
                f"{name} is gated: ask for access at https://huggingface.co/{name}, then set "
                "HF_TOKEN to a token of your account (https://huggingface.co/settings/tokens)"
            )
        elif offline:
            reason = (
                f"{name} is not in the cache of Hugging Face, and PYSEG_OFFLINE is set: run "
                f"'hf download {name}' where there is a network, or unset PYSEG_OFFLINE"
            )
        else:
            reason = f"{name} cannot be had from Hugging Face"
        raise WeightsError(f"weights: {reason} ({text.strip().splitlines()[0]})") from error


def _family(config: Any) -> str:
    if config.model_type not in _FAMILIES:
        raise TypeError(
            f"a {config.model_type!r} model takes no points and boxes; those that do are "
            f"{', '.join(_FAMILIES)}"
        )
    return config.model_type


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])


def _resize_model(model: Any, side: int) -> None:
    """Makes a model of another input size."""
    family, config, prompts = _family(model.config), model.config, model.prompt_encoder
    if _FAMILIES[family][0] == "Sam3TrackerModel":
        raise ValueError(f"image_size of SAM 3 cannot be changed, got {side}")
    if family in _PADDED:
        encoder = model.vision_encoder
        cells = cells_of(side, config.vision_config.patch_size)
        if encoder.pos_embed is not None:
            places = encoder.pos_embed.data.permute(0, 3, 1, 2)
            places = F.interpolate(places, (cells, cells), mode="bicubic", align_corners=False)
            encoder.pos_embed = nn.Parameter(places.permute(0, 2, 3, 1).contiguous())
        encoder.patch_embed.image_size = (side, side)
        config.vision_config.image_size = side
        config.prompt_encoder_config.image_embedding_size = cells
    else:
        patch = _side(config.prompt_encoder_config.patch_size)
        cells = 2 * cells_of(side, 2 * patch)
        model.backbone_feature_sizes = [[cells * k, cells * k] for k in (4, 2, 1)]
        prompts.mask_input_size = (4 * cells, 4 * cells)
    config.prompt_encoder_config.image_size = side
    prompts.input_image_size = side
    prompts.image_embedding_size = (cells, cells)
