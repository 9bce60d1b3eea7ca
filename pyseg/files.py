"""Files of any kind: written whole or not at all, JSON with one kind of error, found by stem."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import reprlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from .errors import PysegError

# What images are read from: Pillow's name of the format -> suffixes. Pillow knows more, some of
# which run other programs (EPS) or are rare enough to be mostly an attack surface.
IMAGE_FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (),  # a camera's JPEG of several pictures
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".ppm",),
    "GIF": (".gif",),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)
LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
PART = ".part"  # how names of files and folders end that are being written
ABANDONED = 24 * 3600  # seconds after which such a one has lost its writer


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name on success and vanishes otherwise.

    What is written there, a file or a folder, is seen whole or not at all, whatever happens to the
    writer; two writers do not disturb each other. A folder that stood at ``path`` is replaced.

    Raises:
        PysegError: the folder of ``path`` does not exist, or a file is to replace a folder.
        OSError: with the name of ``path``, where the system refuses (no space, no permission).
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise PysegError(
            f"cannot write {str(path)!r}: the directory {str(path.parent)!r} does not exist; "
            "create it first"
        )
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{PART}")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():  # a folder replaces no folder with files in it
            retired = temporary.with_name(f"{temporary.name}.old{PART}")
            path.rename(retired)
            temporary.rename(path)
            _remove(retired)
        elif path.is_dir():
            raise PysegError(f"cannot write {str(path)!r}: it is a directory; give a file")
        else:
            temporary.replace(path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def take_lock(path: Path) -> Callable[[], None] | None:
    """Takes a file's lock, which ends with the process, even with one that is killed.

    Returns:
        What ends it before; None where another holds it. The file stays.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where nothing is inherited by forking
        from filelock import FileLock, Timeout

        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock.release
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise
    _held.add(descriptor)

    def release() -> None:
        _held.discard(descriptor)
        os.close(descriptor)

    return release


_held: set[int] = set()  # descriptors of locks


def _let_go() -> None:
    """Workers that outlive a killed process for some seconds must not hold its locks."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def remove_abandoned(folder: str | os.PathLike[str], older_than: float = ABANDONED) -> None:
    """Deletes what a writer that was killed left in ``folder``: `replacing`'s temporary names.

    Args:
        folder: where to look, not below it.
        older_than: seconds since the last change; younger ones may still have their writer.
    """
    for path in Path(folder).glob(f".*{PART}"):
        with contextlib.suppress(OSError):  # another process may be faster
            if time.time() - path.lstat().st_mtime > older_than:
                _remove(path)


def make_folder(path: str | os.PathLike[str], argument: str) -> Path:
    """Makes a folder, with those above it, unless it is there.

    Args:
        path: the folder.
        argument: what errors call it.

    Raises:
        PysegError: ``path`` is a file or lies below one.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise PysegError(
            f"{argument} {os.fspath(path)!r} is a file or lies below one; give a folder"
        ) from error
    return Path(path)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes ``text`` in UTF-8, whole or not at all."""
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Writes ``value`` as JSON, whole or not at all."""
    return write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(
    path: str | os.PathLike[str],
    error: Callable[[str], Exception] = PysegError,
    wanted: Any = object,
) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        error: makes the exception from a message.
        wanted: what the content must look like, see `check_json`; by default anything will do.

    Raises:
        Exception: what ``error`` makes: no such file, unreadable, no JSON, nested too deeply, or
            not as ``wanted``; then the message names the place.

    Example:
        >>> read_json("classes.json", LabelError, {"classes": [{"name": str, "id?": int}]})
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as cause:
        raise error(f"{os.fspath(path)!r} does not exist; check the path") from cause
    except (OSError, ValueError, RecursionError) as cause:
        raise error(
            f"{os.fspath(path)!r} cannot be read as JSON ({cause}); it is damaged, or no JSON"
        ) from cause
    check_json(value, wanted, repr(os.fspath(path)), error)
    return value


_KINDS = {
    int: "an integer of 64 bits",
    float: "a finite number",
    bool: "true, false, 0 or 1",
    str: "a text",
    list: "a list",
    dict: "an object",
}


