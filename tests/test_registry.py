import importlib.metadata

import pytest

from pyseg import datasets, metrics, models, refiners
from pyseg.errors import PluginError, UnknownName
from pyseg.registry import Registry


class Point:
    def __init__(self, name, value, owner, load):
        self.name, self.value, self.load = name, value, load
        self.dist = type("Dist", (), {"name": owner, "version": "1.0"})


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
