"""Every page runs: code blocks in order, as a reader would run them; links lead somewhere.

Blocks of one page share a folder, with the files of `world` in it, and Python's names. A ``text``
block after one holds what it prints, an error included; ``…`` stands for anything. Comments above a
block, of which the site shows the reasons, say what is not run as it stands:

    <!-- not run: REASON -->                    the block is only compiled
    <!-- not run: `TEXT`: REASON -->            lines with TEXT in them are left out
    <!-- shortened: `TEXT` as `OTHER`, … -->    what the tests take in place of it
    <!-- slow: REASON -->                       `pytest -m slow` runs it, after the rest of its page
    <!-- run: … -->                             Python that readers need not see
    <!-- needs: MODULE, … -->                   of the page: without these it is skipped
"""

import ast
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import pyseg
from pyseg import cli
from pyseg.classes import CAMVID_CLASSES
from pyseg.contract import tomllib

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "plugins/*.md", "plugins/*/*.md", "pyseg/assets/*.md")
    for path in ROOT.glob(pattern)
)
MARK = re.compile(r"^<!-- (not run|shortened|slow|run|needs): ?(.*?)\s*-->$", re.DOTALL | re.M)
FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)
PART = re.compile(r"^`([^`]+)`: (.+)$", re.DOTALL)
PAIR = re.compile(r"`([^`]+)` as `([^`]*)`")
DATA = {"toml": tomllib.loads, "yaml": yaml.safe_load, "json": json.loads}


@dataclass
class Block:
    kind: str  # of the fence; "run" = hidden Python
    text: str
    line: int  # of its first line in the page, from 1
    skip: str = ""  # why it is not run
    without: list[str] = field(default_factory=list)  # lines with these are not run
    instead: list[tuple[str, str]] = field(default_factory=list)
    slow: bool = False
    printed: str | None = None  # the text block behind it

    def adapted(self):
        """The text as the tests run it."""
        text = self.text
        for old, new in self.instead:
            assert old in text, f"line {self.line}: no {old!r} to be shortened"
            text = text.replace(old, new)
        for part in self.without:
            kept = [line for line in logical_lines(text) if part not in line]
            assert len(kept) < len(logical_lines(text)), f"line {self.line}: no line has {part!r}"
            text = "\n".join(kept)
        return text


def logical_lines(text):
    return text.replace("\\\n", " ").splitlines()


def blocks_of(text):
    """The blocks of a page, in order, with what the comments above them say."""
    found, marks, end = [], [], 0
    tokens = sorted([*MARK.finditer(text), *FENCE.finditer(text)], key=lambda match: match.start())
    for token in tokens:
        if token.start() < end:
            continue  # within a block
        line = text.count("\n", 0, token.start()) + 2
        between, end = text[end : token.start()], token.end()
        if token.re is MARK:
            if token[1] == "run":
                found.append(Block("run", token[2] + "\n", line))
            elif token[1] != "needs":
                marks.append((token[1], token[2]))
            continue
        kind, body = token[2], token[3]
        if kind == "text" and found and not between.strip():
            assert not marks, f"line {line}: marks belong to the block above"
            found[-1].printed = body
            continue
        block = Block(kind, body, line)
        for mark, value in marks:
            part = PART.match(value)
            if mark == "not run" and part:
                block.without.append(part[1])
            elif mark == "not run":
                block.skip = value
            elif mark == "slow":
                block.slow = True
            else:
                block.instead += PAIR.findall(value)
                assert PAIR.search(value), f"line {line}: shortened what?"
        marks = []
        found.append(block)
    assert not marks, f"a mark without a block: {marks}"
    return found


def agrees(printed, expected):
    """``…`` stands for anything, and where there is one, spaces for any number of them."""
    if "…" not in expected:
        return printed == expected
    printed, expected = (re.sub(" +", " ", text) for text in (printed, expected))
    return re.fullmatch(re.escape(expected).replace("…", ".*?"), printed, re.DOTALL)


