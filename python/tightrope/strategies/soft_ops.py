"""The drivers of soft targets' gradients as dispatcher operators."""

from __future__ import annotations

import torch

from ..arguments import LinearArguments, LogitsArguments, Signature
from . import ops, soft


def _linear_target_grad(summary, slopes, input, weight, bias, arguments: LinearArguments):
    """The gradient of the distribution, or of the top-k probabilities; slopes [3, N] as in `soft`."""
    problem = ops.linear_problem(input, weight, bias, arguments)
    with ops.exact_products(input.device):
        return soft.of_linear(problem, summary, slopes, arguments.budget)


def _logits_target_grad(summary, slopes, logits, arguments: LogitsArguments):
    with ops.exact_products(logits.device):
        return soft.of_logits(ops.logits_problem(logits, arguments), summary, slopes)


def _fake(*given):
    arguments = given[-1]
    like = arguments.topk_prob if arguments.dense is None else arguments.dense
    return torch.empty_like(like, memory_format=torch.contiguous_format)


linear_target_grad = ops.register(
    "linear_target_grad",
    Signature("Tensor summary", "Tensor slopes", *ops.HEAD),
    "Tensor",
    _linear_target_grad,
    _fake,
)
logits_target_grad = ops.register(
    "logits_target_grad",
    Signature("Tensor summary", "Tensor slopes", *ops.LOGITS),
    "Tensor",
    _logits_target_grad,
    _fake,
)
