"""CamVid: street scenes from a driving car, 11 classes (Brostow et al., 2009)."""

from __future__ import annotations

from pathlib import Path

from ..classes import CAMVID_CLASSES as CLASSES
from ..classes import CAMVID_PALETTE as PALETTE
from ..files import IMAGE_SUFFIXES, LABEL_SUFFIXES, files_by_stem, some
from .pairs import PairedFiles


class CamVid(PairedFiles):
    """CamVid with the 11 classes of SegNet; id 11 (void) becomes 255.

    Two layouts are understood: that of the SegNet tutorial (``<split>/`` and ``<split>annot/``) and
    ``<split>/images/`` with ``<split>/labels/``. Where ``<split>.txt`` exists, the frames it lists
    (stems, or SegNet's pairs of paths) make up the split, in its order; otherwise all files do.

    Args:
        root: folder of the data set.
        split: "train", "val", "test", or any other that the folder holds.

    Raises:
        FileNotFoundError: no such folder, neither layout, or a frame without image or labels.

    Example:
        >>> dataset = CamVid("camvid", "val")
        >>> sample = dataset[0]
        >>> sample.image.shape, sample.labels.shape
        (torch.Size([3, 360, 480]), torch.Size([360, 480]))
    """

    def __init__(self, root: str | Path, split: str = "train") -> None:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"root: there is no folder {root}")
        layouts = (
            (root / split / "images", root / split / "labels"),
            (root / split, root / f"{split}annot"),
        )
        found = next((pair for pair in layouts if pair[0].is_dir() and pair[1].is_dir()), None)
        if found is None:
            wanted = " nor ".join(f"{a} with {b}" for a, b in layouts)
            raise FileNotFoundError(f"split={split!r}: {root} holds neither {wanted}")
        images = files_by_stem(found[0], IMAGE_SUFFIXES, "root")
        labels = files_by_stem(found[1], LABEL_SUFFIXES, "root")
        listing = root / f"{split}.txt"
        if listing.is_file():
            lines = listing.read_text(encoding="utf-8").split("\n")
            frames = [Path(line.split()[0]).stem for line in lines if line.strip()]
        else:
            frames = list(dict.fromkeys((*images, *labels)))
        for kind, present, folder in (("image", images, found[0]), ("labels", labels, found[1])):
            if absent := [frame for frame in frames if frame not in present]:
                raise FileNotFoundError(f"no {kind} in {folder} for {some(absent)}")
        super().__init__(
            [images[frame] for frame in frames],
            [labels[frame] for frame in frames],
            CLASSES,
            PALETTE,
            void=(len(CLASSES),),
        )
