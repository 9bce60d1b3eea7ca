"""Evaluations as one HTML page that needs nothing else, with their numbers as JSON beside it."""

from __future__ import annotations

import base64
import datetime
import html
import io
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from . import __version__
from .errors import PysegError
from .evaluation import Evaluation, StageScores, title_of
from .files import finite, make_folder, write_json, write_text
from .image import read_image
from .metrics.panoptic import Panoptic
from .metrics.semantic import Semantic
from .pipeline import StageResult
from .processes import gather_objects
from .types import VOID, Dataset, Sample, Segmentation
from .visual import error_map, overlay, reliability_diagram

WORST = 6  # images that are shown
PICTURE_WIDTH = 960  # pixels, at most


@dataclass(frozen=True)
class WorstImage:
    """An image that the last stage segments badly."""

    name: str
    scores: dict[str, float]  # of this image alone; the first one ranks it
    captions: tuple[str, ...]
    pictures: tuple[bytes, ...] = field(repr=False)  # JPEG, one per caption

    @property
    def rank(self) -> tuple[float, str]:
        """Order from the worst."""
        return next(iter(self.scores.values())), self.name


class WorstImages:
    """Keeps pictures of the images that the last stage segments worst; the memory of a few JPEGs.

    Pass `add` as ``observe`` to `pyseg.evaluation.evaluate`, and then all to `write_page`. Images
    with panoptic segments, both predicted and true, are ranked by their panoptic quality and shown
    beside the ground truth; others by the mean IoU of their classes, with a map of the errors.
    Images without ground truth of either kind are not kept.

    Args:
        dataset: has the ``classes``, the ``palette`` and, if panoptic, the ``things``.
        count: how many images are kept.

    Example:
        >>> worst = WorstImages(data)
        >>> result = evaluate(pipeline, data, observe=worst.add)
        >>> write_page("out", result, worst)
    """

    def __init__(self, dataset: Dataset, count: int = WORST) -> None:
        self.classes, self.palette = tuple(dataset.classes), tuple(dataset.palette)
        self.things = tuple(getattr(dataset, "things", ()))
        self.count = count
        self._void = VOID if len(self.classes) <= VOID else -1
        self._kept: list[WorstImage] = []

    def add(self, sample: Sample, results: Sequence[StageResult]) -> None:
        """Looks at one image and what the stages of a pipeline made of it."""
        final = results[-1].prediction
        panoptic = final.segments is not None and sample.segments is not None
        if panoptic:
            keys: tuple[str, ...] = ("pq", "sq", "rq")
            metric: Any = Panoptic(self.classes, things=self.things)
        elif sample.labels is not None:
            keys = ("miou", "pixel_accuracy")
            metric = Semantic(self.classes, ignore_index=self._void)
        else:
            return
        metric.update(final, sample)
        computed = metric.compute()
        scores = {key: computed[key] for key in keys}
        rank = scores[keys[0]], sample.name
        if math.isnan(rank[0]):  # no ground truth at all
            return
        if len(self._kept) == self.count and rank >= self._kept[-1].rank:
            return
        image = read_image(sample.image)
        draw = self._panoptic_pictures if panoptic else self._label_pictures
        pictures = {"image": Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())}
        pictures |= draw(image, final, sample, scores)
        encoded = tuple(_jpeg(picture) for picture in pictures.values())
        self._kept.append(WorstImage(sample.name, scores, tuple(pictures), encoded))
        self._kept = sorted(self._kept, key=lambda entry: entry.rank)[: self.count]

    def _panoptic_pictures(
        self, image: torch.Tensor, final: Segmentation, sample: Sample, scores: dict[str, float]
    ) -> dict[str, Image.Image]:
        return {
            "ground truth": self._painted(image, segments=sample.segments),
            f"prediction, PQ {100 * scores['pq']:.1f}": self._painted(
                image, segments=final.segments
            ),
        }

    def _label_pictures(
        self, image: torch.Tensor, final: Segmentation, sample: Sample, scores: dict[str, float]
    ) -> dict[str, Image.Image]:
        assert sample.labels is not None
        shown = {"labels": final.labels} if final.segments is None else {"segments": final.segments}
        return {
            "ground truth": self._painted(image, labels=sample.labels),
            "prediction": self._painted(image, **shown),
            "errors": error_map(final.labels, sample.labels, image, self._void),
        }

    def _painted(self, image: torch.Tensor, **result: Any) -> Image.Image:
        return overlay(image, 0.65, classes=self.classes, palette=self.palette, **result)

    def gather(self) -> list[WorstImage]:
        """The worst images of all processes, the worst first; each process must call it."""
        found = (entry for part in gather_objects(self._kept) for entry in part)
        return sorted(found, key=lambda entry: entry.rank)[: self.count]


