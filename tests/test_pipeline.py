import copy
import json
import pickle
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pyseg
from pyseg import models, refiners
from pyseg.errors import DeviceError, PluginError, PluginFailure, PysegError, SpecError, UnknownName
from pyseg.models.semantic import SemanticModel
from pyseg.pipeline import Pipeline
from pyseg.refiners import CRF
from pyseg.types import Sample, Segmentation


def tiny(*, num_classes: int | None = None, weights: str | None = "default", bias: float = 0.0):
    """A 1x1 convolution at half size."""
    network = torch.nn.Sequential(
        torch.nn.AvgPool2d(2, ceil_mode=True), torch.nn.Conv2d(3, num_classes or 4, 1)
    )
    if weights == "ones":
        torch.nn.init.ones_(network[1].weight)
    network[1].bias.data += bias
    return SemanticModel(network, [f"class {i}" for i in range(num_classes or 4)])


class Shift:
    """Adds to one class's logits."""

    def __init__(self, *, by: float = 1.0, label: int = 0):
        self.by, self.label = by, label

    def refine(self, image, prediction):
        logits = prediction.logits.clone()
        logits[self.label] += self.by
        return prediction.with_logits(logits)


def not_a_refiner():
    return object()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(models._registry._registered, "tiny", tiny)
    monkeypatch.setitem(refiners._registry._registered, "shift", Shift)
    monkeypatch.setitem(refiners._registry._registered, "wrong", not_a_refiner)


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 7, 9), dtype=torch.uint8)


def test_stages_apply_from_left_to_right(image):
    pipeline = pyseg.build("tiny + shift(by=2) + shift(by=1e6, label=3)", num_classes=5)
    assert str(pipeline) == "tiny+shift(by=2)+shift(by=1000000.0, label=3)"
    assert len(pipeline.classes) == 5
    result = pipeline(image)
    assert result.labels.shape == (7, 9) and result.labels.dtype == torch.uint8
    assert (result.labels == 3).all()
    base, shifted, last = pipeline.run_stages(image)
    torch.testing.assert_close(shifted.logits[0], base.logits[0] + 2)
    assert torch.equal(last.logits, result.logits)


def test_a_list_gives_a_list_of_any_sizes(image):
    pipeline = pyseg.build("tiny")
    other = torch.zeros(3, 4, 5, dtype=torch.uint8)
    results = pipeline([image, other, image])
    assert [r.size for r in results] == [(7, 9), (4, 5), (7, 9)]
    assert torch.equal(results[0].logits, results[2].logits)
    assert pipeline([]) == []


def test_num_classes_and_weights_go_to_the_model_and_options_win():
    assert len(pyseg.build("tiny(num_classes=3)", num_classes=5).classes) == 3
    ones = pyseg.build("tiny+shift", weights="ones").model.network[1]
    assert (ones.weight == 1).all()


@pytest.mark.parametrize(
    "spec, error, message",
    [
        ("shift+tiny", SpecError, "'shift' is a refiner"),
        ("tiny+tiny", SpecError, "'tiny' is a model"),
        ("tniy", UnknownName, "Did you mean 'tiny'"),
        ("tiny+shift(buy=2)", SpecError, "did you mean 'by'.*by=1.0, label=0"),
        ("tiny+shift(by='much')", SpecError, "by must be float, got 'much'"),
        ("tiny+shift(label=True)", SpecError, "label must be int"),
        ("tiny(num_classes='x')", SpecError, "num_classes must be int | None"),
        ("tiny+wrong", PluginError, "lacks refine"),
    ],
)
def test_build_errors(spec, error, message):
    with pytest.raises(error, match=message):
        pyseg.build(spec)


