"""From a caller's arguments to what the autograd Functions take: the part that all public functions share.

A `Space` is what the tokens are scored over: their shape, the vocabulary, a dtype and a device. `rows_of`
checks what a loss is told of the tokens and flattens it to rows, `Rows.reduce` puts losses back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from . import target_checks, validation
from . import tokens as _tokens
from .ambient import has_values, may_read, transformed
from .arguments import LinearArguments, LogitsArguments, SetArguments, TokenTarget, Transform
from .distributed.layout import Agreement
from .losses import TEACHER_FORMS, RealityCreativity, warn_beyond_cliff
from .statistics import RowStats
from .strategies import plan
from .strategies.problem import arithmetic_dtype
from .support import DEFAULT, Classes, MinP, RowSets
from .targets import Target, TeacherTarget, TopKTarget

_Arguments = TypeVar("_Arguments", bound=LogitsArguments)


@dataclass(frozen=True)
class Space:
    """What tokens are scored over."""

    owner: str  # the argument that has the tokens
    like: Tensor  # that argument
    tokens: torch.Size
    vocab_size: int
    here: int  # entries of the vocabulary that are here, padding included
    dtype: torch.dtype  # of the arithmetic
    ranks: Agreement | None = None  # that hold the vocabulary together

    @classmethod
    def of_head(
        cls, input: Tensor, weight: Tensor, bias: Tensor | None, ranks: Agreement | None = None
    ) -> Space:
        validation.head(input, weight, bias, least=0 if ranks else 1)
        _refuse_transforms(ranks)
        dtype, here = arithmetic_dtype(input, weight, bias), weight.shape[0]
        vocab_size = here if ranks is None else ranks.layout(weight)
        return cls("input", input, input.shape[:-1], vocab_size, here, dtype, ranks)

    @classmethod
    def of_logits(cls, logits: Tensor, ranks: Agreement | None = None) -> Space:
        validation.logits(logits, least=0 if ranks else 1)
        _refuse_transforms(ranks)
        here = logits.shape[-1]
        if ranks is not None and ranks.sharded:
            raise ValueError(
                'vocab_parallel: got rows="sharded" with logits, expected rows="replicated": logits are of '
                "tokens that are here"
            )
        vocab_size = here if ranks is None else ranks.layout(logits.movedim(-1, 0))
        dtype = arithmetic_dtype(logits)
        return cls("logits", logits, logits.shape[:-1], vocab_size, here, dtype, ranks)

    @property
    def device(self) -> torch.device:
        return self.like.device

    def rows(self) -> Tensor:
        """The owner's values as [N, D] or [N, V]."""
        return self.like.reshape(math.prod(self.tokens), self.like.shape[-1])

    def _refuse_learned(self, target: Tensor | TopKTarget | TeacherTarget) -> None:
        """Raise ValueError where ranks share the vocabulary and a target requires grad."""
        if self.ranks is None or isinstance(target, TeacherTarget):
            return
        masses = target.probs if isinstance(target, TopKTarget) else target
        if masses.requires_grad:
            raise ValueError(
                "target: got one that requires grad with vocab_parallel, expected one that does not where "
                "ranks hold the vocabulary together"
            )

    def target(
        self,
        target: Tensor | TopKTarget | TeacherTarget | None,
        ignore_index: int,
        shift: int,
        required: bool = False,
    ) -> TokenTarget:
        """Rows of a target, checked."""
        if target is not None or required:
            # A distribution has the classes that are here; tokens that no other rank has, all of them.
            whole = self.ranks is not None and self.ranks.sharded and not isinstance(target, TeacherTarget)
            width = self.vocab_size if whole else self.here
            target_checks.target(target, self.tokens, width, self.device, self.owner)
            self._refuse_learned(target)
        named = target.hidden if isinstance(target, TeacherTarget) else target
        ignore_index = validation.ignore_index(ignore_index, named)
        shift = validation.shift(shift, self.tokens)
        if shift and self.ranks is not None and self.ranks.cuts_sequences:
            raise ValueError(
                f"shift: got {shift} where ranks have tokens of their own, expected 0: the label of a rank's "
                "last token may be on another; shift the targets before they are cut"
            )
        return _tokens.flatten_target(target, self.tokens, ignore_index, shift, self.device)


