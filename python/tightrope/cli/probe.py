"""The cost of the loss beside eager PyTorch: the same step, time and peak memory, measured.

Runs in a process of its own, ``python -m tightrope.cli.probe STEP_FILE``, whose memory holds nothing but
the step. Memory is the growth of the resident set over one whole loss, forward and backward, sampled by
a thread: gradients and workspace count, inputs do not. Times are medians of rounds in which the two
take turns, so that both see the same machine.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

import tightrope

from .output import scratch, writing

# The modes of a comparison are there to be compared, whatever their balance.
warnings.filterwarnings("ignore", category=tightrope.BalanceWarning)

TOKENS = 1024
ROUNDS = 3
SAMPLING_SECONDS = 0.001


class Cost(NamedTuple):
    """One implementation of the loss: its value, time and memory (MB are of 2**20 bytes)."""

    implementation: str
    loss: float
    seconds: float
    peak_mb: float


def rows(weight: Tensor) -> int:
    """How many tokens to measure: `TOKENS`, or as many as eager PyTorch can take in half the free memory."""
    eager_bytes = 6 * weight.shape[0] * weight.element_size()  # a row of logits, and what follows from it
    return max(1, min(TOKENS, psutil.virtual_memory().available // (2 * eager_bytes)))


def measure(hidden: Tensor, weight: Tensor, target: Tensor, balance: float) -> list[Cost]:
    """The costs of Tightrope and of eager PyTorch for hidden [N, D], weight [V, D], target [N]."""
    with scratch() as folder:
        step = folder / "step.pt"
        with writing(folder, "TMPDIR"), step.open("wb") as file:
            torch.save({"hidden": hidden, "weight": weight, "target": target, "balance": balance}, file)
        # A new session, so that Ctrl-C reaches only this process; run() then ends the other.
        done = subprocess.run(
            [sys.executable, "-m", "tightrope.cli.probe", str(step)],
            stdout=subprocess.PIPE,
            check=True,
            start_new_session=True,
        )
    return [Cost(**cost) for cost in json.loads(done.stdout)]


def tightrope_loss(hidden: Tensor, weight: Tensor, target: Tensor, balance: float) -> Tensor:
    return tightrope.linear_reality_creativity_loss(hidden, weight, target, balance=balance)


def eager_loss(hidden: Tensor, weight: Tensor, target: Tensor, balance: float) -> Tensor:
    """What people write without a fused loss: all the logits, and their log-softmax."""
    log_p = torch.log_softmax(hidden @ weight.T, -1)
    cross_entropy = torch.nn.functional.nll_loss(log_p, target)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    return (1 - balance) * cross_entropy - balance * entropy


def _run(loss_fn: Callable[..., Tensor], hidden: Tensor, weight: Tensor, *rest) -> float:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = loss_fn(hidden, weight, *rest)
    loss.backward()
    return loss.item()


def peak_bytes(work: Callable[[], object]) -> int:
    """How far the resident set grows above its size at the start while ``work`` runs."""
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLING_SECONDS):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak - before


def main(step_file: str) -> None:
    step = torch.load(step_file)
    hidden, weight, target, balance = step.values()
    losses = {"tightrope": tightrope_loss, "eager PyTorch": eager_loss}
    values, peaks, seconds = {}, {}, {name: [] for name in losses}
    for name, loss_fn in losses.items():
        _run(loss_fn, hidden[:8], weight[:64], target[:8] % 64, balance)  # loads code, starts threads
        peaks[name] = peak_bytes(lambda: _run(loss_fn, hidden, weight, target, balance))  # noqa: B023
    for _ in range(ROUNDS):
        for name, loss_fn in losses.items():
            begin = time.perf_counter()
            values[name] = _run(loss_fn, hidden, weight, target, balance)
            seconds[name].append(time.perf_counter() - begin)
    costs = [
        Cost(name, values[name], statistics.median(seconds[name]), peaks[name] / 2**20) for name in losses
    ]
    print(json.dumps([cost._asdict() for cost in costs]))


if __name__ == "__main__":
    main(sys.argv[1])
