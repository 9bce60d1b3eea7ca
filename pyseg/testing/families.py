"""The suites of models, refiners, metrics and data sets."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import datasets, metrics, models, pipeline, refiners
from ..errors import PysegError
from ..models.maskrcnn import InstanceModel
from ..models.semantic import SemanticModel
from ..registry import accepted_options
from ..spec import StageSpec
from ..types import VOID, Instances, Sample, Segmentation, Segments
from .checking import (
    SIZES,
    Check,
    called,
    check_device,
    check_import,
    check_spec,
    check_threads,
    check_unchanged,
    equal_scores,
    kind_of,
    nearly_same,
    noise_images,
    parts_of,
    random_prediction,
    registered,
    same_bits,
    some,
    state_of,
    sum_of_states,
    text_of,
)


def check_model(model: str | Callable[..., Any], /, **options: Any) -> None:
    """Checks a model that `pyseg.build` can build.

    It is built with ``weights=None`` and without network. Then: names of classes and colours;
    evaluation mode; predictions of images of odd, equal and different sizes, of one pixel and of
    none, their shapes, dtypes and values; that they depend neither on the rest of the batch nor on
    chance, threads or what was predicted before; that inputs and state stay as they are; that bad
    images and options are refused by errors; another ``num_classes``; that it pickles and comes
    back from `Pipeline.save`. A `SemanticModel` and an `InstanceModel` must also take a training
    step that reaches every parameter. That importing it needs no network is checked of installed
    models only, in a process of its own.

    Args:
        model: a registered name, or a factory.
        options: of the factory; small ones make it quick. Where ``num_stuff`` is not among them, a
            model with such an option is checked with one stuff class too.

    Raises:
        AssertionError: the first thing that is not as it should be.
        UnknownName: nothing has that name.

    Example:
        >>> check_model("fcn_resnet50", num_classes=3)
    """
    with registered(models._registry, model) as name:
        check = Check(f"model {name}" if isinstance(model, str) else f"model {called(model)}")
        check_import(check, models._registry, name)
        accepted = accepted_options(models.get(name))

        def create(**changes: Any) -> Any:
            return models.create(name, **{**options, **changes})

        none = {"weights": None} if accepted is None or "weights" in accepted else {}
        with check.offline("building it with weights=None"):
            made = create(**none)
        check(
            not (isinstance(made, nn.Module) and any(m.training for m in made.modules())),
            "parts of it are in training mode when it has been built",
        )
        _check_classes(check, made)
        _check_predictions(check, made)
        _check_bad_images(check, made)
        check_threads(check, lambda image: made.predict([image])[0])
        _check_pickle(check, made, lambda one: one.predict(noise_images(SIZES[:1]))[0])
        _check_saving(check, made)
        check_spec(
            check, models._registry, name, made, lambda **o: create(**{**none, **o}), vary=False
        )
        _check_model_device(check, made)
        if none:
            absent = Path(tempfile.gettempdir()) / "no" / "weights.pth"
            check.raises((PysegError,), f"weights={absent}", lambda: create(weights=str(absent)))
        if accepted is not None and "num_classes" in accepted:
            _check_num_classes(check, create, none, made, accepted, options)
        if isinstance(made, (SemanticModel, InstanceModel)):
            _check_training(check, made)


def check_refiner(refiner: str | Callable[..., Any], /, **options: Any) -> None:
    """Checks a refiner: pure, repeatable, the same alone and in a batch, in threads, pickled.

    Args:
        refiner: a registered name, or a factory.
        options: of the factory. ``num_classes`` and ``weights=None`` are given where it takes them.

    Raises:
        AssertionError: the first thing that is not as it should be.
        UnknownName: nothing has that name.
    """
    classes = ("one", "two", "three")
    with registered(refiners._registry, refiner) as name:
        check = Check(f"refiner {name if isinstance(refiner, str) else called(refiner)}")
        check_import(check, refiners._registry, name)
        context = {"num_classes": len(classes), "weights": None}
        with check.offline("building it with weights=None"):
            made = refiners._registry.make(StageSpec(name, options), context)
        images = noise_images(SIZES)
        given = [random_prediction(image, classes, seed) for seed, image in enumerate(images)]
        before = [image.clone() for image in images]
        parts = [{k: v.clone() for k, v in parts_of(prediction).items()} for prediction in given]
        with check.doing("refine"):
            alone = [made.refine(i, p) for i, p in zip(images, given, strict=True)]
        for image, result in zip(images, alone, strict=True):
            _check_segmentation(check, "refine", image, result, classes)
        check(all(map(torch.equal, images, before)), "refine changes its images")
        for prediction, before_it in zip(given, parts, strict=True):
            now = parts_of(prediction)
            changed = [key for key, value in before_it.items() if not torch.equal(value, now[key])]
            check(not changed, f"refine changes the {some(changed)} of the prediction it is given")
        with check.doing("refine, again"):
            again = [made.refine(i, p) for i, p in zip(images, given, strict=True)]
        check(all(map(same_bits, alone, again)), "refine gives another result the second time")
        if hasattr(made, "refine_batch"):
            with check.doing("refine_batch"):
                together = made.refine_batch(images, given)
            check(len(together) == len(images), f"refine_batch returns {len(together)} results")
            close = all(map(nearly_same, together, alone))
            check(close, "refine_batch gives other results than refine, one by one")
        partner = dict(zip(map(id, images), given, strict=True))
        check_threads(check, lambda image: made.refine(image, partner[id(image)]), images)
        _check_pickle(check, made, lambda one: one.refine(images[0], given[0]))
        check_spec(
            check,
            refiners._registry,
            name,
            made,
            lambda **changes: refiners._registry.make(StageSpec(name, changes), context),
            vary=True,
        )
        _check_refiner_device(check, made, images[0], given[0])
        _check_labels_only(check, made, images[0], given[0])


def check_metric(
    metric: str | Callable[..., Any],
    /,
    *,
    classes: Sequence[str] = ("one", "two", "three"),
    **options: Any,
) -> None:
    """Checks a metric: its state adds up over images in any order and any number of parts.

    Args:
        metric: a registered name, or a factory.
        classes: given to the factory; the last one is its only thing.
        options: of the factory.

    Raises:
        AssertionError: the first thing that is not as it should be.
        UnknownName: nothing has that name.
    """
    classes = tuple(classes)
    context = {"classes": classes, "num_classes": len(classes), "things": classes[-1:]}
    images = noise_images(SIZES * 2)
    pairs = []
    for seed, image in enumerate(images):
        truth = random_prediction(image, classes, seed + 100)
        labels = truth.labels.clone()
        labels[: seed + 4, :9] = VOID
        sample = Sample(f"image {seed}", image, labels, truth.segments, truth.instances)
        pairs.append((random_prediction(image, classes, seed), sample))
    with registered(metrics._registry, metric) as name:
        check = Check(f"metric {name if isinstance(metric, str) else called(metric)}")
        check_import(check, metrics._registry, name)

        def create() -> Any:
            return metrics._registry.make(StageSpec(name, options), context)

        def scored(chosen: Sequence[int], pairs: Sequence[Any] = pairs) -> Any:
            made = create()
            for k in chosen:
                made.update(*pairs[k])
            return made

        everything = range(len(pairs))

        def given(prediction: Any, sample: Any) -> dict[str, Tensor]:
            return parts_of(prediction) | {"truth": sample.labels}

        kept = [{key: value.clone() for key, value in given(*pair).items()} for pair in pairs]
        with check.doing("update"):
            whole = scored(everything)
        for pair, before in zip(pairs, kept, strict=True):
            now = given(*pair)
            changed = [key for key, value in before.items() if not torch.equal(value, now[key])]
            check(not changed, f"update changes the {some(changed)} that it is given")
        with check.doing("compute"):
            scores = whole.compute()
        check(isinstance(scores, dict) and bool(scores), f"compute returns {scores!r}, no dict")
        check(equal_scores(scores, whole.compute()), "compute gives other scores the second time")
        with check.doing("compute of no image"):
            check(isinstance(create().compute(), dict), "compute of no image returns no dict")
        for key, value in whole.state().items():
            good = isinstance(value, list) or (
                isinstance(value, Tensor)
                and not (value.is_floating_point() or value.is_complex())
                and value.dtype != torch.bool
            )
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            check(
                good,
                f"state {key!r} is {kind}: states are integer tensors (fractions in fixed point) "
                "and lists, so that their sum depends on no order",
            )
        with check.doing("update, in another order"):
            permuted = scored([*everything][::-1])
        check(equal_scores(scores, permuted.compute()), "scores depend on the order of the images")
        for parts in (2, 3, len(pairs) + 1):
            with check.doing(f"merging {parts} states"):
                states = [scored([*everything][k::parts]).state() for k in range(parts)]
                merged = create()
                merged.load_state(sum_of_states(states))
            equal = equal_scores(scores, merged.compute())
            check(equal, f"images in {parts} parts, whose states are merged, give other scores")
        state = pickle.loads(pickle.dumps(whole.state()))
        loaded = create()
        with check.doing("load_state"):
            loaded.load_state(state)
        check(equal_scores(scores, loaded.compute()), "load_state(state()) gives other scores")
        _check_void(check, pairs, lambda chosen: scored(range(len(chosen)), chosen))
        check_spec(
            check,
            metrics._registry,
            name,
            create(),
            lambda **changes: metrics._registry.make(StageSpec(name, changes), context),
            vary=True,
        )
        with check.doing("pickling it"):
            copied = pickle.loads(pickle.dumps(whole))
        check(equal_scores(scores, copied.compute()), "pickled and read, it gives other scores")


def check_dataset(dataset: Any, /, **options: Any) -> None:
    """Checks a data set: indices, samples, values, names, that workers of a loader can have it.

    Args:
        dataset: a registered name, a factory, or the data set itself.
        options: of the factory, such as ``root`` and ``split``.

    Raises:
        AssertionError: the first thing that is not as it should be.
        UnknownName: nothing has that name.
    """
    if isinstance(dataset, str):
        check = Check(f"data set {dataset}")
        check_import(check, datasets._registry, dataset)
        with check.offline("making it"):
            dataset = datasets.create(dataset, **options)
    elif isinstance(dataset, type) or not hasattr(dataset, "__getitem__"):
        check = Check(f"data set {called(dataset)}")
        with check.offline("making it"):
            dataset = dataset(**options)
    else:
        check = Check(f"data set {type(dataset).__name__}")
    _check_classes(check, dataset)
    check(getattr(dataset, "palette", None) is not None, "it has no palette")
    classes, length = dataset.classes, len(dataset)
    check(length > 0, "it is empty")
    with check.doing("pickling it"):
        copied = pickle.loads(pickle.dumps(dataset))
    before = _state_of_randomness()
    names = set()
    chosen = sorted({round(k * (length - 1) / 7) for k in range(8)})
    for index in chosen:
        with check.doing(f"sample {index}"):
            sample, again, other = dataset[index], dataset[index], copied[index]
        check(isinstance(sample, Sample), f"sample {index} is a {type(sample).__name__}")
        check(isinstance(sample.name, str) and bool(sample.name), f"sample {index} has no name")
        names.add(sample.name)
        image = sample.image
        good = image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3 and image.numel()
        check(bool(good), f"image {index} is {kind_of(image)}, no [3, H, W] uint8")
        size = tuple(image.shape[1:])
        if sample.labels is not None:
            _check_labels(check, f"labels of sample {index}", sample.labels, size, len(classes))
        if sample.instances is not None:
            _check_instances(check, f"sample {index}", sample.instances, size, len(classes))
        if sample.segments is not None:
            _check_segments(check, f"sample {index}", sample.segments, size, len(classes))
        for one, what in ((again, "read again"), (other, "of a pickled copy")):
            equal = torch.equal(one.image, image) and one.name == sample.name
            if sample.labels is not None:
                equal = equal and one.labels is not None and torch.equal(one.labels, sample.labels)
            check(equal, f"sample {index}, {what}, is another one")
    check(before == _state_of_randomness(), "reading samples draws from torch's global generator")
    check(len(names) == len(chosen), f"several samples have one name: {sorted(names)}")
    check.raises((IndexError,), f"index {length}", lambda: dataset[length])


def _state_of_randomness() -> bytes:
    return bytes(torch.get_rng_state().numpy())


# -------------------------------------------------------------- what refiners and metrics must do


def _check_labels_only(check: Check, made: Any, image: Tensor, prediction: Segmentation) -> None:
    """Without logits: a result in which void is void, or an error that says so."""
    labels = prediction.labels.clone()
    labels[3:9, 4:11] = VOID
    try:
        result = made.refine(image, prediction.with_labels(labels))
    except (PysegError, ValueError):
        return
    except Exception as error:
        check.fail(f"a prediction without logits raises {text_of(error)}, no ValueError", error)
    _check_segmentation(check, "refine without logits", image, result, prediction.classes)
    kept = bool((result.labels[3:9, 4:11] == VOID).all())
    check(kept, "refine gives classes to pixels that were void")


def _check_refiner_device(check: Check, made: Any, image: Tensor, prediction: Segmentation) -> None:
    assert prediction.logits is not None
    logits = prediction.logits

    def run(device: torch.device) -> list[Tensor | None]:
        there = _moved(made, device)
        given = Segmentation(prediction.size, prediction.classes, logits=logits.to(device))
        result = there.refine(image.to(device), given)
        return [result.logits if result.logits is not None else result.labels]

    check_device(check, "refine", run)


def _check_model_device(check: Check, made: Any) -> None:
    if hasattr(made, "to"):
        (image,) = noise_images(SIZES[:1])
        check_device(
            check, "predict", lambda device: [_moved(made, device).predict([image])[0].logits]
        )


def _moved(made: Any, device: torch.device) -> Any:
    """A copy that lives on a device."""
    copied = pickle.loads(pickle.dumps(made))
    return copied.to(device) if hasattr(copied, "to") else copied


def _check_void(
    check: Check,
    pairs: Sequence[tuple[Segmentation, Sample]],
    scored: Callable[[Sequence[tuple[Segmentation, Sample]]], Any],
) -> None:
    """Void pixels of the truth say nothing: neither what is predicted there, nor their number."""
    prediction, sample = pairs[0]
    assert sample.labels is not None
    logits = prediction.full_logits()
    void = sample.labels == VOID
    others = [torch.where(void, logits.roll(k, 0), logits) for k in range(len(logits))]
    maps = [replace(prediction, logits=value, _labels=None) for value in others]
    with check.doing("update where void is predicted otherwise"):
        scores = [scored([(one, sample), *pairs[1:]]).compute() for one in maps]
    same = all(equal_scores(scores[0], other) for other in scores)
    check(same, "scores depend on what is predicted where the truth is void")
    size = prediction.size
    nothing = Segments(torch.zeros(size, dtype=torch.int32), ())
    none = Instances(
        torch.zeros(0, 4),
        torch.zeros(0, *size, dtype=torch.bool),
        torch.zeros(0),
        torch.zeros(0, dtype=torch.int64),
    )
    unknown = Sample("void", sample.image, torch.full_like(sample.labels, VOID), nothing, none)
    with check.doing("update with an image that is void"):
        more = scored([*pairs, (replace(prediction, instances=none), unknown)]).compute()
    same = equal_scores(_fractions(scored(pairs).compute()), _fractions(more))
    check(same, "an image that is void all over changes scores")


def _fractions(scores: Any) -> Any:
    """Scores without what counts, such as the number of images."""
    if isinstance(scores, Mapping):
        return {key: _fractions(value) for key, value in scores.items()}
    if isinstance(scores, (list, tuple)):
        return [_fractions(value) for value in scores]
    return None if isinstance(scores, int) else scores


# ----------------------------------------------------------------------------- what models must do


def _check_classes(check: Check, made: Any) -> None:
    classes, palette = made.classes, getattr(made, "palette", None)
    check(
        isinstance(classes, tuple) and bool(classes) and all(isinstance(c, str) for c in classes),
        f"classes must be a tuple of names, got {classes!r}",
    )
    twice = sorted({name for name in classes if classes.count(name) > 1})
    check(not twice, f"classes has names more than once: {', '.join(twice)}")
    if palette is not None:
        check(
            len(palette) == len(classes),
            f"palette has {len(palette)} colours for {len(classes)} classes",
        )
        for colour in palette:
            good = len(colour) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in colour)
            check(good, f"palette has {colour!r}, no three integers in 0..255")


def _check_predictions(check: Check, made: Any) -> None:
    images = noise_images(SIZES)
    before = [image.clone() for image in images]
    state = state_of(made)
    with check.doing(f"predict of images of {', '.join(f'{h} x {w}' for h, w in SIZES)}"):
        results = made.predict(images)
    check(all(map(torch.equal, images, before)), "predict changes its images")
    check_unchanged(check, made, state)
    check(
        isinstance(results, list) and len(results) == len(images),
        f"predict returns {len(results) if isinstance(results, list) else type(results).__name__}"
        f" for {len(images)} images: a list of as many predictions is wanted",
    )
    for image, result in zip(images, results, strict=True):
        _check_segmentation(check, "predict", image, result, made.classes)
    with check.doing("predict, again"):
        again = made.predict(images)
    check(all(map(same_bits, results, again)), "predict gives another result the second time")
    with check.doing("predict of one image at a time"):
        alone = [made.predict([image])[0] for image in images]
    close = all(map(nearly_same, results, alone))
    check(close, "predictions depend on which images are in the list")
    with check.doing("predict of no images"):
        check(made.predict([]) == [], "predict of an empty list is not an empty list")
    one = torch.full((3, 1, 1), 127, dtype=torch.uint8)
    try:
        result = made.predict([one])[0]
    except (PysegError, ValueError):
        return  # too small, and it says so
    except Exception as error:
        check.fail(
            f"an image of 1 x 1 raises {text_of(error)}: neither result nor ValueError", error
        )
    _check_segmentation(check, "predict of 1 x 1", one, result, made.classes)


def _check_segmentation(
    check: Check, what: str, image: Tensor, result: Any, classes: tuple[str, ...]
) -> None:
    size = tuple(image.shape[1:])
    check(isinstance(result, Segmentation), f"{what} gives a {type(result).__name__}")
    check(tuple(result.size) == size, f"{what} gives size {tuple(result.size)} for {size}")
    check(result.classes == classes, f"{what} gives other classes than the model has")
    logits = result.logits
    if logits is not None:
        good = logits.ndim == 3 and len(logits) == len(classes) and logits.is_floating_point()
        check(good, f"{what} gives logits {kind_of(logits)}, no [{len(classes)}, h, w] float")
        check(bool(logits.isfinite().all()), f"{what} gives logits that are not finite")
        check(not logits.requires_grad, f"{what} gives logits with a gradient")
    if (doubt := result.uncertainty) is not None:
        good = doubt.is_floating_point() and bool((doubt >= 0).all() and doubt.isfinite().all())
        check(good, f"{what} gives uncertainty that is not finite, negative or no float")
        check(not doubt.requires_grad, f"{what} gives uncertainty with a gradient")
    if result.instances is not None:
        _check_instances(check, what, result.instances, size, len(classes))
    if result.segments is not None:
        _check_segments(check, what, result.segments, size, len(classes))
    with check.doing(f"labels of {what}"):
        labels = result.labels
    _check_labels(check, f"labels of {what}", labels, size, len(classes))


def _check_labels(
    check: Check, what: str, labels: Tensor, size: tuple[int, ...], count: int
) -> None:
    void, dtype = (VOID, torch.uint8) if count <= VOID else (-1, torch.int16)
    good = tuple(labels.shape) == size and labels.dtype == dtype
    check(good, f"{what} are {kind_of(labels)}, not {list(size)} {dtype}")
    strange = sorted({v for v in labels.unique().tolist() if v != void and not 0 <= v < count})
    check(not strange, f"{what} have values {strange[:5]}, which are none of {count} classes")


def _check_instances(
    check: Check, what: str, found: Instances, size: tuple[int, ...], count: int
) -> None:
    number = len(found.labels)
    for name, value, shape, kind in (
        ("boxes", found.boxes, (number, 4), found.boxes.is_floating_point()),
        ("masks", found.masks, (number, *size), found.masks.dtype == torch.bool),
        ("scores", found.scores, (number,), found.scores.is_floating_point()),
        ("labels", found.labels, (number,), found.labels.dtype == torch.int64),
    ):
        good = tuple(value.shape) == shape and kind
        check(good, f"{what} gives {name} of instances {kind_of(value)}, see pyseg.types.Instances")
    inside = bool(((found.labels >= 0) & (found.labels < count)).all())
    check(inside, f"{what} gives instances of classes that are none of {count}")


def _check_segments(
    check: Check, what: str, segments: Segments, size: tuple[int, ...], count: int
) -> None:
    table = segments.map
    good = tuple(table.shape) == size and table.dtype == torch.int32
    check(good, f"{what} gives a map of segments {kind_of(table)}, not {list(size)} int32")
    ids, areas = table.unique(return_counts=True)
    there = dict(zip(ids.tolist(), areas.tolist(), strict=True))
    there.pop(0, None)
    listed = {item.id: item.area for item in segments.items}
    check(there == listed, f"{what} lists segments other than its map has, or with other areas")
    inside = all(0 <= item.label < count for item in segments.items)
    check(inside, f"{what} gives segments of classes that are none of {count}")


def _check_bad_images(check: Check, made: Any) -> None:
    for bad in (
        torch.zeros(3, 8, 9),
        torch.zeros(1, 8, 9, dtype=torch.uint8),
        torch.zeros(8, 9, dtype=torch.uint8),
        torch.zeros(3, 0, 9, dtype=torch.uint8),
    ):
        what = f"an image {kind_of(bad)}"
        check.raises((ValueError, TypeError), what, partial(made.predict, [bad]))


def _check_pickle(check: Check, made: Any, run: Callable[[Any], Segmentation]) -> None:
    with check.doing("pickling it"):
        copied = pickle.loads(pickle.dumps(made))
    check(same_bits(run(made), run(copied)), "pickled and read, it gives another result")


def _check_saving(check: Check, made: Any) -> None:
    (image,) = noise_images(SIZES[:1])
    with tempfile.TemporaryDirectory() as folder:
        with check.doing("Pipeline.save"):
            pipeline.build(made).save(Path(folder) / "saved")
        with check.offline("pyseg.load"):
            loaded = pipeline.load(Path(folder) / "saved")
    check(loaded.classes == made.classes, "saved and loaded, it has other classes")
    result = loaded(image)
    same = same_bits(result, made.predict([image])[0])
    check(same, "saved and loaded, it gives another result: its state_dict must hold all of it")


def _check_num_classes(
    check: Check,
    create: Callable[..., Any],
    none: Mapping[str, Any],
    made: Any,
    accepted: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    count = len(made.classes) + 1
    changes = dict(none)
    if "num_stuff" in accepted and "num_stuff" not in options:
        changes["num_stuff"] = 1
    with check.doing(f"building it with num_classes={count}"):
        other = create(**changes, num_classes=count)
    check(
        len(other.classes) == count,
        f"with num_classes={count} it has {len(other.classes)} classes",
    )
    _check_classes(check, other)
    (image,) = noise_images(SIZES[:1])
    with check.doing(f"predict with num_classes={count}"):
        result = other.predict([image])[0]
    _check_segmentation(check, f"predict with num_classes={count}", image, result, other.classes)
    check.raises((ValueError,), "num_classes=0", lambda: create(**changes, num_classes=0))


def _check_training(check: Check, made: SemanticModel | InstanceModel) -> None:
    count, images = len(made.classes), noise_images([(64, 96)] * 2)
    generator = torch.Generator().manual_seed(0)
    made.train()
    if isinstance(made, InstanceModel):
        labels = torch.randint(count, (2, 64, 96), generator=generator).to(torch.uint8)
        box = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
        mask = torch.zeros(1, 64, 96, dtype=torch.bool)
        mask[:, 8:40, 8:40] = True
        things = Instances(box, mask, torch.ones(1), torch.tensor([made.num_stuff]))
        samples = [
            Sample(str(k), image, labels[k], instances=things) for k, image in enumerate(images)
        ]
        with check.doing("a training step"):
            losses = made(samples)
        outputs: Mapping[str, Tensor] = {}
    else:
        labels = torch.randint(count, (2, 64, 96), generator=generator)
        with check.doing("a training step"):
            outputs = made(torch.stack(images))
        check("out" in outputs, f"its outputs are {', '.join(outputs)}: there is no 'out'")
        losses = {}
        for key, logits in outputs.items():
            check(
                key == "out" or key.startswith("aux"),
                f"its output {key!r} is neither 'out' nor begins with 'aux'",
            )
            good = logits.ndim == 4 and tuple(logits.shape[:2]) == (2, count)
            check(good, f"its output {key!r} is {kind_of(logits)}, no [2, {count}, h, w]")
            full = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear")
            losses[key] = F.cross_entropy(full, labels)
    for key, loss in losses.items():
        check(bool(loss.isfinite()), f"its loss {key!r} is not finite")
    with check.doing("the gradient of a training step"):
        torch.stack([*losses.values()]).sum().backward()
    learnt = [(key, p.grad) for key, p in made.named_parameters() if p.requires_grad]
    idle = [key for key, gradient in learnt if gradient is None]
    check(not idle, f"a training step does not reach {len(idle)} parameters: {some(idle)}")
    broken = [key for key, g in learnt if g is not None and not g.isfinite().all()]
    check(not broken, f"gradients of {some(broken)} are not finite")
    made.zero_grad()
    made.eval()
