"""The digest of what the libraries are compiled from. The linker writes it into them as their build
id, so that a library that is older than the sources beside it can be told by looking at it."""

import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# An ELF note: lengths of name and content, type 3, the name, then the build id.
NOTE = re.compile(rb"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0(.{20})", re.DOTALL)


def digest() -> str:
    """40 hexadecimal digits, of setup.py and everything in csrc/."""
    found = hashlib.sha1()
    sources = (p for p in (ROOT / "csrc").rglob("*.*") if p.suffix != ".pyc")
    for path in sorted([ROOT / "setup.py", *sources]):
        content = path.read_bytes()
        found.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()


def built_from(library: bytes) -> "str | None":
    """The build id of a library, given its content."""
    note = NOTE.search(library)
    return note[1].hex() if note else None