class Reader:
    """Runs blocks of a page as someone would who reads it."""

    def __init__(self, page):
        self.page = page
        self.names = {"__name__": "__page__"}

    def run(self, block):
        text = block.adapted()
        if block.kind in ("python", "run"):
            printed = self.python(text, block)
        elif block.kind == "sh":
            printed = self.shell(text, block)
        else:
            return
        if block.printed is not None:
            message = f"{self.page}:{block.line} prints\n{printed}instead of\n{block.printed}"
            assert agrees(printed, block.printed), message

    def python(self, text, block):
        expected = block.printed
        with contextlib.redirect_stdout(io.StringIO()) as output:
            try:
                tree = ast.parse(text)
                ast.increment_lineno(tree, block.line - 1)
                exec(compile(tree, self.page, "exec"), self.names)
            except Exception as error:
                told = f"{type(error).__name__}: {error}\n"
                # What is expected to fail says so: its text ends as a traceback does.
                if expected is None or not re.search(rf"^{type(error).__name__}: ", expected, re.M):
                    trace = "".join(traceback.format_exception(error))
                    pytest.fail(f"{self.page}:{block.line}: {trace}", pytrace=False)
                return output.getvalue() + told
        return output.getvalue()

    def shell(self, text, block):
        printed = ""
        for line in filter(str.strip, logical_lines(text)):
            commands = in_process(line)
            for words in [["bash", "-euc", line]] if commands is None else commands:
                failed, told = self.command(words)
                printed += told
                if failed and block.printed is None:
                    pytest.fail(f"{self.page}:{block.line}: {line}\n{told}", pytrace=False)
        return printed

    def command(self, words):
        """Whether it failed, and what it printed."""
        if words[0] == "pyseg":
            result = CliRunner(env={"COLUMNS": "100"}).invoke(cli.app, words[1:])
            told = result.output
            if result.exception and not isinstance(result.exception, SystemExit):
                told += "".join(traceback.format_exception(result.exception))
            return result.exit_code != 0, told
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            words,
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return done.returncode != 0, done.stdout


def in_process(line):
    """The commands of a line of a shell block, if all are pyseg's alone; else None."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|<>&")
    lexer.whitespace_split, lexer.commenters = True, "#"
    commands = [[]]
    for word in lexer:
        if word == ";":
            commands.append([])
        else:
            commands[-1].append(word)
    commands = [words for words in commands if words]
    plain = all(words[0] == "pyseg" for words in commands) and "$" not in line
    return commands if plain and not any({"|", ">", "<", "&"} & {*w} for w in commands) else None


def make_world(folder):
    """Writes what pages take to be there: photographs, a data set, in small."""
    street = Image.open(ROOT / "pyseg/assets/street.jpg")
    labels = Image.open(ROOT / "pyseg/assets/street_labels.png")
    labels.save(folder / "street_labels.png")
    street.save(folder / "street.jpg", quality=95)
    street.save(folder / "photo.jpg", quality=95)
    parts = [(x, y, x + 160, y + 120) for x in (40, 280) for y in (120, 200)]

    for name in ("city", "raster", "slide"):
        Image.new("RGB", (480, 360)).save(folder / f"{name}.tif")

    def crops(images, maps, kind, void):
        for path in (folder / images, folder / maps):
            path.mkdir(parents=True, exist_ok=True)
        for k, part in enumerate(parts):
            street.crop(part).save(folder / images / f"{k}.{kind}")
            values = np.array(labels.crop(part))
            values[values == 255] = void
            Image.fromarray(values).save(folder / maps / f"{k}.png")

    crops("photos", "truth", "jpg", 255)
    (folder / "truth" / "classes.txt").write_text("\n".join(CAMVID_CLASSES) + "\n")
    for split in ("train", "val"):
        crops(f"CamVid/{split}", f"CamVid/{split}annot", "png", 11)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture
def there(world, tmp_path, monkeypatch):
    """A copy of `world`, as the current folder; Python finds modules in it."""
    folder = tmp_path / "page"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for name in ("PYSEG_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    return folder


def absent(page):
    """Modules that a page needs and that are not here."""
    text = (ROOT / page).read_text(encoding="utf-8")
    needs = [value for mark, value in MARK.findall(text) if mark == "needs"]
    names = re.split(r",\s*", ", ".join(needs)) if needs else []
    return [name for name in names if importlib.util.find_spec(name) is None]


def run_page(page, slow):
    blocks = blocks_of((ROOT / page).read_text(encoding="utf-8"))
    if slow and not any(block.slow for block in blocks):
        pytest.skip("nothing slow on it")
    reader = Reader(page)
    for block in blocks:
        if block.kind == "python":
            compile(block.text, page, "exec")
        elif block.kind in DATA:
            DATA[block.kind](block.text)
        else:
            assert block.kind in ("", "sh", "text", "run"), f"{page}:{block.line}: {block.kind}?"
        if not block.skip and (slow or not block.slow):
            reader.run(block)


def having(mark, among):
    return [p for p in among if f"<!-- {mark}:" in (ROOT / p).read_text(encoding="utf-8")]


RUNNING = [page for page in PAGES if blocks_of((ROOT / page).read_text(encoding="utf-8"))]
OF_PLUGINS = having("needs", RUNNING)


@pytest.mark.parametrize("page", [page for page in RUNNING if page not in OF_PLUGINS])
def test_page(page, there):
    run_page(page, slow=False)
    check_pictures(page, there)


@pytest.mark.parametrize("page", OF_PLUGINS)
def test_page_of_a_plugin(page, there):
    """`make test` runs these with the plugins on the path."""
    if lacking := absent(page):
        pytest.skip(f"{page} needs {', '.join(lacking)}")
    run_page(page, slow=False)
    check_pictures(page, there)


def check_pictures(page, folder):
    """Those that a page's code makes and docs/ keeps, by `make docs-images`."""
    for picture in folder.glob("*.jpg"):
        kept = ROOT / "docs" / picture.name
        if kept.exists():
            assert Image.open(kept).size == Image.open(picture).size, f"make docs-images: {kept}"
            assert kept.stat().st_size < 150_000, kept


