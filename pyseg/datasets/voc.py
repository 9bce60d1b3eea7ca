"""Pascal VOC 2012, with the labels of SBD (Everingham et al., 2012; Hariharan et al., 2011)."""

from __future__ import annotations

from pathlib import Path

import torch

from ..classes import VOC_CLASSES
from ..errors import LabelError
from ..image import default_palette, read_labels
from ..types import VOID, Segments
from .layout import Published, Root
from .pairs import PairedFiles, map_of, read_mat, segments_of
from .table import ClassTable


class VOC(PairedFiles):
    """Pascal VOC 2012 with its background and 20 classes; the borders of objects are void.

    Args:
        root: ``VOC2012/``, or the ``VOCdevkit/`` that holds it.
        split: a list in ``ImageSets/Segmentation``: "train", "val", "trainval", "test"; or
            "trainaug", the 10,582 images that SBD and VOC's train label between them, those of
            VOC's val left out. Where both label an image, VOC's labels count.
        sbd: folder of SBD, with ``cls/`` and ``inst/``, for "trainaug"; None = found beside or
            below ``root``; ``SegmentationClassAug/``, if it is there, is read instead.
        regions: also read the objects: samples then have segments and instances.

    Raises:
        LayoutError: a folder or file is absent; the message shows what is expected and found.
    """

    published = Published(
        title="Pascal VOC 2012",
        page="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ (SBD: "
        "http://home.bharathh.info/pubs/codes/SBD/download.html)",
        tree="""
JPEGImages/*.jpg
SegmentationClass/*.png
SegmentationObject/*.png (for regions)
ImageSets/Segmentation/{train,val,trainval,test}.txt
benchmark_RELEASE/dataset/{cls,inst}/*.mat, train.txt, val.txt (SBD, for trainaug)""",
        gives="semantic, panoptic, instances",
        licence="Flickr's terms; research",
        counts={"train": 1464, "val": 1449, "trainval": 2913, "test": 1456, "trainaug": 10582},
    )

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        sbd: str | Path | None = None,
        regions: bool = False,
    ) -> None:
        self.regions = regions
        found = Root(root, self.published, ("VOC2012", "VOCdevkit/VOC2012"))
        if split == "trainaug":
            names, labels = self._augmented(found, sbd)
        else:
            names = found.listed(found.need(f"ImageSets/Segmentation/{split}.txt"))
            labels = found.files(found.need("SegmentationClass"), ".png")
        images = found.files(found.need("JPEGImages"), ".jpg")
        unlabelled = split == "test" and not any(name in labels for name in names)
        super().__init__(
            *found.pairs(images, None if unlabelled else labels, names),
            VOC_CLASSES,
            palette := default_palette(len(VOC_CLASSES)),
            table=ClassTable(
                VOC_CLASSES,
                # Colours: of files that lost their palette, with that of the border.
                colours={**{c: k for k, c in enumerate(palette)}, (224, 224, 192): VOID},
            ),
            things=VOC_CLASSES[1:],
        )

    def _augmented(self, found: Root, sbd: str | Path | None) -> tuple[list[str], dict[str, Path]]:
        if sbd is None and (folder := found.find("SegmentationClassAug")) and not self.regions:
            labels = found.files(folder, ".png")
            if listing := found.find("ImageSets/Segmentation/trainaug.txt"):
                return found.listed(listing), labels
            names = {*labels}
        else:
            places = ("benchmark_RELEASE/dataset", "SBD/dataset", "sbd")
            near = [found.find(p, f"../{p}", f"../../{p}") for p in places]
            folder = next((p for p in near if p), None) if sbd is None else Path(sbd)
            if folder is None or not (folder / "cls").is_dir():
                found.fail(f"there is no SBD at {folder or f'any of {places}'}; give sbd")
            labels = found.files(folder / "cls", ".mat")
            parts = [folder / "train.txt", folder / "val.txt"]
            names = {name for part in parts for name in found.listed(part)}
        train, val = (
            found.listed(found.need(f"ImageSets/Segmentation/{k}.txt")) for k in ("train", "val")
        )
        own = found.files(found.need("SegmentationClass"), ".png")
        return sorted((names | {*train}) - {*val}), {**labels, **own}

    def truth(self, index: int) -> torch.Tensor | Segments:
        path = self.labels[index]
        if path.suffix != ".mat":
            labels = super().truth(index)
            if not self.regions:
                return labels
            objects = read_labels(path.parent.parent / "SegmentationObject" / path.name)
        else:
            values = map_of(read_mat(path, "GTcls", "Segmentation"), path)
            labels = self.table.of_ids(values, path)
            if not self.regions:
                return labels
            path = path.parent.parent / "inst" / path.name
            objects = map_of(read_mat(path, "GTinst", "Segmentation"), path)
        assert isinstance(labels, torch.Tensor)
        if objects.shape != labels.shape:
            raise LabelError(f"{path}: objects and classes differ in size")
        # An object has one class: its number and its class tell regions apart.
        return segments_of(objects.int() * 256 + labels, labels)
