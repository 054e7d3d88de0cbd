"""Softmax regression over hidden states by Newton's method, beside gradient descent, at a model's vocabulary.

    python examples/newton.py --out newton

The problem is that of Sinha, Song and Zhou (arXiv 2306.02295), for each row h of some hidden states under a
head W: half the squared distance of softmax(W h) to a target, with a ridge on the logits; and the same with a
balance of 0.002 for creativity, the negative entropy. The target is what the model thinks at twice its
temperature, its largest 64 probabilities. Both methods begin where the model stands.

Newton's direction comes from conjugate gradients, which need products of the Hessian with vectors and nothing
else: each is three passes over the vocabulary, and no N x V tensor is made. Rows are problems of their own,
so each has its own step length, in one call for all. Near the end the error is squared from step to step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

import tightrope
from tightrope.cli.progress import progress_bar

ENTRIES, TEMPERATURE = 64, 2.0
PROBLEMS = {"softmax regression": 0.0, "with creativity": 0.002}  # and their balances
CG_STEPS = 100
HALVINGS = 40
SOLVED = 1e-11  # the norm of a row's gradient, as a part of what it was at first


@dataclass
class Problem:
    """A loss of hidden states h [N, D], of each row by itself; counts the passes over the vocabulary."""

    weight: Tensor  # [V, D]
    target: tightrope.TopKTarget
    balance: float
    ridge: float
    passes: int = 0

    def _loss(self, h: Tensor, reduction: str) -> Tensor:
        return tightrope.linear_reality_creativity_loss(
            h,
            self.weight,
            self.target,
            balance=self.balance,
            reality="squared_error",
            logit_l2=self.ridge,
            reduction=reduction,
        )

    def values(self, h: Tensor) -> Tensor:
        """The loss of each row [N, 1]."""
        self.passes += 1
        with torch.no_grad():
            return self._loss(h, "none").unsqueeze(-1)

    def curvature(self, h: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The gradient [N, D], and the products of the Hessian with directions [N, D]."""
        self.passes += 2
        h = h.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self._loss(h, "sum"), h, create_graph=True)

        def product(direction: Tensor) -> Tensor:
            self.passes += 3
            return torch.autograd.grad(gradient, h, direction, retain_graph=True)[0]

        return gradient.detach(), product


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each row, [N, 1]."""
    return (a * b).sum(-1, keepdim=True)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    precondition: Callable[[Tensor], Tensor],
    least: Tensor,
) -> Tensor:
    """Rows x with H x = right, until a residual's norm is below `least` [N, 1], or its curvature negative."""
    x, residual = torch.zeros_like(right), right.clone()
    z = precondition(residual)
    direction, size = z, dot(residual, z)
    live = dot(residual, residual).sqrt() > least
    for _ in range(CG_STEPS):
        if not live.any():
            break
        along = product(direction * live)
        curvature = dot(direction, along)
        live &= curvature > 0
        step = torch.where(live, size / curvature, 0.0)
        x, residual = x + step * direction, residual - step * along
        z = precondition(residual)
        before, size = size, dot(residual, z)
        direction = z + size / before * direction
        live &= dot(residual, residual).sqrt() > least
    return torch.where((x != 0).any(-1, keepdim=True), x, precondition(right))


def line_search(
    problem: Problem, h: Tensor, value: Tensor, direction: Tensor, slope: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, its values, the steps taken): each row's step is halved until its loss falls enough (Armijo)."""
    # What the loss would fall by is less than its rounding: a value cannot judge the step.
    near = slope.abs() <= 1e-9 * value.abs()
    for _ in range(HALVINGS):
        new = h + step * direction
        reached = problem.values(new)
        fits = near | (reached <= value + 1e-4 * step * slope)
        if fits.all():
            break
        step = torch.where(fits, step, step / 2)
    return new, reached, step


@dataclass
class Trace:
    """Where a method was, the norm of its gradient there, and the passes over the vocabulary until then."""

    points: list[Tensor] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)

    def add(self, problem: Problem, h: Tensor, gradient: Tensor) -> None:
        self.points.append(h)
        self.gradients.append(gradient.norm().item())
        self.passes.append(problem.passes)

    def errors(self, solution: Tensor) -> list[float]:
        """Distances to the solution, as a part of its norm."""
        return [((h - solution).norm() / solution.norm()).item() for h in self.points]


def newton(problem: Problem, h: Tensor, steps: int, report: Callable[[Trace], None]) -> Trace:
    """Until the gradient is as good as zero, or so many steps were taken."""
    trace, value, first = Trace(), problem.values(h), None
    # The ridge's own Hessian: what the loss adds to it is large in few directions.
    ridge = problem.ridge * problem.weight.t() @ problem.weight
    factor = torch.linalg.cholesky(ridge + 1e-6 * ridge.diagonal().mean() * torch.eye(len(ridge)).to(ridge))

    def precondition(rows: Tensor) -> Tensor:
        return torch.cholesky_solve(rows.t(), factor).t()

    for _ in range(steps + 1):
        gradient, product = problem.curvature(h)
        trace.add(problem, h, gradient)
        report(trace)
        size = dot(gradient, gradient).sqrt()
        first = size if first is None else first
        if (size <= SOLVED * first).all():
            break
        # As exact as the gradient is small: what squares the error.
        least = torch.minimum(size / first, torch.full_like(size, 0.5)) * size
        direction = conjugate_gradients(product, -gradient, precondition, least)
        slope = dot(direction, gradient)
        h, value, _ = line_search(problem, h, value, direction, slope, torch.ones_like(value))
    return trace


