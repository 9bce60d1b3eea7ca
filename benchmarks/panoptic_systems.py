"""Three panoptic systems, trained equally long on `synthetic` and compared: quality, time, memory.

    python benchmarks/panoptic_systems.py train WEIGHTS     # and scores: hours
    python benchmarks/panoptic_systems.py time [WEIGHTS] --machine PROCESSOR    # idle otherwise
    python benchmarks/panoptic_systems.py table             # docs/panoptic.md, from the JSON

``train`` gives UPSNet, panoptic FPN and two networks (Mask R-CNN and FCN, merged by the heuristic)
the same scenes in the same order for as many steps; another seed draws other weights, order, lights
and samples of boxes. What WEIGHTS holds already is not trained again. Heads learn from 128 boxes of
an image, not 512, as a scene has few things: a step of four images takes some 1.5 s of a core.

``time`` times these networks on larger scenes, or without WEIGHTS untrained ones of the sizes that
the UPSNet paper compares: ResNet-50, 256 channels, 800 x 1300 pixels, Mask R-CNN beside PSPNet. An
untrained detector finds nothing, so there every network keeps its 100 best boxes, whatever their
scores.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import pages
import torch
from torch import nn

import pyseg
from pyseg import weights as weight_files
from pyseg.datasets.synthetic import STUFF, StreetScenes
from pyseg.devices import measure_peak_memory
from pyseg.files import read_json, write_json
from pyseg.metrics.panoptic import Panoptic
from pyseg.ops import upsample_argmax
from pyseg.ops.panoptic_merge import paste
from pyseg.training import train_instances
from pyseg.types import Segment, Segments

PAGE = Path(__file__).parents[1] / "docs" / "panoptic.md"
SCRIPT = "benchmarks/panoptic_systems.py"
OUTPUT = Path(__file__).parent / "results" / "panoptic_systems.json"
SYSTEMS = {
    "UPSNet": "upsnet_resnet50",
    "panoptic FPN": "panoptic_fpn_resnet50",
    "Mask R-CNN + FCN": "maskrcnn_fcn_resnet50",
}
TWO = "Mask R-CNN + FCN"
PSPNET = "Mask R-CNN + PSPNet"
PYTHON = ", merge in Python"
SIZE, SCENES, SCORED, EPOCHS, BATCH = (128, 256), 600, 100, 4, 4
BOXES = 128  # of an image, in training
SCORES = ("pq", "pq_things", "pq_stuff")
TIMED = {"trained": ((512, 1024), 3), "untrained": ((800, 1300), 2)}  # sizes, scenes
DETECTIONS = 100


def build(name, size, backbone="resnet18", channels=64):
    return pyseg.models.get(SYSTEMS[name])(
        num_classes=len(StreetScenes.classes),
        num_stuff=len(STUFF),
        backbone=backbone,
        channels=channels,
        min_size=size[0],
        max_size=size[1],
        stuff_area=size[0] * size[1] // 256,
        weights=None,
    )


def trained(name, size, folder, seed):
    model = build(name, size)
    model.load_state_dict(
        weight_files.load_state(folder / f"{SYSTEMS[name]}_{seed}" / "model.safetensors")
    )
    return model.eval()


class Logits(nn.Module):
    """A semantic network without its second output."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images)["out"]


def untrained(name, size):
    """A network of the paper's size that keeps a fixed number of boxes."""
    torch.manual_seed(0)
    if name == PSPNET:
        model = build(TWO, size, "resnet50", 256)
        classes = len(StreetScenes.classes)
        model.semantic = Logits(
            pyseg.models.create("pspnet_resnet50", num_classes=classes, weights=None).network
        )
    else:
        model = build(name, size, "resnet50", 256)
    heads = model.detector.roi_heads
    heads.score_thresh, heads.nms_thresh, heads.detections_per_img = 0.0, 1.0, DETECTIONS
    model.score_threshold = 0.0
    return model.eval()


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

    model._panoptic_segments = merge
    return model


def quality(model, scenes):
    metric = Panoptic(model.classes, things=model.things)
    for k in range(len(scenes)):
        metric.update(model.predict([scenes[k].image])[0], scenes[k])
    return {key: round(100 * value, 2) for key, value in metric.compute().items() if key in SCORES}


def stored():
    return read_json(OUTPUT) if OUTPUT.exists() else {}


