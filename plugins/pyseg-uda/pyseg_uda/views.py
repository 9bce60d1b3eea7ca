"""What training sees: labelled views of the source, views of the target without labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from pyseg.errors import LabelError
from pyseg.files import IMAGE_SUFFIXES
from pyseg.image import read_image
from pyseg.training import random_crop
from pyseg.types import VOID, Dataset, Sample

from .alignment import Alignment, align
from .errors import AdaptationError
from .mixing import RareClasses

CROPS = 10  # windows that are tried for one with enough of a rare class


class Unlabelled:
    """The images of a data set, or of a folder and those below it; labels are never read.

    Of a data set of files only the image files are opened. Of another one, whose samples come
    whole, nothing but the image is looked at.

    Args:
        target: a data set or a folder.

    Raises:
        AdaptationError: there are no images.
    """

    def __init__(self, target: Dataset | str | Path) -> None:
        self.dataset: Dataset | None = None
        self.files: tuple[Path, ...] | None = None
        self.classes: tuple[str, ...] | None = None  # None: a folder says nothing of them
        if isinstance(target, (str, Path)):
            folder = Path(target)
            if not folder.is_dir():
                raise AdaptationError(f"target: there is no folder {folder}")
            found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            self.files = tuple(sorted(found))
            where = f"the folder {folder}"
        else:
            self.classes = tuple(target.classes)
            where = "the data set"
            paths = getattr(target, "images", None)
            if isinstance(paths, Sequence) and all(isinstance(path, Path) for path in paths):
                self.files = tuple(paths)
            else:
                self.dataset = target
        if not len(self):
            raise AdaptationError(f"target has no images: {where} is empty")

    def __len__(self) -> int:
        if self.files is not None:
            return len(self.files)
        assert self.dataset is not None
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        """[3, H, W] uint8 RGB."""
        if self.files is not None:
            return read_image(self.files[index])
        assert self.dataset is not None
        return self.dataset[index].image


class Cached:
    """Anything with numbered items, each of which is made once."""

    def __init__(self, items: Any) -> None:
        self.items = items
        self.known: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if index not in self.known:
            self.known[index] = self.items[index]
        return self.known[index]


def class_counts(source: Any, classes: int) -> Tensor:
    """Pixels of every class in every image, [images, C].

    Raises:
        LabelError: a sample without labels, or with labels beyond the classes; no labelled pixel.
    """
    rows = []
    for index in range(len(source)):
        sample: Sample = source[index]
        if sample.labels is None:
            raise LabelError(f"source: sample {sample.name} has no labels")
        found = torch.bincount(sample.labels.flatten(), minlength=VOID + 1)
        if wrong := (found[classes:VOID].nonzero().flatten() + classes).tolist():
            raise LabelError(
                f"source: sample {sample.name} has labels {wrong} beyond the {classes} classes and "
                f"other than {VOID} (void)"
            )
        rows.append(found[:classes])
    counts = torch.stack(rows)
    if not counts.any():
        raise LabelError("source has no pixel of any class, all are void")
    return counts


class Views(TorchDataset[dict[str, Tensor]]):
    """The views of an epoch, by number: they depend on seed, epoch, process and number only.

    Args:
        source: samples with labels.
        target: images, or None.
        rare: draws source images for their rare classes; None = all are equal.
        crop_size: (height, width).
        scale: smallest and largest zoom.
        flip: probability of the mirror image.
        category_limit: largest share of one class in a source view, see `random_crop`.
        rare_crop: share of a source view that the class it was drawn for must have more of.
        alignment: the source's views take colours of images of the target, see `align`.
        beta: see `align`.
        key: seed, epoch, process.
        length: views.
    """

    def __init__(
        self,
        source: Any,
        target: Any,
        rare: RareClasses | None,
        *,
        crop_size: tuple[int, int],
        scale: tuple[float, float],
        flip: float,
        category_limit: float,
        rare_crop: float,
        alignment: Alignment | None,
        beta: float,
        key: tuple[int, int, int],
        length: int,
    ) -> None:
        self.source, self.target, self.rare = source, target, rare
        self.crop_size, self.scale, self.flip = crop_size, scale, flip
        self.category_limit, self.rare_crop = category_limit, rare_crop
        self.alignment, self.beta = alignment, beta
        self.key, self.length = key, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """``source`` [3, h, w] and ``target`` [3, h, w], uint8; ``labels`` [h, w] uint8; ``valid``
        [h, w] bool, false where the target's view shows no image."""
        if number >= self.length:
            raise IndexError(number)
        generator = generator_of(*self.key, number)
        image, labels = self._of_source(generator)
        view = {}
        if self.alignment is not None:
            image = align(image, self._drawn(generator), self.alignment, beta=self.beta)
        if self.target is not None:
            other = self._drawn(generator)
            inside = torch.zeros(other.shape[1:], dtype=torch.uint8)
            other, inside = self._crop(other, inside, generator, 1.0)
            view = {"target": other, "valid": inside != VOID}
        return {"source": image, "labels": labels, **view}

    def _of_source(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.rare is None:
            index = int(torch.randint(len(self.source), (), generator=generator))
            sample = self.source[index]
            return self._crop(sample.image, sample.labels, generator, self.category_limit)
        chosen, index = self.rare.draw(generator)
        sample = self.source[index]
        for _ in range(CROPS):
            image, labels = self._crop(sample.image, sample.labels, generator, self.category_limit)
            if (labels == chosen).float().mean() > self.rare_crop:
                break
        return image, labels

    def _crop(
        self, image: Tensor, labels: Tensor, generator: torch.Generator, limit: float
    ) -> tuple[Tensor, Tensor]:
        options = {"flip": self.flip, "category_limit": limit}
        return random_crop(image, labels, self.crop_size, self.scale, 0.0, generator, **options)

    def _drawn(self, generator: torch.Generator) -> Tensor:
        return self.target[int(torch.randint(len(self.target), (), generator=generator))]


def generator_of(*key: int) -> torch.Generator:
    """The source of randomness of what a few numbers name, the same in every process."""
    return torch.Generator().manual_seed(hash(key) % 2**63)
