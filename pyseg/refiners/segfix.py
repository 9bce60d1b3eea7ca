"""SegFix: a label next to a boundary is replaced by the one that lies inward of it.

After Yuan, Xie, Chen and Wang, "SegFix: model-agnostic boundary refinement for segmentation" (ECCV
2020): networks err near boundaries more than within regions, so a small network tells from the
image alone where boundaries are and which way leads from them to the inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import weights as weight_files
from ..ops import boundary_mask
from ..regions import VOID, Segments, void_label
from ..types import Segmentation
from ..weights import Remote

BUNDLED = Path(__file__).parent.parent / "assets" / "segfix_camvid.safetensors"
WIDTH = 3  # pixels that a boundary is wide on either side, in training
# (dy, dx) of direction k, which points 45 k degrees from the x axis towards the y axis.
DIRECTIONS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))
_STOP = len(DIRECTIONS)  # stands for no direction, as do the seven numbers after it
_MOVES = (*DIRECTIONS, *[(0, 0)] * _STOP)
# What becomes of each of these numbers at the top, bottom, left and right border.
_ALONG = [
    [_MOVES.index((0 if dy == out[0] else dy, 0 if dx == out[1] else dx)) for dy, dx in _MOVES]
    for out in ((-1, None), (1, None), (None, -1), (None, 1))
]
MAX_STEPS = 1000
_SEEDS = 0.1  # share of boundary pixels that an untrained network begins with
_KEY = 64  # bytes that the name of a network's features takes in a file of weights


def boundary_targets(
    labels: Tensor, width: int = WIDTH, ignore_index: int = VOID
) -> tuple[Tensor, Tensor]:
    """What the network learns: where boundaries are, and the direction away from them.

    A pixel belongs to a boundary if one of another class is at most ``width`` away. The direction
    is that of the gradient of the distance to the other classes, by Sobel's filter, in eight parts
    of the circle. Ground truth says nothing of what is next to void: where void is within
    ``width`` and no other class, it is unknown whether there is a boundary.

    Args:
        labels: [N, H, W] integers.
        width: in pixels, at least 1.
        ignore_index: label of pixels without ground truth.

    Returns:
        Boundary [N, H, W] uint8: 1, 0, or 255 = unknown; and direction [N, H, W] uint8: an index
        into `DIRECTIONS`, or 255 where there is no boundary or no direction, as in the middle of
        what is thin.
    """
    known = labels != ignore_index
    # Up to 1.5 further, where the gradient at the rim looks.
    distance = _distance_to_others(labels, known, width + 2)
    # Signed, from the border that runs between pixels.
    depth = distance.clamp(max=width + 2.0) - 0.5
    around = F.pad(depth, (1, 1, 1, 1))
    classes = F.pad(labels, (1, 1, 1, 1), value=ignore_index)
    height, width_ = labels.shape[1:]
    down, right = torch.zeros_like(depth), torch.zeros_like(depth)
    for dy, dx in DIRECTIONS:
        window = (slice(None), slice(1 + dy, 1 + dy + height), slice(1 + dx, 1 + dx + width_))
        other, there = classes[window], around[window]
        seen = torch.where(other == labels, there, -there)
        # The border of the image, and void, are no boundary: it goes on there as it is here.
        seen = torch.where(other == ignore_index, depth, seen)
        weight = 2.0 if dy == 0 or dx == 0 else 1.0
        if dy:
            down.add_(seen, alpha=weight * dy)
        if dx:
            right.add_(seen, alpha=weight * dx)
    boundary = known & (distance <= width)
    steep = down.abs() + right.abs() > 1e-3
    part = torch.atan2(down, right).mul_(4 / math.pi).round_().remainder_(8).to(torch.uint8)
    direction = torch.where(boundary & steep, part, VOID)
    reach = 2 * width + 1
    near_void = F.max_pool2d((~known).float()[:, None], reach, 1, width)[:, 0] > 0
    unknown = ~known | (near_void & ~boundary)
    return torch.where(unknown, VOID, boundary.to(torch.uint8)), direction


def _distance_to_others(labels: Tensor, known: Tensor, reach: int) -> Tensor:
    """Distance of the pixels from the nearest one of another class, [N, H, W]; inf beyond reach."""
    height, width = labels.shape[1:]
    half = [
        (dy, dx)
        for dy in range(min(reach + 1, height))
        for dx in range(-min(reach, width - 1), min(reach + 1, width))
        if (dy > 0 or dx > 0) and dy * dy + dx * dx <= reach * reach
    ]
    squares = sorted({dy * dy + dx * dx for dy, dx in half})
    rank = {square: index for index, square in enumerate(squares)}
    # Ranks of distances fit into bytes up to a reach of 30; torch compares bytes the fastest.
    small = len(squares) < 256
    last = len(squares)
    nearest = labels.new_full(labels.shape, last, dtype=torch.uint8 if small else torch.int32)
    for dy, dx in half:
        here = (
            slice(None),
            slice(0, height - dy),
            slice(max(0, -dx), width - max(0, dx)),
        )
        there = (slice(None), slice(dy, height), slice(max(0, dx), width + min(0, dx)))
        differs = (labels[here] != labels[there]) & known[here] & known[there]
        # Where they differ the rank, else the last.
        found = last - differs.to(nearest.dtype) * (last - rank[dy * dy + dx * dx])
        nearest[here] = torch.minimum(nearest[here], found)
        nearest[there] = torch.minimum(nearest[there], found)
    table = torch.tensor([*(math.sqrt(s) for s in squares), math.inf], device=labels.device)
    return table[nearest.long()]


def inward(
    boundary: Tensor, direction: Tensor, steps: int, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Follows the directions from the pixels of boundaries until off these.

    At the border of the image a path goes on along it.

    Args:
        boundary: [H, W] bool.
        direction: [H, W] uint8 indices into `DIRECTIONS`; others, such as 255, stop there.
        steps: at most so many, each to one of the eight neighbours.
        start: [H, W] bool, pixels to begin at, as far as they are on a boundary; None = all.

    Returns:
        Flat indices of the pixels that have got off, and of where: both [K] int64.
    """
    # Off the boundary, too, paths stop, by a number from `_STOP` on.
    way = direction.clamp(max=_STOP) | (~boundary).to(torch.uint8) * _STOP
    if way.numel():
        borders = (way[0], way[-1], way[:, 0], way[:, -1])
        for border, along in zip(borders, torch.tensor(_ALONG, device=way.device), strict=True):
            border.copy_(along[border.long()])
    way, on = way.flatten(), boundary.flatten()
    width = boundary.shape[1]
    moves = torch.tensor([dy * width + dx for dy, dx in _MOVES], device=way.device)
    begin = (boundary if start is None else boundary & start).flatten().nonzero().flatten()
    place = begin
    for _ in range(min(steps, MAX_STEPS)):
        place = place + moves.index_select(0, way.index_select(0, place).int())
    off = ~on.index_select(0, place)
    return begin[off], place[off]


