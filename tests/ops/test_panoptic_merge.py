"""panoptic_merge against a loop over masks, and against panopticapi's own output."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pyseg.errors import ImageError
from pyseg.image import encode_rle
from pyseg.ops import panoptic_merge
from pyseg.ops.panoptic_merge import PanopticMaps, paste, reference

INTEGERS = [torch.uint8, torch.int16, torch.int32, torch.int64]


def integer(generator, low, high):
    return int(torch.randint(low, high, (1,), generator=generator))


def make_scene(generator, height, width, instances, dtype=torch.uint8):
    """Boxes that also leave the image, masks of boxes, scores with ties, a blocky semantic map."""
    boxes = torch.rand(instances, 4, generator=generator) * 1.4 - 0.2
    boxes[:, 2:] = boxes[:, :2] + torch.rand(instances, 2, generator=generator) * 0.8 + 0.01
    boxes *= torch.tensor([width, height, width, height])
    cells = integer(generator, 1, 29)
    masks = torch.rand(instances, cells, cells, generator=generator) * 0.6 + 0.3
    scores = (torch.rand(instances, generator=generator) * 5).round() / 5
    labels = torch.randint(0, 9, (instances,), generator=generator)
    blocks = torch.randint(0, 9, (height // 7 + 1, width // 7 + 1), generator=generator)
    blocks = blocks.to(dtype).repeat_interleave(7, 0).repeat_interleave(7, 1)
    return masks, boxes, scores, labels, blocks[:height, :width]


def make_parameters(generator):
    return {
        "stuff_classes": [5, 1, 2],
        "stuff_area": integer(generator, 0, 300),
        "overlap_threshold": integer(generator, 0, 11) / 10,
        "score_threshold": integer(generator, 0, 4) / 5,
    }


def run(device, masks, scores, labels, semantic, *, boxes=None, **parameters):
    """The operator of the device on one image."""
    tensors = [masks, boxes, scores, labels, semantic]
    tensors = [None if tensor is None else tensor[None].to(device.name) for tensor in tensors]
    map, table = device.ops.panoptic_merge(
        *tensors,
        *(parameters[key] for key in ("stuff_classes", "score_threshold", "overlap_threshold")),
        parameters["stuff_area"],
        0.5,
    )
    return PanopticMaps(map[0].cpu(), table[0].cpu(), scores)


def listed(merged):
    return [(item.id, item.label, item.area) for item in merged.segments()[0].items]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_against_reference(generator, dtype):
    for _ in range(25):
        height, width = integer(generator, 1, 300), integer(generator, 1, 400)
        instances = integer(generator, 0, 12)
        masks, boxes, scores, labels, semantic = make_scene(
            generator, height, width, instances, dtype
        )
        parameters = make_parameters(generator)
        pasted = paste(masks, boxes, (height, width))
        expected, segments = reference(pasted, scores, labels, semantic, **parameters)
        merged = panoptic_merge(pasted, scores, labels, semantic, **parameters)
        assert merged.map.dtype == torch.int32
        assert torch.equal(merged.map, expected)
        assert listed(merged) == segments
        fused = panoptic_merge(masks, scores, labels, semantic, boxes=boxes, **parameters)
        # A pixel whose probability is 0.5 but for rounding may turn over, and an instance with it.
        if (fused.map != expected).any():
            near = (paste(masks - 1e-5, boxes, (height, width)) != pasted) | (
                paste(masks + 1e-5, boxes, (height, width)) != pasted
            )
            assert near.any(), "differs without a probability near 0.5"
        for result in (merged, fused):
            areas = torch.bincount(result.map.flatten())
            assert all(areas[item.id] == item.area for item in result.segments()[0].items)


def test_small_kernel_against_reference(device, generator):
    for dtype in INTEGERS:
        height, width = integer(generator, 1, 40), integer(generator, 1, 80)
        masks, boxes, scores, labels, semantic = make_scene(generator, height, width, 7, dtype)
        parameters = make_parameters(generator)
        pasted = paste(masks, boxes, (height, width))
        expected, segments = reference(pasted, scores, labels, semantic, **parameters)
        merged = run(device, pasted, scores, labels, semantic, **parameters)
        assert torch.equal(merged.map, expected)
        assert listed(merged) == segments
        fused = run(device, masks, scores, labels, semantic, boxes=boxes, **parameters)
        ours = panoptic_merge(masks, scores, labels, semantic, boxes=boxes, **parameters)
        if device.name == "cpu":  # a GPU contracts products and sums
            assert torch.equal(fused.map, ours.map)
            assert torch.equal(fused.table, ours.table)


def test_batch_equals_its_images(device, generator):
    scenes = [make_scene(generator, 33, 70, 5) for _ in range(3)]
    parameters = make_parameters(generator)
    masks = [paste(scene[0], scene[1], (33, 70)) for scene in scenes]
    scores, labels, semantic = (torch.stack(part) for part in list(zip(*scenes, strict=True))[2:])
    together = panoptic_merge(torch.stack(masks), scores, labels, semantic, **parameters)
    assert together.map.shape == (3, 33, 70)
    for n, segments in enumerate(together.segments()):
        alone = panoptic_merge(masks[n], scores[n], labels[n], semantic[n], **parameters)
        assert torch.equal(segments.map, alone.map)
        assert segments.items == alone.segments()[0].items
    map, table = device.ops.panoptic_merge(
        *(t.to(device.name) for t in [torch.stack(masks)]),
        None,
        *(t.to(device.name) for t in (scores, labels, semantic)),
        *(parameters[k] for k in ("stuff_classes", "score_threshold", "overlap_threshold")),
        parameters["stuff_area"],
        0.5,
    )
    assert torch.equal(map.cpu(), together.map) and torch.equal(table.cpu(), together.table)


def decode(rle):
    """A COCO run-length encoding, by its published definition: base 48, 5 bits, deltas of 2 ago."""
    height, width = rle["size"]
    runs, text, at = [], rle["counts"], 0
    while at < len(text):
        value = shift = 0
        more = True
        while more:
            code = ord(text[at]) - 48
            value |= (code & 31) << shift
            more, shift, at = bool(code & 32), shift + 5, at + 1
        if code & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return torch.from_numpy(flat.reshape(width, height).T.copy())


def test_panopticapi_output(data_folder):
    """What panopticapi's merger made of the same instances and semantic masks, pixel for pixel."""
    sample = data_folder("panoptic/coco_sample")
    instances = json.loads((sample / "merge_inputs/instances_results.json").read_text())
    stuff = json.loads((sample / "merge_inputs/semantic_results.json").read_text())
    merged = json.loads((sample / "predictions/merged.json").read_text())["annotations"]
    assert merged
    for image in merged:
        own = [entry for entry in instances if entry["image_id"] == image["image_id"]]
        regions = [entry for entry in stuff if entry["image_id"] == image["image_id"]]
        masks = torch.stack([decode(entry["segmentation"]) for entry in own])
        semantic = torch.zeros(masks.shape[1:], dtype=torch.uint8)
        for entry in reversed(regions):  # they overlap, and the first one wins
            semantic[decode(entry["segmentation"])] = entry["category_id"]
        result = panoptic_merge(
            masks,
            torch.tensor([entry["score"] for entry in own]),
            torch.tensor([entry["category_id"] for entry in own]),
            semantic,
            stuff_classes=[entry["category_id"] for entry in regions],
        )
        encoded = panoptic_merge(
            [entry["segmentation"] for entry in own],
            torch.tensor([entry["score"] for entry in own]),
            torch.tensor([entry["category_id"] for entry in own]),
            semantic,
            stuff_classes=[entry["category_id"] for entry in regions],
        )
        assert torch.equal(encoded.map, result.map) and torch.equal(encoded.table, result.table)
        png = np.array(Image.open(sample / "predictions/merged" / image["file_name"])).astype(int)
        theirs = torch.from_numpy(png @ [1, 256, 65536])
        ids = torch.tensor([0] + [entry["id"] for entry in image["segments_info"]])
        assert torch.equal(ids[result.map.long()], theirs)
        labels = [item.label for item in result.segments()[0].items]
        assert labels == [entry["category_id"] for entry in image["segments_info"]]


