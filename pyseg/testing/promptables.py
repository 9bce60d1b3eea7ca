"""The suite of promptable segmenters."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..promptable import Prompts
from ..registry import promptables
from ..spec import StageSpec
from .checking import (
    SIZES,
    Check,
    called,
    check_device,
    check_import,
    check_spec,
    check_unchanged,
    kind_of,
    noise_images,
    registered,
    state_of,
)

COUNT = 3  # prompts of an image
TOLERANCE = 1e-3  # of the largest logit: rounding, where prompts are decoded together or alone


def check_promptable(promptable: str | Callable[..., Any], /, **options: Any) -> None:
    """Checks a promptable segmenter: its masks belong to the prompts, and to nothing else.

    Points, boxes, masks and no prompts at all, on images of odd sizes: shapes, dtypes and values;
    that a prompt's mask depends neither on the prompts beside it, their order and number, nor on
    chance or on other images that were embedded meanwhile; that images, prompts and weights stay as
    they are; that it pickles, and that its options survive a spec.

    Args:
        promptable: a registered name, or a factory.
        options: of the factory. ``weights=None`` is given where it takes them.

    Raises:
        AssertionError: the first thing that is not as it should be.
        UnknownName: nothing has that name.

    Example:
        >>> check_promptable("nano")
    """
    with registered(promptables, promptable) as name:
        shown = promptable if isinstance(promptable, str) else called(promptable)
        check = Check(f"promptable {shown}")
        check_import(check, promptables, name)

        def create(**changes: Any) -> Any:
            chosen = StageSpec(name, {**options, **changes})
            return promptables.make(chosen, {"weights": None})

        with check.offline("building it with weights=None"):
            made = create()
        images = noise_images(SIZES[:2])
        asked = {"points": _points, "boxes": _boxes, "masks": _masks}
        embeddings, first = [], []
        for image in images:
            before = image.clone()
            with check.doing("embed"):
                embeddings.append(made.embed(image))
            check(torch.equal(image, before), "embed changes its image")
            with check.doing("predict of points"), torch.inference_mode():
                first.append(made.predict(embeddings[-1], _points(image))[0])
        for image, embedding, logits in zip(images, embeddings, first, strict=True):
            with check.doing("predict of points, after other images"), torch.inference_mode():
                again = made.predict(embedding, _points(image))[0]
            check(torch.equal(logits, again), "masks depend on what was embedded meanwhile")
        state = state_of(made)
        for what, make in asked.items():
            for image, embedding in zip(images, embeddings, strict=True):
                _check_answers(check, what, made, image, embedding, make(image))
        check_unchanged(check, made, state)
        _check_pickle(check, made, images[0])
        check_spec(check, promptables, name, made, create, vary=False)
        check_device(check, "predict", lambda device: _on(made, images[0], device))


def _check_answers(
    check: Check, what: str, made: Any, image: Tensor, embedding: Any, prompts: Prompts
) -> None:
    size = tuple(image.shape[1:])
    parts = [prompts.points, prompts.point_labels, prompts.boxes, prompts.masks]
    given = [part.clone() for part in parts if part is not None]
    with check.doing(f"predict of {what}"), torch.inference_mode():
        logits, quality = made.predict(embedding, prompts)
        masks = made.upsample(embedding, logits)
    now = [part for part in parts if part is not None]
    check(all(map(torch.equal, given, now)), f"predict changes its {what}")
    for value, shape, name in (
        (logits, (COUNT, *logits.shape[1:]), "logits"),
        (quality, (COUNT,), "predicted IoU"),
        (masks, (COUNT, *size), "upsampled masks"),
    ):
        good = tuple(value.shape) == shape and value.is_floating_point()
        check(good, f"{name} of {what} are {kind_of(value)}, no {list(shape)} float")
        check(bool(value.isfinite().all()), f"{name} of {what} are not finite")
    check(logits.ndim == 3, f"logits of {what} are {kind_of(logits)}, no [K, h, w]")
    with check.doing(f"predict of {what}, again"), torch.inference_mode():
        again = made.predict(embedding, prompts)[0]
    check(torch.equal(again, logits), f"predict of {what} gives other masks the second time")
    with check.doing(f"predict of {what}, one by one"), torch.inference_mode():
        alone = [made.predict(embedding, prompts.part(slice(k, k + 1))) for k in range(COUNT)]
        none = made.predict(embedding, prompts.part(slice(0, 0)))[0]
    check(len(none) == 0, f"predict of no {what} gives {len(none)} masks")
    scale = TOLERANCE * (1 + float(logits.abs().max()))
    for k, (one, _) in enumerate(alone):
        close = bool((one[0] - logits[k]).abs().max() <= scale)
        check(close, f"the mask of one of the {what} depends on the others beside it")


def _check_pickle(check: Check, made: Any, image: Tensor) -> None:
    def answer(segmenter: Any) -> Tensor:
        with torch.inference_mode():
            return segmenter.predict(segmenter.embed(image), _points(image))[0]

    with check.doing("pickling it"):
        copied = pickle.loads(pickle.dumps(made))
    first = answer(made)
    check(torch.equal(first, answer(made)), "embedding an image again gives other masks")
    check(torch.equal(first, answer(copied)), "pickled and read, it gives other masks")


def _on(made: Any, image: Tensor, device: torch.device) -> list[Tensor | None]:
    there = pickle.loads(pickle.dumps(made))
    there = there.to(device) if hasattr(there, "to") else there
    prompts = _points(image)
    moved = Prompts(prompts.points.to(device), prompts.point_labels.to(device))
    with torch.inference_mode():
        logits, quality = there.predict(there.embed(image.to(device)), moved)
    return [logits, quality]


def _points(image: Tensor) -> Prompts:
    height, width = image.shape[1:]
    shares = torch.tensor([[0.25, 0.3], [0.5, 0.5], [0.8, 0.7]])
    points = (shares * torch.tensor([width, height]))[:, None]  # [K, 1, 2] x, y
    return Prompts(points, torch.ones(COUNT, 1, dtype=torch.int64))


def _boxes(image: Tensor) -> Prompts:
    height, width = image.shape[1:]
    shares = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.3, 0.2, 0.9, 0.8], [0.0, 0.0, 1.0, 1.0]])
    boxes = shares * torch.tensor([width, height, width, height])
    nothing = torch.zeros(COUNT, 1, 2), torch.full((COUNT, 1), -1)
    return Prompts(*nothing, boxes=boxes)


def _masks(image: Tensor) -> Prompts:
    height, width = image.shape[1:]
    masks = torch.full((COUNT, height, width), -10.0)
    for k in range(COUNT):
        masks[k, k * height // 5 : height // 2 + k * height // 6, width // 4 :] = 10.0
    prompts = _points(image)
    return Prompts(prompts.points, prompts.point_labels, masks=masks)
