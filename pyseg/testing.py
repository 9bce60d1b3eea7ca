"""Conformance suites: what pyseg expects of a model, a refiner, a metric and a data set.

For built-ins and plugins alike, in any test runner: a suite returns nothing, or raises an
``AssertionError`` that names the part and what is wrong with it.

Example:
    >>> from pyseg import testing
    >>> def test_conformance():
    ...     testing.check_model("my_network", channels=16)
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import math
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import datasets, metrics, models, pipeline, refiners
from .errors import PysegError
from .models.maskrcnn import InstanceModel
from .models.semantic import SemanticModel
from .registry import Registry, accepted_options
from .spec import StageSpec
from .types import VOID, Instances, Sample, Segment, Segmentation, Segments

SIZES = ((33, 47), (32, 64), (33, 47), (61, 21))  # odd, even, one twice
THREADS = 4


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
    with _registered(models._registry, model) as name:
        check = _Check(f"model {name}" if isinstance(model, str) else f"model {_called(model)}")
        _check_import(check, models._registry, name)
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
        _check_threads(check, lambda image: made.predict([image])[0])
        _check_pickle(check, made, lambda one: one.predict(_images(SIZES[:1]))[0])
        _check_saving(check, made)
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
    with _registered(refiners._registry, refiner) as name:
        check = _Check(f"refiner {name if isinstance(refiner, str) else _called(refiner)}")
        _check_import(check, refiners._registry, name)
        context = {"num_classes": len(classes), "weights": None}
        with check.offline("building it with weights=None"):
            made = refiners._registry.make(StageSpec(name, options), context)
        images = _images(SIZES)
        given = [_prediction(image, classes, seed) for seed, image in enumerate(images)]
        before = [image.clone() for image in images]
        logits = [
            prediction.logits.clone() for prediction in given if prediction.logits is not None
        ]
        with check.doing("refine"):
            alone = [made.refine(i, p) for i, p in zip(images, given, strict=True)]
        for image, result in zip(images, alone, strict=True):
            _check_segmentation(check, "refine", image, result, classes)
        check(all(map(torch.equal, images, before)), "refine changes its images")
        same = all(
            p.logits is not None and torch.equal(p.logits, x)
            for p, x in zip(given, logits, strict=True)
            if x.numel()
        )
        check(same, "refine changes the logits of the prediction that it is given")
        with check.doing("refine, again"):
            again = [made.refine(i, p) for i, p in zip(images, given, strict=True)]
        check(all(map(_same, alone, again)), "refine gives another result the second time")
        if hasattr(made, "refine_batch"):
            with check.doing("refine_batch"):
                together = made.refine_batch(images, given)
            check(len(together) == len(images), f"refine_batch returns {len(together)} results")
            close = all(map(_close, together, alone))
            check(close, "refine_batch gives other results than refine, one by one")
        partner = dict(zip(map(id, images), given, strict=True))
        _check_threads(check, lambda image: made.refine(image, partner[id(image)]), images)
        _check_pickle(check, made, lambda one: one.refine(images[0], given[0]))
        labels_only = given[0].with_labels(given[0].labels)
        try:
            result = made.refine(images[0], labels_only)
        except (PysegError, ValueError):
            return  # it needs logits and says so
        except Exception as error:
            check.fail(f"a prediction without logits raises {_text(error)}, no ValueError", error)
        _check_segmentation(check, "refine without logits", images[0], result, classes)


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
    images = _images(SIZES * 2)
    pairs = []
    for seed, image in enumerate(images):
        truth = _prediction(image, classes, seed + 100)
        labels = truth.labels.clone()
        labels[: seed + 1, :5] = VOID
        sample = Sample(f"image {seed}", image, labels, truth.segments, truth.instances)
        pairs.append((_prediction(image, classes, seed), sample))
    with _registered(metrics._registry, metric) as name:
        check = _Check(f"metric {name if isinstance(metric, str) else _called(metric)}")
        _check_import(check, metrics._registry, name)

        def create() -> Any:
            return metrics._registry.make(StageSpec(name, options), context)

        def scored(chosen: Sequence[int]) -> Any:
            made = create()
            for k in chosen:
                made.update(*pairs[k])
            return made

        everything = range(len(pairs))
        with check.doing("update"):
            whole = scored(everything)
        with check.doing("compute"):
            scores = whole.compute()
        check(isinstance(scores, dict) and bool(scores), f"compute returns {scores!r}, no dict")
        check(_equal(scores, whole.compute()), "compute gives other scores the second time")
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
        check(_equal(scores, permuted.compute()), "scores depend on the order of the images")
        for parts in (2, 3, len(pairs) + 1):
            with check.doing(f"merging {parts} states"):
                states = [scored([*everything][k::parts]).state() for k in range(parts)]
                merged = create()
                merged.load_state(_sum(states))
            equal = _equal(scores, merged.compute())
            check(equal, f"images in {parts} parts, whose states are merged, give other scores")
        state = pickle.loads(pickle.dumps(whole.state()))
        loaded = create()
        with check.doing("load_state"):
            loaded.load_state(state)
        check(_equal(scores, loaded.compute()), "load_state(state()) gives other scores")
        with check.doing("pickling it"):
            copied = pickle.loads(pickle.dumps(whole))
        check(_equal(scores, copied.compute()), "pickled and read, it gives other scores")


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
        check = _Check(f"data set {dataset}")
        _check_import(check, datasets._registry, dataset)
        with check.offline("making it"):
            dataset = datasets.create(dataset, **options)
    elif isinstance(dataset, type) or not hasattr(dataset, "__getitem__"):
        check = _Check(f"data set {_called(dataset)}")
        with check.offline("making it"):
            dataset = dataset(**options)
    else:
        check = _Check(f"data set {type(dataset).__name__}")
    _check_classes(check, dataset)
    check(getattr(dataset, "palette", None) is not None, "it has no palette")
    classes, length = dataset.classes, len(dataset)
    check(length > 0, "it is empty")
    with check.doing("pickling it"):
        copied = pickle.loads(pickle.dumps(dataset))
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
        check(bool(good), f"image {index} is {_kind(image)}, no [3, H, W] uint8")
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
    check(len(names) == len(chosen), f"several samples have one name: {sorted(names)}")
    check.raises((IndexError,), f"index {length}", lambda: dataset[length])


# ----------------------------------------------------------------------------- what models must do


def _check_classes(check: _Check, made: Any) -> None:
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


def _check_predictions(check: _Check, made: Any) -> None:
    images = _images(SIZES)
    before = [image.clone() for image in images]
    state = _state(made)
    with check.doing(f"predict of images of {', '.join(f'{h} x {w}' for h, w in SIZES)}"):
        results = made.predict(images)
    check(all(map(torch.equal, images, before)), "predict changes its images")
    _check_unchanged(check, made, state)
    check(
        isinstance(results, list) and len(results) == len(images),
        f"predict returns {len(results) if isinstance(results, list) else type(results).__name__}"
        f" for {len(images)} images: a list of as many predictions is wanted",
    )
    for image, result in zip(images, results, strict=True):
        _check_segmentation(check, "predict", image, result, made.classes)
    with check.doing("predict, again"):
        again = made.predict(images)
    check(all(map(_same, results, again)), "predict gives another result the second time")
    with check.doing("predict of one image at a time"):
        alone = [made.predict([image])[0] for image in images]
    close = all(map(_close, results, alone))
    check(close, "predictions depend on which images are in the list")
    with check.doing("predict of no images"):
        check(made.predict([]) == [], "predict of an empty list is not an empty list")
    one = torch.full((3, 1, 1), 127, dtype=torch.uint8)
    try:
        result = made.predict([one])[0]
    except (PysegError, ValueError):
        return  # too small, and it says so
    except Exception as error:
        check.fail(f"an image of 1 x 1 raises {_text(error)}: neither result nor ValueError", error)
    _check_segmentation(check, "predict of 1 x 1", one, result, made.classes)


def _check_segmentation(
    check: _Check, what: str, image: Tensor, result: Any, classes: tuple[str, ...]
) -> None:
    size = tuple(image.shape[1:])
    check(isinstance(result, Segmentation), f"{what} gives a {type(result).__name__}")
    check(tuple(result.size) == size, f"{what} gives size {tuple(result.size)} for {size}")
    check(result.classes == classes, f"{what} gives other classes than the model has")
    logits = result.logits
    if logits is not None:
        good = logits.ndim == 3 and len(logits) == len(classes) and logits.is_floating_point()
        check(good, f"{what} gives logits {_kind(logits)}, no [{len(classes)}, h, w] float")
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
    check: _Check, what: str, labels: Tensor, size: tuple[int, ...], count: int
) -> None:
    void, dtype = (VOID, torch.uint8) if count <= VOID else (-1, torch.int16)
    good = tuple(labels.shape) == size and labels.dtype == dtype
    check(good, f"{what} are {_kind(labels)}, not {list(size)} {dtype}")
    strange = sorted({v for v in labels.unique().tolist() if v != void and not 0 <= v < count})
    check(not strange, f"{what} have values {strange[:5]}, which are none of {count} classes")


def _check_instances(
    check: _Check, what: str, found: Instances, size: tuple[int, ...], count: int
) -> None:
    number = len(found.labels)
    for name, value, shape, kind in (
        ("boxes", found.boxes, (number, 4), found.boxes.is_floating_point()),
        ("masks", found.masks, (number, *size), found.masks.dtype == torch.bool),
        ("scores", found.scores, (number,), found.scores.is_floating_point()),
        ("labels", found.labels, (number,), found.labels.dtype == torch.int64),
    ):
        good = tuple(value.shape) == shape and kind
        check(good, f"{what} gives {name} of instances {_kind(value)}, see pyseg.types.Instances")
    inside = bool(((found.labels >= 0) & (found.labels < count)).all())
    check(inside, f"{what} gives instances of classes that are none of {count}")


def _check_segments(
    check: _Check, what: str, segments: Segments, size: tuple[int, ...], count: int
) -> None:
    table = segments.map
    good = tuple(table.shape) == size and table.dtype == torch.int32
    check(good, f"{what} gives a map of segments {_kind(table)}, not {list(size)} int32")
    ids, areas = table.unique(return_counts=True)
    there = dict(zip(ids.tolist(), areas.tolist(), strict=True))
    there.pop(0, None)
    listed = {item.id: item.area for item in segments.items}
    check(there == listed, f"{what} lists segments other than its map has, or with other areas")
    inside = all(0 <= item.label < count for item in segments.items)
    check(inside, f"{what} gives segments of classes that are none of {count}")


def _check_bad_images(check: _Check, made: Any) -> None:
    for bad in (
        torch.zeros(3, 8, 9),
        torch.zeros(1, 8, 9, dtype=torch.uint8),
        torch.zeros(8, 9, dtype=torch.uint8),
        torch.zeros(3, 0, 9, dtype=torch.uint8),
    ):
        what = f"an image {_kind(bad)}"
        check.raises((ValueError, TypeError), what, partial(made.predict, [bad]))


def _check_threads(
    check: _Check,
    run: Callable[[Tensor], Segmentation],
    images: Sequence[Tensor] | None = None,
) -> None:
    images = _images(SIZES[:2]) if images is None else images
    # Also the reference comes from a thread: torch may share out work otherwise in the main one.
    with ThreadPoolExecutor(1) as pool:
        expected = list(pool.map(run, images))
    start = threading.Barrier(THREADS)

    def work(thread: int) -> bool:
        start.wait()
        order = [(thread + k) % len(images) for k in range(len(images))]
        return all(_same(run(images[k]), expected[k]) for k in order)

    with check.doing(f"{THREADS} threads at once"), ThreadPoolExecutor(THREADS) as pool:
        equal = all(pool.map(work, range(THREADS)))
    check(equal, f"{THREADS} threads at once get other results than one")


def _check_pickle(check: _Check, made: Any, run: Callable[[Any], Segmentation]) -> None:
    with check.doing("pickling it"):
        copied = pickle.loads(pickle.dumps(made))
    check(_same(run(made), run(copied)), "pickled and read, it gives another result")


def _check_saving(check: _Check, made: Any) -> None:
    (image,) = _images(SIZES[:1])
    with tempfile.TemporaryDirectory() as folder:
        with check.doing("Pipeline.save"):
            pipeline.build(made).save(Path(folder) / "saved")
        with check.offline("pyseg.load"):
            loaded = pipeline.load(Path(folder) / "saved")
    check(loaded.classes == made.classes, "saved and loaded, it has other classes")
    result = loaded(image)
    same = _same(result, made.predict([image])[0])
    check(same, "saved and loaded, it gives another result: its state_dict must hold all of it")


def _check_num_classes(
    check: _Check,
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
    (image,) = _images(SIZES[:1])
    with check.doing(f"predict with num_classes={count}"):
        result = other.predict([image])[0]
    _check_segmentation(check, f"predict with num_classes={count}", image, result, other.classes)
    check.raises((ValueError,), "num_classes=0", lambda: create(**changes, num_classes=0))


def _check_training(check: _Check, made: SemanticModel | InstanceModel) -> None:
    count, images = len(made.classes), _images([(64, 96)] * 2)
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
            check(good, f"its output {key!r} is {_kind(logits)}, no [2, {count}, h, w]")
            full = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear")
            losses[key] = F.cross_entropy(full, labels)
    for key, loss in losses.items():
        check(bool(loss.isfinite()), f"its loss {key!r} is not finite")
    with check.doing("the gradient of a training step"):
        torch.stack([*losses.values()]).sum().backward()
    learnt = [(key, p.grad) for key, p in made.named_parameters() if p.requires_grad]
    idle = [key for key, gradient in learnt if gradient is None]
    check(not idle, f"a training step does not reach {len(idle)} parameters: {_some(idle)}")
    broken = [key for key, g in learnt if g is not None and not g.isfinite().all()]
    check(not broken, f"gradients of {_some(broken)} are not finite")
    made.zero_grad()
    made.eval()


# ----------------------------------------------------------------------------------------- helpers


class _Check:
    """``check(condition, message)``, with the name of what is checked."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, condition: bool, message: str) -> None:
        if not condition:
            self.fail(message)

    def fail(self, message: str, cause: BaseException | None = None) -> NoReturn:
        raise AssertionError(f"{self.what}: {message}") from cause

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Exceptions within are faults."""
        try:
            yield
        except AssertionError as error:
            if str(error).startswith(self.what):
                raise
            self.fail(f"{what} raises {_text(error)}", error)
        except Exception as error:
            self.fail(f"{what} raises {_text(error)}", error)

    @contextlib.contextmanager
    def offline(self, what: str) -> Iterator[None]:
        """As `doing`; connections are refused, and even tried they are a fault."""
        tried: list[str] = []

        def refuse(*arguments: Any, **_: Any) -> NoReturn:
            tried.append(str(next((a for a in arguments if isinstance(a, (str, tuple))), "")))
            raise OSError("pyseg.testing refuses connections")

        with contextlib.ExitStack() as stack:
            for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo")):
                stack.enter_context(mock.patch.object(owner, name, refuse))
            try:
                with self.doing(what):
                    yield
            finally:
                if tried:
                    self.fail(f"{what} takes the network: {_some(tried)}")

    def raises(
        self, errors: tuple[type[Exception], ...], what: str, run: Callable[[], Any]
    ) -> None:
        """``run`` must raise one of these."""
        wanted = " or ".join(error.__name__ for error in errors)
        try:
            run()
        except errors:
            return
        except Exception as error:
            self.fail(f"{what} raises {_text(error)}, no {wanted}", error)
        self.fail(f"{what} is accepted; it must raise {wanted}")


@contextlib.contextmanager
def _registered(registry: Registry[Any], given: str | Callable[..., Any]) -> Iterator[str]:
    """The name of a factory in its registry; one that has none gets one meanwhile."""
    if isinstance(given, str):
        registry.info(given)  # raises UnknownName
        yield given
    elif known := registry.name_of(given):
        yield known
    else:
        name = next(
            name for k in itertools.count() if (name := f"checked_{k}") not in registry.list()
        )
        registry.register(name)(given)
        try:
            yield name
        finally:
            del registry._registered[name]


_IMPORT = """
import importlib, socket, sys
def refuse(*arguments, **_):
    print("network", *arguments)
    raise OSError("pyseg.testing refuses connections")
