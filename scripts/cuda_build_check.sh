#!/usr/bin/env bash
# Builds the whole package with its CUDA extension from nothing, and imports it. Needs nvcc, and no GPU.
#
# The environment and the build are in a folder of their own, removed afterwards, with a CUDA build of torch
# (several GB). So it is not part of `make test`.
#   FOLDER=/path          keep the environment there, and use it again
#   PYTHON=python3.12     the interpreter
#   TORCH=torch==2.14.1   the torch; its CUDA version must be that of nvcc
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
torch=${TORCH:-torch>=2.11}
if [ -n "${FOLDER:-}" ]; then
  folder=$FOLDER
  mkdir -p "$folder"
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi

if [ ! -x "$folder/venv/bin/python" ]; then
  "$python" -m venv "$folder/venv"
fi
"$folder/venv/bin/pip" install --quiet "$torch" 'setuptools>=77' ninja pybind11 numpy
"$folder/venv/bin/python" - <<'PY'
import sys, torch
if torch.version.cuda is None:
    sys.exit(f"cuda-build-check: torch {torch.__version__} is not a CUDA build; name one: TORCH=torch==...")
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}")
PY

# What git knows, as it stands in the working tree.
rm -rf "$folder/source"
mkdir "$folder/source"
git -C "$root" ls-files -z --cached --others --exclude-standard | tar -C "$root" --null -T - -c | tar -C "$folder/source" -x

"$folder/venv/bin/pip" uninstall --quiet --yes tightrope
TIGHTROPE_CUDA=1 "$folder/venv/bin/pip" install --quiet --no-build-isolation --no-deps "$folder/source"

cd "$folder"  # so that the installed package is imported
venv/bin/python - <<'PY'
import torch

import tightrope
from tightrope import backends

table = {row["backend"]: row for row in backends.describe()}
for name in ("cpu", "cuda"):
    assert table[name]["available"], table[name]
    print(f"{name}: {table[name]['detail']}")
for operator in ("row_stats", "row_sides", "row_grad", "row_loss_grad"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tightrope::{operator}", "CUDA"), operator
assert backends.resolve(None, torch.device("cuda")).name == "cuda"
loss = tightrope.reality_creativity_loss(torch.zeros(3, 5), torch.tensor([0, 1, 2]))
assert abs(loss.item() - 1.6094379) < 1e-6
print(f"cuda-build-check: built, linked and imported from {tightrope.__file__}")
PY
