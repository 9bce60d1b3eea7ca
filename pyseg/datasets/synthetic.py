"""`StreetScenes`: procedural street-like images with semantic, instance and panoptic labels."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..types import VOID, Sample, Segment, Segments
from .pairs import instances_of

STUFF = ("sky", "building", "road", "pavement", "tree")
THINGS = ("car", "person", "bicycle")
CLASSES = STUFF + THINGS
PALETTE = (
    (70, 130, 180),
    (70, 70, 70),
    (128, 64, 128),
    (244, 35, 232),
    (107, 142, 35),
    (0, 0, 142),
    (220, 20, 60),
    (119, 11, 32),
)
SMALLEST = 24  # visible pixels of an object that keeps its own label; smaller ones are void


class StreetScenes:
    """Random street scenes seen from the road: labels are exact, because the scene is drawn.

    Sky, two rows of buildings, road and pavements in perspective, trees, and cars, people and
    bicycles at random distances, sized by them, nearer ones over farther ones; then light, haze,
    blur and noise. Sample k of one split and seed is always the same, whatever the length. For
    tests, for comparing methods on equal terms and for learning how the parts fit; it replaces no
    real data.

    Args:
        split: ``"train"``, ``"val"`` or any other name; splits share no scene.
        length: number of samples.
        size: (height, width) of the images in pixels, each at least 32.
        seed: sets of different seeds share no scene.
        objects: (fewest, most) objects of a scene before some cover others.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> scenes = StreetScenes(length=4, size=(64, 128))
        >>> scenes[0].image.shape, len(scenes[0].segments.items) > 3
        (torch.Size([3, 64, 128]), True)
    """

    classes = CLASSES
    palette = PALETTE
    things = THINGS

    def __init__(
        self,
        split: str = "train",
        *,
        length: int = 100,
        size: tuple[int, int] = (256, 512),
        seed: int = 0,
        objects: tuple[int, int] = (3, 12),
    ) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        if len(size) != 2 or min(size) < 32:
            raise ValueError(f"size must be (height, width), both at least 32, got {size}")
        if not 0 <= objects[0] <= objects[1]:
            raise ValueError(f"objects must be (fewest, most), got {objects}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        self.length, self.size, self.seed, self.objects = length, tuple(size), seed, objects
        self.split = split

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} is out of range for {self.length} scenes")
        index %= self.length
        rng = np.random.default_rng([self.seed, zlib.crc32(self.split.encode()), index])
        scene = _Scene(rng, *self.size)
        scene.draw_background()
        scene.draw_objects(int(scene.rng.integers(self.objects[0], self.objects[1] + 1)))
        return scene.sample(f"{self.split}_{self.seed}_{index:05d}")


class _Scene:
    """One scene on three canvases: colours, classes, and a number per object."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng, self.height, self.width = rng, height, width
        self.horizon = height * rng.uniform(0.35, 0.5)
        self.vanishing = width * rng.uniform(0.35, 0.65)
        self.picture = Image.new("RGB", (width, height))
        self.labels = Image.new("L", (width, height), VOID)
        self.numbers = Image.new("I", (width, height), 0)
        self.pens = [ImageDraw.Draw(c) for c in (self.picture, self.labels, self.numbers)]
        self.kinds: list[int] = []  # class of object 1, 2, ...

    def colour(self, low: tuple[int, int, int], high: tuple[int, int, int]) -> tuple[int, ...]:
        return tuple(int(c) for c in self.rng.uniform(low, high))

    def paint(self, shape: str, points, colour, label: int, number: int = 0) -> None:
        for pen, fill in zip(self.pens, (colour, label, number), strict=True):
            getattr(pen, shape)(points, fill=fill)

    def draw_background(self) -> None:
        rng, w, h, horizon = self.rng, self.width, self.height, self.horizon
        sky = self.colour((90, 120, 160), (190, 210, 240))
        self.paint("rectangle", [0, 0, w, h], sky, CLASSES.index("sky"))
        for _ in range(int(rng.integers(0, 4))):  # clouds are sky
            x, y, r = rng.uniform(0, w), rng.uniform(0, horizon * 0.5), rng.uniform(0.03, 0.1) * w
            white = self.colour((200, 200, 200), (250, 250, 250))
            self.paint("ellipse", [x - r, y - r / 3, x + r, y + r / 3], white, 0)
        grey = self.colour((105, 100, 95), (165, 160, 150))
        self.paint("rectangle", [0, horizon, w, h], grey, CLASSES.index("pavement"))
        left, right = rng.uniform(-0.5, 0.15) * w, rng.uniform(0.85, 1.5) * w
        tar = self.colour((50, 50, 52), (95, 95, 100))
        corners = [(self.vanishing, horizon), (right, h), (left, h)]
        self.paint("polygon", corners, tar, CLASSES.index("road"))
        for k in range(6):  # dashes of the lane marking belong to the road
            near, far = (horizon + (h - horizon) * (k + part) / 6 for part in (0.9, 0.4))
            middle = [
                self.vanishing
                + ((left + right) / 2 - self.vanishing) * (y - horizon) / (h - horizon)
                for y in (far, near)
            ]
            wide = [0.008 * w * (y - horizon) / (h - horizon) + 0.5 for y in (far, near)]
            dash = [
                (middle[0] - wide[0], far),
                (middle[0] + wide[0], far),
                (middle[1] + wide[1], near),
                (middle[1] - wide[1], near),
            ]
            self.paint("polygon", dash, (200, 200, 195), CLASSES.index("road"))
        for side in (-1, 1):
            self.draw_row(side)

    def draw_row(self, side: int) -> None:
        """Buildings and trees on one side of the road, far ones first."""
        rng, w = self.rng, self.width
        edge = 0 if side < 0 else w
        steps = int(rng.integers(3, 7))
        for k in range(steps):
            # From the vanishing point out to the edge of the image.
            a, b = (
                self.vanishing + (edge - self.vanishing) * (0.12 + 0.88 * part / steps)
                for part in (k, k + 1)
            )
            nearness = (k + 1) / steps
            x0, x1 = min(a, b), max(a, b)
            base = self.horizon + nearness * 0.06 * self.height
            if rng.random() < 0.75:
                top = self.horizon * (1 - rng.uniform(0.35, 0.95) * nearness)
                wall = self.colour((70, 55, 50), (200, 180, 165))
                label = CLASSES.index("building")
                self.paint("rectangle", [x0, top, x1, base], wall, label)
                dark = tuple(c // 2 for c in wall)
                cell = max(3.0, 0.05 * w * nearness)
                for y in np.arange(top + cell / 3, base - cell, cell):
                    for x in np.arange(x0 + cell / 3, x1 - cell / 2, cell):
                        window = [x, y, x + cell * 0.45, y + cell * 0.55]
                        self.paint("rectangle", window, dark, label)
            if rng.random() < 0.5:
                self.draw_tree(rng.uniform(x0, x1), base, 0.25 * self.height * nearness)

    def draw_tree(self, x: float, base: float, tall: float) -> None:
        label = CLASSES.index("tree")
        trunk = self.colour((60, 40, 25), (95, 70, 50))
        self.paint("rectangle", [x - tall / 20, base - tall / 2, x + tall / 20, base], trunk, label)
        leaf = np.array(self.colour((30, 70, 20), (80, 130, 60)))
        for _ in range(7):
            cx, cy = x + self.rng.normal(0, tall / 6), base - tall * self.rng.uniform(0.5, 0.95)
            r = tall * self.rng.uniform(0.12, 0.22)
            shade = tuple(int(c) for c in np.clip(leaf + self.rng.normal(0, 10), 0, 255))
            self.paint("ellipse", [cx - r, cy - r, cx + r, cy + r], shade, label)

    def draw_objects(self, count: int) -> None:
        # How far down the ground an object stands says how large it is; far ones first.
        for depth in np.sort(self.rng.uniform(0.06, 0.95, count) ** 1.3):
            kind = str(self.rng.choice(THINGS, p=(0.5, 0.3, 0.2)))
            base = self.horizon + depth * (self.height - self.horizon)
            tall = 0.06 * self.height + depth * 0.5 * self.height  # of a person
            number = len(self.kinds) + 1
            spread = 0.95 if kind == "person" else 0.75
            x = self.vanishing + self.rng.uniform(-spread, spread) * self.width * (0.25 + depth) / 2
            {"car": self.draw_car, "person": self.draw_person, "bicycle": self.draw_bicycle}[kind](
                x, base, tall, CLASSES.index(kind), number
            )
            self.kinds.append(CLASSES.index(kind))

    def draw_car(self, x: float, base: float, tall: float, label: int, number: int) -> None:
        wide, high = tall * self.rng.uniform(1.3, 2.0), tall * self.rng.uniform(0.7, 0.85)
        body = self.colour((20, 20, 20), (230, 230, 230))
        glass, black = (40, 50, 60), (15, 15, 15)
        x0, x1, top = x - wide / 2, x + wide / 2, base - high
        roof = [
            (x0 + wide * 0.2, top),
            (x1 - wide * 0.2, top),
            (x1 - wide * 0.05, top + high / 2),
            (x0 + wide * 0.05, top + high / 2),
        ]
        self.paint("polygon", roof, body, label, number)
        upper, lower = top + high * 0.08, top + high * 0.45
        pane = [
            (x0 + wide * 0.24, upper),
            (x1 - wide * 0.24, upper),
            (x1 - wide * 0.13, lower),
            (x0 + wide * 0.13, lower),
        ]
        self.paint("polygon", pane, glass, label, number)
        self.paint(
            "rectangle", [x0, top + high * 0.45, x1, base - high * 0.12], body, label, number
        )
        for wheel in (x0 + wide * 0.18, x1 - wide * 0.18):
            r = high * 0.17
            circle = [wheel - r, base - 2 * r, wheel + r, base]
            self.paint("ellipse", circle, black, label, number)
        lamp = [x0 + wide * 0.02, top + high * 0.55, x0 + wide * 0.12, top + high * 0.65]
        self.paint("rectangle", lamp, (240, 230, 180), label, number)

    def draw_person(self, x: float, base: float, tall: float, label: int, number: int) -> None:
        skin = self.colour((90, 60, 45), (235, 200, 175))
        shirt, legs = (self.colour((10, 10, 10), (240, 240, 240)) for _ in range(2))
        wide, head = tall * 0.26, tall * 0.08
        top = base - tall
        for step in (-1, 1):
            foot = x + step * self.rng.uniform(0.1, 0.5) * wide
            hip = base - tall * 0.5
            leg = [
                (x + step * wide * 0.05, hip),
                (x + step * wide * 0.3, hip),
                (foot + wide * 0.15, base),
                (foot - wide * 0.15, base),
            ]
            self.paint("polygon", leg, legs, label, number)
        trunk = [x - wide / 2, top + head * 1.8, x + wide / 2, base - tall * 0.45]
        self.paint("rectangle", trunk, shirt, label, number)
        self.paint("ellipse", [x - head, top, x + head, top + 2 * head], skin, label, number)

    def draw_bicycle(self, x: float, base: float, tall: float, label: int, number: int) -> None:
        frame = self.colour((30, 30, 30), (230, 120, 120))
        r, thick = tall * 0.2, max(1, round(tall * 0.045))
        black: list = [(20, 20, 20), label, number]
        for wheel in (x - 1.2 * r, x + 1.2 * r):
            circle = [wheel - r, base - 2 * r, wheel + r, base]
            for pen, fill in zip(self.pens, black, strict=True):
                pen.ellipse(circle, outline=fill, width=thick)
        axle, seat = base - r, base - 2.2 * r
        ends = (x - 1.2 * r, axle), (x + 1.2 * r, axle)
        points = [
            ends[0],
            (x - 0.3 * r, seat),
            (x + 0.8 * r, seat),
            ends[1],
            (x, axle),
            (x - 0.3 * r, seat),
        ]
        handlebar = [(x + 0.8 * r, seat), (x + 0.9 * r, base - 2.7 * r)]
        fills: list = [frame, label, number]
        for pen, fill in zip(self.pens, fills, strict=True):
            pen.line(points, fill=fill, width=thick)
            pen.line(handlebar, fill=fill, width=thick)

    def sample(self, name: str) -> Sample:
        labels = np.array(self.labels)
        numbers = np.array(self.numbers)
        kept = [k for k in range(1, len(self.kinds) + 1) if (numbers == k).sum() >= SMALLEST]
        labels[(numbers > 0) & ~np.isin(numbers, kept)] = VOID
        map = np.zeros(labels.shape, np.int32)
        items: list[Segment] = []
        for k in kept:
            mask = numbers == k
            map[mask] = len(items) + 1
            items.append(Segment(len(items) + 1, self.kinds[k - 1], 1.0, int(mask.sum())))
        instances = instances_of(
            Segments(torch.from_numpy(map), tuple(items)), range(len(STUFF), len(CLASSES))
        )
        for label in range(len(STUFF)):
            mask = labels == label
            if mask.any():
                map[mask] = len(items) + 1
                items.append(Segment(len(items) + 1, label, 1.0, int(mask.sum())))
        return Sample(
            name,
            self.photograph(),
            labels=torch.from_numpy(labels),
            segments=Segments(torch.from_numpy(map), tuple(items)),
            instances=instances,
        )

    def photograph(self) -> torch.Tensor:
        """The picture with light, haze towards the horizon, texture and noise: uint8 [3, H, W]."""
        rng = self.rng
        colours = np.asarray(self.picture, dtype=np.float32)
        coarse = rng.normal(0, 6, (self.height // 4 + 1, self.width // 4 + 1)).astype(np.float32)
        texture = np.asarray(Image.fromarray(coarse).resize((self.width, self.height)))
        rows = np.arange(self.height, dtype=np.float32)[:, None, None]
        haze = rng.uniform(0, 0.35) * np.exp(-np.abs(rows - self.horizon) / (0.12 * self.height))
        colours = colours * (1 - haze) + 200 * haze
        colours = (colours + texture[..., None]) * rng.uniform(0.6, 1.15)
        colours += rng.normal(0, rng.uniform(2, 8), colours.shape)
        image = np.clip(colours, 0, 255).astype(np.uint8)
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
