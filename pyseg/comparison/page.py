"""The page of a comparison, with its numbers as JSON beside it."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import page
from ..files import write_json, write_text
from .result import DEFINITIONS, SCORES, Comparison, Row, interval_text

WIDTH, HEIGHT = 620, 330  # of a plot, in pixels
LEFT, RIGHT, TOP, BOTTOM = 52, 36, 14, 44  # its margins


def write_comparison(folder: str | Path, result: Comparison) -> list[Path]:
    """Writes ``index.html`` and ``compare.json``, each whole or not at all.

    Returns:
        The two files.
    """
    files = [Path(folder) / "compare.json", Path(folder) / "index.html"]
    write_json(files[0], result.to_dict())
    parts = [_failures(result)]
    if result.rows:
        parts += [
            page.section("Table", DEFINITIONS, page.table(*_table(result))),
            page.section("Intervals", result.method, page.table(*_intervals(result))),
            _differences(result),
            _curves(result.rows),
            page.section("IoU by class", "", page.table(*_classes(result))),
            _pictures(result),
        ]
    recipe = {
        key.replace("_", " "): str(value)
        for key, value in result.recipe.items()
        if key not in ("classes", "images") and value is not None
    }
    parts.append(page.origin(result.made | recipe))
    models = len({row.model for row in result.rows})
    heading = f"{models} model{'' if models == 1 else 's'} compared"
    about = f"trained by one recipe, scored on {len(result.images)} images"
    write_text(files[1], page.whole(heading, about, "".join(parts), files[0].name))
    return files


def _table(result: Comparison) -> tuple[list[str], list[list[str]]]:
    """With the number and the pipeline in the first column, which stays when a table scrolls."""
    head, rows = result.table()
    labels = _numbered(result.rows)
    return ["pipeline", *head[3:]], [[k, *row[3:]] for k, row in zip(labels, rows, strict=True)]


def _numbered(rows: Sequence[Row]) -> list[str]:
    return [f"{number} {row.label}" for number, row in enumerate(rows, 1)]


def _failures(result: Comparison) -> str:
    if not result.failures:
        return ""
    rows = [[name, reason] for name, reason in result.failures.items()]
    return page.section("Failed", "", page.table(["pipeline", "why"], rows))


def _intervals(result: Comparison) -> tuple[list[str], list[list[str]]]:
    names = [name for name, _, _ in SCORES]
    rows = [
        [label, *(interval_text(row.intervals[name]) for name in names)]
        for label, row in zip(_numbered(result.rows), result.rows, strict=True)
    ]
    return ["pipeline", *names], rows


def _differences(result: Comparison) -> str:
    """A matrix of signs, each with its difference and interval as a title."""
    count = len(result.rows)
    head = "".join(f'<th scope="col">{k + 1}</th>' for k in range(count))
    body = ""
    for k, label in enumerate(_numbered(result.rows)):
        cells = ""
        for other in range(count):
            if k == other:
                cells += "<td></td>"
                continue
            found = result.difference(k, other)
            title = f"{found.value:+.4f}, {found.low:+.4f} to {found.high:+.4f}"
            cells += f'<td title="{title}">{result.sign(k, other)}</td>'
        body += f'<tr><th scope="row">{html.escape(label)}</th>{cells}</tr>'
    table = (
        f'<div class="scroll"><table><thead><tr><th scope="col">mIoU</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
    text = (
        f"+ the row is above the column, - below, . within noise. {result.method}. A cell's title "
        "has the difference and its interval."
    )
    return page.section("Differences", text, table)


def _classes(result: Comparison) -> tuple[list[str], list[list[str]]]:
    rows = [
        [label, *(page.number(row.iou[name]) for name in result.classes)]
        for label, row in zip(_numbered(result.rows), result.rows, strict=True)
    ]
    return ["pipeline", *result.classes], rows


def _curves(rows: Sequence[Row]) -> str:
    plots = _plot(rows, "mIoU over ms an image", lambda row: row.milliseconds)
    plots += _plot(rows, "mIoU over parameters, millions", lambda row: row.parameters / 1e6)
    text = (
        "Numbers are those of the table's rows, bars their intervals; the line joins those that "
        "no other row beats in both."
    )
    return page.section("Curves", text, plots)


def _plot(rows: Sequence[Row], title: str, cost_of: Callable[[Row], float]) -> str:
    """mIoU over a cost on a logarithmic axis, with intervals and the line of the best."""
    scored = [
        (cost_of(row), row.scores["mIoU"], row.intervals["mIoU"], number, row.label)
        for number, row in enumerate(rows, 1)
        if cost_of(row) > 0 and not math.isnan(row.scores["mIoU"])
    ]
    if not scored:
        return ""
    low = min(cost for cost, *_ in scored) / 1.25
    high = max(cost for cost, *_ in scored) * 1.25
    ends = [end for _, miou, interval, *_ in scored for end in (miou, *interval)]
    known = [end for end in ends if not math.isnan(end)]
    bottom = math.floor(20 * min(known)) / 20
    top = max(math.ceil(20 * max(known)) / 20, bottom + 0.05)

    def x_of(cost: float) -> float:
        share = math.log(cost / low) / math.log(high / low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y_of(miou: float) -> float:
        return TOP + (top - miou) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in _ticks(low, high):
        x = x_of(tick)
        parts.append(
            f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" '
            'style="stroke:var(--line)"/>'
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
        )
    lines = round((top - bottom) / 0.05)
    for k in range(0, lines + 1, max(1, math.ceil(lines / 8))):
        value = bottom + 0.05 * k
        parts.append(
            f'<line x1="{LEFT}" y1="{y_of(value):.1f}" x2="{WIDTH - RIGHT}" y2="{y_of(value):.1f}" '
            'style="stroke:var(--line)"/>'
            f'<text x="{LEFT - 6}" y="{y_of(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>'
        )
    best: list[tuple[float, float]] = []
    for cost, miou, *_ in sorted(scored, key=lambda entry: (entry[0], -entry[1])):
        if not best or miou > best[-1][1]:
            best.append((cost, miou))
    path = " ".join(f"{x_of(cost):.1f},{y_of(miou):.1f}" for cost, miou in best)
    parts.append(
        f'<polyline points="{path}" fill="none" stroke-width="2" style="stroke:var(--pale)"/>'
    )
    for cost, miou, interval, number, label in scored:
        x, y = x_of(cost), y_of(miou)
        name = html.escape(f"{label}: mIoU {miou:.4f}, {cost:.3g}")
        if not math.isnan(interval[0]):
            parts.append(
                f'<line x1="{x:.1f}" y1="{y_of(interval[0]):.1f}" x2="{x:.1f}" '
                f'y2="{y_of(interval[1]):.1f}" style="stroke:var(--frame)"/>'
            )
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" style="fill:var(--blue)">'
            f"<title>{name}</title></circle>"
            f'<text x="{x + 7:.1f}" y="{y - 5:.1f}">{number}</text>'
        )
    return (
        f'<div class="scroll"><p>{html.escape(title)}</p><svg role="img" '
        f'aria-label="{html.escape(title)}" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg></div>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within a range; of a wide one the powers alone."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 1e3 else (1,)
    ticks = [step * 10.0**exponent for exponent in exponents for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def _pictures(result: Comparison) -> str:
    """For each image that is shown, what every row makes of it, side by side."""
    figures = []
    for k, (name, image, truth) in enumerate(result.shown):
        pictures = [("image", image), ("ground truth", truth)]
        pictures += [
            (label, row.pictures[k])
            for label, row in zip(_numbered(result.rows), result.rows, strict=True)
        ]
        shown = "".join(
            f'<div>{html.escape(caption)}<img alt="{html.escape(f"{caption} of {name}")}" '
            f'loading="lazy" src="{page.data_uri(data, "jpeg")}"></div>'
            for caption, data in pictures
        )
        figures.append(
            f"<figure><figcaption><b>{html.escape(name)}</b></figcaption>"
            f'<div class="pictures">{shown}</div></figure>'
        )
    legend = "".join(
        f'<span class="key" style="background:rgb{colour}"></span>{html.escape(name)}'
        for name, colour in zip(result.classes, result.palette, strict=True)
    )
    return page.section("Side by side", "", f"<p>{legend}</p>{''.join(figures)}")
