"""One problem, run by one process and by ranks that hold its vocabulary together.

A `Trial` names everything by words and numbers, so that each rank makes the same tensors by itself. The truth
is the same call without `vocab_parallel` in this process: what that is worth, the other tests say. What is
compared is the loss, the statistics and every gradient, put together from the ranks' parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

import tightrope
from helpers import class_indices, rand, randn, top_k, upstream_of

F64 = torch.float64
PER_TOKEN = ("balance", "row_weight", "temperature", "scale")  # scale: of a user's loss


@dataclass(frozen=True)
class Trial:
    sizes: tuple[int, ...]  # rows of each rank's head; what is beyond vocab is padding
    vocab: int = 29
    rows: str = "replicated"
    tokens: tuple[int, ...] = (13,)  # sharded: of each rank
    width: int = 5
    target: str = "index"
    function: str = "loss"  # "own", "stats", "logits"
    leaves: tuple[str, ...] = ("input", "weight", "bias")  # that require grad
    without: tuple[str, ...] = ()  # of input, weight and bias: "bias"
    tensors: tuple[str, ...] = ()  # of PER_TOKEN, "class_weight", "classes"
    options: dict = field(default_factory=dict)
    given: bool = True  # start and vocab_size
    dtype: torch.dtype = F64
    hostile: str = ""
    ignored: float = 0.2


def own_loss(stats: tightrope.RowStats, scale: Tensor | None = None) -> Tensor:
    """Of every statistic there is something in it."""
    loss = (stats.lse - 0.3 * stats.entropy + stats.collision).square() + 0.1 * stats.logit_square_sum
    if stats.target_prob is not None:
        loss = loss - stats.target_prob.sqrt() * stats.target_log_prob
    if stats.support_entropy is not None:
        loss = loss - stats.support_entropy - 0.2 * stats.support_log_mass
    return loss if scale is None else loss * scale


def whole(trial: Trial) -> dict[str, object]:
    """All tensors of a trial, as one process has them."""
    rows = sum(trial.tokens) if trial.rows == "sharded" else trial.tokens[0]
    vocab, dtype = trial.vocab, trial.dtype
    made = {
        "input": randn(rows, trial.width, seed=1, dtype=F64),
        "weight": randn(vocab, trial.width, seed=2, dtype=F64),
        "bias": randn(vocab, seed=3, dtype=F64),
        "balance": 0.3 * rand(rows, seed=4),
        "row_weight": rand(rows, seed=5) + 0.5,
        "temperature": rand(rows, seed=6) + 0.5,
        "scale": rand(rows, seed=7),
    }
    _be_hostile(trial, made)
    made = {name: value.to(dtype) for name, value in made.items() if name not in trial.without}
    made["class_weight"] = rand(vocab, seed=8) + 0.1
    made["classes"] = torch.randint(vocab, (rows, 4), generator=torch.Generator().manual_seed(9))
    made["upstream"] = upstream_of(torch.empty(rows, dtype=F64))  # of the losses of tokens
    if trial.target == "index":
        made["target"] = _reachable(trial, class_indices((rows,), vocab, seed=10, ignored=trial.ignored))
    elif trial.target == "topk":
        made["target"] = top_k((rows,), vocab, seed=10, dtype=F64)
    elif trial.target == "dense":
        made["target"] = torch.softmax(randn(rows, vocab, seed=10, dtype=F64), -1)
    elif trial.target == "teacher":
        hidden, weight = randn(rows, 3, seed=10, dtype=F64), randn(vocab, 3, seed=11, dtype=F64)
        bias = randn(vocab, seed=12, dtype=F64)
        made["target"] = tightrope.TeacherTarget(hidden, weight, bias, logit_scale=1.5, softcap=3.0)
    else:
        made["target"] = None
    return made


def _reachable(trial: Trial, target: Tensor) -> Tensor:
    """The target among the classes that a hostile problem leaves any probability."""
    first = trial.sizes[0]
    if trial.hostile == "impossible shard":
        return torch.where(target < 0, target, first + target % (trial.vocab - first))
    if trial.hostile in ("apart", "sentinel") and first:
        return torch.where(target < 0, target, target % first)
    return target


def _be_hostile(trial: Trial, made: dict[str, Tensor]) -> None:
    first = trial.sizes[0]
    if trial.hostile == "offset":
        made["bias"] += 1e4
    elif trial.hostile == "negative offset":
        made["bias"] -= 1e4
    elif trial.hostile == "apart":  # one shard far above the others
        made["bias"][first:] -= 1e4
    elif trial.hostile == "peaked":
        made["weight"] *= 40
    elif trial.hostile == "impossible shard":
        made["bias"][:first] = -torch.inf
    elif trial.hostile == "sentinel":
        made["bias"][first:] = torch.finfo(trial.dtype).min
    elif trial.hostile == "equal maxima":  # a class of the first shard and one of the last
        made["bias"][[0, -1]] = 50.0
        made["weight"][[0, -1]] = 0.0


def call(trial: Trial, part: dict[str, object], options: dict) -> dict[str, Tensor]:
    """The call, and the gradients of its result: by name, "loss", statistics and leaves."""
    leaves = {}
    for name in ("input", "weight", "bias", *trial.tensors):
        if name in part:
            value = part[name].detach().clone()
            if name in trial.leaves:
                leaves[name] = value = value.requires_grad_()
            part = {**part, name: value}
    options = {**trial.options, **options}
    for name in ("balance", "row_weight", "temperature", "class_weight"):
        if name in trial.tensors:
            options[name] = part[name]
    if "classes" in trial.tensors:
        options["support"] = tightrope.Classes(part["classes"])
    head, target = (part["input"], part["weight"]), part["target"]
    if trial.function == "loss":
        loss, stats = tightrope.linear_reality_creativity_loss(
            *head, target, part.get("bias"), return_stats=True, **options
        )
    elif trial.function == "own":
        args = (part["scale"],) if "scale" in trial.tensors else ()
        loss, stats = tightrope.linear_vocab_loss(
            *head, target, own_loss, part.get("bias"), row_args=args, return_stats=True, **options
        )
    elif trial.function == "logits":
        logits = torch.nn.functional.linear(*head, part.get("bias"))
        loss, stats = tightrope.reality_creativity_loss(logits, target, return_stats=True, **options)
    else:
        stats = tightrope.linear_vocab_stats(*head, target, part.get("bias"), **options)
        loss = own_loss(stats)
    upstream = part["upstream"].to(loss.dtype) if loss.dim() else torch.full_like(loss, 0.75)
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream)
    fields = {f"stats.{k}": v.detach() for k, v in stats._asdict().items() if v is not None}
    return {"loss": loss.detach(), **fields, **dict(zip(leaves, grads))}


def normalized(trial: Trial) -> dict[str, float]:
    """A mean over all ranks' tokens has one divisor."""
    means = trial.function != "stats" and trial.options.get("reduction", "mean") == "mean"
    return {"normalizer": 7.0} if means and trial.rows == "sharded" else {}


