"""The whole way on the command line: objects, predictor, loop, kept masks; and the page."""

import json

import numpy as np
import pytest
from PIL import Image
from pyseg_annotate.annotators import PromptedWorkers, SubmittedMasks
from pyseg_annotate.disagreement import disagreement, dispute
from pyseg_annotate.engine import collect
from pyseg_annotate.quality import jaccard
from pyseg_annotate.studio import StudioWorkers, blank, prepare
from pyseg_annotate.tasks import read_tasks, write_tasks
from typer.testing import CliRunner

from pyseg import cli, testing
from pyseg.errors import LabelError, PysegError
from pyseg.formats import Annotation, Region
from pyseg.formats.annotation import Source
from pyseg.formats.table import find_format
from pyseg.image import write_labels


def run(*arguments):
    return CliRunner().invoke(cli.app, ["annotate", *map(str, arguments)])


def error_of(result):
    assert result.exit_code == 2, result.output
    return result.stderr


def test_conformance():
    testing.check_command("annotate")


def test_the_whole_way_on_nuclei(data_folder, tmp_path, monkeypatch):
    """As the README has it; `run` has the options of the lecture's own line."""
    folder = data_folder("instance/nuclei")
    ids = np.array(Image.open(folder / "instances_u16.png"))
    regions = [Region.cut(0, ids == k) for k in np.unique(ids)[1:]]
    form = find_format("coco")
    annotation = Annotation("image", ids.shape, tuple(regions), "image.png")
    writer = form.writer(tmp_path / "truth.json", Source(("nucleus",), ("image",), None))
    writer.finish([writer.write(annotation)])
    monkeypatch.chdir(tmp_path)
    made = run("objects", "truth.json", "--images", folder, "--limit", 30)
    assert made.exit_code == 0 and "30 objects of 1 images" in made.stdout, made.output
    learnt = run("train", "--annotators", "simulated(workers=8)", "--regressor", "ridge", "--json")
    assert learnt.exit_code == 0, learnt.output
    report = json.loads(learnt.stdout)
    assert report["annotations"] == 150 and 0 < report["judged"] < 80
    done = run(
        "run",
        "--threshold",
        ".83",
        "--rounds",
        "5",
        "--annotators",
        "simulated(workers=8, seed=5)",
        "--json",
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert 30 <= found["annotations"] <= 150 and found["waiting"] == 0 and found["jaccard"] > 0.7
    again = run(
        "run", "--threshold", ".83", "--annotators", "simulated(workers=8, seed=5)", "--json"
    )
    assert json.loads(again.stdout) == found
    shown = json.loads(run("status", "annotated", "--json").stdout)
    assert shown["annotations"] == found["annotations"] and shown["accepted"] == found["accepted"]
    assert "give threshold 0.83" in error_of(run("run", "--threshold", ".9"))
    assert "threshold must be a Jaccard" in error_of(run("run", "--threshold", "1.2"))
    assert "get more, or give rounds 1" in error_of(
        run("run", "--annotators", "simulated(workers=1)")
    )
    assert "without must be of" in error_of(run("train", "--without", "colour"))
    # What was collected is annotations that pyseg reads.
    source = form.open_source(tmp_path / "annotated" / "masks.json", _given())
    assert len(source.read(source.names[0]).regions) == 30


def _given():
    from pyseg.formats.annotation import Given

    return Given()


def test_errors_of_objects(make_tasks, tmp_path):
    assert "does not exist" in error_of(run("objects", tmp_path / "none.json"))
    assert "does not exist" in error_of(run("run", tmp_path / "objects.json"))
    file = write_tasks(tmp_path / "objects.json", make_tasks(3))
    assert "does not exist; `pyseg annotate train`" in error_of(
        run("run", file, "--quality", tmp_path / "q.npz")
    )
    assert "each must be 1 or more" in error_of(run("train", file, "--each", 0))
    assert "annotators must be one of" in error_of(run("run", file, "--annotators", "robots"))
    assert "there is no ledger" in error_of(run("status", tmp_path))


def test_exports_of_other_tools(make_tasks, tmp_path):
    """COCO, labelme and CVAT are three workers; what is exported later is found later."""
    tasks = make_tasks(3)
    size = Image.open(tasks[0].image).size[::-1]

    def export(kind, path, masks):
        regions = tuple(
            Region(0, mask, task.box[0], task.box[1])
            for task, mask in zip(tasks, masks, strict=False)
        )
        annotation = Annotation(tasks[0].image.stem, size, regions, tasks[0].image.name)
        writer = find_format(kind).writer(path, Source(("blob",), (annotation.name,), None))
        writer.finish([writer.write(annotation)])

    truths = [task.truth for task in tasks]
    (tmp_path / "in").mkdir()
    export("coco", tmp_path / "in" / "anna.json", truths)
    export("labelme", tmp_path / "in" / "ben", truths)
    people = SubmittedMasks(tmp_path / "in")
    assert people.workers == ("anna", "ben")
    for task in tasks:
        first = people.annotate(task, [])
        second = people.annotate(task, [first.worker])
        assert (first.worker, second.worker) == ("anna", "ben")
        assert jaccard(first.mask, task.truth) == 1 and jaccard(second.mask, task.truth) > 0.9
        assert first.clicks > 3 and people.annotate(task, ["anna", "ben"]) is None
    export("cvat", tmp_path / "in" / "carl.xml", truths[:2])
    people = SubmittedMasks(tmp_path / "in")
    assert jaccard(people.annotate(tasks[1], ["anna", "ben"]).mask, tasks[1].truth) > 0.9
    assert people.annotate(tasks[2], ["anna", "ben"]) is None
    (tmp_path / "in" / "carl.json").write_text("{}")
    with pytest.raises(PysegError, match="are both of worker 'carl'"):
        SubmittedMasks(tmp_path / "in")
    (tmp_path / "in" / "carl.json").rename(tmp_path / "in" / "dora.json")
    with pytest.raises(LabelError, match="dora"):
        SubmittedMasks(tmp_path / "in").annotate(tasks[0], ["anna", "ben", "carl"])
    with pytest.raises(PysegError, match="there is no folder"):
        SubmittedMasks(tmp_path / "none")


def test_people_at_the_studio(make_tasks, tmp_path):
    class Half:
        fingerprint = "half"

        def predict(self, task, submission):
            return 0.5

    tasks, out = make_tasks(3), tmp_path / "out"
    people = StudioWorkers(tasks, out / "studio", "anna, ben")
    found = collect(tasks, people, Half(), out, rounds=2)
    assert len(found.waiting) == 3
    images, begun, count = prepare(tasks, found.waiting, out / "studio", "anna")
    assert count == 3
    for k, task in enumerate(tasks):
        assert Image.open(images / f"{k:06d}.png").size == task.size[::-1]
        dot = np.array(Image.open(begun / f"{k:06d}.png"))
        assert dot[task.point[1], task.point[0]] == 1 and 5 < dot.sum() < 20

    def draw(worker, k, done):
        home = out / "studio" / worker
        for name in ("labels", ".studio"):
            (home / name).mkdir(parents=True, exist_ok=True)
        write_labels(home / "labels" / f"{k:06d}.png", tasks[k].truth.astype(np.uint8))
        (home / ".studio" / f"{k:06d}.json").write_text(json.dumps({"done": done}))

    draw("anna", 0, True)
    draw("anna", 1, False)
    found = collect(tasks, people, Half(), out, rounds=2)
    assert found.annotations == 1 and found.waiting == tuple(t.id for t in tasks[1:])
    assert np.array_equal(found.chosen[tasks[0].id].submission.mask, tasks[0].truth)
    assert prepare(tasks, found.waiting, out / "studio", "anna")[2] == 2
    for k in (1, 2):
        draw("anna", k, True)
        draw("ben", k, True)
    draw("ben", 0, True)
    assert collect(tasks, people, Half(), out, rounds=2).annotations == 6
    with pytest.raises(PysegError, match="nothing waits for 'anna'"):
        prepare(tasks, (), out / "studio", "anna")
    with pytest.raises(PysegError, match="names joined by commas"):
        StudioWorkers(tasks, out, "../anna")
    assert (blank()(tasks[0].crop().copy()).labels == 0).all()


def test_a_network_that_is_clicked(make_tasks):
    tasks = make_tasks(4)
    workers = PromptedWorkers(workers=3)
    last = []
    for task in tasks:
        taken, scores = [], []
        while (submission := workers.annotate(task, taken)) is not None:
            taken.append(submission.worker)
            assert 1 <= submission.clicks <= len(taken) and submission.mask.shape == task.size
            scores.append(jaccard(submission.mask, task.truth))
        assert len(scores) == 3
        last.append(scores)
    # More clicks, better masks: the clicks correct what is wrong.
    assert np.mean(last, 0)[2] > np.mean(last, 0)[0] and np.mean(last, 0)[2] > 0.5


def test_disputes_by_hand():
    a = np.zeros((4, 5), np.uint8)
    b, c = a.copy(), a.copy()
    c[0] = 1
    model = a.copy()
    model[3, :2] = 1
    one = dispute("x", [a, b, c], ["a", "b", "c"], model)
    assert one.people == pytest.approx((0 + 0.25 + 0.25) / 3)
    assert one.against == {"a": 0, "b": 0, "c": 0.25} and one.suspect == "c"
    assert one.model == pytest.approx(2 / 20)
    values = disagreement([a, b, c], 2)
    assert values[0].tolist() == pytest.approx([1 / 3] * 5) and not values[1:].any()
    c[0] = 255  # says nothing, and disagrees with nobody
    assert dispute("x", [a, b, c], ["a", "b", "c"]).people == 0
    assert not disagreement([a, b, c], 2).any()


def test_the_page_of_disagreement(tmp_path):
    rng = np.random.default_rng(0)
    for who in ("images", "anna", "ben", "model"):
        (tmp_path / who).mkdir()
    for k, name in enumerate(("calm", "loud")):
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(
            tmp_path / "images" / f"{name}.png"
        )
        labels = np.zeros((30, 40), np.uint8)
        labels[10:20, 10:20] = 1
        write_labels(tmp_path / "anna" / f"{name}.png", labels)
        write_labels(tmp_path / "model" / f"{name}.png", labels)
        labels[10:20, 20 : 22 + 8 * k] = 1
        write_labels(tmp_path / "ben" / f"{name}.png", labels)
    people = ["--annotators", tmp_path / "anna", "--annotators", tmp_path / "ben"]
    output = tmp_path / "page"
    result = run(
        "disagreement",
        tmp_path / "images",
        *people,
        "--predictions",
        tmp_path / "model",
        "--classes",
        2,
        "-o",
        output,
    )
    assert result.exit_code == 0, result.output
    value = json.loads((output / "disagreement.json").read_text())
    assert [image["name"] for image in value["images"]] == ["loud", "calm"]
    assert value["images"][0]["people"] == pytest.approx(100 / 1200)
    page = (output / "index.html").read_text()
    assert page.index("loud:") < page.index("calm:") and page.count("<img") == 2
    assert "annotators must be two or more" in error_of(
        run("disagreement", tmp_path / "images", *people[:2], "--classes", 2)
    )


def test_objects_of_label_maps(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    labels = np.zeros((40, 60), np.uint8)
    labels[5:15, 5:20], labels[20:30, 30:45], labels[35:37, 50:52] = 1, 1, 1
    write_labels(tmp_path / "labels" / "a.png", labels)
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    common = [
        tmp_path / "labels",
        "--images",
        tmp_path / "images",
        "--classes",
        "road,car",
        "-o",
        tmp_path / "objects.json",
    ]
    assert run("objects", *common, "--only", "car", "--parts").exit_code == 0
    tasks = read_tasks(tmp_path / "objects.json")
    assert [task.truth.sum() for task in tasks] == [150, 150] and tasks[0].label == "car"
    assert run("objects", *common, "--only", "car", "--parts", "--no-truth").exit_code == 0
    assert all(task.truth is None for task in read_tasks(tmp_path / "objects.json"))
    assert "only: " in error_of(run("objects", *common, "--only", "bus"))
    assert "parts makes them" in error_of(run("objects", *common))
    assert "limit must be" in error_of(run("objects", *common, "--parts", "--limit", 0))
