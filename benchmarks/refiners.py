"""What each refiner gains behind strong and weak models: ``results/refiners.json``.

    python benchmarks/drives.py ../shared/data/camvid WEIGHTS --seeds 0
    python benchmarks/refiners.py train ../shared/data/camvid WEIGHTS
    python benchmarks/refiners.py fit ../shared/data/camvid WEIGHTS
    python benchmarks/refiners.py score ../shared/data/camvid WEIGHTS --cache CACHE \\
        --labelmefacade ../shared/data/labelmefacade
    python benchmarks/refiners.py thin ../shared/data/camvid WEIGHTS
    python benchmarks/refiners.py time ../shared/data/camvid WEIGHTS
    python benchmarks/refiners.py table

WEIGHTS is a folder with the files that `MODELS` names, among them those of `benchmarks/drives.py`.
Of a model without its file the rows of an earlier run stay, if the refiners are still the same; if
there are none it is listed as absent. ``train`` makes those of some steps, ``fit`` a crf trained on
the validation clip behind the network that does not know its drive. ``score`` computes the logits
of a model once, keeps them in CACHE as half precision at the model's stride, runs every refiner on
them and keeps what it counted of each image; a run that was killed goes on. ``thin`` scores
test-time variants, ``time`` takes milliseconds, ``table`` writes the tables of docs/refiners.md.

Folds are the hold-outs of `pyseg/assets/streetnet_camvid.md`, by day every second frame, every
eighth one of CamVid's validation clip, twelve of a drive that the model has seen nothing of, and 15
photographs of other cities, of LabelMeFacade, in the six classes that are also CamVid's, for models
that were not trained on these. Intervals of differences are of a bootstrap over images, 2000
resamples; neighbouring frames of a video resemble each other, so they are too narrow.
"""

import argparse
import hashlib
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pages
import torch
from drives import DRIVES, SEEDS, frames_of, weights_of
from segfix import cities, common, compare, folds, states_of
from torch.nn.functional import interpolate

import pyseg
from pyseg.classes import CAMVID_CLASSES
from pyseg.datasets.camvid import CamVid
from pyseg.files import read_json, replacing, write_json
from pyseg.metrics import Semantic
from pyseg.metrics.bootstrap import draws
from pyseg.refiners import CRF, SegFix
from pyseg.refiners import create as refiner
from pyseg.refiners.segfix import BUNDLED as SEGFIX
from pyseg.training import train, train_crf
from pyseg.types import Segmentation
from pyseg.weights import load_state, save_state

ROOT = Path(__file__).parent.parent
OUTPUT = Path(__file__).parent / "results" / "refiners.json"
PAGE = ROOT / "docs" / "refiners.md"
SCRIPT = "benchmarks/refiners.py"
THIN = ("Pole", "SignSymbol", "Fence", "Pedestrian", "Bicyclist")
FRAMES = 12  # of a drive that the model has seen nothing of
RESAMPLES = 2000
BATCH = 6  # of the networks that `train` makes
TRAINED = "crf, trained"
FITTED = "validation"  # the fold that it was trained on
VALIDATION = "0016E5"  # the drive that CamVid's validation clip is of
VARIANTS = (None, "flip", "1,1.5", "1,2")  # of the image: tta
HELD_OUT = ("dusk", "day", "validation", "other cities")


@dataclass(frozen=True)
class Entry:
    """A model, and the folds of which it has seen nothing."""

    name: str
    file: str  # in WEIGHTS
    folds: tuple[str, ...]
    network: str = "streetnet"  # "" = the file is a folder, of a saved pipeline
    scale: float = 1.0  # of the images that it gets
    start: str | None = None  # weights that `train` begins with
    without: str = ""  # patterns of the frames that `train` leaves out; "" = it makes no such file
    steps: int = 60  # of `train`
    what: str = ""

    def build(self, folder):
        if not self.network:
            return pyseg.load(folder / self.file).model
        return pyseg.models.create(self.network, weights=folder / self.file)

    def logits(self, model, image):
        if self.scale != 1:
            size = [round(side * self.scale) for side in image.shape[1:]]
            small = interpolate(
                image[None].float(), size, mode="bilinear", antialias=True, align_corners=False
            )
            image = small[0].round().clamp(0, 255).to(torch.uint8)
        return model.predict([image])[0].logits


def compared(name, folder, what):
    return Entry(name, f"compare/{folder}", ("validation",), network="", scale=0.4, what=what)


