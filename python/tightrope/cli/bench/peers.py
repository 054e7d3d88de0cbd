"""The losses of the peers: how each computes that of a step, as its users call it.

Packages are imported where they are called: a run needs none that it does not measure.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .cases import Loss
from .inputs import IGNORE_INDEX, Step
from .truth import eager_loss, entropy_bonus

LossOf = Callable[[Step, Loss], Tensor]
# Of the auto-chunker: as many as it takes by itself, said here since what must fit depends on it. By itself
# it leaves logits whole that are not eight times the hidden states and the head, so those of most models.
AUTO_CHUNKS = 8
_AUTO_CHUNKER = {
    "auto_chunker.enable": True,
    "auto_chunker.num_chunk": AUTO_CHUNKS,
    "auto_chunker.amplify_ratio_threshold": 0,
}
TORCH_CHUNK_ROWS = 512
TRL_CHUNK_CLASSES = 32768  # what its trainers pass


# PyTorch's


@functools.cache
def _compile() -> LossOf:
    return torch.compile(eager_loss, dynamic=False, fullgraph=True)


def compiled(step: Step, loss: Loss) -> Tensor:
    return _compile()(step, loss)


@functools.cache
def _compile_chunked() -> LossOf:
    return torch.compile(eager_loss, dynamic=False, fullgraph=True, options=_AUTO_CHUNKER)


def auto_chunked(step: Step, loss: Loss) -> Tensor:
    """Raises where nothing was cut: what ran was torch.compile under another name, and inductor is silent.

    Without its caches, from which a compiled graph comes without that count.
    """
    from torch._inductor import metrics

    with torch.compiler.config.patch(force_disable_caches=True):
        value = _compile_chunked()(step, loss)
    if not metrics.num_auto_chunking:
        raise RuntimeError("inductor's auto-chunker found nothing to cut into chunks")
    return value


def chunked_torch(step: Step, loss: Loss, **options: object) -> Tensor:
    """options: of `torch.nn.LinearCrossEntropyOptions`."""
    value = torch.nn.functional.linear_cross_entropy(
        step.hidden,
        step.weight,
        step.target,
        reduction=_reduction(step),
        options=torch.nn.LinearCrossEntropyOptions(**options),
    )
    return _reduced(step, value)


def _reduction(step: Step) -> str:
    """Of peers that have no entropy: a step with upstream gradients of its own is reduced here."""
    return "mean" if step.advantage is None else "none"


def _reduced(step: Step, value: Tensor) -> Tensor:
    return value if step.advantage is None else (step.advantage * value).sum() / step.normalizer


def _combined(step: Step, loss: Loss, nll: Tensor, entropy: Tensor | None) -> Tensor:
    """The loss from those of each token [N], 0 where ignored. entropy: None where there is no bonus."""
    bonus = entropy_bonus(step, loss)
    rows = (1 - bonus if step.advantage is None else step.advantage) * nll
    if bonus:
        rows = rows - bonus * entropy
    return rows.sum() / step.normalizer


# Of packages


def cce(step: Step, loss: Loss) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    kind = "torch_compile" if step.hidden.device.type == "cpu" else "cce"
    value = linear_cross_entropy(step.hidden, step.weight, step.target, impl=kind, reduction=_reduction(step))
    return _reduced(step, value)


def trl(step: Step, loss: Loss) -> Tensor:
    """As its fused head calls it: on a GPU the rows that count, elsewhere all, and zeros where ignored."""
    from trl.kernels import ChunkedLogProbFunction

    kept, target = step.target != IGNORE_INDEX, step.target.clamp(min=0)
    compact = step.hidden.device.type == "cuda"  # where it has Triton
    log_prob, entropy, *_ = ChunkedLogProbFunction.apply(
        step.hidden[kept] if compact else step.hidden,
        step.weight,
        None,
        target[kept] if compact else target,
        1.0,
        TRL_CHUNK_CLASSES,
        None,
        1.0,
        ("entropy",) if entropy_bonus(step, loss) else (),
    )

    def of_tokens(rows: Tensor) -> Tensor:
        if compact:
            return rows.new_zeros(kept.shape).masked_scatter(kept, rows)
        return rows.masked_fill(~kept, 0)

    return _combined(step, loss, -of_tokens(log_prob), None if entropy is None else of_tokens(entropy))


def trl_divergence(step: Step, loss: Loss) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, weight = step.teacher
    rows, _ = ChunkedDivergenceFunction.apply(step.hidden, step.weight, None, hidden, weight, None, 0.5)
    return rows.sum() / step.normalizer


def liger(step: Step, loss: Loss) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(step.weight, step.hidden, step.target)


def liger_scaled(step: Step, loss: Loss) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        step.hidden, step.weight, step.target, 1.0, IGNORE_INDEX, 1, True
    )
    return _combined(step, loss, nll, entropy)


def liger_divergence(step: Step, loss: Loss) -> Tensor:
    """On a CPU its chunks of rows in plain PyTorch: the Triton kernels do not run there.

    Not compiled: that took two minutes, more than a line of the bench has.
    """
    if step.hidden.device.type == "cuda":
        from liger_kernel.transformers import LigerFusedLinearJSD

        divergence = LigerFusedLinearJSD()
    else:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        divergence = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)
    return divergence(step.hidden, step.weight, *step.teacher, step.target)


def quack(step: Step, loss: Loss) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(step.hidden, step.weight, step.target, ignore_index=IGNORE_INDEX)
