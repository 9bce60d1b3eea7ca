"""SAM and SAM 2 as refiners: their masks sharpen the class map that a network has predicted.

Segment Anything (Kirillov et al., 2023, arXiv:2304.02643) and SAM 2 (Ravi et al., 2024,
arXiv:2408.00714) draw good outlines but know no classes, and on a coarse map they can do harm. So
the network stays in charge of *what* is there: masks only move its outlines, only where it is
unsure, and only after passing a gate; all other pixels keep the network's logits bit for bit.

Two modes. ``prompt``: every connected component of a thing or thin class becomes a box, points and
a mask prompt (compare SAMRefiner, Lin et al., 2025, arXiv:2502.06756), and the mask that comes back
is added to the logits of its class. Where a model has found instances, the mode prompts with these
instead, and the mask that comes back replaces the instance's. ``vote``: masks of the whole image
pool the probabilities inside them (compare Semantic-Segment-Anything, Chen et al., 2023).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import panoptic_merge
from ..types import CERTAIN, Instances, Segmentation, Segments
from ..weights import Remote, load_into, load_state, resolve

_STUFF_NAMES = """
    background void unlabeled unlabelled other
    road street sidewalk pavement path dirt-track runway lane-marking parking platform railroad
    building house skyscraper wall ceiling floor bridge tunnel roof
    sky tree vegetation plant bush grass terrain earth ground field land dirt sand gravel rock snow
    mountain hill water sea river lake waterfall"""
STUFF = frozenset(_STUFF_NAMES.split())
"""Classes that prompt mode leaves alone by default: one has no "component" to prompt with."""

_SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/sam_{}.pth"
_SAM2_URL = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/sam2.1_hiera_{}.pt"

# The publisher gives no sha256 (the suffixes of SAM's file names are of MD5).
SAM_WEIGHTS = {
    "vit_b": Remote(
        _SAM_URL.format("vit_b_01ec64"),
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": Remote(
        _SAM_URL.format("vit_l_0b3195"),
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": Remote(
        _SAM_URL.format("vit_h_4b8939"),
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}
SAM2_WEIGHTS = {
    "tiny": Remote(
        _SAM2_URL.format("tiny"),
        "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
    ),
    "small": Remote(
        _SAM2_URL.format("small"),
        "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
    ),
    "base_plus": Remote(
        _SAM2_URL.format("base_plus"),
        "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
    ),
    "large": Remote(
        _SAM2_URL.format("large"),
        "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
    ),
}

_PROMPT_LOGIT = 10.0  # of a mask prompt far from its outline; SAM's own masks reach 10 to 20
_BLUR = 4.0  # pixels, at most, over which a mask prompt is unsure about its outline
_TILE_FROM, _TILE_TO = 8, 4  # length / width of components to tile, and of the tiles
_CONFIDENT = 0.8  # top-1 minus top-2 probability of a pixel that may contradict a mask
_DUPLICATE = 0.7  # IoU of boxes, as in SAM's own automatic mask generator


@dataclass(frozen=True)
class Prompts:
    """K prompts for one image. Coordinates are x, y in pixels of the image, first pixel at 0."""

    points: Tensor  # [K, P, 2] float
    point_labels: Tensor  # [K, P] int: 1 on the object, 0 off it, -1 no point
    boxes: Tensor | None = None  # [K, 4] float, xyxy
    masks: Tensor | None = None  # [K, H, W] float logits at image resolution


class MaskGenerator(Protocol):
    """What the refiner asks of a promptable segmenter; it must keep no state between calls."""

    def embed(self, image: Tensor) -> Any:
        """Whatever ``predict`` and ``upsample`` need of ``image`` [3, H, W] uint8 RGB."""
        ...

    def predict(self, embedding: Any, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Best mask per prompt: logits [K, h, w] at the generator's size, predicted IoU [K]."""
        ...

    def upsample(self, embedding: Any, logits: Tensor) -> Tensor:
        """Logits [K, h, w] of ``predict`` to the image's own frame, [K, H, W]."""
        ...


@dataclass(frozen=True)
class _Part:
    """A component of one class, or a tile of a long thin one, with its prompts."""

    class_id: int
    box: tuple[float, float, float, float]  # xyxy
    points: tuple[tuple[float, float], tuple[float, float]]  # on the object, off it
    point_labels: tuple[int, int]
    corner: tuple[int, int]  # y, x of `mask` in the image
    mask: np.ndarray  # [h, w] float32 logits; -_PROMPT_LOGIT outside it
    axis: tuple[float, float]  # x, y; only pixels p with strip[0] <= axis . p < strip[1] count
    strip: tuple[float, float]