def check_json(
    value: Any, wanted: Any, where: str, error: Callable[[str], Exception] = PysegError
) -> None:
    """Holds a JSON value against what is wanted of it.

    Args:
        value: as `json.loads` gives it.
        wanted: ``int`` (within 64 bits; no truth value), ``float`` (any finite number), ``bool``
            (0 and 1 too), ``str``, ``list``, ``dict`` or ``object`` (anything); a tuple of such,
            any of which will do; ``[shape]``, a list of these; ``{"key": shape, "other?": shape}``,
            an object with such entries at least, those with a question mark only where present.
        where: begins the message, such as the name of the file.
        error: makes the exception from a message.

    Raises:
        Exception: what ``error`` makes; the message says where in ``value``, what must be there and
            what is.
    """
    if fits_json(value, wanted):
        return
    if found := _misfit(value, wanted):
        place, complaint = found
        raise error(
            f"{where}: {place.lstrip('.')} {complaint}" if place else f"{where} {complaint}"
        )


def fits_json(value: Any, wanted: Any) -> bool:
    """Whether a JSON value is surely as `check_json` wants it, in a tenth of the time.

    False = it may be all the same: only `check_json` looks at every value by itself.
    """
    return _fit([value], wanted)


def _fit(values: list[Any], wanted: Any) -> bool:
    """The same of values in equal places, whose types are looked at together."""
    kinds = set(map(type, values))
    if wanted is object or not values:
        return True
    if isinstance(wanted, list):
        return kinds == {list} and _fit([*itertools.chain.from_iterable(values)], wanted[0])
    if isinstance(wanted, dict):
        if kinds != {dict}:
            return False
        for key, shape in wanted.items():
            name = key.removesuffix("?")
            if name == key and not all(name in value for value in values):
                return False
            if not _fit([value[name] for value in values if name in value], shape):
                return False
        return True
    if isinstance(wanted, tuple):
        return (
            int not in wanted
            and float not in wanted
            and bool not in wanted
            and (kinds <= set(wanted))
        )
    if wanted is int:
        return kinds == {int} and min(values) >= -(1 << 63) and max(values) < 1 << 63
    if wanted is float:
        return kinds <= {int, float} and all(map(_is_finite, values))
    if wanted is bool:
        return kinds <= {int, bool} and min(values) >= 0 and max(values) <= 1
    return kinds == {wanted}


def _misfit(value: Any, wanted: Any) -> tuple[str, str] | None:
    """The first place in ``value`` that is not as ``wanted``, and what is wrong there."""
    if isinstance(wanted, list):
        if not isinstance(value, list):
            return "", _must_be(_KINDS[list], value)
        for index, item in enumerate(value):
            if found := _misfit(item, wanted[0]):
                return f"[{index}]{found[0]}", found[1]
    elif isinstance(wanted, dict):
        if not isinstance(value, dict):
            return "", _must_be(_KINDS[dict], value)
        for key, shape in wanted.items():
            name = key[:-1] if key[-1] == "?" else key
            if name not in value:
                if name == key:
                    return "", f"lacks {name!r}"
            elif found := _misfit(value[name], shape):
                return f".{name}{found[0]}", found[1]
    elif not isinstance(wanted, tuple):
        if not _is_a(value, wanted):
            return "", _must_be(_KINDS[wanted], value)
    elif not any(_is_a(value, kind) for kind in wanted):
        return "", _must_be(" or ".join(_KINDS[kind] for kind in wanted), value)
    return None


def _is_a(value: Any, kind: type) -> bool:
    if kind is int:
        return type(value) is int and -(1 << 63) <= value < 1 << 63
    if kind is float:
        return type(value) in (int, float) and _is_finite(value)
    if kind is bool:
        return value is True or value is False or (type(value) is int and value in (0, 1))
    return isinstance(value, kind)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:  # an integer beyond
        return False


def _must_be(kind: str, value: Any) -> str:
    return f"must be {kind}, got {reprlib.repr(value)}"


def finite(value: Any) -> Any:
    """``value`` for JSON, which has no nan and no infinity: both become None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def files_by_stem(folder: Path, suffixes: Sequence[str], argument: str) -> dict[str, Path]:
    """The files of ``folder`` with one of ``suffixes``, sorted, by stem.

    Raises:
        FileNotFoundError: no such folder, or it holds no such file.
        ValueError: two files share a stem.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{argument}: there is no folder {folder}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in found:
                raise ValueError(
                    f"{argument}: {found[path.stem]} and {path.name} have the same "
                    "stem; samples are matched by it, remove one"
                )
            found[path.stem] = path
    if not found:
        raise FileNotFoundError(f"{argument}: {folder} holds no {', '.join(suffixes)} file")
    return found


def some(names: Iterable[Any], separator: str = ", ") -> str:
    """A few of ``names``, for messages; those of a set are sorted."""
    chosen = [str(name) for name in (sorted(names) if isinstance(names, Set) else names)]
    rest = f" and {len(chosen) - 5} more" if len(chosen) > 5 else ""
    return separator.join(chosen[:5]) + rest
