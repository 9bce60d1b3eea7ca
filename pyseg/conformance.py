"""``pytest --pyseg-conformance NAME``: the suite of `pyseg.testing` for a name, as a pytest plugin.

NAME is what a spec would say, with options: ``crf``, ``"my_model(channels=8)"``,
``"my_dataset(root='/data')"``; or a distribution, whose every name is checked. Meanwhile no plugin
but the one that provides NAME can be found, so that nothing else makes it pass, and names that the
next API version drops are faults. pytest loads this module always, so it imports next to nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .registry import Registry


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("pyseg").addoption(
        "--pyseg-conformance",
        action="append",
        default=[],
        metavar="NAME",
        help="check what is registered as NAME, which may have options as in a spec, or all that "
        "the distribution NAME provides; may be given several times",
    )


def pytest_configure(config: pytest.Config) -> None:
    given = config.args_source is config.ArgsSource.ARGS
    if config.getoption("pyseg_conformance") and not given:
        config.args = []  # files that nobody named are not collected


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    for text in config.getoption("pyseg_conformance"):
        found = list(_entries(text))
        if not found:
            raise pytest.UsageError(
                f"--pyseg-conformance: nothing is called {text!r}, and no installed distribution "
                "that provides anything; `pyseg list` shows the names"
            )
        for kind, spec, owner in found:
            items.append(
                ConformanceItem.from_parent(
                    session, name=f"{kind} {spec}", kind=kind, spec=spec, owner=owner
                )
            )


def _entries(text: str) -> Iterator[tuple[str, str, str]]:
    """(kind, spec, distribution) of what a text names."""
    from .doctor import registries
    from .errors import SpecError
    from .registry import commands

    every: list[tuple[Registry[Any], Any]] = [
        (registry, info)
        for registry in (*registries().values(), commands)
        for info in registry.entries()
    ]
    for registry, info in every:
        if info.distribution.replace("_", "-").lower() == text.replace("_", "-").lower():
            yield registry.kind, info.name, info.distribution
            continue
        if registry is commands:  # whose names are those of a shell
            if info.name == text:
                yield registry.kind, text, info.distribution
            continue
        try:
            name = registry.parse(text).name
        except SpecError:  # a distribution's name need not be one of a stage
            continue
        if info.name in (name, name.rpartition(":")[2]):
            yield registry.kind, text, info.distribution


class ConformanceItem(pytest.Item):
    """The suite of one name."""

    def __init__(self, *, kind: str, spec: str, owner: str, **others: Any) -> None:
        super().__init__(**others)
        self.kind, self.spec, self.owner = kind, spec, owner

    def runtest(self) -> None:
        from .doctor import DISTRIBUTION, registries
        from .errors import DeprecatedApi
        from .registry import only_from
        from .testing import SUITES, check_command

        with only_from(DISTRIBUTION, self.owner), warnings.catch_warnings():
            warnings.simplefilter("error", DeprecatedApi)
            if self.kind == "command":
                check_command(self.spec)
                return
            registry = next(r for r in registries().values() if r.kind == self.kind)
            stage = registry.parse(self.spec)
            SUITES[self.kind](stage.name, **stage.options)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if excinfo.errisinstance(AssertionError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return "pyseg-conformance", None, self.name
