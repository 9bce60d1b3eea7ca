"""XML of strangers: parsed without entities, with one kind of error."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

from ..errors import LabelError


class _Doctype(Exception):
    pass


def read_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file.

    Raises:
        LabelError: it cannot be read, is no XML, or declares entities, by which a file of a
            kilobyte can become gigabytes.
    """
    where = repr(str(path))
    try:
        data = path.read_bytes()
        parser = expat.ParserCreate()
        parser.StartDoctypeDeclHandler = _refuse
        parser.Parse(data, True)
        return ElementTree.fromstring(data)
    except _Doctype as error:
        raise LabelError(
            f"{where} has a document type, which annotations do not need; remove it"
        ) from error
    except OSError as error:
        raise LabelError(f"{where} cannot be read ({error.strerror}); check the path") from error
    except (
        expat.ExpatError,
        ElementTree.ParseError,
        ValueError,
        LookupError,
        RecursionError,
    ) as error:
        raise LabelError(
            f"{where} cannot be read as XML ({error}); it is damaged, or no XML"
        ) from error


def _refuse(*_: object) -> None:
    raise _Doctype


def text_of(element: ElementTree.Element, tag: str, where: str) -> str:
    """The text of a child that must be there."""
    found = element.find(tag)
    text = "" if found is None or found.text is None else found.text.strip()
    if not text:
        raise LabelError(f"{where}: <{element.tag}> has no <{tag}>; add it")
    return text


def attribute(element: ElementTree.Element, name: str, where: str) -> str:
    """An attribute that must be there."""
    value = element.get(name)
    if value is None:
        raise LabelError(f"{where}: <{element.tag}> has no {name!r}; add it")
    return value


def number(text: str, what: str, where: str) -> float:
    """A finite number from a text."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise LabelError(f"{where}: {what} must be a finite number, got {text[:40]!r}; mend it")
    return value


def integer(text: str, what: str, where: str) -> int:
    """A whole number from a text, within 32 bits."""
    value = number(text, what, where)
    if value != int(value) or abs(value) >= 1 << 31:
        raise LabelError(f"{where}: {what} must be a whole number, got {text[:40]!r}; mend it")
    return int(value)
