"""What `pyseg demo` does: `run` on the bundled street image, `run_panoptic` on a data set."""

from __future__ import annotations

from pathlib import Path

from .errors import PysegError
from .evaluation import Evaluation, evaluate
from .files import write_json
from .image import (
    ImageSource,
    read_image,
    read_labels,
    write_image,
    write_labels,
    write_panoptic,
)
from .metrics.panoptic import Panoptic
from .models.streetnet import CLASSES, PALETTE
from .pipeline import Pipeline, StageResult
from .types import Dataset, Sample, Segmentation, Segments
from .visual import error_map, overlay, side_by_side

ASSETS = Path(__file__).parent / "assets"


class Street:
    """One frame of CamVid's validation split, as a data set."""

    classes: tuple[str, ...] = CLASSES
    palette: tuple[tuple[int, int, int], ...] = PALETTE

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        if index != 0:
            raise IndexError(index)
        labels = read_labels(ASSETS / "street_labels.png")
        return Sample("street", read_image(ASSETS / "street.jpg"), labels)


def run(pipeline: Pipeline, output: Path) -> tuple[Evaluation, list[Path]]:
    """Scores the stages and writes label maps, overlay, errors, a comparison and the table.

    Args:
        pipeline: its classes must be CamVid's.
        output: folder, made if absent.

    Returns:
        The scores, and the files that were written.

    Raises:
        PysegError: other classes, or ``output`` is a file.
    """
    data = Street()
    result = evaluate(pipeline, data)
    sample = data[0]
    assert sample.labels is not None
    _make(output)
    predictions = pipeline.run_stages(sample.image)
    names = ["baseline"]
    for stage in pipeline.stages[1:]:
        repeated = sum(name.split(".")[0] == stage.name for name in names)
        names.append(f"{stage.name}.{repeated + 1}" if repeated else stage.name)
    height, width = sample.labels.shape
    blank = Segmentation((height, width), CLASSES, image=sample.image, palette=PALETTE)
    truth = blank.with_labels(sample.labels)
    final = predictions[-1]
    files = [
        write_labels(output / f"{name}.png", prediction.labels, PALETTE)
        for name, prediction in zip(names, predictions, strict=True)
    ]
    files.append(write_image(output / "overlay.png", final.overlay()))
    errors = error_map(final.labels, sample.labels, sample.image)
    files.append(write_image(output / "errors.png", errors))
    pictures: list[ImageSource] = [sample.image]
    pictures += [overlay(prediction, 0.7) for prediction in [*predictions, truth]]
    titles = ["image", *(stage.stage for stage in result.stages), "ground truth"]
    comparison = side_by_side(pictures, titles)
    files.append(write_image(output / "comparison.png", comparison))
    files.append(write_json(output / "scores.json", result.to_list()))
    files.append(output / "table.txt")
    files[-1].write_text(f"{result}\n", encoding="utf-8")
    return result, files


def run_panoptic(
    pipeline: Pipeline, dataset: Dataset, output: Path, limit: int | None = None
) -> tuple[Evaluation, list[Path]]:
    """Scores panoptic predictions, and writes a picture of each beside the ground truth.

    Args:
        pipeline: ends in panoptic segments, such as a folder that `pyseg train` wrote.
        dataset: with panoptic labels.
        output: folder, made if absent. ``<name>.png`` shows image, prediction with its panoptic
            quality, and ground truth; ``panoptic.json`` with its folder has the predictions in
            COCO's format.
        limit: images, spread evenly over the data set; None = all.

    Returns:
        The scores, and the files that were written.

    Raises:
        PysegError: other classes, no panoptic labels or predictions, or ``output`` is a file.
    """
    _make(output)
    things = getattr(dataset, "things", ())
    files: list[Path] = []
    predicted: list[tuple[str, Segments]] = []

    def observe(sample: Sample, results: list[StageResult]) -> None:
        prediction = results[-1].prediction
        metric = Panoptic(dataset.classes, things=things)
        metric.update(prediction, sample)  # raises where either has no segments
        assert prediction.segments is not None and sample.segments is not None
        blank = Segmentation(
            prediction.size, tuple(dataset.classes), image=sample.image, palette=dataset.palette
        )
        pictures: list[ImageSource] = [sample.image]
        pictures += [
            overlay(blank.with_segments(segments), 0.6)
            for segments in (prediction.segments, sample.segments)
        ]
        titles = ["image", f"PQ {100 * metric.compute()['pq']:.1f}", "ground truth"]
        picture = side_by_side(pictures, titles)
        files.append(write_image(output / f"{sample.name}.png", picture))
        predicted.append((sample.name, prediction.segments))

    result = evaluate(pipeline, dataset, ["panoptic"], limit=limit, observe=observe)
    indices = [dataset.classes.index(name) for name in things]
    categories = getattr(dataset, "category_ids", None)
    files.append(
        write_panoptic(
            output / "panoptic.json",
            predicted,
            dataset.classes,
            things=indices,
            category_ids=categories,
        )
    )
    files.append(write_json(output / "scores.json", result.to_list()))
    return result, files


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise PysegError(
            f"output {str(output)!r} is a file or lies below one; give a folder"
        ) from error