def gradient_descent(problem: Problem, h: Tensor, passes: int, report: Callable[[Trace], None]) -> Trace:
    """Until it has passed over the vocabulary so often."""
    trace, value = Trace(), problem.values(h)
    step = torch.ones_like(value)
    while not trace.passes or trace.passes[-1] < passes:
        gradient, _ = problem.curvature(h)
        trace.add(problem, h, gradient)
        report(trace)
        h, value, step = line_search(problem, h, value, -gradient, -dot(gradient, gradient), 2 * step)
    return trace


def states(real: bool, rows: int, vocab: int, width: int) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] and a head [V, D], float64: SmolLM2's on real text, or random ones like them."""
    if real:
        from tightrope.cli.bench.inputs import real_inputs

        stored = torch.load(real_inputs())
        return stored["hidden"][:rows].double(), stored["weight"].double()
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(vocab, width, generator=generator, dtype=torch.float64) * width**-0.5
    # A trained model's logits are peaked: of a standard deviation of 5.
    return 5.0 * torch.randn(rows, width, generator=generator, dtype=torch.float64), head


def teacher(logits: Tensor) -> tightrope.TopKTarget:
    """What the model thinks, softened."""
    p = torch.softmax(logits / TEMPERATURE, -1).topk(min(ENTRIES, logits.shape[1]))
    return tightrope.TopKTarget(p.indices, p.values / p.values.sum(-1, keepdim=True))


def solve(
    problem: Callable[[], Problem], hidden: Tensor, steps: int, name: str, console: Console
) -> dict[str, Trace]:
    """Newton's way, and that of gradient descent with as many passes."""
    with progress_bar(console) as progress:

        def reporting(method: str, total: int, done: Callable[[Trace], int]) -> Callable[[Trace], None]:
            task = progress.add_task(f"{name}, {method}", total=total, note="")

            def report(trace: Trace) -> None:
                note = f"|gradient| {trace.gradients[-1]:.1e}"
                progress.update(task, completed=min(done(trace), total), note=note)

            return report

        found = newton(problem(), hidden, steps, reporting("Newton", steps, lambda t: len(t.points) - 1))
        passes = found.passes[-1]
        report = reporting("gradient descent", passes, lambda t: t.passes[-1])
        return {
            "Newton": found,
            "gradient descent": gradient_descent(problem(), hidden, passes, report),
        }


def print_table(name: str, traces: dict[str, Trace], console: Console) -> None:
    """Newton's errors; the last column is near a constant where the error is squared from step to step."""
    found = traces["Newton"]
    errors = found.errors(found.points[-1])
    console.print(f"\n{name}: error of the hidden states, relative to the solution")
    console.print(
        f"{'step':>4} {'passes':>7} {'|gradient|':>11} {'error':>9} {'error / its last squared':>25}"
    )
    for i, error in enumerate(errors[:-1]):
        ratio = f"{error / errors[i - 1] ** 2:25.2g}" if i else ""
        console.print(f"{i:4} {found.passes[i]:7} {found.gradients[i]:11.1e} {error:9.1e} {ratio}")
    descent = traces["gradient descent"]
    console.print(
        f"gradient descent: {len(descent.points) - 1} steps, {descent.passes[-1]} passes, "
        f"error {descent.errors(found.points[-1])[-1]:.1e}"
    )


def plot(found: dict[str, dict[str, Trace]]) -> Figure:
    figure = Figure(figsize=(5.5 * len(found), 4.2), layout="constrained")
    for axes, (name, traces) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
        solution = traces["Newton"].points[-1]
        for method, trace in traces.items():
            # The last of Newton's is the solution that all are held against.
            last = -1 if method == "Newton" else None
            axes.plot(trace.passes[:last], trace.errors(solution)[:last], ".-", label=method)
        axes.set_yscale("log")
        axes.set_xlabel("passes over the vocabulary")
        axes.set_ylabel("error of the hidden states")
        axes.set_title(name)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("newton"), help="folder for newton.png")
    parser.add_argument(
        "--inputs", choices=("random", "real"), default="random", help="real: of SmolLM2, which takes long"
    )
    parser.add_argument("--rows", type=int, default=4, help="hidden states")
    parser.add_argument("--vocab", type=int, default=50_000, help="of random inputs")
    parser.add_argument("--width", type=int, default=64, help="of random inputs")
    parser.add_argument("--ridge", type=float, default=0.003, help="its cost at the beginning, a row's mean")
    parser.add_argument("--steps", type=int, default=40, help="of Newton's method, at most")
    args = parser.parse_args()
    real = args.inputs == "real"
    hidden, weight = states(real, args.rows, args.vocab, args.width)
    logits = hidden @ weight.t()
    target, ridge = teacher(logits), 2 * args.ridge / logits.square().sum(-1).mean().item()
    console, found = Console(highlight=False, markup=False), {}
    console.print(
        f"{'real' if real else 'random'} inputs: N {len(hidden)}, D {weight.shape[1]}, V {len(weight)}"
    )
    for name, balance in PROBLEMS.items():

        def problem(balance: float = balance) -> Problem:
            return Problem(weight, target, balance, ridge)

        found[name] = solve(problem, hidden, args.steps, name, console)
        print_table(name, found[name], console)
    args.out.mkdir(parents=True, exist_ok=True)
    plot(found).savefig(args.out / "newton.png", dpi=120)
    console.print(f"\nwritten: {args.out / 'newton.png'}")


if __name__ == "__main__":
    main()
