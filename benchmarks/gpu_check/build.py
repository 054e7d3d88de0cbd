"""Builds the package into a folder, from a copy of its sources, with what is installed and no network.

    python -m gpu_check.build REPOSITORY LIBRARY

setup.py says what is built and by which variables of the environment that is chosen. Nothing is written to
the repository: a build of its own may be in use there, for another torch.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "kernels", "python")
UNWANTED = shutil.ignore_patterns("__pycache__", "*.so", "_C_torch.txt", "*.egg-info")


def build(root: Path, library: Path) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        for name in SOURCES:
            if (root / name).is_dir():
                shutil.copytree(root / name, Path(scratch, name), ignore=UNWANTED)
            else:
                shutil.copy(root / name, scratch)
        command = [sys.executable, "setup.py", "build", "--build-lib", str(library)]
        return subprocess.run(command, cwd=scratch).returncode


if __name__ == "__main__":
    sys.exit(build(*map(Path, sys.argv[1:])))
