"""A refiner that snaps a network's map to regions: in each all pixels get the same class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyseg
from pyseg.errors import SpecError
from pyseg.types import Segmentation, Segments


class Snap:
    """One class for each region of the image, by the network's votes in it.

    Where the prediction has logits, a region gets the mean of its pixels' probabilities (its
    logarithm are the new logits, at full size); where it has labels only, the label that most of
    its pixels have, of equals the smaller one. Void pixels do not vote and stay void, and pixels in
    no region keep what they have.

    Args:
        method: the model of regions with its options, as in a spec: ``"watershed(h=4)"``. Any model
            of segments will do.

    Raises:
        UnknownName: no model has that name.
        SpecError: ``method`` does not parse or has a wrong option.

    Example:
        >>> pyseg.build("streetnet+snap(method='felzenszwalb(scale=50)')")("street.jpg")
    """

    def __init__(self, *, method: str = "watershed") -> None:
        self.method = method
        self.model = pyseg.models.create(method)

    def __repr__(self) -> str:
        return f"Snap(method={self.method!r})"

    def config(self) -> dict[str, Any]:
        """The options that make it again."""
        return {"method": self.method}

    def refine(self, image: Tensor, prediction: Segmentation) -> Segmentation:
        """The prediction, constant in every region of ``image`` [3, H, W] uint8 RGB.

        Raises:
            SpecError: the method gives no segments, as a model of two classes does.
        """
        segments = self.model.predict([image])[0].segments
        if segments is None:
            raise SpecError(
                f"method={self.method!r} gives no regions to snap to; choose one that does, such "
                "as watershed, felzenszwalb or slic"
            )
        if prediction.logits is None:
            return prediction.with_labels(_voted(segments, prediction))
        probabilities = prediction.probabilities()
        return prediction.with_logits(_averaged(segments, probabilities).clamp_min(1e-12).log())


def _averaged(segments: Segments, values: Tensor) -> Tensor:
    """``values`` [C, H, W], in every segment their mean there; void keeps its own."""
    device = values.device
    owner = segments.map.to(device).long().flatten()
    area = torch.bincount(owner).clamp_min(1)
    flat = values.flatten(1)
    averaged = torch.stack(
        [(torch.bincount(owner, plane.double()) / area)[owner].to(plane.dtype) for plane in flat]
    )
    return torch.where(owner > 0, averaged, flat).view_as(values)


def _voted(segments: Segments, prediction: Segmentation) -> Tensor:
    """The label that most of each segment's pixels have, [H, W]."""
    labels = prediction.labels
    given = labels.cpu().numpy().astype(np.int64).ravel()
    owner = segments.map.cpu().numpy().astype(np.int64).ravel()
    count = len(prediction.classes)
    voting = (given >= 0) & (given < count) & (owner > 0)  # what is neither is void
    keys, votes = np.unique(owner[voting] * count + given[voting], return_counts=True)
    # The most votes last, and of equals the smallest label.
    order = np.lexsort((-(keys % count), votes, keys // count))
    winner = np.zeros(int(owner.max(initial=0)) + 1, np.int64)
    winner[keys[order] // count] = keys[order] % count
    result = np.where(voting, winner[owner], given).reshape(labels.shape)
    return torch.from_numpy(result).to(labels)
