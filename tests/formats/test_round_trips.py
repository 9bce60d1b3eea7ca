"""Each format written and read again, and read by the ways of its own tools."""

import base64
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from scipy import ndimage

from pyseg.classes import CITYSCAPES_CLASSES
from pyseg.datasets.coco_panoptic import COCOPanoptic
from pyseg.datasets.folder import Folder
from pyseg.formats import Annotation, Region, Source, decode_rle
from pyseg.formats.annotation import Given
from pyseg.formats.table import FORMATS, detect
from pyseg.image import write_image

CLASSES = ("person", 'a "quoted" name: <&>', "road", "tree, or bush", "Straße", "sky")
SIZES = {"a": (31, 47), "deep/er/b": (1, 1), "c.d": (40, 9), "empty": (5, 6)}


def blob(generator, size, scale):
    mask = ndimage.gaussian_filter(generator.standard_normal(size), scale) > 0.02
    if not mask.any():
        mask[generator.integers(size[0]), generator.integers(size[1])] = True
    return mask


def scene(name, seed, classes=CLASSES, overlaps=True):
    """Objects with holes, parts and single pixels; the last classes are areas."""
    generator = np.random.default_rng([seed, len(name)])
    size = SIZES[name]
    regions = []
    taken = np.zeros(size, bool)
    for k in range(0 if name == "empty" else 9):
        mask = blob(generator, size, (0, 0.8, 2)[k % 3])
        if k == 4:
            mask = np.zeros(size, bool)
            mask[-1, -1] = True
        if not overlaps:
            mask &= ~taken
        if mask.any():
            taken |= mask
            label = k % (len(classes) - 2)
            regions.append(Region.cut(label, mask, crowd=k == 5, score=(1.0, 0.25)[k == 6]))
    for label in (len(classes) - 2, len(classes) - 1):
        mask = blob(generator, size, 1) & (~taken if not overlaps else True)
        if mask.any() and name != "empty":
            taken |= mask
            regions.append(Region.cut(label, mask, thing=False))
    return Annotation(name, size, tuple(regions), file_name=f"{name.rpartition('/')[2]}.jpg")


def source(seed=None, classes=CLASSES, **more):
    seed = int(np.random.default_rng().integers(1 << 30)) if seed is None else seed
    things = frozenset(range(len(classes) - 2))
    scenes = {name: scene(name, seed, classes, **more) for name in SIZES}
    return Source(classes, tuple(scenes), scenes.__getitem__, things)


def write(name, folder, data):
    form = FORMATS[name]
    path = folder / f"out{form.suffix}"
    writer = form.writer(path, data)
    entries = [json.loads(json.dumps(writer.write(data.read(image)))) for image in data.names]
    writer.finish(entries)
    return path


def read(name, path, data, **more):
    """Annotations by the name of the image, with names of classes in the place of labels."""
    sizes = {image: data.read(image).size for image in data.names}
    opened = FORMATS[name].open_source(path, Given(sizes=sizes, **more))
    assert sorted(opened.names) == sorted(data.names)
    found = {}
    for image in data.names:
        annotation = opened.read(image)
        assert annotation.size == sizes[image]
        found[image] = [(opened.classes[r.label], r) for r in annotation.regions]
    return found


def key(name, region):
    return name, region.left, region.top, region.mask.shape, region.mask.tobytes()


def union(regions, size):
    return np.any([np.zeros(size, bool), *(region.full(size) for region in regions)], axis=0)


@pytest.mark.parametrize("name", ["coco", "coco-rle", "labelme", "cvat", "geojson"])
def test_formats_that_hold_every_mask(name, tmp_path):
    data = source()
    found = read(name, write(name, tmp_path, data), data)
    for image in data.names:
        want = [(data.classes[r.label], r) for r in data.read(image).regions]
        assert [key(*pair) for pair in found[image]] == [key(*pair) for pair in want]
        if "crowds" in FORMATS[name].holds:
            assert [r.crowd for _, r in found[image]] == [r.crowd for _, r in want]
        if "scores" in FORMATS[name].holds:
            assert [r.score for _, r in found[image]] == [r.score for _, r in want]


