"""Your own data: a folder of images, a folder of label PNGs and a list of classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import IMAGE_SUFFIXES, LABEL_SUFFIXES, check_json, files_by_stem, read_json, some
from ..image import default_palette
from .pairs import PairedFiles
from .table import LARGEST


class Folder(PairedFiles):
    """Images and label maps matched by stem: ``images/a.jpg`` belongs to ``labels/a.png``.

    Label values are class ids counted from 0; 255 is void.

    Args:
        root: holds ``images/``, ``labels/`` and ``classes.txt`` or ``classes.json``; each of the
            other arguments replaces one of these.
        split: a folder below ``root`` that holds ``images/`` and ``labels/``; None = ``root``.
        images: folder of images.
        labels: folder of label files, one grey or palette value per pixel.
        classes: class names in the order of their ids, or a file of them: ``.txt`` with one name
            per line, or ``.json`` with a list of names or of ``{"name": …, "color": [r, g, b]}``
            (optionally under the key ``"classes"``, with ``"id"``; the ``"ignore_index"`` beside
            it, which may be an entry's id, is read as void).
        palette: one RGB colour per class; None = those of the JSON file, else
            `pyseg.image.default_palette`.

    Raises:
        FileNotFoundError: a folder or file is absent, or an image has no labels or the reverse.
        ValueError: no class list, or one that is empty, not understood or repeats a name.

    Example:
        >>> dataset = Folder("data", classes=("background", "cell"))
        >>> dataset[0].labels.unique()
        tensor([0, 1], dtype=torch.uint8)
    """

    def __init__(
        self,
        root: str | Path | None = None,
        split: str | None = None,
        *,
        images: str | Path | None = None,
        labels: str | Path | None = None,
        classes: Sequence[str] | str | Path | None = None,
        palette: Sequence[tuple[int, int, int]] | None = None,
    ) -> None:
        if root is None and (images is None or labels is None):
            raise ValueError("give root, or both images and labels")
        base = None if root is None else Path(root)
        if base is not None and not base.is_dir():
            raise FileNotFoundError(f"root: there is no folder {base}")
        part = base / split if base is not None and split is not None else base
        image_files = files_by_stem(
            Path(images) if images is not None else part / "images",  # type: ignore[operator]
            IMAGE_SUFFIXES,
            "images",
        )
        label_files = files_by_stem(
            Path(labels) if labels is not None else part / "labels",  # type: ignore[operator]
            LABEL_SUFFIXES,
            "labels",
        )
        if without := image_files.keys() - label_files.keys():
            raise FileNotFoundError(f"no label file (matched by stem) for {some(without)}")
        if without := label_files.keys() - image_files.keys():
            raise FileNotFoundError(f"no image (matched by stem) for the labels {some(without)}")
        names, colours, void = read_classes(classes, part, base)
        super().__init__(
            list(image_files.values()),
            [label_files[stem] for stem in image_files],
            names,
            palette or colours or default_palette(len(names)),
            void=void,
        )


def read_classes(
    given: Sequence[str] | str | Path | None, *folders: Path | None
) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...] | None, tuple[int, ...]]:
    """Names, colours if any, and ids that mean void."""
    if given is None:
        candidates = [f / n for f in folders if f for n in ("classes.json", "classes.txt")]
        given = next((path for path in candidates if path.is_file()), None)
        if given is None:
            raise ValueError(
                "classes: give the class names or a file of them, or put classes.txt "
                "or classes.json into root"
            )
    colours: tuple[tuple[int, int, int], ...] | None = None
    void: tuple[int, ...] = ()
    if isinstance(given, (str, Path)):
        path = Path(given)
        if not path.is_file():
            raise FileNotFoundError(
                f"classes: there is no file {path}; give a sequence of names "
                "or a .txt or .json file"
            )
        if path.suffix.lower() == ".json":
            names, colours, void = _from_json(read_json(path, _error), repr(str(path)))
        else:
            try:
                text = path.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"classes: {path} cannot be read as text ({error})") from error
            names = tuple(line.strip() for line in text.splitlines() if line.strip())
    else:
        names = tuple(given)
    repeated = {name for name in names if names.count(name) > 1}
    if not names or repeated or len(names) > 255:
        found = f"repeats {some(repeated)}" if repeated else f"has {len(names)} names"
        raise ValueError(f"classes must be 1 to 255 different names, the list {found}")
    return names, colours, void


def _error(message: str) -> ValueError:
    return ValueError(
        f"classes: {message}; a JSON of classes is a list of names, or of objects with a name"
    )


def _from_json(
    content: Any, where: str
) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...] | None, tuple[int, ...]]:
    ignore: int | None = None
    if isinstance(content, dict):
        check_json(content, {"classes": list, "ignore_index?": int}, where, _error)
        ignore, content = content.get("ignore_index"), content["classes"]
    check_json(content, [(str, dict)], where, _error)
    entries: list[Any] = [{"name": item} if isinstance(item, str) else item for item in content]
    check_json(entries, [{"name": str, "id?": int, "color?": [int]}], where, _error)
    entries = [{"id": i, **item} for i, item in enumerate(entries)]
    # A label file holds no other values; another void id says nothing about it.
    known = any(e["id"] == ignore for e in entries)
    void = () if ignore is None or not (known or 0 <= ignore <= LARGEST) else (ignore,)
    kept = sorted((e for e in entries if e["id"] != ignore), key=lambda e: e["id"])
    ids = [e["id"] for e in kept]
    if ids != list(range(len(kept))):
        raise _error(f"{where}: ids must be 0, 1, 2, … without gaps, they are {some(ids)}")
    names = tuple(e["name"] for e in kept)
    if not all("color" in e for e in kept):
        return names, None, void
    colours = [e["color"] for e in kept]
    if not all(len(rgb) == 3 and 0 <= min(rgb) <= max(rgb) <= 255 for rgb in colours):
        raise _error(f"{where}: a color must be [r, g, b] in 0..255")
    return names, tuple((red, green, blue) for red, green, blue in colours), void
