"""Runs the Triton tests that need TRITON_INTERPRET=1, in a process of their own.

The variable must be set before the kernels are defined, and must not reach the other tests, some of which
need compiled kernels.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import child_environment

HERE = Path(__file__).parent
NAMES = ("rows", "sides", "stream", "api", "tangents", "second", "drawn")
MODULES = [f"test_triton_{name}.py" for name in NAMES]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter(pytestconfig):
    modules = [str(HERE / module) for module in MODULES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *modules]
    if pytestconfig.getoption("--every-case"):
        command.append("--every-case")
    done = subprocess.run(
        command,
        cwd=HERE.parent,
        env=child_environment(TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
        timeout=3600 if pytestconfig.getoption("--every-case") else 600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
