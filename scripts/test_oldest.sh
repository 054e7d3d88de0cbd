#!/usr/bin/env bash
# Runs the tests with the oldest torch and Triton that are served, in an environment of its own.
#
# The package is built and installed from a copy: a build in place is that of another torch. The libraries that
# integrations meet are not installed, as their newest ask for newer torch; those tests are skipped.
#   PYTHON=python3.12         the interpreter
#   FOLDER=/path              the environment; default: .venv-oldest, used again
#   TORCH='torch==2.11.0'     the torch; without a GPU the CPU build, by its local version, and no other
#   ./test_oldest.sh TEST...  what pytest is given; default: all tests
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
folder=${FOLDER:-$root/.venv-oldest}
torch=${TORCH:-torch==2.11.0}
if [ -z "${TORCH:-}" ] && [ "$(uname -sm)" = "Linux x86_64" ] && ! command -v nvidia-smi > /dev/null; then
  torch=torch==2.11.0+cpu
fi
if [ ! -x "$folder/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$folder"
fi
# Triton 3.6's interpreter fails on numpy 2.4.
oldest=("$torch" 'triton==3.6.*' 'numpy<2.4')
"$folder/bin/pip" install --quiet "${oldest[@]}" 'setuptools>=77' ninja pybind11 || {
  echo "test-oldest: pip found no $torch. Point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheel index, or name" \
    "another: TORCH=torch==2.11.0" >&2
  exit 1
}

# What git knows, as it stands in the working tree; compiled again where it changed.
mkdir -p "$folder/source"
git -C "$root" ls-files -z --cached --others --exclude-standard \
  | tar -C "$root" --null --ignore-failed-read -T - -c | tar -C "$folder/source" -x
"$folder/bin/pip" install --quiet --no-build-isolation "$folder/source[test,train,evaluate]" "${oldest[@]}"

cd "$folder"  # so that the installed package is imported
"$folder/bin/python" -c 'import torch, triton, tightrope; print("torch", torch.__version__, "triton", triton.__version__)'
if [ $# = 0 ]; then
  set -- "$root/tests" --numprocesses auto --dist loadfile --no-loadscope-reorder
fi
exec "$folder/bin/python" -m pytest --rootdir "$root" -c "$root/pyproject.toml" -p no:cacheprovider --benchmark-disable "$@"
