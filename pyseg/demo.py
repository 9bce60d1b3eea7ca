"""What `pyseg demo` does: `run` on the street image that comes with pyseg."""

from __future__ import annotations

from pathlib import Path

from .evaluation import Evaluation, evaluate
from .files import make_folder, write_json, write_text
from .image import ImageSource, read_image, read_labels, write_image, write_labels
from .models.streetnet import CLASSES, PALETTE
from .pipeline import Pipeline
from .types import Sample, Segmentation
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
    make_folder(output, "output")
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
    files.append(write_text(output / "table.txt", f"{result}\n"))
    return result, files