def test_absent_devices_are_named():
    with pytest.raises(DeviceError, match="no torch device"):
        pyseg.build("tiny", device="gpu")
    with pytest.raises(DeviceError, match="no torch device"):
        pyseg.build("tiny", device=["cpu"])
    with pytest.raises(DeviceError, match=r"meta.*hold no numbers"):
        pyseg.build("tiny", device="meta")
    there = torch.accelerator.current_accelerator()
    for kind in ("mps", "xpu", "hpu", "xla"):
        if there is None or there.type != kind:
            with pytest.raises(DeviceError, match=f"'{kind}' was asked for.*device='cpu'") as error:
                pyseg.build("tiny", device=kind)
            assert "\n" not in str(error.value)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match=r"cuda.*pyseg doctor"):
            pyseg.build("tiny", device="cuda")


def test_a_stage_must_return_what_it_promised(image, monkeypatch):
    pipeline = pyseg.build("tiny+shift")
    monkeypatch.setattr(Shift, "refine", lambda *_: torch.zeros(7, 9))
    with pytest.raises(PluginError, match=r"must return pyseg\.Segmentation"):
        pipeline(image)
    smaller = Segmentation((3, 3), ("a",), logits=torch.zeros(1, 3, 3))
    monkeypatch.setattr(Shift, "refine", lambda *_: smaller)
    with pytest.raises(PluginError, match=r"size \(3, 3\)"):
        pipeline(image)


def test_profile_sees_time_and_memory(image):
    class Hungry(Shift):
        def refine(self, image, prediction):
            torch.ones(50 << 20, dtype=torch.uint8)
            return prediction

    refiners._registry._registered["shift"] = Hungry
    model, hungry = pyseg.build("tiny+shift").profile(image)
    assert (model.name, hungry.name) == ("tiny", "shift")
    assert model.milliseconds > 0 and model.peak_bytes >= 0
    assert 45 << 20 < hungry.peak_bytes < 100 << 20


def test_save_and_load(tmp_path, image):
    pipeline = pyseg.build("tiny(bias=2.0)+shift(by=3.0)", num_classes=6)
    pipeline.model.classes = tuple("abcdef")
    folder = pipeline.save(tmp_path / "saved")
    loaded = pyseg.load(folder)
    assert str(loaded) == str(pipeline) and loaded.classes == tuple("abcdef")
    assert torch.equal(loaded(image).logits, pipeline(image).logits)
    pipeline.model.network[1].bias.data += 1
    pipeline.save(folder)  # replaces
    assert torch.equal(pyseg.load(folder)(image).logits, pipeline(image).logits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]


def test_save_does_not_overwrite_other_things(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(FileExistsError, match="no saved pipeline"):
        pyseg.build("tiny").save(tmp_path)


def test_load_refuses_what_is_no_pipeline(tmp_path):
    with pytest.raises(PysegError, match=r"no pipeline\.json"):
        pyseg.load(tmp_path)
    (tmp_path / "pipeline.json").write_text("{")
    with pytest.raises(PysegError, match="damaged"):
        pyseg.load(tmp_path)
    (tmp_path / "pipeline.json").write_text(json.dumps({"format": 99, "stages": []}))
    with pytest.raises(PysegError, match="format 99"):
        pyseg.load(tmp_path)


def _values(node, path=()):
    """The places of all values in a JSON document."""
    yield path
    for key, child in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(child, (dict, list)):
            yield from _values(child, (*path, key))
        else:
            yield (*path, key)


def test_a_damaged_description_is_a_pyseg_error_whatever_is_damaged(tmp_path):
    """Every value in turn absent or of another type, and thousands of random combinations."""
    folder = pyseg.build("tiny+shift(by=3.0)+crf(iterations=2)").save(tmp_path / "saved")
    file = folder / "pipeline.json"
    original = file.read_text()
    wrong = [None, True, -1, 0, 3.5, 10**30, "", "x", "..", "/etc/passwd", "../a", [], {}, [[]]]
    wrong += [[1], ["a"], {"a": 1}, [None], [[1, 2, 3]], [[1, 2, 900]], "a+b", "(", "a" * 10**5]
    places = list(_values(json.loads(original)))[1:]
    assert len(places) > 20
    rng = random.Random()
    cases = [[(place, value)] for place in places for value in [*wrong, KeyError]]
    cases += [
        [(rng.choice(places), rng.choice([*wrong, KeyError])) for _ in range(rng.randint(2, 4))]
        for _ in range(300)
    ]
    loaded = 0
    for case in cases:
        document = json.loads(original)
        for place, value in case:
            node = document
            try:
                for key in place[:-1]:
                    node = node[key]
                if value is KeyError:
                    del node[place[-1]]
                else:
                    node[place[-1]] = copy.deepcopy(value)  # a later change may go into it
            except (KeyError, IndexError, TypeError):
                continue  # an earlier change took the place away
        file.write_text(json.dumps(document))
        try:
            pipeline = pyseg.load(folder)
        except PysegError as error:
            assert len(str(error)) < 1500, case
        else:
            loaded += 1
            pipeline(torch.zeros(3, 8, 8, dtype=torch.uint8)).overlay()
    assert loaded  # num_classes or palette may well be null
    for text in ("[" * 100_000, "3", "[]", "", '"text"', "\x00", "\ufeff{}"):
        file.write_text(text)
        with pytest.raises(PysegError):
            pyseg.load(folder)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PysegError, match="damaged"):
        pyseg.load(folder)


