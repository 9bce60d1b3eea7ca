"""Every published data set on a miniature tree in its exact layout, drawn anew in every run."""

import re
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

import pyseg
from pyseg.errors import ImageError, LabelError, LayoutError, PysegError
from pyseg.formats import encode_rle
from pyseg.testing import check_dataset

NAMES = [name for name in pyseg.datasets.list() if hasattr(pyseg.datasets.get(name), "published")]
# Typed from the publications, apart from the tables of the package.
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11}
TRAIN_IDS |= {25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}


class Mini:
    """Three samples of a data set in a folder, with what their labels should be."""

    def __init__(self, root, rng):
        self.root, self.rng = root, rng
        self.files, self.images, self.labels, self.wanted = {}, [], [], []
        self.options = {"split": "train"}

    def size(self):
        return tuple(int(n) for n in self.rng.integers(5, 31, 2))

    def draw(self, values, size):
        """Blocks of random values."""
        low = self.rng.choice(np.array(values), (3, 3))
        rows, columns = (np.sort(self.rng.integers(0, 3, n)) for n in size)
        return low[rows[:, None], columns[None]]

    def add(self, image, label, values, meaning, *, dtype=np.uint8, encode=None):
        size = self.size()
        drawn = self.draw(values, size)
        wanted = np.vectorize(lambda v: meaning.get(int(v), 255))(drawn)
        self.add_pair(
            image, label, drawn.astype(dtype) if encode is None else encode(drawn), wanted
        )

    def add_pair(self, image, label, content, wanted):
        self.files[image] = self.rng.integers(0, 256, (*wanted.shape, 3), dtype=np.uint8)
        self.files[label] = content
        self.images.append(image)
        self.labels.append(label)
        self.wanted.append(wanted)


def cityscapes(m):
    values = [*range(34), 255]
    for k, city in enumerate(("aachen", "bochum", "bochum")):
        stem = f"{city}/{city}_00000{k}_000019"
        m.add(
            f"leftImg8bit/train/{stem}_leftImg8bit.png",
            f"gtFine/train/{stem}_gtFine_labelIds.png",
            values,
            TRAIN_IDS,
        )


def kitti(m):
    for k in range(3):
        name = f"00000{k}_10.png"
        image, label = f"training/image_2/{name}", f"training/semantic/{name}"
        m.add(image, label, range(34), TRAIN_IDS)


def voc(m):
    names = [f"2007_00{k:04}" for k in range(3)]
    for name in names:
        m.add(
            f"VOC2012/JPEGImages/{name}.jpg",
            f"VOC2012/SegmentationClass/{name}.png",
            [*range(21), 255],
            {k: k for k in range(21)},
        )
    m.files["VOC2012/JPEGImages/2007_009999.jpg"] = np.zeros((4, 4, 3), np.uint8)
    m.files["VOC2012/ImageSets/Segmentation/train.txt"] = "\n".join(names) + "\n"


def pascal_context(m):
    # Number of 459 -> class of 59: sky 360, grass 187, aeroplane 2; 255 is "light switch" or so.
    meaning = {2: 0, 187: 28, 360: 46, 458: 58, 23: 5, 397: 49}
    names = [f"2008_00{k:04}" for k in range(3)]
    for name in names:
        m.add(
            f"VOC2010/JPEGImages/{name}.jpg",
            f"VOC2010/trainval/{name}.mat",
            [*meaning, 0, 1, 255, 459],
            meaning,
            encode=lambda drawn: {"LabelMap": drawn.astype(np.uint16)},
        )
    m.files["VOC2010/ImageSets/Main/train.txt"] = "".join(f"{name}\n" for name in names)


def ade20k(m):
    for k in range(3):
        name = f"training/ADE_train_0000000{k}"
        m.add(
            f"ADEChallengeData2016/images/{name}.jpg",
            f"ADEChallengeData2016/annotations/{name}.png",
            range(151),
            {k: k - 1 for k in range(1, 151)},
        )