def test_order_and_thresholds():
    """A case by hand: ties, the overlap limit, the stuff limit, the order of stuff."""
    masks = torch.zeros(4, 4, 8, dtype=torch.bool)
    masks[0, :2, :4] = True  # 8 pixels
    masks[1, :2, 2:6] = True  # 8, of which 4 are shared with 0
    masks[2, :2, :] = True  # 16, of which 12 are covered by then
    masks[3] = True  # below the threshold
    scores = torch.tensor([0.8, 0.8, 0.7, 0.4])
    labels = torch.tensor([7, 7, 9, 9])
    semantic = torch.zeros(4, 8, dtype=torch.uint8)
    semantic[2:] = 3
    semantic[3, 5:] = 255
    merged = panoptic_merge(masks, scores, labels, semantic, stuff_classes=[3, 0], stuff_area=5)
    assert merged.map.tolist() == [
        [1, 1, 1, 1, 2, 2, 0, 0],
        [1, 1, 1, 1, 2, 2, 0, 0],  # stuff 0 has 4 free pixels: too few
        [3, 3, 3, 3, 3, 3, 3, 3],
        [3, 3, 3, 3, 3, 0, 0, 0],
    ]
    segments = merged.segments()[0]
    assert [(s.id, s.label, s.area) for s in segments.items] == [(1, 7, 8), (2, 7, 4), (3, 3, 13)]
    assert segments.items[1].score == pytest.approx(0.8)
    assert merged.table[:, 3].tolist()[:3] == [0, 1, -1]
    assert merged.table[3:].eq(0).all()


