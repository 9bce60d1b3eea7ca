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
    "felzenszwalb": ("scale", (50, 100, 200, 400, 800, 1600, 3200), {"sigma": (0.8, 1.2)}),
    "spanning_tree": ("k", (100, 50, 25, 12, 6, 3), {"min_size": (100, 400)}),
    "region_growing": ("threshold", (15, 25, 40, 60, 80, 100), {"smoothing": (1.0, 2.0)}),
    "split_and_merge": ("merge_limit", (6, 10, 15, 20, 28, 36), {"split_limit": (6.0, 12.0)}),
    "normalized_cut": ("k", (80, 40, 20, 10, 5, 3), {"sigma_f": (4.0, 8.0), "limit": (2.0,)}),
    "average_cut": ("k", (80, 40, 20, 10, 5, 3), {"sigma_f": (4.0, 8.0), "limit": (99.0,)}),
    "hcs": ("similar", (3, 5, 8, 12, 18), {"superpixels": (200, 400)}),
    "random_walker": ("k", (12, 8, 5, 3, 2), {"beta": (100.0, 300.0)}),
    "kmeans": ("k", (12, 8, 5, 3, 2), {"min_size": (100, 400)}),
    "mean_shift": ("min_size", (50, 100, 200, 400, 800, 1600), {}),
    "quickshift": ("min_size", (20, 50, 100, 200, 400, 800), {}),
    "watershed": ("h", (2, 5, 10, 20, 40), {}),
    "slic": ("count", (200, 100, 50, 25, 12, 6), {}),
}
PUBLISHED = {
    # of the 200 test images, Arbelaez et al. (PAMI 2011), tables 1 and 2: ODS F, OIS F, AP;
    # covering ODS, OIS, best; PRI ODS, OIS; VI ODS, OIS
    "felzenszwalb": (0.61, 0.64, 0.56, 0.52, 0.57, 0.69, 0.80, 0.82, 2.21, 1.87),
    "mean_shift": (0.64, 0.68, 0.56, 0.54, 0.58, 0.66, 0.79, 0.81, 1.85, 1.64),
    "normalized_cut": (0.64, 0.68, 0.45, 0.45, 0.53, 0.67, 0.78, 0.80, 2.23, 1.89),
    "people": (0.80, 0.80, None, 0.72, 0.72, None, 0.88, 0.88, 1.17, 1.17),
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
    head = "| method | " + " | ".join(f"{name}, published" for _, name in COLUMNS) + " | ms |"
    rows = [head, "|---" * (len(COLUMNS) + 2) + "|"]
    order = sorted(results["methods"], key=lambda n: -results["methods"][n]["boundary"]["ods_f"])
    for name in order:
        found = results["methods"][name]
        cells = []
        for (part, column), other in zip(
            COLUMNS, PUBLISHED.get(name, (None,) * len(COLUMNS)), strict=True
        ):
            cells.append(
                f"{found[part][column]:.2f}" + ("" if other is None else f" ({other:.2f}\\*)")
            )
        rows.append(f"| `{name}` | " + " | ".join(cells) + f" | {found['ms']:.0f} |")
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
    print("\n\\* published: Arbelaez et al., PAMI 2011, on the 200 images of the test split")


if __name__ == "__main__":
    main()
