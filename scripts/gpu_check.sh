#!/usr/bin/env bash
# Builds, tests, sanitises and measures Tightrope on the GPU that is here, and writes one JSON and one page.
# Takes the machine as it is, without network; benchmarks/gpu_check says what is done.
#   PYTHON=python3.12   the interpreter, with its torch; default: that of .venv, else python3
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if [ -z "${PYTHON:-}" ] && [ ! -x "$python" ]; then
  python=python3
fi
exec "$python" "$root/benchmarks/gpu_check" "$@"
