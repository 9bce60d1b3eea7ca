"""Weights from a local file, a known name or a URL: found, fetched, verified and loaded safely.

Downloads go to the cache directory: ``$PYSEG_CACHE``, else ``$XDG_CACHE_HOME/pyseg``, else
``~/.cache/pyseg``. With ``PYSEG_OFFLINE=1`` nothing is fetched: what is not there is an error that
says where to put it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import difflib
import errno
import hashlib
import http.client
import math
import os
import pickle
import re
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from torch import Tensor, nn

from .errors import WeightsError
from .files import replacing

_CHUNK = 1 << 20  # bytes read at a time
_TIMEOUT = 30  # seconds without an answer
_LARGEST = 64 << 30  # bytes; more is no checkpoint but a server that does not end
_SLOWEST = 1 << 10  # bytes a second, on average, after the first minute
_PATIENCE = 60  # seconds before that is asked
_UNPACKED = 4  # times its own size that a file may hold; torch.save packs nothing
_PROGRESS_AFTER = 2  # seconds before a progress bar appears
_TEMPERATURE = "temperature"  # its name among a file's metadata


@dataclass(frozen=True)
class Remote:
    """Where weights are published.

    ``sha256`` is the hex digest of the file or, as in torchvision's file names, the first eight
    or more digits of it.
    """

    url: str  # http, https or file
    sha256: str | None = None


def cache_directory() -> Path:
    """The directory that downloads go to; it need not exist yet."""
    if chosen := os.environ.get("PYSEG_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyseg"


def cached_path(remote: Remote) -> Path:
    """Where the file of ``remote`` is, or would be, kept: host and path of its URL in the cache."""
    try:
        url = urlsplit(remote.url)
        _ = url.port  # lazily checked
    except ValueError as error:
        raise WeightsError(
            f"weights: {_without_login(remote.url)!r} is no URL ({error}); check it"
        ) from error
    if url.scheme == "file":
        if url.netloc not in ("", "localhost"):
            raise WeightsError(
                f"weights: {remote.url} names a file of another computer, {url.netloc!r}; a local "
                "one has three slashes: file:///folder/net.pth"
            )
        return Path(urllib.request.url2pathname(url.path))
    parts = [part for part in unquote(url.path).split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise WeightsError(
            f"weights: {_without_login(remote.url)} names no file; give the URL of the "
            "checkpoint itself"
        )
    if url.query:  # two queries are two files
        parts.insert(-1, hashlib.sha256(url.query.encode()).hexdigest()[:12])
    return cache_directory().joinpath(url.netloc.rpartition("@")[2].replace(":", "_"), *parts)


def _without_login(url: str) -> str:
    """A URL for messages: no user, no password."""
    return re.sub(r"//[^/?#]*@", "//", url)


def _brief(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "…")


def resolve(weights: str | Path, *, known: Mapping[str, Remote] | None = None) -> Path:
    """The local file that ``weights`` stands for, downloaded into the cache where necessary.

    Args:
        weights: a known name, an http, https or file URL, or the path of a local file, in this
            order (write ``./tiny`` for a file that is called like a known name).
        known: the names that the caller offers.

    Returns:
        The path of an existing file. Where a sha256 is known the file has it, downloaded now or
        found in the cache.

    Raises:
        WeightsError: no such name or file, no network, ``PYSEG_OFFLINE`` is set, or a wrong
            sha256. The message names the URL and the file where it was to be kept.
    """
    known = known or {}
    text = os.fspath(weights)
    if isinstance(weights, str) and text in known:
        return _fetch(known[text], text)
    scheme, separator, rest = text.partition("://")
    if isinstance(weights, str) and separator:
        if scheme.lower() not in ("http", "https", "file"):
            raise WeightsError(
                f"weights={_brief(_without_login(text))}: cannot fetch {scheme[:20]}:// URLs; use "
                "http, https, file or a local path"
            )
        url = f"{scheme.lower()}://{rest}"
        return _fetch(Remote(url), _without_login(url))
    try:
        path = Path(text).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null in it, no such ~user
        raise WeightsError(f"weights={_brief(text)} cannot be a file ({_plain(error)})") from error
    if is_file:
        return path
    if is_folder:
        raise WeightsError(f"weights={text!r} is a directory; give the checkpoint file in it")
    names = ", ".join(known) or "none here"
    near = difflib.get_close_matches(text, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise WeightsError(
        f"weights={_brief(text)} is neither a file nor a known name{hint} "
        f"(known names: {names}; otherwise give a path or a URL)"
    )


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Reads a state dict onto the CPU without running code that the file may contain.

    Accepts what ``torch.save`` writes and safetensors, told apart by content; a state dict may
    stand alone or under the key ``model`` or ``state_dict``.

    Raises:
        WeightsError: the file is absent, truncated, an HTML page or a Git LFS pointer, would run
            code when unpickled, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"weights: there is no file {path}")
    with path.open("rb") as file:
        head = file.read(512)
    if cause := _not_weights(head):
        remedy = f"; {_again(path)}" if _is_cached(path) else ""
        raise WeightsError(f"weights: {path} {cause}{remedy}")
    loaded = _read_safetensors(path) if head[8:9] == b"{" else _read_torch(path, head)
    if isinstance(loaded, dict):
        for key in ("model", "state_dict"):
            if isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
    if (
        not isinstance(loaded, dict)
        or not loaded
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items())
    ):
        found = f"keys {list(loaded)[:5]}" if isinstance(loaded, dict) else type(loaded).__name__
        raise WeightsError(
            f"weights: {path} holds no state dict (a dict of tensors, bare or under 'model' or "
            f"'state_dict') but {found}; save model.state_dict()"
        )
    return dict(loaded)


def save_state(
    path: str | Path, state: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes a state dict as safetensors, whole or not at all.

    Args:
        path: target; its directory must exist.
        state: tensors on any device, which may share memory.
        metadata: what stands in the file beside the tensors; None = nothing.

    Raises:
        OSError: the file cannot be written, such as on a full disk; it names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    # clone: safetensors refuses tensors that share memory
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors gives 0600
        try:
            save_file(tensors, temporary, dict(metadata) if metadata else None)
        except SafetensorError as error:
            if "No space left" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise OSError(errno.EIO, f"cannot be written ({error})", str(path)) from error
        temporary.chmod(mode)
    return path


def load_temperature(path: str | Path) -> float:
    """The temperature of the network's logits that a file of weights tells; 1 where it tells none.

    Raises:
        WeightsError: the file is absent or damaged, or tells what is no temperature.
    """
    text = _metadata(Path(path)).get(_TEMPERATURE, "1")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise WeightsError(
            f"weights: {path} tells a temperature of {text[:40]!r}, which must be a number above "
            "0; store another with `pyseg tune temperature --store`"
        )
    return value


def store_temperature(path: str | Path, value: float) -> Path:
    """Writes a temperature into a file of weights, whose tensors and other metadata stay.

    Raises:
        ValueError: ``value`` is not above 0 and finite.
        WeightsError: the file is absent, damaged or no safetensors.
        OSError: it cannot be written.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"value must be above 0 and finite, got {value}")
    path = Path(path)
    require_safetensors(path)
    metadata = {**_metadata(path), **temperature_metadata(value)}
    return save_state(path, load_state(path), metadata=metadata)