def _refuse_transforms(ranks: Agreement | None) -> None:
    """Raise RuntimeError inside a transform of torch.func, or forward mode, where ranks work together."""
    if ranks is not None and transformed():
        raise RuntimeError(
            "tightrope: got vocab_parallel inside a transform of torch.func or forward mode, expected "
            "gradients by backward where ranks hold the vocabulary together"
        )


@dataclass(frozen=True)
class Scores:
    """How raw logits become logits, and the set of classes that is asked for."""

    space: Space
    transform: Transform
    sets: SetArguments
    temperature: Tensor | None  # of the tokens, where it is not one number

    @classmethod
    def of(
        cls,
        space: Space,
        *,
        logit_scale: float,
        softcap: float | None,
        temperature: float | Tensor,
        support: MinP | Classes | None,
        ignore_index: int,
        shift: int,
        creativity: str | None = None,
    ) -> Scores:
        """Checked. A set that creativity asks for is the default one where none is given."""
        temperature = validation.temperature(temperature, space.tokens, space.device)
        of_rows = isinstance(temperature, Tensor) and (temperature.dim() > 0 or temperature.requires_grad)
        transform = validation.transform(logit_scale, softcap, space.dtype, 1.0 if of_rows else temperature)
        if support is None and creativity == "support_entropy":
            support = DEFAULT
        validation.support(support, space.tokens, space.device, space.owner)
        sets = _tokens.flatten_support(
            support,
            space.tokens,
            validation.integer("ignore_index", ignore_index),
            validation.shift(shift, space.tokens),
        )
        return cls(space, transform, sets, temperature if of_rows else None)

    def check_balance(self, family: RealityCreativity, balance: float | Tensor) -> None:
        """Warn where a checked balance is one at which the loss's best model is noise."""
        if family.reality != "cross_entropy" or torch.compiler.is_compiling():
            return
        if isinstance(balance, Tensor):
            if not may_read(balance) or not balance.numel():
                return
            balance = balance.detach().max().item()
        warn_beyond_cliff(family.creativity, balance, self.space.vocab_size, self.sets)

    def arguments(self, target: TokenTarget) -> dict[str, object]:
        """Those fields of `LogitsArguments` that say what rows are scored against, and how."""
        temperature, space = self.temperature, self.space
        if temperature is not None:
            temperature = _tokens.flatten_rows(temperature, space.tokens, None, space.like, space.dtype)
            if target.valid is not None:
                temperature = torch.where(target.valid, temperature, 1.0)
            validation.temperatures(temperature)
        return {
            **target.named(),
            **self.transform.named(),
            **self.sets.named(),
            "temperature": temperature,
        }


