"""What is minimised: pseudo-labels and their weight, cross-entropy, feature distance, attention.

Hoyer, Dai & Van Gool, "DAFormer: Improving network architectures and training strategies for
domain-adaptive semantic segmentation", CVPR 2022; Wang, Kim, Feris & Betke, "CDAC: Cross-domain
attention consistency in transformer for domain adaptive semantic segmentation", ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pyseg.types import VOID

TINY = 1e-8  # below it attention counts as this much: its logarithm must stay finite


def pseudo_labels(
    logits: Tensor, valid: Tensor, *, threshold: float = 0.968, trusted: Sequence[int] = (0, 0)
) -> tuple[Tensor, Tensor, Tensor]:
    """What a teacher says of unlabelled images, and how much that counts.

    Every pixel gets the class of the highest probability and the same weight q: the share of the
    batch's pixels whose highest probability is at least ``threshold`` (Tranheden et al., DACS,
    2021; Hoyer et al., 2022, equation 4).

    Args:
        logits: [N, C, h, w] of the teacher; upsampled to the images' size.
        valid: [N, H, W] bool, false where there is no image: void, of weight 0, not counted in q.
        threshold: of the probability, 0..1.
        trusted: rows at the top and at the bottom of the images whose weight is 0, such as those of
            the car's own bonnet.

    Returns:
        Labels [N, H, W] uint8, their weights [N, H, W] float32, and q [].
    """
    size = valid.shape[1:]
    certain, labels = _resized(logits.float(), size).softmax(1).max(1)
    share = ((certain >= threshold) & valid).sum() / valid.sum().clamp(min=1)
    weights = torch.where(valid, share, 0.0)
    top, bottom = trusted
    weights[:, :top] = 0
    weights[:, size[0] - bottom :] = 0
    return torch.where(valid, labels, VOID).to(torch.uint8), weights, share


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over the labelled pixels of the weighted cross-entropy; 0 where none is labelled.

    The mean is not divided by the weights' sum: pseudo-labels of a small q count little.

    Args:
        logits: [N, C, h, w]; upsampled to the labels' size.
        labels: [N, H, W] uint8, 255 = void.
        weights: [N, H, W]; None = 1 everywhere.

    Returns:
        Scalar, float32.
    """
    logits = _resized(logits.float(), labels.shape[1:])
    values = F.cross_entropy(logits, labels.long(), ignore_index=VOID, reduction="none")
    if weights is not None:
        values = values * weights
    return values.sum() / (labels != VOID).sum().clamp(min=1)


def thing_mask(
    labels: Tensor, size: Sequence[int], things: Sequence[int], *, least: float = 0.75
) -> Tensor:
    """Cells of a feature map of which at least a share is of one of the countable classes.

    Args:
        labels: [N, H, W] uint8, 255 = void.
        size: (h, w) of the feature map.
        things: class ids.
        least: the share of a cell's pixels, void ones included.

    Returns:
        [N, h, w] bool.
    """
    planes = torch.stack([labels == thing for thing in things], 1).float()
    return (F.adaptive_avg_pool2d(planes, (size[0], size[1])) >= least).any(1)


def feature_distance(features: Tensor, fixed: Tensor, mask: Tensor) -> Tensor:
    """Mean Euclidean distance of features from those of ImageNet (Hoyer et al., 2022, eq. 7).

    Args:
        features: [N, c, h, w] of the last stage.
        fixed: the same of the network as ImageNet's weights have it.
        mask: [N, h, w] bool, the cells that count; where there is none the distance is 0, and so
            are its gradients.

    Returns:
        Scalar, float32.
    """
    difference = (features.float() - fixed.float()).movedim(1, -1)[mask]  # [cells, c]
    if not len(difference):  # a mean over nothing is NaN, and a norm's gradient at 0, too
        return difference.sum()
    # The root's gradient is infinite at 0, where the first step of a training is.
    return difference.square().sum(1).clamp(min=TINY).sqrt().mean()


@dataclass(frozen=True)
class Attention:
    """Weights of attention of one block."""

    weights: Tensor  # [N, heads, queries, keys], each row sums to 1
    queries: tuple[int, int]  # the map of the queries, (height, width)
    keys: tuple[int, int]  # that of the keys


def mixed_attention(mask: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """What attention on a mixed image should be: every query's as in the image that it is from.

    Args:
        mask: [N, queries], 1 where the mixed image is of the source.
        source: [N, heads, queries, keys] on the source image.
        target: the same on the target image.
    """
    m = mask[:, None, :, None].to(source.dtype)
    return m * source + (1 - m) * target


def attention_consistency(
    source: Sequence[Attention],
    target: Sequence[Attention],
    mixed: Sequence[Attention],
    mask: Tensor,
) -> Tensor:
    """Kullback-Leibler divergence of attention on mixed images from that on both of its sources.

    Of every block the mean over all pairs of query and key of w (A* log A* - A* log A), where A* is
    `mixed_attention` and w is 1 for pairs of one domain, 0 for others: what a query of the source
    should find in pixels of the target, no image tells (Wang et al., 2023). Then the mean over
    blocks.

    Args:
        source: of a teacher on the source images.
        target: of the teacher on the target images.
        mixed: of the student on the mixed images.
        mask: [N, H, W] bool, true where the mixed image is of the source.

    Returns:
        Scalar, float32.
    """
    losses = []
    for own, other, found in zip(source, target, mixed, strict=True):
        rows, columns = (_shrunk(mask, size) for size in (found.queries, found.keys))
        wanted = mixed_attention(rows, own.weights.float(), other.weights.float())
        same = (rows[:, :, None] == columns[:, None, :])[:, None]
        ratio = wanted.clamp(min=TINY).log() - found.weights.float().clamp(min=TINY).log()
        losses.append((wanted * ratio * same).mean())
    return torch.stack(losses).mean()


def _shrunk(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, H, W] bool at another size, as rows [N, h w]."""
    return F.interpolate(mask[:, None].float(), size, mode="nearest")[:, 0].flatten(1) > 0.5


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
