"""What `sam` gains behind a streetnet of unseen drives, and what it costs: ``results/sam.json``.

    python benchmarks/sam.py train ../shared/data/camvid WEIGHTS
    python benchmarks/sam.py score ../shared/data/camvid WEIGHTS
    python benchmarks/sam.py time
    python benchmarks/sam.py table

``train`` makes in minutes, in the folder WEIGHTS, a streetnet that has seen neither two drives of
CamVid's training frames nor its validation clip. ``score`` runs the refiners behind it on frames of
these three; nano has seen masks of the two drives, not of the validation clip. ``oracle`` in place
of a segmenter answers each prompt with the component of the ground truth that fits it best: the
ceiling. ``time`` measures what the refiner takes beside the network, and ``table`` writes the
tables of docs/sam.md. Intervals of differences are of a bootstrap over images, 2000 resamples.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from segfix import compare, states_of

import pyseg
from pyseg.classes import CAMVID_CLASSES
from pyseg.datasets.camvid import CamVid
from pyseg.files import read_json, write_json
from pyseg.metrics.bootstrap import draws
from pyseg.promptable import load_sam
from pyseg.promptable.nano import load_nano
from pyseg.refiners import CRF, SegFix
from pyseg.refiners.sam import SamRefiner, is_stuff
from pyseg.refiners.sam_prompts import Style, prompt_components, stack_prompts
from pyseg.training import train
from pyseg.types import Segmentation

ROOT = Path(__file__).parent.parent
OUTPUT = Path(__file__).parent / "results" / "sam.json"
PAGE = ROOT / "docs" / "sam.md"
WEIGHTS = "without_two_drives.safetensors"
DRIVES = {"drive 0001TP": "0001TP_*", "drive 0006R0": "0006R0_*"}
STEPS = 120
FRAMES = 4  # of each fold, evenly spread
THIN = ("Pole", "SignSymbol")
SHOWN = (*THIN, "Pedestrian", "Bicyclist", "Car")
RESAMPLES = 2000
STYLES = {  # of prompts
    "ours": {},
    "elastic box": {"box": "elastic"},
    "Gaussian mask": {"mask_prompt": "gaussian"},
    "split, then merge": {"merge": True},
    "SAMRefiner's, all three": {"box": "elastic", "mask_prompt": "gaussian", "merge": True},
}
PROMPTS = 200
OPEN = {
    "predicted_iou": -float("inf"),
    "component_iou": 0.0,
    "area_ratio": float("inf"),
    "agreement": 0.0,
    "outline": 9.0,
    "displacement": float("inf"),
}


class Oracle:
    """A segmenter that knows the ground truth [H, W]."""

    def __init__(self, labels):
        self.index = components(labels)
        self.areas = torch.bincount(self.index.flatten())

    def embed(self, image):
        return None

    def predict(self, embedding, prompts):
        if prompts.masks is None:  # the component at a point
            x, y = prompts.points[:, 0].round().long().clamp(min=0).T
            height, width = self.index.shape
            ids = self.index[y.clamp(max=height - 1), x.clamp(max=width - 1)]
        else:
            ids = torch.tensor(
                [best(self.index, self.areas, mask > 0)[0] for mask in prompts.masks]
            )
        found = (self.index == ids[:, None, None]) & (ids > 0)[:, None, None]
        return torch.where(found, 10.0, -10.0), torch.ones(len(ids))

    def upsample(self, embedding, logits):
        return logits


def components(labels):
    """8-connected components of all classes, numbered from 1 on; 0 = void; [H, W]."""
    from scipy import ndimage

    index, count = torch.zeros(labels.shape, dtype=torch.int64), 0
    for k in range(len(CAMVID_CLASSES)):
        found, number = ndimage.label((labels == k).numpy(), structure=torch.ones(3, 3).numpy())
        found = torch.from_numpy(found).long()
        index = torch.where(found > 0, found + count, index)
        count += number
    return index


def best(index, areas, mask):
    """The component that fits a mask best, and its IoU; 0 where none does."""
    overlap = torch.bincount(index[mask], minlength=len(areas))
    iou = overlap / (areas + mask.sum() - overlap)
    iou[0] = 0
    k = int(iou.argmax())
    return (k, float(iou[k])) if iou[k] > 0 else (0, 0.0)


def make(given):
    path = given.weights / WEIGHTS
    run = given.weights / "runs" / path.stem
    begun = time.process_time()
    train(
        pyseg.models.create("streetnet", weights="imagenet"),
        CamVid(given.root, "train", without=",".join(DRIVES.values())),
        output_dir=run,
        epochs=STEPS // 60,
        steps=60,
        batch_size=6,
        resume=(run / "checkpoint.pt").exists(),
    )
    print(f"{time.process_time() - begun:.0f} s of a processor")
    (run / "model.safetensors").rename(path)


def samples_of(root):
    sets = {"validation": CamVid(root, "val")}
    sets |= {fold: CamVid(root, "train", only=only) for fold, only in DRIVES.items()}
    return {
        fold: [whole[k * len(whole) // FRAMES] for k in range(FRAMES)]
        for fold, whole in sets.items()
    }


def stages(nano):
    """Refiners by name; of "oracle" a function of the segmenter that knows the truth."""
    crf, segfix = CRF(), SegFix(shared=False)
    loose = {"predicted_iou": 0.7}
    sam = SamRefiner(nano)

    def oracle(**options):
        return lambda segmenter: [SamRefiner(segmenter, **options)]

    return {
        "none": [],
        "crf": [crf],
        "segfix": [segfix],
        "sam(nano)": [sam],
        "crf+sam(nano)": [crf, sam],
        "sam(nano, mode='auto')": [SamRefiner(nano, mode="auto")],
        "oracle": oracle(),
        "oracle, mode='auto'": oracle(mode="auto"),
        "oracle, merge": oracle(merge=True),
        "oracle, seeds": oracle(seeds=THIN),
        "sam(nano), seeds": [SamRefiner(nano, seeds=THIN)],
        **{
            f"sam(nano, predicted_iou=0.7), {name}": [SamRefiner(nano, **loose, **options)]
            for name, options in STYLES.items()
        },
        "sam(nano, predicted_iou=0.7), seeds": [SamRefiner(nano, **loose, seeds=THIN)],
    }


def quality(nano, sample, prediction):
    """Of every component that is prompted for: IoU with the component of the ground truth that it
    fits best, before, and of nano's mask, by style."""
    index = components(sample.labels)
    areas = torch.bincount(index.flatten())
    embedding = nano.embed(sample.image)
    class_ids = [k for k, name in enumerate(CAMVID_CLASSES) if not is_stuff(name)]
    found = {}
    for name, options in STYLES.items():
        prompts, _ = prompt_components(
            prediction.labels.numpy(),
            class_ids,
            64,
            style=Style(**options),
            features=nano.features(embedding).numpy(),
        )
        whole = [p for p in prompts if p.strip[0] == -p.strip[1]]  # no tiles
        rows = found[name] = []
        for begin in range(0, len(whole), 16):
            stacked = stack_prompts(whole[begin : begin + 16], prediction.size)
            masks = nano.upsample(embedding, nano.predict(embedding, stacked)[0]) > 0
            for mask, region in zip(masks, stacked.masks > 0, strict=True):
                k, iou = best(index, areas, region)
                if k:
                    overlap = int((mask & (index == k)).sum())
                    rows.append((iou, overlap / int((mask | (index == k)).sum())))
    return found


