"""Every block of docs/course.md runs, and prints what stands under it."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from pyseg import cli

DOCS = Path(__file__).parents[3] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(not DOCS.is_dir(), reason="docs/ is not part of this distribution")
def test_the_course_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "course"}
    printed = ""
    for kind, text in BLOCK.findall((DOCS / "course.md").read_text()):
        if kind == "text":
            assert printed == text
        elif kind == "sh":
            for line in text.splitlines():
                command, *arguments = shlex.split(line)
                assert command == "pyseg"
                result = CliRunner().invoke(cli.app, arguments)
                assert result.exit_code == 0, f"{line}: {result.output}"
        else:
            assert kind == "python"
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(text, "course.md", "exec"), names)
            printed = output.getvalue()
    assert (tmp_path / "out" / "coins.png").is_file()
    for picture in tmp_path.glob("course_*.jpg"):
        kept = DOCS / picture.name
        assert Image.open(kept).size == Image.open(picture).size
        assert kept.stat().st_size < 60_000
