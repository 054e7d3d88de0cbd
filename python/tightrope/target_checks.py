"""Checks of the targets that a caller passes, as `validation` checks the other arguments."""

from __future__ import annotations

import torch

from .losses import RealityCreativity
from .targets import TeacherTarget, TopKTarget
from .validation import FLOATING, INTEGER, number, same_device, tensor


def target(value: object, tokens: torch.Size, vocab_size: int, device: torch.device, owner: str) -> None:
    """Class indices (...), a distribution (..., V), a TopKTarget or a TeacherTarget.

    owner: what has the tokens. vocab_size: classes of a distribution, and rows of a teacher's head.
    """
    if isinstance(value, TeacherTarget):
        _teacher(value, tokens, vocab_size, device, owner)
        return
    if isinstance(value, TopKTarget):
        _topk(value, tokens, device, owner)
        return
    if isinstance(value, tuple):
        raise TypeError(
            "target: got a tuple, expected a tensor, tightrope.TopKTarget(indices, probs) or "
            "tightrope.TeacherTarget(hidden, weight)"
        )
    tensor("target", value, (*INTEGER, *FLOATING))
    distribution = value.is_floating_point()
    shape = (*tokens, vocab_size) if distribution else tuple(tokens)
    if value.shape != shape:
        kind = (
            "a floating-point target is a distribution over V" if distribution else "one class index a token"
        )
        raise ValueError(f"target: got shape {list(value.shape)}, expected {list(shape)} ({kind})")
    same_device(owner, device, target=value)


def teacher_alone(value: object, family: RealityCreativity, owner: str) -> None:
    """Raise ValueError where a loss that takes a teacher's target alone is given what it does not take."""
    reality = family.reality
    if not isinstance(value, TeacherTarget):
        raise ValueError(
            f"target: got {type(value).__name__} with reality={reality!r}, expected a "
            "tightrope.TeacherTarget; of others docs/recipes.md has the reverse KL as a loss of your own"
        )
    if reality != "jensen_shannon":
        return
    if owner != "input":
        raise ValueError(
            f"reality: got {reality!r} with logits, expected hidden states and a head: it makes the "
            "student's logits more than once"
        )
    if family.label_smoothing:
        raise ValueError(
            f"label_smoothing: got {family.label_smoothing:g} with reality={reality!r}, expected 0: the "
            "mixture of teacher and student is smooth where either is"
        )


def _topk(value: TopKTarget, tokens: torch.Size, device: torch.device, owner: str) -> None:
    indices = tensor("target.indices", value.indices, INTEGER)
    probs = tensor("target.probs", value.probs)
    if indices.dim() < 1 or indices.shape[:-1] != tokens or indices.shape[-1] < 1:
        raise ValueError(
            f"target.indices: got shape {list(indices.shape)}, expected {[*tokens, 'K']} with K of at least 1"
        )
    if probs.shape != indices.shape:
        raise ValueError(
            f"target.probs: got shape {list(probs.shape)}, expected {list(indices.shape)}, that of indices"
        )
    same_device(owner, device, **{"target.indices": indices, "target.probs": probs})


def _teacher(
    value: TeacherTarget, tokens: torch.Size, vocab_size: int, device: torch.device, owner: str
) -> None:
    hidden, weight = tensor("target.hidden", value.hidden), tensor("target.weight", value.weight)
    if hidden.dim() < 1 or hidden.shape[:-1] != tokens:
        raise ValueError(
            f"target.hidden: got shape {list(hidden.shape)}, expected {[*tokens, 'D']} with a D of its own: "
            f"the tokens of {owner}"
        )
    if weight.shape != (vocab_size, hidden.shape[-1]):
        raise ValueError(
            f"target.weight: got shape {list(weight.shape)}, expected {[vocab_size, hidden.shape[-1]]}: the "
            "vocabulary of the student, by the D of target.hidden"
        )
    if value.bias is not None:
        tensor("target.bias", value.bias)
        if value.bias.shape != weight.shape[:1]:
            raise ValueError(
                f"target.bias: got shape {list(value.bias.shape)}, expected [{vocab_size}], the V of "
                "target.weight"
            )
    given = {"target.hidden": hidden, "target.weight": weight, "target.bias": value.bias}
    same_device(owner, device, **given)
    number("target.logit_scale", value.logit_scale)
    if value.softcap is not None:
        number("target.softcap", value.softcap, low=0.0, above=True)
