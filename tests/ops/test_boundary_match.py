"""boundary_match against distance transforms, and against all pairs of pixels."""

import pytest
import torch
from torch.nn.functional import interpolate

from pyseg.ops import boundary_match
from pyseg.ops.boundary_match import contours, reference
from pyseg.ops.confusion_matrix import INTEGERS

CLASSES = 5


def blobs(generator, size, images=2):
    coarse = torch.randn(images, CLASSES, 4, 5, generator=generator)
    return interpolate(coarse, size, mode="bicubic").argmax(1)


def make_case(generator, size, kind="blobs"):
    """(prediction, target): alike in most places, with void in both."""
    if kind == "noise":
        prediction, target = torch.randint(0, CLASSES, (2, 2, *size), generator=generator)
    else:
        target = blobs(generator, size)
        prediction = torch.where(blobs(generator, size) == 0, blobs(generator, size), target)
    for labels in (prediction, target):
        labels[blobs(generator, size) == 1] = 255
    return prediction.to(torch.uint8), target.to(torch.uint8)


def run(device, prediction, target, radius, classes=CLASSES, ignore=255):
    return device.ops.boundary_match(
        prediction.to(device.name), target.to(device.name), classes, int(radius * radius), ignore
    )


@pytest.mark.parametrize("size", [(5, 40), (40, 5), (1, 30), (23, 27)])
@pytest.mark.parametrize("radius", [17, 30, 100, 4095])
@pytest.mark.parametrize("classes", [CLASSES, 300])
def test_radius_beyond_the_image(generator, size, radius, classes):
    prediction, target = (labels.short() for labels in make_case(generator, size))
    target[:, : size[0] // 2] = 0  # classes whose contours lie in few rows
    counts = boundary_match(prediction, target, classes, radius).counts
    assert torch.equal(counts, reference(prediction, target, classes, radius))


def all_pairs(prediction, target, radius):
    """Distances between all contour pixels of a class, without any transform."""
    prediction = torch.where(target == 255, 255, prediction)
    counts = torch.zeros(len(target), CLASSES, 4, dtype=torch.int64)
    for n in range(len(target)):
        for k in range(CLASSES):
            p, t = (
                ((labels[n] == k) & contours(labels[n])).nonzero().double()
                for labels in (prediction, target)
            )
            near = torch.cdist(p, t) <= radius
            counts[n, k] = torch.tensor(
                [len(p), int(near.any(1).sum()), len(t), int(near.any(0).sum())]
            )
    return counts


@pytest.mark.parametrize("size", [(40, 70), (1, 1), (1, 30), (23, 3)])
@pytest.mark.parametrize("radius", [0, 1, 2.5, 11.3])
def test_small_against_all_pairs(device, generator, size, radius):
    for kind in ("blobs", "noise"):
        prediction, target = make_case(generator, size, kind)
        expected = all_pairs(prediction, target, radius)
        counts, invalid = boundary_match(prediction, target, CLASSES, radius)
        assert torch.equal(counts, expected)
        got, device_invalid = run(device, prediction, target, radius)
        assert torch.equal(got.cpu(), expected)
        assert not invalid.any() and not device_invalid.any()
        assert expected.sum() > 0 or size != (40, 70)


@pytest.mark.parametrize("radius", [2.5, 17.2])
def test_against_distance_transforms(generator, radius):
    pytest.importorskip("scipy")
    prediction, target = make_case(generator, (190, 260))
    counts = boundary_match(prediction, target, CLASSES, radius).counts
    assert torch.equal(counts, reference(prediction, target, CLASSES, radius))
    all_, matched = counts[..., ::2], counts[..., 1::2]
    assert (matched <= all_).all() and 0 < matched.sum() < all_.sum()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_dtypes_and_layouts(device, generator, dtype):
    prediction, target = make_case(generator, (30, 50))
    expected = boundary_match(prediction, target, CLASSES, 3).counts
    moved = [
        torch.where(labels == 255, 100, labels)
        .to(dtype)
        .transpose(1, 2)
        .contiguous()
        .transpose(1, 2)
        for labels in (prediction, target)
    ]
    assert torch.equal(boundary_match(*moved, CLASSES, 3, 100).counts, expected)
    assert torch.equal(run(device, *moved, 3, ignore=100)[0].cpu(), expected)


@pytest.mark.parametrize("classes", [253, 254, 300, 4096])
def test_many_classes(device, generator, classes):
    """The widest codes of each width; counts that do not fit shared memory."""
    target = blobs(generator, (30, 40), 1) * (classes // CLASSES) + classes % CLASSES
    target[target >= 4] += classes - 1 - target.max()
    target[0, :4, :9] = -1
    prediction = torch.roll(target, 2, 2)
    expected = reference(prediction, target, classes, 2, -1) if classes < 400 else None
    counts = boundary_match(prediction, target, classes, 2, -1).counts
    assert counts[0, classes - 1].sum() > 0
    assert expected is None or torch.equal(counts, expected)
    assert torch.equal(run(device, prediction, target, 2, classes, -1)[0].cpu(), counts)


def test_ignored_pixels_do_not_matter(device, generator):
    prediction, target = make_case(generator, (40, 60))
    other = torch.where(target == 255, 1, prediction)
    for match in (
        lambda p: boundary_match(p, target, CLASSES, 3).counts,
        lambda p: run(device, p, target, 3)[0],
    ):
        assert torch.equal(match(prediction), match(other))


def test_threads_do_not_change_a_bit(generator):
    case = make_case(generator, (500, 700))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(boundary_match(*case, CLASSES, 4).counts)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_labels_out_of_range(device, generator):
    prediction, target = make_case(generator, (20, 30))
    target[1, 3, 4], target[0, 2, 2] = 7, 0
    prediction[0, 2, 2] = 5
    with pytest.raises(
        ValueError,
        match=r"target holds .*: 7 \(1 pixels, the first at image 1, "
        "row 3, column 4",
    ):
        boundary_match(prediction, target, CLASSES, 2)
    assert run(device, prediction, target, 2)[1].tolist() == [[1, 0], [0, 1]]
    target[1, 3, 4] = 0
    with pytest.raises(ValueError, match=r"prediction holds .*: 5 .*; likely cause: .*1-based"):
        boundary_match(prediction, target, CLASSES, 2)


def test_empty(device):
    for shape in ((0, 4, 5), (2, 0, 5), (2, 4, 0)):
        labels = torch.zeros(shape, dtype=torch.uint8)
        for counts, invalid in (
            boundary_match(labels, labels, 3, 2),
            run(device, labels, labels, 2, 3),
        ):
            assert counts.shape == (shape[0], 3, 4) and counts.sum() == 0
            assert invalid.shape == (shape[0], 2)


LABELS = torch.zeros(1, 4, 5, dtype=torch.uint8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((LABELS.float(), LABELS, 2, 1), "prediction must hold integer labels, got torch.float32"),
        ((LABELS, LABELS[0], 2, 1), r"both be \[N, H, W\], got \[1, 4, 5\] and \[4, 5\]"),
        ((LABELS, LABELS, 0, 1), "num_classes must be 1 to 4096, got 0"),
        ((LABELS, LABELS, 2, -1), "radius must be 0 to 4095 pixels, got -1"),
        ((LABELS, LABELS, 2, float("nan")), "radius must be 0 to 4095 pixels, got nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        boundary_match(*arguments)


def test_opcheck_and_compile(compiler, generator):
    prediction, target = make_case(generator, (12, 20))
    torch.library.opcheck(
        torch.ops.pyseg.boundary_match.default, (prediction, target, CLASSES, 4, 255)
    )
    compiled = compiler(lambda *labels: boundary_match(*labels, CLASSES, 2))
    assert torch.equal(
        compiled(prediction, target).counts, boundary_match(prediction, target, CLASSES, 2).counts
    )
