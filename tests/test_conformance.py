"""The suites of `pyseg.testing` over what pyseg ships, `check_op` over faults, and pytest's option.

Models: `tests/models/test_conformance.py`; data sets: `tests/datasets`; each plugin: its own tests.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import pyseg
from pyseg import ops, testing
from pyseg.ops.confusion_matrix import reference as matrix_reference
from pyseg.ops.upsample_argmax import reference as argmax_reference
from pyseg.ops.upsample_confusion import reference as confusion_reference

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


BOXES = torch.tensor([[0, 1.0, 2.0, 9.5, 8.0], [1, 0.0, 0.0, 11.0, 9.0]])
EXAMPLES = {
    "boundary_mask": ([(labels(2, 11, 13), 1), (labels(1, 1, 1), 2), (labels(0, 4, 4), 1)], None),
    "confusion_matrix": (
        [(labels(2, 9, 7), void(2, 9, 7), 3), (labels(1, 5, 3), labels(1, 5, 3, seed=1), 3)],
        matrix_reference,
    ),
    "upsample_argmax": (
        [(noise(2, 4, 5, 7), (17, 23)), (noise(1, 3, 9, 8), (4, 4))],
        lambda logits, size: argmax_reference(logits, size).to(torch.uint8),
    ),
    "upsample_confusion": (
        [(noise(2, 3, 5, 4), void(2, 13, 9))],
        lambda logits, target: confusion_reference(logits, target),
    ),
    "deform_conv2d": (
        [(noise(1, 4, 8, 9), 0.5 * noise(1, 18, 6, 7, seed=1), noise(6, 4, 3, 3, seed=2))],
        None,
    ),
    "roi_align": ([(noise(2, 3, 9, 12), BOXES, (3, 2), 1.0, 2)], None),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_ops(name):
    examples, reference = EXAMPLES[name]
    op = getattr(ops, name)
    if name == "upsample_confusion":

        def matrix(*arguments):
            return ops.upsample_confusion(*arguments).matrix

        op = matrix
    testing.check_op(op, examples, reference)


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
