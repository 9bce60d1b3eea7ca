"""Cases of the ops on label maps: against NumPy, SciPy and pycocotools."""

import math
import zlib

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter

from pyseg import ops
from pyseg.errors import ImageError
from pyseg.formats import compressed_rle, decode_rle, encode_rle

from .draw import (
    FLOATS,
    INTEGERS,
    NO_TENSORS,
    Draw,
    Wrong,
    no_integer,
    no_number,
    op,
)

IGNORED = (255, 255, 0, 1, -1, 254, 300, 65535, 2**31, -(2**40))


def wrong_labels(draw: Draw, good: torch.Tensor):
    """What a label map [N, H, W] cannot be."""
    return draw.choice(
        (
            *NO_TENSORS,
            good[0] if len(good) else good[None],
            good[None],
            good.to(draw.choice(FLOATS)),
            good.bool(),
            good.to(torch.complex64),
        )
    )


@op(1.0)
def boundary_mask(draw: Draw) -> None:
    shape = draw.shape(draw.integer(0, 3), draw.side(), draw.side(), budget=20_000)
    if draw.chance(0.03):
        shape[draw.integer(1, 2)] = 0
    dtype = draw.choice(INTEGERS)
    values = draw.labels(shape, draw.choice((2, 3, 20)))
    if draw.chance(0.2):  # the largest labels, which differ in the last bit
        values = np.iinfo(str(dtype)[6:]).max - values
    labels = draw.tensor(values, dtype)
    distance = draw.choice((1, 1, 2, 3, draw.integer(1, 40), draw.integer(1, 2000), 2**31, 2**62))
    border = draw.chance(0.5)
    if draw.chance(0.12):
        change = draw.choice(
            [
                {"labels": wrong_labels(draw, labels)},
                {"distance": draw.choice((0, -1, no_integer(draw)))},
            ]
        )
        arguments = {"labels": labels, "distance": distance, "border": border, **change}
        draw.refuses(ops.boundary_mask, next(iter(change)), **arguments)
        return
    mask = draw.call(ops.boundary_mask, labels, distance, border)
    values = labels.numpy()
    expected = np.zeros(shape, bool)
    for image, result in zip(values, expected, strict=True):
        if image.size:
            distance = min(distance, max(image.shape))
            _, ranks = np.unique(image, return_inverse=True)
            ranks = ranks.reshape(image.shape).astype(np.int64)
            options = {"mode": "constant", "cval": -1} if border else {"mode": "nearest"}
            window = 2 * distance + 1
            highest = maximum_filter(ranks, window, **options)
            result[:] = highest != minimum_filter(ranks, window, **options)
    if mask.dtype != torch.bool or not np.array_equal(mask.numpy(), expected):
        raise Wrong(f"{int((mask.numpy() != expected).sum())} pixels are wrong")


def label_pair(draw: Draw, budget: int):
    """Two maps of random integer types, classes, the void label, and whether one is out of range.

    Where a label is out of range only in void pixels of the target, both are in order.
    """
    shape = draw.shape(draw.integer(0, 3), draw.side(), draw.side(), budget=budget)
    if draw.chance(0.03):
        shape[draw.integer(1, 2)] = 0
    classes = draw.choice((1, 2, 3, draw.integer(1, 40), draw.integer(1, 300)))
    ignore = draw.choice(IGNORED)
    types = [draw.choice(INTEGERS) for _ in range(2)]
    if draw.chance(0.6):
        types[1] = types[0]
    maps = []
    for dtype in types:
        limits = np.iinfo(str(dtype)[6:])
        values = draw.labels(shape, min(classes, limits.max + 1))
        if limits.min <= ignore <= limits.max and draw.chance(0.7):
            values[draw.labels(shape, 4) == 0] = ignore
        if draw.chance(0.15):
            strange = draw.choice((classes, -1, 255, limits.max, limits.min))
            if limits.min <= strange <= limits.max:
                values[draw.rng.random(shape) < draw.choice((0.001, 0.1))] = strange
        maps.append(values.astype(str(dtype)[6:]))
    prediction, target = maps
    if draw.chance(0.3):
        same = draw.labels(shape, 3) > 0
        prediction[same] = target[same].astype(prediction.dtype)
    return draw.tensor(prediction), draw.tensor(target), classes, ignore


def out_of_range(labels: np.ndarray, classes: int, allowed: np.ndarray) -> bool:
    return bool((((labels < 0) | (labels >= classes)) & ~allowed).any())


