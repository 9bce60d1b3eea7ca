"""Pictures of results: overlay with legend, comparisons side by side, error maps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .image import ImageSource, colours_of, default_palette, read_image
from .regions import VOID, Instances, Segments

Colour: TypeAlias = "tuple[int, int, int]"

_PAPER, _INK = (255, 255, 255), (32, 32, 32)
_BAR, _GAP = (66, 113, 174), (226, 118, 118)
_HEAT = ((0, 0, 0), (128, 0, 38), (227, 26, 28), (253, 141, 60), (254, 217, 118), (255, 255, 255))
_CORRECT, _WRONG, _MISSED, _IGNORED = (222, 226, 230), (214, 40, 57), (247, 160, 30), (64, 68, 76)


def overlay(
    image: ImageSource | Any,  # Any: a Segmentation, which this file does not know
    opacity: float = 0.5,
    *,
    labels: Tensor | np.ndarray | None = None,
    segments: Segments | None = None,
    instances: Instances | None = None,
    classes: Sequence[str] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
) -> Image.Image:
    """The image with a result painted over it and a legend of the classes present.

    Classes are painted in the palette's colours; void pixels keep the image. Segments get white
    borders, and the segments of one class different shades. Instances are painted on top, with
    outline, box, class and score.

    Args:
        image: anything that `pyseg.image.read_image` takes; or a `pyseg.Segmentation` that carries
            its image, whose result is painted.
        opacity: weight of the colours, 0 (image only) to 1 (colours only).
        labels: [H, W] class indices; what is no class (255, -1) is void. None = those of the
            segments, if any.
        segments: a panoptic map.
        instances: detected objects.
        classes: names of the classes; None = "class 0", "class 1", …
        palette: one RGB colour per class; missing ones come from `default_palette`.

    Returns:
        RGB; as wide as the image, higher by the legend.

    Raises:
        ValueError: the opacity is out of range, a colour is none, or a map has not the size of the
            image.

    Example:
        >>> overlay("street.jpg", labels=labels, classes=("road", "sky")).save("overlay.png")
    """
    if callable(paint := getattr(image, "overlay", None)):
        return paint(opacity)
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be in 0..1, got {opacity}")
    pixels = _array(read_image(image)).astype(np.float32)
    size = pixels.shape[:2]
    if classes is None:
        classes = [f"class {k}" for k in range(_count(labels, segments, instances))]
    count = len(classes)
    own = np.array(default_palette(count), dtype=np.uint8)
    if palette is not None:
        own[: len(palette)] = colours_of(palette)[:count]
    if labels is None and segments is not None:
        labels = segments.label_map(count)
    present: list[int] = []
    if labels is not None:
        values = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if values.shape != size:
            raise ValueError(f"labels must be {list(size)} as the image, got {list(values.shape)}")
        known = (values >= 0) & (values < count)
        present = np.unique(values[known]).tolist()
        colours = own[np.where(known, values, 0)].astype(np.float32)
        shown = (known * opacity)[..., None]
        borders = None
        if segments is not None:
            table = segments.map.cpu().numpy()
            if table.shape != size:
                raise ValueError(
                    f"segments.map must be {list(size)} as the image, got {list(table.shape)}"
                )
            colours = _shaded(colours, segments, table)
            borders = _borders(table)
        pixels = pixels * (1 - shown) + colours * shown
        if borders is not None:
            pixels[borders] = 255
    if instances is not None:
        pixels = _paint_instances(pixels, instances, own, opacity)
        present = sorted({*present, *instances.labels.tolist()})
    picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    if instances is not None:
        _annotate_instances(picture, instances, classes, own)
    return _with_legend(picture, [(_rgb(own[k]), classes[k]) for k in present])


def _count(
    labels: Tensor | np.ndarray | None, segments: Segments | None, instances: Instances | None
) -> int:
    """The number of classes that what is painted speaks of; 255 is void where nobody says more."""
    seen = [0]
    if labels is not None:
        values = torch.as_tensor(labels).long()  # whose bytes would hold no -1
        seen.append(1 + int(values.masked_fill(values == VOID, -1).max()))
    if segments is not None:
        seen += [1 + item.label for item in segments.items]
    if instances is not None:
        seen += [1 + label for label in instances.labels.tolist()]
    return max(seen)


def side_by_side(images: Sequence[ImageSource], titles: Sequence[str] | None = None) -> Image.Image:
    """Pictures in a row, each under its title, scaled to the width of the widest.

    Args:
        images: anything that `pyseg.image.read_image` takes.
        titles: one per image.
    """
    if not images:
        raise ValueError("side_by_side needs at least one image, got none")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"titles must be one per image: {len(images)}, got {len(titles)}")
    pictures = [Image.fromarray(_array(read_image(image))) for image in images]
    width = max(picture.width for picture in pictures)
    pictures = [
        picture
        if picture.width == width
        else picture.resize((width, max(1, round(picture.height * width / picture.width))))
        for picture in pictures
    ]
    height = max(picture.height for picture in pictures)
    font = _font(height)
    captions = list(titles) if titles is not None else [""] * len(pictures)
    cell = max([width, *(round(font.getlength(caption)) for caption in captions)])
    gap = max(4, width // 60)
    strip = round(font.size * 1.9) if titles is not None else 0
    canvas = Image.new("RGB", ((cell + gap) * len(pictures) - gap, height + strip), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for k, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = k * (cell + gap)
        canvas.paste(picture, (left + (cell - width) // 2, strip))
        draw.text((left + cell / 2, strip / 2), caption, fill=_INK, font=font, anchor="mm")
    return canvas


def contact_sheet(
    tiles: Sequence[tuple[str, Any]],  # Any: a Sample, which this file does not know
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    columns: int = 3,
) -> Image.Image:
    """Samples in rows, each image beside its labels, with one legend of the classes present.

    Args:
        tiles: a title and a `pyseg.Sample` each, all of one width.
        classes: names of the classes.
        palette: one RGB colour per class.
        columns: samples in a row.

    Raises:
        ValueError: there are no tiles, or they differ in width.
    """
    if not tiles or len({sample.image.shape[2] for _, sample in tiles}) > 1:
        raise ValueError("a contact sheet needs at least one tile, and all of one width")
    width = tiles[0][1].image.shape[2]
    gap, font = max(4, width // 60), _font(width)
    strip = round(font.size * 1.6)
    rows = [tiles[k : k + columns] for k in range(0, len(tiles), columns)]
    heights = [strip + gap + max(sample.image.shape[1] for _, sample in row) for row in rows]
    cell = 2 * width + gap
    canvas = Image.new("RGB", (len(rows[0]) * (cell + gap) - gap, sum(heights)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    present: set[int] = set()
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, (title, sample) in enumerate(row):
            left = column * (cell + gap)
            while len(title) > 1 and font.getlength(title) > cell:
                title = f"…{title[2:]}"  # the end of a file's name says more than its start
            draw.text((left, top + strip / 2), title, fill=_INK, font=font, anchor="lm")
            canvas.paste(Image.fromarray(_array(sample.image)), (left, top + strip))
            if sample.labels is not None:
                present.update(sample.labels.unique().tolist())
                painted = overlay(
                    sample.image,
                    0.7,
                    labels=sample.labels,
                    segments=sample.segments,
                    classes=classes,
                    palette=palette,
                )
                size = (0, 0, width, sample.image.shape[1])  # without its legend
                canvas.paste(painted.crop(size), (left + width + gap, top + strip))
        top += height
    colours = colours_of(palette)
    known = sorted(k for k in present if k < len(classes))
    return _with_legend(canvas, [(_rgb(colours[k]), classes[k]) for k in known])


def error_map(
    prediction: Tensor, target: Tensor, image: Tensor | None = None, ignore_index: int = VOID
) -> Image.Image:
    """Where a label map is wrong, with a legend that says how much of the image that is.

    Red is a wrong class, orange a pixel that was left void though it has ground truth, dark grey a
    pixel without ground truth, and everything else is correct.

    Args:
        prediction: [H, W] labels.
        target: [H, W] labels.
        image: [3, H, W] uint8 RGB; shown in pale grey where the prediction is correct.
        ignore_index: label of pixels without ground truth, and of void predictions.
    """
    if prediction.ndim != 2 or prediction.shape != target.shape:
        raise ValueError(
            "prediction and target must both be [H, W], got "
            f"{list(prediction.shape)} and {list(target.shape)}"
        )
    prediction, target = prediction.cpu(), target.cpu()
    if image is not None and image.shape[1:] != target.shape:
        raise ValueError(
            f"image must be [3, {target.shape[0]}, {target.shape[1]}], got {list(image.shape)}"
        )
    ignored = (target == ignore_index).numpy()
    missed = (prediction == ignore_index).numpy() & ~ignored
    wrong = (prediction != target).numpy() & ~ignored & ~missed
    pixels = np.empty((*target.shape, 3), dtype=np.uint8)
    pixels[:] = _CORRECT
    if image is not None:
        grey = np.asarray(Image.fromarray(_array(image)).convert("L"), dtype=np.float32)
        pixels[:] = (255 - 0.45 * (255 - grey))[..., None].astype(np.uint8)
    for where, colour in ((ignored, _IGNORED), (missed, _MISSED), (wrong, _WRONG)):
        pixels[where] = colour
    valid = max(1, int((~ignored).sum()))
    correct = int((~ignored).sum()) - int(missed.sum()) - int(wrong.sum())
    entries = [
        (_CORRECT, f"correct {correct / valid:.1%}"),
        (_WRONG, f"wrong {wrong.sum() / valid:.1%}"),
    ]
    if missed.any():
        entries.append((_MISSED, f"left void {missed.sum() / valid:.1%}"))
    if ignored.any():
        entries.append((_IGNORED, "no ground truth"))
    return _with_legend(Image.fromarray(pixels), entries)


def reliability_diagram(reliability: Mapping[str, Sequence[float]], size: int = 480) -> Image.Image:
    """Accuracy over confidence, bin by bin (DeGroot and Fienberg 1983; Niculescu-Mizil 2005).

    A blue bar is a bin's accuracy, red what it lacks to (or has above) the bin's mean confidence,
    the dashed diagonal perfect calibration; grey bars below are the share of the pixels.

    Args:
        reliability: ``lower``, ``confidence``, ``accuracy`` and ``pixels`` by bin, as
            `pyseg.metrics.calibration.Calibration.compute` gives them.
        size: width in pixels.
    """
    if size < 120:
        raise ValueError(f"size must be at least 120 pixels, got {size}")
    bins, total = len(reliability["lower"]), sum(reliability["pixels"])
    font = _font(size)
    margin, gap = round(font.size * 3.2), round(font.size * 1.2)
    side = size - margin - gap
    strip = side // 4
    canvas = Image.new("RGB", (size, gap + side + gap + strip + round(font.size * 3.4)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    bottom, floor = gap + side, gap + side + gap + strip

    def x(value: float) -> float:
        return margin + value * side

    def y(value: float) -> float:
        return bottom - value * side

    for k in range(bins):
        left, right = (
            round(x(k / bins)) + 1,
            max(round(x((k + 1) / bins)) - 1, round(x(k / bins)) + 1),
        )
        share = reliability["pixels"][k] / total if total else 0.0
        if share == 0:
            continue
        accuracy, confidence = reliability["accuracy"][k], reliability["confidence"][k]
        draw.rectangle((left, y(accuracy), right, bottom), fill=_BAR)
        ends = sorted((y(accuracy), y(confidence)))
        draw.rectangle((left, ends[0], right, ends[1]), fill=_GAP)
        draw.rectangle((left, floor - share * strip, right, floor), fill=_IGNORED)
    dash = side / 60
    for k in range(0, 60, 2):
        draw.line(
            (
                margin + k * dash,
                bottom - k * dash,
                margin + (k + 1) * dash,
                bottom - (k + 1) * dash,
            ),
            fill=_INK,
            width=max(1, size // 300),
        )
    draw.rectangle((margin, gap, margin + side, bottom), outline=_INK)
    draw.line((margin, floor, margin + side, floor), fill=_INK)
    for tick in (0.0, 0.5, 1.0):
        draw.text(
            (margin - font.size * 0.4, y(tick)), f"{tick:g}", fill=_INK, font=font, anchor="rm"
        )
        draw.text(
            (x(tick), floor + font.size * 0.9), f"{tick:g}", fill=_INK, font=font, anchor="mm"
        )
    draw.text((x(0.5), floor + font.size * 2.3), "confidence", fill=_INK, font=font, anchor="mm")
    for text, height in (("accuracy", gap + side // 2), ("pixels", floor - strip // 2)):
        label = Image.new("RGB", (round(font.getlength(text)) + 4, round(font.size * 1.4)), _PAPER)
        ImageDraw.Draw(label).text((2, label.height / 2), text, fill=_INK, font=font, anchor="lm")
        turned = label.rotate(90, expand=True)
        canvas.paste(turned, (round(font.size * 0.2), height - turned.height // 2))
    return canvas


def heat_map(values: Tensor | np.ndarray, limit: float | None = None) -> Image.Image:
    """A picture of non-negative values: black, red, yellow, white.

    Args:
        values: [H, W]; NaN is black.
        limit: the value that is white, as are larger ones; None = the largest.

    Raises:
        ValueError: not [H, W], or ``limit`` is not positive.

    Example:
        >>> heat_map(result.probabilities()[0], limit=1.0).save("road.png")
    """
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be above 0, got {limit}")
    plane = torch.as_tensor(values).detach().cpu().float().nan_to_num(0, posinf=3e38)
    if plane.ndim != 2 or plane.numel() == 0:
        raise ValueError(f"values must be [H, W], got {list(plane.shape)}")
    share = (plane / (limit or float(plane.max()) or 1.0)).clamp(0, 1).numpy()
    stops = np.linspace(0, 1, len(_HEAT))
    colours = np.array(_HEAT, dtype=np.float64)
    channels = [np.interp(share, stops, colours[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def _array(image: Tensor) -> np.ndarray:
    """[3, H, W] uint8 to [H, W, 3]."""
    return image.cpu().permute(1, 2, 0).contiguous().numpy()


def _rgb(colour: np.ndarray) -> Colour:
    red, green, blue = (int(value) for value in colour)
    return red, green, blue


def _borders(table: np.ndarray) -> np.ndarray:
    """Pixels of an id map whose right or lower neighbour differs; [H, W] bool."""
    borders = np.zeros(table.shape, dtype=bool)
    borders[:, :-1] |= table[:, :-1] != table[:, 1:]
    borders[:-1] |= table[:-1] != table[1:]
    return borders


def _shaded(colours: np.ndarray, segments: Segments, table: np.ndarray) -> np.ndarray:
    """Class colours, lightened or darkened from one segment of a class to the next."""
    seen: dict[int, int] = {}
    shades = {0: 0.0}
    for item in segments.items:
        turn = seen.get(item.label, 0)
        seen[item.label] = turn + 1
        shades[item.id] = (0.0, 0.45, -0.4, 0.7, -0.2, 0.25)[turn % 6]
    ids, inverse = np.unique(table, return_inverse=True)
    of_id = np.array([shades.get(int(k), 0.0) for k in ids])
    shade = of_id[inverse].reshape(*table.shape, 1)
    return colours + np.where(shade > 0, (255 - colours) * shade, colours * shade)


def _instance_colours(instances: Instances, palette: np.ndarray) -> list[np.ndarray]:
    # A black class colour (VOC's class 0) would vanish on most images.
    return [np.maximum(palette[k], 40) for k in instances.labels.tolist()]


def _paint_instances(
    pixels: np.ndarray, instances: Instances, palette: np.ndarray, opacity: float
) -> np.ndarray:
    colours = _instance_colours(instances, palette)
    order = instances.scores.argsort().tolist()  # the most certain is painted last, on top
    for k in order:
        mask = instances.masks[k].cpu().numpy()
        pixels[mask] = pixels[mask] * (1 - opacity) + colours[k] * opacity
    for k in order:
        padded = np.pad(instances.masks[k].cpu().numpy(), 1)
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        pixels[padded[1:-1, 1:-1] & ~inner] = 255
    return pixels


def _annotate_instances(
    picture: Image.Image, instances: Instances, classes: Sequence[str], palette: np.ndarray
) -> None:
    draw = ImageDraw.Draw(picture)
    font = _font(picture.height, small=True)
    width = max(1, picture.height // 360)
    colours = _instance_colours(instances, palette)
    for k in instances.scores.argsort().tolist():
        left, top, right, bottom = (float(value) for value in instances.boxes[k])
        # xyxy are edges, PIL's rectangle names the last pixel.
        draw.rectangle(
            (left, top, max(left, right - 1), max(top, bottom - 1)),
            outline=_rgb(colours[k]),
            width=width,
        )
        text = f"{classes[int(instances.labels[k])]} {float(instances.scores[k]):.2f}"
        pad = font.size * 0.25
        box_width, box_height = font.getlength(text) + 2 * pad, font.size * 1.35
        x = min(max(0.0, left), max(0.0, picture.width - box_width))
        y = top - box_height if top >= box_height else top
        draw.rectangle((x, y, x + box_width, y + box_height), fill=_rgb(colours[k]))
        ink = (0, 0, 0) if float(np.dot(colours[k], (0.299, 0.587, 0.114))) > 140 else _PAPER
        draw.text((x + pad, y + box_height / 2), text, fill=ink, font=font, anchor="lm")


def _font(height: int, small: bool = False) -> ImageFont.FreeTypeFont:
    """Pillow's own font, at a size that suits a picture of this height."""
    size = min(40, max(11, round(height / (34 if small else 26))))
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError(
            "Pillow was built without FreeType, which draws the legends; install "
            "the Pillow wheel from PyPI"
        )
    return font


