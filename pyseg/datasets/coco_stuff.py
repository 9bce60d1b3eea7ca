"""COCO-Stuff: every pixel of COCO 2017, 80 things and 91 stuff classes (Caesar et al., 2018)."""

from __future__ import annotations

from pathlib import Path

from ..classes import class_names
from ..image import default_palette
from .layout import Published, Root
from .pairs import PairedFiles
from .table import ClassTable

CLASSES = class_names(
    """
person; bicycle; car; motorcycle; airplane; bus; train; truck; boat; traffic light; fire hydrant;
stop sign; parking meter; bench; bird; cat; dog; horse; sheep; cow; elephant; bear; zebra;
giraffe; backpack; umbrella; handbag; tie; suitcase; frisbee; skis; snowboard; sports ball; kite;
baseball bat; baseball glove; skateboard; surfboard; tennis racket; bottle; wine glass; cup; fork;
knife; spoon; bowl; banana; apple; sandwich; orange; broccoli; carrot; hot dog; pizza; donut;
cake; chair; couch; potted plant; bed; dining table; toilet; tv; laptop; mouse; remote; keyboard;
cell phone; microwave; oven; toaster; sink; refrigerator; book; clock; vase; scissors; teddy bear;
hair drier; toothbrush; banner; blanket; branch; bridge; building-other; bush; cabinet; cage;
cardboard; carpet; ceiling-other; ceiling-tile; cloth; clothes; clouds; counter; cupboard;
curtain; desk-stuff; dirt; door-stuff; fence; floor-marble; floor-other; floor-stone; floor-tile;
floor-wood; flower; fog; food-other; fruit; furniture-other; grass; gravel; ground-other; hill;
house; leaves; light; mat; metal; mirror-stuff; moss; mountain; mud; napkin; net; paper; pavement;
pillow; plant-other; plastic; platform; playingfield; railing; railroad; river; road; rock; roof;
rug; salad; sand; sea; shelf; sky-other; skyscraper; snow; solid-other; stairs; stone; straw;
structural-other; table; tent; textile-other; towel; tree; vegetable; wall-brick; wall-concrete;
wall-other; wall-panel; wall-stone; wall-tile; wall-wood; water-other; waterdrops; window-blind;
window-other; wood;
"""
)
# Numbers 1 to 182 less these, which no image has: they were in COCO's first list only.
_REMOVED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
NUMBERS = tuple(number for number in range(1, 183) if number not in _REMOVED)


class COCOStuff(PairedFiles):
    """COCO-Stuff's 171 classes from its pixel maps, whose values are COCO's numbers less 1.

    Args:
        root: holds COCO's images and ``stuffthingmaps_trainval2017/``.
        split: "train2017" or "val2017".

    Raises:
        LayoutError: a folder or file is absent; the message shows what is expected and found.
    """

    published = Published(
        title="COCO-Stuff",
        page="https://github.com/nightrome/cocostuff",
        tree="""
{train2017,val2017}/*.jpg, or images/{train2017,val2017}/*.jpg
stuffthingmaps_trainval2017/{train2017,val2017}/*.png""",
        licence="annotations CC BY 4.0; images: Flickr's terms",
        counts={"train2017": 118287, "val2017": 5000},
    )

    def __init__(self, root: str | Path, split: str = "train2017") -> None:
        found = Root(root, self.published)
        images = found.files(found.need(split, f"images/{split}"), ".jpg")
        labels = found.files(
            found.need(f"stuffthingmaps_trainval2017/{split}", f"annotations/{split}"), ".png"
        )
        super().__init__(
            *found.pairs(images, labels),
            CLASSES,
            default_palette(len(CLASSES) + 1)[1:],
            table=ClassTable(CLASSES, ids={n - 1: k for k, n in enumerate(NUMBERS)}),
        )