def test_load_opens_nothing_but_the_files_of_its_folder(tmp_path, monkeypatch):
    import socket

    from pyseg import weights

    def refused(*_, **__):
        raise AssertionError("load must open no connection")

    secret = tmp_path / "secret.safetensors"
    pyseg.build("tiny").save(tmp_path / "other")
    next((tmp_path / "other").glob("*.safetensors")).rename(secret)
    folder = pyseg.build("streetnet+crf", weights=None).save(tmp_path / "saved")
    file = folder / "pipeline.json"
    description = json.loads(file.read_text())
    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(weights, "resolve", refused)
    for text in ("http://127.0.0.1:9/x.pth", "/etc/passwd", "default", "bundled", str(secret)):
        for stage, saved in (
            (f"streetnet(weights={text!r})", None),
            (f"streetnet(weights={text!r})", description["stages"][0]["weights"]),
        ):
            description["stages"][0] = {"stage": stage, "size": None, "weights": saved}
            file.write_text(json.dumps(description))
            assert len(pyseg.load(folder).classes) == 11
        trained = f"crf(trainable=True, weights={text!r})"
        description["stages"][1] = {"stage": trained, "weights": None}
        file.write_text(json.dumps(description))
        assert pyseg.load(folder).refiners[0].compatibility is not None
    for name in ("../secret.safetensors", str(secret), "..", ".", "", "a/../b"):
        description["stages"][0] = {"stage": "streetnet", "weights": name}
        file.write_text(json.dumps(description))
        with pytest.raises(PysegError, match="must be the name of a file of the folder"):
            pyseg.load(folder)


def test_the_size_of_earlier_folders_is_an_option(tmp_path, monkeypatch):
    def sized(*, size: str | None = None, weights: str | None = "default"):
        made = Sized()
        made.size = size or ("large" if weights else "small")
        return made

    class Sized(torch.nn.Linear):
        def __init__(self):
            super().__init__(1, 1)

        def refine(self, image, prediction):
            return prediction

        def config(self):
            return {"size": self.size}

    monkeypatch.setitem(refiners._registry._registered, "sized", sized)
    folder = pyseg.build("tiny+sized").save(tmp_path / "saved")
    assert pyseg.load(folder).refiners[0].size == "large"
    file = folder / "pipeline.json"
    description = json.loads(file.read_text())
    assert description["stages"][1].pop("config") == {"size": "large"}
    description["stages"][1]["size"] = "huge"  # as it was written before
    file.write_text(json.dumps(description))
    assert pyseg.load(folder).refiners[0].size == "huge"


def test_pickling_and_threads(image):
    pipeline = pyseg.build("tiny+shift(by=4)")
    copy = pickle.loads(pickle.dumps(pipeline))
    expected = pipeline(image).labels
    assert torch.equal(copy(image).labels, expected)
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(pipeline, [image] * 32):
            assert torch.equal(result.labels, expected)


def test_to_returns_the_pipeline(image):
    pipeline = pyseg.build("tiny", device="cpu")
    assert pipeline.to("cpu") is pipeline and pipeline.device.type == "cpu"


