"""Classes that a model and a data set share: names, colours, ids. One original of each."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import PysegError


def class_table(text: str) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Names and colours of classes from ``"wall 787878; sky 06e6e6;"``."""
    entries = [entry.strip() for entry in text.split(";") if entry.strip()]
    names = tuple(entry[:-7] for entry in entries)
    codes = [int(entry[-6:], 16) for entry in entries]
    return names, tuple((code >> 16, code >> 8 & 255, code & 255) for code in codes)


def class_names(text: str) -> tuple[str, ...]:
    """Names of classes from ``"wall; sky;"``."""
    return tuple(entry.strip() for entry in text.split(";") if entry.strip())


CAMVID_CLASSES = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)
"""CamVid's 11 classes, as SegNet uses them, in the order of their ids; 11 is void."""

CAMVID_PALETTE = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)
"""RGB colour of each of `CAMVID_CLASSES`."""

CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Cityscapes' label ids of its train ids 0 to 18."""

CITYSCAPES_TRAIN_IDS = tuple(
    CITYSCAPES_IDS.index(number) if number in CITYSCAPES_IDS else 255 for number in range(34)
)
"""Cityscapes' train id of its label ids 0 to 33, 255 for those that are not scored."""

CITYSCAPES_CLASSES = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)
"""Cityscapes' 19 classes in the order of their train ids."""

CITYSCAPES_PALETTE = (
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
)
"""RGB colour of each of `CITYSCAPES_CLASSES`."""

CITYSCAPES_LABELS, CITYSCAPES_LABEL_PALETTE = class_table(
    """
unlabeled 000000; ego vehicle 000000; rectification border 000000; out of roi 000000;
static 000000; dynamic 6f4a00; ground 510051; road 804080; sidewalk f423e8; parking faaaa0;
rail track e6968c; building 464646; wall 66669c; fence be9999; guard rail b4a5b4;
bridge 966464; tunnel 96785a; pole 999999; polegroup 999999; traffic light faaa1e;
traffic sign dcdc00; vegetation 6b8e23; terrain 98fb98; sky 4682b4; person dc143c;
rider ff0000; car 00008e; truck 000046; bus 003c64; caravan 00005a; trailer 00006e;
train 005064; motorcycle 0000e6; bicycle 770b20;
"""
)
"""Cityscapes' 34 labels in the order of their label ids, and their colours."""

CITYSCAPES_THINGS = CITYSCAPES_CLASSES[11:]
"""The countable ones of `CITYSCAPES_CLASSES`."""

VOC_CLASSES = class_names(
    """
background; aeroplane; bicycle; bird; boat; bottle; bus; car; cat; chair; cow; diningtable; dog;
horse; motorbike; person; pottedplant; sheep; sofa; train; tvmonitor;
"""
)
"""Pascal VOC's background and 20 classes, in the order of their ids."""

