"""Where people, and a model, disagree: maps, ranked, as a page. Beware of annotation noise."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyseg.errors import ScoreError
from pyseg.files import finite, make_folder, write_json, write_text

SHOWN = 24  # images on the page


@dataclass(frozen=True)
class Disputed:
    """One image, as `rank` orders them."""

    name: str
    people: float  # share of pixels on which two annotators differ, mean over pairs
    model: float  # share of pixels on which the model differs from all annotators, who agree
    against: dict[str, float]  # of each annotator: share of pixels on which he stands alone

    @property
    def suspect(self) -> str:
        """Who stands alone on most pixels."""
        return max(self.against, key=lambda who: self.against[who])


def dispute(
    name: str, maps: Sequence[np.ndarray], people: Sequence[str], model: np.ndarray | None = None
) -> Disputed:
    """How far label maps of one image differ.

    Args:
        name: of the image.
        maps: of each annotator, [H, W], 255 = void, which agrees with everything.
        people: their names; two or more.
        model: [H, W]; None = without.
    """
    stack = np.stack(maps)
    known = stack != 255
    pairs, differ = 0, 0.0
    for a in range(len(stack)):
        for b in range(a):
            both = known[a] & known[b]
            differ += float((stack[a] != stack[b])[both].mean()) if both.any() else 0.0
            pairs += 1
    against = {}
    for k, who in enumerate(people):
        rest = np.delete(stack, k, 0)
        one = (rest == rest[0]).all(0) & known.all(0)
        against[who] = float((one & (stack[k] != rest[0])).mean()) if len(rest) > 1 else 0.0
    alone = 0.0
    if model is not None:
        agreed = (stack == stack[0]).all(0) & known.all(0)
        alone = float((agreed & (np.asarray(model) != stack[0])).mean())
    return Disputed(name, differ / pairs, alone, against)


def disagreement(maps: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """Of every pixel the share of annotators who do not say what most do, [H, W] float, 0 to 1."""
    stack = np.stack(maps)
    votes = np.stack([(stack == k).sum(0) for k in range(num_classes)])
    said = votes.sum(0)
    result: np.ndarray = 1 - votes.max(0) / np.maximum(said, 1)
    result[said == 0] = 0
    return result


def write_page(
    images: str | os.PathLike[str],
    annotators: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    predictions: str | os.PathLike[str] | None = None,
    classes: Any = None,
    shown: int = SHOWN,
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> list[Disputed]:
    """Writes ``index.html`` and ``disagreement.json``: images ranked for correction.

    Those on which people differ most come first: there, a label should be looked at before a model
    is blamed. Each shows the photograph, where people differ, and, with predictions, where the
    model stands against all of them: either its mistakes, or theirs.

    Args:
        images: folder of the photographs.
        annotators: a folder of label maps each.
        output: folder, made if absent.
        predictions: a folder of label maps; None = people alone.
        classes: as of `pyseg.agreement.score_annotators`.
        shown: images on the page at most.
        track: wraps the sequence of images.

    Raises:
        ScoreError, LabelError: as `pyseg.agreement.score_annotators`; ImageError: no photograph.
    """
    from pyseg import page
    from pyseg.agreement import score_annotators
    from pyseg.errors import ImageError
    from pyseg.formats.annotation import Images
    from pyseg.image import read_image
    from pyseg.scoring import CLASS_LISTS
    from pyseg.visual import heat_map, side_by_side

    if shown < 1:
        raise ScoreError(f"shown must be 1 or more, got {shown}")
    sides = [Path(folder) for folder in annotators]
    agreed = score_annotators(sides, predictions, classes=classes)
    known = Images(images)
    void = CLASS_LISTS[classes].void if classes in CLASS_LISTS else agreed.protocol["void_values"]
    found = [_by_stem(side) for side in sides]
    guesses = None if predictions is None else _by_stem(Path(predictions))
    people = agreed.annotators

    def read(files: dict[str, Path], name: str) -> np.ndarray:
        from pyseg.image import read_labels

        labels = read_labels(files[name]).numpy().astype(np.int64)
        labels[np.isin(labels, [*void, 255])] = 255
        return labels

    ranked = []
    for name in track([*found[0]]):
        model = None if guesses is None else read(guesses, name)
        ranked.append(dispute(name, [read(files, name) for files in found], people, model))
    ranked.sort(key=lambda one: (-one.people - one.model, one.name))
    folder = make_folder(output, "output")
    figures = []
    for one in ranked[:shown]:
        path = known.find(one.name)
        if path is None:
            raise ImageError(f"images: {str(images)!r} has no image {one.name!r}")
        maps = [read(files, one.name) for files in found]
        values = disagreement(maps, len(agreed.classes))
        pictures, titles = [read_image(path), heat_map(values, 1.0)], ["image", "people differ"]
        if guesses is not None:
            model = read(guesses, one.name)
            stack = np.stack(maps)
            alone = ((stack == stack[0]).all(0) & (stack[0] != 255) & (model != stack[0])) * 1.0
            pictures.append(heat_map(alone, 1.0))
            titles.append("model against all")
        shot = page.data_uri(page.jpeg(side_by_side(pictures, titles)), "jpeg")
        text = f"{one.name}: people differ on {one.people:.1%} of pixels"
        if guesses is not None:
            text += f", the model from all of them on {one.model:.1%}"
        if max(one.against.values()) > 0:
            text += f"; most often alone: {one.suspect}"
        figures.append(
            f"<figure><figcaption>{html.escape(text)}</figcaption>"
            f'<img alt="{html.escape(text)}" src="{shot}"></figure>'
        )
    body = page.section("How far people agree", "", page.table(*agreed.table()))
    body += page.section("Classes", "", page.table(*agreed.class_table()))
    body += page.section(
        "To be looked at first", "Ranked by the pixels in dispute.", "".join(figures)
    )
    write_json(
        folder / "disagreement.json",
        finite({"agreement": agreed.to_dict(), "images": [vars(one) for one in ranked]}),
    )
    about = f"{agreed.images} images, {len(people)} annotators, Fleiss' kappa {agreed.kappa:.3f}"
    write_text(folder / "index.html", page.whole("Disagreement", about, body, "disagreement.json"))
    return ranked


def _by_stem(folder: Path) -> dict[str, Path]:
    from pyseg.files import LABEL_SUFFIXES

    return {
        path.stem: path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in LABEL_SUFFIXES
    }
