"""Streetnets of which each has seen nothing of one of CamVid's drives: ``results/drives.json``.

    python benchmarks/drives.py ../shared/data/camvid WEIGHTS
    python benchmarks/drives.py ../shared/data/camvid WEIGHTS --longer

writes to the folder WEIGHTS, for every seed, a network for each of the three drives of CamVid's
training frames, trained on the frames of the other two. None has seen the validation clip, which is
of the drive 0016E5: so that clip is of an unseen drive behind the weights without 0016E5 alone.
``--longer`` goes on from each of these networks for as many steps again: the control for what a
refiner gains. A run that was stopped goes on, and the JSON is written after each network.

The budget is a minute of a processor, the same for all, with ImageNet's trunk as it is. So the
tables that these weights are for, of docs/sam.md and docs/refiners.md, tell what refiners do behind
networks that err on drives that they do not know, not how good streetnet can be.
"""

import argparse
import hashlib
import shutil
import time
from pathlib import Path

import torch

import pyseg
from pyseg.datasets.camvid import CamVid
from pyseg.files import read_json, replacing, write_json
from pyseg.training import train

OUTPUT = Path(__file__).parent / "results" / "drives.json"
DRIVES = ("0001TP", "0006R0", "0016E5")
FOLDS = (*DRIVES, "validation")  # what is scored
SEEDS = (0, 1, 2)
EPOCHS = 4
RECIPE = {
    "steps": 80,
    "batch_size": 2,
    "crop_size": (192, 256),
    "scale": (0.6, 1.6),
    "full_size": 0,
    "class_crops": 0.8,
    "class_weights": 0.6,
    "rates": {"backbone": 0},
    "learning_rate": 3e-3,
    "weight_decay": 0.03,
    "clip": 5,
    "loss": "ce+0.5*ohem(share=0.25)+jaccard",
    "ema": 0.98,
}


def weights_of(folder, fold, seed, longer=False):
    """The file of the network that has seen nothing of a fold."""
    drive = DRIVES[-1] if fold == "validation" else fold
    return folder / f"without_{drive}_{seed}{'_longer' if longer else ''}.safetensors"


def frames_of(root, fold, count):
    """``count`` samples of a fold, evenly spread."""
    whole = CamVid(root, "val") if fold == "validation" else CamVid(root, "train", only=f"{fold}_*")
    return [whole[k * len(whole) // count] for k in range(count)]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def make(root, folder, drive, seed, longer):
    """Trains a network, or goes on from it for as long again; the log's last entry."""
    run = folder / "runs" / f"{drive}_{seed}"
    begun = time.process_time()
    log = train(
        pyseg.models.create("streetnet", weights="imagenet"),
        CamVid(root, "train", without=f"{drive}_*"),
        output_dir=run,
        epochs=EPOCHS * (1 + longer),
        resume=(run / "checkpoint.pt").exists(),
        seed=seed,
        progress=False,
        **RECIPE,
    )
    path = weights_of(folder, drive, seed, longer)
    with replacing(path) as draft:
        shutil.copy(run / "model.safetensors", draft)
    entry = {"without": drive, "seed": seed, "longer": longer}
    entry |= {"steps": len(log) * RECIPE["steps"], "loss": round(log[-1]["loss"], 4)}
    seconds = round(time.process_time() - begun)
    return {**entry, "seconds": seconds, "sha256": digest(path)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder of CamVid")
    parser.add_argument("weights", type=Path, help="folder for the weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--drives", nargs="+", default=DRIVES)
    parser.add_argument("--longer", action="store_true", help="go on for as many steps again")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.weights.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for drive in given.drives:
            if weights_of(given.weights, drive, seed, given.longer).exists():
                continue
            if given.longer and not weights_of(given.weights, drive, seed).exists():
                parser.error(f"--longer goes on from {weights_of(given.weights, drive, seed)}")
            entry = make(given.root, given.weights, drive, seed, given.longer)
            print(entry, flush=True)
            stored = read_json(OUTPUT)["networks"] if OUTPUT.exists() else []
            same = {key: entry[key] for key in ("without", "seed", "longer")}
            kept = [one for one in stored if not same.items() <= one.items()]
            command = "python benchmarks/drives.py CAMVID WEIGHTS [--longer]"
            networks = sorted([*kept, entry], key=lambda e: (e["longer"], e["seed"], e["without"]))
            write_json(OUTPUT, {"command": command, "recipe": RECIPE, "networks": networks})


if __name__ == "__main__":
    main()
