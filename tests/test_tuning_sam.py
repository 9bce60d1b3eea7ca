"""Fitting the classes of `sam`: helpful masks stay on, harmful ones go off."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from pyseg.errors import PysegError
from pyseg.fusion import _grow
from pyseg.pipeline import Pipeline
from pyseg.refiners.sam import SamRefiner
from pyseg.spec import parse
from pyseg.tuning import tune_sam
from pyseg.types import Sample, Segmentation

CLASSES = ("ground", "disc", "bar")
SIZE = (96, 128)


class Scenes:
    classes, palette = CLASSES, ((0, 0, 0), (100, 0, 0), (0, 200, 0))

    def __init__(self, labelled=True):
        self.labelled = labelled

    def __len__(self):
        return 6

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        yy, xx = np.mgrid[: SIZE[0], : SIZE[1]]
        labels = np.zeros(SIZE, np.uint8)
        y, x = rng.uniform(30, 60), rng.uniform(30, 50)
        labels[(yy - y) ** 2 + (xx - x) ** 2 < rng.uniform(300, 500)] = 1
        x = int(rng.uniform(80, 100))
        labels[15:85, x : x + 19] = 2
        labels = torch.from_numpy(labels)
        image = (100 * labels).expand(3, -1, -1).contiguous()
        return Sample(f"scene{index}", image, labels if self.labelled else None)


class Coarse:
    classes = CLASSES

    def predict(self, images):
        return [self._one(image) for image in images]

    def _one(self, image):
        truth = (image[0] // 100).long()
        pooled = F.avg_pool2d(F.one_hot(truth, 3).permute(2, 0, 1)[None].float(), 8)
        return Segmentation(SIZE, CLASSES, logits=pooled[0].clamp_min(1e-6).log())


class Grows:
    """Exact masks of discs; masks of bars that are too fat by three pixels."""

    def embed(self, image):
        return image[0] // 100

    def predict(self, embedding, prompts):
        masks = []
        for point in prompts.points[:, 0].round().long():
            x, y = point.tolist()
            found = int(embedding[y, x])
            index = ndimage.label(embedding.numpy() == found)[0]
            mask = torch.from_numpy(index == index[y, x])
            masks.append(_grow(mask, 3) if found == 2 else mask)
        return torch.stack(masks) * 18.0 - 9, torch.full((len(masks),), 0.9)

    def upsample(self, embedding, logits):
        return logits


OPEN = {"outline": 9.0, "displacement": float("inf")}


def test_a_class_whose_masks_harm_is_off():
    pipeline = Pipeline([Coarse(), SamRefiner(Grows(), **OPEN)])
    found = tune_sam(pipeline, Scenes())
    assert set(found.classes) == {"disc"} and found.classes["disc"] in (0.0, 0.7, 0.8, 0.85)
    assert (found.fitted, found.checked) == (3, 3) and found.gain > 0
    check = found.scores["check"]
    assert check["fitted"]["miou"] > check["default"]["miou"]
    iou = {kind: value["per_class"] for kind, value in check.items()}
    assert iou["fitted"]["bar"]["iou"] == pytest.approx(iou["off"]["bar"]["iou"], abs=0.01)
    assert iou["default"]["bar"]["iou"] < iou["off"]["bar"]["iou"] - 0.03
    stage = parse(found.spec.replace("<Coarse>", "coarse").replace("<", "").replace(">", ""))
    assert stage.stages[-1].options["classes"] == found.classes
    head, rows = found.table()
    assert [row[0] for row in rows] == ["off", "default", "fitted"]
    assert all(len(row) == len(head) for row in rows)
    assert found.to_dict()["gain"] == found.gain
    # What is proposed scores what it said.
    tuned = Pipeline([Coarse(), SamRefiner(Grows(), classes=found.classes, **OPEN)])
    again = tune_sam(tuned, Scenes())
    assert again.scores["check"]["default"]["miou"] == pytest.approx(check["fitted"]["miou"])


def test_useless_masks_leave_the_refiner_out():
    class Useless(Grows):
        def predict(self, embedding, prompts):
            masks, quality = super().predict(embedding, prompts)
            return -masks, quality

    found = tune_sam(Pipeline([Coarse(), SamRefiner(Useless())]), Scenes())
    assert found.classes == {} and found.gain == 0 and "+" not in found.spec


def test_what_cannot_be_tuned():
    with pytest.raises(PysegError, match="tune sam fits the last stage of a pipeline"):
        tune_sam(Pipeline([Coarse(), lambda image, prediction: prediction]), Scenes())
    refined = Pipeline([Coarse(), SamRefiner(Grows())])
    with pytest.raises(PysegError, match="scene0 has no labels"):
        tune_sam(refined, Scenes(labelled=False))
    with pytest.raises(PysegError, match="at least 2 images"):
        tune_sam(refined, Scenes(), limit=1)
