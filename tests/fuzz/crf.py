"""Cases of the dense CRF: against a permutohedral lattice written out as matrices."""

import itertools
import math

import numpy as np
import scipy.sparse
import torch

from pyseg import ops
from pyseg.compat import pydensecrf
from pyseg.ops.dense_crf import NORMALIZATION, QUALITY

from .draw import FLOATS, NO_TENSORS, Draw, Wrong, close, no_integer, no_number, op

# --- the lattice ------------------------------------------------------------------------------


def lattice(
    points: np.ndarray, passes: int, spread: float, rings: int, classic: bool
) -> np.ndarray:
    """The kernel between all points [P, d], already divided by sigma, not normalised: [P, P].

    Adams, Baek & Davis (2010), with vertices as tuples: splat, blur and slice are matrices.
    """
    count, d = points.shape
    variance = 2 * spread * passes + 1 / 6
    scaled = points * np.sqrt(variance / ((np.arange(d) + 1) * (np.arange(d) + 2)))
    position = np.zeros((count, d + 1))
    for i in range(d + 1):
        position[:, i] = scaled[:, i:].sum(1) - (i * scaled[:, i - 1] if i else 0)
    position *= d + 1
    nearest = np.rint(position / (d + 1)) * (d + 1)
    # Back to coordinates that sum to 0: those that rounding moved farthest give way.
    for row, at in zip(nearest, position, strict=True):
        excess = round(row.sum() / (d + 1))
        order = np.argsort(at - row, kind="stable")
        for i in range(abs(excess)):
            row[order[i if excess > 0 else -1 - i]] -= np.sign(excess) * (d + 1)
    difference = position - nearest
    rank = (-difference).argsort(1, kind="stable").argsort(1, kind="stable")
    ordered = -np.sort(-difference, 1)
    names, weights = [], []
    for k in range(d + 1):
        corner = nearest + k - (rank > d - k) * (d + 1)
        names.append(corner.astype(int))
        weights.append(
            1 - (ordered[:, 0] - ordered[:, d]) / (d + 1)
            if k == 0
            else (ordered[:, d - k] - ordered[:, d + 1 - k]) / (d + 1)
        )
    vertices: dict[tuple, int] = {}
    columns = [[vertices.setdefault(tuple(name), len(vertices)) for name in one] for one in names]
    steps = [np.ones(d + 1, int) - (d + 1) * (np.arange(d + 1) == axis) for axis in range(d + 1)]
    for _ in range(rings):
        for name in list(vertices):
            for step, sign in itertools.product(steps, (1, -1)):
                vertices.setdefault(tuple(np.array(name) + sign * step), len(vertices))
    splat = scipy.sparse.csr_matrix(
        (np.concatenate(weights), (np.concatenate(columns), np.tile(np.arange(count), d + 1))),
        shape=(len(vertices), count),
    )
    blurs = []
    for step in steps:
        links = [
            (number, vertices[other])
            for name, number in vertices.items()
            for other in (tuple(np.array(name) + step), tuple(np.array(name) - step))
            if other in vertices
        ]
        rows, others = np.array(links).reshape(-1, 2).T
        blur = scipy.sparse.csr_matrix(
            (np.full(len(rows), spread), (rows, others)), shape=(len(vertices),) * 2
        )
        blurs.append(blur + (1 - 2 * spread) * scipy.sparse.identity(len(vertices), format="csr"))
    values = splat.toarray()
    for _ in range(passes):
        for blur in blurs:
            values = blur @ values
    if classic:
        scale = (1 - 2 * spread) ** (-(d + 1) * passes) / (1 + 2.0**-d)
    else:
        scale = (2 * math.pi * variance) ** (d / 2) * math.sqrt(d + 1)
    return scale * (splat.T @ values)


def normalised(kernel: torch.Tensor, how: str) -> torch.Tensor:
    sums = kernel.sum(1) + 1e-20
    if how == "symmetric":
        return kernel / (sums[:, None] * sums).sqrt()
    if how == "before":
        return kernel / sums
    return kernel / sums[:, None] if how == "after" else kernel


def mean_field(unary, kernels, weights, iterations, compatibility):
    """unary [C, P] float64, kernels [P, P] each, to marginals [C, P]."""
    q = torch.softmax(-unary, 0)
    for _ in range(iterations if kernels else 0):
        message = sum(w * (q @ kernel.T) for w, kernel in zip(weights, kernels, strict=True))
        if compatibility is not None:
            message = -(compatibility @ message)
        q = torch.softmax(message - unary, 0)
    return q


