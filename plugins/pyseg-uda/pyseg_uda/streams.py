"""Mix transformers whose attention is seen, or crosses from one domain into the other.

Wang, Kim, Feris & Betke, "CDAC: Cross-domain attention consistency in transformer for domain
adaptive semantic segmentation", ICCV 2023. They read `pyseg.models.segformer.MixTransformer`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyseg.errors import PysegError
from pyseg.models import SemanticModel
from pyseg.models.segformer import MixTransformer

from .losses import Attention

STREAMS = 4  # source, mixed, mixed queries in the source, source queries in the mixed image


def mix_transformer(model: SemanticModel) -> MixTransformer:
    """The trunk of a model.

    Raises:
        PysegError: it is another network.
    """
    trunk = getattr(model.network, "trunk", None)
    if not isinstance(trunk, MixTransformer):
        raise PysegError(
            f"attention consistency needs a mix transformer, such as segformer_b0, and the model "
            f"is a {type(model.network).__name__}; method='self-training' takes any network"
        )
    return trunk


def attended(trunk: MixTransformer, images: Tensor) -> tuple[list[Tensor], list[Attention]]:
    """Features as the trunk gives them, and the attention of every block.

    Args:
        trunk: the mix transformer.
        images: normalised, [N, 3, H, W].

    Returns:
        Features [N, C, h, w] of the four stages, and an `Attention` for every block.
    """
    x, features, attention = images, [], []
    for embed, blocks, norm in _stages(trunk):
        tokens, size = embed(x)
        for block in blocks:
            q, k, v = block.attn.project(block.norm1(tokens), size)
            weights = _weights(q, k)
            attention.append(_seen(weights, size, block.attn.reduction))
            tokens = tokens + block.drop(block.attn.merge(weights @ v))
            tokens = tokens + block.drop(block.mlp(block.norm2(tokens), size))
        x = _to_map(norm(tokens), size)
        features.append(x)
    return features, attention


def four_streams(
    trunk: MixTransformer, source: Tensor, mixed: Tensor
) -> tuple[list[list[Tensor]], list[Attention]]:
    """Source and mixed images through every block, by themselves and across.

    The first two streams are the trunk's own. The third begins as the source's tokens and gets in
    every block what the *mixed* image's queries find in the source's keys and values, softmax(Q_M
    K_S^T / sqrt(d)) V_S; the fourth the reverse. Queries, keys and values are those of the first
    two streams; across, no gradient goes through queries. All share the weights.

    Args:
        trunk: the mix transformer.
        source: normalised, [N, 3, H, W].
        mixed: the same, of as many images of the same size.

    Returns:
        Features [N, C, h, w] of the four stages for each of the four streams (source, mixed,
        mixed to source, source to mixed), and the attention of the second in every block.
    """
    n = len(source)
    x = torch.cat([source, mixed])
    features: list[list[Tensor]] = [[] for _ in range(STREAMS)]
    attention = []
    for stage, (embed, blocks, norm) in enumerate(_stages(trunk)):
        tokens, size = embed(x)
        if stage == 0:
            tokens = torch.cat([tokens, tokens])
        for block in blocks:
            q, k, v = block.attn.project(block.norm1(tokens[: 2 * n]), size)
            (q_s, q_m), (k_s, k_m), (v_s, v_m) = q.split(n), k.split(n), v.split(n)
            weights = _weights(q_m, k_m)
            attention.append(_seen(weights, size, block.attn.reduction))
            s, m_to_s, s_to_m = F.scaled_dot_product_attention(
                torch.cat([q_s, q_m.detach(), q_s.detach()]),
                torch.cat([k_s, k_s, k_m]),
                torch.cat([v_s, v_s, v_m]),
            ).split(n)
            found = torch.cat([s, weights.to(v_m.dtype) @ v_m, m_to_s, s_to_m])
            tokens = tokens + block.drop(block.attn.merge(found))
            tokens = tokens + block.drop(block.mlp(block.norm2(tokens), size))
        x = _to_map(norm(tokens), size)
        for stream, part in zip(features, x.split(n), strict=True):
            stream.append(part)
    return features, attention


def _stages(trunk: MixTransformer) -> Any:
    return zip(trunk.embeds, trunk.stages, trunk.norms, strict=True)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)


def _seen(weights: Tensor, size: tuple[int, int], reduction: int) -> Attention:
    height, width = (max(1, side // reduction) for side in size)
    return Attention(weights, size, (height, width))


def _to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *size)
