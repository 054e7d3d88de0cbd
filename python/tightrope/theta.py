"""How the autograd Functions of `derivatives` lay out what they are given and keep.

Theta is what statistics are differentiated by: hidden states, head and bias, or logits, and temperatures. A
Function takes them as (input, weight, bias, *arguments), where logits stand for the input and there is no
weight, and the temperature is one of the arguments.
"""

from __future__ import annotations

from torch import Tensor

from .arguments import LinearArguments, LogitsArguments
from .statistics import FLOATING, StatGrads, fields, named, row_stats
from .support import RowSets


def group_of(weight: Tensor | None) -> type[LogitsArguments]:
    """The arguments' group: without a head, logits are given."""
    return LogitsArguments if weight is None else LinearArguments


def values_of(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """What stands before the arguments of an operator."""
    return (input,) if weight is None else (input, weight, bias)


def fields_of(arguments: LogitsArguments) -> tuple[str, ...]:
    """The fields of RowStats that there are."""
    return fields(RowSets.of(arguments) is not None, arguments.teacher_weight is not None)


def upstream_of(grads: tuple[Tensor | None, ...], arguments: LogitsArguments) -> StatGrads:
    """Upstream gradients of the fields of RowStats that there are, by their names."""
    named = dict(zip(fields_of(arguments), grads))
    return StatGrads(**{name: named[name] for name in FLOATING if name in named})


def statistics(summary: Tensor, argmax: Tensor) -> tuple[Tensor, ...]:
    """The fields of RowStats, as many as there are."""
    return tuple(s for s in row_stats(summary, argmax) if s is not None)


def constants(statistics: tuple[Tensor, ...], arguments: LogitsArguments) -> list[Tensor]:
    """Those of the fields of RowStats that there are which no gradient goes through."""
    return [s for name, s in zip(fields_of(arguments), statistics) if name not in FLOATING]


class Saved:
    """What the four Functions keep: their tensors in a fixed order, and what is no tensor."""

    @staticmethod
    def save(ctx, own: tuple, input, weight, bias, flat: tuple) -> None:
        arguments = group_of(weight)(*flat)
        tensors = (*own, input, weight, bias, *arguments.tensors())
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.own, ctx.others = len(own), arguments.others()
        ctx.set_materialize_grads(False)

    @staticmethod
    def load(ctx) -> tuple[tuple, tuple, LogitsArguments]:
        """(own tensors, (input, weight, bias), arguments)."""
        saved = ctx.saved_tensors
        own, (input, weight, bias, *tensors) = saved[: ctx.own], saved[ctx.own :]
        return own, (input, weight, bias), group_of(weight).join(tuple(tensors), ctx.others)


def _place_of_temperature(weight: Tensor | None) -> int:
    """Where the temperature stands among (input, weight, bias, *arguments)."""
    return 3 + group_of(weight)._names.index("temperature")


def of_theta(flags: tuple, weight: Tensor | None) -> tuple:
    """Of (input, weight, bias, *arguments) what belongs to input, weight, bias and temperature."""
    return *flags[:3], flags[_place_of_temperature(weight)]


def of_arguments(values: tuple, arguments: LogitsArguments, to_mass: Tensor | None = None) -> tuple:
    """The gradients of (input, weight, bias, *arguments), from `of_theta`'s and that of a target's masses."""
    found = {"temperature": values[3], mass_of(arguments): to_mass}
    return *values[:3], *(found.get(name) for name in arguments._names)


def kept(gradients, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(gradients, needed))


def spread(gradients: tuple[Tensor, ...], weight: Tensor | None) -> tuple[Tensor | None, ...]:
    """An operator's gradients as those of input, weight, bias and temperature."""
    return (gradients[0], None, None, gradients[1]) if weight is None else gradients


def grads_of_summary(upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Upstream gradients of the fields of `StatGrads`, from those of a summary's derivative.

    Of the two rows that add up to lse each has its gradient.
    """
    rows = named(upstream)
    return tuple(rows["log_sum"] if name == "lse" else rows.get(name) for name in StatGrads._fields)


def of_summary(tangent: Tensor) -> tuple[Tensor | None, ...]:
    """The derivatives of the fields of `StatGrads`, from that of a summary."""
    stats = row_stats(tangent, None)
    return tuple(getattr(stats, name) for name in StatGrads._fields)


def other_tangents(tangents: tuple, weight: Tensor | None) -> bool:
    """Whether any tangent of (input, weight, bias, *arguments) is of what is not theta: of a target."""
    place = _place_of_temperature(weight)
    return any(t is not None for i, t in enumerate(tangents) if i > 2 and i != place)


# The arguments that hold a target's masses.
_MASSES = ("dense", "topk_prob")


def mass_of(arguments: LogitsArguments) -> str | None:
    """Which of the arguments holds the masses of a target; None: it has none of its own."""
    return next((name for name in _MASSES if getattr(arguments, name) is not None), None)


def mass_needed(ctx, after: int, arguments: LogitsArguments) -> bool:
    """Whether the gradient of a target's masses is wanted. after: how many arguments of apply come before."""
    name = mass_of(arguments)
    return name is not None and ctx.needs_input_grad[after + arguments._names.index(name)]


def refuse_mixture(arguments: LogitsArguments) -> None:
    """Raise RuntimeError where a target moves with what is differentiated."""
    if arguments.teacher_form == "mixture":
        raise RuntimeError(
            "tightrope: got a derivative of a gradient, or a transform of torch.func, with "
            'reality="jensen_shannon", expected gradients of first order by backward: its mixture moves with '
            "the student"
        )
