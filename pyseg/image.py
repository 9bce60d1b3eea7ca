"""Images in, results out: reads any image to uint8 RGB, writes label maps, COCO masks and maps.

Everything that is written gets its name only when it is complete: a reader sees the whole file or
none, whatever happens to the writer.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import ImageError, LabelError
from .files import replacing, write_json, write_text
from .types import Instances, Segments

ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray | Tensor"
Palette: TypeAlias = "Sequence[Sequence[int]]"

CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Cityscapes' label ids of its train ids 0 to 18."""

# --- images in --------------------------------------------------------------------------------


def read_image(source: ImageSource) -> Tensor:
    """Any image to the one form that pyseg works on.

    Channel order is never guessed: a **NumPy array is [H, W, 3] RGB** (or [H, W], [H, W, 1],
    [H, W, 4]), as Pillow, imageio and scikit-image give it, and a **tensor is [3, H, W] RGB** (or
    [H, W], [1, H, W], [4, H, W]), as torchvision gives it. OpenCV gives BGR, which no check can
    tell from RGB: convert with ``cv2.cvtColor(array, cv2.COLOR_BGR2RGB)`` first.

    Grey becomes three equal channels. Transparent images (RGBA, LA, palette with transparency) are
    composited over white, which is what a viewer shows. 16-bit values are scaled to 8 bits
    (0..65535 to 0..255, so a 12-bit picture stays dark). Floating-point values must be in 0..1.
    CMYK, YCbCr, HSV and palette files are converted by Pillow, without colour profiles. EXIF
    orientation is applied.

    Args:
        source: path of an image file, PIL image, NumPy array or tensor.

    Returns:
        [3, H, W] uint8 RGB; a tensor stays on its device, and one that is uint8 RGB already is
        returned itself.

    Raises:
        ImageError: the file is missing, truncated, not an image, animated or implausibly large; an
            array has an ambiguous shape, an unsuitable dtype or values out of range.

    Example:
        >>> read_image(np.zeros((4, 6), dtype=np.uint16)).shape
        torch.Size([3, 4, 6])
    """
    if isinstance(source, Tensor):
        return _read_tensor(source)
    if isinstance(source, np.ndarray):
        return _read_array(source)
    if isinstance(source, Image.Image):
        return _read_pil(source, "the PIL image")
    if isinstance(source, (str, os.PathLike)):
        return _read_pil(open_image(source, "image"), f"image {os.fspath(source)!r}")
    raise ImageError(
        f"an image must be a path, a PIL image, a NumPy array or a tensor, got "
        f"{type(source).__name__}; for several images pass a list to the pipeline"
    )


def read_labels(path: str | os.PathLike[str]) -> Tensor:
    """A label map from an image file whose pixel values are class ids.

    Args:
        path: a lossless file with one value per pixel: palette (the indices are the ids) or grey,
            1 to 16 bits.

    Returns:
        [H, W] uint8, or int32 from a 16-bit file; values are not checked against any class list.

    Raises:
        ImageError: the file cannot be read (see `read_image`), is a lossy JPEG, or holds colours
            instead of ids.
    """
    image = open_image(path, "label map")
    name = f"label map {os.fspath(path)!r}"
    if image.format in ("JPEG", "MPO"):
        raise ImageError(
            f"{name} is a JPEG, whose compression changes class ids; use the PNG that "
            "it was made from"
        )
    if image.mode in ("L", "P"):
        # Pillow stretches 2- and 4-bit grey to 0..255, which makes other ids of them.
        return torch.from_numpy(np.array(image) // image.info.get("grey_step", 1))
    if image.mode == "1":
        return torch.from_numpy(np.array(image).astype(np.uint8))
    if image.mode.startswith("I"):
        values = np.array(image).astype(np.int32)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"{name} has values from {values.min()} to {values.max()}; class ids are 0 to 65535"
            )
        return torch.from_numpy(values)
    raise ImageError(
        f"{name} has mode {image.mode}, colours instead of one class id per pixel; convert the "
        "colours to ids and save them as a grey or palette PNG (a COCO panoptic PNG holds segment "
        "ids as R + 256 G + 65536 B)"
    )


