"""`pyseg score` and the metrics behind it against hotcoco, which is Rust: from files and in memory.

20 images of 1024 x 2048 with about 60 smooth segments, as PNG and JSON and as label maps, and COCO
instances of 100 images of 480 x 640 with 36 detections each. hotcoco takes its number of threads
once, so it runs in a process of its own for each; both are called once before they are timed, and
their numbers must agree.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from pyseg.formats import encode_rle
from pyseg.image import write_labels
from pyseg.metrics import Semantic
from pyseg.scoring import score_files

SIZE, CLASSES, SEGMENTS, IMAGES = (1024, 2048), 19, 60, 20
NAMES = [f"class {k}" for k in range(CLASSES)]
PEER = "hotcoco"

SERVER = """
import json, sys
import numpy as np
import hotcoco
from hotcoco import panoptic, semantic
from hotcoco import COCO, COCOeval
out, sys.stdout = sys.stdout, sys.stderr
arrays = {}

def panoptic_files(truth, guess):
    evaluation = panoptic.PanopticEval(truth, guess)
    evaluation.evaluate()
    return evaluation.results()["All"]["pq"]

def semantic_files(truth, guess):
    evaluation = semantic.SemanticEval(19)
    evaluation.update_folders(truth, guess)
    return evaluation.results()["mIoU"]

def semantic_arrays(file):
    if file not in arrays:
        arrays[file] = [np.ascontiguousarray(side) for side in np.load(file)]
    evaluation = semantic.SemanticEval(19)
    evaluation.update(*arrays[file])
    return evaluation.confusion().tolist()

def instances(truth, found, kind):
    truth = COCO(truth)
    evaluation = COCOeval(truth, truth.load_res(found), kind)
    evaluation.evaluate(); evaluation.accumulate(); evaluation.summarize()
    return list(evaluation.stats)

for line in sys.stdin:
    name, *arguments = json.loads(line)
    print(json.dumps(globals()[name](*arguments)), file=out, flush=True)
"""


class Hotcoco:
    """hotcoco with so many threads."""

    def __init__(self, threads):
        environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, *request):
        self.process.stdin.write(json.dumps([str(word) for word in request]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module", params=[1, 2])
def hotcoco(request):
    pytest.importorskip("hotcoco")
    server = Hotcoco(request.param)
    yield server, request.param
    server.close()


def smooth(count, generator):
    """A ground truth and a prediction of it, each [H, W] of ``count`` values."""
    scores = torch.randn(1, count, 16, 32, generator=generator)
    target = interpolate(scores, SIZE, mode="bicubic").argmax(1)[0]
    scores += 0.3 * torch.randn(scores.shape, generator=generator)
    return target.int(), interpolate(scores, SIZE, mode="bicubic").argmax(1)[0].int()


def save_panoptic(root, name, maps):
    """As `pyseg.formats.write_panoptic` does, each of a few maps written once and copied."""
    (root / name).mkdir()
    annotations = []
    for k in range(IMAGES):
        ids = maps[k % len(maps)].numpy()
        file = root / name / f"{k}.png"
        if k < len(maps):
            rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
            Image.fromarray(rgb).save(file)
        else:
            shutil.copy(root / name / f"{k % len(maps)}.png", file)
        areas = np.bincount(ids.ravel()).tolist()
        info = [
            {"id": n, "category_id": n % CLASSES, "area": area, "iscrowd": 0}
            for n, area in enumerate(areas)
            if n and area
        ]
        annotations.append({"image_id": k, "file_name": file.name, "segments_info": info})
    categories = [{"id": k, "name": n, "isthing": int(k < 8)} for k, n in enumerate(NAMES)]
    images = [{"id": k, "file_name": f"{k}.png"} for k in range(IMAGES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A truth and a guess of each kind; 4 different pairs, 5 times each."""
    root = tmp_path_factory.mktemp("scoring")
    generator = torch.Generator().manual_seed(0)
    pairs = [smooth(SEGMENTS, generator) for _ in range(4)]
    for side, name in enumerate(("truth", "guess")):
        maps = [pair[side] for pair in pairs]
        save_panoptic(root, name, maps)
        for kind, write in (("indexed", write_labels), ("grey", write_grey)):
            (root / kind / name).mkdir(parents=True)
            for k in range(IMAGES):
                write(root / kind / name / f"{k}.png", (maps[k % 4] % CLASSES).to(torch.uint8))
    return root