@dataclass(frozen=True)
class Rows:
    """The rows of a loss: their targets, and what their losses are multiplied by before the sum."""

    space: Space
    target: TokenTarget
    weight: Tensor  # [N], 0 where a row does not count
    reduction: str
    normalizer: float | Tensor | None  # what "mean" divides by
    total: Tensor | None  # in its place where none is given: of the tokens that are here

    @property
    def scale(self) -> Tensor:
        """What the losses are multiplied by, [N]; asked for once, when ranks have agreed on the call."""
        total = self.total
        if total is not None and self.space.ranks is not None:
            total = self.space.ranks.total(total)
        return _tokens.row_scale(self.weight, self.reduction, self.normalizer, total)

    def flatten(self, value: Tensor | float) -> Tensor:
        """A number or a per-token tensor as [N], 0 where a row does not count."""
        valid, space = self.target.valid, self.space
        return _tokens.flatten_rows(value, space.tokens, valid, space.like, space.dtype)

    def flatten_args(self, row_args: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A user's per-token tensors as [N, ...]."""
        return tuple(_tokens.flatten_arg(arg, self.space.tokens, self.target.valid) for arg in row_args)

    def reduce(self, loss: Tensor) -> Tensor:
        """Losses of rows [N] to the result; NaN stays out where a row does not count."""
        if self.target.valid is not None:
            loss = torch.where(self.target.valid, loss, 0.0)
        loss = loss.to(self.space.dtype) * self.scale
        return loss.view(self.space.tokens) if self.reduction == "none" else loss.sum()

    def shaped(self, stats: RowStats, has_target: bool = True, sampling: Tensor | None = None) -> RowStats:
        """Detached statistics in the tokens' shape. sampling [3]: share and noise, where there are any."""
        detached = RowStats(*(None if s is None else s.detach() for s in stats))
        if self.target.teacher_form != "mass":  # they are inner products with something else than b
            detached = detached._replace(target_logit=None, target_prob=None, target_log_prob=None)
        shaped = _tokens.unflatten(detached, self.space.tokens, has_target)
        if sampling is None:
            return shaped
        return shaped._replace(sampled_share=sampling[0], sampled_noise=sampling[1:])


def rows_of(
    space: Space,
    target: Tensor | TopKTarget | TeacherTarget | None,
    *,
    ignore_index: int,
    shift: int,
    row_weight: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    target_required: bool = True,
) -> Rows:
    """The rows of a loss. label_smoothing is that of the target where there is a class_weight."""
    validation.choice("reduction", reduction, validation.REDUCTIONS)
    normalizer = validation.normalizer(normalizer)
    flat = space.target(target, ignore_index, shift, target_required)
    weight = 1.0
    if row_weight is not None:
        validation.per_token("row_weight", row_weight, space.tokens, space.device)
        weight = _tokens.flatten_rows(row_weight, space.tokens, None, space.like, space.dtype)
        flat = _tokens.without_weightless(flat, weight)
        weight = weight.view(space.tokens)
    weight = _tokens.flatten_rows(weight, space.tokens, flat.valid, space.like, space.dtype)
    of_class = None
    if class_weight is not None:
        flat.part(Target).check_range(flat.valid, space.vocab_size)
        flat, of_class = _tokens.with_class_weight(flat, class_weight, label_smoothing)
    total = None
    if reduction == "mean" and normalizer is None:
        if row_weight is not None:
            validation.weights_of_one_sign(weight)
        counted = weight if of_class is None else weight * of_class.to(space.dtype)
        total = counted.sum() if flat.valid is None else torch.where(flat.valid, counted, 0.0).sum()
    return Rows(space, flat, weight, reduction, normalizer, total)


def weighted_rows(
    space: Space,
    target: Tensor | TopKTarget | TeacherTarget,
    family: RealityCreativity,
    class_weight: Tensor | None,
    **rows,
) -> tuple[Rows, RealityCreativity]:
    """The rows of a built-in loss (`rows_of` says what the others are), and the loss for their targets.

    With class weights label smoothing is part of the target, and no more of the loss.
    """
    form = TEACHER_FORMS.get(family.reality)
    if form is not None:
        target_checks.teacher_alone(target, family, space.owner)
    if class_weight is None:
        found = rows_of(space, target, **rows)
        if form is not None:
            formed = replace(found.target, teacher_form=form, smoothing=family.label_smoothing)
            found = replace(found, target=formed)
        return found, family
    validation.class_weight(class_weight, space.vocab_size, space.device, family.reality)
    smoothing = family.label_smoothing
    weighted = rows_of(space, target, class_weight=class_weight, label_smoothing=smoothing, **rows)
    return weighted, replace(family, label_smoothing=0.0)


def target_square(
    space: Space,
    target: Tensor | TopKTarget | TeacherTarget,
    family: RealityCreativity,
    ignore_index: int,
    shift: int,
) -> Tensor | None:
    """|b|^2 of each row's target [N], where the loss has a use for it."""
    if family.reality != "squared_error" or isinstance(target, TeacherTarget):
        return None
    ignore_index, shift = validation.integer("ignore_index", ignore_index), validation.integer("shift", shift)
    smoothing = family.label_smoothing
    over_ranks = None
    if space.ranks is not None and not space.ranks.sharded:
        over_ranks = space.ranks.sum_of_columns
    return _tokens.target_square(
        target, space.vocab_size, ignore_index, shift, smoothing, space.dtype, over_ranks
    )


def settled(arguments: _Arguments, space: Space, **options: object) -> _Arguments:
    """The arguments, agreed on by the ranks that hold the vocabulary together, where there are such.

    options: what else they must have alike, beside all that is no tensor among the arguments.
    """
    if space.ranks is None:
        return arguments
    arguments.part(Target).check_range(arguments.valid, space.vocab_size)
    sets = RowSets.of(arguments)
    if sets is not None:
        sets.check_range(arguments.valid, space.vocab_size)
    rows = math.prod(space.tokens)
    if arguments.valid is not None:
        counted = getattr(arguments, "skip", True) and has_values(arguments.valid)
        rows = int(arguments.valid.sum()) if counted else None
    alike = {"dtype of the arithmetic": space.dtype, f"dtype of {space.owner}": space.like.dtype, **options}
    for name in arguments._names:
        value = getattr(arguments, name)
        if name == "valid":
            name, value = "masked rows", rows is None
        elif isinstance(value, Tensor):
            width = "" if name == "dense" else list(value.shape[1:])
            learned = torch.is_grad_enabled() and value.requires_grad
            value = f"{value.dtype}{width}{' that requires grad' if learned else ''}"
        alike[name] = value
    width = space.like.shape[-1] if space.owner == "input" else 0
    shard = space.ranks.settle(space.like, width, space.here, rows, alike)
    if shard.sharded and shard.layout is None and arguments.dense is not None:
        raise ValueError(
            'target: got a distribution with rows="sharded" where ranks do not talk before the call (under '
            "torch.compile, or with skip_ignored=False on GPUs), expected class indices or a TopKTarget"
        )
    return replace(arguments, **shard.named())


def linear_arguments(
    scores: Scores,
    target: TokenTarget,
    *,
    skip_ignored: bool | None,
    workspace_mb: float | None,
    backend: str | None,
    gradient_noise: float | tuple[float, float],
    strategy: str | None = None,
) -> LinearArguments:
    workspace_mb = validation.run_options(backend, workspace_mb, strategy, skip_ignored)
    space = scores.space
    # On a GPU skipping needs the count of rows on the host, which a graph capture or a trace cannot give.
    skip = skip_ignored is not False
    if skip and target.valid is not None and space.device.type == "cuda":
        skip = not (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())
    workspace = plan.workspace_bytes(workspace_mb, space.device)
    noise = validation.gradient_noise(gradient_noise)
    return LinearArguments(
        **scores.arguments(target), **noise.named(), backend=backend, skip=skip, workspace=workspace
    )


def terms_of(family: RealityCreativity) -> dict[str, object]:
    """What of a loss ranks must have alike; of the vocabulary's size there is another word."""
    return {name: value for name, value in family.named().items() if name != "vocab_size"}


def head_of(input: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, object]:
    """What of a head ranks must have alike, as it decides on the driver: its dtype, and wanted gradients."""
    on = torch.is_grad_enabled()
    named = {"input": input, "weight": weight, "bias": bias}
    wanted = {f"gradient of {k}": on and t is not None and t.requires_grad for k, t in named.items()}
    return {"dtype of weight": weight.dtype, **wanted}


def choose_strategy(
    arguments: LinearArguments, space: Space, strategy: str | None, reduction: str, *head: Tensor | None
) -> str:
    """Chunked needs the upstream gradient to be one number, and the gradient of a leaf to be wanted.

    Its gradients are numbers, so inside of a transform, which differentiates them, it is not; nor where a
    target is learned, whose gradient it does not make.
    """
    leaves = (*head, arguments.temperature)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    learned = any(t is not None and t.requires_grad for t in (arguments.dense, arguments.topk_prob))
    if reduction == "none" or not wanted or learned or transformed():
        return "streaming"
    rows, width = math.prod(space.tokens), space.vocab_size
    if space.ranks is not None:
        rows, width = space.ranks.rows_together(rows), max(arguments.widest, 1)
    return strategy or plan.choose_strategy(rows, width, space.dtype.itemsize, arguments.budget, space.device)
