"""Memory and time of a whole evaluation: semantic, boundary and panoptic scores of one pass.

    python benchmarks/evaluation.py --images 500 --threads 2

Ground truth and predictions of Cityscapes' size, 19 classes and about 60 segments, are made up
image by image and not kept, so that what grows is the evaluation's own. Prints the memory of the
process (Linux), as it is and at its largest, after a tenth of the images and after all of them.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from torch.nn.functional import interpolate

from pyseg import models
from pyseg.evaluation import evaluate
from pyseg.ops import upsample_argmax
from pyseg.pipeline import build
from pyseg.types import Sample, Segment, Segmentation, Segments

SIZE, COARSE = (1024, 2048), (256, 512)
CLASSES = tuple(f"class {k}" for k in range(19))
STUFF, INSTANCES = 11, 6  # the other classes are things, of so many instances


def make_logits(index, noise):
    """[19, 256, 512], smooth; the same but for some noise for the same index."""
    generator = torch.Generator().manual_seed(index)
    scores = torch.randn(1, len(CLASSES), 8, 16, generator=generator)
    scores += noise * torch.randn(scores.shape, generator=generator)
    return interpolate(scores, COARSE, mode="bicubic")[0]


def make_segments(labels):
    """Things fall into instances by columns."""
    column = (torch.arange(SIZE[1]) * INSTANCES // SIZE[1]).int()
    ids = (labels.int() + 1) * 1000 + torch.where(labels >= STUFF, column, 0)
    areas = torch.bincount(ids.flatten())
    items = (Segment(k, k // 1000 - 1, 1.0, int(areas[k])) for k in areas.nonzero()[:, 0].tolist())
    return Segments(ids, tuple(items))


class Timer:
    """Seconds spent on making the images."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *error):
        self.seconds += time.perf_counter() - self.start


making = Timer()


@models.register("made_up")
class MadeUp:
    def __init__(self, *, num_classes: int | None = None, weights: str | None = None):
        self.classes = CLASSES

    def predict(self, images):
        with making:
            return [self.one(int.from_bytes(image[:, 0, 0].tolist(), "little")) for image in images]

    def one(self, index):
        logits = make_logits(index, 0.3)
        segments = make_segments(upsample_argmax(logits[None], SIZE)[0])
        return Segmentation(SIZE, CLASSES, logits=logits, segments=segments)


class Images:
    classes = CLASSES
    palette = tuple((k, k, k) for k in range(len(CLASSES)))
    things = tuple(range(STUFF, len(CLASSES)))

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        with making:
            image = torch.zeros(3, *SIZE, dtype=torch.uint8)
            image[:, 0, 0] = torch.tensor([*index.to_bytes(3, "little")])
            labels = upsample_argmax(make_logits(index, 0.0)[None], SIZE)[0]
            return Sample(str(index), image, labels, make_segments(labels))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    memory, start, done = {}, 0.0, 0

    def observe(sample, results):
        nonlocal start, done
        done += 1
        if done == 1:  # what comes once is no part of the time of an image
            start, making.seconds = time.perf_counter(), 0.0
        if done in (max(1, arguments.images // 10), arguments.images):
            resident = int(Path("/proc/self/statm").read_text().split()[1])
            memory[done] = {
                "now": resident * resource.getpagesize() >> 20,
                "largest": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            }

    result = evaluate(
        build("made_up", weights=None),
        Images(arguments.images),
        ["semantic", "boundary", "panoptic"],
        observe=observe,
    )
    elapsed = time.perf_counter() - start - making.seconds
    scores = result.stages[0].metrics
    print(
        json.dumps(
            {
                "images": arguments.images,
                "threads": arguments.threads,
                "ms_per_image": round(1e3 * elapsed / max(1, arguments.images - 1), 1),
                "making_ms_per_image": round(
                    1e3 * making.seconds / max(1, arguments.images - 1), 1
                ),
                "megabytes_after": memory,
                "miou": scores["semantic"]["miou"],
                "boundary_iou": scores["boundary"]["boundary_iou"],
                "pq": scores["panoptic"]["pq"],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
