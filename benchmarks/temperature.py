"""Calibration of streetnet with a temperature: ``pyseg/assets/streetnet_temperature.json``.

    python benchmarks/temperature.py ../shared/data/camvid --weights HOLDOUT

The temperature is fitted on one fold and scored on the others: the hold-outs of
`pyseg/assets/streetnet_camvid.md`, both together, and every fourth frame of CamVid's validation
clip. HOLDOUT, ``build/weights/recipe_0/last/model.safetensors``, are the weights of `make weights`
that have seen none of these frames. The bundled weights get the temperature of both hold-outs
together (``benchmarks/streetnet.py bundle``): the frames that could tell their own have been
trained on.
"""

import argparse
from pathlib import Path

import torch
from segfix import folds

import pyseg
from pyseg.files import write_json
from pyseg.metrics import Calibration
from pyseg.refiners import Temperature
from pyseg.tuning import fit_temperature
from pyseg.types import VOID

OUTPUT = Path(pyseg.__file__).parent / "assets" / "streetnet_temperature.json"
PIXELS = 20_000  # of an image, to fit
SCORES = ("ece", "mce", "nll", "brier", "confidence", "pixel_accuracy")


def drawn(prediction, labels, generator):
    """Logits and labels of some labelled pixels."""
    known = (labels != VOID).flatten().nonzero().flatten()
    known = known[torch.randperm(len(known), generator=generator)[:PIXELS]]
    return prediction.full_logits().flatten(1)[:, known], labels.flatten()[known].long()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder of CamVid")
    parser.add_argument("--weights", default="default", help="of streetnet; the bundled ones")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    pipeline = pyseg.build("streetnet", weights=given.weights)
    generator = torch.Generator().manual_seed(0)
    data = folds(given.root)
    data["validation"] = data["validation"][::4]
    data["hold-outs"] = [*data["dusk"], *data["day"]]
    seen = {fold: [(s, pipeline(s.image)) for s in samples] for fold, samples in data.items()}

    def score(fold, value):
        metric, refiner = Calibration(pipeline.classes), Temperature(value=value)
        for sample, prediction in seen[fold]:
            metric.update(refiner.refine(sample.image, prediction), sample)
        found = metric.compute()
        return {name: round(found[name], 5) for name in SCORES}

    before = {fold: score(fold, 1.0) for fold in seen}
    rows = []
    for fitted, members in seen.items():
        parts = [drawn(prediction, sample.labels, generator) for sample, prediction in members]
        logits, labels = (torch.cat(part, -1) for part in zip(*parts, strict=True))
        value = fit_temperature(logits, labels)
        for fold in seen:
            own = fold == fitted or (fold in ("dusk", "day") and fitted == "hold-outs")
            row = {"fitted": fitted, "temperature": value, "fold": fold, "own": own}
            rows.append({**row, "before": before[fold], "after": score(fold, value)})
            print(
                f"fitted on {fitted:10} T {value:<5} scored on {fold:10} {'*' if own else ' '} "
                f"ECE {before[fold]['ece']:.4f} -> {rows[-1]['after']['ece']:.4f}  "
                f"NLL {before[fold]['nll']:.4f} -> {rows[-1]['after']['nll']:.4f}",
                flush=True,
            )
    command = "python benchmarks/temperature.py CAMVID --weights HOLDOUT"
    stored = next(row["temperature"] for row in rows if row["fitted"] == "hold-outs")
    write_json(given.output, {"command": command, "stored": stored, "rows": rows})


if __name__ == "__main__":
    main()
