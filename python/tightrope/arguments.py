"""The arguments of the dispatcher operators, each of them defined once.

A dispatcher operator takes a flat list of tensors and numbers, and what is passed on through a function, an
operator, an autograd Function and back would be a tail that five files take apart by counting. Here groups of
arguments are frozen dataclasses: their fields give the operator's schema, the flat list, and the way back. A
field that is added to a group is so added to every operator that takes the group.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor

# What a field's annotation is in the language of schemas.
_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "bool": "bool",
    "int": "int",
    "float": "float",
    "float | None": "float?",
    "str": "str",
    "str | None": "str?",
    "list[int] | None": "int[]?",
}
_Group = TypeVar("_Group", bound=type)
_A = TypeVar("_A", bound="Arguments")


class Arguments:
    """What a group of arguments can do; the groups themselves are made by `group`."""

    _names: tuple[str, ...]
    _schema: str
    _tensors: tuple[str, ...]

    def flat(self) -> tuple:
        """The values of all fields, in the order of the schema."""
        raise NotImplementedError  # `group` spells it out

    def named(self) -> dict[str, Any]:
        """The values of all fields by their names; torch.compile of torch 2.11 makes nothing of vars()."""
        return {name: getattr(self, name) for name in self._names}

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields that are tensors: what an autograd Function saves for its backward."""
        return tuple(getattr(self, name) for name in self._tensors)

    def others(self) -> tuple:
        """The fields that are not."""
        return tuple(getattr(self, name) for name in self._names if name not in self._tensors)

    def part(self, cls: type[_A]) -> _A:
        """A group all of whose fields are among these."""
        return cls(**{name: getattr(self, name) for name in cls._names})

    @classmethod
    def join(cls, tensors: tuple[Tensor | None, ...], others: tuple):
        """The group of which these are `tensors` and `others`."""
        rest = [name for name in cls._names if name not in cls._tensors]
        return cls(**dict(zip(cls._tensors, tensors)), **dict(zip(rest, others)))


def group(cls: _Group) -> _Group:
    """Make a class of annotated fields a frozen dataclass that is a group of operator arguments."""
    # Compared by identity: torch.compile of torch 2.11 asks for the hash of one whose fields are not set yet.
    cls = dataclass(frozen=True, eq=False)(cls)
    cls._names = tuple(field.name for field in fields(cls))
    cls._schema = ", ".join(f"{_SCHEMA_TYPES[field.type]} {field.name}" for field in fields(cls))
    cls._tensors = tuple(field.name for field in fields(cls) if field.type.startswith("Tensor"))
    # Ten times a call, and a loop over names was a tenth of a small one. torch.compile cannot look into
    # operator.attrgetter.
    cls.flat = eval(f"lambda self: ({''.join(f'self.{name}, ' for name in cls._names)})")
    return cls


class Signature:
    """An operator's arguments: each part is one argument, by its schema, or a group of them."""

    def __init__(self, *parts: str | type[Arguments]):
        self.parts = parts
        self.schema = ", ".join(part if isinstance(part, str) else part._schema for part in parts)

    def flatten(self, *values: Any) -> tuple:
        """The operator's flat arguments, from one value for each part."""
        flat: list = []
        for part, value in zip(self.parts, values):
            flat.extend((value,) if isinstance(part, str) else value.flat())
        return tuple(flat)

    def unflatten(self, *flat: Any) -> tuple:
        """One value for each part, from the operator's flat arguments."""
        values, at = [], 0
        for part in self.parts:
            width = 1 if isinstance(part, str) else len(part._names)
            given = flat[at : at + width]
            values.append(given[0] if isinstance(part, str) else part(*given))
            at += width
        return tuple(values)


# Dataclasses collect the fields of the last base first.


