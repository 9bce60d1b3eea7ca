"""panoptic_quality against a mask per segment, which shares no code with the kernels."""

import pytest
import torch
from torch.nn.functional import interpolate

from pyseg.ops import boundary_mask, panoptic_quality
from pyseg.ops.panoptic_quality import FRACTION_BITS, PROBLEMS, reference

CLASSES = 3


def blobs(generator, segments, size):
    """A map with up to so many segments, of which one id is void."""
    coarse = torch.randn(1, segments + 1, 4, 5, generator=generator)
    return interpolate(coarse, size, mode="bicubic").argmax(1)[0].int()


def listed(ids, generator, crowds=0.0):
    """Segments of a map, in random order, with classes that follow from the id."""
    found = ids.unique()
    found = found[found > 0].long()
    found = found[torch.randperm(len(found), generator=generator)]
    area = torch.stack([(ids == k).sum() for k in found]) if len(found) else found
    crowd = torch.rand(len(found), generator=generator) < crowds
    kind = crowd * torch.randint(1, 3, crowd.shape, generator=generator)
    return torch.stack([found, found % CLASSES, area, kind], 1)


def image(generator, segments=9, size=(60, 80), crowds=0.3, scale=1):
    """(prediction, target, segments of both): alike in two thirds of the pixels."""
    prediction = blobs(generator, segments, size)
    other = blobs(generator, segments, size)
    target = torch.where(blobs(generator, 2, size) > 0, prediction, other)
    prediction, target = prediction * scale, target * scale
    return (
        prediction,
        target,
        listed(prediction, generator)[:, :2],
        listed(target, generator, crowds),
    )


def as_fractions(counts):
    result = counts.cpu().double()
    result[:, 3] /= 2**FRACTION_BITS
    return result


def by_id(segments):
    return segments[segments[:, 0].argsort()]


def run(device, prediction, target, prediction_segments, target_segments, *boundaries):
    """The operator itself, on the device of the fixture."""
    boundaries = [mask.to(device.name) for mask in boundaries] or [None, None]
    return device.ops.panoptic_quality(
        prediction.to(device.name),
        target.to(device.name),
        by_id(prediction_segments),
        by_id(target_segments),
        CLASSES,
        *boundaries,
    )


