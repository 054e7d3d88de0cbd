"""Ways to share one step of the loss among processes, and what is measured of one, in such a process.

All ways score the same N tokens under the same head, so their times compare, and all are held to one loss in
float64. Memory comes first, while the process is fresh; then the way and `VocabParallel` with replicated rows
take turns. A round takes as long as its slowest rank.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import tightrope

from ..probe import peak_bytes
from . import process
from .cases import DTYPES, LOSSES, Case, Loss
from .figures import ratio, spread
from .inputs import Step, make_step
from .measure import give_back_free_memory, in_turns
from .traffic import Traffic


@dataclass(frozen=True)
class Rank:
    """A process among those that share a step."""

    rank: int
    ranks: int
    threads: int  # of this machine
    device: str

    def share(self, total: int) -> tuple[int, int]:
        """What of so many is this rank's: even parts, the last ones smaller or empty."""
        size = -(-total // self.ranks)
        return min(self.rank * size, total), min((self.rank + 1) * size, total)

    def slowest(self, value: float) -> float:
        """The largest value of all ranks, which have met then."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def sum(self, value: float) -> float:
        return self._reduced(value, dist.ReduceOp.SUM)

    def _reduced(self, value: float, op: dist.ReduceOp) -> float:
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op)
        return tensor.item()


@dataclass(frozen=True)
class Shared:
    """A rank's part of a step: forward and backward, which gives a loss; leaves, whose gradients it leaves.

    weight: the mean loss of all tokens is the sum of the ranks' losses times this.
    """

    work: Callable[[], Tensor]
    leaves: list[Tensor]
    weight: float

    def forget_gradients(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


def _loss(step: Step, loss: Loss, **options: object) -> Tensor:
    return tightrope.linear_reality_creativity_loss(
        step.hidden, step.weight, step.target, balance=loss.balance, reality=loss.reality, **options
    )


def _stepped(value: Tensor) -> Tensor:
    value.backward()
    return value.detach()


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def _ours(mode: str, whole: Step, rank: Rank, loss: Loss) -> Shared:
    start, stop = rank.share(len(whole.weight))
    own = whole.rows(*rank.share(len(whole.hidden))) if mode == "sharded" else whole
    step = replace(own, hidden=_leaf(own.hidden), weight=_leaf(whole.weight[start:stop]))
    parallel = tightrope.VocabParallel(dist.group.WORLD, len(whole.weight), start, mode)
    options = {"normalizer": whole.normalizer, "vocab_parallel": parallel}
    return Shared(
        lambda: _stepped(_loss(step, loss, **options)),
        [step.hidden, step.weight],
        1.0 if mode == "sharded" else 1 / rank.ranks,
    )


def replicated(whole: Step, rank: Rank, loss: Loss) -> Shared:
    return _ours("replicated", whole, rank, loss)


def sharded(whole: Step, rank: Rank, loss: Loss) -> Shared:
    return _ours("sharded", whole, rank, loss)


class _Head(nn.Linear):
    """A head whose forward is the loss: what FSDP2 gathers it for."""

    def forward(self, step: Step, loss: Loss, normalizer: float) -> Tensor:
        return _loss(replace(step, weight=self.weight), loss, normalizer=normalizer)


def fsdp(whole: Step, rank: Rank, loss: Loss) -> Shared:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    vocab, dim = whole.weight.shape
    head = _Head(dim, vocab, bias=False, device=whole.weight.device, dtype=whole.weight.dtype)
    with torch.no_grad():
        head.weight.copy_(whole.weight)
    fully_shard(head, mesh=_mesh(rank), mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    own = whole.rows(*rank.share(len(whole.hidden)))
    step = replace(own, hidden=_leaf(own.hidden), weight=None)
    normalizer = whole.normalizer / rank.ranks  # it averages the gradients over the ranks
    leaves = [step.hidden, *head.parameters()]
    return Shared(lambda: _stepped(head(step, loss, normalizer)), leaves, 1 / rank.ranks)


def loss_parallel(whole: Step, rank: Rank, loss: Loss) -> Shared:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, parallel

    mesh, hidden, target = _mesh(rank), _leaf(whole.hidden), whole.target
    weight = nn.Parameter(distribute_tensor(whole.weight.detach(), mesh, [Shard(0)]))

    def work() -> Tensor:
        logits = F.linear(DTensor.from_local(hidden, mesh, [Replicate()], run_check=False), weight)
        with parallel.loss_parallel():
            value = F.cross_entropy(logits.float(), target, reduction="sum") / whole.normalizer
            return _stepped(value).to_local()

    return Shared(work, [hidden, weight], 1 / rank.ranks)


def alone(whole: Step, rank: Rank, loss: Loss) -> Shared:
    if rank.rank:
        return Shared(lambda: torch.zeros(()), [], 1.0)
    step = replace(whole, hidden=_leaf(whole.hidden), weight=_leaf(whole.weight))
    few = torch.get_num_threads()

    def work() -> Tensor:
        torch.set_num_threads(rank.threads)
        try:
            return _stepped(_loss(step, loss, normalizer=whole.normalizer))
        finally:
            torch.set_num_threads(few)

    return Shared(work, [step.hidden, step.weight], 1.0)


def _mesh(rank: Rank) -> DeviceMesh:
    return init_device_mesh(rank.device, (rank.ranks,))


@dataclass(frozen=True)
class Way:
    """A way to share a step. mode: of `VocabParallel`, whose bytes are estimated; the others' are counted."""

    share: Callable[[Step, Rank, Loss], Shared]
    says: str
    mode: str | None = None
    entropy: bool = True  # whether it has the entropy term; else it is compared on cross-entropy alone

    def loss_compared(self, loss: Loss) -> Loss:
        return loss if self.entropy else LOSSES["cross-entropy"]


WAYS = {
    "tightrope replicated": Way(
        replicated, "VocabParallel: the head is shared, every rank has all tokens", "replicated"
    ),
    "tightrope sharded": Way(
        sharded, "VocabParallel: the head is shared, every rank has tokens of its own", "sharded"
    ),
    "FSDP2": Way(fsdp, "fully_shard gathers the head for Tightrope's loss of the rank's own tokens"),
    "loss_parallel": Way(
        loss_parallel, "torch's, with a DTensor head Shard(0); every rank has all tokens", entropy=False
    ),
    "one process": Way(alone, "Tightrope on one rank, with the threads of all; the others wait"),
}


# In a process that shares a step


def measure(
    rank: int, ranks: int, store: str, name: str, case: Case, loss: Loss, truths: str, budget: float
) -> dict[str, float]:
    """The figures of a way, the same on each of the ranks."""
    warnings.simplefilter("ignore")  # the peers' own; what fails raises
    me = Rank(rank, ranks, torch.get_num_threads(), case.device)
    if case.device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, me.threads // ranks))
    dist.init_process_group(
        "nccl" if case.device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=process.SECONDS),
    )
    try:
        return _figures(me, WAYS[name], case, loss, torch.load(truths)[loss.name]["loss"], budget)
    finally:
        dist.destroy_process_group()


