"""docs/datasets.md says what the data sets say."""

from pathlib import Path

import pytest

import pyseg

DOCUMENT = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
NAMES = [name for name in pyseg.datasets.list() if hasattr(pyseg.datasets.get(name), "published")]


@pytest.mark.parametrize("name", NAMES)
def test_the_table_and_the_layouts(name):
    published = pyseg.datasets.get(name).published
    (row,) = (line for line in DOCUMENT.splitlines() if line.startswith(f"| `{name}` |"))
    _, _, counts, _, _, gives, terms, _ = (cell.strip() for cell in row.split("|"))
    assert counts == ", ".join(f"{key} {n:,}" for key, n in published.counts.items())
    assert gives == published.gives and terms == published.licence
    layout = f"### {published.title}\n\n`{name}`, from {published.page}\n\n"
    assert f"{layout}```\n{published.tree.strip()}\n```" in DOCUMENT


def test_no_other_data_set_is_listed():
    rows = [line for line in DOCUMENT.splitlines() if line.startswith("| `")]
    assert len(rows) == len(NAMES) == 19
