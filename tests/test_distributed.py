"""`evaluate` by two processes, which share out the images, against one."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import pyseg
from pyseg import cli, models
from pyseg.image import read_image, read_labels, write_image, write_labels
from pyseg.models.streetnet import CLASSES

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(pyseg.__file__).parent / "assets"
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch is built without gloo",
)


def run(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def alone(*arguments):
    """What a command prints, run in this process, with one thread as torchrun gives to each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)
    finally:
        torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    return result.stdout


def scores(rows):
    """What must not depend on the processes: everything but time and memory."""
    return [{key: row[key] for key in ("stage", "images", "metrics", "delta")} for row in rows]


def test_torchrun_gives_the_numbers_of_one_process(tmp_path):
    """Five images by two processes: one has a third image, the other none to pad it with."""
    image, labels = read_image(ASSETS / "street.jpg"), read_labels(ASSETS / "street_labels.png")
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for k in range(5):
        part = slice(40 * k, 40 * k + 100 + 7 * k), slice(60 * k, 60 * k + 120)
        write_image(tmp_path / "data" / "images" / f"{k}.png", image[:, part[0], part[1]])
        write_labels(tmp_path / "data" / "labels" / f"{k}.png", labels[part])
    (tmp_path / "data" / "classes.txt").write_text("\n".join(CLASSES))
    command = (
        "-m",
        "pyseg",
        "evaluate",
        "--spec",
        "streetnet+crf(iterations=2)",
        "--dataset",
        "folder",
        "--root",
        tmp_path / "data",
        "--metric",
        "semantic",
        "--metric",
        "calibration",
        "--json",
        "--report",
    )
    one = json.loads(alone(*command[2:], tmp_path / "one"))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = json.loads(run(*launcher, *command, tmp_path / "two"))  # printed once, or it is no JSON
    assert scores(one) == scores(two) and one[0]["images"] == 5
    assert all(row["milliseconds"] > 0 for row in two)
    pages = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    for key in ("confusion", "worst_images", "images"):
        assert pages[0][key] == pages[1][key]
    assert len(pages[1]["worst_images"]) == 5
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == [
        "index.html",
        "report.json",
    ]


SCRIPT = """
import json, os, sys
import torch
from accelerate import PartialState
from pyseg import evaluation, models, pipeline, processes
from pyseg.types import Instances, Sample, Segmentation

CLASSES = ("ground", "thing")

def objects(generator, size):
    masks = torch.zeros(3, *size, dtype=torch.bool)
    for mask in masks:
        y, x = (int(torch.randint(0, side - 10, (), generator=generator)) for side in size)
        mask[y : y + 10, x : x + 9] = True
    boxes = []
    for mask in masks:
        y, x = mask.nonzero().T
        boxes.append([int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1])
    scores = torch.randint(0, 4, (3,), generator=generator) / 4  # with ties between images
    return Instances(torch.tensor(boxes).float(), masks, scores, torch.tensor([1, 0, 1]))

@models.register("drawn")
class Drawn:
    def __init__(self, *, num_classes: int | None = None, weights: str | None = None):
        self.classes = CLASSES

    def predict(self, images):
        def one(image):
            generator = torch.Generator().manual_seed(int(image[0, 0, 0]))
            size = tuple(image.shape[1:])
            logits = torch.randn(2, *size, generator=generator)
            return Segmentation(size, CLASSES, logits=logits, instances=objects(generator, size))
        return [one(image) for image in images]

class Data:
    classes, palette = CLASSES, ((0, 0, 0), (255, 0, 0))

    def __len__(self):
        return 3

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        size = (30 + index, 40)
        labels = torch.randint(0, 2, size, generator=generator, dtype=torch.uint8)
        truth = objects(torch.Generator().manual_seed(index), size)
        return Sample(f"s{index}", torch.full((3, *size), index, dtype=torch.uint8), labels,
                      instances=truth)

names = json.loads(sys.argv[1])
if "WORLD_SIZE" in os.environ:
    PartialState(cpu=True)
rank, count = processes.rank_and_count()
result = evaluation.evaluate(pipeline.build("drawn", weights=None), Data(), names)
assert result.is_main_process == (rank == 0)
with open(f"{sys.argv[2]}-{rank}-of-{count}.json", "w") as file:
    json.dump(result.to_list(), file)
processes.leave()
"""


def test_accelerate_launch_gathers_sums_and_records(tmp_path, monkeypatch):
    names = ["semantic", "binary", "calibration", "instances"]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", [str(script), json.dumps(names), str(tmp_path / "scores")])
    monkeypatch.setattr(models._registry, "_registered", dict(models._registry._registered))
    runpy.run_path(str(script))
    # --multi_gpu is its way to several processes; --cpu starts them by MPI only.
    run(
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        script,
        json.dumps(names),
        tmp_path / "scores",
    )
    one, *two = (
        scores(json.loads((tmp_path / f"scores-{name}.json").read_text()))
        for name in ("0-of-1", "0-of-2", "1-of-2")
    )
    assert two == [one, one]  # every process has the whole
    assert set(one[0]["metrics"]) == set(names) and one[0]["images"] == 3