def test_to_a_dtype_changes_the_model_alone(image):
    pipeline = pyseg.build("tiny+crf(iterations=1)")
    expected = pipeline(image).labels
    assert pipeline.to(torch.bfloat16) is pipeline
    assert next(pipeline.model.parameters()).dtype == torch.bfloat16
    assert (pipeline(image).labels == expected).float().mean() > 0.9
    with pytest.raises(PysegError, match=r"floating point, got torch\.int8"):
        pipeline.to(torch.int8)


# --- modes and threads ----------------------------------------------------------------------------


def normalised(classes=5):
    """A network that works otherwise in training mode, and is changed by that."""
    layers = torch.nn.Conv2d(3, classes, 3), torch.nn.BatchNorm2d(classes), torch.nn.Dropout(0.5)
    return torch.nn.Sequential(*layers)


def test_models_leave_build_load_and_create_in_evaluation_mode(tmp_path, monkeypatch):
    def factory(*, num_classes=None, weights=None):
        return SemanticModel(normalised(), tuple("abcde")).train()

    monkeypatch.setitem(models._registry._registered, "normalised", factory)
    built = pyseg.build("normalised+crf(trainable=True)")
    loaded = pyseg.load(built.save(tmp_path / "saved"))
    own = normalised()
    given = pyseg.build(own, normalised(), num_classes=5)
    for pipeline in (built, loaded, given):
        for part in (pipeline.model, *pipeline.refiners):
            assert not any(module.training for module in part.modules())
    assert not models.create("normalised").training and not own.training
    # and so those that are made without a name
    assert not CRF(trainable=True, num_classes=2).training
    assert not refiners.SamRefiner(torch.nn.Identity()).training
    assert not any(m.training for m in pyseg.build("streetnet", weights=None).model.modules())
    before = copy.deepcopy(built.model.state_dict())
    x = torch.rand(2, 3, 9, 9)
    first, second = built.model.network(x), built.model.network(x)
    assert torch.equal(first, second)
    assert all(torch.equal(v, before[k]) for k, v in built.model.state_dict().items())


def test_threads_give_what_one_gives_and_change_nothing():
    pipeline = pyseg.build("streetnet+crf(iterations=1)")
    images = [torch.randint(0, 256, (3, 32, 40 + 8 * k), dtype=torch.uint8) for k in range(8)] * 3
    before = copy.deepcopy(pipeline.model.state_dict())
    expected = [pipeline(image).logits for image in images]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(pipeline, images))
    for result, logits in zip(results, expected, strict=True):
        assert torch.equal(result.logits, logits)
    assert all(torch.equal(v, before[k]) for k, v in pipeline.model.state_dict().items())
    assert not pipeline.model.training


def test_predicting_in_training_mode_is_refused_and_switches_nothing(image):
    pipeline = pyseg.build("tiny+crf")
    pipeline.refiners[0].train()
    with pytest.raises(PysegError, match=r"stage 'crf' is in training mode.*eval\(\)"):
        pipeline(image)
    pipeline = pyseg.build("tiny+crf")
    pipeline.model.train()
    with pytest.raises(PysegError, match=r"stage 'tiny' is in training mode"):
        pipeline(image)
    assert pipeline.model.training


def test_training_switches_by_itself(tmp_path):
    class Data:
        classes, palette = tuple("abcde"), ((1, 2, 3),) * 5

        def __len__(self):
            return 4

        def __getitem__(self, index):
            image = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8)
            return Sample(str(index), image, torch.zeros(24, 24, dtype=torch.uint8))

    model = pyseg.build(normalised(), num_classes=5).model
    assert not model.training
    options = {"batch_size": 2, "crop_size": (16, 16), "progress": False, "precision": "fp32"}
    pyseg.train(model, Data(), output_dir=tmp_path, epochs=2, validation=Data(), **options)
    # trained on with statistics of its batches, validated and left in evaluation mode
    assert model.network[1].num_batches_tracked == 4 and not model.training