CONFIG = [
    ("animal--bird", True, True),
    ("construction--barrier--curb", False, True),
    ("void--car-mount", False, False),
    ("object--vehicle--car", True, True),
    ("void--unlabeled", False, False),
]


def mapillary(m):
    import json

    labels = [
        {"name": name, "readable": name, "color": [k, 2 * k, 3 * k], "instances": i, "evaluate": e}
        for k, (name, i, e) in enumerate(CONFIG)
    ]
    m.files["config_v2.0.json"] = json.dumps({"labels": labels, "version": "2.0"})
    m.options["version"] = "v2.0"
    for k in range(3):
        image, label = f"training/images/{k}_Q.jpg", f"training/v2.0/labels/{k}_Q.png"
        m.add(image, label, range(5), {0: 0, 1: 1, 3: 2})


def bdd100k(m):
    for k in range(3):
        name = f"0000f77c-6257be5{k}"
        m.add(
            f"bdd100k/images/10k/train/{name}.jpg",
            f"bdd100k/labels/sem_seg/masks/train/{name}.png",
            [*range(19), 255],
            {k: k for k in range(19)},
        )


def bdd100k_panoptic(m):
    def encode(drawn):
        zero = np.zeros_like(drawn)
        return np.stack([drawn, zero, zero, drawn], -1).astype(np.uint8)

    for k in range(3):
        name = f"0000f77c-6257be5{k}"
        m.add(
            f"images/10k/train/{name}.jpg",
            f"labels/pan_seg/bitmasks/train/{name}.png",
            range(41),
            {k: k - 1 for k in range(1, 41)},
            encode=encode,
        )


def coco_stuff(m):
    missing = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
    numbers = [n for n in range(1, 183) if n not in missing]
    m.options["split"] = "val2017"
    for k in range(3):
        name = f"val2017/{k:012}"
        m.add(
            f"{name}.jpg",
            f"stuffthingmaps_trainval2017/{name}.png",
            [*(n - 1 for n in numbers), 255],
            {n - 1: k for k, n in enumerate(numbers)},
        )


def deepscene(m):
    colours = {0: (170, 170, 170), 1: (0, 255, 0), 2: (102, 102, 51), 3: (0, 0, 0)}
    colours |= {4: (0, 120, 255), 5: (0, 60, 0)}
    table = np.array([*colours.values()], np.uint8)
    for k in range(3):
        m.add(
            f"freiburg_forest_annotated/train/rgb/b{k}-09517_Clipped.jpg",
            f"freiburg_forest_annotated/train/GT_color/b{k}-09517_mask.png",
            range(6),
            {k: k for k in range(5)},
            encode=lambda drawn: table[drawn],
        )


def camvid(m):
    # Bridge and Wall are Building, Child is Pedestrian, LaneMkgsDriv Road, Void is void.
    colours = {(0, 128, 64): 1, (64, 192, 0): 1, (192, 128, 64): 9, (128, 0, 192): 3}
    colours |= {(128, 128, 128): 0, (0, 0, 0): 255, (0, 0, 192): 4, (64, 128, 192): 8}
    table = np.array([*colours], np.uint8)
    for stem in ("0001TP_008520", "0006R0_f00930", "0016E5_00390"):
        m.add(
            f"701_StillsRaw_full/{stem}.png",
            f"LabeledApproved_full/{stem}_L.png",
            range(len(table)),
            dict(enumerate(colours.values())),
            encode=lambda drawn: table[drawn],
        )
    for stem in ("0001TP_008550", "Seq05VD_f00000", "0016E5_07961"):  # of the other splits
        m.files[f"701_StillsRaw_full/{stem}.png"] = np.zeros((4, 4, 3), np.uint8)
        m.files[f"LabeledApproved_full/{stem}_L.png"] = np.zeros((4, 4, 3), np.uint8)


