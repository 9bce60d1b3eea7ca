#!/usr/bin/env bash
# What users get: the wheel of `make wheel` holds what it should and no more, installs into a bare
# environment where nothing can compile, and does the main job there.
# Usage: tests/wheel_check.sh [wheel]    PYTHON (default .venv/bin/python) has its dependencies: they
# are linked into the environment, all but pyseg itself, so that nothing is downloaded twice.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
wheel=${1:-$(ls -t "$root"/dist/pyseg_toolkit-*.whl 2>/dev/null | head -n 1 || true)}
[ -f "$wheel" ] || { echo "no wheel in dist/: make wheel"; exit 1; }
wheel=$(realpath "$wheel")
echo "== $wheel"
work=$(mktemp -d)
trap "$(command -v rm) -rf '$work'" EXIT

"$python" - "$wheel" "$root" <<'PY'
import re, sys, zipfile
from pathlib import Path

wheel, root = map(Path, sys.argv[1:])
sys.path.insert(0, str(root / "csrc"))
import source_digest

assert re.fullmatch(r"pyseg_toolkit-[\d.]+-cp310-abi3-manylinux_\d+_\d+_\w+\.whl", wheel.name), (
    f"{wheel.name}: not one wheel for every Python, of a stated glibc"
)
with zipfile.ZipFile(wheel) as archive:
    names = {name for name in archive.namelist() if not name.endswith("/")}
    libraries = {name: archive.read(name) for name in names if name.endswith(".so")}
    metadata = next(archive.read(n).decode() for n in names if n.endswith(".dist-info/METADATA"))
    entries = next(archive.read(n).decode() for n in names if n.endswith("entry_points.txt"))
info = {name for name in names if ".dist-info/" in name}
sources = {
    path.relative_to(root).as_posix()
    for path in (root / "pyseg").rglob("*")
    if path.is_file() and path.suffix not in (".pyc", ".so")
}
packed = names - info - set(libraries)
assert packed == sources, f"absent: {sources - packed}; not in pyseg/: {packed - sources}"
assert {name.rsplit("/", 1)[1] for name in info} >= {"LICENSE", "LICENSE-CamVid.md", "RECORD"}
assert "pyseg = pyseg.cli:main" in entries and "[pyseg.models]" in entries
assert "Requires-Dist: torch>=2.10" in metadata and "Requires-Python: >=3.10" in metadata
assert "pyseg/_C.abi3.so" in libraries and set(libraries) <= {
    "pyseg/_C.abi3.so", "pyseg/_C_cu12.abi3.so", "pyseg/_C_cu13.abi3.so"
}, libraries.keys()
for name, content in libraries.items():
    assert source_digest.built_from(content) == source_digest.digest(), f"{name} is stale"
    assert str(root).encode() not in content, f"{name} names the folder where it was built"
    print(f"{name}: {len(content) / 1e6:.1f} MB")
print(f"{len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB; no tests, no sources of kernels")
PY

"$python" -m venv --without-pip "$work/bare"
"$python" - "$work" <<'PY'
import sys, sysconfig
from pathlib import Path

work = Path(sys.argv[1])
(work / "packages").mkdir()
for path in Path(sysconfig.get_path("purelib")).iterdir():
    name = path.name.lower()
    if "pyseg" not in name and not name.endswith(".pth"):
        (work / "packages" / path.name).symlink_to(path)
(site,) = (work / "bare" / "lib").glob("python*/site-packages")
(site / "dependencies.pth").write_text(f"{work / 'packages'}\n")
PY

cd "$work"
# No compiler, no ninja, no nvcc: whatever wants to compile fails.
unset PYTHONPATH CUDA_HOME CUDA_PATH CC CXX
export PATH=$work/bare/bin
python -c "
import shutil
found = [name for name in ('cc', 'c++', 'gcc', 'g++', 'clang', 'nvcc', 'ninja', 'make') if shutil.which(name)]
assert not found, found"
echo "== install"
python -m pip install -q --no-index --only-binary :all: "$wheel"
python - "$work" <<'PY'
import sys
from pathlib import Path

import torch

import pyseg
from pyseg import _native
from pyseg.demo import ASSETS
from pyseg.image import read_image, read_labels

bare = Path(sys.argv[1]) / "bare"
status = _native.status()
for path in (pyseg.__file__, status["cpu"]):
    assert Path(path).is_relative_to(bare), path
built = [*Path(status["cpu"]).parent.glob("_C_cu*")]
if built and torch.version.cuda and f"_C_cu{torch.version.cuda.split('.')[0]}" in built[0].name:
    assert status["cuda"], status["cuda_problem"]  # loads without a device
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, {status['simd']}")

image, truth = read_image(ASSETS / "street.jpg"), read_labels(ASSETS / "street_labels.png")
for spec in ("streetnet", "streetnet+crf"):
    labels = pyseg.build(spec)(image).labels
    known = truth < 11
    correct = (labels[known] == truth[known]).double().mean().item()
    print(f"{spec}: {correct:.1%} of the pixels of the street image are right")
    assert correct > 0.85, correct
PY
echo "== pyseg demo"
pyseg demo --output "$work/demo"
for file in comparison.png overlay.png scores.json; do
  [ -s "$work/demo/$file" ] || { echo "pyseg demo wrote no $file"; exit 1; }
done
echo "wheel check: all well"
