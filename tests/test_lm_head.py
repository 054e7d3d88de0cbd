"""A head that is its own loss: an nn.Linear for all that wraps it, with the gradients of one process.

What FSDP, DDP and tensor parallel do to a module they do to this one; so the tests wrap a small model in each
of them, and compare with the same model in one process on all ranks' tokens.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import tightrope
from helpers import class_indices, rand, randn
from tightrope.distributed import full_weight, token_count

# Tracing an autograd.Function makes an instance of it, which torch itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
F64 = torch.float64
VOCAB, WIDTH = 13, 6


class Model(nn.Module):
    """An embedding, a layer, and a head that gives the loss."""

    def __init__(self, tied: bool = False, checkpointed: bool = False, **options):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH, dtype=F64)
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=F64)
        self.head = tightrope.LMHead(WIDTH, VOCAB, bias=not tied, dtype=F64, **options)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=i))
        if tied:
            self.head.weight = self.embedding.weight
        self.checkpointed = checkpointed

    def forward(self, tokens: Tensor, target: Tensor, **options):
        hidden = torch.tanh(self.layer(self.embedding(tokens)))
        if self.checkpointed:
            return checkpoint(self.head, hidden, target, use_reentrant=False, **options)
        return self.head(hidden, target, **options)


def data(size: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of all ranks, of which the later ones ignore more."""
    tokens = class_indices((size, 8), VOCAB, seed=20)
    target = class_indices((size, 8), VOCAB, seed=21)
    for rank in range(size):
        target[rank, : 2 * rank] = -100
    return tokens, target


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()}


def off(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference; infinite where another parameter has a gradient."""
    if actual.keys() != expected.keys():
        return float("inf")
    return max(((actual[k] - expected[k]).abs().max() / expected[k].abs().max()).item() for k in expected)


def alone(size: int, **kind) -> dict[str, Tensor]:
    """Gradients of the mean over all tokens in one process."""
    model = Model(**kind)
    model(*data(size)).backward()
    return gradients(model)


@functools.cache
def mesh_of(size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (size,))


# One process.


def test_without_a_target_it_is_a_linear_layer():
    """Would catch a parameter or a buffer that a checkpoint of an nn.Linear does not have."""
    linear = nn.Linear(WIDTH, VOCAB, bias=False)
    head = tightrope.LMHead(WIDTH, VOCAB, class_weight=rand(VOCAB), normalizer=torch.tensor(3))
    head.load_state_dict(linear.state_dict(), strict=True)
    assert head.state_dict().keys() == linear.state_dict().keys()
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    h = randn(2, 3, WIDTH)
    assert torch.equal(head(h), linear(h))


def test_options_of_a_call_stand_before_those_of_the_head():
    """Would catch an option that is dropped on the way, or a head's that cannot be replaced."""
    head = tightrope.LMHead(
        WIDTH, VOCAB, bias=True, dtype=F64, balance=0.3, class_weight=rand(VOCAB, dtype=F64)
    )
    h, target = randn(5, WIDTH, dtype=F64), class_indices((5,), VOCAB)
    loss = functools.partial(tightrope.linear_reality_creativity_loss, h, head.weight, target, head.bias)
    assert head(h, target).equal(loss(balance=0.3, class_weight=head.class_weight))
    assert head(h, target, balance=0.0, class_weight=None).equal(loss())
    assert head(h, target, reduction="none").shape == (5,)
    both = head(h, target=target, return_stats=True)
    assert isinstance(both[1], tightrope.RowStats)


def own_loss(stats, scale):
    return scale * stats.lse


def test_a_loss_of_ones_own():
    """Would catch loss_fn not reaching linear_vocab_loss, from the head or from a call."""
    h, target, scale = randn(5, WIDTH), class_indices((5,), VOCAB), rand(5)
    head = tightrope.LMHead(WIDTH, VOCAB, loss_fn=own_loss, reduction="sum")
    expected = tightrope.linear_vocab_loss(
        h, head.weight, target, own_loss, row_args=(scale,), reduction="sum"
    )
    assert head(h, target, row_args=(scale,)).equal(expected)
    assert head(h, target, loss_fn=None).equal(
        tightrope.linear_reality_creativity_loss(h, head.weight, target, reduction="sum")
    )


def test_from_linear_shares_the_parameters():
    """Would catch a copy, by which a tied embedding and its head part ways."""
    embedding, linear = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, dtype=torch.bfloat16).eval()
    assert tightrope.LMHead.from_linear(linear).weight is linear.weight
    assert tightrope.LMHead.from_linear(linear).bias is linear.bias
    assert not tightrope.LMHead.from_linear(linear).training
    linear = nn.Linear(WIDTH, VOCAB, bias=False)
    linear.weight = embedding.weight
    head = tightrope.LMHead.from_linear(linear, balance=0.2)
    assert head.weight is embedding.weight and head.bias is None
    assert "balance=0.2" in repr(head) and f"out_features={VOCAB}" in repr(head)


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tightrope.LMHead(4, 5, balanse=0.1), TypeError, "balanse"),
        (lambda: tightrope.LMHead(4, 5, balance=2.0), ValueError, "balance: got 2.0"),
        (lambda: tightrope.LMHead(4, 5, reduction="avg"), ValueError, "reduction"),
        (lambda: tightrope.LMHead(4, 5, loss_fn=own_loss, balance=0.1), TypeError, "balance"),
        (lambda: tightrope.LMHead(4, 5, loss_fn=3), TypeError, "loss_fn"),
        (lambda: tightrope.LMHead(4, 5, return_stats=True), TypeError, "expected it at each call"),
        (lambda: tightrope.LMHead(4, 5, balance=nn.Parameter(torch.tensor(0.1))), ValueError, "at each call"),
        (lambda: tightrope.LMHead.from_linear(nn.Embedding(4, 5)), TypeError, "linear: got Embedding"),
        (lambda: tightrope.LMHead.from_linear(Scaled(4, 5)), TypeError, "linear: got Scaled"),
        (
            lambda: tightrope.LMHead(4, 5)(torch.ones(4), row_weight=torch.ones(1)),
            TypeError,
            "target: got None",
        ),
    ],
)
def test_what_is_wrong_is_refused_at_once(make, error, message):
    """Would catch an option that is found wrong at the first step, or never."""
    with pytest.raises(error, match=message):
        make()


