"""A small pipeline, a desk of two images, and clients of it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import pyseg
from pyseg import Instances, Segmentation

CLASSES = ("road", "car", "sky")
TOKEN = "a-token-of-the-tests"


class Bright:
    """Dark, middle and bright pixels; sure where they are well inside their range."""

    classes = CLASSES
    palette = ((10, 20, 30), (200, 0, 0), (0, 90, 200))

    def predict(self, images):
        found = []
        for image in images:
            grey = image.float().mean(0) / 255
            logits = torch.stack([-((grey - middle) ** 2) for middle in (1 / 6, 1 / 2, 5 / 6)])
            found.append(Segmentation(tuple(grey.shape), CLASSES, logits=40 * logits))
        return found


class Objects(Bright):
    """The middle and the bright stripe as instances, the former over a part of the latter, and one
    that is too unsure to be shown."""

    def predict(self, images):
        found = []
        for image in images:
            height, width = image.shape[1:]
            masks = torch.zeros(3, height, width, dtype=torch.bool)
            masks[0, :, width // 3 : 2 * width // 3 + 4] = True
            masks[1, :, 2 * width // 3 :] = True
            masks[2, :3] = True
            boxes = torch.zeros(3, 4)
            scores, labels = torch.tensor([0.9, 0.7, 0.2]), torch.tensor([1, 2, 0])
            instances = Instances(boxes, masks, scores, labels)
            found.append(Segmentation((height, width), CLASSES, instances=instances))
        return found


class Forgetful:
    """A refiner that keeps labels alone."""

    def refine(self, image, prediction):
        return dataclasses.replace(prediction.with_labels(prediction.labels), image=None)


def pipeline(spec="bright"):
    """Stands for `pyseg.build` of a spec."""
    if spec == "bright":
        return pyseg.Pipeline([Bright()])
    if spec == "objects":
        return pyseg.Pipeline([Objects()])
    if spec == "bright+forgetful":
        return pyseg.Pipeline([Bright(), Forgetful()])
    return pyseg.build(spec)


def picture(height=41, width=57, seed=0):
    """Stripes of three brightnesses with noise, [H, W, 3] uint8."""
    generator = np.random.default_rng(seed)
    stripes = np.repeat(np.array([40, 128, 215]), -(-width // 3))[:width]
    noisy = stripes[None, :, None] + generator.integers(-9, 10, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)


@pytest.fixture
def photos(tmp_path):
    """A folder of two images of odd sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(picture()).save(folder / "a.png")
    Image.fromarray(picture(30, 33, seed=1)).save(folder / "b.png")
    return folder


@pytest.fixture
def make_desk(photos, tmp_path):
    """``make_desk(**options)``: a desk of ``photos``; all are closed in the end."""
    from pyseg.studio import Desk

    made = []

    def make(**options):
        given = {"spec": pipeline(), "clicks": "flood", "make": pipeline, **options}
        made.append(Desk(given.pop("images", photos), tmp_path / "out", **given))
        return made[-1]

    yield make
    for desk in made:
        desk.close()


def expand(runs, size):
    """The map [H, W] of runs."""
    return np.repeat(runs["values"], runs["lengths"]).reshape(size)


def labels_on_disk(folder, name):
    return np.array(Image.open(folder / "labels" / f"{name}.png"))


def note_on_disk(folder, name):
    return json.loads((folder / ".studio" / f"{name}.json").read_text())