# --- networks and objects as stages ---------------------------------------------------------------


def double(image, prediction):
    return prediction.with_logits(2 * prediction.logits)


def test_build_takes_a_network(image):
    network = torch.nn.Conv2d(3, 2, 1)
    pipeline = pyseg.build(network, "crf(iterations=2)", double, classes=("road", "sky"))
    assert pipeline.classes == ("road", "sky") and pipeline.model.network is network
    assert str(pipeline) == "<Conv2d>+crf(iterations=2)+<double>"
    assert pipeline(image).labels.shape == (7, 9)
    base, crf, doubled = pipeline.run_stages(image)
    assert torch.equal(doubled.logits, 2 * crf.logits) and base.logits.shape[0] == 2
    assert pyseg.build(network, num_classes=2).classes == ("class 0", "class 1")
    several = pyseg.build("tiny", "shift+shift(by=2)", Shift(by=3))
    assert str(several) == "tiny+shift+shift(by=2)+<Shift>"


def test_build_and_pipeline_take_objects(image):
    class Constant:
        classes = ("a", "b")

        def predict(self, images):
            return [
                Segmentation(tuple(i.shape[1:]), self.classes, logits=torch.eye(2)[:, :, None])
                for i in images
            ]

    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(3.0))

        def forward(self, image, prediction):
            return prediction.with_logits(self.factor.detach() * prediction.logits)

    model, crf = Constant(), CRF(iterations=1)
    pipeline = Pipeline([model, Scale().eval(), crf, lambda i, p: p])
    assert pipeline.model is model and pipeline.refiners[1] is crf
    assert str(pipeline).startswith("<Constant>+<Scale>+crf(iterations=1, ")
    assert pipeline(image).logits.shape == (2, 7, 9)
    assert str(pyseg.build(model, crf)) == str(Pipeline([model, crf]))
    assert pyseg.build(model, Scale()).refiners[0].training is False
    row = "<tr><td>refiner</td><td><code>&lt;Scale&gt;</code></td><td>Scale</td><td>1</td></tr>"
    assert row in pipeline._repr_html_()


@pytest.mark.parametrize(
    ("stages", "options", "error", "message"),
    [
        ((torch.nn.Conv2d(3, 2, 1),), {}, SpecError, "does not say what its classes are"),
        ((torch.nn.Conv2d,), {}, PluginError, "got the class Conv2d"),
        ((3,), {}, PluginError, "got a int"),
        ((torch.nn.Identity(),), {"num_classes": 0}, SpecError, "num_classes must be 1 to"),
        ((torch.nn.Identity(),), {"classes": "ab"}, SpecError, "must be  names"),
        (
            (torch.nn.Identity(),),
            {"classes": ("a", "b"), "num_classes": 3},
            SpecError,
            "must be 3 names",
        ),
        (
            (torch.nn.Identity(),),
            {"classes": ("a", "b"), "palette": [(1, 2, 3)]},
            SpecError,
            "one colour per class",
        ),
        (
            (torch.nn.Identity(),),
            {"classes": ("a",), "weights": "x.pt"},
            SpecError,
            "weights: options of a model that a spec names, but a Identity is made already",
        ),
        (("tiny", object()), {}, PluginError, "stage 1 .a object.* lacks refine"),
        (("tiny", CRF), {}, PluginError, "gave a class, CRF"),
        (("tiny",), {"classes": ("a",)}, SpecError, "give num_classes"),
        (("tiny",), {"n_classes": 3}, SpecError, "no option 'n_classes'; did you mean 'num_cl"),
        (("tiny(bias=1.0)",), {"bias": 2.0}, SpecError, "'bias' is given twice"),
        (("tiny",), {"num_classes": 10**9}, SpecError, "at most 32767"),
    ],
)
def test_build_refuses(stages, options, error, message):
    with pytest.raises(error, match=message):
        pyseg.build(*stages, **options)


def test_pipelines_of_objects_are_refused_by_name():
    with pytest.raises(PysegError, match="at least a model"):
        Pipeline([])
    with pytest.raises(PluginError, match=r"pyseg\.build takes names"):
        Pipeline(["tiny"])
    with pytest.raises(PluginError, match=r"without predict: pyseg\.build"):
        Pipeline([torch.nn.Identity()])


