"""nano's bundled weights: their scores beside GrabCut's and the random walker's, and their file.

``python benchmarks/nano.py score DATA``: DATA holds ``camvid``, ``labelmefacade`` and ``bsds500``.
Of images that nano was not trained on, one region each is asked for by a tight box and, anew, by
clicks, each where the method's own last answer is most wrong (`pyseg.training.promptable.
next_click`); scored is the IoU, all pixels of the image counted. All methods get the same regions,
boxes and first clicks, and the rule for the others, on images made smaller to 320 pixels, because
the classical ones take seconds an answer on larger ones. Written is ``pyseg/assets/nano.json``.

``python benchmarks/nano.py time``: milliseconds with two threads, added to that file.
``python benchmarks/nano.py table``: the card's table.
``python benchmarks/nano.py bundle RUN/model.safetensors``: stores weights in half precision where
the package has them.
"""

import argparse
import contextlib
import hashlib
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pages
import torch
from scipy import sparse
from scipy.sparse.linalg import cg
from torchvision.transforms.v2.functional import resize

from pyseg.datasets import BSDS500, CamVid, LabelMeFacade
from pyseg.files import read_json, write_json
from pyseg.metrics.bootstrap import draws
from pyseg.promptable import Prompts
from pyseg.promptable.nano import BUNDLED, load_nano
from pyseg.training.promptable import held_out_masks, per_mask

JSON = BUNDLED.with_suffix(".json")
COLUMNS = ("box", "1 click", "3 clicks", "5 clicks")
METHODS = ("nano", "GrabCut", "random walker")
SETS = ("CamVid val", "LabelMeFacade train", "BSDS500 val")
MASKS = 24  # of each data set, of as many images
RESAMPLES = 2000

DISC = 3  # pixels around a click that are sure
REACH = 0.1  # of the long side: around a click GrabCut begins with the object
BETA = 90  # Grady's
ITERATIONS = 5, 2  # of GrabCut: OpenCV's example's, and going on
LONG = 320  # pixels of the images' long side


def data_set(name, root):
    if name == "CamVid val":
        return CamVid(root / "camvid", "val")
    if name == "LabelMeFacade train":
        return LabelMeFacade(root / "labelmefacade", "train")
    return BSDS500(root / "bsds500", "val")


def smaller(regions):
    for name, image, mask in regions:
        factor = LONG / max(mask.shape)
        size = [round(side * factor) for side in mask.shape]
        image = resize(image, size, antialias=True)
        mask = torch.nn.functional.interpolate(mask[None, None].float(), size, mode="nearest-exact")
        yield name, image, mask[0, 0] > 0


def disc(shape, place, radius):
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (columns - place[0]) ** 2 + (rows - place[1]) ** 2 <= radius**2


def clicks_of(prompts):
    return list(zip(prompts.points[0].tolist(), prompts.point_labels[0].tolist(), strict=True))


def grabcut(image):
    """OpenCV's GrabCut (Rother et al., 2004); it goes on from its last answer as nano does.

    A box is its rectangle. A click is sure within `DISC` pixels; at the first one the object is
    probable within `REACH` around it, the rest of the image is probably none.
    """
    import cv2

    cv2.setNumThreads(1)
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy()[..., ::-1])
    shape = pixels.shape[:2]
    before = []

    def answer(prompts):
        cv2.setRNGSeed(0)
        models = np.zeros((1, 65)), np.zeros((1, 65))
        mask = np.full(shape, cv2.GC_PR_BGD, np.uint8)
        count = ITERATIONS[0]
        if prompts.boxes is not None:
            left, top, right, bottom = (int(v) for v in prompts.boxes[0])
            mask[:] = cv2.GC_BGD
            mask[top : bottom + 1, left : right + 1] = cv2.GC_PR_FGD
        else:
            clicks = clicks_of(prompts)
            if len(clicks) > 1:
                count = ITERATIONS[1]
            if len(clicks) > 1 and before[0].any():
                mask[before[0]] = cv2.GC_PR_FGD
            else:
                mask[disc(shape, clicks[0][0], REACH * max(shape))] = cv2.GC_PR_FGD
            for place, label in clicks:
                mask[disc(shape, place, DISC)] = cv2.GC_FGD if label else cv2.GC_BGD
        inside = (mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)
        if inside.any() and not inside.all():  # it needs pixels of both kinds
            cv2.grabCut(pixels, mask, None, *models, count, cv2.GC_INIT_WITH_MASK)
            inside = (mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)
        before[:] = [inside]
        return torch.from_numpy(inside)

    return answer