def test_more_than_255_instances(device):
    masks = torch.eye(300, dtype=torch.bool).reshape(300, 15, 20)
    scores = torch.linspace(1.0, 0.6, 300)
    labels = torch.arange(300)
    semantic = torch.zeros(15, 20, dtype=torch.int64)
    parameters = {
        "stuff_classes": [0],
        "score_threshold": 0.5,
        "overlap_threshold": 0.5,
        "stuff_area": 1,
    }
    for merged in (
        panoptic_merge(masks, scores, labels, semantic, **parameters),
        run(device, masks, scores, labels, semantic, **parameters),
    ):
        assert torch.equal(merged.map.flatten(), torch.arange(1, 301, dtype=torch.int32))
        assert len(merged.segments()[0].items) == 300


def test_nothing_to_merge(device):
    parameters = {"stuff_classes": [1], "score_threshold": 0.5, "overlap_threshold": 0.5}
    none = torch.zeros(0, 6, 7, dtype=torch.bool), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    ones = torch.ones(6, 7, dtype=torch.uint8)
    void = torch.full((6, 7), 255, dtype=torch.uint8)
    empty_mask = none[0].new_zeros(2, 6, 7), torch.tensor([0.9, torch.nan]), torch.tensor([1, 2])
    for ours in (
        lambda *a: panoptic_merge(*a, **parameters, stuff_area=4),
        lambda *a: run(device, *a, **parameters, stuff_area=4),
    ):
        assert ours(*none, ones).map.eq(1).all()
        assert ours(*none, void).map.eq(0).all() and not ours(*none, void).segments()[0].items
        assert listed(ours(*empty_mask, ones)) == [(1, 1, 42)]
        assert ours(*(t[..., :0] if t.ndim == 3 else t for t in none), ones[:, :0]).map.numel() == 0


def test_strange_boxes(device):
    """NaN, inverted, empty, far outside and huge boxes neither crash nor leave a mark."""
    nan, huge = torch.nan, 3e38
    boxes = torch.tensor(
        [
            [nan, 0, 5, 5],
            [0, 0, nan, 5],
            [5, 5, 2, 2],
            [3, 3, 3, 9],
            [100, 100, 200, 200],
            [-90, -90, -50, -50],
            [-huge, -huge, huge, huge],
            [torch.inf, 0, torch.inf, 5],
            [2, 1, 6, 4],
        ]
    )
    masks = torch.ones(len(boxes), 28, 28)
    semantic = torch.zeros(8, 9, dtype=torch.uint8)
    parameters = {"stuff_classes": [0], "score_threshold": 0.5, "overlap_threshold": 1.0}
    scores, labels = torch.full((9,), 0.9), torch.arange(9)
    for ours in (
        panoptic_merge(masks, scores, labels, semantic, boxes=boxes, stuff_area=1, **parameters),
        run(device, masks, scores, labels, semantic, boxes=boxes, stuff_area=1, **parameters),
    ):
        assert {item.label for item in ours.segments()[0].items} <= {0, 6, 8}
        assert (ours.map[1:4, 2:6] > 0).all()


def test_threads_do_not_change_the_result(generator):
    masks, boxes, scores, labels, semantic = make_scene(generator, 400, 500, 20)
    parameters = make_parameters(generator)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(
                panoptic_merge(masks, scores, labels, semantic, boxes=boxes, **parameters)
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0].map, other.map) for other in results[1:])


def test_strided_inputs(generator):
    masks, boxes, scores, labels, semantic = make_scene(generator, 60, 50, 6)
    parameters = make_parameters(generator)
    pasted = paste(masks, boxes, (60, 50))
    expected = panoptic_merge(pasted, scores, labels, semantic, **parameters)
    strided = panoptic_merge(
        pasted.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([scores, scores], 1)[:, 0],
        torch.stack([labels, labels], 1)[:, 0],
        semantic.T.contiguous().T,
        **parameters,
    )
    assert torch.equal(strided.map, expected.map)