@pytest.mark.slow
@pytest.mark.parametrize("page", having("slow", RUNNING))
def test_slow_page(page, there):
    run_page(page, slow=True)


def prose(text):
    """A page without its code and comments."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(path):
    """Of the headings of a page, as GitHub makes them."""
    text = re.sub(
        r"<!--.*?-->", "", FENCE.sub("", path.read_text(encoding="utf-8")), flags=re.DOTALL
    )
    seen, found = {}, set()
    for title in re.findall(r"^#{1,6} (.+?)\s*$", text, re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        number = seen[slug] = seen.get(slug, -1) + 1
        found.add(f"{slug}-{number}" if number else slug)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", prose(path.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", target):
            assert target.startswith(("https://", "http://", "mailto:")), target
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{page}: there is no {target}"
        assert ROOT in there.parents, f"{page}: {target} is not in the repository"
        if anchor:
            assert there.suffix == ".md" and anchor in anchors(there), f"{page}: no {target}"


WITH_TABLES = sorted(
    {
        (page, script)
        for page in [*(ROOT / "docs").glob("*.md"), *(ROOT / "pyseg" / "assets").glob("*.md")]
        for script in re.findall(r"<!-- by (\S+): ", page.read_text(encoding="utf-8"))
    }
)


SHORTEST = {"benchmarks/table.py": 2}  # some ops have a single row


@pytest.mark.parametrize(("page", "script"), WITH_TABLES, ids=lambda path: Path(path).name)
def test_page_has_the_tables_of_the_stored_runs(monkeypatch, page, script):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module(Path(script).stem)
    tables = {name: list(lines) for name, lines in module.page_tables().items()}
    assert page == module.PAGE and tables
    assert min(map(len, tables.values())) > SHORTEST.get(script, 3)
    text = page.read_text(encoding="utf-8")
    assert module.pages.with_parts(text, script, tables) == text
    with pytest.raises(ValueError, match=": absent -->"):
        module.pages.with_parts(text, script, {"absent": []})


@pytest.mark.parametrize(
    "weights", sorted((ROOT / "pyseg" / "assets").glob("*.safetensors")), ids=lambda path: path.name
)
def test_card_names_the_digest_of_its_weights(weights):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"SHA-256 `{digest}`" in weights.with_suffix(".md").read_text(encoding="utf-8")


def test_every_op_and_metric_has_its_part():
    ops = {path.parent.name for path in (ROOT / "csrc").glob("*/*.cpp")} - {"common"}
    parts = anchors(ROOT / "docs" / "ops.md")
    assert ops and ops <= parts, ops - parts
    assert set(pyseg.metrics.list()) <= anchors(ROOT / "docs" / "metrics.md")


def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("the site needs mkdocs-material: pip install 'pyseg-toolkit[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q"]
    command += ["-f", ROOT / "docs/site/mkdocs.yml", "-d", tmp_path / "site"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert pages >= {Path(page).stem for page in PAGES if page.startswith("docs/")}
    page = (tmp_path / "site" / "ops.html").read_text(encoding="utf-8")
    assert "<math" in page and "arithmatex" not in page
    text = (tmp_path / "site" / "reference" / "ops.html").read_text(encoding="utf-8")
    for op in pyseg.ops.__all__:
        assert re.search(rf'id="pyseg\.ops\.\w+\.{op}"', text), op
    sources = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', page)
    assert sources == [], "a page fetches from another server"


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_its_results(path, there):
    nbclient = pytest.importorskip("nbclient", reason="notebooks need nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="notebooks need nbclient and ipykernel")
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "clear its outputs"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": "."}}).execute()
    shown = {kind for cell in cells for out in cell.outputs for kind in out.get("data", {})}
    text = json.dumps([cell.outputs for cell in cells])
    wanted = {
        "quick_start": ("image/png", "<caption>Pipeline"),
        "compare": ("text/html", "<progress", "<table"),
        "correct": ("image/png", "Pipeline"),
    }
    kind, *parts = wanted[path.stem]
    assert kind in shown and all(part in text for part in parts)
    told = [out.text for cell in cells for out in cell.outputs if out.get("name") == "stderr"]
    # tqdm, of packages below us, misses its widgets; our bars need none.
    assert not [text for text in told if "TqdmWarning" not in text]


def test_there_are_three_notebooks():
    assert len(NOTEBOOKS) == 3
