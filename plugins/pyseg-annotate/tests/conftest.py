"""Blobs on noise as objects, and who draws them."""

import numpy as np
import pytest
from PIL import Image
from pyseg_annotate.annotators import SimulatedWorkers
from pyseg_annotate.quality import Examples, QualityPredictor
from pyseg_annotate.tasks import task_of


def blobs(folder, count, seed):
    """Tasks: one blob each, in one image of a grid."""
    rng = np.random.default_rng(seed)
    side, columns = 44, 8
    image = np.zeros((side * -(-count // columns), side * columns), np.uint8)
    y, x = np.mgrid[:side, :side] - side / 2 + 0.5
    masks = []
    for k in range(count):
        angle, a, b = rng.uniform(0, np.pi), rng.uniform(7, 12), rng.uniform(5, 9)
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        masks.append((u / a) ** 2 + (v / b) ** 2 < 1 + 0.2 * np.sin(3 * np.arctan2(v, u)))
        part = 90 + 60 * masks[-1] + rng.normal(0, 12, (side, side))
        row, column = divmod(k, columns)
        image[row * side :, column * side :][:side, :side] = part.clip(0, 255)
    path = folder / f"blobs{seed}-{count}.png"
    Image.fromarray(image).save(path)
    tasks = []
    for k, mask in enumerate(masks):
        row, column = divmod(k, columns)
        whole = np.zeros(image.shape, bool)
        whole[row * side :, column * side :][:side, :side] = mask
        tasks.append(task_of(f"blob{seed}-{k}", path, whole, "blob"))
    return tasks


@pytest.fixture(scope="session")
def make_tasks(tmp_path_factory):
    """``make_tasks(count, seed)``."""
    folder = tmp_path_factory.mktemp("blobs")
    return lambda count, seed=0: blobs(folder, count, seed)


@pytest.fixture(scope="session")
def annotated(make_tasks):
    """(task, submission): 60 blobs, four workers each of twelve."""
    workers = SimulatedWorkers(12, seed=3)
    found = []
    for task in make_tasks(60, 9):
        taken = []
        for _ in range(4):
            submission = workers.annotate(task, taken)
            taken.append(submission.worker)
            found.append((task, submission))
    return found


@pytest.fixture(scope="session")
def examples(annotated):
    return Examples.of(annotated)


@pytest.fixture(scope="session")
def predictor(examples):
    return QualityPredictor(examples, "ridge")
