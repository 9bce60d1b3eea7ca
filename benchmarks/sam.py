"""What `sam` gains behind a streetnet of unseen drives, and what it costs: ``results/sam.json``.

    python benchmarks/sam.py score ../shared/data/camvid WEIGHTS
    python benchmarks/sam.py time
    python benchmarks/sam.py table

WEIGHTS is the folder that `benchmarks/drives.py` fills. ``score`` runs the refiners on frames of
each fold, behind the networks that have seen nothing of it, keeps in WEIGHTS what it counted of
each image, and writes the JSON after each network, so that a run that was stopped goes on; of
seeds and folds it takes those whose weights are there. Perfect masks are the components of the
ground truth: each prompt is answered with the one that fits it best, or all of them vote.
``time`` measures what the refiner takes beside the network, and ``table`` writes the tables of
docs/sam.md. Differences are means over seeds, with intervals of a bootstrap over images, 2000
resamples, the same images for all seeds.
"""

import argparse
import hashlib
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pages
import torch
from drives import FOLDS, SEEDS, digest, frames_of, weights_of
from segfix import difference, ious, state_of

import pyseg
from pyseg.classes import CAMVID_CLASSES
from pyseg.files import read_json, replacing, write_json
from pyseg.fusion import fuse
from pyseg.metrics.bootstrap import draws, total_of
from pyseg.promptable import load_sam
from pyseg.promptable.nano import load_nano
from pyseg.refiners import CRF, SegFix
from pyseg.refiners.sam import SamRefiner
from pyseg.types import Segmentation

ROOT = Path(__file__).parent.parent
OUTPUT = Path(__file__).parent / "results" / "sam.json"
PAGE = ROOT / "docs" / "sam.md"
SCRIPT = "benchmarks/sam.py"
FRAMES = 12  # of each fold, evenly spread
LEAST = 16  # pixels of a component of the ground truth that votes
THIN = ("Pole", "SignSymbol")
SHOWN = (*THIN, "Pedestrian", "Bicyclist", "Car")
LONGER = "trained for twice as long"
RESAMPLES = 2000
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
            ids = torch.tensor([best(self.index, self.areas, mask > 0) for mask in prompts.masks])
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
    """The component that fits a mask best; 0 where none does."""
    overlap = torch.bincount(index[mask], minlength=len(areas))
    iou = overlap / (areas + mask.sum() - overlap)
    iou[0] = 0
    return int(iou.argmax())


@dataclass(frozen=True)
class Perfect:
    """Masks of the ground truth: they answer the refiner's prompts, or all vote."""

    seeds: tuple[str, ...] = ()
    votes: bool = False

    def refine(self, sample, prediction):
        if not self.votes:
            refiner = SamRefiner(Oracle(sample.labels), seeds=self.seeds)
            return refiner.refine(sample.image, prediction)
        index = components(sample.labels)
        areas = torch.bincount(index.flatten())
        areas[0] = 0
        return fuse(prediction, (index == k for k in (areas >= LEAST).nonzero()))

    def config(self):
        return asdict(self)


def stages(nano):
    """What may come behind the network, by name."""
    crf, segfix, sam = CRF(), SegFix(shared=False), SamRefiner(nano)
    loose = {"predicted_iou": 0.7}  # SAM's own
    published = {"box": "elastic", "mask_prompt": "gaussian", "merge": True}  # SAMRefiner's
    return {
        "crf": [crf],
        "segfix": [segfix],
        "segfix+crf": [segfix, crf],
        "sam(nano)": [sam],
        "crf+sam(nano)": [crf, sam],
        "sam(nano, predicted_iou=0.7)": [SamRefiner(nano, **loose)],
        "sam(nano, predicted_iou=0.7, seeds)": [SamRefiner(nano, **loose, seeds=THIN)],
        "sam(nano, predicted_iou=0.7, SAMRefiner's prompts)": [
            SamRefiner(nano, **loose, **published)
        ],
        "perfect masks": [Perfect()],
        "perfect masks, seeds": [Perfect(seeds=THIN)],
        "perfect masks, votes": [Perfect(votes=True)],
    }


def counted(model, chosen, samples):
    """Of every pipeline and image its `state_of`, and milliseconds of a processor."""
    states, ms = {}, {}

    def keep(name, begun, prediction, sample):
        ms.setdefault(name, []).append(1000 * (time.process_time() - begun))
        states.setdefault(name, []).append(state_of(prediction, sample))

    for sample in samples:
        begun = time.process_time()
        start = model.predict([sample.image])[0]
        keep("none", begun, start, sample)
        for name, made in chosen.items():
            begun, result = time.process_time(), start
            for stage in made:
                if isinstance(stage, Perfect):
                    result = stage.refine(sample, result)
                    continue
                result = stage.refine(sample.image, result)
            keep(name, begun, result, sample)
    return {"states": states, "ms": ms}


def kept(path, compute):
    """What ``compute`` returns, from a file that an earlier run has left or into it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = compute()
        with replacing(path) as draft:
            torch.save(found, draft)
    return torch.load(path)


def compare(states, plain, counts):
    """Scores of the same images behind several seeds: each seed's, and mean differences."""
    pairs = [
        [ious(total_of(one, counts)) for one in both] for both in zip(states, plain, strict=True)
    ]
    (iou, edge), (iou_0, edge_0) = (
        [torch.stack([pair[k][which] for pair in pairs]) for which in (0, 1)] for k in (0, 1)
    )
    gain = 100 * (iou.nanmean(-1) - iou_0.nanmean(-1))[:, 0]
    return {
        "miou": [round(value, 5) for value in iou.nanmean(-1)[:, 0].tolist()],
        "deltas": [round(value, 3) for value in gain.tolist()],
        "delta_miou": difference(iou.nanmean(-1).mean(0), iou_0.nanmean(-1).mean(0)),
        "delta_boundary_iou": difference(edge.nanmean(-1).mean(0), edge_0.nanmean(-1).mean(0)),
        "delta_per_class": {
            name: difference(iou[..., k].mean(0), iou_0[..., k].mean(0))
            for k, name in enumerate(CAMVID_CLASSES)
            if not iou_0[:, 0, k].isnan().any()
        },
    }


