#!/usr/bin/env bash
# Everything a machine with a GPU can say about pyseg, in one run of under ten minutes: build with
# nvcc, GPU tests, compute-sanitizer on small cases, benchmarks. Needs nvcc, torch >= 2.10 with
# CUDA, pytest and pytest-benchmark; no network and no data besides this repository.
# Usage: tests/gpu_check.sh [output folder]    PYTHON=python3.12 chooses the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-build/gpu-check}
mkdir -p "$out"
status=0

step() {  # name, seconds, command...: runs it, keeps its log, notes its verdict
  local name=$1 limit=$2 verdict start=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  verdict=$?
  tail -n 25 "$out/$name.log"
  [ $verdict -eq 0 ] || status=1
  echo "{\"step\": \"$name\", \"exit\": $verdict, \"seconds\": $((SECONDS - start))}" >>"$out/steps.jsonl"
  return $verdict
}

: >"$out/steps.jsonl"
"$python" - "$out/machine.json" <<'PY' || exit 1
import datetime, json, subprocess, sys
import torch
if not torch.cuda.is_available():
    sys.exit("gpu-check needs a CUDA device; torch sees none")
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
properties = torch.cuda.get_device_properties(0)
json.dump({
    "device": properties.name, "multiprocessors": properties.multi_processor_count,
    "capability": f"{properties.major}.{properties.minor}", "torch": torch.__version__,
    "cuda": torch.version.cuda, "python": sys.version.split()[0], "commit": commit or None,
    "date": datetime.date.today().isoformat(),
}, open(sys.argv[1], "w"), indent=1)
PY
cat "$out/machine.json"; echo

capability=$("$python" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())")
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} PYSEG_CUDA=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
step build 300 "$python" setup.py -q build_ext --inplace || { echo "build failed"; exit 1; }

step tests 240 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/ops

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    step "$tool" 120 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -q -p no:cacheprovider -m gpu -k "small" tests/ops
  done
else
  echo "== compute-sanitizer: not available" | tee "$out/sanitizer.log"
fi

step benchmarks 240 "$python" -m pytest -q -p no:cacheprovider --benchmark -k cuda \
  --benchmark-json="$out/benchmarks.json"

echo "== steps"
cat "$out/steps.jsonl"
exit $status
