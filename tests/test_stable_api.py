"""What plugins rely on is there: the interface only grows until the major version changes."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import stable_api

RECORDED = json.loads(stable_api.FILE.read_text())


@pytest.fixture(scope="module")
def now():
    return stable_api.stable()


def test_it_is_of_this_version(now):
    assert RECORDED["api"] == now["api"], "python tests/stable_api.py, in the same commit"


def test_no_group_error_field_or_function_went(now):
    assert RECORDED["groups"].items() <= now["groups"].items()
    assert {*RECORDED["errors"]} <= {*now["errors"]}
    assert RECORDED["parameters"].keys() <= now["parameters"].keys()
    for name, fields in RECORDED["fields"].items():
        assert now["fields"][name][: len(fields)] == fields, name


def test_no_more_is_asked_of_plugins(now):
    assert now["members"] == RECORDED["members"]


def test_calls_that_were_right_are_right(now):
    for name, recorded in RECORDED["parameters"].items():
        found = {each[0]: each for each in now["parameters"][name]}
        for parameter, kind, required in recorded:
            assert parameter in found, f"{name} lost {parameter}"
            assert found[parameter][1] == kind, f"{name}: {parameter} is given in another way"
            assert required or not found[parameter][2], f"{name} now requires {parameter}"
        new = found.keys() - {each[0] for each in recorded}
        assert not any(found[parameter][2] for parameter in new), f"{name} requires more"