def _figures(me: Rank, way: Way, case: Case, loss: Loss, truth: float, budget: float) -> dict[str, float]:
    for share in (replicated, way.share):  # loads code; of so few entries that no buffer is left behind
        share(make_step(replace(case, rows=8, vocab=64)), me, loss).work()
    shared = way.share(make_step(case), me, loss)
    memory, value = _first_step(shared, case.device)
    mean = me.sum(value.item()) * shared.weight
    shared.forget_gradients()
    with Traffic(me.ranks) as seen:
        shared.work()
    calls, sent = sum(seen.calls.values()), sum(seen.bytes.values())
    if way.mode is not None:
        cost = estimated(way.mode, case, me.ranks)
        calls, sent = cost.calls, cost.bytes
    works = {"ours": replicated(make_step(case), me, loss), "way": shared}
    works["ours"].work()
    seconds = _take_turns(works, me, budget)
    return {
        "ms": 1e3 * statistics.median(seconds["way"]),
        "spread": spread(seconds["way"]),
        "x_ours": ratio(seconds["way"], seconds["ours"]),
        "rounds": len(seconds["way"]),
        "collectives": me.slowest(calls),
        "sent_mb": me.slowest(sent) / 1e6,
        "memory_mb": me.slowest(memory) / 1e6,
        "loss_error": abs(mean - truth) / max(abs(truth), 1e-30),
    }


def _first_step(shared: Shared, device: str) -> tuple[int, Tensor]:
    """Peak bytes of a step beyond its inputs, gradients included; its loss."""
    value = None

    def work() -> None:
        nonlocal value
        value = shared.work()

    if device == "cpu":
        gc.collect()
        give_back_free_memory()
        return peak_bytes(work), value
    work()  # a GPU's libraries keep memory from their first step on
    shared.forget_gradients()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, value


def estimated(mode: str, case: Case, ranks: int) -> tightrope.distributed.Estimate:
    shares = [Rank(rank, ranks, 0, case.device).share(case.rows) for rank in range(ranks)]
    return tightrope.distributed.estimate(
        ranks=ranks,
        rows=[stop - start for start, stop in shares] if mode == "sharded" else case.rows,
        hidden=case.dim,
        vocab_size=case.vocab,
        mode=mode,
        dtype=DTYPES[case.dtype],
        device=case.device,
    )


def _take_turns(works: dict[str, Shared], me: Rank, budget: float) -> dict[str, list[float]]:
    """Seconds of the slowest rank, of each work in each round; the first round says how many there are."""

    def timed(shared: Shared) -> float:
        shared.forget_gradients()
        me.slowest(0.0)
        begin = _now(me.device)
        shared.work()
        return me.slowest(_now(me.device) - begin)

    return in_turns(works, timed, budget)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
