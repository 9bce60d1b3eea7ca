"""What `segfix` gains on images that it was not trained on: ``pyseg/assets/segfix_camvid.json``.

    python benchmarks/segfix.py ../shared/data/camvid ../shared/data/labelmefacade \
      --streetnet build/weights/recipe_0/last/model.safetensors \
      --segfix RUN/pipeline/1_segfix.safetensors
    python benchmarks/segfix.py ../shared/data/camvid --time PROCESSOR  # idle otherwise
    python benchmarks/segfix.py --table
    python benchmarks/segfix.py --bundle RUN/pipeline/1_segfix.safetensors

The bundled weights of streetnet have seen all folds. So streetnet here is that which `make weights`
trains without the hold-outs and validation, and segfix has a head that was trained behind it.

Models are streetnet as it is and a weak one, streetnet at half resolution; behind each come no
refiner and segfix, with the model's features and with its own network, with logits and on labels
alone. Folds are the hold-outs of `pyseg/assets/streetnet_camvid.md`, CamVid's validation
clip, and photographs of other cities, of LabelMeFacade, in the six classes that are also CamVid's
(doors and windows are buildings; what a model calls otherwise is void). Intervals of differences
are of a bootstrap over images, 2000 resamples; neighbouring frames of a video resemble each other,
so they are too narrow.

``--time`` times streetnet alone and with both of segfix's networks, as bundled, from pixels to
labels, on eleven of the validation frames in turn, image by image one behind the other.

``--bundle`` stores a head that was trained behind the bundled streetnet, beside the network that is
there, and the file's digest in its card.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pages
import torch
from torch.nn.functional import interpolate

import pyseg
from pyseg.classes import CAMVID_CLASSES
from pyseg.datasets.camvid import CamVid
from pyseg.datasets.labelmefacade import LabelMeFacade
from pyseg.files import read_json, write_json
from pyseg.metrics import Boundary, Semantic
from pyseg.metrics.bootstrap import draws, total_of
from pyseg.refiners import SegFix
from pyseg.refiners.segfix import BUNDLED
from pyseg.types import VOID, Segmentation
from pyseg.weights import load_state

OUTPUT = BUNDLED.with_suffix(".json")
PAGE = BUNDLED.with_suffix(".md")
SCRIPT = "benchmarks/segfix.py"
FOLDS = ("dusk", "day", "validation", "other cities")
THIN = ("Pole", "SignSymbol", "Fence", "Pedestrian", "Bicyclist")
RESAMPLES = 2000
TIMED = ("streetnet", "streetnet+segfix", "streetnet+segfix(shared=False)")
PHOTOGRAPHS = 60  # of LabelMeFacade, spread evenly over its training and test images
CITIES = {  # its classes by CamVid's name
    **{name: "Building" for name in ("building", "door", "window")},
    **{"car": "Car", "pavement": "Pavement", "road": "Road", "sky": "Sky", "vegetation": "Tree"},
}


def whole(model, image):
    return model.predict([image], features=True)[0]


def half(model, image):
    """A prediction at half resolution."""
    size = [-(-side // 2) for side in image.shape[1:]]
    small = interpolate(
        image[None].float(), size, mode="bilinear", antialias=True, align_corners=False
    )
    small = small[0].round().clamp(0, 255).to(torch.uint8)
    logits = model.predict([small])[0].logits
    return Segmentation(tuple(image.shape[1:]), model.classes, logits=logits, image=image)


def cities(root):
    """Photographs with CamVid's labels."""
    sets = [LabelMeFacade(root, split) for split in ("train", "test")]
    whole = [(each, k) for each in sets for k in range(len(each))]
    found = []
    for k in range(PHOTOGRAPHS):
        each, index = whole[k * len(whole) // PHOTOGRAPHS]
        sample = each[index]
        table = torch.full((256,), VOID, dtype=torch.uint8)
        for number, name in enumerate(each.classes):
            if name in CITIES:
                table[number] = CAMVID_CLASSES.index(CITIES[name])
        found.append(replace(sample, labels=table[sample.labels.long()]))
    return found


def common(prediction):
    """A prediction's labels, with void for the classes that LabelMeFacade does not know."""
    known = torch.tensor([name in CITIES.values() for name in (*CAMVID_CLASSES, "void")])
    labels = prediction.labels
    index = labels.long().clamp(max=len(CAMVID_CLASSES))
    return prediction.with_labels(labels.masked_fill(~known[index], VOID))


def folds(root):
    sets = {
        "dusk": CamVid(root, "train", only="dusk-block"),
        "day": CamVid(root, "train", only="day-block"),
        "validation": CamVid(root, "val"),
    }
    return {fold: [each[k] for k in range(len(each))] for fold, each in sets.items()}


def refined(weights, options):
    """Models and refiners, as functions."""
    segfix = SegFix(weights=weights, **options)
    own = SegFix(weights=weights, shared=False, **options)
    refiners = {
        "none": lambda image, given: given,
        "segfix": segfix.refine,
        "segfix(shared=False)": own.refine,
        "segfix on labels": lambda image, given: own.refine(image, given.with_labels(given.labels)),
    }
    weak = {name: refiners[name] for name in ("none", "segfix", "segfix on labels")}
    return {"streetnet": (whole, refiners), "streetnet at half resolution": (half, weak)}


def states_of(model, predict, refiners, samples, scored=lambda prediction: prediction):
    """Of every refiner and image, its `state_of`."""
    found = {name: [] for name in refiners}
    for sample in samples:
        given = predict(model, sample.image)
        for name, refine in refiners.items():
            found[name].append(state_of(scored(refine(sample.image, given)), sample))
    return found


def state_of(prediction, sample):
    """Of one prediction: confusion matrix, and pixels of boundaries."""
    semantic = Semantic(prediction.classes)
    boundary = Boundary(prediction.classes, measures=("boundary_iou",))
    for metric in (semantic, boundary):
        metric.update(prediction, sample)
    state = semantic.state()
    areas = boundary.state()["areas"]
    return {"matrix": state["matrix"], "missed": state["missed"], "areas": areas}


def ious(totals):
    """IoU [R, C] and Boundary IoU [R, C] of summed states."""
    matrix, areas = totals["matrix"].double(), totals["areas"].double()
    both = matrix.diagonal(dim1=-2, dim2=-1)
    truth = matrix.sum(-1) + totals["missed"]
    iou = both / (truth + matrix.sum(-2) - both)
    return iou, areas[..., 0] / (areas[..., 1] + areas[..., 2] - areas[..., 0])


def difference(after, before):
    """In points, with the interval: of the first row all images count once."""
    points = 100 * (after - before)
    low, high = torch.tensor([0.025, 0.975]).double()
    interval = [points[1:].nanquantile(q).item() for q in (low, high)]
    return [round(value, 3) for value in (points[0].item(), *interval)]


def compare(classes, states, plain, counts):
    (iou, edge), (iou_0, edge_0) = (ious(total_of(one, counts)) for one in (states, plain))
    per_class = {
        name: difference(iou[:, k], iou_0[:, k])
        for k, name in enumerate(classes)
        if not iou_0[0, k].isnan()
    }
    return {
        "miou": round(iou[0].nanmean().item(), 5),
        "boundary_iou": round(edge[0].nanmean().item(), 5),
        "delta_miou": difference(iou.nanmean(1), iou_0.nanmean(1)),
        "delta_boundary_iou": difference(edge.nanmean(1), edge_0.nanmean(1)),
        "delta_per_class": per_class,
    }


def line(*cells):
    return f"| {' | '.join(cells)} |"


def gains_table(rows):
    def cell(difference):
        value, low, high = (f"{number:+.2f}" for number in difference)
        return f"{value} [{low}, {high}]"

    plain = {(row["fold"], row["model"]): row for row in rows if row["refiner"] == "none"}
    yield line("fold", "model", "refiner", "mIoU", "Δ mIoU", "boundary IoU", "Δ boundary IoU")
    yield "|---" * 7 + "|"
    for row in rows:
        if row["refiner"] != "none":
            place = row["fold"], row["model"]
            changes = [
                f"{plain[place][key]:.4f} | {cell(row[f'delta_{key}'])}"
                for key in ("miou", "boundary_iou")
            ]
            yield line(*place, row["refiner"], *changes)


def thin_table(rows):
    yield line("fold", "model", "refiner", *THIN)
    yield "|---" * (3 + len(THIN)) + "|"
    for row in rows:
        if row["refiner"] != "none" and row["fold"] != "other cities":
            changes = [f"{row['delta_per_class'][name][0]:+.2f}" for name in THIN]
            yield line(row["fold"], row["model"], row["refiner"], *changes)


def timed(root, rounds=9):
    """Medians over images and rounds, and of the ratios to streetnet alone."""
    dataset = CamVid(root, "val")
    images = [dataset[k].image for k in range(0, len(dataset), 10)]
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for precision in ("fp32", "bf16"):
            pipelines = {spec: pyseg.build(spec, precision=precision) for spec in TIMED}
            taken = {spec: [] for spec in TIMED}
            for k in range(rounds + 1):
                for image in images:
                    for spec, pipeline in pipelines.items():
                        start = time.perf_counter()
                        _ = pipeline(image).labels
                        if k:  # the first round warms up
                            taken[spec].append(1e3 * (time.perf_counter() - start))
            for spec, values in taken.items():
                pairs = zip(values, taken["streetnet"], strict=True)
                ratio = round(statistics.median(ours / plain for ours, plain in pairs), 3)
                key = {"threads": threads, "precision": precision, "spec": spec}
                rows.append({**key, "ms": round(statistics.median(values), 1), "ratio": ratio})
                print(rows[-1], flush=True)
    return rows


def times_table(times):
    yield line("threads", "", *TIMED)
    yield "|---" * (2 + len(TIMED)) + "|"
    found = {(row["threads"], row["precision"], row["spec"]): row for row in times["rows"]}
    for threads, precision in dict.fromkeys(key[:2] for key in found):
        cells = [found[threads, precision, spec] for spec in TIMED]
        shown = [f"{cell['ms']:.0f} ms, {cell['ratio']:.2f}" for cell in cells]
        yield line(str(threads), precision, *shown)


def page_tables():
    stored = read_json(OUTPUT)
    rows = stored["rows"]
    tables = {"gains": gains_table(rows), "thin": thin_table(rows)}
    return {**tables, "times": times_table(stored["times"])}


def bundle(path):
    """The head of ``path`` beside the network that is stored."""
    before, after = load_state(BUNDLED), load_state(path)
    network = {key: value for key, value in before.items() if key.startswith("network.")}
    pages.bundle_weights(BUNDLED, {**after, **network})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, nargs="?", help="folder of CamVid")
    parser.add_argument("cities", type=Path, nargs="?", help="folder of LabelMeFacade")
    parser.add_argument("--streetnet", default="bundled", help="its weights")
    parser.add_argument("--segfix", default="default", help="its weights")
    parser.add_argument("--folds", help=f"only these of {','.join(FOLDS)}")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--options", type=json.loads, default={}, help="of segfix, as JSON")
    parser.add_argument("--time", metavar="PROCESSOR", help="only the times, on this one")
    parser.add_argument("--table", action="store_true", help="write the card's tables")
    parser.add_argument("--bundle", type=Path, help="file of weights, for its head")
    given = parser.parse_args()
    if given.bundle:
        return bundle(given.bundle)
    if given.table:
        return pages.write_parts(PAGE, SCRIPT, page_tables())
    if given.time:
        rows = timed(given.root)
        size = "480 x 360, pixels to labels"
        where = {"machine": given.time, "torch": torch.__version__, "size": size}
        stored = {**read_json(given.output), "times": {**where, "rows": rows}}
        return write_json(given.output, stored)
    chosen = given.folds.split(",") if given.folds else FOLDS
    rows = []
    if given.folds:  # the others are as they were
        rows = [row for row in read_json(given.output)["rows"] if row["fold"] not in chosen]
    model = pyseg.models.create("streetnet", weights=given.streetnet)
    if model.features_key not in SegFix(weights=given.segfix).wanted_features:
        parser.error("segfix's head is for other weights of streetnet")
    data = {**folds(given.root), "other cities": cities(given.cities)}
    for fold in chosen:
        samples = data[fold]
        counts = draws(len(samples), RESAMPLES, seed=0)
        counts = torch.cat([torch.ones_like(counts[:1]), counts])
        for name, (predict, refiners) in refined(given.segfix, given.options).items():
            scored = {"scored": common} if fold == "other cities" else {}
            found = states_of(model, predict, refiners, samples, **scored)
            for refiner, states in found.items():
                row = compare(model.classes, states, found["none"], counts)
                where = {"fold": fold, "images": len(samples), "model": name, "refiner": refiner}
                rows.append({**where, **row})
                miou, edge = row["delta_miou"], row["delta_boundary_iou"]
                thin = " ".join(f"{n} {row['delta_per_class'].get(n, [0])[0]:+.2f}" for n in THIN)
                print(
                    f"{fold:10} {name:28} {refiner:20} mIoU {row['miou']:.4f} {miou[0]:+.2f} "
                    f"[{miou[1]:+.2f}, {miou[2]:+.2f}]  boundary IoU {row['boundary_iou']:.4f} "
                    f"{edge[0]:+.2f} [{edge[1]:+.2f}, {edge[2]:+.2f}]  {thin}",
                    flush=True,
                )
    rows.sort(key=lambda row: FOLDS.index(row["fold"]))
    command = "python benchmarks/segfix.py CAMVID LABELMEFACADE --streetnet FILE --segfix FILE"
    kept = read_json(given.output) if given.output.exists() else {}
    found = {"command": command, "options": given.options, "rows": rows}
    write_json(given.output, {**kept, **found})


if __name__ == "__main__":
    main()