def write_grey(path, labels):
    Image.fromarray(labels.numpy()).save(path)


def close(ours, peer):
    np.testing.assert_allclose(ours, peer, rtol=0, atol=1e-9)


def test_panoptic_files(compare, files, hotcoco):
    server, threads = hotcoco
    sides = files / "truth.json", files / "guess.json"
    compare(
        ours=lambda: score_files(*sides[::-1]).metrics["panoptic"]["pq"],
        peer=lambda: server("panoptic_files", *sides),
        peer_name=PEER,
        threads=threads,
        goal=1.5,
        check=close,
        rounds=5,
        levels=False,
    )


@pytest.mark.parametrize("kind", ["indexed", "grey"])
def test_semantic_files(compare, files, hotcoco, kind):
    """Indexed as pyseg and VOC write them, grey as Cityscapes' are."""
    server, threads = hotcoco
    sides = files / kind / "truth", files / kind / "guess"
    compare(
        ours=lambda: score_files(*sides[::-1], classes=CLASSES).metrics["semantic"]["miou"],
        peer=lambda: server("semantic_files", *sides),
        peer_name=PEER,
        threads=threads,
        goal=1.5,
        check=close,
        rounds=7,
        levels=False,
    )


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_confusion_matrix(compare, tmp_path, hotcoco, dtype):
    server, threads = hotcoco
    target, guess = (
        (side % CLASSES).numpy().astype(dtype)
        for side in smooth(SEGMENTS, torch.Generator().manual_seed(0))
    )
    np.save(tmp_path / "maps.npy", np.stack([target, guess]))
    metric = Semantic(CLASSES)

    def ours():
        metric.reset()
        metric.update_labels(guess, target)
        return metric.state()["matrix"].numpy()

    compare(
        ours=ours,
        peer=lambda: server("semantic_arrays", tmp_path / "maps.npy"),
        peer_name=f"{PEER}, in memory",
        threads=threads,
        goal=4,
        check=close,
        rounds=15,
    )


def ellipse(generator, size, side):
    y, x = np.mgrid[: size[0], : size[1]]
    cy, cx = generator.integers(0, size[0]), generator.integers(0, size[1])
    ry, rx = generator.integers(6, side, 2)
    wave = 1 + 0.1 * np.sin(8 * np.arctan2(y - cy, x - cx))
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= wave


@pytest.fixture(scope="module")
def instances(tmp_path_factory):
    root, generator = tmp_path_factory.mktemp("instances"), np.random.default_rng(0)
    size = (480, 640)
    truth = {"images": [], "annotations": [], "categories": []}
    truth["categories"] = [{"id": k, "name": f"class {k}"} for k in range(1, 4)]
    results = []
    for image in range(100):
        truth["images"].append({"id": image, "height": size[0], "width": size[1]})
        for _ in range(18):
            mask = ellipse(generator, size, int(generator.choice([16, 40, 110])))
            label = int(generator.integers(1, 4))
            entry = {"image_id": image, "category_id": label, "segmentation": encode_rle(mask)}
            number = len(truth["annotations"]) + 1
            more = {"id": number, "area": int(mask.sum()), "iscrowd": 0, "bbox": box_of(mask)}
            truth["annotations"].append({**entry, **more})
            for _ in range(2):
                moved = np.roll(mask, generator.integers(-4, 5, 2), (0, 1))
                score = round(float(generator.random()), 4)
                results.append({**entry, "segmentation": encode_rle(moved), "score": score})
    (root / "truth.json").write_text(json.dumps(truth))
    (root / "results.json").write_text(json.dumps(results))
    return root / "truth.json", root / "results.json"


def box_of(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]


ORDER = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


@pytest.mark.parametrize("kind", ["mask", "box", "boundary"])
def test_instances(compare, instances, hotcoco, kind):
    server, threads = hotcoco
    metric = f"instances(kinds=('{kind}',))"
    name = {"mask": "segm", "box": "bbox", "boundary": "segm"}[kind]

    def ours():
        found = score_files(*instances[::-1], metrics=[metric]).metrics[metric]
        return [found[f"{kind}_{key}"] for key in ORDER]

    compare(
        ours=ours,
        peer=lambda: server("instances", *instances, name)[:6],
        peer_name=PEER
        if kind != "boundary"
        else f"{PEER}'s AP of masks: it has none of boundaries",
        threads=threads,
        goal=1 if kind != "boundary" else None,
        check=close if kind != "boundary" else None,
        rounds=5,
        levels=False,
    )
