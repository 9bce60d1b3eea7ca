"""Evaluations as one HTML page that needs nothing else, with their numbers as JSON beside it."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from . import page
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
        encoded = tuple(page.jpeg(picture) for picture in pictures.values())
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

    def merge(self, other: WorstImages) -> None:
        """Adds what another one kept, of other images of the same data set."""
        self._kept = sorted([*self._kept, *other._kept], key=lambda entry: entry.rank)
        del self._kept[self.count :]

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
    made = page.made((evaluation.device, evaluation.threads) for evaluation in evaluations)
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
    parts += [_worst(images), page.origin(made)]
    heading = f"{len(evaluations)} pipelines compared" if evaluations[1:] else evaluations[0].spec
    most = max(evaluation.images for evaluation in evaluations)
    counted = f"{most} image{'' if most == 1 else 's'}"
    about = f"{title}, {counted}" if title else counted
    write_text(files[1], page.whole(heading, about, "".join(parts), files[0].name))
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


# --- the page ---------------------------------------------------------------------------------


def _overview(evaluations: Sequence[Evaluation]) -> str:
    """The table that `Evaluation` prints; of several, one with a row for each."""
    if len(evaluations) == 1:
        text = "Δ against the baseline; time and peak memory of each stage alone"
        return page.section("Stages", text, page.table(*evaluations[0].table()))
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
            row += [page.number(value), "-" if change.endswith("nan") else change]
        peaks = [stage.peak_bytes for stage in evaluation.stages]
        known = [peak for peak in peaks if peak is not None]
        row.append(f"{sum(stage.milliseconds for stage in evaluation.stages):.1f}")
        rows.append([*row, f"{max(known) / 1e6:.0f}" if len(known) == len(peaks) else "?"])
    text = "Δ against the first; time of all stages, peak memory of the largest"
    return page.section("Pipelines", text, page.table([*head, "ms/image", "peak MB"], rows))


def _tables(columns: Sequence[_Column]) -> str:
    sections = ""
    for name in columns[0].scores.metrics:
        values = [column.scores.metrics.get(name, {}) for column in columns]
        keys = [k for k, v in values[0].items() if isinstance(v, (int, float))]
        rows = [[title_of(k), *(page.number(v.get(k, math.nan)) for v in values)] for k in keys]
        absent = values[-1].get("classes_absent")
        note = f"Without ground truth and never predicted: {', '.join(absent)}" if absent else ""
        sections += page.section(name, note, page.table(["", *(c.label for c in columns)], rows))
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
                f'<div class="value">{said}{page.number(value)}</div></div>'
            )
        cells.append(
            f'<div class="name"><span class="swatch" style="background:rgb({red},{green},{blue})">'
            f"</span>{html.escape(name)}</div><div>{bars}</div>"
        )
    note = ""
    if len(columns) > 1:
        note = f"Bars from the top: {', '.join(column.label for column in columns)}"
    return page.section(
        f"{title_of(key)} by class", note, f'<div class="bars">{"".join(cells)}</div>'
    )


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
    return page.section(
        f"Confusion matrix of {label_of}",
        "Rows are ground truth, columns prediction; percent of the row. Void pixels are left out.",
        picture,
    )


def _reliability(columns: Sequence[_Column]) -> str:
    plots = []
    for column in columns:
        label = html.escape(column.label)
        for scores in column.scores.metrics.values():
            if "reliability" in scores:
                stream = io.BytesIO()
                reliability_diagram(scores["reliability"]).save(stream, "PNG")
                plots.append(
                    f"<div><p>{label}: ECE {page.number(scores['ece'])}</p>"
                    f'<img alt="reliability diagram of {label}" '
                    f'src="{page.data_uri(stream.getvalue(), "png")}"></div>'
                )
    if not plots:
        return ""
    return page.section(
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
            area, average = page.number(scores["roc_auc"]), page.number(scores["average_precision"])
            plots.append(_plot(f"{of}ROC, area {area}", [*roc], "false positive rate", "recall"))
            plots.append(_plot(f"{of}Precision-recall, AP {average}", [*pr], "recall", "precision"))
    if not plots:
        return ""
    return page.section(
        "Curves of the last stage", "", f'<div class="plots">{"".join(plots)}</div>'
    )


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
                rows = [
                    [k, *(page.number(entry[key]) for key in keys)] for k, entry in table.items()
                ]
                head = ["class", *map(title_of, keys)]
                parts += page.section(f"{name} by class, {label}", "", page.table(head, rows))
    return parts


def _worst(images: Sequence[WorstImage]) -> str:
    if not images:
        return ""
    figures = []
    for image in images:
        name = html.escape(image.name)
        pictures = "".join(
            f'<div>{caption}<img alt="{caption} of {name}" loading="lazy" '
            f'src="{page.data_uri(data, "jpeg")}"></div>'
            for caption, data in zip(image.captions, image.pictures, strict=True)
        )
        scores = ", ".join(
            f"{title_of(k)} {page.number(value)}" for k, value in image.scores.items()
        )
        figures.append(
            f"<figure><figcaption><b>{name}</b>: {scores}</figcaption>"
            f'<div class="pictures">{pictures}</div></figure>'
        )
    first = title_of(next(iter(images[0].scores)))
    return page.section(
        "Worst images", f"By the last stage's {first} of each image alone.", "".join(figures)
    )


__all__ = ["Recorder", "WorstImage", "WorstImages", "write_page"]
