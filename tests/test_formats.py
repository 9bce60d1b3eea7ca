import json

import numpy as np
import pytest
import torch
from PIL import Image

from pyseg import formats, image
from pyseg.errors import ImageError
from pyseg.regions import Instances, Segment, Segments


def masks():
    generator = np.random.default_rng(3)
    yield np.zeros((4, 5), bool)
    yield np.ones((4, 5), bool)
    yield np.eye(1, dtype=bool)
    yield generator.random((37, 53)) < 0.5
    rows, columns = np.mgrid[:300, :400]
    yield (rows - 150) ** 2 + (columns - 200) ** 2 < 9000
    yield np.arange(2000 * 3000).reshape(2000, 3000) > 5_900_000  # long runs: many digits
    inverse = np.ones((700, 900), bool)
    inverse[300, 400] = False
    yield inverse


@pytest.mark.parametrize("index", range(7))
def test_rle_equals_pycocotools(index):
    reference = pytest.importorskip("pycocotools.mask")
    mask = list(masks())[index]
    want = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
    got = formats.encode_rle(torch.from_numpy(mask))
    assert got == {"size": list(mask.shape), "counts": want["counts"].decode()}
    for rle in (got, want):
        assert np.array_equal(formats.decode_rle(rle).numpy(), mask)


@pytest.mark.parametrize("index", range(7))
def test_rle_round_trip(index):
    mask = list(masks())[index]
    rle = json.loads(json.dumps(formats.encode_rle(mask)))
    assert np.array_equal(formats.decode_rle(rle).numpy(), mask)


def test_uncompressed_rle_is_column_major():
    decoded = formats.decode_rle({"size": [2, 3], "counts": [1, 3, 2]})
    assert decoded.int().tolist() == [[0, 1, 0], [1, 1, 0]]
    # By hand: 1 -> '1', 3 -> '3', 2 -> '2' (values below 16 are one character, 48 + value).
    assert formats.encode_rle(decoded)["counts"] == "132"


def test_damaged_rle_is_refused():
    with pytest.raises(ImageError, match="add up to 6"):
        formats.decode_rle({"size": [2, 4], "counts": "132"})
    with pytest.raises(ImageError, match="damaged"):
        formats.decode_rle({"size": [2, 3], "counts": "13R"})  # 'R' announces a further digit
    with pytest.raises(ImageError, match="damaged"):
        formats.decode_rle({"size": [2, 3], "counts": "1~2"})


WRONG_RLES = [
    {"size": [5, 7], "counts": [2**62] * 4 + [35]},  # whose sum wraps to 35
    {"size": [5, 7], "counts": [0] + [2**62] * 4 + [35]},
    {"size": [5, 7], "counts": [2**64, 35]},
    {"size": [5, 7], "counts": [-1, 36]},
    {"size": [5, 7], "counts": "ooooooooooooo0" * 4},  # numbers of 14 digits
    {"size": [5, 7], "counts": "o" * 11 + "0" + "S1"},
    {"size": [5, 7], "counts": "S1\ud800"},
    {"size": [5, 7], "counts": "S1\u00e9"},
    {"size": [5, 7], "counts": [3.7, 31.3]},
    {"size": [5, 7], "counts": [True, 34]},
    {"size": [5, 7], "counts": [[35]]},
    {"size": [5, 7], "counts": None},
    {"size": [5.5, 7], "counts": [35]},
    {"size": ["5", "7"], "counts": [35]},
    {"size": [-5, -7], "counts": [35]},
    {"size": [35], "counts": [35]},
    {"size": None, "counts": [35]},
    {"counts": [35]},
    [35],
    None,
]


@pytest.mark.parametrize("rle", WRONG_RLES, ids=range(len(WRONG_RLES)))
def test_hostile_rle_is_refused(rle):
    with pytest.raises(ImageError, match="RLE mask"):
        formats.decode_rle(rle)
    with pytest.raises(ImageError, match="RLE mask"):
        formats.compressed_rle(rle)


def test_rle_has_a_limit_of_pixels(monkeypatch):
    with pytest.raises(ImageError, match=r"100000 x 100000 pixels.*MAX_PIXELS"):
        formats.decode_rle({"size": [100_000, 100_000], "counts": [10**10]})
    monkeypatch.setattr(image, "MAX_PIXELS", 34)
    with pytest.raises(ImageError, match="MAX_PIXELS"):
        formats.decode_rle({"size": [5, 7], "counts": [35]})
    monkeypatch.setattr(image, "MAX_PIXELS", 35)
    assert not formats.decode_rle({"size": [5, 7], "counts": [35]}).any()


@pytest.mark.parametrize("index", range(7))
def test_runs_as_text(index):
    mask = list(masks())[index]
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False, append=not flat[-1]))
    runs = np.diff(edges, prepend=0).tolist()
    rle = {"size": list(mask.shape), "counts": runs}
    assert formats.compressed_rle(rle) == formats.encode_rle(mask)
    assert formats.compressed_rle(formats.encode_rle(mask)) == formats.encode_rle(mask)


def test_old_addresses():
    for name in image._IN_FORMATS:
        assert getattr(image, name) is getattr(formats, name)
    with pytest.raises(AttributeError, match="has no attribute 'decode_RLE'"):
        _ = image.decode_RLE