# --- cases ------------------------------------------------------------------------------------


def draw_scene(draw: Draw, pixels: int):
    n, classes = draw.integer(0, 2), draw.choice((1, 2, 4, 5, 17, draw.integer(1, 33)))
    size = draw.shape(draw.side(), draw.side(), budget=pixels)
    unary = draw.normal([n, classes, *size], draw.choice((0.5, 2.0, 10.0)))
    return n, classes, size, unary


@op(0.5)
def dense_crf(draw: Draw) -> None:
    kind = draw.rng.random()
    if kind < 0.45:
        against_matrices(draw)
    elif kind < 0.88:
        against_itself(draw)
    else:
        wrong_crf(draw)


def against_matrices(draw: Draw) -> None:
    """float64, forward and backward, kernels over planes of features.

    Not over positions: in the first row and column they lie on borders between simplices, where
    rounding decides whether a vertex of weight 0 exists, which passes mass on.
    """
    quality = draw.choice(list(QUALITY))
    passes, spread, rings = QUALITY[quality]
    n, classes, size, unary = draw_scene(draw, 40 if rings > 1 else 90)
    classes = min(classes, 9)
    unary = draw.tensor(unary[:, :classes], torch.float64).requires_grad_()
    pixels = size[0] * size[1]
    image = draw.tensor(255 * torch.from_numpy(draw.rng.random((n, 2, *size))), torch.float64)
    how = draw.choice(list(NORMALIZATION))
    weights, kernels, features = [], [[] for _ in range(n)], []

    def kernel(points, sigmas, weight):
        weights.append(torch.tensor(weight, dtype=torch.float64, requires_grad=True))
        for i in range(n):
            matrix = lattice(
                (points[i] / np.array(sigmas)[:, None]).T,
                passes,
                spread,
                rings,
                quality == "compatible",
            )
            kernels[i].append(normalised(torch.from_numpy(matrix), how))

    for _ in range(draw.integer(1, 2)):
        d = draw.integer(1, 2 if rings > 1 else 4)
        planes = draw.tensor(draw.normal([n, d, *size], 2.0), torch.float64)
        sigmas = [draw.uniform(0.5, 3) for _ in range(d)]
        kernel([one.numpy().reshape(d, -1) for one in planes], sigmas, draw.uniform(0.3, 3))
        features.append((planes, sigmas if draw.chance(0.5) or d > 1 else sigmas[0], weights[-1]))
    compatibility = None
    if draw.chance(0.4):
        compatibility = draw.tensor(draw.normal([classes, classes]), torch.float64).requires_grad_()
    iterations = draw.choice((0, 1, 1, 2, 3))
    arguments = {"unary": unary, "image": image, "gaussian": (), "bilateral": ()}
    arguments |= {"features": features, "quality": quality, "normalization": how}
    arguments |= {"iterations": iterations, "compatibility": compatibility}
    q = draw.call(ops.dense_crf, **arguments)
    if q.dtype != torch.float64 or q.shape != unary.shape:
        raise Wrong(f"the result is {q.dtype} {list(q.shape)}")
    expected = [
        mean_field(
            unary[i].reshape(classes, pixels), kernels[i], weights, iterations, compatibility
        )
        for i in range(n)
    ]
    if n == 0:
        return
    expected = torch.stack(expected).reshape(q.shape)
    close(q, expected, 1e-8, "dense_crf")
    leaves = [unary, *weights, *([compatibility] if compatibility is not None else [])]
    if iterations == 0:
        leaves = [unary]
    gradient = draw.tensor(draw.normal(q.shape), torch.float64)
    grads = draw.call(torch.autograd.grad, q, leaves, gradient, retain_graph=True)
    wanted = torch.autograd.grad(
        expected, leaves, gradient, allow_unused=True, materialize_grads=True
    )
    for i, (grad, want) in enumerate(zip(grads, wanted, strict=True)):
        close(grad, want, 1e-7 * (1 + float(want.abs().max())), f"gradient {i}")


