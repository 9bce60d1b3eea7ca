"""How well pooled features know where their box is: the table of the Mask R-CNN lecture, measured.

    python benchmarks/roi_localisation.py [--stride 8] [--boxes 200]

RoIPool, RoIWarp and RoIAlign (aligned or not, average or maximum) pool boxes that are moved by
fractions of a cell, that is of a pixel of the feature map.

* Linear field: the map's value is the column's (or row's) position, so what a bin ought to hold is
  known. "offset" is how far the bins are from where they should be, on average over boxes and
  shifts: half a cell of it is a wrong origin. "jitter" is what remains of the error when each
  operation's own mean is taken off, RMS: rounding.
* Real features: streetnet's backbone on the bundled street image, and on the image moved by whole
  pixels less than the stride. A box is pooled from the first; the position is sought at which
  pooling from the second gives most similar features. "error" is the mean distance of that from
  the truth in pixels of the image. It contains the backbone's own aliasing, the same for all.
"""

import argparse
from pathlib import Path

import torch

import pyseg
from pyseg.ops import roi_align, roi_pool, roi_warp

BINS = 7


def operations(ratio):
    """(name, aligned, reduction, function of map, boxes and scale)"""
    yield "RoIPool", "", "max", lambda x, b, s: roi_pool(x, b, BINS, s)
    for name, function in (("RoIWarp", roi_warp), ("RoIAlign", roi_align)):
        for aligned in (False, True):
            for mode in ("max", "avg"):
                yield (
                    name,
                    "yes" if aligned else "no",
                    mode,
                    lambda x, b, s, f=function, a=aligned, m=mode: f(
                        x, b, BINS, s, ratio, a, mode=m
                    ),
                )


def make_boxes(generator, count, height, width, margin):
    """[count, 4] within the image, sides of 48 to 160 pixels, corners at any fraction of a pixel."""
    extent = torch.rand(count, 2, generator=generator) * 112 + 48
    room = torch.tensor([width, height]) - extent - 2 * margin
    corner = margin + torch.rand(count, 2, generator=generator) * room
    return torch.cat([corner, corner + extent], 1)


def on_linear_field(function, boxes, height, width, stride):
    """(offset, jitter) in cells."""
    rows, columns = height // stride, width // stride
    # The value at the centre of a cell is its position, where cell 0 reaches from 0 to 1.
    field = torch.stack(
        [
            (torch.arange(columns) + 0.5).expand(rows, columns),
            (torch.arange(rows) + 0.5)[:, None].expand(rows, columns),
        ]
    )[None].float()
    regions = torch.cat([torch.zeros(len(boxes), 1), boxes], 1)
    pooled = function(field, regions, 1 / stride)
    cells = boxes / stride
    steps = (torch.arange(BINS) + 0.5) / BINS
    x = cells[:, :1] + (cells[:, 2:3] - cells[:, :1]) * steps
    y = cells[:, 1:2] + (cells[:, 3:] - cells[:, 1:2]) * steps
    error = torch.cat([pooled[:, 0] - x[:, None], pooled[:, 1] - y[:, :, None]])
    own = error.flatten(1).mean(1)  # of each box: where it is, not how it is divided
    return own.mean().item(), own.std().item()


@torch.inference_mode()
def backbone_features(images):
    """[N, C, H / 8, W / 8] of streetnet's backbone, [N, 3, H, W] images of 0 to 255."""
    model = pyseg.build("streetnet").stages[0]
    return model.features(images)


def on_real_features(function, features, shifts, boxes, stride, reach):
    """Mean distance in pixels between the position found and the true one, along x."""
    count = len(boxes)
    first = torch.cat([torch.zeros(count, 1), boxes], 1)
    wanted = function(features, first, 1 / stride).flatten(1)
    errors = []
    candidates = torch.arange(-reach, reach + 0.5, 0.5)
    for image, shift in enumerate(shifts, start=1):
        distances = []
        for candidate in candidates:
            moved = boxes + torch.tensor([1.0, 0, 1, 0]) * (shift + candidate)
            index = torch.full((count, 1), float(image))
            got = function(features, torch.cat([index, moved], 1), 1 / stride).flatten(1)
            distances.append((got - wanted).square().sum(1))
        # Where several are equal, as in a plateau of rounding, their middle is the best guess.
        distances = torch.stack(distances, 1)
        best = distances <= distances.amin(1, keepdim=True) * (1 + 1e-6)
        found = (best * candidates).sum(1) / best.sum(1)
        errors.append(found.abs())
    return torch.cat(errors).mean().item()


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boxes", type=int, default=200)
    parser.add_argument("--sampling-ratio", type=int, default=2)
    arguments = parser.parse_args()