def test_options_of_the_model_are_arguments_too():
    pipeline = pyseg.build("tiny+shift", bias=2.0)
    assert str(pipeline) == "tiny(bias=2.0)+shift"


def test_a_model_must_have_as_many_classes_as_it_was_asked_for(monkeypatch):
    stubborn = lambda **options: tiny()  # noqa: E731
    monkeypatch.setitem(models._registry._registered, "stubborn", stubborn)
    with pytest.raises(PluginError, match="'stubborn' was asked for 3 classes and has 4"):
        pyseg.build("stubborn", num_classes=3)


def test_objects_made_by_name_can_be_saved_others_say_why_not(tmp_path, image):
    model = models.create("tiny", num_classes=3, bias=1.0)
    pipeline = pyseg.build(model, Shift(by=2.0), CRF(iterations=1, gaussian=((3.0, 2.0),)))
    with pytest.raises(PysegError, match=r"'<Shift>' was given as an object.*register"):
        pipeline.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipeline = pyseg.build(model, refiners.create("shift", by=2.0), pipeline.refiners[1])
    loaded = pyseg.load(pipeline.save(tmp_path / "saved"))
    assert str(loaded) == str(pipeline)
    assert str(loaded).startswith("tiny(num_classes=3, bias=1.0)+shift(by=2.0)+crf(iterations=1, ")
    assert torch.equal(loaded(image).logits, pipeline(image).logits)
    with pytest.raises(PysegError, match="'<Conv2d>' was given as an object"):
        pyseg.build(torch.nn.Conv2d(3, 2, 1), num_classes=2).save(tmp_path / "other")


def test_copies(image):
    pipeline = pyseg.build(torch.nn.Conv2d(3, 2, 1), double, "crf(iterations=1)", num_classes=2)
    for other in (copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
        assert str(other) == str(pipeline) and other.model is not pipeline.model
        assert torch.equal(other(image).logits, pipeline(image).logits)


def test_save_into_a_file_is_refused(tmp_path):
    (tmp_path / "afile").write_text("x")
    for path in (tmp_path / "afile", tmp_path / "afile" / "below" / "it"):
        with pytest.raises(PysegError, match=r"afile' is a file; give a folder"):
            pyseg.build("tiny").save(path)


# --- stages that fail -----------------------------------------------------------------------------


def test_a_stage_that_fails_is_named_with_the_image(image, tmp_path, monkeypatch):
    from pyseg.image import write_image

    def fails(*_):
        raise KeyError("depth")

    path = tmp_path / "street.png"
    write_image(path, image)
    pipeline = pyseg.build("tiny+shift(by=2)")
    monkeypatch.setattr(Shift, "refine", fails)
    for source, name in ((path, r"'.*street\.png'"), (image, "of 7 x 9 pixels")):
        with pytest.raises(
            PluginFailure, match=rf"stage 'shift\(by=2\)' failed on image {name}: KeyError: 'depth'"
        ) as caught:
            pipeline(source)
        assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(PluginFailure, match="on image frame 7: KeyError"):
        pipeline.trace(image, name="frame 7")
    monkeypatch.setattr(SemanticModel, "predict", fails)
    with pytest.raises(PluginFailure, match=r"stage 'tiny' failed on images '.*street.png', of 7"):
        pipeline([path, image])


def test_errors_with_a_remedy_of_their_own_pass_through(image, monkeypatch):
    pipeline = pyseg.build("tiny+shift")
    for error in (SpecError("put it earlier"), ImportError("no kernel"), MemoryError()):

        def fails(*_, error=error):
            raise error

        monkeypatch.setattr(Shift, "refine", fails)
        with pytest.raises(type(error)) as caught:
            pipeline(image)
        assert caught.value is error


def test_a_folder_in_place_of_a_spec_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "tiny").mkdir()  # called like a model: the model is meant
    for spec in ("empty", "./empty", str(tmp_path / "empty")):
        with pytest.raises(
            SpecError, match=r"empty' is no saved pipeline: it has no pipeline\.json"
        ):
            pyseg.build(spec)
    with pytest.raises(SpecError, match=r"there is no folder '\./nope'"):
        pyseg.build("./nope")
    pyseg.build("tiny").save("saved")
    with pytest.raises(SpecError, match=r"'saved' is a saved pipeline: pyseg\.load reads it"):
        pyseg.build("saved")


