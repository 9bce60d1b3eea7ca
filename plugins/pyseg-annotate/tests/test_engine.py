"""The loop, by hand and by brute force; the ledger under kills and contradictions."""

import json
import multiprocessing
import time

import numpy as np
import pytest
from pyseg_annotate.annotators import Recorded, SimulatedWorkers, Submission
from pyseg_annotate.engine import collect
from pyseg_annotate.ledger import Ledger, LedgerError, Terms, read_ledger
from pyseg_annotate.quality import jaccard
from pyseg_annotate.tasks import read_tasks, write_tasks

from pyseg.errors import LabelError, PysegError


class Known:
    """Says what is written for each mask: its first pixels in binary, hundredths."""

    fingerprint = "known"

    def __init__(self):
        self.asked = []

    def predict(self, task, submission):
        self.asked.append((task.id, submission.worker))
        return submission.clicks / 100


def submissions(tasks, table):
    """Whose ``clicks`` are what `Known` says."""
    return {
        task.id: [
            Submission(np.ones(task.size, bool), f"w{k}", value) for k, value in enumerate(row)
        ]
        for task, row in zip(tasks, table, strict=True)
    }


def test_the_seven_steps(make_tasks, tmp_path):
    tasks = make_tasks(4)
    table = [[90, 10, 10], [50, 84, 99], [70, 20, 60], [10, 70, 83]]
    quality = Known()
    found = collect(
        tasks, Recorded(submissions(tasks, table)), quality, tmp_path, threshold=0.83, rounds=3
    )
    a, b, c, d = (task.id for task in tasks)
    # One round on all; flagged ones again; nobody is asked after acceptance.
    assert [who for who, _ in quality.asked] == [a, b, c, d, b, c, d, c, d]
    assert found.accepted == {a, b, d} and found.done
    assert found.spent == {a: 1, b: 2, c: 3, d: 3} and found.annotations == 9
    # The best of three where none is accepted; the threshold itself is enough.
    assert {key: record.round for key, record in found.chosen.items()} == {a: 1, b: 2, c: 1, d: 3}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["annotations"] == 9 and results["accepted"] == 3
    assert [r["quality"] for r in results["results"]] == [0.9, 0.84, 0.7, 0.83]
    coco = json.loads((tmp_path / "masks.json").read_text())
    assert len(coco["annotations"]) == 4 and coco["categories"] == [{"id": 1, "name": "blob"}]


def test_a_finished_run_asks_nobody(make_tasks, tmp_path, predictor):
    tasks, workers = make_tasks(6), SimulatedWorkers(5)
    first = collect(tasks, workers, predictor, tmp_path, rounds=3)
    before = (tmp_path / "ledger.jsonl").read_bytes()

    class Nobody:
        workers = ("a", "b", "c")

        def annotate(self, task, taken):
            raise AssertionError("was asked")

    again = collect(tasks, Nobody(), predictor, tmp_path, rounds=3)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    assert again.spent == first.spent and again.accepted == first.accepted
    for id, record in first.chosen.items():
        assert np.array_equal(again.chosen[id].submission.mask, record.submission.mask)


def test_who_cannot_answer_yet_is_waited_for(make_tasks, tmp_path):
    tasks = make_tasks(3)
    table = [[90, 0], [50, 90], [60, 90]]
    given = submissions(tasks, table)
    early = {key: values[:1] for key, values in given.items()}
    early[tasks[2].id] = []

    class Two(Recorded):
        def __init__(self, submissions):
            super().__init__(submissions)
            self.workers = ("w0", "w1")

    found = collect(tasks, Two(early), Known(), tmp_path, rounds=2)
    assert found.waiting == (tasks[2].id,) and found.round == 1 and found.annotations == 2
    early[tasks[2].id] = given[tasks[2].id][:1]
    found = collect(tasks, Two(early), Known(), tmp_path, rounds=2)
    assert found.waiting == (tasks[1].id, tasks[2].id) and found.round == 2
    found = collect(tasks, Two(given), Known(), tmp_path, rounds=2)
    assert found.done and found.spent == dict(zip((t.id for t in tasks), (1, 2, 2), strict=True))


