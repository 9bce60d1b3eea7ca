import functools
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pyseg import datasets, metrics, models, refiners
from pyseg.errors import PluginError, PluginFailure, SpecError, UnknownName, require
from pyseg.registry import MAX_CLASSES, Registry, check_options
from pyseg.spec import StageSpec


class Point:
    def __init__(self, name, value, owner, load):
        self.name, self.value, self.load = name, value, load
        read = {"name": owner, "version": "1.0", "read_text": staticmethod(lambda name: None)}
        self.dist = type("Dist", (), read)


@pytest.fixture
def points(monkeypatch):
    """A list of entry points that stands for what is installed."""
    found = []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: list(found))
    return found


def broken():
    raise RuntimeError("no such driver")


def test_builtins_are_found_through_their_entry_points():
    assert {"fcn_resnet50", "lraspp_mobilenet_v3_large", "streetnet"} <= set(models.list())
    assert {"crf", "sam", "sam2"} <= set(refiners.list())
    assert "semantic" in metrics.list() and {"camvid", "folder"} <= set(datasets.list())
    info = refiners.info("crf")
    assert (info.target, info.distribution) == ("pyseg.refiners.crf:CRF", "pyseg-toolkit")


def test_unknown_name_shows_the_nearest_and_all():
    with pytest.raises(UnknownName, match="Did you mean 'fcn_resnet50'") as caught:
        models.get("fcn_resnet5")
    assert "deeplabv3_resnet101" in str(caught.value)


def test_a_broken_plugin_hurts_only_who_asks_for_it(points):
    points += [
        Point("bad", "bad:make", "bad-plugin", broken),
        Point("good", "g:m", "g", lambda: int),
    ]
    registry = Registry("model", "any")
    assert registry.list() == ["bad", "good"]
    assert registry.get("good") is int
    with pytest.raises(PluginError, match=r"bad-plugin.*no such driver") as caught:
        registry.get("bad")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_two_distributions_with_one_name_are_an_error_naming_both(points):
    points += [Point("m", "a:m", "first", lambda: int), Point("m", "b:m", "second", lambda: str)]
    registry = Registry("model", "any")
    with pytest.raises(PluginError, match=r"first \(a:m\) and second \(b:m\)"):
        registry.get("m")


def test_one_distribution_seen_twice_is_no_clash(points):
    points += [Point("m", "a:m", "same", lambda: int)] * 2
    assert Registry("model", "any").get("m") is int


def test_an_entry_point_must_be_callable(points):
    points.append(Point("m", "a:m", "d", lambda: 3))
    with pytest.raises(PluginError, match="class or function"):
        Registry("model", "any").get("m")


def test_register_refuses_taken_names(points):
    points.append(Point("installed", "a:m", "d", lambda: int))
    registry = Registry("model", "any")

    @registry.register("mine")
    def mine():
        """A factory."""

    assert registry.get("mine") is mine and registry.list() == ["installed", "mine"]
    assert registry.register("mine")(mine) is mine  # a module that is reloaded
    for name in ("mine", "installed"):
        with pytest.raises(PluginError, match="already registered"):
            registry.register(name)(int)


# --- names with options -> objects --------------------------------------------------------------


class Blur:
    """Blurs.

    Args:
        radius: in pixels.
    """

    def __init__(
        self,
        *,
        radius: int = 2,
        weights: str | Path | None = "default",
        num_classes: int | None = None,
        kernels: Sequence[tuple[float, float]] = (),
    ):
        if radius < 0:
            raise ValueError("radius must be 0 or more")
        if radius == 13:
            {}["unlucky"]
        self.radius, self.weights, self.num_classes = radius, weights, num_classes

    def refine(self, image, prediction):
        return prediction


class Inherits(Blur):
    """Takes its options from its base."""


@pytest.fixture
def blurs():
    registry = Registry("refiner", "any")
    registry.register("blur")(Blur)
    registry.register("inherits")(Inherits)
    registry.register("blur_large")(functools.partial(Blur, radius=9))
    return registry


