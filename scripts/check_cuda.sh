#!/usr/bin/env bash
# On a machine with a GPU: builds in place with the system's Python and torch (2.10 or later), runs every test that needs
# a GPU, a subset under compute-sanitizer, and a short benchmark.
# Usage: scripts/check_cuda.sh      PYTHON=... chooses the interpreter (default python3), which needs torch and pytest
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD

"$python" -c 'import torch; print("torch", torch.__version__, "on", torch.cuda.get_device_name())'
FORCE_CUDA=1 "$python" setup.py --quiet build_ext --inplace

tests=(tests/test_linear_act.py tests/test_cross_entropy.py tests/test_cross_entropy_probabilities.py
  tests/test_z_loss.py tests/test_linear_cross_entropy.py tests/test_binary_cross_entropy.py tests/test_ops.py
  tests/test_nn_linear.py tests/test_nn_logistic_regression.py tests/test_nn_loss.py tests/test_nn_mlp.py
  tests/test_nn_perceptron.py tests/test_mlp.py tests/subsystems)
if "$python" -c 'import hypothesis' 2> /dev/null; then tests+=(tests/test_epoch.py); fi
# The training tests need scikit-learn's digits.
if "$python" -c 'import sklearn, tqdm, hypothesis' 2> /dev/null; then tests+=(tests/test_training.py); fi
"$python" -m pytest -q -k 'cuda or gpu' "${tests[@]}"

if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    echo "check_cuda: compute-sanitizer --tool $tool"
    log=build/compute-sanitizer-$tool.log
    compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -x -k 'cuda and (two_calls or layouts or infinite_logits)' "${tests[@]:0:4}" > "$log" 2>&1 ||
      { tail -n 60 "$log"; exit 1; }
    tail -n 3 "$log"
  done
else
  echo "check_cuda: no compute-sanitizer here, its checks are left out"
fi

"$python" scripts/bench.py --device cuda