def random_walker(image):
    """Grady's random walker (PAMI 2006), its linear system solved by conjugate gradients.

    Of a box the middle third is the object, all outside is not. Clicks are sure within `DISC`
    pixels; the image's border is not the object, but for what a click on it is near to.
    """
    pixels = image.permute(1, 2, 0).numpy().astype(np.float64)
    shape = pixels.shape[:2]
    numbers = np.arange(pixels[..., 0].size).reshape(shape)
    ends, steps = [], []
    for axis in (0, 1):
        first, second = (
            np.take(numbers, range(a, shape[axis] - 1 + a), axis).ravel() for a in (0, 1)
        )
        ends.append((first, second))
        steps.append((np.diff(pixels, axis=axis) ** 2).sum(-1).ravel())
    one, two = (np.concatenate([pair[k] for pair in ends]) for k in (0, 1))
    step = np.concatenate(steps)
    weight = np.exp(-BETA * step / max(step.max(), 1)) + 1e-6
    adjacency = sparse.coo_matrix((weight, (one, two)), (numbers.size, numbers.size))
    adjacency = (adjacency + adjacency.T).tocsr()
    laplacian = (sparse.diags(np.asarray(adjacency.sum(1)).ravel()) - adjacency).tocsr()
    before = [np.full(numbers.size, 0.5)]

    def answer(prompts):
        seeds = np.full(shape, -1)
        if prompts.boxes is not None:
            left, top, right, bottom = (int(v) for v in prompts.boxes[0])
            seeds[:] = 0
            seeds[top : bottom + 1, left : right + 1] = -1
            height, width = bottom + 1 - top, right + 1 - left
            seeds[
                top + height // 3 : max(top + height // 3 + 1, bottom + 1 - height // 3),
                left + width // 3 : max(left + width // 3 + 1, right + 1 - width // 3),
            ] = 1
        else:
            border = np.ones(shape, bool)
            border[1:-1, 1:-1] = False
            clicks = clicks_of(prompts)
            for place, label in clicks:
                if label:
                    border &= ~disc(shape, place, REACH * max(shape))
            seeds[border] = 0
            for place, label in clicks:
                seeds[disc(shape, place, DISC)] = label
        known = seeds.ravel() >= 0
        found = seeds.ravel().astype(np.float64)
        if not known.all():
            rows = laplacian[~known]
            system, right_side = rows[:, ~known], -rows[:, known] @ found[known]
            inverse = sparse.diags(1 / system.diagonal())
            start = before[0][~known]
            found[~known] = cg(system, right_side, start, rtol=1e-3, maxiter=2000, M=inverse)[0]
        before[:] = [found]
        return torch.from_numpy((found > 0.5).reshape(shape))

    return answer


def scores(name, method, root, weights):
    """IoU of every region, by column; seconds per answer."""
    torch.set_num_threads(1)
    begin = {"GrabCut": grabcut, "random walker": random_walker}.get(method)
    segmenter = begin or load_nano(weights)
    regions = smaller(held_out_masks(data_set(name, root), limit=MASKS, per_image=1))
    start = time.perf_counter()
    found = per_mask(segmenter, regions)
    count = 6 * len(found["box"])  # a box and five clicks of each
    return found, round((time.perf_counter() - start) / count, 3)


def interval(one, other):
    """Mean difference and its 95 % interval over resampled regions, in points."""
    difference = 100 * (torch.tensor(one) - torch.tensor(other)).double()
    counts = draws(len(difference), RESAMPLES, seed=0).double()
    means = (counts @ difference) / len(difference)
    low, high = torch.tensor([0.025, 0.975]).double()
    ends = [means.quantile(q).item() for q in (low, high)]
    return [round(value, 2) for value in (difference.mean().item(), *ends)]


