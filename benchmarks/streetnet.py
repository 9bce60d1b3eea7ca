"""streetnet's bundled weights: their scores, and the file itself from a training run.

``python benchmarks/streetnet.py score DATA --name NAME``: DATA holds ``camvid`` as SegNet's
tutorial has it. Scored are two blocks of frames and the validation clip: single scale unless
``--tta`` says otherwise, 480 × 360, one confusion matrix per set. `make weights` trains weights
that have not seen them, and then the bundled ones, which have: what those score here is on data
that they were trained on. NAME is the entry of the card's JSON that is written.

``python benchmarks/streetnet.py study DATA RUNS``: what the weights that kept frames out owe to
what. A row of the study is the training of these weights with one ingredient changed, a fold
(``--drives``) is such a training that keeps a whole drive of CamVid out instead; the results go to
``results/streetnet.json``. Two processes with a thread each on a CPU, one process on a GPU. A row
takes an hour of two busy cores, or a quarter of that by ``--share 0.25``; a run that is stopped
goes on.

``python benchmarks/streetnet.py table`` writes the card's tables from both.

``python benchmarks/streetnet.py bundle RUN/model.safetensors`` stores weights in half precision
where the package has them, with the temperature that `benchmarks/temperature.py` has found, and
their digest in the card.
"""

import argparse
import itertools
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pages
import torch
import yaml
from drives import DRIVES
from temperature import OUTPUT as TEMPERATURE

import pyseg
from pyseg.datasets import CamVid
from pyseg.evaluation import evaluate
from pyseg.files import read_json, write_json
from pyseg.models.streetnet import BUNDLED, streetnet
from pyseg.training import recipes
from pyseg.weights import temperature_metadata

PAGE = BUNDLED.with_suffix(".md")
SCRIPT = "benchmarks/streetnet.py"
OUTPUT = Path(__file__).parent / "results" / "streetnet.json"
SCORED = {"kept_out": "hold-outs kept out", "bundled": "bundled"}  # of the card's own JSON

# Behind the first part, the last one for weights that are scored: shorter, as they are half-way
# of what the bundled ones see.
HOLDOUT = {
    "dataset": ["camvid(split='train', without='hold-outs')"],
    "epochs": 4,
    "learning_rate": 5e-4,
    "ema": 0.99,
    "scale": "0.75-1.35",
}
FIRST = ("weights", "dataset", "repeats", "aliases")  # what a row changes in the first part alone
SCORED_PARTS = {  # without the hold-outs; most rows have the first of them only
    "both parts": "",
    "both parts, tta": ", flip and scales at test time",
    "first part": ", without the last part",
}
TTA = "flip,scales"
TWICE = "first part twice"  # from ImageNet's weights, then from its own, on other crops
ROWS = {
    "recipe": {},
    TWICE: {},
    "random weights, not ImageNet's": {"weights": "none"},
    "LabelMeFacade as well, as many crops": {  # a third of the first part's crops
        "dataset": [
            *HOLDOUT["dataset"],
            "labelmefacade(split='train')",
            "labelmefacade(split='test')",
        ],
        "repeats": [6, 1, 1],
        "aliases": {
            "building": "Building",
            "window": "Building",
            "door": "Building",
            "car": "Car",
            "pavement": "Pavement",
            "road": "Road",
            "sky": "Sky",
            "vegetation": "Tree",
        },
    },
    "trunk at the full rate": {"rates": {"backbone": 1}},
    "cross-entropy alone": {"loss": "ce"},
    "no OHEM": {"loss": "ce+jaccard"},
    "classes not balanced": {"class_crops": 0.0, "class_weights": 0},
    "zoom 0.8 to 1.25": {"scale": "0.8-1.25"},
    "light as it is": {"photometric": 0.0},
    "weights not averaged": {"ema": 0.0},
    "classes of other images pasted in": {"class_mix": 0.5},
}


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


def built(weights, tta=None):
    options = f", tta={tta!r}" if tta else ""
    return pyseg.build(f"streetnet(weights={str(weights)!r}{options})")


def score(given):
    pipeline = built(given.weights, given.tta)
    entry = {"weights": Path(given.weights).name, "tta": given.tta, "torch": torch.__version__}
    for name, dataset in sets(given.data).items():
        if not given.sets or name in given.sets:
            entry[name] = scores(pipeline, dataset)
            print(name, entry[name]["miou"], entry[name]["accuracy"])
    stored = read_json(given.json) if given.json.exists() else {}
    write_json(given.json, {**stored, given.name: entry})


