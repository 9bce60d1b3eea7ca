"""Masks to polygons and back, by the rule of each format's own tools.

Two ways to say where a pixel is are in use. For COCO, CVAT and GeoJSON pixel (x, y) is the square
from (x, y) to (x + 1, y + 1), and an outline runs between pixels (`parts`, `fill_coco`,
`fill_area`). For OpenCV, with which YOLO's files are read, and for Pillow, which labelme uses, it
is the point (x, y), and an outline runs through the outermost pixels of the mask, which it includes
(`border_parts`, `fill_opencv`, `fill_pillow`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import cKDTree

from ..errors import ImageError

Ring = np.ndarray  # [N, 2] x, y; closed: the first point is not repeated
Part = list[Ring]  # the outer ring, then one for each hole


# --- from masks ------------------------------------------------------------------------------


def parts(mask: np.ndarray) -> list[Part]:
    """Outlines between pixels, exact in COCO's rule and in that of geographic polygons.

    Args:
        mask: [H, W] bool.

    Returns:
        One list of rings for each part of the mask that is connected by the sides of pixels: the
        outer ring, with the mask on its right (clockwise as seen on the screen), then its holes,
        the other way round. Vertices are integers, at corners of pixels, where the outline turns.
        No ring crosses or touches itself, so that the polygons are valid ones in OGC's sense.
    """
    labels, count = ndimage.label(mask)
    found: list[list[tuple[float, Ring]]] = [[] for _ in range(count)]
    for ring, component in _rings(mask, labels):
        found[component - 1].append((_area(ring), ring))
    return [[ring for _, ring in sorted(rings, key=lambda r: -r[0])] for rings in found]


def border_parts(mask: np.ndarray) -> list[Part]:
    """Outlines through the outermost pixels, exact where a tool fills a polygon and its border.

    Args:
        mask: [H, W] bool.

    Returns:
        As `parts`, but parts are connected by corners too, and vertices are indices of pixels of
        the mask, so that rings of thin places run there and back, and that of a single pixel is one
        point. The vertices of a ring are at most one pixel apart, sideways or diagonally.
    """
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    found: list[list[tuple[float, Ring]]] = [[] for _ in range(count)]
    for ring, component in _rings(mask, labels):
        found[component - 1].append((_area(ring), _inner_pixels(ring)))
    return [[ring for _, ring in sorted(rings, key=lambda r: -r[0])] for rings in found]


def _area(ring: Ring) -> float:
    """Signed; positive where the mask is inside."""
    x, y = ring.T.astype(np.float64)
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _rings(mask: np.ndarray, labels: np.ndarray) -> list[tuple[Ring, int]]:
    """The closed outlines between pixels, corner by corner, and the component of each.

    Every outline alternates between level and upright stretches with the mask on their right. Where
    two pixels of the mask touch by a corner only, four stretches meet; the outline turns right
    there, which keeps the two apart, where they are of different components, and left where they
    are of one: then no ring touches itself.
    """
    padded = np.pad(mask.astype(np.int8), 1)
    component = np.pad(labels, 1)
    # Level: +1 where the mask begins below a line, which is walked to the right; -1 to the left.
    y, start, end, sign = _stretches(np.diff(padded, axis=0)[:, 1:-1])
    level = np.stack([np.where(sign > 0, start, end), y, np.where(sign > 0, end, start)], 1)
    below = np.where(sign > 0, y, y - 1) + 1  # row of the mask's pixel in `padded`
    owner = component[below, start + 1]
    # Upright: +1 where the mask begins right of a line, which is walked up.
    x, start, end, sign = _stretches(np.diff(padded, axis=1)[1:-1].T)
    upright = np.stack([x, np.where(sign > 0, end, start), np.where(sign > 0, start, end)], 1)
    # What begins at a corner: of a level stretch by its direction, as two may begin at one corner.
    begins = {}
    for index, (x0, y0, x1) in enumerate(level.tolist()):
        begins[x0, y0, x1 > x0] = index
    follows: dict[tuple[int, int], list[int]] = {}
    for x0, y0, y1 in upright.tolist():
        follows.setdefault((x0, y0), []).append(y1)
    rings = []
    done = np.zeros(len(level), bool)
    table = level.tolist()
    for first in range(len(table)):
        if done[first]:
            continue
        ring = []
        index = first
        while not done[index]:
            done[index] = True
            x0, y0, x1 = table[index]
            ring += [(x0, y0), (x1, y0)]
            ends = sorted(follows[x1, y0])
            y1 = ends[0]
            if (
                len(ends) == 2
            ):  # a right turn goes down from one to the right, and up from the other
                y1 = ends[(x1 > x0) != _one_component(component, x1, y0)]
            to_right = (x1, y1, True) in begins
            if to_right and (x1, y1, False) in begins:
                to_right = (y1 < y0) != _one_component(component, x1, y1)
            index = begins[x1, y1, to_right]
        rings.append((np.array(ring, np.int64), int(owner[first])))
    return rings


def _one_component(component: np.ndarray, x: int, y: int) -> bool:
    """Whether two pixels that touch by a corner only are of one component."""
    if component[y, x]:
        return bool(component[y, x] == component[y + 1, x + 1])
    return bool(component[y, x + 1] == component[y + 1, x])


def _stretches(signs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Runs of equal values other than 0 in each row: row, start, end (exclusive), value."""
    before = np.pad(signs[:, :-1], ((0, 0), (1, 0)))
    after = np.pad(signs[:, 1:], ((0, 0), (0, 1)))
    rows, start = np.nonzero((signs != 0) & (signs != before))
    _, end = np.nonzero((signs != 0) & (signs != after))
    return rows, start, end + 1, signs[rows, start]