ADE20K_CLASSES, ADE20K_PALETTE = class_table(
    """
wall 787878; building b47878; sky 06e6e6; floor 503232; tree 04c803; ceiling 787850; road 8c8c8c;
bed cc05ff; windowpane e6e6e6; grass 04fa07; cabinet e005ff; sidewalk ebff07; person 96053d;
earth 787846; door 08ff33; table ff0652; mountain 8fff8c; plant ccff04; curtain ff3307;
chair cc4603; car 0066c8; water 3de6fa; painting ff0633; sofa 0b66ff; shelf ff0747; house ff09e0;
sea 0907e6; mirror dcdcdc; rug ff095c; field 7009ff; armchair 08ffd6; seat 07ffe0; fence ffb806;
desk 0aff47; rock ff290a; wardrobe 07ffff; lamp e0ff08; bathtub 6608ff; railing ff3d06;
cushion ffc207; base ff7a08; box 00ff14; column ff0829; signboard ff0599; chest of drawers 0633ff;
counter eb0cff; sand a09614; sink 00a3ff; skyscraper 8c8c8c; fireplace fa0a0f;
refrigerator 14ff00; grandstand 1fff00; path ff1f00; stairs ffe000; runway 99ff00; case 0000ff;
pool table ff4700; pillow 00ebff; screen door 00adff; stairway 1f00ff; river 0bc8c8;
bridge ff5200; bookcase 00fff5; blind 003dff; coffee table 00ff70; toilet 00ff85; flower ff0000;
book ffa300; hill ff6600; bench c2ff00; countertop 008fff; stove 33ff00; palm 0052ff;
kitchen island 00ff29; computer 00ffad; swivel chair 0a00ff; boat adff00; bar 00ff99;
arcade machine ff5c00; hovel ff00ff; bus ff00f5; towel ff0066; light ffad00; truck ff0014;
tower ffb8b8; chandelier 001fff; awning 00ff3d; streetlight 0047ff; booth ff00cc;
television 00ffc2; airplane 00ff52; dirt track 000aff; apparel 0070ff; pole 3300ff; land 00c2ff;
bannister 007aff; escalator 00ffa3; ottoman ff9900; bottle 00ff0a; buffet ff7000; poster 8fff00;
stage 5200ff; van a3ff00; ship ffeb00; fountain 08b8aa; conveyer belt 8500ff; canopy 00ff5c;
washer b800ff; plaything ff001f; swimming pool 00b8ff; stool 00d6ff; barrel ff0070; basket 5cff00;
waterfall 00e0ff; tent 70e0ff; bag 46b8a0; minibike a300ff; cradle 9900ff; oven 47ff00;
ball ff00a3; food ffcc00; step ff008f; tank 00ffeb; trade name 85ff00; microwave ff00eb;
pot f500ff; animal ff007a; bicycle fff500; lake 0abed4; dishwasher d6ff00; screen 00ccff;
blanket 1400ff; sculpture ffff00; hood 0099ff; sconce 0029ff; vase 00ffcc; traffic light 2900ff;
tray 29ff00; ashcan ad00ff; fan 00f5ff; pier 4700ff; crt screen 7a00ff; plate 00ffb8;
monitor 005cff; bulletin board b8ff00; shower 0085ff; radiator ffd600; glass 19c2c2; clock 66ff00;
flag 5c00ff;
"""
)
"""The 150 classes of ADE20K's scene parsing benchmark, and their colours."""

__all__ = [
    "ADE20K_CLASSES",
    "ADE20K_PALETTE",
    "CAMVID_CLASSES",
    "CAMVID_PALETTE",
    "CITYSCAPES_CLASSES",
    "CITYSCAPES_IDS",
    "CITYSCAPES_LABELS",
    "CITYSCAPES_LABEL_PALETTE",
    "CITYSCAPES_PALETTE",
    "CITYSCAPES_THINGS",
    "CITYSCAPES_TRAIN_IDS",
    "VOC_CLASSES",
    "check_classes",
    "class_names",
    "class_table",
]


def check_classes(predicted: Sequence[str], target: Sequence[str]) -> None:
    """Refuses classes of a pipeline that are not those of a dataset, with the reason.

    Case does not matter, and ``"class 3"``, a name that a new head has, stands for any.

    Raises:
        PysegError: there are more or fewer, or one has another name.
    """
    if len(predicted) != len(target):
        raise PysegError(
            f"the pipeline has {len(predicted)} classes, the dataset {len(target)}: "
            "use a model that was trained for this dataset (its num_classes and "
            "weights)"
        )
    pairs = list(zip(predicted, target, strict=True))
    # A model with a new head does not know what its classes are called.
    different = [
        f"{index} is {ours!r}, in the dataset {theirs!r}"
        for index, (ours, theirs) in enumerate(pairs)
        if ours.lower() != theirs.lower() and ours != f"class {index}"
    ]
    if different:
        raise PysegError(
            f"the pipeline's classes are not the dataset's: class {different[0]}"
            + (f", and {len(different) - 1} more" if len(different) > 1 else "")
            + "; use a model that was trained for this dataset"
        )
