"""Mapillary Vistas, streets of the world (Neuhold et al., ICCV 2017): v1.2 and v2.0."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import LabelError
from ..files import read_json
from ..image import read_labels
from ..types import VOID, Segments
from .layout import LONG, Published, Root
from .pairs import PairedFiles, segments_of
from .table import ClassTable


class Mapillary(PairedFiles):
    """Mapillary Vistas with the classes of its own configuration file, in its order.

    v1.2 has 66 labels, v2.0 has 124. Those that the file marks as not evaluated, such as
    "Unlabeled", are void. Panoptic models, which want the stuff first, read
    ``coco_panoptic(annotations='…/v1.2/panoptic/panoptic_2018.json', images=…)``.

    Args:
        root: holds the splits and ``config_v1.2.json`` or ``config_v2.0.json``.
        split: "train" (or "training"), "val" (or "validation"), or "test" (or "testing"), which
            has no public labels.
        version: "v1.2" or "v2.0".
        regions: also read ``instances/``: samples then have segments and instances.

    Raises:
        LayoutError: a folder or file is absent; the message shows what is expected and found.
        LabelError: the configuration file is damaged.
        ValueError: there is no such version.
    """

    published = Published(
        title="Mapillary Vistas",
        page="https://www.mapillary.com/dataset/vistas",
        tree="""
config_v1.2.json, config_v2.0.json
{training,validation,testing}/images/*.jpg
{training,validation}/{v1.2,v2.0}/labels/*.png
{training,validation}/{v1.2,v2.0}/instances/*.png (for regions)""",
        gives="semantic, panoptic, instances",
        licence="CC BY-NC-SA (research edition)",
        counts={"train": 18000, "val": 2000, "test": 5000},
    )

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        version: str = "v1.2",
        regions: bool = False,
    ) -> None:
        if version not in ("v1.2", "v2.0"):
            raise ValueError(f"version must be 'v1.2' or 'v2.0', got {version!r}")
        self.regions = regions
        found = Root(root, self.published)
        part = found.need(LONG.get(split, split), split).name
        config = found.need(f"config_{version}.json")
        entry = {"name": str, "color": [int], "instances": bool, "evaluate": bool}
        known = read_json(config, LabelError, {"labels": [entry]})["labels"]
        kept = [k for k, label in enumerate(known) if label["evaluate"]]
        names = tuple(known[k]["name"] for k in kept)
        if len({*names}) < len(names) or not 0 < len(known) < VOID:
            raise LabelError(f"{config} must have 1 to 254 labels of different names")
        if not all(len(k["color"]) == 3 and {*k["color"]} <= {*range(256)} for k in known):
            raise LabelError(f"{config} has a color that is not [r, g, b] in 0..255")
        images = found.files(found.need(f"{part}/images"), ".jpg")
        labels = None
        if part != "testing":
            kind = "instances" if regions else "labels"
            labels = found.files(found.need(f"{part}/{version}/{kind}"), ".png")
        super().__init__(
            *found.pairs(images, labels),
            names,
            [(r, g, b) for r, g, b in (known[k]["color"] for k in kept)],
            table=ClassTable(
                names,
                ids={k: kept.index(k) if k in kept else VOID for k in range(len(known))},
            ),
            things=[known[k]["name"] for k in kept if known[k]["instances"]],
        )

    def truth(self, index: int) -> torch.Tensor | Segments:
        if not self.regions:
            return super().truth(index)
        codes = read_labels(self.labels[index])  # label * 256 + number
        return segments_of(codes, self.table.of_ids(codes // 256, self.labels[index]))
