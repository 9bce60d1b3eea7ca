"""What the suites have in common: faults with names, inputs, comparisons, imports apart."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import PysegError
from ..registry import Registry, accepted_options, made_from
from ..spec import StageSpec, parse
from ..types import Instances, Segment, Segmentation, Segments

SIZES = ((33, 47), (32, 64), (33, 47), (61, 21))  # odd, even, one twice
THREADS = 4
# Of the processor, beside torch and torchvision; the least of some tries, as what runs beside it
# makes an import slower, never quicker.
IMPORT_SECONDS, IMPORT_TRIES = 1.0, 3


class Check:
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
            self.fail(f"{what} raises {text_of(error)}", error)
        except Exception as error:
            self.fail(f"{what} raises {text_of(error)}", error)

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
                    self.fail(f"{what} takes the network: {some(tried)}")

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
            self.fail(f"{what} raises {text_of(error)}, no {wanted}", error)
        self.fail(f"{what} is accepted; it must raise {wanted}")


@contextlib.contextmanager
def registered(registry: Registry[Any], given: str | Callable[..., Any]) -> Iterator[str]:
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
import importlib, json, socket, sys, time
import numpy, torch, torchvision, pyseg.ops, pyseg.models.semantic, pyseg.promptable
def refuse(*arguments, **_):
    print("network", *arguments)
    raise OSError("pyseg.testing refuses connections")
socket.socket.connect = socket.getaddrinfo = refuse
seconds = {}
for module in sys.argv[1:]:
    before = time.process_time()
    importlib.import_module(module)
    seconds[module] = time.process_time() - before
roots = {module.partition(".")[0] for module in sys.argv[1:]}
loaded = [m for name, m in sys.modules.items() if name.partition(".")[0] in roots]
files = [m.__file__ for m in loaded if getattr(m, "__file__", None)]
print(json.dumps({"seconds": seconds, "files": files}))
"""
_imported: set[str] = set()  # modules that have been imported without a fault


def check_import(check: Check, registry: Registry[Any], name: str) -> None:
    """The module of an installed name imports without network, quickly, and nothing for nothing."""
    points = importlib.metadata.entry_points(group=registry.group)
    module = next((point.module for point in points if point.name == name), None)
    if module is None or module in _imported:
        return
    # All of a distribution at once: most of the time is torch's. Where that is at fault, the module
    # by itself: the fault may be another's, and its bytecode is there now.
    owner = next(point.dist for point in points if point.name == name)
    modules = {p.module for p in points if owner and p.dist and p.dist.name == owner.name}
    if not _import_faults(sorted(modules)):
        _imported.update(modules)
        return
    faults = _import_faults([module])
    check(not faults, next(iter(faults), ""))
    _imported.add(module)


def _import_faults(modules: Sequence[str]) -> list[str]:
    shown, seconds = ", ".join(modules), dict.fromkeys(modules, math.inf)
    for _ in range(IMPORT_TRIES):
        done = subprocess.run(
            [sys.executable, "-c", _IMPORT, *modules],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        )
        if "network" in done.stdout.partition("{")[0]:
            return [f"importing {shown} takes the network: {done.stdout.partition('{')[0].strip()}"]
        if done.returncode:
            return [f"importing {shown} fails: {done.stderr.strip().splitlines()[-1]}"]
        found = json.loads(done.stdout.splitlines()[-1])
        seconds = {module: min(seconds[module], found["seconds"][module]) for module in modules}
        if max(seconds.values()) <= IMPORT_SECONDS:
            break
    faults = [
        f"importing {module} takes {spent:.1f} s of the processor, beside torch: import what "
        "only some calls need within functions"
        for module, spent in seconds.items()
        if spent > IMPORT_SECONDS
    ]
    for file in found["files"]:
        if file.endswith(".py") and _imports_for_nothing(Path(file), "torchvision"):
            faults.append(f"{Path(file).name} imports torchvision and makes no use of it")
    return faults


def _imports_for_nothing(file: Path, package: str) -> bool:
    """Whether a module's head imports from a package what nothing in it names."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in tree.body:
        if isinstance(node, ast.Import):
            wanted = [a for a in node.names if a.name.partition(".")[0] == package]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            wanted = node.names if (node.module or "").partition(".")[0] == package else []
        else:
            continue
        if any((a.asname or a.name.partition(".")[0]) not in named for a in wanted):
            return True
    return False


_OF_DEVICES = re.compile(r"same device|device type|two devices|different devices", re.IGNORECASE)
_MAY_MIX = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_")


class _OneDevice(TorchDispatchMode):
    """Refuses operators that get tensors on several devices, as CUDA does; "meta" is not strict."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim]
        places = sorted({tensor.device.type for tensor in tensors})
        if len(places) > 1 and func._schema.name not in _MAY_MIX:
            raise RuntimeError(f"{func} wants all on the same device, got {' and '.join(places)}")
        return func(*args, **(kwargs or {}))