def test_rle_of_coco_results(data_folder):
    results = json.loads(
        next((data_folder("formats") / "coco_results").rglob("*.json")).read_text()
    )
    assert len(results) >= 40
    for result in results:
        mask = formats.decode_rle(result["segmentation"])
        assert mask.any()
        assert formats.encode_rle(mask)["counts"] == result["segmentation"]["counts"]


def panoptic():
    table = torch.zeros(20, 30, dtype=torch.int32)
    table[2:9, 3:11] = 1
    table[10:, :] = 70_000
    table[10:12, 20:25] = 300
    items = [Segment(1, 0, 0.9, 56), Segment(70_000, 2, 1.0, 290), Segment(300, 0, 0.5, 10)]
    return Segments(table, tuple(items))


def test_panoptic_files(tmp_path):
    segments = panoptic()
    path = formats.write_panoptic(
        tmp_path / "panoptic_val.json",
        [("000000000139", segments), ("seq/frame_7", segments)],
        ("person", "car", "road"),
        things={0, 1},
        category_ids=(1, 3, 149),
    )
    written = json.loads(path.read_text())
    assert written["categories"][2] == {"id": 149, "name": "road", "isthing": 0}
    first, second = written["annotations"]
    assert (first["image_id"], first["file_name"]) == (139, "000000000139.png")
    assert second["image_id"] == "seq/frame_7"
    rgb = np.array(Image.open(tmp_path / "panoptic_val" / second["file_name"])).astype(int)
    ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
    assert np.array_equal(ids, segments.map.numpy())
    info = {entry["id"]: entry for entry in first["segments_info"]}
    assert info[300]["category_id"] == 1 and info[70_000]["category_id"] == 149
    assert info[1]["bbox"] == [3, 2, 8, 7] and info[300]["bbox"] == [20, 10, 5, 2]
    for number, entry in info.items():
        assert entry["area"] == (segments.map == number).sum() and entry["iscrowd"] == 0


def test_one_panoptic_map(tmp_path):
    segments = panoptic()
    path = formats.write_segments(tmp_path / "a.png", segments)
    assert torch.equal(formats.read_segment_ids(path), segments.map)
    listed = json.loads(path.with_suffix(".json").read_text())
    assert [(s["id"], s["category_id"]) for s in listed] == [(1, 0), (70_000, 2), (300, 0)]
    formats.write_segments(
        tmp_path / "none.png", Segments(torch.zeros(2, 3, dtype=torch.int32), ())
    )
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_instances_file(tmp_path):
    masks = torch.rand(2, 9, 7) > 0.5
    boxes = torch.tensor([[1.0, 2, 6, 8.5], [0, 0, 7, 9]])
    found = Instances(boxes, masks, torch.tensor([0.25, 0.5]), torch.tensor([3, 0]))
    first, second = json.loads(formats.write_instances(tmp_path / "a.json", found).read_text())
    assert (first["category_id"], first["score"], first["bbox"]) == (3, 0.25, [1, 2, 5, 6.5])
    assert second["bbox"] == [0, 0, 7, 9]
    for entry, mask in zip((first, second), masks, strict=True):
        assert torch.equal(formats.decode_rle(entry["segmentation"]), mask)


def test_cityscapes_ids(tmp_path):
    """As createTrainIdInstanceImgs has them: 26001 is the second car, 7 the road."""
    map = torch.zeros(4, 8, dtype=torch.int32)
    map[0], map[1, :3], map[1, 5:], map[2] = 9, 1, 4, 2
    items = (
        Segment(9, 0, 1.0, 8),
        Segment(1, 13, 1.0, 3),
        Segment(4, 13, 1.0, 3),
        Segment(2, 11, 1.0, 8, crowd=True),
    )
    segments = Segments(map, items)
    path = formats.write_cityscapes_ids(tmp_path / "a.png", segments, things=range(11, 19))
    picture = Image.open(path)
    assert picture.mode.startswith("I")
    ids = np.array(picture)
    assert ids[:, 0].tolist() == [7, 26000, 24, 0] and ids[1].tolist()[3:] == [0, 0] + [26001] * 3
    with pytest.raises(ImageError, match="has class 13, but there are label_ids for 2 classes"):
        formats.write_cityscapes_ids(path, segments, things=(), label_ids=(7, 8))
    with pytest.raises(ImageError, match="label_ids must be 1 to 64"):
        formats.write_cityscapes_ids(path, segments, things=(), label_ids=(0,))


def test_panoptic_results_that_do_not_fit_are_refused(tmp_path):
    segments = panoptic()
    path = tmp_path / "a.json"

    def write(results):
        formats.write_panoptic(path, results, ("person", "car", "road"), things={0, 1})

    with pytest.raises(ImageError, match="do not fit"):
        write([("a", Segments(segments.map, segments.items[:2]))])
    with pytest.raises(ImageError, match="do not fit"):
        write([("a", Segments(segments.map, (*segments.items, Segment(5, 0, 1.0, 3))))])
    with pytest.raises(ImageError, match="two panoptic results"):
        write([("a", segments), ("a", segments)])
    with pytest.raises(ImageError, match="segment ids"):
        write(
            [
                (
                    "a",
                    Segments(
                        segments.map * 1000,
                        tuple(
                            Segment(s.id * 1000, s.label, s.score, s.area) for s in segments.items
                        ),
                    ),
                )
            ]
        )
    assert not path.exists()
