"""Miniature trees of published data sets, in their exact layouts."""

from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image


def write(path, content):
    """Writes an array as an image, a dict as .mat, and a text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, dict):
        scipy.io.savemat(path, content)
    else:
        Image.fromarray(content).save(path)


@pytest.fixture
def tree(tmp_path):
    """``tree({"a/b.png": array, "c.txt": "text", "d.mat": {…}})`` writes these below a folder."""

    def make(files):
        for name, content in files.items():
            write(tmp_path / name, content)
        return tmp_path

    return make


@pytest.fixture
def rng():
    """Other numbers in every run; pytest shows what a test that fails has printed."""
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    return np.random.default_rng(seed)