@pytest.mark.parametrize("name", ["coco-panoptic", "voc"])
def test_formats_that_hold_one_object_a_pixel(name, tmp_path):
    data = source(overlaps=False)
    found = read(name, write(name, tmp_path, data), data)
    for image in data.names:
        regions = [(n, r) for n, r in found[image] if n != "background"]
        want = [(data.classes[r.label], r) for r in data.read(image).regions]
        assert {key(*pair) for pair in regions} == {key(*pair) for pair in want}
        assert len(regions) == len(want)
        assert {r.thing for n, r in regions if n in CLASSES[-2:]} <= {False}
        if name == "coco-panoptic":
            flags = {(*key(*pair), pair[1].crowd, pair[1].score) for pair in regions}
            assert flags == {(*key(*pair), pair[1].crowd, pair[1].score) for pair in want}


@pytest.mark.parametrize("overlaps", [True, False])
def test_what_lies_in_front_is_kept(overlaps, tmp_path):
    data = source(overlaps=overlaps)
    for name in ("coco-panoptic", "indexed", "voc"):
        found = read(
            name, write(name, tmp_path / name, data) if not (tmp_path / name).mkdir() else 0, data
        )
        for image in data.names:
            annotation = data.read(image)
            labels = annotation.label_map(255)
            size = annotation.size
            for k, kind in enumerate(data.classes):
                mask = union([r for n, r in found[image] if n == kind], size)
                assert np.array_equal(mask, labels == k)


def test_yolo(tmp_path):
    """Masks in one part are exact, holes and all; others have the pixels of bridges besides."""
    data = source()
    found = read("yolo", write("yolo", tmp_path, data), data)
    exact = bridged = 0
    for image in data.names:
        regions = iter(found[image])
        for region in data.read(image).regions:
            count = ndimage.label(region.mask, structure=np.ones((3, 3)))[1]
            if not region.thing:  # an area: a line for each part
                parts = [next(regions) for _ in range(count)]
                size = data.read(image).size
                mask = union([part for _, part in parts], size)
                assert np.array_equal(mask, region.full(size))
                continue
            kind, got = next(regions)
            assert kind == data.classes[region.label]
            if count == 1:
                assert key(kind, got) == key(kind, region)
                exact += 1
            else:
                assert got.box == region.box and (got.mask | ~region.mask).all()
                bridged += 1
        assert next(regions, None) is None
    assert exact and bridged


def test_yolo_as_ultralytics_reads_it(tmp_path):
    """Texts to 32-bit floats, times the size, to integers, OpenCV's fillPoly."""
    cv2 = pytest.importorskip("cv2")
    data = source()
    path = write("yolo", tmp_path, data)
    names = yaml.safe_load((path / "data.yaml").read_text(encoding="utf-8"))["names"]
    assert names == dict(enumerate(CLASSES))
    found = read("yolo", path, data)
    for image in data.names:
        height, width = data.read(image).size
        lines = (path / "labels" / f"{image}.txt").read_text().splitlines()
        assert len(lines) == len(found[image])
        for line, (kind, region) in zip(lines, found[image], strict=True):
            words = line.split()
            assert names[int(words[0])] == kind and len(words) % 2 and len(words) >= 7
            points = np.array(words[1:], dtype=np.float32).reshape(-1, 2)
            points *= np.array([width, height], dtype=np.float32)
            mask = np.zeros((height, width), np.uint8)
            cv2.fillPoly(mask, [points.astype(np.int32)], 1)
            assert np.array_equal(mask > 0, region.full((height, width)))


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_coco_as_pycocotools_reads_it(tmp_path, capsys):
    coco = pytest.importorskip("pycocotools.coco")
    data = source()
    for name in ("coco", "coco-rle"):
        tree = coco.COCO(str(write(name, tmp_path, data)))
        for number, image in enumerate(data.names, 1):
            assert tree.imgs[number]["file_name"] == f"{image}.jpg"
            regions = data.read(image).regions
            entries = tree.imgToAnns[number]
            for entry, region in zip(entries, regions, strict=True):
                mask = region.full(data.read(image).size)
                assert np.array_equal(tree.annToMask(entry) > 0, mask)
                assert entry["area"] == mask.sum() and entry["iscrowd"] == region.crowd
                left, top, wide, high = entry["bbox"]
                assert (left, top, left + wide, top + high) == region.box
                assert tree.cats[entry["category_id"]]["name"] == data.classes[region.label]
            kinds = {type(entry["segmentation"]) for entry in entries}
            assert kinds <= ({list, dict} if name == "coco" else {dict})
    capsys.readouterr()


