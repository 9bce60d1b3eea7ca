"""SegFormer: a hierarchical transformer without positions and a head of linear layers.

Sources: Xie, Wang, Yu, Anandkumar, Alvarez & Luo, "SegFormer: Simple and efficient design for
semantic segmentation with transformers", NeurIPS 2021; the head ``"daformer"``: Hoyer, Dai & Van
Gool, "DAFormer: Improving network architectures and training strategies for domain-adaptive
semantic segmentation", CVPR 2022.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from ..classes import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE
from .facts import facts
from .semantic import SemanticModel, semantic_model, with_options

PAPER = (
    "Xie, Wang, Yu, Anandkumar, Alvarez & Luo, SegFormer: Simple and efficient design for semantic "
    "segmentation with transformers, NeurIPS 2021"
)

OPTIONS = """
    Args:
        head: ``"segformer"``, linear layers; or ``"daformer"``, which has separable convolutions of
            four dilations on them, for adaptation to other domains.
        num_classes: None = Cityscapes' 19.
        weights: nothing is published under a name, so that ``"default"`` is an error that says so;
            a path or a URL = a checkpoint of the authors' (NVIDIA's), of transformers or, with
            ``head="daformer"``, of DAFormer's authors; of a classifier, such as the authors'
            ``mit_b0.pth``, as the backbone to start training from; or of `pyseg train`. None =
            random.

    Raises:
        ValueError: ``num_classes`` below 1, or another ``head``.
        WeightsError: ``"default"``, or ``weights`` that cannot be found or are another network's.
    """

Head = Literal["segformer", "daformer"]

# name: channels of the stages, blocks in them, channels of the head
SIZES = {
    "segformer_b0": ((32, 64, 160, 256), (2, 2, 2, 2), 256),
    "segformer_b1": ((64, 128, 320, 512), (2, 2, 2, 2), 256),
    "segformer_b2": ((64, 128, 320, 512), (3, 4, 6, 3), 768),
    "segformer_b3": ((64, 128, 320, 512), (3, 4, 18, 3), 768),
    "segformer_b4": ((64, 128, 320, 512), (3, 8, 27, 3), 768),
    "segformer_b5": ((64, 128, 320, 512), (3, 6, 40, 3), 768),
}
CITYSCAPES = ("mIoU", "Cityscapes val, windows of 1024x1024", "OpenMMLab's mmsegmentation")
HEADS = (1, 2, 5, 8)  # of attention, by stage
REDUCTIONS = (8, 4, 2, 1)  # of keys and values per side, by stage
DROP_PATH = 0.1  # of the last block; those before it have less


@facts(paper=PAPER, scores=[(76.54, *CITYSCAPES)])
@with_options(OPTIONS)
def segformer_b0(
    *,
    head: Head = "segformer",
    num_classes: int | None = None,
    weights: str | Path | None = "default",
) -> SemanticModel:
    """SegFormer-B0 (Xie et al., 2021), 3.7 M parameters; logits at stride 4."""
    return _build("segformer_b0", head, num_classes, weights)


@facts(paper=PAPER, scores=[(78.56, *CITYSCAPES)])
@with_options(OPTIONS)
def segformer_b1(
    *,
    head: Head = "segformer",
    num_classes: int | None = None,
    weights: str | Path | None = "default",
) -> SemanticModel:
    """SegFormer-B1 (Xie et al., 2021), 13.7 M parameters; logits at stride 4."""
    return _build("segformer_b1", head, num_classes, weights)


@facts(paper=PAPER, scores=[(81.08, *CITYSCAPES)])
@with_options(OPTIONS)
def segformer_b2(
    *,
    head: Head = "segformer",
    num_classes: int | None = None,
    weights: str | Path | None = "default",
) -> SemanticModel:
    """SegFormer-B2 (Xie et al., 2021), 27.4 M parameters; logits at stride 4."""
    return _build("segformer_b2", head, num_classes, weights)


@facts(paper=PAPER, scores=[(81.94, *CITYSCAPES)])
@with_options(OPTIONS)
def segformer_b3(
    *,
    head: Head = "segformer",
    num_classes: int | None = None,
    weights: str | Path | None = "default",
) -> SemanticModel:
    """SegFormer-B3 (Xie et al., 2021), 47.2 M parameters; logits at stride 4."""
    return _build("segformer_b3", head, num_classes, weights)


@facts(paper=PAPER, scores=[(81.89, *CITYSCAPES)])
@with_options(OPTIONS)
def segformer_b4(
    *,
    head: Head = "segformer",
    num_classes: int | None = None,
    weights: str | Path | None = "default",
) -> SemanticModel:
    """SegFormer-B4 (Xie et al., 2021), 64.0 M parameters; logits at stride 4."""
    return _build("segformer_b4", head, num_classes, weights)


@facts(paper=PAPER, scores=[(82.25, *CITYSCAPES)])
@with_options(OPTIONS)
def segformer_b5(
    *,
    head: Head = "segformer",
    num_classes: int | None = None,
    weights: str | Path | None = "default",
) -> SemanticModel:
    """SegFormer-B5 (Xie et al., 2021), 84.6 M parameters; logits at stride 4."""
    return _build("segformer_b5", head, num_classes, weights)


class SegFormer(nn.Module):
    """Mix transformer and head.

    Args:
        classes: channels of the logits.
        widths: channels of the four stages.
        depths: blocks in them.
        width: channels of the head ``"segformer"``; the other one has 256.
        head: which one.
    """

    def __init__(
        self,
        classes: int,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        width: int,
        head: Head = "segformer",
    ) -> None:
        super().__init__()
        self.trunk = MixTransformer(widths, depths)
        self.head: nn.Module
        if head == "segformer":
            self.head = LinearHead(widths, width, classes)
        else:
            self.head = DAFormerHead(widths, 256, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, C, H / 4, W / 4]."""
        return self.head(self.trunk(images))