def temperature_metadata(value: float) -> dict[str, str]:
    """What `save_state` takes as ``metadata`` for `load_temperature` to read."""
    return {_TEMPERATURE: repr(float(value))}


def require_safetensors(path: str | Path) -> None:
    """Raises WeightsError for a file that cannot hold a temperature."""
    if not _is_safetensors(Path(path)):
        raise WeightsError(
            f"weights: {path} is no safetensors file, and only these hold a temperature; save the "
            "state dict with pyseg.weights.save_state"
        )


def _is_safetensors(path: Path) -> bool:
    if not path.is_file():
        raise WeightsError(f"weights: there is no file {path}")
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _metadata(path: Path) -> dict[str, str]:
    if not _is_safetensors(path):
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise WeightsError(
            f"weights: {path} is truncated or damaged ({error}); {_again(path)}"
        ) from error


def load_into(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Copies ``state`` into ``module``, all of it or, on any mismatch, nothing.

    Args:
        module: receives the weights; its dtype and device stay.
        state: one tensor per entry of ``module.state_dict()``.
        source: where the state came from, for the message.

    Raises:
        WeightsError: entries are missing, unexpected, of another shape, or of another kind of
            number: complex and quantized ones would lose a part without a word.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key}: {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    kinds = [
        f"{key}: {str(state[key].dtype).removeprefix('torch.')}"
        for key in own
        if key in state and state[key].is_floating_point() != own[key].is_floating_point()
    ]
    if missing or unexpected or shapes or kinds:
        faults = "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for what, keys in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", shapes),
                ("of another kind of number", kinds),
            )
            if keys
        )
        raise WeightsError(
            f"weights: {source} is of another architecture than {type(module).__name__}, which has "
            f"{len(own)} entries: {faults}. Give the weights of this model, or build the model "
            "(name, size, num_classes) that they belong to"
        )
    module.load_state_dict(dict(state))


