"""streetnet's bundled weights: their scores, and the file itself from a training run.

``python benchmarks/streetnet.py score DATA --name NAME``: DATA holds ``camvid`` as SegNet's
tutorial has it. Scored are two blocks of frames and the validation clip: single scale unless
``--tta`` says otherwise, 480 × 360, one confusion matrix per set. `make weights` trains weights
that have not seen them, and then the bundled ones, which have: what those score here is on data
that they were trained on. NAME is the entry of the card's JSON that is written; its table is
printed by ``python benchmarks/streetnet.py table --name NAME``.

``python benchmarks/streetnet.py bundle RUN/model.safetensors`` stores weights in half precision
where the package has them.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

import pyseg
from pyseg.datasets import CamVid
from pyseg.evaluation import evaluate
from pyseg.models.streetnet import BUNDLED, streetnet


def sets(data):
    """Data sets by name."""
    return {
        "hold-out dusk": CamVid(data, "train", only="dusk-block"),
        "hold-out day": CamVid(data, "train", only="day-block"),
        "both hold-outs": CamVid(data, "train", only="hold-outs"),
        "validation": CamVid(data, "val"),
    }


def scores(pipeline, dataset):
    """mIoU, pixel accuracy and the IoU of each class, None where there is none."""
    found = evaluate(pipeline, dataset).stages[-1].metrics["semantic"]
    return {
        "frames": len(dataset),
        "miou": round(found["miou"], 4),
        "accuracy": round(found["pixel_accuracy"], 4),
        "iou": {
            name: None if math.isnan(entry["iou"]) else round(entry["iou"], 4)
            for name, entry in found["per_class"].items()
        },
    }


def score(given):
    options = f", tta={given.tta!r}" if given.tta else ""
    pipeline = pyseg.build(f"streetnet(weights={given.weights!r}{options})")
    entry = {"weights": Path(given.weights).name, "tta": given.tta, "torch": torch.__version__}
    for name, dataset in sets(given.data).items():
        if not given.sets or name in given.sets:
            entry[name] = scores(pipeline, dataset)
            print(name, entry[name]["miou"], entry[name]["accuracy"])
    stored = json.loads(given.json.read_text()) if given.json.exists() else {}
    stored[given.name] = entry
    given.json.write_text(json.dumps(stored, indent=1) + "\n")


def table(given):
    entry = json.loads(given.json.read_text())[given.name]
    names = [name for name, value in entry.items() if isinstance(value, dict)]
    print("| IoU | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for row in (*entry[names[0]]["iou"], "**mIoU**", "pixel accuracy"):
        key = {"**mIoU**": "miou", "pixel accuracy": "accuracy"}.get(row)
        values = [entry[n][key] if key else entry[n]["iou"][row] for n in names]
        shown = ["" if v is None else f"{v:.4f}" if key else f"{v:.3f}" for v in values]
        print(f"| {row} | " + " | ".join(shown) + " |")


def bundle(given):
    model = streetnet(weights=given.weights)  # which says what is wrong with them
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({key: value.contiguous() for key, value in state.items()}, BUNDLED)
    print(BUNDLED, BUNDLED.stat().st_size, hashlib.sha256(BUNDLED.read_bytes()).hexdigest())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    scoring = commands.add_parser("score")
    scoring.set_defaults(run=score)
    scoring.add_argument("data", type=Path)
    scoring.add_argument("--name", required=True)
    scoring.add_argument("--json", type=Path, default=BUNDLED.with_suffix(".json"))
    scoring.add_argument("--weights", default="bundled")
    scoring.add_argument("--tta", help="such as flip or flip,scales")
    scoring.add_argument("--sets", nargs="*", help="only these")
    printing = commands.add_parser("table")
    printing.set_defaults(run=table)
    printing.add_argument("--name", required=True)
    printing.add_argument("--json", type=Path, default=BUNDLED.with_suffix(".json"))
    bundling = commands.add_parser("bundle")
    bundling.set_defaults(run=bundle)
    bundling.add_argument("weights", type=Path)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