class MixTransformer(nn.Module):
    """The backbone: four stages, each of overlapping patches and blocks of attention."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        self.embeds, self.stages = nn.ModuleList(), nn.ModuleList()
        drops = iter(torch.linspace(0, DROP_PATH, sum(depths), device="cpu").tolist())
        inputs = 3
        for k, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            self.embeds.append(Embedding(inputs, width, *((7, 4) if k == 0 else (3, 2))))
            self.stages.append(
                nn.ModuleList(
                    Block(width, HEADS[k], REDUCTIONS[k], next(drops)) for _ in range(depth)
                )
            )
            inputs = width
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for width in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised images [N, 3, H, W] to features at strides 4, 8, 16 and 32."""
        outputs = []
        for embed, blocks, norm in zip(self.embeds, self.stages, self.norms, strict=True):
            tokens, size = embed(x)
            for block in blocks:  # type: ignore[union-attr, attr-defined]
                tokens = block(tokens, size)
            x = _to_map(norm(tokens), size)
            outputs.append(x)
        return outputs


class Embedding(nn.Module):
    """Overlapping patches as tokens."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[N, inputs, H, W] to tokens [N, h w, outputs] and (h, w)."""
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class Attention(nn.Module):
    """Self-attention to keys and values of a map that is ``reduction`` times smaller per side."""

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.reduction = reduction
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        if reduction > 1:
            self.sr = nn.Conv2d(width, width, reduction, reduction)
            self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [N, h w, C] of a map of ``size`` to as many."""
        q, k, v = self.project(x, size)
        return self.merge(F.scaled_dot_product_attention(q, k, v))

    def project(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens as queries [N, heads, h w, c], and keys and values [N, heads, tokens', c]."""
        source = x
        if self.reduction > 1:
            plane = _to_map(x, size)
            # a map smaller than one cell is filled up with zeros; other remainders are left out
            short = [max(0, self.reduction - side) for side in size]
            if any(short):
                plane = F.pad(plane, (0, short[1], 0, short[0]))
            source = self.norm(self.sr(plane).flatten(2).transpose(1, 2))
        n, count, width = x.shape
        q = self.q(x).view(n, count, self.heads, -1).transpose(1, 2)
        k, v = self.kv(source).view(n, -1, 2, self.heads, width // self.heads).unbind(2)
        return q, k.transpose(1, 2), v.transpose(1, 2)

    def merge(self, y: Tensor) -> Tensor:
        """What the heads found, [N, heads, h w, c], as tokens [N, h w, C]."""
        return self.proj(y.transpose(1, 2).flatten(2))


class MixMLP(nn.Module):
    """Two linear layers with a depthwise convolution between, by which tokens know their place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.dwconv = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [N, h w, C] of a map of ``size`` to as many."""
        x = self.dwconv(_to_map(self.fc1(x), size))
        return self.fc2(F.gelu(x.flatten(2).transpose(1, 2)))


class Block(nn.Module):
    """Attention and `MixMLP`, each normalised before and added to what there was."""

    def __init__(self, width: int, heads: int, reduction: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, reduction)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MixMLP(width)
        self.drop = StochasticDepth(drop, "row")

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [N, h w, C] of a map of ``size`` to as many."""
        x = x + self.drop(self.attn(self.norm1(x), size))
        return x + self.drop(self.mlp(self.norm2(x), size))


class LinearHead(nn.Module):
    """SegFormer's: a linear layer for every stage, all joined at stride 4 by one more."""

    def __init__(self, widths: Sequence[int], width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(inputs, width) for inputs in widths)
        self.fuse = _conv(len(widths) * width, width, 1)
        self.drop = nn.Dropout2d(0.1)
        self.score = nn.Conv2d(width, classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        # the authors join them from the last stage to the first
        return self.score(self.drop(self.fuse(_joined(self.linear, features, reverse=True))))


class DAFormerHead(nn.Module):
    """DAFormer's: a linear layer for every stage, then separable convolutions of four dilations."""

    def __init__(self, widths: Sequence[int], width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(inputs, width) for inputs in widths)
        total = len(widths) * width
        self.branches = nn.ModuleList([_conv(total, width, 1)])
        for rate in (6, 12, 18):
            depthwise = _conv(total, total, 3, dilation=rate, groups=total)
            self.branches.append(nn.Sequential(depthwise, _conv(total, width, 1)))
        self.fuse = _conv(len(self.branches) * width, width, 3)
        self.drop = nn.Dropout2d(0.1)
        self.score = nn.Conv2d(width, classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x = _joined(self.linear, features)
        x = self.fuse(torch.cat([branch(x) for branch in self.branches], 1))
        return self.score(self.drop(x))


def _joined(linear: nn.ModuleList, features: Sequence[Tensor], *, reverse: bool = False) -> Tensor:
    """Each feature through its linear layer, at the size of the first, as one tensor."""
    size = features[0].shape[2:]
    outputs = []
    for layer, x in zip(linear, features, strict=True):
        x = layer(x.movedim(1, -1)).movedim(-1, 1)
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        outputs.append(x)
    return torch.cat(outputs[::-1] if reverse else outputs, 1)


def _to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, h w, C] to [N, C, h, w]."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *size)


def _conv(inputs: int, outputs: int, kernel: int, **options: Any) -> nn.Sequential:
    padding = kernel // 2 * options.get("dilation", 1)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False, **options),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


# What to make of keys of NVIDIA's, DAFormer's and transformers' (before and from its version 5),
# in this order. A number that follows "#" counts from 1 and becomes one that counts from 0.
_RENAMED = (
    (r"^(model|module)\.", ""),
    (r"^backbone\.", ""),
    (r"^patch_embed(\d)\.", r"trunk.embeds.#\1."),
    (r"^block(\d)\.", r"trunk.stages.#\1."),
    (r"^norm(\d)\.", r"trunk.norms.#\1."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"^decode_head\.linear_c(\d)\.proj\.", r"head.linear.#\1."),
    (r"^decode_head\.linear_fuse\.conv\.", "head.fuse.0."),
    (r"^decode_head\.linear_fuse\.bn\.", "head.fuse.1."),
    (r"^decode_head\.linear_pred\.", "head.score."),
    # DAFormer
    (r"^decode_head\.embed_layers\.(\d)\.proj\.", r"head.linear.\1."),
    (r"^decode_head\.fuse_layer\.aspp_modules\.", "head.branches."),
    (r"^decode_head\.fuse_layer\.bottleneck\.", "head.fuse."),
    (r"^decode_head\.conv_seg\.", "head.score."),
    (r"^(head\.branches\..*)\.depthwise_conv\.", r"\1.0."),
    (r"^(head\.branches\..*)\.pointwise_conv\.", r"\1.1."),
    (r"^(head\.(?:branches|fuse)\b.*)\.conv\.", r"\1.0."),
    (r"^(head\.(?:branches|fuse)\b.*)\.bn\.", r"\1.1."),
    # transformers
    (r"^segformer\.(encoder\.)?", "hf."),
    (r"^hf\.patch_embeddings\.(\d)\.", r"trunk.embeds.\1."),
    (r"^hf\.block\.", "trunk.stages."),
    (r"^hf\.layer_norm\.(\d)\.", r"trunk.norms.\1."),
    (r"^hf\.stages\.(\d)\.patch_embeddings\.", r"trunk.embeds.\1."),
    (r"^hf\.stages\.(\d)\.blocks\.", r"trunk.stages.\1."),
    (r"^hf\.stages\.(\d)\.layer_norm\.", r"trunk.norms.\1."),
    (r"^(trunk\.embeds\.\d)\.layer_norm\.", r"\1.norm."),
    (r"\.(layer_norm_1|layernorm_before)\.", ".norm1."),
    (r"\.(layer_norm_2|layernorm_after)\.", ".norm2."),
    (r"\.attention\.(self\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(self\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(self\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(self\.sr|sequence_reduction\.sequence_reduction)\.", ".attn.sr."),
    (r"\.attention\.(self|sequence_reduction)\.layer_norm\.", ".attn.norm."),
    (r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
    (r"^decode_head\.(?:linear_c|linear_projections)\.(\d)\.proj\.", r"head.linear.\1."),
    (r"^decode_head\.linear_fuse\.", "head.fuse.0."),
    (r"^decode_head\.batch_norm\.", "head.fuse.1."),
    (r"^decode_head\.classifier\.", "head.score."),
)


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of NVIDIA's, DAFormer's and transformers' networks and classifiers."""
    converted: dict[str, Tensor] = {}
    # mmsegmentation gives NVIDIA's head a last layer that nothing uses
    unused = any(".linear_pred." in key for key in state)
    for key, value in state.items():
        # the teacher and the frozen copy of DAFormer's training; layers that classify images
        if key.startswith(("ema_model.", "imnet_model.", "head.", "classifier.")):
            continue
        if unused and ".conv_seg." in key:
            continue
        for pattern, replacement in _RENAMED:
            key = re.sub(pattern, replacement, key)
        converted[re.sub(r"#(\d)", lambda found: str(int(found[1]) - 1), key)] = value
    for key in [key for key in converted if ".attn.k." in key]:
        other = key.replace(".attn.k.", ".attn.v.")
        if other in converted:
            pair = (converted.pop(key), converted.pop(other))
            converted[key.replace(".attn.k.", ".attn.kv.")] = torch.cat(pair)
    return converted


def _build(
    name: str, head: Head, num_classes: int | None, weights: str | Path | None
) -> SemanticModel:
    if head not in ("segformer", "daformer"):
        raise ValueError(f"head must be 'segformer' or 'daformer', got {head!r}")
    widths, depths, width = SIZES[name]
    return semantic_model(
        name,
        partial(SegFormer, widths=widths, depths=depths, width=width, head=head),
        classes=CITYSCAPES_CLASSES,
        palette=CITYSCAPES_PALETTE,
        num_classes=num_classes,
        weights=weights,
        heads=("head.score",),
        convert=_convert,
        trunk="trunk",
    )
