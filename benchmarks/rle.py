"""Masks as run-length texts against pycocotools' C: reading them, and the IoU of pairs."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from pyseg.formats import edges_of, encode_rle
from pyseg.ops.rle import run_overlaps

SIZE, COUNT = (480, 640), 60


def smooth_masks():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(COUNT, 1, 12, 16, generator=generator)
    return interpolate(scores, SIZE, mode="bicubic")[:, 0].numpy() > 0


@pytest.mark.parametrize("threads", [1, 2])
def test_overlaps(compare, threads):
    """From texts to the common pixels of every pair; pycocotools takes texts as well."""
    coco = pytest.importorskip("pycocotools.mask")
    rles = [encode_rle(mask) for mask in smooth_masks()]
    theirs = [{**rle, "counts": rle["counts"].encode()} for rle in rles]
    pairs = tuple(side.ravel() for side in np.mgrid[:COUNT, :COUNT])

    def ours():
        edges, counts = edges_of(rles)
        both = run_overlaps((edges, counts), (edges, counts), pairs).reshape(COUNT, COUNT)
        areas = np.diagonal(both)
        return both / (areas[:, None] + areas - both)

    compare(
        ours=ours,
        peer=lambda: coco.iou(theirs, theirs, [0] * COUNT),
        peer_name="pycocotools",
        threads=threads,
        goal=1,
        check=lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12),
        levels=False,
    )