class Recorder(WorstImages):
    """`WorstImages` and `write_page` in one, for code written before there were these.

    Args:
        folder: where the page will be; made now if absent.
        classes: of the dataset.
        palette: one RGB colour per class.
        stages: of no meaning any more.

    Raises:
        PysegError: ``folder`` is a file or lies below one.
    """

    def __init__(
        self,
        folder: str | Path,
        classes: Sequence[str],
        palette: Sequence[tuple[int, int, int]],
        stages: int = 0,
    ) -> None:
        self.folder = make_folder(folder, "folder")
        names: Any = SimpleNamespace(classes=tuple(classes), palette=tuple(palette))
        super().__init__(names)

    def write(self, result: Evaluation, title: str = "") -> list[Path]:
        """As `write_page`."""
        return write_page(self.folder, result, self, title=title)


@dataclass(frozen=True)
class _Column:
    """What the page puts side by side: stages of one pipeline, or last stages of several."""

    label: str
    scores: StageScores


def write_page(
    folder: str | Path,
    results: Evaluation | Sequence[Evaluation],
    worst: WorstImages | None = None,
    *,
    title: str = "",
) -> list[Path]:
    """Writes ``index.html`` and ``report.json``, each whole or not at all.

    One evaluation is shown stage by stage, several are compared by their last stages, against the
    first one. The page has what was measured: confusion matrix and IoU by class of ``semantic``, PQ
    by class of ``panoptic``, reliability diagrams of ``calibration``, curves of ``binary``.
    Of several processes all must call this, and the first one writes.

    Args:
        folder: made if absent.
        results: of `pyseg.evaluation.evaluate`, on the same data.
        worst: what observed the evaluation whose worst images are to be shown.
        title: what was evaluated, for the page's head.

    Returns:
        The two files.

    Raises:
        PysegError: ``folder`` is a file or lies below one, there is no evaluation, or they are of
            different classes.
    """
    evaluations = (results,) if isinstance(results, Evaluation) else tuple(results)
    if not evaluations:
        raise PysegError("results must hold at least one evaluation, got none")
    classes, palette = evaluations[0].classes, evaluations[0].palette
    for other in evaluations[1:]:
        if len(other.classes) != len(classes):
            raise PysegError(
                f"evaluations of different classes cannot be compared: {evaluations[0].spec} has "
                f"{len(classes)}, {other.spec} {len(other.classes)}; evaluate on the same data"
            )
    images = [] if worst is None else worst.gather()
    files = [Path(folder) / "report.json", Path(folder) / "index.html"]
    if not evaluations[0].is_main_process:
        return files
    make_folder(folder, "folder")
    made = _made(evaluations)
    matrices = [_counts(evaluation.stages[-1]) for evaluation in evaluations]
    content: dict[str, Any] = {"title": title, "classes": list(classes), "made": made}
    described = [
        {
            "spec": evaluation.spec,
            "images": evaluation.images,
            "stages": evaluation.to_list(),
            "confusion": matrix,  # of the last stage: rows = ground truth, columns = prediction
        }
        for evaluation, matrix in zip(evaluations, matrices, strict=True)
    ]
    content |= described[0] if len(described) == 1 else {"evaluations": described}
    content["worst_images"] = [{"name": image.name, **image.scores} for image in images]
    write_json(files[0], finite(content))
    columns = _columns(evaluations)
    ends = columns[:: max(1, len(columns) - 1)] if len(evaluations) == 1 else columns
    parts = [_overview(evaluations), _tables(columns), _bars(ends, palette)]
    parts += [
        _confusion(matrix, classes, label)
        for matrix, label in zip(matrices, _last_labels(evaluations), strict=True)
        if matrix is not None
    ]
    parts += [_reliability(columns), _curves(evaluations), _per_class(evaluations)]
    parts += [_worst(images), _origin(made)]
    write_text(files[1], _page(evaluations, title, "".join(parts)))
    return files


