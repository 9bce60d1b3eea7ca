"""Cuts of graphs: normalized and average cut by eigenvectors, and highly connected subgraphs."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import eigsh
from skimage.color import rgb2lab

from . import _core
from .growing import grow
from .kmeans import kmeans
from .regions import (
    Image,
    Map,
    RegionModel,
    adjacent,
    at_least,
    check_pixels,
    connected,
    means,
    merge_small,
    one_of,
    renumbered,
)

_DENSE = 300  # nodes up to which all eigenvectors are computed
_PIXELS = 20_000  # of a graph of pixels: the factors of its matrix fill up


@dataclass(frozen=True)
class Graph:
    """A graph of N nodes with weights, each standing for one or several pixels."""

    pairs: NDArray[np.int32]  # [E, 2] different nodes, each pair once
    weights: NDArray[np.float64]  # [E], not negative
    inner: NDArray[np.float64]  # [N] what a node has of weights with itself, both directions
    area: NDArray[np.float64]  # [N] pixels

    @classmethod
    def of_weights(cls, weights: NDArray[Any]) -> Graph:
        """From a symmetric matrix [N, N] of weights."""
        matrix = np.asarray(weights, np.float64)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
            raise ValueError(f"weights must be [N, N], got {list(matrix.shape)}")
        if not (np.isfinite(matrix).all() and (matrix >= 0).all() and (matrix == matrix.T).all()):
            raise ValueError("weights must be finite, not negative and symmetric")
        pairs = np.argwhere(np.triu(matrix, 1) > 0).astype(np.int32)
        found = matrix[pairs[:, 0], pairs[:, 1]]
        return cls(pairs, found, np.diag(matrix).copy(), np.ones(len(matrix)))

    def part(self, nodes: NDArray[np.int64]) -> Graph:
        """The graph of these nodes alone."""
        place = np.full(len(self.area), -1, np.int32)
        place[nodes] = np.arange(len(nodes))
        ends = place[self.pairs]
        inside = (ends >= 0).all(1)
        return Graph(ends[inside], self.weights[inside], self.inner[nodes], self.area[nodes])

    def crossing(self) -> NDArray[np.float64]:
        """Sum of the weights between each node and all others, [N]."""
        both = np.concatenate([self.weights, self.weights])
        return np.bincount(self.pairs.T.ravel(), both, minlength=len(self.area))

    def mass(self, kind: str) -> NDArray[np.float64]:
        """What a cut is divided by: "normalized": all weights of a node, "average": its area."""
        return self.inner + self.crossing() if kind == "normalized" else self.area


def eigenvectors(graph: Graph, kind: str, count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The ``count`` smallest solutions of (D - W) y = l M y, M = D or the areas.

    Returns:
        Values [count], from 0 on, and vectors [N, count].
    """
    mass = np.maximum(graph.mass(kind), 1e-12)
    size = len(mass)
    scale = 1 / np.sqrt(mass)
    one, other = graph.pairs.T
    links = -graph.weights * scale[one] * scale[other]
    matrix = sparse.csc_matrix(
        (np.concatenate([links, links]), (np.r_[one, other], np.r_[other, one])), (size, size)
    ) + sparse.diags(graph.crossing() * scale**2, format="csc")
    if size <= max(_DENSE, 2 * count):
        values, vectors = np.linalg.eigh(matrix.toarray())
    else:
        start = np.random.default_rng(0).standard_normal(size)
        values, vectors = eigsh(matrix, count, sigma=-1e-4, which="LM", v0=start)
        order = values.argsort()
        values, vectors = values[order], vectors[:, order]
    return values[:count], scale[:, None] * vectors[:, :count]


