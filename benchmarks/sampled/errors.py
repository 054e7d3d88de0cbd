"""Errors of gradients that are not made of all columns, on real hidden states: ours, and those of a filter.

SmolLM2-135M's hidden states on the King James text, as `tightrope bench` makes them. Ours: the share of the
columns that is multiplied, and the errors of dh and dW over their norms, predicted and measured over draws,
with that of the mean of the draws, which would not shrink if there were a bias.

The filter is that of cut-cross-entropy, in plain PyTorch, for the package's runs on GPUs only: what it skips
are blocks of tokens and classes in which no entry of the softmax's gradient reaches 2^-12, with the classes
in the order of their mean logits. Block size and threshold are those of its source; its arithmetic, bfloat16,
is not emulated.

    python benchmarks/sampled/errors.py --rows 2048
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import tightrope
from tightrope.cli.bench import inputs

FILTER, BLOCK_ROWS, BLOCK_CLASSES = 2.0**-12, 128, 128
LOSSES = {
    "cross-entropy": {},
    "0.92 cross-entropy - 0.08 entropy": {"balance": 0.08},
    "0.8 cross-entropy + 0.2 collision": {"balance": 0.2, "creativity": "collision"},
}
Gradients = tuple[Tensor, Tensor]


def ours(hidden: Tensor, weight: Tensor, target: Tensor, noise: float, options: dict):
    """Gradients and statistics of a call."""
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    loss, stats = tightrope.linear_reality_creativity_loss(
        *leaves, target, gradient_noise=noise, return_stats=True, **options
    )
    return torch.autograd.grad(loss, leaves), stats


def filtered(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Gradients, float]:
    """Gradients of mean cross-entropy without the blocks that the filter skips; and the share it keeps."""
    order = (weight @ hidden.mean(0)).argsort(descending=True)
    to_hidden, to_weight, kept = torch.zeros_like(hidden), torch.zeros_like(weight), []
    for rows in torch.arange(len(hidden)).split(BLOCK_ROWS):
        gradient = torch.softmax(hidden[rows] @ weight.t(), -1)
        gradient[torch.arange(len(rows)), target[rows]] -= 1
        blocks = gradient[:, order].split(BLOCK_CLASSES, 1)
        reached = torch.stack([block.abs().amax() >= FILTER for block in blocks])
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
    data = torch.load(inputs.real_inputs())
    hidden, target = data["hidden"][: args.rows].float(), data["target"][: args.rows]
    weight = data["weight"].float()
    print(
        "| loss | noise | columns | dh predicted | measured | of mean | dW predicted | measured | of mean |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, options in LOSSES.items():
        exact, _ = ours(hidden, weight, target, 0.0, options)
        for noise in args.noise or (0.01, 0.005):
            mean = [torch.zeros_like(g) for g in exact]
            squares, predicted, share = [0.0, 0.0], torch.zeros(2), 0.0
            for _ in range(args.draws):
                made, stats = ours(hidden, weight, target, noise, options)
                for i, error in enumerate(errors(made, exact)):
                    squares[i] += error**2 / args.draws
                    mean[i] += made[i] / args.draws
                predicted += stats.sampled_noise / args.draws
                share += float(stats.sampled_share) / args.draws
            columns = zip(predicted.tolist(), [s**0.5 for s in squares], errors(mean, exact))
            cells = [cell for column in columns for cell in percent(list(column))]
            print("| " + " | ".join([name, f"{noise:g}", f"{share:.1%}", *cells]) + " |", flush=True)
        if not options:
            made, share = filtered(hidden, weight, target)
            to_hidden, to_weight = percent(errors(made, exact))
            print(
                f"| {name}, the filter | | {share:.1%} of blocks | | {to_hidden} | {to_hidden} "
                f"| | {to_weight} | {to_weight} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
