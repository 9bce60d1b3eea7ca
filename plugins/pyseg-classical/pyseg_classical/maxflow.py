"""Maximum s-t flow and minimum cut, of any graph and of pixels, compiled.

The algorithm is Boykov and Kolmogorov's (PAMI 2004): search trees from both terminals that are kept
from one path to the next. It runs on one thread.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core


def max_flow(
    source: NDArray[Any],
    sink: NDArray[Any],
    pairs: NDArray[Any],
    forward: NDArray[Any],
    backward: NDArray[Any],
) -> tuple[float, NDArray[np.bool_]]:
    """The largest flow through a graph of N nodes and two terminals, and the smallest cut.

    Args:
        source: capacity from the source to every node, [N].
        sink: from every node to the sink, [N].
        pairs: nodes that are connected, [E, 2]; a pair may come several times.
        forward: capacity from the first of a pair to the second, [E].
        backward: from the second to the first, [E].

    Returns:
        The flow, and where nodes are on the source's side of the cut, [N]: of all smallest cuts
        the one with the fewest nodes there.

    Raises:
        ValueError: shapes that do not fit, capacities that are negative or not finite (for a link
            that must hold, take more than the sum of what leaves the node), or ends that are no
            nodes.

    Example:
        >>> max_flow([3, 0], [0, 2], [[0, 1]], [5], [0])
        (2.0, array([ True,  True]))
    """
    from_source, to_sink = _capacities("source", source, 1), _capacities("sink", sink, 1)
    there, back = _capacities("forward", forward, 1), _capacities("backward", backward, 1)
    ends = np.asarray(pairs)
    if ends.size == 0:
        ends = np.zeros((0, 2), np.int64)
    if ends.ndim != 2 or ends.shape[1] != 2 or ends.dtype.kind not in "iu":
        raise ValueError(f"pairs must be integers [E, 2], got {ends.dtype} {list(ends.shape)}")
    if from_source.shape != to_sink.shape:
        raise ValueError(
            f"source and sink must be [N] both, got {list(from_source.shape)} and "
            f"{list(to_sink.shape)}"
        )
    if there.shape != (len(ends),) or back.shape != (len(ends),):
        raise ValueError(
            f"forward and backward must be [{len(ends)}], one for each of pairs, got "
            f"{list(there.shape)} and {list(back.shape)}"
        )
    if len(ends) and not 0 <= ends.min() <= ends.max() < len(from_source):
        raise ValueError(
            f"pairs must be nodes from 0 to {len(from_source) - 1}, got {ends.min()} to "
            f"{ends.max()}"
        )
    return _core.max_flow(from_source, to_sink, ends, there, back)


def grid_max_flow(
    source: NDArray[Any], sink: NDArray[Any], weights: NDArray[Any]
) -> tuple[float, NDArray[np.bool_]]:
    """The same for pixels that are connected with their neighbours, in less memory and time.

    Args:
        source: capacity from the source to every pixel, [H, W].
        sink: from every pixel to the sink, [H, W].
        weights: of the links, [P, H, W]. P = 2: to the right and down, in both directions the same,
            4 neighbours; P = 4: also right down and left down, 8 neighbours. P = 8: one capacity
            for each direction: right, left, down, up, right down, left up, left down, right up.
            What leads out of the image counts nothing.

    Returns:
        The flow, and where pixels are on the source's side of the cut, [H, W].

    Raises:
        ValueError: shapes that do not fit, or capacities that are negative or not finite.
    """
    from_source, to_sink = _capacities("source", source, 2), _capacities("sink", sink, 2)
    links = _capacities("weights", weights, 3)
    if from_source.shape != to_sink.shape:
        raise ValueError(
            f"source and sink must be [H, W] both, got {list(from_source.shape)} and "
            f"{list(to_sink.shape)}"
        )
    if links.shape[0] not in (2, 4, 8) or links.shape[1:] != from_source.shape:
        raise ValueError(
            f"weights must be 2, 4 or 8 planes of {list(from_source.shape)}, got "
            f"{list(links.shape)}"
        )
    return _core.grid_max_flow(from_source, to_sink, links)


def _capacities(name: str, values: NDArray[Any], dimensions: int) -> NDArray[np.float64]:
    checked = np.ascontiguousarray(values, np.float64)
    if checked.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimensions, got {list(checked.shape)}")
    # The sum tells of NaN and infinity, in one pass.
    if checked.size and not (checked.min() >= 0 and np.isfinite(checked.sum())):
        raise ValueError(
            f"{name} must be finite and not negative, got {checked.min()} to {checked.max()}; for "
            "a link that must hold, take more than the sum of what leaves the node"
        )
    return checked


__all__ = ["grid_max_flow", "max_flow"]
