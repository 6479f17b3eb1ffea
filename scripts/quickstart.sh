#!/usr/bin/env bash
# From a fresh clone to a network that reads handwritten digits: makes the environment (scripts/setup.sh), then trains.
# Usage: scripts/quickstart.sh [options of scripts/train_mnist.py, see --help]      VENV=DIR chooses the environment
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh"
echo "quickstart: scripts/train_mnist.py $*"
venv=$(cd "$root" && cd "${VENV:-.venv}" && pwd)
exec "$venv/bin/python" "$root/scripts/train_mnist.py" "$@"