def read_segment_ids(path: str | os.PathLike[str]) -> Tensor:
    """The segment ids of a panoptic PNG in COCO's format: R + 256 G + 65536 B, 0 = void.

    Args:
        path: an RGB PNG.

    Returns:
        [H, W] int32.

    Raises:
        ImageError: the file cannot be read (see `read_image`), or is not a lossless RGB image.
    """
    image = open_image(path, "panoptic map")
    name = f"panoptic map {os.fspath(path)!r}"
    if image.format in ("JPEG", "MPO"):
        raise ImageError(
            f"{name} is a JPEG, whose compression changes ids; use the PNG that it was made from"
        )
    if image.mode != "RGB":
        raise ImageError(
            f"{name} has mode {image.mode}; COCO's panoptic format is RGB, with "
            "id = R + 256 G + 65536 B"
        )
    # Pillow pads to four bytes a pixel much faster than NumPy adds up three.
    padded = np.frombuffer(image.tobytes("raw", "RGBX"), dtype="<u4").reshape(image.size[::-1])
    return torch.from_numpy((padded & 0xFFFFFF).view(np.int32))


def open_image(path: str | os.PathLike[str], what: str) -> Image.Image:
    """Opens and decodes a file whole, with one kind of error for all that can go wrong."""
    name = f"{what} {os.fspath(path)!r}"
    file = Path(path)
    if not file.exists():
        hint = "; download it first" if "://" in os.fspath(path) else "; check the path"
        raise ImageError(f"{name} does not exist{hint}")
    if file.is_dir():
        raise ImageError(
            f"{name} is a directory; give the files in it (pyseg.predict takes directories)"
        )
    try:
        with file.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise ImageError(
            f"{name} cannot be read ({error.strerror}); check its permissions"
        ) from error
    try:
        with Image.open(file) as image:
            if (pictures := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
                # MPO is a camera's JPEG with a preview or depth map behind the picture.
                raise ImageError(f"{name} holds {pictures} pictures; extract the one to segment")
            step = _grey_step(image)
            image.load()
            image.info["grey_step"] = step
            return image
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name} {_what_it_is(head)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name} claims more pixels than is plausible ({error}); if you trust it, raise "
            "PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except Exception as error:  # Pillow's decoders raise many kinds, SyntaxError among them
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ImageError(
            f"{name} is truncated or damaged ({reason}); fetch or export it again"
        ) from error


def _grey_step(image: Image.Image) -> int:
    """The factor by which Pillow will stretch the values of an unloaded grey image."""
    tiles = getattr(image, "tile", None)
    if image.mode != "L" or not tiles:
        return 1
    arguments = tiles[0][3]
    raw = arguments[0] if isinstance(arguments, tuple) else arguments
    return {"L;2": 85, "L;4": 17}.get(str(raw), 1)


