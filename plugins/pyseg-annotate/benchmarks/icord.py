"""ICORD beside other ways to spend annotations, on objects and workers that were not trained on.

    python benchmarks/icord.py DATA --output benchmarks/results/icord.json

DATA is a folder with ``camvid`` (SegNet's layout: train/images, train/labels), ``bsds500``
({train,val}/ID.jpg, ID_human{i}.png), ``classical/membrane`` (ISBI 2012: image, label) and
``instance/nuclei``.

* cells: neurites of electron microscopy and nuclei, drawn by simulated workers;
* camvid: connected parts of cars, pedestrians, bicyclists, signs and poles by day to train on, at
  dusk to test on, drawn by simulated workers;
* bsds: regions that one person drew, as five others drew them. That person is the truth and never
  an annotator. People of two images count as two people, and nothing is known of clicks and time.

The predictor learns from the training objects. The threshold of the goal is chosen on these, with
predictions for folds of objects that the predictor had not seen; the test objects see it once.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
from PIL import Image
from pyseg_annotate import quality
from pyseg_annotate.annotators import SimulatedWorkers, Submission
from pyseg_annotate.policies import CONSENSUS, Offer, budgeted, curve, fixed, icord
from pyseg_annotate.quality import Examples, QualityPredictor, jaccard, judge
from pyseg_annotate.tasks import task_of, tasks_in
from scipy import ndimage
from sklearn.model_selection import GroupKFold

from pyseg.files import write_json

ROUNDS = 5
THRESHOLDS = [round(0.5 + 0.01 * k, 2) for k in range(50)]
WORKERS = 20  # of each part
NAMES = (
    *("Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car"),
    *("Pedestrian", "Bicyclist", "Void"),
)


def pick(tasks, count, seed):
    chosen = np.random.default_rng(seed).permutation(len(tasks))[:count]
    return [tasks[k] for k in sorted(chosen)]


def simulated(train, test, objects, seed):
    """What two pools of workers draw of two lists of tasks."""
    parts = []
    for part, first in ((pick(train, objects, seed), 0), (pick(test, objects, seed), WORKERS)):
        workers = SimulatedWorkers(WORKERS, seed, first)
        drawn = []
        for task in part:
            taken = []
            for _ in range(ROUNDS):
                submission = workers.annotate(task, taken)
                taken.append(submission.worker)
                drawn.append((task, submission))
        parts.append(drawn)
    return parts


def cells(data, objects, seed):
    tasks = [[], []]
    for k in range(6):
        image = data / f"classical/membrane/image/{k}.png"
        inside = np.array(Image.open(data / f"classical/membrane/label/{k}.png")) > 0
        parts, _ = ndimage.label(inside)
        sizes = np.bincount(parts.ravel())
        for value in np.flatnonzero((sizes >= 100) & (sizes <= 3000)):
            if value:
                tasks[k % 2].append(task_of(f"{k}#{value}", image, parts == value, "neurite"))
    folder = data / "instance/nuclei"
    ids = np.array(Image.open(folder / "instances_u16.png"))
    for value in np.unique(ids)[1:]:
        if (ids == value).sum() >= 64:
            task = task_of(f"n{value}", folder / "image.png", ids == value, "nucleus")
            tasks[int(value) % 2].append(task)
    return simulated(*tasks, objects, seed)


def camvid(data, objects, seed):
    folder = data / "camvid/train"
    tasks = tasks_in(
        folder / "labels",
        folder / "images",
        classes=NAMES,
        only=["Car", "Pedestrian", "Bicyclist", "SignSymbol", "Pole"],
        parts=True,
        least=100,
    )
    tasks = [task for task in tasks if task.truth.sum() <= 3000]
    dusk = [task for task in tasks if task.id.startswith("0001TP")]
    day = [task for task in tasks if not task.id.startswith("0001TP")]
    return simulated(day, dusk, objects, seed)


def bsds(data, objects, seed):
    """Images of six people and more; seeds change who is the truth and the order of the others."""
    parts = []
    for split in ("train", "val"):
        rng, drawn = np.random.default_rng(seed), []
        for image in sorted((data / "bsds500" / split).glob("*.jpg")):
            files = sorted(image.parent.glob(f"{image.stem}_human*.png"))
            if len(files) < 6:
                continue
            maps = [np.array(Image.open(file)).astype(int) for file in files]
            order = rng.permutation(len(maps))
            truth, others = maps[order[0]], [maps[k] for k in order[1:]]
            sizes = np.bincount(truth.ravel())
            found = np.flatnonzero((sizes > 0.003 * truth.size) & (sizes < 0.02 * truth.size))
            for value in found:
                mask = truth == value
                matched = []
                for who, other in zip(order[1:], others, strict=True):
                    common = np.bincount(other[mask])
                    areas = np.bincount(other.ravel(), minlength=len(common))[: len(common)]
                    overlap = common / np.maximum(areas + mask.sum() - common, 1)
                    if overlap.max() >= 0.5:  # the same region, at all
                        matched.append((who, other == overlap.argmax()))
                if len(matched) < ROUNDS:
                    continue
                task = task_of(f"{image.stem}#{value}", image, mask, "region")
                left, top, right, bottom = task.box
                for who, drawn_mask in matched[:ROUNDS]:
                    part = np.ascontiguousarray(drawn_mask[top:bottom, left:right])
                    drawn.append((task, Submission(part, f"{image.stem}/{who}")))
        chosen = {task.id for task in pick([*{id(t): t for t, _ in drawn}.values()], objects, seed)}
        parts.append([(task, submission) for task, submission in drawn if task.id in chosen])
    return parts


def offers_of(drawn, predicted):
    masks, values = {}, {}
    for (task, submission), value in zip(drawn, predicted, strict=True):
        masks.setdefault(task.id, []).append(submission.mask)
        values.setdefault(task.id, []).append(value)
    return {id: Offer(np.stack(masks[id]), np.array(values[id])) for id in masks}


def unseen(examples, regressor, without):
    """Predictions for every training object by a predictor of others."""
    found = np.zeros(len(examples))
    for train, test in GroupKFold(3).split(examples.features, groups=examples.objects):
        predictor = QualityPredictor(examples.some(train), regressor, without=without)
        found[test] = predictor.predict_features(examples.features[test])
    return found


def score_of(truths):
    return lambda bought: float(
        np.mean([jaccard(truths[id], mask) for id, mask in bought.masks.items()])
    )


def baselines(offers, truths):
    """What needs no predictor."""
    score = score_of(truths)
    found = {"single": {"annotations": 1, "jaccard": score(fixed(offers, 1))}}
    for name, number in (("majority", 3), *((name, ROUNDS) for name in CONSENSUS)):
        bought = fixed(offers, number, CONSENSUS[name])
        found[f"{name} of {number}"] = {"annotations": number, "jaccard": score(bought)}
    best = [max(jaccard(truths[id], m) for m in offer.masks) for id, offer in offers.items()]
    found["truly best of 5"] = {"annotations": ROUNDS, "jaccard": float(np.mean(best))}
    return found


def policies(offers, truths, threshold):
    """What the predictor buys; thresholds and budgets as curves."""
    score, found = score_of(truths), {}
    for name, value in (("0.83", 0.83), ("chosen", threshold)):
        ways = {
            f"icord, {name}": icord(offers, value, ROUNDS),
            f"icord, {name}, unaccepted by STAPLE": icord(
                offers, value, ROUNDS, CONSENSUS["staple"]
            ),
        }
        mean = ways[f"icord, {name}"].mean_spent
        ways[f"budget of icord, {name}"] = budgeted(offers, mean, ROUNDS, CONSENSUS["staple"])
        for way, bought in ways.items():
            found[way] = {"annotations": bought.mean_spent, "jaccard": score(bought)}
            found[way]["threshold"] = value
    curves = {
        "icord": curve(lambda t: icord(offers, t, ROUNDS), THRESHOLDS, score),
        "budget": curve(
            lambda mean: budgeted(offers, mean, ROUNDS, CONSENSUS["staple"]),
            [1 + 0.25 * k for k in range(17)],
            score,
        ),
    }
    return {"policies": found, "curves": curves}


def choose(offers, truths):
    """The threshold that costs least, among those within 2.5 points of five with consensus."""
    score = score_of(truths)
    wanted = score(fixed(offers, ROUNDS)) - 0.025
    good = (value for value in THRESHOLDS if score(icord(offers, value, ROUNDS)) >= wanted)
    return next(good, THRESHOLDS[-1])


def run(kind, data, objects, seed):
    began = time.process_time()
    train, test = {"cells": cells, "camvid": camvid, "bsds": bsds}[kind](data, objects, seed)
    learnt, rest = Examples.of(train), Examples.of(test)
    assert not {*learnt.objects} & {*rest.objects} and not {*learnt.workers} & {*rest.workers}
    truths = [{task.id: task.truth for task, _ in part} for part in (train, test)]
    groups = [group for group in quality.GROUPS if kind != "bsds" or group != "behaviour"]
    predictors = {}
    for regressor in quality.REGRESSORS:
        for without in ((), *((group,) for group in groups)):
            predictor = QualityPredictor(learnt, regressor, without=without)
            predicted = predictor.predict_features(rest.features)
            found = judge(predicted, rest.jaccard, 0.83)
            if without in ((), ("behaviour",)):
                folds = offers_of(train, unseen(learnt, regressor, without))
                threshold = choose(folds, truths[0])
                found |= policies(offers_of(test, predicted), truths[1], threshold)
            predictors[" without ".join([regressor, *without])] = found
    return {
        "seed": seed,
        "train": {"objects": len(truths[0]), "annotations": len(train)},
        "test": {"objects": len(truths[1]), "annotations": len(test)},
        "single_quantiles": np.quantile(rest.jaccard, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist(),
        "baselines": baselines(offers_of(test, rest.jaccard), truths[1]),
        "predictors": predictors,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def table(results):
    """Markdown: means over seeds, and their range."""
    lines = [
        "| objects | way | annotations | of five | Jaccard, mean (range) |",
        "|---|---|---|---|---|",
    ]
    for kind, entries in results.items():
        ways = {name: [e["baselines"][name] for e in entries] for name in entries[0]["baselines"]}
        for predictor in ("ridge", "boosting"):
            for way in entries[0]["predictors"][predictor]["policies"]:
                points = [e["predictors"][predictor]["policies"][way] for e in entries]
                ways[f"{predictor}: {way}"] = points
        for way, points in ways.items():
            cost = np.mean([point["annotations"] for point in points])
            scores = [point["jaccard"] for point in points]
            lines.append(
                f"| {kind} | {way} | {cost:.2f} | {cost / ROUNDS:.0%} | {np.mean(scores):.3f} "
                f"({min(scores):.3f}-{max(scores):.3f}) |"
            )
    lines += ["", "| objects | predictor | MAE | r | calibration |", "|---|---|---|---|---|"]
    for kind, entries in results.items():
        for name in entries[0]["predictors"]:
            found = [e["predictors"][name] for e in entries]
            row = [np.mean([one[key] for one in found]) for key in ("mae", "r", "calibration")]
            lines.append(f"| {kind} | {name} | " + " | ".join(f"{v:.3f}" for v in row) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print that of a result, and run nothing")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--objects", type=int, default=120, help="of each part, at most")
    parser.add_argument("--only", choices=("cells", "camvid", "bsds"))
    options = parser.parse_args()
    if options.table is not None:
        return print(table(json.loads(options.table.read_text())["results"]))
    if options.data is None or options.output is None:
        parser.error("give DATA and --output")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = {}
    for seed in range(options.seeds):
        for kind in ("cells", "camvid", "bsds"):
            if options.only in (None, kind):
                entry = run(kind, options.data, options.objects, seed)
                results.setdefault(kind, []).append(entry)
                print(kind, seed, entry["cpu_seconds"], flush=True)
                value = {
                    "command": f"python benchmarks/icord.py DATA --objects {options.objects} "
                    f"--seeds {options.seeds} --output benchmarks/results/icord.json",
                    "machine": platform.machine(),
                    "cpu_seconds": sum(e["cpu_seconds"] for es in results.values() for e in es),
                    "results": results,
                }
                write_json(options.output, value)  # a stopped run keeps what it has


if __name__ == "__main__":
    main()
