"""The compiled methods against plain forms and other libraries."""

import heapq
import itertools

import networkx as nx
import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching, maximum_flow, minimum_spanning_tree
from sklearn.cluster import KMeans as SklearnKMeans

from pyseg_classical import _core
from pyseg_classical.cuts import (
    AverageCut,
    Graph,
    HighlyConnected,
    NormalizedCut,
    best_split,
    eigenvectors,
    highly_connected,
    k_way_cut,
    minimum_cut,
    recursive_cut,
    superpixels,
)
from pyseg_classical.grabcut import GrabCut, RandomWalker, grab_cut
from pyseg_classical.growing import RegionGrowing, grow
from pyseg_classical.kmeans import kmeans
from pyseg_classical.maxflow import grid_max_flow, max_flow
from pyseg_classical.split_merge import SplitAndMerge, split_and_merge
from pyseg_classical.trees import Felzenszwalb, SpanningTree


@pytest.fixture
def threads():
    """``threads(n)`` for torch, and back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def same(one, other):
    """Whether two maps divide pixels alike, whatever the numbers."""
    pairs = np.unique(np.stack([np.ravel(one), np.ravel(other)], 1), axis=0)
    return len(pairs) == len(np.unique(one)) == len(np.unique(other))


# -------------------------------------------------------------------------------------- k-means


@pytest.mark.parametrize(
    ("count", "dims", "k"), [(700, 3, 8), (5000, 5, 30), (63, 1, 2), (40, 2, 40)]
)
def test_kmeans_equals_scikit_learn(count, dims, k):
    draw = np.random.default_rng(count)
    values = draw.normal(size=(count, dims)) + draw.integers(0, 4, (count, 1)) * 3
    init = values[draw.choice(count, k, replace=False)]
    peer = SklearnKMeans(k, init=init, n_init=1, algorithm="lloyd", max_iter=50).fit(values)
    ours = kmeans(values, k, init=init, iterations=50)
    assert (ours.labels == peer.labels_).all()
    np.testing.assert_allclose(ours.centres, peer.cluster_centers_, rtol=1e-9, atol=1e-9)
    assert ours.inertia == pytest.approx(peer.inertia_, rel=1e-9, abs=1e-9)
    assert ours.iterations == peer.n_iter_


def test_kmeans_empty_clusters_are_moved_as_scikit_learn_does():
    values = np.array([[0.0], [0.1], [0.2], [5.0], [9.0]])
    init = np.array([[0.1], [100.0], [200.0]])
    peer = SklearnKMeans(3, init=init, n_init=1, algorithm="lloyd").fit(values)
    assert (kmeans(values, 3, init=init).labels == peer.labels_).all()


def test_kmeans_threads_seeds_and_few_distinct_elements(threads):
    values = np.random.default_rng(0).normal(size=(20_000, 4))
    found = []
    for number in (1, 2, 5):
        threads(number)
        found.append(kmeans(values, 12, seed=3))
    assert all((one.centres == found[0].centres).all() for one in found)
    assert all((one.labels == found[0].labels).all() for one in found)
    assert (kmeans(values, 12, seed=4).centres != found[0].centres).any()
    same_twice = kmeans(np.repeat([[1.0], [2.0]], 5, 0), 4)
    assert same_twice.inertia == 0 and len(np.unique(same_twice.labels)) == 2


@pytest.mark.parametrize(
    ("values", "k", "options", "message"),
    [
        ([[0.0], [np.nan]], 1, {}, "element 1 holds NaN"),
        ([[0.0]], 2, {}, "k must be from 1 to the number of elements, 1, got 2"),
        ([0.0, 1.0], 1, {}, r"\[N, D\]"),
        ([[0.0], [1.0]], 2, {"init": [[0.0]]}, r"init must be finite centres \[2, 1\]"),
        ([[0.0], [1.0]], 2, {"init": "best"}, "k-means\\+\\+"),
    ],
)
def test_kmeans_refuses(values, k, options, message):
    with pytest.raises(ValueError, match=message):
        kmeans(np.array(values), k, **options)


# ------------------------------------------------------------------------------------- max-flow


@pytest.mark.parametrize("seed", range(12))
def test_max_flow_equals_scipy(seed):
    draw = np.random.default_rng(seed)
    nodes, edges = int(draw.integers(1, 40)), int(draw.integers(0, 200))
    source, sink = draw.integers(0, 20, (2, nodes))
    pairs = draw.integers(0, nodes, (edges, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    forward, backward = draw.integers(0, 15, (2, len(pairs)))
    flow, side = max_flow(source, sink, pairs, forward, backward)
    matrix = np.zeros((nodes + 2, nodes + 2), np.int32)
    matrix[nodes, :nodes], matrix[:nodes, nodes + 1] = source, sink
    np.add.at(matrix, (pairs[:, 0], pairs[:, 1]), forward)
    np.add.at(matrix, (pairs[:, 1], pairs[:, 0]), backward)
    assert flow == maximum_flow(csr_array(matrix), nodes, nodes + 1).flow_value
    there = np.append(side, [True, False])
    assert matrix[np.ix_(there, ~there)].sum() == flow  # a cut of the same weight proves both


@pytest.mark.parametrize("planes", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 13), (24, 17)])
def test_grid_max_flow_equals_that_of_the_graph(planes, shape):
    draw = np.random.default_rng(planes)
    source, sink = draw.integers(0, 9, (2, *shape)).astype(float)
    weights = draw.integers(0, 6, (planes, *shape)).astype(float)
    flow, side = grid_max_flow(source, sink, weights)
    steps = [(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)]
    pairs, there, back = [], [], []
    for y, x in itertools.product(range(shape[0]), range(shape[1])):
        for d in range(planes) if planes == 8 else range(0, 2 * planes, 2):
            v, u = y + steps[d][0], x + steps[d][1]
            if 0 <= v < shape[0] and 0 <= u < shape[1]:
                pairs.append((y * shape[1] + x, v * shape[1] + u))
                weight = weights[d if planes == 8 else d // 2, y, x]
                there.append(weight)
                back.append(0 if planes == 8 else weight)
    expected, _ = max_flow(source.ravel(), sink.ravel(), np.array(pairs), there, back)
    assert flow == expected
    flat = side.ravel()
    cut = sum(
        weight * (flat[a] & ~flat[b]) + other * (flat[b] & ~flat[a])
        for (a, b), weight, other in zip(pairs, there, back, strict=True)
    )
    assert cut + source[~side].sum() + sink[side].sum() == flow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1], [[0, 1]], [1], [1]), r"source and sink must be \[N\] both"),
        (([1, 2], [1, 2], [[0, 2]], [1], [1]), "pairs must be nodes from 0 to 1, got 0 to 2"),
        (([1, 2], [1, 2], [[0, 1]], [-1], [1]), "forward must be finite and not negative"),
        (([1, np.nan], [1, 2], [[0, 1]], [1], [1]), "source must be finite"),
        (([1, 2], [1, 2], [[0, 1]], [np.inf], [1]), "more than the sum of what leaves the node"),
        (([1, 2], [1, 2], [[0, 1]], [1, 1], [1]), r"must be \[1\], one for each of pairs"),
    ],
)
def test_max_flow_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        max_flow(*arguments)
    assert max_flow([3], [2], [], [], [])[0] == 2


# -------------------------------------------------------------------------------- region growing


def plain_growing(image, seeds, threshold, fill):
    """The same in plain Python, of one channel."""
    height, width = image.shape
    labels = seeds.copy()
    pixels = {r: list(image[seeds == r]) for r in range(1, seeds.max() + 1)}
    heap, turn = [], itertools.count()

    def offer(y, x, r):
        for v, u in ((y, x + 1), (y, x - 1), (y + 1, x), (y - 1, x)):
            if 0 <= v < height and 0 <= u < width and labels[v, u] == 0:
                heapq.heappush(heap, (abs(image[v, u] - np.mean(pixels[r])), next(turn), v, u, r))

    for everything in (False, True) if fill else (False,):
        for y, x in zip(*labels.nonzero(), strict=True):
            offer(y, x, labels[y, x])
        while heap:
            _, _, y, x, r = heapq.heappop(heap)
            if labels[y, x]:
                continue
            mean, spread = np.mean(pixels[r]), np.std(pixels[r])
            limit = threshold if spread == 0 else threshold * min(max(1 - spread / mean, 0), 1)
            if everything or abs(image[y, x] - mean) < limit:
                labels[y, x] = r
                pixels[r].append(image[y, x])
                offer(y, x, r)
    return labels


@pytest.mark.parametrize("fill", [False, True])
def test_growing_equals_the_plain_form(fill):
    draw = np.random.default_rng(1)
    for shape in ((1, 9), (13, 17), (20, 11)):
        image = draw.integers(20, 60, shape).astype(float)
        image[:, shape[1] // 2 :] += 90
        seeds = np.zeros(shape, np.int64)
        seeds.ravel()[draw.choice(image.size, 4, replace=False)] = (1, 2, 3, 3)
        expected = plain_growing(image, seeds, 40.0, fill)
        assert (grow(image, seeds, 40.0, fill=fill) == expected).all()
        assert (expected > 0).all() == fill or not fill


def test_growing_stops_at_the_threshold_and_finds_its_own_seeds(colours):
    image = np.full((20, 30), 50)
    image[:, 10:] = 200
    seeds = np.zeros(image.shape, np.int64)
    seeds[3, 3] = 7
    assert (grow(image, seeds, 100.0) == (image == 50)).all()
    assert grow(image, seeds, 151.0).all()
    found = RegionGrowing(smoothing=0, min_size=0).regions(colours(image))
    assert same(found, image)
    given = RegionGrowing(seeds=((0, 0),), fill=False, smoothing=0).regions(colours(image))
    assert ((given >= 0) == (image == 50)).all()
    drawn = RegionGrowing(seeds="random", count=10_000).regions(colours(image))
    assert drawn.min() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grow(np.full((2, 2), np.nan), np.ones((2, 2), int), 1), "NaN"),
        (lambda: grow(np.ones((2, 2)), np.zeros((2, 2), int), 1), "seeds must be 0 or more"),
        (lambda: grow(np.ones((2, 2)), np.ones((2, 3), int), 1), r"integers \[2, 2\]"),
        (lambda: RegionGrowing(threshold=-1), "threshold must be 0 or more"),
        (lambda: RegionGrowing(seeds="somewhere"), "automatic or random"),
        (lambda: RegionGrowing(seeds=()), "at least one"),
        (
            lambda: RegionGrowing(seeds=((5, 1),)).regions(np.zeros((5, 4, 3), np.uint8)),
            r"inside the image of 5 x 4, got \(5, 1\)",
        ),
    ],
)
def test_growing_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------ split and merge


def plain_split(image, smallest, uneven):
    labels, blocks = np.zeros(image.shape[:2], int), itertools.count()

    def visit(y, x, side):
        if y >= image.shape[0] or x >= image.shape[1]:
            return
        block = image[y : y + side, x : x + side]
        if side > smallest and uneven(block):
            half = side // 2
            for v, u in ((y, x), (y, x + half), (y + half, x), (y + half, x + half)):
                visit(v, u, half)
        else:
            labels[y : y + side, x : x + side] = next(blocks)

    side = 1
    while side < max(image.shape[:2]):
        side *= 2
    visit(0, 0, side)
    return labels


def plain_merge(labels, image, limit):
    """Merges the nearest pair of neighbours until none is nearer than the limit."""
    labels = labels.copy()
    while True:
        means = {r: image[labels == r].mean(0) for r in np.unique(labels)}
        sides = [(labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])]
        touching = {
            (min(a, b), max(a, b))
            for one, other in sides
            for a, b in zip(one.ravel(), other.ravel(), strict=True)
            if a != b
        }
        near = [(np.sqrt(np.square(means[a] - means[b]).mean()), a, b) for a, b in touching]
        if not near or min(near)[0] >= limit:
            return labels
        _, a, b = min(near)
        labels[labels == b] = a


@pytest.mark.parametrize("shape", [(16, 16, 1), (13, 21, 3), (1, 1, 1), (5, 2, 3)])
def test_split_and_merge_equals_the_plain_form(shape):
    image = np.random.default_rng(2).integers(0, 40, shape).astype(float)
    image[: shape[0] // 2, : shape[1] // 3] += 100

    def deviation(block):
        return np.sqrt(block.reshape(-1, shape[2]).var(0).mean()) > 11

    def wide(block):
        return np.ptp(block.reshape(-1, shape[2]), 0).max() > 30

    for name, test, limit in (("deviation", deviation, 11), ("range", wide, 30)):
        blocks = plain_split(image, 2, test)
        found = split_and_merge(image, split=name, split_limit=limit, merge=None)
        assert (found == blocks).all()
        assert (split_and_merge(image, split=test, merge=None) == blocks).all()
        merged = split_and_merge(image, split=name, split_limit=limit, merge_limit=14.0)
        assert same(merged, plain_merge(blocks, image, 14.0))


def test_axis_aligned_squares_are_found_exactly():
    image = np.full((40, 56), 10.0)
    image[8:24, 8:24], image[4:36, 32:48] = 90, 200
    assert same(split_and_merge(image, smallest=1), image)
    assert len(np.unique(split_and_merge(np.ones((7, 3))))) == 1


def test_predicates_of_ones_own():
    image = np.zeros((8, 8))
    image[:, 4:], image[4:, 4:] = 60, 200
    dark = split_and_merge(
        image,
        split=lambda block: np.ptp(block) > 0,
        merge=lambda a, b: max(a["mean"][0], b["mean"][0]) < 100,
    )
    assert same(dark, image > 100)
    large = split_and_merge(
        image, smallest=4, split=lambda b: True, merge=lambda a, b: a["area"] < 17
    )
    assert len(np.unique(large)) < 4
    with pytest.raises(ZeroDivisionError):
        split_and_merge(image, split=lambda block: 1 / 0)
    for options in ({"split": "maximum"}, {"merge": "never"}, {"smallest": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            split_and_merge(image, **options)


# -------------------------------------------------------------------------------- cuts of graphs

TRIANGLES = np.zeros((6, 6))
for a, b in ((0, 1), (1, 2), (0, 2), (3, 4), (4, 5), (3, 5)):
    TRIANGLES[a, b] = TRIANGLES[b, a] = 1
TRIANGLES[2, 3] = TRIANGLES[3, 2] = 0.1


@pytest.mark.parametrize(
    ("kind", "second", "value"),
    [("normalized", 0.03141, 0.03279), ("average", 0.06377, 0.06667)],
)
def test_cuts_of_two_triangles(kind, second, value):
    graph = Graph.of_weights(TRIANGLES)
    values, vectors = eigenvectors(graph, kind, 2)
    assert values[0] == pytest.approx(0, abs=1e-12) and values[1] == pytest.approx(second, abs=1e-5)
    found, side = best_split(graph, kind, vectors[:, 1])
    assert found == pytest.approx(value, abs=1e-5)
    assert same(side, [0, 0, 0, 1, 1, 1])
    for labels in (recursive_cut(graph, kind, 2, 1.0), k_way_cut(graph, kind, 2, 0)):
        assert same(labels, [0, 0, 0, 1, 1, 1])
    assert not recursive_cut(graph, kind, 2, 0.01).any()


@pytest.mark.parametrize("kind", ["normalized", "average"])
def test_best_split_equals_trying_all(kind):
    draw = np.random.default_rng(3)
    weights = np.triu(draw.random((12, 12)) * (draw.random((12, 12)) < 0.6), 1)
    weights += weights.T + np.diag(draw.random(12))
    order_by = draw.normal(size=12)
    value, side = best_split(Graph.of_weights(weights), kind, order_by)
    mass = weights.sum(1) if kind == "normalized" else np.ones(12)
    tried = []
    for threshold in np.sort(order_by)[:-1]:
        one = order_by <= threshold
        cut = weights[np.ix_(one, ~one)].sum()
        tried.append(cut / mass[one].sum() + cut / mass[~one].sum())
    assert value == pytest.approx(min(tried))
    one = side if side.sum() else ~side
    cut = weights[np.ix_(one, ~one)].sum()
    assert value == pytest.approx(cut / mass[one].sum() + cut / mass[~one].sum())


def test_affinities_of_superpixels_are_sums_of_those_of_pixels(threads):
    draw = np.random.default_rng(4)
    values = draw.normal(size=(9, 11, 3))
    owner = draw.integers(0, 5, (9, 11))
    place = np.stack(np.indices(owner.shape), 2).reshape(-1, 2)
    flat = values.reshape(-1, 3)
    far = np.square(place[:, None] - place[None]).sum(2)
    full = np.exp(-np.square(flat[:, None] - flat[None]).sum(2) / 2.0 - far / 7.0) * (far < 9)
    member = np.eye(5)[owner.ravel()]
    summed = member.T @ full @ member
    for number in (1, 2, 3):
        pairs, weights, total = _core.affinity(values, owner, 5, 3.0, 2.0, 7.0, number)
        np.testing.assert_allclose(weights, summed[pairs[:, 0], pairs[:, 1]])
        np.testing.assert_allclose(total, summed.sum(1))
    assert len(pairs) == (np.triu(summed, 1) > 0).sum()


@pytest.mark.parametrize("model", [NormalizedCut, AverageCut])
def test_cuts_find_flat_parts(model, colours):
    image = np.full((30, 40), 40)
    image[:, 20:], image[15:, 20:] = 140, 230
    for options in ({}, {"superpixels": 0}, {"way": "k-way", "superpixels": 60}):
        assert same(model(k=3, limit=5, **options).regions(colours(image)), image)
    with pytest.raises(ValueError, match="superpixels=1500"):
        model(superpixels=0).regions(np.zeros((200, 200, 3), np.uint8))


@pytest.mark.parametrize("seed", range(15))
def test_minimum_cut_equals_networkx(seed):
    draw = np.random.default_rng(seed)
    nodes = int(draw.integers(2, 18))
    pairs = np.argwhere(np.triu(draw.random((nodes, nodes)) < draw.uniform(0.2, 1), 1))
    weights = draw.integers(1, 9, len(pairs)).astype(float)
    graph = nx.Graph()
    graph.add_nodes_from(range(nodes))
    graph.add_weighted_edges_from((a, b, w) for (a, b), w in zip(pairs, weights, strict=True))
    value, side = minimum_cut(nodes, pairs, weights)
    expected = nx.stoer_wagner(graph)[0] if nx.is_connected(graph) else 0
    assert value == expected and 0 < side.sum() < nodes
    assert weights[side[pairs[:, 0]] != side[pairs[:, 1]]].sum() == value


def check_clusters(nodes, pairs, owner):
    """Each cluster is highly connected, by another library."""
    graph = nx.Graph(list(map(tuple, pairs)))
    graph.add_nodes_from(range(nodes))
    for cluster in np.unique(owner):
        part = graph.subgraph(np.flatnonzero(owner == cluster).tolist())
        if len(part) > 1:
            assert nx.edge_connectivity(part) > len(part) / 2
            assert nx.diameter(part) <= 2


def test_highly_connected_subgraphs():
    five, four = itertools.combinations(range(5), 2), itertools.combinations(range(5, 9), 2)
    assert same(highly_connected(9, [*five, *four, (4, 5)]), [0] * 5 + [1] * 4)
    grid = np.arange(16).reshape(4, 4)
    pairs = np.concatenate(
        [
            np.stack([grid[:, :-1].ravel(), grid[:, 1:].ravel()], 1),
            np.stack([grid[:-1].ravel(), grid[1:].ravel()], 1),
        ]
    )
    assert len(np.unique(highly_connected(16, pairs))) == 16
    assert len(np.unique(highly_connected(3, []))) == 3
    for seed in range(6):
        draw = np.random.default_rng(seed)
        group = draw.integers(0, 3, 24)
        likely = np.where(group[:, None] == group[None], 0.9, 0.08)
        pairs = np.argwhere(np.triu(draw.random((24, 24)) < likely, 1))
        check_clusters(24, pairs, highly_connected(24, pairs))


def test_cuts_refuse():
    with pytest.raises(ValueError, match="2 or more"):
        minimum_cut(1, [], [])
    with pytest.raises(ValueError, match="pairs must be different"):
        highly_connected(3, [(0, 1), (1, 0)])
    with pytest.raises(ValueError, match="from 0 to 2"):
        highly_connected(3, [(0, 3)])
    with pytest.raises(ValueError, match="symmetric"):
        Graph.of_weights(np.triu(np.ones((3, 3))))


def test_hcs_of_an_image(colours):
    image = np.full((60, 80), 40)
    image[:, 40:] = 200
    assert same(HighlyConnected(reach=1).regions(colours(image)), image)
    assert superpixels(colours(image), 48).max() + 1 == 48


# ------------------------------------------------------------------------------- trees of pixels


def plain_felzenszwalb(image, scale, min_size):
    height, width = image.shape[:2]
    edges = []
    for y, x in itertools.product(range(height), range(width)):
        for v, u in ((y, x + 1), (y + 1, x), (y + 1, x + 1), (y + 1, x - 1)):
            if v < height and 0 <= u < width:
                gap = np.float32(np.linalg.norm(image[y, x] - image[v, u]))
                edges.append((gap, y * width + x, v * width + u))
    edges.sort()
    parts = {p: {p} for p in range(height * width)}
    inner = dict.fromkeys(parts, 0.0)
    owner = {p: p for p in parts}

    def join(a, b, weight):
        if len(parts[a]) < len(parts[b]):
            a, b = b, a
        parts[a] |= parts.pop(b)
        owner.update(dict.fromkeys(parts[a], a))
        inner[a] = weight

    for weight, p, q in edges:
        a, b = owner[p], owner[q]
        if a != b and weight <= min(inner[r] + scale / len(parts[r]) for r in (a, b)):
            join(a, b, weight)
    for weight, p, q in edges:
        a, b = owner[p], owner[q]
        if a != b and min(len(parts[a]), len(parts[b])) < min_size:
            join(a, b, weight)
    return np.array([owner[p] for p in range(height * width)]).reshape(height, width)


def test_felzenszwalb_equals_the_plain_form():
    draw = np.random.default_rng(5)
    for shape in ((1, 1), (12, 17), (15, 9)):
        image = draw.normal(100, 8, (*shape, 3))
        image[:, shape[1] // 2 :] += 60
        found = _core.felzenszwalb(image, 60.0, 4)
        assert same(found, plain_felzenszwalb(image, 60.0, 4))


def test_spanning_tree_is_the_minimum_one():
    """Without a least size its parts are the components without the largest edges of SciPy's tree."""
    image = np.random.default_rng(6).permutation(12 * 10).astype(float).reshape(12, 10) ** 1.7
    number = np.arange(image.size).reshape(image.shape)
    graph = nx.Graph()
    for (y, x), p in np.ndenumerate(number):
        for v, u in ((y, x + 1), (y + 1, x), (y + 1, x + 1), (y + 1, x - 1)):
            if v < 12 and 0 <= u < 10:
                graph.add_edge(int(p), int(number[v, u]), weight=abs(image[y, x] - image[v, u]))
    matrix = minimum_spanning_tree(nx.to_scipy_sparse_array(graph, nodelist=range(120))).tocoo()
    kept = matrix.data.argsort()[: len(matrix.data) - 4]
    forest = nx.Graph(list(zip(matrix.row[kept].tolist(), matrix.col[kept].tolist(), strict=True)))
    forest.add_nodes_from(range(120))
    expected = np.zeros(120, int)
    for label, part in enumerate(nx.connected_components(forest)):
        expected[list(part)] = label
    assert same(_core.spanning_tree(image[:, :, None], 5, 0.0, 1).ravel(), expected)