socket.socket.connect = socket.getaddrinfo = refuse
for module in sys.argv[1:]:
    importlib.import_module(module)
"""
_imported: set[str] = set()  # modules that have been imported without network


def _check_import(check: _Check, registry: Registry[Any], name: str) -> None:
    """The module of an installed name imports without network."""
    points = importlib.metadata.entry_points(group=registry.group)
    module = next((point.module for point in points if point.name == name), None)
    if module is None or module in _imported:
        return
    # All of a distribution at once: most of the time is torch's.
    owner = next(point.dist for point in points if point.name == name)
    modules = {p.module for p in points if owner and p.dist and p.dist.name == owner.name}
    for chosen in (modules, {module}):
        done = subprocess.run(
            [sys.executable, "-c", _IMPORT, *sorted(chosen)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        )
        if done.returncode == 0 and "network" not in done.stdout:
            _imported.update(chosen)
            return
    if "network" in done.stdout:
        check.fail(f"importing {module} takes the network: {done.stdout.strip()}")
    check.fail(f"importing {module} fails: {done.stderr.strip().splitlines()[-1]}")


def _images(sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Coarse coloured noise, [3, H, W] uint8; different for equal sizes."""
    generator = torch.Generator().manual_seed(0)
    return [
        F.interpolate(torch.rand(1, 3, 5, 7, generator=generator), size, mode="bilinear")[0]
        .mul(255)
        .to(torch.uint8)
        for size in sizes
    ]