MODELS = (
    Entry(
        "streetnet",
        "holdout.safetensors",
        HELD_OUT,
        what="the weights of `make weights` that have not seen the hold-outs",
    ),
    Entry(
        "streetnet at half resolution",
        "holdout.safetensors",
        HELD_OUT,
        scale=0.5,
        what="the same weights",
    ),
    Entry(
        "weak streetnet",
        "weak.safetensors",
        HELD_OUT,
        without="hold-outs",
        steps=120,
        what="120 steps from random weights",
    ),
    *(
        Entry(
            f"streetnet without {drive}",
            weights_of(Path(), drive, SEEDS[0]).name,
            (f"drive {drive}", *(("validation",) if drive == VALIDATION else ())),
            what="of `benchmarks/drives.py`, a minute from ImageNet's trunk",
        )
        for drive in DRIVES
    ),
    Entry(
        "streetnet without 0001TP, 60 steps",
        "without_0001TP.safetensors",
        ("drive 0001TP",),
        start="imagenet",
        without="0001TP_*",
        what="60 steps from ImageNet's trunk, no frame of that drive",
    ),
    compared("fpn_efficientnet_lite0", "fpn_efficientnet_lite0", "ImageNet's trunk"),
    compared("fcn_resnet18", "fcn_resnet18", "random weights"),
    compared("FCN-8s", "fcn8s", "random weights"),
    Entry(
        "fcn_resnet50",
        "fcn_resnet50.safetensors",
        HELD_OUT,
        network="fcn_resnet50",
        what="no weights of ResNet-50 were at hand, and it is too slow to train here",
    ),
)


def refiners(folder):
    """Refiners by name: a function of an image and a prediction, and what it is in words."""
    crf, segfix = CRF(), SegFix(shared=False)
    stages = {
        "none": [],
        "crf_pydensecrf": [refiner("crf_pydensecrf")],
        "crf(protect=0)": [CRF(protect=0)],
        "crf": [crf],
        "segfix": [segfix],
        "segfix+crf": [segfix, crf],
    }
    if (folder / "crf.safetensors").exists():
        stages[TRAINED] = [CRF(trainable=True, weights=folder / "crf.safetensors")]
    return {name: (chain(each), " + ".join(map(repr, each))) for name, each in stages.items()}


def chain(stages):
    def refine(image, prediction):
        for stage in stages:
            prediction = stage.refine(image, prediction)
        return prediction

    return refine


def samples_of(root, labelmefacade=None):
    data = folds(root)
    data["day"], data["validation"] = data["day"][::2], data["validation"][::8]
    if labelmefacade is not None:
        data["other cities"] = cities(labelmefacade)[::4]
    for drive in DRIVES:
        data[f"drive {drive}"] = frames_of(root, drive, FRAMES)
    return data


def make(given):
    """The networks of some steps."""
    given.weights.mkdir(parents=True, exist_ok=True)
    for entry in MODELS:
        path = given.weights / entry.file
        if not entry.without or path.exists():
            continue
        run = given.weights / "runs" / path.stem
        model = pyseg.models.create(entry.network, weights=entry.start)
        begun = time.process_time()
        train(
            model,
            CamVid(given.root, "train", without=entry.without),
            output_dir=run,
            epochs=entry.steps // 60,
            steps=60,
            batch_size=BATCH,
            resume=(run / "checkpoint.pt").exists(),
        )
        print(f"{entry.name}: {time.process_time() - begun:.0f} s of a processor")
        (run / "model.safetensors").rename(path)


def fit(given):
    """A crf trained on the validation clip, behind the network that does not know its drive."""
    entry = next(one for one in MODELS if one.name == f"streetnet without {VALIDATION}")
    pipeline = pyseg.compose(entry.build(given.weights))
    clip = CamVid(given.root, "val")
    found = train_crf(pipeline, clip, clip, limit=8, epochs=3)
    save_state(given.weights / "crf.safetensors", found.pipeline.refiners[-1].state_dict())


def digest(path):
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def predictions(entry, place, samples, given):
    """Predictions of a fold, from the cache or into it."""
    path = given.cache / "logits" / f"{place}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        model = entry.build(given.weights)
        found = {s.name: entry.logits(model, s.image).half() for s in samples}
        save_state(path, found)
    stored = load_state(path)
    return [
        Segmentation(tuple(s.image.shape[1:]), CAMVID_CLASSES, logits=stored[s.name].float())
        for s in samples
    ]


