"""What installation says when something is missing: one plain message with the remedy, and no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_TORCH = (
    "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build_ext'];"
    "runpy.run_path('setup.py', run_name='__main__')"
)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("command", "environment", "missing"),
    [
        (("setup.py", "build_ext"), {"CXX": "no-such-compiler"}, "no C++ compiler (`no-such-compiler`)"),
        (("-c", WITHOUT_TORCH), {}, "PyTorch is not installed"),
    ],
)
def test_a_missing_tool_is_named_with_its_remedy(command, environment, missing):
    done = run(*command, **environment)
    assert done.returncode != 0
    assert missing in done.stderr
    assert "TIGHTROPE_BUILD_EXT=0" in done.stderr
    assert "Traceback" not in done.stderr


def needs_cpu_torch():
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch is a CUDA build")


def test_the_cuda_extension_is_left_out_with_one_line():
    needs_cpu_torch()
    done = run("setup.py", "--name")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "tightrope: " in line]
    assert len(said) == 1
    assert "without the CUDA extension" in said[0] and "is not a CUDA build" in said[0]
    assert "tightrope: " not in run("setup.py", "--name", TIGHTROPE_CUDA="0").stdout


def test_the_cuda_extension_can_be_insisted_on():
    needs_cpu_torch()
    done = run("setup.py", "--name", TIGHTROPE_CUDA="1")
    assert done.returncode != 0
    assert "TIGHTROPE_CUDA=1" in done.stderr and "Install a CUDA build of torch" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_extension_can_be_left_out():
    done = run("setup.py", "--name", TIGHTROPE_BUILD_EXT="0", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