def score(given):
    torch.set_num_threads(1)
    model = pyseg.models.create("streetnet", weights=given.weights / WEIGHTS)
    nano = load_nano()
    chosen = stages(nano)
    rows, prompts = [], []
    counts = draws(FRAMES, RESAMPLES, seed=0)
    counts = torch.cat([torch.ones_like(counts[:1]), counts])
    for fold, samples in samples_of(given.root).items():
        states, styles = {name: [] for name in chosen}, {name: [] for name in STYLES}
        for sample in samples:
            prediction = model.predict([sample.image])[0]
            oracle = Oracle(sample.labels)

            def refined(made, image=sample.image, start=prediction, segmenter=oracle):
                result = start
                for stage in made(segmenter) if callable(made) else made:
                    result = stage.refine(image, result)
                return result

            each = {
                name: lambda image, start, made=made, refined=refined: refined(made)
                for name, made in chosen.items()
            }
            for name, state in states_of(
                model, lambda model, image, given=prediction: given, each, [sample]
            ).items():
                states[name] += state
            for name, pairs in quality(nano, sample, prediction).items():
                styles[name] += pairs
        for name, state in states.items():
            row = compare(CAMVID_CLASSES, state, states["none"], counts)
            rows.append({"fold": fold, "images": FRAMES, "refiner": name, **row})
            told = " ".join(f"{row['delta_per_class'][n][0]:+.2f}" for n in THIN)
            print(f"{fold:13} {name:45} {row['delta_miou'][0]:+.2f}  {told}", flush=True)
        for name, pairs in styles.items():
            before, after = (round(statistics.mean(p[k] for p in pairs), 4) for k in (0, 1))
            row = {"style": name, "fold": fold, "regions": len(pairs)}
            prompts.append({**row, "before": before, "after": after})
            print(prompts[-1], flush=True)
        stored = read_json(OUTPUT) if OUTPUT.exists() else {}
        write_json(OUTPUT, {**stored, "rows": rows, "prompts": prompts})


class Timed:
    """A segmenter that counts the seconds in its network."""

    def __init__(self, segmenter):
        self.segmenter, self.seconds = segmenter, {"embed": 0.0, "predict": 0.0}

    def _timed(self, name, *given):
        begun = time.perf_counter()
        found = getattr(self.segmenter, name)(*given)
        self.seconds[name] += time.perf_counter() - begun
        return found

    def embed(self, image):
        return self._timed("embed", image)

    def predict(self, embedding, prompts):
        return self._timed("predict", embedding, prompts)

    def upsample(self, embedding, logits):
        return self.segmenter.upsample(embedding, logits)