def score(given):
    methods = given.methods.split(",") if given.methods else METHODS
    jobs = [(name, method) for method in reversed(METHODS) for name in SETS if method in methods]
    stored = read_json(given.json) if given.json.exists() else {}
    rows = {(row["data"], row["method"]): row for row in stored.get("rows", ())}
    with ProcessPoolExecutor(given.processes) as pool:
        waiting = {job: pool.submit(scores, *job, given.data, given.weights) for job in jobs}
        for (name, method), job in waiting.items():
            values, seconds = job.result()
            row = {"data": name, "method": method, "masks": len(values["box"])}
            row |= {key: round(float(np.mean(values[key])), 4) for key in COLUMNS}
            row["seconds per answer"] = seconds
            row["iou"] = {key: [round(value, 4) for value in values[key]] for key in COLUMNS}
            rows[name, method] = row
            print({key: value for key, value in row.items() if key != "iou"}, flush=True)
    for (name, method), row in rows.items():
        if method != "nano" and (name, "nano") in rows:
            ours, theirs = rows[name, "nano"]["iou"], row["iou"]
            row["nano's gain"] = {key: interval(ours[key], theirs[key]) for key in COLUMNS}
            print(name, method, row["nano's gain"])
    if given.weights == "bundled" and "nano" in methods:
        stored["sha256"] = hashlib.sha256(BUNDLED.read_bytes()).hexdigest()
    order = sorted(rows, key=lambda key: (SETS.index(key[0]), METHODS.index(key[1])))
    stored |= {"command": "python benchmarks/nano.py score DATA"}
    write_json(given.json, {**stored, "rows": [rows[key] for key in order]})


def timing(given):
    """Medians in milliseconds, fp32 and bf16 in turns."""
    torch.set_num_threads(given.threads)
    nano = load_nano(given.weights)
    found = {}
    for height, width in ((512, 512), (360, 480)):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)

        def prompts(count, masks=False, height=height, width=width):
            corners = torch.tensor([0.2, 0.3, 0.6, 0.7]) * torch.tensor([width, height] * 2)
            return Prompts(
                (corners[:2] + 20).expand(count, 2, 2),
                torch.tensor([[1, 0]]).expand(count, 2),
                corners.expand(count, 4),
                torch.zeros(count, height, width) if masks else None,
            )

        embedding = nano.embed(image)
        one, full, many = prompts(1), prompts(1, True), prompts(16, True)
        jobs = {
            "embed": lambda image=image: nano.embed(image),
            "box and points": lambda e=embedding, p=one: nano.predict(e, p),
            "box, points and mask": lambda e=embedding, p=full: nano.predict(e, p),
            "16 of these, each": lambda e=embedding, p=many: nano.predict(e, p),
        }
        times = {(job, kind): [] for job in jobs for kind in ("fp32", "bf16")}
        for _ in range(given.rounds + 1):
            for job, function in jobs.items():
                for kind in ("fp32", "bf16"):
                    context = (
                        torch.autocast("cpu", torch.bfloat16)
                        if kind == "bf16"
                        else contextlib.nullcontext()
                    )
                    with context:
                        start = time.perf_counter()
                        function()
                        times[job, kind].append(time.perf_counter() - start)
        for (job, kind), seconds in times.items():
            each = 1000 * statistics.median(seconds[1:]) / (16 if "16" in job else 1)
            found.setdefault(f"{height}x{width}", {}).setdefault(kind, {})[job] = round(each, 1)
    print(found)
    stored = read_json(given.json) if given.json.exists() else {}
    stored["milliseconds"] = {"threads": given.threads, "torch": torch.__version__, **found}
    write_json(given.json, stored)


def table(given):
    print("| data | method | " + " | ".join(COLUMNS) + " |\n" + "|---" * 6 + "|")
    for row in read_json(given.json)["rows"]:
        cells = " | ".join(f"{row[key]:.3f}" for key in COLUMNS)
        print(f"| {row['data']} | {row['method']} | {cells} |")


def bundle(given):
    network = load_nano(given.weights).network  # which says what is wrong with them
    pages.bundle_weights(BUNDLED, network.state_dict())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--weights", default="bundled")
    commands = parser.add_subparsers(required=True)
    scoring = commands.add_parser("score")
    scoring.set_defaults(run=score)
    scoring.add_argument("data", type=Path)
    scoring.add_argument("--processes", type=int, default=2)
    scoring.add_argument("--methods", help=f"only these of {','.join(METHODS)}; others stay")
    measuring = commands.add_parser("time")
    measuring.set_defaults(run=timing)
    measuring.add_argument("--threads", type=int, default=2)
    measuring.add_argument("--rounds", type=int, default=9)
    printing = commands.add_parser("table")
    printing.set_defaults(run=table)
    bundling = commands.add_parser("bundle")
    bundling.set_defaults(run=bundle)
    bundling.add_argument("weights", type=Path)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