def _what_it_is(head: bytes) -> str:
    start = head.lstrip().lower()
    if not head:
        return "is empty (0 bytes); fetch or export it again"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "is an HTML or XML text, not an image; fetch the image itself"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the image; run git lfs pull"
    if head[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return "is HEIC, which Pillow cannot read; convert it to JPEG or PNG"
    return f"is not an image that Pillow can read (it begins with {head[:8]!r}); use JPEG or PNG"


def _read_pil(image: Image.Image, name: str) -> Tensor:
    width, height = image.size
    if width == 0 or height == 0:
        raise ImageError(f"{name} is empty: {width} x {height} pixels")
    file_format = image.format
    try:
        image = ImageOps.exif_transpose(image)
        # Pillow before 11 gave 16-bit grey PNGs mode I.
        if image.mode.startswith("I;16") or (image.mode == "I" and file_format == "PNG"):
            return _rgb8(torch.from_numpy(np.array(image).astype(np.int32))[None], 65535)
        if image.mode in ("I", "F"):
            raise ImageError(
                f"{name} has mode {image.mode}, 32-bit values without a defined "
                "white; scale it to 0..1 and pass the NumPy array"
            )
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # lazily loaded by the caller, or odd modes
        raise ImageError(
            f"{name} with mode {image.mode} cannot be converted to RGB ({error}); "
            "convert it to RGB first"
        ) from error
    return _rgb8(torch.from_numpy(np.array(image)).permute(2, 0, 1), 255)


def _read_array(array: np.ndarray) -> Tensor:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        remedy = "a NumPy image is [H, W, 3] RGB, [H, W, 4] RGBA or [H, W] grey"
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            remedy += "; this looks like [3, H, W]: use array.transpose(1, 2, 0)"
        elif array.ndim == 4:
            remedy += "; pass a batch as a list of images"
        raise ImageError(f"the NumPy image has shape {list(array.shape)}; {remedy}")
    if array.dtype.kind not in "uifb" or array.dtype.itemsize > 8:
        raise ImageError(
            f"the NumPy image has dtype {array.dtype}; use uint8, uint16 or floating point in 0..1"
        )
    native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    return _checked(torch.from_numpy(native).permute(2, 0, 1), "the NumPy image")


def _read_tensor(tensor: Tensor) -> Tensor:
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        remedy = "a tensor image is [3, H, W] RGB, [4, H, W] RGBA or [1, H, W] grey"
        if tensor.ndim == 3 and tensor.shape[2] in (1, 3, 4):
            remedy += "; this looks like [H, W, 3]: use tensor.permute(2, 0, 1)"
        elif tensor.ndim == 4:
            remedy += "; pass a batch as a list of images, list(batch)"
        raise ImageError(f"the tensor image has shape {list(tensor.shape)}; {remedy}")
    return _checked(tensor, "the tensor image")


def require_rgb8(image: Tensor, name: str) -> None:
    """Refuses what models do not take.

    Args:
        image: must be [3, H, W] uint8.
        name: what errors call it.

    Raises:
        ValueError: another shape, or no pixels.
        TypeError: another dtype.
    """
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"{name} must be [3, H, W] RGB with H, W > 0, got {list(image.shape)}")
    if image.dtype != torch.uint8:
        raise TypeError(
            f"{name} must be uint8, got {image.dtype}; read it with "
            "pyseg.image.read_image or convert it first"
        )


def _checked(pixels: Tensor, name: str) -> Tensor:
    """[C, H, W] of any dtype to uint8 RGB, refusing values whose white is not known."""
    if pixels.numel() == 0:
        raise ImageError(f"{name} is empty: {pixels.shape[1]} x {pixels.shape[2]} pixels")
    if pixels.dtype == torch.uint8:
        return _rgb8(pixels, 255)
    if pixels.dtype == torch.uint16:
        return _rgb8(pixels.int(), 65535)
    if pixels.is_floating_point():
        low, high = (float(value) for value in pixels.float().aminmax())
        if not (low >= 0.0 and high <= 1.0):  # NaN is neither
            hint = (
                "it looks like 0..255: use uint8"
                if low >= 0 and 1 < high <= 255
                else "pass it before normalisation, which pyseg's models do themselves"
            )
            raise ImageError(
                f"{name} has floating-point values from {low:g} to {high:g}, which "
                f"must be in 0..1; {hint}"
            )
        return _rgb8((pixels.float() * 255).round().to(torch.uint8), 255)
    remedy = (
        "a mask: multiply by 255"
        if pixels.dtype == torch.bool
        else "ambiguous in range: convert to uint8 (0..255) or floating point (0..1)"
    )
    raise ImageError(f"{name} has dtype {str(pixels.dtype).removeprefix('torch.')}, {remedy}")


