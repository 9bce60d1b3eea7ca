"""The table of README.md, from stored runs: `python benchmarks/table.py [FILE …]`.

FILE is one of benchmarks/results/; by default all of them, side by side. A cell has the ratios with
1 / 2 threads, as the median of a run's rounds: how many times as long the peer takes.
`python benchmarks/table.py ops` writes those of docs/ops.md, each op's with its floor.
"""

import json
import re
import sys
from pathlib import Path

import pages

LEVELS = {"v4": "AVX-512", "v3": "AVX2", "generic": "generic"}
PROCESSORS = {  # by the beginning of the file's name
    "amd-epyc-v4": "EPYC Zen 5",
    "intel-r-xeon-r-processor-v4": "Xeon",
    "amd-epyc-v3": "EPYC",
}

# What the README calls it, its peer, and the benchmark, with {} for the number of threads.
ROWS = [
    (
        "`confusion_matrix` uint8, 1024x2048x19",
        "NumPy `bincount`",
        "confusion_matrix::test_uint8[{}-random]",
    ),
    ("… smooth maps", "", "confusion_matrix::test_uint8[{}-smooth]"),
    ("… int64", "`torch.bincount` with a mask", "confusion_matrix::test_int64[{}-random]"),
    (
        "`upsample_argmax` 128x256 to 1024x2048, 19 classes",
        "`interpolate` + `argmax`",
        "upsample_argmax::test_float32[{}-nchw-random]",
    ),
    ("… channels_last", "", "upsample_argmax::test_float32[{}-channels_last-random]"),
    ("… bfloat16", "", "upsample_argmax::test_bfloat16[{}]"),
    (
        "`upsample_confusion` of the same, uint8 labels",
        "`interpolate` + `argmax` + `bincount`",
        "upsample_confusion::test_float32[{}-torch.uint8-random]",
    ),
    ("… int64 labels", "", "upsample_confusion::test_float32[{}-torch.int64-random]"),
    (
        "`boundary_mask` 1024x2048x19, 46 pixels wide",
        "OpenCV erosion per class",
        "boundary_mask::test_classes[{}-random]",
    ),
    ("… smooth maps", "", "boundary_mask::test_classes[{}-smooth]"),
    ("… 60 segments", "", "boundary_mask::test_segments[{}]"),
    ("Boundary IoU of such a pair", "", "boundary_match::test_boundary_iou[{}]"),
    (
        "`boundary_match` (BF score) of such a pair",
        "SciPy distance transform per class",
        "boundary_match::test_f_score[{}]",
    ),
    (
        "`panoptic_quality` 1024x2048, 60 segments",
        "panopticapi's algorithm in NumPy, on id maps in memory",
        "panoptic_quality::test_panopticapi[{}-random]",
    ),
    ("… smooth maps", "", "panoptic_quality::test_panopticapi[{}-smooth]"),
    ("… the same", "torchmetrics", "panoptic_quality::test_torchmetrics[{}]"),
    (
        "`decode_png` 1024x2048, indexed labels",
        "Pillow",
        "decode_png::test_pillow[{}-indexed]",
    ),
    ("… grey labels", "", "decode_png::test_pillow[{}-grey]"),
    ("… COCO's panoptic map, 60 segments", "", "decode_png::test_pillow[{}-segment_ids]"),
    ("… a photograph", "", "decode_png::test_pillow[{}-photograph]"),
    ("`rle`, IoU of 60 x 60 masks from texts", "pycocotools", "rle::test_overlaps[{}]"),
    (
        "`pyseg score`, panoptic, 20 pairs of PNGs of 1024x2048",
        "hotcoco, from files",
        "scoring::test_panoptic_files[{}]",
    ),
    ("… semantic, indexed PNGs", "", "scoring::test_semantic_files[{}-indexed]"),
    ("… semantic, grey PNGs", "", "scoring::test_semantic_files[{}-grey]"),
    ("… AP of masks", "", "scoring::test_instances[{}-mask]"),
    ("… AP of boxes", "", "scoring::test_instances[{}-box]"),
    ("… confusion matrix, uint8", "hotcoco, in memory", "scoring::test_confusion_matrix[{}-uint8]"),
    ("… int64", "", "scoring::test_confusion_matrix[{}-int64]"),
    (
        "`deform_conv2d` v2, 256to256, 3x3, 64x128, forward",
        "torchvision",
        "deform_conv2d::test_forward[{}-64x128]",
    ),
    ("… 128x256", "", "deform_conv2d::test_forward[{}-128x256]"),
    ("… in bfloat16", "torchvision in float32", "deform_conv2d::test_forward_bfloat16[{}]"),
    (
        "… forward and backward, 64x128",
        "torchvision",
        "deform_conv2d::test_forward_and_backward[{}-64x128]",
    ),
    ("… 128x256", "", "deform_conv2d::test_forward_and_backward[{}-128x256]"),
    (
        "`multi_scale_roi_align`, 1000 boxes x 256 channels, 4 levels of 800x1344, 7x7",
        "torchvision",
        "roi_align::test_pyramid[{}-7-nchw]",
    ),
    ("… 14x14", "", "roi_align::test_pyramid[{}-14-nchw]"),
    ("… channels_last, 7x7", "", "roi_align::test_pyramid[{}-7-channels_last]"),
    ("… channels_last, 14x14", "", "roi_align::test_pyramid[{}-14-channels_last]"),
    ("`roi_align` backward, one level, 7x7", "", "roi_align::test_backward[{}-7]"),
    ("… 14x14", "", "roi_align::test_backward[{}-14]"),
    ("`roi_pool`, one level, 7x7", "", "roi_align::test_pool[{}]"),
    (
        "`dense_crf` 480x360x11, 10 iterations, default",
        "pydensecrf",
        "dense_crf::test_480x360x11[{}-default]",
    ),
    (
        '… `quality="compatible"`, which gives pydensecrf\'s result',
        "",
        "dense_crf::test_480x360x11[{}-compatible]",
    ),
    ('… `quality="high"`', "", "dense_crf::test_480x360x11[{}-high]"),
    ("… backward", "the forward pass", "dense_crf::test_backward[{}-size0]"),
    (
        "`dense_crf` 2048x1024x19, 10 iterations, default",
        "pydensecrf",
        "dense_crf::test_2048x1024x19[{}]",
    ),
    (
        "`panoptic_merge` 1024x2048, 100 instances, bool masks",
        "loop over masks in torch",
        "panoptic_merge::test_masks[{}]",
    ),
    (
        "… from 28x28 masks and boxes",
        "`grid_sample` + loop over masks in torch",
        "panoptic_merge::test_boxes[{}]",
    ),
    (
        "`panoptic_head` 256x512 to 1024x2048, 19 classes, 30 instances",
        "the same in torch",
        "panoptic_head::test_float32[{}]",
    ),
]

