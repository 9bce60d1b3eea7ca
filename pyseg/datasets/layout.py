"""Where the files of a published data set are: `Published` facts, and `Root`, which finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from ..errors import LayoutError
from ..files import some

_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar")
LONG = {"train": "training", "val": "validation", "test": "testing"}
"""How some data sets call their splits."""
_SHOWN = 12  # entries of a folder that messages name


@dataclass(frozen=True)
class Published:
    """What is published about a data set; errors, ``pyseg data check`` and the docs show it."""

    title: str
    page: str  # where to get it
    tree: str  # its layout, one path a line, below the folder that is to be given as root
    gives: str = "semantic"  # what its samples hold
    licence: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)  # images of each split

    def count(self, split: str | None) -> int | None:
        """Images of a split, under its short or its long name; None where nobody says."""
        short = next((name for name, long in LONG.items() if long == split), split)
        return self.counts.get(split or "", self.counts.get(short or ""))


class Root:
    """The folder of a published data set; whatever is absent there is one `LayoutError`.

    Args:
        path: the folder.
        published: what it should hold.
        inside: folders below ``path`` that the data set may be in, such as the one that its
            archive makes; the first that is there is used.

    Raises:
        LayoutError: there is no such folder.
    """

    def __init__(self, path: str | Path, published: Published, inside: Sequence[str] = ()) -> None:
        self.path, self.published = Path(path), published
        self._met = False  # whether anything that was needed was there
        if not self.path.is_dir():
            self.fail(f"there is no folder {self.path}")
        self.path = next((p for name in inside if (p := self.path / name).is_dir()), self.path)

    def find(self, *names: str) -> Path | None:
        """The first of several files or folders that is there."""
        return next((path for name in names if (path := self.path / name).exists()), None)

    def need(self, *names: str) -> Path:
        """The first of several files or folders that is there.

        Raises:
            LayoutError: none is.
        """
        found = self.find(*names)
        if found is None:
            self.fail(f"there is no {' or '.join(names)}", names)
        self._met = True
        return found

    def files(self, folder: Path, *endings: str, deep: bool = False) -> dict[str, Path]:
        """The files of a folder by name without ending, sorted; with ``deep`` those below it, too.

        Raises:
            LayoutError: there are none, or two have one name.
        """
        found: dict[str, Path] = {}
        for path in sorted(folder.rglob("*") if deep else folder.iterdir()):
            ending = next((e for e in endings if path.name.lower().endswith(e.lower())), None)
            if ending is None or path.name.startswith("."):
                continue
            name = path.relative_to(folder).as_posix()[: -len(ending)]
            if name in found:
                self.fail(f"{found[name]} and {path.name} have one name; remove one of them")
            found[name] = path
        if not found:
            self.fail(f"{folder} holds no {' or '.join(f'*{e}' for e in endings)}")
        return found

    def listed(self, path: Path) -> list[str]:
        """The stems that a list of files names, in its order: the first word of each line.

        Raises:
            LayoutError: it cannot be read, or names nothing.
        """
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            self.fail(f"{path} cannot be read as text ({error})")
        stems = [Path(line.split()[0]).stem for line in lines if line.strip()]
        if not stems:
            self.fail(f"{path} names no image")
        return stems

    def pick(self, files: Mapping[str, Path], names: Sequence[str], what: str) -> list[Path]:
        """The files of these names.

        Raises:
            LayoutError: some are absent; ``what`` says of which kind they are.
        """
        if absent := [name for name in names if name not in files]:
            where = f" in {next(iter(files.values())).parent}" if files else ""
            self.fail(f"{len(absent)} of {len(names)} {what} are absent{where}: {some(absent)}")
        return [files[name] for name in names]

    def pairs(
        self,
        images: Mapping[str, Path],
        labels: Mapping[str, Path] | None,
        names: Sequence[str] | None = None,
    ) -> tuple[list[Path], list[Path]]:
        """Images and labels of one name, those of ``names``, or all, which must be the same ones.

        Without ``labels``, as of a split whose labels are not published, images alone.

        Raises:
            LayoutError: an image without labels, or labels without an image.
        """
        if names is None:
            names = list(dict.fromkeys((*images, *(labels or ()))))
        found = self.pick(images, names, "images")
        return found, [] if labels is None else self.pick(labels, names, "label files")

    def fail(self, problem: str, names: Sequence[str] = ()) -> NoReturn:
        """Raises a `LayoutError`: the problem, the expected tree, what is there, and the remedy."""
        facts, path = self.published, self.path
        tree = "\n".join(f"  {line}" for line in facts.tree.strip().splitlines())
        text = f"{facts.title}: {problem}.\nExpected below root:\n{tree}\n"
        if path.is_dir():
            entries = sorted(p.name + "/" * p.is_dir() for p in path.iterdir())
            more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
            text += f"Found in {path}: {', '.join(entries[:_SHOWN]) or 'nothing'}{more}.\n"
            if packed := [name for name in entries if name.endswith(_ARCHIVES)]:
                text += f"Unpack {some(packed)} there first.\n"
            if elsewhere := _elsewhere(path, names):
                text += f"It seems that root should be {elsewhere}.\n"
        if facts.counts:
            text += f"Splits: {', '.join(facts.counts)}. "
        error = LayoutError(f"{text}Get it from {facts.page}")
        error.absent = not self._met
        raise error


def _elsewhere(path: Path, names: Sequence[str]) -> Path | None:
    """The folder above or one below ``path``, if only one, that holds what was looked for."""
    folders = [*path.absolute().parents[:2], *(p for p in path.iterdir() if p.is_dir())]
    found = [folder for folder in folders if any((folder / name).exists() for name in names)]
    return found[0] if len(found) == 1 else None
