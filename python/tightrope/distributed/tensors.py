"""DTensors in and out: their placements say who holds what of the vocabulary, and who has which tokens.

A call is unwrapped, run on what is here by our own exchange, and its result is wrapped again: it means what
it means in one process that has all of the tokens. Every gradient gets explicit placements, as nothing but a
call's layout tells them: where each rank has tokens of its own, what it finds for a tensor that is the same
everywhere is one part of a sum. Beside DTensors a plain tensor is the whole, alike on all ranks.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .. import target_checks, validation
from ..arguments import ShardArguments
from ..statistics import OF_CALL, RowStats
from ..support import Classes
from ..targets import TeacherTarget, TopKTarget
from . import collectives
from .layout import Agreement, VocabParallel

PER_TOKEN = ("balance", "row_weight", "temperature")
_REMEDIES = (
    "for tensor parallel pass a DTensor as input, or weight.to_local() with vocab_parallel=; for FSDP call "
    "inside the forward of the module that owns the head, such as tightrope.LMHead"
)
_Placements = tuple[Placement, ...]


def run(
    function: Callable,
    signature: inspect.Signature,
    names: tuple[str, ...],
    args: tuple,
    options: dict[str, object],
) -> object:
    """What a public function gives for DTensors; args and options as it was called with."""
    if not torch.compiler.is_compiling():  # which cannot look into it
        signature.bind(*args, **options)  # raises what the function would
    arguments = {**dict(zip(names, args)), **options}
    layout = Layout.of_logits(**arguments) if "logits" in arguments else Layout.of_head(**arguments)
    with contextlib.ExitStack() as joins:
        others = [joins.enter_context(Agreement(VocabParallel(group))) for group in layout.other_groups()]
        ranks = joins.enter_context(layout.ranks(others))
        result = function(**layout.parts(arguments), vocab_parallel=ranks)
    return layout.joined(result, arguments.get("reduction", "mean"))


@dataclass(frozen=True)
class Layout:
    """How the vocabulary and the tokens of a call lie on a mesh."""

    owner: str  # the argument that has the tokens
    mesh: DeviceMesh
    device: torch.device
    tokens: torch.Size  # of all ranks
    rows: _Placements  # Shard(i) where the mesh cuts the tokens' dimension i, else Replicate
    vocab: int | None  # the mesh dimension that cuts the vocabulary
    vocab_size: int
    head: _Placements  # of the weight and its bias; of the logits

    @classmethod
    def of_head(cls, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: object) -> Layout:
        if not isinstance(weight, DTensor):
            raise ValueError(
                "weight: got a plain tensor with a DTensor as input, expected a DTensor on the same mesh, or "
                "input.to_local()"
            )
        head, mesh = weight.placements, weight.device_mesh
        cut = [i for i, placement in enumerate(head) if not placement.is_replicate()]
        strided = any(type(head[i]).__name__ == "_StridedShard" for i in cut)
        if not strided and any(type(head[i]) is not Shard or head[i].dim != 0 for i in cut):
            raise ValueError(
                f"weight: got placements {list(head)}, expected Shard(dim=0) on one mesh dimension at most, "
                "and Replicate() on the others"
            )
        if strided or len(cut) > 1 or (cut and not isinstance(input, DTensor)):
            kind = "DTensor" if isinstance(input, DTensor) else "plain tensor"
            raise ValueError(
                f"weight: got placements {list(head)} with a {kind} as input, which does not say what the "
                f"ranks share; expected one of these: {_REMEDIES}"
            )
        if not isinstance(input, DTensor):
            raise ValueError(
                "input: got a plain tensor with a DTensor as weight, expected a DTensor on the same mesh, or "
                "weight.to_local()"
            )
        if bias is not None and not isinstance(bias, DTensor):
            raise ValueError(
                "bias: got a plain tensor with a DTensor as weight, expected a DTensor on the same mesh"
            )
        _same_mesh("input", input, mesh)
        _refuse_placements("input", input, lambda p: p.dim < input.dim() - 1, "Shard of a token dimension")
        tokens = input.shape[:-1]
        vocab = cut[0] if cut else None
        return cls("input", mesh, input.device, tokens, input.placements, vocab, weight.shape[0], head)

    @classmethod
    def of_logits(cls, logits: Tensor, **_: object) -> Layout:
        if not isinstance(logits, DTensor):
            raise ValueError(
                "logits: got a plain tensor with a DTensor as target, expected a DTensor on the same mesh, "
                "or target.to_local()"
            )
        last = logits.dim() - 1
        _refuse_placements("logits", logits, lambda p: p.dim <= last, "Shard")
        cut = [i for i, placement in enumerate(logits.placements) if placement.is_shard(last)]
        if len(cut) > 1:
            raise ValueError(
                f"logits: got placements {list(logits.placements)}, expected Shard(dim={last}), that of the "
                "vocabulary, on one mesh dimension at most"
            )
        rows = tuple(
            Replicate() if placement.is_shard(last) else placement for placement in logits.placements
        )
        vocab = cut[0] if cut else None
        mesh, tokens = logits.device_mesh, logits.shape[:-1]
        vocab_size = logits.shape[-1] if logits.dim() else 0
        return cls("logits", mesh, logits.device, tokens, rows, vocab, vocab_size, logits.placements)

    def other_groups(self) -> list[ProcessGroup]:
        """Those of ranks that have other tokens and the same of the vocabulary."""
        return [self.mesh.get_group(i) for i in self.cut if i != self.vocab]

    def ranks(self, others: list[Agreement]) -> _Together | _Apart:
        """What the core asks about the other ranks; others: the agreements over `other_groups`."""
        if self.vocab is None:
            return _Apart(self, others)
        # The rule of Shard, which is that of torch.chunk.
        share = -(-self.vocab_size // self.mesh.size(self.vocab))
        start = min(share * self.mesh.get_local_rank(self.vocab), self.vocab_size)
        rows = "replicated" if self.rows[self.vocab].is_replicate() else "sharded"
        group = self.mesh.get_group(self.vocab)
        return _Together(self, others, VocabParallel(group, self.vocab_size, start, rows))

    # What is here of each argument.

    def parts(self, arguments: dict[str, object]) -> dict[str, object]:
        # DTensors first: what they may raise and send is alike on all ranks, so that a rank whose plain
        # tensor is refused meets the others where they agree on the call.
        order = sorted(arguments, key=lambda name: not _has_dtensor(arguments[name]))
        return {name: self._argument(name, arguments[name]) for name in order}

    def _argument(self, name: str, value: object) -> object:
        try:
            return self._placed(name, value)
        except ValueError as error:
            if _has_dtensor(value) or not self.cut:
                raise
            raise ValueError(
                f"{error}; beside DTensors a plain tensor is the whole, alike on all ranks: of a rank's own "
                "part make a DTensor, by DTensor.from_local"
            ) from None

    def _placed(self, name: str, value: object) -> object:
        if name == "target" and value is not None:
            return self._target(value)
        if name == "support" and isinstance(value, Classes):
            validation.support(value, self.tokens, self.device, self.owner)
            return Classes(self._along("support.indices", value.indices, 1))
        if name == "row_args" and isinstance(value, (tuple, list)):
            return tuple(self._row_arg(f"row_args[{i}]", arg) for i, arg in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        if name in PER_TOKEN:
            if value.numel() != 1:
                validation.per_token(name, value, self.tokens, self.device)
            return self._along(name, value)
        if name in ("weight", "bias", "logits"):
            return self._part(name, value, self.head)
        if name == "input":
            return self._part(name, value, self.rows)
        if isinstance(value, DTensor):  # class_weight, normalizer: all of it
            return self._part(name, value, self._everywhere)
        return value

    def _target(self, target: Tensor | TopKTarget | TeacherTarget) -> Tensor | TopKTarget | TeacherTarget:
        target_checks.target(target, self.tokens, self.vocab_size, self.device, self.owner)
        if isinstance(target, TeacherTarget):
            return self._teacher(target)
        if isinstance(target, TopKTarget):
            indices = self._along("target.indices", target.indices, 1)
            return TopKTarget(indices, self._along("target.probs", target.probs, 1))
        if not target.is_floating_point():
            return self._along("target", target)
        placements = list(self._cuts(target.shape, 1))
        if self.vocab is not None and self.rows[self.vocab].is_replicate():
            placements[self.vocab] = Shard(target.dim() - 1)
        return self._part("target", target, tuple(placements))

    def _teacher(self, target: TeacherTarget) -> TeacherTarget:
        """Its head lies as the student's does."""
        bias = target.bias if target.bias is None else target.bias.detach()
        return replace(
            target,
            hidden=self._along("target.hidden", target.hidden.detach(), 1),
            weight=self._part("target.weight", target.weight.detach(), self.head),
            bias=None if bias is None else self._part("target.bias", bias, self.head),
        )

    def _row_arg(self, name: str, arg: object) -> object:
        if not isinstance(arg, Tensor):
            return arg
        if arg.shape[: len(self.tokens)] == self.tokens:
            return self._along(name, arg, arg.dim() - len(self.tokens))
        validation.per_token(name, arg, self.tokens, self.device)
        return self._along(name, arg)

    def _along(self, name: str, value: Tensor, rest: int = 0) -> Tensor:
        """What is here of a tensor whose dimensions, but for the last ``rest``, broadcast to the tokens."""
        return self._part(name, value, self._cuts(value.shape, rest))

    def _cuts(self, shape: torch.Size, rest: int) -> _Placements:
        first = len(shape) - rest - len(self.tokens)  # its dimension that stands at the tokens' first

        def cut(rows: Placement) -> Placement:
            at = -1 if rows.is_replicate() else rows.dim + first
            # One element of more dimensions than the tokens have is a number.
            along = first <= 0 <= at and shape[at] == self.tokens[rows.dim]
            return Shard(at) if along else Replicate()

        return tuple(cut(rows) for rows in self.rows)

    def _part(self, name: str, value: Tensor, placements: _Placements) -> Tensor:
        """What is here of a tensor that is to lie so."""
        gradient = self._gradient(placements)
        if not isinstance(value, DTensor):
            if gradient == placements == self._everywhere:
                return value
            value = DTensor.from_local(value, self.mesh, self._everywhere, run_check=False)
        _same_mesh(name, value, self.mesh)
        if value.placements != placements:
            value = value.redistribute(placements=placements)
        local = value.to_local(grad_placements=gradient)
        return _Waited.apply(local) if isinstance(local, AsyncCollectiveTensor) else local

    def _gradient(self, placements: _Placements) -> _Placements:
        """How the gradient lies that a rank finds for what is here of a tensor that lies so."""
        pairs = zip(placements, self.rows)
        return tuple(Partial() if own.is_replicate() and rows.is_shard() else own for own, rows in pairs)

    @property
    def _everywhere(self) -> _Placements:
        return (Replicate(),) * self.mesh.ndim

    # What all ranks have together.

    @property
    def cut(self) -> list[int]:
        """The mesh dimensions that cut the tokens."""
        return [i for i, rows in enumerate(self.rows) if rows.is_shard()]

    @property
    def cuts_sequences(self) -> bool:
        """Whether the last dimension of the tokens is cut."""
        return any(rows.is_shard(len(self.tokens) - 1) for rows in self.rows)

    def sum(self, own: Tensor, used_by_all: bool) -> Tensor:
        """The sum of a number that each rank has for its own tokens; used_by_all: as in `_Sum`."""
        if not self.cut:
            return own
        return _Sum.apply(own, [self.mesh.get_group(i).group_name for i in self.cut], used_by_all)

    def joined(self, result: object, reduction: str) -> object:
        """The result for all tokens, from that for the tokens that are here."""
        if isinstance(result, RowStats):
            of_tokens = {k: v for k, v in result._asdict().items() if v is not None and k not in OF_CALL}
            return result._replace(**{name: self._of_tokens(value) for name, value in of_tokens.items()})
        if isinstance(result, tuple):
            return tuple(self.joined(part, reduction) for part in result)
        if reduction == "none":
            return self._of_tokens(result)
        return DTensor.from_local(self.sum(result, False), self.mesh, self._everywhere, run_check=False)

    def _of_tokens(self, own: Tensor) -> DTensor:
        stride = torch.empty(self.tokens, device="meta").stride()
        return DTensor.from_local(
            own, self.mesh, self.rows, run_check=False, shape=self.tokens, stride=stride
        )


