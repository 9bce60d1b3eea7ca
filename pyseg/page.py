"""Pages of HTML that need nothing else: their parts, and where their numbers come from."""

from __future__ import annotations

import base64
import datetime
import html
import io
import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from . import __version__

PICTURE_WIDTH = 960  # pixels, at most

STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --soft: #5c667a; --line: #dfe3ea;
  --blue: #2f6db3; --pale: #b9cde4; --back: #f5f6f8; --paper: #fff; --clear: #fff0;
  --track: #eef1f5; --shade: #0003; --frame: #98a2b3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #a3adbd; --line: #343b48; --blue: #6aa5e8; --pale: #3d5a7d;
    --back: #14171d; --paper: #1d2129; --clear: #1d212900; --track: #2a303b; --shade: #fff3;
    --frame: #667085; }
}
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans",
  sans-serif; color: var(--ink); background: var(--back); }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 12px; }
p { margin: 0 0 12px; color: var(--soft); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin: 18px 0; }
/* A shadow at an edge says that there is more to scroll to. */
.scroll { overflow-x: auto; background: linear-gradient(to right, var(--paper) 40%, var(--clear)),
  linear-gradient(to left, var(--paper) 40%, var(--clear)) 100% 0,
  linear-gradient(to right, var(--shade), transparent),
  linear-gradient(to left, var(--shade), transparent) 100% 0; background-repeat: no-repeat;
  background-size: 40px 100%, 40px 100%, 12px 100%, 12px 100%;
  background-attachment: local, local, scroll, scroll; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--paper); }
tbody th { font-weight: 400; }
th:last-child, td:last-child { padding-right: 4px; }
thead th { color: var(--soft); font-weight: 600; }
.bars { display: grid; grid-template-columns: minmax(70px, max-content) 1fr; gap: 8px 12px;
  align-items: center; }
.line { display: grid; grid-template-columns: 1fr 4.6em; gap: 12px; align-items: center;
  font-size: .85rem; line-height: 1.3; }
.bars .name { overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: 6px;
  border: 1px solid #0003; }
.bar { height: 9px; border-radius: 2px; background: var(--blue); min-width: 1px; }
.bar.other { background: var(--pale); }
.track { background: var(--track); border-radius: 2px; }
.said { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.value { text-align: right; font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: 1.6em; height: 9px; border-radius: 2px; margin: 0 6px 0 12px; }
svg { display: block; max-width: none; }
svg text { font: 12px system-ui, "DejaVu Sans", sans-serif; fill: var(--ink); }
figure { margin: 0 0 22px; }
figure:last-child { margin-bottom: 0; }
figcaption { margin-bottom: 8px; overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 12px; }
.pictures div { font-size: .85rem; color: var(--soft); }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
.side { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr));
  gap: 18px; margin: 18px 0; align-items: start; }
.side section { margin: 0; min-width: 0; }
.side th:not(:first-child), .side td:not(:first-child) { padding: 6px 4px 6px 8px; }
.plots { display: flex; flex-wrap: wrap; gap: 20px; }
.plots > div { flex: 1 1 280px; max-width: 420px; }
footer { max-width: 1120px; margin: 0 auto; padding: 0 20px 28px; color: var(--soft);
  font-size: .85rem; }
@media (max-width: 600px) {
  header, main { padding-left: 10px; padding-right: 10px; }
  section { padding: 14px 12px; margin: 12px 0; }
  .side { gap: 12px; margin: 12px 0; }
  h1 { font-size: 1.25rem; }
  th, td { padding: 6px 9px; }
}
"""


def whole(heading: str, about: str, body: str, numbers: str) -> str:
    """A whole page.

    Args:
        heading: its title, as text.
        about: the line below, as text.
        body: its sections, as HTML.
        numbers: name of the JSON file beside it.
    """
    heading = html.escape(heading)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{heading}</h1><p>{html.escape(about)}</p></header>\n<main>\n{body}</main>\n"
        f"<footer>All numbers are in {numbers} beside this page. Written by pyseg.</footer>\n"
        "</body>\n</html>\n"
    )


def section(title: str, text: str, content: str) -> str:
    """A card: its title and what is said of it as text, its content as HTML."""
    note = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{note}{content}</section>\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, wide ones scroll; the first cell of a row names it."""
    columns = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def number(value: Any) -> str:
    """A value as tables show it."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def data_uri(content: bytes, kind: str) -> str:
    """A picture within the page; ``kind`` is such as ``"png"``."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def jpeg(picture: Image.Image) -> bytes:
    """A picture of at most `PICTURE_WIDTH` pixels as a file."""
    if picture.width > PICTURE_WIDTH:
        height = max(1, round(picture.height * PICTURE_WIDTH / picture.width))
        picture = picture.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=82)
    return stream.getvalue()


def made(devices: Iterable[tuple[str, int]]) -> dict[str, str]:
    """Where numbers come from, by what it is called on a page.

    Args:
        devices: what computed, with the number of torch's threads.
    """
    named = []
    for device, threads in devices:
        counted = f", {threads} thread{'s'[: threads - 1]}"
        named.append(device + (counted if device == "cpu" else ""))
    program = Path(sys.argv[0])
    called = program.stem == "pyseg" or program.parts[-2:] == ("pyseg", "__main__.py")
    return {
        **({"command": shlex.join(["pyseg", *sys.argv[1:]])} if called else {}),
        "pyseg": __version__,
        "torch": torch.__version__,
        "device": "; ".join(dict.fromkeys(named)),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
    }


def origin(entries: Mapping[str, str]) -> str:
    """The card of what `made` found."""
    shown = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>"
        for key, value in entries.items()
    )
    return section("How this was measured", "", f"<dl>{shown}</dl>")
