"""An evaluation as one HTML page that needs nothing else, with its numbers as JSON beside it."""

from __future__ import annotations

import base64
import copy
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import PysegError
from .evaluation import Evaluation, title_of
from .files import finite, write_json, write_text
from .image import read_image
from .metrics.semantic import Semantic
from .pipeline import StageResult
from .processes import gather_objects, merge_states
from .types import VOID, Sample, Segmentation
from .visual import error_map, overlay, reliability_diagram

WORST = 6  # images that are shown
PICTURE_WIDTH = 960  # pixels, at most
PICTURES = ("image", "ground truth", "prediction", "errors")


@dataclass(frozen=True)
class WorstImage:
    """An image that the last stage segments badly."""

    name: str
    miou: float  # over the classes of this image
    pixel_accuracy: float
    pictures: tuple[bytes, ...] = field(repr=False)  # JPEG, in the order of PICTURES

    @property
    def rank(self) -> tuple[float, str]:
        return self.miou, self.name


class Recorder:
    """Keeps, image by image, what the page shows beyond the metrics' numbers.

    Pass `add` as ``observe`` to `pyseg.evaluation.evaluate`, then call `write`. Memory is that of
    the few worst images, as JPEG. Datasets without label maps give a page of tables only.

    Args:
        folder: where the page will be; made now if absent, so that a mistake shows at once.
        classes: of the dataset.
        palette: one RGB colour per class.
        stages: number of stages of the pipeline.

    Raises:
        PysegError: ``folder`` is a file or lies below one.

    Example:
        >>> recorder = Recorder("out", data.classes, data.palette, len(pipeline.stages))
        >>> result = evaluate(pipeline, data, observe=recorder.add)
        >>> recorder.write(result)
    """

    def __init__(
        self,
        folder: str | Path,
        classes: Sequence[str],
        palette: Sequence[tuple[int, int, int]],
        stages: int,
    ) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise PysegError(
                f"--report {str(folder)!r} is a file or lies below one; give a folder"
            ) from error
        self.classes, self.palette = tuple(classes), tuple(palette)
        self._void = VOID if len(self.classes) <= VOID else -1
        self._scores = [self._semantic() for _ in range(stages)]
        self._worst: list[WorstImage] = []

    def _semantic(self) -> Semantic:
        return Semantic(self.classes, ignore_index=self._void)

    def add(self, sample: Sample, results: Sequence[StageResult]) -> None:
        """Scores one image after each stage."""
        if sample.labels is None:
            return
        for stage, result in zip(self._scores, results, strict=True):
            stage.update(result.prediction, sample)
        final = results[-1].prediction
        single = self._semantic()
        single.update(final, sample)
        values = single.compute()
        if math.isnan(values["miou"]):  # no ground truth at all
            return
        if len(self._worst) == WORST and (values["miou"], sample.name) >= self._worst[-1].rank:
            return
        self._worst.append(
            WorstImage(
                sample.name,
                values["miou"],
                values["pixel_accuracy"],
                self._pictures(final, sample),
            )
        )
        self._worst = sorted(self._worst, key=lambda image: image.rank)[:WORST]

    def _pictures(self, prediction: Segmentation, sample: Sample) -> tuple[bytes, ...]:
        assert sample.labels is not None
        image = read_image(sample.image)
        shown = replace(prediction, image=image, palette=self.palette, instances=None)
        truth = Segmentation(shown.size, self.classes, image=image, palette=self.palette)
        if prediction.logits is None and prediction.segments is None:
            shown = truth.with_labels(prediction.labels)  # of instances alone, too
        pictures = (
            Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy()),
            overlay(truth.with_labels(sample.labels), 0.65),
            overlay(shown, 0.65),
            error_map(prediction.labels, sample.labels, image, self._void),
        )
        return tuple(_jpeg(picture) for picture in pictures)

    def write(self, result: Evaluation, title: str = "") -> list[Path]:
        """Writes ``index.html`` and ``report.json``, each whole or not at all.

        Of several processes all must call it, and the first one writes.

        Args:
            result: what `pyseg.evaluation.evaluate` returned.
            title: what was evaluated, for the page's head.
        """
        scores = copy.deepcopy(self._scores)
        for stage in scores:
            merge_states("report", stage)
        found = [image for part in gather_objects(self._worst) for image in part]
        worst = sorted(found, key=lambda image: image.rank)[:WORST]
        files = [self.folder / "report.json", self.folder / "index.html"]
        if not result.is_main_process:
            return files
        computed = [stage.compute() for stage in scores]
        labelled = computed[-1]["classes_counted"] > 0
        matrix = scores[-1].state()["matrix"].tolist() if labelled else None
        content = {
            "spec": result.spec,
            "title": title,
            "images": result.images,
            "classes": list(self.classes),
            "stages": result.to_list(),
            "confusion": matrix,  # of the last stage: rows = ground truth, columns = prediction
            "worst_images": [
                {"name": i.name, "miou": i.miou, "pixel_accuracy": i.pixel_accuracy} for i in worst
            ],
        }
        write_json(files[0], finite(content))
        parts = [_tables(result)]
        if matrix is not None:
            parts.append(_bars(computed, [stage.stage for stage in result.stages], self.palette))
            parts.append(_confusion(matrix, self.classes))
        parts += [_reliability(result), _curves(result), _per_class(result), _worst(worst)]
        write_text(files[1], _page(result, title, "".join(parts)))
        return files