def _prediction(image: Tensor, classes: Sequence[str], seed: int) -> Segmentation:
    """Random logits at a quarter; segments and instances that are the regions of their labels."""
    size = (image.shape[1], image.shape[2])
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(1, len(classes), 4, 5, generator=generator)
    shape = [math.ceil(n / 4) for n in size]
    logits = F.interpolate(low, shape, mode="bilinear")[0] * 3
    result = Segmentation(size, tuple(classes), logits=logits, image=image)
    labels = result.labels.long()
    present = labels.unique().tolist()
    items = tuple(Segment(label + 1, label, 1.0, int((labels == label).sum())) for label in present)
    masks = torch.stack([labels == label for label in present])
    boxes = []
    for mask in masks:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    scores = torch.rand(len(present), generator=generator)
    return replace(
        result,
        segments=Segments((labels + 1).to(torch.int32), items),
        instances=Instances(torch.tensor(boxes).float(), masks, scores, torch.tensor(present)),
    )


def _state(made: Any) -> dict[str, Tensor]:
    if not isinstance(made, nn.Module):
        return {}
    return {key: value.clone() for key, value in made.state_dict().items()}


def _check_unchanged(check: _Check, made: Any, before: Mapping[str, Tensor]) -> None:
    changed = [key for key, value in _state(made).items() if not torch.equal(value, before[key])]
    check(not changed, f"predict changes the state of the model: {_some(changed)}")


