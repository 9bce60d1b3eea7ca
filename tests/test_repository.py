"""The house rules that a machine can see."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(
    {path.parent.name for path in (ROOT / "csrc").glob("*/*.*")} - {"common", "__pycache__"}
)


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_places(op):
    """One stem per op: the way from any of its files to the others needs no search."""
    for place in (
        f"csrc/{op}/{op}.h",
        f"csrc/{op}/{op}.cpp",
        f"pyseg/ops/{op}.py",
        f"tests/ops/test_{op}.py",
        f"benchmarks/{op}.py",
    ):
        assert (ROOT / place).is_file(), f"op {op} lacks {place}"
    fuzzed = "".join(p.read_text() for p in (ROOT / "tests" / "fuzz").glob("*.py"))
    assert f"\ndef {op}(draw: Draw)" in fuzzed, f"op {op} has no case in tests/fuzz/"
    rows = re.findall(rf"^\| `{op}` \|.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 1, f"README's op table needs one row that starts with | `{op}` |"
    _, _, _, cuda, *_ = rows[0].split("|")
    absent = cuda.strip() == "not yet" or cuda.strip().startswith("none: ")
    assert (ROOT / f"csrc/{op}/{op}.cu").is_file() == (not absent), rows[0]


def test_installed_entry_points_are_those_of_pyproject():
    """An install older than pyproject hides new entry points; `make` reinstalls."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group, wanted in project["entry-points"].items():
        found = {
            point.name: point.value
            for point in importlib.metadata.entry_points(group=group)
            if point.dist and point.dist.name == "pyseg-toolkit"
        }
        assert found == wanted, f"reinstall: entry points of {group} differ"
    version = re.search(r'__version__ = "(.+)"', (ROOT / "pyseg/__init__.py").read_text())[1]
    assert version == project["version"]


def test_the_formatter_is_not_switched_off():
    """What it makes of a line is seldom so bad; a table is better kept in a file or a string."""
    switch = re.compile(r"#\s*fmt:\s*(skip|off)")
    for folder in ("pyseg", "tests", "benchmarks", "plugins", "csrc"):
        for path in (ROOT / folder).rglob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not switch.search(line), f"{path.relative_to(ROOT)}:{number}"


def test_no_file_of_the_repository_is_generated_or_large():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    large = [str(p) for p in files if p.is_file() and p.stat().st_size > 8_000_000]
    generated = [str(p) for p in files if p.suffix in (".so", ".o", ".pyc")]
    assert not large and not generated
