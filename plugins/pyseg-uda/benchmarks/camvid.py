"""Day to dusk on CamVid: every method from the same start, for the same number of steps.

    python benchmarks/camvid.py run CAMVID --seeds 0,1,2 --work runs/     # goes on where it stopped
    python benchmarks/camvid.py table

Sources are the labelled drives 0006R0 and 0016E5 of the train split, by day. Of 0001TP, at dusk,
the first half is the target, without labels, and the second half the test: the same clip. A network
is first trained on the source ("source only"); each row goes on from there by ``STEPS`` steps. The
settings were fixed before any score of dusk was seen, but for steps and decay: see the README.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from pyseg_uda import adapt
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

import pyseg
from pyseg.datasets import CamVid
from pyseg.files import finite, read_json, write_json
from pyseg.types import Sample

RESULTS = Path(__file__).with_suffix(".json")
SIZE = (180, 240)  # of the images, half of what they are
NETWORKS: dict[str, dict[str, Any]] = {
    "streetnet": {"weights": "imagenet", "first": 600, "rate": 1e-3},
    "segformer_b0": {"weights": None, "first": 800, "rate": 5e-4},
}
STEPS = 200
VIEWS = {"crop_size": (96, 128), "scale": (0.75, 1.25), "batch_size": 2, "rates": None}
TEACHER = {"decay": 0.99, "threshold": 0.9}  # of a run of 200 steps, where the authors' has 40,000
ROWS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "streetnet": [
        ("control", {"method": "source"}),
        ("self-training", {"method": "self-training"}),
        ("oracle", {"method": "source", "oracle": True}),
        ("mean", {"method": "source", "align": "mean"}),
        ("covariance", {"method": "source", "align": "covariance"}),
        ("fourier", {"method": "source", "align": "fourier"}),
        ("self-training, features", {"method": "self-training", "imagenet": True}),
    ],
    "segformer_b0": [
        ("control", {"method": "source"}),
        ("self-training", {"method": "self-training"}),
        ("attention", {"method": "attention"}),
        ("oracle", {"method": "source", "oracle": True}),
    ],
}
TITLES = {
    "source only": "source only, the start",
    "control": "as many steps on the source",
    "mean": "the same in the target's mean and deviation of channels",
    "covariance": "the same in its covariances",
    "fourier": "the same in its low frequencies (FDA)",
    "self-training": "self-training (DAFormer's)",
    "self-training, features": "self-training with ImageNet's feature distance",
    "attention": "self-training with attention consistency",
    "oracle": "as many steps on the target's labels",
}


class Half:
    """A part of a data set in memory, at `SIZE`."""

    def __init__(self, parts: list[tuple[Any, range]]) -> None:
        self.classes, self.palette = parts[0][0].classes, parts[0][0].palette
        self.samples = [self.small(data[k]) for data, chosen in parts for k in chosen]

    @staticmethod
    def small(sample: Sample) -> Sample:
        assert sample.labels is not None
        labels = F.interpolate(sample.labels[None, None], SIZE, mode="nearest-exact")[0, 0]
        return Sample(sample.name, V.resize(sample.image, list(SIZE), antialias=True), labels)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def data_of(root: Path) -> dict[str, Half]:
    day, dusk = CamVid(root, "train", drives="day"), CamVid(root, "train", drives="dusk")
    clip = CamVid(root, "val")
    half = len(dusk) // 2
    return {
        "source": Half([(day, range(len(day)))]),
        "target": Half([(dusk, range(half))]),
        "dusk": Half([(dusk, range(half, len(dusk)))]),
        "day": Half([(clip, range(0, len(clip), 5))]),
    }


def score(model: Any, data: Half) -> dict[str, Any]:
    metric = pyseg.metrics.create("semantic", classes=data.classes)
    for sample in data.samples:
        metric.update(model.predict([sample.image])[0], sample)
    found = metric.compute()
    iou = {name: finite(round(entry["iou"], 4)) for name, entry in found["per_class"].items()}
    return {
        "miou": round(found["miou"], 4),
        "accuracy": round(found["pixel_accuracy"], 4),
        "iou": iou,
    }


def network(name: str, weights: Any) -> Any:
    return pyseg.models.create(name, num_classes=11, weights=weights)


def run(root: Path, seeds: list[int], networks: list[str], work: Path) -> None:
    data = data_of(root)
    for seed in seeds:
        for name in networks:
            settings = NETWORKS[name]
            folder = work / f"{name}-{seed}"
            rows = [("source only", {"method": "source"}), *ROWS[name]]
            for row, options in rows:
                start = folder / "source only" / "model.safetensors"
                known = any(key_of(r) == (name, row, seed) for r in results())
                if known and (row != "source only" or start.exists()):
                    continue
                first = row == "source only"
                torch.manual_seed(seed)
                model = network(name, settings["weights"] if first else start)
                options = dict(options)
                if options.pop("imagenet", False):
                    options["imagenet"] = network(name, settings["weights"])
                oracle = options.pop("oracle", False)
                steps = settings["first"] if first else STEPS
                begin = time.process_time()
                output = folder / row
                log = adapt(
                    model,
                    data["target" if oracle else "source"],
                    None if first or oracle else data["target"],
                    output_dir=output,
                    epochs=1,
                    steps=steps,
                    learning_rate=settings["rate"] * (1 if first else 0.4),
                    schedule="linear",
                    resume=(output / ".lock").exists(),
                    seed=seed,
                    **options,
                    **VIEWS,
                    **TEACHER,
                )
                entry = {
                    "network": name,
                    "row": row,
                    "seed": seed,
                    "steps": steps,
                    "cpu_seconds": round(time.process_time() - begin, 1),
                    "confidence": log[-1].get("confidence"),
                    "dusk": score(model, data["dusk"]),
                    "day": score(model, data["day"]),
                }
                others = [r for r in results() if key_of(r) != (name, row, seed)]
                write_json(RESULTS, [*others, entry])
                print(name, row, seed, entry["dusk"]["miou"], entry["cpu_seconds"], flush=True)


def results() -> list[dict[str, Any]]:
    return read_json(RESULTS) if RESULTS.exists() else []


def key_of(entry: dict[str, Any]) -> tuple[str, str, int]:
    return entry["network"], entry["row"], entry["seed"]


def table() -> str:
    done = results()
    lines = ["| network | training | steps | dusk mIoU | dusk accuracy | day mIoU | seeds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in NETWORKS:
        for row in TITLES:
            runs = [r for r in done if (r["network"], r["row"]) == (name, row)]
            if not runs:
                continue
            numbers = [
                spread([r[light][key] for r in runs])
                for light, key in (("dusk", "miou"), ("dusk", "accuracy"), ("day", "miou"))
            ]
            seeds = ", ".join(str(r["seed"]) for r in runs)
            cells = [f"`{name}`", TITLES[row], str(runs[0]["steps"]), *numbers, seeds]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("root", type=Path)
    runs.add_argument("--seeds", default="0")
    runs.add_argument("--networks", default=",".join(NETWORKS))
    runs.add_argument("--work", type=Path, required=True)
    commands.add_parser("table")
    given = parser.parse_args()
    if given.command == "table":
        print(table())
    else:
        seeds = [int(seed) for seed in given.seeds.split(",")]
        run(given.root, seeds, given.networks.split(","), given.work)
