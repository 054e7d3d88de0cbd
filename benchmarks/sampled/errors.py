"""Errors of gradients that are not made of all columns, on real hidden states: ours, and those of a filter.

SmolLM2-135M's hidden states on the King James text, as `tightrope bench` makes them. Ours: the share of the
columns that is multiplied, and the errors of dh and dW over their norms, predicted and measured over draws,
with that of the mean of the draws, which would not shrink if there were a bias.

The filter is that of cut-cross-entropy, in plain PyTorch, since the package's runs on GPUs only. As in its
source: a block of 128 tokens and 128 classes is left out of dh and dW alike where no entry of
softmax - onehot, in float32 and before any upstream gradient or mean, reaches the threshold, a 32nd of the
input dtype's epsilon: 2^-12 in bfloat16, 2^-15 in float16. The classes are in the order of their mean logits.
Its rounding, of gradients and of their sums to the input dtype, is not emulated: these are the errors of
leaving out alone. A `filter_eps=None` leaves nothing out.

    python benchmarks/sampled/errors.py --rows 2048
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor

import tightrope
from tightrope.cli.bench.cases import REAL_DIM, REAL_VOCAB, Case
from tightrope.cli.bench.inputs import make_step

BLOCK_ROWS, BLOCK_CLASSES = 128, 128
FILTERS = {
    f"{dtype}".removeprefix("torch."): torch.finfo(dtype).eps / 32
    for dtype in (torch.bfloat16, torch.float16)
}
TEACHER = "cross-entropy of a teacher's top 64"  # that of the bench
LOSSES = {
    "cross-entropy": {},
    "0.92 cross-entropy - 0.08 entropy": {"balance": 0.08},
    "0.8 cross-entropy + 0.2 collision": {"balance": 0.2, "creativity": "collision"},
    "0.9 squared error - 0.1 entropy": {"reality": "squared_error", "balance": 0.1},
    "cross-entropy, smoothed by 0.1": {"label_smoothing": 0.1},
    TEACHER: {},
}
Gradients = tuple[Tensor, Tensor]
Target = Tensor | tightrope.TopKTarget


def ours(hidden: Tensor, weight: Tensor, target: Target, noise: float, options: dict):
    """Gradients and statistics of a call."""
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    loss, stats = tightrope.linear_reality_creativity_loss(
        *leaves, target, gradient_noise=noise, return_stats=True, **options
    )
    return torch.autograd.grad(loss, leaves), stats


def filtered(hidden: Tensor, weight: Tensor, target: Tensor, threshold: float) -> tuple[Gradients, float]:
    """Gradients of mean cross-entropy without the blocks that the filter skips; and the share it keeps."""
    order = (weight @ hidden.mean(0)).argsort()
    to_hidden, to_weight, kept = torch.zeros_like(hidden), torch.zeros_like(weight), []
    for rows in torch.arange(len(hidden)).split(BLOCK_ROWS):
        gradient = torch.softmax(hidden[rows] @ weight.t(), -1)
        gradient[torch.arange(len(rows)), target[rows]] -= 1
        blocks = gradient[:, order].split(BLOCK_CLASSES, 1)
        reached = torch.stack([block.abs().amax() >= threshold for block in blocks])
        skipped = reached.logical_not().repeat_interleave(BLOCK_CLASSES)[: len(weight)]
        gradient[:, order[skipped]] = 0
        gradient /= len(hidden)
        to_hidden[rows] = gradient @ weight
        to_weight.addmm_(gradient.t(), hidden[rows])
        kept.append(reached.float().mean().item())
    return (to_hidden, to_weight), sum(kept) / len(kept)


def errors(made: Gradients, exact: Gradients) -> list[float]:
    return [((a - b).norm() / b.norm()).item() for a, b in zip(made, exact)]


def percent(values: list[float]) -> list[str]:
    return [f"{value:.2%}" for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048, help="tokens (%(default)s)")
    parser.add_argument("--draws", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--noise", type=float, action="append", help="allowed; repeat (0.01 and 0.005)")
    args = parser.parse_args()
    case = Case("", args.rows, REAL_DIM, REAL_VOCAB, inputs="real")
    step = make_step(case)
    hidden, weight, target = step.hidden.detach(), step.weight.detach(), step.target
    taught = make_step(replace(case, scenario="distillation"))
    print(
        "| loss | noise | columns | dh predicted | measured | of mean | dW predicted | measured | of mean |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, options in LOSSES.items():
        scored = tightrope.TopKTarget(taught.target, taught.probs) if name == TEACHER else target
        exact, _ = ours(hidden, weight, scored, 0.0, options)
        for noise in args.noise or (0.01, 0.005):
            mean = [torch.zeros_like(g) for g in exact]
            squares, predicted, share = [0.0, 0.0], torch.zeros(2), 0.0
            for _ in range(args.draws):
                made, stats = ours(hidden, weight, scored, noise, options)
                for i, error in enumerate(errors(made, exact)):
                    squares[i] += error**2 / args.draws
                    mean[i] += made[i] / args.draws
                predicted += stats.sampled_noise / args.draws
                share += float(stats.sampled_share) / args.draws
            columns = zip(predicted.tolist(), [s**0.5 for s in squares], errors(mean, exact))
            cells = [cell for column in columns for cell in percent(list(column))]
            print("| " + " | ".join([name, f"{noise:g}", f"{share:.1%}", *cells]) + " |", flush=True)
        if name != "cross-entropy":
            continue
        for dtype, threshold in FILTERS.items():
            made, share = filtered(hidden, weight, target, threshold)
            to_hidden, to_weight = (f"{error:.3%}" for error in errors(made, exact))
            print(
                f"| {name}, the filter of {dtype} | | {share:.1%} of blocks | | {to_hidden} | {to_hidden} "
                f"| | {to_weight} | {to_weight} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