def score(given):
    torch.set_num_threads(1)
    chosen = stages(load_nano())
    said = {name: [stage.config() for stage in made] for name, made in chosen.items()}
    mark = hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:12]
    counts = draws(FRAMES, RESAMPLES, seed=0)
    counts = torch.cat([torch.ones_like(counts[:1]), counts])
    found = {}  # of each fold and seed
    for seed in given.seeds:
        for fold in FOLDS:
            samples = None
            for longer in (False, True):
                path = weights_of(given.weights, fold, seed, longer)
                if not path.exists():
                    continue
                samples = samples or frames_of(given.root, fold, FRAMES)

                def compute(path=path, samples=samples, longer=longer):
                    model = pyseg.models.create("streetnet", weights=path)
                    return counted(model, {} if longer else chosen, samples)

                place = given.weights / "states" / f"{fold}_{digest(path)}_{mark}.pt"
                one = kept(place, compute)
                if longer:
                    own = found[fold, seed]
                    own["states"][LONGER] = one["states"]["none"]
                else:
                    found[fold, seed] = one
            if samples:
                write_json(OUTPUT, {**stored(), "rows": rows_of(found, counts)})
                print(f"{fold}, seed {seed}", flush=True)


def rows_of(found, counts):
    rows = []
    for fold in FOLDS:
        names = [name for (f, _), one in found.items() if f == fold for name in one["states"]]
        for name in dict.fromkeys(names):
            parts = {s: one for (f, s), one in found.items() if f == fold and name in one["states"]}
            row = {"fold": fold, "images": FRAMES, "refiner": name, "seeds": list(parts)}
            states = [one["states"][name] for one in parts.values()]
            row |= compare(states, [one["states"]["none"] for one in parts.values()], counts)
            times = [ms for one in parts.values() for ms in one["ms"].get(name, [])]
            rows.append({**row, "ms": round(statistics.median(times)) if times else None})
    return rows


def stored():
    return read_json(OUTPUT) if OUTPUT.exists() else {}


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
    found = stored().get("seconds", {})
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
    write_json(OUTPUT, {**stored(), "seconds": found})


def points(row, key="delta_miou"):
    value, low, high = row[key]
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def score_table(rows):
    """Differences of mIoU by fold, then means over folds."""
    by = {(row["refiner"], row["fold"]): row for row in rows}
    folds = [fold for fold in FOLDS if ("none", fold) in by]
    plain = [f"{f} ({100 * statistics.mean(by['none', f]['miou']):.1f})" for f in folds]
    head = ["", *plain, "mean", "worst", *SHOWN, "ms"]
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for name in dict.fromkeys(row["refiner"] for row in rows if row["refiner"] != "none"):
        found = [by[name, fold] for fold in folds if (name, fold) in by]
        cells = [points(by[name, fold]) if (name, fold) in by else "" for fold in folds]
        cells.append(f"{statistics.mean(row['delta_miou'][0] for row in found):+.2f}")
        cells.append(f"{min(min(row['deltas']) for row in found):+.2f}")
        for label in SHOWN:
            each = [row["delta_per_class"].get(label) for row in found]
            cells.append(f"{statistics.mean(one[0] for one in each if one is not None):+.2f}")
        times = [row["ms"] for row in found if row["ms"] is not None]
        cells.append(str(min(times)) if times else "")
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    for name in ("none", LONGER):
        seeds = {f: " ".join(map(str, by[name, f]["seeds"])) for f in folds if (name, f) in by}
        told = "; ".join(f"{fold}: {each}" for fold, each in seeds.items())
        yield f"Seeds of {'the networks' if name == 'none' else 'the control'}: {told or 'none'}."
    yield f"The network itself takes {min(by['none', fold]['ms'] for fold in folds)} ms."


def time_table(seconds):
    yield f"| {PROMPTS} prompts | embed | predict | the rest |"
    yield "|---|---|---|---|"
    for name, found in seconds.items():
        network = found["embed"] + found["predict"]
        yield (
            f"| {name} | {found['embed']:.2f} s | {found['predict']:.2f} s | "
            f"{found['rest']:.2f} s, {100 * found['rest'] / network:.0f} % |"
        )


TABLES = {"score": ("rows", score_table), "time": ("seconds", time_table)}


def page_tables():
    found = stored()
    return {name: table(found[key]) for name, (key, table) in TABLES.items() if key in found}


def write_tables(given):
    pages.write_parts(PAGE, SCRIPT, page_tables())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("score")
    command.set_defaults(function=score)
    command.add_argument("root", type=Path, help="folder of CamVid")
    command.add_argument("weights", type=Path, help="folder of the networks' weights")
    command.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    command = commands.add_parser("time")
    command.set_defaults(function=measure)
    command.add_argument("--networks", default="nano,sam vit_b")
    command.add_argument("--rounds", type=int, default=1)
    commands.add_parser("table").set_defaults(function=write_tables)
    given = parser.parse_args()
    given.function(given)


if __name__ == "__main__":
    main()
