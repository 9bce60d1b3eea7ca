"""DeepScene's Freiburg Forest: forest tracks from a robot (Valada et al., ISER 2016)."""

from __future__ import annotations

from pathlib import Path

from ..classes import class_table
from ..types import VOID
from .layout import Published, Root
from .pairs import PairedFiles
from .table import ClassTable

CLASSES, PALETTE = class_table(
    "trail aaaaaa; grass 00ff00; vegetation 666633; obstacle 000000; sky 0078ff; tree 003c00;"
)


class DeepScene(PairedFiles):
    """Freiburg Forest with 5 classes, or 6; files belong together by the name before the first _.

    Args:
        root: ``freiburg_forest_annotated/``, or the folder that holds it.
        split: "train" or "test".
        trees: trees are a sixth class; else they are void, as in the sets derived from this one.

    Raises:
        LayoutError: a folder or file is absent; the message shows what is expected and found.
    """

    published = Published(
        title="DeepScene (Freiburg Forest)",
        page="http://deepscene.cs.uni-freiburg.de/",
        tree="""
{train,test}/rgb/NAME_*.jpg
{train,test}/GT_color/NAME_*.png""",
        licence="research",
        counts={"train": 230, "test": 136},
    )

    def __init__(self, root: str | Path, split: str = "train", *, trees: bool = False) -> None:
        found = Root(root, self.published, ("freiburg_forest_annotated",))
        images, labels = (
            {
                name.partition("_")[0]: path
                for name, path in found.files(found.need(f"{split}/{kind}"), *endings).items()
            }
            for kind, endings in (("rgb", (".jpg", ".png")), ("GT_color", (".png",)))
        )
        count = 6 if trees else 5
        colours = {colour: k if k < count else VOID for k, colour in enumerate(PALETTE)}
        super().__init__(
            *found.pairs(images, labels),
            CLASSES[:count],
            PALETTE[:count],
            table=ClassTable(
                CLASSES[:count], colours={**colours, (255, 255, 255): VOID}, by_colour=True
            ),
        )