def labelme_mask(shape, size):
    """As labelme's shape_to_mask and shapes_to_label do it."""
    mask = np.zeros(size, bool)
    if shape["shape_type"] == "mask":
        (x0, y0), (x1, y1) = np.array(shape["points"]).astype(int)
        picture = Image.open(io.BytesIO(base64.b64decode(shape["mask"])))
        mask[y0 : y1 + 1, x0 : x1 + 1] = np.array(picture)
        return mask
    canvas = Image.fromarray(mask.astype(np.uint8))
    points = [tuple(point) for point in shape["points"]]
    assert len(points) > 2, "Polygon must have points more than 2"
    ImageDraw.Draw(canvas).polygon(xy=points, outline=1, fill=1)
    return np.array(canvas, dtype=bool)


def test_labelme_as_labelme_reads_it(tmp_path):
    data = source()
    path = write("labelme", tmp_path, data)
    for image in data.names:
        value = json.loads((path / f"{image}.json").read_text())
        height, width = data.read(image).size
        assert (value["imageHeight"], value["imageWidth"]) == (height, width)
        objects = {}
        for k, shape in enumerate(value["shapes"]):
            group = f"alone {k}" if shape["group_id"] is None else shape["group_id"]
            kind, mask = objects.setdefault(
                group, (shape["label"], np.zeros((height, width), bool))
            )
            assert kind == shape["label"]
            mask |= labelme_mask(shape, (height, width))
        regions = data.read(image).regions
        for (kind, mask), region in zip(objects.values(), regions, strict=True):
            assert kind == data.classes[region.label]
            assert np.array_equal(mask, region.full((height, width)))


def test_cvat_by_hand(tmp_path):
    """Polygons by the rule of centres, runs one by one."""
    data = source()
    root = ElementTree.parse(write("cvat", tmp_path, data)).getroot()
    names = [label.text for label in root.iterfind("meta/task/labels/label/name")]
    assert names == list(CLASSES)
    kinds = set()
    for element, image in zip(root.iterfind("image"), data.names, strict=True):
        assert element.get("name") == f"{image}.jpg"
        size = int(element.get("height")), int(element.get("width"))
        for shape, region in zip(element, data.read(image).regions, strict=True):
            kinds.add(shape.tag)
            assert shape.get("label") == data.classes[region.label]
            if shape.tag == "polygon":
                points = [tuple(map(float, p.split(","))) for p in shape.get("points").split(";")]
                doubled = [(2 * x - 1, 2 * y - 1) for x, y in points]  # centres become whole
                canvas = Image.new("1", (2 * size[1], 2 * size[0]))
                ImageDraw.Draw(canvas).polygon(doubled, fill=1, outline=0)
                mask = np.array(canvas)[::2, ::2]
            else:
                flat, value = [], False
                for run in shape.get("rle").split(","):
                    flat += [value] * int(run)
                    value = not value
                mask = np.zeros(size, bool)
                left, top, width, height = (
                    int(shape.get(k)) for k in ("left", "top", "width", "height")
                )
                part = np.array(flat).reshape(height, width)
                mask[top : top + height, left : left + width] = part
            assert np.array_equal(mask, region.full(size))
    assert kinds == {"polygon", "mask"}