class SamRefiner(nn.Module):
    """Refines class maps with the masks of a promptable segmenter.

    Args:
        generator: the segmenter, e.g. `SamBackend` or `Sam2Backend`.
        size: what its size is called; only kept as an attribute.
        mode: ``"prompt"`` refines components of thing and thin classes, ``"vote"`` everything.
        classes: prompt mode: names of the classes to refine (case does not matter); by default
            all but those of `STUFF`.
        min_area: prompt mode: pixels below which a component or instance keeps its outline.
        predicted_iou: gate: the least IoU that the segmenter predicts for its own mask.
        component_iou: gate, prompt mode: the least IoU of mask and component.
        area_ratio: gate, prompt mode: mask and component differ in area by at most this factor.
        agreement: gate, vote mode: of the pixels in a mask that the network is sure about, the
            least share that must have the class that the mask gets.
        strength: prompt mode: the factor λ on masks in the sum of logits; 0 switches it off.
        boundary: pixels that the network's outlines may be off: only pixels this close to a label
            boundary change,
        margin: and those whose two best probabilities differ by less than this.
        points: vote mode: the point grid is ``points`` x ``points``, four times as dense in cells
            where the network's entropy is above the image's mean.
        batch: prompts decoded at a time.

    Thread-safe; copies and pickles like any module.
    """

    def __init__(
        self,
        generator: MaskGenerator,
        *,
        size: str | None = None,
        mode: Literal["prompt", "vote"] = "prompt",
        classes: Sequence[str] | str | None = None,
        min_area: int = 64,
        predicted_iou: float = 0.7,
        component_iou: float = 0.5,
        area_ratio: float = 2.0,
        agreement: float = 0.9,
        strength: float = 8.0,
        boundary: int = 8,
        margin: float = 0.5,
        points: int = 16,
        batch: int = 16,
    ) -> None:
        super().__init__()
        if mode not in ("prompt", "vote"):
            raise ValueError(f"mode must be 'prompt' or 'vote', got {mode!r}")
        for name, value in (("min_area", min_area), ("points", points), ("batch", batch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if area_ratio < 1:
            raise ValueError(f"area_ratio must be at least 1, got {area_ratio}")
        if boundary < 0 or strength < 0:
            raise ValueError(
                f"boundary and strength must not be negative, got {boundary} and {strength}"
            )
        self.generator = generator
        self.eval()
        self.size = size
        self.mode = mode
        self.classes = (classes,) if isinstance(classes, str) else classes and tuple(classes)
        self.min_area = min_area
        self.predicted_iou = predicted_iou
        self.component_iou = component_iou
        self.area_ratio = area_ratio
        self.agreement = agreement
        self.strength = strength
        self.boundary = boundary
        self.margin = margin
        self.points = points
        self.batch = batch

    def config(self) -> dict[str, str]:
        """The option that rebuilds it without its weights, from which its size may follow."""
        return {} if self.size is None else {"size": self.size}

    @torch.no_grad()
    def refine(self, image: Tensor, prediction: Segmentation) -> Segmentation:
        """Refines one prediction.

        Args:
            image: [3, H, W] uint8 RGB.
            prediction: of this image, with logits, or in prompt mode with instances.

        Returns:
            A prediction with logits [C, H, W] at full resolution; or, where there are instances,
            with new masks of those whose score is at least `CERTAIN`, and panoptic segments made
            anew of those that had one. ``prediction`` itself where no mask was accepted.

        Raises:
            ValueError: the image is not uint8 RGB or of another size than the prediction, the
                prediction has no logits, or ``classes`` names a class that it does not have.
        """
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                f"image must be uint8 RGB [3, H, W], got {image.dtype} {list(image.shape)}"
            )
        if tuple(image.shape[1:]) != tuple(prediction.size):
            raise ValueError(
                f"image is {list(image.shape[1:])} but the prediction is of an image "
                f"of {list(prediction.size)}"
            )
        if prediction.instances is not None and self.mode == "prompt":
            return self._instances(image, prediction, prediction.instances)
        if prediction.logits is None:
            raise ValueError(
                "sam and sam2 need logits and this prediction has labels only; put "
                "the stage before the one that dropped them"
            )
        if self.mode == "vote":
            return self._vote(image, prediction)
        return self._prompt(image, prediction)

    # --- prompt mode --------------------------------------------------------------------------

    def _prompt(self, image: Tensor, prediction: Segmentation) -> Segmentation:
        ids = self._class_ids(prediction.classes)
        labels = prediction.labels.cpu().numpy()
        parts, part_of = _parts(labels, ids, self.min_area)
        if not parts or self.strength == 0:
            return prediction
        assert prediction.logits is not None
        device = prediction.logits.device
        owner = torch.from_numpy(part_of).to(device)  # [H, W], index into parts or -1
        embedding = self.generator.embed(image)
        logits = zone = None
        for begin in range(0, len(parts), self.batch):
            chunk = parts[begin : begin + self.batch]
            low, quality = self.generator.predict(embedding, _prompts(chunk, prediction.size))
            # The cheap half of the gate first: what fails it is not even upsampled.
            good = (quality >= self.predicted_iou).nonzero()[:, 0]
            if not len(good):
                continue
            masks = self.generator.upsample(embedding, low[good]).to(device)  # [k, H, W]
            score = (quality[good].clamp(0, 1) * _stability(low[good])).to(device)  # [k]
            chosen = [chunk[index] for index in good.tolist()]
            own = owner == (begin + good.to(device))[:, None, None]
            inside = (masks > 0) & torch.stack([_strip(part, owner) for part in chosen])
            area, own_area, overlap = (
                m.flatten(1).float().sum(1) for m in (inside, own, inside & own)
            )
            iou = overlap / (area + own_area - overlap)
            ratio = area / own_area
            accepted = iou >= self.component_iou
            accepted &= (ratio <= self.area_ratio) & (ratio >= 1 / self.area_ratio)
            weight = self.strength * score * iou
            for k in accepted.nonzero()[:, 0].tolist():
                if logits is None or zone is None:
                    logits = _upsample(prediction)
                    zone = self._zone(logits, prediction.labels)
                # A mask speaks against its class only on its own component and near itself:
                # further off another object of the class may stand.
                active = (inside[k] | (own[k] & _grow(inside[k], self.boundary))) & zone
                plane = logits[chosen[k].class_id]
                vote = weight[k] * torch.tanh(masks[k] / 2)  # tanh(m / 2) = 2 sigmoid(m) - 1
                plane.copy_(torch.where(active, plane + vote, plane))
        return prediction if logits is None else prediction.with_logits(logits)

    def _instances(self, image: Tensor, prediction: Segmentation, found: Instances) -> Segmentation:
        """Every mask for which SAM has a better one is replaced by it."""
        chosen = set(self._class_ids(prediction.classes))
        own = found.masks.cpu()
        wanted = [
            k
            for k, (label, score) in enumerate(
                zip(found.labels.tolist(), found.scores.tolist(), strict=True)
            )
            if label in chosen and score >= CERTAIN and int(own[k].sum()) >= self.min_area
        ]
        if not wanted:
            return prediction
        embedding = self.generator.embed(image)
        masks = found.masks.clone()
        accepted = 0
        for begin in range(0, len(wanted), self.batch):
            chunk = wanted[begin : begin + self.batch]
            parts = [_whole(own[k].numpy(), found.boxes[k].tolist()) for k in chunk]
            low, quality = self.generator.predict(embedding, _prompts(parts, prediction.size))
            good = (quality >= self.predicted_iou).nonzero()[:, 0].tolist()
            if not good:
                continue
            better = self.generator.upsample(embedding, low[good]).to(masks.device) > 0
            for index, mask in zip(good, better, strict=True):
                before = found.masks[chunk[index]]
                area, overlap = int(mask.sum()), int((mask & before).sum())
                ratio = area / int(before.sum())
                iou = overlap / (area + int(before.sum()) - overlap)
                limits = 1 / self.area_ratio <= ratio <= self.area_ratio
                if iou >= self.component_iou and limits:
                    masks[chunk[index]] = mask
                    accepted += 1
        if not accepted:
            return prediction
        segments = prediction.segments
        if segments is not None:
            segments = _merged_again(prediction, segments, found, masks)
        return replace(prediction, instances=replace(found, masks=masks), segments=segments)

    def _class_ids(self, classes: tuple[str, ...]) -> list[int]:
        if self.classes is None:
            return [i for i, name in enumerate(classes) if not is_stuff(name)]
        known = {name.lower(): i for i, name in enumerate(classes)}
        if absent := [name for name in self.classes if name.lower() not in known]:
            raise ValueError(f"classes names {absent}, but the model's classes are {list(classes)}")
        return [known[name.lower()] for name in self.classes]

    def _zone(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Pixels that may change, [H, W] bool: near a label boundary or with a small margin."""
        edge = torch.zeros_like(labels, dtype=torch.bool)
        across = labels[:, 1:] != labels[:, :-1]
        down = labels[1:] != labels[:-1]
        edge[:, 1:] |= across
        edge[:, :-1] |= across
        edge[1:] |= down
        edge[:-1] |= down
        return _grow(edge, self.boundary) | (_margin(logits.softmax(0)) < self.margin)

    # --- vote mode ----------------------------------------------------------------------------

    def _vote(self, image: Tensor, prediction: Segmentation) -> Segmentation:
        logits = _upsample(prediction)
        probabilities = logits.softmax(0)
        embedding = self.generator.embed(image)
        low = self._everything(embedding, probabilities)
        if not len(low):
            return prediction
        flat = probabilities.flatten(1)  # [C, H W]
        sure = (_margin(probabilities) >= _CONFIDENT).flatten()
        votes = torch.zeros_like(flat).scatter_(0, flat.argmax(0)[None], sure.to(flat)[None])
        owner = torch.full((flat.shape[1],), -1, device=flat.device)  # index into means
        means: list[Tensor] = []
        # Large first, so that small ones paint over them.
        for chunk in low.split(self.batch):
            inside = self.generator.upsample(embedding, chunk).to(flat.device).flatten(1) > 0
            share = inside.to(flat)
            area = share.sum(1)
            mean = share @ flat.T / area.clamp(min=1)[:, None]  # [k, C]
            sure_votes = share @ votes.T
            agreeing = sure_votes.gather(1, mean.argmax(1, keepdim=True))[:, 0]
            accepted = (area > 0) & (agreeing >= self.agreement * sure_votes.sum(1))
            for index in accepted.nonzero()[:, 0].tolist():
                owner[inside[index]] = len(means)
                means.append(mean[index])
        if not means:
            return prediction
        owner = owner.reshape(prediction.size)
        changed = (owner >= 0) & self._zone(logits, prediction.labels)
        table = torch.stack(means, 1).clamp_min(1e-8).log()  # [C, masks]
        logits[:, changed] = table[:, owner[changed]]
        return prediction.with_logits(logits)

    def _everything(self, embedding: Any, probabilities: Tensor) -> Tensor:
        """Distinct masks over the whole image, logits [M, h, w], large ones first."""
        from torchvision.ops import masks_to_boxes, nms

        points = _seeds(probabilities, self.points)
        kept, scores = torch.zeros(0), torch.zeros(0)
        for chunk in points.split(self.batch):
            ones = torch.ones(len(chunk), 1, dtype=torch.int32, device=chunk.device)
            low, quality = self.generator.predict(embedding, Prompts(chunk[:, None], ones))
            good = (quality >= self.predicted_iou) & (low > 0).flatten(1).any(1)
            if not good.any():
                continue
            low, quality = low[good], quality[good].clamp(0, 1) * _stability(low[good])
            if len(kept):
                low, quality = torch.cat([kept, low]), torch.cat([scores, quality])
            distinct = nms(masks_to_boxes(low > 0), quality.float(), _DUPLICATE)
            kept, scores = low[distinct], quality[distinct]
        if len(kept):
            order = (kept > 0).flatten(1).float().sum(1).argsort(descending=True, stable=True)
            kept = kept[order]
        return kept


def is_stuff(name: str) -> bool:
    """Whether `STUFF` holds the class, whatever its case and its addenda ("sky-other-merged")."""
    head = re.split("[,;/]", name.lower())[0].strip(" _")
    return re.sub("[ _]+", "-", head) in STUFF or head.split("-")[0] in STUFF


def _upsample(prediction: Segmentation) -> Tensor:
    """Fresh logits [C, H, W] float32; bilinear, as in `Segmentation.probabilities`."""
    assert prediction.logits is not None
    logits = prediction.logits.float()
    if tuple(logits.shape[1:]) == tuple(prediction.size):
        return logits.clone()
    return F.interpolate(logits[None], prediction.size, mode="bilinear", align_corners=False)[0]


def _margin(probabilities: Tensor) -> Tensor:
    """Best minus second best probability of every pixel, [H, W]."""
    if probabilities.shape[0] == 1:
        return torch.ones_like(probabilities[0])
    best = probabilities.topk(2, 0).values
    return best[0] - best[1]


def _grow(mask: Tensor, reach: int) -> Tensor:
    """A mask [H, W] and all that lies within ``reach`` pixels of it, along rows and columns."""
    grown = F.max_pool2d(mask.float()[None], (2 * reach + 1, 1), 1, (reach, 0))
    return F.max_pool2d(grown, (1, 2 * reach + 1), 1, (0, reach))[0] > 0


def _stability(logits: Tensor) -> Tensor:
    """IoU of each mask [K, h, w] cut at logits +1 and -1, as in SAM's mask generator; [K]."""
    flat = logits.flatten(1)
    return (flat > 1).float().sum(1) / (flat > -1).float().sum(1).clamp(min=1)


def _strip(part: _Part, like: Tensor) -> Tensor:
    """The pixels [H, W] that lie in the strip across the image of a part; all for most parts."""
    if part.strip == (-math.inf, math.inf):
        return torch.ones_like(like, dtype=torch.bool)
    height, width = like.shape
    y = torch.arange(height, device=like.device)[:, None]
    x = torch.arange(width, device=like.device)
    along = x * part.axis[0] + y * part.axis[1]
    return (along >= part.strip[0]) & (along < part.strip[1])


def _seeds(probabilities: Tensor, n: int) -> Tensor:
    """Points [K, 2] (x, y): centres of n x n cells, in quarters where the entropy is high."""
    height, width = probabilities.shape[1:]
    entropy = -torch.special.xlogy(probabilities, probabilities).sum(0)
    cells = F.adaptive_avg_pool2d(entropy[None], (min(n, height), min(n, width)))[0]
    rows, columns = cells.shape
    size = torch.tensor([width / columns, height / rows], device=cells.device)

    def centres(which: Tensor, offset: Sequence[float]) -> Tensor:
        corner = which.nonzero().flip(1)  # x, y
        return (corner + torch.tensor(offset, device=cells.device)) * size - 0.5

    dense = cells > cells.mean()
    quarters = [centres(dense, (x, y)) for y in (0.25, 0.75) for x in (0.25, 0.75)]
    return torch.cat([centres(~dense, (0.5, 0.5)), *quarters])


# --- prompts from components ------------------------------------------------------------------


def _parts(labels: np.ndarray, ids: Sequence[int], min_area: int) -> tuple[list[_Part], np.ndarray]:
    """8-connected components of the classes ``ids``, long thin ones in tiles.

    Returns them and the index of its part for every pixel, [H, W] int32, -1 where there is none.
    """
    from scipy import ndimage

    part_of = np.full(labels.shape, -1, np.int32)
    parts: list[_Part] = []
    for class_id in ids:
        components, _ = ndimage.label(labels == class_id, structure=np.ones((3, 3), int))
        areas = np.bincount(components.ravel())
        for number, window in enumerate(ndimage.find_objects(components), 1):
            if areas[number] < min_area:
                continue
            component = components[window] == number
            top, left = window[0].start, window[1].start
            for mask, axis, strip in _tiles(component, min_area):
                # The strip in the frame of the image instead of the component's window.
                shift = axis[0] * left + axis[1] * top
                part_of[window][mask] = len(parts)
                parts.append(
                    _part(
                        class_id,
                        component,
                        mask,
                        (top, left),
                        labels.shape,
                        axis,
                        (strip[0] + shift, strip[1] + shift),
                    )
                )
    return parts, part_of


def _tiles(
    component: np.ndarray, min_area: int
) -> list[tuple[np.ndarray, tuple[float, float], tuple[float, float]]]:
    """The component, or slices across its main axis: (mask, axis, interval along the axis)."""
    y, x = component.nonzero()
    spread = np.cov(np.stack([x, y])) if len(x) > 1 else np.eye(2)
    axis = np.linalg.eigh(spread)[1][:, 1]  # of the largest eigenvalue
    along = x * axis[0] + y * axis[1]
    length = along.max() - along.min() + 1
    width = len(x) / length
    count = min(math.ceil(length / (_TILE_TO * width)), len(x) // min_area)
    direction = (float(axis[0]), float(axis[1]))
    if length < _TILE_FROM * width or count < 2:
        return [(component, direction, (-math.inf, math.inf))]
    edges = np.linspace(along.min(), along.max(), count + 1)
    edges[0], edges[-1] = -math.inf, math.inf
    tiles = []
    for begin, end in itertools.pairwise(edges):
        chosen = (along >= begin) & (along < end)
        if chosen.sum() >= min_area:
            mask = np.zeros_like(component)
            mask[y[chosen], x[chosen]] = True
            tiles.append((mask, direction, (float(begin), float(end))))
    return tiles


def _part(
    class_id: int,
    component: np.ndarray,
    mask: np.ndarray,
    corner: tuple[int, int],
    size: tuple[int, ...],
    axis: tuple[float, float],
    strip: tuple[float, float],
) -> _Part:
    """Prompts for ``mask``, a part of ``component``, in a window of the image at ``corner``."""
    from scipy import ndimage

    # Look at the part with its surroundings: up to the grown box, and as far as the blur reaches.
    y, x = mask.nonzero()
    low = np.array([y.min(), x.min()]) + corner
    high = np.array([y.max(), x.max()]) + corner
    grow = np.clip(0.1 * (high - low + 1), 1, 20)  # SAM's training jitters boxes by 10 %, 20 px
    last = np.array(size) - 1
    box_low, box_high = np.maximum(low - grow, 0), np.minimum(high + grow, last)
    reach = np.maximum(grow, 3 * _BLUR)
    view_low = np.maximum(np.floor(low - reach), 0).astype(int)
    view_high = np.minimum(np.ceil(high + reach), last).astype(int)

    def view(of: np.ndarray) -> np.ndarray:
        out = np.zeros(view_high - view_low + 1, bool)
        rows, columns = of.nonzero()
        rows, columns = rows + corner[0] - view_low[0], columns + corner[1] - view_low[1]
        seen = (rows >= 0) & (rows < out.shape[0]) & (columns >= 0) & (columns < out.shape[1])
        out[rows[seen], columns[seen]] = True
        return out

    part, whole = view(mask), view(component)
    # Padded: the border of the image is an outline too, points keep away from it.
    depth = ndimage.distance_transform_edt(np.pad(part, 1))[1:-1, 1:-1]
    inner = np.array(np.unravel_index(depth.argmax(), depth.shape)) + view_low
    away = ndimage.distance_transform_edt(~whole)
    in_box = np.zeros_like(whole)
    first = np.ceil(box_low).astype(int) - view_low
    stop = np.floor(box_high).astype(int) - view_low + 1
    in_box[first[0] : stop[0], first[1] : stop[1]] = True
    away = np.where(in_box, away, 0)
    outer = np.array(np.unravel_index(away.argmax(), away.shape)) + view_low

    blur = float(np.clip(depth.max() / 2, 1, _BLUR))
    distance = depth - ndimage.distance_transform_edt(~part)  # signed, > 0 inside
    logits = np.sign(distance) * _PROMPT_LOGIT * (1 - np.exp(-(distance**2) / (2 * blur**2)))
    return _Part(
        class_id=class_id,
        box=(float(box_low[1]), float(box_low[0]), float(box_high[1]), float(box_high[0])),
        points=((float(inner[1]), float(inner[0])), (float(outer[1]), float(outer[0]))),
        point_labels=(1, 0 if away.max() > 0 else -1),
        corner=(int(view_low[0]), int(view_low[1])),
        mask=logits.astype(np.float32),
        axis=axis,
        strip=strip,
    )


def _whole(mask: np.ndarray, box: Sequence[float]) -> _Part:
    """The prompts for an instance: its box, points on and off it, its mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    window = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    everywhere = (-math.inf, math.inf)
    part = _part(-1, window, window, (top, left), mask.shape, (1.0, 0.0), everywhere)
    # Boxes of instances name edges, SAM's the first and the last pixel.
    return replace(part, box=(box[0], box[1], box[2] - 1, box[3] - 1))


def _merged_again(
    prediction: Segmentation, segments: Segments, found: Instances, masks: Tensor
) -> Segments:
    """The panoptic map with new masks of those instances that have a segment in it."""
    things = set(found.labels.tolist())
    stuff = sorted({item.label for item in segments.items} - things)
    kept: list[int] = []
    visible: list[float] = []
    for item in segments.items:
        if item.label in things:
            shown = segments.map == item.id
            iou = (found.masks & shown).flatten(1).sum(1) / (found.masks | shown).flatten(1).sum(1)
            iou[found.labels != item.label] = 0
            iou[kept] = 0
            if iou.any():
                kept.append(int(iou.argmax()))
                visible.append(float(shown.sum() / found.masks[kept[-1]].sum()))
    # What was in front stays there: not the most certain first, but what hid least.
    merged = panoptic_merge(
        masks[kept],
        found.scores.new_tensor(visible),
        found.labels[kept],
        prediction.labels,
        stuff_classes=stuff,
        score_threshold=-math.inf,
        overlap_threshold=1.0,
        stuff_area=1,
    )
    return merged._replace(scores=found.scores[kept].float()).segments()[0]


def _prompts(parts: Sequence[_Part], size: tuple[int, int]) -> Prompts:
    masks = torch.full((len(parts), *size), -_PROMPT_LOGIT)
    for mask, part in zip(masks, parts, strict=True):
        (top, left), (height, width) = part.corner, part.mask.shape
        mask[top : top + height, left : left + width] = torch.from_numpy(part.mask)
    return Prompts(
        points=torch.tensor([part.points for part in parts]),
        point_labels=torch.tensor([part.point_labels for part in parts], dtype=torch.int32),
        boxes=torch.tensor([part.box for part in parts]),
        masks=masks,
    )


# --- the two segmenters -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Embedding:
    features: tuple[Tensor, ...]  # image embedding, for SAM 2 then the finer levels
    size: tuple[int, int]  # of the image
    scaled: tuple[int, int]  # of the image in the model's input


class _Backend(nn.Module):
    """What SAM and SAM 2 share: scaling of prompts and the choice among three masks."""

    model: Any  # the packages type little

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _scale(self, prompts: Prompts, embedding: _Embedding) -> tuple[Tensor, Tensor | None]:
        """Points [K, P, 2] and box corners [K, 2, 2] in pixels of the model's input."""
        (height, width), (new_height, new_width) = embedding.size, embedding.scaled
        factor = torch.tensor([new_width / width, new_height / height], device=self.device)
        points = prompts.points.to(self.device) * factor
        if prompts.boxes is None:
            return points, None
        return points, prompts.boxes.to(self.device).reshape(-1, 2, 2) * factor

    @staticmethod
    def _best(masks: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Of the three masks [K, 3, h, w] of each prompt the one of the best predicted IoU."""
        quality, best = quality.float().max(1)
        return masks[torch.arange(len(best), device=best.device), best].float(), quality


class SamBackend(_Backend):
    """``segment_anything.Sam``: the image keeps its aspect ratio and is padded to a square."""

    @torch.no_grad()
    def embed(self, image: Tensor) -> _Embedding:
        height, width = image.shape[1:]
        side = self.model.image_encoder.img_size
        factor = side / max(height, width)
        scaled = max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
        pixels = image.to(self.device).float()[None]
        pixels = F.interpolate(
            pixels, scaled, mode="bilinear", align_corners=False, antialias=True
        ).round()  # the model was trained on 8-bit images, resized as such
        features = self.model.image_encoder(self.model.preprocess(pixels))
        return _Embedding((features,), (height, width), scaled)

    @torch.no_grad()
    def predict(self, embedding: _Embedding, prompts: Prompts) -> tuple[Tensor, Tensor]:
        points, corners = self._scale(prompts, embedding)
        encoder = self.model.prompt_encoder
        masks = None
        if prompts.masks is not None:
            height, width = embedding.size
            square = max(height, width)
            padded = F.pad(
                prompts.masks.to(self.device),
                (0, square - width, 0, square - height),
                value=-_PROMPT_LOGIT,
            )
            masks = _resize(padded, encoder.mask_input_size)
        sparse, dense = encoder(
            points=(points, prompts.point_labels.to(self.device)),
            boxes=None if corners is None else corners.flatten(1),
            masks=masks,
        )
        return self._best(
            *self.model.mask_decoder(
                image_embeddings=embedding.features[0],
                image_pe=encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=True,
            )
        )

    @torch.no_grad()
    def upsample(self, embedding: _Embedding, logits: Tensor) -> Tensor:
        return self.model.postprocess_masks(logits[:, None], embedding.scaled, embedding.size)[:, 0]


class Sam2Backend(_Backend):
    """``sam2.modeling.sam2_base.SAM2Base`` on single images, which it squashes to a square."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # Part of the published normalisation, which sam2 keeps in its predictor.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], False)

    @torch.no_grad()
    def embed(self, image: Tensor) -> _Embedding:
        side = (self.model.image_size, self.model.image_size)
        pixels = _resize(image.to(self.device).float() / 255, side)[:, 0]
        levels = self.model.forward_image(((pixels - self.mean) / self.std)[None])["backbone_fpn"]
        *fine, coarse = levels[-self.model.num_feature_levels :]
        if self.model.directly_add_no_mem_embed:
            coarse = coarse + self.model.no_mem_embed.reshape(1, -1, 1, 1)
        height, width = image.shape[1:]
        return _Embedding((coarse, *fine), (height, width), side)

    @torch.no_grad()
    def predict(self, embedding: _Embedding, prompts: Prompts) -> tuple[Tensor, Tensor]:
        points, corners = self._scale(prompts, embedding)
        labels = prompts.point_labels.to(self.device)
        if corners is not None:  # SAM 2 takes a box as two points with labels of their own
            points = torch.cat([corners, points], 1)
            labels = torch.cat([labels.new_tensor([[2, 3]]).expand(len(labels), 2), labels], 1)
        encoder = self.model.sam_prompt_encoder
        masks = None
        if prompts.masks is not None:
            masks = _resize(prompts.masks.to(self.device), encoder.mask_input_size)
        sparse, dense = encoder(points=(points, labels), boxes=None, masks=masks)
        masks, quality, *_ = self.model.sam_mask_decoder(
            image_embeddings=embedding.features[0],
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
            repeat_image=True,
            high_res_features=list(embedding.features[1:]) or None,
        )
        return self._best(masks, quality)

    @torch.no_grad()
    def upsample(self, embedding: _Embedding, logits: Tensor) -> Tensor:
        return _resize(logits, embedding.size)[:, 0]


def _resize(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """[K, h, w] to [K, 1, *size], bilinear; shrinking averages, so that thin masks survive."""
    return F.interpolate(
        planes[:, None], size, mode="bilinear", align_corners=False, antialias=True
    )


# --- factories --------------------------------------------------------------------------------


def sam(
    *,
    weights: str | Path | None = "default",
    size: str | None = None,
    mode: Literal["prompt", "vote"] = "prompt",
    classes: Sequence[str] | str | None = None,
    min_area: int = 64,
    predicted_iou: float = 0.7,
    component_iou: float = 0.5,
    area_ratio: float = 2.0,
    agreement: float = 0.9,
    strength: float = 8.0,
    boundary: int = 8,
    margin: float = 0.5,
    points: int = 16,
    batch: int = 16,
) -> SamRefiner:
    """SAM (Kirillov et al., 2023) as a refiner.

    Args:
        weights: ``"vit_b"``, ``"vit_l"`` or ``"vit_h"``, which are downloaded once; a local file
            or URL; ``"default"``, the published weights of ``size``; None, random weights.
        size: one of these three names; by default what ``weights`` are of, else ``"vit_b"``.
        mode: this and the other options are those of `SamRefiner`.

    Raises:
        WeightsError: the weights are absent, unreachable, damaged or of another architecture.

    Example:
        >>> pyseg.build("fcn_resnet50+sam(mode='vote', weights='vit_l')")
    """
    options = {k: v for k, v in locals().items() if k not in ("weights", "size")}
    size, model = _load(weights, size, SAM_WEIGHTS, _sam_size, _build_sam)
    return SamRefiner(SamBackend(model), size=size, **options)


def sam2(
    *,
    weights: str | Path | None = "default",
    size: str | None = None,
    mode: Literal["prompt", "vote"] = "prompt",
    classes: Sequence[str] | str | None = None,
    min_area: int = 64,
    predicted_iou: float = 0.7,
    component_iou: float = 0.5,
    area_ratio: float = 2.0,
    agreement: float = 0.9,
    strength: float = 8.0,
    boundary: int = 8,
    margin: float = 0.5,
    points: int = 16,
    batch: int = 16,
) -> SamRefiner:
    """SAM 2.1 (Ravi et al., 2024), its image part, as a refiner.

    Args:
        weights: ``"tiny"``, ``"small"``, ``"base_plus"`` or ``"large"``, which are downloaded
            once; a local file or URL; ``"default"``, the published weights of ``size``; None,
            random weights.
        size: one of these four names; by default what ``weights`` are of, else ``"tiny"``.
        mode: this and the other options are those of `SamRefiner`.

    Raises:
        WeightsError: the weights are absent, unreachable, damaged or of another architecture.

    Example:
        >>> pyseg.build("fcn_resnet50+crf+sam2(classes=('car', 'person'))")
    """
    options = {k: v for k, v in locals().items() if k not in ("weights", "size")}
    size, model = _load(weights, size, SAM2_WEIGHTS, _sam2_size, _build_sam2)
    return SamRefiner(Sam2Backend(model), size=size, **options)


def _load(
    weights: str | Path | None,
    size: str | None,
    known: Mapping[str, Remote],
    recognise: Callable[[Mapping[str, Tensor]], str | None],
    build: Callable[[str], nn.Module],
) -> tuple[str, nn.Module]:
    smallest = next(iter(known))
    if size is not None and size not in known:
        raise ValueError(f"size must be one of {', '.join(known)}, got {size!r}")
    if weights is None:
        size = size or smallest
        return size, build(size)
    path = resolve((size or smallest) if weights == "default" else weights, known=known)
    state = load_state(path)
    size = size or recognise(state) or smallest
    model = build(size)
    load_into(model, state, path)
    return size, model


def _sam_size(state: Mapping[str, Tensor]) -> str | None:
    embedding = state.get("image_encoder.pos_embed")
    width = embedding.shape[-1] if embedding is not None else 0
    return {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}.get(width)


def _sam2_size(state: Mapping[str, Tensor]) -> str | None:
    blocks = {key.split(".")[3] for key in state if key.startswith("image_encoder.trunk.blocks.")}
    return {12: "tiny", 16: "small", 24: "base_plus", 48: "large"}.get(len(blocks))


def _build_sam(size: str) -> nn.Module:
    from segment_anything import sam_model_registry

    return sam_model_registry[size](checkpoint=None)


def _build_sam2(size: str) -> nn.Module:
    """The stock model of a size, without Hydra's global state, which a user's own Hydra needs.

    Importing sam2 initialises that state unless somebody has; building by way of it, as
    ``sam2.build_sam`` does, would fail wherever somebody has.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    found = GlobalHydra.instance().is_initialized()
    import sam2 as package

    if not found:
        GlobalHydra.instance().clear()
    letter = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}[size]
    config = OmegaConf.load(
        Path(package.__path__[0]) / f"configs/sam2.1/sam2.1_hiera_{letter}.yaml"
    )
    OmegaConf.resolve(config)
    return instantiate(config.model)
