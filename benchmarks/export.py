"""Which models of the zoo leave as files, and how they agree there: `python benchmarks/export.py`.

Every semantic model, with random weights but for those that are bundled, is traced once, written as
each format and held against itself on crops of the bundled street image, as `pyseg export` does it.
The table goes to docs/export.md, the numbers to benchmarks/results/export.json.
"""

import argparse
import gc
import time
from pathlib import Path

import pages
import torch

import pyseg
from pyseg import export, files
from pyseg.errors import PysegError
from pyseg.image import read_image
from pyseg.models.exported import loaded

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "export.md"
RESULTS = ROOT / "benchmarks" / "results" / "export.json"
SCRIPT = "benchmarks/export.py"
BUNDLED = {"streetnet"}
FORMATS = ("onnx", "torch-export")
SIZES = ((128, 160), (97, 131), (75, 150))
OPTIONS = {"bayesian_segnet": {"samples": 2}, "grounded_sam": {"classes": ("car",)}}


def images():
    whole = read_image(Path(pyseg.__file__).parent / "assets" / "street.jpg")
    return [whole[:, 60 : 60 + height, 80 : 80 + width].contiguous() for height, width in SIZES]


def tried(name, formats):
    """A row of the table: what each format of a model gives, or why it does not."""
    torch.manual_seed(0)
    weights = {} if name in BUNDLED else {"weights": None}
    try:
        model = pyseg.models.create(name, **weights, **OPTIONS.get(name, {}))
        _, model = export.exportable(pyseg.build(model))
        program, description = export.traced(name, model, formats[0], None, None)
    except (PysegError, ValueError, ImportError) as error:
        return {"name": name, "reason": str(error)}
    row = {"name": name, "batch": description["batch"], "height": description["height"]}
    for kind in formats:
        start = time.perf_counter()
        try:
            content = export.WRITERS[kind](program, {**description, "kind": kind})
            exported = loaded("onnx" if kind == "onnx" else "pt2", content, f"{name} as {kind}")
            parity = export.Parity(model, exported, 0.0, export.MAX_DELTA)
            for image in images():
                parity.add(f"{image.shape[1]} x {image.shape[2]}", image, timed=False)
            found = parity.report()
            row[kind] = {key: found[key] for key in ("flips", "relative_delta", "reasons")}
            row[kind]["bytes"] = len(content)
        except Exception as error:  # of the runtimes, too: the row says which
            row[kind] = {"reasons": [f"{type(error).__name__}: {str(error)[:300]}"]}
        row[kind]["seconds"] = round(time.perf_counter() - start, 1)
    return row


def cell(found):
    if found["reasons"]:
        return f"no: {found['reasons'][0]}".replace("|", "\\|").replace("\n", " ")
    flips = found["flips"]
    return f"{flips['beyond_ties']} / {flips['ties']} flips, Δ {found['relative_delta']:.0e}"


def table(rows, formats):
    lines = [["model", "images", *formats], ["---"] * (2 + len(formats))]
    for row in rows:
        if "reason" in row:
            lines.append(
                [f"`{row['name']}`", "-", f"no: {row['reason']}", *[""] * (len(formats) - 1)]
            )
            continue
        one = row["batch"][1] is not None
        number = "one at a time" if one else "any number"
        cells = [cell(row[kind]) for kind in formats]
        lines.append([f"`{row['name']}`", f"{number}, sides ≥ {row['height'][0]}", *cells])
    return [f"| {' | '.join(line)} |" for line in lines]


def page_tables(formats=FORMATS):
    rows = files.read_json(RESULTS)["rows"]
    return {"zoo": table([rows[name] for name in sorted(rows)], formats)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="models; all by default")
    parser.add_argument("--format", action="append", choices=export.FORMATS)
    parser.add_argument("--table", action="store_true", help="write the page from the JSON alone")
    given = parser.parse_args()
    formats = given.format or FORMATS
    known = files.read_json(RESULTS) if RESULTS.is_file() else {"rows": {}}
    for name in () if given.table else given.names or pyseg.models.list():
        if name in ("onnx", "pt2"):
            continue
        start = time.perf_counter()
        known["rows"][name] = row = tried(name, formats)
        known["torch"] = torch.__version__
        files.write_json(RESULTS, known)  # a run that is stopped loses nothing
        print(
            f"{time.perf_counter() - start:6.1f} s  {table([row], formats)[-1]}",
            flush=True,
        )
        gc.collect()
    pages.write_parts(PAGE, SCRIPT, page_tables(formats))


if __name__ == "__main__":
    main()