def test_voc_by_pillow(tmp_path):
    data = source(overlaps=False)
    path = write("voc", tmp_path, data)
    names = (path / "class_names.txt").read_text(encoding="utf-8").splitlines()
    assert names == ["background", *CLASSES]
    listed = (path / "ImageSets/Segmentation/all.txt").read_text().split("\n")[:-1]
    assert listed == list(data.names)
    for image in data.names:
        planes = [
            Image.open(path / f"Segmentation{k}" / f"{image}.png") for k in ("Class", "Object")
        ]
        assert [plane.mode for plane in planes] == ["P", "P"]
        labels, objects = (np.array(plane) for plane in planes)
        assert np.array_equal(labels, data.read(image).label_map(-1) + 1)
        root = ElementTree.parse(path / "Annotations" / f"{image}.xml").getroot()
        things = [r for r in data.read(image).regions if r.thing]
        for k, (element, region) in enumerate(zip(root.iterfind("object"), things, strict=True), 1):
            assert np.array_equal(objects == k, region.full(labels.shape))
            assert element.findtext("name") == data.classes[region.label]
            box = [
                int(element.find("bndbox").findtext(f"{c}{a}"))
                for c in ("xm", "ym")
                for a in ("in", "ax")
            ]
            rows, columns = np.nonzero(objects == k)
            assert box == [columns.min() + 1, columns.max() + 1, rows.min() + 1, rows.max() + 1]


def test_indexed_pngs_are_a_folder_data_set(tmp_path):
    data = source()
    path = write("indexed", tmp_path, data)
    image = path / "images/a.png"
    image.parent.mkdir()
    write_image(image, torch.zeros(3, *SIZES["a"]).byte())
    for file in (path / "labels").rglob("*.png"):
        if file.stem != "a":
            file.unlink()
    sample = Folder(path)[0]
    assert np.array_equal(sample.labels.numpy(), data.read("a").label_map(255))
    assert Folder(path).classes == CLASSES


def test_panoptic_is_a_data_set(tmp_path):
    data = source(overlaps=False)
    (tmp_path / "annotations").mkdir()
    writer = FORMATS["coco-panoptic"].writer(tmp_path / "annotations/panoptic_val2017.json", data)
    writer.finish([writer.write(data.read(image)) for image in ("a",)])
    (tmp_path / "val2017").mkdir()
    write_image(tmp_path / "val2017/a.jpg", torch.zeros(3, *SIZES["a"]).byte())
    sample = COCOPanoptic(tmp_path, split="val2017")[0]
    want = data.read("a")
    assert len(sample.segments.items) == len(
        {r.label if not r.thing else id(r) for r in want.regions}
    )


def test_geojson_by_hand(tmp_path):
    """Rings close, the outer one goes counterclockwise by its coordinates, areas are pixels."""
    data = source()
    path = write("geojson", tmp_path, data)
    for image in data.names:
        value = json.loads((path / f"{image}.geojson").read_text())
        regions = data.read(image).regions
        for feature, region in zip(value["features"], regions, strict=True):
            geometry = feature["geometry"]
            polygons = geometry["coordinates"]
            polygons = [polygons] if geometry["type"] == "Polygon" else polygons
            assert len(polygons) == ndimage.label(region.mask)[1]
            total = 0
            for rings in polygons:
                areas = []
                for ring in rings:
                    assert ring[0] == ring[-1]
                    x, y = np.array(ring, float).T
                    areas.append(float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2))
                assert areas[0] > 0 and all(area < 0 for area in areas[1:])
                total += sum(areas)
            assert total == region.area
            assert feature["properties"]["label"] == data.classes[region.label]