def score(given):
    data = samples_of(given.root, given.labelmefacade)
    chosen = refiners(given.weights)
    own = load_state(SEGFIX)  # the refiner's own network: the head is not asked
    own = b"".join(v.numpy().tobytes() for k, v in own.items() if k.startswith("network."))
    segfix = hashlib.sha256(own).hexdigest()[:12]
    trained = given.weights / "crf.safetensors"
    stored = read_json(OUTPUT) if OUTPUT.exists() else {}
    options = {name: options for name, (_, options) in chosen.items()}
    if not trained.exists() and TRAINED in stored.get("refiners", {}):
        options[TRAINED] = stored["refiners"][TRAINED]  # of rows that stay
    rows, absent, kept = [], [], []
    for entry in MODELS:
        path = given.weights / entry.file
        if not path.exists():
            if before := earlier_rows(entry.name, stored, options, segfix):
                rows += before
                kept.append(entry.name)
                continue
            absent.append({"model": entry.name, "file": entry.file, "what": entry.what})
            print(f"absent: {entry.name}, {entry.file}")
            continue
        for fold in entry.folds:
            samples = data[fold]
            frames = hashlib.sha256(" ".join(s.name for s in samples).encode()).hexdigest()[:12]
            place = f"{entry.name} {digest(path)} {fold} {frames}"
            seen = predictions(entry, place, samples, given)
            states = {}
            for name, (refine, told) in chosen.items():
                if name == TRAINED and fold == FITTED:
                    continue
                said = f"{told} {segfix if 'segfix' in name else ''}"
                said += digest(trained) if "trained" in name else ""
                mark = hashlib.sha256(said.encode()).hexdigest()[:12]
                file = given.cache / "states" / f"{place} {name} {mark}.pt"
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with replacing(file) as draft:
                        torch.save(counted(refine, samples, seen, fold), draft)
                states[name] = torch.load(file)
            counts = draws(len(samples), RESAMPLES, seed=0)
            counts = torch.cat([torch.ones_like(counts[:1]), counts])
            for name in states:
                row = compare(CAMVID_CLASSES, states[name], states["none"], counts)
                where = {"model": entry.name, "fold": fold, "images": len(samples)}
                rows.append({**where, "refiner": name, **row})
                told = " ".join(f"{row[k][0]:+.2f}" for k in ("delta_miou", "delta_boundary_iou"))
                print(f"{entry.name:28} {fold:13} {name:28} {row['miou']:.4f} {told}", flush=True)
    models = {e.name: e.what for e in MODELS}
    write_json(
        OUTPUT,
        {
            "command": "python benchmarks/refiners.py score CAMVID WEIGHTS",
            "models": models,
            "refiners": options,
            "absent": absent,
            "earlier": kept,  # models whose weights are no longer at hand: rows of an earlier run
            "segfix": segfix,  # first digits of the SHA-256 of its network
            "ms": stored.get("ms"),
            "thin": stored.get("thin", []),
            "rows": rows,
        },
    )


def earlier_rows(model, stored, options, segfix):
    """Rows that an earlier run has left of a model, with the refiners that there are now."""
    rows = [one for one in stored.get("rows", []) if one["model"] == model]
    for name in {one["refiner"] for one in rows}:
        same = stored["refiners"][name] == options.get(name)
        if not same or ("segfix" in name and stored["segfix"] != segfix):
            raise SystemExit(f"{name} is another than in the stored run: {model} is to be scored")
    return rows


def counted(refine, samples, given, fold):
    """What `states_of` counts, of predictions that are there."""
    at = iter(given)
    scored = {"scored": common} if fold == "other cities" else {}

    class Stored:
        classes = CAMVID_CLASSES

    found = states_of(Stored, lambda model, image: next(at), {"it": refine}, samples, **scored)
    return found["it"]


def thin(given):
    """IoU of thin and small classes behind streetnet: variants of the image, and `crf`."""
    data, model, crf = samples_of(given.root), MODELS[0].build(given.weights), CRF()
    rows = []
    for fold in HELD_OUT[:3]:  # other cities' labels know none of these classes
        for tta in VARIANTS:
            metrics = {name: Semantic(CAMVID_CLASSES) for name in ("none", "crf")}
            for sample in data[fold]:
                prediction = model.predict([sample.image], tta=tta)[0]
                metrics["none"].update(prediction, sample)
                metrics["crf"].update(crf.refine(sample.image, prediction), sample)
            for name, metric in metrics.items():
                found = metric.compute()
                scores = {c: round(100 * found["per_class"][c]["iou"], 2) for c in THIN}
                row = {"fold": fold, "tta": tta, "refiner": name, "iou": scores}
                rows.append({**row, "miou": round(100 * found["miou"], 2)})
                print(rows[-1], flush=True)
    stored = read_json(OUTPUT) if OUTPUT.exists() else {}
    write_json(OUTPUT, {**stored, "thin": rows})


