#!/usr/bin/env bash
# What users get: each wheel and the sdist of `make release` hold what they should and no more,
# install into a bare environment, the wheels where nothing can compile, and do the main job there.
# Usage: tests/release_check.sh [FILE…]   PYTHON (default .venv/bin/python) has the dependencies: they
# are linked into each environment, all but pyseg itself, so that nothing is downloaded twice.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ $# -gt 0 ] || set -- "$root"/dist/pyseg_toolkit-*.whl "$root"/dist/pyseg_toolkit-*.tar.gz
for file; do
  [ -f "$file" ] || { echo "there is no $file: make release"; exit 1; }
done
# The compilers' folders, for the sdist alone; ninja comes from PyPI.
compilers=$(dirname "$("$python" -c 'import shutil, sys, os
print(shutil.which("ninja", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]))')"):/usr/bin:/bin
work=$(mktemp -d)
trap "$(command -v rm) -rf '$work'" EXIT

holds_what_it_should() {
  "$python" - "$1" "$root" <<'PY'
import re, sys, tarfile, zipfile
from pathlib import Path

file, root = map(Path, sys.argv[1:])
sys.path.insert(0, str(root / "csrc"))
import source_digest

wheel = file.suffix == ".whl"
if wheel:
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}
else:
    with tarfile.open(file) as archive:
        content = {m.name.partition("/")[2]: archive.extractfile(m).read() for m in archive if m.isfile()}
        content = {name: found for name, found in content.items() if ".egg-info/" not in name}
libraries = {name: found for name, found in content.items() if re.search(r"\.(so|dylib|pyd)$", name)}
info = {name for name in content if ".dist-info/" in name}
sources = {
    path.relative_to(root).as_posix()
    for folder in ("pyseg",) if wheel else ("pyseg", "csrc")
    for path in (root / folder).rglob("*")
    if path.is_file() and path.suffix not in (".pyc", ".so")
}
if not wheel:
    sources |= {"pyproject.toml", "setup.py", "setup.cfg", "README.md", "LICENSE", "PKG-INFO"}
packed = set(content) - info - set(libraries)
assert packed == sources, f"absent: {sources - packed}; not in the sources: {packed - sources}"
if wheel:
    system = r"(manylinux_\d+_\d+_\w+|macosx_\d+_\d+_\w+)"
    found = re.fullmatch(rf"pyseg_toolkit-([\d.]+)(\+cu\d+)?-cp310-abi3-{system}\.whl", file.name)
    assert found, f"{file.name}: not one wheel for every Python, of a stated system"
    version, label, _ = found.groups()
    metadata, entries = (
        next(content[name].decode() for name in info if name.endswith(f"/{end}"))
        for end in ("METADATA", "entry_points.txt")
    )
    assert {name.rsplit("/", 1)[1] for name in info} >= {"LICENSE", "LICENSE-CamVid.md", "RECORD"}
    assert "pyseg = pyseg.cli:main" in entries and "[pyseg.models]" in entries
    assert "Requires-Dist: torch>=2.10" in metadata and "Requires-Python: >=3.10" in metadata
    assert f"\nVersion: {version}{label or ''}\n" in metadata
    wanted = {"pyseg/_C.abi3.so"} | ({f"pyseg/_C_{label[1:]}.abi3.so"} if label else set())
    assert set(libraries) == wanted, f"{file.name} holds {sorted(libraries)}"
else:
    assert re.fullmatch(r"pyseg_toolkit-[\d.]+\.tar\.gz", file.name) and not libraries, file.name
for name, found in libraries.items():
    assert source_digest.built_from(found) == source_digest.digest(), f"{name} is stale"
    assert str(root).encode() not in found, f"{name} names the folder where it was built"
    print(f"{name}: {len(found) / 1e6:.1f} MB")
print(f"{len(content)} files, {file.stat().st_size / 1e6:.1f} MB")
PY
}

make_bare() {  # an environment of the dependencies alone
  "$python" -m venv --without-pip "$1"
  "$python" - "$1" <<'PY'
import site, sys
from pathlib import Path

bare = Path(sys.argv[1])
packages = bare / "packages"
packages.mkdir()
for folder in map(Path, site.getsitepackages()):
    for path in folder.iterdir():
        name = path.name.lower()
        if "pyseg" not in name and not name.endswith(".pth") and not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)
(found,) = (bare / "lib").glob("python*/site-packages")
(found / "dependencies.pth").write_text(f"{packages}\n")
PY
}

does_the_main_job() {  # in the environment that PATH begins with
  python - "$1" <<'PY'
import sys
from pathlib import Path

import torch

import pyseg
from pyseg import _native
from pyseg.demo import ASSETS
from pyseg.image import read_image, read_labels

bare = Path(sys.argv[1])
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
  pyseg demo --output "$1/demo" >/dev/null
  for file in comparison.png overlay.png scores.json; do
    [ -s "$1/demo/$file" ] || { echo "pyseg demo wrote no $file"; exit 1; }
  done
}

unset PYTHONPATH CUDA_HOME CUDA_PATH CC CXX
for file; do
  file=$(realpath "$file")
  begun=$SECONDS
  echo "== $file"
  holds_what_it_should "$file"
  bare=$work/$(basename "$file")
  make_bare "$bare"
  (
    cd "$work"
    install=(python -m pip install -q --no-index)
    if [[ $file == *.whl ]]; then
      export PATH=$bare/bin
      python -c "
import shutil
found = [name for name in ('cc', 'c++', 'gcc', 'g++', 'clang', 'nvcc', 'ninja', 'make') if shutil.which(name)]
assert not found, found"
      "${install[@]}" --only-binary :all: "$file"
    else
      export PATH=$bare/bin:$compilers
      PYSEG_CUDA=0 "${install[@]}" --no-build-isolation "$file"
      export PATH=$bare/bin
    fi
    does_the_main_job "$bare"
  )
  echo "== all well, $((SECONDS - begun)) s"
done