class _Spread:
    """What the core asks about ranks that have other tokens."""

    def __init__(self, spread: Layout, others: list[Agreement], *parallel: VocabParallel):
        super().__init__(*parallel)
        self.spread, self.others = spread, others

    @property
    def cuts_sequences(self) -> bool:
        return self.spread.cuts_sequences

    def settle(self, value: Tensor, width: int, here: int, rows: int | None, options: dict) -> ShardArguments:
        shard = super().settle(value, width, here, rows, options)
        for other in self.others:
            other.join(value, rows)
        return shard

    def total(self, own: Tensor) -> Tensor:
        return self.spread.sum(own, True)


class _Alone:
    """A rank that has all of the vocabulary, in the place of an `Agreement`: there is nothing to agree on."""

    sharded = False

    def __enter__(self) -> _Alone:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def layout(self, head: Tensor) -> int:
        return validation.integer("vocab_size", head.shape[0], low=1)

    def settle(self, value: Tensor, width: int, here: int, rows: int | None, options: dict) -> ShardArguments:
        return ShardArguments(widest=here)

    def rows_together(self, own: int) -> int:
        return own

    def sum_of_columns(self, dense: Tensor, sums: Callable[[Tensor], Tensor]) -> Tensor:
        return sums(dense)


class _Together(_Spread, Agreement):
    """Ranks that hold the vocabulary together."""