def _rgb8(pixels: Tensor, white: int) -> Tensor:
    """[C, H, W] integers in 0..white with C = 1, 3 or 4 to [3, H, W] uint8."""
    if white != 255:
        step = white // 255
        pixels = ((pixels + step // 2) // step).to(torch.uint8)
    if pixels.shape[0] == 4:
        alpha = pixels[3:].int()
        pixels = ((pixels[:3].int() * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)
    return pixels.expand(3, -1, -1).contiguous()


# --- results out ------------------------------------------------------------------------------


def default_palette(n: int) -> tuple[tuple[int, int, int], ...]:
    """The first ``n`` colours of Pascal VOC's map (VOC 2012 development kit, ``VOCcolormap``).

    The bits of the class id are dealt in turn to red, green and blue, highest bit first, so that
    neighbouring ids differ much. Class 0 is black.
    """
    palette = []
    for index in range(n):
        colour = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                colour[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        palette.append((colour[0], colour[1], colour[2]))
    return tuple(palette)


def write_labels(
    path: str | os.PathLike[str], labels: Tensor | np.ndarray, palette: Palette | None = None
) -> Path:
    """Writes class ids as a PNG that viewers show in colour and `read_labels` reads back exactly.

    The PNG is indexed (mode P), the palette's entry i being the colour of class i. Where 8 bits
    are too few (a palette of more than 256 colours, ids above 255, or int16, which is what
    `Segmentation.labels` has from 256 classes on) it is 16-bit grey instead.

    Args:
        path: target, ``.png``; its directory must exist.
        labels: [H, W] integers, 255 = void.
        palette: one RGB colour per class; missing ones come from `default_palette`.

    Returns:
        ``path``.

    Raises:
        LabelError: labels are not [H, W] integers in 0..65535.
        ImageError: the path is no ``.png``, or its directory does not exist.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ImageError(
            f"labels are written as PNG, got {str(path)!r}; other formats lose ids or "
            "their colours, name it .png"
        )
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.ndim != 2 or values.dtype.kind not in "ui" or values.size == 0:
        raise LabelError(
            f"labels must be [H, W] integers, got {values.dtype} of shape {list(values.shape)}"
        )
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise LabelError(
            f"labels must be 0 to 65535 to be written as PNG, got {low} to {high}; "
            "write void as 255, or as 65535 where 255 is a class"
        )
    if high > 255 or values.dtype in (np.int16, np.uint16) or len(palette or ()) > 256:
        picture = Image.fromarray(values.astype(np.uint16))
    else:
        picture = Image.fromarray(values.astype(np.uint8))
        colours = np.array(default_palette(256), dtype=np.uint8)
        given = np.array(palette or (), dtype=np.uint8).reshape(-1, 3)
        colours[: len(given)] = given
        picture.putpalette(colours.tobytes())
    return _save(path, picture, format="PNG")


def write_image(path: str | os.PathLike[str], image: ImageSource) -> Path:
    """Writes an image in the format of its suffix (JPEG at quality 95 without chroma subsampling).

    Args:
        path: target; its directory must exist.
        image: anything that `read_image` takes.

    Raises:
        ImageError: Pillow cannot write such files, or the directory does not exist.
    """
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise ImageError(
            f"cannot write {str(path)!r}: no image format has the suffix "
            f"{path.suffix!r}; use .png or .jpg"
        )
    picture = Image.fromarray(read_image(image).cpu().permute(1, 2, 0).contiguous().numpy())
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    return _save(path, picture, format=kind, **options)


def _save(path: Path, picture: Image.Image, **options: Any) -> Path:
    with replacing(path) as temporary:
        picture.save(temporary, **options)
    return path


# --- COCO -------------------------------------------------------------------------------------


def encode_rle(mask: Tensor | np.ndarray) -> dict[str, Any]:
    """A binary mask as a COCO run-length dict, equal to what pycocotools writes.

    Args:
        mask: [H, W] bool, or integers where anything but 0 is inside.

    Returns:
        ``{"size": [H, W], "counts": str}``: lengths of alternating runs of 0 and 1 in column-major
        order, from the fourth on as difference to the one two before, in base 32 with 6 bits per
        character (cocoapi, ``maskApi.c``).
    """
    values = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if values.ndim != 2:
        raise ImageError(f"a mask must be [H, W], got shape {list(values.shape)}")
    flat = (values != 0).ravel(order="F")
    borders = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first = [0] if flat.size and flat[0] else []  # the first run is of zeros, if need be of none
    edges = np.concatenate([[0], first, borders, [flat.size]]).astype(np.int64)
    runs = edges[1:] - edges[:-1]
    numbers = runs.copy()
    numbers[3:] -= runs[1:-2]
    digits = numbers[:, None] >> np.arange(0, 35, 5)  # [runs, 7], lowest first
    rest = digits >> 5
    digits &= 31
    # The last digit is the first whose highest bit alone says the sign of all that follows.
    done = rest == np.where(digits & 16, -1, 0)
    last = done.argmax(1)
    column = np.arange(7)
    digits |= np.where(column < last[:, None], 32, 0)
    text = (digits[column <= last[:, None]] + 48).astype(np.uint8).tobytes().decode("ascii")
    return {"size": [int(side) for side in values.shape], "counts": text}


def decode_rle(rle: Mapping[str, Any]) -> Tensor:
    """A COCO run-length dict to its mask, [H, W] bool.

    Args:
        rle: ``size`` [H, W] and ``counts``, compressed (str or bytes) or a list of run lengths.

    Raises:
        ImageError: the runs do not add up to H x W.
    """
    height, width = (int(side) for side in rle["size"])
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        codes = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8)
        runs = _decode_counts(codes.astype(np.int64) - 48)
    else:
        runs = np.asarray(counts, dtype=np.int64)
    if (runs < 0).any() or int(runs.sum()) != height * width:
        raise ImageError(
            f"the runs of the RLE mask add up to {int(runs.sum())} pixels, its size "
            f"{height} x {width} needs {height * width}; it is damaged"
        )
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return torch.from_numpy(np.ascontiguousarray(flat.reshape(width, height).T))


def _decode_counts(codes: np.ndarray) -> np.ndarray:
    """Characters of a compressed RLE, less 48, to run lengths."""
    last = (codes & 32) == 0
    if not codes.size:
        return codes
    if not last[-1] or codes.min() < 0 or codes.max() > 63:
        raise ImageError(
            "the counts of the RLE mask are damaged: they end within a number or hold "
            "a character outside '0'..'o'"
        )
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    lengths = np.diff(np.append(starts, codes.size))
    place = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((codes & 31) << place, starts)
    negative = (codes[last] & 16) != 0
    numbers -= np.where(negative, np.int64(1) << (5 * lengths), 0)
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


def write_panoptic(
    path: str | os.PathLike[str],
    results: Iterable[tuple[str, Segments]],
    classes: Sequence[str],
    *,
    things: Collection[int],
    category_ids: Sequence[int] | None = None,
) -> Path:
    """Writes panoptic results in COCO's format, as panopticapi reads it.

    For ``panoptic_val.json`` the maps go to ``panoptic_val/<name>.png``, RGB with
    id = R + 256 G + 65536 B and 0 = void; the JSON comes last, so that it exists only when every
    map does. ``image_id`` is the name, as a number where it is one, as in COCO's own files.

    Args:
        path: target, ``.json``; its directory must exist.
        results: (name, segments) of every image; consumed one by one.
        classes: name of every class index that the segments use.
        things: the class indices that are countable objects.
        category_ids: COCO category of every class index; by default the index itself.

    Returns:
        ``path``.

    Raises:
        ImageError: a segment id is not in 1..2^24-1, is in the map and not in the list or the
            other way round, or a name occurs twice.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        raise ImageError(f"panoptic results are described in a .json file, got {str(path)!r}")
    ids = list(range(len(classes))) if category_ids is None else list(category_ids)
    if len(ids) != len(classes):
        raise ImageError(
            f"category_ids must name one category per class: {len(classes)}, got {len(ids)}"
        )
    folder = path.with_suffix("")
    annotations: dict[str, dict[str, Any]] = {}
    for name, segments in results:
        if name in annotations:
            raise ImageError(f"two panoptic results are named {name!r}; names must differ")
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        annotations[name] = {
            "image_id": int(name) if name.isdecimal() else name,
            "file_name": f"{name}.png",
            "segments_info": _write_segments(file, segments, ids),
        }
    categories = [
        {"id": ids[k], "name": name, "isthing": int(k in things)} for k, name in enumerate(classes)
    ]
    images = [
        {"id": entry["image_id"], "file_name": entry["file_name"]} for entry in annotations.values()
    ]
    value = {"images": images, "annotations": [*annotations.values()], "categories": categories}
    return write_json(path, value)


def write_segments(path: str | os.PathLike[str], segments: Segments) -> Path:
    """Writes one panoptic map as ``path`` and its list as a JSON of the same name beside it.

    The PNG is COCO's, see `write_panoptic`; the list has COCO's fields, with the class index as
    ``category_id``.

    Raises:
        ImageError: as `write_panoptic`.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ImageError(f"panoptic maps are written as PNG, got {str(path)!r}")
    labels = [item.label for item in segments.items]
    info = _write_segments(path, segments, range(max(labels, default=0) + 1))
    write_json(path.with_suffix(".json"), info)
    return path


def write_instances(path: str | os.PathLike[str], instances: Instances) -> Path:
    """Writes instances as a JSON list in the form of COCO's results.

    Each has ``category_id`` (the class index), ``score``, ``bbox`` [x, y, width, height] and
    ``segmentation``, a run-length dict.
    """
    boxes = instances.boxes.double()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    columns = (instances.labels.tolist(), instances.scores.tolist(), boxes.tolist())
    entries = [
        {"category_id": label, "score": score, "bbox": box, "segmentation": encode_rle(mask)}
        for label, score, box, mask in zip(*columns, instances.masks, strict=True)
    ]
    return write_json(path, entries)


def write_cityscapes_ids(
    path: str | os.PathLike[str],
    segments: Segments,
    *,
    things: Collection[int],
    label_ids: Sequence[int] | None = None,
) -> Path:
    """Writes a panoptic map as Cityscapes' ``instanceIds``: a PNG of 16-bit grey.

    A pixel of a stuff class or of a crowd has its label id, one of the n-th segment of a thing
    class the label id times 1000 plus n, counted from 0; void is 0, Cityscapes' "unlabeled".

    Args:
        path: target, ``.png``; its directory must exist.
        segments: at most 1000 of a thing class.
        things: the class indices that are countable objects.
        label_ids: Cityscapes' label id of every class index; None = those of its 19 train ids.

    Returns:
        ``path``.

    Raises:
        ImageError: a class without a label id, a label id out of 1..64, or too many segments.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ImageError(f"Cityscapes ids are written as PNG, got {str(path)!r}")
    ids = CITYSCAPES_IDS if label_ids is None else tuple(label_ids)
    if not all(0 < number <= 64 for number in ids):
        raise ImageError(f"label_ids must be 1 to 64, which 16 bits leave room for, got {ids}")
    map = segments.map.detach().cpu().numpy()
    table = np.zeros(map.shape, np.uint16)
    counted: dict[int, int] = {}
    for item in segments.items:
        if not 0 <= item.label < len(ids):
            raise ImageError(
                f"segment {item.id} has class {item.label}, but there are label_ids "
                f"for {len(ids)} classes"
            )
        value = ids[item.label]
        if item.label in things and not item.crowd:
            number = counted.get(item.label, 0)
            counted[item.label] = number + 1
            if number >= 1000:
                raise ImageError(
                    f"class {item.label} has more than 1000 segments, too many for Cityscapes ids"
                )
            value = 1000 * value + number
        table[map == item.id] = value
    return _save(path, Image.fromarray(table), format="PNG")


def _write_segments(path: Path, segments: Segments, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Writes one map and returns its ``segments_info``."""
    table = segments.map.detach().cpu().numpy().astype(np.int64)
    listed = [item.id for item in segments.items]
    found = [int(value) for value in np.unique(table) if value != 0]
    if sorted(listed) != found:
        raise ImageError(
            f"the segments of {path.name} do not fit their map: listed {listed[:8]}, "
            f"in the map {found[:8]}; every segment needs at least one pixel and "
            "every non-zero pixel a segment"
        )
    if found and not 0 < found[0] <= found[-1] < 1 << 24:
        raise ImageError(f"segment ids must be 1 to {(1 << 24) - 1}, got {found[0]} to {found[-1]}")
    info = []
    for item in segments.items:
        inside = table == item.id
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        left, top = int(columns[0]), int(rows[0])
        box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
        info.append(
            {
                "id": item.id,
                "category_id": ids[item.label],
                "area": int(inside.sum()),
                "bbox": box,  # x, y, width, height
                "iscrowd": int(item.crowd),
                "score": item.score,
            }
        )
    rgb = np.stack([table & 255, table >> 8 & 255, table >> 16], axis=-1).astype(np.uint8)
    _save(path, Image.fromarray(rgb), format="PNG")
    return info


__all__ = [
    "decode_rle",
    "default_palette",
    "encode_rle",
    "read_image",
    "read_labels",
    "read_segment_ids",
    "write_cityscapes_ids",
    "write_image",
    "write_instances",
    "write_json",
    "write_labels",
    "write_panoptic",
    "write_segments",
    "write_text",
]