def test_run_lengths_equal_masks(generator):
    """Compressed ones and lists of runs, and none at all."""
    masks, boxes, scores, labels, semantic = make_scene(generator, 37, 53, 9)
    masks = paste(masks, boxes, semantic.shape)
    parameters = make_parameters(generator)
    expected = panoptic_merge(masks, scores, labels, semantic, **parameters)
    rles = [encode_rle(mask) for mask in masks]
    for k in range(0, 9, 2):
        flat = masks[k].T.flatten().int()
        changes = torch.cat([torch.tensor([0]), flat, torch.tensor([2])]).diff().nonzero()[:, 0]
        rles[k]["counts"] = changes.diff(prepend=torch.tensor([0])).tolist()
    merged = panoptic_merge(rles, scores, labels, semantic, **parameters)
    assert torch.equal(merged.map, expected.map) and torch.equal(merged.table, expected.table)
    none = panoptic_merge([], scores[:0], labels[:0], semantic, **parameters)
    assert (none.table[:, 3] < 0).sum() == (none.table[:, 0] > 0).sum()
    with pytest.raises(
        ValueError, match=r"masks\[0\] is of size \[37, 53\], semantic of \[37, 52\]"
    ):
        panoptic_merge(rles, scores, labels, semantic[:, 1:], **parameters)
    with pytest.raises(ValueError, match="cover the image: leave boxes out"):
        panoptic_merge(rles, scores, labels, semantic, boxes=boxes, **parameters)
    with pytest.raises(ValueError, match=r"run-length dicts .* masks\[0\] is a str"):
        panoptic_merge(["abc"], scores[:1], labels[:1], semantic, **parameters)
    rles[1]["counts"] = [3]
    with pytest.raises(ImageError, match="runs of the RLE mask add up to 3 pixels"):
        panoptic_merge(rles, scores, labels, semantic, **parameters)


MASKS = torch.zeros(2, 4, 5, dtype=torch.bool)
GOOD = MASKS, torch.ones(2), torch.zeros(2, dtype=torch.int64), torch.zeros(4, 5, dtype=torch.uint8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: MASKS[0]}, r"masks must be \[K, H, W\].*got \[4, 5\]"),
        ({0: MASKS.float()}, "masks must be bool, got torch.float32; use masks > 0.5"),
        ({0: MASKS[:, :3]}, "masks .* differ in size from semantic"),
        ({1: torch.ones(3)}, r"scores must be \[2\] with masks .*got \[3\]"),
        ({1: torch.ones(2).long()}, "scores must be floating point, got torch.int64"),
        ({2: torch.zeros(1).long()}, r"labels must be \[2\]"),
        ({2: torch.zeros(2)}, "labels must be integers, got torch.float32"),
        ({3: torch.zeros(4, 5)}, "semantic must be integers, got torch.float32"),
        ({3: torch.zeros(4, 5, dtype=torch.uint16)}, "semantic must be uint8, .* got torch.uint16"),
        ({3: torch.zeros(4, 5, dtype=torch.int8)}, "semantic must be uint8, .* got torch.int8"),
        ({3: torch.zeros(4, 5, device="meta").byte()}, "masks are on cpu, semantic on meta"),
        ({"stuff_classes": [1, 1]}, "stuff_classes must be different"),
        ({"stuff_classes": [-1]}, r"stuff_classes must be .*got \[-1\]"),
        ({"stuff_classes": range(600)}, "at most 512 stuff_classes are possible, got 600"),
        ({"boxes": torch.zeros(2, 4)}, "with boxes, masks must be .* floating point"),
        ({"boxes": torch.zeros(3, 4)}, r"boxes must be \[2, 4\]"),
    ],
)
def test_bad_arguments(change, message):
    positional = [change.get(i, value) for i, value in enumerate(GOOD)]
    named = {key: value for key, value in change.items() if isinstance(key, str)}
    with pytest.raises(ValueError, match=message):
        panoptic_merge(*positional, **{"stuff_classes": [0], **named})


def test_opcheck(generator):
    masks, boxes, scores, labels, semantic = make_scene(generator, 20, 30, 3)
    batch = [tensor[None] for tensor in (masks, boxes, scores, labels, semantic)]
    arguments = (*batch, [1, 2], 0.5, 0.5, 10, 0.5)
    torch.library.opcheck(torch.ops.pyseg.panoptic_merge.default, arguments)


def test_compile(compiler, generator):
    masks, boxes, scores, labels, semantic = make_scene(generator, 40, 30, 5)

    def merge(masks, boxes, scores, labels, semantic):
        return panoptic_merge(
            masks, scores, labels, semantic, boxes=boxes, stuff_classes=[1, 2], stuff_area=9
        ).map

    compiled = compiler(merge)
    expected = merge(masks, boxes, scores, labels, semantic)
    assert torch.equal(compiled(masks, boxes, scores, labels, semantic), expected)