def _with_legend(picture: Image.Image, entries: Sequence[tuple[Colour, str]]) -> Image.Image:
    """The picture above rows of colour swatches with names."""
    if not entries:
        return picture
    font = _font(picture.height)
    swatch, row = round(font.size * 1.1), round(font.size * 1.7)
    space, margin = round(font.size * 0.45), round(font.size * 0.6)
    lengths = [swatch + space + round(font.getlength(text)) for _, text in entries]
    width = max(picture.width, max(lengths) + 2 * margin)
    # Columns of equal width read better than ragged rows.
    cell = max(lengths) + 2 * margin
    columns = max(1, min(len(entries), (width - margin) // cell))
    cell = (width - margin) // columns
    rows = -(-len(entries) // columns)
    canvas = Image.new("RGB", (width, picture.height + rows * row + margin), _PAPER)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    places = itertools.product(range(rows), range(columns))
    for (colour, text), (line, column) in zip(entries, places, strict=False):
        x = margin + column * cell
        y = picture.height + margin // 2 + line * row + row / 2
        draw.rectangle(
            (x, y - swatch / 2, x + swatch, y + swatch / 2), fill=colour, outline=(160, 160, 160)
        )
        draw.text((x + swatch + space, y), text, fill=_INK, font=font, anchor="lm")
    return canvas


__all__ = ["contact_sheet", "error_map", "overlay", "reliability_diagram", "side_by_side"]
