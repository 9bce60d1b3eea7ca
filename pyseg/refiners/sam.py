"""SAM and SAM 2 as refiners: their masks sharpen the class map that a network has predicted.

Segment Anything (Kirillov et al., 2023, arXiv:2304.02643) and SAM 2 (Ravi et al., 2024,
arXiv:2408.00714) draw good outlines but know no classes, and on a coarse map they can do harm. So
the network stays in charge of *what* is there: masks only move its outlines, only where it is
unsure, and only after passing a gate; all other pixels keep the network's logits bit for bit:
`pyseg.fusion`.

Three modes. ``prompt``: every connected component of a thing or thin class becomes a box, points
and a mask prompt. Where a model has found instances, the mode prompts with these instead, and the
mask that comes back replaces the instance's. ``vote``: masks of the whole image get the class that
the network finds most probable in them (compare Semantic-Segment-Anything, Chen et al., 2023).
``auto``: both, in one map.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..fusion import VOTE, Fusion, Region, Rules, require_image_of
from ..ops import panoptic_merge
from ..promptable import (
    SAM2_WEIGHTS,
    SAM_WEIGHTS,
    Fingerprint,
    Promptable,
    Prompts,
    Sam2Backend,
    SamBackend,
    load_sam,
    load_sam2,
    propose,
)
from ..types import CERTAIN, Instances, Segmentation, Segments
from .sam_prompts import (
    RegionPrompt,
    Style,
    point_grid,
    prompt_components,
    prompt_instance,
    stack_prompts,
)

__all__ = [
    "SAM2_WEIGHTS",
    "SAM_WEIGHTS",
    "STUFF",
    "MaskGenerator",
    "Prompts",
    "Sam",
    "Sam2",
    "Sam2Backend",
    "SamBackend",
    "SamRefiner",
    "is_stuff",
    "sam",
    "sam2",
]

MaskGenerator = Promptable  # what it was called before it had a module of its own

_STUFF_NAMES = """
    background void unlabeled unlabelled other
    road street sidewalk pavement path dirt-track runway lane-marking parking platform railroad
    building house skyscraper wall ceiling floor bridge tunnel roof
    sky tree vegetation plant bush grass terrain earth ground field land dirt sand gravel rock snow
    mountain hill water sea river lake waterfall"""
STUFF = frozenset(_STUFF_NAMES.split())
"""Classes that prompt mode leaves alone by default: one has no "component" to prompt with."""

_PIXELS = 1 << 26  # of masks at the size of the image, held at once
_LEAST_IOU = 0.7
_DUPLICATE = 0.7  # IoU of boxes, as in SAM's own automatic mask generator


class SamRefiner(nn.Module):
    """Refines class maps with the masks of a promptable segmenter.

    `Sam` and `Sam2` bring theirs along; this class takes any.

    Args:
        generator: the segmenter, by position.
        weights: of the segmenter that `Sam` and `Sam2` load; not with ``generator``.
        size: of that segmenter; with ``generator`` only kept as an attribute.
        image_size: pixels of the square that the segmenter sees; None = what it was trained with.
        precision: ``"bf16"`` embeds images in bfloat16, ``"fp32"`` does not.
        mode: ``"prompt"`` refines components of thing and thin classes, ``"vote"`` everything,
            ``"auto"`` does both.
        classes: names of the classes to refine (case does not matter), or a mapping of such names
            to the least score, predicted IoU times stability, of their masks; None = in prompts all
            but those of `STUFF`, in votes all.
        min_area: prompts: pixels below which a component or instance keeps its outline.
        predicted_iou: gate: the least IoU that the segmenter predicts for its own mask; None = what
            the segmenter says in ``least_iou``, else 0.7.
        component_iou: gate, prompts: the least IoU of mask and component.
        area_ratio: gate, prompts: mask and component differ in area by at most this factor.
        agreement: gate, votes: of the pixels in a mask that the network is sure about, the least
            share that must have the class that the mask gets.
        outline: gate: the largest mean squared difference between a mask and the probability of its
            class, over the pixels near its outline. 0.25 is what a probability of one half scores,
            which says nothing, and 0 a network that is sure of the mask. All masks of an image
            together may reach 4/3 of it; beyond, none is taken.
        displacement: gate: pixels along x or y by which the masks of an image, taken together, may
            lie beside where the network's probabilities have them; of few masks less is asked, of
            a single one six times as much. It stops masks that are shifted; inf switches it off.
        strength: the factor λ on masks in the sum of logits; 0 switches the refiner off.
        boundary: pixels that the network's outlines may be off: only pixels this close to a label
            boundary change,
        margin: and those whose two best probabilities differ by less than this.
        points: votes: the point grid is ``points`` x ``points``, four times as dense in cells
            where the network's entropy is above the image's mean.
        batch: prompts decoded at a time; fewer where memory does not suffice, with a warning.
        box: prompts: ``"grown"`` by a tenth, or ``"elastic"``: each side moves out by a tenth only
            where the image beyond it looks as in the component. This and the two following options
            are SAMRefiner's prompts (Lin et al., ICLR 2025).
        mask_prompt: ``"signed"``, sure but near the outline, or ``"gaussian"``, which fades away
            from where the component is deepest.
        merge: prompts: components of a class that fill a common box count as one.
        seeds: prompts: names of thin classes that are also looked for where they are the second
            best of the network's classes and the best one leads by less than ``margin``.

    Thread-safe; copies and pickles like any module.
    """

    # The one list of options: `Sam` and `Sam2` inherit it, so that specs and their errors see it.
    def __init__(
        self,
        generator: Promptable | None = None,
        /,
        *,
        weights: str | Path | None = "default",
        size: str | None = None,
        image_size: int | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
        mode: Literal["prompt", "vote", "auto"] = "prompt",
        classes: Mapping[str, float] | Sequence[str] | str | None = None,
        min_area: int = 64,
        predicted_iou: float | None = None,
        component_iou: float = 0.5,
        area_ratio: float = 2.0,
        agreement: float = 0.9,
        outline: float = 0.3,
        displacement: float = 1.0,
        strength: float = 8.0,
        boundary: int = 8,
        margin: float = 0.5,
        points: int = 16,
        batch: int = 16,
        box: Literal["grown", "elastic"] = "grown",
        mask_prompt: Literal["signed", "gaussian"] = "signed",
        merge: bool = False,
        seeds: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("prompt", "vote", "auto"):
            raise ValueError(f"mode must be 'prompt', 'vote' or 'auto', got {mode!r}")
        for name, value in (("min_area", min_area), ("points", points), ("batch", batch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.rules = Rules(
            component_iou,
            area_ratio,
            agreement,
            outline,
            displacement,
            strength,
            boundary,
            margin,
        )
        self.style = Style(box, mask_prompt, merge)
        if generator is None:
            size, generator = self._load(weights, size, image_size=image_size, precision=precision)
        elif weights not in ("default", None) or image_size is not None or precision != "fp32":
            raise ValueError(
                "weights, image_size and precision are of a segmenter to load, got "
                f"weights={weights!r}, image_size={image_size}, precision={precision!r} and a "
                "generator, which has its own; give one"
            )
        if box == "elastic" and not hasattr(generator, "features"):
            raise ValueError(
                "box='elastic' compares features of the image, and a "
                f"{type(generator).__name__} has no features(embedding); use box='grown'"
            )
        self.generator = generator
        self.eval()
        self.size = size
        self.image_size = image_size
        self.precision = precision
        self.mode = mode
        if isinstance(classes, str):
            classes = (classes,)
        self.classes = dict(classes) if isinstance(classes, Mapping) else classes and tuple(classes)
        self.seeds = (seeds,) if isinstance(seeds, str) else seeds and tuple(seeds)
        self.min_area = min_area
        if predicted_iou is None:
            predicted_iou = getattr(generator, "least_iou", _LEAST_IOU)
        self.predicted_iou = predicted_iou
        self.points = points
        self.batch = batch
        self._fingerprint = Fingerprint()

    def _load(
        self, weights: str | Path | None, size: str | None, **options: Any
    ) -> tuple[str, Promptable]:
        raise TypeError(f"{type(self).__name__} needs a generator; Sam and Sam2 load one")

    def config(self) -> dict[str, Any]:
        """The options that make this refiner again, all but the weights."""
        names = inspect.signature(SamRefiner).parameters
        found = {**vars(self), **vars(self.rules), **vars(self.style)}
        return {name: found[name] for name in names if name not in ("generator", "weights")}

    @property
    def features_key(self) -> str:
        """What the embedding is called in `Segmentation.features`: segmenter and weights.

        A later stage with the same segmenter takes it from there.
        """
        return self._fingerprint(self.generator)

    @property
    def wanted_features(self) -> tuple[str, ...]:
        """What it takes of them: see `pyseg.types`."""
        return (self.features_key,)

    @torch.no_grad()
    def refine(
        self, image: Tensor, prediction: Segmentation, *, features: bool = False
    ) -> Segmentation:
        """Refines one prediction.

        Args:
            image: [3, H, W] uint8 RGB.
            prediction: of this image, with logits, or in prompt mode with instances.
            features: keep the embedding in the result's ``features``, for a later stage.

        Returns:
            A prediction with logits [C, H, W] at full resolution; or, where there are instances,
            with new masks of those whose score is at least `CERTAIN`, and panoptic segments made
            anew of those that had one. ``prediction`` itself where no mask was accepted.

        Raises:
            ValueError: the image is not uint8 RGB or of another size than the prediction, the
                prediction has no logits, or ``classes`` names a class that it does not have.
        """
        require_image_of(image, prediction)
        seen = _Image(self, image, prediction)
        if prediction.instances is not None and self.mode == "prompt":
            refined = self._refine_instances(seen, prediction, prediction.instances)
        elif prediction.logits is None:
            raise ValueError(
                "sam and sam2 need logits and this prediction has labels only; put "
                "the stage before the one that dropped them"
            )
        elif self.rules.strength == 0:
            refined = prediction
        else:
            least = None if self.classes is None else self._least_scores(prediction.classes)
            refined = self._collect(seen, prediction).result(least)
        if features and seen.embedding is not None:
            kept = {**(refined.features or {}), self.features_key: seen.embedding}
            refined = replace(refined, features=kept)
        return refined

    @torch.no_grad()
    def collect(self, image: Tensor, prediction: Segmentation) -> Fusion:
        """The masks that `refine` would fuse, before ``classes`` drops any of them."""
        return self._collect(_Image(self, image, prediction), prediction)

    def _collect(self, seen: _Image, prediction: Segmentation) -> Fusion:
        fusion = Fusion(prediction, self.rules)
        if self.mode != "vote":
            self._add_components(fusion, seen)
        if self.mode != "prompt":
            self._add_votes(fusion, seen)
        return fusion

    def _add_components(self, fusion: Fusion, seen: _Image) -> None:
        """Masks that answer for the components of thing and thin classes."""
        prediction = fusion.prediction
        class_ids = self._class_ids(prediction.classes)
        seeds = _ids_of(self.seeds or (), prediction.classes, "seeds")
        evidence = fusion.second_best([k for k in class_ids if k in seeds])
        prompts, _ = prompt_components(
            prediction.labels.cpu().numpy(),
            class_ids,
            self.min_area,
            style=self.style,
            features=self._features(seen),
            evidence={k: where.cpu().numpy() for k, where in evidence.items()},
        )
        for index, masks, score in self._predict_masks(seen, prompts, fusion.device):
            chosen = [prompts[k] for k in index.tolist()]
            regions = [
                Region(p.corner, torch.from_numpy(p.mask > 0), p.axis, p.strip) for p in chosen
            ]
            fusion.add(masks, score, [prompt.class_id for prompt in chosen], regions)

    def _features(self, seen: _Image) -> np.ndarray | None:
        """What an elastic box compares, [C, h, w]."""
        if self.style.box != "elastic":
            return None
        found: np.ndarray = self.generator.features(seen.embed()).cpu().numpy()  # type: ignore[attr-defined]
        return found

    def _add_votes(self, fusion: Fusion, seen: _Image) -> None:
        """Masks of the whole image, which get the class that is most probable in them."""
        low, scores = self._distinct_masks(seen, fusion.prediction)
        if not len(low):
            return
        step = _at_once(self.batch, fusion.prediction.size)
        for part, score in zip(low.split(step), scores.split(step), strict=True):
            masks = self.generator.upsample(seen.embed(), part)
            fusion.add(masks, score, [VOTE] * len(masks))

    def _refine_instances(
        self, seen: _Image, prediction: Segmentation, found: Instances
    ) -> Segmentation:
        """Replaces the mask of every instance for which the segmenter has a better one."""
        class_ids = set(self._class_ids(prediction.classes))
        own = found.masks.cpu()
        chosen = [
            k
            for k, (label, score) in enumerate(
                zip(found.labels.tolist(), found.scores.tolist(), strict=True)
            )
            if label in class_ids and score >= CERTAIN and int(own[k].sum()) >= self.min_area
        ]
        if not chosen:
            return prediction
        prompts = [
            prompt_instance(own[k].numpy(), found.boxes[k].tolist(), self.style) for k in chosen
        ]
        number = torch.tensor(chosen, device=found.masks.device)
        masks = found.masks.clone()
        changed = False
        for index, better, _ in self._predict_masks(seen, prompts, masks.device):
            instance = number[index]
            _, accepted = self._gate(better > 0, found.masks[instance])
            masks[instance[accepted]] = better[accepted] > 0
            changed |= bool(accepted.any())
        if not changed:
            return prediction
        segments = prediction.segments
        if segments is not None:
            segments = _remerge_segments(prediction, segments, found, masks)
        return replace(prediction, instances=replace(found, masks=masks), segments=segments)

    def _predict_masks(
        self, seen: _Image, prompts: Sequence[RegionPrompt], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The masks of sufficient predicted IoU that answer the prompts, ``batch`` at a time.

        Yields:
            Index of the prompt [K] int64, mask logits [K, H, W], and predicted IoU times
            stability [K], all on ``device``.
        """
        if not prompts:
            return  # nothing to embed for
        size = (seen.image.shape[1], seen.image.shape[2])
        step = _at_once(self.batch, size)
        starts = range(0, len(prompts), step)
        chunks = (stack_prompts(prompts[i : i + step], size) for i in starts)
        for found in propose(
            self.generator, seen.embed(), chunks, predicted_iou=self.predicted_iou
        ):
            masks = self.generator.upsample(seen.embed(), found.logits).to(device)
            score = (found.predicted_iou.clamp(0, 1) * found.stability).to(device)
            yield found.index.to(device), masks, score

    def _gate(self, masks: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """The gate of prompt mode, on masks and the regions that they answer, both [K, H, W] bool.

        Returns:
            IoU of mask and region [K] float, and whether the mask is accepted [K] bool.
        """
        area, region_area, overlap = (
            m.flatten(1).float().sum(1) for m in (masks, regions, masks & regions)
        )
        iou = overlap / (area + region_area - overlap)
        ratio = area / region_area
        accepted = iou >= self.rules.component_iou
        accepted &= (ratio <= self.rules.area_ratio) & (ratio >= 1 / self.rules.area_ratio)
        return iou, accepted

    def _class_ids(self, classes: tuple[str, ...]) -> list[int]:
        """Of the classes to prompt for."""
        if self.classes is None:
            return [i for i, name in enumerate(classes) if not is_stuff(name)]
        return list(self._least_scores(classes))

    def _least_scores(self, classes: tuple[str, ...]) -> dict[int, float]:
        """Ids of the classes that the option names, and the least score of their masks."""
        assert self.classes is not None
        least = self.classes if isinstance(self.classes, dict) else {}
        ids = _ids_of(self.classes, classes, "classes")
        return {k: least.get(name, 0.0) for k, name in zip(ids, self.classes, strict=True)}

    def _distinct_masks(self, seen: _Image, prediction: Segmentation) -> tuple[Tensor, Tensor]:
        """Distinct masks over the whole image, logits [M, h, w], and their scores [M]."""
        from torchvision.ops import masks_to_boxes, nms

        assert prediction.logits is not None
        points = point_grid(
            prediction.logits.float().softmax(0), self.points, (seen.image.shape[1:])
        )
        one = torch.ones(self.batch, 1, dtype=torch.int32, device=points.device)
        chunks = (Prompts(xy[:, None], one[: len(xy)]) for xy in points.split(self.batch))
        kept, scores = torch.zeros(0), torch.zeros(0)
        for found in propose(
            self.generator, seen.embed(), chunks, predicted_iou=self.predicted_iou
        ):
            some = (found.logits > 0).flatten(1).any(1)
            if not some.any():
                continue
            low = found.logits[some]
            score = (found.predicted_iou.clamp(0, 1) * found.stability)[some]
            if len(kept):
                low, score = torch.cat([kept, low]), torch.cat([scores, score])
            distinct = nms(masks_to_boxes(low > 0), score.float(), _DUPLICATE)
            kept, scores = low[distinct], score[distinct]
        return kept, scores


class _Image:
    """An image and its embedding, which is made when first asked for."""

    def __init__(self, refiner: SamRefiner, image: Tensor, prediction: Segmentation) -> None:
        self.image = image
        self.generator = refiner.generator
        # Naming it looks at all weights, so only where there is something to be found.
        self.embedding: Any = None
        if prediction.features:
            self.embedding = prediction.features.get(refiner.features_key)

    def embed(self) -> Any:
        if self.embedding is None:
            self.embedding = self.generator.embed(self.image)
        return self.embedding


class Sam(SamRefiner):
    """SAM (Kirillov et al., 2023) as a refiner.

    Args:
        weights: ``"vit_b"``, ``"vit_l"`` or ``"vit_h"``, which are downloaded once; a local file
            or URL; ``"default"``, the published weights of ``size``; None, random weights. Or
            ``"hf:REPOSITORY"``, such as ``"hf:syscv-community/sam-hq-vit-base"``, or a folder: SAM,
            SAM-HQ, SAM 2, SAM 3 or EdgeTAM of transformers.
        size: one of these three names; by default what ``weights`` are of, else ``"vit_b"``; or
            ``"nano"``, a small network of pyseg's own, whose weights are included.
        mode: this and the other options are those of `SamRefiner`.

    Raises:
        WeightsError: the weights are absent, unreachable, damaged or of another architecture.
        ImportError: ``segment-anything`` is not installed.

    Example:
        >>> pyseg.build("fcn_resnet50+sam(mode='vote', weights='vit_l')")
    """

    def _load(
        self, weights: str | Path | None, size: str | None, **options: Any
    ) -> tuple[str, Promptable]:
        return load_sam(weights, size, **options)


class Sam2(SamRefiner):
    """SAM 2.1 or 2.0 (Ravi et al., 2024), its image part, as a refiner.

    Args:
        weights: ``"tiny"``, ``"small"``, ``"base_plus"`` or ``"large"`` of SAM 2.1, ``"2.0-tiny"``
            and so on of SAM 2.0, which are downloaded once; a local file or URL; ``"default"``, the
            published weights of ``size``; None, random weights. Or ``"hf:REPOSITORY"``, such as
            ``"hf:facebook/sam2.1-hiera-tiny"``, or a folder, of transformers.
        size: one of these names; by default what ``weights`` are of, else ``"tiny"``.
        mode: this and the other options are those of `SamRefiner`.

    Raises:
        WeightsError: the weights are absent, unreachable, damaged or of another architecture.
        ImportError: ``sam2`` is not installed.

    Example:
        >>> pyseg.build("fcn_resnet50+crf+sam2(classes=('car', 'person'))")
    """

    def _load(
        self, weights: str | Path | None, size: str | None, **options: Any
    ) -> tuple[str, Promptable]:
        return load_sam2(weights, size, **options)


sam, sam2 = Sam, Sam2  # what specs call them


def is_stuff(name: str) -> bool:
    """Whether `STUFF` holds the class, whatever its case and its addenda ("sky-other-merged")."""
    head = re.split("[,;/]", name.lower())[0].strip(" _")
    return re.sub("[ _]+", "-", head) in STUFF or head.split("-")[0] in STUFF


def _ids_of(names: Iterable[str], classes: Sequence[str], option: str) -> list[int]:
    """Of classes that an option names, whatever their case."""
    known = {name.lower(): i for i, name in enumerate(classes)}
    if absent := [name for name in names if name.lower() not in known]:
        raise ValueError(f"{option} names {absent}, but the model's classes are {list(classes)}")
    return [known[name.lower()] for name in names]


def _at_once(batch: int, size: Sequence[int]) -> int:
    """How many masks at the size of the image are worked on at a time."""
    return max(1, min(batch, _PIXELS // max(1, size[0] * size[1])))


def _remerge_segments(
    prediction: Segmentation, segments: Segments, found: Instances, masks: Tensor
) -> Segments:
    """Merges a panoptic map anew, with new ``masks`` of the instances that have a segment in it."""
    things = set(found.labels.tolist())
    stuff = sorted({item.label for item in segments.items} - things)
    kept: list[int] = []
    visible: list[float] = []
    for item in segments.items:
        if item.label in things:
            shown = segments.map == item.id
            iou = (found.masks & shown).flatten(1).sum(1) / (found.masks | shown).flatten(1).sum(1)
            iou[found.labels != item.label] = 0
            iou[kept] = 0
            if iou.any():
                kept.append(int(iou.argmax()))
                visible.append(float(shown.sum() / found.masks[kept[-1]].sum()))
    # What was in front stays there: not the most certain first, but what hid least.
    merged = panoptic_merge(
        masks[kept],
        found.scores.new_tensor(visible),
        found.labels[kept],
        prediction.labels,
        stuff_classes=stuff,
        score_threshold=-math.inf,
        overlap_threshold=1.0,
        stuff_area=1,
    )
    return merged._replace(scores=found.scores[kept].float()).segments()[0]
