"""How well pooled features know where their box is: RoIPool, RoIWarp and RoIAlign, measured.

    python benchmarks/roi_localisation.py [--stride 16] [--boxes 200]

prints the table that docs/roi_pooling.md explains. Boxes are moved by fractions of a cell, that is
of a pixel of the feature map:

* On a linear field, whose value is the position of the cell's centre, so that what a bin ought to
  hold is known. "offset": how far, on average, a box's bins are from where they should be. "jitter"
  and "worst": what is left of a box's error without its mean over the shifts, RMS and at most; it
  is 0 where the pooled values move as the box does.
* On real features: an encoder stage of `streetnet` on the bundled street image, and on the same
  image moved by whole pixels. A box is pooled from the first; that position is sought where pooling
  from the second gives the most similar values. "error": how far it is from the truth, mean. It
  contains what the network's own strides do to a moved image, the same for all.
"""

import argparse

import torch

from pyseg.image import read_image
from pyseg.models.streetnet import BUNDLED, streetnet
from pyseg.ops import roi_align, roi_pool, roi_warp

BINS = 7
SAMPLES = 2  # along each side of a bin
STAGES = {4: 1, 8: 2, 16: 4, 32: 5}  # of streetnet's trunk, by stride
SHIFTS = 16  # of a box on the linear field
STEP = 0.5  # pixels, between the positions that are tried on real features


def operations():
    """(name, aligned, reduction, function of a map, boxes and a scale)"""

    def bind(function, aligned, mode):
        return lambda x, boxes, scale: function(x, boxes, BINS, scale, SAMPLES, aligned, mode=mode)

    yield "RoIPool", "", "max", lambda x, boxes, scale: roi_pool(x, boxes, BINS, scale)
    for name, function in (("RoIWarp", roi_warp), ("RoIAlign", roi_align)):
        for aligned in (False, True):
            for mode in ("max", "avg"):
                yield name, "yes" if aligned else "no", mode, bind(function, aligned, mode)


def make_boxes(generator, count, height, width, margin):
    """[count, 4] with sides of 64 to 192 pixels, `margin` away from the border."""
    extent = torch.rand(count, 2, generator=generator) * 128 + 64
    room = torch.tensor([width, height]) - extent - 2 * margin
    corner = margin + torch.rand(count, 2, generator=generator) * room
    return torch.cat([corner, corner + extent], 1)


def on_linear_field(function, boxes, shifts, height, width, stride):
    """(offset, jitter, worst) in cells. boxes: [K, 4]; shifts: [S, 2], in pixels."""
    rows, columns = height // stride, width // stride
    field = torch.stack(  # in cells, of which the first reaches from 0 to 1
        [
            (torch.arange(columns) + 0.5).expand(rows, columns),
            (torch.arange(rows) + 0.5)[:, None].expand(rows, columns),
        ]
    )[None]
    moved = (boxes[:, None] + shifts.repeat(1, 2)).flatten(0, 1)
    pooled = function(field, [moved], 1 / stride)
    steps = (torch.arange(BINS) + 0.5) / BINS
    cells = moved / stride
    x = cells[:, :1] + (cells[:, 2:3] - cells[:, :1]) * steps
    y = cells[:, 1:2] + (cells[:, 3:] - cells[:, 1:2]) * steps
    along_x = (pooled[:, 0] - x[:, None]).mean((1, 2))
    along_y = (pooled[:, 1] - y[:, :, None]).mean((1, 2))
    error = torch.stack([along_x, along_y], 1).unflatten(0, (len(boxes), len(shifts)))
    rest = error - error.mean(1, keepdim=True)
    return error.mean().item(), rest.square().mean().sqrt().item(), rest.abs().max().item()


@torch.inference_mode()
def stage_features(images, stride):
    """[N, C, H / stride, W / stride] of streetnet's encoder for N uint8 images [3, H, W]."""
    model = streetnet().eval()
    kept = []
    handle = model.network.trunk.stages[STAGES[stride]].register_forward_hook(
        lambda module, inputs, output: kept.append(output)
    )
    model(torch.stack(images))
    handle.remove()
    return torch.cat(kept)


def on_real_features(function, features, shifts, boxes, stride):
    """Mean distance in pixels between the position found and the true one, along x.

    features: of the image, and of the image moved to the left by each of the shifts.
    """
    wanted = function(features[:1], [boxes], 1 / stride).flatten(1)
    candidates = torch.arange(-stride, stride + STEP, STEP)
    along_x = torch.tensor([1.0, 0, 1, 0])
    errors = []
    for level, shift in zip(features[1:], shifts, strict=True):
        distances = []
        for candidate in candidates:
            got = function(level[None], [boxes + (candidate - shift) * along_x], 1 / stride)
            distances.append((got.flatten(1) - wanted).square().sum(1))
        distance = torch.stack(distances, 1)
        # Rounding makes plateaus of equal positions: their middle is the best guess.
        best = distance <= distance.amin(1, keepdim=True) * (1 + 1e-5)
        errors.append(((best * candidates).sum(1) / best.sum(1)).abs())
    return torch.cat(errors).mean().item()


def measure(count, stride):
    """Rows of (name, aligned, reduction, offset, jitter, worst, error)."""
    generator = torch.Generator().manual_seed(0)
    height = width = 32 * stride
    margin = 2.0 * stride  # then no sample falls on the border, where the field is not linear
    boxes = make_boxes(generator, count, height, width, margin)
    along_x = (torch.arange(SHIFTS) + 0.5) / SHIFTS  # evenly, and differently along y
    shifts = torch.stack([along_x, along_x[torch.arange(SHIFTS) * 7 % SHIFTS]], 1) * stride

    image = read_image(BUNDLED.parent / "street.jpg")
    pixels = range(1, stride, max(1, stride // 8))
    full = image.shape[2] - stride
    crops = [image[:, :, s : s + full] for s in (0, *pixels)]
    features = stage_features(crops, stride)
    real_boxes = make_boxes(generator, count, image.shape[1], full, margin)
    for name, aligned, mode, function in operations():
        linear = on_linear_field(function, boxes, shifts, height, width, stride)
        error = on_real_features(function, features, pixels, real_boxes, stride)
        yield name, aligned, mode, *linear, error


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stride", type=int, default=16, choices=STAGES)
    parser.add_argument("--boxes", type=int, default=200)
    arguments = parser.parse_args()
    print("| operation | aligned | values | offset | jitter | worst | error, real features |")
    print("|---|---|---|---|---|---|---|")
    for name, aligned, mode, offset, jitter, worst, error in measure(
        arguments.boxes, arguments.stride
    ):
        numbers = f"{offset:+.2f} | {jitter:.2f} | {worst:.2f} | {error / arguments.stride:.3f}"
        print(f"| {name} | {aligned} | {mode} | {numbers} |")


if __name__ == "__main__":
    main()
