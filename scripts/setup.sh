#!/usr/bin/env bash
# Makes the virtual environment that quickstart.sh and test.sh run in: installs the pinned dependencies, builds the ops.
# Usage: scripts/setup.sh      VENV=DIR puts the environment there instead of into .venv
# Repeated, it starts at once: only what changed since is installed or built again.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}

python=$venv/bin/python
if ! "$python" -m pip --version > /dev/null 2>&1; then
  base=$(command -v python3 || command -v python || true)
  [ -n "$base" ] || { echo "setup: Python 3.10 or later is needed, and no python3 was found." >&2; exit 1; }
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "setup: Python 3.10 or later is needed, and $base is $("$base" --version)." >&2; exit 1; }
  echo "setup: making the virtual environment $venv with $("$base" --version)"
  "$base" -m venv --clear "$venv"
fi

# A step is skipped while the files it depends on, and the folder they lie in, are what they were when it was last done.
done_before() { [ -f "$venv/$1.stamp" ] && [ "$(cat "$venv/$1.stamp")" = "$2" ]; }
fingerprint() { { pwd; echo "${FORCE_CUDA:-} ${TORCH_CUDA_ARCH_LIST:-} ${CUDA_HOME:-}"; cat "$@"; } | cksum; }
install() { "$python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$@"; }

state=$(fingerprint constraints.txt)
if ! done_before tools "$state"; then
  echo "setup: installing torch and the build tools into $venv (large: minutes on a slow network)"
  install pip  # the pinned one knows dependency groups
  install torch numpy setuptools ninja
  echo "$state" > "$venv/tools.stamp"
fi

# shellcheck disable=SC2046 # one word for each file
state=$(fingerprint constraints.txt pyproject.toml setup.py $(find csrc -type f | LC_ALL=C sort))
if ! done_before package "$state" || ! ls torch_mlp/_C.*so > /dev/null 2>&1; then
  echo "setup: building torch_mlp and installing what training and tests need (a minute or two)"
  install --no-build-isolation --editable '.[train]' --group test
  echo "$state" > "$venv/package.stamp"
fi
