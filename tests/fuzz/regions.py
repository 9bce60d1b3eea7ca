"""Cases of RoI pooling and of deformable convolution: against torchvision, and written out."""

import numpy as np
import torch
import torchvision

from pyseg import ops

from .draw import FLOATS, NO_TENSORS, Draw, Wrong, close, no_integer, no_number, op
from .logits import draw_boxes

FARTHEST = 2.0**30
WIDE = {torch.float64: torch.float64}  # what a dtype is computed in, if not float32
# Rounding of sums, relative to the sum of magnitudes; and of a result of half precision.
EPSILON = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


# --- regions of interest ----------------------------------------------------------------------


def cut(x: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(x, nan=-FARTHEST).clamp(-FARTHEST, FARTHEST)


class Axis:
    """Where the samples of a box lie along one axis; computed in the precision of the op."""

    def __init__(self, low, high, scale, aligned, ratio, bins, size) -> None:
        one = low.new_ones(())
        offset = 0.5 if aligned else 0.0
        start, end = cut(low * scale) - offset, cut(high * scale) - offset
        extent = (end - start if aligned else torch.maximum(end - start, one)) / bins
        adaptive = float(extent.ceil())
        self.count = ratio if ratio > 0 else max(0, int(adaptive))
        # Another rounding of these could give another number of samples, or drop one.
        self.unsure = ratio <= 0 and abs(float(extent) - round(float(extent))) < 1e-4
        if self.count * bins > 4096:
            self.unsure, self.count = True, 1
        steps = torch.arange(self.count).to(low) + 0.5
        at = start + torch.arange(bins).to(low)[:, None] * extent
        at = (at + steps * extent / max(self.count, 1)).flatten()
        self.valid = (at >= -1) & (at <= size)
        inside = at.clamp(0, size)
        self.low = inside.floor().clamp(max=size - 1).long()
        self.high = (self.low + 1).clamp(max=size - 1)
        self.t = torch.where(self.low < size - 1, inside - self.low.to(at), 0).double()
        margin = 1e-4 * (1 + at.abs())
        self.shaky = ((at + 1).abs() < margin) | ((at - size).abs() < margin)
        self.near = torch.minimum(self.t, 1 - self.t) < margin  # a neighbour may have no part


def blend(a, b, t):
    return torch.where(t == 0, a, (1 - t) * a + t * b)


def pool_box(plane, y: Axis, x: Axis, bins, mode):
    """[C, *bins] of one box on [C, H, W] float64, and which bins rounding could change [*bins]."""
    rows, lower = plane[:, y.low], plane[:, y.high]
    tx, ty = x.t[None, None], y.t[None, :, None]
    values = blend(
        blend(rows[:, :, x.low], rows[:, :, x.high], tx),
        blend(lower[:, :, x.low], lower[:, :, x.high], tx),
        ty,
    )
    valid = y.valid[:, None] & x.valid
    wild = ~plane.detach().isfinite().all(0)
    touched = wild[y.low][:, x.low] | wild[y.high][:, x.low]
    touched = touched | wild[y.low][:, x.high] | wild[y.high][:, x.high]
    unsure = (y.shaky[:, None] | x.shaky) | (touched & (y.near[:, None] | x.near))
    # Infinities of both signs: the order of sums decides between infinity and NaN.
    shape = (-1, bins[0], y.count, bins[1], x.count)
    if y.count == 0 or x.count == 0:
        return plane.new_zeros((len(plane), *bins)), torch.zeros(bins, dtype=torch.bool)
    unsure = unsure.reshape(shape[1:]).any(3).any(1)
    values, valid = values.reshape(shape), valid.reshape(shape[1:])
    if mode == "avg":
        return torch.where(valid, values, 0).sum((2, 4)) / (y.count * x.count), unsure
    largest = torch.where(valid, values, -torch.inf).amax((2, 4))
    return torch.where(valid.any(3).any(1), largest, 0), unsure


def pool_pixels(plane, box, scale, bins):
    """RoIPool of one box, [C, *bins]."""
    size, ranges = plane.shape[1:], []
    for axis, (low, high) in enumerate(((box[1], box[3]), (box[0], box[2]))):
        # as C's round() does, halves away from zero
        first, last = (
            v.trunc() + v.sign() * (v.frac().abs() >= 0.5)
            for v in (cut(low * scale), cut(high * scale))
        )
        extent = torch.maximum(last - first + 1, low.new_ones(())) / bins[axis]
        number = torch.arange(bins[axis]).to(low)
        begin = (first.long() + (number * extent).floor().long()).clamp(0, size[axis])
        end = (first.long() + ((number + 1) * extent).ceil().long()).clamp(0, size[axis])
        ranges.append(list(zip(begin.tolist(), end.tolist(), strict=True)))
    rows = []
    for y0, y1 in ranges[0]:
        for x0, x1 in ranges[1]:
            part = plane[:, y0:y1, x0:x1].flatten(1)
            # the gradient goes to the first of equal pixels: max(dim) would choose any
            if part.shape[1] == 0:
                rows.append(plane.new_zeros(len(plane)))
            else:
                first = torch.from_numpy(part.detach().numpy().argmax(1))
                rows.append(part.gather(1, first[:, None])[:, 0])
    return torch.stack(rows, 1).reshape(len(plane), *bins)


def pool(levels, regions, which, scales, bins, ratio, aligned, mode):
    """[K, C, *bins] float64 and which bins rounding could change [K, *bins]."""
    results, unsure = [], []
    for region, level in zip(regions, which, strict=True):
        plane, box = levels[level][int(region[0])], region[1:]
        scale = torch.tensor(scales[level], dtype=torch.float64).to(regions)
        if mode == "pixels":
            results.append(pool_pixels(plane, box, scale, bins))
            unsure.append(torch.zeros(bins, dtype=torch.bool))
            continue

        def axes(ratio, box=box, scale=scale, shape=plane.shape):
            return [
                Axis(box[k], box[k + 2], scale, aligned, ratio, bins[1 - k], shape[2 - k])
                for k in (1, 0)
            ]

        y, x = axes(ratio)
        many = len(plane) * len(y.low) * len(x.low) > 1 << 25  # the rest would take gigabytes
        if many:
            y, x = axes(1)
        result, doubt = pool_box(plane, y, x, bins, mode)
        results.append(result)
        unsure.append(doubt | y.unsure | x.unsure | many)
    if not results:
        return levels[0].new_zeros((0, levels[0].shape[1], *bins)), torch.zeros((0, *bins)).bool()
    return torch.stack(results), torch.stack(unsure)


@op(2.0)
def roi_align(draw: Draw) -> None:
    """roi_align, roi_warp, roi_pool, multi_scale_roi_align and their modules."""
    kind = draw.choice(("align", "align", "align", "warp", "pool", "multi"))
    n, channels = draw.integer(1, 3), draw.choice((1, 2, 3, draw.integer(1, 40)))
    size = draw.shape(draw.side(300), draw.side(300), budget=max(4, 12_000 // (n * channels)))
    count = draw.integer(1, 4) if kind == "multi" else 1
    dtype = draw.choice(FLOATS)
    wide = WIDE.get(dtype, torch.float32)
    special = draw.chance(0.25)
    levels = [
        draw.tensor(
            draw.numbers([n, channels, *(max(1, side >> i) for side in size)], special), dtype
        )
        for i in range(count)
    ]
    scales = [draw.choice((1.0, 0.5, 1 / 16, 0.3, 2.0))]
    while len(scales) < count:
        scales.append(scales[-1] / 2)
    k = draw.choice((0, 1, 2, 3, draw.integer(0, 12)))
    boxes = draw_boxes(draw, k, size[0] / scales[0], size[1] / scales[0])
    if draw.chance(0.05):
        boxes[draw.rng.random(boxes.shape) < 0.2] = draw.choice((np.inf, -np.inf))
    index = draw.rng.integers(0, n, k)
    box_type = draw.choice((dtype, wide))
    with np.errstate(over="ignore"):
        if draw.chance(0.5):
            index.sort()
            given = [draw.tensor(boxes[index == i], box_type) for i in range(n)]
            regions = torch.cat(
                [
                    torch.cat([b.new_full((len(b), 1), i), b], 1).to(wide)
                    for i, b in enumerate(given)
                ]
            )
        else:
            given = draw.tensor(np.concatenate([index[:, None], boxes], 1), box_type)
            regions = given.to(wide).contiguous()
    bins = draw.choice(([1, 1], [7, 7], [2, 3], [draw.integer(1, 14), draw.integer(1, 14)]))
    output_size = (
        bins[0] if bins[0] == bins[1] and draw.chance(0.5) else draw.choice((tuple, list))(bins)
    )
    ratio = draw.choice((-1, 0, 1, 2, 2, 3, draw.integer(1, 9)))
    aligned, mode = draw.chance(0.5), draw.choice(("avg", "avg", "max"))
    arguments = {
        "input": levels[0],
        "boxes": given,
        "output_size": output_size,
        "spatial_scale": scales[0],
    }
    if kind != "pool":
        arguments |= {"sampling_ratio": ratio, "aligned": aligned, "mode": mode}
    function = {"align": ops.roi_align, "warp": ops.roi_warp, "pool": ops.roi_pool}.get(
        kind, ops.multi_scale_roi_align
    )
    canonical, which = 224.0, [0] * len(regions)
    if kind == "multi":
        canonical = draw.choice((224.0, 30.0, 4.0))
        del arguments["input"], arguments["spatial_scale"]
        arguments |= {"levels": levels, "spatial_scales": scales, "canonical_size": canonical}
        arguments["canonical_level"] = draw.choice((4, 2, 0))
        which, certain = levels_of(regions, scales, canonical, arguments["canonical_level"])
    if draw.chance(0.12):
        wrong_regions(draw, function, arguments, n)
        return
    if bool(regions.isnan().any()):
        draw.refuses(function, "boxes", **arguments)
        return
    differentiate = draw.chance(0.5) and len(regions) > 0
    if differentiate:
        for level in levels:
            level.requires_grad_()
    result = draw.call(function, **arguments)
    if result.dtype != dtype or list(result.shape) != [len(regions), channels, *bins]:
        raise Wrong(f"the result is {result.dtype} {list(result.shape)}")
    leaves = [level.detach().double().contiguous().requires_grad_() for level in levels]
    pixels, used_scales, used_aligned = regions, scales, aligned
    if kind == "warp":
        pixels, used_scales = warped(regions, scales[0]), [1.0]
    if kind == "pool":
        mode = "pixels"
    expected, unsure = pool(leaves, pixels, which, used_scales, bins, ratio, used_aligned, mode)
    if kind == "multi":
        unsure = unsure | ~certain[:, None, None]
    magnitude = max(
        (float(leaf.detach().nan_to_num(0, 0, 0).abs().max()) for leaf in leaves), default=0.0
    )
    # Positions of a box far out are rounded to fractions of a pixel.
    far = (
        1 + regions[:, 1:].double().abs().amax(1).nan_to_num(posinf=1e30) * scales[0]
        if len(regions)
        else torch.zeros(0)
    )
    place = far * (1e-13 if wide == torch.float64 else 1e-6)
    slack = (EPSILON[dtype] + 4 * place)[:, None, None, None] * magnitude + 1e-44
    if dtype in (torch.float16, torch.bfloat16):
        slack = slack + 1e-7
        infinite = expected.detach().abs() > torch.finfo(dtype).max * 0.99
        unsure = unsure | infinite.any(1)
    overflow = expected.detach().abs().amax(1) > 1e38 if len(regions) else unsure
    mixed = ~torch.stack([leaf.isfinite().all() for leaf in leaves]).all()
    doubt = unsure | overflow | (expected.detach().isnan().any(1) if mixed else False)
    close(result, expected, slack, function.__name__, ~doubt[:, None])
    if differentiate:
        check_region_gradient(
            draw, result, levels, leaves, expected, doubt, mixed, dtype, mode, far
        )


def check_region_gradient(draw, result, levels, leaves, expected, doubt, mixed, dtype, mode, far):
    gradient = draw.tensor(draw.normal(result.shape), dtype)
    grads = draw.call(
        torch.autograd.grad, result, levels, gradient, retain_graph=True, allow_unused=False
    )
    for grad, level in zip(grads, levels, strict=True):
        if grad.shape != level.shape or grad.dtype != dtype:
            raise Wrong(f"the gradient is {grad.dtype} {list(grad.shape)}")
    tied = mode == "max" and any(len(leaf.unique()) < leaf.numel() for leaf in leaves)
    if doubt.any() or mixed or tied or (mode == "max" and dtype != torch.float64):
        return
    wanted = [torch.zeros_like(leaf) for leaf in leaves]
    if expected.requires_grad:  # else all bins are empty
        wanted = torch.autograd.grad(
            expected, leaves, gradient.double(), allow_unused=True, materialize_grads=True
        )
    total = gradient.double().abs().sum() if mode == "max" else gradient.double().abs().max() * 8
    slack = (
        EPSILON[dtype] + 8 * (1e-13 if dtype == torch.float64 else 1e-6) * float(far.max())
    ) * float(total)
    for grad, want in zip(grads, wanted, strict=True):
        close(grad, want, slack * (1 + want.abs().max()), "the gradient")


def levels_of(regions, scales, canonical, canonical_level):
    """Level of each box, and whether it is sure."""
    box = regions[:, 1:]
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    real = canonical_level + torch.log2(area.sqrt() / canonical) + 1e-6
    exponents = [-np.log2(scale) for scale in scales]
    which, certain = [], []
    for value in real.tolist():
        wanted = np.floor(value) if np.isfinite(value) else value
        level = 0
        while level + 1 < len(scales) and wanted >= round(exponents[level + 1]):
            level += 1
        which.append(level)
        certain.append(not np.isfinite(value) or abs(value - round(value)) > 1e-4)
    whole = all(abs(e - round(e)) < 1e-9 for e in exponents)
    return which, torch.tensor(certain, dtype=torch.bool) & (whole or len(scales) == 1)


def warped(regions, scale):
    edges = (regions[:, 1:] * scale).clamp(-FARTHEST, FARTHEST)
    edges = edges.trunc() + edges.sign() * (edges.frac().abs() >= 0.5)
    size = (edges[:, 2:] - edges[:, :2] + 1).clamp(min=1)
    return torch.cat([regions[:, :1], edges[:, :2], edges[:, :2] + size], 1)


def wrong_regions(draw: Draw, function, arguments: dict, images: int) -> None:
    name = draw.choice(list(arguments))
    good = arguments[name]
    if name == "input":
        bad = draw.choice(
            (*NO_TENSORS, good[0], good[None], good.nan_to_num().long(), good[:, :0], good.isnan())
        )
    elif name == "levels":
        bad = draw.choice(
            (
                3,
                [],
                [None],
                [*good, np.zeros((1, 1, 1, 1))],
                [*good, good[0][:, :0]],
                good * 9,
                [*good, good[0].to(torch.complex64)],
                [good[0][0]] * len(good),
            )
        )
    elif name == "boxes":
        if isinstance(good, list):
            bad = draw.choice(
                (
                    None,
                    5,
                    "text",
                    good[:-1],
                    [*good, good[0]],
                    [b.new_zeros((1, 5)) for b in good],
                    [b.int() for b in good],
                    [b.new_full((1, 4), torch.nan) for b in good],
                    [None] * images,
                )
            )
        else:
            row = good.new_tensor([[0, 1, 1, 2, 2]])
            bad = draw.choice(
                (
                    *NO_TENSORS[:4],
                    good[:, :4],
                    good[None],
                    good.int(),
                    good.bool(),
                    *tuple(
                        torch.cat([good, row * 0 + value])
                        for value in (images, -1, torch.nan, 1000000000.0)
                    ),
                    torch.cat([good, row - row.new_tensor([[3, 0, 0, 0, 0]])]),
                )
            )
    elif name == "output_size":
        bad = draw.choice(
            (0, -1, (1, 2, 3), (2, 0), (), None, "ab", 1.5, (1.5, 2), 2**62, (2**33, 2), (None, 1))
        )
    elif name == "spatial_scale":
        bad = draw.choice((0, -1.0, float("inf"), 1e-46, 1e300, no_number(draw)))
    elif name == "spatial_scales":
        bad = draw.choice(
            (
                None,
                3,
                [],
                [*good, good[-1]],
                [-s for s in good],
                ["a"] * len(good),
                [None] * len(good),
            )
        )
    elif name == "sampling_ratio":
        bad = draw.choice((1025, 2**31, no_integer(draw)))
    elif name == "aligned":
        bad = draw.choice((None, "yes", [1, 2], 2.5))
    elif name == "mode":
        bad = draw.choice((None, "mean", 3, "AVG", "pixels", "", [], ["avg"]))
    elif name == "canonical_size":
        bad = draw.choice((0, -1, -0.0, no_number(draw)))
    else:
        bad = draw.choice((2**31, -(2**40), no_integer(draw)))
    parts = ("spatial_scale",) if name == "spatial_scales" else ()
    draw.refuses(function, name, parts=parts, **{**arguments, name: bad})


# --- deformable convolution -------------------------------------------------------------------


def pair(draw: Draw, options):
    value = [draw.choice(options), draw.choice(options)]
    return (
        value[0] if value[0] == value[1] and draw.chance(0.7) else draw.choice((tuple, list))(value)
    )


def both(value) -> list[int]:
    return list(value) if isinstance(value, (tuple, list)) else [value] * 2


@op(1.5)
def deform_conv2d(draw: Draw) -> None:
    n = draw.choice((0, 1, 1, 2, 3))
    groups = draw.choice((1, 1, 1, 2, 3))
    offset_groups = draw.choice((1, 1, 1, 2, 4))
    channels = int(np.lcm(groups, offset_groups)) * draw.choice((1, 1, 2, draw.integer(1, 12)))
    outputs = groups * draw.choice((1, 2, draw.integer(1, 20)))
    kernel = draw.choice(([1, 1], [3, 3], [3, 3], [2, 3], [draw.integer(1, 5), draw.integer(1, 5)]))
    stride, padding = pair(draw, (1, 1, 2, 3)), pair(draw, (0, 1, 1, 2, 5))
    dilation = pair(draw, (1, 1, 1, 2, 3))
    size = draw.shape(draw.side(200), draw.side(200), budget=max(1, 3_000 // channels))
    out = []
    for i in range(2):
        reach = both(dilation)[i] * (kernel[i] - 1) + 1 - 2 * both(padding)[i]
        size[i] = max(size[i], reach)
        out.append((size[i] - reach) // both(stride)[i] + 1)
    taps = kernel[0] * kernel[1]
    dtype = draw.choice((torch.float32, torch.float32, *FLOATS))
    offsets = draw.normal([n, 2 * offset_groups * taps, *out], draw.choice((0.3, 2.0, 2.0, 20.0)))
    whole = draw.chance(0.15)  # between pixels, where the derivative jumps
    if whole:
        offsets = offsets.round()
    strange = draw.chance(0.12) and offsets.numel() > 0
    if strange:
        values = draw.rng.choice((np.nan, np.inf, -np.inf, 3e38, -1e9, 1e5), offsets.shape)
        rare = torch.from_numpy(draw.rng.random(offsets.shape) < draw.choice((0.01, 0.2)))
        offsets = torch.where(rare, torch.from_numpy(values), offsets)
    arguments = {
        "input": draw.tensor(draw.normal([n, channels, *size]), dtype),
        "offset": draw.tensor(offsets, dtype),
        "weight": draw.tensor(draw.normal([outputs, channels // groups, *kernel]), dtype),
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }
    if draw.chance(0.6):
        arguments["bias"] = draw.tensor(draw.normal([outputs]), dtype)
    if draw.chance(0.6):
        arguments["mask"] = draw.tensor(draw.rng.random((n, offset_groups * taps, *out)), dtype)
    if draw.chance(0.12):
        wrong_convolution(draw, arguments)
        return
    tensors = {key: v for key, v in arguments.items() if isinstance(v, torch.Tensor)}
    differentiate = draw.chance(0.5)
    if differentiate:
        for tensor in tensors.values():
            tensor.requires_grad_()
    result = draw.call(ops.deform_conv2d, **arguments)
    if result.dtype != dtype or list(result.shape) != [n, outputs, *out]:
        raise Wrong(f"the result is {result.dtype} {list(result.shape)}")
    if n == 0:
        return  # torchvision does not take it
    check_convolution(
        draw, arguments, tensors, result, strange, whole, differentiate, offset_groups
    )


def check_convolution(
    draw, arguments, tensors, result, strange, whole, differentiate, offset_groups
):
    """torchvision in float64, after NaN and infinity are out of its way."""
    dtype = result.dtype
    # Cloned, as contiguous() leaves any stride to sides of 1, at which torchvision 0.25 stumbles.
    leaves = {
        key: tensor.detach().double().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    lost = None
    if strange:
        offset = leaves["offset"]
        lost = lost_pixels(offset, tensors["input"].shape[1], leaves["weight"], offset_groups)
        # Positions are float32: an offset this large leaves no digits for the pixel.
        leaves["offset"] = torch.where(offset.abs() < 1e4, offset, 1e6)
    for leaf in leaves.values():
        leaf.requires_grad_()
    expected = torchvision.ops.deform_conv2d(**{**arguments, **leaves})
    depth = leaves["weight"][0].numel()
    size = leaves["weight"].detach().abs().max() * leaves["input"].detach().abs().max()
    epsilon = EPSILON[dtype] + (
        2e-6 * sum(tensors["input"].shape[2:]) if dtype != torch.float64 else 0
    )
    slack = (
        float(epsilon * size * max(4, depth))
        + float(expected.detach().abs().max()) * EPSILON[dtype]
    )
    want = expected.detach().clone()
    if lost is not None:
        want[lost] = torch.nan
    close(result, want, slack, "deform_conv2d")
    if not differentiate:
        return
    gradient = draw.tensor(draw.normal(result.shape), dtype)
    names = list(tensors)
    grads = draw.call(
        torch.autograd.grad, result, [tensors[key] for key in names], gradient, retain_graph=True
    )
    wanted = torch.autograd.grad(expected, [leaves[key] for key in names], gradient.double())
    for name, grad, want in zip(names, grads, wanted, strict=True):
        if grad.shape != tensors[name].shape or grad.dtype != dtype:
            raise Wrong(f"the gradient of {name} is {grad.dtype} {list(grad.shape)}")
        # At whole positions, and at float16's rounded ones, the derivative by the offset jumps.
        jumps = name == "offset" and (whole or dtype != torch.float64)
        if strange or jumps:
            if dtype == torch.float32 and not whole and not strange:
                differ = (grad.double() - want).abs() > 1e-3 * (1 + want.abs().max())
                if differ.double().mean() > 0.01:
                    raise Wrong(f"{int(differ.sum())} of {differ.numel()} gradients of offset")
            continue
        scale = float(want.abs().max()) + float(gradient.double().abs().max())
        many = 4 * EPSILON[dtype] * (1 + np.sqrt(gradient.numel() / max(1, grad.numel())))
        close(grad, want, (many + epsilon) * scale, f"the gradient of {name}")


def lost_pixels(offset, channels, weight, offset_groups):
    """Output pixels that an offset of NaN makes NaN, [N, O, Ho, Wo]."""
    n, _, *out = offset.shape
    lost = offset.isnan().reshape(n, offset_groups, -1, *out).any(2)
    by_channel = lost.repeat_interleave(channels // offset_groups, 1)
    groups = channels // weight.shape[1]
    by_group = by_channel.reshape(n, groups, -1, *out).any(2)
    return by_group.repeat_interleave(len(weight) // groups, 1)


def wrong_convolution(draw: Draw, arguments: dict) -> None:
    name = draw.choice(list(arguments))
    good = arguments[name]
    if name in ("stride", "padding", "dilation"):
        least = 0 if name == "padding" else 1
        bad = draw.choice(
            (
                least - 1,
                (1, 2, 3),
                (1, least - 1),
                None,
                "ab",
                1.5,
                (1.5, 1),
                (),
                float("nan"),
                2**31,
                2**70,
                [None, 1],
            )
        )
    else:
        options = [*NO_TENSORS[1:], good[None], good.long(), good.bool(), good.to(torch.complex64)]
        if name not in ("bias", "mask"):
            options += [None]
        other = torch.float32 if good.dtype == torch.float64 else torch.float64
        if name != "input":
            options.append(good.to(other))
        if name == "input":
            options += [good[:, :0], good[..., :0]]
        elif name == "bias":
            options.append(good.repeat(2))
        else:
            options += [good[..., :0], good[:, :0]]
        bad = draw.choice(options)
    draw.refuses(ops.deform_conv2d, name, **{**arguments, name: bad})
