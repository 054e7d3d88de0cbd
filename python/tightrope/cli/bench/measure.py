"""One competitor at one case, in a process of its own: error, memory, then time beside ours and the floor.

Run as ``python -m tightrope.cli.bench.measure``; a request in JSON comes on stdin, the figures go to stdout.
Memory comes first, while the process is fresh. Then the three bare GEMMs, ours and the competitor take turns,
so that all see the same machine. A competitor gets its gradients dropped before each step, outside the time.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..probe import peak_bytes
from .cases import LOSSES, Case, Loss
from .competitors import Competitor, all_competitors, ours
from .figures import rounds_for, summary
from .inputs import Step, make_step
from .truth import errors, write_truth

Work = Callable[[], object]


def step_of(competitor_loss, step: Step, loss: Loss) -> torch.Tensor:
    """Forward and backward; the value of the loss."""
    value = competitor_loss(step, loss)
    value.backward()
    return value.detach()


def three_gemms(step: Step) -> None:
    """The least that the step has to do: the logits, dh and dW. On a CPU in float32 whatever the dtype."""
    hidden, weight = step.hidden.detach(), step.weight.detach()
    logits = torch.mm(hidden, weight.t())
    torch.mm(logits, weight)
    torch.mm(logits.t(), hidden)


def floor_step(step: Step) -> Step:
    """What the floor multiplies: PyTorch's bfloat16 products on a CPU can be hundreds of times slower."""
    if step.hidden.device.type != "cpu" or step.hidden.dtype == torch.float32:
        return step
    return replace(step, hidden=step.hidden.detach().float(), weight=step.weight.detach().float())


def first_step(step: Step, competitor: Competitor, loss: Loss, case: Case) -> tuple[int, float, torch.Tensor]:
    """Peak bytes of a step beyond inputs and the gradients that it returns and leaves; seconds; its loss."""
    seconds, value = 0.0, None

    def work() -> None:
        nonlocal seconds, value
        step.forget_gradients()
        begin = time.perf_counter()
        value = step_of(competitor.loss, step, loss)
        seconds = time.perf_counter() - begin

    if case.device != "cpu":
        work()
        step.forget_gradients()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - case.gradient_bytes, seconds, value
    if competitor.fixed_memory:
        # Loads code and starts threads; on so few entries that no buffer of any size is left behind.
        small = make_step(replace(case, rows=8, vocab=64, inputs="random"))
        step_of(competitor.loss, small, loss)
    else:
        work()
        step.forget_gradients()
    gc.collect()
    _give_back_free_memory()
    peak = peak_bytes(work)
    return max(0, peak - case.gradient_bytes), seconds, value


def _give_back_free_memory() -> None:
    """What glibc keeps for later would hide what the step takes; other C libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def take_turns(
    works: dict[str, Work], step: Step, warm: dict[str, float], budget: float
) -> dict[str, list[float]]:
    """Seconds of each work in each round; the order turns round, so that none always follows another.

    warm: seconds of those that ran in full before; the others do so first.
    """
    device = step.hidden.device

    def timed(work: Work) -> float:
        step.forget_gradients()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    first = sum(warm[name] if name in warm else timed(work) for name, work in works.items())
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for _ in range(rounds_for(first, budget)):
        for name in names:
            seconds[name].append(timed(works[name]))
        names.append(names.pop(0))
    return seconds


def measure(competitor: Competitor, case: Case, loss: Loss, truth: Path, budget: float) -> dict:
    """The figures of one competitor at one case."""
    loss = competitor.loss_compared(loss)
    step = make_step(case)
    memory, seconds, value = first_step(step, competitor, loss, case)
    error = errors(value, step, torch.load(truth))
    floor = floor_step(step)
    turns = take_turns(
        {
            "gemms": lambda: three_gemms(floor),
            "ours": lambda: step_of(ours, step, loss),
            "competitor": lambda: step_of(competitor.loss, step, loss),
        },
        step,
        {"competitor": seconds},
        budget,
    )
    return {"loss": loss.name, "memory_mb": memory / 1e6, **error, **summary(turns)}


def main() -> None:
    warnings.simplefilter("ignore")  # the peers' own; what fails raises
    request = json.load(sys.stdin)
    case, loss = Case(**request["case"]), LOSSES[request["loss"]]
    truth = Path(request["truth"])
    if request["competitor"] is None:
        write_truth(make_step(case), loss, truth)
        result = {}
    else:
        competitor = next(c for c in all_competitors() if c.name == request["competitor"])
        result = measure(competitor, case, loss, truth, request["budget"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
