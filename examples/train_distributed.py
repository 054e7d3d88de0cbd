"""SmolLM2's last blocks and head, trained on real text by several processes in four ways.

    torchrun --nproc-per-node 2 examples/train_distributed.py

One process first trains on whole batches. Then all of them do it together by DDP, by FSDP2, with the head's
vocabulary over the ranks and the same tokens on each (tensor parallel), and with that and tokens of their own
(sharded rows). The mean over the tokens that count is the same in all four, so the losses must be too, step
by step; the ranks' numbers of such tokens differ. What is above "the four ways" is any training script.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tightrope
from tightrope.cli import data, model
from tightrope.distributed import token_count

IGNORED = -100
LOSS = {"balance": 0.1, "creativity": "support_entropy"}
# Losses of different sums of the same float32 numbers, after some steps of training on each.
AGREE = 1e-3


class Trained(nn.Module):
    """A model whose last blocks and head train: forward is the loss."""

    def __init__(self, network: nn.Module, blocks: int):
        super().__init__()
        model.train_blocks(network, blocks)
        self.body = network.base_model
        self.head = tightrope.LMHead.from_linear(network.get_output_embeddings(), **LOSS)
        # A tied head's gradient would go to the frozen embedding too.
        self.head.weight = nn.Parameter(self.head.weight.detach().clone())

    def forward(self, windows: Tensor, target: Tensor, **options) -> Tensor:
        return self.head(self.body(windows, use_cache=False)[0], target, **options)


def targets_of(windows: Tensor) -> Tensor:
    """The next token of each position. The first quarter of every other window is a prompt, and ignored."""
    targets = torch.cat([windows[:, 1:], windows.new_full((len(windows), 1), IGNORED)], 1)
    targets[::2, : windows.shape[1] // 4] = IGNORED
    return targets


def train(
    module: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    after_backward: Callable[[], None] = lambda: None,
    whole: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> list[float]:
    """The loss of each step. whole: from a rank's loss that of all tokens."""
    optimizer, losses = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-4), []
    for windows, target in batches:
        loss = loss_of(windows, target)
        loss.backward()
        after_backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(whole(loss.detach()).item())
    return losses


# --- the four ways ----------------------------------------------------------------------------------------


def averaged(loss: Tensor) -> Tensor:
    return summed(loss) / dist.get_world_size()


def summed(loss: Tensor) -> Tensor:
    dist.all_reduce(loss)
    return loss


def by_ddp(module: Trained, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """DDP averages gradients over ranks: divide by the mean number of tokens."""
    replica = DistributedDataParallel(module)

    def loss_of(windows: Tensor, target: Tensor) -> Tensor:
        return replica(windows, target, normalizer=token_count(target) / dist.get_world_size())

    return train(replica, batches, loss_of, whole=averaged)


def by_fsdp(module: Trained, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """So does FSDP. The head is a unit of its own: gathered for its forward, reduced after its backward."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (module.head, module):
        fully_shard(part, mesh=mesh)

    def loss_of(windows: Tensor, target: Tensor) -> Tensor:
        return module(windows, target, normalizer=token_count(target) / dist.get_world_size())

    return train(module, batches, loss_of, whole=averaged)


def with_part_of_the_head(module: Trained, rows: str) -> None:
    """Each rank keeps its rows of the head; the last has fewer where the vocabulary does not divide."""
    head = module.head
    size = -(-head.out_features // dist.get_world_size())
    start = min(dist.get_rank() * size, head.out_features)
    part = head.weight.detach()[start : start + size].clone()
    parallel = tightrope.VocabParallel(dist.group.WORLD, head.out_features, start, rows)
    module.head = tightrope.LMHead(head.in_features, len(part), vocab_parallel=parallel, **LOSS)
    module.head.weight = nn.Parameter(part)


def by_tensor_parallel(module: Trained, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """All ranks have all tokens, and the same loss; the gradient of the hidden states is whole on each."""
    with_part_of_the_head(module, "replicated")
    return train(module, batches, module)


def by_sharded_rows(module: Trained, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """A rank's loss is of its tokens. The head's gradient is of their sum; the blocks' are summed here."""
    with_part_of_the_head(module, "sharded")
    blocks = [p for p in module.body.parameters() if p.requires_grad]

    def loss_of(windows: Tensor, target: Tensor) -> Tensor:
        return module(windows, target, normalizer=token_count(target))

    def sum_blocks() -> None:
        for parameter in blocks:
            dist.all_reduce(parameter.grad)

    return train(module, batches, loss_of, sum_blocks, summed)


WAYS = {
    "DDP": (by_ddp, True),
    "FSDP2": (by_fsdp, True),
    "tensor parallel": (by_tensor_parallel, False),
    "sharded rows": (by_sharded_rows, True),
}


# --- data and report --------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> tuple[Callable[[], Trained], list[tuple[Tensor, Tensor]]]:
    """What makes a module to train, and each step's windows with their targets."""
    network, tokenizer = model.load(args.model)
    text = data.read_text(args.text)[: 60 * args.steps * args.batch * args.length]
    windows = data.make_windows(tokenizer, text, length=args.length, batch_size=args.batch).train
    windows = windows[: args.steps * args.batch]
    if len(windows) < args.steps * args.batch:
        raise SystemExit(f"--steps: got {args.steps}, the text has windows for {len(windows) // args.batch}")
    module = Trained(network, args.blocks)
    return lambda: deepcopy(module), [(part, targets_of(part)) for part in windows.split(args.batch)]


def mine(batches: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's windows of each batch: the longer part is the first rank's where they do not divide."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for windows, target in batches:
        yield windows[rank::size], target[rank::size]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model's folder; default SmolLM2-135M")
    parser.add_argument("--text", type=Path, help="UTF-8 text; default the King James text")
    parser.add_argument("--steps", type=int, default=6, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="windows a step, of all ranks (%(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a window (%(default)s)")
    parser.add_argument(
        "--blocks", type=int, default=2, help="blocks that train, beside the head (%(default)s)"
    )
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if args.batch < size:
        raise SystemExit(f"--batch: got {args.batch}, expected at least {size}, a window for each rank")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))

    def say(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    fresh, batches = prepare(args)
    counts = [int((target != IGNORED).sum()) for _, target in mine(batches)]
    say(f"{size} processes; rank 0 has {counts} of {[int((t != IGNORED).sum()) for _, t in batches]} tokens")
    alone = fresh()
    expected = train(alone, batches, alone)
    say("one process      " + " ".join(f"{loss:.5f}" for loss in expected))
    failed = False
    for name, (way, has_part) in WAYS.items():
        losses = way(fresh(), list(mine(batches)) if has_part else batches)
        off = max(abs(a - b) for a, b in zip(losses, expected))
        failed |= not off <= AGREE
        say(f"{name:17}" + " ".join(f"{loss:.5f}" for loss in losses) + f"   within {off:.1e}")
    say("the losses do NOT agree" if failed else "the losses agree")
    dist.destroy_process_group()
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
