"""PEP 517 backend: setuptools, building against the torch that is already installed.

Naming torch in ``[build-system].requires`` would make pip download another torch, of gigabytes,
into its isolated build environment. Instead this asks the interpreter itself, outside that
environment (``-I`` ignores the PYTHONPATH with which pip hides it), and requests torch only where
there is none.
"""

import subprocess
import sys

import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

# Without build isolation nobody else compares it with [build-system].requires, and an older one
# fails on pyproject.toml's license without saying that it is old.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"pyseg needs setuptools 77 or newer to build, got {setuptools.__version__}: "
        'python -m pip install -U "setuptools>=77"'
    )

FIND_TORCH = (
    "import importlib.util, os; spec = importlib.util.find_spec('torch'); "
    "print(os.path.dirname(os.path.dirname(spec.origin)) if spec and spec.origin else '')"
)


def _installed_torch():
    found = subprocess.run([sys.executable, "-I", "-c", FIND_TORCH], capture_output=True, text=True)
    return found.stdout.strip()


def get_requires_for_build_wheel(config_settings=None):
    return ["ninja", "numpy"] + ([] if _installed_torch() else ["torch>=2.10"])


def get_requires_for_build_editable(config_settings=None):
    return get_requires_for_build_wheel(config_settings)


def get_requires_for_build_sdist(config_settings=None):
    return get_requires_for_build_wheel(config_settings)


def _with_torch(function):
    def build(*arguments, **options):
        folder = _installed_torch()
        if folder and folder not in sys.path:
            sys.path.append(folder)  # last: the build environment's own packages come first
        return function(*arguments, **options)

    return build


build_wheel = _with_torch(build_meta.build_wheel)
build_editable = _with_torch(build_meta.build_editable)
build_sdist = _with_torch(build_meta.build_sdist)
prepare_metadata_for_build_wheel = _with_torch(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _with_torch(build_meta.prepare_metadata_for_build_editable)
