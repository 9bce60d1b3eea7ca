"""Images in, pictures out: reads any image to uint8 RGB, reads and writes label maps.

Everything that is written gets its name only when it is complete: a reader sees the whole file or
none, whatever happens to the writer. What `pyseg.formats` reads and writes is found here too, under
its old address.
"""

from __future__ import annotations

import importlib
import operator
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from . import _native
from .errors import ImageError, LabelError
from .files import IMAGE_FORMATS, replacing, write_json, write_text

if TYPE_CHECKING:
    from .formats import (
        CITYSCAPES_IDS,  # noqa: F401
        decode_rle,
        encode_rle,
        read_segment_ids,
        write_cityscapes_ids,
        write_instances,
        write_panoptic,
        write_segments,
    )

ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray | Tensor"
Palette: TypeAlias = "Sequence[Sequence[int]]"

MAX_PIXELS = 100_000_000
"""Pixels from which an image file or an RLE mask is refused, before memory is asked for it.

What is larger is more often damaged or hostile than meant; segmenting 100 megapixels takes tens of
gigabytes. Assign a larger number where larger ones are meant: ``pyseg.image.MAX_PIXELS = 10**9``.
"""

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
        colours = plain_png(source, COLOURS)
        if colours is not None:
            return _rgb8(colours.permute(2, 0, 1), 255)
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
    values = plain_png(path, VALUES)
    if values is not None:
        return values
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
        wide = np.array(image).astype(np.int32)
        if wide.min() < 0 or wide.max() > 65535:
            raise ImageError(
                f"{name} has values from {wide.min()} to {wide.max()}; class ids are 0 to 65535"
            )
        return torch.from_numpy(wide)
    raise ImageError(
        f"{name} has mode {image.mode}, colours instead of one class id per pixel; convert the "
        "colours to ids and save them as a grey or palette PNG (a COCO panoptic PNG holds segment "
        "ids as R + 256 G + 65536 B)"
    )


VALUES, COLOURS, SEGMENT_IDS = range(3)  # what `plain_png` makes of a file, as the kernel has it


def plain_png(path: str | os.PathLike[str], form: int) -> Tensor | None:
    """The pixels of a plain PNG, in a fraction of the time that Pillow takes, see `ops.decode_png`.

    Args:
        path: the file.
        form: `VALUES` (grey values or indices of a palette), `COLOURS` or `SEGMENT_IDS`.

    Returns:
        None where the file is of another kind or damaged: `open_image` then reads it, or says why
        not.
    """
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            return None
        with open(path, "rb") as file:
            if file.read(4) != b"\x89PNG":
                return None
        data = torch.from_numpy(np.fromfile(path, np.uint8))
    except (OSError, ValueError):  # what `open_image` gives a reason for
        return None
    _native.load()
    pixels: Tensor = torch.ops.pyseg.decode_png(data, form, MAX_PIXELS)
    return pixels if pixels.numel() else None


_OPENED = tuple(name for name, suffixes in IMAGE_FORMATS.items() if suffixes)


def open_image(path: str | os.PathLike[str], what: str) -> Image.Image:
    """Opens and decodes a file whole, with one kind of error for all that can go wrong."""
    name = f"{what} {os.fspath(path)!r}"
    file = Path(path)
    if not _exists(file):
        hint = "; download it first" if "://" in os.fspath(path) else "; check the path"
        raise ImageError(f"{name} does not exist{hint}")
    if file.is_dir():
        raise ImageError(
            f"{name} is a directory; give the files in it (pyseg.predict takes directories)"
        )
    if not file.is_file():  # a pipe would be waited for, perhaps for ever
        raise ImageError(f"{name} is no file but a pipe, socket or device; give a file")
    try:
        with file.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise ImageError(
            f"{name} cannot be read ({error.strerror}); check its permissions"
        ) from error
    try:
        with Image.open(file, formats=_OPENED) as image:
            check_pixels(image.height, image.width, name)
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
            "PIL.Image.MAX_IMAGE_PIXELS and pyseg.image.MAX_PIXELS"
        ) from error
    except Exception as error:  # Pillow's decoders raise many kinds, SyntaxError among them
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ImageError(
            f"{name} is truncated or damaged ({reason}); fetch or export it again"
        ) from error


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def check_pixels(height: int, width: int, name: str) -> None:
    """Refuses what is larger than `MAX_PIXELS`.

    Raises:
        ImageError: with the size and the remedy.
    """
    if height * width > MAX_PIXELS:
        raise ImageError(
            f"{name} has {height} x {width} pixels, more than the {MAX_PIXELS} of "
            "pyseg.image.MAX_PIXELS; scale it down or cut it up, or raise the limit if it is meant"
        )


def _grey_step(image: Image.Image) -> int:
    """The factor by which Pillow will stretch the values of an unloaded grey image."""
    tiles = getattr(image, "tile", None)
    if image.mode != "L" or not tiles:
        return 1
    arguments = tiles[0][3]
    raw = arguments[0] if isinstance(arguments, tuple) else arguments
    return {"L;2": 85, "L;4": 17}.get(str(raw), 1)


_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"GIF8", b"BM", b"P6")


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
    if head.startswith(_SIGNATURES) or (head[:4], head[8:12]) == (b"RIFF", b"WEBP"):
        return "is truncated or damaged (its header does not make sense); fetch or export it again"
    formats = ", ".join(name for name in IMAGE_FORMATS if name != "MPO")
    return f"is not an image in {formats} (it begins with {head[:8]!r}); use JPEG or PNG"


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


# --- pictures out ----------------------------------------------------------------------------


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


def colours_of(palette: Palette) -> np.ndarray:
    """A palette as an array, [C, 3] uint8.

    Raises:
        ValueError: a colour is not three integers in 0..255.
    """
    try:
        colours = [[operator.index(value) for value in colour] for colour in palette]
    except TypeError:
        colours = [[]]
    if not all(len(rgb) == 3 and 0 <= min(rgb) <= max(rgb) <= 255 for rgb in colours):
        raise ValueError(
            "palette must hold one colour [r, g, b] of integers in 0..255 per class, got "
            f"{reprlib.repr(palette)}"
        )
    return np.array(colours, dtype=np.uint8).reshape(-1, 3)


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
        ImageError: the path is no ``.png``.
        PysegError: its directory does not exist.
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
        given = colours_of(palette or ())
        colours[: len(given)] = given
        picture.putpalette(colours.tobytes())
    return save_image(path, picture, format="PNG")


def write_image(path: str | os.PathLike[str], image: ImageSource) -> Path:
    """Writes an image in the format of its suffix (JPEG at quality 95 without chroma subsampling).

    Args:
        path: target; its directory must exist.
        image: anything that `read_image` takes.

    Raises:
        ImageError: Pillow cannot write such files.
        PysegError: the directory does not exist.
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
    return save_image(path, picture, format=kind, **options)


def save_image(path: Path, picture: Image.Image, **options: Any) -> Path:
    """Saves ``picture``, whole or not at all; ``options`` are Pillow's."""
    with replacing(path) as temporary:
        picture.save(temporary, **options)
    return path


_IN_FORMATS = (
    "CITYSCAPES_IDS",
    "decode_rle",
    "encode_rle",
    "read_segment_ids",
    "read_uncertainty",
    "write_cityscapes_ids",
    "write_instances",
    "write_panoptic",
    "write_segments",
    "write_uncertainty",
)


def __getattr__(name: str) -> Any:
    # The old address of what moved to formats.py, which builds on this file.
    if name in _IN_FORMATS:
        return getattr(importlib.import_module(".formats", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