@group
class TargetArguments(Arguments):
    """The target of each row, of one kind at most."""

    index: Tensor | None = None  # [N] int64
    dense: Tensor | None = None  # (..., V) of N rows, or a tile's columns of it [N, T]
    topk_index: Tensor | None = None  # [N, K] int64
    topk_prob: Tensor | None = None  # [N, K]


@group
class Transform(Arguments):
    """How raw logits become logits: ``z = softcap tanh(logit_scale (x + bias) / softcap)``."""

    logit_scale: float = 1.0
    softcap: float | None = None


@group
class _TileRows(Arguments):
    bias: Tensor | None = None  # [T]
    active: Tensor | None = None  # [N] bool: the rows that count; None: all


@group
class TileArguments(Transform, _TileRows, TargetArguments):
    """What the row primitives are told of the rows and of a tile of the vocabulary, beside its offset."""


@group
class TeacherArguments(Arguments):
    """The head whose softmax is the target of all rows; its hidden states are shifted already."""

    teacher_input: Tensor | None = None  # [N, its own D]
    teacher_weight: Tensor | None = None  # [V, its own D]
    teacher_bias: Tensor | None = None  # [V]
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None
    # What a tile of the target is: b; "log": log b, b smoothed; "mixture": log p - log m, m = (p + b) / 2.
    teacher_form: str = "mass"


@group
class TokenTarget(TeacherArguments, TargetArguments):
    """The target of all rows, and which rows count."""

    valid: Tensor | None = None  # [N] bool: the rows that count; None: all
    shift: int = 0  # row i of dense and topk_* belongs to row i - shift
    class_weight: Tensor | None = None  # [V]: weighs the target, (1 - smoothing) b + smoothing / V
    smoothing: float = 0.0


@group
class SetArguments(Arguments):
    """The set of classes whose mass and entropy are asked for, of one kind at most."""

    min_p: float = 0.0  # those with p >= min_p times the largest p; 0: none
    classes: Tensor | None = None  # [N, K] int64, ascending; repeated ones count once


@group
class SideArguments(Arguments):
    """Which entries of a tile are in the set, of one kind at most; the others are the rest."""

    threshold: Tensor | None = None  # [N]: logits of at least this
    classes: Tensor | None = None  # [N, K] int64, ascending


@group
class ShardArguments(Arguments):
    """Which part of the vocabulary is here, where the ranks of a process group hold it together."""

    group: str | None = None  # its name; None: all of the vocabulary is here
    first_class: int = 0  # of the first row of the head
    total: int = 0  # classes of the whole vocabulary: rows of the head beyond it are padding
    widest: int = 0  # rows of a rank's head, at most: what budgets are shared out by
    sharded: bool = False  # each rank has rows of its own, else all have the same
    counts: list[int] | None = None  # rows that count, of each rank; None: not known yet
    layout: list[int] | None = None  # first class and number of classes of each rank, where that is known

    def vocab_size(self, here: int) -> int:
        """Classes of the whole vocabulary, where so many entries are here."""
        return here if self.group is None else self.total


@group
class LogitsArguments(ShardArguments, Transform, SetArguments, TokenTarget):
    """What the operators on logits are told beside the logits."""

    temperature: Tensor | None = None  # [N], where it is not one number, which is part of the transform
    backend: str | None = None


@group
class NoiseArguments(Arguments):
    """The root mean square error that is allowed of a gradient, over its norm; 0: none, it is exact."""

    input_noise: float = 0.0
    weight_noise: float = 0.0

    @property
    def noisy(self) -> bool:
        return self.input_noise > 0 or self.weight_noise > 0


@group
class LinearArguments(NoiseArguments, LogitsArguments):
    """What the operators on hidden states are told beside these, the head and its bias."""

    skip: bool = True  # rows that do not count are gathered out, else masked
    workspace: int = 0  # bytes

    @property
    def budget(self) -> int:
        """Bytes of the workspace for logits; beside them a teacher's take as much."""
        return self.workspace if self.teacher_weight is None else self.workspace // 2