def test_trees_of_images(colours):
    image = np.full((40, 40), 40)
    image[10:30, 10:30], image[2:4, 2:4] = 200, 120
    assert same(Felzenszwalb(sigma=0, min_size=0).regions(colours(image)), image)
    large = SpanningTree(k=9, sigma=0, min_size=50).regions(colours(image))
    assert same(large, image == 200)


# ---------------------------------------------------------------------- GrabCut, random walker


def test_grabcut_finds_the_disc_and_agrees_with_opencv(disc, iou):
    import cv2

    draw = np.random.default_rng(7)
    truth = disc((90, 120), (45, 60), 25)
    image = np.where(truth[:, :, None], (200, 90, 60), (60, 120, 90)) + draw.normal(
        0, 18, (90, 120, 3)
    )
    image = image.clip(0, 255).astype(np.uint8)
    found = GrabCut(box=(25, 10, 95, 80)).foreground(image)
    assert iou(found, truth) > 0.98
    mask, background, front = np.zeros((90, 120), np.uint8), np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(image, mask, (25, 10, 70, 70), background, front, 5, cv2.GC_INIT_WITH_RECT)
    assert iou(found, (mask & 1) == 1) > 0.98
    marks = np.where(truth, 2, 0)
    marks[40:50, 55:65], marks[44, 60] = 1, 1
    assert grab_cut(image, marks)[40:50, 55:65].all()


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        (np.full((4, 4), 2), r"no background \(0\)"),
        (np.ones((4, 4)), r"no background \(0\)"),
        (np.zeros((4, 4)), r"background \(0\) everywhere"),
        (np.full((4, 4), 255), "0 = background, 1 = foreground"),
        (np.zeros((4, 5)), r"marks must be \[4, 4\]"),
    ],
)
def test_grabcut_refuses(marks, message):
    with pytest.raises(ValueError, match=message):
        grab_cut(np.zeros((4, 4, 3), np.uint8), marks)
    with pytest.raises(ValueError, match="inside the image of 4 x 4"):
        GrabCut(box=(0, 0, 9, 3)).foreground(np.eye(4, dtype=np.uint8)[:, :, None].repeat(3, 2))


def test_random_walker(colours):
    image = np.full((20, 30), 60)
    image[:, 15:] = 180
    seeds = ((3, 3, 1), (10, 25, 2))
    for options in ({"seeds": seeds}, {"k": 2}):
        assert same(RandomWalker(min_size=0, **options).regions(colours(image)), image)
    with pytest.raises(ValueError, match="two labels at least"):
        RandomWalker(seeds=((1, 1, 1), (2, 2, 1)))
    with pytest.raises(ValueError, match="inside the image of 20 x 30"):
        RandomWalker(seeds=((1, 1, 1), (2, 30, 2))).regions(colours(image))


def test_matching_is_the_largest():
    for seed in range(8):
        draw = np.random.default_rng(seed)
        ours, theirs = draw.random((2, 23, 31)) < draw.uniform(0.05, 0.5)
        radius = draw.uniform(0.5, 4)
        one, other = _core.match(ours, theirs, radius)
        a, b = np.argwhere(ours), np.argwhere(theirs)
        near = np.square(a[:, None] - b[None]).sum(2) <= radius**2
        largest = (maximum_bipartite_matching(csr_array(near), "column") >= 0).sum()
        assert one.sum() == other.sum() == largest
        assert (ours | ~one).all() and (theirs | ~other).all()