def best_split(
    graph: Graph, kind: str, order_by: NDArray[np.float64]
) -> tuple[float, NDArray[np.bool_]]:
    """The smallest cut / M(A) + cut / M(B) of all N - 1 thresholds on ``order_by`` [N].

    Returns:
        The value, and the nodes on the one side, [N].
    """
    order = order_by.argsort(kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    low, high = np.sort(rank[graph.pairs], axis=1).T
    # An edge is cut where its ends lie on both sides: from its lower rank to before its higher.
    steps = np.bincount(low, graph.weights, len(order)) - np.bincount(
        high, graph.weights, len(order)
    )
    cut = np.maximum(steps.cumsum()[:-1], 0)
    mass = graph.mass(kind)[order].cumsum()
    first, rest = mass[:-1], mass[-1] - mass[:-1]
    value = cut / np.maximum(first, 1e-12) + cut / np.maximum(rest, 1e-12)
    best = int(value.argmin())
    return float(value[best]), rank <= best


def recursive_cut(graph: Graph, kind: str, k: int, limit: float) -> NDArray[np.int64]:
    """Parts by repeated cuts in two, the cheapest first, up to k parts or a value above ``limit``.

    Returns:
        [N] the number of each node's part.
    """
    return nested_cuts(graph, kind, k, limit)[0]


def nested_cuts(
    graph: Graph, kind: str, k: int, limit: float
) -> tuple[NDArray[np.int64], list[int]]:
    """As `recursive_cut`, and for every part the one it was cut from: those of fewer k, too.

    Returns:
        [N] the number of each node's part, in the order of the cuts; and of part p the number,
        smaller than p, of what it was cut from; the first is its own.
    """
    labels = np.zeros(len(graph.area), np.int64)
    waiting: list[tuple[float, int, NDArray[np.int64], NDArray[np.bool_]]] = []

    def offer(number: int, nodes: NDArray[np.int64]) -> None:
        if len(nodes) > 1:
            part = graph.part(nodes)
            value, side = best_split(part, kind, eigenvectors(part, kind, 2)[1][:, 1])
            heapq.heappush(waiting, (value, number, nodes, side))

    offer(0, np.arange(len(labels)))
    origin = [0]
    while waiting and len(origin) < k:
        value, number, nodes, side = heapq.heappop(waiting)
        if value > limit:
            break
        labels[nodes[side]] = len(origin)
        offer(number, nodes[~side])
        offer(len(origin), nodes[side])
        origin.append(number)
    return labels, origin


def k_way_cut(graph: Graph, kind: str, k: int, seed: int) -> NDArray[np.int64]:
    """k parts at once: k-means on the first k eigenvectors, rows brought to length 1.

    After Ng, Jordan and Weiss (2002); of the average cut rows stay as they are.
    """
    k = min(k, len(graph.area))
    _, vectors = eigenvectors(graph, kind, k)
    if kind == "normalized":
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return kmeans(vectors, k, seed=seed).labels.astype(np.int64)


def superpixels(image: Image, count: int) -> NDArray[np.int64]:
    """About ``count`` connected parts, [H, W]: regions that grow from the points of a grid."""
    height, width = image.shape[:2]
    step = max(1.0, np.sqrt(height * width / count))
    rows, columns = (
        ((np.arange(number) + 0.5) * side / number).astype(int)
        for side in (height, width)
        for number in (max(1, round(side / step)),)
    )
    seeds = np.zeros((height, width), np.int64)
    seeds[np.ix_(rows, columns)] = np.arange(1, len(rows) * len(columns) + 1).reshape(len(rows), -1)
    return renumbered(grow(rgb2lab(image), seeds, 0.0, fill=True))


class NormalizedCut(RegionModel):
    """Parts that are cut from the rest at the least share of what they hold (Shi and Malik, 2000).

    Affinities of pixels nearer than ``radius`` are exp(-dF^2 / sigma_f^2) exp(-dX^2 / sigma_x^2),
    with F the colour in CIELAB and X the place. A part A costs cut(A, B) / assoc(A, V), the sum of
    all its affinities. Eigenvectors are sought that are constant on superpixels: affinities of
    pixels are added up, so a partition's value is that of the graph of pixels. The best of all
    thresholds on the second eigenvector is taken.

    Args:
        k: parts at most.
        way: ``"recursive"``: in two, and again; or ``"k-way"``, k at once.
        limit: recursive cuts of a larger value are not made; they are from 0 to 2.
        sigma_f: see above, in units of CIELAB.
        sigma_x: in pixels.
        radius: in pixels.
        superpixels: about so many; 0 = pixels, of images up to 20,000.
        whole: a part is one region wherever it lies, not as many as it has connected pieces.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
        seed: of k-means.

    Raises:
        ValueError: wrong options; in predicting with superpixels=0, an image of more pixels.
    """

    kind = "normalized"

    def __init__(
        self,
        *,
        k: int = 20,
        way: Literal["recursive", "k-way"] = "recursive",
        limit: float = 0.2,
        sigma_f: float = 8.0,
        sigma_x: float = 4.0,
        radius: float = 5.0,
        superpixels: int = 1500,
        whole: bool = False,
        min_size: int = 50,
        seed: int = 0,
    ) -> None:
        self.k, self.way = int(at_least("k", k, 1)), one_of("way", way, ("recursive", "k-way"))
        self.limit, self.radius = at_least("limit", limit, 0), at_least("radius", radius, 1.1)
        self.sigma_f = at_least("sigma_f", sigma_f, 1e-3)
        self.sigma_x = at_least("sigma_x", sigma_x, 1e-3)
        self.superpixels = int(at_least("superpixels", superpixels, 0))
        self.whole, self.min_size = whole, int(at_least("min_size", min_size, 0))
        self.seed = int(at_least("seed", seed, 0))

    def graph(self, image: Image) -> tuple[Graph, NDArray[np.int64]]:
        """The graph of an image [H, W, 3] and the number of every pixel's node, [H, W]."""
        shape = image.shape[:2]
        if self.superpixels:
            nodes = superpixels(image, self.superpixels)
        else:
            remedy = "set superpixels=1500, or any number above 0"
            check_pixels(type(self).__name__, image, _PIXELS, remedy)
            nodes = np.arange(shape[0] * shape[1]).reshape(shape)
        count = int(nodes.max()) + 1
        pairs, weights, total = _core.affinity(
            rgb2lab(image),
            nodes,
            count,
            self.radius,
            self.sigma_f**2,
            self.sigma_x**2,
            torch.get_num_threads(),
        )
        area = np.bincount(nodes.ravel(), minlength=count).astype(float)
        graph = Graph(pairs, weights, np.zeros(count), area)
        inner = np.maximum(total - graph.crossing(), 0)
        return Graph(pairs, weights, inner, area), nodes

    def regions(self, image: Image) -> Map:
        graph, nodes = self.graph(image)
        if self.way == "recursive":
            labels = recursive_cut(graph, self.kind, self.k, self.limit)
        else:
            labels = k_way_cut(graph, self.kind, self.k, self.seed)
        found = labels[nodes]
        return found if self.whole else merge_small(connected(found), image, self.min_size)


class AverageCut(NormalizedCut):
    """As `NormalizedCut`, but a part A costs cut(A, B) / |A|, its pixels.

    ``limit`` is in the unit of affinities for each pixel. Other options are the same.
    """

    kind = "average"

    def __init__(
        self,
        *,
        k: int = 20,
        way: Literal["recursive", "k-way"] = "recursive",
        limit: float = 1.0,
        sigma_f: float = 8.0,
        sigma_x: float = 4.0,
        radius: float = 5.0,
        superpixels: int = 1500,
        whole: bool = False,
        min_size: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__(
            k=k,
            way=way,
            limit=limit,
            sigma_f=sigma_f,
            sigma_x=sigma_x,
            radius=radius,
            superpixels=superpixels,
            whole=whole,
            min_size=min_size,
            seed=seed,
        )


def minimum_cut(nodes: int, pairs: NDArray[Any], weights: NDArray[Any]) -> tuple[float, Any]:
    """The cut in two of least weight of a whole graph (Stoer and Wagner, JACM 1997).

    Args:
        nodes: N, 2 or more.
        pairs: [E, 2] different nodes, each pair once.
        weights: [E], not negative.

    Returns:
        Its weight and the nodes on the one side, [N] bool. Of a graph in pieces 0, and the piece
        of node 0.

    Raises:
        ValueError: what does not fit the above.
    """
    if nodes < 2:
        raise ValueError(f"nodes must be 2 or more, for a cut to have two sides, got {nodes}")
    links, values = _simple(nodes, pairs), np.asarray(weights, np.float64)
    if values.shape != (len(links),) or not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError(
            f"weights must be [{len(links)}], finite and not negative, got {list(values.shape)}"
        )
    used = values > 0  # an edge of weight 0 connects nothing
    return _core.minimum_cut(nodes, links[used], values[used])


def highly_connected(nodes: int, pairs: NDArray[Any]) -> NDArray[np.int32]:
    """Highly connected subgraphs (Hartuv and Shamir, IPL 2000) of a graph without weights.

    A part stays whole where more than half as many edges as it has nodes must be cut to part it;
    else it is divided at a minimum cut. So clusters have diameter 2 or less; many are one node.

    Args:
        nodes: N.
        pairs: [E, 2] different nodes, each pair once.

    Returns:
        [N] the number of each node's cluster.

    Raises:
        ValueError: pairs that are no edges, or twice the same.
    """
    return _core.highly_connected(nodes, _simple(nodes, pairs))


def _simple(nodes: int, pairs: NDArray[Any]) -> NDArray[np.int64]:
    links = np.asarray(pairs, np.int64).reshape(-1, 2)
    if len(links) and not 0 <= links.min() <= links.max() < nodes:
        raise ValueError(
            f"pairs must be nodes from 0 to {nodes - 1}, got {links.min()} to {links.max()}"
        )
    if len(np.unique(np.sort(links, 1), axis=0)) < len(links) or (links[:, 0] == links[:, 1]).any():
        raise ValueError(
            "pairs must be different, and of different nodes; add up weights of equals"
        )
    return links


class HighlyConnected(RegionModel):
    """Clusters of superpixels by highly connected subgraphs; see `highly_connected`.

    A graph of pixels with their neighbours falls into single pixels, so the nodes are superpixels
    and an edge is between all that are similar in colour and not far apart. A node that stays alone
    joins the cluster of the touching superpixel nearest in colour.

    Args:
        similar: largest distance of mean colours of an edge, in units of CIELAB.
        reach: largest distance of centres, as a share of the image's diagonal.
        superpixels: about so many.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
    """

    def __init__(
        self,
        *,
        similar: float = 8.0,
        reach: float = 0.3,
        superpixels: int = 400,
        min_size: int = 50,
    ) -> None:
        self.similar, self.reach = at_least("similar", similar, 0), at_least("reach", reach, 0)
        self.superpixels = int(at_least("superpixels", superpixels, 1))
        self.min_size = int(at_least("min_size", min_size, 0))

    def regions(self, image: Image) -> Map:
        nodes = superpixels(image, self.superpixels)
        place = np.stack(np.indices(nodes.shape), 2).astype(float)
        facts, _ = means(nodes, np.concatenate([rgb2lab(image), place], 2))
        colour, centre = facts[:, :3], facts[:, 3:]
        gap = np.linalg.norm(colour[:, None] - colour[None], axis=2)
        far = np.linalg.norm(centre[:, None] - centre[None], axis=2)
        near = (gap < self.similar) & (far <= self.reach * np.hypot(*nodes.shape))
        pairs = np.argwhere(np.triu(near, 1))
        owner = _core.highly_connected(len(colour), pairs)
        found = connected(_adopted(owner, nodes, gap)[nodes])
        return merge_small(found, image, self.min_size)


def _adopted(owner: NDArray[np.int32], nodes: Map, gap: NDArray[np.float64]) -> NDArray[np.int64]:
    """Clusters [N] where single nodes have joined the touching node nearest in colour."""
    owner = owner.astype(np.int64)
    touching, _ = adjacent(nodes)
    both = np.concatenate([touching, touching[:, ::-1]])
    both = both[np.lexsort((both[:, 1], gap[both[:, 0], both[:, 1]]))]
    lonely = np.bincount(owner)[owner] == 1
    while lonely.any():
        settled = both[lonely[both[:, 0]] & ~lonely[both[:, 1]]]
        if not len(settled):  # all are single, as where nothing is similar
            return owner
        node, to = settled[0]
        owner[node], lonely[node] = owner[to], False
    return owner


__all__ = [
    "AverageCut",
    "Graph",
    "HighlyConnected",
    "NormalizedCut",
    "best_split",
    "eigenvectors",
    "highly_connected",
    "k_way_cut",
    "minimum_cut",
    "nested_cuts",
    "recursive_cut",
    "superpixels",
]
