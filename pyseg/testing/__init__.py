"""Conformance suites: what pyseg expects of a plugin of each kind.

For built-ins and plugins alike, in any test runner: a suite returns nothing, or raises an
``AssertionError`` that names the part and what is wrong with it.
``pytest --pyseg-conformance NAME`` runs that of a name, with no other plugin in sight.

Example:
    >>> from pyseg import testing
    >>> def test_conformance():
    ...     testing.check_model("my_network", channels=16)
"""

from collections.abc import Callable

from ..errors import PysegError
from .commands import check_command
from .families import check_dataset, check_metric, check_model, check_refiner
from .ops import check_op
from .promptables import check_promptable

SUITES: dict[str, Callable[..., None]] = {
    "model": check_model,
    "refiner": check_refiner,
    "metric": check_metric,
    "dataset": check_dataset,
    "promptable": check_promptable,
    "op": check_op,
}
"""Kind -> its suite."""

__all__ = [
    "SUITES",
    "PysegError",
    "check_command",
    "check_dataset",
    "check_metric",
    "check_model",
    "check_op",
    "check_promptable",
    "check_refiner",
]