def _plain(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


# --- fetching ---------------------------------------------------------------------------------


def _fetch(remote: Remote, asked: str) -> Path:
    target = cached_path(remote)
    local = remote.url.startswith("file:")
    if not target.is_file():
        if local:
            raise WeightsError(f"weights={asked!r}: there is no file {target}")
        advice = (
            f"fetch {_without_login(remote.url)} elsewhere and put it at {target}, or pass "
            "weights=<path>, or weights=None for random weights"
        )
        if os.environ.get("PYSEG_OFFLINE", "").lower() not in ("", "0", "false", "no"):
            raise WeightsError(
                f"weights={asked!r} are not in the cache and PYSEG_OFFLINE is set: {advice}"
            )
        _download(remote, target, asked, advice)
    elif remote.sha256 and (cause := _wrong_digest(target, remote.sha256)):
        # Also of files found: whoever puts one there by hand may have put half of it.
        remedy = "correct the file or the sha256" if local else "delete it to fetch it again"
        raise WeightsError(f"weights={asked!r}: {target} {cause}; {remedy}")
    return target


class _CacheError(Exception):
    """The cache cannot be written: nothing that a network could mend."""


@contextlib.contextmanager
def _of_the_cache() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _CacheError(f"{error.filename or 'a file in it'}: {_plain(error)}") from error


def _download(remote: Remote, target: Path, asked: str, advice: str) -> None:
    """Fills ``target`` by an atomic rename of ``<target>.part``, complete and verified."""
    from filelock import FileLock

    part = target.with_name(target.name + ".part")
    lock = FileLock(target.with_name(target.name + ".lock"))
    try:
        with _of_the_cache():
            target.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        try:
            _download_alone(remote, target, part, asked, advice)
        finally:
            lock.release()
    except _CacheError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)  # a full disk gets its space back
        raise WeightsError(
            f"weights={asked!r}: the cache {cache_directory()} cannot be written ({error}); make "
            f"room or set PYSEG_CACHE to a folder that can be written, or {advice}"
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise WeightsError(
            f"weights={asked!r} could not be downloaded ({_without_login(str(error))}): {advice}"
        ) from error


def _download_alone(remote: Remote, target: Path, part: Path, asked: str, advice: str) -> None:
    with _of_the_cache():
        if target.is_file():  # another process was faster
            return
        # Without a digest nobody would notice that a left-over belongs to an older file.
        if remote.sha256 is None:
            part.unlink(missing_ok=True)
    resumed = _transfer(remote.url, part)
    with _of_the_cache():
        cause = _wrong_digest(part, remote.sha256) if remote.sha256 else None
        if cause and resumed:
            part.unlink()
    if cause and resumed:
        _transfer(remote.url, part)
        cause = _wrong_digest(part, remote.sha256 or "")
    with _of_the_cache():
        cause = cause or _not_whole(part)
        if cause is None:
            part.replace(target)
            return
        part.unlink()
    raise WeightsError(
        f"weights={asked!r}: what {_without_login(remote.url)} sent {cause}; nothing "
        f"was kept. Check the URL, or {advice}"
    )


def _request(url: str, have: int) -> urllib.request.Request:
    parts = urlsplit(url)
    login, separator, place = parts.netloc.rpartition("@")
    request = urllib.request.Request(
        parts._replace(netloc=place).geturl(),
        headers={"User-Agent": "pyseg", "Accept-Encoding": "identity"},
    )
    if separator:
        # Unredirected: another host, to which a server sends us on, is not told the password.
        token = base64.b64encode(unquote(login).encode()).decode("ascii")
        request.add_unredirected_header("Authorization", f"Basic {token}")
    if have:
        request.add_header("Range", f"bytes={have}-")
    return request


def _transfer(url: str, part: Path) -> bool:
    """Appends to ``part`` what is missing of ``url``; True where a left-over was continued."""
    have = part.stat().st_size if part.is_file() else 0
    try:
        response = urllib.request.urlopen(_request(url, have), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        error.close()
        part.unlink()  # as long as the whole file or longer: start afresh
        return _transfer(url, part)
    with response:
        packed = response.headers.get("Content-Encoding", "identity").lower()
        if packed not in ("", "identity"):
            raise OSError(f"the server sent it packed by {packed}, which was not asked for")
        # A server without ranges answers 200 and sends everything.
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        if response.status == 206 and not resumed:
            raise OSError(f"the server sent another range than bytes {have}-")
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        if length is not None and not length.isdecimal():
            raise OSError(f"the server named {length!r} as the length")
        total = have + int(length) if length else None
        if max(have, total or 0) > _LARGEST:
            raise OSError(f"{total} bytes are more than the {_LARGEST} that weights may have")
        begin, first = time.monotonic(), have
        with _of_the_cache():
            file = part.open("ab" if resumed else "wb", buffering=0)
        with file, _progress(part.stem, total) as report:
            # read1 returns what is there: read would wait for ever on a server that drips
            while block := response.read1(_CHUNK):
                with _of_the_cache():
                    if file.write(block) != len(block):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part))
                have += len(block)
                report(have)
                if have > _LARGEST:
                    file.close()
                    part.unlink()
                    raise OSError(f"it had not ended after {_LARGEST} bytes")
                elapsed = time.monotonic() - begin
                if elapsed > _PATIENCE and have - first < _SLOWEST * elapsed:
                    raise OSError(
                        f"{have - first} bytes in {elapsed:.0f} seconds are too slow; run again "
                        "to resume"
                    )
    if total is not None and have != total:
        raise OSError(f"the connection ended after {have} of {total} bytes; run again to resume")
    return resumed


