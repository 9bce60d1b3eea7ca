"""Cases of the ops on logits and masks: against resizing and pasting written out in float64."""

import numpy as np
import torch

from pyseg import ops
from pyseg.formats import encode_rle

from .draw import FLOATS, INTEGERS, NO_TENSORS, Draw, Wrong, no_integer, no_number, op
from .labels import IGNORED, out_of_range


def positions(outputs: int, inputs: int, dtype=np.float32):
    """Lower index and distance of each output pixel, and whether rounding could change which.

    As `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)` has them.
    """
    scale = dtype(inputs) / dtype(outputs)
    source = np.maximum(scale * (np.arange(outputs).astype(dtype) + dtype(0.5)) - dtype(0.5), 0)
    low = np.minimum(source.astype(np.int64), inputs - 1)
    t = np.where(low < inputs - 1, source - low.astype(dtype), 0).astype(np.float64)
    exact = inputs * (2 * np.arange(outputs) + 1) % (2 * outputs) == outputs % (2 * outputs)
    near = np.minimum(np.abs(t), np.abs(1 - t)) < 1e-5 * (1 + source)
    return low, t, near & ~(exact & (t == 0)) & (source > 0) & (low < inputs - 1)


def blend(a, b, t):
    """A neighbour of weight 0 does not count, even if it is infinite."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(t == 0, a, (1 - t) * a + t * b)


def resize(planes: np.ndarray, size, dtype=np.float32):
    """[..., h, w] float64 to ``size``; what the values can be off by; where they may be others.

    The last: rounding decides whether a neighbour that is infinite or NaN has a part at all.
    """
    (y, ty, near_y), (x, tx, near_x) = (
        positions(n, m, dtype) for n, m in zip(size, planes.shape[-2:], strict=True)
    )
    below, right = np.minimum(y + 1, planes.shape[-2] - 1), np.minimum(x + 1, planes.shape[-1] - 1)
    ty, near_y = ty[:, None], near_y[:, None]

    def both(values, mix):
        upper, lower = values[..., y, :], values[..., below, :]
        return mix(
            mix(upper[..., x], upper[..., right], tx), mix(lower[..., x], lower[..., right], tx), ty
        )

    values = both(planes, blend)
    size_of = both(
        np.where(np.isfinite(planes), np.abs(planes), 0), lambda a, b, t: np.maximum(a, b)
    )
    rounding = np.finfo(dtype).eps * (16 + sum(planes.shape[-2:]))
    wild = both(~np.isfinite(planes), lambda a, b, t: a | b)
    return values, rounding * size_of + 1e-44, wild & (near_y | near_x)


def neighbours_any(flags: np.ndarray, size) -> np.ndarray:
    """Where one of the four pixels that an output pixel lies between has the flag."""
    (y, _, _), (x, _, _) = (positions(n, m) for n, m in zip(size, flags.shape[-2:], strict=True))
    below, right = np.minimum(y + 1, flags.shape[-2] - 1), np.minimum(x + 1, flags.shape[-1] - 1)
    rows = flags[..., y, :] | flags[..., below, :]
    return rows[..., x] | rows[..., right]


def overflowing(values: np.ndarray) -> np.ndarray:
    """Numbers whose differences are not finite: next to them panoptic_head sees NaN."""
    return ~(np.abs(values) < 1.7e38)


def first_largest(values: np.ndarray, axis: int) -> np.ndarray:
    return values.argmax(axis)  # NumPy too takes the first, and NaN above all


def check_choice(
    labels: np.ndarray, values: np.ndarray, slack: np.ndarray, unsure: np.ndarray
) -> None:
    """labels [N, H, W] are the best of values [N, C, H, W], up to the slack."""
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= values.shape[1]:
        raise Wrong(f"label {labels.min()} or {labels.max()} of {values.shape[1]} classes")
    expected = first_largest(values, 1)
    got = np.take_along_axis(values, labels[:, None], 1)[:, 0]
    best = np.take_along_axis(values, expected[:, None], 1)[:, 0]
    with np.errstate(invalid="ignore"):
        tie = np.isfinite(best) & (got >= best - 2 * slack.max(1))
    bad = (labels != expected) & ~tie & ~unsure.any(1)
    if bad.any():
        n, y, x = np.argwhere(bad)[0].tolist()
        raise Wrong(
            f"{int(bad.sum())} labels, first at {[n, y, x]}: {labels[n, y, x]} of value "
            f"{got[n, y, x]:.9g}, expected {expected[n, y, x]} of {best[n, y, x]:.9g}"
        )


def draw_logits(draw: Draw):
    """(logits of any layout, output size)."""
    classes = draw.choice((1, 2, 3, 19, draw.integer(1, 40), draw.choice((254, 255, 256, 300))))
    sides = [draw.side(200), draw.side(200)]
    shape = draw.shape(draw.integer(0, 3), classes, *sides, budget=30_000)
    kind = draw.rng.random()
    if kind < 0.4:
        size = [side * draw.integer(1, 8) for side in shape[2:]]
    elif kind < 0.9:
        size = [draw.side(), draw.side()]
    else:
        size = shape[2:]
    budget = max(1, 250_000 // (max(shape[0], 1) * shape[1]))
    size = draw.shape(*size, budget=budget)
    dtype = draw.choice(FLOATS)
    return draw.tensor(draw.numbers(shape), dtype), size


def wrong_logits(draw: Draw, good: torch.Tensor):
    return draw.choice(
        (
            *NO_TENSORS,
            good[0] if len(good) else good[None],
            good[None],
            good[:, :0],
            good[..., :0],
            good.nan_to_num().long(),
            good.to(torch.complex64),
            good.isnan(),
        )
    )


@op(1.5)
def upsample_argmax(draw: Draw) -> None:
    logits, size = draw_logits(draw)
    size = draw.choice((tuple, list, torch.Size))(size)
    if draw.chance(0.12):
        change = draw.choice(
            [
                {"logits": wrong_logits(draw, logits)},
                {
                    "size": draw.choice(
                        (
                            (0, 4),
                            (4, -1),
                            (4,),
                            (1, 2, 3),
                            (2**40, 2**40),
                            (1.5, 2),
                            ("1", 2),
                            None,
                            3,
                            (float("nan"), 2),
                            (2**70, 1),
                            (None, None),
                        )
                    )
                },
            ]
        )
        arguments = {"logits": logits, "size": size, **change}
        draw.refuses(ops.upsample_argmax, next(iter(change)), **arguments)
        return
    labels = draw.call(ops.upsample_argmax, logits, size)
    dtype = np.float64 if logits.dtype == torch.float64 else np.float32
    if labels.dtype != (torch.uint8 if logits.shape[1] <= 255 else torch.int16):
        raise Wrong(f"labels are {labels.dtype}")
    if list(labels.shape) != [logits.shape[0], *size]:
        raise Wrong(f"labels are {list(labels.shape)}")
    check_choice(
        labels.numpy().astype(np.int64), *resize(logits.double().numpy(), tuple(size), dtype)
    )


@op(1.0)
def upsample_confusion(draw: Draw) -> None:
    logits, size = draw_logits(draw)
    n, classes = logits.shape[:2]
    dtype = draw.choice(INTEGERS)
    limits = np.iinfo(str(dtype)[6:])
    ignore = draw.choice(IGNORED)
    values = draw.labels([n, *size], min(classes, limits.max + 1))
    if limits.min <= ignore <= limits.max:
        values[draw.labels([n, *size], 4) == 0] = ignore
    if draw.chance(0.1) and limits.max >= classes:
        values[draw.rng.random(values.shape) < 0.01] = classes
    target = draw.tensor(values, dtype)
    arguments = {"logits": logits, "target": target, "ignore_index": ignore}
    if draw.chance(0.5):
        arguments["size"] = tuple(size)
    if draw.chance(0.12):
        name = draw.choice(("logits", "target", "ignore_index", "size"))
        bad = {
            "logits": lambda: wrong_logits(draw, logits),
            "target": lambda: draw.choice(
                (
                    *(*NO_TENSORS, target[None], target.float(), target.bool()),
                    target.new_zeros((n + 1, *size)),
                )
            ),
            "ignore_index": lambda: no_integer(draw),
            "size": lambda: draw.choice(((1, 2, 3), (size[0] + 1, size[1]), 5, "ab", ())),
        }[name]()
        draw.refuses(ops.upsample_confusion, name, **{**arguments, name: bad})
        return
    t = target.numpy().astype(np.int64)
    if out_of_range(t, classes, t == ignore):
        draw.refuses(ops.upsample_confusion, "target", **arguments)
        return
    result = draw.call(ops.upsample_confusion, **arguments)
    # upsample_argmax has its own cases; labels that are ignore_index are misses by definition.
    p = ops.upsample_argmax(logits, size).numpy().astype(np.int64)
    matrix, missed = np.zeros((n, classes, classes), int), np.zeros((n, classes), int)
    for i in range(n):
        valid = (t[i] != ignore) & (p[i] != ignore)
        np.add.at(matrix[i], (t[i][valid], p[i][valid]), 1)
        np.add.at(missed[i], t[i][(t[i] != ignore) & (p[i] == ignore)], 1)
    for name, want in (("matrix", matrix), ("missed", missed), ("invalid", np.zeros((n, 2)))):
        if not np.array_equal(getattr(result, name).numpy(), want):
            raise Wrong(f"{name} is wrong")


def draw_boxes(draw: Draw, count: int, height: float, width: float) -> np.ndarray:
    """[count, 4] xyxy: within the image, across its edges, outside, reversed, huge, special."""
    scale = np.array([width, height])
    centre = draw.rng.random((count, 2)) * scale
    extent = np.exp(draw.rng.normal(-1, 1.2, (count, 2))) * scale
    boxes = np.concatenate([centre - extent / 2, centre + extent / 2], 1)
    for box in boxes:
        kind = draw.rng.random()
        if kind < 0.15:
            box[:] = np.rint(box)
        elif kind < 0.2:
            box[:] += draw.choice((-2, 2)) * scale.max()
        elif kind < 0.25:
            box[[0, 2]] = box[[2, 0]]
        elif kind < 0.3:
            box[:] = draw.choice((1e3, 1e6, 1e9, 1e30)) * (box - scale.max() / 2)
        elif kind < 0.35:
            box[2:] = box[:2]
    return boxes


@op(1.0)
def panoptic_head(draw: Draw) -> None:
    batched = draw.chance(0.5)
    n = draw.integer(0, 3) if batched else 1
    classes, k, cells = draw.integer(1, 20), draw.integer(0, 6), draw.choice((1, 2, 7, 14, 28))
    stuff = draw.integer(0, classes)
    h, w = draw.shape(draw.side(100), draw.side(200), budget=2500)
    size = draw.shape(*draw.choice(([4 * h, 4 * w], [draw.side(), draw.side()])), budget=6000)
    special = draw.chance(0.25)
    types = [draw.choice((torch.float32, torch.float32, *FLOATS)) for _ in range(3)]
    logits = draw.tensor(draw.numbers([n, classes, h, w], special), types[0])
    masks = draw.tensor(draw.numbers([n, k, cells, cells], special), types[1])
    boxes = draw_boxes(draw, n * k, *size).reshape(n, k, 4)
    if draw.chance(0.1):
        boxes[draw.rng.random(boxes.shape) < 0.1] = draw.choice((np.nan, np.inf, -np.inf))
    with np.errstate(over="ignore"):
        boxes = draw.tensor(boxes, types[2])
    labels = draw.rng.integers(stuff, max(classes, stuff + 1), (n, k))
    labels[(draw.rng.random((n, k)) < 0.1) | (stuff == classes)] = -1
    labels = draw.tensor(labels, draw.choice(INTEGERS[1:]))
    tensors = {"logits": logits, "masks": masks, "boxes": boxes, "labels": labels}
    if not batched:
        tensors = {name: tensor[0] for name, tensor in tensors.items()}
    arguments = {**tensors, "num_stuff": stuff, "size": tuple(size)}
    if draw.chance(0.12):
        wrong_head(draw, arguments, classes)
        return
    result = draw.call(ops.panoptic_head, **arguments)
    if result.dtype != torch.int32 or list(result.shape) != [n, *size][0 if batched else 1 :]:
        raise Wrong(f"the result is {result.dtype} {list(result.shape)}")
    channels = result.numpy().reshape(n, *size).astype(np.int64)
    for i in range(n):
        one = [tensor[i].double().numpy() for tensor in (logits.float(), masks.float())]
        check_head(channels[i], *one, boxes[i].float().numpy(), labels[i].tolist(), stuff, size)


def check_head(got, logits, masks, boxes, labels, stuff, size) -> None:
    """One image, from the definition."""
    x, slack, _ = resize(logits, size)
    total = len(labels) + stuff
    channels = np.zeros((total + 1, *size))
    error = np.zeros((total + 1, *size))
    channels[:stuff], error[:stuff] = x[:stuff], slack[:stuff]
    inside = np.full(size, -np.inf)
    doubt = neighbours_any(overflowing(logits), size).any(0)
    for i, (mask, box, label) in enumerate(zip(masks, boxes, labels, strict=True)):
        here = np.zeros(size)
        if label < 0:
            channels[stuff + i] = np.nan  # no instance: never chosen
            continue
        if np.all(np.abs(box) < 2**24):
            left, top, right, bottom = (int(v) for v in np.trunc(box))
            rows = slice(max(top, 0), min(bottom + 1, size[0]))
            columns = slice(max(left, 0), min(right + 1, size[1]))
            if (
                right >= left
                and bottom >= top
                and rows.start < rows.stop
                and columns.start < columns.stop
            ):
                extent = bottom - top + 1, right - left + 1
                if max(extent) > 20_000:
                    return  # too large to resize whole here
                stretched, off, wild = resize_part(mask, extent, rows, columns, top, left)
                at = (rows, columns)
                here[at] = x[label][at]
                with np.errstate(invalid="ignore"):
                    channels[stuff + i][at] = x[label][at] + stretched
                error[stuff + i][at] = slack[label][at] + off + 1e-7 * np.abs(stretched)
                doubt[at] |= wild
        inside = np.fmax(inside, here)
    some = any(label >= 0 for label in labels)
    things = x[stuff:]
    with np.errstate(invalid="ignore"):
        thing = np.fmax.reduce(things, 0) if len(things) else np.full(size, -np.inf)
        channels[-1] = thing - (inside if some else 0)
    error[-1] = 2 * slack.max(0) if len(slack) else 0
    if got.min(initial=0) < 0 or got.max(initial=0) > total:
        raise Wrong(f"channel {got.min()} or {got.max()} of {total + 1}")
    # Infinities meet each other in sums: what is checked is where all numbers are finite.
    doubt |= ~np.isfinite(
        channels[[i for i in range(total + 1) if i == total or i < stuff or labels[i - stuff] >= 0]]
    ).all(0)
    value = np.take_along_axis(channels, got[None], 0)[0]
    best = np.nanmax(np.where(np.isnan(channels), -np.inf, channels), 0)
    with np.errstate(invalid="ignore"):
        bad = ~doubt & ~(value >= best - 2 * error.max(0) - 1e-6 * np.abs(best))
    if bad.any():
        y, c = np.argwhere(bad)[0].tolist()
        raise Wrong(
            f"{int(bad.sum())} pixels, first at {[y, c]}: channel {got[y, c]} of value "
            f"{value[y, c]:.9g}, the best has {best[y, c]:.9g}"
        )


def resize_part(mask, extent, rows, columns, top, left):
    values, slack, wild = resize_at(
        mask,
        extent,
        slice(rows.start - top, rows.stop - top),
        slice(columns.start - left, columns.stop - left),
    )
    return values, slack, wild


def resize_at(plane, extent, rows, columns):
    """The part of `resize(plane, extent)` that these rows and columns are."""
    whole = [positions(n, m) for n, m in zip(extent, plane.shape, strict=True)]
    (y, ty, _), (x, tx, _) = (
        [part[cut] for part in axis] for axis, cut in zip(whole, (rows, columns), strict=True)
    )
    below, right = np.minimum(y + 1, plane.shape[0] - 1), np.minimum(x + 1, plane.shape[1] - 1)
    ty = ty[:, None]
    corners = [plane[np.ix_(a, b)] for a in (y, below) for b in (x, right)]
    values = blend(blend(corners[0], corners[1], tx), blend(corners[2], corners[3], tx), ty)
    largest = np.maximum.reduce([np.where(np.isfinite(c), np.abs(c), 0) for c in corners])
    wild = np.logical_or.reduce([overflowing(c) for c in corners])
    return values, 2e-7 * (16 + sum(plane.shape)) * largest, wild


def wrong_head(draw: Draw, arguments: dict, classes: int) -> None:
    name = draw.choice(list(arguments))
    good = arguments[name]
    if name == "num_stuff":
        bad = draw.choice((-1, classes + 1, no_integer(draw)))
    elif name == "size":
        bad = draw.choice(
            ((0, 4), (4,), (1, 2, 3), (-1, 2), None, 3, (1.5, 2), ("1", 2), (2**40, 1))
        )
    else:
        options = [*NO_TENSORS, good[None], good.to(torch.complex64), good.bool()]
        if name == "labels":
            options += [good.float(), good.new_zeros((*good.shape[:-1], good.shape[-1] + 1))]
            if good.numel():
                high = good.clone(memory_format=torch.contiguous_format)
                high.view(-1)[-1] = classes
                options += [high, good * 0 - 2]
        elif name == "logits":
            options += [good[..., :0], good.new_zeros((0, *good.shape[1:]))[None]]
        else:
            options += [good.nan_to_num().long(), good[..., :-1]]
        bad = draw.choice(options)
    arguments = {**arguments, name: bad}
    draw.refuses(ops.panoptic_head, name, **arguments)


@op(1.2)
def panoptic_merge(draw: Draw) -> None:
    batched = draw.chance(0.4)
    n = draw.integer(0, 3) if batched else 1
    k = draw.choice((0, 1, 2, 5, draw.integer(0, 20)))
    size = draw.shape(draw.side(), draw.side(), budget=max(64, 20_000 // max(k * n, 1)))
    if draw.chance(0.03):
        size[draw.integer(0, 1)] = 0
    classes = draw.integer(1, 12)
    dtype = draw.choice((torch.uint8, torch.int16, torch.int32, torch.int64))
    semantic = draw.labels([n, *size], classes)
    if draw.chance(0.3):
        semantic[draw.labels([n, *size], 3) == 0] = 255
    stuff = draw.rng.permutation(classes)[: draw.integer(0, classes)].tolist()
    if draw.chance(0.2):
        stuff += [draw.choice((255, 300, 65535))]
    scores = draw.rng.random((n, k))
    if draw.chance(0.4):
        scores = np.rint(scores * 4) / 4
    if draw.chance(0.1):
        scores[draw.rng.random((n, k)) < 0.2] = draw.choice((np.nan, np.inf, -np.inf, -1, 0.5))
    tensors = {
        "scores": draw.tensor(scores, draw.choice((torch.float32, torch.float32, *FLOATS))),
        "labels": draw.tensor(draw.rng.integers(0, 90, (n, k)), draw.choice(INTEGERS)),
        "semantic": draw.tensor(semantic, dtype),
    }
    boxed = draw.chance(0.5)
    if boxed:
        cells = draw.choice((1, 2, 7, 14, 28))
        boxes = draw_boxes(draw, n * k, *size).reshape(n, k, 4)
        if draw.chance(0.1):
            boxes[draw.rng.random(boxes.shape) < 0.1] = draw.choice((np.nan, np.inf, -np.inf))
        with np.errstate(over="ignore"):
            tensors["boxes"] = draw.tensor(boxes, draw.choice((torch.float32, *FLOATS)))
        values = draw.rng.random((n, k, cells, cells))
        if draw.chance(0.5):
            values = np.clip(values + draw.choice((-0.4, 0.4)), 0, 1)
        if draw.chance(0.1):
            values[draw.rng.random(values.shape) < 0.1] = draw.choice(
                (np.nan, np.inf, -np.inf, 3e38)
            )
        with np.errstate(over="ignore"):
            masks = draw.tensor(values, draw.choice((torch.float32, *FLOATS)))
    else:
        masks = draw.tensor(draw.labels([n, k, *size], draw.choice((2, 2, 3))) == 0)
    tensors = {"masks": masks, **tensors}
    arguments = tensors if batched else {name: tensor[0] for name, tensor in tensors.items()}
    if not boxed and not batched and draw.chance(0.15) and min(size) > 0:
        arguments["masks"] = [encode_rle(mask) for mask in arguments["masks"]]
    options = {
        "stuff_classes": stuff,
        "score_threshold": draw.choice((0.5, 0.0, 0.25, -1.0, draw.uniform(0, 1))),
        "overlap_threshold": draw.choice((0.5, 0.0, 1.0, 0.25, draw.uniform(0, 1))),
        "stuff_area": draw.choice((1, 0, 10, 4096, draw.integer(-5, 500))),
    }
    if draw.chance(0.12):
        wrong_merge(draw, {**arguments, **options})
        return
    result = draw.call(ops.panoptic_merge, **arguments, **options)
    maps = result.map if batched else result.map[None]
    table = result.table if batched else result.table[None]
    if list(maps.shape) != [n, *size] or maps.dtype != torch.int32:
        raise Wrong(f"the map is {maps.dtype} {list(maps.shape)}")
    if list(table.shape) != [n, k + len(stuff), 4] or table.dtype != torch.int64:
        raise Wrong(f"the table is {table.dtype} {list(table.shape)}")
    for i in range(n):
        sure = True
        if boxed:
            whole, sure = paste(masks[i].float().numpy(), tensors["boxes"][i].float().numpy(), size)
        else:
            whole = masks[i].numpy()
        check_merge(maps[i].numpy(), table[i].tolist(), whole, sure, tensors, i, options)


def paste(masks: np.ndarray, boxes: np.ndarray, size):
    """Masks stretched over their boxes [K, H, W] bool, and whether none was near the threshold."""
    result, sure = np.zeros((len(masks), *size), bool), True
    for mask, box, into in zip(masks, boxes, result, strict=True):
        axes = []
        for low, high, pixels in ((box[1], box[3], size[0]), (box[0], box[2], size[1])):
            cells = len(mask)
            with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
                at = (np.arange(pixels, dtype=np.float32) + np.float32(0.5) - low) / (high - low)
                at = at * np.float32(cells) - np.float32(0.5)
                valid = high > low
                reach = valid & (np.floor(at) >= -1) & (np.floor(at) < cells)
            at = np.where(reach, at, 0)
            axes.append((np.floor(at).astype(np.int64), at - np.floor(at), reach))
        (y, ty, in_y), (x, tx, in_x) = axes
        padded = np.pad(mask.astype(np.float64), 1)
        corners = [padded[np.ix_(y + 1 + a, x + 1 + b)] for a in (0, 1) for b in (0, 1)]
        ty = ty[:, None]
        with np.errstate(invalid="ignore", over="ignore"):
            upper = corners[0] + tx * (corners[1] - corners[0])
            lower = corners[2] + tx * (corners[3] - corners[2])
            value = upper + ty * (lower - upper)
        where = in_y[:, None] & in_x
        into[:] = where & (value >= 0.5)
        finite = np.logical_and.reduce([np.abs(c) < 1e30 for c in corners])
        close = (np.abs(value - 0.5) < 1e-4) | ~finite
        # Far from a box that is huge, rounding moves positions by more than this.
        shaky = np.abs(box).max(initial=0) > 1e5 or not np.isfinite(box).all()
        edge = (np.minimum(tx, 1 - tx) < 1e-5) & ~finite
        if (where & (close | edge)).any() or shaky:
            sure = False
    return result, sure


def check_merge(map, table, masks, sure, tensors, image, options) -> None:
    scores = tensors["scores"][image].float().numpy()
    labels = tensors["labels"][image].tolist()
    semantic = tensors["semantic"][image].numpy().astype(np.int64)
    # Whatever the masks are, the table describes the map.
    rows = [row for row in table if row[0]]
    found, areas = np.unique(map, return_counts=True)
    there = {int(k): int(area) for k, area in zip(found, areas, strict=True) if k}
    if there != {row[0]: row[2] for row in rows} or sorted(there) != list(range(1, len(there) + 1)):
        raise Wrong(f"the map has areas {there}, the table {rows}")
    if not sure:
        return
    expected = np.zeros(map.shape, np.int32)
    want = []
    usable = [k for k in range(len(scores)) if scores[k] >= options["score_threshold"]]
    for k in sorted(usable, key=lambda k: -scores[k]):
        area = int(masks[k].sum())
        free = masks[k] & (expected == 0)
        left = int(free.sum())
        if left == 0 or (area - left) / area > options["overlap_threshold"]:
            continue
        want.append([len(want) + 1, labels[k], left, k])
        expected[free] = len(want)
    for label in options["stuff_classes"]:
        free = (semantic == label) & (expected == 0)
        area = int(free.sum())
        if area > 0 and area >= options["stuff_area"]:
            want.append([len(want) + 1, label, area, -1])
            expected[free] = len(want)
    if rows != want:
        raise Wrong(f"the table is {rows}, expected {want}")
    if not np.array_equal(map, expected):
        raise Wrong(f"{int((map != expected).sum())} pixels of the map are wrong")


def wrong_merge(draw: Draw, arguments: dict) -> None:
    name = draw.choice(list(arguments))
    good = arguments[name]
    if name == "stuff_classes":
        bad = draw.choice(([-1], [65536], [1, 1], list(range(513)), None, 3, ["a"], [1.5], [2**70]))
    elif name == "stuff_area":
        bad = no_integer(draw)
    elif name.endswith("threshold"):
        bad = no_number(draw)
    elif isinstance(good, list):
        bad = draw.choice(
            (
                [3],
                [None],
                [{}],
                [{"size": [1, 2], "counts": "1"}],
                None,
                5,
                "text",
                [["size", "counts"]],
            )
        )
    elif name == "boxes":
        bad = draw.choice(
            (
                *NO_TENSORS[1:],
                good[None],
                good[..., :3],
                good.repeat(2, 1) if good.ndim == 2 and len(good) else good[..., :2],
            )
        )
    else:
        options = [*NO_TENSORS, good[None], good.to(torch.complex64)]
        if name == "labels":
            options += [good.float(), good.bool()]
        elif name == "semantic":
            options += [good.float(), good.bool(), good.to(torch.uint16)]
        elif name == "scores":
            options += [good.nan_to_num().long(), good.isnan()]
        elif good.dtype == torch.bool:
            options += [good.float(), good.byte()]
        else:
            options += [good[..., :-1], good > 0.5]
        bad = draw.choice(options)
    draw.refuses(ops.panoptic_merge, name, **{**arguments, name: bad})
