#!/usr/bin/env bash
# Makes the environment (scripts/setup.sh), then runs all tests, on up to eight processors at once.
# Usage: scripts/test.sh [pytest options]      -n 0 runs them in one process; VENV=DIR chooses the environment
# TORCH_MLP_DATA=DIR names the folder that holds MNIST/raw, for the tests on real MNIST.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
echo "test: pytest $*"
exec "${VENV:-.venv}/bin/python" -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