def _columns(evaluations: Sequence[Evaluation]) -> list[_Column]:
    if len(evaluations) == 1:
        return [_Column(stage.stage, stage) for stage in evaluations[0].stages]
    pairs = zip(_last_labels(evaluations), evaluations, strict=True)
    return [_Column(label, evaluation.stages[-1]) for label, evaluation in pairs]


def _last_labels(evaluations: Sequence[Evaluation]) -> list[str]:
    """What the last stage of each is called: by its pipeline, numbered where two are alike."""
    if len(evaluations) == 1:
        return ["the last stage"]
    specs = [evaluation.spec for evaluation in evaluations]
    return [
        spec if specs.count(spec) == 1 else f"{spec} ({specs[: k + 1].count(spec)})"
        for k, spec in enumerate(specs)
    ]


def _counts(stage: StageScores) -> list[list[int]] | None:
    if stage.confusion is None or not bool(stage.confusion.any()):
        return None
    return stage.confusion.tolist()


def _made(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """Where the numbers come from, by what it is called on the page."""
    devices = []
    for evaluation in evaluations:
        threads = f", {evaluation.threads} thread{'s'[: evaluation.threads - 1]}"
        devices.append(evaluation.device + (threads if evaluation.device == "cpu" else ""))
    program = Path(sys.argv[0])
    called = program.stem == "pyseg" or program.parts[-2:] == ("pyseg", "__main__.py")
    return {
        **({"command": shlex.join(["pyseg", *sys.argv[1:]])} if called else {}),
        "pyseg": __version__,
        "torch": torch.__version__,
        "device": "; ".join(dict.fromkeys(devices)),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
    }


def _jpeg(picture: Image.Image) -> bytes:
    if picture.width > PICTURE_WIDTH:
        height = max(1, round(picture.height * PICTURE_WIDTH / picture.width))
        picture = picture.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=82)
    return stream.getvalue()


# --- the page ---------------------------------------------------------------------------------