def test_hostile_specs_end_as_errors_of_pyseg(monkeypatch):
    monkeypatch.setenv("PYSEG_OFFLINE", "1")
    long, crowd = "a" * 300, "+crf" * 2000
    for spec in (
        "streetnet(num_classes=1000000000)",
        "streetnet(num_classes=-5)",
        "streetnet(weights='~nouser/x')",
        f"streetnet(weights='{long}')",
        "streetnet(weights='http://[::1')",
        "streetnet(weights='\\0')",
        "streetnet+crf(iterations=2147483648)",
        f"streetnet{crowd}",
        f"streetnet{crowd * 9}",
        f"streetnet+crf(gaussian='{long * 30}')",
        f"tiny({'x' * 9000}=1)",
        "tiny+shift(by=-" + "-" * 900 + "1)",
        "tiny(bias=0x" + "f" * 5000 + ")",
        "nobody:tiny",
        "tiny\0",
        "\0",
        "/" * 900,
        "~",
    ):
        with pytest.raises(PysegError) as caught:
            pyseg.build(spec)
        assert len(str(caught.value)) < 1000, spec[:40]


class Timed(SemanticModel):
    """A network that takes ``seconds`` in bfloat16 and in float32, and says in which it ran."""

    def __init__(self, wide, narrow):
        super().__init__(torch.nn.Conv2d(3, 2, 1), ("a", "b"))
        self.seconds, self.calls = {False: wide, True: narrow}, []

    def forward(self, images):
        narrow = torch.is_autocast_enabled("cpu")
        time.sleep(self.seconds[narrow])
        self.calls.append((narrow, tuple(images.shape[2:])))
        return super().forward(images)


def test_precision(image, monkeypatch):
    """ "auto" is bfloat16 where the processor has it and it is faster, timed once on a part."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    large = torch.zeros(3, 300, 280, dtype=torch.uint8)
    for wide, narrow in ((0.03, 0.001), (0.001, 0.03)):
        pipeline = Pipeline([Timed(wide, narrow)], precision="auto")
        assert pipeline(large).logits.dtype == (torch.bfloat16 if narrow < wide else torch.float32)
        calls = pipeline.model.calls
        assert calls[:4] == [(w, (256, 256)) for w in (False, False, True, True)]
        pipeline([large, image])
        assert calls[4:] == [(narrow < wide, x.shape[1:]) for x in (large, large, image)]
        pipeline = pickle.loads(pickle.dumps(Pipeline([Timed(wide, narrow)])))
        pipeline(image)
        assert pipeline.model.calls == [(False, image.shape[1:])]
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    for precision, expected in (("auto", False), ("bf16", True)):
        pipeline = Pipeline([Timed(0, 0)], precision=precision)
        pipeline(image)
        assert pipeline.model.calls == [(expected, image.shape[1:])]
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, auto, got 'half'"):
        pyseg.build("streetnet", weights=None, precision="half")


def test_bfloat16_keeps_the_scores(data_folder, one_thread):
    """Within a tenth of a point of mIoU, on every fourth image of the validation clip."""
    data = pyseg.datasets.create("camvid", root=data_folder("camvid"), split="val")
    scores = {}
    for precision in ("fp32", "bf16"):
        pipeline = pyseg.build("streetnet", precision=precision)
        metric = pyseg.metrics.create("semantic", num_classes=11)
        for index in range(0, len(data), 4):
            metric.update(pipeline(data[index].image), data[index])
        scores[precision] = metric.compute()["miou"]
    assert 0 < abs(scores["bf16"] - scores["fp32"]) < 0.001