def score_table(entry):
    """IoU of each class on each set."""
    names = [name for name, value in entry.items() if isinstance(value, dict)]
    yield "| IoU | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for row in (*entry[names[0]]["iou"], "**mIoU**", "pixel accuracy"):
        key = {"**mIoU**": "miou", "pixel accuracy": "accuracy"}.get(row)
        values = [entry[n][key] if key else entry[n]["iou"][row] for n in names]
        shown = ["" if v is None else f"{v:.4f}" if key else f"{v:.3f}" for v in values]
        yield f"| {row} | " + " | ".join(shown) + " |"


def shortened(options, share, changes):
    """A recipe's options with ``changes`` (None = dropped) and a share of its epochs."""
    epochs = max(1, round(share * options["epochs"]))
    return {k: v for k, v in {**options, **changes, "epochs": epochs}.items() if v is not None}


def options_of(row, share, without="hold-outs"):
    """The options of both parts of a row, for frames without those of the pattern ``without``."""
    first = yaml.safe_load((recipes.FOLDER / "streetnet.yaml").read_text(encoding="utf-8"))
    last = yaml.safe_load((recipes.FOLDER / "streetnet_finish.yaml").read_text(encoding="utf-8"))
    late = {key: value for key, value in ROWS[row].items() if key not in FIRST}
    both = (
        shortened(first, share, ROWS[row]),
        shortened({**last, **HOLDOUT}, share, late),
    )
    for options in both:
        options["dataset"] = [one.replace("hold-outs", without) for one in options["dataset"]]
    return both