def _parts(result: Segmentation) -> dict[str, Tensor]:
    parts = {"labels": result.labels}
    if result.logits is not None:
        parts["logits"] = result.logits
    if result.uncertainty is not None:
        parts["uncertainty"] = result.uncertainty
    if result.segments is not None:
        parts["map"] = result.segments.map
    if result.instances is not None:
        for name in ("boxes", "masks", "scores"):
            parts[name] = getattr(result.instances, name)
    return parts


def _same(one: Segmentation, other: Segmentation) -> bool:
    """Bit for bit."""
    first, second = _parts(one), _parts(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def _close(one: Segmentation, other: Segmentation) -> bool:
    """But for rounding: logits to a thousandth of the largest, all but one label of a hundred."""
    if (one.logits is None) != (other.logits is None) or tuple(one.size) != tuple(other.size):
        return False
    if one.logits is not None and other.logits is not None:
        if one.logits.shape != other.logits.shape:
            return False
        scale = 1e-3 * float(other.logits.abs().max()) + 1e-6
        if float((one.logits - other.logits).abs().max()) > scale:
            return False
    return float((one.labels != other.labels).float().mean()) <= 0.01


def _sum(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As `pyseg.evaluate` merges the states of processes: tensors add up, lists are joined."""
    total: dict[str, Any] = {}
    for state in states:
        for key, value in state.items():
            if key in total:
                total[key] = total[key] + value
            else:
                total[key] = value.clone() if isinstance(value, Tensor) else [*value]
    return total


def _equal(one: Any, other: Any) -> bool:
    """Whether two results of ``compute`` are the same to the last bit; nan is nan."""
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping)
            and one.keys() == other.keys()
            and all(_equal(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    if hasattr(one, "shape"):
        return torch.as_tensor(one).equal(torch.as_tensor(other)) or bool(
            torch.allclose(
                torch.as_tensor(one), torch.as_tensor(other), rtol=0, atol=0, equal_nan=True
            )
        )
    return bool(one == other)


def _called(given: Any) -> str:
    return f"{given.__module__}.{getattr(given, '__qualname__', type(given).__name__)}"


def _kind(value: Tensor) -> str:
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