@pytest.mark.parametrize("size", [(60, 80), (1, 1), (7, 130), (33, 1)])
def test_against_masks(generator, size):
    for scale in (1, 65537, 2**31 // 12):
        case = image(generator, size=size, scale=scale)
        expected = reference(*case, CLASSES)
        counts, problems = panoptic_quality(*case, CLASSES)
        torch.testing.assert_close(as_fractions(counts), expected, rtol=0, atol=1e-11)
        assert not problems.any()
        assert counts[:, :3].sum() > 0 or size != (60, 80)


@pytest.mark.parametrize("segments", [3, 150])
def test_small_kernel_against_masks(device, generator, segments):
    case = image(generator, segments=segments, size=(37, 90))
    counts, problems = run(device, *case)
    torch.testing.assert_close(as_fractions(counts), reference(*case, CLASSES), rtol=0, atol=1e-11)
    assert not problems.any()


def boundary_reference(prediction, target, prediction_segments, target_segments, distance):
    """Sum of IoUs and true positives per class, of boundaries eroded segment by segment."""

    def edge(mask):
        inside = torch.nn.functional.pad(mask[None].float(), [distance] * 4)
        inside = -torch.nn.functional.max_pool2d(-inside, 2 * distance + 1, 1)
        return mask & (inside[0] == 0)

    def iou(p, t, void):
        return (p & t).sum().item() / ((p & ~void) | t).sum().item()

    expected = torch.zeros(CLASSES, 2, dtype=torch.float64)
    void = target == 0
    for t_id, label, _, crowd in target_segments.tolist():
        for p_id, p_label in prediction_segments.tolist():
            p, t = prediction == p_id, target == t_id
            if label == p_label and not crowd:
                both = min(iou(p, t, void), iou(edge(p), edge(t), void))
                expected[label] += torch.tensor([1, both], dtype=torch.float64) * (both > 0.5)
    return expected


def test_boundary_against_masks(device, generator):
    case = image(generator, segments=5, crowds=0.2)
    masks = [boundary_mask(ids[None], 2)[0] for ids in case[:2]]
    expected = boundary_reference(*case, 2)
    names = ("prediction_boundary", "target_boundary")
    ours = panoptic_quality(*case, CLASSES, **dict(zip(names, masks, strict=True)))
    for counts, problems in (ours, run(device, *case, *masks)):
        torch.testing.assert_close(as_fractions(counts)[:, [0, 3]], expected, rtol=0, atol=1e-11)
        assert not problems.any()


@pytest.mark.parametrize("level", ["generic", "v3", "v4"])
def test_any_byte_but_zero_is_true(generator, monkeypatch, level):
    """torch's own bools are 0 and 1, but those of `mask.view(torch.bool)` are what they were."""
    monkeypatch.setenv("PYSEG_SIMD", level)
    case = image(generator, size=(31, 43), segments=5, crowds=0.2)
    masks = [boundary_mask(ids[None], 2)[0] for ids in case[:2]]
    names = ("prediction_boundary", "target_boundary")
    expected = panoptic_quality(*case, CLASSES, **dict(zip(names, masks, strict=True)))
    for value in (2, 128, 255):
        odd = [(mask.byte() * value).view(torch.bool) for mask in masks]
        got = panoptic_quality(*case, CLASSES, **dict(zip(names, odd, strict=True)))
        assert torch.equal(got.counts, expected.counts)


def test_cpu_and_kernel_give_the_same_bits(device, generator):
    for crowds in (0.0, 0.5):
        case = image(generator, segments=20, crowds=crowds)
        masks = [boundary_mask(ids[None], 3)[0] for ids in case[:2]]
        for boundaries in ([], masks):
            names = ("prediction_boundary", "target_boundary")[: len(boundaries)]
            ours = panoptic_quality(*case, CLASSES, **dict(zip(names, boundaries, strict=True)))
            for got, want in zip(run(device, *case, *boundaries), ours, strict=True):
                assert torch.equal(got.cpu(), want)


def test_threads_do_not_change_a_bit(generator):
    case = image(generator, size=(700, 900))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(panoptic_quality(*case, CLASSES).counts)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("scale", [1, 1000003])  # ids looked up in an array, and by hash
@pytest.mark.parametrize("level", ["v4", "v3", "generic"])
def test_every_instruction_set_counts_noise_and_flat_parts(generator, monkeypatch, level, scale):
    monkeypatch.setenv("PYSEG_SIMD", level)
    prediction, target, *_ = image(generator, size=(67, 131))
    # Noise in some rows: more changes than listing them is worth, and a few in flat rows.
    noise = (
        torch.rand(67, 131, generator=generator)
        < torch.tensor([0.0, 0.02, 1.0])[torch.arange(67)[:, None] // 16 % 3]
    )
    ids = torch.randint(0, 10, (2, 67, 131), generator=generator, dtype=torch.int32)
    prediction = torch.where(noise, ids[0], prediction) * scale
    target = torch.where(noise, ids[1], target) * scale
    case = prediction, target, listed(prediction, generator)[:, :2], listed(target, generator, 0.2)
    counts, _ = panoptic_quality(*case, CLASSES)
    torch.testing.assert_close(as_fractions(counts), reference(*case, CLASSES), rtol=0, atol=1e-11)
    masks = [boundary_mask(side[None], 2)[0] for side in (prediction, target)]
    counts, _ = panoptic_quality(
        *case, CLASSES, prediction_boundary=masks[0], target_boundary=masks[1]
    )
    expected = boundary_reference(*case, 2)
    torch.testing.assert_close(as_fractions(counts)[:, [0, 3]], expected, rtol=0, atol=1e-11)


def test_half_is_no_match_and_more_than_half_is(device):
    """IoU must exceed 0.5: 2 of 4 pixels do not match, 3 of 5 do."""
    for overlap, union, matches in ((2, 4, 0), (3, 5, 1)):
        target = torch.zeros(1, 8, dtype=torch.int32) + 2
        prediction = target.clone()
        target[0, : (union + overlap) // 2] = 1
        prediction[0, (union - overlap) // 2 : union] = 1
        assert int(((target == 1) | (prediction == 1)).sum()) == union
        segments = torch.tensor([[1, 0], [2, 1]])
        area = torch.tensor([int((target == k).sum()) for k in (1, 2)])
        full = torch.cat([segments, area[:, None], torch.zeros(2, 1, dtype=torch.int64)], 1)
        for counts, _ in (
            panoptic_quality(prediction, target, segments, full, CLASSES),
            run(device, prediction, target, segments, full),
        ):
            assert counts[0, :3].tolist() == [matches, 1 - matches, 1 - matches]


def test_void_and_crowds(device):
    """Rules of panopticapi, by hand. Row by row of ten pixels:

    0: target 1 (class 0); predicted 1 on 6 of them, void on the rest: IoU 0.6.
    1: void; predicted 2: more than half void, no false positive.
    2: half void, half of target 3 (class 1); predicted 3 (class 0): half is not more: a false
       positive, and target 3 is missed.
    3: crowd 4 of class 2; predicted 4 of class 2: excused.
    4: crowd 5 of class 2 that excuses nothing; predicted 5 of class 2: a false positive.
    5: crowd 6 of class 1; predicted 6 of class 2: another class, a false positive.
    """
    target = torch.zeros(6, 10, dtype=torch.int32)
    target[0], target[2, :5], target[3], target[4], target[5] = 1, 3, 4, 5, 6
    prediction = torch.arange(1, 7, dtype=torch.int32)[:, None].repeat(1, 10)
    prediction[0, 6:] = 0
    segments = torch.tensor([[1, 0], [2, 0], [3, 0], [4, 2], [5, 2], [6, 2]])
    full = torch.tensor([[1, 0, 10, 0], [3, 1, 5, 0], [4, 2, 10, 1], [5, 2, 10, 2], [6, 1, 10, 1]])
    for counts, problems in (
        panoptic_quality(prediction, target, segments, full, CLASSES),
        run(device, prediction, target, segments, full),
    ):
        assert counts[:, :3].tolist() == [[1, 1, 0], [0, 0, 1], [0, 2, 0]]
        assert counts[:, 3].tolist() == [round(0.6 * 2**FRACTION_BITS), 0, 0]
        assert not problems.any()


def test_the_listed_area_is_trusted(device):
    ids = torch.ones(4, 5, dtype=torch.int32)
    segments = torch.tensor([[1, 0]])
    for area, expected in ((20, 1.0), (25, 0.8), (50, 0.0)):
        full = torch.tensor([[1, 0, area, 0]])
        for counts, problems in (
            panoptic_quality(ids, ids, segments, full, CLASSES),
            run(device, ids, ids, segments, full),
        ):
            assert counts[0, 3] == round(expected * 2**FRACTION_BITS)
            assert problems.tolist() == [0, 0, 0, 0, int(area != 20), 0]


def test_perfect_is_exactly_one(generator):
    ids = blobs(generator, 12, (90, 70))
    full = listed(ids, generator)
    counts, _ = panoptic_quality(ids, ids, full[:, :2], full, CLASSES)
    assert counts[:, 3].tolist() == (counts[:, 0] << FRACTION_BITS).tolist()
    assert counts[:, 1:3].sum() == 0 and counts[:, 0].sum() == len(full)


def test_nothing_predicted_and_nothing_there(device):
    none, no_truth = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64)
    void, ids = torch.zeros(3, 4, dtype=torch.int32), torch.ones(3, 4, dtype=torch.int32)
    one, truth = torch.tensor([[1, 2]]), torch.tensor([[1, 2, 12, 0]])
    for case, expected in (
        ((void, ids, none, truth), [0, 0, 1, 0]),
        ((ids, void, one, no_truth), [0, 0, 0, 0]),  # all void: no false positive
        ((void, void, none, no_truth), [0, 0, 0, 0]),
        ((void[:0], void[:0], none, no_truth), [0, 0, 0, 0]),
    ):
        for counts, problems in (panoptic_quality(*case, CLASSES), run(device, *case)):
            assert counts[2].tolist() == expected and not counts[:2].any()
            assert not problems.any()


def test_not_contiguous(generator):
    prediction, target, segments, full = image(generator)
    expected = panoptic_quality(prediction, target, segments, full, CLASSES)
    flipped = prediction.t().contiguous().t(), target.repeat_interleave(2, 1)[:, ::2]
    got = panoptic_quality(*flipped, segments, full, CLASSES)
    assert torch.equal(got.counts, expected.counts)


def test_problems_are_counted_on_the_device(device):
    prediction = torch.tensor([[1, 1, 7, 0, -4]], dtype=torch.int32)
    target = torch.tensor([[1, 1, 2, 2, 9]], dtype=torch.int32)
    segments = torch.tensor([[1, 0], [3, 0]])
    full = torch.tensor([[1, 0, 1, 0], [2, 1, 2, 0], [4, 1, 3, 0]])
    _, problems = run(device, prediction, target, segments, full)
    assert len(problems) == len(PROBLEMS)
    # 7 and -4 unlisted; 9 unlisted; 3 absent; 4 absent; areas of 1 and 4 differ; 1 too small
    assert problems.tolist() == [2, 1, 1, 1, 2, 1]


IDS = torch.tensor([[1, 2]], dtype=torch.int32)
LISTED = torch.tensor([[1, 0], [2, 1]])
FULL = torch.tensor([[1, 0, 1, 0], [2, 1, 1, 0]])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prediction": IDS.long()}, r"prediction must hold int32.*int64; use prediction.int"),
        ({"target": IDS[0]}, r"\[H, W\], got \[1, 2\] and \[2\]"),
        (
            {"prediction": torch.tensor([[1, 5]], dtype=torch.int32)},
            "map of the prediction has ids that are not listed: 5; the list of the prediction's "
            "segments has ids without pixels: 2",
        ),
        ({"target": torch.tensor([[-1, 2]], dtype=torch.int32)}, "target has ids .* listed: -1"),
        ({"prediction_segments": LISTED[:, :1]}, r"prediction_segments must be \[K, 2\] int64"),
        ({"prediction_segments": LISTED.int()}, r"must be \[K, 2\] int64 .*int32"),
        ({"prediction_segments": LISTED[[0, 0]]}, "prediction_segments lists the id 1 twice"),
        ({"prediction_segments": LISTED - 1}, "lists the id 0; ids are 1 to"),
        ({"prediction_segments": LISTED + 2**31}, "lists the id 2147483649"),
        ({"target_segments": FULL + torch.tensor([0, 2, 0, 0])}, "has class 3; there are 3"),
        ({"target_segments": FULL * torch.tensor([1, 1, 0, 1])}, "segment 1 an area below 1"),
        (
            {
                "target": torch.ones(1, 2, dtype=torch.int32),
                "prediction": torch.ones(1, 2, dtype=torch.int32),
                "prediction_segments": LISTED[:1],
                "target_segments": FULL[:1],
            },
            "1 pairs whose",
        ),
        ({"prediction_boundary": IDS > 0}, "both prediction_boundary and target_boundary"),
        ({"prediction_boundary": IDS > 0, "target_boundary": IDS}, "target_boundary must be bool"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "prediction": IDS,
        "target": IDS,
        "prediction_segments": LISTED,
        "target_segments": FULL,
    }
    panoptic_quality(**arguments, num_classes=CLASSES)
    with pytest.raises(ValueError, match=message):
        panoptic_quality(**{**arguments, **change}, num_classes=CLASSES)


def test_opcheck(generator):
    prediction, target, segments, full = image(generator)
    arguments = (prediction, target, by_id(segments), by_id(full), CLASSES)
    for boundaries in ((None, None), (prediction > 1, target > 1)):
        torch.library.opcheck(torch.ops.pyseg.panoptic_quality.default, arguments + boundaries)