def test_checkpointing_and_compiling_change_nothing():
    """Would catch a forward that cannot be run twice or traced whole."""
    expected = alone(2)
    assert off(alone(2, checkpointed=True), expected) == 0
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(*data(2)).backward()
    assert off(gradients(model), expected) < 1e-12


# Data parallel.


def wrapped(model: Model, wrap: str) -> nn.Module:
    mesh = mesh_of(dist.get_world_size())
    if wrap == "ddp":
        return DistributedDataParallel(model)
    if wrap == "compiled unit":
        model.head.compile(fullgraph=True, backend="aot_eager")
    if "unit" in wrap:
        fully_shard(model.head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def averaged(rank: int, wrap: str, kind: dict) -> float:
    """How far the gradients of a step are from one process's."""
    size = dist.get_world_size()
    model, (tokens, target) = wrapped(Model(**kind), wrap), data(size)
    normalizer = token_count(target[rank]) / size
    model(tokens[rank], target[rank], normalizer=normalizer).backward()
    return off(gradients(model), alone(size, **kind))


WRAPPED = [
    (wrap, kind)
    for wrap in ("unit", "root", "ddp")
    for kind in ("", "tied", "checkpointed")
    if (wrap, kind) != ("unit", "tied")  # FSDP takes no parameter of two units
]


@pytest.mark.parametrize(("wrap", "kind"), [*WRAPPED, ("compiled unit", "")])
def test_data_parallel_gives_the_gradients_of_one_process(ranks, wrap, kind):
    """Would catch a head whose peers' gradients are lost, or a mean that weighs tokens by their rank."""
    assert max(ranks(2).run(averaged, wrap, {kind: True} if kind else {})) < 1e-12


def collectives(rank: int, sharded: str) -> dict[str, int]:
    """What a step sends where this part of the model alone is sharded."""
    model, (tokens, target) = Model(), data(2)
    part = model.head if sharded == "head" else model
    fully_shard(part, mesh=mesh_of(2))
    with CommDebugMode() as sent:
        model(tokens[rank], target[rank]).backward()
    return {str(name): count for name, count in sent.get_comm_counts().items()}


@pytest.mark.parametrize("sharded", ["head", "model"])
def test_a_head_is_gathered_and_reduced_once_a_step(ranks, sharded):
    """Would catch a head that is gathered again for its backward, or reduced by anything but FSDP."""
    expected = {"c10d._allgather_base_": 1, "c10d._reduce_scatter_base_": 1}
    assert ranks(2).run(collectives, sharded) == [expected] * 2


def accumulated(rank: int, convention: str) -> float:
    """How far from one process a step of two micro-batches is, of different numbers of tokens."""
    tokens, target = data(4)
    mine = slice(2 * rank, 2 * rank + 2)
    count = token_count(target[mine])
    model = Model()
    if convention == "averaged":
        model, normalizer = wrapped(model, "unit"), count / 2
        model.set_requires_gradient_sync(False)
    else:
        normalizer = count
    for i in range(2 * rank, 2 * rank + 2):
        if convention == "averaged" and i % 2:
            model.set_requires_gradient_sync(True)
        model(tokens[i], target[i], normalizer=normalizer).backward()
    if convention == "summed":
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
    return off(gradients(model), alone(4))


@pytest.mark.parametrize("convention", ["averaged", "summed"])
def test_the_mean_over_tokens_of_ranks_and_micro_batches(ranks, convention):
    """Would catch token_count counting one rank's tokens, ignored ones, or one too often."""
    assert max(ranks(2).run(accumulated, convention)) < 1e-12


def counts(rank: int) -> list[int]:
    """Of targets of each kind: a row of indices more on the second rank, of which it ignores two entries."""
    index = class_indices((1 + rank, 4), VOCAB)
    index[-1, : 2 * rank] = -100
    sparse = tightrope.TopKTarget(index.unsqueeze(-1), torch.ones(*index.shape, 1))
    kinds = [index, index.to(torch.int32), sparse, torch.ones(3, VOCAB), index.masked_fill(index < 0, 7)]
    kwargs = [{}] * 4 + [{"ignore_index": 7}]
    own = [
        int(token_count(kind, group, **more))
        for kind, more in zip(kinds, kwargs)
        for group in (None, mesh_of(2))
    ]
    return [*own, int((kinds[-1] != 7).sum())]


def test_token_counts(ranks):
    """Would catch a kind of target of which no token, or every token, is counted."""
    first, second = ranks(2).run(counts)
    assert first[:-1] == second[:-1] == [10] * 6 + [6] * 2 + [first[-1] + second[-1]] * 2
    assert token_count(torch.tensor([1, -100, 2])) == 2  # without any process group
    with pytest.raises(TypeError, match="group: got int"):
        token_count(torch.tensor([1]), 3)


# A head that is sharded when it is called.


def gathered(rank: int, how: str) -> float:
    """How far the gradient of a sharded head is from one process's, where it is gathered by hand."""
    model, mesh = Model(), mesh_of(2)
    fully_shard(model.head, mesh=mesh)
    tokens, target = data(2)
    gather = full_weight if how == "full_weight" else DTensor.full_tensor
    hidden = torch.tanh(model.layer(model.embedding(tokens)))
    tightrope.linear_reality_creativity_loss(
        hidden[rank],
        gather(model.head.weight),
        target[rank],
        gather(model.head.bias),
        normalizer=token_count(target[rank]),
    ).backward()
    return off({"head.weight": whole(model.head.weight.grad)}, {"head.weight": alone(2)["head.weight"]})


def test_a_gathered_head_keeps_the_gradients_of_its_peers(ranks):
    """Would catch full_weight losing them, as full_tensor does (if that ever stops, so may full_weight)."""
    assert max(ranks(2).run(gathered, "full_weight")) < 1e-12
    assert min(ranks(2).run(gathered, "full_tensor")) > 0.1


def outside(rank: int) -> str:
    head = fully_shard(Model().head, mesh=mesh_of(2))
    with pytest.raises(ValueError, match="weight: got placements") as raised:
        tightrope.linear_vocab_stats(randn(2, WIDTH, dtype=F64), head.weight)
    return str(raised.value)


def test_a_sharded_weight_outside_its_module_is_refused(ranks):
    """Would catch a head that is silently taken for a part of the vocabulary, or silently gathered."""
    for text in ranks(2).run(outside):
        assert "weight.to_local() with vocab_parallel=" in text and "tightrope.LMHead" in text


# Tensor parallel.


def parallel(rank: int, compiled: bool) -> float:
    """How far a step is from one process's, with the head's vocabulary over the ranks."""
    model = Model()
    parallelize_module(model.head, mesh_of(2), ColwiseParallel(output_layouts=Replicate()))
    if compiled:
        model.head.compile(fullgraph=True, backend="aot_eager")
    model(*data(2)).backward()
    return off(gradients(model), alone(2))


@pytest.mark.parametrize("compiled", [False, True])
def test_tensor_parallel_gives_the_gradients_of_one_process(ranks, compiled):
    """Would catch a target that the hook drops, a head that is a part taken for all, a gradient twice."""
    assert max(ranks(2).run(parallel, compiled)) < 1e-12


def sequences_cut(rank: int) -> float:
    """The same of a compiled head that is given DTensors, whose sequences are cut over its ranks."""
    model, mesh = Model(), mesh_of(2)
    parallelize_module(model.head, mesh, ColwiseParallel(use_local_output=False))
    tokens, target = data(2)
    hidden = torch.tanh(model.layer(model.embedding(tokens)))
    hidden, target = (
        distribute_tensor(x, mesh, [Shard(1)], src_data_rank=None) for x in (hidden.detach(), target)
    )
    # Its forward: the hook of ColwiseParallel would gather them.
    torch.compile(model.head.forward, fullgraph=True, backend="aot_eager")(hidden, target).backward()
    return off({"head.weight": whole(model.head.weight.grad)}, {"head.weight": alone(2)["head.weight"]})


def test_a_compiled_head_with_sequences_cut(ranks):
    """Would catch a sum over ranks that a graph leaves out, as a local mean."""
    assert max(ranks(2).run(sequences_cut)) < 1e-12
