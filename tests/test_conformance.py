"""The suites of `pyseg.testing` over what pyseg ships, `check_op` over faults, and pytest's option.

Models: `tests/models/test_conformance.py`; data sets: `tests/datasets`; each plugin: its own tests.
"""

import io
import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import pyseg
from pyseg import ops, testing
from pyseg.ops import rle

ROOT = Path(pyseg.__file__).parents[1]
REFINERS = {
    "crf": {"iterations": 1},
    "crf_deeplab_v1": {"iterations": 1},
    "crf_deeplab_v2": {"iterations": 1},
    "crf_pydensecrf": {"iterations": 1},
    "segfix": {},
    "temperature": {},
    "sam": {"size": "nano", "min_area": 8},
}
# It wants SAM 2's weights, or random ones of full size; and test_grounded.py checks a small one.
ELSEWHERE = {"sam2", "grounded_sam"}


@pytest.mark.parametrize("name", REFINERS)
def test_refiners(name):
    testing.check_refiner(name, **REFINERS[name])


@pytest.mark.parametrize("name", pyseg.metrics.list())
def test_metrics(name):
    classes = ("off", "on") if name == "binary" else ("one", "two", "three")
    if name == "cityscapes_ap":
        classes = ("road", "person", "car")
    testing.check_metric(name, classes=classes)


def test_nothing_is_left_out():
    assert {*REFINERS, *ELSEWHERE} == {
        name
        for name in pyseg.refiners.list()
        if pyseg.refiners.info(name).distribution == "pyseg-toolkit"
    }


# -------------------------------------------------------------------------------------------- ops