class BoundaryHead(nn.Module):
    """Maps features of an image to a boundary's logit and those of eight directions.

    Top-down as in Lin et al., "Feature pyramid networks" (2017): each map is brought to ``width``
    channels, what comes from the coarser ones is added, and a 3x3 convolution smooths the sum.

    Args:
        channels: of the feature maps, the finest first.
        width: channels in the head.
        fine: smooth the sum at the finest map, too, which is most of the cost; maps of a decoder
            have been smoothed there.
    """

    def __init__(self, channels: Sequence[int], width: int = 32, *, fine: bool = False) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.project = nn.ModuleList(nn.Conv2d(c, width, 1, bias=False) for c in self.channels)
        self.norm = nn.ModuleList(nn.BatchNorm2d(width) for _ in self.channels)
        self.smooth = nn.ModuleList(
            _conv(width, width) if k or fine else nn.Identity() for k in range(len(self.channels))
        )
        self.out = nn.Conv2d(width, 1 + len(DIRECTIONS), 1)
        nn.init.zeros_(self.out.weight[:1])
        assert self.out.bias is not None
        nn.init.constant_(self.out.bias[:1], math.log(_SEEDS / (1 - _SEEDS)))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps [N, c, h, w], each at its own stride, to [N, 9, h, w] of the finest."""
        total: Tensor | None = None
        for k in reversed(range(len(self.channels))):
            norm = self.norm[k]
            if self.training:
                part = self.project[k](features[k])
                if total is not None:
                    part = part + _resize(total, part)
                part = norm(part)
            else:  # the same, with the normalisation within the sum's parts
                weight, bias, scale = _folded(self.project[k], norm)
                if total is None:
                    part = _pointwise(features[k], weight, bias)
                else:  # the bias where there are fewest pixels, the product added in place
                    coarse = torch.addcmul(bias[:, None, None], total, scale[:, None, None])
                    part = _add_pointwise(_resize(coarse, features[k]), features[k], weight)
            total = self.smooth[k](F.relu_(part))
        assert total is not None and self.out.bias is not None
        planes = self.out.weight[:, :, 0, 0] @ total.flatten(2) + self.out.bias[:, None]
        return planes.unflatten(2, total.shape[2:])  # plane by plane, as they are read


class BoundaryNetwork(nn.Module):
    """A small encoder of its own and a `BoundaryHead`, for images of any source.

    Dense 3x3 convolutions and residual blocks (He et al., 2016), as CPUs like them.

    Args:
        widths: channels at strides 2, 4, 8 and 16.
        depths: residual blocks at strides 4, 8 and 16.
    """

    def __init__(
        self, widths: Sequence[int] = (16, 32, 64, 96), depths: Sequence[int] = (1, 2, 2)
    ) -> None:
        super().__init__()
        self.stem = _conv(3, widths[0], stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(_conv(a, b, stride=2), *(_Block(b) for _ in range(depth)))
            for a, b, depth in zip(widths, widths[1:], depths, strict=False)
        )
        self.head = BoundaryHead(widths, fine=True)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] RGB uint8 to [N, 9, h, w], at stride 2."""
        x = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        features = [self.stem(x)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return self.head(features)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _conv(width, width)
        self.second = _conv(width, width, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class _Normed(nn.Sequential):
    """A convolution and its normalisation, in use as one."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        convolution = self[0]
        assert isinstance(convolution, nn.Conv2d)
        weight, bias, _ = _folded(convolution, self[1])
        x = F.conv2d(x, weight, bias, convolution.stride, convolution.padding)
        return F.relu_(x) if len(self) > 2 else x


def _conv(inputs: int, outputs: int, *, stride: int = 1, act: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)]
    return _Normed(*layers, *([nn.ReLU(inplace=True)] if act else []))


def _folded(convolution: Any, norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias of a convolution with its normalisation, and what that multiplies by."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = convolution.weight * scale[:, None, None, None]
    weight = weight.contiguous(memory_format=torch.channels_last)
    return weight, norm.bias - norm.running_mean * scale, scale


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution as a product of matrices: on one thread torch's own first copies ``x``."""
    return F.linear(x.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)


def _add_pointwise(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution added to ``total``, which is written into."""
    pixels, given = (each.permute(0, 2, 3, 1) for each in (total.to(x.dtype), x))
    summed = pixels.reshape(-1, pixels.shape[3])
    summed.addmm_(given.reshape(-1, given.shape[3]), weight[:, :, 0, 0].T.to(x.dtype))
    return summed.view(pixels.shape).permute(0, 3, 1, 2)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


class SegFix(nn.Module):
    """Moves labels near boundaries to where the image shows these, whatever the model was.

    From a pixel that the network says is on a boundary, its directions are followed, up to
    ``steps`` pixels, until off the boundary; the pixel then takes the label found there. A path
    that does not get off moves nothing.

    Wherever the label of a pixel changes, its logits become those of the place that the label
    comes from: labels are their maximum still, and no class gets a logit that the model did not
    give. Logits are then at full resolution. Panoptic segments and masks of instances move in the
    same way; scores and boxes stay, and void is neither moved nor spread. Where nothing moves, the
    prediction is returned as it was.

    Behind a model that offers its features, such as `streetnet`, and whose weights are those that
    the refiner was trained with, it takes these, which saves an encoder; behind any other model
    a small encoder of its own looks at the image.

    Args:
        boundary: probability from which a pixel counts as on a boundary.
        steps: longest path, in pixels; 0 leaves the prediction as it is.
        margin: where a prediction has logits, only pixels change whose two best classes differ by
            less than this in probability; above 1 all.
        direction: where there are none, and for masks and segments, paths follow only directions
            of at least this probability; 0 follows all.
        protect: pixels keep their label where it is thinner than 2 ``protect`` + 1 pixels, as of
            poles and signs; 0 protects nothing.
        shared: take a model's features, where they are those that the refiner was trained with.
        weights: ``"default"`` = those that ship with pyseg, trained on CamVid (for research and
            demonstration only, see ``pyseg/assets/segfix_camvid.md``); a path or URL = those of
            `pyseg train-refiner segfix`; None = random.
        channels: of the model's feature maps, where ``weights`` do not tell.

    Example:
        >>> pyseg.build("streetnet+segfix")("street.jpg").labels
        >>> pyseg.build("fcn_resnet50+segfix(boundary=0.7)+crf")
    """

    source: Tensor | None

    def __init__(
        self,
        *,
        boundary: float = 0.5,
        steps: int = 4,
        margin: float = 0.3,
        direction: float = 0.6,
        protect: int = 2,
        shared: bool = True,
        weights: str | Path | None = "default",
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("boundary", boundary), ("direction", direction)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability, from 0 to 1, got {value}")
        whole = isinstance(steps, int) and not isinstance(steps, bool)
        if not whole or not 0 <= steps <= MAX_STEPS:
            raise ValueError(f"steps must be a whole number from 0 to {MAX_STEPS}, got {steps}")
        if not isinstance(protect, int) or isinstance(protect, bool) or not 0 <= protect < 1000:
            raise ValueError(f"protect must be a whole number from 0 to 999, got {protect}")
        if not margin >= 0:
            raise ValueError(f"margin must be 0 or more, got {margin}")
        self.boundary, self.direction, self.steps = boundary, direction, steps
        self.margin, self.protect, self.shared = margin, protect, shared
        state, path = None, None
        if weights is not None:
            known = {"default": Remote(BUNDLED.as_uri())}
            path = weight_files.resolve(weights, known=known)
            state = weight_files.load_state(path)
            channels = _channels(state) or channels
        self.network = BoundaryNetwork()
        self.head: BoundaryHead | None = None
        self.register_buffer("source", None)
        if channels is not None:
            self.set_head(BoundaryHead(channels), "")
        if state is not None and path is not None:
            weight_files.load_into(self, state, path)
        self.eval()  # a pipeline takes stages in evaluation mode

    def set_head(self, head: BoundaryHead, key: str) -> None:
        """Takes a head for the features that a model offers under ``key``."""
        self.head = head
        name = key.encode().ljust(_KEY)
        if len(name) > _KEY:
            raise ValueError(f"the name of features may have {_KEY} bytes, got {key!r}")
        self.source = torch.tensor(list(name), dtype=torch.uint8)

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.config().items())
        return f"SegFix({options})"

    def config(self) -> dict[str, Any]:
        """The options that rebuild it without its weights."""
        return {
            "boundary": self.boundary,
            "steps": self.steps,
            "margin": self.margin,
            "direction": self.direction,
            "protect": self.protect,
            "shared": self.shared,
            "channels": None if self.head is None else self.head.channels,
        }

    @property
    def wanted_features(self) -> tuple[str, ...]:
        """Names of the features that it takes from a model: see `pyseg.types`."""
        if self.source is None or not self.shared or not self.steps:
            return ()
        return (bytes(self.source.tolist()).decode().strip(),)

    @torch.no_grad()
    def refine(self, image: Tensor, prediction: Segmentation) -> Segmentation:
        """Refines one prediction.

        Args:
            image: [3, H, W] uint8 RGB.
            prediction: of this image; of logits, labels, segments and instances what it has.

        Returns:
            A prediction that has the same; the same object where nothing moves.

        Raises:
            ValueError: the image is of another size than the prediction.
        """
        size = tuple(image.shape[1:])
        if size != tuple(prediction.size):
            raise ValueError(
                f"image is {list(size)} but the prediction is of an image of "
                f"{list(prediction.size)}"
            )
        if not self.steps or not min(size):
            return prediction
        boundary, direction, probability = self.predict(image, prediction)
        paths = None
        if prediction.logits is not None:
            # Further off, all labels are the same.
            near = boundary_mask(prediction.labels[None], self.steps, border=False)[0]
            paths = inward(boundary, direction, self.steps, near)

        def certain() -> Paths:
            sure = probability() >= self.direction
            return inward(boundary, torch.where(sure, direction, _STOP), self.steps)

        return _moved(
            prediction,
            paths,
            certain,
            margin=self.margin,
            protect=self.protect,
        )

    def predict(
        self, image: Tensor, prediction: Segmentation
    ) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
        """Boundary [H, W] bool, direction [H, W] uint8, and what gives its probability [H, W]."""
        features = None
        for key in self.wanted_features:
            features = (prediction.features or {}).get(key)
        logits = prediction.logits
        half = torch.bfloat16
        given = features[0] if features else logits
        narrow = given is not None and given.dtype == half
        with torch.autocast(image.device.type, half, enabled=narrow):
            if features is not None and self.head is not None:
                out = self.head([feature[None] for feature in features])
            else:
                out = self.network(image[None])
        size = tuple(image.shape[1:])
        out = out.float()
        edge = F.interpolate(out[:, :1], size, mode="bilinear", align_corners=False)[0, 0]
        least = torch.tensor(self.boundary, dtype=torch.float64).logit()
        ways = out[:, 1:]
        best = ways.amax(1, keepdim=True)
        # The first of the best, as `argmax`, in a tenth of its time.
        rank = torch.arange(len(DIRECTIONS), 0, -1.0, device=out.device)[:, None, None]
        way = len(DIRECTIONS) - ((ways == best) * rank).amax(1, keepdim=True)
        direction = F.interpolate(way, size, mode="nearest-exact")[0, 0].to(torch.uint8)

        def probability() -> Tensor:
            sure = (best - ways.logsumexp(1, keepdim=True)).exp()
            return F.interpolate(sure, size, mode="nearest-exact")[0, 0]

        return edge >= least.item(), direction, probability


def _channels(state: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """Of the feature maps that a file's head takes."""
    found: list[int] = []
    while (weight := state.get(f"head.project.{len(found)}.weight")) is not None:
        found.append(weight.shape[1])
    return tuple(found) or None


Paths = tuple[Tensor, Tensor]  # flat indices of pixels, and of where what they get comes from


def _moved(
    prediction: Segmentation,
    paths: Paths | None,
    certain: Callable[[], Paths],
    *,
    margin: float,
    protect: int,
) -> Segmentation:
    """A prediction with pixels changed: by ``paths`` where it has logits, else by ``certain``."""
    changed: dict[str, Any] = {}
    segments, instances, logits = prediction.segments, prediction.instances, prediction.logits
    by_labels = logits is None and prediction._labels is not None
    if segments is not None or instances is not None or by_labels:
        sure = certain()
    if segments is not None:
        where, whence = _moving(segments.map[None], sure, 0, protect)[0]
        if len(where):
            changed["segments"] = _moved_segments(segments, where, whence)
    if instances is not None:
        masks = instances.masks.clone()
        chosen = _moving(masks.to(torch.uint8), sure, None, protect)
        for mask, (where, whence) in zip(masks.flatten(1), chosen, strict=True):
            # A mask of which nothing would be left stays.
            if len(where) and not (len(where) == mask.sum() and mask[where].all()):
                mask[where] = mask[whence]
                changed["instances"] = replace(instances, masks=masks)
    if logits is not None or by_labels:
        void, _ = void_label(len(prediction.classes))
        labels = prediction.labels
        given = sure if paths is None else paths
        where, whence = _moving(labels[None], given, void, protect)[0]
        if logits is not None and len(where):
            # Pixel by pixel, which torch enlarges in half of the time. `contiguous` of that format
            # would leave a stride of the batch as it is with which torch does not see it.
            full = logits.float().permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
            if tuple(full.shape[2:]) != tuple(prediction.size):
                full = F.interpolate(full, prediction.size, mode="bilinear", align_corners=False)
            elif full.data_ptr() == logits.data_ptr():
                full = full.clone()
            pixels = full[0].flatten(1).T
            if margin <= 1:
                best = pixels[where].softmax(1).topk(min(2, len(full[0])), 1).values
                unsure = best[:, 0] - best[:, -1] < margin
                where, whence = where[unsure], whence[unsure]
            if len(where):
                pixels[where] = pixels[whence]
                changed["logits"] = full[0]
        if len(where):
            labels = labels.flatten().clone()
            labels[where] = labels[whence]
            changed["_labels"] = labels.reshape(prediction.size)
    return replace(prediction, **changed) if changed else prediction


def _moving(maps: Tensor, paths: Paths, void: int | None, protect: int) -> list[Paths]:
    """For each map [N, H, W] of labels the paths that change it."""
    moved, source = paths
    chosen = []
    for labels, thick in zip(maps.flatten(1), _thick(maps, protect).flatten(1), strict=True):
        here, there = labels[moved], labels[source]
        change = (here != there) & thick[moved]
        if void is not None:
            change &= (here != void) & (there != void)
        chosen.append((moved[change], source[change]))
    return chosen


def _thick(maps: Tensor, radius: int) -> Tensor:
    """Pixels in a square of side 2 ``radius`` + 1 that is all of one label, [N, H, W] bool.

    Squares may reach over the border of the image.
    """
    if radius == 0:
        return torch.ones_like(maps, dtype=torch.bool)
    centres = ~boundary_mask(maps, radius, border=False)
    return centres | boundary_mask(centres.to(torch.uint8), radius, border=False)


def _moved_segments(segments: Segments, where: Tensor, whence: Tensor) -> Segments:
    """A segment of which nothing is left is dropped."""
    ids = segments.map.flatten().clone()
    ids[where] = ids[whence]
    found, counts = ids.unique(return_counts=True)
    areas = dict(zip(found.tolist(), counts.tolist(), strict=True))
    items = [replace(item, area=areas[item.id]) for item in segments.items if item.id in areas]
    return Segments(ids.reshape(segments.map.shape), tuple(items))