def wrong_pair(draw: Draw, function, prediction, target, classes, ignore, **more) -> None:
    name = draw.choice(("prediction", "target", "num_classes", "ignore_index", *more))
    arguments = {
        "prediction": prediction,
        "target": target,
        "num_classes": classes,
        "ignore_index": ignore,
        **more,
    }
    if name in ("prediction", "target"):
        other = arguments[name]
        arguments[name] = draw.choice(
            (wrong_labels(draw, other), other.new_zeros((*other.shape[:2], other.shape[2] + 1)))
        )
    elif name == "num_classes":
        arguments[name] = draw.choice((0, -1, 4097, 2**40, no_integer(draw)))
    elif name == "radius":
        arguments[name] = draw.choice((-1, 4096, float("inf"), -1e-9, no_number(draw)))
    else:
        arguments[name] = no_integer(draw)
    draw.refuses(function, name, **arguments)


@op(1.0)
def confusion_matrix(draw: Draw) -> None:
    prediction, target, classes, ignore = label_pair(draw, 100_000)
    function = draw.choice((ops.confusion_counts, ops.confusion_counts, ops.confusion_matrix))
    if draw.chance(0.12):
        wrong_pair(draw, function, prediction, target, classes, ignore)
        return
    p, t = (labels.numpy().astype(np.int64) for labels in (prediction, target))
    void = t == ignore
    if out_of_range(t, classes, void) or out_of_range(p, classes, void | (p == ignore)):
        name = "target" if out_of_range(t, classes, void) else "prediction"
        draw.refuses(
            function,
            name,
            prediction=prediction,
            target=target,
            num_classes=classes,
            ignore_index=ignore,
        )
        return
    result = draw.call(function, prediction, target, classes, ignore)
    expected = np.zeros((len(p), classes, classes), np.int64)
    missed = np.zeros((len(p), classes), np.int64)
    for n in range(len(p)):
        valid, lost = ~void[n] & (p[n] != ignore), ~void[n] & (p[n] == ignore)
        np.add.at(expected[n], (t[n][valid], p[n][valid]), 1)
        np.add.at(missed[n], t[n][lost], 1)
    if function is ops.confusion_matrix:
        if not np.array_equal(result.numpy(), expected):
            raise Wrong("the matrix is wrong")
        return
    for name, want in (
        ("matrix", expected),
        ("missed", missed),
        ("invalid", np.zeros((len(p), 2))),
    ):
        if not np.array_equal(getattr(result, name).numpy(), want):
            raise Wrong(f"{name} is wrong")


def contours(labels: np.ndarray) -> np.ndarray:
    mask = np.zeros(labels.shape, bool)
    for axis in range(2):
        differ = np.diff(labels, axis=axis) != 0
        before = [(0, 0), (0, 0)]
        after = [(0, 0), (0, 0)]
        before[axis], after[axis] = (0, 1), (1, 0)
        mask |= np.pad(differ, before) | np.pad(differ, after)
    return mask


@op(1.0)
def boundary_match(draw: Draw) -> None:
    prediction, target, classes, ignore = label_pair(draw, 6_000)
    radius = draw.choice((0, 1, 1.5, 2, 2.9, draw.uniform(0, 12), draw.uniform(0, 400), 4095))
    if draw.chance(0.12):
        wrong_pair(draw, ops.boundary_match, prediction, target, classes, ignore, radius=radius)
        return
    p, t = (labels.numpy().astype(np.int64) for labels in (prediction, target))
    void = t == ignore
    p = np.where(void, ignore, p)
    bad_target = out_of_range(t, classes, void)
    if bad_target or out_of_range(p, classes, p == ignore):
        draw.refuses(
            ops.boundary_match,
            "target" if bad_target else "prediction",
            prediction=prediction,
            target=target,
            num_classes=classes,
            radius=radius,
            ignore_index=ignore,
        )
        return
    result = draw.call(ops.boundary_match, prediction, target, classes, radius, ignore)
    expected = np.zeros((len(p), classes, 4), np.int64)
    largest = math.floor(radius * radius)
    for n in range(len(p)):
        edges = contours(p[n]), contours(t[n])
        for k in np.union1d(p[n][edges[0]], t[n][edges[1]]).tolist():
            if k == ignore:
                continue
            ours, theirs = edges[0] & (p[n] == k), edges[1] & (t[n] == k)
            for first, (mask, other) in enumerate(((ours, theirs), (theirs, ours))):
                expected[n, k, 2 * first] = mask.sum()
                if other.any() and mask.any():
                    squared = np.rint(distance_transform_edt(~other)[mask] ** 2)
                    expected[n, k, 2 * first + 1] = (squared <= largest).sum()
    if not np.array_equal(result.counts.numpy(), expected):
        n, k, i = np.argwhere(result.counts.numpy() != expected)[0].tolist()
        raise Wrong(
            f"counts[{n}, {k}, {i}] is {int(result.counts[n, k, i])}, expected {expected[n, k, i]}"
        )
    if result.invalid.any() or result.invalid.shape != (len(p), 2):
        raise Wrong("invalid is wrong")