def trained(options, data, folder, seed, weights=None):
    """The weights that a training leaves in ``folder``."""
    processes = 1 if torch.cuda.is_available() else 2
    result = folder / "model.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "options.yaml"
    options = {**options, "batch_size": options["batch_size"] // processes, "seed": seed}
    config.write_text(yaml.safe_dump(options), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["-m", "pyseg", "train", "--config", config, "--root", data, "-o", folder]
    command += ["--weights", weights] if weights else []
    command += ["--resume"] if (folder / "checkpoint.pt").exists() else []
    threads = {} if processes == 1 else {"OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), check=True, env=os.environ | threads)
    return result


def folder_of(row, without, share, seed):
    """Such as ``recipe_0``."""
    parts = [row, *([without] if without != "hold-outs" else [])]
    parts += [f"{share:g}"] if share != 1 else []
    return re.sub(r"[^\w.]+", "-", "_".join([*parts, str(seed)]))


def study(given):
    left_out = [f"{drive}_*" for drive in given.drives] or ["hold-outs"]
    for seed in given.seeds:
        for row, without in itertools.product(given.rows, left_out):
            key = {"row": row, "without": without, "share": given.share, "seed": seed}
            stored = read_json(OUTPUT) if OUTPUT.exists() else {"runs": []}
            others = [one for one in stored["runs"] if not key.items() <= one.items()]
            folder = given.runs / folder_of(**key)
            here = (folder / "last" / "model.safetensors").exists()  # for `make weights`
            if here and len(others) < len(stored["runs"]):
                continue
            first, last = options_of(row, given.share, without)
            begun = time.perf_counter()
            weights = trained(first, given.data, folder / "first", seed)
            parts = [first, last]
            if row == TWICE:
                weights = trained(first, given.data, folder / "again", seed + 1000, weights)
                parts = [first, first, last]
            result = trained(last, given.data, folder / "last", seed, weights)
            entry = {
                **key,
                "seconds": round(time.perf_counter() - begun),
                "torch": torch.__version__,
            }
            entry["crops"] = [
                options["epochs"] * options["steps"] * options["batch_size"] for options in parts
            ]
            for part in parts_of(row, without):
                file = weights if part == "first part" else result
                pipeline = built(file, TTA if part.endswith("tta") else None)
                entry[part] = {
                    n: scores(pipeline, s) for n, s in unseen(given.data, without).items()
                }
            print({**key, **{n: e["miou"] for n, e in entry["both parts"].items()}}, flush=True)
            command = "python benchmarks/streetnet.py study DATA RUNS"
            write_json(OUTPUT, {"command": command, "runs": [*others, entry]})


def parts_of(row, without="hold-outs"):
    """The keys of `SCORED_PARTS` that are scored."""
    usual = row in ("recipe", TWICE) and without == "hold-outs"
    return tuple(SCORED_PARTS) if usual else ("both parts",)


def unseen(data, without):
    """The sets to score weights on that saw no frame of the pattern ``without``."""
    if without == "hold-outs":
        return sets(data)
    found = {"drive": CamVid(data, "train", only=without)}
    return found | ({"validation": CamVid(data, "val")} if without.startswith("0016E5") else {})


def mean_and_spread(values):
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def ablation_table(runs):
    """What changes give or take, against the recipe at the same share of its steps."""
    yield "| | crops | both hold-outs | gain | validation | seeds |"
    yield "|---|---|---|---|---|---|"
    for share in sorted({run["share"] for run in runs}, reverse=True):
        usual = None
        for row in ROWS:
            same = [run for run in runs if (run["row"], run["share"]) == (row, share)]
            for part in parts_of(row) if same else ():
                held, clip = (
                    [run[part][name]["miou"] for run in same]
                    for name in ("both hold-outs", "validation")
                )
                if row == "recipe":
                    usual = usual or statistics.mean(held)
                gain = f"{100 * (statistics.mean(held) - usual):+.1f}" if usual else ""
                name = row + SCORED_PARTS[part]
                crops = sum(same[0]["crops"][: -1 if part == "first part" else None])
                cells = (f"{crops:,}", mean_and_spread(held), gain, mean_and_spread(clip))
                yield f"| {name} | {' | '.join(cells)} | {seeds_of(same)} |"


def folds_table(runs):
    """Rows on drives of which they have seen nothing."""
    yield "| drive left out | scored on | frames | | crops | mIoU | seeds |"
    yield "|---|---|---|---|---|---|---|"
    for share in sorted({run["share"] for run in runs}, reverse=True):
        for drive, row in itertools.product(DRIVES, ROWS):
            key = {"without": f"{drive}_*", "row": row, "share": share}
            same = [run for run in runs if key.items() <= run.items()]
            for name in same[0]["both parts"] if same else ():
                found = [run["both parts"][name] for run in same]
                crops, frames = sum(same[0]["crops"]), found[0]["frames"]
                score = mean_and_spread([one["miou"] for one in found])
                cells = f"{drive} | {name} | {frames} | {row} | {crops:,} | {score}"
                yield f"| {cells} | {seeds_of(same)} |"


def seeds_of(runs):
    return " ".join(str(run["seed"]) for run in runs)


def page_tables():
    """The card's, from its own JSON and from the stored study."""
    scored = read_json(PAGE.with_suffix(".json"))
    found = {name: score_table(scored[key]) for name, key in SCORED.items() if key in scored}
    runs = read_json(OUTPUT)["runs"] if OUTPUT.exists() else []
    for name, table, kept_out in (
        ("ablation", ablation_table, True),
        ("folds", folds_table, False),
    ):
        those = [run for run in runs if (run["without"] == "hold-outs") == kept_out]
        found |= {name: table(those)} if those else {}
    return found


def write_tables(given):
    pages.write_parts(PAGE, SCRIPT, page_tables())


def bundle(given):
    model = streetnet(weights=given.weights)  # which says what is wrong with them
    temperature = read_json(TEMPERATURE)["stored"]
    pages.bundle_weights(BUNDLED, model.state_dict(), temperature_metadata(temperature))


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
    studying = commands.add_parser("study")
    studying.set_defaults(run=study)
    studying.add_argument("data", type=Path)
    studying.add_argument("runs", type=Path, help="folder for what is trained")
    studying.add_argument("--rows", nargs="*", choices=ROWS, default=["recipe"])
    studying.add_argument(
        "--drives", nargs="*", choices=DRIVES, default=[], help="left out, not the hold-outs"
    )
    studying.add_argument("--seeds", nargs="*", type=int, default=[0])
    studying.add_argument("--share", type=float, default=1.0, help="of the recipe's steps")
    commands.add_parser("table").set_defaults(run=write_tables)
    bundling = commands.add_parser("bundle")
    bundling.set_defaults(run=bundle)
    bundling.add_argument("weights", type=Path)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
