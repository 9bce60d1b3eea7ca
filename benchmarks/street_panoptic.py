"""Four real photographs with panoptic labels, in COCO's panoptic format, to train and overfit on.

``python benchmarks/street_panoptic.py DATA OUT`` reads two street scenes of ADE20K
(``instance/ade20k_street``) and the two samples of panopticapi (``panoptic/coco_sample``) below the
folder of test data, resizes them to a common width and writes them to OUT. Classes that only one
image has in small numbers become void, and so do segments of fewer pixels than SMALLEST.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pyseg.datasets.coco_panoptic import COCOPanoptic
from pyseg.image import read_image, write_image, write_panoptic
from pyseg.types import Segment, Segments

STUFF = {  # class: its names in ADE20K and in COCO
    "sky": ("sky", "sky-other-merged"),
    "building": ("building, edifice",),
    "road": ("road, route",),
    "sidewalk": ("sidewalk, pavement",),
    "tree": ("tree", "tree-merged"),
    "grass": ("grass-merged",),
    "gravel": ("gravel",),
}
THINGS = {
    "person": ("person, individual, someone, somebody, mortal, soul", "person"),
    "car": ("car, auto, automobile, machine, motorcar", "van"),
    "truck": ("truck",),
    "motorcycle": ("minibike, motorbike",),
    "horse": ("horse",),
}
CLASSES = (*STUFF, *THINGS)
NUMBERS = {name: k for k, c in enumerate(CLASSES) for name in (STUFF | THINGS)[c]}
SMALLEST = {"stuff": 1000, "things": 200}  # pixels at width 512; scaled with the image


def ade20k(folder):
    """Image, ids [H, W], and (id, name of the class, crowd) of every segment."""
    ids = np.array(Image.open(folder / "instance_u16.png")).astype(np.int32)
    listed = json.loads((folder / "objects.json").read_text())["segments"]
    entries = [(segment["id"], segment["class_name"], False) for segment in listed]
    return read_image(folder / "image.jpg"), ids, entries


def coco(dataset, index):
    sample = dataset[index]
    entries = [(i.id, dataset.classes[i.label], i.crowd) for i in sample.segments.items]
    return sample.image, sample.segments.map.numpy(), entries


def resized(image, ids, entries, width):
    """An image of ``width`` pixels and its `Segments`."""
    size = (width, round(image.shape[1] * width / image.shape[2]))
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.LANCZOS)
    ids = np.array(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST))
    map, items = np.zeros_like(ids), []
    masks = {}
    for number, name, crowd in entries:
        if name in NUMBERS:
            label = NUMBERS[name]
            key = label if label < len(STUFF) else (label, number)  # one segment per stuff class
            before = masks[key][0] if key in masks else False
            masks[key] = before | (ids == number), label, crowd
    for mask, label, crowd in masks.values():
        area = int(mask.sum())
        least = SMALLEST["stuff" if label < len(STUFF) else "things"] * (width / 512) ** 2
        if area >= least:
            map[mask] = len(items) + 1
            items.append(Segment(len(items) + 1, label, 1.0, area, crowd))
    return picture, Segments(torch.from_numpy(map), tuple(items))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    sample = options.data / "panoptic" / "coco_sample"
    dataset = COCOPanoptic(annotations=sample / "panoptic_examples.json", images=sample / "images")
    sources = {dataset.names[k]: coco(dataset, k) for k in range(len(dataset))}
    for folder in sorted((options.data / "instance" / "ade20k_street").iterdir()):
        sources[folder.name] = ade20k(folder)
    images, annotations = options.out / "train", options.out / "annotations"
    images.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(exist_ok=True)
    results = []
    for name, source in sources.items():
        picture, segments = resized(*source, options.width)
        write_image(images / f"{name}.jpg", picture)
        results.append((name, segments))
        found = [CLASSES[item.label] for item in segments.items]
        counts = ", ".join(f"{found.count(c)} {c}" for c in CLASSES if c in found)
        void = (segments.map == 0).float().mean().item()
        print(f"{name} {picture.width}x{picture.height}: {counts}; {void:.1%} void")
    things = range(len(STUFF), len(CLASSES))
    write_panoptic(annotations / "panoptic_train.json", results, CLASSES, things=things)


if __name__ == "__main__":
    main()
