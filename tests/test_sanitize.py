"""The quick part of tests/sanitize.py; `make sanitize` does all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="outside the source tree")
@pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are preloaded, as on Linux")
@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_nothing_is_reported(kind):
    result = subprocess.run(
        [sys.executable, "tests/sanitize.py", kind, "--quick"],
        cwd=ROOT,
        env={**os.environ, "MAX_JOBS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:]
