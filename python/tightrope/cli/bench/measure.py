"""One competitor at one case, in a process of its own: memory, error, then time beside ours and the floor.

Memory comes first, while the process is fresh. Then the three bare GEMMs, ours and the competitor take turns,
so that all see the same machine. A competitor gets its gradients dropped before each step, outside the time;
for a Hessian-vector product it also makes their graph there, as who takes many of them at a point does once.
"""

from __future__ import annotations

import ctypes
import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from .cases import Case, Loss
from .competitors import Competitor, all_competitors, ours
from .figures import rounds_for, summary
from .inputs import Step, make_step
from .peers import LossOf
from .truth import errors

Work = Callable[[], object]
_Work = TypeVar("_Work")


@dataclass(frozen=True)
class StepOf:
    """A step of a competitor, as a work: forward and backward, or a Hessian-vector product.

    The gradients, or the product, are left where a backward leaves gradients.
    """

    loss_of: LossOf
    step: Step
    loss: Loss

    def prepared(self) -> Work:
        """What is timed. For a Hessian-vector product the gradients and their graph are made before."""
        step = self.step
        if step.direction is None:
            return self
        leaves = step.hidden, step.weight
        value = self.loss_of(step, self.loss)
        gradients = torch.autograd.grad(value, leaves, create_graph=True)
        value = value.detach()  # who takes products needs the loss's own graph no more

        def product() -> torch.Tensor:
            step.hidden.grad, step.weight.grad = torch.autograd.grad(gradients, leaves, step.direction)
            return value

        return product

    def __call__(self) -> torch.Tensor:
        """All of it; the value of the loss."""
        if self.step.direction is not None:
            return self.prepared()()
        value = self.loss_of(self.step, self.loss)
        value.backward()
        return value.detach()


def step_of(loss_of: LossOf, step: Step, loss: Loss) -> torch.Tensor:
    """The value of the loss, after all of a step."""
    return StepOf(loss_of, step, loss)()


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


def first_step(step: Step, competitor: Competitor, loss: Loss, case: Case) -> tuple[int, torch.Tensor]:
    """Peak bytes of a step beyond inputs and the gradients that it returns and leaves; its loss."""
    value = None

    def work() -> None:
        nonlocal value
        step.forget_gradients()
        value = step_of(competitor.loss, step, loss)

    if case.device != "cpu":
        work()
        step.forget_gradients()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - case.gradient_bytes, value
    from ..probe import peak_bytes  # needs psutil, which a GPU's figures do not

    if competitor.fixed_memory:
        step_of(competitor.loss, small_step(case), loss)
    else:
        work()
        step.forget_gradients()
    gc.collect()
    give_back_free_memory()
    peak = peak_bytes(work)
    return max(0, peak - case.gradient_bytes), value


def small_step(case: Case) -> Step:
    """Loads code and starts threads; of so few entries that no buffer of any size is left behind."""
    return make_step(replace(case, rows=8, vocab=64, inputs="random"))


def give_back_free_memory() -> None:
    """What glibc keeps for later would hide what the step takes; other C libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def take_turns(works: dict[str, Work], step: Step, budget: float) -> dict[str, list[float]]:
    """Seconds of each work in each round; the order turns round, so that none always follows another.

    The first round says how many there are.
    """
    device = step.hidden.device

    def timed(work: Work) -> float:
        step.forget_gradients()
        if isinstance(work, StepOf):
            work = work.prepared()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    return in_turns(works, timed, budget)


def in_turns(
    works: dict[str, _Work], timed: Callable[[_Work], float], budget: float
) -> dict[str, list[float]]:
    """Seconds of each work in each round, in another order each; the first round says how many there are."""
    names = list(works)
    seconds = {name: [timed(works[name])] for name in names}
    for _ in range(1, rounds_for(sum(first for (first,) in seconds.values()), budget)):
        names.append(names.pop(0))
        for name in names:
            seconds[name].append(timed(works[name]))
    return seconds


def noise_found(competitor: Competitor, step: Step, loss: Loss) -> dict[str, float]:
    """Of gradients that are drawn: their errors over their norms, as measured and as the call expects them.

    Of all entries, against ours in full: the rows that `truth.errors` compares are mostly of targets, which
    sampling makes exactly. What is expected, and the share of the columns that was multiplied, are missing
    where the backward comes after the call.
    """
    step.forget_gradients()
    step_of(competitor.loss, step, loss)
    drawn = step.hidden.grad, step.weight.grad
    step.forget_gradients()
    step_of(ours, step, loss)
    exact = step.hidden.grad, step.weight.grad
    found = {
        f"{name}_noise": ((a.double() - b.double()).norm() / b.double().norm()).item()
        for name, a, b in zip(("hidden", "weight"), drawn, exact)
        if b is not None
    }
    if step.advantage is None:
        _, stats = ours(step, loss, gradient_noise=competitor.noise, return_stats=True)
        expected = dict(zip(("hidden", "weight"), stats.sampled_noise.tolist()))
        found |= {f"{name}_noise_expected": expected[name] for name in expected if f"{name}_noise" in found}
        found["sampled_share"] = stats.sampled_share.item()
    return found


def measure(name: str, case: Case, loss: Loss, truths: Path, budget: float) -> dict:
    """The figures of one competitor at one case, on a loss whose truth is in the file."""
    competitor = next(c for c in all_competitors() if c.name == name)
    warnings.simplefilter("ignore")  # the peers' own; what fails raises
    step = make_step(case)
    memory, value = first_step(step, competitor, loss, case)
    error = errors(value, step, torch.load(truths)[loss.name])
    noise = noise_found(competitor, step, loss) if competitor.noise else {}
    floor = floor_step(step)
    # The competitor has run in full. A GPU's libraries choose and compile for a shape, so there all do.
    warm = small_step(case) if case.device == "cpu" else step
    three_gemms(floor_step(warm))
    step_of(ours, warm, loss)
    turns = take_turns(
        {
            "gemms": lambda: three_gemms(floor),
            "ours": StepOf(ours, step, loss),
            "competitor": StepOf(competitor.loss, step, loss),
        },
        step,
        budget,
    )
    return {"memory_mb": memory / 1e6, **error, **noise, **summary(turns)}
