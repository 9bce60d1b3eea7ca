"""The tables of docs/refiners.md and docs/sam.md are those of the stored runs; defaults keep their
promise."""

import importlib
import re
import statistics
import sys
from pathlib import Path

import pytest

from pyseg.files import read_json
from pyseg.refiners import CRF, SegFix

ROOT = Path(__file__).parent.parent.parent
LOSS = 0.2  # points of mIoU that a default may lose on any fold or model
KNOWN = {"FCN-8s"}  # after 37 steps it tells three classes apart; the page says what crf loses


SCRIPTS = ("refiners", "sam", "drives", "segfix")


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield {name: importlib.import_module(name) for name in SCRIPTS}
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in SCRIPTS:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def script(scripts):
    return scripts["refiners"]


@pytest.fixture(scope="module")
def stored(script):
    return read_json(script.OUTPUT)


@pytest.mark.parametrize("name", ["refiners", "sam"])
def test_page_has_the_tables_of_the_stored_run(scripts, name):
    script = scripts[name]
    page = script.PAGE.read_text()
    for key, text in script.parts(read_json(script.OUTPUT)).items():
        begin, end = script.marks(key)
        assert text.count("\n") > 2
        assert page.split(begin)[1].split(end)[0].strip() == text.strip()


def test_the_run_is_of_the_defaults(stored):
    assert stored["refiners"]["crf"] == repr(CRF())
    assert stored["refiners"]["segfix"] == repr(SegFix(shared=False))


def test_every_model_is_scored_or_absent(script, stored):
    absent = {entry["model"] for entry in stored["absent"]}
    for entry in script.MODELS:
        rows = [row for row in stored["rows"] if row["model"] == entry.name]
        assert bool(rows) != (entry.name in absent)
        if rows:
            assert {row["fold"] for row in rows} == set(entry.folds)
            pairs = {(row["fold"], row["refiner"]) for row in rows}
            assert len(pairs) == len(rows) == len(entry.folds) * len(stored["refiners"])


@pytest.mark.parametrize("refiner", ["crf", "segfix", "segfix+crf"])
def test_defaults_gain_on_average_and_lose_nowhere(stored, refiner):
    rows = [row for row in stored["rows"] if row["refiner"] == refiner]
    gains = [row["delta_miou"][0] for row in rows]
    assert len(gains) >= 10 and statistics.mean(gains) > 0
    for row in rows:
        if row["model"] not in KNOWN:
            assert row["delta_miou"][0] >= -LOSS, (row["model"], row["fold"])


def test_readme_quotes_the_stored_runs(stored):
    text = " ".join((ROOT / "README.md").read_text().split())
    runs = read_json(ROOT / "pyseg" / "assets" / "streetnet_camvid.json")
    own, bundled = runs["hold-outs kept out"], runs["bundled"]
    rows = [row for row in stored["rows"] if row["model"] == "streetnet"]
    found = {(row["fold"], row["refiner"]): row["delta_miou"] for row in rows}
    usual = [-found[fold, "crf_pydensecrf"][0] for fold in ("day", "validation", "dusk")]
    number = r"([-+]?[0-9.]*[0-9])"
    quoted = {
        f"mIoU {number} on a block at dusk, {number} on one by day, {number} on both, "
        f"{number} on CamVid's validation clip": [
            own[name]["miou"]
            for name in ("hold-out dusk", "hold-out day", "both hold-outs", "validation")
        ],
        f"trained on these frames, too: {number} on": [bundled["validation"]["miou"]],
        f"gains {number} points by day and {number} on the validation clip": [
            found[fold, "crf"][0] for fold in ("day", "validation")
        ],
        rf"at dusk \({number} \[{number}, {number}\]\)": found["dusk", "crf"],
        f"pydensecrf's parameters lose {number} to {number} ": [min(usual), max(usual)],
    }
    for pattern, numbers in quoted.items():
        said = re.search(pattern, text)
        assert said, pattern
        for shown, stored_one in zip(said.groups(), numbers, strict=True):
            digits = len(shown.partition(".")[2])
            assert abs(float(shown) - stored_one) <= 0.5001 * 10**-digits, (pattern, stored_one)