def against_itself(draw: Draw) -> None:
    """Any dtype and kernels: as in float64, one image at a time, with another class."""
    n, classes, size, unary = draw_scene(draw, 1500)
    dtype = draw.choice((torch.float32, torch.float32, *FLOATS))
    unary = draw.tensor(unary, dtype)
    image = draw.tensor(
        draw.rng.random((n, 3, *size)) * 255,
        draw.choice((torch.uint8, torch.uint8, torch.float32, torch.float16)),
    )
    bands = draw.integer(1, 3)
    image = image[:, :bands]
    gaussian = [
        (draw.choice((3.0, 3.0, (2.0, 5.0), (0.4, 1e-20), 1e-20)), draw.uniform(0, 3))
        for _ in range(draw.integer(0, 2))
    ]
    bilateral = [
        (draw.choice((30.0, 8.0)), draw.choice((13.0, 40.0)), draw.uniform(0, 5))
        for _ in range(draw.integer(0, 1))
    ]
    arguments = {
        "gaussian": gaussian,
        "bilateral": bilateral,
        "iterations": draw.integer(0, 3),
        "quality": draw.choice(("default", "default", "compatible", "high")),
        "normalization": draw.choice(list(NORMALIZATION)),
        "self_term": draw.chance(0.7),
    }
    if arguments["normalization"] == "none" or not arguments["self_term"]:
        # Weights are not bounded by what pixels sum to: keep mean field from jumping.
        arguments["gaussian"] = [(sigma, w / 100) for sigma, w in gaussian]
        arguments["bilateral"] = [(s, c, w / 100) for s, c, w in bilateral]
    q = draw.call(ops.dense_crf, unary, image, **arguments)
    if q.dtype != dtype or q.shape != unary.shape:
        raise Wrong(f"the result is {q.dtype} {list(q.shape)}")
    if n == 0:
        return
    rounding = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}.get(dtype, 1e-5)
    close(q.sum(1), torch.ones(n, *size), rounding * 2 * classes**0.5, "the sum of probabilities")
    if bilateral and not gaussian:
        y, x = (axis.to(unary) for axis in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
        planes = torch.cat([y.expand(n, 1, *size), x.expand(n, 1, *size), image], 1)
        (xy, rgb, weight), *_ = arguments["bilateral"]
        same = [(planes, [xy, xy] + [rgb] * bands, weight)]
        if dtype in (torch.float32, torch.float64):
            draw.same(
                ops.dense_crf(unary, image, **{**arguments, "bilateral": (), "features": same}),
                q,
                "the same kernel as features",
            )
    one = draw.integer(0, n - 1)
    alone = ops.dense_crf(unary[one : one + 1], image[one : one + 1], **arguments)
    draw.same(alone, q[one : one + 1], "an image alone")
    wide = ops.dense_crf(unary.double(), image, **arguments)
    # Colours that are whole numbers lie on borders between simplices: there rounding decides which
    # vertices exist, and a pixel may differ by more.
    differ = (q.double() - wide).abs()
    if float(differ.mean()) > rounding + 2e-3 or float((differ > 0.05).double().mean()) > 0.02:
        raise Wrong(f"float64 gives others: mean {differ.mean():.3g}, largest {differ.max():.3g}")
    if classes < 33:
        more = torch.cat([unary, torch.full_like(unary[:, :1], 6e4)], 1)
        padded = ops.dense_crf(more, image, **arguments)
        close(padded[:, :-1], q, rounding * 2 + 1e-5, "with a class that cannot be")
        if padded[:, -1].abs().max() > 1e-6:
            raise Wrong("a class that cannot be has a probability")


def wrong_crf(draw: Draw) -> None:
    n, classes, size, unary = draw_scene(draw, 50)
    n = max(n, 1)
    unary = draw.tensor(draw.normal([n, classes, *size]), torch.float32)
    image = draw.tensor(draw.rng.random((n, 3, *size)) * 255, torch.uint8)
    planes = draw.tensor(draw.normal([n, 2, *size]), torch.float32)
    matrix = draw.tensor(draw.normal([classes, classes]), torch.float32)
    arguments = {"unary": unary, "image": image, "iterations": 2}
    name = draw.choice(
        (
            "unary",
            "image",
            "gaussian",
            "bilateral",
            "features",
            "iterations",
            "quality",
            "normalization",
            "self_term",
            "compatibility",
        )
    )
    nan = torch.full_like(unary, torch.nan)
    number = no_number(draw)
    bad = {
        "unary": (
            *NO_TENSORS,
            unary[0],
            unary[None],
            unary.long(),
            unary[:, :0],
            unary[..., :0],
            nan,
            unary / 0,
            unary.to(torch.complex64),
            unary.new_zeros((n, 257, *size)),
        ),
        "image": (
            *NO_TENSORS,
            image[0],
            image[..., :-1],
            planes / 0,
            image.new_zeros((n, 7, *size)),
            image.repeat(2, 1, 1, 1),
            planes * torch.nan,
        ),
        "gaussian": (
            3,
            [3],
            [(1.0,)],
            [(0.0, 1.0)],
            [(-1.0, 1.0)],
            [((1.0, 2.0, 3.0), 1.0)],
            [(float("nan"), 1.0)],
            [(3.0, float("nan"))],
            [(3.0, 1e16)],
            [(3.0, "a")],
            [("a", 1.0)],
            [(3.0, torch.ones(2))],
            [(3.0, number)],
        ),
        "bilateral": (
            [(3.0, 1.0)],
            [(3.0, 0.0, 1.0)],
            [(3.0, (1.0, 2.0), 1.0)],
            [(3.0, 1.0, None)],
            [(3.0, 1.0, float("inf"))],
            5,
            [None],
            [(3.0, -1.0, 1.0)],
            [(3.0, 1e-20, 1.0)],
            [(number, 1.0, 1.0)],
        ),
        "features": (
            [(None, 1.0, 1.0)],
            [(planes, 1.0)],
            [(planes[:, :0], 1.0, 1.0)],
            7,
            [(planes[..., :-1], 1.0, 1.0)],
            [(planes * torch.nan, 1.0, 1.0)],
            [(planes, 1.0, number)],
            [(planes, 1e-30, 1.0)],
            [(planes.repeat(1, 5, 1, 1), 1.0, 1.0)],
        ),
        "iterations": (-1, 10_001, 2**31, no_integer(draw)),
        "quality": (None, "best", 3, ["default"]),
        "normalization": (None, "both", 0, ["none"]),
        "self_term": (None, 1.5, "yes", [True]),
        "compatibility": (
            *NO_TENSORS[1:],
            matrix[:, :-1],
            matrix[0],
            matrix * torch.nan,
            matrix / 0,
            matrix.abs() * 0 + 1e16,
        ),
    }[name]
    parts = ("sigma",) if name in ("gaussian", "bilateral", "features") else ()
    draw.refuses(ops.dense_crf, name, parts=parts, **{**arguments, name: draw.choice(bad)})


@op(0.2)
def compat_pydensecrf(draw: Draw) -> None:
    """Steps one at a time are the iterations of one call; energies and marginals are sound."""
    classes, size = draw.integer(1, 9), draw.shape(draw.side(), draw.side(), budget=600)
    unary = np.abs(draw.rng.standard_normal((classes, size[0] * size[1]))).astype(np.float32)
    if draw.chance(0.2) and classes > 1:
        unary[0, draw.rng.random(unary.shape[1]) < 0.1] = np.inf
    rgb = draw.rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    steps = draw.integer(0, 4)
    draw.doing(f"DenseCRF2D({size[1]}, {size[0]}, {classes}), {steps} steps")
    torch.set_num_threads(draw.threads)
    crf = pydensecrf.DenseCRF2D(size[1], size[0], classes)
    crf.setUnaryEnergy(unary)
    if draw.chance(0.8):
        crf.addPairwiseGaussian(sxy=draw.choice((3, (2, 4))), compat=draw.uniform(0, 3))
    if draw.chance(0.6):
        compat = draw.choice((3.0, -np.abs(draw.rng.standard_normal(classes)).astype(np.float32)))
        crf.addPairwiseBilateral(sxy=20, srgb=30, rgbim=rgb, compat=compat)
    q = np.array(crf.inference(steps))
    if q.shape != unary.shape or not np.isfinite(q).all() or np.abs(q.sum(0) - 1).max() > 1e-4:
        raise Wrong("these are no marginals")
    if q[np.isinf(unary)].any():
        raise Wrong("a forbidden label has a probability")
    stepped, tmp1, tmp2 = crf.startInference()
    for _ in range(steps):
        crf.stepInference(stepped, tmp1, tmp2)
    if np.abs(stepped - q).mean() > 1e-4:
        raise Wrong(f"single steps differ by {np.abs(stepped - q).max():.3g}")
    if not np.isfinite(crf.klDivergence(q)):
        raise Wrong("the divergence is not finite")
