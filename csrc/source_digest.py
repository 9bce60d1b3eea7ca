"""The digest of what the libraries are compiled from. Each of them holds it as text, so that a
library that is older than the sources beside it can be told by looking at it."""

import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(rb"pyseg sources ([0-9a-f]{40})")


def digest() -> str:
    """40 hexadecimal digits, of setup.py and everything in csrc/."""
    found = hashlib.sha1()
    sources = (p for p in (ROOT / "csrc").rglob("*.*") if p.suffix != ".pyc")
    for path in sorted([ROOT / "setup.py", *sources]):
        content = path.read_bytes()
        found.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()


def unit() -> str:
    """C++ that puts the digest into a library, whatever its format and linker."""
    return (
        'extern "C" __attribute__((used, visibility("hidden"))) const char pyseg_sources[] =\n'
        f'    "pyseg sources {digest()}";\n'
    )


def built_from(library: bytes) -> "str | None":
    """The digest in a library, given its content."""
    found = MARK.search(library)
    return found[1].decode() if found else None