def check_device(
    check: Check, what: str, run: Callable[[torch.device], Sequence[Tensor | None]]
) -> None:
    """Results must be where the inputs are: on the GPU, or where there is none on "meta".

    A meta tensor has a device and no values, so that what mixes devices fails there as it would on
    a GPU. What looks at values fails for another reason, and then only a GPU can tell.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "meta")
    try:
        with _OneDevice() if device.type == "meta" else contextlib.nullcontext():
            results = run(device)
    except Exception as error:
        if device.type == "cuda" or _OF_DEVICES.search(str(error)):
            check.fail(f"{what} on {device.type} raises {text_of(error)}", error)
        return
    strange = sorted({r.device.type for r in results if r is not None and r.device != device})
    strange = [] if device.type == "cuda" and strange == ["cuda"] else strange
    check(not strange, f"{what} ignores the device: {device.type} in, {', '.join(strange)} out")


def check_spec(
    check: Check,
    registry: Registry[Any],
    name: str,
    made: Any,
    create: Callable[..., Any],
    *,
    vary: bool,
) -> None:
    """Options must survive a spec and, where it has one, ``config()``.

    Args:
        create: makes it again, with these options changed.
        vary: whether to try other values of every number and truth value, too; it is made for each.
    """
    accepted = accepted_options(registry.get(name)) or {}
    for option, parameter in accepted.items():
        if parameter.default is not parameter.empty and parameter.default is not None:
            default = parameter.default
            check(
                _survives(option, default),
                f"option {option} has the default {default!r}, which no spec can hold: take "
                "numbers, texts, truth values, None, or tuples and dicts of such",
            )
    origin = made_from(made)
    if origin is not None:
        with check.doing(f"reading its spec {origin} again"):
            check(parse(str(origin)).stages == (origin,), f"its spec {origin} is read as another")
    if not hasattr(made, "config"):
        return
    with check.doing("config"):
        config = made.config()
    for option, value in config.items():
        known = option in accepted or accepted_options(registry.get(name)) is None
        check(known, f"config gives {option}, which is none of its options")
        check(_survives(option, value), f"config gives {option}={value!r}, which no spec can hold")
    with check.doing("making it again from its config"):
        again = create(**config)
    check(again.config() == config, f"made from {config}, it has the config {again.config()}")
    defaults = {key: parameter.default for key, parameter in accepted.items()}
    for option, value in (_other_values(config, defaults) if vary else {}).items():
        try:
            changed = create(**{**config, option: value}).config()
        except (PysegError, TypeError, ValueError):
            continue  # a value that it refuses, or that does not go with the others
        check(
            changed.get(option) == value,
            f"made with {option}={value!r}, its config gives {option}={changed.get(option)!r}",
        )


def _survives(option: str, value: Any) -> bool:
    try:
        (stage,) = parse(str(StageSpec("x", {option: value}))).stages
    except PysegError:
        return False
    return bool(stage.options[option] == value)


def _other_values(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    others: dict[str, Any] = {}
    for option, value in config.items():
        if isinstance(value, bool):
            others[option] = not value
        elif isinstance(value, float) or (
            isinstance(value, int) and isinstance(defaults.get(option), float)
        ):
            others[option] = value * 0.75 + 0.125
        elif isinstance(value, int):
            others[option] = value + 1
    return others


def noise_images(sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Coarse coloured noise, [3, H, W] uint8; different for equal sizes."""
    generator = torch.Generator().manual_seed(0)
    return [
        F.interpolate(torch.rand(1, 3, 5, 7, generator=generator), size, mode="bilinear")[0]
        .mul(255)
        .to(torch.uint8)
        for size in sizes
    ]


def random_prediction(image: Tensor, classes: Sequence[str], seed: int) -> Segmentation:
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


def state_of(made: Any) -> dict[str, Tensor]:
    if not isinstance(made, nn.Module):
        return {}
    return {key: value.clone() for key, value in made.state_dict().items()}


def check_unchanged(check: Check, made: Any, before: Mapping[str, Tensor]) -> None:
    changed = [key for key, value in state_of(made).items() if not torch.equal(value, before[key])]
    check(not changed, f"predict changes the state of the model: {some(changed)}")


def parts_of(result: Segmentation) -> dict[str, Tensor]:
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


def same_bits(one: Segmentation, other: Segmentation) -> bool:
    """Bit for bit."""
    first, second = parts_of(one), parts_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def nearly_same(one: Segmentation, other: Segmentation) -> bool:
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


def sum_of_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As `pyseg.evaluate` merges the states of processes: tensors add up, lists are joined."""
    total: dict[str, Any] = {}
    for state in states:
        for key, value in state.items():
            if key in total:
                total[key] = total[key] + value
            else:
                total[key] = value.clone() if isinstance(value, Tensor) else [*value]
    return total


def equal_scores(one: Any, other: Any) -> bool:
    """Whether two results of ``compute`` are the same to the last bit; nan is nan."""
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping)
            and one.keys() == other.keys()
            and all(equal_scores(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal_scores, one, other))
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    if hasattr(one, "shape"):
        return torch.as_tensor(one).equal(torch.as_tensor(other)) or bool(
            torch.allclose(
                torch.as_tensor(one), torch.as_tensor(other), rtol=0, atol=0, equal_nan=True
            )
        )
    return bool(one == other)


def called(given: Any) -> str:
    return f"{given.__module__}.{getattr(given, '__qualname__', type(given).__name__)}"


def kind_of(value: Tensor) -> str:
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def some(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def check_threads(
    check: Check,
    run: Callable[[Tensor], Segmentation],
    images: Sequence[Tensor] | None = None,
) -> None:
    images = noise_images(SIZES[:2]) if images is None else images
    # Also the reference comes from a thread: torch may share out work otherwise in the main one.
    with ThreadPoolExecutor(1) as pool:
        expected = list(pool.map(run, images))
    start = threading.Barrier(THREADS)

    def work(thread: int) -> bool:
        start.wait()
        order = [(thread + k) % len(images) for k in range(len(images))]
        return all(same_bits(run(images[k]), expected[k]) for k in order)

    with check.doing(f"{THREADS} threads at once"), ThreadPoolExecutor(THREADS) as pool:
        equal = all(pool.map(work, range(THREADS)))
    check(equal, f"{THREADS} threads at once get other results than one")
