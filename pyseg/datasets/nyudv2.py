"""NYU Depth v2: indoor scenes with 40 classes (Silberman et al., ECCV 2012; Gupta et al., 2013)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import LabelError, require
from ..image import default_palette
from ..types import VOID, Sample
from .layout import Published, Root
from .pairs import PairedFiles, map_of, read_mat
from .sunrgbd import CLASSES as FIRST_CLASSES
from .table import ClassTable

CLASSES = (
    *(name.replace("fridge", "refrigerator").replace("tv", "television") for name in FIRST_CLASSES),
    *("otherstructure", "otherfurniture", "otherprop"),
)


class NYUDv2(PairedFiles):
    """NYU Depth v2's 1,449 labelled images with the 40 classes of Gupta et al.; 0 is void.

    All images are in one HDF5 file, which ``h5py`` (extra ``nyud``) reads. Its 894 labels become
    the 40 classes by ``classMapping40.mat``.

    Args:
        root: holds the three files.
        split: "train" or "test".

    Raises:
        LayoutError: a file is absent; the message shows what is expected and found.
        LabelError: a file is damaged.
    """

    published = Published(
        title="NYU Depth v2 (40 classes)",
        page="https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html (splits.mat is in its toolbox; "
        "classMapping40.mat: https://github.com/ankurhanda/nyuv2-meta-data)",
        tree="""
nyu_depth_v2_labeled.mat
splits.mat
classMapping40.mat""",
        licence="not stated",
        counts={"train": 795, "test": 654},
    )

    def __init__(self, root: str | Path, split: str = "train") -> None:
        found = Root(root, self.published)
        path = found.need("nyu_depth_v2_labeled.mat")
        splits, mapping = found.need("splits.mat"), found.need("classMapping40.mat")
        if split not in self.published.counts:
            found.fail(f"there is no split {split!r}")
        self.numbers = np.atleast_1d(read_mat(splits, f"{split}Ndxs")).astype(int).tolist()
        self._file: tuple[int, Any] = (0, None)
        count = len(self._open(path)["images"])
        if wrong := [n for n in self.numbers if not 1 <= n <= count]:
            raise LabelError(f"{splits} names image {wrong[0]}, but {path} has {count}")
        new = np.atleast_1d(read_mat(mapping, "mapClass")).astype(int).tolist()
        if not all(0 <= k <= len(CLASSES) for k in new):
            raise LabelError(f"{mapping}: mapClass must be 0 to 40, got {min(new)} to {max(new)}")
        super().__init__(
            [path] * len(self.numbers),
            [path] * len(self.numbers),
            CLASSES,
            default_palette(len(CLASSES) + 1)[1:],
            table=ClassTable(
                CLASSES, ids={0: VOID, **{k: n - 1 if n else VOID for k, n in enumerate(new, 1)}}
            ),
        )
        self.names = tuple(f"{number:04}" for number in self.numbers)

    def _open(self, path: Path) -> Any:
        process, file = self._file
        if process != os.getpid():  # HDF5 shares no open file between processes
            try:
                file = require("h5py", extra="nyud").File(path)
                file["images"], file["labels"]
            except (OSError, KeyError) as error:
                raise LabelError(f"{path} cannot be read as NYU's HDF5 file ({error})") from error
            self._file = (os.getpid(), file)
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file": (0, None)}

    def __getitem__(self, index: int) -> Sample:
        path, place = self.images[index], self.numbers[index] - 1
        file = self._open(path)
        # MATLAB writes columns first: [image, channel, column, row].
        image = torch.from_numpy(np.array(file["images"][place]).transpose(0, 2, 1).copy())
        labels = map_of(np.array(file["labels"][place]).T, path)
        return Sample(self.names[index], image, self.table.of_ids(labels, path))