def thin_table(rows):
    yield "| fold | `tta` | refiner | mIoU | " + " | ".join(THIN) + " |"
    yield "|---" * (4 + len(THIN)) + "|"
    for row in rows:
        cells = [f"{row['iou'][name]:.1f}" for name in THIN]
        shown = f"`{row['tta']}`" if row["tta"] else "none"
        told = f"| {row['fold']} | {shown} | {row['refiner']} | {row['miou']:.2f} |"
        yield f"{told} {' | '.join(cells)} |"


def labels_of(prediction):
    return prediction.labels


def measure(given):
    """Milliseconds of each refiner behind streetnet, on one image after the other."""
    entry = next(one for one in MODELS if (given.weights / one.file).exists())
    fold = entry.folds[0]
    samples = samples_of(given.root)[fold][: given.images]
    model = entry.build(given.weights)
    seen = [model.predict([s.image])[0] for s in samples]
    times = {"streetnet": []} | {name: [] for name in refiners(given.weights) if name != "none"}
    chosen = refiners(given.weights)
    for sample, prediction in zip(samples, seen, strict=True):
        for name in times:
            begun = time.perf_counter()
            if name == "streetnet":
                labels_of(model.predict([sample.image])[0])
            else:
                labels_of(chosen[name][0](sample.image, replace(prediction, _labels=None)))
            times[name].append(1000 * (time.perf_counter() - begun))
    stored = read_json(OUTPUT)
    stored["ms"] = {
        "model": entry.name,
        "threads": torch.get_num_threads(),
        "images": len(samples),
        "medians": {name: round(statistics.median(t), 1) for name, t in times.items()},
    }
    write_json(OUTPUT, stored)
    print(stored["ms"])


def score_table(stored):
    rows = stored["rows"]
    names = [name for name in stored["refiners"] if name != "none"]

    def points(row, key):
        value, low, high = row[key]
        return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"

    yield "| model | fold | mIoU | " + " | ".join(f"`{name}`" for name in names) + " |"
    yield "|---" * (3 + len(names)) + "|"
    by_place = {}
    for row in rows:
        by_place.setdefault((row["model"], row["fold"]), {})[row["refiner"]] = row
    for (model, fold), found in by_place.items():
        cells = [points(found[name], "delta_miou") if name in found else "" for name in names]
        yield f"| {model} | {fold} | {found['none']['miou']:.3f} | {' | '.join(cells)} |"

    every = [[f[name]["delta_miou"][0] for f in by_place.values() if name in f] for name in names]
    for label, pick in (("mean", statistics.mean), ("worst", min)):
        cells = [
            f"**{pick(each):+.2f}**" + ("" if len(each) == len(by_place) else f" of {len(each)}")
            for each in every
        ]
        yield f"| **{label}** | {len(by_place)} pairs | | {' | '.join(cells)} |"
    yield ""
    yield "Boundary IoU and the classes that are thin or small, in points, as means over these"
    yield "pairs, with the worst pair in brackets:"
    yield ""
    times = (stored["ms"] or {"medians": {}})["medians"]
    timed = " ms |" if times else ""
    yield "| refiner | boundary IoU | " + " | ".join(THIN) + " |" + timed
    yield "|---" * (2 + len(THIN) + bool(times)) + "|"
    for name in names:
        cells = []
        places = [f[name] for f in by_place.values() if name in f]
        deltas = [row["delta_boundary_iou"][0] for row in places]
        cells.append(f"{statistics.mean(deltas):+.2f} ({min(deltas):+.2f})")
        for label in THIN:
            each = [row["delta_per_class"].get(label) for row in places]
            each = [delta[0] for delta in each if delta is not None]
            cells.append(f"{statistics.mean(each):+.2f} ({min(each):+.2f})")
        took = f" {times.get(name, '')} |" if times else ""
        yield f"| `{name}` | {' | '.join(cells)} |{took}"
    if stored["absent"]:
        yield ""
        told = "; ".join(f"{a['model']} ({a['what']})" for a in stored["absent"])
        yield f"Not scored, since its weights are absent: {told}."


def page_tables():
    stored = read_json(OUTPUT)
    return {"score": score_table(stored), "thin": thin_table(stored["thin"])}


def write_tables(given):
    pages.write_parts(PAGE, SCRIPT, page_tables())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for function in (make, fit, score, thin, measure):
        name = {make: "train", measure: "time"}.get(function, function.__name__)
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("root", type=Path, help="folder of CamVid")
        command.add_argument("weights", type=Path, help="folder of the models' weights")
        if name == "score":
            command.add_argument("--labelmefacade", type=Path, required=True, help="its folder")
            command.add_argument("--cache", type=Path, required=True, help="folder for logits")
        if name == "time":
            command.add_argument("--images", type=int, default=5)
    commands.add_parser("table").set_defaults(function=write_tables)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.function(given)


if __name__ == "__main__":
    main()