@contextlib.contextmanager
def _progress(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yields ``report(bytes so far)``, which shows a bar once the transfer proves to be slow."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task(f"downloading {name}", total=total)
    begin = time.monotonic()

    def report(done: int) -> None:
        bar.update(task, completed=done)
        if not bar.live.is_started and time.monotonic() - begin > _PROGRESS_AFTER:
            bar.start()

    try:
        yield report
    finally:
        if bar.live.is_started:
            bar.stop()


# --- judging files ----------------------------------------------------------------------------


def _wrong_digest(path: Path, expected: str) -> str | None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        head = file.read(512)
        digest.update(head)
        while block := file.read(_CHUNK):
            digest.update(block)
    if digest.hexdigest().startswith(expected.lower()):
        return None
    return _not_weights(head) or (
        f"has sha256 {digest.hexdigest()} instead of {expected} ({path.stat().st_size} bytes)"
    )


def _not_weights(head: bytes) -> str | None:
    """What a file that cannot be weights is, judged by its first bytes."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not head:
        return "is empty; fetch it again"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            "is an HTML or XML page, not weights: an error or login page was saved in their "
            "place; fetch the file again"
        )
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights; run git lfs pull"
    return None


def _not_whole(path: Path) -> str | None:
    """Why a file of which no digest is known is no complete checkpoint, judged by its directory."""
    with path.open("rb") as file:
        head = file.read(512)
    if cause := _not_weights(head):
        return cause
    if head[8:9] == b"{":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt"):  # reads the header, which says how long the file is
                return None
        except SafetensorError as error:
            return f"is truncated or damaged ({error})"
    if head.startswith(b"PK"):
        whole = zipfile.is_zipfile(path)  # the directory of a zip file is at its end
        return None if whole else f"is truncated ({path.stat().st_size} bytes)"
    if head[:1] == b"\x80":  # torch.save before 1.6, which has no directory: its last byte is free
        return None
    return f"is neither a torch.save file nor safetensors; it begins with {head[:16]!r}"


def _is_cached(path: Path) -> bool:
    return cache_directory().absolute() in path.absolute().parents


def _again(path: Path) -> str:
    """How to get a file once more."""
    return "delete it, and it is fetched again" if _is_cached(path) else "fetch it again"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise WeightsError(
            f"weights: {path} is truncated or damaged ({error}); {_again(path)}"
        ) from error


def _read_torch(path: Path, head: bytes) -> object:
    zipped = head.startswith(b"PK")
    if zipped and not zipfile.is_zipfile(path):  # the directory of a zip file is at its end
        raise WeightsError(
            f"weights: {path} is truncated ({path.stat().st_size} bytes); {_again(path)}"
        )
    if not zipped and head[:1] != b"\x80":
        raise WeightsError(
            f"weights: {path} is neither a torch.save file nor safetensors; it "
            f"begins with {head[:16]!r}"
        )
    try:
        if zipped:
            _refuse_bombs(path)
        # Beside their weights, checkpoints of torchvision's scripts keep the command's arguments: a
        # bag of attributes, whose making runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise WeightsError(f"weights: {path} is truncated; {_again(path)}") from error
        # Not torch's text, which advises to load it all the same.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        asks = f" ({named[1]})" if named else ""
        raise WeightsError(
            f"weights: {path} is a pickle that needs more than tensors{asks}, and loading it would "
            "run code from the file, so it was not loaded. Ask its author for safetensors or a "
            "state_dict() alone"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, OSError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise WeightsError(
            f"weights: {path} is truncated or damaged ({reason}); {_again(path)}"
        ) from error


def _refuse_bombs(path: Path) -> None:
    """A zip file whose entries are far larger than itself would fill the memory."""
    with zipfile.ZipFile(path) as archive:
        inside = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    if inside > _UNPACKED * size:
        raise WeightsError(
            f"weights: {path} has {size} bytes and would unpack to {inside}, though torch.save "
            "packs nothing, so it was not loaded; fetch it from its author"
        )
