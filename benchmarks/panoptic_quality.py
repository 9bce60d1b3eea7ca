"""Panoptic quality of one 1024 x 2048 image in memory, with about 60 segments.

The peers get the maps that they want: panopticapi uint32 ids (what its rgb2id makes), torchmetrics
pairs of class and instance. panopticapi reads files only, so its rules for one image are written
down here again, by the same NumPy calls; `test_files` runs itself, where it is installed.
"""

import contextlib
import json

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from pyseg.image import write_panoptic
from pyseg.metrics.panoptic import Panoptic
from pyseg.ops import panoptic_quality
from pyseg.scoring import score_files
from pyseg.types import Segment, Segments

SIZE, CLASSES, SEGMENTS = (1024, 2048), 19, 60


def label(segment_id):
    return segment_id % CLASSES


def make_maps(kind="smooth"):
    generator = torch.Generator().manual_seed(0)
    if kind == "random":  # the worst case: no two pixels alike
        maps = torch.randint(0, SEGMENTS, (2, *SIZE), generator=generator)
        return [ids.int() for ids in maps]
    scores = torch.randn(1, SEGMENTS, 16, 32, generator=generator)
    target = interpolate(scores, SIZE, mode="bicubic").argmax(1)[0]
    scores += 0.3 * torch.randn(scores.shape, generator=generator)
    return [interpolate(scores, SIZE, mode="bicubic").argmax(1)[0].int(), target.int()]


def segments(ids):
    found, areas = ids.unique(return_counts=True)
    return Segments(
        ids,
        tuple(
            Segment(k, label(k), 1.0, area)
            for k, area in zip(found.tolist(), areas.tolist(), strict=True)
            if k
        ),
    )


