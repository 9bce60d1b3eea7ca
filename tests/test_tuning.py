import json
import math

import pytest
import torch
from torch.nn.functional import avg_pool2d, one_hot
from typer.testing import CliRunner

import pyseg
from pyseg import cli, datasets, models
from pyseg.errors import PysegError
from pyseg.refiners.crf import CRF
from pyseg.training import train_crf
from pyseg.tuning import (
    ITERATIONS,
    MARGIN,
    PROTECT,
    RANGES,
    fit_temperature,
    tune_crf,
    tune_temperature,
)
from pyseg.types import Sample, Segmentation
from pyseg.weights import load_temperature, save_state

CLASSES = ("left", "right", "disc")


class Scenes:
    """Two grounds and a disc, each of one shade with noise; the truth is the shades' borders."""

    classes, palette = CLASSES, ((10, 10, 10), (250, 250, 250), (250, 0, 0))

    def __init__(self, root=None, split="val", labelled=True):
        self.labelled = labelled

    def __len__(self):
        return 5

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        y, x = torch.meshgrid(torch.arange(40), torch.arange(56), indexing="ij")
        labels = (x > 18 + 4 * index + y // 8).to(torch.uint8)
        labels[(y - 20) ** 2 + (x - 12 - 6 * index) ** 2 < 80] = 2
        shade = torch.tensor([60.0, 150.0, 230.0])[labels.long()]
        image = shade + 5 * torch.randn(3, 40, 56, generator=generator)
        labels[0] = 255
        if not self.labelled:
            labels[:] = 255
        return Sample(f"scene{index}", image.clamp(0, 255).to(torch.uint8), labels)


class Coarse:
    """The truth at stride 8, which is what a CRF is for, or exactly."""

    classes = CLASSES
    calls = 0

    def __init__(self, *, weights="default", stride: int = 8, exact: bool = False):
        self.stride, self.exact = stride, exact

    def predict(self, images):
        Coarse.calls += len(images)
        return [self._one(image) for image in images]

    def _one(self, image):
        shade = image.float().mean(0)
        labels = (shade > 105).long() + (shade > 190).long()
        logits = one_hot(labels, 3).permute(2, 0, 1)[None].float()
        if not self.exact:
            logits = 3 * avg_pool2d(logits, self.stride)
        return Segmentation((40, 56), CLASSES, logits=logits[0], image=image)


class LabelsOnly(Coarse):
    def _one(self, image):
        prediction = super()._one(image)
        return prediction.with_labels(prediction.labels)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    Coarse.calls = 0
    monkeypatch.setitem(models._registry._registered, "coarse", Coarse)
    monkeypatch.setitem(models._registry._registered, "labels_only", LabelsOnly)
    monkeypatch.setitem(datasets._registry._registered, "scenes", Scenes)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def score(pipeline, parts):
    metric = pyseg.metrics.get("semantic")(classes=CLASSES)
    for index in parts:
        sample = Scenes()[index]
        metric.update(pipeline.run_stages(sample.image)[-1], sample)
    return metric.compute()["miou"]


def test_finds_parameters_that_help_and_their_scores_are_true():
    tuning = tune_crf(pyseg.build("coarse"), Scenes(), trials=12)
    assert Coarse.calls == 5  # once per image
    assert (tuning.fitted, tuning.checked, tuning.trials) == (3, 2, 12)
    off, best = tuning.reported[0], tuning.best
    assert off.name == "off" and [t.name for t in tuning.reported[1:3]] == ["usual", "default"]
    assert best.fit["miou"] == max(t.fit["miou"] for t in tuning.reported) > off.fit["miou"]
    assert tuning.gain > 0.05
    # The scores are those of the pipelines that the specs build, but for half precision.
    refined = pyseg.build(tuning.spec)
    assert score(refined, (0, 1, 2)) == pytest.approx(best.fit["miou"], abs=2e-3)
    assert score(refined, (3, 4)) == pytest.approx(best.check["miou"], abs=2e-3)
    assert score(pyseg.build("coarse"), (3, 4)) == pytest.approx(off.check["miou"], abs=2e-3)
    crf = refined.stages[1].component
    assert isinstance(crf, CRF) and crf.iterations == best.parameters["iterations"]


def test_recommends_no_crf_where_none_helps():
    tuning = tune_crf(pyseg.build("coarse(exact=True)"), Scenes(), trials=5)
    assert tuning.spec == "coarse(exact=True)"
    assert tuning.best.name == "off" and tuning.gain == 0
    assert [trial.name for trial in tuning.reported] == ["off", "usual", "default"]


def test_is_deterministic_and_within_its_ranges(tmp_path):
    logs = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        file = tmp_path / name
        tune_crf(pyseg.build("coarse"), Scenes(), trials=10, seed=seed, log=file)
        logs.append(json.loads(file.read_text())["trials"])
    assert logs[0] == logs[1] != logs[2]
    for trial in [*logs[0][3:], *logs[2][3:]]:
        parameters = trial["parameters"]
        assert parameters["iterations"] in ITERATIONS and parameters["protect"] in PROTECT
        assert parameters["margin"] in MARGIN
        numbers = *parameters["gaussian"][0], *parameters["bilateral"][0]
        for number, (low, high) in zip(numbers, RANGES, strict=True):
            assert low <= number <= high


def test_goes_on_from_its_log(tmp_path, monkeypatch):
    log = tmp_path / "search.json"
    whole = tune_crf(pyseg.build("coarse"), Scenes(), trials=8)

    refined = []
    original = CRF.refine
    monkeypatch.setattr(
        CRF, "refine", lambda self, *a: refined.append(self.iterations) or original(self, *a)
    )

    def interrupted(steps):
        for step in steps:
            if step == 5 + 6:  # 5 images, 6 trials
                raise KeyboardInterrupt
            yield step

    with pytest.raises(KeyboardInterrupt):
        tune_crf(pyseg.build("coarse"), Scenes(), trials=8, log=log, track=interrupted)
    assert len(json.loads(log.read_text())["trials"]) == 6 and len(refined) == 3 * 6
    refined.clear()
    resumed = tune_crf(pyseg.build("coarse"), Scenes(), trials=8, log=log)
    assert resumed.to_dict() == whole.to_dict()
    assert len(refined) == 3 * 2 + 2 * len(resumed.reported)  # two trials, and the checks
    assert len(json.loads(log.read_text())["trials"]) == 8
    assert [file.name for file in tmp_path.iterdir()] == ["search.json"]

    with pytest.raises(PysegError, match="belongs to other images or another pipeline"):
        tune_crf(pyseg.build("coarse(stride=4)"), Scenes(), trials=8, log=log)
    log.write_text("[1, 2]")
    with pytest.raises(PysegError, match="is no log of pyseg tune"):
        tune_crf(pyseg.build("coarse"), Scenes(), trials=8, log=log)


def test_images_are_spread_evenly():
    seen = []

    class Recorded(Scenes):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    tuning = tune_crf(pyseg.build("coarse"), Recorded(), trials=3, limit=3)
    assert seen == [0, 1, 3] and (tuning.fitted, tuning.checked) == (2, 1)


def test_errors():
    pipeline = pyseg.build("coarse")
    with pytest.raises(PysegError, match="at least 2 images"):
        tune_crf(pipeline, Scenes(), limit=1)
    with pytest.raises(PysegError, match="trials must be at least 3"):
        tune_crf(pipeline, Scenes(), trials=2)
    with pytest.raises(PysegError, match="gives labels only"):
        tune_crf(pyseg.build("labels_only"), Scenes(), trials=3)
    with pytest.raises(PysegError, match="scene0 to scene2 have no labelled pixel"):
        tune_crf(pipeline, Scenes(labelled=False), trials=3)
    other = Scenes()
    other.classes = ("left", "right", "ball")
    with pytest.raises(PysegError, match="classes are not the dataset's: class 2 is 'disc'"):
        tune_crf(pipeline, other)


def test_class_names_are_forgiven_as_by_evaluate():
    """Case does not matter, and a new head does not know its classes' names."""
    data = Scenes()
    data.classes = ("Left", "RIGHT", "disc")
    assert tune_crf(pyseg.build("coarse"), data, trials=3).classes == data.classes
    pipeline = pyseg.build("coarse")
    pipeline.stages[0].component.classes = ("class 0", "class 1", "class 2")
    training = train_crf(pipeline, data, Scenes(), epochs=1, limit=1, iterations=1)
    assert training.table()[0][3:] == list(CLASSES)


def run(*arguments, command="tune"):
    return CliRunner().invoke(cli.app, [command, *map(str, arguments)])


def test_command(tmp_path):
    arguments = ("crf", "--dataset", "scenes", "--root", tmp_path, "--trials", 6)
    shown = run(*arguments, "--spec", "coarse", "--output", tmp_path / "log.json")
    assert shown.exit_code == 0, shown.output
    for word in ("off", "usual", "default", "mIoU, 3 fitted", "mIoU, 2 others", "disc"):
        assert word in shown.output
    assert '6 trials; use --spec "coarse+crf(iterations=' in shown.output
    result = json.loads(run(*arguments, "--spec", "coarse", "--json").output)
    assert result["trials"] == 6 and result["spec"] in shown.output
    assert {trial["name"] for trial in result["reported"]} >= {"off", "usual", "default"}
    assert math.isclose(
        result["gain"],
        next(t for t in result["reported"] if t["name"] == result["best"])["check"]["miou"]
        - result["reported"][0]["check"]["miou"],
    )
    assert json.loads((tmp_path / "log.json").read_text())["images"][0] == "scene0"


def test_command_says_that_no_crf_is_best(tmp_path):
    shown = run(
        "crf",
        "--dataset",
        "scenes",
        "--root",
        tmp_path,
        "--trials",
        4,
        "--spec",
        "coarse(exact=True)",
    )
    assert shown.exit_code == 0 and "no crf is best" in shown.output
    assert '--spec "coarse(exact=True)"' in shown.output


def test_command_knows_its_refiners(tmp_path):
    result = run("segfix", "--dataset", "scenes", "--root", tmp_path)
    assert result.exit_code == 2
    assert "only the refiners crf and temperature and sam can be fitted" in result.stderr


def test_training_lowers_the_loss_and_raises_miou():
    pipeline = pyseg.build("coarse")
    training = train_crf(pipeline, Scenes(), Scenes(), epochs=3, iterations=3)
    assert Coarse.calls == 10  # once per image of both
    assert len(training.losses) == 3
    assert training.losses[2] < training.losses[1] < training.losses[0]
    assert training.trained["miou"] > training.off["miou"]
    # The scores are those of the pipelines.
    assert math.isclose(training.off["miou"], score(pipeline, range(5)))
    assert math.isclose(training.default["miou"], score(pyseg.build("coarse+crf"), range(5)))
    assert math.isclose(training.trained["miou"], score(training.pipeline, range(5)))
    assert len(pipeline.stages) == 1
    repeated = train_crf(pipeline, Scenes(), Scenes(), epochs=3, iterations=3)
    assert repeated.losses == training.losses


def test_training_refuses():
    pipeline, data = pyseg.build("coarse"), Scenes()
    with pytest.raises(PysegError, match="epochs and learning_rate must be positive"):
        train_crf(pipeline, data, data, epochs=0)
    with pytest.raises(PysegError, match="dataset has no images"):
        train_crf(pipeline, data, data, limit=0)
    with pytest.raises(PysegError, match="scene0 of check has no labelled pixel"):
        train_crf(pipeline, data, Scenes(labelled=False))
    with pytest.raises(PysegError, match="gives labels only"):
        train_crf(pyseg.build("labels_only"), data, data)
    other = Scenes()
    other.classes = ("left", "right", "ball")
    with pytest.raises(PysegError, match="check: the pipeline's classes are not the dataset's"):
        train_crf(pipeline, data, other)


def test_command_trains_and_saves_a_pipeline(tmp_path):
    arguments = ("crf", "--dataset", "scenes", "--root", tmp_path, "--spec", "coarse")
    arguments += ("--limit", 2, "--epochs", 2, "--output", tmp_path / "refined")
    shown = run(*arguments, command="train-refiner")
    assert shown.exit_code == 0, shown.output
    for word in ("off", "default", "trained", "loss of each epoch", "refined"):
        assert word in shown.output
    image = Scenes()[4].image
    loaded = pyseg.load(tmp_path / "refined")
    assert str(loaded) == "coarse+crf(trainable=True)"
    plain = pyseg.build("coarse+crf")(image)
    assert not torch.equal(loaded(image).logits, plain.logits)
    result = json.loads(run(*arguments, "--json", command="train-refiner").output)
    assert len(result["losses"]) == 2 and result["trained"]["miou"] > 0
    same = run(*arguments, "--split", "val", command="train-refiner")
    assert same.exit_code == 2 and "--split and --check-split must be different" in same.stderr


def test_temperature_of_drawn_labels():
    """Of labels that are drawn from probabilities, logits times T have the temperature T."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    logits = 1.5 * torch.randn(5, 60_000, generator=generator)
    target = torch.multinomial(logits.softmax(0).T, 1, generator=generator)[:, 0]
    for true in (0.4, 1.0, 3.0):
        assert fit_temperature(true * logits, target) == pytest.approx(true, rel=0.04)
    # A grid says the same: nothing is more likely.
    found = fit_temperature(logits, target)
    grid = torch.linspace(0.5, 2, 31)
    losses = [torch.nn.functional.cross_entropy(logits.T / t, target) for t in grid]
    ours = torch.nn.functional.cross_entropy(logits.T / found, target)
    assert ours <= min(losses) + 1e-6
    assert fit_temperature(logits, logits.argmax(0)) == 0.05
    assert fit_temperature(logits, logits.argmin(0)) == 20
    assert fit_temperature(torch.zeros(3, 4), torch.zeros(4, dtype=torch.long)) > 0


def test_temperature_lowers_the_loss_of_images_not_fitted():
    found = tune_temperature(pyseg.build("coarse(exact=True)"), Scenes())
    assert (found.fitted, found.checked) == (3, 2)
    # one-hot logits that are right: less than 1 makes them as sure as they may be
    assert found.temperature < 0.2 and found.spec.endswith(
        f"+temperature(value={found.temperature})"
    )
    before, after = (found.scores["check"][when] for when in ("before", "after"))
    assert after["nll"] < before["nll"] and after["ece"] < before["ece"]
    assert after["pixel_accuracy"] == before["pixel_accuracy"]
    # The scores are those of the pipelines.
    for spec, scores in (("coarse(exact=True)", before), (found.spec, after)):
        metric = pyseg.metrics.get("calibration")(classes=CLASSES)
        for index in (3, 4):
            metric.update(pyseg.build(spec)(Scenes()[index].image), Scenes()[index])
        assert metric.compute()["ece"] == scores["ece"]
    again = tune_temperature(pyseg.build("coarse(exact=True)"), Scenes(), pixels=10**9)
    assert again.temperature == pytest.approx(found.temperature, rel=0.05)


def test_temperature_refuses():
    pipeline = pyseg.build("coarse")
    with pytest.raises(PysegError, match="at least 2 images"):
        tune_temperature(pipeline, Scenes(), limit=1)
    with pytest.raises(PysegError, match="pixels must be at least 1"):
        tune_temperature(pipeline, Scenes(), pixels=0)
    with pytest.raises(PysegError, match="gives labels only"):
        tune_temperature(pyseg.build("labels_only"), Scenes())
    with pytest.raises(PysegError, match="scene0 to scene2 have no labelled pixel"):
        tune_temperature(pipeline, Scenes(labelled=False))


def test_command_tunes_temperature(tmp_path):
    arguments = ("temperature", "--dataset", "scenes", "--root", tmp_path, "--spec", "coarse")
    shown = run(*arguments)
    assert shown.exit_code == 0, shown.output
    result = json.loads(run(*arguments, "--json").output)
    assert f'use --spec "{result["spec"]}"' in shown.output
    for word in ("ECE", "NLL", "Brier", "3 fitted", "2 others", f"{result['temperature']:.3f}"):
        assert word in shown.output
    assert result["check"]["after"]["nll"] <= result["check"]["before"]["nll"]
    file = tmp_path / "net.safetensors"
    save_state(file, {"w": torch.ones(2)})
    stored = run(*arguments, "--store", file)
    assert "has it now" in stored.output.replace("\n", " ")
    assert load_temperature(file) == result["temperature"]
    torch.save({"w": torch.ones(2)}, tmp_path / "net.pth")
    refused = run(*arguments, "--store", tmp_path / "net.pth")
    assert refused.exit_code == 2 and "is no safetensors file" in refused.stderr
    refused = run("crf", *arguments[1:], "--store", file)
    assert refused.exit_code == 2 and "--store is of temperature" in refused.stderr
    refused = run(*arguments, "--trials", 3)
    assert refused.exit_code == 2
    assert "--trials is of crf, and temperature does not take it" in refused.stderr


def test_command_trains_segfix(tmp_path):
    arguments = ("segfix", "--dataset", "scenes", "--root", tmp_path, "--spec", "coarse")
    arguments += ("--limit", 2, "--batch-size", 2, "--output", tmp_path / "run")
    shown = run(*arguments, "--epochs", 1, command="train-refiner")
    assert shown.exit_code == 0, shown.output
    for word in ("segfix", "off", "default", "trained", "run/pipeline"):
        assert word in shown.output.replace("\n", "")
    again = run(*arguments, "--epochs", 2, command="train-refiner")
    assert again.exit_code == 2 and "earlier run" in again.stderr
    more = run(*arguments, "--epochs", 2, "--resume", "--json", command="train-refiner")
    assert len(json.loads(more.output)["losses"]) == 2
    loaded = pyseg.load(tmp_path / "run" / "pipeline")
    assert str(loaded) == "coarse+segfix"
    refused = run(
        *("crf", *arguments[1:-4]), "--output", tmp_path, "--resume", command="train-refiner"
    )
    assert refused.exit_code == 2
    assert "--resume is of segfix, and crf does not take it" in refused.stderr
