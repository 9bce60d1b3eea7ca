"""Masks to polygons and back, each rule against the tool whose rule it is."""

import numpy as np
import pytest
from scipy import ndimage

from pyseg.errors import ImageError
from pyseg.formats import polygons


def masks():
    """Holes within holes, pixels that touch by corners, single ones, the border, odd sizes."""
    generator = np.random.default_rng()
    yield np.ones((1, 1), bool)
    yield np.ones((3, 5), bool)
    yield np.eye(6, dtype=bool)
    yield ~np.eye(7, dtype=bool)
    yield np.indices((7, 9)).sum(0) % 2 == 0
    rings = np.zeros((17, 19), bool)
    for k in range(0, 8, 2):
        rings[k : 17 - k, k : 19 - k] = True
        rings[k + 1 : 16 - k, k + 1 : 18 - k] = False
    yield rings
    for kind in range(80):
        height, width = generator.integers(1, 40, 2)
        noise = generator.standard_normal((height, width))
        if kind % 4 == 3:
            mask = np.zeros((height, width), bool)
            mask[generator.integers(height), generator.integers(width)] = True
        else:
            mask = ndimage.gaussian_filter(noise, (0, 1.5, 4)[kind % 4]) > generator.normal(0, 0.05)
        if mask.any():
            yield mask


@pytest.fixture(scope="module")
def some_masks():
    return list(masks())


def inside(rings, x, y):
    """Even-odd, by a ray to the right: the textbook's way, point by point."""
    odd = False
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, 0), strict=True):
            if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
                odd = not odd
    return odd


def test_outlines_between_pixels(some_masks):
    for mask in some_masks:
        parts = polygons.parts(mask)
        filled = [polygons.fill_area(part, *mask.shape) for part in parts]
        assert np.array_equal(np.sum(filled, 0), mask)  # and no two overlap
        assert len(parts) == ndimage.label(mask)[1]
        coco = np.zeros(mask.shape, bool)
        for part in parts:
            for ring in part:
                coco ^= polygons.fill_coco(ring, *mask.shape)
        assert np.array_equal(coco, mask)


def test_outlines_are_simple(some_masks):
    """No ring comes to a point twice, so that none crosses or touches itself; areas add up."""
    for mask in some_masks:
        for part in polygons.parts(mask):
            areas = [polygons._area(ring) for ring in part]
            assert areas[0] > 0 and all(area < 0 for area in areas[1:])
            for ring in part:
                assert len({*map(tuple, ring.tolist())}) == len(ring) >= 4
                steps = np.roll(ring, -1, 0) - ring
                assert ((steps == 0).sum(1) == 1).all()
        total = sum(polygons._area(ring) for part in polygons.parts(mask) for ring in part)
        assert total == mask.sum()


def test_outlines_are_valid_to_shapely(some_masks):
    shapely = pytest.importorskip("shapely")
    for mask in some_masks:
        for part in polygons.parts(mask):
            assert shapely.Polygon(part[0], part[1:]).is_valid


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_pycocotools_fills_them_alike(some_masks):
    reference = pytest.importorskip("pycocotools.mask")
    for mask in some_masks:
        got = np.zeros(mask.shape, bool)
        for part in polygons.parts(mask):
            for ring in part:
                rle = reference.frPyObjects([ring.astype(float).ravel().tolist()], *mask.shape)
                got ^= reference.decode(rle)[..., 0] > 0
        assert np.array_equal(got, mask)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_any_polygon_as_pycocotools_fills_it():
    reference = pytest.importorskip("pycocotools.mask")
    generator = np.random.default_rng()
    for _ in range(150):
        height, width = (int(side) for side in generator.integers(1, 60, 2))
        ring = generator.uniform(-5, 65, (generator.integers(3, 12), 2))
        want = reference.decode(reference.frPyObjects([ring.ravel().tolist()], height, width))
        assert np.array_equal(polygons.fill_coco(ring, height, width), want[..., 0] > 0)


