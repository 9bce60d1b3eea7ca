"""`nano`: a small promptable segmenter that ships with its weights.

Prompt encoder and mask decoder are of Segment Anything's design (Kirillov et al., 2023,
arXiv:2304.02643) at half its width, with finer features for the masks as in SAM 2 (Ravi et al.,
2024, arXiv:2408.00714); prompts are drawn as maps besides. The
image encoder is EfficientNet-Lite0 (Tan & Le, 2019, arXiv:1905.11946;
Liu, 2020) under a feature pyramid (Lin et al., 2017, arXiv:1612.03144).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..efficientnet import MEAN, STD, LiteTrunk, conv
from ..weights import Remote, load_into, load_state, resolve
from .base import Prompts

SIDE = 512
"""Pixels of the long side of what the network sees."""

STRIDE = 4
"""Of its masks."""

BUNDLED = Path(__file__).parent.parent / "assets" / "nano.safetensors"

MASKS = 3  # per prompt: whole, part, part of the part
_COARSE = 16  # stride at which prompts meet the image
_GRID = 32  # sides of the network's input are multiples of it: its largest stride
_WIDTH = 128
_MIDDLE, _FINE = 32, 16  # channels of a prompt's features at strides 8 and 4
_SHARED = 32  # channels at stride 4 that all prompts of an image share
_HEADS = 4
_DRAWN = 6  # maps of `_draw`
_NEAR, _WIDE = 8.0, 64.0  # pixels
_SURE = 4.0  # logits of masks beyond which a network is sure
_LABELS = 5  # off, on the object; top left, bottom right corner of a box; no point
_CORNERS = (2, 3)
_NO_POINT = 4


@dataclass(frozen=True)
class Features:
    """What the image encoder makes of images [N, 3, H, W]; H and W are multiples of 32."""

    coarse: Tensor  # [N, H/16 * W/16, C]
    position: Tensor  # [N or 1, H/16 * W/16, C]: where these are
    origin: Tensor  # [N or 1, 2] x, y of the first pixel
    middle: Tensor  # [N, c, H/8, W/8]
    fine: Tensor  # [N, c, H/4, W/4]
    shared: Tensor  # [N, c, H/4, W/4]


class NanoNetwork(nn.Module):
    """Image encoder, prompt encoder and mask decoder.

    Coordinates are in pixels of the network's input, edges: the first pixel's centre is at 0.5.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.trunk = LiteTrunk()
        self.neck = _Neck(self.trunk.channels[1:])
        self.place = _Place(_WIDTH)
        self.points = nn.Parameter(torch.randn(_LABELS, _WIDTH))
        self.maps = _Maps(_WIDTH)
        self.decoder = _Decoder(_WIDTH)
        # Part of the network, not of its weights.
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], False)

    def embed(self, pixels: Tensor, origin: Tensor | None = None) -> Features:
        """Features of images.

        Args:
            pixels: [N, 3, H, W] RGB from 0 to 255, both sides multiples of 32.
            origin: [N, 2] x, y of their first pixel; by default 0.
        """
        normalised = (pixels.float() / 255 - self.mean) / self.std
        levels = self.trunk(normalised.contiguous(memory_format=torch.channels_last))
        coarse, middle, fine, shared = self.neck(levels[1:])
        height, width = coarse.shape[2:]
        y = (torch.arange(height, device=pixels.device) + 0.5) * _COARSE
        x = (torch.arange(width, device=pixels.device) + 0.5) * _COARSE
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(1, -1, 2)
        if origin is None:
            origin = grid.new_zeros(1, 2)
        position = self.place(grid + origin[:, None])
        return Features(coarse.flatten(2).mT, position, origin, middle, fine, shared)

    def decode(
        self, features: Features, points: Tensor, labels: Tensor, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Masks for prompts, as many for each image: the first ones are of the first image.

        Args:
            features: of N images.
            points: [K, P, 2] x, y, K a multiple of N.
            labels: [K, P]: 0 off, 1 on the object, 2 and 3 corners of a box, 4 no point.
            masks: [K, H/4, W/4] logits of an earlier answer, or None.

        Returns:
            Logits [K, 3, H/4, W/4] and the IoU [K, 3] that the network expects of each.
        """
        labels = labels.long()
        none = labels == _NO_POINT
        # Gathered by a product: the gradient of an index is a sum in any order.
        kind = F.one_hot(labels, _LABELS).to(self.points.dtype) @ self.points
        sparse = kind + self.place(points).masked_fill(none[..., None], 0.0)
        local = points - _repeat(features.origin, len(points))[:, None]
        drawn = _draw(local, labels, masks, features.fine.shape[2:])
        logits, iou = self.decoder(features, sparse, ~none, self.maps(drawn))
        return logits, iou

    def forward(
        self,
        pixels: Tensor,
        origin: Tensor,
        ask: Callable[[Tensor | None, Tensor | None], tuple[Tensor, Tensor, Tensor | None] | None],
    ) -> None:
        """Embeds images and answers prompts until there are no more: a training step.

        Args:
            pixels: [N, 3, H, W].
            origin: [N, 2].
            ask: called with None, then with the answers to what it gave, logits and IoU of
                `decode`; gives the next ``points``, ``labels`` and ``masks``, at last None.
        """
        features = self.embed(pixels, origin)
        prompt = ask(None, None)
        while prompt is not None:
            prompt = ask(*self.decode(features, *prompt))


class _Neck(nn.Module):
    """A feature pyramid from stride 32 up to stride 4, context of the whole image at its top."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        widths = (_SHARED, 64, _WIDTH, _WIDTH)  # at strides 4, 8, 16, 32
        self.context = nn.Conv2d(channels[-1], _WIDTH, 1)
        self.lateral = nn.ModuleList(
            conv(c, width, kernel=1) for c, width in zip(channels, widths, strict=True)
        )
        self.smooth = nn.ModuleList(conv(width, width, act=nn.ReLU) for width in widths)
        self.reduce = nn.ModuleList(
            conv(above, width, kernel=1) for width, above in itertools.pairwise(widths)
        )
        self.coarse = nn.Conv2d(_WIDTH, _WIDTH, 1)
        self.middle = nn.Conv2d(64, _MIDDLE, 1)
        self.fine = nn.Conv2d(_SHARED, _FINE, 1)

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        top = levels[-1]
        whole = self.context(F.adaptive_avg_pool2d(top, 1))
        found = [self.smooth[3](F.relu(self.lateral[3](top) + whole))]
        for i in (2, 1, 0):
            skip = self.lateral[i](levels[i])
            above = F.interpolate(
                self.reduce[i](found[-1]), skip.shape[2:], mode="bilinear", align_corners=False
            )
            found.append(self.smooth[i](F.relu(skip + above)))
        _, coarse, middle, fine = found
        return self.coarse(coarse), self.middle(middle), self.fine(fine), fine


class _Place(nn.Module):
    """Random Fourier features of places (Tancik et al., 2020, arXiv:2006.10739), as SAM's."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, width // 2))

    def forward(self, places: Tensor) -> Tensor:
        """[..., 2] x, y in pixels to [..., C]."""
        with torch.autocast(places.device.type, enabled=False):  # phases need their bits
            phase = 2 * math.pi * ((2 * places.float() / SIDE - 1) @ self.frequencies.float())
            return torch.cat([phase.sin(), phase.cos()], -1)


def _draw(points: Tensor, labels: Tensor, masks: Tensor | None, size: Sequence[int]) -> Tensor:
    """Prompts as maps at stride 4, [K, 6, h, w] from -1 to 1, 0 for what there is not.

    An earlier mask, how far inside a box, how near to the next click on and off the object, at two
    scales: as in interactive segmentation (Sofiiuk et al., 2022, arXiv:2102.06583). What SAM has
    to learn to find by attention a small network sees at once.
    """
    height, width = size
    y = (torch.arange(height, device=points.device) + 0.5) * STRIDE
    x = (torch.arange(width, device=points.device) + 0.5) * STRIDE
    far = points.new_full((len(points), 1, height, width), math.inf)
    down, across = points[..., 1, None] - y, points[..., 0, None] - x
    square = down.square()[..., None] + across.square()[..., None, :]  # [K, P, h, w]
    near = []
    for label in (1, 0):
        those = square.masked_fill((labels != label)[..., None, None], math.inf)
        least = torch.cat([far, those], 1).amin(1)
        near += [
            (-(least / (2 * _NEAR**2)).clamp(max=30)).exp(),  # no denormal numbers: they are slow
            (-(least.sqrt() / _WIDE).clamp(max=30)).exp(),
        ]
    low, high = (((labels == kind)[..., None] * points).sum(1)[..., None] for kind in _CORNERS)
    inside = torch.minimum(
        torch.minimum(y - low[:, 1], high[:, 1] - y)[..., None],
        torch.minimum(x - low[:, 0], high[:, 0] - x)[..., None, :],
    )
    inside = torch.tanh(inside / _NEAR) * (labels == _CORNERS[0]).any(1)[:, None, None]
    earlier = torch.zeros_like(inside) if masks is None else torch.tanh(masks.float() / _SURE)
    return torch.stack([earlier, inside, *near], 1)


class _Maps(nn.Module):
    """Drawn prompts at stride 4 to features at strides 16, 8 and 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = nn.Conv2d(_DRAWN, _FINE, 1)
        self.first = nn.Conv2d(_DRAWN, 16, 2, 2)
        self.middle = nn.Conv2d(16, _MIDDLE, 1)
        self.second = nn.Conv2d(16, 32, 2, 2)
        self.last = nn.Conv2d(32, width, 1)

    def forward(self, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[K, 6, h, w] to [K, h/4 * w/4, C], [K, c, h/2, w/2] and [K, c, h, w]."""
        drawn = drawn.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.first(drawn))
        coarse = self.last(F.relu(self.second(x)))
        return coarse.flatten(2).mT, self.middle(x), self.fine(drawn)


class _Attention(nn.Module):
    """Attention of several heads at a width of its own."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """[K, T, C] over [K, S, C]; ``mask`` [K, S]: what is attended to."""
        q, k, v = _heads(self.query(query)), _heads(self.key(key)), _heads(self.value(value))
        # By hand: few keys or few queries are what torch's fused kernels are slow at on CPUs.
        weights = (q * q.shape[-1] ** -0.5) @ k.mT
        if mask is not None:
            weights = weights.masked_fill(~mask[:, None, None], -math.inf)
        x = weights.softmax(-1).to(v.dtype) @ v
        out: Tensor = self.out(x.transpose(1, 2).flatten(2))
        return out


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (_HEADS, -1)).transpose(1, 2)


def _repeat(x: Tensor, count: int) -> Tensor:
    """Each item of [N, …] as often as makes ``count``."""
    if len(x) == 1:
        return x.expand(count, *x.shape[1:])
    return x if len(x) == count else x.repeat_interleave(count // len(x), 0)


class _Layer(nn.Module):
    """Tokens among themselves, tokens to image, tokens alone, image to tokens: SAM's order."""

    def __init__(self, width: int, *, first: bool) -> None:
        super().__init__()
        self.first = first  # the first adds no places: queries are places themselves
        self.among = _Attention(width, width)
        self.to_image = _Attention(width, width // 2)
        self.alone = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )
        self.to_tokens = _Attention(width, width // 2)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))

    def forward(
        self, tokens: Tensor, start: Tensor, known: Tensor, image: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.first:
            tokens = self.among(tokens, tokens, tokens, known)
        else:
            query = tokens + start
            tokens = tokens + self.among(query, query, tokens, known)
        tokens = self.norms[0](tokens)
        located = image + position
        tokens = tokens + self.to_image(tokens + start, located, image)
        tokens = self.norms[1](tokens)
        tokens = self.norms[2](tokens + self.alone(tokens))
        change = self.to_tokens(located, tokens + start, tokens, known)
        return tokens, self.norms[3](image + change)


class _Decoder(nn.Module):
    """Two layers between prompts and image, then masks as products of tokens and features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.asked = nn.Parameter(torch.randn(1 + MASKS, width))  # IoU, then each mask
        self.layers = nn.ModuleList(_Layer(width, first=i == 0) for i in range(2))
        self.last = _Attention(width, width // 2)
        self.norm = nn.LayerNorm(width)
        self.to_middle = nn.ConvTranspose2d(width, _MIDDLE, 2, 2)
        self.middle_norm = nn.GroupNorm(1, _MIDDLE)
        self.to_fine = nn.ConvTranspose2d(_MIDDLE, _FINE, 2, 2)
        self.weigh = nn.ModuleList(_mlp(width, _FINE + _SHARED + 1) for _ in range(MASKS))
        self.iou = _mlp(width, MASKS)

    def forward(
        self, features: Features, sparse: Tensor, known: Tensor, drawn: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """``sparse`` [K, P, C] of which ``known`` [K, P] count, ``drawn`` of `_Maps`."""
        dense, middle, fine = drawn
        count, images = len(sparse), len(features.coarse)
        start = torch.cat([self.asked.expand(count, -1, -1), sparse], 1)
        asked = known.new_ones(count, len(self.asked))
        known = torch.cat([asked, known], 1)
        image = _repeat(features.coarse, count) + dense
        position = _repeat(features.position, count)
        tokens = start
        for layer in self.layers:
            tokens, image = layer(tokens, start, known, image, position)
        tokens = self.norm(tokens + self.last(tokens + start, image + position, image))
        height, width = (side // 2 for side in features.middle.shape[2:])
        x = image.mT.unflatten(2, (height, width))
        per = count // images
        x = self.to_middle(x) + middle + _repeat(features.middle, count)
        x = self.to_fine(F.relu(self.middle_norm(x)))
        x = F.relu(x + fine + _repeat(features.fine, count))
        weights = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.weigh)], 1)
        own, shared, bias = weights.split([_FINE, _SHARED, 1], -1)
        logits = own @ x.flatten(2)
        common = shared.unflatten(0, (images, per)).flatten(1, 2) @ features.shared.flatten(2)
        logits = logits + common.unflatten(1, (per, MASKS)).flatten(0, 1) + bias
        iou = self.iou(tokens[:, 0]).float().sigmoid()
        return logits.unflatten(2, features.fine.shape[2:]).float(), iou


def _mlp(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, outputs),
    )


@dataclass(frozen=True)
class _Embedding:
    features: Features
    size: tuple[int, int]  # of the image
    scaled: tuple[int, int]  # of what the network saw


class NanoBackend(nn.Module):
    """`NanoNetwork` behind the protocol.

    The image's long side becomes 512 pixels, its short side what keeps the aspect ratio, rounded to
    a multiple of 32: nothing is padded, a photograph is squashed by a few percent at most, and an
    image of 4:3 costs three quarters of a square one.
    """

    least_iou = 0.9  # of a mask that a refiner takes: at SAM's 0.7 it did harm, see docs/sam.md

    def __init__(self, network: NanoNetwork) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.network.points.device

    @torch.no_grad()
    def embed(self, image: Tensor) -> _Embedding:
        size = (int(image.shape[1]), int(image.shape[2]))
        scaled = frame_of(size)
        pixels = _resize(image.to(self.device).float(), scaled).movedim(1, 0)
        return _Embedding(self.network.embed(pixels), size, scaled)

    @torch.no_grad()
    def predict(self, embedding: _Embedding, prompts: Prompts) -> tuple[Tensor, Tensor]:
        logits, iou = self.predict_all(embedding, prompts)
        iou, best = iou.max(1)
        return logits[torch.arange(len(best), device=best.device), best], iou

    @torch.no_grad()
    def predict_all(self, embedding: _Embedding, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """All three masks per prompt: logits [K, 3, h, w] and predicted IoU [K, 3]."""
        (height, width), (new_height, new_width) = embedding.size, embedding.scaled
        factor = torch.tensor([new_width / width, new_height / height], device=self.device)
        points = (prompts.points.to(self.device).float() + 0.5) * factor
        labels = prompts.point_labels.to(self.device).long()
        labels = labels.masked_fill(labels < 0, _NO_POINT)
        count = len(points)
        shape = [side // STRIDE for side in embedding.scaled]
        if not count:
            return points.new_zeros(0, MASKS, *shape), points.new_zeros(0, MASKS)
        if prompts.boxes is not None:
            corners = (prompts.boxes.to(self.device).float().reshape(-1, 2, 2) + 0.5) * factor
            kinds = torch.tensor([_CORNERS], device=self.device).expand(count, -1)
            points, labels = torch.cat([points, corners], 1), torch.cat([labels, kinds], 1)
        masks = None
        if prompts.masks is not None:
            given = prompts.masks.to(self.device).float()
            masks = _resize(given, (shape[0], shape[1]))[:, 0]
        return self.network.decode(embedding.features, points, labels, masks)

    def features(self, embedding: _Embedding) -> Tensor:
        """[C, h, w] of the whole image, at stride 16."""
        height, width = (side // _COARSE for side in embedding.scaled)
        return embedding.features.coarse[0].mT.unflatten(1, (height, width))

    @torch.no_grad()
    def upsample(self, embedding: _Embedding, logits: Tensor) -> Tensor:
        return _resize(logits, embedding.size)[:, 0]


def frame_of(size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) of what the network sees of an image of ``size``."""
    factor = SIDE / max(size)
    height, width = (max(_GRID, round(side * factor / _GRID) * _GRID) for side in size)
    return height, width


def _resize(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """[K, h, w] to [K, 1, *size], bilinear; shrinking averages, so that thin masks survive."""
    return F.interpolate(
        planes[:, None], size, mode="bilinear", align_corners=False, antialias=True
    )


def load_nano(weights: str | Path | None = "default") -> NanoBackend:
    """`nano` behind the protocol.

    Args:
        weights: ``"default"`` or ``"bundled"`` = those that ship with pyseg (for research and
            demonstration only, see ``pyseg/assets/nano.md``); a file or URL of
            `pyseg train-promptable`; None = random.

    Raises:
        WeightsError: the weights cannot be read or are of another network.

    Example:
        >>> nano = load_nano()
        >>> embedding = nano.embed(image)
        >>> one = Prompts(points=torch.tensor([[[40.0, 30.0]]]), point_labels=torch.tensor([[1]]))
        >>> logits, predicted_iou = nano.predict(embedding, one)
        >>> mask = nano.upsample(embedding, logits)[0] > 0
    """
    network = NanoNetwork()
    if weights is not None:
        known = {name: Remote(BUNDLED.as_uri()) for name in ("default", "bundled")}
        path = resolve(weights, known=known)
        load_into(network, load_state(path), path)
    return NanoBackend(network)