class Slow:
    """The Jaccard index itself, after some time."""

    fingerprint = "slow"

    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def predict(self, task, submission):
        time.sleep(self.seconds)
        return jaccard(task.truth, submission.mask)


def test_a_kill_loses_nothing(make_tasks, tmp_path):
    tasks, workers = make_tasks(16), SimulatedWorkers(5, 1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ledger = cut / "ledger.jsonl"
    # Forked, so that nothing is imported anew; nothing of torch runs in parallel there.
    process = multiprocessing.get_context("fork").Process(
        target=collect, args=(tasks, workers, Slow(0.1), cut), kwargs={"rounds": 3}
    )
    process.start()
    end = time.monotonic() + 120
    while not (ledger.exists() and ledger.read_bytes().count(b"\n") > 3):
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.join()
    kept = ledger.read_bytes()
    with ledger.open("ab") as stream:
        stream.write(b'{"object": "blob0-9", "rou')  # what it was writing
    collect(tasks, workers, Slow(), whole, rounds=3)
    collect(tasks, workers, Slow(), cut, rounds=3)
    assert ledger.read_bytes() == (whole / "ledger.jsonl").read_bytes()
    assert ledger.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert kept.count(b"\n") < ledger.read_bytes().count(b"\n")
    assert (cut / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_it_goes_on_from_every_line(make_tasks, tmp_path):
    tasks = make_tasks(4)
    given = submissions(tasks, [[90, 10, 10], [50, 84, 99], [70, 20, 60], [10, 70, 83]])
    first = collect(tasks, Recorded(given), Known(), tmp_path / "whole", rounds=3)
    lines = (tmp_path / "whole" / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 10
    for count in range(len(lines) + 1):
        (tmp_path / str(count)).mkdir()
        ledger = tmp_path / str(count) / "ledger.jsonl"
        ledger.write_bytes(b"".join(lines[:count]))
        found = collect(tasks, Recorded(given), Known(), ledger.parent, rounds=3)
        assert ledger.read_bytes() == b"".join(lines), count
        assert (found.round, found.spent, found.accepted) == (3, first.spent, first.accepted)


def change(path, line, edit):
    lines = path.read_text().splitlines(keepends=True)
    value = json.loads(lines[line])
    lines[line] = json.dumps(edit(value)) + "\n"
    path.write_text("".join(lines))


def replaced(**values):
    return lambda record: {**record, **values}


@pytest.mark.parametrize(
    "line, edit, message",
    [
        (1, replaced(object="other"), "there is no object 'other'"),
        (2, replaced(round=2), "is of round 2, where 1 comes next"),
        (2, replaced(object="blob0-0"), "is of round 1, where 2 comes next"),
        (5, replaced(object="blob0-0"), "was accepted before"),
        (5, replaced(worker="w0"), "was drawn by 'w0' before"),
        (1, replaced(quality=1.5), "has the quality 1.5"),
        (1, replaced(mask={"size": [1, 1], "counts": "01"}), "its window is"),
        (1, replaced(mask=3), "mask must be an object"),
        (1, lambda record: {"object": "blob0-0"}, "lacks 'round'"),
        (0, replaced(threshold=0.9), "give threshold 0.9"),
        (0, replaced(rounds=4), "give rounds 4"),
        (0, replaced(fingerprint="f"), "give the same objects"),
        (0, replaced(quality="q"), "give the same predictor"),
        (0, replaced(ledger=2), "a ledger of version 2"),
    ],
)
def test_contradictions_are_told_and_nothing_is_changed(make_tasks, tmp_path, line, edit, message):
    tasks = make_tasks(4)
    given = submissions(tasks, [[90, 0], [50, 90], [60, 90], [10, 20]])
    collect(tasks, Recorded(given), Known(), tmp_path, rounds=2)
    ledger = tmp_path / "ledger.jsonl"
    change(ledger, line, edit)
    before = ledger.read_bytes()
    with pytest.raises(LedgerError, match=message) as caught:
        collect(tasks, Recorded(given), Known(), tmp_path, rounds=2)
    assert f"line {line + 1}" in str(caught.value) and ledger.read_bytes() == before


def test_a_damaged_line_is_told(make_tasks, tmp_path):
    tasks = make_tasks(2)
    given = submissions(tasks, [[90], [95]])
    collect(tasks, Recorded(given), Known(), tmp_path, rounds=1)
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'{"object"', b'"object"', 1))
    for call in (
        lambda: read_ledger(ledger),
        lambda: collect(tasks, Recorded(given), Known(), tmp_path, rounds=1),
    ):
        with pytest.raises(LedgerError, match="line 2 is no JSON"):
            call()
    with pytest.raises(LedgerError, match="there is no ledger"):
        read_ledger(tmp_path / "none.jsonl")


def test_one_process_at_a_time(make_tasks, tmp_path):
    tasks = make_tasks(2)
    terms = Terms.of(tasks, 0.8, 1, "q")
    ledger = Ledger(tmp_path / "l", tasks, terms)
    with pytest.raises(PysegError, match="open in another process"):
        Ledger(tmp_path / "l", tasks, terms)
    ledger.close()
    Ledger(tmp_path / "l", tasks, terms).close()


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_threshold_out_of_range(make_tasks, tmp_path, predictor, threshold):
    with pytest.raises(PysegError, match="threshold must be a Jaccard index"):
        collect(make_tasks(1), SimulatedWorkers(5), predictor, tmp_path, threshold=threshold)
    assert not any(tmp_path.iterdir())


def test_other_bad_input(make_tasks, tmp_path, predictor):
    tasks = make_tasks(2)
    run = [predictor, tmp_path / "out"]
    with pytest.raises(PysegError, match=r"there are 1 \(worker 0\); get more, or give rounds 1"):
        collect(tasks, SimulatedWorkers(1), *run)
    with pytest.raises(PysegError, match="rounds must be 1 or more"):
        collect(tasks, SimulatedWorkers(1), *run, rounds=0)
    with pytest.raises(PysegError, match="no object to annotate"):
        collect([], SimulatedWorkers(5), *run)
    with pytest.raises(LabelError, match="is there twice"):
        collect([tasks[0], tasks[0]], SimulatedWorkers(5), *run)
    assert not (tmp_path / "out").exists()


def test_tasks_are_written_and_read(make_tasks, tmp_path):
    tasks = make_tasks(3)
    (tmp_path / "deep").mkdir()
    again = read_tasks(write_tasks(tmp_path / "deep" / "objects.json", tasks))
    for one, other in zip(tasks, again, strict=True):
        assert (one.id, one.box, one.point, one.label) == (
            other.id,
            other.box,
            other.point,
            other.label,
        )
        assert np.array_equal(one.truth, other.truth)
        assert np.array_equal(one.crop(), other.crop())


@pytest.mark.parametrize(
    "edit, message",
    [
        ({"box": [5, 5, 5, 9]}, "must be left, top, right, bottom"),
        ({"point": [99, 0]}, "must be x, y within its box"),
        ({"truth": {"size": [1, 2], "counts": "11"}}, "they must be equal"),
        ({"id": "blob0-1"}, "is there twice"),
        ({"label": 3}, "label must be a text"),
    ],
)
def test_damaged_tasks_are_told(make_tasks, tmp_path, edit, message):
    file = write_tasks(tmp_path / "objects.json", make_tasks(2))
    value = json.loads(file.read_text())
    value["objects"][0] |= edit
    file.write_text(json.dumps(value))
    with pytest.raises(LabelError, match=message):
        read_tasks(file)
