#!/usr/bin/env bash
# Builds, checks and measures everything on a machine with one NVIDIA GPU, in one go; about an hour.
#
#   PYTHON=python3 benchmarks/gpu.sh [RESULTS]        results, tables and plots are left in RESULTS (out/gpu)
#
# PYTHON must have a CUDA build of torch (2.11 or later), pytest, hypothesis, psutil, transformers and matplotlib, and nvcc must be found; peers that are not
# installed (deepspeed, torchao, flashoptim, bitsandbytes) are left out by name. Nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${1:-out/gpu}
mkdir -p "$RESULTS"
RESULTS=$(cd "$RESULTS" && pwd)
export ZEROLITE_BENCH_RESULTS="$RESULTS" ZEROLITE_CUDA=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=()

part() { # name, command...: a part that fails is told at the end, and the others run
  local name=$1
  shift
  echo "== $name: $*"
  if ! "$@" 2>&1 | tee "$RESULTS/$name.log"; then failed+=("$name"); fi
}

"$PYTHON" - <<'PY'
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: expected a GPU and a CUDA build of torch, got torch {torch.__version__} without one. Set PYTHON.")
print(torch.__version__, torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0))
PY

part build "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --no-index --editable .
part kernels "$PYTHON" -m pytest -q tests/test_cuda.py
part training "$PYTHON" -m pytest -q tests/test_gpu.py
part schedules "$PYTHON" -m pytest -q tests/test_offload.py
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    part "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest -q -x tests/test_cuda.py -k "not indices"
  done
else
  echo "compute-sanitizer is not installed: left out"
fi
for model in llama-1.5B llama-7B; do
  part "device-$model" "$PYTHON" -m benchmarks device --model "$model"
done
for model in llama-1.5B llama-7B; do
  part "steps-$model" "$PYTHON" -m benchmarks run --device cuda --models "$model" --worlds 1 --rounds 2 --steps 4 --parts step \
    --systems "model alone,FSDP2 + offload,DeepSpeed 2 + offload,DeepSpeed 3 + offload,DeepSpeed 3 + offload all,torchao,FlashOptim,bitsandbytes,zerolite 2,zerolite 2 + offload,zerolite 3 + offload,zerolite 3 + offload all"
done
part report "$PYTHON" -m benchmarks report
if ((${#failed[@]})); then
  echo "failed: ${failed[*]} (logs in $RESULTS)"
  exit 1
fi
echo "all parts ran; results in $RESULTS"