def labelmefacade(m):
    colours = [(128, 0, 0), (128, 0, 128), (128, 128, 0), (128, 128, 128), (128, 64, 0)]
    colours += [(0, 128, 128), (0, 128, 0), (0, 0, 128), (0, 0, 0)]
    table = np.array(colours, np.uint8)
    for k in range(3):
        m.add(
            f"images/spatial_{k}.jpg",
            f"labels/spatial_{k}.png",
            range(9),
            {k: k for k in range(8)},
            encode=lambda drawn: table[drawn],
        )
    m.files["train.txt"] = "".join(f"images/spatial_{k}.jpg\n" for k in range(3))


def _people(m, folder, image, classes):
    """Two people that overlap: the first one counts where both are."""
    size = m.size()
    first = m.draw([0, 0, *range(1, classes)], size)
    second = m.draw([0, *range(1, classes)], size)
    wanted = np.where(first == 0, second, first)
    return {f"{folder}/{image}_02_01.png": first, f"{folder}/{image}_02_02.png": second}, wanted


def mhp_v1(m):
    for k in range(3):
        people, wanted = _people(m, "annotations", f"000{k}", 19)
        first, second = people
        m.add_pair(f"images/000{k}.jpg", first, people[first].astype(np.uint8), wanted)
        m.files[second] = people[second].astype(np.uint8)
    m.files["train_list.txt"] = "0000.jpg\n0001.jpg\n0002.jpg\n"


def mhp_v2(m):
    for k in range(3):
        people, wanted = _people(m, "LV-MHP-v2/train/parsing_annos", f"{k}", 59)
        first, second = people
        three = {name: np.repeat(p[..., None], 3, 2).astype(np.uint8) for name, p in people.items()}
        m.add_pair(f"LV-MHP-v2/train/images/{k}.jpg", first, three[first], wanted)
        m.files[second] = three[second]
    m.files["LV-MHP-v2/list/train.txt"] = "0\n1\n2\n"


def sunrgbd(m):
    for k in range(1, 4):
        m.add(
            f"SUNRGBD-train_images/img-{k:06}.jpg",
            f"sunrgbd_train_test_labels/img-{k + 5050:06}.png",
            range(38),
            {k: k - 1 for k in range(1, 38)},
        )
    m.files["sunrgbd_train_test_labels/img-000001.png"] = np.zeros((5, 5), np.uint8)


