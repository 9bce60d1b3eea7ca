"""`ClassTable`: the values or colours of label files to class indices, with the reason why not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ImageError, LabelError
from ..image import open_image, read_labels
from ..types import VOID

Colour = tuple[int, int, int]
LARGEST = 65535  # value of a 16-bit label file


class ClassTable:
    """Looks class indices up, 255 for void.

    Args:
        classes: class names.
        ids: class index, or 255, of every value that a label file may hold; None = the values are
            the class indices. 255 is void where it is not named.
        void: further values that are void, 0 to 65535.
        colours: class index, or 255, of every colour that a label file may hold; None = it holds
            no colours.
        by_colour: an indexed PNG counts by its colours, not by its indices, since nobody says what
            these mean.

    Raises:
        ValueError: a value of ``void`` is none that a label file can hold.
    """

    def __init__(
        self,
        classes: Sequence[str],
        *,
        ids: Mapping[int, int] | None = None,
        void: Iterable[int] = (),
        colours: Mapping[Colour, int] | None = None,
        by_colour: bool = False,
    ) -> None:
        self.classes, self.by_colour = tuple(classes), by_colour
        given = dict(enumerate(range(len(self.classes)))) if ids is None else dict(ids)
        void = list(void)
        if wrong := [number for number in void if not 0 <= number <= LARGEST]:
            raise ValueError(
                f"void ids must be 0 to {LARGEST}, the values of label files, got {wrong[0]}"
            )
        given = {VOID: VOID, **given, **dict.fromkeys(void, VOID)}
        self.ids = tuple(sorted(value for value in given if value != VOID))
        # One entry per value, and one more for all that is larger or negative.
        self._ids = np.full(max(given) + 2, -1, dtype=np.int16)
        self._ids[list(given)] = list(given.values())
        self._colours: dict[Colour, int] | None = None
        if colours is not None:
            self._colours = dict(colours)
            codes = np.array([_code(colour) for colour in self._colours], dtype=np.int32)
            order = np.argsort(codes)
            self._codes = codes[order]
            self._of_code = np.array(list(self._colours.values()), dtype=np.uint8)[order]

    def read(self, path: Path) -> Tensor:
        """Class indices of a label file, [H, W] uint8.

        Raises:
            ImageError: it cannot be read, or holds colours and the table knows none.
            LabelError: it holds values or colours that are not in the table.
        """
        if self._colours is None:
            return self.of_ids(read_labels(path), path)
        with open_image(path, "label map") as picture:
            if picture.mode in ("RGB", "RGBA") or (picture.mode == "P" and self.by_colour):
                if picture.format in ("JPEG", "MPO"):
                    raise ImageError(
                        f"label map {str(path)!r} is a JPEG, whose compression changes colours; "
                        "use the PNG that it was made from"
                    )
                return self.of_colours(_rgb(picture), path)
        return self.of_ids(read_labels(path), path)

    def of_ids(self, values: Tensor, path: Path) -> Tensor:
        """Class indices of values, [H, W] uint8; ``path`` is for the message.

        Raises:
            LabelError: a value that is not in the table, with its likely cause.
        """
        array = values.numpy()
        if array.dtype != np.uint8:  # of which the table has all
            array = array.clip(-1, len(self._ids) - 1)
        indices = np.take(self._ids, array)
        if indices.min(initial=0) < 0:
            wrong = np.unique(values.numpy()[indices < 0]).tolist()
            shown = ", ".join(map(str, wrong[:8])) + (", …" if len(wrong) > 8 else "")
            cause = _likely_cause(wrong, len(self.classes), max(self.ids, default=0))
            raise LabelError(
                f"{path}: label values {shown} are no class ids: {self._range()}, and "
                f"{VOID} is void. {cause}"
            )
        return torch.from_numpy(indices.astype(np.uint8))

    def _range(self) -> str:
        count, ids = len(self.classes), self.ids
        if not ids:
            return f"the {count} classes are told by colours"
        if ids == tuple(range(count)):
            return f"there are {count} classes, 0 to {count - 1}"
        return f"there are {count} classes, of {len(ids)} ids from {ids[0]} to {ids[-1]}"

    def of_colours(self, pixels: np.ndarray, path: Path) -> Tensor:
        """Class indices of colours [H, W, 3], [H, W] uint8; ``path`` is for the message.

        Raises:
            LabelError: a colour that is not in the table: how many pixels, and the nearest one.
        """
        assert self._colours is not None
        codes = pixels.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
        places = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        if (wrong := self._codes[places] != codes).any():
            raise LabelError(f"{path}: {self._wrong_colours(codes[wrong], codes.size)}")
        return torch.from_numpy(self._of_code[places])

    def _wrong_colours(self, codes: np.ndarray, pixels: int) -> str:
        assert self._colours is not None
        found, counts = np.unique(codes, return_counts=True)
        order = counts.argsort(kind="stable")[::-1]
        known = np.array(list(self._colours), dtype=np.int64)
        names = [self.classes[k] if k < len(self.classes) else "void" for k in self._of_colour()]
        shown: list[str] = []
        furthest = 0
        for k in order:
            colour = np.array([found[k] >> 16, found[k] >> 8 & 255, found[k] & 255])
            distances = np.abs(known - colour).max(1)
            near = int(distances.argmin())
            furthest = max(furthest, int(distances[near]))
            if len(shown) < 4:
                shown.append(
                    f"{_shown(colour)} in {counts[k]}, nearest {_shown(known[near])} {names[near]}"
                )
        count = len(found)
        if furthest <= 8:
            cause = "All are near colours of the palette: the file was compressed with losses"
        elif count > 64:
            cause = (
                "So many colours suggest a photograph, or labels that were scaled with "
                "interpolation: scale them by the nearest pixel"
            )
        else:
            cause = "These may be the labels of another data set, or of another version of it"
        more = f" and {count - len(shown)} more" if count > len(shown) else ""
        colours = "colour that is" if count == 1 else "colours that are"
        return (
            f"{codes.size} pixels ({codes.size / pixels:.1%}) have {count} {colours} not in the "
            f"palette of {len(self._colours)}: {'; '.join(shown)}{more}. {cause}"
        )

    def _of_colour(self) -> list[int]:
        return list(self._colours.values()) if self._colours is not None else []


def _code(colour: Sequence[int]) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def _shown(colour: Iterable[int]) -> str:
    return f"({', '.join(str(int(value)) for value in colour)})"


def _rgb(picture: Image.Image) -> np.ndarray:
    return np.array(picture.convert("RGB"))


def _likely_cause(wrong: list[int], count: int, largest: int) -> str:
    if wrong == [count] and largest == count - 1:
        return (
            f"The value {count} suggests ids that start at 1, or a class missing from "
            "the class list"
        )
    if len(wrong) > 32:
        return "So many values suggest a photograph or a colour map turned grey, not class ids"
    if max(wrong) > VOID:
        return "Values above 255 are instance or panoptic ids, such as class * 1000 + number"
    if max(wrong) <= 33 and count <= 20:
        return (
            "These look like ids of a longer class list, such as Cityscapes ids (0 to 33) "
            "instead of train ids (0 to 18)"
        )
    return (
        "Are these the grey values of a colour-coded map? Label files must hold class ids, "
        "or a palette whose indices are class ids"
    )


__all__ = ["LARGEST", "ClassTable"]