def test_cityscapes(tmp_path):
    data = source(classes=CITYSCAPES_CLASSES, overlaps=False)
    street = []
    for image in data.names:  # persons and cars, and road and sky around
        regions = [
            Region(
                11 + 2 * (k % 2) if r.thing else 10 * (r.label % 2),
                r.mask,
                r.left,
                r.top,
                r.thing,
                r.crowd,
            )
            for k, r in enumerate(data.read(image).regions)
        ]
        street.append(Annotation(image, data.read(image).size, tuple(regions)))
    by_name = {annotation.name: annotation for annotation in street}
    data = Source(CITYSCAPES_CLASSES, data.names, by_name.__getitem__, frozenset(range(11, 19)))
    for name, objects in (("cityscapes-instanceids", True), ("cityscapes-panoptic", True)):
        (tmp_path / name).mkdir()
        path = write(name, tmp_path / name, data)
        assert detect(path)[0].name == name
        found = read(name, path, data)
        for image in data.names:
            want = [(CITYSCAPES_CLASSES[r.label], r) for r in by_name[image].regions]
            crowds = [pair for pair in want if pair[1].crowd]
            assert len(crowds) <= 1 and objects
            assert {(*key(*p), p[1].crowd) for p in found[image]} == {
                (*key(*p), p[1].crowd) for p in want
            }
    for name, ids in (("labelIds", {0: 7, 10: 23, 11: 24, 13: 26}), ("labelTrainIds", None)):
        kind = {"labelIds": "cityscapes-labelids", "labelTrainIds": "cityscapes-trainids"}[name]
        (tmp_path / kind).mkdir()
        path = write(kind, tmp_path / kind, data)
        assert detect(path)[0].name == kind
        for image in data.names:
            values = np.array(Image.open(path / f"{image}_gtFine_{name}.png"))
            labels = by_name[image].label_map(-1)
            for k in (0, 10, 11, 13):
                assert np.array_equal(values == (ids[k] if ids else k), labels == k)
            assert set(np.unique(values[labels < 0])) <= ({0} if ids else {255})
        found = read(kind, path, data)
        for image in data.names:
            for k in (0, 10, 11, 13):
                mine = [r for n, r in found[image] if n == CITYSCAPES_CLASSES[k]]
                size = by_name[image].size
                assert np.array_equal(union(mine, size), by_name[image].label_map(-1) == k)


def test_polygons_drawn_by_hand_keep_their_points(tmp_path):
    """Where both formats fill by one rule: COCO and CVAT."""
    ring = [3.25, 2.5, 20.75, 4, 14, 22.125]
    value = {
        "images": [{"id": 9, "file_name": "x.jpg", "height": 25, "width": 30}],
        "categories": [{"id": 4, "name": "leaf"}],
        "annotations": [{"image_id": 9, "category_id": 4, "segmentation": [ring]}],
    }
    path = tmp_path / "in.json"
    path.write_text(json.dumps(value))
    data = FORMATS["coco"].open_source(path, Given())
    cvat = FORMATS["cvat"].open_source(write("cvat", tmp_path, data), Given())
    assert cvat.read("x").regions[0].polygons[0].ravel().tolist() == ring
    back = json.loads(write("coco", tmp_path, cvat).read_text())
    assert back["annotations"][0]["segmentation"] == [ring]
    # LabelMe fills otherwise: there the mask is kept, not the points.
    labelme = FORMATS["labelme"].open_source(write("labelme", tmp_path, data), Given())
    assert key("", labelme.read("x").regions[0]) == key("", data.read("x").regions[0])


def test_uncompressed_rle_of_crowds(tmp_path):
    data = source()
    value = json.loads(write("coco", tmp_path, data).read_text())
    crowds = [entry for entry in value["annotations"] if entry["iscrowd"]]
    assert crowds
    for entry in crowds:
        assert isinstance(entry["segmentation"]["counts"], list)
        assert decode_rle(entry["segmentation"]).sum() == entry["area"]


