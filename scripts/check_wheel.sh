#!/usr/bin/env bash
# One wheel for all: builds a wheel without CUDA once, then runs the op tests with that same file on every Python given.
# Usage: scripts/check_wheel.sh PYTHON [PYTHON ...]      each with some torch >= 2.10 and pytest; the first one builds
set -euo pipefail
unset CDPATH
[ $# -gt 0 ] || { echo "usage: scripts/check_wheel.sh PYTHON [PYTHON ...]" >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pythons=()
for python in "$@"; do pythons+=("$(realpath --no-symlinks "$(command -v "$python")")"); done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

FORCE_CUDA=0 "${pythons[0]}" -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps -w "$folder" .
wheel=$(echo "$folder"/*.whl)
echo "wheel: $(basename "$wheel")  sha256 $(sha256sum "$wheel" | cut -c1-16)"
cp -r tests "$folder/tests"
cd "$folder"
for python in "${pythons[@]}"; do
  rm -rf installed
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target installed "$wheel"
  echo "--- $("$python" -c 'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)')"
  PYTHONPATH=installed "$python" -c 'import torch_mlp; print("from", torch_mlp.__file__)'
  PYTHONPATH=installed "$python" -m pytest -q -p no:cacheprovider -k "not cuda" \
    tests/test_linear_act.py tests/test_cross_entropy.py tests/test_cross_entropy_probabilities.py \
    tests/test_linear_cross_entropy.py tests/test_binary_cross_entropy.py tests/test_ops.py tests/subsystems
done
