"""What many test files share."""

import os
from pathlib import Path

import pytest
import torch

DATA = Path(
    os.environ.get("PYSEG_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)


@pytest.fixture(scope="session")
def data_folder():
    """``data_folder("camvid/val")``: that part of the test data; without it the test is skipped."""

    def find(name):
        if not (DATA / name).is_dir():
            pytest.skip(f"no test data at {DATA / name}: set PYSEG_TEST_DATA")
        return DATA / name

    return find


@pytest.fixture
def one_thread():
    """For inputs so small that threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