def discs(size=(360, 480)):
    """A prediction of `PROMPTS` discs of two classes on a ground, and an image of noise."""
    rows, columns = 10, PROMPTS // 10
    y, x = (torch.arange(side) for side in size)
    cell = size[0] // rows, size[1] // columns
    dy, dx = (y % cell[0] - cell[0] // 2)[:, None], x % cell[1] - cell[1] // 2
    inside = (dy.square() / (cell[0] / 3) ** 2 + dx.square() / (cell[1] / 3) ** 2) < 1
    inside &= (y < rows * cell[0])[:, None] & (x < columns * cell[1])
    kind = (y // cell[0] % 2)[:, None]
    truth = torch.where(inside, 1 + kind, 0)
    logits = torch.nn.functional.one_hot(truth, 3).permute(2, 0, 1)[None].float()
    logits = 4 * torch.nn.functional.avg_pool2d(logits, 5, 1, 2)[0]
    prediction = Segmentation(size, ("road", "car", "person"), logits=logits)
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8), prediction


def measure(given):
    """Seconds in the network and beside it; every mask passes the gate, so nothing is saved."""
    image, prediction = discs()
    made = {"nano": load_nano, "sam vit_b": lambda: load_sam(None, "vit_b")[1]}
    stored = read_json(OUTPUT) if OUTPUT.exists() else {}
    found = stored.get("seconds", {})
    for name in given.networks.split(","):
        timed = Timed(made[name]())
        refiner = SamRefiner(timed, min_area=16, **OPEN)
        every = []
        for _ in range(given.rounds):
            timed.seconds = dict.fromkeys(timed.seconds, 0.0)
            begun = time.perf_counter()
            refiner.refine(image, prediction)
            whole = time.perf_counter() - begun
            every.append({**timed.seconds, "rest": whole - sum(timed.seconds.values())})
        medians = {key: statistics.median(one[key] for one in every) for key in every[0]}
        found[name] = {key: round(value, 3) for key, value in medians.items()}
        network = medians["embed"] + medians["predict"]
        print(f"{name}: {found[name]}, beside the network {100 * medians['rest'] / network:.1f} %")
    write_json(OUTPUT, {**stored, "seconds": found})


def points(row, key="delta_miou"):
    value, low, high = row[key]
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def tables(stored):
    """Tables of docs/sam.md by their marks."""
    yield "time", time_table(stored)
    if "rows" not in stored:
        return
    rows = stored["rows"]
    folds = list(dict.fromkeys(row["fold"] for row in rows))
    by = {(row["refiner"], row["fold"]): row for row in rows}
    names = [name for name in dict.fromkeys(row["refiner"] for row in rows) if name != "none"]
    plain = " | ".join(f"{f} ({100 * by['none', f]['miou']:.1f})" for f in folds)
    lines = [f"| mIoU after | {plain} | {' | '.join(SHOWN)} |"]
    lines.append("|---" * (1 + len(folds) + len(SHOWN)) + "|")
    for name in names:
        cells = [points(by[name, fold]) for fold in folds]
        for label in SHOWN:
            each = [by[name, f]["delta_per_class"].get(label) for f in folds]
            each = [one[0] for one in each if one is not None]
            cells.append(f"{statistics.mean(each):+.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    yield "score", lines
    lines = ["| prompts | " + " | ".join(folds) + " |", "|---" * (1 + len(folds)) + "|"]
    for name in STYLES:
        each = {row["fold"]: row for row in stored["prompts"] if row["style"] == name}
        cells = [
            f"{each[f]['before']:.3f} → {each[f]['after']:.3f} ({each[f]['regions']})"
            for f in folds
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    yield "prompts", lines


def time_table(stored):
    lines = [f"| {PROMPTS} prompts | embed | predict | the rest |", "|---|---|---|---|"]
    for name, seconds in stored.get("seconds", {}).items():
        network = seconds["embed"] + seconds["predict"]
        lines.append(
            f"| {name} | {seconds['embed']:.2f} s | {seconds['predict']:.2f} s | "
            f"{seconds['rest']:.2f} s, {100 * seconds['rest'] / network:.0f} % |"
        )
    return lines


def write_tables(given):
    page = PAGE.read_text()
    for key, lines in tables(read_json(OUTPUT)):
        begin, end = f"<!-- by benchmarks/sam.py {key} -->", f"<!-- {key} until here -->"
        before, rest = page.split(begin)
        _, after = rest.split(end)
        page = "\n".join([f"{before}{begin}", *lines, f"{end}{after}"])
    PAGE.write_text(page)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, function in (("train", make), ("score", score)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("root", type=Path, help="folder of CamVid")
        command.add_argument("weights", type=Path, help="folder of the model's weights")
    command = commands.add_parser("time")
    command.set_defaults(function=measure)
    command.add_argument("--networks", default="nano,sam vit_b")
    command.add_argument("--rounds", type=int, default=1)
    commands.add_parser("table").set_defaults(function=write_tables)
    given = parser.parse_args()
    given.function(given)


if __name__ == "__main__":
    main()