_STYLE = """
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


def _page(evaluations: Sequence[Evaluation], title: str, body: str) -> str:
    specs = [html.escape(evaluation.spec) for evaluation in evaluations]
    heading = specs[0] if len(specs) == 1 else f"{len(specs)} pipelines compared"
    images = max(evaluation.images for evaluation in evaluations)
    counted = f"{images} image{'' if images == 1 else 's'}"
    about = html.escape(f"{title}, {counted}" if title else counted)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{heading}</h1><p>{about}</p></header>\n<main>\n{body}</main>\n"
        "<footer>All numbers are in report.json beside this page. Written by pyseg.</footer>\n"
        "</body>\n</html>\n"
    )


def _section(title: str, text: str, content: str) -> str:
    note = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{note}{content}</section>\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
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


def _number(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _overview(evaluations: Sequence[Evaluation]) -> str:
    """The table that `Evaluation` prints; of several, one with a row for each."""
    if len(evaluations) == 1:
        text = "Δ against the baseline; time and peak memory of each stage alone"
        return _section("Stages", text, _table(*evaluations[0].table()))
    shown = [(name, key) for name, keys in evaluations[0].headline.items() for key in keys]
    head = ["pipeline"]
    for _, key in shown:
        head += [title_of(key), "Δ"]
    rows = []
    first = evaluations[0].stages[-1].metrics
    for label, evaluation in zip(_last_labels(evaluations), evaluations, strict=True):
        row = [label]
        for name, key in shown:
            value = evaluation.stages[-1].metrics.get(name, {}).get(key, math.nan)
            change = "" if evaluation is evaluations[0] else f"{value - first[name][key]:+.4f}"
            row += [_number(value), "-" if change.endswith("nan") else change]
        peaks = [stage.peak_bytes for stage in evaluation.stages]
        known = [peak for peak in peaks if peak is not None]
        row.append(f"{sum(stage.milliseconds for stage in evaluation.stages):.1f}")
        rows.append([*row, f"{max(known) / 1e6:.0f}" if len(known) == len(peaks) else "?"])
    text = "Δ against the first; time of all stages, peak memory of the largest"
    return _section("Pipelines", text, _table([*head, "ms/image", "peak MB"], rows))


def _tables(columns: Sequence[_Column]) -> str:
    sections = ""
    for name in columns[0].scores.metrics:
        values = [column.scores.metrics.get(name, {}) for column in columns]
        keys = [k for k, v in values[0].items() if isinstance(v, (int, float))]
        rows = [[title_of(k), *(_number(v.get(k, math.nan)) for v in values)] for k in keys]
        absent = values[-1].get("classes_absent")
        note = f"Without ground truth and never predicted: {', '.join(absent)}" if absent else ""
        sections += _section(name, note, _table(["", *(c.label for c in columns)], rows))
    return f'<div class="side">{sections}</div>'


def _by_class(scores: StageScores) -> tuple[str, dict[str, float]]:
    """The score that bars show, and its value by class: IoU, or panoptic quality."""
    for key in ("iou", "pq"):
        for computed in scores.metrics.values():
            table = computed.get("per_class") or {}
            if table and all(key in entry for entry in table.values()):
                return key, {name: entry[key] for name, entry in table.items()}
    return "", {}


def _bars(columns: Sequence[_Column], palette: Sequence[tuple[int, int, int]]) -> str:
    """A score of every class, the last column in the strong colour."""
    key, first = _by_class(columns[0].scores)
    if all(math.isnan(value) for value in first.values()):
        return ""
    found = [_by_class(column.scores)[1] for column in columns]
    cells = []
    for index, name in enumerate(first):
        red, green, blue = palette[index] if index < len(palette) else (255, 255, 255)
        bars = ""
        for column, values in zip(columns, found, strict=True):
            value = values.get(name, math.nan)
            width = 0.0 if math.isnan(value) else 100 * value
            kind = "bar" if column is columns[-1] else "bar other"
            said = f'<span class="said">{html.escape(column.label)}: </span>'
            bars += (
                f'<div class="line"><div class="track" aria-hidden="true"><div class="{kind}" '
                f'style="width:{width:.2f}%"></div></div>'
                f'<div class="value">{said}{_number(value)}</div></div>'
            )
        cells.append(
            f'<div class="name"><span class="swatch" style="background:rgb({red},{green},{blue})">'
            f"</span>{html.escape(name)}</div><div>{bars}</div>"
        )
    note = ""
    if len(columns) > 1:
        note = f"Bars from the top: {', '.join(column.label for column in columns)}"
    return _section(f"{title_of(key)} by class", note, f'<div class="bars">{"".join(cells)}</div>')


def _confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], label_of: str) -> str:
    """Share of each ground-truth class by prediction, as a picture."""
    count = len(classes)
    cell = 34 if count <= 25 else 20 if count <= 60 else 10
    label = min(150, 12 + 7 * max(map(len, classes))) if cell > 10 else 8
    numbers = cell >= 34
    side = count * cell
    parts = []
    for row, values in enumerate(matrix):
        total = sum(values)
        for column, value in enumerate(values):
            share = value / total if total else 0.0
            level = math.sqrt(share)  # rare confusions would not show on a linear scale
            rgb = tuple(round(255 + (dark - 255) * level) for dark in (27, 79, 140))
            x, y = label + column * cell, label + row * cell
            title = html.escape(f"{classes[row]} → {classes[column]}: {share:.2%}, {value:,} px")
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" '
                f'fill="rgb{rgb}"><title>{title}</title></rect>'
            )
            if numbers and share >= 0.005:
                ink = "#fff" if level > 0.6 else "#1f2430"
                parts.append(
                    f'<text x="{x + cell / 2}" y="{y + cell / 2 + 4}" fill="{ink}" '
                    f'style="fill:{ink}" text-anchor="middle">{100 * share:.0f}'
                    "</text>"
                )
    if cell > 10:
        for index, name in enumerate(classes):
            middle = label + index * cell + cell / 2
            short = html.escape(name if len(name) <= 20 else name[:19] + "…")
            parts.append(
                f'<text x="{label - 6}" y="{middle + 4}" text-anchor="end">{short}</text>'
                f'<text transform="translate({middle + 4},{label - 6}) rotate(-90)">'
                f"{short}</text>"
            )
    size = label + side + 1
    name = html.escape(f"Confusion matrix of {label_of}")
    frame = (
        f'<rect x="{label}" y="{label}" width="{side}" height="{side}" fill="none" '
        'style="stroke:var(--frame)"/>'
    )
    picture = (
        f'<div class="scroll"><svg role="img" aria-label="{name}" width="{size}" '
        f'height="{size}" viewBox="0 0 {size} {size}">{"".join(parts)}{frame}</svg>'
        "</div>"
    )
    return _section(
        f"Confusion matrix of {label_of}",
        "Rows are ground truth, columns prediction; percent of the row. Void pixels are left out.",
        picture,
    )


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _reliability(columns: Sequence[_Column]) -> str:
    plots = []
    for column in columns:
        label = html.escape(column.label)
        for scores in column.scores.metrics.values():
            if "reliability" in scores:
                stream = io.BytesIO()
                reliability_diagram(scores["reliability"]).save(stream, "PNG")
                plots.append(
                    f"<div><p>{label}: ECE {_number(scores['ece'])}</p>"
                    f'<img alt="reliability diagram of {label}" '
                    f'src="{_data_uri(stream.getvalue(), "png")}"></div>'
                )
    if not plots:
        return ""
    return _section(
        "Reliability",
        "Blue: accuracy of a bin of confidence; red: its distance from "
        "the mean confidence; grey: share of the pixels.",
        f'<div class="plots">{"".join(plots)}</div>',
    )


def _curves(evaluations: Sequence[Evaluation]) -> str:
    """ROC and precision-recall curves of the last stage of each."""
    plots = []
    for label, evaluation in zip(_last_labels(evaluations), evaluations, strict=True):
        of = "" if len(evaluations) == 1 else f"{label}: "
        for scores in evaluation.stages[-1].metrics.values():
            curves = scores.get("curves")
            if curves is None:
                continue
            rates, recall = curves["false_positive_rate"], curves["recall"]
            roc, pr = zip(rates, recall, strict=True), zip(recall, curves["precision"], strict=True)
            area, average = _number(scores["roc_auc"]), _number(scores["average_precision"])
            plots.append(_plot(f"{of}ROC, area {area}", [*roc], "false positive rate", "recall"))
            plots.append(_plot(f"{of}Precision-recall, AP {average}", [*pr], "recall", "precision"))
    if not plots:
        return ""
    return _section("Curves of the last stage", "", f'<div class="plots">{"".join(plots)}</div>')


def _plot(title: str, points: Sequence[tuple[float, float]], x: str, y: str) -> str:
    path = " ".join(
        f"{30 + 240 * a:.1f},{250 - 240 * b:.1f}"
        for a, b in points
        if not (math.isnan(a) or math.isnan(b))
    )
    return (
        f'<div><p>{html.escape(title)}</p><svg role="img" aria-label="{html.escape(title)}" '
        'viewBox="0 0 280 285" style="width:100%">'
        '<rect x="30" y="10" width="240" height="240" fill="none" style="stroke:var(--frame)"/>'
        f'<polyline points="{path}" fill="none" style="stroke:var(--blue)" stroke-width="2"/>'
        f'<text x="150" y="275" text-anchor="middle">{x}</text>'
        f'<text transform="translate(20,130) rotate(-90)" text-anchor="middle">{y}</text>'
        "</svg></div>"
    )


def _per_class(evaluations: Sequence[Evaluation]) -> str:
    """What the metrics give by class, for the last stage of each."""
    parts = ""
    for label, evaluation in zip(_last_labels(evaluations), evaluations, strict=True):
        for name, scores in evaluation.stages[-1].metrics.items():
            table = scores.get("per_class")
            if table:
                keys = [*next(iter(table.values()))]
                rows = [[k, *(_number(entry[key]) for key in keys)] for k, entry in table.items()]
                head = ["class", *map(title_of, keys)]
                parts += _section(f"{name} by class, {label}", "", _table(head, rows))
    return parts


def _worst(images: Sequence[WorstImage]) -> str:
    if not images:
        return ""
    figures = []
    for image in images:
        name = html.escape(image.name)
        pictures = "".join(
            f'<div>{caption}<img alt="{caption} of {name}" loading="lazy" '
            f'src="{_data_uri(data, "jpeg")}"></div>'
            for caption, data in zip(image.captions, image.pictures, strict=True)
        )
        scores = ", ".join(f"{title_of(k)} {_number(value)}" for k, value in image.scores.items())
        figures.append(
            f"<figure><figcaption><b>{name}</b>: {scores}</figcaption>"
            f'<div class="pictures">{pictures}</div></figure>'
        )
    first = title_of(next(iter(images[0].scores)))
    return _section(
        "Worst images", f"By the last stage's {first} of each image alone.", "".join(figures)
    )


def _origin(made: dict[str, str]) -> str:
    entries = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in made.items()
    )
    return _section("How this was measured", "", f"<dl>{entries}</dl>")


__all__ = ["Recorder", "WorstImage", "WorstImages", "write_page"]
