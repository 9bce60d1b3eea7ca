"""Progress in notebooks: a bar of HTML, which needs no widgets. Elsewhere nothing is shown.

On a terminal the command line shows a bar of its own.
"""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
_EVERY = 0.2  # seconds between two pictures of a bar


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


class NotebookBar:
    """A bar below a notebook's cell.

    Args:
        what: text before it.
        total: steps in all.
        done: steps that are done already.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        from IPython.display import HTML, display

        self.what, self.total, self.first, self.done = what, total, done, done
        self.html, self.note = HTML, ""
        self.start = self.told = time.monotonic()
        self.handle = display(HTML(self.text()), display_id=True)

    def text(self) -> str:
        """The bar as HTML."""
        seconds, steps = time.monotonic() - self.start, self.done - self.first
        times = f"{seconds:.0f} s"
        if steps > 0 and self.done < self.total:
            times += f", {seconds / steps * (self.total - self.done):.0f} s left"
        words = ", ".join(filter(None, [f"{self.done} of {self.total}", self.note, times]))
        return (
            f"<div>{html.escape(self.what)} "
            f'<progress value="{self.done}" max="{max(self.total, 1)}"></progress> '
            f"{html.escape(words)}</div>"
        )

    def advance(self, note: str = "") -> None:
        """One step more; ``note`` is shown beside their number."""
        self.done += 1
        self.note = note or self.note
        if time.monotonic() - self.told >= _EVERY or self.done == self.total:
            self.show()

    def show(self) -> None:
        """Draws it anew."""
        self.told = time.monotonic()
        self.handle.update(self.html(self.text()))


def notebook_bar(items: Sequence[T]) -> Iterable[T]:
    """The default of ``track=`` everywhere: a bar in a notebook, else nothing.

    Args:
        items: what is gone through.
    """
    if not in_notebook():
        return items
    return _tracked(items)


def _tracked(items: Sequence[T]) -> Iterator[T]:
    bar = NotebookBar("", len(items))
    try:
        for item in items:
            yield item
            bar.advance()
    finally:
        bar.show()
