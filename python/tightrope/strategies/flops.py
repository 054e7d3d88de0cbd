"""What FlopCounterMode is told of the operators, which are opaque to it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..ambient import has_values
from . import ops


def _products(rows: int, weight: Tensor, count: int) -> int:
    """FLOPs of so many products of rows, D and V."""
    vocab_size, width = weight.shape
    return 2 * rows * width * vocab_size * count


def _counted(input: Tensor, arguments) -> int:
    """Rows that go through the products."""
    valid = arguments.valid
    if valid is None or not arguments.skip or not has_values(valid):
        return input.shape[0]
    return int(valid.sum())


def _linear_stats(input, weight, bias, arguments):
    return _products(_counted(input, arguments), weight, 1)


def _linear_stats_backward(summary, coef, needs, input, weight, bias, arguments):
    return _products(_counted(input, arguments), weight, 1 + needs.input_grad + needs.weight_grad)


def _linear_loss(row_scale, balance, target_square, family, needs, input, weight, bias, arguments):
    return _linear_stats_backward(None, None, needs, input, weight, bias, arguments)


def _chunk_stats(memory, span, input, weight, bias, arguments):
    return _products(span.stop - span.start, weight, 1)


def _chunk_gradients(
    memory, summary, coef, span, to_input, to_weight, to_bias, input, weight, bias, arguments
):
    return _products(span.stop - span.start, weight, (to_input is not None) + (to_weight is not None))


for _name, _formula in {
    "linear_stats": _linear_stats,
    "linear_stats_backward": _linear_stats_backward,
    "linear_loss": _linear_loss,
    "chunk_stats": _chunk_stats,
    "chunk_gradients": _chunk_gradients,
}.items():

    def _flat(*flat, out_val=None, _signature=ops.SIGNATURES[_name], _formula=_formula, **_):
        return _formula(*_signature.unflatten(*flat))

    register_flop_formula(getattr(torch.ops.tightrope, _name), get_raw=True)(_flat)