def _jpeg(picture: Image.Image) -> bytes:
    if picture.width > PICTURE_WIDTH:
        height = max(1, round(picture.height * PICTURE_WIDTH / picture.width))
        picture = picture.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=82)
    return stream.getvalue()


# --- the page ---------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light; --ink: #1f2430; --soft: #667085; --line: #dfe3ea; --blue: #2f6db3;
  --pale: #b9cde4; --back: #f5f6f8; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans",
  sans-serif; color: var(--ink); background: var(--back); }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 12px; }
p { margin: 0 0 12px; color: var(--soft); }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin: 18px 0; }
/* A shadow at an edge says that there is more to scroll to. */
.scroll { overflow-x: auto; background: linear-gradient(to right, #fff 40%, #fff0),
  linear-gradient(to left, #fff 40%, #fff0) 100% 0, linear-gradient(to right, #0003, #0000),
  linear-gradient(to left, #0003, #0000) 100% 0; background-repeat: no-repeat;
  background-size: 40px 100%, 40px 100%, 12px 100%, 12px 100%;
  background-attachment: local, local, scroll, scroll; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: #fff; }
th:last-child, td:last-child { padding-right: 4px; }
thead th { color: var(--soft); font-weight: 600; }
.bars { display: grid; grid-template-columns: minmax(70px, max-content) 1fr 4.6em; gap: 8px 12px;
  align-items: center; }
.bars .name { overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: 6px;
  border: 1px solid #0003; }
.bar { height: 9px; border-radius: 2px; background: var(--blue); min-width: 1px; }
.bar.first { background: var(--pale); margin-bottom: 2px; }
.track { background: #eef1f5; border-radius: 2px; }
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


def _page(result: Evaluation, title: str, body: str) -> str:
    heading = html.escape(result.spec)
    counted = f"{result.images} image{'' if result.images == 1 else 's'}"
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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return (
        f'<div class="scroll"><table><thead>{line(head, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _number(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _tables(result: Evaluation) -> str:
    head, rows = result.table()
    parts = _section(
        "Stages",
        "Δ against the baseline; time and peak memory of each stage alone",
        _table(head, rows),
    )
    sections = ""
    for name in result.stages[0].metrics:
        values = [stage.metrics[name] for stage in result.stages]
        keys = [k for k, v in values[0].items() if isinstance(v, (int, float))]
        rows = [[title_of(key), *(_number(v[key]) for v in values)] for key in keys]
        absent = values[-1].get("classes_absent")
        note = f"Without ground truth and never predicted: {', '.join(absent)}" if absent else ""
        sections += _section(name, note, _table(["", *(s.stage for s in result.stages)], rows))
    return f'{parts}<div class="side">{sections}</div>'


def _bars(
    computed: Sequence[dict[str, Any]],
    stages: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> str:
    """IoU of every class, first and last stage."""
    shown = [(stages[0], computed[0], "first"), (stages[-1], computed[-1], "")]
    if len(stages) == 1:
        shown = [(stages[0], computed[0], "")]
    cells = []
    for index, name in enumerate(computed[0]["per_class"]):
        red, green, blue = palette[index] if index < len(palette) else (255, 255, 255)
        bars, value = "", math.nan
        for _, scores, kind in shown:
            value = scores["per_class"][name]["iou"]
            width = 0.0 if math.isnan(value) else 100 * value
            bars += (
                f'<div class="track"><div class="bar {kind}" style="width:{width:.2f}%">'
                "</div></div>"
            )
        cells.append(
            f'<div class="name"><span class="swatch" style="background:rgb({red},{green},{blue})">'
            f"</span>{html.escape(name)}</div><div>{bars}</div>"
            f'<div class="value">{_number(value)}</div>'
        )
    legend = ""
    if len(shown) == 2:
        legend = (
            f'<p><span class="key" style="background:var(--pale);margin-left:0"></span>'
            f'{html.escape(stages[0])}<span class="key" style="background:var(--blue)">'
            f"</span>{html.escape(stages[-1])} (the number)</p>"
        )
    return _section("IoU by class", "", f'{legend}<div class="bars">{"".join(cells)}</div>')


def _confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
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
    frame = (
        f'<rect x="{label}" y="{label}" width="{side}" height="{side}" fill="none" '
        'stroke="#98a2b3"/>'
    )
    picture = (
        f'<div class="scroll"><svg role="img" aria-label="confusion matrix" width="{size}" '
        f'height="{size}" viewBox="0 0 {size} {size}">{"".join(parts)}{frame}</svg>'
        "</div>"
    )
    return _section(
        "Confusion matrix of the last stage",
        "Rows are ground truth, columns prediction; percent of the row. Void pixels are left out.",
        picture,
    )


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _reliability(result: Evaluation) -> str:
    plots = []
    for stage in result.stages:
        for scores in stage.metrics.values():
            if "reliability" in scores:
                stream = io.BytesIO()
                reliability_diagram(scores["reliability"]).save(stream, "PNG")
                plots.append(
                    f"<div><p>{html.escape(stage.stage)}: ECE {_number(scores['ece'])}"
                    f'</p><img alt="reliability diagram" '
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


def _curves(result: Evaluation) -> str:
    """ROC and precision-recall curves of the last stage."""
    plots = []
    for scores in result.stages[-1].metrics.values():
        curves = scores.get("curves")
        if curves is not None:
            roc = zip(curves["false_positive_rate"], curves["recall"], strict=True)
            pr = zip(curves["recall"], curves["precision"], strict=True)
            plots += [
                _plot(
                    f"ROC, area {_number(scores['roc_auc'])}",
                    [*roc],
                    "false positive rate",
                    "recall",
                ),
                _plot(
                    f"Precision-recall, AP {_number(scores['average_precision'])}",
                    [*pr],
                    "recall",
                    "precision",
                ),
            ]
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
        f'<div><p>{html.escape(title)}</p><svg viewBox="0 0 280 285" style="width:100%">'
        '<rect x="30" y="10" width="240" height="240" fill="none" stroke="#98a2b3"/>'
        f'<polyline points="{path}" fill="none" stroke="#2f6db3" stroke-width="2"/>'
        f'<text x="150" y="275" text-anchor="middle">{x}</text>'
        f'<text transform="translate(20,130) rotate(-90)" text-anchor="middle">{y}</text>'
        "</svg></div>"
    )


def _per_class(result: Evaluation) -> str:
    """What the metrics give by class, for the last stage."""
    parts = ""
    for name, scores in result.stages[-1].metrics.items():
        table = scores.get("per_class")
        if not table:
            continue
        keys = [*next(iter(table.values()))]
        rows = [[label, *(_number(entry[key]) for key in keys)] for label, entry in table.items()]
        head = ["class", *map(title_of, keys)]
        parts += _section(f"{name} by class, last stage", "", _table(head, rows))
    return parts


def _worst(images: Sequence[WorstImage]) -> str:
    if not images:
        return ""
    figures = []
    for image in images:
        pictures = "".join(
            f'<div>{caption}<img alt="{caption}" loading="lazy" src="{_data_uri(data, "jpeg")}">'
            "</div>"
            for caption, data in zip(PICTURES, image.pictures, strict=True)
        )
        figures.append(
            f"<figure><figcaption><b>{html.escape(image.name)}</b>: mIoU of its classes "
            f"{image.miou:.4f}, pixel accuracy {image.pixel_accuracy:.4f}</figcaption>"
            f'<div class="pictures">{pictures}</div></figure>'
        )
    return _section(
        "Worst images", "By the last stage's mIoU over the classes of each image.", "".join(figures)
    )


__all__ = ["Recorder", "WorstImage"]