def nyudv2(m):
    h5py = pytest.importorskip("h5py", reason="NYU Depth v2 needs h5py")
    images = m.rng.integers(0, 256, (4, 3, 9, 7), dtype=np.uint8)  # [image, channel, column, row]
    labels = m.rng.integers(0, 6, (4, 9, 7)).astype(np.uint16)
    m.root.mkdir(exist_ok=True)
    with h5py.File(m.root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["labels"] = images, labels
    mapping = np.array([40, 1, 3, 0, 22])  # of labels 1 to 5
    m.files["classMapping40.mat"] = {"mapClass": mapping[None].astype(np.uint8)}
    m.files["splits.mat"] = {"trainNdxs": np.array([[2], [3], [4]]), "testNdxs": np.array([[1]])}
    table = np.array([255, 39, 0, 2, 255, 21])
    m.images = [f"{k:04}" for k in (2, 3, 4)]
    m.wanted = [table[labels[k].T] for k in (1, 2, 3)]
    m.pixels = [images[k].transpose(0, 2, 1) for k in (1, 2, 3)]


def bsds500(m):
    for k in range(3):
        size = m.size()
        drawn = [m.draw(range(1, 8), size).astype(np.uint16) for _ in range(2)]
        cells = np.empty((1, 2), object)
        for j, regions in enumerate(drawn):
            cells[0, j] = {"Segmentation": regions, "Boundaries": np.zeros(size, np.uint8)}
        m.add_pair(
            f"BSDS500/data/images/train/{k}00.jpg",
            f"BSDS500/data/groundTruth/train/{k}00.mat",
            {"groundTruth": cells},
            np.zeros(size, int),
        )


def _coco(m, panoptic):
    import json

    entries, objects = [], []
    for k in range(3):
        size = m.size()
        labels = m.draw([0, 1, 2], size)
        ids = np.where(labels > 0, labels + 300, 0)
        listed = [(int(i), int(i) - 300) for i in np.unique(ids) if i]
        rgb = np.stack([ids & 255, ids >> 8, ids * 0], -1).astype(np.uint8)
        name = f"{k:012}"
        # Category 7 is a thing, category 92 stuff, which comes first.
        wanted = np.select([labels == 1, labels == 2], [1, 0], 255)
        label = f"annotations/panoptic_val2017/{name}.png"
        m.add_pair(f"val2017/{name}.jpg", label, rgb, wanted)
        info = [{"id": i, "category_id": {1: 7, 2: 92}[c], "iscrowd": 0} for i, c in listed]
        entries.append({"image_id": k, "file_name": f"{name}.png", "segments_info": info})
        objects += [
            {"id": len(objects) + c, "image_id": k, "category_id": 7, "iscrowd": 0, "bbox": []}
            | {"segmentation": encode_rle(labels == 1)}
            for _, c in listed
            if c == 1
        ]
    categories = [
        {"id": 7, "name": "train", "isthing": 1, "color": [0, 80, 100]},
        {"id": 92, "name": "banner", "isthing": 0, "color": [255, 255, 128]},
    ]
    images = [
        {"id": k, "file_name": Path(file).name, "height": w.shape[0], "width": w.shape[1]}
        for k, (file, w) in enumerate(zip(m.images, m.wanted, strict=True))
    ]
    content = {"images": images, "categories": categories if panoptic else categories[:1]}
    content["annotations"] = entries if panoptic else objects
    kind = "panoptic" if panoptic else "instances"
    m.files[f"annotations/{kind}_val2017.json"] = json.dumps(content)
    m.options["split"] = "val2017"


def coco_panoptic(m):
    _coco(m, True)


def coco_instances(m):
    _coco(m, False)


@pytest.fixture
def mini(tree, tmp_path, rng, request):
    m = Mini(tmp_path, rng)
    globals()[request.param](m)
    tree(m.files)
    m.name = request.param
    m.make = lambda: pyseg.datasets.get(m.name)(root=tmp_path, **m.options)
    return m


every = pytest.mark.parametrize("mini", NAMES, indirect=True)
some = pytest.mark.parametrize(
    "mini", [n for n in NAMES if n not in ("nyudv2", "coco_instances")], indirect=True
)


@every
def test_labels_are_those_of_the_publication(mini):
    dataset = mini.make()
    assert [s.name for s in dataset] == [Path(name).stem for name in mini.images]
    for k, sample in enumerate(dataset):
        wanted = torch.from_numpy(mini.wanted[k])
        if mini.name == "coco_instances":
            assert sample.labels is None
            masks = sample.instances.masks
            assert torch.equal(masks.any(0), wanted == 1) and len(masks) == (1 in wanted)
        else:
            assert torch.equal(sample.labels.long(), wanted.long())
            assert sample.labels.dtype == torch.uint8
        if mini.images[k].endswith(".png"):
            drawn = torch.from_numpy(mini.files[mini.images[k]])
            assert torch.equal(sample.image, drawn.permute(2, 0, 1))
    if mini.name == "nyudv2":
        for k, sample in enumerate(dataset):
            assert np.array_equal(sample.image.numpy(), mini.pixels[k])
    assert set(dataset.things) <= set(dataset.classes)
    check_dataset(dataset)


@every
def test_a_wrong_root_shows_the_tree_what_is_there_and_the_page(mini, tmp_path_factory):
    published = pyseg.datasets.get(mini.name).published
    empty = tmp_path_factory.mktemp("empty")
    (empty / "holiday.jpg").touch()
    (empty / "data.zip").touch()
    for root in (empty, empty / "nowhere"):
        with pytest.raises(LayoutError) as error:
            pyseg.datasets.create(mini.name, root=root, split=mini.options["split"])
        text = str(error.value)
        for line in published.tree.strip().splitlines():
            assert line in text
        assert published.page in text and isinstance(error.value, PysegError | FileNotFoundError)
        if root == empty:
            assert error.value.absent
            assert "data.zip, holiday.jpg" in text and "Unpack data.zip" in text


@some
@pytest.mark.parametrize("kind", ["image", "label"])
def test_half_a_data_set_is_noticed(mini, kind):
    names = mini.images if kind == "image" else mini.labels
    gone = mini.root / names[1]
    gone.unlink()
    if kind == "label" and mini.name in ("mhp_v1", "mhp_v2"):
        gone.with_name(gone.name.replace("_01.", "_02.")).unlink()
    if kind == "label" and mini.name == "coco_panoptic":  # found when it is read
        with pytest.raises(PysegError, match="does not exist"):
            mini.make()[1]
        return
    with pytest.raises(LayoutError, match=r"1 of 3 (images|label files) are absent") as error:
        mini.make()
    assert not error.value.absent
    assert re.split(r"[/_.]", Path(mini.images[1]).stem)[0] in str(error.value)


@some
def test_sizes_must_agree(mini):
    picture = mini.root / mini.images[2]
    Image.new("RGB", (41, 40)).save(picture)
    dataset = mini.make()
    assert dataset[0].labels is not None
    with pytest.raises(ImageError, match=r"must be equal"):
        dataset[2]


@some
def test_values_and_colours_that_are_none_of_it(mini):
    path = mini.root / mini.labels[0]
    if path.suffix == ".mat" and mini.name == "bsds500":
        pytest.skip("its regions have no classes")
    size = mini.wanted[0].shape
    if mini.name in ("deepscene", "camvid", "labelmefacade"):
        colours = np.array(mini.files[mini.labels[0]])
        colours[0, 0] = (1, 2, 3)
        Image.fromarray(colours).save(path)
        with pytest.raises(LabelError) as error:
            mini.make()[0]
        pixels = size[0] * size[1]
        share = f"1 pixels ({1 / pixels:.1%}) have 1 colour that is not in the palette"
        assert share in str(error.value) and "(1, 2, 3) in 1, nearest (0, 0, 0)" in str(error.value)
        return
    if path.suffix == ".mat":
        scipy.io.savemat(path, {"LabelMap": np.full(size, 470, np.uint16)})
    elif mini.name == "bdd100k_panoptic":
        Image.fromarray(np.full((*size, 4), 200, np.uint8)).save(path)
    elif mini.name == "coco_panoptic":
        Image.fromarray(np.full((*size, 3), 200, np.uint8)).save(path)
    else:
        Image.fromarray(np.full(size, 200, np.uint8)).save(path)
    wrong = "470" if path.suffix == ".mat" else "200"
    if mini.name == "coco_panoptic":
        wrong = str(200 + 256 * 200 + 65536 * 200)
    with pytest.raises(LabelError, match=wrong) as error:
        mini.make()[0]
    assert path.name in str(error.value)


@pytest.mark.parametrize("mini", ["cityscapes", "kitti", "bdd100k"], indirect=True)
def test_street_scenes_score_a_network_of_cityscapes_classes(mini):
    """One network's class list serves all three, and scores are those of a confusion matrix."""
    from pyseg.classes import CITYSCAPES_CLASSES

    torch.manual_seed(int(mini.rng.integers(1 << 30)))
    network = torch.nn.Conv2d(3, 19, 1)
    pipeline = pyseg.build(network, classes=CITYSCAPES_CLASSES)
    scores = pyseg.evaluate(pipeline, mini.make()).to_list()[0]["metrics"]["semantic"]
    matrix = np.zeros((19, 19), int)
    for k, sample in enumerate(mini.make()):
        predicted = pipeline(sample.image).labels.numpy()
        valid = mini.wanted[k] != 255
        np.add.at(matrix, (mini.wanted[k][valid], predicted[valid]), 1)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    present = union > 0
    expected = (matrix.diagonal()[present] / union[present]).mean()
    assert scores["miou"] == pytest.approx(expected, abs=1e-6)
