"""Three panoptic systems, trained equally long on `synthetic` and compared: quality, time, memory.

``python benchmarks/panoptic_systems.py OUT`` trains UPSNet, panoptic FPN and two networks (Mask
R-CNN and FCN, merged by the heuristic) on the same scenes, in the same order, for as many steps;
what OUT holds already is not trained again. Then it prints a table and writes OUT/table.md. The
last row is the two networks with the merge in Python, a loop over masks of full size, as was usual.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import pyseg
from pyseg import weights as weight_files
from pyseg.datasets.synthetic import STUFF, StreetScenes
from pyseg.devices import measure_peak_memory
from pyseg.image import write_text
from pyseg.instance_training import train_instances
from pyseg.metrics.panoptic import Panoptic
from pyseg.ops import upsample_argmax
from pyseg.ops.panoptic_merge import paste
from pyseg.types import Segment, Segments

SYSTEMS = {
    "UPSNet": "upsnet_resnet50",
    "panoptic FPN": "panoptic_fpn_resnet50",
    "Mask R-CNN + FCN": "maskrcnn_fcn_resnet50",
}
PYTHON = "Mask R-CNN + FCN, merge in Python"


def build(name, size, stuff_area):
    torch.manual_seed(0)
    return pyseg.models.get(SYSTEMS[name])(
        num_classes=len(StreetScenes.classes),
        num_stuff=len(STUFF),
        backbone="resnet18",
        channels=64,
        min_size=size[0],
        max_size=size[1],
        stuff_area=stuff_area,
        weights=None,
    )


def merge_in_python(model):
    """Replaces the merge of ``model`` by panopticapi's rule, typed in NumPy, one mask at a time."""

    def merge(found, logits, canvas, size):
        semantic = upsample_argmax(logits[None], canvas)[0, : size[0], : size[1]].numpy()
        masks = paste(found.masks, found.boxes, size).numpy()
        map, items = np.zeros(size, np.int32), []
        for k in np.argsort(-found.scores.numpy(), kind="stable"):
            score, label = float(found.scores[k]), int(found.labels[k])
            area = int(masks[k].sum())
            if score < model.score_threshold or area == 0:
                continue
            if (masks[k] & (map > 0)).sum() > 0.5 * area:
                continue
            free = masks[k] & (map == 0)
            if free.any():
                items.append(Segment(len(items) + 1, label, score, int(free.sum())))
                map[free] = len(items)
        for label in range(model.num_stuff):
            free = (semantic == label) & (map == 0)
            if free.sum() >= max(model.stuff_area, 1):
                items.append(Segment(len(items) + 1, label, 1.0, int(free.sum())))
                map[free] = len(items)
        return Segments(torch.from_numpy(map), tuple(items))

    model._merge = merge


def quality(model, scenes):
    metric = Panoptic(model.classes, things=model.things)
    for k in range(len(scenes)):
        metric.update(model.predict([scenes[k].image])[0], scenes[k])
    return metric.compute()


def seconds(models, scenes, rounds):
    """Median time of each model and its peak memory in bytes; the models take turns."""
    images = [scenes[k].image for k in range(len(scenes))]
    times = {name: [] for name in models}
    peaks = {}
    for name, model in models.items():
        with measure_peak_memory(model.device, True) as peak:
            model.predict(images[:1])
        peaks[name] = peak()
    for _ in range(rounds):
        for image in images:
            for name, model in models.items():
                start = time.perf_counter()
                model.predict([image])
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}, peaks


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 256), help="of the scenes")
    parser.add_argument("--length", type=int, default=300, help="scenes to train on")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--scored", type=int, default=100, help="scenes of the validation split")
    parser.add_argument("--timed-size", type=int, nargs=2, default=(512, 1024))
    parser.add_argument("--timed", type=int, default=4, help="scenes of --timed-size")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = tuple(options.size)
    area = size[0] * size[1] // 256
    train = StreetScenes("train", length=options.length, size=size)
    val = StreetScenes("val", length=options.scored, size=size)
    scores = {}
    for name in SYSTEMS:
        folder = options.out / SYSTEMS[name]
        model = build(name, size, area)
        if not (folder / "model.safetensors").exists():
            train_instances(
                model,
                train,
                output_dir=folder,
                epochs=options.epochs,
                batch_size=4,
                photometric=0.0,
                precision="bf16",
                save_every=options.epochs,
            )
        state = weight_files.load_state(folder / "model.safetensors")
        model.load_state_dict(state)
        cache = folder / f"pq_{options.scored}.pt"
        if not cache.exists():
            torch.save(quality(model.eval(), val), cache)
        scores[name] = torch.load(cache, weights_only=True)
    big = tuple(options.timed_size)
    models = {}
    for name in (*SYSTEMS, PYTHON):
        trained = name.removesuffix(", merge in Python")
        models[name] = build(trained, big, big[0] * big[1] // 256)
        models[name].load_state_dict(
            weight_files.load_state(options.out / SYSTEMS[trained] / "model.safetensors")
        )
    merge_in_python(models[PYTHON])
    scenes = StreetScenes("val", length=options.timed, size=big)
    times, peaks = seconds(models, scenes, options.rounds)
    lines = [
        f"| system | PQ | PQ things | PQ stuff | ms, {big[0]}x{big[1]} | peak MB | weights MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in models.items():
        values = scores[name.removesuffix(", merge in Python")]
        numbers = " | ".join(f"{100 * values[key]:.1f}" for key in ("pq", "pq_things", "pq_stuff"))
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        lines.append(
            f"| {name} | {numbers} | {1e3 * times[name]:.0f} | {peaks[name] / 1e6:.0f} | "
            f"{weights / 1e6:.0f} |"
        )
    fastest = times["UPSNet"]
    ratios = ", ".join(f"{name} {value / fastest:.2f}" for name, value in times.items())
    lines += ["", f"Time as a multiple of UPSNet's: {ratios}; {options.threads} thread(s)."]
    print("\n".join(lines))
    write_text(options.out / "table.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
