"""Writes what plugins may rely on, ``tests/stable_api.json``: names, parameters, fields, members.

``python tests/stable_api.py`` after a new minor `pyseg.API_VERSION`; `test_stable_api.py` holds the
code against the file.
"""

import dataclasses
import inspect
import json
from pathlib import Path

from pyseg import contract, errors, registry, testing, types
from pyseg.models import SemanticModel, semantic_model, wrap
from pyseg.promptable import Prompts

FILE = Path(__file__).with_suffix(".json")
FUNCTIONS = {
    "pyseg.models.semantic_model": semantic_model,
    "pyseg.models.wrap": wrap,
    "pyseg.models.SemanticModel": SemanticModel,
    "pyseg.promptable.Prompts": Prompts,
    **{f"pyseg.testing.{suite.__name__}": suite for suite in testing.SUITES.values()},
}
RECORDS = ("Segmentation", "Sample", "Segments", "Segment", "Instances")


def stable():
    """JSON-ready: what a plugin may rely on."""
    parameters = {
        name: [
            [p.name, p.kind.name, p.default is p.empty]
            for p in inspect.signature(function).parameters.values()
        ]
        for name, function in FUNCTIONS.items()
    }
    fields = {
        name: [
            field.name
            for field in dataclasses.fields(getattr(types, name))
            if not field.name.startswith("_")
        ]
        for name in RECORDS
    }
    known = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, (Exception, Warning))
    ]
    return {
        "api": contract.API_VERSION,
        "groups": contract.GROUPS,
        "members": {kind: list(names) for kind, names in registry.MEMBERS.items()},
        "parameters": parameters,
        "fields": fields,
        "errors": sorted(known),
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(stable(), indent=1) + "\n")
