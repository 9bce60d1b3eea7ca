"""The scores of streetnet's card: ``python benchmarks/streetnet.py DATA --name NAME --json FILE``.

DATA holds ``camvid`` as SegNet's tutorial has it. Scored are two blocks of frames that no choice
and, by the recipe's hold-out form, no training has seen, and the validation clip; NAME is the entry
of FILE that is written. Single scale, 480 × 360, one confusion matrix per set.

The hold-out form of the recipe, whose weights ``--weights`` names (the bundled ones have seen all):

    pyseg train --config streetnet --root DATA -o runs/holdout --repeats 8,1,1 \
      --dataset "camvid(without='FRAMES')" --dataset "labelmefacade(split='train')" \
      --dataset "labelmefacade(split='test')"

with the patterns of both blocks, joined by a comma, for FRAMES.
"""

import argparse
import json
import math
from pathlib import Path

import torch

import pyseg
from pyseg.datasets import CamVid
from pyseg.evaluation import evaluate

BLOCKS = {
    "dusk": "0001TP_007[4-6]*,0001TP_0077[0-4]*",
    "day": "0006R0_f033[6-9]*,0006R0_f03[4-8]*,0006R0_f039[0-3]*",
}


def sets(data):
    """Data sets by name."""
    return {
        "hold-out dusk": CamVid(data, "train", only=BLOCKS["dusk"]),
        "hold-out day": CamVid(data, "train", only=BLOCKS["day"]),
        "both hold-outs": CamVid(data, "train", only=",".join(BLOCKS.values())),
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--weights", default="bundled")
    parser.add_argument("--tta", help="such as flip or flip,scales")
    parser.add_argument("--sets", nargs="*", help="only these")
    given = parser.parse_args()
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


if __name__ == "__main__":
    main()
