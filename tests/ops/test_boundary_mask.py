"""boundary_mask against windows of labels, and against eroding class by class.

The template of an op's tests: an oracle that shares no idea with the kernel (`brute_force`, and
the paper's definition by SciPy); every dtype and layout; sizes on both sides of a tile; numbers of
threads; nothing at all; bad arguments; opcheck and compilation. A test that asks for `device` runs
the .cu file twice: on a GPU, and compiled for the CPU; "small" in its name also sends it through
compute-sanitizer where there is a GPU. `generator` has another seed every time, which is printed
where a test fails.
"""

import pytest
import torch
from torch.nn.functional import interpolate

from pyseg.ops import boundary_mask
from pyseg.ops.boundary_mask import boundary_distance, reference
from pyseg.ops.confusion_matrix import INTEGERS


def label_maps(generator, size, images=2):
    """Blobs, noise, and one label."""
    coarse = torch.randn(images, 6, 4, 5, generator=generator)
    yield interpolate(coarse, size, mode="bicubic").argmax(1)
    yield torch.randint(0, 3, (images, *size), generator=generator)
    yield torch.zeros(images, *size, dtype=torch.int64)


def brute_force(labels, distance, border):
    """Looks at every window by itself."""
    _, height, width = labels.shape
    mask = torch.zeros(labels.shape, dtype=torch.bool)
    for y in range(height):
        for x in range(width):
            top, left = max(y - distance, 0), max(x - distance, 0)
            window = labels[:, top : y + distance + 1, left : x + distance + 1]
            mask[:, y, x] = (window != labels[:, y : y + 1, x : x + 1]).flatten(1).any(1)
            cut = y < distance or x < distance or y + distance >= height or x + distance >= width
            if border and cut:
                mask[:, y, x] = True
    return mask


@pytest.mark.parametrize("border", [True, False])
@pytest.mark.parametrize("distance", [1, 3, 100])
def test_small_against_brute_force(device, generator, distance, border):
    for size in ((11, 40), (1, 1), (1, 9), (23, 2)):
        for labels in label_maps(generator, size):
            expected = brute_force(labels, distance, border)
            assert torch.equal(boundary_mask(labels, distance, border), expected)
            got = device.ops.boundary_mask(labels.to(device.name), distance, border)
            assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_dtypes_and_layouts(device, generator, dtype):
    for labels in label_maps(generator, (70, 210)):
        if dtype.itemsize > 1:
            labels = labels * 2 ** (8 * dtype.itemsize - 4)  # the high bits count too
        labels = labels.to(dtype)
        for distance in (1, 9):
            expected = reference(labels, distance)
            assert torch.equal(boundary_mask(labels, distance), expected)
            turned = labels.transpose(1, 2).contiguous().transpose(1, 2)
            assert torch.equal(boundary_mask(turned, distance), expected)
            got = device.ops.boundary_mask(turned.to(device.name), distance, True)
            assert torch.equal(got.cpu(), expected)


def test_wider_than_a_tile(device, generator):
    labels = interpolate(torch.randn(1, 3, 2, 9, generator=generator), (40, 2100)).argmax(1)
    for distance, border in ((4, True), (17, False), (600, False)):
        want = brute_rows(labels, distance, border)
        assert torch.equal(boundary_mask(labels, distance, border), want)
        got = device.ops.boundary_mask(labels.to(device.name), distance, border)
        assert torch.equal(got.cpu(), want)


def brute_rows(labels, distance, border):
    """Windows by shifting the map, continued at its edges or surrounded by another label."""
    mask = torch.zeros(labels.shape, dtype=torch.bool)
    _, height, width = labels.shape
    rows, columns = torch.arange(height), torch.arange(width)
    for axis, index, size in ((1, rows, height), (2, columns, width)):
        near = mask.clone()
        for shift in range(-distance, distance + 1):
            place = (index + shift).clamp(0, size - 1)
            moved = labels.index_select(axis, place) != labels
            if axis == 2:  # what is near a marked row is marked: windows are separable
                moved |= mask.index_select(axis, place)
            near |= moved
        mask = near
    if border:
        inner = torch.zeros_like(mask)
        inner[:, distance : height - distance, distance : width - distance] = True
        mask |= ~inner
    return mask


def test_against_erosion_of_every_class(generator):
    """The definition of Cheng et al.: the class less the class eroded d times."""
    ndimage = pytest.importorskip("scipy.ndimage")
    labels = next(label_maps(generator, (60, 90), images=1))[0]
    mask = boundary_mask(labels[None], 4)[0]
    for k in labels.unique():
        inside = (labels == k).numpy()
        inner = ndimage.binary_erosion(inside, [[1] * 3] * 3, iterations=4)
        assert torch.equal(mask & (labels == k), torch.from_numpy(inside & ~inner))


def test_threads_do_not_change_a_pixel(generator):
    labels = next(label_maps(generator, (900, 400)))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(boundary_mask(labels, 6))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_empty(device):
    for shape in ((0, 4, 5), (2, 0, 5), (2, 4, 0)):
        labels = torch.zeros(shape, dtype=torch.uint8)
        assert boundary_mask(labels, 2).shape == shape
        assert device.ops.boundary_mask(labels.to(device.name), 2, True).shape == shape


def test_distance_of_the_paper():
    assert boundary_distance((480, 640), 0.02) == 16
    assert boundary_distance((1024, 2048), 0.02) == 46
    assert boundary_distance((3, 4), 0.02) == 1


def test_bad_arguments():
    labels = torch.zeros(1, 4, 5, dtype=torch.uint8)
    for wrong in (labels[0], labels.float()):
        with pytest.raises(ValueError, match=r"labels must be \[N, H, W\] integers"):
            boundary_mask(wrong, 1)
    with pytest.raises(ValueError, match="distance must be at least 1 pixel, got 0"):
        boundary_mask(labels, 0)


def test_opcheck_and_compile(compiler, generator):
    labels = next(label_maps(generator, (12, 20)))
    torch.library.opcheck(torch.ops.pyseg.boundary_mask.default, (labels, 2, True))
    compiled = compiler(lambda labels: boundary_mask(labels, 2))
    assert torch.equal(compiled(labels), boundary_mask(labels, 2))
