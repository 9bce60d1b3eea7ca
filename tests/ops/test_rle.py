"""Runs as texts and edges against masks of pixels and pycocotools."""

import numpy as np
import pytest
import torch

from pyseg.formats import decode_rle, edges_of, encode_rle
from pyseg.formats.rle import _edges, _runs
from pyseg.ops.rle import run_overlaps

coco = pytest.importorskip("pycocotools.mask")


def masks_of(rng, count, size):
    share = rng.random((count, 1, 1)) ** 2
    made = rng.random((count, *size)) < share
    return made if rng.random() < 0.5 else np.sort(made, 1)


def from_edges(edges, size):
    flat = np.zeros(size[0] * size[1] + 1, np.int64)
    np.add.at(flat, edges[::2], 1)
    np.add.at(flat, edges[1::2], -1)
    return flat.cumsum()[:-1].reshape(size[::-1]).T.astype(bool)


def test_edges_are_those_of_the_pixels():
    rng = np.random.default_rng()
    for _ in range(60):
        size = tuple(int(side) for side in rng.integers(1, 40, 2))
        masks = masks_of(rng, int(rng.integers(0, 9)), size)
        rles = [encode_rle(mask) for mask in masks]
        theirs = [coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
        for texts in (rles, theirs):
            edges, counts = edges_of(texts)
            ends = counts.cumsum()
            for mask, begin, end in zip(masks, ends - counts, ends, strict=True):
                assert np.all(np.diff(edges[begin:end]) > 0)
                assert np.array_equal(from_edges(edges[begin:end], size), mask)


def text(numbers):
    """Any numbers as COCO's text, sane or not."""
    codes = ""
    for number in numbers:
        while True:
            digit, number = number & 31, number >> 5
            done = number == (-1 if digit & 16 else 0)
            codes += chr(48 + (digit | (0 if done else 32)))
            if done:
                break
    return codes


def test_texts_that_no_encoder_writes():
    """Empty runs, damaged texts: as the slow way has it, which looks at one by itself."""
    rng = np.random.default_rng()
    whole = 0
    for _ in range(3000):
        runs = rng.integers(0, 4, int(rng.integers(1, 9)))
        height, width = int(runs.sum()), 1
        numbers = [int(n) for n in runs]
        numbers[3:] = [int(a - b) for a, b in zip(runs[3:], runs[1:-2], strict=True)]
        if rng.random() < 0.3:
            numbers[int(rng.integers(len(numbers)))] += int(
                rng.choice([-9, -1, 1, 2**40, -(2**59)])
            )
        counts = text(numbers)
        if rng.random() < 0.2:
            counts = counts[:-1] + chr(int(rng.integers(40, 120)))
        rle = {"size": [height, width], "counts": counts}
        try:
            found = _runs(rle)[2]
        except ValueError as error:
            with pytest.raises(type(error)):
                edges_of([rle])
            continue
        edges, sizes = edges_of([rle, rle])
        expected = _edges(found, np.array([len(found)]))[0]
        assert sizes.tolist() == [len(expected)] * 2
        assert np.array_equal(edges, np.tile(expected, 2))
        assert np.array_equal(from_edges(expected, (height, width)), decode_rle(rle).numpy())
        whole += 1
    assert whole > 1000


@pytest.mark.parametrize("threads", [1, 2])
def test_overlaps_are_those_of_the_pixels(threads):
    rng, before = np.random.default_rng(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            size = tuple(int(side) for side in rng.integers(1, 40, 2))
            sides = [masks_of(rng, int(rng.integers(1, 30)), size) for _ in range(2)]
            edges = [edges_of([encode_rle(mask) for mask in masks]) for masks in sides]
            pairs = [rng.integers(0, len(masks), 500) for masks in sides]
            expected = (sides[0][pairs[0]] & sides[1][pairs[1]]).sum((1, 2))
            assert np.array_equal(run_overlaps(*edges, tuple(pairs)), expected)
    finally:
        torch.set_num_threads(before)


def test_what_is_refused():
    edges, counts = np.array([0, 4, 6, 9]), np.array([2, 2])
    for wrong, words in (
        (((edges, counts), (edges, counts), (np.array([2]), np.array([0]))), "names mask 2 of 2"),
        (((edges, counts), (edges, counts), (np.array([0]), np.array([-1]))), "names mask -1"),
        (((edges, np.array([3, 1])), (edges, counts), (counts, counts)), "as many ends"),
        (((edges, np.array([2])), (edges, counts), (counts, counts)), "must end at 4, got 2"),
        (((edges, np.array([6, -2])), (edges, counts), (counts, counts)), "must rise"),
        (((edges, counts), (edges, counts), (np.array([0]), np.array([0, 1]))), "must be pairs"),
    ):
        with pytest.raises(ValueError, match=words):
            run_overlaps(*wrong)
    one, none = torch.ones(1, dtype=torch.int64), torch.zeros(0, dtype=torch.uint8)
    for arguments in ((none, one, one), (none.int(), one[:0], one[:0]), (none, one * 0, -one)):
        with pytest.raises(ValueError, match="must"):
            torch.ops.pyseg._rle_edges(*arguments)
