"""Multi-Human Parsing, v1 and v2: people in groups, body parts and clothes (Li et al., 2017)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..classes import class_names
from ..errors import LabelError
from ..image import default_palette, open_image
from .layout import Published, Root
from .pairs import PairedFiles

CLASSES_V1 = class_names(
    """
background; hat; hair; sunglasses; upper clothes; skirt; pants; dress; belt; left shoe;
right shoe; face; left leg; right leg; left arm; right arm; bag; scarf; torso skin;
"""
)
CLASSES_V2 = class_names(
    """
background; cap/hat; helmet; face; hair; left-arm; right-arm; left-hand; right-hand; protector;
bikini/bra; jacket/windbreaker/hoodie; t-shirt; polo-shirt; sweater; singlet; torso-skin; pants;
shorts/swim-shorts; skirt; stockings; socks; left-boot; right-boot; left-shoe; right-shoe;
left-highheel; right-highheel; left-sandal; right-sandal; left-leg; right-leg; left-foot;
right-foot; coat; dress; robe; jumpsuit; other-full-body-clothes; headwear; backpack; ball; bats;
belt; bottle; carrybag; cases; sunglasses; eyewear; glove; scarf; umbrella; wallet/purse; watch;
wristband; tie; other-accessary; other-upper-body-clothes; other-lower-body-clothes;
"""
)


class MHPv1(PairedFiles):
    """Multi-Human Parsing v1: background and 18 parts; where people overlap, the earlier one wins.

    Args:
        root: ``LV-MHP-v1/``, or the folder that holds it.
        split: "train" (the first 3,000 of ``train_list.txt``), "val" (the other 1,000), "test".

    Raises:
        LayoutError: a folder or file is absent; the message shows what is expected and found.
    """

    published = Published(
        title="Multi-Human Parsing v1",
        page="https://lv-mhp.github.io/dataset",
        tree="""
images/*.jpg
annotations/IMAGE_{people}_{person}.png, such as 0001_02_01.png
{train,test}_list.txt""",
        licence="non-commercial research",
        counts={"train": 3000, "val": 1000, "test": 980},
    )

    def __init__(self, root: str | Path, split: str = "train") -> None:
        found = Root(root, self.published, ("LV-MHP-v1",))
        if split not in self.published.counts:
            found.fail(f"there is no split {split!r}")
        listing = found.need("test_list.txt" if split == "test" else "train_list.txt")
        names = found.listed(listing)
        images = found.files(found.need("images"), ".jpg")
        people = found.files(found.need("annotations"), ".png")
        if split != "test":
            names = names[:3000] if split == "train" else names[3000:]
        self._set(found, images, people, names, CLASSES_V1)

    def _set(
        self,
        found: Root,
        images: dict[str, Path],
        people: dict[str, Path],
        names: list[str],
        classes: tuple[str, ...],
    ) -> None:
        of_image: dict[str, list[Path]] = {}
        for name, path in people.items():  # sorted, so that persons are in their order
            of_image.setdefault(name.partition("_")[0], []).append(path)
        first = {name: paths[0] for name, paths in of_image.items()}
        files = found.pairs(images, first, names)
        PairedFiles.__init__(self, *files, classes, default_palette(len(classes)))
        self.people = tuple(tuple(of_image[path.stem]) for path in self.images)

    def truth(self, index: int) -> torch.Tensor:
        merged: torch.Tensor | None = None
        for path in self.people[index]:
            with open_image(path, "label map") as picture:
                values = np.array(picture)
            # Those of v2 have three channels, of which the first one counts.
            plane = torch.from_numpy(values[..., 0] if values.ndim == 3 else values)
            labels = self.table.of_ids(plane, path)
            if merged is not None and merged.shape != labels.shape:
                raise LabelError(f"{path} and {self.people[index][0]} differ in size")
            merged = labels if merged is None else torch.where(merged == 0, labels, merged)
        assert merged is not None
        return merged


class MHPv2(MHPv1):
    """Multi-Human Parsing v2: background and 58 parts; where people overlap, the earlier one wins.

    Args:
        root: ``LV-MHP-v2/``, or the folder that holds it.
        split: "train" or "val"; labels of the test split are not published.

    Raises:
        LayoutError: a folder or file is absent; the message shows what is expected and found.
    """

    published = Published(
        title="Multi-Human Parsing v2",
        page="https://lv-mhp.github.io/dataset",
        tree="""
{train,val}/images/*.jpg
{train,val}/parsing_annos/IMAGE_{people}_{person}.png, such as 96_03_01.png
list/{train,val}.txt""",
        licence="non-commercial research",
        counts={"train": 15403, "val": 5000},
    )

    def __init__(self, root: str | Path, split: str = "train") -> None:
        found = Root(root, self.published, ("LV-MHP-v2",))
        images = found.files(found.need(f"{split}/images"), ".jpg")
        people = found.files(found.need(f"{split}/parsing_annos"), ".png")
        names = found.listed(found.need(f"list/{split}.txt"))
        self._set(found, images, people, names, CLASSES_V2)