@op(1.0)
def panoptic_quality(draw: Draw) -> None:
    shape = draw.shape(draw.side(), draw.side(), budget=20_000)
    if draw.chance(0.03):
        shape[draw.integer(0, 1)] = 0
    classes = draw.integer(1, 5)
    most = draw.choice((1, 3, 12, 60))
    # Ids near each other and far apart: looked up in an array, or by hash.
    scale = draw.choice((1, 1, 257, 65537, (2**31 - 1) // (most + 1)))
    target = draw.labels(shape, most + 1)
    prediction = draw.labels(shape, most + 1)
    if draw.chance(0.8):
        agree = draw.labels(shape, 5) > 0
        prediction[agree] = target[agree]

    def listed(ids: np.ndarray) -> list[list[int]]:
        found, areas = np.unique(ids, return_counts=True)
        rows = [
            [int(k) * scale, draw.integer(0, classes - 1), int(area)]
            for k, area in zip(found, areas, strict=True)
            if k
        ]
        return [rows[i] for i in draw.rng.permutation(len(rows))]

    p_rows, t_rows = listed(prediction), listed(target)
    kinds = {row[0]: row[1] for row in t_rows}
    p_rows = [[k, kinds.get(k, label) if draw.chance(0.8) else label] for k, label, _ in p_rows]
    t_rows = [[*row, draw.choice((0, 0, 0, 1, 2))] for row in t_rows]
    boundaries = None
    if draw.chance(0.3):
        boundaries = [draw.labels(shape, 2).astype(bool) for _ in range(2)]
        if draw.chance(0.5):
            boundaries[0] = boundaries[1]
    arguments = {
        "prediction": draw.tensor(prediction * scale, torch.int32, broadcast=False),
        "target": draw.tensor(target * scale, torch.int32, broadcast=False),
        "prediction_segments": torch.tensor(p_rows, dtype=torch.int64).reshape(-1, 2),
        "target_segments": torch.tensor(t_rows, dtype=torch.int64).reshape(-1, 4),
        "num_classes": classes,
    }
    if draw.chance(0.5):
        for name in ("prediction_segments", "target_segments"):
            arguments[name] = draw.tensor(arguments[name], broadcast=False)
    if boundaries:
        arguments["prediction_boundary"] = draw.tensor(boundaries[0], broadcast=False)
        arguments["target_boundary"] = draw.tensor(boundaries[1], broadcast=False)
    if draw.chance(0.15):
        wrong_quality(draw, arguments)
        return
    result = draw.call(ops.panoptic_quality, **arguments)
    expected = quality(prediction, target, p_rows, t_rows, scale, classes, boundaries)
    counts = result.counts.numpy().astype(np.float64)
    counts[:, 3] /= 2**40
    if not np.allclose(counts, expected, rtol=0, atol=1e-9):
        raise Wrong(f"counts are {counts.tolist()}, expected {expected.tolist()}")
    if result.problems.any():
        raise Wrong(f"problems are {result.problems.tolist()}")


def quality(prediction, target, p_rows, t_rows, scale, classes, boundaries) -> np.ndarray:
    """From the intersections of all pairs of segments."""
    most = int(max(prediction.max(initial=0), target.max(initial=0))) + 1

    def table(where) -> np.ndarray:
        return np.bincount((target * most + prediction)[where], minlength=most * most).reshape(
            most, most
        )

    everywhere = np.ones(target.shape, bool)
    both = table(everywhere)
    if boundaries:
        edges = table(boundaries[0] & boundaries[1])
        p_edge, t_edge = table(boundaries[0]), table(boundaries[1])
    result, matched = np.zeros((classes, 4)), set()
    for t_id, label, area, crowd in t_rows:
        t, found = t_id // scale, False
        for p_id, p_label in p_rows:
            p = p_id // scale
            if label != p_label or crowd:
                continue
            union = area + both[:, p].sum() - both[t, p] - both[0, p]
            iou = both[t, p] / union
            if boundaries:
                union = t_edge[t].sum() + p_edge[:, p].sum() - edges[t, p] - p_edge[0, p]
                iou = min(iou, edges[t, p] / union if union else 0.0)
            if iou > 0.5:
                result[label] += 1, 0, 0, iou
                found = True
                matched.add(p_id)
        result[label, 2] += not found and not crowd
    for p_id, label in p_rows:
        excused = both[0, p_id // scale] + sum(
            both[t // scale, p_id // scale]
            for t, k, _, crowd in t_rows
            if crowd == 1 and k == label
        )
        result[label, 1] += p_id not in matched and 2 * excused <= both[:, p_id // scale].sum()
    return result


def wrong_quality(draw: Draw, arguments: dict) -> None:
    names = ["prediction", "target", "prediction_segments", "target_segments", "num_classes"]
    name = draw.choice(names + [key for key in arguments if "boundary" in key])
    good = arguments[name]
    if name in ("prediction", "target"):
        unlisted = good.clone(memory_format=torch.contiguous_format)
        unlisted.view(-1)[-1:] = 2**31 - 2
        options = [
            *NO_TENSORS,
            good.long(),
            good[None],
            good.float(),
            good.new_zeros(good.shape[0] + 1, good.shape[1]),
        ]
        bad = draw.choice([*options, unlisted] if unlisted.numel() else options)
    elif name.endswith("segments"):
        columns = good.shape[1]
        row = torch.tensor([[5, 0, 1, 0]])[:, :columns]
        bad = draw.choice(
            (
                *NO_TENSORS,
                good.int(),
                good[:, :1],
                good.double(),
                torch.cat([good, row * 0 + torch.tensor([[0, 0, 1, 0]])[:, :columns]]),
                torch.cat([good, row - torch.tensor([[9, 0, 0, 0]])[:, :columns]]),
                torch.cat([good, row + torch.tensor([[2**31, 0, 0, 0]])[:, :columns]]),
                torch.cat([good, row + torch.tensor([[0, 2**40, 0, 0]])[:, :columns]]),
                torch.cat([good, row - torch.tensor([[0, 1, 0, 0]])[:, :columns]]),
                torch.cat([good, row + 2**31 - 9]),
                torch.cat([good, row + 2**31 - 9, row + 2**31 - 9]),
            )
        )
    elif name == "num_classes":
        if not len(arguments["prediction_segments"]) or draw.chance(0.5):
            bad = draw.choice((-1, no_integer(draw)))
        else:
            bad = 0
    else:
        bad = draw.choice((None, *NO_TENSORS[1:], good.byte(), good[None], good.int()))
    draw.refuses(ops.panoptic_quality, name, **{**arguments, name: bad})


@op(0.5)
def rle(draw: Draw) -> None:
    """Run lengths: there and back, as pycocotools does, and from damaged dicts."""
    from pycocotools import mask as coco

    shape = draw.shape(draw.side(), draw.side(), budget=60_000)
    if draw.chance(0.05):
        shape[draw.integer(0, 1)] = 0
    mask = draw.labels(shape, 2).astype(bool)
    given = draw.tensor(mask, broadcast=False)
    draw.doing(f"rle of a mask of {shape}, crc {zlib.crc32(mask.tobytes())}")
    if draw.chance(0.2):
        given = draw.tensor(mask, draw.choice(INTEGERS), broadcast=False)
    rle = encode_rle(given)
    if min(shape) > 0:
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        if rle["counts"] != theirs["counts"].decode() or rle["size"] != theirs["size"]:
            raise Wrong(f"{rle} is not {theirs}")
    flat = mask.ravel(order="F")
    runs = np.diff(np.flatnonzero(np.diff(flat, prepend=False, append=~flat[-1:])), prepend=0)
    plain = {"size": shape, "counts": runs.tolist() if flat.size else []}
    for one in (rle, {**rle, "counts": rle["counts"].encode()}, plain, compressed_rle(plain)):
        decoded = decode_rle(one)
        if decoded.dtype != torch.bool or not np.array_equal(decoded.numpy(), mask):
            raise Wrong(f"{one} is decoded to another mask")
    damaged = damage(draw, rle, plain)
    draw.doing(f"decode_rle({damaged!r})")
    try:
        decoded = decode_rle(damaged)
    except ImageError:
        return
    size = damaged["size"]
    if list(decoded.shape) != [int(side) for side in size]:
        raise Wrong(f"{list(decoded.shape)} is not {size}")


@op(0.5)
def run_edges(draw: Draw) -> None:
    """Edges of many masks' runs and what pairs of them share, against pixels; and damaged texts."""
    sides = draw.shape(draw.side(), draw.side(), budget=3000)
    count, pixels = draw.integer(0, 6), sides[0] * sides[1]
    masks = draw.labels([count, *sides], 2).astype(bool)
    flat = masks.transpose(0, 2, 1).reshape(count, pixels)
    texts = [encode_rle(mask)["counts"].encode() for mask in masks]
    damaged = [draw.chance(0.2) for _ in texts]
    for k, _ in enumerate(texts):
        if damaged[k]:
            text = bytearray(texts[k])
            text[draw.integer(0, len(text) - 1)] = draw.choice((0, 47, 48, 63, 79, 111, 112, 255))
            text += draw.choice((b"", b"0", b"o" * draw.integer(1, 14)))
            texts[k] = bytes(text)
    given = {
        "texts": draw.tensor(np.frombuffer(bytearray(b"".join(texts)), np.uint8), broadcast=False),
        "ends": draw.tensor(np.cumsum([0, *map(len, texts)])[1:], broadcast=False),
        "pixels": draw.tensor(np.full(count, pixels), broadcast=False),
    }
    given = {name: value.contiguous() for name, value in given.items()}
    edges, counts = draw.call(torch.ops.pyseg._rle_edges, **given)
    begin = 0
    for k, number in enumerate(counts.tolist()):
        expected = flat[k]
        if damaged[k]:
            try:
                rle = {"size": sides, "counts": texts[k]}
                expected = decode_rle(rle).numpy().ravel(order="F")
            except ImageError:
                expected = None
        if (number < 0) != (expected is None):
            raise Wrong(f"{texts[k]!r} has {number} edges")
        if expected is not None:
            places = np.flatnonzero(np.diff(expected.astype(np.int8), prepend=0, append=0))
            if edges[begin : begin + number].tolist() != places.tolist():
                raise Wrong(f"{texts[k]!r} has other edges")
            flat[k] = expected
            begin += number
    whole = (counts >= 0).nonzero()[:, 0]
    if begin != len(edges):
        raise Wrong("edges of a damaged text")
    pairs = draw.integer(0, 200) if len(whole) else 0
    side = (edges, counts[whole].cumsum(0))
    chosen = [draw.rng.integers(0, max(1, len(whole)), pairs) for _ in range(2)]
    drawn = [draw.tensor(which, broadcast=False).contiguous() for which in chosen]
    shared = draw.call(torch.ops.pyseg._run_overlaps, *side, *side, *drawn)
    kept = flat[whole.numpy()].astype(np.int64)
    expected = (kept[chosen[0]] * kept[chosen[1]]).sum(1)
    if shared.tolist() != expected.tolist():
        raise Wrong("pairs of masks share other numbers of pixels")


def damage(draw: Draw, rle: dict, plain: dict) -> dict:
    """One of the two, with something wrong."""
    kind = draw.integer(0, 5)
    if kind == 0:
        text = bytearray(rle["counts"].encode())
        for _ in range(draw.integer(1, 3)):
            if text:
                text[draw.integer(0, len(text) - 1)] = draw.integer(0, 255)
        return {**rle, "counts": bytes(text)}
    if kind == 1:
        cut = draw.integer(0, len(rle["counts"]))
        return {**rle, "counts": rle["counts"][:cut] + draw.choice(("", "o" * 20, "é", "\udc80"))}
    if kind == 2:
        counts = list(plain["counts"])
        counts.insert(
            draw.integer(0, len(counts)),
            draw.choice((0, -1, 2**62, 2**70, 1.5, None, True, "3", [1], float("nan"))),
        )
        return {**plain, "counts": counts}
    if kind == 3:
        size = draw.choice(
            (None, 3, [3], [1, 2, 3], ["5", 7], [5.5, 7], [-1, 4], [2**40, 2**40], "ab", [None, 1])
        )
        return {"size": size, "counts": draw.choice((rle["counts"], plain["counts"]))}
    if kind == 4:
        return {**rle, "counts": draw.choice((None, 5, {}, b"", "", [], (), [[1, 2]], np.zeros(3)))}
    return {**plain, "size": [plain["size"][1] + 1, plain["size"][0]]}
