"""What `benchmarks/streetnet.py study` trains and how it is told."""

import argparse
import importlib

import pytest
import yaml

from pyseg import cli
from pyseg.training import recipes

ROOT = recipes.FOLDER.parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("streetnet")


def run_of(row, held, clip, without="hold-outs", seed=0, share=1.0):
    sets = {
        "both hold-outs": {"miou": held, "frames": 32},
        "validation": {"miou": clip, "frames": 9},
    }
    key = {"row": row, "without": without, "seed": seed, "share": share}
    return {**key, "crops": [1000, 200], "both parts": sets}


def test_rows_are_recipes_of_pyseg_train(script, tmp_path):
    usual = script.options_of("recipe", 1)
    for row, changes in script.ROWS.items():
        for k, options in enumerate(script.options_of(row, 0.25)):
            path = tmp_path / "options.yaml"
            path.write_text(yaml.safe_dump(options), encoding="utf-8")
            assert recipes.read_recipe(path, cli._RECIPE)["epochs"] == (4, 1)[k]
            changed = {key for key, value in usual[k].items() if options.get(key) != value}
            changed |= set(options) - set(usual[k])
            early = set() if k == 0 else set(script.FIRST)
            assert changed - {"epochs"} == set(changes) - early, (row, k)


def test_a_fold_sees_nothing_of_its_drive(script):
    for row in script.ROWS:
        for options in script.options_of(row, 1, "0016E5_*"):
            assert "camvid(split='train', without='0016E5_*')" in options["dataset"]
            assert not any("val" in name for name in options["dataset"])


@pytest.mark.parametrize("twice", (False, True))
def test_parts_go_on_from_each_other(script, tmp_path, monkeypatch, twice):
    calls = []

    def trained(options, data, folder, seed, weights=None):
        file = folder / "model.safetensors"
        file.parent.mkdir(parents=True)
        file.touch()
        calls.append((folder.name, seed, weights, options["epochs"]))
        return file

    monkeypatch.setattr(script, "OUTPUT", tmp_path / "study.json")
    monkeypatch.setattr(script, "trained", trained)
    monkeypatch.setattr(script, "unseen", lambda data, without: {"both hold-outs": without})
    monkeypatch.setattr(script, "built", lambda weights, tta: (weights.parent.name, tta))
    monkeypatch.setattr(script, "scores", lambda pipeline, frames: {"miou": 0.5, "of": pipeline})
    row = script.TWICE if twice else "recipe"
    given = {"data": tmp_path, "runs": tmp_path, "drives": [], "seeds": [3], "rows": [row]}
    given = argparse.Namespace(**given, share=1.0)
    script.study(given)

    folder = tmp_path / script.folder_of(row, "hold-outs", 1.0, 3)
    first, again = (folder / name / "model.safetensors" for name in ("first", "again"))
    passes = [("first", 3, None, 17), *([("again", 1003, first, 17)] if twice else [])]
    assert calls == [*passes, ("last", 3, again if twice else first, 4)]
    (run,) = script.read_json(script.OUTPUT)["runs"]
    assert run["crops"] == [20_400] * len(passes) + [3200]
    scored = {part: run[part]["both hold-outs"]["of"] for part in script.SCORED_PARTS}
    before = ["again" if twice else "first", None]
    tta = ["last", script.TTA]
    assert scored == {"both parts": ["last", None], "both parts, tta": tta, "first part": before}

    script.study(given)  # of what is stored and there, nothing is done again
    assert len(calls) == len(passes) + 1


def test_tables_tell_means_and_gains(script):
    runs = [run_of("recipe", held, 0.7, seed=k) for k, held in enumerate((0.60, 0.62))]
    for run, held in zip(runs, (0.58, 0.60), strict=True):
        run["first part"] = run_of("recipe", held, 0.7)["both parts"]
        run["both parts, tta"] = run_of("recipe", held + 0.05, 0.7)["both parts"]
    runs += [run_of("no OHEM", 0.58, 0.7), run_of("no OHEM", 0.5, 0.6, share=0.25)]
    runs.append({**runs[0], "row": script.TWICE, "crops": [1000, 1000, 200]})
    lines = list(script.ablation_table(runs))
    assert "| recipe | 1,200 | 0.610 ± 0.014 | +0.0 | 0.700 ± 0.000 | 0 1 |" in lines
    spread = "± 0.014"
    for name, crops, held in (
        ("flip and scales at test time", "1,200", f"0.640 {spread} | +3.0"),
        ("without the last part", "1,000", f"0.590 {spread} | -2.0"),
    ):
        assert f"| recipe, {name} | {crops} | {held} | 0.700 ± 0.000 | 0 1 |" in lines
    assert "| no OHEM | 1,200 | 0.580 | -3.0 | 0.700 | 0 |" in lines
    assert f"| {script.TWICE} | 2,200 | 0.600 | -1.0 | 0.700 | 0 |" in lines
    alone = f"{script.TWICE}, without the last part"
    assert f"| {alone} | 2,000 | 0.580 | -3.0 | 0.700 | 0 |" in lines
    assert "| no OHEM | 1,200 | 0.500 |  | 0.600 | 0 |" in lines
    folds = [run_of("no OHEM", 0.4, 0.5, "0016E5_*"), run_of("recipe", 0.5, 0.6, "0016E5_*")]
    lines = list(script.folds_table(folds))
    assert lines[2:] == [
        "| 0016E5 | both hold-outs | 32 | recipe | 1,200 | 0.500 | 0 |",
        "| 0016E5 | validation | 9 | recipe | 1,200 | 0.600 | 0 |",
        "| 0016E5 | both hold-outs | 32 | no OHEM | 1,200 | 0.400 | 0 |",
        "| 0016E5 | validation | 9 | no OHEM | 1,200 | 0.500 | 0 |",
    ]
