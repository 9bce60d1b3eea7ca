"""The compiled methods against plain Python and other libraries, in one process on the same inputs.

    python plugins/pyseg-classical/benchmarks/speed.py [--threads 2]

PyMaxflow is GPL and only measured here; without it its rows are left out. Medians of five
interleaved rounds, plain forms once and on small inputs.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from pyseg_classical import _core
from pyseg_classical.cuts import NormalizedCut, highly_connected
from pyseg_classical.growing import grow
from pyseg_classical.kmeans import kmeans
from pyseg_classical.maxflow import grid_max_flow, max_flow
from pyseg_classical.split_merge import split_and_merge
from skimage import data
from skimage.segmentation import felzenszwalb
from skimage.transform import resize
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import test_compiled as plain


def seconds(work: Callable[[], Any]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def compare(name: str, ours: Callable[[], Any], peer: Callable[[], Any], rounds: int = 5) -> None:
    pairs = [(seconds(ours), seconds(peer)) for _ in range(rounds)]
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"| {name} | {1000 * mine:.2f} | {1000 * theirs:.2f} | {theirs / mine:.1f} |", flush=True)


def photograph(height: int, width: int) -> np.ndarray:
    return (resize(data.astronaut(), (height, width), anti_aliasing=True) * 255).astype(np.uint8)


def plain_kmeans(values: np.ndarray, centres: np.ndarray, iterations: int) -> None:
    points, middle = values.tolist(), centres.tolist()
    for _ in range(iterations):
        sums = [[0.0] * len(middle[0]) + [0] for _ in middle]
        for point in points:
            gaps = [sum((a - b) ** 2 for a, b in zip(point, c, strict=True)) for c in middle]
            row = sums[gaps.index(min(gaps))]
            for d, value in enumerate(point):
                row[d] += value
            row[-1] += 1
        middle = [
            [s / row[-1] for s in row[:-1]] if row[-1] else c
            for row, c in zip(sums, middle, strict=True)
        ]  # fmt: keep


def plain_hcs(graph: nx.Graph) -> list[set[int]]:
    if len(graph) <= 1:
        return [set(graph)]
    if not nx.is_connected(graph):
        return [
            c for part in nx.connected_components(graph) for c in plain_hcs(graph.subgraph(part))
        ]
    value, (one, other) = nx.stoer_wagner(graph)
    if value > len(graph) / 2:
        return [set(graph)]
    return [c for part in (one, other) for c in plain_hcs(graph.subgraph(part).copy())]


def energies(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    grey = image.mean(2)
    source, sink = np.abs(grey - 60).round(), np.abs(grey - 190).round()
    weights = np.zeros((2, *grey.shape))
    weights[0, :, :-1] = (60 * np.exp(-(np.diff(grey, axis=1) ** 2) / 200)).round()
    weights[1, :-1] = (60 * np.exp(-(np.diff(grey, axis=0) ** 2) / 200)).round()
    return source, sink, weights


def pymaxflow(source: np.ndarray, sink: np.ndarray, weights: np.ndarray) -> float:
    import maxflow

    graph = maxflow.GraphFloat()
    nodes = graph.add_grid_nodes(source.shape)
    right = np.array([[0, 0, 0], [0, 0, 1], [0, 0, 0]])
    graph.add_grid_edges(nodes, weights[0], right, symmetric=True)
    graph.add_grid_edges(nodes, weights[1], right.T, symmetric=True)
    graph.add_grid_tedges(nodes, source, sink)
    flow = graph.maxflow()
    graph.get_grid_segments(nodes)
    return flow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    print("| method, size | ours, ms | peer, ms | times as fast |\n|---|---|---|---|")
    with threadpool_limits(threads):
        measure()


def measure() -> None:
    draw = np.random.default_rng(0)
    image = photograph(321, 481)
    colours = image.reshape(-1, 3).astype(float)
    wide = draw.normal(size=(100_000, 16)) + 3 * draw.integers(0, 4, (100_000, 1))
    for values, k, what in (
        (colours, 8, "481x321 colours"),
        (colours, 64, "481x321 colours"),
        (wide, 32, "100,000 x 16"),
    ):  # fmt: keep
        init = values[draw.choice(len(values), k, replace=False)]
        peer = KMeans(k, init=init, n_init=1, algorithm="lloyd", max_iter=30, tol=1e-4)
        compare(
            f"k-means, {what}, k={k}, scikit-learn",
            partial(kmeans, values, k, init=init, iterations=30),
            partial(peer.fit, values),
        )  # fmt: keep
    few, init = colours[::97], colours[: 8 * 97 : 97]
    compare(
        "k-means, 1,600 x 3, k=8, 5 iterations, plain Python",
        lambda: kmeans(few, 8, init=init, iterations=5, tolerance=0),
        lambda: plain_kmeans(few, init, 5),
        1,
    )  # fmt: keep

    grid = energies(image)
    large = energies(photograph(1024, 1024))
    if importlib.util.find_spec("maxflow"):
        for energy in (grid, large):
            assert pymaxflow(*energy) == grid_max_flow(*energy)[0]
            size = "x".join(map(str, energy[0].shape[::-1]))
            compare(
                f"max-flow, {size}, 4 neighbours, PyMaxflow",
                partial(grid_max_flow, *energy),
                partial(pymaxflow, *energy),
            )  # fmt: keep
    small = energies(photograph(24, 32))
    number = np.arange(24 * 32).reshape(24, 32)
    pairs = np.concatenate(
        [
            np.stack([number[:, :-1].ravel(), number[:, 1:].ravel()], 1),
            np.stack([number[:-1].ravel(), number[1:].ravel()], 1),
        ]
    )  # fmt: keep
    links = np.concatenate([small[2][0, :, :-1].ravel(), small[2][1, :-1].ravel()])
    graph = nx.DiGraph()
    for (a, b), weight in zip(pairs.tolist(), links, strict=True):
        graph.add_edge(a, b, capacity=weight)
        graph.add_edge(b, a, capacity=weight)
    for node, (one, other) in enumerate(zip(small[0].ravel(), small[1].ravel(), strict=True)):
        graph.add_edge("s", node, capacity=one)
        graph.add_edge(node, "t", capacity=other)
    compare(
        "max-flow, 32x24, networkx (Python, Boykov and Kolmogorov's, too)",
        lambda: max_flow(small[0].ravel(), small[1].ravel(), pairs, links, links),
        lambda: nx.maximum_flow_value(
            graph, "s", "t", flow_func=nx.algorithms.flow.boykov_kolmogorov
        ),
        1,
    )

    for height, width in ((40, 60), (321, 481)):
        grey = photograph(height, width).mean(2)
        seeds = np.zeros(grey.shape, np.int64)
        places = seeds[5::12, 5::12]
        places[:] = np.arange(1, places.size + 1).reshape(places.shape)
        compare(
            f"region growing, {width}x{height}, plain Python",
            partial(grow, grey, seeds, 60.0, fill=True),
            partial(plain.plain_growing, grey, seeds, 60.0, True),
        )
    block = photograph(32, 48)[:, :, :1].astype(float)

    def plain_split_merge() -> None:
        blocks = plain.plain_split(block, 2, lambda part: part.std() > 12)
        plain.plain_merge(blocks, block, 12.0)

    compare(
        "split and merge, 48x32, plain Python", lambda: split_and_merge(block), plain_split_merge, 1
    )
    group = draw.integers(0, 4, 60)
    likely = np.where(group[:, None] == group[None], 0.9, 0.05)
    edges = np.argwhere(np.triu(draw.random((60, 60)) < likely, 1))
    similar = nx.Graph(edges.tolist())
    compare(
        "HCS, 60 nodes, networkx",
        lambda: highly_connected(60, edges),
        lambda: plain_hcs(similar),
        1,
    )
    smooth = image.astype(float)
    compare(
        "Felzenszwalb, 481x321, scikit-image",
        lambda: _core.felzenszwalb(smooth, 300.0, 50),
        lambda: felzenszwalb(image, scale=300, sigma=0, min_size=50),
    )  # fmt: keep
    for size in ((321, 481), (1000, 1000)):
        picture = photograph(*size)
        for way in ("recursive", "k-way"):
            spent = statistics.median(
                seconds(partial(NormalizedCut(way=way).regions, picture)) for _ in range(3)
            )
            print(f"| normalized cut, {size[1]}x{size[0]}, {way} | {1000 * spent:.0f} | - | - |")


if __name__ == "__main__":
    main()
