#!/usr/bin/env bash
# Everything that only a GPU can show, into one folder: benchmarks/gpu_report.sh [FOLDER]
# Builds for the card, then runs the tests, the memory and race checkers, the benchmarks, the profiler and two trainings.
# About half an hour; each step is bounded. A wrong result stops it; what was written until then stays.
# PYTHON names the interpreter, `python3` by default; it needs what `pip install --group dev` and `pip install -e ".[models]"` bring.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
out=${1:-benchmarks/gpu_report}
mkdir -p "$out"

# step NAME SECONDS COMMAND...: its output goes to NAME.log.
step() {
  local name=$1 seconds=$2
  shift 2
  echo "$(date +%T) $name"
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1
  local status=$?
  if [ $status -ne 0 ]; then
    tail -n 30 "$out/$name.log"
    echo "$name failed ($([ $status -eq 124 ] && echo "after $seconds s" || echo "exit $status")): $out/$name.log"
  fi
  return $status
}

must() { step "$@" || exit 1; }

have() {
  command -v "$1" >/dev/null || { echo "left out: $1 is not installed"; return 1; }
}

{
  date -u +%FT%TZ
  git describe --always --dirty
  nvidia-smi
} >"$out/machine.txt" 2>&1

TORCH_CUDA_ARCH_LIST=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | paste -sd';')
export TORCH_CUDA_ARCH_LIST
must build 600 make build VENV= PYTHON="$PYTHON"
must info 60 "$PYTHON" -m focalops.info
must tests 600 "$PYTHON" -m pytest -q -k "not emulated" --durations=20 --junitxml="$out/tests.xml"

# Each op on a small shape. Without the caching allocator, or what lies behind a tensor is still allocated memory.
if have compute-sanitizer; then
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck synccheck initcheck; do
    must "$tool" 300 compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-regex kns=focalops \
      "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_transforms.py -k "(bfloat16 or checkpointing) and cuda and not emulated"
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi

must benchmarks 900 "$PYTHON" -m benchmarks --out "$out/benchmarks.json"

if have ncu; then
  metrics=dram__bytes_read.sum,dram__bytes_write.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,gpu__time_duration.sum,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
  metrics+=,sm__inst_executed.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed
  step profile 600 ncu --csv --log-file "$out/profile.csv" --kernel-name-base demangled --kernel-name regex:focalops \
    --launch-count 200 --metrics "$metrics" --section WarpStateStats "$PYTHON" -m benchmarks.once
fi

step demo 600 "$PYTHON" -m models demo
step train_resnet50 600 "$PYTHON" -m models train --data trees --backbone resnet50 --steps 300 --out "$out/resnet50"

echo "$(date +%T) done: $out"