def _inner_pixels(ring: Ring) -> Ring:
    """The pixels of the mask along an outline between pixels, without repeats in a row."""
    ends = np.roll(ring, -1, 0)
    steps = ends - ring
    lengths = np.abs(steps).sum(1)
    unit = np.repeat(np.sign(steps), lengths, 0)
    offset = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    points = np.repeat(ring, lengths, 0) + unit * offset[:, None]
    # From the start of a step of one pixel to the pixel on its right.
    left, down, up = unit[:, 0] < 0, unit[:, 1] > 0, unit[:, 1] < 0
    points[:, 0] -= left | down
    points[:, 1] -= left | up
    keep = (points != np.roll(points, 1, 0)).any(1)
    kept: Ring = points[keep] if keep.any() else points[:1]
    return kept


def straightened(ring: Ring) -> Ring:
    """A ring without the points that lie within a straight stretch."""
    if len(ring) < 3:
        return ring
    before = ring - np.roll(ring, 1, 0)
    after = np.roll(ring, -1, 0) - ring
    keep = (np.sign(before) != np.sign(after)).any(1) | (np.abs(before) > 1).any(1)
    keep |= (np.abs(after) > 1).any(1)  # a bridge: its slope is another
    return ring[keep] if keep.any() else ring[:1]


def bridged(found: Sequence[Part]) -> Ring:
    """All rings as a single closed one, for formats in which an object is one polygon.

    Holes are joined to the ring on their left by a level bridge of pixels of the mask, parts by the
    shortest line, longest ring first; bridges are walked there and back, so that an even-odd
    filling leaves holes open. A tool that draws borders, as OpenCV, adds the pixels of the bridges
    between parts; those to holes change nothing.

    Args:
        found: what `border_parts` returns.
    """
    joined = [_with_holes(part) for part in found]
    joined.sort(key=len, reverse=True)
    result = joined[0]
    for ring in joined[1:]:
        distances, nearest = cKDTree(result).query(ring)
        own = int(distances.argmin())
        result = _spliced(result, int(nearest[own]), ring, own)
    return straightened(result)


def _with_holes(part: Part) -> Ring:
    result = part[0]
    for hole in sorted(part[1:], key=lambda ring: int(ring[:, 0].min())):
        own = int(hole[:, 0].argmin())
        x, y = hole[own]
        level = np.flatnonzero((result[:, 1] == y) & (result[:, 0] <= x))
        result = _spliced(result, int(level[result[level, 0].argmax()]), hole, own)
    return result


def _spliced(ring: Ring, at: int, other: Ring, own: int) -> Ring:
    """``ring`` with ``other`` put in behind its point ``at``, begun and ended at ``own``."""
    inner = np.concatenate([other[own:], other[:own], other[own : own + 1]])
    return np.concatenate([ring[: at + 1], inner, ring[at:]])


# --- to masks --------------------------------------------------------------------------------


def check_ring(points: object, size: tuple[int, int], where: str) -> Ring:
    """Points of a polygon from a stranger's file, held against the image.

    Args:
        points: should be [[x, y], …], or numbers x, y, x, y, ….
        size: height and width of the image.
        where: begins the message.

    Raises:
        ImageError: no such list, fewer than three points, nan, infinity, or far outside the image.
    """
    try:
        ring = np.array(points, np.float64)
    except (TypeError, ValueError, OverflowError):
        ring = np.empty((0, 0))
    if ring.ndim == 1 and ring.size % 2 == 0:
        ring = ring.reshape(-1, 2)
    if ring.ndim != 2 or ring.shape[1] != 2 or _holds_text(points):
        raise ImageError(f"{where}: its points are not pairs of numbers x, y; mend or remove it")
    if len(ring) < 3:
        raise ImageError(
            f"{where}: a polygon needs at least three points, it has {len(ring)}; remove it"
        )
    if not np.isfinite(ring).all():
        raise ImageError(f"{where}: a coordinate is no finite number; mend or remove it")
    height, width = size
    # What is drawn costs memory by its length: a point far outside is damage.
    if (np.abs(ring - (width / 2, height / 2)) > (1.5 * width + 1, 1.5 * height + 1)).any():
        x, y = ring[np.abs(ring - (width / 2, height / 2)).max(1).argmax()]
        raise ImageError(
            f"{where}: the point ({x:g}, {y:g}) is far outside the image of {width} x {height} "
            "pixels; are these coordinates of another image, or in other units?"
        )
    return ring


