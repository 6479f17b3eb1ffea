#!/usr/bin/env bash
# On a machine with a GPU: builds in place with the system's Python and torch (2.10 or later), runs every test that needs
# a GPU, a subset under compute-sanitizer, and the benchmark.
# Usage: scripts/check_cuda.sh      PYTHON=... chooses the interpreter (default python3), which needs torch, pytest and
# what the tests import; with pytest-xdist all processors test at once. TORCH_MLP_DATA is the folder of MNIST, if any.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD

"$python" -c 'import torch; print("torch", torch.__version__, "on", torch.cuda.get_device_name())'
FORCE_CUDA=1 "$python" setup.py --quiet build_ext --inplace

jobs=()
if "$python" -c 'import xdist' 2> /dev/null; then jobs=(-n auto --maxprocesses 14); fi  # each has a context on the GPU
"$python" -m pytest -q "${jobs[@]}" -k 'cuda or gpu' tests

sanitized=(tests/test_{linear_act,cross_entropy,cross_entropy_backward,cross_entropy_probabilities,ops}.py)
if command -v compute-sanitizer > /dev/null; then
  declare -A pids
  for tool in memcheck racecheck initcheck synccheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -x -k 'cuda and (two_calls or layouts or infinite_logits or as_many or more_rows)' "${sanitized[@]}" \
      > "build/compute-sanitizer-$tool.log" 2>&1 &
    pids[$tool]=$!
  done
  failed=0
  for tool in "${!pids[@]}"; do
    lines=3
    wait "${pids[$tool]}" || failed=1 lines=60
    echo "check_cuda: compute-sanitizer --tool $tool"
    tail -n "$lines" "build/compute-sanitizer-$tool.log"
  done
  ((failed == 0))
else
  echo "check_cuda: no compute-sanitizer here, its checks are left out"
fi

"$python" scripts/bench.py --device cuda --data-dir "${TORCH_MLP_DATA:-data}"