def test_make_and_create(blurs):
    assert blurs.make("blur(radius=3)").radius == 3
    assert blurs.create("blur", radius=4, weights=Path("a.pt")).weights == Path("a.pt")
    assert blurs.create("blur(radius=5)", weights=None).weights is None
    assert blurs.create("blur_large").radius == 9


def test_context_is_passed_where_it_is_accepted_and_not_given(blurs):
    context = {"num_classes": 7, "radius": 1, "things": ("car",)}
    made = blurs.make("blur(radius=3)", context)
    assert (made.radius, made.num_classes) == (3, 7)
    got = {}
    registry = Registry("metric", "any")

    @registry.register("takes_anything")
    def takes_anything(**options):
        got.update(options)
        return metrics.Semantic(**options)

    registry.make("takes_anything", {"classes": ("a", "b"), "things": ()})
    assert got == {"classes": ("a", "b")}


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ("blurr", {}, UnknownName, "Did you mean 'blur'"),
        ("blur+blur", {}, SpecError, "must be one name"),
        ("blur(radios=2)", {}, SpecError, "no option 'radios'; did you mean 'radius'"),
        ("blur", {"count": 2}, SpecError, r"has no option 'count'\. Its options: radius=2,"),
        ("blur(radius=1)", {"radius": 2}, SpecError, "option 'radius' is given twice"),
        ("blur(radius=-1)", {}, SpecError, r"refiner blur\(radius=-1\): radius must be 0 or more"),
        ("blur(radius='x')", {}, SpecError, "radius must be int, got 'x'"),
        ("blur(kernels=3)", {}, SpecError, r"kernels must be Sequence\[tuple"),
        ("inherits(radius='x')", {}, SpecError, "radius must be int, got 'x'"),
        ("inherits(radius=True)", {}, SpecError, "radius must be int"),
        ("blur_large(weights=3)", {}, SpecError, "weights must be str"),
        ("blur(num_classes=1000000000)", {}, SpecError, f"at most {MAX_CLASSES}"),
        ("blur(radius=13)", {}, PluginFailure, r"KeyError: 'unlucky' \(test_registry\.py, line"),
    ],
)
def test_one_set_of_errors(blurs, text, options, error, message):
    with pytest.raises(error, match=message):
        blurs.create(text, **options)


def test_values_that_no_text_can_hold_are_left_to_the_factory(blurs):
    assert blurs.create("blur", kernels=torch.zeros(1, 2)).radius == 2


def test_errors_stay_short(blurs):
    long = "x" * 9000
    for text in (long, f"blur({long}=1)", f"blur(radius='{long}')", f"blur(radius={long})"):
        with pytest.raises((SpecError, UnknownName)) as caught:
            blurs.make(text)
        assert len(str(caught.value)) < 600, text[:20]


@pytest.mark.parametrize(
    ("kind", "made", "message"),
    [
        ("model", type("M", (), {"predict": 1})(), r"lacks classes; a model.*pyseg\.types\.Model"),
        ("refiner", Blur, "gave a class, Blur, where an object of it is needed"),
        ("metric", object(), r"lacks update, state, load_state, compute.*pyseg\.types\.Metric"),
        (
            "dataset",
            type("D", (), {"classes": (), "__len__": len, "__getitem__": len})(),
            "lacks palette",
        ),
    ],
)
def test_objects_of_another_kind_are_named(kind, made, message):
    registry = Registry(kind, "any")
    registry.register("odd")(lambda: made)
    with pytest.raises(PluginError, match=message):
        registry.create("odd")


def test_models_and_refiners_come_in_evaluation_mode():
    registry = Registry("model", "any")
    registry.register("m")(lambda: models.SemanticModel(torch.nn.Dropout(), ("a",)).train())
    assert not registry.create("m").training


def test_create_in_every_family():
    assert isinstance(models.create("streetnet", weights=None), models.SemanticModel)
    assert refiners.create("crf", iterations=3).iterations == 3
    assert isinstance(metrics.create("semantic", classes=("a", "b")), metrics.Semantic)
    scenes = datasets.create("synthetic", length=3)
    assert isinstance(scenes, datasets.StreetScenes) and len(scenes) == 3