def labels(*shape, seed=0, high=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(high, shape, generator=generator, dtype=torch.uint8)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def void(*shape):
    made = labels(*shape, seed=5)
    made[:, :2, :3] = 255
    return made


def module(name):
    """The module of an op, which the function of the same name hides in the package."""
    return sys.modules[f"pyseg.ops.{name}"]


def png(values):
    buffer = io.BytesIO()
    Image.fromarray(values.numpy()).save(buffer, "PNG")
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def segments(map, labels):
    """Rows of `panoptic_quality`'s target: id, class, area, no crowd; class 0 for the first."""
    return torch.tensor([[i, label, int((map == i).sum()), 0] for i, label in labels.items()])


def edges(*masks):
    """Masks as `run_overlaps` takes them, along the columns as COCO counts."""
    found = []
    for mask in masks:
        flat = np.pad(mask.T.ravel().astype(np.int8), 1)
        found.append(np.flatnonzero(np.diff(flat)).astype(np.int64))
    counts = torch.tensor([len(one) for one in found])
    return torch.from_numpy(np.concatenate(found)), counts


def overlaps(*tensors):
    """`run_overlaps` of the same as tensors."""
    given = [tensor if tensor is None else tensor.numpy() for tensor in tensors]
    return torch.from_numpy(rle.run_overlaps(*((given[k], given[k + 1]) for k in (0, 2, 4))))


def plain_overlaps(first, first_counts, second, second_counts, one, other):
    def filled(edges, counts):
        masks = torch.zeros(len(counts), 400, dtype=torch.bool)
        for mask, own in zip(masks, edges.split(counts.tolist()), strict=True):
            for start, end in own.reshape(-1, 2).tolist():
                mask[start:end] = True
        return masks

    a, b = filled(first, first_counts), filled(second, second_counts)
    return (a[one] & b[other]).sum(1)


def plain_merge(masks, scores, labels, semantic):
    reference = module("panoptic_merge").reference
    return reference(masks, scores, labels, semantic, stuff_classes=[0, 1], stuff_area=5)[0]


def plain_head(logits, masks, boxes, labels, size):
    full = torch.nn.functional.interpolate(logits[None], size, mode="bilinear")[0]
    return ops.panoptic_logits(full, masks, boxes, labels, num_stuff=2).argmax(0).to(torch.int32)


def plain_warp(features, boxes, *options):
    """Boxes are rounded first, halves away from zero."""
    edges = (boxes[:, 1:] + 0.5).floor()
    whole = torch.cat([boxes[:, :1], edges[:, :2], edges[:, 2:] + 1], 1)
    return module("roi_align").reference(features, whole, *options)


LEVELS = {"canonical_size": 16, "canonical_level": 2}  # a box on each of two levels


def plain_levels(fine, coarse, boxes):
    reference = module("roi_align").reference
    return torch.cat(
        [reference(fine, boxes[:1], (3, 2), 0.5), reference(coarse, boxes[1:], (3, 2), 0.25)]
    )


def first_of(op):
    """``op`` with the first of its results only."""
    return lambda *arguments: op(*arguments)[0]


BOXES = torch.tensor([[0, 1.0, 2.0, 9.5, 8.0], [1, 0.0, 0.0, 11.0, 9.0]])
LARGE = BOXES * torch.tensor([1.0, 2, 2, 2, 2])
PARTS = labels(11, 13, seed=2, high=4).int()
FOUND = PARTS.roll(2, 1)
MASKS = torch.stack([PARTS == 1, PARTS == 2, FOUND == 1])
DRAWN = np.kron(labels(3, 4, 5, seed=8, high=2).numpy(), np.ones((1, 5, 4), np.uint8))
# name: op, examples, reference, and what check_op is told; None = its module's reference
EXAMPLES = {
    "boundary_mask": (
        ops.boundary_mask,
        [(labels(2, 11, 13), 1), (labels(1, 1, 1), 2), (labels(0, 4, 4), 1)],
    ),
    "boundary_match": (
        first_of(ops.boundary_match),
        [
            (labels(2, 11, 13), void(2, 11, 13), 3, 1.5),
            (labels(1, 1, 1), labels(1, 1, 1, seed=1), 3, 2.0),
            (labels(0, 4, 4), labels(0, 4, 4), 3, 0.0),
        ],
    ),
    "confusion_counts": (
        first_of(ops.confusion_counts),
        [(labels(2, 9, 7), void(2, 9, 7), 3)],
        module("confusion_matrix").reference,
    ),
    "confusion_matrix": (
        ops.confusion_matrix,
        [(labels(2, 9, 7), void(2, 9, 7), 3), (labels(1, 5, 3), labels(1, 5, 3, seed=1), 3)],
    ),
    "decode_png": (
        ops.decode_png,
        [(png(labels(11, 13, high=200)),), (png(labels(1, 1)),), (png(labels(5, 1)),)],
        None,
        {"compiles": False},
    ),
    "deform_conv2d": (
        ops.deform_conv2d,
        [(noise(1, 4, 8, 9), 0.5 * noise(1, 18, 6, 7, seed=1), noise(6, 4, 3, 3, seed=2))],
    ),
    "dense_crf": (  # the lattice approximates the kernels; tests/ops/test_dense_crf.py says how far
        partial(ops.dense_crf, iterations=2, quality="high"),
        [
            (noise(2, 3, 11, 13), 90 + 9 * noise(2, 3, 11, 13, seed=1)),
            (noise(1, 2, 1, 1), 90 + 9 * noise(1, 3, 1, 1, seed=1)),
        ],
        lambda unary, image: (
            module("dense_crf").reference(unary, image, iterations=2).to(unary.dtype)
        ),
        {"tolerance": 0.05},
    ),
    "multi_scale_roi_align": (
        lambda *given: ops.multi_scale_roi_align(
            given[:2], given[2], (3, 2), (0.5, 0.25), 2, **LEVELS
        ),
        [(noise(2, 3, 9, 12), noise(2, 3, 5, 6, seed=1), LARGE)],
        plain_levels,
    ),
    "panoptic_head": (
        lambda *tensors: ops.panoptic_head(*tensors[:4], num_stuff=2, size=tensors[4]),
        [
            (
                noise(5, 6, 7),
                noise(3, 5, 5, seed=1),
                torch.tensor([[1.0, 2.0, 9.0, 8.0], [0.0, 0.0, 13.0, 11.0], [4.0, 3.0, 4.0, 20.0]]),
                torch.tensor([2, 4, 3]),
                (12, 14),
            ),
            (noise(3, 1, 1), noise(0, 5, 5), torch.zeros(0, 4), labels(0).long(), (2, 3)),
        ],
        plain_head,
    ),
    "panoptic_merge": (
        lambda *tensors: ops.panoptic_merge(*tensors, stuff_classes=[0, 1], stuff_area=5).map,
        [
            (MASKS, torch.tensor([0.7, 0.9, 0.8]), torch.tensor([2, 3, 2]), labels(11, 13, seed=4)),
            (torch.zeros(0, 2, 3).bool(), torch.zeros(0), labels(0).long(), labels(2, 3)),
        ],
        plain_merge,
    ),
    "panoptic_quality": (
        lambda *given: ops.panoptic_quality(*given, 2).counts[:, :3],
        [
            (
                FOUND,
                PARTS,
                segments(FOUND, {1: 0, 2: 0, 3: 1})[:, :2],
                segments(PARTS, {1: 0, 2: 1, 3: 1}),
            )
        ],
        lambda *given: module("panoptic_quality").reference(*given, 2)[:, :3].long(),
        {"compiles": False},  # it looks at the lists of segments
    ),
    "rle": (
        overlaps,
        [
            (*edges(*DRAWN), *edges(*DRAWN[::-1]), *torch.triu_indices(3, 3)),
            (*edges(DRAWN[0] * 0), *edges(DRAWN[1]), *torch.zeros(2, 1).long()),
        ],
        plain_overlaps,
        {"compiles": False},
    ),
    "roi_align": (ops.roi_align, [(noise(2, 3, 9, 12), BOXES, (3, 2), 1.0, 2)]),
    "roi_pool": (ops.roi_pool, [(noise(2, 3, 9, 12), BOXES, (3, 2))], torchvision.ops.roi_pool),
    "roi_warp": (ops.roi_warp, [(noise(2, 3, 11, 12), BOXES, (3, 2), 1.0, 2)], plain_warp),
    "upsample_argmax": (
        ops.upsample_argmax,
        [(noise(2, 4, 5, 7), (17, 23)), (noise(1, 3, 9, 8), (4, 4))],
        lambda logits, size: module("upsample_argmax").reference(logits, size).to(torch.uint8),
    ),
    "upsample_confusion": (
        lambda *arguments: ops.upsample_confusion(*arguments).matrix,
        [(noise(2, 3, 5, 4), void(2, 13, 9))],
    ),
}
# In torch's own operators; and a function of networks.
NO_KERNELS = {"panoptic_logits", "replace_roi_pooling"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_ops(name):
    op, examples, *more = EXAMPLES[name]
    reference = (more[0] if more else None) or module(name).reference
    testing.check_op(op, examples, reference, **(more[1] if len(more) > 1 else {}))


def test_every_op_has_examples():
    functions = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    modules = {path.stem for path in Path(ops.__file__).parent.glob("[a-z]*.py")}
    assert {*EXAMPLES} == functions - NO_KERNELS | modules


LIBRARY = torch.library.Library("pyseg_faulty", "DEF")
LIBRARY.define("double(Tensor x) -> Tensor")
LIBRARY.define("in_place(Tensor x) -> Tensor")
LIBRARY.define("no_fake(Tensor x) -> Tensor")
LIBRARY.define("wrong_fake(Tensor x) -> Tensor")
LIBRARY.define("strides(Tensor x) -> Tensor")
LIBRARY.impl("double", lambda x: 2 * x, "CPU")
LIBRARY.impl("in_place", lambda x: x.mul_(2).clone(), "CPU")
LIBRARY.impl("no_fake", lambda x: 2 * x, "CPU")
LIBRARY.impl("wrong_fake", lambda x: 2 * x, "CPU")
LIBRARY.impl("strides", lambda x: 2 * x.as_strided(x.shape, (x.shape[1], 1)), "CPU")
torch.library.register_fake("pyseg_faulty::double", lambda x: torch.empty_like(x))
torch.library.register_fake("pyseg_faulty::in_place", lambda x: torch.empty_like(x))
torch.library.register_fake("pyseg_faulty::strides", lambda x: torch.empty_like(x))
torch.library.register_fake("pyseg_faulty::wrong_fake", lambda x: x.new_empty(x.shape[0]))
FAULTY = torch.ops.pyseg_faulty
MADE = [(noise(4, 5),), (noise(1, 1),)]


def twice(x):
    return 2 * x


def checked(operator):
    def op(x):
        if not isinstance(x, torch.Tensor):
            raise TypeError("x must be a tensor")
        return operator(x)

    return op


def takes_anything(x):
    return x if x is None else FAULTY.double(x)


def by_chance(x):
    return FAULTY.double(x) + 1e-6 * torch.rand(1)


def by_threads(x):
    return FAULTY.double(x) + 1e-7 * torch.get_num_threads()


def branches_on_values(x):
    if not isinstance(x, torch.Tensor):
        raise TypeError("x must be a tensor")
    return FAULTY.double(x) if float(x.sum()) < 1e9 else x


def test_a_good_op_passes():
    testing.check_op(checked(FAULTY.double), MADE, twice)


@pytest.mark.parametrize(
    ("op", "reference", "message"),
    [
        (checked(FAULTY.in_place), twice, "changes its arguments"),
        (checked(FAULTY.double), lambda x: 3 * x, "it and the reference differ"),
        (checked(FAULTY.double), lambda x: (2 * x)[:1], "it and the reference differ"),
        (checked(FAULTY.no_fake), twice, "opcheck of pyseg_faulty.no_fake"),
        (checked(FAULTY.wrong_fake), twice, "opcheck of pyseg_faulty.wrong_fake"),
        (checked(FAULTY.strides), twice, "other strides"),
        (by_chance, twice, "another result the second time"),
        (by_threads, twice, "the number of threads changes the result"),
        (branches_on_values, twice, r"torch\.compile\(fullgraph=True\) raises"),
        (takes_anything, twice, "None is accepted; it must raise TypeError"),
        (twice, twice, "it calls no operator but torch's own"),
    ],
)
def test_every_fault_of_an_op_is_found(op, reference, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_op(op, MADE, reference)


def test_an_op_without_examples_is_named():
    with pytest.raises(AssertionError, match=r"has no function examples\(\)"):
        testing.check_op(takes_anything)


# --------------------------------------------------------------------- imports, and pytest's option

REFINER = """
class Refiner:
    def refine(self, image, prediction):
        if prediction.logits is None:
            raise ValueError("it needs logits")
        return prediction.with_logits(2 * prediction.logits)
"""
PLUGINS = {
    "good": REFINER,
    "slow": "import time\nend = time.process_time() + 2.5\n"
    "while time.process_time() < end: pass\n" + REFINER,
    "needless": "import torchvision\nfrom torchvision.ops import nms\n" + REFINER,
    "needful": "from torchvision.ops import nms\n" + REFINER + "\n    boxes = nms\n",
    "leaning": "import pyseg\n"
    + REFINER.replace(
        "class Refiner:",
        "class Refiner:\n    def __init__(self):\n        pyseg.refiners.create('plugin_good')\n",
    ),
    "dated": "import pyseg\n"
    + REFINER.replace(
        "class Refiner:",
        "class Refiner:\n    def __init__(self):\n"
        "        pyseg.build('streetnet(weights=None)').stages[0].object\n",
    ),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    for name, code in PLUGINS.items():
        (folder / f"plugin_{name}.py").write_text(textwrap.dedent(code))
        info = folder / f"plugin_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plugin-{name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(
            f"[pyseg.refiners]\nplugin_{name} = plugin_{name}:Refiner\n"
        )
    return folder


@pytest.mark.slow
def test_the_option_checks_names_with_no_other_plugin_in_sight(site, tmp_path):
    """One run, as each imports torch."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    names = ["plugin_good", "plugin-needful", *(f"plugin_{name}" for name in PLUGINS)]
    done = subprocess.run(
        [*command, *(f"--pyseg-conformance={name}" for name in names)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])},
    )
    text = done.stdout + done.stderr
    assert "4 failed, 4 passed" in text, text
    assert "importing plugin_slow takes 2." in text
    assert "plugin_needless.py imports torchvision and makes no use of it" in text
    assert "no refiner is called 'plugin_good'" in text  # which is hidden from plugin_leaning
    assert "Stage.object is deprecated" in text
    (tmp_path / "test_own.py").write_text("def test_own():\n    pass\n")
    unknown = subprocess.run(
        [*command, "--pyseg-conformance=no_such_name"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])},
    )
    assert unknown.returncode == pytest.ExitCode.USAGE_ERROR
    assert "nothing is called 'no_such_name'" in unknown.stdout + unknown.stderr
