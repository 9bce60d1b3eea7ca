"""COCO's instances: a JSON of polygons and run lengths, images (Lin et al., ECCV 2014)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ImageError, LabelError
from ..files import IMAGE_SUFFIXES, read_json
from ..formats import decode_rle
from ..formats.polygons import fill_coco
from ..image import default_palette, read_image
from ..types import Instances, Sample
from .layout import Published, Root
from .pairs import tight_boxes

_WANTED = {
    "images": [{"id": int, "file_name": str, "height": int, "width": int}],
    "annotations": [{"image_id": int, "category_id": int, "iscrowd?": bool}],
    "categories": [{"id": int, "name": str}],
}


class COCOInstances:
    """Objects in COCO's format, polygons or run lengths; samples have instances and no label map.

    Class indices are in the order of the categories' ids.

    Args:
        root: folder of the data set.
        split: such as ``"val2017"``: ``annotations/instances_<split>.json`` and the images.
        annotations: the JSON, if it is another one.
        images: folder of the images, if it is another one.

    Attributes:
        things: all classes.
        category_ids: COCO's category of every class index.
        names: stems of the images.

    Raises:
        ValueError: neither ``root`` nor both files are given.
        LayoutError: the JSON or an image is absent; the message shows what is expected and found.
        LabelError: the JSON is damaged, or an object is of no category or image.
    """

    published = Published(
        title="COCO instances",
        page="https://cocodataset.org/#download",
        tree="""
annotations/instances_{train2017,val2017}.json
{train2017,val2017}/*.jpg, or images/{train2017,val2017}/*.jpg""",
        gives="instances",
        licence="annotations CC BY 4.0; images: Flickr's terms",
        counts={"train2017": 118287, "val2017": 5000},
    )

    def __init__(
        self,
        root: str | Path | None = None,
        split: str = "train2017",
        *,
        annotations: str | Path | None = None,
        images: str | Path | None = None,
    ) -> None:
        if root is None and (annotations is None or images is None):
            raise ValueError("give root, or both annotations and images")
        found = Root(root or Path(annotations or ".").parent, self.published)
        self.path = Path(annotations or found.need(f"annotations/instances_{split}.json"))
        content = read_json(self.path, LabelError, _WANTED)
        categories = sorted(content["categories"], key=lambda entry: entry["id"])
        self.category_ids = tuple(entry["id"] for entry in categories)
        self.classes = self.things = tuple(entry["name"] for entry in categories)
        if len({*self.classes}) < len(self.classes) or not categories:
            raise LabelError(f"{self.path} must have categories of different names")
        self.palette = default_palette(len(self.classes) + 1)[1:]
        if images is not None and not Path(images).is_dir():
            found.fail(f"images: there is no folder {images}")
        files = found.files(Path(images or found.need(split, f"images/{split}")), *IMAGE_SUFFIXES)
        self.names = tuple(Path(entry["file_name"]).stem for entry in content["images"])
        self.images = tuple(found.pick(files, self.names, "images"))
        self._sizes = [(entry["height"], entry["width"]) for entry in content["images"]]
        place = {entry["id"]: k for k, entry in enumerate(content["images"])}
        self._objects: list[list[Mapping[str, Any]]] = [[] for _ in place]
        for k, entry in enumerate(content["annotations"]):
            if entry["image_id"] not in place or entry["category_id"] not in self.category_ids:
                raise LabelError(f"{self.path}: annotation {k} is of no image or no category")
            self._objects[place[entry["image_id"]]].append(entry)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index`` with its instances, boxes being those of the masks.

        Raises:
            IndexError: ``index`` is out of range.
            ImageError: the image cannot be read, or has not the size that the JSON states.
            LabelError: a segmentation is none.
        """
        image = read_image(self.images[index])
        size, objects = self._sizes[index], self._objects[index]
        if tuple(image.shape[1:]) != size:
            raise ImageError(
                f"{self.images[index]} is {list(image.shape[1:])} pixels, {self.path} says "
                f"{list(size)}"
            )
        masks = torch.zeros(len(objects), *size, dtype=torch.bool)
        for mask, entry in zip(masks, objects, strict=True):
            mask[:] = self._mask(entry, size, f"image {self.names[index]} of {self.path}")
        labels = [self.category_ids.index(entry["category_id"]) for entry in objects]
        return Sample(
            self.names[index],
            image,
            instances=Instances(
                tight_boxes(masks),
                masks,
                torch.ones(len(objects)),
                torch.tensor(labels, dtype=torch.int64),
                torch.tensor([bool(e.get("iscrowd")) for e in objects], dtype=torch.bool),
            ),
        )

    def _mask(self, entry: Mapping[str, Any], size: tuple[int, int], where: str) -> torch.Tensor:
        shape = entry.get("segmentation")
        if isinstance(shape, dict):
            mask = decode_rle(shape)
            if tuple(mask.shape) != size:
                raise LabelError(f"{where} has a mask of size {list(mask.shape)}, not {list(size)}")
            return mask
        if (
            not isinstance(shape, list)
            or not shape
            or not all(
                isinstance(ring, list)
                and len(ring) >= 6
                and len(ring) % 2 == 0
                # Every edge is walked pixel by pixel: a point far outside would take for ever.
                and all(type(v) in (int, float) and abs(v) < 4 * max(size) for v in ring)
                for ring in shape
            )
        ):
            raise LabelError(
                f"{where} has a segmentation that is neither a run-length dict nor polygons "
                "[[x0, y0, x1, y1, x2, y2, …], …] in the image"
            )
        filled = [fill_coco(np.array(ring, np.float64).reshape(-1, 2), *size) for ring in shape]
        return torch.from_numpy(np.logical_or.reduce(filled))
