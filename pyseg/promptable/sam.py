"""Segment Anything (Kirillov et al., 2023, arXiv:2304.02643) and SAM 2 (Ravi et al., 2024,
arXiv:2408.00714), its image part, as promptable segmenters; from their own packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import require
from ..weights import Remote, load_into, load_state, resolve
from .base import PROMPT_LOGIT, Prompts

_SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/sam_{}.pth"
_SAM2_URL = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/sam2.1_hiera_{}.pt"
_SAM2_FIRST_URL = "https://dl.fbaipublicfiles.com/segment_anything_2/072824/sam2_hiera_{}.pt"

# The publisher gives no sha256 (the suffixes of SAM's file names are of MD5). Of SAM 2.0 none is
# known, so its files are only checked to be whole.
SAM_WEIGHTS = {
    "vit_b": Remote(
        _SAM_URL.format("vit_b_01ec64"),
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": Remote(
        _SAM_URL.format("vit_l_0b3195"),
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": Remote(
        _SAM_URL.format("vit_h_4b8939"),
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}
SAM2_WEIGHTS = {
    "tiny": Remote(
        _SAM2_URL.format("tiny"),
        "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
    ),
    "small": Remote(
        _SAM2_URL.format("small"),
        "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
    ),
    "base_plus": Remote(
        _SAM2_URL.format("base_plus"),
        "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
    ),
    "large": Remote(
        _SAM2_URL.format("large"),
        "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
    ),
    **{
        f"2.0-{size}": Remote(_SAM2_FIRST_URL.format(size))
        for size in ("tiny", "small", "base_plus", "large")
    },
}

# Without isolation, or its build would fetch a second torch.
_SAM2_REMEDY = "SAM2_BUILD_CUDA=0 pip install --no-build-isolation sam2"


PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Embedding:
    features: tuple[Tensor, ...]  # image embedding, for SAM 2 then the finer levels
    size: tuple[int, int]  # of the image
    scaled: tuple[int, int]  # of the image in the model's input


class Backend(nn.Module):
    """What SAM and SAM 2 share: precision, scaling of prompts, the choice among three masks."""

    model: Any  # the packages type little

    def __init__(self, model: nn.Module, precision: str = "fp32") -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.model = model.eval().requires_grad_(False)
        self.precision = precision

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _narrow(self) -> torch.autocast:
        """In which images are embedded; prompts are always answered in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _scale(self, prompts: Prompts, embedding: Embedding) -> tuple[Tensor, Tensor | None]:
        """Points [K, P, 2] and box corners [K, 2, 2] in pixels of the model's input."""
        (height, width), (new_height, new_width) = embedding.size, embedding.scaled
        factor = torch.tensor([new_width / width, new_height / height], device=self.device)
        points = prompts.points.to(self.device) * factor
        if prompts.boxes is None:
            return points, None
        return points, prompts.boxes.to(self.device).reshape(-1, 2, 2) * factor

    def features(self, embedding: Embedding) -> Tensor:
        """[C, h, w] of the whole image, at the model's coarsest stride."""
        level = min(embedding.features, key=lambda level: level.shape[-1])[0]
        side = max(embedding.scaled)  # of a padded square, or of both sides
        height, width = (
            max(1, round(count * scaled / side))
            for count, scaled in zip(level.shape[1:], embedding.scaled, strict=True)
        )
        return level[:, :height, :width]

    def _no_masks(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The answer to no prompts, which the models refuse, each at another place."""
        return torch.zeros(0, *size, device=self.device), torch.zeros(0, device=self.device)

    @staticmethod
    def _best(masks: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Of the three masks [K, 3, h, w] of each prompt the one of the best predicted IoU."""
        quality, best = quality.float().max(1)
        return masks[torch.arange(len(best), device=best.device), best].float(), quality


class SamBackend(Backend):
    """``segment_anything.Sam``: the image keeps its aspect ratio and is padded to a square."""

    @torch.no_grad()
    def embed(self, image: Tensor) -> Embedding:
        height, width = image.shape[1:]
        side = self.model.image_encoder.img_size
        factor = side / max(height, width)
        scaled = max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
        pixels = image.to(self.device).float()[None]
        pixels = F.interpolate(
            pixels, scaled, mode="bilinear", align_corners=False, antialias=True
        ).round()  # the model was trained on 8-bit images, resized as such
        with self._narrow():
            features = self.model.image_encoder(self.model.preprocess(pixels))
        return Embedding((features.float(),), (height, width), scaled)

    @torch.no_grad()
    def predict(self, embedding: Embedding, prompts: Prompts) -> tuple[Tensor, Tensor]:
        encoder = self.model.prompt_encoder
        if not len(prompts.points):
            return self._no_masks(encoder.mask_input_size)
        points, corners = self._scale(prompts, embedding)
        masks = None
        if prompts.masks is not None:
            height, width = embedding.size
            square = max(height, width)
            padded = F.pad(
                prompts.masks.to(self.device),
                (0, square - width, 0, square - height),
                value=-PROMPT_LOGIT,
            )
            masks = resize(padded, encoder.mask_input_size)
        sparse, dense = encoder(
            points=(points, prompts.point_labels.to(self.device)),
            boxes=None if corners is None else corners.flatten(1),
            masks=masks,
        )
        return self._best(
            *self.model.mask_decoder(
                image_embeddings=embedding.features[0],
                image_pe=encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=True,
            )
        )

    @torch.no_grad()
    def upsample(self, embedding: Embedding, logits: Tensor) -> Tensor:
        return self.model.postprocess_masks(logits[:, None], embedding.scaled, embedding.size)[:, 0]


class Sam2Backend(Backend):
    """``sam2.modeling.sam2_base.SAM2Base`` on single images, which it squashes to a square."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, precision: str = "fp32") -> None:
        super().__init__(model, precision)
        # Part of the published normalisation, which sam2 keeps in its predictor.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], False)

    @torch.no_grad()
    def embed(self, image: Tensor) -> Embedding:
        side = (self.model.image_size, self.model.image_size)
        pixels = resize(image.to(self.device).float() / 255, side)[:, 0]
        with self._narrow():
            output = self.model.forward_image(((pixels - self.mean) / self.std)[None])
        levels = output["backbone_fpn"][-self.model.num_feature_levels :]
        *fine, coarse = (level.float() for level in levels)
        if self.model.directly_add_no_mem_embed:
            coarse = coarse + self.model.no_mem_embed.reshape(1, -1, 1, 1)
        height, width = image.shape[1:]
        return Embedding((coarse, *fine), (height, width), side)

    @torch.no_grad()
    def predict(self, embedding: Embedding, prompts: Prompts) -> tuple[Tensor, Tensor]:
        encoder = self.model.sam_prompt_encoder
        if not len(prompts.points):
            return self._no_masks(encoder.mask_input_size)
        points, corners = self._scale(prompts, embedding)
        labels = prompts.point_labels.to(self.device)
        if corners is not None:  # SAM 2 takes a box as two points with labels of their own
            points = torch.cat([corners, points], 1)
            labels = torch.cat([labels.new_tensor([[2, 3]]).expand(len(labels), 2), labels], 1)
        masks = None
        if prompts.masks is not None:
            masks = resize(prompts.masks.to(self.device), encoder.mask_input_size)
        sparse, dense = encoder(points=(points, labels), boxes=None, masks=masks)
        masks, quality, *_ = self.model.sam_mask_decoder(
            image_embeddings=embedding.features[0],
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
            repeat_image=True,
            high_res_features=list(embedding.features[1:]) or None,
        )
        return self._best(masks, quality)

    @torch.no_grad()
    def upsample(self, embedding: Embedding, logits: Tensor) -> Tensor:
        return resize(logits, embedding.size)[:, 0]


def resize(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """[K, h, w] to [K, 1, *size], bilinear; shrinking averages, so that thin masks survive."""
    return F.interpolate(
        planes[:, None], size, mode="bilinear", align_corners=False, antialias=True
    )


def load_segment_anything(
    weights: str | Path | None = "default",
    size: str | None = None,
    *,
    image_size: int | None = None,
    precision: str = "fp32",
) -> tuple[str, SamBackend]:
    """SAM behind the protocol.

    Args:
        weights: ``"vit_b"``, ``"vit_l"`` or ``"vit_h"``, which are downloaded once; a local file
            or URL; ``"default"``, the published weights of ``size``; None, random weights.
        size: one of these three names; by default what ``weights`` are of, else ``"vit_b"``.
        image_size: side of the square that images are scaled to, a multiple of 16; None = 1024, of
            which the weights are.
        precision: ``"bf16"`` embeds images in bfloat16.

    Returns:
        The size and the segmenter.

    Raises:
        WeightsError: the weights are absent, unreachable, damaged or of another architecture.
        ImportError: ``segment-anything`` is not installed.
    """
    size, model = _load(weights, size, SAM_WEIGHTS, _sam_size, _build_sam)
    if image_size is not None:
        _resize_sam(model, image_size)
    return size, SamBackend(model, precision)


def load_segment_anything_2(
    weights: str | Path | None = "default",
    size: str | None = None,
    *,
    image_size: int | None = None,
    precision: str = "fp32",
) -> tuple[str, Sam2Backend]:
    """SAM 2.1 or 2.0, its image part, behind the protocol.

    Args:
        weights: ``"tiny"``, ``"small"``, ``"base_plus"`` or ``"large"`` of SAM 2.1, ``"2.0-tiny"``
            and so on of SAM 2.0, which are downloaded once; a local file or URL; ``"default"``, the
            published weights of ``size``; None, random weights.
        size: one of these names; by default what ``weights`` are of, else ``"tiny"``.
        image_size: side of the square that images are scaled to, a multiple of 32; None = 1024, of
            which the weights are.
        precision: ``"bf16"`` embeds images in bfloat16.

    Returns:
        The size and the segmenter.

    Raises:
        WeightsError: the weights are absent, unreachable, damaged or of another architecture.
        ImportError: ``sam2`` is not installed.
    """
    size, model = _load(weights, size, SAM2_WEIGHTS, _sam2_size, _build_sam2)
    if image_size is not None:
        _resize_sam2(model, image_size)
    return size, Sam2Backend(model, precision)


def _load(
    weights: str | Path | None,
    size: str | None,
    known: Mapping[str, Remote],
    recognise: Callable[[Mapping[str, Tensor]], str | None],
    build: Callable[[str], nn.Module],
) -> tuple[str, nn.Module]:
    smallest = next(iter(known))
    if size is not None and size not in known:
        raise ValueError(f"size must be one of {', '.join(known)}, got {size!r}")
    if weights is None:
        size = size or smallest
        return size, build(size)
    path = resolve((size or smallest) if weights == "default" else weights, known=known)
    state = load_state(path)
    size = size or recognise(state) or smallest
    model = build(size)
    load_into(model, state, path)
    return size, model


def _sam_size(state: Mapping[str, Tensor]) -> str | None:
    embedding = state.get("image_encoder.pos_embed")
    width = embedding.shape[-1] if embedding is not None else 0
    return {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}.get(width)


def _sam2_size(state: Mapping[str, Tensor]) -> str | None:
    blocks = {key.split(".")[3] for key in state if key.startswith("image_encoder.trunk.blocks.")}
    name = {12: "tiny", 16: "small", 24: "base_plus", 48: "large"}.get(len(blocks))
    # What SAM 2.1 added, for video.
    return name if name is None or "no_obj_embed_spatial" in state else f"2.0-{name}"


def _build_sam(size: str) -> nn.Module:
    package = require("segment_anything", remedy="pip install segment-anything")
    return package.sam_model_registry[size](checkpoint=None)


def _resize_sam(model: Any, side: int) -> None:
    """Makes a SAM of another input size: its position embedding is resampled."""
    encoder, prompts = model.image_encoder, model.prompt_encoder
    patch = encoder.patch_embed.proj.kernel_size[0]
    cells = cells_of(side, patch)
    places = encoder.pos_embed.data.permute(0, 3, 1, 2)
    places = F.interpolate(places, (cells, cells), mode="bicubic", align_corners=False)
    encoder.pos_embed = nn.Parameter(places.permute(0, 2, 3, 1).contiguous())
    encoder.img_size = side
    _resize_prompts(prompts, side, cells)


def _resize_sam2(model: Any, side: int) -> None:
    """Makes a SAM 2 of another input size: its trunk resamples its own position embedding."""
    cells = cells_of(side, 2 * model.backbone_stride) * 2
    model.image_size, model.sam_image_embedding_size = side, cells
    _resize_prompts(model.sam_prompt_encoder, side, cells)


def _resize_prompts(encoder: Any, side: int, cells: int) -> None:
    encoder.input_image_size = (side, side)
    encoder.image_embedding_size = (cells, cells)
    encoder.mask_input_size = (4 * cells, 4 * cells)


def cells_of(side: int, patch: int) -> int:
    if side < 4 * patch or side % patch:
        raise ValueError(
            f"image_size must be a multiple of {patch}, at least {4 * patch}, got {side}"
        )
    return side // patch


def _build_sam2(size: str) -> nn.Module:
    """The stock model of a size, without Hydra's global state, which a user's own Hydra needs.

    Importing sam2 initialises that state unless somebody has; building by way of it, as
    ``sam2.build_sam`` does, would fail wherever somebody has.
    """
    # sam2 comes last: it initialises Hydra, and whether somebody had is asked before.
    hydra = require("hydra.core.global_hydra", remedy=_SAM2_REMEDY).GlobalHydra.instance()
    instantiate = require("hydra.utils", remedy=_SAM2_REMEDY).instantiate
    OmegaConf = require("omegaconf", remedy=_SAM2_REMEDY).OmegaConf
    found = hydra.is_initialized()
    package = require("sam2", remedy=_SAM2_REMEDY)
    if not found:
        hydra.clear()
    version, _, name = size.rpartition("-")
    letter = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}[name]
    family = "sam2" if version else "sam2.1"
    config = OmegaConf.load(
        Path(package.__path__[0]) / f"configs/{family}/{family}_hiera_{letter}.yaml"
    )
    OmegaConf.resolve(config)
    return instantiate(config.model)
