#!/usr/bin/env bash
# The CPU library for systems that this one is not: every source is compiled without a warning, and
# linked; the one for aarch64 Linux is run, too.
#
#   tests/cross_check.sh [macos] [aarch64] [fuzz]     all by default
#   macos    arm64, by zig's clang, which brings macOS's headers: pip install ziglang
#   aarch64  Linux, by apt's g++-aarch64-linux-gnu, against the oldest torch that is supported
#   fuzz     qemu-aarch64 (apt's qemu-user) runs that library against the references of all ops, in
#            Debian's Python for aarch64: CASES=200 random calls
#
# PYTHON (default .venv/bin/python) has torch, whose headers are the same on all systems. What is
# downloaded, some 220 MB, stays in build/cross/.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
work=$root/build/cross
oldest=torch==2.10.0  # and torchvision 0.25.0
mkdir -p "$work"
cd "$root"
[ $# -gt 0 ] || set -- macos aarch64 fuzz

build() {  # build NAME PLATFORM COMPILER LDFLAGS
  echo "== $1: $3"
  env CXX="$3" LDFLAGS="$4" CXXFLAGS="-Wall -Werror" PYSEG_CUDA=0 _PYTHON_HOST_PLATFORM="$2" \
    PYSEG_BUILD_DIR="$work/$1/native" "$python" setup.py -q build_ext --build-lib "$work/$1/python"
  file -b "$work/$1/python/pyseg/_C.abi3.so"
}

wheels() {  # wheels FOLDER PACKAGE…: for aarch64 Linux, unpacked
  "$python" -m pip download -q --no-deps -d "$work/wheels" --only-binary :all: \
    --python-version "$release" --platform manylinux_2_28_aarch64 \
    --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 "${@:2}"
  for wheel in "$work"/wheels/*.whl; do
    "$python" -m zipfile -e "$wheel" "$1"
    rm "$wheel"
  done
}

debian_python() {  # debian_python FOLDER: Debian's Python for aarch64 with the libraries it needs
  local apt=$work/apt
  mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/state"
  touch "$apt/state/status"
  cat >"$apt/conf" <<CONF
APT::Architecture "arm64";
APT::Architectures {"arm64";};
Dir::State "$apt/state";
Dir::State::lists "$apt/lists";
Dir::State::status "$apt/state/status";
Dir::Cache "$apt/cache";
CONF
  APT_CONFIG=$apt/conf apt-get update -qq
  APT_CONFIG=$apt/conf apt-get install -qq -y --no-install-recommends --download-only \
    "python$release-minimal" "libpython$release-stdlib" libstdc++6 libgomp1
  for package in "$apt"/cache/archives/*.deb; do dpkg -x "$package" "$1"; done
  rm -r "$apt"
}

aarch64_torch() {
  # The release of Python that apt has, which is the one that qemu runs.
  release=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo 3.11)
  [ -d "$work/packages/torch" ] || wheels "$work/packages" "$oldest"
}

for part; do
  case $part in
    macos)
      "$python" -m ziglang version >/dev/null || { echo "no zig here: pip install ziglang"; exit 1; }
      printf '#!/bin/sh\nexec "%s" -m ziglang c++ -target aarch64-macos.11.0 "$@"\n' "$python" >"$work/zig-c++"
      chmod +x "$work/zig-c++"
      build macos macosx-11.0-arm64 "$work/zig-c++" ""
      ;;
    aarch64)
      aarch64_torch
      build aarch64 linux-aarch64 aarch64-linux-gnu-g++ "-L$work/packages/torch/lib"
      ;;
    fuzz)
      aarch64_torch
      [ -d "$work/packages/numpy" ] || wheels "$work/packages" torchvision==0.25.0 numpy scipy pillow pycocotools safetensors \
        typing_extensions sympy mpmath filelock networkx jinja2 markupsafe fsspec setuptools
      [ -d "$work/debian" ] || debian_python "$work/debian"
      echo "== fuzz: qemu-aarch64"
      cp -r pyseg "$work/aarch64/python/" && find "$work/aarch64/python" -name '*_cu*.so' -delete
      cp build/cross/aarch64/native/_C.abi3.so "$work/aarch64/python/pyseg/"
      qemu-aarch64 -L "$work/debian" -E PYTHONHOME="$work/debian/usr" -E OMP_NUM_THREADS=1 \
        -E PYTHONPATH="$work/aarch64/python:$work/packages:$root" -E PYTHONSAFEPATH=1 \
        "$work/debian/usr/bin/python$release" -m tests.fuzz --cases "${CASES:-200}" --jobs 1
      ;;
    *) echo "$part: choose of macos, aarch64, fuzz"; exit 1 ;;
  esac
done
echo "cross check: all well"
