"""Agreement of annotators: Fleiss' own example, brute force, and what must be so."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import ndimage
from typer.testing import CliRunner

from pyseg import cli
from pyseg.agreement import AgreementTally, score_annotators
from pyseg.errors import LabelError, ScoreError
from pyseg.image import write_labels

# 14 raters, 10 subjects, 5 categories: kappa 0.210, the example that textbooks have.
COUNTS = """
0 0 0 0 14; 0 2 6 4 2; 0 0 3 5 6; 0 3 9 2 0; 2 2 8 1 1
7 7 0 0 0; 3 2 6 3 0; 2 5 3 2 2; 6 5 2 1 0; 0 2 2 3 7
"""


def test_fleiss_example():
    rows = [list(map(int, row.split())) for row in COUNTS.strip().replace("\n", ";").split(";")]
    ratings = np.array([np.repeat(np.arange(5), row) for row in rows])  # [10, 14]
    tally = AgreementTally([f"c{k}" for k in range(5)], [f"r{k}" for k in range(14)])
    for row in ratings:  # in several images: it adds up
        tally.update([np.full((1, 1), value, np.uint8) for value in row])
    found = tally.compute()
    assert found.kappa == pytest.approx(0.210, abs=5e-4)
    each = 0
    for k in range(5):  # each class against the rest, by its definition
        x = (ratings == k).sum(1)
        agreed = ((x * (x - 1) + (14 - x) * (13 - x)) / (14 * 13)).mean()
        p = x.sum() / 140
        each = (agreed - p**2 - (1 - p) ** 2) / (1 - p**2 - (1 - p) ** 2)
        assert found.class_kappa[f"c{k}"] == pytest.approx(each, abs=1e-12)


def iou(one, other, k):
    a, b = one == k, (other == k)
    known = other != 255
    union = ((a | b) & known).sum()
    return (a & b & known).sum() / union if union else math.nan


def test_scores_by_brute_force():
    rng = np.random.default_rng(0)
    base = np.kron(rng.integers(0, 3, (4, 5)), np.ones((6, 6), int))
    maps = [
        np.where(rng.random(base.shape) < 0.1, rng.integers(0, 3, base.shape), base)
        for _ in range(3)
    ]
    maps[2][:3] = 255
    maps = [labels.astype(np.uint8) for labels in maps]
    guess = base.astype(np.uint8)
    tally = AgreementTally(("a", "b", "c"), ("x", "y", "z"), predicted=True)
    tally.update(maps, guess)
    found = tally.compute()
    for k, name in enumerate("abc"):
        pairs = [iou(maps[i], maps[j], k) for i, j in itertools.permutations(range(3), 2)]
        assert found.iou[name] == pytest.approx(np.mean(pairs))
    expected = [np.mean([iou(guess, labels, k) for k in range(3)]) for labels in maps]
    assert found.miou["prediction"] == pytest.approx(expected)
    assert found.of("prediction")[1:] == pytest.approx((min(expected), max(expected)))
    others = [np.mean([iou(maps[0], maps[j], k) for k in range(3)]) for j in (1, 2)]
    assert found.miou["x"][1:] == pytest.approx(others) and math.isnan(found.miou["x"][0])
    # What most say is nearer to all than anybody is to the others.
    assert found.of("plurality")[0] > found.human[0]


def test_boundary_distances_by_brute_force():
    one, other = np.zeros((12, 20), np.uint8), np.zeros((12, 20), np.uint8)
    one[:, 8:], other[:, 11:] = 1, 1
    tally = AgreementTally(("a", "b"), ("x", "y"))
    tally.update([one, other])
    assert tally.compute().boundary == {"mean": 3, "median": 3, "p95": 3}
    other[4:, 15:] = 0
    tally = AgreementTally(("a", "b"), ("x", "y"))
    tally.update([one, other])
    every = []
    for a, b in ((one, other), (other, one)):
        marks = [np.pad(m, ((0, 1), (0, 1)), "edge") for m in (a, b)]
        ea, eb = ((m[:-1, :-1] != m[:-1, 1:]) | (m[:-1, :-1] != m[1:, :-1]) for m in marks)
        every += np.rint(ndimage.distance_transform_edt(~eb)[ea]).tolist()
    assert tally.compute().boundary["mean"] == pytest.approx(np.mean(every))


def test_all_agree_or_nobody_has_anything():
    labels = np.array([[0, 0, 1]], np.uint8)
    tally = AgreementTally(("a", "b"), ("x", "y", "z"))
    tally.update([labels] * 3)
    found = tally.compute()
    assert found.kappa == 1 and found.human == (1, 1, 1) and found.boundary["mean"] == 0
    tally = AgreementTally(("a", "b"), ("x", "y"))
    tally.update([np.full((2, 2), 255, np.uint8)] * 2)
    empty = tally.compute()
    assert math.isnan(empty.kappa) and math.isnan(empty.human[0])
    json.dumps(empty.to_dict(), allow_nan=False)


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(1)
    for who in ("anna", "ben", "carl", "model"):
        (tmp_path / who).mkdir()
        for image in ("one", "two"):
            labels = np.zeros((20, 24), np.uint8)
            labels[5:15, 6 + rng.integers(4) : 18] = 1
            write_labels(tmp_path / who / f"{image}.png", labels)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(cli.app, ["score", *map(str, arguments)])


def test_the_command(folders):
    people = [p for who in ("anna", "ben", "carl") for p in ("--annotators", folders / who)]
    result = run(folders / "model", *people, "--classes", 2)
    assert result.exit_code == 0, result.output
    assert "annotator against annotator" in result.stdout and "kappa" in result.stdout
    value = json.loads(run(folders / "model", *people, "--classes", 2, "--json").stdout)
    found = score_annotators(
        [folders / who for who in ("anna", "ben", "carl")], folders / "model", classes=2
    )
    assert value["human"] == list(found.human) and value["images"] == 2
    assert value["annotators"] == ["anna", "ben", "carl"]
    assert "prediction" not in json.loads(run(*people, "--classes", 2, "--json").stdout)["miou"]


def test_what_is_refused(folders):
    anna, ben = folders / "anna", folders / "ben"
    one = run(folders / "model", "--annotators", anna, "--classes", 2)
    assert one.exit_code == 2 and "annotators must be two or more, got 1" in one.stderr
    both = ["--annotators", anna, "--annotators", ben, "--classes", 2]
    assert "with --annotators give PREDICTIONS or nothing" in run(anna, ben, *both).stderr
    assert "with --annotators" in run(*both, "--metric", "boundary").stderr
    assert "give PREDICTIONS LABELS" in run().stderr
    with pytest.raises(ScoreError, match="is no folder"):
        score_annotators([anna, folders / "dora"], classes=2)
    (ben / "two.png").unlink()
    with pytest.raises(ScoreError, match="no prediction for 1 of 2"):
        score_annotators([anna, ben], classes=2)
    write_labels(ben / "two.png", np.zeros((3, 3), np.uint8))
    with pytest.raises(LabelError, match=r"image 'two': .* \[3, 3\], \[20, 24\]"):
        score_annotators([anna, ben], classes=2)
    write_labels(ben / "two.png", np.full((20, 24), 7, np.uint8))
    with pytest.raises(LabelError, match="7"):
        score_annotators([anna, ben], classes=2)
    with pytest.raises(ScoreError, match="must differ"):
        AgreementTally(("a",), ("x", "x"))