def test_options_of_a_factory_that_python_cannot_inspect():
    registry = Registry("refiner", "any")
    registry.register("c")(dict)
    check_options(StageSpec("c", {"anything": 1}), dict)
    assert registry.describe("c").any_option


# --- what there is ------------------------------------------------------------------------------


def test_list_takes_a_wildcard():
    assert "fcn_resnet50" in models.list("*resnet*") and "streetnet" not in models.list("*resnet*")
    assert models.list("street???") == ["streetnet"] and models.list("no*") == []


def test_describe_tells_signature_options_and_documentation(blurs):
    found = blurs.describe("blur")
    assert found.kind == "refiner" and found.distribution == "register()"
    assert found.signature.startswith("blur(*, radius: int = 2")
    assert found.options[0].name == "radius" and found.options[0].type == "int"
    assert found.options[0].default == "2" and not found.any_option
    assert found.options[1].type == "str | Path | None"
    assert found.documentation.startswith("Blurs.\n\nArgs:")
    assert json.loads(json.dumps(found.to_dict()))["name"] == "blur"
    crf = refiners.describe("crf")
    assert crf.distribution == "pyseg-toolkit"
    assert {"iterations", "protect"} <= {option.name for option in crf.options}


def test_a_clash_is_resolved_by_naming_the_distribution(points):
    points += [
        Point("m", "a:m", "first-plugin", lambda: Blur),
        Point("m", "b:m", "second", lambda: Inherits),
        Point("other", "b:o", "second", lambda: Blur),
    ]
    registry = Registry("refiner", "any")
    assert registry.list() == ["m", "other"]
    with pytest.raises(PluginError, match="write 'first-plugin:m' or 'second:m'"):
        registry.get("m")
    assert registry.get("first-plugin:m") is Blur
    assert type(registry.make("First_Plugin:m(radius=4)")) is Blur
    assert type(registry.create("second:m", radius=4)) is Inherits
    assert registry.info("second:m").target == "b:m"
    assert registry.get("second:other") is Blur
    with pytest.raises(UnknownName, match="provided by first-plugin and second, not by 'third'"):
        registry.get("third:m")
    assert [(e.name, e.distribution) for e in registry.entries()] == [
        ("first-plugin:m", "first-plugin"),
        ("second:m", "second"),
        ("other", "second"),
    ]


def test_a_plugin_that_exits_on_import_is_a_broken_plugin(points):
    points.append(Point("m", "a:m", "leaver", lambda: sys.exit(3)))
    with pytest.raises(PluginError, match=r"leaver.*SystemExit: 3"):
        Registry("model", "any").get("m")


# --- classes by name ----------------------------------------------------------------------------


def test_classes_stand_in_their_packages_without_importing_torch():
    code = (
        "import sys\n"
        "import pyseg.models, pyseg.refiners, pyseg.metrics, pyseg.datasets\n"
        "families = pyseg.models, pyseg.refiners, pyseg.metrics, pyseg.datasets\n"
        "assert all(family.list() for family in families)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "for family in families:\n"
        "    assert set(family.__all__) <= set(dir(family))\n"
        "    for name in family.__all__:\n"
        "        assert callable(getattr(family, name)), name\n"
        "    assert not hasattr(family, 'Nothing')\n"
        "from pyseg.metrics import Semantic\n"
        "from pyseg.datasets import CamVid, Folder\n"
        "from pyseg.refiners import CRF\n"
        "from pyseg.models import SemanticModel\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_optional_packages_name_their_remedy(tmp_path, monkeypatch):
    assert require("json") is json
    with pytest.raises(ImportError, match=r"'no_such_thing' is not installed: pip install") as e:
        require("no_such_thing.part", extra="train")
    assert "'pyseg-toolkit[train]'" in str(e.value) and e.value.name is None
    (tmp_path / "half_there.py").write_text("import no_such_thing")
    (tmp_path / "is_broken.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"what it needs is not.*no_such_thing"):
        require("half_there")
    with pytest.raises(ImportError, match=r"cannot be imported \(RuntimeError: operator nms"):
        require("is_broken")