class _Apart(_Spread, _Alone):
    """Ranks that have all of the vocabulary each."""


class _Sum(Function):
    """The sum over the ranks of groups, in rank order.

    used_by_all: every rank goes on with the sum by itself, so the gradient of what it gave is a sum too. Else
    the sum is one result, and what comes back to it is the same on all ranks.
    """

    @staticmethod
    def forward(ctx, own, groups, used_by_all):
        ctx.groups = groups if used_by_all else []
        return _over(own, groups)

    @staticmethod
    def backward(ctx, upstream):
        return _over(upstream, ctx.groups), None, None


def _over(value: Tensor, groups: list[str]) -> Tensor:
    for group in groups:
        value = collectives.over_ranks(value, group)
    return value


class _Waited(Function):
    """A tensor that a collective is still writing, once it has been written: kernels look past its class."""

    @staticmethod
    def forward(ctx, value):
        value = value.trigger_wait()
        return value.view_as(value)

    @staticmethod
    def backward(ctx, upstream):
        return upstream


def _has_dtensor(value: object) -> bool:
    if isinstance(value, Classes):
        value = value.indices
    if isinstance(value, TeacherTarget):
        value = value.hidden, value.weight, value.bias
    if isinstance(value, (tuple, list)):
        return any(_has_dtensor(part) for part in value)
    return isinstance(value, DTensor)


def _same_mesh(name: str, value: DTensor, mesh: DeviceMesh) -> None:
    if value.device_mesh != mesh:
        raise ValueError(
            f"{name}: got a DTensor on {value.device_mesh}, expected {mesh}, the mesh of the head"
        )


def _refuse_placements(name: str, value: DTensor, allowed: Callable[[Shard], bool], expected: str) -> None:
    for placement in value.placements:
        if not (placement.is_replicate() or (type(placement) is Shard and allowed(placement))):
            raise ValueError(
                f"{name}: got placements {list(value.placements)}, expected Replicate or {expected} on each "
                f"mesh dimension; {name}.redistribute gives one that lies so"
            )
