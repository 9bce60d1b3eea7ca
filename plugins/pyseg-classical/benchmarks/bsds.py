"""Every method on BSDS500: options tuned on train, measured on val, one table.

    python plugins/pyseg-classical/benchmarks/bsds.py --root BSDS500 [--train 20] [--val 20]

Each method has one option that makes regions coarser, at so many levels, and a few settings of
another. The setting with the best ODS F on train is measured on val at all levels. What is done for
an image is kept in --out and not done again. Images are every n-th by name.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyseg_classical.bsds import BSDS500Humans, BSDSBoundary, BSDSRegions
from pyseg_classical.cuts import nested_cuts
from pyseg_classical.regions import connected, merge_small

import pyseg
from pyseg.files import write_json

HERE = Path(__file__).resolve().parent
LEVELS: dict[str, tuple[str, tuple[Any, ...], dict[str, tuple[Any, ...]]]] = {
    # name: the option of the levels, its values from fine to coarse, and settings that are tuned
    "felzenszwalb": (
        "scale",
        (100, 200, 400, 800, 1600, 3200),
        {"sigma": (0.5, 0.8, 1.1), "min_size": (50, 200)},
    ),
    "normalized_cut": ("k", (90, 50, 35, 20, 10, 5), {"sigma_f": (3.0, 5.0, 9.0), "limit": (2.0,)}),
    "mean_shift": (
        "min_size",
        (100, 400, 1000, 2200, 4000, 8000),
        {"spatial": (7,), "colour": (10.0, 15.0, 20.0), "share": (0.3, 0.6)},
    ),
    "quickshift": (
        "min_size",
        (100, 300, 800, 2000, 4000, 8000),
        {"kernel_size": (3.0,), "max_distance": (100.0,), "ratio": (0.5, 1.0)},
    ),
    "average_cut": ("k", (90, 50, 35, 20, 10, 5), {"sigma_f": (3.0, 5.0), "limit": (99.0,)}),
    "spanning_tree": ("k", (100, 50, 25, 12, 6, 3), {"min_size": (100, 400)}),
    "region_growing": ("threshold", (15, 25, 40, 60, 80, 100), {"smoothing": (1.0, 2.0)}),
    "split_and_merge": ("merge_limit", (6, 10, 15, 20, 28, 36), {"split_limit": (6.0, 12.0)}),
    "hcs": ("similar", (3, 5, 8, 12, 18), {"superpixels": (400,)}),
    "random_walker": ("k", (8, 4, 2), {"beta": (100.0,)}),
    "kmeans": ("k", (12, 8, 5, 3, 2), {"min_size": (400,)}),
    "watershed": ("h", (2, 5, 10, 20, 40), {}),
    "slic": ("count", (200, 100, 50, 25, 12, 6), {}),
}
# ODS F and OIS F of the methods' own programs on the 100 images of val, added up from the counts
# that the SEISM package (Pont-Tuset and Marques) has for every image.
ON_VAL = {
    "felzenszwalb": (0.603, 0.647),
    "mean_shift": (0.593, 0.633),
    "normalized_cut": (0.622, 0.651),
}
# ODS F and covering on the 200 images of test, Arbelaez et al. (PAMI 2011), tables 1 and 2. A
# figure in brackets is from memory: no copy of the tables was at hand to check it.
ON_TEST = {
    "felzenszwalb": ("0.61", "(0.52)"),
    "mean_shift": ("(0.64)", "0.54"),
    "normalized_cut": ("(0.64)", "(0.45)"),
}
COLUMNS = (
    ("boundary", "ods_f"),
    ("boundary", "ois_f"),
    ("boundary", "ap"),
    ("regions", "covering_ods"),
    ("regions", "covering_ois"),
    ("regions", "covering_best"),
    ("regions", "pri_ods"),
    ("regions", "pri_ois"),
    ("regions", "vi_ods"),
    ("regions", "vi_ois"),
)


def made(name: str, setting: dict[str, Any], value: Any) -> Any:
    return pyseg.models.create(name, **setting, **{LEVELS[name][0]: value})


def at_levels(name: str, setting: dict[str, Any], image: np.ndarray) -> list[np.ndarray]:
    """What a method gives at all levels; what levels have in common is done once."""
    values = LEVELS[name][1]
    models = [made(name, setting, value) for value in values]
    first = models[0]
    if name == "mean_shift":
        parts, colours = first.modes(image)
        return [merge_small(parts, colours, model.min_size) for model in models]
    if name == "quickshift":
        tree = first.tree(image)
        return [model.cut(image, *tree) for model in models]
    if name in ("normalized_cut", "average_cut") and first.way == "recursive":
        graph, nodes = first.graph(image)
        labels, origin = nested_cuts(graph, first.kind, max(values), first.limit)
        found = []
        for k in values:
            part = np.arange(len(origin))
            for number in range(k, len(origin)):  # an origin is smaller than what was cut from it
                part[number] = part[origin[number]]
            found.append(merge_small(connected(part[labels][nodes]), image, first.min_size))
        return found
    return [model.regions(image) for model in models]


def settings(name: str) -> Iterator[dict[str, Any]]:
    tuned = LEVELS[name][2]
    for values in itertools.product(*tuned.values()):
        yield dict(zip(tuned, values, strict=True))


def scored(
    name: str, setting: dict[str, Any], split: str, data: BSDS500Humans, count: int, out: Path
) -> dict[str, Any]:
    """Scores of a method with a setting at all levels, on ``count`` images of a split."""
    option, values, _ = LEVELS[name]
    key = hashlib.sha256(repr((option, values, sorted(setting.items()))).encode()).hexdigest()[:12]
    path = out / f"{name}-{split}-{key}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    chosen = np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int).tolist()
    for index in chosen:
        if str(index) in kept:
            continue
        sample = data[index]
        image = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
        before = time.process_time()
        made(name, setting, values[len(values) // 2]).regions(image)
        spent = time.process_time() - before
        levels = at_levels(name, setting, image)
        humans = [human.map.numpy() for human in sample.humans]
        boundary, regions = BSDSBoundary(), BSDSRegions()
        for metric in (boundary, regions):
            metric.update_levels(sample.name, levels, humans)
        kept[str(index)] = {
            "ms": 1000 * spent,
            "boundary": boundary.state()["images"],
            "regions": regions.state()["images"],
        }
        write_json(path, kept)
    found: dict[str, Any] = {"setting": setting, "option": option, "values": values}
    for part, metric in (("boundary", BSDSBoundary()), ("regions", BSDSRegions())):
        metric.load_state({"images": [r for i in chosen for r in kept[str(i)][part]]})
        found[part] = metric.compute()
    found["ms"] = float(np.median([kept[str(i)]["ms"] for i in chosen]))
    return found


def table(results: dict[str, Any]) -> str:
    head = " | ".join(name.replace("_", " ") for _, name in COLUMNS)
    last = "CPU ms | published: ODS, OIS F on val | ODS F, covering on test"
    rows = [f"| method | {head} | {last} |", "|---" * (len(COLUMNS) + 4) + "|"]
    order = sorted(results["methods"], key=lambda n: -results["methods"][n]["boundary"]["ods_f"])
    for name in order:
        found = results["methods"][name]
        cells = [f"{found[part][column]:.2f}" for part, column in COLUMNS]
        cells[:2] = [f"{found[part][column]:.3f}" for part, column in COLUMNS[:2]]
        on_val = ", ".join(f"{value:.3f}" for value in ON_VAL.get(name, ())) or "-"
        on_test = ", ".join(ON_TEST.get(name, ())) or "-"
        cells += [f"{found['ms']:.0f}", on_val, on_test]
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True)
    parser.add_argument("--train", type=int, default=200, help="images to tune on")
    parser.add_argument("--val", type=int, default=100, help="images to measure on")
    parser.add_argument("--methods", nargs="+", default=list(LEVELS), choices=list(LEVELS))
    parser.add_argument(
        "--out", type=Path, default=Path("build/bsds"), help="what is done is kept here"
    )
    parser.add_argument("--json", type=Path, default=HERE / "results" / "bsds.json")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    data = {split: BSDS500Humans(arguments.root, split) for split in ("train", "val")}
    counts = {"train": arguments.train, "val": arguments.val}
    results: dict[str, Any] = (
        json.loads(arguments.json.read_text()) if arguments.json.is_file() else {"methods": {}}
    )
    if results.get("images", counts) != counts:
        results = {"methods": {}}
    results |= {"images": counts, "threads": torch.get_num_threads()}
    for name in arguments.methods:
        choices = list(settings(name))
        if len(choices) > 1:
            tried = [
                scored(name, one, "train", data["train"], counts["train"], arguments.out)
                for one in choices
            ]
            choices = [max(tried, key=lambda found: found["boundary"]["ods_f"])["setting"]]
        results["methods"][name] = scored(
            name, choices[0], "val", data["val"], counts["val"], arguments.out
        )
        write_json(arguments.json, results)
        print(name, choices[0], results["methods"][name]["boundary"]["ods_f"], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