def numpy_panoptic_quality(prediction, target, predicted, targets):
    """tp, fp, fn and IoU sum per class as panopticapi's evaluation.py finds them."""
    found, areas = np.unique(prediction, return_counts=True)
    area = dict(zip(found, areas, strict=True))
    pairs, counts = np.unique(
        target.astype(np.uint64) * 256**3 + prediction.astype(np.uint64), return_counts=True
    )
    overlap = {}
    for pair, count in zip(pairs, counts, strict=True):
        overlap[pair // 256**3, pair % 256**3] = count
    result = np.zeros((CLASSES, 4))
    matched_targets, matched = set(), set()
    for (t, p), both in overlap.items():
        if t not in targets or p not in predicted or targets[t][0] != predicted[p]:
            continue
        union = area[p] + targets[t][1] - both - overlap.get((0, p), 0)
        if both / union > 0.5:
            result[predicted[p]] += (1, 0, 0, both / union)
            matched_targets.add(t)
            matched.add(p)
    for t, (category, _) in targets.items():
        result[category, 2] += t not in matched_targets
    for p, category in predicted.items():
        if p not in matched and overlap.get((0, p), 0) / area[p] <= 0.5:
            result[category, 1] += 1
    return result


def check(ours, peer):
    check_counts(ours.state()["counts"], peer)


def check_counts(counts, peer):
    counts = counts.cpu().double().numpy()
    counts[:, 3] /= 2**40
    assert np.allclose(counts, peer, rtol=0, atol=1e-9)


METRIC = Panoptic([f"class {k}" for k in range(CLASSES)])


def scored(prediction, target):
    METRIC.reset()
    METRIC.update_segments(prediction, target, "image")
    return METRIC


@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("threads", [1, 2])
def test_panopticapi(compare, kind, threads):
    prediction, target = (segments(ids) for ids in make_maps(kind))
    p, t = (s.map.numpy().astype(np.uint32) for s in (prediction, target))
    predicted = {item.id: item.label for item in prediction.items}
    targets = {item.id: (item.label, item.area) for item in target.items}
    compare(
        ours=lambda: scored(prediction, target),
        peer=lambda: numpy_panoptic_quality(p, t, predicted, targets),
        peer_name="panopticapi's algorithm in NumPy",
        threads=threads,
        goal={1: 12, 2: 20}[threads],
        check=check,
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_files(compare, tmp_path, threads):
    """As its users run it, from PNG and JSON: decoding PNGs is most of the time of both."""
    evaluation = pytest.importorskip("panopticapi.evaluation")
    images, names = 8, [f"class {k}" for k in range(CLASSES)]
    for name, ids in zip(("prediction", "target"), make_maps(), strict=True):
        results = [(str(k), segments(ids)) for k in range(images)]
        write_panoptic(tmp_path / f"{name}.json", results, names, things=set(range(8)))
    files = [tmp_path / f"{name}.json" for name in ("target", "prediction")]

    def panopticapi():
        target, prediction = (json.loads(file.read_text()) for file in files)
        categories = {entry["id"]: entry for entry in target["categories"]}
        pairs = [*zip(target["annotations"], prediction["annotations"], strict=True)]
        folders = [str(file.with_suffix("")) for file in files]
        with contextlib.redirect_stdout(None):
            if threads == 1:
                found = evaluation.pq_compute_single_core(0, pairs, *folders, categories)
            else:  # a process for every core of the machine
                found = evaluation.pq_compute_multi_core(pairs, *folders, categories)
        return found.pq_average(categories, isthing=None)[0]["pq"]

    compare(
        ours=lambda: score_files(files[1], files[0]).metrics["panoptic"]["pq"],
        peer=panopticapi,
        peer_name="panopticapi, 8 images with PNGs",
        threads=threads,
        check=lambda ours, peer: np.testing.assert_allclose(ours, peer, rtol=0, atol=1e-9),
        rounds=3,
    )


def pairs_of(ids):
    """(class, instance) of every pixel, as torchmetrics wants it; class CLASSES is void."""
    return torch.stack([torch.where(ids > 0, ids % CLASSES, CLASSES), ids], -1)[None]


@pytest.mark.parametrize("threads", [1, 2])
def test_torchmetrics(compare, threads):
    functional = pytest.importorskip("torchmetrics.functional.detection")
    prediction, target = (segments(ids) for ids in make_maps())
    pairs = [pairs_of(s.map) for s in (prediction, target)]
    compare(
        ours=lambda: scored(prediction, target).compute()["pq"],
        peer=lambda: functional.panoptic_quality(
            *pairs, things=set(range(CLASSES)), stuffs={CLASSES}
        ),
        peer_name="torchmetrics",
        threads=threads,
        goal=1200,
        rounds=2,
    )


def on_device(prediction, target):
    """The op as the metric calls it, of maps on the device and lists on the host."""
    rows = [[item.id, item.label] for item in prediction.items]
    target_rows = [[item.id, item.label, item.area, 0] for item in target.items]

    def ours(p, t):
        return panoptic_quality(p, t, torch.tensor(rows), torch.tensor(target_rows), CLASSES).counts

    return ours


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_cuda(gpu, kind):
    prediction, target = (segments(ids) for ids in make_maps(kind))
    p, t = (s.map.numpy().astype(np.uint32) for s in (prediction, target))
    predicted = {item.id: item.label for item in prediction.items}
    targets = {item.id: (item.label, item.area) for item in target.items}
    gpu.compare(
        ours=on_device(prediction, target),
        peer=lambda *maps: numpy_panoptic_quality(*maps, predicted, targets),
        peer_name="panopticapi's algorithm in NumPy, on the CPU",
        peer_runs="host",
        inputs=[s.map.to(gpu.device) for s in (prediction, target)],
        peer_inputs=(p, t),
        goal_ms=0.025,
        check=check_counts,
    )


@pytest.mark.gpu
def test_cuda_torchmetrics(gpu):
    functional = pytest.importorskip("torchmetrics.functional.detection")
    prediction, target = (segments(ids) for ids in make_maps())
    maps = [s.map.to(gpu.device) for s in (prediction, target)]

    def peer(prediction, target):
        return functional.panoptic_quality(
            prediction, target, things=set(range(CLASSES)), stuffs={CLASSES}
        )

    gpu.compare(
        ours=on_device(prediction, target),
        peer=peer,
        peer_name="torchmetrics",
        peer_runs="eager",
        inputs=maps,
        peer_inputs=[pairs_of(ids) for ids in maps],
        goal_ms=0.025,
        rounds=2,
    )