def alone(trial: Trial, exactly: bool = False) -> dict[str, Tensor]:
    """What one process gives; exactly: in float64, for the very values of the trial's dtype."""
    made = whole(trial)
    if exactly:
        narrow = {k for k, v in made.items() if isinstance(v, Tensor) and v.dtype == trial.dtype}
        made = {k: v.double() if k in narrow else v for k, v in made.items()}
    return call(trial, made, normalized(trial))


def tokens_of(trial: Trial, rank: int) -> slice:
    """The tokens of a rank, among all."""
    if trial.rows == "replicated":
        return slice(None)
    first = sum(trial.tokens[:rank])
    return slice(first, first + trial.tokens[rank])


def part_of(trial: Trial, rank: int) -> dict[str, object]:
    """What a rank has of all tensors."""
    made, part = whole(trial), {}
    start, size = sum(trial.sizes[:rank]), trial.sizes[rank]
    beyond, mine = sum(trial.sizes) - trial.vocab, tokens_of(trial, rank)
    for name, value in made.items():
        if name in ("weight", "bias"):
            # Padding is never looked at.
            filling = value.new_full((beyond, *value.shape[1:]), torch.nan)
            part[name] = torch.cat([value, filling])[start : start + size]
        elif name == "target" and isinstance(value, tightrope.TopKTarget):
            part[name] = tightrope.TopKTarget(value.indices[mine], value.probs[mine])
        elif name == "target" and trial.target == "teacher":
            filling = value.weight.new_full((beyond, 4), torch.nan)
            own = torch.cat([value.weight, filling[:, 1:]])[start : start + size]
            bias = torch.cat([value.bias, filling[:, 0]])[start : start + size]
            part[name] = replace(value, hidden=value.hidden[mine], weight=own, bias=bias)
        elif name == "target" and trial.target == "dense" and trial.rows == "replicated":
            filling = value.new_full((value.shape[0], beyond), torch.nan)
            part[name] = torch.cat([value, filling], 1)[:, start : start + size]
        elif name == "class_weight" or value is None:
            part[name] = value
        else:
            part[name] = value[mine]
    return part


def parallel(trial: Trial, rank: int) -> tightrope.VocabParallel:
    group = dist.group.WORLD
    if trial.given:
        start = sum(trial.sizes[:rank])
        return tightrope.VocabParallel(group, trial.vocab, start, trial.rows)
    return tightrope.VocabParallel(group, rows=trial.rows)


def on_rank(trial: Trial, rank: int) -> dict[str, Tensor]:
    """What a rank gives: its own part."""
    options = {"vocab_parallel": parallel(trial, rank), **normalized(trial)}
    return call(trial, part_of(trial, rank), options)


def of_rank(trial: Trial, rank: int, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of one process's results a rank should have; padding has gradients of zero."""
    start, size = sum(trial.sizes[:rank]), trial.sizes[rank]
    beyond, mine = sum(trial.sizes) - trial.vocab, tokens_of(trial, rank)
    expected = {}
    for name, value in results.items():
        if name in ("weight", "bias"):
            padded = torch.cat([value, value.new_zeros(beyond, *value.shape[1:])])
            expected[name] = padded[start : start + size]
        else:
            expected[name] = value[mine] if value.dim() else value
    return expected


def differences(trial: Trial, rank: int, rtol: float = 1e-12) -> list[str]:
    """What is wrong with a rank's results, in words; nothing where all of it is right.

    Relative to the largest element of each tensor.
    """
    actual, wrong = on_rank(trial, rank), []
    expected = of_rank(trial, rank, alone(trial))
    if trial.rows == "sharded" and not actual["loss"].dim():
        dist.all_reduce(actual["loss"])
    if actual.keys() != expected.keys():
        wrong.append(f"rank {rank} has {sorted(actual)}, expected {sorted(expected)}")
    for name in actual.keys() & expected.keys():
        have, want = actual[name].double(), expected[name].double()
        if have.shape != want.shape:
            wrong.append(f"{name}: shape {list(have.shape)}, expected {list(want.shape)}")
            continue
        error = torch.where(have == want, 0.0, (have - want).abs())
        size = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 1.0
        if error.numel() and not error.max() <= rtol * max(size, 1e-3):
            wrong.append(f"{trial}: rank {rank}, {name}: off by {error.max().item():.2e} of {size:.2e}")
    return wrong
