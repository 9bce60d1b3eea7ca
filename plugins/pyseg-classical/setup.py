"""Builds the compiled half; all else is in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
core = Pybind11Extension(
    "pyseg_classical._core", SOURCES, cxx_std=17, extra_compile_args=["-O3", "-ffp-contract=off"]
)
core.depends = ["csrc/core.h"]

ParallelCompile(default=2).install()
setup(ext_modules=[core])