def train(given):
    scenes = StreetScenes("train", length=SCENES, size=SIZE)
    val = StreetScenes("val", length=SCORED, size=SIZE)
    torch.set_num_threads(given.threads)
    for seed in given.seeds:
        for name, model_name in SYSTEMS.items():
            folder = given.weights / f"{model_name}_{seed}"
            begun = time.process_time()
            absent = not (folder / "model.safetensors").exists()
            if absent:
                torch.manual_seed(seed)
                model = build(name, SIZE)
                model.detector.roi_heads.fg_bg_sampler.batch_size_per_image = BOXES
                train_instances(
                    model,
                    scenes,
                    output_dir=folder,
                    epochs=EPOCHS,
                    batch_size=BATCH,
                    photometric=0.0,
                    seed=seed,
                    resume=(folder / "checkpoint.pt").exists(),
                )
            if not absent and str(seed) in stored().get("quality", {}).get(name, {}):
                continue
            entry = quality(trained(name, SIZE, given.weights, seed), val)
            entry["steps"] = EPOCHS * SCENES // BATCH
            entry["cpu_seconds"] = round(time.process_time() - begun)
            print(name, seed, entry, flush=True)
            # Read now, as another process may have written its own in the meantime.
            found = stored()
            found.setdefault("quality", {}).setdefault(name, {})[str(seed)] = entry
            write_json(OUTPUT, found)


def measured(models, size, count, rounds):
    """Median ms of each model and its peak memory in MB; the models take turns."""
    scenes = StreetScenes("val", length=count, size=size)
    images = [scenes[k].image for k in range(count)]
    times = {name: [] for name in models}
    found = {}
    for name, model in models.items():
        if name.endswith(PYTHON):  # it must do the same work
            maps = [
                one.predict(images[:1])[0].segments.map
                for one in (model, models[name.removesuffix(PYTHON)])
            ]
            if not torch.equal(*maps):
                raise ValueError(f"{name} gives another map")
        with measure_peak_memory(model.device, True) as peak:
            model.predict(images[:1])
        parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        found[name] = {"peak_mb": round(peak() / 1e6), "weights_mb": round(parameters / 1e6)}
    for _ in range(rounds):
        for image in images:
            for name, model in models.items():
                start = time.perf_counter()
                model.predict([image])
                times[name].append(1e3 * (time.perf_counter() - start))
    for name, values in times.items():
        found[name]["ms"] = round(statistics.median(values))
    return found


def measure(given):
    torch.set_num_threads(given.threads)
    kind = "untrained" if given.weights is None else "trained"
    size, count = TIMED[kind]
    if kind == "trained":
        models = {name: trained(name, size, given.weights, given.seed) for name in SYSTEMS}
        models[TWO + PYTHON] = merge_in_python(trained(TWO, size, given.weights, given.seed))
    else:
        models = {name: untrained(name, size) for name in (*SYSTEMS, PSPNET)}
        models[PSPNET + PYTHON] = merge_in_python(untrained(PSPNET, size))
    times = measured(models, size, count, given.rounds)
    where = f"{given.machine}, threads: {given.threads}, torch {torch.__version__}"
    write_json(OUTPUT, stored() | {kind: times, f"{kind} on": where})


def table_of_quality(found):
    yield "| system | PQ | PQ things | PQ stuff | seeds |"
    yield "|---|---|---|---|---|"
    for name, seeds in found.items():
        cells = []
        for key in SCORES:
            values = [entry[key] for entry in seeds.values()]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        yield f"| {name} | {' | '.join(cells)} | {' '.join(seeds)} |"


def table_of_times(found, size):
    yield f"| system, {size[0]} x {size[1]} | ms | of UPSNet's | peak MB | weights MB |"
    yield "|---|---|---|---|---|"
    for name, entry in found.items():
        ratio = entry["ms"] / found["UPSNet"]["ms"]
        yield (
            f"| {name} | {entry['ms']} | {ratio:.2f} | {entry['peak_mb']} | {entry['weights_mb']} |"
        )


def page_tables():
    found = stored()
    tables = {"quality": table_of_quality(found["quality"])} if "quality" in found else {}
    return tables | {
        kind: table_of_times(found[kind], size)
        for kind, (size, _) in TIMED.items()
        if kind in found
    }


def table(given):
    pages.write_parts(PAGE, SCRIPT, page_tables())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for function, name in ((train, "train"), (measure, "time"), (table, "table")):
        command = commands.add_parser(name)
        command.set_defaults(run=function)
        if function is table:
            continue
        command.add_argument("--threads", type=int, default=1)
        if function is train:
            command.add_argument("weights", type=Path, help="folder for what is trained")
            command.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2))
        else:
            command.add_argument("weights", type=Path, nargs="?", help="what `train` left there")
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--rounds", type=int, default=3)
            command.add_argument("--machine", required=True, help="its processor, for the JSON")
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