def test_segments_and_instances_of_pyseg():
    for overlaps in (True, False):
        want = scene("a", 5, overlaps=overlaps)
        segments = want.segments()
        again = Annotation.of_segments("a", segments, range(4))
        assert np.array_equal(again.label_map(255), want.label_map(255))
        assert np.array_equal(segments.label_map(6).numpy(), want.label_map(255))
        instances = want.instances()
        things = [r for r in want.regions if r.thing]
        back = Annotation.of_instances("a", instances)
        order = sorted(range(len(things)), key=lambda k: things[k].score)
        for region, k in zip(back.regions, order, strict=True):
            assert key("", region) == key("", things[k])
            assert (region.crowd, region.score) == (things[k].crowd, things[k].score)


def test_label_map_of_many_classes(tmp_path):
    classes = tuple(f"class {k}" for k in range(300))
    labels = np.arange(0, 330, 7).reshape(6, 8)
    labels[labels >= 300] = -1
    annotation = Annotation.of_labels("a", labels, 300)
    data = Source(classes, ("a",), lambda name: annotation)
    path = write("indexed", tmp_path, data)
    values = np.array(Image.open(path / "labels/a.png"))
    assert np.array_equal(values, np.where(labels < 0, 65535, labels))
    found = FORMATS["indexed"].open_source(path, Given()).read("a")
    assert np.array_equal(found.label_map(-1), labels)


def test_real_samples(data_folder, tmp_path):
    """labelme's own export of the same shapes to VOC: 3 photos, 12 objects."""
    folder = data_folder("instance/voc3")
    voc = FORMATS["voc"].open_source(folder, Given())
    labelme = FORMATS["labelme"].open_source(folder / "labelme_json", Given())
    assert sorted(labelme.names) == sorted(voc.names)
    count = different = 0
    for image in labelme.names:
        left = voc.read(image)
        right = labelme.read(image)
        void = np.array(Image.open(folder / "SegmentationClass" / f"{image}.png")) == 255
        objects = [r for r in left.regions if r.thing]
        assert len(objects) == len(right.regions)
        fronts = right.id_map()
        for region in objects:  # of each pixel that is not void, the same object is in front
            mask = region.full(left.size)
            number = np.bincount(fronts[mask]).argmax()
            front = right.regions[number - 1]
            different += int((mask != ((fronts == number) & ~void)).sum())
            assert labelme.classes[front.label] == voc.classes[region.label]
            count += 1
    assert different <= 2  # one pixel is another's: an older Pillow drew the PNGs
    assert count == 12


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_real_polygons_against_pycocotools(data_folder, capsys):
    coco = pytest.importorskip("pycocotools.coco")
    for file in (
        data_folder("instance/voc3") / "annotations_coco.json",
        data_folder("panoptic/coco_sample") / "panoptic_coco_detection_format.json",
    ):
        tree = coco.COCO(str(file))
        opened = FORMATS["coco"].open_source(file, Given())
        for number, entry in tree.imgs.items():
            annotation = opened.read(str(Path(entry["file_name"]).with_suffix("")))
            pairs = zip(tree.imgToAnns[number], annotation.regions, strict=True)
            for shape, region in pairs:
                assert np.array_equal(tree.annToMask(shape) > 0, region.full(annotation.size))
    capsys.readouterr()


def test_tiny_trees_of_others(data_folder):
    """Made by another tool: Cityscapes, COCO panoptic, VOC with colours in the place of ids."""
    root = data_folder("formats/datumaro_tiny_synthetic")
    tree = root / "cityscapes_dataset/train_dataset"
    form, path, _ = detect(tree)
    assert form.name == "cityscapes-instanceids"
    opened = form.open_source(path, Given())
    (name,) = [n for n in opened.names if n.endswith("000031")]
    regions = opened.read(name).regions
    assert [opened.classes[r.label] for r in regions] == ["out of roi", "truck", "truck"]
    file = root / "coco_dataset/coco_panoptic/annotations/panoptic_val.json"
    form, path, _ = detect(file)
    opened = form.open_source(path, Given())
    assert form.name == "coco-panoptic" and opened.classes == ("a", "b")
    assert [r.area for r in opened.read("b").regions] == [20, 20]
