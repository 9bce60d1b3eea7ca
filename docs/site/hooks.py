"""What the site has beyond docs/*.md: mkdocs calls these functions by their names.

Pages of the repository that docs/ links to, notebooks as pages, a reference page for each public
module, formulas as MathML, and a line under each block that the tests do not run, with the reason.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = "repository"  # folder of the site for files of the repository that are not in docs/
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)((?:#[^)\s]*)?(?: \"[^\"]*\")?\))")
FENCED = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL
)
HIDDEN = re.compile(r"^<!-- (?:run|needs|by|until here)\b.*?-->\n", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"^<!-- (not run|slow|shortened): (.*?) -->\n", re.MULTILINE | re.DOTALL)

# Public modules, by the part of the menu that they stand in.
REFERENCE = {
    "Pipelines": ["pipeline", "types", "regions", "spec", "session", "video", "image", "visual"],
    "Verbs": [
        "prediction",
        "large",
        "evaluation",
        "scoring",
        "comparison",
        "training",
        "tuning",
        "cost",
        "export",
        "label_check",
        "data_check",
        "conversion",
        "report",
        "hub",
    ],
    "Parts": ["models", "refiners", "metrics", "datasets", "promptable", "fusion", "ops"],
    "Foundations": ["formats", "classes", "weights", "registry", "errors", "testing"],
}


def on_config(config):
    config.nav.append(
        {
            "Reference": [
                {part: [f"reference/{name}.md" for name in names]}
                for part, names in REFERENCE.items()
            ]
        }
    )
    return config


def on_files(files, config):
    for names in REFERENCE.values():
        for name in names:
            text = f"# pyseg.{name}\n\n{reference(name)}"
            files.append(File.generated(config, f"reference/{name}.md", content=text))
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        uri = f"notebooks/{notebook.stem}.md"
        files.append(File.generated(config, uri, content=notebook_page(notebook)))
    style = Path(__file__).with_name("style.css").read_text()
    files.append(File.generated(config, "style.css", content=style))
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting += ["CONTRIBUTING.md", "CHANGELOG.md"]
    seen = set()
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        if not page.startswith("docs/"):
            uri = f"{OUTSIDE}/{page}"
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / page)))
        if page.endswith(".md") and (ROOT / page).is_file():
            waiting += [
                target
                for _, link, _ in links((ROOT / page).read_text(encoding="utf-8"))
                if not (target := resolved(page, link)).startswith(("docs/", "../"))
                and (ROOT / target).is_file()
            ]
    return files


def links(text):
    """(before, target, after) of every relative link that is not in code."""
    return LINK.findall(FENCED.sub("", text))


def resolved(page, link):
    """The file of the repository that a link in a page of it means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    own = uri.removeprefix(f"{OUTSIDE}/") if uri.startswith(f"{OUTSIDE}/") else f"docs/{uri}"

    def rewritten(match):
        target = resolved(own, match[2])
        there = target[len("docs/") :] if target.startswith("docs/") else f"{OUTSIDE}/{target}"
        return f"{match[1]}{posixpath.relpath(there, posixpath.dirname(uri) or '.')}{match[3]}"

    # Code is passed over: what looks like a link there is none.
    parts, end = [], 0
    for code in FENCED.finditer(markdown):
        parts += [LINK.sub(rewritten, markdown[end : code.start()]), code[0]]
        end = code.end()
    markdown = "".join([*parts, LINK.sub(rewritten, markdown[end:])])
    markdown = MARK.sub(lambda match: note(match[1], match[2]), markdown)
    return HIDDEN.sub("", markdown)


def note(kind, text):
    kind = {
        "not run": "Not run by the tests",
        "slow": "Run by the slow tests",
        "shortened": "Run by the tests with",
    }[kind]
    return f'<p class="mark" markdown="1">{kind}: {" ".join(text.split())}</p>\n\n'


def on_page_content(content, **_):
    def formula(match):
        latex = html.unescape(match[2] or match[3]).replace(r"\arg\max", r"\mathrm{argmax}")
        made = convert(latex, display="inline" if match[1] == "span" else "block")
        if "\\" in made:
            raise ValueError(f"latex2mathml does not know a command of {latex}")
        return made

    return FORMULA.sub(formula, content)


def notebook_page(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    parts.insert(1, f"[Download the notebook]({path.name})")
    return "\n\n".join(parts) + "\n"


def reference(name):
    """A page of a module. An op has the name of its module, so those are taken one by one."""
    if name != "ops":
        return f"::: pyseg.{name}\n    options:\n      show_root_heading: false\n"
    modules = sorted(path.stem for path in (ROOT / "pyseg" / "ops").glob("[!_]*.py"))
    return "\n".join(f"::: pyseg.ops.{module}\n" for module in modules)
