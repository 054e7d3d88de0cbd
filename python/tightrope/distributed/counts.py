"""What a loop over data-parallel ranks needs beside the loss: how many tokens count, and a whole head.

Both are things that are easily got wrong by little: a mean of the ranks' means weighs tokens by the rank they
happen to be on, and a head that is gathered in the usual way loses what the other ranks made of it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import validation
from ..targets import TeacherTarget, TopKTarget
from ..tokens import flatten_target
from . import collectives
from .joint import is_dtensor
from .layout import process_group


def token_count(
    targets: Tensor | TopKTarget | TeacherTarget,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    ignore_index: int = validation.NOTHING_IGNORED,
) -> Tensor:
    """The number of targets that count, over all ranks of a group: what the mean over its tokens divides by.

    Each rank's loss is ``"mean"`` with a normalizer, and the optimizer sees what is made of the ranks'
    gradients. DDP and FSDP average them, so there the token-weighted mean is
    ``normalizer=token_count(targets, group) / world_size``. Where gradients are summed (as of a head that
    ranks share, ``rows="sharded"``) it is ``normalizer=token_count(targets, group)``. With gradient
    accumulation ``targets`` are those of all micro-batches of the step.

    Args:
        targets: this rank's targets, ``(...)`` of an integer dtype, a distribution ``(..., V)``, all of whose
            tokens count, a :class:`tightrope.TeacherTarget`, of which the same is true, or a
            :class:`tightrope.TopKTarget`; on a device that the group's backend serves.
            With ``shift=1`` pass ``targets[..., 1:]``, as the first of a sequence is no target. Ranks may
            have different shapes.
        group: a ProcessGroup, or a one-dimensional DeviceMesh, of ranks that have different tokens (of a mesh
            that has tensor parallel too, the other dimension); by default all processes, or this one where
            torch.distributed is not initialized.
        ignore_index: as in the loss.

    Returns:
        An int64 tensor of shape () on the targets' device, the same on all ranks; one small all-gather.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    ignore_index = validation.ignore_index(ignore_index, targets)
    if isinstance(targets, TopKTarget):
        like, tokens = targets.indices, targets.indices.shape[:-1]
    elif isinstance(targets, TeacherTarget):
        like, tokens = targets.hidden, targets.hidden.shape[:-1]
    else:
        like = validation.tensor("targets", targets, (*validation.INTEGER, *validation.FLOATING))
        tokens = targets.shape[:-1] if targets.is_floating_point() else targets.shape
    if is_dtensor(like):
        raise TypeError("targets: got a DTensor, expected the targets of this rank; use targets.to_local()")
    valid = flatten_target(targets, tokens, ignore_index, 0, like.device).valid
    count = torch.tensor(tokens.numel(), device=like.device) if valid is None else valid.sum()
    if group is None and not dist.is_initialized():
        return count
    group = dist.group.WORLD if group is None else process_group(group)
    return collectives.over_ranks(count, group.group_name)


def full_weight(weight: Tensor) -> Tensor:
    """All rows of a sharded head, on every rank, with the gradients of all ranks.

    For a loss that is called outside the module that owns the head (inside, as of :class:`tightrope.LMHead`,
    FSDP does this by itself, and overlaps it). ``weight.full_tensor()`` takes the gradient that each rank
    finds for the whole head as that of all, so the parts that the others found for its shard are lost. Here
    it is their sum, by one reduce-scatter in the backward pass.

    The sum is right where each rank's loss is of tokens of its own. FSDP's own gradients are the mean over
    ranks: beside these divide this one, ``weight.grad``, by the number of ranks.

    Args:
        weight: a DTensor ``(V, D)`` on a mesh of one dimension, or a tensor, which is given back as it is.

    Returns:
        A tensor ``(V, D)``, of the same dtype.

    Raises:
        TypeError: weight is not a tensor.
        ValueError: the mesh has several dimensions: which of its ranks have tokens of their own is then not
            known. ``weight.full_tensor(grad_placements=...)`` says it: Partial() for those that have.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: got {type(weight).__name__}, expected a tensor")
    if not is_dtensor(weight):
        return weight
    from torch.distributed.tensor import Partial

    if weight.device_mesh.ndim != 1:
        raise ValueError(
            f"weight: got a DTensor on a mesh of {weight.device_mesh.ndim} dimensions, expected one: use "
            "weight.full_tensor(grad_placements=...), with Partial() for each dimension whose ranks have "
            "tokens of their own, and Replicate() for the others"
        )
    return weight.full_tensor(grad_placements=[Partial()])