MAP = 1024 * 2048  # pixels
PYRAMID = 256 * sum(1344 * 800 // stride**2 for stride in (4, 8, 16, 32))  # numbers
POOLED = 1000 * 256 * 49  # numbers of 7 x 7 bins
CRF = 480 * 360 * 11

# By benchmark the bytes that must be read, those that must be written, and the additions and
# multiplications in float32 without which there is no result. What has no such bound is not here.
FLOORS = {
    "confusion_matrix::test_uint8[{}-random]": (2 * MAP, 0, 0),
    "confusion_matrix::test_uint8[{}-smooth]": (2 * MAP, 0, 0),
    "confusion_matrix::test_int64[{}-random]": (16 * MAP, 0, 0),
    "upsample_argmax::test_float32[{}-nchw-random]": (4 * 19 * MAP // 64, MAP, 0),
    "upsample_argmax::test_float32[{}-channels_last-random]": (4 * 19 * MAP // 64, MAP, 0),
    "upsample_argmax::test_bfloat16[{}]": (2 * 19 * MAP // 64, MAP, 0),
    "upsample_confusion::test_float32[{}-torch.uint8-random]": (4 * 19 * MAP // 64 + MAP, 0, 0),
    "upsample_confusion::test_float32[{}-torch.int64-random]": (4 * 19 * MAP // 64 + 8 * MAP, 0, 0),
    "boundary_mask::test_classes[{}-random]": (MAP, MAP, 0),
    "boundary_mask::test_classes[{}-smooth]": (MAP, MAP, 0),
    "boundary_match::test_f_score[{}]": (2 * MAP, 0, 0),
    "panoptic_quality::test_panopticapi[{}-random]": (8 * MAP, 0, 0),
    "panoptic_quality::test_panopticapi[{}-smooth]": (8 * MAP, 0, 0),
    "deform_conv2d::test_forward[{}-64x128]": (0, 0, 2 * 9 * 256 * 256 * 64 * 128),
    "deform_conv2d::test_forward[{}-128x256]": (0, 0, 2 * 9 * 256 * 256 * 128 * 256),
    # Slices and splats of 3 and 6 vertices a pixel, a multiplication and an addition each.
    "dense_crf::test_480x360x11[{}-default]": (0, 0, 10 * CRF * (3 + 6) * 2 * 2),
    "panoptic_merge::test_masks[{}]": (101 * MAP, 4 * MAP, 0),
    "panoptic_head::test_float32[{}]": (4 * 19 * MAP // 16, MAP, 0),
    # Four samples a bin, of four pixels each.
    "roi_align::test_pyramid[{}-7-nchw]": (4 * PYRAMID, 4 * POOLED, POOLED * 4 * 4 * 2),
    "roi_align::test_pyramid[{}-7-channels_last]": (4 * PYRAMID, 4 * POOLED, POOLED * 4 * 4 * 2),
}

PAGE = Path(__file__).parent.parent / "docs" / "ops.md"
RESULTS = Path(__file__).parent / "results"
SCRIPT = "benchmarks/table.py"


def ratio(entry):
    if entry is None:
        return "-"
    value = entry["ratio"]
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def by_level(results, name):
    """The entries of a benchmark at every level; of the best one where it runs at one alone."""
    found = {}
    for suffix in ("", *(f" at {level}" for level in LEVELS)):
        if entry := results.get(name + suffix):
            found[entry["simd"]] = entry
    return found


def table(runs):
    """Markdown lines for stored ``runs``, without rows that none of them has."""
    columns = [
        (run["results"], level, run["name"])
        for run in runs
        for level in LEVELS
        if any(entry["simd"] == level for entry in run["results"].values())
    ]
    heads = (f"{cpu} {LEVELS[level]}" for _, level, cpu in columns)
    yield f"| op, size | peer | {' | '.join(heads)} |"
    yield "|---|---" + "|---" * len(columns) + "|"
    above = ""
    for what, peer, name in ROWS:
        peer = above = peer or above  # none = that of the row above
        cells, best = [], None
        for results, level, _ in columns:
            pair = [by_level(results, name.format(n)) for n in (1, 2)]
            if results is not best:  # what has no levels stands in the first column
                pair = [{level: found.get(None), **found} for found in pair]
            best = results
            entries = [found.get(level) for found in pair]
            cells.append(" / ".join(map(ratio, entries)) if any(entries) else "-")
        if set(cells) != {"-"}:
            yield f"| {what} | {peer} | {' | '.join(cells)} |"


def floor(bounds, machine):
    """Milliseconds below which the machine cannot be, and the bound in words."""
    read, written, operations = bounds
    size = f"{(read + written) / 1e6:.1f} MB" if read else ""
    moved = (read / machine["read_gb_s"] + 2 * written / machine["copy_gb_s"]) / 1e6
    counted = operations / machine["gflop_s"] / 1e6
    if counted > moved:
        size = f"{operations / 1e9:.2g} GFLOP"
    return max(moved, counted), size


def short(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def op_table(op, runs, machine, of):
    """Markdown lines for one op: its floor, and how far it and its peer are from it."""
    yield "| size | peer | floor | ms, 1 / 2 threads | times the floor | times the peer |"
    yield "|---|---|---|---|---|---|"
    above = ""
    for what, peer, name in ROWS:
        peer = above = peer or above
        if not name.startswith(f"{op}::"):
            continue
        entries = {
            run["name"]: [best(by_level(run["results"], name.format(n))) for n in (1, 2)]
            for run in runs
        }
        own = entries[of]
        bounds = FLOORS.get(name)
        times = " / ".join(short(entry["ours_ms"]) for entry in own)
        least, distance = "", ""
        if bounds is not None:
            floors = [floor(bounds, machine["threads"][n])[0] for n in ("1", "2")]
            what_moves = floor(bounds, machine["threads"]["1"])[1]
            least = f"{what_moves}: {' / '.join(map(short, floors))} ms"
            distance = " / ".join(
                f"{entry['ours_ms'] / value:.1f}" for entry, value in zip(own, floors, strict=True)
            )
        ratios = "; ".join(
            f"{name} {' / '.join(map(ratio, pair))}" for name, pair in entries.items()
        )
        yield f"| {what} | {peer} | {least} | {times} | {distance} | {ratios} |"


def best(levels):
    """The entry of the highest level."""
    return next(levels[level] for level in (*LEVELS, None) if level in levels)


def page_tables():
    """Of docs/ops.md, one for each op."""
    runs, machine = stored_runs()
    ops = pages.parts(PAGE.read_text(encoding="utf-8"), SCRIPT)
    return {op: op_table(op, runs, machine, machine["name"]) for op in ops}


def read(files):
    """What they hold, and the processor's name; in the order of PROCESSORS."""
    found = []
    for file in sorted(files):
        slug = re.match(r"(?:floor-)?(.*?)(?:-torch.*)?\.json", file.name)[1]
        found.append({"name": PROCESSORS.get(slug, slug), **json.loads(file.read_text())})
    names = list(PROCESSORS.values())
    return sorted(found, key=lambda run: names.index(run["name"]) if run["name"] in names else 99)


def stored_runs():
    """Those of benchmarks/results/, and the floor's machine."""
    (machine,) = read(RESULTS.glob("floor-*.json"))
    return read(RESULTS.glob("*-torch*.json")), machine


if __name__ == "__main__" and sys.argv[1:] == ["ops"]:
    pages.write_parts(PAGE, SCRIPT, page_tables())
elif __name__ == "__main__":
    stored = read([Path(name) for name in sys.argv[1:]] or RESULTS.glob("*-torch*.json"))
    for run in stored:
        print(f"{run['name']}, torch {run['torch']}, {run['date']}")
    print("", *table(stored), sep="\n")