def test_any_polygon_by_centres():
    generator = np.random.default_rng()
    for _ in range(20):
        height, width = (int(side) for side in generator.integers(1, 14, 2))
        rings = [generator.uniform(-3, 16, (generator.integers(3, 9), 2)) for _ in range(2)]
        got = polygons.fill_area(rings, height, width)
        for y in range(height):
            for x in range(width):
                assert got[y, x] == inside(rings, x + 0.5, y + 0.5)


def test_any_polygon_as_opencv_fills_it():
    cv2 = pytest.importorskip("cv2")
    generator = np.random.default_rng()
    for _ in range(200):
        height, width = (int(side) for side in generator.integers(1, 60, 2))
        ring = generator.uniform(0, 1, (generator.integers(1, 12), 2)) * (width, height)
        want = np.zeros((height, width), np.uint8)
        cv2.fillPoly(want, [ring.astype(np.int32)], 1)
        assert np.array_equal(polygons.fill_opencv(ring, height, width), want > 0)


def test_polygons_with_their_border(some_masks):
    """One polygon for each part, its holes bridged, is exact for OpenCV's way of filling."""
    for mask in some_masks:
        got = np.zeros(mask.shape, bool)
        for part in polygons.border_parts(mask):
            got |= polygons.fill_opencv(polygons.bridged([part]), *mask.shape)
        assert np.array_equal(got, mask)
        count = ndimage.label(mask, structure=np.ones((3, 3)))[1]
        assert len(polygons.border_parts(mask)) == count


def test_opencv_fills_them_alike(some_masks):
    cv2 = pytest.importorskip("cv2")
    for mask in some_masks:
        got, whole = np.zeros((2, *mask.shape), np.uint8)
        parts = polygons.border_parts(mask)
        for part in parts:
            cv2.fillPoly(got, [polygons.bridged([part]).astype(np.int32)], 1)
        assert np.array_equal(got > 0, mask)
        # All parts as one: what the bridges add is what we say that they add.
        ring = polygons.bridged(parts)
        cv2.fillPoly(whole, [ring.astype(np.int32)], 1)
        assert np.array_equal(whole > 0, polygons.fill_opencv(ring, *mask.shape))
        assert (whole > 0)[mask].all()


def test_pillow_fills_them_alike(some_masks):
    for mask in some_masks:
        got = np.zeros(mask.shape, bool)
        for part in polygons.border_parts(mask):
            ring = polygons.bridged([part])
            ring = np.concatenate([ring, ring[-1:].repeat(max(0, 3 - len(ring)), 0)])
            got |= polygons.fill_pillow(ring, *mask.shape)
        assert np.array_equal(got, mask)


def test_bridges_are_short():
    mask = np.zeros((9, 30), bool)
    mask[2:7, 1:6] = mask[2:7, 20:26] = True
    filled = polygons.fill_opencv(polygons.bridged(polygons.border_parts(mask)), 9, 30)
    assert (filled & ~mask).sum() == 14  # straight across the gap


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([[1, 2], [3, 4]], "three points, it has 2"),
        ([], "three points, it has 0"),
        ([[1, 2], [3, float("nan")], [5, 6]], "no finite number"),
        ([[1, 2], [3, float("inf")], [5, 6]], "no finite number"),
        ([[1, 2], [3, 10**400], [5, 6]], "not pairs of numbers"),
        ([[1, 2], [3, 4], [1e9, 6]], r"\(1e\+09, 6\) is far outside"),
        ([[1, 2], [3, 4], [5]], "not pairs of numbers"),
        ([[1, 2, 3], [3, 4, 5], [5, 6, 7]], "not pairs of numbers"),
        ([1, 2, 3, 4, 5], "not pairs of numbers"),
        ([[1, 2], [3, "4"], [5, 6]], "not pairs of numbers"),
        ([[1, 2], [3, True], [5, 6]], "not pairs of numbers"),
        ([[1, 2], None, [5, 6]], "not pairs of numbers"),
        ("abcdef", "not pairs of numbers"),
        (None, "not pairs of numbers"),
        ({"a": 1}, "not pairs of numbers"),
    ],
)
def test_points_of_a_stranger(points, words):
    with pytest.raises(ImageError, match=f"^here: .*{words}"):
        polygons.check_ring(points, (40, 50), "here")
