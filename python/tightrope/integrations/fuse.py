"""Any Hugging Face model on Tightrope's loss, its own forward unchanged.

``fuse`` gives the model and its head classes of their own, subclasses of those they have: methods of
classes, not closures on instances, so that signatures, saved architectures, copies and pickles stay as they
were.
While labels are passed, the head gives a record in place of logits (`deferred`), and the model's own
cross-entropy of it is the loss, which is computed inside a call of the head: there FSDP, DeepSpeed and
offloading have its weight in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .classes import LIGER, FusedLinear, FusedModel, OtherHead, become, fused, is_ligers, is_linear
from .handle import Handle
from .objective import Objective


def fuse(
    model: nn.Module,
    balance: float | Tensor = 0.0,
    loss_fn: Callable[..., Tensor] | None = None,
    **options: Any,
) -> Handle:
    """Train a Hugging Face model on the reality-creativity loss, without its logits.

    From then on a call with labels has Tightrope's loss in place of cross-entropy; scales, softcaps and
    biases of the model's own forward are part of it, and auxiliary losses stay. The logits in its outputs
    are made when they are read. Calls without labels are untouched. What the model does to its logits that
    cannot be deferred makes them: the loss is the same, and one warning names the operation.

    A call takes ``balance=`` beside the labels, a number or one for each token (in the shape of the input
    ids, at the position that predicts), in the place of the handle's.

    Args:
        model: a ``PreTrainedModel`` whose forward takes labels, or what has one inside (PEFT's, DDP's).
        balance: of :func:`tightrope.linear_reality_creativity_loss`; the handle's may be changed at any time.
        loss_fn: a loss of the statistics, as of :func:`tightrope.linear_vocab_loss`, in place of the balance.
        options: of the one or the other function, but for those that the model's own code says (logit_scale,
            softcap, ignore_index, reduction, normalizer, shift, row_weight).

    Raises:
        TypeError, ValueError: an option is unknown or not as the loss expects; the model has no head, or no
            labels; it is fused already.
        RuntimeError: Liger's kernels are in the model: they do not call its head. Later, from a call: a
            Trainer has taken the labels away (label smoothing, compute_loss_func); the model has a loss
            that is no cross-entropy of what its head gave.
    """
    target = _model_in(model)
    if isinstance(target, FusedModel):
        raise ValueError(
            f"model: got a {type(target).__name__} that is fused, expected one that is not: restore it"
        )
    if is_ligers(target.forward):
        raise RuntimeError(LIGER)
    handle = Handle(target, Objective(balance, loss_fn, options))
    heads = _heads(target.get_output_embeddings())
    for module, kind in ((target, FusedModel), *heads):
        become(module, fused(kind, type(module)))
        module._tightrope = handle
    return handle


def _model_in(model: nn.Module) -> nn.Module:
    """The outermost module that has a head and takes labels."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a transformers.PreTrainedModel")
    for module in model.modules():
        if not hasattr(type(module), "get_output_embeddings") or module.get_output_embeddings() is None:
            continue
        if "labels" in inspect.signature(type(module).forward).parameters:
            return module
    raise ValueError(
        f"model: got {type(model).__name__}, expected a transformers.PreTrainedModel with output embeddings "
        "(a vocabulary head) and a forward that takes labels"
    )


def _heads(head: nn.Module) -> list[tuple[nn.Module, type]]:
    """The modules that make logits, with what becomes of them: those that adapters wrap, where they do."""
    if hasattr(head, "modules_to_save"):  # PEFT's ModulesToSaveWrapper
        return [
            pair for inner in (head.original_module, *head.modules_to_save.values()) for pair in _heads(inner)
        ]
    if hasattr(head, "base_layer"):  # PEFT's layers
        return _heads(head.base_layer)
    if isinstance(head, nn.ModuleList):
        return [pair for inner in head for pair in _heads(inner)]
    return [(head, FusedLinear if is_linear(head) else OtherHead)]
