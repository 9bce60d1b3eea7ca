"""Bars in notebooks: HTML that grows, and nothing elsewhere."""

import re
import sys
import types

import pytest

import pyseg
from pyseg import progress


class Handle:
    def __init__(self, shown):
        self.shown = shown

    def update(self, html):
        self.shown.append(html)


@pytest.fixture
def notebook(monkeypatch):
    """A stand-in for a kernel's IPython; what it has been shown."""
    shown = []
    display = types.ModuleType("IPython.display")
    display.HTML = str

    def show(html, display_id):
        shown.append(html)
        return Handle(shown)

    display.display = show
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_elsewhere_nothing_is_shown(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    items = [3, 1, 2]
    assert progress.notebook_bar(items) is items


def test_evaluate_shows_a_bar_in_a_notebook(notebook):
    scenes = pyseg.datasets.create("synthetic", length=3, size=(32, 48))
    model = pyseg.build("segnet_basic", num_classes=8, weights=None).model
    pyseg.evaluate(pyseg.build(model, classes=scenes.classes), scenes)
    assert re.search(r'<progress value="0" max="3">', notebook[0])
    assert re.search(r'<progress value="3" max="3">.*3 of 3, \d+ s</div>$', notebook[-1])


def test_a_bar_that_is_stopped_shows_where(notebook):
    walk = iter(progress.notebook_bar(range(10)))
    next(walk), next(walk)
    walk.close()
    assert 'value="1" max="10"' in notebook[-1] and "left" in notebook[-1]


def test_training_shows_epochs_and_loss(notebook, tmp_path):
    scenes = pyseg.datasets.create("synthetic", length=2, size=(32, 48))
    model = pyseg.build("segnet_basic", num_classes=8, weights=None).model
    pyseg.train(
        model, scenes, output_dir=tmp_path, epochs=2, batch_size=2, crop_size=(32, 32), steps=1
    )
    assert re.search(r'max="2">.*2 of 2, loss \d', notebook[-1])