def _holds_text(points: object) -> bool:
    """NumPy makes numbers of texts and truth values without a word."""
    if isinstance(points, (list, tuple)):
        return any(_holds_text(item) for item in points)
    return isinstance(points, (str, bytes, bool)) or points is None


def fill_area(rings: Sequence[Ring], height: int, width: int) -> np.ndarray:
    """Pixels whose centre lies inside, by the even-odd rule: [H, W] bool.

    Args:
        rings: of one part, outer ring and holes, x and y with pixel (0, 0) from 0 to 1.
        height: of the mask.
        width: of the mask.
    """
    x0, y0, x1, y1 = _edges(rings)
    first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, height).astype(np.int64)
    edge, row = _spread(first, last - first)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (x1 - x0) / (y1 - y0)
    at = x0[edge] + (row + 0.5 - y0[edge]) * slope[edge]
    column = np.clip(np.ceil(at - 0.5), 0, width).astype(np.int64)
    toggles = np.bincount(row * (width + 1) + column, minlength=height * (width + 1))
    inside: np.ndarray = toggles.reshape(height, width + 1)[:, :width].cumsum(1) % 2 == 1
    return inside


def fill_coco(ring: Ring, height: int, width: int) -> np.ndarray:
    """One polygon as pycocotools fills it: [H, W] bool."""
    mask = np.zeros((height, width), bool)
    places = coco_toggles(ring, height, width)
    if places.size:
        left = int(places.min()) // height  # no other column changes
        wide = -(-int(places.max()) // height) - left
        toggles = np.bincount(places - left * height, minlength=wide * height + 1)
        odd = toggles[: wide * height].cumsum() % 2 == 1
        mask[:, left : left + wide] = odd.reshape(wide, height).T
    return mask


def coco_toggles(ring: Ring, height: int, width: int) -> np.ndarray:
    """Where a polygon begins and ends along the columns, as column * height + row, in any order.

    As in cocoapi's ``rleFrPoly``: vertices are rounded to a fifth of a pixel, edges walked on that
    grid, and the filling changes where they pass the centres of columns.
    """
    # Rounded as C does it, towards zero; C has no points left of or above the image in mind.
    grid = np.trunc(5 * ring + 0.5).astype(np.int64)
    xs, ys = grid.T
    xe, ye = np.roll(grid, -1, 0).T
    dx, dy = np.abs(xe - xs), np.abs(ye - ys)
    flat = dx >= dy
    flip = np.where(flat, xs > xe, ys > ye)
    xs, xe = np.where(flip, xe, xs), np.where(flip, xs, xe)
    ys, ye = np.where(flip, ye, ys), np.where(flip, ys, ye)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(flat, (ye - ys) / dx, (xe - xs) / dy)
    slope = np.nan_to_num(slope)
    length = np.maximum(dx, dy)
    edge, step = _spread(np.zeros(len(grid), np.int64), length + 1)
    step = np.where(flip[edge], length[edge] - step, step)
    along = flat[edge]
    u = np.where(along, step + xs[edge], np.trunc(xs[edge] + slope[edge] * step + 0.5))
    v = np.where(along, np.trunc(ys[edge] + slope[edge] * step + 0.5), step + ys[edge])
    moved = u[1:] != u[:-1]
    back = (u[1:] < u[:-1])[moved]
    column = (np.where(back, u[1:][moved], u[1:][moved] - 1) + 0.5) / 5 - 0.5
    row = np.where(v[1:][moved] < v[:-1][moved], v[1:][moved], v[:-1][moved])
    row = np.ceil(np.clip((row + 0.5) / 5 - 0.5, 0, height)).astype(np.int64)
    good = (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    return column[good].astype(np.int64) * height + row[good]


def coco_edges(rings: Sequence[Ring], height: int, width: int) -> np.ndarray:
    """The runs of polygons that are one mask, as `pyseg.formats.edges_of` gives them."""
    begins, ends = [], []
    for ring in rings:
        places, counts = np.unique(coco_toggles(ring, height, width), return_counts=True)
        places = places[counts % 2 == 1]
        if len(places) % 2:
            places = np.append(places, height * width)
        begins.append(places[::2])
        ends.append(places[1::2])
    if len(rings) == 1:
        return np.stack([begins[0], ends[0]], 1).ravel()
    # What begins where another ends goes on.
    keys = np.concatenate([2 * np.concatenate(begins), 2 * np.concatenate(ends) + 1])
    keys.sort()
    depth = np.cumsum(1 - 2 * (keys & 1))
    return (keys >> 1)[(depth == 0) | ((depth == 1) & (keys & 1 == 0))]


def fill_opencv(ring: Ring, height: int, width: int) -> np.ndarray:
    """One polygon as OpenCV's ``fillPoly`` fills it, border included: [H, W] bool.

    Args:
        ring: [N, 2], truncated to integers, as YOLO's readers do.
        height: of the mask.
        width: of the mask.
    """
    grid = np.trunc(ring).astype(np.int64)
    ends = np.roll(grid, -1, 0)
    mask = _drawn(grid, ends, height, width)
    # The filling: edges in fixed point of 16 bits, rows from the upper end to before the lower.
    upper = np.where((grid[:, 1] <= ends[:, 1])[:, None], grid, ends)
    lower = np.where((grid[:, 1] <= ends[:, 1])[:, None], ends, grid)
    tall = lower[:, 1] - upper[:, 1]
    change = (lower[:, 0] - upper[:, 0]) << 16
    slope = np.sign(change) * (np.abs(change) // np.maximum(tall, 1))  # C rounds towards zero
    edge, step = _spread(np.zeros(len(grid), np.int64), tall)
    row = upper[edge, 1] + step
    at = (upper[edge, 0] << 16) + slope[edge] * step
    order = np.lexsort((at, row))
    row, at = row[order][::2], at[order]
    start = np.clip((at[::2] + 65535) >> 16, 0, width)
    end = np.clip((at[1::2] >> 16) + 1, 0, width)
    inside = (row >= 0) & (row < height) & (start < end)
    size = height * (width + 1)
    changes = np.bincount(row[inside] * (width + 1) + start[inside], minlength=size)
    changes -= np.bincount(row[inside] * (width + 1) + end[inside], minlength=size)
    return mask | (changes.reshape(height, width + 1)[:, :width].cumsum(1) > 0)


def _drawn(begin: Ring, end: Ring, height: int, width: int) -> np.ndarray:
    """Lines of 8-connected pixels from left to right, as OpenCV draws them: [H, W] bool."""
    forward = (begin[:, 0] <= end[:, 0])[:, None]
    begin, end = np.where(forward, begin, end), np.where(forward, end, begin)
    delta = end - begin
    dx, dy = delta[:, 0], np.abs(delta[:, 1])
    flat = dx >= dy
    major, minor = np.where(flat, dx, dy), np.where(flat, dy, dx)
    edge, step = _spread(np.zeros(len(begin), np.int64), major + 1)
    side = (2 * minor[edge] * step + major[edge] - 1) // np.maximum(2 * major[edge], 1)
    side[major[edge] == 0] = 0
    down = np.sign(delta[edge, 1])
    x = begin[edge, 0] + np.where(flat[edge], step, side)
    y = begin[edge, 1] + down * np.where(flat[edge], side, step)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    mask = np.zeros((height, width), bool)
    mask[y[inside], x[inside]] = True
    return mask


def fill_pillow(ring: Ring, height: int, width: int) -> np.ndarray:
    """One polygon as Pillow fills it, and labelme with it, border included: [H, W] bool."""
    picture = Image.new("1", (width, height))
    points = [(float(x), float(y)) for x, y in ring]
    ImageDraw.Draw(picture).polygon(points, outline=1, fill=1)
    return bits_of(picture)


def bits_of(picture: Image.Image) -> np.ndarray:
    """A picture of mode 1 as [H, W] bool of 0 and 1: Pillow's own truth is a byte of 255."""
    mask: np.ndarray = np.array(picture).view(np.uint8) != 0
    return mask


def _edges(rings: Sequence[Ring]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    begin = np.concatenate(rings).astype(np.float64)
    end = np.concatenate([np.roll(ring, -1, 0) for ring in rings]).astype(np.float64)
    return begin[:, 0], begin[:, 1], end[:, 0], end[:, 1]


def _spread(first: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of ``counts[i]`` numbers from ``first[i]`` on: i, and the number."""
    index = np.repeat(np.arange(len(counts)), counts)
    offset = np.arange(len(index)) - np.repeat(counts.cumsum() - counts, counts)
    return index, first[index] + offset
