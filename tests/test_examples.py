"""The examples, run as their readers run them, on a tiny model."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys

import pytest
import torch

from helpers import ROOT, child_environment
from tiny_models import TEXT, TRAIN_EXTRA, save_tiny


@pytest.mark.one_in(2)
@pytest.mark.parametrize("processes", [2, 3])
def test_distributed_training(tmp_path, processes):
    """Would catch a way of sharing the work whose losses part from one process's; or a hang, by the limit."""
    for package in TRAIN_EXTRA:
        pytest.importorskip(package)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = [sys.executable, "-W", "error::FutureWarning:tightrope", "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", str(processes), str(ROOT / "examples" / "train_distributed.py")]
    command += ["--model", str(save_tiny(tmp_path / "model")), "--text", str(text)]
    # 301 classes do not divide by the ranks, and nor do the windows.
    command += ["--steps", "3", "--batch", "5", "--length", "32"]
    environment = child_environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[-1] == "the losses agree"
    ways = ("DDP", "FSDP2", "tensor parallel", "sharded rows")
    assert [line.split("  ")[0].rstrip() for line in lines[2:6]] == list(ways)
    assert "Warning" not in done.stderr, done.stderr


def of_readme(rank: int, size: int, code: str) -> list[float]:
    """Runs the README's code as one of its ranks."""
    names = {"head_rows": torch.randn(503 // size + (rank < 503 % size), 16, requires_grad=True)}
    names["targets"] = torch.randint(503, (4, 256))
    torch.manual_seed(0)  # all have the same tokens
    before, after = code.split("import torch.distributed as dist")
    exec(before.split("# instead of")[0], names)
    exec("import torch.distributed as dist" + after, names)
    return [names["loss"].item(), names["head"].weight.grad.to_local().abs().sum().item()]


def test_readme_on_many_gpus(ranks):
    """Would catch a README whose lines for many GPUs do not run."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    code = "".join(block for block in blocks if "import torch, tightrope" in block or "dist." in block)
    small = code.replace("50257", "503").replace("768", "16")
    for loss, grad in ranks(2).run(of_readme, 2, small):
        assert 0 < loss < 20 and grad > 0


def test_newton(tmp_path, monkeypatch, capsys):
    """Would catch a Hessian's product that is off, whose error falls, but is not squared near the end."""
    for package in ("matplotlib", "rich"):
        pytest.importorskip(package)
    options = ["--inputs", "random", "--rows", "3", "--vocab", "300", "--width", "16", "--ridge", "2"]
    monkeypatch.setattr(sys, "argv", ["newton.py", *options, "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "newton.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert (tmp_path / "newton.png").is_file()
    for name in ("softmax regression", "with creativity"):
        lines = printed.split(f"\n{name}: error")[1].split("gradient descent:")
        steps = [[float(x) for x in line.split()] for line in lines[0].splitlines()[2:]]
        # The last step's error, and that it is less than the square of the one before, of small ones.
        assert steps[-1][3] < 1e-3 and all(ratio < 1 for *_, ratio in steps[-2:])
        descent = float(lines[1].splitlines()[0].split("error ")[1])
        assert descent > 10 * steps[-1][3]
