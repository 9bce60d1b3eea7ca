"""The tables that benchmarks write into pages of docs/ and into cards of weights, and the weights.

A table stands between two comments, ``<!-- by benchmarks/sam.py: score -->`` and
``<!-- until here -->``. A benchmark's ``page_tables()`` gives its tables from the
stored run, by their names, and a test compares them with its ``PAGE``.
"""

import hashlib
import re

from pyseg.files import write_text
from pyseg.weights import save_state

PART = re.compile(r"(<!-- by (\S+): (\w+) -->\n)(.*?)(<!-- until here -->)", re.DOTALL)


def parts(text, script):
    """What ``script``, such as ``benchmarks/sam.py``, has written into a page, by name."""
    return {name: body for _, by, name, body, _ in PART.findall(text) if by == script}


def with_parts(text, script, tables):
    """A page's ``text`` with ``tables``, the Markdown lines of each by its name.

    Raises:
        ValueError: the page has no place for one.
    """
    if absent := set(tables) - set(parts(text, script)):
        raise ValueError(f"the page has no '<!-- by {script}: {min(absent)} -->'")

    def filled(match):
        if match[2] != script or match[3] not in tables:
            return match[0]
        return "\n".join([match[1].rstrip(), *tables[match[3]], match[5]])

    return PART.sub(filled, text)


def write_parts(page, script, tables):
    """Puts ``tables`` into the file ``page``."""
    write_text(page, with_parts(page.read_text(encoding="utf-8"), script, tables))


def bundle_weights(path, state, metadata=None):
    """Stores a state dict in half precision as ``path``, and its digest in the card beside it."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_state(path, state, metadata=metadata)
    digest, card = hashlib.sha256(path.read_bytes()).hexdigest(), path.with_suffix(".md")
    text = card.read_text(encoding="utf-8")
    write_text(card, re.sub(r"SHA-256 `\w+`", f"SHA-256 `{digest}`", text, count=1))
    print(path, path.stat().st_size, digest)
